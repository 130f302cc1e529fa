"""Groups of parameters: with and without weight decay, each layer with a rate of its own."""

from collections.abc import Callable, Iterable, Sequence
from typing import Any, Protocol, runtime_checkable

from rich.console import Console
from rich.table import Table
from torch import nn


@runtime_checkable
class Layered(Protocol):
    """What layer decay asks of a network: L, and 0 (stem) to L + 1 (head) for each parameter."""

    @property
    def num_layers(self) -> int: ...

    def layer_of(self, name: str) -> int: ...


def layer_scale(module: nn.Module, name: str, decay: float | None) -> float:
    """The factor of a parameter's learning rate: decay^(L + 1 - layer), 1 without decay.

    Raises:
        ValueError: a network that does not know its layers.
    """
    if decay is None:
        return 1.0
    if not isinstance(module, Layered):
        raise ValueError(
            f"layer_decay is {decay}, but {type(module).__name__} has no layer_of and num_layers; "
            f"set optimizer.layer_decay to null"
        )
    return decay ** (module.num_layers + 1 - module.layer_of(name))


def parameter_groups(
    module: nn.Module,
    weight_decay: float,
    no_decay: Iterable[str] = (),
    layer_decay: float | None = None,
    own_scale: Callable[[str], float] = lambda name: 1.0,
) -> list[dict[str, Any]]:
    """Split the trainable parameters of `module` into groups with and without weight decay.

    Without: tensors of fewer than two axes (biases, norm scales), names ending in `.bias`, and
    the names in `no_decay`. With `layer_decay` every layer has its own two groups; `own_scale`
    is a further factor of the rate by a parameter's name. Every trainable parameter is in exactly
    one group.

    Returns:
        Groups for a torch optimiser, each with its `name`, its `param_names` and the `lr_scale`
        that `set_lr` applies.

    Raises:
        ValueError: a name in `no_decay` that is no parameter, nothing to train, or layer decay
            for a network that does not know its layers.
    """
    named, exempt_names = dict(module.named_parameters()), set(no_decay)
    if unknown := exempt_names - set(named):
        raise ValueError(f"no_decay names no parameter of {type(module).__name__}: {unknown}")
    groups: dict[tuple[float, str], dict[str, Any]] = {}
    for name, parameter in named.items():
        if not parameter.requires_grad:
            continue
        exempt = parameter.ndim < 2 or name.endswith(".bias") or name in exempt_names
        kind = "no decay" if exempt else "decay"
        scale = layer_scale(module, name, layer_decay) * own_scale(name)
        empty: dict[str, Any] = {"name": kind, "params": [], "param_names": [], "lr_scale": scale}
        group = groups.setdefault((scale, kind), empty)
        group["weight_decay"] = 0.0 if exempt else weight_decay
        group["params"].append(parameter)
        group["param_names"].append(name)
    if not groups:
        raise ValueError(f"{type(module).__name__} has no trainable parameter")
    return [groups[key] for key in sorted(groups)]


def describe_groups(groups: Sequence[dict[str, Any]]) -> str:
    """The groups as a table: rate, tensors, parameters, decay and a few names of each."""
    columns = ("group", "rate", "tensors", "parameters", "weight decay", "such as")
    table = Table(*columns, title="optimised")
    for group in groups:
        names = [name.removeprefix("backbone.") for name in group["param_names"]]
        shown = ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")
        count = sum(parameter.numel() for parameter in group["params"])
        rate, decay = f"x {group['lr_scale']:.4g}", f"{group['weight_decay']:g}"
        table.add_row(group["name"], rate, str(len(names)), f"{count:,}", decay, shown)
    console = Console(width=110)
    with console.capture() as capture:
        console.print(table)
    return capture.get()
