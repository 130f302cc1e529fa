"""`patchlight shard`, and a run on what it wrote."""

from pathlib import Path

import pytest

from datamodules.sources import open_source
from experiments.shard import shard
from tests.datamodules.test_folder import tree
from tests.datamodules.test_foreign import foreign
from tests.experiments.test_resume import same_end
from tests.runs import TINY, logged_losses, only_run, patchlight


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATCHLIGHT_CACHE", str(tmp_path / "cache"))


def folder(root: Path) -> Path:
    tree(root / "train", count=12)
    tree(root / "val", count=4)
    return root


def test_a_folder_becomes_shards(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    images, out = folder(tmp_path / "pets"), tmp_path / "out"
    (images / "train" / "cat" / "003.png").write_bytes(b"garbage")
    assert shard(["--data", str(images), "--out", str(out), "--shard-size", "8K"]) == 0
    said = capsys.readouterr()
    assert f"31 images in {len(list(out.glob('*/*.tar')))} shards" in said.out
    assert len(list(out.glob("train/*.tar"))) > 3
    assert f"source: shards\n    root: {out}" in said.out
    assert "left out: train/cat/003.png (" in said.err
    assert "1 images could not be read and were left out" in said.err
    source = open_source("shards", "train", str(out))
    assert (len(source), source.class_names) == (23, ("cat", "dog"))
    assert not (out / ".unfinished").exists()
    # Shards are a source like any other: here they are put into larger ones.
    assert shard(["--data", str(out), "--out", str(tmp_path / "again")]) == 0
    again = open_source("shards", "train", str(tmp_path / "again"))
    assert sorted(again.stored(i) for i in range(23)) == sorted(  # type: ignore[attr-defined]
        source.stored(i)  # type: ignore[attr-defined]
        for i in range(23)
    )


def test_a_named_source_and_that_of_a_recipe(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        "data:\n  init_args: {source: shapes, source_args: {num_train: 20, num_val: 5}}\n"
    )
    for data, count in (("digits", 1437), (str(recipe), 20)):
        out = tmp_path / str(count)
        assert shard(["--data", data, "--out", str(out)]) == 0
        assert len(open_source("shards", "train", str(out))) == count
        index = (out / "index.json").read_text()
        assert str(tmp_path) not in index  # nor does anything else say where it was made


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--data", "./nowhere"], r"--data \./nowhere does not exist"),
        (["--data", "digitz"], "did you mean digits"),
        (["--data", ".", "--root", "x"], "--root x is for a named source"),
        (["--data", "digits", "--shard-size", "big"], "--shard-size is 'big'; expected an amount"),
        (["--data", "digits", "--shard-size", "4G"], "--shard-size 4G; expected at most 2G"),
        (["--data", "digits", "--workers", "0"], "--workers 0; expected at least 1"),
    ],
)
def test_wrong_arguments(tmp_path: Path, arguments: list[str], says: str) -> None:
    (tmp_path / "empty.yaml").write_text("model: {}")
    with pytest.raises(ValueError, match=says):
        shard([*arguments, "--out", str(tmp_path / "out")])
    with pytest.raises(ValueError, match=r"is no recipe that names data\.init_args\.source"):
        shard(["--data", str(tmp_path / "empty.yaml"), "--out", str(tmp_path / "out")])


def test_nothing_is_written_over(tmp_path: Path) -> None:
    assert shard(["--data", "digits", "--out", str(tmp_path / "out")]) == 0
    with pytest.raises(ValueError, match=r"out is finished already: it has an index\.json"):
        shard(["--data", "digits", "--out", str(tmp_path / "out")])
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(ValueError, match="is not empty; expected a new directory"):
        shard(["--data", "digits", "--out", str(tmp_path)])


@pytest.mark.slow
def test_a_killed_run_on_shards_ends_like_one_that_was_not(tmp_path: Path) -> None:
    """From a URL, so that shards are fetched, ahead of time and in workers, before and after."""
    out = tmp_path / "out"
    assert shard(["--data", str(folder(tmp_path / "pets")), "--out", str(out)]) == 0
    data = ["--data.init_args.source=shards", f"--data.init_args.root=file://{out}"]
    data += ["--data.init_args.source_args={shuffle_shards: 2}"]
    ends = []
    for name, workers, kill_at in (("whole", 0, None), ("killed", 2, 8)):
        place = tmp_path / name
        place.mkdir()
        many = f"--data.init_args.num_workers={workers}"
        done = patchlight("fit", *TINY, *data, many, cwd=place, kill_at=kill_at)
        if kill_at is not None:
            done = patchlight("fit", "--resume", str(only_run(place)), cwd=place)
        assert done.returncode == 0, done.stderr
        ends.append(only_run(place))
    assert same_end(*ends) == []
    assert logged_losses(ends[0]) == logged_losses(ends[1])


def test_an_index_for_the_tar_files_of_others(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    images = sorted(folder(tmp_path / "pets").rglob("*.png"))[:10]
    root = foreign(tmp_path / "foreign", images)
    assert shard(["--index", str(root)]) == 0
    said = capsys.readouterr()
    assert "20 images in 4 shards" in said.out
    assert "not used: 20 members of kind .pyd" in said.err
    assert len(open_source("shards", "val", str(root))) == 10
    with pytest.raises(ValueError, match="--data needs --out"):
        shard(["--data", "digits"])
