"""LV-ViT, a Vision Transformer for token labelling.

"All Tokens Matter: Token Labeling for Training Better Vision Transformers", Jiang et al. 2021,
https://arxiv.org/abs/2104.10858, section 3.3 and table 2; details are those of the published code
(`tlt/models/lvvit.py`). What makes it another network than ViT:

    tokens = conv P/2 stride P/2 (                       four convolutions instead of one
             3 x [conv 7x7 stride 2, or 3x3; batch norm; ReLU] (image))
    tokens = tokens + MHSA(LN(tokens)) / scale           residual branches are divided
    tokens = tokens + MLP(LN(tokens)) / scale

no biases of q, k and v, an MLP three times as wide as the tokens, LayerNorm's epsilon 1e-5.
The heads, one for the class token and one for all patches, belong to the method
(`modules.token_labeling`).
"""

from typing import NamedTuple

import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Float
from torch import Tensor, nn

from modules.backbones.layers import BlockStyle
from modules.backbones.positions import Positions
from modules.backbones.stem import StemViT


class Size(NamedTuple):
    depth: int
    embed_dim: int
    num_heads: int
    stem_dim: int
    residual_scale: float


VARIANTS = {
    "mu": Size(2, 32, 2, 16, 2.0),  # a toy for tests and smoke runs
    "T": Size(12, 240, 4, 64, 1.0),
    "S": Size(16, 384, 6, 64, 2.0),
    "M": Size(20, 512, 8, 64, 2.0),
    "L": Size(24, 768, 12, 128, 3.0),
}
MLP_RATIO = 3
POSITIONS = Positions(resample="bicubic")


class ConvPatchEmbed(nn.Module):
    """Four convolutions from an image to its patches; each patch sees a little of the next."""

    def __init__(self, patch_size: int, in_channels: int, stem_dim: int, dim: int) -> None:
        super().__init__()
        if patch_size < 2 or patch_size % 2:
            raise ValueError(
                f"patch_size is {patch_size}; expected an even number, as the first convolution "
                f"halves the image"
            )
        half = patch_size // 2
        self.conv1 = nn.Conv2d(in_channels, stem_dim, 7, 2, 3, bias=False)
        self.bn1 = nn.BatchNorm2d(stem_dim)
        self.conv2 = nn.Conv2d(stem_dim, stem_dim, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(stem_dim)
        self.conv3 = nn.Conv2d(stem_dim, stem_dim, 3, 1, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(stem_dim)
        self.proj = nn.Conv2d(stem_dim, dim, half, half)

    def forward(self, images: Float[Tensor, "b c height width"]) -> Float[Tensor, "b n d"]:
        x = F.relu(self.bn1(self.conv1(images)))
        x = F.relu(self.bn2(self.conv2(x)))
        x = F.relu(self.bn3(self.conv3(x)))
        tokens: Tensor = rearrange(self.proj(x), "b d rows columns -> b (rows columns) d")
        return tokens


class LVViT(StemViT):
    """The Vision Transformer of token labelling.

    Takes images of any size that patches divide, and lists of groups of one size each; no packs,
    since its first convolutions look beyond the edge of a patch. In training their batch norms
    see one group at a time.

    Args:
        variant: size from `VARIANTS`: mu (toy), T, S, M or L.
        patch_size: side of a patch in pixels, even.
        image_size: side in pixels, or (height, width).
        in_channels: channels of the input images.
        positions: which positions, and where they enter; tables are resampled as published.
        dropout: rate after adding positions, after the attention projection, after the
            activation and after the second linear layer of the MLP.
        drop_path: stochastic depth of the last block; it grows linearly from 0 at the first.
        depth: number of blocks instead of the variant's.
        embed_dim: width instead of the variant's.
        num_heads: attention heads instead of the variant's.
        mlp_dim: hidden width of the MLP; three times the width where not given.
        stem_dim: channels of the first three convolutions instead of the variant's.
        residual_scale: what branches are divided by, instead of the variant's.
        recompute: keep only the input of every block for the backward pass, and compute the block
            again in it (gradient checkpointing).

    Raises:
        ValueError: unknown variant, a size that patches do not divide, an odd patch size, rates
            outside [0, 1).
    """

    def __init__(
        self,
        variant: str = "S",
        patch_size: int = 16,
        image_size: int | tuple[int, int] = 224,
        in_channels: int = 3,
        positions: Positions = POSITIONS,
        dropout: float = 0.0,
        drop_path: float = 0.0,
        depth: int | None = None,
        embed_dim: int | None = None,
        num_heads: int | None = None,
        mlp_dim: int | None = None,
        stem_dim: int | None = None,
        residual_scale: float | None = None,
        recompute: bool = False,
    ) -> None:
        if variant not in VARIANTS:
            raise ValueError(f"unknown LV-ViT variant {variant!r}; known: {', '.join(VARIANTS)}")
        size = VARIANTS[variant]
        dim = embed_dim or size.embed_dim
        style = BlockStyle(
            qkv_bias=False,
            norm_eps=1e-5,
            residual_scale=size.residual_scale if residual_scale is None else residual_scale,
        )
        super().__init__(
            patch_size=patch_size,
            image_size=image_size,
            in_channels=in_channels,
            positions=positions,
            block=style,
            dropout=dropout,
            drop_path=drop_path,
            depth=size.depth if depth is None else depth,
            embed_dim=size.embed_dim if embed_dim is None else embed_dim,
            num_heads=size.num_heads if num_heads is None else num_heads,
            mlp_dim=MLP_RATIO * dim if mlp_dim is None else mlp_dim,
            recompute=recompute,
        )
        stem_dim = size.stem_dim if stem_dim is None else stem_dim
        if stem_dim < 1:
            raise ValueError(f"stem_dim is {stem_dim}; expected at least 1")
        # Convolutions begin as torch draws them; the class token is no smaller than positions.
        self.use_stem(ConvPatchEmbed(patch_size, in_channels, stem_dim, dim), init=None)
        assert self.cls_token is not None
        nn.init.normal_(self.cls_token, std=0.02)
