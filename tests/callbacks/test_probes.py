"""The online probe: learns, disturbs nothing, resumes, and does not care how a batch is cut."""

import shutil
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import nn

from callbacks import OnlineProbe
from callbacks.checkpoint_files import read_checkpoint
from callbacks.standardize import Standardize
from datamodules.batch import ImageBatch, Mixed
from modules.backbones import ViT
from tests import small
from tests.datamodules.test_folder import write
from tests.runs import differences

MODULE = Mock(spec=LightningModule, trainer=Mock(world_size=1))


def batch(labels: torch.Tensor, mixed: Mixed | None = None) -> ImageBatch:
    b = len(labels)
    yes = torch.ones(b, dtype=torch.bool)
    return ImageBatch(torch.zeros(b, 1, 2, 2), labels, labels, labels, yes, ~yes, mixed)


def begun(width: int, num_classes: int, lr: float = 1e-3) -> OnlineProbe:
    probe = OnlineProbe(lr)
    probe.num_classes = num_classes
    probe.begin(width, torch.device("cpu"))
    return probe


def trainer(step: int = 0, accumulate: int = 1, total: Callable[..., Any] | None = None) -> Mock:
    made = Mock(spec=Trainer, accumulate_grad_batches=accumulate, global_step=step)
    made.strategy = Mock()
    made.strategy.reduce = total or (lambda x, reduce_op: x)
    return made


def test_standardize_is_batch_norm_over_valid_rows() -> None:
    torch.manual_seed(0)
    ours, theirs = Standardize(5), nn.BatchNorm1d(5, eps=1e-6, affine=False)
    for _ in range(3):
        x = 100 + 3 * torch.randn(8, 5)
        is_valid = torch.tensor([True] * 6 + [False] * 2)
        expected = theirs(x[:6])
        torch.testing.assert_close(ours(x, is_valid, lambda s: s)[:6], expected)
    for name in ("running_mean", "running_var"):
        torch.testing.assert_close(getattr(ours, name), getattr(theirs, name))
    x = torch.randn(4, 5)
    found = ours.eval()(x, torch.zeros(4, dtype=torch.bool), lambda s: s)
    torch.testing.assert_close(found, theirs.eval()(x))
    assert ours.train()(x.bfloat16(), is_valid[:4], lambda s: s).dtype == torch.float32


class Ranks:
    """Two ranks as two threads, whose `reduce` meets the other's."""

    def __init__(self) -> None:
        self.barrier = threading.Barrier(2, timeout=20)
        self.given: list[Any] = [None, None]

    def reduce(self, rank: int) -> Callable[..., torch.Tensor]:
        def together(x: torch.Tensor, reduce_op: str) -> torch.Tensor:
            self.given[rank] = x.clone()
            self.barrier.wait()
            total = self.given[0] + self.given[1]
            self.barrier.wait()
            return total if reduce_op == "sum" else total / 2

        return together


def test_two_ranks_and_two_micro_batches_equal_one_batch() -> None:
    torch.manual_seed(0)
    # Every class is there: of the others the first gradient is rounding, which Adam would scale up.
    steps = [(torch.randn(8, 6), torch.randperm(8) % 3) for _ in range(4)]

    def learn(probe: OnlineProbe, part: slice, total: Callable[..., Any] | None = None) -> None:
        for step, (features, labels) in enumerate(steps, start=1):
            outputs = {"embedding": features[part]}
            run = trainer(step, total=total)
            probe.on_train_batch_end(run, MODULE, outputs, batch(labels[part]), 0)

    one, halves, ranks = begun(6, 3), [begun(6, 3) for _ in range(2)], Ranks()
    learn(one, slice(8))
    threads = [
        threading.Thread(target=learn, args=(halves[r], slice(4 * r, 4 * r + 4), ranks.reduce(r)))
        for r in range(2)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for half in halves:
        torch.testing.assert_close(half.head.weight, one.head.weight)
        torch.testing.assert_close(half.scale.running_var, one.scale.running_var)
    assert differences(halves[0].state_dict(), halves[1].state_dict()) == []

    # Micro-batches have statistics of their own, so the same one twice is the same step.
    whole, cut = begun(6, 3), begun(6, 3)
    features, labels = steps[0]
    whole.on_train_batch_end(trainer(1), MODULE, {"embedding": features}, batch(labels), 0)
    for step in (0, 1):
        run = trainer(step, accumulate=2)
        cut.on_train_batch_end(run, MODULE, {"embedding": features}, batch(labels), 0)
        assert cut.head.weight.any() == bool(step)  # no step before the method's
    torch.testing.assert_close(cut.head.weight, whole.head.weight)


def test_both_labels_of_a_mixed_image_count() -> None:
    mixed = Mixed(torch.tensor([1, -1]), torch.tensor([0.25, 1.0]))
    given = batch(torch.tensor([0, 2]), mixed)
    probe = begun(4, 3)
    loss = probe.gradients(trainer(), torch.randn(2, 4), given)
    assert loss.item() == pytest.approx(torch.log(torch.tensor(3.0)).item())
    expected = torch.tensor([[0.25, 0.75, 0.0], [0.0, 0.0, 1.0]])
    assert probe.head.bias.grad is not None
    torch.testing.assert_close(probe.head.bias.grad, (1 / 3 - expected).mean(0))


def test_it_learns_and_says_how_well(tmp_path: Path) -> None:
    probe = OnlineProbe(lr=0.02)
    module = small.method(backbone=small.Pixels(), ema_decay=None)
    nn.init.ones_(module.classifier.backbone.weight)
    data = small.data(batch_size=64, mixup=0.0, erasing=0.0, flip=0.0, crop_scale=(0.8, 1.0))
    run = small.trainer(
        tmp_path, probe, limit_train_batches=1.0, limit_val_batches=1.0, max_epochs=1
    )
    run.fit(module, data)
    logged = run.callback_metrics
    assert logged["val/probe_accuracy"] > 0.6
    assert logged["train/probe_loss"] < 1.5
    module.eval()
    correct = 0
    for images in data.val_dataloader():
        embedding = module.embed((images.images / 255 - 0.5) / 0.5)
        assert probe.scale is not None
        scaled = probe.scale.eval()(embedding, images.is_valid, lambda x: x)
        right = (probe.head(scaled).argmax(-1) == images.labels) & images.is_valid
        correct += right.sum().item()
    assert logged["val/probe_accuracy"] == pytest.approx(correct / 360, abs=1e-6)


def test_a_method_trains_as_it_would_without(tmp_path: Path) -> None:
    plain, probed = small.method(), small.method()
    small.trainer(tmp_path, max_epochs=2).fit(plain, small.data())
    probe = OnlineProbe()
    small.trainer(tmp_path, probe, max_epochs=2).fit(probed, small.data())
    assert differences(dict(plain.state_dict()), dict(probed.state_dict())) == []
    assert probe.head.weight.any()


def test_a_resumed_run_goes_on_with_it_bit_by_bit(tmp_path: Path) -> None:
    class Keep(Callback):
        def on_train_epoch_start(self, trainer: Any, module: Any) -> None:
            if trainer.current_epoch == 1:
                shutil.copy(Path(trainer.log_dir) / "checkpoints" / "last.ckpt", tmp_path / "kept")

    def end(name: str, *callbacks: Callback, **more: Any) -> Any:
        given = {"max_epochs": 2, "accumulate_grad_batches": 2, "limit_train_batches": 4}
        run = small.trainer(tmp_path / name, OnlineProbe(), *callbacks, **given)
        run.fit(small.method(), small.data(), **more)
        last = read_checkpoint(next((tmp_path / name).rglob("last.ckpt")))
        return last["callbacks"]["OnlineProbe"]

    whole = end("whole", Keep())
    resumed = end("resumed", ckpt_path=str(tmp_path / "kept"), weights_only=True)
    assert whole["optimizer"]["state"][0]["step"] == 4
    assert differences(whole, resumed) == []


def test_data_without_labels_is_refused_before_the_first_step(tmp_path: Path) -> None:
    for i in range(20):
        write(tmp_path / "flat" / f"{i}.png", i)
    data = small.data(source="folder", root=str(tmp_path / "flat"))
    with pytest.raises(ValueError, match="OnlineProbe needs labels, and the data has none"):
        small.trainer(tmp_path, OnlineProbe()).fit(Unlabelled(), data)
    assert not list(tmp_path.rglob("*.ckpt"))


class Unlabelled(small.Supervised):
    """A method that has no use for labels."""

    def __init__(self) -> None:
        super().__init__(ViT("mu", patch_size=8, image_size=16, in_channels=1), 10)

    def setup(self, stage: str) -> None:
        pass

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return self(batch.images).mean()


def test_a_method_without_features_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="let training_step of Unlabelled return them"):
        small.trainer(tmp_path, OnlineProbe()).fit(Unlabelled(), small.data(mixup=0.0))
    with pytest.raises(ValueError, match="needs a method that has embed; LightningModule has none"):
        OnlineProbe().setup(trainer(), LightningModule(), "fit")
    with pytest.raises(ValueError, match="lr is 0; expected more than 0"):
        OnlineProbe(lr=0)
