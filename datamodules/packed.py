"""Labelled images of any size in packs, planned from their sizes before any is read."""

import zlib
from typing import Any, Literal

import numpy as np
from lightning.pytorch.utilities import rank_zero_warn
from torch.utils.data import DataLoader

from datamodules.augment import normalize
from datamodules.batch import PackedBatch
from datamodules.cutting import Cut, PackedDataset, collate
from datamodules.geometry import Interpolation
from datamodules.module import (
    IMAGENET_MEAN,
    IMAGENET_STD,
    Needs,
    SourceDataModule,
    ahead_in,
)
from datamodules.packing import (
    Layout,
    Pass,
    Resolution,
    TokenDrop,
    plan,
    plan_evaluation,
    tokens_of,
)
from datamodules.placed import limited
from datamodules.rows import PackedBatches, PackedEvalBatches
from datamodules.sizes import measure
from datamodules.sources import Grouped, Source


class PackedDataModule(SourceDataModule):
    """Packs of labelled images in their own aspect, at many resolutions, without padding.

    Patch size and prefix tokens are the backbone's. Every batch of a run has the same shapes.
    An image's side is the square root of its area in pixels.

    Args:
        source: "digits" or "shapes" (embedded), "folder", "shards", or "torchvision:NAME".
        root: directory (or list file, or URL of shards) of the source; the embedded have none.
        source_args: further arguments of the source.
        channels: 1 or 3 channels of the images.
        num_rows: rows of tokens in a batch of one device.
        row_length: tokens in a row, which is what an image may have at most.
        max_images: images that a row has room for; null for twice as many as fill it on average.
        buffer: images that wait to be packed; more of them fill rows better.
        resolution: how large images are in training.
        drop: which share of its patches an image loses in training.
        eval_side: side of all images in evaluation; null for their own within the range of
            `resolution`.
        num_workers: processes that decode and cut; 0 does it in the training process. It changes
            nothing but speed.
        crop_scale: area share of a random training crop, which keeps the image's aspect.
        flip: probability of a horizontal flip.
        interpolation: "bicubic" or "bilinear", antialiased.
        mean: what is subtracted from images in [0, 1], a number a channel.
        std: what they are then divided by.
        rand_augment: timm's recipe, such as "rand-m9-mstd0.5-inc1", or null.
        max_bad: the run stops when more than this share of a split is unreadable.

    Raises:
        ValueError: values out of range, an empty source, means that do not match the channels.
    """

    train_layout: Layout
    train_sizes: np.ndarray

    def __init__(
        self,
        source: str = "shapes",
        root: str | None = None,
        source_args: dict[str, Any] | None = None,
        channels: Literal[1, 3] = 3,
        num_rows: int = 4,
        row_length: int = 1024,
        max_images: int | None = None,
        buffer: int = 256,
        resolution: Resolution = Resolution(),  # noqa: B008 - frozen
        drop: TokenDrop = TokenDrop(),  # noqa: B008 - frozen
        eval_side: int | None = None,
        num_workers: int = 2,
        crop_scale: tuple[float, float] = (1.0, 1.0),
        flip: float = 0.5,
        interpolation: Interpolation = "bicubic",
        mean: tuple[float, ...] = IMAGENET_MEAN,
        std: tuple[float, ...] = IMAGENET_STD,
        rand_augment: str | None = None,
        max_bad: float = 0.01,
    ) -> None:
        super().__init__(
            *(source, root, source_args, channels, num_workers, mean, std, max_bad, eval_side)
        )
        self.num_rows, self.row_length, self.max_images = num_rows, row_length, max_images
        self.buffer, self.resolution, self.drop = buffer, resolution, drop
        self.crop_scale, self.flip = crop_scale, flip
        self.interpolation = interpolation
        for name in ("num_rows", "row_length", "max_images", "buffer"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} is {value}; expected at least 1")
        self.check_shares("flip")
        if not 0.0 < crop_scale[0] <= crop_scale[1] <= 1.0:
            raise ValueError(f"crop_scale is {crop_scale}; expected 0 < low <= high <= 1")
        self.rand_augment = self.make_rand_augment(rand_augment)
        self.starts: list[int] = [0]
        self.share_of_pass = 1.0  # that an epoch takes

    def prepare_data(self) -> None:
        """On one process: download, index, and measure images for the others to know."""
        fresh = self.trainer is None or self.trainer.ckpt_path is None  # else the plan must stay
        if self.trainer is None or self.trainer.state.fn == "fit":
            measure(self.open("train"), retry=fresh)
        measure(self.open("val"), retry=fresh)

    def fit_to(self, needs: Needs) -> None:
        """Take the backbone's patch size and prefix tokens.

        Raises:
            ValueError: rows that are too short for one patch, a backbone that takes no packs.
        """
        super().fit_to(needs)
        if not needs.takes_packs:
            raise ValueError(
                "the backbone takes no packs: relative positions, windows and convolutions need "
                "images of one size; use NaViT, or ViT with another kind of positions, or "
                "datamodules.ImageDataModule"
            )
        if self.row_length <= needs.num_prefix_tokens:
            raise ValueError(
                f"data.init_args.row_length is {self.row_length}, but an image takes "
                f"{needs.num_prefix_tokens} tokens before its first patch"
            )

    def eval_resolution(self) -> Resolution:
        side = self.eval_side
        if side is not None:
            return Resolution("native", side, side)
        return Resolution("native", self.resolution.min_side, self.resolution.max_side)

    def layout_for(self, sizes: np.ndarray, resolution: Resolution, drop: TokenDrop) -> Layout:
        """The shape of batches, with room for twice the images of a mean row."""
        if self.needs is None:
            raise ValueError("no method said what its backbone takes (`fit_to`)")
        needs, slots = self.needs, self.max_images or 1
        layout = Layout(
            *(self.num_rows, self.row_length, slots, needs.patch_size, needs.num_prefix_tokens),
            needs.max_grid,
        )
        if self.max_images is None:
            _, kept = tokens_of(sizes, np.arange(len(sizes)), layout, resolution, drop, 0.0)
            most = self.row_length / (kept.mean() + layout.num_prefix)
            least = self.row_length // int(kept.min() + layout.num_prefix)
            layout = layout._replace(slots=max(1, min(least, round(2 * most))))
        return layout

    def plan_pass(self, number: int, progress: float | None = None) -> Pass:
        """Pass `number` over the training images, in whole optimizer steps of all devices."""
        return plan(
            *(self.train_sizes, self.seed, number, self.train_layout, self.resolution, self.drop),
            progress=self.drop_progress(number) if progress is None else progress,
            buffer=self.buffer,
            multiple=self.num_rows * self.place()[1] * self.accumulate(),
            groups=self.train_source.groups if isinstance(self.train_source, Grouped) else None,
        )

    def drop_progress(self, number: int) -> float:
        """How much of the training lies behind at the begin of a pass, 0 to 1."""
        if self.drop.last == 1.0:
            return 0.0
        passes = None if self.trainer is None else self.trainer.max_epochs
        if not passes or passes < 1:
            raise ValueError(
                f"drop.last is {self.drop.last}, and only trainer.max_epochs says when the last "
                f"pass is; set it"
            )
        return min(1.0, number / max(1.0, passes * self.share_of_pass - 1))

    def accumulate(self) -> int:
        return 1 if self.trainer is None else int(self.trainer.accumulate_grad_batches)

    def train_dataloader(self) -> DataLoader[PackedBatch]:
        """The loader of this rank, going on where the trainer's batch counter stands."""
        self.train_sizes = measure(self.train_source)
        self.train_layout = self.layout_for(self.train_sizes, self.resolution, self.drop)
        rank, world_size = self.place()
        batches_done, limit = self.progress()
        first = self.plan_pass(0)
        length = len(first.rows) // (self.num_rows * world_size)
        self.warn_of_padding(first)
        if isinstance(self.train_source, Grouped) and self.num_machines() > 1:
            rank_zero_warn("every machine will read all shards: packs are planned over all images")
        self.check_reduced(self.train_sizes, self.train_layout, self.resolution)
        total = checksum(first)
        if self.drop.last != 1.0:  # passes grow longer: an epoch is as long as they are on average
            self.drop_progress(1)
            last = self.plan_pass(0, 1.0)
            total ^= checksum(last)
            steps = (len(first.rows) + len(last.rows)) / 2 / len(first.rows) * length
            length = max(1, round(steps / self.accumulate())) * self.accumulate()
        per_epoch = limited(length, limit)
        if per_epoch % self.accumulate():
            raise ValueError(
                f"trainer.limit_train_batches leaves {per_epoch} batches an epoch, which are no "
                f"whole optimizer steps of {self.accumulate()} (trainer.accumulate_grad_batches)"
            )
        self.share_of_pass = per_epoch / length
        order = {
            "images": len(self.train_source),
            "rows in a global batch": self.num_rows * world_size,
            "batches in an optimizer step": self.accumulate(),
            "batches in an epoch": per_epoch,
            "checksum of sizes and packing": total,
            **self.grouping(lanes=1),
        }
        if self.drop.last != 1.0:
            assert self.trainer is not None
            order["trainer.max_epochs, which the drop schedule spans"] = (
                self.trainer.max_epochs or 0
            )
        self.check_agreed(total)
        self.check_resumed(order)
        sampler = PackedBatches(
            *(self.plan_pass, self.starts, self.num_rows, rank, world_size, self.accumulate()),
            *(length, batches_done, per_epoch, len(self.train_source) / (length * world_size)),
            ahead_in(self.train_source),
        )
        sampler.planned = (0, first)
        cut = Cut(
            *(self.train_layout.patch_size, self.interpolation, self.crop_scale, self.flip),
            self.rand_augment,
        )
        return self.loader(
            PackedDataset(self.train_source, cut, self.train_layout), sampler, collate
        )

    def warn_of_padding(self, planned: Pass) -> None:
        layout = self.train_layout
        tokens = planned.kept.sum() + len(planned.kept) * layout.num_prefix
        padding = 1.0 - tokens / (len(planned.rows) * layout.row_length)
        steps = len(planned.rows) / (self.num_rows * self.place()[1] * self.accumulate())
        if padding > 0.1 and steps > 5:  # the last step of few images is bound to be padded
            full = sum(len(row) == layout.slots for row in planned.rows) > len(planned.rows) / 2
            more = full and self.max_images is not None
            fix = (
                "a larger data.init_args.max_images"
                if more
                else "another data.init_args.row_length"
            )
            rank_zero_warn(f"{100 * padding:.0f} % of all tokens are padding; {fix} wastes less")

    def check_agreed(self, total: int) -> None:
        """Ranks that planned differently would use images twice or never, or hang."""
        if self.trainer is None or self.trainer.world_size == 1:
            return
        strategy = self.trainer.strategy
        if not strategy.reduce_boolean_decision(strategy.broadcast(total) == total, all=True):
            raise ValueError(
                "the devices see images of different sizes, so they would not train on the same "
                "plan; delete the caches (PATCHLIGHT_CACHE) of all machines and look for images "
                "that only some of them can read"
            )

    def check_reduced(self, sizes: np.ndarray, layout: Layout, resolution: Resolution) -> None:
        """Images that a row or the positions cannot hold get fewer patches than asked for.

        Raises:
            ValueError: more than a hundredth of the images, where `eval_side` asks for their size.
        """
        keys, free = np.arange(len(sizes)), layout._replace(row_length=10**9, max_grid=None)
        asked, given = (
            tokens_of(sizes, keys, shape, resolution, TokenDrop(), 0.0)[0].prod(axis=1)
            for shape in (free, layout)
        )
        share = float((asked != given).mean())
        if share > 0.01:
            message = (
                f"{100 * share:.0f} % of the images are reduced below the side that was asked for: "
                f"they have up to {asked.max() + layout.num_prefix} tokens, but "
                f"data.init_args.row_length is {layout.row_length}"
            )
            if layout.max_grid is not None:
                message += f" and the positions reach {layout.max_grid} patches along a side"
            if resolution.min_side == resolution.max_side:
                raise ValueError(message)
            rank_zero_warn(message)

    def eval_loader(self, source: Source) -> DataLoader[PackedBatch]:
        """The images of a source that are this rank's, each once, no patch of them dropped."""
        sizes, resolution = measure(source), self.eval_resolution()
        layout = self.layout_for(sizes, resolution, TokenDrop())
        self.check_reduced(sizes, layout, resolution)
        planned = plan_evaluation(sizes, layout, resolution, self.buffer)
        self.check_agreed(checksum(planned))
        self.eval_tokens = float(planned.kept.mean()) + layout.num_prefix
        sampler = PackedEvalBatches(planned, self.num_rows, *self.place())
        cut = Cut(layout.patch_size, self.interpolation)
        return self.loader(PackedDataset(source, cut, layout), sampler, collate)

    def on_after_batch_transfer(self, batch: PackedBatch, dataloader_idx: int) -> PackedBatch:
        """Normalise, on the device."""
        return self.normalized(batch)

    def normalized(self, batch: PackedBatch) -> PackedBatch:
        assert self.needs is not None
        patches = batch.images.patches
        shape = (-1, self.channels, self.needs.patch_size, self.needs.patch_size)
        normal = normalize(patches.reshape(shape), self.mean, self.std).reshape(patches.shape)
        return batch._replace(images=batch.images._replace(patches=normal))

    def state_dict(self) -> dict[str, Any]:
        return {**super().state_dict(), "starts": list(self.starts)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        super().load_state_dict(state_dict)
        self.starts = list(state_dict["starts"])


def checksum(planned: Pass) -> int:
    """What changes when the images, their sizes, or how they are packed do."""
    numbers = [len(row) for row in planned.rows]
    order = [image for row in planned.rows for image in row]
    parts = (planned.keys, planned.grids, planned.kept, np.array(numbers), np.array(order))
    total = 0
    for part in parts:
        total = zlib.crc32(np.ascontiguousarray(part).tobytes(), total)
    return total
