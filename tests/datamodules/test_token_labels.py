"""Batches with token labels: what is in them, that workers change nothing, what is refused."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from datamodules import TokenLabelDataModule
from datamodules.batch import TokenLabelBatch
from datamodules.module import Needs
from datamodules.sampling import Sample
from datamodules.sources import open_source
from datamodules.token_labels import TokenLabelDataset
from tests.label_maps import write_maps

NEEDS = Needs(8, 1, (32, 32), None, 3, True)


def data(labels: Path, count: int = 16, fits: bool = True, **changes: Any) -> TokenLabelDataModule:
    arguments: dict[str, Any] = {
        "source": "shapes",
        "source_args": {"num_train": count, "num_val": 4},
        "batch_size": 4,
        "num_workers": 0,
        "rand_augment": "rand-m9-mstd0.5-inc1",
    }
    module = TokenLabelDataModule(str(labels), **arguments | changes)
    if fits:
        module.fit_to(NEEDS)
        module.prepare_data()
        module.setup("fit")
    return module


@pytest.fixture
def maps(tmp_path: Path) -> Path:
    source = open_source("shapes", "train", None, channels=3, num_train=16, num_val=4)
    write_maps(tmp_path / "maps", source, remainder=True)
    return tmp_path / "maps"


def batches(module: TokenLabelDataModule) -> list[TokenLabelBatch]:
    return list(module.train_dataloader())


def test_a_batch(maps: Path) -> None:
    for batch in batches(data(maps)):
        assert isinstance(batch, TokenLabelBatch)
        assert batch.images.shape == (4, 3, 32, 32)
        assert batch.tokens is not None
        assert batch.tokens.ids.shape == batch.tokens.values.shape
        assert batch.tokens.ids.shape[:2] == (4, 16)
        assert batch.pooled.shape == (4, 10)
        # Every cell of these maps is sure of the image's class, and so is the crop.
        assert torch.equal(batch.pooled.argmax(-1), batch.labels)
        assert torch.equal(batch.labels, batch.indices % 10)


def test_workers_change_nothing(maps: Path) -> None:
    here, there = (batches(data(maps, num_workers=n)) for n in (0, 2))
    for ours, theirs in zip(here, there, strict=True):
        assert ours.tokens is not None
        assert theirs.tokens is not None
        for a, b in zip((*ours[:6], *ours.tokens), (*theirs[:6], *theirs.tokens), strict=True):
            assert torch.equal(a, b)


def test_options_of_the_labels(maps: Path) -> None:
    plain, *_ = batches(data(maps))
    crop, *_ = batches(data(maps, label_size=1))
    assert crop.tokens is None
    assert torch.equal(crop.pooled, plain.pooled)
    assert torch.equal(crop.images, plain.images)
    assert plain.tokens is not None
    swapped, *_ = batches(data(maps, transposed_crop=True))
    assert not torch.equal(swapped.pooled, plain.pooled)
    rest, *_ = batches(data(maps, rest="teacher"))
    assert rest.tokens is not None
    # Other classes had scores below 1, but above 0: the best one is less far above them.
    assert torch.equal(rest.tokens.ids, plain.tokens.ids)
    difference = plain.tokens.values.sum(-1) - rest.tokens.values.sum(-1)
    assert difference.min() >= 0  # 0 where a token shows what was moved in from outside
    assert difference.median() > 0


def test_evaluation_needs_no_maps(tmp_path: Path) -> None:
    module = data(tmp_path / "nowhere", fits=False)
    module.fit_to(NEEDS)
    module.prepare_data()
    module.setup("validate")
    batch = next(iter(module.val_dataloader()))
    assert batch.images.shape == (4, 3, 32, 32)
    assert module.on_after_batch_transfer(batch, 0).images.dtype == torch.float32


def test_an_image_that_takes_anothers_place_brings_its_own_map(tmp_path: Path) -> None:
    root = tmp_path / "images"
    for name in ("train/a/0.png", "train/a/1.png", "train/b/2.png", "val/a/3.png", "val/b/4.png"):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.full((8, 8, 3), 99, np.uint8)).save(root / name)
    source = open_source("folder", "train", str(root), channels=3)
    write_maps(tmp_path / "maps", source, str(root))
    (root / "train/a/1.png").write_bytes(b"broken")
    options = {"source": "folder", "root": str(root), "source_args": None, "check_dates": False}
    module = data(tmp_path / "maps", **options)
    dataset = TokenLabelDataset(module.train_source, module.maps, "zeros", module.geometry())
    found = dataset[Sample(1, 5)]
    assert found.is_replaced
    assert found.pooled.argmax() == found.labels


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ({"label_size": 3}, "label_size is 3x3, but the backbone has 4x4 patches; set it to null"),
        ({"label_size": 0}, "label_size is 0; expected at least 1"),
        (
            {"source_args": {"num_train": 17, "num_val": 4}},
            r"has no label map of shapes/train\[16\]",
        ),
        ({"rand_augment": "cutout"}, "rand_augment 'cutout' is not a recipe"),
        ({"erasing": 2.0}, "erasing is 2.0"),
    ],
)
def test_errors_come_before_the_first_step(maps: Path, arguments: dict, says: str) -> None:
    with pytest.raises(ValueError, match=says):
        data(maps, **arguments)


def test_a_rest_that_was_not_kept_and_too_few_classes(tmp_path: Path) -> None:
    source = open_source("shapes", "train", None, channels=3, num_train=16, num_val=4)
    write_maps(tmp_path / "plain", source)
    with pytest.raises(ValueError, match=r"rest is 'teacher', but the maps .* do not have it"):
        data(tmp_path / "plain", rest="teacher")
    digits = {"source": "digits", "source_args": None}
    with pytest.raises(ValueError, match=r"has no label map of digits\[0\]"):
        data(tmp_path / "plain", **digits)
    few = open_source("shapes", "train", None, channels=3, num_train=5, num_val=4)
    write_maps(tmp_path / "few", few, num_classes=5)
    with pytest.raises(ValueError, match="maps of 5 classes, but the data has 10"):
        data(tmp_path / "few", source_args={"num_train": 5, "num_val": 4})
