"""The label maps of a source's images, out of the shards of a directory (`label_shards`)."""

from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from datamodules.label_geometry import LabelMap
from datamodules.label_shards import SHARDS, About, Rest, Shard, name_of, read_about, stamp_of
from datamodules.progress import Bar
from datamodules.sources import Source


def shards_in(directory: Path, about: About) -> Iterator[Shard]:
    for path in sorted(directory.glob(SHARDS)):
        yield Shard(path, about)


class LabelMaps:
    """The maps of the images of a source.

    Args:
        directory: where they are.
        source, root: the images; every one of them needs a map.
        check_dates: refuse maps of images whose file was changed after they were made.

    Raises:
        ValueError: a missing map, one older than its image or of another one, a damaged file;
            names it.
    """

    def __init__(
        self, directory: Path, source: Source, root: str | None, check_dates: bool = True
    ) -> None:
        self.directory, self.about = directory, read_about(directory)
        self.shards = list(shards_in(directory, self.about))
        sizes = [len(shard) for shard in self.shards]
        self.firsts = np.concatenate(([0], np.cumsum(sizes, dtype=np.int64)))
        names = [name for shard in self.shards for name in shard.names]
        known = {name: place for place, name in enumerate(names)}
        wanted = [name_of(source, index, root) for index in range(len(source))]
        self.check_once(names, wanted)
        self.places = np.empty(len(source), dtype=np.int64)
        for index, name in enumerate(wanted):
            place = known.get(name)
            if place is None:
                raise ValueError(
                    f"{directory} has no label map of {name}; run `patchlight relabel` with the "
                    f"same data and --out {directory}, which makes what is missing"
                )
            self.places[index] = place
            shard, row = self.find(index)
            if (stamp := shard.stamps[row]) < -1 and stamp != stamp_of(source, index, True):
                raise ValueError(
                    f"{source.describe(index)} is not the image that its label map in "
                    f"{shard.path} was made of; run `patchlight relabel` with the options of "
                    f"the data here (--source-args) and another --out"
                )
            if check_dates and stamp_of(source, index) > shard.stamps[row] >= 0:
                raise ValueError(
                    f"{source.describe(index)} was changed after its label map in {shard.path} was "
                    f"made; run `patchlight relabel` again, which renews such maps, or set "
                    f"data.init_args.check_dates to false where only the dates changed"
                )

    def check_once(self, names: Sequence[str], wanted: Sequence[str]) -> None:
        """No image has two maps; but a list may have an image twice, and then so have its maps."""
        if len(set(names)) == len(names):
            return
        images = Counter(wanted)
        for name, count in Counter(names).items():
            if count > max(1, images[name]):
                where = [str(shard.path) for shard in self.shards if name in shard.names]
                raise ValueError(
                    f"{name} has {count} label maps, in {', '.join(where)}; run `patchlight "
                    f"relabel` to its end, which removes what an earlier run left, or name "
                    f"another --out"
                )

    def find(self, index: int) -> tuple[Shard, int]:
        place = int(self.places[index])
        number = int(np.searchsorted(self.firsts, place, side="right")) - 1
        return self.shards[number], place - int(self.firsts[number])

    def read(self, index: int, rest: Rest) -> LabelMap:
        """The map of the image at `index`; without cells where it could not be read."""
        shard, row = self.find(index)
        return shard.read(row, rest)

    def largest(self) -> tuple[int, int]:
        """Most rows and most columns of a map."""
        rows, columns = np.max([shard.grids.max(axis=0) for shard in self.shards], axis=0)
        return int(rows), int(columns)

    def check_values(self) -> None:
        """Read everything once; see `Shard.check_values`."""
        with Bar("checking label maps", len(self.shards)) as bar:
            for shard in self.shards:
                shard.check_values()
                bar.advance()
