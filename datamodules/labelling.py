"""Whole images for a teacher that labels them, in the order of the shards that they go to."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Int, UInt8
from lightning.pytorch import LightningDataModule
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from datamodules.geometry import Box, Interpolation, crop_and_resize
from datamodules.label_shards import About, is_whole, stamp_of
from datamodules.sources import BadImageError, Source


class LabellingBatch(NamedTuple):
    """Images of one shard.

    images:      [b, c, height, width] uint8, each stretched to one size as a whole
    indices:     [b] index in the source
    is_readable: [b] False for images that could not be read; they are black
    stamps:      [b] see `label_shards.stamp_of`, as it was before the image was read
    """

    images: UInt8[Tensor, "b c height width"]
    indices: Int[Tensor, " b"]
    is_readable: Bool[Tensor, " b"]
    stamps: Int[Tensor, " b"]


class WholeImages(Dataset[LabellingBatch]):
    """An image of a source as a `LabellingBatch` of one, without its batch axis."""

    def __init__(
        self, source: Source, size: tuple[int, int], interpolation: Interpolation, shard_size: int
    ) -> None:
        self.source, self.size, self.interpolation = source, size, interpolation
        self.shard_size = shard_size

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, index: int) -> LabellingBatch:
        stamp = stamp_of(self.source, index, is_first=index % self.shard_size == 0)
        try:
            image, is_readable = self.source[index].image, True
        except BadImageError:
            image, is_readable = np.zeros((*self.size, self.source.channels), np.uint8), False
        box = Box(0, 0, *image.shape[:2])
        pixels = crop_and_resize(image, box, self.size, self.interpolation)
        return LabellingBatch(pixels, *map(torch.tensor, (index, is_readable, stamp)))


def collate(samples: Sequence[LabellingBatch]) -> LabellingBatch:
    return LabellingBatch(*(torch.stack(column) for column in zip(*samples, strict=True)))


class ShardBatches(Sampler[list[int]]):
    """The batches of some shards; no batch has images of two, so a shard is always made alike."""

    def __init__(
        self, length: int, numbers: Sequence[int], shard_size: int, batch_size: int
    ) -> None:
        self.batches = [
            list(range(start, min(start + batch_size, end)))
            for number in numbers
            for end in [min((number + 1) * shard_size, length)]
            for start in range(number * shard_size, end, batch_size)
        ]

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self) -> Iterator[list[int]]:
        return iter(self.batches)


class LabellingDataModule(LightningDataModule):
    """The images of a source whose maps are not there yet, dealt to devices shard by shard.

    Args:
        source, root: the images.
        directory, about: where maps are, and what they are like.
        size: (height, width) that every image is stretched to.
        interpolation: "bicubic" or "bilinear", antialiased.
        batch_size: images in a batch of one device.
        shard_size: images in a shard.
        num_workers: processes that decode.
    """

    def __init__(
        self,
        source: Source,
        root: str | None,
        directory: Path,
        about: About,
        size: tuple[int, int],
        interpolation: Interpolation,
        batch_size: int,
        shard_size: int,
        num_workers: int,
    ) -> None:
        super().__init__()
        for name, value in (("batch_size", batch_size), ("shard_size", shard_size)):
            if value < 1:
                raise ValueError(f"{name} is {value}; expected at least 1")
        self.images, self.root, self.directory, self.about = source, root, directory, about
        self.size, self.interpolation = size, interpolation
        self.batch_size, self.shard_size, self.num_workers = batch_size, shard_size, num_workers
        how = (directory, about, source, root)
        rows = map(self.rows, range(self.num_shards()))
        self.missing = [i for i, images in enumerate(rows) if not is_whole(i, images, *how)]
        # Fewer shards may be missing than there are devices.
        self.allow_zero_length_dataloader_with_multiple_devices = True

    def num_shards(self) -> int:
        return -(-len(self.images) // self.shard_size)

    def rows(self, number: int) -> range:
        """The images of a shard."""
        start = number * self.shard_size
        return range(start, min(start + self.shard_size, len(self.images)))

    def predict_dataloader(self) -> DataLoader[LabellingBatch]:
        trainer = self.trainer
        rank, world = (0, 1) if trainer is None else (trainer.global_rank, trainer.world_size)
        batches = ShardBatches(
            len(self.images), self.missing[rank::world], self.shard_size, self.batch_size
        )
        return DataLoader(
            WholeImages(self.images, self.size, self.interpolation, self.shard_size),
            batch_sampler=batches,
            num_workers=self.num_workers,
            collate_fn=collate,
            pin_memory=torch.cuda.is_available(),
        )
