"""Every recipe under `experiments/` runs: a new file is tested without a word here."""

import math
import re
import sys
from pathlib import Path

import pytest
import timm
import torch
import yaml

from callbacks.checkpoint_files import read_checkpoint
from datamodules.sources import open_source
from experiments import cli
from experiments.resume import begin
from modules.backbones import ViT
from tests.label_maps import write_maps
from tests.runs import EXPERIMENTS, RECIPES, differences, only_run


def fit(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> cli.PatchlightCLI:
    """What `patchlight fit` leaves behind, in this process."""
    start = begin(["fit", *arguments])
    monkeypatch.setattr(sys, "argv", ["patchlight", *start.arguments])
    return cli.PatchlightCLI(start)


def teacher(recipe: Path, directory: Path) -> list[str]:
    """Weights are for the user to name where a recipe has a teacher; here a small one with any."""
    method = yaml.safe_load(recipe.read_text(encoding="utf-8"))["model"]["init_args"]
    if "distillation" not in method:
        return []
    name, weights = "test_resnet.r160_in1k", directory / "teacher.pth"
    torch.save(timm.create_model(name, num_classes=method["num_classes"]).state_dict(), weights)
    start = "--model.init_args.distillation"
    return [f"{start}.teacher={name}", f"{start}.weights={weights}"]


def weights(recipe: Path, directory: Path) -> list[str]:
    """A recipe whose backbone is that of a checkpoint gets one with the overlay's size."""
    content = yaml.safe_load(recipe.read_text(encoding="utf-8"))
    if "class_path" in content["model"]["init_args"].get("backbone", {}):
        return []
    if content["data"]["class_path"] == "datamodules.TextDataModule":
        return []
    vit = ViT("mu", depth=4, in_channels=content["data"]["init_args"].get("channels", 3))
    torch.save(vit.state_dict(), directory / "weights.pth")
    return ["--weights", str(directory / "weights.pth")]


def labels(recipe: Path, directory: Path) -> list[str]:
    """Label maps of the overlay's images, where a recipe learns from them."""
    content = yaml.safe_load(recipe.read_text(encoding="utf-8"))
    if "labels" not in content["data"]["init_args"]:
        return []
    scenes = yaml.safe_load(overlay_of(recipe).read_text(encoding="utf-8"))["data"]["init_args"]
    source = open_source("shapes", "train", None, channels=3, **scenes["source_args"])
    classes = content["model"]["init_args"]["num_classes"]
    write_maps(directory / "maps", source, num_classes=classes)
    return [f"--data.init_args.labels={directory / 'maps'}"]


def smoke_for(recipe: Path, directory: Path) -> Path:
    """The overlay that makes a recipe small: that of its method, its data, or of all others.

    A network of timm's becomes timm's miniature of its family in the place of the toy ViT.
    """
    overlay = overlay_of(recipe)
    content = yaml.safe_load(recipe.read_text(encoding="utf-8"))
    backbone = content["model"]["init_args"].get("backbone", {})
    if backbone.get("class_path") != "modules.backbones.Timm":
        return overlay
    small, name = yaml.safe_load(overlay.read_text(encoding="utf-8")), backbone["init_args"]["name"]
    (toy,) = (m for m in timm.list_models("test_*") if re.match(rf"{m[5:]}(\d{{2}}|_)", name))
    small["model"]["init_args"]["backbone"]["init_args"] = {"name": toy}
    (directory / "smoke.yaml").write_text(yaml.safe_dump(small), encoding="utf-8")
    return directory / "smoke.yaml"


def overlay_of(recipe: Path) -> Path:
    if (beside := recipe.parent / "smoke.yaml").is_file() and recipe.parent != EXPERIMENTS:
        return beside
    content = yaml.safe_load(recipe.read_text(encoding="utf-8"))
    own = {"modules.MoCo": "moco", "modules.DINO": "dino", "modules.MAE": "mae"}
    own |= {"datamodules.PackedDataModule": "navit", "datamodules.TextDataModule": "sequence"}
    for part in ("model", "data"):
        if (name := content[part]["class_path"]) in own:
            return EXPERIMENTS / own[name] / "smoke.yaml"
    return EXPERIMENTS / "smoke.yaml"


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda p: p.relative_to(EXPERIMENTS).as_posix())
def test_recipe(recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    quiet = "--trainer.enable_progress_bar=false"
    smoke = ["--config", str(recipe), "--config", str(smoke_for(recipe, tmp_path)), quiet]
    smoke += [*teacher(recipe, tmp_path), *weights(recipe, tmp_path), *labels(recipe, tmp_path)]
    first = fit(monkeypatch, *smoke, "--trainer.max_steps=1")
    assert first.trainer.global_step == 1
    run = only_run(tmp_path)
    assert run.parent.name == recipe.stem

    second = fit(monkeypatch, "--resume", str(run), "--trainer.max_steps=2")
    assert second.trainer.global_step == 2
    assert only_run(tmp_path) == run
    assert yaml.safe_load((run / "config.yaml").read_text())["ckpt_path"] is None
    assert math.isfinite(second.trainer.callback_metrics["train/loss"])
    for name, parameter in second.model.named_parameters():
        if parameter.requires_grad:
            assert parameter.grad is not None, f"{name} got no gradient"
            assert torch.isfinite(parameter.grad).all(), name

    last = run / "checkpoints" / "last.ckpt"
    saved = read_checkpoint(last)["state_dict"]
    assert differences(dict(second.model.state_dict()), saved) == []
    again = type(second.model).load_from_checkpoint(last, weights_only=True)
    assert differences(dict(again.state_dict()), saved) == []


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda p: p.relative_to(EXPERIMENTS).as_posix())
def test_recipe_says_what_it_is_for_and_how_to_run_it(recipe: Path) -> None:
    head = recipe.read_text(encoding="utf-8").split("model:")[0]
    assert f"patchlight fit --config {recipe.relative_to(EXPERIMENTS.parent).as_posix()}" in head
    assert "Expected:" in head or "not yet reproduced" in head


def test_a_teacher_without_weights_stops_before_the_first_step(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    recipe = EXPERIMENTS / "supervised" / "deit_s16_distilled.yaml"
    smoke = ["--config", str(recipe), "--config", str(EXPERIMENTS / "smoke.yaml")]
    with pytest.raises(ValueError, match=r"regnety_160.deit_in1k has no weights.*'pretrained'"):
        fit(monkeypatch, *smoke)
    assert not list(tmp_path.rglob("*.ckpt"))
