"""Collapse: its measures, both ways, and a healthy run."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from callbacks.checkpoint_files import read_checkpoint
from callbacks.collapse import Collapse, effective_rank, feature_std, verdict
from tests import views


def test_measures_of_features_by_their_formulas() -> None:
    generator = torch.Generator().manual_seed(0)
    random = torch.randn(4000, 16, generator=generator)
    assert feature_std(random).item() == pytest.approx(1.0, abs=0.02)
    assert effective_rank(random).item() == pytest.approx(16, abs=0.1)
    same = torch.ones(8, 16)
    assert feature_std(same).item() == pytest.approx(0.0, abs=1e-6)
    line = torch.tensor([[1.0, 1.0], [1.0, -1.0]]).repeat(4, 1)
    assert feature_std(line).item() == pytest.approx(0.5, abs=1e-6)  # one of two channels moves
    assert effective_rank(line).item() == pytest.approx(1.0, abs=1e-4)
    turned = 7.0 * torch.eye(5)
    assert effective_rank(turned).item() == pytest.approx(4.0, abs=1e-4)


@pytest.mark.parametrize(
    ("teacher", "prototype", "std", "says"),
    [
        (6.92, 6.92, 0.5, "uniform"),
        (0.01, 0.02, 0.5, "one dimension"),
        (3.0, 3.0, 0.001, "all images have the same features"),
        (0.1, 4.0, 0.3, None),  # sure of every image, and of each something else
    ],
)
def test_verdicts(teacher: float, prototype: float, std: float, says: str | None) -> None:
    found = {"teacher_entropy": teacher, "prototype_entropy": prototype, "feature_std": std}
    told = verdict(found, 1024)
    assert told is None if says is None else told is not None and says in told


class Doctor(Callback):
    """Gives teacher and student heads that answer alike whatever they see."""

    def __init__(self, way: str) -> None:
        self.way = way

    def on_train_batch_start(self, trainer: Any, module: Any, *_: Any) -> None:
        with torch.no_grad():
            for network in (module.student, module.teacher):
                last = network.head.mlp[-1]
                last.weight.zero_()
                last.bias.copy_(torch.eye(len(last.bias))[0])
                directions = network.head.last_layer.parametrizations.weight.original1
                directions.zero_()
                if self.way == "one dimension":
                    directions[1:, 0], directions[0, 0] = -1.0, 1.0
                else:
                    directions[:, 0] = 1.0


def fit(directory: Path, *callbacks: Any, **changes: Any) -> Any:
    arguments = {"max_epochs": 12, "limit_train_batches": 3, "limit_val_batches": 0}
    how = views.optimization(warmup_epochs=1.0)
    # The center would undo one dimension: it stays at zero.
    module = views.method(optimizer=how, center_momentum=1.0, **changes)
    trainer = views.trainer(directory, *callbacks, **arguments)
    trainer.fit(module, views.data())
    return trainer


@pytest.mark.parametrize("way", ["uniform", "one dimension"])
def test_a_collapsed_run_says_which_way_and_stops(tmp_path: Path, way: str) -> None:
    with pytest.raises(ValueError, match=rf"collapsed by step 23: the teacher's output is {way}"):
        fit(tmp_path, Doctor(way))
    kept = read_checkpoint(next(tmp_path.rglob("last.ckpt")))
    assert kept["global_step"] == 22  # 3 steps of warm-up, then 20 log points, the last not kept
    assert kept["callbacks"]["Collapse"] == {"in_a_row": 19}


def test_stopping_can_be_switched_off(tmp_path: Path) -> None:
    trainer = fit(tmp_path, Doctor("uniform"), stop_on_collapse=False)
    assert trainer.global_step == 36


def test_a_healthy_run_goes_on_and_logs_its_signs(tmp_path: Path) -> None:
    trainer = fit(tmp_path, num_prototypes=64)
    assert trainer.global_step == 36
    events = EventAccumulator(str(trainer.log_dir))
    events.Reload()
    logged = {t: events.Scalars(t) for t in events.Tags()["scalars"] if t.startswith("diagnosis/")}
    last = {tag.removeprefix("diagnosis/"): scalars[-1].value for tag, scalars in logged.items()}
    assert set(last) == {
        *("teacher_entropy", "prototype_entropy", "kl", "below_ln_k"),
        *("feature_std", "effective_rank"),
    }
    assert 0 < last["teacher_entropy"] <= last["prototype_entropy"] < math.log(64)
    assert last["kl"] > 0
    assert all(len(scalars) == 36 for scalars in logged.values())
    assert verdict(last, 64) is None


def test_patience_is_at_least_one() -> None:
    with pytest.raises(ValueError, match="patience is 0"):
        Collapse(patience=0)
