"""First values of the weights, as the published code bases draw them."""

import math
from collections.abc import Callable

from torch import nn

from modules.backbones.layers import PatchEmbed
from modules.backbones.pooling import AttentionPool, QueryPool

# torch cuts its truncated normal at two standard deviations of the uncut one; JAX corrects for it.
CUT_STD = 0.87962566103423978


def timm(network: nn.Module) -> None:
    """timm's default: normal with std 0.02, biases zero, the class token almost zero."""
    linears(network, lambda name, layer: nn.init.trunc_normal_(layer.weight, std=0.02))
    tokens(network, position=0.02, token=1e-6)
    for pool in (m for m in network.modules() if isinstance(m, (AttentionPool, QueryPool))):
        nn.init.trunc_normal_(pool.latent, std=pool.latent.shape[-1] ** -0.5)


def dino(network: nn.Module) -> None:
    """DINO's: timm's, but the class token is as large as the rest (and so are registers)."""
    timm(network)
    tokens(network, position=0.02, token=0.02)


def jax(network: nn.Module) -> None:
    """Google's: Xavier-uniform, q, k and v each on its own; LeCun-normal patches; zero token."""

    def weight(name: str, layer: nn.Linear) -> None:
        xavier_parts(name, layer)
        if ".mlp." in name and layer.bias is not None:
            nn.init.normal_(layer.bias, std=1e-6)

    linears(network, weight)
    tokens(network, position=0.02, token=0.0)
    for module in network.modules():
        if isinstance(module, PatchEmbed):
            fan_in = module.proj.weight[0].numel()
            std = math.sqrt(1 / fan_in) / CUT_STD
            nn.init.trunc_normal_(module.proj.weight, std=std, a=-2 * std, b=2 * std)
            if module.proj.bias is not None:
                nn.init.zeros_(module.proj.bias)
        elif isinstance(module, (AttentionPool, QueryPool)):
            nn.init.xavier_uniform_(module.latent[0])


def mae(network: nn.Module) -> None:
    """MAE's: Xavier-uniform for linear layers and, as one matrix, patches; tokens std 0.02."""
    linears(network, lambda name, layer: nn.init.xavier_uniform_(layer.weight))
    tokens(network, position=0.02, token=0.02)
    for module in network.modules():
        if isinstance(module, PatchEmbed):
            nn.init.xavier_uniform_(module.proj.weight.flatten(1))
        elif isinstance(module, (AttentionPool, QueryPool)):
            nn.init.normal_(module.latent, std=0.02)


def moco(network: nn.Module) -> None:
    """MoCo v3's: Xavier-uniform, q, k and v each on its own, patches as one matrix; no biases."""
    linears(network, xavier_parts)
    tokens(network, position=0.02, token=1e-6)
    for module in network.modules():
        if isinstance(module, PatchEmbed):
            nn.init.xavier_uniform_(module.proj.weight.flatten(1))
            if module.proj.bias is not None:
                nn.init.zeros_(module.proj.bias)
        elif isinstance(module, (AttentionPool, QueryPool)):
            nn.init.xavier_uniform_(module.latent[0])


def xavier_parts(name: str, layer: nn.Linear) -> None:
    """Xavier-uniform for each of the matrices that a layer stacks."""
    stacked = {"qkv": 3, "kv": 2}.get(name.rpartition(".")[2], 1)
    for part in layer.weight.chunk(stacked):
        nn.init.xavier_uniform_(part)


def linears(network: nn.Module, weight: Callable[[str, nn.Linear], object]) -> None:
    for name, layer in network.named_modules():
        if isinstance(layer, nn.Linear):
            if layer.bias is not None:
                nn.init.zeros_(layer.bias)
            weight(name, layer)


def tokens(network: nn.Module, position: float, token: float) -> None:
    """Normal values for the learned positions and for the tokens that stand before patches."""
    for name, parameter in network.named_parameters():
        # Learned Fourier features are no table: they have their own first values.
        if name.startswith("positions.") and not name.startswith("positions.fourier"):
            nn.init.normal_(parameter, std=position)
        elif name in ("cls_token", "reg_token"):
            nn.init.normal_(parameter, std=token)
        elif name == "dist_token":
            nn.init.normal_(parameter, std=0.02)  # DeiT's, in every code base


RULES: dict[str, Callable[[nn.Module], None]] = {
    "timm": timm,
    "dino": dino,
    "jax": jax,
    "mae": mae,
    "moco": moco,
}
