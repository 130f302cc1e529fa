"""Attention with a bias that learns, for windows: as `attention.attend`, faster to train on a CPU.

There torch has no fused kernel that gives the gradient of a bias, and what it falls back to scales
queries and keys, each in a copy, and looks for rows that see nothing. Windows are small and many,
so that such passes cost as much as the products. Elsewhere, and without gradients, `attend` is
called.
"""

from typing import Any

import torch
from einops import rearrange
from jaxtyping import Float
from torch import Tensor
from torch.autograd.function import once_differentiable

from modules.backbones.attention import attend


def attend_windows(
    joint: Float[Tensor, "w n d3"], bias: Float[Tensor, "groups h n n"]
) -> Float[Tensor, "w n d"]:
    """Softmax attention within windows, from the joint projection of q, k and v, heads joined.

    Window i has the bias i modulo `groups`.
    """
    if suits(joint, bias):
        out: Tensor = InPlace.apply(joint, bias)
        return out
    q, k, v = rearrange(joint, "w n (three h e) -> three w h n e", three=3, h=bias.shape[1])
    return rearrange(attend(q, k, v, for_all(bias, len(joint))), "w h n e -> w n (h e)")


def for_all(bias: Float[Tensor, "groups h n n"], windows: int) -> Float[Tensor, "#w h n n"]:
    """The bias of every window, those of one image after those of another."""
    if bias.shape[0] == 1:
        return bias
    return bias.expand(windows // bias.shape[0], -1, -1, -1, -1).flatten(0, 1)


def suits(joint: Tensor, bias: Tensor) -> bool:
    """A bias that learns, on a CPU, and nothing that a compiler or autocast would do better."""
    return (
        joint.device.type == "cpu"
        and bias.requires_grad
        and bias.dtype == joint.dtype
        and not torch.compiler.is_compiling()
    )


class InPlace(torch.autograd.Function):
    """softmax(q k^T / sqrt(e) + bias) v, and its gradients.

    With P the softmax and O the output:

        dV = P^T dO              dS = P * (dP - rowsum(P * dP)), dP = dO V^T
        dQ = dS K / sqrt(e)      dK = dS^T Q / sqrt(e)           dbias = sum of dS over images
    """

    @staticmethod
    def forward(
        ctx: Any, joint: Float[Tensor, "w n d3"], bias: Float[Tensor, "groups h n n"]
    ) -> Float[Tensor, "w n d"]:
        heads = bias.shape[1]
        cut = rearrange(joint, "w n (three h e) -> three w h n e", three=3, h=heads)
        q, k, v = cut.new_empty(cut.shape).copy_(cut).flatten(1, 2).unbind(0)
        q.mul_(q.shape[-1] ** -0.5)
        weights = torch.bmm(q, k.mT)
        by_bias(weights, bias.shape).add_(bias)
        torch.softmax(weights, dim=-1, out=weights)
        ctx.save_for_backward(q, k, v, weights)
        ctx.shape = bias.shape
        return rearrange(torch.bmm(weights, v), "(w h) n e -> w n (h e)", h=heads)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor]:
        q, k, v, weights = ctx.saved_tensors
        grad = rearrange(grads[0], "w n (h e) -> (w h) n e", h=ctx.shape[1])
        joint = grad.new_empty(3, *grad.shape)
        torch.bmm(weights.mT, grad, out=joint[2])
        scores = torch.bmm(grad, v.mT)
        scores = torch._softmax_backward_data(scores, weights, -1, scores.dtype)
        torch.bmm(scores, k, out=joint[0]).mul_(q.shape[-1] ** -0.5)
        torch.bmm(scores.mT, q, out=joint[1])
        bias = by_bias(scores, ctx.shape).sum(dim=0)
        return rearrange(joint, "three (w h) n e -> w n (three h e)", h=ctx.shape[1]), bias


def by_bias(scores: Float[Tensor, "wh n n"], shape: torch.Size) -> Float[Tensor, "b groups h n n"]:
    return scores.view(-1, *shape)
