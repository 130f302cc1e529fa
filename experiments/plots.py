"""Curves as SVG, drawn for a page: colours and text are the page's CSS."""

import math
from collections.abc import Mapping, Sequence
from html import escape
from statistics import fmean

from experiments.runs import Point

WIDTH, HEIGHT = 440, 250
LEFT, RIGHT, TOP, BOTTOM = 52, 12, 10, 34
MOST_POINTS = 400  # of a curve; more cannot be told apart at this size
MOST_DOTS = 40
COLOURS = 10  # classes c0 to c9 of the page
DASHES = ("", "6 3", "2 2", "8 3 2 3")  # for runs beyond the tenth


def thinned(points: Sequence[Point]) -> list[Point]:
    """At most `MOST_POINTS` points: the means of stretches of the same number of points."""
    size = math.ceil(len(points) / MOST_POINTS)
    if size <= 1:
        return list(points)
    parts = [points[i : i + size] for i in range(0, len(points), size)]
    return [Point(part[-1].step, fmean(p.value for p in part)) for part in parts]


def ticks(low: float, high: float, count: int) -> list[float]:
    """About `count` round numbers from low to high."""
    raw = (high - low) / count
    unit = 10.0 ** math.floor(math.log10(raw))
    step = next(unit * factor for factor in (1, 2, 5, 10) if unit * factor >= raw * 0.7)
    first, final = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [i * step for i in range(first, final + 1)]


def limits(values: Sequence[float]) -> tuple[float, float]:
    """A range a little wider than the values, and never empty."""
    low, high = min(values), max(values)
    margin = 0.05 * (high - low) or 0.05 * abs(high) or 1.0
    return low - margin, high + margin


def in_short(value: float) -> str:
    """12000 as 12k; small numbers with no more digits than they need."""
    for unit, size in (("M", 1e6), ("k", 1e3)):
        if abs(value) >= size:
            return f"{value / size:.4g}{unit}"
    return f"{value:.4g}" if value == 0 or abs(value) >= 1e-4 else f"{value:.0e}"


def look(index: int) -> str:
    """The attributes that tell the lines of a run from those of others."""
    dash = DASHES[index // COLOURS % len(DASHES)]
    dashed = f' stroke-dasharray="{dash}"' if dash else ""
    return f'class="line c{index % COLOURS}" data-run="{index}"{dashed}'


def draw(metric: str, curves: Mapping[int, tuple[str, Sequence[Point]]]) -> str:
    """One metric over optimizer steps.

    Args:
        metric: its name.
        curves: the names of runs and their points, at least one, by the number of the run.
    """
    kept = {index: (name, thinned(points)) for index, (name, points) in curves.items()}
    steps = [point.step for _, points in kept.values() for point in points]
    low, high = limits([point.value for _, points in kept.values() for point in points])
    first, final = min(0, *steps), max(1, *steps)

    def x(step: float) -> float:
        return LEFT + (step - first) / (final - first) * (WIDTH - LEFT - RIGHT)

    def y(value: float) -> float:
        return HEIGHT - BOTTOM - (value - low) / (high - low) * (HEIGHT - TOP - BOTTOM)

    parts = []
    for value in ticks(low, high, 5):
        at = f"{y(value):.1f}"
        parts.append(f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{at}" y2="{at}"/>')
        parts.append(
            f'<text x="{LEFT - 6}" y="{at}" dy="0.35em" text-anchor="end">{in_short(value)}</text>'
        )
    for value in ticks(first, final, 5):
        at = f'x="{x(value):.1f}" y="{HEIGHT - BOTTOM + 16}"'
        parts.append(f'<text {at} text-anchor="middle">{in_short(value)}</text>')
    for index, (name, points) in kept.items():
        places = [f"{x(point.step):.1f},{y(point.value):.1f}" for point in points]
        dots = ""
        if len(points) <= MOST_DOTS:
            split = (place.split(",") for place in places)
            dots = "".join(f'<circle cx="{cx}" cy="{cy}" r="2"/>' for cx, cy in split)
        parts.append(
            f"<g {look(index)}><title>{escape(name)}: {points[-1].value:.5g} at step "
            f'{points[-1].step}</title><polyline points="{" ".join(places)}"/>{dots}</g>'
        )
    return (
        f'<figure><figcaption>{escape(metric)}</figcaption><svg viewBox="0 0 {WIDTH} {HEIGHT}" '
        f'role="img" aria-label="{escape(metric)} over optimizer steps">{"".join(parts)}</svg>'
        f"</figure>"
    )
