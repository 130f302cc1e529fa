"""How large every image of a source is, before any of them is decoded."""

import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress

import numpy as np

from datamodules.disk import save_whole, using
from datamodules.folder import Folder, read_size
from datamodules.index import Index
from datamodules.progress import Bar
from datamodules.shards import Shards
from datamodules.sources import BadImageError, Source, Subset

CHUNK = 64  # images a thread reads before it reports
SLOW = 0.0005  # seconds a file takes, from which on threads help
Sizes = list[tuple[int, int]]


def measure(source: Source, threads: int = 8, retry: bool = False) -> np.ndarray:
    """The size of every image of a source: int32 [n, 2], (height, width) in pixels, read-only.

    An image that cannot be read has the size (0, 0).

    The sizes of a folder are kept beside its index, for all images of its tree, so that a
    training and a held-out part that share one read it once. Every process that finds them there
    gets the same ones, whatever happens to the files: in a distributed run one process asks first
    (`prepare_data`), the others then map what it wrote (`setup`). They are true as long as the
    index is, but a file that is replaced under its own name changes no directory: a plan that is
    made of these sizes has to bear an image of another size. Shards know their sizes. Other sources
    are measured each time.

    Args:
        threads: how many read the headers of a folder at once where each takes long, which hides
            the delay of a network disk.
        retry: read again what could not be read before, as it may have been repaired. For one
            process only, before the others ask: they must not come to different answers.
    """
    if isinstance(source, Subset):
        return frozen(measure(source.source, threads, retry)[source.rows])
    if isinstance(source, Shards):
        return frozen(source.sizes())
    if not isinstance(source, Folder):
        return frozen(read_sizes(source.size, np.arange(len(source)), 1))
    sizes = tree_sizes(source.index, threads, retry)
    return sizes if len(source) == len(sizes) else frozen(sizes[source.rows])


def frozen(sizes: np.ndarray) -> np.ndarray:
    """What is mapped from a file cannot be written to, so nothing else can."""
    sizes.flags.writeable = False
    return sizes


def tree_sizes(index: Index, threads: int, retry: bool) -> np.ndarray:
    """int32 [n, 2], the sizes of all images of an index, mapped where they are known."""
    file = index.arrays / "sizes.npy"
    sizes = np.zeros((len(index), 2), np.int32)
    rows = np.arange(len(index))
    with suppress(FileNotFoundError):
        known: np.ndarray = np.load(file, mmap_mode="r")
        rows = np.flatnonzero(known[:, 0] == 0) if retry else rows[:0]
        if len(rows) == 0:
            return known
        sizes[:] = known
    before = sizes[rows]
    sizes[rows] = read_sizes(lambda row: read_size(index.path(row)), rows, threads)
    if file.exists() and np.array_equal(sizes[rows], before):
        return frozen(sizes)  # still unreadable
    # The index may be renewed meanwhile, and its directory removed.
    with using(file.parent), suppress(FileNotFoundError):
        save_whole(file, sizes)
        mapped: np.ndarray = np.load(file, mmap_mode="r")
        return mapped
    return frozen(sizes)


def read_sizes(
    size: Callable[[int], tuple[int, int]], rows: np.ndarray, threads: int
) -> np.ndarray:
    """int32 [rows, 2] of what `size` says of each row; (0, 0) where it raises `BadImageError`."""

    def read(chunk: np.ndarray) -> Sizes:
        return [size_or_none(size, row) for row in chunk.tolist()]

    sizes, done = np.zeros((len(rows), 2), np.int32), 0
    chunks = np.split(rows, range(CHUNK, len(rows), CHUNK))
    pool = ThreadPoolExecutor(threads) if threads > 1 else None
    try:
        with Bar("sizes of images", len(rows)) as bar:
            for found in in_order(read, chunks, pool):
                sizes[done : done + len(found)] = found
                done += len(found)
                bar.advance(len(found))
    finally:
        if pool is not None:  # an interrupt does not wait for a million images
            pool.shutdown(cancel_futures=True)
    return sizes


def in_order(
    read: Callable[[np.ndarray], Sizes], chunks: list[np.ndarray], pool: ThreadPoolExecutor | None
) -> Iterator[Sizes]:
    """`read` of every chunk; in threads from where one proves slow.

    On a local disk threads only wait for each other: reading a header is mostly Python.
    """
    for number, chunk in enumerate(chunks, start=1):
        started = time.monotonic()
        sizes = read(chunk)
        is_slow = time.monotonic() - started > SLOW * len(chunk)
        yield sizes
        if pool is not None and is_slow:
            yield from pool.map(read, chunks[number:])
            return


def size_or_none(size: Callable[[int], tuple[int, int]], row: int) -> tuple[int, int]:
    try:
        return size(row)
    except BadImageError:
        return 0, 0
