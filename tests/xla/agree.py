"""Ten steps of every method on XLA and on the CPU: the same losses, and nothing compiled late.

Run by `tests/xla/run.sh`. Lightning asks for a TPU before it takes its XLA strategy; here it is
told that there is one, and XLA's own client for CPUs does the work.
"""

import sys
import tempfile
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch_xla
import torch_xla.debug.metrics as metrics
from lightning.fabric.accelerators.xla import XLAAccelerator

import modules
from experiments import cli
from tests.runs import EXPERIMENTS, logged_losses, only_run

STEPS = 10
TOLERANCE = 1e-4
COMPILED_BY = 3  # no step after this one compiles
RECIPES = {
    "supervised": ("supervised/deit_s16.yaml", "smoke.yaml"),
    "packed": ("navit/vit_s16.yaml", "navit/smoke.yaml"),
    "mae": ("mae/vit_b16.yaml", "mae/smoke.yaml"),
    "dino": ("dino/vit_s16.yaml", "dino/smoke.yaml"),
    "ibot": ("dino/vit_s16_ibot.yaml", "dino/smoke.yaml"),
    "moco": ("moco/vit_s16.yaml", "moco/smoke.yaml"),
}
COMMON = [
    "--data.init_args.source_args.num_train=80",
    "--model.init_args.backbone.init_args.drop_path=0",
    *(f"--trainer.max_steps={STEPS}", "--trainer.max_epochs=null", "--trainer.callbacks=null"),
    *("--trainer.limit_val_batches=0", "--checkpoint.monitor=null", "--trainer.precision=32-true"),
    *("--trainer.enable_progress_bar=false", "--trainer.accumulate_grad_batches=1"),
    *("--trainer.log_every_n_steps=1", "--trainer.devices=1"),
]


class PretendTPU:
    """What Lightning asks of a TPU host."""

    auto_device_count = staticmethod(lambda: 1)
    is_available = staticmethod(lambda: True)


@contextmanager
def counted(found: list[int]) -> Any:
    """Notes how many graphs were compiled before every step."""
    methods = {getattr(modules, name) for name in modules.__all__}
    kept = {method: method.training_step for method in methods}

    def counting(step: Any) -> Any:
        def training_step(self: Any, batch: Any, batch_idx: int) -> Any:
            found.append(compilations())
            return step(self, batch, batch_idx)

        return training_step

    for method, step in kept.items():
        method.training_step = counting(step)
    try:
        yield
    finally:
        for method, step in kept.items():
            method.training_step = step


def compilations() -> int:
    data = metrics.metric_data("CompileTime")
    return 0 if data is None else int(data[0])


def run(recipe: str, overlay: str, accelerator: str, directory: Path) -> dict[int, float]:
    """The losses of a run, step by step."""
    configs = [f"--config={EXPERIMENTS / recipe}", f"--config={EXPERIMENTS / overlay}"]
    place = [f"--runs={directory / 'runs'}", f"--trainer.accelerator={accelerator}"]
    sys.argv[1:] = ["fit", *configs, *COMMON, *place]
    code = cli.main()
    assert code == 0, f"{recipe} on {accelerator} ended with {code}"
    return logged_losses(only_run(directory))


def agree(name: str) -> None:
    """
    Raises:
        AssertionError: other losses, or a step that compiled late.
    """
    with tempfile.TemporaryDirectory() as directory:
        places = [Path(directory) / accelerator for accelerator in ("cpu", "tpu")]
        expected = run(*RECIPES[name], "cpu", places[0])
        graphs: list[int] = []
        with counted(graphs):
            found = run(*RECIPES[name], "tpu", places[1])
    assert len(expected) == STEPS, sorted(expected)
    assert len(set(expected.values())) > STEPS // 2, "the loss does not change"
    far = max(abs(found[step] - loss) for step, loss in expected.items())
    late = graphs[-1] - graphs[COMPILED_BY]
    print(f"{name}: {STEPS} steps, losses within {far:.1e}, {graphs[-1]} graphs, {late} late")
    assert far < TOLERANCE, {step: (loss, found[step]) for step, loss in expected.items()}
    assert late == 0, graphs


def main(names: list[str]) -> None:
    for attribute in ("auto_device_count", "is_available"):
        setattr(XLAAccelerator, attribute, getattr(PretendTPU, attribute))
    torch_xla.device()  # before autograd starts its threads, one for each device there is
    for name in names or RECIPES:
        agree(name)


if __name__ == "__main__":
    main(sys.argv[1:])
