"""Checkpoints: whole or absent, and no code in them ever runs."""

import contextlib
import os
import pickle
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch

from callbacks.checkpoint_files import AtomicCheckpointIO, newest, not_primitive, read_checkpoint
from tests import small


class Evil:
    """Pickles to a call that leaves a trace when it is run."""

    def __init__(self, trace: Path) -> None:
        self.trace = trace

    def __reduce__(self) -> tuple[Any, ...]:
        return (os.mkdir, (str(self.trace),))


def test_a_malicious_pickle_runs_nothing_and_says_why(tmp_path: Path) -> None:
    trace, path = tmp_path / "owned", tmp_path / "evil.ckpt"
    torch.save({"state_dict": {}, "x": Evil(trace)}, path)
    with pytest.raises(ValueError, match=r"holds pickled Python objects.*mkdir"):
        read_checkpoint(path)
    with pytest.raises(ValueError, match="refused"):
        small.trainer(tmp_path).fit(small.method(), small.data(), ckpt_path=str(path))
    bare = tmp_path / "bare.ckpt"
    bare.write_bytes(pickle.dumps(Evil(trace)))
    with pytest.raises(ValueError, match="not a checkpoint"):
        read_checkpoint(bare)
    assert not trace.exists()
    torch.load(path, weights_only=False)  # the attack is real
    assert trace.exists()


def test_truncated_and_foreign_files_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.ckpt"
    torch.save({"state_dict": {"w": torch.zeros(1000)}}, path)
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match="truncated"):
        read_checkpoint(path)
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("hello", "world")
    with pytest.raises(ValueError, match="is damaged"):
        read_checkpoint(path)
    torch.save([1, 2], path)
    with pytest.raises(ValueError, match="expected a dict, found a list"):
        read_checkpoint(path)
    with pytest.raises(FileNotFoundError, match="there is no checkpoint at"):
        read_checkpoint(tmp_path / "none.ckpt")


def test_a_failed_write_leaves_the_one_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, io = tmp_path / "last.ckpt", AtomicCheckpointIO()
    io.save_checkpoint({"step": 1}, path)

    def full(checkpoint: Any, file: Any) -> None:
        file.write(b"half of it")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(ValueError, match="No space"):
        io.save_checkpoint({"step": 2}, path)
    assert read_checkpoint(path) == {"step": 1}
    assert os.listdir(tmp_path) == ["last.ckpt"]


def test_the_file_is_synced_before_it_gets_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    events: list[str] = []
    sync, replace = os.fsync, Path.replace
    monkeypatch.setattr(os, "fsync", lambda f: (events.append("sync"), sync(f))[1])
    monkeypatch.setattr(Path, "replace", lambda a, b: (events.append("rename"), replace(a, b))[1])
    AtomicCheckpointIO().save_checkpoint({"step": 1}, tmp_path / "last.ckpt")
    assert events == ["sync", "rename", "sync"]
    AtomicCheckpointIO().save_checkpoint({"step": 2}, tmp_path / "last.ckpt")
    assert events[3:] == ["sync", "rename", "rename", "sync"]
    assert read_checkpoint(tmp_path / "before.ckpt") == {"step": 1}
    assert not os.path.samefile(tmp_path / "before.ckpt", tmp_path / "last.ckpt")


class Killed(BaseException):
    """What no code gets to catch."""


def test_killed_at_any_moment_of_a_save_there_is_one_to_go_on_from(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = {"left": 0}

    def mortal(ordinary: Any) -> Any:
        def call(*arguments: Any) -> Any:
            if calls["left"] == 0:
                raise Killed
            calls["left"] -= 1
            return ordinary(*arguments)

        return call

    found = []
    for moment in range(8):
        directory = tmp_path / str(moment)
        for step in (1, 2):
            AtomicCheckpointIO().save_checkpoint({"step": step}, directory / "last.ckpt")
        calls["left"] = moment
        with monkeypatch.context() as patch, contextlib.suppress(Killed):
            for owner, name in ((torch, "save"), (os, "fsync"), (Path, "replace")):
                patch.setattr(owner, name, mortal(getattr(owner, name)))
            patch.setattr(Path, "unlink", lambda *_, **__: None)  # nobody tidies up
            AtomicCheckpointIO().save_checkpoint({"step": 3}, directory / "last.ckpt")
        path = newest(directory)
        assert path is not None
        found.append((path.name, read_checkpoint(path)["step"]))
        # And it can be written again.
        AtomicCheckpointIO().save_checkpoint({"step": 3}, directory / "last.ckpt")
        assert read_checkpoint(directory / "last.ckpt") == {"step": 3}
    # torch.save, fsync, last to before, temporary to last, fsync of the directory
    assert found == [("last.ckpt", 2)] * 3 + [("before.ckpt", 2)] + [("last.ckpt", 3)] * 4


def test_what_a_disk_refuses_is_reported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    io, path = AtomicCheckpointIO(), tmp_path / "checkpoints" / "last.ckpt"
    path.parent.write_text("in the way")
    with pytest.raises(ValueError, match=r"could not be written .*exists.*MiB are free"):
        io.save_checkpoint({"step": 1}, path)
    path.parent.unlink()
    io.save_checkpoint({"step": 1}, path)

    def refuse(path: Path, target: Path) -> None:
        raise OSError(13, f"no renaming to {target.name}")

    monkeypatch.setattr(Path, "replace", refuse)
    with pytest.raises(ValueError, match=r"no renaming to before\.ckpt; .*can still be loaded"):
        io.save_checkpoint({"step": 2}, path)
    assert read_checkpoint(path) == {"step": 1}
    assert os.listdir(path.parent) == ["last.ckpt"]


def test_objects_are_not_written(tmp_path: Path) -> None:
    nested = {"a": [1, {"b": (None, Path("x"))}]}
    assert not_primitive(nested) == "checkpoint['a'][1]['b'][1] is a pathlib.PosixPath"
    with pytest.raises(ValueError, match=r"\['b'\].*tensors and primitives only"):
        AtomicCheckpointIO().save_checkpoint(nested, tmp_path / "x.ckpt")
    assert not list(tmp_path.iterdir())
