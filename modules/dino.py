"""DINO: a student learns to say of every view what its own average says of another one.

"Emerging Properties in Self-Supervised Vision Transformers", Caron et al. 2021,
https://arxiv.org/abs/2104.14294, algorithm 1, and its published code, which decides where the
paper leaves a choice. `modules.ibot` adds the loss of masked patches.

    teacher = copy(student);  center = 0
    for views of a batch of images:                    views 1, 2 are global, the others local
        t_i = teacher(view_i), i = 1, 2                no gradient
        s_v = student(view_v), all v
        q_i = softmax((t_i - center) / teacher temperature)
        loss = mean over i, v != i of CE(q_i, softmax(s_v / student temperature))
        backward;  clip every gradient;  no gradient for the last layer at first
        center  <- 0.9 center + 0.1 mean(t)            over the global batch
        student <- optimizer step
        teacher <- m teacher + (1 - m) student         m from 0.996 to 1

Everything below the loop's head is a function of the optimizer step: temperatures, momentum, rate,
weight decay and center do not know how many micro-batches or devices a step has. (Sinkhorn-Knopp
and KoLeo look at other images of the same micro-batch, so with these it matters.)
"""

import copy
from collections.abc import Sequence
from typing import Any, Literal

import torch
from jaxtyping import Float
from lightning.pytorch import Callback, LightningModule
from lightning.pytorch.utilities.types import STEP_OUTPUT
from torch import Tensor

from callbacks.collapse import Collapse
from callbacks.ema import EMA, Average
from callbacks.host import log_mean, log_number
from datamodules.batch import ImageBatch, Images, MultiCropBatch, PackedBatch
from datamodules.module import SourceDataModule
from datamodules.views import NUM_GLOBAL
from modules import optim
from modules.backbones import Backbone
from modules.checks import check_at_least, check_masks, check_precision
from modules.dino_loss import Center, Targets, diagnose, koleo, sinkhorn_targets, view_loss
from modules.dino_network import Head, Network, Seen
from modules.drawing import pictures_of
from modules.first_weights import FirstWeights
from modules.ibot import Hidden, MaskedPatches, PatchLoss, hide
from modules.networks import embed, fit_data, teaching
from modules.optim import Optimization
from modules.schedules import dino_cosine, warmup_cosine

OPTIMIZATION = Optimization(
    base_lr=5e-4,
    reference_batch=256,
    weight_decay=0.04,
    weight_decay_end=0.4,
    schedule="dino_cosine",
    warmup_epochs=10,
    min_lr=1e-6,
    clip_norm=3.0,
    clip_per_parameter=True,
)


class DINO(LightningModule):
    """Trains a backbone without labels, by self-distillation.

    Logs `train/loss`, under `schedule/` what changes over the run, and under `diagnosis/` the
    signs of collapse (`callbacks.collapse`). Evaluation has no loss: add `callbacks.KNN`.

    Args:
        backbone: any backbone that takes groups; its stochastic depth is the student's only.
        optimizer: how to optimise.
        num_prototypes: outputs k of the head.
        hidden_dim: width of the head's MLP.
        bottleneck_dim: width before the last layer.
        norm_last_layer: keeps the prototypes at length 1; the published advice is true for B,
            false for S where training is stable.
        freeze_last_layer: first epochs in which the last layer does not learn.
        student_temperature: of the student's softmax.
        teacher_temperature: of the teacher's, lower.
        warmup_teacher_temperature: where that begins; null for teacher_temperature.
        warmup_teacher_epochs: epochs until it gets there, in equal steps, an epoch each.
        teacher_momentum: m at the first step; it goes to 1 by half a cosine. Take 0.9995 with a
            batch of 256.
        centering: what keeps the teacher from saying the same of all images: "center", or
            "sinkhorn_knopp" (DINOv2).
        center_momentum: how slowly the center follows; for centering "center".
        masked_patches: has the student guess patches that it does not see as well (iBOT, DINOv2);
            null for none.
        koleo: weight of the KoLeo regulariser on the student's global views; 0.1 in DINOv2.
        weights: checkpoint whose backbone to begin with, ours or others' (`modules.weights`), in
            student and teacher; null for first values. Heads begin anew.
        weights_part: which network of the file, where it holds several (averaged, teacher).
        weights_drop: names of the file that may be left over, beyond heads and decoders.
        stop_on_collapse: ends a run that has collapsed, and says which way.

    Raises:
        ValueError: values out of range, or data that is not of several views.
    """

    def __init__(
        self,
        backbone: Backbone,
        optimizer: Optimization = OPTIMIZATION,
        num_prototypes: int = 65_536,
        hidden_dim: int = 2048,
        bottleneck_dim: int = 256,
        norm_last_layer: bool = True,
        freeze_last_layer: int = 1,
        student_temperature: float = 0.1,
        teacher_temperature: float = 0.04,
        warmup_teacher_temperature: float | None = None,
        warmup_teacher_epochs: int = 0,
        teacher_momentum: float = 0.996,
        centering: Literal["center", "sinkhorn_knopp"] = "center",
        center_momentum: float = 0.9,
        masked_patches: MaskedPatches | None = None,
        koleo: float = 0.0,
        weights: str | None = None,
        weights_part: str | None = None,
        weights_drop: Sequence[str] = (),
        stop_on_collapse: bool = True,
    ) -> None:
        super().__init__()
        self.save_hyperparameters(logger=False)  # the run's config.yaml has them
        check_at_least(2, num_prototypes=num_prototypes)
        check_at_least(1, hidden_dim=hidden_dim, bottleneck_dim=bottleneck_dim)
        check_at_least(0, freeze_last_layer=freeze_last_layer, koleo=koleo)
        check_at_least(0, warmup_teacher_epochs=warmup_teacher_epochs)
        for name, value in (("teacher", teacher_momentum), ("center", center_momentum)):
            if not 0.0 <= value <= 1.0:
                raise ValueError(f"{name}_momentum is {value}; expected within [0, 1]")
        if centering not in ("center", "sinkhorn_knopp"):
            raise ValueError(f"centering is {centering!r}; expected center or sinkhorn_knopp")
        if centering != "center" and center_momentum != 0.9:
            raise ValueError(
                f"center_momentum is {center_momentum}, but centering {centering} has no center; "
                f"remove it"
            )
        check_temperature("student", student_temperature)
        warmup = (warmup_teacher_temperature, warmup_teacher_epochs)
        self.temperatures = teacher_temperatures(teacher_temperature, *warmup)
        self.optimization, self.num_prototypes = optimizer, num_prototypes
        self.student_temperature, self.freeze_last_layer = student_temperature, freeze_last_layer
        self.teacher_momentum, self.koleo = teacher_momentum, koleo
        self.stop_on_collapse = stop_on_collapse
        self.first = FirstWeights(weights, weights_part, weights_drop)
        self.masked_patches = masked_patches

        def head(k: int) -> Head:
            return Head(backbone.embed_dim, hidden_dim, bottleneck_dim, k, norm_last_layer)

        def center(k: int) -> Center | None:
            return Center(k, center_momentum) if centering == "center" else None

        of_views, of_patches, self.patch_loss = head(num_prototypes), None, None
        if masked_patches is not None:
            check_masks(backbone)
            own = masked_patches.num_prototypes
            of_patches = None if own is None else head(own)
            self.patch_loss = PatchLoss(center(own or num_prototypes))
        self.student = Network(backbone, of_views, masked_patches is not None, of_patches)
        self.teacher = copy.deepcopy(self.student).requires_grad_(False)
        teaching(self.teacher)
        self.center = center(num_prototypes)

    def setup(self, stage: str) -> None:
        check_precision(self.trainer)  # an average in half precision would not move
        fit_data(getattr(self.trainer, "datamodule", None), self.student.backbone)
        if self.first.are_due_in_setup(self.trainer):
            self.load()

    def on_fit_start(self) -> None:
        if self.first.are_due_at_start(self.trainer):
            self.load()

    def load(self) -> None:
        """Take first values from `weights`."""
        self.first.fill(self.student)
        self.teacher.load_state_dict(self.student.state_dict())

    def train(self, mode: bool = True) -> "DINO":
        super().train(mode)
        if mode:
            teaching(self.teacher)
        return self

    def networks(self) -> dict[str, Network]:
        """What can be judged, the one that is meant where none is named first."""
        return {"teacher": self.teacher, "student": self.student}

    def embed(self, images: Images, network: str | None = None) -> Float[Tensor, "b d"]:
        """One vector an image, of one of `networks`; for callbacks that judge."""
        return embed(self.networks(), images, network)

    def pictures(
        self, images: Float[Tensor, "b c height width"]
    ) -> dict[str, Float[Tensor, "3 rows columns"]]:
        """What `modules.drawing.pictures_of` draws of the teacher."""
        data: SourceDataModule = self.trainer.datamodule  # type: ignore[attr-defined]
        return pictures_of(self.teacher.backbone, images, data.mean, data.std)

    def forward(self, images: Images) -> Float[Tensor, "b d"]:
        return self.embed(images)

    def training_step(self, batch: MultiCropBatch | ImageBatch, batch_idx: int) -> STEP_OUTPUT:
        if not isinstance(batch, MultiCropBatch):
            raise ValueError(
                "DINO compares views of an image, and the data gives one; set data.class_path to "
                "datamodules.MultiCropDataModule"
            )
        hidden = self.hide(batch)
        with torch.no_grad():
            taught: Seen = self.teacher(batch.crops[:1])
        seen: Seen = self.student(batch.crops, None if hidden is None else hidden.is_masked)
        targets = self.targets(taught.bottlenecks)
        given = (self.student.head.prototypes, targets, self.student_temperature)
        loss = batch.mean(view_loss(seen.bottlenecks, *given))
        log_mean(self, "train/loss", loss, batch.num_images)
        out: dict[str, Any] = {"loss": loss, "embedding": taught.features[0]}
        # A TPU would compile another graph for log points, of all the step.
        if self.trainer._logger_connector.should_update_logs or loss.device.type == "xla":
            counts = (batch.num_images, len(seen.features), self.num_prototypes)
            out["diagnosis"] = diagnose(loss, targets, *counts)
        if self.koleo > 0:
            views = seen.features[: len(taught.features)]
            spread = torch.stack([koleo(view) for view in views]).sum()
            log_mean(self, "train/koleo", spread, batch.num_images)
            out["loss"] = loss + self.koleo * spread
        if hidden is not None and self.masked_patches is not None:
            guessed = batch.mean(self.guess(seen.patches, taught.patches, hidden))
            log_mean(self, "train/masked_patches", guessed, batch.num_images)
            out["loss"] = out["loss"] + self.masked_patches.weight * guessed
        return out

    def hide(self, batch: MultiCropBatch) -> Hidden | None:
        """Which patches of the global views the student does not see; None without the option."""
        if self.masked_patches is None:
            return None
        height, width = batch.crops[0].shape[-2:]
        patch = self.student.backbone.patch_size
        return hide(self.masked_patches, batch.keys, (height // patch, width // patch))

    def guess(
        self, seen: Float[Tensor, "gb n d"], taught: Float[Tensor, "gb n d"], hidden: Hidden
    ) -> Float[Tensor, " b"]:
        """The loss of hidden patches of every image, mean over its global views."""
        assert self.patch_loss is not None
        temperatures = (self.student_temperature, self.teacher_temperature())
        with torch.no_grad():
            targets = self.teacher.read(taught, hidden)
        vectors = self.student.read(seen, hidden)
        losses: Tensor = self.patch_loss(vectors, targets, hidden, temperatures, self.reduce)
        return losses.view(NUM_GLOBAL, -1).mean(dim=0)

    def targets(self, taught: Float[Tensor, "g b e"]) -> Targets:
        """What the teacher says of the global views at this step."""
        prototypes, temperature = self.teacher.head.prototypes, self.teacher_temperature()
        if self.center is None:
            return sinkhorn_targets(taught, prototypes, temperature, self.reduce)
        self.center.add(taught)
        return self.center.targets(taught, prototypes, temperature)

    def reduce(self, value: Tensor, op: str) -> Tensor:
        """Over all devices."""
        reduced = self.trainer.strategy.reduce(value, reduce_op=op)
        assert isinstance(reduced, Tensor)
        return reduced

    def epoch(self) -> int:
        """Of this optimizer step."""
        return self.trainer.global_step // optim.steps_in_epoch(self.trainer)

    def teacher_temperature(self) -> float:
        first, last, epochs = self.temperatures
        return dino_cosine(self.epoch(), epochs, epochs, last, first, last)

    def validation_step(self, batch: ImageBatch | PackedBatch, batch_idx: int) -> None:
        """Nothing of its own: callbacks judge what the teacher's backbone gives."""

    def configure_optimizers(self) -> torch.optim.Optimizer:
        # Tokens and positions decay, as published.
        return optim.build(self.optimization, self.student)

    def on_train_start(self) -> None:
        self.lr = optim.learning_rate(self.optimization, self.trainer)

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        lr, decay = optim.follow(self.optimization, self.lr, self.trainer)
        for name, value in (
            ("lr", lr),
            ("weight_decay", decay),
            ("teacher_momentum", self.momentum_at(self.trainer.global_step)),
            ("teacher_temperature", self.teacher_temperature()),
        ):
            log_number(self, f"schedule/{name}", value)

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        if self.center is not None:  # here, because the logits were those of this teacher
            self.center.update(self.teacher.head.prototypes, self.reduce)
        if self.patch_loss is not None and self.patch_loss.center is not None:
            self.patch_loss.center.update(self.teacher.heads()[1].prototypes, self.reduce)

    def configure_gradient_clipping(self, *_: Any, **__: Any) -> None:
        optim.clip(self.optimization, self.student.parameters())
        if self.epoch() < self.freeze_last_layer:
            # It took part in backward, as DDP asks; the optimizer passes over it altogether.
            for head in self.student.heads():
                head.last_layer.zero_grad(set_to_none=True)

    def momentum_at(self, step: int) -> float:
        """Of the teacher in optimizer step `step`, from 0."""
        return warmup_cosine(step, self.lr.total, 0, self.teacher_momentum, end=1.0)

    def averages(self, step: int) -> Sequence[Average]:
        return (Average(self.teacher, self.student, self.momentum_at(step - 1), "keep"),)

    def diagnosed_from(self) -> int:
        """The optimizer step from which a network that learns is past its start."""
        frozen = self.freeze_last_layer * optim.steps_in_epoch(self.trainer)
        return max(self.lr.warmup, frozen)

    def configure_callbacks(self) -> list[Callback]:
        return [EMA(), Collapse(stop=self.stop_on_collapse)]


def teacher_temperatures(last: float, first: float | None, epochs: int) -> tuple[float, float, int]:
    """Where the teacher's temperature begins and ends, and the epochs between.

    Raises:
        ValueError: half of a warm-up, or a temperature that is none.
    """
    first = last if first is None else first
    if (first != last) != (epochs > 0):
        raise ValueError(
            f"warmup_teacher_temperature is {first} and warmup_teacher_epochs "
            f"{epochs}: a warm-up needs both, or neither"
        )
    check_temperature("teacher", last)
    check_temperature("warmup_teacher", first)
    return first, last, epochs


def check_temperature(name: str, value: float) -> None:
    if value <= 0:
        raise ValueError(f"{name}_temperature is {value}; expected more than 0")
