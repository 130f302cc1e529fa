"""`patchlight check-data DIR`: find what a run would stumble over, before it does."""

import argparse
import hashlib
import os
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from io import BytesIO
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TimeRemainingColumn
from rich.table import Table

from datamodules.fetch import digest_of
from datamodules.folder import Folder, decode
from datamodules.index import Index, open_index
from datamodules.progress import Bar
from datamodules.shards import Shards, holds_shards
from datamodules.sources import BadImageError


class Finding(NamedTuple):
    """What is known of one image: its size, stored mode and bytes, or why it cannot be read."""

    name: str
    label: int
    height: int = 0
    width: int = 0
    mode: str = ""
    digest: bytes = b""
    problem: str | None = None


@dataclass
class SplitReport:
    """The images of one split.

    problems: (path, reason) of images that cannot be read
    """

    class_names: tuple[str, ...]
    skipped: int
    labels: Counter[int] = field(default_factory=Counter)
    modes: Counter[str] = field(default_factory=Counter)
    sizes: list[tuple[int, int]] = field(default_factory=list)
    digests: dict[bytes, str] = field(default_factory=dict)
    problems: list[tuple[str, str]] = field(default_factory=list)

    def add(self, finding: Finding) -> None:
        if finding.problem is not None:
            self.problems.append((finding.name, finding.problem))
            return
        self.labels[finding.label] += 1
        self.modes[finding.mode] += 1
        self.sizes.append((finding.height, finding.width))
        self.digests.setdefault(finding.digest, finding.name)


@dataclass(frozen=True)
class Everything:
    """All images of a folder that training would refuse as it is."""

    index: Index
    channels: int = 3

    @property
    def class_names(self) -> tuple[str, ...]:
        return self.index.names

    def label(self, index: int) -> int:
        return int(self.index.groups[index])

    def stored(self, index: int) -> bytes:
        return self.index.path(index).read_bytes()

    def __len__(self) -> int:
        return len(self.index)

    def describe(self, index: int) -> str:
        return str(self.index.path(index))


Folders = dict[str, Folder | Everything | Shards]
FOLDERS: Folders = {}  # of a worker, given once: an index is too large for each task


def remember(folders: Folders) -> None:
    FOLDERS.update(folders)


def examine(split: str, index: int) -> Finding:
    """Decode one image of `FOLDERS` completely."""
    folder = FOLDERS[split]
    name, label = folder.describe(index), folder.label(index)
    try:
        content = folder.stored(index)
        image = decode(BytesIO(content), folder.channels, name)
        with Image.open(BytesIO(content)) as opened:
            mode = opened.mode
        digest = hashlib.blake2b(content, digest_size=16).digest()
    except BadImageError as error:
        return Finding(name, label, problem=error.reason)
    except (OSError, ValueError) as error:  # ValueError: its shard is damaged or not there
        return Finding(name, label, problem=str(error))
    return Finding(name, label, image.shape[0], image.shape[1], mode, digest)


def open_folders(root: str) -> tuple[Folders, str | None]:
    """Both splits as source `folder` has them; or all images, and why it would refuse them.

    Shards as their source has them.
    """
    if holds_shards(root):
        return {"train": Shards("train", root, 3), "val": Shards("val", root, 3)}, None
    try:
        return {"train": Folder("train", root, 3), "val": Folder("val", root, 3)}, None
    except ValueError as error:
        return {"all": Everything(open_index(Path(root)))}, str(error)


def check_folders(folders: Folders, workers: int | None = None) -> dict[str, SplitReport]:
    """Decode every image of every split."""
    total = sum(len(folder) for folder in folders.values())
    columns = ("decoding", BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    console = Console(stderr=True)
    with (
        ProcessPoolExecutor(workers or os.cpu_count(), None, remember, (folders,)) as pool,
        Progress(*columns, console=console, transient=True) as progress,
    ):
        task = progress.add_task("", total=total)
        reports: dict[str, SplitReport] = {}
        for split, folder in folders.items():
            skipped = 0 if isinstance(folder, Shards) else folder.index.skipped
            report = SplitReport(tuple(folder.class_names), skipped)
            rows = range(len(folder))
            for finding in pool.map(examine, [split] * len(rows), rows, chunksize=16):
                report.add(finding)
                progress.advance(task)
            reports[split] = report
    return reports


def damaged_shards(folders: Folders) -> list[str]:
    """Names of the shards that are not what their index says."""
    shards = [
        (f.files, s.file) for f in folders.values() if isinstance(f, Shards) for s in f.shards
    ]
    with Bar("checksums of shards", len(shards)) as bar:
        found = []
        for files, file in shards:
            if digest_of(files.path(file)) != file.sha256:
                found.append(files.where(file.name))
            bar.advance()
    return found


def printable(name: str) -> str:
    """A path whose bytes are no UTF-8 cannot be printed as it is."""
    return name.encode("utf-8", "backslashreplace").decode("utf-8")


def describe_sizes(sizes: list[tuple[int, int]]) -> str:
    if not sizes:
        return "-"
    heights, widths = np.array(sizes).T
    return (
        f"{widths.min()}x{heights.min()} to {widths.max()}x{heights.max()}, "
        f"median {int(np.median(widths))}x{int(np.median(heights))}"
    )


def describe_aspects(sizes: list[tuple[int, int]]) -> str:
    if not sizes:
        return "-"
    heights, widths = np.array(sizes).T
    aspects = widths / heights
    return f"{aspects.min():.2f} to {aspects.max():.2f}, median {np.median(aspects):.2f}"


def describe_classes(report: SplitReport) -> str:
    if not report.class_names:
        return "no labels"
    counts = [report.labels[i] for i in range(len(report.class_names))]
    few = min(range(len(counts)), key=counts.__getitem__)
    return (
        f"{len(counts)}, {counts[few]:,} ({report.class_names[few]}) to {max(counts):,} images each"
    )


def show(reports: dict[str, SplitReport], console: Console) -> None:
    table = Table("", *reports, title="images that can be read")
    rows = {
        "images": [f"{sum(r.labels.values()):,}" for r in reports.values()],
        "classes": [describe_classes(r) for r in reports.values()],
        "width x height": [describe_sizes(r.sizes) for r in reports.values()],
        "width / height": [describe_aspects(r.sizes) for r in reports.values()],
        "stored as": [
            ", ".join(f"{mode} {count:,}" for mode, count in r.modes.most_common())
            for r in reports.values()
        ],
        "unreadable": [f"{len(r.problems):,}" for r in reports.values()],
        "other files": [f"{r.skipped:,}" for r in reports.values()],
    }
    for name, cells in rows.items():
        table.add_row(name, *(escape(printable(cell)) for cell in cells))
    console.print(table)
    for report in reports.values():
        for name, reason in report.problems:
            said = printable(f"unreadable: {name} ({reason})")
            console.print(said, markup=False, soft_wrap=True)
    if "val" not in reports:
        return
    both = reports["train"].digests.keys() & reports["val"].digests.keys()
    for digest in sorted(both, key=lambda d: reports["val"].digests[d])[:20]:
        names = " and ".join(reports[split].digests[digest] for split in reports)
        console.print(printable(f"the same file in both: {names}"), markup=False, soft_wrap=True)
    if both:
        console.print(f"{len(both):,} held-out images are also trained on")


def main(argv: Sequence[str]) -> int:
    """The verb; 0 where everything can be read, 1 where not, 2 where there is nothing to check."""
    parser = argparse.ArgumentParser(
        prog="patchlight check-data", description="Decode every image of a folder and report."
    )
    parser.add_argument(
        "dir", help="a directory or list file, as source folder takes it, or shards"
    )
    parser.add_argument("--workers", type=int, help="processes; all cores by default")
    parser.add_argument("--bad-list", type=Path, help="write the unreadable paths here")
    given = parser.parse_args(argv)
    console = Console()
    try:
        folders, refused = open_folders(given.dir)
        damaged = damaged_shards(folders)
    except ValueError as error:
        console.print(f"patchlight: {error}", markup=False)
        return 2
    reports = check_folders(folders, given.workers)
    show(reports, console)
    if refused is not None:
        console.print(f"training would refuse this: {refused}", markup=False, soft_wrap=True)
    for name in damaged:
        said = f"{name} is not what index.json says: copy it again from where it was written"
        console.print(said, markup=False, soft_wrap=True)
    problems = [name for report in reports.values() for name, _ in report.problems]
    if given.bad_list is not None:
        given.bad_list.write_bytes(b"".join(os.fsencode(name) + b"\n" for name in problems))
    return 1 if problems or damaged or refused is not None else 0
