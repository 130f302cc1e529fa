"""`patchlight sweep`: train every combination of some options, one after another, one table.

    patchlight sweep --config RECIPE --vary KEY=a,b,c --vary seed_everything=0,1,2 [fit options]
    patchlight sweep --config RECIPE --vary "KEY=a,b; OTHER=x,y"

Each `--vary` is one axis and the combinations are their product; keys that go together stand in
one `--vary`, with a semicolon between. The same command again goes on where it was stopped:
finished runs are kept, the one that was cut off is resumed.
"""

import argparse
import hashlib
import itertools
import json
import re
import statistics
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

SEED = "seed_everything"
RESULT = "result.json"  # written by `fit` when it has finished

Setting = tuple[tuple[str, str], ...]  # keys and values of one run


@dataclass(frozen=True)
class Outcome:
    """The metric of one run after its last step, or None where it failed."""

    setting: Setting
    value: float | None


def split_values(text: str) -> list[str]:
    """`a,[1,2],{b: c,d: e},'f,g'` at the commas outside brackets and quotes."""
    parts, depth, quote = [""], 0, ""
    for letter in text:
        if letter in "'\"" and quote in ("", letter):
            quote = "" if quote else letter
        elif not quote:
            depth += (letter in "[{(") - (letter in "]})")
        if letter == "," and depth == 0 and not quote:
            parts.append("")
        else:
            parts[-1] += letter
    parts = [part.strip() for part in parts]
    if "" in parts:
        raise ValueError(f"--vary has an empty value in {text!r}; write null or '' for it")
    return parts


def parse_axis(text: str) -> list[Setting]:
    """The settings along one axis: `key=a,b` or `key=a,b; other=x,y`.

    Raises:
        ValueError: no `key=values`, or keys with different numbers of values.
    """
    keys, columns = [], []
    for entry in text.split(";"):
        key, equals, values = entry.partition("=")
        if not equals or not key.strip() or not values.strip():
            raise ValueError(f"--vary {text!r}: expected key=value,value,..., found {entry!r}")
        keys.append(key.strip())
        columns.append(split_values(values))
    if len({len(column) for column in columns}) > 1:
        counts = ", ".join(f"{k} has {len(c)}" for k, c in zip(keys, columns, strict=True))
        raise ValueError(
            f"--vary {text!r}: keys that go together need as many values each, but {counts}"
        )
    return [tuple(zip(keys, values, strict=True)) for values in zip(*columns, strict=True)]


def combinations(axes: Sequence[str]) -> list[Setting]:
    """Every combination of the axes, the last one fastest."""
    product = itertools.product(*(parse_axis(axis) for axis in axes))
    settings = [tuple(itertools.chain.from_iterable(parts)) for parts in product]
    for setting in settings:
        keys = [key for key, _ in setting]
        if len(set(keys)) < len(keys):
            raise ValueError(f"--vary names a key twice: {', '.join(keys)}")
    return settings


def label(setting: Setting) -> str:
    """A setting in a few words, by the last part of each key."""
    return ", ".join(f"{key.rsplit('.', 1)[-1]} {value}" for key, value in setting)


def directory_of(setting: Setting) -> str:
    """Readable, and with a hash of the whole setting, so that no two share one."""
    digest = hashlib.sha256(json.dumps(setting).encode()).hexdigest()[:8]
    return re.sub(r"[^\w.+-]+", "_", label(setting)).strip("_")[:80] + f"-{digest}"


def train(arguments: Sequence[str]) -> None:
    """In a process of its own, so that a run that dies takes no other one with it."""
    subprocess.run([sys.executable, "-m", "experiments.cli", *arguments], check=False)


def run(setting: Setting, arguments: Sequence[str], directory: Path) -> dict[str, Any] | None:
    """Train one combination, or go on with it, or take what is there; its result."""
    results = sorted(directory.rglob(RESULT))
    if not results:
        begun = sorted(directory.rglob("config.yaml"))
        if begun:
            command = ["fit", "--resume", str(begun[-1].parent)]
        else:
            chosen = [f"--{key}={value}" for key, value in setting]
            command = ["fit", *arguments, *chosen, "--runs", str(directory)]
        train(command)
        results = sorted(directory.rglob(RESULT))
    if not results:
        return None
    found: dict[str, Any] = json.loads(results[-1].read_text(encoding="utf-8"))
    return found


def summarise(outcomes: Sequence[Outcome], metric: str) -> tuple[list[str], list[list[str]]]:
    """Header and rows: one row for each setting but for the seed, mean and spread over seeds."""
    groups: dict[Setting, list[Outcome]] = {}
    for outcome in outcomes:
        rest = tuple(pair for pair in outcome.setting if pair[0] != SEED)
        groups.setdefault(rest, []).append(outcome)
    keys = [key for key, _ in next(iter(groups))]
    header = [*(key.rsplit(".", 1)[-1] for key in keys), metric, "standard deviation", "runs"]
    rows = []
    for setting, members in groups.items():
        values = [member.value for member in members if member.value is not None]
        failed = len(members) - len(values)
        rows.append(
            [
                *(value for _, value in setting),
                f"{statistics.mean(values):.4f}" if values else "missing",
                f"{statistics.stdev(values):.4f}" if len(values) > 1 else "-",
                f"{len(values)}" + (f" ({failed} failed)" if failed else ""),
            ]
        )
    return header, rows


def markdown(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def claim(directory: Path, arguments: Sequence[str], configs: Sequence[str]) -> None:
    """Remember what the runs here share: options, and what the recipes said.

    Raises:
        ValueError: the directory holds the runs of another sweep, or a recipe is not there.
    """
    for config in configs:
        if not Path(config).is_file():
            raise ValueError(f"--config {config}: no such file")
    texts = [Path(config).read_text(encoding="utf-8") for config in configs]
    record, shared = directory / "sweep.json", {"options": list(arguments), "recipes": texts}
    if record.is_file():
        before = json.loads(record.read_text(encoding="utf-8"))
        if before != shared:
            changed = "other options" if before["options"] != shared["options"] else "other recipes"
            raise ValueError(
                f"{directory} holds a sweep with {changed} ({' '.join(before['options'])}); choose "
                f"another directory with --out, or delete this one"
            )
        return
    directory.mkdir(parents=True, exist_ok=True)
    record.write_text(json.dumps(shared), encoding="utf-8")


def sweep(argv: Sequence[str]) -> int:
    """The verb; 0 where every run finished."""
    parser = argparse.ArgumentParser(
        prog="patchlight sweep",
        description=(__doc__ or "").splitlines()[0],
        epilog="Every other option is one of `patchlight fit`.",
        allow_abbrev=False,
    )
    parser.add_argument("--vary", action="append", required=True, metavar="KEY=a,b,...")
    parser.add_argument("--metric", default="val/accuracy", help="after the last step")
    parser.add_argument("--out", type=Path, help="directory of all runs; runs/sweep/RECIPE")
    given, arguments = parser.parse_known_args(argv)
    configs = [b for a, b in itertools.pairwise(arguments) if a == "--config"]
    configs += [a.removeprefix("--config=") for a in arguments if a.startswith("--config=")]
    if not configs:
        raise ValueError("sweep needs a recipe: --config experiments/...yaml")
    settings = combinations(given.vary)
    out = given.out or Path("runs") / "sweep" / Path(configs[0]).stem
    claim(out, arguments, configs)
    console = Console(highlight=False)
    outcomes = []
    for number, setting in enumerate(settings, start=1):
        console.print(f"sweep {number} of {len(settings)}: {label(setting)}", markup=False)
        result = run(setting, arguments, out / directory_of(setting))
        if result is not None and given.metric not in result["metrics"]:
            known = ", ".join(sorted(result["metrics"]))
            raise ValueError(f"the runs have no metric {given.metric!r}; they have {known}")
        value = None if result is None else result["metrics"][given.metric]
        outcomes.append(Outcome(setting, value))
    header, rows = summarise(outcomes, given.metric)
    (out / "table.md").write_text(markdown(header, rows), encoding="utf-8")
    table = Table(*header, title=f"after the last step; also in {out / 'table.md'}")
    for row in rows:
        table.add_row(*row)
    console.print(table)
    return 0 if all(outcome.value is not None for outcome in outcomes) else 1
