"""`patchlight look`: what a backbone looks at and has learned, as pictures.

    patchlight look --checkpoint RUN/checkpoints/best.ckpt --images DIR
    patchlight look --checkpoint dino_deitsmall8.pth --images DIR --side 480

Images are cut to the largest centred box of the wanted aspect and resized. The pictures are those
of `modules.drawing.pictures_of`, and of a masked autoencoder its reconstructions.
"""

import argparse
import inspect
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from rich.console import Console
from rich.progress import track
from torch import Tensor

from datamodules.augment import normalize
from datamodules.folder import decode
from datamodules.geometry import EvalGeometry
from datamodules.index import open_index
from datamodules.sources import BadImageError
from experiments.subject import (
    RANDOM,
    Subject,
    add_arguments,
    hyper_parameters_of,
    open_subject,
    read_config,
)
from modules.backbones import Backbone
from modules.drawing import pictures_of
from modules.mae import Autoencoder
from modules.weights import load, open_source


def chosen_paths(images: Path, count: int) -> list[Path]:
    """At most `count` images, evenly over a directory and those below it, or one file.

    Raises:
        ValueError: nothing there, or no image in it.
    """
    if images.is_file():
        return [images]
    if not images.is_dir():
        raise ValueError(f"--images {images} does not exist; expected a directory of images")
    index = open_index(images)
    taken = min(count, len(index))
    return [index.path(i * len(index) // taken) for i in range(taken)]


def read_images(
    paths: Sequence[Path], size: tuple[int, int], channels: int, console: Console
) -> Tensor:
    """uint8 [b, c, height, width]; files that cannot be read are told and left out.

    Raises:
        ValueError: none could be read.
    """
    geometry = EvalGeometry(size, share=1.0, interpolation="bicubic")
    read = []
    for path in paths:
        try:
            read.append(geometry(decode(path, channels), 0))
        except BadImageError as error:
            console.print(f"left out: {error}", markup=False)
    if not read:
        raise ValueError(f"none of {len(paths)} images could be read, the first is {paths[0]}")
    return torch.stack(read)


def size_for(backbone: Backbone, side: int | None, size: Sequence[int] | None) -> tuple[int, int]:
    """(height, width) in pixels: what was asked for, or what the backbone was built for.

    Raises:
        ValueError: a size that patches do not divide, or none for a backbone that takes any.
    """
    if size is not None:
        wanted = (size[0], size[1])
    elif side is not None:
        wanted = (side, side)
    elif backbone.image_size is not None:
        wanted = backbone.image_size
    else:
        raise ValueError("this backbone takes images of any size; choose one, such as --side 224")
    patch = backbone.patch_size
    if min(wanted) < patch or any(n % patch for n in wanted):
        fits = "x".join(str(patch * max(1, round(n / patch))) for n in wanted)
        raise ValueError(
            f"images of {wanted[0]}x{wanted[1]} are not divisible by patches of {patch}; nearest "
            f"that fits: {fits}"
        )
    return wanted


def autoencoder_of(subject: Subject, config: Path | None, console: Console) -> Autoencoder | None:
    """The masked autoencoder that a subject is the encoder of; None where there is no decoder.

    Its options are those of the recipe, of the run, or those kept in the checkpoint.
    """
    if subject.checkpoint == RANDOM:
        return None
    if "decoder_embed.weight" not in open_source(subject.checkpoint)[subject.network]:
        return None
    options: dict[str, Any] = hyper_parameters_of(subject.checkpoint)
    path = config or (None if subject.run is None else subject.run / "config.yaml")
    if path is not None:
        options = read_config(path)["model"].get("init_args") or {}
    elif "mask_ratio" not in options:
        console.print(
            f"{subject.checkpoint} has a decoder, but does not tell how it was trained; "
            f"--config RECIPE (such as experiments/mae/vit_b16.yaml) would show reconstructions",
            markup=False,
        )
        return None
    known = [name for name in inspect.signature(Autoencoder).parameters if name != "backbone"]
    given = {name: options[name] for name in known if name in options}
    network = Autoencoder(subject.backbone, **given)
    load(network, subject.checkpoint, subject.network)
    return network.eval()


def write_png(picture: Tensor, path: Path) -> None:
    """[3, height, width] in [0, 1] as a file."""
    pixels = (picture * 255.0).round().to(torch.uint8).permute(1, 2, 0).contiguous()
    Image.fromarray(np.asarray(pixels)).save(path)


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(
        prog="patchlight look", description=(__doc__ or "").splitlines()[0], allow_abbrev=False
    )
    add_arguments(made)
    made.add_argument("--images", type=Path, required=True, help="a directory of images, or one")
    made.add_argument(
        "--out", type=Path, help="directory to write to (default: RUN/pictures, else ./pictures)"
    )
    sizes = made.add_mutually_exclusive_group()
    sizes.add_argument(
        "--side", type=int, metavar="PX", help="of the images (default: the backbone's)"
    )
    sizes.add_argument("--size", type=int, nargs=2, metavar=("HEIGHT", "WIDTH"))
    made.add_argument("--count", type=int, default=8, help="images at most (default: 8)")
    made.add_argument(
        "--mass",
        type=float,
        default=0.6,
        help="share of the attention that attention_mass.png keeps (default: 0.6)",
    )
    return made


def look(argv: Sequence[str]) -> int:
    """The verb."""
    given = parser().parse_args(argv)
    if given.count < 1:
        raise ValueError(f"--count {given.count}; expected at least 1")
    if not 0.0 < given.mass <= 1.0:
        raise ValueError(f"--mass {given.mass}; expected a share within (0, 1]")
    console = Console(stderr=True, highlight=False, soft_wrap=True)
    paths = chosen_paths(given.images, given.count)
    subject = open_subject(given.checkpoint, given.network, given.config)
    backbone = subject.backbone
    size = size_for(backbone, given.side, given.size)
    images = read_images(paths, size, backbone.in_channels, console)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")

    def with_bar(groups: Sequence[Tensor]) -> Iterable[Tensor]:
        return track(groups, description="looking", console=console, transient=True)

    normal = normalize(images.to(device), subject.mean, subject.std)
    by = (subject.mean, subject.std)
    pictures = pictures_of(backbone.to(device), normal, *by, given.mass, with_bar)
    autoencoder = autoencoder_of(subject, given.config, console)
    if autoencoder is not None:
        pictures["reconstruction"] = autoencoder.to(device).picture(normal, *by)
    out = given.out or (Path("pictures") if subject.run is None else subject.run / "pictures")
    out.mkdir(parents=True, exist_ok=True)
    for name, picture in pictures.items():
        write_png(picture, out / f"{name}.png")
        print(out / f"{name}.png")
    return 0
