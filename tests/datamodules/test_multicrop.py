"""Multi-crop batches: what is in them, and that every rank, worker and resumed run agrees."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from lightning.pytorch import LightningModule
from torch import Tensor, nn

from callbacks.pictures import AugmentedBatch, beside
from datamodules import ImageDataModule, MultiCropDataModule
from datamodules.augment import normalize, view_keys
from datamodules.batch import ImageBatch, MultiCropBatch
from datamodules.module import Needs
from datamodules.photometric import ColorJitter
from datamodules.views import ViewColors, flip_some
from tests import small
from tests.datamodules.test_folder import tree
from tests.datamodules.test_packed import Place

NEEDS = Needs(8, 1, image_size=(32, 32), max_grid=None, in_channels=3, takes_packs=False)
PLAIN = ViewColors(ColorJitter(), grayscale=0.0, blur=(0.0,) * 3, solarize=(0.0,) * 3)


@pytest.fixture(autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATCHLIGHT_CACHE", str(tmp_path_factory.mktemp("cache")))


def data(**changes: Any) -> MultiCropDataModule:
    arguments: dict[str, Any] = {
        "source_args": {"num_train": 48, "num_val": 10},
        "image_size": 32,
        "local_size": 16,
        "num_local": 3,
        "batch_size": 8,
        "num_workers": 0,
    }
    module = MultiCropDataModule(**arguments | changes)
    module.setup("fit")
    return module


def train(module: MultiCropDataModule, epoch: int = 0) -> list[MultiCropBatch]:
    """The training batches of an epoch as a method sees them."""
    loader = module.train_dataloader()
    loader.batch_sampler.set_epoch(epoch)  # type: ignore[union-attr]
    return [module.on_after_batch_transfer(batch, 0) for batch in loader]  # type: ignore[misc]


def same(a: MultiCropBatch, b: MultiCropBatch) -> bool:
    pairs = zip((*a.crops, *a[1:]), (*b.crops, *b[1:]), strict=True)
    return all(torch.equal(x, y) for x, y in pairs)


def rows(batch: MultiCropBatch, part: slice) -> MultiCropBatch:
    return MultiCropBatch(tuple(g[:, part] for g in batch.crops), *(f[part] for f in batch[1:]))


def test_what_a_method_is_given() -> None:
    module = data()
    raw = next(iter(module.train_dataloader()))
    assert [tuple(g.shape) for g in raw.crops] == [(2, 8, 3, 32, 32), (3, 8, 3, 16, 16)]
    assert all(g.dtype == torch.uint8 for g in raw.crops)
    batch = module.on_after_batch_transfer(raw, 0)
    assert isinstance(batch, MultiCropBatch)
    k, first = view_keys(raw.keys, 5), 0
    for before, after in zip(raw.crops, batch.crops, strict=True):
        assert after.dtype == torch.float32
        part = k[first : first + len(before)]
        flipped = flip_some(before.flatten(0, 1), part.flatten(), 0.5) / 255.0
        colored = ViewColors()(flipped.view(before.shape), part, first)
        expected = normalize(colored.flatten(0, 1), module.mean, module.std)
        torch.testing.assert_close(after.flatten(0, 1), expected, atol=1e-5, rtol=0.0)
        first += len(before)
    labels = [module.train_source[i].label for i in batch.indices.tolist()]
    assert batch.labels.tolist() == labels
    assert batch.is_valid.all()
    assert not batch.is_replaced.any()
    assert torch.equal(batch.images, batch.crops[0][0])


def test_without_local_crops() -> None:
    (batch, *_) = train(data(num_local=0))
    assert len(batch.crops) == 1
    assert torch.equal(batch.crops[0], train(data())[0].crops[0])  # they change no global one


def test_views_and_images_and_epochs_differ() -> None:
    module = data(source_args={"num_train": 8, "num_val": 4}, flip=0.5)
    (batch,), (later,) = train(module), train(module, epoch=1)
    for group in batch.crops:
        flat = group.flatten(0, 1).flatten(1)
        distances = torch.cdist(flat, flat) + torch.eye(len(flat))
        assert distances.min() > 0.1
    a, b = batch.indices.argsort(), later.indices.argsort()
    assert torch.equal(batch.indices[a], later.indices[b])
    assert not torch.equal(batch.crops[0][:, a], later.crops[0][:, b])
    assert (batch.keys[a] != later.keys[b]).all()


@pytest.mark.parametrize(
    ("option", "groups"),
    [
        ({"global_scale": (0.1, 0.2)}, (True, False)),
        ({"local_scale": (0.5, 0.9)}, (False, True)),
        ({"crop_ratio": (2.0, 2.0)}, (True, True)),
        ({"flip": 1.0}, (True, True)),
        ({"interpolation": "bilinear"}, (True, True)),
        ({"mean": (0.1, 0.2, 0.3)}, (True, True)),
        ({"std": (0.3, 0.3, 0.3)}, (True, True)),
        ({"colors": replace(PLAIN, jitter=ColorJitter(0.4))}, (True, True)),
        ({"colors": replace(PLAIN, grayscale=1.0)}, (True, True)),
        ({"colors": replace(PLAIN, blur=(1.0, 0.0, 0.0))}, (True, False)),
        ({"colors": replace(PLAIN, blur=(0.0, 0.0, 1.0))}, (False, True)),
        ({"colors": replace(PLAIN, solarize=(0.0, 1.0, 0.0))}, (True, False)),
    ],
)
def test_every_option_changes_what_it_says(option: dict, groups: tuple[bool, bool]) -> None:
    base = {"colors": PLAIN, "flip": 0.0, "batch_size": 16}
    one = next(iter(train(data(**base))))
    other = next(iter(train(data(**base | option))))
    changed = tuple(not torch.equal(a, b) for a, b in zip(one.crops, other.crops, strict=True))
    assert changed == groups


def test_workers_change_nothing() -> None:
    for one, other in zip(train(data()), train(data(num_workers=2)), strict=True):
        assert same(one, other)


def test_two_ranks_see_what_one_sees() -> None:
    whole = train(data(batch_size=16))
    parts = []
    for rank in range(2):
        module = data()
        module.trainer = Place(rank, 2)  # type: ignore[assignment]
        parts.append(train(module))
    assert len(whole) == len(parts[0]) == 3
    for batch, one, other in zip(whole, *parts, strict=True):
        assert same(rows(batch, slice(0, 8)), one)
        assert same(rows(batch, slice(8, 16)), other)


def test_a_resumed_run_goes_on_with_the_next_batch() -> None:
    whole = [*train(data()), *train(data(), epoch=1)]
    assert len(whole) == 12
    for done in (4, 7):
        module = data()
        module.trainer = Place(0, 1, done=done)  # type: ignore[assignment]
        rest = train(module, epoch=done // 6)
        assert len(rest) == 6 - done % 6
        for one, other in zip(whole[done:], rest, strict=False):
            assert same(one, other)
    module.load_state_dict({**module.state_dict(), "order": module.order | {"images": 47}})
    with pytest.raises(ValueError, match="images: 47 in the run that is resumed, now 48"):
        module.train_dataloader()


def test_evaluation_is_that_of_labelled_images() -> None:
    module = data(eval_crop=0.7)
    images = ImageDataModule("shapes", None, module.source_args, image_size=32, batch_size=8)
    images.num_workers, images.eval_crop = 0, 0.7
    images.setup("fit")
    sets = [list(m.eval_batches(m.val_source, torch.device("cpu"))) for m in (module, images)]
    assert len(sets[0]) == 2
    for one, other in zip(*sets, strict=True):
        assert isinstance(one, ImageBatch)
        assert torch.equal(one.images, other.images)
        assert torch.equal(one.is_valid, other.is_valid)
    (batch, _) = data(eval_side=40).val_dataloader()
    assert batch.images.shape == (8, 3, 40, 40)
    assert module.class_names == images.class_names


def test_unlabelled_images_of_any_shape_and_one_channel(tmp_path: Path) -> None:
    root = tree(tmp_path / "images", count=12)  # cat/ and dog/, which are not classes here
    arguments = {"source": "folder", "root": str(root), "source_args": {"labelled": False}}
    batches = train(data(**arguments))
    assert all((batch.labels == -1).all() for batch in batches)
    gray = {"channels": 1, "mean": (0.5,), "std": (0.5,), "image_size": (32, 48)}
    (batch, *_) = train(data(**arguments | gray))
    assert [tuple(g.shape[2:]) for g in batch.crops] == [(1, 32, 48), (1, 16, 16)]
    # Eight plain images, and views of some of them in other colours.
    assert len(batch.crops[0].mean(dim=(2, 3, 4)).unique()) > 8


class Embed(LightningModule):
    """A method that compares nothing, but takes what it is given."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(1, 1)
        self.seen: list[MultiCropBatch] = []

    def training_step(self, batch: MultiCropBatch, index: int) -> Tensor:
        self.seen.append(batch)
        return batch.mean(self.layer(batch.images.mean(dim=(1, 2, 3))[:, None])[:, 0])

    def validation_step(self, batch: ImageBatch, index: int) -> None:
        assert isinstance(batch, ImageBatch)
        self.log("val/accuracy", 0.0, batch_size=batch.num_images)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.0)


def test_a_fit_with_a_broken_image_and_a_picture(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = tmp_path / "images"
    tree(root / "train", count=12)
    tree(root / "val", count=4)
    broken = root / "train" / "cat" / "003.png"
    broken.write_bytes(broken.read_bytes()[:40])
    pictures: list[np.ndarray] = []
    monkeypatch.setattr(
        "torch.utils.tensorboard.SummaryWriter.add_image", lambda _, *a, **k: pictures.append(a[1])
    )
    module = MultiCropDataModule(
        *("folder", str(root)), image_size=32, local_size=16, num_local=3, batch_size=8
    )
    module.num_workers, module.max_bad = 0, 0.2
    method = Embed()
    trainer = small.trainer(tmp_path / "run", AugmentedBatch(), max_epochs=1)
    with pytest.warns(UserWarning, match="could not be read; another image takes its place"):
        trainer.fit(method, module)
    assert len(method.seen) == 3
    replaced = torch.cat([batch.indices[batch.is_replaced] for batch in method.seen])
    assert [module.train_source.describe(i) for i in replaced.tolist()] == [str(broken)]
    assert all(batch.is_valid.all() for batch in method.seen)
    (picture,) = pictures  # strips of two global views and two columns of local ones
    assert picture.shape == (3, 8 * 33 + 1, 2 * 32 + 2 * 16 + 2)


def test_views_stand_beside_each_other() -> None:
    numbers = torch.arange(1.0, 11.0).view(5, 2, 1, 1, 1)
    views = (numbers[:2].expand(2, 2, 1, 5, 4), numbers[2:].expand(3, 2, 1, 2, 3))
    fields = [torch.zeros(2, dtype=torch.int64)] * 5
    strips = beside(MultiCropBatch(views, *fields), 2)
    assert strips.shape == (2, 1, 5, 4 + 4 + 3 + 3)
    first = strips[0, 0]
    assert first[0].tolist() == [1.0] * 4 + [3.0] * 4 + [5.0] * 3 + [9.0] * 3
    assert first[:, 8].tolist() == [5.0, 5.0, 7.0, 7.0, 10.0]
    assert first[:, 11].tolist() == [9.0, 9.0, 10.0, 10.0, 10.0]


def test_crops_fit_the_backbone() -> None:
    module = data(image_size=None)
    module.fit_to(NEEDS)
    assert module.known_size() == (32, 32)
    with pytest.raises(ValueError, match="image_size is 40x40, but the backbone is made for 32x32"):
        data(image_size=40).fit_to(NEEDS)
    with pytest.raises(ValueError, match=r"local_size is 20x20, .* patches of 8 .* set it to 16$"):
        data(local_size=20).fit_to(NEEDS)
    with pytest.raises(ValueError, match=r"local_size is 3x14, .* set it to \[8, 16\]$"):
        data(local_size=(3, 14)).fit_to(NEEDS)
    with pytest.raises(ValueError, match=r"image_size is 36x36, .* set it to 32$"):
        data(image_size=36).fit_to(NEEDS._replace(image_size=None))
    data(local_size=20, num_local=0).fit_to(NEEDS)
    with pytest.raises(ValueError, match="image_size is null"):
        data(image_size=None).train_dataloader()


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ({"num_local": -1}, "num_local is -1; expected at least 0"),
        ({"local_size": 0}, "local_size is 0; expected at least 1"),
        ({"global_scale": (0.4, 1.1)}, r"global_scale is \(0.4, 1.1\); expected 0 < low"),
        ({"local_scale": (0.0, 0.4)}, "local_scale is"),
        ({"crop_ratio": (2.0, 1.0)}, "crop_ratio is"),
        ({"batch_size": 0}, "batch_size is 0; expected at least 1"),
        ({"flip": 1.5}, "flip is 1.5"),
        ({"channels": 1}, "one number for each of the 1 channel"),
    ],
)
def test_wrong_options(arguments: dict, says: str) -> None:
    with pytest.raises(ValueError, match=says):
        MultiCropDataModule(**arguments)
