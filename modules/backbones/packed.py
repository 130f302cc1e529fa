"""What a backbone needs to take a pack: its checks, and position tables read token by token.

Every image has positions of its own grid, as though it were alone ("Patch n' Pack: NaViT",
Dehghani et al. 2023), but no shape depends on a size: sizes are indices into stacked matrices.
"""

import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Bool, Float
from torch import Tensor

from modules.backbones.attention import Packed, Segments
from modules.backbones.resampling import MAX_GRID, Grid, Resampling, axis_bank, wave_bank


def check_pack(pack: Packed, num_prefix: int, max_grid: int | None) -> None:
    """Refuse packs that were made for another backbone.

    The sides of images are looked at on a CPU only: elsewhere that would wait for the device, and
    what makes packs has refused them already.

    Raises:
        ValueError: another number of prefix tokens, or an image beyond `max_grid`.
    """
    if pack.num_prefix != num_prefix:
        raise ValueError(
            f"a pack with {pack.num_prefix} prefix tokens an image reached a backbone that has "
            f"{num_prefix}; pack with the backbone's num_prefix_tokens"
        )
    if max_grid is None or torch.compiler.is_compiling() or pack.grids.device.type != "cpu":
        return
    if (largest := int(pack.grids.max())) > max_grid:
        raise ValueError(
            f"an image of {largest} patches along a side reached a backbone that takes "
            f"{max_grid}; make such images smaller, or patch_size larger"
        )


def is_prefix(segments: Segments) -> Bool[Tensor, "rows n"]:
    return ~segments.is_patch & ~segments.is_padding


def own_rows(
    patches: Float[Tensor, "rows n d"],
    prefix: Float[Tensor, "1 p d"] | None,
    segments: Segments,
) -> Float[Tensor, "rows n d"]:
    """`patches` at patches, rows of `prefix` at prefix tokens (none: zeros), zeros at padding.

    What `patches` holds at prefix tokens and padding has no part in this.
    """
    if prefix is None:
        return torch.where(segments.is_patch[..., None], patches, 0.0)
    # Padding is prefix token -1: a row of zeros in front stands for it.
    table = F.pad(prefix[0], (0, 0, 1, 0))
    index = torch.where(segments.is_patch, 0, segments.positions[..., 1] + 1)
    return torch.where(segments.is_patch[..., None], patches, F.embedding(index, table))


def grid_weights(
    segments: Segments, old: Grid, how: Resampling
) -> tuple[Float[Tensor, "rows n old_rows"], Float[Tensor, "rows n old_columns"]]:
    """The rows of each token's resampling matrices, down and across; those of prefix tokens and
    padding mean nothing."""
    grids = segments.grids[segments.image]
    own = torch.tensor(old, device=grids.device)
    # The table's own grid is not resampled at all, as in `resample_grid`.
    sizes = torch.where((grids == own).all(-1, keepdim=True), 0, grids)
    places = segments.positions.clamp(min=0)
    down, across = (
        axis_bank(side, how, grids.device)[sizes[..., axis], places[..., axis]]
        for axis, side in enumerate(old)
    )
    return down, across


def resampled_rows(
    table: Float[Tensor, "old_rows old_columns d"], segments: Segments, how: Resampling
) -> Float[Tensor, "rows n d"]:
    """The row that each token has in the table, resampled to the grid of its image in float32."""
    old_rows, old_columns, _ = table.shape
    key = (old_rows, old_columns, how)
    if key not in segments.weights:
        down, across = grid_weights(segments, (old_rows, old_columns), how)
        both = down[..., :, None] * across[..., None, :]
        segments.weights[key] = rearrange(both, "rows n r c -> rows n (r c)")
    with torch.autocast(table.device.type, enabled=False):
        out = segments.weights[key] @ table.flatten(0, 1).float()
    return out.to(table.dtype)


def separable_rows(
    columns: Float[Tensor, "old_columns half"],
    rows: Float[Tensor, "old_rows half"],
    segments: Segments,
    how: Resampling,
) -> Float[Tensor, "rows n d"]:
    """`resampled_rows` of a table that is one of columns beside one of rows."""
    down, across = grid_weights(segments, (rows.shape[0], columns.shape[0]), how)
    with torch.autocast(rows.device.type, enabled=False):
        out = torch.cat((across @ columns.float(), down @ rows.float()), dim=-1)
    return out.to(rows.dtype)


def wave_rows(segments: Segments, dim: int, big_vision: bool) -> Float[Tensor, "rows n d"]:
    """The row of the sin-cos table of each token's row and column."""
    bank = wave_bank(dim, big_vision, segments.ids.device)
    row, column = segments.positions.clamp(0, MAX_GRID - 1).unbind(-1)
    return torch.cat((bank[column], bank[row]), dim=-1)
