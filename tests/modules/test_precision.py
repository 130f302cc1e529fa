"""float16 with a gradient scaler: gradients are clipped as they are, not as they were scaled."""

from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer, seed_everything
from lightning.pytorch.plugins import MixedPrecision
from torch import Tensor

from modules.backbones import ViT
from modules.optim import Optimization
from tests import small

SCALE = 2.0**10


class Gradients(Callback):
    """Every gradient of the first step as the optimizer gets it."""

    def __init__(self) -> None:
        self.seen: dict[str, Tensor] = {}

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        def keep(*_: Any) -> None:
            if not self.seen:
                named = pl_module.named_parameters()
                self.seen = {n: p.grad.clone() for n, p in named if p.grad is not None}

        trainer.optimizers[0].register_step_pre_hook(keep)


def first_gradients(directory: Path, clip_norm: float | None, plugins: list[Any]) -> dict[str, Any]:
    kept = Gradients()
    seed_everything(7, verbose=False)  # before the backbone
    per_tensor = clip_norm is not None
    how = Optimization("sgd", clip_norm=clip_norm, clip_per_parameter=per_tensor)
    method = small.method(backbone=ViT("mu", 8, 16, 1), optimizer=how)
    trainer = small.trainer(directory, kept, max_steps=2, limit_val_batches=0, plugins=plugins)
    trainer.fit(method, small.data())
    return kept.seen


def total(gradients: dict[str, Tensor]) -> float:
    return float(torch.stack([gradient.norm() for gradient in gradients.values()]).norm())


@pytest.mark.filterwarnings("ignore")
def test_gradients_are_clipped_after_they_were_unscaled(tmp_path: Path) -> None:
    def half() -> list[Any]:
        return [MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu", init_scale=SCALE))]

    whole, free = (first_gradients(tmp_path, None, plugins) for plugins in ([], half()))
    assert total(free) == pytest.approx(total(whole), rel=0.02)
    norms = {name: float(gradient.norm()) for name, gradient in free.items()}
    limit = sorted(norms.values())[len(norms) // 2]
    clipped = first_gradients(tmp_path, limit, half())
    assert clipped.keys() == free.keys() == whole.keys()
    for name, gradient in clipped.items():
        expected = free[name] * min(1.0, limit / (norms[name] + 1e-12))
        torch.testing.assert_close(gradient, expected, rtol=1e-4, atol=1e-7, msg=name)
