"""Pooling, tokens, block styles, first values: each does what it says."""

import math
from typing import Any

import pytest
import timm
import torch
import torch.nn.functional as F
from torch import nn

from modules.backbones import BlockStyle, Positions, ViT
from modules.supervised import Classifier
from tests.modules.backbones.test_vit import count
from tests.typecheck import unchecked

NO_ROWS = Positions(prefix_rows=False)


@pytest.mark.parametrize(
    ("expected", "variant", "arguments"),
    [
        # METHODS A.1
        (5_910_800, "Ti", {"distillation_token": True}),
        (22_436_432, "S", {"distillation_token": True}),
        (87_338_192, "B", {"distillation_token": True}),
        (22_059_496, "S", {"positions": NO_ROWS, "block": BlockStyle(layer_scale=1e-4)}),
        (38_849_512, "M", {"positions": NO_ROWS, "block": BlockStyle(layer_scale=1e-4)}),
        (86_585_320, "B", {"positions": NO_ROWS, "block": BlockStyle(layer_scale=1e-4)}),
        (304_374_760, "L", {"positions": NO_ROWS, "block": BlockStyle(layer_scale=1e-4)}),
        (
            632_126_440,
            "H",
            {"patch_size": 14, "positions": NO_ROWS, "block": BlockStyle(layer_scale=1e-4)},
        ),
        (93_653_224, "B", {"pooling": "map", "class_token": False}),
        (86_567_656 + 590_592, "B", {"pre_logits": True}),
    ],
)
def test_parameter_counts(expected: int, variant: str, arguments: dict) -> None:
    with torch.device("meta"):
        assert count(Classifier(ViT(variant, **arguments), 1000)) == expected


@pytest.mark.parametrize(
    ("name", "variant", "arguments"),
    [
        ("vit_giant_patch14_224", "g", {"patch_size": 14}),
        ("vit_gigantic_patch14_224", "G", {"patch_size": 14}),
        (
            "vit_so400m_patch14_siglip_224",
            "So400m",
            {"patch_size": 14, "pooling": "map", "class_token": False},
        ),
    ],
)
def test_the_largest_sizes_count_as_timms(name: str, variant: str, arguments: dict) -> None:
    with torch.device("meta"):
        theirs = timm.create_model(name, num_classes=7)
        assert count(Classifier(ViT(variant, **arguments), 7)) == count(theirs)


OPTIONS: dict[str, dict[str, Any]] = {
    "average": {"pooling": "avg"},
    "average without token": {"pooling": "avg", "class_token": False},
    "norm, then average": {"pooling": "norm_avg"},
    "attention pooling": {"pooling": "map"},
    "distillation token": {"distillation_token": True},
    "registers": {"num_registers": 3},
    "pre-logits": {"pre_logits": True},
    "tanh GELU": {"block": BlockStyle(mlp="gelu_tanh")},
    "ReLU": {"block": BlockStyle(mlp="relu")},
    "SwiGLU": {"block": BlockStyle(mlp="swiglu")},
    "no bias of qkv": {"block": BlockStyle(qkv_bias=False)},
    "qk norm": {"block": BlockStyle(qk_norm="layer")},
    "RMS norm of q and k": {"block": BlockStyle(qk_norm="rms")},
    "unscaled RMS norm": {"block": BlockStyle(qk_norm="rms_unscaled")},
    "no bias of projections": {"block": BlockStyle(proj_bias=False)},
    "no bias of norms": {"block": BlockStyle(norm_bias=False)},
    "layer scale": {"block": BlockStyle(layer_scale=0.1)},
    "residual scale": {"block": BlockStyle(residual_scale=2.0)},
    "norm epsilon": {"block": BlockStyle(norm_eps=0.1)},
}


@pytest.mark.parametrize("option", OPTIONS)
def test_every_option_changes_the_output_and_every_parameter_learns(option: str) -> None:
    torch.manual_seed(0)
    images = torch.randn(3, 3, 32, 32)
    plain = ViT("mu", image_size=32)
    with torch.no_grad():
        for parameter in plain.parameters():
            parameter.normal_(std=0.3)
    other = ViT("mu", image_size=32, **OPTIONS[option])
    shapes = {name: tensor.shape for name, tensor in other.state_dict().items()}
    same = {n: t for n, t in plain.state_dict().items() if shapes.get(n) == t.shape}
    other.load_state_dict(same, strict=False)
    features = other(images)
    assert (features.pooled - plain(images).pooled).abs().max() > 1e-5
    read = features.pooled.square().sum()
    if features.dist is not None:
        read = read + features.dist.square().sum()
    read.backward()
    for name, parameter in other.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.abs().sum() > 0, name
    assert (features.cls is None) == (other.cls_token is None)


def test_what_features_hold() -> None:
    vit = ViT("mu", 8, 32, distillation_token=True, num_registers=2).eval()
    assert vit.num_prefix_tokens == 4
    features = vit(torch.randn(2, 3, 32, 32))
    assert features.patches.shape == (2, 16, 32)
    assert torch.equal(features.pooled, features.cls)
    assert not torch.equal(features.dist, features.cls)


def test_poolings_are_their_formulas() -> None:
    images = torch.randn(2, 3, 32, 32)
    for pooling in ("avg", "norm_avg"):
        vit = ViT("mu", 8, 32, pooling=pooling, pre_logits=True).eval()
        grid = vit.grid_of(images)
        (tokens,) = vit.run_blocks(vit.embed(images, grid), grid, keep=1)
        with torch.no_grad():
            norm = vit.fc_norm if pooling == "avg" else vit.norm
            norm.weight.normal_()
        patches = tokens[:, 1:]
        pooled = norm(patches.mean(1)) if pooling == "avg" else norm(patches).mean(1)
        expected = torch.tanh(F.linear(pooled, vit.pre_logits.weight, vit.pre_logits.bias))
        torch.testing.assert_close(vit(images).pooled, expected)


def test_residual_scale_divides_both_branches() -> None:
    plain = ViT("mu", 8, 32, depth=1)
    scaled = ViT("mu", 8, 32, depth=1, block=BlockStyle(residual_scale=3.0))
    state = plain.state_dict()
    for name in ("attn.proj", "mlp.fc2"):
        for leaf in ("weight", "bias"):
            state[f"blocks.0.{name}.{leaf}"] = torch.randn_like(state[f"blocks.0.{name}.{leaf}"])
    scaled.load_state_dict(state)
    for name in ("attn.proj", "mlp.fc2"):
        for leaf in ("weight", "bias"):
            state[f"blocks.0.{name}.{leaf}"] /= 3.0
    plain.load_state_dict(state)
    images = torch.randn(2, 3, 32, 32)
    torch.testing.assert_close(scaled(images).pooled, plain(images).pooled, atol=1e-5, rtol=1e-5)


def test_activations_are_the_published_ones() -> None:
    """METHODS J: GELU exact and tanh at 1, -1 and 3; SwiGLU as SiLU(gate) * value."""
    from modules.backbones.layers import MLP

    x = torch.tensor([[[1.0], [-1.0], [3.0]]])
    for kind, expected in (
        ("gelu", [0.841345, -0.158655, 2.995950]),
        ("gelu_tanh", [0.841192, -0.158808, 2.996363]),
        ("swiglu", [2 * v * v * torch.sigmoid(torch.tensor(v)).item() for v in (1.0, -1.0, 3.0)]),
    ):
        mlp = MLP(1, 1, BlockStyle(mlp=kind))
        with torch.no_grad():
            for layer in (mlp.fc1, mlp.fc2):
                nn.init.ones_(layer.weight)
                nn.init.zeros_(layer.bias)
            if kind == "swiglu":
                mlp.fc1.weight[1] = 2.0  # the value; the gate is the first half
        assert mlp(x).flatten().tolist() == pytest.approx(expected, abs=1e-5)


def test_uniform_drop_path() -> None:
    rates = [
        [block.drop_path.rate for block in ViT("mu", depth=3, drop_path=0.2, **u).blocks]
        for u in ({}, {"uniform_drop_path": True})
    ]
    assert rates[0] == pytest.approx([0.0, 0.1, 0.2])
    assert rates[1] == [0.2, 0.2, 0.2]


@pytest.mark.parametrize("init", ["timm", "dino", "jax", "mae", "moco"])
def test_first_values(init: str) -> None:
    torch.manual_seed(0)
    options = {"init": init, "pooling": "map", "num_registers": 4, "pre_logits": True}
    vit = ViT("S", image_size=64, depth=2, **options)
    dim, hidden, fan_in = 384, 1536, 3 * 16 * 16
    block = vit.blocks[1]
    xavier = {"qkv": math.sqrt(2 / (dim + 3 * dim)), "mlp": math.sqrt(2 / (dim + hidden))}
    each = math.sqrt(2 / (dim + dim))
    expected = {
        "timm": (0.02, 0.02, 0.02, 1 / math.sqrt(3 * fan_in), 0.02, 1e-6),
        "dino": (0.02, 0.02, 0.02, 1 / math.sqrt(3 * fan_in), 0.02, 0.02),
        "jax": (each, xavier["mlp"], each, 1 / math.sqrt(fan_in), 0.02, 0.0),
        "mae": (xavier["qkv"], xavier["mlp"], each, math.sqrt(2 / (dim + fan_in)), 0.02, 0.02),
        "moco": (each, xavier["mlp"], each, math.sqrt(2 / (dim + fan_in)), 0.02, 1e-6),
    }[init]
    weights = (
        *(block.attn.qkv.weight, block.mlp.fc1.weight, vit.pre_logits.weight),
        *(vit.patch_embed.proj.weight, vit.positions.table, vit.cls_token),
    )
    for weight, std in zip(weights, expected, strict=True):
        tolerance = 4 / math.sqrt(weight.numel())
        assert weight.std().item() == pytest.approx(std, rel=tolerance, abs=1e-12)
    assert not block.attn.qkv.bias.any()
    assert bool(block.mlp.fc1.bias.any()) == (init == "jax")
    assert block.mlp.fc1.bias.abs().max() < 1e-5
    assert vit.attn_pool.latent.any()
    if init in ("mae", "moco"):
        bound = math.sqrt(6 / (dim + fan_in))
        assert bound * 0.99 < vit.patch_embed.proj.weight.abs().max() <= bound


def test_layers_for_layer_decay() -> None:
    vit = ViT("mu", image_size=32, depth=3, pooling="map", num_registers=1, pre_logits=True)
    layers = {name: vit.layer_of(name) for name, _ in vit.named_parameters()}
    own = ViT("mu", image_size=32, depth=3, positions=Positions(inject="every"))
    assert own.layer_of("positions.2.table") == 3
    after = ("norm.", "attn_pool.", "pre_logits.")
    for name, layer in layers.items():
        if name.startswith("blocks."):
            assert layer == int(name.split(".")[1]) + 1
        else:
            assert layer == (4 if name.startswith(after) else 0), name


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ({"class_token": False}, "pooling 'cls' reads the class token, but class_token is false"),
        ({"num_registers": -1}, "num_registers is -1"),
    ],
)
def test_errors(arguments: dict, says: str) -> None:
    with pytest.raises(ValueError, match=says):
        ViT("mu", image_size=32, **arguments)


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ({"mlp": "tanh"}, "mlp is 'tanh'; expected gelu"),
        ({"layer_scale": 0.0}, r"layer_scale is 0\.0; expected more than 0"),
        ({"residual_scale": -1.0}, "residual_scale is -1"),
        ({"qk_norm": True}, "qk_norm is True; expected layer, rms, rms_unscaled or null"),
    ],
)
def test_style_errors(arguments: dict, says: str) -> None:
    with pytest.raises(ValueError, match=says):
        unchecked(BlockStyle, arguments)


def test_more_blocks_than_there_are() -> None:
    with pytest.raises(ValueError, match="3 blocks were asked of a ViT that has 2"):
        ViT("mu", image_size=32).last_blocks(torch.zeros(1, 3, 32, 32), 3)
