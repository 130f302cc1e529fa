"""The parts every Transformer backbone is made of.

Block layout and names follow "An Image is Worth 16x16 Words" (Dosovitskiy et al. 2020,
section 3.1) with timm's state-dict keys.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple, overload

import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Bool, Float
from torch import Tensor, nn

from modules.backbones.attention import Groups, Packed, Segments, attend
from modules.backbones.masked import Altered, Group, Visible

# Added to the scores of attention, or which keys a query sees.
Bias = Float[Tensor, "1 h n n"] | Bool[Tensor, "#b 1 n n"]


class Features(NamedTuple):
    """What a backbone returns for a batch of images, or for a pack of them.

    pooled:  [b, d] one vector an image, ready for a linear head; of a pack [m, d], zeros in slots
             without an image
    cls:     [b, d] the class token after the final norm, or None where there is none
    patches: [b, n, d] one vector a patch, row by row, as wide as the backbone's `patch_dim`; of a
             pack [rows, n, d] and of visible patches [b, n, d], every token in its place, prefix
             tokens too
    grid:    rows and columns of the patches, n = rows * columns; None for a pack and where not all
             patches are there
    dist:    [b, d] the distillation token after the final norm, or None
    """

    pooled: Float[Tensor, "b d"]
    cls: Float[Tensor, "b d"] | None
    patches: Float[Tensor, "b n d"]
    grid: tuple[int, int] | None
    dist: Float[Tensor, "b d"] | None = None


class Backbone(nn.Module):
    """What every method may ask of a backbone.

    embed_dim:          width d of `Features.pooled`
    patch_size:         pixels a patch spans, the same both ways
    num_prefix_tokens:  tokens before the patches (class and distillation token, registers)
    num_layers:         depth L, for layer-wise learning-rate decay
    image_size:         (height, width) in pixels it was built for; None where any size is alike
    takes_packs:        takes packs of images of any size
    takes_masks:        takes `masked.Masked` and `masked.Swapped` wherever it takes images of
                        one size
    takes_visible:      takes `masked.Visible` in the place of images, and packs that lack patches
    max_grid:           largest number of patches along a side of an image in a pack; None for no
                        limit. What makes packs asks for it and refuses larger images: on an
                        accelerator a network that waits for no tensor's value cannot
    in_channels:        channels of its input
    """

    embed_dim: int
    patch_size: int
    num_prefix_tokens: int
    num_layers: int
    image_size: tuple[int, int] | None
    max_grid: int | None
    takes_packs: bool = True
    takes_masks: bool = False
    takes_visible: bool = False
    in_channels: int

    @property
    def patch_dim(self) -> int:
        """Width of `Features.patches`."""
        return self.embed_dim

    @overload
    def forward(
        self, images: Float[Tensor, "b c height width"] | Altered | Visible | Packed
    ) -> Features: ...
    @overload
    def forward(self, images: list[Group]) -> list[Features]: ...
    def forward(self, images: Group | Visible | Packed | list[Group]) -> Features | list[Features]:
        """Of images of one size, of a pack, or of a list of groups: of each what it gives alone."""
        raise NotImplementedError

    def last_blocks(
        self, images: Float[Tensor, "b c height width"] | Altered | Visible | Packed, count: int
    ) -> list[Features]:
        """What the last `count` blocks give, the last one last, each read out as `forward` does."""
        raise NotImplementedError

    def no_weight_decay(self) -> frozenset[str]:
        """Names of parameters that are no weight matrices though they have two axes or more."""
        tokens = ("cls_token", "dist_token", "reg_token", "attn_pool.latent")
        return frozenset(
            name
            for name, _ in self.named_parameters()
            if name in tokens
            or (name.startswith(("positions.", "relative.")) and ".linear." not in name)
            or name.endswith(("q_norm.gamma", "k_norm.gamma"))
        )

    def layer_of(self, name: str) -> int:
        """The layer of a parameter: 0 the stem, i + 1 block i, num_layers + 1 what follows."""
        if block := re.match(r"(?:blocks|positions|relative)\.(\d+)\.", name):
            return int(block[1]) + 1
        return self.num_layers + 1 if name.startswith(("norm.", *POOLING)) else 0


@dataclass(frozen=True)
class BlockStyle:
    """What the blocks of a Transformer are made of.

    Args:
        mlp: "gelu" (exact), "gelu_tanh" (its tanh approximation: SigLIP, JAX), "relu" or "swiglu"
            (Shazeer 2020: fc1 gives gate and value, both of the MLP's width).
        qkv_bias: the projection to q, k and v has a bias.
        proj_bias: the projection after attention has a bias.
        qk_norm: a norm over each head's q and k before their product (Dehghani et al. 2023).
            "layer": LayerNorm. "rms": RMS norm with a factor for each head and channel.
            "rms_unscaled": the same, but scores are not multiplied by e^-0.5 (vit-pytorch).
        layer_scale: first value of a learned factor for each channel of both branches (CaiT,
            Touvron et al. 2021); null for none.
        residual_scale: both branches are divided by it (LV-ViT's lambda).
        norm_eps: epsilon of every LayerNorm.
        norm_bias: every LayerNorm has a bias.

    Raises:
        ValueError: an unknown MLP or norm of q and k, or a scale or epsilon that is not positive.
    """

    mlp: Literal["gelu", "gelu_tanh", "relu", "swiglu"] = "gelu"
    qkv_bias: bool = True
    proj_bias: bool = True
    qk_norm: Literal["layer", "rms", "rms_unscaled"] | None = None
    layer_scale: float | None = None
    residual_scale: float = 1.0
    norm_eps: float = 1e-6
    norm_bias: bool = True

    def __post_init__(self) -> None:
        if self.mlp not in ("gelu", "gelu_tanh", "relu", "swiglu"):
            raise ValueError(f"mlp is {self.mlp!r}; expected gelu, gelu_tanh, relu or swiglu")
        if self.qk_norm not in (None, "layer", "rms", "rms_unscaled"):
            raise ValueError(
                f"qk_norm is {self.qk_norm!r}; expected layer, rms, rms_unscaled or null"
            )
        for name in ("residual_scale", "norm_eps", "layer_scale"):
            value = getattr(self, name)
            if value is not None and value <= 0:
                raise ValueError(f"{name} is {value}; expected more than 0")

    @property
    def attention_scale(self) -> float | None:
        """Factor of the scores before softmax; None for e^-0.5."""
        return 1.0 if self.qk_norm == "rms_unscaled" else None


# What reads one vector out of an image's tokens, by the beginning of its names; `Features.patches`
# does without.
POOLING = ("fc_norm.", "attn_pool.", "pre_logits.")


def layer_norm(dim: int, style: BlockStyle) -> nn.LayerNorm:
    return nn.LayerNorm(dim, style.norm_eps, bias=style.norm_bias)


class HeadRMSNorm(nn.Module):
    """x / sqrt(mean(x^2)) with a learned factor for every head and channel, in float32 at least."""

    def __init__(self, num_heads: int, head_dim: int) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.ones(num_heads, 1, head_dim))

    def forward(self, x: Float[Tensor, "b h n e"]) -> Float[Tensor, "b h n e"]:
        # Written out, because F.rms_norm would copy q and k out of their shared projection.
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        wide = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + 1e-8)
        return (wide * self.gamma).to(x.dtype)


def head_norm(dim: int, num_heads: int, style: BlockStyle) -> nn.Module:
    """The norm of q or k, as `style.qk_norm` says."""
    if style.qk_norm is None:
        return nn.Identity()
    if style.qk_norm == "layer":
        return layer_norm(dim // num_heads, style)
    return HeadRMSNorm(num_heads, dim // num_heads)


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
        self.q_norm, self.k_norm = (head_norm(dim, num_heads, style) for _ in range(2))
        self.scale = style.attention_scale
        self.proj = nn.Linear(dim, dim, bias=style.proj_bias)
        self.drop = nn.Dropout(dropout)

    def forward(
        self,
        x: Float[Tensor, "b n d"],
        bias: Bias | Sequence[Tensor] | None = None,
        segments: Segments | Groups | None = None,
    ) -> Float[Tensor, "b n d"]:
        q, k, v = self.project(x)
        x = attend(q, k, v, bias, segments, self.scale)
        out: Tensor = self.drop(self.proj(rearrange(x, "b h n e -> b n (h e)")))
        return out

    def project(self, x: Float[Tensor, "b n d"]) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values, each [b, h, n, e], after the norms of q and k."""
        q, k, v = rearrange(
            self.qkv(x), "b n (three h e) -> three b h n e", three=3, h=self.num_heads
        ).unbind(0)
        return self.q_norm(q), self.k_norm(k), v


class MLP(nn.Module):
    """Linear, GELU, dropout, Linear, dropout; ReLU or SiLU(gate) * value in the place of GELU."""

    def __init__(self, dim: int, hidden_dim: int, style: BlockStyle, dropout: float = 0.0) -> None:
        super().__init__()
        self.kind = style.mlp
        self.fc1 = nn.Linear(dim, hidden_dim * (2 if self.kind == "swiglu" else 1))
        self.fc2 = nn.Linear(hidden_dim, dim)
        self.drop = nn.Dropout(dropout)

    def forward(self, x: Float[Tensor, "*b d"]) -> Float[Tensor, "*b d"]:
        hidden = self.fc1(x)
        if self.kind == "swiglu":
            gate, value = hidden.chunk(2, dim=-1)
            hidden = F.silu(gate) * value
        elif self.kind == "relu":
            hidden = F.relu(hidden)
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
    """Stochastic depth (Huang et al. 2016): drops a residual branch for whole images.

    In training an image keeps its branch with probability 1 - rate, scaled by 1 / (1 - rate).
    """

    def __init__(self, rate: float) -> None:
        super().__init__()
        self.rate = rate

    def forward(
        self, x: Float[Tensor, "b n d"], segments: Segments | Groups | None = None
    ) -> Float[Tensor, "b n d"]:
        if not self.training or self.rate == 0.0:
            return x
        count = x.shape[0] if segments is None else segments.num_images
        keep = x.new_empty(count, 1, 1).bernoulli_(1.0 - self.rate)
        if segments is not None:  # every token gets what was drawn for its image
            keep = keep[segments.image, 0]
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
        self.norm1 = layer_norm(dim, style)
        self.attn = Attention(dim, num_heads, style, dropout)
        self.ls1 = nn.Identity() if scale is None else LayerScale(dim, scale)
        self.norm2 = layer_norm(dim, style)
        self.mlp = MLP(dim, mlp_dim, style, dropout)
        self.ls2 = nn.Identity() if scale is None else LayerScale(dim, scale)
        self.drop_path = DropPath(drop_path)
        self.residual_scale = style.residual_scale

    def forward(
        self,
        x: Float[Tensor, "b n d"],
        bias: Bias | Sequence[Tensor] | None = None,
        segments: Segments | Groups | None = None,
    ) -> Float[Tensor, "b n d"]:
        x = x + self.branch(self.ls1(self.attn(self.norm1(x), bias, segments)), segments)
        return x + self.branch(self.ls2(self.mlp(self.norm2(x))), segments)

    def branch(
        self, x: Float[Tensor, "b n d"], segments: Segments | Groups | None
    ) -> Float[Tensor, "b n d"]:
        out: Tensor = self.drop_path(x, segments)
        return out if self.residual_scale == 1.0 else out / self.residual_scale


class PatchEmbed(nn.Module):
    """Cuts images into patches and projects each: a convolution whose stride is its kernel."""

    def __init__(self, patch_size: int, in_channels: int, dim: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(in_channels, dim, patch_size, patch_size)

    def forward(self, images: Float[Tensor, "b c height width"]) -> Float[Tensor, "b n d"]:
        tokens: Tensor = rearrange(self.proj(images), "b d rows columns -> b (rows columns) d")
        return tokens

    def packed(self, patches: Float[Tensor, "rows n e"]) -> Float[Tensor, "rows n d"]:
        """The same of patches that are cut already, pixels in the order (channel, row, column).

        Raises:
            ValueError: patches of another size.
        """
        weight = self.proj.weight.flatten(1)
        check_patch_width(patches, weight.shape[1])
        return F.linear(patches, weight, self.proj.bias)


def check_patch_width(patches: Float[Tensor, "rows n e"], expected: int) -> None:
    if patches.shape[-1] != expected:
        raise ValueError(
            f"packed patches of {patches.shape[-1]} values reached a backbone whose patches have "
            f"{expected} (channels * patch_size^2); pack with the backbone's patch_size and "
            f"in_channels"
        )


def drop_path_rates(maximum: float, depth: int) -> list[float]:
    """Stochastic depth grows linearly from 0 at the first block to `maximum` at the last."""
    return [float(rate) for rate in torch.linspace(0, maximum, depth, device="cpu")]
