"""A ViT given a pack: every image is what it is alone, and no image knows of another."""

from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from datamodules.batch import PackedImages
from modules.backbones import Backbone, BlockStyle, NaViT, Positions, ViT, attention
from modules.backbones.attention import Segments
from modules.backbones.layers import DropPath
from modules.backbones.resampling import MAX_GRID
from tests.modules.backbones.test_positions import ALL, name_of
from tests.packs import images, pack

ROOT = Path(__file__).parents[3]
SIZES = [(32, 48), (8, 8), (24, 8), (16, 40), (48, 32), (8, 56)]
# Where the images of `packed` went: slots 2 of the first and the whole of the third row are empty.
SLOTS = [0, 1, 3, 4, 5, 9]


def packed(num_prefix: int, kept: Any = None) -> PackedImages:
    a, b, c, d, e, f = images(SIZES)
    return pack([[a, b], [c, d, e], [], [f]], 8, 55, 3, num_prefix, kept)


def vit(**arguments: Any) -> ViT:
    """A toy whose every parameter is far from zero."""
    torch.manual_seed(0)
    network = ViT(**{"variant": "mu", "patch_size": 8, "image_size": (32, 48)} | arguments).eval()
    with torch.no_grad():
        for name, parameter in network.named_parameters():
            parameter.normal_(std=0.5 if name.startswith("positions.") else 0.15)
    return network


def fields(features: Any) -> dict[str, Tensor]:
    return {
        name: getattr(features, name)
        for name in ("pooled", "cls", "dist")
        if getattr(features, name) is not None
    }


def equals_alone(network: Backbone, short: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention, "SHORT_ROW", short)
    prefix = network.num_prefix_tokens
    batch = packed(prefix)
    together = network(batch)
    assert together.grid is None
    assert together.patches.shape == (4, 55, 32)
    assert together.pooled.shape == (12, 32)
    for image, at in zip(images(SIZES), SLOTS, strict=True):
        alone = network(image[None])
        for name, expected in fields(alone).items():
            got = getattr(together, name)[at : at + 1]
            torch.testing.assert_close(got, expected, atol=2e-5, rtol=1e-5, msg=name)
        own = (batch.segments[at // 3] == at % 3) & (batch.positions[at // 3, :, 0] >= 0)
        patches = together.patches[at // 3][own]
        torch.testing.assert_close(patches, alone.patches[0], atol=2e-5, rtol=1e-5)
    for name, value in fields(together).items():
        empty = [at for at in range(12) if at not in SLOTS]
        assert torch.isfinite(value).all(), name
        assert name == "pooled" or not value[empty].any(), name


PLAIN = [how for how in ALL if how.kind != "relative"]
RESAMPLED = [
    Positions(kind, resample=how)
    for kind in ("learned1d", "learned2d")
    for how in ("bicubic", "dino", "bilinear")
]


@pytest.mark.parametrize(
    "how", [*PLAIN, *RESAMPLED, Positions("none")], ids=lambda p: f"{name_of(p)} {p.resample}"
)
def test_positions_are_those_of_an_image_alone(
    how: Positions, monkeypatch: pytest.MonkeyPatch
) -> None:
    equals_alone(vit(positions=how, num_registers=2), 0, monkeypatch)


OPTIONS: dict[str, dict[str, Any]] = {
    "class token": {},
    "average": {"pooling": "avg"},
    "average without prefix": {"pooling": "avg", "class_token": False},
    "norm, then average": {"pooling": "norm_avg"},
    "attention pooling": {"pooling": "map"},
    "distillation token": {"distillation_token": True, "num_registers": 1},
    "pre-logits": {"pre_logits": True},
    "SwiGLU": {"block": BlockStyle(mlp="swiglu", layer_scale=0.1)},
    "LayerNorm of q and k": {"block": BlockStyle(qk_norm="layer")},
    "RMS norm of q and k": {"block": BlockStyle(qk_norm="rms", norm_bias=False)},
    "unscaled": {"block": BlockStyle(qk_norm="rms_unscaled", proj_bias=False, qkv_bias=False)},
    "residual scale": {"block": BlockStyle(residual_scale=2.0)},
    "rates that are off": {"dropout": 0.3, "drop_path": 0.3},
}


@pytest.mark.parametrize("short", [0, 128], ids=["in turn", "mask"])
@pytest.mark.parametrize("option", OPTIONS)
def test_every_option(option: str, short: int, monkeypatch: pytest.MonkeyPatch) -> None:
    equals_alone(vit(**OPTIONS[option]), short, monkeypatch)


def test_last_blocks_of_a_pack() -> None:
    network = vit()
    first, last = network.last_blocks(packed(1), 2)
    expected = network.last_blocks(images(SIZES)[3][None], 2)
    torch.testing.assert_close(first.cls[4:5], expected[0].cls, atol=2e-5, rtol=1e-5)
    torch.testing.assert_close(last.cls[4:5], expected[1].cls, atol=2e-5, rtol=1e-5)


def test_the_tables_own_grid_is_not_resampled() -> None:
    for how in ("antialias", "bicubic", "dino", "bilinear"):
        network = vit(positions=Positions(resample=how))
        batch = packed(1)
        rows = network.positions(Segments(batch))
        assert torch.equal(rows[0, : 1 + 4 * 6], network.positions.table[0])
        assert not rows[batch.segments < 0].any()


@pytest.mark.parametrize("network", [ViT, NaViT])
def test_gradients_are_those_of_images_alone(network: Any) -> None:
    options = {"image_size": (32, 48), "pooling": "map"} if network is ViT else {}
    torch.manual_seed(0)
    ours = network("mu", 8, **options)
    ours(packed(ours.num_prefix_tokens)).pooled.square().sum().backward()
    got = {name: p.grad.clone() for name, p in ours.named_parameters() if p.grad is not None}
    ours.zero_grad()
    for image in images(SIZES):
        ours(image[None]).pooled.square().sum().backward()
    for name, parameter in ours.named_parameters():
        expected = parameter.grad
        scale = expected.abs().max().item()
        torch.testing.assert_close(
            got[name], expected, atol=1e-5 * max(1.0, scale), rtol=1e-4, msg=name
        )


def test_dropped_patches_are_as_though_they_were_not_there() -> None:
    """Against a dense run on the tokens that are kept, positions and all."""
    network = vit()
    kept = [[[0, 3, 7, 20, 23], None], [[1], [9, 2], None], [], [[4, 6]]]
    batch = packed(1, kept)
    together = network(batch)
    indices = [kept[0][0], [0], [1], [9, 2], range(24), [4, 6]]
    for image, chosen, at in zip(images(SIZES), indices, SLOTS, strict=True):
        grid = network.grid_of(image[None])
        tokens = network.embed(image[None], grid)
        tokens = tokens[:, [0, *(1 + index for index in chosen)]]
        (last,) = network.run_blocks(tokens, grid, keep=1)
        expected = network.norm(last)[:, 0]
        torch.testing.assert_close(together.cls[at : at + 1], expected, atol=2e-5, rtol=1e-5)


POOLED: dict[str, Any] = {
    "cls": lambda: vit(),
    "map": lambda: vit(pooling="map", class_token=False),
    "avg": lambda: vit(pooling="avg"),
    "navit": lambda: NaViT("mu", 8, block=BlockStyle(qk_norm="rms")).eval(),
    "navit query": lambda: NaViT("mu", 8, pooling="query", patch_norm=True).eval(),
}


@settings(max_examples=12, deadline=None)
@given(
    name=st.sampled_from(sorted(POOLED)),
    changed=st.sampled_from(SLOTS),
    short=st.sampled_from([0, 128]),
    seed=st.integers(0, 99),
)
def test_no_image_knows_of_another(name: str, changed: int, short: int, seed: int) -> None:
    network: Backbone = POOLED[name]()
    before = attention.SHORT_ROW
    attention.SHORT_ROW = short
    try:
        batch = packed(network.num_prefix_tokens)
        segments = Segments(batch)
        other = (segments.image == changed) & ~segments.is_padding
        generator = torch.Generator().manual_seed(seed)
        noise = torch.randn(batch.patches.shape, generator=generator)
        noisy = torch.where(other[..., None] | segments.is_padding[..., None], noise, batch.patches)
        patches = batch.patches.clone().requires_grad_()
        features = network(batch._replace(patches=patches))
        moved = network(batch._replace(patches=noisy))
        unchanged = [at for at in SLOTS if at != changed]
        torch.testing.assert_close(
            moved.pooled[unchanged], features.pooled[unchanged], atol=1e-6, rtol=0
        )
        assert not torch.allclose(moved.pooled[changed], features.pooled[changed], atol=1e-6)
        features.pooled[changed].square().sum().backward()
        assert patches.grad is not None
        assert patches.grad[other & segments.is_patch].any()
        assert not patches.grad[~other].any()
    finally:
        attention.SHORT_ROW = before


@pytest.mark.parametrize("name", POOLED)
@pytest.mark.parametrize("short", [0, 128], ids=["in turn", "mask"])
def test_empty_slots_and_rows_give_no_nan(
    name: str, short: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(attention, "SHORT_ROW", short)
    network = POOLED[name]().train()
    batch = packed(network.num_prefix_tokens)
    empty = pack([[], []], 8, 55, 3, network.num_prefix_tokens)
    for given_pack in (batch, empty):
        network.zero_grad()
        features = network(given_pack)
        assert torch.isfinite(features.pooled).all()
        features.pooled.square().sum().backward()
        for parameter in network.parameters():
            assert parameter.grad is None or torch.isfinite(parameter.grad).all()


def test_stochastic_depth_drops_whole_images() -> None:
    torch.manual_seed(0)
    batch = packed(1)
    segments = Segments(batch)
    branch = DropPath(0.5)
    seen = set()
    for _ in range(20):
        out = branch(torch.ones(4, 55, 3), segments)
        for at in SLOTS:
            own = out[(segments.image == at) & ~segments.is_padding]
            assert own.unique().numel() == 1
            seen.add((at, own.unique().item()))
    assert seen == {(at, value) for at in SLOTS for value in (0.0, 2.0)}
    assert torch.equal(branch.eval()(torch.ones(4, 55, 3), segments), torch.ones(4, 55, 3))


def test_regularisers_act_in_packs() -> None:
    network = vit(drop_path=0.5).train()
    assert not torch.equal(network(packed(1)).pooled, network(packed(1)).pooled)


@pytest.mark.parametrize("dtype", [torch.bfloat16])
def test_autocast_of_a_pack(dtype: torch.dtype) -> None:
    network = vit(block=BlockStyle(qk_norm="rms"))
    exact = network(packed(1)).pooled
    with torch.autocast("cpu", dtype=dtype):
        half = network(packed(1)).pooled
    assert (half.float() - exact).norm() < 0.05 * exact.norm()
    half.float().sum().backward()
    assert all(torch.isfinite(p.grad).all() for p in network.parameters() if p.grad is not None)


def test_packs_of_another_network_are_refused() -> None:
    with pytest.raises(ValueError, match=r"with 0 prefix tokens .* has 1; pack with the backbone"):
        vit()(packed(0))
    with pytest.raises(ValueError, match=r"patches of 192 values .* have 768 .*patch_size"):
        vit(patch_size=16)(packed(1))
    with pytest.raises(ValueError, match=r"patches of 192 values .* have 768 .*patch_size"):
        NaViT("mu", 16)(packed(0))
    with pytest.raises(ValueError, match=r"relative positions take no packs; use learned1d"):
        vit(positions=Positions("relative"))(packed(1))
    long = pack([images([(8, 8 * MAX_GRID)])], 8, 200, 1, 1)
    assert torch.isfinite(vit()(long).pooled).all()
    assert vit().max_grid == MAX_GRID
    long = pack([images([(8, 8 * MAX_GRID + 8)])], 8, 200, 1, 1)
    with pytest.raises(ValueError, match=r"129 patches along a side .* takes 128; make such"):
        vit()(long)
    unplaced = vit(positions=Positions("none"))
    assert unplaced.max_grid is None
    assert torch.isfinite(unplaced(long).pooled).all()
