"""What a device has to hold while it trains, from shapes alone."""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from lightning.pytorch import LightningModule
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode
from torch.autograd.graph import saved_tensors_hooks
from torch.utils._pytree import tree_leaves

from datamodules.multicrop import MultiCropDataModule
from datamodules.one_size import OneSizeDataModule
from modules.backbones import Backbone, Timm
from modules.backbones.recomputed import Call, noting_calls
from modules.mae import Autoencoder
from modules.networks import AroundBackbone
from modules.optim import Optimization
from modules.sharding import units


class Memory(NamedTuple):
    """Bytes that a device holds.

    weights:  parameters and buffers of all networks, teachers too
    training: gradients, and what the optimizer keeps
    gathered: of sharded networks what is whole at a time
    buckets:  in which DDP averages gradients of several devices, in float32
    copies:   of trained weights in 16 bits, which autocast keeps from forward to backward
    """

    weights: int
    training: int
    gathered: int
    buckets: int
    copies: int


def memory_of(
    method: LightningModule, is_sharded: bool = False, devices: int = 1, is_half: bool = False
) -> Memory:
    """Of one device.

    Sharded networks are cut along the first axis of every tensor. What is no block is whole all the
    time, with its gradients; of blocks the one that computes, its gradients, and the next one.
    Autocast's copies are whole, of sharded weights as well. A few weights that are never cast,
    such as those of norms, are counted as if they were.
    """
    networks = [child for child in method.children() if isinstance(child, AroundBackbone)]
    spread = {p for network in networks for p in network.parameters() if is_sharded}

    def own(parameter: Tensor) -> int:
        numbers = parameter.numel()
        if parameter in spread:
            rows = parameter.shape[0] if parameter.ndim else 1
            numbers = numbers // rows * -(-rows // devices)
        return numbers * parameter.element_size()

    trained_ones = [p for p in method.parameters() if p.requires_grad]
    trained = sum(own(p) // p.element_size() for p in trained_ones)
    whole = [t for t in (*method.parameters(), *method.buffers()) if t not in spread]
    return Memory(
        weights=sum(map(own, spread)) + sum(t.numel() * t.element_size() for t in whole),
        training=trained * (4 + state_bytes(getattr(method, "optimization", Optimization()))),
        gathered=gathered(networks) if is_sharded else 0,
        buckets=4 * trained if devices > 1 and not is_sharded else 0,
        copies=2 * sum(p.numel() for p in trained_ones) if is_half else 0,
    )


def state_bytes(how: Optimization) -> int:
    """That an optimizer keeps of every trained number, in float32."""
    if how.name in ("sgd", "rmsprop"):
        return (4 if how.momentum else 0) + (4 if how.name == "rmsprop" else 0)
    return 4 if how.name == "lars" else 8


def gathered(networks: Sequence[AroundBackbone]) -> int:
    """Bytes of sharded networks that are whole at a time: see `memory_of`."""
    rest, largest = 0, 0
    for network in networks:
        blocks = [weights_and_gradients(block) for block in units(network)]
        rest += sum(weights_and_gradients(network)) - sum(map(sum, blocks))
        largest = max(largest, *(2 * weights + gradients for weights, gradients in blocks))
    return rest + largest


def weights_and_gradients(module: nn.Module) -> tuple[int, int]:
    weights = list(module.parameters())
    return sum(p.nbytes for p in weights), sum(p.nbytes for p in weights if p.requires_grad)


def activations(method: LightningModule, data: OneSizeDataModule, is_half: bool) -> float:
    """Bytes of one image that its backbone keeps for backward, over all views.

    Of MAE those of the patches that the encoder sees, of the decoder and of the loss. What two
    images keep more than one: tables and weights are kept once.
    """
    networks = (m for m in method.modules() if isinstance(m, Autoencoder | Backbone))
    trained = next((n for n in networks if any(p.requires_grad for p in n.parameters())), None)
    if trained is None:
        return 0.0
    backbone = backbone_of(trained)
    side = data.image_size or backbone.image_size
    if side is None:
        raise ValueError("data.init_args.image_size is null, and the backbone takes any; set it")
    views = [(1, side)]
    if isinstance(data, MultiCropDataModule):
        views = [(2, side), (data.num_local, data.local_size)]
    kept = []
    # Unlike those on the meta device, fake tensors of a CPU know autocast.
    # Tables of constants are none.
    with FakeTensorMode(allow_non_fake_inputs=True):
        trained.to_empty(device="cpu")
        for images in (1, 2):
            groups = [
                torch.zeros(count * images, backbone.in_channels, *size)
                for count, size in views
                if count
            ]
            kept.append(bytes_kept(trained, groups, is_half))
    return float(kept[1] - kept[0])


def backbone_of(network: Autoencoder | Backbone) -> Backbone:
    return network.backbone if isinstance(network, Autoencoder) else network


def bytes_kept(network: Autoencoder | Backbone, groups: list[Tensor], is_half: bool) -> int:
    """Bytes of distinct tensors that a forward pass in training saves for its backward pass.

    Where blocks are computed again in it, those that the largest one saves then come on top.
    """
    network.train()
    backbone = backbone_of(network)
    inputs: list[Any] = [groups if len(groups) > 1 else groups[0]]
    if isinstance(network, Autoencoder):
        inputs.append(network.mask(inputs[0], torch.arange(len(inputs[0]))))
    half = torch.autocast("cpu", torch.bfloat16) if is_half else contextlib.nullcontext()
    with half:
        with noting_calls() as calls, of_timms_blocks(backbone, calls):
            kept = sum(saved(network, *inputs).values())
        return kept + max((computed_again(*call) for call in calls), default=0)


@contextlib.contextmanager
def of_timms_blocks(backbone: Backbone, calls: list[Call]) -> Iterator[None]:
    """Note those of blocks that timm computes again as well."""
    again = units(backbone) if isinstance(backbone, Timm) and backbone.recompute else []
    hooks = [block.register_forward_pre_hook(lambda *call: calls.append(call)) for block in again]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def computed_again(function: Callable[..., Any], inputs: tuple[Any, ...]) -> int:
    """Bytes that a function saves beside its inputs, which are kept already."""
    given = [leaf for leaf in tree_leaves(inputs) if isinstance(leaf, Tensor)]
    known = {tensor.untyped_storage()._cdata for tensor in given}
    return sum(size for key, size in saved(function, *inputs).items() if key not in known)


def saved(function: Callable[..., Any], *inputs: Any) -> dict[int, int]:
    """Bytes of the distinct storages that a module or function saves for its backward pass."""
    storages: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        storages[storage._cdata] = storage.nbytes()
        return tensor

    with saved_tensors_hooks(pack, lambda tensor: tensor):
        out: Any = function(*inputs)
    del out
    return storages
