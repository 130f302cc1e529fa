"""`patchlight backbones`: the list is true, complete and made without weights or a network."""

import inspect
from typing import Any

import pytest
import timm
import torch

from experiments.backbones import PRESETS, Preset, backbones, timms
from modules.backbones import FAMILIES, create
from modules.backbones.pyramid import Pyramid
from modules.weights.names import with_our_names
from modules.weights.pyramids import with_pyramid_names


def lines(capsys: pytest.CaptureFixture[str]) -> list[list[str]]:
    text = capsys.readouterr().out
    rows = [line.strip("│").split("│") for line in text.splitlines() if line.startswith("│")]
    return [[cell.strip() for cell in row] for row in rows]


@pytest.fixture(autouse=True)
def wide(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "300")


def test_a_family(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setitem(PRESETS, "hybrid", PRESETS["hybrid"][:2])
    assert backbones(["hybrid"]) == 0
    toy, tiny = lines(capsys)
    assert toy[:2] == ["Hybrid", "{variant: mu}"]
    assert tiny[:2] == ["Hybrid", "{variant: R+Ti/16}"]
    assert tiny[2:6] == ["6,144,704", "0.43 G", "224x224", "7x7"]
    assert tiny[6].startswith("timm:vit_tiny_r_s16_p8_224 (augreg_in21k, augreg_in21k_ft_in1k)")
    assert toy[6] == ""


def test_networks_of_timms(capsys: pytest.CaptureFixture[str]) -> None:
    assert backbones(["timm:test_*net", "--limit", "2"]) == 0
    out = capsys.readouterr().out
    count = len(timm.list_models("test_*net"))
    assert f"the first 2 of {count}; --limit shows more" in out
    names = sorted(timm.list_models("test_*net"))[:2]
    assert all(f"{{name: {name}}}" in out for name in names)


def test_all_of_them(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    for family in PRESETS:
        monkeypatch.setitem(PRESETS, family, PRESETS[family][:1])
    assert backbones([]) == 0
    text = capsys.readouterr().out
    assert all(FAMILIES[family].__name__ in text for family in PRESETS)
    assert f"{len(timm.list_models()):,} networks of timm's" in text


def test_what_cannot_be_built_says_so(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(PRESETS, "vit", [Preset({"variant": "XS"})])
    assert backbones(["vit"]) == 0
    assert "unknown ViT variant 'XS'" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("what", "says"),
    [
        (["swinn"], r"no family 'swinn'; there is vit, navit, .*, timm:PATTERN"),
        (["timm:nothing_*"], r"timm:nothing_\* is no network of timm's"),
        (["timm"], "or a pattern, such as"),
        (["vit", "--limit", "0"], "--limit is 0; expected at least 1"),
    ],
)
def test_errors(what: list[str], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        backbones(what)


def test_every_family_has_presets_with_arguments_of_its_own() -> None:
    assert {*PRESETS, "timm"} == set(FAMILIES)
    for family, presets in PRESETS.items():
        known = set(inspect.signature(FAMILIES[family]).parameters)
        assert all(set(preset.arguments) <= known for preset in presets), family
        assert any(preset.arguments.get("variant", "mu") == "mu" for preset in presets)


# Of small ones: names and shapes of larger ones are built alike.
LOADED = [("vit", "Ti", 16), ("hybrid", "R+Ti/16", None), ("swin", "T", None)]
LOADED += [("twins_svt", "S", None), ("twins_pcpvt", "S", None)]


@pytest.mark.parametrize(("family", "variant", "patch"), LOADED)
def test_weights_fill_what_they_are_named_for(family: str, variant: str, patch: Any) -> None:
    (preset,) = (
        preset
        for preset in PRESETS[family]
        if preset.arguments["variant"] == variant and preset.arguments.get("patch_size") == patch
    )
    with torch.device("meta"):
        backbone = create(family, **preset.arguments)
        own = {k: t.shape for k, t in backbone.state_dict().items()}
        for name in preset.timm:
            state = timm.create_model(name, num_classes=0).state_dict()
            if isinstance(backbone, Pyramid):
                theirs, *_ = with_pyramid_names(state, backbone)
            else:
                theirs, _ = with_our_names(state)
            assert {k: t.shape for k, t in theirs.items()} == own
            assert timms(name).startswith(f"timm:{name} (")


def test_a_network_without_weights_names_none() -> None:
    assert timms("vit_base_r26_s32_224") == ""
    assert timms("vit_base_patch16_224").endswith(" and 7 more)")
