"""Weights of other code bases: in through the converter, equal outputs; out, and back in there."""

import argparse
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import timm
import torch
from timm.layers import resample_abs_pos_embed
from timm.models.vision_transformer import VisionTransformer
from timm.models.vision_transformer import _load_weights as timm_reads_npz
from torch import nn

from modules import weights
from modules.backbones import BlockStyle, Positions, ViT
from modules.supervised import Classifier

SMALL = {"embed_dim": 48, "depth": 2, "num_heads": 3}
NO_ROWS = Positions(prefix_rows=False)
TINY = {"img_size": 32, "num_classes": 5, **SMALL}

# timm's name, its arguments beside TINY, ours beside SMALL
FAMILIES: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "vit": ("vit_tiny_patch16_224", {}, {}),
    "deit": ("deit_tiny_patch16_224", {}, {}),
    "deit distilled": (
        "deit_tiny_distilled_patch16_224",
        {},
        {"distillation_token": True},
    ),
    "deit3": (
        "deit3_small_patch16_224",
        {},
        {"positions": NO_ROWS, "block": BlockStyle(layer_scale=1e-6)},
    ),
    "registers": (
        "vit_medium_patch16_reg4_gap_256",
        {},
        {
            "class_token": False,
            "num_registers": 4,
            "pooling": "avg",
            "positions": NO_ROWS,
            "block": BlockStyle(layer_scale=1e-5),
        },
    ),
    "dinov2 registers": (
        "vit_small_patch14_reg4_dinov2",
        {"img_size": 28},
        {
            "patch_size": 14,
            "image_size": 28,
            "num_registers": 4,
            "positions": NO_ROWS,
            "block": BlockStyle(layer_scale=1e-5),
        },
    ),
    "dinov2 swiglu": (
        "vit_giant_patch14_dinov2",
        {"img_size": 28},
        {
            "patch_size": 14,
            "image_size": 28,
            "mlp_dim": 128,
            "block": BlockStyle(mlp="swiglu", layer_scale=1e-5),
        },
    ),
    "siglip": (
        "vit_base_patch16_siglip_224",
        {},
        {"class_token": False, "pooling": "map"},
    ),
    "siglip so400m": (
        "vit_so400m_patch16_siglip_256",
        {},
        {
            "class_token": False,
            "pooling": "map",
            "mlp_dim": 179,
            "block": BlockStyle(mlp="gelu_tanh"),
        },
    ),
    "siglip average": (
        "vit_base_patch16_siglip_gap_224",
        {},
        {"class_token": False, "pooling": "norm_avg"},
    ),
    "mae fine-tuned": (
        "vit_tiny_patch16_224",
        {"global_pool": "avg"},
        {"pooling": "avg"},
    ),
    "qk norm, no bias": (
        "vit_tiny_patch16_224",
        {"qk_norm": True, "qkv_bias": False},
        {"block": BlockStyle(qk_norm="layer", qkv_bias=False)},
    ),
}


def randomised(network: nn.Module) -> nn.Module:
    """Every parameter of a size that shows: biases, tokens and layer scales start near zero."""
    torch.manual_seed(0)
    for name, parameter in network.named_parameters():
        nn.init.normal_(parameter, mean=float("norm" in name), std=0.2)
    return network.eval()


def their(name: str, arguments: dict) -> nn.Module:
    return randomised(timm.create_model(name, **TINY | arguments))


def our(arguments: dict, num_classes: int = 5) -> Classifier:
    return Classifier(ViT(**{"image_size": 32, **SMALL, **arguments}), num_classes).eval()


def small_network(**arguments: Any) -> Classifier:
    network = our(arguments)
    randomised(network)
    return network


@pytest.mark.parametrize("family", FAMILIES)
def test_timm_in_and_out(family: str, tmp_path: Path) -> None:
    name, theirs_args, our_args = FAMILIES[family]
    theirs, ours = their(name, theirs_args), our(our_args)
    torch.save({"model": theirs.state_dict()}, tmp_path / "theirs.pth")
    report = weights.load(ours, tmp_path / "theirs.pth")
    assert len(report.read) == len(theirs.state_dict())
    assert not report.dropped
    images = torch.randn(3, 3, *ours.backbone.image_size)
    expected = theirs(images)
    assert expected.std() > 0.1
    torch.testing.assert_close(ours(images), expected, atol=1e-5, rtol=1e-5)

    safetensors.torch.save_file(weights.to_timm(ours), tmp_path / "ours.safetensors")
    again = timm.create_model(
        name, **TINY | theirs_args, checkpoint_path=str(tmp_path / "ours.safetensors")
    ).eval()
    assert torch.equal(again(images), expected)


IN_TIMMS_TERMS: dict[str, dict[str, Any]] = {
    "sincos2d": {"positions": Positions("sincos2d")},
    "learned2d": {"positions": Positions("learned2d")},
    "no positions": {"positions": Positions("none")},
    "no prefix rows": {"positions": NO_ROWS, "num_registers": 2},
    "residual scale": {"block": BlockStyle(residual_scale=2.0)},
    "tanh": {"block": BlockStyle(mlp="gelu_tanh", layer_scale=0.1)},
    "swiglu": {"block": BlockStyle(mlp="swiglu", qkv_bias=False)},
    "epsilon": {"block": BlockStyle(norm_eps=1e-2, qk_norm="layer")},
    "average": {"pooling": "avg"},
    "norm, then average": {"pooling": "norm_avg", "class_token": False},
    "MAP, not square": {"pooling": "map", "class_token": False, "image_size": (32, 48)},
}


@pytest.mark.parametrize("option", IN_TIMMS_TERMS)
def test_the_arguments_for_timm_are_the_right_ones(option: str) -> None:
    ours = small_network(**IN_TIMMS_TERMS[option])
    theirs = VisionTransformer(**weights.timm_arguments(ours)).eval()
    theirs.load_state_dict(weights.to_timm(ours), strict=True)
    images = torch.randn(2, 3, *ours.backbone.image_size)
    torch.testing.assert_close(theirs(images), ours(images), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    "arguments",
    [
        {"positions": Positions("relative")},
        {"positions": Positions(inject="every")},
        {"pre_logits": True},
        {"block": BlockStyle(qk_norm="rms")},
        {"block": BlockStyle(norm_bias=False)},
        {"block": BlockStyle(proj_bias=False)},
        {"distillation_token": True, "num_registers": 1},
    ],
)
def test_what_timm_cannot_express_is_refused(arguments: dict) -> None:
    with pytest.raises(ValueError, match="timm's ViT has no"):
        weights.to_timm(small_network(**arguments))


# --- Google's npz -----------------------------------------------------------------------------


def google_arrays(network: Classifier, big_vision: bool) -> dict[str, np.ndarray]:
    """The weights as Google's code would have saved them, written here from METHODS' table."""
    state = {k.removeprefix("backbone."): v.numpy() for k, v in network.state_dict().items()}
    width, heads, depth = 48, 3, 2
    dash = "_0" if big_vision else "_1"
    names = {
        "norm1": "LayerNorm_0",
        "norm2": "LayerNorm_1" if big_vision else "LayerNorm_2",
        "mlp": "MlpBlock_0" if big_vision else "MlpBlock_3",
    }

    def linear(new: str, old: str) -> dict[str, np.ndarray]:
        return {f"{new}/kernel": state[f"{old}.weight"].T, f"{new}/bias": state[f"{old}.bias"]}

    def norm(new: str, old: str) -> dict[str, np.ndarray]:
        return {f"{new}/scale": state[f"{old}.weight"], f"{new}/bias": state[f"{old}.bias"]}

    def attention(new: str, qkv: dict[str, tuple], out: str) -> dict[str, np.ndarray]:
        arrays = {}
        for name, (weight, bias) in qkv.items():
            arrays[f"{new}/{name}/kernel"] = weight.T.reshape(width, heads, -1)
            arrays[f"{new}/{name}/bias"] = bias.reshape(heads, -1)
        arrays[f"{new}/out/kernel"] = state[f"{out}.weight"].T.reshape(heads, -1, width)
        arrays[f"{new}/out/bias"] = state[f"{out}.bias"]
        return arrays

    arrays = {
        "embedding/kernel": state["patch_embed.proj.weight"].transpose(2, 3, 1, 0),
        "embedding/bias": state["patch_embed.proj.bias"],
        **norm("Transformer/encoder_norm", "norm"),
        **linear("head", "head"),
    }
    if "cls_token" in state:
        arrays["cls"] = state["cls_token"]
    prefix = "" if big_vision else "Transformer/posembed_input/"
    arrays[f"{prefix}pos_embedding"] = state["positions.table"]
    for i in range(depth):
        ours, theirs = f"blocks.{i}", f"Transformer/encoderblock_{i}"
        w, b = state[f"{ours}.attn.qkv.weight"], state[f"{ours}.attn.qkv.bias"]
        arrays |= norm(f"{theirs}/{names['norm1']}", f"{ours}.norm1")
        arrays |= norm(f"{theirs}/{names['norm2']}", f"{ours}.norm2")
        parts = zip(np.split(w, 3), np.split(b, 3), strict=True)
        qkv = dict(zip(("query", "key", "value"), parts, strict=True))
        attn = f"{theirs}/MultiHeadDotProductAttention{dash}"
        arrays |= attention(attn, qkv, f"{ours}.attn.proj")
        for j in (0, 1):
            arrays |= linear(f"{theirs}/{names['mlp']}/Dense_{j}", f"{ours}.mlp.fc{j + 1}")
    if "pre_logits.weight" in state:
        arrays |= linear("pre_logits", "pre_logits")
    if "attn_pool.latent" in state:
        arrays["MAPHead_0/probe"] = state["attn_pool.latent"]
        kv = zip(
            np.split(state["attn_pool.kv.weight"], 2),
            np.split(state["attn_pool.kv.bias"], 2),
            strict=True,
        )
        q = (state["attn_pool.q.weight"], state["attn_pool.q.bias"])
        qkv = {"query": q, **dict(zip(("key", "value"), kv, strict=True))}
        arrays |= attention("MAPHead_0/MultiHeadDotProductAttention_0", qkv, "attn_pool.proj")
        arrays |= norm("MAPHead_0/LayerNorm_0", "attn_pool.norm")
        for j in (0, 1):
            arrays |= linear(f"MAPHead_0/MlpBlock_0/Dense_{j}", f"attn_pool.mlp.fc{j + 1}")
    return arrays


def scanned(arrays: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """As big_vision saves an encoder that was scanned: one array for all blocks."""
    first, others = "encoderblock_0/", {}
    for name, array in arrays.items():
        if first in name:
            second = arrays[name.replace(first, "encoderblock_1/")]
            others[name.replace(first, "encoderblock/")] = np.stack((array, second))
        elif "encoderblock_" not in name:
            others[name] = array
    return others


LAYOUTS = {
    "vision_transformer": ({}, False, ""),
    "vision_transformer, optimiser's copy": ({}, False, "opt/target/"),
    "vision_transformer 21k": ({"pre_logits": True}, False, ""),
    "big_vision": ({"class_token": False, "pooling": "norm_avg"}, True, "params/"),
    "big_vision MAP": ({"class_token": False, "pooling": "map"}, True, ""),
    "big_vision scanned": ({"class_token": False, "pooling": "map"}, True, "params/"),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_googles_npz_reads_back_equal(layout: str, tmp_path: Path) -> None:
    arguments, big_vision, prefix = LAYOUTS[layout]
    written = small_network(**arguments)
    arrays = google_arrays(written, big_vision)
    if "scanned" in layout:
        arrays = scanned(arrays)
    path = tmp_path / "google.npz"
    np.savez(path, **{prefix + name: array for name, array in arrays.items()})
    read = our(arguments)
    weights.load(read, path)
    for name, tensor in written.state_dict().items():
        assert torch.equal(read.state_dict()[name], tensor), name
    if layout in ("vision_transformer", "big_vision MAP"):  # timm's reader agrees
        name = "vit_base_patch16_siglip_224" if big_vision else "vit_tiny_patch16_224"
        theirs = timm.create_model(name, **TINY).eval()
        timm_reads_npz(theirs, str(path), prefix)
        images = torch.randn(2, 3, 32, 32)
        torch.testing.assert_close(read(images), theirs(images), atol=1e-5, rtol=1e-5)


# --- positions on the way ---------------------------------------------------------------------


@pytest.mark.parametrize("size", [48, (48, 80), 16])
def test_another_resolution_is_one_argument(size: Any, tmp_path: Path) -> None:
    theirs = their("vit_tiny_patch16_224", {})
    torch.save(theirs.state_dict(), tmp_path / "small.pth")
    ours = our({"image_size": size})
    report = weights.load(ours, tmp_path / "small.pth")
    grid = ours.backbone.grid
    assert report.resampled == {
        "positions.table": f"resampled from 2x2 to {grid[0]}x{grid[1]} (antialias)"
    }
    expected = resample_abs_pos_embed(theirs.pos_embed, list(grid), [2, 2])
    torch.testing.assert_close(ours.backbone.positions.table, expected, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("registers", [0, 2])
def test_rows_of_the_prefix_tokens_move_into_the_tokens(registers: int, tmp_path: Path) -> None:
    old = small_network(num_registers=registers)
    torch.save(old.state_dict(), tmp_path / "old.pth")
    new = our({"positions": NO_ROWS, "num_registers": registers})
    report = weights.load(new, tmp_path / "old.pth")
    assert "added to the tokens" in report.resampled["positions.table"]
    images = torch.randn(2, 3, 32, 32)
    torch.testing.assert_close(new(images), old(images), atol=1e-5, rtol=1e-5)

    torch.save(new.state_dict(), tmp_path / "new.pth")  # and back: their rows are zero
    back = our({"num_registers": registers})
    weights.load(back, tmp_path / "new.pth")
    torch.testing.assert_close(back(images), old(images), atol=1e-5, rtol=1e-5)


def test_a_published_table_is_that_of_a_square_image(tmp_path: Path) -> None:
    """Sixteen rows may be 4x4 or 2x8; timm, too, leaves only a square one as it is."""
    theirs = their("vit_tiny_patch16_224", {"img_size": 64})
    torch.save(theirs.state_dict(), tmp_path / "square.pth")
    ours = our({"image_size": (32, 128)})
    report = weights.load(ours, tmp_path / "square.pth")
    assert "from 4x4 to 2x8" in report.resampled["positions.table"]
    expected = resample_abs_pos_embed(theirs.pos_embed, [2, 8], [4, 4])
    torch.testing.assert_close(ours.backbone.positions.table, expected, atol=1e-6, rtol=1e-5)

    torch.save(ours.state_dict(), tmp_path / "ours.pth")  # our own is what it was
    again = our({"image_size": (32, 128)})
    assert not weights.load(again, tmp_path / "ours.pth").resampled
    assert torch.equal(again.backbone.positions.table, ours.backbone.positions.table)


def test_doubtful_prefix_rows_are_those_of_the_network(tmp_path: Path) -> None:
    """Nine rows beside five tokens: 3x3 without rows for them, or 2x2 with."""
    tokens = {"num_registers": 4, "positions": NO_ROWS}
    old = small_network(**tokens, image_size=48)
    torch.save(weights.to_timm(old), tmp_path / "old.pth")
    new = our({**tokens, "image_size": 64})
    report = weights.load(new, tmp_path / "old.pth")
    assert report.resampled == {"positions.table": "resampled from 3x3 to 4x4 (antialias)"}


@pytest.mark.parametrize("prefix_rows", [True, False])
def test_a_class_token_may_be_dropped_with_its_row(prefix_rows: bool, tmp_path: Path) -> None:
    positions = Positions(prefix_rows=prefix_rows)
    old = small_network(positions=positions, pooling="norm_avg", image_size=64)
    torch.save(weights.to_timm(old), tmp_path / "old.pth")
    new = our({"pooling": "norm_avg", "class_token": False, "image_size": 64})
    weights.load(new, tmp_path / "old.pth", drop=["cls_token"])
    table = old.backbone.positions.table[:, int(prefix_rows) :]
    assert torch.equal(new.backbone.positions.table, table)


@pytest.mark.parametrize("kind", ["learned2d", "relative"])
def test_other_positions_are_resampled_too(kind: Any, tmp_path: Path) -> None:
    old = small_network(positions=Positions(kind), image_size=64)
    torch.save(old.state_dict(), tmp_path / "old.pth")
    new = our({"positions": Positions(kind), "image_size": (96, 64)})
    assert weights.load(new, tmp_path / "old.pth").resampled
    # The old network resamples on the fly: the same function, so the same output.
    images = torch.randn(2, 3, 96, 64)
    torch.testing.assert_close(new(images), old(images), atol=1e-5, rtol=1e-5)


def test_a_table_of_sines_is_checked_not_trusted(tmp_path: Path) -> None:
    fixed = small_network(positions=Positions("sincos2d"))
    state = weights.to_timm(fixed)
    torch.save(state, tmp_path / "mae.pth")
    read = our({"positions": Positions("sincos2d")})
    report = weights.load(read, tmp_path / "mae.pth")
    assert report.resampled == {"positions.table": "equals the computed sines and cosines"}
    half = {name: tensor.half() for name, tensor in state.items()}
    safetensors.torch.save_file(half, tmp_path / "half.safetensors")
    weights.load(read, tmp_path / "half.safetensors")
    with pytest.raises(ValueError, match="not the network's sines and cosines; set"):
        weights.load(our({"positions": Positions("sincos2d_big_vision")}), tmp_path / "mae.pth")


def test_an_odd_table_is_refused(tmp_path: Path) -> None:
    state = weights.to_timm(small_network())
    state["pos_embed"] = torch.zeros(1, 1 + 12, 48)
    torch.save(state, tmp_path / "odd.pth")
    with pytest.raises(ValueError, match="13 rows, which is no square grid"):
        weights.load(our({}), tmp_path / "odd.pth")


# --- coverage ---------------------------------------------------------------------------------


def test_nothing_is_missing_or_left_over_in_silence(tmp_path: Path) -> None:
    state = weights.to_timm(small_network())
    for changed, says in (
        ({**state, "extra.weight": torch.zeros(1)}, "has no place for extra.weight"),
        ({k: v for k, v in state.items() if k != "norm.bias"}, "the file lacks norm.bias"),
        ({**state, "head.bias": torch.zeros(7)}, r"head.bias is \[7\] in the file, \[5\] here"),
    ):
        torch.save(changed, tmp_path / "changed.pth")
        network = our({})
        before = {name: tensor.clone() for name, tensor in network.state_dict().items()}
        with pytest.raises(ValueError, match=says):
            weights.load(network, tmp_path / "changed.pth")
        for name, tensor in network.state_dict().items():
            assert torch.equal(tensor, before[name])  # never half-loaded


def test_what_is_named_may_be_left_out(tmp_path: Path) -> None:
    old = small_network()
    torch.save(weights.to_timm(old), tmp_path / "five.pth")
    new = our({}, num_classes=9)
    head = new.head.weight.clone()
    report = weights.load(new, tmp_path / "five.pth", drop=["head"])
    assert report.dropped == report.kept == ("head.weight", "head.bias")
    assert torch.equal(new.head.weight, head)
    assert torch.equal(new.backbone.cls_token, old.backbone.cls_token)
    assert "2 of the file dropped: head.weight, head.bias" in str(report)
    with pytest.raises(ValueError, match="drop names 'heads', but neither"):
        weights.load(new, tmp_path / "five.pth", drop=["head", "heads"])


def test_dino_and_our_own_checkpoints_name_their_networks(tmp_path: Path) -> None:
    student, teacher = small_network(), our({})
    dino = {
        name: {f"module.backbone.{k}": v for k, v in weights.to_timm(net).items()}
        | {"module.head.mlp.0.weight": torch.zeros(2, 2)}
        for name, net in (("student", student), ("teacher", teacher))
    }
    for state in dino.values():
        for name in ("weight", "bias"):
            state.pop(f"module.backbone.head.{name}")
    torch.save({**dino, "epoch": 3, "args": argparse.Namespace(lr=0.1)}, tmp_path / "dino.pth")
    backbone = our({}).backbone
    with pytest.raises(ValueError, match="several networks: student, teacher; name one as part"):
        weights.load(backbone, tmp_path / "dino.pth")
    weights.load(backbone, tmp_path / "dino.pth", part="student", drop=["head"])
    assert torch.equal(backbone.positions.table, student.backbone.positions.table)

    state = {f"classifier.{k}": v for k, v in student.state_dict().items()}
    state |= {f"averaged.{k}": v for k, v in teacher.state_dict().items()}
    torch.save({"pytorch-lightning_version": "2.6.6", "state_dict": state}, tmp_path / "last.ckpt")
    network = our({})
    weights.load(network, tmp_path / "last.ckpt", part="averaged")
    assert torch.equal(network.head.weight, teacher.head.weight)
    with pytest.raises(ValueError, match="no part 'teacher'; it has classifier, averaged"):
        weights.load(network, tmp_path / "last.ckpt", part="teacher")


def test_one_name_twice_is_no_guess(tmp_path: Path) -> None:
    state = weights.to_timm(small_network())
    twice = {**state, "module.head.weight": torch.zeros(5, 48)}
    torch.save(twice, tmp_path / "twice.pth")
    with pytest.raises(ValueError, match=r"has head\.weight twice, with and without a prefix"):
        weights.read(tmp_path / "twice.pth")
    torch.save({**state, "positions.table": state["pos_embed"]}, tmp_path / "both.pth")
    with pytest.raises(ValueError, match=r"positions\.table twice: as pos_embed and as pos"):
        weights.load(our({}), tmp_path / "both.pth")


def test_every_network_of_a_file_is_found(tmp_path: Path) -> None:
    state = weights.to_timm(small_network())
    payload = {"model": state, "ema": state, "loss": {"center": torch.zeros(1)}, "epoch": 3}
    torch.save(payload, tmp_path / "two.pth")
    assert list(weights.read(tmp_path / "two.pth")) == ["model", "ema"]
    foreign = {"pytorch-lightning_version": "2.0", "state_dict": state}
    torch.save(foreign, tmp_path / "foreign.ckpt")
    ((name, found),) = weights.read(tmp_path / "foreign.ckpt").items()
    assert (name, found.keys()) == ("state_dict", state.keys())
    wrapped = {f"module.{name}": tensor for name, tensor in state.items()}
    safetensors.torch.save_file(wrapped, tmp_path / "wrapped.safetensors")
    weights.load(our({}), tmp_path / "wrapped.safetensors")


def test_deit3s_own_names(tmp_path: Path) -> None:
    style = {"positions": NO_ROWS, "block": BlockStyle(layer_scale=1e-4)}
    old = small_network(**style)
    names = {"ls1.gamma": "gamma_1", "ls2.gamma": "gamma_2"}
    state = {
        key.replace(key[-9:], names.get(key[-9:], key[-9:])): tensor
        for key, tensor in weights.to_timm(old).items()
    }
    assert "blocks.1.gamma_2" in state
    torch.save({"model": state}, tmp_path / "deit3.pth")
    new = our(style)
    report = weights.load(new, tmp_path / "deit3.pth")
    assert report.renamed["blocks.1.ls2.gamma"] == ("blocks.1.gamma_2",)
    images = torch.randn(2, 3, 32, 32)
    assert torch.equal(new(images), old(images))


def test_by_name_through_timm(monkeypatch: pytest.MonkeyPatch) -> None:
    theirs = their("vit_tiny_patch16_224", {})
    asked = {}

    def create(name: str, pretrained: bool) -> nn.Module:
        asked[name] = pretrained
        return theirs

    monkeypatch.setattr(weights.timm, "create_model", create)
    ours = our({})
    weights.load(ours, "timm:vit_tiny_patch16_224.augreg_in21k")
    assert asked == {"vit_tiny_patch16_224.augreg_in21k": True}
    with pytest.raises(ValueError, match="timm:vit_smal: timm knows no model of this name"):
        weights.load(ours, "timm:vit_smal")
    assert torch.equal(ours.head.weight, theirs.head.weight)


class Hostile:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("name", ["evil.pth", "evil.ckpt", "evil.npz"])
def test_pickled_objects_are_refused_and_not_run(name: str, tmp_path: Path) -> None:
    evil, path = Hostile(tmp_path / "owned"), tmp_path / name
    if name.endswith("npz"):
        np.savez(path, cls=np.array([evil], dtype=object))
    else:
        torch.save({"model": {"cls_token": torch.zeros(1)}, "extra": evil}, path)
    with pytest.raises(ValueError, match="refused and nothing of it was run"):
        weights.load(our({}), path)
    assert not (tmp_path / "owned").exists()


def test_files_that_are_none(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no such file"):
        weights.read(tmp_path / "nothing.pth")
    (tmp_path / "broken.safetensors").write_bytes(b"garbage")
    with pytest.raises(ValueError, match="no safetensors file"):
        weights.read(tmp_path / "broken.safetensors")
    torch.save({"epoch": 3}, tmp_path / "empty.pth")
    with pytest.raises(ValueError, match="holds no tensors; it has epoch"):
        weights.read(tmp_path / "empty.pth")


def test_bfloat16_of_big_vision(tmp_path: Path) -> None:
    values = torch.randn(4, 3).bfloat16()
    raw = values.view(torch.int16).numpy().view("V2")
    np.savez(tmp_path / "half.npz", **{"head/kernel": raw})
    read = weights.read(tmp_path / "half.npz")["weights"]["head/kernel"]
    assert torch.equal(read, values.float())
