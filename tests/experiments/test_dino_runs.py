"""DINO by the command: killed and resumed, and on two processes."""

import signal
from pathlib import Path

import pytest

from tests.experiments.test_resume import logged_losses, losses_on_one_and_two, same_end
from tests.runs import EXPERIMENTS, last_checkpoint, only_run, patchlight

# Two epochs of four steps; the last layer rests in the first.
RUN = [
    *("--config", str(EXPERIMENTS / "quickstart" / "dino.yaml")),
    *("--config", str(EXPERIMENTS / "dino" / "smoke.yaml")),
    *("--model.init_args.freeze_last_layer=1", "--data.init_args.num_local=2"),
    "--data.init_args.local_size=16",
    "--model.init_args.koleo=0",  # which looks at the images of one device
    *("--trainer.max_epochs=2", "--trainer.max_steps=-1", "--trainer.limit_val_batches=0"),
    *("--trainer.num_sanity_val_steps=0", "--trainer.callbacks=null", "--checkpoint.monitor=null"),
    *("--trainer.enable_progress_bar=false", "--checkpoint.every_n_steps=1"),
]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("whole")
    drop = "--model.init_args.backbone.init_args.drop_path=0.3"
    done = patchlight("fit", *RUN, drop, cwd=directory)
    assert done.returncode == 0, done.stderr
    return only_run(directory)


@pytest.mark.slow
def test_a_killed_run_resumes_bit_by_bit(tmp_path: Path, whole: Path) -> None:
    drop = "--model.init_args.backbone.init_args.drop_path=0.3"
    killed = patchlight("fit", *RUN, drop, cwd=tmp_path, kill_at=3)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    run = only_run(tmp_path)
    assert last_checkpoint(run)["global_step"] == 3
    done = patchlight("fit", "--resume", str(run), cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert same_end(run, whole) == []
    assert logged_losses(run) == logged_losses(whole)
    assert {name.split(".")[0] for name in last_checkpoint(run)["state_dict"]} == {
        *("student", "teacher", "center")
    }


@pytest.mark.slow
@pytest.mark.parametrize(
    ("centering", "masked"), [("center", "{num_prototypes: 32}"), ("sinkhorn_knopp", "null")]
)
def test_two_processes_follow_one(tmp_path: Path, centering: str, masked: str) -> None:
    how = [f"--model.init_args.centering={centering}"]
    how += [f"--model.init_args.masked_patches={masked}"]
    one, two = losses_on_one_and_two(tmp_path, *RUN, *how)
    assert len(one) == 8
    assert len({round(loss, 3) for loss in one.values()}) > 4
    assert two == pytest.approx(one, abs=1e-5)
