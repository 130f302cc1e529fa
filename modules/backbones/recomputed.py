"""Memory against time: only the input of a part is kept, and the part is computed again.

"Training Deep Nets with Sublinear Memory Cost" (Chen et al. 2016).
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor
from torch.utils.checkpoint import checkpoint

Call = tuple[Callable[..., Any], tuple[Any, ...]]  # a function and its arguments
noted: list[Call] | None = None  # while somebody asks for them


@contextmanager
def noting_calls() -> Iterator[list[Call]]:
    """What is given to `recomputed` meanwhile."""
    global noted
    noted, before = [], noted
    try:
        yield noted
    finally:
        noted = before


def recomputed(
    function: Callable[..., Any], x: Tensor, *others: Any, draws_numbers: bool = True
) -> Any:
    """`function(x, *others)`, computed again in the backward pass.

    On a TPU by torch_xla, whose compiler would else see that both are the same and keep the first.
    It wants an x with a gradient: a part whose x has none, as behind a frozen patch projection, is
    kept.

    Args:
        function: a module or a function; what has a gradient is among its arguments or parameters.
        x: of any shape.
        others: further arguments.
        draws_numbers: the function draws random numbers, which are to be the same again.
    """
    if noted is not None:
        noted.append((function, (x, *others)))
    if x.device.type != "xla":
        return checkpoint(
            *(function, x, *others), use_reentrant=False, preserve_rng_state=draws_numbers
        )
    if not x.requires_grad:
        return function(x, *others)
    from torch_xla.utils.checkpoint import checkpoint as checkpoint_on_xla

    bound: Any = function  # of a bound method it knows the module's parameters
    return checkpoint_on_xla(bound.__call__, x, *others, preserve_rng_state=draws_numbers)
