"""Exponential moving average of one network into another."""

from collections.abc import Sequence
from typing import Any, Literal, NamedTuple, Protocol

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor, nn


class Average(NamedTuple):
    """target <- decay * target + (1 - decay) * source, for every parameter.

    buffers: what becomes of them: "copy" takes the source's as they are; "average" treats those
             of floating point like parameters (timm's ModelEma) and copies the others; "keep"
             leaves them to the target, whose batch norms see data themselves (DINO, MoCo).
    """

    target: nn.Module
    source: nn.Module
    decay: float
    buffers: Literal["copy", "average", "keep"] = "copy"


class HasAverages(Protocol):
    """What the callback needs: the pairs to advance after optimizer step `step` (from 1)."""

    def averages(self, step: int) -> Sequence[Average]: ...


@torch.no_grad()
def advance(average: Average) -> None:
    """One update, fused over tensors. The target is float32 whatever the source trains in.

    Low precision targets would not move at usual decays, so they are refused.

    Raises:
        ValueError: a target that is not float32 or float64.
    """
    targets: list[Tensor] = list(average.target.parameters())
    current: list[Tensor] = list(average.source.parameters())
    pairs = zip(average.target.buffers(), average.source.buffers(), strict=True)
    for kept, buffer in pairs:
        if average.buffers == "average" and kept.is_floating_point():
            targets.append(kept)
            current.append(buffer)
        elif average.buffers != "keep":
            kept.copy_(buffer)
    sources = [source.to(t.dtype) for t, source in zip(targets, current, strict=True)]
    for target in targets:
        if target.dtype not in (torch.float32, torch.float64):
            raise ValueError(
                f"an average in {target.dtype} would not move at decay {average.decay}; "
                f"keep it in float32 (precision '32-true' or 'bf16-mixed')"
            )
    torch._foreach_lerp_(targets, sources, 1.0 - average.decay)


class EMA(Callback):
    """Advances a method's averages once an optimizer step, never per micro-batch."""

    def __init__(self) -> None:
        self.step = 0

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.step = trainer.global_step

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        if trainer.global_step == self.step:
            return
        self.step = trainer.global_step
        method: HasAverages = pl_module  # type: ignore[assignment]
        for average in method.averages(self.step):
            advance(average)
