"""Resuming from any checkpoint, accumulating, averaging: the clock is the optimizer step."""

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from lightning.pytorch import Callback

from callbacks.checkpoint_files import AtomicCheckpointIO
from modules.optim import Optimization
from tests import small
from tests.runs import differences


class Keep(AtomicCheckpointIO):
    """Keeps a copy of every checkpoint that is written."""

    def __init__(self, directory: Path) -> None:
        super().__init__()
        self.directory = directory

    def save_checkpoint(self, checkpoint: Any, path: Any, storage_options: Any = None) -> None:
        super().save_checkpoint(checkpoint, path)
        number = len(list(self.directory.glob("*")))
        shutil.copy(path, self.directory / f"{number:02d}_{Path(path).name}")


@pytest.mark.parametrize("accumulate", [1, 2])
def test_resume_from_every_checkpoint_ends_the_same(tmp_path: Path, accumulate: int) -> None:
    copies = tmp_path / "copies"
    copies.mkdir()
    arguments = {"accumulate_grad_batches": accumulate, "limit_train_batches": 4}
    trainer = small.trainer(tmp_path, **arguments)
    trainer.strategy.checkpoint_io = Keep(copies)
    whole = small.method()
    trainer.fit(whole, small.data())
    steps = 12 // accumulate
    assert trainer.global_step == steps
    written = sorted(copies.glob("*last.ckpt"))
    assert len(written) == steps + 3  # after every step and at the end of every epoch
    for checkpoint in [*written, *copies.glob("*best.ckpt")]:
        resumed, again = small.method(), small.trainer(tmp_path, **arguments)
        torch.manual_seed(99)
        again.fit(resumed, small.data(), ckpt_path=str(checkpoint), weights_only=True)
        assert again.global_step == steps, checkpoint.name
        assert differences(whole.state_dict(), resumed.state_dict()) == [], checkpoint.name


class Record(Callback):
    """What a run saw and did at each optimizer step."""

    def __init__(self) -> None:
        self.indices: list[list[int]] = []
        self.rates: list[float] = []

    def on_train_batch_start(self, trainer: Any, module: Any, batch: Any, index: int) -> None:
        self.indices.append(batch.indices.tolist())

    def on_before_optimizer_step(self, trainer: Any, module: Any, optimizer: Any) -> None:
        self.rates.append(optimizer.param_groups[0]["lr"])


def test_every_epoch_has_another_order(tmp_path: Path) -> None:
    record = Record()
    trainer = small.trainer(tmp_path, record, limit_train_batches=1.0, max_epochs=2)
    trainer.fit(small.method(), small.data(batch_size=64))
    first, second = np.concatenate(record.indices).reshape(2, -1).tolist()
    assert len(set(first)) == len(set(second)) == 22 * 64
    assert first != second


def test_rates_are_a_function_of_the_optimizer_step(tmp_path: Path) -> None:
    record = Record()
    module = small.method()
    small.trainer(tmp_path, record, accumulate_grad_batches=2, limit_train_batches=4).fit(
        module, small.data()
    )
    assert record.rates == [module.lr.at(step) for step in range(6)]
    assert record.rates[0] == 0.0  # a warm-up begins at zero, and has one step here
    assert record.rates[1] == 1e-3


@pytest.mark.parametrize("parts", [2, 4])
def test_accumulated_micro_batches_equal_one_batch(tmp_path: Path, parts: int) -> None:
    def trained(batch: int, accumulate: int) -> dict[str, torch.Tensor]:
        torch.manual_seed(0)
        plain = small.ViT("mu", patch_size=8, image_size=16, in_channels=1)
        # Adam would blow up rounding where a gradient is nearly zero.
        sgd = Optimization("sgd", base_lr=0.05, reference_batch=None, warmup_epochs=0.5)
        module = small.method(backbone=plain, optimizer=sgd)
        small.trainer(
            tmp_path, limit_train_batches=5 * accumulate, accumulate_grad_batches=accumulate
        ).fit(module, small.data(batch_size=batch, mixup=0.5, cutmix=0.5))
        return module.state_dict()

    whole, cut = trained(16, 1), trained(16 // parts, parts)
    for name, value in whole.items():
        torch.testing.assert_close(cut[name], value, atol=2e-5, rtol=1e-4, msg=name)


def test_average_follows_its_formula_and_stays_in_eval_mode(tmp_path: Path) -> None:
    class Restated(Callback):
        def on_train_start(self, trainer: Any, module: Any) -> None:
            self.average = {n: p.clone() for n, p in module.classifier.state_dict().items()}
            assert differences(module.averaged.state_dict(), self.average) == []

        def on_train_batch_end(self, trainer: Any, module: Any, *_: Any) -> None:
            assert module.classifier.training
            assert not any(part.training for part in module.averaged.modules())
            if trainer.fit_loop._should_accumulate():
                return
            for name, value in module.classifier.state_dict().items():
                self.average[name] = 0.9 * self.average[name] + 0.1 * value

    restated = Restated()
    module = small.method()
    small.trainer(tmp_path, restated, accumulate_grad_batches=2).fit(module, small.data())
    assert module.averaged is not None
    for name, value in module.averaged.state_dict().items():
        torch.testing.assert_close(value, restated.average[name], atol=1e-6, rtol=1e-5)
    pairs = zip(module.averaged.parameters(), module.classifier.parameters(), strict=True)
    for kept, current in pairs:
        assert kept.data_ptr() != current.data_ptr()
        assert not kept.requires_grad


def test_validation_and_pictures_change_nothing(tmp_path: Path) -> None:
    class Noisy(Callback):
        def on_train_batch_end(self, *_: Any) -> None:
            torch.rand(3)

    a, b = small.method(), small.method()
    small.trainer(tmp_path).fit(a, small.data())
    small.trainer(tmp_path, Noisy(), limit_val_batches=1, check_val_every_n_epoch=2).fit(
        b, small.data()
    )
    assert differences(a.state_dict(), b.state_dict()) == []
