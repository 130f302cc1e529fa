"""Training steps on a GPU in bfloat16, compiled, beside others, in one run.

    python -m experiments.benchmarks.gpu [--only supervised,mae,dino,navit] [--rounds 10]
    python -m experiments.benchmarks.gpu --tiny

    supervised   ViT-B/16 at 224 px, cross-entropy, fused AdamW; timm's and vit-pytorch's ViT-B/16
                 around the same step
    mae          ViT-B/16, 75 % removed, forward, loss and backward; plain as published, lightly
    dino         ViT-S/16, 2 x 224 and 8 x 96 px, the whole step; as published, lightly
    navit        NaViT-B/8 on packs of images of 32 to 160 px; vit-pytorch's on lists of the same

Every arm is compiled (`torch.compile`: the backbones of ours, the networks of the others), but
for those that say "eager". Arms of a task take turns, in another order each round. Images are
those before they are cut into views; of packs, the images that lie in them. MFU is what the arm's
step asks for, counted eagerly, over what the device promises; the backward pass of flash attention
is counted with the scores that it computes again, and attention within packs, for which torch has
no count, not at all. Memory is the peak of a step above what was held before the arm was made. An
arm that does not run says why in its row, and the others go on. `--tiny` tries the script on any
device: two layers of width 32, two images; on a CPU the compiler traces only.
"""

import argparse
import gc
import statistics
import time
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import timm
import torch
import torch.nn.functional as F
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from callbacks.throughput import peak_flops
from datamodules.batch import PackedBatch
from experiments.benchmarks import backbones, dino_arms, mae_step, navit
from modules.backbones import Backbone, NaViT, Positions, ViT
from modules.mae import Autoencoder
from modules.supervised import Classifier

CLASSES, GIB = 1000, 2**30
OURS = "patchlight"


class Arm(NamedTuple):
    """A way to take a step.

    step:     takes one
    networks: what `torch.compile` takes, in place
    images:   of a step
    """

    step: Callable[[], object]
    networks: list[nn.Module]
    images: float


class Size(NamedTuple):
    device: torch.device
    is_tiny: bool

    def batch(self, usual: int) -> int:
        return 2 if self.is_tiny else usual

    def variant(self, usual: str) -> str:
        return "mu" if self.is_tiny else usual


Makers = dict[str, Callable[[], Arm]]


def half(device: torch.device) -> torch.autocast:
    return torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda")


def stepped(
    network: nn.Module, loss: Callable[[], Tensor], device: torch.device
) -> Callable[[], None]:
    """Forward, backward and fused AdamW."""
    optimizer = torch.optim.AdamW(network.parameters(), lr=1e-4, fused=True)

    def step() -> None:
        with half(device):
            value = loss()
        torch.autograd.backward(value)
        optimizer.step()
        optimizer.zero_grad()

    return step


def supervised(size: Size) -> Makers:
    batch, variant = size.batch(256), size.variant("B")
    images = torch.randn(batch, 3, 224, 224, device=size.device)
    labels = torch.randint(0, CLASSES, (batch,), device=size.device)

    def arm(make: Callable[[], nn.Module]) -> Arm:
        network = make().to(size.device)
        step = stepped(
            network, lambda: F.cross_entropy(network(images).float(), labels), size.device
        )
        return Arm(step, parts(network), batch)

    toy: dict[str, Any] = {"embed_dim": 32, "depth": 2, "num_heads": 2} if size.is_tiny else {}

    def timms() -> nn.Module:
        network: nn.Module = timm.create_model("vit_base_patch16_224", num_classes=CLASSES, **toy)
        return network

    ours = partial(arm, lambda: Classifier(ViT(variant), CLASSES))
    return {
        OURS: ours,
        "patchlight, eager": ours,
        "timm": partial(arm, timms),
        "vit-pytorch": partial(arm, lambda: backbones.pytorchs(ViT(variant))),
    }


def parts(network: nn.Module) -> list[nn.Module]:
    """What is compiled: our backbones, or the whole of another network."""
    return [part for part in network.modules() if isinstance(part, Backbone)] or [network]


def mae(size: Size) -> Makers:
    batch, variant = size.batch(256), size.variant("B")
    toy: dict[str, Any] = {"decoder_dim": 32, "decoder_depth": 1, "decoder_heads": 2}
    images = torch.randn(batch, 3, mae_step.SIDE, mae_step.SIDE, device=size.device)

    def arm(loss: Callable[[Autoencoder, Tensor], Tensor]) -> Arm:
        vit = ViT(variant, 16, mae_step.SIDE, positions=Positions("sincos2d"), init="mae")
        network = Autoencoder(vit, mae_step.RATIO, **(toy if size.is_tiny else {})).to(size.device)

        def step() -> None:
            network.zero_grad()
            with half(size.device):
                value = loss(network, images)
            torch.autograd.backward(value)

        return Arm(step, parts(network), batch)

    def lightly() -> Arm:
        # It has no toy size: a small ViT stands for one.
        made = mae_step.lightly_step("S" if size.is_tiny else variant, images)
        if made is None:
            raise ImportError("lightly is not installed")

        def step() -> None:
            with half(size.device):
                value = made()
            torch.autograd.backward(value)

        return Arm(step, [], batch)

    ours, plain = partial(arm, mae_step.ours), partial(arm, mae_step.plain)
    return {OURS: ours, "patchlight, eager": ours, "plain, eager": plain, "lightly, eager": lightly}


def dino(size: Size) -> Makers:
    sizes = dino_arms.Sizes(
        size.variant("S"), size.batch(64), 256 if size.is_tiny else 65_536, size.device
    )
    crops = dino_arms.crops_of(sizes)

    def arm(name: str) -> Arm:
        made = dino_arms.MAKE[name](sizes, crops)

        def step() -> None:
            with half(size.device):
                value = made.loss()
            torch.autograd.backward(value)
            made.update()

        return Arm(step, parts(made.student) + parts(made.teacher), sizes.batch)

    found: Makers = {OURS: partial(arm, dino_arms.OURS)}
    found["patchlight, eager"] = found[OURS]
    for name in (dino_arms.PUBLISHED, dino_arms.LIGHTLY):
        found[f"{name}, eager"] = partial(arm, name)
    return found


def packed(size: Size) -> Makers:
    tokens, variant = (2_048 if size.is_tiny else 65_536), size.variant("B")
    batches, lists = navit.packs(tokens, size.device)
    images = sum(float(batch.num_images) for batch in batches) / len(batches)

    def arm() -> Arm:
        network = Classifier(NaViT(variant, patch_size=navit.PATCH), navit.CLASSES)
        step = navit.trained(network, size.device)

        def on(batch: PackedBatch) -> int:
            def loss() -> Tensor:
                losses = F.cross_entropy(network(batch.images), batch.labels, reduction="none")
                return batch.mean(losses)

            step(loss)
            return batch.num_tokens

        return Arm(navit.in_turn([partial(on, batch) for batch in batches]), parts(network), images)

    def pytorchs() -> Arm:
        return Arm(navit.vit_pytorch(variant, lists, size.device), [], images)

    return {OURS: arm, "patchlight, eager": arm, "vit-pytorch, eager": pytorchs}


TASKS: dict[str, Callable[[Size], Makers]] = {
    "supervised": supervised,
    "mae": mae,
    "dino": dino,
    "navit": packed,
}


class Result(NamedTuple):
    """Of an arm: seconds of its steps, FLOPs of one, bytes at its peak."""

    arm: Arm
    seconds: list[float]
    flops: int
    peak: int

    def utilisation(self, promised: float) -> float:
        """The share that its median step takes of the FLOP/s that a device promises."""
        return self.flops / statistics.median(self.seconds) / promised


def wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def counted(step: Callable[[], object]) -> int:
    """FLOPs of a step, two for a multiplication and addition."""
    with FlopCounterMode(display=False) as counter:
        step()
    return int(counter.get_total_flops())


def begin(name: str, make: Callable[[], Arm], device: torch.device) -> Result:
    """Make an arm, count its FLOPs, compile it and take the first steps."""
    on_gpu = device.type == "cuda"
    before = torch.cuda.memory_allocated() if on_gpu else 0
    arm = make()
    flops = counted(arm.step)
    if not name.endswith("eager"):
        for network in arm.networks:
            network.compile(backend="inductor" if on_gpu else "eager")
    for _ in range(3 if on_gpu else 1):
        arm.step()
    wait(device)
    if on_gpu:
        torch.cuda.reset_peak_memory_stats()
    arm.step()
    wait(device)
    peak = torch.cuda.max_memory_allocated() - before if on_gpu else 0
    return Result(arm, [], flops, peak)


def turns(results: dict[str, Result], rounds: int, repeats: int, device: torch.device) -> None:
    """Steps of all arms, one after another, in another order each round.

    The first round is not timed: what an arm imports can make those before it compile again.
    """
    names = list(results)
    for turn in range(rounds + 1):
        first = turn % len(names)
        for name in names[first:] + names[:first]:
            wait(device)
            start = time.perf_counter()
            for _ in range(repeats if turn else 1):
                results[name].arm.step()
            wait(device)
            if turn:
                results[name].seconds.append((time.perf_counter() - start) / repeats)


HEADS = ("task", "arm", "images/s", "ours is faster by", "quartiles", "MFU", "peak GiB")


def rows(
    task: str, results: dict[str, Result], faults: dict[str, str], promised: float | None
) -> list[tuple[str, ...]]:
    """Of the table: the arms that ran, then those that did not."""
    ours = results[OURS].seconds
    found: list[tuple[str, ...]] = []
    for name, result in results.items():
        ratios = [its / own for its, own in zip(result.seconds, ours, strict=True)]
        low, middle, high = statistics.quantiles(ratios, n=4, method="inclusive")
        rate = result.arm.images / statistics.median(result.seconds)
        mfu = "" if promised is None else f"{result.utilisation(promised):.3f}"
        peak = f"{result.peak / GIB:.2f}" if result.peak else ""
        figures = (f"{rate:,.1f}", f"{middle:.3f}", f"{low:.3f} to {high:.3f}", mfu, peak)
        found.append((task, name, *figures))
    found += [(task, name, fault, "", "", "", "") for name, fault in faults.items()]
    return found


def measure(task: str, size: Size, rounds: int) -> list[tuple[str, ...]]:
    """The rows of a task."""
    torch.manual_seed(0)
    torch.compiler.reset()
    results, faults = {}, {}
    for name, make in TASKS[task](size).items():
        try:
            results[name] = begin(name, make, size.device)
        except (RuntimeError, ImportError) as error:  # out of memory, a library that is not there
            if name == OURS:
                raise
            faults[name] = f"did not run: {' '.join(str(error).split())[:100]}"
    turns(results, rounds, 1 if size.is_tiny else 10, size.device)
    return rows(task, results, faults, peak_flops(size.device, "bf16-mixed"))


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--only", default=",".join(TASKS))
    parser.add_argument("--rounds", type=int, help="at least 2; 10, or 2 of tiny networks")
    parser.add_argument("--tiny", action="store_true")
    given = parser.parse_args()
    if not (torch.cuda.is_available() or given.tiny):
        raise SystemExit("there is no GPU; --tiny tries the script without one")
    rounds = given.rounds or (2 if given.tiny else 10)
    size = Size(torch.device("cuda" if torch.cuda.is_available() else "cpu"), given.tiny)
    torch.set_float32_matmul_precision("high")
    table = Table(*HEADS)
    try:
        for task in given.only.split(","):
            for row in measure(task, size, rounds):
                table.add_row(*row)
            table.add_section()
            gc.collect()  # the networks of this task
    finally:  # what there is, if a task fails
        Console().print(table)
    where = torch.cuda.get_device_name() if size.device.type == "cuda" else "CPU"
    print(f"{where}, torch {torch.__version__}, timm {timm.__version__}, bfloat16 on a GPU")


if __name__ == "__main__":
    main()
