"""Crops against torchvision and Pillow."""

import random

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms import RandomResizedCrop
from torchvision.transforms.v2 import functional as tv

from datamodules.geometry import (
    Box,
    EvalGeometry,
    TrainGeometry,
    center_crop,
    crop_and_resize,
    draws,
    random_resized_crop,
    timm_rand_augment,
)

RATIO = (3 / 4, 4 / 3)


def picture(height: int, width: int, channels: int = 3) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (height, width, channels), dtype=np.uint8)


def test_boxes_follow_torchvisions_distribution() -> None:
    torch.manual_seed(0)
    blank = torch.empty(3, 120, 200)
    theirs = np.array(
        [RandomResizedCrop.get_params(blank, [0.08, 1.0], list(RATIO)) for _ in range(4000)]
    )
    ours = np.array(
        [random_resized_crop(120, 200, (0.08, 1.0), RATIO, draws(i)) for i in range(4000)]
    )
    for column in range(4):
        a, b = theirs[:, column], ours[:, column]
        assert abs(a.mean() - b.mean()) < 4 * np.hypot(a.std(), b.std()) / 4000**0.5
        assert b.std() == pytest.approx(a.std(), rel=0.06)


@pytest.mark.parametrize(("height", "width"), [(10, 300), (300, 10), (50, 50)])
def test_boxes_lie_inside(height: int, width: int) -> None:
    for key in range(300):
        top, left, h, w = random_resized_crop(height, width, (0.2, 1.0), RATIO, draws(key))
        assert 0 <= top <= top + h <= height
        assert 0 <= left <= left + w <= width
        assert min(h, w) > 0


def test_resize_equals_torchvision_and_pillow() -> None:
    image = picture(60, 90)
    box = Box(5, 11, 40, 60)
    got = crop_and_resize(image, box, (24, 32), "bicubic")
    chw = torch.from_numpy(image).permute(2, 0, 1)
    expected = tv.resized_crop(chw, *box, size=[24, 32], interpolation=tv.InterpolationMode.BICUBIC)
    assert torch.equal(got, expected)
    pillow = Image.fromarray(image).crop((11, 5, 71, 45)).resize((32, 24), Image.Resampling.BICUBIC)
    assert (got.permute(1, 2, 0).int() - torch.from_numpy(np.array(pillow)).int()).abs().max() <= 1


def test_center_crop_is_resize_256_crop_224() -> None:
    assert center_crop(256, 256, (224, 224), 0.875) == Box(16, 16, 224, 224)
    assert center_crop(300, 400, (224, 224), 1.0) == Box(0, 50, 300, 300)
    assert center_crop(100, 100, (16, 32), 1.0) == Box(25, 0, 50, 100)  # the aspect of the target
    assert center_crop(1, 1, (8, 8), 0.5) == Box(0, 0, 1, 1)


def test_the_key_decides_everything() -> None:
    geometry = TrainGeometry((16, 16), (0.3, 1.0), RATIO, 0.5, "bilinear")
    image = picture(40, 50)
    assert torch.equal(geometry(image, 5), geometry(image, 5))
    assert len({geometry(image, key).numpy().tobytes() for key in range(20)}) == 20


def test_flip_is_a_mirror_image_half_of_the_time() -> None:
    image = picture(16, 16)
    fixed = {"size": (16, 16), "scale": (1.0, 1.0), "ratio": (1.0, 1.0), "interpolation": "bicubic"}
    straight = torch.from_numpy(image).permute(2, 0, 1)
    flipped = [TrainGeometry(flip=0.5, **fixed)(image, key) for key in range(400)]
    count = sum(torch.equal(pixels, straight.flip(-1)) for pixels in flipped)
    assert all(torch.equal(p, straight) or torch.equal(p, straight.flip(-1)) for p in flipped)
    assert 160 < count < 240
    assert torch.equal(TrainGeometry(flip=1.0, **fixed)(image, 0), straight.flip(-1))


@pytest.mark.parametrize("channels", [1, 3, 5])
def test_any_number_of_channels(channels: int) -> None:
    pixels = EvalGeometry((8, 12), 0.9, "bilinear")(picture(20, 30, channels), 0)
    assert (pixels.shape, pixels.dtype) == ((channels, 8, 12), torch.uint8)


def test_rand_augment_is_timms_under_the_key_and_leaves_generators_alone() -> None:
    from timm.data.auto_augment import rand_augment_transform

    recipe, image = "rand-m9-mstd0.5-inc1", picture(32, 32)
    apply = timm_rand_augment(recipe, (124, 116, 104))
    random.seed(3), np.random.seed(3)
    before = random.random(), np.random.rand()
    random.seed(3), np.random.seed(3)
    outs = [apply(image, key) for key in range(8)]
    assert (random.random(), np.random.rand()) == before
    theirs = rand_augment_transform(
        recipe, {"img_mean": (124, 116, 104), "interpolation": Image.Resampling.BICUBIC}
    )
    for key, out in enumerate(outs):
        random.seed(key), np.random.seed(key)
        assert np.array_equal(out, np.asarray(theirs(Image.fromarray(image))))
    assert any(not np.array_equal(out, image) for out in outs)
    geometry = TrainGeometry((16, 16), (0.5, 1.0), RATIO, 0.5, "bicubic", apply)
    plain = TrainGeometry((16, 16), (0.5, 1.0), RATIO, 0.5, "bicubic")
    assert any(not torch.equal(geometry(image, k), plain(image, k)) for k in range(8))


def test_unknown_rand_augment_recipe() -> None:
    with pytest.raises(ValueError, match="rand_augment 'augmix-3' is not a recipe"):
        timm_rand_augment("augmix-3", (0, 0, 0))


def test_no_bits_are_left_of_an_image_now_and_then() -> None:
    """At magnitude 10 timm posterizes to 0 bits, which new versions of Pillow refuse."""
    apply = timm_rand_augment("rand-m10-inc1", (0, 0, 0))
    image = np.full((8, 8, 3), 200, np.uint8)
    assert any(not apply(image, key).any() for key in range(200))
