"""What a run's backbone is called and what it costs, from its config alone."""

import json
import textwrap
from collections.abc import Callable
from functools import lru_cache
from typing import NamedTuple

import torch
from torch.utils.flop_counter import FlopCounterMode

from experiments.runs import Run, part
from experiments.subject import build_backbone
from modules.backbones import Backbone


class Cost(NamedTuple):
    """What a backbone costs; None where it cannot be told.

    side: (height, width) in pixels of the image
    grid: rows and columns of its patches
    """

    parameters: int | None = None
    macs: int | None = None
    side: tuple[int, int] | None = None
    note: str = ""
    grid: tuple[int, int] | None = None


@lru_cache(maxsize=256)
def cost(backbone: str, data_side: tuple[int, int] | None) -> Cost:
    """`measure` of a backbone by its `class_path` and `init_args` as JSON."""
    return measure(lambda: build_backbone(json.loads(backbone)), data_side)


def measure(build: Callable[[], Backbone], data_side: tuple[int, int] | None) -> Cost:
    """Parameters and multiply-adds of a backbone.

    The image has the size that the backbone is made for, or else that of the data. Nothing is
    computed and no weights are held: tensors on the meta device have shapes only.
    """
    parameters = None
    try:
        with torch.device("meta"):
            built = build()
        built.to("meta").eval()  # tables that are computed were made on the CPU
        parameters = sum(parameter.numel() for parameter in built.parameters())
        side = built.image_size or data_side
        if side is None:
            return Cost(parameters, note="the backbone takes any size, and the data gives none")
        image = torch.zeros(1, built.in_channels, *side, device="meta")
        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            features = built(image)
    except Exception as error:  # an old run of a class that is no more must not hide the others
        return Cost(parameters, note=f"the backbone cannot be built: {reason(error)}")
    macs = int(counter.get_total_flops()) // 2  # 2 FLOPs a multiply-add
    return Cost(parameters, macs, side, grid=features.grid)


def reason(error: Exception) -> str:
    """What was wrong, in a line, without what jsonargparse says around it."""
    _, _, inner = str(error).partition("Errors:")
    text = " ".join((inner.partition("- Expected")[0] or str(error)).split())
    return textwrap.shorten(text.removeprefix("- ") or type(error).__name__, 200)


def cost_of(run: Run) -> Cost:
    """Of a run's backbone; nothing is known of a run that has none."""
    backbone = run.arguments.get("backbone")
    if backbone is None:
        return Cost()
    side = run.data.get("eval_side") or run.data.get("image_size")
    pair = tuple(side) if isinstance(side, list) else (side, side) if side else None
    return cost(json.dumps(backbone), pair)


def backbone_name(run: Run, side: tuple[int, int] | None) -> str:
    """Family, variant, patch and image side, such as `ViT-S/16 224`, and what is not the variant's.

    A network of timm's has its name, `timm:resnet50 224`. Empty where the run has no backbone.
    """
    given = run.arguments.get("backbone")
    if not isinstance(given, dict):
        return ""
    arguments = part(given, "init_args")
    name = str(given.get("class_path", "")).rsplit(".", 1)[-1]
    if name == "Timm":
        name = f"timm:{arguments.get('name')}"
    name += f"-{arguments['variant']}" if arguments.get("variant") else ""
    name += f"/{arguments['patch_size']}" if arguments.get("patch_size") else ""
    if side is not None:
        name += f" {side[0]}" if side[0] == side[1] else f" {side[0]}x{side[1]}"
    for key, word in (("depth", "depth"), ("embed_dim", "width")):
        name += f", {word} {arguments[key]}" if arguments.get(key) else ""
    return name
