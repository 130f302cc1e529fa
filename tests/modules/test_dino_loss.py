"""DINO's loss, targets, center and signs of collapse: published values, plain forms, memory."""

import math
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Barrier

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor

from modules.dino_loss import (
    Center,
    Targets,
    diagnose,
    koleo,
    sinkhorn_knopp,
    sinkhorn_targets,
    view_loss,
)

GOLDEN = Path(__file__).parents[1] / "golden"


def plain(logits: Tensor, q: Tensor, temperature: float) -> Tensor:
    """The loss as the paper has it: a mean over pairs of views."""
    log_p = F.log_softmax(logits / temperature, dim=-1)
    pairs = [(i, v) for i in range(len(q)) for v in range(len(logits)) if i != v]
    return torch.stack([-(q[i] * log_p[v]).sum(-1) for i, v in pairs]).mean(0)


def test_six_published_calls_with_gradients_and_centers() -> None:
    golden = load_file(GOLDEN / "dino_loss.safetensors")
    center, unit = Center(96, 0.9), torch.eye(96)
    for call, temperature in enumerate(golden["teacher_temp"].tolist()):
        student = golden[f"student.{call}"].view(6, 4, 96).requires_grad_()
        taught = golden[f"teacher.{call}"].view(2, 4, 96)
        loss = view_loss(student, unit, center.targets(taught, unit, temperature), 0.1).mean()
        (gradient,) = torch.autograd.grad(loss, student)
        center.add(taught)
        center.update(unit)
        torch.testing.assert_close(loss, golden[f"loss.{call}"], atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(
            gradient.flatten(0, 1), golden[f"grad.{call}"], atol=1e-6, rtol=0
        )
        torch.testing.assert_close(
            center.center, golden[f"center_after.{call}"], atol=1e-6, rtol=1e-5
        )


def test_one_image_by_hand() -> None:
    # METHODS J: three views of one image.
    taught = torch.tensor([[[1.0, 0.0, -1.0]], [[0.0, 2.0, 0.0]]])
    seen = torch.tensor([[[0.5, 0.0, -0.5]], [[0.0, 1.0, 0.0]], [[0.2, 0.1, 0.0]]])
    center, unit = Center(3, 0.9), torch.eye(3)
    center.center.copy_(torch.tensor([[0.1, 0.2, -0.1]]))
    loss = view_loss(seen, unit, center.targets(taught, unit, 0.04), 0.1)
    assert loss.item() == pytest.approx(4.205516, abs=1e-5)
    center.add(taught)
    center.update(unit)
    torch.testing.assert_close(center.center, torch.tensor([[0.14, 0.28, -0.14]]))


def drawn(views: int = 5, b: int = 7, k: int = 30) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = ((views, b, 8), (k, 8), (2, b, 8), (k, 8))
    made = [torch.randn(s, generator=generator, dtype=torch.float64) for s in shapes]
    return made[0].requires_grad_(), made[1].requires_grad_(), made[2], made[3]


@pytest.mark.parametrize("centering", ["center", "sinkhorn_knopp"])
@pytest.mark.parametrize("at_once", [1, 3, 100, None])
def test_value_and_gradients_equal_the_plain_form(at_once: int | None, centering: str) -> None:
    student, weight, taught, prototypes = drawn()
    center = Center(30, 0.9).double()
    center.center.normal_()
    targets: Targets
    if centering == "center":
        targets = center.targets(taught, prototypes, 0.5)
        q = ((taught @ prototypes.T - center.center) / 0.5).softmax(-1)
    else:
        targets = sinkhorn_targets(taught, prototypes, 0.5)
        q = sinkhorn_knopp((taught @ prototypes.T).flatten(0, 1), 0.5).view(2, 7, 30)
    ours = view_loss(student, weight, targets, 0.3, at_once)
    theirs = plain(student @ weight.T, q, 0.3)
    torch.testing.assert_close(ours, theirs, atol=1e-10, rtol=1e-10)
    gradients = [torch.autograd.grad(x.sin().sum(), (student, weight)) for x in (ours, theirs)]
    for a, b in zip(*gradients, strict=True):
        torch.testing.assert_close(a, b, atol=1e-9, rtol=1e-9)


def kept_elements(run: Callable[[], Tensor]) -> int:
    """The largest tensor that autograd keeps until backward."""
    sizes = [0]

    def note(x: Tensor) -> Tensor:
        sizes.append(x.numel())
        return x

    with torch.autograd.graph.saved_tensors_hooks(note, lambda x: x):
        run()
    return max(sizes)


def test_no_logits_but_the_last_ones_are_kept_for_the_gradient() -> None:
    student, weight, taught, prototypes = drawn(k=500)
    targets = Center(500, 0.9).double().targets(taught, prototypes, 0.5)
    q = targets(slice(None))
    assert kept_elements(lambda: plain(student @ weight.T, q, 0.3)) >= 5 * 7 * 500
    last = 5 * 1 * 500  # views, what two at a time leave of seven images, prototypes
    kept = kept_elements(lambda: view_loss(student, weight, targets, 0.3, 2))
    assert kept <= max(last, weight.numel())


def test_the_loss_is_float32_under_autocast() -> None:
    student, weight, taught, prototypes = (x.detach().float() for x in drawn())
    targets = Center(30, 0.9).targets(taught, prototypes, 0.04)
    expected = view_loss(student, weight, targets, 0.1)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(view_loss(student, weight, targets, 0.1), expected)
        assert targets(slice(None)).dtype == torch.float32


def test_the_center_waits_for_the_end_of_the_step() -> None:
    _, _, taught, prototypes = (x.detach().float() for x in drawn())
    whole, parts = Center(30, 0.9), Center(30, 0.9)
    whole.add(taught)
    for rows in (slice(0, 2), slice(2, 7)):
        parts.add(taught[:, rows])
        assert not parts.center.any()
    for center in (whole, parts):
        center.update(prototypes)
    torch.testing.assert_close(parts.center, whole.center)
    mean = (taught @ prototypes.T).mean((0, 1))
    torch.testing.assert_close(whole.center[0], 0.1 * mean)
    assert list(whole.state_dict()) == ["center"]


def test_sinkhorn_knopp_of_the_reference() -> None:
    logits = torch.tensor([[1.0, 0, 0], [1, 0.5, 0], [0, 0, 2]])
    expected = [[0.6246, 0.3340, 0.0414], [0.3968, 0.5769, 0.0263], [0.0316, 0.1247, 0.8437]]
    q = sinkhorn_knopp(logits, 0.5)
    torch.testing.assert_close(q, torch.tensor(expected), atol=1e-4, rtol=0)
    assert torch.isfinite(sinkhorn_knopp(1e4 * logits, 0.04)).all()  # exp alone would overflow


def test_sinkhorn_knopp_of_two_devices_is_that_of_one() -> None:
    logits = torch.randn(8, 5, generator=torch.Generator().manual_seed(0))
    met, sent = Barrier(2, timeout=20), [torch.empty(0), torch.empty(0)]

    def device(rank: int) -> Tensor:
        def reduce(value: Tensor, op: str) -> Tensor:
            sent[rank] = value
            met.wait()
            both = torch.stack(sent)
            met.wait()
            return both.amax(0) if op == "max" else both.sum(0)

        return sinkhorn_knopp(logits.chunk(2)[rank], 0.5, reduce=reduce)

    with ThreadPoolExecutor(2) as devices:
        together = torch.cat(list(devices.map(device, range(2))))
    torch.testing.assert_close(together, sinkhorn_knopp(logits, 0.5))


def test_koleo_of_the_reference() -> None:
    rows = torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, 1.0]], requires_grad=True)
    loss = koleo(rows)
    assert loss.item() == pytest.approx(0.26740, abs=1e-5)
    assert torch.isfinite(torch.autograd.grad(loss, rows)[0]).all()
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(koleo(rows), loss)
    with pytest.raises(ValueError, match="koleo needs two images a batch"):
        koleo(rows[:1])


def test_signs_of_collapse_by_their_formulas() -> None:
    uniform = torch.full((2, 6, 8), 1 / 8)
    one = F.one_hot(torch.zeros(2, 6, dtype=torch.long), 8).float()
    spread = F.one_hot(torch.arange(6).expand(2, 6), 8).float()
    found = [
        diagnose(torch.tensor(2.5), lambda rows, q=q: q[:, rows], 6, 4, 8)
        for q in (uniform, one, spread)
    ]
    entropies = [(d["teacher_entropy"].item(), d["prototype_entropy"].item()) for d in found]
    expected = [(math.log(8), math.log(8)), (0, 0), (0, math.log(6))]
    for got, wanted in zip(entropies, expected, strict=True):
        assert got == pytest.approx(wanted, abs=1e-6)
    assert found[0]["kl"].item() == pytest.approx(2.5 - math.log(8), abs=1e-6)
    assert found[0]["below_ln_k"].item() == pytest.approx(math.log(8) - 2.5, abs=1e-6)
