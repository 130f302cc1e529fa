"""Comparisons: which runs, what the table says, and that the page is whole and safe."""

import json
import math
import re
import shutil
import sys
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from torch.utils.tensorboard import SummaryWriter

from experiments import cli, plots, runs
from experiments.compare import COLUMNS, compare
from experiments.costs import cost
from experiments.evaluations import record
from experiments.page import MISSING
from experiments.runs import Point
from modules.backbones.resampling import sincos2d
from tests.runs import TINY, patchlight

SMALL = {"variant": "mu", "patch_size": 16, "image_size": 32}
VIT = {"class_path": "modules.backbones.ViT", "init_args": SMALL}
START = 1_700_000_000


def make_run(
    path: Path,
    method: str = "Supervised",
    *,
    accuracy: list[float] | None = None,
    finished: bool = True,
    started: int = START,
    **arguments: Any,
) -> Path:
    """A run directory with a config, `accuracy` after every tenth step, and its result."""
    (path / "checkpoints").mkdir(parents=True)
    init_args = {"backbone": VIT, "weights": None, **arguments}
    config = {
        "model": {"class_path": f"modules.{method}", "init_args": init_args},
        "data": {"class_path": "datamodules.ImageDataModule", "init_args": {"eval_side": None}},
        "runs": "runs",
    }
    (path / "config.yaml").write_text(yaml.safe_dump(config), encoding="utf-8")
    accuracy = accuracy or []
    writer = SummaryWriter(str(path))
    for i, value in enumerate(accuracy):
        writer.add_scalar("val/accuracy", value, 10 * i + 9)
        writer.add_scalar("epoch", i, 10 * i + 9)
        writer.add_scalar("train/images_per_s", [100.0, 900.0, 300.0][i % 3], 10 * i + 9)
    writer.close()
    (events,) = path.glob("events.out.*")
    events.rename(path / f"events.out.tfevents.{started}.host.1.0")
    if finished:
        metrics = {"val/accuracy": accuracy[-1]} if accuracy else {}
        result = {"step": 10 * len(accuracy), "epochs": len(accuracy) + 0.25, "metrics": metrics}
        (path / "result.json").write_text(json.dumps(result), encoding="utf-8")
    return path


def measure(run: Path, protocol: str, value: float, main: str) -> None:
    record(
        run,
        protocol,
        {main: value, "other": 0.0},
        main,
        checkpoint=str(run / "checkpoints" / "best.ckpt"),
        network="teacher",
        fingerprint="0",
        data="digits",
    )


def table(out: Path) -> dict[str, dict[str, str]]:
    """Rows of compare.md by the name of the run, by column."""
    lines = [line for line in (out / "compare.md").read_text().splitlines() if line[:1] == "|"]
    header, _, *rows = (
        [cell.strip() for cell in re.split(r"(?<!\\)\|", line)][1:-1] for line in lines
    )
    assert header == ["run", *COLUMNS]
    return {row[0]: dict(zip(header, row, strict=True)) for row in rows}


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def real(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One run that the command itself has trained, cut off by max_steps in its third epoch."""
    directory = tmp_path_factory.mktemp("real")
    short = ["--trainer.max_epochs=-1", "--trainer.max_steps=13"]
    done = patchlight("fit", *TINY, *short, cwd=directory)
    assert done.returncode == 0, done.stderr
    return directory


@pytest.mark.slow
def test_a_run_of_the_command(
    real: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(real)
    monkeypatch.setattr(sys, "argv", ["patchlight", "compare", "runs"])
    assert cli.main() == 0
    said = capsys.readouterr().out
    assert "also in runs/compare.md and, with the curves, in runs/compare.html" in said
    ((name, row),) = table(real / "runs").items()
    assert name == "quickstart/supervised/version_0"
    (result,) = real.rglob("result.json")
    accuracy = json.loads(result.read_text())["metrics"]["val/accuracy"]
    shown = {key: row[key] for key in COLUMNS if key not in ("images/s", "best accuracy")}
    assert shown == {
        "method": "Supervised",
        "backbone": "ViT-mu/4 16, depth 4, width 64",
        "parameters": "136.13 k",
        "MACs": "2.24 M",
        "epochs": "2.6",  # 13 steps of 5 an epoch
        "accuracy": f"{100 * accuracy:.2f}",
        **dict.fromkeys(("k-NN", "linear", "few-shot", "fine-tune"), MISSING),
    }
    assert float(row["images/s"]) > 1
    assert float(row["best accuracy"]) >= float(row["accuracy"])
    assert row["accuracy"] in said
    page = (real / "runs" / "compare.html").read_text()
    for metric in ("train/loss", "val/accuracy", "schedule/lr", "val/ema_loss"):
        assert f"<figcaption>{metric}</figcaption>" in page


def test_the_table(here: Path) -> None:
    root = here / "runs"
    mae = make_run(root / "mae" / "version_0", "MAE", num_classes=None)
    first = make_run(root / "vit" / "version_2", accuracy=[0.3, 0.72, 0.7])
    second = make_run(root / "vit" / "version_10", accuracy=[0.5, 0.61], finished=False)
    measure(mae, "knn", 0.5, "top1 k=20")
    measure(first, "knn", 0.6125, "top1 k=20")
    measure(first, "fewshot", 0.25, "10-shot")
    weights = {"weights": "runs/mae/version_0/checkpoints/last.ckpt"}
    make_run(
        root / "probe" / "version_0", "LinearProbe", accuracy=[0.8], started=START + 5, **weights
    )
    make_run(
        root / "probe" / "version_1", "LinearProbe", accuracy=[0.7], started=START + 9, **weights
    )
    going = {"started": START + 20, "finished": False}
    make_run(root / "probe" / "version_2", "LinearProbe", accuracy=[0.9], **going, **weights)
    make_run(root / "tuned" / "version_0", accuracy=[0.6, 0.9], **weights)

    assert compare(["runs/vit", "runs/mae/version_0"]) == 0
    same = {"method": "Supervised", "backbone": "ViT-mu/16 32", "parameters": "41.95 k"}
    got = table(root)
    assert list(got) == ["vit/version_2", "vit/version_10", "mae/version_0"]  # as they were given
    assert got["vit/version_2"] == {
        "run": "vit/version_2",
        **same,
        "MACs": got["mae/version_0"]["MACs"],
        "epochs": "3.25",
        "images/s": "300",
        "accuracy": "**70.00**",
        "best accuracy": "**72.00**",
        "k-NN": "**61.25**",
        "linear": MISSING,
        "few-shot": "25.00",  # alone, so not the best of several
        "fine-tune": MISSING,
    }
    assert got["vit/version_10"]["epochs"] == "1"  # not more than that is sure
    assert got["vit/version_10"]["images/s"] == "**500**"
    assert got["vit/version_10"]["accuracy"] == "61.00"
    assert got["mae/version_0"]["method"] == "MAE"
    assert got["mae/version_0"]["linear"] == "70.00"
    assert got["mae/version_0"]["fine-tune"] == "90.00"
    assert [got["mae/version_0"][k] for k in ("images/s", "accuracy", "few-shot")] == [MISSING] * 3
    notes = (root / "compare.md").read_text()
    assert "- mae/version_0, linear: probe/version_1, the newest of 2\n" in notes
    assert "- mae/version_0, k-NN: top1 k=20, teacher of best.ckpt, on digits\n" in notes
    assert "- vit/version_10, epochs: not finished, last heard of at step 19\n" in notes
    assert second.is_dir()


def test_probes_are_columns_and_fine_tuned_networks_are_rows_too(here: Path) -> None:
    make_run(here / "runs" / "a" / "version_0", "DINO")
    started_from = {"weights": "runs/a/version_0/checkpoints/best.ckpt"}
    make_run(here / "runs" / "p" / "version_0", "LinearProbe", accuracy=[0.8], **started_from)
    make_run(here / "runs" / "t" / "version_0", accuracy=[0.9], **started_from)
    other = {"weights": "weights.pth"}
    make_run(here / "runs" / "q" / "version_0", "LinearProbe", accuracy=[0.4], **other)
    compare(["runs", "--out", "report"])
    got = table(here / "report")
    assert list(got) == ["a/version_0", "q/version_0", "t/version_0"]
    assert [got["a/version_0"][key] for key in ("linear", "fine-tune")] == ["80.00", "90.00"]
    # A probe of what is not shown has a row: its number would be lost.
    compare(["runs/p", "runs/q"])
    assert list(table(here / "runs")) == ["p/version_0", "q/version_0"]


def test_whose_weights_a_run_was_started_from(here: Path) -> None:
    def started(weights: str | None, place: str = "runs/child/version_0") -> runs.Run:
        shutil.rmtree(here / place, ignore_errors=True)
        return runs.read(make_run(here / place, weights=weights))

    known = [here / "runs" / name for name in ("a/version_0", "b/version_0", "b/version_1")]
    known += [here / "elsewhere" / "runs" / "a" / "version_0"]
    for path in known:
        make_run(path)
    last = "checkpoints/last.ckpt"
    assert runs.origin(started(f"runs/b/version_1/{last}"), known) == known[2]
    assert runs.origin(started(str(known[0] / last)), known) == known[0]
    # The nearest directory from which the path leads somewhere, be it not the current one.
    inner = started(f"runs/a/version_0/{last}", "elsewhere/runs/child/version_0")
    assert runs.origin(inner, known) == known[3]
    # Moved: by the trailing parts, if these tell one run from the others.
    assert runs.origin(started(f"/gone/runs/b/version_1/{last}"), known) == known[2]
    assert runs.origin(started(f"/gone/runs/a/version_0/{last}"), known) is None
    assert runs.origin(started(f"/gone/runs/c/version_1/{last}"), known) is None
    # A file that is there belongs to the run that it lies in and to no other.
    file = here / "third" / "runs" / "b" / "version_1" / last
    file.parent.mkdir(parents=True)
    file.touch()
    assert runs.origin(started(str(file)), known) is None
    for nothing in (None, "timm:vit_small_patch16_224", "weights.pth"):
        assert runs.origin(started(nothing), known) is None


def test_where_runs_are_found(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    deep = make_run(here / "runs" / "sweep" / "x" / "version_0", accuracy=[0.5])
    (here / "runs" / "notes").mkdir()
    (here / "runs" / "config.yaml").write_text("model: {}")  # with nothing beside it: no run
    broken = make_run(here / "runs" / "broken")
    (broken / "config.yaml").write_text("model: [")
    compare(["runs", "runs/notes", "runs/nowhere", str(deep)])
    said = " ".join(capsys.readouterr().err.split())
    assert list(table(here / "runs")) == ["sweep/x/version_0"]
    assert "skipped runs/notes: it holds no run" in said
    assert "skipped runs/nowhere: it is no run directory" in said
    assert "broken/config.yaml is no YAML file" in said
    compare(["runs/sweep", "runs/compare.md"])
    assert "compare.md" not in capsys.readouterr().err  # our own
    with pytest.raises(ValueError, match="no run in runs/notes; expected run directories"):
        compare(["runs/notes"])


def test_values_that_are_none_are_missing(here: Path) -> None:
    run = make_run(here / "runs" / "a" / "version_0", accuracy=[0.5, math.nan])
    gone = {"class_path": "modules.backbones.Gone", "init_args": {"patch_size": 8}}
    make_run(here / "runs" / "b" / "version_0", backbone=gone)
    make_run(here / "runs" / "c" / "version_0", backbone=None)
    measure(run, "knn", math.nan, "top1 k=20")
    compare(["runs"])
    got = table(here / "runs")
    assert [got["a/version_0"][k] for k in ("accuracy", "k-NN")] == [MISSING, MISSING]
    assert got["a/version_0"]["best accuracy"] == "50.00"
    assert got["b/version_0"]["backbone"] == "Gone/8"
    assert [got["b/version_0"][k] for k in ("parameters", "MACs")] == [MISSING, MISSING]
    assert (
        "b/version_0, parameters: the backbone cannot be built:"
        in (here / "runs" / "compare.md").read_text()
    )
    assert got["c/version_0"]["backbone"] == MISSING
    for file in ("compare.md", "compare.html"):
        assert not re.search(r"\bnan\b", (here / "runs" / file).read_text(), re.I)


@pytest.mark.parametrize(
    ("variant", "size", "parameters", "billions"),
    [
        ("Ti", 224, 5_524_416, 1.25),
        ("S", 224, 21_665_664, 4.60),
        ("B", 224, 85_798_656, 17.56),
        ("B", 384, 86_090_496, 55.5),
    ],
)
def test_costs_are_those_of_the_papers(
    variant: str, size: int, parameters: int, billions: float
) -> None:
    arguments = {"variant": variant, "image_size": size}
    vit = {"class_path": "modules.backbones.ViT", "init_args": arguments}
    found = cost(json.dumps(vit), None)
    assert found.parameters == parameters
    assert found.macs == pytest.approx(billions * 1e9, rel=0.005)
    assert found.side == (size, size)


def test_costs_of_backbones_of_any_size_need_the_datas() -> None:
    navit = json.dumps(
        {"class_path": "modules.backbones.NaViT", "init_args": {"variant": "mu", "patch_size": 4}}
    )
    uneven = cost(navit, (30, 32))
    assert uneven.macs is None
    assert uneven.parameters
    assert "image size 30x32 is not divisible by patch_size 4" in uneven.note
    alone, small, large = cost(navit, None), cost(navit, (32, 32)), cost(navit, (64, 64))
    assert alone.macs is None
    assert alone.parameters == small.parameters
    assert small.macs is not None
    assert large.macs is not None
    assert large.macs > 4 * small.macs  # four times the tokens, and attention grows faster


def test_counting_leaves_no_tensors_without_values_behind() -> None:
    # A size that no other test has: the table is made while it is counted.
    init_args = {"variant": "mu", "image_size": 336, "positions": {"kind": "sincos2d"}}
    fixed = {"class_path": "modules.backbones.ViT", "init_args": init_args}
    assert cost(json.dumps(fixed), None).macs
    assert sincos2d(32, (21, 21), False).device == torch.device("cpu")


class Reader(HTMLParser):
    """Collects what a browser would fetch, and checks that tags are closed in order."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.fetched: list[str] = []
        self.text: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag not in ("meta", "line", "circle", "polyline"):
            self.open.append(tag)
        found = dict(attrs)
        self.fetched += [str(found[k]) for k in ("src", "href", "srcset", "data") if k in found]
        assert tag not in ("link", "b", "iframe", "img")

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        pass

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text.append(data)


def test_the_page_is_one_file_and_escapes_what_it_shows(here: Path) -> None:
    name = '<b>&"|'
    run = make_run(here / "runs" / name / "version_0", accuracy=[0.25, 0.5], loss="</script><b>")
    make_run(here / "runs" / "other" / "version_0", accuracy=[0.75, 0.125])
    (run / "versions.txt").write_text("torch <b>2</b>\n")
    measure(run, "knn", 0.5, "<b>top1</b>")
    compare(["runs"])
    page = (here / "runs" / "compare.html").read_text(encoding="utf-8")
    assert "http" not in page.replace("http-equiv", "")
    assert "url(" not in page
    assert "@import" not in page
    reader = Reader()
    reader.feed(page)
    assert reader.open == []
    assert set(reader.fetched) == {"#run-0", "#run-1"}
    shown = "".join(reader.text)
    for text in (f"{name}/version_0", "</script><b>", "torch <b>2</b>", "<b>top1</b>"):
        assert text in shown
    assert page.count("</script>") == 1
    markdown = (here / "runs" / "compare.md").read_text()
    assert '| &lt;b&gt;&amp;"\\|/version_0 |' in markdown


def test_the_page_has_the_curves_and_what_differs(here: Path) -> None:
    make_run(here / "runs" / "a" / "version_0", accuracy=[0.0, 1.0, 0.5], loss="softmax")
    make_run(here / "runs" / "b" / "version_0", accuracy=[0.5], loss="bce", ema_decay=0.9)
    compare(["runs"])
    page = (here / "runs" / "compare.html").read_text(encoding="utf-8")
    figure = page.split("<figcaption>val/accuracy</figcaption>")[1].split("</figure>")[0]
    lines = re.findall(r'data-run="(\d)".*?<title>(.*?)</title><polyline points="(.*?)"', figure)
    assert [line[:2] for line in lines] == [
        ("0", "a/version_0: 0.5 at step 29"),
        ("1", "b/version_0: 0.5 at step 9"),
    ]
    (x0, low), (x1, high), (x2, middle) = (
        [float(number) for number in point.split(",")] for point in lines[0][2].split()
    )
    assert x1 - x0 == pytest.approx(x2 - x1, abs=0.11)
    assert middle == pytest.approx((low + high) / 2, abs=0.11)
    assert low > middle > high  # SVG counts from the top
    assert lines[1][2] == f"{x0:.1f},{middle:.1f}"
    differ = page.split("What differs in the configs")[1].split("</table>")[0]
    cells = re.findall(r"<td>(.*?)</td>", differ)
    assert cells == [
        *("model.init_args.loss", "softmax", "bce"),
        *("model.init_args.ema_decay", MISSING, "0.9"),
    ]


def test_long_curves_are_thinned_to_means() -> None:
    points = [Point(step, step % 2) for step in range(10_000)]
    got = plots.thinned(points)
    assert len(got) == plots.MOST_POINTS
    assert got[-1].step == 9_999
    assert all(point.value == pytest.approx(0.5, abs=0.03) for point in got)
    assert plots.thinned(points[:400]) == points[:400]


def test_axes() -> None:
    assert plots.ticks(0.0, 1.0, 5) == pytest.approx([0, 0.2, 0.4, 0.6, 0.8, 1.0])
    assert plots.ticks(-3.0, 40_100, 5) == [0, 10_000, 20_000, 30_000, 40_000]
    assert plots.limits([0.5, 0.5]) == pytest.approx((0.475, 0.525))
    assert plots.limits([0.0]) == (-1.0, 1.0)
    assert [plots.in_short(v) for v in (0, 12_000, 1.5e6, 0.25, 2e-5)] == [
        *("0", "12k", "1.5M", "0.25", "2e-05")
    ]
