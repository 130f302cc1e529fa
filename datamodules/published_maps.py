"""Label maps of LV-ViT and ReLabel: a `.pt` file for every image.

`<directory>/<class>/<name of the image>.pt` holds a float16 tensor [2, 5, rows, columns]: the five
highest scores before softmax, and their class ids, exact up to 2048 ("Token Labeling", its
`generate_label.py`; "Re-labeling ImageNet", Yun et al. 2021). Files are read without executing
anything in them.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from datamodules.label_shards import (
    About,
    Labelled,
    begin,
    is_whole,
    name_of,
    stamp_of,
    write_shard,
)
from datamodules.progress import Bar
from datamodules.sources import Source

EXACT = 2048  # the largest class id of which half precision knows the neighbours


def read_published(path: Path, num_classes: int, top_k: int | None = None) -> tuple[Tensor, Tensor]:
    """Scores [rows, columns, k] and class ids of one file; of any k where `top_k` is None.

    Raises:
        ValueError: a file that is missing, refused, damaged or of other classes; names it.
    """
    if not path.is_file():
        raise ValueError(
            f"there is no label map {path}; expected one for every training image, as "
            f"<directory>/<class>/<name of the image>.pt"
        )
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a broken or hostile file can fail anywhere in the unpickler
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise ValueError(
            f"{path} was refused and nothing of it was run: it is no tensor ({reason}); fetch it "
            f"again"
        ) from error
    if (what := problem(content, top_k)) is not None:
        k = "k" if top_k is None else top_k
        raise ValueError(
            f"{path} holds {what}; expected a tensor [2, {k}, rows, columns] of scores and classes"
        )
    scores, ids = content.movedim(1, -1).unbind(0)
    scores, ids = scores.half(), ids.float()
    is_class = (ids == ids.round()) & (ids >= 0) & (ids < num_classes)
    if not bool(is_class.all()) or not bool(scores.isfinite().all()):
        raise ValueError(
            f"{path} has scores that are no numbers of half precision, or classes outside 0 to "
            f"{num_classes - 1}; set --num-classes to those of its teacher, or fetch it again"
        )
    ordered = ids.sort(dim=-1).values
    if bool((ordered[..., 1:] == ordered[..., :-1]).any()):
        raise ValueError(f"{path} has a class twice in a cell; expected each once, fetch it again")
    return scores, ids.int()


def problem(content: Any, top_k: int | None) -> str | None:
    """What a file holds in the place of a map; None where it is one."""
    if not isinstance(content, Tensor):
        return type(content).__name__
    is_plain = content.layout == torch.strided and content.device.type == "cpu"
    if not is_plain or not content.is_floating_point():
        return f"{content.dtype} {content.layout} on {content.device}"
    is_map = content.ndim == 4 and content.shape[0] == 2 and content.numel() > 0
    if not is_map or (top_k is not None and content.shape[1] != top_k):
        return str(list(content.shape))
    if content.untyped_storage().nbytes() < content.nbytes:
        return f"{list(content.shape)}, of which most is not in the file"
    return None


def import_published(
    directory: Path,
    out: Path,
    source: Source,
    root: str | None,
    num_classes: int,
    shard_size: int,
) -> None:
    """Write the published maps of the images of a source as shards; goes on where it was stopped.

    Raises:
        ValueError: more classes than half precision tells apart, or as `read_published`.
    """
    if num_classes > EXACT + 1:
        raise ValueError(
            f"--num-classes is {num_classes}, but ids above {EXACT} are not exact in published "
            f"maps; make the maps with a teacher instead"
        )

    def file_of(index: int) -> Path:
        image = Path(source.describe(index))
        return directory / image.parent.name / f"{image.stem}.pt"

    def read(index: int, is_first: bool) -> Labelled:
        stamp = stamp_of(source, index, is_first)
        scores, ids = read_published(file_of(index), num_classes, top_k)
        return Labelled(name_of(source, index, root), stamp, scores, ids, None)

    top_k = read_published(file_of(0), num_classes)[0].shape[-1]
    about = About(f"imported from {directory}", num_classes, top_k, remainder=False)
    begin(out, about)
    with Bar("importing label maps", len(source)) as bar:
        for number, rows in enumerate(pieces(len(source), shard_size)):
            if not is_whole(number, rows, out, about, source, root):
                maps = [read(index, index == rows.start) for index in rows]
                write_shard(out, about, number, maps)
            bar.advance(len(rows))


def pieces(length: int, size: int) -> Iterator[range]:
    for start in range(0, length, size):
        yield range(start, min(start + size, length))
