"""`patchlight resolutions`: how good a run is at several image sizes, and what each size costs.

    patchlight resolutions RUN [RUN ...] --sides 32,64,96,128 [validate options]

Evaluates the best checkpoint of every run at every side (the square root of an image's area in
pixels; with ImageDataModule the side of the square crop) and writes one table and the curve of
the metric over tokens, `resolutions.md` and `resolutions.png`, into the first run.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from rich.console import Console
from rich.table import Table

from datamodules.module import SourceDataModule
from experiments.sweep import markdown


class Point(NamedTuple):
    """One evaluation: side in pixels, mean tokens of an image, the metric."""

    side: int
    tokens: float
    value: float


def files_of(run: Path, checkpoint: str) -> tuple[Path, Path]:
    """The config and the checkpoint of a run."""
    config, weights = run / "config.yaml", run / "checkpoints" / f"{checkpoint}.ckpt"
    for file in (config, weights):
        if not file.is_file():
            raise ValueError(f"{file}: no such file; {run} was given as a run directory")
    return config, weights


def evaluate(
    run: Path,
    sides: Sequence[int],
    metric: str,
    checkpoint: str,
    options: Sequence[str],
    points: list[Point],
) -> None:
    """Evaluate a run at every side, adding to `points`.

    Raises:
        ValueError: no run, no such checkpoint or metric, a side that the backbone does not take.
    """
    from experiments.cli import PatchlightCLI  # which knows this verb

    config, weights = files_of(run, checkpoint)

    class Sides(PatchlightCLI):
        """Validates once more for every further side."""

        def before_validate(self) -> None:
            super().before_validate()
            if not isinstance(self.datamodule, SourceDataModule):
                raise ValueError(f"{type(self.datamodule).__name__} has no size of images to vary")
            self.datamodule.eval_side = sides[0]

        def after_validate(self) -> None:
            self.note(sides[0])
            for side in sides[1:]:
                self.datamodule.eval_side = side
                self.trainer.validate(self.model, self.datamodule, verbose=False)
                self.note(side)

        def note(self, side: int) -> None:
            found = self.trainer.callback_metrics
            if metric not in found:
                known = ", ".join(sorted(found))
                raise ValueError(f"{run} has no metric {metric!r}; it has {known}")
            points.append(Point(side, self.datamodule.eval_tokens, float(found[metric])))

    # One device: further processes would be started with a command that knows one side only.
    one = ["--trainer.devices=1", "--trainer.num_nodes=1", "--trainer.strategy=auto"]
    given = ["--config", str(config), "--ckpt_path", str(weights)]
    sys.argv[1:] = ["validate", *given, *options, *one]
    Sides()


def draw(curves: dict[str, list[Point]], metric: str, out: Path) -> None:
    """The metric over the mean number of tokens of an image, a line for each run."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot
    from matplotlib.ticker import NullFormatter, ScalarFormatter

    figure, axes = pyplot.subplots(figsize=(6.4, 4))
    for name, points in curves.items():
        ordered = sorted(points, key=lambda point: point.tokens)
        axes.plot([p.tokens for p in ordered], [p.value for p in ordered], "o-", label=name)
        for point in ordered:
            axes.annotate(
                f"{point.side}",
                (point.tokens, point.value),
                textcoords="offset points",
                xytext=(0, 7),
                ha="center",
                fontsize=8,
                color="tab:gray",
            )
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_formatter(ScalarFormatter())
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.set(xlabel="tokens an image, mean (grey: side in pixels)", ylabel=metric)
    axes.margins(y=0.12)
    axes.grid(alpha=0.3)
    if len(curves) > 1:
        axes.legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(out, dpi=110)
    pyplot.close(figure)


def parse_sides(text: str) -> list[int]:
    try:
        sides = [int(part) for part in text.split(",")]
    except ValueError:
        sides = []
    if not sides or min(sides) < 1:
        raise ValueError(f"--sides {text!r}: expected pixels, such as 64,96,128")
    return sides


def resolutions(argv: Sequence[str]) -> int:
    """The verb."""
    parser = argparse.ArgumentParser(
        prog="patchlight resolutions",
        description=(__doc__ or "").splitlines()[0],
        epilog="Every other option is one of `patchlight validate` and comes after the runs; "
        "one device is used.",
        allow_abbrev=False,
    )
    parser.add_argument("runs", type=Path, nargs="+", metavar="RUN")
    parser.add_argument("--sides", required=True, metavar="A,B,...", help="in pixels")
    parser.add_argument("--metric", default="val/accuracy")
    parser.add_argument("--checkpoint", choices=("best", "last"), default="best")
    given, options = parser.parse_known_args(argv)
    sides = parse_sides(given.sides)
    for run in given.runs:
        files_of(run, given.checkpoint)
    curves: dict[str, list[Point]] = {str(run): [] for run in given.runs}
    try:
        for run in given.runs:
            points = curves[str(run)]
            evaluate(run, sides, given.metric, given.checkpoint, options, points)
    finally:  # what was evaluated before an error is kept
        report(curves, given.metric, given.runs[0])
    return 0


def report(curves: dict[str, list[Point]], metric: str, out: Path) -> None:
    """Print the table, and write it and the picture into `out`."""
    header = ["run", "side", "tokens an image", metric]
    rows = [
        [name, str(p.side), f"{p.tokens:.1f}", f"{p.value:.4f}"]
        for name, points in curves.items()
        for p in points
    ]
    if not rows:
        return
    (out / "resolutions.md").write_text(markdown(header, rows), encoding="utf-8")
    draw(curves, metric, out / "resolutions.png")
    table = Table(*header, title=f"also in {out / 'resolutions.md'} and .png")
    for row in rows:
        table.add_row(*row)
    Console(highlight=False).print(table)
