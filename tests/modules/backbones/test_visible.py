"""Images of which only some patches are there: what a backbone makes of them."""

from typing import Any

import pytest
import torch
from torch import Tensor

from modules.backbones import FactorisedPositions, NaViT, Positions, Visible, ViT
from tests.modules.backbones.test_groups import drawn
from tests.packs import images as random_images
from tests.packs import pack

NETWORKS: dict[str, Any] = {
    "class token": lambda: ViT("mu", 8, (32, 24)),
    "registers": lambda: ViT("mu", 8, (32, 24), num_registers=2, distillation_token=True),
    "no prefix": lambda: ViT("mu", 8, (32, 24), pooling="norm_avg", class_token=False),
    "no prefix rows": lambda: ViT("mu", 8, (32, 24), positions=Positions(prefix_rows=False)),
    "map": lambda: ViT("mu", 8, (32, 24), pooling="map"),
    "sincos": lambda: ViT("mu", 8, (32, 24), positions=Positions("sincos2d")),
    "no positions": lambda: ViT("mu", 8, (32, 24), positions=Positions("none")),
    "every": lambda: ViT("mu", 8, (32, 24), positions=Positions("learned2d", "every")),
    "every shared": lambda: ViT("mu", 8, (32, 24), positions=Positions("sincos2d", "every_shared")),
    "NaViT": lambda: NaViT("mu", 8, positions=FactorisedPositions(max_side=8)),
    "NaViT with norms": lambda: NaViT(
        "mu", 8, positions=FactorisedPositions("fourier", "fractional"), patch_norm=True
    ),
}


def made(name: str, size: tuple[int, int] = (32, 24)) -> tuple[Any, list[Tensor], Tensor]:
    torch.manual_seed(0)
    network = drawn(NETWORKS[name]()).eval()
    patches = size[0] * size[1] // 64
    places = torch.rand(3, patches).argsort(dim=1)[:, :5].sort(dim=1).values
    return network, random_images([size] * 3), places


@pytest.mark.parametrize("size", [(32, 24), (16, 40)])
@pytest.mark.parametrize("name", NETWORKS)
def test_they_are_what_a_pack_without_the_others_gives(name: str, size: tuple[int, int]) -> None:
    """Packs that lack patches are tested against plain images by themselves."""
    network, images, places = made(name, size)
    prefix = network.num_prefix_tokens
    kept = [[own] for own in places.tolist()]
    packed = network(pack([[image] for image in images], 8, prefix + 5, 1, prefix, kept))
    ours = network(Visible(torch.stack(images), places))
    assert ours.grid is None
    torch.testing.assert_close(ours.patches, packed.patches, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(ours.pooled, packed.pooled, atol=1e-5, rtol=1e-5)
    if ours.cls is not None:
        torch.testing.assert_close(ours.cls, packed.cls, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", NETWORKS)
def test_with_all_of_them_it_is_the_plain_network(name: str) -> None:
    network, images, _ = made(name)
    whole = torch.stack(images)
    ours, plain = network(Visible(whole, torch.arange(12).expand(3, -1))), network(whole)
    torch.testing.assert_close(
        ours.patches[:, network.num_prefix_tokens :], plain.patches, atol=1e-5, rtol=1e-5
    )
    torch.testing.assert_close(ours.pooled, plain.pooled, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", ["class token", "NaViT"])
def test_others_have_no_part_in_it_and_cost_nothing(name: str) -> None:
    network, images, places = made(name)
    whole = torch.stack(images)
    seen = torch.zeros(3, 12, dtype=torch.bool).scatter(1, places, True)
    pixels = seen.view(3, 1, 4, 3).repeat_interleave(8, 2).repeat_interleave(8, 3)
    ours = network(Visible(whole, places)).patches
    assert torch.equal(
        network(Visible(torch.where(pixels, whole, torch.nan), places)).patches, ours
    )
    lengths: list[int] = []
    network.blocks[0].register_forward_pre_hook(lambda _, x: lengths.append(x[0].shape[1]))
    network(Visible(whole, places))
    assert lengths == [network.num_prefix_tokens + 5]


def test_relative_positions_say_why_they_cannot() -> None:
    network = ViT("mu", 8, 32, positions=Positions("relative"))
    assert not network.takes_visible
    visible = Visible(torch.zeros(1, 3, 32, 32), torch.tensor([[0, 3]]))
    with pytest.raises(ValueError, match="relative positions need all patches of an image"):
        network(visible)
