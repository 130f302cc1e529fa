"""`patchlight fit --config RECIPE --weights C [--network PART]`: a run that starts from weights.

C is a checkpoint of any method, ours or others'. What it was is put before the recipe, whose own
values override it: the backbone, and how the images of its run were normalised. What is to be
loaded is put after the recipes, before the other options:

    --model.class_path=... --model.init_args.backbone={...} --data.init_args.mean=...
    --config RECIPE --model.init_args.weights=C --model.init_args.weights_part=PART [options]

All of it is resolved in the run's `config.yaml`, so `--resume` and `validate` do not need C, and
nothing lies in a temporary file that further processes of the run would miss.
"""

import inspect
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lightning.pytorch.utilities import rank_zero_warn

import modules
from experiments.subject import (
    backbone_kept_in,
    default_part,
    normalisation_of,
    read_config,
    read_yaml,
    run_of,
    told_by,
)
from modules.weights import open_source
from modules.weights.inspect import UNKNOWN

CONFIG = ("--config", "-c")
BACKBONE = "--model.init_args.backbone"


def take(arguments: Sequence[str], *names: str) -> tuple[list[str], list[str]]:
    """The arguments without an option, and its values: `--name value` or `--name=value`.

    Raises:
        ValueError: the option is last and has no value.
    """
    rest, values, given = [], [], iter(arguments)
    for argument in given:
        name, equals, value = argument.partition("=")
        if name not in names:
            rest.append(argument)
            continue
        if not equals:
            try:
                value = next(given)
            except StopIteration:
                raise ValueError(f"{name} needs a value") from None
        values.append(value)
    return rest, values


def take_weights(arguments: list[str]) -> list[str]:
    """Turn `fit --weights C [--network PART]` into options of the recipe's classes.

    Raises:
        ValueError: C is refused or does not tell what it is, no recipe names a method, or a recipe
            without a backbone has no weights to take it from.
    """
    verb, *rest = arguments
    rest, weights = take(rest, "--weights")
    rest, networks = take(rest, "--network")
    options, paths = take(rest, *CONFIG)
    recipes = [content for path in paths if (content := as_recipe(path))]
    if not weights:
        if networks:
            raise ValueError(f"--network {networks[-1]} is about --weights, which is not given")
        check_has_backbone(paths, recipes, options)
        return arguments
    method = last_class(recipes, "model")
    if method is None:
        raise ValueError(f"--weights {weights[-1]} needs --config RECIPE, which names the method")
    check_takes_weights(method)
    parts = open_source(weights[-1])
    part = networks[-1] if networks else default_part(parts)
    if part not in parts:
        raise ValueError(f"{weights[-1]} has no network {part!r}; it has {', '.join(parts)}")
    run = run_of(Path(weights[-1]))
    config = {} if run is None else read_config(run / "config.yaml")
    backbone = config.get("model", {}).get("init_args", {}).get("backbone")
    backbone = backbone or backbone_kept_in(weights[-1])
    if backbone is None:
        backbone = told_by(parts[part], weights[-1])
        settle_unknown(backbone["init_args"], recipes, options, weights[-1])
    before = [f"--model.class_path={method}", f"{BACKBONE}={json.dumps(backbone)}"]
    before += data_options(
        weights[-1], config, backbone["init_args"].get("in_channels", 3), recipes
    )
    configs = [f"--config={path}" for path in paths]
    named = part if len(parts) > 1 else "null"
    load = [f"--model.init_args.weights={weights[-1]}", f"--model.init_args.weights_part={named}"]
    return [verb, *before, *configs, *load, *options]


def check_takes_weights(method: str) -> None:
    """Refuse a method that begins with first values, before the parser does with a page of text.

    Raises:
        ValueError: such a one.
    """
    found = getattr(modules, method.removeprefix("modules."), None)
    if found is not None and "weights" not in inspect.signature(found).parameters:
        raise ValueError(
            f"{method} begins with first values and takes no --weights; --resume RUN goes on with "
            f"a run"
        )


def as_recipe(path: str) -> dict[str, Any] | None:
    """The content of a file; None where there is none to read, which the parser will tell."""
    if not Path(path).is_file():
        return None
    content = read_yaml(Path(path), "--config")
    return content if isinstance(content, dict) else None


def section(recipe: dict[str, Any], *names: str) -> dict[str, Any]:
    """A nested part of a recipe, empty where it has none."""
    for name in names:
        inner = recipe.get(name)
        recipe = inner if isinstance(inner, dict) else {}
    return recipe


def last_class(recipes: Sequence[dict[str, Any]], part: str) -> str | None:
    named = [section(recipe, part).get("class_path") for recipe in recipes]
    return next((str(name) for name in reversed(named) if name), None)


def check_has_backbone(
    paths: Sequence[str], recipes: Sequence[dict[str, Any]], options: Sequence[str]
) -> None:
    """Say what to do about a recipe whose backbone is that of a checkpoint."""
    backbones = [section(recipe, "model", "init_args").get("backbone") for recipe in recipes]
    has_one = any(isinstance(one, str) or (one and one.get("class_path")) for one in backbones)
    asked = any(
        option.startswith(("--model", "--print_config", "-h", "--help")) for option in options
    )
    method = last_class(recipes, "model")
    if method is not None and takes_backbone(method) and not has_one and not asked:
        raise ValueError(
            f"{paths[0]} has no backbone of its own: add --weights CHECKPOINT, whose it takes, or "
            f"{BACKBONE} modules.backbones.ViT"
        )


def takes_backbone(method: str) -> bool:
    """Whether a method is built around a backbone; what is not known here is taken to be."""
    known = getattr(modules, method.removeprefix("modules."), None)
    return known is None or "backbone" in inspect.signature(known).parameters


def settle_unknown(
    init_args: dict[str, Any],
    recipes: Sequence[dict[str, Any]],
    options: Sequence[str],
    checkpoint: str,
) -> None:
    """Leave to the recipe or the command line what a file does not tell.

    Raises:
        ValueError: they do not say it either.
    """
    for name in [name for name, value in init_args.items() if value == UNKNOWN]:
        given = [section(r, "model", "init_args", "backbone", "init_args") for r in recipes]
        said = any(name in one or "variant" in one for one in given)  # a variant says it as well
        option = f"{BACKBONE}.init_args.{name}"
        if not said and not any(other.startswith(option) for other in options):
            raise ValueError(f"{checkpoint} does not tell {name} of its backbone; add {option} N")
        del init_args[name]


def data_options(
    checkpoint: str, config: dict[str, Any], channels: int, recipes: Sequence[dict[str, Any]]
) -> list[str]:
    """How the network was shown its images: channels, mean and std, where no recipe says it.

    A recipe that says otherwise is warned of: a network expects its own.
    """
    data = last_class(recipes, "data")
    if data is None:
        return []
    told = section(config, "data", "init_args")
    if not told and (known := normalisation_of(checkpoint)) is not None:
        told = {"mean": list(known[0]), "std": list(known[1])}
    if not told and channels == 1:
        told = {"mean": [0.5], "std": [0.5]}
    values = {"channels": channels}
    values |= {name: told[name] for name in ("mean", "std") if told.get(name)}
    for name, value in values.items():
        arguments = [section(recipe, "data", "init_args") for recipe in recipes]
        said = [given[name] for given in arguments if name in given]
        if said and said[-1] != value:
            rank_zero_warn(
                f"the recipe's data.init_args.{name} is {said[-1]}, but the weights were trained "
                f"with {value}"
            )
    lines = [f"--data.init_args.{name}={json.dumps(value)}" for name, value in values.items()]
    return [f"--data.class_path={data}", *lines]
