"""When pictures go to TensorBoard."""

from typing import Any

import torch
from jaxtyping import Float
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.loggers import TensorBoardLogger
from torch import Tensor
from torchvision.utils import make_grid


def for_display(
    images: Float[Tensor, "b c height width"], columns: int = 8
) -> Float[Tensor, "3 rows columns"]:
    """A grid in [0, 1] of normalised images, all stretched by one and the same range."""
    images = images.detach().float().cpu()
    low, high = images.amin(dim=(0, 2, 3)), images.amax(dim=(0, 2, 3))
    images = (images - low[:, None, None]) / (high - low).clamp_min(1e-6)[:, None, None]
    return torch.as_tensor(make_grid(images, nrow=columns, padding=1, pad_value=1.0))


class AugmentedBatch(Callback):
    """Once a run: the first training batch (32 images of it) as the network sees it."""

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int
    ) -> None:
        if trainer.fit_loop.total_batch_idx > 0 or not trainer.is_global_zero:
            return
        for logger in trainer.loggers:
            if isinstance(logger, TensorBoardLogger):
                grid = for_display(batch[0][:32])
                logger.experiment.add_image("train/augmented_batch", grid, 0)
