"""Optimisers, the rule that scales the learning rate, clipping.

`Optimization` describes how a method is optimised; `build` makes the torch optimiser,
`learning_rate` its schedule, `follow` applies schedules at a step, `clip` clips gradients. The
only state of a schedule is the trainer's step counter.
"""

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Literal

import torch
from lightning.pytorch import Trainer
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from timm.optim.lamb import Lamb
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from callbacks.ema import own_part
from modules.adamw import DataAdamW
from modules.groups import describe_groups, parameter_groups
from modules.lars import LARS
from modules.schedules import dino_cosine, noam, warmup_cosine, warmup_linear, warmup_rsqrt

NAMES = ("adamw", "sgd", "lamb", "lars", "rmsprop")
SCHEDULES = {
    "cosine": warmup_cosine,
    "linear": warmup_linear,
    "rsqrt": warmup_rsqrt,
    "dino_cosine": dino_cosine,
    "noam": noam,
}
SCALINGS = ("linear", "sqrt")


@dataclass(frozen=True)
class Optimization:
    """How to optimise.

    Args:
        name: "adamw" (decoupled decay), "sgd" (with momentum), "lamb" (timm's; its published
            recipes clip gradients to norm 1: set clip_norm), "lars" (`modules.lars`) or "rmsprop".
        base_lr: learning rate for a global batch of `reference_batch` images.
        reference_batch: the peak learning rate is base_lr * global batch / reference_batch,
            where the global batch counts every device and accumulated micro-batch. None takes
            base_lr as it is.
        scaling: "linear" in the global batch, as above (Goyal et al. 2017); "sqrt": base_lr *
            sqrt(global batch / reference_batch), as in DINOv2.
        weight_decay: for weight matrices; biases, norms and a backbone's declared tokens have
            none.
        weight_decay_end: where it goes over the run, by half a cosine (DINO: 0.04 to 0.4); null
            leaves it.
        momentum: momentum of SGD, LARS and RMSprop, beta 1 of AdamW and LAMB.
        beta2: beta 2 of AdamW and LAMB; share of the old mean of squares in RMSprop.
        eps: what AdamW, LAMB and RMSprop divide by at least.
        layer_decay: the rate of the layer below is this factor lower, from the head (1) over
            block i of L (layer_decay^(L - i), i from 0) to the stem (layer_decay^(L + 1)), as
            in BEiT and MAE; null for one rate.
        schedule: what follows the warm-up over the rest of the run: half a "cosine", a "linear"
            decay, or "rsqrt", a reciprocal square root that does not depend on the run's length;
            "dino_cosine" is half a cosine with the peak one step earlier, as DINO's code has it;
            "noam" the Transformer's, another reciprocal square root.
        cooldown_steps: the last steps of rsqrt, which go linearly to min_lr.
        warmup_epochs: length of the linear warm-up. May be a fraction.
        warmup_steps: its length in optimizer steps, in the place of warmup_epochs.
        warmup_lr: where it begins; not scaled by the batch.
        min_lr: where the schedule ends; not scaled by the batch.
        clip_norm: gradients are scaled down to this norm; None leaves them.
        clip_per_parameter: clip every tensor on its own, as DINO does, not the global norm.

    Raises:
        ValueError: a value out of its range, or one that nothing would read.
    """

    name: Literal["adamw", "sgd", "lamb", "lars", "rmsprop"] = "adamw"
    base_lr: float = 5e-4
    reference_batch: int | None = 512
    scaling: Literal["linear", "sqrt"] = "linear"
    weight_decay: float = 0.05
    weight_decay_end: float | None = None
    momentum: float = 0.9
    beta2: float = 0.999
    eps: float = 1e-8
    layer_decay: float | None = None
    schedule: Literal["cosine", "linear", "rsqrt", "dino_cosine", "noam"] = "cosine"
    cooldown_steps: int = 0
    warmup_epochs: float = 5.0
    warmup_steps: int | None = None
    warmup_lr: float = 0.0
    min_lr: float = 1e-6
    clip_norm: float | None = None
    clip_per_parameter: bool = False

    def __post_init__(self) -> None:
        if self.name not in NAMES:
            raise ValueError(f"optimizer {self.name!r} is not known; expected {', '.join(NAMES)}")
        if self.schedule not in SCHEDULES:
            raise ValueError(f"schedule is {self.schedule!r}; expected {', '.join(SCHEDULES)}")
        if self.scaling not in SCALINGS:
            raise ValueError(f"scaling is {self.scaling!r}; expected {', '.join(SCALINGS)}")
        self.check_unread()
        if self.reference_batch is not None and self.reference_batch < 1:
            raise ValueError(f"reference_batch is {self.reference_batch}; expected at least 1")
        not_negative = ("base_lr", "weight_decay", "momentum", "warmup_epochs", "min_lr")
        others = ("warmup_steps", "warmup_lr", "cooldown_steps", "weight_decay_end", "eps")
        for field in (*not_negative, *others):
            value = getattr(self, field)
            if value is not None and value < 0:
                raise ValueError(f"{field} is {value}; expected 0 or more")
        if self.layer_decay is not None and not 0 < self.layer_decay <= 1:
            raise ValueError(f"layer_decay is {self.layer_decay}; expected within (0, 1], or null")
        if self.clip_norm is not None and self.clip_norm <= 0:
            raise ValueError(f"clip_norm is {self.clip_norm}; expected more than 0, or null")

    def check_unread(self) -> None:
        """Refuse what is set beside something that keeps it from being read."""
        for field in ("beta2", "eps"):
            value = getattr(self, field)
            if self.name in ("sgd", "lars") and value != getattr(type(self), field):
                raise ValueError(f"{field} is {value}, but {self.name} has no {field}; remove it")
        if self.scaling != "linear" and self.reference_batch is None:
            raise ValueError(
                f"scaling is {self.scaling}, but reference_batch is null, so nothing is scaled; "
                f"set reference_batch"
            )
        if self.cooldown_steps and self.schedule != "rsqrt":
            raise ValueError(
                f"cooldown_steps is {self.cooldown_steps}, but schedule is {self.schedule}, which "
                f"ends at min_lr anyway; remove it or use rsqrt"
            )
        if self.clip_per_parameter and self.clip_norm is None:
            raise ValueError("clip_per_parameter is set but clip_norm is not; set clip_norm")
        if self.warmup_steps is not None and self.warmup_epochs != type(self).warmup_epochs:
            raise ValueError(
                f"warmup_epochs is {self.warmup_epochs:g} and warmup_steps {self.warmup_steps}; "
                f"give the length of the warm-up once"
            )
        length = self.warmup_epochs if self.warmup_steps is None else self.warmup_steps
        if self.schedule == "noam" and (length == 0 or self.warmup_lr != 0):
            raise ValueError(
                f"schedule noam rises over its warm-up from a step of its slope, but the warm-up "
                f"is {length:g} and warmup_lr {self.warmup_lr:g}; set the first, remove the other"
            )
        if self.warmup_lr != 0 and length == 0:
            raise ValueError(
                f"warmup_lr is {self.warmup_lr:g}, but there is no warm-up; remove it or set "
                f"warmup_epochs"
            )


def build(
    how: Optimization,
    module: nn.Module,
    no_decay: Iterable[str] = (),
    own_scale: Callable[[str], float] = lambda name: 1.0,
) -> torch.optim.Optimizer:
    """The torch optimiser over `module`'s trainable parameters; prints the groups once."""
    groups = parameter_groups(module, how.weight_decay, no_decay, how.layer_decay, own_scale)
    rank_zero_info("\n" + describe_groups(groups))
    betas = (how.momentum, how.beta2)
    if how.name == "sgd":
        return torch.optim.SGD(groups, lr=how.base_lr, momentum=how.momentum)
    if how.name == "rmsprop":
        return torch.optim.RMSprop(
            groups, lr=how.base_lr, alpha=how.beta2, eps=how.eps, momentum=how.momentum
        )
    if how.name == "lars":
        return LARS(groups, lr=how.base_lr, momentum=how.momentum)
    if how.name == "lamb":
        # DeiT-III's epsilon is the default. Clipping is `clip`'s, before the step as in the fused
        # kernel.
        return Lamb(groups, lr=how.base_lr, betas=betas, eps=how.eps, max_grad_norm=None)
    devices = {parameter.device.type for g in groups for parameter in g["params"]}
    if "xla" in devices:
        return DataAdamW(groups, lr=how.base_lr, betas=betas, eps=how.eps)
    # On CUDA the fused kernel would un-scale fp16 gradients itself, after our clipping.
    fused = True if devices == {"cpu"} else None
    return torch.optim.AdamW(groups, lr=how.base_lr, betas=betas, eps=how.eps, fused=fused)


def global_batch(trainer: Trainer) -> float:
    """Images in one optimizer step: per device, times devices, times accumulated batches.

    In packs their number varies from batch to batch; it is the mean then.
    """
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
    return float(size) * trainer.world_size * trainer.accumulate_grad_batches


@dataclass(frozen=True)
class LearningRate:
    """A learning rate as a pure function of the optimizer step: warm-up, then a way down."""

    peak: float
    end: float
    warmup: int
    total: int
    start: float = 0.0
    schedule: str = "cosine"
    cooldown: int = 0

    def at(self, step: int) -> float:
        arguments = (step, self.total, self.warmup, self.peak, self.start, self.end)
        if self.schedule == "rsqrt":
            return warmup_rsqrt(*arguments, self.cooldown)
        return SCHEDULES[self.schedule](*arguments)


def steps_in_epoch(trainer: Trainer) -> int:
    """Optimizer steps in an epoch; the last one may have fewer micro-batches."""
    return -(-int(trainer.num_training_batches) // trainer.accumulate_grad_batches)


def learning_rate(how: Optimization, trainer: Trainer) -> LearningRate:
    """The schedule of this run; call it once training has its data loader (`on_train_start`).

    The peak is linear in the global batch (Goyal et al. 2017, section 2.1) or in its root.

    Raises:
        ValueError: a run without an end, or one whose trainer clips gradients in our place.
    """
    if trainer.gradient_clip_val is not None:
        raise ValueError("set optimizer.clip_norm of the model, not trainer.gradient_clip_val")
    if trainer.estimated_stepping_batches == float("inf"):
        raise ValueError(
            f"the run has no end, so its {how.schedule} schedule has none; set "
            f"trainer.max_epochs or max_steps"
        )
    total = int(trainer.estimated_stepping_batches)
    warmup = how.warmup_steps
    if warmup is None:
        warmup = round(how.warmup_epochs * steps_in_epoch(trainer))
    if warmup > total:
        of = f" of {how.warmup_epochs:g} epochs" if how.warmup_steps is None else ""
        rank_zero_warn(
            f"the warm-up{of} is {warmup} steps, but the run has {total}: the learning rate only "
            f"rises"
        )
    highest = peak(how, 0.0 if how.reference_batch is None else global_batch(trainer))
    if how.schedule != "noam":  # whose slope has nothing to do with the end of the run
        warmup = min(warmup, total)
    cooldown = min(how.cooldown_steps, total)
    return LearningRate(highest, how.min_lr, warmup, total, how.warmup_lr, how.schedule, cooldown)


def peak(how: Optimization, images: float) -> float:
    """The learning rate at the end of the warm-up, for a global batch of so many images."""
    if how.reference_batch is None:
        return how.base_lr
    scale = images / how.reference_batch
    return how.base_lr * (math.sqrt(scale) if how.scaling == "sqrt" else scale)


def set_lr(optimizer: torch.optim.Optimizer, lr: float) -> None:
    """Give every group the rate `lr` times its own `lr_scale`, where it has one."""
    for group in optimizer.param_groups:
        group["lr"] = lr * group.get("lr_scale", 1.0)


def set_weight_decay(
    optimizer: torch.optim.Optimizer, how: Optimization, step: int, total: int
) -> float:
    """Give the groups that decay what step `step` of `total` has, and return it."""
    if how.weight_decay_end is None:
        return how.weight_decay
    value = warmup_cosine(step, total, 0, how.weight_decay, end=how.weight_decay_end)
    for group in optimizer.param_groups:
        if group["name"] == "decay":
            group["weight_decay"] = value
    return value


def follow(how: Optimization, rate: LearningRate, trainer: Trainer) -> tuple[float, float]:
    """Give the trainer's optimizer the rate and the weight decay of its step, and return them."""
    step, (optimizer,) = trainer.global_step, trainer.optimizers
    lr = rate.at(step)
    set_lr(optimizer, lr)
    return lr, set_weight_decay(optimizer, how, step, rate.total)


def clip(how: Optimization, parameters: Iterable[Tensor]) -> None:
    """Scale gradients down to `clip_norm`, over all of them or each tensor on its own."""
    if how.clip_norm is None:
        return
    if not how.clip_per_parameter:
        torch.nn.utils.clip_grad_norm_(parameters, how.clip_norm)
        return
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    if not gradients:
        return
    parts = [own_part(gradient) for gradient in gradients]
    norms = torch.stack(torch._foreach_norm(parts))
    if isinstance(gradients[0], DTensor):  # Pythagoras over devices, of all tensors at once
        norms = norms.square()
        torch.distributed.all_reduce(norms, group=gradients[0].device_mesh.get_group())
        norms = norms.sqrt()
    factors = how.clip_norm / (norms + 1e-6)
    for part, factor in zip(parts, factors.clamp(max=1.0), strict=True):
        part.mul_(factor)
