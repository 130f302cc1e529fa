"""The supervised loss against timm's, its metrics against plain sums, its checks."""

from pathlib import Path
from unittest.mock import Mock

import pytest
import torch
from timm.data.mixup import mixup_target
from timm.loss import LabelSmoothingCrossEntropy, SoftTargetCrossEntropy

from datamodules.batch import ImageBatch, Mixed
from modules import Supervised
from modules.metrics import Tally
from modules.supervised import soft_cross_entropy, soft_targets
from tests import small


def batch(labels: torch.Tensor, mixed: Mixed | None = None) -> ImageBatch:
    b = len(labels)
    yes = torch.ones(b, dtype=torch.bool)
    return ImageBatch(
        torch.zeros(b, 1, 16, 16), labels, torch.arange(b), torch.arange(b), yes, ~yes, mixed
    )


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_loss_and_gradient_equal_timms(smoothing: float) -> None:
    torch.manual_seed(0)
    labels = torch.randint(0, 7, (6,))
    logits = torch.randn(6, 7, requires_grad=True)
    ours = soft_cross_entropy(logits, soft_targets(batch(labels), 7, smoothing)).mean()
    theirs = LabelSmoothingCrossEntropy(smoothing)(logits, labels)
    torch.testing.assert_close(ours, theirs)
    gradients = [torch.autograd.grad(loss, logits)[0] for loss in (ours, theirs)]
    torch.testing.assert_close(*gradients)


def test_mixed_targets_equal_timms() -> None:
    # timm mixes with the flipped batch under one lambda; the same pairs, written our way.
    labels = torch.tensor([0, 3, 2, 5])
    mixed = Mixed(labels.flip(0), torch.full((4,), 0.7))
    theirs = mixup_target(labels, 7, lam=0.7, smoothing=0.1)
    ours = soft_targets(batch(labels, mixed), 7, 0.1)
    torch.testing.assert_close(ours, theirs)
    logits = torch.randn(4, 7)
    torch.testing.assert_close(
        soft_cross_entropy(logits, ours).mean(), SoftTargetCrossEntropy()(logits, theirs)
    )


def test_loss_is_float32_whatever_the_logits_are() -> None:
    logits = torch.tensor([[60.0, -60.0]], dtype=torch.float16)
    loss = soft_cross_entropy(logits, torch.tensor([[0.0, 1.0]]))
    assert loss.dtype == torch.float32
    assert loss.item() == 120.0


def test_metrics_count_valid_images_only(tmp_path: Path) -> None:
    """The logged figures equal a loop over the held-out digits, one by one."""
    module, data = small.method(), small.data(batch_size=64)
    trainer = small.trainer(tmp_path, limit_val_batches=1.0)
    (logged,) = trainer.validate(module, data, verbose=False)
    data.setup("validate")
    module.eval()
    losses, correct, five = [], 0, 0
    for images, labels in ((b.images, b.labels) for b in data.val_dataloader()):
        logits = module((images.float() / 255 - 0.5) / 0.5)
        losses += torch.nn.functional.cross_entropy(logits, labels, reduction="none").tolist()
        order = logits.argsort(dim=-1, descending=True)
        correct += (order[:, 0] == labels)[: 360 - len(losses) + 64].sum().item()
        five += (order[:, :5] == labels[:, None]).any(1)[: 360 - len(losses) + 64].sum().item()
    assert logged["val/accuracy"] == pytest.approx(correct / 360)
    assert logged["val/top5_accuracy"] == pytest.approx(five / 360)
    assert logged["val/loss"] == pytest.approx(sum(losses[:360]) / 360, rel=1e-5)
    assert logged["val/ema_accuracy"] == logged["val/accuracy"]  # a fresh average is a copy


def test_tally_puts_batches_of_ranks_in_order() -> None:
    rows = torch.rand(3, 2, 4, dtype=torch.float32)  # steps, ranks, sums
    tally, module = Tally(), Mock(spec=Supervised)
    for row in rows[:, 0]:
        tally.add(*row)
    module.all_gather = lambda mine: torch.stack((mine, rows[:, 1]))
    one = Tally()
    for row in rows.reshape(-1, 4):
        one.add(*row)
    alone = Mock(spec=Supervised)
    alone.all_gather = lambda mine: mine
    assert tally.totals(module) == one.totals(alone)
    assert tally.rows == []


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ({"num_classes": 0}, "num_classes is 0"),
        ({"label_smoothing": 1.0}, r"label_smoothing is 1.0; expected within \[0, 1\)"),
        ({"ema_decay": 1.0}, "ema_decay is 1.0"),
    ],
)
def test_wrong_options(arguments: dict, says: str) -> None:
    with pytest.raises(ValueError, match=says):
        small.method(**arguments)


def test_label_smoothing_changes_training_but_not_evaluation(tmp_path: Path) -> None:
    a, b = small.method(label_smoothing=0.0), small.method(label_smoothing=0.3)
    for module in (a, b):
        small.trainer(tmp_path, max_steps=3).fit(module, small.data())
    assert not torch.equal(a.classifier.head.weight, b.classifier.head.weight)
    b.load_state_dict(a.state_dict())
    (one,), (other,) = (
        small.trainer(tmp_path).validate(m, small.data(), verbose=False) for m in (a, b)
    )
    assert one == other
