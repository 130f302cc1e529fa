"""The parts every Transformer backbone is made of.

Block layout and names follow "An Image is Worth 16x16 Words" (Dosovitskiy et al. 2020,
section 3.1) with timm's state-dict keys.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Float
from torch import Tensor, nn


class Features(NamedTuple):
    """What a backbone returns for a batch of images.

    pooled:  [b, d] one vector an image, ready for a linear head
    cls:     [b, d] the class token after the final norm, or None where there is none
    patches: [b, n, d] one vector a patch, row by row
    grid:    rows and columns of the patches, n = rows * columns
    """

    pooled: Float[Tensor, "b d"]
    cls: Float[Tensor, "b d"] | None
    patches: Float[Tensor, "b n d"]
    grid: tuple[int, int]


class Backbone(nn.Module):
    """What every method may ask of a backbone.

    embed_dim:          width d of `Features.pooled`
    patch_size:         pixels a patch spans, the same both ways
    num_prefix_tokens:  tokens before the patches (class token, registers)
    image_size:         (height, width) in pixels it was built for
    in_channels:        channels of its input
    """

    embed_dim: int
    patch_size: int
    num_prefix_tokens: int
    image_size: tuple[int, int]
    in_channels: int

    def forward(self, images: Float[Tensor, "b c height width"]) -> Features:
        raise NotImplementedError

    def no_weight_decay(self) -> frozenset[str]:
        """Names of parameters that are no weight matrices though they have two axes or more."""
        return frozenset()


def attend(
    q: Float[Tensor, "b h n e"], k: Float[Tensor, "b h n e"], v: Float[Tensor, "b h n e"]
) -> Float[Tensor, "b h n e"]:
    """Softmax attention, scaled by e^-0.5: the one entry to attention for all backbones."""
    return F.scaled_dot_product_attention(q, k, v)


class Attention(nn.Module):
    """Multi-head self-attention with one fused projection to q, k and v."""

    def __init__(self, dim: int, num_heads: int, dropout: float = 0.0) -> None:
        super().__init__()
        if dim % num_heads:
            raise ValueError(
                f"width {dim} is not divisible by {num_heads} heads; "
                f"set embed_dim or num_heads so that it is"
            )
        self.num_heads = num_heads
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)
        self.drop = nn.Dropout(dropout)

    def forward(self, x: Float[Tensor, "b n d"]) -> Float[Tensor, "b n d"]:
        q, k, v = rearrange(
            self.qkv(x), "b n (three h e) -> three b h n e", three=3, h=self.num_heads
        ).unbind(0)
        out: Tensor = self.drop(self.proj(rearrange(attend(q, k, v), "b h n e -> b n (h e)")))
        return out


class MLP(nn.Module):
    """Linear, exact GELU, dropout, Linear, dropout."""

    def __init__(self, dim: int, hidden_dim: int, dropout: float = 0.0) -> None:
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden_dim)
        self.fc2 = nn.Linear(hidden_dim, dim)
        self.drop = nn.Dropout(dropout)

    def forward(self, x: Float[Tensor, "b n d"]) -> Float[Tensor, "b n d"]:
        hidden = self.drop(F.gelu(self.fc1(x)))
        out: Tensor = self.drop(self.fc2(hidden))
        return out


class DropPath(nn.Module):
    """Stochastic depth (Huang et al. 2016): drops a residual branch for whole samples.

    In training a sample keeps its branch with probability 1 - rate, scaled by 1 / (1 - rate).
    """

    def __init__(self, rate: float) -> None:
        super().__init__()
        self.rate = rate

    def forward(self, x: Float[Tensor, "b n d"]) -> Float[Tensor, "b n d"]:
        if not self.training or self.rate == 0.0:
            return x
        keep = x.new_empty(x.shape[0], 1, 1).bernoulli_(1.0 - self.rate)
        return x * (keep / (1.0 - self.rate))


class Block(nn.Module):
    """Pre-norm encoder block: x + MHSA(LN(x)), then x + MLP(LN(x))."""

    def __init__(
        self,
        dim: int,
        num_heads: int,
        mlp_dim: int,
        dropout: float = 0.0,
        drop_path: float = 0.0,
        norm_eps: float = 1e-6,
    ) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps=norm_eps)
        self.attn = Attention(dim, num_heads, dropout)
        self.norm2 = nn.LayerNorm(dim, eps=norm_eps)
        self.mlp = MLP(dim, mlp_dim, dropout)
        self.drop_path = DropPath(drop_path)

    def forward(self, x: Float[Tensor, "b n d"]) -> Float[Tensor, "b n d"]:
        x = x + self.drop_path(self.attn(self.norm1(x)))
        out: Tensor = x + self.drop_path(self.mlp(self.norm2(x)))
        return out


class PatchEmbed(nn.Module):
    """Cuts images into patches and projects each: a convolution whose stride is its kernel."""

    def __init__(self, patch_size: int, in_channels: int, dim: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(in_channels, dim, patch_size, patch_size)

    def forward(self, images: Float[Tensor, "b c height width"]) -> Float[Tensor, "b n d"]:
        tokens: Tensor = rearrange(self.proj(images), "b d rows columns -> b (rows columns) d")
        return tokens


def init_linear(module: nn.Module) -> None:
    """timm's default: weights of every linear layer normal with std 0.02, biases zero."""
    for layer in module.modules():
        if isinstance(layer, nn.Linear):
            nn.init.trunc_normal_(layer.weight, std=0.02)
            if layer.bias is not None:
                nn.init.zeros_(layer.bias)


def drop_path_rates(maximum: float, depth: int) -> list[float]:
    """Stochastic depth grows linearly from 0 at the first block to `maximum` at the last."""
    return [float(rate) for rate in torch.linspace(0, maximum, depth, device="cpu")]
