"""Labelled images: a source, geometry in workers, augmentation on the device."""

from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch.utils.data import DataLoader, Dataset

from datamodules.augment import Mixing, erase, normalize
from datamodules.batch import ImageBatch
from datamodules.geometry import EvalGeometry, Interpolation, TrainGeometry
from datamodules.module import IMAGENET_MEAN, IMAGENET_STD, Needs, SourceDataModule, limited
from datamodules.photometric import three_augment
from datamodules.sampling import EvalBatches, Sample, TrainBatches
from datamodules.sources import Source
from datamodules.unreadable import read_example

Geometry = TrainGeometry | EvalGeometry


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


class ImageDataModule(SourceDataModule):
    """Batches of labelled images from any source.

    Args:
        source: "digits" or "shapes" (embedded), "folder", or "torchvision:NAME".
        root: directory (or list file) of the source; the embedded ones have none.
        source_args: further arguments of the source.
        channels: 1 or 3 channels of the images.
        image_size: side in pixels of what the network sees, or (height, width); null for what
            the method's backbone is made for.
        batch_size: images in a batch of one device.
        repeats: copies of each image in an epoch, each augmented differently; an epoch stays as
            long and holds that many times fewer images (DeiT: 3).
        num_workers: processes that decode and crop; 0 does it in the training process. It
            changes nothing but speed.
        crop_scale: area share of the random training crop.
        crop_ratio: its aspect (width / height), log-uniform.
        flip: probability of a horizontal flip.
        interpolation: "bicubic" or "bilinear", antialiased.
        eval_crop: share of the image's shorter side kept in evaluation.
        eval_side: side in pixels in evaluation, where it is not that of training (FixRes, Touvron
            et al. 2019); null for `image_size`.
        mean: what is subtracted from images in [0, 1], a number a channel.
        std: what they are then divided by.
        rand_augment: timm's recipe, such as "rand-m9-mstd0.5-inc1", or null.
        three_augment: DeiT III's 3-Augment, on the device before normalisation, and unlike the
            published one not rounded to 8 bits; not together with rand_augment.
        erasing: probability of erasing one rectangle of an image.
        mixup: alpha of Mixup, 0 for none.
        cutmix: alpha of CutMix, 0 for none.
        mix_probability: share of pairs that Mixup and CutMix are applied to.
        max_bad: the run stops when more than this share of a split is unreadable.

    Raises:
        ValueError: values out of range, an empty source, means that do not match the channels.
    """

    def __init__(
        self,
        source: str = "digits",
        root: str | None = None,
        source_args: dict[str, Any] | None = None,
        channels: Literal[1, 3] = 3,
        image_size: int | tuple[int, int] | None = None,
        batch_size: int = 64,
        repeats: int = 1,
        num_workers: int = 2,
        crop_scale: tuple[float, float] = (0.08, 1.0),
        crop_ratio: tuple[float, float] = (3 / 4, 4 / 3),
        flip: float = 0.5,
        interpolation: Interpolation = "bicubic",
        eval_crop: float = 0.875,
        eval_side: int | None = None,
        mean: tuple[float, ...] = IMAGENET_MEAN,
        std: tuple[float, ...] = IMAGENET_STD,
        rand_augment: str | None = None,
        three_augment: bool = False,
        erasing: float = 0.0,
        mixup: float = 0.0,
        cutmix: float = 0.0,
        mix_probability: float = 1.0,
        max_bad: float = 0.01,
    ) -> None:
        super().__init__(
            *(source, root, source_args, channels, num_workers, mean, std, max_bad, eval_side)
        )
        self.batch_size = batch_size
        self.image_size = (image_size, image_size) if isinstance(image_size, int) else image_size
        self.crop_scale, self.crop_ratio, self.flip = crop_scale, crop_ratio, flip
        self.interpolation, self.eval_crop = interpolation, eval_crop
        self.erasing, self.repeats, self.three_augment = erasing, repeats, three_augment
        self.mixing = Mixing(mixup, cutmix, mix_probability)
        self.check_arguments()
        if rand_augment is not None and three_augment:
            raise ValueError(
                f"rand_augment {rand_augment!r} and three_augment are both on; recipes use "
                f"one or the other: set rand_augment to null or three_augment to false"
            )
        self.rand_augment = self.make_rand_augment(rand_augment)

    def check_arguments(self) -> None:
        if self.batch_size < 1 or (self.mixing and self.batch_size % 2):
            raise ValueError(
                f"batch_size is {self.batch_size}; expected at least 1, and an even number "
                f"for mixup or cutmix, which mix pairs"
            )
        if self.repeats < 1:
            raise ValueError(f"repeats is {self.repeats}; expected at least 1")
        if self.three_augment and self.channels != 3:
            raise ValueError(f"three_augment needs 3 channels, but channels is {self.channels}")
        self.check_shares("flip", "erasing")
        if not 0.0 < self.eval_crop <= 1.0:
            raise ValueError(f"eval_crop is {self.eval_crop}; expected within (0, 1]")
        low, high = self.crop_scale
        if not 0.0 < low <= high <= 1.0:
            raise ValueError(f"crop_scale is {self.crop_scale}; expected 0 < low <= high <= 1")
        if not 0.0 < self.crop_ratio[0] <= self.crop_ratio[1]:
            raise ValueError(f"crop_ratio is {self.crop_ratio}; expected 0 < low <= high")

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

    def train_dataloader(self) -> DataLoader[ImageBatch]:
        """The loader of this rank, going on where the trainer's batch counter stands."""
        rank, world_size = self.place()
        batches_done, limit = self.progress()
        size = (len(self.train_source), self.batch_size, self.seed, rank, world_size)
        length = len(TrainBatches(*size, repeats=self.repeats))
        per_epoch = limited(length, limit)
        sampler = TrainBatches(*size, batches_done, per_epoch, self.repeats)
        self.check_resumed(
            {
                "images": len(self.train_source),
                "images in a global batch": self.batch_size * world_size,
                "batches in an epoch": per_epoch,
                "repeats": self.repeats,
            }
        )
        geometry = TrainGeometry(
            self.known_size(),
            self.crop_scale,
            self.crop_ratio,
            self.flip,
            self.interpolation,
            self.rand_augment,
        )
        return self.loader(ImageDataset(self.train_source, geometry), sampler, collate)

    def known_size(self) -> tuple[int, int]:
        """(height, width), which `fit_to` fills in where it was left open."""
        if self.image_size is None:
            raise ValueError("data.image_size is null, and no method said what it needs; set it")
        return self.image_size

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

    def on_after_batch_transfer(self, batch: ImageBatch, dataloader_idx: int) -> ImageBatch:
        """Normalise; in training also augment, erase and mix. On the device, in batches."""
        if self.trainer is None or not self.trainer.training:
            return self.normalized(batch)
        if self.three_augment:
            batch = batch._replace(images=three_augment(batch.images.float() / 255.0, batch.keys))
        batch = self.normalized(batch)
        if self.erasing > 0:
            batch = batch._replace(images=erase(batch.images, batch.keys, self.erasing))
        return self.mixing(batch) if self.mixing else batch
