"""A small DINO run: embedded digits, each as two global and two local views."""

from typing import Any

import torch
from lightning.pytorch import seed_everything
from torch import Tensor

from datamodules.batch import ImageBatch, MultiCropBatch
from datamodules.images import ImageDataModule
from modules import DINO
from modules.backbones import ViT
from modules.optim import Optimization
from tests import small


class Views(ImageDataModule):
    """Views that are a function of the image alone."""

    def on_after_batch_transfer(self, batch: ImageBatch, dataloader_idx: int) -> Any:
        batch = super().on_after_batch_transfer(batch, dataloader_idx)
        if self.trainer is None or not self.trainer.training:
            return batch
        return views(batch)


def views(batch: ImageBatch) -> MultiCropBatch:
    whole: Tensor = batch.images
    crops = (
        torch.stack((whole, whole.roll(3, dims=-1))),
        torch.stack((whole[..., :8, :8], whole[..., 4:12, 6:14])),
    )
    return MultiCropBatch(crops, *batch[1:6])


def data(**changes: Any) -> Views:
    arguments: dict[str, Any] = {
        "source": "digits",
        "channels": 1,
        "image_size": 16,
        "mean": (0.5,),
        "std": (0.5,),
        "batch_size": 8,
        "num_workers": 0,
    }
    return Views(**arguments | changes)


def optimization(**changes: Any) -> Optimization:
    arguments: dict[str, Any] = {
        "base_lr": 1e-3,
        "reference_batch": None,
        "weight_decay": 0.04,
        "weight_decay_end": 0.4,
        "schedule": "dino_cosine",
        "warmup_epochs": 1.0,
        "clip_norm": 3.0,
        "clip_per_parameter": True,
    }
    return Optimization(**arguments | changes)


def backbone(**changes: Any) -> ViT:
    arguments: dict[str, Any] = {"patch_size": 4, "image_size": 16, "in_channels": 1}
    return ViT("mu", **arguments | changes)


def method(**changes: Any) -> DINO:
    seed_everything(7, verbose=False)
    arguments: dict[str, Any] = {
        "optimizer": optimization(),
        "num_prototypes": 48,
        "hidden_dim": 24,
        "bottleneck_dim": 12,
        "warmup_teacher_temperature": 0.04,
        "teacher_temperature": 0.07,
        "warmup_teacher_epochs": 3,
    }
    network = backbone(**changes.pop("backbone", {"drop_path": 0.2}))  # drawn from the seed
    return DINO(network, **arguments | changes)


def trainer(*arguments: Any, **changes: Any) -> Any:
    checkpoint = small.Checkpoint(every_n_steps=1, monitor=None)
    return small.trainer(*arguments, **{"checkpoint": checkpoint} | changes)
