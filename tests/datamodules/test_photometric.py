"""Colour operations: torchvision's values one by one, its distributions, nothing but the key."""

import math
from collections.abc import Callable
from itertools import permutations

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import torchvision.transforms as T
import torchvision.transforms.v2.functional as TF
from PIL import Image, ImageFilter, ImageOps
from scipy import stats
from sklearn.datasets import load_sample_image
from torch import Tensor

from datamodules.augment import BLUR, uniforms
from datamodules.photometric import (
    ColorJitter,
    adjust_brightness,
    adjust_contrast,
    adjust_hue,
    adjust_saturation,
    gaussian_blur,
    grayscale,
    solarize,
    three_augment,
)
from tests.datamodules.test_augment import keys

CLOSE = {"atol": 2e-6, "rtol": 0.0}


def pictures(count: int, height: int = 17, width: int = 22, seed: int = 0) -> Tensor:
    """Noise with black, white, gray and saturated pixels in it."""
    generator = torch.Generator().manual_seed(seed)
    images = torch.rand(count, 3, height, width, generator=generator)
    images[:, :, 0] = 0.0
    images[:, :, 1] = 1.0
    images[:, :, 2] = images[:, :1, 2]
    images[:, :, 3:5] = images[:, :, 3:5].round()
    return images


@pytest.mark.parametrize(
    ("ours", "theirs", "factors"),
    [
        (adjust_brightness, TF.adjust_brightness, (0.0, 0.6, 1.0, 1.4, 3.0)),
        (adjust_contrast, TF.adjust_contrast, (0.0, 0.6, 1.0, 1.4, 3.0)),
        (adjust_saturation, TF.adjust_saturation, (0.0, 0.6, 1.0, 1.4, 3.0)),
        (adjust_hue, TF.adjust_hue, (-0.5, -0.1, 0.0, 1e-3, 0.08, 1 / 3, 0.5)),
        (solarize, TF.solarize, (0.0, 0.3, 0.5, 1.0)),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_equals_torchvision(ours: Callable, theirs: Callable, factors: tuple) -> None:
    images = pictures(len(factors))
    before = images.clone()
    out = ours(images, torch.tensor(factors))
    for image, factor, result in zip(images, factors, out, strict=True):
        torch.testing.assert_close(result, theirs(image, factor), **CLOSE)
    assert torch.equal(images, before)  # nothing is changed in place


def test_grayscale_equals_torchvision_and_no_saturation() -> None:
    images = pictures(4)
    gray = grayscale(images)
    torch.testing.assert_close(gray, TF.rgb_to_grayscale(images, 3), **CLOSE)
    assert torch.equal(gray, adjust_saturation(images, torch.zeros(4)))


@pytest.mark.parametrize("kernel_size", [3, 9, 13])
def test_blur_equals_torchvision_inside_an_edge(kernel_size: int) -> None:
    sigma = torch.tensor([0.1, 0.3, 0.8, 1.5, 2.0])
    images, reach = pictures(5), kernel_size // 2
    out = gaussian_blur(images, sigma, kernel_size)
    padded = F.pad(images, (2 * reach,) * 4, mode="replicate")
    for image, s, result in zip(padded, sigma.tolist(), out, strict=True):
        expected = TF.gaussian_blur(image, [kernel_size] * 2, [s, s])
        cut = 2 * reach
        torch.testing.assert_close(result, expected[:, cut:-cut, cut:-cut], **CLOSE)
    # The image may be smaller than the kernel.
    assert gaussian_blur(images[..., :2, :1], sigma, kernel_size).shape == (5, 3, 2, 1)


@pytest.mark.parametrize("radius", [0.1, 0.5, 1.0, 2.0])
def test_blur_is_close_to_pils(radius: float) -> None:
    photo = Image.fromarray(load_sample_image("china.jpg")).resize((96, 80))
    image = torch.from_numpy(np.array(photo)).permute(2, 0, 1)[None] / 255.0
    blurred = np.asarray(photo.filter(ImageFilter.GaussianBlur(radius)))
    ours = 255.0 * gaussian_blur(image, torch.tensor([radius]))[0].permute(1, 2, 0).numpy()
    error = np.abs(ours - blurred)
    border = np.ones((80, 96), dtype=bool)
    border[2:-2, 2:-2] = False
    assert error.mean() < 0.6  # of 255
    assert error[border].mean() < 1.5


def test_solarize_equals_pils_on_every_value() -> None:
    values = np.arange(256, dtype=np.uint8).reshape(16, 16)
    inverted = np.asarray(ImageOps.solarize(Image.fromarray(values)))
    for scaled in (torch.from_numpy(values) / 255.0, torch.from_numpy(values) * (1 / 255.0)):
        out = solarize(scaled.expand(1, 3, -1, -1), torch.tensor([0.5]))
        assert np.array_equal((255.0 * out[0, 0]).round().numpy(), inverted)


def test_neutral_factors_leave_the_bits_alone() -> None:
    images = pictures(3)
    ones, zeros = torch.ones(3), torch.zeros(3)
    for adjust in (adjust_brightness, adjust_contrast, adjust_saturation):
        assert torch.equal(adjust(images, ones), images)
    assert torch.equal(adjust_hue(images, zeros), images)
    assert torch.equal(gaussian_blur(images, zeros), images)
    assert torch.equal(solarize(images, 2 * ones), images)
    jitter = ColorJitter(0.4, 0.4, 0.2, 0.1, probability=0.0)
    assert torch.equal(jitter(images, keys(3)), images)


OPERATIONS = (TF.adjust_brightness, TF.adjust_contrast, TF.adjust_saturation)


@pytest.mark.parametrize("jitter", [ColorJitter(0.3, 0.3, 0.3), ColorJitter(0.4, 0.4, 0.2, 0.1)])
def test_jitter_equals_torchvision_in_the_order_drawn(jitter: ColorJitter) -> None:
    images = pictures(60)
    drawn = jitter.draw(keys(60))
    out = jitter(images, keys(60))
    for i, image in enumerate(images):
        turns = [(OPERATIONS[k], drawn.factors[i, k].item()) for k in drawn.order[i].tolist()]
        if jitter.hue > 0:
            turns.insert(int(drawn.hue_slot[i]), (TF.adjust_hue, drawn.hue[i].item()))
        for adjust, factor in turns:
            image = adjust(image, factor)
        torch.testing.assert_close(out[i], image, atol=1e-5, rtol=0.0)


def test_jitter_draws() -> None:
    n = 6000
    drawn = ColorJitter(0.3, 0.4, 1.5, 0.1).draw(keys(n))
    for k, (low, high) in enumerate([(0.7, 1.3), (0.6, 1.4), (0.0, 2.5)]):
        uniform = stats.uniform(low, high - low)
        assert stats.kstest(drawn.factors[:, k].numpy(), uniform.cdf).pvalue > 1e-3
    assert stats.kstest(drawn.hue.numpy(), stats.uniform(-0.1, 0.2).cdf).pvalue > 1e-3
    # Each of the 4! orders comes equally often, and says nothing about the factors.
    places = list(permutations(range(3)))
    order = torch.tensor([places.index(tuple(o)) for o in drawn.order.tolist()])
    counts = torch.bincount(order * 4 + drawn.hue_slot, minlength=24)
    assert len(counts) == 24
    assert stats.chisquare(counts.numpy()).pvalue > 1e-3
    columns = torch.column_stack((drawn.factors, drawn.hue, order, drawn.hue_slot)).numpy()
    assert np.abs(np.corrcoef(columns.T) - np.eye(6)).max() < 0.06


def test_jitter_probability_and_absent_operations() -> None:
    drawn = ColorJitter(0.4, 0.4, 0.2, 0.1, probability=0.8).draw(keys(4000))
    on = (drawn.factors != 1.0).any(dim=1)
    assert on.float().mean().item() == pytest.approx(0.8, abs=0.02)
    assert torch.equal(on, drawn.hue != 0.0)
    only = ColorJitter(contrast=0.5).draw(keys(100))
    assert (only.factors[:, [0, 2]] == 1.0).all()
    assert (only.factors[:, 1] != 1.0).all()
    assert (only.hue == 0.0).all()


def test_jitter_has_torchvisions_distribution() -> None:
    n = 2000
    image = torch.tensor([[0.9, 0.2], [0.4, 0.3], [0.1, 0.8]])[:, None]  # two pixels
    torch.manual_seed(0)
    random_jitter = T.RandomApply([T.ColorJitter(0.4, 0.4, 0.2, 0.1)], p=0.8)
    theirs = torch.stack([random_jitter(image) for _ in range(n)])
    ours = ColorJitter(0.4, 0.4, 0.2, 0.1, probability=0.8)(image.expand(n, -1, -1, -1), keys(n))
    for channel in range(3):
        for pixel in range(2):
            a, b = (x[:, channel, 0, pixel].numpy() for x in (ours, theirs))
            assert stats.ks_2samp(a, b).pvalue > 1e-3
    # And jointly: the distances between the channels.
    spread = [np.ptp(x[:, :, 0].numpy(), axis=1).sum(axis=1) for x in (ours, theirs)]
    assert stats.ks_2samp(*spread).pvalue > 1e-3


def test_three_augment_equals_torchvision_one_by_one() -> None:
    n = 90
    images, k = (255.0 * pictures(n)).round(), keys(n)
    images[:, :, 5, :2] = torch.tensor([127.0, 128.0])  # either side of the threshold
    images /= 255.0
    sigma = 0.1 + 1.9 * uniforms(k, BLUR, 1)
    jitter = ColorJitter(0.3, 0.3, 0.3)
    drawn = jitter.draw(k)
    candidates = torch.stack(
        [
            TF.rgb_to_grayscale(images, 3),
            TF.solarize(images, 128 / 255),
            gaussian_blur(images, sigma[:, 0]),
        ]
    )
    out = three_augment(images, k)
    jittered = torch.stack([jitter.apply(candidate, drawn) for candidate in candidates])
    errors = (jittered - out).abs().amax(dim=(2, 3, 4))
    assert (errors.amin(dim=0) < 1e-5).all()
    assert len(errors.argmin(dim=0).unique()) == 3


def test_three_augment_takes_one_of_three() -> None:
    n = 6000
    color = torch.tensor([0.9, 0.4, 0.2])[:, None, None].expand(n, -1, 1, 1)
    red, green, blue = three_augment(color, keys(n))[:, :, 0, 0].unbind(dim=1)
    # Jitter keeps the order of the channels: none when gray, reversed when 0.9 is inverted.
    is_gray, is_inverted = (red == green) & (green == blue), red < green
    is_blurred = red > green
    counts = torch.stack((is_gray, is_inverted, is_blurred)).sum(dim=1)
    assert counts.sum() == n
    assert stats.chisquare(counts.numpy()).pvalue > 1e-3


def test_three_augment_draws_sigma_uniformly() -> None:
    n, size = 3000, 17
    images = torch.full((n, 3, size, size), 0.42)
    images[:, :, size // 2, size // 2] = 0.49  # a dot, too dark to be inverted
    out = three_augment(images, keys(n)).double()[:, 0]
    dot = out - out[:, :1, :1]  # jitter only scales and shifts it
    square = (torch.arange(size).double() - size // 2) ** 2
    variance = (dot.sum(dim=2) @ square / dot.sum(dim=(1, 2))).numpy()

    def variance_of(sigma: float) -> float:
        taps = np.array([math.exp(-0.5 * (x / sigma) ** 2) for x in range(-6, 7)])
        return float(taps @ np.arange(-6, 7) ** 2 / taps.sum())

    grid = np.linspace(0.3, 2.0, 200)
    sigma = np.interp(variance, [variance_of(s) for s in grid], grid, left=0.0)
    drawn = sigma[sigma > 0.31]  # below the dot hardly spreads
    assert stats.kstest(drawn, stats.uniform(0.31, 2.0 - 0.31).cdf).pvalue > 1e-3
    assert len(drawn) / n == pytest.approx(1.69 / 1.9 / 3, abs=0.03)


def test_three_augment_has_the_published_distribution() -> None:
    n = 1500
    image = pictures(1, 5, 7, seed=3)[0, :, 3:]  # saturated, then random pixels
    torch.manual_seed(0)
    published = T.Compose(
        [
            T.RandomChoice(
                [
                    T.Grayscale(3),
                    T.RandomSolarize(0.5, p=1.0),
                    lambda x: gaussian_blur(x[None], torch.empty(1).uniform_(0.1, 2.0))[0],
                ]
            ),
            T.ColorJitter(0.3, 0.3, 0.3),
        ]
    )
    theirs = torch.stack([published(image) for _ in range(n)])
    ours = three_augment(image.expand(n, -1, -1, -1), keys(n))
    for a, b in zip(ours.flatten(1).T[::3], theirs.flatten(1).T[::3], strict=True):
        assert stats.ks_2samp(a.numpy(), b.numpy()).pvalue > 1e-4
    for statistic in (Tensor.mean, Tensor.std):
        a, b = (statistic(x, dim=(1, 2, 3)).numpy() for x in (ours, theirs))
        assert stats.ks_2samp(a, b).pvalue > 1e-3


AUGMENTATIONS = [three_augment, ColorJitter(0.4, 0.4, 0.2, 0.1, probability=0.8)]


@pytest.mark.parametrize("augment", AUGMENTATIONS)
def test_a_key_decides_alone(augment: Callable[[Tensor, Tensor], Tensor]) -> None:
    images, k = pictures(12), keys(12)
    before = images.clone()
    whole = augment(images, k)
    assert torch.equal(images, before)
    assert torch.equal(whole[5:8], augment(images[5:8], k[5:8]))
    torch.manual_seed(1)
    assert torch.equal(whole, augment(images, k))
    assert not torch.equal(whole, augment(images, keys(12, seed=1)))
    assert 0.0 <= whole.min() < whole.max() <= 1.0
    assert whole.dtype == torch.float32


@pytest.mark.parametrize("augment", AUGMENTATIONS)
def test_no_shape_and_no_branch_depends_on_values(
    augment: Callable[[Tensor, Tensor], Tensor],
) -> None:
    # A meta tensor has no values: whatever asks for one fails.
    out = augment(torch.empty(4, 3, 16, 16, device="meta"), keys(4).to("meta"))
    assert out.shape == (4, 3, 16, 16)


@pytest.mark.parametrize(
    "images",
    [
        torch.rand(2, 2, 8, 8),
        torch.rand(3, 8, 8),
        torch.zeros(2, 3, 8, 8, dtype=torch.uint8),
    ],
)
def test_other_images_are_refused(images: Tensor) -> None:
    k, ones = keys(2), torch.ones(2)
    for call in (
        lambda: three_augment(images, k),
        lambda: ColorJitter(0.1)(images, k),
        lambda: grayscale(images),
        lambda: solarize(images, ones),
        lambda: gaussian_blur(images, ones),
        lambda: adjust_brightness(images, ones),
        lambda: adjust_contrast(images, ones),
        lambda: adjust_saturation(images, ones),
        lambda: adjust_hue(images, ones),
    ):
        with pytest.raises(ValueError, match=r"need float images .* set channels to 1 or 3"):
            call()


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ({"contrast": -0.1}, "contrast is -0.1; expected at least 0"),
        ({"hue": 0.6}, r"hue is 0.6; expected within \[0, 0.5\]"),
        ({"probability": 1.1}, "probability is 1.1"),
    ],
)
def test_wrong_jitter_is_refused(arguments: dict, says: str) -> None:
    with pytest.raises(ValueError, match=says):
        ColorJitter(**arguments)


def test_an_even_kernel_is_refused() -> None:
    with pytest.raises(ValueError, match="kernel_size is 4; expected an odd number"):
        gaussian_blur(pictures(1), torch.ones(1), 4)
