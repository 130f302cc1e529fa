"""Sizes of image files from their headers."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from datamodules.folder import decode, read_size
from datamodules.sources import BadImageError, open_source
from tests.datamodules.test_folder import write
from tests.datamodules.test_sizes import assert_measured


@pytest.fixture(autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATCHLIGHT_CACHE", str(tmp_path_factory.mktemp("cache")))


def turned(path: Path, orientation: int, size: tuple[int, int] = (12, 10)) -> Path:
    exif = Image.Exif()
    exif[0x0112] = orientation
    Image.new("RGB", size).save(path, exif=exif)
    return path


@pytest.mark.parametrize("orientation", range(10))
@pytest.mark.parametrize("kind", ["jpg", "png", "webp", "tif"])
def test_upright(tmp_path: Path, kind: str, orientation: int) -> None:
    path = turned(tmp_path / f"x.{kind}", orientation)
    assert read_size(path) == decode(path, 3).shape[:2]
    assert read_size(path) == ((12, 10) if 5 <= orientation <= 8 else (10, 12))


XMP = '<x tiff:Orientation="6"/>'


def late(path: Path, kind: bytes) -> Path:
    """A PNG with its chunks of one kind moved behind the pixels, where they may also be."""
    data, position, moved, kept = path.read_bytes(), 8, b"", b""
    while position < len(data):
        end = position + int.from_bytes(data[position : position + 4], "big") + 12
        chunk = data[position:end]
        if chunk[4:8] == b"IEND":
            kept += moved
        if chunk[4:8] == kind:
            moved += chunk
        else:
            kept += chunk
        position = end
    assert moved
    path.write_bytes(data[:8] + kept)
    return path


@pytest.mark.parametrize("where", ["before", "after"])
@pytest.mark.parametrize("kind", ["eXIf", "iTXt", "zTXt", "tEXt"])
def test_what_turns_a_png_may_stand_behind_its_pixels(
    tmp_path: Path, kind: str, where: str
) -> None:
    path, info = tmp_path / "x.png", PngInfo()
    info.add_text("Software", "anything")
    exif = Image.Exif()
    exif[0x0112] = 6
    raw = exif.tobytes()
    if kind == "iTXt":
        info.add_itxt("XML:com.adobe.xmp", XMP)
    elif kind != "eXIf":
        text = f"\nexif\n{len(raw):8}\n{raw.hex()}\n"
        info.add_text("Raw profile type exif", text, zip=kind == "zTXt")
    extra = {"exif": exif} if kind == "eXIf" else {}
    Image.new("L", (12, 10)).save(path, pnginfo=info, **extra)
    if where == "after":
        late(path, kind.encode())
    assert decode(path, 3).shape == (12, 10, 3)
    assert read_size(path) == (12, 10)


def test_headers_are_not_decoded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    info = PngInfo()
    info.add_text("date:create", "2001")  # behind the pixels this turns nothing
    image = Image.new("L", (12, 10))
    image.save(tmp_path / "l.png", pnginfo=info)
    late(tmp_path / "l.png", b"tEXt")
    for name in ("x.jpg", "x.png", "x.webp", "x.tif", "x.gif", "x.bmp", "x.pgm"):
        image.save(tmp_path / name)
    paths = sorted(tmp_path.iterdir())
    for path in paths:  # every plug-in is there now
        decode(path, 1)
    kinds = {type(Image.open(path)) for path in paths}

    def load(self: Image.Image) -> None:
        raise AssertionError(f"{self.filename} was decoded")  # type: ignore[attr-defined]

    for kind in kinds:
        monkeypatch.setattr(kind, "load", load)
    assert len(kinds) == 7
    assert [read_size(path) for path in paths] == [(10, 12)] * 8


def test_modes_and_formats(tmp_path: Path) -> None:
    root, red = tmp_path / "mixed", Image.new("RGB", (7, 4), (255, 0, 0))
    root.mkdir()
    red.convert("P").save(root / "palette.png")
    red.convert("P").save(root / "palette.gif")
    red.convert("CMYK").save(root / "inks.jpg")
    red.convert("RGBA").save(root / "clear.webp")
    red.convert("1").save(root / "bits.tif")
    Image.fromarray(np.full((4, 7), 999, np.uint16)).save(root / "deep.png")
    frames = [Image.new("L", (7, 4), i) for i in range(3)]
    frames[0].save(root / "moving.gif", save_all=True, append_images=frames[1:])
    frames[0].save(root / "moving.png", save_all=True, append_images=frames[1:])
    turned(root / "turned.jpg", 8, (7, 4))
    for i in range(12):
        write(root / f"{i}.bmp", i, size=(3 + i, 2))
    for split in ("train", "val"):
        assert_measured(open_source("folder", split, str(root), val_fraction=0.4))


def test_what_the_header_shows_to_be_wrong(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write(tmp_path / "x.png", size=(100, 100))
    path.write_bytes(path.read_bytes()[:-40])
    assert read_size(path) == (100, 100)  # only the pixels are damaged
    Image.new("F", (3, 3)).save(tmp_path / "f.tif")
    (tmp_path / "e.jpg").touch()
    (tmp_path / "j.jpg").write_bytes(b"\xff\xd8\xff\xe0 not a jpeg")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    for name in ("x.png", "f.tif", "e.jpg", "j.jpg", "none.png"):
        with pytest.raises(BadImageError) as of_header:
            read_size(tmp_path / name)
        with pytest.raises(BadImageError) as of_image:
            decode(tmp_path / name, 3)
        assert of_header.value.args == of_image.value.args
    with pytest.raises(BadImageError, match="too large to be decoded safely"):
        read_size(path)
