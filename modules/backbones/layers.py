"""The parts every Transformer backbone is made of.

Block layout and names follow "An Image is Worth 16x16 Words" (Dosovitskiy et al. 2020,
section 3.1) with timm's state-dict keys.
"""

import re
from dataclasses import dataclass
from typing import Literal, NamedTuple

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
    dist:    [b, d] the distillation token after the final norm, or None
    """

    pooled: Float[Tensor, "b d"]
    cls: Float[Tensor, "b d"] | None
    patches: Float[Tensor, "b n d"]
    grid: tuple[int, int]
    dist: Float[Tensor, "b d"] | None = None


class Backbone(nn.Module):
    """What every method may ask of a backbone.

    embed_dim:          width d of `Features.pooled`
    patch_size:         pixels a patch spans, the same both ways
    num_prefix_tokens:  tokens before the patches (class and distillation token, registers)
    num_layers:         depth L, for layer-wise learning-rate decay
    image_size:         (height, width) in pixels it was built for
    in_channels:        channels of its input
    """

    embed_dim: int
    patch_size: int
    num_prefix_tokens: int
    num_layers: int
    image_size: tuple[int, int]
    in_channels: int

    def forward(self, images: Float[Tensor, "b c height width"]) -> Features:
        raise NotImplementedError

    def no_weight_decay(self) -> frozenset[str]:
        """Names of parameters that are no weight matrices though they have two axes or more."""
        return frozenset()

    def layer_of(self, name: str) -> int:
        """The layer of a parameter: 0 the stem, i + 1 block i, num_layers + 1 what follows."""
        if block := re.match(r"(?:blocks|positions|relative)\.(\d+)\.", name):
            return int(block[1]) + 1
        after = ("norm.", "fc_norm.", "attn_pool.", "pre_logits.")
        return self.num_layers + 1 if name.startswith(after) else 0


@dataclass(frozen=True)
class BlockStyle:
    """What the blocks of a Transformer are made of.

    Args:
        mlp: "gelu" (exact), "gelu_tanh" (its tanh approximation: SigLIP, JAX) or "swiglu"
            (Shazeer 2020: fc1 gives gate and value, both of the MLP's width).
        qkv_bias: the projection to q, k and v has a bias.
        qk_norm: LayerNorm over each head's q and k before their product (Dehghani et al. 2023).
        layer_scale: first value of a learned factor for each channel of both branches (CaiT,
            Touvron et al. 2021); null for none.
        residual_scale: both branches are divided by it (LV-ViT's lambda).
        norm_eps: epsilon of every LayerNorm.

    Raises:
        ValueError: an unknown MLP, or a scale or epsilon that is not positive.
    """

    mlp: Literal["gelu", "gelu_tanh", "swiglu"] = "gelu"
    qkv_bias: bool = True
    qk_norm: bool = False
    layer_scale: float | None = None
    residual_scale: float = 1.0
    norm_eps: float = 1e-6

    def __post_init__(self) -> None:
        if self.mlp not in ("gelu", "gelu_tanh", "swiglu"):
            raise ValueError(f"mlp is {self.mlp!r}; expected gelu, gelu_tanh or swiglu")
        for name in ("residual_scale", "norm_eps", "layer_scale"):
            value = getattr(self, name)
            if value is not None and value <= 0:
                raise ValueError(f"{name} is {value}; expected more than 0")


def attend(
    q: Float[Tensor, "b h n e"],
    k: Float[Tensor, "b h m e"],
    v: Float[Tensor, "b h m e"],
    bias: Float[Tensor, "1 h n m"] | None = None,
) -> Float[Tensor, "b h n e"]:
    """Softmax attention, scaled by e^-0.5: the one entry to attention for all backbones.

    `bias` is added to the scaled scores.
    """
    if bias is not None:
        bias = bias.to(q.dtype)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=bias)


def check_heads(dim: int, num_heads: int) -> None:
    if dim % num_heads:
        raise ValueError(
            f"width {dim} is not divisible by {num_heads} heads; "
            f"set embed_dim or num_heads so that it is"
        )


class Attention(nn.Module):
    """Multi-head self-attention with one fused projection to q, k and v."""

    def __init__(self, dim: int, num_heads: int, style: BlockStyle, dropout: float = 0.0) -> None:
        super().__init__()
        check_heads(dim, num_heads)
        self.num_heads = num_heads
        self.qkv = nn.Linear(dim, 3 * dim, bias=style.qkv_bias)
        norm = (lambda: nn.LayerNorm(dim // num_heads, style.norm_eps)) if style.qk_norm else None
        self.q_norm = norm() if norm else nn.Identity()
        self.k_norm = norm() if norm else nn.Identity()
        self.proj = nn.Linear(dim, dim)
        self.drop = nn.Dropout(dropout)

    def forward(
        self, x: Float[Tensor, "b n d"], bias: Float[Tensor, "1 h n n"] | None = None
    ) -> Float[Tensor, "b n d"]:
        q, k, v = rearrange(
            self.qkv(x), "b n (three h e) -> three b h n e", three=3, h=self.num_heads
        ).unbind(0)
        x = attend(self.q_norm(q), self.k_norm(k), v, bias)
        out: Tensor = self.drop(self.proj(rearrange(x, "b h n e -> b n (h e)")))
        return out


class MLP(nn.Module):
    """Linear, GELU, dropout, Linear, dropout; or SiLU(gate) * value in the place of GELU."""

    def __init__(self, dim: int, hidden_dim: int, style: BlockStyle, dropout: float = 0.0) -> None:
        super().__init__()
        self.kind = style.mlp
        self.fc1 = nn.Linear(dim, hidden_dim * (2 if self.kind == "swiglu" else 1))
        self.fc2 = nn.Linear(hidden_dim, dim)
        self.drop = nn.Dropout(dropout)

    def forward(self, x: Float[Tensor, "b n d"]) -> Float[Tensor, "b n d"]:
        hidden = self.fc1(x)
        if self.kind == "swiglu":
            gate, value = hidden.chunk(2, dim=-1)
            hidden = F.silu(gate) * value
        else:
            hidden = F.gelu(hidden, approximate="tanh" if self.kind == "gelu_tanh" else "none")
        out: Tensor = self.drop(self.fc2(self.drop(hidden)))
        return out


class LayerScale(nn.Module):
    """A learned factor for every channel."""

    def __init__(self, dim: int, start: float) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.full((dim,), start))

    def forward(self, x: Float[Tensor, "b n d"]) -> Float[Tensor, "b n d"]:
        return x * self.gamma


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
    """Pre-norm encoder block: x + MHSA(LN(x)), then x + MLP(LN(x)), branches as `style` says."""

    def __init__(
        self,
        dim: int,
        num_heads: int,
        mlp_dim: int,
        style: BlockStyle = BlockStyle(),
        dropout: float = 0.0,
        drop_path: float = 0.0,
    ) -> None:
        super().__init__()
        scale = style.layer_scale
        self.norm1 = nn.LayerNorm(dim, eps=style.norm_eps)
        self.attn = Attention(dim, num_heads, style, dropout)
        self.ls1 = nn.Identity() if scale is None else LayerScale(dim, scale)
        self.norm2 = nn.LayerNorm(dim, eps=style.norm_eps)
        self.mlp = MLP(dim, mlp_dim, style, dropout)
        self.ls2 = nn.Identity() if scale is None else LayerScale(dim, scale)
        self.drop_path = DropPath(drop_path)
        self.residual_scale = style.residual_scale

    def forward(
        self, x: Float[Tensor, "b n d"], bias: Float[Tensor, "1 h n n"] | None = None
    ) -> Float[Tensor, "b n d"]:
        x = x + self.branch(self.ls1(self.attn(self.norm1(x), bias)))
        return x + self.branch(self.ls2(self.mlp(self.norm2(x))))

    def branch(self, x: Float[Tensor, "b n d"]) -> Float[Tensor, "b n d"]:
        out: Tensor = self.drop_path(x)
        return out if self.residual_scale == 1.0 else out / self.residual_scale


class AttentionPool(nn.Module):
    """Multi-head attention pooling, MAP (Zhai et al. 2021, section 3.3).

    One learned query attends to all patches; then x + MLP(LN(x)).
    """

    def __init__(self, dim: int, num_heads: int, mlp_dim: int, style: BlockStyle) -> None:
        super().__init__()
        check_heads(dim, num_heads)
        self.num_heads = num_heads
        self.latent = nn.Parameter(torch.zeros(1, 1, dim))
        self.q, self.kv = nn.Linear(dim, dim), nn.Linear(dim, 2 * dim)
        self.proj = nn.Linear(dim, dim)
        self.norm = nn.LayerNorm(dim, eps=style.norm_eps)
        self.mlp = MLP(dim, mlp_dim, style)

    def forward(self, x: Float[Tensor, "b n d"]) -> Float[Tensor, "b d"]:
        heads = {"h": self.num_heads}
        q = rearrange(self.q(self.latent), "one n (h e) -> one h n e", **heads)
        k, v = rearrange(self.kv(x), "b n (two h e) -> two b h n e", two=2, **heads).unbind(0)
        x = self.proj(
            rearrange(attend(q.expand(x.shape[0], -1, -1, -1), k, v), "b h n e -> b n (h e)")
        )
        x = x + self.mlp(self.norm(x))
        return x[:, 0]


class PatchEmbed(nn.Module):
    """Cuts images into patches and projects each: a convolution whose stride is its kernel."""

    def __init__(self, patch_size: int, in_channels: int, dim: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(in_channels, dim, patch_size, patch_size)

    def forward(self, images: Float[Tensor, "b c height width"]) -> Float[Tensor, "b n d"]:
        tokens: Tensor = rearrange(self.proj(images), "b d rows columns -> b (rows columns) d")
        return tokens


def drop_path_rates(maximum: float, depth: int) -> list[float]:
    """Stochastic depth grows linearly from 0 at the first block to `maximum` at the last."""
    return [float(rate) for rate in torch.linspace(0, maximum, depth, device="cpu")]
