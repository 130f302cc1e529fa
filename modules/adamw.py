"""AdamW for TPUs: torch's, but that numbers which change from step to step are data of the graph.

torch's AdamW gives these to a TPU as Python numbers. XLA makes constants of zeros and ones, and in
float32 a decay of 1 - lr * weight decay is one as long as the rate is small: all of the step would
be compiled again once the warm-up is past that. State and groups are torch's, so a checkpoint goes
on on any device.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


class DataAdamW(torch.optim.AdamW):
    """torch's `AdamW` (Loshchilov and Hutter 2017), neither amsgrad nor maximising."""

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            known: dict[float, Tensor] = {}
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self.advance(group, parameter, parameter.grad, known)
        return loss

    def advance(
        self, group: dict[str, Any], parameter: Tensor, grad: Tensor, known: dict[float, Tensor]
    ) -> None:
        """One parameter; `known` are the numbers of this group by how many steps one has taken."""
        state = self.state[parameter]
        if not state:
            state["step"] = torch.tensor(0.0)  # on the CPU, as torch has it
            state["exp_avg"] = torch.zeros_like(parameter)
            state["exp_avg_sq"] = torch.zeros_like(parameter)
        state["step"] += 1
        step, (beta1, beta2) = float(state["step"]), group["betas"]
        if step not in known:
            decay = 1 - group["lr"] * group["weight_decay"]
            numbers = (decay, -group["lr"] / (1 - beta1**step), (1 - beta2**step) ** 0.5)
            known[step] = torch.tensor(numbers).to(parameter)
        decay, size, root = known[step].unbind()
        mean, square = state["exp_avg"], state["exp_avg_sq"]
        mean.lerp_(grad, 1 - beta1)
        square.mul_(beta2).addcmul_(grad, grad, value=1 - beta2)
        change = size * mean / (square.sqrt() / root + group["eps"])
        parameter.copy_(decay * parameter + change)
