"""Samplers: every sample in its place, whatever the world size, and from anywhere on."""

import itertools
from collections import Counter
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from timm.data.distributed_sampler import RepeatAugSampler

from datamodules.sampling import (
    Ahead,
    EvalBatches,
    Groups,
    Sample,
    TrainBatches,
    epoch_order,
    fold,
    grouped_order,
)

sizes = st.tuples(st.integers(8, 200), st.integers(1, 4), st.integers(1, 4))  # images, batch, world


def test_fold_is_fixed_for_ever() -> None:
    # These values are in every published run: changing them changes every result.
    assert fold() == 0
    assert fold(0) == 16294208416658607535 >> 1  # SplitMix64's first output for the seed 0
    assert fold(1, 2) != fold(2, 1)
    assert (
        len({fold(seed, epoch, i) for seed in range(4) for epoch in range(4) for i in range(100)})
        == 1600
    )
    assert 0 <= fold(-1) < 2**63


@given(sizes, st.integers(0, 5), st.integers(0, 3), st.integers(1, 4))
@settings(deadline=None, max_examples=60)
def test_ranks_share_one_global_batch(
    size: tuple[int, int, int], seed: int, epoch: int, repeats: int
) -> None:
    num, batch, world = size
    if num < batch * world:
        with pytest.raises(ValueError, match="do not fill one global batch"):
            TrainBatches(num, batch, seed, 0, world)
        return
    whole = TrainBatches(num, batch * world, seed, repeats=repeats)
    ranks = [TrainBatches(num, batch, seed, r, world, repeats=repeats) for r in range(world)]
    for sampler in (whole, *ranks):
        sampler.set_epoch(epoch)
    assert {len(r) for r in ranks} == {len(whole)}
    joined = [[s for part in parts for s in part] for parts in zip(*ranks, strict=True)]
    assert joined == list(whole)
    seen = [sample for part in joined for sample in part]
    assert len(seen) == len(set(seen)) == num // (batch * world) * batch * world
    assert max(Counter(sample.item for sample in seen).values()) <= repeats
    # Nor does it matter how the same samples are accumulated.
    micro = TrainBatches(num, batch, seed, repeats=repeats)
    micro.set_epoch(epoch)
    assert [sample for part in micro for sample in part][: len(seen)] == seen


@given(sizes, st.integers(0, 40), st.integers(1, 4))
@settings(deadline=None, max_examples=60)
def test_goes_on_where_the_counter_stands(
    size: tuple[int, int, int], done: int, repeats: int
) -> None:
    num, batch, _ = size

    def batches(sampler: TrainBatches, epochs: range) -> list:
        out = []
        for epoch in epochs:
            sampler.set_epoch(epoch)
            out += list(sampler)
        return out

    full = batches(TrainBatches(num, batch, 3, repeats=repeats), range(12))
    per_epoch = len(TrainBatches(num, batch, 3))
    done = min(done, 11 * per_epoch)
    resumed = TrainBatches(num, batch, 3, batches_done=done, repeats=repeats)
    assert len(resumed) == per_epoch
    assert batches(resumed, range(done // per_epoch, 12)) == full[done:]


def test_an_iterator_made_before_set_epoch_starts_in_the_right_epoch() -> None:
    # Lightning makes the first iterator of a resumed run before it tells the epoch.
    resumed = TrainBatches(10, 2, seed=1, batches_done=12)
    assert (resumed.epoch, resumed.first_batch) == (2, 2)
    expected = TrainBatches(10, 2, seed=1)
    expected.set_epoch(2)
    assert list(resumed) == list(expected)[2:]


def test_shortened_epochs() -> None:
    assert TrainBatches(100, 1, 0, batches_done=25, batches_per_epoch=10).first_epoch == 2


def test_epochs_and_seeds_differ() -> None:
    orders = {tuple(epoch_order(20, seed, epoch)) for seed in range(3) for epoch in range(3)}
    assert len(orders) == 9


def test_without_repeats_order_and_keys_are_fixed_for_ever() -> None:
    sampler = TrainBatches(20, 4, seed=5)
    sampler.set_epoch(2)
    order = epoch_order(20, 5, 2).tolist()
    assert [s for b in sampler for s in b] == [Sample(i, fold(5, 2, i)) for i in order]


@pytest.mark.parametrize("repeats", [2, 3, 5])
def test_repeats(repeats: int) -> None:
    num, batch = 240, 8
    sampler = TrainBatches(num, batch, seed=1, repeats=repeats)
    sampler.set_epoch(3)
    samples = [sample for part in sampler for sample in part]
    assert len(samples) == num  # an epoch is as long, with fewer images
    times = Counter(sample.item for sample in samples)
    assert len(times) == num // repeats
    assert set(times.values()) == {repeats}
    assert set(times) == set(epoch_order(num, 1, 3)[: num // repeats].tolist())
    # Every copy is augmented differently, the first as if there were no others.
    assert len({sample.key for sample in samples}) == num
    for item in times:
        keys = [sample.key for sample in samples if sample.item == item]
        assert keys == [fold(1, 3, item), *(fold(1, 3, item, copy) for copy in range(1, repeats))]


@given(sizes, st.integers(2, 5))
@settings(deadline=None, max_examples=60)
def test_mixing_never_pairs_an_image_with_itself(size: tuple[int, int, int], repeats: int) -> None:
    num, half, world = size
    if num < 2 * half * world:
        return
    for rank in range(world):
        for batch in TrainBatches(num, 2 * half, 0, rank, world, repeats=repeats):
            items = [sample.item for sample in batch]
            assert all(a != b for a, b in zip(items[0::2], items[1::2], strict=True))


def test_global_batches_hold_the_images_of_the_published_sampler() -> None:
    num, batch, world = 1200, 6, 4
    order = epoch_order(num, 0, 0).tolist()
    ours = TrainBatches(num, batch * world, 0, repeats=3)  # a batch holds whole pairs of images
    theirs = [
        list(RepeatAugSampler(range(num), world, rank, shuffle=False, selected_round=0))
        for rank in range(world)
    ]
    assert len(ours) == len(theirs[0]) // batch
    for step, samples in enumerate(ours):
        places = [place for t in theirs for place in t[step * batch : (step + 1) * batch]]
        assert Counter(order[p] for p in places) == Counter(s.item for s in samples)


def test_wrong_repeats_are_refused() -> None:
    with pytest.raises(ValueError, match="repeats is 0; expected at least 1"):
        TrainBatches(10, 2, 0, repeats=0)


@given(sizes)
@settings(deadline=None, max_examples=60)
def test_evaluation_counts_every_sample_once(size: tuple[int, int, int]) -> None:
    num, batch, world = size
    ranks = [list(EvalBatches(num, batch, rank, world)) for rank in range(world)]
    assert len({len(r) for r in ranks}) == 1
    assert all(len(b) == batch for r in ranks for b in r)
    valid = [s.item for r in ranks for b in r for s in b if s.is_valid]
    assert sorted(valid) == list(range(num))
    alone = list(EvalBatches(num, batch))
    dealt = [b for step in zip(*ranks, strict=True) for b in step]
    assert dealt[: len(alone)] == alone
    assert not any(s.is_valid for b in dealt[len(alone) :] for s in b)


def test_nothing_to_evaluate_is_an_error() -> None:
    with pytest.raises(ValueError, match="no images to evaluate"):
        EvalBatches(0, 4)


# By groups that lie together.


def random_groups(seed: int, count: int, together: int) -> Groups:
    lengths = np.random.default_rng(seed).integers(1, 40, count)
    return Groups(np.cumsum([0, *lengths]), together)


@given(st.integers(0, 99), st.integers(1, 90), st.integers(1, 6), st.integers(0, 10), st.data())
@settings(deadline=None, max_examples=25)
def test_every_image_once_on_any_number_of_devices(
    seed: int, count: int, together: int, power: int, data: st.DataObject
) -> None:
    groups = random_groups(seed, count, together)
    num, world = int(groups.starts[-1]), 2**power  # 1 to 1,024 devices
    lanes = 2 ** data.draw(st.integers(0, power))
    batch = data.draw(st.integers(1, max(1, num // world // 3)))
    if num < batch * world:
        return
    where = np.searchsorted(groups.starts, np.arange(num), side="right")
    seen, keys = [], set()
    for rank in range(world):
        sampler = TrainBatches(num, batch, seed, rank, world, groups=groups, lanes=lanes)
        assert len(sampler) == num // (batch * world)  # the same on every rank
        samples = [sample for part in sampler for sample in part]
        seen += [sample.item for sample in samples]
        keys.update(sample.key for sample in samples)
    assert len(seen) == len(set(seen)) == len(keys) == num // (batch * world) * batch * world
    assert min(seen) >= 0
    assert max(seen) < num
    assert not np.array_equal(*(grouped_order(groups, seed, e) for e in (0, 1))) or num < 9
    for lane in (0, lanes - 1):
        order = where[grouped_order(groups, seed, 0, lane, lanes)]
        # A shard is read from its first to its last image, and few are under way at once.
        numbers, first = np.unique(order, return_index=True)
        last = len(order) - 1 - np.unique(order[::-1], return_index=True)[1]
        assert len(numbers) <= len(order)
        under_way = [int(((first <= i) & (i <= last)).sum()) for i in range(0, len(order), 7)]
        assert max(under_way, default=0) <= together


def test_devices_of_one_machine_share_its_order() -> None:
    groups = random_groups(1, 20, 3)
    num = int(groups.starts[-1])
    one = list(TrainBatches(num, 8, 5, groups=groups))
    four = [TrainBatches(num, 2, 5, rank, 4, groups=groups) for rank in range(4)]
    assert one == [[s for part in parts for s in part] for parts in zip(*four, strict=True)]


def test_machines_read_shards_of_their_own() -> None:
    groups = random_groups(2, 64, 4)
    where = np.searchsorted(groups.starts, np.arange(groups.starts[-1]), side="right")
    of_lane = [set(where[grouped_order(groups, 0, 3, lane, 8)].tolist()) for lane in range(8)]
    for a, b in itertools.pairwise(of_lane):
        assert len(a & b) <= 1
    assert sum(map(len, of_lane)) <= 64 + 7
    with pytest.raises(ValueError, match="6 devices do not spread evenly over 4 machines"):
        TrainBatches(1000, 1, 0, 0, 6, groups=groups, lanes=4)


@given(st.integers(0, 60), st.integers(1, 3))
@settings(deadline=None, max_examples=30)
def test_the_order_goes_on_where_the_counter_stands(done: int, repeats: int) -> None:
    groups = random_groups(3, 9, 2)
    num = int(groups.starts[-1])
    whole = TrainBatches(num, 8, 1, repeats=repeats, groups=groups)
    per_epoch = len(whole)
    resumed = TrainBatches(num, 8, 1, batches_done=done, repeats=repeats, groups=groups)

    def batches(sampler: TrainBatches, epochs: range) -> list[Any]:
        found = []
        for epoch in epochs:
            sampler.set_epoch(epoch)
            found += list(sampler)
        return found

    first = done // per_epoch
    assert (
        batches(resumed, range(first, first + 2))
        == (batches(whole, range(first + 2))[done : (first + 2) * per_epoch])
    )


def test_what_comes_next_is_told_in_time() -> None:
    groups = random_groups(4, 40, 4)
    num, told, ready = int(groups.starts[-1]), [], set()
    where = np.searchsorted(groups.starts, np.arange(num), side="right")

    def prefetch(items: np.ndarray) -> None:
        told.append(len(items))
        ready.update(items.tolist())

    order = grouped_order(groups, 0, 0)
    sampler = TrainBatches(num, 4, 0, groups=groups, following=Ahead(groups, prefetch))
    window = 4 * num // 40
    for number, batch in enumerate(sampler):
        place = number * 4
        assert {sample.item for sample in batch} <= ready
        assert set(order[place : place + window].tolist()) <= ready  # a window ahead
    assert len(told) == -(-(place + 1) // (window // 2))
    assert max(told) <= 2 * window
    assert len(set(where[order[: 2 * window]])) <= 12  # three windows, which the cache holds
