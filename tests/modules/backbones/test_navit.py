"""NaViT: vit-pytorch's on mapped weights, its positions, its options."""

import math
from typing import Any

import pytest
import torch
from einops import rearrange
from torch import Tensor, nn
from vit_pytorch.na_vit import NaViT as PytorchNaViT

from modules.backbones import BlockStyle, FactorisedPositions, NaViT, create
from modules.backbones.factorised import MAX_SIDE, Factorised
from modules.backbones.navit import STYLE
from modules.supervised import Classifier
from tests.packs import images, pack
from tests.typecheck import unchecked

SIZES = [(32, 48), (16, 16), (48, 8), (8, 40), (64, 64)]
DIM, HEADS, DEPTH, PATCH, CLASSES, SIDE = 128, 2, 3, 8, 7, 12


def theirs() -> nn.Module:
    torch.manual_seed(0)
    network = PytorchNaViT(
        image_size=SIDE * PATCH,
        patch_size=PATCH,
        num_classes=CLASSES,
        dim=DIM,
        depth=DEPTH,
        heads=HEADS,
        mlp_dim=96,
    )
    for parameter in network.parameters():  # factors of norms are one at first: make them count
        with torch.no_grad():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return network


def ours() -> Classifier:
    style = BlockStyle(
        qkv_bias=False, proj_bias=False, qk_norm="rms_unscaled", norm_bias=False, norm_eps=1e-5
    )
    backbone = NaViT(
        *("mu", PATCH),
        positions=FactorisedPositions(max_side=SIDE),
        block=style,
        patch_norm=True,
        pooling="query",
        depth=DEPTH,
        embed_dim=DIM,
        num_heads=HEADS,
        mlp_dim=96,
    )
    network = Classifier(backbone, CLASSES)
    nn.init.zeros_(network.head.bias)
    return network


def renamed(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """vit-pytorch's weights, or their gradients, under our names."""

    def attention(there: str, here: str, is_pool: bool = False) -> dict[str, Tensor]:
        q, kv = state[f"{there}.to_q.weight"], state[f"{there}.to_kv.weight"]
        joined = {"q.weight": q, "kv.weight": kv} if is_pool else {"qkv.weight": torch.cat((q, kv))}
        return {f"{here}.{name}": tensor for name, tensor in joined.items()} | {
            f"{here}.q_norm.gamma": state[f"{there}.q_norm.gamma"],
            f"{here}.k_norm.gamma": state[f"{there}.k_norm.gamma"],
            f"{here}.proj.weight": state[f"{there}.to_out.0.weight"],
        }

    convolution = rearrange(
        state["to_patch_embedding.1.weight"], "d (c p q) -> d c p q", p=PATCH, q=PATCH
    )
    out = {
        "patch_norm.weight": state["to_patch_embedding.0.gamma"],
        "patch_embed.proj.weight": convolution,
        "patch_embed.proj.bias": state["to_patch_embedding.1.bias"],
        "embed_norm.weight": state["to_patch_embedding.2.gamma"],
        "positions.rows": state["pos_embed_height"],
        "positions.columns": state["pos_embed_width"],
        "norm.weight": state["transformer.norm.gamma"],
        "attn_pool.latent": state["attn_pool_queries"].view(1, 1, -1),
        "attn_pool.norm.weight": state["attn_pool.norm.gamma"],
        "fc_norm.weight": state["mlp_head.0.gamma"],
    } | attention("attn_pool", "attn_pool", is_pool=True)
    for i in range(DEPTH):
        block = f"transformer.layers.{i}"
        out |= attention(f"{block}.0", f"blocks.{i}.attn")
        out[f"blocks.{i}.norm1.weight"] = state[f"{block}.0.norm.gamma"]
        out[f"blocks.{i}.norm2.weight"] = state[f"{block}.1.0.gamma"]
        for number, name in ((1, "fc1"), (4, "fc2")):
            for leaf in ("weight", "bias"):
                out[f"blocks.{i}.mlp.{name}.{leaf}"] = state[f"{block}.1.{number}.{leaf}"]
    return {f"backbone.{name}": tensor for name, tensor in out.items()} | {
        "head.weight": state["mlp_head.1.weight"]
    }


@pytest.mark.parametrize("is_long", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_logits_and_gradients_equal_vit_pytorchs(dtype: torch.dtype, is_long: bool) -> None:
    """Gradients in float32 are known to 1e-4 of their largest value: scores are large here."""
    reference, network = theirs().to(dtype), ours().to(dtype)
    state = renamed(reference.state_dict())
    network.load_state_dict(state | {"head.bias": torch.zeros(CLASSES, dtype=dtype)}, strict=True)
    a, b, c, d, e = (image.to(dtype) for image in images(SIZES))
    expected = reference([[a, b], [c, d, e]])
    batch = pack([[a, b], [c, d, e]], PATCH, 150 if is_long else 77, 3)
    batch = batch._replace(patches=batch.patches.to(dtype))
    logits = network.head(network.backbone(batch).pooled)[[0, 1, 3, 4, 5]]
    torch.testing.assert_close(logits, expected, atol=1e-5, rtol=1e-5)
    expected.square().sum().backward()
    logits.square().sum().backward()
    gradients = renamed({name: p.grad for name, p in reference.named_parameters()})
    for name, parameter in network.named_parameters():
        if name == "head.bias":  # theirs has none
            continue
        wanted = gradients[name]
        size = wanted.abs().max().item()
        assert size > 0, name
        tolerance = {torch.float32: 1e-4, torch.float64: 1e-6}[dtype] * size
        torch.testing.assert_close(parameter.grad, wanted, atol=tolerance, rtol=0, msg=name)


WAYS = [
    FactorisedPositions(kind, coordinates, combine)
    for kind in ("learned", "sinusoidal", "fourier")
    for coordinates in ("absolute", "fractional")
    for combine in ("add", "stack", "multiply")
]


def name_of(how: FactorisedPositions) -> str:
    return f"{how.kind} {how.coordinates} {how.combine}"


def navit(**arguments: Any) -> NaViT:
    torch.manual_seed(0)
    network = NaViT(**{"variant": "mu", "patch_size": 8} | arguments)
    with torch.no_grad():
        for name, parameter in network.named_parameters():
            parameter.normal_(std=1.0 if name.startswith("positions.") else 0.15)
    return network


@pytest.mark.parametrize("how", WAYS, ids=name_of)
def test_images_in_a_pack_are_those_alone(how: FactorisedPositions) -> None:
    network = navit(positions=how).eval()
    a, b, c, d, e = images(SIZES)
    together = network(pack([[a, b], [c, d, e]], 8, 80, 4))
    assert together.grid is None
    assert together.cls is None
    assert not together.pooled[[2, 3, 7]].any()
    for image, at in zip((a, b, c, d, e), (0, 1, 4, 5, 6), strict=True):
        alone = network(image[None])
        assert alone.grid == (image.shape[1] // 8, image.shape[2] // 8)
        torch.testing.assert_close(together.pooled[at : at + 1], alone.pooled, atol=2e-5, rtol=1e-5)
    (first, last) = network.last_blocks(images(SIZES)[0][None], 2)
    assert not torch.allclose(first.pooled, last.pooled)
    torch.testing.assert_close(last.pooled, together.pooled[:1], atol=2e-5, rtol=1e-5)


@pytest.mark.parametrize("how", WAYS, ids=name_of)
def test_positions_matter_and_learn(how: FactorisedPositions) -> None:
    network = navit(positions=how)
    image = images([(32, 32)])[0][None]
    out = network(image).pooled
    assert (out - network(image.roll(8, dims=3)).pooled).abs().max() > 1e-5
    assert (out - network(image.transpose(2, 3)).pooled).abs().max() > 1e-5
    out.square().sum().backward()
    tables = {n: p for n, p in network.named_parameters() if n.startswith("positions.")}
    assert bool(tables) == (how.kind != "sinusoidal")
    matrices = {n for n in tables if ".linear." in n}  # decay like any other weight matrix
    assert bool(matrices) == (how.kind == "fourier")
    assert tables.keys() & network.no_weight_decay() == tables.keys() - matrices
    for name, parameter in network.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.any(), name


def at(how: FactorisedPositions, dim: int, token: list[int], grid: list[int]) -> tuple[Any, Tensor]:
    torch.manual_seed(0)
    module = Factorised(how, dim)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.normal_()
    return module, module(torch.tensor([token]), torch.tensor([grid]))[0]


def test_each_way_is_its_formula() -> None:
    same = {"atol": 1e-6, "rtol": 1e-5}
    module, got = at(FactorisedPositions(), 8, [2, 5], [4, 6])
    torch.testing.assert_close(got, module.rows[2] + module.columns[5], **same)
    module, got = at(FactorisedPositions(combine="multiply"), 8, [2, 5], [4, 6])
    torch.testing.assert_close(got, module.rows[2] * module.columns[5], **same)
    module, got = at(FactorisedPositions(combine="stack"), 8, [2, 5], [4, 6])
    torch.testing.assert_close(got, torch.cat((module.columns[5], module.rows[2])), **same)
    half = FactorisedPositions(coordinates="fractional", max_side=5)
    module, got = at(half, 8, [2, 3], [4, 8])  # 2 / 4 is row 2 of 0..4; 3 / 8 lies half way
    between = (module.columns[1] + module.columns[2]) / 2
    torch.testing.assert_close(got, module.rows[2] + between, **same)
    waves = FactorisedPositions("sinusoidal", combine="stack")
    _, got = at(waves, 8, [2, 5], [4, 6])
    expected = [f(p * w) for p in (5, 2) for f in (math.sin, math.cos) for w in (1, 0.01)]
    torch.testing.assert_close(got, torch.tensor(expected), **same)
    waves = FactorisedPositions("sinusoidal", "fractional", "stack", max_side=10)
    _, got = at(waves, 8, [2, 3], [4, 8])
    expected = [f(p * w) for p in (3.75, 5) for f in (math.sin, math.cos) for w in (1, 0.01)]
    torch.testing.assert_close(got, torch.tensor(expected), **same)
    module, got = at(FactorisedPositions("fourier"), 8, [2, 5], [4, 6])
    total = torch.zeros(8)
    for part, place in ((module.fourier_rows, 2), (module.fourier_columns, 5)):
        angles = part.frequencies * place
        total = total + part.linear(torch.cat((angles.sin(), angles.cos())) / math.sqrt(8))
    torch.testing.assert_close(got, total, **same)


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ({"kind": "rope"}, "positions.kind is 'rope'; expected one of learned, sinusoidal"),
        ({"coordinates": "pixels"}, "positions.coordinates is 'pixels'"),
        ({"combine": "max"}, "positions.combine is 'max'"),
        ({"kind": "fourier", "max_side": 8}, "kind fourier with absolute .* no use for it"),
        ({"kind": "sinusoidal", "max_side": 8}, "kind sinusoidal with absolute"),
        ({"max_side": 0}, "positions.max_side is 0; expected at least 1"),
        ({"coordinates": "fractional", "max_side": 1}, "max_side is 1; expected at least 2"),
    ],
)
def test_position_errors(arguments: dict, says: str) -> None:
    with pytest.raises(ValueError, match=says):
        unchecked(FactorisedPositions, arguments)


def test_errors() -> None:
    waves = FactorisedPositions("sinusoidal", combine="stack")
    with pytest.raises(ValueError, match="width 34 is no multiple of 4, as sinusoidal"):
        NaViT("mu", embed_dim=34, num_heads=2, positions=waves)
    with pytest.raises(ValueError, match="patch_size is 0; expected at least 1"):
        NaViT("mu", patch_size=0)
    with pytest.raises(ValueError, match="unknown ViT variant 'XXL'"):
        NaViT("XXL")
    with pytest.raises(ValueError, match=r"drop_path is 1.0"):
        NaViT("mu", drop_path=1.0)
    with pytest.raises(ValueError, match="3 blocks were asked of a NaViT that has 2"):
        NaViT("mu").last_blocks(torch.zeros(1, 3, 16, 16), 3)
    with pytest.raises(ValueError, match="images of 1 channels"):
        NaViT("mu")(torch.zeros(1, 1, 16, 16))
    short = NaViT("mu", 8, positions=FactorisedPositions(max_side=4))
    assert short.max_grid == 4
    assert NaViT("mu").max_grid == MAX_SIDE
    assert NaViT("mu", positions=FactorisedPositions("fourier")).max_grid is None
    with pytest.raises(ValueError, match=r"5x2 patches .* end at 4; set positions.max_side to 5"):
        short(torch.zeros(1, 3, 40, 16))
    with pytest.raises(ValueError, match=r"5 patches along a side .* takes 4"):
        short(pack([images([(40, 16)])], 8, 20, 1))


def test_it_is_a_family_of_its_own() -> None:
    network = create("navit", variant="mu")
    assert isinstance(network, NaViT)
    assert network.image_size is None
    assert network.num_prefix_tokens == 0
    names = {name for name, _ in network.named_parameters()}
    attention = {name for name in names if name.startswith("blocks.0.attn.")}
    assert attention == {
        f"blocks.0.attn.{name}"
        for name in ("qkv.weight", "proj.weight", "q_norm.gamma", "k_norm.gamma")
    }
    assert not any(name.endswith("norm.bias") or ".norm1.bias" in name for name in names)
    assert (STYLE.qkv_bias, STYLE.proj_bias, STYLE.norm_bias) == (False, False, False)
    assert STYLE.qk_norm == "rms"


@pytest.mark.parametrize("pooling", ["map", "query"])
def test_layers_and_decay(pooling: Any) -> None:
    network = NaViT("mu", depth=3, pooling=pooling, patch_norm=True)
    for name, _ in network.named_parameters():
        if name.startswith("blocks."):
            assert network.layer_of(name) == int(name.split(".")[1]) + 1
        else:
            is_after = name.startswith(("norm.", "attn_pool.", "fc_norm."))
            assert network.layer_of(name) == (4 if is_after else 0), name
    exempt = network.no_weight_decay()
    assert {"positions.rows", "positions.columns", "attn_pool.latent"} <= exempt
    for name, parameter in network.named_parameters():
        if parameter.ndim > 1 and name.endswith("gamma"):
            assert name in exempt
    assert "patch_embed.proj.weight" not in exempt


OPTIONS: dict[str, dict[str, Any]] = {
    "query": {"pooling": "query"},
    "norms of patches": {"patch_norm": True},
    "LayerNorm of q and k": {"block": BlockStyle(qk_norm="layer")},
    "unscaled": {"block": BlockStyle(qk_norm="rms_unscaled")},
    "biases": {"block": BlockStyle(qk_norm="rms")},
    "channels": {"in_channels": 1},
}


@pytest.mark.parametrize("option", OPTIONS)
def test_every_option_changes_the_output_and_learns(option: str) -> None:
    plain, other = navit(), navit(**OPTIONS[option])
    shapes = {name: tensor.shape for name, tensor in other.state_dict().items()}
    same = {n: t for n, t in plain.state_dict().items() if shapes.get(n) == t.shape}
    other.load_state_dict(same, strict=False)
    image = images([(32, 24)])[0][None]
    pooled = other(image[:, : other.in_channels]).pooled
    assert (pooled - plain(image).pooled).abs().max() > 1e-4
    pooled.square().sum().backward()
    for name, parameter in other.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.any(), name


@pytest.mark.parametrize("init", ["timm", "dino", "jax", "mae", "moco"])
def test_first_values(init: Any) -> None:
    torch.manual_seed(0)
    network = NaViT("S", 8, depth=1, init=init, pooling="query")
    assert network.positions.rows.std().item() == pytest.approx(0.02, rel=0.05)
    assert network.attn_pool.latent.any()
    assert (network.blocks[0].attn.q_norm.gamma == 1).all()
    xavier = math.sqrt(2 / (384 + 3 * 384))
    each = math.sqrt(2 / (2 * 384))
    expected = {"timm": 0.02, "dino": 0.02, "jax": each, "mae": xavier, "moco": each}[init]
    assert network.blocks[0].attn.qkv.weight.std().item() == pytest.approx(expected, rel=0.02)
    for coordinates, spread in (("absolute", 0.5), ("fractional", 10.0)):
        torch.manual_seed(0)
        how = FactorisedPositions("fourier", coordinates)
        fourier = NaViT("S", 8, depth=1, init=init, positions=how).positions.fourier_rows
        assert fourier.frequencies.std().item() == pytest.approx(spread, rel=0.2)
        assert not fourier.linear.bias.any()


def test_regularisers_change_training_and_nothing_else() -> None:
    image = torch.randn(4, 3, 32, 24)
    plain = navit()
    for option in ({"dropout": 0.3}, {"drop_path": 0.5}):
        other = navit(**option)
        assert not torch.allclose(other.train()(image).pooled, plain(image).pooled)
        torch.testing.assert_close(other.eval()(image).pooled, plain(image).pooled)
