"""What backbones of several stages share: coarser maps of wider tokens, stage after stage.

A stage halves the map: after four of them a feature stands for 32 x 32 pixels. No token stands
before the patches, and all attention needs whole maps.
"""

from collections.abc import Callable, Iterable
from typing import Any, overload

import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from modules.backbones.attention import Packed
from modules.backbones.layers import Backbone, Features, PatchEmbed
from modules.backbones.masked import Group, Masked, Swapped, Visible
from modules.backbones.recomputed import recomputed
from modules.backbones.resampling import Grid
from modules.backbones.vit import as_pair, check_rates
from modules.backbones.windows import Order, coarser, reorder, row_by_row

STEM = 4  # pixels along a side of the first patches
STRIDE = 32  # and of the features'


class Pyramid(Backbone):
    """A backbone of several stages.

    Takes images of any size, and lists of groups of one size each, a pass a group. Images that
    first patches of 4 x 4 pixels do not divide, and maps that 2 x 2 tokens do not, go on with
    zeros below and to the right: the grid is the image by 32, rounded up. Takes neither packs nor
    masks.

    depths:  blocks of each stage
    widths:  width of each stage
    """

    image_size: tuple[int, int]
    max_grid = None
    takes_packs = False
    patch_size = STRIDE
    num_prefix_tokens = 0
    depths: tuple[int, ...]
    widths: tuple[int, ...]
    norm: nn.Module

    def set_up(
        self, widths: tuple[int, ...], depths: tuple[int, ...], image_size: int | tuple[int, int]
    ) -> None:
        """What every backbone tells of itself.

        Raises:
            ValueError: sizes below 1.
        """
        self.image_size = as_pair(image_size)
        if min(*self.image_size, *depths) < 1:
            raise ValueError(
                f"image_size is {self.image_size[0]}x{self.image_size[1]}, stages have "
                f"{', '.join(map(str, depths))} blocks; expected at least 1 of each"
            )
        self.depths, self.widths = depths, widths
        self.num_layers, self.embed_dim = sum(depths), widths[-1]

    def stages(self, images: Float[Tensor, "b c height width"], keep: int) -> "Kept":
        """The tokens after each of the last `keep` blocks, and how they lie."""
        raise NotImplementedError

    def read_out(self, x: Float[Tensor, "b n d"], now: Order) -> Features:
        """Final norm of tokens after a block, and their mean."""
        patches = reorder(self.norm(x), now, row_by_row(now.grid))
        return Features(patches.mean(dim=1), None, patches, now.grid)

    @overload
    def forward(self, images: Group | Visible | Packed) -> Features: ...
    @overload
    def forward(self, images: list[Group]) -> list[Features]: ...
    def forward(self, images: Group | Visible | Packed | list[Group]) -> Features | list[Features]:
        if isinstance(images, list):
            return [self(group) for group in images]
        (last,) = self.last_blocks(images, 1)
        return last

    def last_blocks(self, images: Group | Visible | Packed, count: int) -> list[Features]:
        """What the last `count` blocks give, the last one last, each read out as `forward` does.

        Raises:
            ValueError: more blocks than the last stage has, or none; what is no batch of images.
        """
        if not 1 <= count <= self.depths[-1]:
            raise ValueError(
                f"{count} blocks were asked of {type(self).__name__}, whose last stage has "
                f"{self.depths[-1]}; blocks before these have another width and grid, so set "
                f"num_blocks to {self.depths[-1]} at most"
            )
        kept = self.stages(self.check(images), count)
        return [self.read_out(x, now) for x, now in kept]

    def check(self, images: Group | Visible | Packed) -> Float[Tensor, "b c height width"]:
        """Refuse what is no batch of images of one size, or not of the right channels."""
        name = type(self).__name__
        if not isinstance(images, Tensor):
            kinds = {
                Masked: "masked patches",
                Swapped: "patches of other images",
                Visible: "some of the patches",
            }
            what = kinds.get(type(images), "packs of images")
            raise ValueError(
                f"{name} needs whole maps, for its windows and strides, and {what} reached it; use "
                f"modules.backbones.ViT for these"
            )
        if images.shape[1] != self.in_channels:
            raise ValueError(
                f"images of {images.shape[1]} channels reached a {name} built for "
                f"{self.in_channels}; set the backbone's in_channels and the data's channels to "
                f"the same number"
            )
        return images

    def layer_of(self, name: str) -> int:
        """The layer of a parameter: 0 the stem, i + 1 block i, num_layers + 1 the final norm.

        Blocks count through all stages; what goes before the first block of a stage, or between it
        and the second, has its layer.
        """
        if (place := self.place_of(name)) is None:
            return self.num_layers + 1 if name.startswith("norm.") else 0
        stage, block = place
        return sum(self.depths[:stage]) + block + 1

    def place_of(self, name: str) -> tuple[int, int] | None:
        """Stage and block of a parameter, by its name; None for the stem and the final norm."""
        raise NotImplementedError


Kept = list[tuple[Float[Tensor, "b n d"], Order]]


class Stem(PatchEmbed):
    """First patches, row by row, and their norm."""

    def __init__(self, in_channels: int, dim: int) -> None:
        super().__init__(STEM, in_channels, dim)
        self.norm = nn.LayerNorm(dim)

    def forward(self, images: Float[Tensor, "b c height width"]) -> Float[Tensor, "b n d"]:
        height, width = images.shape[2:]
        if height % STEM or width % STEM:
            images = F.pad(images, (0, -width % STEM, 0, -height % STEM))
        out: Tensor = self.norm(super().forward(images))
        return out


def first_grid(images: Float[Tensor, "b c height width"]) -> Grid:
    """Rows and columns of the first patches."""
    return coarser((images.shape[2], images.shape[3]), STEM)


def deepened(depths: tuple[int, ...], depth: int | None) -> tuple[int, ...]:
    """Blocks of each stage, with so many in the last but one."""
    if depth is None:
        return depths
    if depth < 1:
        raise ValueError(f"depth is {depth}; expected at least 1")
    return (*depths[:-2], depth, depths[-1])


def added(x: Float[Tensor, "b n d"], branch: Float[Tensor, "b n d"]) -> Float[Tensor, "b n d"]:
    """x + branch, in the place of the branch where it is as wide: no layer needs it afterwards."""
    return branch.add_(x) if branch.dtype == x.dtype else x + branch


def run_block(
    block: Callable[..., tuple[Tensor, Order]], recompute: bool, x: Tensor, now: Order, *rest: Any
) -> tuple[Tensor, Order]:
    """A block; with `recompute` only its input is kept for the backward pass."""
    if not (recompute and x.requires_grad):
        return block(x, now, *rest)
    out: tuple[Tensor, Order] = recomputed(block, x, now, *rest)
    return out


def choose(name: str, value: str, variants: Iterable[str], **rates: float) -> None:
    """Refuse a variant that is not known, and rates outside [0, 1)."""
    known = list(variants)
    if value not in known:
        raise ValueError(f"unknown {name} variant {value!r}; known: {', '.join(known)}")
    check_rates(**rates)
