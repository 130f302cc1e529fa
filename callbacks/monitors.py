"""What is watched during training."""

from pathlib import Path
from typing import Any, NamedTuple

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor

from datamodules.batch import PackedBatch
from datamodules.sources import Source


class Step(NamedTuple):
    """What is kept of a batch until the host asks.

    number:  optimizer steps before the one that it is of, or a part of
    is_bad:  [] whether its loss was infinite or no number
    indices: [b] of its images in the source, None for batches without
    """

    number: int
    is_bad: Tensor
    indices: Tensor | None


class FiniteLoss(Callback):
    """Stops a run whose loss is infinite or no number, before it replaces a good checkpoint.

    Every batch is looked at on the device; the host asks at log points and before a save. The
    images of the first bad batch are written to `nonfinite-RANK.txt` in the run's directory.
    """

    def __init__(self) -> None:
        self.steps: list[Step] = []
        self.directory: str | None = None

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.directory = trainer.log_dir  # which all devices have to ask for together

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        is_bad = ~torch.isfinite(outputs["loss"].detach())
        # The counter is past this step already, but for micro-batches that did not end one.
        has_stepped = not trainer.fit_loop._should_accumulate()
        number = trainer.global_step - has_stepped
        self.steps.append(Step(number, is_bad, getattr(batch, "indices", None)))
        if has_stepped and trainer._logger_connector.should_update_logs:
            self.check(trainer)

    def on_save_checkpoint(
        self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        self.check(trainer)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.check(trainer)

    def check(self, trainer: Trainer) -> None:
        steps, self.steps = self.steps, []
        flags = torch.stack([step.is_bad for step in steps]).tolist() if steps else []
        bad = [step for step, is_bad in zip(steps, flags, strict=True) if is_bad]
        if not trainer.strategy.reduce_boolean_decision(bool(bad), all=False):
            return
        first = f"step {bad[0].number}" if bad else "a step of another device"
        where = ""
        if bad and bad[0].indices is not None and self.directory is not None:
            path = Path(self.directory) / f"nonfinite-{trainer.global_rank}.txt"
            self.write(path, bad[0], getattr(trainer.datamodule, "train_source", None))  # type: ignore[attr-defined]
            where = f" Its images are listed in {path}."
        raise ValueError(
            f"the training loss is infinite or not a number at {first}; last.ckpt is older and "
            f"stays.{where} Lower the learning rate, or set optimizer.clip_norm or a longer warm-up"
        )

    @staticmethod
    def write(path: Path, step: Step, source: Source | None) -> None:
        """A line an image: its index in the source and its name there."""
        assert step.indices is not None
        lines = [f"# step {step.number}"]
        for index in step.indices.tolist():
            if index >= 0:  # an image, no empty place of a pack
                name = "" if source is None else f"\t{source.describe(index)}"
                lines.append(f"{index}{name}")
        path.parent.mkdir(parents=True, exist_ok=True)
        text = "".join(f"{line}\n" for line in lines)
        path.write_text(text, encoding="utf-8", errors="surrogateescape")


class FillRate(Callback):
    """Logs `train/fill_rate` every epoch: the share of tokens in packed batches that is no padding.

    Other batches have no padding and log nothing.
    """

    def __init__(self) -> None:
        self.tokens = self.places = 0

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.tokens = self.places = 0

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if isinstance(batch, PackedBatch):
            self.tokens += batch.num_tokens
            self.places += batch.images.segments.numel()

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self.places:
            pl_module.log("train/fill_rate", self.tokens / self.places, sync_dist=True)
