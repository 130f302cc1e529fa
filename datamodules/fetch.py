"""Files below a directory or behind a URL; remote ones by way of a cache on the disk.

Any number of processes on one machine may share a cache. What is in it is named by its checksum,
so data that was written anew is fetched anew. A file is fetched under a lock into a name of its
own and renamed once its size and checksum are right; the oldest make room for it. Who has opened
a file keeps it, even when it is removed meanwhile. A lock ends with its process.
"""

import contextlib
import hashlib
import os
import re
import time
from pathlib import Path
from typing import NamedTuple

from filelock import FileLock

from datamodules.disk import cache_directory, size_of, using
from datamodules.urls import Readable, insist, is_url

ABANDONED = 3600.0  # seconds after which half a file of a killed process may be removed
BLOCK = 1 << 20
UNITS = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}
FIX = (
    "set data.source_args.cache to one, or cache_size to less. `patchlight fit --resume RUN` goes "
    "on with a run"
)


class Stored(NamedTuple):
    """A file below a root: its relative name, its bytes, and its SHA-256 in hexadecimal."""

    name: str
    size: int
    sha256: str


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


class Files:
    """Files below `root`, a directory or a URL.

    Args:
        cache: directory for remote files; None for that of Patchlight.
        capacity: bytes of remote files it may hold, those of `keep` aside.
    """

    def __init__(self, root: str, cache: str | None, capacity: int) -> None:
        self.root, self.capacity = root.rstrip("/"), capacity
        self.is_remote = is_url(root)
        # A directory of our own: what lies in it is removed to make room.
        self.cache = Path(cache) / "patchlight-shards" if cache else cache_directory("shards")

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
            except OSError as error:
                raise ValueError(
                    f"{path} cannot be opened ({error}); make it readable for this user"
                ) from error
            if opened.size != file.size:
                raise self.complaint(file, f"has {opened.size:,} bytes")
            if self.is_remote:
                with contextlib.suppress(OSError):  # removed just now, or another user's
                    os.utime(path)  # the one used last is removed last
            return opened

    def complaint(self, file: Stored, what: str) -> ValueError:
        return ValueError(
            f"{self.where(file.name)} {what}; index.json says {file.size:,} bytes. Copy it again "
            f"from where it was written, or write the shards anew with `patchlight shard`"
        )

    def path(self, file: Stored, keep: bool = False) -> Path:
        """Where a file is on this machine, fetched if need be; with `keep` never removed.

        Raises:
            ValueError: it cannot be fetched, or the cache cannot be used.
        """
        if not self.is_remote:
            return Path(self.where(file.name))
        folder = self.cache / "kept" if keep else self.cache
        path = folder / f"{file.sha256}{Path(file.name).suffix}"
        with using(self.cache, FIX):
            if size_of(path) == file.size:
                return path
            (self.cache / "locks").mkdir(parents=True, exist_ok=True)
            folder.mkdir(exist_ok=True)
            with FileLock(self.cache / "locks" / file.sha256[:2]):
                # Another process may have fetched it meanwhile, or damaged it before.
                if size_of(path) != file.size:
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
        OSError: it does not come; or is longer, shorter or of another content.
        ValueError: it cannot be written, so there is no use in asking again.
    """
    digest, count = hashlib.sha256(), 0
    with using(target.parent, FIX):
        out = target.open("r+b" if target.exists() else "wb", buffering=0)
    with out:
        while count <= file.size and (block := source.read(BLOCK)):
            digest.update(block)
            count += len(block)
            with using(target.parent, FIX):
                rest = memoryview(block)
                while rest:  # a disk that is almost full takes less
                    rest = rest[out.write(rest) :]
        out.truncate()
        with using(target.parent, FIX):
            os.fsync(out.fileno())  # of a file that is there only the size is looked at
    if count != file.size:
        more = "more than " if count > file.size else ""
        raise OSError(f"{more}{min(count, file.size):,} of {file.size:,} bytes came")
    if digest.hexdigest() != file.sha256:
        raise OSError("its SHA-256 is not that of index.json, so it was changed or damaged")
