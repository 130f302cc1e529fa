"""Attention, for images of one size, groups of them and packs of any sizes: one entry, `attend`.

Packs are those of "Patch n' Pack: NaViT" (Dehghani et al. 2023, https://arxiv.org/abs/2307.06304):
a token attends to the tokens of its own image. Padding is a segment of its own, so that no query
ever sees nothing.
"""

import inspect
from collections.abc import Callable, Sequence
from functools import lru_cache
from itertools import groupby
from typing import Any, Protocol, runtime_checkable

import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, flex_attention

try:  # torch 2.10 and later
    from torch.nn.attention import varlen

    varlen_attn: Callable[..., Any] | None = varlen.varlen_attn
except ImportError:
    varlen_attn = None

# On a CPU, rows up to this long cost less with a mask than in many small calls (measured).
SHORT_ROW = 128
# Queries and keys that FlexAttention masks at once.
BLOCK = 128


@runtime_checkable
class Packed(Protocol):
    """Images of any size laid into rows of tokens: `datamodules.batch.PackedImages` is one.

    patches:    [rows, n, e] the pixels of each patch
    positions:  [rows, n, 2] row and column of a patch; (-1, i) prefix token i, (-1, -1) padding
    segments:   [rows, n] slot of each token within its row, -1 at padding; slots are in order
    grids:      [m, 2] rows and columns of patches of each image, m = rows * slots
    offsets:    [rows * (slots + 1) + 1] int32, where each segment starts and ends, all rows in one
                line: the slots of a row, then its padding
    num_prefix: prefix tokens of every image
    """

    @property
    def patches(self) -> Tensor: ...
    @property
    def positions(self) -> Tensor: ...
    @property
    def segments(self) -> Tensor: ...
    @property
    def grids(self) -> Tensor: ...
    @property
    def offsets(self) -> Tensor: ...
    @property
    def num_prefix(self) -> int: ...


class Segments:
    """Which tokens of a pack belong together, made once for a forward pass.

    ids:        [rows, n] slot of each token within its row, -1 at padding
    positions, grids, offsets: those of the pack
    slots:      images that a row has room for
    num_images: m, images that the pack has room for
    image:      [rows, n] the image of every token, row * slots + slot; that of slot 0 at padding
    is_padding, is_patch: [rows, n]
    is_filled:  [m] False for slots without an image
    runs:       on a CPU that does not compile, [(length, how many in a line)] of the segments;
                None elsewhere, where lengths must not leave the device
    """

    def __init__(self, pack: Packed) -> None:
        rows = pack.segments.shape[0]
        self.ids, self.positions = pack.segments, pack.positions
        self.grids, self.offsets = pack.grids, pack.offsets
        self.slots = (pack.offsets.shape[0] - 1) // rows - 1
        self.num_images = rows * self.slots
        first = torch.arange(rows, device=self.ids.device)[:, None] * self.slots
        self.image: Int[Tensor, "rows n"] = first + self.ids.clamp(min=0)
        self.is_padding: Bool[Tensor, "rows n"] = self.ids < 0
        self.is_patch: Bool[Tensor, "rows n"] = self.positions[..., 0] >= 0
        lengths = self.offsets.diff()
        self.is_filled: Bool[Tensor, " m"] = lengths.view(rows, -1)[:, :-1].reshape(-1) > 0
        self.runs: list[tuple[int, int]] | None = None
        if self.ids.device.type == "cpu" and not torch.compiler.is_compiling():
            found = [length for length in lengths.tolist() if length]
            self.runs = [(length, len(list(same))) for length, same in groupby(found)]
        self._mask: Tensor | None = None
        self._blocks: BlockMask | None = None
        # What position tables make of this pack, for the blocks that come after.
        self.weights: dict[Any, Tensor] = {}

    def starts(self) -> Int[Tensor, " m"]:
        """Where each image begins when all tokens stand in one line; any place for empty slots."""
        rows, n = self.ids.shape
        starts = self.offsets[:-1].view(rows, -1)[:, :-1].reshape(-1)
        return starts.clamp(max=rows * n - 1).long()

    def mask(self) -> Bool[Tensor, "rows 1 n n"]:
        """True where a query sees a key."""
        if self._mask is None:
            self._mask = (self.ids[:, :, None] == self.ids[:, None, :])[:, None]
        return self._mask

    def blocks(self) -> BlockMask | None:
        """FlexAttention's mask; None where rows are no multiple of its blocks."""
        if self._blocks is None and self.ids.shape[1] % BLOCK == 0:
            self._blocks = block_mask(torch.where(self.is_padding, self.slots, self.ids))
        return self._blocks


class Groups:
    """Groups of images of one size each, all tokens in one line: [1, n, d], group after group.

    Linear layers and norms then run once over everything; only attention goes by group, and
    nothing is padded ("DINOv2", Oquab et al. 2023, section 5, there with a mask).

    grids:      rows and columns of patches of each group
    runs:       [(length, count)] tokens of an image and images of each group
    num_images: images of all groups
    """

    def __init__(
        self, tokens: Sequence[Float[Tensor, "_ _ d"]], grids: Sequence[tuple[int, int]]
    ) -> None:
        self.grids = tuple(grids)
        self.runs = [(x.shape[1], x.shape[0]) for x in tokens]
        self.num_images = sum(count for _, count in self.runs)
        self.device = tokens[0].device
        self._image: Tensor | None = None

    def join(self, parts: Sequence[Float[Tensor, "_ _ d"]]) -> Float[Tensor, "1 n d"]:
        """One line of each group's tokens; a part of one row is that of every image."""
        lines = [
            part.expand(count, -1, -1).reshape(1, length * count, -1)
            for (length, count), part in zip(self.runs, parts, strict=True)
        ]
        return torch.cat(lines, dim=1)

    def split(self, x: Float[Tensor, "1 n d"]) -> list[Float[Tensor, "_ _ d"]]:
        """Each group's tokens [images, tokens, d] out of the line."""
        parts = torch.split(x[0], [length * count for length, count in self.runs])
        return [
            part.view(count, length, -1)
            for (length, count), part in zip(self.runs, parts, strict=True)
        ]

    @property
    def image(self) -> Int[Tensor, "1 n"]:
        """The image of every token."""
        if self._image is None:
            first, found = 0, []
            for length, count in self.runs:
                ids = torch.arange(first, first + count, device=self.device)
                found.append(ids.repeat_interleave(length))
                first += count
            self._image = torch.cat(found)[None]
        return self._image


def block_mask(ids: Int[Tensor, "rows n"]) -> BlockMask:
    """Which blocks of queries and keys share a segment; `ids` never fall along a row.

    Made from the first and last id of each block: no [n, n] mask exists at any time.
    """
    first, last = ids[:, ::BLOCK], ids[:, BLOCK - 1 :: BLOCK]
    meets = (first[:, :, None] <= last[:, None, :]) & (first[:, None, :] <= last[:, :, None])
    is_one = first == last
    is_full = meets & is_one[:, :, None] & is_one[:, None, :]

    def listed(chosen: Tensor) -> tuple[Tensor, Tensor]:
        order = chosen.int().argsort(dim=-1, descending=True, stable=True)
        return chosen.sum(-1, dtype=torch.int32)[:, None], order.int()[:, None]

    return BlockMask.from_kv_blocks(
        *listed(meets & ~is_full),
        *listed(is_full),
        BLOCK_SIZE=BLOCK,
        mask_mod=lambda b, h, query, key: ids[b, query] == ids[b, key],
    )


def attend(
    q: Float[Tensor, "b h n e"],
    k: Float[Tensor, "b h m e"],
    v: Float[Tensor, "b h m e"],
    bias: Float[Tensor, "#b #h n m"] | Bool[Tensor, "#b #h n m"] | Sequence[Tensor] | None = None,
    segments: Segments | Groups | None = None,
    scale: float | None = None,
) -> Float[Tensor, "b h n e"]:
    """Softmax attention: the one entry to it for all backbones.

    `bias` is added to the scaled scores, or says with booleans which keys a query sees. With
    `segments` tokens see those of their own segment only; b then counts rows. With groups there
    is a bias for each. `scale` of the scores is e^-0.5 where none is given.
    """
    # Norms of q and k give float32 under autocast.
    q, k = q.to(v.dtype), k.to(v.dtype)
    if isinstance(segments, Groups):
        assert not isinstance(bias, Tensor)
        return attend_in_turn(q, k, v, segments.runs, scale, bias)
    assert bias is None or isinstance(bias, Tensor)
    if bias is not None and bias.dtype != torch.bool:
        bias = bias.to(q.dtype)
    if segments is None:
        return softmax(q, k, v, bias, scale)
    if bias is None and segments.runs is not None and q.shape[2] > SHORT_ROW:
        return attend_in_turn(q, k, v, segments.runs, scale)
    if bias is None and q.is_cuda:
        if suits_varlen(q):
            return attend_varlen(q, k, v, segments.offsets, scale)
        blocks = segments.blocks() if suits_flex(q) else None
        if blocks is not None:
            out: Tensor = compiled_flex()(q, k, v, block_mask=blocks, scale=scale)
            return out
    mask = segments.mask()
    if bias is not None:
        mask = mask & bias if bias.dtype == torch.bool else bias.masked_fill(~mask, -torch.inf)
    return softmax(q, k, v, mask, scale)


def softmax(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float | None) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale)


def in_line(x: Float[Tensor, "rows h n e"]) -> Float[Tensor, "all h e"]:
    return rearrange(x, "rows h n e -> (rows n) h e")


def attend_in_turn(
    q: Float[Tensor, "rows h n e"],
    k: Float[Tensor, "rows h n e"],
    v: Float[Tensor, "rows h n e"],
    runs: Sequence[tuple[int, int]],
    scale: float | None,
    biases: Sequence[Tensor] | None = None,
) -> Float[Tensor, "rows h n e"]:
    """One segment after another; neighbours of one length together, with a bias of theirs."""
    # Split, not sliced: the gradient of a slice has the size of the whole.
    sizes = [length * count for length, count in runs]
    lines = (torch.split(in_line(x), sizes) for x in (q, k, v))
    outs = []
    masks = [None] * len(runs) if biases is None else [bias.to(q.dtype) for bias in biases]
    for (_, count), mask, parts in zip(runs, masks, zip(*lines, strict=True), strict=True):
        each = [rearrange(x, "(s l) h e -> s h l e", s=count) for x in parts]
        out = softmax(each[0], each[1], each[2], mask, scale)
        outs.append(rearrange(out, "s h l e -> (s l) h e"))
    return rearrange(torch.cat(outs), "(rows n) h e -> rows h n e", n=q.shape[2])


def suits_varlen(q: Tensor) -> bool:
    """The kernel for segments of any length takes such queries."""
    is_half = q.dtype in (torch.float16, torch.bfloat16)
    return varlen_attn is not None and is_half and q.shape[-1] % 8 == 0 and q.shape[-1] <= 256


def attend_varlen(
    q: Float[Tensor, "rows h n e"],
    k: Float[Tensor, "rows h n e"],
    v: Float[Tensor, "rows h n e"],
    offsets: Int[Tensor, " o"],
    scale: float | None,
) -> Float[Tensor, "rows h n e"]:
    """All segments in one kernel; their number and longest length are those of every pack."""
    assert varlen_attn is not None
    n = q.shape[2]
    arguments = {}
    if scale is not None and "scale" in inspect.signature(varlen_attn).parameters:
        arguments["scale"] = scale
    elif scale is not None:  # torch 2.10 always multiplies by e^-0.5
        q = q * (scale * q.shape[-1] ** 0.5)
    out: Tensor = varlen_attn(
        in_line(q), in_line(k), in_line(v), offsets, offsets, n, n, **arguments
    )
    return rearrange(out, "(rows n) h e -> rows h n e", n=n)


def suits_flex(q: Tensor) -> bool:
    """FlexAttention's kernels take such queries."""
    return q.dtype in (torch.float32, torch.float16, torch.bfloat16) and q.shape[-1] >= 16


@lru_cache(maxsize=1)
def compiled_flex() -> Callable[..., Any]:
    return torch.compile(flex_attention, dynamic=False)
