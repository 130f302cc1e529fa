"""Batch norms over all devices: on one they are torch's; `test_devices` has two."""

from typing import Any

import pytest
import torch
from torch import nn

from modules import synced
from modules.synced import Synced, WholeBatchNorm


@pytest.mark.parametrize(
    ("kind", "shape"), [(nn.BatchNorm1d, (6, 4)), (nn.BatchNorm2d, (3, 4, 5, 2))]
)
@pytest.mark.parametrize(
    "options", [{}, {"affine": False}, {"momentum": None}, {"track_running_stats": False}]
)
def test_on_one_device_it_is_a_batch_norm(
    kind: Any, shape: tuple[int, ...], options: dict[str, Any]
) -> None:
    torch.manual_seed(0)
    theirs, like = kind(4, **options), nn.Sequential(kind(4, **options))
    if theirs.affine:
        with torch.no_grad():
            like[0].weight.uniform_(0.5, 2), like[0].bias.normal_()
    theirs.load_state_dict(like[0].state_dict())
    ours: Any = Synced().apply(like)[0]  # type: ignore[index]
    assert isinstance(ours, WholeBatchNorm)
    for _ in range(3):
        x = (5 + 3 * torch.randn(shape)).requires_grad_()
        scale = torch.randn(shape)
        outputs = [(norm(x) * scale).sum() for norm in (theirs, ours)]
        gradients = [
            torch.autograd.grad(out, [x, *norm.parameters()])
            for out, norm in zip(outputs, (theirs, ours), strict=True)
        ]
        torch.testing.assert_close(gradients[1], gradients[0], atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(ours(x), theirs(x), atol=1e-5, rtol=1e-5)
    assert ours.state_dict().keys() == theirs.state_dict().keys()
    torch.testing.assert_close(ours.state_dict(), theirs.state_dict())
    if theirs.track_running_stats:
        torch.testing.assert_close(ours.eval()(x), theirs.eval()(x))


def test_one_value_a_channel_is_refused_as_by_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    theirs, ours = nn.BatchNorm1d(4), WholeBatchNorm(nn.BatchNorm1d(4))
    x = torch.randn(1, 4)
    for norm in (theirs, ours):
        with pytest.raises(ValueError, match=r"(one|1) value.* channel"):
            norm(x)
    assert torch.isfinite(ours.running_var).all()
    torch.testing.assert_close(ours.eval()(x), theirs.eval()(x))
    # With the value of another device there are two.
    monkeypatch.setattr(synced, "is_one_of_several", lambda: True)
    other = torch.tensor([1.0, 2.0, 3.0, 4.0, 1.0])

    def total(own: torch.Tensor) -> torch.Tensor:
        mean = (x[0] + other[:4]) / 2
        return own + (other if len(own) == 5 else (other[:4] - mean).square())

    monkeypatch.setattr(synced, "total", total)
    both = torch.stack((x[0], other[:4]))
    torch.testing.assert_close(ours.train()(x), nn.BatchNorm1d(4)(both)[:1])
