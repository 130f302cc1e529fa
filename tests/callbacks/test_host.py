"""Steps between log points, in which nothing may wait for the device."""

from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback

from callbacks import Checkpoint, FiniteLoss, Progress, Throughput
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
    shown = progress.get_metrics(run, run.lightning_module)
    assert shown["train/loss"] == progress.loss
    assert isinstance(progress.loss, float)
