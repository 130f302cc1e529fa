"""Devices of a run stop together; on real ones in `tests/experiments/test_resume.py`."""

import threading
import time
from types import SimpleNamespace
from typing import Any
from unittest.mock import Mock, PropertyMock

import pytest
from lightning.fabric.strategies.launchers.subprocess_script import _ChildProcessObserver
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities.exceptions import SIGTERMException

from callbacks import Stopping
from callbacks.stopping import forget_children

METHOD: Any = Mock(spec=LightningModule)


def two_devices(accumulate: int, asked_elsewhere_at: int) -> tuple[Any, list[int]]:
    """A trainer on the first of two devices, and the steps at which it asks the other."""
    trainer: Any = Mock(spec=Trainer, world_size=2, global_step=0, is_between=False)
    trainer.accumulate_grad_batches = accumulate
    trainer._signal_connector = SimpleNamespace(received_sigterm=False)
    type(trainer).received_sigterm = PropertyMock(
        side_effect=lambda: trainer._signal_connector.received_sigterm
    )
    trainer.fit_loop = Mock(_should_accumulate=lambda: trainer.is_between)
    asked: list[int] = []

    def ask(own: bool, all: bool) -> bool:
        assert not all
        asked.append(trainer.global_step)
        return own or trainer.global_step >= asked_elsewhere_at

    trainer.strategy = Mock(reduce_boolean_decision=ask)
    return trainer, asked


@pytest.mark.parametrize(
    ("accumulate", "questions"),
    [(1, [10, 20]), (4, [2, 4, 6, 8, 10, 12]), (32, list(range(1, 13)))],
)
def test_devices_ask_one_another_now_and_then(accumulate: int, questions: list[int]) -> None:
    trainer, asked = two_devices(accumulate, questions[-1])
    callback = Stopping()
    callback.setup(trainer, METHOD, "fit")
    callback.on_validation_start(trainer, METHOD)
    while not trainer.received_sigterm:
        trainer.global_step += 1
        trainer.is_between = True  # a micro-batch that ends no step
        callback.on_train_batch_end(trainer)
        trainer.is_between = False
        callback.on_train_batch_end(trainer)
    assert asked == questions
    with pytest.raises(SIGTERMException):  # no evaluation, in which devices could part
        callback.on_validation_start(trainer, METHOD)


def test_a_signal_here_is_told_at_the_next_question() -> None:
    trainer, asked = two_devices(1, 1000)
    callback = Stopping()
    callback.setup(trainer, METHOD, "fit")
    trainer.global_step = 13
    trainer._signal_connector._sigterm_notifier_fn(15, None)
    callback.on_train_batch_end(trainer)
    assert (trainer.received_sigterm, asked) == (False, [])
    trainer.global_step = 20
    callback.on_train_batch_end(trainer)
    assert (trainer.received_sigterm, asked) == (True, [20])


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
