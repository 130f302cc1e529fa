"""One seed a step: dropout and stochastic depth are functions of (seed, step, rank).

A resumed run therefore needs no generator state, and nothing that draws random numbers between
steps (validation, pictures) changes training.
"""

from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer

from datamodules.sampling import fold, run_seed


class StepSeed(Callback):
    """Seeds torch's generators before every training batch."""

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int
    ) -> None:
        torch.manual_seed(fold(run_seed(), trainer.fit_loop.total_batch_idx, trainer.global_rank))
