"""A small MAE run on embedded digits."""

from typing import Any

from lightning.pytorch import seed_everything

from datamodules import ImageDataModule
from modules import MAE
from modules.backbones import Positions, ViT
from modules.mae import Autoencoder
from modules.optim import Optimization
from tests import small

DECODER = {"decoder_dim": 16, "decoder_depth": 1, "decoder_heads": 2}


def backbone(**changes: Any) -> ViT:
    arguments: dict[str, Any] = {"patch_size": 4, "image_size": 16, "in_channels": 1}
    return ViT("mu", **arguments | {"positions": Positions("sincos2d")} | changes)


def autoencoder(**changes: Any) -> Autoencoder:
    seed_everything(7, verbose=False)
    network = changes.pop("backbone", None) or backbone()
    return Autoencoder(network, **DECODER | changes)


def optimization(**changes: Any) -> Optimization:
    arguments: dict[str, Any] = {
        "base_lr": 1e-3,
        "reference_batch": None,
        "weight_decay": 0.05,
        "beta2": 0.95,
        "warmup_epochs": 1.0,
        "min_lr": 0.0,
    }
    if changes.get("name") == "sgd":
        del arguments["beta2"]
    return Optimization(**arguments | changes)


def method(**changes: Any) -> MAE:
    seed_everything(7, verbose=False)
    network = changes.pop("backbone", None) or backbone()
    return MAE(network, **{"optimizer": optimization()} | DECODER | changes)


def data(**changes: Any) -> ImageDataModule:
    arguments: dict[str, Any] = {"source": "digits", "channels": 1, "image_size": 16}
    arguments |= {"mean": (0.5,), "std": (0.5,), "batch_size": 8, "num_workers": 0}
    return ImageDataModule(**arguments | changes)


def trainer(*arguments: Any, **changes: Any) -> Any:
    checkpoint = small.Checkpoint(every_n_steps=1, monitor=None)
    return small.trainer(*arguments, **{"checkpoint": checkpoint} | changes)
