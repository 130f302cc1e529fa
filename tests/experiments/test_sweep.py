"""Sweeps: which runs, what is kept, what the table says."""

import json
import sys
from pathlib import Path

import pytest

from experiments import sweep
from experiments.sweep import Outcome, combinations, markdown, split_values, summarise
from tests.runs import TINY, patchlight

DEPTH = "model.init_args.backbone.init_args.depth"


def test_values_are_split_outside_brackets() -> None:
    assert split_values("a, b,c") == ["a", "b", "c"]
    assert split_values("[1,2],{a: b, c: [d,e]},f") == ["[1,2]", "{a: b, c: [d,e]}", "f"]
    assert split_values("'a,b',c") == ["'a,b'", "c"]
    with pytest.raises(ValueError, match="an empty value in 'a,'"):
        split_values("a,")


def test_no_two_settings_share_a_directory() -> None:
    settings = combinations(["weights=d/w.pth,d_w.pth,d w.pth", "x.size=32,64", "y.size=32,64"])
    names = {sweep.directory_of(setting) for setting in settings}
    assert len(names) == 12
    assert all(len(name) < 100 for name in names)


def test_a_changed_recipe_is_another_sweep(tmp_path: Path) -> None:
    recipe = tmp_path / "a.yaml"
    recipe.write_text("trainer: {max_epochs: 1}")
    sweep.claim(tmp_path / "out", ["--config", str(recipe)], [str(recipe)])
    sweep.claim(tmp_path / "out", ["--config", str(recipe)], [str(recipe)])
    recipe.write_text("trainer: {max_epochs: 2}")
    with pytest.raises(ValueError, match="holds a sweep with other recipes"):
        sweep.claim(tmp_path / "out", ["--config", str(recipe)], [str(recipe)])
    with pytest.raises(ValueError, match=r"--config nowhere\.yaml: no such file"):
        sweep.claim(tmp_path / "out", [], ["nowhere.yaml"])


def test_axes_multiply_and_keys_of_one_axis_go_together() -> None:
    got = combinations(["pooling=cls,avg; lr=8e-4,3e-4", "seed_everything=0,1"])
    assert got == [
        (("pooling", "cls"), ("lr", "8e-4"), ("seed_everything", "0")),
        (("pooling", "cls"), ("lr", "8e-4"), ("seed_everything", "1")),
        (("pooling", "avg"), ("lr", "3e-4"), ("seed_everything", "0")),
        (("pooling", "avg"), ("lr", "3e-4"), ("seed_everything", "1")),
    ]


@pytest.mark.parametrize(
    ("axes", "says"),
    [
        (["depth"], "expected key=value,value,..., found 'depth'"),
        (["depth="], "expected key=value"),
        (["a=1,2; b=3"], "need as many values each, but a has 2, b has 1"),
        (["a=1", "a=2"], "names a key twice"),
    ],
)
def test_wrong_axes(axes: list[str], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        combinations(axes)


def test_the_table_is_over_seeds() -> None:
    values = {("a", "0"): 0.5, ("a", "1"): 0.7, ("b", "0"): 0.6, ("b", "1"): None}
    outcomes = [
        Outcome((("x.kind", kind), ("seed_everything", seed)), value)
        for (kind, seed), value in values.items()
    ]
    header, rows = summarise(outcomes, "val/accuracy")
    assert header == ["kind", "val/accuracy", "standard deviation", "runs"]
    assert rows == [["a", "0.6000", "0.1414", "2"], ["b", "0.6000", "-", "1 (1 failed)"]]
    assert markdown(header, rows).splitlines()[2] == "| a | 0.6000 | 0.1414 | 2 |"


@pytest.mark.slow
def test_a_sweep_goes_on_where_it_was_stopped(tmp_path: Path) -> None:
    arguments = ["sweep", *TINY, "--trainer.max_epochs=1", "--vary", "seed_everything=0,1"]
    first = patchlight(*arguments, "--vary", f"{DEPTH}=1", cwd=tmp_path)
    assert first.returncode == 0, first.stderr
    out = tmp_path / "runs" / "sweep" / "supervised"
    results = sorted(out.rglob("result.json"))
    assert [p.relative_to(out).parts[0][:-9] for p in results] == [
        "seed_everything_0_depth_1",
        "seed_everything_1_depth_1",
    ]
    metrics = [json.loads(path.read_text())["metrics"] for path in results]
    assert metrics[0]["val/loss"] != metrics[1]["val/loss"]
    stamps = [path.stat().st_mtime_ns for path in results]

    results[1].unlink()  # as if that run had been stopped after its last checkpoint
    again = patchlight(*arguments, "--vary", f"{DEPTH}=1,2", cwd=tmp_path)
    assert again.returncode == 0, again.stderr
    assert results[0].stat().st_mtime_ns == stamps[0]  # finished, so kept
    assert results[1].stat().st_mtime_ns != stamps[1]
    assert len(list(out.rglob("config.yaml"))) == 4  # resumed in its own directory
    table = (out / "table.md").read_text().splitlines()
    assert table[0] == "| depth | val/accuracy | standard deviation | runs |"
    assert [row.split(" | ")[0] for row in table[2:]] == ["| 1", "| 2"]

    other = patchlight(*arguments, "--trainer.max_epochs=2", cwd=tmp_path)
    assert other.returncode == 1
    assert "holds a sweep with other options" in other.stderr


@pytest.mark.slow
def test_a_run_that_fails_does_not_stop_the_others(tmp_path: Path) -> None:
    heads = "model.init_args.backbone.init_args.num_heads=3,2"  # 3 do not divide a width of 32
    done = patchlight("sweep", *TINY, "--trainer.max_epochs=1", "--vary", heads, cwd=tmp_path)
    assert done.returncode == 1
    table = (tmp_path / "runs" / "sweep" / "supervised" / "table.md").read_text()
    assert "| 3 | missing | - | 0 (1 failed) |" in table
    assert "| 2 | 0." in table


def test_a_run_has_a_process_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """But for the tests above, whose runs are forks; it goes on where it was begun."""
    asked: list[list[str]] = []
    monkeypatch.setattr(sweep.subprocess, "run", lambda command, check: asked.append(command))
    setting = (("seed_everything", "0"),)
    assert sweep.run(setting, ["--config", "a.yaml"], tmp_path) is None
    (tmp_path / "version_0").mkdir()
    (tmp_path / "version_0" / "config.yaml").touch()
    assert sweep.run(setting, ["--config", "a.yaml"], tmp_path) is None
    start = [sys.executable, "-m", "experiments.cli", "fit"]
    assert asked == [
        [*start, "--config", "a.yaml", "--seed_everything=0", "--runs", str(tmp_path)],
        [*start, "--resume", str(tmp_path / "version_0")],
    ]


def test_a_metric_that_is_not_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "x.yaml").touch()
    monkeypatch.setattr(sweep, "run", lambda *_: {"metrics": {"val/loss": 1.0}})
    with pytest.raises(ValueError, match="no metric 'val/accuracy'; they have val/loss"):
        sweep.sweep(["--config", "x.yaml", "--vary", "a=1"])
