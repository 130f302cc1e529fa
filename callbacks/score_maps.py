"""Writes label maps while a teacher predicts."""

import time
from typing import Any, Protocol, runtime_checkable

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from rich.console import Console
from torch import Tensor

from datamodules.label_shards import Labelled, name_of, write_shard
from datamodules.labelling import LabellingBatch, LabellingDataModule
from datamodules.progress import Bar


@runtime_checkable  # the shape checks of the tests ask isinstance
class HasScores(Protocol):
    """What the callback needs of the outputs of `predict_step`."""

    @property
    def scores(self) -> Tensor: ...

    @property
    def ids(self) -> Tensor: ...

    @property
    def remainder(self) -> Tensor | None: ...


class ScoreMaps(Callback):
    """Collects the maps of a shard and writes it when it is whole.

    What was not written when a run is stopped is made again by the next. Shows how many images
    are done, and says after the first shard how long and how large all will be.
    """

    def __init__(self) -> None:
        self.maps: dict[int, list[Labelled]] = {}
        self.bar: Bar | None = None
        self.written = self.bytes = 0

    def on_predict_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        data = self.data(trainer)
        mine = data.missing[trainer.global_rank :: trainer.world_size]
        self.total = sum(len(data.rows(number)) for number in mine)
        self.started = time.monotonic()
        self.bar = Bar("labelling", self.total, shown=trainer.is_global_zero)
        self.bar.__enter__()

    def on_predict_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: LabellingBatch,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        data, found = self.data(trainer), kept(outputs)
        for i, index in enumerate(batch.indices.tolist()):
            # An image that could not be read has a map without cells.
            rows = slice(None) if bool(batch.is_readable[i]) else slice(0)
            scores, ids, remainder = (None if x is None else x[i][rows, rows] for x in found)
            assert scores is not None
            assert ids is not None
            number = index // data.shard_size
            name = name_of(data.images, index, data.root)
            check_scores(scores, name, data.about.precision)
            maps = self.maps.setdefault(number, [])
            maps.append(Labelled(name, int(batch.stamps[i]), scores.half(), ids, remainder))
            if len(maps) == len(data.rows(number)):
                write_shard(data.directory, data.about, number, self.maps.pop(number))
                self.count(maps, trainer.is_global_zero, trainer.world_size)
        assert self.bar is not None
        self.bar.advance(len(batch.indices))

    def count(self, maps: list[Labelled], is_told: bool, world_size: int) -> None:
        """Say after the first shard what all of them will take."""
        parts = (part for one in maps for part in (one.scores, one.ids, one.remainder))
        self.bytes += sum(part.nbytes for part in parts if part is not None)
        self.written += len(maps)
        if is_told and self.written == len(maps):
            left = self.total - self.written
            minutes = (time.monotonic() - self.started) / self.written * left / 60
            size = self.bytes / self.written * self.total * world_size / 1e9
            grid = "x".join(map(str, maps[0].scores.shape[:2]))
            Console(stderr=True, highlight=False).print(
                f"maps of {grid} cells: {size:.3g} GB in all, about {minutes:.1f} more minutes"
            )

    def on_predict_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.close()

    def on_exception(
        self, trainer: Trainer, pl_module: LightningModule, exception: BaseException
    ) -> None:
        self.close()

    def close(self) -> None:
        if self.bar is not None:
            self.bar.__exit__(None, None, None)
            self.bar = None

    def data(self, trainer: Trainer) -> LabellingDataModule:
        data = trainer.datamodule  # type: ignore[attr-defined]
        assert isinstance(data, LabellingDataModule)
        return data


def check_scores(scores: Tensor, name: str, precision: str) -> None:
    """Refuse what no map can hold, before more of it is made."""
    if bool(scores.half().isfinite().all()):
        return
    found = "NaN" if bool(scores.isnan().any()) else f"{scores.abs().max().item():.3g}"
    raise ValueError(
        f"the teacher's largest score of {name} is {found}; expected numbers up to "
        f"{torch.finfo(torch.half).max:.0f}, as maps hold them in half precision; where "
        f"--precision {precision} is the reason use 32-true, else another teacher"
    )


def kept(outputs: HasScores) -> tuple[Tensor, Tensor, Tensor | None]:
    """Scores, ids and remainder, on the CPU."""
    remainder = None if outputs.remainder is None else outputs.remainder.cpu()
    return outputs.scores.cpu(), outputs.ids.cpu(), remainder
