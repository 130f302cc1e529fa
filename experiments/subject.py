"""What is judged: a backbone with its weights, from any checkpoint."""

import argparse
import hashlib
from pathlib import Path
from typing import Any, NamedTuple

import jsonargparse
import torch
import yaml
from lightning.pytorch import seed_everything
from lightning.pytorch.cli import LightningArgumentParser
from rich.console import Console

from datamodules.module import IMAGENET_MEAN, IMAGENET_STD
from modules.backbones import Backbone, BlockStyle, Positions, ViT
from modules.weights import load_backbone, open_source
from modules.weights.files import State
from modules.weights.inspect import UNKNOWN, describe

RANDOM = "random"
# Which of several networks is meant where none is named; else the first.
PREFERRED = ("teacher",)


class Subject(NamedTuple):
    """A frozen backbone in eval mode.

    title:       checkpoint and network in words
    checkpoint:  the file, or "random"
    network:     which network of it
    fingerprint: sha256 of what it is built like and of its weights
    run:         the run directory that it lies in, None for other files
    data:        the data section of that run's (or the given) config, None without one
    mean, std:   of the images that it was trained on, a number a channel
    """

    backbone: Backbone
    title: str
    checkpoint: str
    network: str
    fingerprint: str
    run: Path | None
    data: dict[str, Any] | None
    mean: tuple[float, ...]
    std: tuple[float, ...]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options that say what is judged."""
    parser.add_argument(
        *("--checkpoint", "-c"),
        required=True,
        help=f"a file (.ckpt, .pth, .safetensors, .npz), timm:NAME, or {RANDOM}: the first values "
        f"of --config",
    )
    parser.add_argument("--network", help="which of several in the file, such as averaged")
    parser.add_argument(
        "--config", type=Path, help="a recipe that has the backbone, where the file is not of a run"
    )


def open_subject(checkpoint: str, network: str | None, config: Path | None) -> Subject:
    """Load a backbone out of a checkpoint of ours or of others.

    Its architecture is that of the run's `config.yaml`, or of `config`, or, for files of others,
    what their names and shapes tell.

    Raises:
        ValueError: a file that is refused, does not fit, or does not tell what it is.
    """
    run = None if checkpoint == RANDOM else run_of(Path(checkpoint))
    if config is None and run is not None:
        config = run / "config.yaml"
    given = {} if config is None else read_config(config)
    backbone_arguments = given.get("model", {}).get("init_args", {}).get("backbone")
    if checkpoint == RANDOM:
        if backbone_arguments is None:
            raise ValueError("--checkpoint random needs --config RECIPE, which has the backbone")
        if network is not None:
            raise ValueError(f"--network {network}: first values are those of the backbone alone")
        seed = given.get("seed_everything")
        seed_everything(0 if seed is None else int(seed), verbose=False)
        backbone, part = build_backbone(backbone_arguments), "backbone"
    else:
        parts = open_source(checkpoint)
        part = network or default_part(parts)
        if part not in parts:
            raise ValueError(f"{checkpoint} has no network {part!r}; it has {', '.join(parts)}")
        if backbone_arguments is None:
            backbone = backbone_told_by(parts[part], checkpoint)
        else:
            backbone = build_backbone(backbone_arguments)
        load_backbone(backbone, checkpoint, part)
    backbone.eval().requires_grad_(False)
    data = given.get("data")
    told = (data or {}).get("init_args", {})
    black_and_white = backbone.in_channels == 1
    return Subject(
        backbone=backbone,
        title=f"{checkpoint} ({part})",
        checkpoint=checkpoint,
        network=part,
        fingerprint=fingerprint(backbone),
        run=run,
        data=data,
        mean=tuple(told.get("mean") or ((0.5,) if black_and_white else IMAGENET_MEAN)),
        std=tuple(told.get("std") or ((0.5,) if black_and_white else IMAGENET_STD)),
    )


def run_of(checkpoint: Path) -> Path | None:
    """The run directory of `RUN/checkpoints/NAME.ckpt`."""
    run = checkpoint.absolute().parent.parent
    is_run = checkpoint.parent.name == "checkpoints" and (run / "config.yaml").is_file()
    return checkpoint.parent.parent if is_run else None


def read_config(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise ValueError(f"--config {path}: no such file")
    content = yaml.safe_load(path.read_text(encoding="utf-8"))
    if not isinstance(content, dict) or not isinstance(content.get("model"), dict):
        raise ValueError(f"--config {path} is no recipe: it has no model")
    return content


def build_backbone(arguments: dict[str, Any]) -> Backbone:
    """A backbone from its `class_path` and `init_args`.

    Raises:
        ValueError: options that no backbone here takes.
    """
    parser = LightningArgumentParser(exit_on_error=False)
    parser.add_subclass_arguments(Backbone, "backbone")
    try:
        config = parser.parse_object({"backbone": arguments})
    except (jsonargparse.ArgumentError, argparse.ArgumentError) as error:
        what = arguments.get("class_path") if isinstance(arguments, dict) else arguments
        raise ValueError(f"the backbone {what} of the config cannot be built: {error}") from error
    backbone = parser.instantiate_classes(config).backbone
    assert isinstance(backbone, Backbone)
    return backbone


def default_part(parts: dict[str, State]) -> str:
    return next((name for name in PREFERRED if name in parts), next(iter(parts)))


def arguments_told_by(state: State, checkpoint: str) -> dict[str, Any]:
    """Arguments of a ViT that names and shapes of a file tell, UNKNOWN where they do not.

    Raises:
        ValueError: no ViT of ours.
    """
    found = describe(state).backbone
    if found is None:
        raise ValueError(
            f"{checkpoint} holds no ViT that names and shapes tell; name a recipe with its "
            f"backbone: --config RECIPE"
        )
    return found


def backbone_told_by(state: State, checkpoint: str) -> Backbone:
    """What the names and shapes of a file tell; options that leave no trace have their defaults."""
    found = arguments_told_by(state, checkpoint)
    if UNKNOWN in found.values():
        missing = next(name for name, value in found.items() if value == UNKNOWN)
        raise ValueError(
            f"{checkpoint} does not tell {missing}; name a recipe with its backbone: "
            f"--config RECIPE (`patchlight inspect {checkpoint}` writes one)"
        )
    Console(stderr=True, highlight=False).print(
        f"{checkpoint}: taken for a ViT of {found}; what leaves no trace in weights (activation, "
        f"norm epsilon) has its default, and --config RECIPE would say otherwise",
        markup=False,
    )
    built = {"positions": Positions, "block": BlockStyle}
    return ViT(**{k: built[k](**v) if k in built else v for k, v in found.items()})


def fingerprint(backbone: Backbone) -> str:
    """Changes with the architecture and with every weight."""
    digest = hashlib.sha256(repr(backbone).encode())
    options = (name for name in sorted(vars(backbone)) if not name.startswith("_"))
    digest.update(repr([(n, vars(backbone)[n]) for n in options if n != "training"]).encode())
    for name, tensor in sorted(backbone.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()
