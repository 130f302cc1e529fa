"""`patchlight check-data`."""

import os
from pathlib import Path

import pytest
from PIL import Image

from datamodules.check import check_folders, main, open_folders
from datamodules.folder import Folder
from tests.datamodules.test_folder import tree, write


@pytest.fixture(autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATCHLIGHT_CACHE", str(tmp_path_factory.mktemp("cache")))
    monkeypatch.setenv("COLUMNS", "150")


def spoil(root: Path) -> list[str]:
    broken, cut = root / "train" / "cat" / "x.jpg", root / "val" / "dog" / "y.jpg"
    broken.write_bytes(b"nothing like an image")
    write(cut, size=(90, 80))
    cut.write_bytes(cut.read_bytes()[:700])
    return [str(broken), str(cut)]


def test_clean_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tree(tmp_path / "train", count=8)
    tree(tmp_path / "val", count=2)
    write(tmp_path / "val" / "dog" / "big.png", 99, size=(300, 200))
    assert main([str(tmp_path), "--workers", "2"]) == 0
    said = capsys.readouterr().out
    assert "12x10 to 300x200" in said
    assert "1.20 to 1.50, median 1.20" in said
    assert "2, 2 (cat) to 3 images each" in said
    assert "4 held-out images are also trained on" in said  # tree() writes the same files


def test_bad_images_are_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tree(tmp_path / "train", count=8)
    tree(tmp_path / "val", count=2)
    bad = spoil(tmp_path)
    reports = check_folders(open_folders(str(tmp_path))[0], workers=1)
    assert [name for r in reports.values() for name, _ in r.problems] == bad
    assert sum(reports["train"].labels.values()) == 16
    listed = tmp_path / "bad.txt"
    assert main([str(tmp_path), "--bad-list", str(listed)]) == 1
    assert listed.read_text().split() == bad
    said = capsys.readouterr().out
    assert all(f"unreadable: {name}" in said for name in bad)


def test_names_that_are_no_text_or_look_like_markup(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tree(tmp_path / "train", ("[red]",), 4)
    tree(tmp_path / "val", ("[red]",), 4)
    name = os.fsencode(tmp_path / "val" / "[red]") + b"/\xff.png"
    with open(name, "wb") as file:
        file.write(b"x")
    listed = tmp_path / "bad.txt"
    assert main([str(tmp_path), "--workers", "1", "--bad-list", str(listed)]) == 1
    assert listed.read_bytes() == name + b"\n"
    said = capsys.readouterr().out
    assert "4 ([red]) to 4 images each" in said
    assert "\\udcff.png" in said


def test_the_index_is_not_sent_with_every_image(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tree(tmp_path / "train", count=40)
    tree(tmp_path / "val", count=40)
    pickled = []
    reduce = Folder.__reduce_ex__

    def counted(self: Folder, protocol: int) -> object:
        pickled.append(self)
        return reduce(self, protocol)

    monkeypatch.setattr(Folder, "__reduce_ex__", counted)
    assert len(check_folders(open_folders(str(tmp_path))[0], workers=1)) == 2
    assert len(pickled) <= 2  # for the worker, not for each of the ten tasks


def test_nothing_to_check(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(tmp_path / "nowhere")]) == 2
    assert "does not exist" in capsys.readouterr().out


def test_a_folder_that_training_would_refuse_is_still_checked(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for i in range(3):  # too few to hold any out
        Image.new("RGB", (8, 8), (i, 0, 0)).save(tmp_path / f"{i}.png")
    (tmp_path / "0.png").write_bytes(b"garbage")
    assert main([str(tmp_path), "--workers", "1"]) == 1
    said = capsys.readouterr().out
    assert f"unreadable: {tmp_path / '0.png'}" in said
    assert "training would refuse this: of the 3 images" in said
