"""What happens to an image happens to the map of its labels.

A label map has for every cell of a coarse grid over the image the k highest scores (logits) of a
teacher and their class ids; all other classes share one lower score, `rest`. Everything here works
on these sparse maps. Order and operations are those of "All Tokens Matter" (Jiang et al. 2021, its
published transforms): flip, RandAugment of the whole image, random resized crop.

    token scores = ROI-align(map, box of the crop), one bin a token
    image scores = ROI-align(map, box of the crop), one bin
    label        = softmax over all classes, later, on the device

The published code hands the box to ROI-align transposed (top, left, bottom, right in the place of
left, top, right, bottom), so that its labels belong to another part of the image wherever
the crop does not lie on the diagonal; `transposed_crop` does the same, to compare with it.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Float, UInt8
from torch import Tensor

from datamodules.batch import SparseScores
from datamodules.geometry import (
    Array,
    Box,
    Interpolation,
    crop_and_resize,
    draws,
    random_resized_crop,
    timm_rand_augment,
)

Move = tuple[str, tuple[Any, ...]]  # name of an operation of timm's RandAugment, its arguments
# Where torchvision rounds bins of a whole number of cells, and we do not.
ROUNDING = 1e-6


class LabelMap(NamedTuple):
    """A teacher's view of one image, cell by cell.

    scores: float32 [rows, columns, k] logits of the k best classes, in any order
    ids:    int32 [rows, columns, k] their classes, each once in a cell
    rest:   float32 [rows, columns] the logit of each of the other classes
    """

    scores: Array
    ids: Array
    rest: Array


def flipped(labels: LabelMap) -> LabelMap:
    """Mirrored left and right."""
    return LabelMap(*(part[:, ::-1] for part in labels))


class RandAugment:
    """timm's RandAugment, which also tells what it did. A function of an image and a key.

    Raises:
        ValueError: a recipe that timm does not understand.
    """

    def __init__(self, recipe: str, fill: tuple[int, ...]) -> None:
        self.moves: list[Move] = []
        self.apply = timm_rand_augment(recipe, fill, self.note)

    def note(self, name: str, operation: Callable[..., Any]) -> Callable[..., Any]:
        def noted(image: Any, *arguments: Any, **options: Any) -> Any:
            if name in PATHS:
                self.moves.append((name, arguments))
            return operation(image, *arguments, **options)

        return noted

    def __call__(self, image: Array, key: int) -> tuple[Array, list[Move]]:
        self.moves.clear()
        changed = self.apply(image, key)
        return changed, list(self.moves)


def turn(degrees: float, height: int, width: int) -> Array:
    """Pillow's: counter-clockwise about the centre."""
    cos, sin = math.cos(math.radians(degrees)), math.sin(math.radians(degrees))
    x, y = width / 2, height / 2
    return np.array([[cos, -sin, x - cos * x + sin * y], [sin, cos, y - sin * x - cos * y]])


# From a place (x, y) in the picture that an operation gives to the one that it was taken from.
PATHS: dict[str, Callable[[float, int, int], Array]] = {
    "Rotate": turn,
    "ShearX": lambda by, height, width: np.array([[1, by, 0], [0, 1, 0]]),
    "ShearY": lambda by, height, width: np.array([[1, 0, 0], [by, 1, 0]]),
    "TranslateX": lambda by, height, width: np.array([[1, 0, by], [0, 1, 0]]),
    "TranslateY": lambda by, height, width: np.array([[1, 0, 0], [0, 1, by]]),
    "TranslateXRel": lambda by, height, width: np.array([[1, 0, by * width], [0, 1, 0]]),
    "TranslateYRel": lambda by, height, width: np.array([[1, 0, 0], [0, 1, by * height]]),
}


def moved(labels: LabelMap, moves: list[Move], height: int, width: int) -> LabelMap:
    """The map of an image of so many pixels after geometric operations on it.

    Every cell takes the nearest one to where its centre came from, through all operations at
    once; what came from outside the image, at any of them, has equal scores for all classes.
    """
    if not moves:
        return labels
    rows, columns = labels.rest.shape
    y, x = np.meshgrid(
        (np.arange(rows) + 0.5) * (height / rows),
        (np.arange(columns) + 0.5) * (width / columns),
        indexing="ij",
    )
    places, is_inside = np.stack([x, y, np.ones_like(x)]), np.ones(x.shape, dtype=bool)
    for name, arguments in reversed(moves):
        places[:2] = np.einsum("ij,jyx->iyx", PATHS[name](arguments[0], height, width), places)
        is_inside &= (places[0] >= 0) & (places[0] < width)
        is_inside &= (places[1] >= 0) & (places[1] < height)
    row = (places[1] * (rows / height)).astype(np.int64).clip(0, rows - 1)
    column = (places[0] * (columns / width)).astype(np.int64).clip(0, columns - 1)
    return LabelMap(
        scores=np.where(is_inside[..., None], labels.scores[row, column], 0.0),
        ids=labels.ids[row, column],
        rest=np.where(is_inside, labels.rest[row, column], 0.0),
    )


def axis_shares(
    low: float, high: float, cells: int, bins: int, published: bool = False
) -> Float[Array, "bins cells"]:
    """ROI-align along one axis: the share of every cell in the mean of each bin.

    The box [low, high] is in parts of the axis. A bin is the mean of so many linearly interpolated
    points, evenly spread, that none stands for more than one cell; cell i has its value at
    i + 1/2 (half-pixel aligned).

    Args:
        published: a box has at least one cell, from its low end on, and float32 decides whether a
            bin of a whole number of cells has one point more.
    """
    first: float
    if published:
        first, last = (np.float32(at) * np.float32(cells) - np.float32(0.5) for at in (low, high))
        size = float(max(last - first, np.float32(1)) / np.float32(bins))
        points = math.ceil(size)
    else:
        first, size = low * cells - 0.5, (high - low) * cells / bins
        points = max(1, math.ceil(size - ROUNDING))
    places = first + (np.arange(bins)[:, None] + (np.arange(points) + 0.5) / points) * size
    is_near = (places >= -1) & (places <= cells)
    places = places.clip(0, cells - 1)
    left = places.astype(np.int64)
    right, part = np.minimum(left + 1, cells - 1), places - left
    shares, bin_of = np.zeros((bins, cells)), np.broadcast_to(np.arange(bins)[:, None], left.shape)
    np.add.at(shares, (bin_of, left), (1 - part) * is_near / points)
    np.add.at(shares, (bin_of, right), part * is_near / points)
    return shares


def reach(cells: int, bins: int) -> int:
    """Neighbouring cells that one bin of a box within the map has a share of, at most."""
    size = cells / bins
    points = math.ceil(size + ROUNDING)
    return min(cells, math.ceil((points - 1) / points * size + ROUNDING) + 2)


class Pooled(NamedTuple):
    """Where the crop of an image lies on its map.

    down, across: shares of rows and columns of the map in those of the tokens
    """

    down: Float[Array, "g rows"]
    across: Float[Array, "g columns"]


def pool(
    labels: LabelMap, box: Box, height: int, width: int, grid: tuple[int, int], transposed: bool
) -> Pooled:
    """Bins of a grid over the crop `box` of an image of so many pixels."""
    rows, columns = labels.rest.shape
    down = box.top / height, (box.top + box.height) / height
    across = box.left / width, (box.left + box.width) / width
    if transposed:
        down, across = across, down
    return Pooled(
        axis_shares(*down, rows, grid[0], published=transposed),
        axis_shares(*across, columns, grid[1], published=transposed),
    )


def windows(shares: Float[Array, "bins cells"], length: int) -> tuple[Array, Array]:
    """The cells that each bin has a share of, `length` neighbours of them, and the shares.

    Where there are fewer cells, the last one fills up, without a share.
    """
    cells = shares.shape[1]
    shares = np.pad(shares, ((0, 0), (0, max(0, length - cells))))
    first = (shares > 0).argmax(axis=1).clip(0, shares.shape[1] - length)
    index = first[:, None] + np.arange(length)
    return index.clip(max=cells - 1), np.take_along_axis(shares, index, axis=1)


def token_scores(
    labels: LabelMap, where: Pooled, lengths: tuple[int, int], num_classes: int
) -> SparseScores:
    """The scores of every token, tokens row by row.

    Args:
        lengths: rows and columns of cells that are looked at for one token; the same for all
            images, so that shapes are.
    """
    rows, down = windows(where.down, lengths[0])
    columns, across = windows(where.across, lengths[1])
    cell = rows[:, None, :, None], columns[None, :, None, :]
    shares = down[:, None, :, None] * across[None, :, None, :]
    above = (labels.scores - labels.rest[..., None])[cell] * shares[..., None]
    tokens = len(rows) * len(columns)
    ids, values = labels.ids[cell].reshape(tokens, -1), above.reshape(tokens, -1)
    ids, values = gathered_by_class(ids, values, num_classes)
    return SparseScores(torch.from_numpy(ids), torch.from_numpy(values))


def gathered_by_class(ids: Array, values: Array, num_classes: int) -> tuple[Array, Array]:
    """Each row sorted by class, the sum of a class at its first place, zeros at the others.

    A row that has all classes, and each below 0, is raised until the best is 0: the same softmax,
    and nothing need be told from a rest that no class is left of.
    """
    order = np.argsort(ids, axis=1, kind="stable")
    ids = np.take_along_axis(ids, order, axis=1)
    values = np.take_along_axis(values, order, axis=1)
    is_first = np.ones(ids.shape, dtype=bool)
    is_first[:, 1:] = ids[:, 1:] != ids[:, :-1]
    starts = np.flatnonzero(is_first)
    sums = np.zeros(ids.size, dtype=np.float32)
    sums[starts] = np.add.reduceat(values.reshape(-1), starts)
    values = sums.reshape(ids.shape)
    has_all = is_first.sum(axis=1, keepdims=True) == num_classes
    best = np.where(is_first, values, -np.inf).max(axis=1, keepdims=True)
    return ids.astype(np.int32), np.where(has_all & is_first & (best < 0), values - best, values)


def image_scores(labels: LabelMap, where: Pooled, num_classes: int) -> Float[Tensor, " k"]:
    """The scores of all classes for the whole crop, whose bins are one, above those of the rest."""
    shares = where.down[0][:, None] * where.across[0][None, :]
    above = (labels.scores - labels.rest[..., None]) * shares[..., None]
    sums = np.bincount(labels.ids.reshape(-1), above.reshape(-1), minlength=num_classes)
    return torch.from_numpy(sums.astype(np.float32))


@dataclass(frozen=True)
class LabelGeometry:
    """A flip with probability `flip`, RandAugment, a random resized crop; image and map alike.

    grid:    rows and columns of tokens; None where only the crop as a whole has a label
    lengths: see `token_scores`
    """

    size: tuple[int, int]
    scale: tuple[float, float]
    ratio: tuple[float, float]
    flip: float
    interpolation: Interpolation
    augment: RandAugment | None
    grid: tuple[int, int] | None
    lengths: tuple[int, int]
    num_classes: int
    transposed: bool

    def __call__(
        self, image: Array, labels: LabelMap, key: int
    ) -> tuple[UInt8[Tensor, "c height width"], SparseScores | None, Float[Tensor, " k"]]:
        """Pixels, scores of the tokens, scores of the crop. Neither argument is changed."""
        rng = draws(key)
        height, width = image.shape[:2]
        if rng.random() < self.flip:
            image, labels = image[:, ::-1], flipped(labels)
        if self.augment is not None:
            image, moves = self.augment(np.ascontiguousarray(image), key)
            labels = moved(labels, moves, height, width)
        box = random_resized_crop(height, width, self.scale, self.ratio, rng)
        pixels = crop_and_resize(image, box, self.size, self.interpolation)
        tokens = None
        if self.grid is not None:
            where = pool(labels, box, height, width, self.grid, self.transposed)
            tokens = token_scores(labels, where, self.lengths, self.num_classes)
        whole = pool(labels, box, height, width, (1, 1), self.transposed)
        return pixels, tokens, image_scores(labels, whole, self.num_classes)
