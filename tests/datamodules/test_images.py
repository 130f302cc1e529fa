"""The data module: what reaches a method, and what becomes of images that cannot be read."""

import os
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback

from datamodules import ImageDataModule
from datamodules.augment import normalize
from datamodules.batch import ImageBatch
from datamodules.photometric import three_augment
from tests import small
from tests.datamodules.test_folder import tree
from tests.runs import differences


@pytest.fixture(autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATCHLIGHT_CACHE", str(tmp_path_factory.mktemp("cache")))


# Options of a recipe for coloured images.
COLOR: dict[str, Any] = {"channels": 3, "mean": (0.4, 0.5, 0.6), "std": (0.5,) * 3}


class Seen(Callback):
    """Every batch a method was given."""

    def __init__(self) -> None:
        self.train: list[ImageBatch] = []
        self.val: list[ImageBatch] = []

    def on_train_batch_start(self, trainer: Any, module: Any, batch: Any, index: int) -> None:
        self.train.append(batch)

    def on_validation_batch_start(self, trainer: Any, module: Any, batch: Any, *_: Any) -> None:
        self.val.append(batch)


def batches(tmp_path: Path, data: ImageDataModule, **trainer: Any) -> Seen:
    seen = Seen()
    channels = data.channels
    backbone = small.ViT("mu", patch_size=8, image_size=16, in_channels=channels)
    small.trainer(tmp_path / "run", seen, max_epochs=1, **trainer).fit(
        small.method(backbone=backbone, ema_decay=None), data
    )
    return seen


def test_what_a_method_is_given(tmp_path: Path) -> None:
    seen = batches(tmp_path, small.data(mean=(0.0,), std=(1.0,), mixup=0.0, erasing=0.0))
    batch = seen.train[0]
    assert batch.images.dtype == torch.float32
    assert batch.images.shape == (8, 1, 16, 16)
    assert 0.0 <= batch.images.min() < 0.1
    assert 0.9 < batch.images.max() <= 1.0
    assert batch.mixed is None
    assert batch.is_valid.all()
    assert not batch.is_replaced.any()
    source = small.data().open("train")
    assert batch.labels.tolist() == [source[i].label for i in batch.indices.tolist()]


@pytest.mark.parametrize(
    "option",
    [
        {"mixup": 1.0},
        {"cutmix": 1.0},
        {"erasing": 1.0},
        {"flip": 1.0},
        {"crop_scale": (0.3, 0.4)},
        {"crop_ratio": (2.0, 2.0)},
        {"interpolation": "bilinear"},
        {"mean": (0.1,)},
        {"std": (0.9,)},
        {"eval_crop": 0.5},
        {"source_args": {}, "source": "shapes"},
        {"repeats": 3},
        {"rand_augment": "rand-m9-mstd0.5-inc1"},
        {"three_augment": True},
    ],
    ids=lambda option: next(iter(option)),
)
def test_every_option_changes_what_is_seen(tmp_path: Path, option: dict) -> None:
    base = {"mixup": 0.0, "erasing": 0.0, "flip": 0.0}
    if "augment" in next(iter(option)):
        base |= COLOR | {"source": "shapes"}
    one = batches(tmp_path, small.data(**base), limit_train_batches=1, limit_val_batches=1)
    other = batches(
        tmp_path, small.data(**base | option), limit_train_batches=1, limit_val_batches=1
    )
    both = ({"mean", "std", "interpolation", "source_args"}, {"eval_crop"})
    key = next(iter(option))
    same_train = torch.equal(one.train[0].images, other.train[0].images)
    same_val = torch.equal(one.val[0].images, other.val[0].images)
    assert same_train == (key in both[1])
    assert same_val == (key not in both[0] | both[1])  # evaluation is never augmented


def test_mix_probability(tmp_path: Path) -> None:
    never = batches(tmp_path, small.data(mixup=1.0, mix_probability=0.0, erasing=0.0))
    assert never.train[0].mixed is None


def test_three_augment_comes_between_geometry_and_normalisation(tmp_path: Path) -> None:
    options = COLOR | {"source": "shapes", "mixup": 0.0, "erasing": 0.0}
    plain = batches(tmp_path, small.data(**options | {"mean": (0.0,) * 3, "std": (1.0,) * 3}))
    augmented = batches(tmp_path, small.data(**options, three_augment=True))
    for before, after in zip(plain.train, augmented.train, strict=True):
        expected = normalize(three_augment(before.images, before.keys), COLOR["mean"], COLOR["std"])
        torch.testing.assert_close(after.images, expected, atol=1e-5, rtol=0.0)


def test_repeats_bring_every_image_several_times_and_never_mix_it_with_itself(
    tmp_path: Path,
) -> None:
    whole = {"limit_train_batches": 1.0, "limit_val_batches": 1}
    seen = batches(tmp_path, small.data(batch_size=64, repeats=3, mixup=0.5), **whole)
    once = batches(tmp_path, small.data(batch_size=64, mixup=0.5), **whole)
    assert len(seen.train) == len(once.train)
    indices, keys = (torch.cat([getattr(b, f) for b in seen.train]) for f in ("indices", "keys"))
    assert indices.unique(return_counts=True)[1].float().mean() > 2.98
    assert len(keys.unique()) == len(keys)
    assert (indices != indices.view(-1, 2).flip(1).flatten()).all()
    plain = batches(tmp_path, small.data(repeats=2, mixup=0.0, erasing=0.0)).train[0]
    assert plain.indices[0] == plain.indices[2]
    assert not torch.equal(plain.images[0], plain.images[2])  # two copies, cut differently


def test_a_run_with_repeats_and_three_augment_resumes_exactly(tmp_path: Path) -> None:
    options = COLOR | {"source": "shapes", "repeats": 3, "three_augment": True}

    class Stop(Callback):
        def on_train_batch_start(self, trainer: Any, *_: Any) -> None:
            if trainer.global_step == 7:
                raise RuntimeError("stopped at step 7")

    def fit(name: str, *callbacks: Callback, start: Path | None = None) -> tuple[Any, Seen]:
        seen = Seen()
        torch.manual_seed(0)
        method = small.method(backbone=small.ViT("mu", patch_size=8, image_size=16))
        trainer = small.trainer(tmp_path / name, seen, *callbacks, max_epochs=2)
        trainer.fit(method, small.data(**options), ckpt_path=start, weights_only=True)
        return method, seen

    method, whole = fit("whole")
    with pytest.raises(RuntimeError, match="stopped at step 7"):
        fit("part", Stop())
    (checkpoint,) = (tmp_path / "part").rglob("last.ckpt")
    resumed, rest = fit("rest", start=checkpoint)
    assert len(rest.train) == 3
    for one, other in zip(whole.train[7:], rest.train, strict=True):
        assert torch.equal(one.keys, other.keys)
        assert torch.equal(one.images, other.images)
    assert differences(method.state_dict(), resumed.state_dict()) == []


@pytest.fixture
def spoiled(tmp_path: Path) -> Path:
    """Eighty training and ten held-out images; two of each cannot be read."""
    root = tmp_path / "images"
    tree(root / "train", count=40)
    tree(root / "val", count=5)
    for path in ("train/cat/003.png", "train/dog/011.png", "val/cat/001.png", "val/dog/004.png"):
        (root / path).write_bytes((root / path).read_bytes()[:40])
    return root


def folder(root: Path, **changes: Any) -> ImageDataModule:
    color = {"channels": 3, "mean": (0.5,) * 3, "std": (0.5,) * 3}
    arguments = {"source": "folder", "root": str(root), "batch_size": 4, **color}
    return small.data(**arguments | {"max_bad": 0.2, "mixup": 0.0, "erasing": 0.0} | changes)


def test_unreadable_images_are_replaced_counted_and_listed(tmp_path: Path, spoiled: Path) -> None:
    with pytest.warns(UserWarning, match="could not be read; another image takes its place"):
        seen = batches(tmp_path, folder(spoiled), limit_train_batches=1.0, limit_val_batches=1.0)
    replaced = [b.indices[b.is_replaced].tolist() for b in seen.train]
    assert sum(map(len, replaced)) == 2
    assert all(b.is_valid.all() for b in seen.train)  # something else is trained on
    # In evaluation nothing may take the place of an image.
    assert sum(int(b.is_valid.sum()) for b in seen.val) == 8
    listed = (tmp_path / "run" / "run" / "version_0" / "unreadable-0.txt").read_text().split()
    assert sorted(Path(line).relative_to(spoiled).as_posix() for line in listed) == [
        *("train/cat/003.png", "train/dog/011.png"),
        *("val/cat/001.png", "val/dog/004.png"),
    ]
    again = batches(tmp_path, folder(spoiled), limit_train_batches=1.0)
    for a, b in zip(seen.train, again.train, strict=True):
        assert torch.equal(a.images, b.images)  # by the same images


def test_too_many_unreadable_images_stop_the_run(tmp_path: Path, spoiled: Path) -> None:
    with pytest.raises(ValueError, match=r"more than data\.max_bad allows \(0\.8\)"):
        batches(tmp_path, folder(spoiled, max_bad=0.01), limit_train_batches=1.0)


def test_a_folder_of_nothing_but_garbage_does_not_loop(tmp_path: Path) -> None:
    root = tree(tmp_path / "images")
    for path in root.rglob("*.png"):
        path.write_bytes(b"garbage")
    with pytest.raises(ValueError, match="20 images in a row could not be read"):
        batches(tmp_path, folder(root))


def test_unlabelled_data_is_refused(tmp_path: Path) -> None:
    root = tree(tmp_path / "images")
    with pytest.raises(ValueError, match="has no labels, and supervised training needs them"):
        batches(tmp_path, folder(root, source_args={"labelled": False}))


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ({"mean": (0.5, 0.5)}, r"one number for each of the 1 channel"),
        ({"batch_size": 7}, "batch_size is 7"),
        ({"flip": 2.0}, r"flip is 2.0; expected within \[0, 1\]"),
        ({"eval_crop": 0.0}, "eval_crop is 0.0"),
        ({"crop_scale": (0.5, 0.2)}, "crop_scale"),
        ({"crop_ratio": (0.0, 1.0)}, "crop_ratio"),
        ({"rand_augment": "rand-m9"}, "rand_augment needs 3 channels"),
        ({"three_augment": True}, "three_augment needs 3 channels, but channels is 1"),
        (
            COLOR | {"three_augment": True, "rand_augment": "rand-m9"},
            "rand_augment 'rand-m9' and three_augment are both on",
        ),
        ({"repeats": 0}, "repeats is 0; expected at least 1"),
    ],
)
def test_wrong_options(arguments: dict, says: str) -> None:
    with pytest.raises(ValueError, match=says):
        small.data(**arguments)


def test_names_that_are_no_utf8_are_listed_too(tmp_path: Path, spoiled: Path) -> None:
    odd = os.fsencode(spoiled / "train" / "cat") + b"/\xe9.png"
    Path(os.fsdecode(odd)).write_bytes(b"garbage")
    with pytest.warns(UserWarning, match="could not be read"):
        batches(tmp_path, folder(spoiled), limit_train_batches=1.0, limit_val_batches=0)
    listed = (tmp_path / "run" / "run" / "version_0" / "unreadable-0.txt").read_bytes()
    assert odd in listed.splitlines()


class Straight(Seen):
    """The images of every training batch, in order."""

    @property
    def order(self) -> list[list[int]]:
        return [batch.indices.tolist() for batch in self.train]


def test_a_run_that_max_steps_ended_goes_on_with_the_next_batch(tmp_path: Path) -> None:
    data = {"batch_size": 300}  # four batches of 1,437 digits
    whole, first, second = Straight(), Straight(), Straight()
    every = {"limit_train_batches": 1.0, "max_epochs": -1}
    small.trainer(tmp_path / "a", whole, **every, max_steps=12).fit(
        small.method(), small.data(**data)
    )
    small.trainer(tmp_path / "b", first, **every, max_steps=3).fit(
        small.method(), small.data(**data)
    )
    last = next((tmp_path / "b").rglob("last.ckpt"))
    small.trainer(tmp_path / "c", second, **every, max_steps=12).fit(
        small.method(), small.data(**data), ckpt_path=last, weights_only=True
    )
    assert first.order + second.order == whole.order
    assert len(whole.order) == 12


def test_a_resumed_run_keeps_its_batches(tmp_path: Path) -> None:
    small.trainer(tmp_path / "a", max_epochs=1).fit(small.method(), small.data())
    last = next((tmp_path / "a").rglob("last.ckpt"))
    with pytest.raises(
        ValueError, match="images in a global batch: 8 in the run that is resumed, now 4"
    ):
        small.trainer(tmp_path / "b", max_epochs=2).fit(
            small.method(), small.data(batch_size=4), ckpt_path=last, weights_only=True
        )
