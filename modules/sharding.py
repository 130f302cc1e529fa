"""Weights, gradients and optimizer state spread over devices (FSDP2).

"PyTorch FSDP: Experiences on Scaling Fully Sharded Data Parallel" (Zhao et al. 2023). Every block
is gathered when it is needed and let go after it; teachers are spread like students, so that an
average is taken of each device's own part. Checkpoints are whole, in one file, and load with or
without sharding.
"""

import re
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.strategies import ModelParallelStrategy, StrategyRegistry
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.optim import Optimizer

from modules.networks import AroundBackbone

UNIT = re.compile(r"(?:^|[._])blocks(?:\.\d+)+$")
NOT_SHARDED = ("lars", "lamb")


def units(network: nn.Module) -> list[nn.Module]:
    """Blocks of a network in their order, by their names: `blocks.3`, `decoder_blocks.0`."""
    return [
        module
        for name, module in network.named_modules()
        if UNIT.search(name) and not isinstance(module, nn.ModuleList | nn.Sequential)
    ]


class Sharded(ModelParallelStrategy):
    """`trainer.strategy: sharded`: parameters, gradients and optimizer state in shards.

    Raises:
        ValueError: what cannot be sharded: networks without a backbone, LARS and LAMB (which ask
            for the norm of whole tensors), pictures of a network that is spread out.
    """

    def __init__(self) -> None:
        super().__init__(tensor_parallel_size=1, save_distributed_checkpoint=False)

    def setup_environment(self) -> None:
        self._data_parallel_size = self.num_nodes * self.num_processes
        super().setup_environment()

    def setup(self, trainer: Trainer) -> None:
        method = self.lightning_module
        assert method is not None
        assert self.accelerator is not None
        check(method, trainer)
        self.accelerator.setup(trainer)
        if trainer.state.fn == "fit" and self._layer_sync is not None:
            self._layer_sync.apply(method)
        self.model_to_device()  # what is spread out below is on its device
        for network in method.children():
            is_spread = isinstance(network, FSDPModule)  # by a fit before this evaluation
            if isinstance(network, AroundBackbone) and not is_spread:
                spread(network, self.device_mesh["data_parallel"])
        self.model = self.precision_plugin.convert_module(method)
        self.barrier()
        if trainer.state.fn == "fit":
            self.setup_optimizers(trainer)
        self.setup_precision_plugin()

    def load_checkpoint(
        self, checkpoint_path: str | Path, weights_only: bool | None = None
    ) -> dict[str, Any]:
        """Each device takes its parts.

        Raises:
            ValueError: a checkpoint of another network.
        """
        model = self.model
        assert model is not None
        path = self.broadcast(checkpoint_path)
        checkpoint: dict[str, Any] = torch.load(path, "cpu", mmap=True, weights_only=True)
        kept, own = set(checkpoint["state_dict"]), set(model.state_dict())
        if kept != own:
            other = sorted(kept ^ own)
            raise ValueError(
                f"{path} is of another network: {len(other)} tensors are in one of them "
                f"only, such as {', '.join(other[:3])}; resume with the run's own config"
            )
        with torch.no_grad():
            for name, tensor in model.state_dict().items():
                tensor.copy_(own_part(checkpoint["state_dict"][name], tensor))
        if self.optimizers:  # none in evaluation
            states = checkpoint["optimizer_states"]
            for optimizer, saved in zip(self.optimizers, states, strict=True):
                take_state(optimizer, saved)
        return checkpoint


def own_part(whole: Tensor, like: Tensor) -> Tensor:
    """Of a whole tensor what this device has of one like it."""
    if not isinstance(like, DTensor):
        return whole.to(like.device)
    whole = whole.to(like.device)
    return distribute_tensor(whole, like.device_mesh, like.placements, src_data_rank=None)


def take_state(optimizer: Optimizer, saved: dict[str, Any]) -> None:
    """The state of whole tensors, of a sharded run or of another, as torch numbers it.

    A weight that had no gradient yet, as DINO's last layer at first, goes on without state, which
    torch's own loading would begin with a step of zeros.
    """
    optimizer.state.clear()
    for group, kept in zip(optimizer.param_groups, saved["param_groups"], strict=True):
        group.update({name: value for name, value in kept.items() if name != "params"})
        for parameter, key in zip(group["params"], kept["params"], strict=True):
            if key in saved["state"]:
                optimizer.state[parameter] = {
                    name: own_part(value, parameter) if value.shape == parameter.shape else value
                    for name, value in saved["state"][key].items()
                }


def spread(network: AroundBackbone, mesh: Any) -> None:
    """Shard a network block by block; the rest is one part, gathered while the network is read."""
    for block in units(network):
        fully_shard(block, mesh=mesh)
    fully_shard(network, mesh=mesh)
    for name in network.entries:
        register_fsdp_forward_method(network, name)


def check(method: LightningModule, trainer: Trainer) -> None:
    """Refuse what would fail, or be wrong, in the midst of a run."""
    networks = [child for child in method.children() if isinstance(child, AroundBackbone)]
    trained = [parameter for parameter in method.parameters() if parameter.requires_grad]
    inside = {id(parameter) for network in networks for parameter in network.parameters()}
    if not networks or any(id(parameter) not in inside for parameter in trained):
        raise ValueError(
            f"{type(method).__name__} cannot be sharded: it trains what is no network around a "
            f"backbone; set trainer.strategy to ddp"
        )
    name = getattr(getattr(method, "optimization", None), "name", None)
    if name in NOT_SHARDED:
        raise ValueError(
            f"optimizer.name is {name}, which asks for norms of whole tensors and gets shards; set "
            f"trainer.strategy to ddp or use adamw"
        )
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        if type(callback).__name__ == "Pictures":
            raise ValueError(
                "callbacks.Pictures looks into blocks, which are spread over devices; take it out, "
                "and use `patchlight look` on the checkpoint"
            )


StrategyRegistry.register("sharded", Sharded, description="FSDP2: shards of all that a run trains")
