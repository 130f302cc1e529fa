"""Sizes of the images of torchvision's data sets."""

import pickle
from pathlib import Path

import numpy as np
import pytest
import scipy.io
from PIL import Image
from torchvision import datasets

from datamodules.of_torchvision import TorchvisionSource
from datamodules.sizes import measure
from datamodules.sources import BadImageError, open_source
from tests.datamodules.test_headers import turned
from tests.datamodules.test_sizes import assert_measured, uneven
from tests.datamodules.test_sources import Labelled, fashion


def cifar(root: Path) -> None:
    rng, folder = np.random.default_rng(0), root / "cifar-10-batches-py"
    folder.mkdir()
    for name in (*(f"data_batch_{i}" for i in range(1, 6)), "test_batch"):
        batch = {"data": rng.integers(0, 256, (4, 3072), np.uint8), "labels": [0, 1, 2, 3]}
        (folder / name).write_bytes(pickle.dumps(batch))
    (folder / "batches.meta").write_bytes(pickle.dumps({"label_names": list("abcdefghij")}))


def svhn(root: Path) -> None:
    rng = np.random.default_rng(0)
    for name in ("train", "test"):
        arrays = {"X": rng.integers(0, 256, (32, 32, 3, 5), np.uint8), "y": np.arange(5)[:, None]}
        scipy.io.savemat(root / f"{name}_32x32.mat", arrays)


def stl(root: Path) -> None:
    folder = root / "stl10_binary"
    folder.mkdir()
    (folder / "class_names.txt").write_text("a\nb\n")
    for name in ("train", "test"):
        (folder / f"{name}_X.bin").write_bytes(bytes(4 * 3 * 96 * 96))
        (folder / f"{name}_y.bin").write_bytes(bytes([1, 2, 1, 2]))


@pytest.mark.parametrize(
    ("name", "make", "size"),
    [
        ("FashionMNIST", fashion, (28, 28)),
        ("CIFAR10", cifar, (32, 32)),
        ("SVHN", svhn, (32, 32)),
        ("STL10", stl, (96, 96)),
    ],
)
def test_data_sets_in_one_array(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, make: object, size: tuple[int, int]
) -> None:
    make(tmp_path)  # type: ignore[operator]
    kind = getattr(datasets, name)
    for check in ("_check_integrity", "_check_exists"):  # the real files' checksums
        if hasattr(kind, check):
            monkeypatch.setattr(kind, check, lambda self: True)
    monkeypatch.setitem(datasets.CIFAR10.meta, "md5", None)
    source = open_source(f"torchvision:{name}", "val", str(tmp_path))
    assert isinstance(source, TorchvisionSource)
    assert assert_measured(source)[0].tolist() == list(size)
    monkeypatch.setattr(kind, "__getitem__", None)
    assert measure(source).shape == (len(source), 2)  # without opening a single one


class Tall(Labelled):
    """All images in one array, of which the axes tell nothing."""

    data = np.zeros((2, 3, 5, 4), np.uint8)

    def __len__(self) -> int:
        return 2

    def __getitem__(self, index: int) -> tuple[Image.Image, object]:
        return Image.fromarray(self.data[index].transpose(1, 2, 0)[..., 0]), 0


class Features(Labelled):
    """An array called `data` that does not hold the images."""

    data = np.zeros((1, 7, 9), np.float32)


class Files(datasets.ImageFolder):
    def __init__(self, root: str, train: bool = True) -> None:
        super().__init__(root)


def test_other_data_sets_are_asked_for_each_image(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for kind in (Labelled, Tall, Features, Files):
        monkeypatch.setattr(datasets, kind.__name__, kind, raising=False)
    monkeypatch.setattr(Labelled, "image", Image.new("RGB", (3, 2)))
    assert assert_measured(open_source("torchvision:Tall", "val", "x")).tolist() == [[5, 4]] * 2
    for name in ("Labelled", "Features"):
        assert assert_measured(open_source(f"torchvision:{name}", "val", "x")).tolist() == [[2, 3]]
    source = open_source("torchvision:Labelled", "val", "x")
    monkeypatch.setattr(Labelled, "image", OSError("damaged"))
    with pytest.raises(BadImageError, match="damaged"):
        source.size(0)
    assert measure(source).tolist() == [[0, 0]]


def test_data_sets_of_files_are_not_decoded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(datasets, "Files", Files, raising=False)
    root = uneven(tmp_path / "files", 6)
    turned(root / "a" / "turned.jpg", 6)  # which torchvision does not turn
    source = pickle.loads(pickle.dumps(open_source("torchvision:Files", "val", str(root))))
    assert [10, 12] in assert_measured(source).tolist()
    cut = root / "a" / "000.jpg"
    Image.effect_noise((60, 40), 90).save(cut)
    cut.write_bytes(cut.read_bytes()[:-400])
    (root / "b" / "001.jpg").write_bytes(b"garbage")
    with pytest.raises(BadImageError):
        source[0]
    sizes = measure(source).tolist()
    assert sizes[0] == [40, 60]
    assert sizes.count([0, 0]) == 1
