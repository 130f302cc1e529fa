"""Every command of the README works as it stands there."""

import json
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from modules.backbones import ViT
from modules.supervised import Classifier
from modules.weights import to_timm
from tests.datamodules.test_folder import tree
from tests.datamodules.test_sources import fashion
from tests.runs import ROOT, patchlight

README = (ROOT / "README.md").read_text(encoding="utf-8")
COMMANDS = re.findall(r"```bash\n(.*?)```", README, re.S)
QUICK = ["--trainer.enable_progress_bar=false", "--trainer.max_epochs=1"]
SHORT = ["--trainer.limit_train_batches=2", "--trainer.limit_val_batches=1"]


def command(start: str) -> list[str]:
    """The arguments of the one README command that starts like this."""
    (found,) = (line.strip() for line in COMMANDS if line.startswith(start))
    return shlex.split(found.removeprefix("patchlight "))


def test_it_opens_with_the_two_lines() -> None:
    assert [line.strip() for line in COMMANDS[:2]] == [
        "pip install -e . && patchlight fit --config experiments/quickstart/supervised.yaml",
        "pip install -e '.[dev]' && pytest",  # this very command; .ci/run runs both
    ]
    ci = (ROOT / ".ci" / "run").read_text(encoding="utf-8")
    assert "grep -m1 '^pip install -e \\. &&' README.md" in ci


def test_every_link_leads_somewhere_and_no_figure_is_missing() -> None:
    for target in re.findall(r"\]\(([^)#]+)\)", README):
        assert target.startswith("https://") or (ROOT / target).exists(), target
    assert not re.search(r"[A-Z]+_[A-Z]+", README.replace("PATCHLIGHT_CACHE", ""))


def test_nothing_is_left_out_here() -> None:
    tested = ("pip", "mkdir -p data/Fashion", "patchlight check-data", "patchlight validate")
    tested += ("patchlight inspect", "patchlight export", "patchlight sweep")
    tested += ("patchlight resolutions", "patchlight knn", "patchlight fewshot", "patchlight look")
    tested += ("patchlight compare", "patchlight jaccard", "patchlight backbones")
    tested += ("patchlight relabel", "patchlight plan", "patchlight shard")
    tested += ("patchlight translate",)
    for line in COMMANDS:
        assert line.startswith((*tested, "patchlight fit --resume", "patchlight fit --config"))


@pytest.mark.slow
def test_train_resume_and_validate(tmp_path: Path) -> None:
    (tmp_path / "experiments").symlink_to(ROOT / "experiments")
    first = patchlight(
        *command("patchlight fit --config experiments/quickstart/supervised.yaml --model"),
        *SHORT,
        cwd=tmp_path,
    )
    assert first.returncode == 0, first.stderr
    for start in ("patchlight fit --resume", "patchlight validate"):
        done = patchlight(*command(start), *SHORT[1:], cwd=tmp_path)
        assert done.returncode == 0, done.stderr
    assert "val/accuracy" in done.stdout
    done = patchlight(*command("patchlight export"), cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "vit.safetensors").is_file()
    done = patchlight(
        *command("patchlight sweep --config experiments/quickstart/supervised"),
        *SHORT,
        QUICK[1],
        cwd=tmp_path,
    )
    assert done.returncode == 0, done.stderr
    table = tmp_path / "runs" / "sweep" / "supervised" / "table.md"
    assert [line.split(" | ")[0] for line in table.open()][2:] == ["| none", "| sincos2d"]


@pytest.mark.slow
def test_judging_looking_inside_and_comparing(tmp_path: Path) -> None:
    (tmp_path / "experiments").symlink_to(ROOT / "experiments")
    tree(tmp_path / "my_images")
    start = "patchlight fit --config experiments/quickstart/supervised.yaml --trainer.callbacks"
    done = patchlight(*command(start), *QUICK, *SHORT, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    run = tmp_path / "runs" / "quickstart" / "supervised" / "version_0"
    metrics = json.loads((run / "result.json").read_text())["metrics"]
    assert {"val/knn_top1", "val/probe_accuracy"} <= set(metrics)
    for start in ("patchlight knn", "patchlight fewshot", "patchlight look"):
        done = patchlight(*command(start), cwd=tmp_path)
        assert done.returncode == 0, done.stderr
    assert {file.stem for file in (run / "evaluations").iterdir()} == {"knn", "fewshot"}
    assert len(list((run / "pictures").glob("*.png"))) >= 6
    linear = command("patchlight fit --config experiments/quickstart/linear")
    done = patchlight(*linear, *SHORT, QUICK[0], cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    done = patchlight(*command("patchlight compare"), cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    (row,) = (
        line
        for line in (tmp_path / "runs" / "compare.md").read_text().splitlines()
        if "version_0" in line and line.startswith("|")
    )
    knn = json.loads((run / "evaluations" / "knn.json").read_text())["values"]["top1 k=20"]
    assert f"{100 * knn:.2f}" in row
    assert row.count("—") <= 2, row  # fine-tune, and images/s of so short a run
    assert "<svg" in (tmp_path / "runs" / "compare.html").read_text()


@pytest.mark.slow
def test_without_labels(tmp_path: Path) -> None:
    (tmp_path / "experiments").symlink_to(ROOT / "experiments")
    tree(tmp_path / "my_images")
    few = "--data.init_args.source_args={num_train: 8, num_val: 6}"
    small = ["--data.init_args.num_workers=0", "--data.init_args.batch_size=4", *QUICK, *SHORT]
    fit = command("patchlight fit --config experiments/quickstart/mae")
    done = patchlight(*fit, *small, few, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    own = command("patchlight fit --config experiments/mae/small_vit_ti8")
    toy = "--model.init_args.backbone.init_args.variant=mu"
    done = patchlight(*own, *small, toy, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    done = patchlight(*command("patchlight jaccard"), few, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "best head of each image" in done.stdout


@pytest.mark.slow
def test_a_label_for_every_token(tmp_path: Path) -> None:
    (tmp_path / "experiments").symlink_to(ROOT / "experiments")
    scenes = "{num_train: 8, num_val: 4, texture: 0.0}"
    few = [f"--data.init_args.source_args={scenes}", "--data.init_args.batch_size=4"]
    few += ["--data.init_args.num_workers=0", *QUICK, *SHORT]
    for start, more in (
        ("patchlight fit --config experiments/quickstart/lvvit_teacher", few),
        ("patchlight relabel", ["--source-args", scenes, "--num-workers", "0"]),
        ("patchlight fit --config experiments/quickstart/lvvit.yaml", few),
    ):
        done = patchlight(*command(start), *more, cwd=tmp_path)
        assert done.returncode == 0, done.stderr
    maps = tmp_path / "runs" / "quickstart" / "maps"
    assert len(list(maps.glob("*.safetensors"))) == 1
    run = tmp_path / "runs" / "quickstart" / "lvvit" / "version_0"
    metrics = json.loads((run / "result.json").read_text())["metrics"]
    assert {"train/token_loss", "val/accuracy"} <= set(metrics)


@pytest.mark.slow
def test_texts(tmp_path: Path) -> None:
    (tmp_path / "experiments").symlink_to(ROOT / "experiments")
    fit = command("patchlight fit --config experiments/quickstart/translate")
    small = ["--data.init_args.num_workers=0", "--model.init_args.hidden_dim=8", *QUICK, *SHORT]
    few = "--data.init_args.source_args.num_val=8"
    done = patchlight(*fit, *small, few, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    done = patchlight(*command("patchlight translate"), cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert len(done.stdout.splitlines()) == 1
    sweep = command("patchlight sweep --config experiments/quickstart/translate")
    done = patchlight(*sweep, *small, few, "--trainer.callbacks=null", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    table = tmp_path / "runs" / "sweep" / "translate" / "table.md"
    assert [line.split(" | ")[0] for line in table.open()][2:] == ["| 1.0", "| 0.5", "| 0.0"]


@pytest.mark.slow
def test_on_many_devices(tmp_path: Path) -> None:
    (tmp_path / "experiments").symlink_to(ROOT / "experiments")
    tree(tmp_path / "my_images")
    done = patchlight(*command("patchlight plan"), cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert [line.split()[1] for line in done.stdout.splitlines() if "│" in line] == ["1", "8", "64"]
    done = patchlight(*command("patchlight shard"), cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "shards" / "index.json").is_file()


@pytest.mark.slow
def test_packs_and_resolutions(tmp_path: Path) -> None:
    (tmp_path / "experiments").symlink_to(ROOT / "experiments")
    fit = command("patchlight fit --config experiments/quickstart/navit")
    small = ["--data.init_args.num_workers=0", "--data.init_args.source_args.num_train=200"]
    done = patchlight(*fit, *QUICK, *SHORT, *small, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    done = patchlight(*command("patchlight resolutions"), *SHORT[1:], cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    run = tmp_path / "runs" / "quickstart" / "navit" / "version_0"
    assert len((run / "resolutions.md").read_text().splitlines()) == 2 + 4
    assert (run / "resolutions.png").stat().st_size > 10_000


@pytest.mark.slow
def test_published_weights(tmp_path: Path) -> None:
    (tmp_path / "experiments").symlink_to(ROOT / "experiments")
    tree(tmp_path / "my_images")
    torch.save(to_timm(Classifier(ViT("mu"), 7)), tmp_path / "weights.pth")
    done = patchlight(*command("patchlight inspect"), cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "variant: mu" in done.stdout
    small = ["--model.init_args.backbone.init_args.variant=mu", "--data.init_args.batch_size=4"]
    small += ["--data.init_args.root=my_images", "--data.init_args.num_workers=0", *QUICK, *SHORT]
    start = "patchlight fit --config experiments/supervised/vit_ti16.yaml --model.init_args.weights"
    done = patchlight(*command(start), *small, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "weights.pth: 30 tensors read" in done.stdout + done.stderr


@pytest.mark.slow
def test_own_images_and_smoke(tmp_path: Path) -> None:
    (tmp_path / "experiments").symlink_to(ROOT / "experiments")
    tree(tmp_path / "my_images")
    checked = patchlight(*command("patchlight check-data"), cwd=tmp_path)
    assert checked.returncode == 0, checked.stdout + checked.stderr
    small = ["--model.init_args.backbone.init_args.variant=mu", "--data.init_args.batch_size=4"]
    small += ["--data.init_args.num_workers=0", *QUICK, *SHORT]
    own = command("patchlight fit --config experiments/supervised/vit_ti16.yaml --data")
    done = patchlight(*own, *small, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "held-out accuracy" in done.stdout
    tune = command("patchlight fit --config experiments/finetune/small.yaml")
    small = ["--data.init_args.batch_size=4", "--data.init_args.num_workers=0", *QUICK, *SHORT]
    done = patchlight(*tune, *small, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    smoke = command("patchlight fit --config experiments/supervised/vit_ti16.yaml --config")
    assert patchlight(*smoke, cwd=tmp_path).returncode == 0


@pytest.mark.slow
def test_fashion_from_debians_files(tmp_path: Path) -> None:
    """The line that unpacks them, and the recipe on files of the same shape."""
    (line,) = (c for c in COMMANDS if c.startswith("mkdir"))
    package, real = tmp_path / "package", "/usr/share/datasets/fashion-mnist"
    assert real in line
    fashion(package)
    raw = package / "FashionMNIST" / "raw"
    subprocess.run(["gzip", *raw.iterdir()], check=True)
    subprocess.run(line.replace(real, str(raw)), shell=True, check=True, cwd=tmp_path)
    assert len(list((tmp_path / "data" / "FashionMNIST" / "raw").iterdir())) == 4
    recipe = str(ROOT / "experiments" / "quickstart" / "fashion.yaml")
    done = patchlight(
        "fit",
        "--config",
        recipe,
        *QUICK,
        "--trainer.log_every_n_steps=1",
        "--data.init_args.batch_size=8",
        cwd=tmp_path,
    )
    assert done.returncode == 0, done.stderr
    run = tmp_path / "runs" / "quickstart" / "fashion" / "version_0"
    picture = tmp_path / "curve.png"
    curve = [sys.executable, "-m", "experiments.benchmarks.curve", str(run), str(picture)]
    subprocess.run(curve, check=True, cwd=ROOT)
    assert picture.stat().st_size > 10_000
