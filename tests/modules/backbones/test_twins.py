"""Twins against timm's and vit-pytorch's, any size of image."""

from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from timm.optim import param_groups_layer_decay
from torch import nn
from vit_pytorch.twins_svt import TwinsSVT as TheirCompact

from modules import DINO, MAE, weights
from modules.backbones import Features, TwinsPCPVT, TwinsSVT, TwinsSVTCompact, create
from modules.backbones.twins import PositionEncoding, TwinsBlock
from modules.backbones.windows import row_by_row
from modules.groups import layer_scale
from modules.ibot import MaskedPatches
from modules.supervised import Classifier
from tests.modules.backbones.test_swin import randomised

MU = {"embed_dims": (8, 16, 16, 32), "depths": (2, 1, 2, 1), "num_heads": (1, 2, 2, 4)}
FAMILIES: dict[str, tuple[Any, dict[str, Any]]] = {
    "twins_svt": (TwinsSVT, {"mlp_ratios": (4, 4, 4, 4)}),
    "twins_pcpvt": (TwinsPCPVT, {"mlp_ratios": (8, 8, 4, 4)}),
}


def theirs(family: str, size: tuple[int, int]) -> Any:
    changes = {**MU, **FAMILIES[family][1], "img_size": size, "num_classes": 5}
    return randomised(timm.create_model(f"{family}_small", **changes))


def zeros(family: str) -> dict[str, str]:
    """Twins-SVT as its authors have it."""
    return {"padding": "zeros"} if family == "twins_svt" else {}


@pytest.mark.parametrize(
    ("family", "variant", "expected"),
    [
        ("twins_svt", "S", 24_060_776),
        ("twins_svt", "B", 56_070_952),
        ("twins_svt", "L", 99_271_400),
        ("twins_pcpvt", "S", 24_106_216),
        ("twins_pcpvt", "B", 43_828_456),
        ("twins_pcpvt", "L", 60_989_672),
    ],
)
def test_parameters(family: str, variant: str, expected: int) -> None:
    with torch.device("meta"):
        network = Classifier(create(family, variant=variant), 1000)
        assert sum(parameter.numel() for parameter in network.parameters()) == expected


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("size", [(224, 224), (64, 128)])
def test_logits_and_gradients_are_timms(family: str, size: tuple[int, int], tmp_path: Path) -> None:
    """Where windows divide the maps, and where timm pads them."""
    other = theirs(family, size)
    torch.save(other.state_dict(), tmp_path / "timm.pth")
    options = zeros(family) if size == (64, 128) else {}
    network = Classifier(create(family, variant="mu", image_size=size, **options), 5)
    report = weights.load(network, tmp_path / "timm.pth")
    assert not report.dropped
    images = torch.randn(2, 3, *size)
    logits, expected = network(images), other(images)
    assert expected.std() > 0.05
    torch.testing.assert_close(logits, expected, atol=1e-5, rtol=1e-5)
    (logits.square().sum() + expected.square().sum()).backward()
    grads = {key: parameter.grad for key, parameter in other.named_parameters()}
    for key, parameter in network.named_parameters():
        name = key.removeprefix("backbone.")
        torch.testing.assert_close(parameter.grad, grads[name], atol=5e-4, rtol=1e-4, msg=key)
    again = timm.create_model(
        **weights.timm_arguments(network), mlp_ratios=FAMILIES[family][1]["mlp_ratios"]
    )
    again.load_state_dict(weights.to_timm(network), strict=True)
    torch.testing.assert_close(again.eval()(images), expected, atol=1e-5, rtol=1e-5)


def test_the_compact_one_is_vit_pytorchs(tmp_path: Path) -> None:
    dims = {f"s{i + 1}_emb_dim": dim for i, dim in enumerate((8, 16, 16, 32))}
    other = TheirCompact(num_classes=5, **dims, s3_depth=2, s4_depth=1).eval()
    for key, parameter in other.named_parameters():
        nn.init.normal_(parameter, mean=float(key.endswith(".g")), std=0.1)
    torch.save(other.state_dict(), tmp_path / "theirs.pth")
    network = Classifier(Wide(224), 5).eval()
    report = weights.load(network, tmp_path / "theirs.pth")
    assert len(report.read) == len(other.state_dict())
    images = torch.randn(2, 3, 224, 224)
    expected = other(images)
    assert expected.std() > 0.05
    torch.testing.assert_close(network(images), expected, atol=1e-4, rtol=1e-4)
    with pytest.raises(ValueError, match="timm has no TwinsSVTCompact"):
        weights.to_timm(network)


class Wide(TwinsSVTCompact):
    """The toy with vit-pytorch's heads, which cannot be chosen for all stages there."""

    def __init__(self, image_size: int) -> None:
        from modules.backbones import twins_compact

        toy = twins_compact.VARIANTS["mu"]
        twins_compact.VARIANTS["wide"] = toy._replace(num_heads=8, head_dim=64)
        try:
            super().__init__("wide", image_size)
        finally:
            del twins_compact.VARIANTS["wide"]


@pytest.mark.parametrize("family", ["twins_svt", "twins_pcpvt", "twins_svt_compact"])
def test_any_size(family: str) -> None:
    network = randomised(create(family, variant="mu")).eval()

    @settings(max_examples=8, deadline=None)
    @given(height=st.integers(1, 90), width=st.integers(1, 90))
    def check(height: int, width: int) -> None:
        with torch.no_grad():
            features = network(torch.randn(1, 3, height, width))
        assert isinstance(features, Features)
        assert features.grid == (-(-height // 32), -(-width // 32))
        assert features.patches.shape == (1, features.grid[0] * features.grid[1], 32)
        assert torch.isfinite(features.patches).all()

    check()
    groups = [torch.randn(2, 3, 64, 64), torch.randn(1, 3, 40, 72)]
    for together, images in zip(network(groups), groups, strict=True):
        torch.testing.assert_close(together.pooled, network(images).pooled)


@pytest.mark.parametrize("family", ["twins_svt", "twins_pcpvt", "twins_svt_compact"])
def test_every_parameter_learns(family: str) -> None:
    network = randomised(create(family, variant="mu"))
    network(torch.randn(2, 3, 256, 288)).pooled.square().sum().backward()
    for key, parameter in network.named_parameters():
        assert parameter.grad is not None, key
        assert parameter.grad.abs().sum() > 0, key


def test_places_beyond_the_edge_are_not_seen() -> None:
    """With hidden places a window that holds one token has that token's value."""
    network = randomised(TwinsSVT("mu", window=4))
    block: Any = network.blocks[0][0]
    assert isinstance(block, TwinsBlock)
    x, grid = torch.randn(1, 5 * 4, 8), (5, 4)
    out, now = block.attn(x, row_by_row(grid)), row_by_row(grid)
    value = nn.functional.linear(x, block.attn.qkv.weight[16:], block.attn.qkv.bias[16:])
    block.attn.hides_empty = False
    seen = block.attn(x, now)
    assert not torch.allclose(seen[:, 16:], out[:, 16:])
    row = block.attn(x[:, 16:], row_by_row((1, 4)))
    block.attn.hides_empty = True
    alone = block.attn(x[:, 16:], row_by_row((1, 4)))
    torch.testing.assert_close(out[:, 16:], alone)  # the last row is a window of its own
    assert not torch.allclose(row, alone)
    single = block.attn(x[:, :1], row_by_row((1, 1)))
    torch.testing.assert_close(single, block.attn.proj(value[:, :1]))


def test_position_encoding_is_a_convolution_of_the_map() -> None:
    encode = PositionEncoding(4)
    x = torch.randn(2, 15, 4)
    image = x.transpose(1, 2).reshape(2, 4, 3, 5)
    expected = (image + encode.proj(image)).flatten(2).transpose(1, 2)
    torch.testing.assert_close(encode(x.clone(), row_by_row((3, 5))), expected)


@pytest.mark.parametrize("family", FAMILIES)
def test_layers_and_decay_are_timms(family: str) -> None:
    other = theirs(family, (64, 64))
    network = Classifier(create(family, variant="mu"), 5)
    groups = param_groups_layer_decay(other, 0.05, other.no_weight_decay(), layer_decay=0.7)
    scales = {id(p): (g["lr_scale"], g["weight_decay"]) for g in groups for p in g["params"]}
    named, exempt = dict(other.named_parameters()), network.backbone.no_weight_decay()
    for key, parameter in network.backbone.named_parameters():
        scale, decay = scales[id(named[key])]
        if key.startswith("norm."):  # with the last block in timm, with the head here
            scale = 1.0
        assert layer_scale(network, f"backbone.{key}", 0.7) == pytest.approx(scale), key
        assert (parameter.ndim < 2 or key in exempt) == (decay == 0), key


@pytest.mark.parametrize(
    ("family", "arguments", "says"),
    [
        ("twins_svt", {"variant": "H"}, "unknown TwinsSVT variant 'H'; known: mu, S, B, L"),
        ("twins_svt", {"window": 0}, "window is 0"),
        ("twins_pcpvt", {"variant": "T"}, "unknown TwinsPCPVT variant 'T'"),
        ("twins_pcpvt", {"drop_path": 1.0}, "drop_path is 1"),
        ("twins_svt_compact", {"variant": "B"}, "unknown TwinsSVTCompact variant 'B'"),
        ("twins_svt_compact", {"dropout": 1.0}, "dropout is 1"),
    ],
)
def test_errors_name_the_value(family: str, arguments: dict[str, Any], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        create(family, **{"variant": "mu"} | arguments)


def test_options_have_effects_and_what_makes_no_sense_is_refused() -> None:
    images = torch.randn(2, 3, 64, 64)
    for family, option in (
        ("twins_svt", {"drop_path": 0.9}),
        ("twins_pcpvt", {"drop_path": 0.9}),
        ("twins_svt_compact", {"dropout": 0.5}),
    ):
        lossy = create(family, variant="mu", depth=3, **option)
        assert lossy.num_layers == create(family, variant="mu").num_layers + 1
        assert not torch.equal(lossy(images).pooled, lossy(images).pooled)
        with pytest.raises(ValueError, match="takes no masks"):
            DINO(lossy, masked_patches=MaskedPatches())
        with pytest.raises(ValueError, match="needs the whole grid"):
            MAE(lossy)
