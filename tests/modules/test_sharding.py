"""Sharded training equals the whole one; what cannot be sharded says so."""

import copy
import json
from pathlib import Path

import pytest
import torch
from torch import nn

from modules import DINO, LinearProbe, Supervised
from modules.backbones import Timm, ViT
from modules.optim import Optimization
from modules.sharding import Sharded, check, units
from tests.experiments.test_mae_runs import RUN as MAE_RUN
from tests.experiments.test_resume import losses_on_one_and_two
from tests.runs import (
    DINO_RUN,
    TINY,
    differences,
    last_checkpoint,
    logged_losses,
    only_run,
    patchlight,
)

STILL = [
    *("--model.init_args.backbone.init_args.dropout=0",),
    *("--model.init_args.backbone.init_args.drop_path=0", "--trainer.max_epochs=2"),
]
MASKED = "--model.init_args.masked_patches={num_prototypes: 32}"
RUNS = {
    "supervised": [*TINY, *STILL, "--model.init_args.optimizer.clip_norm=0.5"],
    "mae": MAE_RUN,
    "dino": [*DINO_RUN, MASKED],
}


@pytest.mark.slow
@pytest.mark.parametrize("name", RUNS)
def test_two_sharded_devices_follow_one_and_resume(tmp_path: Path, name: str) -> None:
    one, two = losses_on_one_and_two(tmp_path, *RUNS[name], strategy="sharded")
    assert len({round(loss, 3) for loss in one.values()}) > 4
    assert two == pytest.approx(one, abs=1e-5)
    ends = [last_checkpoint(only_run(tmp_path / place))["state_dict"] for place in ("1", "2")]
    assert list(ends[0]) == list(ends[1])
    for key, value in ends[0].items():
        is_told = torch.ones_like(value, dtype=torch.bool)
        if key.endswith("qkv.bias"):  # that of keys changes no attention: its gradient is rounding
            is_told.view(3, -1)[1] = False
        found, expected = (tensor[is_told] for tensor in (ends[1][key], value))
        torch.testing.assert_close(found, expected, atol=2e-4, rtol=1e-3, msg=key)
    if name == "mae":  # whose checkpoints have nothing that those of the others have not
        return
    # Killed, the sharded run goes on bit by bit, and its file is one that others load.
    killed = tmp_path / "killed"
    killed.mkdir()
    arguments = [*RUNS[name], "--trainer.devices=2", "--data.init_args.batch_size=2"]
    arguments += ["--trainer.strategy=sharded"]
    patchlight("fit", *arguments, cwd=killed, kill_at=3)
    run = only_run(killed)
    assert last_checkpoint(run)["global_step"] == 3
    done = patchlight("fit", "--resume", str(run), "--trainer.devices=2", cwd=killed)
    assert done.returncode == 0, done.stderr
    assert differences(last_checkpoint(run)["state_dict"], ends[1]) == []
    assert logged_losses(run) == two
    if name == "supervised":
        finished_and_evaluated(run)


def finished_and_evaluated(run: Path) -> None:
    """A finished run is taken up, and evaluated by itself, with shards of two devices."""
    result = json.loads((run / "result.json").read_text())
    assert set(result["metrics"]) > {"val/accuracy", "val/loss"}
    (run / "result.json").unlink()
    logged = logged_losses(run, "val/loss")
    last = run / "checkpoints" / "last.ckpt"
    kept, devices = last.read_bytes(), ["--trainer.devices=2", "--trainer.strategy=sharded"]
    done = patchlight("fit", "--resume", str(run), *devices, cwd=run)
    assert done.codes == [0, 0], done.stderr
    again = json.loads((run / "result.json").read_text())
    assert again["step"] == result["step"]
    figures = {name: value for name, value in result["metrics"].items() if "val/" in name}
    assert {name: again["metrics"][name] for name in figures} == pytest.approx(figures, abs=1e-6)
    assert last.read_bytes() == kept
    assert logged_losses(run, "val/loss") == logged
    given = ["--config", str(run / "config.yaml"), "--ckpt_path", str(last)]
    done = patchlight("validate", *given, *devices, cwd=run)
    assert done.codes == [0, 0], done.stderr
    said = dict(line.split() for line in done.stdout.splitlines() if line.startswith("val/"))
    assert {name: float(said[name]) for name in figures} == pytest.approx(figures, abs=1e-6)


@pytest.mark.slow
def test_what_one_strategy_began_the_other_goes_on_with(tmp_path: Path) -> None:
    """With the optimizer's state of every weight, whose order is not that of the network."""
    arguments = [*RUNS["dino"], "--trainer.devices=2", "--data.init_args.batch_size=2"]
    losses = []
    for name, first, then in (("a", "ddp", "sharded"), ("b", "sharded", "ddp")):
        (tmp_path / name).mkdir()
        begin = [*arguments, f"--trainer.strategy={first}"]
        patchlight("fit", *begin, cwd=tmp_path / name, kill_at=3)
        run = only_run(tmp_path / name)
        goes_on = ["--resume", str(run), "--trainer.devices=2", f"--trainer.strategy={then}"]
        done = patchlight("fit", *goes_on, cwd=tmp_path / name)
        assert done.returncode == 0, done.stderr
        losses.append(logged_losses(run))
    assert len(losses[0]) == 8
    assert losses[0] == pytest.approx(losses[1], abs=1e-5)


def held(network: nn.Module, *groups: list[nn.Parameter]) -> Sharded:
    """The strategy as it is when a run has been set up, on one device and without shards."""
    strategy = Sharded()
    strategy._model = network
    strategy.broadcast = lambda obj, src=0: obj  # type: ignore[method-assign]
    if groups:
        strategy.optimizers = [torch.optim.AdamW([{"params": group} for group in groups])]
    return strategy


def two(width: int) -> nn.Sequential:
    return nn.Sequential(nn.Linear(3, 3), nn.Linear(3, width))


def test_a_checkpoint_that_does_not_fit_is_refused_as_a_whole(tmp_path: Path) -> None:
    network, path = two(2), tmp_path / "last.ckpt"
    weights = list(network.parameters())
    saved = held(network, weights[:2], weights[2:])
    network(torch.ones(1, 3)).sum().backward()
    saved.optimizers[0].step()
    state = saved.optimizers[0].state_dict()
    torch.save({"state_dict": network.state_dict(), "optimizer_states": [state]}, path)

    other = two(5)
    before = copy.deepcopy(other.state_dict())
    own = list(other.parameters())
    says = r"its 1\.weight is \[2, 3\], that of the network \[5, 3\]; resume with the run's own"
    with pytest.raises(ValueError, match=says):
        held(other, own[:2], own[2:]).load_checkpoint(path)
    with pytest.raises(ValueError, match=r"2 tensors are in one of them only, such as 2\.bias"):
        held(nn.Sequential(*two(2), nn.Linear(2, 2))).load_checkpoint(path)
    assert differences(dict(other.state_dict()), before) == []  # nothing was taken

    same = two(2)
    before, own = copy.deepcopy(same.state_dict()), list(same.parameters())
    says = r"groups of \[\[2, 2\]\] tensors, those of the run of \[\[4\]\]; resume with"
    with pytest.raises(ValueError, match=says):
        held(same, own).load_checkpoint(path)
    with pytest.raises(ValueError, match=r"exp_avg of its weight 0 is \[3, 3\], that .* is \[3\];"):
        held(same, own[1::-1], own[2:]).load_checkpoint(path)
    assert differences(dict(same.state_dict()), before) == []
    held(same).load_checkpoint(path)  # an evaluation has no optimizer
    assert differences(dict(same.state_dict()), dict(network.state_dict())) == []


def test_a_damaged_or_unsafe_checkpoint_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "last.ckpt"
    torch.save({"state_dict": two(2).state_dict(), "x": Optimization()}, path)
    with pytest.raises(ValueError, match="holds pickled Python objects"):
        held(two(2)).load_checkpoint(path)
    path.write_bytes(path.read_bytes()[:500])
    with pytest.raises(ValueError, match="it is truncated or not a checkpoint"):
        held(two(2)).load_checkpoint(path)
    with pytest.raises(FileNotFoundError, match="there is no checkpoint at"):
        held(two(2)).load_checkpoint(tmp_path / "none.ckpt")


def test_units_are_blocks() -> None:
    vit = ViT("mu", 8, 32, depth=3)
    assert units(vit) == list(vit.blocks)
    swin = Timm("swin_tiny_patch4_window7_224", image_size=224)
    assert len(units(swin)) == 12
    assert units(nn.Linear(2, 2)) == []


def test_what_cannot_be_sharded_says_so() -> None:
    vit = ViT("mu", 8, 32)
    check(Supervised(vit, 10), ["LearningRateMonitor"])
    check(DINO(vit, num_prototypes=8, hidden_dim=8, bottleneck_dim=4), [])
    with pytest.raises(ValueError, match="LinearProbe cannot be sharded"):
        check(LinearProbe(vit, 10), [])
    lamb = Optimization(name="lamb")
    with pytest.raises(ValueError, match=r"optimizer\.name is lamb, which asks for norms"):
        check(Supervised(vit, 10, lamb), [])
    with pytest.raises(ValueError, match=r"callbacks\.Pictures looks into blocks"):
        check(Supervised(vit, 10), ["Pictures"])
