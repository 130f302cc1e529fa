"""Sharded training equals the whole one; what cannot be sharded says so."""

from pathlib import Path
from unittest.mock import Mock

import pytest
import torch
from lightning.pytorch import Trainer
from torch import nn

from modules import DINO, LinearProbe, Supervised
from modules.backbones import Timm, ViT
from modules.optim import Optimization
from modules.sharding import check, units
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
        torch.testing.assert_close(ends[1][key], value, atol=2e-4, rtol=1e-3, msg=key)
    # Killed, the sharded run goes on bit by bit, and its file is one that others load.
    killed = tmp_path / "killed"
    killed.mkdir()
    arguments = [*RUNS[name], "--trainer.devices=2", "--data.init_args.batch_size=2"]
    arguments += ["--trainer.strategy=sharded"]
    patchlight("fit", *arguments, cwd=killed, kill_at=3)
    run = only_run(killed)
    assert last_checkpoint(run)["global_step"] == 3
    done = patchlight("fit", "--resume", str(run), cwd=killed)
    assert done.returncode == 0, done.stderr
    assert differences(last_checkpoint(run)["state_dict"], ends[1]) == []
    assert logged_losses(run) == two


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
        goes_on = ["--resume", str(run), f"--trainer.strategy={then}"]
        done = patchlight("fit", *goes_on, cwd=tmp_path / name)
        assert done.returncode == 0, done.stderr
        losses.append(logged_losses(run))
    assert len(losses[0]) == 8
    assert losses[0] == pytest.approx(losses[1], abs=1e-5)


def test_units_are_blocks() -> None:
    vit = ViT("mu", 8, 32, depth=3)
    assert units(vit) == list(vit.blocks)
    swin = Timm("swin_tiny_patch4_window7_224", image_size=224)
    assert len(units(swin)) == 12
    assert units(nn.Linear(2, 2)) == []


def test_what_cannot_be_sharded_says_so() -> None:
    vit = ViT("mu", 8, 32)
    trainer = Mock(spec=Trainer, callbacks=[])
    check(Supervised(vit, 10), trainer)
    check(DINO(vit, num_prototypes=8, hidden_dim=8, bottleneck_dim=4), trainer)
    with pytest.raises(ValueError, match="LinearProbe cannot be sharded"):
        check(LinearProbe(vit, 10), trainer)
    lamb = Optimization(name="lamb")
    with pytest.raises(ValueError, match=r"optimizer\.name is lamb, which asks for norms"):
        check(Supervised(vit, 10, lamb), trainer)

    class Pictures:
        """Of that name."""

    with pytest.raises(ValueError, match=r"callbacks\.Pictures looks into blocks"):
        check(Supervised(vit, 10), Mock(spec=Trainer, callbacks=[Pictures()]))
