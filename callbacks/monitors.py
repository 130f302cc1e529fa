"""What is watched during training."""

import time
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer


class Throughput(Callback):
    """Logs `train/images_per_s`, over all devices, without waiting for the device.

    The clock covers the steps between two log points, data loading included, and leaves out
    validation and checkpoints at the end of an epoch. Lightning's monitor would synchronise the
    device every step.
    """

    def __init__(self) -> None:
        self.started: float | None = None
        self.images = 0

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.started = None

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.started = None

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        now = time.perf_counter()
        if self.started is None:  # the first step after a pause only starts the clock
            self.started, self.images = now, 0
            return
        self.images += len(batch[0]) * trainer.world_size
        if trainer._logger_connector.should_update_logs:
            rate = self.images / (now - self.started)
            pl_module.log("train/images_per_s", rate, batch_size=1)
            self.started, self.images = now, 0
