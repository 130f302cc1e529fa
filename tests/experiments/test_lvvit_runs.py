"""Label maps and token labelling by the command: killed, resumed, on two processes."""

import json
import signal
from pathlib import Path

import pytest
import timm
import torch

from datamodules.sources import open_source
from tests.experiments.test_resume import losses_on_one_and_two, same_end
from tests.label_maps import write_maps
from tests.runs import EXPERIMENTS, last_checkpoint, logged_losses, only_run, patchlight

RELABEL = [
    *("relabel", "--teacher", "timm:test_resnet.r160_in1k", "--weights", "weights.pth"),
    *("--data", "shapes", "--source-args", '{"num_train": 10, "num_val": 2}', "--num-workers", "0"),
    *("--image-size", "64", "--batch-size", "2", "--shard-size", "4", "--accelerator", "cpu"),
]


@pytest.mark.slow
def test_relabel_killed_then_finished_by_two_processes(tmp_path: Path) -> None:
    """The maps are to the bit those of a run on one process that nothing stopped."""
    torch.manual_seed(0)
    state = timm.create_model("test_resnet.r160_in1k", num_classes=10).state_dict()
    torch.save(state, tmp_path / "weights.pth")
    one, two = ["--devices", "1"], ["--devices", "2"]
    done = patchlight(*RELABEL, *one, "--out", "whole", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    killed = patchlight(*RELABEL, *one, "--out", "maps", cwd=tmp_path, kill_at=3)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert contents(tmp_path / "maps") == {
        name: content
        for name, content in contents(tmp_path / "whole").items()
        if name in ("maps.json", "maps-00000.safetensors")
    }
    done = patchlight(*RELABEL, *two, "--out", "maps", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("maps of 10 images") == 1
    assert contents(tmp_path / "maps") == contents(tmp_path / "whole")


def contents(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(directory.iterdir())}


def arguments(directory: Path) -> list[str]:
    """Of a run with maps that are written there."""
    source = open_source("shapes", "train", None, channels=3, num_train=23, num_val=7)
    write_maps(directory / "maps", source)
    return [
        *("--config", str(EXPERIMENTS / "quickstart" / "lvvit.yaml")),
        *("--config", str(EXPERIMENTS / "smoke.yaml"), "--checkpoint.every_n_steps=1"),
        *("--data.init_args.source_args={num_train: 23, num_val: 7}", "--trainer.max_steps=10"),
        *(f"--data.init_args.labels={directory / 'maps'}", "--model.init_args.ema_decay=0.9"),
        *("--data.init_args.rand_augment=rand-m9-mstd0.5-inc1", "--data.init_args.erasing=0.5"),
        *("--model.init_args.mix_tokens=batch", "--trainer.enable_progress_bar=false"),
        "--trainer.callbacks=[]",
    ]


@pytest.mark.slow
def test_token_labelling_killed_and_resumed(tmp_path: Path) -> None:
    drop = "--model.init_args.backbone.init_args.drop_path=0.3"
    run = ["fit", *arguments(tmp_path), drop]
    places = whole, stopped = tmp_path / "a", tmp_path / "b"
    for place in places:
        place.mkdir()
    done = patchlight(*run, cwd=whole)
    assert done.returncode == 0, done.stderr
    killed = patchlight(*run, cwd=stopped, kill_at=7)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert last_checkpoint(only_run(stopped))["global_step"] == 7
    done = patchlight("fit", "--resume", str(only_run(stopped)), cwd=stopped)
    assert done.returncode == 0, done.stderr
    assert same_end(only_run(stopped), only_run(whole)) == []
    assert logged_losses(only_run(stopped)) == logged_losses(only_run(whole))


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["ddp", "sharded"])
def test_two_processes_follow_one(tmp_path: Path, strategy: str) -> None:
    """With the stem's batch norms over both, and pairs that no device shares with another."""
    more = ["--model.init_args.mix_tokens=pair", "--trainer.sync_batchnorm=true"]
    one, two = losses_on_one_and_two(
        tmp_path, *arguments(tmp_path), *more, "--trainer.max_steps=20", strategy=strategy
    )
    assert len(one) == 20
    assert two == pytest.approx(one, abs=1e-5)


@pytest.mark.slow
def test_batch_norms_that_are_not_synchronised_are_those_of_the_first_device(
    tmp_path: Path,
) -> None:
    """In shards as with DDP, and what was logged is what the checkpoint gives."""
    devices = ["--trainer.devices=2", "--data.init_args.batch_size=2"]
    found = []
    for strategy in ("ddp", "sharded"):
        place = tmp_path / strategy
        place.mkdir()
        done = patchlight(
            "fit", *arguments(tmp_path), *devices, f"--trainer.strategy={strategy}", cwd=place
        )
        assert done.returncode == 0, done.stderr
        run = only_run(place)
        figures = json.loads((run / "result.json").read_text())["metrics"]
        kept = last_checkpoint(run)["state_dict"]
        statistics = {name: value for name, value in kept.items() if "running_" in name}
        assert statistics
        found.append((logged_losses(run), figures, statistics))
    (losses, figures, statistics), (sharded_losses, sharded_figures, sharded_statistics) = found
    assert sharded_losses == pytest.approx(losses, abs=1e-5)
    torch.testing.assert_close(sharded_statistics, statistics, atol=1e-5, rtol=1e-4)
    evaluated = {name: value for name, value in figures.items() if name.startswith("val/")}
    assert {name: sharded_figures[name] for name in evaluated} == pytest.approx(evaluated, abs=1e-5)
    given = ["--config", str(run / "config.yaml")]
    given += ["--ckpt_path", str(run / "checkpoints" / "last.ckpt"), "--trainer.devices=1"]
    done = patchlight("validate", *given, "--trainer.strategy=auto", cwd=run)
    assert done.returncode == 0, done.stderr
    said = dict(line.split() for line in done.stdout.splitlines() if line.startswith("val/"))
    assert {n: float(said[n]) for n in evaluated} == pytest.approx(evaluated, abs=1e-5)
