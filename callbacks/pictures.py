"""When pictures go to TensorBoard."""

import math
from typing import Any

import torch
from einops import rearrange
from jaxtyping import Float
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.loggers import TensorBoardLogger
from torch import Tensor
from torchvision.utils import make_grid

from datamodules.batch import MultiCropBatch, PackedImages


def for_display(
    images: Float[Tensor, "b c height width"], columns: int = 8
) -> Float[Tensor, "3 rows columns"]:
    """A grid in [0, 1] of normalised images, all stretched by one and the same range."""
    images = images.detach().float().cpu()
    low, high = images.amin(dim=(0, 2, 3)), images.amax(dim=(0, 2, 3))
    images = (images - low[:, None, None]) / (high - low).clamp_min(1e-6)[:, None, None]
    return torch.as_tensor(make_grid(images, nrow=columns, padding=1, pad_value=1.0))


def unpack(
    packed: PackedImages, channels: int, count: int
) -> Float[Tensor, "count channels height width"]:
    """The first images of a pack beside each other, on canvases of the largest size.

    What was dropped, and what an image does not reach, has the largest value of the pack: white.
    """
    slots = len(packed.grids) // len(packed.segments)
    owners = (
        packed.segments + torch.arange(len(packed.segments))[:, None].to(packed.segments) * slots
    )
    is_patch = packed.positions[..., 0] >= 0
    shown = sorted(set(owners[is_patch].tolist()))[:count]
    side = math.isqrt(packed.patches.shape[-1] // channels)
    rows, columns = (int(n) for n in packed.grids[shown].amax(0))
    white = packed.patches[is_patch].amax()
    canvas = white.expand(len(shown), rows, columns, packed.patches.shape[-1]).clone()
    for place, image in enumerate(shown):
        chosen = is_patch & (owners == image)
        row, column = packed.positions[chosen].unbind(1)
        canvas[place, row, column] = packed.patches[chosen]
    pattern = "count rows columns (c p q) -> count c (rows p) (columns q)"
    return rearrange(canvas, pattern, c=channels, p=side, q=side)


def beside(batch: MultiCropBatch, count: int) -> Float[Tensor, "count c height width"]:
    """The views of the first images, an image a strip: global ones side by side, then local ones.

    Local views stand in columns, as many as fit below each other. What they leave has the
    largest value of its channel: white.
    """
    height = max(group.shape[-2] for group in batch.crops)
    columns: list[Tensor] = []
    for group in batch.crops:
        views = list(group[:, :count])
        white = group.amax(dim=(0, 1, 3, 4))[:, None, None]
        fitting = height // group.shape[-2]
        for start in range(0, len(views), fitting):
            column = torch.cat(views[start : start + fitting], dim=-2)
            canvas = white.expand(*column.shape[:2], height, column.shape[-1]).clone()
            canvas[:, :, : column.shape[-2]] = column
            columns.append(canvas)
    return torch.cat(columns, dim=-1)


class AugmentedBatch(Callback):
    """Once a run: the first training batch as the network sees it.

    32 images of it, or all views of eight.
    """

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int
    ) -> None:
        if trainer.fit_loop.total_batch_idx > 0 or not trainer.is_global_zero:
            return
        for logger in trainer.loggers:
            if isinstance(logger, TensorBoardLogger):
                if isinstance(batch, MultiCropBatch):
                    grid = for_display(beside(batch, 8), columns=1)
                elif isinstance(batch.images, PackedImages):
                    channels = trainer.datamodule.channels  # type: ignore[attr-defined]
                    grid = for_display(unpack(batch.images, channels, 32))
                else:
                    grid = for_display(batch.images[:32])
                logger.experiment.add_image("train/augmented_batch", grid, 0)
