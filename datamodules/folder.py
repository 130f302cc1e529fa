"""Images from a directory tree or a list file."""

import itertools
import struct
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from io import BytesIO
from pathlib import Path
from typing import IO

import numpy as np
from PIL import ExifTags, Image, ImageOps, UnidentifiedImageError
from PIL.PngImagePlugin import PngImageFile
from PIL.TiffImagePlugin import IMAGELENGTH, IMAGEWIDTH, TiffImageFile

from datamodules.index import Index, open_index
from datamodules.sources import (
    BadImageError,
    Example,
    Split,
    refuse_floats,
    to_array,
    with_channels,
)

HELD_OUT = ("val", "validation", "valid", "test")


@contextmanager
def opening(file: Path | BytesIO, name: str | None = None) -> Iterator[Image.Image]:
    """An image file; whatever is wrong with it within the block becomes `BadImageError`."""
    name = str(file) if name is None else name
    try:
        with Image.open(file) as opened:
            yield opened
    except Image.DecompressionBombError as error:
        raise BadImageError(name, f"too large to be decoded safely: {error}") from error
    except (OSError, SyntaxError, ValueError, struct.error, EOFError) as error:
        # Pillow names what it read from, which may be an object in memory.
        said = "no image of a known kind" if isinstance(error, UnidentifiedImageError) else error
        raise BadImageError(name, str(said) or type(error).__name__) from error


def decode(file: Path | BytesIO, channels: int, name: str | None = None) -> np.ndarray:
    """Read an image file, for people called `name`, as uint8 [h, w, channels], upright.

    The EXIF orientation is applied; transparency is put on white; CMYK and palettes become RGB;
    grey deeper than 8 bits is taken for 16 bits and scaled to 8.

    Raises:
        BadImageError: missing, truncated, absurdly large, or no image.
    """
    with opening(file, name) as opened:
        opened.load()
        image = ImageOps.exif_transpose(opened)
        return with_channels(to_array(image), channels)


def read_size(file: Path | BytesIO, name: str | None = None) -> tuple[int, int]:
    """(height, width) in pixels of what `decode` gives, from the header of the file.

    Raises:
        BadImageError: missing, absurdly large, or no image. That the pixels after a sound header
            are damaged shows only when they are decoded.
    """
    with opening(file, name) as opened:
        refuse_floats(opened)
        width, height = opened.size
        if isinstance(opened, TiffImageFile):  # Pillow's size may be turned already
            width, height = opened.tag_v2[IMAGEWIDTH], opened.tag_v2[IMAGELENGTH]
        if isinstance(opened, PngImageFile) and opened.fp and has_late_exif(opened.fp):
            opened.load()
        # PngImageFile's own getexif would decode every PNG, to look behind its pixels.
        orientation = Image.Image.getexif(opened).get(ExifTags.Base.Orientation, 1)
    return (width, height) if orientation in (5, 6, 7, 8) else (height, width)


def has_late_exif(file: IO[bytes] | BytesIO) -> bool:
    """Whether a PNG says behind its pixels, or may say, how it is to be turned."""
    place, behind = file.tell(), False
    file.seek(8)
    try:
        while len(head := file.read(8)) == 8:
            length, kind = struct.unpack(">I4s", head)
            start = file.tell()
            behind |= kind == b"IDAT"
            if behind and kind == b"eXIf":
                return True
            if behind and kind in (b"tEXt", b"zTXt", b"iTXt"):
                key = file.read(min(length, 80)).split(b"\0")[0]
                if key in (b"Raw profile type exif", b"XML:com.adobe.xmp"):
                    return True
            file.seek(start + length + 4)  # a checksum of 4 bytes follows
        return False
    finally:
        file.seek(place)


def split_roots(root: Path) -> tuple[Path, Path | None]:
    """Where training and held-out images are; None where they share one tree.

    A train/ on its own is that tree: "train" is a class only beside other directories.
    """
    if (root / "train").is_dir():
        for name in HELD_OUT:
            if (root / name).is_dir():
                return root / "train", root / name
        others = (p for p in root.iterdir() if p.is_dir() and not p.name.startswith((".", "__MAC")))
        if next((p for p in others if p.name != "train"), None) is None:
            return root / "train", None
    return root, None


def is_labelled(index: Index, wanted: bool | None) -> bool:
    """Whether the tree has labels, which only one layout leaves no doubt about."""
    loose = int((index.groups < 0).sum())
    if wanted is False:
        return False
    if loose == 0:
        return True
    if loose == len(index) and wanted is None:
        return False
    raise ValueError(
        f"{index.root} has {loose:,} images outside class directories and "
        f"{len(index) - loose:,} inside ({', '.join(index.names[:5]) or 'no class'}); move them "
        f"into classes, or set data.source_args to {{labelled: false}} to use all without labels"
    )


class Folder:
    """Images of a directory tree or a list file, labelled or not.

    `root` is one of
        a directory with train/ and val/ (or validation/, valid/, test/), or train/ alone,
        a directory, of which a share chosen by a hash of the path is held out,
        a list file, one image a line, relative to the file: `path` or `path label`.
    In a directory the first level of sub-directories names the classes; images without any
    have no label.

    Args:
        val_fraction: share held out where there is no held-out directory.
        val_root: directory or list file of the held-out images.
        labelled: false ignores class directories, true insists on them.

    Raises:
        ValueError: nothing to read, doubtful labels, classes that only the held-out part has.
    """

    def __init__(
        self,
        split: Split,
        root: str | None,
        channels: int,
        val_fraction: float = 0.1,
        val_root: str | None = None,
        labelled: bool | None = None,
    ) -> None:
        if root is None:
            raise ValueError("source folder needs data.root: a directory or a list file of images")
        if not 0.0 < val_fraction < 1.0:
            raise ValueError(f"val_fraction is {val_fraction}; expected within (0, 1)")
        train_root, held_out = split_roots(Path(root))
        held_out = Path(val_root) if val_root is not None else held_out
        train = open_index(train_root)
        self.labelled = is_labelled(train, labelled)
        self.class_names = train.names if self.labelled else ()
        self.channels = channels
        if held_out is None:
            self.index = train
            self.rows = held_out_by_hash(train, val_fraction, split)
            self.ids = np.arange(len(train.names))
        else:
            self.index = train if split == "train" else open_index(held_out)
            self.rows = np.arange(len(self.index))
            self.ids = self.match_classes()

    def match_classes(self) -> np.ndarray:
        """Class id in training of every class id of this split."""
        if not self.labelled:
            return np.arange(len(self.index.names))
        is_labelled(self.index, True)
        known = {name: i for i, name in enumerate(self.class_names)}
        unknown = [name for name in self.index.names if name not in known]
        if unknown:
            raise ValueError(
                f"{self.index.root} has classes that training has not: {', '.join(unknown[:5])}"
            )
        return np.array([known[name] for name in self.index.names], dtype=np.int64)

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> Example:
        row = int(self.rows[index])
        return Example(decode(self.index.path(row), self.channels), self.label(index))

    def label(self, index: int) -> int:
        return int(self.ids[self.index.groups[self.rows[index]]]) if self.labelled else -1

    def stored(self, index: int) -> bytes:
        """The content of an image's file.

        Raises:
            BadImageError: it cannot be read.
        """
        try:
            return self.index.path(int(self.rows[index])).read_bytes()
        except OSError as error:
            raise BadImageError(self.describe(index), str(error)) from error

    def size(self, index: int) -> tuple[int, int]:
        return read_size(self.index.path(int(self.rows[index])))

    def describe(self, index: int) -> str:
        return str(self.index.path(int(self.rows[index])))


def held_out_by_hash(index: Index, fraction: float, split: Split) -> np.ndarray:
    """Rows of a split: an image stays in it whatever is added to or removed from the folder."""
    blob, ends = memoryview(index.paths.tobytes()), index.offsets.tolist()
    each = (zlib.crc32(blob[a:b]) for a, b in itertools.pairwise(ends))
    hashes = np.fromiter(each, np.uint32, len(index))
    held_out = hashes < fraction * 2**32
    if not 0 < held_out.sum() < len(index):
        raise ValueError(
            f"of the {len(index)} images in {index.root} a val_fraction of {fraction} holds out "
            f"{held_out.sum()}; add images, change val_fraction, or give val/ a directory"
        )
    return np.flatnonzero(held_out if split == "val" else ~held_out)
