"""A training step of DINO: ours, one as published, one of lightly's parts.

    python -m experiments.benchmarks.dino_step [--variant S] [--batch 4] [--rounds 12]

Patches of 16, views of 2 x 224 and 8 x 96 pixels that are there already, 65,536 prototypes. A step
is both networks forward, loss, backward, clipping, optimizer and the average. The backbone is ours
in every arm, and all begin with the same weights and the same loss.

    patchlight     all views in one pass, logits of few images at a time, fused AdamW and average
    as published   a pass a resolution, attention written out, all logits, a log-softmax for every
                   pair of views, and a Python loop over parameters for clipping and the average
    its loop, our attention   the same with torch's fused attention, which ours calls too
    lightly        a pass a view as in its example, its head, loss and average; it clips nothing

The arms take turns round by round, in another order each time; on a GPU in bfloat16 autocast, on a
CPU in float32 on one thread, by the CPU time it had (wall time on an idle machine). The first table
shows medians, and the median and quartiles of the ratios round by round, of the whole step and
without clipping, optimizer and average: these cost the same for any batch, so that their share
shrinks with a larger one. The second table shows memory, each arm in a process of its own: the peak
of a second step above what the process held before it had networks, and that of the last layer and
the loss alone, forward and backward, above bottlenecks and weights (`--loss-batch` images).
"""

import argparse
import importlib.util
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterable
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from experiments.benchmarks.dino_arms import (
    ARMS,
    LIGHTLY,
    MAKE,
    OURS,
    Arm,
    Sizes,
    crops_of,
    loss_alone,
)

Pair = tuple[list[float], list[float]]
now = time.perf_counter if torch.cuda.is_available() else time.process_time


def half(device: torch.device) -> torch.autocast:
    return torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda")


def backward(loss: Callable[[], Tensor], device: torch.device) -> float:
    with half(device):
        value = loss()
    torch.autograd.backward(value)
    return value.item()  # waits for the device


class Memory:
    """Peak bytes since `reset`: allocated on a GPU, resident on a CPU."""

    def __init__(self, device: torch.device) -> None:
        self.on_gpu = device.type == "cuda"

    def reset(self) -> None:
        if self.on_gpu:
            torch.cuda.reset_peak_memory_stats()
        else:
            Path("/proc/self/clear_refs").write_text("5")

    def peak(self) -> int:
        if self.on_gpu:
            return torch.cuda.max_memory_allocated()
        status = Path("/proc/self/status").read_text().splitlines()
        return 1024 * next(int(line.split()[1]) for line in status if line.startswith("VmHWM"))


def memory_of(what: str, name: str, size: Sizes) -> float:
    """MiB at the peak above those before."""
    memory = Memory(size.device)
    if what == "step":
        memory.reset()
        before = memory.peak()
        arm = MAKE[name](size, crops_of(size))
        for _ in range(2):  # the second has the optimizer's state
            memory.reset()
            backward(arm.loss, size.device)
            arm.update()
    else:
        small = loss_alone(name, size._replace(batch=2, prototypes=64))
        backward(small, size.device)  # libraries take some at first
        loss = loss_alone(name, size)
        memory.reset()
        before = memory.peak()
        backward(loss, size.device)
    return (memory.peak() - before) / 2**20


def check_equal(arms: dict[str, Arm], device: torch.device) -> None:
    """All arms compute the same loss; without stochastic depth for once."""
    losses = {}
    for name, arm in arms.items():
        arm.student.eval()
        with torch.no_grad(), half(device):
            losses[name] = arm.loss().item()
        arm.student.train()
    first, tolerance = losses[OURS], 1e-2 if device.type == "cuda" else 1e-4
    assert all(abs(loss - first) < tolerance for loss in losses.values()), losses


def rounds(arms: dict[str, Arm], number: int, device: torch.device) -> dict[str, Pair]:
    """Seconds of each step and of its forward and backward."""
    names = list(arms)
    found: dict[str, Pair] = {name: ([], []) for name in arms}
    for turn in range(number + 1):
        for name in names[turn % len(names) :] + names[: turn % len(names)]:
            start = now()
            backward(arms[name].loss, device)
            middle = now()
            arms[name].update()
            if device.type == "cuda":
                torch.cuda.synchronize()
            if turn:  # the first warms up
                found[name][0].append(now() - start)
                found[name][1].append(middle - start)
    return found


def spread(times: Iterable[float], others: Iterable[float]) -> tuple[str, str]:
    """Median and quartiles of the ratios."""
    low, middle, high = statistics.quantiles(
        [time / other for time, other in zip(times, others, strict=True)], n=4
    )
    return f"{middle:.2f}", f"{low:.2f} to {high:.2f}"


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--variant", default="S")
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--loss-batch", type=int, default=64)
    parser.add_argument("--prototypes", type=int, default=65_536)
    parser.add_argument("--rounds", type=int, default=12)
    parser.add_argument("--memory", choices=("step", "loss"), help="this one only, in here")
    parser.add_argument("--arm", choices=ARMS)
    given = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if device.type == "cpu":
        torch.set_num_threads(1)
    size = Sizes(given.variant, given.batch, given.prototypes, device)
    if given.memory:
        print(memory_of(given.memory, given.arm, size))
        return
    names = [name for name in ARMS if name != LIGHTLY or importlib.util.find_spec("lightly")]
    if LIGHTLY not in names:
        print("lightly is not installed: its arm is left out")
    console = Console()
    console.print(table_of_times(names, size, given.rounds))
    console.print(table_of_memory(names, sys.argv[1:], given.batch, given.loss_batch))
    where = torch.cuda.get_device_name() if device.type == "cuda" else "CPU"
    print(f"{where}, torch {torch.__version__}, {torch.get_num_threads()} threads")


def table_of_times(names: list[str], size: Sizes, number: int) -> Table:
    crops = crops_of(size)
    arms = {name: MAKE[name](size, crops) for name in names}
    check_equal(arms, size.device)
    found = rounds(arms, number, size.device)
    heads = [
        c for part in ("step", "without update") for c in (f"{part} (s)", "ratio", "quartiles")
    ]
    table = Table("arm", *heads, title=f"ViT-{size.variant}/16, batch {size.batch}; ratios to ours")
    for name in names:
        cells = []
        for mine, base in zip(found[name], found[OURS], strict=True):
            cells += [f"{statistics.median(mine):.3f}", *spread(mine, base)]
        table.add_row(name, *cells)
    return table


def table_of_memory(names: list[str], options: list[str], batch: int, loss_batch: int) -> Table:
    table = Table("arm", "step, peak MiB", "of ours", "loss, peak MiB", "of ours")
    table.title = f"memory; step of {batch} images, loss of {loss_batch}"
    peaks: dict[str, list[float]] = {}
    for name in names:
        peaks[name] = []
        for what, images in (("step", batch), ("loss", loss_batch)):
            command = [sys.executable, "-m", "experiments.benchmarks.dino_step", *options]
            command += ["--memory", what, "--arm", name, "--batch", str(images)]
            done = subprocess.run(command, capture_output=True, text=True, check=True)
            peaks[name].append(float(done.stdout.splitlines()[-1]))
        pairs = zip(peaks[name], peaks[OURS], strict=True)
        table.add_row(name, *(c for p, base in pairs for c in (f"{p:,.0f}", f"{p / base:.2f}")))
    return table


if __name__ == "__main__":
    main()
