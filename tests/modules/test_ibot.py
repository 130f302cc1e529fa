"""Masked patches: what is hidden, the loss against loops, and DINO trained with it."""

import math
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Barrier
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch import Callback
from torch import Tensor

from datamodules.augment import view_keys
from datamodules.sampling import fold
from modules.backbones import Masked
from modules.dino_loss import Center, same_loss, sinkhorn_knopp
from modules.ibot import Hidden, MaskedPatches, PatchLoss, hide, sinkhorn_targets
from modules.weights import load_backbone
from tests import small, views
from tests.modules.test_dino_loss import kept_elements
from tests.runs import differences
from tests.typecheck import unchecked

GRID = (14, 14)


def keys(count: int, seed: int = 0) -> Tensor:
    return torch.tensor([fold(seed, 0, i) for i in range(count)])


@pytest.mark.parametrize("shape", ["block", "random"])
def test_as_many_are_hidden_as_published(shape: Any) -> None:
    hidden = hide(MaskedPatches(shape=shape), keys(2000), GRID)
    counts = hidden.is_masked.sum(1)
    assert len(counts) == 4000
    assert (counts > 0).float().mean().item() == pytest.approx(0.5, abs=0.03)
    shares = counts[counts > 0] / 196
    assert 0.09 < shares.min() <= 0.11
    assert 0.49 < shares.max() <= 0.5
    assert shares.mean().item() == pytest.approx(0.3, abs=0.01)
    assert shares.std().item() == pytest.approx(0.4 / math.sqrt(12), abs=0.01)
    assert hidden.places.shape == (4000, 98)
    # No patch is spared, though rectangles within the image hold its corners less often.
    assert hidden.is_masked.float().mean(0).min() > 0.01


def test_the_places_are_those_of_the_mask() -> None:
    hidden = hide(MaskedPatches(), keys(50), GRID)
    for mask, places, used in zip(*hidden, strict=True):
        assert sorted(places[used].tolist()) == mask.nonzero()[:, 0].tolist()
        assert len(set(places.tolist())) == len(places)
    patches = torch.randn(100, 196, 3)
    torch.testing.assert_close(hidden.of(patches)[7, 5], patches[7, hidden.places[7, 5]])


def test_what_is_hidden_is_a_function_of_the_key_alone() -> None:
    how, every = MaskedPatches(probability=1.0), keys(9)
    whole = hide(how, every, GRID).is_masked.view(2, 9, -1)
    part = hide(how, every[4:6], GRID).is_masked.view(2, 2, -1)
    assert torch.equal(part, whole[:, 4:6])
    rows = {tuple(row) for row in whole.flatten(0, 1).int().tolist()}
    assert len(rows) == 18  # views of an image differ
    assert not torch.equal(hide(how, keys(9, seed=1), GRID).is_masked, whole.flatten(0, 1))
    assert len(view_keys(every, 2).unique()) == 18


def neighbours(is_masked: Tensor) -> float:
    """The share of hidden patches' right neighbours that are hidden."""
    grid = is_masked.view(-1, *GRID)
    return (grid[:, :, 1:] & grid[:, :, :-1]).sum().item() / grid[:, :, :-1].sum().item()


def test_blocks_are_rectangles_and_random_patches_are_not() -> None:
    near = [
        neighbours(hide(MaskedPatches(shape=shape), keys(500), GRID).is_masked)
        for shape in ("random", "block")
    ]
    assert near[0] < 0.4
    assert near[1] > 0.65
    hidden = hide(MaskedPatches(probability=1.0, ratio=(0.3, 0.3)), keys(200), GRID).is_masked
    grid = hidden.view(-1, 1, *GRID).float()
    inside = F.avg_pool2d(grid, 2, stride=1) == 1.0  # corners of squares of four patches
    of_square = F.max_pool2d(F.pad(inside.float(), (1, 1, 1, 1)), 2, stride=1) == 1.0
    single = (grid.bool() & ~of_square).sum() / grid.sum()
    assert single < 0.2
    assert torch.equal(hidden.sum(1), torch.full((400,), 58))


def drawn(b: int = 6, room: int = 5, k: int = 30) -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(0)
    shapes = ((b, room, 8), (k, 8), (b, room, 8), (k, 8))
    made = [torch.randn(s, generator=generator, dtype=torch.float64) for s in shapes]
    is_used = torch.arange(room) < torch.tensor([0, 5, 1, 3, 0, 2])[:, None]
    return made[0].requires_grad_(), made[1].requires_grad_(), made[2], made[3], is_used


def looped(
    student: Tensor, weight: Tensor, q: Tensor, is_used: Tensor, temperature: float
) -> Tensor:
    """The loss crop by crop and patch by patch."""
    losses = []
    for i in range(len(student)):
        terms = []
        for j in range(student.shape[1]):
            if is_used[i, j]:
                log_p = (weight @ student[i, j] / temperature).log_softmax(0)
                terms.append(-(q[i, j] * log_p).sum())
        zero = student.new_zeros(())
        losses.append(torch.stack(terms).mean() if terms else zero)
    return torch.stack(losses)


@pytest.mark.parametrize("centering", ["center", "sinkhorn_knopp"])
def test_value_and_gradients_equal_loops(centering: str) -> None:
    student, weight, taught, prototypes, is_used = drawn()
    hidden = Hidden(torch.zeros(6, 9, dtype=torch.bool), torch.zeros(6, 5).long(), is_used)
    logits, center = taught @ prototypes.T, None
    q = torch.zeros_like(logits)
    if centering == "center":
        center = Center(30, 0.9).double()
        center.center.normal_()
        q = ((logits - center.center) / 0.5).softmax(-1)
    else:  # among the hidden patches and no others
        q[is_used] = sinkhorn_knopp(logits[is_used], 0.5)
    loss = PatchLoss(center)
    ours = loss((student, weight), (taught, prototypes), hidden, (0.3, 0.5), lambda x, op: x)
    theirs = looped(student, weight, q, is_used, 0.3)
    torch.testing.assert_close(ours, theirs, atol=1e-10, rtol=1e-10)
    assert ours[0] == ours[4] == 0.0
    gradients = [torch.autograd.grad(x.sin().sum(), (student, weight)) for x in (ours, theirs)]
    for a, b in zip(*gradients, strict=True):
        torch.testing.assert_close(a, b, atol=1e-9, rtol=1e-9)
    assert not gradients[0][0][~is_used].any()
    if center is not None:
        expected = 0.9 * center.center + 0.1 * logits[is_used].mean(0)
        center.update(prototypes)
        torch.testing.assert_close(center.center, expected)


def test_a_step_in_which_nothing_is_hidden_changes_no_center_and_gives_no_nan() -> None:
    student, weight, taught, prototypes, _ = drawn()
    nothing = torch.zeros(6, 5, dtype=torch.bool)
    hidden = Hidden(torch.zeros(6, 9, dtype=torch.bool), torch.zeros(6, 5).long(), nothing)
    center = Center(30, 0.9).double()
    center.center.normal_()
    before = center.center.clone()
    for each in (center, None):
        given = ((student, weight), (taught, prototypes), hidden, (0.3, 0.5), lambda x, op: x)
        losses = PatchLoss(each)(*given)
        assert not losses.any()
        (gradient,) = torch.autograd.grad(losses.sum(), student)
        assert not gradient.any()
    center.update(prototypes)
    assert torch.equal(center.center, before)


@pytest.mark.parametrize("at_once", [1, 7, 100])
def test_sinkhorn_by_pieces_is_sinkhorn(at_once: int) -> None:
    _, _, taught, prototypes, is_used = drawn()
    z, used = taught.flatten(0, 1), is_used.flatten()
    targets = sinkhorn_targets(z, used, prototypes, 0.05, at_once=at_once)
    (q,) = targets(slice(None))
    expected = sinkhorn_knopp((z @ prototypes.T)[used], 0.05)
    torch.testing.assert_close(q[used], expected, atol=1e-9, rtol=1e-7)
    torch.testing.assert_close(q.sum(-1), torch.ones_like(q[:, 0]))


def test_sinkhorn_and_center_of_two_devices_are_those_of_one() -> None:
    _, _, taught, prototypes, is_used = drawn()
    z, used = taught.flatten(0, 1), is_used.flatten()  # 15 patches each: 9 and 2 hidden
    met, sent = Barrier(2, timeout=20), [torch.empty(0), torch.empty(0)]

    def device(rank: int) -> tuple[Tensor, Tensor]:
        def reduce(value: Tensor, op: str) -> Tensor:
            sent[rank] = value
            met.wait()
            both = torch.stack(sent)
            met.wait()
            return value.copy_(both.amax(0) if op == "max" else both.sum(0))  # as all_reduce does

        mine = (z.chunk(2)[rank], used.chunk(2)[rank])
        center = Center(30, 0.9).double()
        center.add(mine[0][None], mine[1][None])
        center.update(prototypes, reduce)
        (q,) = sinkhorn_targets(*mine, prototypes, 0.05, reduce)(slice(None))
        return q, center.center

    with ThreadPoolExecutor(2) as devices:
        (first, center), (second, other) = devices.map(device, range(2))
    (expected,) = sinkhorn_targets(z, used, prototypes, 0.05)(slice(None))
    torch.testing.assert_close(torch.cat((first, second)), expected)
    assert torch.equal(center, other)
    torch.testing.assert_close(center[0], 0.1 * (z[used] @ prototypes.T).mean(0))


def test_no_logits_are_kept_for_the_gradient() -> None:
    student, weight, taught, prototypes, is_used = drawn(k=500)
    z, used = taught.flatten(0, 1), is_used.flatten()
    for targets in (
        Center(500, 0.9).double().targets(z[None], prototypes, 0.5),
        sinkhorn_targets(z, used, prototypes, 0.5, at_once=2),
    ):
        kept = kept_elements(
            lambda t=targets: same_loss(student.flatten(0, 1), weight, t, 0.3, at_once=2)
        )
        assert kept <= weight.numel()


class Watch(Callback):
    """What the networks are given, and the gradient of the token."""

    def __init__(self) -> None:
        self.given: dict[str, list[bool]] = {"student": [], "teacher": []}
        self.gradients: list[Tensor | None] = []

    def on_fit_start(self, trainer: Any, module: Any) -> None:
        for name, network in module.networks().items():

            def note(_: Any, arguments: Any, n: str = name) -> None:
                self.given[n] += [isinstance(group, Masked) for group in arguments[0]]

            network.backbone.register_forward_pre_hook(note)

    def on_before_optimizer_step(self, trainer: Any, module: Any, _: Any) -> None:
        token = module.student.mask_token.grad
        self.gradients.append(None if token is None else token.clone())


def trained(tmp_path: Path, *callbacks: Any, steps: int = 3, **changes: Any) -> Any:
    module = views.method(**changes)
    arguments = {"max_epochs": 1, "limit_train_batches": steps, "limit_val_batches": 0}
    views.trainer(tmp_path, *callbacks, **arguments).fit(module, views.data())
    return module


@pytest.mark.parametrize("own", [None, 30])
def test_the_student_alone_sees_masks_and_every_parameter_learns(
    tmp_path: Path, own: int | None
) -> None:
    watch = Watch()
    option = MaskedPatches(num_prototypes=own)
    module = trained(tmp_path, watch, masked_patches=option, freeze_last_layer=0)
    assert watch.given == {"student": [True, False] * 3, "teacher": [False] * 3}
    assert all(gradient is not None and gradient.any() for gradient in watch.gradients)
    for name, parameter in module.student.named_parameters():
        assert (parameter.grad is not None) == parameter.requires_grad, name
    assert module.student.mask_token.any()
    assert module.teacher.mask_token.any()  # an average like all others
    assert (module.student.patch_head is None) == (own is None)
    assert module.patch_loss.center.center.shape == (1, own or 48)
    assert module.patch_loss.center.center.any()
    names = {n.split(".")[0] for n in module.state_dict()}
    assert names == {"student", "teacher", "center", "patch_loss"}


def test_a_step_in_which_no_crop_is_masked_has_a_gradient_for_the_token(tmp_path: Path) -> None:
    watch = Watch()
    trained(tmp_path, watch, masked_patches=MaskedPatches(probability=1e-9), steps=1)
    assert watch.gradients[0] is not None
    assert not watch.gradients[0].any()


def test_without_it_there_is_nothing_of_it() -> None:
    plain = views.method()
    assert not any("mask" in name or "patch_" in name.split(".")[1] for name in plain.state_dict())
    with_it = views.method(masked_patches=MaskedPatches())
    mine = {n: t for n, t in with_it.state_dict().items() if n in plain.state_dict()}
    assert differences(dict(plain.state_dict()), mine) == []  # it draws no first values


def test_frozen_prototypes_rest_in_both_heads(tmp_path: Path) -> None:
    start = views.method(masked_patches=MaskedPatches(num_prototypes=30))
    module = trained(tmp_path, masked_patches=MaskedPatches(num_prototypes=30))
    for ours, theirs in zip(module.student.heads(), start.student.heads(), strict=True):
        assert torch.equal(ours.prototypes, theirs.prototypes)


def test_the_loss_of_a_step_is_that_of_loops(tmp_path: Path) -> None:
    """The whole way from a batch, in float64, with the networks and nothing else of ours."""
    module = views.method(masked_patches=MaskedPatches(), backbone={})
    module.patch_loss.center.center.normal_()
    module.student.mask_token.data.normal_()
    found: list[tuple[Any, float]] = []

    class Note(Callback):
        def on_train_batch_end(self, trainer: Any, method: Any, outputs: Any, batch: Any, _: int):
            found.append((batch, trainer.callback_metrics["train/masked_patches"].item()))

    before = {n: t.clone() for n, t in module.state_dict().items()}
    views.trainer(tmp_path, Note(), max_steps=1, limit_val_batches=0).fit(module, views.data())
    module.load_state_dict(before)
    module.double()
    ((batch, logged),) = found
    hidden = hide(MaskedPatches(), batch.keys, (4, 4))
    crops = batch.crops[0].flatten(0, 1).double()
    student, teacher = module.student, module.teacher
    seen = student.backbone(Masked(crops, hidden.is_masked, student.mask_token)).patches
    told = teacher.backbone(crops).patches
    losses = []
    for i, mask in enumerate(hidden.is_masked):
        terms = []
        for j in mask.nonzero()[:, 0].tolist():
            t = F.linear(teacher.head(told[i, j]), teacher.head.prototypes)
            s = F.linear(student.head(seen[i, j]), student.head.prototypes)
            q = ((t - module.patch_loss.center.center[0]) / 0.04).softmax(-1)
            terms.append(-(q * (s / 0.1).log_softmax(-1)).sum())
        losses.append(torch.stack(terms).mean() if terms else seen.new_zeros(()))
    assert logged == pytest.approx(torch.stack(losses).mean().item(), abs=1e-5)


def test_accumulated_micro_batches_equal_one_batch(tmp_path: Path) -> None:
    def run(batch: int, accumulate: int) -> dict[str, Tensor]:
        sgd = views.optimization(name="sgd", base_lr=0.05)
        option = MaskedPatches(num_prototypes=30)
        module = views.method(backbone={}, optimizer=sgd, masked_patches=option)
        arguments = {"max_steps": 3, "accumulate_grad_batches": accumulate, "limit_val_batches": 0}
        views.trainer(tmp_path, **arguments | {"limit_train_batches": 3 * accumulate}).fit(
            module, views.data(batch_size=batch)
        )
        return module.state_dict()

    whole, cut = run(16, 1), run(4, 4)
    for name, value in whole.items():
        torch.testing.assert_close(cut[name], value, atol=2e-5, rtol=1e-4, msg=name)


def test_a_resumed_run_ends_the_same(tmp_path: Path) -> None:
    copies: list[Path] = []

    class Keep(small.AtomicCheckpointIO):
        def save_checkpoint(self, checkpoint: Any, path: Any, storage_options: Any = None) -> None:
            super().save_checkpoint(checkpoint, path)
            copies.append(tmp_path / f"{len(copies)}.ckpt")
            shutil.copy(path, copies[-1])

    option = {"masked_patches": MaskedPatches(num_prototypes=30)}
    arguments = {"max_epochs": 2, "limit_train_batches": 2, "limit_val_batches": 0}
    trainer = views.trainer(tmp_path, **arguments)
    trainer.strategy.checkpoint_io = Keep()
    whole = views.method(**option)
    trainer.fit(whole, views.data())
    assert {"patch_loss.center.center", "teacher.mask_token"} < set(whole.state_dict())
    for checkpoint in copies[:2]:
        again = views.method(**option)
        torch.manual_seed(3)
        given = {"ckpt_path": str(checkpoint), "weights_only": True}
        views.trainer(tmp_path, **arguments).fit(again, views.data(), **given)
        assert differences(whole.state_dict(), again.state_dict()) == []


def test_every_option_changes_the_training(tmp_path: Path) -> None:
    results: list[Tensor] = []
    for option in (
        None,
        MaskedPatches(),
        MaskedPatches(weight=0.5),
        MaskedPatches(probability=1.0),
        MaskedPatches(ratio=(0.4, 0.6)),
        MaskedPatches(shape="random"),
        MaskedPatches(num_prototypes=48),
    ):
        module = trained(tmp_path, masked_patches=option)
        results.append(module.teacher.backbone.patch_embed.proj.weight.detach().clone())
    for centering in ("center", "sinkhorn_knopp"):
        both = {"masked_patches": MaskedPatches(num_prototypes=20), "centering": centering}
        results.append(trained(tmp_path, **both).teacher.backbone.patch_embed.proj.weight.detach())
    assert all(torch.isfinite(result).all() for result in results)
    for i, one in enumerate(results):
        assert not any(torch.equal(one, other) for other in results[:i]), i


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ({"weight": 0.0}, r"weight is 0\.0; expected more than 0, or masked_patches null"),
        ({"probability": 0.0}, r"probability is 0\.0; expected within \(0, 1\]"),
        ({"ratio": (0.5, 0.1)}, r"ratio is \(0\.5, 0\.1\); expected 0 <= low <= high <= 1"),
        ({"ratio": (0.0, 0.0)}, "high above 0"),
        ({"shape": "blob"}, "shape is 'blob'; expected 'block' or 'random'"),
        ({"num_prototypes": 1}, "num_prototypes is 1; expected at least 2, or null"),
    ],
)
def test_values_out_of_range_are_refused(arguments: dict[str, Any], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        unchecked(MaskedPatches, arguments)


def test_a_backbone_without_masks_is_refused() -> None:
    with pytest.raises(ValueError, match="Pixels takes no masks; set masked_patches to null"):
        views.DINO(small.Pixels(), masked_patches=MaskedPatches(), num_prototypes=8)


def test_layer_decay_has_the_token_at_the_stem() -> None:
    student = views.method(masked_patches=MaskedPatches(num_prototypes=9)).student
    assert student.layer_of("mask_token") == 0
    assert student.layer_of("patch_head.mlp.0.weight") == student.num_layers + 1


def test_the_backbone_of_its_checkpoint_loads_into_others(tmp_path: Path) -> None:
    module = trained(tmp_path, masked_patches=MaskedPatches(num_prototypes=9), steps=1)
    checkpoint, other = next(tmp_path.rglob("last.ckpt")), views.backbone()
    load_backbone(other, str(checkpoint), "teacher")
    taught = dict(module.teacher.backbone.state_dict())
    assert differences(dict(other.state_dict()), taught) == []
