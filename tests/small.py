"""A small run inside the test process."""

from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Trainer, seed_everything
from lightning.pytorch.loggers import TensorBoardLogger
from torch import nn

from callbacks.checkpoint import Checkpoint
from callbacks.checkpoint_files import AtomicCheckpointIO
from callbacks.seeding import StepSeed
from datamodules import ImageDataModule
from modules import Supervised
from modules.backbones import Backbone, Features, ViT
from modules.optim import Optimization


class Pixels(Backbone):
    """Its features are the pixels of digits, times a weight; a linear layer can read them."""

    embed_dim, patch_size, num_prefix_tokens, num_layers = 256, 16, 0, 1
    image_size, max_grid, in_channels = (16, 16), None, 1

    def __init__(self) -> None:
        super().__init__()
        self.weight, self.bias = (nn.Parameter(torch.zeros(1)) for _ in range(2))

    def last_blocks(self, images: Any, count: int) -> list[Features]:
        pixels = self.weight * images.flatten(1) + self.bias
        return [Features(pixels, None, pixels[:, None], (1, 1))]

    def forward(self, images: Any) -> Features:
        return self.last_blocks(images, 1)[0]


def method(**changes: Any) -> Supervised:
    seed_everything(7, verbose=False)
    backbone = changes.pop("backbone", None) or ViT(
        "mu", patch_size=8, image_size=16, in_channels=1, dropout=0.1, drop_path=0.2
    )
    optimizer = Optimization(base_lr=1e-3, reference_batch=None, warmup_epochs=0.5)
    return Supervised(
        **{"backbone": backbone, "num_classes": 10, "optimizer": optimizer, "ema_decay": 0.9}
        | changes
    )


def data(**changes: Any) -> ImageDataModule:
    arguments: dict[str, Any] = {
        "source": "digits",
        "channels": 1,
        "image_size": 16,
        "mean": (0.5,),
        "std": (0.5,),
        "batch_size": 8,
        "num_workers": 0,
        "mixup": 0.5,
        "erasing": 0.3,
    }
    return ImageDataModule(**arguments | changes)


def trainer(directory: Path, *callbacks: Any, **changes: Any) -> Trainer:
    arguments: dict[str, Any] = {
        "accelerator": "cpu",
        "devices": 1,
        "max_epochs": 3,
        "limit_train_batches": 5,
        "limit_val_batches": 2,
        "num_sanity_val_steps": 0,
        "log_every_n_steps": 1,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "use_distributed_sampler": False,
    }
    plugins = [AtomicCheckpointIO(), *changes.pop("plugins", [])]
    checkpoint = changes.pop("checkpoint", None) or Checkpoint(every_n_steps=1)
    return Trainer(
        **arguments | changes,
        logger=TensorBoardLogger(directory, "run", default_hp_metric=False),
        callbacks=[StepSeed(), checkpoint, *callbacks],
        plugins=plugins,
    )
