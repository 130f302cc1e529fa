"""Swin Transformer: attention within windows that shift from block to block.

"Swin Transformer: Hierarchical Vision Transformer using Shifted Windows", Liu et al. 2021,
https://arxiv.org/abs/2103.14030, and version 2, "Swin Transformer V2: Scaling Up Capacity and
Resolution", Liu et al. 2021, https://arxiv.org/abs/2111.09883, each as their authors' code has it.

    map = LN(patches(image) W + b)                               one token 4 x 4 pixels
    for every stage:
        map = merge(map) where it is not the first               LN([2 x 2 tokens]) W
        repeat depth times, windows of M x M shifted by M // 2 in every other block:
            map = map + attention(LN(map))                       softmax(q k / sqrt(e) + B) v
            map = map + MLP(LN(map))
    pooled = mean(LN(map))

B is learned for each head and each offset of two tokens. In version 2 norms follow their branch
(and the merging), scores are cosines by a learned temperature, and B is 16 sigmoid(MLP(offset))
with the offset on a logarithmic scale.

Where a map is no larger than a window along an axis, the window is as large as the map there, and
does not shift. Where windows do not divide a map, they go over its edge (`padding`).
"""

import math
import re
from collections.abc import Sequence
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Float
from torch import Tensor, nn

from modules.backbones.attention import attend
from modules.backbones.layers import MLP, BlockStyle, DropPath, check_heads, drop_path_rates
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
from modules.backbones.tables import table
from modules.backbones.vit import check_choice
from modules.backbones.window_attention import attend_windows, for_all
from modules.backbones.windows import (
    Merging,
    Order,
    coarser,
    merge,
    offset_index,
    reorder,
    row_by_row,
    window_mask,
)


class Size(NamedTuple):
    embed_dim: int
    depths: tuple[int, ...]
    num_heads: tuple[int, ...]


VARIANTS = {
    "mu": Size(8, (2, 1, 2, 1), (1, 2, 2, 4)),  # a toy for tests and smoke runs
    "T": Size(96, (2, 2, 6, 2), (3, 6, 12, 24)),
    "S": Size(96, (2, 2, 18, 2), (3, 6, 12, 24)),
    "B": Size(128, (2, 2, 18, 2), (4, 8, 16, 32)),
    "L": Size(192, (2, 2, 18, 2), (6, 12, 24, 48)),
}
PADDINGS = ("masked", "zeros", "timm")
STYLE = BlockStyle(norm_eps=1e-5)
MERGING = Merging(2, columns_first=True)


class WindowAttention(nn.Module):
    """Attention within each window, with a learned bias for each head and offset.

    window: rows and columns of the largest window, which the biases are for
    """

    def __init__(self, dim: int, num_heads: int, window: Grid) -> None:
        super().__init__()
        check_heads(dim, num_heads)
        self.num_heads, self.window = num_heads, window
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)
        offsets = (2 * window[0] - 1) * (2 * window[1] - 1)
        self.relative_position_bias_table = nn.Parameter(torch.zeros(offsets, num_heads))

    def forward(
        self, x: Float[Tensor, "b n d"], order: Order, hides_empty: bool
    ) -> Float[Tensor, "b n d"]:
        """Of tokens that lie window by window."""
        batch, _, dim = x.shape
        windows = x.view(batch * order.num_windows, -1, dim)
        bias = self.bias(order.window)
        mask = window_mask(order, hides_empty, x.device)
        out: Tensor = self.proj(self.attend(windows, bias if mask is None else bias + mask))
        return out.view(batch, -1, dim)

    def attend(
        self, windows: Float[Tensor, "w n d"], bias: Float[Tensor, "groups h n n"]
    ) -> Float[Tensor, "w n d"]:
        return attend_windows(self.qkv(windows), bias)

    def table(self) -> Float[Tensor, "offsets h"]:
        """The bias of each offset of the largest window."""
        return self.relative_position_bias_table

    def bias(self, window: Grid) -> Float[Tensor, "1 h n n"]:
        # An embedding: its gradient is summed row by row, that of an index entry by entry.
        index = offset_index(window, self.window, self.proj.weight.device)
        return rearrange(F.embedding(index, self.table()), "i j h -> 1 h i j")


class CosineAttention(WindowAttention):
    """That of version 2: scores are cosines, and a small MLP says the bias of an offset.

    pretrained: rows and columns of the window that offsets are measured by; those of `window`
        where the MLP is trained for it
    """

    def __init__(self, dim: int, num_heads: int, window: Grid, pretrained: Grid) -> None:
        super().__init__(dim, num_heads, window)
        self.pretrained = pretrained
        self.register_parameter("relative_position_bias_table", None)
        self.qkv = nn.Linear(dim, 3 * dim, bias=False)
        self.q_bias, self.v_bias = (nn.Parameter(torch.zeros(dim)) for _ in range(2))
        self.logit_scale = nn.Parameter(torch.full((num_heads, 1, 1), math.log(10.0)))
        self.cpb_mlp = nn.Sequential(
            nn.Linear(2, 512), nn.ReLU(inplace=True), nn.Linear(512, num_heads, bias=False)
        )

    def attend(
        self, windows: Float[Tensor, "w n d"], bias: Float[Tensor, "groups h n n"]
    ) -> Float[Tensor, "w n d"]:
        # A bias of the keys would add the same to all scores of a query, were they no cosines.
        own_bias = torch.cat((self.q_bias, torch.zeros_like(self.q_bias), self.v_bias))
        joint = F.linear(windows, self.qkv.weight, own_bias)
        q, k, v = rearrange(joint, "w n (three h e) -> three w h n e", three=3, h=self.num_heads)
        q = F.normalize(q, dim=-1) * self.logit_scale.clamp(max=math.log(100.0)).exp()
        bias = for_all(bias, len(windows))
        out = attend(q, F.normalize(k, dim=-1), v, bias, scale=1.0)
        return rearrange(out, "w h n e -> w n (h e)")

    def table(self) -> Float[Tensor, "offsets h"]:
        offsets = log_offsets(self.window, self.pretrained, self.proj.weight.device)
        offsets = offsets.to(self.proj.weight.dtype)
        out: Tensor = 16 * torch.sigmoid(self.cpb_mlp(offsets))
        return out


@table
def log_offsets(window: Grid, pretrained: Grid, device: torch.device) -> Float[Tensor, "n 2"]:
    """Offsets within a window, sign(c) log2(|8 c| + 1) / 3 with c = 1 at the farthest."""
    axes = [
        torch.arange(1 - side, side, dtype=torch.float32) / max(1, farthest - 1)
        for side, farthest in zip(window, pretrained, strict=True)
    ]
    offsets = torch.stack(torch.meshgrid(*axes, indexing="ij"), dim=-1).flatten(0, 1)
    return (offsets.sign() * torch.log2((8 * offsets).abs() + 1) / 3).to(device)


class SwinBlock(nn.Module):
    """Attention in windows, then an MLP, each a branch.

    Norms come before their branch or, in version 2, after it.
    """

    def __init__(
        self, dim: int, attn: WindowAttention, drop_path: float, shifts: bool, hides_empty: bool
    ) -> None:
        super().__init__()
        self.norm1, self.norm2 = (nn.LayerNorm(dim) for _ in range(2))
        self.attn, self.mlp = attn, MLP(dim, 4 * dim, STYLE)
        self.drop_path = DropPath(drop_path)
        self.norm_first = not isinstance(attn, CosineAttention)
        self.shifts, self.hides_empty = shifts, hides_empty

    def order(self, grid: Grid, rolls_map: bool) -> Order:
        """The windows of this block on a map of this size."""
        largest = self.attn.window
        window = (min(largest[0], grid[0]), min(largest[1], grid[1]))
        shift = [
            cut // 2 if self.shifts and side > cut else 0
            for cut, side in zip(largest, grid, strict=True)
        ]
        return Order(grid, window, (shift[0], shift[1]), rolls_map)

    def forward(
        self, x: Float[Tensor, "b n d"], now: Order, order: Order
    ) -> tuple[Float[Tensor, "b n d"], Order]:
        """Tokens that lie as `now` says and, with the windows of `order`, how they lie then."""
        if order.is_full:  # they stay in the order of these windows
            x, now = reorder(x, now, order), order
        branch = self.norm1(x) if self.norm_first else x
        branch = self.attn(reorder(branch, now, order), order, self.hides_empty)
        branch = reorder(branch, order, now)
        branch = branch if self.norm_first else self.norm1(branch)
        x = added(x, self.drop_path(branch))
        branch = self.mlp(self.norm2(x)) if self.norm_first else self.norm2(self.mlp(x))
        return added(x, self.drop_path(branch)), now


class PatchMerging(nn.Module):
    """2 x 2 tokens become one of twice the width; in version 2 the norm comes last."""

    def __init__(self, dim: int, norm_first: bool) -> None:
        super().__init__()
        self.norm_first = norm_first
        self.norm = nn.LayerNorm(4 * dim if norm_first else 2 * dim)
        self.reduction = nn.Linear(4 * dim, 2 * dim, bias=False)

    def forward(
        self, x: Float[Tensor, "b n d"], now: Order, then: Order
    ) -> Float[Tensor, "b m twice"]:
        x = merge(x, now, then, MERGING)
        out: Tensor = (
            self.reduction(self.norm(x)) if self.norm_first else self.norm(self.reduction(x))
        )
        return out


class Stage(nn.Module):
    """Blocks of one width, after the merging of tokens that leads to it."""

    def __init__(self, downsample: PatchMerging | None, blocks: list[SwinBlock]) -> None:
        super().__init__()
        self.downsample = downsample
        self.blocks = nn.ModuleList(blocks)


class Swin(Pyramid):
    """The Swin Transformer.

    Takes images of any size. `image_size` is what the biases are made for: a stage whose map is
    smaller than the window has biases for a window of the map's size.

    Args:
        variant: size from `VARIANTS`: mu (toy), T, S, B or L.
        image_size: side in pixels, or (height, width).
        in_channels: channels of the input images.
        window: tokens along a side of a window.
        version: 1, or 2 for cosines, biases of an MLP and norms after their branch.
        pretrained_window: of version 2, the window that the biases' MLP is trained for, for a
            network that goes on with another one: for all stages or for each, (12, 12, 12, 6) of
            those published for 192 pixels, whose last map is smaller; null for the same.
        padding: places of a window beyond the map's edge. "masked": no token sees them. "zeros":
            as in the authors' code, they are keys and values like others, of a token that is zero
            after the norm. "timm": the same, but the map is shifted before it is padded, so that
            windows hold tokens of opposite edges that see each other. Where windows divide every
            map, as at 224 pixels (384 with windows of 12), all are alike.
        drop_path: stochastic depth of the last block; it grows linearly from 0 at the first.
        recompute: keep only the input of every block for the backward pass, and compute the block
            again in it (gradient checkpointing).
        depth: blocks of the third stage instead of the variant's.

    Raises:
        ValueError: unknown variant, version or padding, sizes below 1, a rate outside [0, 1).
    """

    def __init__(
        self,
        variant: str = "T",
        image_size: int | tuple[int, int] = 224,
        in_channels: int = 3,
        window: int = 7,
        version: Literal[1, 2] = 1,
        pretrained_window: int | tuple[int, int, int, int] | None = None,
        padding: Literal["masked", "zeros", "timm"] = "masked",
        drop_path: float = 0.0,
        recompute: bool = False,
        depth: int | None = None,
    ) -> None:
        super().__init__()
        choose("Swin", variant, VARIANTS, drop_path=drop_path)
        check_choice("padding", padding, PADDINGS)
        given = pretrained_window
        pretrained = (given,) * 4 if isinstance(given, int) else given
        check_version(version, window, pretrained)
        size = VARIANTS[variant]
        depths = deepened(size.depths, depth)
        widths = tuple(size.embed_dim * 2**i for i in range(len(depths)))
        self.set_up(widths, depths, image_size)
        self.in_channels, self.padding, self.recompute = in_channels, padding, recompute
        self.version, self.window, self.pretrained_window = version, window, pretrained
        self.patch_embed = Stem(in_channels, widths[0])
        rates = iter(drop_path_rates(drop_path, self.num_layers))
        grid, stages = coarser(self.image_size, 4), []
        for i, (dim, heads) in enumerate(zip(widths, size.num_heads, strict=True)):
            grid = coarser(grid, 2) if i else grid
            largest = (min(window, grid[0]), min(window, grid[1]))
            known = largest if pretrained is None else (pretrained[i], pretrained[i])
            blocks = [
                SwinBlock(
                    dim,
                    WindowAttention(dim, heads, largest)
                    if version == 1
                    else CosineAttention(dim, heads, largest, known),
                    next(rates),
                    shifts=j % 2 == 1,
                    hides_empty=padding == "masked",
                )
                for j in range(depths[i])
            ]
            stages.append(Stage(PatchMerging(dim // 2, version == 1) if i else None, blocks))
        self.layers = nn.ModuleList(stages)
        self.norm = nn.LayerNorm(widths[-1])
        first_values(self)

    def stages(self, images: Float[Tensor, "b c height width"], keep: int) -> Kept:
        x, now = self.patch_embed(images), row_by_row(first_grid(images))
        kept: Kept = []
        for stage in self.layers:
            assert isinstance(stage, Stage)
            if stage.downsample is not None:
                grid = coarser(now.grid, 2)
                orders = self.orders(stage, grid)
                then = orders[0] if orders[0].is_full else row_by_row(grid)
                x, now = stage.downsample(x, now, then), then
            else:
                orders = self.orders(stage, now.grid)
            for block, order in zip(stage.blocks, orders, strict=True):
                x, now = run_block(block, self.recompute, x, now, order)
                kept = [*kept, (x, now)][-keep:]
        return kept

    def orders(self, stage: Stage, grid: Grid) -> list[Order]:
        """The windows of each block of a stage."""
        blocks = [block for block in stage.blocks if isinstance(block, SwinBlock)]
        return [block.order(grid, self.padding == "timm") for block in blocks]

    def no_weight_decay(self) -> frozenset[str]:
        parts = ("relative_position_bias_table", "cpb_mlp", "logit_scale")
        return frozenset(n for n, _ in self.named_parameters() if any(p in n for p in parts))

    def place_of(self, name: str) -> tuple[int, int] | None:
        found = re.match(r"layers\.(\d+)\.(?:blocks\.(\d+)|downsample)\.", name)
        return found and (int(found[1]), int(found[2] or 0))


def check_version(version: int, window: int, pretrained_window: Sequence[int] | None) -> None:
    if version not in (1, 2):
        raise ValueError(f"version is {version}; expected 1 or 2")
    if min(window, *(pretrained_window or (1,))) < 1:
        raise ValueError(
            f"window is {window} and pretrained_window {pretrained_window}; expected at least 1"
        )
    if version == 1 and pretrained_window is not None:
        raise ValueError(
            f"pretrained_window is {pretrained_window}, which version 1 has no use for: its biases "
            f"are resampled when a file for another window is loaded; remove it"
        )


def first_values(network: nn.Module) -> None:
    """Normal weights and biases of attention with std 0.02; in version 2 branches begin at zero."""
    for module in network.modules():
        if isinstance(module, nn.Linear):
            nn.init.trunc_normal_(module.weight, std=0.02)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
        elif isinstance(module, WindowAttention) and not isinstance(module, CosineAttention):
            nn.init.trunc_normal_(module.relative_position_bias_table, std=0.02)
        elif isinstance(module, SwinBlock) and not module.norm_first:
            nn.init.zeros_(module.norm1.weight)
            nn.init.zeros_(module.norm2.weight)
