"""Supervised losses and heads against timm's, metrics against plain sums, checks."""

import shutil
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest
import torch
from lightning.pytorch import Callback
from timm.data.mixup import mixup_target
from timm.loss import BinaryCrossEntropy, LabelSmoothingCrossEntropy, SoftTargetCrossEntropy
from timm.models.deit import VisionTransformerDistilled

from callbacks.checkpoint_files import read_checkpoint
from callbacks.tally import Tally
from datamodules.batch import ImageBatch, Mixed
from modules import Supervised
from modules.backbones import ViT
from modules.losses import loss_per_image, soft_cross_entropy, soft_targets
from modules.optim import Optimization
from modules.supervised import Classifier
from modules.weights import to_timm
from tests import small
from tests.runs import differences


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


def mixed_batch() -> ImageBatch:
    """Mixed with another class, with the same one, and hardly or not at all."""
    mixed = Mixed(torch.tensor([5, 3, 0, 2, 6]), torch.tensor([0.7, 0.5, 1e-4, 1.0, 0.0]))
    return batch(torch.tensor([0, 3, 2, 5, 1]), mixed)


@pytest.mark.parametrize(
    ("loss", "theirs", "smoothing"),
    [
        ("softmax", SoftTargetCrossEntropy(), 0.1),
        ("sigmoid", BinaryCrossEntropy(smoothing=0.0, sum_classes=True), 0.0),
        ("sigmoid", BinaryCrossEntropy(smoothing=0.0, sum_classes=True), 0.1),
        ("bce", BinaryCrossEntropy(smoothing=0.0, target_threshold=0.0), 0.0),
    ],
)
def test_every_loss_and_its_gradient_equal_timms(
    loss: str, theirs: torch.nn.Module, smoothing: float
) -> None:
    torch.manual_seed(0)
    logits = (5 * torch.randn(5, 7)).requires_grad_()
    targets = soft_targets(mixed_batch(), 7, smoothing)
    values = [loss_per_image(loss, logits, targets).mean(), theirs(logits, targets)]
    torch.testing.assert_close(*values)
    torch.testing.assert_close(*(torch.autograd.grad(value, logits)[0] for value in values))


def test_bce_takes_both_classes_of_a_mixed_image_for_present() -> None:
    targets = soft_targets(mixed_batch(), 7, 0.0)
    present = torch.zeros(5, 7)
    present[[0, 0, 1, 2, 2, 3, 4], [0, 5, 3, 2, 0, 5, 6]] = 1.0
    logits = torch.randn(5, 7)
    expected = -(present * logits.sigmoid().log() + (1 - present) * (-logits).sigmoid().log())
    torch.testing.assert_close(loss_per_image("bce", logits, targets), expected.mean(1))


@pytest.mark.parametrize("loss", ["softmax", "sigmoid", "bce"])
def test_every_loss_is_float32(loss: str) -> None:
    logits = torch.tensor([[60.0, -60.0]], dtype=torch.float16)
    value = loss_per_image(loss, logits, torch.tensor([[0.0, 1.0]]))
    assert value.dtype == torch.float32
    assert value.item() == {"softmax": 120.0, "sigmoid": 120.0, "bce": 60.0}[loss]


@pytest.mark.parametrize("loss", ["sigmoid", "bce"])
def test_evaluation_uses_the_loss_of_training(loss: str, tmp_path: Path) -> None:
    module, data = small.method(loss=loss, ema_decay=None), small.data(batch_size=360)
    (logged,) = small.trainer(tmp_path).validate(module, data, verbose=False)
    (images,) = data.val_dataloader()
    module.eval()
    logits = module((images.images.float() / 255 - 0.5) / 0.5)
    targets = torch.nn.functional.one_hot(images.labels, 10).float()
    timms = BinaryCrossEntropy(smoothing=0.0, sum_classes=loss == "sigmoid")
    assert logged["val/loss"] == pytest.approx(timms(logits, targets).item(), rel=1e-5)


def test_every_option_changes_the_training(tmp_path: Path) -> None:
    results: list[torch.Tensor] = []
    for change in (
        {},
        {"loss": "sigmoid"},
        {"loss": "bce"},
        {"head_init": "zero"},
        {"head_bias": -6.9},
        {"label_smoothing": 0.1},
        {"optimizer": Optimization("lamb", base_lr=1e-3, reference_batch=None, warmup_steps=2)},
        {"optimizer": Optimization("lars", base_lr=1e-3, reference_batch=None, warmup_steps=2)},
        {"optimizer": Optimization("lamb", layer_decay=0.5, warmup_steps=2)},
    ):
        module = small.method(**change)
        small.trainer(tmp_path, max_steps=3).fit(module, small.data())
        results.append(module.classifier.head.weight.detach().clone())
    for i, one in enumerate(results):
        assert not any(torch.equal(one, other) for other in results[:i])


@pytest.mark.parametrize("name", ["lamb", "lars"])
def test_resume_is_exact_with_every_optimizer(name: Any, tmp_path: Path) -> None:
    how = Optimization(name, base_lr=1e-2, reference_batch=None, warmup_epochs=0.5, clip_norm=1.0)

    class Keep(Callback):
        def on_train_epoch_start(self, trainer: Any, module: Any) -> None:
            if trainer.current_epoch == 1:
                shutil.copy(Path(trainer.log_dir) / "checkpoints" / "last.ckpt", tmp_path / "kept")

    whole, resumed = (small.method(optimizer=how) for _ in range(2))
    small.trainer(tmp_path, Keep(), max_epochs=2).fit(whole, small.data())
    small.trainer(tmp_path, max_epochs=2).fit(
        resumed, small.data(), ckpt_path=str(tmp_path / "kept"), weights_only=True
    )
    assert differences(whole.state_dict(), resumed.state_dict()) == []


def test_head_begins_as_asked() -> None:
    backbone = ViT("mu", image_size=32, distillation_token=True)
    for head in (h := Classifier(backbone, 1000, "timm", -6.9)).head, h.head_dist:
        assert head.weight.std().item() == pytest.approx(0.02, rel=0.05)
        assert torch.equal(head.bias, torch.full((1000,), -6.9))
    zero = Classifier(backbone, 5, "zero", -10.0).eval()
    assert torch.equal(zero(torch.randn(2, 3, 32, 32)), torch.full((2, 5), -10.0))
    assert torch.equal(Classifier(backbone, 5).head.bias, torch.zeros(5))


def distilled() -> tuple[VisionTransformerDistilled, Classifier]:
    """timm's distilled DeiT in small, and ours with the same weights."""
    torch.manual_seed(0)
    size = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 2}
    theirs = VisionTransformerDistilled(**size, mlp_ratio=2, num_classes=5).eval()
    for parameter in theirs.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    ours = Classifier(ViT("mu", patch_size=8, image_size=32, distillation_token=True), 5).eval()
    renamed = {"pos_embed": "positions.table"}
    state = {
        name if name.startswith("head") else f"backbone.{renamed.get(name, name)}": value
        for name, value in theirs.state_dict().items()
    }
    ours.load_state_dict(state, strict=True)
    return theirs, ours


def test_distilled_model_equals_timms() -> None:
    theirs, ours = distilled()
    images = torch.randn(3, 3, 32, 32)
    torch.testing.assert_close(ours(images), theirs(images), atol=1e-5, rtol=1e-5)
    theirs.set_distilled_training(True)
    for our, their in zip(ours.read(images)[1:], theirs.train()(images), strict=True):
        torch.testing.assert_close(our, their, atol=1e-5, rtol=1e-5)


def test_without_a_teacher_both_heads_learn_from_labels() -> None:
    _, network = distilled()
    targets = torch.eye(5)[:3]
    loss_per_image("softmax", network.train()(torch.randn(3, 3, 32, 32)), targets).mean().backward()
    for name, parameter in network.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.abs().sum() > 0, name


@pytest.mark.parametrize(
    ("size", "says"),
    [
        (24, r"is 24x24, but .* 16x16; to train at 24x24 set .*image_size to 24 \("),
        ((16, 24), r"is 16x24, but .* 16x16; to train at 16x24 set .*image_size to \[16, 24\] \("),
    ],
)
def test_images_of_another_size_than_the_backbones_are_refused(
    size: Any, says: str, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=says):
        small.trainer(tmp_path).fit(small.method(), small.data(image_size=size))
    module = small.method(backbone=ViT("mu", patch_size=8, image_size=size, in_channels=1))
    small.trainer(tmp_path, max_steps=1).fit(module, small.data(image_size=size))
    open_size = small.data(image_size=None)
    small.trainer(tmp_path, max_steps=1).fit(module, open_size)
    assert open_size.image_size == module.classifier.backbone.image_size


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
        ({"loss": "bce", "label_smoothing": 0.1}, "set label_smoothing to 0"),
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


def test_a_run_starts_from_weights_and_does_not_need_them_again(tmp_path: Path) -> None:
    file = tmp_path / "weights.pth"
    first = small.method(ema_decay=None)
    torch.save(to_timm(first.classifier), file)

    class Begin(Callback):
        def on_train_start(self, trainer: Any, module: Any) -> None:
            self.head = module.classifier.head.weight.detach().clone()
            self.averaged = module.averaged.head.weight.detach().clone()

    begin = Begin()
    method = small.method(weights=str(file))
    torch.nn.init.zeros_(method.classifier.head.weight)
    small.trainer(tmp_path, begin, max_epochs=1).fit(method, small.data())
    assert torch.equal(begin.head, first.classifier.head.weight)
    assert torch.equal(begin.averaged, begin.head)

    file.unlink()
    last = next(tmp_path.rglob("last.ckpt"))
    again = small.method(weights=str(file))
    small.trainer(tmp_path / "more", begin, max_epochs=2).fit(
        again, small.data(), ckpt_path=last, weights_only=True
    )
    assert torch.equal(begin.head, read_checkpoint(last)["state_dict"]["classifier.head.weight"])
    with pytest.raises(ValueError, match="no such file"):
        small.trainer(tmp_path / "new", max_epochs=1).fit(
            small.method(weights=str(file)), small.data()
        )


def test_options_about_weights_need_weights() -> None:
    with pytest.raises(ValueError, match="weights_part and weights_drop are about weights"):
        small.method(weights_drop=["head"])
