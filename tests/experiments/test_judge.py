"""Judging checkpoints of ours and of others, from the command line."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from sklearn.neighbors import KNeighborsClassifier

from datamodules.disk import cache_directory
from experiments import judge
from experiments.evaluations import evaluations
from experiments.subject import fingerprint, normalisation_of, open_subject
from modules.backbones import BlockStyle, NaViT, Positions, ViT
from modules.supervised import Classifier
from modules.weights import to_timm
from tests.datamodules.test_folder import write
from tests.runs import EXPERIMENTS, TINY, only_run, patchlight

DIGITS = EXPERIMENTS / "quickstart" / "supervised.yaml"


@pytest.fixture(autouse=True)
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PATCHLIGHT_CACHE", str(tmp_path / "cache"))


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("judged")
    done = patchlight("fit", *TINY, cwd=directory)
    assert done.returncode == 0, done.stderr
    return only_run(directory)


def images(root: Path, count: int = 12, side: int = 40) -> Path:
    """Two classes for each split."""
    for split in ("train", "val"):
        for i in range(count):
            write(root / split / "ab"[i % 2] / f"{i}.png", i % 2, size=(side, side))
    return root


def test_a_run_is_judged_on_its_own_data_and_keeps_the_result(
    run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    checkpoint = str(run / "checkpoints" / "last.ckpt")
    assert judge.knn(["--checkpoint", checkpoint, "--k", "1,3", "--device", "cpu"]) == 0
    said = capsys.readouterr().out
    assert "knn of" in said
    assert "23 training and 7 held-out images" in said
    assert judge.fewshot(["-c", checkpoint, "--shots", "1", "--seeds", "2"]) == 0
    found = evaluations(run)
    assert set(found) == {"knn", "fewshot"}
    assert found["knn"]["main"] == "top1 k=1"
    assert set(found["knn"]["values"]) == {"top1 k=1", "top5 k=1", "top1 k=3", "top5 k=3"}
    assert found["knn"]["network"] == "classifier"
    assert found["knn"]["values"]["top1 k=1"] * 7 == pytest.approx(
        round(found["knn"]["values"]["top1 k=1"] * 7)
    )
    assert found["fewshot"]["main"] == "1-shot"
    # Of something else: beside it, not in its place.
    assert judge.knn(["-c", checkpoint, "--k", "1", "--max-train", "9"]) == 0
    (other,) = set(evaluations(run)) - set(found)
    assert other.startswith("knn.")
    assert evaluations(run)["knn"] == found["knn"]
    before = found["knn"]["fingerprint"]
    assert judge.knn(["-c", checkpoint, "--network", "averaged", "--k", "1"]) == 0
    assert evaluations(run)["knn"]["network"] == "averaged"
    assert evaluations(run)["knn"]["fingerprint"] != before


def test_k_nn_equals_scikit_learns(capsys: pytest.CaptureFixture[str]) -> None:
    """With a temperature so high that every neighbour counts alike."""
    arguments = ["-c", "random", "--config", str(DIGITS), "--k", "1", "--temperature", "1e6"]
    assert judge.knn(arguments) == 0
    said = capsys.readouterr().out
    parser = judge.make_parser("knn", "")
    judge.with_training(parser)
    judged = judge.Judged(parser.parse_args(["-c", "random", "--config", str(DIGITS)]), [])
    sides = [
        np.array(f.features / f.features.norm(dim=1, keepdim=True))
        for f in (judged.train, judged.val)
    ]
    theirs = KNeighborsClassifier(1, algorithm="brute").fit(sides[0], judged.train.labels)
    expected = theirs.score(sides[1], judged.val.labels)
    (line,) = (line for line in said.splitlines() if line.startswith("│ 1 "))
    assert float(line.split("│")[2].rstrip(" %")) / 100 == pytest.approx(expected, abs=3 / 360)
    assert 0.2 < expected < 0.9


def test_the_second_time_nothing_is_computed(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["-c", "random", "--config", str(DIGITS), "--k", "5"]
    judge.knn(arguments)
    first = capsys.readouterr().out
    kept = sorted(cache_directory("features").iterdir())
    assert len(kept) == 2
    assert all((directory / "features.npy").is_file() for directory in kept)

    def fail(self: object, images: object) -> None:
        raise AssertionError("computed again")

    monkeypatch.setattr(ViT, "forward", fail)
    judge.knn(arguments)
    assert capsys.readouterr().out == first
    judge.fewshot(["-c", "random", "--config", str(DIGITS), "--shots", "1", "--seeds", "1"])
    judge.knn([*arguments, "--data.init_args.batch_size", "7"])
    for change in (
        ["--data.init_args.eval_crop", "0.8"],
        ["--data.init_args.mean", "[0.4]"],
        ["--max-train", "100"],
    ):
        with pytest.raises(AssertionError, match="computed again"):
            judge.knn([*arguments, *change])


def test_other_weights_have_other_features() -> None:
    one = open_subject("random", None, DIGITS)
    again = open_subject("random", None, DIGITS)
    assert one.fingerprint == again.fingerprint
    with torch.no_grad():
        again.backbone.blocks[0].mlp.fc1.bias[0] += 1e-6  # type: ignore[index, union-attr]
    assert fingerprint(again.backbone) != one.fingerprint
    torch.manual_seed(0)
    pair = [ViT("mu", pooling="norm_avg", image_size=32), ViT("mu", image_size=32)]
    pair[1].load_state_dict(pair[0].state_dict())
    assert fingerprint(pair[0]) != fingerprint(pair[1])


@pytest.mark.parametrize(
    "changes",
    [
        *({"num_heads": 4}, {"pooling": "norm_avg"}, {"positions": Positions(kind="sincos2d")}),
        *({"block": BlockStyle(**b)} for b in ({"mlp": "gelu_tanh"}, {"norm_eps": 1e-5})),
        {"block": BlockStyle(residual_scale=2.0)},
    ],
    ids=str,
)
def test_what_leaves_no_trace_in_weights_is_in_the_fingerprint(changes: dict[str, Any]) -> None:
    plain = {"variant": "mu", "image_size": 32, "positions": Positions(kind="sincos2d_big_vision")}
    one, other = ViT(**plain), ViT(**plain | changes)
    other.load_state_dict(one.state_dict())
    assert fingerprint(one) == fingerprint(one)
    assert fingerprint(one) != fingerprint(other)


def test_a_checkpoint_that_was_moved_keeps_its_architecture(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    backbone = ViT("mu", patch_size=8, image_size=16, in_channels=1, pooling="norm_avg")
    given = {"class_path": "modules.backbones.ViT", "init_args": {"variant": "mu", "patch_size": 8}}
    given["init_args"] |= {"image_size": 16, "in_channels": 1, "pooling": "norm_avg"}
    state = {f"classifier.{k}": v for k, v in Classifier(backbone, 10).state_dict().items()}
    content = {"state_dict": state, "hyper_parameters": {"backbone": given}}
    torch.save(content | {"pytorch-lightning_version": "2.6.6", "global_step": 1}, "moved.ckpt")
    subject = open_subject("moved.ckpt", None, None)
    x = torch.randn(2, 1, 16, 16)
    torch.testing.assert_close(subject.backbone(x).pooled, backbone.eval()(x).pooled)
    assert capsys.readouterr().err == ""


def test_what_images_are_normalised_by(tmp_path: Path) -> None:
    save_file(to_timm(Classifier(ViT("mu", image_size=32), 5)), "vit.safetensors")
    subject = open_subject("vit.safetensors", None, None)
    recipe = {"model": {}, "data": {"class_path": judge.IMAGES, "init_args": {"mean": [0.4] * 3}}}
    Path("r.yaml").write_text(json.dumps(recipe))
    told = judge.data_section(subject, "r.yaml")["init_args"]
    assert (told["mean"], told["std"]) == ([0.4] * 3, [0.229, 0.224, 0.225])
    own = open_subject("random", None, DIGITS)
    assert judge.data_section(own, "r.yaml")["init_args"]["mean"] == [0.5]
    assert judge.data_section(own, "https://host/data")["init_args"]["source"] == "shards"
    assert normalisation_of("x.npz") == ((0.5,) * 3, (0.5,) * 3)
    known = normalisation_of("timm:vit_small_patch16_224.augreg_in21k")
    assert known is not None
    assert tuple(known[0]) == (0.5, 0.5, 0.5)


def test_a_replaced_image_is_noticed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root = images(tmp_path / "pets")
    network = Classifier(ViT("mu", image_size=32), 5)
    save_file(to_timm(network), tmp_path / "vit.safetensors")
    arguments = ["-c", "vit.safetensors", "--data", str(root), "--k", "1"]
    assert judge.knn(arguments) == 0
    features = cache_directory("features")
    assert len(list(features.iterdir())) == 2
    write(root / "val" / "a" / "0.png", 77, size=(40, 40))
    assert judge.knn(arguments) == 0
    assert len(list(features.iterdir())) == 3
    assert "kept in" not in capsys.readouterr().out  # a file of no run has no place for it


def test_files_of_others_tell_what_they_are(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root = images(tmp_path / "pets")
    for number, backbone in enumerate(
        (
            ViT("mu", image_size=32, class_token=False, pooling="avg", num_heads=2),
            ViT("mu", image_size=32, num_registers=3),
            ViT("mu", image_size=32, patch_size=8, pooling="map"),
            ViT("mu", image_size=32, distillation_token=True),
        )
    ):
        file = f"{number}.safetensors"
        save_file(to_timm(Classifier(backbone, 3)), file)
        assert judge.knn(["-c", file, "--data", str(root), "--k", "1"]) == 0
        assert "2" in capsys.readouterr().out
        subject = open_subject(file, None, None)
        x = torch.randn(2, 3, 32, 32)
        torch.testing.assert_close(subject.backbone(x).pooled, backbone.eval()(x).pooled)
    assert (subject.mean[0], subject.run, subject.data) == (0.485, None, None)
    with pytest.raises(ValueError, match="of no run that knows its data; name a recipe"):
        judge.knn(["-c", file])


def test_several_networks_in_a_file(tmp_path: Path) -> None:
    torch.manual_seed(0)
    student, teacher = (Classifier(ViT("mu", image_size=32), 3) for _ in range(2))
    parts = {
        name: {f"module.backbone.{k}": v for k, v in to_timm(network).items()}
        | {"module.head.mlp.0.weight": torch.ones(2, 2)}
        for name, network in (("student", student), ("teacher", teacher))
    }
    torch.save(parts, "dino.pth")
    chosen = open_subject("dino.pth", None, None)
    assert chosen.network == "teacher"
    x = torch.randn(1, 3, 32, 32)
    torch.testing.assert_close(chosen.backbone(x).pooled, teacher.eval().backbone(x).pooled)
    other = open_subject("dino.pth", "student", None)
    torch.testing.assert_close(other.backbone(x).pooled, student.eval().backbone(x).pooled)
    with pytest.raises(ValueError, match="no network 'teachers'; it has student, teacher"):
        open_subject("dino.pth", "teachers", None)


def test_packs_of_any_size(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A NaViT on packs embeds every image as it does alone, in the source's order."""
    recipe = EXPERIMENTS / "quickstart" / "navit.yaml"
    small = ["--data.init_args.source_args", "{num_train: 30, num_val: 9, max_side: 80}"]
    small += ["--data.init_args.num_workers", "0"]
    arguments = ["-c", "random", "--config", str(recipe), "--k", "3"]
    assert judge.knn([*arguments, *small]) == 0
    assert "30 training and 9 held-out images" in capsys.readouterr().out
    parser = judge.make_parser("knn", "")
    judge.with_training(parser)
    judged = judge.Judged(parser.parse_args(arguments[:4]), small)
    assert isinstance(judged.subject.backbone, NaViT)
    source = judged.data.train_source
    assert judged.train.labels.tolist() == [source[i].label for i in range(len(source))]


def test_what_is_refused(tmp_path: Path) -> None:
    cases = (
        (["-c", "random"], "random needs --config RECIPE"),
        (["-c", "random", "--config", "x.yaml"], "x.yaml: no such file"),
        (["-c", "nothing.pth"], "nothing.pth: no such file"),
        (["-c", "random", "--config", "broken.yaml"], "--config broken.yaml is no YAML file"),
        (["-c", "random", "--config", "bare.yaml"], "random needs --config RECIPE"),
        (["-c", "random", "--config", str(DIGITS), "--device", "gpu"], "--device gpu cannot be"),
        (["-c", "random", "--config", str(DIGITS), "--k", "a"], "--k 'a': expected numbers"),
        (["-c", "random", "--config", str(DIGITS), "--max-train", "0"], "--max-train is 0"),
        (
            ["-c", "random", "--config", str(DIGITS), "--data", "x.yaml"],
            "--data x.yaml: no such file",
        ),
        (["-c", "random", "--config", str(DIGITS), "--nonsense", "1"], "nonsense"),
    )
    Path("broken.yaml").write_text("a: [1")
    Path("bare.yaml").write_text("model:\n  init_args:\n")
    for arguments, message in cases:
        with pytest.raises(ValueError, match=message):
            judge.knn(arguments)
    Path("old.yaml").write_text(DIGITS.read_text().replace("patch_size: 4", "patch_sides: 4"))
    with pytest.raises(ValueError, match=r"(?s)ViT of the config cannot be built: .*patch_sides"):
        judge.knn(["-c", "random", "--config", "old.yaml"])
    torch.save({"weights": {"a": torch.ones(2), "b": torch.ones(2)}}, "odd.pth")
    with pytest.raises(ValueError, match="holds no ViT that names and shapes tell"):
        judge.knn(["-c", "odd.pth"])
    unlabelled = tmp_path / "flat"
    for i in range(40):
        write(unlabelled / f"{i}.png", i, size=(32, 32))
    save_file(to_timm(Classifier(ViT("mu", image_size=32), 5)), "vit.safetensors")
    with pytest.raises(ValueError, match="has no labels, and judging features needs them"):
        judge.knn(["-c", "vit.safetensors", "--data", str(unlabelled)])


def test_a_broken_image_is_left_out(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root = images(tmp_path / "pets")
    (root / "train" / "a" / "0.png").write_bytes(b"garbage")
    save_file(to_timm(Classifier(ViT("mu", image_size=32), 5)), "vit.safetensors")
    assert judge.knn(["-c", "vit.safetensors", "--data", str(root), "--k", "1"]) == 0
    said = capsys.readouterr()
    assert "11 training and 12 held-out images" in said.out
    assert "1 images of train could not be read: left out" in said.err


def test_evaluations_that_are_no_measurement_are_left_out(tmp_path: Path) -> None:
    (tmp_path / "evaluations").mkdir()
    (tmp_path / "evaluations" / "knn.json").write_text("{")
    (tmp_path / "evaluations" / "fewshot.json").write_text(json.dumps({"values": {}}))
    assert evaluations(tmp_path) == {}
