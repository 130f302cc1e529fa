"""Seeding, pictures, averages."""

from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest
import torch
from lightning.pytorch import Callback, Trainer
from torch import nn

from callbacks import Checkpoint, FiniteLoss
from callbacks.checkpoint_files import read_checkpoint
from callbacks.ema import Average, advance
from callbacks.pictures import for_display
from tests import small


def test_low_precision_averages_are_refused() -> None:
    target, source = nn.Linear(2, 2).to(torch.bfloat16), nn.Linear(2, 2)
    with pytest.raises(ValueError, match=r"bfloat16 would not move at decay 0\.999"):
        advance(Average(target, source, 0.999))


def test_average_of_a_low_precision_source_moves_and_buffers_are_copied() -> None:
    target, source = nn.BatchNorm1d(3), nn.BatchNorm1d(3)
    source.running_mean.fill_(5.0)
    source.to(torch.bfloat16)
    nn.init.constant_(source.weight, 2.0)
    advance(Average(target, source, 0.9))
    torch.testing.assert_close(target.weight, torch.full((3,), 1.1))
    assert target.weight.dtype == torch.float32
    torch.testing.assert_close(target.running_mean, torch.full((3,), 5.0))


def test_dropout_differs_by_step_and_not_by_what_was_drawn_before(tmp_path: Path) -> None:
    from lightning.pytorch import Callback

    class Draw(Callback):
        def __init__(self) -> None:
            self.drawn: list[float] = []

        def on_before_zero_grad(self, *_: object) -> None:
            self.drawn.append(torch.rand(()).item())

    first, second = Draw(), Draw()
    small.trainer(tmp_path, first).fit(small.method(), small.data())
    torch.manual_seed(1234)
    small.trainer(tmp_path, second).fit(small.method(), small.data())
    assert first.drawn == second.drawn
    assert len(set(first.drawn)) == 15


def test_pictures_are_grids_in_zero_to_one() -> None:
    grid = for_display(torch.randn(10, 1, 4, 6), columns=5)
    assert grid.shape == (3, 2 * 5 + 1, 5 * 7 + 1)
    assert grid.min() == 0.0
    assert grid.max() == 1.0


def test_a_run_that_diverges_stops_and_keeps_what_it_had(tmp_path: Path) -> None:
    class Spoil(Callback):
        def on_train_batch_start(self, trainer: Any, module: Any, batch: Any, index: int) -> None:
            if trainer.global_step == 6:
                with torch.no_grad():
                    module.classifier.head.weight.fill_(float("nan"))

    run = small.trainer(tmp_path, Spoil(), FiniteLoss(), log_every_n_steps=100)
    with pytest.raises(
        ValueError, match=r"infinite or not a number at step 6; last\.ckpt is older"
    ):
        run.fit(small.method(), small.data())
    kept = read_checkpoint(next(tmp_path.rglob("last.ckpt")))
    assert kept["global_step"] == 6
    assert torch.isfinite(kept["state_dict"]["classifier.head.weight"]).all()


def test_no_number_is_never_the_best(tmp_path: Path) -> None:
    checkpoint = Checkpoint(monitor="val/loss", mode="min")
    values = iter((float("nan"), 2.0, float("nan"), 1.0))
    trainer = Mock(spec=Trainer, fast_dev_run=True, sanity_checking=False, global_step=1)
    trainer.state = Mock(fn="fit")
    checkpoint.directory = tmp_path
    seen = []
    for value in values:
        trainer.callback_metrics = {"val/loss": torch.tensor(value)}
        checkpoint.on_validation_end(trainer, small.method())
        seen.append(checkpoint.best)
    assert seen == [None, 2.0, 2.0, 1.0]


def test_buffers_of_an_average_are_copied_or_averaged_as_told() -> None:
    found = []
    for policy in ("copy", "average"):
        target, source = nn.BatchNorm1d(3), nn.BatchNorm1d(3)
        source.running_mean.fill_(5.0)
        source.num_batches_tracked.fill_(7)
        advance(Average(target, source, 0.9, policy))  # type: ignore[arg-type]
        found.append(target.running_mean[0].item())
        assert target.num_batches_tracked == 7
    assert found == pytest.approx([5.0, 0.5])


def test_an_average_of_a_bfloat16_network_moves_where_bfloat16_would_not() -> None:
    target = nn.Linear(64, 64)
    source = nn.Linear(64, 64).to(torch.bfloat16)
    start = target.weight.detach().clone()
    for _ in range(10):
        advance(Average(target, source, 0.9995))
    expected = torch.lerp(start, source.weight.float(), 1 - 0.9995**10)
    torch.testing.assert_close(target.weight, expected, atol=1e-6, rtol=1e-5)
    assert not torch.equal(target.weight, start)
