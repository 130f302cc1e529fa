"""An index for tar files that others wrote in WebDataset's layout.

Of every sample, the members of one tar file that share a name up to its first dot, the image is
kept by where it lies, and its label read from KEY.cls (a number or a name) or, where that gives
none, from "label" or "cls" in KEY.json. What else there is, pickles above all, is never
opened, only counted.
"""

import json
import re
import tarfile
from collections import Counter
from io import BytesIO
from pathlib import Path
from typing import IO, Any, NamedTuple

import numpy as np

from datamodules.convert import write_index, write_members
from datamodules.fetch import digest_of
from datamodules.folder import read_size
from datamodules.index import EXTENSIONS, class_ids
from datamodules.progress import Bar
from datamodules.shards import INDEX, MEMBER, is_plain
from datamodules.sources import BadImageError

MAX_LABEL = 1 << 16  # bytes of a file with a label
MAX_CLASS = 1_000_000  # of numbered ones, all of which get a name


class Found(NamedTuple):
    """What was found in tar files.

    images:  how many
    bad:     names of images that cannot be read, and why
    ignored: members that are neither image nor label of one, by suffix
    """

    images: int
    bad: list[tuple[str, str]]
    ignored: Counter[str]


Samples = list[tuple[int, int, int, int, str]]  # offset, length, height, width, label or ""


def label_of(suffix: str, content: bytes, name: str) -> str:
    """The label that a small file gives, as text; "" where it gives none.

    Raises:
        ValueError: it is no text, or no JSON, or neither a name nor a number up to a million.
    """
    try:
        about = content.decode("utf-8").strip() if suffix == ".cls" else json.loads(content)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{name} is no label: {error}") from error
    found = about
    if suffix == ".json":
        found = about.get("label", about.get("cls")) if isinstance(about, dict) else None
    if found in (None, "", -1, "-1"):
        return ""
    if isinstance(found, bool) or not isinstance(found, int | str):
        raise ValueError(
            f"{name} has the label {json.dumps(found)[:80]}; expected one class, by its number or "
            f"its name"
        )
    if str(found).isdecimal() and int(found) > MAX_CLASS:
        raise ValueError(f"{name} has class {str(found)[:40]}; expected up to {MAX_CLASS:,}")
    return str(found)


def read_tar(path: Path, name: str, found: Found) -> Samples:
    """The samples of one tar file, in its order; `found` is told of the rest.

    Raises:
        ValueError: no plain tar file, a label that cannot be read, a sample with two images.
    """
    images: dict[str, tuple[int, int, int, int]] = {}
    labels: dict[str, str] = {}
    about: dict[str, tarfile.TarInfo] = {}  # JSON, which a .cls makes needless
    names: dict[str, str] = {}  # of the image files, by their samples
    try:
        with tarfile.open(path, "r:") as tar, path.open("rb") as file:
            for member in tar:
                if not member.isfile():
                    continue
                folder, _, base = member.name.rpartition("/")
                key = f"{folder}/{base.split('.')[0]}"
                suffix, where = Path(base).suffix.lower(), f"{name}[{member.name}]"
                if base.startswith("."):  # such as what macOS adds; no sample either
                    found.ignored["hidden"] += 1
                elif suffix in EXTENSIONS:
                    if names.setdefault(key, member.name) != member.name or key in images:
                        raise two_images(path, names[key], member.name)
                    try:
                        size = read_size(BytesIO(content_of(file, member)), where)
                        images[key] = (member.offset_data, member.size, *size)
                    except BadImageError as error:
                        found.bad.append((where, error.reason))
                elif suffix == ".cls" and member.size <= MAX_LABEL:
                    labels[key] = label_of(suffix, content_of(file, member), where)
                elif suffix == ".json" and member.size <= MAX_LABEL:
                    about[key] = member
                else:
                    found.ignored[suffix or "none"] += 1
            for key, member in about.items():
                if key in names and not labels.get(key):
                    where = f"{name}[{member.name}]"
                    labels[key] = label_of(".json", content_of(file, member), where)
    except tarfile.TarError as error:
        raise ValueError(
            f"{path} is no plain tar file ({error}); compressed ones have to be unpacked to .tar: "
            f"nothing in them can be found by its place"
        ) from error
    if alone := len((labels.keys() | about.keys()) - names.keys()):
        found.ignored["label without an image"] += alone
    return [(*place, labels.get(key, "")) for key, place in images.items()]


def two_images(path: Path, first: str, second: str) -> ValueError:
    *stem, suffix = Path(second).name.split(".")
    better = "-".join(stem) if len(stem) > 1 else f"{stem[0]}-2"
    return ValueError(
        f"{path} has two images of one sample, {first} and {second}: a sample is all that has one "
        f"name up to its first dot; rename one, such as to {better}.{suffix}, or unpack them and "
        f"write shards with `patchlight shard --data`"
    )


def content_of(file: IO[bytes], member: tarfile.TarInfo) -> bytes:
    file.seek(member.offset_data)
    return file.read(member.size)


def index_tars(root: Path) -> Found:
    """Write an index for the tar files in `root`/train and `root`/val.

    Raises:
        ValueError: none there, one that is no tar file, images some of which have no label.
    """
    if (root / INDEX).exists():
        raise ValueError(f"{root / INDEX} is there already; remove it to write it anew")
    paths = {part: tars_in(root / part) for part in ("train", "val")}
    found = Found(0, [], Counter())
    read: dict[str, list[tuple[Path, Samples]]] = {}
    with Bar("shards", sum(map(len, paths.values()))) as bar:
        for part, tars in paths.items():
            read[part] = []
            for path in tars:
                read[part].append((path, read_tar(path, f"{part}/{path.name}", found)))
                bar.advance()
    groups = {sample[4] for _, samples in read["train"] for sample in samples}
    counts = Counter(sample[4] != "" for part in read.values() for _, of in part for sample in of)
    if len(counts) > 1:
        raise ValueError(
            f"{counts[True]:,} images of {root} have a label and {counts[False]:,} have none; "
            f"expected all or none: labels of training and of validation are in KEY.cls or KEY.json"
        )
    names, ids = class_ids(groups, numeric=True)
    parts = {part: part_of(root, part, read[part], ids) for part in read}
    write_index(root, names, parts)
    images = sum(len(samples) for part in read.values() for _, samples in part)
    return found._replace(images=images)


def tars_in(directory: Path) -> list[Path]:
    """
    Raises:
        ValueError: none there, or one of a name that no index may have.
    """
    paths = sorted(path for path in directory.glob("*.tar") if not path.name.startswith("."))
    if not paths:
        raise ValueError(f"there are no .tar files in {directory}; expected train/ and val/")
    for path in paths:
        if not is_plain(path.name):
            plain = re.sub(r"[^\w.-]+", "-", path.stem).strip(".-") or "000000"
            raise ValueError(
                f"{path} has a name that is not the same everywhere, as in a URL; expected only "
                f"letters, digits, _, . and -, the first no -; rename it, such as to {plain}.tar"
            )
    return paths


def part_of(
    root: Path, part: str, read: list[tuple[Path, Samples]], ids: dict[str, int]
) -> dict[str, Any]:
    """What the index says of a part, whose table is written here.

    Raises:
        ValueError: no images, or labels that training has not.
    """
    rows, shards = [], []
    for path, samples in read:
        for *place, label in samples:
            if label not in ids:
                raise ValueError(f"{path} has the label {label!r}, which no training image has")
            rows.append((*place, ids[label]))
        if samples:
            name, size = f"{part}/{path.name}", path.stat().st_size
            entry = {"name": name, "samples": len(samples), "bytes": size}
            shards.append({**entry, "sha256": digest_of(path)})
    if not rows:
        raise ValueError(f"there is no readable image in the .tar files of {root / part}")
    return {"shards": shards, "members": write_members(root / part, np.array(rows, MEMBER))}
