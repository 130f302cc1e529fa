"""NaViT, a Vision Transformer for any aspect ratio and resolution.

"Patch n' Pack: NaViT, a Vision Transformer for any Aspect Ratio and Resolution",
Dehghani et al. 2023, https://arxiv.org/abs/2307.06304. Its blocks are those of "Scaling Vision
Transformers to 22 Billion Parameters" (Dehghani et al. 2023): norms of q and k, no biases in
norms and in attention.

    tokens = patches(images) W + b + phi(row) + phi(column)     all images of a row in one line
    repeat depth times:
        tokens = tokens + MHSA(LN(tokens))                      among tokens of the same image
        tokens = tokens + MLP(LN(tokens))
    pooled = MAP(LN(tokens))                                    one query an image
"""

from typing import Literal, overload

import torch
from einops import rearrange
from jaxtyping import Float, Int
from torch import Tensor, nn

from modules.backbones import initialise
from modules.backbones.attention import Groups, Packed, Segments
from modules.backbones.factorised import Factorised, FactorisedPositions
from modules.backbones.layers import (
    Backbone,
    Block,
    BlockStyle,
    Features,
    PatchEmbed,
    check_patch_width,
    drop_path_rates,
    layer_norm,
)
from modules.backbones.masked import Altered, Group, Visible, pixels
from modules.backbones.packed import check_pack
from modules.backbones.pooling import AttentionPool, QueryPool, only_filled
from modules.backbones.recomputed import recomputed
from modules.backbones.resampling import Grid
from modules.backbones.vit import check_choice, check_rates, grid_of, resolve_size

STYLE = BlockStyle(qkv_bias=False, proj_bias=False, qk_norm="rms", norm_bias=False)


class NaViT(Backbone):
    """The Vision Transformer of native resolution.

    Takes packs (`attention.Packed`) and images of one size; no position is ever resampled.

    Args:
        variant: size from `vit.VARIANTS`: mu (toy), Ti, S, M, B, L, H, g, G or So400m.
        patch_size: side of a patch in pixels.
        in_channels: channels of the input images.
        positions: functions of row and column, and how they are put together.
        block: what the blocks are made of.
        patch_norm: LayerNorm before and after the projection of patches (vit-pytorch).
        pooling: "map" attention pooling with an MLP (Zhai et al. 2021); "query" attention pooling
            without one, added to its query, then a norm (vit-pytorch).
        init: first values: "timm", "dino", "jax" (Google), "mae" or "moco" (MoCo v3).
        dropout: rate after adding positions, after the attention projection, after the
            activation and after the second linear layer of the MLP.
        drop_path: stochastic depth of the last block; it grows linearly from 0 at the first.
        depth: number of blocks instead of the variant's.
        embed_dim: width instead of the variant's.
        num_heads: attention heads instead of the variant's.
        mlp_dim: hidden width of the MLP; 4 * embed_dim where embed_dim is given, else the
            variant's.
        recompute: keep only the input of every block for the backward pass, and compute the block
            again in it (gradient checkpointing).

    Raises:
        ValueError: unknown variant, pooling or init, rates outside [0, 1), a width that heads or
            positions do not divide, a patch size below 1.
    """

    image_size: None
    takes_masks = takes_visible = True

    def __init__(
        self,
        variant: str = "S",
        patch_size: int = 16,
        in_channels: int = 3,
        positions: FactorisedPositions = FactorisedPositions(),  # noqa: B008 - frozen
        block: BlockStyle = STYLE,
        patch_norm: bool = False,
        pooling: Literal["map", "query"] = "map",
        init: Literal["timm", "dino", "jax", "mae", "moco"] = "timm",
        dropout: float = 0.0,
        drop_path: float = 0.0,
        depth: int | None = None,
        embed_dim: int | None = None,
        num_heads: int | None = None,
        mlp_dim: int | None = None,
        recompute: bool = False,
    ) -> None:
        super().__init__()
        size = resolve_size(variant, depth, embed_dim, num_heads, mlp_dim)
        check_rates(dropout=dropout, drop_path=drop_path)
        check_choice("pooling", pooling, ("map", "query"))
        check_choice("init", init, tuple(initialise.RULES))
        if patch_size < 1:
            raise ValueError(f"patch_size is {patch_size}; expected at least 1")
        dim = self.embed_dim = size.embed_dim
        self.patch_size, self.num_layers, self.in_channels = patch_size, size.depth, in_channels
        self.num_prefix_tokens, self.image_size, self.recompute = 0, None, recompute
        self.max_grid, self.patch_width = positions.max_grid, in_channels * patch_size**2

        self.patch_norm = layer_norm(self.patch_width, block) if patch_norm else nn.Identity()
        self.patch_embed = PatchEmbed(patch_size, in_channels, dim)
        self.embed_norm = layer_norm(dim, block) if patch_norm else nn.Identity()
        self.positions = Factorised(positions, dim)
        self.pos_drop = nn.Dropout(dropout)
        self.blocks = nn.ModuleList(
            Block(dim, size.num_heads, size.mlp_dim, block, dropout, rate)
            for rate in drop_path_rates(drop_path, size.depth)
        )
        self.norm = layer_norm(dim, block)
        self.attn_pool: nn.Module
        if pooling == "map":
            self.attn_pool = AttentionPool(dim, size.num_heads, size.mlp_dim, block)
        else:
            self.attn_pool = QueryPool(dim, size.num_heads, block)
        self.fc_norm = layer_norm(dim, block) if pooling == "query" else nn.Identity()
        initialise.RULES[init](self)

    @overload
    def forward(
        self, images: Float[Tensor, "b c height width"] | Altered | Visible | Packed
    ) -> Features: ...
    @overload
    def forward(self, images: list[Group]) -> list[Features]: ...
    def forward(self, images: Group | Visible | Packed | list[Group]) -> Features | list[Features]:
        if isinstance(images, list):
            return self.forward_groups(images)
        (last,) = self.last_blocks(images, 1)
        return last

    def forward_groups(self, groups: list[Group]) -> list[Features]:
        """Of every group what it gives alone; the blocks go over all tokens once."""
        grids = [self.grid_of(images) for images in groups]
        parts = [self.embed(images, grid) for images, grid in zip(groups, grids, strict=True)]
        where = Groups(parts, grids)
        x = where.join(parts)
        for block in self.blocks:
            x = self.through(block, x, where)
        each = zip(where.split(x), grids, strict=True)
        return [self.read_out(tokens, grid, None) for tokens, grid in each]

    def last_blocks(
        self, images: Float[Tensor, "b c height width"] | Altered | Visible | Packed, count: int
    ) -> list[Features]:
        """What the last `count` blocks give, the last one last, each read out as `forward` does.

        Raises:
            ValueError: more blocks than there are, or none; images or packs that were made for
                another backbone.
        """
        if not 1 <= count <= self.num_layers:
            raise ValueError(f"{count} blocks were asked of a NaViT that has {self.num_layers}")
        grid, segments = None, None
        if isinstance(images, Visible):
            positions, grids = places(self.grid_of(images), images.places.device)
            own = images.places
            patches = images.patches(self.patch_size)
            x = self.embed_patches(patches, positions[0, own], grids[0, own])
        elif isinstance(images, (Tensor, Altered)):
            grid = self.grid_of(images)
            x = self.embed(images, grid)
        else:
            check_pack(images, self.num_prefix_tokens, self.max_grid)
            check_patch_width(images.patches, self.patch_width)
            segments = Segments(images)
            grids = images.grids[segments.image]
            x = self.embed_patches(images.patches, images.positions, grids)
        kept: list[Tensor] = []
        for block in self.blocks:
            x = self.through(block, x, segments)
            kept = [*kept, x][-count:]
        return [self.read_out(x, grid, segments) for x in kept]

    def through(
        self, block: nn.Module, x: Float[Tensor, "b n d"], where: Segments | Groups | None
    ) -> Float[Tensor, "b n d"]:
        if self.recompute and self.training:
            out: Tensor = recomputed(block, x, None, where)
        else:
            out = block(x, None, where)
        return out

    def embed(
        self, images: Float[Tensor, "b c height width"] | Altered, grid: Grid
    ) -> Float[Tensor, "b n d"]:
        """Patches with their positions."""
        p = self.patch_size
        patches = rearrange(pixels(images), "b c (y p) (x q) -> b (y x) (c p q)", p=p, q=p)
        altered = images if isinstance(images, Altered) else None
        return self.embed_patches(patches, *places(grid, patches.device), altered)

    def embed_patches(
        self,
        patches: Float[Tensor, "rows n e"],
        positions: Int[Tensor, "#rows n 2"],
        grids: Int[Tensor, "#rows n 2"],
        altered: Altered | None = None,
    ) -> Float[Tensor, "rows n d"]:
        """The same of patches that are cut already."""
        x = self.embed_norm(self.patch_embed.packed(self.patch_norm(patches)))
        x = x if altered is None else altered.over(x)
        out: Tensor = self.pos_drop(x + self.positions(positions, grids))
        return out

    def grid_of(self, images: Float[Tensor, "b c height width"] | Altered | Visible) -> Grid:
        """Rows and columns of patches of such images.

        Raises:
            ValueError: images that this network cannot take.
        """
        grid = grid_of(pixels(images), self.in_channels, self.patch_size)
        if self.max_grid is not None and max(grid) > self.max_grid:
            raise ValueError(
                f"images of {grid[0]}x{grid[1]} patches reached a NaViT whose positions end at "
                f"{self.max_grid}; set positions.max_side to {max(grid)} or more"
            )
        return grid

    def read_out(
        self, x: Float[Tensor, "b n d"], grid: Grid | None, segments: Segments | None
    ) -> Features:
        """Final norm and pooling of the tokens after a block."""
        patches = self.norm(x)
        pooled = self.fc_norm(self.attn_pool(patches, segments))
        return Features(only_filled(pooled, segments), cls=None, patches=patches, grid=grid)


def places(grid: Grid, device: torch.device) -> tuple[Int[Tensor, "1 n 2"], Int[Tensor, "1 n 2"]]:
    """Row and column of every patch of such a grid, and its rows and columns beside each."""
    rows, columns = (torch.arange(side, device=device) for side in grid)
    positions = torch.cartesian_prod(rows, columns).view(1, -1, 2)
    return positions, torch.tensor(grid, device=device).expand_as(positions)
