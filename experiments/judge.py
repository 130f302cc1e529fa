"""The verbs that judge the features of a frozen backbone, whatever trained it.

    patchlight knn --checkpoint RUN/checkpoints/best.ckpt
    patchlight knn --checkpoint dino.pth --network teacher --data my_images --k 10,20,100,200
    patchlight fewshot --checkpoint RUN/checkpoints/best.ckpt --shots 1,5,10,25
    patchlight knn --checkpoint random --config RECIPE

Images come from the data of the run, or from `--data`: a recipe, a directory of images, or the
name of a source (digits, torchvision:CIFAR10). `--data.init_args.NAME VALUE` changes any option of
it. What is found is kept in the run (`evaluations/`), for `patchlight compare`.
"""

import argparse
import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jsonargparse
import torch
from lightning.pytorch import LightningDataModule
from lightning.pytorch.cli import LightningArgumentParser
from rich.console import Console
from rich.table import Table

from callbacks.knn import check_knn, classify
from datamodules.module import Needs, SourceDataModule
from datamodules.shards import holds_shards
from datamodules.urls import is_url
from experiments.evaluations import record
from experiments.features import Frozen, frozen_features
from experiments.subject import Subject, add_arguments, open_subject, read_yaml
from modules.fewshot import L2, few_shot

IMAGES = "datamodules.ImageDataModule"


def make_parser(verb: str, description: str) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog=f"patchlight {verb}",
        description=description,
        epilog="--data.init_args.NAME VALUE changes any option of the data.",
        allow_abbrev=False,
    )
    add_arguments(parser)
    parser.add_argument("--data", help="a recipe, a directory, or the name of a source")
    parser.add_argument("--device", help="cpu, cuda, cuda:1, mps; the first of them there is")
    return parser


def with_training(parser: argparse.ArgumentParser) -> None:
    """For verbs that learn from the training images."""
    parser.add_argument("--max-train", type=int, help="use so many of the training images")


def numbers(text: str, name: str, kind: type[int] | type[float]) -> list[Any]:
    """`1,5,10` as numbers."""
    try:
        return [kind(part) for part in text.split(",")]
    except ValueError:
        raise ValueError(f"{name} {text!r}: expected numbers such as 1,5,10") from None


def data_section(subject: Subject, given: str | None) -> dict[str, Any]:
    """`class_path` and `init_args` of the data to judge on.

    Raises:
        ValueError: nothing says which data.
    """
    found: dict[str, Any] | None = subject.data
    if given is not None:
        path = Path(given)
        if path.suffix in (".yaml", ".yml"):
            content = read_yaml(path, "--data")
            if not isinstance(content, dict) or not isinstance(content.get("data"), dict):
                raise ValueError(f"--data {given} is no recipe with data")
            found = content["data"]
        elif path.exists() or is_url(given):
            source = "shards" if is_url(given) or holds_shards(given) else "folder"
            found = {"class_path": IMAGES, "init_args": {"source": source, "root": given}}
        else:
            found = {"class_path": IMAGES, "init_args": {"source": given}}
    if found is None:
        raise ValueError(
            f"{subject.checkpoint} is of no run that knows its data; name a recipe, a directory or "
            f"a source: --data"
        )
    arguments: dict[str, Any] = dict(found.get("init_args") or {})
    # What the network was trained to see, or the best guess where neither it nor the data tells.
    seen: dict[str, Any] = {"mean": list(subject.mean), "std": list(subject.std)}
    arguments = arguments | seen if subject.is_told else seen | arguments
    arguments["channels"] = subject.backbone.in_channels
    return {"class_path": found.get("class_path", IMAGES), "init_args": arguments}


def open_data(
    subject: Subject, given: str | None, options: Sequence[str]
) -> tuple[SourceDataModule, dict[str, Any]]:
    """The data module, set up and fitted to the backbone, and the arguments it was made of.

    Raises:
        ValueError: no such data, options it does not take.
    """
    parser = LightningArgumentParser(exit_on_error=False)
    parser.add_lightning_class_args(LightningDataModule, "data", subclass_mode=True)
    section = json.dumps(data_section(subject, given))
    try:
        config = parser.parse_args([f"--data={section}", *options])
    except (jsonargparse.ArgumentError, argparse.ArgumentError) as error:
        raise ValueError(str(error)) from error
    data = parser.instantiate_classes(config).data
    if not isinstance(data, SourceDataModule):
        raise ValueError(f"{type(data).__name__} gives no images to judge on; name others: --data")
    data.fit_to(Needs.of(subject.backbone))
    data.prepare_data()
    data.setup("validate")
    return data, config.data.as_dict()


def choose_device(name: str | None) -> torch.device:
    if name is not None:
        try:
            torch.zeros(1, device=name)
        except (RuntimeError, AssertionError) as error:
            reason = str(error).splitlines()[0]
            raise ValueError(f"--device {name} cannot be had here: {reason}") from error
        return torch.device(name)
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    return accelerator or torch.device("cpu")


def with_labels(found: Frozen) -> Frozen:
    """Without the images that have no label."""
    labelled = found.labels >= 0
    return found if bool(labelled.all()) else Frozen(*(side[labelled] for side in found))


class Case:
    """A network, data to judge it on, and where results go."""

    def __init__(self, given: argparse.Namespace, options: Sequence[str]) -> None:
        self.subject = open_subject(given.checkpoint, given.network, given.config)
        self.data, self.section = open_data(self.subject, given.data, options)
        self.device = choose_device(given.device)
        # Of the run's own data as it is; other measurements stand beside these, not in their place.
        asked = (given.data, getattr(given, "max_train", None), sorted(options))
        digest = hashlib.sha256(repr(asked).encode()).hexdigest()[:8]
        self.variant = "" if asked == (None, None, []) else f".{digest}"
        where = " " + str(self.data.root) if self.data.root else ""
        self.about = f"{self.data.source}{where}"

    def report(
        self, protocol: str, main: str, table: Table, values: dict[str, float], images: str
    ) -> None:
        """Print a table, and keep the values in the run."""
        console = Console(highlight=False, markup=False, soft_wrap=True)
        console.print(f"{protocol} of {self.subject.title} on {self.about}: {images}")
        console.print(table)
        if self.subject.run is None:
            return
        path = record(
            *(self.subject.run, protocol + self.variant, values, main),
            checkpoint=self.subject.checkpoint,
            network=self.subject.network,
            fingerprint=self.subject.fingerprint,
            data=f"{self.about}: {images}",
        )
        console.print(f"kept in {path}")


class Judged(Case):
    """With the features of both splits.

    Raises:
        ValueError: data without labels.
    """

    def __init__(self, given: argparse.Namespace, options: Sequence[str]) -> None:
        if given.max_train is not None and given.max_train < 1:
            raise ValueError(f"--max-train is {given.max_train}; expected at least 1")
        super().__init__(given, options)
        self.num_classes = len(self.data.class_names)
        if self.num_classes == 0:
            raise ValueError("the data has no labels, and judging features needs them")
        splits = (("train", given.max_train), ("val", None))
        features = [
            frozen_features(self.subject, self.data, self.section, split, count, self.device)  # type: ignore[arg-type]
            for split, count in splits
        ]
        self.train, self.val = (with_labels(found) for found in features)
        self.sizes = (
            f"{len(self.train.labels):,} training and {len(self.val.labels):,} held-out images"
        )


def knn(argv: Sequence[str]) -> int:
    """The verb."""
    parser = make_parser("knn", "Classify held-out images by their nearest training images.")
    with_training(parser)
    parser.add_argument("--k", default="10,20,100,200", help="neighbours; %(default)s")
    parser.add_argument("--temperature", type=float, default=0.07, help="of votes; %(default)s")
    given, options = parser.parse_known_args(argv)
    ks = numbers(given.k, "--k", int)
    check_knn(ks, given.temperature)
    judged = Judged(given, options)
    bank = torch.nn.functional.normalize(judged.train.features, dim=1).half()
    sides = (judged.val.features, judged.val.labels, bank, judged.train.labels)
    found = classify(*sides, ks, judged.num_classes, given.temperature, shown=True)
    table = Table("k", "top-1", *(["top-5"] if judged.num_classes > 5 else []))
    values = {}
    for k, (top1, top5) in found.items():
        values[f"top1 k={k}"] = top1
        if judged.num_classes > 5:
            values[f"top5 k={k}"] = top5
        shares = (top1, top5)[: len(table.columns) - 1]
        table.add_row(str(k), *(f"{100 * share:.2f} %" for share in shares))
    # One k for all networks: the best one would be chosen on the images it is judged by.
    main = 20 if 20 in found else ks[0]
    judged.report("knn", f"top1 k={main}", table, values, judged.sizes)
    return 0


def fewshot(argv: Sequence[str]) -> int:
    """The verb."""
    parser = make_parser("fewshot", "Linear classifiers from a few images a class, in closed form.")
    with_training(parser)
    parser.add_argument("--shots", default="1,5,10,25", help="images a class; %(default)s")
    parser.add_argument("--seeds", type=int, default=3, help="draws of them; %(default)s")
    parser.add_argument("--l2", default=f"{L2:g}", help="regularisers; %(default)s")
    given, options = parser.parse_known_args(argv)
    shots = numbers(given.shots, "--shots", int)
    l2 = numbers(given.l2, "--l2", float)
    judged = Judged(given, options)
    sides = (*judged.train, *judged.val)
    found = few_shot(*sides, judged.num_classes, shots, given.seeds, l2)
    table = Table("shots", "l2", "top-1", "std over seeds")
    values = {}
    for outcome in found:
        name = f"{outcome.shots}-shot" + (f" l2={outcome.l2:g}" if len(l2) > 1 else "")
        values[name] = outcome.mean
        cells = (f"{outcome.l2:g}", f"{100 * outcome.mean:.2f} %", f"{100 * outcome.std:.2f}")
        table.add_row(str(outcome.shots), *cells)
    main = 10 if 10 in shots else shots[-1]
    shown = next(name for name in values if name.startswith(f"{main}-shot"))
    judged.report("fewshot", shown, table, values, judged.sizes)
    return 0
