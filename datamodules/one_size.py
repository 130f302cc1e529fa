"""What data modules over images of one size share: that size, the order of training, evaluation."""

from collections.abc import Sequence
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset

from datamodules.augment import normalize
from datamodules.batch import ImageBatch
from datamodules.geometry import EvalGeometry, Interpolation, TrainGeometry
from datamodules.module import Needs, SourceDataModule
from datamodules.placed import limited
from datamodules.sampling import EvalBatches, Sample, TrainBatches
from datamodules.sources import Source
from datamodules.unreadable import read_example

Geometry = TrainGeometry | EvalGeometry


def height_and_width(size: int | tuple[int, int]) -> tuple[int, int]:
    return (size, size) if isinstance(size, int) else size


class ImageDataset(Dataset[ImageBatch]):
    """Turns a `Sample` into an `ImageBatch` of one, without its batch axis.

    An unreadable image is replaced by another one, the same every time, and flagged.
    """

    def __init__(self, source: Source, geometry: Geometry) -> None:
        self.source, self.geometry = source, geometry

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, sample: Sample) -> ImageBatch:
        example, is_replaced = read_example(self.source, sample.item)
        return ImageBatch(
            images=self.geometry(example.image, sample.key),
            labels=torch.tensor(example.label),
            indices=torch.tensor(sample.item),
            keys=torch.tensor(sample.key),
            is_valid=torch.tensor(sample.is_valid),
            is_replaced=torch.tensor(is_replaced),
        )


def collate(samples: Sequence[ImageBatch]) -> ImageBatch:
    """Stack what `ImageDataset` gives, field by field; nothing is mixed yet."""
    columns = [torch.stack(column) for column in zip(*(s[:6] for s in samples), strict=True)]
    return ImageBatch(*columns)  # type: ignore[arg-type]  # mypy cannot count the columns


class OneSizeDataModule(SourceDataModule):
    """Batches of a fixed number of images, cropped to one size.

    Args:
        source, root, source_args, channels, num_workers, mean, std, max_bad, eval_side: see
            `SourceDataModule`.
        image_size: side in pixels, or (height, width); None for what the backbone is made for.
        batch_size: images in a batch of one device.
        crop_ratio: aspect (width / height) of random crops, log-uniform.
        flip: probability of a horizontal flip.
        interpolation: "bicubic" or "bilinear", antialiased.
        eval_crop: share of the image's shorter side kept in evaluation.

    Raises:
        ValueError: values out of range.
    """

    def __init__(
        self,
        source: str,
        root: str | None,
        source_args: dict[str, Any] | None,
        channels: int,
        num_workers: int,
        mean: tuple[float, ...],
        std: tuple[float, ...],
        max_bad: float,
        eval_side: int | None,
        image_size: int | tuple[int, int] | None,
        batch_size: int,
        crop_ratio: tuple[float, float],
        flip: float,
        interpolation: Interpolation,
        eval_crop: float,
    ) -> None:
        super().__init__(
            *(source, root, source_args, channels, num_workers, mean, std, max_bad, eval_side)
        )
        self.image_size = None if image_size is None else height_and_width(image_size)
        self.batch_size, self.interpolation = batch_size, interpolation
        self.crop_ratio, self.flip, self.eval_crop = crop_ratio, flip, eval_crop
        if batch_size < 1:
            raise ValueError(f"batch_size is {batch_size}; expected at least 1")
        if not 0.0 < crop_ratio[0] <= crop_ratio[1]:
            raise ValueError(f"crop_ratio is {crop_ratio}; expected 0 < low <= high")
        self.check_shares("flip")
        if not 0.0 < eval_crop <= 1.0:
            raise ValueError(f"eval_crop is {eval_crop}; expected within (0, 1]")

    def check_scales(self, *names: str) -> None:
        for name in names:
            low, high = getattr(self, name)
            if not 0.0 < low <= high <= 1.0:
                raise ValueError(f"{name} is {(low, high)}; expected 0 < low <= high <= 1")

    def fit_to(self, needs: Needs) -> None:
        """Take the backbone's image size where none was given, and refuse another one.

        The backbone would take it, and resample its positions at every step.
        """
        super().fit_to(needs)
        made_for = needs.image_size
        if self.image_size is None:
            if made_for is None:
                raise ValueError(
                    "data.init_args.image_size is null, and the backbone takes any size; set it"
                )
            self.image_size = made_for
        elif made_for is not None and self.image_size != made_for:
            height, width = self.image_size
            raise ValueError(
                f"data.init_args.image_size is {height}x{width}, but the backbone is made for "
                f"{made_for[0]}x{made_for[1]}; to train at {height}x{width} set "
                f"model.init_args.backbone.init_args.image_size to "
                f"{height if height == width else [height, width]} (weights made for another size "
                f"are resampled to it)"
            )

    def known_size(self) -> tuple[int, int]:
        """(height, width), which `fit_to` fills in where it was left open."""
        if self.image_size is None:
            raise ValueError("data.image_size is null, and no method said what it needs; set it")
        return self.image_size

    def train_batches(self, repeats: int = 1) -> TrainBatches:
        """The training batches of this rank, going on where the trainer's batch counter stands."""
        rank, world_size = self.place()
        batches_done, limit = self.progress()
        size = (len(self.train_source), self.batch_size, self.seed, rank, world_size)
        length = len(TrainBatches(*size, repeats=repeats))
        per_epoch = limited(length, limit)
        self.check_resumed(
            {
                "images": len(self.train_source),
                "images in a global batch": self.batch_size * world_size,
                "batches in an epoch": per_epoch,
                "repeats": repeats,
            }
        )
        return TrainBatches(*size, batches_done, per_epoch, repeats)

    def eval_loader(self, source: Source) -> DataLoader[ImageBatch]:
        """The images of a source that are this rank's, each once, cropped as in evaluation."""
        side = self.eval_side
        size = self.known_size() if side is None else (side, side)
        if self.needs is not None:
            patch, prefix = self.needs.patch_size, self.needs.num_prefix_tokens
            self.eval_tokens = prefix + (size[0] // patch) * (size[1] // patch)
        sampler = EvalBatches(len(source), self.batch_size, *self.place())
        geometry = EvalGeometry(size, self.eval_crop, self.interpolation)
        return self.loader(ImageDataset(source, geometry), sampler, collate)

    def normalized(self, batch: ImageBatch) -> ImageBatch:
        return batch._replace(images=normalize(batch.images, self.mean, self.std))
