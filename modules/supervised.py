"""Supervised classification: a backbone, a linear head, cross-entropy.

"An Image is Worth 16x16 Words" (Dosovitskiy et al. 2020); label smoothing, Mixup and CutMix as
in DeiT, "Training data-efficient image transformers & distillation through attention"
(Touvron et al. 2020, section 6).

    logits = head(backbone(images))
    target = share * smooth(label) + (1 - share) * smooth(label mixed in)
    loss   = mean over images of -sum_k target_k log softmax(logits)_k
"""

import copy
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from lightning.pytorch import Callback, LightningModule
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor, nn

from callbacks.ema import EMA, Average
from datamodules.batch import ImageBatch
from modules import optim
from modules.backbones import Backbone
from modules.metrics import Tally
from modules.optim import Optimization


class Classifier(nn.Module):
    """A backbone and a linear head on its pooled features."""

    def __init__(self, backbone: Backbone, num_classes: int) -> None:
        super().__init__()
        self.backbone = backbone
        self.head = nn.Linear(backbone.embed_dim, num_classes)
        nn.init.trunc_normal_(self.head.weight, std=0.02)
        nn.init.zeros_(self.head.bias)

    def forward(self, images: Float[Tensor, "b c height width"]) -> Float[Tensor, "b k"]:
        logits: Tensor = self.head(self.backbone(images).pooled)
        return logits


def soft_targets(batch: ImageBatch, num_classes: int, smoothing: float) -> Float[Tensor, "b k"]:
    """Targets that sum to one: smoothed one-hot labels, in the shares of a mixed batch.

    A label has 1 - smoothing + smoothing / k, every other class smoothing / k.
    """
    targets = F.one_hot(batch.labels, num_classes).float()
    if batch.mixed is not None:
        share = batch.mixed.share[:, None]
        targets = share * targets + (1 - share) * F.one_hot(batch.mixed.labels, num_classes)
    return targets * (1 - smoothing) + smoothing / num_classes


def soft_cross_entropy(
    logits: Float[Tensor, "b k"], targets: Float[Tensor, "b k"]
) -> Float[Tensor, " b"]:
    """-sum_k target_k log softmax(logits)_k for every image, in float32."""
    return -(targets * F.log_softmax(logits.float(), dim=-1)).sum(dim=-1)


class Supervised(LightningModule):
    """Trains a backbone and a linear head on labelled images.

    Logs `train/loss`, `val/loss`, `val/accuracy` (and `val/top5_accuracy` from six classes on);
    with `ema_decay` also `val/ema_accuracy`, and so on, of the averaged weights.

    Args:
        backbone: any backbone of `modules.backbones`.
        num_classes: number of classes k.
        optimizer: how to optimise.
        label_smoothing: share of the target spread evenly over all classes.
        ema_decay: decay per optimizer step of an averaged copy, evaluated beside the raw
            weights and kept in the checkpoint under `averaged.`; null for none.

    Raises:
        ValueError: values out of range, or data that does not fit them.
    """

    def __init__(
        self,
        backbone: Backbone,
        num_classes: int,
        optimizer: Optimization = Optimization(),  # noqa: B008 - frozen
        label_smoothing: float = 0.0,
        ema_decay: float | None = None,
    ) -> None:
        super().__init__()
        self.save_hyperparameters()
        if num_classes < 1:
            raise ValueError(f"num_classes is {num_classes}; expected at least 1")
        if not 0.0 <= label_smoothing < 1.0:
            raise ValueError(f"label_smoothing is {label_smoothing}; expected within [0, 1)")
        if ema_decay is not None and not 0.0 <= ema_decay < 1.0:
            raise ValueError(f"ema_decay is {ema_decay}; expected within [0, 1), or null")
        self.num_classes, self.label_smoothing = num_classes, label_smoothing
        self.optimization, self.ema_decay = optimizer, ema_decay
        self.classifier = Classifier(backbone, num_classes)
        self.averaged: Classifier | None = None
        if ema_decay is not None:
            self.averaged = copy.deepcopy(self.classifier).requires_grad_(False).eval()
        self.tally, self.averaged_tally = Tally(), Tally()

    def setup(self, stage: str) -> None:
        names = getattr(getattr(self.trainer, "datamodule", None), "class_names", None)
        if names is not None and not names:
            raise ValueError("the data has no labels, and supervised training needs them")
        if names is not None and len(names) > self.num_classes:
            raise ValueError(
                f"the data has {len(names)} classes, but model.num_classes is "
                f"{self.num_classes}; set it to {len(names)}"
            )

        if names is not None and len(names) < self.num_classes:
            rank_zero_warn(
                f"the data has {len(names)} classes, but model.num_classes is {self.num_classes}: "
                f"some outputs are never right"
            )
        if self.trainer.precision not in ("32-true", "bf16-mixed", "16-mixed"):
            raise ValueError(
                f"trainer.precision is {self.trainer.precision!r}; expected 32-true, bf16-mixed "
                f"or 16-mixed, which keep the weights in float32"
            )

    def train(self, mode: bool = True) -> "Supervised":
        super().train(mode)
        if self.averaged is not None:
            self.averaged.eval()
        return self

    def forward(self, images: Float[Tensor, "b c height width"]) -> Float[Tensor, "b k"]:
        logits: Tensor = self.classifier(images)
        return logits

    def training_step(self, batch: ImageBatch, batch_idx: int) -> Float[Tensor, ""]:
        targets = soft_targets(batch, self.num_classes, self.label_smoothing)
        loss = soft_cross_entropy(self(batch.images), targets).mean()
        self.log("train/loss", loss, prog_bar=True, batch_size=len(batch.labels), sync_dist=True)
        return loss

    def validation_step(self, batch: ImageBatch, batch_idx: int) -> None:
        self.count(self.tally, self.classifier, batch)
        if self.averaged is not None:
            self.count(self.averaged_tally, self.averaged, batch)

    def count(self, tally: Tally, network: nn.Module, batch: ImageBatch) -> None:
        """Add a batch's loss and correct answers, over its valid images, to a tally."""
        logits = network(batch.images).float()
        losses = F.cross_entropy(logits, batch.labels, reduction="none")
        top = logits.topk(min(5, self.num_classes), dim=-1).indices == batch.labels[:, None]
        valid = batch.is_valid.float()
        tally.add(
            (losses * valid).sum(),
            (top[:, 0] * valid).sum(),
            (top.any(dim=-1) * valid).sum(),
            valid.sum(),
        )

    def on_validation_epoch_end(self) -> None:
        self.log_totals("val/", self.tally, prog_bar=True)
        if self.averaged is not None:
            self.log_totals("val/ema_", self.averaged_tally, prog_bar=False)

    def log_totals(self, prefix: str, tally: Tally, prog_bar: bool) -> None:
        loss, correct, among_five, count = tally.totals(self)
        if count == 0:
            raise ValueError("no image of the validation set could be read")
        self.log(f"{prefix}loss", loss / count)
        self.log(f"{prefix}accuracy", correct / count, prog_bar=prog_bar)
        if self.num_classes > 5:
            self.log(f"{prefix}top5_accuracy", among_five / count)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        exempt = {f"backbone.{name}" for name in self.classifier.backbone.no_weight_decay()}
        return optim.build(self.optimization, self.classifier, exempt)

    def on_train_start(self) -> None:
        self.lr = optim.learning_rate(self.optimization, self.trainer)

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        lr = self.lr.at(self.trainer.global_step)
        optim.set_lr(self.trainer.optimizers[0], lr)
        self.log("schedule/lr", lr, batch_size=1)

    def configure_gradient_clipping(
        self,
        optimizer: torch.optim.Optimizer,
        gradient_clip_val: int | float | None = None,
        gradient_clip_algorithm: str | None = None,
    ) -> None:
        if gradient_clip_val is not None:
            raise ValueError("set optimizer.clip_norm of the model, not trainer.gradient_clip_val")
        optim.clip(self.optimization, self.classifier.parameters())

    def averages(self, step: int) -> Sequence[Average]:
        if self.averaged is None or self.ema_decay is None:
            return ()
        return (Average(self.averaged, self.classifier, self.ema_decay),)

    def configure_callbacks(self) -> list[Callback]:
        return [EMA()] if self.averaged is not None else []
