"""The index of a folder: paths and classes in memory-mapped arrays, kept in a cache.

Python lists of a million paths grow in every data-loader worker, since counting references
writes to their pages. Arrays that are mapped from a file are shared by all.
"""

import csv
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

from datamodules.disk import cache_directory, replacing, using

EXTENSIONS = frozenset(
    (".jpg", ".jpeg", ".png", ".bmp", ".webp", ".tif", ".tiff", ".ppm", ".pgm", ".gif")
)
LISTS = frozenset((".txt", ".csv", ".tsv"))


@dataclass(frozen=True)
class Index:
    """Images below a root, in sorted order.

    paths:   uint8, the bytes of all relative paths one after the other
    offsets: int64 [n + 1], where each path starts and ends
    groups:  int32 [n], class id, -1 where an image has none
    names:   class names
    skipped: files that are no images
    arrays:  the directory of the mapped files; a renewed index has another one
    """

    root: Path
    paths: np.ndarray
    offsets: np.ndarray
    groups: np.ndarray
    names: tuple[str, ...]
    skipped: int
    arrays: Path

    def __len__(self) -> int:
        return len(self.groups)

    def relative(self, row: int) -> str:
        start, end = int(self.offsets[row]), int(self.offsets[row + 1])
        return os.fsdecode(self.paths[start:end].tobytes())

    def path(self, row: int) -> Path:
        return self.root / self.relative(row)


def open_index(root: Path) -> Index:
    """The index of a directory or a list file: from the cache where that is still true.

    A directory's index is true while no directory below it has changed (adding, removing and
    renaming files changes it); a list file's while its size, time and content are the same.

    Raises:
        ValueError: nothing there, or nothing to read.
    """
    root = root.expanduser().absolute()
    is_list = root.is_file()
    if is_list and root.suffix.lower() not in LISTS:
        raise ValueError(f"data.root {root} is a file, but no list (.txt, .csv or .tsv)")
    if not root.exists():
        raise ValueError(f"data.root {root} does not exist; expected a directory or a list file")
    cache = cache_directory("index")
    pointer = cache / f"{hashlib.sha256(os.fsencode(root)).hexdigest()[:24]}.json"
    with using(cache):
        known = known_by(pointer)
    if known and all(stamp(Path(path)) == when for path, when in known["stamps"]):
        # Renewed by another process just now, or damaged.
        with suppress(FileNotFoundError, ValueError, EOFError):
            return load(root, cache / known["arrays"], known)
    entries, stamps, skipped = read_list(root) if is_list else scan(root)
    with using(cache):
        return store(root, pointer, entries, stamps, skipped)


def known_by(pointer: Path) -> dict[str, Any]:
    """What a pointer says; nothing where there is none, or half of one."""
    with suppress(FileNotFoundError, ValueError):
        known = json.loads(pointer.read_bytes())
        if isinstance(known, dict):
            return known
    return {}


def stamp(path: Path) -> list[int | str] | None:
    """What changes when a directory, or the content of a list file, does."""
    try:
        status = path.stat()
        content = hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else ""
    except OSError:
        return None
    return [status.st_mtime_ns, status.st_size, content]


Entries = list[tuple[bytes, str]]  # relative path, class name ("" for none)


def scan(root: Path) -> tuple[Entries, list[tuple[str, Any]], int]:
    """Every image below `root`; its class is the first directory on the way to it."""
    entries: Entries = []
    stamps: list[tuple[str, Any]] = []
    skipped = 0
    columns = (SpinnerColumn(), TextColumn("{task.description}"), TimeElapsedColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task(f"indexing {root}")
        for directory in walk(root, set()):
            stamps.append((str(directory), stamp(directory)))
            group = directory.relative_to(root).parts[:1]
            with os.scandir(directory) as listing:
                for entry in listing:
                    if entry.name.startswith(".") or not entry.is_file():
                        continue
                    if Path(entry.name).suffix.lower() not in EXTENSIONS:
                        skipped += 1
                        continue
                    relative = os.fsencode(os.path.relpath(entry.path, root))
                    entries.append((relative, group[0] if group else ""))
            progress.update(task, description=f"indexing {root}: {len(entries):,} images")
    entries.sort()
    return entries, stamps, skipped


def walk(directory: Path, seen: set[tuple[int, int]]) -> Iterator[Path]:
    """`directory` and those below it, each once however it is linked."""
    status = directory.stat()
    if (status.st_dev, status.st_ino) in seen:
        return
    seen.add((status.st_dev, status.st_ino))
    yield directory
    with os.scandir(directory) as listing:
        below = [(entry.is_symlink(), entry.name) for entry in listing if entry.is_dir()]
    for _, name in sorted(below):  # links last: a directory keeps its own name
        if not name.startswith(".") and name != "__MACOSX":
            yield from walk(directory / name, seen)


def read_list(path: Path) -> tuple[Entries, list[tuple[str, Any]], int]:
    """The lines `path[separator label]` of a list file: a comma in .csv, a tab in .tsv, and in
    .txt the last space or tab before a label."""
    entries: Entries = []
    labelled: bool | None = None
    text = path.read_text(encoding="utf-8-sig")
    if path.suffix.lower() == ".txt":
        rows = [line.strip().rsplit(maxsplit=1) for line in text.splitlines()]
        # A lone path with a space in it has no label: its last word is a file name.
        rows = [
            [" ".join(row)] if len(row) == 2 and Path(row[1]).suffix.lower() in EXTENSIONS else row
            for row in rows
        ]
    else:
        delimiter = "\t" if path.suffix.lower() == ".tsv" else ","
        rows = [
            [c.strip() for c in row] for row in csv.reader(text.splitlines(), delimiter=delimiter)
        ]
    for number, row in enumerate(rows, start=1):
        if not any(row):
            continue
        has_label = len(row) > 1 and row[1] != ""
        if len(row) > 2 or (labelled is not None and has_label != labelled):
            raise ValueError(
                f"{path}, line {number}: expected "
                f"{'a path and a label' if labelled else 'a path alone'}, as in the lines before, "
                f"found {row}"
            )
        labelled = has_label
        entries.append((os.fsencode(row[0]), row[1] if has_label else ""))
    refuse_header(path, entries)
    first = [os.fsdecode(entry[0]) for entry in entries[:100]]
    if first and not any((path.parent / name).exists() for name in first):
        raise ValueError(
            f"none of the first {len(first)} images of {path} exists; paths are relative to the "
            f"list, so the first should be {path.parent / first[0]}"
        )
    return entries, [(str(path), stamp(path))], 0


def refuse_header(path: Path, entries: Entries) -> None:
    """A header would become a class of its own, and turn numbers into names."""
    first = [Path(os.fsdecode(entry[0])).suffix.lower() in EXTENSIONS for entry in entries[:2]]
    if first == [False, True]:
        raise ValueError(
            f"{path}, line 1: {os.fsdecode(entries[0][0])!r} is no image path, unlike line 2; "
            f"a list file has no header, so remove that line"
        )


def class_ids(groups: set[str], numeric: bool) -> tuple[tuple[str, ...], dict[str, int]]:
    """Class names by id, and the id of every group; a list file may number its classes."""
    found = groups - {""}
    if numeric and found and all(group.isdecimal() for group in found):
        ids = {group: int(group) for group in found}  # "007" is class 7
        names = tuple(str(i) for i in range(max(ids.values()) + 1))
    else:
        names = tuple(sorted(found))
        ids = {name: i for i, name in enumerate(names)}
    return names, ids | {"": -1}


def store(
    root: Path, pointer: Path, entries: Entries, stamps: list[tuple[str, Any]], skipped: int
) -> Index:
    """Write the arrays beside each other, then the file that points to them in one rename."""
    if not entries:
        raise ValueError(
            f"there are no images in {root}; expected files ending in "
            f"{', '.join(sorted(EXTENSIONS))}"
        )
    names, ids = class_ids({group for _, group in entries}, numeric=root.is_file())
    pointer.parent.mkdir(parents=True, exist_ok=True)
    arrays = Path(tempfile.mkdtemp(prefix=pointer.stem + "-", dir=pointer.parent))
    lengths = np.fromiter((len(path) for path, _ in entries), np.int64, len(entries))
    np.save(arrays / "offsets.npy", np.concatenate(([0], np.cumsum(lengths))))
    np.save(arrays / "groups.npy", np.array([ids[group] for _, group in entries], np.int32))
    np.save(arrays / "paths.npy", np.frombuffer(b"".join(p for p, _ in entries), np.uint8))
    known = {"arrays": arrays.name, "stamps": stamps, "names": names, "skipped": skipped}
    index = load(root, arrays, known)  # before anyone else can renew it
    replaced = known_by(pointer).get("arrays")
    with replacing(pointer) as beside:
        beside.write_text(json.dumps(known), encoding="utf-8")
    if replaced is not None:  # that one only: others may just be being written
        shutil.rmtree(pointer.parent / replaced, ignore_errors=True)  # who mapped it keeps it
    return index


def load(root: Path, arrays: Path, known: dict[str, Any]) -> Index:
    paths, offsets, groups = (
        np.load(arrays / f"{name}.npy", mmap_mode="r") for name in ("paths", "offsets", "groups")
    )
    base = root.parent if root.is_file() else root
    return Index(base, paths, offsets, groups, tuple(known["names"]), known["skipped"], arrays)
