"""Shards: read in place and from a server, trained on and resumed, and refused where damaged."""

import json
import os
import pickle
import shutil
import tarfile
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from datamodules import ImageDataModule, MultiCropDataModule, PackedDataModule, urls
from datamodules.check import main as check_data
from datamodules.fetch import Files, Stored, bytes_of, said
from datamodules.module import Needs
from datamodules.packing import Resolution
from datamodules.sampling import grouped_order
from datamodules.shards import MEMBER, Shards
from datamodules.sizes import measure
from datamodules.sources import Grouped, GroupedSubset, open_source
from datamodules.unreadable import read_example
from tests.served import served
from tests.sharded import CLASSES, write_folder, write_shards


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
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("PATCHLIGHT_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(urls, "PAUSE", 0.01)
    return tmp_path / "cache" / "shards"


def both(folder: Path, shards: Path, split: Any) -> tuple[Any, Shards]:
    source = open_source("shards", split, str(shards))
    assert isinstance(source, Shards)
    return open_source("folder", split, str(folder)), source


def test_a_folder_and_its_shards_hold_the_same(folder: Path, shards: Path) -> None:
    for split, count in (("train", 96), ("val", 18)):
        files, source = both(folder, shards, split)
        assert len(source) == len(files) == count
        assert source.class_names == files.class_names == CLASSES
        contents = {files.stored(i): i for i in range(count)}
        assert len(contents) == count
        for i in range(count):
            of_file = contents.pop(source.stored(i))  # to the byte, and each once
            ours, theirs = source[i], files[of_file]
            assert np.array_equal(ours.image, theirs.image)
            assert ours.label == theirs.label
            assert source.size(i) == files.size(of_file) == ours.image.shape[:2]
        assert np.array_equal(measure(source), [source.size(i) for i in range(count)])
    assert source.describe(0) == f"{shards}/val/000000.tar[0]"
    assert np.array_equal([source[i].label for i in range(18)], np.arange(18) // 3)  # in order


def test_training_images_are_mixed_over_the_shards(folder: Path, shards: Path) -> None:
    source = both(folder, shards, "train")[1]
    assert len(source.shards) > 8
    first = range(int(source.groups.starts[2]))
    assert len({source[i].label for i in first}) > 2  # two shards; in the folder's order one class


def test_other_programs_read_the_shards(shards: Path, tmp_path: Path) -> None:
    with tarfile.open(shards / "train" / "000001.tar") as tar:
        names = tar.getnames()
        assert all(
            a.split(".")[0] == b.split(".")[0] for a, b in zip(names[::2], names[1::2], strict=True)
        )
        about = json.load(tar.extractfile(names[1]))  # type: ignore[arg-type]
    assert names[1].endswith(".json")
    assert about["file"].startswith(f"train/{about['class']}/")
    assert CLASSES[about["label"]] == about["class"]


# Training.


def module(kind: str, root: Path | str, workers: int = 0, **source_args: Any) -> Any:
    arguments = {"shuffle_shards": 3, **source_args}
    common: dict[str, Any] = {"source": "shards", "root": str(root), "source_args": arguments}
    made: Any
    if kind == "images":
        made = ImageDataModule(**common, image_size=8, batch_size=6, num_workers=workers)
    elif kind == "crops":
        made = MultiCropDataModule(
            **common, image_size=8, local_size=4, num_local=2, batch_size=6, num_workers=workers
        )
    else:
        sides = Resolution("native", 8, 16)
        made = PackedDataModule(
            **common, num_rows=2, row_length=32, resolution=sides, num_workers=workers
        )
    made.prepare_data()
    made.setup("fit")
    made.fit_to(Needs(4, 1, None if kind == "packs" else (8, 8), None, 3, kind == "packs"))
    return made


@pytest.mark.parametrize("kind", ["images", "crops", "packs"])
def test_batches_after_a_resume_are_those_of_the_whole_run(
    shards: Path, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def taken(workers: int, done: int, epochs: range) -> list[Any]:
        made = module(kind, shards, workers)
        monkeypatch.setattr(type(made), "progress", lambda _: (done, 1.0))
        loader, found = made.train_dataloader(), []
        for epoch in epochs:
            loader.batch_sampler.set_epoch(epoch)
            found += list(loader)
        return found

    whole = taken(0, 0, range(2))
    per_epoch = len(whole) // 2
    done = per_epoch + per_epoch // 2  # the middle of the second epoch
    for workers in (0, 2):
        rest = taken(workers, done, range(1, 2))
        assert len(rest) == len(whole) - done
        for ours, theirs in zip(rest, whole[done:], strict=True):
            pairs = zip(flat(ours), flat(theirs), strict=True)
            assert all(torch.equal(a, b) for a, b in pairs)
    labels = torch.cat([batch.labels for batch in whole[:3]])
    assert len(set(labels.tolist())) > 3  # a window holds many classes


def flat(batch: Any) -> list[torch.Tensor]:
    """Every tensor of a batch."""
    if isinstance(batch, torch.Tensor):
        return [batch]
    return [t for part in batch for t in flat(part)] if isinstance(batch, tuple) else []


def test_another_window_is_no_resume(shards: Path) -> None:
    before, now = module("images", shards), module("images", shards, shuffle_shards=2)
    before.train_dataloader()
    now.load_state_dict(before.state_dict())
    with pytest.raises(ValueError, match="shuffle_shards: 3 in the run that is resumed, now 2"):
        now.train_dataloader()


def test_some_of_the_images_lie_in_few_shards(folder: Path, shards: Path) -> None:
    some = open_source("shards", "train", str(shards), num_train=20)
    every = both(folder, shards, "train")[1]
    assert isinstance(some, GroupedSubset)
    assert isinstance(some, Grouped)
    files = [some.describe(i).split("[")[0] for i in range(20)]
    assert len(set(files)) == len(some.groups.starts) - 1 <= 5 < len(every.shards)
    for a, b in zip(some.groups.starts, some.groups.starts[1:], strict=False):
        assert len(set(files[a:b])) == 1
    assert sorted(grouped_order(some.groups, 0, 0)) == list(range(20))


# From afar.


def held(cache: Path) -> int:
    return sum(path.stat().st_size for path in cache.iterdir() if path.is_file())


def test_a_bounded_cache_gives_the_same_images(folder: Path, shards: Path, cache: Path) -> None:
    local = both(folder, shards, "train")[1]
    room = 4 * max(shard.file.size for shard in local.shards)
    with served(shards) as (url, asked):
        source = Shards("train", url, 3, cache_size=room, shuffle_shards=1)
        order = grouped_order(source.groups, 0, 0)
        for i in order.tolist():
            assert source.stored(i) == local.stored(i)
            assert held(cache) <= room
        tars = [path for path in asked if path.endswith(".tar")]
        assert len(tars) == len(set(tars)) == len(source.shards)  # an epoch fetches each once
        again = Shards("train", url, 3, cache_size=room, shuffle_shards=1)
        assert again.stored(int(order[-1])) == local.stored(int(order[-1]))
        assert again.stored(int(order[0])) == local.stored(int(order[0]))  # removed long ago
        assert len([path for path in asked if path.endswith(".tar")]) == len(tars) + 1


def test_what_is_asked_for_ahead_is_there(folder: Path, shards: Path, cache: Path) -> None:
    with served(shards) as (url, asked):
        source = open_source("shards", "train", url)
        assert isinstance(source, Shards)
        source.prefetch(np.arange(30))
        names = {source.describe(i).split("[")[0] for i in range(30)}
        files = [s.file for s in source.shards if source.files.where(s.file.name) in names]
        while not all((cache / f"{file.sha256}.tar").exists() for file in files):
            threading.Event().wait(0.01)
        count = len(asked)
        assert [source[i].label for i in range(30)] == [
            both(folder, shards, "train")[1][i].label for i in range(30)
        ]
        assert len(asked) == count


def test_a_run_from_a_server_is_the_run_from_the_disk(shards: Path) -> None:
    with served(shards) as (url, asked):
        remote, local = module("images", url, workers=2), module("images", shards)
        for ours, theirs in zip(remote.train_dataloader(), local.train_dataloader(), strict=True):
            assert torch.equal(ours.images, theirs.images)
        tars = [path for path in asked if path.endswith(".tar")]
        assert len(tars) == len(set(tars))  # three processes, each shard once


def test_a_download_that_breaks_off_is_repeated(shards: Path) -> None:
    with served(shards, {"/train/000000.tar": ["broken off", "503", "short"]}) as (url, asked):
        source = open_source("shards", "train", url)
        assert source[0].label == open_source("shards", "train", str(shards))[0].label
        assert asked.count("/train/000000.tar") == 4


def test_a_shard_that_never_comes_is_named(shards: Path, cache: Path) -> None:
    with served(shards, {"/train/000001.tar": ["short"] * 99}) as (url, _asked):
        source = open_source("shards", "train", url)
        assert isinstance(source, Shards)
        says = (
            rf"{url}/train/000001.tar could not be fetched, tried 4 times: [\d,]+ of [\d,]+ bytes"
        )
        with pytest.raises(ValueError, match=says):
            source[int(source.groups.starts[1])]
        assert not list(cache.glob("*.part"))
        # In a loader with workers it is said as plainly.
        made = module("images", url, workers=1)
        with pytest.raises(ValueError, match=f"^{says}"):
            list(made.train_dataloader())


def test_a_shard_of_other_content_or_none_is_refused(shards: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(shards, copy)
    tar = copy / "train" / "000000.tar"
    content = bytearray(tar.read_bytes())
    content[700] ^= 1
    tar.write_bytes(content)
    (copy / "train" / "000001.tar").unlink()
    with served(copy) as (url, _asked):
        source = open_source("shards", "train", url)
        assert isinstance(source, Shards)
        with pytest.raises(ValueError, match=r"000000\.tar .*its SHA-256 is not that of index"):
            source[0]
        with pytest.raises(
            ValueError, match=r"000001\.tar could not be fetched, tried once: .*404"
        ):
            source[int(source.groups.starts[1])]
    assert check_data([str(copy), "--workers", "1"]) == 1
    tar.write_bytes(content[:-100])
    local = open_source("shards", "train", str(copy))
    assert isinstance(local, Shards)
    with pytest.raises(ValueError, match=r"000000\.tar has [\d,]+ bytes; index\.json says"):
        local[0]
    with pytest.raises(ValueError, match=r"000001\.tar is not there; index\.json says"):
        local[int(local.groups.starts[1])]


def test_a_damaged_image_is_replaced_like_any_other(shards: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(shards, copy)
    source = open_source("shards", "train", str(copy))
    assert isinstance(source, Shards)
    tar = copy / "train" / "000000.tar"
    content = bytearray(tar.read_bytes())
    start = int(source.members["offset"][0])
    content[start : start + int(source.members["length"][0])] = bytes(source.members["length"][0])
    tar.write_bytes(content)
    assert read_example(source, 0)[1]
    assert not read_example(source, 1)[1]


def test_check_data_looks_into_shards(
    shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert check_data([str(shards), "--workers", "1"]) == 0
    said = capsys.readouterr().out
    assert "6, 16 (ant) to 16 images each" in said


# Nothing is executed, and nothing leads astray.


class Trap:
    def __reduce__(self) -> Any:
        return os.mkdir, ("sprung",)


def test_pickles_are_never_opened(
    shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    copy = tmp_path / "copy"
    shutil.copytree(shards, copy)
    trap = np.array([Trap()], dtype=object)
    np.save(copy / "train" / "members.npy", trap, allow_pickle=True)
    table = copy / "train" / "members.npy"
    index = json.loads((copy / "index.json").read_bytes())
    index["parts"]["train"]["members"]["bytes"] = table.stat().st_size
    (copy / "index.json").write_text(json.dumps(index))
    with pytest.raises(ValueError, match=r"members\.npy is no table of members"):
        open_source("shards", "train", str(copy))
    # An "image" that is a pickle is no image.
    tar = copy / "val" / "000000.tar"
    source = open_source("shards", "val", str(copy))
    assert isinstance(source, Shards)
    start, content = int(source.members["offset"][0]), bytearray(tar.read_bytes())
    evil = pickle.dumps(Trap())
    content[start : start + len(evil)] = evil
    tar.write_bytes(content)
    assert read_example(source, 0)[1]
    assert not (tmp_path / "sprung").exists()


@pytest.mark.parametrize("name", ["../secret.tar", "/etc/passwd", "train/../../x", "http://x/y"])
def test_an_index_leads_nowhere_else(shards: Path, tmp_path: Path, name: str) -> None:
    index = json.loads((shards / "index.json").read_bytes())
    index["parts"]["train"]["shards"][0]["name"] = name
    (tmp_path / "index.json").write_text(json.dumps(index))
    with pytest.raises(ValueError, match="which is no plain path below it"):
        open_source("shards", "train", str(tmp_path))


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ({"root": None}, "source shards needs data.root"),
        ({"root": "nowhere"}, r"data.root nowhere holds no index.json .* expected what `patch"),
        ({"shuffle_shards": 0}, "shuffle_shards is 0; expected at least 1"),
        ({"cache_size": "much"}, "cache_size is 'much'; expected an amount of bytes, such as 256M"),
        (
            {"cachesize": 1},
            "source 'shards' has no option 'cachesize'; it takes: cache, cache_size",
        ),
        ({"root": "xyz://bucket/data"}, r"xyz://bucket/data/index.json cannot be read .* https"),
    ],
)
def test_wrong_arguments(shards: Path, arguments: dict[str, Any], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        open_source(**{"name": "shards", "split": "train", "root": str(shards), **arguments})


def test_a_cache_that_is_too_small_for_a_window_is_refused(shards: Path) -> None:
    says = "cache_size 20K is too little for the 6 shards .* set it to at least"
    with served(shards) as (url, _), pytest.raises(ValueError, match=says):
        open_source("shards", "train", url, cache_size="20K", shuffle_shards=2)


def test_a_checksum_that_is_none_is_told_as_such(shards: Path, tmp_path: Path) -> None:
    index = json.loads((shards / "index.json").read_bytes())
    index["parts"]["train"]["shards"][0]["sha256"] = "00"
    (tmp_path / "index.json").write_text(json.dumps(index))
    says = r"the sha256 of train/000000\.tar is '00'; expected 64 hexadecimal digits"
    with pytest.raises(ValueError, match=says):
        open_source("shards", "train", str(tmp_path))


@pytest.mark.parametrize(
    ("names", "says"),
    [
        ("abcdef", "its class_names are 'abcdef'; expected a list of names"),
        (None, "its class_names are 'None'; expected a list"),
        ([1, 2, 3, 4, 5, 6], "expected a list of names"),
        (list("abcde"), r"members\.npy has labels from 0 to 5, and index\.json names 5 classes"),
    ],
)
def test_classes_are_those_of_the_images(
    shards: Path, tmp_path: Path, names: Any, says: str
) -> None:
    for part in ("train", "val"):
        (tmp_path / part).symlink_to(shards / part)
    index = json.loads((shards / "index.json").read_bytes()) | {"class_names": names}
    (tmp_path / "index.json").write_text(json.dumps(index))
    with pytest.raises(ValueError, match=says):
        open_source("shards", "val", str(tmp_path))


def test_an_index_that_is_none(tmp_path: Path) -> None:
    for content, says in (("{", "is no index"), ('{"format": "x"}', "its format is 'x'")):
        (tmp_path / "index.json").write_text(content)
        with pytest.raises(ValueError, match=says):
            open_source("shards", "train", str(tmp_path))


def test_amounts() -> None:
    assert [bytes_of(text, "x") for text in (7, "7", "2K", "1.5M", "3GiB")] == [
        *(7, 7, 2048, 3 << 19, 3 << 30)
    ]
    for amount in (1, 5000, 123_456_789, 10**12, 10**15):
        assert amount <= bytes_of(said(amount), "x") <= 1.2 * amount + 1024


def test_a_file_url_is_fetched_too(shards: Path, cache: Path) -> None:
    source = open_source("shards", "val", f"file://{shards}")
    assert source[3].label == 1
    assert len(list(cache.glob("*.tar"))) == 1
    # What another process left damaged in the cache is fetched again.
    (tar,) = cache.glob("*.tar")
    tar.write_bytes(b"")
    assert open_source("shards", "val", f"file://{shards}")[3].label == 1


def test_table_rows_are_small() -> None:
    assert MEMBER.itemsize == 24  # 340 MB for the 14 million images of ImageNet-21k
    files = Files("https://host/data/", None, 1)
    assert files.where("train/000000.tar") == "https://host/data/train/000000.tar"
    assert Stored("a", 1, "b") == ("a", 1, "b")
