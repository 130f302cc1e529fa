"""Linear probing: how much of a task a linear layer reads out of a frozen backbone.

"Masked Autoencoders Are Scalable Vision Learners" (He et al. 2021, appendix A.1) and "Emerging
Properties in Self-Supervised Vision Transformers" (Caron et al. 2021, section 4.1), with their
published code:

    blocks   = what the last num_blocks blocks of backbone(images) give, no gradient, eval mode
    features = [pooled of each block, the earliest first; mean of the last one's patches]
    features = batch norm without scale and shift (features)             MAE
    for every rate of the sweep, on the same features:
        logits = W features + b
        loss  += mean over images of -log softmax(logits)_label

The heads share nothing that is trained, and a gradient of the sum is each one's own: a sweep ends
as if every rate had had a run to itself. All begin with the same W.

MAE: batch norm, LARS, pooled = class token, one block. DINO: SGD, the class tokens of 4 blocks
for ViT-S; for ViT-B that of one and the mean of its patches (the published code interleaves the
two, which reorders the columns of W and nothing else). Of another backbone than theirs the
pooled features are whatever its `pooling` gives, so class token or not is all the same here.
"""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from lightning.pytorch import LightningModule
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor, nn

from callbacks.host import log_mean, log_number
from callbacks.standardize import Reduce, Standardize
from callbacks.tally import Tally
from datamodules.batch import ImageBatch, Images, PackedBatch
from modules import optim
from modules.backbones import Backbone
from modules.backbones.attention import Segments
from modules.backbones.pooling import mean_patch
from modules.checks import check_classes, check_precision
from modules.first_weights import FirstWeights
from modules.losses import soft_cross_entropy, soft_targets
from modules.networks import embed, fit_data
from modules.optim import Optimization


class Heads(nn.Module):
    """A frozen backbone and linear heads on its features, side by side.

    Weights are normal with std 0.01 (DINO; MAE cuts the same distribution off at 200 standard
    deviations), biases 0.
    """

    def __init__(
        self,
        backbone: Backbone,
        num_classes: int,
        num_heads: int,
        num_blocks: int,
        mean_patches: bool,
        batch_norm: bool,
    ) -> None:
        super().__init__()
        self.backbone = backbone.requires_grad_(False).eval()
        self.num_blocks, self.mean_patches = num_blocks, mean_patches
        dim = backbone.embed_dim * num_blocks + backbone.patch_dim * mean_patches
        self.head_norm = Standardize(dim) if batch_norm else None
        weight = torch.empty(num_classes, dim).normal_(std=0.01)
        self.heads = nn.ModuleList(nn.Linear(dim, num_classes) for _ in range(num_heads))
        for head in self.heads:
            assert isinstance(head, nn.Linear)
            head.weight.data.copy_(weight)
            nn.init.zeros_(head.bias)

    def embed(self, images: Images) -> Float[Tensor, "b d"]:
        """One vector an image."""
        pooled: Tensor = self.backbone(images).pooled
        return pooled

    def train(self, mode: bool = True) -> "Heads":
        super().train(mode)
        self.backbone.eval()
        return self

    @torch.no_grad()
    def features(self, images: Images) -> Float[Tensor, "b f"]:
        """What the heads read: the earliest of the last blocks first, mean patches at the end."""
        blocks = self.backbone.last_blocks(images, self.num_blocks)
        parts = [block.pooled for block in blocks]
        if self.mean_patches:
            segments = None if isinstance(images, Tensor) else Segments(images)
            parts.append(mean_patch(blocks[-1].patches, segments))
        return torch.cat([part.float() for part in parts], dim=-1)

    def forward(
        self, images: Images, is_valid: Tensor | None = None, total: Reduce = lambda x: x
    ) -> Float[Tensor, "s b k"]:
        """The logits of each head, in float32 whatever the backbone computed in.

        `is_valid` [b] and `total` are for the batch norm in training (`Standardize`).
        """
        features = self.features(images)
        if is_valid is None:
            is_valid = features.new_ones(len(features), dtype=torch.bool)
        with torch.autocast(features.device.type, enabled=False):
            if self.head_norm is not None:
                features = self.head_norm(features, is_valid, total)
            return torch.stack([head(features) for head in self.heads])


class LinearProbe(LightningModule):
    """Trains linear heads on the features of a frozen backbone.

    Logs `train/loss`, the mean of the heads' losses; `val/accuracy` and `val/loss` of the head
    with the highest held-out accuracy; with a sweep also `val/accuracy_lr_RATE` of each, by its
    base_lr, and `val/best_lr`. To choose the rate on the images that are reported is the published
    practice, and slightly optimistic.

    Args:
        backbone: any backbone of `modules.backbones`; it stays as it is.
        num_classes: number of classes k.
        weights: what is probed: a checkpoint of any method, ours or others' (`modules.weights`);
            null probes first values, a random network.
        weights_part: which network of the file, where it holds several (averaged, teacher).
        weights_drop: names of the file that may be left over, beyond heads and decoders.
        optimizer: how to optimise the heads.
        num_blocks: blocks, counted from the last, whose pooled features are read.
        mean_patches: the mean of the last block's patch tokens is read as well.
        batch_norm: features are normalised over the batch (of all devices, where the published
            code has each device's own) to mean 0 and variance 1.
        sweep: factors of the learning rate, one head each, trained at once.

    Raises:
        ValueError: values out of range, or data that does not fit them.
    """

    def __init__(
        self,
        backbone: Backbone,
        num_classes: int,
        weights: str | None = None,
        weights_part: str | None = None,
        weights_drop: Sequence[str] = (),
        optimizer: Optimization = Optimization(),  # noqa: B008 - frozen
        num_blocks: int = 1,
        mean_patches: bool = False,
        batch_norm: bool = False,
        sweep: Sequence[float] = (1.0,),
    ) -> None:
        super().__init__()
        self.save_hyperparameters(logger=False)  # the run's config.yaml has them
        if num_classes < 1:
            raise ValueError(f"num_classes is {num_classes}; expected at least 1")
        if not 1 <= num_blocks <= backbone.num_layers:
            raise ValueError(
                f"num_blocks is {num_blocks}; expected 1 to {backbone.num_layers}, the blocks of "
                f"the backbone"
            )
        self.rates = [f"{factor * optimizer.base_lr:g}" for factor in sweep]
        if not sweep or min(sweep) <= 0 or len(set(self.rates)) < len(self.rates):
            raise ValueError(f"sweep is {list(sweep)}; expected different factors above 0")
        if optimizer.layer_decay is not None:
            raise ValueError(
                f"optimizer.layer_decay is {optimizer.layer_decay}, but a probe trains no layers "
                f"of the backbone; set it to null"
            )
        self.num_classes, self.optimization, self.sweep = num_classes, optimizer, tuple(sweep)
        self.first = FirstWeights(weights, weights_part, weights_drop)
        self.probe = Heads(backbone, num_classes, len(sweep), num_blocks, mean_patches, batch_norm)
        self.tally = Tally()

    def setup(self, stage: str) -> None:
        data = getattr(self.trainer, "datamodule", None)
        check_classes(data, self.num_classes)
        check_precision(self.trainer)
        fit_data(data, self.probe.backbone)
        if self.first.are_due_in_setup(self.trainer):
            self.load()

    def on_fit_start(self) -> None:
        if self.first.source is None and self.trainer.ckpt_path is None:
            rank_zero_warn("weights is null: first values are probed, a random network")
        if self.first.are_due_at_start(self.trainer):
            self.load()

    def load(self) -> None:
        """Take the backbone from `weights`."""
        self.first.fill(self.probe)

    def networks(self) -> dict[str, Heads]:
        """What can be judged."""
        return {"probe": self.probe}

    def embed(self, images: Images, network: str | None = None) -> Float[Tensor, "b d"]:
        """One vector an image, of one of `networks`; for callbacks that judge."""
        return embed(self.networks(), images, network)

    def forward(self, images: Images) -> Float[Tensor, "s b k"]:
        """The logits of each head of the sweep."""
        logits: Tensor = self.probe(images)
        return logits

    def training_step(self, batch: ImageBatch | PackedBatch, batch_idx: int) -> Float[Tensor, ""]:
        targets = soft_targets(batch, self.num_classes, smoothing=0.0)
        logits = self.probe(batch.images, batch.is_valid, self.total)
        losses = torch.stack([batch.mean(soft_cross_entropy(one, targets)) for one in logits])
        log_mean(self, "train/loss", losses.mean(), batch.num_images)
        return losses.sum()

    def total(self, x: Tensor) -> Tensor:
        """The sum of a tensor over all devices."""
        reduced = self.trainer.strategy.reduce(x, reduce_op="sum")
        assert isinstance(reduced, Tensor)
        return reduced

    def validation_step(self, batch: ImageBatch | PackedBatch, batch_idx: int) -> None:
        """Add the loss and correct answers of each head, over the valid images, to the tally."""
        valid = batch.is_valid.float()
        sums = []
        for logits in self.probe(batch.images):
            losses = F.cross_entropy(logits, batch.labels, reduction="none")
            sums += [(losses * valid).sum(), ((logits.argmax(-1) == batch.labels) * valid).sum()]
        self.tally.add(*sums, valid.sum())

    def on_validation_epoch_end(self) -> None:
        *sums, count = self.tally.totals(self)
        if count == 0:
            raise ValueError("no image of the validation set could be read")
        losses, accuracies = ([total / count for total in sums[i::2]] for i in (0, 1))
        best = max(range(len(self.sweep)), key=lambda i: (accuracies[i], -losses[i]))
        self.log("val/loss", losses[best])
        self.log("val/accuracy", accuracies[best], prog_bar=True)
        if len(self.sweep) > 1:
            self.log("val/best_lr", float(self.rates[best]))
            for rate, accuracy in zip(self.rates, accuracies, strict=True):
                self.log(f"val/accuracy_lr_{rate}", accuracy)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        def factor(name: str) -> float:
            return self.sweep[int(name.split(".")[1])]

        return optim.build(self.optimization, self.probe, own_scale=factor)

    def on_train_start(self) -> None:
        self.lr = optim.learning_rate(self.optimization, self.trainer)

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        lr, _ = optim.follow(self.optimization, self.lr, self.trainer)
        log_number(self, "schedule/lr", lr)

    def configure_gradient_clipping(self, *_: Any, **__: Any) -> None:
        for head in self.probe.heads:  # one norm over all would let a head slow the others down
            optim.clip(self.optimization, head.parameters())
