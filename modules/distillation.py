"""Distillation from a trained network through a token of its own.

"Training data-efficient image transformers & distillation through attention" (Touvron et al.
2020, section 4), with the averages of its published code:

    base = loss(head(cls), label)                           as without a teacher
    hard = -log softmax(head_dist(dist))[argmax teacher]
    soft = tau^2 KL(softmax(teacher / tau), softmax(head_dist(dist) / tau)) / k
    loss = mean over images of (1 - alpha) base + alpha (hard or soft)
"""

import hashlib
import pickle
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import timm
import torch
import torch.nn.functional as F
from jaxtyping import Float
from safetensors import SafetensorError
from timm.models import load_state_dict
from torch import Tensor, nn

PRETRAINED = "pretrained"


@dataclass(frozen=True)
class Distillation:
    """What a distillation token learns from.

    Args:
        teacher: name of a timm model, such as DeiT's RegNetY-16GF.
        weights: the teacher's checkpoint, a `.safetensors` file or a torch file of tensors
            (those under "model" or "state_dict" where it has them); or "pretrained": timm's
            own, downloaded once.
        kind: "hard" takes the teacher's answer for the label, "soft" its probabilities.
        alpha: share of the distillation in the loss.
        tau: temperature of the probabilities; "soft" only.

    Raises:
        ValueError: a value out of its range, or one that nothing would read.
    """

    teacher: str = "regnety_160.deit_in1k"
    weights: str | None = None
    kind: Literal["hard", "soft"] = "hard"
    alpha: float = 0.5
    tau: float = 1.0

    def __post_init__(self) -> None:
        if self.kind not in ("hard", "soft"):
            raise ValueError(f"distillation.kind is {self.kind!r}; expected 'hard' or 'soft'")
        if not 0 < self.alpha < 1:
            raise ValueError(
                f"distillation.alpha is {self.alpha}; expected between 0 and 1, where both heads "
                f"are trained"
            )
        if self.tau <= 0:
            raise ValueError(f"distillation.tau is {self.tau}; expected more than 0")
        if self.kind == "hard" and self.tau != type(self).tau:
            raise ValueError(
                f"distillation.tau is {self.tau}, but hard distillation has no temperature; "
                f"remove it or set distillation.kind to soft"
            )


def distill(
    how: Distillation,
    base: Float[Tensor, " b"],
    student: Float[Tensor, "b k"],
    teacher: Float[Tensor, "b k"],
) -> Float[Tensor, " b"]:
    """The loss of every image: `base`, and the logits of the student's own head for the teacher.

    The published soft loss is divided by b k, the number of logits, so it is small.
    """
    student, teacher = student.float(), teacher.float()
    if how.kind == "hard":
        learned = F.cross_entropy(student, teacher.argmax(dim=-1), reduction="none")
    else:
        given = F.log_softmax(teacher / how.tau, dim=-1)
        missed = given - F.log_softmax(student / how.tau, dim=-1)
        learned = how.tau**2 * (given.exp() * missed).mean(dim=-1)
    return (1 - how.alpha) * base + how.alpha * learned


class Teacher:
    """A frozen network, always in eval mode, that stands beside a method and is no part of it.

    It is no `nn.Module` on purpose: neither the optimiser, `train()`, DDP nor the checkpoint
    reaches it. The weights come from a file that never changes, so a checkpoint (which would
    grow by 330 MB with a RegNetY-16GF) keeps their fingerprint instead: a run goes on with
    the very same teacher, or not at all.

    Args:
        how: which teacher.
        num_classes: classes that it must know.
        in_channels: channels of the images that it will see.
        image_size: their height and width.

    Raises:
        ValueError: no weights, ones that do not fit, or images that it cannot take.
    """

    def __init__(
        self, how: Distillation, num_classes: int, in_channels: int, image_size: tuple[int, int]
    ) -> None:
        self.how = how
        self.network = load(how, num_classes, in_channels).requires_grad_(False).eval()
        self.fingerprint = fingerprint(self.network)
        try:
            self(torch.zeros(1, in_channels, *image_size))
        except (AssertionError, RuntimeError) as error:
            raise ValueError(
                f"teacher {how.teacher} cannot take {in_channels}-channel images of "
                f"{image_size[0]}x{image_size[1]}: {error}"
            ) from error

    @torch.no_grad()
    def __call__(self, images: Float[Tensor, "b c height width"]) -> Float[Tensor, "b k"]:
        logits: Tensor = self.network(images)
        return logits

    def to(self, weight: Tensor) -> None:
        """Move to the device and dtype of a weight of the student."""
        self.network.to(weight)

    def check_fingerprint(self, known: str | None) -> None:
        """Refuse to go on with a run that another teacher began; None is a run without one."""
        if known not in (None, self.fingerprint):
            raise ValueError(
                f"this run began with another teacher than distillation.teacher "
                f"{self.how.teacher} with weights {self.how.weights}; give it the same weights"
            )

    def check_normalization(self, mean: Sequence[float], std: Sequence[float]) -> None:
        """Refuse images that are normalised otherwise than timm's weights expect.

        Nothing is known of the weights of a file.
        """
        if self.how.weights != PRETRAINED:
            return
        config: Any = self.network.pretrained_cfg
        expected = [tuple(config[key]) for key in ("mean", "std")]
        if [tuple(mean), tuple(std)] != expected and len(mean) == len(expected[0]):
            raise ValueError(
                f"the data's mean {tuple(mean)} and std {tuple(std)} are not those of teacher "
                f"{self.how.teacher}; set data.init_args.mean to {expected[0]} and std to "
                f"{expected[1]}"
            )


def load(how: Distillation, num_classes: int, in_channels: int) -> nn.Module:
    """The teacher with its weights."""
    if not timm.is_model(how.teacher):
        raise ValueError(f"distillation.teacher {how.teacher!r} is no model that timm knows")
    if how.weights is None:
        raise ValueError(
            f"teacher {how.teacher} has no weights, and an untrained one teaches noise; set "
            f"distillation.weights to a checkpoint of it, or to {PRETRAINED!r} for timm's"
        )
    if how.weights == PRETRAINED:
        return pretrained(how.teacher, num_classes, in_channels)
    if not Path(how.weights).is_file():
        raise ValueError(f"distillation.weights: there is no file {how.weights}")
    try:
        state = load_state_dict(how.weights, use_ema=False, weights_only=True)
    except (RuntimeError, pickle.UnpicklingError, EOFError, SafetensorError) as error:
        raise ValueError(
            f"refused {how.weights}: it is damaged, or holds pickled objects, which could run "
            f"code when loaded; save a state dict of tensors ({error})"
        ) from error
    network: nn.Module = timm.create_model(
        how.teacher, num_classes=num_classes, in_chans=in_channels
    )
    try:
        network.load_state_dict(state)
    except RuntimeError as error:
        raise ValueError(
            f"{how.weights} does not fit teacher {how.teacher} with {num_classes} classes: {error}"
        ) from error
    return network


def pretrained(name: str, num_classes: int, in_channels: int) -> nn.Module:
    """A timm model with timm's weights, which must know as many classes."""
    try:
        # With `num_classes` given, timm would quietly draw a new head.
        network: nn.Module = timm.create_model(name, pretrained=True, in_chans=in_channels)
    except Exception as error:  # whatever a download may raise
        raise ValueError(
            f"timm's weights of {name} could not be had ({type(error).__name__}: {error}); "
            f"without a network, set distillation.weights to a file"
        ) from error
    if network.num_classes != num_classes:
        raise ValueError(
            f"teacher {name} knows {network.num_classes} classes, but model.num_classes is "
            f"{num_classes}; fine-tune it on these classes and set distillation.weights to the "
            f"result"
        )
    return network


def fingerprint(network: nn.Module) -> str:
    """SHA-256 of the names and values of all weights."""
    digest = hashlib.sha256()
    for name, value in sorted(network.state_dict().items()):
        digest.update(name.encode())
        digest.update(memoryview(value.cpu().contiguous().reshape(-1).view(torch.uint8).numpy()))
    return digest.hexdigest()
