"""The compact Twins-SVT of vit-pytorch (Phil Wang), which is widely copied and another network.

    pip install vit-pytorch: vit_pytorch.twins_svt.TwinsSVT

Differences from the authors' (`twins.py`): a block is local attention, MLP, global attention, MLP,
the last stage has no local ones; one block, the position encoding, then `depth` more; heads are 8
of 64 at any width; keys of global attention are those of 7 x 7 tokens in every stage, so that in
the last one, at 224 pixels, all tokens attend to a single key; no norm of these, no bias of q, k
and v; patches are normalised before and after their projection; pooled features have no norm.
State-dict keys are not vit-pytorch's: `modules.weights` renames them.
"""

import re
from typing import NamedTuple

import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Float
from torch import Tensor, nn

from modules.backbones.attention import attend
from modules.backbones.layers import MLP, BlockStyle, Features
from modules.backbones.pyramid import Kept, Pyramid, added, choose, deepened, first_grid, run_block
from modules.backbones.twins import PositionEncoding, patches_weight
from modules.backbones.vit import check_rates
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
    depths: tuple[int, ...]  # blocks after the position encoding
    num_heads: int
    head_dim: int


VARIANTS = {
    "mu": Size((8, 16, 16, 32), (1, 1, 2, 1), 2, 8),  # a toy for tests and smoke runs
    "S": Size((64, 128, 256, 512), (1, 1, 5, 4), 8, 64),
}
WINDOW = 7
STYLE = BlockStyle(norm_eps=1e-5)


class CompactAttention(nn.Module):
    """Attention within windows or, with a `stride`, to patches of so many tokens."""

    def __init__(
        self, dim: int, num_heads: int, head_dim: int, stride: int | None, dropout: float
    ) -> None:
        super().__init__()
        inner, self.num_heads, self.stride = num_heads * head_dim, num_heads, stride
        self.norm = nn.LayerNorm(dim)
        self.to_q = nn.Conv2d(dim, inner, 1, bias=False)
        self.to_kv = nn.Conv2d(dim, 2 * inner, stride or 1, stride or 1, bias=False)
        self.proj, self.drop = nn.Linear(inner, dim), nn.Dropout(dropout)

    def forward(self, x: Float[Tensor, "b n d"], now: Order) -> Float[Tensor, "b n d"]:
        x = self.norm(x)
        return self.local(x, now) if self.stride is None else self.to_patches(x, now, self.stride)

    def local(self, x: Float[Tensor, "b n d"], now: Order) -> Float[Tensor, "b n d"]:
        order, batch = Order(now.grid, (WINDOW, WINDOW)), x.shape[0]
        x = reorder(x, now, order)
        mask = window_mask(order, True, x.device)
        windows = x.view(batch * order.num_windows, -1, x.shape[2])
        out = self.attend(windows, windows, None if mask is None else for_all(mask, len(windows)))
        out = reorder(rearrange(out, "(b y) n d -> b (y n) d", b=batch), order, now)
        return self.read(out)

    def to_patches(self, x: Float[Tensor, "b n d"], now: Order, stride: int) -> Tensor:
        then = row_by_row(coarser(now.grid, stride))
        return self.read(self.attend(x, merge(x, now, then, Merging(stride)), None))

    def attend(self, x: Tensor, patches: Tensor, mask: Tensor | None) -> Tensor:
        q = F.linear(x, patches_weight(self.to_q))
        kv = F.linear(patches, patches_weight(self.to_kv))
        q = rearrange(q, "b n (h e) -> b h n e", h=self.num_heads)
        k, v = rearrange(kv, "b n (two h e) -> two b h n e", two=2, h=self.num_heads)
        return rearrange(attend(q, k, v, mask), "b h n e -> b n (h e)")

    def read(self, x: Tensor) -> Tensor:
        out: Tensor = self.drop(self.proj(x))
        return out


class CompactBlock(nn.Module):
    """Local attention and an MLP where `is_local`, then global attention and an MLP."""

    def __init__(self, dim: int, size: Size, is_local: bool, dropout: float) -> None:
        super().__init__()
        heads = (size.num_heads, size.head_dim)
        strides = (None, WINDOW) if is_local else (WINDOW,)
        self.attns = nn.ModuleList(CompactAttention(dim, *heads, s, dropout) for s in strides)
        self.norms = nn.ModuleList(nn.LayerNorm(dim) for _ in strides)
        self.mlps = nn.ModuleList(MLP(dim, 4 * dim, STYLE, dropout) for _ in strides)

    def forward(self, x: Float[Tensor, "b n d"], now: Order) -> tuple[Tensor, Order]:
        for attn, norm, mlp in zip(self.attns, self.norms, self.mlps, strict=True):
            x = added(x, attn(x, now))
            x = added(x, mlp(norm(x)))
        return x, now


class PatchProjection(nn.Module):
    """Norm, projection, norm of squares of pixels or tokens, values by channel, row, column."""

    def __init__(self, in_dim: int, dim: int, side: int) -> None:
        super().__init__()
        self.side = side
        self.norm1, self.norm2 = nn.LayerNorm(in_dim * side**2), nn.LayerNorm(dim)
        self.proj = nn.Linear(in_dim * side**2, dim)

    def forward(self, patches: Float[Tensor, "b n e"]) -> Float[Tensor, "b n d"]:
        out: Tensor = self.norm2(self.proj(self.norm1(patches)))
        return out


class TwinsSVTCompact(Pyramid):
    """vit-pytorch's Twins-SVT.

    Takes images of any size, where vit-pytorch's takes those that windows divide; no token sees
    places beyond a map's edge, and patches of keys go on with zeros there.

    Args:
        variant: size from `VARIANTS`: mu (toy) or S, vit-pytorch's default.
        image_size: side in pixels, or (height, width), that data comes in.
        in_channels: channels of the input images.
        dropout: rate after attention's projection, and within and after the MLP.
        recompute: keep only the input of every block for the backward pass, and compute the block
            again in it (gradient checkpointing).
        depth: blocks of the third stage after its position encoding, instead of the variant's.

    Raises:
        ValueError: unknown variant, sizes below 1, a rate outside [0, 1).
    """

    def __init__(
        self,
        variant: str = "S",
        image_size: int | tuple[int, int] = 224,
        in_channels: int = 3,
        dropout: float = 0.0,
        recompute: bool = False,
        depth: int | None = None,
    ) -> None:
        super().__init__()
        choose("TwinsSVTCompact", variant, VARIANTS)
        check_rates(dropout=dropout)
        size = VARIANTS[variant]
        dims, depths = size.embed_dims, tuple(n + 1 for n in deepened(size.depths, depth))
        self.set_up(dims, depths, image_size)
        self.in_channels, self.recompute = in_channels, recompute
        inputs = (in_channels, *dims[:-1])
        self.patch_embeds = nn.ModuleList(
            PatchProjection(*widths, 2 if i else 4)
            for i, widths in enumerate(zip(inputs, dims, strict=True))
        )
        self.blocks = nn.ModuleList(
            nn.ModuleList(
                CompactBlock(dim, size, i + 1 < len(dims), dropout) for _ in range(depths[i])
            )
            for i, dim in enumerate(dims)
        )
        self.pos_block = nn.ModuleList(map(PositionEncoding, dims))

    def stages(self, images: Float[Tensor, "b c height width"], keep: int) -> Kept:
        height, width = images.shape[2:]
        images = F.pad(images, (0, -width % 4, 0, -height % 4))
        now = row_by_row(first_grid(images))
        x = rearrange(images, "b c (y p) (x q) -> b (y x) (c p q)", p=4, q=4)
        kept: Kept = []
        parts = zip(self.patch_embeds, self.blocks, self.pos_block, strict=True)
        for i, (embed, blocks, encode) in enumerate(parts):
            assert isinstance(blocks, nn.ModuleList)
            if i:
                then = row_by_row(coarser(now.grid, 2))
                dim = x.shape[2]
                x, now = merge(x, now, then, Merging(2)), then
                x = rearrange(x, "b n (p c) -> b n (c p)", c=dim)
            x = embed(x)
            for j, block in enumerate(blocks):
                x, now = run_block(block, self.recompute, x, now)
                if j == 0:
                    x = encode(x, now)
                kept = [*kept, (x, now)][-keep:]
        return kept

    def read_out(self, x: Float[Tensor, "b n d"], now: Order) -> Features:
        return Features(x.mean(dim=1), None, x, now.grid)

    def place_of(self, name: str) -> tuple[int, int] | None:
        if found := re.match(r"blocks\.(\d+)\.(\d+)\.", name):
            return int(found[1]), int(found[2])
        found = re.match(r"(?:patch_embeds\.([1-9])|pos_block\.(\d+))\.", name)
        return found and (int(found[1] or found[2]), 0)

    def no_weight_decay(self) -> frozenset[str]:
        return frozenset(n for n, _ in self.named_parameters() if n.startswith("pos_block."))
