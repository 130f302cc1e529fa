"""Images in tar files, in a directory or behind a URL, as `patchlight shard` writes them.

A tar file (a shard) holds thousands of images in WebDataset's layout, `KEY.jpg` beside `KEY.json`.
`index.json` names the shards and their checksums, and for each part a table of where every image
lies in its shard, so that one read fetches it. Only JSON, this table and image files are ever
read; nothing is unpickled, nothing unpacked.

Why neither litdata nor webdataset reads them: the order of samples is ours
(`datamodules.sampling.grouped_order`), so a source has only to give any image by its number.
In a trial on 1,000 images in 20 shards, the order of both depended on the number of workers.
webdataset 1.0.2 has neither access by number nor a state to resume from, and unpickles `.pyd`
members by default. litdata 0.2.76 resumed exactly with as many workers or fewer, but did not
come back with more; took each run of 50 images from one shard; kept 100 kB in a cache of 30 kB when
asked for images by number; and unpickles by default what its index says is a pickle.
"""

import json
import re
from collections import OrderedDict
from io import BytesIO
from pathlib import Path
from queue import Queue
from threading import Thread
from typing import Any, NamedTuple

import numpy as np

from datamodules.fetch import Files, Opened, Stored, bytes_of, said
from datamodules.folder import decode
from datamodules.sampling import Groups
from datamodules.sources import BadImageError, Example, Split
from datamodules.urls import is_url

INDEX = "index.json"
FORMAT = "patchlight shards 1"
WINDOWS = 3  # on the disk: the one that is read, the next one, and part of a third
FETCHERS = 4  # shards that are fetched at once ahead of time
# Where an image lies in its shard, its size in pixels, and its class or -1.
MEMBER = np.dtype(
    [
        *(("offset", "<i8"), ("length", "<i4")),
        *(("height", "<i4"), ("width", "<i4"), ("label", "<i4")),
    ]
)


class Shard(NamedTuple):
    """One tar file and how many images it holds."""

    file: Stored
    samples: int


class Part(NamedTuple):
    """The training or the held-out images: their shards in order, and the table of members."""

    shards: tuple[Shard, ...]
    members: Stored


def holds_shards(root: str) -> bool:
    """Whether a directory was written by `patchlight shard`."""
    return not is_url(root) and (Path(root) / INDEX).is_file()


def is_plain(name: str) -> bool:
    """Whether an index may name this path: it means the same everywhere, and leads nowhere else."""
    return re.fullmatch(r"\w[\w.-]*(/\w[\w.-]*)*", name) is not None


def stored(entry: dict[str, Any]) -> Stored:
    """
    Raises:
        ValueError: a name that leads out of the directory, or no checksum.
    """
    name, digest = str(entry["name"]), str(entry["sha256"])
    if not is_plain(name):
        raise ValueError(f"it names a file {name!r}, which is no plain path below it")
    if not re.fullmatch("[0-9a-f]{64}", digest):
        raise ValueError(f"the sha256 of {name} is {digest!r}; expected 64 hexadecimal digits")
    return Stored(name, int(entry["bytes"]), digest)


def read_index(files: Files) -> tuple[tuple[str, ...], dict[str, Part]]:
    """Class names, and the parts by name.

    Raises:
        ValueError: no index, or one that does not read as such.
    """
    where = files.where(INDEX)
    try:
        content = files.read(INDEX)
    except OSError as error:
        raise ValueError(
            f"data.root {files.root} holds no {INDEX} ({error}); expected what `patchlight shard "
            f"--data DIRECTORY --out {files.root}` writes when it has finished"
        ) from error
    try:
        index = json.loads(content)
        if index["format"] != FORMAT:
            raise ValueError(f"its format is {index['format']!r}; expected {FORMAT!r}")
        parts = {}
        for name, part in index["parts"].items():
            shards = tuple(Shard(stored(s), int(s["samples"])) for s in part["shards"])
            parts[str(name)] = Part(shards, stored(part["members"]))
        names = index["class_names"]
        if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
            raise ValueError(f"its class_names are {str(names)[:40]!r}; expected a list of names")
        return tuple(names), parts
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        what = f"{error!r}" if isinstance(error, KeyError) else str(error)
        raise ValueError(f"{where} is no index of shards: {what}") from error


def read_members(files: Files, part: Part, num_classes: int) -> np.ndarray:
    """The table of a part, mapped from its file.

    Raises:
        ValueError: it is not there, not of these shards, or has classes that there are not.
    """
    files.open(part.members, keep=True)  # it is there, and of its size
    path = files.path(part.members, keep=True)
    try:
        members: np.ndarray = np.load(path, mmap_mode="r", allow_pickle=False)
    except (ValueError, EOFError, OSError) as error:
        where = files.where(part.members.name)
        raise ValueError(f"{where} is no table of members: {error}") from error
    total = sum(shard.samples for shard in part.shards)
    if members.dtype != MEMBER or members.shape != (total,):
        raise ValueError(
            f"{files.where(part.members.name)} has {members.dtype} {members.shape}; expected the "
            f"places of {total:,} images; write the shards anew with `patchlight shard`"
        )
    low, high = int(members["label"].min(initial=0)), int(members["label"].max(initial=-1))
    if low < -1 or high >= num_classes:
        raise ValueError(
            f"{files.where(part.members.name)} has labels from {low} to {high}, and {INDEX} names "
            f"{num_classes} classes; expected less than that, or -1 for none; write the shards "
            f"anew with `patchlight shard`"
        )
    return members


class Shards:
    """Images of the shards below `root`, a directory or a URL.

    A directory is read in place. From a URL (http, https, file, and such as s3, gs or hf where
    fsspec and its plug-in know it) shards are fetched into a cache on the disk, ahead of time, and
    those used longest ago make room. Training then takes an order that needs few shards at a
    time: see `groups`.

    Args:
        cache: directory for fetched shards, best on a disk of the machine itself; null for one
            beside Patchlight's other caches (PATCHLIGHT_CACHE, or ~/.cache/patchlight).
        cache_size: bytes of shards that it may hold, such as 200G. As large as the data, it
            fetches them once; else in every epoch.
        shuffle_shards: shards whose images are shuffled together; shards themselves always are.

    Raises:
        ValueError: no shards there, or a cache that does not hold those that are read together.
    """

    def __init__(
        self,
        split: Split,
        root: str | None,
        channels: int,
        cache: str | None = None,
        cache_size: str | int = "64G",
        shuffle_shards: int = 16,
    ) -> None:
        if root is None:
            raise ValueError(
                "source shards needs data.root: a directory or URL of what `patchlight shard` wrote"
            )
        if shuffle_shards < 1:
            raise ValueError(f"shuffle_shards is {shuffle_shards}; expected at least 1")
        self.files = Files(root, cache, bytes_of(cache_size, "cache_size"))
        self.class_names, parts = read_index(self.files)
        if split not in parts or not parts[split].shards:
            raise ValueError(
                f"{self.files.where(INDEX)} has no {split} images, only {', '.join(parts)}"
            )
        self.channels, part = channels, parts[split]
        self.shards = part.shards
        starts = np.cumsum([0, *(shard.samples for shard in self.shards)])
        self.groups = Groups(starts, min(shuffle_shards, len(self.shards)))
        self.check_room()
        self.members = read_members(self.files, part, len(self.class_names))
        self.opened: OrderedDict[int, Opened] = OrderedDict()
        self.wanted: Queue[Stored] | None = None

    def check_room(self) -> None:
        sizes = sorted((shard.file.size for shard in self.shards), reverse=True)
        needed = sum(sizes[: WINDOWS * self.groups.together])
        if self.files.is_remote and needed > self.files.capacity:
            raise ValueError(
                f"cache_size {said(self.files.capacity)} is too little for the "
                f"{min(len(sizes), WINDOWS * self.groups.together)} shards that have to be at hand "
                f"(three times shuffle_shards, {self.groups.together}); set it to at least "
                f"{said(needed)} in data.source_args, or shuffle_shards to less"
            )

    def __getstate__(self) -> dict[str, Any]:
        """For a process that is not forked: open files and threads stay here."""
        return {**self.__dict__, "opened": OrderedDict(), "wanted": None}

    def __len__(self) -> int:
        return int(self.groups.starts[-1])

    def __getitem__(self, index: int) -> Example:
        image = decode(BytesIO(self.stored(index)), self.channels, self.describe(index))
        return Example(image, self.label(index))

    def label(self, index: int) -> int:
        return int(self.members["label"][index])

    def stored(self, index: int) -> bytes:
        """The file of an image as it was put into its shard.

        Raises:
            BadImageError: it does not lie in the shard as the table says.
        """
        number, _ = self.find(index)
        member, shard = self.members[index], self.shards[number].file
        offset, length = int(member["offset"]), int(member["length"])
        if not 0 <= offset <= offset + length <= shard.size:
            raise BadImageError(self.describe(index), "it lies outside of its shard")
        opened = self.opened.pop(number, None)
        if opened is None:
            opened = self.files.open(shard)
        self.opened[number] = opened
        while len(self.opened) > 2 * self.groups.together:
            self.opened.popitem(last=False)
        return opened.read(offset, length)

    def find(self, index: int) -> tuple[int, int]:
        """The number of an image's shard, and its place in it."""
        number = int(np.searchsorted(self.groups.starts, index, side="right")) - 1
        return number, index - int(self.groups.starts[number])

    def size(self, index: int) -> tuple[int, int]:
        return int(self.members["height"][index]), int(self.members["width"][index])

    def sizes(self) -> np.ndarray:
        """int32 [n, 2], the size of every image."""
        return np.stack((self.members["height"], self.members["width"]), axis=1)

    def describe(self, index: int) -> str:
        number, place = self.find(index)
        return f"{self.files.where(self.shards[number].file.name)}[{place}]"

    def prefetch(self, items: np.ndarray) -> None:
        """Fetch the shards of these images, first wanted first, while others are read.

        What goes wrong here is left to whoever needs the shard.
        """
        if not self.files.is_remote:
            return
        numbers = np.searchsorted(self.groups.starts, items, side="right") - 1
        found, first = np.unique(numbers, return_index=True)
        if self.wanted is None:
            self.wanted = Queue()
            for _ in range(FETCHERS):
                Thread(target=fetch_ahead, args=(self.files, self.wanted), daemon=True).start()
        for number in found[np.argsort(first)].tolist():
            self.wanted.put(self.shards[number].file)


def fetch_ahead(files: Files, wanted: "Queue[Stored]") -> None:
    """Fetch what is wanted, for as long as the process lives."""
    while True:
        file = wanted.get()
        try:
            files.open(file)  # which also marks it as used
        except (ValueError, OSError):
            continue  # who needs the file will try again, and say so
