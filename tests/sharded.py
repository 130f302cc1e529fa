"""A folder of images, and its shards."""

from pathlib import Path

from PIL import Image

from datamodules.convert import convert
from datamodules.sources import open_source
from tests.datamodules.test_folder import write

CLASSES = ("ant", "bee", "cat", "dog", "elk", "fox")


def write_folder(root: Path) -> Path:
    """96 training and 18 held-out images of six classes, of two formats and several sizes."""
    for part, count in (("train", 16), ("val", 3)):
        for c, name in enumerate(CLASSES):
            for i in range(count):
                size = (8 + i, 9 + c)
                write(root / part / name / f"{i:03d}.{('png', 'jpeg')[i % 2]}", 20 * c + i, size)
    sideways = Image.new("RGB", (30, 10), "red")
    exif = sideways.getexif()
    exif[0x0112] = 6
    sideways.save(root / "train" / "ant" / "000.png", exif=exif)
    return root


def write_shards(folder: Path, out: Path, size: int = 12_000) -> list[tuple[str, str]]:
    parts = {split: open_source("folder", split, str(folder)) for split in ("train", "val")}
    return convert(parts, out, size, 2, {"source": "test"}, str(folder))
