"""Has a run send itself a signal in a training step, between two hooks."""

import os
from typing import Any

from lightning.pytorch import LightningModule

import modules


def doom(step: int, number: int) -> None:
    """Every method sends its process signal `number` at the beginning of batch `step`."""
    for name in modules.__all__:
        method = getattr(modules, name)
        if isinstance(method, type) and issubclass(method, LightningModule):
            doom_one(method, step, number)


def doom_one(method: Any, step: int, number: int) -> None:
    ordinary_step = method.training_step

    def training_step(self: Any, batch: Any, batch_idx: int) -> Any:
        if self.trainer.fit_loop.total_batch_idx == step:
            os.kill(os.getpid(), number)
        return ordinary_step(self, batch, batch_idx)

    method.training_step = training_step
