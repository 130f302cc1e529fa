"""What everything around the network costs: `fit` against a bare PyTorch loop with timm's ViT.

    python -m experiments.benchmarks.step [--steps 40]

ViT-Ti/16 at 224 px, batch 32, cross-entropy, AdamW. Three arms take turns step by step, in
another order each time, so that a slow minute of the machine is slow for all:

    bare timm     timm's network and one batch made beforehand; forward, backward, step
    bare ours     the same around our network
    patchlight    `Trainer.fit` with all that the command adds: an in-memory source of 256 px
                  images, crops, flips, erasing and mixing, EMA off, logging every 10 steps,
                  TensorBoard, seeding, the check for finite losses, checkpoint callback

The other two arms run in a callback of that fit, whose own time is left out. The table shows
medians, and the median and quartiles of the ratios step by step.
"""

import argparse
import logging
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable
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

from callbacks import AugmentedBatch, Checkpoint, FiniteLoss, StepSeed, Throughput
from callbacks.checkpoint_files import AtomicCheckpointIO
from datamodules import ImageDataModule
from datamodules.sources import Example, Source
from modules import Supervised
from modules.backbones import ViT
from modules.optim import Optimization
from modules.supervised import Classifier

BATCH, CLASSES, WARM_UP = 32, 1000, 2
TIMM, FITTED = "bare timm", "patchlight"


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

    def size(self, index: int) -> tuple[int, int]:
        return 256, 256

    def describe(self, index: int) -> str:
        return f"random[{index}]"


class InMemoryDataModule(ImageDataModule):
    memory = InMemory()

    def open(self, split: Any) -> Source:
        return self.memory


class TakeTurns(Callback):
    """Between two steps of a fit, one step of every other arm; all are timed."""

    def __init__(self, others: dict[str, Callable[[], None]]) -> None:
        self.others = others
        self.times: dict[str, list[float]] = {name: [] for name in (*others, FITTED)}
        self.resumed: float | None = None

    def on_train_batch_end(self, *_: Any) -> None:
        now = time.perf_counter()
        if self.resumed is not None:
            self.times[FITTED].append(now - self.resumed)
        names = list(self.others)
        start = len(self.times[FITTED]) % len(names)
        for name in names[start:] + names[:start]:
            begin = time.perf_counter()
            self.others[name]()
            self.times[name].append(time.perf_counter() - begin)
        self.resumed = time.perf_counter()


def bare(network: nn.Module) -> Callable[[], None]:
    """One step of a plain loop."""
    optimizer = torch.optim.AdamW(network.parameters(), lr=1e-3, fused=True)
    images, labels = torch.randn(BATCH, 3, 224, 224), torch.randint(0, CLASSES, (BATCH,))

    def step() -> None:
        optimizer.zero_grad()
        torch.autograd.backward(F.cross_entropy(network(images), labels))
        optimizer.step()

    return step


def measure(steps: int) -> dict[str, list[float]]:
    """Seconds of each step of each arm, after the first steps of all."""
    turns = TakeTurns(
        {
            TIMM: bare(timm.create_model("vit_tiny_patch16_224", num_classes=CLASSES)),
            "bare ours": bare(Classifier(ViT("Ti"), CLASSES)),
        }
    )
    with tempfile.TemporaryDirectory() as directory:
        added = [StepSeed(), FiniteLoss(), Throughput(), AugmentedBatch(), Checkpoint()]
        trainer = Trainer(
            max_steps=steps + WARM_UP + 1,
            accelerator="cpu",
            logger=TensorBoardLogger(directory, default_hp_metric=False),
            callbacks=[*added, turns],
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
    return {name: times[-steps:] for name, times in turns.times.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--steps", type=int, default=40)
    given = parser.parse_args()
    warnings.filterwarnings("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    seed_everything(0, verbose=False)
    times = measure(given.steps)
    table = Table("arm", "median step (s)", "ratio to bare timm", "quartiles")
    for name, seconds in times.items():
        ratios = [s / t for s, t in zip(seconds, times[TIMM], strict=True)]
        low, middle, high = statistics.quantiles(ratios, n=4)
        table.add_row(
            name, f"{statistics.median(seconds):.3f}", f"{middle:.3f}", f"{low:.3f} to {high:.3f}"
        )
    Console().print(table)
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads, timm {timm.__version__}")


if __name__ == "__main__":
    main()
