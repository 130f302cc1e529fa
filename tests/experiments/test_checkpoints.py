"""`patchlight inspect` and `patchlight export`."""

from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
import safetensors.torch
import timm
import torch
import yaml

from callbacks.checkpoint import read_checkpoint
from experiments.checkpoints import build_method, export, inspect
from modules import weights
from modules.backbones import BlockStyle, Positions, ViT
from modules.weights.inspect import describe
from tests.modules.test_weights import (
    FAMILIES,
    LAYOUTS,
    google_arrays,
    our,
    small_network,
    their,
)
from tests.runs import TINY, only_run, patchlight


def as_arguments(found: dict) -> dict:
    """What `inspect` prints, as ViT takes it."""
    dataclasses = {"positions": Positions, "block": BlockStyle}
    return {k: dataclasses[k](**v) if k in dataclasses else v for k, v in found.items()}


@pytest.mark.parametrize("family", FAMILIES)
def test_what_inspect_says_loads_strictly(family: str, tmp_path: Path) -> None:
    name, theirs_args, _ = FAMILIES[family]
    theirs = their(name, theirs_args)
    torch.save(theirs.state_dict(), tmp_path / "theirs.pth")
    found = describe(weights.read(tmp_path / "theirs.pth")["weights"])
    assert found.num_classes == 5
    assert found.others == ()
    assert found.num_parameters == sum(p.numel() for p in theirs.state_dict().values())
    arguments = as_arguments(found.backbone)
    if "qk norm" not in family:
        arguments["num_heads"] = 3  # 48 / 64 is no number of heads, and shapes do not tell
    ours = our(arguments)
    weights.load(ours, tmp_path / "theirs.pth")
    if "so400m" in family:
        return  # its activation leaves no trace
    images = torch.randn(2, 3, *ours.backbone.image_size)
    torch.testing.assert_close(ours(images), theirs(images), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_googles_files_tell_their_heads(layout: str, tmp_path: Path) -> None:
    arguments, big_vision, prefix = LAYOUTS[layout]
    written = small_network(**arguments)
    arrays = google_arrays(written, big_vision)
    path = tmp_path / "google.npz"
    np.savez(path, **{prefix + name: array for name, array in arrays.items()})
    found = describe(weights.read(path)["weights"])
    assert found.writer == "Google (npz)"
    ours = our(as_arguments(found.backbone))
    weights.load(ours, path)
    images = torch.randn(2, 3, 32, 32)
    torch.testing.assert_close(ours(images), written(images), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("kind", ["learned1d", "learned2d", "relative", "sincos2d"])
def test_our_own_positions_are_told(kind: Any, tmp_path: Path) -> None:
    network = small_network(positions=Positions(kind, None if kind == "sincos2d" else "every"))
    torch.save(network.state_dict(), tmp_path / "ours.pth")
    found = describe(weights.read(tmp_path / "ours.pth")["weights"])
    told = found.backbone["positions"]["kind"]
    assert told == ("none" if kind == "sincos2d" else kind)  # what is computed leaves no trace


def test_published_sizes_have_their_names() -> None:
    for variant in ("Ti", "S", "B"):
        found = describe(weights.to_timm(ViT(variant)))
        assert found.backbone == {"variant": variant}
    sincos = describe(weights.to_timm(ViT("S", positions=Positions("sincos2d"))))
    assert sincos.backbone == {"variant": "S", "positions": {"kind": "sincos2d"}}


def test_inspect_tells_networks_heads_and_left_overs(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    state = weights.to_timm(ViT("Ti"))
    both = {name: {**state, "head.mlp.0.weight": torch.zeros(1)} for name in ("student", "teacher")}
    torch.save(both, tmp_path / "dino.pth")
    assert inspect([str(tmp_path / "dino.pth")]) == 0
    said = capsys.readouterr().out
    assert "teacher: 151 tensors" in said
    assert "names as DINO writes them" in said
    recipe = yaml.safe_load(said.split("epsilon):\n")[1].split("student:")[0])["model"]["init_args"]
    assert recipe["weights_part"] == "teacher"
    assert recipe["weights_drop"] == ["head"]
    assert recipe["backbone"]["init_args"] == {"variant": "Ti"}

    torch.save({"layer1.0.conv1.weight": torch.zeros(1)}, tmp_path / "resnet.pth")
    assert inspect([str(tmp_path / "resnet.pth")]) == 1
    assert "no ViT: no loader of this project fits it" in capsys.readouterr().out


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("run")
    done = patchlight("fit", *TINY, "--trainer.max_epochs=1", cwd=directory)
    assert done.returncode == 0, done.stderr
    return only_run(directory)


@pytest.mark.slow
def test_a_trained_network_goes_to_timm(run: Path, tmp_path: Path) -> None:
    checkpoint = run / "checkpoints" / "last.ckpt"
    images = torch.randn(3, 1, 16, 16)
    method = build_method(run / "config.yaml")
    method.load_state_dict(read_checkpoint(checkpoint)["state_dict"])
    outputs = []
    for name in ("classifier", "averaged"):
        out = tmp_path / f"{name}.safetensors"
        assert export(["--checkpoint", str(checkpoint), "--network", name, "--out", str(out)]) == 0
        size = {"embed_dim": 32, "depth": 2, "num_heads": 2, "mlp_ratio": 4, "patch_size": 4}
        theirs = timm.create_model(
            "vit_tiny_patch16_224",
            **size,
            **{"img_size": 16, "in_chans": 1, "num_classes": 10},
            **{"global_pool": "avg", "class_token": False},
            checkpoint_path=str(out),
        )
        expected = getattr(method, name)(images)
        torch.testing.assert_close(theirs.eval()(images), expected, atol=1e-5, rtol=1e-5)
        outputs.append(expected)
    assert not torch.equal(*outputs)
    with pytest.raises(ValueError, match="no network 'teacher'; it has classifier, averaged"):
        export(["--checkpoint", str(checkpoint), "--network", "teacher", "--out", str(out)])
    assert not list(tmp_path.glob(".*"))


@pytest.mark.slow
def test_a_trained_network_goes_to_onnx(run: Path, tmp_path: Path) -> None:
    out = tmp_path / "network.onnx"
    checkpoint = run / "checkpoints" / "best.ckpt"
    assert export(["--checkpoint", str(checkpoint), "--out", str(out)]) == 0
    method = build_method(run / "config.yaml")
    method.load_state_dict(read_checkpoint(checkpoint)["state_dict"])
    images = torch.randn(5, 1, 16, 16)  # another batch than the one it was traced with
    (logits,) = onnxruntime.InferenceSession(out).run(None, {"images": images.numpy()})
    torch.testing.assert_close(torch.tensor(logits), method(images), atol=1e-5, rtol=1e-5)


def test_export_says_what_is_wrong(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"should end in \.safetensors or \.onnx"):
        export(["--checkpoint", "x.ckpt", "--out", str(tmp_path / "x.bin")])
    safetensors.torch.save_file({"a": torch.zeros(1)}, tmp_path / "a.safetensors")
    torch.save({"state_dict": {}, "global_step": 0}, tmp_path / "a.ckpt")
    with pytest.raises(ValueError, match=r"config\.yaml: no such file; name the run's"):
        export(["--checkpoint", str(tmp_path / "a.ckpt"), "--out", str(tmp_path / "x.onnx")])
