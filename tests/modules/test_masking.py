"""Which patches are removed: how many, in which patterns, and a function of what."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from datamodules.sampling import fold
from modules.backbones.attention import Segments
from modules.masking import (
    SHAPES,
    Mask,
    Tokens,
    each_visible,
    mask_by,
    num_visible,
    row_length,
    scores,
)
from tests.packs import images as drawn
from tests.packs import pack

GRID = (14, 14)


def keys(count: int, seed: int = 0) -> Tensor:
    return torch.tensor([fold(seed, 0, i) for i in range(count)])


def mask_of(
    shape: Any, count: int = 200, grid: tuple[int, int] = GRID, ratio: float = 0.75, prefix: int = 0
) -> Mask:
    tokens = Tokens.of_grid(count, grid, prefix, torch.device("cpu"))
    kept = prefix + num_visible(grid[0] * grid[1], ratio)
    return mask_by(scores(shape, tokens, keys(count), ratio), tokens, ratio, kept)


def test_as_many_stay_as_published_and_never_none_or_all() -> None:
    assert [num_visible(n, 0.75) for n in (196, 256, 49, 4, 2, 1)] == [49, 64, 12, 1, 1, 1]
    # Published code rounds 10 (1 - 0.9) and 100 (1 - 0.9) to 0 and 9.
    assert num_visible(10, 0.9) == 1
    assert num_visible(100, 0.9) == 10
    for n in range(2, 200):
        for percent in range(1, 100):
            kept = num_visible(n, percent / 100)
            exact = n * (100 - percent) // 100
            assert kept == min(n - 1, max(1, exact)), (n, percent)
    counts = torch.arange(1, 300)
    for percent in range(1, 100):
        each = [num_visible(n, percent / 100) for n in counts.tolist()]
        assert each_visible(counts, percent / 100).tolist() == each


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("ratio", [0.01, 0.3, 0.5, 0.75, 0.9, 0.99])
@pytest.mark.parametrize("grid", [(1, 2), (2, 2), (3, 5), (14, 14)])
def test_every_shape_removes_the_same_number(
    shape: Any, ratio: float, grid: tuple[int, int]
) -> None:
    mask = mask_of(shape, 20, grid, ratio, prefix=2)
    n = grid[0] * grid[1]
    assert (mask.is_removed.sum(1) == n - num_visible(n, ratio)).all()
    assert not mask.is_removed[:, :2].any()
    for seen, places in zip(mask.is_seen, mask.places, strict=True):
        assert torch.equal(places, seen.nonzero()[:, 0])


def test_the_lowest_scores_stay() -> None:
    """METHODS: noise .3 .1 .9 .5 at 75 % leaves the second patch."""
    tokens = Tokens.of_grid(1, (1, 4), 0, torch.device("cpu"))
    mask = mask_by(torch.tensor([[0.3, 0.1, 0.9, 0.5]]), tokens, 0.75, 1)
    assert mask.is_removed.int().tolist() == [[1, 0, 1, 1]]
    assert mask.places.tolist() == [[1]]


def test_what_is_removed_is_a_function_of_the_key_alone() -> None:
    tokens = Tokens.of_grid(9, GRID, 1, torch.device("cpu"))
    part = Tokens.of_grid(2, GRID, 1, torch.device("cpu"))
    for shape in SHAPES:
        whole = scores(shape, tokens, keys(9), 0.75)
        assert torch.equal(scores(shape, part, keys(9)[4:6], 0.75), whole[4:6])
        assert len({tuple(row) for row in whole.tolist()}) == 9
        assert not torch.equal(scores(shape, tokens, keys(9, seed=1), 0.75), whole)


def neighbours(removed: Tensor) -> float:
    """The share of removed patches' right neighbours that are removed."""
    grid = removed.view(-1, *GRID)
    return (grid[:, :, 1:] & grid[:, :, :-1]).sum().item() / grid[:, :, :-1].sum().item()


def test_random_removes_all_patches_alike() -> None:
    removed = mask_of("random", 2000).is_removed.float()
    spread = 5 * math.sqrt(0.75 * 0.25 / 2000)
    assert (removed.mean(0) - 0.75).abs().max() < spread
    assert neighbours(removed.bool()) == pytest.approx(146 / 195, abs=0.01)


def test_blocks_are_together() -> None:
    half = [neighbours(mask_of(shape, 500, ratio=0.5).is_removed) for shape in SHAPES[:2]]
    assert half[0] == pytest.approx(97 / 195, abs=0.02)
    assert half[1] > 0.75


def test_the_grid_leaves_one_of_four() -> None:
    mask = mask_of("grid")
    visible = mask.is_seen.view(-1, 7, 2, 7, 2)
    assert (visible.sum(dim=(2, 4)) == 1).all()
    at = visible.any(3).any(1).flatten(1)  # which of the four, the same everywhere in an image
    assert (at.sum(1) == 1).all()
    assert at.any(0).all()
    checks = mask_of("grid", ratio=0.5).is_removed.view(-1, *GRID)
    assert (checks[:, 1:] ^ checks[:, :-1]).all()
    assert (checks[:, :, 1:] ^ checks[:, :, :-1]).all()


SIZES = [[(8, 12), (4, 4), (16, 16)], [(12, 8)], [(4, 8), (20, 4)]]


def packed(num_prefix: int = 2, length: int = 40, slots: int = 3) -> tuple[Any, Tokens]:
    rows = [drawn(sizes, seed=i) for i, sizes in enumerate(SIZES)]
    given = pack(rows, 4, length, slots, num_prefix)
    return given, Tokens.of_pack(Segments(given))


@pytest.mark.parametrize("shape", SHAPES)
def test_an_image_loses_in_a_pack_what_it_loses_alone(shape: Any) -> None:
    given, tokens = packed()
    every = keys(9)
    mask = mask_by(scores(shape, tokens, every, 0.6), tokens, 0.6, row_length(given, 0.6))
    for row, sizes in enumerate(SIZES):
        for slot, (height, width) in enumerate(sizes):
            alone = Tokens.of_grid(1, (height // 4, width // 4), 2, torch.device("cpu"))
            key = every[row * 3 + slot : row * 3 + slot + 1]
            n = height * width // 16
            expected = mask_by(scores(shape, alone, key, 0.6), alone, 0.6, 2 + num_visible(n, 0.6))
            own = given.segments[row] == slot
            assert torch.equal(mask.is_seen[row, own], expected.is_seen[0])
    assert not (mask.is_seen & (given.segments < 0)).any()


def test_the_shorter_pack_is_one_of_the_visible_patches() -> None:
    """Against packs made by hand from the patches that are left."""
    given, tokens = packed()
    length = row_length(given, 0.6)
    mask = mask_by(scores("random", tokens, keys(9), 0.6), tokens, 0.6, length)
    kept = [
        [
            (mask.is_seen[row, given.segments[row] == slot][2:]).nonzero()[:, 0].tolist()
            for slot in range(len(sizes))
        ]
        for row, sizes in enumerate(SIZES)
    ]
    rows = [drawn(sizes, seed=i) for i, sizes in enumerate(SIZES)]
    by_hand = pack(rows, 4, length, 3, 2, kept)
    ours = mask.shorter(given)
    assert length < 40
    assert ours.num_prefix == 2
    for name in ("positions", "segments", "grids", "offsets"):
        assert torch.equal(getattr(ours, name), getattr(by_hand, name)), name
        assert getattr(ours, name).dtype == getattr(by_hand, name).dtype, name
    real = by_hand.positions[..., 0] >= 0
    assert torch.equal(ours.patches[real], by_hand.patches[real])


def test_rows_have_room_for_all_that_is_visible() -> None:
    """The worst case: images of one patch in all slots but one."""
    for ratio in (0.1, 0.5, 0.75, 0.9):
        for prefix in (0, 1, 5):
            for small in range(5):
                sizes = [(4, 4)] * small + [(4, 4 * 30)]
                length = (small + 1) * prefix + small + 30
                given = pack([drawn(sizes)], 4, length, 5, prefix)
                tokens = Tokens.of_pack(Segments(given))
                room = row_length(given, ratio)
                mask = mask_by(scores("random", tokens, keys(5), ratio), tokens, ratio, room)
                assert mask.is_seen.sum() <= room <= length
                assert mask.is_seen[0][mask.places[0]].sum() == mask.is_seen.sum()


def test_what_was_seen_comes_back_to_its_place() -> None:
    for mask in (mask_of("random", 5, (3, 4), prefix=1), packed_mask()):
        rows, n = mask.is_seen.shape
        x = torch.randn(rows, n, 6, dtype=torch.float64, requires_grad=True)
        token = torch.randn(1, 1, 6, dtype=torch.float64, requires_grad=True)
        short = x.take_along_dim(mask.places[..., None], 1)
        whole = mask.whole(short, token)
        seen = mask.is_seen[..., None]
        assert torch.equal(whole, torch.where(seen, x, token))
        gradients = [
            torch.autograd.grad(y.sin().sum(), (x, token))
            for y in (mask.whole(short, token), torch.where(seen, x, token))
        ]
        for ours, theirs in zip(*gradients, strict=True):
            torch.testing.assert_close(ours, theirs)


def packed_mask() -> Mask:
    given, tokens = packed()
    return mask_by(scores("block", tokens, keys(9), 0.6), tokens, 0.6, row_length(given, 0.6))
