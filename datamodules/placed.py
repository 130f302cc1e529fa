"""What all data modules share: a place in the order of the data that a run goes on from."""

import os
import time
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import torch
from lightning.pytorch import LightningDataModule
from torch.utils.data import DataLoader, Dataset, Sampler

from datamodules.sampling import run_seed

Batch = TypeVar("Batch")

LONGEST_WAIT = 3600  # seconds for a batch, after which a run ends rather than to wait for ever


class WaitedLoader(DataLoader[Batch]):
    """A loader that knows for how long its batches were waited for.

    Attributes:
        waited: seconds, in all.

    Raises:
        ValueError: one of its processes was killed, or none gave a batch for an hour.
    """

    waited = 0.0

    def __iter__(self) -> Any:
        return self.timed(super().__iter__())

    def timed(self, batches: Iterator[Batch]) -> Iterator[Batch]:
        while True:
            started = time.perf_counter()
            try:
                batch = next(batches)
            except StopIteration:
                return
            except ValueError as error:
                # What a worker raised comes as a traceback in a message; its last line says it.
                if "in DataLoader worker process" not in str(error):
                    raise
                raise ValueError(str(error).strip().split("\nValueError: ")[-1]) from error
            except RuntimeError as error:
                if (lost := lost_process(error)) is None:
                    raise
                raise ValueError(lost) from error
            finally:
                self.waited += time.perf_counter() - started
            yield batch


def lost_process(error: BaseException | None) -> str | None:
    """What to say if `error`, or one that led to it, is that a process that loads data ended.

    Torch raises that from a signal handler: in the midst of whatever the run does. The same for
    processes that give no batch.
    """
    while error is not None:
        if isinstance(error, RuntimeError) and "DataLoader timed out" in str(error):
            return (
                f"no batch came for {LONGEST_WAIT / 60:.0f} minutes from the processes that load "
                f"data; see whether the disk or the server that has it answers. A run goes on with "
                f"`patchlight fit --resume RUN`"
            )
        if isinstance(error, RuntimeError) and "DataLoader worker (pid" in str(error):
            return (
                f"a process that loads data ended ({' '.join(str(error).split())[:120]}), most "
                f"often for want of memory; set num_workers to less. A run goes on with "
                f"`patchlight fit --resume RUN`"
            )
        error = error.__cause__ or error.__context__
    return None


def stand_apart(worker: int) -> None:
    """Give a process that loads data a group of its own.

    SLURM, `timeout` and Ctrl-C signal all of a group. The run is to stop then as it does, with a
    checkpoint, and not because its loading processes have ended first.
    """
    if hasattr(os, "setpgid"):  # not on Windows
        os.setpgid(0, 0)


def limited(length: int, limit: float) -> int:
    """Batches of an epoch that the trainer takes: `limit` is a number of them or a share."""
    return max(1, min(length, limit) if isinstance(limit, int) else int(length * limit))


class PlacedDataModule(LightningDataModule):
    """Batches in an order that is a function of seed, epoch and rank (`datamodules.sampling`).

    Attributes:
        num_workers: processes that make batches.
        seed: of the run, once it was set up.
        order: what the order of the run's batches depends on; a checkpoint carries it.
    """

    num_workers: int

    def __init__(self) -> None:
        super().__init__()
        self.order: dict[str, int] = {}

    def setup(self, stage: str) -> None:
        trainer = self.trainer
        if (
            trainer is not None
            and trainer.world_size > 1
            and trainer._accelerator_connector.use_distributed_sampler
        ):
            raise ValueError(
                "the data module places samples on ranks itself; set "
                "trainer.use_distributed_sampler to false"
            )
        self.seed = run_seed()

    def place(self) -> tuple[int, int]:
        """Rank and number of ranks."""
        trainer = self.trainer
        return (0, 1) if trainer is None else (trainer.global_rank, trainer.world_size)

    def progress(self) -> tuple[int, float]:
        """Training batches that this rank has taken, and `limit_train_batches`."""
        if self.trainer is None:
            return 0, 1.0
        done = self.trainer.fit_loop.epoch_loop.batch_progress.total.ready
        return done, self.trainer.limit_train_batches or 1.0

    def check_resumed(self, order: dict[str, int]) -> None:
        """A run goes on where its batch counter stands, which has to count the same batches."""
        for name, now in order.items():
            before = self.order.get(name, now)
            if before != now:
                raise ValueError(
                    f"{name}: {before} in the run that is resumed, now {now}, so its place in the "
                    f"data is lost; resume it with the devices and the batch size of before, or "
                    f"others whose product is the same, or start a new run"
                )
        self.order = order

    def loader(
        self,
        dataset: Dataset[Any],
        sampler: Sampler[Any],
        collate: Callable[[Any], Batch],
    ) -> DataLoader[Batch]:
        return WaitedLoader(
            dataset,
            batch_sampler=sampler,
            num_workers=self.num_workers,
            collate_fn=collate,
            pin_memory=torch.cuda.is_available(),
            persistent_workers=self.num_workers > 0,
            timeout=LONGEST_WAIT if self.num_workers else 0,
            worker_init_fn=stand_apart,
        )

    def state_dict(self) -> dict[str, Any]:
        return {"order": self.order}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.order = dict(state_dict.get("order", {}))
