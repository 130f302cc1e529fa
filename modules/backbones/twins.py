"""Twins: attention in windows that do not shift, and attention to a coarser map in turn.

"Twins: Revisiting the Design of Spatial Attention in Vision Transformers", Chu et al. 2021,
https://arxiv.org/abs/2104.13840, as their authors' code has it. For every stage:

    map = LN(patches(map) W + b)                    4 x 4 pixels, then 2 x 2 tokens
    repeat depth times:
        map = map + attention(LN(map))
        map = map + MLP(LN(map))
        map = map + depthwise 3 x 3 convolution(map)         after the first block only
    pooled = mean(LN(map))

Attention of the SVT is local (LSA) in blocks 0, 2, ...: softmax within windows of 7 x 7. In blocks
1, 3, ... it is global (GSA): keys and values are LN(patches(map) W + b) of r x r tokens each. The
PCPVT has global attention in all blocks. The convolution is all that knows positions (PEG,
"Conditional Positional Encodings for Vision Transformers", Chu et al. 2021): the zeros around the
map tell where its edges are, at any size.
"""

import re
from typing import Literal, NamedTuple

import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Float
from torch import Tensor, nn

from modules.backbones.attention import attend
from modules.backbones.layers import (
    MLP,
    BlockStyle,
    DropPath,
    check_heads,
    drop_path_rates,
    layer_norm,
)
from modules.backbones.pyramid import (
    Kept,
    Pyramid,
    Stem,
    added,
    choose,
    deepened,
    first_grid,
    run_block,
)
from modules.backbones.resampling import Grid
from modules.backbones.vit import check_choice
from modules.backbones.window_attention import for_all
from modules.backbones.windows import (
    Merging,
    Order,
    coarser,
    merge,
    reorder,
    row_by_row,
    window_mask,
)


class Size(NamedTuple):
    embed_dims: tuple[int, ...]
    depths: tuple[int, ...]
    num_heads: tuple[int, ...]
    mlp_ratios: tuple[int, ...] = (4, 4, 4, 4)


SVT = {
    "mu": Size((8, 16, 16, 32), (2, 1, 2, 1), (1, 2, 2, 4)),  # a toy for tests and smoke runs
    "S": Size((64, 128, 256, 512), (2, 2, 10, 4), (2, 4, 8, 16)),
    "B": Size((96, 192, 384, 768), (2, 2, 18, 2), (3, 6, 12, 24)),
    "L": Size((128, 256, 512, 1024), (2, 2, 18, 2), (4, 8, 16, 32)),
}
PCPVT = {
    "mu": Size((8, 16, 16, 32), (2, 1, 2, 1), (1, 2, 2, 4), (8, 8, 4, 4)),
    "S": Size((64, 128, 320, 512), (3, 4, 6, 3), (1, 2, 5, 8), (8, 8, 4, 4)),
    "B": Size((64, 128, 320, 512), (3, 4, 18, 3), (1, 2, 5, 8), (8, 8, 4, 4)),
    "L": Size((64, 128, 320, 512), (3, 8, 27, 3), (1, 2, 5, 8), (8, 8, 4, 4)),
}
STRIDES = (8, 4, 2, 1)  # of the keys of global attention, stage by stage
STYLE = BlockStyle(norm_eps=1e-6)
PADDINGS = ("masked", "zeros")


def patches_weight(conv: nn.Conv2d) -> Float[Tensor, "d e"]:
    """A convolution whose stride is its kernel, as a matrix for patches with channels last."""
    return rearrange(conv.weight, "d c p q -> d (p q c)")


class LocalAttention(nn.Module):
    """LSA: attention within windows of a map."""

    def __init__(self, dim: int, num_heads: int, window: int, hides_empty: bool) -> None:
        super().__init__()
        check_heads(dim, num_heads)
        self.num_heads, self.window, self.hides_empty = num_heads, window, hides_empty
        self.qkv, self.proj = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)

    def order(self, grid: Grid) -> Order:
        return Order(grid, (self.window, self.window))

    def forward(self, x: Float[Tensor, "b n d"], now: Order) -> Float[Tensor, "b n d"]:
        order = self.order(now.grid)
        x = reorder(x, now, order)
        mask = window_mask(order, self.hides_empty, x.device)
        joint = self.qkv(x.view(x.shape[0] * order.num_windows, -1, x.shape[2]))
        q, k, v = rearrange(joint, "w n (three h e) -> three w h n e", three=3, h=self.num_heads)
        out = attend(q, k, v, None if mask is None else for_all(mask, len(joint)))
        out = rearrange(out, "(b y) h n e -> b (y n) (h e)", b=x.shape[0])
        projected: Tensor = self.proj(reorder(out, order, now))
        return projected


class GlobalAttention(nn.Module):
    """GSA: attention of all tokens to patches of stride x stride tokens."""

    def __init__(self, dim: int, num_heads: int, stride: int) -> None:
        super().__init__()
        check_heads(dim, num_heads)
        self.num_heads, self.stride = num_heads, stride
        self.q, self.kv, self.proj = (
            nn.Linear(dim, dim),
            nn.Linear(dim, 2 * dim),
            nn.Linear(dim, dim),
        )
        if stride > 1:
            self.sr, self.norm = nn.Conv2d(dim, dim, stride, stride), nn.LayerNorm(dim)

    def forward(self, x: Float[Tensor, "b n d"], now: Order) -> Float[Tensor, "b n d"]:
        q = rearrange(self.q(x), "b n (h e) -> b h n e", h=self.num_heads)
        if self.stride > 1:
            then = row_by_row(coarser(now.grid, self.stride))
            x = merge(x, now, then, Merging(self.stride))
            x = self.norm(F.linear(x, patches_weight(self.sr), self.sr.bias))
        k, v = rearrange(self.kv(x), "b n (two h e) -> two b h n e", two=2, h=self.num_heads)
        out: Tensor = self.proj(rearrange(attend(q, k, v), "b h n e -> b n (h e)"))
        return out


class TwinsBlock(nn.Module):
    """Attention, then an MLP, each a branch after a norm."""

    def __init__(
        self, attn: LocalAttention | GlobalAttention, dim: int, mlp_dim: int, drop_path: float
    ) -> None:
        super().__init__()
        self.norm1, self.norm2 = layer_norm(dim, STYLE), layer_norm(dim, STYLE)
        self.attn, self.mlp = attn, MLP(dim, mlp_dim, STYLE)
        self.drop_path = DropPath(drop_path)

    def forward(
        self, x: Float[Tensor, "b n d"], now: Order
    ) -> tuple[Float[Tensor, "b n d"], Order]:
        if isinstance(self.attn, LocalAttention) and (order := self.attn.order(now.grid)).is_full:
            x, now = reorder(x, now, order), order  # they stay in the order of these windows
        x = added(x, self.drop_path(self.attn(self.norm1(x), now)))
        return added(x, self.drop_path(self.mlp(self.norm2(x)))), now


class PositionEncoding(nn.Module):
    """PEG: the map and a depthwise 3 x 3 convolution of it."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.proj = nn.Sequential(nn.Conv2d(dim, dim, 3, padding=1, groups=dim))

    def forward(self, x: Float[Tensor, "b n d"], now: Order) -> Float[Tensor, "b n d"]:
        x = reorder(x, now, row_by_row(now.grid))
        image = rearrange(x, "b (y x) d -> b d y x", y=now.grid[0])  # channels stay last in memory
        return added(x, rearrange(self.proj(image), "b d y x -> b (y x) d"))


class PatchMerging(nn.Module):
    """2 x 2 tokens become one: a convolution whose stride is its kernel, and a norm."""

    def __init__(self, dim: int, out_dim: int) -> None:
        super().__init__()
        self.proj, self.norm = nn.Conv2d(dim, out_dim, 2, 2), nn.LayerNorm(out_dim)

    def forward(self, x: Float[Tensor, "b n d"], now: Order, then: Order) -> Float[Tensor, "b m e"]:
        x = merge(x, now, then, Merging(2))
        out: Tensor = self.norm(F.linear(x, patches_weight(self.proj), self.proj.bias))
        return out


class Twins(Pyramid):
    """What both Twins share: stages of blocks, the position encoding after the first of each."""

    def build(
        self,
        size: Size,
        image_size: int | tuple[int, int],
        in_channels: int,
        window: int | None,
        hides_empty: bool,
        drop_path: float,
        recompute: bool,
    ) -> None:
        """Make the layers; `window` is that of local attention, None for global in all blocks."""
        dims = size.embed_dims
        self.set_up(dims, size.depths, image_size)
        self.in_channels, self.recompute = in_channels, recompute
        self.patch_embeds = nn.ModuleList(
            [Stem(in_channels, dims[0]), *map(PatchMerging, dims[:-1], dims[1:])]
        )
        rates, stages = iter(drop_path_rates(drop_path, self.num_layers)), []
        for i, (dim, heads) in enumerate(zip(dims, size.num_heads, strict=True)):
            blocks = [
                TwinsBlock(
                    GlobalAttention(dim, heads, STRIDES[i])
                    if window is None or j % 2
                    else LocalAttention(dim, heads, window, hides_empty),
                    *(dim, size.mlp_ratios[i] * dim, next(rates)),
                )
                for j in range(size.depths[i])
            ]
            stages.append(nn.ModuleList(blocks))
        self.blocks = nn.ModuleList(stages)
        self.pos_block = nn.ModuleList(map(PositionEncoding, dims))
        self.norm = layer_norm(dims[-1], STYLE)
        first_values(self)

    def stages(self, images: Float[Tensor, "b c height width"], keep: int) -> Kept:
        now = row_by_row(first_grid(images))
        x = images
        kept: Kept = []
        parts = zip(self.patch_embeds, self.blocks, self.pos_block, strict=True)
        for i, (embed, blocks, encode) in enumerate(parts):
            assert isinstance(blocks, nn.ModuleList)
            if i:
                then = row_by_row(coarser(now.grid, 2))
                x, now = embed(x, now, then), then
            else:
                x = embed(x)
            for j, block in enumerate(blocks):
                x, now = run_block(block, self.recompute, x, now)
                if j == 0:
                    x, now = encode(x, now), row_by_row(now.grid)
                kept = [*kept, (x, now)][-keep:]
        return kept

    def no_weight_decay(self) -> frozenset[str]:
        return frozenset(n for n, _ in self.named_parameters() if n.startswith("pos_block."))

    def place_of(self, name: str) -> tuple[int, int] | None:
        if found := re.match(r"blocks\.(\d+)\.(\d+)\.", name):
            return int(found[1]), int(found[2])
        found = re.match(r"(?:patch_embeds\.([1-9])|pos_block\.(\d+))\.", name)
        return found and (int(found[1] or found[2]), 0)


class TwinsSVT(Twins):
    """Twins-SVT: local and global attention in turn.

    Takes images of any size; nothing in it is made for one.

    Args:
        variant: size from `SVT`: mu (toy), S, B or L.
        image_size: side in pixels, or (height, width), that data comes in.
        in_channels: channels of the input images.
        window: tokens along a side of a window of local attention.
        padding: places of a window beyond the map's edge. "masked": no token sees them, which the
            authors call more accurate. "zeros": as in their published networks, they are keys and
            values like others, of a token that is zero after the norm. Where windows divide every
            map, as at 224 pixels, both are alike.
        drop_path: stochastic depth of the last block; it grows linearly from 0 at the first.
        recompute: keep only the input of every block for the backward pass, and compute the block
            again in it (gradient checkpointing).
        depth: blocks of the third stage instead of the variant's.

    Raises:
        ValueError: unknown variant or padding, sizes below 1, a rate outside [0, 1).
    """

    def __init__(
        self,
        variant: str = "S",
        image_size: int | tuple[int, int] = 224,
        in_channels: int = 3,
        window: int = 7,
        padding: Literal["masked", "zeros"] = "masked",
        drop_path: float = 0.0,
        recompute: bool = False,
        depth: int | None = None,
    ) -> None:
        super().__init__()
        choose("TwinsSVT", variant, SVT, drop_path=drop_path)
        check_choice("padding", padding, PADDINGS)
        if window < 1:
            raise ValueError(f"window is {window}; expected at least 1")
        self.window, self.padding = window, padding
        size = SVT[variant]
        size = size._replace(depths=deepened(size.depths, depth))
        hides = padding == "masked"
        self.build(size, image_size, in_channels, window, hides, drop_path, recompute)


class TwinsPCPVT(Twins):
    """Twins-PCPVT: a pyramid of global attention with conditional positions.

    Takes images of any size; nothing in it is made for one.

    Args:
        variant: size from `PCPVT`: mu (toy), S, B or L.
        image_size: side in pixels, or (height, width), that data comes in.
        in_channels: channels of the input images.
        drop_path: stochastic depth of the last block; it grows linearly from 0 at the first.
        recompute: keep only the input of every block for the backward pass, and compute the block
            again in it (gradient checkpointing).
        depth: blocks of the third stage instead of the variant's.

    Raises:
        ValueError: unknown variant, sizes below 1, a rate outside [0, 1).
    """

    def __init__(
        self,
        variant: str = "S",
        image_size: int | tuple[int, int] = 224,
        in_channels: int = 3,
        drop_path: float = 0.0,
        recompute: bool = False,
        depth: int | None = None,
    ) -> None:
        super().__init__()
        choose("TwinsPCPVT", variant, PCPVT, drop_path=drop_path)
        size = PCPVT[variant]
        size = size._replace(depths=deepened(size.depths, depth))
        self.build(size, image_size, in_channels, None, False, drop_path, recompute)


def first_values(network: nn.Module) -> None:
    """Normal weights: of linear layers with std 0.02, of convolutions by their fan-out."""
    for module in network.modules():
        if isinstance(module, nn.Linear):
            nn.init.trunc_normal_(module.weight, std=0.02)
        elif isinstance(module, nn.Conv2d):
            fan_out = module.weight[0, 0].numel() * module.out_channels // module.groups
            nn.init.normal_(module.weight, std=(2 / fan_out) ** 0.5)
        if isinstance(module, nn.Linear | nn.Conv2d) and module.bias is not None:
            nn.init.zeros_(module.bias)
