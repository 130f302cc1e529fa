"""SIGTERM on several devices, or within a step of several batches: the step ends first."""

import threading
from typing import Any

from lightning.fabric.strategies.launchers.subprocess_script import _ChildProcessObserver
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities.exceptions import SIGTERMException

EVERY = 10  # batches from one question to the next


class Stopping(Callback):
    """Lets the devices of a run agree on the step after which it stops.

    The signal reaches one process, or several at different moments. Lightning would have each
    broadcast in the midst of what it is doing, and look at a tensor of the device every step. Here
    a process takes note and goes on; every tenth step, or sooner where steps take several batches,
    all ask one another, which waits for the device as a log point does. The step is saved by
    `Checkpoint`, and an evaluation that would follow is left to the resumed run, which begins with
    it. A process alone looks at its own note after every step of several batches; where steps are
    of one batch it stops at once, as Lightning has it.
    """

    def __init__(self) -> None:
        self.is_asked = self.is_joint = False

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        several = trainer.world_size > 1 or trainer.accumulate_grad_batches > 1
        self.is_asked, self.is_joint = False, stage == "fit" and several
        if self.is_joint:  # before Lightning's handler is set
            connector: Any = trainer._signal_connector
            connector._sigterm_notifier_fn = self.note
            loop: Any = trainer.fit_loop.epoch_loop
            loop._broadcast_sigterm_tensor = no_broadcast

    def note(self, *_: Any) -> None:
        self.is_asked = True

    def on_train_batch_end(self, trainer: Trainer, *_: Any) -> None:
        every = max(1, EVERY // trainer.accumulate_grad_batches) if trainer.world_size > 1 else 1
        if not self.is_joint or trainer.fit_loop._should_accumulate():
            return
        if trainer.global_step % every == 0 and trainer.strategy.reduce_boolean_decision(
            self.is_asked, all=False
        ):
            trainer._signal_connector.received_sigterm = True
            forget_children()

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        # Devices may have different numbers of batches, and would leave after the first of several.
        if self.is_joint and trainer.received_sigterm:
            raise SIGTERMException


def no_broadcast() -> None:
    """In the place of Lightning's, every step."""


def forget_children() -> None:
    """Lightning kills a process one of whose children left with another code than 0."""
    for thread in threading.enumerate():
        if isinstance(thread, _ChildProcessObserver):
            thread._child_processes = []
