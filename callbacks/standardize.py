"""Features brought to mean 0 and variance 1, the same on any number of devices."""

from collections.abc import Callable

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

Reduce = Callable[[Tensor], Tensor]  # the sum of a tensor over all devices


class Standardize(nn.Module):
    """Batch normalisation without scale and shift, for features that carry no gradient.

    "Batch Normalization" (Ioffe and Szegedy 2015): in training by the batch's own mean and
    variance, in evaluation by their running averages. The batch is that of all devices, where
    `nn.BatchNorm1d`, which this equals on one, has statistics for each.

    Args:
        dim: width of the features.
        eps: what the variance is raised by.
        momentum: share of the newest batch in the running averages.
    """

    running_mean: Tensor
    running_var: Tensor

    def __init__(self, dim: int, eps: float = 1e-6, momentum: float = 0.1) -> None:
        super().__init__()
        self.eps, self.momentum = eps, momentum
        self.register_buffer("running_mean", torch.zeros(dim))
        self.register_buffer("running_var", torch.ones(dim))

    @torch.no_grad()
    def forward(
        self, x: Float[Tensor, "b d"], is_valid: Bool[Tensor, " b"], total: Reduce
    ) -> Float[Tensor, "b d"]:
        """Standardise in float32; only valid rows count.

        `total` is called in training only, and by all devices together.
        """
        x = x.float()
        if not self.training:
            return (x - self.running_mean) * (self.running_var + self.eps).rsqrt()
        counts = is_valid.float()[:, None]
        sums = total(torch.cat(((x * counts).sum(0), counts.sum(0))))
        count = sums[-1].clamp_min(1.0)
        mean = sums[:-1] / count
        # Summed around the mean: the mean square less the squared mean would cancel.
        squares = total(((x - mean).square() * counts).sum(0))
        self.running_mean.lerp_(mean, self.momentum)
        self.running_var.lerp_(squares / (count - 1).clamp_min(1.0), self.momentum)
        return (x - mean) * (squares / count + self.eps).rsqrt()
