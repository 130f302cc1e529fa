"""Plans of packs: every image once, nothing over budget, the same every time, and well filled."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from datamodules import packing
from datamodules.packing import Layout, Resolution, TokenDrop, grids_of, pack, plan, spread
from tests.typecheck import unchecked


def scenes(count: int) -> np.ndarray:
    """Sizes of the quickstart: sides of 32 to 160 pixels, aspects of 1:3 to 3:1."""
    rng = np.random.default_rng(0)
    side, aspect = rng.uniform(32, 160, count), np.exp(rng.uniform(-1, 1, count) * math.log(3))
    sizes = np.stack((side / np.sqrt(aspect), side * np.sqrt(aspect)), axis=1)
    return np.maximum(16, sizes.round()).astype(np.int32)


LAYOUT = Layout(num_rows=1, row_length=1024, slots=64, patch_size=8, num_prefix=0, max_grid=None)
NATIVE = Resolution("native", 32, 160)

lengths_and_budget = st.integers(1, 300).flatmap(
    lambda budget: st.tuples(st.lists(st.integers(1, budget), max_size=120), st.just(budget))
)


@settings(deadline=None)
@given(lengths_and_budget, st.integers(1, 9), st.integers(1, 40), st.integers(1, 7))
def test_each_image_once_and_nothing_over_budget(
    given_lengths: tuple[list[int], int], slots: int, buffer: int, multiple: int
) -> None:
    lengths, budget = given_lengths
    rows = pack(lengths, budget, slots, buffer)
    assert all(rows)
    for spread_rows in (rows, spread(rows, multiple)):
        assert sorted(image for row in spread_rows for image in row) == list(range(len(lengths)))
        assert all(sum(lengths[i] for i in row) <= budget for row in spread_rows)
        assert all(len(row) <= slots for row in spread_rows)
    assert len(spread(rows, multiple)) % multiple == 0
    assert len(spread(rows, multiple)) < len(rows) + multiple
    # What is not done by the time an image comes was held in the buffer: that one and its own row.
    for number, row in enumerate(rows):
        later = {image for after in rows[number + 1 :] for image in after}
        assert sum(image <= max(row) for image in later) <= buffer


def test_rows_are_split_before_any_is_empty() -> None:
    assert spread([[0, 1, 2], [3], [4, 5]], 5) == [[0, 2], [1], [3], [4], [5]]
    assert spread([[0], [1]], 4) == [[0], [1], [], []]
    assert spread([[0, 1, 2, 3, 4]], 4) == [[0, 4], [2], [1], [3]]
    assert spread([], 4) == []


def test_what_does_not_fit_is_refused() -> None:
    with pytest.raises(ValueError, match="image of 7 tokens does not fit a row of 6"):
        pack([3, 7], 6, 4, 4)


@pytest.mark.parametrize("drop", [TokenDrop(), TokenDrop("beta", 0.5, 0.15)], ids=lambda d: d.kind)
@pytest.mark.parametrize("patch_size", [8, 16])
def test_fill_rate(patch_size: int, drop: TokenDrop) -> None:
    """The bar: 97 % with a buffer of 256 images at a budget of 1,024."""
    layout = LAYOUT._replace(patch_size=patch_size, slots=256)
    planned = plan(scenes(10_000), 0, 0, layout, NATIVE, drop, buffer=256)
    fill = planned.kept.sum() / (len(planned.rows) * 1024)
    assert 0.985 < fill <= 1.0
    # Every part of the pass has its share of large images.
    parts = np.array_split(np.array([planned.kept[row].mean() for row in planned.rows]), 4)
    assert all(abs(part.mean() / np.concatenate(parts).mean() - 1) < 0.1 for part in parts)


@settings(deadline=None, max_examples=25)
@given(
    st.integers(1, 400),
    st.integers(0, 5),
    st.integers(0, 5),
    st.sampled_from([1, 2, 6]),
    st.integers(0, 4),
)
def test_a_plan(count: int, seed: int, number: int, multiple: int, num_prefix: int) -> None:
    layout = LAYOUT._replace(num_prefix=num_prefix, row_length=256, max_grid=12)
    how = Resolution("uniform", 32, 200), TokenDrop("beta", 0.4, 0.2)
    sizes = scenes(count)
    planned = plan(sizes, seed, number, layout, *how, multiple=multiple)
    assert sorted(planned.items.tolist()) == list(range(count))
    assert len(planned.rows) % multiple == 0
    counts = planned.grids.prod(axis=1)
    assert (planned.grids >= 1).all()
    assert (planned.grids <= 12).all()
    assert (planned.kept >= 1).all()
    assert (planned.kept <= counts).all()
    assert (counts + num_prefix <= 256).all()
    lengths = planned.kept + num_prefix
    assert all(lengths[row].sum() <= 256 for row in planned.rows if row)
    again = plan(sizes, seed, number, layout, *how, multiple=multiple)
    assert all(np.array_equal(a, b) for a, b in zip(planned[:4], again[:4], strict=True))
    assert planned.rows == again.rows
    other = plan(sizes, seed, number + 1, layout, *how, multiple=multiple)
    assert count < 8 or not np.array_equal(planned.keys, other.keys)


def test_grids_keep_the_aspect_and_the_area() -> None:
    sizes = scenes(500)
    grids = grids_of(sizes, np.full(500, 256.0), 8, most=4096, max_grid=None)
    assert np.allclose(np.sqrt(grids.prod(axis=1)), 32, rtol=0.03)
    ratio = (sizes[:, 1] / sizes[:, 0]) / (grids[:, 1] / grids[:, 0])
    assert np.abs(np.log(ratio)).max() < 0.06
    # What would be too long is reduced, with its aspect.
    few = grids_of(sizes, np.full(500, 256.0), 8, most=100, max_grid=None)
    assert (few.prod(axis=1) <= 100).all()
    assert few.prod(axis=1).mean() > 80
    narrow = grids_of(np.array([[10, 4000], [4000, 10], [0, 0]]), np.full(3, 64.0), 8, 50, 20)
    assert narrow.tolist() == [[1, 20], [20, 1], [7, 7]]
    for side in range(1, 60):  # rounding loses no patch
        capped = grids_of(np.array([[1, 10_000]]), np.array([640.0]), 8, 4096, side)
        assert capped.tolist() == [[1, side]]
    tiny = grids_of(np.array([[3, 3]]), np.array([1.0]), 8, 50, None)
    assert tiny.tolist() == [[1, 1]]


def test_resolutions_have_their_distribution() -> None:
    u, sizes = (np.arange(4000) + 0.5) / 4000, scenes(4000)
    uniform = Resolution("uniform", 64, 256).sides(sizes, u)
    assert stats.kstest(uniform, stats.uniform(64, 192).cdf).pvalue > 0.99
    normal = Resolution("truncated_normal", 64, 256, mean=-0.5, std=0.8).sides(sizes, u)
    center, std = 64 + 192 * 0.25, 0.8 * 96
    cut = stats.truncnorm((64 - center) / std, (256 - center) / std, center, std)
    assert stats.kstest(normal, cut.cdf).pvalue > 0.99
    assert normal.mean() < uniform.mean()
    native = Resolution("native", 40, 100).sides(np.array([[10, 10], [64, 49], [300, 300]]), u[:3])
    assert native.tolist() == [40.0, 56.0, 100.0]


def test_sides_of_a_plan_are_drawn_for_every_image() -> None:
    planned = plan(scenes(3000), 0, 0, LAYOUT._replace(patch_size=1), Resolution("uniform", 8, 30))
    sides = np.sqrt(planned.grids.prod(axis=1))
    assert abs(sides.mean() - 19) < 0.4
    assert abs(sides.std() - 22 / math.sqrt(12)) < 0.3


def test_drop_rates_have_their_distribution() -> None:
    u, counts = (np.arange(4000) + 0.5) / 4000, np.arange(4000) % 97 + 4
    rates = TokenDrop("beta", 0.5, 0.2).rates(counts, u, 0.0)
    a = 0.5 * (0.25 / 0.04 - 1)
    assert stats.kstest(rates, stats.beta(a, a).cdf).pvalue > 0.99
    assert rates.mean() == pytest.approx(0.5, abs=1e-3)
    assert rates.std() == pytest.approx(0.2, abs=1e-3)
    assert (TokenDrop(rate=0.3).rates(counts, u, 0.0) == 0.3).all()
    rates = TokenDrop("resolution", 0.2, 0.02, largest_rate=0.7).rates(counts, u, 0.0)
    fit = stats.linregress(counts, rates)
    assert fit.intercept + 4 * fit.slope == pytest.approx(0.2, abs=2e-3)
    assert fit.intercept + 100 * fit.slope == pytest.approx(0.7, abs=2e-3)
    noise = rates - (0.2 + 0.5 * (counts - 4) / 96)
    assert 0.03 < np.abs(noise).max() <= 0.04
    falling = TokenDrop(rate=0.4, last=0.25)
    assert [falling.rates(counts, u, p)[0] for p in (0.0, 0.5, 1.0)] == pytest.approx(
        [0.4, 0.25, 0.1]
    )


def test_dropping_keeps_the_stated_number() -> None:
    """METHODS: kept = max(1, int(n (1 - p)))."""
    planned = plan(scenes(300), 0, 0, LAYOUT, NATIVE, TokenDrop(rate=0.9))
    counts = planned.grids.prod(axis=1)
    assert planned.kept.tolist() == [max(1, int(n * 0.1 + 1e-9)) for n in counts]


def test_a_plan_of_an_evaluation_is_in_order_and_complete() -> None:
    sizes = scenes(50)
    planned = packing.plan_evaluation(sizes, LAYOUT, Resolution("native", 96, 96))
    assert planned.items.tolist() == planned.keys.tolist() == list(range(50))
    assert (planned.kept == planned.grids.prod(axis=1)).all()
    assert planned.kept.mean() == pytest.approx(144, abs=4)


@pytest.mark.parametrize(
    ("family", "arguments", "message"),
    [
        (Resolution, {"kind": "large"}, "resolution.kind is 'large'; expected native or"),
        (Resolution, {"min_side": 9, "max_side": 8}, "min_side 9 and max_side 8"),
        (Resolution, {"kind": "truncated_normal", "std": 0.0}, "std is 0.0"),
        (Resolution, {"mean": 0.0}, "mean and std are of the truncated normal; kind is 'native'"),
        (Resolution, {"kind": "truncated_normal", "mean": 160.0}, "leave nothing within the range"),
        (Resolution, {"kind": "truncated_normal", "mean": math.nan}, "leave nothing within"),
        (TokenDrop, {"last": 0.5}, "drop.last is 0.5, but nothing is dropped"),
        (TokenDrop, {"kind": "some"}, "drop.kind is 'some'"),
        (TokenDrop, {"rate": 1.0}, "drop.rate is 1.0"),
        (TokenDrop, {"kind": "resolution", "rate": 0.1}, "largest_rate is None"),
        (TokenDrop, {"largest_rate": 0.1}, "largest_rate is 0.1 and kind is 'constant'"),
        (TokenDrop, {"rate": 0.1, "std": 0.1}, "a constant rate has none"),
        (TokenDrop, {"kind": "beta", "rate": 0.5, "std": 0.6}, "0 < std < 0.500"),
        (TokenDrop, {"last": 1.5}, "drop.last is 1.5"),
        (TokenDrop, {"kind": "beta", "rate": 0.5, "std": -0.1}, "drop.std is -0.1"),
    ],
)
def test_values_without_a_meaning_are_refused(
    family: type, arguments: dict[str, object], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        unchecked(family, arguments)
