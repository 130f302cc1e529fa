"""The run-time type checker of the tests: an int will do where a float is asked for."""

import dataclasses
from typing import Any

from beartype import BeartypeConf, beartype

checker = beartype(conf=BeartypeConf(is_pep484_tower=True))


def unchecked(family: type, arguments: dict[str, Any]) -> None:
    """Run a dataclass's own checks on values that its type hints would stop in a test."""
    instance = object.__new__(family)
    instance.__dict__.update({f.name: f.default for f in dataclasses.fields(family)} | arguments)
    instance.__post_init__()  # type: ignore[attr-defined]
