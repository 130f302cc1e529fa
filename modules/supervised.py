"""Supervised classification: a backbone, a linear head, a loss on labels.

"An Image is Worth 16x16 Words" (Dosovitskiy et al. 2020); label smoothing, Mixup and CutMix as
in DeiT, "Training data-efficient image transformers & distillation through attention"
(Touvron et al. 2020, section 6).

    logits = head(backbone(images))
    target = share * smooth(label) + (1 - share) * smooth(label mixed in)
    loss   = mean over images of
        softmax  -sum_k target_k log softmax(logits)_k
        sigmoid  sum_k BCE(logits_k, target_k)            "How to train your ViT?" (AugReg,
                                                          Steiner et al. 2021)
        bce      mean_k BCE(logits_k, [target_k > 0])     "DeiT III" (Touvron et al. 2022)

A backbone with a distillation token has a head for it; the classifier's logits are the mean of
both heads'. With a teacher, each head learns on its own (`modules.distillation`).
"""

import copy
from collections.abc import Sequence
from typing import Any, Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float
from lightning.pytorch import Callback, LightningModule
from torch import Tensor, nn

from callbacks.ema import EMA, Average
from callbacks.host import log_mean, log_number
from callbacks.tally import Tally
from datamodules.batch import ImageBatch, Images, PackedBatch
from datamodules.module import SourceDataModule
from datamodules.packed import PackedDataModule
from modules import optim
from modules.backbones import Backbone, Features
from modules.checks import check_classes, check_precision
from modules.distillation import Distillation, Teacher, distill
from modules.drawing import pictures_of
from modules.first_weights import FirstWeights
from modules.losses import LOSSES, loss_per_image, soft_targets
from modules.networks import AroundBackbone, embed, fit_data
from modules.optim import Optimization
from modules.scores import add_scores, log_scores

HeadInit = Literal["timm", "zero", "mae"]
HEAD_STD = {"timm": 0.02, "zero": 0.0, "mae": 2e-5}


class Classifier(AroundBackbone):
    """A backbone and a linear head on its pooled features, with timm's keys.

    A backbone that has a distillation token gets a second head, `head_dist`, on that.
    """

    entries = ("embed", "read")

    def __init__(
        self,
        backbone: Backbone,
        num_classes: int,
        head_init: HeadInit = "timm",
        head_bias: float = 0.0,
    ) -> None:
        super().__init__()
        self.backbone = backbone
        self.head = nn.Linear(backbone.embed_dim, num_classes)
        self.head_dist: nn.Linear | None = None
        if getattr(backbone, "dist_token", None) is not None:
            self.head_dist = nn.Linear(backbone.embed_dim, num_classes)
        for head in (head for head in (self.head, self.head_dist) if head is not None):
            nn.init.constant_(head.bias, head_bias)
            if std := HEAD_STD[head_init]:
                nn.init.trunc_normal_(head.weight, std=std)
            else:
                nn.init.zeros_(head.weight)

    def read(
        self, images: Images
    ) -> tuple[Features, Float[Tensor, "b k"], Float[Tensor, "b k"] | None]:
        """What the backbone gives, the logits of the head, and of the distillation token's."""
        features: Features = self.backbone(images)
        dist = None if self.head_dist is None else self.head_dist(features.dist)
        return features, self.head(features.pooled), dist

    def forward(self, images: Images) -> Float[Tensor, "b k"]:
        _, logits, dist = self.read(images)
        return logits if dist is None else (logits + dist) / 2


class Supervised(LightningModule):
    """Trains a backbone and a linear head on labelled images.

    With a distillation token, metrics are those of the mean of both heads' logits.

    Logs `train/loss`, `val/loss`, `val/accuracy` (and `val/top5_accuracy` from six classes on);
    with `ema_decay` also `val/ema_accuracy`, and so on, of the averaged weights.

    Args:
        backbone: any backbone of `modules.backbones`.
        num_classes: number of classes k.
        optimizer: how to optimise.
        loss: "softmax" cross-entropy; "sigmoid" cross-entropy summed over classes (AugReg);
            "bce", sigmoid cross-entropy averaged over classes, where every class of a mixed
            image counts as present (DeiT-III). Evaluation uses the same one.
        label_smoothing: share of the target spread evenly over all classes; not for bce, which
            would take every class for present.
        head_init: first weights of the head: "timm" (normal, std 0.02), "zero", or "mae" (normal,
            std 2e-5: He et al. 2021, its published code for fine-tuning).
        head_bias: first value of its biases; -6.9 (ImageNet-1k) and -10 (21k) in AugReg, where
            a sigmoid begins with few classes present.
        distillation: what the backbone's distillation token learns from; null for no teacher,
            where both heads learn from the labels.
        weights: what to start from: a file of ours, timm, DeiT, MAE, DINO or Google, or
            `timm:NAME` (`modules.weights`); every tensor of it has to be used.
        weights_scope: "all" of the network, or the "backbone" of a checkpoint of any method: the
            head begins anew, and what others kept beside a backbone stays behind.
        weights_part: which network of the file, where it holds several (averaged, teacher).
        weights_drop: names that may be left over in the file and keep their first values here,
            such as `head` where the classes differ.
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
        loss: Literal["softmax", "sigmoid", "bce"] = "softmax",
        label_smoothing: float = 0.0,
        head_init: HeadInit = "timm",
        head_bias: float = 0.0,
        distillation: Distillation | None = None,
        weights: str | None = None,
        weights_scope: Literal["all", "backbone"] = "all",
        weights_part: str | None = None,
        weights_drop: Sequence[str] = (),
        ema_decay: float | None = None,
    ) -> None:
        super().__init__()
        self.save_hyperparameters(logger=False)  # the run's config.yaml has them
        if num_classes < 1:
            raise ValueError(f"num_classes is {num_classes}; expected at least 1")
        if not 0.0 <= label_smoothing < 1.0:
            raise ValueError(f"label_smoothing is {label_smoothing}; expected within [0, 1)")
        if loss not in LOSSES:
            raise ValueError(f"loss is {loss!r}; expected one of {', '.join(LOSSES)}")
        if loss == "bce" and label_smoothing > 0:
            raise ValueError(
                f"label_smoothing is {label_smoothing}, but loss bce takes every class with a "
                f"share for present, which would be all; set label_smoothing to 0"
            )
        if head_init not in HEAD_STD:
            raise ValueError(f"head_init is {head_init!r}; expected one of {', '.join(HEAD_STD)}")
        if ema_decay is not None and not 0.0 <= ema_decay < 1.0:
            raise ValueError(f"ema_decay is {ema_decay}; expected within [0, 1), or null")
        self.num_classes, self.loss, self.label_smoothing = num_classes, loss, label_smoothing
        self.optimization, self.ema_decay = optimizer, ema_decay
        self.classifier = Classifier(backbone, num_classes, head_init, head_bias)
        if distillation is not None and self.classifier.head_dist is None:
            raise ValueError(
                f"distillation needs a token that learns from the teacher, and this "
                f"{type(backbone).__name__} has none; use modules.backbones.ViT with "
                f"distillation_token true"
            )
        self.first = FirstWeights(weights, weights_part, weights_drop, weights_scope)
        self.distillation = distillation
        self.teacher: Teacher | None = None  # built for training only, which alone needs it
        self.averaged: Classifier | None = None
        if ema_decay is not None:
            self.averaged = copy.deepcopy(self.classifier).requires_grad_(False).eval()
        self.tally, self.averaged_tally = Tally(), Tally()

    def setup(self, stage: str) -> None:
        data = getattr(self.trainer, "datamodule", None)
        check_classes(data, self.num_classes)
        check_precision(self.trainer)
        backbone = self.classifier.backbone
        fit_data(data, backbone)
        if stage == "fit" and self.distillation is not None:
            if isinstance(data, PackedDataModule) or backbone.image_size is None:
                raise ValueError(
                    "a distillation teacher takes images of one size; train on ImageDataModule "
                    "with a backbone made for its size, or set model.init_args.distillation to null"
                )
            self.teacher = Teacher(
                self.distillation, self.num_classes, backbone.in_channels, backbone.image_size
            )
            if data is not None and hasattr(data, "mean"):
                self.teacher.check_normalization(data.mean, data.std)
        if self.first.are_due_in_setup(self.trainer):
            self.load()

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        if self.teacher is not None:
            checkpoint["teacher"] = self.teacher.fingerprint

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        if self.teacher is not None:
            self.teacher.check_fingerprint(checkpoint.get("teacher"))

    def load(self) -> None:
        """Take first values from `weights`."""
        self.first.fill(self.classifier)
        if self.averaged is not None:
            self.averaged.load_state_dict(self.classifier.state_dict())

    def on_fit_start(self) -> None:
        if self.first.are_due_at_start(self.trainer):
            self.load()
        if self.teacher is not None:
            self.teacher.to(self.classifier.head.weight)

    def train(self, mode: bool = True) -> "Supervised":
        super().train(mode)
        if self.averaged is not None:
            self.averaged.eval()
        return self

    def forward(self, images: Images) -> Float[Tensor, "b k"]:
        logits: Tensor = self.classifier(images)
        return logits

    def networks(self) -> dict[str, Classifier]:
        """What can be judged, the one that is meant where none is named first."""
        averaged = {} if self.averaged is None else {"averaged": self.averaged}
        return {"classifier": self.classifier, **averaged}

    def embed(self, images: Images, network: str | None = None) -> Float[Tensor, "b d"]:
        """One vector an image, of one of `networks`; for callbacks that judge."""
        return embed(self.networks(), images, network)

    def pictures(
        self, images: Float[Tensor, "b c height width"]
    ) -> dict[str, Float[Tensor, "3 rows columns"]]:
        """What `modules.drawing.pictures_of` draws of the network that is trained."""
        data: SourceDataModule = self.trainer.datamodule  # type: ignore[attr-defined]
        return pictures_of(self.classifier.backbone, images, data.mean, data.std)

    def training_step(self, batch: ImageBatch | PackedBatch, batch_idx: int) -> dict[str, Tensor]:
        targets = soft_targets(batch, self.num_classes, self.label_smoothing)
        features, logits, dist = self.classifier.read(batch.images)
        if self.teacher is not None and self.distillation is not None:
            assert dist is not None
            assert isinstance(batch.images, Tensor)  # `setup` saw to it
            base = loss_per_image(self.loss, logits, targets)
            losses = distill(self.distillation, base, dist, self.teacher(batch.images))
        else:
            logits = logits if dist is None else (logits + dist) / 2
            losses = loss_per_image(self.loss, logits, targets)
        loss = batch.mean(losses)
        log_mean(self, "train/loss", loss, batch.num_images)
        return {"loss": loss, "embedding": features.pooled.detach()}

    def validation_step(self, batch: ImageBatch | PackedBatch, batch_idx: int) -> None:
        self.count(self.tally, self.classifier, batch)
        if self.averaged is not None:
            self.count(self.averaged_tally, self.averaged, batch)

    def count(self, tally: Tally, network: nn.Module, batch: ImageBatch | PackedBatch) -> None:
        """Add a batch's loss and correct answers, over its valid images, to a tally."""
        logits = network(batch.images).float()
        targets = F.one_hot(batch.labels, self.num_classes).float()
        losses = loss_per_image(self.loss, logits, targets)
        add_scores(tally, batch, logits, losses)

    def on_validation_epoch_end(self) -> None:
        log_scores(self, "val/", self.tally, self.num_classes)
        if self.averaged is not None:
            log_scores(self, "val/ema_", self.averaged_tally, self.num_classes)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        exempt = {f"backbone.{name}" for name in self.classifier.backbone.no_weight_decay()}
        return optim.build(self.optimization, self.classifier, exempt)

    def on_train_start(self) -> None:
        self.lr = optim.learning_rate(self.optimization, self.trainer)

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        lr, _ = optim.follow(self.optimization, self.lr, self.trainer)
        log_number(self, "schedule/lr", lr)

    def configure_gradient_clipping(self, *_: Any, **__: Any) -> None:
        optim.clip(self.optimization, self.classifier.parameters())

    def averages(self, step: int) -> Sequence[Average]:
        if self.averaged is None or self.ema_decay is None:
            return ()
        return (Average(self.averaged, self.classifier, self.ema_decay),)

    def configure_callbacks(self) -> list[Callback]:
        return [EMA()] if self.averaged is not None else []
