"""Distillation against DeiT's formulas, and the teacher: frozen, outside, the same on resume."""

import copy
import shutil
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import torch.nn.functional as F
from lightning.pytorch import Callback
from safetensors.torch import save_file

from modules import Supervised, distillation
from modules.backbones import ViT
from modules.distillation import Distillation, Teacher, distill
from modules.losses import loss_per_image, soft_targets
from tests import small
from tests.callbacks.test_checkpoint_files import Evil
from tests.runs import differences

NAME = "test_resnet.r160_in1k"  # one of timm's miniatures, with batch norm
VIT = "vit_tiny_patch16_224"  # takes images of one size only


def network(num_classes: int = 10, seed: int = 0, in_chans: int = 1) -> torch.nn.Module:
    torch.manual_seed(seed)
    return timm.create_model(NAME, num_classes=num_classes, in_chans=in_chans).eval()


@pytest.fixture
def weights(tmp_path: Path) -> str:
    save_file(network().state_dict(), tmp_path / "teacher.safetensors")
    return str(tmp_path / "teacher.safetensors")


def method(how: Distillation, **changes: Any) -> Supervised:
    backbone = ViT("mu", patch_size=8, image_size=16, in_channels=1, distillation_token=True)
    return small.method(backbone=backbone, distillation=how, **changes)


def published(how: Distillation, base: Any, student: Any, teacher: Any) -> torch.Tensor:
    """DeiT's loss of a batch, restated with torch's own functions."""
    if how.kind == "soft":
        given, taken = (F.log_softmax(x / how.tau, dim=1) for x in (teacher, student))
        learned = F.kl_div(taken, given, reduction="sum", log_target=True)
        learned = learned * (how.tau * how.tau) / student.numel()
    else:
        learned = F.cross_entropy(student, teacher.argmax(dim=1))
    return base * (1 - how.alpha) + learned * how.alpha


@pytest.mark.parametrize(
    "how",
    [
        Distillation(),
        Distillation(alpha=0.2),
        Distillation(kind="soft"),
        Distillation(kind="soft", alpha=0.1, tau=3.0),
    ],
)
def test_loss_and_gradient_equal_the_published_ones(how: Distillation) -> None:
    torch.manual_seed(0)
    student = (3 * torch.randn(6, 7)).requires_grad_()
    teacher, base = 3 * torch.randn(6, 7), torch.rand(6)
    ours = distill(how, base, student, teacher).mean()
    theirs = published(how, base.mean(), student, teacher)
    torch.testing.assert_close(ours, theirs)
    gradients = [torch.autograd.grad(loss, student)[0] for loss in (ours, theirs)]
    torch.testing.assert_close(*gradients)


class Spy(Callback):
    """Checks a step from the outside: its loss, and that the teacher stays what it is."""

    def __init__(self, teacher: torch.nn.Module) -> None:
        self.expected, self.steps = teacher, 0

    def on_train_batch_start(self, trainer: Any, module: Any, batch: Any, index: int) -> None:
        module.classifier.eval()  # neither dropout nor drop path: the step can be repeated
        with torch.no_grad():
            logits, dist = module.classifier.read(batch.images)[1:]
            targets = soft_targets(batch, 10, 0.1)
            base = loss_per_image("softmax", logits, targets).mean()
            answers = self.expected(batch.images)
        self.loss = published(module.distillation, base, dist, answers)

    def on_train_batch_end(self, trainer: Any, module: Any, outputs: Any, *_: Any) -> None:
        torch.testing.assert_close(outputs["loss"], self.loss)
        assert differences(module.teacher.network.state_dict(), self.expected.state_dict()) == []
        assert not any(part.training for part in module.teacher.network.modules())
        self.steps += 1


@pytest.mark.parametrize("kind", ["hard", "soft"])
def test_training_follows_the_formula_and_leaves_the_teacher_alone(
    kind: Any, weights: str, tmp_path: Path
) -> None:
    module = method(Distillation(NAME, weights, kind), label_smoothing=0.1)
    spy = Spy(network())
    trainer = small.trainer(tmp_path, spy, max_epochs=1, limit_train_batches=3)
    trainer.fit(module, small.data())
    assert spy.steps == 3
    assert module.teacher is not None
    assert not any("teacher" in name for name in module.state_dict())
    trained = {id(p) for g in trainer.optimizers[0].param_groups for p in g["params"]}
    assert trained == {id(p) for p in module.classifier.parameters()}
    assert all(p.grad is None for p in module.teacher.network.parameters())


def test_every_option_and_the_weights_change_the_training(weights: str, tmp_path: Path) -> None:
    other = str(tmp_path / "other.safetensors")
    save_file(network(seed=1).state_dict(), other)
    soft = Distillation(NAME, weights, "soft")
    results = []
    for how in (
        Distillation(NAME, weights),
        Distillation(NAME, other, "hard"),
        Distillation(NAME, weights, "hard", alpha=0.2),
        soft,
        Distillation(NAME, weights, "soft", tau=3.0),
        None,
    ):
        module = method(how)
        small.trainer(tmp_path, max_steps=2).fit(module, small.data())
        results.append(module.classifier.head_dist.weight.detach().clone())
    for i, one in enumerate(results):
        assert not any(torch.equal(one, another) for another in results[:i])


def test_resume_is_exact_and_refuses_another_teacher(weights: str, tmp_path: Path) -> None:
    kept, how = tmp_path / "kept.ckpt", Distillation(NAME, weights)

    class Keep(Callback):
        def on_train_epoch_start(self, trainer: Any, module: Any) -> None:
            if trainer.current_epoch == 1:
                shutil.copy(Path(trainer.log_dir) / "checkpoints" / "last.ckpt", kept)

    whole = method(how)
    small.trainer(tmp_path, Keep(), max_epochs=2).fit(whole, small.data())
    resumed = method(how)
    small.trainer(tmp_path, max_epochs=2).fit(resumed, small.data(), ckpt_path=str(kept))
    assert differences(whole.state_dict(), resumed.state_dict()) == []

    size = kept.stat().st_size
    alone = sum(value.nbytes for value in whole.state_dict().values())
    assert size < 4 * alone  # weights, average, two moments: no teacher

    save_file(network(seed=1).state_dict(), weights)
    with pytest.raises(ValueError, match="began with another teacher than"):
        small.trainer(tmp_path, max_epochs=2).fit(method(how), small.data(), ckpt_path=str(kept))
    Path(weights).unlink()  # evaluation needs no teacher
    small.trainer(tmp_path).validate(method(how), small.data(), ckpt_path=str(kept), verbose=False)


def test_weights_of_all_kinds_of_files(tmp_path: Path) -> None:
    expected = network()
    files = {
        "bare.pth": expected.state_dict(),
        "deit.pth": {"model": expected.state_dict(), "epoch": 3, "model_ema": {}},
        "lightning.ckpt": {"state_dict": expected.state_dict()},
    }
    for name, content in files.items():
        torch.save(content, tmp_path / name)
        teacher = Teacher(Distillation(NAME, str(tmp_path / name)), 10, 1, (16, 16))
        images = torch.randn(2, 1, 16, 16)
        assert torch.equal(teacher(images), expected(images))
        assert not any(p.requires_grad for p in teacher.network.parameters())


def test_fingerprint_follows_every_value_and_name() -> None:
    base, seen = network(), set()
    seen.add(distillation.fingerprint(base))
    assert distillation.fingerprint(copy.deepcopy(base)) in seen
    for name in ("conv1.0.weight", "bn1.running_mean", "bn1.num_batches_tracked"):
        changed = copy.deepcopy(base)
        changed.state_dict()[name].view(-1)[0] += 1
        seen.add(distillation.fingerprint(changed))
    assert len(seen) == 4


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ({}, "has no weights, and an untrained one teaches noise; set distillation.weights"),
        ({"teacher": "resnet999"}, "'resnet999' is no model that timm knows"),
        ({"weights": "nowhere.pth"}, "there is no file nowhere.pth"),
        ({"weights": "classes"}, "does not fit teacher test_resnet.* with 10 classes"),
        ({"weights": "pickle"}, r"refused .*pickle: it is damaged, or holds pickled objects"),
        ({"weights": "cut"}, r"refused .*cut.safetensors: it is damaged"),
        ({"teacher": VIT, "weights": "vit"}, "cannot take 1-channel images of 16x16"),
    ],
)
def test_a_teacher_that_will_not_do_stops_before_the_first_step(
    arguments: dict[str, str], says: str, tmp_path: Path
) -> None:
    paths = {name: str(tmp_path / name) for name in ("classes", "pickle", "vit")}
    paths["cut"] = str(tmp_path / "cut.safetensors")
    torch.save(network(7).state_dict(), paths["classes"])
    torch.save({"model": {}, "args": Evil(tmp_path / "trace")}, paths["pickle"])
    (tmp_path / "cut.safetensors").write_bytes(b"\x08\0\0\0\0\0\0\0{")
    vit = timm.create_model(VIT, num_classes=10, in_chans=1)
    torch.save(vit.state_dict(), paths["vit"])
    given = {"teacher": NAME} | arguments
    given["weights"] = paths.get(given.get("weights", ""), given.get("weights"))
    module, trainer = method(Distillation(**given)), small.trainer(tmp_path, max_steps=1)
    with pytest.raises(ValueError, match=says):
        trainer.fit(module, small.data())
    assert trainer.global_step == 0
    assert not (tmp_path / "trace").exists()


def test_timms_own_weights(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Asked for by name; refused where classes or normalisation differ, or without a network."""
    asked: list[dict[str, Any]] = []
    real, classes = timm.create_model, 10

    def create(name: str, pretrained: bool, **kwargs: Any) -> torch.nn.Module:
        asked.append({"name": name, "pretrained": pretrained})
        return real(name, num_classes=classes, **kwargs)

    monkeypatch.setattr(timm, "create_model", create)
    how = Distillation(NAME, "pretrained")
    teacher = Teacher(how, 10, 3, (32, 32))
    assert asked == [{"name": NAME, "pretrained": True}]
    mean, std = (teacher.network.pretrained_cfg[key] for key in ("mean", "std"))
    teacher.check_normalization(mean, std)
    with pytest.raises(ValueError, match=r"set data.init_args.mean to \(0.5, 0.5, 0.5\)"):
        teacher.check_normalization((0.1, 0.1, 0.1), std)
    with pytest.raises(ValueError, match="are not those of teacher"):
        teacher.check_normalization(mean, (0.1, 0.1, 0.1))
    with pytest.raises(ValueError, match=r"knows 10 classes, but model.num_classes is 7"):
        Teacher(how, 7, 3, (32, 32))

    def offline(*_: Any, **__: Any) -> None:
        raise ConnectionError("no route")

    monkeypatch.setattr(timm, "create_model", offline)
    with pytest.raises(ValueError, match=r"could not be had \(ConnectionError: no route\)"):
        Teacher(how, 10, 3, (32, 32))


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ({"alpha": 0.0}, "alpha is 0.0; expected between 0 and 1"),
        ({"alpha": 1.0}, "alpha is 1.0; expected between 0 and 1"),
        ({"kind": "soft", "tau": 0.0}, "tau is 0.0; expected more than 0"),
        ({"tau": 2.0}, "hard distillation has no temperature"),
    ],
)
def test_wrong_options(arguments: dict[str, Any], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        Distillation(**arguments)


def test_distillation_needs_a_token() -> None:
    with pytest.raises(ValueError, match=r"this ViT has none; use .*ViT with distillation_token"):
        small.method(distillation=Distillation(NAME))
