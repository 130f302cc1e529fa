"""What a checkpoint holds: whose it is, and the backbone it fits."""

import math
import re
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from modules.backbones import BlockStyle, LVViT, Positions, ViT
from modules.backbones.lvvit import MLP_RATIO
from modules.backbones.lvvit import VARIANTS as LV_VARIANTS
from modules.backbones.resampling import sincos2d
from modules.backbones.vit import VARIANTS, Size
from modules.weights.files import State
from modules.weights.names import BESIDE, is_google, with_our_names
from modules.weights.positions import tokens_of

HEADS = tuple(f"{h}.{p}" for h in ("head", "head_dist", "aux_head") for p in ("weight", "bias"))
MARKS = (  # a name that only this code base writes
    (r"\.gamma_1$", "DeiT-III"),
    (r"^(mask_token|decoder_)", "MAE"),
    (r"^head\.(mlp|last_layer)\.", "DINO"),
    (r"^(positions|relative)\.", "Patchlight"),
    (r"^patch_embed\.conv1\.", "LV-ViT"),
    (r"^(pos_embed|cls_token)$", "timm, DeiT or DINO"),
)
UNKNOWN = "?"


@dataclass(frozen=True)
class Description:
    """One network of a checkpoint.

    writer:      the code base whose names it has
    kind:        which of ours it is
    backbone:    arguments of it that the network fits, UNKNOWN where shapes do not tell; None
                 where it is neither
    num_classes: of its head, or None where it has none
    others:      names that belong neither to the backbone nor to its heads
    """

    writer: str
    num_tensors: int
    num_parameters: int
    kind: type[ViT | LVViT]
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
    backbone, others = None, [name for name in state if name not in HEADS]
    kind = LVViT if "patch_embed.conv1.weight" in state else ViT
    try:
        guess = lvvit_arguments(state) if kind is LVViT else vit_arguments(state, theirs)
        rest = left_over(state, guess, kind)
    except (KeyError, ValueError):  # not the tensors of a ViT, or not in their shapes
        guess, rest = {}, others
    if guess and all(BESIDE.match(name) for name in rest):
        backbone, others = guess, rest
    head = state.get("head.weight")
    return Description(
        writer,
        num_tensors=len(theirs),
        num_parameters=sum(tensor.numel() for tensor in theirs.values()),
        kind=kind,
        backbone=backbone,
        num_classes=None if head is None else head.shape[0],
        others=tuple(others),
    )


def left_over(state: State, arguments: dict[str, Any], kind: type[ViT | LVViT] = ViT) -> list[str]:
    """Names that a backbone of these arguments has no place for.

    Raises:
        ValueError: the state does not fill such a one.
    """
    built = {"positions": Positions, "block": BlockStyle}
    given = {k: built[k](**v) if k in built else v for k, v in arguments.items()}
    given |= {k: 1 for k in ("num_heads", "residual_scale") if given.get(k) == UNKNOWN}
    with torch.device("meta"):
        wanted = {name: tensor.shape for name, tensor in kind(**given).state_dict().items()}
    needed = {n: shape for n, shape in wanted.items() if not n.endswith("num_batches_tracked")}
    if any(name not in state or state[name].shape != shape for name, shape in needed.items()):
        raise ValueError("another network")
    computed = {"positions.table"} if is_fixed(arguments) else set()
    return [name for name in state if name not in {*wanted, *HEADS, *computed}]


def is_fixed(arguments: dict[str, Any]) -> bool:
    return str(arguments.get("positions", {}).get("kind", "")).startswith("sincos")


def vit_arguments(state: State, theirs: State) -> dict[str, Any]:
    """Arguments of `ViT` that differ from its defaults.

    Raises:
        KeyError, ValueError: the state is no ViT's.
    """
    dim, channels, patch, _ = state["patch_embed.proj.weight"].shape
    depth = 1 + max(int(m[1]) for k in state if (m := re.match(r"blocks\.(\d+)\.", k)))
    mlp_dim = state["blocks.0.mlp.fc2.weight"].shape[1]
    has_cls = "cls_token" in state
    if "attn_pool.latent" in state:
        pooling = "map"
    elif "fc_norm.weight" in state:
        pooling = "avg"
    else:
        pooling = "cls" if has_cls else "norm_avg"
    block: dict[str, Any] = {}
    if state["blocks.0.mlp.fc1.weight"].shape[0] == 2 * mlp_dim:
        block["mlp"] = "swiglu"
    if "blocks.0.attn.qkv.bias" not in state:
        block["qkv_bias"] = False
    if "blocks.0.attn.q_norm.weight" in state:
        block["qk_norm"] = "layer"
    elif "blocks.0.attn.q_norm.gamma" in state:
        block["qk_norm"] = "rms"  # or "rms_unscaled": weights do not tell
    if "blocks.0.attn.proj.bias" not in state:
        block["proj_bias"] = False
    if "blocks.0.norm1.bias" not in state:
        block["norm_bias"] = False
    if "blocks.0.ls1.gamma" in state:
        block["layer_scale"] = 1e-5
    found = {
        **size_arguments(state, theirs, Size(depth, dim, 0, mlp_dim)),
        **{"patch_size": patch, "in_channels": channels, "pooling": pooling},
        **position_arguments(state, patch),
        "class_token": has_cls,
        "distillation_token": "dist_token" in state,
        "num_registers": state["reg_token"].shape[1] if "reg_token" in state else 0,
        "pre_logits": "pre_logits.weight" in state,
        "block": block,
    }
    defaults: dict[str, Any] = {
        **{"class_token": True, "distillation_token": False, "num_registers": 0},
        **{"pre_logits": False, "block": {}, "patch_size": 16, "in_channels": 3},
        **{"image_size": 224, "pooling": "cls"},
    }
    return {k: v for k, v in found.items() if k not in defaults or v != defaults[k]}


def lvvit_arguments(state: State) -> dict[str, Any]:
    """Arguments of `LVViT` that differ from its defaults.

    Raises:
        KeyError, ValueError: the state is no LV-ViT's.
    """
    dim, stem, half, _ = state["patch_embed.proj.weight"].shape
    depth = 1 + max(int(m[1]) for k in state if (m := re.match(r"blocks\.(\d+)\.", k)))
    mlp_dim = state["blocks.0.mlp.fc1.weight"].shape[0]
    size: dict[str, Any] = {"depth": depth, "embed_dim": dim, "stem_dim": stem}
    size |= {"num_heads": UNKNOWN, "residual_scale": UNKNOWN}  # neither leaves a trace
    for name, known in LV_VARIANTS.items():
        if (known.depth, known.embed_dim, known.stem_dim) == (depth, dim, stem):
            size = {"variant": name}
    found = {
        **{"patch_size": 2 * half, "in_channels": state["patch_embed.conv1.weight"].shape[1]},
        **position_arguments(state, 2 * half),
        "mlp_dim": mlp_dim,
    }
    defaults = {"patch_size": 16, "in_channels": 3, "image_size": 224, "mlp_dim": MLP_RATIO * dim}
    return size | {k: v for k, v in found.items() if k not in defaults or v != defaults[k]}


def size_arguments(state: State, theirs: State, size: Size) -> dict[str, Any]:
    """The variant of that size, or its numbers, with the heads where something tells them."""
    for name, known in VARIANTS.items():
        if known._replace(num_heads=0) == size:
            return {"variant": name}
    heads: int | str = UNKNOWN
    if "blocks.0.attn.q_norm.weight" in state:
        heads = size.embed_dim // state["blocks.0.attn.q_norm.weight"].shape[0]
    for name, tensor in [*theirs.items(), *state.items()]:
        if re.search(r"encoderblock.*/query/kernel$", name):
            heads = tensor.shape[-2]
        elif re.fullmatch(r"relative\.(0\.)?table", name):
            heads = tensor.shape[-1]
    return {**size._asdict(), "num_heads": heads}


def position_arguments(state: State, patch: int) -> dict[str, Any]:
    """Kind of positions and the image size they are for."""
    own = "0." if any(re.match(r"(positions|relative)\.0\.", name) for name in state) else ""
    inject = {"inject": "every"} if own else {}
    if f"positions.{own}columns" in state:
        rows, columns = (state[f"positions.{own}{n}"].shape[1] for n in ("rows", "columns"))
        has_rows = f"positions.{own}prefix" in state or not tokens_of(state)
        how = {"kind": "learned2d", **inject, **({} if has_rows else {"prefix_rows": False})}
        return {"positions": how, "image_size": as_size(rows * patch, columns * patch)}
    if f"relative.{own}table" in state:
        rows, columns = ((n + 1) // 2 for n in state[f"relative.{own}table"].shape[:2])
        how = {"kind": "relative", "inject": "every" if own else "every_shared"}
        return {"positions": how, "image_size": as_size(rows * patch, columns * patch)}
    if f"positions.{own}table" not in state:
        return {"positions": {"kind": "none"}}
    table = state[f"positions.{own}table"]
    for prefix in dict.fromkeys((sum(tokens_of(state).values()), 0)):
        side = math.isqrt(max(0, table.shape[1] - prefix))
        if side and side * side == table.shape[1] - prefix:
            how = dict(inject)
            if is_sincos(table[0, prefix:], side):
                how = {"kind": "sincos2d"}
            elif tokens_of(state) and not prefix:
                how["prefix_rows"] = False
            return {"image_size": patch * side, **({"positions": how} if how else {})}
    raise ValueError("a table of no square grid")


def as_size(height: int, width: int) -> int | list[int]:
    return height if height == width else [height, width]


def is_sincos(table: Tensor, side: int) -> bool:
    dim = table.shape[1]
    if dim % 4 or dim == 4:
        return False
    return torch.allclose(table.float(), sincos2d(dim, (side, side)), atol=1e-3)
