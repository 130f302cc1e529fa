"""Label maps go through geometry as images do: against torchvision, the published code, Pillow."""

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from safetensors.torch import load_file
from timm.data import auto_augment
from torch import Tensor
from torchvision.ops import roi_align

from datamodules.batch import SparseScores
from datamodules.geometry import Box, crop_and_resize, draws, random_resized_crop
from datamodules.label_geometry import (
    PATHS,
    LabelGeometry,
    LabelMap,
    RandAugment,
    axis_shares,
    flipped,
    image_scores,
    moved,
    pool,
    reach,
    token_scores,
)
from modules.token_loss import softmax_targets

GOLDEN = load_file(Path(__file__).parents[1] / "golden" / "token_labels.safetensors")
CLOSE = {"atol": 1e-5, "rtol": 1e-5}


def random_map(seed: int, rows: int, columns: int, k: int = 5, num_classes: int = 20) -> LabelMap:
    rng = np.random.default_rng(seed)
    ids = rng.permuted(np.tile(np.arange(num_classes), (rows, columns, 1)), axis=-1)[..., :k]
    scores = rng.normal(5, 3, (rows, columns, k)).astype(np.float32)
    rest = rng.normal(0, 1, (rows, columns)).astype(np.float32)
    return LabelMap(scores, ids.astype(np.int32), rest)


def dense(labels: LabelMap, num_classes: int) -> Tensor:
    """Scores of all classes [k, rows, columns], written out."""
    every = np.repeat(labels.rest[None].astype(np.float32), num_classes, axis=0)
    for y, x, j in np.ndindex(labels.ids.shape):
        every[labels.ids[y, x, j], y, x] = labels.scores[y, x, j]
    return torch.from_numpy(every)


def spread(scores: SparseScores, num_classes: int) -> Tensor:
    """Scores of all classes [n, k] of sparse ones, above the common one."""
    every = torch.zeros(len(scores.ids), num_classes)
    return every.scatter_add(1, scores.ids.long(), scores.values)


def tokens_of(
    labels: LabelMap,
    box: Box,
    size: tuple[int, int],
    grid: tuple[int, int],
    num_classes: int = 20,
    **options: bool,
) -> SparseScores:
    lengths = tuple(reach(n, g) for n, g in zip(labels.rest.shape, grid, strict=True))
    where = pool(labels, box, *size, grid, options.get("transposed", False))
    return token_scores(labels, where, lengths, num_classes)


@pytest.mark.parametrize("size", [1, 14])
def test_labels_are_those_of_the_published_code_with_its_transposed_crop(size: int) -> None:
    for i in range(3):
        labels = LabelMap(
            GOLDEN["scores"][i].permute(1, 2, 0).numpy(),
            GOLDEN["classes"][i].permute(1, 2, 0).int().numpy(),
            np.zeros((15, 15), np.float32),
        )
        top, left, height, width = GOLDEN["crop_tlhw"][i].tolist()
        box = Box(*(1000 * x for x in (top, left, height, width)))  # type: ignore[arg-type]
        where = pool(labels, box, 1000, 1000, (1, 1), transposed=True)
        image = image_scores(labels, where, 20).softmax(-1)
        torch.testing.assert_close(image, GOLDEN[f"target.{size}"][i, :, 1], **CLOSE)
        if size > 1:
            tokens = tokens_of(labels, box, (1000, 1000), (size, size), transposed=True)
            found = spread(tokens, 20).softmax(-1).T
            torch.testing.assert_close(found, GOLDEN[f"target.{size}"][i, :, 2:], **CLOSE)
        # The second crop is the whole image, where transposing changes nothing.
        right = image_scores(labels, pool(labels, box, 1000, 1000, (1, 1), False), 20).softmax(-1)
        assert torch.allclose(right, image, atol=1e-3) == (i == 1)


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 1000),
    cells=st.tuples(st.integers(1, 19), st.integers(1, 19)),
    grid=st.tuples(st.integers(1, 8), st.integers(1, 8)),
    edges=st.tuples(*[st.floats(0, 0.7), st.floats(0, 0.7), st.floats(0.05, 0.3)] * 1),
)
def test_scores_are_those_of_roi_align(
    seed: int, cells: tuple[int, int], grid: tuple[int, int], edges: tuple[float, float, float]
) -> None:
    """Maps that are not square, in images that are not, into grids that are not."""
    labels = random_map(seed, *cells)
    height, width = 300, 500
    box = Box(int(edges[0] * height), int(edges[1] * width), 89, int(edges[2] * width) + 1)
    tokens = tokens_of(labels, box, (height, width), grid)
    x, y = cells[1] / width, cells[0] / height
    corners = [box.left * x, box.top * y, (box.left + box.width) * x, (box.top + box.height) * y]
    boxes = torch.tensor([[0.0, *corners]])
    expected = roi_align(dense(labels, 20)[None], boxes, grid, aligned=True)[0]
    found = spread(tokens, 20).log_softmax(-1)  # does not see what all classes share
    torch.testing.assert_close(found, expected.flatten(1).T.log_softmax(-1), atol=2e-3, rtol=1e-3)
    # Each class has one entry of a value, which softmax needs.
    for ids, values in zip(tokens.ids, tokens.values, strict=True):
        own = ids[values != 0].tolist()
        assert len(own) == len(set(own))
    # Shares of cells sum to one: where five classes stand out by 1, they do in every token.
    flat = labels._replace(scores=labels.rest[..., None].repeat(5, axis=-1) + 1)
    even = tokens_of(flat, box, (height, width), grid).values.sum(-1)
    torch.testing.assert_close(even, torch.full((grid[0] * grid[1],), 5.0), **CLOSE)


@pytest.mark.parametrize("transposed", [False, True])
def test_a_crop_of_rows_and_columns_has_their_numbers(transposed: bool) -> None:
    """Two classes score the row and the column of their cell: each token says where it is."""
    rows, columns, height, width = 24, 36, 240, 720
    y, x = np.meshgrid(np.arange(rows), np.arange(columns), indexing="ij")
    labels = LabelMap(
        np.stack([y, x], axis=-1).astype(np.float32),
        np.broadcast_to(np.arange(2, dtype=np.int32), (rows, columns, 2)).copy(),
        np.zeros((rows, columns), np.float32),
    )
    wrong = 0
    for key in range(20):
        box = random_resized_crop(height, width, (0.08, 0.6), (0.75, 1.33), draws(key))
        grid = (5, 7)
        found = spread(tokens_of(labels, box, (height, width), grid, transposed=transposed), 2)
        down = box.top + (np.arange(5) + 0.5) / 5 * box.height
        across = box.left + (np.arange(7) + 0.5) / 7 * box.width
        expected = np.meshgrid(
            (down * rows / height - 0.5).clip(0, rows - 1),
            (across * columns / width - 0.5).clip(0, columns - 1),
            indexing="ij",
        )
        difference = found - torch.tensor(np.stack(expected, -1).reshape(-1, 2)).float()
        # Bins at the border lose what lies beyond the outermost centres.
        wrong += bool(difference.abs().max() > 0.3)
    assert wrong == (20 if transposed else 0)


def test_the_crop_that_methods_quotes() -> None:
    labels = LabelMap(
        np.arange(18, dtype=np.float32)[:, None, None].repeat(18, 1),
        np.zeros((18, 18, 1), np.int32),
        np.zeros((18, 18), np.float32),
    )
    box = Box(5, 0, 5, 5)
    right, swapped = (pool(labels, box, 10, 10, (1, 1), t) for t in (False, True))
    assert image_scores(labels, right, 3)[0].item() == pytest.approx(13.0)
    assert image_scores(labels, swapped, 3)[0].item() == pytest.approx(4.0, abs=0.2)


def test_bins_and_their_reach() -> None:
    np.testing.assert_allclose(axis_shares(0, 1, 4, 4), np.eye(4))
    for cells in range(1, 40):
        for bins in (1, 3, 7, 14):
            for low, high in ((0, 1), (0.1, 0.9), (0.31, 0.62), (0.5, 0.501)):
                for published in (False, True):
                    shares = axis_shares(low, high, cells, bins, published)
                    if low > 0 or not published:
                        np.testing.assert_allclose(shares.sum(axis=1), 1)
                    assert (shares > 0).sum(axis=1).max() <= reach(cells, bins)


def test_a_small_box_has_the_published_least_size_only_where_it_is_asked_for() -> None:
    tight, padded = axis_shares(0.5, 0.51, 10, 1), axis_shares(0.5, 0.51, 10, 1, published=True)
    at = np.arange(10) + 0.5
    assert (tight @ at).item() == pytest.approx(5.05)
    assert (padded @ at).item() == pytest.approx(5.5)


PLACED = {"Rotate": 25.0, "ShearX": 0.25, "ShearY": -0.2, "TranslateXRel": 0.3}
PLACED |= {"TranslateYRel": -0.25, "TranslateX": 40.0, "TranslateY": -30.0}


@pytest.mark.parametrize("name", PATHS)
def test_maps_move_as_timm_moves_images(name: str) -> None:
    """Cell by cell, a map of colours follows the image that it was made of."""
    height, width, cell = 240, 320, 20
    rows, columns = height // cell, width // cell
    value = np.arange(1, rows * columns + 1, dtype=np.int32).reshape(rows, columns)
    image = Image.fromarray(value.repeat(cell, 0).repeat(cell, 1).astype(np.uint8))
    operation = auto_augment.NAME_TO_OP[name]
    given = operation(image, PLACED[name], fillcolor=0, resample=Image.Resampling.NEAREST)
    centres = np.asarray(given)[cell // 2 :: cell, cell // 2 :: cell]
    labels = LabelMap(value[..., None].astype(np.float32), value[..., None], 0.0 * value)
    found = moved(labels, [(name, (PLACED[name],))], height, width)
    # A centre between two cells may fall to either.
    same = found.scores[..., 0].astype(np.uint8) == centres
    assert same.mean() > 0.96
    assert (found.scores[..., 0] == 0).any()
    # What moves out of the image does not come back.
    back = moved(labels, [("TranslateXRel", (0.5,)), ("TranslateXRel", (-0.5,))], height, width)
    np.testing.assert_array_equal(back.scores[:, columns // 2 :, 0], value[:, columns // 2 :])
    assert not back.scores[:, : columns // 2].any()


def test_rand_augment_tells_what_it_did() -> None:
    recipe, fill = "rand-m9-mstd0.5-inc1", (124, 116, 104)
    augment, seen = RandAugment(recipe, fill), set()
    image = np.random.default_rng(0).integers(0, 255, (24, 32, 3), dtype=np.uint8)
    geometric = LabelMap(
        np.ones((4, 4, 1), np.float32), np.zeros((4, 4, 1), np.int32), np.zeros((4, 4))
    )
    changed_maps = 0
    for key in range(200):
        changed, moves = augment(image, key)
        again, same = augment(image, key)
        assert np.array_equal(changed, again)
        assert moves == same
        seen |= {name for name, _ in moves}
        changed_maps += moved(geometric, moves, 24, 32) is not geometric
    assert seen == {"Rotate", "ShearX", "ShearY", "TranslateXRel", "TranslateYRel"}
    # Of two operations among fifteen, each done half of the time, five are geometric.
    assert 0.2 < changed_maps / 200 < 0.45


def geometry(**changes: object) -> LabelGeometry:
    options: dict = {
        "size": (32, 32),
        "scale": (0.2, 0.8),
        "ratio": (0.75, 1.33),
        "flip": 0.5,
        "interpolation": "bilinear",
        "augment": None,
        "grid": (4, 4),
        "lengths": (reach(16, 4), reach(16, 4)),
        "num_classes": 16,
        "transposed": False,
    }
    return LabelGeometry(**options | changes)


def test_image_and_map_stay_together() -> None:
    """The colour of each part of an image is also its label: they agree after everything."""
    y, x = np.meshgrid(np.arange(4), np.arange(4), indexing="ij")
    quarters = (4 * y + x).repeat(4, 0).repeat(4, 1)
    labels = LabelMap(
        np.full((16, 16, 1), 9, np.float32),
        quarters[..., None].astype(np.int32),
        np.zeros((16, 16)),
    )
    image = (quarters * 16).repeat(8, 0).repeat(10, 1).astype(np.uint8)[..., None].repeat(3, 2)
    before = image.copy(), labels.ids.copy()
    agreed, tokens_seen = [], set()
    for key in range(40):
        pixels, tokens, pooled = geometry()(image, labels, key)
        assert tokens is not None
        colours = pixels[0].float().view(4, 8, 4, 8).mean((1, 3)).flatten() / 16
        scores = spread(tokens, 16)
        expected = (scores.softmax(-1) * torch.arange(16)).sum(-1)
        sure = scores.max(-1).values > 8.5  # tokens within one part
        agreed.append((colours - scores.argmax(-1))[sure].abs().max())
        tokens_seen |= set(scores.argmax(-1)[sure].tolist())
        assert pooled.shape == (16,)
        assert expected.shape == (16,)
    assert max(agreed) < 0.5
    assert len(tokens_seen) == 16
    assert np.array_equal(image, before[0])
    assert np.array_equal(labels.ids, before[1])


@pytest.mark.parametrize("low", [-5.0, -20.0, -80.0])
@pytest.mark.parametrize("top_k", [5, 8])
def test_classes_that_are_all_there_and_all_below_0(low: float, top_k: int) -> None:
    """A cell keeps all of them, or neighbouring cells do together."""
    labels = random_map(0, 6, 6, top_k, 8)._replace(rest=np.zeros((6, 6), np.float32))
    labels = labels._replace(scores=labels.scores + np.float32(low - 5))
    tokens = tokens_of(labels, Box(0, 0, 60, 60), (60, 60), (2, 2), 8)
    down = torch.from_numpy(axis_shares(0, 1, 6, 2))
    every = torch.einsum("gy,hx,kyx->ghk", down, down, dense(labels, 8).double()).flatten(0, 1)
    y = softmax_targets(tokens, 8, 0.0)
    ours = torch.zeros(4, 8).scatter_add(1, tokens.ids.long(), y.weights) + y.base[:, None]
    torch.testing.assert_close(ours.double(), every.softmax(-1), **CLOSE)


def test_a_map_that_is_smaller_than_others() -> None:
    """Its tokens have as many entries as theirs, and the scores that they have alone."""
    small, box, lengths = random_map(2, 2, 3), Box(5, 3, 20, 25), (reach(18, 2), reach(18, 2))
    where = pool(small, box, 30, 40, (2, 2), False)
    assert lengths[0] > 3
    padded = token_scores(small, where, lengths, 20)
    assert padded.ids.shape == (4, lengths[0] * lengths[1] * 5)
    alone = tokens_of(small, box, (30, 40), (2, 2))
    torch.testing.assert_close(spread(padded, 20), spread(alone, 20), **CLOSE)


def test_a_flip_mirrors_the_map() -> None:
    labels = random_map(0, 3, 5)
    assert np.array_equal(flipped(labels).ids, labels.ids[:, ::-1])
    image = np.zeros((30, 50, 3), np.uint8)
    image[:, :25] = 200
    both = [
        geometry(flip=p, scale=(1.0, 1.0), ratio=(5 / 3, 5 / 3), lengths=(3, 3), num_classes=20)
        for p in (0.0, 1.0)
    ]
    (kept, tokens, whole), (mirrored, others, same) = (g(image, labels, 3) for g in both)
    torch.testing.assert_close(mirrored, kept.flip(-1))
    ours, theirs = (spread(t, 20).view(4, 4, 20) for t in (tokens, others))
    torch.testing.assert_close(theirs, ours.flip(1), **CLOSE)
    torch.testing.assert_close(whole, same, **CLOSE)


def test_without_a_grid_only_the_crop_has_scores() -> None:
    labels = random_map(1, 16, 16, num_classes=16)
    image = np.zeros((32, 32, 3), np.uint8)
    _, tokens, pooled = geometry(grid=None)(image, labels, 5)
    assert tokens is None
    torch.testing.assert_close(pooled, geometry()(image, labels, 5)[2])
    assert crop_and_resize(image, Box(0, 0, 32, 32), (32, 32), "bilinear").shape == (3, 32, 32)
