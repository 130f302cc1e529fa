"""LARS against MAE's."""

from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from torch import nn

from modules.lars import LARS

GOLDEN = Path(__file__).parent.parent / "golden" / "mae_optim.safetensors"


def test_four_steps_equal_the_published_ones() -> None:
    with safe_open(GOLDEN, "pt") as file:
        weight, bias = (nn.Parameter(file.get_tensor(name)) for name in ("w.0", "b.0"))
        optimizer = LARS([weight, bias], lr=0.3, weight_decay=0.1, momentum=0.9, trust=0.001)
        for i in range(4):
            weight.grad, bias.grad = file.get_tensor(f"gw.{i}"), file.get_tensor(f"gb.{i}")
            optimizer.step()
            for value, name in ((weight, "w"), (bias, "b")):
                expected = file.get_tensor(f"{name}.{i + 1}")
                torch.testing.assert_close(value.detach(), expected, atol=1e-7, rtol=1e-6)


@pytest.mark.parametrize(
    ("change", "at"),
    [({"weight_decay": 0.5}, "w"), ({"momentum": 0.5}, "wb"), ({"trust": 0.01}, "w")],
)
def test_every_option_moves_what_it_should(change: dict[str, float], at: str) -> None:
    def trained(**change: float) -> dict[str, torch.Tensor]:
        weight, bias = nn.Parameter(torch.eye(3)), nn.Parameter(torch.ones(3))
        optimizer = LARS([weight, bias], lr=0.3, **{"weight_decay": 0.1} | change)
        for i in range(2):
            weight.grad, bias.grad = torch.full((3, 3), i + 1.0), torch.full((3,), i + 1.0)
            optimizer.step()
        return {"w": weight.detach(), "b": bias.detach()}

    base, changed = trained(), trained(**change)
    assert {name for name in base if not torch.equal(base[name], changed[name])} == set(at)


@pytest.mark.parametrize(("value", "gradient"), [(0.0, 1.0), (1.0, 0.0)])
def test_a_norm_of_zero_leaves_the_gradient_as_it_is(value: float, gradient: float) -> None:
    weight = nn.Parameter(torch.full((2, 2), value))
    weight.grad = torch.full((2, 2), gradient)
    LARS([weight], lr=0.5).step()
    torch.testing.assert_close(weight.detach(), torch.full((2, 2), value - 0.5 * gradient))
