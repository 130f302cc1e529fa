"""Every method on two processes takes the steps of one with the same global batch."""

from pathlib import Path

import pytest

from tests.experiments.test_mae_runs import RUN as MAE
from tests.experiments.test_resume import losses_on_one_and_two
from tests.experiments.test_sequence_runs import RUN as TRANSLATE
from tests.runs import DINO_RUN, EXPERIMENTS, TINY

STEPS = 20
# Dropout and stochastic depth are drawn on each device and are left out.
STILL = [f"--model.init_args.backbone.init_args.{name}=0" for name in ("dropout", "drop_path")]
SINKHORN = "--model.init_args.centering=sinkhorn_knopp"
RUNS = {
    # 23 images and 7 held-out ones: no epoch and no evaluation comes out even.
    "supervised": [*TINY, *STILL],
    "mae": [*MAE],
    "dino": [*DINO_RUN, "--model.init_args.masked_patches={num_prototypes: 32}"],
    "dino, sinkhorn_knopp": [*DINO_RUN, SINKHORN],
    "moco": [
        *("--config", str(EXPERIMENTS / "moco" / "vit_s16.yaml")),
        *("--config", str(EXPERIMENTS / "moco" / "smoke.yaml")),
        *("--trainer.callbacks=null", "--trainer.num_sanity_val_steps=0"),
        *("--checkpoint.monitor=null", "--trainer.limit_val_batches=0"),
        *("--trainer.precision=32-true", "--trainer.accumulate_grad_batches=1"),
    ],
    "seq2seq": [*TRANSLATE],
}


@pytest.mark.slow
@pytest.mark.parametrize("name", RUNS)
def test_two_processes_follow_one(tmp_path: Path, name: str) -> None:
    length = [f"--trainer.max_steps={STEPS}", "--trainer.max_epochs=-1"]
    one, two = losses_on_one_and_two(tmp_path, *RUNS[name], *length)
    assert len(one) == STEPS
    assert len({round(loss, 3) for loss in one.values()}) > STEPS // 2
    assert two == pytest.approx(one, abs=1e-5)
