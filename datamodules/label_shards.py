"""Label maps on disk: shards of many images, written atomically, read image by image.

A directory has `maps.json`, which says what all its maps have in common (`About`), and shards
`maps-00000.safetensors`, ... A shard holds, for its n images with c cells in all:

    scores    float16 [c, k]  the k highest scores of each cell, before softmax
    ids       int32 [c, k]    their classes
    remainder float16 [c]     log of the sum of exp(score) over all other classes; may be absent
    grids     int32 [n, 2]    rows and columns of each map; 0 for an image that could not be read
    stamps    int64 [n]       when the image's file was last changed, in ns; see `stamp_of`
    names     uint8           the images' names one after another, UTF-8, each ended by a line feed

and in its metadata the same `About`, so that shards of several teachers are never mixed. Cells
stand row by row, image after image. A shard is written under another name and then renamed,
so one that is there is whole.
"""

import json
import os
import zlib
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from datamodules.disk import replacing
from datamodules.label_geometry import LabelMap
from datamodules.sources import BadImageError, Source, with_channels

ABOUT = "maps.json"
SHARDS = "maps-*.safetensors"
PARTS = {
    "scores": ("F16", 2),
    "ids": ("I32", 2),
    "grids": ("I32", 2),
    "stamps": ("I64", 1),
    "names": ("U8", 1),
}
Rest = Literal["zeros", "teacher"]
AGAIN = "delete it and run `patchlight relabel` again, which makes what is missing"


@dataclass(frozen=True)
class About:
    """What all maps of a directory have in common.

    teacher:       whose scores they are, in words
    num_classes:   classes that it knows
    top_k:         of which each cell keeps so many
    remainder:     the others' share is kept as well
    fingerprint:   of the teacher's weights and options; empty for maps that were imported
    interpolation: with which images were stretched, alike
    precision:     in which it scored them, alike
    """

    teacher: str
    num_classes: int
    top_k: int
    remainder: bool
    fingerprint: str = ""
    interpolation: str = ""
    precision: str = ""

    def __post_init__(self) -> None:
        if not 1 <= self.top_k <= self.num_classes:
            raise ValueError(
                f"top_k is {self.top_k}; expected 1 to {self.num_classes}, the number of classes"
            )

    def text(self) -> str:
        return json.dumps(asdict(self), indent=1) + "\n"


class Labelled(NamedTuple):
    """The map of one image, as it is stored.

    name:      see `name_of`
    stamp:     see `stamp_of`
    scores:    float16 [rows, columns, k]
    ids:       int32 [rows, columns, k]
    remainder: float16 [rows, columns], or None
    """

    name: str
    stamp: int
    scores: Tensor
    ids: Tensor
    remainder: Tensor | None


def name_of(source: Source, index: int, root: str | None) -> str:
    """The path of an image below the root, so that a data set may be moved."""
    name = source.describe(index)
    if root is not None and os.path.isabs(name):
        start = os.path.abspath(os.path.expanduser(root))
        start = os.path.dirname(start) if os.path.isfile(start) else start  # a list of images
        name = os.path.abspath(name).removeprefix(os.path.join(start, ""))
    name = name.replace("\n", "\\n")  # which ends a name in a shard
    return name.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")


def stamp_of(source: Source, index: int, is_first: bool = False) -> int:
    """When the file of an image was last changed, in ns.

    Without a file -1, or for the first image of a shard, which stands for the others, a smaller
    number that its grey pixels tell: scenes of other options have the same names.
    """
    try:
        return os.stat(source.describe(index)).st_mtime_ns
    except OSError:
        pass
    try:
        return -2 - zlib.crc32(with_channels(source[index].image, 1).tobytes()) if is_first else -1
    except BadImageError:
        return -1


def shard_path(directory: Path, number: int) -> Path:
    return directory / f"maps-{number:05d}.safetensors"


def write_shard(directory: Path, about: About, number: int, maps: Sequence[Labelled]) -> None:
    """Write one shard, in the place of one of that number."""
    grids = [tuple(one.scores.shape[:2]) for one in maps]
    names = "".join(f"{one.name}\n" for one in maps).encode()
    remainders = [one.remainder for one in maps if one.remainder is not None]
    assert len(remainders) in (0, len(maps))
    tensors = {
        "scores": torch.cat([one.scores.half().flatten(0, 1) for one in maps]),
        "ids": torch.cat([one.ids.int().flatten(0, 1) for one in maps]),
        "grids": torch.tensor(grids, dtype=torch.int32),
        "stamps": torch.tensor([one.stamp for one in maps]),
        "names": torch.frombuffer(bytearray(names), dtype=torch.uint8),
    }
    if remainders:
        tensors["remainder"] = torch.cat([one.half().flatten() for one in remainders])
    told = {"about": about.text()}
    with replacing(shard_path(directory, number)) as beside:
        save_file(tensors, beside, told)


def is_whole(
    number: int, rows: range, directory: Path, about: About, source: Source, root: str | None
) -> bool:
    """Whether a shard is there, of these images as they are now, and made alike."""
    path = shard_path(directory, number)
    if not path.is_file():
        return False
    try:
        shard = Shard(path, about)
    except ValueError:  # damaged, or of another teacher: made anew
        return False
    stamps = [stamp_of(source, i, i == rows.start) for i in rows]
    names = [name_of(source, i, root) for i in rows]
    return shard.names == names and bool(np.array_equal(shard.stamps, stamps))


def clear(directory: Path, num_shards: int) -> None:
    """Remove what earlier runs left: shards beyond the last, and halves of files."""
    kept = {shard_path(directory, number) for number in range(num_shards)}
    for path in (*directory.glob(SHARDS), *directory.glob(f".{SHARDS}.*")):
        if path not in kept:
            path.unlink(missing_ok=True)


def begin(directory: Path, about: About) -> None:
    """Make the directory, or go on in one that was begun alike.

    Raises:
        ValueError: one that holds maps of another teacher or other options, or a file.
    """
    try:
        directory.mkdir(parents=True, exist_ok=True)
    except FileExistsError:
        raise ValueError(
            f"{directory} is a file; expected a directory for the maps, name another"
        ) from None
    if (directory / ABOUT).exists():
        before = read_about(directory)
        for field in fields(About):
            old, new = (getattr(each, field.name) for each in (before, about))
            if old != new:
                raise ValueError(
                    f"{directory} holds maps with {field.name} {old!r}, now it is {new!r}; name "
                    f"another directory, or delete this one"
                )
        return
    with replacing(directory / ABOUT) as beside:
        beside.write_text(about.text(), encoding="utf-8")


def read_about(directory: Path) -> About:
    """What the maps of a directory have in common.

    Raises:
        ValueError: no directory of maps.
    """
    path = directory / ABOUT
    try:
        return About(**json.loads(path.read_text(encoding="utf-8")))
    except FileNotFoundError:
        raise ValueError(
            f"{directory} holds no label maps (no {ABOUT}); make them with `patchlight relabel`"
        ) from None
    except (OSError, ValueError, TypeError) as error:
        raise ValueError(f"{path} is damaged ({error}); {AGAIN}") from error


class Shard:
    """A shard that is there: what is small of it in memory, the rest mapped.

    Raises:
        ValueError: a damaged file, or maps of another kind than `about`.
    """

    def __init__(self, path: Path, about: About) -> None:
        self.path, self.about = path, about
        self.file: Any = None
        try:
            file = self.opened()
            self.check(file)
            grids = file.get_tensor("grids").numpy().astype(np.int64)
            self.stamps = file.get_tensor("stamps").numpy()
            self.names = file.get_tensor("names").numpy().tobytes().decode().split("\n")[:-1]
            self.grids, self.ends = grids, np.concatenate(([0], grids.prod(axis=1).cumsum()))
            cells = file.get_slice("scores").get_shape()[0]
            if not len(self.names) == len(self.stamps) == len(grids) or self.ends[-1] != cells:
                raise ValueError("its parts are of different length")
        except (SafetensorError, OSError, ValueError) as error:
            raise ValueError(f"{path} is damaged ({error}); {AGAIN}") from error

    def check(self, file: Any) -> None:
        parts = PARTS | ({"remainder": ("F16", 1)} if self.about.remainder else {})
        for name, (kind, axes) in parts.items():
            part = file.get_slice(name)
            if part.get_dtype() != kind or len(part.get_shape()) != axes:
                raise ValueError(f"{name} is {part.get_dtype()} {part.get_shape()}")
        for name in ("scores", "ids"):
            if (k := file.get_slice(name).get_shape()[1]) != self.about.top_k:
                raise ValueError(f"{name} has {k} classes a cell; {ABOUT} says {self.about.top_k}")
        if (file.metadata() or {}).get("about") != self.about.text():
            raise ValueError(f"it is of another teacher or other options than {ABOUT} says")

    def opened(self) -> Any:
        if self.file is None:
            self.file = safe_open(self.path, "pt")
        return self.file

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"file": None}  # every process maps it anew

    def __len__(self) -> int:
        return len(self.names)

    def read(self, row: int, rest: Rest) -> LabelMap:
        start, end = int(self.ends[row]), int(self.ends[row + 1])
        file, grid = self.opened(), tuple(self.grids[row].tolist())
        scores, ids = (file.get_slice(name)[start:end] for name in ("scores", "ids"))
        others = np.zeros(grid, dtype=np.float32)
        left = self.about.num_classes - self.about.top_k
        if rest == "teacher" and left:
            remainder = file.get_slice("remainder")[start:end].float().numpy()
            others = remainder.reshape(grid) - np.float32(np.log(left))
        shape = (*grid, self.about.top_k)
        return LabelMap(scores.float().numpy().reshape(shape), ids.numpy().reshape(shape), others)

    def check_values(self) -> None:
        """Read all of it.

        Raises:
            ValueError: scores that are no numbers, classes that do not exist; names the image.
        """
        file = self.opened()
        ids = file.get_tensor("ids")
        is_good = ((ids >= 0) & (ids < self.about.num_classes)).all(dim=1)
        is_good &= file.get_tensor("scores").isfinite().all(dim=1)
        if self.about.remainder:
            is_good &= file.get_tensor("remainder").isfinite()
        if not bool(is_good.all()):
            cell = int((~is_good).nonzero()[0])
            row = int(np.searchsorted(self.ends, cell, side="right")) - 1
            raise ValueError(
                f"{self.path}: the map of {self.names[row]} has scores that are no numbers, or "
                f"classes outside 0 to {self.about.num_classes - 1}; {AGAIN}"
            )
