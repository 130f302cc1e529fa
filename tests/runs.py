"""Running the command in tests."""

import json
import os
import select
import signal
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

TIMEOUT = 300  # seconds a command may take
ROOT = Path(__file__).parent.parent
EXPERIMENTS = ROOT / "experiments"
RECIPES = sorted(
    path for path in EXPERIMENTS.rglob("*.yaml") if path.name not in ("base.yaml", "smoke.yaml")
)

# Three epochs of five steps in a fraction of a second, with everything random switched on.
TINY = [
    *("--config", str(EXPERIMENTS / "quickstart" / "supervised.yaml")),
    *("--config", str(EXPERIMENTS / "smoke.yaml")),
    "--data.init_args.source_args={num_train: 23, num_val: 7}",
    *("--data.init_args.mixup=0.8", "--data.init_args.cutmix=1.0", "--data.init_args.erasing=0.5"),
    *("--data.init_args.flip=0.5", "--model.init_args.ema_decay=0.9"),
    *("--model.init_args.backbone.init_args.dropout=0.2",),
    *("--model.init_args.backbone.init_args.drop_path=0.3",),
    *("--trainer.max_epochs=3", "--trainer.max_steps=-1", "--trainer.enable_progress_bar=false"),
    *("--trainer.check_val_every_n_epoch=1", "--trainer.enable_model_summary=false"),
    "--checkpoint.every_n_steps=1",
]
# Two epochs of four steps; the last layer rests in the first.
DINO_RUN = [
    *("--config", str(EXPERIMENTS / "quickstart" / "dino.yaml")),
    *("--config", str(EXPERIMENTS / "dino" / "smoke.yaml")),
    *("--model.init_args.freeze_last_layer=1", "--data.init_args.num_local=2"),
    "--data.init_args.local_size=16",
    "--model.init_args.koleo=0",  # which looks at the images of one device
    *("--trainer.max_epochs=2", "--trainer.max_steps=-1", "--trainer.limit_val_batches=0"),
    *("--trainer.num_sanity_val_steps=0", "--trainer.callbacks=null", "--checkpoint.monitor=null"),
    *("--trainer.enable_progress_bar=false", "--checkpoint.every_n_steps=1"),
]


class Ended(subprocess.CompletedProcess[str]):
    """A command that ran on several ranks; its exit code is that of the first."""

    def __init__(self, arguments: list[str], codes: list[int], stdout: str, stderr: str) -> None:
        super().__init__(arguments, codes[0], stdout, stderr)
        self.codes = codes


class Warm:
    """A process of `tests.warm`, which takes one command after another."""

    def __init__(self) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-m", "tests.warm"],
            cwd=ROOT,
            env=environment(),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )

    def run(
        self,
        arguments: Sequence[str],
        cwd: Path,
        doom: tuple[int, int, Sequence[int]] | None,
        ranks: int,
        apart: bool,
    ) -> "Ended":
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        with tempfile.TemporaryDirectory() as directory:
            said = {name: str(Path(directory) / name) for name in ("stdout", "stderr")}
            request = {"arguments": arguments, "cwd": str(cwd), "environment": environment()}
            request |= {"doom": doom, "ranks": ranks, "apart": apart}
            print(json.dumps(request | said), file=self.process.stdin, flush=True)
            if not select.select([self.process.stdout], [], [], TIMEOUT)[0]:
                os.killpg(self.process.pid, signal.SIGKILL)
                warm.cache_clear()
                raise subprocess.TimeoutExpired(list(arguments), TIMEOUT)
            codes = json.loads(self.process.stdout.readline())
            texts = {name: Path(path).read_text(encoding="utf-8") for name, path in said.items()}
        return Ended(list(arguments), codes, **texts)


@lru_cache(maxsize=1)
def warm() -> Warm:
    return Warm()


def environment() -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}


def patchlight(
    *arguments: str,
    cwd: Path,
    kill_at: int | None = None,
    with_signal: int = signal.SIGKILL,
    on_ranks: Sequence[int] = (0, 1),
    launched: bool = False,
) -> Ended:
    """Run the command in its own process; with `kill_at`, it gets a signal in that step.

    With `--trainer.devices=2` it runs in two, unless Lightning is to launch the second, and with
    `--trainer.num_nodes=2` as on two machines.
    """
    doom = None if kill_at is None else (kill_at, int(with_signal), on_ranks)
    apart = "--trainer.num_nodes=2" in arguments
    ranks = 2 if apart or ("--trainer.devices=2" in arguments and not launched) else 1
    return warm().run(arguments, cwd, doom, ranks, apart)


def only_run(directory: Path) -> Path:
    """The one run below `directory`/runs."""
    (config,) = (directory / "runs").rglob("config.yaml")
    return config.parent


def last_checkpoint(run: Path) -> dict[str, Any]:
    loaded: dict[str, Any] = torch.load(run / "checkpoints" / "last.ckpt", weights_only=True)
    return loaded


def logged_losses(run: Path, name: str = "train/loss") -> dict[int, float]:
    """By step, as TensorBoard reads them; no step has two."""
    events = EventAccumulator(str(run))
    events.Reload()
    scalars = [(e.step, e.value) for e in events.Scalars(name)]
    assert len(scalars) == len(dict(scalars))
    return dict(scalars)


def differences(a: Any, b: Any, path: str = "") -> list[str]:
    """Where two nested states differ, to the last bit."""
    if isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor):
        same = a.dtype == b.dtype and torch.equal(a, b)
        return [] if same else [path]
    if isinstance(a, dict) and isinstance(b, dict):
        keys = sorted(set(a) | set(b), key=str)
        return [d for k in keys for d in differences(a.get(k), b.get(k), f"{path}/{k}")]
    if isinstance(a, (list, tuple)) and isinstance(b, (list, tuple)) and len(a) == len(b):
        return [
            d
            for i, (x, y) in enumerate(zip(a, b, strict=True))
            for d in differences(x, y, f"{path}/{i}")
        ]
    return [] if a == b else [f"{path}: {a} != {b}"]
