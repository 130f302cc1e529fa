"""Labelled images: a source, geometry in workers, augmentation on the device."""

from collections.abc import Sequence
from typing import Any, Literal

import torch
from lightning.pytorch import LightningDataModule
from torch.utils.data import DataLoader, Dataset

from datamodules.augment import Mixing, erase, normalize
from datamodules.batch import ImageBatch
from datamodules.geometry import (
    Augment,
    EvalGeometry,
    Interpolation,
    TrainGeometry,
    make_rand_augment,
)
from datamodules.photometric import three_augment
from datamodules.sampling import EvalBatches, Sample, TrainBatches, fold, run_seed
from datamodules.sources import BadImageError, Example, Source, Split, open_source
from datamodules.unreadable import Unreadable

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
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
        example, is_replaced = self.read(sample)
        return ImageBatch(
            images=self.geometry(example.image, sample.key),
            labels=torch.tensor(example.label),
            indices=torch.tensor(sample.item),
            keys=torch.tensor(sample.key),
            is_valid=torch.tensor(sample.is_valid),
            is_replaced=torch.tensor(is_replaced),
        )

    def read(self, sample: Sample) -> tuple[Example, bool]:
        """The example, or the first readable one of a sequence fixed by the sample's index."""
        index = sample.item
        for attempt in range(20):
            try:
                return self.source[index], attempt > 0
            except BadImageError as error:
                last = error
                index = fold(sample.item, attempt) % len(self.source)
        raise ValueError(
            f"20 images in a row could not be read, the last {last.description} "
            f"({last.reason}); run `patchlight check-data` on the folder"
        )


def collate(samples: Sequence[ImageBatch]) -> ImageBatch:
    """Stack what `ImageDataset` gives, field by field; nothing is mixed yet."""
    columns = [torch.stack(column) for column in zip(*(s[:6] for s in samples), strict=True)]
    return ImageBatch(*columns)  # type: ignore[arg-type]  # mypy cannot count the columns


class ImageDataModule(LightningDataModule):
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
        super().__init__()
        self.source, self.root, self.source_args = source, root, dict(source_args or {})
        self.channels, self.batch_size, self.num_workers = channels, batch_size, num_workers
        self.image_size = (image_size, image_size) if isinstance(image_size, int) else image_size
        self.crop_scale, self.crop_ratio, self.flip = crop_scale, crop_ratio, flip
        self.interpolation, self.eval_crop = interpolation, eval_crop
        self.mean, self.std, self.erasing, self.max_bad = mean, std, erasing, max_bad
        self.repeats, self.three_augment = repeats, three_augment
        self.mixing = Mixing(mixup, cutmix, mix_probability)
        self.check_arguments()
        self.rand_augment: Augment | None = None
        if rand_augment is not None:
            if three_augment:
                raise ValueError(
                    f"rand_augment {rand_augment!r} and three_augment are both on; recipes use "
                    f"one or the other: set rand_augment to null or three_augment to false"
                )
            if channels != 3:
                raise ValueError(f"rand_augment needs 3 channels, but channels is {channels}")
            self.rand_augment = make_rand_augment(rand_augment, tuple(round(255 * m) for m in mean))
        self.order: dict[str, int] = {}
        self.unreadable: dict[Split, Unreadable] = {"train": Unreadable(), "val": Unreadable()}

    def check_arguments(self) -> None:
        if len(self.mean) != self.channels or len(self.std) != self.channels:
            raise ValueError(
                f"mean {self.mean} and std {self.std} need one number for each of the "
                f"{self.channels} channel(s)"
            )
        if self.batch_size < 1 or (self.mixing and self.batch_size % 2):
            raise ValueError(
                f"batch_size is {self.batch_size}; expected at least 1, and an even number "
                f"for mixup or cutmix, which mix pairs"
            )
        if self.repeats < 1:
            raise ValueError(f"repeats is {self.repeats}; expected at least 1")
        if self.three_augment and self.channels != 3:
            raise ValueError(f"three_augment needs 3 channels, but channels is {self.channels}")
        for name in ("flip", "erasing", "max_bad"):
            if not 0.0 <= getattr(self, name) <= 1.0:
                raise ValueError(f"{name} is {getattr(self, name)}; expected within [0, 1]")
        if not 0.0 < self.eval_crop <= 1.0:
            raise ValueError(f"eval_crop is {self.eval_crop}; expected within (0, 1]")
        low, high = self.crop_scale
        if not 0.0 < low <= high <= 1.0:
            raise ValueError(f"crop_scale is {self.crop_scale}; expected 0 < low <= high <= 1")
        if not 0.0 < self.crop_ratio[0] <= self.crop_ratio[1]:
            raise ValueError(f"crop_ratio is {self.crop_ratio}; expected 0 < low <= high")

    def open(self, split: Split) -> Source:
        return open_source(
            self.source, split, self.root, channels=self.channels, **self.source_args
        )

    def prepare_data(self) -> None:
        """On one process: download, and write the index of a folder for the others to map."""
        self.open("train")
        self.open("val")

    def setup(self, stage: str) -> None:
        trainer = self.trainer
        if (
            trainer is not None
            and trainer.world_size > 1
            and trainer._accelerator_connector.use_distributed_sampler
        ):
            raise ValueError(
                "the data module places samples on ranks itself; set "
                "trainer.use_distributed_sampler to false"
            )
        self.seed = run_seed()
        # All ranks have to ask for it together, so not when one of them meets a bad image.
        self.log_dir = None if trainer is None else trainer.log_dir
        self.train_source, self.val_source = self.open("train"), self.open("val")
        self.class_names = tuple(self.train_source.class_names)

    def train_dataloader(self) -> DataLoader[ImageBatch]:
        """The loader of this rank, going on where the trainer's batch counter stands."""
        batches_done, limit, rank, world_size = 0, 1.0, 0, 1
        if self.trainer is not None:
            batches_done = self.trainer.fit_loop.epoch_loop.batch_progress.total.ready
            limit = self.trainer.limit_train_batches or 1.0
            rank, world_size = self.trainer.global_rank, self.trainer.world_size
        size = (len(self.train_source), self.batch_size, self.seed, rank, world_size)
        length = len(TrainBatches(*size, repeats=self.repeats))
        per_epoch = min(length, limit) if isinstance(limit, int) else int(length * limit)
        sampler = TrainBatches(*size, batches_done, max(1, per_epoch), self.repeats)
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
        return self.loader(self.train_source, geometry, sampler)

    def known_size(self) -> tuple[int, int]:
        """(height, width), which a method's `setup` fills in where it was left open."""
        if self.image_size is None:
            raise ValueError("data.image_size is null, and no method said what it needs; set it")
        return self.image_size

    def check_resumed(self, order: dict[str, int]) -> None:
        """A run goes on where its batch counter stands, which has to count the same batches."""
        for name, now in order.items():
            before = self.order.get(name, now)
            if before != now:
                raise ValueError(
                    f"the run that is resumed had {before} {name}, now there are {now}, so its "
                    f"place in the data is lost; resume it as it was, or start a new run"
                )
        self.order = order

    def val_dataloader(self) -> DataLoader[ImageBatch]:
        rank, world_size = 0, 1
        if self.trainer is not None:
            rank, world_size = self.trainer.global_rank, self.trainer.world_size
        sampler = EvalBatches(len(self.val_source), self.batch_size, rank, world_size)
        geometry = EvalGeometry(self.known_size(), self.eval_crop, self.interpolation)
        return self.loader(self.val_source, geometry, sampler)

    def loader(
        self, source: Source, geometry: Geometry, sampler: TrainBatches | EvalBatches
    ) -> DataLoader[ImageBatch]:
        return DataLoader(
            ImageDataset(source, geometry),
            batch_sampler=sampler,
            num_workers=self.num_workers,
            collate_fn=collate,
            pin_memory=torch.cuda.is_available(),
            persistent_workers=self.num_workers > 0,
        )

    def on_before_batch_transfer(self, batch: ImageBatch, dataloader_idx: int) -> ImageBatch:
        """Note unreadable images while the flags are still on the CPU."""
        if not bool(batch.is_replaced.any()):
            return batch
        assert self.trainer is not None
        training = self.trainer.training
        source = self.train_source if training else self.val_source
        self.unreadable["train" if training else "val"].add(
            [source.describe(i) for i in batch.indices[batch.is_replaced].tolist()],
            limit=self.max_bad * len(source),
            directory=self.log_dir,
            rank=self.trainer.global_rank,
        )
        # What replaces an image is fine to train on, but must not count in an evaluation.
        return batch if training else batch._replace(is_valid=batch.is_valid & ~batch.is_replaced)

    def on_after_batch_transfer(self, batch: ImageBatch, dataloader_idx: int) -> ImageBatch:
        """Normalise; in training also augment, erase and mix. On the device, in batches."""
        training = self.trainer is not None and self.trainer.training
        images = batch.images
        if training and self.three_augment:
            images = three_augment(images.float() / 255.0, batch.keys)
        batch = batch._replace(images=normalize(images, self.mean, self.std))
        if not training:
            return batch
        if self.erasing > 0:
            batch = batch._replace(images=erase(batch.images, batch.keys, self.erasing))
        return self.mixing(batch) if self.mixing else batch

    def state_dict(self) -> dict[str, Any]:
        names = {str(split): unreadable.names for split, unreadable in self.unreadable.items()}
        return {"order": self.order, **names}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.order = dict(state_dict.get("order", {}))
        for split, unreadable in self.unreadable.items():
            unreadable.names = list(state_dict[split])
