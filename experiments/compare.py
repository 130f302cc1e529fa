"""`patchlight compare`: what several runs cost and how good they are, side by side.

    patchlight compare runs
    patchlight compare runs/mae/* runs/dino/vit_s16/version_3 --out report

A RUN is a run directory or one that holds some. Writes `compare.md` and `compare.html`, which is
one file with the curves, into the directory of all runs, or the current one where they lie in
several. What was measured of a run is read from its `evaluations/`; "linear" is the newest
`LinearProbe` and "fine-tune" the newest `Supervised` that was started from one of its checkpoints
(`model.init_args.weights`), wherever in the same directory of runs it lies. What is not there is
shown as missing.
"""

import argparse
import html
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import track
from rich.table import Table
from rich.text import Text

from experiments import page, runs
from experiments.costs import backbone_name, cost_of
from experiments.evaluations import Evaluation, evaluations
from experiments.page import MISSING, Cell, Row
from experiments.runs import Run
from experiments.sweep import markdown

FILES = ("compare.md", "compare.html")
CHILDREN = {"LinearProbe": "linear", "Supervised": "fine-tune"}
PROBE = "LinearProbe"
# Columns after the name of the run, and whether the largest value is the best one.
COLUMNS = {
    "method": False,
    "backbone": False,
    "parameters": False,
    "MACs": False,
    "epochs": False,
    "images/s": True,
    "accuracy": True,
    "best accuracy": True,
    "k-NN": True,
    "linear": True,
    "few-shot": True,
    "fine-tune": True,
}
LEGEND = (
    "Accuracies in percent; accuracy is the run's own on held-out images, after the last step and "
    "at its best. Parameters and multiply-adds (MACs, of one image) are the backbone's. Images/s "
    "is the median of the run, on its machine."
)


def amount(value: float | None, note: str = "") -> Cell:
    """A large number with k, M or G."""
    if value is None:
        return Cell(note=note)
    for unit, size in (("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if value >= size:
            return Cell(f"{value / size:.2f} {unit}", value, note)
    return Cell(f"{value:.0f}", value, note)


def percent(value: float | None, note: str = "") -> Cell:
    return Cell(note=note) if value is None else Cell(f"{100 * value:.2f}", value, note)


def number(value: float | None, digits: int, note: str = "") -> Cell:
    """With so many decimals at most."""
    if value is None:
        return Cell(note=note)
    text = f"{value:.{digits}f}"
    return Cell(text.rstrip("0").rstrip(".") if digits else text, value, note)


def measured(found: Evaluation | None) -> Cell:
    """The main value of a measurement, and which one it is."""
    if found is None:
        return Cell()
    value = runs.finite(found["values"][found["main"]])
    of = f"{found.get('network', '')} of {checkpoint(found)}"
    return percent(value, f"{found['main']}, {of}, on {found.get('data', 'unknown data')}")


def checkpoint(found: Evaluation) -> str:
    return Path(str(found.get("checkpoint", ""))).name


def newest(children: Sequence[Run], names: Mapping[Path, str]) -> Cell:
    """The accuracy after the last step of the newest child that has finished, and which it is."""
    finished = [child for child in children if child.result is not None]
    if not finished:
        waiting = ", ".join(names[child.path] for child in children)
        return Cell(note=f"not finished: {waiting}" if waiting else "")
    child = max(finished, key=lambda run: run.started)
    of = f", the newest of {len(finished)}" if len(finished) > 1 else ""
    return percent(child.metric("val/accuracy"), names[child.path] + of)


def children_of(everything: Mapping[Path, Run]) -> dict[Path, dict[str, list[Run]]]:
    """For every run the runs that were started from it, by column."""
    found: dict[Path, dict[str, list[Run]]] = {path: {} for path in everything}
    for run in everything.values():
        column = CHILDREN.get(run.method)
        if column and (parent := runs.origin(run, everything)) is not None:
            found[parent].setdefault(column, []).append(run)
    return found


def make_row(run: Run, children: Mapping[str, list[Run]], names: Mapping[Path, str]) -> Row:
    """Everything that is shown of a run."""
    curves, kept, spent = runs.scalars(run.path), evaluations(run.path), cost_of(run)
    accuracy = curves.get("val/accuracy", [])
    final = run.metric("val/accuracy")
    if run.result is None:
        final = runs.last(accuracy)
    reached = [*(p.value for p in accuracy), *([] if final is None else [final])]
    step = max((points[-1].step for points in curves.values()), default=0)
    unfinished = "" if run.result is not None else f"not finished, last heard of at step {step}"
    cells = {
        "method": Cell(run.method or MISSING),
        "backbone": Cell(backbone_name(run, spent.side) or MISSING),
        "parameters": amount(spent.parameters, "" if spent.parameters else spent.note),
        "MACs": amount(spent.macs, spent.note if spent.parameters else ""),
        "epochs": number(runs.epochs(run, curves), 2, unfinished),
        "images/s": number(runs.images_per_s(curves), 0),
        "accuracy": percent(final),
        "best accuracy": percent(max(reached) if reached else None),
        "k-NN": measured(kept.get("knn")),
        "linear": newest(children.get("linear", []), names),
        "few-shot": measured(kept.get("fewshot")),
        "fine-tune": newest(children.get("fine-tune", []), names),
    }
    assert list(cells) == list(COLUMNS)
    return Row(names[run.path], run.path, cells, curves, kept, run.config, versions(run.path))


def versions(path: Path) -> str:
    file = path / "versions.txt"
    return file.read_text(encoding="utf-8", errors="replace") if file.is_file() else ""


def data_of(row: Row) -> tuple[Any, Any]:
    """The images that a run is about: source and root."""
    data = (row.config.get("data") or {}).get("init_args") or {}
    return data.get("source"), data.get("root")


def mark_best(rows: Sequence[Row]) -> None:
    """Mark the largest values of the columns in which more is better, where there are several.

    Runs on different images are not compared.
    """
    if len(set(map(data_of, rows))) > 1:
        return
    for column, more_is_better in COLUMNS.items():
        values = [row.cells[column].value for row in rows]
        known = [value for value in values if value is not None]
        if more_is_better and len(known) > 1:
            for row, value in zip(rows, values, strict=True):
                row.cells[column] = row.cells[column]._replace(is_best=value == max(known))


def gather(
    places: Sequence[Path], console: Console
) -> tuple[list[Run], list[Path], dict[Path, Run]]:
    """The runs that were asked for, the directories of runs that they lie in, all runs in these.

    Raises:
        ValueError: none of the places holds a run.
    """
    wanted: dict[Path, None] = {}
    for place in places:
        found = runs.find(place)
        wanted |= dict.fromkeys(found)
        if not found and place.name not in FILES:
            what = "holds no run" if place.is_dir() else "is no run directory"
            console.print(f"skipped {place}: it {what}", markup=False, soft_wrap=True)
    everything: dict[Path, Run] = {}

    def take(path: Path) -> None:
        if path not in everything:
            try:
                everything[path] = runs.read(path)
            except ValueError as error:
                console.print(f"skipped {error}", markup=False, soft_wrap=True)

    for path in wanted:
        take(path)
    asked = list(everything.values())
    if not asked:
        raise ValueError(
            f"no run in {', '.join(map(str, places))}; expected run directories (with config.yaml "
            f"and versions.txt) or directories that hold some, such as runs"
        )
    roots = list(dict.fromkeys(run.root for run in asked))
    for root in roots:
        for path in runs.find(root):
            take(path)
    return asked, roots, everything


def name_all(roots: Sequence[Path], everything: Iterable[Path]) -> dict[Path, str]:
    """The paths of runs from the directory that holds all of them."""
    common = Path(os.path.commonpath(roots))
    return {path: path.relative_to(common).as_posix() for path in everything}


def short(path: Path) -> Path:
    """Seen from the current directory, where it is below that."""
    here = Path.cwd().resolve()
    return path.relative_to(here) if path.is_relative_to(here) else path


def table_of(rows: Sequence[Row]) -> tuple[list[str], list[list[Cell]]]:
    header = ["run", *COLUMNS]
    return header, [[Cell(row.name), *row.cells.values()] for row in rows]


def as_markdown(rows: Sequence[Row]) -> str:
    """The table, the best values bold, and below it what its values are of."""

    def plain(text: str) -> str:
        return html.escape(" ".join(text.split()), quote=False).replace("|", r"\|")

    header, table = table_of(rows)
    lines = [
        [f"**{plain(cell.text)}**" if cell.is_best else plain(cell.text) for cell in cells]
        for cells in table
    ]
    notes = [
        f"- {plain(row.name)}, {column}: {plain(cell.note)}\n"
        for row in rows
        for column, cell in row.cells.items()
        if cell.note
    ]
    return f"{markdown(header, lines)}\n{LEGEND}\n" + ("\n" if notes else "") + "".join(notes)


def show(rows: Sequence[Row]) -> None:
    """Print the table; in full width where nothing shows it at once, such as a file."""
    header, table = table_of(rows)
    drawn = Table(*header)
    for cells in table:
        drawn.add_row(*(Text(cell.text, style="bold" if cell.is_best else "") for cell in cells))
    console = Console(highlight=False)
    if not console.is_terminal:
        console.width = 10_000
        console.width = console.measure(drawn).maximum
    console.print(drawn)


def compare(argv: Sequence[str]) -> int:
    """The verb.

    Raises:
        ValueError: no run was found.
    """
    parser = argparse.ArgumentParser(
        prog="patchlight compare", description=(__doc__ or "").splitlines()[0], allow_abbrev=False
    )
    parser.add_argument("runs", type=Path, nargs="+", metavar="RUN", help="or a directory of runs")
    parser.add_argument("--out", type=Path, help="directory to write into; that of all runs")
    given = parser.parse_args(argv)
    console = Console(stderr=True, highlight=False)
    asked, roots, everything = gather(given.runs, console)
    names = name_all(roots, everything)
    children = children_of(everything)
    # A probe is a column of the run that it was started from, where that is shown.
    shown = {run.path for run in asked if run.method != PROBE}
    inside = {run.path for path in shown for run in children[path].get(CHILDREN[PROBE], [])}
    listed = [run for run in asked if run.path not in inside]
    rows = [
        make_row(run, children[run.path], names)
        for run in track(listed, "reading runs", console=console, transient=True)
    ]
    mark_best(rows)
    out = given.out or (short(roots[0]) if len(roots) == 1 else Path())
    out.mkdir(parents=True, exist_ok=True)
    differ = runs.differences([row.config for row in rows])
    (out / FILES[0]).write_text(as_markdown(rows), encoding="utf-8")
    (out / FILES[1]).write_text(page.render(rows, differ, LEGEND), encoding="utf-8")
    show(rows)
    print(f"also in {out / FILES[0]} and, with the curves, in {out / FILES[1]}")
    return 0
