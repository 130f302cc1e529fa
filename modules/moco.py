"""MoCo v3: of two views of an image one predicts what an average of itself says of the other.

"An Empirical Study of Training Self-Supervised Vision Transformers", Chen, Xie and He 2021,
https://arxiv.org/abs/2104.02057, algorithm 1, and its published code.

    teacher = copy(backbone, projector)
    for two views of a batch of images:
        q_i = normalize(predictor(projector(backbone(view_i))))
        k_i = normalize(teacher(view_i))               no gradient; all devices' together
        loss = 2 tau * sum over (i, j) = (1, 2), (2, 1) of
            mean over images of CE(q_i . k_j / tau, the same image)
        student <- optimizer step
        teacher <- m teacher + (1 - m) student         m from 0.99 to 1

The projection of patches stays as it was drawn, which keeps the training stable (section 4.2).
Batch norms normalise each view by itself (those of a backbone both views together), in the teacher
too; `trainer.sync_batchnorm` lets them see all devices, as published. Keys are those of a
micro-batch of all devices, so accumulating gradients makes fewer negatives. Unlike in the published
code, biases and norms do not decay.
"""

import copy
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Float
from lightning.pytorch import Callback, LightningModule
from lightning.pytorch.utilities.types import STEP_OUTPUT
from torch import Tensor, nn

from callbacks.ema import EMA, Average
from callbacks.host import log_mean, log_number
from datamodules.batch import ImageBatch, Images, MultiCropBatch, PackedBatch
from datamodules.module import SourceDataModule
from modules import optim
from modules.backbones import Backbone
from modules.checks import check_at_least, check_precision
from modules.drawing import pictures_of
from modules.first_weights import FirstWeights
from modules.networks import AroundBackbone, embed, fit_data, teaching
from modules.optim import Optimization
from modules.schedules import warmup_cosine

OPTIMIZATION = Optimization(
    base_lr=1.5e-4, reference_batch=256, weight_decay=0.1, warmup_epochs=40, min_lr=0.0
)


def mlp(dims: Sequence[int]) -> nn.Sequential:
    """Linear layers of these widths without bias, a batch norm after each, ReLU between them."""
    layers: list[nn.Module] = []
    for i, after in enumerate(dims[1:]):
        is_last = i == len(dims) - 2
        layers.append(nn.Linear(dims[i], after, bias=False))
        layers.append(nn.BatchNorm1d(after, affine=not is_last))
        layers += [] if is_last else [nn.ReLU(inplace=True)]
    return nn.Sequential(*layers)


class Network(AroundBackbone):
    """A backbone and a projector, and the student's predictor."""

    def __init__(self, backbone: Backbone, projector: nn.Module, predictor: nn.Module | None):
        super().__init__()
        self.backbone, self.projector, self.predictor = backbone, projector, predictor

    def forward(
        self, views: Float[Tensor, "v b c height width"]
    ) -> tuple[Float[Tensor, "v b d"], Float[Tensor, "v b e"]]:
        """Features, and what is compared."""
        pooled = self.backbone(views.flatten(0, 1)).pooled
        features = rearrange(pooled, "(v b) d -> v b d", v=len(views))
        # Views differ in their colours: each has statistics of its own.
        out = [self.projector(view) for view in features]
        if self.predictor is not None:
            out = [self.predictor(view) for view in out]
        return features, torch.stack(out)


def freeze_projection(backbone: Backbone) -> None:
    """Keep the projection of patches from learning.

    Raises:
        ValueError: a backbone that has none, or more than one layer in its place.
    """
    named = {name.removeprefix("model."): p for name, p in backbone.named_parameters()}
    found = {name: p for name, p in named.items() if name.startswith("patch_embed.")}
    layers = {name.rpartition(".")[0] for name, p in found.items() if p.ndim > 1}
    if len(layers) != 1:
        has = f"has {len(layers)} layers in its place" if layers else "has none"
        raise ValueError(
            f"freeze_patches keeps the projection of patches (patch_embed) as it was drawn, and "
            f"{type(backbone).__name__} {getattr(backbone, 'name', '')} {has}; set "
            f"freeze_patches to false"
        )
    for name, parameter in found.items():
        if name.rpartition(".")[0] in layers:  # a norm after it learns
            parameter.requires_grad = False


def contrast(
    queries: Float[Tensor, "2 b e"],
    keys: Float[Tensor, "2 all e"],
    temperature: float,
    first: int = 0,
) -> Float[Tensor, " b"]:
    """The loss of every image, in float32 at least; its keys are those from `first` on."""
    with torch.autocast(queries.device.type, enabled=False):
        wide = torch.promote_types(queries.dtype, torch.float32)
        q, k = (F.normalize(x.to(wide), dim=-1) for x in (queries, keys.detach()))
        logits = q @ k.flip(0).mT / temperature
        own = first + torch.arange(q.shape[1], device=q.device)
        losses = [F.cross_entropy(view, own, reduction="none") for view in logits]
        return 2.0 * temperature * torch.stack(losses).sum(dim=0)


class MoCo(LightningModule):
    """Trains a backbone without labels, by telling images apart.

    Logs `train/loss`, and under `schedule/` what changes over the run. Evaluation has no loss:
    add `callbacks.KNN`.

    Args:
        backbone: any backbone that takes images; published with `init: moco`, fixed positions
            and, for S, 12 heads. Its stochastic depth is the student's only.
        optimizer: how to optimise.
        hidden_dim: width of the projector's two hidden layers and the predictor's one.
        projection_dim: width of what is compared.
        temperature: tau.
        teacher_momentum: m at the first step; it goes to 1 by half a cosine.
        freeze_patches: keeps the projection of patches as it was drawn, or as `weights` have it;
            false for networks without one, such as ResNets.
        weights: checkpoint whose backbone to begin with, ours or others' (`modules.weights`), in
            student and teacher; null for first values. Projector and predictor begin anew.
        weights_part: which network of the file, where it holds several (averaged, teacher).
        weights_drop: names of the file that may be left over, beyond heads and decoders.

    Raises:
        ValueError: values out of range, a projection to freeze that is not there, or data that is
            not of two views.
    """

    def __init__(
        self,
        backbone: Backbone,
        optimizer: Optimization = OPTIMIZATION,
        hidden_dim: int = 4096,
        projection_dim: int = 256,
        temperature: float = 0.2,
        teacher_momentum: float = 0.99,
        freeze_patches: bool = True,
        weights: str | None = None,
        weights_part: str | None = None,
        weights_drop: Sequence[str] = (),
    ) -> None:
        super().__init__()
        self.save_hyperparameters(logger=False)  # the run's config.yaml has them
        check_at_least(1, hidden_dim=hidden_dim, projection_dim=projection_dim)
        if temperature <= 0:
            raise ValueError(f"temperature is {temperature}; expected more than 0")
        if not 0.0 <= teacher_momentum <= 1.0:
            raise ValueError(f"teacher_momentum is {teacher_momentum}; expected within [0, 1]")
        self.first = FirstWeights(weights, weights_part, weights_drop)
        self.optimization, self.temperature = optimizer, temperature
        self.teacher_momentum = teacher_momentum
        if freeze_patches:
            freeze_projection(backbone)
        projector = mlp((backbone.embed_dim, hidden_dim, hidden_dim, projection_dim))
        predictor = mlp((projection_dim, hidden_dim, projection_dim))
        self.student = Network(backbone, projector, predictor)
        teacher = Network(copy.deepcopy(backbone), copy.deepcopy(projector), None)
        self.teacher = teacher.requires_grad_(False)
        teaching(self.teacher)

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
        self.teacher.backbone.load_state_dict(self.student.backbone.state_dict())

    def train(self, mode: bool = True) -> "MoCo":
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
        if not isinstance(batch, MultiCropBatch) or len(batch.crops) != 1:
            raise ValueError(
                "MoCo compares two views of an image and no others; set data.class_path to "
                "datamodules.MultiCropDataModule and data.init_args.num_local to 0"
            )
        with torch.no_grad():
            features, keys = self.teacher(batch.crops[0])
        _, queries = self.student(batch.crops[0])
        first = self.trainer.global_rank * batch.num_images
        loss = batch.mean(contrast(queries, self.of_all(keys), self.temperature, first))
        log_mean(self, "train/loss", loss, batch.num_images)
        return {"loss": loss, "embedding": features[0]}

    def of_all(self, keys: Float[Tensor, "2 b e"]) -> Float[Tensor, "2 all e"]:
        """Those of all devices, in the order of their ranks."""
        every = self.trainer.strategy.all_gather(keys).view(-1, *keys.shape)
        return rearrange(every, "devices v b e -> v (devices b) e")

    def validation_step(self, batch: ImageBatch | PackedBatch, batch_idx: int) -> None:
        """Nothing of its own: callbacks judge what the teacher's backbone gives."""

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return optim.build(self.optimization, self.student)

    def on_train_start(self) -> None:
        self.lr = optim.learning_rate(self.optimization, self.trainer)

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        lr, _ = optim.follow(self.optimization, self.lr, self.trainer)
        momentum = self.momentum_at(self.trainer.global_step)
        log_number(self, "schedule/lr", lr)
        log_number(self, "schedule/teacher_momentum", momentum)

    def configure_gradient_clipping(self, *_: Any, **__: Any) -> None:
        optim.clip(self.optimization, self.student.parameters())

    def momentum_at(self, step: int) -> float:
        """Of the teacher whose keys optimizer step `step`, from 0, compares with."""
        return warmup_cosine(step, self.lr.total, 0, self.teacher_momentum, end=1.0)

    def averages(self, step: int) -> Sequence[Average]:
        # Published: at the start of the next step, with that one's momentum.
        momentum = self.momentum_at(step)
        return (
            Average(self.teacher.backbone, self.student.backbone, momentum, "keep"),
            Average(self.teacher.projector, self.student.projector, momentum, "keep"),
        )

    def configure_callbacks(self) -> list[Callback]:
        return [EMA()]
