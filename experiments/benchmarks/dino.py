"""A training step of DINO: all crops in one pass and no logits kept, beside the plain way.

    python -m experiments.benchmarks.dino --variant S --batch 64

The plain way is that of the published code: one pass for each size of crops, all logits of all
views, and their log-softmax. Student and teacher forward, loss and backward, no optimizer.
"""

import argparse
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from modules.backbones import ViT
from modules.dino_loss import Center, view_loss
from modules.dino_network import Head, Network


def ours(student: Network, teacher: Network, crops: list[Tensor], center: Center) -> Tensor:
    with torch.no_grad():
        taught = teacher(crops[:1]).bottlenecks
    seen = student(crops).bottlenecks
    targets = center.targets(taught, teacher.head.prototypes, 0.04)
    return view_loss(seen, student.head.prototypes, targets, 0.1).mean()


def plain(student: Network, teacher: Network, crops: list[Tensor], center: Center) -> Tensor:
    def logits(network: Network, groups: list[Tensor]) -> Tensor:
        rows = [network.backbone(group.flatten(0, 1)).pooled for group in groups]
        out: Tensor = network.head.last_layer(network.head(torch.cat(rows))).float()
        return out.view(-1, crops[0].shape[1], out.shape[-1])

    with torch.no_grad():
        q = ((logits(teacher, crops[:1]) - center.center) / 0.04).softmax(dim=-1)
    log_p = F.log_softmax(logits(student, crops) / 0.1, dim=-1)
    pairs = [(i, v) for i in range(len(q)) for v in range(len(log_p)) if i != v]
    terms = [-(q[i] * log_p[v]).sum(dim=-1).mean() for i, v in pairs]
    return torch.stack(terms).mean()


def measure(step: Callable[[], Tensor], device: torch.device, repeats: int) -> tuple[float, float]:
    """Milliseconds of a step, the median, and GiB at its peak (0 on a CPU)."""
    times = []
    for i in range(repeats + 2):
        if i == 2 and device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
        start = time.perf_counter()
        step()
        if device.type == "cuda":
            torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    peak = torch.cuda.max_memory_allocated() / 2**30 if device.type == "cuda" else 0.0
    return 1000 * sorted(times[2:])[repeats // 2], peak


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--variant", default="S")
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--prototypes", type=int, default=65_536)
    parser.add_argument("--local", type=int, default=8, help="local crops of 96 pixels")
    parser.add_argument("--repeats", type=int, default=10)
    given = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.manual_seed(0)
    student, teacher = (
        Network(
            backbone := ViT(given.variant, 16, 224, drop_path=0.1),
            Head(backbone.embed_dim, 2048, 256, given.prototypes, norm_last=True),
        ).to(device)
        for _ in range(2)
    )
    teacher.requires_grad_(False).eval()
    center = Center(given.prototypes, 0.9).to(device)
    sizes = ((2, 224), (given.local, 96))
    crops = [torch.randn(v, given.batch, 3, s, s, device=device) for v, s in sizes]

    def step(way: Callable[..., Tensor]) -> Tensor:
        student.zero_grad()
        with torch.autocast(device.type, torch.bfloat16):
            loss = way(student, teacher, crops, center)
        torch.autograd.backward(loss)
        return loss

    for way in (plain, ours):
        milliseconds, peak = measure(lambda way=way: step(way), device, given.repeats)  # type: ignore[misc]
        print(f"{way.__name__:6} {milliseconds:8.1f} ms a step  {peak:6.2f} GiB at the peak")


if __name__ == "__main__":
    main()
