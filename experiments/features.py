"""Frozen features of a data set, computed once and kept.

They lie in the cache under a key of everything they are a function of: the network with its
weights, the images, and what is done to these. Asking again, also for another protocol, reads
them from there.
"""

import hashlib
import json
import shutil
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from rich.console import Console
from torch import Tensor

from datamodules.disk import cache_directory, using
from datamodules.module import SourceDataModule
from datamodules.progress import Bar
from datamodules.sources import Source, Split
from experiments.subject import Subject

VERSION = 2  # of what is computed from the same network and images
NO_INFLUENCE = ("batch_size", "num_workers", "max_bad", "repeats")


class Frozen(NamedTuple):
    """Features of the images of one split that could be read, in the source's order.

    features: [n, d] float32, mapped from a file
    labels:   [n] class ids
    """

    features: Tensor
    labels: Tensor


def frozen_features(
    subject: Subject,
    data: SourceDataModule,
    section: dict[str, Any],
    split: Split,
    count: int | None,
    device: torch.device,
) -> Frozen:
    """The pooled features of a split, or of `count` of its images, from the cache if there.

    Args:
        data: set up, and fitted to the backbone.
        section: the arguments it was made of.
    """
    source = data.some(split, count)
    directory = cache_directory("features") / key_of(subject, source, section, split)
    if not (directory / "features.npy").is_file():
        compute(subject, data, source, directory, device, split)
    features = np.load(directory / "features.npy", mmap_mode="c")
    return Frozen(torch.from_numpy(features), torch.from_numpy(np.load(directory / "labels.npy")))


def key_of(subject: Subject, source: Source, section: dict[str, Any], split: Split) -> str:
    digest = hashlib.sha256()
    options = dict(section.get("init_args", {}))
    for name in NO_INFLUENCE:
        options.pop(name, None)
    about = {"version": VERSION, "network": subject.fingerprint, "split": split}
    about |= {"data": section["class_path"], "options": options, "images": len(source)}
    digest.update(json.dumps(about, sort_keys=True, default=str).encode())
    for i in range(len(source)):
        # A path for files: one that was replaced under its own name is another image.
        name = source.describe(i)
        digest.update(name.encode("utf-8", "surrogateescape"))
        try:
            status = Path(name).stat()
        except OSError:
            continue
        digest.update(f"{status.st_size} {status.st_mtime_ns}".encode())
    return digest.hexdigest()[:32]


def compute(
    subject: Subject,
    data: SourceDataModule,
    source: Source,
    directory: Path,
    device: torch.device,
    split: Split,
) -> None:
    """Embed every image; the directory appears complete or not at all."""
    with using(directory.parent):
        directory.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(dir=directory.parent, prefix="."))
    network = subject.backbone.to(device)
    console = Console(stderr=True, highlight=False)
    try:
        shape = (len(source), subject.backbone.embed_dim)
        rows = np.lib.format.open_memmap(temporary / "all.npy", "w+", np.float32, shape)
        labels, order = np.zeros(len(source), np.int64), np.full(len(source), -1)
        done = 0
        with torch.inference_mode(), Bar(f"features of {split}", len(source)) as bar:
            for batch in data.eval_batches(source, device):
                found = network(batch.images).pooled[batch.is_valid].float().cpu().numpy()
                if not np.isfinite(found).all():
                    raise ValueError(
                        f"{subject.title} gives features that are infinite or no number"
                    )
                end = done + len(found)
                rows[done:end] = found
                labels[done:end] = batch.labels[batch.is_valid].cpu().numpy()
                order[done:end] = batch.indices[batch.is_valid].cpu().numpy()
                done = end
                bar.advance(len(found))
        if done == 0:
            raise ValueError(f"none of the {len(source)} images of {split} could be read")
        if done < len(source):
            console.print(f"{len(source) - done} images of {split} could not be read: left out")
        place = np.argsort(order[:done], kind="stable")
        np.save(temporary / "labels.npy", labels[:done][place])
        if np.array_equal(place, np.arange(len(source))):
            rows.flush()
            (temporary / "all.npy").rename(temporary / "features.npy")
        else:  # packs come in another order
            np.save(temporary / "features.npy", rows[:done][place])
            (temporary / "all.npy").unlink()
        del rows
        try:
            temporary.rename(directory)
        except OSError:  # another process was as quick
            if not (directory / "features.npy").is_file():
                raise
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
