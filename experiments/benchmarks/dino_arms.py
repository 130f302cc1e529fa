"""Three ways to train DINO, and what each does for the loss alone; for `dino_step`."""

import copy
from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from callbacks.ema import Average, advance
from modules import optim
from modules.backbones import ViT
from modules.dino import OPTIMIZATION
from modules.dino_loss import Center, view_loss
from modules.dino_network import Head, Network

OURS, PUBLISHED, MIXED, LIGHTLY = ARMS = (
    *("patchlight", "as published", "its loop, our attention", "lightly"),
)
ANY = (SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH)
GLOBAL, LOCAL = (2, 224), (8, 96)  # views and their sides
STUDENT, TEACHER, MOMENTUM, LR, CLIP = 0.1, 0.04, 0.996, 1e-6, 3.0


class Arm(NamedTuple):
    """A way to train, as it is timed."""

    student: nn.Module
    teacher: nn.Module
    loss: Callable[[], Tensor]
    update: Callable[[], None]


class Sizes(NamedTuple):
    variant: str
    batch: int
    prototypes: int
    device: torch.device


def networks(size: Sizes) -> tuple[Network, Network]:
    """Student and teacher, the same in every arm."""
    torch.manual_seed(0)
    backbone = ViT(size.variant, 16, 224, drop_path=0.1)
    head = Head(backbone.embed_dim, 2048, 256, size.prototypes, norm_last=True)
    student = Network(backbone, head).to(size.device)
    return student, copy.deepcopy(student).requires_grad_(False).eval()


def crops_of(size: Sizes) -> list[Tensor]:
    draw = torch.Generator().manual_seed(1)
    shapes = [(v, size.batch, 3, side, side) for v, side in (GLOBAL, LOCAL)]
    return [torch.randn(*shape, generator=draw).to(size.device) for shape in shapes]


def trained(network: nn.Module) -> list[nn.Parameter]:
    return [parameter for parameter in network.parameters() if parameter.requires_grad]


def ours(size: Sizes, crops: list[Tensor]) -> Arm:
    student, teacher = networks(size)
    center = Center(size.prototypes, 0.9).to(size.device)
    optimizer = optim.build(OPTIMIZATION, student)
    optim.set_lr(optimizer, LR)

    def loss() -> Tensor:
        with torch.no_grad():
            taught = teacher(crops[:1]).bottlenecks
        seen = student(crops).bottlenecks
        center.add(taught)
        targets = center.targets(taught, teacher.head.prototypes, TEACHER)
        return view_loss(seen, student.head.prototypes, targets, STUDENT).mean()

    def update() -> None:
        center.update(teacher.head.prototypes)
        optim.clip(OPTIMIZATION, student.parameters())
        optimizer.step()
        optimizer.zero_grad()
        advance(Average(teacher, student, MOMENTUM))

    return Arm(student, teacher, loss, update)


def published_loss(s: Tensor, t: Tensor, center: Tensor) -> Tensor:
    """Of logits [v, b, k] and [g, b, k], a pair of views after the other."""
    scaled, q = s / STUDENT, ((t - center) / TEACHER).softmax(dim=-1)
    terms = [
        (-q[i] * F.log_softmax(scaled[v], dim=-1)).sum(dim=-1).mean()
        for i in range(len(q))
        for v in range(len(s))
        if v != i
    ]
    center.lerp_(t.mean(dim=(0, 1)), 0.1)
    return torch.stack(terms).mean()


def published(kernels: Sequence[SDPBackend], size: Sizes, crops: list[Tensor]) -> Arm:
    student, teacher = networks(size)
    center = torch.zeros(size.prototypes, device=size.device)
    matrices = [p for p in trained(student) if p.ndim > 1]
    others = [p for p in trained(student) if p.ndim < 2]
    groups = [{"params": matrices, "weight_decay": 0.04}, {"params": others, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=LR)

    def logits(network: Network, views: list[Tensor]) -> Tensor:
        with sdpa_kernel(list(kernels)):
            rows = [network.backbone(group.flatten(0, 1)).pooled for group in views]
        out: Tensor = network.head.last_layer(network.head(torch.cat(rows))).float()
        return out.view(-1, size.batch, size.prototypes)

    def loss() -> Tensor:
        with torch.no_grad():
            t = logits(teacher, crops[:1])
        return published_loss(logits(student, crops), t, center)

    def update() -> None:
        for parameter in trained(student):
            assert parameter.grad is not None
            coefficient = CLIP / (parameter.grad.norm() + 1e-6)
            if coefficient < 1:
                parameter.grad.mul_(coefficient)
        optimizer.step()
        optimizer.zero_grad()
        with torch.no_grad():
            for source, kept in zip(student.parameters(), teacher.parameters(), strict=True):
                kept.mul_(MOMENTUM).add_((1 - MOMENTUM) * source)

    return Arm(student, teacher, loss, update)


def lightly_head(of: Head) -> nn.Module:
    """lightly's head with the weights of ours."""
    from lightly.models.modules import DINOProjectionHead

    first, last = of.mlp[0], of.mlp[-1]
    assert isinstance(first, nn.Linear)
    assert isinstance(last, nn.Linear)
    sizes = (first.in_features, first.out_features, last.out_features, len(of.prototypes))
    head: nn.Module = DINOProjectionHead(*sizes).to(first.weight.device)
    names = {"mlp.": "layers.", "parametrizations.weight.original0": "weight_g"}
    names["parametrizations.weight.original1"] = "weight_v"
    state = of.state_dict()
    for ours, theirs in names.items():
        state = {name.replace(ours, theirs): value for name, value in state.items()}
    head.load_state_dict(state, strict=True)
    return head


def of_lightly(size: Sizes, crops: list[Tensor]) -> Arm:
    from lightly.loss import DINOLoss
    from lightly.models.utils import update_momentum

    network, average = networks(size)
    student = nn.Sequential(network.backbone, lightly_head(network.head))
    teacher = nn.Sequential(average.backbone, lightly_head(average.head)).requires_grad_(False)
    criterion = DINOLoss(size.prototypes, student_temp=STUDENT).to(size.device)
    optimizer = torch.optim.AdamW(trained(student), lr=LR)
    views = [view for group in crops for view in group]

    def logits(way: nn.Sequential, view: Tensor) -> Tensor:
        out: Tensor = way[1](way[0](view).pooled)
        return out

    def loss() -> Tensor:
        with torch.no_grad():
            t = [logits(teacher, view) for view in views[:2]]
        out: Tensor = criterion(t, [logits(student, view) for view in views], TEACHER)
        return out

    def update() -> None:
        optimizer.step()
        optimizer.zero_grad()
        for source, kept in zip(student, teacher, strict=True):
            update_momentum(source, kept, MOMENTUM)

    return Arm(student, teacher, loss, update)


MAKE: dict[str, Callable[[Sizes, list[Tensor]], Arm]] = {
    OURS: ours,
    # The published network writes its softmax out.
    PUBLISHED: partial(published, (SDPBackend.MATH,)),
    MIXED: partial(published, ANY),
    LIGHTLY: of_lightly,
}


def loss_alone(name: str, size: Sizes) -> Callable[[], Tensor]:
    """The last layer and the loss, given what goes into them."""
    draw = torch.Generator().manual_seed(1)
    shape = (GLOBAL[0] + LOCAL[0], size.batch, 256)
    s = F.normalize(torch.randn(shape, generator=draw), dim=-1).to(size.device).requires_grad_()
    t = s[: GLOBAL[0]].detach().clone()
    student = Head(8, 8, 256, size.prototypes, norm_last=True).to(size.device)
    if name == LIGHTLY:
        from lightly.loss import DINOLoss

        criterion = DINOLoss(size.prototypes, student_temp=STUDENT).to(size.device)
        layer: nn.Module = lightly_head(student).last_layer  # type: ignore[assignment]
        frozen: nn.Module = lightly_head(student).last_layer  # type: ignore[assignment]
        frozen.requires_grad_(False)
        return lambda: criterion([frozen(x) for x in t], [layer(x) for x in s], TEACHER)
    teacher = copy.deepcopy(student).requires_grad_(False)
    center = Center(size.prototypes, 0.9).to(size.device)
    if name == OURS:

        def of_bottlenecks() -> Tensor:
            targets = center.targets(t, teacher.prototypes, TEACHER)
            return view_loss(s, student.prototypes, targets, STUDENT).mean()

        return of_bottlenecks
    kept = center.center[0]
    return lambda: published_loss(student.last_layer(s).float(), teacher.last_layer(t), kept)
