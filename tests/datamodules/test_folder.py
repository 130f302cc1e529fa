"""Folders and list files: layouts, the cached index, and files that cannot be read."""

import os
import pickle
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from datamodules.folder import Folder, decode
from datamodules.index import open_index
from datamodules.sources import BadImageError, open_source


@pytest.fixture(autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Path:
    directory = tmp_path_factory.mktemp("cache")
    monkeypatch.setenv("PATCHLIGHT_CACHE", str(directory))
    return directory


def write(path: Path, value: int = 0, size: tuple[int, int] = (12, 10)) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, (value, 0, 255 - value)).save(path)
    return path


def tree(root: Path, classes: tuple[str, ...] = ("cat", "dog"), count: int = 30) -> Path:
    for c, name in enumerate(classes):
        for i in range(count):
            write(root / name / f"{i:03d}.png", 10 * c + i)
    return root


def test_class_directories(tmp_path: Path) -> None:
    root = tree(tmp_path / "pets")
    write(root / "dog" / "deep" / "er" / "x.png", 200)
    (root / "dog" / "notes.txt").write_text("no image")
    (root / ".hidden.png").write_text("")
    train, val = (open_source("folder", s, str(root)) for s in ("train", "val"))
    assert train.class_names == val.class_names == ("cat", "dog")
    names = [source.describe(i) for source in (train, val) for i in range(len(source))]
    assert len(names) == len(set(names)) == 61
    assert 0 < len(val) < 20
    for source in (train, val):
        for i in range(len(source)):
            example = source[i]
            assert example.label == ("dog" in source.describe(i))
            assert example.image.shape == (10, 12, 3)
    assert isinstance(train, Folder)
    assert train.index.skipped == 1


def test_an_image_stays_in_its_split_when_others_come(tmp_path: Path) -> None:
    root = tree(tmp_path / "pets")
    before = {Folder("val", str(root), 3).describe(i) for i in range(3)}
    write(root / "cat" / "new.png")
    write(root / "ant" / "a.png")
    val = Folder("val", str(root), 3)
    assert before <= {val.describe(i) for i in range(len(val))}
    assert len(Folder("train", str(root), 3)) + len(val) == 62


def test_val_fraction(tmp_path: Path) -> None:
    root = tree(tmp_path / "many", count=400)
    val = open_source("folder", "val", str(root), val_fraction=0.25)
    assert 150 < len(val) < 250
    with pytest.raises(ValueError, match=r"val_fraction is 1\.5"):
        open_source("folder", "val", str(root), val_fraction=1.5)
    single = write(tmp_path / "one" / "a.png").parent
    with pytest.raises(ValueError, match="holds out"):
        open_source("folder", "val", str(single))


@pytest.mark.parametrize("held_out", ["val", "validation", "test"])
def test_train_and_val_directories(tmp_path: Path, held_out: str) -> None:
    tree(tmp_path / "train", ("cat", "cow", "dog"), 4)
    tree(tmp_path / held_out, ("dog",), 2)
    val = open_source("folder", "val", str(tmp_path))
    assert len(open_source("folder", "train", str(tmp_path))) == 12
    assert [val[i].label for i in range(2)] == [2, 2]  # ids are training's
    tree(tmp_path / held_out, ("eel",), 1)
    with pytest.raises(ValueError, match=r"has classes that training has not: eel"):
        open_source("folder", "val", str(tmp_path))


def test_train_alone_is_split(tmp_path: Path) -> None:
    tree(tmp_path / "train")
    parts = [open_source("folder", s, str(tmp_path)) for s in ("train", "val")]
    assert [part.class_names for part in parts] == [("cat", "dog")] * 2
    assert sum(map(len, parts)) == 60
    tree(tmp_path / "car", ("x",), 3)  # beside others, a train is a train
    assert open_source("folder", "train", str(tmp_path)).class_names == ("car", "train")


def test_flat_folder_has_no_labels(tmp_path: Path) -> None:
    for i in range(40):
        write(tmp_path / f"{i}.png", i)
    source = open_source("folder", "train", str(tmp_path))
    assert source.class_names == ()
    assert source[0].label == -1
    with pytest.raises(ValueError, match="40 images outside class directories and 0 inside"):
        open_source("folder", "train", str(tmp_path), labelled=True)
    write(tmp_path / "cat" / "a.png")
    with pytest.raises(ValueError, match=r"1 inside \(cat\).*labelled: false"):
        open_source("folder", "train", str(tmp_path))
    everything = [open_source("folder", s, str(tmp_path), labelled=False) for s in ("train", "val")]
    assert sum(map(len, everything)) == 41
    assert everything[0][0].label == -1


@pytest.mark.parametrize(
    ("name", "line"), [("a.txt", "{} {}"), ("a.csv", "{},{}"), ("a.tsv", "{}\t{}")]
)
def test_list_files(tmp_path: Path, name: str, line: str) -> None:
    paths = [write(tmp_path / "pictures" / f"an image {i}.png", i) for i in range(30)]
    lines = [line.format(p.relative_to(tmp_path), "bcd"[i % 3]) for i, p in enumerate(paths)]
    (tmp_path / name).write_text("\n".join(lines) + "\n\n")
    train = open_source("folder", "train", str(tmp_path / name))
    assert train.class_names == ("b", "c", "d")
    for i in range(len(train)):
        number = int(Path(train.describe(i)).stem.split()[-1])
        assert train[i].label == number % 3
        assert train[i].image[0, 0, 0] == number


def test_numbered_and_missing_labels_in_a_list(tmp_path: Path) -> None:
    for i in range(20):
        write(tmp_path / f"{i}.png")
    train, val = tmp_path / "t.csv", tmp_path / "v.csv"
    train.write_text("".join(f"{i}.png,{i % 3 * 2}\n" for i in range(15)))
    val.write_text("".join(f"{i}.png,4\n" for i in range(15, 20)))
    source = open_source("folder", "train", str(train), val_root=str(val))
    assert source.class_names == ("0", "1", "2", "3", "4")
    assert [source[i].label for i in range(3)] == [0, 2, 4]
    held_out = open_source("folder", "val", str(train), val_root=str(val))
    assert [held_out[i].label for i in range(5)] == [4] * 5
    train.write_text("0.png,1\n1.png\n")
    with pytest.raises(ValueError, match="line 2: expected a path and a label"):
        open_source("folder", "train", str(train))
    train.write_text("".join(f"{i}.png\n" for i in range(20)))
    assert open_source("folder", "train", str(train)).class_names == ()


def test_index_is_mapped_cached_and_renewed(
    tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = tree(tmp_path / "pets")
    first = open_index(root)
    assert all(isinstance(a, np.memmap) for a in (first.paths, first.offsets, first.groups))
    calls = []
    import datamodules.index as module

    scan = module.scan
    monkeypatch.setattr(module, "scan", lambda r: (calls.append(r), scan(r))[1])
    assert len(open_index(root)) == 60
    assert calls == []  # from the cache
    write(root / "dog" / "late.png")
    renewed = open_index(root)
    assert (len(renewed), calls) == (61, [root])
    assert first.relative(0) == "cat/000.png"  # who had the old one mapped still reads it
    (root / "dog" / "late.png").unlink()
    write(root / "eel" / "deep" / "x.png")
    assert open_index(root).names == ("cat", "dog", "eel")
    assert len(list((cache / "index").iterdir())) == 2  # a pointer and its arrays


def test_order_does_not_depend_on_the_file_system(
    tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = tree(tmp_path / "pets", count=5)
    names = [open_index(root).relative(i) for i in range(10)]
    shutil.rmtree(cache)
    listing = os.scandir

    @contextmanager
    def backwards(path: Path) -> Iterator[Iterator[os.DirEntry[str]]]:
        with listing(path) as entries:
            yield iter(sorted(entries, key=lambda entry: entry.name, reverse=True))

    monkeypatch.setattr(os, "scandir", backwards)
    assert [open_index(root).relative(i) for i in range(10)] == names == sorted(names)


def test_names_outside_ascii_and_links(tmp_path: Path) -> None:
    root = tree(tmp_path / "pets", ("chat", "été"), 6)
    write(root / "été" / "na\u0308ive 画.png")
    os.symlink(root, root / "chat" / "loop")
    os.symlink(root / "été", root / "zz")
    index = open_index(root)
    assert len(index) == 13  # every directory once
    assert any("画" in index.relative(i) for i in range(13))
    source = Folder("train", str(root), 3, labelled=False)
    assert pickle.loads(pickle.dumps(source))[0].image.shape == (10, 12, 3)


@pytest.mark.parametrize("content", [b"", b"\xff\xd8\xff\xe0 not a jpeg", b"GIF89a"])
def test_corrupt_files_are_named(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "bad.jpg"
    path.write_bytes(content)
    with pytest.raises(BadImageError) as caught:
        decode(path, 3)
    assert caught.value.description == str(path)
    assert caught.value.reason


@pytest.mark.parametrize("kind", ["jpg", "png", "webp"])
def test_truncated_files_are_bad(tmp_path: Path, kind: str) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    path = tmp_path / f"x.{kind}"
    Image.fromarray(noise).save(path)
    assert decode(path, 3).shape == (64, 64, 3)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises(BadImageError):
        decode(path, 3)
    with pytest.raises(BadImageError, match="No such file"):
        decode(tmp_path / "none.png", 3)


def test_modes(tmp_path: Path) -> None:
    def stored(image: Image.Image, name: str, **options: object) -> np.ndarray:
        image.save(tmp_path / name, **options)
        return decode(tmp_path / name, 3)

    red = Image.new("RGB", (4, 4), (255, 0, 0))
    assert stored(red.convert("P"), "p.png")[0, 0].tolist() == [255, 0, 0]
    assert stored(red.convert("CMYK"), "c.tif")[0, 0].tolist() == [255, 0, 0]
    pale = Image.new("L", (4, 4), 7)
    assert stored(pale, "l.png", transparency=7)[0, 0].tolist() == [255, 255, 255]
    half = Image.new("RGBA", (4, 4), (255, 0, 0, 0))
    assert stored(half, "a.png")[0, 0].tolist() == [255, 255, 255]  # transparent: white
    deep = Image.fromarray(np.array([[0, 257 * 100], [257 * 255, 257]], dtype=np.uint16))
    assert stored(deep, "d.png")[:, :, 0].tolist() == [[0, 100], [255, 1]]
    assert decode(tmp_path / "p.png", 1).shape == (4, 4, 1)

    wide = Image.new("L", (6, 2))
    exif = Image.Exif()
    exif[0x0112] = 6  # turned by a quarter
    assert stored(wide, "e.jpg", exif=exif).shape == (6, 2, 3)


def test_bombs_are_bad(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path / "x.png", size=(100, 100))
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    with pytest.raises(BadImageError, match="too large"):
        decode(tmp_path / "x.png", 3)


def test_missing_and_empty_roots(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"nowhere does not exist; expected"):
        open_source("folder", "train", str(tmp_path / "nowhere"))
    (tmp_path / "readme.md").write_text("")
    with pytest.raises(ValueError, match=r"there are no images in .*expected files ending in"):
        open_source("folder", "train", str(tmp_path))
    with pytest.raises(ValueError, match="is a file, but no list"):
        open_source("folder", "train", str(tmp_path / "readme.md"))


def test_a_list_is_read_again_when_its_content_differs(tmp_path: Path) -> None:
    listed = tmp_path / "a.csv"
    (tmp_path / "0.png").touch()
    listed.write_text("0.png,1\n1.png,1\n")
    before = listed.stat()
    assert open_index(listed).groups.tolist() == [1, 1]
    listed.write_text("0.png,1\n1.png,2\n")
    os.utime(listed, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert open_index(listed).groups.tolist() == [1, 2]


def test_a_header_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("path,label\n0.png,1\n1.png,2\n")
    with pytest.raises(ValueError, match=r"line 1: 'path' is no image path.*remove that line"):
        open_index(tmp_path / "a.csv")


def test_a_linked_class_does_not_rename_the_real_one(tmp_path: Path) -> None:
    root = tree(tmp_path / "pets", ("dog",), 3)
    os.symlink(root / "dog", root / "alias")
    assert open_index(root).names == ("dog",)


def test_an_index_renewed_by_another_process_is_no_error(tmp_path: Path, cache: Path) -> None:
    root = tree(tmp_path / "pets", count=3)
    open_index(root)
    unfinished = cache / "index" / (next((cache / "index").glob("*.json")).stem + "-another")
    unfinished.mkdir()
    write(root / "dog" / "late.png")
    assert len(open_index(root)) == 7
    assert unfinished.is_dir()  # what another process is writing is left alone
    for arrays in (cache / "index").glob("*-*"):
        shutil.rmtree(arrays)  # between reading the pointer and mapping the arrays
    assert len(open_index(root)) == 7


def test_a_list_in_the_wrong_place_is_told_apart_from_bad_images(tmp_path: Path) -> None:
    (tmp_path / "list.txt").write_text("a/0.png cat\na/1.png dog\n")
    expected = rf"none of the first 2 images .*the first should be {tmp_path}/a/0.png"
    with pytest.raises(ValueError, match=expected):
        Folder("train", str(tmp_path / "list.txt"), 3)
