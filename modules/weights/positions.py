"""Position tables of a file, brought to a backbone's grid and prefix tokens."""

import math

import torch
from torch import Tensor, nn

from modules.backbones import ViT
from modules.backbones.positions import SinCos2D
from modules.backbones.resampling import Grid, resample_grid, resample_table
from modules.weights.files import State

Tokens = dict[str, int]
TOKENS = ("cls_token", "dist_token", "reg_token")


def tokens_of(state: State) -> Tokens:
    """The prefix tokens of a file, in their order, and how many there are of each."""
    return {name: state[name].shape[1] for name in TOKENS if name in state}


def fit_positions(state: State, tokens: Tokens, backbone: ViT, is_ours: bool) -> dict[str, str]:
    """Bring every position table of a file to the backbone's grid and prefix rows, in `state`.

    Args:
        state: what is read of the file, under our names.
        tokens: the prefix tokens of the file and how many rows each has, be they read or not.
        backbone: what it is for.
        is_ours: this project wrote the file, so a table of the right length is the right one.

    Returns:
        For each table that had to change, what was done.

    Raises:
        ValueError: a table whose grid is not known.
    """
    done: dict[str, str] = {}
    how, target = backbone.resample, backbone.state_dict()
    for name in [name for name in state if name.startswith(("positions.", "relative."))]:
        if name not in target or (is_ours and target[name].shape == state[name].shape):
            continue
        if name.startswith("relative."):
            new = target[name].shape
            state[name] = resample_grid(state[name], (new[0], new[1]), how)
            done[name] = f"resampled to {new[0]}x{new[1]} offsets"
        elif name.endswith((".columns", ".rows")):
            length = target[name].shape[1]
            state[name] = resample_grid(state[name], (1, length), how)
            done[name] = f"resampled to {length}"
        elif name.endswith("table") and (what := fit_table(state, name, tokens, backbone, is_ours)):
            done[name] = what
    return done


def drop_computed(state: State, network: nn.Module) -> dict[str, str]:
    """Take the tables out of `state` that a network, or its backbone, computes.

    Returns:
        For each of them, what was found.

    Raises:
        ValueError: another table than the one computed here.
    """
    done: dict[str, str] = {}
    for module_name, module in network.named_modules():
        name = f"{module_name.removeprefix('backbone.')}.table"
        if isinstance(module, SinCos2D) and name in state:
            check_sincos(state.pop(name), module)
            done[name] = "equals the computed sines and cosines"
    return done


def fit_table(state: State, name: str, tokens: Tokens, backbone: ViT, is_ours: bool) -> str:
    """Resample one table in place of the old; returns what was done, in words."""
    table, grid, how = state[name], backbone.grid, backbone.resample
    wanted = backbone.state_dict()[name].shape[1] - grid[0] * grid[1]
    num_prefix, old_grid = layout(tokens, table.shape[1], grid, wanted, is_ours)
    rows, patches = {}, table[:, num_prefix:]
    start, words = 0, []
    for token, count in tokens.items():
        if start < num_prefix:
            rows[token] = table[:, start : start + count]
            start += count
    if any(token not in state for token in rows):
        words.append("rows of dropped tokens left out")
        rows = {token: row for token, row in rows.items() if token in state}
    prefix = torch.cat([table[:, :0], *rows.values()], dim=1)
    if rows and not wanted:
        # The rows of prefix tokens go into the tokens: the sum in front of the blocks is alike.
        for token, row in rows.items():
            state[token] = state[token] + row
        prefix = table[:, :0]
        words.append("rows of prefix tokens added to the tokens")
    elif wanted and not rows:
        prefix = table.new_zeros(1, wanted, table.shape[2])
        words.append("rows of zeros for the prefix tokens")
    if old_grid != grid:
        patches = resample_table(patches, old_grid, grid, 0, how)
        words.append(f"resampled from {old_grid[0]}x{old_grid[1]} to {grid[0]}x{grid[1]} ({how})")
    state[name] = torch.cat((prefix, patches), dim=1)
    return ", ".join(words)


def layout(
    tokens: Tokens, num_rows: int, grid: Grid, wanted: int, is_ours: bool
) -> tuple[int, Grid]:
    """How many rows of a table are of prefix tokens, and the grid of the others.

    A file does not say. Published tables are those of square images, and have rows for all
    prefix tokens, for all but the registers, or for none. Where several of these would do, the
    one is taken that the network itself has.
    """
    counts = list(tokens.values())
    registers = tokens.get("reg_token", 0)
    found: dict[int, Grid] = {}
    for prefix in dict.fromkeys((sum(counts), sum(counts) - registers, *counts[:1], 0)):
        left = num_rows - prefix
        side = math.isqrt(max(0, left))
        if left == grid[0] * grid[1] and is_ours:
            return prefix, grid
        if left == grid[0] * grid[1] and side * side != left:
            found[prefix] = grid
        elif left > 1 and side * side == left:
            found[prefix] = (side, side)
    if len(found) > 1:
        alike = {prefix: g for prefix, g in found.items() if prefix == wanted}
        found = alike or {p: g for p, g in found.items() if (p == 0) == (wanted == 0)}
    if len(found) == 1:
        return found.popitem()
    raise ValueError(
        f"the file's position table has {num_rows} rows, which is no square grid with "
        f"{sum(counts)} prefix tokens or fewer; build the network for the file's image size, "
        f"load it, and resample from there"
    )


def check_sincos(table: Tensor, positions: SinCos2D) -> None:
    """Raises ValueError where a file's table is not the one that the network computes."""
    side = math.isqrt(table.shape[1])
    prefix = table.shape[1] - side * side
    computed = positions.at((side, side))[:, positions.num_prefix :]
    # Near 1 half precision is coarse.
    close = {torch.float16: 1e-3, torch.bfloat16: 1e-2}.get(table.dtype, 1e-4)
    is_same = table.shape[2] == computed.shape[2] and torch.allclose(
        table[:, prefix:].float(), computed, atol=close
    )
    if not is_same or table[:, :prefix].any():
        raise ValueError(
            "the file's position table is not the network's sines and cosines; set "
            "positions.kind to learned1d to take it"
        )
