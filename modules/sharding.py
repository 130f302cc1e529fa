"""Weights, gradients and optimizer state spread over devices (FSDP2).

"PyTorch FSDP: Experiences on Scaling Fully Sharded Data Parallel" (Zhao et al. 2023). Every block
is gathered when it is needed and let go after it; teachers are spread like students, so that an
average is taken of each device's own part. Checkpoints are whole, in one file, and load with or
without sharding.
"""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.strategies import ModelParallelStrategy, StrategyRegistry
from torch import Tensor, distributed, nn
from torch.distributed.fsdp import FSDPModule, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.nn.modules.batchnorm import _BatchNorm
from torch.optim import Optimizer

from callbacks.checkpoint_files import read_checkpoint
from modules.networks import AroundBackbone
from modules.synced import WholeBatchNorm

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
        check(method, [type(callback).__name__ for callback in trainer.callbacks])  # type: ignore[attr-defined]
        self.accelerator.setup(trainer)
        if trainer.state.fn == "fit" and self._layer_sync is not None:
            self._layer_sync.apply(method)
        self.model_to_device()  # what is spread out below is on its device
        for network in method.children():
            is_spread = isinstance(network, FSDPModule)  # by a fit before this evaluation
            if isinstance(network, AroundBackbone) and not is_spread:
                spread(network, self.device_mesh["data_parallel"])
        self.statistics = own_statistics(method)
        self.model = self.precision_plugin.convert_module(method)
        self.barrier()
        if trainer.state.fn == "fit":
            self.setup_optimizers(trainer)
        self.setup_precision_plugin()

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        self.share_statistics()

    def on_validation_start(self) -> None:
        self.share_statistics()

    def share_statistics(self) -> None:
        """Those of the first device, which checkpoints hold, to all, as DDP does."""
        if self.statistics:
            share: Any = distributed._broadcast_coalesced  # type: ignore[attr-defined]
            share(distributed.group.WORLD, self.statistics, 2**28, 0)

    def load_checkpoint(
        self, checkpoint_path: str | Path, weights_only: bool | None = None
    ) -> dict[str, Any]:
        """Each device takes its parts; nothing is taken of a file that does not fit as a whole.

        Raises:
            FileNotFoundError: no such file.
            ValueError: it is damaged or holds pickled objects, or is of another network or
                optimizer.
        """
        model = self.model
        assert model is not None
        path = self.broadcast(checkpoint_path)
        checkpoint = read_checkpoint(path, mmap=True)
        kept, own = checkpoint.get("state_dict", {}), model.state_dict()
        # None in evaluation, which needs no optimizer.
        states = checkpoint.get("optimizer_states", []) if self.optimizers else []
        other = different_tensor(kept, own) or different_optimizer(states, self.optimizers)
        if other is not None:
            raise ValueError(f"{path} does not fit: {other}; resume with the run's own config")
        with torch.no_grad():
            for name, tensor in own.items():
                tensor.copy_(own_part(kept[name], tensor))
        for optimizer, saved in zip(self.optimizers, states, strict=True):
            take_state(optimizer, saved)
        return checkpoint


def own_statistics(method: nn.Module) -> list[Tensor]:
    """Running ones of batch norms, of which every device has its own."""
    return [
        buffer
        for norm in method.modules()
        if isinstance(norm, _BatchNorm) and not isinstance(norm, WholeBatchNorm | nn.SyncBatchNorm)
        for buffer in norm.buffers()
    ]


def different_tensor(kept: dict[str, Tensor], own: dict[str, Tensor]) -> str | None:
    """In what a checkpoint differs from a network; None where it is of it."""
    if unpaired := sorted(set(kept) ^ set(own)):
        return (
            f"it is of another network, {len(unpaired)} tensors are in one of them only, such as "
            f"{', '.join(unpaired[:3])}"
        )
    for name, tensor in own.items():
        if kept[name].shape != tensor.shape:
            return (
                f"its {name} is {list(kept[name].shape)}, that of the network {list(tensor.shape)}"
            )
    return None


def different_optimizer(kept: Sequence[dict[str, Any]], own: Sequence[Optimizer]) -> str | None:
    """In what the optimizers of a checkpoint differ from those of a run; None where they do not."""
    saved_groups = [state["param_groups"] for state in kept]
    own_groups = [optimizer.param_groups for optimizer in own]
    sizes = [
        [[len(group["params"]) for group in groups] for groups in of_all]
        for of_all in (saved_groups, own_groups)
    ]
    if sizes[0] != sizes[1]:
        return f"its optimizers have groups of {sizes[0]} tensors, those of the run of {sizes[1]}"
    for state, saved, groups in zip(kept, saved_groups, own_groups, strict=True):
        pairs = [
            (key, parameter)
            for one, other in zip(saved, groups, strict=True)
            for key, parameter in zip(one["params"], other["params"], strict=True)
        ]
        for key, parameter in pairs:
            for name, value in state["state"].get(key, {}).items():
                if value.dim() and value.shape != parameter.shape:
                    return (
                        f"{name} of its weight {key} is {list(value.shape)}, that weight of the "
                        f"run is {list(parameter.shape)}"
                    )
    return None


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


def check(method: LightningModule, callbacks: Sequence[str]) -> None:
    """Refuse what would fail, or be wrong, in the midst of a run.

    Args:
        method: what would be sharded.
        callbacks: names of their classes.
    """
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
    if "Pictures" in callbacks:
        raise ValueError(
            "callbacks.Pictures looks into blocks, which are spread over devices; take it out, "
            "and use `patchlight look` on the checkpoint"
        )


StrategyRegistry.register("sharded", Sharded, description="FSDP2: shards of all that a run trains")
