"""T2T-ViT: tokens are made of overlapping tokens, twice, before a deep and narrow ViT takes them.

"Tokens-to-Token ViT: Training Vision Transformers from Scratch on ImageNet", Yuan et al. 2021,
https://arxiv.org/abs/2101.11986, section 3 and table 2, and its published code:

    x = 7x7 pixels every 4                             a token each, overlapping
    twice: q, k, v = LN(x) W;  x = v + attention(q, k, v);  x = x + MLP(LN(x))
           x = 3x3 tokens every 2                      side by side
    tokens = x W + b

Attention over 56 x 56 tokens is the Performer's (Choromanski et al. 2020), whose cost is linear:

    phi(x) = exp(w x - |x|^2 / 2) / sqrt(m)            m = 32 orthogonal rows w that do not learn
    attention = phi(q) (phi(k)^T v) / (phi(q) sum phi(k))

Variants t_... have the softmax itself. Positions are fixed sines and cosines of all tokens in line.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Float
from torch import Tensor, nn

from modules.backbones.layers import MLP, BlockStyle
from modules.backbones.positions import Positions
from modules.backbones.recomputed import recomputed
from modules.backbones.resampling import sincos1d
from modules.backbones.stem import StemViT


class Size(NamedTuple):
    depth: int
    embed_dim: int
    num_heads: int
    mlp_ratio: int
    is_exact: bool = False


VARIANTS = {
    "mu": Size(2, 32, 2, 2),  # a toy
    "7": Size(7, 256, 4, 2),
    "10": Size(10, 256, 4, 2),
    "12": Size(12, 256, 4, 2),
    "14": Size(14, 384, 6, 3),
    "19": Size(19, 448, 7, 3),
    "24": Size(24, 512, 8, 3),
    "t_14": Size(14, 384, 6, 3, True),
    "t_19": Size(19, 448, 7, 3, True),
    "t_24": Size(24, 512, 8, 3, True),
}
SPLITS = ((7, 4, 2), (3, 2, 1), (3, 2, 1))  # side, stride and margin of what makes a token
PATCH, TOKEN_DIM, NUM_FEATURES = 16, 64, 32
STYLE = BlockStyle(qkv_bias=False, norm_eps=1e-5)


class Mixing(nn.Module):
    """A layer between two splits: tokens of any width become some of `TOKEN_DIM`."""

    w: Tensor

    def __init__(self, inside: int, is_exact: bool) -> None:
        super().__init__()
        dim, self.scale = TOKEN_DIM, inside**-0.5  # published: not that of q
        self.norm1 = nn.LayerNorm(inside)
        self.qkv = nn.Linear(inside, 3 * dim, bias=not is_exact)
        self.proj, self.norm2 = nn.Linear(dim, dim), nn.LayerNorm(dim)
        self.mlp, self.drop = MLP(dim, dim, STYLE), nn.Dropout(0.0 if is_exact else 0.1)
        if not is_exact:
            w = nn.init.orthogonal_(torch.empty(NUM_FEATURES, dim))
            self.register_buffer("w", w * NUM_FEATURES**0.5)

    def forward(self, x: Float[Tensor, "b n e"]) -> Float[Tensor, "b n d"]:
        q, k, v = self.qkv(self.norm1(x)).chunk(3, dim=-1)
        exact, linear = F.scaled_dot_product_attention, self.linear_attention
        mixed = linear(q, k, v) if hasattr(self, "w") else exact(q, k, v, scale=self.scale)
        x = v + self.drop(self.proj(mixed))
        out: Tensor = x + self.drop(self.mlp(self.norm2(x)))
        return out

    def linear_attention(self, q: Tensor, k: Tensor, v: Tensor) -> Float[Tensor, "b n d"]:
        kind = "cpu" if q.is_meta else q.device.type
        with torch.autocast(kind, enabled=False):
            q, k, wide = (x.to(torch.promote_types(x.dtype, torch.float32)) for x in (q, k, v))
            q, k = self.features(q), self.features(k)
            return (q @ (k.mT @ wide)).div(q @ k.sum(1)[:, :, None] + 1e-8).to(v.dtype)

    def features(self, x: Float[Tensor, "b n d"]) -> Float[Tensor, "b n m"]:
        logarithm = x @ self.w.to(x.dtype).T - x.square().sum(-1, keepdim=True) / 2
        return torch.exp(logarithm).mul(NUM_FEATURES**-0.5)


def unfold_on_xla(
    x: Float[Tensor, "b c height width"], side: int, dilation: int, margin: int, stride: int
) -> Float[Tensor, "b e n"]:
    """`F.unfold` as a convolution: on a TPU, its own would fetch all images to the host."""
    area, channels = side * side, x.shape[1]
    picks = torch.eye(area, dtype=x.dtype, device=x.device).view(area, 1, side, side)
    weight = picks.repeat(channels, 1, 1, 1)
    return F.conv2d(x, weight, None, stride, margin, dilation, channels).flatten(2)


def split_into(
    x: Float[Tensor, "b c height width"], split: tuple[int, int, int], layer: nn.Module
) -> Float[Tensor, "b n d"]:
    """What a layer makes of overlapping windows, `split` as in `SPLITS`."""
    side, stride, margin = split
    unfolded = unfold_on_xla if x.device.type == "xla" else F.unfold
    tokens: Tensor = layer(unfolded(x, side, 1, margin, stride).mT)
    return tokens


class TokensToToken(nn.Module):
    def __init__(self, in_channels: int, dim: int, is_exact: bool, recompute: bool) -> None:
        super().__init__()
        self.recompute = recompute
        areas = [side * side for side, *_ in SPLITS]
        self.attention1 = Mixing(in_channels * areas[0], is_exact)
        self.attention2 = Mixing(TOKEN_DIM * areas[1], is_exact)
        self.project = nn.Linear(TOKEN_DIM * areas[2], dim)

    def forward(self, images: Float[Tensor, "b c height width"]) -> Float[Tensor, "b n d"]:
        x = images
        layers = (self.attention1, self.attention2, self.project)
        for split, layer in zip(SPLITS, layers, strict=True):
            rows = x.shape[2] // split[1]
            if self.recompute and self.training:
                tokens: Tensor = recomputed(split_into, x, split, layer)
            else:
                tokens = split_into(x, split, layer)
            x = rearrange(tokens, "b (y x) d -> b d y x", y=rows)
        return tokens


class T2TViT(StemViT):
    """The Vision Transformer on tokens of tokens, patches of 16 pixels; takes no packs.

    Args:
        variant: from `VARIANTS`: mu (toy), 7, 10, 12, 14, 19, 24, or t_14, t_19, t_24.
        image_size, in_channels, drop_path, depth: as in `ViT`.
        recompute: keep only the input of every block and of every layer that makes tokens for the
            backward pass, and compute them again in it (gradient checkpointing).

    Raises:
        ValueError: unknown variant, and as `ViT`.
    """

    def __init__(
        self,
        variant: str = "14",
        image_size: int | tuple[int, int] = 224,
        in_channels: int = 3,
        drop_path: float = 0.0,
        depth: int | None = None,
        recompute: bool = False,
    ) -> None:
        if variant not in VARIANTS:
            raise ValueError(f"unknown T2T-ViT {variant!r}; known: {', '.join(VARIANTS)}")
        size = VARIANTS[variant]
        super().__init__(
            patch_size=PATCH,
            image_size=image_size,
            in_channels=in_channels,
            positions=Positions(resample="bicubic"),
            block=STYLE,
            init="dino",  # the class token as large as the rest
            drop_path=drop_path,
            depth=size.depth if depth is None else depth,
            embed_dim=size.embed_dim,
            num_heads=size.num_heads,
            mlp_dim=size.mlp_ratio * size.embed_dim,
            recompute=recompute,
        )
        for table in self.positions.requires_grad_(False).parameters():  # type: ignore[union-attr]
            table.data.copy_(sincos1d(*table.shape[1:]))
        self.use_stem(TokensToToken(in_channels, size.embed_dim, size.is_exact, recompute), "dino")
