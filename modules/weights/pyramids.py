"""Weights of Swin and Twins: Microsoft's, Meituan's, timm's and vit-pytorch's names, and ours."""

import math
import re
from typing import Any

from torch import Tensor, nn

from modules.backbones import Swin, TwinsPCPVT, TwinsSVT, TwinsSVTCompact
from modules.backbones.pyramid import Pyramid
from modules.backbones.resampling import resample_grid
from modules.backbones.swin import WindowAttention
from modules.weights.files import State
from modules.weights.names import Origins, rename

# What published files have beside weights: tables that are computed.
COMPUTED = re.compile(r"(attn_mask|relative_position_index|relative_coords_table|k_bias)$")
TABLE = "relative_position_bias_table"
# vit-pytorch's layers of a block, with and without local attention, to ours.
COMPACT = (
    (r"^layers\.(\d+)\.0\.proj\.0\.([gb])$", r"patch_embeds.\1.norm1.\2"),
    (r"^layers\.(\d+)\.0\.proj\.1\.", r"patch_embeds.\1.proj."),
    (r"^layers\.(\d+)\.0\.proj\.2\.([gb])$", r"patch_embeds.\1.norm2.\2"),
    (r"^layers\.(\d+)\.2\.proj\.fn\.", r"pos_block.\1.proj.0."),
    (r"\.fn\.norm\.", ".norm."),
    (r"\.fn\.to_out\.0\.", ".proj."),
    (r"\.fn\.(to_q|to_kv)\.", r".\1."),
    (r"\.fn\.net\.0\.", ".mlp_norm."),
    (r"\.fn\.net\.1\.", ".fc1."),
    (r"\.fn\.net\.4\.", ".fc2."),
    (r"\.g$", ".weight"),
    (r"\.b$", ".bias"),
)


def with_pyramid_names(state: State, backbone: Pyramid) -> tuple[State, Origins, dict[str, str]]:
    """The tensors under our names, for each the names it had, and what was done to some.

    Microsoft's files have the merging of tokens at the end of a stage, timm's at the beginning of
    the next. Tables of biases for another window are brought to this network's.

    Raises:
        ValueError: a table that is of no square window.
    """
    ends = "layers.0.downsample.reduction.weight" in state and isinstance(backbone, Swin)
    ours: State = {}
    origins: Origins = {}
    for name, tensor in state.items():
        if COMPUTED.search(name):
            continue
        new = re.sub(r"^head\.fc\.", "head.", name)
        if ends and (found := re.match(r"layers\.(\d+)\.downsample\.", new)):
            new = f"layers.{int(found[1]) + 1}.downsample.{new[found.end() :]}"
        if isinstance(backbone, TwinsSVTCompact):
            new, tensor = compact(new, tensor, backbone)
        ours[new], origins[new] = tensor, (name,)
    done = fit_windows(ours, backbone) if isinstance(backbone, Swin) else {}
    return ours, origins, done


def compact(name: str, tensor: Tensor, backbone: TwinsSVTCompact) -> tuple[str, Tensor]:
    """A tensor of vit-pytorch's, which are of images throughout, as ours, which are of tokens."""
    if found := re.match(r"layers\.(\d+)\.([13])\.layers\.(\d+)\.(\d)\.", name):
        stage, block = int(found[1]), int(found[3]) + (found[2] == "3")
        which, is_mlp = divmod(int(found[4]), 2)
        which -= stage == len(backbone.depths) - 1  # no local attention there
        rest = rename(f".{name[found.end() :]}", COMPACT)
        part = ("norms" if ".mlp_norm." in rest else "mlps") if is_mlp else "attns"
        new = f"blocks.{stage}.{block}.{part}.{which}{rest.replace('.mlp_norm', '')}"
    else:
        new = rename(name, COMPACT)
        new = re.sub(rf"^layers\.{len(backbone.depths) + 2}\.", "head.", new)
    if ".to_" in new or "pos_block" in new:
        return new, tensor
    if tensor.ndim == 4:  # of norms [1, d, 1, 1], of projections [out, in, 1, 1]
        tensor = tensor.flatten() if len(tensor) == 1 else tensor.flatten(1)
    return new, tensor


def fit_windows(state: State, backbone: Swin) -> dict[str, str]:
    """Bring tables of biases to the windows of a network, in `state`; returns what was done.

    Where the file's window is the network's and only its map is smaller, offsets that do not occur
    are left out. Other windows are resampled, bicubic as Microsoft's code does it.
    """
    done: dict[str, str] = {}
    for name, module in backbone.named_modules():
        key = f"{name}.{TABLE}"
        if not isinstance(module, WindowAttention) or key not in state:
            continue
        table, (rows, columns) = state[key], (2 * n - 1 for n in module.window)
        side = math.isqrt(len(table))
        if len(table) == rows * columns:
            continue
        if side * side != len(table):
            raise ValueError(f"{key} of the file has {len(table)} rows, which are no square window")
        square = table.view(side, side, -1)
        if side == 2 * backbone.window - 1:
            top, left = (side - rows) // 2, (side - columns) // 2
            square = square[top : top + rows, left : left + columns]
            done[key] = f"cut to {rows}x{columns} offsets"
        else:
            square = resample_grid(square, (rows, columns), "bicubic")
            done[key] = f"resampled to {rows}x{columns} offsets"
        state[key] = square.flatten(0, 1)
    return done


def pyramid_to_timm(network: nn.Module, backbone: Pyramid) -> State:
    """The weights of a Swin or Twins, or of one with its head, under timm's names.

    Raises:
        ValueError: a network that timm has not.
    """
    if isinstance(backbone, TwinsSVTCompact):
        raise ValueError("timm has no TwinsSVTCompact; export to .onnx instead")
    if isinstance(backbone, Swin | TwinsSVT):
        check_padding(backbone)
    state = {k.removeprefix("backbone."): t.detach() for k, t in network.state_dict().items()}
    if isinstance(backbone, Swin):
        state = {re.sub(r"^head\.", "head.fc.", key): tensor for key, tensor in state.items()}
    return {key: tensor.contiguous().clone() for key, tensor in state.items()}


def check_padding(backbone: Swin | TwinsSVT) -> None:
    """Refuse a network whose windows go over the edge of a map, otherwise than timm's do.

    Raises:
        ValueError: such a one.
    """
    theirs = "timm" if isinstance(backbone, Swin) else "zeros"
    sides = [-(-side // 4) for side in backbone.image_size]
    for _ in backbone.depths:
        window = [
            min(backbone.window, side) if isinstance(backbone, Swin) else backbone.window
            for side in sides
        ]
        over = any(side % cut for side, cut in zip(sides, window, strict=True))
        if over and backbone.padding != theirs:
            raise ValueError(
                f"windows of {backbone.window} do not divide maps of {sides[0]}x{sides[1]}, and "
                f"timm pads them otherwise than padding {backbone.padding}: its outputs would "
                f"differ; train with padding {theirs}, or export to .onnx"
            )
        sides = [-(-side // 2) for side in sides]


def pyramid_arguments(network: nn.Module, backbone: Pyramid) -> dict[str, Any]:
    """Arguments of `timm.create_model` for `pyramid_to_timm`."""
    head: Any = getattr(network, "head", None)
    blocks: Any = [m for m in backbone.modules() if hasattr(m, "num_heads")]
    firsts = [sum(backbone.depths[:i]) for i in range(len(backbone.depths))]
    arguments: dict[str, Any] = {
        "img_size": backbone.image_size,
        "in_chans": backbone.in_channels,
        "num_classes": 0 if head is None else head.out_features,
        "depths": backbone.depths,
        "num_heads": tuple(blocks[i].num_heads for i in firsts),
    }
    if isinstance(backbone, Swin):
        names = {1: "swin_tiny_patch4_window7_224", 2: "swinv2_tiny_window8_256"}
        arguments |= {"model_name": names[backbone.version], "window_size": backbone.window}
        arguments |= {"embed_dim": backbone.embed_dim // 2 ** (len(backbone.depths) - 1)}
        known = backbone.pretrained_window
        return arguments | ({} if known is None else {"pretrained_window_sizes": known})
    assert isinstance(backbone, TwinsSVT | TwinsPCPVT)
    is_svt = isinstance(backbone, TwinsSVT)
    arguments["model_name"] = "twins_svt_small" if is_svt else "twins_pcpvt_small"
    arguments["embed_dims"] = backbone.widths
    return arguments | ({"wss": (backbone.window,) * 4} if isinstance(backbone, TwinsSVT) else {})
