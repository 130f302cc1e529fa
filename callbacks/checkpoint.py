"""When a run is saved and evaluated.

A run directory holds `checkpoints/last.ckpt`, from which the run goes on bit by bit as if it
had not stopped, `checkpoints/before.ckpt`, the one before it, should a disk damage that, and
`checkpoints/best.ckpt`, the best by the monitored metric.
"""

import math
from functools import partial
from pathlib import Path
from typing import Any, Literal, Protocol, runtime_checkable

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Checkpoint as CheckpointBase
from lightning.pytorch.loops.evaluation_loop import RestartStage
from lightning.pytorch.utilities import rank_zero_warn
from lightning.pytorch.utilities.exceptions import SIGTERMException

from callbacks.checkpoint_files import BEST, LAST, read_checkpoint
from callbacks.host import finish


@runtime_checkable
class LogsNowAndThen(Protocol):
    """A callback that does not log its metrics at every evaluation."""

    def logs_now_and_then(self, metric: str) -> bool: ...


class Checkpoint(CheckpointBase):
    """Keeps `last.ckpt` current and `best.ckpt` the best.

    `last` is written every `every_n_steps` optimizer steps, at the end of every epoch, and when
    the run is told to stop (SIGTERM). A run is evaluated at its end, whatever the interval. An
    evaluation that was cut short, or left out by a run that was told to stop, is the first thing
    that the resumed run does, so that it has the figures and the best of one that never stopped.

    Args:
        every_n_steps: optimizer steps from one `last.ckpt` to the next.
        monitor: metric that `best.ckpt` is the best by; null for none.
        mode: whether more ("max") or less ("min") of it is better.
    """

    def __init__(
        self,
        every_n_steps: int = 1000,
        monitor: str | None = "val/accuracy",
        mode: Literal["max", "min"] = "max",
    ) -> None:
        if every_n_steps < 1:
            raise ValueError(f"every_n_steps is {every_n_steps}; expected at least 1")
        self.every_n_steps, self.monitor, self.mode = every_n_steps, monitor, mode
        self.best: float | None = None
        self.best_step = 0
        self.saved_step = -1
        self.validated_step: int | None = -1  # None: a checkpoint of before this was kept
        self.is_owed = False  # the evaluation after the last step of the run that goes on

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        directory = Path(trainer.log_dir or trainer.default_root_dir) / "checkpoints"
        self.directory = Path(trainer.strategy.broadcast(str(directory)))
        if stage == "fit" and trainer.is_global_zero:
            for left in self.directory.glob(".*.ckpt.*.tmp"):  # by a process killed while writing
                left.unlink(missing_ok=True)

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        loop: Any = trainer.fit_loop
        loop.run = partial(self.run, trainer)  # no hook is called where no step is left

    def run(self, trainer: Trainer) -> None:
        """Lightning's loop over epochs, with the evaluation that a resumed run owes."""
        loop: Any = trainer.fit_loop
        is_resumed = loop.is_resuming and trainer.limit_train_batches != 0
        self.is_owed = is_resumed and self.is_due(trainer)
        batches = loop.epoch_loop.batch_progress
        if self.is_owed and batches.current.completed < batches.current.processed:
            batches.increment_completed()  # else the epoch that it ends would count as over
        type(loop).run(loop)
        is_over = is_resumed and loop.is_resuming  # no step was left
        if is_over and self.validated_step != trainer.global_step and trainer.enable_validation:
            loop.reset()
            epochs = loop.epoch_progress.current
            epochs.completed = epochs.processed  # its last.ckpt was written as one ended
            loop.on_run_start()
            loop.on_run_end()

    def is_due(self, trainer: Trainer) -> bool:
        """Whether an evaluation follows on the step of the checkpoint, and was not finished."""
        loop: Any = trainer.fit_loop
        loop.setup_data()  # decides on the interval
        epochs = loop.epoch_progress.current
        if epochs.processed > epochs.completed or self.validated_step is None:  # after an epoch
            return False
        is_done = self.validated_step == trainer.global_step
        return not is_done and bool(loop.epoch_loop._should_check_val_fx(loop._data_fetcher))

    def save(self, trainer: Trainer, name: str) -> None:
        """
        Raises:
            ValueError: on all devices, also where only the first could not write.
        """
        if trainer.fast_dev_run:  # type: ignore[attr-defined]
            return
        # Lightning's `weights_only` means "without the optimizer" here. Its own `save_checkpoint`
        # lets the others wait for ever for a first device that could not write.
        checkpoint = trainer._checkpoint_connector.dump_checkpoint(weights_only=False)
        fault: ValueError | None = None
        try:
            trainer.strategy.save_checkpoint(checkpoint, self.directory / name)
        except ValueError as error:
            fault = error
        if told := trainer.strategy.broadcast("" if fault is None else str(fault)):
            raise ValueError(told) from fault

    def save_last(self, trainer: Trainer) -> None:
        self.saved_step = trainer.global_step
        self.save(trainer, LAST)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.saved_step = trainer.global_step
        if self.is_owed:  # Lightning evaluates before it trains where that had been begun
            evaluation = trainer.fit_loop.epoch_loop.val_loop
            evaluation._restart_stage = RestartStage.RESTARTED_MID_EVALUATION
            evaluation.restarting = False  # all batches
            self.is_owed = False
        if trainer.ckpt_path is None or self.monitor is None:
            return
        # The evaluation at the end of a run comes after its last.ckpt, which does not know of it.
        found = self.kept_with_best() if trainer.is_global_zero else ({}, "")
        kept, fault = trainer.strategy.broadcast(found)
        if fault:
            raise ValueError(f"{fault}; move it away to go on without the best so far")
        if kept.get("best") is not None and self.is_better(kept["best"]):
            self.best, self.best_step = kept["best"], kept["best_step"]

    def kept_with_best(self) -> tuple[dict[str, Any], str]:
        """This callback's state in best.ckpt, empty where there is none, or what is wrong there."""
        path = self.directory / BEST
        try:
            whole = read_checkpoint(path, mmap=True) if path.is_file() else {}
        except ValueError as error:
            return {}, str(error)
        return whole.get("callbacks", {}).get(self.state_key, {}), ""

    def is_better(self, value: float) -> bool:
        return self.best is None or (value > self.best if self.mode == "max" else value < self.best)

    def on_train_batch_end(self, trainer: Trainer, *_: Any) -> None:
        finish(trainer.strategy.root_device)  # here, after all other callbacks
        stepped = trainer.global_step > self.saved_step
        due = trainer.global_step % self.every_n_steps == 0 or trainer.received_sigterm
        if stepped and due and not trainer.fit_loop._should_accumulate():
            self.save_last(trainer)

    def on_validation_batch_end(self, trainer: Trainer, *_: Any) -> None:
        finish(trainer.strategy.root_device)

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        # What this evaluation does not log again would be taken for its result.
        known = trainer._logger_connector._callback_metrics
        for name in [name for name in known if name.startswith("val/")]:
            del known[name]

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.sanity_checking or trainer.state.fn != "fit":
            return
        self.validated_step = trainer.global_step
        if self.monitor is None:
            return
        metrics = trainer.callback_metrics
        if self.monitor not in metrics:
            others = [c for c in trainer.callbacks if isinstance(c, LogsNowAndThen)]  # type: ignore[attr-defined]
            if any(other.logs_now_and_then(self.monitor) for other in others):
                return
            raise ValueError(
                f"checkpoint.monitor is {self.monitor!r}, but validation logged "
                f"{', '.join(sorted(metrics)) or 'nothing'}; name one of these, or null"
            )
        value = float(metrics[self.monitor])
        if math.isnan(value):
            return
        if self.is_better(value):
            self.best, self.best_step = value, trainer.global_step
            self.save(trainer, BEST)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        # `max_steps`, or epochs that are not evaluated, can end a run between two evaluations; its
        # last weights are those that it is about.
        if self.validated_step != trainer.global_step and trainer.enable_validation:
            evaluation = trainer.fit_loop.epoch_loop.val_loop
            evaluation.restarting = False  # else it would count the batches of the one before
            trainer.validating = True
            evaluation.run()
            trainer.training = True

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.save_last(trainer)

    def on_exception(
        self, trainer: Trainer, pl_module: LightningModule, exception: BaseException
    ) -> None:
        # A signal that came after a step's hooks: the step is complete, so it can be kept, unless
        # gradients of a micro-batch after it are waiting, which no checkpoint holds.
        stepped = (
            trainer.global_step > self.saved_step and not trainer.fit_loop._should_accumulate()
        )
        if isinstance(exception, SIGTERMException) and stepped:
            try:
                self.save_last(trainer)
            except ValueError as error:
                rank_zero_warn(f"no checkpoint could be written on the way out: {error}")

    def state_dict(self) -> dict[str, Any]:
        kept = {"best": self.best, "best_step": self.best_step}
        return {**kept, "validated_step": self.validated_step}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.best, self.best_step = state_dict["best"], state_dict["best_step"]
        self.validated_step = state_dict.get("validated_step")
