"""Runs on the disk: where they are, what they left, and which run was started from which."""

import json
import math
import os
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

from experiments.subject import read_config
from experiments.sweep import RESULT


class Point(NamedTuple):
    """One value of a logged metric, after so many optimizer steps."""

    step: int
    value: float


@dataclass(frozen=True)
class Run:
    """A run directory, its resolved `config.yaml`, and what `result.json` says.

    path:    absolute, without symbolic links
    result:  `{"step", "epochs", "metrics"}`; None for a run that has not finished
    """

    path: Path
    config: dict[str, Any]
    result: dict[str, Any] | None

    @property
    def method(self) -> str:
        """The class name of the method."""
        return str(self.config["model"].get("class_path", "")).rsplit(".", 1)[-1]

    @property
    def arguments(self) -> dict[str, Any]:
        """The method's."""
        return part(self.config["model"], "init_args")

    @property
    def data(self) -> dict[str, Any]:
        """The arguments of the data module."""
        return part(part(self.config, "data"), "init_args")

    @property
    def root(self) -> Path:
        """The directory that it and its siblings were written below (`--runs`)."""
        names = ("runs", Path(str(self.config.get("runs") or "runs")).name)
        found = (above for name in names for above in self.path.parents if above.name == name)
        return next(found, self.path.parent)

    @property
    def started(self) -> int:
        """When it was last started, in seconds since 1970; 0 where nothing tells.

        By the names of its event files, which copies keep.
        """
        files = (re.search(r"\.tfevents\.(\d+)\.", p.name) for p in self.path.glob("events.out.*"))
        return max((int(found[1]) for found in files if found), default=0)

    def metric(self, name: str) -> float | None:
        """What `result.json` says after the last step."""
        return None if self.result is None else finite(part(self.result, "metrics").get(name))


def part(content: dict[str, Any], name: str) -> dict[str, Any]:
    """A section of a config, empty where it is not there."""
    found = content.get(name)
    return found if isinstance(found, dict) else {}


def finite(value: Any) -> float | None:
    is_number = isinstance(value, int | float) and math.isfinite(value)
    return float(value) if is_number else None


def is_run(path: Path) -> bool:
    beside = (path / "versions.txt", path / "checkpoints")
    return (path / "config.yaml").is_file() and any(other.exists() for other in beside)


def find(place: Path) -> list[Path]:
    """The run directories at or below a place, in the order of their names and numbers."""
    found = []
    for directory, below, _ in os.walk(place):
        if is_run(Path(directory)):
            found.append(Path(directory).resolve())
            below.clear()  # a run holds no others
    return sorted(set(found), key=numbers_in_order)


def numbers_in_order(path: Path) -> list[tuple[int, str]]:
    """version_2 before version_10."""
    pieces = re.split(r"(\d+)", str(path))
    return [(int(piece), "") if piece.isdecimal() else (-1, piece) for piece in pieces]


def read(path: Path) -> Run:
    """Read config and result of a run directory.

    Raises:
        ValueError: its config is none.
    """
    return Run(path, read_config(path / "config.yaml", "the run's"), read_result(path))


def read_result(run: Path) -> dict[str, Any] | None:
    """What `result.json` says; None where there is none, or a damaged one."""
    try:
        result = json.loads((run / RESULT).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return result if isinstance(result, dict) else None


def scalars(run: Path) -> dict[str, list[Point]]:
    """Every scalar that was logged, by name; values that are not finite are left out."""
    # Takes a second, which the other verbs need not wait for.
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(run), size_guidance={"scalars": 0, "images": 1})
    events.Reload()
    logged = {
        name: [Point(e.step, e.value) for e in events.Scalars(name) if math.isfinite(e.value)]
        for name in events.Tags()["scalars"]
    }
    return {name: points for name, points in logged.items() if points}


def last(points: Sequence[Point]) -> float | None:
    return points[-1].value if points else None


def epochs(run: Run, curves: dict[str, list[Point]]) -> float | None:
    """Epochs trained; of a run that has not finished those before the one it was last seen in."""
    if run.result is not None:
        return finite(run.result.get("epochs"))
    return last(curves.get("epoch", []))


def images_per_s(curves: dict[str, list[Point]]) -> float | None:
    """The median over the run: pauses and slow starts do not count."""
    rates = [point.value for point in curves.get("train/images_per_s", [])]
    return median(rates) if rates else None


def origin(run: Run, known: Iterable[Path]) -> Path | None:
    """Which of the known run directories `weights` points into.

    A relative path was given in some directory above the run. Where the path leads nowhere (the
    runs were moved), the one run that shares its last parts is taken, at least two of them.
    """
    weights = run.arguments.get("weights")
    if not isinstance(weights, str) or weights.startswith("timm:"):
        return None
    runs = {path for path in known if path != run.path}
    file = Path(weights)
    for above in (*run.path.parents, Path.cwd()):
        candidate = above / file  # an absolute path stays what it is
        if (directory := candidate.parent.parent.resolve()) in runs:
            return directory
        if candidate.is_file():
            return None
    shared = {path: common_tail(path, file.parent.parent) for path in runs}
    most = max(shared.values(), default=0)
    best = [path for path, count in shared.items() if count == most]
    return best[0] if most >= 2 and len(best) == 1 else None


def common_tail(a: Path, b: Path) -> int:
    """How many of their last parts are the same."""
    count = 0
    for one, other in zip(reversed(a.parts), reversed(b.parts), strict=False):
        if one != other:
            break
        count += 1
    return count


def flat(content: Any, key: str = "") -> dict[str, str]:
    """A nested config as `a.b.c` -> value, as one would write it on the command line."""
    if isinstance(content, dict) and content:
        found: dict[str, str] = {}
        for name, inner in content.items():
            found |= flat(inner, f"{key}.{name}" if key else str(name))
        return found
    return {key: content if isinstance(content, str) else json.dumps(content, default=str)}


def differences(configs: Sequence[dict[str, Any]]) -> dict[str, list[str | None]]:
    """The keys in which configs differ, and the value in each; None where one has no such key."""
    flattened = [flat(config) for config in configs]
    keys = dict.fromkeys(key for config in flattened for key in config)
    table = {key: [config.get(key) for config in flattened] for key in keys}
    return {key: values for key, values in table.items() if len(set(values)) > 1}
