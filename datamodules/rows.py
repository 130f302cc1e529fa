"""Which rows of a plan go into which batch: pure functions of (seed, batch, rank, world size)."""

from bisect import bisect_right
from collections.abc import Callable, Iterator
from typing import NamedTuple

from torch.utils.data import Sampler

from datamodules.packing import Pass
from datamodules.sampling import Ahead, Batches


class Request(NamedTuple):
    """One image of a row: which, its key, its grid, and how many of its patches are kept."""

    item: int
    key: int
    grid: tuple[int, int]
    kept: int


class Row(NamedTuple):
    """What one row of a batch is to hold, and the divisor of the batch's losses."""

    requests: list[Request]
    divisor: float


def rows_of(planned: Pass, numbers: range, divisor: float = 1.0) -> list[Row]:
    """Rows of a plan by number; those past its end are empty."""
    rows = []
    for number in numbers:
        places = planned.rows[number] if number < len(planned.rows) else []
        requests = [
            Request(
                int(planned.items[i]),
                int(planned.keys[i]),
                (int(planned.grids[i, 0]), int(planned.grids[i, 1])),
                int(planned.kept[i]),
            )
            for i in places
        ]
        rows.append(Row(requests, divisor))
    return rows


class PackedBatches(Batches[list[Row]]):
    """The training batches of one rank: pass after pass over the data, in epochs of one length.

    A pass takes every image once. Its number of batches depends on how well it packs, so passes
    and the trainer's epochs, which are as long as the first pass, drift apart by a few batches;
    batch i of a run is always the same one.

    Args:
        plan_pass: the plan of a pass by its number; its rows fill whole optimizer steps.
        starts: batches before each pass that was planned so far, extended here; a checkpoint
            carries it so that a resumed run need not plan all passes again.
        num_rows: rows in a batch of one rank.
        rank, world_size: which slice of each global batch is ours.
        accumulate: batches in an optimizer step.
        length, batches_done, batches_per_epoch: see `Batches`; whole optimizer steps.
        batch_size: images in a batch of one rank, on average.
        following: is told which images come next.
    """

    def __init__(
        self,
        plan_pass: Callable[[int], Pass],
        starts: list[int],
        num_rows: int,
        rank: int,
        world_size: int,
        accumulate: int,
        length: int,
        batches_done: int,
        batches_per_epoch: int,
        batch_size: float,
        following: Ahead | None = None,
    ) -> None:
        super().__init__(length, batches_done, batches_per_epoch)
        self.plan_pass, self.starts, self.batch_size = plan_pass, starts, batch_size
        self.num_rows, self.rank, self.world_size = num_rows, rank, world_size
        self.accumulate, self.following = accumulate, following
        self.planned: tuple[int, Pass] | None = None

    def pass_at(self, batch: int) -> tuple[Pass, int]:
        """The pass that holds a batch of the run, and which batch of the pass it is."""
        number = bisect_right(self.starts, batch) - 1
        while True:
            if self.planned is None or self.planned[0] != number:
                self.planned = (number, self.plan_pass(number))
            count = len(self.planned[1].rows) // (self.num_rows * self.world_size)
            end = self.starts[number] + count
            if number + 1 == len(self.starts):
                self.starts.append(end)
            assert self.starts[number + 1] == end, "a pass is not what it was"
            if batch < end:
                return self.planned[1], batch - self.starts[number]
            number += 1

    def batches(self, epoch: int, first: int) -> Iterator[list[Row]]:
        rows = self.num_rows * self.world_size
        for start in range(first - first % self.accumulate, self.per_epoch, self.accumulate):
            step = range(start, start + self.accumulate)
            found = [self.pass_at(epoch * self.per_epoch + batch) for batch in step]
            images = sum(
                len(row)
                for planned, place in found
                for row in planned.rows[place * rows : (place + 1) * rows]
            )
            planned, place = found[0]
            if self.following is not None and planned.rows[place * rows]:
                number = bisect_right(self.starts, epoch * self.per_epoch + start) - 1
                self.following.at(number, planned.items, planned.rows[place * rows][0])
            divisor = max(1, images) / (self.world_size * self.accumulate)
            for batch, (planned, place) in zip(step, found, strict=True):
                if batch >= first:
                    begin = place * rows + self.rank * self.num_rows
                    yield rows_of(planned, range(begin, begin + self.num_rows), divisor)


class PackedEvalBatches(Sampler[list[Row]]):
    """Every image once; batch i goes to rank i modulo the world size, missing ones are empty.

    As with `EvalBatches` the batches themselves do not depend on the world size.
    """

    def __init__(self, planned: Pass, num_rows: int, rank: int, world_size: int) -> None:
        self.planned, self.num_rows = planned, num_rows
        self.rank, self.world_size = rank, world_size

    def __len__(self) -> int:
        return -(-len(self.planned.rows) // (self.num_rows * self.world_size))

    def __iter__(self) -> Iterator[list[Row]]:
        for step in range(len(self)):
            start = (step * self.world_size + self.rank) * self.num_rows
            yield rows_of(self.planned, range(start, start + self.num_rows))
