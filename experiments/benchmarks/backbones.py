"""Our backbones against timm's of the same size and weights: inference and training step.

    python -m experiments.benchmarks.backbones [--families vit,hybrid] [--batch 32] [--rounds 20]
                                               [--threads N] [--others]

224 px, 1000 classes, random images that are there already, one row for each network and kind of
work. Ours has timm's weights, carried over by `modules.weights`, and has to give equal logits
first. The arms take turns round by round, in another order each time. On a GPU in bfloat16
autocast, on a CPU in float32. A training step is forward, cross-entropy, backward and fused AdamW.
The table shows medians over all rounds, and the median and quartiles of the ratios round by round;
above 1.0 ours is faster. Below it are their geometric mean and the lowest. `--others` adds
vit-pytorch's ViT of the same size.
"""

import argparse
import statistics
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import timm
import torch
import torch.nn.functional as F
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from modules import weights
from modules.backbones import FAMILIES, ViT, create
from modules.supervised import Classifier

CLASSES, SIDE = 1000, 224
OURS, TIMM, PYTORCH = "patchlight", "timm", "vit-pytorch"


class Row(NamedTuple):
    """A network of ours, and timm's name of the same."""

    family: str
    arguments: dict[str, Any]
    timm: str


# A family that is not there is left out.
ROWS = {
    "ViT-Ti/16": Row("vit", {"variant": "Ti"}, "vit_tiny_patch16_224"),
    "ViT-S/16": Row("vit", {"variant": "S"}, "vit_small_patch16_224"),
    "R+ViT-Ti/16": Row("hybrid", {"variant": "R+Ti/16"}, "vit_tiny_r_s16_p8_224"),
    "R26+ViT-S/32": Row("hybrid", {"variant": "R26+S/32"}, "vit_small_r26_s32_224"),
    "Swin-T": Row("swin", {"variant": "T"}, "swin_tiny_patch4_window7_224"),
    "Twins-SVT-S": Row("twins_svt", {"variant": "S"}, "twins_svt_small"),
    "Twins-PCPVT-S": Row("twins_pcpvt", {"variant": "S"}, "twins_pcpvt_small"),
}


def networks(row: Row, with_others: bool) -> dict[str, nn.Module]:
    """The arms of a row: ours with timm's weights, timm's and, of a ViT, vit-pytorch's.

    Raises:
        ValueError: logits that differ, so that two different networks would be timed.
    """
    theirs = timm.create_model(row.timm, num_classes=CLASSES)
    for parameter in theirs.parameters():  # heads begin with zeros
        if parameter.ndim > 1:
            nn.init.trunc_normal_(parameter, std=0.02)
    ours = Classifier(create(row.family, **row.arguments), CLASSES)
    given = weights.named_for(ours.backbone, dict(theirs.state_dict()), row.timm)
    weights.fill(ours, *given, row.timm, [])
    with torch.inference_mode():
        image = torch.randn(1, 3, SIDE, SIDE)
        apart = float((ours.eval()(image) - theirs.eval()(image)).abs().max())
    if apart > 1e-3:
        raise ValueError(f"{row.timm} and ours differ by {apart:g} in their logits")
    found: dict[str, nn.Module] = {OURS: ours, TIMM: theirs}
    if with_others and isinstance(ours.backbone, ViT) and row.family == "vit":
        found[PYTORCH] = pytorchs(ours.backbone)
    return found


def pytorchs(vit: ViT) -> nn.Module:
    """vit-pytorch's ViT of the same depth, width, heads and MLP."""
    from vit_pytorch import ViT as PytorchViT

    block: Any = vit.blocks[0]
    network: nn.Module = PytorchViT(
        image_size=SIDE,
        patch_size=vit.patch_size,
        num_classes=CLASSES,
        dim=vit.embed_dim,
        depth=vit.num_layers,
        heads=block.attn.num_heads,
        mlp_dim=block.mlp.fc1.out_features,
        dim_head=vit.embed_dim // block.attn.num_heads,
    )
    return network


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


def measure(
    arms_of: dict[str, Callable[[], object]], device: torch.device, rounds: int
) -> dict[str, list[float]]:
    """Seconds of every round of each arm."""
    names, repeats = list(arms_of), 20 if device.type == "cuda" else 1
    times: dict[str, list[float]] = {name: [] for name in names}
    for name in names:
        seconds(arms_of[name], device, repeats)  # warm up
    for turn in range(rounds):
        start = turn % len(names)
        for name in names[start:] + names[:start]:
            times[name].append(seconds(arms_of[name], device, repeats))
    return times


def chosen(families: str | None) -> dict[str, Row]:
    """The rows of these families, separated by commas; all that there are where none is named.

    Raises:
        ValueError: a family without a row.
    """
    there = {name: row for name, row in ROWS.items() if row.family in FAMILIES}
    if families is None:
        return there
    known = sorted({row.family for row in there.values()})
    for family in families.split(","):
        if family not in known:
            raise ValueError(f"--families {family!r} has no row; there is {', '.join(known)}")
    return {name: row for name, row in there.items() if row.family in families.split(",")}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--families", help="separated by commas; all")
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=20, help="at least 2; %(default)s")
    parser.add_argument("--threads", type=int, help="of torch on a CPU; its own choice")
    parser.add_argument("--others", action="store_true", help="vit-pytorch's ViT as well")
    given = parser.parse_args()
    if given.threads is not None:
        torch.set_num_threads(given.threads)
    torch.manual_seed(0)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    images = torch.randn(given.batch, 3, SIDE, SIDE, device=device)
    labels = torch.randint(0, CLASSES, (given.batch,), device=device)
    table = Table("network", "work", "ours, images/s", "beside", "images/s", "ratio", "quartiles")
    ratios: dict[str, list[float]] = {}
    for title, row in chosen(given.families).items():
        built = networks(row, given.others)
        work = {name: arms(net.to(device), images, labels) for name, net in built.items()}
        for what in ("inference", "training step"):
            times = measure({name: arm[what] for name, arm in work.items()}, device, given.rounds)
            rates = {name: given.batch / statistics.median(own) for name, own in times.items()}
            for name in [name for name in times if name != OURS]:
                pairs = zip(times[name], times[OURS], strict=True)
                low, middle, high = statistics.quantiles([t / o for t, o in pairs], n=4)
                numbers = (f"{rates[OURS]:.1f}", name, f"{rates[name]:.1f}", f"{middle:.3f}")
                table.add_row(title, what, *numbers, f"{low:.3f} to {high:.3f}")
                ratios.setdefault(name, []).append(middle)
    Console().print(table)
    for name, found in ratios.items():
        mean = statistics.geometric_mean(found)
        print(f"beside {name}: geometric mean {mean:.3f}, lowest {min(found):.3f}")
    where = torch.cuda.get_device_name() if device.type == "cuda" else "CPU"
    print(
        f"batch {given.batch}, {given.rounds} rounds, {where}, torch {torch.__version__}, "
        f"timm {timm.__version__}, {torch.get_num_threads()} threads"
    )


if __name__ == "__main__":
    main()
