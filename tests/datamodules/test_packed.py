"""Packed batches: what is in them, and that every rank, worker and resumed run agrees."""

import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from callbacks.pictures import unpack
from datamodules import PackedDataModule
from datamodules.batch import PackedBatch
from datamodules.cutting import Cut, of_aspect
from datamodules.geometry import Box, crop_and_resize
from datamodules.module import Needs
from datamodules.packing import Resolution, TokenDrop
from datamodules.rows import PackedBatches, Request
from tests.datamodules.test_folder import tree

SCENES = {"num_train": 60, "num_val": 23, "min_side": 24, "max_side": 64, "max_aspect": 3.0}
NEEDS = Needs(8, 2, image_size=None, max_grid=None, in_channels=3, takes_packs=True)


def data(needs: Needs = NEEDS, **changes: Any) -> PackedDataModule:
    arguments: dict[str, Any] = {
        "source_args": SCENES,
        "num_rows": 2,
        "row_length": 128,
        "resolution": Resolution("native", 16, 64),
        "flip": 0.0,
        "num_workers": 0,
    }
    module = PackedDataModule(**arguments | changes)
    module.setup("fit")
    module.fit_to(needs)
    return module


class Place:
    """What a data module asks of a trainer."""

    def __init__(self, rank: int, world_size: int, accumulate: int = 1, done: int = 0) -> None:
        self.global_rank, self.world_size, self.max_epochs = rank, world_size, 4
        self.accumulate_grad_batches, self.limit_train_batches = accumulate, 1.0
        self.training, self.log_dir = True, None
        self.fit_loop = self
        self.epoch_loop = self
        self.batch_progress = self
        self.total = self
        self.ready = done
        self.use_distributed_sampler = False
        self.strategy = self
        self.others: int | None = None  # what the first rank planned, where it is not the same
        self._accelerator_connector = self

    def broadcast(self, value: int) -> int:
        return value if self.others is None else self.others

    def reduce_boolean_decision(self, decision: bool, all: bool) -> bool:
        return decision


def at(place: Place, **changes: Any) -> PackedDataModule:
    module = data(**changes)
    module.trainer = place  # type: ignore[assignment]
    return module


def epochs(module: PackedDataModule, count: int, first: int = 0) -> Iterator[PackedBatch]:
    loader = module.train_dataloader()
    sampler = loader.batch_sampler
    assert isinstance(sampler, PackedBatches)
    for epoch in range(first, count):
        sampler.set_epoch(epoch)
        yield from loader


def items(batches: list[PackedBatch]) -> list[int]:
    return [int(i) for batch in batches for i in batch.indices[batch.is_valid]]


def same(a: PackedBatch, b: PackedBatch) -> bool:
    flat = [(*batch.images, *batch[1:]) for batch in (a, b)]
    return all(
        torch.equal(x, y) if isinstance(x, Tensor) else x == y for x, y in zip(*flat, strict=True)
    )


def test_a_batch_holds_what_it_says() -> None:
    module = data()
    batch = next(iter(module.train_dataloader()))
    images, slots = batch.images, len(batch.labels) // 2
    assert images.patches.shape == (2, 128, 3 * 64)
    assert images.patches.dtype == torch.uint8
    assert images.offsets.dtype == torch.int32
    assert len(images.offsets) == 2 * (slots + 1) + 1
    assert batch.num_images == int(batch.is_valid.sum()) > 4
    assert batch.num_tokens == int((images.segments >= 0).sum())
    line = images.segments.flatten()
    for image in range(len(batch.labels)):
        row, slot = divmod(image, slots)
        start, end = images.offsets[row * (slots + 1) + slot :][:2].tolist()
        if not batch.is_valid[image]:
            assert start == end
            assert images.grids[image].tolist() == [1, 1]
            assert (batch.indices[image], batch.labels[image]) == (-1, 0)
            continue
        assert (line[start:end] == slot).all()
        assert start // 128 == (end - 1) // 128 == row
        example = module.train_source[int(batch.indices[image])]
        assert batch.labels[image] == example.label
        rows, columns = images.grids[image].tolist()
        assert end - start == 2 + rows * columns
        positions = images.positions.flatten(0, 1)[start:end].tolist()
        assert positions[:2] == [[-1, 0], [-1, 1]]
        assert positions[2:] == [[i, j] for i in range(rows) for j in range(columns)]
        whole = Box(0, 0, *example.image.shape[:2])
        pixels = crop_and_resize(example.image, whole, (rows * 8, columns * 8), "bicubic")
        for place, (i, j) in zip(range(start + 2, end), positions[2:], strict=True):
            patch = pixels[:, i * 8 : i * 8 + 8, j * 8 : j * 8 + 8]
            assert torch.equal(images.patches.flatten(0, 1)[place], patch.flatten())
    assert (images.positions[images.segments < 0] == -1).all()
    assert images.offsets[-1] == 256
    assert images.offsets[slots + 1] == 128


def test_pixels_are_normalised_channel_by_channel_on_the_device() -> None:
    module = data(mean=(0.1, 0.5, 0.2), std=(0.5, 0.25, 2.0))
    raw = next(iter(module.train_dataloader()))
    batch = module.on_after_batch_transfer(raw, 0)
    expected = raw.images.patches.view(2, 128, 3, 64) / 255.0
    mean, std = torch.tensor([0.1, 0.5, 0.2]), torch.tensor([0.5, 0.25, 2.0])
    expected = (expected - mean[:, None]) / std[:, None]
    torch.testing.assert_close(batch.images.patches.view(2, 128, 3, 64), expected)
    assert same(batch._replace(images=raw.images), raw)


def test_crops_flips_and_drops_are_drawn_for_every_image() -> None:
    whole = data(row_length=64, buffer=1)
    other = data(row_length=64, buffer=1, flip=1.0)
    for a, b in zip(whole.train_dataloader(), other.train_dataloader(), strict=True):
        assert torch.equal(a.indices, b.indices)
        straight = unpack(a.images._replace(patches=a.images.patches.float()), 3, 1)
        flipped = unpack(b.images._replace(patches=b.images.patches.float()), 3, 1)
        assert torch.equal(straight, flipped.flip(-1))
    cropped = next(iter(data(row_length=64, crop_scale=(0.3, 0.6)).train_dataloader()))
    plain = next(iter(data(row_length=64).train_dataloader()))
    assert torch.equal(cropped.images.positions, plain.images.positions)
    assert not torch.equal(cropped.images.patches, plain.images.patches)


def test_dropped_patches_are_a_uniform_subset() -> None:
    shares = []
    for batch in data(drop=TokenDrop(rate=0.5)).train_dataloader():
        slots = len(batch.labels) // 2
        for image in batch.is_valid.nonzero().flatten().tolist():
            row, slot = divmod(image, slots)
            positions = batch.images.positions[row][batch.images.segments[row] == slot][2:]
            rows, columns = batch.images.grids[image].tolist()
            places = positions[:, 0] * columns + positions[:, 1]
            assert len(places) == rows * columns // 2
            assert (places.diff() > 0).all()
            assert (positions < batch.images.grids[image]).all()
            shares += ((places + 0.5) / (rows * columns)).tolist()
            example = data().train_source[int(batch.indices[image])]
            whole = Box(0, 0, *example.image.shape[:2])
            pixels = crop_and_resize(example.image, whole, (rows * 8, columns * 8), "bicubic")
            patches = batch.images.patches[row][batch.images.segments[row] == slot][2:]
            for patch, (i, j) in zip(patches, positions.tolist(), strict=True):
                assert torch.equal(patch, pixels[:, i * 8 :, j * 8 :][:, :8, :8].flatten())
    assert len(shares) > 500
    assert np.mean(shares) == pytest.approx(0.5, abs=0.03)
    assert np.std(shares) == pytest.approx(1 / 12**0.5, abs=0.03)


@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_every_image_once_on_any_number_of_devices(world_size: int, accumulate: int) -> None:
    ranks = []
    for rank in range(world_size):
        module = at(Place(rank, world_size, accumulate))
        loader = module.train_dataloader()
        ranks.append(list(loader))
    assert len({len(batches) for batches in ranks}) == 1
    assert len({b.images.patches.shape for batches in ranks for b in batches}) == 1
    assert len({len(b.labels) for batches in ranks for b in batches}) == 1
    assert sorted(i for batches in ranks for i in items(batches)) == list(range(60))
    assert len(ranks[0]) % accumulate == 0
    for start in range(0, len(ranks[0]), accumulate):
        step = [b for batches in ranks for b in batches[start : start + accumulate]]
        images = sum(b.num_images for b in step)
        assert images > 0
        for batch in step:
            assert float(batch.divisor) == pytest.approx(images / (world_size * accumulate))
        # The mean over devices and micro-batches is that over images.
        losses = [torch.rand(len(b.labels)) for b in step]
        mean = sum(b.mean(loss) for b, loss in zip(step, losses, strict=True)) / len(step)
        every = torch.cat([loss[b.is_valid] for b, loss in zip(step, losses, strict=True)])
        assert float(mean) == pytest.approx(float(every.mean()), abs=1e-6)


def test_empty_slots_add_nothing_to_the_loss_whatever_is_in_them() -> None:
    batch = next(iter(data().train_dataloader()))
    losses = torch.where(batch.is_valid, 1.0, torch.nan).requires_grad_()
    mean = batch.mean(losses)
    mean.backward()
    assert float(mean.detach()) == pytest.approx(1.0)
    assert losses.grad is not None
    assert (losses.grad[~batch.is_valid] == 0).all()


def test_two_devices_take_the_steps_of_one_with_twice_the_rows() -> None:
    one = list(data(num_rows=4).train_dataloader())
    two = [list(at(Place(rank, 2)).train_dataloader()) for rank in (0, 1)]
    folded = list(at(Place(0, 1, accumulate=2)).train_dataloader())
    assert len(one) == len(two[0]) == len(two[1])
    for step, batch in enumerate(one):
        both = torch.cat([rank[step].images.patches for rank in two])
        micro = torch.cat([b.images.patches for b in folded[2 * step : 2 * step + 2]])
        assert torch.equal(batch.images.patches, both)
        assert torch.equal(batch.images.patches, micro)


def test_passes_go_on_over_epochs_and_differ() -> None:
    module = data(drop=TokenDrop("beta", 0.4, 0.2))
    batches = list(epochs(module, 5))
    assert len({b.images.patches.shape for b in batches}) == 1
    starts = module.starts
    assert len(starts) >= 5
    for begin, end in itertools.pairwise(starts[:5]):
        assert sorted(items(batches[begin:end])) == list(range(60))
    first, second = items(batches[: starts[1]]), items(batches[starts[1] : starts[2]])
    assert first != second


@pytest.mark.parametrize("accumulate", [1, 3])
def test_a_resumed_run_goes_on_with_the_same_batches(accumulate: int) -> None:
    changes = {"drop": TokenDrop("beta", 0.4, 0.2, last=0.5)}
    module = at(Place(0, 1, accumulate), **changes)
    whole = list(epochs(module, 4))
    length = len(whole) // 4
    state = module.state_dict()
    for done in (1, length - 1, length, length + 2, 3 * length + 1):
        resumed = at(Place(0, 1, accumulate, done), **changes)
        resumed.load_state_dict(state | {"starts": state["starts"][: 2 + done % 4]})
        rest = list(epochs(resumed, 4, first=done // length))
        assert len(rest) == len(whole) - done
        assert all(same(a, b) for a, b in zip(rest, whole[done:], strict=True)), done
        assert resumed.starts[: len(state["starts"])] == state["starts"][: len(resumed.starts)]


def test_workers_change_nothing() -> None:
    changes: dict[str, Any] = {"drop": TokenDrop(rate=0.3), "flip": 0.5, "crop_scale": (0.5, 1.0)}
    expected = list(data(**changes).train_dataloader())
    for workers in (1, 2):
        found = list(data(num_workers=workers, **changes).train_dataloader())
        assert all(same(a, b) for a, b in zip(found, expected, strict=True))


def test_fewer_tokens_are_dropped_towards_the_end() -> None:
    module = at(Place(0, 1), drop=TokenDrop(rate=0.8, last=0.0))
    length = len(module.train_dataloader())
    kept = [module.plan_pass(number).kept.sum() for number in range(5)]
    assert kept[0] < kept[1] < kept[2] < kept[3] == kept[4]
    first, last = (len(module.plan_pass(n).rows) / 2 for n in (0, 3))
    assert first < length < last  # an epoch is as long as a pass is on average
    module.trainer.max_epochs = None  # type: ignore[union-attr]
    with pytest.raises(ValueError, match=r"drop.last is 0.0, and only trainer.max_epochs"):
        module.plan_pass(1)


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_evaluation_takes_every_image_once_in_the_same_batches(world_size: int) -> None:
    alone = list(data().val_dataloader())
    ranks = [list(at(Place(rank, world_size)).val_dataloader()) for rank in range(world_size)]
    dealt = [batch for step in zip(*ranks, strict=True) for batch in step]
    assert all(same(a, b) for a, b in zip(dealt, alone, strict=False))
    assert sorted(items(dealt)) == list(range(23))
    for batch in dealt[len(alone) :]:
        assert not batch.is_valid.any()
        assert (batch.images.segments == -1).all()


def test_evaluation_has_its_own_resolution() -> None:
    def mean_side(module: PackedDataModule) -> float:
        grids = [b.images.grids[b.is_valid] for b in module.val_dataloader()]
        return float(torch.cat(grids).prod(dim=1).float().sqrt().mean() * 8)

    assert mean_side(data(eval_side=32)) == pytest.approx(32, abs=2)
    assert mean_side(data(eval_side=64)) == pytest.approx(64, abs=3)
    sizes = [data().val_source[i].image.shape for i in range(23)]
    native = float(np.mean([np.sqrt(h * w) for h, w, _ in sizes]))
    assert mean_side(data()) == pytest.approx(native, abs=3)


def test_a_row_has_room_for_what_fills_it() -> None:
    with pytest.warns(UserWarning, match=r"padding; a larger data.init_args.max_images"):
        data(max_images=2).train_dataloader()
    few, many = (len(data(max_images=n).train_dataloader()) for n in (2, 6))
    assert few > 1.2 * many  # as the warning says
    with pytest.warns(UserWarning, match=r"padding; another data.init_args.row_length"):
        data(row_length=35, resolution=Resolution("native", 32, 32)).train_dataloader()
    loader = data(max_images=40).train_dataloader()
    assert len(next(iter(loader)).labels) == 80


def test_an_image_that_is_too_long_for_a_row_is_reduced() -> None:
    module = data(row_length=20)
    batches = list(module.train_dataloader())
    assert sorted(items(batches)) == list(range(60))
    assert max(int(b.images.grids.prod(dim=1).max()) for b in batches) <= 18
    with pytest.raises(ValueError, match=r"row_length is 2, but an image takes 2 tokens before"):
        data(row_length=2)


def test_the_limit_of_the_positions_is_kept() -> None:
    module = data(NEEDS._replace(max_grid=5), resolution=Resolution("native", 63, 64))
    assert max(int(b.images.grids.max()) for b in module.train_dataloader()) == 5


def test_a_resumed_run_with_another_packing_is_refused() -> None:
    module = at(Place(0, 1))
    module.train_dataloader()
    state = module.state_dict()
    for changes, message in (
        ({"row_length": 96}, "batches in an epoch|checksum of sizes"),
        ({"resolution": Resolution("native", 16, 60)}, "batches in an epoch|checksum of sizes"),
        ({"num_rows": 4}, "rows in a global batch: 2 in the run that is resumed, now 4"),
    ):
        resumed = at(Place(0, 1, done=3), **changes)
        resumed.load_state_dict(state)
        with pytest.raises(ValueError, match=message):
            resumed.train_dataloader()


def test_a_drop_schedule_over_other_epochs_is_refused() -> None:
    module = at(Place(0, 1), drop=TokenDrop(rate=0.5, last=0.0))
    list(epochs(module, 2))
    resumed = at(Place(0, 1, done=5), drop=TokenDrop(rate=0.5, last=0.0))
    resumed.load_state_dict(module.state_dict())
    resumed.trainer.max_epochs = 8  # type: ignore[union-attr]
    with pytest.raises(ValueError, match=r"the drop schedule spans: 4 in the run .* now 8"):
        resumed.train_dataloader()
    other = at(Place(0, 1, done=5), drop=TokenDrop(rate=0.5, last=0.1))
    other.load_state_dict(module.state_dict())
    with pytest.raises(ValueError, match=r"batches in an epoch|checksum of sizes"):
        other.train_dataloader()


def test_a_schedule_ends_with_the_run_where_epochs_are_cut_short() -> None:
    module = at(Place(0, 1), drop=TokenDrop(rate=0.5, last=0.0))
    module.trainer.limit_train_batches = 3  # type: ignore[union-attr]
    length = len(module.train_dataloader())
    passes = 4 * 3 / length
    assert module.drop_progress(1) == pytest.approx(min(1.0, 1 / max(1.0, passes - 1)))


def test_part_of_an_optimizer_step_is_refused() -> None:
    module = at(Place(0, 1, accumulate=2))
    module.trainer.limit_train_batches = 3  # type: ignore[union-attr]
    with pytest.raises(ValueError, match="3 batches an epoch, which are no whole optimizer steps"):
        module.train_dataloader()


def test_ranks_that_see_other_sizes_are_told() -> None:
    module = at(Place(1, 2))
    module.trainer.others = 123  # type: ignore[union-attr]
    for loader in (module.train_dataloader, module.val_dataloader):
        with pytest.raises(ValueError, match="the devices see images of different sizes"):
            loader()


def test_a_side_that_cannot_be_had_is_refused_in_evaluation() -> None:
    with pytest.raises(ValueError, match=r"are reduced .* tokens, but .*row_length is 128"):
        data(eval_side=256).val_dataloader()
    near = data(NEEDS._replace(max_grid=4), eval_side=64)
    with pytest.raises(ValueError, match="the positions reach 4 patches along a side"):
        near.val_dataloader()
    with pytest.warns(UserWarning, match="are reduced below the side that was asked for"):
        data(row_length=20).train_dataloader()


def test_an_image_of_another_aspect_than_planned_is_cropped_to_it() -> None:
    image = np.zeros((30, 90, 3), np.uint8)
    image[:, 40:50] = 200  # the centre is all that a narrow grid shows
    assert of_aspect(image, (3, 9)).shape == (30, 90, 3)
    assert of_aspect(image, (1, 4)).shape == (30, 90, 3)  # whole patches explain it
    narrow = of_aspect(image, (9, 3))
    assert narrow.shape == (30, 10, 3)
    assert (narrow == 200).all()
    patches, _ = Cut(4, "bilinear")(image, Request(0, 0, (9, 3), 27))
    assert (patches == 200).all()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"in_channels": 1}, "channels is 3, but the backbone takes images of 1"),
        ({"takes_packs": False}, "takes no packs: relative positions, windows"),
    ],
)
def test_what_a_backbone_does_not_take_is_refused_before_anything_is_read(
    change: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        data(NEEDS._replace(**change))


def test_an_unreadable_image_is_replaced_in_its_place(tmp_path: Path) -> None:
    tree(tmp_path)
    names = sorted(tmp_path.rglob("*.png")) or sorted(tmp_path.rglob("*.jpg"))
    module = at(Place(0, 1), source="folder", source_args={}, root=str(tmp_path), max_bad=0.5)
    names = [module.train_source.describe(i) for i in range(len(module.train_source))]
    Path(names[0]).write_bytes(b"no image")
    (found,) = [b for b in epochs(module, 1) if 0 in items([b])]
    slot = int((found.indices == 0).nonzero())
    assert found.is_replaced.nonzero().flatten().tolist() == [slot]
    with pytest.warns(UserWarning, match="could not be read; another image takes its place"):
        assert module.on_before_batch_transfer(found, 0).is_valid[slot]
    module.trainer.training = False  # type: ignore[union-attr]
    module.val_source = module.train_source
    with pytest.warns(UserWarning, match="could not be read"):
        assert not module.on_before_batch_transfer(found, 0).is_valid[slot]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_rows": 0}, "num_rows is 0; expected at least 1"),
        ({"max_images": 0}, "max_images is 0"),
        ({"eval_side": 0}, "eval_side is 0"),
        ({"crop_scale": (0.0, 1.0)}, "crop_scale is"),
        ({"flip": 1.5}, "flip is 1.5"),
        ({"channels": 1, "mean": (0.5,), "std": (0.5,), "rand_augment": "rand-m9"}, "3 channels"),
    ],
)
def test_values_without_a_meaning_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        data(**changes)


def test_no_method_said_what_it_needs() -> None:
    module = PackedDataModule(source_args=SCENES)
    module.setup("fit")
    with pytest.raises(ValueError, match="no method said what its backbone takes"):
        module.train_dataloader()


def test_unpacked_images_are_the_images() -> None:
    batch = next(iter(data(row_length=64).train_dataloader()))
    images = batch.images._replace(patches=batch.images.patches.float())
    canvases = unpack(images, 3, 2)
    assert canvases.shape[:2] == (2, 3)
    for canvas, image in zip(canvases, batch.is_valid.nonzero().flatten().tolist(), strict=False):
        rows, columns = (batch.images.grids[image] * 8).tolist()
        row, slot = divmod(image, len(batch.labels) // 2)
        patches = images.patches[row][images.segments[row] == slot][2:]
        top = canvas[:, :8, :columns].reshape(3, 8, -1, 8).permute(2, 0, 1, 3).flatten(1)
        assert torch.equal(top, patches[: columns // 8])
        assert (canvas[:, rows:] == images.patches.max()).all()
        assert (canvas[:, :, columns:] == images.patches.max()).all()
