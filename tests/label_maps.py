"""Label maps for tests, made without a teacher."""

from pathlib import Path

import torch
from torch import Tensor

from datamodules.label_shards import About, Labelled, begin, name_of, stamp_of, write_shard
from datamodules.sources import Source


def labelled(
    source: Source,
    index: int,
    root: str | None,
    about: About,
    grid: tuple[int, int],
    is_first: bool = False,
) -> Labelled:
    """A map whose every cell is sure of the image's class; the others are drawn by its index."""
    generator = torch.Generator().manual_seed(index)
    scores = torch.rand(*grid, about.num_classes, generator=generator)
    scores[..., max(source[index].label, 0)] += 8
    best = scores.topk(about.top_k, dim=-1)
    left = scores.scatter(-1, best.indices, -torch.inf)
    remainder: Tensor | None = left.logsumexp(-1) if about.remainder else None
    name, stamp = name_of(source, index, root), stamp_of(source, index, is_first)
    return Labelled(name, stamp, best.values, best.indices, remainder)


def write_maps(
    directory: Path,
    source: Source,
    root: str | None = None,
    num_classes: int = 10,
    top_k: int = 3,
    grid: tuple[int, int] = (4, 4),
    shard_size: int = 5,
    remainder: bool = False,
) -> None:
    """Maps of all images of a source, in small shards."""
    about = About("a test", num_classes, top_k, remainder)
    begin(directory, about)
    for number, start in enumerate(range(0, len(source), shard_size)):
        rows = range(start, min(start + shard_size, len(source)))
        maps = [labelled(source, i, root, about, grid) for i in rows]
        write_shard(directory, about, number, maps)
