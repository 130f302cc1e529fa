"""`patchlight inspect` and `patchlight export`."""

from pathlib import Path

import numpy as np
import onnxruntime
import pytest
import safetensors.torch
import timm
import torch
import yaml

from callbacks.checkpoint_files import read_checkpoint
from experiments.checkpoints import build_method, export, inspect
from modules import weights
from modules.backbones import BlockStyle, Positions, ViT
from modules.supervised import Classifier
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
    assert arguments["num_heads"] == (3 if "qk norm" in family else "?")  # shapes do not tell
    arguments["num_heads"] = 3
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


@pytest.mark.parametrize(
    "positions",
    [
        Positions("learned1d", "every"),
        Positions("learned2d", "every"),
        Positions("learned2d", prefix_rows=False),
        Positions("relative"),
        Positions("relative", "every_shared"),
    ],
    ids=str,
)
def test_our_own_positions_are_told(positions: Positions, tmp_path: Path) -> None:
    network = small_network(positions=positions, image_size=48)
    torch.save(network.state_dict(), tmp_path / "ours.pth")
    found = describe(weights.read(tmp_path / "ours.pth")["weights"])
    again = our({**as_arguments(found.backbone), "num_heads": 3})
    weights.load(again, tmp_path / "ours.pth")
    images = torch.randn(2, 3, 48, 48)
    torch.testing.assert_close(again(images), network(images))


@pytest.mark.parametrize(
    "name",
    ["cait_xxs24_224", "beit_base_patch16_224", "vit_tiny_r_s16_p8_224", "eva02_tiny_patch14_224"],
)
def test_other_networks_are_no_vits(name: str) -> None:
    with torch.device("meta"):
        state = timm.create_model(name).state_dict()
    found = describe({key: torch.zeros(tensor.shape) for key, tensor in state.items()})
    assert found.backbone is None


def test_a_file_without_a_head_says_what_to_drop(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    state = weights.to_timm(ViT("Ti"))
    extra = {"mask_token": torch.zeros(1, 1, 8), "decoder_blocks.0.norm1.bias": torch.zeros(8)}
    torch.save({"model": {**state, **extra}}, tmp_path / "mae.pth")
    assert inspect([str(tmp_path / "mae.pth")]) == 0
    said = capsys.readouterr().out
    assert "names as MAE writes them" in said
    recipe = yaml.safe_load(said.split("fill in:\n")[1])["model"]["init_args"]
    assert recipe["num_classes"] == "?"
    network = Classifier(ViT("Ti"), 5)
    weights.load(network, tmp_path / "mae.pth", drop=recipe["weights_drop"])
    assert torch.equal(network.backbone.cls_token, state["cls_token"])


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
    recipe = yaml.safe_load(said.split("fill in:\n")[1].split("teacher:")[0])["model"]["init_args"]
    assert recipe["weights_part"] == "student"
    assert recipe["weights_drop"] == ["head"]
    assert recipe["backbone"]["init_args"] == {"variant": "Ti"}

    torch.save({"layer1.0.conv1.weight": torch.zeros(1)}, tmp_path / "resnet.pth")
    assert inspect([str(tmp_path / "resnet.pth")]) == 1
    assert "no ViT of this project: no loader fits it" in capsys.readouterr().out


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
        theirs = timm.create_model(
            "vit_tiny_patch16_224",
            **weights.timm_arguments(getattr(method, name)),
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
def test_a_run_of_ours_says_what_it_is(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert inspect([str(run / "checkpoints" / "last.ckpt")]) == 0
    said = capsys.readouterr().out
    recipe = yaml.safe_load(said.split("it is this:\n")[1].split("averaged:")[0])
    told = recipe["model"]["init_args"]["backbone"]["init_args"]
    config = yaml.safe_load((run / "config.yaml").read_text())
    assert told == config["model"]["init_args"]["backbone"]["init_args"]


@pytest.mark.slow
def test_a_run_that_began_with_weights_can_be_exported(tmp_path: Path) -> None:
    done = patchlight("fit", *TINY, "--trainer.max_epochs=1", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    first = only_run(tmp_path) / "checkpoints" / "last.ckpt"
    out = tmp_path / "first.safetensors"
    assert export(["--checkpoint", str(first), "--out", str(out)]) == 0
    other = tmp_path / "other"
    other.mkdir()
    begun = [f"--model.init_args.weights={out}", "--model.init_args.weights_drop=[head]"]
    begun.append("--trainer.max_epochs=1")
    done = patchlight("fit", *TINY, *begun, cwd=other)
    assert done.returncode == 0, done.stderr
    out.unlink()
    second = only_run(other) / "checkpoints" / "last.ckpt"
    assert export(["--checkpoint", str(second), "--out", str(tmp_path / "b.safetensors")]) == 0


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


PRETRAINING = {
    "MAE": {"decoder_dim": 16, "decoder_depth": 1, "decoder_heads": 2},
    "DINO": {"num_prototypes": 8, "hidden_dim": 8, "bottleneck_dim": 4},
    "MoCo": {"hidden_dim": 8, "projection_dim": 4, "freeze_patches": False},
}


@pytest.mark.parametrize("name", PRETRAINING)
def test_of_what_learned_without_labels_the_backbone_goes_out(name: str, tmp_path: Path) -> None:
    vit = {"variant": "mu", "patch_size": 4, "image_size": 16, "positions": {"kind": "sincos2d"}}
    backbone = {"class_path": "modules.backbones.ViT", "init_args": vit}
    model = {
        "class_path": f"modules.{name}",
        "init_args": {"backbone": backbone, **PRETRAINING[name]},
    }
    (tmp_path / "config.yaml").write_text(yaml.safe_dump({"model": model}), encoding="utf-8")
    method = build_method(tmp_path / "config.yaml")
    (tmp_path / "checkpoints").mkdir()
    checkpoint, out = tmp_path / "checkpoints" / "last.ckpt", tmp_path / "out.safetensors"
    torch.save({"state_dict": method.state_dict(), "global_step": 3}, checkpoint)
    assert export(["--checkpoint", str(checkpoint), "--out", str(out)]) == 0
    network = next(child for child in method.children() if hasattr(child, "backbone"))
    arguments = weights.timm_arguments(network.backbone)
    theirs = timm.create_model("vit_tiny_patch16_224", **arguments, checkpoint_path=str(out))
    images = torch.randn(3, 3, 16, 16)
    expected = network.backbone(images).pooled
    torch.testing.assert_close(theirs.eval()(images), expected, atol=1e-5, rtol=1e-5)
    if name == "MAE":  # the others go the same way
        graph = tmp_path / "out.onnx"
        assert export(["--checkpoint", str(checkpoint), "--out", str(graph)]) == 0
        (embeddings,) = onnxruntime.InferenceSession(graph).run(None, {"images": images.numpy()})
        torch.testing.assert_close(torch.tensor(embeddings), expected, atol=1e-5, rtol=1e-5)
