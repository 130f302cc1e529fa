"""Sizes of images before they are decoded."""

import multiprocessing
import shutil
import time
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

import datamodules.progress
import datamodules.sizes
from datamodules.folder import Folder, read_size
from datamodules.shapes import Shapes
from datamodules.sizes import measure
from datamodules.sources import Digits, Source, open_source
from tests.datamodules.test_folder import tree, write


@pytest.fixture(autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Path:
    directory = tmp_path_factory.mktemp("cache")
    monkeypatch.setenv("PATCHLIGHT_CACHE", str(directory))
    return directory


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """How often the header of each file was read."""
    counts: Counter[str] = Counter()

    def counted(path: Path) -> tuple[int, int]:
        counts[str(path)] += 1
        return read_size(path)

    monkeypatch.setattr(datamodules.sizes, "read_size", counted)
    return counts


def real(source: Source) -> np.ndarray:
    return np.array([source[i].image.shape[:2] for i in range(len(source))])


def assert_measured(source: Source) -> np.ndarray:
    """Sizes one by one and together equal those of the images; returns them."""
    sizes, expected = measure(source), real(source)
    assert sizes.dtype == np.int32
    assert np.array_equal(sizes, expected)
    assert [source.size(i) for i in range(len(source))] == [tuple(s) for s in expected.tolist()]
    assert not sizes.flags.writeable
    return sizes


def uneven(root: Path, count: int = 30) -> Path:
    for i in range(count):
        write(root / "ab"[i % 2] / f"{i:03d}.jpg", i, size=(10 + i, 50 - i))
    return root


def test_digits() -> None:
    assert np.unique(assert_measured(Digits("val", None, 3)), axis=0).tolist() == [[8, 8]]


@pytest.mark.parametrize("split", ["train", "val"])
@pytest.mark.parametrize(
    ("smallest", "largest", "aspect"), [(64, 64, 1.0), (16, 48, 1.0), (20, 40, 3.0)]
)
def test_shapes(split: str, smallest: int, largest: int, aspect: float) -> None:
    source = Shapes(split, None, 3, 60, 40, smallest, largest, aspect)  # type: ignore[arg-type]
    sizes = assert_measured(source)
    assert (len(np.unique(sizes, axis=0)) > 1) == (largest > smallest)
    with pytest.raises(IndexError):
        source.size(60)


def test_shapes_paints_nothing_to_know_a_size(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr("datamodules.shapes.draw_texture")
    assert measure(Shapes("train", None, 1, num_train=70)).shape == (70, 2)


def test_folders_and_lists(tmp_path: Path) -> None:
    uneven(tmp_path / "train")
    write(tmp_path / "val" / "a" / "x.png", size=(99, 3))
    for split in ("train", "val"):
        assert_measured(open_source("folder", split, str(tmp_path)))
    listed = tmp_path / "list.txt"
    lines = [f"train/{'ab'[i % 2]}/{i:03d}.jpg {i % 2}" for i in reversed(range(30))]
    listed.write_text("\n".join(lines))
    sizes = [assert_measured(open_source("folder", s, str(listed))) for s in ("train", "val")]
    assert sorted(np.concatenate(sizes)[:, 1].tolist()) == list(range(10, 40))


def test_a_tree_is_read_once_for_both_its_parts(
    tmp_path: Path, cache: Path, reads: Counter[str]
) -> None:
    root = str(uneven(tmp_path / "pets"))
    train = measure(Folder("train", root, 3))
    assert len(reads) == 30  # the held-out part as well
    assert len(list(cache.rglob("sizes.npy"))) == 1
    val = Folder("val", root, 3)
    assert np.array_equal(measure(val), real(val))
    assert np.array_equal(measure(Folder("train", root, 3)), train)
    assert set(reads.values()) == {1}
    assert len(list((cache / "index").iterdir())) == 2  # a pointer and its arrays, nothing left
    whole = tmp_path / "whole"
    uneven(whole / "train")
    uneven(whole / "val")
    for _ in range(2):
        sizes = measure(Folder("train", str(whole), 3))
    assert isinstance(sizes, np.memmap)  # nothing is copied


def test_other_sources_are_not_kept(cache: Path) -> None:
    measure(Digits("val", None, 1))
    assert not any(cache.iterdir())


def test_sizes_are_renewed_with_the_index(tmp_path: Path, reads: Counter[str]) -> None:
    root = uneven(tmp_path / "pets")
    old = Folder("train", str(root), 3)
    measure(old)
    write(root / "a" / "0.jpg", size=(400, 300))  # comes first, so that every row moves
    for split in ("train", "val"):
        source = Folder(split, str(root), 3)  # type: ignore[arg-type]
        assert np.array_equal(measure(source), real(source))
    assert max(reads.values()) == 2
    # The directory of the old index is gone: its sizes are read, but there is no place for them.
    assert not old.index.arrays.exists()
    assert np.array_equal(measure(old), real(old))


def test_a_replaced_file_keeps_its_old_size(tmp_path: Path) -> None:
    root = uneven(tmp_path / "pets")
    source = Folder("train", str(root), 3)
    before = measure(source)
    Path(source.describe(0)).write_bytes(write(tmp_path / "x.jpg", size=(70, 80)).read_bytes())
    assert np.array_equal(measure(Folder("train", str(root), 3)), before)
    assert source[0].image.shape == (80, 70, 3)


def test_unreadable_images_have_no_size_and_can_be_tried_again(
    tmp_path: Path, reads: Counter[str]
) -> None:
    root = uneven(tmp_path / "pets")
    broken = root / "a" / "004.jpg"
    good = broken.read_bytes()
    broken.write_bytes(b"garbage")
    source = Folder("train", str(root), 3, val_fraction=0.01)
    place = [source.describe(i) for i in range(len(source))].index(str(broken))
    assert np.flatnonzero((measure(source) == 0).all(1)).tolist() == [place]
    broken.write_bytes(good)
    assert measure(source)[place].tolist() == [0, 0]  # what every process gets
    assert (reads[str(broken)], reads.total()) == (1, 30)
    assert measure(source, retry=True)[place].tolist() == [46, 14]
    assert (reads[str(broken)], reads.total()) == (2, 31)
    assert measure(source)[place].tolist() == [46, 14]  # and so it stays
    assert measure(source, retry=True)[place].tolist() == [46, 14]
    assert reads.total() == 31


def test_the_cache_follows_the_environment(
    tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch, reads: Counter[str]
) -> None:
    root = str(uneven(tmp_path / "pets"))
    measure(Folder("train", root, 3))
    monkeypatch.setenv("PATCHLIGHT_CACHE", str(tmp_path / "elsewhere"))
    measure(Folder("train", root, 3))
    for directory in (cache, tmp_path / "elsewhere"):
        assert len(list(directory.rglob("sizes.npy"))) == 1
    assert set(reads.values()) == {2}


def test_a_source_is_measured_after_its_cache_was_removed(tmp_path: Path, cache: Path) -> None:
    source = Folder("train", str(uneven(tmp_path / "pets")), 3)
    shutil.rmtree(cache)
    assert np.array_equal(measure(source), real(source))


def measure_at(root: str, start: "multiprocessing.synchronize.Barrier", queue: object) -> None:
    source = Folder("train", root, 3)
    start.wait(60)
    for _ in range(20):
        for file in source.index.arrays.glob("sizes.npy"):
            file.unlink(missing_ok=True)
        queue.put(measure(source).tobytes())  # type: ignore[attr-defined]


@pytest.mark.slow
def test_two_processes_at_once(tmp_path: Path, cache: Path) -> None:
    root = str(uneven(tmp_path / "pets"))
    expected = real(Folder("train", root, 3)).astype(np.int32).tobytes()
    context = multiprocessing.get_context("fork")  # importing everything again takes long
    start, queue = context.Barrier(2), context.Queue()
    both = [context.Process(target=measure_at, args=(root, start, queue)) for _ in range(2)]
    for process in both:
        process.start()
    found = [queue.get(timeout=120) for _ in range(40)]
    for process in both:
        process.join(60)
    assert [process.exitcode for process in both] == [0, 0]
    assert found == [expected] * 40
    arrays = Folder("train", root, 3).index.arrays
    assert sorted(p.name for p in arrays.glob("*.npy")) == [
        *("groups.npy", "offsets.npy", "paths.npy", "sizes.npy")
    ]


def test_threads_change_nothing_and_work_side_by_side(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = uneven(tmp_path / "pets", 40)
    monkeypatch.setattr(datamodules.sizes, "CHUNK", 3)
    waiting: Counter[str] = Counter()

    def slow(path: Path) -> tuple[int, int]:
        waiting["now"] += 1
        waiting["most"] = max(waiting["most"], waiting["now"])
        time.sleep(0.005)
        waiting["now"] -= 1
        return read_size(path)

    monkeypatch.setattr(datamodules.sizes, "read_size", slow)
    source = Folder("train", str(root), 3)
    several = measure(source, threads=4)
    assert waiting["most"] > 1
    (source.index.arrays / "sizes.npy").unlink()
    waiting.clear()
    assert np.array_equal(measure(source, threads=1), several)
    assert waiting["most"] == 1
    assert np.array_equal(several, real(source))
    (source.index.arrays / "sizes.npy").unlink()
    waiting.clear()
    monkeypatch.setattr(datamodules.sizes, "SLOW", 1.0)  # files that come fast need no threads
    assert np.array_equal(measure(source, threads=4), several)
    assert waiting["most"] == 1


def test_a_bar_is_shown_when_it_takes_long(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")  # as on a terminal
    monkeypatch.setenv("TERM", "xterm")
    measure(Digits("val", None, 1))
    assert capsys.readouterr() == ("", "")
    monkeypatch.setattr(datamodules.progress, "PATIENCE", 0.0)
    measure(Digits("val", None, 1))
    said = capsys.readouterr()
    assert said.out == ""
    assert "sizes of images" in said.err


def test_an_unexpected_error_is_not_swallowed(
    tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(path: Path) -> tuple[int, int]:
        raise MemoryError

    monkeypatch.setattr(datamodules.sizes, "read_size", fail)
    with pytest.raises(MemoryError):
        measure(Folder("train", str(tree(tmp_path / "pets")), 3))
    assert not list(cache.rglob("sizes.npy"))
