"""`patchlight relabel`: a teacher's scores for every cell of the training images, for LV-ViT.

    patchlight relabel --teacher timm:dm_nfnet_f6 --data IMAGENET --image-size 576 --out MAPS
    patchlight relabel --teacher RUN/checkpoints/best.ckpt --data shapes --out MAPS
    patchlight relabel --teacher timm:resnet18 --weights FILE --data my_images --out MAPS
    patchlight relabel --teacher RUN/checkpoints/best.ckpt --data torchvision:CIFAR10 --root DIR \
        --out MAPS
    patchlight relabel --import PUBLISHED --num-classes 1000 --data IMAGENET --out MAPS

Every training image is stretched to one size as a whole, and the teacher's global pooling is left
out. The best classes of each cell are kept. A second call goes on where one was stopped, and makes
the maps of images anew that were changed since.
"""

import argparse
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import yaml
from lightning.pytorch import Trainer
from lightning.pytorch.utilities import rank_zero_only
from rich.console import Console
from torch import nn

from callbacks.score_maps import ScoreMaps
from datamodules.label_maps import LabelMaps
from datamodules.label_shards import About, begin, clear
from datamodules.labelling import LabellingDataModule
from datamodules.module import IMAGENET_MEAN, IMAGENET_STD
from datamodules.published_maps import import_published
from datamodules.sources import Source, open_source
from experiments.subject import fingerprint, open_subject
from modules.distillation import PRETRAINED, Distillation, load
from modules.teachers import DenseTimm, Relabeling, dense
from modules.weights import open_source as open_weights
from modules.weights.files import State

HEADS = ("aux_head", "head", "head_dist")
# Options that nothing would read.
WITHOUT = {
    "--import": "weights network config image_size interpolation top remainder precision",
    "--teacher timm:NAME": "network config",
    "--teacher CHECKPOINT": "weights num_classes",
}
# What others call the options here.
NAMES = {
    "distillation.teacher": "--teacher",
    "distillation.weights": "--weights",
    "model.num_classes": "--num-classes",
    "data.source_args": "--source-args",
    "data.source": "--data",
    "data.root": "--root",
}
SOURCE = {"root": "--root", "channels": "the teacher's", "split": "always training"}


def options(text: str) -> dict[str, Any]:
    """Options as a recipe has them.

    Raises:
        ArgumentTypeError: no mapping.
    """
    try:
        found = yaml.safe_load(text)
    except yaml.YAMLError:
        found = None
    if not isinstance(found, dict):
        raise argparse.ArgumentTypeError(f"{text!r}; expected '{{name: value, ...}}'")
    return found


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="patchlight relabel",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--teacher", help="timm:NAME, or a checkpoint of ours")
    parser.add_argument("--weights", help="of timm:NAME: a file; timm's own where not given")
    parser.add_argument("--network", help="which of several in a checkpoint, such as averaged")
    parser.add_argument("--config", type=Path, help="a recipe that has the backbone")
    parser.add_argument("--import", dest="published", type=Path, help="published .pt maps")
    parser.add_argument("--data", required=True, help="a directory, or the name of a source")
    parser.add_argument("--root", help="of a source that has files: its directory")
    parser.add_argument("--source-args", type=options, default={}, help="{name: value}")
    parser.add_argument("--out", type=Path, required=True, help="directory of the maps")
    parser.add_argument("--num-classes", type=int, help="of the teacher; those of the data")
    parser.add_argument("--image-size", type=int, nargs="+", help="side, or height and width")
    parser.add_argument("--interpolation", choices=("bicubic", "bilinear"), default="bicubic")
    parser.add_argument("--top", type=int, default=5, help="classes kept in a cell; %(default)s")
    parser.add_argument("--remainder", action="store_true", help="keep the others' share as well")
    parser.add_argument("--batch-size", type=int, default=32, help="%(default)s")
    parser.add_argument("--shard-size", type=int, default=1024, help="images; %(default)s")
    parser.add_argument("--num-workers", type=int, default=2, help="%(default)s")
    parser.add_argument("--devices", default="auto", help="how many; %(default)s")
    parser.add_argument("--accelerator", default="auto", help="%(default)s")
    precisions = ("32-true", "bf16-mixed", "16-mixed")
    parser.add_argument("--precision", choices=precisions, default=precisions[0])
    return parser


def relabel(argv: Sequence[str]) -> int:
    """The verb."""
    given = make_parser().parse_args(argv)
    check_options(given)
    channels = 3
    teacher: nn.Module | None = None
    mean: tuple[float, ...] = IMAGENET_MEAN
    std: tuple[float, ...] = IMAGENET_STD
    side = (224, 224)
    if given.teacher is not None and not given.teacher.startswith("timm:"):
        teacher, mean, std, side, channels = teacher_of_ours(given)
    source, root = open_images(given, channels)
    num_classes = given.num_classes or len(source.class_names)
    if not num_classes and teacher is None:
        raise ValueError("the data has no labels that tell the classes; name --num-classes")
    if given.published is not None:
        check_classes(num_classes, source)
        how = (given.published, given.out, source, root, num_classes, given.shard_size)
        import_published(*how)
    else:
        if teacher is None:
            teacher, mean, std, side = timm_teacher(given, num_classes, channels)
        size = side if given.image_size is None else as_size(given.image_size)
        module = Relabeling(teacher, mean, std, given.top, given.remainder)
        known = classes_of(teacher, size, channels)
        check_classes(known, source)
        if not 1 <= given.top <= known:
            raise ValueError(f"--top is {given.top}; expected 1 to {known}, the teacher's classes")
        about = About(
            *(describe(given, size), known, given.top, given.remainder),
            *(fingerprint(module), given.interpolation, given.precision),
        )
        begin(given.out, about)
        data = LabellingDataModule(
            *(source, root, given.out, about, size, given.interpolation),
            *(given.batch_size, given.shard_size, given.num_workers),
        )
        predict(given, module, data)
    if rank_zero_only.rank != 0:  # type: ignore[attr-defined]
        return 0
    clear(given.out, -(-len(source) // given.shard_size))
    maps = LabelMaps(given.out, source, root)
    maps.check_values()
    rows, columns = maps.largest()
    Console(highlight=False, markup=False, soft_wrap=True).print(
        f"{given.out}: maps of {len(source):,} images, up to {rows}x{columns} cells, "
        f"{maps.about.top_k} of {maps.about.num_classes} classes each"
    )
    return 0


@contextmanager
def own_names() -> Iterator[None]:
    """Errors of others name the options here."""
    try:
        yield
    except ValueError as error:
        said = str(error)
        for theirs, ours in NAMES.items():
            said = said.replace(theirs, ours)
        raise ValueError(said) from error


def check_options(given: argparse.Namespace) -> None:
    """Refuse what would be ignored."""
    if (given.teacher is None) == (given.published is None):
        raise ValueError("name a teacher (--teacher), or published maps to import (--import)")
    is_timm = given.teacher is not None and given.teacher.startswith("timm:")
    kind = "--import" if given.teacher is None else tuple(WITHOUT)[1 if is_timm else 2]
    for name in WITHOUT[kind].split():
        value = getattr(given, name)
        if value != make_parser().get_default(name):
            option = name.replace("_", "-")
            raise ValueError(f"--{option} is {value}, which nothing reads with {kind}; leave it")


def check_classes(num_classes: int, source: Source) -> None:
    if len(source.class_names) > num_classes:
        raise ValueError(
            f"the maps are of {num_classes} classes, but the data has {len(source.class_names)}; "
            f"take a teacher of these classes"
        )


def predict(given: argparse.Namespace, module: Relabeling, data: LabellingDataModule) -> None:
    """Make what is missing, on all devices."""
    if not data.missing:
        return
    trainer = Trainer(
        accelerator=given.accelerator,
        devices=int(given.devices) if given.devices.isdecimal() else given.devices,
        precision=given.precision,
        logger=False,
        callbacks=[ScoreMaps()],
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
    )
    with warnings.catch_warnings():
        # Lightning cannot tell that no batch of ours drops an image.
        warnings.filterwarnings("ignore", "You are using a custom batch sampler")
        trainer.predict(module, datamodule=data, return_predictions=False)
    trainer.strategy.barrier()


def open_images(given: argparse.Namespace, channels: int) -> tuple[Source, str | None]:
    """The training images, and the root that names are relative to."""
    for name in given.source_args:
        if name in SOURCE:
            raise ValueError(f"--source-args has {name}; remove it: it is {SOURCE[name]}")
    name, root = given.data, given.root
    if Path(name).exists():
        if root is not None:
            raise ValueError(f"--root is {root}, but --data {name} is a directory itself; leave it")
        name, root = "folder", given.data
    with own_names():
        return open_source(name, "train", root, channels=channels, **given.source_args), root


def as_size(sides: Sequence[int]) -> tuple[int, int]:
    if len(sides) > 2 or min(sides) < 1:
        raise ValueError(f"--image-size {sides}: expected a side, or height and width")
    return sides[0], sides[-1]


def describe(given: argparse.Namespace, size: tuple[int, int]) -> str:
    """The teacher in words: another one must not go on with these maps."""
    parts = [given.teacher, given.weights, given.network]
    return " ".join([*(str(p) for p in parts if p is not None), f"at {size[0]}x{size[1]}"])


def classes_of(teacher: nn.Module, size: tuple[int, int], channels: int) -> int:
    """How many classes a teacher knows; that it takes such images is seen before it begins."""
    try:
        with torch.no_grad():
            return int(teacher(torch.zeros(1, channels, *size)).shape[1])
    except (AssertionError, RuntimeError) as error:
        raise ValueError(
            f"the teacher cannot take images of {size[0]}x{size[1]}: {error}; set --image-size"
        ) from error


def timm_teacher(
    given: argparse.Namespace, num_classes: int, channels: int
) -> tuple[nn.Module, tuple[float, ...], tuple[float, ...], tuple[int, int]]:
    """A timm network with weights, what it is normalised with, and its size."""
    name = given.teacher.removeprefix("timm:")
    with own_names():
        network = load(Distillation(name, given.weights or PRETRAINED), num_classes, channels)
    config: Any = network.pretrained_cfg
    return DenseTimm(network), config["mean"], config["std"], config["input_size"][1:]


def teacher_of_ours(
    given: argparse.Namespace,
) -> tuple[nn.Module, tuple[float, ...], tuple[float, ...], tuple[int, int], int]:
    """A network of a checkpoint with its head, and the same of it."""
    subject = open_subject(given.teacher, given.network, given.config)
    state = open_weights(given.teacher)[subject.network]
    heads = {name: linear(state, name) for name in HEADS if f"{name}.weight" in state}
    if not {"aux_head", "head"} & set(heads):
        raise ValueError(
            f"{given.teacher} ({subject.network}) has no head that knows classes; take a network "
            f"that was trained on labels"
        )
    teacher = dense(subject.backbone, heads)
    side = subject.backbone.image_size or (224, 224)
    return teacher, subject.mean, subject.std, side, subject.backbone.in_channels


def linear(state: State, name: str) -> nn.Linear:
    weight, bias = state[f"{name}.weight"], state[f"{name}.bias"]
    layer = nn.Linear(weight.shape[1], weight.shape[0])
    layer.load_state_dict({"weight": weight, "bias": bias})
    return layer
