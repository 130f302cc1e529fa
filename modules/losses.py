"""Losses on labels that are shared out over classes."""

import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from datamodules.batch import ImageBatch, PackedBatch

LOSSES = ("softmax", "sigmoid", "bce")


def soft_targets(
    batch: ImageBatch | PackedBatch, num_classes: int, smoothing: float
) -> Float[Tensor, "b k"]:
    """Targets that sum to one: smoothed one-hot labels, in the shares of a mixed batch.

    A label has 1 - smoothing + smoothing / k, every other class smoothing / k.
    """
    targets = F.one_hot(batch.labels, num_classes).float()
    if batch.mixed is not None:
        share = batch.mixed.share[:, None]
        targets = share * targets + (1 - share) * F.one_hot(batch.mixed.labels, num_classes)
    return targets * (1 - smoothing) + smoothing / num_classes


def soft_cross_entropy(
    logits: Float[Tensor, "b k"], targets: Float[Tensor, "b k"]
) -> Float[Tensor, " b"]:
    """-sum_k target_k log softmax(logits)_k for every image, in float32."""
    return -(targets * F.log_softmax(logits.float(), dim=-1)).sum(dim=-1)


def loss_per_image(
    loss: str, logits: Float[Tensor, "b k"], targets: Float[Tensor, "b k"]
) -> Float[Tensor, " b"]:
    """One of `LOSSES` for every image, in float32."""
    if loss == "softmax":
        return soft_cross_entropy(logits, targets)
    if loss == "sigmoid":
        entries = F.binary_cross_entropy_with_logits(logits.float(), targets, reduction="none")
        return entries.sum(dim=-1)
    wanted = (targets > 0).float()
    return F.binary_cross_entropy_with_logits(logits.float(), wanted, reduction="none").mean(dim=-1)
