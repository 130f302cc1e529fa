"""Devices of a run stop together; on real ones in `tests/experiments/test_resume.py`."""

import threading
import time
from types import SimpleNamespace
from typing import Any

import pytest
from lightning.fabric.strategies.launchers.subprocess_script import _ChildProcessObserver
from lightning.pytorch.utilities.exceptions import SIGTERMException

from callbacks import Stopping
from callbacks.stopping import forget_children


class TwoDevices(SimpleNamespace):
    """A trainer on the first of two devices; `asked` are the steps at which it asks the other."""

    def __init__(self, accumulate: int, asked_elsewhere_at: int) -> None:
        self.world_size, self.global_step, self.is_between = 2, 0, False
        self.accumulate_grad_batches, self.asked_elsewhere_at = accumulate, asked_elsewhere_at
        self.asked: list[int] = []
        self.strategy = self.epoch_loop = self.fit_loop = self
        self._signal_connector = SimpleNamespace(received_sigterm=False)

    def _should_accumulate(self) -> bool:
        return self.is_between

    def reduce_boolean_decision(self, own: bool, all: bool) -> bool:
        assert not all
        self.asked.append(self.global_step)
        return own or self.global_step >= self.asked_elsewhere_at

    @property
    def received_sigterm(self) -> bool:
        return self._signal_connector.received_sigterm


@pytest.mark.parametrize(
    ("accumulate", "questions"),
    [(1, [10, 20]), (4, [2, 4, 6, 8, 10, 12]), (32, list(range(1, 13)))],
)
def test_devices_ask_one_another_now_and_then(accumulate: int, questions: list[int]) -> None:
    trainer: Any = TwoDevices(accumulate, questions[-1])
    callback, method = Stopping(), Any
    callback.setup(trainer, method, "fit")
    callback.on_validation_start(trainer, method)
    while not trainer.received_sigterm:
        trainer.global_step += 1
        trainer.is_between = True  # a micro-batch that ends no step
        callback.on_train_batch_end(trainer)
        trainer.is_between = False
        callback.on_train_batch_end(trainer)
    assert trainer.asked == questions
    with pytest.raises(SIGTERMException):  # no evaluation, in which devices could part
        callback.on_validation_start(trainer, method)


def test_a_signal_here_is_told_at_the_next_question() -> None:
    trainer: Any = TwoDevices(1, 1000)
    callback = Stopping()
    callback.setup(trainer, Any, "fit")
    trainer.global_step = 13
    trainer._signal_connector._sigterm_notifier_fn(15, None)
    callback.on_train_batch_end(trainer)
    assert (trainer.received_sigterm, trainer.asked) == (False, [])
    trainer.global_step = 20
    callback.on_train_batch_end(trainer)
    assert (trainer.received_sigterm, trainer.asked) == (True, [20])


def test_children_that_stopped_too_are_no_reason_to_be_killed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    killed: list[int] = []
    monkeypatch.setattr(_ChildProcessObserver, "_terminate_all", lambda self: killed.append(1))
    stopped: Any = SimpleNamespace(poll=lambda: None, returncode=143, pid=0)

    def watched(forget: bool) -> list[int]:
        killed.clear()
        observer = _ChildProcessObserver(0, [stopped], 0)
        observer._sleep_period = 0.05  # type: ignore[assignment]
        observer.start()
        if forget:
            forget_children()
        observer.join(10)
        assert observer not in threading.enumerate()
        return list(killed)

    start = time.monotonic()
    assert watched(forget=True) == []
    assert watched(forget=False) == [1]
    assert time.monotonic() - start < 10
