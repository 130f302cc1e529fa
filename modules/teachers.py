"""Teachers that score every cell of an image, not only the image: networks without their pooling.

"Re-labeling ImageNet" (Yun et al. 2021, section 3.1): without its global average pooling, a
classifier's last layer is applied to every cell of the last feature map. What a network does
between pooling and classifier (norms, further layers) is done to every cell as well.
"""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from einops import rearrange
from jaxtyping import Float, Int
from lightning.pytorch import LightningModule
from torch import Tensor, nn

from datamodules.augment import normalize
from datamodules.labelling import LabellingBatch
from modules.backbones import Backbone, Features, Timm
from modules.backbones.layout import find_layout


def cells_of(network: nn.Module, images: Tensor) -> tuple[Tensor, tuple[int, int]]:
    """Every cell of a timm network's last features as features of an image of one cell, whose
    pooling is the cell itself: [(b rows columns), ...]; and rows and columns.

    Raises:
        ValueError: a network whose features are no map and no tokens of a grid.
    """
    features = network.forward_features(images)  # type: ignore[operator]
    if not isinstance(features, Tensor):
        raise ValueError(
            f"{type(network).__name__} gives several features of an image, which are no map of "
            f"cells; take another teacher"
        )
    width = network.num_features
    grid: Sequence[int] | None = None
    if features.ndim == 4 and features.shape[1] == width:
        grid = features.shape[2:]
        cells = rearrange(features, "b d y x -> (b y x) d 1 1")
    elif features.ndim == 4 and features.shape[3] == width:
        grid = features.shape[1:3]
        cells = rearrange(features, "b y x d -> (b y x) 1 1 d")
    elif layout := find_layout(network, features, (images.shape[2], images.shape[3])):
        prefix = layout.prefix
        grid = layout.grid_of((images.shape[2], images.shape[3]), features.shape[1] - prefix)
        if grid == (1, 1) and not hasattr(network, "num_prefix_tokens"):
            grid = None  # a class token (PiT)
        cells = rearrange(features[:, prefix:], "b n d -> (b n) 1 d")
        cells = cells.expand(-1, prefix + 1, -1)  # whichever token is read, it is this one
    if grid is None or len(cells) != len(images) * grid[0] * grid[1]:
        raise ValueError(
            f"{type(network).__name__} gives features {list(features.shape)}, which are no map "
            f"of cells; take another teacher"
        )
    return cells, (grid[0], grid[1])


class DenseTimm(nn.Module):
    """A timm classifier that gives the logits of every cell, [b, k, rows, columns].

    Args:
        network: timm's.
        head: a classifier of its pooled features in the place of its own.
    """

    def __init__(self, network: nn.Module, head: nn.Module | None = None) -> None:
        super().__init__()
        self.network, self.head = network, head
        self.eval().requires_grad_(False)

    def forward(
        self, images: Float[Tensor, "b c height width"]
    ) -> Float[Tensor, "b k rows columns"]:
        cells, (rows, columns) = cells_of(self.network, images)
        own = self.head is None
        aux_head = getattr(self.network, "aux_head", None)
        if own and isinstance(aux_head, nn.Linear):  # trained on patches (VOLO)
            logits: Tensor = aux_head(cells[:, -1])
        else:
            logits = self.network.forward_head(cells, pre_logits=not own)  # type: ignore[operator]
        if self.head is not None:
            logits = self.head(logits)
        return rearrange(logits, "(b y x) k -> b k y x", y=rows, x=columns)


class DensePatches(nn.Module):
    """The same of a network of ours with a head that was trained on its patches."""

    def __init__(self, backbone: Backbone, aux_head: nn.Module) -> None:
        super().__init__()
        self.backbone, self.aux_head = backbone, aux_head
        self.eval().requires_grad_(False)

    def forward(
        self, images: Float[Tensor, "b c height width"]
    ) -> Float[Tensor, "b k rows columns"]:
        features: Features = self.backbone(images)
        return as_map(self.aux_head(features.patches), features)


class DenseBackbone(nn.Module):
    """The same of a ViT of ours and the head that was trained on its pooled features: each patch
    is read out as the pooled one is.

    Args:
        backbone, head: of the network.
        head_dist: that of its distillation token; both are averaged, as in evaluation.

    Raises:
        ValueError: a backbone that pools by attention, which no patch alone stands for.
    """

    def __init__(
        self, backbone: Backbone, head: nn.Module, head_dist: nn.Module | None = None
    ) -> None:
        super().__init__()
        if hasattr(backbone, "attn_pool"):
            raise ValueError(
                "this teacher pools by attention, and its head knows nothing of single patches; "
                "take one with class token or average pooling"
            )
        self.backbone, self.head, self.head_dist = backbone, head, head_dist
        self.eval().requires_grad_(False)

    def forward(
        self, images: Float[Tensor, "b c height width"]
    ) -> Float[Tensor, "b k rows columns"]:
        features: Features = self.backbone(images)
        norm: nn.Module = getattr(self.backbone, "fc_norm", nn.Identity())
        pre_logits: nn.Module | None = getattr(self.backbone, "pre_logits", None)
        cells: Tensor = norm(features.patches)
        if pre_logits is not None:
            cells = torch.tanh(pre_logits(cells))
        scores: Tensor = self.head(cells)
        if self.head_dist is not None:
            scores = (scores + self.head_dist(features.patches)) / 2
        return as_map(scores, features)


def as_map(scores: Float[Tensor, "b n k"], features: Features) -> Float[Tensor, "b k rows columns"]:
    assert features.grid is not None  # these are no pack
    rows, columns = features.grid
    return rearrange(scores, "b (y x) k -> b k y x", y=rows, x=columns)


def dense(backbone: Backbone, heads: Mapping[str, nn.Module]) -> nn.Module:
    """A backbone and its linear heads, cell by cell.

    Args:
        heads: "head" on pooled features, "head_dist" on the distillation token, "aux_head" on
            patches, which is meant where there is one.

    Raises:
        ValueError: see `DenseBackbone`.
    """
    if "aux_head" in heads:
        return DensePatches(backbone, heads["aux_head"])
    if isinstance(backbone, Timm):
        return DenseTimm(backbone.model, heads["head"])
    return DenseBackbone(backbone, heads["head"], heads.get("head_dist"))


class Scores(NamedTuple):
    """What is kept of a batch of maps.

    scores:    [b, rows, columns, k] the k highest, float32
    ids:       [b, rows, columns, k] their classes, int32
    remainder: [b, rows, columns] float16 log of the sum of exp(score) over the others, or None
    """

    scores: Float[Tensor, "b rows columns k"]
    ids: Int[Tensor, "b rows columns k"]
    remainder: Float[Tensor, "b rows columns"] | None


def keep_best(scores: Float[Tensor, "b k rows columns"], top_k: int, remainder: bool) -> Scores:
    """The best classes of every cell."""
    cells = scores.float().movedim(1, -1)
    best, ids = cells.topk(top_k, dim=-1)
    others = None
    if remainder:
        left = cells.scatter(-1, ids, -torch.inf).logsumexp(dim=-1)
        others = left.clamp(min=-60000.0).half()  # no class may be left
    return Scores(best, ids.int(), others)


class Relabeling(LightningModule):
    """Scores images cell by cell in `Trainer.predict`; `callbacks.score_maps` writes what it gives.

    Args:
        teacher: from normalised images to logits of every cell.
        mean, std: what its images are normalised with.
        top_k: classes kept in a cell.
        remainder: whether the share of the others is kept.
    """

    def __init__(
        self,
        teacher: nn.Module,
        mean: tuple[float, ...],
        std: tuple[float, ...],
        top_k: int,
        remainder: bool,
    ) -> None:
        super().__init__()
        self.teacher, self.mean, self.std = teacher, mean, std
        self.top_k, self.remainder = top_k, remainder

    def predict_step(self, batch: LabellingBatch, batch_idx: int) -> Scores:
        scores = self.teacher(normalize(batch.images, self.mean, self.std))
        return keep_best(scores, self.top_k, self.remainder)
