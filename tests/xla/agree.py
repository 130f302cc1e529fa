"""Ten steps of every method on XLA and on the CPU: the same losses and the same checkpoint.

No step after the third compiles, and none fetches anything from the device but at log points. Run
by `tests/xla/run.sh`. Lightning asks for a TPU before it takes its XLA strategy; here it is told
that there is one, and XLA's own client for CPUs does the work.
"""

import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch_xla
import torch_xla.debug.metrics as metrics
from lightning.fabric.accelerators.xla import XLAAccelerator
from torch import Tensor

import modules
from datamodules.sources import open_source
from experiments import cli
from tests.label_maps import write_maps
from tests.runs import EXPERIMENTS, last_checkpoint, only_run

STEPS = 10
LOG_EVERY = 3
TOLERANCE = 1e-4
BIASED = "running_var"  # torch_xla averages the variance of the batch, torch the unbiased one
COMPILED_BY = 3  # no step after this one compiles
NUM_IMAGES = 80
COMMON = [
    *(f"--trainer.max_steps={STEPS}", "--trainer.max_epochs=null", "--trainer.callbacks=null"),
    *("--trainer.limit_val_batches=0", "--checkpoint.monitor=null", "--trainer.precision=32-true"),
    *("--trainer.enable_progress_bar=false", "--trainer.accumulate_grad_batches=1"),
    *(f"--trainer.log_every_n_steps={LOG_EVERY}", "--trainer.devices=1"),
    f"--data.init_args.source_args.num_train={NUM_IMAGES}",
]
# What a device's own generator draws is not what the CPU's does.
NO_DROP_PATH = "--model.init_args.backbone.init_args.drop_path=0"
NO_DROPOUT = "--model.init_args.backbone.init_args.dropout=0"
# XLA's compiler for CPUs takes many minutes for ten views of full size.
SMALL = (
    "--model.init_args.backbone.init_args.image_size=32",
    "--model.init_args.backbone.init_args.patch_size=8",
)
FEW_VIEWS = ("--data.init_args.local_size=16", "--data.init_args.num_local=2")
# A recipe, its overlay, and options beside `COMMON`.
RECIPES = {
    "supervised": ("supervised/deit_s16.yaml", "smoke.yaml", NO_DROP_PATH),
    "recompute": (
        *("supervised/deit_s16.yaml", "smoke.yaml", NO_DROP_PATH),
        "--model.init_args.backbone.init_args.recompute=true",
    ),
    "t2t": ("supervised/t2t_vit_14.yaml", "smoke.yaml", NO_DROP_PATH),
    "swin": ("supervised/swin_t.yaml", "smoke.yaml", NO_DROP_PATH),
    "twins": ("supervised/twins_svt_s.yaml", "smoke.yaml", NO_DROP_PATH),
    "hybrid": ("supervised/hybrid_r50_b16_384.yaml", "smoke.yaml", NO_DROPOUT),
    "lamb": ("supervised/deit3_s16.yaml", "smoke.yaml", NO_DROP_PATH),
    "sgd": ("supervised/vit_b16_384.yaml", "smoke.yaml", NO_DROP_PATH),
    "packed": ("navit/vit_s16.yaml", "navit/smoke.yaml", NO_DROP_PATH),
    "mae": ("mae/vit_b16.yaml", "mae/smoke.yaml"),
    "packed_mae": ("mae/packed/vit_s16.yaml", "mae/packed/smoke.yaml"),
    "dino": ("dino/vit_s16.yaml", "dino/smoke.yaml", NO_DROP_PATH, *SMALL, *FEW_VIEWS),
    "ibot": ("dino/vit_s16_ibot.yaml", "dino/smoke.yaml", NO_DROP_PATH, *SMALL, *FEW_VIEWS),
    "moco": ("moco/vit_s16.yaml", "moco/smoke.yaml", NO_DROP_PATH, *SMALL),
    "token_labels": (
        *("lvvit/lvvit_s16.yaml", "smoke.yaml", NO_DROP_PATH, "--model.init_args.num_classes=10"),
    ),
    "probe": ("probe/linear_mae_b16.yaml", "smoke.yaml"),
    "rows": ("sequence/rows/digits.yaml", "sequence/rows/smoke.yaml", NO_DROPOUT),
    "seq2seq": (
        *("quickstart/translate.yaml", "sequence/smoke.yaml"),
        *("--model.init_args.hidden_dim=8", "--data.init_args.pad_to=[32, 36]"),
        "--data.init_args.source_args.max_digits=3",
    ),
    "transformer": (
        *("sequence/transformer/base.yaml", "sequence/transformer/smoke.yaml"),
        *("--model.init_args.dropout=0", "--data.init_args.pad_to=[60, 60]"),
    ),
}


class PretendTPU:
    """What Lightning asks of a TPU host."""

    auto_device_count = staticmethod(lambda: 1)
    is_available = staticmethod(lambda: True)


class Watched(NamedTuple):
    """What a run did, step by step.

    losses:   of every step
    graphs:   that were compiled before it
    fetches:  tensors that came from the device before it
    """

    losses: list[Tensor]
    graphs: list[int]
    fetches: list[int]


@contextmanager
def watched() -> Iterator[Watched]:
    """Notes at every step of any method what has been done until then."""
    found = Watched([], [], [])
    methods = {getattr(modules, name) for name in modules.__all__}
    kept = {method: method.training_step for method in methods}

    def noting(step: Any) -> Any:
        def training_step(self: Any, batch: Any, batch_idx: int) -> Any:
            found.graphs.append(count("CompileTime"))
            found.fetches.append(count("TransferFromDeviceTime"))
            out = step(self, batch, batch_idx)
            found.losses.append((out if isinstance(out, Tensor) else out["loss"]).detach())
            return out

        return training_step

    for method, step in kept.items():
        method.training_step = noting(step)
    try:
        yield found
    finally:
        for method, step in kept.items():
            method.training_step = step


def count(metric: str) -> int:
    data = metrics.metric_data(metric)
    return 0 if data is None else int(data[0])


def run(name: str, accelerator: str, directory: Path) -> tuple[Watched, dict[str, Any]]:
    """What a run did, and its checkpoint as a machine without a TPU loads it."""
    recipe, overlay, *options = RECIPES[name]
    configs = [f"--config={EXPERIMENTS / recipe}", f"--config={EXPERIMENTS / overlay}"]
    place = [f"--runs={directory / 'runs'}", f"--trainer.accelerator={accelerator}"]
    if name == "token_labels":
        source = open_source("shapes", "train", None, channels=3, num_train=NUM_IMAGES, num_val=6)
        write_maps(directory / "maps", source)
        place.append(f"--data.init_args.labels={directory / 'maps'}")
    sys.argv[1:] = ["fit", *configs, *COMMON, *options, *place]
    with watched() as found:
        code = cli.main()
    assert code == 0, f"{name} on {accelerator} ended with {code}"
    return found, last_checkpoint(only_run(directory))


def tensors(state: Any, path: str = "") -> dict[str, Tensor]:
    """All tensors in a nested state."""
    if isinstance(state, Tensor):
        return {path: state}
    if isinstance(state, (list, tuple)):
        state = dict(enumerate(state))
    if not isinstance(state, dict):
        return {}
    parts = [tensors(part, f"{path}/{key}") for key, part in state.items()]
    return {name: tensor for part in parts for name, tensor in part.items()}


def distance(a: Tensor, b: Tensor) -> float:
    return float((a.double() - b.double()).abs().amax()) if a.numel() else 0.0


def agree(name: str) -> None:
    """
    Raises:
        AssertionError: other losses or another checkpoint, a step that compiled late, or one that
            waited for the device between log points.
    """
    with tempfile.TemporaryDirectory() as directory:
        expected, kept = run(name, "cpu", Path(directory) / "cpu")
        found, loaded = run(name, "tpu", Path(directory) / "tpu")
    losses, others = ([float(loss) for loss in each.losses] for each in (expected, found))
    assert len(losses) == STEPS
    assert len(set(losses)) > STEPS // 2, "the loss does not change"
    far = max(abs(a - b) for a, b in zip(losses, others, strict=True))
    late = found.graphs[-1] - found.graphs[COMPILED_BY]
    steps = zip(found.fetches, found.fetches[1:], strict=False)
    waited = [i for i, (a, b) in enumerate(steps) if b > a and (i + 1) % LOG_EVERY]
    mine, theirs = tensors(kept), tensors(loaded)
    print(f"{name}: losses within {far:.1e}, {found.graphs[-1]} graphs, {late} late", end=", ")
    apart = {
        k: (t.double() - theirs[k].double()).abs().max() / t.double().abs().max().clamp(min=1)
        for k, t in mine.items()
        if k in theirs and t.numel() and not k.endswith(BIASED)
    }
    print(f"checkpoints within {max(apart.values()):.1e}", flush=True)
    assert far < TOLERANCE, list(zip(losses, others, strict=True))
    assert late == 0, found.graphs
    assert waited == [], (waited, found.fetches, metrics.counter_names())
    assert mine.keys() == theirs.keys(), mine.keys() ^ theirs.keys()
    assert all(tensor.device.type == "cpu" for tensor in theirs.values())
    assert max(apart.values()) < TOLERANCE, sorted(apart.items(), key=lambda item: -item[1])[:5]


def main(names: list[str]) -> int:
    """Each in a process of its own, or what XLA has compiled takes all mappings that one may have.

    Returns the number of those that do not agree.
    """
    if len(names) != 1:
        command = [sys.executable, "-m", "tests.xla.agree"]
        codes = [subprocess.run([*command, name]).returncode for name in names or RECIPES]
        return sum(code != 0 for code in codes)
    for attribute in ("auto_device_count", "is_available"):
        setattr(XLAAccelerator, attribute, getattr(PretendTPU, attribute))
    torch_xla.device()  # before autograd starts its threads, one for each device there is
    agree(names[0])
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
