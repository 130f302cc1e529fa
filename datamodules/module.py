"""What data modules over a source share: opening it, its loaders, its unreadable images."""

import math
import zlib
from collections.abc import Iterator
from typing import Any, NamedTuple, TypeVar

import numpy as np
import torch
from lightning.fabric.utilities import move_data_to_device
from torch.utils.data import DataLoader

from datamodules.batch import ImageBatch, MultiCropBatch, PackedBatch, TokenLabelBatch
from datamodules.geometry import Augment, timm_rand_augment
from datamodules.placed import PlacedDataModule
from datamodules.sampling import Ahead
from datamodules.sources import Grouped, Source, Split, open_source, some_of
from datamodules.unreadable import Unreadable

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
Batch = TypeVar("Batch", ImageBatch, MultiCropBatch, PackedBatch, TokenLabelBatch)


class Needs(NamedTuple):
    """What a backbone takes.

    patch_size:        pixels along a side of a patch
    num_prefix_tokens: tokens of every image before its patches
    image_size:        (height, width) it is made for, None for any
    max_grid:          most patches along a side of a packed image, None for any number
    in_channels:       channels of its images
    takes_packs:       whether it takes packs of images of any size
    """

    patch_size: int
    num_prefix_tokens: int
    image_size: tuple[int, int] | None
    max_grid: int | None
    in_channels: int
    takes_packs: bool

    @classmethod
    def of(cls, backbone: Any) -> "Needs":
        """Those of a backbone, which has attributes of these names."""
        return cls(*(getattr(backbone, name) for name in cls._fields))


def ahead_in(source: Source) -> Ahead | None:
    """What has to be told which images come next, where the source lies in files of many."""
    return Ahead(source.groups, source.prefetch) if isinstance(source, Grouped) else None


class SourceDataModule(PlacedDataModule):
    """Batches of images from a source of `datamodules.sources`.

    A method's `setup` calls `fit_to` with what its backbone takes.

    Args:
        source, root, source_args: what `open_source` takes.
        channels: of the images.
        num_workers: processes that decode and crop.
        mean, std: a number a channel.
        max_bad: the run stops when more than this share of a split is unreadable.
        eval_side: side of images in evaluation, where it is set.

    Attributes:
        needs: what the backbone takes, once `fit_to` was called.
        eval_tokens: mean tokens of an image in evaluation, once its loader was made.

    Raises:
        ValueError: means that do not match the channels, a share outside [0, 1].
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
    ) -> None:
        super().__init__()
        self.source, self.root, self.source_args = source, root, dict(source_args or {})
        self.channels, self.num_workers = channels, num_workers
        self.mean, self.std, self.max_bad = mean, std, max_bad
        if len(mean) != channels or len(std) != channels:
            raise ValueError(
                f"mean {mean} and std {std} need one number for each of the {channels} channel(s)"
            )
        self.check_shares("max_bad")
        if eval_side is not None and eval_side < 1:
            raise ValueError(f"eval_side is {eval_side}; expected at least 1")
        self.eval_side = eval_side
        self.needs: Needs | None = None
        self.eval_tokens = math.nan
        self.unreadable: dict[Split, Unreadable] = {"train": Unreadable(), "val": Unreadable()}

    def fit_to(self, needs: Needs) -> None:
        """Learn what the backbone takes; before the loaders are made.

        Raises:
            ValueError: images of other channels than it takes.
        """
        if needs.in_channels != self.channels:
            raise ValueError(
                f"data.init_args.channels is {self.channels}, but the backbone takes images of "
                f"{needs.in_channels}; set its in_channels or the data's channels"
            )
        self.needs = needs

    def check_shares(self, *names: str) -> None:
        for name in names:
            if not 0.0 <= getattr(self, name) <= 1.0:
                raise ValueError(f"{name} is {getattr(self, name)}; expected within [0, 1]")

    def make_rand_augment(self, recipe: str | None) -> Augment | None:
        if recipe is None:
            return None
        if self.channels != 3:
            raise ValueError(f"rand_augment needs 3 channels, but channels is {self.channels}")
        return timm_rand_augment(recipe, tuple(round(255 * m) for m in self.mean))

    def open(self, split: Split) -> Source:
        return open_source(
            self.source, split, self.root, channels=self.channels, **self.source_args
        )

    def num_machines(self) -> int:
        return 1 if self.trainer is None else int(self.trainer.num_nodes)

    def grouping(self, lanes: int | None = None) -> dict[str, int]:
        """What else the order of images depends on where they lie in files of many.

        Args:
            lanes: machines that read files of their own; None for all.
        """
        if not isinstance(self.train_source, Grouped):
            return {}
        starts, together = self.train_source.groups
        return {
            "checksum of the shards' lengths": zlib.crc32(starts.astype(np.int64).tobytes()),
            "source_args.shuffle_shards": together,
            "machines that read shards of their own": lanes or self.num_machines(),
        }

    def prepare_data(self) -> None:
        """On one process: download, and write what the others map: an index, a table of shards."""
        self.open("train")
        self.open("val")

    def setup(self, stage: str) -> None:
        super().setup(stage)
        # All ranks have to ask for it together, so not when one of them meets a bad image.
        self.log_dir = None if self.trainer is None else self.trainer.log_dir
        self.train_source, self.val_source = self.open("train"), self.open("val")
        self.class_names = tuple(self.train_source.class_names)

    def eval_loader(self, source: Source) -> DataLoader[Any]:
        """The images of a source that are this rank's, each once, as evaluation sees them."""
        raise NotImplementedError

    def val_dataloader(self) -> DataLoader[Any]:
        return self.eval_loader(self.val_source)

    def eval_batches(self, source: Source, device: torch.device) -> Iterator[Any]:
        """The same on a device and normalised; unreadable images are not valid in them."""
        for batch in self.eval_loader(source):
            moved = move_data_to_device(batch, device)
            moved = moved._replace(is_valid=moved.is_valid & ~moved.is_replaced)
            yield self.normalized(moved)

    def normalized(self, batch: Any) -> Any:
        """A batch of uint8 images as float32, normalised; nothing random is done to it."""
        raise NotImplementedError

    def some(self, split: Split, count: int | None) -> Source:
        """The images of a split, or so many of them drawn from it, always the same."""
        source = self.train_source if split == "train" else self.val_source
        if count is None or count >= len(source):
            return source
        return some_of(source, count)

    def on_before_batch_transfer(self, batch: Batch, dataloader_idx: int) -> Batch:
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

    def state_dict(self) -> dict[str, Any]:
        names = {str(split): unreadable.names for split, unreadable in self.unreadable.items()}
        return {**super().state_dict(), **names}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        super().load_state_dict(state_dict)
        for split, unreadable in self.unreadable.items():
            unreadable.names = list(state_dict[split])
