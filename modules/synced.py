"""Batch norms whose batch is that of all devices, on CPUs as well: `trainer.sync_batchnorm: true`.

torch's own takes GPUs only, so a recipe for several of them could not be tried on several
processes of a CPU.
"""

import torch
from jaxtyping import Float
from lightning.pytorch.plugins import TorchSyncBatchNorm
from torch import Tensor, distributed, nn
from torch.distributed.nn.functional import all_reduce
from torch.nn.modules.batchnorm import _BatchNorm


def total(x: Tensor) -> Tensor:
    """The sum over all devices, which gradients pass; of one where there are no others."""
    if not distributed.is_initialized():
        return x
    summed: Tensor = all_reduce(x)  # type: ignore[no-untyped-call]
    return summed


def is_one_of_several() -> bool:
    """Whether there are other devices."""
    return distributed.is_initialized() and distributed.get_world_size() > 1


class WholeBatchNorm(_BatchNorm):
    """Batch normalisation of [b, d, ...] over all devices, with the tensors of another one."""

    def __init__(self, of: _BatchNorm) -> None:
        nn.Module.__init__(self)
        self.num_features, self.eps, self.momentum = of.num_features, of.eps, of.momentum
        self.affine, self.track_running_stats = of.affine, of.track_running_stats
        self.weight, self.bias = of.weight, of.bias
        for name in ("running_mean", "running_var", "num_batches_tracked"):
            self.register_buffer(name, getattr(of, name))
        self.train(of.training)

    def _check_input_dim(self, input: Tensor) -> None:
        if input.dim() < 2:
            raise ValueError(f"batch norm got {input.dim()} axis; expected [b, d] or more")

    def forward(self, input: Float[Tensor, "b d *rest"]) -> Float[Tensor, "b d *rest"]:
        """
        Raises:
            ValueError: one value a channel on all devices, whose variance is none.
        """
        if not self.training:
            return super().forward(input)
        self._check_input_dim(input)
        if input.numel() == self.num_features and not is_one_of_several():
            raise ValueError(
                f"batch norm got one value a channel, {list(input.shape)}, whose variance is none; "
                f"train with at least two images a batch"
            )
        x = input.float()
        axes = [axis for axis in range(x.dim()) if axis != 1]
        shape = [1, -1] + [1] * (x.dim() - 2)
        own = x.new_full((1,), x.numel() / self.num_features)
        sums = total(torch.cat((x.sum(axes), own)))
        count = sums[-1].detach()
        mean = sums[:-1] / count
        centred = x - mean.view(shape)
        # Summed around the mean: the mean square less the squared mean would cancel.
        squares = total(centred.square().sum(axes))
        self.keep(mean.detach(), squares.detach() / (count - 1))
        out = centred * (squares / count + self.eps).rsqrt().view(shape)
        if self.weight is not None:
            out = out * self.weight.view(shape) + self.bias.view(shape)
        return out.to(input.dtype)

    def keep(self, mean: Tensor, variance: Tensor) -> None:
        """Let the newest batch into the running averages."""
        if self.running_mean is None or self.running_var is None:
            return
        assert self.num_batches_tracked is not None
        self.num_batches_tracked.add_(1)
        share = 1 / self.num_batches_tracked if self.momentum is None else self.momentum
        self.running_mean.lerp_(mean, share)
        self.running_var.lerp_(variance, share)


class Synced(TorchSyncBatchNorm):
    """torch's synchronised batch norms on GPUs, `WholeBatchNorm` on CPUs."""

    def apply(self, model: nn.Module) -> nn.Module:
        if any(parameter.is_cuda for parameter in model.parameters()):
            return super().apply(model)
        for parent in list(model.modules()):
            for name, child in list(parent.named_children()):
                if isinstance(child, _BatchNorm):
                    setattr(parent, name, WholeBatchNorm(child))
        return model
