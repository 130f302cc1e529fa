"""Images with a teacher's label for every token: the data of LV-ViT and ReLabel."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.trainer.states import TrainerFn
from torch.utils.data import DataLoader, Dataset

from datamodules.augment import erase, normalize
from datamodules.batch import ImageBatch, SparseScores, TokenLabelBatch
from datamodules.geometry import Interpolation
from datamodules.label_geometry import LabelGeometry, RandAugment, reach
from datamodules.label_maps import LabelMaps
from datamodules.label_shards import Rest
from datamodules.module import IMAGENET_MEAN, IMAGENET_STD, Needs
from datamodules.one_size import OneSizeDataModule, height_and_width
from datamodules.sampling import Sample, copy_key, run_seed
from datamodules.sources import BadImageError, Example, Source
from datamodules.unreadable import read_item


class Mapped:
    """The images of a source that have a map; one that could not be labelled is unreadable."""

    def __init__(self, source: Source, maps: LabelMaps) -> None:
        self.source, self.maps = source, maps
        self.class_names, self.channels = source.class_names, source.channels

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, index: int) -> Example:
        shard, row = self.maps.find(index)
        if not shard.grids[row].all():
            raise BadImageError(self.describe(index), "unreadable when its label map was made")
        return self.source[index]

    def size(self, index: int) -> tuple[int, int]:
        return self.source.size(index)

    def describe(self, index: int) -> str:
        return self.source.describe(index)


class TokenLabelDataset(Dataset[TokenLabelBatch]):
    """Turns a `Sample` into a `TokenLabelBatch` of one, without its batch axis.

    An unreadable image is replaced by another one with its own map, the same every time.
    """

    def __init__(
        self, source: Source, maps: LabelMaps, rest: Rest, geometry: LabelGeometry
    ) -> None:
        self.source, self.maps, self.rest = Mapped(source, maps), maps, rest
        self.geometry = geometry

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, sample: Sample) -> TokenLabelBatch:
        example, index = read_item(self.source, sample.item)
        labels = self.maps.read(index, self.rest)
        pixels, tokens, pooled = self.geometry(example.image, labels, sample.key)
        return TokenLabelBatch(
            images=pixels,
            labels=torch.tensor(example.label),
            indices=torch.tensor(sample.item),
            keys=torch.tensor(sample.key),
            is_valid=torch.tensor(sample.is_valid),
            is_replaced=torch.tensor(index != sample.item),
            tokens=tokens,
            pooled=pooled,
        )


def collate(samples: Sequence[TokenLabelBatch]) -> TokenLabelBatch:
    """Stack what `TokenLabelDataset` gives, field by field."""
    fields = [torch.stack(column) for column in zip(*(s[:6] for s in samples), strict=True)]
    tokens = [sample.tokens for sample in samples if sample.tokens is not None]
    stacked = [torch.stack(column) for column in zip(*tokens, strict=True)]
    labels = (SparseScores(*stacked) if stacked else None, torch.stack([s.pooled for s in samples]))
    return TokenLabelBatch(*fields, *labels)  # type: ignore[arg-type, call-arg]


class TokenLabelDataModule(OneSizeDataModule):
    """Batches of images with the scores of a teacher, as `patchlight relabel` has kept them.

    The map of an image goes through flip, geometric operations and crop as the image does
    (`datamodules.label_geometry`). RandAugment comes before the crop here, as published.

    Args:
        labels: directory of the label maps of the training images.
        source: "digits" or "shapes" (embedded), "folder", or "torchvision:NAME".
        root: directory (or list file) of the source; the embedded ones have none.
        source_args: further arguments of the source.
        channels: 1 or 3 channels of the images.
        image_size: side in pixels of what the network sees, or (height, width); null for what
            the method's backbone is made for.
        label_size: rows and columns of token labels; null for one a patch of the backbone. 1 is
            ReLabel: only the crop as a whole has a label.
        rest: score of the classes that a map does not hold: "zeros" as published, or what the
            "teacher" gave them on average, where it was kept.
        transposed_crop: crop the map as the published code does, with x and y exchanged; only to
            compare with it.
        check_dates: refuse images whose file was changed after their map was made.
        batch_size: images in a batch of one device.
        num_workers: processes that decode and crop; 0 does it in the training process. It
            changes nothing but speed.
        crop_scale: area share of the random training crop.
        crop_ratio: its aspect (width / height), log-uniform.
        flip: probability of a horizontal flip.
        interpolation: "bicubic" or "bilinear", antialiased.
        eval_crop: share of the image's shorter side kept in evaluation.
        eval_side: side in pixels in evaluation, where it is not that of training; null for
            `image_size`.
        mean: what is subtracted from images in [0, 1], a number a channel.
        std: what they are then divided by.
        rand_augment: timm's recipe, such as "rand-m9-mstd0.5-inc1", or null.
        erasing: probability of erasing one rectangle of an image; labels stay.
        max_bad: the run stops when more than this share of a split is unreadable.

    Attributes:
        maps: the label maps, once set up to train.
        num_label_classes: classes that the teacher knows, likewise.

    Raises:
        ValueError: values out of range, maps that are missing, damaged or do not fit.
    """

    def __init__(
        self,
        labels: str,
        source: str = "shapes",
        root: str | None = None,
        source_args: dict[str, Any] | None = None,
        channels: int = 3,
        image_size: int | tuple[int, int] | None = None,
        label_size: int | tuple[int, int] | None = None,
        rest: Rest = "zeros",
        transposed_crop: bool = False,
        check_dates: bool = True,
        batch_size: int = 64,
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
        erasing: float = 0.0,
        max_bad: float = 0.01,
    ) -> None:
        super().__init__(
            *(source, root, source_args, channels, num_workers, mean, std, max_bad, eval_side),
            *(image_size, batch_size, crop_ratio, flip, interpolation, eval_crop),
        )
        self.labels, self.rest, self.transposed_crop = Path(labels), rest, transposed_crop
        self.label_size = None if label_size is None else height_and_width(label_size)
        self.crop_scale, self.erasing, self.check_dates = crop_scale, erasing, check_dates
        self.check_shares("erasing")
        self.check_scales("crop_scale")
        if self.label_size is not None and min(self.label_size) < 1:
            raise ValueError(f"label_size is {label_size}; expected at least 1")
        self.augment = None if rand_augment is None else self.tracked(rand_augment)
        self.maps: LabelMaps | None = None
        self.num_label_classes: int | None = None

    def tracked(self, recipe: str) -> RandAugment:
        self.make_rand_augment(recipe)  # for its checks
        return RandAugment(recipe, tuple(round(255 * m) for m in self.mean))

    def prepare_data(self) -> None:
        """On one process: also read all maps once, so that none fails in the midst of a run."""
        super().prepare_data()
        if self.trainer is not None and self.trainer.state.fn == TrainerFn.FITTING:
            self.open_maps(self.open("train")).check_values()

    def setup(self, stage: str) -> None:
        """Maps are opened where there is training; an evaluation does without them."""
        super().setup(stage)
        if stage == "fit":
            self.maps = self.open_maps(self.train_source)
            self.num_label_classes = self.maps.about.num_classes

    def open_maps(self, source: Source) -> LabelMaps:
        maps = LabelMaps(self.labels, source, self.root, self.check_dates)
        about = maps.about
        if self.rest == "teacher" and not about.remainder:
            raise ValueError(
                f"data.init_args.rest is 'teacher', but the maps in {self.labels} do not have it; "
                f"make them anew with `patchlight relabel --remainder`, or set it to 'zeros'"
            )
        if source.class_names and len(source.class_names) > about.num_classes:
            raise ValueError(
                f"{self.labels} has maps of {about.num_classes} classes, but the data has "
                f"{len(source.class_names)}; make maps with a teacher of these classes"
            )
        return maps

    def fit_to(self, needs: Needs) -> None:
        """Also learn how many tokens have a label."""
        super().fit_to(needs)
        height, width = self.known_size()
        own = (height // needs.patch_size, width // needs.patch_size)
        if self.label_size is None:
            self.label_size = own
        elif self.label_size not in (own, (1, 1)):
            raise ValueError(
                f"data.init_args.label_size is {self.label_size[0]}x{self.label_size[1]}, but the "
                f"backbone has {own[0]}x{own[1]} patches; set it to null, or to 1 for a label of "
                f"the whole crop only"
            )

    def geometry(self) -> LabelGeometry:
        """What is done to a training image and its map."""
        if self.label_size is None:
            raise ValueError("data.label_size is null, and no method said what it needs; set it")
        assert self.maps is not None  # `setup` opened them
        rows, columns = self.maps.largest()
        down, across = self.label_size
        lengths = reach(rows, down), reach(columns, across)
        return LabelGeometry(
            size=self.known_size(),
            scale=self.crop_scale,
            ratio=self.crop_ratio,
            flip=self.flip,
            interpolation=self.interpolation,
            augment=self.augment,
            grid=None if self.label_size == (1, 1) else self.label_size,
            lengths=lengths,
            num_classes=self.maps.about.num_classes,
            transposed=self.transposed_crop,
        )

    def dataset(self) -> TokenLabelDataset:
        assert self.maps is not None  # `setup` opened them
        return TokenLabelDataset(self.train_source, self.maps, self.rest, self.geometry())

    def train_dataloader(self) -> DataLoader[TokenLabelBatch]:
        """The loader of this rank, going on where the trainer's batch counter stands."""
        return self.loader(self.dataset(), self.train_batches(), collate)

    def crops(self, count: int, device: torch.device) -> TokenLabelBatch:
        """The first training images as they are seen in the first epoch, normalised; to look at."""
        dataset, seed = self.dataset(), run_seed()
        items = range(min(count, len(dataset)))
        batch = collate([dataset[Sample(i, copy_key(seed, 0, i, 0))] for i in items])
        here: TokenLabelBatch = self.transfer_batch_to_device(batch, device, 0)
        return here._replace(images=normalize(here.images, self.mean, self.std))

    def on_after_batch_transfer(
        self, batch: TokenLabelBatch | ImageBatch, dataloader_idx: int
    ) -> TokenLabelBatch | ImageBatch:
        """Normalise; in training also erase. On the device, in batches."""
        normal = batch._replace(images=normalize(batch.images, self.mean, self.std))
        if self.erasing > 0 and self.trainer is not None and self.trainer.training:
            normal = normal._replace(images=erase(normal.images, normal.keys, self.erasing))
        return normal
