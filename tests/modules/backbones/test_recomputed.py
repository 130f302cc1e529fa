"""Blocks that are computed again in the backward pass: less is kept, and nothing else changes."""

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from experiments.memory import saved
from modules.backbones import (
    Backbone,
    Hybrid,
    LVViT,
    NaViT,
    Swin,
    T2TViT,
    Timm,
    TwinsPCPVT,
    TwinsSVT,
    TwinsSVTCompact,
    ViT,
)
from tests.modules.backbones.test_packed import packed

RATES = {"dropout": 0.1, "drop_path": 0.2}
TOY: dict[str, Any] = {"variant": "mu", "patch_size": 8, **RATES}


def images(side: int = 64) -> Tensor:
    return torch.randn(2, 3, side, side)


def groups() -> list[Tensor]:
    return [images(), images(32)]


# Of each: how it is made, and what it is given.
CASES: dict[str, tuple[Callable[..., Backbone], Callable[[], Any]]] = {
    "vit": (partial(ViT, **TOY, image_size=64), images),
    "vit, groups": (partial(ViT, **TOY, image_size=64), groups),
    "vit, packs": (partial(ViT, **TOY, image_size=64), partial(packed, 1)),
    "navit": (partial(NaViT, **TOY), images),
    "navit, groups": (partial(NaViT, **TOY), groups),
    "navit, packs": (partial(NaViT, **TOY), partial(packed, 0)),
    "lvvit": (partial(LVViT, **TOY, image_size=64), images),
    "t2t": (partial(T2TViT, "mu", 64, drop_path=0.2), images),
    "hybrid": (partial(Hybrid, "mu", 64, **RATES), images),
    "swin": (partial(Swin, "mu", 64, window=3, drop_path=0.3), images),
    "twins": (partial(TwinsSVT, "mu", drop_path=0.3), images),
    "pcpvt": (partial(TwinsPCPVT, "mu", drop_path=0.3), images),
    "twins, compact": (partial(TwinsSVTCompact, "mu"), images),
    "timm": (partial(Timm, "test_vit", 64, drop_path=0.2), images),
}


def pooled(network: nn.Module, given: Any) -> Tensor:
    found = network(given)
    each = found if isinstance(found, list) else [found]
    return torch.cat([features.pooled.flatten() for features in each])


@pytest.mark.parametrize("case", CASES)
def test_less_is_kept_and_nothing_else_changes(case: str) -> None:
    make, input_of = CASES[case]
    given, found, kept = input_of(), [], []
    for recompute in (False, True):
        torch.manual_seed(0)
        network = make(recompute=recompute)
        with torch.no_grad():
            for parameter in network.parameters():  # none at zero, behind which nothing learns
                parameter.add_(0.02 * torch.randn_like(parameter))
        torch.manual_seed(1)
        pooled(network, given).square().sum().backward()
        found.append({key: parameter.grad for key, parameter in network.named_parameters()})
        kept.append(sum(saved(network, given).values()))
    assert any(grad is not None and grad.any() for grad in found[0].values())
    for key, grad in found[0].items():
        assert grad is None or torch.equal(grad, found[1][key]), key
    assert kept[1] < 0.8 * kept[0]


def test_what_timm_cannot_is_refused() -> None:
    with pytest.raises(ValueError, match=r"test_resnet has batch norms, .* set recompute to false"):
        Timm("test_resnet", image_size=64, recompute=True)
