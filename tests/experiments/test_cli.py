"""The command: what it refuses, what it leaves behind, what it says."""

import json
from pathlib import Path

import pytest
import yaml
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from experiments import cli
from experiments.cli import raised_by_us
from tests.runs import ROOT, TINY, only_run, patchlight


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    directory = tmp_path_factory.mktemp("run")
    done = patchlight("fit", *TINY, cwd=directory)
    assert done.returncode == 0, done.stderr
    return only_run(directory), done.stdout + done.stderr


@pytest.mark.slow
def test_what_a_run_leaves(finished: tuple[Path, str]) -> None:
    run, said = finished
    assert (run / "checkpoints" / "last.ckpt").is_file()
    assert (run / "checkpoints" / "best.ckpt").is_file()
    config = yaml.safe_load((run / "config.yaml").read_text())
    assert config["model"]["init_args"]["backbone"]["init_args"]["dropout"] == 0.2
    assert config["model"]["init_args"]["backbone"]["init_args"]["mlp_dim"] == 128
    versions = (run / "versions.txt").read_text()
    assert all(name in versions for name in ("python 3", "torch ", "lightning ", "timm ", "commit"))
    last_line = said.strip().splitlines()[-1]
    assert "held-out accuracy" in said
    assert f"run in {Path(*run.parts[-4:])}" in said, last_line
    assert "tensorboard --logdir runs" in said
    assert "weight decay" in said  # the table of parameter groups


@pytest.mark.slow
def test_what_tensorboard_shows(finished: tuple[Path, str]) -> None:
    events = EventAccumulator(str(finished[0]))
    events.Reload()
    tags = events.Tags()
    assert {
        *("train/loss", "val/loss", "val/accuracy", "val/top5_accuracy", "val/ema_accuracy"),
        *("schedule/lr", "train/images_per_s"),
    } <= set(tags["scalars"])
    assert tags["images"] == ["train/augmented_batch"]
    assert len(events.Images("train/augmented_batch")) == 1
    steps = [event.step for event in events.Scalars("schedule/lr")]
    assert steps == list(range(15))
    assert all(event.value > 0 for event in events.Scalars("train/images_per_s"))


@pytest.mark.slow
def test_validate_needs_only_the_run(finished: tuple[Path, str], tmp_path: Path) -> None:
    run, _ = finished
    best = run / "checkpoints" / "best.ckpt"
    config = str(run / "config.yaml")
    done = patchlight("validate", "--config", config, "--ckpt_path", str(best), cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    got = dict(line.split() for line in done.stdout.splitlines() if line.startswith("val/"))
    events = EventAccumulator(str(run))
    events.Reload()
    best_accuracy = max(event.value for event in events.Scalars("val/accuracy"))
    assert float(got["val/accuracy"]) == pytest.approx(best_accuracy, abs=1e-4)
    assert list(tmp_path.iterdir()) == []  # an evaluation leaves nothing behind


def config_with(tmp_path: Path, text: str) -> list[str]:
    (tmp_path / "extra.yaml").write_text(text)
    return ["fit", *TINY, "--config", str(tmp_path / "extra.yaml")]


@pytest.mark.slow
@pytest.mark.parametrize(
    "text",
    [
        "model: {class_path: evil.Model}",
        "model: {init_args: {backbone: {class_path: evil.Backbone}}}",
        "trainer: {callbacks: [{class_path: evil.Callback}]}",
        "trainer: {logger: {class_path: subprocess.Popen, init_args: {args: [touch, owned]}}}",
        "data: {class_path: evil.Data}",
    ],
)
def test_config_cannot_import_what_is_not_ours(tmp_path: Path, text: str) -> None:
    (tmp_path / "evil.py").write_text("open('owned', 'w')\n")
    done = patchlight(*config_with(tmp_path, text), cwd=tmp_path)
    assert done.returncode != 0
    assert "not allowed" in done.stderr, done.stderr
    assert not (tmp_path / "owned").exists()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--model.init_args.num_class=3"], "num_class"),
        (["--data.init_args.mixupp=3"], "mixupp"),
        (
            ["--model.init_args.num_classes=4"],
            "the data has 10 classes, but model.num_classes is 4",
        ),
        (["--data.init_args.image_size=20"], "is 20x20, but the backbone is made for 16x16"),
        (["--data.init_args.batch_size=3"], "an even number"),
        (["--data.init_args.batch_size=24"], "23 training samples do not fill one global batch"),
        (["--trainer.gradient_clip_val=1.0"], "set optimizer.clip_norm"),
        (["--data.init_args.source=folder", "--data.init_args.source_args={}"], "root"),
        (["--ckpt_path=nowhere.ckpt"], "nowhere.ckpt"),
        (["--data.init_args.channels=3"], "need one number for each of the 3 channel(s)"),
        (["--trainer.precision=bf16-true"], "precision is 'bf16-true'; expected 32-true"),
    ],
)
def test_bad_input_stops_before_the_first_step(
    tmp_path: Path, arguments: list[str], says: str
) -> None:
    done = patchlight("fit", *TINY, *arguments, cwd=tmp_path)
    assert done.returncode != 0
    assert says in done.stderr, done.stderr
    assert "Traceback" not in done.stderr
    assert not list(tmp_path.rglob("*.ckpt"))


@pytest.mark.slow
def test_validate_names_the_weights(finished: tuple[Path, str], tmp_path: Path) -> None:
    config = str(finished[0] / "config.yaml")
    done = patchlight("validate", "--config", config, cwd=tmp_path)
    assert done.returncode == 1
    assert "--ckpt_path RUN/checkpoints/best.ckpt" in done.stderr
    assert "val/" not in done.stdout


def test_only_our_own_checks_are_told_without_a_traceback(tmp_path: Path) -> None:
    def error_in(path: Path) -> ValueError:
        code = compile("raise ValueError('deep')", str(path), "exec")
        try:
            exec(code)
        except ValueError as error:
            return error
        raise AssertionError

    room = ROOT / "modules" / "somewhere.py"
    ours, foreign = error_in(room), error_in(ROOT / ".venv" / "lib" / "torch" / "x.py")
    assert raised_by_us(ours) is ours
    assert raised_by_us(foreign) is None
    wrapped = TypeError("does not validate")
    wrapped.__cause__ = ours
    assert raised_by_us(wrapped) is ours


def test_an_interrupted_verb_leaves_without_a_traceback(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupt(arguments: list[str]) -> int:
        raise KeyboardInterrupt

    monkeypatch.setitem(cli.VERBS, "shard", interrupt)
    monkeypatch.setattr("sys.argv", ["patchlight", "shard"])
    assert cli.main() == 130
    assert capsys.readouterr().err == "patchlight: interrupted\n"


def test_a_directory_that_must_not_be_written_is_named(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def refuse(arguments: list[str]) -> int:
        raise PermissionError(13, "Permission denied", "runs/mine")

    monkeypatch.setitem(cli.VERBS, "shard", refuse)
    monkeypatch.setattr("sys.argv", ["patchlight", "shard"])
    assert cli.main() == 1
    assert capsys.readouterr().err.startswith("patchlight: runs/mine: Permission denied; see who")

    def fail(arguments: list[str]) -> int:
        raise OSError(5, "Input/output error")

    monkeypatch.setitem(cli.VERBS, "shard", fail)
    with pytest.raises(OSError, match="Input/output"):
        cli.main()


@pytest.mark.slow
def test_two_processes_evaluate_like_one(finished: tuple[Path, str], tmp_path: Path) -> None:
    """Seven images in batches of two over two ranks: a half-empty batch and an odd number."""
    run, _ = finished
    results = []
    for devices in ("1", "2"):
        done = patchlight(
            "validate",
            *("--config", str(run / "config.yaml")),
            *("--ckpt_path", str(run / "checkpoints" / "last.ckpt")),
            *(f"--trainer.devices={devices}", "--trainer.strategy=ddp"),
            *("--data.init_args.batch_size", "2"),
            cwd=tmp_path,
        )
        assert done.returncode == 0, done.stderr
        lines = [line for line in done.stdout.splitlines() if line.startswith("val/")]
        results.append({name: json.loads(value) for name, value in map(str.split, lines)})
    assert results[0] == results[1]
    assert results[0]["val/accuracy"] * 7 == pytest.approx(round(results[0]["val/accuracy"] * 7))
