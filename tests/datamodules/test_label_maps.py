"""Label maps on disk: what is written is read, and what is wrong is named with its file."""

import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from datamodules.label_maps import LabelMaps
from datamodules.label_shards import (
    About,
    Labelled,
    begin,
    clear,
    is_whole,
    name_of,
    read_about,
    shard_path,
    write_shard,
)
from datamodules.published_maps import import_published
from datamodules.sources import Source, open_source
from tests.label_maps import labelled, write_maps


def shapes(count: int = 12) -> Source:
    return open_source("shapes", "train", None, channels=3, num_train=count, num_val=1)


def folder(root: Path, names: tuple[str, ...] = ("a/1.png", "a/2.x.png", "b/3.png")) -> Source:
    """A training directory of small images, with one held out."""
    for name in (*(f"train/{name}" for name in names), "val/a/0.png", "val/b/1.png"):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.full((8, 8, 3), 99, np.uint8)).save(root / name)
    return open_source("folder", "train", str(root), channels=3)


def test_what_is_written_is_read(tmp_path: Path) -> None:
    """Ids beyond half precision, maps that are not square and of several sizes, a remainder."""
    source, about = shapes(3), About("someone", 40_000, 2, remainder=True)
    begin(tmp_path, about)
    maps = []
    for i, grid in enumerate(((2, 3), (5, 1), (0, 0))):
        ids = torch.randint(30_000, 40_000, (*grid, 2), dtype=torch.int32)
        scores, remainder = torch.randn(*grid, 2).half(), torch.randn(*grid).half()
        maps.append(Labelled(f"shapes/train[{i}]", -1, scores, ids, remainder))
    write_shard(tmp_path, about, 0, maps[:2])
    write_shard(tmp_path, about, 1, maps[2:])
    assert read_about(tmp_path) == about
    found = LabelMaps(tmp_path, source, None)
    found.check_values()
    assert found.largest() == (5, 3)
    for i, one in enumerate(maps):
        labels = found.read(i, "teacher")
        assert np.array_equal(labels.ids, one.ids.numpy())
        assert np.array_equal(labels.scores, one.scores.float().numpy())
        assert one.remainder is not None
        others = one.remainder.float().numpy() - np.log(39_998)
        np.testing.assert_allclose(labels.rest, others, atol=1e-5)
        assert not found.read(i, "zeros").rest.any()
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        "maps-00000.safetensors",
        "maps-00001.safetensors",
        "maps.json",
    ]


def test_maps_follow_their_images_when_these_are_moved_or_fewer(tmp_path: Path) -> None:
    source = folder(tmp_path / "here")
    write_maps(tmp_path / "maps", source, str(tmp_path / "here"), shard_size=2)
    os.rename(tmp_path / "here", tmp_path / "there")
    (tmp_path / "there/train/a/1.png").unlink()
    moved = open_source("folder", "train", str(tmp_path / "there"), channels=3)
    maps = LabelMaps(tmp_path / "maps", moved, str(tmp_path / "there"))
    assert len(moved) == 2
    assert maps.read(1, "zeros").ids[0, 0, 0] == 1  # the class of b/3.png
    assert maps.find(0)[0].path.name == "maps-00000.safetensors"


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-7])


def rewrite(directory: Path, ids: int, score: float) -> None:
    one = Labelled(
        "shapes/train[7]", -1, torch.full((1, 1, 3), score), torch.full((1, 1, 3), ids), None
    )
    fine = [
        Labelled(f"shapes/train[{i}]", -1, torch.ones(2, 2, 3), torch.ones(2, 2, 3), None)
        for i in (5, 6)
    ]
    write_shard(directory, read_about(directory), 1, [*fine, one])


@pytest.mark.parametrize(
    ("harm", "says"),
    [
        (
            lambda d: truncate(shard_path(d, 1)),
            r"maps-00001.safetensors is damaged .*delete it and",
        ),
        (lambda d: shard_path(d, 1).write_bytes(b""), r"maps-00001.safetensors is damaged"),
        (
            lambda d: shard_path(d, 2).unlink(),
            r"has no label map of shapes/train\[10\]; run `patchlight relabel`",
        ),
        (lambda d: (d / "maps.json").unlink(), r"holds no label maps \(no maps.json\)"),
        (lambda d: truncate(d / "maps.json"), r"maps.json is damaged"),
        (
            lambda d: (d / "maps.json").write_text(
                '{"teacher": "t", "num_classes": 10, "top_k": 4, "remainder": false}'
            ),
            r"maps-00000.safetensors is damaged \(scores has 3 classes a cell; maps.json says 4",
        ),
    ],
)
def test_damage_names_the_file_and_the_fix(
    tmp_path: Path, harm: Callable[[Path], object], says: str
) -> None:
    write_maps(tmp_path, shapes())
    harm(tmp_path)
    with pytest.raises(ValueError, match=says):
        LabelMaps(tmp_path, shapes(), None)


@pytest.mark.parametrize(("ids", "score"), [(10, 1.0), (-1, 1.0), (3, float("nan"))])
def test_values_that_cannot_be_are_found(tmp_path: Path, ids: int, score: float) -> None:
    write_maps(tmp_path, shapes(8))
    rewrite(tmp_path, ids, score)
    maps = LabelMaps(tmp_path, shapes(8), None)
    with pytest.raises(ValueError, match=r"maps-00001.*the map of shapes/train\[7\] has scores"):
        maps.check_values()


def test_an_image_that_was_changed_needs_a_new_map(tmp_path: Path) -> None:
    root = tmp_path / "images"
    source = folder(root)
    write_maps(tmp_path / "maps", source, str(root))
    LabelMaps(tmp_path / "maps", source, str(root))
    changed = root / "train/a/2.x.png"
    later = changed.stat().st_mtime_ns + 1
    os.utime(changed, ns=(later, later))
    with pytest.raises(ValueError, match=r"train/a/2.x.png was changed after its label map"):
        LabelMaps(tmp_path / "maps", source, str(root))
    LabelMaps(tmp_path / "maps", source, str(root), check_dates=False)


def test_maps_of_another_teacher_are_not_added_to(tmp_path: Path) -> None:
    about = About("one", 10, 3, remainder=False)
    begin(tmp_path, about)
    begin(tmp_path, about)
    for other in (
        About("two", 10, 3, False),
        About("one", 11, 3, False),
        About("one", 10, 3, True),
    ):
        with pytest.raises(ValueError, match=r"holds maps with .*name another directory"):
            begin(tmp_path, other)
    with pytest.raises(ValueError, match="top_k is 4; expected 1 to 3"):
        About("one", 3, 4, False)


def publish(root: Path, source: Source, rows: int = 3, columns: int = 2) -> None:
    for index in range(len(source)):
        image = Path(source.describe(index))
        path = root / image.parent.name / f"{image.stem}.pt"
        path.parent.mkdir(parents=True, exist_ok=True)
        scores = torch.rand(5, rows, columns) + index
        ids = torch.arange(5.0).view(5, 1, 1).expand(5, rows, columns) + index
        torch.save(torch.stack([scores, ids]).half(), path)


def test_two_maps_of_an_image_are_refused(tmp_path: Path) -> None:
    """As a run in larger shards leaves them that was stopped; shards of other images come last."""
    write_maps(tmp_path, shapes(), shard_size=2)
    write_maps(tmp_path, shapes(), shard_size=6)
    with pytest.raises(ValueError, match=r"shapes/train\[4\] has 2 label maps, in .*maps-00000.*2"):
        LabelMaps(tmp_path, shapes(), None)
    clear(tmp_path, 2)
    assert len(LabelMaps(tmp_path, shapes(), None).shards) == 2


def test_an_image_that_a_list_has_twice(tmp_path: Path) -> None:
    folder(tmp_path)
    (tmp_path / "list.txt").write_text("train/a/1.png 0\ntrain/a/1.png 0\ntrain/b/3.png 1\n")
    options = {"val_root": str(tmp_path / "val")}
    root = str(tmp_path / "list.txt")
    source = open_source("folder", "train", root, channels=3, **options)
    write_maps(tmp_path / "maps", source, root)
    assert len(LabelMaps(tmp_path / "maps", source, root).places) == 3


def test_the_first_image_of_every_shard_is_compared(tmp_path: Path) -> None:
    plain = open_source("shapes", "train", None, channels=3, num_train=4, num_val=1, texture=0.0)
    about = About("a test", 10, 3, remainder=False)
    begin(tmp_path, about)
    for number, source in enumerate((shapes(4), plain)):
        rows = range(2 * number, 2 * number + 2)
        maps = [labelled(source, i, None, about, (2, 2), i == rows.start) for i in rows]
        write_shard(tmp_path, about, number, maps)
    with pytest.raises(ValueError, match=r"shapes/train\[2\] is not the image that its label map"):
        LabelMaps(tmp_path, shapes(4), None)


def test_shards_know_whose_they_are(tmp_path: Path) -> None:
    """Also when `maps.json` was deleted, as a damaged one is to be."""
    source, root, maps = folder(tmp_path), str(tmp_path), tmp_path / "maps"
    write_maps(maps, source, root)
    assert is_whole(0, range(3), maps, read_about(maps), source, root)
    (maps / "maps.json").unlink()
    other = About("a test", 10, 3, remainder=False, fingerprint="other")
    begin(maps, other)
    assert not is_whole(0, range(3), maps, other, source, root)
    with pytest.raises(
        ValueError, match=r"maps-00000.*\(it is of another teacher or other options"
    ):
        LabelMaps(maps, source, root)


@pytest.mark.parametrize("root", ["{}/images", "{}/images/train/..", "{}/images/list.txt"])
def test_names_are_below_the_root(tmp_path: Path, root: str) -> None:
    images, broken = tmp_path / "images", "train/a/4\n5.png"
    folder(images, ("a/1.png", "a/4\n5.png", "b/3.png"))
    (images / "list.txt").write_text("train/a/1.png 0\ntrain/b/3.png 1\n")
    root = root.format(tmp_path)
    source = open_source("folder", "train", root, channels=3, val_root=str(images / "val"))
    assert name_of(source, 0, root) == "train/a/1.png"
    write_maps(tmp_path / "maps", source, root)
    maps = LabelMaps(tmp_path / "maps", source, root)
    if not root.endswith(".txt"):
        assert maps.shards[0].names[1] == broken.replace("\n", "\\n")


def test_published_maps_come_in(tmp_path: Path) -> None:
    source = folder(tmp_path / "images")
    publish(tmp_path / "pt", source)
    given = (tmp_path / "pt", tmp_path / "maps", source, str(tmp_path / "images"))
    import_published(*given, num_classes=10, shard_size=2)
    maps = LabelMaps(tmp_path / "maps", source, str(tmp_path / "images"))
    maps.check_values()
    assert maps.about == About(f"imported from {tmp_path / 'pt'}", 10, 5, remainder=False)
    for index in range(3):
        labels = maps.read(index, "zeros")
        assert labels.ids.shape == (3, 2, 5)
        assert labels.ids[0, 0].tolist() == [index + i for i in range(5)]
        image = Path(source.describe(index))
        scores = torch.load(tmp_path / "pt" / image.parent.name / f"{image.stem}.pt")[0]
        assert np.array_equal(labels.scores, scores.permute(1, 2, 0).float().numpy())
    # A second call does nothing that was done, and again what was damaged or is no longer so.
    whole = shard_path(tmp_path / "maps", 0).stat().st_mtime_ns
    harms = (Path.unlink, truncate, lambda _: os.utime(source.describe(2), ns=(9, 9)))
    for harm in harms:
        harm(shard_path(tmp_path / "maps", 1))
        import_published(*given, num_classes=10, shard_size=2)
        assert shard_path(tmp_path / "maps", 0).stat().st_mtime_ns == whole
        LabelMaps(tmp_path / "maps", source, str(tmp_path / "images")).check_values()
    maps = LabelMaps(tmp_path / "maps", source, str(tmp_path / "images"))
    assert maps.shards[1].stamps.tolist() == [9]


class Hostile:
    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple:
        return (Path.touch, (self.mark,))


def test_published_maps_that_are_bad_are_named(tmp_path: Path) -> None:
    source = folder(tmp_path / "images")
    publish(tmp_path / "pt", source)
    given = (tmp_path / "pt", tmp_path / "maps", source, str(tmp_path / "images"))
    bad, mark = tmp_path / "pt" / "a" / "2.x.pt", tmp_path / "ran"
    ids = torch.arange(5.0).view(5, 1, 1).expand(5, 2, 2)
    for content, says in (
        (Hostile(mark), "2.x.pt was refused and nothing of it was run"),
        ([1, 2], r"2.x.pt holds list; expected a tensor \[2, 5, rows, columns\]"),
        (torch.ones(3, 5, 2, 2), r"2.x.pt holds \[3, 5, 2, 2\]"),
        (torch.ones(2, 4, 2, 2), r"2.x.pt holds \[2, 4, 2, 2\]; expected a tensor \[2, 5, rows"),
        (torch.ones(2, 5, 0, 0), r"2.x.pt holds \[2, 5, 0, 0\]"),
        (torch.ones(2, 5, 2, 2).int(), r"2.x.pt holds torch.int32"),
        (torch.ones(2, 5, 2, 2).to_sparse(), r"2.x.pt holds .* torch.sparse_coo on cpu"),
        (torch.ones(2, 5, 2, 2, device="meta"), r"2.x.pt holds .* on meta"),
        (torch.ones(1).expand(2, 5, 9**6, 9**6), r"2.x.pt holds .* most is not in the file"),
        (torch.ones(2, 5, 2, 2), r"2.x.pt has a class twice in a cell"),
        (torch.full((2, 5, 2, 2), 0.5), r"2.x.pt has .*, or classes outside 0 to 9"),
        (torch.stack([ids * 1e6, ids]), "2.x.pt has scores that are no numbers of half precision"),
    ):
        torch.save(content, bad)
        with pytest.raises(ValueError, match=says):
            import_published(*given, num_classes=10, shard_size=2)
    bad.unlink()
    with pytest.raises(ValueError, match=r"there is no label map .*2.x.pt"):
        import_published(*given, num_classes=10, shard_size=2)
    with pytest.raises(ValueError, match="ids above 2048 are not exact"):
        import_published(*given, num_classes=21_843, shard_size=2)
    assert not mark.exists()
