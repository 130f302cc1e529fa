"""Schedules against the values of METHODS."""

import itertools
from collections.abc import Callable

import pytest

from modules.schedules import noam, warmup_cosine, warmup_linear, warmup_rsqrt


def test_mae_values_at_fractional_epochs() -> None:
    # Peak 2.4e-3, 40 epochs of warm-up, 800 epochs, a step an epoch.
    got = [warmup_cosine(e, 800, 40, 2.4e-3) for e in (0, 20, 40, 100, 420, 800)]
    assert got == pytest.approx([0, 0.0012, 0.0024, 0.002363, 0.0012, 0], abs=5e-7)


def test_parts_join_and_fall() -> None:
    values = [warmup_cosine(s, 100, 10, 1.0, start=0.1, end=0.01) for s in range(121)]
    assert values[0] == 0.1
    assert values[5] == pytest.approx(0.55)
    assert values[10] == max(values) == 1.0
    assert values[55] == pytest.approx(0.505)  # the middle of the cosine
    assert all(a > b for a, b in itertools.pairwise(values[10:101]))
    assert values[100:] == [0.01] * 21


def test_dino_values_at_the_middle_and_the_end() -> None:
    # Batch 1024, so peak .0005 * 4; 100 epochs of 1250 steps, 10 of warm-up, down to 1e-6.
    got = [warmup_cosine(s, 125_000, 12_500, 0.002, end=1e-6) for s in (0, 68_750, 124_999)]
    assert got == pytest.approx([0, 0.0010005, 1e-6], abs=1e-9)


def test_linear_falls_by_equal_steps() -> None:
    values = [warmup_linear(s, 100, 10, 1.0, start=0.1, end=0.01) for s in range(121)]
    assert values[:11] == pytest.approx([0.1 + 0.09 * s for s in range(11)])
    assert values[55] == pytest.approx(0.505)  # the middle
    falls = [a - b for a, b in itertools.pairwise(values[10:101])]
    assert falls == pytest.approx([0.011] * 90)
    assert values[100:] == [0.01] * 21


def test_rsqrt_does_not_know_the_end_before_its_cooldown() -> None:
    values = [warmup_rsqrt(s, 50_000, 100, 1.0, end=0.01, cooldown=10_000) for s in range(50_001)]
    longer = [warmup_rsqrt(s, 90_000, 100, 1.0, end=0.01, cooldown=10_000) for s in range(40_001)]
    assert values[:40_001] == longer
    assert values[50] == pytest.approx(0.5)
    assert values[100] == 1.0
    assert values[10_100] == pytest.approx(0.5**0.5)
    assert values[30_100] == pytest.approx(0.5)
    falls = [a - b for a, b in itertools.pairwise(values)]
    assert all(fall > 0 for fall in falls[100:])
    assert abs(values[40_001] - values[40_000]) < 1e-3  # the parts join
    assert values[45_000] == pytest.approx(0.01 + 0.5 * ((1 + 4.49) ** -0.5 - 0.01))
    assert values[50_000] == 0.01
    with pytest.raises(ValueError, match="cooldown of 11 steps does not fit a run of 10"):
        warmup_rsqrt(0, 10, 0, 1.0, cooldown=11)


@pytest.mark.parametrize("schedule", [warmup_cosine, warmup_linear, warmup_rsqrt])
def test_edges(schedule: Callable[..., float]) -> None:
    assert schedule(0, 10, 0, 3.0) == 3.0
    assert schedule(10, 10, 10, 3.0) == 0.0
    with pytest.raises(ValueError, match="warm-up of 11 steps does not fit a run of 10"):
        schedule(0, 10, 11, 1.0)


def test_noam_of_the_base_transformer() -> None:
    peak = (512 * 4000) ** -0.5
    # The paper counts steps from 1.
    got = [noam(s - 1, 10, 4000, peak) for s in (1, 1000, 4000, 16_000, 100_000)]
    assert got == pytest.approx([1.747e-7, 1.747e-4, 6.988e-4, 3.494e-4, 1.398e-4], rel=5e-4)
    for s in (1, 77, 4000, 4001, 54_321):
        expected = 512**-0.5 * min(s**-0.5, s * 4000**-1.5)
        assert noam(s - 1, 10, 4000, peak) == pytest.approx(expected, rel=1e-12)
    assert noam(99_999, 10, 4000, peak, end=2e-4) == 2e-4
    assert noam(0, 10, 4000, peak, end=2e-4) == pytest.approx(peak / 4000)
    with pytest.raises(ValueError, match="schedule noam is made of its warm-up"):
        noam(0, 10, 0, 1.0)
