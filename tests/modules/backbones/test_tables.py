"""Tables of constants are the same in whatever mode a network runs."""

from contextlib import AbstractContextManager

import pytest
import torch
from torch import Tensor
from torch._subclasses import FakeTensorMode

from modules.backbones.tables import table

MODES = {
    "plain": torch.enable_grad,
    "inference": torch.inference_mode,
    "meta": lambda: torch.device("meta"),
    "shapes alone": lambda: FakeTensorMode(allow_non_fake_inputs=True),
}


@pytest.mark.parametrize("name", MODES)
def test_a_table_that_is_made_in_any_mode_serves_in_all(name: str) -> None:
    asked = []

    @table
    def multiples(count: int, of: float = 1.0) -> Tensor:
        asked.append((count, of))
        return of * torch.arange(count)

    mode: AbstractContextManager[object] = MODES[name]()
    with mode:
        first = multiples(3, of=0.5)
    assert type(first) is Tensor
    assert first.tolist() == [0, 0.5, 1]
    assert not first.is_inference()
    assert multiples(3, of=0.5) is first
    assert multiples(3).tolist() == [0, 1, 2]
    assert asked == [(3, 0.5), (3, 1.0)]
