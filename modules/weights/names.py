"""Names of tensors in other code bases, and ours."""

import re
import sys
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from einops import rearrange
from torch import Tensor

from modules.backbones import Timm
from modules.backbones.any_timm import classifiers
from modules.weights.files import State

Origins = dict[str, tuple[str, ...]]


def count_from_0(found: re.Match[str]) -> str:
    """A unit of a hybrid's ResNet; Google counts stages and units from 1."""
    stage, unit = (int(number) - 1 for number in found.groups())
    return f"patch_embed.backbone.stages.{stage}.blocks.{unit}."


# Names of other code bases, as regular expressions, and ours. What is not here is alike.
RENAMED = (
    (r"^pos_embed$", "positions.table"),
    (r"^decoder_pos_embed$", "decoder_positions.table"),  # MAE
    (r"\.gamma_([12])$", r".ls\1.gamma"),  # DeiT-III
    (r"^pre_logits\.fc\.", "pre_logits."),  # timm before 0.6
    (r"^patch_embed\.backbone\.(conv|norm)\.", r"patch_embed.backbone.stem.\1."),  # timm's R+Ti
    (r"^tokens_to_token\.", "patch_embed."),  # T2T-ViT
    (r"^(patch_embed\.attention\d)\.attn\.", r"\1."),
    (r"^(patch_embed\.attention\d)\.kqv\.", r"\1.qkv."),
    (r"^(patch_embed\.attention\d)\.mlp\.0\.", r"\1.mlp.fc1."),
    (r"^(patch_embed\.attention\d)\.mlp\.2\.", r"\1.mlp.fc2."),
)
GOOGLE = (
    (r"^(opt\.target\.|params\.)?(img\.)?", ""),
    (r"^embedding\.", "patch_embed.proj."),
    (r"^cls$", "cls_token"),
    (r"^(Transformer\.posembed_input\.)?pos_embedding$", "positions.table"),
    (r"^Transformer\.encoderblock_(\d+)\.", r"blocks.\1."),
    (r"^Transformer\.encoder_norm\.", "norm."),
    (r"^MAPHead_0\.probe$", "attn_pool.latent"),
    (r"^MAPHead_0\.LayerNorm_0\.", "attn_pool.norm."),
    (r"^MAPHead_0\.MultiHeadDotProductAttention_0\.", "attn_pool."),
    (r"^MAPHead_0\.", "attn_pool."),
    (r"\.LayerNorm_0\.", ".norm1."),
    (r"\.LayerNorm_[12]\.", ".norm2."),
    (r"\.MultiHeadDotProductAttention_[01]\.", ".attn."),
    (r"\.MlpBlock_[03]\.Dense_0\.", ".mlp.fc1."),
    (r"\.MlpBlock_[03]\.Dense_1\.", ".mlp.fc2."),
    (r"\.out\.(kernel|bias)$", r".proj.\1"),
    (r"^(conv|gn)_root\.", r"patch_embed.backbone.stem.\1."),  # the ResNet of hybrids
    (r"^block(\d+)\.unit(\d+)\.", count_from_0),
    (r"(\.blocks\.\d+)\.(conv|gn)_proj\.", r"\1.downsample.\2."),
    (r"^(patch_embed\.backbone\..*)gn(\d?)\.", r"\1norm\2."),
)

# What training leaves beside a network, and a network does without.
BESIDE = re.compile(
    r"(decoder|mask_token|head|aux_head|patch_head|fc\.|txt|text|logit|projector|predictor)|[tb]$"
)


def rename(name: str, table: Iterable[tuple[str, Any]]) -> str:
    for pattern, new in table:
        name = re.sub(pattern, new, name)
    return name


def is_google(state: Mapping[str, Any]) -> bool:
    return any("/" in name for name in state)


def with_our_names(state: State) -> tuple[State, Origins]:
    """The tensors under our names, and for each the names it had."""
    if is_google(state):
        return from_google(state)
    origins: Origins = {}
    for name in state:
        if (ours := rename(name, RENAMED)) in origins:
            raise ValueError(f"the file has {ours} twice: as {origins[ours][0]} and as {name}")
        origins[ours] = (name,)
    return {ours: in_our_order(theirs, state) for ours, (theirs,) in origins.items()}, origins


def in_our_order(name: str, state: State) -> Tensor:
    """A tensor by its name there; T2T-ViT stacks keys, queries and values."""
    if ".kqv." not in name:
        return state[name]
    k, q, v = state[name].chunk(3)
    return torch.cat((q, k, v))


def with_timm_names(state: State, backbone: Timm, source: str) -> tuple[State, Origins]:
    """The tensors under timm's names for this network, its classifier as our `head`.

    Where a file does not fit as it is, timm's own reader for this family comes first, which knows
    the names of those who published it and resamples its positions.

    Raises:
        ValueError: timm's reader cannot make sense of the file.
    """
    own = backbone.model.state_dict()
    reader = getattr(sys.modules[type(backbone.model).__module__], "checkpoint_filter_fn", None)
    if reader and any(key not in state or state[key].shape != own[key].shape for key in own):
        try:
            state = dict(reader(dict(state), backbone.model))
        except Exception as error:  # it is made for files that are as it expects them
            raise ValueError(
                f"timm cannot read {source} as weights of {backbone.name} "
                f"({type(error).__name__}: {error})"
            ) from error
    theirs = {f"{classifiers(backbone.model)[0]}.{leaf}": leaf for leaf in ("weight", "bias")}
    ours = {name: f"head.{theirs[name]}" if name in theirs else name for name in state}
    return {ours[n]: t for n, t in state.items()}, {ours[n]: (n,) for n in state}


def from_google(arrays: State) -> tuple[State, Origins]:
    """Google's arrays (vision_transformer, big_vision) as ours, in both file layouts.

    Kernels are [in, out] there, those of patches [height, width, in, out], of attention
    [in, heads, head] and [heads, head, out]. A scanned encoder has one array for all blocks.
    """
    state: State = {}
    origins: Origins = {}
    for original, tensor in unscanned(arrays):
        name = rename(original.replace("/", "."), GOOGLE)
        module, _, leaf = name.rpartition(".")
        is_projection = module.endswith((".query", ".key", ".value"))
        if leaf == "kernel" and is_projection:
            tensor = rearrange(tensor, "d h e -> (h e) d")
        elif leaf == "kernel" and tensor.ndim == 4:
            tensor = rearrange(tensor, "height width c d -> d c height width")
        elif leaf == "kernel":
            tensor = tensor.flatten(0, -2).T
        elif is_projection or tensor.shape[:-1] == (1, 1, 1):  # of group norms
            tensor = tensor.flatten()
        name = re.sub(r"\.(kernel|scale)$", ".weight", name)
        state[name], origins[name] = tensor.contiguous(), (original,)
    for name in [name for name in state if ".query." in name]:
        # Ours are stacked: q, k and v in a block; k and v in the pool, whose query is learned.
        pool = name.startswith("attn_pool.")
        stacks = (
            (("q", ("query",)), ("kv", ("key", "value")))
            if pool
            else (("qkv", ("query", "key", "value")),)
        )
        for new, parts in stacks:
            old = [name.replace(".query.", f".{part}.") for part in parts]
            target = name.replace(".query.", f".{new}.")
            state[target] = torch.cat([state.pop(part) for part in old])
            origins[target] = tuple(origin for part in old for origin in origins.pop(part))
    return state, origins


def unscanned(arrays: State) -> Iterable[tuple[str, Tensor]]:
    """Arrays by name; one that holds a scanned encoder's blocks is cut into them."""
    for name, array in arrays.items():
        if "encoderblock/" not in name:
            yield name, array
            continue
        for i, part in enumerate(array):
            yield name.replace("encoderblock/", f"encoderblock_{i}/"), part


def bare(key: str) -> str:
    """A name without what networks of ours put before it, as `read` takes it off."""
    return key.removeprefix("backbone.").removeprefix("model.")
