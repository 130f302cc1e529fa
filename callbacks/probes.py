"""Probes of a network while something else trains it."""

from collections.abc import Sequence
from typing import Any, Protocol, runtime_checkable

import torch
import torch.nn.functional as F
from jaxtyping import Float
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor, nn

from callbacks.host import log_mean
from callbacks.standardize import Standardize
from callbacks.tally import Tally


@runtime_checkable
class Embeds(Protocol):
    """What the probe needs of a method, beside "embedding" in what `training_step` returns.

    That is [b, d], a vector for every label of the batch, as the step computed it anyway;
    `embed` gives the same of images in evaluation.
    """

    def embed(self, images: Any, network: str | None = None) -> Tensor: ...


class OnlineProbe(Callback):
    """Trains a linear classifier on a method's features beside it; nothing flows back.

    The features are standardised (`Standardize`), so that one learning rate suits every backbone,
    and the head is optimised by Adam in float32, once an optimizer step of the method. It begins
    with zeros, draws no random numbers and is part of the checkpoint: a method trains bit by bit
    as it would without, and a resumed run goes on bit by bit with both.

    Logs `train/probe_loss`, and `val/probe_accuracy` over the valid images with a label. Labels
    are the data's; -1 is none. Of mixed images both labels count, in their shares.

    Args:
        lr: learning rate, constant.

    Raises:
        ValueError: data without labels, or a method that gives no features.
    """

    def __init__(self, lr: float = 1e-3) -> None:
        if lr <= 0:
            raise ValueError(f"lr is {lr}; expected more than 0")
        self.lr = lr
        self.num_classes = self.step = 0
        self.scale: Standardize | None = None
        self.restored: dict[str, Any] | None = None
        self.tally = Tally()

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        method = type(pl_module).__name__
        if not isinstance(pl_module, Embeds):
            raise ValueError(f"OnlineProbe needs a method that has embed; {method} has none")
        names: Sequence[str] | None
        names = getattr(getattr(trainer, "datamodule", None), "class_names", None)
        if not names:
            raise ValueError(
                "OnlineProbe needs labels, and the data has none; remove it from "
                "trainer.callbacks, or train on data with classes"
            )
        self.num_classes = len(names)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.step = trainer.global_step
        self.restore(pl_module)

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.restore(pl_module)

    def restore(self, pl_module: LightningModule) -> None:
        """Take up what the checkpoint had, once the device is known."""
        if self.restored is None:
            return
        self.begin(len(self.restored["scale"]["running_mean"]), pl_module.device)
        assert self.scale is not None
        self.scale.load_state_dict(self.restored["scale"])
        self.head.load_state_dict(self.restored["head"])
        self.optimizer.load_state_dict(self.restored["optimizer"])
        self.restored = None

    def begin(self, width: int, device: torch.device) -> None:
        """A head of zeros for features of that width."""
        self.scale = Standardize(width).to(device)
        self.head = nn.Linear(width, self.num_classes, device="meta").to_empty(device=device)
        for parameter in self.head.parameters():
            nn.init.zeros_(parameter)
        self.optimizer = torch.optim.Adam(self.head.parameters(), lr=self.lr)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        embedding = outputs.get("embedding")
        if embedding is None:
            raise ValueError(
                f"OnlineProbe needs the features of a step; let training_step of "
                f"{type(pl_module).__name__} return them as 'embedding' beside 'loss'"
            )
        if self.scale is None:
            self.begin(embedding.shape[-1], embedding.device)
        loss = self.gradients(trainer, embedding.detach(), batch)
        if trainer.global_step != self.step:  # the method has stepped, not accumulated
            self.step = trainer.global_step
            for parameter in self.head.parameters():
                parameter.grad = trainer.strategy.reduce(parameter.grad, reduce_op="mean")
            self.optimizer.step()
            self.optimizer.zero_grad()
        log_mean(pl_module, "train/probe_loss", loss, batch.num_images)

    def gradients(
        self, trainer: Trainer, embedding: Float[Tensor, "b d"], batch: Any
    ) -> Float[Tensor, ""]:
        """Add those of one micro-batch to the head's; returns its loss."""
        assert self.scale is not None

        def total(x: Tensor) -> Tensor:
            return trainer.strategy.reduce(x, reduce_op="sum")

        def losses(labels: Tensor) -> Tensor:
            return F.cross_entropy(logits, labels, ignore_index=-1, reduction="none")

        device = embedding.device.type
        with torch.enable_grad(), torch.autocast(device, enabled=False):
            features = self.scale.train()(embedding, batch.is_valid, total)
            logits = self.head(features)
            each = losses(batch.labels)
            if (mixed := batch.mixed) is not None:
                each = mixed.share * each + (1 - mixed.share) * losses(mixed.labels)
            loss: Tensor = batch.mean(each)
            torch.autograd.backward(loss / trainer.accumulate_grad_batches)
        return loss.detach()

    def on_validation_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        if self.scale is None:  # before the first step
            return
        assert isinstance(pl_module, Embeds)
        with trainer.precision_plugin.val_step_context():
            embedding = pl_module.embed(batch.images)
        none = torch.zeros_like(batch.is_valid)
        with torch.autocast(embedding.device.type, enabled=False):
            logits = self.head(self.scale.eval()(embedding, none, lambda x: x))
        valid = batch.is_valid & (batch.labels >= 0)
        is_right = (logits.argmax(-1) == batch.labels) & valid
        self.tally.add(is_right.sum(), valid.sum())

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self.scale is None:
            return
        correct, count = self.tally.totals(pl_module)
        if count == 0:
            raise ValueError("OnlineProbe found no readable validation image with a label")
        pl_module.log("val/probe_accuracy", correct / count, prog_bar=True)

    def state_dict(self) -> dict[str, Any]:
        if self.scale is None:
            return self.restored or {}
        return {
            "scale": self.scale.state_dict(),
            "head": self.head.state_dict(),
            "optimizer": self.optimizer.state_dict(),
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.restored = state_dict or None
