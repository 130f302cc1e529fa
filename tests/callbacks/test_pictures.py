"""What a method draws, in TensorBoard, and what that must not change."""

import shutil
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import LightningModule
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import Tensor

from callbacks import Pictures
from callbacks.pictures import evaluating, whole_images
from datamodules import PackedDataModule
from modules.backbones import NaViT
from modules.supervised import Supervised
from tests import small
from tests.packs import images as random_images
from tests.packs import pack
from tests.runs import differences

QUICK = {"max_epochs": 2, "limit_train_batches": 2, "limit_val_batches": 1}


@pytest.fixture
def noted(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Tensor, bool, bool]]:
    """What `Supervised.pictures` is called with, in the place of drawing."""
    given: list[tuple[Tensor, bool, bool]] = []

    def pictures(method: Supervised, images: Tensor) -> dict[str, Tensor]:
        given.append((images, method.training, torch.is_grad_enabled()))
        torch.rand(3)
        return {"first": images[0].expand(3, -1, -1).clamp(0, 1)}

    monkeypatch.setattr(Supervised, "pictures", pictures)
    return given


def logged(directory: Path) -> dict[str, list[int]]:
    """Steps of every picture in the event files of a run."""
    events = EventAccumulator(str(directory), size_guidance={"images": 0})
    events.Reload()
    tags = [tag for tag in events.Tags()["images"] if tag.startswith("pictures/")]
    return {tag: [image.step for image in events.Images(tag)] for tag in tags}


def test_what_supervised_draws_is_logged(tmp_path: Path) -> None:
    trainer = small.trainer(tmp_path, Pictures(every_n_epochs=2, num_images=2), **QUICK)
    trainer.fit(small.method(), small.data())
    names = {
        *("attention", "attention_mass", "rollout", "attention_distance"),
        *("position_similarity", "embedding_filters", "patch_pca"),
    }
    assert logged(Path(trainer.log_dir)) == {f"pictures/{name}": [4] for name in names}


@pytest.mark.parametrize(
    ("every", "epochs", "steps"), [(1, 3, [2, 4, 6]), (2, 3, [4, 6]), (5, 2, [4])]
)
def test_every_n_epochs_and_at_the_end(
    every: int, epochs: int, steps: list[int], tmp_path: Path, noted: list
) -> None:
    trainer = small.trainer(tmp_path, Pictures(every), **QUICK | {"max_epochs": epochs})
    trainer.fit(small.method(), small.data())
    assert logged(Path(trainer.log_dir)) == {"pictures/first": steps}


def test_the_images_are_held_out_ones_without_augmentation(tmp_path: Path, noted: list) -> None:
    data = small.data(batch_size=2)
    trainer = small.trainer(tmp_path, Pictures(num_images=3), **QUICK)
    trainer.fit(small.method(), data)
    (first, *modes), (second, *_) = noted
    assert modes == [False, False]  # eval mode, no gradients
    assert torch.equal(first, second)
    batches = islice(data.eval_batches(data.val_source, torch.device("cpu")), 2)
    assert torch.equal(first, torch.cat([batch.images for batch in batches])[:3])


def final(directory: Path, *callbacks: Any, **changes: Any) -> dict[str, Any]:
    method = small.method()
    ckpt_path = changes.pop("ckpt_path", None)
    trainer = small.trainer(directory, *callbacks, **QUICK | changes)
    trainer.fit(method, small.data(), ckpt_path=ckpt_path)
    optimizer = trainer.optimizers[0].state_dict()
    return {"weights": method.state_dict(), "optimizer": optimizer, "rng": torch.get_rng_state()}


def test_training_is_the_same_with_and_without(tmp_path: Path) -> None:
    without = final(tmp_path / "without")
    assert differences(without, final(tmp_path / "with", Pictures(num_images=1))) == []


def test_random_numbers_go_on_as_they_were(tmp_path: Path, noted: list) -> None:
    """Also where no step seeds anew: the loader and the method both draw."""
    without = final(tmp_path / "without", max_epochs=1)
    drawn = final(tmp_path / "with", Pictures(), max_epochs=1)
    assert len(noted) == 1
    assert torch.equal(without["rng"], drawn["rng"])


def test_a_resumed_run_is_the_same_with_and_without(tmp_path: Path, noted: list) -> None:
    whole = final(tmp_path / "whole")
    final(tmp_path / "stopped", Pictures(), max_epochs=1)
    (last,) = (tmp_path / "stopped").rglob("last.ckpt")
    shutil.copy(last, tmp_path / "last.ckpt")
    resumed = final(tmp_path / "resumed", Pictures(), ckpt_path=str(tmp_path / "last.ckpt"))
    del whole["rng"], resumed["rng"]
    assert differences(whole, resumed) == []


def test_modes_are_put_back_part_by_part() -> None:
    method = small.method()
    method.train()
    before = [part.training for part in method.modules()]
    assert len(set(before)) == 2  # the averaged copy stays in eval mode
    with evaluating(method):
        assert not any(part.training for part in method.modules())
    assert [part.training for part in method.modules()] == before


def test_without_a_logger_nothing_is_drawn(tmp_path: Path, noted: list) -> None:
    small.trainer(tmp_path, Pictures(), fast_dev_run=1).fit(small.method(), small.data())
    assert noted == []


def test_without_validation_images_one_warning(
    tmp_path: Path, noted: list, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = small.data()
    monkeypatch.setattr(data, "eval_batches", lambda *_: iter(()))
    trainer = small.trainer(tmp_path, Pictures(), **QUICK)
    with pytest.warns(UserWarning, match="no validation images to draw") as warned:
        trainer.fit(small.method(), data)
    assert len([w for w in warned if "no validation images" in str(w.message)]) == 1
    assert noted == []


def test_a_method_that_draws_nothing_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"LightningModule has no pictures\(images\)"):
        Pictures().setup(small.trainer(tmp_path), LightningModule(), "fit")


@pytest.mark.parametrize("name", ["every_n_epochs", "num_images"])
def test_numbers_below_one_are_refused(name: str) -> None:
    with pytest.raises(ValueError, match=f"{name} is 0; expected at least 1"):
        Pictures(**{name: 0})


def test_images_come_whole_out_of_packs() -> None:
    sizes = [(8, 12), (4, 4), (12, 8), (8, 12)]
    given = random_images(sizes)
    packed = pack([given[:2], given[2:]], patch=4, length=20, slots=3, num_prefix=1)
    is_valid = torch.tensor([True, True, False, True, True, False])
    found = whole_images(packed, is_valid, channels=3)
    assert len(found) == 4
    assert all(torch.equal(a, b) for a, b in zip(found, given, strict=True))
    is_valid[0] = False
    assert torch.equal(whole_images(packed, is_valid, channels=3)[1], given[2])


def test_of_packs_the_most_frequent_size_is_drawn(tmp_path: Path, noted: list) -> None:
    data = PackedDataModule(
        source="shapes",
        source_args={"num_train": 16, "num_val": 12, "min_side": 16, "max_side": 32},
        num_rows=2,
        row_length=256,
        num_workers=0,
        eval_side=16,
        mean=(0.5,) * 3,
        std=(0.5,) * 3,
    )
    method = small.method(backbone=NaViT("mu", patch_size=4), ema_decay=None)
    trainer = small.trainer(tmp_path, Pictures(num_images=2), **QUICK | {"max_epochs": 1})
    trainer.fit(method, data)
    ((images, *_),) = noted
    assert 1 <= len(images) <= 2
    assert images.shape[2] % 4 == images.shape[3] % 4 == 0
    assert logged(Path(trainer.log_dir)) == {"pictures/first": [2]}


def test_every_rank_makes_the_loader_but_one_draws(
    tmp_path: Path, noted: list, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Making it may be something that all ranks do together, as with packs."""
    data, method, asked = small.data(), small.method(), []
    trainer = small.trainer(tmp_path, Pictures(num_images=1), **QUICK | {"max_epochs": 1})
    original = data.eval_batches

    def note(*given: Any) -> Any:
        asked.append(given)
        return original(*given)

    monkeypatch.setattr(data, "eval_batches", note)
    monkeypatch.setattr(type(trainer), "is_global_zero", False)
    trainer.fit(method, data)
    assert len(asked) == 1
    assert noted == []
