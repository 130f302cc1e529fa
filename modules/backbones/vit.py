"""Vision Transformer.

"An Image is Worth 16x16 Words: Transformers for Image Recognition at Scale",
Dosovitskiy et al. 2020, https://arxiv.org/abs/2010.11929, section 3.1 and table 1.
Sizes Ti and S are DeiT's (Touvron et al. 2020), M is DeiT-III's.

    tokens = patches(image) W + b                        one token a patch
    tokens = [cls; tokens] + positions                   "cls" pooling only has the token
    repeat depth times:
        tokens = tokens + MHSA(LN(tokens))
        tokens = tokens + MLP(LN(tokens))
    pooled = LN(tokens)[cls]      or      LN(mean(patch tokens))
"""

from typing import Literal, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn

from modules.backbones.layers import (
    Backbone,
    Block,
    Features,
    PatchEmbed,
    drop_path_rates,
    init_linear,
)


class Size(NamedTuple):
    depth: int
    embed_dim: int
    num_heads: int
    mlp_dim: int


VARIANTS = {
    "mu": Size(2, 32, 2, 64),  # a toy for tests and smoke runs
    "Ti": Size(12, 192, 3, 768),
    "S": Size(12, 384, 6, 1536),
    "M": Size(12, 512, 8, 2048),
    "B": Size(12, 768, 12, 3072),
    "L": Size(24, 1024, 16, 4096),
    "H": Size(32, 1280, 16, 5120),
}


def as_pair(size: int | tuple[int, int]) -> tuple[int, int]:
    return (size, size) if isinstance(size, int) else size


class ViT(Backbone):
    """The plain Vision Transformer.

    Args:
        variant: size from `VARIANTS`: mu (toy), Ti, S, M, B, L or H.
        patch_size: side of a patch in pixels.
        image_size: side in pixels, or (height, width).
        in_channels: channels of the input images.
        pooling: "cls" adds a class token and returns it; "avg" averages the patch tokens,
            then normalises, and has no class token.
        dropout: rate after adding positions, after the attention projection, after GELU
            and after the second linear layer of the MLP.
        drop_path: stochastic depth of the last block; it grows linearly from 0 at the first.
        depth: number of blocks instead of the variant's.
        embed_dim: width instead of the variant's.
        num_heads: attention heads instead of the variant's.
        mlp_dim: hidden width of the MLP; 4 * embed_dim where embed_dim is given, else the
            variant's.

    Raises:
        ValueError: unknown variant or pooling, a size that patches do not divide, rates
            outside [0, 1).
    """

    def __init__(
        self,
        variant: str = "S",
        patch_size: int = 16,
        image_size: int | tuple[int, int] = 224,
        in_channels: int = 3,
        pooling: Literal["cls", "avg"] = "cls",
        dropout: float = 0.0,
        drop_path: float = 0.0,
        depth: int | None = None,
        embed_dim: int | None = None,
        num_heads: int | None = None,
        mlp_dim: int | None = None,
    ) -> None:
        super().__init__()
        size = resolve_size(variant, depth, embed_dim, num_heads, mlp_dim)
        height, width = as_pair(image_size)
        check_arguments(height, width, patch_size, pooling, dropout, drop_path)
        self.embed_dim, self.patch_size = size.embed_dim, patch_size
        self.image_size, self.in_channels = (height, width), in_channels
        self.pooling = pooling
        self.grid = (height // patch_size, width // patch_size)
        self.num_prefix_tokens = 1 if pooling == "cls" else 0

        num_tokens = self.num_prefix_tokens + self.grid[0] * self.grid[1]
        self.patch_embed = PatchEmbed(patch_size, in_channels, size.embed_dim)
        if pooling == "cls":
            self.cls_token = nn.Parameter(torch.zeros(1, 1, size.embed_dim))
        self.pos_embed = nn.Parameter(torch.zeros(1, num_tokens, size.embed_dim))
        self.pos_drop = nn.Dropout(dropout)
        self.blocks = nn.Sequential(
            *(
                Block(size.embed_dim, size.num_heads, size.mlp_dim, dropout, rate)
                for rate in drop_path_rates(drop_path, size.depth)
            )
        )
        # timm names the final norm after what it sees: all tokens, or their average.
        if pooling == "cls":
            self.norm = nn.LayerNorm(size.embed_dim, eps=1e-6)
        else:
            self.fc_norm = nn.LayerNorm(size.embed_dim, eps=1e-6)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """timm's default initialisation."""
        init_linear(self)
        nn.init.trunc_normal_(self.pos_embed, std=0.02)
        if self.pooling == "cls":
            nn.init.normal_(self.cls_token, std=1e-6)

    def forward(self, images: Float[Tensor, "b c height width"]) -> Features:
        if images.shape[1:] != (self.in_channels, *self.image_size):
            raise ValueError(
                f"images of shape {tuple(images.shape[1:])} (channels, height, width) reached a "
                f"ViT built for {(self.in_channels, *self.image_size)}; set the backbone's "
                f"in_channels and image_size to what the data gives"
            )
        x = self.patch_embed(images)
        if self.pooling == "cls":
            x = torch.cat((self.cls_token.expand(x.shape[0], -1, -1), x), dim=1)
        x = self.blocks(self.pos_drop(x + self.pos_embed))
        if self.pooling == "cls":
            x = self.norm(x)
            return Features(pooled=x[:, 0], cls=x[:, 0], patches=x[:, 1:], grid=self.grid)
        return Features(pooled=self.fc_norm(x.mean(dim=1)), cls=None, patches=x, grid=self.grid)

    def no_weight_decay(self) -> frozenset[str]:
        return frozenset({"pos_embed", "cls_token"} & dict(self.named_parameters()).keys())


def resolve_size(
    variant: str,
    depth: int | None,
    embed_dim: int | None,
    num_heads: int | None,
    mlp_dim: int | None,
) -> Size:
    """The variant's size with what is given in its place, every part of it positive."""
    if variant not in VARIANTS:
        raise ValueError(f"unknown ViT variant {variant!r}; known: {', '.join(VARIANTS)}")
    if mlp_dim is None and embed_dim is not None:
        mlp_dim = 4 * embed_dim
    given = {"depth": depth, "embed_dim": embed_dim, "num_heads": num_heads, "mlp_dim": mlp_dim}
    for name, value in given.items():
        if value is not None and value < 1:
            raise ValueError(f"{name} is {value}; expected at least 1")
    return VARIANTS[variant]._replace(**{k: v for k, v in given.items() if v is not None})


def check_arguments(
    height: int, width: int, patch_size: int, pooling: str, dropout: float, drop_path: float
) -> None:
    if patch_size < 1 or height % patch_size or width % patch_size:
        raise ValueError(
            f"image_size {height}x{width} is not divisible by patch_size {patch_size}; nearest "
            f"that fits: {patch_size * max(1, round(height / max(1, patch_size)))}x"
            f"{patch_size * max(1, round(width / max(1, patch_size)))}"
        )
    if pooling not in ("cls", "avg"):
        raise ValueError(f"pooling {pooling!r} is not known; expected 'cls' or 'avg'")
    for name, rate in (("dropout", dropout), ("drop_path", drop_path)):
        if not 0.0 <= rate < 1.0:
            raise ValueError(f"{name} is {rate}; expected a rate in [0, 1)")
