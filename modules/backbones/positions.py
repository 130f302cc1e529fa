"""Where a patch is: learned tables, sines and cosines, relative biases.

Learned 1-D, 2-D and relative positions are those that "An Image is Worth 16x16 Words"
(Dosovitskiy et al. 2020, appendix D.4) compares. Sin-cos tables follow MAE (He et al. 2021,
`util/pos_embed.py`) and "Better plain ViT baselines for ImageNet-1k" (Beyer et al. 2022).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Float
from torch import Tensor, nn

from modules.backbones.attention import Groups, Segments
from modules.backbones.masked import Part
from modules.backbones.packed import own_rows, resampled_rows, separable_rows, wave_rows
from modules.backbones.resampling import (
    Grid,
    Resampling,
    resample_grid,
    resample_table,
    sincos2d,
)
from modules.backbones.windows import offsets

KINDS = ("learned1d", "learned2d", "sincos2d", "sincos2d_big_vision", "relative", "none")
PLACES = ("stem", "every", "every_shared")
RESAMPLINGS = ("antialias", "bicubic", "dino", "bilinear")


@dataclass(frozen=True)
class Positions:
    """Which positions a backbone has, and where they enter.

    Args:
        kind: "learned1d" (a row for each patch), "learned2d" (half of the width from a table
            of columns, half from one of rows), "sincos2d" (fixed, MAE's layout),
            "sincos2d_big_vision" (fixed, big_vision's frequencies), "relative" (a learned bias
            of the attention for each head and offset, as in Swin: the modern stand-in for the
            paper's extra attention; refused for packs), "none".
        inject: "stem" (added to the tokens once), "every" (before every block, each with its
            own), "every_shared" (before every block, the same). null: "stem", but "every" for
            relative positions, which have no stem. Fixed tables have nothing of their own, so
            "every" is refused for them.
        prefix_rows: learned tables have rows for class token, distillation token and registers
            too (ViT, DeiT); without, those have no position (DeiT-III, DINOv2).
        resample: how a table is brought to another grid. "antialias": bicubic with antialias,
            timm's. "bicubic": without. "dino": bicubic with DINO's offset of 0.1 in the scale.
            "bilinear": with aligned corners, Google's.

    Raises:
        ValueError: an unknown value, or a combination without a meaning.
    """

    kind: Literal[
        "learned1d", "learned2d", "sincos2d", "sincos2d_big_vision", "relative", "none"
    ] = "learned1d"
    inject: Literal["stem", "every", "every_shared"] | None = None
    prefix_rows: bool = True
    resample: Resampling = "antialias"

    def __post_init__(self) -> None:
        known = (("kind", KINDS), ("inject", (*PLACES, None)), ("resample", RESAMPLINGS))
        for name, values in known:
            if getattr(self, name) not in values:
                listed = ", ".join("null" if value is None else value for value in values)
                raise ValueError(
                    f"positions.{name} is {getattr(self, name)!r}; expected one of {listed}"
                )
        learned = ("learned1d", "learned2d")
        for name, default, readers in (
            ("inject", None, tuple(kind for kind in KINDS if kind != "none")),
            ("prefix_rows", True, learned),
            ("resample", "antialias", (*learned, "relative")),
        ):
            if getattr(self, name) != default and self.kind not in readers:
                raise ValueError(
                    f"positions.{name} is {getattr(self, name)!r}, but kind {self.kind} has no "
                    f"use for it; remove it"
                )
        if self.kind == "relative" and self.inject == "stem":
            raise ValueError(
                "positions.inject is 'stem', but relative positions act within attention; "
                "use every (a table for each block) or every_shared"
            )
        if self.kind.startswith("sincos") and self.inject == "every":
            raise ValueError(
                "positions.inject is 'every', but fixed tables are alike in all blocks; "
                "use every_shared"
            )

    @property
    def place(self) -> str:
        """`inject` with its default filled in."""
        return self.inject or ("every" if self.kind == "relative" else "stem")


def with_prefix(
    prefix: Float[Tensor, "1 p d"] | int, patches: Float[Tensor, "n d"]
) -> Float[Tensor, "1 p_and_n d"]:
    """Put rows before those of the patches: given ones, or as many zeros."""
    if isinstance(prefix, int):
        prefix = patches.new_zeros(1, prefix, patches.shape[-1])
    return torch.cat((prefix, patches[None]), dim=1)


class Learned1D(nn.Module):
    """A learned row for every token, `table`."""

    def __init__(
        self, dim: int, grid: Grid, num_prefix: int, prefix_rows: bool, resample: Resampling
    ) -> None:
        super().__init__()
        self.grid, self.num_prefix, self.resample = grid, num_prefix, resample
        self.num_rows = num_prefix if prefix_rows else 0
        self.table = nn.Parameter(torch.zeros(1, self.num_rows + grid[0] * grid[1], dim))

    def forward(self, where: Grid | Segments) -> Float[Tensor, "b n d"]:
        if isinstance(where, Segments):
            patches = self.table[0, self.num_rows :].view(*self.grid, -1)
            prefix = self.table[:, : self.num_rows] if self.num_rows else None
            return own_rows(resampled_rows(patches, where, self.resample), prefix, where)
        return self.at(where)

    def at(self, grid: Grid) -> Float[Tensor, "1 n d"]:
        table = resample_table(self.table, self.grid, grid, self.num_rows, self.resample)
        if self.num_rows == self.num_prefix:
            return table
        return with_prefix(self.num_prefix, table[0])


class Learned2D(nn.Module):
    """Half of the width from a table of columns, half from a table of rows."""

    def __init__(
        self, dim: int, grid: Grid, num_prefix: int, prefix_rows: bool, resample: Resampling
    ) -> None:
        super().__init__()
        if dim % 2:
            raise ValueError(f"width {dim} is odd, and learned2d halves it")
        self.grid, self.num_prefix, self.resample = grid, num_prefix, resample
        self.columns = nn.Parameter(torch.zeros(1, grid[1], dim // 2))
        self.rows = nn.Parameter(torch.zeros(1, grid[0], dim // 2))
        has_rows = prefix_rows and num_prefix > 0
        self.prefix = nn.Parameter(torch.zeros(1, num_prefix, dim)) if has_rows else None

    def forward(self, where: Grid | Segments) -> Float[Tensor, "b n d"]:
        if isinstance(where, Segments):
            patches = separable_rows(self.columns[0], self.rows[0], where, self.resample)
            return own_rows(patches, self.prefix, where)
        return self.at(where)

    def at(self, grid: Grid) -> Float[Tensor, "1 n d"]:
        shape = (self.grid[0], self.grid[1], -1)
        x, y = self.columns[0].expand(shape), self.rows[0][:, None].expand(shape)
        table = resample_grid(torch.cat((x, y), dim=-1), grid, self.resample)
        return with_prefix(
            self.num_prefix if self.prefix is None else self.prefix, table.flatten(0, 1)
        )


class SinCos2D(nn.Module):
    """Fixed sines and cosines; the prefix tokens have zeros. Computed anew for another grid."""

    table: Tensor

    def __init__(self, dim: int, grid: Grid, num_prefix: int, big_vision: bool) -> None:
        super().__init__()
        self.dim, self.grid, self.num_prefix = dim, grid, num_prefix
        self.big_vision = big_vision
        self.register_buffer("table", self.at(grid), persistent=False)

    def at(self, grid: Grid) -> Float[Tensor, "1 n d"]:
        return with_prefix(self.num_prefix, sincos2d(self.dim, grid, self.big_vision))

    def forward(self, where: Grid | Segments) -> Float[Tensor, "b n d"]:
        if isinstance(where, Segments):
            waves = wave_rows(where, self.dim, self.big_vision)
            return own_rows(waves.to(self.table.dtype), None, where)
        grid = where
        return self.table if grid == self.grid else self.at(grid).to(self.table)


class RelativeBias(nn.Module):
    """A learned bias of the attention scores for each head and each offset of two patches.

    Not for packs: a bias for every pair of tokens of every grid would be larger than the pack.

    Three more biases a head are for prefix tokens: from patch to prefix, from prefix to patch,
    and among prefix tokens (BEiT, Bao et al. 2021).
    """

    index: Tensor

    def __init__(self, num_heads: int, grid: Grid, num_prefix: int, resample: Resampling) -> None:
        super().__init__()
        self.grid, self.num_prefix, self.resample = grid, num_prefix, resample
        self.table = nn.Parameter(torch.zeros(2 * grid[0] - 1, 2 * grid[1] - 1, num_heads))
        self.register_buffer("index", offsets(grid, grid), persistent=False)
        self.prefix = nn.Parameter(torch.zeros(3, num_heads)) if num_prefix else None

    def forward(self, where: Grid | Segments) -> Float[Tensor, "1 h n n"]:
        if isinstance(where, Segments):
            raise ValueError(
                "relative positions take no packs; use learned1d, learned2d or sincos2d positions"
            )
        grid = where
        sides = (2 * grid[0] - 1, 2 * grid[1] - 1)
        table = resample_grid(self.table, sides, self.resample).flatten(0, 1)
        index = self.index if grid == self.grid else offsets(grid, grid).to(table.device)
        bias = rearrange(table[index], "i j h -> h i j")
        if self.prefix is not None:
            bias = F.pad(bias, (self.num_prefix, 0, self.num_prefix, 0))
            is_prefix = torch.arange(bias.shape[-1], device=bias.device) < self.num_prefix
            to, of = is_prefix[None, :], is_prefix[:, None]
            for value, here in zip(self.prefix, (to & ~of, of & ~to, of & to), strict=True):
                bias = bias + value[:, None, None] * here
        return bias[None]


def make_tables(
    how: Positions, dim: int, grid: Grid, num_prefix: int, depth: int
) -> nn.Module | None:
    """What is added to the tokens: one table, or one for each block."""
    arguments = (dim, grid, num_prefix)
    if how.kind in ("none", "relative"):
        return None
    if how.kind.startswith("sincos"):
        return SinCos2D(*arguments, how.kind == "sincos2d_big_vision")
    family = Learned1D if how.kind == "learned1d" else Learned2D
    count = depth if how.place == "every" else 1
    tables = [family(*arguments, how.prefix_rows, how.resample) for _ in range(count)]
    return nn.ModuleList(tables) if how.place == "every" else tables[0]


def make_biases(
    how: Positions, num_heads: int, grid: Grid, num_prefix: int, depth: int
) -> nn.Module | None:
    """What is added to the attention scores: one table of biases, or one for each block."""
    if how.kind != "relative":
        return None
    count = depth if how.place == "every" else 1
    tables = [RelativeBias(num_heads, grid, num_prefix, how.resample) for _ in range(count)]
    return nn.ModuleList(tables) if how.place == "every" else tables[0]


def read(table: Any, where: Grid | Segments | Part) -> Tensor:
    """What a table has for the tokens that are there, or what biases there are of all of them."""
    if isinstance(where, Part):
        return where.rows(table(where.grid), table.num_prefix)
    out: Tensor = table(where)
    return out


def for_blocks(
    tables: nn.Module | None, where: Grid | Segments | Groups | Part, depth: int
) -> Sequence[Any]:
    """What each block gets: its own table, the shared one, or nothing; of groups one for each."""
    if isinstance(where, Groups) and tables is not None:
        return list(zip(*(for_blocks(tables, grid, depth) for grid in where.grids), strict=True))
    if tables is None or isinstance(where, Groups):
        return [None] * depth
    if isinstance(tables, nn.ModuleList):
        return [read(table, where) for table in tables]
    return [read(tables, where)] * depth
