"""Memory and time of k-NN over a large bank, beside the plain matrix of all similarities.

    python -m experiments.benchmarks.knn --bank 100000 --queries 10000 --dim 384

Each way runs in a process of its own, so that its peak memory is its own.
"""

import argparse
import resource
import subprocess
import sys
import time

import torch
from rich.console import Console
from rich.table import Table

from callbacks.knn import Neighbours, classify, vote

K, CLASSES = 20, 1000


def make(rows: int, dim: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    draw = torch.Generator().manual_seed(seed)
    features = torch.randn(rows, dim, generator=draw)
    return torch.nn.functional.normalize(features, dim=1), torch.arange(rows) % CLASSES


def plain(
    queries: torch.Tensor, labels: torch.Tensor, bank: torch.Tensor, names: torch.Tensor
) -> float:
    value, place = (queries @ bank.T).topk(K, dim=1)
    scores = vote(Neighbours(value, names[place]), CLASSES, 0.07)
    return float((scores.argmax(1) == labels).float().mean())


def run_one(way: str, bank: int, queries: int, dim: int) -> None:
    """Print accuracy, seconds, and peak memory in MiB before and after."""
    sides = (*make(queries, dim, 1), *make(bank, dim, 0))
    if way == "streaming":
        sides = (sides[0], sides[1], sides[2].half(), sides[3])
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    started = time.perf_counter()
    top1 = classify(*sides, [K], CLASSES)[K][0] if way == "streaming" else plain(*sides)
    seconds = time.perf_counter() - started
    print(top1, seconds, before, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--bank", type=int, default=100_000)
    parser.add_argument("--queries", type=int, default=10_000)
    parser.add_argument("--dim", type=int, default=384)
    parser.add_argument("--way", choices=("streaming", "plain"), help="this one only, in here")
    given = parser.parse_args()
    sizes = (given.bank, given.queries, given.dim)
    if given.way:
        run_one(given.way, *sizes)
        return
    title = f"{given.queries:,} queries, bank of {given.bank:,} x {given.dim}, k = {K}, on a CPU"
    table = Table("way", "top-1", "peak memory, MiB", "of it before, MiB", "seconds", title=title)
    for way in ("streaming", "plain"):
        command = [sys.executable, "-m", "experiments.benchmarks.knn", "--way", way]
        options = [f"--{n}={s}" for n, s in zip(("bank", "queries", "dim"), sizes, strict=True)]
        done = subprocess.run([*command, *options], capture_output=True, text=True, check=False)
        if done.returncode:
            table.add_row(way, "failed", "", "", "")
            continue
        top1, seconds, before, peak = (float(part) for part in done.stdout.split())
        table.add_row(way, f"{top1:.5f}", f"{peak:,.0f}", f"{before:,.0f}", f"{seconds:.1f}")
    Console().print(table)


if __name__ == "__main__":
    main()
