"""Masked patches: a student says of patches that it does not see what its teacher says of them.

"iBOT: Image BERT Pre-Training with Online Tokenizer" (Zhou et al. 2021), as "DINOv2" (Oquab et al.
2023, section 4) trains with it beside DINO's loss.

    for every global crop, with `probability`:
        hide r n of its n patches, r uniform in `ratio`
    t = teacher(crop)                                    a vector a patch, no gradient
    s = student(crop, a learned token at hidden patches)
    loss = mean over crops of                            0 for a crop that nothing of is hidden
        mean over hidden j of CE(softmax((t_j - center) / teacher temperature),
                                 softmax(s_j / student temperature))
    center <- m center + (1 - m) mean(t_j)               over hidden j of the global batch

What is hidden is a function of the image's key, which is one of seed, epoch and image; no other
image, device or micro-batch has a say. Published code shares the ratios of a batch out evenly
instead, which is the same for each crop by itself. Every crop has room for as many hidden patches
as the highest ratio hides, so no shape depends on what was drawn; room that is not used computes
something that weighs nothing.
"""

from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from datamodules.augment import HIDE, uniforms, view_keys
from datamodules.views import NUM_GLOBAL
from modules.dino_loss import (
    Center,
    Reduce,
    Rows,
    Targets,
    alone,
    chunks,
    same_loss,
    vectors_at_once,
)
from modules.masking import Tokens, blocks

# Bottlenecks of the hidden patches, [b, room, e], and the prototypes that they are compared with.
Vectors = tuple[Float[Tensor, "b room e"], Float[Tensor, "k e"]]


@dataclass(frozen=True)
class MaskedPatches:
    """Which patches of global crops the student has to guess, and what that weighs.

    Args:
        weight: of this loss beside DINO's.
        probability: share of the global crops of which patches are hidden.
        ratio: lowest and highest share of a crop's patches that are; uniform between.
        shape: "block" hides rectangles (BEiT) and single patches for what no rectangle fits in,
            "random" single patches.
        num_prototypes: outputs of a head of its own for patches; null shares the head.

    Raises:
        ValueError: values out of range.
    """

    weight: float = 1.0
    probability: float = 0.5
    ratio: tuple[float, float] = (0.1, 0.5)
    shape: Literal["block", "random"] = "block"
    num_prototypes: int | None = None

    def __post_init__(self) -> None:
        if self.weight <= 0:
            raise ValueError(
                f"masked_patches.weight is {self.weight}; expected more than 0, or "
                f"masked_patches null"
            )
        if not 0.0 < self.probability <= 1.0:
            raise ValueError(
                f"masked_patches.probability is {self.probability}; expected within (0, 1]"
            )
        if not 0.0 <= self.ratio[0] <= self.ratio[1] <= 1.0 or self.ratio[1] == 0.0:
            raise ValueError(
                f"masked_patches.ratio is {self.ratio}; expected 0 <= low <= high <= 1, high above "
                f"0"
            )
        if self.shape not in ("block", "random"):
            raise ValueError(
                f"masked_patches.shape is {self.shape!r}; expected 'block' or 'random'"
            )
        if self.num_prototypes is not None and self.num_prototypes < 2:
            raise ValueError(
                f"masked_patches.num_prototypes is {self.num_prototypes}; expected at least 2, or "
                f"null"
            )

    def room(self, num_patches: int) -> int:
        """Hidden patches of a crop at most."""
        return max(1, int(self.ratio[1] * num_patches))


class Hidden(NamedTuple):
    """The hidden patches of some crops.

    is_masked: [b, n] True where a patch is hidden
    places:    [b, room] the hidden patches first
    is_used:   [b, room] True where there is a hidden patch
    """

    is_masked: Bool[Tensor, "b n"]
    places: Int[Tensor, "b room"]
    is_used: Bool[Tensor, "b room"]

    def of(self, patches: Float[Tensor, "b n d"]) -> Float[Tensor, "b room d"]:
        """Those patches, and others in the room that is not used."""
        return patches.take_along_dim(self.places[..., None], dim=1)

    def mean(self, losses: Float[Tensor, " b_room"]) -> Float[Tensor, " b"]:
        """Of every crop the mean over its hidden patches, 0 without any."""
        used = torch.where(self.is_used, losses.view(self.is_used.shape), 0.0)
        return used.sum(dim=1) / self.is_used.sum(dim=1).clamp(min=1)


def hide(how: MaskedPatches, keys: Int[Tensor, " b"], grid: tuple[int, int]) -> Hidden:
    """Draw what is hidden of the global crops of images: all first crops, then all second ones."""
    n, views = grid[0] * grid[1], view_keys(keys, NUM_GLOBAL).flatten()
    draws = uniforms(views, HIDE, 2 + n)
    (low, high), room = how.ratio, how.room(n)
    counts = ((low + (high - low) * draws[:, 0]) * n).long().clamp(1, room)
    counts = torch.where(draws[:, 1] < how.probability, counts, 0)
    rank = draws[:, 2:]
    if how.shape == "block":
        rank = rank + blocks(views, Tokens.of_grid(len(views), grid, 0, keys.device), counts)
    places = rank.argsort(dim=1, descending=True, stable=True)[:, :room]
    is_used = torch.arange(room, device=keys.device) < counts[:, None]
    return Hidden(
        torch.zeros_like(rank, dtype=torch.bool).scatter(1, places, is_used), *(places, is_used)
    )


class PatchLoss(nn.Module):
    """The loss of hidden patches, with a center of its own; without one by Sinkhorn-Knopp."""

    def __init__(self, center: Center | None) -> None:
        super().__init__()
        self.center = center

    def forward(
        self,
        student: Vectors,
        taught: Vectors,
        hidden: Hidden,
        temperatures: tuple[float, float],
        reduce: Reduce,
    ) -> Float[Tensor, " v_b"]:
        """Of every crop; `temperatures` are the student's and the teacher's."""
        (seen, weight), (z, prototypes) = student, taught
        z, is_used = z.flatten(0, 1), hidden.is_used.flatten()
        if self.center is None:
            targets = sinkhorn_targets(z, is_used, prototypes, temperatures[1], reduce)
        else:
            self.center.add(z[None], is_used[None])
            targets = self.center.targets(z[None], prototypes, temperatures[1])
        return hidden.mean(same_loss(seen.flatten(0, 1), weight, targets, temperatures[0]))


@torch.no_grad()
def sinkhorn_targets(
    taught: Float[Tensor, "t e"],
    is_used: Bool[Tensor, " t"],
    weight: Float[Tensor, "k e"],
    temperature: float,
    reduce: Reduce = alone,
    iterations: int = 3,
    at_once: int | None = None,
) -> Targets:
    """`dino_loss.sinkhorn_knopp` among those vectors that are used, of all devices.

    Scaling columns and rows in turn leaves a factor for each, and the rows' follow from the
    columns', so k numbers say it all: logits exist for few vectors at a time.
    """
    pieces = chunks(len(taught), at_once or vectors_at_once(len(weight)))
    scale = weight.new_zeros(len(weight))  # log of what the columns are divided by

    def logits(rows: Rows) -> Float[Tensor, "c k"]:
        with torch.autocast(taught.device.type, enabled=False):
            return F.linear(taught[rows].to(weight.dtype), weight) / temperature

    for iteration in range(iterations):
        sums = []
        for rows in pieces:
            x = logits(rows)
            if iteration > 0:  # rows are scaled after columns
                x = x - (x - scale).logsumexp(dim=-1, keepdim=True)
            sums.append(x.masked_fill(~is_used[rows, None], -torch.inf).logsumexp(dim=0))
        own = torch.stack(sums).logsumexp(dim=0)
        largest = reduce(own.clone(), "max")
        # Where nothing is used anywhere, no column is scaled.
        largest = torch.where(largest == -torch.inf, 0.0, largest)
        scale = largest + reduce((own - largest).exp(), "sum").clamp(min=1e-30).log()
    return lambda rows: (logits(rows) - scale).softmax(dim=-1)[None]
