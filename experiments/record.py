"""What a run leaves beside its checkpoints: config, versions, result, and its last line."""

import json
import platform
import subprocess
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from jsonargparse import Namespace
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.cli import LightningArgumentParser, SaveConfigCallback
from lightning.pytorch.utilities import rank_zero_only

from callbacks.checkpoint import Checkpoint
from datamodules.disk import write_whole
from experiments.resume import print_once
from experiments.runs import read_result, scalars
from experiments.sweep import RESULT

LIBRARIES = (
    *("patchlight", "torch", "torchvision", "lightning", "timm", "einops", "numpy", "pillow"),
    *("jsonargparse", "tensorboard"),
)


def versions() -> str:
    """Versions of Python and the libraries, the device, and the commit of the code."""
    lines = [f"python {platform.python_version()} on {platform.platform()}"]
    lines += [f"{name} {version(name)}" for name in LIBRARIES]
    if torch.cuda.is_available():
        lines.append(f"cuda {torch.version.cuda} on {torch.cuda.get_device_name()}")
    git = ("git", "-C", str(Path(__file__).parent))
    try:
        commit = subprocess.run(
            [*git, "describe", "--always", "--dirty"], capture_output=True, text=True, check=True
        )
        lines.append(f"commit {commit.stdout.strip()}")
    except (OSError, subprocess.CalledProcessError):
        lines.append("commit unknown (not a git work tree)")
    return "\n".join(lines) + "\n"


class RunRecord(SaveConfigCallback):
    """Writes the resolved `config.yaml` and `versions.txt` into the run directory.

    When training starts, so that a run that is refused leaves the config of before as it was; each
    is there whole or not at all.

    Args:
        resumed: the checkpoint is the run's own, so the config does not name it: whoever uses
            the config again starts anew.
    """

    def __init__(
        self, parser: LightningArgumentParser, config: Namespace, resumed: bool, **kwargs: Any
    ) -> None:
        config = config.clone()
        if resumed:
            config["ckpt_path"] = None
        super().__init__(parser, config, overwrite=True, **kwargs)

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Nothing yet."""

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not trainer.is_global_zero:
            return
        # Not `trainer.log_dir`, which all ranks have to ask for.
        log_dir = trainer.loggers[0].log_dir if trainer.loggers else None
        directory = Path(log_dir or trainer.default_root_dir)
        directory.mkdir(parents=True, exist_ok=True)
        config = self.parser.dump(self.config, skip_unset=False)
        for name, content in (("config.yaml", config), ("versions.txt", versions())):
            write_whole(directory / name, content.encode())


@rank_zero_only
def write_result(trainer: Trainer) -> None:
    """`result.json`: the metrics after the last step; a run that has it is finished.

    What stands there of that step, from before a finished run was resumed, stays. Of a run that was
    resumed with no step left, what was logged before is taken from its TensorBoard files.
    """
    if trainer.loggers and trainer.loggers[0].log_dir:
        path = Path(trainer.loggers[0].log_dir) / RESULT
        metrics = {name: float(value) for name, value in trainer.callback_metrics.items()}
        result: dict[str, Any] = {"step": trainer.global_step, "epochs": epochs(trainer)}
        kept = read_result(path.parent) or {}
        if kept.get("step") == trainer.global_step:
            result = kept
        elif "train/loss" not in metrics:
            logged = scalars(path.parent).items()
            before = {n: p[-1].value for n, p in logged if n.startswith(("train/", "schedule/"))}
            metrics = before | metrics
        result["metrics"] = dict(sorted((result.get("metrics", {}) | metrics).items()))
        write_whole(path, (json.dumps(result, indent=1) + "\n").encode())


def epochs(trainer: Trainer) -> float | None:
    """Passes over the training data, in parts of one as well; None where nothing was trained."""
    done = trainer.fit_loop.epoch_loop.batch_progress.total.completed
    length = trainer.num_training_batches
    return done / length if 0 < length < float("inf") else None


def announce_end(trainer: Trainer) -> None:
    """The last line of a run: how good, where it is, how to look at it."""
    run = Path(trainer.log_dir or trainer.default_root_dir)
    parts = []
    metrics = trainer.callback_metrics
    checkpoint = next(c for c in trainer.callbacks if isinstance(c, Checkpoint))  # type: ignore[attr-defined]
    if "val/accuracy" in metrics:
        parts.append(f"held-out accuracy {100 * float(metrics['val/accuracy']):.2f} %")
    if checkpoint.monitor is not None and checkpoint.best is not None:
        parts.append(
            f"best {checkpoint.monitor} {checkpoint.best:.4f} at step {checkpoint.best_step}"
        )
    root = next((p for p in run.parents if p.name == "runs"), run)
    print_once(" | ".join([*parts, f"run in {run}", f"look: tensorboard --logdir {root}"]))
