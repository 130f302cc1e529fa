"""Augmentation: distributions, formulas, and that a key alone decides a sample's draws."""

import numpy as np
import pytest
import torch
from scipy import stats
from timm.data.random_erasing import RandomErasing

from datamodules.augment import (
    Mixing,
    erase,
    normalize,
    normals,
    symmetric_beta,
    uniforms,
)
from datamodules.batch import ImageBatch
from datamodules.sampling import fold


def keys(count: int, seed: int = 0) -> torch.Tensor:
    return torch.tensor([fold(seed, i) for i in range(count)])


def batch(images: torch.Tensor, seed: int = 0) -> ImageBatch:
    b = len(images)
    return ImageBatch(
        images,
        torch.arange(b),
        torch.arange(b),
        keys(b, seed),
        torch.ones(b, dtype=torch.bool),
        torch.zeros(b, dtype=torch.bool),
    )


def test_uniforms_look_uniform_and_independent() -> None:
    u = uniforms(keys(4000), 1, 16)
    assert 0 < u.min() < u.max() < 1
    assert stats.kstest(u.flatten().numpy(), "uniform").pvalue > 1e-3
    assert stats.kstest(uniforms(torch.arange(64_000), 1, 1)[:, 0].numpy(), "uniform").pvalue > 1e-3
    correlation = np.corrcoef(torch.cat((u, uniforms(keys(4000), 2, 16)), 1).numpy().T)
    assert np.abs(correlation - np.eye(32)).max() < 0.07
    assert stats.kstest(normals(keys(500), 3, 101).flatten().numpy(), "norm").pvalue > 1e-3


def test_a_key_decides_alone() -> None:
    k = keys(10)
    assert torch.equal(uniforms(k, 1, 8)[3:5], uniforms(k[3:5], 1, 8))
    images = torch.randn(10, 3, 16, 16)
    assert torch.equal(erase(images, k, 1.0)[4:], erase(images[4:], k[4:], 1.0))
    whole = Mixing(0.8, 1.0)(batch(images))
    part = ImageBatch(*(field[4:8] for field in batch(images)[:6]))
    half = Mixing(0.8, 1.0)(part)
    assert torch.equal(whole.images[4:8], half.images)
    assert torch.equal(whole.mixed.share[4:8], half.mixed.share)
    assert len(uniforms(k, 1, 1).unique()) == 10


@pytest.mark.parametrize("alpha", [0.2, 0.3, 0.5, 0.8, 1.0])
def test_beta(alpha: float) -> None:
    drawn = symmetric_beta(uniforms(keys(5000), 7, 48), alpha).numpy()
    assert stats.kstest(drawn, stats.beta(alpha, alpha).cdf).pvalue > 1e-3


def test_beta_accepts_what_logaddexp_does() -> None:
    u = uniforms(keys(5000), 7, 48)
    x, y = (u.log() / 0.8).chunk(2, dim=1)
    accepted = torch.logaddexp(x, y) <= 0.0
    first = accepted.int().argmax(dim=1, keepdim=True)
    expected = torch.sigmoid(x - y).gather(1, first)[:, 0]
    assert accepted.any(dim=1).all()
    assert torch.equal(symmetric_beta(u, 0.8), expected)


def test_normalize() -> None:
    images = torch.randint(0, 256, (2, 3, 4, 4), dtype=torch.uint8)
    mean, std = (0.4, 0.5, 0.6), (0.2, 0.3, 0.4)
    expected = (images / 255 - torch.tensor(mean)[:, None, None]) / torch.tensor(std)[:, None, None]
    for scaled in (images, images / 255):
        torch.testing.assert_close(normalize(scaled, mean, std), expected, atol=1e-5, rtol=1e-5)


def test_erasing_has_timms_statistics() -> None:
    torch.manual_seed(0)
    n, marker = 3000, 9.0
    images = torch.full((n, 1, 24, 32), marker)
    ours = erase(images, keys(n), 0.25)
    theirs = RandomErasing(0.25, mode="pixel", device="cpu")(images.clone())
    hole, reference = ours != marker, theirs != marker
    share = hole.flatten(1).any(1).float().mean()
    assert share.item() == pytest.approx(0.25, abs=0.03)
    areas = [h.flatten(1).float().mean(1) for h in (hole, reference)]
    areas = [a[a > 0].numpy() for a in areas]
    assert stats.ks_2samp(*areas).pvalue > 1e-3
    assert stats.kstest(ours[hole].numpy(), "norm").pvalue > 1e-3
    # A hole is one rectangle: as many pixels as its bounding box.
    for h in hole[hole.flatten(1).any(1)][:50, 0]:
        rows, columns = h.any(1).sum(), h.any(0).sum()
        assert h.sum() == rows * columns
    assert torch.equal(erase(images, keys(n), 0.0), images)


def test_mixup_is_a_convex_combination_of_neighbours() -> None:
    images = torch.randn(64, 3, 8, 8)
    out = Mixing(mixup=0.8)(batch(images))
    partner = torch.arange(64) ^ 1
    assert torch.equal(out.mixed.labels, partner)
    share = out.mixed.share[:, None, None, None]
    torch.testing.assert_close(out.images, share * images + (1 - share) * images[partner])
    assert torch.equal(out.mixed.share[0::2], out.mixed.share[1::2])
    assert len(out.mixed.share.unique()) > 25  # another draw for every pair


def test_cutmix_share_is_the_area_kept() -> None:
    images = torch.arange(40.0)[:, None, None, None].expand(40, 3, 16, 24)
    out = Mixing(cutmix=1.0)(batch(images.clone()))
    own = (out.images == images).float().mean(dim=(1, 2, 3))
    torch.testing.assert_close(out.mixed.share, own)
    foreign = out.images == (torch.arange(40) ^ 1)[:, None, None, None]
    assert ((out.images == images) | foreign).all()
    for mask in foreign[:, 0]:
        assert mask.sum() == mask.any(1).sum() * mask.any(0).sum()
    assert 0.3 < (1 - own).mean() * 2 < 1.3  # boxes of all sizes


def test_probability_and_switch() -> None:
    images = torch.randn(4000, 1, 4, 4)
    out = Mixing(0.8, 1.0, probability=0.3)(batch(images))
    changed = (out.images != images).flatten(1).any(1).float().mean()
    assert changed.item() < 0.33
    untouched = out.mixed.share == 1.0
    assert torch.equal(out.images[untouched], images[untouched])
    both = Mixing(1.0, 1.0)(batch(images))
    is_cut = ((both.images == images) | (both.images == images[torch.arange(4000) ^ 1])).all(
        (1, 2, 3)
    )
    assert is_cut.float().mean().item() == pytest.approx(0.5, abs=0.05)


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ({"mixup": 1.5}, r"mixup is 1.5; expected within \[0, 1\]"),
        ({"probability": -0.1}, "probability is -0.1"),
    ],
)
def test_wrong_mixing_is_refused(arguments: dict, says: str) -> None:
    with pytest.raises(ValueError, match=says):
        Mixing(**arguments)


def test_pairs_need_an_even_batch() -> None:
    with pytest.raises(ValueError, match="batch_size is 3; make it even"):
        Mixing(0.5)(batch(torch.randn(3, 1, 4, 4)))
