"""Every method, killed at twenty random steps in all, ends bit by bit as if it had not been."""

import random
import signal
from pathlib import Path

import pytest

from tests.experiments.test_mae_runs import RUN as MAE
from tests.experiments.test_packed_runs import PACKED
from tests.experiments.test_resume import same_end
from tests.runs import (
    DINO_RUN,
    EXPERIMENTS,
    TINY,
    last_checkpoint,
    logged_losses,
    only_run,
    patchlight,
)

DROP = "--model.init_args.backbone.init_args.drop_path=0.3"
RUNS = {
    "supervised": [*TINY],
    "packed": [*PACKED],
    "mae": [*MAE, DROP],
    "dino": [*DINO_RUN, DROP, "--model.init_args.masked_patches={num_prototypes: 32}"],
    "moco": [
        *("--config", str(EXPERIMENTS / "moco" / "vit_s16.yaml")),
        *("--config", str(EXPERIMENTS / "moco" / "smoke.yaml"), DROP),
        *("--trainer.max_epochs=2", "--trainer.max_steps=-1", "--trainer.callbacks=null"),
        *("--trainer.num_sanity_val_steps=0", "--checkpoint.monitor=null"),
        *("--trainer.enable_progress_bar=false", "--checkpoint.every_n_steps=1"),
        *("--trainer.precision=32-true", "--trainer.accumulate_grad_batches=1"),
    ],
}
KILLS = 20 // len(RUNS)


@pytest.mark.slow
@pytest.mark.parametrize("name", RUNS)
def test_killed_and_resumed(tmp_path: Path, name: str) -> None:
    for place in ("whole", "killed"):
        (tmp_path / place).mkdir()
    done = patchlight("fit", *RUNS[name], cwd=tmp_path / "whole")
    assert done.returncode == 0, done.stderr
    whole = only_run(tmp_path / "whole")
    total = last_checkpoint(whole)["global_step"]
    steps = sorted(random.Random().sample(range(1, total), KILLS))
    arguments, run = [*RUNS[name], "--data.init_args.num_workers=1"], tmp_path
    for step in steps:
        killed = patchlight("fit", *arguments, cwd=tmp_path / "killed", kill_at=step)
        assert killed.returncode == -signal.SIGKILL, killed.stderr
        run = only_run(tmp_path / "killed")
        assert last_checkpoint(run)["global_step"] == step
        arguments = ["--resume", str(run)]
    done = patchlight("fit", *arguments, cwd=tmp_path / "killed")
    assert done.returncode == 0, done.stderr
    assert same_end(run, whole) == [], f"killed at {steps}"
    assert logged_losses(run) == logged_losses(whole)
