"""Images of any source to shards: whole or not at all, killed at any place."""

import errno
import os
import shutil
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from datamodules.convert import convert
from datamodules.sources import open_source
from tests.sharded import write_folder, write_shards


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_folder(tmp_path_factory.mktemp("folder"))


@pytest.fixture(scope="module")
def shards(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same in shards of a few images each."""
    out = tmp_path_factory.mktemp("shards") / "out"
    assert write_shards(folder, out) == []
    return out


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATCHLIGHT_CACHE", str(tmp_path / "cache"))


def test_a_conversion_that_was_killed_ends_with_the_same_bytes(
    folder: Path, shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from datamodules import convert as conversion

    out, made = tmp_path / "out", []
    whole = conversion.entry_of

    def killed(source: Any, number: int, root: str) -> Any:
        made.append(number)
        if len(made) in (30, 60, 101):
            raise KeyboardInterrupt
        return whole(source, number, root)

    monkeypatch.setattr(conversion, "entry_of", killed)
    monkeypatch.setattr(conversion, "CHUNK", 4)
    for _ in range(3):
        with pytest.raises(KeyboardInterrupt):
            write_shards(folder, out)
        assert not (out / "index.json").exists()
    with pytest.raises(ValueError, match="begun with another shard_size; give the same command"):
        write_shards(folder, out, 13_000)
    write_shards(folder, out)
    assert len(made) < 96 + 18 + 3 * 20  # what was finished was not done again
    names = [path.relative_to(shards) for path in shards.rglob("*") if path.is_file()]
    assert sorted(names) == sorted(p.relative_to(out) for p in out.rglob("*") if p.is_file())
    for name in names:
        assert (out / name).read_bytes() == (shards / name).read_bytes()
    with pytest.raises(ValueError, match="is not empty; expected a new directory"):
        write_shards(folder, out)


def test_unreadable_images_are_left_out_and_listed(folder: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(folder, copy)
    (copy / "train" / "bee" / "003.jpeg").write_bytes(b"garbage")
    out = tmp_path / "out"
    ((name, _),) = write_shards(copy, out)
    assert name == "train/bee/003.jpeg"
    assert (out / "unreadable.txt").read_text().startswith("train/bee/003.jpeg\t")
    assert len(open_source("shards", "train", str(out))) == 95


def test_a_full_disk_is_said_and_the_conversion_goes_on(
    folder: Path, shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(number: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    open_source("folder", "train", str(folder))  # so that its index is in the cache
    open_source("folder", "val", str(folder))
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(ValueError, match=r"no space left in .*; make room and give the same"):
            write_shards(folder, tmp_path / "out")
    write_shards(folder, tmp_path / "out")
    assert (tmp_path / "out" / "index.json").read_bytes() == (shards / "index.json").read_bytes()


def test_nothing_counts_before_it_is_on_the_disk(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A record says that a shard is whole: after a power failure too, what it speaks of is."""
    events: list[tuple[str, ...]] = []
    sync, replace = os.fsync, Path.replace

    def synced(number: int) -> None:
        events.append(("sync", Path(os.readlink(f"/proc/self/fd/{number}")).name))
        sync(number)

    def replaced(path: Path, target: Path) -> Path:
        events.append(("rename", path.name, target.name))
        return replace(path, target)

    monkeypatch.setattr(os, "fsync", synced)
    monkeypatch.setattr(Path, "replace", replaced)
    write_shards(folder, tmp_path / "out")
    for target in ("train-000001.npy", "train-000001.json", "members.npy", "index.json"):
        place = next(i for i, event in enumerate(events) if event[-1] == target)
        assert events[place - 1] == ("sync", events[place][1])
        assert events[place + 1][0] == "sync"  # its directory
    tar = events.index(("rename", "000001.tar.part", "000001.tar"))
    assert events[tar - 1 : tar + 2 : 2] == [("sync", "000001.tar.part"), ("sync", "train")]
    assert tar < next(i for i, event in enumerate(events) if event[-1] == "train-000001.json")


def test_one_conversion_at_a_time_to_the_end(
    folder: Path, shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from datamodules import convert as conversion

    out, steps, refuse = tmp_path / "out", [], conversion.refuse_others
    real = {name: getattr(conversion, name) for name in ("begin", "finish")}

    def step(name: str, *arguments: Any) -> Any:
        steps.append(name)
        with pytest.raises(ValueError, match=f"another process is writing to {out}"):
            write_shards(folder, out)
        return real[name](*arguments)

    with monkeypatch.context() as patch:
        for name in real:
            patch.setattr(conversion, name, partial(step, name))
        write_shards(folder, out)
    assert steps == ["begin", "finish"]
    assert (out / "index.json").read_bytes() == (shards / "index.json").read_bytes()
    assert not (out / ".unfinished").exists()
    # Who looked before the other had begun, and got the lock after it, writes nothing over it.
    looks = []

    def late(out: Path) -> None:
        looks.append(out)
        if len(looks) > 1:
            refuse(out)

    monkeypatch.setattr(conversion, "refuse_others", late)
    with pytest.raises(ValueError, match="is not empty; expected a new directory"):
        write_shards(folder, out)
    assert len(looks) == 2


def test_arrays_become_png(tmp_path: Path) -> None:
    source = open_source("digits", "val", channels=3)
    convert({"train": source, "val": source}, tmp_path / "out", 100_000, 1, {}, "")
    for channels in (1, 3):
        expected = open_source("digits", "val", channels=channels)
        found = open_source("shards", "val", str(tmp_path / "out"), channels=channels)
        for i in range(0, 360, 30):
            assert np.array_equal(found[i].image, expected[i].image)
            assert found[i].label == expected[i].label
