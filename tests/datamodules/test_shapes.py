"""The embedded scenes."""

import numpy as np
import pytest
from sklearn.neighbors import KNeighborsClassifier

from datamodules.shapes import CLASSES, Frame, Shapes, draw, inside_shape
from datamodules.sources import open_source


def test_a_scene_is_a_function_of_split_and_index() -> None:
    few, many = open_source("shapes", "train", num_train=20), open_source("shapes", "train")
    for index in (0, 7, 19):
        a, b = few[index], many[index]
        assert np.array_equal(a.image, b.image)
        assert np.array_equal(a.mask, b.mask)
        assert not np.array_equal(a.image, open_source("shapes", "val")[index].image)
    with pytest.raises(IndexError):
        few[20]


def test_classes_are_balanced_and_every_scene_has_one_object() -> None:
    source = open_source("shapes", "val", num_val=200)
    examples = [source[i] for i in range(len(source))]
    assert np.bincount([e.label for e in examples]).tolist() == [20] * 10
    for example in examples:
        assert example.image.dtype == np.uint8
        assert example.image.shape == (64, 64, 3)
        assert example.mask is not None
        assert example.mask.dtype == bool
        assert 0.02 < example.mask.mean() < 0.6
    places = np.array([np.argwhere(e.mask).mean(0) for e in examples])
    assert places.std(0).min() > 4  # at random places


def test_sizes_and_aspects_fill_their_range() -> None:
    source = Shapes("train", None, 3, min_side=32, max_side=160, max_aspect=3.0)
    shapes = np.array([source[i].image.shape[:2] for i in range(300)])
    sides, aspects = np.sqrt(shapes.prod(1)), shapes[:, 1] / shapes[:, 0]
    assert 31 <= sides.min() < 45
    assert 145 < sides.max() <= 161
    assert 0.32 < aspects.min() < 0.5
    assert 2.0 < aspects.max() < 3.1
    assert Shapes("train", None, 1)[0].image.shape == (64, 64, 1)


def test_outlines_differ_and_turn() -> None:
    frame = Frame(32.0, 32.0, 24.0, 0.0)
    masks = [draw(name, 64, 64, frame) for name in CLASSES]
    for i, a in enumerate(masks):
        for b in masks[:i]:
            assert (a & b).sum() / (a | b).sum() < 0.9
    turned = draw("triangle", 64, 64, frame._replace(angle=np.pi / 2))
    assert (turned != masks[CLASSES.index("triangle")]).sum() > 100
    rim = np.linspace(0, 2 * np.pi, 50)
    for name in CLASSES:  # within the reach that is drawn
        assert not inside_shape(name, 1.3 * np.cos(rim), 1.3 * np.sin(rim)).any()


def test_pixels_do_not_give_the_class_away() -> None:
    train, val = open_source("shapes", "train"), open_source("shapes", "val")
    x, y = ([s[i] for i in range(n)] for s, n in ((train, 1500), (val, 500)))
    model = KNeighborsClassifier(10)
    model.fit([e.image.ravel() for e in x], [e.label for e in x])
    assert model.score([e.image.ravel() for e in y], [e.label for e in y]) < 0.25


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ({"min_side": 8}, "expected 16 <= min <= max"),
        ({"min_side": 80}, "min_side 80 and max_side 64"),
        ({"max_aspect": 0.5}, "max_aspect is 0.5; expected at least 1"),
        ({"num_val": 0}, "num_val 0"),
        ({"root": "x"}, "shapes is embedded"),
    ],
)
def test_wrong_options(arguments: dict, says: str) -> None:
    with pytest.raises(ValueError, match=says):
        open_source("shapes", "train", **arguments)
