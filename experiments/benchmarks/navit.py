"""Training steps on images of any size: packs, other people's NaViTs, and a dense ViT.

    python -m experiments.benchmarks.navit [--variant Ti] [--tokens 4096] [--rounds 10]

Images with sides of 32 to 160 pixels and aspects of 1:3 to 3:1 (patches of 8, 10 classes), random
pixels that are in memory already; every network has the same width, depth and heads.

    patchlight     our NaViT on packs of rows of 1,024 tokens
    vit-pytorch    its NaViT on a list of images, grouped by itself (`group_images=True`)
    timm NaFlex    one image a row, padded to buckets of 128, 256 and 576 tokens
    dense          our ViT on square images of 196 tokens, as many tokens in all

A step is forward, cross-entropy, backward and fused AdamW. Tokens are patches of images: padding
counts for nothing. The arms take turns round by round, in another order each time.
On a GPU in bfloat16 autocast, on a CPU in float32.
"""

import argparse
import random
import statistics
import time
from collections.abc import Callable

import numpy as np
import timm
import torch
import torch.nn.functional as F
from einops import rearrange
from rich.console import Console
from rich.table import Table
from timm.models.naflexvit import NaFlexVit, NaFlexVitCfg
from torch import Tensor, nn

from datamodules.batch import PackedBatch
from datamodules.packed import Cut, PackedDataset, collate
from datamodules.packing import Layout, Resolution, plan
from datamodules.rows import rows_of
from datamodules.sources import Example
from modules.backbones import NaViT, ViT
from modules.backbones.vit import VARIANTS
from modules.supervised import Classifier

PATCH, CLASSES, LENGTH = 8, 10, 1024
BUCKETS = (128, 256, 576)


class Scenes:
    """A source of random pixels with the sizes of the NaViT quickstart."""

    class_names = tuple(str(i) for i in range(CLASSES))
    channels = 3

    def __init__(self, count: int) -> None:
        rng = np.random.default_rng(0)
        side, aspect = rng.uniform(32, 160, count), 3.0 ** rng.uniform(-1, 1, count)
        self.sizes = np.stack((side * aspect**-0.5, side * aspect**0.5), axis=1).round()
        self.sizes = self.sizes.astype(np.int32).clip(PATCH)
        self.pixels = rng.integers(0, 256, (320, 320, 3), np.uint8)

    def __len__(self) -> int:
        return len(self.sizes)

    def size(self, index: int) -> tuple[int, int]:
        height, width = self.sizes[index].tolist()
        return height, width

    def __getitem__(self, index: int) -> Example:
        height, width = self.size(index)
        return Example(self.pixels[:height, :width], index % CLASSES)

    def describe(self, index: int) -> str:
        return f"scene {index}"


Step = Callable[[], int]  # trains once and returns how many patches it saw


def trained(network: nn.Module, device: torch.device) -> Callable[[Callable[[], Tensor]], None]:
    """A function that takes a loss and makes one step of it."""
    network.to(device).train()
    optimizer = torch.optim.AdamW(network.parameters(), lr=1e-4, fused=True)

    def step(loss: Callable[[], Tensor]) -> None:
        optimizer.zero_grad()
        with torch.autocast(device.type, dtype=torch.bfloat16, enabled=device.type == "cuda"):
            value = loss()
        value.backward()  # type: ignore[no-untyped-call]
        optimizer.step()

    return step


def in_turn(items: list[Callable[[], int]]) -> Step:
    """Take another one of the prepared batches every time."""
    turn = iter(range(10**9))
    return lambda: items[next(turn) % len(items)]()


def ours(variant: str, batches: list[PackedBatch], device: torch.device) -> Step:
    network = Classifier(NaViT(variant, patch_size=PATCH), CLASSES)
    step = trained(network, device)

    def on(batch: PackedBatch) -> int:
        step(
            lambda: batch.mean(
                F.cross_entropy(network(batch.images), batch.labels, reduction="none")
            )
        )
        return batch.num_tokens

    return in_turn([lambda batch=batch: on(batch) for batch in batches])  # type: ignore[misc]


def vit_pytorch(variant: str, groups: list[list[Tensor]], device: torch.device) -> Step:
    from vit_pytorch.na_vit import NaViT as PytorchNaViT

    size = VARIANTS[variant]
    network = PytorchNaViT(
        image_size=320,
        patch_size=PATCH,
        num_classes=CLASSES,
        dim=size.embed_dim,
        depth=size.depth,
        heads=size.num_heads,
        mlp_dim=size.mlp_dim,
        dim_head=size.embed_dim // size.num_heads,
    )
    step = trained(network, device)

    def on(images: list[Tensor]) -> int:
        labels = torch.arange(len(images), device=device) % CLASSES
        step(lambda: F.cross_entropy(network(images, group_images=True), labels))
        return sum(image.shape[1] * image.shape[2] // PATCH**2 for image in images)

    return in_turn([lambda images=images: on(images) for images in groups])  # type: ignore[misc]


def naflex(variant: str, images: list[Tensor], tokens: int, device: torch.device) -> Step:
    size = VARIANTS[variant]
    network = NaFlexVit(
        NaFlexVitCfg(
            patch_size=PATCH,
            embed_dim=size.embed_dim,
            depth=size.depth,
            num_heads=size.num_heads,
            mlp_ratio=size.mlp_dim / size.embed_dim,
            pos_embed="factorized",
            global_pool="map",
        ),
        num_classes=CLASSES,
    )
    step = trained(network, device)
    batches = [
        {name: value.to(device) for name, value in batch.items()}
        for bucket in BUCKETS
        for batch in padded(images, bucket, tokens)
    ]
    random.Random(0).shuffle(batches)  # all buckets in their share

    def on(batch: dict[str, Tensor]) -> int:
        labels = torch.arange(len(batch["patches"]), device=device) % CLASSES
        step(lambda: F.cross_entropy(network(batch), labels))
        return int(batch["patch_valid"].sum())

    return in_turn([lambda batch=batch: on(batch) for batch in batches])  # type: ignore[misc]


def padded(images: list[Tensor], bucket: int, tokens: int) -> list[dict[str, Tensor]]:
    """Batches of `tokens` places with the images that belong into a bucket."""
    below = max((b for b in BUCKETS if b < bucket), default=0)
    rows = []
    for image in images:
        pattern = "c (y p) (x q) -> (y x) (p q c)"
        patches = rearrange(image, pattern, p=PATCH, q=PATCH)
        if below < len(patches) <= bucket:
            places = torch.cartesian_prod(
                *(torch.arange(n // PATCH, device=image.device) for n in image.shape[1:])
            )
            rest = bucket - len(patches)
            is_valid = torch.arange(bucket, device=image.device) < len(patches)
            rows.append((F.pad(patches, (0, 0, 0, rest)), F.pad(places, (0, 0, 0, rest)), is_valid))
    count = max(1, tokens // bucket)
    found = []
    for start in range(0, len(rows) - count + 1, count):
        columns = [torch.stack(column) for column in zip(*rows[start : start + count], strict=True)]
        found.append(dict(zip(("patches", "patch_coord", "patch_valid"), columns, strict=True)))
    return found


def dense(variant: str, tokens: int, device: torch.device) -> Step:
    side = 14 * PATCH
    network = Classifier(ViT(variant, PATCH, side, pooling="map", class_token=False), CLASSES)
    step = trained(network, device)
    images = torch.randn(round(tokens / 196), 3, side, side, device=device)
    labels = torch.arange(len(images), device=device) % CLASSES

    def on() -> int:
        step(lambda: F.cross_entropy(network(images), labels))
        return len(images) * 196

    return on


def packs(tokens: int, device: torch.device) -> tuple[list[PackedBatch], list[list[Tensor]]]:
    """Batches of packed images, and the same images batch by batch as a list."""
    source = Scenes(4000 * max(1, tokens // 4096))
    layout = Layout(tokens // LENGTH, LENGTH, 12, PATCH, 0, None)
    planned = plan(source.sizes, 0, 0, layout, Resolution("native", 32, 160))
    dataset = PackedDataset(source, Cut(PATCH, "bilinear"), layout)
    batches, lists = [], []
    for number in range(12):
        rows = rows_of(planned, range(number * layout.num_rows, (number + 1) * layout.num_rows))
        batch = collate([dataset[row] for row in rows])
        divisor = torch.tensor(float(batch.num_images))
        patches = batch.images.patches.float() / 128 - 1
        images = batch.images._replace(patches=patches)
        batch = batch._replace(images=images, divisor=divisor)
        lists.append([image.to(device) for image in taken_apart(batch)])
        images = images._replace(
            **{
                name: getattr(images, name).to(device)
                for name in images._fields
                if name != "num_prefix"
            }
        )
        batches.append(
            batch._replace(
                images=images,
                labels=batch.labels.to(device),
                is_valid=batch.is_valid.to(device),
                divisor=divisor.to(device),
            )
        )
    return batches, lists


def taken_apart(batch: PackedBatch) -> list[Tensor]:
    """The images [c, height, width] of a pack from which nothing was dropped."""
    slots = len(batch.labels) // len(batch.images.segments)
    found = []
    for image in batch.is_valid.nonzero().flatten().tolist():
        row, slot = divmod(image, slots)
        patches = batch.images.patches[row][batch.images.segments[row] == slot]
        rows = int(batch.images.grids[image, 0])
        found.append(rearrange(patches, "(y x) (c p q) -> c (y p) (x q)", y=rows, p=PATCH, q=PATCH))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--variant", choices=VARIANTS, default="Ti")
    parser.add_argument("--tokens", type=int, default=4096, help="of a step")
    parser.add_argument("--rounds", type=int, default=10)
    given = parser.parse_args()
    torch.manual_seed(0)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    batches, lists = packs(given.tokens, device)
    arms: dict[str, Step] = {
        "patchlight": ours(given.variant, batches, device),
        "vit-pytorch": vit_pytorch(given.variant, lists, device),
        "timm NaFlex": naflex(
            given.variant, [image for images in lists for image in images], given.tokens, device
        ),
        "dense": dense(given.variant, given.tokens, device),
    }
    repeats = 12 if device.type == "cuda" else 4  # of each arm in a round
    rates: dict[str, list[float]] = {name: [] for name in arms}
    names = list(arms)
    for turn in range(given.rounds + 1):
        start = turn % len(names)
        for name in names[start:] + names[:start]:
            if device.type == "cuda":
                torch.cuda.synchronize()
            began, seen = time.perf_counter(), 0
            for _ in range(repeats):
                seen += arms[name]()
            if device.type == "cuda":
                torch.cuda.synchronize()
            if turn:  # the first round only warms up
                rates[name].append(seen / (time.perf_counter() - began))
    table = Table("network", "tokens/s", "ours is faster by", "quartiles")
    for name in names:
        ratios = [ours / its for ours, its in zip(rates["patchlight"], rates[name], strict=True)]
        low, middle, high = statistics.quantiles(ratios, n=4)
        quartiles = f"{low:.3f} to {high:.3f}"
        table.add_row(name, f"{statistics.median(rates[name]):,.0f}", f"{middle:.3f}", quartiles)
    Console().print(table)
    fill = sum(b.num_tokens for b in batches) / (len(batches) * given.tokens)
    where = torch.cuda.get_device_name() if device.type == "cuda" else "CPU"
    print(
        f"{given.variant}/{PATCH}, {given.tokens} tokens a step, packs filled to "
        f"{100 * fill:.1f} %, "
        f"{where}, torch {torch.__version__}, timm {timm.__version__}, "
        f"{torch.get_num_threads()} threads"
    )


if __name__ == "__main__":
    main()
