"""Views of an image for methods that compare them: crops in the worker, colours on the device.

SwAV's multi-crop (Caron et al. 2020) with BYOL's asymmetric colours (Grill et al. 2020), as DINO
publishes it (Caron et al. 2021, section 3.2 and `main_dino.py`):

    view           crop                     blur   solarize
    global 1       area share in (.4, 1)     1.0    0
    global 2       area share in (.4, 1)     0.1    0.2
    local          area share in (.05, .4)   0.5    0
    all            flip 0.5; jitter (.4, .4, .2, .1) 0.8; grayscale 0.2; blur; solarize

The image is decoded once. A worker cuts and resizes its views, uint8 in and out, and nothing
else; all that works on pixels happens on the device, for whole batches.
"""

import math
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Int, Shaped, UInt8
from torch import Tensor

from datamodules.augment import BLUR, FLIP, GRAY, SOLARIZE, uniforms
from datamodules.geometry import (
    Array,
    Interpolation,
    crop_and_resize,
    draws,
    random_resized_crop,
)
from datamodules.photometric import ColorJitter, column, gaussian_blur, grayscale, solarize
from datamodules.sampling import fold

NUM_GLOBAL = 2


class CropGroup(NamedTuple):
    """Views of one size: how many, their (height, width), and the area share of their crops."""

    num_views: int
    size: tuple[int, int]
    scale: tuple[float, float]


@dataclass(frozen=True)
class MultiCropGeometry:
    """Random resized crops of one image, group by group; flips come later, on the device.

    View i draws from (key, i): it is the same however many views follow it.
    """

    groups: tuple[CropGroup, ...]
    ratio: tuple[float, float]
    interpolation: Interpolation

    def __call__(self, image: Array, key: int) -> tuple[UInt8[Tensor, "v c height width"], ...]:
        crops, first = [], 0
        for group in self.groups:
            keys = [fold(key, first + i) for i in range(group.num_views)]
            crops.append(torch.stack([self.cut(image, group, draws(k)) for k in keys]))
            first += group.num_views
        return tuple(crops)

    def cut(
        self, image: Array, group: CropGroup, rng: np.random.Generator
    ) -> UInt8[Tensor, "c height width"]:
        box = random_resized_crop(image.shape[0], image.shape[1], group.scale, self.ratio, rng)
        return crop_and_resize(image, box, group.size, self.interpolation)


def flip_some(
    images: Shaped[Tensor, "b c height width"], keys: Int[Tensor, " b"], probability: float
) -> Shaped[Tensor, "b c height width"]:
    """Mirror left and right, each image with `probability`."""
    flips = uniforms(keys, FLIP, 1)[:, 0] < probability
    return torch.where(column(flips), images.flip(-1), images)


DINO_JITTER = ColorJitter(0.4, 0.4, 0.2, 0.1, probability=0.8)


@dataclass(frozen=True)
class ViewColors:
    """The colours of views: jitter, grayscale, blur, solarize, in this order.

    Unlike the published ones, which work on PIL's images, nothing is rounded to 8 bits between
    the operations. Images of one channel have no saturation, hue or colour to lose.

    Args:
        jitter: strengths, and the share of views that are jittered.
        grayscale: share of views that lose their colours.
        blur: share of views that are blurred: of the first global, the second global, the local.
        sigma: range of the blur's standard deviation in pixels (PIL's radius), uniform.
        solarize: share of views whose values from 128/255 on are inverted; as for blur.

    Raises:
        ValueError: a share outside [0, 1], a range that is none.
    """

    jitter: ColorJitter = DINO_JITTER
    grayscale: float = 0.2
    blur: tuple[float, float, float] = (1.0, 0.1, 0.5)
    sigma: tuple[float, float] = (0.1, 2.0)
    solarize: tuple[float, float, float] = (0.0, 0.2, 0.0)

    def __post_init__(self) -> None:
        shares = {"grayscale": (self.grayscale,), "blur": self.blur, "solarize": self.solarize}
        for name, values in shares.items():
            if not all(0.0 <= value <= 1.0 for value in values):
                raise ValueError(f"{name} is {getattr(self, name)}; expected within [0, 1]")
        if not 0.0 < self.sigma[0] <= self.sigma[1]:
            raise ValueError(f"sigma is {self.sigma}; expected 0 < low <= high")

    def __call__(
        self,
        views: Float[Tensor, "v b c height width"],
        keys: Int[Tensor, "v b"],
        first: int,
    ) -> Float[Tensor, "v b c height width"]:
        """Change views in [0, 1], of which the first is number `first` of its image's views."""
        kinds = [min(first + i, NUM_GLOBAL) for i in range(len(views))]
        images, k = views.flatten(0, 1), keys.flatten()
        images = self.jitter(images, k)
        if self.grayscale > 0.0 and images.shape[1] > 1:
            gray = uniforms(k, GRAY, 1)[:, 0] < self.grayscale
            images = torch.where(column(gray), grayscale(images), images)
        blur, inversion = ([share[kind] for kind in kinds] for share in (self.blur, self.solarize))
        if any(blur):
            u = uniforms(k, BLUR, 2)
            low, high = self.sigma
            sigma = torch.where(chosen(u[:, 1], blur), low + (high - low) * u[:, 0], 0.0)
            images = gaussian_blur(images, sigma, 2 * math.ceil(3.0 * high) + 1)
        if any(inversion):
            u = uniforms(k, SOLARIZE, 1)
            images = solarize(images, torch.where(chosen(u[:, 0], inversion), 0.5, 2.0))
        return images.view_as(views)


def chosen(u: Float[Tensor, " n"], shares: list[float]) -> Tensor:
    """[n] boolean: of each view's share of the numbers, those below that view's probability."""
    parts = u.view(len(shares), -1)
    return torch.stack([part < share for part, share in zip(parts, shares, strict=True)]).flatten()
