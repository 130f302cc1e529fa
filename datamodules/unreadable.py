"""Images that could not be read: counted, reported, and too many of them stop the run."""

from collections.abc import Sequence
from pathlib import Path

from lightning.pytorch.utilities import rank_zero_warn

from datamodules.sampling import fold
from datamodules.sources import BadImageError, Example, Source


def read_example(source: Source, item: int) -> tuple[Example, bool]:
    """The example `item`, or the first readable one of a sequence fixed by it, and whether.

    Raises:
        ValueError: twenty in a row cannot be read.
    """
    example, index = read_item(source, item)
    return example, index != item


def read_item(source: Source, item: int) -> tuple[Example, int]:
    """The same, and which one it is.

    Raises:
        ValueError: twenty in a row cannot be read.
    """
    index = item
    for attempt in range(20):  # the one that replaces it may be bad as well
        try:
            return source[index], index
        except BadImageError as error:
            last = error
            index = fold(item, attempt) % len(source)
    raise ValueError(
        f"20 images in a row could not be read, the last {last.description} "
        f"({last.reason}); run `patchlight check-data` on the folder"
    )


class Unreadable:
    """The distinct unreadable images of one split that a run has met, by name."""

    def __init__(self) -> None:
        self.names: list[str] = []

    def add(self, names: Sequence[str], limit: float, directory: str | None, rank: int) -> None:
        """Note images; write new ones to `unreadable-RANK.txt` in `directory`.

        Raises:
            ValueError: there are now more than `limit` of them.
        """
        new = [name for name in dict.fromkeys(names) if name not in self.names]
        if not new:
            return
        self.names += new
        rank_zero_warn(
            f"{new[0]} could not be read; another image takes its place "
            f"({len(self.names)} unreadable so far)"
        )
        if directory is not None:
            Path(directory).mkdir(parents=True, exist_ok=True)
            path = Path(directory) / f"unreadable-{rank}.txt"
            with path.open("a", encoding="utf-8", errors="surrogateescape") as file:
                file.writelines(f"{name}\n" for name in new)
        if len(self.names) > limit:
            raise ValueError(
                f"{len(self.names)} images could not be read, more than data.max_bad allows "
                f"({limit:g}); the last is {new[-1]}. `patchlight check-data` lists them all"
            )
