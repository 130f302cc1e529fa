"""Targets of images and tokens out of a teacher's scores, and cross-entropy without dense ones.

A softmax over m scores and k - m equal ones is a constant and m terms, so that

    -sum_c y_c log softmax(l)_c = sum_c y_c * logsumexp(l) - base * sum_c l_c - sum_j w_j l_(id_j)

needs one logsumexp, one sum and one gather of the logits.
"""

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor
from torch.autograd.function import once_differentiable

from datamodules.batch import ImageBatch, SparseScores, TokenLabelBatch
from modules.losses import soft_targets

AGREE, DIFFER = 0.5, 0.9  # the teacher's share beside the ground truth, as published
PIECE = 1 << 19  # logits that are worked on at once


def beside(teacher: Float[Tensor, "b k"], labels: Float[Tensor, "b k"]) -> Float[Tensor, "b k"]:
    """The teacher's targets with the ground truth having a part in them."""
    agrees = teacher.argmax(dim=-1, keepdim=True) == labels.argmax(dim=-1, keepdim=True)
    return torch.lerp(labels, teacher, torch.where(agrees, AGREE, DIFFER))


def class_targets(
    batch: TokenLabelBatch | ImageBatch, num_classes: int, smoothing: float, ground_truth: bool
) -> Float[Tensor, "b k"]:
    """The target of each image before tokens are mixed."""
    if isinstance(batch, ImageBatch):
        return soft_targets(batch, num_classes, smoothing)
    targets = batch.pooled.float().softmax(dim=-1)
    if ground_truth:
        targets = beside(targets, F.one_hot(batch.labels, num_classes).float())
    return targets * (1 - smoothing) + smoothing / num_classes


class SparseTargets(NamedTuple):
    """Targets y of tokens: y_c = base + the sum of the weights of entries of class c.

    base:    [b, n]
    ids:     [b, n, m]
    weights: [b, n, m]
    """

    base: Float[Tensor, "b n"]
    ids: Int[Tensor, "b n m"]
    weights: Float[Tensor, "b n m"]


def softmax_targets(scores: SparseScores, num_classes: int, smoothing: float) -> SparseTargets:
    """softmax(scores), of which `smoothing` is shared out evenly over all classes."""
    values = scores.values.float()
    shift = values.amax(dim=-1, keepdim=True).clamp(min=0)
    other = (-shift).exp()
    above = (values - shift).exp() - other
    total = num_classes * other + above.sum(dim=-1, keepdim=True)
    keep = 1 - smoothing
    base = keep * (other / total)[..., 0] + smoothing / num_classes
    return SparseTargets(base, scores.ids, keep * above / total)


def label_targets(
    batch: ImageBatch, num_tokens: int, num_classes: int, smoothing: float
) -> SparseTargets:
    """The image's label for every token, in the shares of a mixed batch."""
    ids, weights = batch.labels[:, None], torch.ones_like(batch.labels[:, None]).float()
    if batch.mixed is not None:
        share = batch.mixed.share[:, None]
        ids = torch.cat((ids, batch.mixed.labels[:, None]), dim=1)
        weights = torch.cat((share, 1 - share), dim=1)
    base = weights.new_full((len(ids), num_tokens), smoothing / num_classes)
    ids, weights = (x[:, None].expand(-1, num_tokens, -1) for x in (ids, weights))
    return SparseTargets(base, ids, (1 - smoothing) * weights)


def token_cross_entropy(
    logits: Float[Tensor, "b n k"], targets: SparseTargets
) -> Float[Tensor, " b"]:
    """The mean over tokens of -sum_c y_c log softmax(logits)_c for every image, in float32."""
    b, n, k = logits.shape
    rows = (logits.reshape(-1, k), targets.base.flatten())
    entries = (part.flatten(0, 1) for part in (targets.ids, targets.weights))
    losses: Tensor = SparseCrossEntropy.apply(*rows, *entries)
    return losses.view(b, n).mean(dim=1)


class SparseCrossEntropy(torch.autograd.Function):
    """Of rows of logits; works on pieces of them, so that only the gradient is of their size."""

    @staticmethod
    def forward(
        ctx: Any,
        logits: Float[Tensor, "r k"],
        base: Float[Tensor, " r"],
        ids: Int[Tensor, "r m"],
        weights: Float[Tensor, "r m"],
    ) -> Float[Tensor, " r"]:
        k = logits.shape[1]
        mass = k * base + weights.sum(dim=1)
        sums = [
            (part.logsumexp(dim=1), part.sum(dim=1), (part.gather(1, i.long()) * w).sum(dim=1))
            for part, i, w in zip(*pieces(k, logits, ids, weights), strict=True)
            for part in [part.float()]
        ]
        logsumexp, total, chosen = (torch.cat(column) for column in zip(*sums, strict=True))
        ctx.save_for_backward(logits, base, ids, weights, logsumexp, mass)
        return mass * logsumexp - base * total - chosen

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Float[Tensor, " r"]) -> tuple[Tensor | None, ...]:
        logits, *_ = saved = ctx.saved_tensors
        out = torch.empty_like(logits)
        parts = pieces(logits.shape[1], *saved, grad, out)
        for part, base, ids, weights, logsumexp, mass, scale, result in zip(*parts, strict=True):
            found = (part.float() - logsumexp[:, None]).exp_().mul_(mass[:, None])
            found.sub_(base[:, None]).scatter_add_(1, ids.long(), -weights)
            result.copy_(found.mul_(scale[:, None]))
        return out, None, None, None


def pieces(num_classes: int, *rows: Tensor) -> list[tuple[Tensor, ...]]:
    """Each tensor cut into pieces of as many rows as `PIECE` allows."""
    return [torch.split(tensor, max(1, PIECE // num_classes)) for tensor in rows]
