"""Samplers: every sample in its place, whatever the world size, and from anywhere on."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from datamodules.sampling import EvalBatches, TrainBatches, epoch_order, fold

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


@given(sizes, st.integers(0, 5), st.integers(0, 3))
@settings(deadline=None, max_examples=60)
def test_ranks_share_one_global_batch(size: tuple[int, int, int], seed: int, epoch: int) -> None:
    num, batch, world = size
    if num < batch * world:
        with pytest.raises(ValueError, match="do not fill one global batch"):
            TrainBatches(num, batch, seed, 0, world)
        return
    whole = TrainBatches(num, batch * world, seed)
    ranks = [TrainBatches(num, batch, seed, rank, world) for rank in range(world)]
    for sampler in (whole, *ranks):
        sampler.set_epoch(epoch)
    assert {len(r) for r in ranks} == {len(whole)}
    joined = [[s for part in parts for s in part] for parts in zip(*ranks, strict=True)]
    assert joined == list(whole)
    seen = [sample.item for part in joined for sample in part]
    assert len(seen) == len(set(seen)) == num // (batch * world) * batch * world


@given(sizes, st.integers(0, 40))
@settings(deadline=None, max_examples=60)
def test_goes_on_where_the_counter_stands(size: tuple[int, int, int], done: int) -> None:
    num, batch, _ = size

    def batches(sampler: TrainBatches, epochs: range) -> list:
        out = []
        for epoch in epochs:
            sampler.set_epoch(epoch)
            out += list(sampler)
        return out

    full = batches(TrainBatches(num, batch, 3), range(12))
    per_epoch = len(TrainBatches(num, batch, 3))
    done = min(done, 11 * per_epoch)
    resumed = TrainBatches(num, batch, 3, batches_done=done)
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
