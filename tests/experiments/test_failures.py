"""What goes wrong outside: full disks, damaged files, lost processes; a run says so and goes on."""

import json
import os
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.data import BatchSampler, DataLoader, Dataset

from callbacks import FiniteLoss
from callbacks.checkpoint_files import AtomicCheckpointIO, read_checkpoint
from datamodules.placed import PlacedDataModule, WaitedLoader
from experiments import cli
from tests import small
from tests.experiments.test_resume import same_end
from tests.runs import ROOT, TINY, environment, last_checkpoint, only_run, patchlight


def test_a_full_disk_is_reported_and_what_was_saved_stays(tmp_path: Path) -> None:
    path, io = tmp_path / "last.ckpt", AtomicCheckpointIO()
    io.save_checkpoint({"weights": torch.ones(10)}, path)
    before, limits = path.read_bytes(), resource.getrlimit(resource.RLIMIT_FSIZE)
    ignored = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (64 * 1024, limits[1]))  # no file may get longer
    try:
        with pytest.raises(ValueError, match=r"last\.ckpt could not be written.*MiB are free"):
            io.save_checkpoint({"weights": torch.ones(100_000)}, path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, ignored)
    assert path.read_bytes() == before
    assert os.listdir(tmp_path) == ["last.ckpt"]


@pytest.mark.slow
def test_a_truncated_checkpoint_is_refused_and_the_one_before_goes_on(tmp_path: Path) -> None:
    for place in ("whole", "cut"):
        (tmp_path / place).mkdir()
        done = patchlight("fit", *TINY, cwd=tmp_path / place, kill_at=9 if place == "cut" else None)
    run = only_run(tmp_path / "cut")
    last, before = (run / "checkpoints" / name for name in ("last.ckpt", "before.ckpt"))
    assert read_checkpoint(before)["global_step"] == 8
    with last.open("r+b") as file:
        file.truncate(last.stat().st_size // 2)
    done = patchlight("fit", "--resume", str(run), cwd=tmp_path)
    assert done.returncode == 1
    assert f"mv {before} {last}" in " ".join(done.stderr.split())
    assert "step 8" in done.stderr
    before.replace(last)
    done = patchlight("fit", "--resume", str(run), cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert same_end(run, only_run(tmp_path / "whole")) == []


@pytest.mark.parametrize(("accumulate", "batch", "step"), [(1, 6, 6), (2, 7, 4)])
def test_a_loss_that_is_no_number_names_its_step_and_its_images(
    tmp_path: Path, accumulate: int, batch: int, step: int
) -> None:
    """In epochs of five batches; one that is accumulated is the first of its step, not the last."""

    class Spoil(small.Pixels):
        """Gives no number for one batch."""

        count = 0

        def forward(self, images: Any) -> Any:
            features = super().forward(images)
            self.count += self.training
            bad = self.training and self.count == batch + 1
            return features._replace(pooled=features.pooled * torch.nan) if bad else features

    seen: list[list[int]] = []

    class Batches(FiniteLoss):
        def on_train_batch_end(self, trainer: Any, module: Any, outputs: Any, batch: Any, i: int):  # type: ignore[no-untyped-def]
            seen.append(batch.indices.tolist())
            super().on_train_batch_end(trainer, module, outputs, batch, i)

    checkpoint = small.Checkpoint(every_n_steps=100, monitor=None)
    often = {"log_every_n_steps": 9, "accumulate_grad_batches": accumulate}
    run = small.trainer(tmp_path, Batches(), checkpoint=checkpoint, **often)
    module = small.method(backbone=Spoil(), ema_decay=None)
    with pytest.raises(ValueError, match=rf"not a number at step {step}; last\.ckpt is") as error:
        run.fit(module, small.data())
    path = Path(run.log_dir or "") / "nonfinite-0.txt"
    assert str(path) in str(error.value)
    first, *lines = path.read_text().splitlines()
    assert first == f"# step {step}"
    assert [int(line.split("\t")[0]) for line in lines] == seen[batch]
    assert all(line.split("\t")[1] for line in lines)


class Doomed(Dataset[int]):
    def __getitem__(self, item: int) -> int:
        os.kill(os.getpid(), signal.SIGKILL)
        return item

    def __len__(self) -> int:
        return 4


def test_a_killed_loading_process_is_an_error_that_says_so() -> None:
    loader: Any = WaitedLoader(Doomed(), num_workers=1, timeout=600)  # known at once
    with pytest.raises(ValueError, match=r"loads data ended .*num_workers to less"):
        next(iter(loader))


def test_one_that_is_killed_while_a_checkpoint_is_written_is_not_taken_for_a_full_disk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, io = tmp_path / "last.ckpt", AtomicCheckpointIO()
    io.save_checkpoint({"step": 1}, path)
    batches: Any = iter(DataLoader(Groups(), num_workers=1))

    def interrupted(*_: Any) -> None:
        os.kill(batches._workers[0].pid, signal.SIGKILL)
        time.sleep(60)  # until torch's handler of the signal ends it

    monkeypatch.setattr("torch.save", interrupted)
    with pytest.raises(ValueError, match=r"loads data ended .*Killed"):
        io.save_checkpoint({"step": 2}, path)
    assert read_checkpoint(path) == {"step": 1}
    assert os.listdir(tmp_path) == ["last.ckpt"]


def test_one_that_is_killed_at_any_time_is_an_error_that_says_so(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def step(arguments: list[str]) -> int:
        batches: Any = iter(DataLoader(Groups(), num_workers=1))
        os.kill(batches._workers[0].pid, signal.SIGKILL)
        time.sleep(60)
        return 0

    monkeypatch.setitem(cli.VERBS, "relabel", step)
    monkeypatch.setattr("sys.argv", ["patchlight", "relabel"])
    assert cli.main() == 1
    assert capsys.readouterr().err.startswith("patchlight: a process that loads data ended (")


class Groups(Dataset[tuple[int, int]]):
    """The process that loads, and its group."""

    def __len__(self) -> int:
        return 1

    def __getitem__(self, index: int) -> tuple[int, int]:
        return os.getpid(), os.getpgid(0)


class Asleep(Groups):
    def __getitem__(self, index: int) -> tuple[int, int]:
        time.sleep(60)
        return super().__getitem__(index)


def test_processes_that_give_no_batch_end_a_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("datamodules.placed.LONGEST_WAIT", 1.2)
    data = PlacedDataModule()
    data.num_workers = 1
    loader = data.loader(Asleep(), BatchSampler([0], 1, False), lambda items: items[0])
    with pytest.raises(ValueError, match=r"no batch came for 0 minutes .*--resume RUN"):
        next(iter(loader))


def test_a_signal_to_the_group_of_a_run_spares_those_that_load() -> None:
    """Else they would end before the run has written its checkpoint."""
    data = PlacedDataModule()
    data.num_workers = 1
    ((process, group),) = data.loader(Groups(), BatchSampler([0], 1, False), lambda items: items[0])
    assert process == group != os.getpgid(0)


@pytest.mark.slow
def test_a_rank_that_dies_under_torchrun_does_not_end_the_run(tmp_path: Path) -> None:
    """Both ranks start again with the same command, and `--into` goes on from the checkpoint."""
    run = tmp_path / "run"
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2"]
    command += ["--max-restarts=3", "--standalone", "-m", "tests.mortal", "fit", *TINY]
    command += ["--into", str(run), "--trainer.devices=2", "--trainer.strategy=ddp"]
    command += ["--data.init_args.batch_size=2", "--trainer.max_epochs=2"]
    own_store = {"TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}  # as experiments/cluster/torchrun.sh
    script = (ROOT / "experiments" / "cluster" / "torchrun.sh").read_text(encoding="utf-8")
    assert all(f"export {name}={value}\n" in script for name, value in own_store.items())
    given = environment() | own_store
    done = subprocess.run(command, cwd=ROOT, env=given, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    assert (run / "killed.txt").read_text() == "rank 1 at step 4, the first time"
    assert last_checkpoint(run)["global_step"] == 10
    assert json.loads((run / "result.json").read_text())["step"] == 10
