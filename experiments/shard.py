"""`patchlight shard`: put a data set into tar files, to be read from far away.

    patchlight shard --data DIRECTORY --out SHARDS [--shard-size 256M] [--workers N]
    patchlight shard --data torchvision:NAME --root DIRECTORY --out SHARDS
    patchlight shard --data RECIPE.yaml --out SHARDS
    patchlight shard --index DIRECTORY    with train/*.tar and val/*.tar, written by others

Image files are copied as they are; what is no file becomes PNG. Images that cannot be read are
left out and listed in SHARDS/unreadable.txt. Given again after it was stopped, the same command
goes on, and ends with the same files. Copy SHARDS anywhere; a recipe reads it with

    source: shards
    root: SHARDS, or its URL
"""

import argparse
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from datamodules.convert import WORK, convert
from datamodules.fetch import bytes_of
from datamodules.foreign import index_tars
from datamodules.shards import INDEX, holds_shards
from datamodules.sources import Source, open_source
from experiments.subject import read_yaml


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(
        prog="patchlight shard", description=(__doc__ or "").splitlines()[0], allow_abbrev=False
    )
    what = made.add_mutually_exclusive_group(required=True)
    what.add_argument("--data", help="a directory, a list file, a source or recipe")
    what.add_argument("--index", type=Path, help="a directory of tar files in WebDataset's layout")
    made.add_argument("--root", help="where the files of a named source are")
    made.add_argument("--out", type=Path, help="a new directory, with --data")
    made.add_argument("--shard-size", default="256M", help="of a tar file (default: 256M)")
    made.add_argument(
        "--workers", type=int, default=os.cpu_count(), help="threads that decode; all cores"
    )
    return made


def source_of(data: str, root: str | None) -> dict[str, Any]:
    """Arguments of `open_source`, as JSON may hold them.

    Raises:
        ValueError: nothing there.
    """
    path = Path(data)
    if path.suffix in (".yaml", ".yml"):
        content = read_yaml(path, "--data")
        given = content.get("data") if isinstance(content, dict) else None
        arguments = given.get("init_args") if isinstance(given, dict) else None
        if not isinstance(arguments, dict) or "source" not in arguments:
            raise ValueError(f"--data {data} is no recipe that names data.init_args.source")
        options = {**(arguments.get("source_args") or {})}
        root = root or arguments.get("root")
        return {"name": arguments["source"], "root": root, **options}
    if path.exists():
        if root is not None:
            raise ValueError(f"--root {root} is for a named source, and --data {data} is files")
        return {"name": "shards" if holds_shards(data) else "folder", "root": data}
    if path.suffix or "/" in data:
        raise ValueError(
            f"--data {data} does not exist; expected a directory, a source or a recipe"
        )
    return {"name": data, "root": root}


def open_parts(arguments: dict[str, Any]) -> dict[str, Source]:
    options: dict[str, Any] = {"channels": 3, **arguments}
    return {
        "train": open_source(split="train", **options),
        "val": open_source(split="val", **options),
    }


def shard(argv: Sequence[str]) -> int:
    """The verb."""
    given = parser().parse_args(argv)
    if given.workers < 1:
        raise ValueError(f"--workers {given.workers}; expected at least 1")
    shard_size = bytes_of(given.shard_size, "--shard-size")
    if shard_size > 2**31:
        raise ValueError(f"--shard-size {given.shard_size}; expected at most 2G")
    console = Console(stderr=True, highlight=False, soft_wrap=True)
    if given.index is not None:
        return add_index(given.index, console)
    if given.out is None:
        raise ValueError("--data needs --out, the directory to write to")
    if (given.out / INDEX).is_file():
        raise ValueError(
            f"--out {given.out} is finished already: it has an {INDEX}; use it as it is, or name "
            f"another directory"
        )
    arguments = source_of(given.data, given.root)
    if (given.out / WORK).is_dir():
        console.print(f"going on with {given.out}", markup=False)
    root = str(Path(arguments["root"] or ".").expanduser().absolute())
    parts = open_parts(arguments)
    bad = convert(parts, given.out, shard_size, given.workers, {"source": arguments}, root)
    tell_bad(bad, console)
    if bad:
        console.print(f"they are listed in {given.out / 'unreadable.txt'}", markup=False)
    report(given.out, sum(map(len, parts.values())) - len(bad))
    return 0


def add_index(root: Path, console: Console) -> int:
    """`--index`."""
    found = index_tars(root)
    tell_bad(found.bad, console)
    for suffix, count in found.ignored.most_common():
        console.print(f"not used: {count:,} members of kind {suffix}", markup=False)
    console.print(
        "images are shuffled within source_args.shuffle_shards shards at a time, so shards that "
        "hold few classes each train badly; `--data` would mix them"
    )
    report(root, found.images)
    return 0


def tell_bad(bad: list[tuple[str, str]], console: Console) -> None:
    for name, why in bad[:20]:
        console.print(f"left out: {name} ({why})", markup=False)
    if bad:
        console.print(f"{len(bad):,} images could not be read and were left out", markup=False)


def report(out: Path, images: int) -> None:
    tars = [path for path in out.glob("*/*.tar")]
    size = sum(path.stat().st_size for path in tars)
    print(
        f"{images:,} images in {len(tars):,} shards, {size / 2**20:,.1f} MiB\n"
        f"in a recipe, here or wherever you copy {out} to:\n\n"
        f"data:\n  init_args:\n    source: shards\n    root: {out}  # or a URL: https, s3, gs, hf"
    )
