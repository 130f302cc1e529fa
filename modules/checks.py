"""What methods ask of their arguments, their data and the trainer before the first step."""

from typing import Any

import torch
from lightning.pytorch import Trainer
from lightning.pytorch.utilities import rank_zero_warn

from datamodules.images import ImageDataModule
from datamodules.module import SourceDataModule
from datamodules.token_labels import TokenLabelDataModule
from modules.backbones import Backbone


def check_at_least(least: int, **values: float) -> None:
    """Refuse values, by name, below `least`.

    Raises:
        ValueError: one of them.
    """
    for name, value in values.items():
        if value < least:
            raise ValueError(f"{name} is {value}; expected at least {least}")


def check_masks(backbone: Backbone) -> None:
    """Refuse a backbone that cannot do without some patches.

    Raises:
        ValueError: such a one.
    """
    if not backbone.takes_masks:
        raise ValueError(
            f"masked_patches hides patches, and {type(backbone).__name__} takes no masks; set "
            f"masked_patches to null or use modules.backbones.ViT"
        )


def check_visible(backbone: Backbone) -> None:
    """Refuse a backbone that needs all patches of an image.

    Raises:
        ValueError: such a one.
    """
    if not backbone.takes_visible:
        raise ValueError(
            f"MAE shows its encoder some patches and no others, and this {type(backbone).__name__} "
            f"needs the whole grid (relative positions, windows and convolutions do); use "
            f"modules.backbones.ViT with learned1d, learned2d or sincos2d positions"
        )


def check_classes(data: Any, num_classes: int) -> None:
    """Refuse a data module without labels or with more classes than a method has outputs.

    Raises:
        ValueError: either of them. Fewer classes are warned of; data that does not say how many
            it has is taken as it is.
    """
    names = getattr(data, "class_names", None)
    if names is None:
        return
    if not names:
        raise ValueError("the data has no labels, and supervised training needs them")
    if len(names) > num_classes:
        raise ValueError(
            f"the data has {len(names)} classes, but model.num_classes is {num_classes}; set it "
            f"to {len(names)}"
        )
    if len(names) < num_classes:
        rank_zero_warn(
            f"the data has {len(names)} classes, but model.num_classes is {num_classes}: some "
            f"outputs are never right"
        )


def check_token_labels(data: Any, num_classes: int, are_dense: bool) -> None:
    """Refuse data without a class or a label map for what a method learns.

    Args:
        are_dense: whether every token needs a label.

    Raises:
        ValueError: maps of other classes, tokens without labels, views or packs of images.
    """
    if isinstance(data, TokenLabelDataModule):
        if data.num_label_classes not in (None, num_classes):
            raise ValueError(
                f"the label maps in {data.labels} are of {data.num_label_classes} classes, but "
                f"model.num_classes is {num_classes}; set it to {data.num_label_classes}"
            )
        if data.label_size == (1, 1) and are_dense:
            raise ValueError(
                "an image has one label, as data.init_args.label_size is 1 or the backbone makes "
                "one patch of it; set model.init_args.dense_weight to 0, or label_size to null "
                "with more patches"
            )
    elif isinstance(data, SourceDataModule) and not isinstance(data, ImageDataModule):
        raise ValueError(
            f"token labelling takes one view an image, of one size, which {type(data).__name__} "
            f"does not give; use datamodules.TokenLabelDataModule, or ImageDataModule without maps"
        )


def check_patches(data: TokenLabelDataModule, backbone: Backbone) -> None:
    """Refuse a backbone whose patches are not the squares that have labels.

    Those that take masks cut images into such squares; others are asked.

    Raises:
        ValueError: other patches.
    """
    if backbone.takes_masks:
        return
    modes = [(part, part.training) for part in backbone.modules()]
    (height, width), like = data.known_size(), next(backbone.parameters())
    with torch.no_grad():
        images = torch.zeros(1, backbone.in_channels, height, width, device=like.device)
        grid = backbone.eval()(images).grid
    for part, mode in modes:
        part.training = mode
    if grid != data.label_size:
        raise ValueError(
            f"{type(backbone).__name__} makes {grid} patches of an image of {height}x{width}, and "
            f"the data has labels for {data.label_size}, squares of {backbone.patch_size} pixels; "
            f"set data.init_args.image_size to a multiple of that, or "
            f"model.init_args.dense_weight to 0"
        )


def check_precision(trainer: Trainer) -> None:
    """Refuse precisions that keep the weights in fewer than 32 bits.

    Raises:
        ValueError: one of them.
    """
    if trainer.precision not in ("32-true", "bf16-mixed", "16-mixed"):
        raise ValueError(
            f"trainer.precision is {trainer.precision!r}; expected 32-true, bf16-mixed or "
            f"16-mixed, which keep the weights in float32"
        )
