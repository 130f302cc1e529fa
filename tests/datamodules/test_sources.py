"""Sources by name."""

import pickle
import struct
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from torchvision import datasets

from datamodules.of_torchvision import TorchvisionSource, can_download, split_arguments
from datamodules.sources import (
    BadImageError,
    Digits,
    open_source,
    to_array,
    with_channels,
)


def test_digits_are_scikit_learns_and_split_for_ever() -> None:
    from sklearn.datasets import load_digits

    images, labels = load_digits(return_X_y=True)
    train, val = (
        open_source("digits", "train", channels=1),
        open_source("digits", "val", channels=1),
    )
    assert isinstance(train, Digits)
    assert isinstance(val, Digits)
    assert (len(train), len(val)) == (1437, 360)
    rows = np.concatenate((train.indices, val.indices))
    assert sorted(rows) == list(range(1797))
    example = val[7]
    row = int(val.indices[7])
    assert example.image.shape == (8, 8, 1)
    assert np.array_equal(example.image[..., 0], np.round(images[row].reshape(8, 8) * 255 / 16))
    assert example.label == labels[row]
    held_out = np.bincount([val[i].label for i in range(len(val))])
    assert held_out.min() >= 34  # a fifth of every class
    assert val.describe(7) == f"digits[{row}]"
    assert val.indices[:5].tolist() == Digits("val", None, 1).indices[:5].tolist()


def test_channels() -> None:
    grey = np.arange(6, dtype=np.uint8).reshape(2, 3)
    assert with_channels(grey, 1).shape == (2, 3, 1)
    assert np.array_equal(with_channels(grey, 3), np.stack([grey] * 3, -1))
    colour = np.array([[[255, 0, 0], [0, 255, 0], [0, 0, 255]]], dtype=np.uint8)
    assert with_channels(colour, 1)[0, :, 0].tolist() == [76, 150, 29]
    with pytest.raises(ValueError, match="an image has 3 channels, but channels is 4"):
        with_channels(colour, 4)
    assert open_source("digits", "val", channels=3)[0].image.shape == (8, 8, 3)


def test_some_of_the_training_images() -> None:
    every = open_source("digits", "train", channels=1)
    some = open_source("digits", "train", channels=1, num_train=100)
    assert (len(every), len(some), some.channels) == (1437, 100, 1)
    assert some.class_names == every.class_names
    names = [some.describe(i) for i in range(100)]
    assert len(set(names)) == 100
    assert names != [every.describe(i) for i in range(100)]  # drawn, not the first ones
    again = open_source("digits", "train", channels=1, num_train=100)
    assert [again.describe(i) for i in range(100)] == names
    at = {every.describe(i): i for i in range(len(every))}
    for i in range(100):
        theirs = every[at[names[i]]]
        assert np.array_equal(some[i].image, theirs.image)
        assert some[i].label == theirs.label
    assert len({some[i].label for i in range(100)}) == 10
    assert len(open_source("digits", "val", channels=1, num_train=100)) == 360


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ({"name": "digit"}, "unknown data.source 'digit'; known: digits, shapes, folder"),
        ({"name": "shape"}, r"torchvision:NAME; did you mean shapes\?"),
        (
            {"name": "digits", "size": 3},
            "source 'digits' has no option 'size'; it takes: num_train",
        ),
        ({"name": "digits", "num_train": 0}, "num_train is 0; expected 1 to 1437, which"),
        ({"name": "digits", "num_train": 1438}, "num_train is 1438; expected 1 to 1437"),
        ({"name": "digits", "root": "x"}, "data.root is 'x', but digits is embedded"),
        ({"name": "folder"}, r"source folder needs data\.root"),
        ({"name": "torchvision:FashionMNST", "root": "x"}, "did you mean FashionMNIST"),
        ({"name": "torchvision:FashionMNIST"}, r"FashionMNIST needs data\.root"),
        (
            {"name": "torchvision:FashionMNIST", "root": "nowhere"},
            r"not in nowhere.*download: true",
        ),
    ],
)
def test_errors_name_what_there_is(arguments: dict, says: str) -> None:
    with pytest.raises(ValueError, match=says):
        open_source(split="train", **arguments)


def write_idx(path: Path, array: np.ndarray) -> None:
    header = struct.pack(f">HBB{array.ndim}I", 0, 8, array.ndim, *array.shape)
    path.write_bytes(header + array.astype(np.uint8).tobytes())


def fashion(root: Path) -> dict[str, np.ndarray]:
    """Files of the shape of Fashion-MNIST's, with a few random images."""
    raw = root / "FashionMNIST" / "raw"
    raw.mkdir(parents=True)
    rng, arrays = np.random.default_rng(0), {}
    for part, count in (("train", 40), ("t10k", 20)):
        arrays[part] = rng.integers(0, 256, (count, 28, 28))
        write_idx(raw / f"{part}-images-idx3-ubyte", arrays[part])
        write_idx(raw / f"{part}-labels-idx1-ubyte", np.arange(count) % 10)
    return arrays


def test_torchvision_by_name(tmp_path: Path) -> None:
    arrays = fashion(tmp_path)
    source = "torchvision:FashionMNIST"
    train = open_source(source, "train", str(tmp_path), channels=1)
    val = open_source(source, "val", str(tmp_path), channels=3)
    assert isinstance(train, TorchvisionSource)
    assert (len(train), len(val)) == (40, 20)
    assert np.array_equal(train[3].image[..., 0], arrays["train"][3])
    assert val[4].image.shape == (28, 28, 3)
    assert np.array_equal(val[4].image[..., 2], arrays["t10k"][4])
    assert (train[13].label, train.class_names[0]) == (3, "T-shirt/top")
    assert pickle.loads(pickle.dumps(train))[3].label == 3


def test_splits_of_torchvision() -> None:
    parts = {
        name: [split_arguments(getattr(datasets, name), split) for split in ("train", "val")]
        for name in ("CIFAR10", "SVHN", "Imagenette", "Places365", "CLEVRClassification")
    }
    assert parts == {
        "CIFAR10": [{"train": True}, {"train": False}],
        "SVHN": [{"split": "train"}, {"split": "test"}],
        "Imagenette": [{"split": "train"}, {"split": "val"}],
        "Places365": [{"split": "train-standard"}, {"split": "val"}],
        "CLEVRClassification": [{"split": "train"}, {"split": "val"}],
    }
    with pytest.raises(ValueError, match="FakeData has no training and test split"):
        open_source("torchvision:FakeData", "train", "x")


def test_download_reaches_data_sets_that_pass_it_on(tmp_path: Path) -> None:
    passed_on = ("EMNIST", "QMNIST", "MNIST", "CIFAR10")
    assert [can_download(getattr(datasets, name)) for name in passed_on] == [True] * 4
    with pytest.raises(ValueError, match="torchvision cannot download FER2013"):
        open_source("torchvision:FER2013", "train", str(tmp_path), download=True)


class Labelled(datasets.VisionDataset):
    """A data set of torchvision's with any image and any label."""

    image: Image.Image | OSError = Image.new("RGB", (2, 2))
    label: object = 0
    classes = ("a", "b")

    def __init__(self, root: str, train: bool = True) -> None:
        super().__init__(root)

    def __len__(self) -> int:
        return 1

    def __getitem__(self, index: int) -> tuple[Image.Image, object]:
        if isinstance(self.image, OSError):
            raise self.image
        return self.image, self.label


def test_torchvision_labels_and_images(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets, "Labelled", Labelled, raising=False)
    source = open_source("torchvision:Labelled", "val", str(tmp_path), channels=1)
    assert source.describe(0) == "Labelled/val[0]"
    # Neither the numbers of a palette nor the four inks are grey values.
    for mode in ("P", "CMYK", "RGBA"):
        monkeypatch.setattr(Labelled, "image", Image.new("RGB", (2, 2), (255, 0, 0)).convert(mode))
        assert source[0].image[0, 0].tolist() == [76]
    monkeypatch.setattr(Labelled, "image", OSError("damaged"))
    assert len(open_source("torchvision:Labelled", "val", str(tmp_path))) == 1
    with pytest.raises(BadImageError, match="damaged"):
        source[0]
    monkeypatch.setattr(Labelled, "label", [1, 2])
    monkeypatch.setattr(Labelled, "image", Image.new("L", (2, 2)))
    with pytest.raises(ValueError, match="labels an image with a list; expected one class id"):
        open_source("torchvision:Labelled", "train", str(tmp_path))


def test_deep_grey_is_scaled_the_same_in_every_image() -> None:
    dark, bright = np.full((2, 2), 200, np.uint16), np.full((2, 2), 200, np.uint16)
    bright[0, 0] = 65535
    assert to_array(Image.fromarray(dark))[1, 1] == to_array(Image.fromarray(bright))[1, 1] == 1
    assert to_array(Image.fromarray(bright))[0, 0] == 255
