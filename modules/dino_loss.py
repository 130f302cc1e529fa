"""What DINO compares: targets of the teacher, the loss between views, KoLeo, signs of collapse.

"Emerging Properties in Self-Supervised Vision Transformers" (Caron et al. 2021, section 3.1);
Sinkhorn-Knopp and KoLeo as in "DINOv2" (Oquab et al. 2023, section 4).

    for every teacher view i and student view v != i:
        loss += CE(q_i, softmax(s_v))          = logsumexp(s_v) - q_i . s_v
    loss /= number of such pairs

Written as it is computed: one logsumexp a student view, and since s_v = W z_v / temperature is
linear in the bottleneck z_v, q_i . sum_{v != i} s_v needs the sum of few bottlenecks only. Logits,
[views, images, k] with k of 65,536, exist for a few images at a time; all but the last ones are
computed again for the gradient.
"""

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor, nn

from modules.backbones.recomputed import recomputed

Rows = slice  # of the images of a batch
# What the teacher says of some images, [g, those images, k]; every row sums to one.
Targets = Callable[[Rows], Float[Tensor, "g c k"]]
# All devices' sum ("sum"), mean ("mean") or largest ("max") of a tensor, which may be overwritten.
Reduce = Callable[[Tensor, str], Tensor]

LOGITS = 2**24  # that exist at once: 64 MiB in float32


def alone(value: Tensor, op: str) -> Tensor:
    """`Reduce` of one device."""
    return value


def images_at_once(num_views: int, num_prototypes: int) -> int:
    return max(1, LOGITS // (num_views * num_prototypes))


def vectors_at_once(num_prototypes: int) -> int:
    return max(1, LOGITS // num_prototypes)


def chunks(num_images: int, at_once: int) -> list[Rows]:
    return [slice(start, start + at_once) for start in range(0, num_images, at_once)]


def view_loss(
    student: Float[Tensor, "v b e"],
    weight: Float[Tensor, "k e"],
    targets: Targets,
    temperature: float,
    at_once: int | None = None,
) -> Float[Tensor, " b"]:
    """The loss of every image, in float32 whatever autocast says.

    `student` are bottlenecks of all views, those that the teacher saw too first; `weight` is the
    student's last layer. `at_once`: images whose logits exist together.
    """
    views, b, _ = student.shape
    size = at_once or images_at_once(views, weight.shape[0])
    *first, last = chunks(b, size)
    losses = [
        recomputed(
            *(loss_of, student[:, rows], weight, targets, rows, temperature), draws_numbers=False
        )
        for rows in first
    ]
    # The last logits are the first that backward needs: they may as well stay.
    losses.append(loss_of(student[:, last], weight, targets, last, temperature))
    return torch.cat(losses)


def loss_of(
    student: Float[Tensor, "v c e"],
    weight: Float[Tensor, "k e"],
    targets: Targets,
    rows: Rows,
    temperature: float,
) -> Float[Tensor, " c"]:
    """`view_loss` of some images."""
    with torch.autocast(student.device.type, enabled=False):
        with torch.no_grad():
            q = targets(rows)
        views, taught = student.shape[0], q.shape[0]
        weight = weight.to(q.dtype)
        student = student.to(q.dtype) / temperature
        spread = F.linear(student, weight).logsumexp(dim=-1)
        others = student.sum(dim=0) - student[:taught]  # of the views v != i
        agreement = ((q @ weight) * others).sum(dim=-1)
        total = taught * spread.sum(dim=0) - spread[:taught].sum(dim=0) - agreement.sum(dim=0)
    return total / (taught * (views - 1))


def same_loss(
    student: Float[Tensor, "t e"],
    weight: Float[Tensor, "k e"],
    targets: Targets,
    temperature: float,
    at_once: int | None = None,
) -> Float[Tensor, " t"]:
    """CE(q_i, softmax(s_i)) of every vector i with its own target, as `view_loss` computes it.

    `targets` gives [1, those vectors, k].
    """
    losses = [
        recomputed(
            *(same_loss_of, student[rows], weight, targets, rows, temperature), draws_numbers=False
        )
        for rows in chunks(len(student), at_once or vectors_at_once(len(weight)))
    ]
    return torch.cat(losses)


def same_loss_of(
    student: Float[Tensor, "c e"],
    weight: Float[Tensor, "k e"],
    targets: Targets,
    rows: Rows,
    temperature: float,
) -> Float[Tensor, " c"]:
    """`same_loss` of some vectors."""
    with torch.autocast(student.device.type, enabled=False):
        with torch.no_grad():
            q = targets(rows)[0]
        weight = weight.to(q.dtype)
        student = student.to(q.dtype) / temperature
        spread = F.linear(student, weight).logsumexp(dim=-1)
        return spread - ((q @ weight) * student).sum(dim=-1)


class Center(nn.Module):
    """Centering: targets are softmax((W z - center) / temperature).

    The center follows the mean teacher logits, c <- momentum c + (1 - momentum) mean, over both
    views of all images of an optimizer step: every micro-batch of every device. Within a step it
    stays as it was, so that accumulating gradients changes nothing.
    """

    center: Tensor

    def __init__(self, num_prototypes: int, momentum: float) -> None:
        super().__init__()
        self.momentum = momentum
        self.register_buffer("center", torch.zeros(1, num_prototypes))
        # Not buffers: DDP would overwrite other devices' with those of the first.
        self.total: Tensor | None = None  # of bottlenecks, and at the end their number

    def targets(
        self, taught: Float[Tensor, "g b e"], weight: Float[Tensor, "k e"], temperature: float
    ) -> Targets:
        def of(rows: Rows) -> Float[Tensor, "g c k"]:
            with torch.autocast(taught.device.type, enabled=False):
                logits = F.linear(taught[:, rows].to(weight.dtype), weight)
                return ((logits - self.center) / temperature).softmax(dim=-1)

        return of

    @torch.no_grad()
    def add(
        self, taught: Float[Tensor, "g b e"], is_used: Bool[Tensor, "g b"] | None = None
    ) -> None:
        """Remember a micro-batch for the next `update`; logits are linear, so bottlenecks do.

        `is_used`: which of them count; all of them without.
        """
        taught = taught.to(self.center.dtype)
        number = taught.new_full((1,), taught.shape[0] * taught.shape[1])
        if is_used is not None:
            taught, number = taught * is_used[..., None], is_used.sum()[None].to(number)
        total = torch.cat((taught.sum(dim=(0, 1)), number))
        self.total = total if self.total is None else self.total + total

    @torch.no_grad()
    def update(self, weight: Float[Tensor, "k e"], reduce: Reduce = alone) -> None:
        """After the last micro-batch of a step; a step without anything used changes nothing."""
        assert self.total is not None
        total, number = reduce(self.total, "sum").tensor_split([-1])
        mean = F.linear(total / number.clamp(min=1.0), weight)[None]
        self.center.copy_(
            torch.where(number > 0, self.center.lerp(mean, 1.0 - self.momentum), self.center)
        )
        self.total = None


@torch.no_grad()
def sinkhorn_knopp(
    logits: Float[Tensor, "n k"], temperature: float, iterations: int = 3, reduce: Reduce = alone
) -> Float[Tensor, "n k"]:
    """Targets that use all prototypes alike over the batch of all devices (SwAV, DINOv2).

    Columns of exp(logits / temperature) are scaled so that prototypes weigh the same, then rows so
    that images do, in turn; here in logarithms, which no logit overflows.
    """
    log_q = logits / temperature
    for _ in range(iterations):
        largest = reduce(log_q.amax(dim=0), "max")
        total = reduce((log_q - largest).exp().sum(dim=0), "sum")
        log_q = log_q - largest - total.log()
        log_q = log_q.log_softmax(dim=-1)
    return log_q.exp()


@torch.no_grad()
def sinkhorn_targets(
    taught: Float[Tensor, "g b e"],
    weight: Float[Tensor, "k e"],
    temperature: float,
    reduce: Reduce = alone,
) -> Targets:
    """Sinkhorn-Knopp over both views of the batch of all devices; no center."""
    with torch.autocast(taught.device.type, enabled=False):
        logits = F.linear(taught.to(weight.dtype), weight)
        q = sinkhorn_knopp(logits.flatten(0, 1), temperature, reduce=reduce).view_as(logits)
    return lambda rows: q[:, rows]


def koleo(features: Float[Tensor, "b d"]) -> Float[Tensor, ""]:
    """-mean log distance to the nearest neighbour in the batch, of features of length 1.

    "Spreading vectors for similarity search" (Sablayrolles et al. 2019, equation 2).

    Raises:
        ValueError: a batch of one image, which has no neighbour.
    """
    if len(features) < 2:
        raise ValueError("koleo needs two images a batch at least; set koleo to 0 or raise it")
    with torch.autocast(features.device.type, enabled=False):
        x = F.normalize(features.to(torch.promote_types(features.dtype, torch.float32)), dim=-1)
        with torch.no_grad():
            nearest = (x @ x.T).fill_diagonal_(-2.0).argmax(dim=1)
        return -torch.log((x - x[nearest]).norm(dim=-1) + 1e-8).mean()


def entropy_of(shares: Float[Tensor, "*_"]) -> Float[Tensor, ""]:
    """In nats. Not by `torch.special.entr`, which XLA does not have."""
    return -torch.xlogy(shares, shares).sum()


@torch.no_grad()
def diagnose(
    loss: Float[Tensor, ""], targets: Targets, num_images: int, num_views: int, num_prototypes: int
) -> dict[str, Float[Tensor, ""]]:
    """Signs of collapse, in nats; nothing here waits for the device.

    teacher_entropy: mean entropy of the targets; ln k when they are uniform
    prototype_entropy: entropy of their mean; 0 when all images go to one prototype
    kl: of the student from the teacher, mean over pairs of views
    below_ln_k: how far the loss is below ln k, that of a student that knows nothing
    """
    total, mean = [], []
    for rows in chunks(num_images, images_at_once(num_views, num_prototypes)):
        q = targets(rows)
        total.append(entropy_of(q))
        mean.append(q.sum(dim=(0, 1)))
        count = q.shape[0] * num_images
    entropy = torch.stack(total).sum() / count
    return {
        "teacher_entropy": entropy,
        "prototype_entropy": entropy_of(torch.stack(mean).sum(dim=0) / count),
        "kl": loss.detach() - entropy,
        "below_ln_k": math.log(num_prototypes) - loss.detach(),
    }
