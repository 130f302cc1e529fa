"""What everything around the network costs: `fit` against a bare PyTorch loop with timm's ViT.

    python -m experiments.benchmarks.step [--rounds 6] [--steps 8]

ViT-Ti/16 at 224 px, batch 32, cross-entropy, AdamW. Three arms take turns, round by round:

    bare timm     timm's network and one batch made beforehand; forward, backward, step
    bare ours     the same loop around our network
    patchlight    `Trainer.fit` with all that the command adds: an in-memory source of 256 px
                  images, crops, flips, erasing and mixing, EMA off, logging every 10 steps,
                  TensorBoard, seeding, checkpoint callback

The time of a step is from its end to the end of the next; a round's first two steps are left
out. The table shows medians over all rounds, and the median of the ratios round by round.
"""

import argparse
import statistics
import tempfile
import time
from itertools import pairwise
from typing import Any

import numpy as np
import timm
import torch
import torch.nn.functional as F
from lightning.pytorch import Callback, Trainer, seed_everything
from lightning.pytorch.loggers import TensorBoardLogger
from rich.console import Console
from rich.table import Table
from torch import nn

from callbacks import AugmentedBatch, Checkpoint, StepSeed, Throughput
from callbacks.checkpoint import AtomicCheckpointIO
from datamodules import ImageDataModule
from datamodules.sources import Example, Source
from modules import Supervised
from modules.backbones import ViT
from modules.optim import Optimization
from modules.supervised import Classifier

BATCH, CLASSES, WARM_UP = 32, 1000, 2


class InMemory:
    """Random images that are there already, so that no disk is timed."""

    channels = 3
    class_names = tuple(str(i) for i in range(CLASSES))

    def __init__(self) -> None:
        self.images = np.random.default_rng(0).integers(0, 256, (512, 256, 256, 3), dtype=np.uint8)

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> Example:
        return Example(self.images[index], index, None)

    def describe(self, index: int) -> str:
        return f"random[{index}]"


class InMemoryDataModule(ImageDataModule):
    memory = InMemory()

    def open(self, split: Any) -> Source:
        return self.memory


class Clock(Callback):
    def __init__(self) -> None:
        self.ends: list[float] = []

    def on_train_batch_end(self, *_: Any) -> None:
        self.ends.append(time.perf_counter())


def durations(ends: list[float]) -> list[float]:
    return [end - start for start, end in pairwise(ends)][WARM_UP:]


def bare(network: nn.Module, steps: int) -> list[float]:
    """Seconds of each step of a plain loop."""
    optimizer = torch.optim.AdamW(network.parameters(), lr=1e-3, fused=True)
    images, labels = torch.randn(BATCH, 3, 224, 224), torch.randint(0, CLASSES, (BATCH,))
    ends = []
    for _ in range(steps):
        optimizer.zero_grad()
        torch.autograd.backward(F.cross_entropy(network(images), labels))
        optimizer.step()
        ends.append(time.perf_counter())
    return durations(ends)


def fitted(steps: int) -> list[float]:
    """Seconds of each step of `Trainer.fit`."""
    clock = Clock()
    with tempfile.TemporaryDirectory() as directory:
        trainer = Trainer(
            max_steps=steps,
            accelerator="cpu",
            logger=TensorBoardLogger(directory, default_hp_metric=False),
            callbacks=[StepSeed(), Throughput(), AugmentedBatch(), Checkpoint(), clock],
            plugins=[AtomicCheckpointIO()],
            use_distributed_sampler=False,
            limit_val_batches=0,
            log_every_n_steps=10,
            enable_progress_bar=False,
            enable_model_summary=False,
        )
        method = Supervised(ViT("Ti"), CLASSES, Optimization(warmup_epochs=0), label_smoothing=0.1)
        data = InMemoryDataModule(
            batch_size=BATCH, num_workers=0, mixup=0.8, cutmix=1.0, erasing=0.25
        )
        trainer.fit(method, data)
    return durations(clock.ends)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rounds", type=int, default=6)
    parser.add_argument("--steps", type=int, default=8)
    given = parser.parse_args()
    seed_everything(0)
    theirs = timm.create_model("vit_tiny_patch16_224", num_classes=CLASSES)
    ours = Classifier(ViT("Ti"), CLASSES)
    arms = {
        "bare timm": lambda: bare(theirs, given.steps),
        "bare ours": lambda: bare(ours, given.steps),
        "patchlight": lambda: fitted(given.steps),
    }
    times: dict[str, list[float]] = {name: [] for name in arms}
    names = list(arms)
    for turn in range(given.rounds):  # every arm is first, second and last in turn
        for name in names[turn % 3 :] + names[: turn % 3]:
            times[name].append(statistics.median(arms[name]()))
    table = Table("arm", "median step (s)", "ratio to bare timm", "range of ratios")
    for name, medians in times.items():
        ratios = [m / t for m, t in zip(medians, times["bare timm"], strict=True)]
        table.add_row(
            name,
            f"{statistics.median(medians):.3f}",
            f"{statistics.median(ratios):.3f}",
            f"{min(ratios):.3f} to {max(ratios):.3f}",
        )
    Console().print(table)
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads, timm {timm.__version__}")


if __name__ == "__main__":
    main()
