"""Swin against timm's, its windows and masks, any size of image."""

from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from timm.optim import param_groups_layer_decay
from torch import Tensor, nn

from datamodules.batch import PackedImages
from modules import DINO, MAE, weights
from modules.analysis import attention_rows, observe
from modules.backbones import Masked, Swin, create
from modules.backbones.swin import SwinBlock, log_offsets
from modules.backbones.windows import (
    Merging,
    Order,
    merge,
    offset_index,
    reorder,
    row_by_row,
    window_mask,
)
from modules.groups import layer_scale
from modules.ibot import MaskedPatches
from modules.supervised import Classifier
from tests.packs import images as packed_images
from tests.packs import pack

MU = {"embed_dim": 8, "depths": (2, 1, 2, 1), "num_heads": (1, 2, 2, 4), "window_size": 4}
TIMM = {1: "swin_tiny_patch4_window7_224", 2: "swinv2_tiny_window8_256"}
CPU = torch.device("cpu")


def randomised(network: nn.Module) -> Any:
    torch.manual_seed(0)
    for name, parameter in network.named_parameters():
        nn.init.normal_(parameter, mean=float("norm" in name), std=0.1)
    return network


def theirs(version: int, size: tuple[int, int], **changes: Any) -> Any:
    given = {**MU, "img_size": size, "num_classes": 5, "drop_path_rate": 0.0}
    return randomised(timm.create_model(TIMM[version], **given | changes))


def ours(version: int, size: tuple[int, int], **changes: Any) -> Classifier:
    return Classifier(Swin("mu", size, **{"window": 4, "version": version} | changes), 5)


@pytest.mark.parametrize(
    ("variant", "side", "window", "expected"),
    [
        ("T", 224, 7, 28_288_354),
        ("S", 224, 7, 49_606_258),
        ("B", 224, 7, 87_768_224),
        ("B", 384, 12, 87_903_584),
        ("L", 224, 7, 196_532_476),
        ("L", 384, 12, 196_735_516),
    ],
)
def test_parameters(variant: str, side: int, window: int, expected: int) -> None:
    with torch.device("meta"):
        network = Classifier(Swin(variant, side, window=window), 1000)
        assert sum(parameter.numel() for parameter in network.parameters()) == expected


@pytest.mark.parametrize("version", [1, 2])
@pytest.mark.parametrize("size", [(128, 128), (84, 212)])
def test_logits_and_gradients_are_timms(
    version: int, size: tuple[int, int], tmp_path: Path
) -> None:
    """Where windows divide the maps, and where timm pads them."""
    other, padding = theirs(version, size), "masked" if size == (128, 128) else "timm"
    torch.save(other.state_dict(), tmp_path / "timm.pth")
    network = ours(version, size, padding=padding)
    report = weights.load(network, tmp_path / "timm.pth")
    assert not report.dropped
    images = torch.randn(2, 3, *size)
    logits, expected = network(images), other(images)
    assert expected.std() > 0.05
    torch.testing.assert_close(logits, expected, atol=1e-5, rtol=1e-5)
    (logits.square().sum() + expected.square().sum()).backward()
    grads = {key: parameter.grad for key, parameter in other.named_parameters()}
    for key, parameter in network.named_parameters():
        name = key.removeprefix("backbone.").replace("head.", "head.fc.")
        torch.testing.assert_close(parameter.grad, grads[name], atol=2e-4, rtol=1e-4, msg=key)
    with torch.inference_mode():
        torch.testing.assert_close(network.eval()(images), expected, atol=1e-5, rtol=1e-5)
    arguments = weights.timm_arguments(network)
    again = timm.create_model(**arguments, drop_path_rate=0.0).eval()
    again.load_state_dict(weights.to_timm(network), strict=True)
    torch.testing.assert_close(again(images), expected, atol=1e-6, rtol=1e-6)


def test_a_network_of_a_larger_window_is_timms(tmp_path: Path) -> None:
    """Published for 12 at 192 pixels: the last map was smaller, and its biases know that."""
    known, size = (6, 6, 6, 3), (128, 128)
    other = theirs(2, size, window_size=8, pretrained_window_sizes=known)
    torch.save(other.state_dict(), tmp_path / "timm.pth")
    network = ours(2, size, window=8, pretrained_window=known)
    weights.load(network, tmp_path / "timm.pth")
    images = torch.randn(1, 3, *size)
    expected = other(images)
    torch.testing.assert_close(network(images), expected, atol=1e-5, rtol=1e-5)
    wrong = ours(2, size, window=8, pretrained_window=6)
    weights.load(wrong, tmp_path / "timm.pth")
    assert not torch.allclose(wrong(images), expected, atol=1e-4)
    assert weights.timm_arguments(network)["pretrained_window_sizes"] == known


def test_networks_that_pad_otherwise_than_timms_are_not_written_for_timm() -> None:
    weights.to_timm(ours(1, (80, 80), padding="timm"))
    weights.to_timm(ours(1, (128, 128)))
    with pytest.raises(ValueError, match=r"do not divide maps of 10x10.* padding masked"):
        weights.to_timm(ours(1, (80, 80)))


@pytest.mark.parametrize("version", [1, 2])
def test_half_precision_weights_compute(version: int) -> None:
    network = ours(version, (64, 64)).to(torch.bfloat16)
    assert network(torch.randn(1, 3, 64, 64, dtype=torch.bfloat16)).isfinite().all()


def test_microsofts_files_have_the_merging_at_the_end_of_a_stage(tmp_path: Path) -> None:
    network, state = ours(1, (128, 128)), {}
    for key, tensor in theirs(1, (128, 128)).state_dict().items():
        if key.startswith("layers.") and ".downsample." in key:
            key = f"layers.{int(key[7]) - 1}{key[8:]}"
        state[key.replace("head.fc.", "head.")] = tensor
    state["layers.0.blocks.1.attn_mask"] = torch.zeros(4)
    state["layers.0.blocks.1.attn.relative_position_index"] = torch.zeros(4)
    torch.save({"model": state}, tmp_path / "microsoft.pth")
    report = weights.load(network, tmp_path / "microsoft.pth")
    assert report.renamed["layers.1.downsample.norm.bias"] == ("layers.0.downsample.norm.bias",)
    images = torch.randn(2, 3, 128, 128)
    expected = theirs(1, (128, 128)).eval()(images)
    torch.testing.assert_close(network.eval()(images), expected, atol=1e-5, rtol=1e-5)


def test_biases_for_another_window_or_map(tmp_path: Path) -> None:
    file, name = tmp_path / "seven.pth", "layers.0.blocks.0.attn.relative_position_bias_table"
    state = theirs(1, (128, 128)).state_dict()
    torch.save(state, file)
    wide = ours(1, (128, 128), window=6)
    report = weights.load(wide, file)
    assert report.resampled[name] == "resampled to 11x11 offsets"
    square = state[name].T.view(1, 1, 7, 7)
    expected = nn.functional.interpolate(square, (11, 11), mode="bicubic")
    loaded = wide.backbone.state_dict()[name]
    torch.testing.assert_close(loaded, expected.view(1, 121).T, atol=1e-5, rtol=1e-5)
    # A smaller map has fewer offsets, and those mean what they meant: as at the larger size.
    small, large = ours(1, (32, 32)).eval(), ours(1, (128, 128)).eval()
    assert "cut to 1x1" in weights.load(small, file).resampled[name.replace("0.blocks", "3.blocks")]
    weights.load(large, file)
    images = torch.randn(2, 3, 32, 32)
    torch.testing.assert_close(small(images), large(images))


@settings(max_examples=25, deadline=None)
@given(height=st.integers(1, 90), width=st.integers(1, 90), version=st.sampled_from([1, 2]))
def test_any_size(height: int, width: int, version: int) -> None:
    network = Swin("mu", 64, window=3, version=version).eval()
    with torch.no_grad():
        features = network(torch.randn(1, 3, height, width))
    assert features.grid == (-(-height // 32), -(-width // 32))
    assert features.patches.shape == (1, features.grid[0] * features.grid[1], network.patch_dim)
    assert torch.isfinite(features.patches).all()


def test_groups_and_padding() -> None:
    network = randomised(Swin("mu", 64, window=3)).eval()
    groups = [torch.randn(2, 3, 64, 64), torch.randn(3, 3, 40, 72)]
    for together, images in zip(network(groups), groups, strict=True):
        torch.testing.assert_close(together.pooled, network(images).pooled)
    given = {
        padding: randomised(Swin("mu", 64, window=3, padding=padding)).eval()(groups[1]).pooled
        for padding in ("masked", "zeros", "timm")
    }
    assert not torch.allclose(given["masked"], given["zeros"])
    assert not torch.allclose(given["zeros"], given["timm"])


def test_numbers_of_methods() -> None:
    """METHODS J: bias index, shifted regions and the order of channels after merging."""
    index = torch.tensor([[4, 3, 1, 0], [5, 4, 2, 1], [7, 6, 4, 3], [8, 7, 5, 4]])
    assert torch.equal(offset_index((2, 2), (2, 2), CPU), index)
    assert torch.equal(offset_index((1, 2), (2, 2), CPU), index[:2, :2])
    mask = window_mask(Order((4, 4), (2, 2), (1, 1)), True, CPU)
    assert mask is not None
    assert mask.isinf().sum((1, 2, 3)).tolist() == [0, 8, 8, 12]
    cells = torch.arange(4.0).view(1, 4, 1)
    merged = merge(cells, row_by_row((2, 2)), row_by_row((1, 1)), Merging(2, True))
    assert merged.flatten().tolist() == [0, 2, 1, 3]
    farthest = log_offsets((3, 2), (3, 2), CPU)[0]
    torch.testing.assert_close(farthest, -torch.log2(torch.tensor([9.0, 9.0])) / 3)


def test_orders_go_there_and_back() -> None:
    grid = (5, 7)
    windows = Order(grid, (3, 3), (1, 1))
    x = torch.randn(2, 35, 3, dtype=torch.float64, requires_grad=True)
    there = reorder(x, row_by_row(grid), windows)
    assert there.shape == (2, 54, 3)
    assert torch.equal(reorder(there, windows, row_by_row(grid)), x)
    rolled = torch.zeros(2, 6, 9, 3, dtype=torch.float64)
    rolled[:, :5, :7] = x.detach().view(2, 5, 7, 3)
    rolled = rolled.roll((-1, -1), (1, 2))
    assert torch.equal(there[:, :9].view(2, 3, 3, 3), rolled[:, :3, :3])
    assert torch.autograd.gradcheck(lambda x: reorder(x, row_by_row(grid), windows), (x,))
    to = row_by_row((3, 4))
    assert torch.autograd.gradcheck(lambda x: merge(x, row_by_row(grid), to, Merging(2)), (x,))


def reach(padding: str, grid: tuple[int, int], token: tuple[int, int]) -> Tensor:
    """Which tokens of a map have an influence on one through a shifted block."""
    network = randomised(Swin("mu", 128, window=4, padding=padding))
    block: Any = network.layers[0].blocks[1]
    assert isinstance(block, SwinBlock)
    x = torch.randn(1, grid[0] * grid[1], 8, requires_grad=True)
    now = row_by_row(grid)
    out = reorder(*block(x, now, block.order(grid, padding == "timm")), now)
    out[0, token[0] * grid[1] + token[1]].sum().backward()
    assert x.grad is not None
    return x.grad[0].abs().sum(-1).view(grid) > 0


@pytest.mark.parametrize("grid", [(8, 8), (7, 9)])
def test_no_influence_across_the_edge(grid: tuple[int, int]) -> None:
    """The window of the corner holds tokens of all four corners; they do not see each other."""
    corner = reach("masked", grid, (0, 0))
    assert corner[:2, :2].all()
    assert corner.sum() == 4
    inner = reach("masked", grid, (2, 2))
    assert inner[2:6, 2:6].all()
    assert inner.sum() == 16


def test_timms_padding_mixes_opposite_edges() -> None:
    assert reach("timm", (7, 9), (0, 0)).sum() > 4


@pytest.mark.parametrize("version", [1, 2])
def test_layers_and_decay_are_timms(version: int) -> None:
    other, network = theirs(version, (128, 128)), ours(version, (128, 128))
    groups = param_groups_layer_decay(other, 0.05, other.no_weight_decay(), layer_decay=0.7)
    scales = {id(p): (g["lr_scale"], g["weight_decay"]) for g in groups for p in g["params"]}
    named, exempt = dict(other.named_parameters()), network.backbone.no_weight_decay()
    for key, parameter in network.backbone.named_parameters():
        scale, decay = scales[id(named[key])]
        if key.startswith("norm."):  # with the last block in timm, with the head here
            scale = 1.0
        assert layer_scale(network, f"backbone.{key}", 0.7) == pytest.approx(scale), key
        assert (parameter.ndim < 2 or key in exempt) == (decay == 0), key


def test_options_have_effects() -> None:
    images = torch.randn(2, 3, 64, 64)
    base = create("swin", variant="mu", image_size=64, window=4)
    assert base.num_layers == 6
    assert create("swin", variant="mu", depth=3).num_layers == 7
    assert base.last_blocks(images, 1)[0].pooled.shape == (2, 64)
    lossy = Swin("mu", 64, drop_path=0.9)
    assert not torch.equal(lossy(images).pooled, lossy(images).pooled)
    seen = {
        known: randomised(Swin("mu", 64, window=4, version=2, pretrained_window=known)).eval()
        for known in (None, 4, 8)
    }
    assert not torch.allclose(seen[4](images).pooled, seen[8](images).pooled)


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ({"variant": "H"}, "unknown Swin variant 'H'; known: mu, T, S, B, L"),
        ({"window": 0}, "window is 0"),
        ({"pretrained_window": 8}, "version 1 has no use for"),
        ({"drop_path": 1.0}, "drop_path is 1"),
        ({"depth": 0}, "depth is 0"),
        ({"image_size": 0}, "image_size is 0x0"),
    ],
)
def test_errors_name_the_value(arguments: dict[str, Any], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        Swin(**{"variant": "mu"} | arguments)


def test_what_it_does_not_take_is_refused() -> None:
    network = Swin("mu", 64)
    masked = Masked(
        torch.randn(1, 3, 64, 64), torch.zeros(1, 4, dtype=torch.bool), torch.zeros(1, 64)
    )
    some: PackedImages = pack([packed_images([(32, 32)])], 8, 16, 1, 0)
    for images, what in ((masked, "masked patches"), (some, "packs of images")):
        with pytest.raises(ValueError, match=f"Swin needs whole maps.*{what} reached it"):
            network(images)
    with pytest.raises(ValueError, match="1 channels reached a Swin built for 3"):
        network(torch.randn(1, 1, 64, 64))
    with pytest.raises(ValueError, match="Swin takes no masks"):
        DINO(network, masked_patches=MaskedPatches())
    with pytest.raises(ValueError, match="this Swin needs the whole grid"):
        MAE(network)
    with pytest.raises(ValueError, match="last stage has 1; blocks before"):
        network.last_blocks(torch.randn(1, 3, 64, 64), 2)
    with pytest.raises(ValueError, match="no attention over all tokens"):
        attention_rows(observe(network, torch.randn(1, 3, 64, 64)), [0])
