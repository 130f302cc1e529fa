"""Our ViT against timm's and vit-pytorch's of the same size: inference and training step.

    python -m experiments.benchmarks.backbones [--variant Ti] [--batch 32] [--rounds 20]

224 px, patches of 16, 1000 classes, random images that are there already. The arms take turns
round by round, in another order each time. On a GPU in bfloat16 autocast, on a CPU in float32.
A training step is forward, cross-entropy, backward and fused AdamW. The table shows medians over
all rounds and the median of the ratios round by round; above 1.0 ours is faster.
"""

import argparse
import statistics
import time
from collections.abc import Callable

import timm
import torch
import torch.nn.functional as F
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from vit_pytorch import ViT as PytorchViT

from modules.backbones import ViT
from modules.backbones.vit import VARIANTS
from modules.supervised import Classifier

TIMM = {"Ti": "tiny", "S": "small", "B": "base"}
CLASSES, SIDE, PATCH = 1000, 224, 16


def networks(variant: str) -> dict[str, nn.Module]:
    """Three networks of one size: depth, width, heads and MLP are alike."""
    size = VARIANTS[variant]
    return {
        "patchlight": Classifier(ViT(variant, PATCH, SIDE), CLASSES),
        "timm": timm.create_model(f"vit_{TIMM[variant]}_patch16_224", num_classes=CLASSES),
        "vit-pytorch": PytorchViT(
            image_size=SIDE,
            patch_size=PATCH,
            num_classes=CLASSES,
            dim=size.embed_dim,
            depth=size.depth,
            heads=size.num_heads,
            mlp_dim=size.mlp_dim,
            dim_head=size.embed_dim // size.num_heads,
        ),
    }


def seconds(work: Callable[[], object], device: torch.device, repeats: int) -> float:
    """Median time of one call."""
    times = []
    for _ in range(repeats):
        if device.type == "cuda":
            torch.cuda.synchronize()
        start = time.perf_counter()
        work()
        if device.type == "cuda":
            torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def arms(network: nn.Module, images: Tensor, labels: Tensor) -> dict[str, Callable[[], object]]:
    """What is timed of one network."""
    kind = images.device.type
    optimizer = torch.optim.AdamW(network.parameters(), lr=1e-4, fused=True)

    def forward() -> Tensor:
        with torch.autocast(kind, dtype=torch.bfloat16, enabled=kind == "cuda"):
            logits: Tensor = network(images)
        return logits

    def infer() -> None:
        network.eval()
        with torch.inference_mode():
            forward()

    def step() -> None:
        network.train()
        optimizer.zero_grad()
        torch.autograd.backward(F.cross_entropy(forward().float(), labels))
        optimizer.step()

    return {"inference": infer, "training step": step}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--variant", choices=TIMM, default="Ti")
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=20)
    given = parser.parse_args()
    torch.manual_seed(0)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    images = torch.randn(given.batch, 3, SIDE, SIDE, device=device)
    labels = torch.randint(0, CLASSES, (given.batch,), device=device)
    repeats = 20 if device.type == "cuda" else 1
    work = {
        name: arms(network.to(device), images, labels)
        for name, network in networks(given.variant).items()
    }
    names = list(work)
    table = Table("", "network", "images/s", "ours is faster by", "quartiles")
    for what in ("inference", "training step"):
        times: dict[str, list[float]] = {name: [] for name in names}
        for name in names:
            seconds(work[name][what], device, repeats)  # warm up
        for turn in range(given.rounds):
            start = turn % len(names)
            for name in names[start:] + names[:start]:
                times[name].append(seconds(work[name][what], device, repeats))
        for name in names:
            ratios = [t / o for t, o in zip(times[name], times["patchlight"], strict=True)]
            low, middle, high = statistics.quantiles(ratios, n=4)
            table.add_row(
                what,
                name,
                f"{given.batch / statistics.median(times[name]):.1f}",
                f"{middle:.3f}",
                f"{low:.3f} to {high:.3f}",
            )
    Console().print(table)
    where = torch.cuda.get_device_name() if device.type == "cuda" else "CPU"
    print(
        f"ViT-{given.variant}/16, batch {given.batch}, {where}, torch {torch.__version__}, "
        f"timm {timm.__version__}, {torch.get_num_threads()} threads"
    )


if __name__ == "__main__":
    main()
