"""Position tables of a file, brought to a backbone's grid and prefix tokens."""

import math

import torch
from torch import Tensor

from modules.backbones import ViT
from modules.backbones.positions import (
    Grid,
    Resampling,
    SinCos2D,
    resample_grid,
    resample_table,
)
from modules.weights.files import State

TOKENS = ("cls_token", "dist_token", "reg_token")


def fit_positions(state: State, backbone: ViT) -> dict[str, str]:
    """Bring every position table of a file to the backbone's grid and prefix rows, in `state`.

    Returns:
        For each table that had to change, what was done.
    """
    done: dict[str, str] = {}
    how = backbone.resample
    target = backbone.state_dict()
    positions = backbone.positions
    for name in [name for name in state if name.startswith(("positions.", "relative."))]:
        if name.endswith(".table") and isinstance(positions, SinCos2D):
            check_sincos(state.pop(name), positions)
            done[name] = "equals the computed sines and cosines"
        elif name not in target or target[name].shape == state[name].shape:
            continue
        elif name.startswith("relative."):
            new = target[name].shape
            state[name] = resample_grid(state[name], (new[0], new[1]), how)
            done[name] = f"resampled to {new[0]}x{new[1]} offsets"
        elif name.endswith((".columns", ".rows")):
            length = target[name].shape[1]
            state[name] = resample_grid(state[name], (1, length), how)
            done[name] = f"resampled to {length}"
        else:
            done[name] = fit_table(state, name, backbone, how)
    return done


def fit_table(state: State, name: str, backbone: ViT, how: Resampling) -> str:
    """Resample one table in place of the old; returns what was done, in words."""
    table, grid = state[name], backbone.grid
    wanted_rows = backbone.state_dict()[name].shape[1] - grid[0] * grid[1]
    old_rows, old_grid = layout(state, table.shape[1], grid)
    words = []
    if old_rows and not wanted_rows:
        # The rows of prefix tokens go into the tokens: the sum in front of the blocks is alike.
        start = 0
        for token in TOKENS:
            if token in state and start < old_rows:
                count = state[token].shape[1]
                state[token] = state[token] + table[:, start : start + count]
                start += count
        table, old_rows = table[:, old_rows:], 0
        words.append("rows of prefix tokens added to the tokens")
    elif wanted_rows and not old_rows:
        table = torch.cat((table.new_zeros(1, wanted_rows, table.shape[2]), table), dim=1)
        old_rows = wanted_rows
        words.append("rows of zeros for the prefix tokens")
    if old_rows == wanted_rows and old_grid != grid:
        table = resample_table(table, old_grid, grid, old_rows, how)
        words.append(f"resampled from {old_grid[0]}x{old_grid[1]} to {grid[0]}x{grid[1]} ({how})")
    state[name] = table
    return ", ".join(words) or "taken as it is"


def layout(state: State, num_rows: int, grid: Grid) -> tuple[int, Grid]:
    """How many rows of a table are of prefix tokens, and the grid of the others.

    A file does not say. The tokens in it do, with the table of a square image; the network's
    own grid is tried first, so tables of that size need not be square.
    """
    tokens = [state[t].shape[1] for t in TOKENS if t in state]
    for prefix in dict.fromkeys((sum(tokens), sum(tokens[:2]), sum(tokens[:1]), 0)):
        if num_rows - prefix == grid[0] * grid[1]:
            return prefix, grid
    for prefix in dict.fromkeys((sum(tokens), sum(tokens[:2]), sum(tokens[:1]), 0)):
        side = math.isqrt(max(0, num_rows - prefix))
        if side and side * side == num_rows - prefix:
            return prefix, (side, side)
    raise ValueError(
        f"the file's position table has {num_rows} rows, which is no square grid with "
        f"{sum(tokens)} prefix tokens or fewer; build the network for the file's image size, "
        f"load it, and resample from there"
    )


def check_sincos(table: Tensor, positions: SinCos2D) -> None:
    """Raises ValueError where a file's table is not the one that the network computes."""
    side = math.isqrt(table.shape[1])
    prefix = table.shape[1] - side * side
    computed = positions.at((side, side))[:, positions.num_prefix :]
    if not torch.allclose(table[:, prefix:].float(), computed, atol=1e-4):
        raise ValueError(
            "the file's position table is not the network's sines and cosines; set "
            "positions.kind to learned1d to take it"
        )
