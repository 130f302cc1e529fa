"""Weights, gradients and optimizer state spread over devices (FSDP2).

"PyTorch FSDP: Experiences on Scaling Fully Sharded Data Parallel" (Zhao et al. 2023). Every block
is gathered when it is needed and let go after it; teachers are spread like students, so that an
average is taken of each device's own part. Checkpoints are whole, in one file, and load with or
without sharding.
"""

import re
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.strategies import ModelParallelStrategy, StrategyRegistry
from torch import nn
from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method

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
            if isinstance(network, AroundBackbone):
                spread(network, self.device_mesh["data_parallel"])
        self.model = self.precision_plugin.convert_module(method)
        self.barrier()
        if trainer.state.fn == "fit":
            self.setup_optimizers(trainer)
        self.setup_precision_plugin()


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
