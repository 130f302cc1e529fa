"""Which sample goes where: pure functions of (seed, epoch, rank, world size).

No sampler has a state that a checkpoint would have to carry: given how many batches a run has
taken, the next one is known. Ranks take neighbouring slices of one global batch, so a run on two
devices sees, step by step, the samples of a run on one device with twice the batch.
"""

import os
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple, TypeVar

import numpy as np
from torch.utils.data import Sampler

MASK = (1 << 64) - 1
T = TypeVar("T")


def absorb(state: Any, part: Any) -> Any:
    """One round of SplitMix64 (Steele, Lea and Flood 2014), on an int or on a uint64 array."""
    state = (state ^ part) + 0x9E3779B97F4A7C15 & MASK
    state = (state ^ (state >> 30)) * 0xBF58476D1CE4E5B9 & MASK
    state = (state ^ (state >> 27)) * 0x94D049BB133111EB & MASK
    return state ^ (state >> 31)


def fold(*parts: int) -> int:
    """Hash integers to 63 bits: the key of everything random that depends on just them."""
    state = 0
    for part in parts:
        state = absorb(state, part & MASK)
    return int(state) >> 1


def fold_each(*parts: int, items: np.ndarray) -> np.ndarray:
    """int64 [n]: `fold(*parts, item)` for every item at once."""
    state = 0
    for part in parts:
        state = absorb(state, part & MASK)
    folded: np.ndarray = absorb(np.uint64(state), items.astype(np.uint64)) >> np.uint64(1)
    return folded.astype(np.int64)


def run_seed() -> int:
    """The seed of this run, as Lightning's `seed_everything` recorded it; 0 without one."""
    return int(os.environ.get("PL_GLOBAL_SEED", "0"))


class Sample(NamedTuple):
    """One request: which item of the source, and the key of every random draw for it."""

    item: int
    key: int
    is_valid: bool = True


def epoch_order(num_samples: int, seed: int, epoch: int) -> np.ndarray:
    """A permutation of the samples for one epoch, the same on every rank."""
    return np.random.Generator(np.random.Philox(key=fold(seed, epoch))).permutation(num_samples)


class Groups(NamedTuple):
    """Samples that lie in one file: whoever needs one of them has to fetch them all.

    starts:   int64 [g + 1], the first sample of every group, and the end of the last
    together: groups whose samples are shuffled together
    """

    starts: np.ndarray
    together: int


class Ahead:
    """Says, twice in a window of an order, which samples come in it and in the next one.

    Args:
        groups: how the samples lie in files.
        prefetch: is told them, int64 [n].
    """

    def __init__(self, groups: Groups, prefetch: Callable[[np.ndarray], None]) -> None:
        samples, files = int(groups.starts[-1]), len(groups.starts) - 1
        self.half, self.prefetch = max(1, groups.together * samples // files // 2), prefetch
        self.told: tuple[int, int] | None = None

    def at(self, epoch: int, order: np.ndarray, place: int) -> None:
        """So far the order of an epoch has been read."""
        now = (epoch, place // self.half)
        if now != self.told:
            self.prefetch(order[place : place + 4 * self.half])
            self.told = now


def grouped_order(
    groups: Groups, seed: int, epoch: int, lane: int = 0, lanes: int = 1
) -> np.ndarray:
    """The samples of one lane for one epoch: int64 [n // lanes], few groups at a time.

    Groups are permuted and laid end to end, this line is cut into lanes of one length, and each
    lane into windows of so many groups, in which samples are permuted. Lanes share no sample, and
    neighbouring ones at most one group.
    """
    starts, together = groups
    rng = np.random.Generator(np.random.Philox(key=fold(seed, epoch)))
    chosen = rng.permutation(len(starts) - 1)
    ends = np.cumsum(np.diff(starts)[chosen])
    length = int(starts[-1]) // lanes
    begin, end = lane * length, (lane + 1) * length
    first = int(np.searchsorted(ends, begin, side="right"))
    last = int(np.searchsorted(ends, end, side="left"))
    within = slice(first, last + 1)
    shifts = starts[1:][chosen[within]] - ends[within]  # from the place in line to the sample
    counts = np.diff(np.concatenate(([begin], np.minimum(ends[within], end))))
    items: np.ndarray = np.arange(begin, end) + np.repeat(shifts, counts)
    mix = np.random.Generator(np.random.Philox(key=fold(seed, epoch, lane)))
    for window in np.split(items, ends[first + together - 1 : last : together] - begin):
        mix.shuffle(window)
    return items


def repeated(places: np.ndarray, repeats: int) -> tuple[np.ndarray, np.ndarray]:
    """Which image of the epoch's order stands at each place, and which copy of it.

    Two images take turns, a b a b a b c d c d c d for three repeats: what stands at the places
    i and i ^ 1, which mixing pairs, is never the same image.
    """
    pair, turn = np.divmod(places, 2 * repeats)
    return 2 * pair + turn % 2, turn // 2


def copy_key(seed: int, epoch: int, item: int, copy: int) -> int:
    """The key of one copy of a sample; that of copy 0 does not depend on how many there are."""
    return fold(seed, epoch, item, copy) if copy else fold(seed, epoch, item)


class Batches(Sampler[T]):
    """The training batches of one rank, in epochs of one length, from where a run stands.

    Args:
        length: batches in an epoch.
        batches_done: batches this rank took before, in all epochs: where to go on.
        batches_per_epoch: what of an epoch the run takes; None takes all.
    """

    def __init__(
        self, length: int, batches_done: int = 0, batches_per_epoch: int | None = None
    ) -> None:
        self.length, self.per_epoch = length, min(length, batches_per_epoch or length)
        self.first_epoch, self.first_batch = divmod(batches_done, self.per_epoch)
        self.epoch = self.first_epoch
        self.ahead: int | None = None if batches_done else 0

    @property
    def sampler(self) -> "Batches[T]":
        """Ourselves: Lightning looks for `set_epoch` on the sampler of a batch sampler."""
        return self

    def set_epoch(self, epoch: int) -> None:
        # After a run that `max_steps` ended within an epoch, the trainer counts one more than the
        # batches that were taken; the batches are right. After one that stopped between its last
        # batch and the end of the epoch it counts one less, and catches up by itself.
        if self.ahead is None:
            self.ahead = max(0, epoch - self.first_epoch)
        self.epoch = epoch - self.ahead

    def __len__(self) -> int:
        return self.length

    def __iter__(self) -> Iterator[T]:
        first = self.first_batch if self.epoch == self.first_epoch else 0
        return self.batches(self.epoch, first)

    def batches(self, epoch: int, first: int) -> Iterator[T]:
        """The batches of an epoch from the one numbered `first` on."""
        raise NotImplementedError


class TrainBatches(Batches[list[Sample]]):
    """Batches of one rank: shuffled, all of one size, as many on every rank.

    The images that do not fill a last global batch sit out the epoch; others do in the next.

    With `repeats` above 1 an image comes so many times close together, augmented differently
    (repeated augmentation: Hoffer et al. 2020; DeiT uses 3). An epoch is as long as without, so
    it holds about num_samples / repeats distinct images. The order does not depend on the size
    of a batch: other devices or accumulation still change nothing. DeiT's sampler fills a global
    batch with the same images, up to its ends, but deals them out one by one, so that copies of
    an image land on different ranks. Here they mostly stand on one; batch normalisation would
    see that, the mean gradient does not.

    Args:
        num_samples: size of the source.
        batch_size: samples in a batch of one rank.
        seed: of the run.
        rank, world_size: which slice of each global batch is ours.
        batches_done: batches this rank took before, in all epochs: where to go on.
        batches_per_epoch: stop an epoch after so many; None takes all.
        repeats: copies of each image in an epoch, each with a key of its own.
        groups: how samples lie in files, where an order has to respect that (`grouped_order`).
        lanes: with groups, machines, each of which reads files of its own. The order then depends
            on how many there are, but not on the devices of each.
        following: is told which samples come next.

    Raises:
        ValueError: fewer samples than one global batch, `repeats` below 1, ranks that do not
            spread evenly over the lanes.
    """

    def __init__(
        self,
        num_samples: int,
        batch_size: int,
        seed: int,
        rank: int = 0,
        world_size: int = 1,
        batches_done: int = 0,
        batches_per_epoch: int | None = None,
        repeats: int = 1,
        groups: Groups | None = None,
        lanes: int = 1,
        following: Ahead | None = None,
    ) -> None:
        self.num_samples, self.batch_size, self.seed = num_samples, batch_size, seed
        self.rank, self.world_size, self.repeats = rank, world_size, repeats
        self.groups, self.lanes, self.following = groups, lanes if groups else 1, following
        if world_size % self.lanes:
            raise ValueError(f"{world_size} devices do not spread evenly over {lanes} machines")
        if repeats < 1:
            raise ValueError(f"repeats is {repeats}; expected at least 1")
        length = num_samples // (batch_size * world_size)
        if length == 0:
            raise ValueError(
                f"{num_samples} training samples do not fill one global batch of {batch_size} x "
                f"{world_size} device(s); set data.batch_size to at most "
                f"{num_samples // world_size}"
            )
        super().__init__(length, batches_done, batches_per_epoch)

    def batches(self, epoch: int, first: int) -> Iterator[list[Sample]]:
        ranks = self.world_size // self.lanes
        lane, rank = divmod(self.rank, ranks)
        order = self.order(epoch, lane)
        for batch in range(first, self.length):
            start = (batch * ranks + rank) * self.batch_size
            if self.following is not None:
                self.following.at(epoch, order, start // self.repeats)
            images, copies = repeated(np.arange(start, start + self.batch_size), self.repeats)
            yield [
                Sample(item, copy_key(self.seed, epoch, item, copy))
                for item, copy in zip(order[images].tolist(), copies.tolist(), strict=True)
            ]

    def order(self, epoch: int, lane: int) -> np.ndarray:
        if self.groups is None:
            return epoch_order(self.num_samples, self.seed, epoch)
        return grouped_order(self.groups, self.seed, epoch, lane, self.lanes)


class EvalBatches(Sampler[list[Sample]]):
    """Every sample once, in order; batch i goes to rank i modulo the world size.

    The batches themselves do not depend on the world size, so neither do their results, to the
    bit. What is missing to a full batch, and to as many batches on every rank, is filled with
    repetitions marked `is_valid=False`. `following` is told which samples come next.
    """

    def __init__(
        self,
        num_samples: int,
        batch_size: int,
        rank: int = 0,
        world_size: int = 1,
        following: Ahead | None = None,
    ) -> None:
        if num_samples == 0:
            raise ValueError("there are no images to evaluate on")
        self.num_samples, self.batch_size = num_samples, batch_size
        self.rank, self.world_size, self.following = rank, world_size, following

    def __len__(self) -> int:
        return -(-self.num_samples // (self.batch_size * self.world_size))

    def __iter__(self) -> Iterator[list[Sample]]:
        order = np.arange(self.num_samples if self.following else 0)
        for step in range(len(self)):
            start = (step * self.world_size + self.rank) * self.batch_size
            if self.following is not None:
                self.following.at(0, order, start)
            yield [
                Sample(i % self.num_samples, key=i, is_valid=i < self.num_samples)
                for i in range(start, start + self.batch_size)
            ]
