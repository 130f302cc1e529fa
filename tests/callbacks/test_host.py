"""Steps between log points, in which nothing may wait for the device."""

from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import Mock

import pytest
import torch
from lightning.pytorch import Callback, LightningModule
from torch import Tensor

from callbacks import Checkpoint, FiniteLoss, Progress, Throughput
from callbacks.host import log_mean
from tests import small

LOG_EVERY = 4


class Marks(Callback):
    """Counts what is read of tensors, by the step that reads it."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.step, self.reads = -1, Counter[int]()
        for name in ("item", "tolist", "__float__", "__bool__", "__int__"):
            real = getattr(torch.Tensor, name)

            def reading(tensor: torch.Tensor, *given: Any, real: Any = real) -> Any:
                self.reads[self.step] += 1
                return real(tensor, *given)

            monkeypatch.setattr(torch.Tensor, name, reading)

    def on_train_batch_start(self, *_: Any) -> None:
        self.step += 1


def test_nothing_is_read_between_log_points(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With all that the command adds; a batch's own flags are read on the CPU."""
    progress, marks = Progress(), Marks(monkeypatch)
    run = small.trainer(
        *(tmp_path, marks, FiniteLoss(), Throughput(), progress),
        **{"log_every_n_steps": LOG_EVERY, "max_steps": 11, "limit_val_batches": 0},
        **{"enable_progress_bar": True, "limit_train_batches": 12},
        checkpoint=Checkpoint(every_n_steps=100, monitor=None),
    )
    data = small.data()
    monkeypatch.setattr(data, "on_before_batch_transfer", lambda batch, _: batch)
    run.fit(small.method(), data)
    logged = {step for step in range(11) if (step + 1) % LOG_EVERY == 0}
    assert logged <= {step for step, count in marks.reads.items() if count}
    between = {step: marks.reads[step] for step in range(1, 10) if step not in logged}
    assert not any(between.values()), between


def test_the_bar_shows_the_loss_of_a_batch_where_batches_are_accumulated(tmp_path: Path) -> None:
    progress, losses = Progress(), []
    method = small.method()
    step = method.training_step

    def noting(batch: Any, batch_idx: int) -> Any:
        out = step(batch, batch_idx)
        losses.append(float(out["loss"]))
        return out

    method.training_step = noting  # type: ignore[method-assign]
    run = small.trainer(
        *(tmp_path, progress),
        **{"log_every_n_steps": 1, "max_steps": 2, "limit_val_batches": 0},
        **{"enable_progress_bar": True, "accumulate_grad_batches": 2},
    )
    run.fit(method, small.data())
    assert len(losses) == 4
    assert progress.get_metrics(run, method)["train/loss"] == pytest.approx(losses[-1])


def test_devices_ask_one_another_at_log_points_only() -> None:
    reduced: list[Tensor] = []

    def reduce(value: Tensor, reduce_op: str) -> Tensor:
        reduced.append(value)
        return value + 1

    connector, strategy = SimpleNamespace(), SimpleNamespace(reduce=reduce)
    about = {"world_size": 2, "strategy": strategy, "_logger_connector": connector}
    trainer, logged = SimpleNamespace(**about), []
    log = Mock(side_effect=lambda *given, **_: logged.append(given))
    method = Mock(spec=LightningModule, trainer=trainer, log=log)
    for connector.should_update_logs in (False, True):
        log_mean(method, "x", torch.tensor(2.0), 4)
    assert logged == [("x", 2.0), ("x", 3.0)]
    assert len(reduced) == 1
    trainer.world_size = 1
    log_mean(method, "x", torch.tensor(2.0), 4)
    assert logged[2] == ("x", 2.0)
