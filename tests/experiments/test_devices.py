"""Every method on two processes takes the steps of one with the same global batch."""

from pathlib import Path

import pytest
from lightning.pytorch.utilities.exceptions import SIGTERMException
from torch import distributed
from torch.testing._internal.distributed.fake_pg import FakeStore

from experiments import cli
from tests.experiments.test_mae_runs import RUN as MAE
from tests.experiments.test_resume import losses_on_one_and_two
from tests.experiments.test_sequence_runs import RUN as TRANSLATE
from tests.runs import DINO_RUN, EXPERIMENTS, TINY

STEPS = 20
# Dropout and stochastic depth are drawn on each device and are left out.
STILL = [f"--model.init_args.backbone.init_args.{name}=0" for name in ("dropout", "drop_path")]
UNEVEN = "--data.init_args.source_args={num_train: 23, num_val: 7}"
PLAIN = [
    *("--trainer.callbacks=null", "--trainer.num_sanity_val_steps=0", "--checkpoint.monitor=null"),
    *("--trainer.precision=32-true", "--trainer.accumulate_grad_batches=1"),
]
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
        *("--trainer.limit_val_batches=0", *PLAIN),
    ],
    "seq2seq": [*TRANSLATE],
    "transformer": [
        *("--config", str(EXPERIMENTS / "sequence" / "transformer" / "base.yaml")),
        *("--config", str(EXPERIMENTS / "sequence" / "transformer" / "smoke.yaml")),
        *("--model.init_args.dropout=0", UNEVEN, *PLAIN),
    ],
    "rows": [
        *("--config", str(EXPERIMENTS / "sequence" / "rows" / "digits.yaml")),
        *("--config", str(EXPERIMENTS / "sequence" / "rows" / "smoke.yaml")),
        *(STILL[0], UNEVEN, *PLAIN),
    ],
    # With a batch norm, whose statistics are those of both.
    "probe": [
        *("--config", str(EXPERIMENTS / "probe" / "linear_mae_b16.yaml")),
        *("--config", str(EXPERIMENTS / "smoke.yaml"), UNEVEN, *PLAIN),
    ],
    "packed mae": [
        *("--config", str(EXPERIMENTS / "mae" / "packed" / "vit_s16.yaml")),
        *("--config", str(EXPERIMENTS / "mae" / "packed" / "smoke.yaml"), *PLAIN),
        "--data.init_args.source_args={num_train: 40, num_val: 11, min_side: 24, max_side: 64}",
    ],
}


@pytest.mark.slow
@pytest.mark.parametrize("name", RUNS)
def test_two_processes_follow_one(tmp_path: Path, name: str) -> None:
    length = [f"--trainer.max_steps={STEPS}", "--trainer.max_epochs=-1"]
    batch = ("num_rows", 2) if name == "packed mae" else ("batch_size", 4)
    one, two = losses_on_one_and_two(tmp_path, *RUNS[name], *length, batch=batch)
    assert len(one) == STEPS
    assert len({round(loss, 3) for loss in one.values()}) > STEPS // 2
    assert two == pytest.approx(one, abs=1e-5)


@pytest.mark.parametrize("code", [0, cli.STOPPED])
def test_a_process_leaves_its_group_before_it_ends(
    monkeypatch: pytest.MonkeyPatch, code: int
) -> None:
    def run(arguments: list[str]) -> int:
        distributed.init_process_group("fake", rank=0, world_size=2, store=FakeStore())
        if code == cli.STOPPED:
            raise SIGTERMException
        return code

    monkeypatch.setitem(cli.VERBS, "relabel", run)
    monkeypatch.setattr("sys.argv", ["patchlight", "relabel"])
    assert cli.main() == code
    assert not distributed.is_initialized()
