"""Position tables of one grid brought to another, and tables that are computed."""

from typing import Any, Literal

import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Float
from torch import Tensor

from modules.backbones.tables import table

Grid = tuple[int, int]
Resampling = Literal["antialias", "bicubic", "dino", "bilinear"]

# Largest number of patches along a side of an image in a pack: 2048 px at patches of 16.
MAX_GRID = 128


def axis_matrix(
    old: int, new: int, how: Resampling, device: torch.device
) -> Float[Tensor, "new old"]:
    """The linear map that takes `old` samples on a line to `new` ones, in float32."""
    # To a compiler that was told nothing of shapes `new` is a symbol, and no constant follows.
    make = made_axis_matrix if torch.compiler.is_compiling() else kept_axis_matrix
    return make(old, new, how, device)


def made_axis_matrix(
    old: int, new: int, how: Resampling, device: torch.device
) -> Float[Tensor, "new old"]:
    # Two columns wide: torch's antialiased bicubic is wrong for images one pixel wide (torch 2.15).
    line = torch.eye(old).reshape(1, old, old, 1).repeat(1, 1, 1, 2)
    if how == "bilinear":
        out = F.interpolate(line, (new, 2), mode="bilinear", align_corners=True)
    elif how == "dino":
        out = F.interpolate(line, scale_factor=((new + 0.1) / old, 1.0), mode="bicubic")
    else:
        out = F.interpolate(line, (new, 2), mode="bicubic", antialias=how == "antialias")
    return out[0, :, :, 0].T.contiguous().to(device)


kept_axis_matrix = table(made_axis_matrix)


@table
def axis_bank(old: int, how: Resampling, device: torch.device) -> Float[Tensor, "sizes places old"]:
    """`axis_matrix` of every size up to `MAX_GRID`, below each other; at size 0 no resampling.

    With it the size of each image's own grid is an index and no shape.
    """
    bank = torch.zeros(MAX_GRID + 1, MAX_GRID, old)
    for size in range(1, MAX_GRID + 1):
        bank[size, :size] = axis_matrix(old, size, how, torch.device("cpu"))
    kept = min(old, MAX_GRID)
    bank[0, :kept] = torch.eye(old)[:kept]
    return bank.to(device)


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


@table
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
    places = (torch.arange(size, dtype=torch.float64) for size in grid)
    y, x = torch.meshgrid(*places, indexing="ij")
    angles = [place.reshape(-1, 1) * 10000.0**-steps for place in (x, y)]
    waves = [wave(angle) for angle in angles for wave in (torch.sin, torch.cos)]
    return torch.cat(waves, dim=1).float()


def sincos1d(count: int, dim: int) -> Float[Tensor, "n d"]:
    """sin(p / 10000^(2j / dim)) and the cosine of the same, next to each other, for p from 0."""
    made: Any = {"dtype": torch.float64, "device": "cpu"}
    steps = 10_000.0 ** (-torch.arange(0, dim, 2, **made) / dim)
    angles = torch.arange(count, **made)[:, None] * steps
    return torch.stack((angles.sin(), angles.cos()), dim=-1).flatten(1)[:, :dim].float()


@table
def wave_bank(dim: int, big_vision: bool, device: torch.device) -> Float[Tensor, "places half"]:
    """Half of a row of `sincos2d` for every row or column up to `MAX_GRID`."""
    return sincos2d(dim, (1, MAX_GRID), big_vision)[:, : dim // 2].to(device)
