"""This machine's disk: the cache directory, and files that are there whole or not at all."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from secrets import token_hex

import numpy as np


def cache_directory(name: str) -> Path:
    """Where Patchlight keeps what it can make anew: below PATCHLIGHT_CACHE, or the home."""
    given = os.environ.get("PATCHLIGHT_CACHE")
    return (Path(given) if given else Path.home() / ".cache" / "patchlight") / name


@contextmanager
def using(cache: Path, fix: str = "set the variable PATCHLIGHT_CACHE to one") -> Iterator[None]:
    """What goes wrong with a cache within is told as that, and with what to do.

    Raises:
        ValueError: it is no directory, not to be written to, full, or removed meanwhile.
    """
    try:
        yield
    except OSError as error:
        raise ValueError(
            f"the cache {cache} cannot be used ({error}); expected a directory that this user may "
            f"write to, on a disk with room; {fix}"
        ) from error


def size_of(path: Path) -> int:
    """Bytes of a file, -1 where there is none, in one look: others may remove it any time."""
    try:
        return path.stat().st_size
    except FileNotFoundError:
        return -1


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Where to write a file that takes the place of `path` when the block ends.

    Whoever reads `path` finds what was there before or all of the new one, after a power failure
    too.
    """
    beside = path.with_name(f".{path.name}.{token_hex(4)}")
    try:
        yield beside
        with beside.open("rb") as file:
            os.fsync(file.fileno())
        beside.replace(path)
        sync_directory(path.parent)
    finally:
        beside.unlink(missing_ok=True)


def write_whole(path: Path, content: bytes) -> None:
    with replacing(path) as beside:
        beside.write_bytes(content)


def save_whole(path: Path, array: np.ndarray) -> None:
    with replacing(path) as beside, beside.open("wb") as file:
        np.save(file, array)


def sync_directory(path: Path) -> None:
    """Make a rename in `path` survive a power failure (a no-op on Windows)."""
    if os.name == "posix":
        handle = os.open(path, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
