"""A small run inside the test process."""

from pathlib import Path
from typing import Any

from lightning.pytorch import Trainer, seed_everything
from lightning.pytorch.loggers import TensorBoardLogger

from callbacks.checkpoint import AtomicCheckpointIO, Checkpoint
from callbacks.seeding import StepSeed
from datamodules import ImageDataModule
from modules import Supervised
from modules.backbones import ViT
from modules.optim import Optimization


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
    checkpoint = changes.pop("checkpoint", None) or Checkpoint(every_n_steps=1)
    return Trainer(
        **arguments | changes,
        logger=TensorBoardLogger(directory, "run", default_hp_metric=False),
        callbacks=[StepSeed(), checkpoint, *callbacks],
        plugins=[AtomicCheckpointIO()],
    )
