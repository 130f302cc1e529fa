"""Files of checkpoints: what is on the disk can always be loaded, and loading runs no code.

A new last.ckpt is whole on the disk before the old one is renamed to before.ckpt, and then takes
its name; a run that was killed between the two renames has no last.ckpt, and goes on from
before.ckpt.
"""

import os
import pickle
import shutil
import zipfile
from collections import OrderedDict, defaultdict
from collections.abc import Callable
from dataclasses import asdict, is_dataclass
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.plugins.io.wrapper import _WrappingCheckpointIO
from lightning_utilities.core.apply_func import apply_to_collection
from torch import Tensor

from datamodules.disk import sync_directory
from datamodules.placed import lost_process

LAST, BEFORE, BEST = "last.ckpt", "before.ckpt", "best.ckpt"
PRIMITIVES = (bool, int, float, str, bytes, type(None))


def not_primitive(value: Any, path: str = "checkpoint") -> str | None:
    """Where `value` holds something else than tensors, primitives and containers of them."""
    if type(value) in PRIMITIVES or isinstance(value, Tensor):
        return None
    if type(value) in (dict, OrderedDict, defaultdict):
        parts = [(f"{path}[{key!r}]", part) for key, part in value.items()]
    elif type(value) in (list, tuple, set):
        parts = [(f"{path}[{i}]", part) for i, part in enumerate(value)]
    else:
        return f"{path} is a {type(value).__module__}.{type(value).__qualname__}"
    return next((found for name, part in parts if (found := not_primitive(part, name))), None)


def primitive_hyper_parameters(given: dict[str, Any]) -> dict[str, Any]:
    """Hyper-parameters as primitives; dataclasses as dicts, without what has no such form.

    A method built by the command line has only primitives. One built in Python was given
    modules, and whoever loads its checkpoint gives them again.
    """
    plain = {
        name: asdict(value) if is_dataclass(value) and not isinstance(value, type) else value
        for name, value in given.items()
    }
    return {name: value for name, value in plain.items() if not_primitive(value) is None}


def read_checkpoint(
    path: str | Path, map_location: Any = "cpu", mmap: bool = False
) -> dict[str, Any]:
    """Load a checkpoint of tensors and primitives; nothing in the file is run.

    Args:
        path: of the file.
        map_location: where its tensors go.
        mmap: read of a tensor only what is used of it.

    Raises:
        FileNotFoundError: no such file.
        ValueError: the file is truncated, no checkpoint, or holds pickled objects.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"there is no checkpoint at {path}")
    if not zipfile.is_zipfile(path):
        raise ValueError(
            f"refused {path}: it is truncated or not a checkpoint of torch.save; use an earlier "
            f"checkpoint, or re-save an old-style file with a current torch"
        )
    try:
        loaded = torch.load(path, map_location, weights_only=True, mmap=mmap)
    except pickle.UnpicklingError as error:
        raise ValueError(
            f"refused {path}: it holds pickled Python objects, which could run code when loaded, "
            f"and nothing of it was. Patchlight loads tensors and primitives only: have its "
            f"author save a state dict. ({first_line(error)})"
        ) from error
    except (RuntimeError, EOFError, KeyError) as error:
        raise ValueError(f"refused {path}: it is damaged ({first_line(error)})") from error
    if not isinstance(loaded, dict):
        raise ValueError(f"refused {path}: expected a dict, found a {type(loaded).__name__}")
    return loaded


def first_line(error: Exception) -> str:
    """What was wrong, without torch's advice on switching the check off."""
    for line in str(error).splitlines():
        if "Unsupported" in line or "GLOBAL" in line:
            return line.strip().split(". ")[0]
    return str(error).splitlines()[0] if str(error) else type(error).__name__


class AtomicCheckpointIO(_WrappingCheckpointIO):
    """Writes a checkpoint beside its place, syncs it to the disk, then renames it.

    A `last.ckpt` that is there becomes `before.ckpt`. It wraps nothing; Lightning's strategy for
    TPUs takes no others than wrapping ones.

    Raises:
        ValueError: the disk is full or refuses, or a process that loads data ended meanwhile; what
            was saved before can still be loaded.
    """

    def save_checkpoint(
        self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any | None = None
    ) -> None:
        path = Path(path)
        if "hyper_parameters" in checkpoint:
            hparams = primitive_hyper_parameters(checkpoint["hyper_parameters"])
            checkpoint = {**checkpoint, "hyper_parameters": hparams}
        if (found := not_primitive(checkpoint)) is not None:
            raise ValueError(f"{found}; a checkpoint holds tensors and primitives only")
        checkpoint = apply_to_collection(checkpoint, Tensor, off_xla)
        try:
            write(checkpoint, path)
        except (OSError, RuntimeError) as error:  # torch's own writer raises the latter
            if (lost := lost_process(error)) is not None:
                raise ValueError(lost) from error
            disk = next(above for above in path.absolute().parents if above.is_dir())
            raise ValueError(
                f"{path} could not be written ({first_line(error)}; "
                f"{shutil.disk_usage(disk).free / 2**20:,.0f} MiB are free); what was saved before "
                f"can still be loaded. Make room, then go on with `patchlight fit --resume RUN`"
            ) from error

    def load_checkpoint(
        self,
        path: str | Path,
        map_location: Callable[..., Any] | None = None,
        weights_only: bool | None = None,
    ) -> dict[str, Any]:
        return read_checkpoint(path, map_location=map_location or "cpu")

    def remove_checkpoint(self, path: str | Path) -> None:
        Path(path).unlink(missing_ok=True)


def off_xla(tensor: Tensor) -> Tensor:
    """On the CPU, where it is on a TPU, whose tensors only torch_xla can read."""
    return tensor.cpu() if tensor.device.type == "xla" else tensor


def write(checkpoint: dict[str, Any], path: Path) -> None:
    """At any moment the file of before has its name, or a `last.ckpt` that of `before.ckpt`."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("wb") as file:
            torch.save(checkpoint, file)
            file.flush()
            os.fsync(file.fileno())
        if path.name == LAST and path.is_file():
            path.replace(path.with_name(BEFORE))
        temporary.replace(path)
        sync_directory(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


def newest(checkpoints: Path) -> Path | None:
    """What a run goes on from; None before its first checkpoint."""
    return next((path for name in (LAST, BEFORE) if (path := checkpoints / name).is_file()), None)
