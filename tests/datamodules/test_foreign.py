"""Tar files that others wrote get an index, or it is said why not."""

import gzip
import json
import pickle
import tarfile
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest

from datamodules import foreign as foreign_tars
from datamodules.check import main as check_data
from datamodules.folder import decode
from datamodules.foreign import index_tars
from datamodules.sources import open_source
from tests.datamodules.test_folder import write
from tests.datamodules.test_shards import Trap


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Images of two classes, of two formats and several sizes."""
    root = tmp_path_factory.mktemp("folder")
    for c, name in enumerate(("ant", "bee")):
        for i in range(16):
            path = root / "train" / name / f"{i:03d}.{('png', 'jpeg')[i % 2]}"
            write(path, 20 * c + i, (8 + i, 9 + c))
    return root


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATCHLIGHT_CACHE", str(tmp_path / "cache"))


def add(tar: tarfile.TarFile, name: str, content: bytes) -> None:
    info = tarfile.TarInfo(name)
    info.size = len(content)
    tar.addfile(info, BytesIO(content))


def foreign(root: Path, images: list[Path], label: str = "cls") -> Path:
    """Tar files of others, with a pickle beside every image."""
    for part in ("train", "val"):
        (root / part).mkdir(parents=True)
        for number in range(2):
            with tarfile.open(root / part / f"{number}.tar", "w", format=tarfile.PAX_FORMAT) as tar:
                for i, path in enumerate(images[number::2]):
                    text = f"{i % 3}" if label == "cls" else json.dumps({"label": f"x{i % 3}"})
                    add(tar, f"./a/é{i}.{label}", text.encode())
                    add(tar, f"./a/é{i}.{path.suffix[1:].upper()}", path.read_bytes())
                    for suffix in ("pyd", "pth", "pkl", "seg.pickle"):
                        add(tar, f"./a/é{i}.{suffix}", pickle.dumps(Trap()))
    return root


@pytest.mark.parametrize("label", ["cls", "json"])
def test_tar_files_of_others_get_an_index_and_their_pickles_stay_shut(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, label: str
) -> None:
    monkeypatch.chdir(tmp_path)
    images = sorted((folder / "train").rglob("*.*"))[:16]
    root = foreign(tmp_path / "foreign", images, label)
    found = index_tars(root)
    assert found.images == 32
    assert found.bad == []
    assert found.ignored == {".pyd": 32, ".pth": 32, ".pkl": 32, ".pickle": 32}
    source = open_source("shards", "train", str(root))
    assert source.class_names == (("0", "1", "2") if label == "cls" else ("x0", "x1", "x2"))
    for i, path in enumerate([*images[0::2], *images[1::2]]):
        assert np.array_equal(source[i].image, decode(path, 3))
        assert source[i].label == i % 8 % 3
        assert source.size(i) == source[i].image.shape[:2]
    assert check_data([str(root), "--workers", "1"]) == 0
    assert not (tmp_path / "sprung").exists()
    with pytest.raises(ValueError, match=r"index\.json is there already"):
        index_tars(root)


def test_tar_files_that_cannot_be_indexed(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"no \.tar files in .*train; expected train/ and val/"):
        index_tars(tmp_path)
    root = foreign(tmp_path / "foreign", sorted((folder / "train").rglob("*.png"))[:4])
    for part in ("train", "val"):
        path = root / part / "0.tar"
        kept = path.read_bytes()
        with tarfile.open(path, "a") as tar:
            add(tar, "b.png", (folder / "train" / "ant" / "002.png").read_bytes())
        with pytest.raises(ValueError, match=r"8 images of .* have a label and 1 have none"):
            index_tars(root)
        path.write_bytes(kept)
    (root / "val" / "1.tar").write_bytes(gzip.compress((root / "val" / "0.tar").read_bytes()))
    with pytest.raises(ValueError, match=r"1\.tar is no plain tar file"):
        index_tars(root)


@pytest.mark.parametrize(
    ("about", "says"),
    [
        ('{"label": [1, 2]}', "has the label .1, 2.; expected one class"),
        ('{"label": {"name": "ant"}}', "has the label .*; expected one class"),
        ('{"label": true}', "has the label true; expected one class"),
        ('{"label": 1.5}', r"has the label 1\.5; expected one class"),
        ('{"label": 1000001}', "has class 1000001; expected up to 1,000,000"),
        ("[" * 30_000, "is no label: maximum recursion"),
        ("{nope", "is no label: Expecting"),
    ],
)
def test_what_names_no_class_is_no_label(
    folder: Path, tmp_path: Path, about: str, says: str
) -> None:
    images = sorted((folder / "train").rglob("*.png"))[:4]
    root = foreign(tmp_path / "foreign", images)
    path = root / "train" / "0.tar"
    kept = path.read_bytes()
    with tarfile.open(path, "a") as tar:
        add(tar, "b.json", about.encode())
        add(tar, "b.png", images[0].read_bytes())
    with pytest.raises(ValueError, match=rf"0\.tar\[b\.json\] {says}"):
        index_tars(root)
    path.write_bytes(kept)
    with tarfile.open(path, "a") as tar:
        add(tar, "b.json", about.encode())
        add(tar, "b.png", images[0].read_bytes())
        add(tar, "b.cls", b"1")  # comes first
    assert index_tars(root).images == 9


def test_minus_one_is_no_label(folder: Path, tmp_path: Path) -> None:
    root, images = tmp_path / "foreign", sorted((folder / "train").rglob("*.png"))[:4]
    for part in ("train", "val"):
        (root / part).mkdir(parents=True)
        with tarfile.open(root / part / "0.tar", "w") as tar:
            for i, (name, content) in enumerate((("cls", "-1"), ("json", '{"cls": -1}'))):
                add(tar, f"{i}.{name}", content.encode())
                add(tar, f"{i}.png", images[i].read_bytes())
    index_tars(root)
    source = open_source("shards", "train", str(root))
    assert source.class_names == ()
    assert [source[i].label for i in range(2)] == [-1, -1]


def test_labels_of_cls_files_come_first_and_those_without_an_image_are_told(
    folder: Path, tmp_path: Path
) -> None:
    root = foreign(tmp_path / "foreign", sorted((folder / "train").rglob("*.png"))[:4])
    with tarfile.open(root / "train" / "0.tar", "a") as tar:
        add(tar, "./a/é0.json", b'{"label": "tabby"}')
        add(tar, "gone.cls", b"1")
    assert index_tars(root).ignored["label without an image"] == 1
    assert open_source("shards", "train", str(root))[0].label == 0


def test_two_images_of_one_sample_are_named(tmp_path: Path, folder: Path) -> None:
    image = (folder / "train" / "ant" / "002.png").read_bytes()
    for first, second, better in (
        ("a/img.001.png", "a/img.002.png", "img-002.png"),
        ("b.png", "b.seg.png", "b-seg.png"),
        ("b.png", "b.jpg", "b-2.jpg"),
    ):
        root = tmp_path / better
        for part in ("train", "val"):
            (root / part).mkdir(parents=True)
            with tarfile.open(root / part / "0.tar", "w") as tar:
                add(tar, first, b"garbage" if part == "val" else image)
                add(tar, "other/img.003.png", image)
                add(tar, second, image)
        says = rf"0\.tar has two images of one sample, {first} and {second}: .* such as to {better}"
        with pytest.raises(ValueError, match=says):
            index_tars(root)
        assert not (root / "index.json").exists()


@pytest.mark.parametrize(
    ("name", "plain"),
    [("a b.tar", "a-b"), ("-x+1.tar", "x-1"), ("s{0}=é.tar", "s-0-é"), (" .tar", "000000")],
)
def test_names_that_no_index_may_have_are_told_before_anything_is_read(
    tmp_path: Path, folder: Path, name: str, plain: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = foreign(tmp_path / "foreign", sorted((folder / "train").rglob("*.png"))[:4])
    (root / "val" / "1.tar").rename(root / "val" / name)
    (root / "val" / "._0.tar").write_bytes(b"what macOS leaves")
    with tarfile.open(root / "train" / "0.tar", "a") as tar:
        for i in range(2):
            add(tar, f"./a/._é{i}.png", b"what macOS adds")
    with monkeypatch.context() as patch:
        patch.setattr(foreign_tars, "read_tar", None)  # calling it would fail
        with pytest.raises(
            ValueError, match=rf"the first no -; rename it, such as to {plain}\.tar"
        ):
            index_tars(root)
    (root / "val" / name).rename(root / "val" / f"{plain}.tar")
    found = index_tars(root)
    assert (found.images, found.bad, found.ignored["hidden"]) == (8, [], 2)
    assert len(open_source("shards", "val", str(root))) == 4
