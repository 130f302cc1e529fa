"""What is watched during training."""

import time
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor

from datamodules.batch import PackedBatch, TextBatch


class FiniteLoss(Callback):
    """Stops a run whose loss is infinite or no number, before it replaces a good checkpoint.

    Every step is looked at on the device; the host asks at log points and before a save.
    """

    def __init__(self) -> None:
        self.is_bad: Tensor | None = None

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        is_bad = ~torch.isfinite(outputs["loss"].detach())
        self.is_bad = is_bad if self.is_bad is None else self.is_bad | is_bad
        if trainer._logger_connector.should_update_logs:
            self.check(trainer)

    def on_save_checkpoint(
        self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        self.check(trainer)

    def check(self, trainer: Trainer) -> None:
        is_bad = self.is_bad is not None and bool(self.is_bad)
        if trainer.strategy.reduce_boolean_decision(is_bad, all=False):
            raise ValueError(
                f"the training loss is infinite or not a number at step {trainer.global_step}; "
                f"last.ckpt is older and stays. Lower the learning rate, or set "
                f"optimizer.clip_norm or a longer warm-up"
            )


class Throughput(Callback):
    """Logs `train/images_per_s`, over all devices, without waiting for the device.

    Of texts `train/pairs_per_s`.

    The clock covers the steps between two log points, data loading included, and leaves out
    validation and checkpoints at the end of an epoch. Lightning's monitor would synchronise the
    device every step. The images of a pack are those of this device, times the devices.
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
        is_text = isinstance(batch, TextBatch)
        self.images += (batch.num_pairs if is_text else batch.num_images) * trainer.world_size
        if trainer._logger_connector.should_update_logs:
            rate = self.images / (now - self.started)
            unit = "pairs" if is_text else "images"
            pl_module.log(f"train/{unit}_per_s", rate, batch_size=1)
            self.started, self.images = now, 0


class FillRate(Callback):
    """Logs `train/fill_rate` every epoch: the share of tokens in packed batches that is no padding.

    Other batches have no padding and log nothing.
    """

    def __init__(self) -> None:
        self.tokens = self.places = 0

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.tokens = self.places = 0

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if isinstance(batch, PackedBatch):
            self.tokens += batch.num_tokens
            self.places += batch.images.segments.numel()

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self.places:
            pl_module.log("train/fill_rate", self.tokens / self.places, sync_dist=True)
