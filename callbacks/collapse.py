"""Whether self-distillation has collapsed, and which way.

"Emerging Properties in Self-Supervised Vision Transformers" (Caron et al. 2021, section 5.3):
centering alone ends in uniform outputs, sharpening alone in one dimension.
"""

import math
from collections.abc import Mapping
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from jaxtyping import Float
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor

from callbacks.host import log_number


class Diagnosed(Protocol):
    """What the callback needs.

    num_prototypes: outputs k
    diagnosed_from: optimizer step from which a network that learns is past its start
    training_step:  gives at log points "diagnosis", in nats `teacher_entropy` (mean entropy of the
                    targets) and `prototype_entropy` (that of their mean) and whatever else is to
                    be logged; and "embedding", [b, d] the teacher's features
    """

    num_prototypes: int

    def diagnosed_from(self) -> int: ...


def feature_std(features: Float[Tensor, "b d"]) -> Float[Tensor, ""]:
    """Standard deviation of features of length 1 over images, mean over channels, times sqrt(d).

    1 for directions drawn at random, 0 when all images are the same.
    """
    x = F.normalize(features.float(), dim=-1)
    spread: Tensor = x.std(dim=0, unbiased=False).mean() * math.sqrt(x.shape[1])
    return spread


def effective_rank(features: Float[Tensor, "b d"]) -> Float[Tensor, ""]:
    """exp of the entropy of the singular values, as shares of their sum (Roy & Vetterli 2007).

    Of features of length 1 without their mean: at most min(b - 1, d).
    """
    x = F.normalize(features.float(), dim=-1)
    values = torch.linalg.svdvals(x - x.mean(dim=0))
    shares = values / values.sum().clamp(min=1e-12)
    rank: Tensor = torch.special.entr(shares).sum().exp()
    return rank


def verdict(found: Mapping[str, float], num_prototypes: int) -> str | None:
    """Which way a network has collapsed, None where it has not."""
    largest = math.log(num_prototypes)
    if found["teacher_entropy"] > 0.99 * largest:
        return (
            f"the teacher's output is uniform (entropy {found['teacher_entropy']:.3f} of "
            f"ln k = {largest:.3f}): lower teacher_temperature, or its warm-up"
        )
    if found["prototype_entropy"] < 0.01 * largest:
        return (
            f"the teacher's output is one dimension (entropy of its mean "
            f"{found['prototype_entropy']:.3f} of ln k = {largest:.3f}): lower center_momentum or "
            f"the learning rate, or raise teacher_temperature"
        )
    if found["feature_std"] < 0.01:
        return (
            f"all images have the same features (standard deviation {found['feature_std']:.4f}, "
            f"1 for random directions): lower the learning rate or raise teacher_momentum"
        )
    return None


class Collapse(Callback):
    """Logs signs of collapse under `diagnosis/` at log points, and stops a run that shows them.

    The device is waited for at log points only.

    Args:
        stop: end the run with an error after `patience` log points in a row; last.ckpt of before
            the last of them stays. Without, only log.
        patience: such log points, counted once the method says that its start is over.
    """

    def __init__(self, stop: bool = True, patience: int = 20) -> None:
        if patience < 1:
            raise ValueError(f"patience is {patience}; expected at least 1")
        self.stop, self.patience, self.in_a_row = stop, patience, 0

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        is_due = "diagnosis" in outputs and trainer._logger_connector.should_update_logs
        if not is_due or trainer.fit_loop._should_accumulate():
            return
        features, signs = outputs["embedding"], dict(outputs["diagnosis"])
        own = features.cpu() if features.device.type == "xla" else features  # which has no SVD
        signs |= {"feature_std": feature_std(own), "effective_rank": effective_rank(own)}
        values = torch.stack([value.float().to(own.device) for value in signs.values()])
        values = trainer.strategy.reduce(values.to(features.device), reduce_op="mean")
        found = dict(zip(signs, values.tolist(), strict=True))
        for name, value in found.items():
            log_number(pl_module, f"diagnosis/{name}", value)
        if self.stop and len(features) > 1:
            self.judge(trainer, pl_module, found)

    def judge(
        self, trainer: Trainer, pl_module: LightningModule, found: Mapping[str, float]
    ) -> None:
        method: Diagnosed = pl_module  # type: ignore[assignment]
        how = verdict(found, method.num_prototypes)
        started = trainer.global_step > method.diagnosed_from()
        self.in_a_row = self.in_a_row + 1 if started and how is not None else 0
        if self.in_a_row >= self.patience:
            raise ValueError(
                f"the run has collapsed by step {trainer.global_step}: {how}. To go on regardless "
                f"set stop_on_collapse to false"
            )

    def state_dict(self) -> dict[str, int]:
        return {"in_a_row": self.in_a_row}

    def load_state_dict(self, state_dict: dict[str, int]) -> None:
        self.in_a_row = state_dict["in_a_row"]
