"""A run that was killed anywhere ends bit by bit like one that was not."""

import random
import signal
from pathlib import Path

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from tests.runs import TINY, differences, last_checkpoint, only_run, patchlight


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("whole")
    done = patchlight("fit", *TINY, cwd=directory)
    assert done.returncode == 0, done.stderr
    return only_run(directory)


def same_end(run: Path, other: Path) -> list[str]:
    ends = [last_checkpoint(directory) for directory in (run, other)]
    for end in ends:
        end["loops"] = None  # Lightning counts restarts there
    return differences(*ends)


@pytest.mark.slow
def test_sigkill_at_three_random_steps(tmp_path: Path, uninterrupted: Path) -> None:
    steps = sorted(random.Random().sample(range(1, 15), 3))
    killed = patchlight("fit", *TINY, cwd=tmp_path, kill_at=steps[0])
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    run = only_run(tmp_path)
    for step in steps[1:]:
        killed = patchlight("fit", "--resume", str(run), cwd=tmp_path, kill_at=step)
        assert killed.returncode == -signal.SIGKILL, killed.stderr
        assert last_checkpoint(run)["global_step"] == step
    done = patchlight("fit", "--resume", str(run), cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert last_checkpoint(run)["global_step"] == 15
    assert same_end(run, uninterrupted) == [], f"killed at {steps}"


@pytest.mark.slow
def test_sigterm_writes_a_checkpoint_and_leaves_without_a_traceback(
    tmp_path: Path, uninterrupted: Path
) -> None:
    rarely = "--checkpoint.every_n_steps=1000"
    stopped = patchlight("fit", *TINY, rarely, cwd=tmp_path, kill_at=7, with_signal=signal.SIGTERM)
    assert stopped.returncode == 143, stopped.stderr
    assert "Traceback" not in stopped.stderr
    assert "stopped by SIGTERM" in stopped.stdout
    run = only_run(tmp_path)
    assert last_checkpoint(run)["global_step"] == 8  # the step that was under way is kept
    done = patchlight("fit", "--resume", str(run), cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert same_end(run, uninterrupted) == []


@pytest.mark.slow
@pytest.mark.parametrize("workers", [1, 2])
def test_the_number_of_workers_changes_nothing(
    tmp_path: Path, uninterrupted: Path, workers: int
) -> None:
    many = f"--data.init_args.num_workers={workers}"
    done = patchlight("fit", *TINY, many, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert logged_losses(only_run(tmp_path)) == logged_losses(uninterrupted)
    assert same_end(only_run(tmp_path), uninterrupted) == []


@pytest.mark.slow
def test_a_killed_run_with_workers_resumes_exactly(tmp_path: Path, uninterrupted: Path) -> None:
    many = "--data.init_args.num_workers=2"
    patchlight("fit", *TINY, many, cwd=tmp_path, kill_at=8)
    run = only_run(tmp_path)
    done = patchlight("fit", "--resume", str(run), cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert same_end(run, uninterrupted) == []
    assert logged_losses(run) == logged_losses(uninterrupted)  # and the curve has no double step


def logged_losses(run: Path) -> dict[int, float]:
    """train/loss by step, as TensorBoard reads it."""
    events = EventAccumulator(str(run))
    events.Reload()
    scalars = [(e.step, e.value) for e in events.Scalars("train/loss")]
    assert len(scalars) == len(dict(scalars))
    return dict(scalars)


@pytest.mark.slow
def test_a_run_killed_before_its_first_checkpoint_starts_again(
    tmp_path: Path, uninterrupted: Path
) -> None:
    patchlight("fit", *TINY, cwd=tmp_path, kill_at=0)
    run = only_run(tmp_path)
    done = patchlight("fit", "--resume", str(run), cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "has no checkpoint yet" in done.stdout
    assert same_end(run, uninterrupted) == []


def test_resume_of_what_is_no_run(tmp_path: Path) -> None:
    done = patchlight("fit", "--resume", "nowhere", cwd=tmp_path)
    assert done.returncode == 1
    assert "--resume nowhere: no config.yaml there" in done.stderr
