"""Cheap geometry on the CPU: crop, resize, flip. uint8 in, uint8 out.

Everything is decided by the sample's key. Photometric work and mixing happen later, on the
device, for whole batches (`datamodules.photometric`, `datamodules.augment`).
"""

import math
import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import UInt8
from PIL import Image, ImageOps
from torch import Tensor

Interpolation = Literal["bilinear", "bicubic"]
Array = np.ndarray
Augment = Callable[[Array, int], Array]  # a function of an image [h, w, c] and a key


class Box(NamedTuple):
    """A rectangle of an image in pixels."""

    top: int
    left: int
    height: int
    width: int


def draws(key: int) -> np.random.Generator:
    """The random numbers that belong to a sample."""
    return np.random.Generator(np.random.Philox(key=key))


def random_resized_crop(
    height: int,
    width: int,
    scale: tuple[float, float],
    ratio: tuple[float, float],
    rng: np.random.Generator,
) -> Box:
    """The box of an "Inception" crop: area share in `scale`, aspect log-uniform in `ratio`.

    Ten tries, then the largest centred box within `ratio` (Szegedy et al. 2015, with the
    fall-back of torchvision).
    """
    area = height * width
    low, high = math.log(ratio[0]), math.log(ratio[1])
    for _ in range(10):
        target = area * rng.uniform(*scale)
        aspect = math.exp(rng.uniform(low, high))
        w, h = round(math.sqrt(target * aspect)), round(math.sqrt(target / aspect))
        if 0 < w <= width and 0 < h <= height:
            top = int(rng.integers(0, height - h + 1))
            left = int(rng.integers(0, width - w + 1))
            return Box(top, left, h, w)
    w, h = width, height
    if width / height < ratio[0]:
        h = round(width / ratio[0])
    elif width / height > ratio[1]:
        w = round(height * ratio[1])
    return Box((height - h) // 2, (width - w) // 2, h, w)


def center_crop(height: int, width: int, size: tuple[int, int], share: float) -> Box:
    """The centred box that becomes `size`: `share` of the largest box of its aspect."""
    scale = min(height / size[0], width / size[1]) * share
    h = min(height, max(1, round(size[0] * scale)))
    w = min(width, max(1, round(size[1] * scale)))
    return Box((height - h) // 2, (width - w) // 2, h, w)


def crop_and_resize(
    image: Array, box: Box, size: tuple[int, int], interpolation: Interpolation
) -> UInt8[Tensor, "c height width"]:
    """Cut `box` out of a [h, w, c] uint8 image and resize it, antialiased, to `size`."""
    cut = image[box.top : box.top + box.height, box.left : box.left + box.width]
    pixels = torch.from_numpy(np.array(cut)).permute(2, 0, 1)  # a copy: sources are read-only
    if pixels.shape[1:] == size:
        return pixels.contiguous()
    return F.interpolate(
        pixels[None], size=size, mode=interpolation, antialias=True, align_corners=False
    )[0].contiguous()


def posterize(image: Image.Image, bits: int, **_: Any) -> Image.Image:
    """timm's, which asks Pillow now and then for 0 bits: black, and refused by new versions."""
    if bits >= 8:
        return image
    return ImageOps.posterize(image, bits) if bits > 0 else Image.new(image.mode, image.size)


def timm_rand_augment(
    recipe: str,
    fill: tuple[int, ...],
    wrap: Callable[[str, Callable[..., Any]], Callable[..., Any]] = lambda name, operation: (
        operation
    ),
) -> Augment:
    """timm's RandAugment, for instance "rand-m9-mstd0.5-inc1", as a function of (image, key).

    timm draws from Python's and NumPy's global generators; they are seeded with the key and
    put back afterwards. `wrap` gets the name and the function of every operation, and gives what
    is called in its place.

    Raises:
        ValueError: a recipe that timm does not understand.
    """
    from timm.data.auto_augment import rand_augment_transform

    try:
        transform = rand_augment_transform(
            recipe, {"img_mean": fill, "interpolation": Image.Resampling.BICUBIC}
        )
    except (AssertionError, ValueError, KeyError) as error:
        raise ValueError(
            f"rand_augment {recipe!r} is not a recipe timm reads ({error}); "
            f"expected for instance 'rand-m9-mstd0.5-inc1'"
        ) from error
    for operation in transform.ops:
        if operation.name.startswith("Posterize"):
            operation.aug_fn = posterize
        operation.aug_fn = wrap(operation.name, operation.aug_fn)

    def apply(image: Array, key: int) -> Array:
        python_state, numpy_state = random.getstate(), np.random.get_state()
        random.seed(key)
        np.random.seed(key % 2**32)
        try:
            return np.asarray(transform(Image.fromarray(image)))
        finally:
            random.setstate(python_state)
            np.random.set_state(numpy_state)

    return apply


@dataclass(frozen=True)
class TrainGeometry:
    """A random resized crop, a horizontal flip with probability `flip`, then RandAugment."""

    size: tuple[int, int]
    scale: tuple[float, float]
    ratio: tuple[float, float]
    flip: float
    interpolation: Interpolation
    augment: Augment | None = None

    def __call__(self, image: Array, key: int) -> UInt8[Tensor, "c height width"]:
        rng = draws(key)
        box = random_resized_crop(image.shape[0], image.shape[1], self.scale, self.ratio, rng)
        flip = rng.random() < self.flip
        pixels = crop_and_resize(image, box, self.size, self.interpolation)
        if flip:
            pixels = pixels.flip(-1)
        if self.augment is not None:
            array = self.augment(np.ascontiguousarray(pixels.permute(1, 2, 0).numpy()), key)
            pixels = torch.from_numpy(array.copy()).permute(2, 0, 1).contiguous()
        return pixels


@dataclass(frozen=True)
class EvalGeometry:
    """The centred crop: `share` of the largest box with the aspect of `size`."""

    size: tuple[int, int]
    share: float
    interpolation: Interpolation

    def __call__(self, image: Array, key: int) -> UInt8[Tensor, "c height width"]:
        box = center_crop(image.shape[0], image.shape[1], self.size, self.share)
        return crop_and_resize(image, box, self.size, self.interpolation)
