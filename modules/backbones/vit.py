"""Vision Transformer.

"An Image is Worth 16x16 Words: Transformers for Image Recognition at Scale",
Dosovitskiy et al. 2020, https://arxiv.org/abs/2010.11929, section 3.1 and table 1.
Sizes Ti and S are DeiT's (Touvron et al. 2020), M is DeiT-III's, g, G and So400m are those of
"Scaling Vision Transformers" (Zhai et al. 2021) and "Getting ViT in Shape" (Alabdulmohsin et al.
2023).

    tokens = patches(image) W + b                        one token a patch
    tokens = [cls; tokens] + positions
    repeat depth times:
        tokens = tokens + MHSA(LN(tokens))
        tokens = tokens + MLP(LN(tokens))
    pooled = LN(tokens)[cls]   or   LN(mean(patches))   or   MAP(LN(patches))
"""

from typing import Literal, NamedTuple, overload

import torch
from jaxtyping import Float
from torch import Tensor, nn

from modules.backbones import initialise
from modules.backbones.attention import Groups, Packed, Segments
from modules.backbones.layers import (
    Backbone,
    Block,
    BlockStyle,
    Features,
    PatchEmbed,
    drop_path_rates,
    layer_norm,
)
from modules.backbones.masked import Altered, Group, Part, Visible, pixels
from modules.backbones.packed import check_pack, own_rows
from modules.backbones.pooling import AttentionPool, mean_patch, only_filled, prefix_token
from modules.backbones.positions import Positions, for_blocks, make_biases, make_tables, read
from modules.backbones.recomputed import recomputed
from modules.backbones.resampling import MAX_GRID, Grid


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
    "g": Size(40, 1408, 16, 6144),
    "G": Size(48, 1664, 16, 8192),
    "So400m": Size(27, 1152, 16, 4304),
}


def as_pair(size: int | tuple[int, int]) -> tuple[int, int]:
    return (size, size) if isinstance(size, int) else size


POOLINGS = ("cls", "avg", "norm_avg", "map")


class ViT(Backbone):
    """The plain Vision Transformer.

    Takes images of any size that patches divide; `image_size` is what its positions were made
    for, and they are resampled to others. Takes packs as well (`attention.Packed`), and lists of
    groups of one size each (`attention.Groups`): every image is what it would be alone.

    Args:
        variant: size from `VARIANTS`: mu (toy), Ti, S, M, B, L, H, g, G or So400m.
        patch_size: side of a patch in pixels.
        image_size: side in pixels, or (height, width).
        in_channels: channels of the input images.
        pooling: "cls" the class token after the final norm; "avg" the mean of the patch tokens,
            then a norm (timm, MAE); "norm_avg" the norm, then the mean (big_vision); "map" the
            norm, then attention pooling (SigLIP).
        class_token: has a class token.
        distillation_token: has DeiT's second token, `Features.dist`.
        num_registers: learned tokens that nothing reads (Darcet et al. 2023).
        positions: which positions, and where they enter.
        block: what the blocks are made of.
        pre_logits: Linear and tanh after pooling, as in ImageNet-21k pre-training.
        init: first values: "timm", "dino", "jax" (Google), "mae" or "moco" (MoCo v3).
        dropout: rate after adding positions, after the attention projection, after the
            activation and after the second linear layer of the MLP.
        drop_path: stochastic depth of the last block; it grows linearly from 0 at the first.
        uniform_drop_path: the same rate for all blocks (DeiT-III, DINOv2).
        depth: number of blocks instead of the variant's.
        embed_dim: width instead of the variant's.
        num_heads: attention heads instead of the variant's.
        mlp_dim: hidden width of the MLP; 4 * embed_dim where embed_dim is given, else the
            variant's.
        recompute: keep only the input of every block for the backward pass, and compute the block
            again in it (gradient checkpointing).

    Raises:
        ValueError: unknown variant, pooling or init, a size that patches do not divide, rates
            outside [0, 1), "cls" pooling without the token.
    """

    image_size: tuple[int, int]
    takes_masks = True

    def __init__(
        self,
        variant: str = "S",
        patch_size: int = 16,
        image_size: int | tuple[int, int] = 224,
        in_channels: int = 3,
        pooling: Literal["cls", "avg", "norm_avg", "map"] = "cls",
        class_token: bool = True,
        distillation_token: bool = False,
        num_registers: int = 0,
        positions: Positions = Positions(),  # noqa: B008 - frozen
        block: BlockStyle = BlockStyle(),  # noqa: B008 - frozen
        pre_logits: bool = False,
        init: Literal["timm", "dino", "jax", "mae", "moco"] = "timm",
        dropout: float = 0.0,
        drop_path: float = 0.0,
        uniform_drop_path: bool = False,
        depth: int | None = None,
        embed_dim: int | None = None,
        num_heads: int | None = None,
        mlp_dim: int | None = None,
        recompute: bool = False,
    ) -> None:
        super().__init__()
        size = resolve_size(variant, depth, embed_dim, num_heads, mlp_dim)
        height, width = as_pair(image_size)
        check_divisible(height, width, patch_size)
        check_rates(dropout=dropout, drop_path=drop_path)
        check_choice("pooling", pooling, POOLINGS)
        check_choice("init", init, tuple(initialise.RULES))
        if pooling == "cls" and not class_token:
            raise ValueError("pooling 'cls' reads the class token, but class_token is false")
        if num_registers < 0:
            raise ValueError(f"num_registers is {num_registers}; expected 0 or more")
        dim = self.embed_dim = size.embed_dim
        self.patch_size, self.num_layers, self.num_registers = patch_size, size.depth, num_registers
        self.image_size, self.in_channels = (height, width), in_channels
        self.recompute = recompute
        self.pooling, self.grid = pooling, (height // patch_size, width // patch_size)
        self.max_grid = None if positions.kind == "none" else MAX_GRID
        self.takes_packs = self.takes_visible = positions.kind != "relative"
        prefix = self.num_prefix_tokens = class_token + distillation_token + num_registers

        self.patch_embed = PatchEmbed(patch_size, in_channels, dim)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, dim)) if class_token else None
        self.dist_token = nn.Parameter(torch.zeros(1, 1, dim)) if distillation_token else None
        self.reg_token = nn.Parameter(torch.zeros(1, num_registers, dim)) if num_registers else None
        self.inject, self.resample, self.style = positions.place, positions.resample, block
        self.positions = make_tables(positions, dim, self.grid, prefix, size.depth)
        self.relative = make_biases(positions, size.num_heads, self.grid, prefix, size.depth)
        self.pos_drop = nn.Dropout(dropout)
        rates = [drop_path] * size.depth if uniform_drop_path else None
        self.blocks = nn.ModuleList(
            Block(dim, size.num_heads, size.mlp_dim, block, dropout, rate)
            for rate in rates or drop_path_rates(drop_path, size.depth)
        )
        # timm names the final norm after what it sees: all tokens, or their average.
        norm = layer_norm(dim, block)
        self.norm = nn.Identity() if pooling == "avg" else norm
        self.fc_norm = norm if pooling == "avg" else nn.Identity()
        if pooling == "map":
            self.attn_pool = AttentionPool(dim, size.num_heads, size.mlp_dim, block)
        self.pre_logits = nn.Linear(dim, dim) if pre_logits else None
        initialise.RULES[init](self)

    @overload
    def forward(
        self, images: Float[Tensor, "b c height width"] | Altered | Visible | Packed
    ) -> Features: ...
    @overload
    def forward(self, images: list[Group]) -> list[Features]: ...
    def forward(self, images: Group | Visible | Packed | list[Group]) -> Features | list[Features]:
        if isinstance(images, list) and len(images) > 1:
            return self.forward_groups(images)
        (last,) = self.last_blocks(images[0] if isinstance(images, list) else images, 1)
        return [last] if isinstance(images, list) else last

    def forward_groups(self, groups: list[Group]) -> list[Features]:
        """Of every group what it gives alone; the blocks go over all tokens once."""
        grids = [self.grid_of(images) for images in groups]
        parts = [self.embed(images, grid) for images, grid in zip(groups, grids, strict=True)]
        where = Groups(parts, grids)
        (x,) = self.run_blocks(where.join(parts), where, keep=1)
        each = zip(where.split(self.norm(x)), grids, strict=True)
        return [self.pool(tokens, grid) for tokens, grid in each]

    def last_blocks(
        self, images: Float[Tensor, "b c height width"] | Altered | Visible | Packed, count: int
    ) -> list[Features]:
        """What the last `count` blocks give, the last one last, each read out as `forward` does.

        Raises:
            ValueError: more blocks than there are, or none; images or packs that were made for
                another backbone.
        """
        if not 1 <= count <= self.num_layers:
            raise ValueError(f"{count} blocks were asked of a ViT that has {self.num_layers}")
        where: Grid | Segments | Part
        if isinstance(images, Visible):
            where = Part(self.grid_of(images), images.places)
            x = self.embed_visible(images, where)
        elif isinstance(images, (Tensor, Altered)):
            where = self.grid_of(images)
            x = self.embed(images, where)
        else:
            check_pack(images, self.num_prefix_tokens, self.max_grid)
            where = Segments(images)
            x = self.embed_pack(images, where)
        return [self.read_out(x, where) for x in self.run_blocks(x, where, keep=count)]

    def grid_of(self, images: Float[Tensor, "b c height width"] | Altered | Visible) -> Grid:
        """Rows and columns of patches of such images.

        Raises:
            ValueError: images that this network cannot take.
        """
        return grid_of(pixels(images), self.in_channels, self.patch_size)

    def embed(
        self, images: Float[Tensor, "b c height width"] | Altered, grid: Grid
    ) -> Float[Tensor, "b n d"]:
        """Prefix tokens and patches, with the positions that are added at the stem."""
        x = self.patch_embed(pixels(images))
        if isinstance(images, Altered):
            x = images.over(x)
        return self.add_positions(self.after_prefix(x), grid)

    def embed_visible(self, images: Visible, part: Part) -> Float[Tensor, "b n d"]:
        """The same of the patches that are there; others are not even projected."""
        if not self.takes_visible:
            raise ValueError(
                "relative positions need all patches of an image: the biases of a choice of them "
                "would be as many as its attention scores; use learned1d, learned2d or sincos2d "
                "positions"
            )
        x = self.patch_embed.packed(images.patches(self.patch_size))
        return self.add_positions(self.after_prefix(x), part)

    def after_prefix(self, patches: Float[Tensor, "b n d"]) -> Float[Tensor, "b with_prefix d"]:
        """Prefix tokens, then patches."""
        if (before := self.prefix_tokens()) is None:
            return patches
        return torch.cat((before.expand(patches.shape[0], -1, -1), patches), dim=1)

    def embed_pack(self, pack: Packed, segments: Segments) -> Float[Tensor, "rows n d"]:
        """The same for a pack, every token in its place; padding begins as zeros."""
        x = own_rows(self.patch_embed.packed(pack.patches), self.prefix_tokens(), segments)
        return self.add_positions(x, segments)

    def prefix_tokens(self) -> Float[Tensor, "1 p d"] | None:
        """Class token, distillation token, registers."""
        tokens = (self.cls_token, self.dist_token, self.reg_token)
        given: list[Tensor] = [token for token in tokens if token is not None]
        return torch.cat(given, dim=1) if given else None

    def add_positions(
        self, x: Float[Tensor, "b n d"], where: Grid | Segments | Part
    ) -> Float[Tensor, "b n d"]:
        if self.inject == "stem" and self.positions is not None:
            x = x + read(self.positions, where)
        out: Tensor = self.pos_drop(x)
        return out

    def run_blocks(
        self, x: Float[Tensor, "b n d"], where: Grid | Segments | Groups | Part, keep: int
    ) -> list[Float[Tensor, "b n d"]]:
        """The tokens after each of the last `keep` blocks."""
        tables = None if self.inject == "stem" else self.positions
        segments = where if isinstance(where, (Segments, Groups)) else None
        kept: list[Tensor] = []
        for block, table, bias in zip(
            self.blocks,
            for_blocks(tables, where, self.num_layers),
            for_blocks(self.relative, where, self.num_layers),
            strict=True,
        ):
            if table is not None:
                x = x + (where.join(table) if isinstance(where, Groups) else table)
            if self.recompute and self.training:
                x = recomputed(block, x, bias, segments)
            else:
                x = block(x, bias, segments)
            kept = [*kept, x][-keep:]
        return kept

    def read_out(self, x: Float[Tensor, "b n d"], where: Grid | Segments | Part) -> Features:
        """Final norm and pooling of the tokens after a block."""
        return self.pool(self.norm(x), where)

    def pool(self, x: Float[Tensor, "b n d"], where: Grid | Segments | Part) -> Features:
        """What is read from tokens after the final norm."""
        segments = where if isinstance(where, Segments) else None
        patches = x if segments is not None else x[:, self.num_prefix_tokens :]
        has_cls = self.cls_token is not None
        cls = prefix_token(x, 0, segments) if has_cls else None
        if self.pooling == "map":
            pooled = self.attn_pool(patches, segments)
        elif self.pooling == "cls":
            assert cls is not None
            pooled = cls
        else:
            pooled = self.fc_norm(mean_patch(patches, segments))
        if self.pre_logits is not None:
            pooled = torch.tanh(self.pre_logits(pooled))
        return Features(
            pooled=only_filled(pooled, segments),
            cls=cls,
            patches=x if isinstance(where, Part) else patches,
            grid=None if isinstance(where, (Segments, Part)) else where,
            dist=None if self.dist_token is None else prefix_token(x, int(has_cls), segments),
        )


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


def grid_of(images: Float[Tensor, "b c height width"], channels: int, patch_size: int) -> Grid:
    """Rows and columns of patches of images, which must have so many channels."""
    if images.shape[1] != channels:
        raise ValueError(
            f"images of {images.shape[1]} channels reached a ViT built for {channels}; set "
            f"the backbone's in_channels and the data's channels to the same number"
        )
    height, width = images.shape[2:]
    check_divisible(height, width, patch_size)
    return height // patch_size, width // patch_size


def check_divisible(height: int, width: int, patch_size: int) -> None:
    if patch_size < 1 or min(height, width) < 1 or height % patch_size or width % patch_size:
        fits = [patch_size * max(1, round(n / max(1, patch_size))) for n in (height, width)]
        raise ValueError(
            f"image size {height}x{width} is not divisible by patch_size {patch_size}; nearest "
            f"that fits: {fits[0]}x{fits[1]}"
        )


def check_choice(name: str, value: str, known: tuple[str, ...]) -> None:
    if value not in known:
        raise ValueError(f"{name} {value!r} is not known; expected one of {', '.join(known)}")


def check_rates(**rates: float) -> None:
    for name, rate in rates.items():
        if not 0.0 <= rate < 1.0:
            raise ValueError(f"{name} is {rate}; expected a rate in [0, 1)")
