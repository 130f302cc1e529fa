"""MoCo v3: its loss against loops, its loop against the published order, its frozen patches."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch import Callback, seed_everything
from torch import Tensor, nn

from callbacks.pictures import Pictures
from datamodules.batch import ImageBatch, MultiCropBatch
from modules import MoCo
from modules.moco import contrast, mlp
from modules.optim import Optimization
from modules.weights import load_backbone
from tests import small, views
from tests.runs import differences


class TwoViews(views.Views):
    def on_after_batch_transfer(self, batch: ImageBatch, dataloader_idx: int) -> Any:
        made = super().on_after_batch_transfer(batch, dataloader_idx)
        return made._replace(crops=made.crops[:1]) if isinstance(made, MultiCropBatch) else made


def data() -> TwoViews:
    colours = {"mean": (0.5,), "std": (0.5,), "channels": 1}
    return TwoViews("digits", image_size=16, batch_size=8, num_workers=0, **colours)


def method(**changes: Any) -> MoCo:
    seed_everything(7, verbose=False)
    network = views.backbone(init="moco", **changes.pop("backbone", {}))
    how = Optimization(
        base_lr=1e-3, reference_batch=None, weight_decay=0.1, warmup_epochs=0.5, min_lr=0.0
    )
    given = {"optimizer": how, "hidden_dim": 24, "projection_dim": 12}
    return MoCo(network, **given | changes)


def trained(tmp_path: Path, *callbacks: Any, steps: int = 3, **changes: Any) -> MoCo:
    module = method(**changes)
    limits = {"max_epochs": 2, "limit_train_batches": steps, "limit_val_batches": 0}
    views.trainer(tmp_path, *callbacks, **limits).fit(module, data())
    return module


def looped(queries: Tensor, keys: Tensor, temperature: float, first: int) -> Tensor:
    """The loss image by image and key by key."""
    losses = []
    for i in range(queries.shape[1]):
        total = queries.new_zeros(())
        for view, other in ((0, 1), (1, 0)):
            q = queries[view, i] / queries[view, i].norm()
            scores = [q @ (k / k.norm()) / temperature for k in keys[other]]
            total = total - torch.stack(scores).log_softmax(0)[first + i]
        losses.append(2 * temperature * total)
    return torch.stack(losses)


def drawn() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = ((2, 6, 5), (2, 6, 5))
    queries, keys = (
        torch.randn(s, generator=generator, dtype=torch.float64).requires_grad_() for s in shapes
    )
    return queries, keys


def test_value_and_gradients_equal_loops() -> None:
    queries, keys = drawn()
    ours, theirs = contrast(queries, keys, 0.2), looped(queries, keys.detach(), 0.2, 0)
    torch.testing.assert_close(ours, theirs, atol=1e-12, rtol=1e-12)
    gradients = [torch.autograd.grad(x.sin().sum(), queries)[0] for x in (ours, theirs)]
    torch.testing.assert_close(*gradients, atol=1e-12, rtol=1e-10)
    assert not torch.equal(contrast(queries, keys, 0.5), ours)
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(contrast(queries, keys, 0.2), ours)


def test_both_views_count_alike_and_keys_have_no_gradient() -> None:
    queries, keys = drawn()
    loss = contrast(queries, keys, 0.2)
    torch.testing.assert_close(contrast(queries.flip(0), keys.flip(0), 0.2), loss)
    loss.sum().backward()
    assert queries.grad is not None
    assert keys.grad is None


def test_two_devices_have_the_losses_of_one() -> None:
    queries, keys = drawn()
    whole = contrast(queries, keys, 0.2)
    (expected,) = torch.autograd.grad(whole.mean(), queries, retain_graph=True)
    parts = keys.chunk(2, dim=1)

    class Strategy:
        def all_gather(self, mine: Tensor) -> Tensor:
            assert torch.equal(mine, parts[0])
            return torch.stack(parts)

    module, trainer = method(), SimpleNamespace(strategy=Strategy())
    module._trainer = trainer  # type: ignore[assignment]
    gathered = module.of_all(parts[0])
    assert torch.equal(gathered, keys)
    for rank, mine in enumerate(queries.chunk(2, dim=1)):
        losses = contrast(mine, gathered, 0.2, first=3 * rank)
        torch.testing.assert_close(losses, whole[3 * rank : 3 * rank + 3])
        (gradient,) = torch.autograd.grad(losses.mean() / 2, mine, retain_graph=True)
        torch.testing.assert_close(gradient, expected[:, 3 * rank : 3 * rank + 3])


def test_the_layers_are_the_published_ones() -> None:
    with torch.device("meta"):
        projector, predictor = mlp((384, 4096, 4096, 256)), mlp((256, 4096, 256))
    kinds = [type(layer).__name__ for layer in projector]
    assert kinds == ["Linear", "BatchNorm1d", "ReLU"] * 2 + ["Linear", "BatchNorm1d"]
    assert len(predictor) == 5
    for network in (projector, predictor):
        linears = [layer for layer in network if isinstance(layer, nn.Linear)]
        norms = [layer for layer in network if isinstance(layer, nn.BatchNorm1d)]
        assert all(layer.bias is None for layer in linears)
        assert [norm.affine for norm in norms] == [True] * (len(norms) - 1) + [False]


class Record(Callback):
    def __init__(self) -> None:
        self.losses: list[float] = []
        self.batches: list[Any] = []

    def on_train_batch_end(self, trainer: Any, _: Any, outputs: Any, batch: Any, __: int) -> None:
        self.losses.append(float(trainer.callback_metrics["train/loss"]))
        self.batches.append(batch)


def published_loop(module: MoCo, batches: list[Any], epoch: int) -> list[float]:
    """The order of the published code: the teacher moves before it is asked for keys."""
    total, losses = len(batches), []
    student, teacher = module.student.train(), module.teacher
    assert student.predictor is not None
    named = [(n, p) for n, p in student.named_parameters() if p.requires_grad]
    groups = [
        {"params": [p for _, p in named if p.ndim > 1], "weight_decay": 0.1},
        {"params": [p for _, p in named if p.ndim <= 1], "weight_decay": 0.0},
    ]
    optimizer, warmup = torch.optim.SGD(groups, lr=0.0, momentum=0.9), round(0.5 * epoch)
    for step, batch in enumerate(batches):
        rate = 0.005 * step / warmup if step < warmup else 0.0
        if step >= warmup:
            rate = 0.005 * 0.5 * (1 + np.cos(np.pi * (step - warmup) / (total - warmup)))
        for group in optimizer.param_groups:
            group["lr"] = rate
        momentum = 1 - 0.5 * (1 + np.cos(np.pi * step / total)) * (1 - 0.5)
        with torch.no_grad():
            for name, parameter in teacher.named_parameters():
                ours = student.get_parameter(name)
                parameter.mul_(momentum).add_((1 - momentum) * ours)
        q, k = [], []
        for view in batch.crops[0]:
            q.append(student.predictor(student.projector(student.backbone(view).pooled)))
            with torch.no_grad():
                k.append(teacher.projector(teacher.backbone(view).pooled))
        loss = torch.zeros(())
        for a, b in ((0, 1), (1, 0)):
            logits = F.normalize(q[a], dim=1) @ F.normalize(k[b], dim=1).T / 0.2
            loss = loss + F.cross_entropy(logits, torch.arange(8)) * 0.4
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def test_its_steps_follow_the_published_loop(tmp_path: Path) -> None:
    # Attention and batch norms leave some biases a gradient of rounding, which Adam would blow up.
    how = Optimization(
        "sgd", 0.005, reference_batch=None, weight_decay=0.1, warmup_epochs=0.5, min_lr=0.0
    )
    given: dict[str, Any] = {"optimizer": how, "teacher_momentum": 0.5}
    record, again = Record(), method(**given)
    module = trained(tmp_path, record, steps=4, **given)
    expected = published_loop(again, record.batches, 4)
    assert record.losses == pytest.approx(expected, abs=2e-5)
    assert len({round(loss, 3) for loss in expected}) == 8
    for name, value in again.named_parameters():  # the teacher's last move is by nothing
        ours = module.get_parameter(name)
        torch.testing.assert_close(ours, value, atol=1e-5, rtol=1e-4, msg=name)


def test_the_projection_of_patches_rests_and_everything_else_learns(tmp_path: Path) -> None:
    start, module = method(), trained(tmp_path)
    for name, parameter in module.student.named_parameters():
        is_frozen = name.startswith("backbone.patch_embed.")
        assert parameter.requires_grad != is_frozen, name
        assert (parameter.grad is None) == is_frozen, name
        assert torch.equal(parameter, start.student.get_parameter(name)) == is_frozen, name
    free = trained(tmp_path, freeze_patches=False)
    name = "backbone.patch_embed.proj.weight"
    assert not torch.equal(free.student.get_parameter(name), start.student.get_parameter(name))


def test_the_teacher_is_an_average_without_a_predictor(tmp_path: Path) -> None:
    class Watch(Callback):
        def on_train_batch_start(self, trainer: Any, module: Any, *_: Any) -> None:
            assert not any(part.training for part in module.teacher.backbone.modules())
            norms = module.teacher.projector[1::3]
            assert [norm.training for norm in norms] == [True] * 3

    module = trained(tmp_path, Watch(), backbone={"drop_path": 0.2})
    assert module.teacher.predictor is None
    for name, parameter in module.teacher.named_parameters():
        assert parameter.grad is None
        assert parameter.data_ptr() != module.student.get_parameter(name).data_ptr()
    images = torch.randn(3, 1, 16, 16)
    module.train()
    assert torch.equal(module.embed(images), module.teacher.backbone(images).pooled)
    assert torch.equal(module.embed(images), module.embed(images, "teacher"))
    assert not torch.equal(module.embed(images, "student"), module.embed(images))


def test_every_option_changes_the_training(tmp_path: Path) -> None:
    results: list[Tensor] = []
    for change in (
        {},
        {"hidden_dim": 20},
        {"projection_dim": 10},
        {"temperature": 0.5},
        {"teacher_momentum": 0.5},
        {"freeze_patches": False},
        {"backbone": {"drop_path": 0.3}},
    ):
        module = trained(tmp_path, **change)
        results.append(module.student.backbone.blocks[0].mlp.fc1.weight.detach().clone())
        assert all(torch.isfinite(p).all() for p in module.parameters())
    for i, one in enumerate(results):
        assert not any(torch.equal(one, other) for other in results[:i]), i


def test_a_resumed_run_ends_the_same(tmp_path: Path) -> None:
    copies: list[Path] = []

    class Keep(small.AtomicCheckpointIO):
        def save_checkpoint(self, checkpoint: Any, path: Any, storage_options: Any = None) -> None:
            copies.append(tmp_path / f"{len(copies)}.ckpt")
            super().save_checkpoint(checkpoint, copies[-1])
            super().save_checkpoint(checkpoint, path)

    limits = {"max_epochs": 2, "limit_train_batches": 2, "limit_val_batches": 0}
    trainer, whole = views.trainer(tmp_path, **limits), method()
    trainer.strategy.checkpoint_io = Keep()
    trainer.fit(whole, data())
    for checkpoint in copies[:2]:
        again, given = method(), {"ckpt_path": str(checkpoint), "weights_only": True}
        torch.manual_seed(3)
        views.trainer(tmp_path, **limits).fit(again, data(), **given)
        assert differences(whole.state_dict(), again.state_dict()) == []


def test_data_of_other_views_is_refused(tmp_path: Path) -> None:
    for other in (small.data(), views.data()):
        with pytest.raises(ValueError, match=r"MultiCropDataModule and data.init_args.num_local"):
            views.trainer(tmp_path, max_steps=1).fit(method(), other)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"hidden_dim": 0}, "hidden_dim is 0; expected at least 1"),
        ({"temperature": 0.0}, r"temperature is 0\.0; expected more than 0"),
        ({"teacher_momentum": 1.5}, r"teacher_momentum is 1\.5; expected within \[0, 1\]"),
    ],
)
def test_values_out_of_range_are_refused(change: dict[str, Any], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        method(**change)


def test_the_backbone_of_its_checkpoint_loads_into_others(tmp_path: Path) -> None:
    module = trained(tmp_path, steps=1)
    checkpoint, other = next(tmp_path.rglob("last.ckpt")), views.backbone()
    load_backbone(other, str(checkpoint), "teacher")
    taught = dict(module.teacher.backbone.state_dict())
    assert differences(dict(other.state_dict()), taught) == []


def test_it_draws_its_teacher(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    drawn: list[Any] = []
    monkeypatch.setattr("modules.moco.pictures_of", lambda *given: drawn.append(given) or {})
    module = trained(tmp_path, Pictures(), steps=1)
    assert {id(given[0]) for given in drawn} == {id(module.teacher.backbone)}
