"""A run that was killed anywhere ends bit by bit like one that was not."""

import json
import shutil
import signal
from pathlib import Path

import pytest

from callbacks.checkpoint_files import read_checkpoint
from tests.datamodules.test_folder import tree
from tests.runs import TINY, differences, last_checkpoint, logged_losses, only_run, patchlight


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
def test_sigterm_between_two_micro_batches_loses_no_gradient(tmp_path: Path) -> None:
    pairs = ["--trainer.accumulate_grad_batches=2", "--checkpoint.every_n_steps=1000"]
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    for directory in (whole, stopped):
        directory.mkdir()
    assert patchlight("fit", *TINY, *pairs, cwd=whole).returncode == 0
    term = {"kill_at": 7, "with_signal": signal.SIGTERM}  # the third of an epoch of five
    # The step that it is of ends before the run does.
    assert patchlight("fit", *TINY, *pairs, cwd=stopped, **term).returncode == 143
    run = only_run(stopped)
    assert last_checkpoint(run)["global_step"] == 5
    done = patchlight("fit", "--resume", str(run), cwd=stopped)
    assert done.returncode == 0, done.stderr
    assert same_end(run, only_run(whole)) == []


@pytest.mark.slow
def test_sigterm_on_one_of_two_ranks_or_on_both_stops_them_after_the_same_step(
    tmp_path: Path,
) -> None:
    """Six epochs of four steps, and evaluations of two batches on a rank and one on the other."""
    length = ["--trainer.max_epochs=6", "--checkpoint.every_n_steps=1000"]
    length += ["--data.init_args.source_args={num_train: 19, num_val: 5}"]
    two = ["--trainer.devices=2", "--trainer.strategy=ddp", "--data.init_args.batch_size=2"]
    for place in ("whole", "stopped"):
        (tmp_path / place).mkdir()
    assert patchlight("fit", *TINY, *length, *two, cwd=tmp_path / "whole").codes == [0, 0]
    whole, arguments = only_run(tmp_path / "whole"), [*TINY, *length, *two]
    # In the midst of an epoch, then in its last step but one: they ask at steps 10 and 20.
    for step, ranks, stopped_at in ((8, [1], 10), (18, [0, 1], 20)):
        done = patchlight(
            *("fit", *arguments),
            **{"cwd": tmp_path / "stopped", "kill_at": step, "on_ranks": ranks},
            with_signal=signal.SIGTERM,
        )
        assert done.codes == [143, 143], done.stderr
        assert "Traceback" not in done.stderr
        assert done.stdout.count("stopped by SIGTERM") == 1
        run = only_run(tmp_path / "stopped")
        assert last_checkpoint(run)["global_step"] == stopped_at
        before = read_checkpoint(run / "checkpoints" / "before.ckpt")["global_step"]
        assert before == stopped_at // 4 * 4 - 4 * (stopped_at % 4 == 0)  # written once
        arguments = ["--resume", str(run), *two]
    done = patchlight("fit", *arguments, cwd=tmp_path / "stopped")
    assert done.codes == [0, 0], done.stderr
    assert same_end(run, whole) == []
    assert logged_losses(run) == logged_losses(whole)


@pytest.mark.slow
def test_two_processes_train_and_resume(tmp_path: Path) -> None:
    """On two machines, then on one; neither a bad image nor a disk that refuses makes one wait."""
    ddp = ["--trainer.strategy=ddp", "--data.init_args.batch_size=2"]
    apart = ["--trainer.num_nodes=2", "--trainer.devices=1"]
    done = patchlight("fit", *TINY, *ddp, *apart, "--trainer.max_epochs=1", cwd=tmp_path)
    assert done.codes == [0, 0], done.stderr
    run = only_run(tmp_path)
    two = ["--trainer.devices=2", *ddp]
    resume = ["fit", "--resume", str(run), "--trainer.num_nodes=1", "--trainer.devices=2"]
    done = patchlight(*resume, "--trainer.max_epochs=2", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert last_checkpoint(run)["global_step"] == 10
    assert (run / "versions.txt").is_file()

    (run / "checkpoints" / "before.ckpt").unlink()
    (run / "checkpoints" / "before.ckpt").mkdir()  # so that the first rank cannot save
    done = patchlight(*resume, "--trainer.max_epochs=3", cwd=tmp_path)
    assert done.codes == [1, 1], done.stderr
    assert "last.ckpt could not be written" in done.stderr
    assert last_checkpoint(run)["global_step"] == 10

    images = tree(tmp_path / "images", count=20)
    (images / "cat" / "003.png").write_bytes(b"garbage")
    folder = ["--data.init_args.source=folder", f"--data.init_args.root={images}"]
    folder += ["--data.init_args.source_args={}", "--data.init_args.max_bad=0.5"]
    other = tmp_path / "other"
    other.mkdir()
    done = patchlight("fit", *TINY, *two, *folder, "--trainer.max_epochs=1", cwd=other)
    assert done.returncode == 0, done.stderr
    listed = [line for path in only_run(other).glob("unreadable-*.txt") for line in path.open()]
    assert set(listed) == {f"{images}/cat/003.png\n"}


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


def losses_on_one_and_two(
    directory: Path,
    *arguments: str,
    strategy: str = "ddp",
    batch: tuple[str, int] = ("batch_size", 4),
) -> list[dict[int, float]]:
    """The losses of a run on one process, and on two with half the batch each."""
    option, size = batch
    found = []
    for devices in (1, 2):
        place = directory / str(devices)
        place.mkdir()
        share = [f"--trainer.devices={devices}", f"--data.init_args.{option}={size // devices}"]
        share += [f"--trainer.strategy={strategy}"] * (devices == 2)
        share += ["--trainer.enable_progress_bar=true"]  # which the first device alone shows
        done = patchlight("fit", *arguments, *share, cwd=place)
        assert done.returncode == 0, done.stderr
        found.append(logged_losses(only_run(place)))
    return found


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


@pytest.mark.slow
def test_a_finished_run_whose_result_is_damaged_gets_it_again(
    tmp_path: Path, uninterrupted: Path
) -> None:
    """What was logged in training comes from TensorBoard's files."""
    run = tmp_path / "run"
    shutil.copytree(uninterrupted, run)
    path = run / "result.json"
    whole = json.loads(path.read_text())
    assert {"train/loss", "schedule/lr", "val/loss"} <= set(whole["metrics"])
    path.write_text(path.read_text()[:30])
    done = patchlight("fit", "--resume", str(run), cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert json.loads(path.read_text()) == whole


@pytest.mark.slow
def test_fewer_epochs_than_were_done_are_refused(tmp_path: Path) -> None:
    patchlight("fit", *TINY, cwd=tmp_path, kill_at=14)
    fewer = ["--resume", str(only_run(tmp_path)), "--trainer.max_epochs=1"]
    done = patchlight("fit", *fewer, cwd=tmp_path)
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1].startswith("patchlight: You restored a checkpoint with")
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("option", ["--runs", "--into"])
def test_a_place_that_cannot_be_made_is_named(tmp_path: Path, option: str) -> None:
    (tmp_path / "file").touch()
    done = patchlight("fit", *TINY, option, "file/x", cwd=tmp_path)
    assert done.returncode == 1
    says = "patchlight: file/x cannot be made (Not a directory); name another"
    assert done.stderr.splitlines()[-1] == says


@pytest.mark.parametrize(
    ("option", "says"),
    [
        ("--trainer.strategy=nonsense", "You selected an invalid strategy name: `strategy='nonse"),
        (
            "--runs=s3://bucket/runs",
            "--runs s3://bucket/runs: runs are written to a directory, not",
        ),
    ],
)
def test_an_option_that_cannot_be_is_told_in_a_line(tmp_path: Path, option: str, says: str) -> None:
    done = patchlight("fit", *TINY, option, cwd=tmp_path)
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1].startswith(f"patchlight: {says}")
    assert "Traceback" not in done.stderr
    assert list(tmp_path.rglob("*.*")) == []


@pytest.mark.slow
def test_a_home_that_no_shell_has_filled_in(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    (tmp_path / "work").mkdir()
    for option in ("--into=~/mine", "--runs=~/all"):
        done = patchlight("fit", *TINY, "--trainer.max_epochs=1", option, cwd=tmp_path / "work")
        assert done.returncode == 0, done.stderr
    assert (tmp_path / "home" / "mine" / "result.json").is_file()
    assert len(list((tmp_path / "home" / "all").rglob("result.json"))) == 1
    assert list((tmp_path / "work").iterdir()) == []
    again = patchlight("fit", *TINY, "--trainer.max_epochs=1", "--into=~/mine", cwd=tmp_path)
    assert again.returncode == 0, again.stderr
    assert "Restored all states" in again.stderr


def test_resume_of_what_is_no_run(tmp_path: Path) -> None:
    done = patchlight("fit", "--resume", "nowhere", cwd=tmp_path)
    assert done.returncode == 1
    assert "--resume nowhere: no config.yaml there" in done.stderr
