"""Tables of constants: made once, kept, and the same for whoever asks."""

from collections.abc import Callable
from functools import lru_cache, wraps
from typing import ParamSpec, TypeVar

import torch
from torch._subclasses.fake_tensor import unset_fake_temporarily

Asked = ParamSpec("Asked")
Table = TypeVar("Table")


def table(make: Callable[Asked, Table]) -> Callable[Asked, Table]:
    """A function of numbers, tuples and devices whose tensors are worked out once for each of them.

    They are made on the CPU, whatever the default device is, are no inference tensors even where a
    network is evaluated first, and have values even where its shapes are all that is looked at.
    A compiler takes them as constants: it would trace through a cache. Tuples with names come out
    of it with their fields nested (torch 2.15), so callers give plain ones.
    """

    @lru_cache(maxsize=512)  # what a network needs for images of some sizes
    def made(*given: Asked.args, **named: Asked.kwargs) -> Table:
        with (
            torch.inference_mode(False),
            torch.no_grad(),
            torch.device("cpu"),
            unset_fake_temporarily(),
        ):
            return make(*given, **named)

    @wraps(make)
    def kept(*given: Asked.args, **named: Asked.kwargs) -> Table:
        return made(*given, **named)  # type: ignore[arg-type]

    constant: Callable[Asked, Table]
    constant = torch.compiler.assume_constant_result(kept)  # type: ignore[no-untyped-call]
    return constant
