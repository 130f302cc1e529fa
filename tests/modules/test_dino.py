"""DINO against its published head, schedules and loop; its clock, teacher and checkpoints."""

import math
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch import Callback
from safetensors.torch import load_file
from torch import Tensor

from callbacks.checkpoint_files import read_checkpoint
from callbacks.pictures import Pictures
from modules.dino_network import Head
from modules.schedules import dino_cosine, warmup_cosine
from tests import small, views
from tests.runs import differences

GOLDEN = Path(__file__).parents[1] / "golden"


def test_the_head_is_the_published_one() -> None:
    golden = load_file(GOLDEN / "dino_head.safetensors")
    weights = {n.removeprefix("weights."): t for n, t in golden.items() if n.startswith("weights.")}
    head = Head(48, 64, 32, 96, norm_last=False)
    head.load_state_dict(weights, strict=True)  # the older names of weight normalisation
    out = F.linear(head(golden["in"]), head.prototypes)
    torch.testing.assert_close(out, golden["out"], atol=1e-5, rtol=1e-5)
    with torch.device("meta"):
        count = {n: p.numel() for n, p in Head(384, 2048, 256, 65_536, True).named_parameters()}
    last = {n: count.pop(n) for n in list(count) if n.startswith("last_layer")}
    assert (sum(count.values()), sorted(last.values())) == (5_509_376, [65_536, 16_777_216])


@pytest.mark.parametrize("norm_last", [True, False])
def test_prototypes_start_at_length_one_and_stay_where_told(norm_last: bool) -> None:
    head = Head(8, 6, 4, 10, norm_last)
    torch.testing.assert_close(head.prototypes.norm(dim=1), torch.ones(10))
    torch.testing.assert_close(head(torch.randn(3, 8)).norm(dim=1), torch.ones(3))
    trainable = {n for n, p in head.last_layer.named_parameters() if p.requires_grad}
    assert len(trainable) == (1 if norm_last else 2)
    with torch.autocast("cpu", torch.bfloat16):
        assert head(torch.randn(3, 8)).dtype == head.prototypes.dtype == torch.float32


def test_schedules_are_the_published_ones() -> None:
    golden = {n: t.tolist() for n, t in load_file(GOLDEN / "dino_schedules.safetensors").items()}
    steps = range(140)
    rates = [dino_cosine(s, 140, 21, 0.0005 * 4, end=1e-6) for s in steps]
    assert rates == pytest.approx(golden["lr"], rel=1e-5, abs=1e-12)
    decays = [warmup_cosine(s, 140, 0, 0.04, end=0.4) for s in steps]
    assert decays == pytest.approx(golden["weight_decay"], rel=1e-5)
    momenta = [warmup_cosine(s, 140, 0, 0.996, end=1.0) for s in steps]
    assert momenta == pytest.approx(golden["teacher_momentum"], rel=1e-6)


class Losses(Callback):
    """The loss and the images of every micro-batch."""

    def __init__(self) -> None:
        self.losses: list[float] = []
        self.batches: list[Any] = []

    def on_train_batch_end(
        self, trainer: Any, module: Any, outputs: Any, batch: Any, _: int
    ) -> None:
        self.losses.append(float(module.trainer.callback_metrics["train/loss"]))
        self.batches.append(batch)


def published_loop(module: Any, batches: list[Any], epoch: int, epochs: int) -> list[float]:
    """The loop of the published code on given views, with nothing of ours but the networks."""
    student, teacher = module.student.train(), module.teacher
    warmup, total = epoch, epoch * epochs
    down = np.arange(total - warmup)
    rates = 1e-6 + 0.5 * (1e-3 - 1e-6) * (1 + np.cos(np.pi * down / len(down)))
    rates = np.concatenate((np.linspace(0, 1e-3, warmup), rates))
    every = np.arange(total)
    decays = 0.4 + 0.5 * (0.04 - 0.4) * (1 + np.cos(np.pi * every / total))
    momenta = 1 + 0.5 * (0.996 - 1) * (1 + np.cos(np.pi * every / total))
    temperatures = np.concatenate((np.linspace(0.04, 0.07, 3), np.ones(epochs) * 0.07))
    named = [(n, p) for n, p in student.named_parameters() if p.requires_grad]
    groups = [
        {"params": [p for n, p in named if p.ndim > 1 and not n.endswith(".bias")]},
        {"params": [p for n, p in named if p.ndim == 1 or n.endswith(".bias")], "weight_decay": 0},
    ]
    optimizer, center, losses = torch.optim.AdamW(groups), torch.zeros(1, 48), []

    def logits(network: Any, crops: Any) -> Tensor:
        rows = [network.backbone(crop.flatten(0, 1)).pooled for crop in crops]
        return network.head.last_layer(network.head(torch.cat(rows)))

    for step, batch in enumerate(batches):
        for group in optimizer.param_groups:
            group["lr"] = rates[step]
        optimizer.param_groups[0]["weight_decay"] = decays[step]
        with torch.no_grad():
            t = logits(teacher, batch.crops[:1])
        s = (logits(student, batch.crops) / 0.1).chunk(4)
        q = ((t - center) / temperatures[step // epoch]).softmax(-1).chunk(2)
        pairs = [(i, v) for i in range(2) for v in range(4) if i != v]
        terms = [(-q[i] * s[v].log_softmax(-1)).sum(-1).mean() for i, v in pairs]
        loss = torch.stack(terms).sum() / len(terms)
        center = 0.9 * center + 0.1 * t.mean(0, keepdim=True)
        optimizer.zero_grad()
        loss.backward()
        for name, parameter in named:
            assert parameter.grad is not None
            coefficient = 3.0 / (parameter.grad.norm() + 1e-6)
            if coefficient < 1:
                parameter.grad.mul_(coefficient)
            if step < epoch and "last_layer" in name:
                parameter.grad = None
        optimizer.step()
        with torch.no_grad():
            for ours, theirs in zip(student.parameters(), teacher.parameters(), strict=True):
                theirs.mul_(momenta[step]).add_((1 - momenta[step]) * ours)
        losses.append(loss.item())
    module.center.center.copy_(center)
    return losses


def test_twenty_steps_follow_the_published_loop(tmp_path: Path) -> None:
    def start() -> Any:
        return views.method(backbone={}, norm_last_layer=False)

    module, again, record = start(), start(), Losses()
    views.trainer(tmp_path, record, max_epochs=4).fit(module, views.data())
    expected = published_loop(again, record.batches, 5, 4)
    assert len(expected) == 20
    assert len({round(loss, 3) for loss in expected}) > 15
    assert record.losses == pytest.approx(expected, abs=1e-4)
    for name, value in again.state_dict().items():
        torch.testing.assert_close(
            module.state_dict()[name], value, atol=2e-4, rtol=1e-3, msg=lambda m, n=name: f"{n} {m}"
        )


@pytest.mark.parametrize("parts", [2, 4])
def test_accumulated_micro_batches_equal_one_batch(tmp_path: Path, parts: int) -> None:
    def trained(batch: int, accumulate: int) -> tuple[dict[str, Tensor], list[float]]:
        # Adam would blow up rounding where a gradient is nearly zero.
        sgd = views.optimization(name="sgd", base_lr=0.05)
        module, record = views.method(backbone={}, optimizer=sgd), Losses()
        views.trainer(
            *(tmp_path, record),
            limit_train_batches=3 * accumulate,
            accumulate_grad_batches=accumulate,
        ).fit(module, views.data(batch_size=batch))
        means = np.reshape(record.losses, (-1, accumulate)).mean(1)
        return module.state_dict(), means.tolist()

    (whole, losses), (cut, means) = trained(16, 1), trained(16 // parts, parts)
    assert means == pytest.approx(losses, abs=1e-5)
    for name, value in whole.items():
        torch.testing.assert_close(cut[name], value, atol=2e-5, rtol=1e-4, msg=name)


def test_the_teacher_is_a_copy_of_its_own_always_in_eval_mode(tmp_path: Path) -> None:
    class Watch(Callback):
        def on_train_batch_start(self, trainer: Any, module: Any, *_: Any) -> None:
            assert module.student.training
            assert not any(part.training for part in module.teacher.modules())
            if trainer.global_step == 0:
                pair = module.student.state_dict(), module.teacher.state_dict()
                assert differences(*pair) == []

    module = views.method()
    views.trainer(tmp_path, Watch(), max_steps=3).fit(module, views.data())
    pairs = zip(module.student.parameters(), module.teacher.parameters(), strict=True)
    for ours, theirs in pairs:
        assert ours.data_ptr() != theirs.data_ptr()
        assert theirs.grad is None
        assert not theirs.requires_grad
    module.train()
    batch = torch.randn(3, 1, 16, 16)
    assert torch.equal(module.embed(batch), module.embed(batch))  # no stochastic depth
    assert not torch.equal(module.embed(batch, "student"), module.embed(batch, "student"))
    with pytest.raises(ValueError, match="no network 'averaged'; there is teacher, student"):
        module.embed(batch, "averaged")


def test_the_last_layer_rests_in_the_first_epoch(tmp_path: Path) -> None:
    seen: list[tuple[Tensor, bool]] = []

    class Watch(Callback):
        def on_train_batch_end(self, trainer: Any, module: Any, *_: Any) -> None:
            (direction,) = (
                p for p in module.student.head.last_layer.parameters() if p.requires_grad
            )
            seen.append((direction.detach().clone(), direction in trainer.optimizers[0].state))

    module = views.method(optimizer=views.optimization(warmup_epochs=0.0))
    views.trainer(tmp_path, Watch(), max_epochs=2, limit_train_batches=3).fit(module, views.data())
    values, states = zip(*seen, strict=True)
    assert torch.equal(values[0], values[2])  # neither decay nor moments
    assert not any(states[:3])
    assert all(states[3:])
    assert not torch.equal(values[2], values[3])
    free = views.method(optimizer=views.optimization(warmup_epochs=0.0), freeze_last_layer=0)
    views.trainer(tmp_path, Watch(), max_steps=1).fit(free, views.data())
    assert not torch.equal(seen[-1][0], values[0])


@pytest.mark.parametrize("accumulate", [1, 2])
def test_resume_from_every_checkpoint_ends_the_same(tmp_path: Path, accumulate: int) -> None:
    copies: list[Path] = []

    class Keep(small.AtomicCheckpointIO):
        def save_checkpoint(self, checkpoint: Any, path: Any, storage_options: Any = None) -> None:
            super().save_checkpoint(checkpoint, path)
            copies.append(tmp_path / f"{len(copies)}.ckpt")
            shutil.copy(path, copies[-1])

    arguments = {
        "accumulate_grad_batches": accumulate,
        "limit_train_batches": 2 * accumulate,
        "limit_val_batches": 0,
    }
    trainer = views.trainer(tmp_path, **arguments)
    trainer.strategy.checkpoint_io = Keep()
    whole = views.method()
    trainer.fit(whole, views.data())
    assert trainer.global_step == 6
    assert len(copies) == 6 + 3
    assert {"teacher.backbone.cls_token", "center.center"} < set(
        read_checkpoint(copies[0])["state_dict"]
    )
    for checkpoint in copies if accumulate == 1 else copies[1::3]:
        resumed, again = views.method(), views.trainer(tmp_path, **arguments)
        torch.manual_seed(99)
        again.fit(resumed, views.data(), ckpt_path=str(checkpoint), weights_only=True)
        assert again.global_step == 6
        assert differences(whole.state_dict(), resumed.state_dict()) == [], checkpoint.name


def test_every_option_changes_the_training(tmp_path: Path) -> None:
    results: list[Tensor] = []
    for change in (
        {},
        {"num_prototypes": 50},
        {"hidden_dim": 20},
        {"bottleneck_dim": 10},
        {"norm_last_layer": False},
        {"freeze_last_layer": 0},
        {"student_temperature": 0.2},
        {"teacher_temperature": 0.06},
        {"warmup_teacher_temperature": 0.05},
        {"warmup_teacher_epochs": 2},
        {"teacher_momentum": 0.9},
        {"centering": "sinkhorn_knopp"},
        {"center_momentum": 0.5},
        {"koleo": 0.1},
        {"backbone": {"drop_path": 0.2, "num_registers": 2}},
        {"optimizer": views.optimization(weight_decay_end=None)},
        {"optimizer": views.optimization(warmup_epochs=2.0)},
        {"optimizer": views.optimization(warmup_epochs=2.0, schedule="cosine")},
        {"optimizer": views.optimization(reference_batch=32)},
        {"optimizer": views.optimization(reference_batch=32, scaling="sqrt")},
    ):
        module = views.method(**change)
        views.trainer(tmp_path, max_epochs=3, limit_train_batches=1, limit_val_batches=0).fit(
            module, views.data()
        )
        results.append(module.teacher.backbone.patch_embed.proj.weight.detach().clone())
        assert all(torch.isfinite(p).all() for p in module.parameters())
    for i, one in enumerate(results):
        assert not any(torch.equal(one, other) for other in results[:i]), i


def test_half_precision_trains_and_keeps_the_teacher_in_float32(tmp_path: Path) -> None:
    module = views.method()
    trainer = views.trainer(tmp_path, max_steps=3, precision="bf16-mixed", limit_val_batches=0)
    trainer.fit(module, views.data())
    assert {p.dtype for p in module.parameters()} == {torch.float32}
    assert math.isfinite(trainer.callback_metrics["train/loss"])
    with pytest.raises(ValueError, match="precision is 'bf16-true'; expected 32-true, bf16-mixed"):
        views.trainer(tmp_path, precision="bf16-true").fit(views.method(), views.data())


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ({"num_prototypes": 1}, "num_prototypes is 1; expected at least 2"),
        ({"koleo": -0.1}, r"koleo is -0\.1; expected at least 0"),
        ({"teacher_momentum": 1.5}, r"teacher_momentum is 1\.5; expected within \[0, 1\]"),
        ({"student_temperature": 0.0}, r"student_temperature is 0\.0; expected more than 0"),
        ({"warmup_teacher_epochs": -1}, "warmup_teacher_epochs is -1; expected at least 0"),
        (
            {"centering": "sinkhorn_knopp", "center_momentum": 0.5},
            "centering sinkhorn_knopp has no center; remove it",
        ),
        ({"warmup_teacher_epochs": 0}, "a warm-up needs both, or neither"),
        ({"weights_part": "teacher"}, "are about weights, which is not set"),
        ({"warmup_teacher_temperature": None}, "a warm-up needs both, or neither"),
    ],
)
def test_values_out_of_range_are_refused(arguments: dict[str, Any], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        views.method(**arguments)


def test_one_view_an_image_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"to\s+datamodules\.MultiCropDataModule"):
        views.trainer(tmp_path).fit(views.method(), small.data())


def test_layer_decay_knows_the_layers_of_both_parts() -> None:
    student = views.method().student
    layers = {name: student.layer_of(name) for name, _ in student.named_parameters()}
    assert layers["backbone.patch_embed.proj.weight"] == 0
    assert layers["backbone.blocks.1.norm1.weight"] == 2
    assert layers["head.mlp.0.weight"] == student.num_layers + 1


def test_it_draws_its_teacher(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    drawn: list[tuple[Any, ...]] = []

    def pictures_of(*given: Any) -> dict[str, Tensor]:
        drawn.append(given)
        return {"some": torch.zeros(3, 2, 2)}

    monkeypatch.setattr("modules.dino.pictures_of", pictures_of)
    module, data = views.method(), views.data()
    views.trainer(tmp_path, Pictures(num_images=3), max_steps=2).fit(module, data)
    ((backbone, images, mean, std),) = drawn
    assert backbone is module.teacher.backbone
    assert images.shape == (3, 1, 16, 16)
    assert (mean, std) == (data.mean, data.std)
