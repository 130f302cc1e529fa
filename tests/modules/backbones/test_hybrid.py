"""Hybrids against METHODS' exact counts, against timm's and against the published arithmetic."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from modules import weights
from modules.backbones import Features, Hybrid, Masked, Visible, ViT, create
from modules.backbones.hybrid import EPSILONS, TIMM, VARIANTS, ResNet, Size, StdConv
from modules.groups import layer_scale
from modules.supervised import Classifier
from tests.modules.backbones.test_groups import check_equal, drawn
from tests.modules.backbones.test_vit import count
from tests.packs import images as images_of
from tests.packs import pack

# Parameters at 224 px with 1000 classes (METHODS A.1), pixels that a patch spans.
COUNTS = {
    "R+Ti/16": (6_337_704, 32),
    "R26+S/32": (36_431_912, 32),
    "R26+B/32": (101_383_976, 32),
    "R50+B/16": (98_659_112, 16),
    "R50+L/32": (328_994_856, 32),
}
TOY = {"embed_dim": 48, "depth": 2, "num_heads": 3}


@pytest.fixture(autouse=True)
def two_stages(monkeypatch: pytest.MonkeyPatch) -> None:
    """The toy has one, for the sake of recipes at 224 pixels; here images are small."""
    monkeypatch.setitem(VARIANTS, "mu", Size("mu", (1, 1), 1))


@pytest.mark.parametrize("variant", COUNTS)
def test_parameter_counts(variant: str) -> None:
    with torch.device("meta"):
        network = Classifier(Hybrid(variant), 1000)
    assert (count(network), network.backbone.patch_size) == COUNTS[variant]


def test_counts_of_the_backbone_alone_and_at_384_pixels() -> None:
    with torch.device("meta"):
        assert count(Hybrid("R50+B/16")) == 97_890_112
        assert count(Classifier(Hybrid("R50+B/16", image_size=384), 1000)) == 98_950_952


def test_every_size_is_there_and_timm_has_them() -> None:
    assert {*COUNTS, "mu"} == set(VARIANTS)
    assert {VARIANTS[name].units for name in COUNTS} == set(TIMM)


@pytest.fixture(params=["R+Ti/16", "R26+S/32", "R50+B/16"])
def pair(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[nn.Module, Classifier]:
    """timm's hybrid with a narrow Transformer, and ours with its weights, in double precision.

    The convolutions of 16 units amplify what rounding leaves; in doubles that is nothing.
    """
    variant: str = request.param
    torch.manual_seed(0)
    name = TIMM[VARIANTS[variant].units]
    theirs = timm.create_model(name, img_size=64, num_classes=5, **TOY)
    for name, parameter in theirs.named_parameters():
        nn.init.normal_(parameter, mean=float("norm" in name and "weight" in name), std=0.2)
    torch.save({"model": theirs.state_dict()}, tmp_path / "theirs.pth")
    ours = Classifier(Hybrid(variant, image_size=64, **TOY), 5)
    report = weights.load(ours, tmp_path / "theirs.pth")
    assert len(report.read) == len(theirs.state_dict())
    return theirs, ours


def test_logits_and_gradients_equal_timms(pair: tuple[nn.Module, Classifier]) -> None:
    theirs, ours = pair
    images = torch.randn(2, 3, 64, 64)
    expected, got = theirs.double()(images.double()), ours.double()(images.double())
    assert expected.std() > 0.1
    torch.testing.assert_close(got, expected, atol=1e-8, rtol=1e-6)
    expected.square().mean().backward()
    got.square().mean().backward()
    reference = {n: p.grad for n, p in theirs.named_parameters()}
    renamed = weights.to_timm(ours)
    assert set(renamed) == set(reference)
    own = {id(p): n for n, p in ours.named_parameters()}
    assert len(own) == len(reference)
    for parameter, name in zip(ours.parameters(), own.values(), strict=True):
        their = name.removeprefix("backbone.").replace("positions.table", "pos_embed")
        if not ours.backbone.units:
            their = their.replace("backbone.stem.", "backbone.")
        torch.testing.assert_close(parameter.grad, reference[their], atol=1e-8, rtol=1e-5, msg=name)

    single = theirs.float()(images)
    torch.testing.assert_close(ours.float()(images), single, atol=1e-4, rtol=1e-4)
    again = timm.create_model(**weights.timm_arguments(ours))
    again.load_state_dict(weights.to_timm(ours), strict=True)
    assert torch.equal(again(images), single)
    assert {k: v for k, v in weights.timm_arguments(ours).items() if k in TOY} == TOY


def google_arrays(state: dict[str, Tensor]) -> dict[str, np.ndarray]:
    """The ResNet of a hybrid as Google's code would have saved it, from METHODS' table."""
    arrays = {}
    for name, tensor in state.items():
        prefix, _, rest = name.partition("patch_embed.backbone.")
        if prefix or not rest:
            continue
        *place, module, leaf = rest.split(".")
        if place == ["stem"]:
            where = f"{module}_root".replace("norm", "gn")
        else:
            stage, unit = int(place[1]) + 1, int(place[3]) + 1
            shown = f"{module}_proj" if "downsample" in place else module
            where = f"block{stage}/unit{unit}/{shown}".replace("norm", "gn")
        array = tensor.numpy()
        if module.startswith("conv"):
            arrays[f"{where}/kernel"] = array.transpose(2, 3, 1, 0)
        else:
            leaf = {"weight": "scale", "bias": "bias"}[leaf]
            arrays[f"{where}/{leaf}"] = array[None, None, None]
    return arrays


@pytest.mark.parametrize("variant", ["R+Ti/16", "mu"])
def test_googles_npz_reads_back_equal(variant: str, tmp_path: Path) -> None:
    from tests.modules.test_weights import google_arrays as of_vit

    torch.manual_seed(0)
    written, read = (Classifier(Hybrid(variant, image_size=64, **TOY), 5) for _ in range(2))
    drawn(written)
    arrays = of_vit(written, big_vision=False)
    state = {k.removeprefix("backbone."): v for k, v in written.state_dict().items()}
    resnet = google_arrays(state)
    assert len(resnet) == sum("patch_embed.backbone." in name for name in state)
    np.savez(tmp_path / "google.npz", **arrays, **resnet)
    weights.load(read, tmp_path / "google.npz")
    for name, tensor in written.state_dict().items():
        assert torch.equal(read.state_dict()[name], tensor), name
    if variant == "R+Ti/16":  # timm's reader agrees
        from timm.models.vision_transformer import _load_weights as timm_reads_npz

        theirs = timm.create_model(TIMM[()], img_size=64, num_classes=5, **TOY).eval()
        timm_reads_npz(theirs, str(tmp_path / "google.npz"))
        images = torch.randn(2, 3, 64, 64)
        torch.testing.assert_close(read.eval()(images), theirs(images), atol=1e-4, rtol=1e-4)


def same(x: Tensor, side: int, stride: int, value: float = 0.0) -> Tensor:
    """TensorFlow's padding, for any size."""
    edges = []
    for n in reversed(x.shape[2:]):
        total = max((-(-n // stride) - 1) * stride + side - n, 0)
        edges += [total // 2, total - total // 2]
    return F.pad(x, edges, value=value)


def test_googles_arithmetic_restated() -> None:
    """Weights by their deviation + 1e-5, norms with 1e-6, padding and pooling as TensorFlow's."""
    torch.manual_seed(0)
    network = drawn(ResNet((2, 1), 3, EPSILONS["google"], recompute=False)).double()
    images = torch.randn(2, 3, 32, 48, dtype=torch.float64)

    def conv(layer: StdConv, x: Tensor, stride: int = 1) -> Tensor:
        w = layer.weight
        w = (w - w.mean((1, 2, 3), keepdim=True)) / (w.std((1, 2, 3), False, keepdim=True) + 1e-5)
        return F.conv2d(same(x, w.shape[-1], stride), w, None, stride)

    def norm(layer: nn.GroupNorm, x: Tensor) -> Tensor:
        return F.group_norm(x, 32, layer.weight, layer.bias, 1e-6)

    x = norm(network.stem.norm, conv(network.stem.conv, images, 2)).relu()
    x = F.max_pool2d(same(x, 3, 2, -torch.inf), 3, 2)
    for s, stage in enumerate(network.stages):
        for u, unit in enumerate(stage.blocks):
            stride = 2 if s == 1 and u == 0 else 1
            past = x
            if u == 0:
                past = norm(unit.downsample.norm, conv(unit.downsample.conv, x, stride))
            y = norm(unit.norm1, conv(unit.conv1, x)).relu()
            y = norm(unit.norm2, conv(unit.conv2, y, stride)).relu()
            x = (norm(unit.norm3, conv(unit.conv3, y)) + past).relu()
    torch.testing.assert_close(network(images), x, atol=1e-9, rtol=1e-9)
    other = ResNet((2, 1), 3, EPSILONS["timm"], recompute=False).double()
    other.load_state_dict(network.state_dict())
    assert 1e-6 < (other(images) - x).abs().max() < 1e-2


def test_contract_at_other_sizes_and_channels() -> None:
    torch.manual_seed(0)
    hybrid = drawn(create("hybrid", variant="mu", image_size=(16, 24), in_channels=5))
    for height, width in ((16, 24), (8, 8), (40, 16)):
        features = hybrid(torch.randn(2, 5, height, width))
        assert isinstance(features, Features)
        assert features.grid == (height // 8, width // 8)
        assert features.patches.shape == (2, height * width // 64, 32)
        assert features.pooled.isfinite().all()
    features.pooled.square().sum().backward()
    for name, parameter in hybrid.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name
        assert parameter.grad.abs().sum() > 0, name


def test_groups() -> None:
    torch.manual_seed(0)
    check_equal(drawn(Hybrid("mu", 32)).double(), torch.float64)


def test_a_unit_begins_as_nothing_but_its_shortcut() -> None:
    hybrid = Hybrid("mu", 32)
    for stage in hybrid.patch_embed.backbone.stages:
        for unit in stage.blocks:
            x = torch.randn(1, unit.conv1.in_channels, 8, 8)
            torch.testing.assert_close(unit(x), unit.downsample(x).relu())


@pytest.mark.parametrize("init", ["timm", "dino", "jax", "mae", "moco"])
def test_first_values(init: Any) -> None:
    torch.manual_seed(0)
    hybrid = Hybrid("mu", 32, init=init)
    unit = hybrid.patch_embed.backbone.stages[1].blocks[0]
    fan = unit.conv2.weight[0].numel() if init == "jax" else unit.conv2.weight[:, 0].numel() / 2
    assert unit.conv2.weight.std().item() == pytest.approx(fan**-0.5, rel=0.05)
    plain = ViT("mu", 1, 4, 512, init=init).patch_embed.proj
    proj = hybrid.patch_embed.proj
    assert proj.weight.shape == plain.weight.shape
    assert proj.weight.std().item() == pytest.approx(plain.weight.std().item(), rel=0.05)


def test_layers() -> None:
    """The ResNet is the stem: it learns slowest."""
    network = Classifier(Hybrid("mu", 32), 3)
    for name, layer in (
        ("backbone.patch_embed.backbone.stages.1.blocks.0.conv2.weight", 0),
        ("backbone.positions.table", 0),
        ("backbone.blocks.1.mlp.fc1.weight", 2),
        ("head.weight", 3),
    ):
        assert layer_scale(network, name, 0.5) == 0.5 ** (3 - layer), name


def test_hidden_patches_are_not_seen_through_their_neighbours() -> None:
    hybrid = drawn(Hybrid("mu", 32)).eval()
    images, token = torch.randn(2, 3, 32, 32), torch.randn(1, 32)
    is_masked = torch.zeros(2, 16, dtype=torch.bool)
    is_masked[:, 5] = True  # row 1, column 1
    other = images.clone()
    other[..., 8:16, 8:16] = 9.0
    seen, same_ = (hybrid(Masked(x, is_masked, token)).patches for x in (images, other))
    assert torch.equal(seen, same_)
    assert not torch.allclose(seen, hybrid(images).patches)
    with pytest.raises(ValueError, match="make it for their grid"):
        hybrid(Masked(images, is_masked[:, 1:], token))


def test_what_it_does_not_take_is_refused() -> None:
    hybrid = Hybrid("mu", 32)
    assert not hybrid.takes_packs
    assert not hybrid.takes_visible
    with pytest.raises(ValueError, match="a pack reached a Hybrid, whose stem looks beyond"):
        hybrid(pack([images_of([(16, 16)])], 8, 8, 1, 1))
    with pytest.raises(ValueError, match="some of the patches reached a Hybrid"):
        hybrid(Visible(torch.zeros(1, 3, 32, 32), torch.zeros(1, 2, dtype=torch.long)))
    with pytest.raises(ValueError, match="20x32 is not divisible by patch_size 8"):
        hybrid(torch.zeros(1, 3, 20, 32))


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ({"variant": "R50"}, r"unknown hybrid 'R50'; known: mu, R\+Ti/16"),
        ({"image_size": 200}, "200x200 is not divisible by patch_size 16"),
    ],
)
def test_errors_name_the_value_and_the_fix(arguments: dict[str, Any], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        Hybrid(**arguments)


def test_a_hybrid_of_no_size_of_timms_says_so() -> None:
    with pytest.raises(ValueError, match=r"timm's ViT has no hybrid of \(1, 1\) units"):
        weights.to_timm(Hybrid("mu", 32))
