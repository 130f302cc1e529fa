"""Writing shards: the images of a source in tar files that `datamodules.shards` reads.

Training images are put into a random order first, always the same one, so that every shard holds
images of all classes; held-out ones keep theirs. Files are copied as they are, arrays become PNG.
Where a conversion was killed, the next one goes on after the last whole shard and writes the same
bytes as if it had not been.
"""

import errno
import hashlib
import json
import os
import shutil
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from io import BytesIO
from pathlib import Path
from tarfile import USTAR_FORMAT, TarInfo
from typing import Any, NamedTuple, Protocol, runtime_checkable

import numpy as np
from filelock import FileLock, Timeout
from PIL import Image

from datamodules.disk import save_whole, sync_directory, write_whole
from datamodules.fetch import digest_of
from datamodules.folder import decode
from datamodules.progress import Bar
from datamodules.sampling import epoch_order
from datamodules.shards import FORMAT, INDEX, MEMBER
from datamodules.sources import BadImageError, Source

WORK = ".unfinished"  # what a conversion that was killed goes on from
TOLD = "told.json"  # what it was asked for
CHUNK = 64  # images that are read and decoded at once, in threads
END = b"\0" * 1024  # of a tar file


@runtime_checkable
class Filed(Source, Protocol):
    """A source whose images are files."""

    def stored(self, index: int) -> bytes: ...

    def label(self, index: int) -> int: ...


class Entry(NamedTuple):
    """An image as it goes into a shard: its file and what is known of it; or why it does not.

    name:    of its file, below the directory of the source
    size:    (height, width)
    problem: why it cannot be read, and then nothing else but its name is known
    """

    name: str
    content: bytes = b""
    suffix: str = ""
    size: tuple[int, int] = (0, 0)
    label: int = -1
    problem: str | None = None


def entry_of(source: Source, number: int, root: str) -> Entry:
    """One image, decoded to see whether that can be done."""
    name = source.describe(number).removeprefix(f"{root}/")
    try:
        if not isinstance(source, Filed):
            image, label, _ = source[number]
            return Entry(name, png(image), "png", (image.shape[0], image.shape[1]), label)
        content = source.stored(number)
        height, width, _ = decode(BytesIO(content), source.channels, name).shape
        with Image.open(BytesIO(content)) as opened:
            suffix = {"JPEG": "jpg", "MPO": "jpg"}.get(opened.format or "", opened.format or "img")
    except BadImageError as error:
        return Entry(name, problem=error.reason)
    return Entry(name, content, suffix.lower(), (height, width), source.label(number))


def png(image: np.ndarray) -> bytes:
    """uint8 [h, w, 1 or 3] as a file; grey where all channels are alike."""
    is_grey = bool((image == image[:, :, :1]).all())
    file = BytesIO()
    Image.fromarray(image[:, :, 0] if is_grey else image).save(file, "PNG")
    return file.getvalue()


def entries(source: Source, order: np.ndarray, workers: int, root: str) -> Iterator[Entry]:
    """The images of a source in an order."""
    with ThreadPoolExecutor(workers) as pool:
        for chunk in np.split(order, range(CHUNK, len(order), CHUNK)):
            yield from pool.map(lambda number: entry_of(source, number, root), chunk.tolist())


def tar_member(name: str, content: bytes) -> bytes:
    """A file with its header, the same for the same content."""
    info = TarInfo(name)
    info.size = len(content)
    return info.tobuf(USTAR_FORMAT) + content + b"\0" * (-len(content) % 512)


class Writer:
    """One shard: filled under another name, renamed once it is whole.

    Args:
        path: the tar file.
        work: directory of what is unfinished.
        done: images of its order before it, readable or not.
        written: images in the shards before it.
    """

    def __init__(self, path: Path, work: Path, done: int, written: int) -> None:
        self.path, self.work, self.done, self.written = path, work, done, written
        self.members: list[tuple[int, int, int, int, int]] = []
        self.bad: list[tuple[str, str]] = []
        self.digest, self.size = hashlib.sha256(), 0
        self.part = work / f"{path.name}.part"
        self.file = self.part.open("wb")

    def put(self, content: bytes) -> None:
        self.file.write(content)
        self.digest.update(content)
        self.size += len(content)

    def add(self, entry: Entry, class_names: tuple[str, ...]) -> None:
        self.done += 1
        if entry.problem is not None:
            self.bad.append((entry.name, entry.problem))
            return
        key = f"{self.written + len(self.members):09d}"
        about: dict[str, Any] = {"label": entry.label, "file": entry.name}
        if 0 <= entry.label < len(class_names):
            about["class"] = class_names[entry.label]
        place = self.size + 512
        self.put(tar_member(f"{key}.{entry.suffix}", entry.content))
        self.put(tar_member(f"{key}.json", json.dumps(about).encode()))
        self.members.append((place, len(entry.content), *entry.size, entry.label))

    def close(self) -> None:
        """Make it one of the finished ones: its table first, then its record, which counts."""
        self.put(END)
        self.file.flush()
        os.fsync(self.file.fileno())
        self.file.close()
        if self.members:
            self.part.replace(self.path)
            sync_directory(self.path.parent)
        record = {
            "name": f"{self.path.parent.name}/{self.path.name}",
            "samples": len(self.members),
            "bytes": self.size,
            "sha256": self.digest.hexdigest(),
            "done": self.done,
            "bad": self.bad,
        }
        stem = self.work / f"{self.path.parent.name}-{self.path.stem}"
        save_whole(stem.with_suffix(".npy"), np.array(self.members, MEMBER))
        write_whole(stem.with_suffix(".json"), json.dumps(record).encode())


def order_of(source: Source, part: str) -> np.ndarray:
    return epoch_order(len(source), 0, 0) if part == "train" else np.arange(len(source))


def write_part(
    source: Source, part: str, out: Path, shard_size: int, workers: int, root: str, bar: Bar
) -> None:
    """The shards of a part that are not there yet."""
    (out / part).mkdir(parents=True, exist_ok=True)
    work, order = out / WORK, order_of(source, part)
    records = finished(work, part)
    done = int(records[-1]["done"]) if records else 0
    bar.advance(done)
    number, written = len(records), sum(int(record["samples"]) for record in records)
    names = tuple(source.class_names)
    writer = Writer(out / part / f"{number:06d}.tar", work, done, written)
    for entry in entries(source, order[done:], workers, root):
        writer.add(entry, names)
        bar.advance()
        if writer.size >= shard_size:
            writer.close()
            number, written = number + 1, written + len(writer.members)
            writer = Writer(out / part / f"{number:06d}.tar", work, writer.done, written)
    if writer.members or writer.bad:
        writer.close()
    writer.file.close()


def part_index(out: Path, part: str) -> dict[str, Any]:
    """What the index says of a part, whose table is written."""
    work = out / WORK
    records = [record for record in finished(work, part) if record["samples"]]
    tables = [
        np.load(work / f"{part}-{i:06d}.npy", allow_pickle=False) for i in range(len(records))
    ]
    shards = [{k: r[k] for k in ("name", "samples", "bytes", "sha256")} for r in records]
    members = np.concatenate(tables) if tables else np.array([], MEMBER)
    return {"shards": shards, "members": write_members(out / part, members)}


def write_members(directory: Path, members: np.ndarray) -> dict[str, Any]:
    """Write the table of a part; returns what the index says of it."""
    path = directory / "members.npy"
    save_whole(path, members)
    name, size = f"{directory.name}/{path.name}", path.stat().st_size
    return {"name": name, "bytes": size, "sha256": digest_of(path)}


def write_index(out: Path, class_names: Sequence[str], parts: dict[str, Any]) -> None:
    index = {"format": FORMAT, "class_names": list(class_names), "parts": parts}
    write_whole(out / INDEX, json.dumps(index, indent=1).encode())


def finished(work: Path, part: str) -> list[dict[str, Any]]:
    """What is known of the whole shards of a part, in order."""
    return [json.loads(path.read_bytes()) for path in sorted(work.glob(f"{part}-*.json"))]


def unreadable(out: Path) -> list[tuple[str, str]]:
    """Names of the images that were left out of an unfinished conversion, and why."""
    paths = sorted((out / WORK).glob("*-*.json"))
    return [(name, why) for path in paths for name, why in json.loads(path.read_bytes())["bad"]]


def convert(
    sources: dict[str, Source],
    out: Path,
    shard_size: int,
    workers: int,
    told: dict[str, Any],
    root: str,
) -> list[tuple[str, str]]:
    """Write the parts of a data set into `out`, or go on doing so.

    Args:
        sources: by part, "train" and "val".
        shard_size: bytes of a shard, from which on the next one begins.
        workers: threads that read and decode.
        told: what was asked for; a conversion goes on only with the same.
        root: directory of the sources; names of their files are kept relative to it.

    Returns:
        Names of images that could not be read and were left out, and why.

    Raises:
        ValueError: something else is in `out`, no readable image, no space left.
    """
    told = {
        **told,
        "shard_size": shard_size,
        "images": {part: len(source) for part, source in sources.items()},
        "class_names": list(sources["train"].class_names),
    }
    refuse_others(out)
    try:
        (out / WORK).mkdir(parents=True, exist_ok=True)
        with (
            FileLock(out / WORK / "lock", timeout=0),
            Bar("images", sum(map(len, sources.values()))) as bar,
        ):
            begin(out, told)
            for part, source in sources.items():
                write_part(source, part, out, shard_size, workers, root, bar)
            return finish(out, told)
    except Timeout as error:
        raise ValueError(f"another process is writing to {out}; wait for it, or stop it") from error
    except OSError as error:
        is_full = error.errno == errno.ENOSPC
        what = f"no space left in {out}; make room" if is_full else f"{out}: {error}; mend that"
        raise ValueError(
            f"{what} and give the same command again: it goes on after the last whole shard"
        ) from error


def refuse_others(out: Path) -> None:
    """
    Raises:
        ValueError: `out` has files, but not of a conversion.
    """
    if (out / WORK / TOLD).is_file() or not out.exists():
        return
    if not out.is_dir() or any(path.name != WORK for path in out.iterdir()):
        raise ValueError(f"--out {out} is not empty; expected a new directory")


def begin(out: Path, told: dict[str, Any]) -> None:
    """Under the lock: nobody else has begun, or finished, meanwhile.

    Raises:
        ValueError: `out` has files, but not of a conversion that was asked for like this one.
    """
    refuse_others(out)
    plan = out / WORK / TOLD
    if not plan.is_file():
        write_whole(plan, json.dumps(told).encode())
        return
    before = json.loads(plan.read_bytes())
    for name in told:
        if before.get(name) != told[name]:
            raise ValueError(
                f"{out} holds a conversion that was begun with another {name}; give the same "
                f"command to go on with it, or remove the directory"
            )


def finish(out: Path, told: dict[str, Any]) -> list[tuple[str, str]]:
    """Write the tables, the list of what was left out, and the index, which counts.

    Raises:
        ValueError: no readable image in a part.
    """
    parts, bad = {part: part_index(out, part) for part in told["images"]}, unreadable(out)
    for part, content in parts.items():
        if not content["shards"]:
            raise ValueError(
                f"none of the {told['images'][part]:,} {part} images can be read, the first is "
                f"{bad[0][0]} ({bad[0][1]}); `patchlight check-data` lists them"
            )
    lines = "".join(f"{name}\t{why}\n" for name, why in bad)
    write_whole(out / "unreadable.txt", lines.encode("utf-8", "backslashreplace"))
    write_index(out, told["class_names"], parts)
    shutil.rmtree(out / WORK)
    return bad
