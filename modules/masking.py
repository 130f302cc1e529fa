"""Which patches of images are removed, of images of one size and of packs alike.

    scores  random  u                                   a uniform number of every patch
            block   u + [patch is in one of some rectangles]
            grid    u + its turn among its 2 x 2        so that three of four go regularly
    the patches of the lowest scores stay, as many of every image as its share says

A uniform number is a function of (key of the image, place in its grid): no other image, device,
micro-batch or pack has a say. "Masked Autoencoders Are Scalable Vision Learners" (He et al. 2021,
section 3 and figure 6); rectangles are those of BEiT (Bao et al. 2021, appendix).
"""

import math
from typing import Literal, NamedTuple

import torch
from jaxtyping import Bool, Float, Int, Shaped
from torch import Tensor

from datamodules.augment import BLOCKS, REMOVE, uniforms, uniforms_at
from datamodules.batch import PackedImages
from modules.backbones.attention import Segments
from modules.backbones.pooling import is_own
from modules.backbones.resampling import Grid

Shape = Literal["random", "block", "grid"]
SHAPES = ("random", "block", "grid")
MIN_BLOCK = 4  # patches that a block has room for at least, as in BEiT
MIN_ASPECT = 0.3
ROUNDS = 20  # attempts at a block for each image
TURNS = ((0, 2), (3, 1))  # in which the patches of a 2 x 2 go: two of them are diagonal


class Tokens(NamedTuple):
    """The tokens of some images: a row an image, or the rows of a pack.

    image:    [rows, n] the image of every token; that of another at padding
    place:    [rows, n, 2] row and column of a patch; negative at prefix tokens and padding
    is_patch: [rows, n]
    grids:    [m, 2] rows and columns of patches of every image
    where:    the grid of images of one size, or the segments of a pack
    """

    image: Int[Tensor, "rows n"]
    place: Int[Tensor, "rows n 2"]
    is_patch: Bool[Tensor, "rows n"]
    grids: Int[Tensor, "m 2"]
    where: Grid | Segments

    @classmethod
    def of_grid(cls, b: int, grid: Grid, num_prefix: int, device: torch.device) -> "Tokens":
        """Those of b images of one size."""
        rows, columns = (torch.arange(side, device=device) for side in grid)
        before = torch.full((num_prefix, 2), -1, device=device)
        place = torch.cat((before, torch.cartesian_prod(rows, columns).view(-1, 2)))
        image = torch.arange(b, device=device)[:, None].expand(-1, len(place))
        grids = torch.tensor(grid, device=device).expand(b, -1)
        is_patch = (place[:, 0] >= 0).expand(b, -1)
        return cls(image, place.expand(b, -1, -1), is_patch, grids, grid)

    @classmethod
    def of_pack(cls, segments: Segments) -> "Tokens":
        patch, grids = segments.is_patch, segments.grids
        return cls(segments.image, segments.positions, patch, grids, segments)

    def each(self, values: Shaped[Tensor, "m *d"]) -> Shaped[Tensor, "rows #n *d"]:
        """What an image has, for all its tokens."""
        return values[self.image] if isinstance(self.where, Segments) else values[:, None]

    def sums(self, x: Float[Tensor, "rows n"]) -> Float[Tensor, " m"]:
        """Of every image the sum over its patches."""
        own = torch.where(self.is_patch, x, 0.0)
        if not isinstance(self.where, Segments):
            return own.sum(dim=1)
        # A product with zeros and ones: the same sum in the same order every time.
        with torch.autocast(x.device.type, enabled=False):
            return (is_own(self.where).float() @ own.float()[..., None]).flatten()

    def counts(self) -> Int[Tensor, " m"]:
        """Patches of every image."""
        return self.sums(torch.ones_like(self.is_patch, dtype=torch.float32)).long()

    def ranks(self, scores: Float[Tensor, "rows n"]) -> Int[Tensor, "rows n"]:
        """How many patches of the same image have a lower score; without meaning elsewhere."""
        first = torch.where(self.is_patch, scores, torch.inf)
        order = first.argsort(dim=1, stable=True)
        if isinstance(self.where, Segments):  # and then by image, padding last
            ids = torch.where(self.is_patch, self.where.ids, self.where.slots)
            order = order.gather(1, ids.gather(1, order).argsort(dim=1, stable=True))
        place = torch.arange(order.shape[1], device=order.device).expand_as(order)
        ranks = torch.empty_like(order).scatter_(1, order, place)
        if isinstance(self.where, Segments):
            rows = self.counts().view(len(ranks), -1)
            ranks = ranks - self.each((rows.cumsum(1) - rows).flatten())
        return ranks


class Mask(NamedTuple):
    """The tokens that an encoder sees, in a shape that does not depend on what was drawn.

    tokens:  all of them
    is_seen: [rows, n] True at prefix tokens and visible patches
    places:  [rows, kept] where these are, in order; in packs others fill up what is left
    """

    tokens: Tokens
    is_seen: Bool[Tensor, "rows n"]
    places: Int[Tensor, "rows kept"]

    @property
    def is_removed(self) -> Bool[Tensor, "rows n"]:
        return self.tokens.is_patch & ~self.is_seen

    def shorter(self, pack: PackedImages) -> PackedImages:
        """The pack that this is a mask of, without what is removed."""
        real = self.is_seen.gather(1, self.places)
        ids = torch.where(real, pack.segments.gather(1, self.places), -1)
        place = pack.positions.take_along_dim(self.places[..., None], 1)
        rows, length = ids.shape
        slots = len(pack.grids) // rows
        slot = torch.arange(slots, device=ids.device)
        lengths = (ids[:, None] == slot[:, None]).sum(-1)
        ends = torch.cat((lengths.cumsum(1), lengths.new_full((rows, 1), length)), dim=1)
        ends = ends + length * torch.arange(rows, device=ids.device)[:, None]
        return PackedImages(
            patches=pack.patches.take_along_dim(self.places[..., None], 1),
            positions=torch.where(real[..., None], place, -1),
            segments=ids,
            grids=pack.grids,
            offsets=torch.cat((ends.new_zeros(1), ends.flatten())).int(),
            num_prefix=pack.num_prefix,
        )

    def whole(
        self, x: Float[Tensor, "rows kept d"], token: Float[Tensor, "1 1 d"]
    ) -> Float[Tensor, "rows n d"]:
        """All tokens: each seen one out of `x` in its place, `token` in the others'."""
        rows, n = self.is_seen.shape
        kept = x.shape[1]
        # What stands for the others is read from here and there: one place for all of them would
        # have to gather all their gradients.
        other = torch.arange(n, device=x.device) % kept
        turn = self.is_seen.cumsum(1, dtype=torch.int64)  # on a TPU that of booleans is boolean
        index = torch.where(self.is_seen, turn - 1, other)
        index = index + kept * torch.arange(rows, device=x.device)[:, None]
        spread = x.flatten(0, 1).index_select(0, index.flatten()).view(rows, n, -1)
        return torch.where(self.is_seen[..., None], spread, token.to(x.dtype))

    def mean(self, losses: Float[Tensor, "rows n"]) -> Float[Tensor, " m"]:
        """Of every image the mean over its removed patches, 0 without any."""
        removed = self.is_removed.float()
        return self.tokens.sums(losses * removed) / self.tokens.sums(removed).clamp(min=1)


def num_visible(count: int, ratio: float) -> int:
    """Patches that stay of so many: the share rounded down, at least one, never all of several."""
    return max(1, min(count - 1, math.floor(count * (1.0 - ratio) + 1e-9)))


def each_visible(counts: Int[Tensor, " m"], ratio: float) -> Int[Tensor, " m"]:
    """`num_visible` of every number."""
    share = (counts.double() * (1.0 - ratio) + 1e-9).floor().long()
    return torch.minimum(share, counts - 1).clamp(min=1)


def row_length(pack: PackedImages, ratio: float) -> int:
    """Tokens that are visible of a row at most, however its images are cut.

    An image of c patches keeps 1 + (1 - ratio) (c - 1) at most, besides its prefix tokens.
    """
    rows, n = pack.segments.shape
    slots = len(pack.grids) // rows
    return min(n, math.floor((1.0 - ratio) * n + ratio * slots * (pack.num_prefix + 1) + 1e-9))


def scores(
    shape: Shape, tokens: Tokens, keys: Int[Tensor, " m"], ratio: float
) -> Float[Tensor, "rows n"]:
    """What patches are removed by, the highest first; without meaning at other tokens."""
    row, column = tokens.place.clamp(min=0).unbind(-1)
    index = row * tokens.each(tokens.grids[:, 1]) + column
    noise = uniforms_at(tokens.each(keys), REMOVE, index)
    if shape == "block":
        counts = tokens.counts()
        return noise + blocks(keys, tokens, counts - each_visible(counts, ratio))
    if shape == "grid":
        shift = tokens.each((uniforms(keys, BLOCKS, 2) * 2).long())
        turns = torch.tensor(TURNS, device=keys.device)
        return noise + turns[(row + shift[..., 0]) % 2, (column + shift[..., 1]) % 2]
    return noise


def mask_by(scores: Float[Tensor, "rows n"], tokens: Tokens, ratio: float, kept: int) -> Mask:
    """Every image without the patches of its highest scores, at most `kept` tokens a row."""
    visible = tokens.each(each_visible(tokens.counts(), ratio))
    is_seen = tokens.is_patch & (tokens.ranks(scores) < visible)
    is_prefix = ~tokens.is_patch
    if isinstance(tokens.where, Segments):
        is_prefix = is_prefix & ~tokens.where.is_padding
    is_seen = is_seen | is_prefix
    places = (~is_seen).to(torch.uint8).argsort(dim=1, stable=True)[:, :kept]
    return Mask(tokens, is_seen, places)


def blocks(
    keys: Int[Tensor, " m"], tokens: Tokens, counts: Int[Tensor, " m"]
) -> Bool[Tensor, "rows n"]:
    """The patches in rectangles that together hold `counts` patches of an image at most.

    Each is of a uniform area up to what is left and of a log-uniform aspect; one that is too large
    for the grid, adds nothing or adds too much is passed over.
    """
    draws = uniforms(keys, BLOCKS, 4 * ROUNDS).view(-1, ROUNDS, 4)
    y, x = tokens.place.unbind(-1)
    rows, columns = tokens.grids.unbind(-1)
    held = torch.zeros_like(tokens.is_patch)
    left = counts
    for area, aspect, top, start in (each.unbind(1) for each in draws.unbind(1)):
        area = MIN_BLOCK + area * (left - MIN_BLOCK)
        aspect = torch.exp((2.0 * aspect - 1.0) * -math.log(MIN_ASPECT))
        height, width = (area * aspect).sqrt().round(), (area / aspect).sqrt().round()
        top, start = (top * (rows - height + 1)).floor(), (start * (columns - width + 1)).floor()
        sides = torch.stack((top, start, top + height, start + width), dim=-1)
        above, before, below, after = tokens.each(sides).unbind(-1)
        block = tokens.is_patch & (y >= above) & (y < below) & (x >= before) & (x < after)
        new = block & ~held
        added = tokens.sums(new.float()).long()
        fits = (height < rows) & (width < columns) & (added <= left)
        held = held | (new & tokens.each(fits))
        left = left - torch.where(fits, added, 0)
    return held
