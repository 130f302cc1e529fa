"""Runs on packs: killed and resumed, on two devices, evaluated at several sizes."""

import json
from pathlib import Path

import pytest
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from experiments.resolutions import parse_sides
from tests.experiments.test_resume import losses_on_one_and_two
from tests.runs import EXPERIMENTS, TINY, only_run, patchlight

# Three epochs of a few steps, with everything random switched on.
PACKED = [
    *("--config", str(EXPERIMENTS / "quickstart" / "navit.yaml")),
    *("--config", str(EXPERIMENTS / "navit" / "smoke.yaml")),
    "--data.init_args.source_args={num_train: 40, num_val: 11, min_side: 24, max_side: 64}",
    "--data.init_args.resolution={kind: uniform, min_side: 16, max_side: 64}",
    "--data.init_args.drop={kind: beta, rate: 0.4, std: 0.2, last: 0.5}",
    *("--data.init_args.crop_scale=[0.5,1.0]", "--model.init_args.ema_decay=0.9"),
    *("--model.init_args.backbone.init_args.patch_size=8", "--data.init_args.row_length=128"),
    *("--model.init_args.backbone.init_args.dropout=0.2",),
    *("--model.init_args.backbone.init_args.drop_path=0.3",),
    *("--trainer.max_epochs=3", "--trainer.max_steps=-1", "--trainer.enable_progress_bar=false"),
    "--checkpoint.every_n_steps=1",
]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("packed")
    done = patchlight("fit", *PACKED, cwd=directory)
    assert done.returncode == 0, done.stderr
    return only_run(directory)


@pytest.mark.slow
def test_the_fill_rate_is_logged_every_epoch(whole: Path) -> None:
    events = EventAccumulator(str(whole))
    events.Reload()
    rates = [event.value for event in events.Scalars("train/fill_rate")]
    assert len(rates) == 3
    assert all(0.6 < rate <= 1.0 for rate in rates)
    assert events.Images("train/augmented_batch")


@pytest.mark.slow
def test_two_processes_train_and_evaluate_like_one(tmp_path: Path) -> None:
    still = ["--model.init_args.backbone.init_args.dropout=0"]
    still += ["--model.init_args.backbone.init_args.drop_path=0", "--trainer.max_epochs=7"]
    one, two = losses_on_one_and_two(tmp_path, *PACKED, *still, batch=("num_rows", 2))
    assert len(one) >= 20
    assert two == pytest.approx(one, abs=1e-5)
    run = only_run(tmp_path / "1")
    found = []
    for devices in ("1", "2"):
        done = patchlight(
            "validate",
            *("--config", str(run / "config.yaml")),
            *("--ckpt_path", str(run / "checkpoints" / "last.ckpt")),
            *(f"--trainer.devices={devices}", "--trainer.strategy=ddp"),
            *("--data.init_args.num_rows", "1"),
            cwd=tmp_path,
        )
        assert done.returncode == 0, done.stderr
        lines = [line for line in done.stdout.splitlines() if line.startswith("val/")]
        found.append({name: json.loads(value) for name, value in map(str.split, lines)})
    assert found[0] == found[1]
    assert found[0]["val/accuracy"] * 11 == pytest.approx(round(found[0]["val/accuracy"] * 11))


@pytest.mark.slow
def test_resolutions_of_two_runs(tmp_path: Path, whole: Path) -> None:
    """One of packs, one of square crops; the first side is the one it was trained at."""
    done = patchlight("fit", *TINY, "--trainer.max_epochs=1", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    square = only_run(tmp_path)
    command = ("resolutions", str(square), str(whole), "--sides", "16,32,64", "--metric")
    done = patchlight(*command, "val/loss", "--checkpoint", "last", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    lines = (square / "resolutions.md").read_text().splitlines()[2:]
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    assert [row[1] for row in rows] == ["16", "32", "64"] * 2
    assert [float(row[2]) for row in rows[:3]] == [16.0, 64.0, 256.0]  # patches of 4
    tokens = [float(row[2]) for row in rows[3:]]  # patches of 8, whole ones
    assert tokens == pytest.approx([4, 16, 64], rel=0.15)
    result = json.loads((square / "result.json").read_text())["metrics"]
    assert float(rows[0][3]) == pytest.approx(result["val/loss"], abs=1e-4)
    assert len({row[3] for row in rows}) > 4
    picture = Image.open(square / "resolutions.png")
    assert picture.size[0] > 500

    done = patchlight(*command, "val/nothing", "--checkpoint", "last", cwd=tmp_path)
    assert done.returncode == 1
    assert "has no metric 'val/nothing'; it has" in done.stderr
    (square / "resolutions.md").unlink()
    done = patchlight("resolutions", str(square), "--sides", "16,18", cwd=tmp_path)
    assert done.returncode == 1
    assert "not divisible by patch_size 4" in done.stderr
    assert len((square / "resolutions.md").read_text().splitlines()) == 3  # what came before
    done = patchlight("resolutions", str(square), "nowhere", "--sides", "16", cwd=tmp_path)
    assert done.returncode == 1
    assert "nowhere/config.yaml: no such file" in done.stderr


def test_sides() -> None:
    assert parse_sides("16,32") == [16, 32]
    for text in ("", "a", "0", "16,-2"):
        with pytest.raises(ValueError, match="expected pixels, such as 64,96,128"):
            parse_sides(text)
