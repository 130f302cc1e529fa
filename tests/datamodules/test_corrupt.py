"""One JPEG of a hundred is damaged: the run finishes, and says how many it could not read."""

import tarfile
import warnings
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageFile

from datamodules.folder import decode, read_size
from datamodules.foreign import index_tars
from datamodules.shards import Shards
from datamodules.sources import BadImageError, open_source
from tests.datamodules.test_foreign import add
from tests.datamodules.test_images import batches
from tests.datamodules.test_images import folder as data_of

BAD = 42  # which of the hundred


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATCHLIGHT_CACHE", str(tmp_path / "cache"))


def jpeg(seed: int, **how: Any) -> bytes:
    pixels = np.random.default_rng(seed).integers(0, 256, (40, 48, 3), dtype=np.uint8)
    file = BytesIO()
    Image.fromarray(pixels).save(file, "JPEG", **how)
    return file.getvalue()


def damaged(content: bytes, how: str) -> bytes:
    return content[: len(content) // 2] if how == "truncated" else b"\x93" * len(content)


@pytest.mark.parametrize("progressive", [False, True])
def test_half_a_jpeg_is_never_filled_with_grey(progressive: bool) -> None:
    content = jpeg(0, progressive=progressive)
    assert decode(BytesIO(content), 3).shape == (40, 48, 3)
    assert not ImageFile.LOAD_TRUNCATED_IMAGES
    start = content.index(b"\xff\xda")  # where the header ends and the pixels begin
    for end in np.linspace(start + 20, len(content) - 20, 12).astype(int).tolist():
        assert read_size(BytesIO(content[:end])) == (40, 48)  # as if nothing was wrong
        with pytest.raises(BadImageError, match="truncated"):
            decode(BytesIO(content[:end]), 3)


def folder_of(root: Path, how: str) -> dict[str, Any]:
    for part, count in (("train", 100), ("val", 4)):
        for i in range(count):
            path = root / part / "ab"[i % 2] / f"{i:03d}.jpg"
            path.parent.mkdir(parents=True, exist_ok=True)
            content = jpeg(i)
            path.write_bytes(damaged(content, how) if (part, i) == ("train", BAD) else content)
    return {"source": "folder", "root": str(root)}


def shards_of(root: Path, how: str) -> dict[str, Any]:
    """Tar files of others, which show nothing when they are indexed, or are damaged later."""
    for part, count in (("train", 100), ("val", 4)):
        (root / part).mkdir(parents=True)
        with tarfile.open(root / part / "0.tar", "w") as tar:
            for i in range(count):
                is_cut = (part, i, how) == ("train", BAD, "truncated")
                add(tar, f"{i:03d}.jpg", damaged(jpeg(i), how) if is_cut else jpeg(i))
                add(tar, f"{i:03d}.cls", b"%d" % (i % 2))
    assert index_tars(root).images == 104
    if how == "garbage":
        source, tar_file = Shards("train", str(root), 3), root / "train" / "0.tar"
        whole, place = bytearray(tar_file.read_bytes()), int(source.members["offset"][BAD])
        length = int(source.members["length"][BAD])
        whole[place : place + length] = damaged(bytes(length), how)
        tar_file.write_bytes(whole)
    return {"source": "shards", "root": str(root)}


@pytest.mark.parametrize("make", [folder_of, shards_of])
@pytest.mark.parametrize("how", ["truncated", "garbage"])
def test_a_run_with_one_percent_of_damaged_jpegs_finishes_with_a_count(
    tmp_path: Path, make: Any, how: str
) -> None:
    made = make(tmp_path / "images", how)
    assert len(open_source(made["source"], "train", made["root"])) == 100
    data = data_of(Path(made["root"]), source=made["source"], batch_size=10, max_bad=0.01)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        seen = batches(tmp_path, data, limit_train_batches=1.0, limit_val_batches=1.0)
    told = [str(warning.message) for warning in said if "unreadable" in str(warning.message)]
    assert len(told) == 1
    assert told[0].endswith("another image takes its place (1 unreadable so far)")
    assert len(seen.train) == 10  # to the end
    replaced = [batch.indices[batch.is_replaced].tolist() for batch in seen.train]
    (bad,) = [index for indices in replaced for index in indices]
    name = data.train_source.describe(bad)
    assert name.endswith((f"a/{BAD:03d}.jpg", f"0.tar[{BAD}]"))
    assert data.unreadable["train"].names == [name]
    assert data.unreadable["val"].names == []
    (listed,) = tmp_path.rglob("unreadable-0.txt")
    assert listed.read_text().splitlines() == [name]
