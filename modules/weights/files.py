"""What is in a checkpoint file: its networks and their tensors, read without running anything."""

import argparse
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import safetensors
import safetensors.torch
import torch
from torch import Tensor

State = dict[str, Tensor]

# What wrappers put before the names of a network.
PREFIXES = ("module.", "_orig_mod.", "backbone.", "model.", "encoder.")


def read(path: str | Path) -> dict[str, State]:
    """The networks of a checkpoint: name of the part, then its tensors.

    A file that holds a bare state dict, a safetensors or an npz file has one part, "weights".
    A checkpoint of this project has one for each network of its method.

    Raises:
        ValueError: no such file, no checkpoint, or one that would have to run code to be read.
    """
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"{path}: no such file")
    if path.suffix == ".safetensors":
        try:
            return {"weights": without_prefixes(safetensors.torch.load_file(path))}
        except safetensors.SafetensorError as error:
            raise ValueError(f"{path} is no safetensors file ({error})") from error
    if path.suffix == ".npz":
        return {"weights": {name: torch.from_numpy(a) for name, a in read_npz(path).items()}}
    try:
        # DeiT, MAE and DINO keep their command line beside the weights; it is plain data.
        with torch.serialization.safe_globals([argparse.Namespace]):
            payload = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a broken or hostile file can fail anywhere in the unpickler
        raise ValueError(
            f"{path} was refused and nothing of it was run: it is no file of tensors and "
            f"primitives ({first_line(error)}); save its state dict as safetensors where it is "
            f"trusted"
        ) from error
    return parts_of(payload, path)


def first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def read_npz(path: Path) -> dict[str, np.ndarray]:
    """Arrays of an npz file by name; bfloat16, which numpy calls void, becomes float32.

    Raises:
        ValueError: pickled objects, or no npz file.
    """
    arrays = {}
    try:
        with np.load(path, allow_pickle=False) as file:
            for name in file.files:
                array = file[name]
                if array.dtype.kind == "V" and array.dtype.itemsize == 2:
                    array = (array.view(np.uint16).astype(np.uint32) << 16).view(np.float32)
                arrays[name] = array
    except Exception as error:
        raise ValueError(
            f"{path} was refused and nothing of it was run: it is no npz file of plain arrays "
            f"({first_line(error)})"
        ) from error
    return arrays


def parts_of(payload: Any, path: Path) -> dict[str, State]:
    """The networks of an unpickled checkpoint."""
    if not isinstance(payload, Mapping):
        raise ValueError(f"{path} holds a {type(payload).__name__}, not a checkpoint")
    found = {str(name): tensors_of(value) for name, value in payload.items()}
    found = {name: state for name, state in found.items() if len(state) > 1}
    if "pytorch-lightning_version" in payload:
        found = split_method(found.get("state_dict", {}))
    if not found:
        found = {"weights": tensors_of(payload)}
    parts = {name: without_prefixes(state) for name, state in found.items()}
    if not any(parts.values()):
        raise ValueError(f"{path} holds no tensors; it has {', '.join(map(str, payload))}")
    return parts


def tensors_of(value: Any) -> State:
    if not isinstance(value, Mapping):
        return {}
    return {str(name): t for name, t in value.items() if isinstance(t, Tensor)}


def split_method(state: State) -> dict[str, State]:
    """One part for each network of a method: `classifier.head.bias` is in part `classifier`."""
    parts: dict[str, State] = {}
    for name, tensor in state.items():
        part, _, rest = name.partition(".")
        parts.setdefault(part, {})[rest] = tensor
    if any("" in part for part in parts.values()):  # a network by itself, of other code
        return {"state_dict": state}
    return parts


def without_prefixes(state: State) -> State:
    """Names without what wrappers put before them: `module.backbone.cls_token`."""
    renamed = {}
    for name, tensor in state.items():
        while prefix := next((p for p in PREFIXES if name.startswith(p)), None):
            name = name.removeprefix(prefix)
        if name in renamed:
            raise ValueError(f"the file has {name} twice, with and without a prefix")
        renamed[name] = tensor
    return renamed
