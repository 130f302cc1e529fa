"""Labelled images: a source, geometry in workers, augmentation on the device."""

from typing import Any, Literal

from torch.utils.data import DataLoader

from datamodules.augment import Mixing, erase
from datamodules.batch import ImageBatch
from datamodules.geometry import Interpolation, TrainGeometry
from datamodules.module import IMAGENET_MEAN, IMAGENET_STD
from datamodules.one_size import ImageDataset, OneSizeDataModule, collate
from datamodules.photometric import three_augment


class ImageDataModule(OneSizeDataModule):
    """Batches of labelled images from any source.

    Args:
        source: "digits" or "shapes" (embedded), "folder", "shards", or "torchvision:NAME".
        root: directory (or list file, or URL of shards) of the source; the embedded have none.
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
            *(source, root, source_args, channels, num_workers, mean, std, max_bad, eval_side),
            *(image_size, batch_size, crop_ratio, flip, interpolation, eval_crop),
        )
        self.crop_scale = crop_scale
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
        if self.mixing and self.batch_size % 2:
            raise ValueError(
                f"batch_size is {self.batch_size}; expected an even number for mixup or cutmix, "
                f"which mix pairs"
            )
        if self.repeats < 1:
            raise ValueError(f"repeats is {self.repeats}; expected at least 1")
        if self.three_augment and self.channels != 3:
            raise ValueError(f"three_augment needs 3 channels, but channels is {self.channels}")
        self.check_shares("erasing")
        self.check_scales("crop_scale")

    def train_dataloader(self) -> DataLoader[ImageBatch]:
        """The loader of this rank, going on where the trainer's batch counter stands."""
        geometry = TrainGeometry(
            self.known_size(),
            self.crop_scale,
            self.crop_ratio,
            self.flip,
            self.interpolation,
            self.rand_augment,
        )
        dataset = ImageDataset(self.train_source, geometry)
        return self.loader(dataset, self.train_batches(self.repeats), collate)

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
