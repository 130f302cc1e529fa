"""What the host does beside the steps, which neither wait for it nor it for them."""

from typing import Any, cast

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import RichProgressBar
from torch import Tensor


def log_number(method: LightningModule, name: str, value: float) -> None:
    """Log what the host knows already, at a step.

    Lightning would send a Python number to the device and, at log points, fetch it from there. A
    GPU is waited for both times, and a TPU compiles another graph for steps that log other numbers.
    """
    method.log(name, torch.tensor(value), batch_size=1)


def log_mean(method: LightningModule, name: str, value: Tensor, count: int) -> None:
    """Log a value of a batch at a step: at log points the mean over all devices.

    `sync_dist` of `self.log` would let devices wait for one another at every batch.

    Args:
        count: images or texts in the batch.
    """
    value, trainer = value.detach(), method.trainer
    if trainer.world_size > 1 and trainer._logger_connector.should_update_logs:
        value = cast(Tensor, trainer.strategy.reduce(value, reduce_op="mean"))
    method.log(name, value, batch_size=count)


def finish(device: torch.device) -> None:
    """Let a TPU begin with what it was told so far, and do not wait for it.

    It computes nothing before something asks for it. What callbacks leave behind would become part
    of the next step, and of another graph after a log or a save that asked for some of it.
    """
    if device.type == "xla":
        import torch_xla

        torch_xla.sync()


class Progress(RichProgressBar):
    """Shows the loss of the last log point beside what evaluations say.

    That of every step (`prog_bar` of `self.log`) would wait for the device at every step.
    """

    def __init__(self) -> None:
        super().__init__(leave=False)
        self.loss: float | None = None

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if trainer._logger_connector.should_update_logs:
            # Not that of `outputs`: it is a part of the step's where batches are accumulated.
            self.loss = float(trainer.callback_metrics["train/loss"])
        super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        # Means of an epoch are taken over all devices when they are first asked for. The first
        # device alone has a bar to show them in, and would wait for the others or meet them in
        # what they do next; so all ask here.
        self.get_metrics(trainer, pl_module)
        super().on_train_epoch_end(trainer, pl_module)

    def get_metrics(self, trainer: Trainer, pl_module: LightningModule) -> dict[str, Any]:
        shown = super().get_metrics(trainer, pl_module)
        return shown if self.loss is None else {"train/loss": self.loss, **shown}
