"""Files below a directory or behind a URL; remote ones by way of a cache on the disk.

Any number of processes on one machine may share a cache. What is in it is named by its checksum,
so data that was written anew is fetched anew. A file is fetched under a lock into a name of its
own and renamed once its size and checksum are right; the oldest make room for it. Who has opened
a file keeps it, even when it is removed meanwhile. A lock ends with its process.
"""

import contextlib
import errno
import hashlib
import os
import re
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from http.client import HTTPException
from pathlib import Path
from typing import Any, NamedTuple, Protocol, TypeVar, runtime_checkable

import fsspec
from filelock import FileLock

from datamodules.index import cache_directory

TRIES = 4
PAUSE = 1.0  # seconds before the second try; twice as many before each further one
TIMEOUT = 60.0  # seconds that a server may be silent
ABANDONED = 3600.0  # seconds after which half a file of a killed process may be removed
BLOCK = 1 << 20
T = TypeVar("T")
UNITS = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}


class Stored(NamedTuple):
    """A file below a root: its relative name, its bytes, and its SHA-256 in hexadecimal."""

    name: str
    size: int
    sha256: str


@runtime_checkable
class Readable(Protocol):
    """What comes from a URL."""

    def read(self, count: int = -1, /) -> bytes: ...


class Opened:
    """A file that any number of threads and forked processes may read, closed when none does."""

    def __init__(self, path: Path) -> None:
        self.number = -1
        self.number = os.open(path, os.O_RDONLY)
        self.size = os.fstat(self.number).st_size

    def read(self, offset: int, length: int) -> bytes:
        return os.pread(self.number, length, offset)

    def __del__(self) -> None:
        if self.number >= 0:
            os.close(self.number)


def bytes_of(text: str | int, name: str) -> int:
    """Bytes of an amount such as 64G, 256M or 1000.

    Raises:
        ValueError: no such amount.
    """
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMGT]?)i?B?", str(text).strip(), re.IGNORECASE)
    amount = int(float(found[1]) * UNITS[found[2].upper()]) if found else 0
    if amount < 1:
        raise ValueError(f"{name} is {text!r}; expected an amount of bytes, such as 256M or 64G")
    return amount


def said(amount: int) -> str:
    """An amount of bytes as `bytes_of` reads it, rounded up."""
    for unit in ("K", "M", "G"):
        if amount < 10 * 1024 * UNITS[unit]:
            return f"{-(-amount // UNITS[unit])}{unit}"
    return f"{-(-amount // UNITS['T'])}T"


def is_url(root: str) -> bool:
    return "://" in root


@contextlib.contextmanager
def opening_url(url: str) -> Iterator[Readable]:
    """What is at a URL: http, https and file by the standard library, others by fsspec.

    Raises:
        ValueError: of a kind that no installed package knows.
    """
    if url.startswith(("http://", "https://", "file://")):
        with urllib.request.urlopen(url, timeout=TIMEOUT) as answer:
            yield answer
        return
    try:
        opened: Any = fsspec.open(url, "rb")
    except (ImportError, ValueError) as error:
        raise ValueError(
            f"{url} cannot be read ({error}); install the package that knows it, such as s3fs, "
            f"gcsfs or huggingface_hub, or use an https:// address"
        ) from error
    with opened as file:
        yield file


def is_hopeless(error: Exception) -> bool:
    """Whether another try would only fail alike: not there, or not allowed."""
    if isinstance(error, urllib.error.HTTPError):
        return 400 <= error.code < 500 and error.code not in (408, 425, 429)
    reason = getattr(error, "reason", error)
    return isinstance(reason, FileNotFoundError | PermissionError)


def insist(url: str, read: Callable[[Readable], T]) -> T:
    """`read` of what is at a URL; again after a pause where the connection broke off.

    Raises:
        ValueError: it does not come, or is not what was expected.
    """
    for attempt in range(TRIES):
        if attempt:
            time.sleep(PAUSE * 2 ** (attempt - 1))
        try:
            with opening_url(url) as source:
                return read(source)
        except (OSError, EOFError, HTTPException) as error:
            if getattr(error, "errno", None) == errno.ENOSPC:
                raise ValueError(
                    f"no space left for {url} ({error}); set data.source_args.cache to a "
                    f"directory with more, or cache_size to less"
                ) from error
            last = error
            if is_hopeless(error):
                break
    raise ValueError(
        f"{url} could not be fetched in {attempt + 1} tries: {last}; check that it is there, whole "
        f"and readable from this machine; `patchlight fit --resume RUN` goes on with a run"
    ) from last


class Files:
    """Files below `root`, a directory or a URL.

    Args:
        cache: directory for remote files; None for that of Patchlight.
        capacity: bytes of remote files it may hold, those of `keep` aside.
    """

    def __init__(self, root: str, cache: str | None, capacity: int) -> None:
        self.root, self.capacity = root.rstrip("/"), capacity
        self.is_remote = is_url(root)
        self.cache = Path(cache) if cache else cache_directory().parent / "shards"

    def where(self, name: str) -> str:
        return f"{self.root}/{name}"

    def read(self, name: str) -> bytes:
        """A small file as it is now.

        Raises:
            ValueError: it cannot be fetched.
            FileNotFoundError: it is not in the directory.
        """
        if not self.is_remote:
            return Path(self.where(name)).read_bytes()
        return insist(self.where(name), lambda source: source.read())

    def open(self, file: Stored, keep: bool = False) -> Opened:
        """A file of the size it ought to have.

        Raises:
            ValueError: it is not there, cannot be fetched, or is another one.
        """
        while True:
            path = self.path(file, keep)
            try:
                opened = Opened(path)
            except FileNotFoundError:
                if self.is_remote:
                    continue  # removed just now, to make room for others
                raise self.complaint(file, "is not there") from None
            if opened.size != file.size:
                raise self.complaint(file, f"has {opened.size:,} bytes")
            if self.is_remote:
                with contextlib.suppress(FileNotFoundError):
                    os.utime(path)  # the one used last is removed last
            return opened

    def complaint(self, file: Stored, what: str) -> ValueError:
        return ValueError(
            f"{self.where(file.name)} {what}; index.json says {file.size:,} bytes. Copy it again "
            f"from where it was written, or write the shards anew with `patchlight shard`"
        )

    def path(self, file: Stored, keep: bool = False) -> Path:
        """Where a file is on this machine, fetched if need be; with `keep` never removed."""
        if not self.is_remote:
            return Path(self.where(file.name))
        folder = self.cache / "kept" if keep else self.cache
        path = folder / f"{file.sha256}{Path(file.name).suffix}"
        with contextlib.suppress(FileNotFoundError):
            if path.stat().st_size == file.size:
                return path
        (self.cache / "locks").mkdir(parents=True, exist_ok=True)
        folder.mkdir(exist_ok=True)
        with FileLock(self.cache / "locks" / file.sha256[:2]):
            # Another process may have fetched it meanwhile, or damaged it before.
            if not path.exists() or path.stat().st_size != file.size:
                self.fetch(file, path)
        return path

    def fetch(self, file: Stored, path: Path) -> None:
        part = path.with_suffix(".part")
        if path.parent == self.cache:
            self.make_room(file.size, part)
        url = self.where(file.name)
        try:
            insist(url, lambda source: copy(source, part, file))
        except BaseException:
            part.unlink(missing_ok=True)
            raise
        part.replace(path)

    def make_room(self, size: int, part: Path) -> None:
        """Remove the files used longest ago until so many bytes fit, and take them."""
        with FileLock(self.cache / "locks" / "room"):
            found = []
            for entry in os.scandir(self.cache):
                if entry.is_file() and entry.name != part.name:
                    with contextlib.suppress(FileNotFoundError):
                        status = entry.stat()
                        found.append((status.st_mtime, status.st_size, entry.path))
            taken = sum(size for _, size, _ in found)
            for when, bytes_, path in sorted(found):
                if taken + size <= self.capacity:
                    break
                if path.endswith(".part") and time.time() - when < ABANDONED:
                    continue  # it is just being fetched
                Path(path).unlink(missing_ok=True)
                taken -= bytes_
            with part.open("wb") as file:
                file.truncate(size)  # counted by others from now on


def digest_of(path: Path) -> str:
    """SHA-256 of a file, in hexadecimal; that of nothing where there is none."""
    digest = hashlib.sha256()
    with contextlib.suppress(FileNotFoundError), path.open("rb") as file:
        while block := file.read(BLOCK):
            digest.update(block)
    return digest.hexdigest()


def copy(source: Readable, target: Path, file: Stored) -> None:
    """
    Raises:
        OSError: what comes is longer, shorter or of another content.
    """
    digest, count = hashlib.sha256(), 0
    with target.open("r+b" if target.exists() else "wb") as out:
        while block := source.read(BLOCK):
            count += len(block)
            if count > file.size:
                break
            digest.update(block)
            out.write(block)
        out.truncate()
    if count != file.size:
        more = "more than " if count > file.size else ""
        raise OSError(f"{more}{min(count, file.size):,} of {file.size:,} bytes came")
    if digest.hexdigest() != file.sha256:
        raise OSError("its SHA-256 is not that of index.json, so it was changed or damaged")
