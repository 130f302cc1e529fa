"""Images to packs, in a worker: cut into patches that lie in rows, shapes static."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Int, UInt8
from torch import Tensor
from torch.utils.data import Dataset

from datamodules.batch import PackedBatch, PackedImages
from datamodules.geometry import Augment, Box, Interpolation, center_crop, crop_and_resize, draws
from datamodules.packing import Layout
from datamodules.rows import Request, Row
from datamodules.sources import Source
from datamodules.unreadable import read_example


@dataclass(frozen=True)
class Cut:
    """An image to patches: an aspect-keeping random crop, a flip, resizing, RandAugment.

    What is not of the aspect it was planned with (it stands in for an unreadable image, or the
    file has changed) is cropped to it first.
    """

    patch_size: int
    interpolation: Interpolation
    crop_scale: tuple[float, float] = (1.0, 1.0)
    flip: float = 0.0
    augment: Augment | None = None

    def __call__(
        self, image: np.ndarray, request: Request
    ) -> tuple[UInt8[Tensor, "kept e"], Int[Tensor, "kept 2"]]:
        """Patches [kept, c * patch * patch] and their rows and columns, in reading order."""
        rng, side = draws(request.key), self.patch_size
        image = of_aspect(image, request.grid)
        height, width = image.shape[:2]
        scale = rng.uniform(*self.crop_scale) ** 0.5
        h, w = max(1, round(height * scale)), max(1, round(width * scale))
        top, left = int(rng.integers(0, height - h + 1)), int(rng.integers(0, width - w + 1))
        rows, columns = request.grid
        size = (rows * side, columns * side)
        pixels = crop_and_resize(image, Box(top, left, h, w), size, self.interpolation)
        if rng.random() < self.flip:
            pixels = pixels.flip(-1)
        if self.augment is not None:
            array = self.augment(np.ascontiguousarray(pixels.permute(1, 2, 0).numpy()), request.key)
            pixels = torch.from_numpy(array.copy()).permute(2, 0, 1)
        patches = pixels.reshape(-1, rows, side, columns, side).permute(1, 3, 0, 2, 4)
        patches = patches.reshape(rows * columns, -1)
        chosen = torch.arange(rows * columns)
        if request.kept < len(chosen):
            chosen = torch.from_numpy(np.sort(rng.permutation(len(chosen))[: request.kept]))
        places = torch.stack((chosen // columns, chosen % columns), dim=1)
        return patches[chosen], places


def of_aspect(image: np.ndarray, grid: tuple[int, int]) -> np.ndarray:
    """The centre of an image with the aspect of a grid, where whole patches do not explain it."""
    (rows, columns), (height, width) = grid, image.shape[:2]
    if (rows - 0.5) / (columns + 1) <= height / width <= (rows + 1) / (columns - 0.5):
        return image
    box = center_crop(height, width, grid, 1.0)
    return image[box.top : box.top + box.height, box.left : box.left + box.width]


class PackedDataset(Dataset[PackedBatch]):
    """Turns a `Row` into a `PackedBatch` of one row."""

    def __init__(self, source: Source, cut: Cut, layout: Layout) -> None:
        self.source, self.cut, self.layout = source, cut, layout

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, row: Row) -> PackedBatch:
        layout, slots = self.layout, self.layout.slots
        width = self.source.channels * layout.patch_size**2
        patches = torch.zeros(1, layout.row_length, width, dtype=torch.uint8)
        positions = torch.full((1, layout.row_length, 2), -1)
        segments = torch.full((1, layout.row_length), -1)
        grids = torch.ones(slots, 2, dtype=torch.int64)
        lengths = torch.zeros(slots, dtype=torch.int64)
        labels, indices = torch.zeros(slots, dtype=torch.int64), torch.full((slots,), -1)
        keys, is_replaced = torch.zeros(slots, dtype=torch.int64), torch.zeros(slots).bool()
        end = 0
        for slot, request in enumerate(row.requests):
            example, is_replaced[slot] = read_example(self.source, request.item)
            start = end + layout.num_prefix
            end = start + request.kept
            patches[0, start:end], positions[0, start:end] = self.cut(example.image, request)
            positions[0, start - layout.num_prefix : start, 1] = torch.arange(layout.num_prefix)
            segments[0, start - layout.num_prefix : end] = slot
            grids[slot] = torch.tensor(request.grid)
            lengths[slot] = layout.num_prefix + request.kept
            labels[slot], indices[slot], keys[slot] = example.label, request.item, request.key
        ends = torch.cat((lengths.cumsum(0), torch.tensor([layout.row_length])))
        images = PackedImages(patches, positions, segments, grids, ends, layout.num_prefix)
        is_valid = torch.arange(slots) < len(row.requests)
        divisor = torch.tensor(row.divisor, dtype=torch.float32)
        count = len(row.requests)
        return PackedBatch(
            images, labels, indices, keys, is_valid, is_replaced, divisor, count, end
        )


def collate(rows: Sequence[PackedBatch]) -> PackedBatch:
    """Put rows below each other."""
    images = [row.images for row in rows]
    length = images[0].segments.shape[1]
    ends = [image.offsets + i * length for i, image in enumerate(images)]
    packed = PackedImages(
        patches=torch.cat([image.patches for image in images]),
        positions=torch.cat([image.positions for image in images]),
        segments=torch.cat([image.segments for image in images]),
        grids=torch.cat([image.grids for image in images]),
        offsets=torch.cat((torch.zeros(1, dtype=torch.int64), *ends)).int(),
        num_prefix=images[0].num_prefix,
    )
    columns = zip(*(row[1:6] for row in rows), strict=True)
    labels, indices, keys, is_valid, is_replaced = (torch.cat(column) for column in columns)
    return PackedBatch(
        *(packed, labels, indices, keys, is_valid, is_replaced, rows[0].divisor),
        num_images=sum(row.num_images for row in rows),
        num_tokens=sum(row.num_tokens for row in rows),
    )
