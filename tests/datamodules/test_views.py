"""Views one by one: their boxes, pixels and colours against torchvision's and Pillow's."""

from collections.abc import Callable

import numpy as np
import pytest
import torch
import torchvision.transforms as T
import torchvision.transforms.v2.functional as TF
from PIL import Image, ImageFilter
from scipy import stats
from sklearn.datasets import load_sample_image
from torch import Tensor

from datamodules.augment import BLUR, FLIP, GRAY, SOLARIZE, uniforms, view_keys
from datamodules.geometry import Box, crop_and_resize, draws, random_resized_crop
from datamodules.photometric import ColorJitter, gaussian_blur
from datamodules.sampling import fold
from datamodules.views import CropGroup, MultiCropGeometry, ViewColors, flip_some
from tests.datamodules.test_augment import keys
from tests.datamodules.test_photometric import pictures

RATIO = (3 / 4, 4 / 3)
PHOTO = np.asarray(Image.fromarray(load_sample_image("china.jpg")).resize((160, 107)))
GROUPS = (CropGroup(2, (32, 40), (0.4, 1.0)), CropGroup(3, (16, 16), (0.05, 0.4)))


@pytest.mark.parametrize("scale", [(0.4, 1.0), (0.05, 0.4)])
def test_boxes_have_torchvisions_distribution(scale: tuple[float, float]) -> None:
    n, height, width = 3000, 375, 500
    torch.manual_seed(0)
    blank = torch.empty(3, height, width, device="meta")
    theirs = np.array(
        [T.RandomResizedCrop.get_params(blank, list(scale), list(RATIO)) for _ in range(n)]
    )
    ours = np.array(
        [random_resized_crop(height, width, scale, RATIO, draws(fold(i, 1))) for i in range(n)]
    )
    for value in (
        lambda box: box[:, 2] * box[:, 3],
        lambda box: box[:, 3] / box[:, 2],
        lambda box: box[:, 0] + box[:, 2] / 2,
        lambda box: box[:, 1] + box[:, 3] / 2,
    ):
        assert stats.ks_2samp(value(ours), value(theirs)).pvalue > 1e-3


@pytest.mark.parametrize("interpolation", ["bicubic", "bilinear"])
def test_views_equal_pillows_crops_to_a_grey_level(interpolation: str) -> None:
    geometry = MultiCropGeometry(GROUPS, RATIO, interpolation)
    crops = geometry(PHOTO, 5)
    assert [tuple(c.shape) for c in crops] == [(2, 3, 32, 40), (3, 3, 16, 16)]
    assert all(c.dtype == torch.uint8 for c in crops)
    view = 0
    for group, views in zip(GROUPS, crops, strict=True):
        for pixels in views:
            rng = draws(fold(5, view))
            box = random_resized_crop(*PHOTO.shape[:2], group.scale, RATIO, rng)
            area = (box.left, box.top, box.left + box.width, box.top + box.height)
            method = getattr(Image.Resampling, interpolation.upper())
            pil = Image.fromarray(PHOTO).crop(area).resize(group.size[::-1], method)
            error = np.asarray(pil).astype(int) - pixels.permute(1, 2, 0).numpy()
            assert np.abs(error).max() <= 1
            view += 1


def test_a_view_does_not_depend_on_those_after_it() -> None:
    many = MultiCropGeometry(GROUPS, RATIO, "bicubic")(PHOTO, 5)
    few = MultiCropGeometry((GROUPS[0], GROUPS[1]._replace(num_views=1)), RATIO, "bicubic")
    assert torch.equal(many[0], few(PHOTO, 5)[0])
    assert torch.equal(many[1][:1], few(PHOTO, 5)[1])
    assert not torch.equal(many[0], few(PHOTO, 6)[0])
    assert not torch.equal(many[0][0], many[0][1])
    k = view_keys(keys(4), 7)
    assert torch.equal(k[:3], view_keys(keys(4), 3))
    assert torch.equal(k[:, 2:], view_keys(keys(4)[2:], 7))


def test_view_keys_are_all_different_and_independent() -> None:
    k = view_keys(keys(2000), 10)
    assert len(k.unique()) == 20_000
    assert (k >= 0).all()
    assert (k >> 62).float().mean().item() == pytest.approx(0.5, abs=0.02)
    u = torch.stack([uniforms(view, FLIP, 1)[:, 0] for view in k]).numpy()
    assert np.abs(np.corrcoef(u) - np.eye(10)).max() < 0.1
    assert stats.kstest(u.flatten(), "uniform").pvalue > 1e-3


def test_flips() -> None:
    images, k = (255 * pictures(2000, 5, 6)).byte(), keys(2000)
    out = flip_some(images, k, 0.3)
    flipped = (out == images.flip(-1)).flatten(1).all(dim=1)
    assert flipped.float().mean().item() == pytest.approx(0.3, abs=0.03)
    assert torch.equal(out[~flipped], images[~flipped])
    assert torch.equal(flip_some(images, k, 0.0), images)
    assert torch.equal(flip_some(images, k, 1.0), images.flip(-1))


def chosen(k: Tensor, stream: int, place: int, share: float) -> list[bool]:
    return (uniforms(k, stream, place + 1)[:, place] < share).tolist()


def test_colors_equal_torchvisions_operations_in_the_published_order() -> None:
    v, b = 4, 12
    views = torch.stack([pictures(b, seed=s) for s in range(v)])
    k = view_keys(keys(b), v)
    colors = ViewColors()
    out = colors(views, k, 0)
    seen = set()
    for view, (blur, inversion) in enumerate([(1.0, 0.0), (0.1, 0.2), (0.5, 0.0), (0.5, 0.0)]):
        jittered = colors.jitter(views[view], k[view])
        gray = chosen(k[view], GRAY, 0, 0.2)
        blurred = chosen(k[view], BLUR, 1, blur)
        inverted = chosen(k[view], SOLARIZE, 0, inversion)
        sigma = (0.1 + 1.9 * uniforms(k[view], BLUR, 1)[:, 0]).tolist()
        for i, image in enumerate(jittered):
            if gray[i]:
                image = TF.rgb_to_grayscale(image, 3)
            if blurred[i]:
                # Beyond the border as Pillow, where torchvision reflects; 24 is out of reach.
                padded = torch.nn.functional.pad(image[None], (24,) * 4, mode="replicate")[0]
                image = TF.gaussian_blur(padded, [13, 13], [sigma[i]] * 2)[:, 24:-24, 24:-24]
            if inverted[i]:
                image = TF.solarize(image, 0.5)
            close = (out[view, i] - image).abs() < 1e-5
            # A value that rounding puts on the other side of the threshold is inverted or not.
            assert (close | (inverted[i] & ((image - 0.5).abs() < 1e-5))).all()
            seen.add((gray[i], blurred[i], inverted[i]))
    assert len(seen) >= 5


def gradient(x: Tensor) -> np.ndarray:
    return (x.diff(dim=-1)[..., :-1, :] ** 2 + x.diff(dim=-2)[..., :, :-1] ** 2).mean((1, 2, 3))


class PILBlur:
    def __call__(self, image: Image.Image) -> Image.Image:
        radius = 0.1 + 1.9 * torch.rand(()).item()
        return image.filter(ImageFilter.GaussianBlur(radius))


def published(kind: int) -> Callable[[Image.Image], Tensor]:
    """DINO's transforms behind the crop, of the views (first, second global, local)."""
    steps = [
        T.RandomApply([T.ColorJitter(0.4, 0.4, 0.2, 0.1)], p=0.8),
        T.RandomGrayscale(0.2),
        T.RandomApply([PILBlur()], p=(1.0, 0.1, 0.5)[kind]),
    ]
    if kind == 1:
        steps.append(T.RandomSolarize(128, p=0.2))
    return T.Compose([*steps, T.PILToTensor()])


@pytest.mark.parametrize("kind", [0, 1, 2])
def test_colors_have_the_published_distribution_on_pillow(kind: int) -> None:
    n = 700
    crop = crop_and_resize(PHOTO, Box(20, 30, 60, 60), (24, 24), "bicubic")
    pil = Image.fromarray(crop.permute(1, 2, 0).numpy())
    torch.manual_seed(kind)
    transform = published(kind)
    theirs = torch.stack([transform(pil) for _ in range(n)]) / 255.0
    views = (crop / 255.0).expand(1, n, -1, -1, -1)
    ours = ViewColors()(views, view_keys(keys(n, seed=3), 1), kind)[0]

    def same(value: Callable[[Tensor], Tensor]) -> None:
        a, b = (np.asarray(value(x)) for x in (ours, theirs))
        # A fifth of the views keeps its colours: rounded or not, they are one atom to KS.
        rng, width = np.random.default_rng(0), 0.03 * np.ptp(b)
        a, b = (x + rng.uniform(-width, width, n) for x in (a, b))
        assert stats.ks_2samp(a, b).pvalue > 1e-3

    same(lambda x: x.mean(dim=(1, 2, 3)))
    same(lambda x: x.std(dim=(1, 2, 3)))
    same(gradient)
    same(lambda x: (x[:, 0] - x[:, 2]).mean(dim=(1, 2)))
    for channel in range(3):
        same(lambda x, c=channel: x[:, c].mean(dim=(1, 2)))  # type: ignore[misc]
    # Unlike KS, these see a share of 20 % to two hundredths.
    is_gray = [(x[:, :1] - x).abs().amax(dim=(1, 2, 3)) < 1e-6 for x in (ours, theirs)]
    shares = [float(g.float().mean()) for g in is_gray]
    assert shares[0] == pytest.approx(shares[1], abs=0.075)
    assert shares[0] == pytest.approx(0.2, abs=0.05)


def inverted_and_blurred(colors: ViewColors, first: int, n: int = 4000) -> tuple[float, float]:
    """Shares of views, from a dark dot beside a light step: only blur moves the dark values."""
    image = torch.full((3, 1, 16), 0.2)
    image[:, :, 8:] = 0.9
    out = colors(image.expand(1, n, -1, -1, -1), view_keys(keys(n), 1), first)[0, :, 0, 0]
    inverted = out[:, 15] < 0.5
    blurred = (out[:, 8] - out[:, 15]).abs() > 1e-4
    return inverted.float().mean().item(), blurred.float().mean().item()


def test_shares_of_blur_and_solarisation_by_view() -> None:
    plain = {"jitter": ColorJitter(), "grayscale": 0.0, "sigma": (0.5, 2.0)}
    assert inverted_and_blurred(ViewColors(**plain), 0) == (0.0, 1.0)
    for first, expected in ((1, (0.2, 0.1)), (2, (0.0, 0.5)), (7, (0.0, 0.5))):
        found = inverted_and_blurred(ViewColors(**plain), first)
        assert found == pytest.approx(expected, abs=0.025)
    swapped = ViewColors(**plain, blur=(0.0, 0.3, 0.0), solarize=(0.7, 0.0, 0.4))
    for first, expected in ((0, (0.7, 0.0)), (1, (0.0, 0.3)), (5, (0.4, 0.0))):
        assert inverted_and_blurred(swapped, first) == pytest.approx(expected, abs=0.025)


def test_the_kernel_reaches_three_times_the_largest_sigma() -> None:
    only = {"jitter": ColorJitter(), "grayscale": 0.0, "blur": (1.0, 1.0, 1.0)}
    views = pictures(3, 30, 30)[None]
    out = ViewColors(**only, sigma=(4.0, 4.0), solarize=(0.0,) * 3)(views, keys(3)[None], 0)
    expected = gaussian_blur(views[0], torch.full((3,), 4.0), kernel_size=25)
    torch.testing.assert_close(out[0], expected)


def test_one_channel_keeps_brightness_contrast_blur_and_solarisation() -> None:
    views = pictures(40)[None, :, :1]
    k = keys(40)[None]
    out = ViewColors(solarize=(0.5,) * 3)(views, k, 0)
    assert out.shape == views.shape
    assert not torch.equal(out, views)
    no_colors = ColorJitter(0.4, 0.4, 0.0, 0.0, probability=0.8)
    drawn = ViewColors().jitter.draw(k[0])
    changed = ViewColors().jitter(views[0], k[0])
    for i, image in enumerate(views[0]):
        for operation in drawn.order[i].tolist():
            factor = drawn.factors[i, operation].item()
            if operation == 0:
                image = TF.adjust_brightness(image, factor)
            elif operation == 1:  # torchvision's on one channel blends with its mean
                image = TF.adjust_contrast(image, factor)
        torch.testing.assert_close(changed[i], image, atol=1e-5, rtol=0.0)
    gray_off = ViewColors(jitter=no_colors, grayscale=1.0, blur=(0.0,) * 3)
    assert torch.equal(gray_off(views, k, 0)[0], no_colors(views[0], k[0]))


def test_a_key_decides_alone_and_no_shape_depends_on_values() -> None:
    views = torch.stack([pictures(6), pictures(6, seed=1)])
    before, k = views.clone(), view_keys(keys(6), 2)
    whole = ViewColors()(views, k, 0)
    assert torch.equal(views, before)
    torch.testing.assert_close(whole[:, 2:4], ViewColors()(views[:, 2:4], k[:, 2:4], 0))
    assert not torch.equal(whole, ViewColors()(views, view_keys(keys(6, seed=1), 2), 0))
    empty = torch.empty(2, 6, 3, 16, 16, device="meta")
    assert ViewColors()(empty, k.to("meta"), 0).shape == empty.shape


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ({"grayscale": 1.2}, r"grayscale is 1.2; expected within \[0, 1\]"),
        ({"blur": (1.0, -0.1, 0.5)}, r"blur is \(1.0, -0.1, 0.5\)"),
        ({"solarize": (0.0, 2.0, 0.0)}, "solarize is"),
        ({"sigma": (2.0, 0.1)}, r"sigma is \(2.0, 0.1\); expected 0 < low <= high"),
    ],
)
def test_wrong_colors_are_refused(arguments: dict, says: str) -> None:
    with pytest.raises(ValueError, match=says):
        ViewColors(**arguments)
