"""Masked patches of images: what a backbone sees of them, alone and in groups."""

from typing import Any

import pytest
import torch
from torch import Tensor

from modules.backbones import FactorisedPositions, LVViT, Masked, NaViT, Positions, Swapped, ViT
from tests.modules.backbones.test_groups import drawn, groups

NETWORKS: dict[str, Any] = {
    "ViT": lambda: ViT("mu", 8, 32, num_registers=2),
    "ViT without prefix": lambda: ViT("mu", 8, 32, pooling="avg", class_token=False),
    "relative": lambda: ViT("mu", 8, 32, positions=Positions("relative")),
    "every": lambda: ViT("mu", 8, 32, positions=Positions("learned2d", "every")),
    "NaViT": lambda: NaViT("mu", 8, positions=FactorisedPositions(max_side=8)),
    "LV-ViT": lambda: LVViT("mu", 8, 32),
    "NaViT with norms": lambda: NaViT("mu", 8, patch_norm=True),
}


def made(name: str) -> tuple[Any, Tensor, Tensor, Tensor]:
    torch.manual_seed(0)
    network = drawn(NETWORKS[name]())
    images = groups()[0]
    is_masked = torch.rand(4, 16) < 0.4
    return network, images, is_masked, torch.randn(1, 32, requires_grad=True)


@pytest.mark.parametrize("name", NETWORKS)
def test_nothing_is_seen_of_masked_patches_and_all_of_others(name: str) -> None:
    network, images, is_masked, token = made(name)
    pixels = is_masked.view(4, 1, 4, 4).repeat_interleave(8, 2).repeat_interleave(8, 3)
    expected = network(Masked(images, is_masked, token))
    unseen = network(Masked(torch.where(pixels, 7.0, images), is_masked, token))
    assert torch.equal(unseen.patches, expected.patches)
    assert torch.equal(unseen.pooled, expected.pooled)
    for change in (torch.where(pixels, images, images + 1.0), images.flip(0)):
        assert not torch.equal(network(Masked(change, is_masked, token)).pooled, expected.pooled)
    # The token in two places of one image is not the same token: positions come after it.
    first, second = is_masked[0].nonzero()[:2, 0].tolist()
    assert not torch.allclose(expected.patches[0, first], expected.patches[0, second])


@pytest.mark.parametrize("name", NETWORKS)
def test_with_nothing_masked_it_is_the_plain_network(name: str) -> None:
    network, images, is_masked, token = made(name)
    features = network(Masked(images, torch.zeros_like(is_masked), token))
    assert torch.equal(features.patches, network(images).patches)
    (gradient,) = torch.autograd.grad(features.pooled.sum(), token)
    assert not gradient.any()  # it is there all the same, as DDP asks


@pytest.mark.parametrize("name", NETWORKS)
def test_a_masked_group_among_others_is_what_it_is_alone(name: str) -> None:
    network, images, is_masked, token = made(name)
    others = groups()[1:]
    together = network([Masked(images, is_masked, token), *others])
    alone = [network(Masked(images, is_masked, token)), *(network(other) for other in others)]
    gradients = [
        torch.autograd.grad(sum(f.pooled.sin().sum() for f in each), token)[0]  # type: ignore
        for each in (together, alone)
    ]
    for ours, theirs in zip(together, alone, strict=True):
        torch.testing.assert_close(ours.patches, theirs.patches, atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(*gradients, atol=1e-5, rtol=1e-5)
    assert gradients[0].any()


def test_the_token_is_what_is_projected_of_a_patch() -> None:
    network, images, is_masked, token = made("ViT")
    embedded = network.embed(Masked(images, is_masked, token), (4, 4))
    plain = network.embed(images, (4, 4))
    position = network.positions((4, 4))[:, network.num_prefix_tokens :].expand(4, -1, -1)
    prefix = network.num_prefix_tokens
    torch.testing.assert_close(
        embedded[:, prefix:][is_masked], (token + position)[is_masked], atol=1e-6, rtol=0
    )
    assert torch.equal(embedded[:, prefix:][~is_masked], plain[:, prefix:][~is_masked])


@pytest.mark.parametrize("name", NETWORKS)
def test_swapped_patches_are_those_of_the_partner(name: str) -> None:
    network, images, is_swapped, _ = made(name)
    partner = torch.tensor([3, 2, 1, 0])
    every = network(Swapped(images, torch.ones_like(is_swapped), partner))
    torch.testing.assert_close(every.pooled, network(images[partner]).pooled, atol=1e-5, rtol=1e-5)
    none = network(Swapped(images, torch.zeros_like(is_swapped), partner))
    assert torch.equal(none.patches, network(images).patches)
    if name != "LV-ViT":  # cutting pixels is the same only where patches do not overlap
        pixels = is_swapped.view(4, 1, 4, 4).repeat_interleave(8, 2).repeat_interleave(8, 3)
        cut = network(torch.where(pixels, images[partner], images))
        some = network(Swapped(images, is_swapped, partner))
        torch.testing.assert_close(some.patches, cut.patches, atol=1e-5, rtol=1e-5)
    with pytest.raises(ValueError, match=r"a mask of \(4, 15\) reached images"):
        network(Swapped(images, is_swapped[:, 1:], partner))


def test_a_mask_of_another_grid_is_refused() -> None:
    network, images, is_masked, token = made("ViT")
    with pytest.raises(ValueError, match=r"a mask of \(4, 15\) reached images that are \(4, 16\)"):
        network(Masked(images, is_masked[:, 1:], token))
