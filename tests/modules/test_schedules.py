"""Schedules against the values of METHODS."""

import itertools

import pytest

from modules.schedules import warmup_cosine


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


def test_edges() -> None:
    assert warmup_cosine(0, 10, 0, 3.0) == 3.0
    assert warmup_cosine(10, 10, 10, 3.0) == 0.0
    with pytest.raises(ValueError, match="warm-up of 11 steps does not fit a run of 10"):
        warmup_cosine(0, 10, 11, 1.0)
