"""Where images come from: one interface, and `open_source` to find them by name.

digits              scikit-learn's handwritten digits, embedded
shapes              procedural scenes with a mask, embedded (`datamodules.shapes`)
folder              a directory tree or a list file (`datamodules.folder`)
shards              tar files in a directory or behind a URL (`datamodules.shards`)
torchvision:NAME    any classification data set of torchvision (`datamodules.of_torchvision`)
"""

import difflib
import inspect
from collections.abc import Callable
from typing import Any, Literal, NamedTuple, Protocol, runtime_checkable

import numpy as np
from PIL import Image

from datamodules.sampling import Groups, epoch_order, grouped_order

Split = Literal["train", "val"]


class Example(NamedTuple):
    """One image as it is stored, before any augmentation.

    image: uint8 [h, w, c]
    label: class id, -1 where there is none
    mask:  bool [h, w], True on the object, where the source knows it
    """

    image: np.ndarray
    label: int
    mask: np.ndarray | None = None


class BadImageError(Exception):
    """An image that cannot be read: which, and why."""

    def __init__(self, description: str, reason: str) -> None:
        super().__init__(description, reason)
        self.description, self.reason = description, reason


@runtime_checkable  # the shape checks of the tests ask isinstance
class Source(Protocol):
    """Images by index, the same image for the same index in every process.

    class_names: names by class id; empty where there are no labels
    channels:    c of its images
    """

    class_names: tuple[str, ...]
    channels: int

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Example:
        """The example at `index`; raises `BadImageError` where it cannot be read."""
        ...

    def size(self, index: int) -> tuple[int, int]:
        """(height, width) in pixels of the image at `index`, without decoding where possible.

        Raises `BadImageError` where not even that can be read; an image with a size can still
        turn out to be damaged.
        """
        ...

    def describe(self, index: int) -> str:
        """A name for people: a path, or "digits[12]"."""
        ...


@runtime_checkable
class Grouped(Source, Protocol):
    """A source whose images lie in files of many, some of which are fetched from afar.

    Training takes its images in an order that needs few of those files at a time.
    """

    groups: Groups

    def prefetch(self, items: np.ndarray) -> None:
        """Have at hand what these images lie in: they will be asked for, in this order."""
        ...


class Subset:
    """Some of the images of a source, in the order of `rows`."""

    def __init__(self, source: Source, rows: np.ndarray) -> None:
        self.source, self.rows = source, rows
        self.class_names, self.channels = source.class_names, source.channels

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> Example:
        return self.source[int(self.rows[index])]

    def size(self, index: int) -> tuple[int, int]:
        return self.source.size(int(self.rows[index]))

    def describe(self, index: int) -> str:
        return self.source.describe(int(self.rows[index]))


class GroupedSubset(Subset):
    """Some of the images of a source whose images lie in files of many; `rows` ascend."""

    def __init__(self, source: Grouped, rows: np.ndarray) -> None:
        super().__init__(source, rows)
        self.grouped = source
        starts = np.unique(np.searchsorted(rows, source.groups.starts))  # none without images
        self.groups = source.groups._replace(starts=starts)

    def prefetch(self, items: np.ndarray) -> None:
        self.grouped.prefetch(self.rows[items])


def to_array(image: Image.Image) -> np.ndarray:
    """uint8 [h, w] of a grey image, [h, w, 3] of any other.

    Transparency is put on white; deep grey is taken for 16 bits, whatever its values.

    Raises:
        ValueError: floating-point pixels.
    """
    if image.mode.startswith("I"):
        # Never by the largest value: a dark image would be scaled unlike its neighbours.
        deep = np.asarray(image).astype(np.int64).clip(0, 65535)
        return np.round(deep / 257).astype(np.uint8)
    refuse_floats(image)
    is_grey = image.mode in ("1", "L", "LA", "La")
    if image.mode in ("RGBA", "RGBa", "LA", "La", "PA") or "transparency" in image.info:
        white = Image.new("RGBA", image.size, "white")
        image = Image.alpha_composite(white, image.convert("RGBA"))
    return np.asarray(image.convert("L" if is_grey else "RGB"))


def refuse_floats(image: Image.Image) -> None:
    if image.mode == "F":
        raise ValueError("floating-point pixels have no known range")


def with_channels(image: np.ndarray, channels: int) -> np.ndarray:
    """A uint8 [h, w] or [h, w, 1 or 3] image with `channels` of 1 (ITU-R 601 luma) or 3."""
    if image.ndim == 2:
        image = image[:, :, None]
    if image.shape[2] == channels:
        return image
    if image.shape[2] == 1 and channels == 3:
        return np.repeat(image, 3, axis=2)
    if image.shape[2] == 3 and channels == 1:
        luma = image @ np.array([0.299, 0.587, 0.114])
        grey: np.ndarray = np.round(luma).astype(np.uint8)[:, :, None]
        return grey
    raise ValueError(
        f"an image has {image.shape[2]} channels, but channels is {channels}; expected 1 or 3"
    )


class Digits:
    """The 1,797 digits of scikit-learn, 8 x 8; a fixed fifth of each class is held out.

    Alpaydin and Kaynak, "Optical Recognition of Handwritten Digits" (UCI, 1998).
    """

    class_names = tuple("0123456789")

    def __init__(self, split: Split, root: str | None, channels: int) -> None:
        from sklearn.datasets import load_digits
        from sklearn.model_selection import train_test_split

        refuse_root("digits", root)
        images, labels = load_digits(return_X_y=True)
        every = np.arange(len(labels))
        train, val = train_test_split(every, test_size=0.2, random_state=0, stratify=labels)
        self.indices = np.sort(train if split == "train" else val)
        pixels = np.round(images[self.indices] * (255 / 16)).astype(np.uint8)
        self.images, self.labels = pixels.reshape(-1, 8, 8), labels[self.indices]
        self.channels = channels

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> Example:
        return Example(with_channels(self.images[index], self.channels), int(self.labels[index]))

    def size(self, index: int) -> tuple[int, int]:
        height, width = self.images[index].shape
        return height, width

    def describe(self, index: int) -> str:
        return f"digits[{self.indices[index]}]"


def refuse_root(name: str, root: str | None) -> None:
    if root is not None:
        raise ValueError(f"data.root is {root!r}, but {name} is embedded and has no files")


def open_source(
    name: str, split: Split, root: str | None = None, channels: int = 3, **options: Any
) -> Source:
    """The training or the held-out part of a source, with images of 1 or 3 channels.

    Every source has the option `num_train`: so many of its training images, always the same. The
    embedded `shapes` makes as many; of others they are drawn at random.

    Raises:
        ValueError: an unknown source or option, or data that is not there.
    """
    from datamodules.folder import Folder
    from datamodules.of_torchvision import TorchvisionSource
    from datamodules.shapes import Shapes
    from datamodules.shards import Shards

    kinds: dict[str, Callable[..., Source]]
    kinds = {"digits": Digits, "shapes": Shapes, "folder": Folder, "shards": Shards}
    kind, _, dataset = name.partition(":")
    if kind == "torchvision" and dataset:
        make: Callable[..., Source] = TorchvisionSource
        options["name"] = dataset
    elif name in kinds:
        make = kinds[name]
    else:
        known = ", ".join([*kinds, "torchvision:NAME"])
        close = difflib.get_close_matches(name, kinds, n=1)
        hint = f"; did you mean {close[0]}?" if close else ""
        raise ValueError(f"unknown data.source {name!r}; known: {known}{hint}")
    accepted = set(inspect.signature(make).parameters) - {"split", "root", "channels"}
    count = None if "num_train" in accepted else options.pop("num_train", None)
    for option in options:
        if option not in accepted:
            takes = ", ".join(sorted(accepted - {"name"} | {"num_train"}))
            raise ValueError(f"source {name!r} has no option {option!r}; it takes: {takes}")
    source = make(split=split, root=root, channels=channels, **options)
    return source if count is None or split != "train" else some_of(source, count)


def some_of(source: Source, count: int) -> Subset:
    """So many images, always the same ones; of a source in large files those of a few files.

    Raises:
        ValueError: none, or more than there are.
    """
    if not isinstance(count, int) or not 1 <= count <= len(source):
        raise ValueError(f"num_train is {count}; expected 1 to {len(source)}, which there are")
    if not isinstance(source, Grouped):
        return Subset(source, np.sort(epoch_order(len(source), 0, 0)[:count]))
    rows = np.sort(grouped_order(source.groups._replace(together=1), 0, 0)[:count])
    return GroupedSubset(source, rows)
