"""Packs made the slow and plain way, from images that are there: an oracle for what makes packs."""

from collections.abc import Sequence

import torch
from torch import Tensor

from datamodules.batch import PackedImages

Kept = Sequence[int] | None


def cut(image: Tensor, patch: int) -> Tensor:
    """Patches of [c, height, width] row by row, each in the order (channel, row, column)."""
    _, height, width = image.shape
    return torch.stack(
        [
            image[:, top : top + patch, left : left + patch].reshape(-1)
            for top in range(0, height, patch)
            for left in range(0, width, patch)
        ]
    )


def pack(
    rows: Sequence[Sequence[Tensor]],
    patch: int,
    length: int,
    slots: int,
    num_prefix: int = 0,
    kept: Sequence[Sequence[Kept]] | None = None,
    padding: float = 7.0,
) -> PackedImages:
    """Lay the images of each row into `length` tokens.

    `kept` holds the indices of the patches that were not dropped, None for all. Patches of prefix
    tokens and padding hold `padding`, a value that would be seen if anything read it.
    """
    channels = next(image.shape[0] for row in rows for image in row) if any(rows) else 3
    shape = (len(rows), length)
    patches = torch.full((*shape, channels * patch * patch), padding)
    positions = torch.full((*shape, 2), -1)
    segments = torch.full(shape, -1)
    grids = torch.ones(len(rows) * slots, 2, dtype=torch.long)
    offsets = [0]
    for r, row in enumerate(rows):
        assert len(row) <= slots
        at = 0
        for slot, image in enumerate(row):
            grid = (image.shape[1] // patch, image.shape[2] // patch)
            grids[r * slots + slot] = torch.tensor(grid)
            start = at
            for i in range(num_prefix):
                positions[r, at] = torch.tensor([-1, i])
                at += 1
            own = kept[r][slot] if kept is not None else None
            for index in range(grid[0] * grid[1]) if own is None else own:
                patches[r, at] = cut(image, patch)[index]
                positions[r, at] = torch.tensor([index // grid[1], index % grid[1]])
                at += 1
            segments[r, start:at] = slot
            offsets.append(r * length + at)
        assert at <= length
        offsets += [r * length + at] * (slots - len(row)) + [(r + 1) * length]
    ends = torch.tensor(offsets, dtype=torch.int32)
    return PackedImages(patches, positions, segments, grids, ends, num_prefix)


def images(sizes: Sequence[tuple[int, int]], channels: int = 3, seed: int = 0) -> list[Tensor]:
    """Random images of such (height, width)."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(channels, *size, generator=generator) for size in sizes]
