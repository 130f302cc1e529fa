"""LARS, "Large Batch Training of Convolutional Networks" (You et al. 2017).

As in the linear probing of MAE and MoCo v3: the trust ratio scales the gradient before the
momentum, and vectors (biases, norms) have neither decay nor trust ratio.

    d  = g + weight_decay w                     matrices only
    d  = d trust |w| / |d|                      matrices only; factor 1 where a norm is 0
    mu = momentum mu + d
    w  = w - lr mu
"""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor


class LARS(torch.optim.Optimizer):
    """SGD with momentum whose gradient is brought to the scale of the weight, tensor by tensor.

    Args:
        params: parameters, or groups of them.
        lr: learning rate.
        weight_decay: decay of tensors with two axes or more.
        momentum: of the scaled gradient.
        trust: length of the step relative to that of the weight.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float,
        weight_decay: float = 0.0,
        momentum: float = 0.9,
        trust: float = 0.001,
    ) -> None:
        defaults = {"lr": lr, "weight_decay": weight_decay, "momentum": momentum, "trust": trust}
        super().__init__(params, defaults)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        # Lightning's closure computes the gradients.
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for weight in group["params"]:
                if weight.grad is None:
                    continue
                state = self.state[weight]
                if not state:
                    state["momentum"] = torch.zeros_like(weight)
                direction = weight.grad
                if weight.ndim > 1:
                    direction = direction.add(weight, alpha=group["weight_decay"])
                    direction = direction * trust_ratio(weight, direction, group["trust"])
                momentum = state["momentum"].mul_(group["momentum"]).add_(direction)
                weight.add_(momentum, alpha=-group["lr"])
        return loss


def trust_ratio(weight: Tensor, direction: Tensor, trust: float) -> Tensor:
    """trust |weight| / |direction|, or 1 where either is zero; stays on the device."""
    long, short = weight.norm(), direction.norm()
    return torch.where((long > 0) & (short > 0), trust * long / short, 1.0)
