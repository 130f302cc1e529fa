"""Where a patch is: learned tables, sines and cosines, relative biases, and their resampling.

Learned 1-D, 2-D and relative positions are those that "An Image is Worth 16x16 Words"
(Dosovitskiy et al. 2020, appendix D.4) compares. Sin-cos tables follow MAE (He et al. 2021,
`util/pos_embed.py`) and "Better plain ViT baselines for ImageNet-1k" (Beyer et al. 2022).
"""

from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Float, Int
from torch import Tensor, nn

Grid = tuple[int, int]
Resampling = Literal["antialias", "bicubic", "dino", "bilinear"]

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
            paper's extra attention), "none".
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


@lru_cache(maxsize=256)
def axis_matrix(
    old: int, new: int, how: Resampling, device: torch.device
) -> Float[Tensor, "new old"]:
    """The linear map that takes `old` samples on a line to `new` ones, in float32."""
    # Two columns wide: torch's antialiased bicubic is wrong for images one pixel wide (torch 2.15).
    line = torch.eye(old).reshape(1, old, old, 1).repeat(1, 1, 1, 2)
    with torch.inference_mode(False), torch.no_grad():
        if how == "bilinear":
            out = F.interpolate(line, (new, 2), mode="bilinear", align_corners=True)
        elif how == "dino":
            out = F.interpolate(line, scale_factor=((new + 0.1) / old, 1.0), mode="bicubic")
        else:
            out = F.interpolate(line, (new, 2), mode="bicubic", antialias=how == "antialias")
        return out[0, :, :, 0].T.contiguous().to(device)


def resample_grid(
    values: Float[Tensor, "rows columns d"], new: Grid, how: Resampling = "antialias"
) -> Float[Tensor, "new_rows new_columns d"]:
    """Bring values on a grid to another grid, in float32; the same grid is returned as it is.

    The filters are separable, so this is a product with one small matrix for each axis, made
    once for every pair of sizes: differentiable, deterministic and of static shape everywhere.
    """
    rows, columns, _ = values.shape
    if (rows, columns) == tuple(new):
        return values
    down = axis_matrix(rows, new[0], how, values.device)
    across = axis_matrix(columns, new[1], how, values.device)
    with torch.autocast(values.device.type, enabled=False):
        out = torch.einsum("ar,bc,rcd->abd", down, across, values.float())
    return out.to(values.dtype)


def resample_table(
    table: Float[Tensor, "1 old d"],
    old: Grid,
    new: Grid,
    num_prefix: int,
    how: Resampling = "antialias",
) -> Float[Tensor, "1 new d"]:
    """Bring a position table to another grid; its first `num_prefix` rows stay as they are.

    Raises:
        ValueError: the table has not the rows that `old` and `num_prefix` say.
    """
    if table.shape[1] != num_prefix + old[0] * old[1]:
        raise ValueError(
            f"a position table of {table.shape[1]} rows is not {num_prefix} prefix rows and a "
            f"grid of {old[0]}x{old[1]}"
        )
    prefix, patches = table[0, :num_prefix], table[0, num_prefix:]
    patches = rearrange(patches, "(rows columns) d -> rows columns d", rows=old[0])
    patches = rearrange(resample_grid(patches, new, how), "rows columns d -> (rows columns) d")
    return torch.cat((prefix, patches))[None]


@lru_cache(maxsize=64)
def sincos2d(dim: int, grid: Grid, big_vision: bool = False) -> Float[Tensor, "n d"]:
    """[sin(w x), cos(w x), sin(w y), cos(w y)] for column x and row y of every patch.

    w_i = 10000^(-i / q) with q = dim / 4, or 10000^(-i / (q - 1)) in big_vision's layout.

    Raises:
        ValueError: `dim` is no multiple of 4.
    """
    if dim % 4 or dim == 4:
        raise ValueError(f"width {dim} is no multiple of 4 above 4, as sin-cos positions need")
    quarter = dim // 4
    steps = torch.arange(quarter, dtype=torch.float64) / (quarter - big_vision)
    y, x = torch.meshgrid(
        *(torch.arange(size, dtype=torch.float64) for size in grid), indexing="ij"
    )
    angles = [place.reshape(-1, 1) * 10000.0**-steps for place in (x, y)]
    waves = [wave(angle) for angle in angles for wave in (torch.sin, torch.cos)]
    return torch.cat(waves, dim=1).float()


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

    def forward(self, grid: Grid) -> Float[Tensor, "1 n d"]:
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

    def forward(self, grid: Grid) -> Float[Tensor, "1 n d"]:
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

    def forward(self, grid: Grid) -> Float[Tensor, "1 n d"]:
        return self.table if grid == self.grid else self.at(grid).to(self.table)


class RelativeBias(nn.Module):
    """A learned bias of the attention scores for each head and each offset of two patches.

    Three more biases a head are for prefix tokens: from patch to prefix, from prefix to patch,
    and among prefix tokens (BEiT, Bao et al. 2021).
    """

    index: Tensor

    def __init__(self, num_heads: int, grid: Grid, num_prefix: int, resample: Resampling) -> None:
        super().__init__()
        self.grid, self.num_prefix, self.resample = grid, num_prefix, resample
        self.table = nn.Parameter(torch.zeros(2 * grid[0] - 1, 2 * grid[1] - 1, num_heads))
        self.register_buffer("index", offset_index(grid), persistent=False)
        self.prefix = nn.Parameter(torch.zeros(3, num_heads)) if num_prefix else None

    def forward(self, grid: Grid) -> Float[Tensor, "1 h n n"]:
        offsets = (2 * grid[0] - 1, 2 * grid[1] - 1)
        table = resample_grid(self.table, offsets, self.resample).flatten(0, 1)
        index = self.index if grid == self.grid else offset_index(grid).to(table.device)
        bias = rearrange(table[index], "i j h -> h i j")
        if self.prefix is not None:
            bias = F.pad(bias, (self.num_prefix, 0, self.num_prefix, 0))
            is_prefix = torch.arange(bias.shape[-1], device=bias.device) < self.num_prefix
            to, of = is_prefix[None, :], is_prefix[:, None]
            for value, where in zip(self.prefix, (to & ~of, of & ~to, of & to), strict=True):
                bias = bias + value[:, None, None] * where
        return bias[None]


def offset_index(grid: Grid) -> Int[Tensor, "n n"]:
    """Which of the (2 rows - 1) x (2 columns - 1) offsets two patches have."""
    y, x = torch.meshgrid(*(torch.arange(size) for size in grid), indexing="ij")
    down = y.flatten()[:, None] - y.flatten()[None, :] + grid[0] - 1
    across = x.flatten()[:, None] - x.flatten()[None, :] + grid[1] - 1
    return down * (2 * grid[1] - 1) + across


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


def for_blocks(tables: nn.Module | None, grid: Grid, depth: int) -> list[Tensor | None]:
    """What each block gets: its own table, the shared one, or nothing."""
    if isinstance(tables, nn.ModuleList):
        return [table(grid) for table in tables]
    return [None if tables is None else tables(grid)] * depth
