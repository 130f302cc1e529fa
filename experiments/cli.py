"""The `patchlight` command.

    patchlight fit --config RECIPE [--key value ...]   train
    patchlight fit --config RECIPE --weights CHECKPOINT    train from weights, of any method
    patchlight fit --resume RUN                        go on with a run that was stopped
    patchlight fit --config RECIPE --into RUN          the same if it was begun, else begin it there
    patchlight validate --config RUN/config.yaml --ckpt_path RUN/checkpoints/best.ckpt
    patchlight check-data DIR                          find unreadable images beforehand
    patchlight shard --data DIR --out SHARDS           put images into tar files, to read from afar
    patchlight backbones [FAMILY | timm:PATTERN]       what there is, and what it costs
    patchlight inspect FILE                            what a checkpoint holds, and what fits it
    patchlight export --checkpoint C --out FILE        for timm (.safetensors) or as ONNX
    patchlight look --checkpoint C --images DIR        attention and features as pictures
    patchlight sweep --config RECIPE --vary key=a,b    train every combination, one table
    patchlight resolutions RUN --sides 64,96,128       evaluate at several sizes, one picture
    patchlight knn --checkpoint C                      nearest neighbours of frozen features
    patchlight fewshot --checkpoint C                  linear classifiers from a few images a class
    patchlight relabel --teacher T --data D --out DIR  a teacher's labels for token labelling
    patchlight jaccard --checkpoint C                  whether attention finds the objects
    patchlight plan --config RECIPE                    steps, rate and memory on 1 to 1,024 devices
    patchlight translate --checkpoint C "TEXT"         a text through a method that translates
    patchlight compare RUN [RUN ...]                   one table and one page with the curves

`fit` and `validate` are LightningCLI: constructor signatures are the schema of a recipe, and
`patchlight fit --help` lists them.
`experiments/base.yaml` holds what all recipes start from.
"""

import logging
import os
import sys
import traceback
import warnings
from errno import EACCES, EPERM, EROFS
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import LightningDataModule, LightningModule, Trainer
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.utilities import rank_zero_only
from lightning.pytorch.utilities.exceptions import SIGTERMException
from torch import distributed

import modules  # noqa: F401 - registers the methods and limits what a config may name
from callbacks.checkpoint import Checkpoint
from callbacks.checkpoint_files import AtomicCheckpointIO
from callbacks.host import Progress
from callbacks.monitors import FillRate, FiniteLoss
from callbacks.pictures import AugmentedBatch
from callbacks.seeding import StepSeed
from callbacks.stopping import Stopping
from callbacks.throughput import Throughput
from datamodules.check import main as check_data
from datamodules.placed import lost_process
from experiments.backbones import backbones
from experiments.checkpoints import export, inspect
from experiments.compare import compare
from experiments.jaccard import jaccard
from experiments.judge import fewshot, knn
from experiments.look import look
from experiments.plan import plan
from experiments.record import RunRecord, announce_end, write_result
from experiments.relabel import relabel
from experiments.resolutions import resolutions
from experiments.resume import Start, begin, check_same, print_once, stopped_at
from experiments.shard import shard
from experiments.sweep import sweep
from experiments.translate import translate
from modules.backbones import Backbone
from modules.synced import Synced

EXPERIMENTS = Path(__file__).parent
BASE = EXPERIMENTS / "base.yaml"
ROOMS = ("experiments", "modules", "callbacks", "datamodules")
STOPPED = 143  # the exit code of a process that ended on SIGTERM: the run is not finished
INTERRUPTED = 130  # that of one that ended on Ctrl-C
VERBS = {
    "check-data": check_data,
    "shard": shard,
    "backbones": backbones,
    "inspect": inspect,
    "export": export,
    "look": look,
    "sweep": sweep,
    "resolutions": resolutions,
    "knn": knn,
    "fewshot": fewshot,
    "jaccard": jaccard,
    "translate": translate,
    "compare": compare,
    "plan": plan,
    "relabel": relabel,
}


def recipe_name(configs: Any) -> str:
    """The name of a run: its first recipe's path below `experiments`, or its file name."""
    paths = [Path(str(path)).resolve() for path in configs or []]
    recipes = [path for path in paths if path != BASE.resolve()]
    if not recipes:
        return "run"
    path = recipes[0].with_suffix("")
    root = EXPERIMENTS.resolve()
    return path.relative_to(root).as_posix() if path.is_relative_to(root) else path.name


class PatchlightCLI(LightningCLI):
    """LightningCLI with our callbacks, run directories and checkpoints.

    Args:
        start: where the run is and whether it goes on; one of its own by default.
    """

    def __init__(self, start: Start | None = None) -> None:
        self.start = start or Start([])
        base = {"default_config_files": [str(BASE)]}
        super().__init__(
            model_class=LightningModule,
            datamodule_class=LightningDataModule,
            subclass_mode_model=True,
            subclass_mode_data=True,
            save_config_callback=RunRecord,
            save_config_kwargs={"resumed": self.start.is_resumed},
            auto_configure_optimizers=False,
            parser_kwargs={"fit": {**base}, "validate": {**base}},
        )

    @staticmethod
    def subcommands() -> dict[str, set[str]]:
        both = {"model", "datamodule", "weights_only"}
        return {
            "fit": both | {"train_dataloaders", "val_dataloaders"},
            "validate": both | {"dataloaders", "verbose"},
        }

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        parser.add_lightning_class_args(Checkpoint, "checkpoint")
        parser.add_argument("--runs", default="runs", help="directory that holds all runs")
        parser.add_argument(
            *("--compile",), type=bool, default=False, help="compile backbones with torch.compile"
        )

    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        check_same(self._parser("fit"), self.start)
        super().parse_arguments(parser, args)

    def before_instantiate_classes(self) -> None:
        # On a GPU that has bfloat16 the usual precision, unless one is named.
        trainer = self._get(self.config, "trainer")
        if trainer.precision is None and has_bfloat16():
            trainer.precision = usual_precision(trainer.accelerator)

    def _parse_ckpt_path(self) -> None:
        # LightningCLI would let the checkpoint override the config; here the config decides.
        pass

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        given = self._get(self.config_init, "trainer")
        callbacks: list[Any] = [
            StepSeed(),
            Stopping(),
            FiniteLoss(),
            Throughput(),
            FillRate(),
            AugmentedBatch(),
        ]
        if given.get("enable_progress_bar") is not False:
            callbacks.append(Progress())
        kwargs["callbacks"] = [*(given.get("callbacks") or []), *callbacks]
        synced = [Synced()] if given.get("sync_batchnorm") else []
        kwargs["plugins"] = [*(given.get("plugins") or []), AtomicCheckpointIO(), *synced]
        if self.subcommand == "fit" and given.get("logger") is None:
            kwargs["logger"] = self.logger()
        elif self.subcommand != "fit":
            kwargs["logger"] = False
            self.save_config_callback = None
        return super().instantiate_trainer(**kwargs)

    def logger(self) -> TensorBoardLogger:
        run = self.start.run
        if run is None:
            runs = self._get(self.config, "runs")
            if "://" in runs:
                raise ValueError(f"--runs {runs}: runs are written to a directory, not to a URL")
            name = recipe_name(self._get(self.config, "config"))
            check_place(Path(runs).expanduser())
            return TensorBoardLogger(runs, name, default_hp_metric=False)
        check_place(run)
        # What was logged after the checkpoint will be logged again: drop the first version of it.
        step = stopped_at(run / "checkpoints") if self.start.is_resumed else 0
        return TensorBoardLogger(run.parent, "", run.name, default_hp_metric=False, purge_step=step)

    def before_fit(self) -> None:
        if self._get(self.config, "compile"):
            compile_backbones(self.model)

    def before_validate(self) -> None:
        self.before_fit()
        if self._get(self.config, "ckpt_path") is None:
            raise ValueError(
                "validate needs the weights to evaluate: --ckpt_path RUN/checkpoints/best.ckpt"
            )

    def after_fit(self) -> None:
        if not self.trainer.callback_metrics:  # a finished run was resumed: nothing was done
            loggers, self.trainer.loggers = self.trainer.loggers, []  # which have it already
            self.trainer.validate(self.model, self.datamodule, verbose=False)
            self.trainer.loggers = loggers
        write_result(self.trainer)
        announce_end(self.trainer)

    def after_validate(self) -> None:
        for name, value in sorted(self.trainer.callback_metrics.items()):
            print_once(f"{name} {float(value)!r}")


def usual_precision(accelerator: Any) -> str | None:
    """What a run takes where no precision is named and there is a GPU that has bfloat16."""
    return "bf16-mixed" if accelerator in ("auto", "gpu", "cuda") else None


def has_bfloat16() -> bool:
    """Whether there is a GPU that computes in bfloat16."""
    return torch.cuda.is_available() and torch.cuda.is_bf16_supported(including_emulation=False)


def compile_backbones(method: LightningModule, **options: Any) -> None:
    """In place, so that names in checkpoints stay as they are; each size of images by itself.

    Raises:
        ValueError: there is none.
    """
    backbones = [module for module in method.modules() if isinstance(module, Backbone)]
    if not backbones:
        raise ValueError(
            f"--compile true compiles backbones, and {type(method).__name__} has none; leave it out"
        )
    for backbone in backbones:
        backbone.compile(dynamic=False, **options)


def quiet() -> None:
    """Silence warnings about what this project does on purpose."""
    for message in (
        ".*your dataloader is not resumable.*",  # its position follows from the batch counter
        ".*does not have many workers.*",
        ".*is an instance of `nn.Module` and is already saved.*",
        ".*module.s. in eval mode at the start of training.*",  # averaged copies
        ".*treespec, LeafSpec.*",  # Lightning's own use of torch
        ".*sync_dist=True.*",  # what is logged at the end of an evaluation is of all devices
    ):
        warnings.filterwarnings("ignore", message=message)
    logging.getLogger("lightning.pytorch.utilities.rank_zero").addFilter(
        lambda record: "Tip: For seamless cloud" not in record.getMessage()
    )


def raised_in(error: BaseException) -> Path | None:
    """The file whose code raised an error; None for one that was not raised."""
    frames = [frame for frame, _ in traceback.walk_tb(error.__traceback__)]
    return Path(frames[-1].f_code.co_filename) if frames else None


def raised_by_us(error: BaseException | None) -> BaseException | None:
    """The error of one of our own checks, be it this one or one that led to it.

    Its message says all, and a traceback would only hide it.
    """
    while error is not None:
        file = raised_in(error)
        is_ours = file is not None and any(
            file.is_relative_to(EXPERIMENTS.parent / room) for room in ROOMS
        )
        if is_ours and isinstance(error, ValueError | FileNotFoundError):
            return error
        error = error.__cause__ or error.__context__
    return None


def refused_by_the_disk(error: BaseException) -> str | None:
    """What a user may not write or read; None where that is not what went wrong."""
    if not isinstance(error, OSError) or error.errno not in (EACCES, EPERM, EROFS):
        return None
    place = f"{error.filename}: " if error.filename else ""
    return f"{place}{error.strerror}; see who may write there, or name another place"


def refused_by_lightning(error: BaseException) -> str | None:
    """What its trainer will not do as it is configured, such as fewer epochs than were done."""
    file = raised_in(error) if isinstance(error, ValueError) else None
    of_an_option = file is not None and "connectors" in file.parts
    return str(error) if of_an_option or isinstance(error, MisconfigurationException) else None


@rank_zero_only
def check_place(directory: Path) -> None:
    """Before anything else of a run, which would stop at its first file.

    Raises:
        ValueError: the directory cannot be made, or not be written to.
    """
    try:
        directory.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(f"{directory} cannot be made ({error.strerror}); name another") from error
    if not os.access(directory, os.W_OK | os.X_OK):
        raise ValueError(f"this user may not write to {directory}; name another directory")


def main() -> int:
    """Entry point of the console command; returns its exit code."""
    arguments = sys.argv[1:]
    if not arguments or arguments[0] in ("-h", "--help"):
        print(__doc__)
        return 0 if arguments else 2
    quiet()
    code = 0
    try:
        if arguments[0] in VERBS:
            code = VERBS[arguments[0]](arguments[1:])
        else:
            start = begin(arguments) if arguments[0] == "fit" else Start(arguments)
            sys.argv[1:] = start.arguments  # with which Lightning starts further processes
            PatchlightCLI(start)
    except SIGTERMException:
        print_once("stopped by SIGTERM; `patchlight fit --resume RUN` goes on from its last.ckpt")
        code = STOPPED
    except KeyboardInterrupt:  # of a verb; Lightning sees to that of a run
        print("patchlight: interrupted", file=sys.stderr)
        return INTERRUPTED
    except Exception as error:
        told = (raised_by_us, refused_by_the_disk, refused_by_lightning, lost_process)
        ours = next((found for tell in told if (found := tell(error)) is not None), None)
        if ours is None:
            raise
        print(f"patchlight: {ours}", file=sys.stderr)
        return 1
    leave_group()
    return code


def leave_group() -> None:
    """The processes of a run part, all of which are at its end.

    Threads of gloo may still hold tensors that Python knows of, and to free them while the
    interpreter ends would abort the process, whose exit code then is none of ours
    (pytorch/pytorch issue 190489).
    """
    if distributed.is_available() and distributed.is_initialized():
        distributed.destroy_process_group()


if __name__ == "__main__":
    sys.exit(main())
