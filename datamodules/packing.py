"""Variable-size images into rows of a fixed number of tokens: the plan of one pass over the data.

"Patch n' Pack: NaViT" (Dehghani et al. 2023, https://arxiv.org/abs/2307.06304): a resolution is
drawn for every image, its aspect kept; some of its patches are dropped; images are laid into rows
until those are full. All of it is decided from the sizes of the images before one is read, as a
pure function of (seed, pass), the same on every rank.
"""

import math
from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import numpy as np
import torch
from scipy.special import betaincinv, ndtr, ndtri

from datamodules.augment import uniforms
from datamodules.sampling import Groups, epoch_order, fold_each, grouped_order

# Streams of `uniforms`, beside those of `datamodules.augment`.
SIDE, DROP = 101, 102


@dataclass(frozen=True)
class Resolution:
    """How large an image becomes. Its side is the square root of its area; its aspect is kept.

    Args:
        kind: "native" (its own size), "uniform" (any side in the range alike) or
            "truncated_normal" (a normal of the side, cut off at the ends of the range; the paper
            prefers small sides).
        min_side, max_side: range in pixels, for native sizes as well: smaller images are
            enlarged to it, larger ones reduced.
        mean: centre of the normal, where min_side is -1 and max_side is 1.
        std: its standard deviation in the same units.

    Raises:
        ValueError: an unknown kind, a range that is empty, or values that nothing reads.
    """

    kind: Literal["native", "uniform", "truncated_normal"] = "native"
    min_side: int = 64
    max_side: int = 256
    mean: float = -0.5
    std: float = 1.0

    def __post_init__(self) -> None:
        kinds = ("native", "uniform", "truncated_normal")
        if self.kind not in kinds:
            raise ValueError(f"resolution.kind is {self.kind!r}; expected {' or '.join(kinds)}")
        if not 1 <= self.min_side <= self.max_side:
            raise ValueError(
                f"resolution has min_side {self.min_side} and max_side {self.max_side}; expected "
                f"1 <= min_side <= max_side"
            )
        if not 0 < self.std < math.inf:
            raise ValueError(f"resolution.std is {self.std}; expected more than 0")
        if not ndtr((1 - self.mean) / self.std) - ndtr((-1 - self.mean) / self.std) > 1e-6:
            raise ValueError(
                f"resolution.mean {self.mean} and std {self.std} leave nothing within the range; "
                f"in their units min_side is -1 and max_side is 1"
            )
        if self.kind != "truncated_normal" and (self.mean, self.std) != (-0.5, 1.0):
            raise ValueError(
                f"resolution.mean and std are of the truncated normal; kind is {self.kind!r}"
            )

    def sides(self, sizes: np.ndarray, u: np.ndarray) -> np.ndarray:
        """[n] sides in pixels of images of `sizes` [n, 2], from uniform numbers [n]."""
        if self.kind == "native":
            native: np.ndarray = np.sqrt(sizes.prod(axis=1, dtype=np.float64))
            return native.clip(self.min_side, self.max_side)
        if self.kind == "truncated_normal":
            low, high = (ndtr((end - self.mean) / self.std) for end in (-1.0, 1.0))
            u = (self.mean + self.std * ndtri(low + u * (high - low)) + 1.0) / 2.0
        sides: np.ndarray = self.min_side + (self.max_side - self.min_side) * u
        return sides


@dataclass(frozen=True)
class TokenDrop:
    """Which share of its patches an image loses in training; at least one patch stays.

    Args:
        kind: "constant"; "beta", a rate for every image from the Beta distribution with mean
            `rate` and standard deviation `std`; or "resolution": it grows linearly with the number
            of patches, from `rate` at the fewest to `largest_rate` at the most, plus a normal
            number of standard deviation `std`, cut off at two of them (NaViT, appendix).
        rate: share of dropped patches.
        std: spread, for beta and resolution.
        largest_rate: see resolution.
        last: all rates change linearly over training, to this share of them in the last pass.

    Raises:
        ValueError: rates outside [0, 1), a spread that Beta cannot have, values nothing reads.
    """

    kind: Literal["constant", "beta", "resolution"] = "constant"
    rate: float = 0.0
    std: float = 0.0
    largest_rate: float | None = None
    last: float = 1.0

    def __post_init__(self) -> None:
        kinds = ("constant", "beta", "resolution")
        if self.kind not in kinds:
            raise ValueError(f"drop.kind is {self.kind!r}; expected {' or '.join(kinds)}")
        for name in ("rate", "largest_rate"):
            value = getattr(self, name)
            if value is not None and not 0.0 <= value < 1.0:
                raise ValueError(f"drop.{name} is {value}; expected within [0, 1)")
        if not 0.0 <= self.last <= 1.0:
            raise ValueError(f"drop.last is {self.last}; expected within [0, 1]")
        if (self.largest_rate is None) == (self.kind == "resolution"):
            raise ValueError(
                f"drop.largest_rate is {self.largest_rate} and kind is {self.kind!r}; it belongs "
                f"to kind resolution, which needs it"
            )
        if self.last != 1.0 and self.rate == 0.0 and not self.largest_rate:
            raise ValueError(f"drop.last is {self.last}, but nothing is dropped; set drop.rate")
        if self.kind == "constant" and self.std != 0:
            raise ValueError(f"drop.std is {self.std}, but a constant rate has none; remove it")
        if self.std < 0:
            raise ValueError(f"drop.std is {self.std}; expected 0 or more")
        if self.kind == "beta" and not 0 < self.std**2 < self.rate * (1 - self.rate):
            raise ValueError(
                f"no Beta distribution has mean {self.rate} and standard deviation {self.std}; "
                f"expected 0 < std < {(self.rate * (1 - self.rate)) ** 0.5:.3f}"
            )

    def rates(self, counts: np.ndarray, u: np.ndarray, progress: float) -> np.ndarray:
        """[n] rates for images of `counts` patches [n], from uniforms [n], at `progress` 0 to 1."""
        rates: np.ndarray = np.full(len(counts), self.rate)
        if self.kind == "beta":
            m = self.rate
            total = m * (1 - m) / self.std**2 - 1
            rates = betaincinv(m * total, (1 - m) * total, u.astype(np.float64))
        elif self.kind == "resolution":
            assert self.largest_rate is not None
            fewest, most = counts.min(), counts.max()
            share = (counts - fewest) / max(1, most - fewest)
            low, high = ndtr(-2.0), ndtr(2.0)
            noise = self.std * ndtri(low + u * (high - low))
            rates = (self.rate + (self.largest_rate - self.rate) * share + noise).clip(0, 1)
        scheduled: np.ndarray = rates * (1.0 + (self.last - 1.0) * progress)
        return scheduled


def grids_of(
    sizes: np.ndarray, sides: np.ndarray, patch_size: int, most: int, max_grid: int | None
) -> np.ndarray:
    """[n, 2] rows and columns of patches of images of `sizes` [n, 2] brought to `sides` [n].

    The aspect is kept as far as whole patches allow; at least one patch, at most `most`, and at
    most `max_grid` along a side.
    """
    sizes = np.maximum(sizes, 1).astype(np.float64)  # (0, 0) is an image that cannot be read
    scale = sides / np.sqrt(sizes.prod(axis=1)) / patch_size
    grids = np.maximum(1, np.round(sizes * scale[:, None]))
    excess = np.sqrt(np.maximum(1.0, grids.prod(axis=1) / most))
    if max_grid is not None:
        excess = np.maximum(excess, grids.max(axis=1) / max_grid)
    shrunk = np.maximum(1, np.floor(grids / excess[:, None] + 1e-9))
    fitting: np.ndarray = np.where((excess > 1.0)[:, None], shrunk, grids)
    longest = most if max_grid is None else min(most, max_grid)  # beside a side of one patch
    grids_within: np.ndarray = np.minimum(fitting, longest).astype(np.int64)
    return grids_within


def pack(lengths: Sequence[int], budget: int, slots: int, buffer: int) -> list[list[int]]:
    """Lay images of `lengths` tokens into rows: best fit over a bounded buffer.

    Every image in turn goes into the open row in which it leaves the least room, or opens one.
    When open rows hold more than `buffer` images the fullest is done. Images stay about in their
    order, so that every part of a pass has large and small ones in their share.

    Returns:
        For every row the numbers of its images, at most `slots`; each image once.

    Raises:
        ValueError: an image that is longer than a row.
    """
    if len(lengths) and max(lengths) > budget:
        raise ValueError(f"an image of {max(lengths)} tokens does not fit a row of {budget}")
    done: list[list[int]] = []
    rooms: list[tuple[int, int]] = []  # (room, number) of open rows, the fullest first
    open_rows: dict[int, list[int]] = {}
    held = 0

    def close(place: int) -> int:
        row = open_rows.pop(rooms.pop(place)[1])
        # Attention on a CPU joins neighbours of one length.
        done.append(sorted(row, key=lengths.__getitem__))
        return len(row)

    for image, length in enumerate(lengths):
        place = bisect_left(rooms, (length, 0))
        room, number = rooms.pop(place) if place < len(rooms) else (budget, image)
        row = open_rows.setdefault(number, [])
        row.append(image)
        held += 1
        place = bisect_left(rooms, (room - length, number))
        rooms.insert(place, (room - length, number))
        if room == length or len(row) == slots:
            held -= close(place)
        while held > buffer:
            held -= close(0)
    while rooms:
        close(0)
    return done


def spread(rows: list[list[int]], multiple: int) -> list[list[int]]:
    """As many rows as a multiple of `multiple`: some are split in two, evenly over the pass.

    So every device gets as many rows, and none is empty unless there are too few images.
    """
    while missing := -len(rows) % multiple:
        several = [i for i, row in enumerate(rows) if len(row) > 1]
        if not several:
            return rows + [[] for _ in range(missing)]
        count = min(missing, len(several))
        split = {several[i * len(several) // count] for i in range(count)}
        halves = ((row[::2], row[1::2]) if i in split else (row,) for i, row in enumerate(rows))
        rows = [part for parts in halves for part in parts]
    return rows


class Layout(NamedTuple):
    """The shape of every batch on one device, and what an image may be cut into.

    num_rows, row_length: tokens of a batch are num_rows * row_length
    slots:        images a row has room for
    patch_size:   pixels
    num_prefix:   tokens of every image before its patches
    max_grid:     most patches along a side, None for any number
    """

    num_rows: int
    row_length: int
    slots: int
    patch_size: int
    num_prefix: int
    max_grid: int | None


class Pass(NamedTuple):
    """Every image once: where it goes and what becomes of it.

    items: [n] index in the source
    keys:  [n] what all random draws for it are a function of
    grids: [n, 2] rows and columns of patches
    kept:  [n] patches that are not dropped
    rows:  for every row the places of its images in the arrays above
    """

    items: np.ndarray
    keys: np.ndarray
    grids: np.ndarray
    kept: np.ndarray
    rows: list[list[int]]


def tokens_of(
    sizes: np.ndarray,
    keys: np.ndarray,
    layout: Layout,
    resolution: Resolution,
    drop: TokenDrop,
    progress: float,
) -> tuple[np.ndarray, np.ndarray]:
    """Grids [n, 2] and kept patches [n] of images with these sizes [n, 2] and keys [n]."""
    draws = torch.from_numpy(keys)
    u = [uniforms(draws, stream, 1)[:, 0].double().numpy() for stream in (SIDE, DROP)]
    most = layout.row_length - layout.num_prefix
    sides = resolution.sides(sizes, u[0])
    grids = grids_of(sizes, sides, layout.patch_size, most, layout.max_grid)
    counts = grids.prod(axis=1)
    rates = drop.rates(counts, u[1], progress)
    return grids, np.maximum(1, np.floor(counts * (1.0 - rates) + 1e-9)).astype(np.int64)


def plan(
    sizes: np.ndarray,
    seed: int,
    number: int,
    layout: Layout,
    resolution: Resolution,
    drop: TokenDrop = TokenDrop(),
    progress: float = 0.0,
    buffer: int = 256,
    multiple: int = 1,
    groups: Groups | None = None,
) -> Pass:
    """Pass `number` over images of `sizes` [n, 2], in a number of rows divisible by `multiple`.

    With `groups` in an order that respects how images lie in files.

    Takes about five seconds for the 1.28 million images of ImageNet.
    """
    if groups is None:
        items = epoch_order(len(sizes), seed, number)
    else:
        items = grouped_order(groups, seed, number)
    keys = fold_each(seed, number, items=items)
    grids, kept = tokens_of(sizes[items], keys, layout, resolution, drop, progress)
    lengths = (kept + layout.num_prefix).tolist()
    rows = spread(pack(lengths, layout.row_length, layout.slots, buffer), multiple)
    return Pass(items, keys, grids, kept, rows)


def plan_evaluation(
    sizes: np.ndarray, layout: Layout, resolution: Resolution, buffer: int = 256
) -> Pass:
    """Every image once in the order of the source, nothing dropped; its key is its index."""
    items = np.arange(len(sizes))
    grids, kept = tokens_of(sizes, items, layout, resolution, TokenDrop(), 0.0)
    lengths = (kept + layout.num_prefix).tolist()
    return Pass(items, items, grids, kept, pack(lengths, layout.row_length, layout.slots, buffer))
