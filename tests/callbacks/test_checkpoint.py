"""When a run is saved and evaluated, and what is the best."""

import contextlib
import os
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities.exceptions import SIGTERMException

import callbacks.checkpoint
from callbacks.checkpoint import Checkpoint
from callbacks.checkpoint_files import read_checkpoint
from modules import Supervised
from tests import small
from tests.callbacks.test_checkpoint_files import Killed
from tests.runs import differences


def test_what_a_run_writes_is_primitive_and_complete(tmp_path: Path) -> None:
    module, trainer = small.method(), small.trainer(tmp_path)
    trainer.fit(module, small.data())
    directory = Path(trainer.log_dir or "") / "checkpoints"
    assert sorted(os.listdir(directory)) == ["before.ckpt", "best.ckpt", "last.ckpt"]
    last = read_checkpoint(directory / "last.ckpt")
    assert differences(last["state_dict"], dict(module.state_dict())) == []
    assert last["hyper_parameters"]["num_classes"] == 10
    assert last["hyper_parameters"]["optimizer"]["base_lr"] == 1e-3
    again = Supervised.load_from_checkpoint(
        directory / "last.ckpt", backbone=module.classifier.backbone, optimizer=module.optimization
    )
    assert differences(dict(again.state_dict()), last["state_dict"]) == []


def test_best_is_the_best(tmp_path: Path) -> None:
    class Scripted(Supervised):
        def on_validation_epoch_end(self) -> None:
            self.tally.rows, self.averaged_tally.rows = [], []
            self.log("val/accuracy", [0.2, 0.7, 0.5][self.current_epoch])

    module = Scripted(small.method().classifier.backbone, 10)
    checkpoint = Checkpoint(every_n_steps=1)
    trainer = small.trainer(tmp_path, checkpoint=checkpoint)
    trainer.fit(module, small.data())
    best = read_checkpoint(checkpoint.directory / "best.ckpt")
    assert (checkpoint.best, checkpoint.best_step) == (pytest.approx(0.7), 10)
    assert best["global_step"] == 10


def test_unknown_metric_is_named_at_the_first_validation(tmp_path: Path) -> None:
    trainer = small.trainer(tmp_path, checkpoint=Checkpoint(monitor="val/acc"))
    with pytest.raises(ValueError, match=r"monitor is 'val/acc', but .* val/accuracy"):
        trainer.fit(small.method(), small.data())


@pytest.mark.parametrize("ends", [{"max_epochs": 2}, {"max_epochs": -1, "max_steps": 7}])
def test_the_last_weights_are_evaluated(tmp_path: Path, ends: dict) -> None:
    """Epochs of five steps, of which every tenth would be evaluated."""
    evaluated = []

    class Evaluated(Callback):
        def on_validation_end(self, trainer: Trainer, module: LightningModule) -> None:
            evaluated.append(trainer.global_step)

    run = small.trainer(tmp_path, Evaluated(), check_val_every_n_epoch=10, **ends)
    run.fit(small.method(), small.data())
    last = ends.get("max_steps", 10)
    assert evaluated == [last]
    assert "val/accuracy" in run.callback_metrics
    best = read_checkpoint(next(tmp_path.rglob("best.ckpt")))
    assert best["global_step"] == last


def test_the_best_of_the_last_evaluation_survives_resuming(tmp_path: Path) -> None:
    """It comes after last.ckpt was written, so best.ckpt has to tell."""
    arguments: dict[str, Any] = {"check_val_every_n_epoch": 5, "max_epochs": 1}
    first = small.trainer(tmp_path, **arguments)
    first.fit(small.method(), small.data())
    kept = first.checkpoint_callback
    assert kept.best_step == first.global_step
    again = small.trainer(tmp_path, **arguments | {"max_epochs": 2}, limit_val_batches=0)
    directory = Path(first.log_dir) / "checkpoints"
    resumed = again.checkpoint_callback
    resumed.setup = lambda *_, **__: setattr(resumed, "directory", directory)
    again.fit(small.method(), small.data(), ckpt_path=str(directory / "last.ckpt"))
    assert (resumed.best, resumed.best_step) == (kept.best, kept.best_step)


class Evaluations(Callback):
    """The figures of a run and where they are on its curves; it is killed in one evaluation."""

    def __init__(self, dies_at: int = -1, error: type[BaseException] = Killed) -> None:
        self.dies_at, self.error = dies_at, error
        self.found: dict[int, dict[str, float]] = {}

    def on_validation_batch_end(self, trainer: Trainer, *_: Any) -> None:
        if trainer.global_step == self.dies_at:
            raise self.error

    def on_validation_end(self, trainer: Trainer, module: LightningModule) -> None:
        figures = {name: float(value) for name, value in trainer.callback_metrics.items()}
        figures = {name: value for name, value in figures.items() if name.startswith("val/")}
        place = {"x": trainer.fit_loop.epoch_loop._batches_that_stepped}
        assert trainer.global_step not in self.found
        self.found[trainer.global_step] = figures | place | {"epoch": trainer.current_epoch}


EVERY_EPOCH: dict[str, Any] = {"max_epochs": 2}
WITHIN = {"max_epochs": 1, "val_check_interval": 2}
ACROSS = {"max_epochs": 2, "check_val_every_n_epoch": None, "val_check_interval": 3}
IN_PARTS = {"max_epochs": 2, "limit_train_batches": 6, "accumulate_grad_batches": 2}
SELDOM = {"max_epochs": 1, "check_val_every_n_epoch": 5}
BETWEEN = {"max_epochs": -1, "max_steps": 7}
ON_AN_EPOCH = {"max_epochs": -1, "max_steps": 10}


@pytest.mark.parametrize(
    ("arguments", "cuts"),
    [
        pytest.param(EVERY_EPOCH, [5, 10], id="every epoch"),
        pytest.param(WITHIN, [2], id="within an epoch"),
        pytest.param(ACROSS, [6], id="across epochs"),
        pytest.param(IN_PARTS, [3], id="steps of two batches"),
        pytest.param(SELDOM, [5], id="after the last epoch"),
        pytest.param(BETWEEN, [7], id="after the last step"),
        pytest.param(ON_AN_EPOCH, [10], id="the last step ends an epoch"),
    ],
)
def test_an_evaluation_that_was_cut_short_is_made_up(
    tmp_path: Path, arguments: dict[str, Any], cuts: list[int]
) -> None:
    def run(name: str, seen: Evaluations, error: Any = (), **more: Any) -> tuple[dict, dict]:
        checkpoint = Checkpoint(more.pop("every", 1), monitor="val/loss", mode="min")
        checkpoint.setup = lambda *_, **__: setattr(checkpoint, "directory", tmp_path / name)  # type: ignore[method-assign]
        trainer = small.trainer(tmp_path, seen, checkpoint=checkpoint, **arguments)
        with pytest.raises(error) if error else contextlib.nullcontext():
            trainer.fit(small.method(), small.data(), **more)
        if error:
            return {}, {}
        best, last = (read_checkpoint(tmp_path / name / f"{n}.ckpt") for n in ("best", "last"))
        return best, last

    whole = Evaluations()
    best, last = run("whole", whole)
    # A process that is told to stop may have no last.ckpt of the step before it goes.
    errors = [(Killed, 1), (SIGTERMException, 1000)][: 2 if arguments is EVERY_EPOCH else 1]
    for step in cuts:
        for error, every in errors:
            name, cut, resumed = f"{step} {every}", Evaluations(step, error), Evaluations()
            run(name, cut, error, every=every)
            assert step not in cut.found
            path = tmp_path / name / "last.ckpt"
            assert read_checkpoint(path)["global_step"] == step
            again, end = run(name, resumed, ckpt_path=str(path))
            assert cut.found | resumed.found == whole.found
            assert min(resumed.found) == step
            assert again["global_step"] == best["global_step"]
            for one, other in ((best, again), (last, end)):
                for part in ("state_dict", "optimizer_states", "lr_schedulers"):
                    assert differences(one[part], other[part]) == []


def test_an_evaluation_of_an_older_checkpoint_is_not_made_up(tmp_path: Path) -> None:
    """Whether it was finished is not known."""
    first = small.trainer(tmp_path, Evaluations(5), max_epochs=2)
    with pytest.raises(Killed):
        first.fit(small.method(), small.data())
    path = Path(first.log_dir or "") / "checkpoints" / "last.ckpt"
    kept = torch.load(path)
    del kept["callbacks"][first.checkpoint_callback.state_key]["validated_step"]
    torch.save(kept, path)
    resumed = Evaluations()
    small.trainer(tmp_path, resumed, max_epochs=2).fit(
        small.method(), small.data(), ckpt_path=str(path)
    )
    assert list(resumed.found) == [10]


@pytest.mark.parametrize("is_global_zero", [True, False])
def test_one_device_reads_the_best_for_all(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, is_global_zero: bool
) -> None:
    checkpoint = Checkpoint()
    checkpoint.directory, path = tmp_path, tmp_path / "best.ckpt"
    state = {checkpoint.state_key: {"best": 0.9, "best_step": 7}}
    torch.save({"callbacks": state}, path)
    read: list[Path] = []

    def counted(path: Path, **options: Any) -> Any:
        read.append(path)
        return read_checkpoint(path, **options)

    monkeypatch.setattr(callbacks.checkpoint, "read_checkpoint", counted)
    trainer = Mock(spec=Trainer, global_step=8, ckpt_path="x", is_global_zero=is_global_zero)
    told = Checkpoint()
    told.directory = tmp_path
    answer = told.kept_with_best()
    trainer.strategy = Mock(broadcast=lambda own: own if is_global_zero else answer)
    read.clear()
    checkpoint.on_train_start(trainer, Mock(spec=LightningModule))
    assert (checkpoint.best, checkpoint.best_step) == (0.9, 7)
    assert read == [path] * is_global_zero
    path.write_bytes(path.read_bytes()[:200])
    answer = told.kept_with_best()
    with pytest.raises(ValueError, match=r"best\.ckpt: it is truncated.*; move it away to go on"):
        checkpoint.on_train_start(trainer, Mock(spec=LightningModule))
