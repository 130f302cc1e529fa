"""Orders of the tokens of a map: row by row, or window by window, shifted or not.

Attention in windows, and patches that are merged, need tokens that lie together. All other layers
do not care where a token lies. So tokens are not rolled, cut and put back around every attention:
they stay in the order of the last windows, and go to that of the next with one gather of rows.
What goes where is worked out once for every pair of orders with einops, on numbers of tokens.
"""

from typing import Any, NamedTuple

import torch
from einops import rearrange
from jaxtyping import Float, Int
from torch import Tensor

from modules.backbones.resampling import Grid
from modules.backbones.tables import table

EMPTY = -1


class Order(NamedTuple):
    """How the tokens of a map lie: window by window, row by row within each.

    grid:   rows and columns of the map
    window: rows and columns of a window; where windows do not divide the map, they go over its
            lower and right edge
    shift:  rows and columns by which the map is rolled up and to the left, with what windows have
            beyond its edges (the published code) or, with `rolls_map`, before (timm)
    """

    grid: Grid
    window: Grid
    shift: Grid = (0, 0)
    rolls_map: bool = False

    @property
    def is_full(self) -> bool:
        """No place of a window is without a token."""
        return all(side % cut == 0 for side, cut in zip(self.grid, self.window, strict=True))

    @property
    def num_windows(self) -> int:
        rows, columns = self.windows
        return rows * columns

    @property
    def windows(self) -> Grid:
        """Rows and columns of windows."""
        return (-(-self.grid[0] // self.window[0]), -(-self.grid[1] // self.window[1]))


def row_by_row(grid: Grid) -> Order:
    return Order(grid, grid)


def slots(order: Order) -> Int[Tensor, "windows places"]:
    """The token in each place of each window, by its number row by row; EMPTY for none."""
    (rows, columns), (down, across) = order.grid, order.window
    up_and_left = (-order.shift[0], -order.shift[1])
    tokens = torch.arange(rows * columns).view(rows, columns)
    full = torch.full((order.windows[0] * down, order.windows[1] * across), EMPTY)
    full[:rows, :columns] = tokens.roll(up_and_left, (0, 1)) if order.rolls_map else tokens
    full = full if order.rolls_map else full.roll(up_and_left, (0, 1))
    return rearrange(full, "(y p) (x q) -> (y x) (p q)", p=down, q=across)


class Merging(NamedTuple):
    """How tokens become one: squares of side x side.

    Their order is above left, above right, below left, below right; with `columns_first` it is
    Swin's: above left, below left, above right, below right.
    """

    side: int
    columns_first: bool = False


def merged_slots(fine: Grid, coarse: Order, how: Merging) -> Int[Tensor, "tokens places"]:
    """The tokens of a map that each token of a coarser one is made of, as `slots` has them.

    A map that squares do not divide goes on with EMPTY below and to the right.
    """
    side, (rows, columns) = how.side, coarse.grid
    full = torch.full((rows * side, columns * side), EMPTY)
    full[: fine[0], : fine[1]] = slots(row_by_row(fine)).view(fine)
    inner = "(q p)" if how.columns_first else "(p q)"
    parts = rearrange(full, f"(y p) (x q) -> (y x) {inner}", p=side, q=side)
    return parts[slots(coarse).flatten()]


class Rows(NamedTuple):
    """A choice of rows: of each the row of the source, and which are zeros, having none."""

    source: Int[Tensor, " n"]
    zeros: Int[Tensor, " z"] | None


class Move(NamedTuple):
    """A choice of rows, and the one that brings every row back to where it was."""

    there: Rows
    back: Rows

    @property
    def inverse(self) -> "Move":
        return Move(self.back, self.there)


def moving(source: Int[Tensor, "*a"], target: Int[Tensor, "*b"], device: torch.device) -> Move:
    """From one list of tokens to another, each of which has every token once at most."""

    def rows(have: Tensor, want: Tensor) -> Rows:
        places = torch.full((max(len(have), len(want)) + 1,), EMPTY)
        places[have] = torch.arange(len(have))
        places[EMPTY] = EMPTY
        index = places[want]
        zeros = (index == EMPTY).nonzero().flatten().to(device)
        return Rows(index.clamp(min=0).to(device), zeros if len(zeros) else None)

    source, target = source.flatten(), target.flatten()
    return Move(rows(source, target), rows(target, source))


# What `reorder` and `merge` take as plain tuples: see `table`.
Plain = tuple[Any, ...]


@table
def move_between(source: Plain, target: Plain, device: torch.device) -> Move:
    return moving(slots(Order(*source)), slots(Order(*target)), device)


@table
def merge_into(source: Plain, target: Plain, how: Plain, device: torch.device) -> Move:
    fine, coarse = Order(*source), Order(*target)
    return moving(slots(fine), merged_slots(fine.grid, coarse, Merging(*how)), device)


class Take(torch.autograd.Function):
    """Rows of every image by a `Move`; the gradient is the move back, a gather as well."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, *parts: Tensor | None) -> Tensor:
        ctx.parts = parts
        return chosen(x, parts[0], parts[1])

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        index, zeros, back, back_zeros = ctx.parts
        grad: Tensor = Take.apply(grads[0], back, back_zeros, index, zeros)
        return grad, None, None, None, None


def chosen(x: Tensor, index: Tensor | None, zeros: Tensor | None) -> Tensor:
    assert index is not None
    out = x.index_select(1, index)
    return out if zeros is None else out.index_fill_(1, zeros, 0.0)


def take(x: Float[Tensor, "b n d"], move: Move) -> Float[Tensor, "b m d"]:
    out: Tensor = Take.apply(x, *move.there, *move.back)
    return out


def reorder(x: Float[Tensor, "b n d"], now: Order, then: Order) -> Float[Tensor, "b m d"]:
    """Tokens in another order of the same map; places without a token are zeros."""
    if now == then:
        return x
    return take(x, move_between(tuple(now), tuple(then), x.device))


def merge(
    x: Float[Tensor, "b n d"], now: Order, then: Order, how: Merging
) -> Float[Tensor, "b m e"]:
    """Squares of tokens, each in one line, as the tokens of the coarser map `then`.

    Tokens beyond the lower and right edge are zeros.
    """
    assert then.is_full
    move = merge_into(tuple(now), tuple(then), tuple(how), x.device)
    return take(x, move).view(x.shape[0], -1, how.side**2 * x.shape[2])


def coarser(grid: Grid, side: int) -> Grid:
    """The map of patches of side x side tokens; those at the edge may be incomplete."""
    return (-(-grid[0] // side), -(-grid[1] // side))


def window_mask(
    order: Order, hides_empty: bool, device: torch.device
) -> Float[Tensor, "windows 1 n n"] | None:
    """Added to scores: -inf between places of two regions of the map, else 0; None for no mask.

    A shift brings tokens into a window that lie at opposite edges of the map. Regions are those
    of the published code, which counts places without a token to the region that they lie in;
    with `hides_empty` they are a region of their own. A place always sees itself, so -inf is safe,
    where the published -100 lets large scores through.
    """
    return constant_mask(tuple(order), hides_empty, device)


@table
def constant_mask(
    plain: Plain, hides_empty: bool, device: torch.device
) -> Float[Tensor, "windows 1 n n"] | None:
    order = Order(*plain)
    if order.shift == (0, 0) and (order.is_full or not hides_empty):
        return None
    axes = [
        regions(count * side, side, shift)
        for count, side, shift in zip(order.windows, order.window, order.shift, strict=True)
    ]
    down, across = order.window
    region = rearrange(
        3 * axes[0][:, None] + axes[1], "(y p) (x q) -> (y x) (p q)", p=down, q=across
    )
    if hides_empty:
        region = torch.where(slots(order) == EMPTY, EMPTY, region)
    hidden = region[:, None, :, None] != region[:, None, None, :]
    return torch.zeros(hidden.shape).masked_fill(hidden, -torch.inf).to(device)


def regions(length: int, window: int, shift: int) -> Int[Tensor, " length"]:
    """0 for the places before the last window, 1 in it, 2 for those rolled over the edge."""
    place = torch.arange(length)
    return (place >= length - window).long() + (place >= length - shift).long() * (shift > 0)


def offsets(window: Grid, largest: Grid) -> Int[Tensor, "n n"]:
    """Which row of a table of (2 rows - 1) x (2 columns - 1) offsets two places of a window have.

    `largest` is the window that the table is for. Numbers are (dy + rows - 1)(2 columns - 1) +
    dx + columns - 1, from query to key.
    """
    y, x = torch.meshgrid(*(torch.arange(size) for size in window), indexing="ij")
    y, x = y.flatten(), x.flatten()
    down = y[:, None] - y[None, :] + largest[0] - 1
    across = x[:, None] - x[None, :] + largest[1] - 1
    return down * (2 * largest[1] - 1) + across


@table
def offset_index(window: Grid, largest: Grid, device: torch.device) -> Int[Tensor, "n n"]:
    """`offsets`, made once."""
    return offsets(window, largest).to(device)
