"""Several views of every image: crops in workers, colours on the device."""

from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch.utils.data import DataLoader, Dataset

from datamodules.augment import normalize, view_keys
from datamodules.batch import ImageBatch, MultiCropBatch
from datamodules.geometry import Interpolation
from datamodules.module import IMAGENET_MEAN, IMAGENET_STD, Needs
from datamodules.one_size import OneSizeDataModule, height_and_width
from datamodules.sampling import Sample
from datamodules.sources import Source
from datamodules.unreadable import read_example
from datamodules.views import NUM_GLOBAL, CropGroup, MultiCropGeometry, ViewColors, flip_some


class MultiCropDataset(Dataset[MultiCropBatch]):
    """Turns a `Sample` into a `MultiCropBatch` of one, without its batch axis.

    An unreadable image is replaced by another one, the same every time, and flagged.
    """

    def __init__(self, source: Source, geometry: MultiCropGeometry) -> None:
        self.source, self.geometry = source, geometry

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, sample: Sample) -> MultiCropBatch:
        example, is_replaced = read_example(self.source, sample.item)
        return MultiCropBatch(
            crops=self.geometry(example.image, sample.key),
            labels=torch.tensor(example.label),
            indices=torch.tensor(sample.item),
            keys=torch.tensor(sample.key),
            is_valid=torch.tensor(sample.is_valid),
            is_replaced=torch.tensor(is_replaced),
        )


def collate(samples: Sequence[MultiCropBatch]) -> MultiCropBatch:
    """Stack what `MultiCropDataset` gives: crops view by view, everything else image by image."""
    groups = zip(*(sample.crops for sample in samples), strict=True)
    columns = [torch.stack(column) for column in zip(*(s[1:] for s in samples), strict=True)]
    return MultiCropBatch(tuple(torch.stack(group, dim=1) for group in groups), *columns)


class MultiCropDataModule(OneSizeDataModule):
    """Batches of two global and several local views of every image; labels are not needed.

    The defaults are those of DINO (Caron et al. 2021). In evaluation every image is one, cropped
    as by `ImageDataModule`.

    Args:
        source: "digits" or "shapes" (embedded), "folder", "shards", or "torchvision:NAME".
        root: directory (or list file, or URL of shards) of the source; the embedded have none.
        source_args: further arguments of the source, such as {labelled: false} for a folder.
        channels: 1 or 3 channels of the images; one has brightness and contrast, but no colours.
        image_size: side in pixels of global crops, or (height, width); null for what the
            method's backbone is made for. Also the size in evaluation.
        local_size: side in pixels of local crops, or (height, width).
        num_local: local crops of an image; 0 leaves the two global ones.
        batch_size: images (not views) in a batch of one device.
        num_workers: processes that decode and crop; 0 does it in the training process. It
            changes nothing but speed.
        global_scale: area share of global crops; (0.14, 1) is published for no local ones.
        local_scale: area share of local crops.
        crop_ratio: aspect (width / height) of crops, log-uniform.
        flip: probability of a horizontal flip, of each view on its own.
        colors: jitter, grayscale, blur and solarisation of the views.
        interpolation: "bicubic" or "bilinear", antialiased.
        eval_crop: share of the image's shorter side kept in evaluation.
        eval_side: side in pixels in evaluation, where it is not that of training; null for
            `image_size`.
        mean: what is subtracted from images in [0, 1], a number a channel.
        std: what they are then divided by.
        max_bad: the run stops when more than this share of a split is unreadable.

    Raises:
        ValueError: values out of range, an empty source, means that do not match the channels.
    """

    def __init__(
        self,
        source: str = "shapes",
        root: str | None = None,
        source_args: dict[str, Any] | None = None,
        channels: Literal[1, 3] = 3,
        image_size: int | tuple[int, int] | None = None,
        local_size: int | tuple[int, int] = 96,
        num_local: int = 8,
        batch_size: int = 64,
        num_workers: int = 2,
        global_scale: tuple[float, float] = (0.4, 1.0),
        local_scale: tuple[float, float] = (0.05, 0.4),
        crop_ratio: tuple[float, float] = (3 / 4, 4 / 3),
        flip: float = 0.5,
        colors: ViewColors = ViewColors(),  # noqa: B008 - frozen
        interpolation: Interpolation = "bicubic",
        eval_crop: float = 0.875,
        eval_side: int | None = None,
        mean: tuple[float, ...] = IMAGENET_MEAN,
        std: tuple[float, ...] = IMAGENET_STD,
        max_bad: float = 0.01,
    ) -> None:
        super().__init__(
            *(source, root, source_args, channels, num_workers, mean, std, max_bad, eval_side),
            *(image_size, batch_size, crop_ratio, flip, interpolation, eval_crop),
        )
        self.local_size, self.num_local = height_and_width(local_size), num_local
        self.global_scale, self.local_scale, self.colors = global_scale, local_scale, colors
        self.check_scales("global_scale", "local_scale")
        if num_local < 0:
            raise ValueError(f"num_local is {num_local}; expected at least 0")
        if min(self.local_size) < 1:
            raise ValueError(f"local_size is {local_size}; expected at least 1")

    def fit_to(self, needs: Needs) -> None:
        """Take the backbone's image size for global crops where none was given.

        Raises:
            ValueError: crops that the backbone cannot cut into whole patches, or global ones of
                another size than it is made for.
        """
        super().fit_to(needs)
        self.check_patches("image_size", self.known_size(), needs.patch_size)
        if self.num_local > 0:
            self.check_patches("local_size", self.local_size, needs.patch_size)

    def check_patches(self, name: str, size: tuple[int, int], patch: int) -> None:
        if size[0] % patch == size[1] % patch == 0:
            return
        height, width = (max(1, round(side / patch)) * patch for side in size)
        fix = height if height == width else [height, width]
        raise ValueError(
            f"data.init_args.{name} is {size[0]}x{size[1]}, which the backbone's patches of "
            f"{patch} pixels do not divide; set it to {fix}"
        )

    def groups(self) -> tuple[CropGroup, ...]:
        """The global and, where there are any, the local crops."""
        both = (
            CropGroup(NUM_GLOBAL, self.known_size(), self.global_scale),
            CropGroup(self.num_local, self.local_size, self.local_scale),
        )
        return both if self.num_local > 0 else both[:1]

    def train_dataloader(self) -> DataLoader[MultiCropBatch]:
        """The loader of this rank, going on where the trainer's batch counter stands."""
        geometry = MultiCropGeometry(self.groups(), self.crop_ratio, self.interpolation)
        dataset = MultiCropDataset(self.train_source, geometry)
        return self.loader(dataset, self.train_batches(), collate)

    def on_after_batch_transfer(
        self, batch: MultiCropBatch | ImageBatch, dataloader_idx: int
    ) -> MultiCropBatch | ImageBatch:
        """Flip, change colours and normalise, view by view; in evaluation only normalise."""
        if isinstance(batch, ImageBatch):
            return self.normalized(batch)
        keys = view_keys(batch.keys, sum(len(group) for group in batch.crops))
        crops, first = [], 0
        for group in batch.crops:
            k = keys[first : first + len(group)]
            views = flip_some(group.flatten(0, 1), k.flatten(), self.flip).float() / 255.0
            views = self.colors(views.view(group.shape), k, first).flatten(0, 1)
            crops.append(normalize(views, self.mean, self.std).view(group.shape))
            first += len(group)
        return batch._replace(crops=tuple(crops))
