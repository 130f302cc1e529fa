"""Has a run send itself a signal in a training step, or a teacher in a step of predicting."""

import os
from typing import Any

from lightning.pytorch import LightningModule

import modules
from modules.teachers import Relabeling


def doom(step: int, number: int) -> None:
    """Every method, and a teacher, sends its process signal `number` as batch `step` begins."""
    for name in modules.__all__:
        method = getattr(modules, name)
        if isinstance(method, type) and issubclass(method, LightningModule):
            doom_one(method, step, number)
    doom_teacher(step, number)


def doom_one(method: Any, step: int, number: int) -> None:
    ordinary_step = method.training_step

    def training_step(self: Any, batch: Any, batch_idx: int) -> Any:
        if self.trainer.fit_loop.total_batch_idx == step:
            os.kill(os.getpid(), number)
        return ordinary_step(self, batch, batch_idx)

    method.training_step = training_step


def doom_teacher(step: int, number: int) -> None:
    ordinary_step = Relabeling.predict_step

    def predict_step(self: Relabeling, batch: Any, batch_idx: int) -> Any:
        if batch_idx == step:
            os.kill(os.getpid(), number)
        return ordinary_step(self, batch, batch_idx)

    Relabeling.predict_step = predict_step  # type: ignore[method-assign]
