"""Images/s of multi-crop on one core: ours, PIL transforms as published, lightly's.

    python -m experiments.benchmarks.multicrop [--rounds 15] [--batch 16] [--quality 90]

JPEGs of 500 x 375 pixels made here (soft noise of several sizes with sharp discs on it), read from
a folder. Every arm makes DINO's default views: two of 224 pixels and eight of 96.

    patchlight      decode, cut, resize, collate: uint8 batches, as they go to the device
    its device part flip, jitter, grayscale, blur, solarize, normalise: on the GPU where there is
                    one, else on the same core
    published       torchvision's transforms on PIL images, composed as in DINO's main_dino.py,
                    down to normalised tensors
    lightly         its DINOTransform with eight local views; left out where it is not installed

One thread each. The arms take turns round by round, in another order each time; the table shows
medians, and the median and quartiles of the ratios round by round.
"""

import argparse
import os
import random
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import PIL
import torch
import torchvision
from lightning.fabric.utilities import move_data_to_device
from PIL import Image, ImageDraw, ImageFilter
from rich.console import Console
from rich.table import Table
from torchvision import transforms as T

from datamodules import MultiCropDataModule
from datamodules.batch import MultiCropBatch
from datamodules.module import IMAGENET_MEAN, IMAGENET_STD

OURS, DEVICE, BOTH = "patchlight", "its device part", "both, one after the other"
NUM_IMAGES = 64
Arm = Callable[[int], object]  # makes one batch; takes the number of the round


def photo(rng: np.random.Generator, width: int = 500, height: int = 375) -> Image.Image:
    """Noise at four scales, so that it compresses like a photograph, and eight sharp discs."""
    pixels = np.full((height, width, 3), 128.0)
    for rows, strength in ((6, 60.0), (24, 30.0), (96, 15.0), (height, 6.0)):
        noise = rng.normal(0.0, strength, (rows, rows * width // height, 3)).astype(np.float32)
        for c in range(3):
            layer = Image.fromarray(np.ascontiguousarray(noise[..., c]))
            pixels[..., c] += np.asarray(layer.resize((width, height), Image.Resampling.BICUBIC))
    image = Image.fromarray(pixels.clip(0, 255).astype(np.uint8))
    draw = ImageDraw.Draw(image)
    for x, y, r, *color in rng.integers(0, 256, (8, 6)).tolist():
        box = (2 * x - r // 4, 1.5 * y - r // 4, 2 * x + r // 4, 1.5 * y + r // 4)
        draw.ellipse(box, fill=tuple(color))
    return image


class PILBlur:
    """PIL's Gaussian blur with a radius uniform in (0.1, 2), with a probability."""

    def __init__(self, probability: float) -> None:
        self.probability = probability

    def __call__(self, image: Image.Image) -> Image.Image:
        if random.random() >= self.probability:
            return image
        return image.filter(ImageFilter.GaussianBlur(random.uniform(0.1, 2.0)))


def published() -> Callable[[Image.Image], list[torch.Tensor]]:
    """DINO's views of one image, in its own order."""

    def view(side: int, scale: tuple[float, float], blur: float, solarize: float) -> T.Compose:
        jitter = T.RandomApply([T.ColorJitter(0.4, 0.4, 0.2, 0.1)], p=0.8)
        bicubic = T.InterpolationMode.BICUBIC
        return T.Compose(
            [
                T.RandomResizedCrop(side, scale=scale, interpolation=bicubic),
                *(T.RandomHorizontalFlip(0.5), jitter, T.RandomGrayscale(0.2), PILBlur(blur)),
                *([T.RandomSolarize(128, p=solarize)] if solarize else []),
                *(T.ToTensor(), T.Normalize(IMAGENET_MEAN, IMAGENET_STD)),
            ]
        )

    views = [view(224, (0.4, 1.0), 1.0, 0.0), view(224, (0.4, 1.0), 0.1, 0.2)]
    views += [view(96, (0.05, 0.4), 0.5, 0.0)] * 8
    return lambda image: [make(image) for make in views]


def opened(path: Path) -> Image.Image:
    with Image.open(path) as image:
        decoded: Image.Image = image.convert("RGB")
    return decoded


def from_files(
    transform: Callable[[Image.Image], list[torch.Tensor]], paths: list[Path], batch: int
) -> Arm:
    def run(turn: int) -> object:
        chosen = [paths[(turn * batch + i) % len(paths)] for i in range(batch)]
        views = [transform(opened(path)) for path in chosen]
        return [torch.stack(view) for view in zip(*views, strict=True)]

    return run


class Ours:
    """Our two parts; the second works on what the first made last."""

    def __init__(self, root: Path, batch: int, device: torch.device) -> None:
        self.data = MultiCropDataModule(
            *("folder", str(root)), image_size=224, batch_size=batch, num_workers=0
        )
        self.data.setup("fit")
        self.device, self.batches = device, self.endless()
        self.made = next(self.batches)

    def endless(self) -> Iterator[MultiCropBatch]:
        while True:
            yield from self.data.train_dataloader()

    def in_worker(self, turn: int) -> None:
        self.made = next(self.batches)

    def on_device(self, turn: int) -> None:
        self.data.on_after_batch_transfer(move_data_to_device(self.made, self.device), 0)
        if self.device.type == "cuda":
            torch.cuda.synchronize()


def measure(arms: dict[str, Arm], rounds: int) -> dict[str, list[float]]:
    """Seconds that each arm took for a batch, round by round, after one to warm up."""
    seconds: dict[str, list[float]] = {name: [] for name in arms}
    names = list(arms)
    for turn in range(rounds + 1):
        start = turn % len(names)
        for name in names[start:] + names[:start]:
            began = time.perf_counter()
            arms[name](turn)
            if turn:
                seconds[name].append(time.perf_counter() - began)
    return seconds


def make_arms(root: Path, batch: int, quality: int, device: torch.device) -> dict[str, Arm]:
    rng = np.random.default_rng(0)
    paths = [root / f"{i:03}.jpg" for i in range(NUM_IMAGES)]
    for path in paths:
        photo(rng).save(path, quality=quality)
    size = statistics.mean(path.stat().st_size for path in paths)
    print(f"{NUM_IMAGES} JPEGs, {size / 1000:.0f} kB on average")
    ours = Ours(root, batch, device)
    arms: dict[str, Arm] = {OURS: ours.in_worker, DEVICE: ours.on_device}
    arms["published"] = from_files(published(), paths, batch)
    try:
        from lightly.transforms import DINOTransform
    except ImportError:
        print("lightly is not installed: its arm is left out")
    else:
        arms["lightly"] = from_files(DINOTransform(n_local_views=8), paths, batch)
    return arms


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--batch", type=int, default=16, help="images an arm takes in a round")
    parser.add_argument("--quality", type=int, default=90, help="of the JPEGs")
    given = parser.parse_args()
    torch.set_num_threads(1)
    random.seed(0)
    torch.manual_seed(0)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    with tempfile.TemporaryDirectory() as directory:
        os.environ["PATCHLIGHT_CACHE"] = str(Path(directory) / "cache")
        root = Path(directory) / "images"
        root.mkdir()
        seconds = measure(make_arms(root, given.batch, given.quality, device), given.rounds)
    seconds[BOTH] = [a + b for a, b in zip(seconds[OURS], seconds[DEVICE], strict=True)]
    table = Table("arm", "images/s", "time, of patchlight's", "quartiles")
    for name, times in seconds.items():
        ratios = [its / ours for its, ours in zip(times, seconds[OURS], strict=True)]
        low, middle, high = statistics.quantiles(ratios, n=4)
        rate = given.batch / statistics.median(times)
        table.add_row(name, f"{rate:.1f}", f"{middle:.2f}", f"{low:.2f} to {high:.2f}")
    Console().print(table)
    where = torch.cuda.get_device_name() if device.type == "cuda" else "the CPU"
    print(
        f"device part on {where}, torch {torch.__version__}, torchvision "
        f"{torchvision.__version__}, Pillow {PIL.__version__}, {torch.get_num_threads()} thread"
    )


if __name__ == "__main__":
    main()
