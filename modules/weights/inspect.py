"""What a checkpoint holds: whose it is, and the backbone it fits."""

import math
import re
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from modules.backbones.positions import sincos2d
from modules.backbones.vit import VARIANTS, Size
from modules.weights.files import State
from modules.weights.names import is_google, with_our_names

HEADS = ("head.weight", "head.bias", "head_dist.weight", "head_dist.bias")
MARKS = (  # a name that only this code base writes
    (r"\.gamma_1$", "DeiT-III"),
    (r"^(mask_token|decoder_)", "MAE"),
    (r"^head\.(mlp|last_layer)\.", "DINO"),
    (r"^(positions|relative)\.", "Patchlight"),
    (r"^(pos_embed|cls_token)$", "timm, DeiT or DINO"),
)


@dataclass(frozen=True)
class Description:
    """One network of a checkpoint.

    writer:      the code base whose names it has
    backbone:    arguments of `modules.backbones.ViT` that it fits, or None where it is no ViT
    num_classes: of its head, or None where it has none
    others:      names that belong neither to the backbone nor to its heads
    """

    writer: str
    num_tensors: int
    num_parameters: int
    backbone: dict[str, Any] | None
    num_classes: int | None
    others: tuple[str, ...]


def describe(theirs: State) -> Description:
    """Say what a network of a checkpoint is, from the names and shapes in it."""
    state, _ = with_our_names(theirs)
    writer = "Google (npz)" if is_google(theirs) else "unknown"
    for pattern, name in MARKS if writer == "unknown" else ():
        if any(re.search(pattern, key) for key in theirs):
            writer = name
            break
    backbone = vit_arguments(state, theirs) if "blocks.0.norm1.weight" in state else None
    is_part = re.compile(
        r"(patch_embed\.proj|blocks\.\d+|norm|fc_norm|attn_pool|pre_logits|positions|relative)\.|"
        r"(cls|dist|reg)_token$"
    )
    others = [k for k in state if k not in HEADS and not (backbone and is_part.match(k))]
    head = state.get("head.weight")
    return Description(
        writer,
        num_tensors=len(theirs),
        num_parameters=sum(tensor.numel() for tensor in theirs.values()),
        backbone=backbone,
        num_classes=None if head is None else head.shape[0],
        others=tuple(others),
    )


def vit_arguments(state: State, theirs: State) -> dict[str, Any]:
    """Arguments of `ViT` that differ from its defaults; the activation leaves no trace."""
    dim, channels, patch, _ = state["patch_embed.proj.weight"].shape
    depth = 1 + max(int(m[1]) for k in state if (m := re.match(r"blocks\.(\d+)\.", k)))
    mlp_dim = state["blocks.0.mlp.fc2.weight"].shape[1]
    arguments: dict[str, Any] = size_arguments(state, theirs, Size(depth, dim, 0, mlp_dim))
    arguments |= {"patch_size": patch, "in_channels": channels}
    arguments |= position_arguments(state, patch)
    has_cls = "cls_token" in state
    if "attn_pool.latent" in state:
        arguments["pooling"] = "map"
    elif "fc_norm.weight" in state:
        arguments["pooling"] = "avg"
    elif not has_cls:
        arguments["pooling"] = "norm_avg"
    block: dict[str, Any] = {}
    if state["blocks.0.mlp.fc1.weight"].shape[0] == 2 * mlp_dim:
        block["mlp"] = "swiglu"
    if "blocks.0.attn.qkv.bias" not in state:
        block["qkv_bias"] = False
    if "blocks.0.attn.q_norm.weight" in state:
        block["qk_norm"] = True
    if "blocks.0.ls1.gamma" in state:
        block["layer_scale"] = 1e-5
    registers = state["reg_token"].shape[1] if "reg_token" in state else 0
    found = {
        "class_token": has_cls,
        "distillation_token": "dist_token" in state,
        "num_registers": registers,
        "pre_logits": "pre_logits.weight" in state,
        "block": block,
    }
    defaults = {
        **{"class_token": True, "distillation_token": False, "num_registers": 0},
        **{"pre_logits": False, "block": {}, "patch_size": 16, "in_channels": 3},
        **{"image_size": 224},
    }
    arguments |= found
    return {k: v for k, v in arguments.items() if k not in defaults or v != defaults[k]}


def size_arguments(state: State, theirs: State, size: Size) -> dict[str, Any]:
    """The variant of that size, or its numbers; heads are 64 wide unless the file says more."""
    for name, known in VARIANTS.items():
        if known._replace(num_heads=0) == size:
            return {"variant": name}
    head_dim = 64
    if "blocks.0.attn.q_norm.weight" in state:
        head_dim = state["blocks.0.attn.q_norm.weight"].shape[0]
    for name, tensor in theirs.items():
        if re.search(r"encoderblock.*/query/kernel$", name):
            head_dim = tensor.shape[-1]
    heads = max(1, size.embed_dim // head_dim)
    return {**size._asdict(), "num_heads": heads}


def position_arguments(state: State, patch: int) -> dict[str, Any]:
    """Kind of positions and the image size they are for."""
    if "positions.table" not in state:
        kinds = {
            "positions.columns": "learned2d",
            "positions.0.columns": "learned2d",
            "positions.0.table": "learned1d",
            "relative.table": "relative",
            "relative.0.table": "relative",
        }
        kind = next((kind for name, kind in kinds.items() if name in state), "none")
        inject = "every" if any(name.startswith("positions.0.") for name in state) else None
        return {"positions": {"kind": kind, **({"inject": inject} if inject else {})}}
    table = state["positions.table"]
    names = ("cls_token", "dist_token", "reg_token")
    tokens = [state[name].shape[1] for name in names if name in state]
    found: dict[str, Any] = {}
    for prefix in dict.fromkeys((sum(tokens), 0)):
        side = math.isqrt(table.shape[1] - prefix)
        if side * side == table.shape[1] - prefix:
            found["image_size"] = patch * side
            if is_sincos(table[0, prefix:], side):
                found["positions"] = {"kind": "sincos2d"}
            elif tokens and not prefix:
                found["positions"] = {"prefix_rows": False}
            break
    return found


def is_sincos(table: Tensor, side: int) -> bool:
    dim = table.shape[1]
    if dim % 4:
        return False
    return torch.allclose(table.float(), sincos2d(dim, (side, side)), atol=1e-4)
