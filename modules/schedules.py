"""Schedules: pure functions of (step, total), in optimizer steps.

Nothing here has state, so a schedule cannot drift from the step counter, advance per
micro-batch or be lost on resume.
"""

import math


def warmup_cosine(
    step: int, total: int, warmup: int, peak: float, start: float = 0.0, end: float = 0.0
) -> float:
    """Linear from `start` to `peak` over `warmup` steps, then half a cosine down to `end`.

    The cosine is shifted by the warm-up, as in MAE and DINO: it begins at step `warmup` with
    the value `peak` and would reach `end` at step `total`. Steps past the end give `end`.

    Raises:
        ValueError: a warm-up that is negative or longer than the run.
    """
    if (value := outside(step, total, warmup, peak, start, end)) is not None:
        return value
    return end + 0.5 * (peak - end) * (1.0 + math.cos(math.pi * (step - warmup) / (total - warmup)))


def dino_cosine(
    step: int, total: int, warmup: int, peak: float, start: float = 0.0, end: float = 0.0
) -> float:
    """`warmup_cosine` with both ends in the warm-up: step `warmup - 1` has the peak already.

    DINO's published code (Caron et al. 2021), to the step.

    Raises:
        ValueError: a warm-up that is negative or longer than the run.
    """
    if 0 < step < warmup:
        check_fits(total, warmup, "warm-up")
        return start + (peak - start) * step / (warmup - 1)
    return warmup_cosine(step, total, warmup, peak, start, end)


def warmup_linear(
    step: int, total: int, warmup: int, peak: float, start: float = 0.0, end: float = 0.0
) -> float:
    """Linear from `start` to `peak` over `warmup` steps, then linear down to `end`.

    The original ViT's pre-training on ImageNet-21k and JFT (Dosovitskiy et al. 2020, table 3).

    Raises:
        ValueError: a warm-up that is negative or longer than the run.
    """
    if (value := outside(step, total, warmup, peak, start, end)) is not None:
        return value
    return peak + (end - peak) * (step - warmup) / (total - warmup)


def warmup_rsqrt(
    step: int,
    total: int,
    warmup: int,
    peak: float,
    start: float = 0.0,
    end: float = 0.0,
    cooldown: int = 0,
    timescale: int = 10_000,
) -> float:
    """Linear to `peak`, then peak / sqrt(1 + (step - warmup) / timescale), at last linear to `end`.

    The reciprocal square root of "Scaling Vision Transformers" (Zhai et al. 2021) and NaViT, with
    big_vision's time scale: where it stands does not depend on how long the run is, but for the
    `cooldown`, its last steps.

    Raises:
        ValueError: a warm-up or a cooldown that is negative or longer than the run.
    """
    check_fits(total, cooldown, "cooldown")
    if (value := outside(step, total, warmup, peak, start, end)) is not None:
        return value
    value = max(end, peak / math.sqrt(1.0 + (step - warmup) / timescale))
    left = min(1.0, (total - step) / cooldown) if cooldown else 1.0
    return end + (value - end) * left


def noam(
    step: int, total: int, warmup: int, peak: float, start: float = 0.0, end: float = 0.0
) -> float:
    """The Transformer's: linear to `peak` at step `warmup`, then peak * sqrt(warmup / step).

    "Attention Is All You Need" (Vaswani et al. 2017, section 5.3) counts steps from 1, has
    d^-0.5 min(s^-0.5, s warmup^-1.5) for step s of a model of width d, and so a peak of
    (d * warmup)^-0.5. Where it stands does not depend on how long the run is. After the peak it
    is never below `end`. It begins at a step of its slope, for which `start` is not asked.

    Raises:
        ValueError: no warm-up.
    """
    if warmup < 1:
        raise ValueError("schedule noam is made of its warm-up, which has no step; set it")
    place = step + 1
    if place <= warmup:
        return peak * place / warmup
    return max(end, peak * math.sqrt(warmup / place))


def outside(
    step: int, total: int, warmup: int, peak: float, start: float, end: float
) -> float | None:
    """The value before the end of the warm-up and after that of the run, None in between."""
    check_fits(total, warmup, "warm-up")
    if step < warmup:
        return start + (peak - start) * step / warmup
    return end if step >= total else None


def check_fits(total: int, length: int, what: str) -> None:
    if not 0 <= length <= total:
        raise ValueError(
            f"a {what} of {length} steps does not fit a run of {total} steps; shorten it or "
            f"train longer"
        )
