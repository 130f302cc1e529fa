"""Optimisers: parameter groups, the rule that scales the learning rate, clipping.

`Optimization` describes how a method is optimised; `build` makes the torch optimiser,
`learning_rate` its schedule, `set_lr` applies that, `clip` clips gradients. The only state of
a schedule is the trainer's step counter.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from lightning.pytorch import Trainer
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from modules.schedules import warmup_cosine


@dataclass(frozen=True)
class Optimization:
    """How to optimise.

    Args:
        name: "adamw" (decoupled decay) or "sgd" (with momentum).
        base_lr: learning rate for a global batch of `reference_batch` images.
        reference_batch: the peak learning rate is base_lr * global batch / reference_batch,
            where the global batch counts every device and accumulated micro-batch. None takes
            base_lr as it is.
        weight_decay: for weight matrices; biases, norms and a backbone's declared tokens have
            none.
        momentum: SGD's momentum, or AdamW's beta 1.
        beta2: AdamW's beta 2; not for SGD.
        warmup_epochs: linear warm-up from 0, then a cosine over the rest of the run. May be a
            fraction.
        min_lr: where the cosine ends; not scaled by the batch.
        clip_norm: gradients are scaled down to this norm; None leaves them.
        clip_per_parameter: clip every tensor on its own, as DINO does, not the global norm.

    Raises:
        ValueError: a value out of its range, or one that nothing would read.
    """

    name: Literal["adamw", "sgd"] = "adamw"
    base_lr: float = 5e-4
    reference_batch: int | None = 512
    weight_decay: float = 0.05
    momentum: float = 0.9
    beta2: float = 0.999
    warmup_epochs: float = 5.0
    min_lr: float = 1e-6
    clip_norm: float | None = None
    clip_per_parameter: bool = False

    def __post_init__(self) -> None:
        if self.name not in ("adamw", "sgd"):
            raise ValueError(f"optimizer {self.name!r} is not known; expected 'adamw' or 'sgd'")
        if self.name == "sgd" and self.beta2 != type(self).beta2:
            raise ValueError(f"beta2 is {self.beta2}, but sgd has no beta2; remove it")
        if self.clip_per_parameter and self.clip_norm is None:
            raise ValueError("clip_per_parameter is set but clip_norm is not; set clip_norm")
        if self.reference_batch is not None and self.reference_batch < 1:
            raise ValueError(f"reference_batch is {self.reference_batch}; expected at least 1")
        for field in ("base_lr", "weight_decay", "momentum", "warmup_epochs", "min_lr"):
            if getattr(self, field) < 0:
                raise ValueError(f"{field} is {getattr(self, field)}; expected 0 or more")
        if self.clip_norm is not None and self.clip_norm <= 0:
            raise ValueError(f"clip_norm is {self.clip_norm}; expected more than 0, or null")


def parameter_groups(
    module: nn.Module, weight_decay: float, no_decay: Iterable[str] = ()
) -> list[dict[str, Any]]:
    """Split the trainable parameters of `module` into one group with decay and one without.

    Without: tensors of fewer than two axes (biases, norm scales), names ending in `.bias`, and
    the names in `no_decay`. Every trainable parameter is in exactly one group.

    Returns:
        Groups for a torch optimiser, each with its `name` and its `param_names`.

    Raises:
        ValueError: a name in `no_decay` that is no parameter, or nothing to train.
    """
    named = dict(module.named_parameters())
    unknown = set(no_decay) - set(named)
    if unknown:
        raise ValueError(f"no_decay names no parameter of {type(module).__name__}: {unknown}")
    groups: dict[str, dict[str, Any]] = {
        "decay": {"params": [], "param_names": [], "weight_decay": weight_decay},
        "no decay": {"params": [], "param_names": [], "weight_decay": 0.0},
    }
    for name, parameter in named.items():
        if not parameter.requires_grad:
            continue
        exempt = parameter.ndim < 2 or name.endswith(".bias") or name in set(no_decay)
        group = groups["no decay" if exempt else "decay"]
        group["params"].append(parameter)
        group["param_names"].append(name)
    filled = [{"name": name, **group} for name, group in groups.items() if group["params"]]
    if not filled:
        raise ValueError(f"{type(module).__name__} has no trainable parameter")
    return filled


def describe_groups(groups: Sequence[dict[str, Any]]) -> str:
    """The groups as a table: tensors, parameters, decay and a few names of each."""
    table = Table("group", "tensors", "parameters", "weight decay", "such as", title="optimised")
    for group in groups:
        names = [name.removeprefix("backbone.") for name in group["param_names"]]
        shown = ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")
        count = sum(parameter.numel() for parameter in group["params"])
        table.add_row(
            group["name"], str(len(names)), f"{count:,}", f"{group['weight_decay']:g}", shown
        )
    console = Console(width=110)
    with console.capture() as capture:
        console.print(table)
    return capture.get()


def build(
    how: Optimization, module: nn.Module, no_decay: Iterable[str] = ()
) -> torch.optim.Optimizer:
    """The torch optimiser over `module`'s trainable parameters; prints the groups once."""
    groups = parameter_groups(module, how.weight_decay, no_decay)
    rank_zero_info("\n" + describe_groups(groups))
    if how.name == "sgd":
        return torch.optim.SGD(groups, lr=how.base_lr, momentum=how.momentum)
    # On CUDA the fused kernel would un-scale fp16 gradients itself, after our clipping.
    on_cpu = all(parameter.device.type == "cpu" for g in groups for parameter in g["params"])
    return torch.optim.AdamW(
        groups, lr=how.base_lr, betas=(how.momentum, how.beta2), fused=on_cpu or None
    )


def global_batch(trainer: Trainer) -> int:
    """Images in one optimizer step: per device, times devices, times accumulated batches."""
    loader = trainer.train_dataloader
    if loader is None:
        raise ValueError("the global batch is known only once training has its data loader")
    size = getattr(loader, "batch_size", None)
    if size is None:
        size = getattr(getattr(loader, "batch_sampler", None), "batch_size", None)
    if size is None:
        raise ValueError(
            f"the batch size of {type(loader).__name__} is not known, so the learning rate "
            f"cannot be scaled; set optimizer.reference_batch to null and base_lr to the rate"
        )
    return int(size) * trainer.world_size * trainer.accumulate_grad_batches


@dataclass(frozen=True)
class LearningRate:
    """A learning rate as a pure function of the optimizer step: warm-up, then cosine."""

    peak: float
    end: float
    warmup: int
    total: int

    def at(self, step: int) -> float:
        return warmup_cosine(step, self.total, self.warmup, self.peak, end=self.end)


def learning_rate(how: Optimization, trainer: Trainer) -> LearningRate:
    """The schedule of this run; call it once training has its data loader (`on_train_start`).

    The peak is linear in the global batch (Goyal et al. 2017, section 2.1).

    Raises:
        ValueError: a run without an end.
    """
    if trainer.estimated_stepping_batches == float("inf"):
        raise ValueError(
            "the run has no end, so its cosine has none; set trainer.max_epochs or max_steps"
        )
    total = int(trainer.estimated_stepping_batches)
    steps_per_epoch = -(-int(trainer.num_training_batches) // trainer.accumulate_grad_batches)
    warmup = round(how.warmup_epochs * steps_per_epoch)
    if warmup > total:
        rank_zero_warn(
            f"the warm-up of {how.warmup_epochs:g} epochs is {warmup} steps, but the run has "
            f"{total}: the learning rate only rises"
        )
    scale = 1.0 if how.reference_batch is None else global_batch(trainer) / how.reference_batch
    return LearningRate(how.base_lr * scale, how.min_lr, min(warmup, total), total)


def set_lr(optimizer: torch.optim.Optimizer, lr: float) -> None:
    """Give every group the rate `lr` times its own `lr_scale`, where it has one."""
    for group in optimizer.param_groups:
        group["lr"] = lr * group.get("lr_scale", 1.0)


def clip(how: Optimization, parameters: Iterable[Tensor]) -> None:
    """Scale gradients down to `clip_norm`, over all of them or each tensor on its own."""
    if how.clip_norm is None:
        return
    with_grad = [parameter for parameter in parameters if parameter.grad is not None]
    if not how.clip_per_parameter:
        torch.nn.utils.clip_grad_norm_(with_grad, how.clip_norm)
        return
    for parameter in with_grad:
        torch.nn.utils.clip_grad_norm_([parameter], how.clip_norm)
