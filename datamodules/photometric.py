"""Colour operations on the device: whole batches, other factors for every sample.

They take float images in [0, 1] with one or three channels, before normalisation, and stay there.
One channel is its own luminance, so that it has no saturation and no hue to change. A factor is a
tensor with one number a sample, and each operation has a factor that leaves an image as it is, to
the bit; so "with probability p" is a choice of factors, and no operation has a data-dependent
shape. Each equals torchvision's function of the same name on float images. The published recipes
work on PIL's 8-bit images and round after every operation; here nothing is rounded.
"""

from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int, Shaped
from torch import Tensor

from datamodules.augment import BLUR, CHOICE, JITTER, uniforms

Images = Float[Tensor, "b c height width"]  # c is 1 or 3


def check_images(images: Tensor) -> None:
    """Raises ValueError for what is not a float batch with one or three channels."""
    if images.ndim != 4 or images.shape[1] not in (1, 3) or not images.is_floating_point():
        raise ValueError(
            f"photometric operations need float images [b, 1 or 3, height, width] in [0, 1], but "
            f"these are {images.dtype} {list(images.shape)}; set channels to 1 or 3, or turn "
            f"them off"
        )


def column(values: Shaped[Tensor, " b"]) -> Shaped[Tensor, "b 1 1 1"]:
    return values[:, None, None, None]


def luminance(images: Tensor) -> Tensor:
    """[b, 1, height, width]: ITU-R 601 luma with torchvision's four digits."""
    check_images(images)
    if images.shape[1] == 1:
        return images
    red, green, blue = images.unbind(dim=1)
    return (0.2989 * red).add_(green, alpha=0.587).add_(blue, alpha=0.114)[:, None]


def blend(images: Tensor, other: Tensor, factor: Float[Tensor, " b"]) -> Tensor:
    """factor * images + (1 - factor) * other, clipped to [0, 1]; the images where factor is 1."""
    return torch.addcmul(column(1.0 - factor) * other, images, column(factor)).clamp_(0.0, 1.0)


def grayscale(images: Tensor) -> Images:
    """The luminance in all channels."""
    return luminance(images).expand_as(images)


def solarize(images: Tensor, threshold: Float[Tensor, " b"]) -> Images:
    """Invert the values from the sample's threshold on; above 1 it leaves an image as it is.

    PIL's threshold of 128 for 8-bit values is 0.5 here: between 127/255 and 128/255.
    """
    check_images(images)
    return torch.where(images >= column(threshold), 1.0 - images, images)


def gaussian_blur(images: Tensor, sigma: Float[Tensor, " b"], kernel_size: int = 13) -> Images:
    """Convolve with a Gaussian of `sigma` pixels; 0 leaves an image as it is.

    Away from the border this is torchvision's blur. Beyond the border the last pixel is repeated
    as in PIL (torchvision reflects), which the published recipes use and which suits images of
    any size. PIL's three box filters give the same to half a grey level of 255 on average.

    Args:
        images: [b, c, height, width].
        sigma: [b], PIL's `radius`.
        kernel_size: taps of the filter, odd; 13 reach 3 sigma for sigma 2, as PIL's do.

    Raises:
        ValueError: not float images of one or three channels, an even kernel size.
    """
    check_images(images)
    if kernel_size % 2 == 0 or kernel_size < 1:
        raise ValueError(f"kernel_size is {kernel_size}; expected an odd number")
    b, c, height, width = images.shape
    reach = kernel_size // 2
    taps = torch.arange(-reach, reach + 1, device=images.device) / sigma.clamp(min=1e-3)[:, None]
    kernel = torch.softmax(-0.5 * taps**2, dim=1).to(images.dtype).repeat_interleave(c, dim=0)
    # Every channel of every sample is a group of its own, with the kernel of its sample.
    x = F.pad(images, (reach,) * 4, mode="replicate")
    x = x.view(1, b * c, height + 2 * reach, width + 2 * reach)
    x = F.conv2d(x, kernel[:, None, :, None], groups=b * c)
    x = F.conv2d(x, kernel[:, None, None, :], groups=b * c)
    # Some devices convolve with fewer bits; what is not blurred keeps all of its own.
    return torch.where(column(sigma) > 0, x.view_as(images), images)


def adjust_brightness(images: Tensor, factor: Float[Tensor, " b"]) -> Images:
    """Blend with black."""
    check_images(images)
    return (images * column(factor)).clamp_(0.0, 1.0)


def adjust_contrast(images: Tensor, factor: Float[Tensor, " b"]) -> Images:
    """Blend with the mean luminance of the image."""
    return blend(images, luminance(images).mean(dim=(1, 2, 3), keepdim=True), factor)


def adjust_saturation(images: Tensor, factor: Float[Tensor, " b"]) -> Images:
    """Blend with the image's luminance; a factor of 0 is `grayscale`."""
    return blend(images, luminance(images), factor)


def adjust_hue(images: Tensor, shift: Float[Tensor, " b"]) -> Images:
    """Turn the hue by `shift` of the circle, in [-0.5, 0.5]; 0 leaves an image as it is.

    There and back through HSV (Smith 1978): with hue h in sixths of the circle, a channel is
    max - (max - min) * clip(2 - |d|, 0, 1), where d is h + (3, 1, -1) for red, green, blue, less
    the next multiple of 6.
    """
    check_images(images)
    if images.shape[1] == 1:
        return images
    red, green, blue = images.unbind(dim=1)
    # Faster on a CPU than aminmax over the channels.
    low = torch.minimum(torch.minimum(red, green), blue)
    high = torch.maximum(torch.maximum(red, green), blue)
    span = high - low
    divisor = torch.where(span > 0, span, 1.0)
    hue = torch.where(
        high == red,
        (green - blue) / divisor,
        torch.where(high == green, 2.0 + (blue - red) / divisor, 4.0 + (red - green) / divisor),
    )
    offsets = torch.tensor([3.0, 1.0, -1.0], dtype=images.dtype, device=images.device)
    d = hue[:, None] + (6.0 * column(shift) + offsets[:, None, None])
    # In place, and no remainder, which is slow: this is the dearest of all operations.
    d.sub_((d / 6.0).round_(), alpha=6.0).abs_().neg_().add_(2.0).clamp_(0.0, 1.0)
    turned = torch.addcmul(high[:, None], span[:, None], d, value=-1.0)
    return torch.where(column(shift) != 0, turned, images)


class Jitter(NamedTuple):
    """What `ColorJitter` drew.

    factors:  [b, 3] of brightness, contrast and saturation; 1 changes nothing
    order:    [b, 3] which of these three comes first, second and third
    hue:      [b] shift of the hue; 0 changes nothing
    hue_slot: [b] how many of the three come before the hue
    """

    factors: Float[Tensor, "b 3"]
    order: Int[Tensor, "b 3"]
    hue: Float[Tensor, " b"]
    hue_slot: Int[Tensor, " b"]


@dataclass(frozen=True)
class ColorJitter:
    """torchvision's ColorJitter, with other factors and another order for every sample.

    Args:
        brightness: the factor is uniform in [max(0, 1 - brightness), 1 + brightness].
        contrast: likewise.
        saturation: likewise.
        hue: the shift is uniform in [-hue, hue], in turns of the colour circle.
        probability: share of samples that are changed at all.

    Raises:
        ValueError: a negative strength, hue above 0.5, a probability outside [0, 1].
    """

    brightness: float = 0.0
    contrast: float = 0.0
    saturation: float = 0.0
    hue: float = 0.0
    probability: float = 1.0

    def __post_init__(self) -> None:
        for name in ("brightness", "contrast", "saturation"):
            if getattr(self, name) < 0.0:
                raise ValueError(f"{name} is {getattr(self, name)}; expected at least 0")
        if not 0.0 <= self.hue <= 0.5:
            raise ValueError(f"hue is {self.hue}; expected within [0, 0.5]")
        if not 0.0 <= self.probability <= 1.0:
            raise ValueError(f"probability is {self.probability}; expected within [0, 1]")

    def draw(self, keys: Int[Tensor, " b"]) -> Jitter:
        """The factors and the order, each order as likely as any other."""
        u = uniforms(keys, JITTER, 9)
        on = u[:, 8:] < self.probability
        strength = torch.tensor([self.brightness, self.contrast, self.saturation]).to(u)
        low = (1.0 - strength).clamp(min=0.0)
        factors = low + (1.0 + strength - low) * u[:, 0:3]
        return Jitter(
            factors=torch.where(on & (strength > 0), factors, 1.0),
            order=u[:, 3:6].argsort(dim=1),
            hue=torch.where(on[:, 0], self.hue * (2.0 * u[:, 6] - 1.0), 0.0),
            hue_slot=(4.0 * u[:, 7]).long().clamp(max=3),
        )

    def __call__(self, images: Tensor, keys: Int[Tensor, " b"]) -> Images:
        return self.apply(images, self.draw(keys))

    def apply(self, images: Tensor, jitter: Jitter) -> Images:
        """Change float images in [0, 1] as drawn.

        Brightness, contrast and saturation are one blend with another target for every sample,
        so that a place in the order costs one blend. The hue, which costs more, is turned once,
        after the places that come before it for some sample and before those that come after it.
        """
        check_images(images)
        everyone = torch.ones_like(jitter.hue_slot, dtype=torch.bool)
        if self.hue == 0.0:
            for place in range(3):
                images = blend_in_turn(images, jitter, place, everyone)
            return images
        for place in range(3):
            images = blend_in_turn(images, jitter, place, jitter.hue_slot > place)
        images = adjust_hue(images, jitter.hue)
        for place in range(3):
            images = blend_in_turn(images, jitter, place, jitter.hue_slot <= place)
        return images


def blend_in_turn(images: Tensor, jitter: Jitter, place: int, now: Bool[Tensor, " b"]) -> Tensor:
    """What is at this place of each sample's order, for the samples whose turn it is now."""
    operation = jitter.order[:, place]
    factor = torch.where(now, jitter.factors.gather(1, operation[:, None])[:, 0], 1.0)
    gray = luminance(images)
    # Saturation blends with the luminance, contrast with its mean, brightness with black.
    mean = gray.mean(dim=(1, 2, 3), keepdim=True)
    flat = torch.where(column(operation) == 1, mean, 0.0)
    target = torch.addcmul(flat, gray, column(operation == 2).to(gray.dtype))
    return blend(images, target, factor)


THREE_AUGMENT_JITTER = ColorJitter(brightness=0.3, contrast=0.3, saturation=0.3)


def three_augment(images: Tensor, keys: Int[Tensor, " b"]) -> Images:
    """3-Augment of DeiT III (Touvron, Cord and Jégou 2022) on float images in [0, 1].

    Each sample becomes gray, or solarised at 128/255, or blurred with sigma uniform in (0.1, 2),
    each a third of the time; then its brightness, contrast and saturation are jittered by up to
    0.3 in random order. Crop and flip come before, normalisation after.

    Raises:
        ValueError: not float images of one or three channels.
    """
    choice = uniforms(keys, CHOICE, 1)[:, 0]
    is_gray, is_blurred = choice < 1 / 3, choice >= 2 / 3
    sigma = 0.1 + 1.9 * uniforms(keys, BLUR, 1)[:, 0]
    images = gaussian_blur(images, torch.where(is_blurred, sigma, 0.0))
    images = solarize(images, torch.where(is_gray | is_blurred, 2.0, 0.5))
    images = adjust_saturation(images, torch.where(is_gray, 0.0, 1.0))
    return THREE_AUGMENT_JITTER(images, keys)
