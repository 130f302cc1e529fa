"""Groups of images of several sizes in one pass: every image is what it would be alone."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from modules.backbones import BlockStyle, FactorisedPositions, LVViT, NaViT, Positions, ViT
from modules.backbones.attention import Groups
from modules.backbones.layers import DropPath

ROOT = Path(__file__).parents[3]
KINDS = ("learned1d", "learned2d", "sincos2d", "relative", "none")
OPTIONS: dict[str, dict[str, Any]] = {
    **{f"{kind} positions": {"positions": Positions(kind)} for kind in KINDS},
    "positions in every block": {"positions": Positions("learned2d", "every")},
    "shared positions": {"positions": Positions("sincos2d", "every_shared")},
    "shared relative": {"positions": Positions("relative", "every_shared")},
    "DINO's resampling": {"positions": Positions(resample="dino")},
    **{f"pooling {pooling}": {"pooling": pooling} for pooling in ("avg", "norm_avg", "map")},
    "no class token": {"pooling": "avg", "class_token": False},
    "registers": {"num_registers": 4},
    "distillation token": {"distillation_token": True},
    "pre-logits": {"pre_logits": True},
    "layer scale": {"block": BlockStyle(layer_scale=0.1)},
    "swiglu": {"block": BlockStyle(mlp="swiglu")},
    "qk norm": {"block": BlockStyle(qk_norm="layer")},
    "RMS norm": {"block": BlockStyle(qk_norm="rms_unscaled")},
    "residual scale": {"block": BlockStyle(residual_scale=2.0)},
}


def groups() -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    sizes = ((4, 32, 32), (6, 16, 16), (1, 24, 40))
    return [torch.randn(b, 3, h, w, generator=generator) for b, h, w in sizes]


def drawn(network: nn.Module) -> nn.Module:
    """With no parameter left at zero, so that whatever it does shows."""
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return network


def check_equal(network: nn.Module, dtype: torch.dtype = torch.float32) -> None:
    crops = [crop.to(dtype) for crop in groups()]
    results = []
    for features in (network(crops), [network(images) for images in crops]):
        network.zero_grad()
        weighted = (f.pooled.sin().sum() + f.patches.cos().sum() / 9 for f in features)
        sum(weighted).backward()  # type: ignore[union-attr]
        results.append((features, {n: p.grad.clone() for n, p in network.named_parameters()}))
    (together, gradients), (alone, expected) = results
    for ours, theirs in zip(together, alone, strict=True):
        assert ours.grid == theirs.grid
        for name in ("pooled", "cls", "patches", "dist"):
            a, b = getattr(ours, name), getattr(theirs, name)
            assert (a is None) == (b is None)
            if a is not None:
                torch.testing.assert_close(a, b, atol=1e-6, rtol=1e-5, msg=name)
    for name, gradient in gradients.items():
        torch.testing.assert_close(
            gradient, expected[name], atol=1e-5, rtol=1e-5, msg=lambda m, n=name: f"{n}: {m}"
        )


@pytest.mark.parametrize("option", OPTIONS)
def test_one_pass_gives_what_a_pass_for_each_group_gives(option: str) -> None:
    torch.manual_seed(0)
    check_equal(drawn(ViT("mu", 8, 32, **OPTIONS[option])))


@pytest.mark.parametrize("kind", ["learned", "fourier"])
def test_navit_takes_groups(kind: Any) -> None:
    torch.manual_seed(0)
    check_equal(drawn(NaViT("mu", 8, positions=FactorisedPositions(kind))))


def test_lvvit_takes_groups() -> None:
    torch.manual_seed(0)
    check_equal(drawn(LVViT("mu", 8, 32)))


def test_linear_layers_run_once() -> None:
    network, calls = ViT("mu", 8, 32), []
    for name, layer in network.blocks.named_modules():
        if isinstance(layer, (nn.Linear, nn.LayerNorm)):
            layer.register_forward_hook(lambda m, given, out, n=name: calls.append((n, given)))
    network(groups())
    assert len(calls) == len({name for name, _ in calls}) == 12
    tokens = 4 * 17 + 6 * 5 + 1 * 16
    assert {given.shape[:2] for _, (given,) in calls} == {(1, tokens)}


def test_one_group_takes_the_plain_path() -> None:
    network, (images, *_) = ViT("mu", 8, 32), groups()
    (alone,) = network([images])
    assert torch.equal(alone.patches, network(images).patches)


def test_stochastic_depth_is_drawn_for_every_image() -> None:
    torch.manual_seed(0)
    parts = [torch.ones(40, 5, 2), torch.ones(60, 3, 2)]
    where, drop = Groups(parts, [(2, 2), (1, 2)]), DropPath(0.25)
    kept = [part.flatten(1) for part in where.split(drop(where.join(parts), where))]
    for part in kept:
        assert torch.equal(part, part[:, :1].expand_as(part))  # all tokens of an image alike
        torch.testing.assert_close(part.unique(), torch.tensor([0.0, 4 / 3]))
    share = torch.cat([part[:, 0] for part in kept]).gt(0).float().mean()
    assert 0.6 < share < 0.9
    drop.eval()
    assert torch.equal(drop(where.join(parts), where), where.join(parts))
