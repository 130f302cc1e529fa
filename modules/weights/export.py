"""Our weights under timm's names, and timm's arguments for a network that takes them."""

from functools import partial
from typing import Any

from timm.layers.mlp import SwiGLUPacked
from torch import nn

from modules.backbones import BlockStyle, Hybrid, LVViT, T2TViT, Timm, ViT, hybrid
from modules.backbones.any_timm import classifiers
from modules.backbones.positions import Learned1D
from modules.backbones.pyramid import Pyramid
from modules.weights.files import State
from modules.weights.names import bare
from modules.weights.pyramids import pyramid_arguments, pyramid_to_timm


def to_timm(network: nn.Module) -> State:
    """The weights of a backbone that timm has, or of one with its heads, under timm's names.

    Fixed and two-dimensional positions become one table; a residual scale goes into the weights
    of its branch. A timm model with the arguments of `timm_arguments` gives equal outputs.

    Raises:
        ValueError: no ViT (a hybrid is one), or parts that timm's has not: pre-logits, relative
            positions, positions at every block, RMS norm of q and k, norms or projections without
            bias, tokens of tokens, an LV-ViT's convolutions.
    """
    vit = getattr(network, "backbone", network)
    if isinstance(vit, Timm):
        return of_timm(network, vit)
    if isinstance(vit, Pyramid):
        return pyramid_to_timm(network, vit)
    if not isinstance(vit, ViT):
        raise ValueError(f"{type(vit).__name__} has no counterpart among timm's ViTs")
    units = vit.units if isinstance(vit, Hybrid) else None
    lacks = {
        "convolutions before its patches": isinstance(vit, LVViT),
        "tokens of tokens": isinstance(vit, T2TViT),
        f"hybrid of {units} units": units is not None and units not in hybrid.TIMM,
        "pre_logits": vit.pre_logits is not None,
        "probe's heads": hasattr(network, "heads") and not hasattr(network, "head"),
        "registers beside a distillation token": (
            vit.dist_token is not None and vit.reg_token is not None
        ),
        "relative positions": vit.relative is not None,
        "RMS norm of q and k": vit.style.qk_norm not in (None, "layer"),
        "norms without bias": not vit.style.norm_bias,
        "attention that projects without bias": not vit.style.proj_bias,
        f"positions at {vit.inject} block": vit.positions is not None and vit.inject != "stem",
    }
    if any(lacks.values()):
        names = ", ".join(name for name, has in lacks.items() if has)
        raise ValueError(f"timm's ViT has no {names}, so these weights cannot be its")
    state = {key.removeprefix("backbone."): t.detach() for key, t in network.state_dict().items()}
    state = {key: tensor for key, tensor in state.items() if not key.startswith("positions.")}
    if isinstance(vit.positions, Learned1D):
        state["pos_embed"] = vit.positions.table.detach()
    elif vit.positions is not None:
        state["pos_embed"] = vit.positions(vit.grid).detach()
    for i in range(vit.num_layers):
        for name in ("attn.proj", "mlp.fc2"):
            for leaf in ("weight", "bias"):
                state[f"blocks.{i}.{name}.{leaf}"] = (
                    state[f"blocks.{i}.{name}.{leaf}"] / vit.style.residual_scale
                )
    if units == ():  # timm has the root in the place of a network that has it as its stem
        state = {key.replace("backbone.stem.", "backbone."): t for key, t in state.items()}
    return {key: tensor.contiguous().clone() for key, tensor in state.items()}


def of_timm(network: nn.Module, backbone: Timm) -> State:
    """The weights of a network of timm's, with our head as its classifier."""
    (name, *_), state = classifiers(backbone.model), network.state_dict()
    if any(key.startswith("heads.") for key in state):
        raise ValueError(f"timm's {backbone.name} has no probe's heads; export the backbone's run")
    heads = {key: f"{name}.{key.removeprefix('head.')}" for key in ("head.weight", "head.bias")}
    return {heads.get(key, bare(key)): t.detach().clone() for key, t in state.items()}


def timm_arguments(network: nn.Module) -> dict[str, Any]:
    """Arguments of timm's `VisionTransformer` (`VisionTransformerDistilled`) for `to_timm`.

    Of others than a ViT, those of `timm.create_model`.
    """
    vit, head = getattr(network, "backbone", network), getattr(network, "head", None)
    if isinstance(vit, Timm):
        classes = 0 if head is None else head.out_features
        return {"model_name": vit.name, "num_classes": classes, "in_chans": vit.in_channels}
    if isinstance(vit, Pyramid):
        return pyramid_arguments(network, vit)
    assert isinstance(vit, ViT)
    style, table = vit.style, vit.positions
    block: Any = vit.blocks[0]
    arguments: dict[str, Any] = {
        "img_size": vit.image_size,
        "patch_size": vit.patch_size,
        "in_chans": vit.in_channels,
        "num_classes": 0 if head is None else head.out_features,
        "embed_dim": vit.embed_dim,
        "depth": vit.num_layers,
        "num_heads": block.attn.num_heads,
        "mlp_ratio": block.mlp.fc1.out_features / vit.embed_dim,
        "qkv_bias": style.qkv_bias,
        "qk_norm": style.qk_norm == "layer",
        "init_values": style.layer_scale,
        "class_token": vit.cls_token is not None,
        "reg_tokens": vit.num_registers,
        "pos_embed": "none" if table is None else "learn",
        "no_embed_class": isinstance(table, Learned1D) and table.num_rows == 0,
        "global_pool": {"cls": "token", "norm_avg": "avg"}.get(vit.pooling, vit.pooling),
        "fc_norm": vit.pooling == "avg",
    }
    if style.mlp == "gelu_tanh":
        arguments["act_layer"] = "gelu_tanh"
    elif style.mlp == "swiglu":
        arguments |= {"act_layer": "silu", "mlp_layer": SwiGLUPacked}
    if style.norm_eps != BlockStyle.norm_eps:
        arguments["norm_layer"] = partial(nn.LayerNorm, eps=style.norm_eps)
    if isinstance(vit, Hybrid):
        patch = vit.patch_embed.proj.kernel_size[0]
        arguments |= {"model_name": hybrid.TIMM[vit.units], "patch_size": patch}
    return arguments
