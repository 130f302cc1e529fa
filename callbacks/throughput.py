"""How fast a run is, and what it waits for; nothing here waits for the device at a step."""

import resource
import sys
import time
from contextlib import ExitStack
from typing import Any

import torch
from lightning.fabric.utilities.throughput import get_available_flops
from lightning.pytorch import Callback, LightningModule, Trainer
from torch.utils.flop_counter import FlopCounterMode

from datamodules.batch import ImageBatch, MultiCropBatch, PackedBatch, TextBatch
from datamodules.module import Needs
from datamodules.placed import WaitedLoader

GIB = 2**30
H200 = 989.4e12  # dense, in 16 bits: the H100's. Lightning's table has that of sparse matrices.


class Throughput(Callback):
    """Logs, at log points, over the optimizer steps since the one before, with all their batches:

    train/images_per_s  over all devices; of texts train/pairs_per_s
    train/tokens_per_s  patches and prefix tokens of these images, those that are masked as well;
                        places of texts, padding too
    train/data_wait     share of the time in which the step waited for the loader
    train/memory_gib    the most that tensors took of this device so far; on a CPU, the process
    train/mfu           model FLOPs utilisation: the FLOPs of training over what the device could do
                        (Chowdhery et al. 2022, appendix B), where that is known

    The clock leaves out validation and checkpoints at the end of an epoch. Lightning's monitor
    would synchronise the device every step. The images of a pack are those of this device, times
    the devices. FLOPs are counted in the first step of a run, which is not compiled then, and
    include what activation checkpointing computes again.
    """

    def __init__(self) -> None:
        self.started: float | None = None
        self.images = self.tokens = 0
        self.waited = 0.0
        self.flops_per_image: float | None = None
        self.peak: float | None = None
        self.counting = ExitStack()
        self.counter: FlopCounterMode | None = None

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.peak = peak_flops(trainer.strategy.root_device, str(trainer.precision))

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.started = None

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.started = None

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int
    ) -> None:
        # A resumed run takes the count from its checkpoint, and computes as if never stopped.
        if self.peak is not None and self.flops_per_image is None:
            self.counting.enter_context(torch.compiler.set_stance("force_eager"))
            self.counter = self.counting.enter_context(FlopCounterMode(display=False))

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if self.counter is not None:
            self.counting.close()
            self.flops_per_image = self.counter.get_total_flops() / count_of(batch)
            self.counter = None
        if self.started is not None:
            self.images += count_of(batch) * trainer.world_size
            self.tokens += tokens_of(batch, needs_of(trainer)) * trainer.world_size
        if trainer.fit_loop._should_accumulate():  # the step goes on
            return
        now = time.perf_counter()
        loader = trainer.train_dataloader
        waited = loader.waited if isinstance(loader, WaitedLoader) else 0.0
        if self.started is None:  # the first step after a pause only starts the clock
            self.restart(now, waited)
            return
        if not trainer._logger_connector.should_update_logs:
            return
        seconds = now - self.started
        found = {
            f"{'pairs' if isinstance(batch, TextBatch) else 'images'}_per_s": self.images / seconds,
            "data_wait": (waited - self.waited) / seconds,
            "memory_gib": memory(trainer.strategy.root_device) / GIB,
        }
        if self.tokens:
            found["tokens_per_s"] = self.tokens / seconds
        if self.peak is not None and self.flops_per_image is not None:
            done = self.flops_per_image * self.images / trainer.world_size
            found["mfu"] = done / seconds / self.peak
        for name, value in found.items():
            pl_module.log(f"train/{name}", value, batch_size=1)
        self.restart(now, waited)

    def restart(self, now: float, waited: float) -> None:
        self.started, self.waited = now, waited
        self.images = self.tokens = 0

    def on_exception(
        self, trainer: Trainer, pl_module: LightningModule, exception: BaseException
    ) -> None:
        self.counting.close()

    def state_dict(self) -> dict[str, Any]:
        return {"flops_per_image": self.flops_per_image}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.flops_per_image = state_dict["flops_per_image"]


def count_of(batch: Any) -> int:
    """Images, or pairs of texts."""
    count: int = batch.num_pairs if isinstance(batch, TextBatch) else batch.num_images
    return count


def needs_of(trainer: Trainer) -> Needs | None:
    needs = getattr(trainer.datamodule, "needs", None)  # type: ignore[attr-defined]
    return needs if isinstance(needs, Needs) else None


def tokens_of(batch: Any, needs: Needs | None) -> int:
    """Patches and prefix tokens of a batch; 0 where there are none."""
    if isinstance(batch, PackedBatch):
        return batch.num_tokens
    if isinstance(batch, TextBatch):
        return batch.source.numel() + batch.target.numel()
    if needs is None:
        return 0
    if isinstance(batch, MultiCropBatch):
        counts = [(crop.shape[0] * crop.shape[1], crop.shape[-2:]) for crop in batch.crops]
    elif isinstance(batch, ImageBatch):
        counts = [(len(batch.images), batch.images.shape[-2:])]
    else:
        return 0
    patch, prefix = needs.patch_size, needs.num_prefix_tokens
    return sum(n * (-(-h // patch) * -(-w // patch) + prefix) for n, (h, w) in counts)


def peak_flops(device: torch.device, precision: str) -> float | None:
    """FLOP/s that a device promises for products of matrices; None where that is not known."""
    if device.type != "cuda":
        return None
    dtypes = {"bf16": torch.bfloat16, "16": torch.float16}
    dtype = dtypes.get(precision.split("-")[0], torch.float32)
    if "H200" in torch.cuda.get_device_name(device) and dtype != torch.float32:
        return H200
    return get_available_flops(device, dtype)


def memory(device: torch.device) -> float:
    """Bytes."""
    if device.type == "cuda":
        return float(torch.cuda.max_memory_allocated(device))
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return float(most if sys.platform == "darwin" else most * 1024)
