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
    check_fits(total, warmup)
    if step < warmup:
        return start + (peak - start) * step / warmup
    if step >= total:
        return end
    return end + 0.5 * (peak - end) * (1.0 + math.cos(math.pi * (step - warmup) / (total - warmup)))


def warmup_linear(
    step: int, total: int, warmup: int, peak: float, start: float = 0.0, end: float = 0.0
) -> float:
    """Linear from `start` to `peak` over `warmup` steps, then linear down to `end`.

    The original ViT's pre-training on ImageNet-21k and JFT (Dosovitskiy et al. 2020, table 3).

    Raises:
        ValueError: a warm-up that is negative or longer than the run.
    """
    check_fits(total, warmup)
    if step < warmup:
        return start + (peak - start) * step / warmup
    if step >= total:
        return end
    return peak + (end - peak) * (step - warmup) / (total - warmup)


def check_fits(total: int, warmup: int) -> None:
    if not 0 <= warmup <= total:
        raise ValueError(
            f"a warm-up of {warmup} steps does not fit a run of {total} steps; "
            f"shorten the warm-up or train longer"
        )
