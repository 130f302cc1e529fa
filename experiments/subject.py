"""What is judged: a backbone with its weights, from any checkpoint."""

import argparse
import hashlib
from collections.abc import Sequence
from dataclasses import is_dataclass
from pathlib import Path
from typing import Any, NamedTuple

import jsonargparse
import timm
import torch
import yaml
from lightning.pytorch import seed_everything
from lightning.pytorch.cli import LightningArgumentParser
from rich.console import Console
from torch import nn

from callbacks.checkpoint_files import read_checkpoint
from datamodules.module import IMAGENET_MEAN, IMAGENET_STD
from modules.backbones import Backbone, BlockStyle, Positions, Timm
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
    is_told:     whether something told these; else they are ImageNet's, or 0.5 for gray images
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
    is_told: bool


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
    backbone_arguments = (given["model"].get("init_args") or {}).get("backbone") if given else None
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
        backbone_arguments = backbone_arguments or backbone_kept_in(checkpoint)
        if backbone_arguments is None:
            backbone = backbone_told_by(parts[part], checkpoint)
        else:
            backbone = build_backbone(backbone_arguments)
        report = load_backbone(backbone, checkpoint, part)
        if report.kept:  # the backbone is judged with first values in it
            Console(stderr=True, highlight=False).print(str(report), markup=False)
    backbone.eval().requires_grad_(False)
    data = given.get("data")
    told = (data or {}).get("init_args") or {}
    known = (told["mean"], told["std"]) if {"mean", "std"} <= set(told) else None
    known = known or normalisation_of(checkpoint)
    usual = ((0.5,), (0.5,)) if backbone.in_channels == 1 else (IMAGENET_MEAN, IMAGENET_STD)
    mean, std = known or usual
    return Subject(
        backbone=backbone,
        title=f"{checkpoint} ({part})",
        checkpoint=checkpoint,
        network=part,
        fingerprint=fingerprint(backbone),
        run=run,
        data=data,
        mean=tuple(mean),
        std=tuple(std),
        is_told=known is not None,
    )


def normalisation_of(checkpoint: str) -> tuple[Sequence[float], Sequence[float]] | None:
    """Mean and std that a published file is known to expect, None where nothing tells."""
    if checkpoint.startswith("timm:"):
        config = timm.get_pretrained_cfg(checkpoint.removeprefix("timm:"))
        return None if config is None else (config.mean, config.std)
    return ((0.5,) * 3, (0.5,) * 3) if checkpoint.endswith(".npz") else None  # Google's


def run_of(checkpoint: Path) -> Path | None:
    """The run directory of `RUN/checkpoints/NAME.ckpt`."""
    absolute = checkpoint.absolute()
    run = absolute.parent.parent
    if absolute.parent.name != "checkpoints" or not (run / "config.yaml").is_file():
        return None
    return checkpoint.parent.parent if checkpoint.parent.name == "checkpoints" else run


def backbone_kept_in(checkpoint: str) -> dict[str, Any] | None:
    """The backbone as a run of ours wrote it into its checkpoint, None in files of others."""
    kept = hyper_parameters_of(checkpoint).get("backbone")
    is_ours = isinstance(kept, dict) and str(kept.get("class_path")).startswith("modules.")
    return kept if is_ours else None


def hyper_parameters_of(checkpoint: str) -> dict[str, Any]:
    """The arguments of the method as a run of ours wrote them, none in files of others."""
    if not checkpoint.endswith(".ckpt"):
        return {}
    try:
        kept = read_checkpoint(checkpoint).get("hyper_parameters")
    except (ValueError, AttributeError):
        return {}
    return kept if isinstance(kept, dict) else {}


def read_yaml(path: Path, option: str) -> Any:
    """The content of a YAML file.

    Raises:
        ValueError: no such file, or one that cannot be read; `option` says who asked.
    """
    try:
        return yaml.safe_load(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ValueError(f"{option} {path}: no such file") from None
    except (OSError, UnicodeError, yaml.YAMLError) as error:
        raise ValueError(f"{option} {path} is no YAML file: {error}") from error


def read_config(path: Path, option: str = "--config") -> dict[str, Any]:
    content = read_yaml(path, option)
    if not isinstance(content, dict) or not isinstance(content.get("model"), dict):
        raise ValueError(f"{option} {path} is no recipe: it has no model")
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


def told_by(state: State, checkpoint: str) -> dict[str, Any]:
    """The class and arguments of a backbone that names and shapes of a file tell.

    A ViT or LV-ViT of ours, with UNKNOWN for arguments that they do not tell; for `timm:NAME`
    where it is neither, timm's network.

    Raises:
        ValueError: neither.
    """
    described = describe(state)
    found = described.backbone
    if found is None and checkpoint.startswith("timm:"):
        name = checkpoint.removeprefix("timm:")
        return {"class_path": "modules.backbones.Timm", "init_args": {"name": name}}
    if found is None:
        raise ValueError(
            f"{checkpoint} holds no ViT that names and shapes tell; name a recipe with its "
            f"backbone: --config RECIPE"
        )
    return {"class_path": f"modules.backbones.{described.kind.__name__}", "init_args": found}


def backbone_told_by(state: State, checkpoint: str) -> Backbone:
    """What the names and shapes of a file tell; options that leave no trace have their defaults."""
    told = told_by(state, checkpoint)
    found = told["init_args"]
    if told["class_path"] == "modules.backbones.Timm":
        return Timm(**found)
    if UNKNOWN in found.values():
        missing = next(name for name, value in found.items() if value == UNKNOWN)
        raise ValueError(
            f"{checkpoint} does not tell {missing}; name a recipe with its backbone: "
            f"--config RECIPE (`patchlight inspect {checkpoint}` writes one)"
        )
    kind = describe(state).kind
    Console(stderr=True, highlight=False).print(
        f"{checkpoint}: taken for a {kind.__name__} of {found}; what leaves no trace in weights "
        f"(activation, pooling, norm epsilon) has its default, and --config RECIPE would say "
        f"otherwise",
        markup=False,
    )
    built = {"positions": Positions, "block": BlockStyle}
    return kind(**{k: built[k](**v) if k in built else v for k, v in found.items()})


def fingerprint(network: nn.Module) -> str:
    """Changes with whatever the network's output is a function of: options, tables, weights."""
    digest = hashlib.sha256()
    for name, module in network.named_modules():
        digest.update(f"{name} {type(module).__name__}".encode())
        options = {k: v for k, v in vars(module).items() if is_plain(v) and k[0] != "_"}
        options.pop("training")
        digest.update(repr(sorted(options.items())).encode())
    # Fixed tables are no part of a state dict, but of what it computes.
    for name, tensor in sorted((*network.named_parameters(), *network.named_buffers())):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def is_plain(value: Any) -> bool:
    """What has a representation that says all of it: primitives, and containers of them."""
    if isinstance(value, tuple | list):
        return all(map(is_plain, value))
    return value is None or isinstance(value, bool | int | float | str) or is_dataclass(value)
