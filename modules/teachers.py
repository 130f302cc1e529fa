"""Teachers that score every cell of an image, not only the image: networks without their pooling.

"Re-labeling ImageNet" (Yun et al. 2021, section 3.1): without its global average pooling, a
classifier's last layer is applied to every cell of the last feature map. What a network does
between pooling and classifier (norms, further layers) is done to every cell as well.
"""

from typing import NamedTuple

import torch
from einops import rearrange
from jaxtyping import Float, Int
from lightning.pytorch import LightningModule
from torch import Tensor, nn

from datamodules.augment import normalize
from datamodules.labelling import LabellingBatch
from modules.backbones import Backbone, Features, Timm


def cells_of(network: nn.Module, images: Tensor) -> tuple[Tensor, tuple[int, int]]:
    """Every cell of a timm network's last features as features of an image of one cell, whose
    pooling is the cell itself: [(b rows columns), ...]; and rows and columns.

    Raises:
        ValueError: a network whose features are no map and no tokens of a grid.
    """
    features: Tensor = network.forward_features(images)  # type: ignore[operator]
    width, grid = network.num_features, None
    if features.ndim == 4 and features.shape[1] == width:
        grid = features.shape[2:]
        cells = rearrange(features, "b d y x -> (b y x) d 1 1")
    elif features.ndim == 4 and features.shape[3] == width:
        grid = features.shape[1:3]
        cells = rearrange(features, "b y x d -> (b y x) 1 1 d")
    elif features.ndim == 3:
        prefix: int = getattr(network, "num_prefix_tokens", 0)
        grid = network.patch_embed.dynamic_feat_size(images.shape[2:])  # type: ignore[operator, union-attr]
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
        logits: Tensor = self.network.forward_head(cells, pre_logits=not own)  # type: ignore[operator]
        if self.head is not None:
            logits = self.head(logits)
        return rearrange(logits, "(b y x) k -> b k y x", y=rows, x=columns)


class DenseBackbone(nn.Module):
    """The same of a ViT of ours and the head that was trained on its pooled features, or on its
    patches.

    Raises:
        ValueError: a backbone that pools by attention, which no patch alone stands for.
    """

    def __init__(self, backbone: Backbone, head: nn.Module) -> None:
        super().__init__()
        if hasattr(backbone, "attn_pool"):
            raise ValueError(
                "this teacher pools by attention, and its head knows nothing of single patches; "
                "take one with class token or average pooling"
            )
        self.backbone, self.head = backbone, head
        self.eval().requires_grad_(False)

    def forward(
        self, images: Float[Tensor, "b c height width"]
    ) -> Float[Tensor, "b k rows columns"]:
        features: Features = self.backbone(images)
        assert features.grid is not None  # these are no pack
        rows, columns = features.grid
        norm: nn.Module = getattr(self.backbone, "fc_norm", nn.Identity())
        scores: Tensor = self.head(norm(features.patches))
        return rearrange(scores, "b (y x) k -> b k y x", y=rows, x=columns)


def dense(backbone: Backbone, weight: Tensor, bias: Tensor) -> nn.Module:
    """A backbone and a linear head of its pooled features, cell by cell.

    Raises:
        ValueError: see `DenseBackbone`.
    """
    head = nn.Linear(weight.shape[1], weight.shape[0])
    head.load_state_dict({"weight": weight, "bias": bias})
    if isinstance(backbone, Timm):
        return DenseTimm(backbone.model, head)
    return DenseBackbone(backbone, head)


class Scores(NamedTuple):
    """What is kept of a batch of maps.

    scores:    [b, rows, columns, k] the k highest, float16
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
    return Scores(best.half(), ids.int(), others)


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
