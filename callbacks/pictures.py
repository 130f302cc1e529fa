"""When pictures go to TensorBoard."""

import math
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Protocol, runtime_checkable

import torch
from einops import rearrange
from jaxtyping import Float, Int
from lightning.fabric.utilities import move_data_to_device
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.utilities import rank_zero_warn
from lightning.pytorch.utilities.seed import isolate_rng
from torch import Tensor
from torchvision.utils import make_grid

from datamodules.batch import MultiCropBatch, PackedImages, TextBatch
from datamodules.module import SourceDataModule
from datamodules.text import TextDataModule


def for_display(
    images: Float[Tensor, "b c height width"], columns: int = 8
) -> Float[Tensor, "3 rows columns"]:
    """A grid in [0, 1] of normalised images, all stretched by one and the same range."""
    images = images.detach().float().cpu()
    low, high = images.amin(dim=(0, 2, 3)), images.amax(dim=(0, 2, 3))
    images = (images - low[:, None, None]) / (high - low).clamp_min(1e-6)[:, None, None]
    return torch.as_tensor(make_grid(images, nrow=columns, padding=1, pad_value=1.0))


def owners(packed: PackedImages) -> Int[Tensor, "rows n"]:
    """The image of every token; at padding, which is no patch, a number without meaning."""
    rows = len(packed.segments)
    first = torch.arange(rows)[:, None].to(packed.segments) * (len(packed.grids) // rows)
    return packed.segments + first


def unpack(
    packed: PackedImages, channels: int, count: int
) -> Float[Tensor, "count channels height width"]:
    """The first images of a pack beside each other, on canvases of the largest size.

    What was dropped, and what an image does not reach, has the largest value of the pack: white.
    """
    packed = move_data_to_device(packed, torch.device("cpu"))
    owner = owners(packed)
    is_patch = packed.positions[..., 0] >= 0
    shown = sorted(set(owner[is_patch].tolist()))[:count]
    side = math.isqrt(packed.patches.shape[-1] // channels)
    rows, columns = (int(n) for n in packed.grids[shown].amax(0))
    white = packed.patches[is_patch].amax()
    canvas = white.expand(len(shown), rows, columns, packed.patches.shape[-1]).clone()
    for place, image in enumerate(shown):
        chosen = is_patch & (owner == image)
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
        if isinstance(batch, TextBatch):  # there is nothing to see
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


@runtime_checkable
class Draws(Protocol):
    """What `Pictures` needs of a method."""

    def pictures(self, images: Any) -> dict[str, Float[Tensor, "3 rows columns"]]:
        """Pictures in [0, 1], by name, of the method in eval mode.

        Of normalised images [b, c, height, width], or of a `TextBatch`.
        """
        ...


class Pictures(Callback):
    """What the method draws of held-out images or texts, always the same, in TensorBoard.

    Logs `pictures/NAME` at the end of every `every_n_epochs`-th epoch and of the training, from
    rank 0. Training goes on as if nothing had happened.

    Of images of many sizes (packs) those of the most frequent size in the first pack are taken.

    Args:
        every_n_epochs: epochs from one drawing to the next.
        num_images: how many images, or pairs of texts; the first ones of the validation data.

    Raises:
        ValueError: numbers below 1, or a method that draws nothing.
    """

    def __init__(self, every_n_epochs: int = 1, num_images: int = 4) -> None:
        for name, value in (("every_n_epochs", every_n_epochs), ("num_images", num_images)):
            if value < 1:
                raise ValueError(f"{name} is {value}; expected at least 1")
        self.every_n_epochs, self.num_images = every_n_epochs, num_images
        self.images: Tensor | TextBatch | None = None
        self.drawn_at = -1

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if not isinstance(pl_module, Draws):
            raise ValueError(
                f"callbacks.Pictures needs a method that draws, and {type(pl_module).__name__} "
                f"has no pictures(images); remove it from trainer.callbacks"
            )

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if (trainer.current_epoch + 1) % self.every_n_epochs == 0:
            self.draw(trainer, pl_module)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self.drawn_at != trainer.global_step:
            self.draw(trainer, pl_module)

    def draw(self, trainer: Trainer, pl_module: LightningModule) -> None:
        boards = [each for each in trainer.loggers if isinstance(each, TensorBoardLogger)]
        if not boards:
            return
        assert isinstance(pl_module, Draws)
        # A loader draws a seed for its workers.
        with isolate_rng(), evaluating(pl_module), torch.no_grad():
            if self.drawn_at < 0:  # on all ranks, which may have to agree on the batches
                self.images = held_out(trainer, pl_module.device, self.num_images)
            self.drawn_at = trainer.global_step
            if self.images is None or not trainer.is_global_zero:
                return
            pictures = pl_module.pictures(move_data_to_device(self.images, pl_module.device))
        for board in boards:
            for name, picture in pictures.items():
                board.experiment.add_image(f"pictures/{name}", picture, trainer.global_step)


@contextmanager
def evaluating(network: torch.nn.Module) -> Iterator[None]:
    """Eval mode; afterwards every part is in the mode that it was in."""
    modes = [(part, part.training) for part in network.modules()]
    network.eval()
    try:
        yield
    finally:
        for part, mode in modes:
            part.training = mode


def held_out(
    trainer: Trainer, device: torch.device, count: int
) -> Float[Tensor, "b c height width"] | TextBatch | None:
    """The first readable validation images, all of one size; None, with a warning, without any.

    Of texts the first pairs.
    """
    data = getattr(trainer, "datamodule", None)
    if isinstance(data, TextDataModule):
        return data.examples(count, device)
    found: list[Tensor] = []
    if isinstance(data, SourceDataModule):
        for batch in data.eval_batches(data.val_source, device):
            images = batch.images
            if isinstance(images, PackedImages):
                found += whole_images(images, batch.is_valid, data.channels)
            else:
                found += images[batch.is_valid].cpu().unbind()
            if len(found) >= count:
                break
    if not found:
        rank_zero_warn("there are no validation images to draw: no pictures in TensorBoard")
        return None
    frequent = Counter(image.shape for image in found).most_common(1)[0][0]
    return torch.stack([image for image in found if image.shape == frequent][:count])


def whole_images(packed: PackedImages, is_valid: Tensor, channels: int) -> list[Tensor]:
    """The images [c, height, width] of a pack that nothing was dropped of, on the CPU."""
    owner, is_patch = owners(packed), packed.positions[..., 0] >= 0
    side = math.isqrt(packed.patches.shape[-1] // channels)
    images = []
    for image in is_valid.nonzero().flatten().tolist():
        rows, columns = packed.grids[image].tolist()
        patches = packed.patches[is_patch & (owner == image)].cpu()
        shape = {"y": rows, "x": columns, "c": channels, "p": side, "q": side}
        images.append(rearrange(patches, "(y x) (c p q) -> c (y p) (x q)", **shape))
    return images
