"""The classification data sets of torchvision."""

import copy
import difflib
import inspect
from typing import Any

import numpy as np
from PIL import Image

from datamodules.sources import BadImageError, Example, Split, to_array, with_channels


class TorchvisionSource:
    """A classification data set of torchvision; its test (or val) split is held out.

    Args:
        name: class name in `torchvision.datasets`.
        download: fetch it into `root` where it is not there yet.

    Raises:
        ValueError: no such data set, one without the two splits, or files that are not there.
    """

    def __init__(
        self, name: str, split: Split, root: str | None, channels: int, download: bool = False
    ) -> None:
        from torchvision import datasets

        if not inspect.isclass(getattr(datasets, name, None)):
            close = difflib.get_close_matches(name, datasets.__all__, n=3)
            raise ValueError(
                f"torchvision has no data set {name!r}; did you mean {', '.join(close) or '...'}?"
            )
        if root is None:
            raise ValueError(f"torchvision:{name} needs data.root, where its files are or shall go")
        kind = getattr(datasets, name)
        arguments: dict[str, Any] = {**split_arguments(kind, split), "root": root}
        if can_download(kind):
            arguments["download"] = download
        elif download:
            raise ValueError(f"torchvision cannot download {name}; put its files into {root}")
        try:
            self.dataset = kind(**arguments)
        except (RuntimeError, OSError) as error:  # OSError: also no network
            fix = "" if download else ", or set data.source_args to {download: true}"
            raise ValueError(
                f"{name} is not in {root} ({error}); put its files there{fix}"
            ) from error
        self.name, self.split, self.channels = name, split, channels
        self.check_label()
        self.class_names = self.find_class_names()
        self.common_size = self.find_common_size()
        self.unread = copy.copy(self.dataset)  # shares everything but how a file is read
        if hasattr(self.unread, "loader"):
            self.unread.loader = Image.open  # reads the header; pixels only when they are used

    def check_label(self) -> None:
        try:
            label = self.dataset[0][1]
        except (OSError, SyntaxError):
            return  # a damaged file is for whoever reads it
        if not isinstance(label, int | np.integer):
            raise ValueError(
                f"torchvision:{self.name} labels an image with a {type(label).__name__}; "
                f"expected one class id, so it is not a classification data set"
            )

    def find_class_names(self) -> tuple[str, ...]:
        names = getattr(self.dataset, "classes", None)
        if names:
            return tuple(str(name) for name in names)
        for attribute in ("targets", "labels", "_labels", "y"):
            labels = getattr(self.dataset, attribute, None)
            if labels is not None:
                return tuple(str(i) for i in range(int(np.max(np.asarray(labels))) + 1))
        raise ValueError(f"torchvision:{self.name} gives no class labels to train on")

    def find_common_size(self) -> tuple[int, int] | None:
        """(height, width) of all images, where the data set keeps them in one array.

        That is so for the MNIST family, CIFAR, SVHN, STL10, SEMEION and USPS. The order of the
        array's axes differs between them, so the first image tells.
        """
        shape = tuple(getattr(getattr(self.dataset, "data", None), "shape", ()))
        if len(shape) < 3 or shape[0] != len(self):
            return None
        width, height = self.dataset[0][0].size
        return (height, width) if {height, width} <= set(shape[1:]) else None

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> Example:
        image, label = self.read(self.dataset, index)
        return Example(with_channels(to_array(image), self.channels), int(label))

    def read(self, dataset: Any, index: int) -> tuple[Image.Image, int]:
        try:
            image, label = dataset[index]
        except (OSError, SyntaxError) as error:  # what Pillow raises on a damaged file
            raise BadImageError(self.describe(index), str(error)) from error
        return image, label

    def size(self, index: int) -> tuple[int, int]:
        if self.common_size is not None:
            return self.common_size
        image, _ = self.read(self.unread, index)
        with image:  # its file may still be open
            return image.height, image.width

    def describe(self, index: int) -> str:
        return f"{self.name}/{self.split}[{index}]"


def can_download(kind: type) -> bool:
    """Whether a data set of torchvision, or what it passes **kwargs on to, takes `download`."""
    makers = [vars(base)["__init__"] for base in kind.__mro__ if "__init__" in vars(base)]
    return any("download" in inspect.signature(make).parameters for make in makers)


# Held-out parts that are not called "test", or whose "test" has no labels.
HELD_OUT_SPLITS = dict.fromkeys(
    ("ImageNet", "Imagenette", "Places365", "CLEVRClassification"), "val"
)
TRAIN_SPLITS = {"OxfordIIITPet": "trainval", "Places365": "train-standard"}


def split_arguments(kind: type, split: Split) -> dict[str, Any]:
    """How this data set of torchvision is told which part to give."""
    parameters = inspect.signature(kind).parameters
    if kind.__name__ == "EMNIST":  # its `split` is which of its six character sets
        return {"split": "balanced", "train": split == "train"}
    if "train" in parameters:
        return {"train": split == "train"}
    if "split" not in parameters:
        raise ValueError(
            f"torchvision's {kind.__name__} has no training and test split of its own; "
            f"use source folder with its files"
        )
    if split == "train":
        return {"split": TRAIN_SPLITS.get(kind.__name__, "train")}
    return {"split": HELD_OUT_SPLITS.get(kind.__name__, "test")}
