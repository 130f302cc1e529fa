"""`patchlight plan`: what a recipe would do on so many devices, without starting it.

    patchlight plan --config RECIPE [--devices 1,8,64] [--images N] [fit options]
    patchlight plan --config RECIPE --shards 8 [--epoch 3] [--images N] [fit options]

For every number of devices: the global batch, the peak learning rate by the recipe's rule, the
steps of an epoch and of the run, and what the memory of a device has to hold. `--shards` shows
which images each of so many devices takes in an epoch. `--images` says how many the training set
has, where it is not at hand.
"""

import argparse
from collections.abc import Sequence
from typing import NamedTuple

import torch
from lightning.pytorch import LightningDataModule, LightningModule, Trainer
from lightning.pytorch.cli import LightningArgumentParser
from rich.console import Console
from rich.table import Table

from callbacks.checkpoint import Checkpoint
from datamodules.one_size import OneSizeDataModule
from datamodules.packed import PackedDataModule
from datamodules.placed import limited
from datamodules.sampling import Groups, TrainBatches, run_seed
from datamodules.sources import Grouped, Source
from experiments.memory import Memory, activations, memory_of
from experiments.start import take_weights
from modules.optim import Optimization, peak
from modules.sharding import check

DEVICES = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024)
GIB = 2**30
OTHER = "name a recipe that trains on images of one size"


class Recipe(NamedTuple):
    """A recipe as far as a plan needs it.

    method:      with the shapes of its weights, and no values
    data:        the data module, nothing opened
    accumulate:  micro-batches in an optimizer step
    max_epochs, max_steps: -1 or None for no such limit
    limit:       `trainer.limit_train_batches`: batches of an epoch, or a share of them
    precision:   that of the run; where none is named, that of a GPU that has bfloat16
    seed:        of the run
    machines:    that `trainer.num_nodes` names
    is_sharded:  whether weights are spread over the devices
    """

    method: LightningModule
    data: OneSizeDataModule
    accumulate: int
    max_epochs: int | None
    max_steps: int
    limit: float
    precision: str
    seed: int
    machines: int
    is_sharded: bool

    @property
    def is_half(self) -> bool:
        """Whether activations are kept in 16 bits."""
        return self.precision.startswith(("16", "bf16"))


def plan(arguments: Sequence[str]) -> int:
    """The verb; returns the exit code."""
    parser = argparse.ArgumentParser(prog="patchlight plan", allow_abbrev=False)
    parser.add_argument("--devices", default=",".join(map(str, DEVICES)))
    parser.add_argument("--images", type=int, help="images in the training set")
    parser.add_argument("--shards", type=int, help="devices whose images are shown")
    parser.add_argument("--epoch", type=int, default=0, help="which epoch of --shards")
    given, rest = parser.parse_known_args(list(arguments))
    devices = [number(text) for text in given.devices.split(",")]
    if given.images is not None and given.images < 1:
        raise ValueError(f"--images {given.images}; expected at least 1")
    if given.epoch < 0:
        raise ValueError(f"--epoch {given.epoch}; expected at least 0, the first")
    console = Console(highlight=False)
    _, *rest = take_weights(["fit", *rest])
    with torch.device("meta"):
        recipe = read(rest)
    source = None if given.images else training_set(recipe)
    images = given.images or len(source or ())
    if given.shards is not None:
        groups = source.groups if isinstance(source, Grouped) else None
        console.print(shards(recipe, images, number(str(given.shards)), given.epoch, groups))
        return 0
    how = (recipe.method, recipe.is_sharded)
    memories = [memory_of(*how, count, recipe.is_half) for count in devices]
    an_image = activations(recipe.method, recipe.data, recipe.is_half)
    console.print(table(recipe, images, devices, memories, an_image))
    console.print(f"{images:,} images. {told(recipe, devices[0], memories, an_image)}")
    return 0


def training_set(recipe: Recipe) -> Source:
    """
    Raises:
        ValueError: it is not at hand.
    """
    try:
        return recipe.data.open("train")
    except (ValueError, FileNotFoundError) as error:
        raise ValueError(f"{error}; or say with --images N how many images it will have") from error


def told(recipe: Recipe, devices: int, memories: Sequence[Memory], an_image: float) -> str:
    """What the memory of a device is made of, on the first of some numbers of devices."""
    memory, buckets = memories[0], max(memory.buckets for memory in memories)
    shared = ""
    if recipe.is_sharded:
        shared = f" on {devices} devices, {memory.gathered / GIB:.2f} GiB gathered at a time"
    elif buckets:
        shared = f", {buckets / GIB:.2f} GiB of buckets in which 2 or more devices average them"
    copies = f", {memory.copies / GIB:.2f} GiB of their copies in 16 bits" if recipe.is_half else ""
    return (
        f"Memory in {recipe.precision}: {memory.weights / GIB:.2f} GiB of weights{copies}, "
        f"{memory.training / GIB:.2f} GiB of gradients and optimizer{shared}, and "
        f"{an_image / 2**20:.1f} MiB an image that backbone and decoder keep for backward; heads, "
        f"losses and what the allocator wastes come on top."
    )


def number(text: str) -> int:
    """
    Raises:
        ValueError: no number of devices.
    """
    if not text.strip().isdigit() or int(text) < 1:
        raise ValueError(f"{text!r} is no number of devices; expected such as 1,8,64")
    return int(text)


def read(arguments: Sequence[str]) -> Recipe:
    """Build what a recipe names; nothing is trained, opened or downloaded.

    Raises:
        ValueError: packs, whose batches have no fixed number of images; texts; no batches at all;
            what cannot be sharded and is to be.
    """
    from experiments.cli import BASE, usual_precision  # which knows this verb

    parser = LightningArgumentParser(default_config_files=[str(BASE)])
    parser.add_argument("--config", "-c", action="config")
    parser.add_argument("--seed_everything", type=bool | int, default=0)
    parser.add_argument("--runs", default="runs")
    parser.add_argument("--compile", type=bool, default=False)
    parser.add_argument("--ckpt_path")  # a run's config has it; weights have no part in a plan
    parser.add_lightning_class_args(LightningModule, "model", subclass_mode=True)
    parser.add_lightning_class_args(LightningDataModule, "data", subclass_mode=True)
    parser.add_class_arguments(Trainer, "trainer", instantiate=False)
    parser.add_lightning_class_args(Checkpoint, "checkpoint")
    config = parser.parse_args(list(arguments))
    trainer = config.trainer
    callbacks = [callback.class_path.rpartition(".")[2] for callback in trainer.callbacks or []]
    # Callbacks and plugins have no part in a plan.
    trainer.callbacks, trainer.plugins, config.checkpoint.monitor = None, None, None
    built = parser.instantiate(config)
    if not isinstance(built.data, OneSizeDataModule):
        is_packed = isinstance(built.data, PackedDataModule)
        raise ValueError(
            f"a plan needs batches of a fixed number of images, and {type(built.data).__name__} "
            f"has none; "
            + ("how many images fill a pack, its run logs as it begins" if is_packed else OTHER)
        )
    if trainer.limit_train_batches == 0:
        raise ValueError("trainer.limit_train_batches is 0, so there is nothing to plan; remove it")
    strategy = str(getattr(trainer.strategy, "class_path", trainer.strategy))
    is_sharded = strategy.lower().endswith("sharded")
    if is_sharded:
        check(built.model, callbacks)
    return Recipe(
        method=built.model,
        data=built.data,
        accumulate=int(trainer.accumulate_grad_batches or 1),
        max_epochs=trainer.max_epochs,
        max_steps=int(trainer.max_steps),
        limit=1.0 if trainer.limit_train_batches is None else trainer.limit_train_batches,
        precision=str(trainer.precision or usual_precision(trainer.accelerator) or "32-true"),
        seed=run_seed() if isinstance(config.seed_everything, bool) else config.seed_everything,
        machines=int(trainer.num_nodes or 1),
        is_sharded=is_sharded,
    )


def table(
    recipe: Recipe,
    images: int,
    devices: Sequence[int],
    memories: Sequence[Memory],
    an_image: float,
) -> Table:
    """One row for every number of devices, `an_image` in bytes of memory."""
    per_device = recipe.data.batch_size
    rows = Table(title=type(recipe.method).__name__)
    for title in ("devices", "global\nbatch", "peak\nrate", "steps\nan epoch", "steps", "epochs"):
        rows.add_column(title, no_wrap="rate" not in title)  # where a row may say why it has none
    rows.add_column("GiB a\ndevice", no_wrap=True)
    optimization = getattr(recipe.method, "optimization", Optimization())
    for count, memory in zip(devices, memories, strict=True):
        batch = per_device * count * recipe.accumulate
        batches = images // (per_device * count)
        if batches == 0:
            rows.add_row(str(count), f"{batch:,}", f"more than the {images:,} images", *[""] * 4)
            continue
        steps = -(-limited(batches, recipe.limit) // recipe.accumulate)
        total, epochs = length(recipe, steps)
        gib = (sum(memory) + an_image * per_device) / GIB
        rows.add_row(
            *(str(count), f"{batch:,}", f"{peak(optimization, batch):.3g}", f"{steps:,}"),
            *("no end" if total is None else f"{total:,}", epochs, f"{gib:.1f}"),
        )
    return rows


def length(recipe: Recipe, steps_an_epoch: int) -> tuple[int | None, str]:
    """Optimizer steps of the run, None for one without an end, and its epochs in words."""
    limits = []
    if recipe.max_epochs is not None and recipe.max_epochs >= 0:
        limits.append(recipe.max_epochs * steps_an_epoch)
    if recipe.max_steps >= 0:
        limits.append(recipe.max_steps)
    if not limits:
        return None, ""
    return min(limits), f"{min(limits) / steps_an_epoch:.4g}"


def shards(
    recipe: Recipe, images: int, devices: int, epoch: int, groups: Groups | None = None
) -> Table:
    """Which images each device takes in an epoch: how many, and the first of them.

    With `groups` on `recipe.machines` machines, each of which reads files of its own.
    """
    title = f"epoch {epoch} of {images:,} images on {devices} devices"
    rows = Table("device", "images", "of which the first", title=title)
    for rank in range(devices):
        repeats = getattr(recipe.data, "repeats", 1)
        batches = TrainBatches(
            *(images, recipe.data.batch_size, recipe.seed, rank, devices),
            repeats=repeats,
            groups=groups,
            lanes=recipe.machines,
        )
        first = next(batches.batches(epoch, 0))
        shown = ", ".join(str(sample.item) for sample in first[:8])
        taken = limited(len(batches), recipe.limit) * recipe.data.batch_size
        rows.add_row(str(rank), f"{taken:,}", f"{shown}, ...")
    return rows
