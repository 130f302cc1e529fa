"""Augmentation on the device: whole batches, another draw for every sample.

All randomness is a hash of (sample key, stream, counter) computed with integer tensor
operations, so it needs no generator state, is the same on every device and does not depend on
which rank or batch a sample is in. No operation has a data-dependent shape.
"""

import math
from dataclasses import dataclass
from functools import lru_cache

import torch
from jaxtyping import Float, Int, UInt8
from torch import Tensor

from datamodules.batch import ImageBatch, Mixed

BITS = 0xFFFFFFFF
PLACES = 1 << 20  # where the noise of an image may begin
# Streams: draws of one kind never meet those of another. Their numbers are part of every result.
ERASE, NOISE, MIX, CHOICE, BLUR, JITTER, VIEW, FLIP, GRAY, SOLARIZE = range(1, 11)
HIDE, BLOCKS, REMOVE, TEACH, TOKENS = 11, 12, 13, 14, 15


def hash32(x: Int[Tensor, "*shape"]) -> Int[Tensor, "*shape"]:
    """A bijection of 32-bit integers whose output bits look independent of its input.

    The finaliser with the lowest measured bias of Wellons, "Prospecting for Hash Functions"
    (2018); 32-bit values live in int64 because torch shifts signed integers arithmetically.
    """
    x = (x ^ (x >> 16)) * 0x7FEB352D & BITS
    x = (x ^ (x >> 15)) * 0x846CA68B & BITS
    return x ^ (x >> 16)


def words(keys: Int[Tensor, " b"], stream: int, count: int) -> Int[Tensor, "b {count}"]:
    """`count` random 32-bit integers for every key; another stream gives others."""
    return words_at(keys[:, None], stream, torch.arange(count, device=keys.device)[None])


def words_at(
    keys: Int[Tensor, "#b #n"], stream: int, counters: Int[Tensor, "#b #n"]
) -> Int[Tensor, "b n"]:
    """Those of `words` that stand at these places in a key's row."""
    low, high = keys & BITS, keys >> 32
    seeds = hash32(hash32(low ^ stream * 0x9E3779B9 & BITS) ^ high & BITS)
    return hash32(hash32(seeds ^ counters * 0x9E3779B9 & BITS) ^ low)


def uniforms(keys: Int[Tensor, " b"], stream: int, count: int) -> Float[Tensor, "b {count}"]:
    """`count` numbers in (0, 1) for every key; another stream gives others."""
    return unit(words(keys, stream, count))


def uniforms_at(
    keys: Int[Tensor, "#b #n"], stream: int, counters: Int[Tensor, "#b #n"]
) -> Float[Tensor, "b n"]:
    """Those of `uniforms` that stand at these places in a key's row."""
    return unit(words_at(keys, stream, counters))


def unit(drawn: Int[Tensor, "*b"]) -> Float[Tensor, "*b"]:
    """32-bit integers as numbers in (0, 1)."""
    return ((drawn >> 9).float() + 0.5) * 2.0**-23


def view_keys(keys: Int[Tensor, " b"], count: int) -> Int[Tensor, "{count} b"]:
    """63-bit keys for `count` views of every image, each as good as a key of its own.

    Those of the first views do not depend on how many there are.
    """
    low, high = words(keys, VIEW, 2 * count).view(-1, count, 2).unbind(dim=2)
    return (low | (high >> 1) << 32).T


def normals(keys: Int[Tensor, " b"], stream: int, count: int) -> Float[Tensor, "b {count}"]:
    """Standard normal numbers, by Box and Muller's transform."""
    half = -(-count // 2)
    radius, angle = uniforms(keys, stream, 2 * half).chunk(2, dim=1)
    radius, angle = torch.sqrt(-2.0 * radius.log()), 2.0 * math.pi * angle
    return torch.cat((radius * angle.cos(), radius * angle.sin()), dim=1)[:, :count]


def symmetric_beta(u: Float[Tensor, "b tries"], alpha: float) -> Float[Tensor, " b"]:
    """Beta(alpha, alpha) for alpha <= 1 from uniforms, by Jöhnk's rejection (1964).

    Each pair of uniforms is accepted with probability at least 1/2, so 24 pairs fail once in
    2^24 draws; then 1/2 is returned. In logarithms, since u^(1/alpha) underflows.
    """
    x, y = (u.log() / alpha).chunk(2, dim=1)
    # logaddexp, which XLA has not: it would go to the CPU and back.
    accepted = torch.maximum(x, y) + (-(x - y).abs()).exp().log1p() <= 0.0
    first = accepted.int().argmax(dim=1, keepdim=True)
    value = torch.sigmoid(x - y).gather(1, first)
    return torch.where(accepted.gather(1, first), value, 0.5)[:, 0]


def normalize(
    images: UInt8[Tensor, "b c height width"] | Float[Tensor, "b c height width"],
    mean: tuple[float, ...],
    std: tuple[float, ...],
) -> Float[Tensor, "b c height width"]:
    """To float32: (x - mean) / std, channel by channel, in one multiply-add.

    x is a float image in [0, 1], or a uint8 image divided by 255.
    """
    white = 1.0 if images.is_floating_point() else 255.0
    scale = torch.tensor([1.0 / (white * s) for s in std], device=images.device)
    shift = torch.tensor([-m / s for m, s in zip(mean, std, strict=True)], device=images.device)
    return torch.addcmul(shift[:, None, None], images.float(), scale[:, None, None])


def inside(
    size: tuple[int, int],
    top: Float[Tensor, " b"],
    left: Float[Tensor, " b"],
    height: Float[Tensor, " b"],
    width: Float[Tensor, " b"],
) -> Tensor:
    """[b, 1, height, width] boolean, True in each sample's rectangle [top, top + height)."""
    rows = torch.arange(size[0], device=top.device)[None, :, None]
    columns = torch.arange(size[1], device=top.device)[None, None, :]
    in_rows = (rows >= top[:, None, None]) & (rows < (top + height)[:, None, None])
    in_columns = (columns >= left[:, None, None]) & (columns < (left + width)[:, None, None])
    return (in_rows & in_columns)[:, None]


def erase(
    images: Float[Tensor, "b c height width"], keys: Int[Tensor, " b"], probability: float
) -> Float[Tensor, "b c height width"]:
    """Random erasing (Zhong et al. 2017), after normalisation, filled with N(0, 1) per pixel.

    The noise of an image is a window, at a place drawn for it, of one long table of noise.
    One rectangle with area share U(0.02, 1/3) and log-uniform aspect in (0.3, 1/0.3); of ten
    draws the first that fits is taken, as in timm.
    """
    b, c, height, width = images.shape
    tries = 10
    u = uniforms(keys, ERASE, 1 + 4 * tries)
    u_area, u_aspect, u_top, u_left = u[:, 1:].view(b, 4, tries).unbind(1)
    area = (0.02 + (1 / 3 - 0.02) * u_area) * (height * width)
    aspect = torch.exp(math.log(0.3) * (1 - 2 * u_aspect))
    h, w = (area * aspect).sqrt().round(), (area / aspect).sqrt().round()
    fits = (h < height) & (w < width)
    first = fits.int().argmax(dim=1, keepdim=True)
    h, w = h.gather(1, first)[:, 0], w.gather(1, first)[:, 0]
    top = (u_top.gather(1, first)[:, 0] * (height - h + 1)).floor()
    left = (u_left.gather(1, first)[:, 0] * (width - w + 1)).floor()
    applied = (u[:, 0] < probability) & fits.any(dim=1)
    hole = inside((height, width), top, left, h, w) & applied[:, None, None, None]
    size = c * height * width
    place = (uniforms(keys, NOISE, 1)[:, 0] * PLACES).long()
    noise = windows(noise_table(size, images.device), place, size).view_as(images)
    return torch.where(hole, noise, images)


def windows(
    table: Float[Tensor, " n"], place: Int[Tensor, " b"], size: int
) -> Float[Tensor, "b size"]:
    """`size` numbers of a table from each place on."""
    if table.device.type == "xla":  # whose views are copies
        return table[place[:, None] + torch.arange(size, device=table.device)]
    return table.unfold(0, size, 1)[place]


@lru_cache(maxsize=8)
def noise_table(size: int, device: torch.device) -> Float[Tensor, " n"]:
    """Normal numbers, of which windows of `size` begin at `PLACES` places.

    Drawing as many anew for every image would cost more than all other augmentation.
    """
    with torch.inference_mode(False):
        return normals(torch.zeros(1, dtype=torch.int64, device=device), NOISE, PLACES + size)[0]


@dataclass(frozen=True)
class Mixing:
    """Mixup (Zhang et al. 2017) and CutMix (Yun et al. 2019), one draw for every pair.

    Neighbours in the batch are mixed with each other, each into the other. The data order is
    random, so this is mixing with a random partner, and it does not depend on how a global
    batch is cut over devices or accumulated.

    Args:
        mixup: alpha of Mixup's Beta(alpha, alpha); 0 turns it off.
        cutmix: alpha of CutMix's; 0 turns it off. With both on each is taken half the time.
        probability: share of pairs that are mixed.

    Raises:
        ValueError: alpha outside [0, 1], a probability outside [0, 1].
    """

    mixup: float = 0.0
    cutmix: float = 0.0
    probability: float = 1.0

    def __post_init__(self) -> None:
        for name in ("mixup", "cutmix", "probability"):
            if not 0.0 <= getattr(self, name) <= 1.0:
                raise ValueError(f"{name} is {getattr(self, name)}; expected within [0, 1]")

    def __bool__(self) -> bool:
        return self.probability > 0 and (self.mixup > 0 or self.cutmix > 0)

    def __call__(self, batch: ImageBatch) -> ImageBatch:
        """Mix the (normalised) images of a batch of even size; fills in `mixed`."""
        images = batch.images
        b, _, height, width = images.shape
        if b % 2:
            raise ValueError(f"mixing works on pairs, but batch_size is {b}; make it even")
        partner = torch.arange(b, device=images.device) ^ 1
        u = uniforms(batch.keys[0::2], MIX, 4 + 48).repeat_interleave(2, dim=0)
        mixes = u[:, 0] < self.probability
        cuts = u[:, 1] < (0.5 if self.mixup > 0 and self.cutmix > 0 else float(self.cutmix > 0))
        share = torch.where(
            cuts,
            symmetric_beta(u[:, 4:], self.cutmix or 1.0),
            symmetric_beta(u[:, 4:], self.mixup or 1.0),
        )
        # CutMix: a box with area share 1 - lambda around a uniform centre, clipped at the edges.
        side = (1.0 - share).sqrt() / 2
        top, bottom = edges(u[:, 2], side, height)
        left, right = edges(u[:, 3], side, width)
        own_area = 1.0 - (bottom - top) * (right - left) / (height * width)
        share = torch.where(cuts, own_area, share)
        share = torch.where(mixes, share, 1.0)

        box = inside((height, width), top, left, bottom - top, right - left)
        weight = torch.where(cuts[:, None, None, None], (~box).float(), share[:, None, None, None])
        weight = torch.where(mixes[:, None, None, None], weight, 1.0)
        mixed = torch.lerp(images[partner], images, weight)
        return batch._replace(images=mixed, mixed=Mixed(batch.labels[partner], share))


def edges(
    u: Float[Tensor, " b"], half_side: Float[Tensor, " b"], size: int
) -> tuple[Float[Tensor, " b"], Float[Tensor, " b"]]:
    """First and last-plus-one pixel of a box with a uniform centre, clipped to the image."""
    center = (u * size).floor()
    half = (half_side * 2 * size).floor() // 2
    return (center - half).clamp(0, size), (center + half).clamp(0, size)
