"""Token labelling: every patch learns a label of its own, beside the image's.

"All Tokens Matter: Token Labeling for Training Better Vision Transformers" (LV-ViT), Jiang et al.
2021, https://arxiv.org/abs/2104.10858; with one label a crop, "Re-labeling ImageNet: from Single
to Multi-Labels, from Global to Localized Labels" (ReLabel), Yun et al. 2021.

    box      = a random box of the grid of tokens                        MixToken
    tokens   = where(in box, patches(partner), patches(image))           before positions
    logits   = head(cls)          aux = aux_head(tokens, put back in their own images)
    y_image  = softmax(the teacher's scores, pooled over the crop)
    y_tokens = softmax(the teacher's scores, pooled over each token)     both smoothed
    share    = 1 - area of the box
    loss     = CE(logits, share y_image + (1 - share) y_image[partner])
               + dense_weight * mean over tokens CE(aux, y_tokens)

In evaluation the logits are head(cls) + 1/2 max over tokens aux. Without a teacher, on batches of
plain labels, the label of the image stands for all of them. Smoothed targets sum to 1, where the
published ones sum to 1 + smoothing / k.
"""

import copy
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from lightning.pytorch import Callback, LightningModule
from torch import Tensor, nn

from callbacks.ema import EMA, Average
from callbacks.host import log_mean, log_number
from callbacks.tally import Tally
from datamodules.augment import TOKENS, edges, inside, uniforms
from datamodules.batch import ImageBatch, TokenLabelBatch
from datamodules.module import SourceDataModule
from datamodules.token_labels import TokenLabelDataModule
from modules import optim
from modules.backbones import Backbone, Features, Swapped
from modules.checks import (
    check_at_least,
    check_classes,
    check_patches,
    check_precision,
    check_token_labels,
)
from modules.drawing import pictures_of
from modules.first_weights import FirstWeights
from modules.losses import soft_cross_entropy
from modules.networks import AroundBackbone, embed, fit_data
from modules.optim import Optimization
from modules.scores import add_scores, log_scores
from modules.token_loss import (
    class_targets,
    label_targets,
    softmax_targets,
    token_cross_entropy,
)
from modules.token_pictures import token_labels

Images = Float[Tensor, "b c height width"]


class Boxes(NamedTuple):
    """Which tokens are mixed, with whose, and what it leaves of an image's own.

    is_swapped: [b, n] the same for both partners
    partner:    [b]
    share:      [b] of tokens that are the image's own
    """

    is_swapped: Bool[Tensor, "b n"]
    partner: Int[Tensor, " b"]
    share: Float[Tensor, " b"]


def draw_boxes(
    keys: Int[Tensor, " b"], grid: tuple[int, int], each: Literal["batch", "pair"]
) -> Boxes:
    """A box whose area share is about uniform, around a uniform centre, clipped at the edges.

    Its sides are cut to an even number of tokens, as published. "batch" draws one from the first
    image's key, and mixes the batch with its reverse; "pair" one for every pair of neighbours,
    which does not depend on how a global batch is cut over devices.
    """
    b, (rows, columns) = len(keys), grid
    places = torch.arange(b, device=keys.device)
    if each == "batch":
        u, partner = uniforms(keys[:1], TOKENS, 3), places.flip(0)
    else:
        u, partner = uniforms(keys[0::2], TOKENS, 3).repeat_interleave(2, dim=0), places ^ 1
    side = u[:, 0].sqrt() / 2
    top, bottom = edges(u[:, 1], side, rows)
    left, right = edges(u[:, 2], side, columns)
    box = inside(grid, top, left, bottom - top, right - left).flatten(1).expand(b, -1)
    return Boxes(box, partner, 1 - box.float().mean(dim=1))


class TokenClassifier(AroundBackbone):
    """A backbone with a head for the image and one for all tokens, under the published names."""

    entries = ("embed", "read")

    def __init__(self, backbone: Backbone, num_classes: int, has_aux_head: bool) -> None:
        super().__init__()
        self.backbone = backbone
        self.head = nn.Linear(backbone.embed_dim, num_classes)
        self.aux_head = nn.Linear(backbone.patch_dim, num_classes) if has_aux_head else None
        for head in (head for head in (self.head, self.aux_head) if head is not None):
            nn.init.trunc_normal_(head.weight, std=0.02)
            nn.init.zeros_(head.bias)

    def read(
        self, images: Images | Swapped
    ) -> tuple[Features, Float[Tensor, "b k"], Float[Tensor, "b n k"] | None]:
        """What the backbone gives, the image's logits and its own tokens', mixed ones put back."""
        features: Features = self.backbone(images)
        logits: Tensor = self.head(features.pooled)
        if self.aux_head is None:
            return features, logits, None
        patches = features.patches
        if isinstance(images, Swapped):
            patches = images.over(patches)
        return features, logits, self.aux_head(patches)

    def forward(self, images: Images) -> Float[Tensor, "b k"]:
        _, logits, tokens = self.read(images)
        return logits if tokens is None else logits + 0.5 * tokens.amax(dim=1)


class TokenLabeling(LightningModule):
    """Trains a backbone with a label for every token (LV-ViT), or one for every crop (ReLabel).

    Logs `train/loss`, `train/class_loss`, `train/token_loss`, `val/loss`, `val/accuracy` (and
    `val/top5_accuracy` from six classes on); with `ema_decay` also `val/ema_accuracy`, and so on.

    Args:
        backbone: `modules.backbones.LVViT`, or any other; with mixed tokens one that takes masks.
        num_classes: number of classes k, those of the teacher.
        optimizer: how to optimise.
        dense_weight: weight of the tokens' loss beside the image's: 0.5 in the paper, 1 in the
            released commands; 0 leaves the head of the tokens away.
        mix_tokens: MixToken: one box for a "batch" of a device, as published, or for every
            "pair"; null for none.
        ground_truth: the image's label has a part in its target: a half where the teacher agrees,
            a tenth where it does not. Data without maps has no other target anyway.
        label_smoothing: share of all targets spread evenly over all classes.
        weights: what to start from: a file of ours, LV-ViT's or timm's (`modules.weights`); every
            tensor of it has to be used.
        weights_scope: "all" of the network, or the "backbone" of a checkpoint of any method.
        weights_part: which network of the file, where it holds several.
        weights_drop: names that may be left over in the file and keep their first values here,
            such as `head` and `aux_head` where the classes differ.
        ema_decay: decay per optimizer step of an averaged copy, evaluated beside the raw weights;
            null for none.

    Raises:
        ValueError: values out of range, or data that does not fit them.
    """

    def __init__(
        self,
        backbone: Backbone,
        num_classes: int,
        optimizer: Optimization = Optimization(),  # noqa: B008 - frozen
        dense_weight: float = 0.5,
        mix_tokens: Literal["batch", "pair"] | None = "batch",
        ground_truth: bool = False,
        label_smoothing: float = 0.1,
        weights: str | None = None,
        weights_scope: Literal["all", "backbone"] = "all",
        weights_part: str | None = None,
        weights_drop: Sequence[str] = (),
        ema_decay: float | None = None,
    ) -> None:
        super().__init__()
        self.save_hyperparameters(logger=False)  # the run's config.yaml has them
        check_at_least(1, num_classes=num_classes)
        check_at_least(0, dense_weight=dense_weight)
        if not 0.0 <= label_smoothing < 1.0:
            raise ValueError(f"label_smoothing is {label_smoothing}; expected within [0, 1)")
        if ema_decay is not None and not 0.0 <= ema_decay < 1.0:
            raise ValueError(f"ema_decay is {ema_decay}; expected within [0, 1), or null")
        if mix_tokens is not None and not backbone.takes_masks:
            raise ValueError(
                f"mix_tokens puts patches of one image into another, which "
                f"{type(backbone).__name__} cannot; set mix_tokens to null"
            )
        self.num_classes, self.optimization, self.ema_decay = num_classes, optimizer, ema_decay
        self.dense_weight, self.mix_tokens = dense_weight, mix_tokens
        self.ground_truth, self.label_smoothing = ground_truth, label_smoothing
        self.first = FirstWeights(weights, weights_part, weights_drop, weights_scope)
        self.classifier = TokenClassifier(backbone, num_classes, dense_weight > 0)
        self.averaged: TokenClassifier | None = None
        if ema_decay is not None:
            self.averaged = copy.deepcopy(self.classifier).requires_grad_(False).eval()
        self.tally, self.averaged_tally = Tally(), Tally()

    def setup(self, stage: str) -> None:
        data = getattr(self.trainer, "datamodule", None)
        check_classes(data, self.num_classes)
        check_precision(self.trainer)
        fit_data(data, self.classifier.backbone)
        if isinstance(data, TokenLabelDataModule) and self.dense_weight == 0:
            data.label_size = (1, 1)  # nothing would read labels of tokens
        check_token_labels(data, self.num_classes, self.dense_weight > 0)
        if isinstance(data, TokenLabelDataModule) and self.dense_weight > 0:
            check_patches(data, self.classifier.backbone)
        size = getattr(data, "batch_size", 0)
        if self.mix_tokens == "pair" and size % 2:
            raise ValueError(
                f"data.init_args.batch_size is {size}; expected an even number, as mix_tokens "
                f"mixes pairs"
            )
        if self.first.are_due_in_setup(self.trainer):
            self.load()

    def on_fit_start(self) -> None:
        if self.first.are_due_at_start(self.trainer):
            self.load()

    def load(self) -> None:
        """Take first values from `weights`."""
        self.first.fill(self.classifier)
        if self.averaged is not None:
            self.averaged.load_state_dict(self.classifier.state_dict())

    def train(self, mode: bool = True) -> "TokenLabeling":
        super().train(mode)
        if self.averaged is not None:
            self.averaged.eval()
        return self

    def forward(self, images: Images) -> Float[Tensor, "b k"]:
        logits: Tensor = self.classifier(images)
        return logits

    def networks(self) -> dict[str, TokenClassifier]:
        """What can be judged, the one that is meant where none is named first."""
        averaged = {} if self.averaged is None else {"averaged": self.averaged}
        return {"classifier": self.classifier, **averaged}

    def embed(self, images: Images, network: str | None = None) -> Float[Tensor, "b d"]:
        """One vector an image, of one of `networks`; for callbacks that judge."""
        return embed(self.networks(), images, network)

    def pictures(
        self, images: Float[Tensor, "b c height width"]
    ) -> dict[str, Float[Tensor, "3 rows columns"]]:
        """Token labels over crops, and what `modules.drawing.pictures_of` draws of the backbone."""
        data: SourceDataModule = self.trainer.datamodule  # type: ignore[attr-defined]
        drawn = pictures_of(self.classifier.backbone, images, data.mean, data.std)
        if not isinstance(data, TokenLabelDataModule) or data.maps is None:
            return drawn
        if self.classifier.aux_head is not None:
            crops = data.crops(len(images), self.device)
            features, _, logits = self.classifier.read(crops.images)
            assert logits is not None
            drawn["token_labels"] = token_labels(crops, logits, features.grid, data)
        return drawn

    def training_step(
        self, batch: TokenLabelBatch | ImageBatch, batch_idx: int
    ) -> dict[str, Tensor]:
        classifier, images = self.classifier, batch.images
        targets = class_targets(batch, self.num_classes, self.label_smoothing, self.ground_truth)
        seen: Images | Swapped = images
        if self.mix_tokens is not None:
            patch = classifier.backbone.patch_size
            grid = (images.shape[-2] // patch, images.shape[-1] // patch)
            boxes = draw_boxes(batch.keys, grid, self.mix_tokens)
            seen = Swapped(images, boxes.is_swapped, boxes.partner)
            targets = torch.lerp(targets[boxes.partner], targets, boxes.share[:, None])
        features, logits, tokens = classifier.read(seen)
        losses = soft_cross_entropy(logits, targets)
        self.log_mean("train/class_loss", batch, losses)
        if tokens is not None:
            token_losses = self.token_losses(batch, tokens)
            self.log_mean("train/token_loss", batch, token_losses)
            losses = losses + self.dense_weight * token_losses
        self.log_mean("train/loss", batch, losses)
        return {"loss": batch.mean(losses), "embedding": features.pooled.detach()}

    def token_losses(
        self, batch: TokenLabelBatch | ImageBatch, logits: Float[Tensor, "b n k"]
    ) -> Float[Tensor, " b"]:
        """Of every image the mean over its tokens."""
        if isinstance(batch, ImageBatch):
            given = (logits.shape[1], self.num_classes, self.label_smoothing)
            return token_cross_entropy(logits, label_targets(batch, *given))
        assert batch.tokens is not None  # `setup` saw to it
        how = (self.num_classes, self.label_smoothing)
        return token_cross_entropy(logits, softmax_targets(batch.tokens, *how))

    def log_mean(
        self, name: str, batch: TokenLabelBatch | ImageBatch, losses: Float[Tensor, " b"]
    ) -> None:
        log_mean(self, name, batch.mean(losses), batch.num_images)

    def validation_step(self, batch: ImageBatch, batch_idx: int) -> None:
        networks = ((self.tally, self.classifier), (self.averaged_tally, self.averaged))
        for tally, network in networks:
            if network is not None:
                logits = network(batch.images).float()
                targets = F.one_hot(batch.labels, self.num_classes).float()
                add_scores(tally, batch, logits, soft_cross_entropy(logits, targets))

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
        return (Average(self.averaged, self.classifier, self.ema_decay, "average"),)

    def configure_callbacks(self) -> list[Callback]:
        return [EMA()] if self.averaged is not None else []
