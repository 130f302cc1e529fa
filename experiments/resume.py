"""`patchlight fit --resume RUN` and `--into RUN`: which run goes on, and from what.

`--resume RUN` takes the run's own config and its newest checkpoint. `--into RUN` is the same where
RUN was begun before, so that a job that is started again goes on; else the run begins there. What
is asked for then has to be what RUN was begun as, but for options that are typed this time, which
override the run's config as they do with `--resume`.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import yaml
from lightning.pytorch.cli import LightningArgumentParser
from lightning.pytorch.utilities import rank_zero_only

from callbacks.checkpoint_files import BEFORE, LAST, newest, read_checkpoint
from experiments.runs import differences
from experiments.start import CONFIG, take, take_weights

# What a run writes before its config: it may have been killed there.
EARLIEST = ("events.out.tfevents.", "hparams.yaml", "unreadable-", ".")
# Values that stand for one that the run settles itself, and writes into its config.
SETTLED = {"trainer.precision": "null", "seed_everything": "true"}


class Start(NamedTuple):
    """How the command begins.

    arguments:  those of LightningCLI
    run:        directory of the run; None for a new one
    is_resumed: it goes on from what is there
    asked:      arguments of which the run there has to be; None where there is nothing to compare
    """

    arguments: list[str]
    run: Path | None = None
    is_resumed: bool = False
    asked: list[str] | None = None


@rank_zero_only
def print_once(text: str) -> None:
    print(text, flush=True)


def begin(arguments: list[str]) -> Start:
    """Read `--resume`, `--into` and `--weights` of `fit`.

    Raises:
        ValueError: what is named is no run, `--into` a directory that holds something else, or
            both options.
    """
    verb, *rest = arguments
    rest, resumed = take(rest, "--resume")
    rest, fixed = take(rest, "--into")
    asked = take_weights([verb, *rest])
    if not resumed and not fixed:
        return Start(asked)
    if resumed and fixed:
        raise ValueError("--resume goes on with a run and --into may begin one; give one of them")
    run = Path((resumed or fixed)[-1]).expanduser()  # no shell does that of `--into=~/RUN`
    config = run / "config.yaml"
    if not config.is_file():
        if resumed:
            raise ValueError(f"--resume {run}: no config.yaml there; expected a run directory")
        check_is_free(run)
        return Start(asked, run)
    checkpoint = newest(run / "checkpoints")
    tell(run, checkpoint)
    if fixed and checkpoint is None:
        return Start(asked, run, asked=asked)
    typed, _ = take(rest, *CONFIG, "--weights", "--network")  # the run's config has these
    found = [] if checkpoint is None else ["--ckpt_path", str(checkpoint)]
    whole = [verb, "--config", str(config), *typed, *found]
    return Start(whole, run, True, asked if fixed else None)


def check_is_free(run: Path) -> None:
    """
    Raises:
        ValueError: there is something else at the place of a run that is to begin.
    """
    if run.exists() and not run.is_dir():
        raise ValueError(f"--into {run}: that is a file; name a directory, or one to be made")
    others = sorted(path.name for path in run.glob("*") if not path.name.startswith(EARLIEST))
    if others:
        raise ValueError(
            f"--into {run}: the directory holds {others[0]} and no config.yaml, so it is no run; "
            f"name a run, or a directory that is empty or not there"
        )


def tell(run: Path, checkpoint: Path | None) -> None:
    if checkpoint is None:
        print_once(f"{run} has no checkpoint yet; starting it again from the beginning")
    elif checkpoint.name == BEFORE:
        print_once(f"{run} has no {LAST}: it was killed while saving; {BEFORE} goes on")


def check_same(parser: LightningArgumentParser, start: Start) -> None:
    """Compare what is asked for with what the run was begun as, both as `fit` reads them.

    Raises:
        ValueError: an option that is not typed this time differs.
    """
    if start.asked is None or start.run is None:
        return
    config = str(start.run / "config.yaml")
    both = [resolved(parser, given) for given in (["--config", config], start.asked[1:])]
    typed = typed_names(start.arguments[1:])
    found = differences(both)
    for key in sorted(found, key=lambda key: not key.startswith(("model.", "data."))):
        begun, asked = found[key]
        if key == "ckpt_path" or SETTLED.get(key, "") == asked or is_under(key, typed):
            continue
        raise ValueError(
            f"--into {start.run}: the run there is of another recipe: its {key} is "
            f"{shown(begun)}, here it is {shown(asked)}. Name another directory to begin this "
            f"one; `patchlight fit --resume {start.run}` goes on with the one that is there"
        )


def resolved(parser: LightningArgumentParser, arguments: Sequence[str]) -> dict[str, Any]:
    """What `fit` would do with arguments, defaults included."""
    config = parser.parse_args(list(arguments))
    content: dict[str, Any] = yaml.safe_load(parser.dump(config, skip_unset=False))
    return content


def typed_names(arguments: Sequence[str]) -> set[str]:
    """`--data.init_args.seed=1` -> `data.seed`, which is the same to the parser."""
    options = [argument for argument in arguments if argument.startswith("--")]
    return {bare(option[2:].partition("=")[0].rstrip("+")) for option in options} - {"config"}


def bare(key: str) -> str:
    return key.replace(".init_args", "").removesuffix(".class_path")


def is_under(key: str, names: set[str]) -> bool:
    """Whether one of the options sets a key, or a part of it."""
    key = bare(key)
    return any(f"{key}.".startswith(f"{n}.") or n.startswith(f"{key}.") for n in names)


def shown(value: str | None) -> str:
    return "not there" if value is None else value if len(value) < 60 else f"{value[:60]}..."


def stopped_at(checkpoints: Path) -> int:
    """The optimizer step from which a run goes on.

    Raises:
        ValueError: its last checkpoint is damaged; the message offers the one before.
    """
    path, last, before = newest(checkpoints), checkpoints / LAST, checkpoints / BEFORE
    if path is None:
        return 0
    try:
        return int(read_checkpoint(path, mmap=True)["global_step"])
    except ValueError as error:
        try:
            step = read_checkpoint(before)["global_step"]
        except (ValueError, FileNotFoundError):
            raise error from None  # it is the damaged one, or damaged as well
        raise ValueError(
            f"{error}. The one before it, of step {step}, is sound: `mv {before} {last}`, and "
            f"resume again"
        ) from error
