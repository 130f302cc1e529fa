"""Factorised positions: one function of the row, one of the column, put together.

"Patch n' Pack: NaViT" (Dehghani et al. 2023, https://arxiv.org/abs/2307.06304, section on
factorised and fractional positions). Learned Fourier features are those of "Learnable Fourier
Features for Multi-Dimensional Spatial Positional Encoding" (Li et al. 2021), one axis at a time.
"""

import math
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

KINDS = ("learned", "sinusoidal", "fourier")
COORDINATES = ("absolute", "fractional")
COMBINATIONS = ("add", "stack", "multiply")
# Rows of learned tables: sides of 1024 px at patches of 16.
MAX_SIDE = 64


@dataclass(frozen=True)
class FactorisedPositions:
    """Positions that are a function of the row and a function of the column.

    Args:
        kind: "learned" (a table for each axis), "sinusoidal" (fixed sines and cosines of
            frequencies 10000^(-i / q)), "fourier" (sines and cosines of learned frequencies, then
            a linear layer).
        coordinates: "absolute" (the index of the row or column) or "fractional" (the index
            divided by the image's rows or columns, in [0, 1); learned tables are read between
            their rows).
        combine: "add", "stack" (half of the width for each axis) or "multiply".
        max_side: rows of the learned tables; with absolute coordinates the largest number of
            patches along a side. For fixed sines of fractional coordinates, what they are
            multiplied by: every image is as long as one of so many patches. null: 64.

    Raises:
        ValueError: an unknown value, a `max_side` that nothing reads or that is below 1 (2 for
            fractional coordinates in a learned table).
    """

    kind: Literal["learned", "sinusoidal", "fourier"] = "learned"
    coordinates: Literal["absolute", "fractional"] = "absolute"
    combine: Literal["add", "stack", "multiply"] = "add"
    max_side: int | None = None

    def __post_init__(self) -> None:
        known = (("kind", KINDS), ("coordinates", COORDINATES), ("combine", COMBINATIONS))
        for name, values in known:
            if getattr(self, name) not in values:
                raise ValueError(
                    f"positions.{name} is {getattr(self, name)!r}; expected one of "
                    f"{', '.join(values)}"
                )
        if self.max_side is None:
            return
        is_fractional = self.coordinates == "fractional"
        if self.kind == "fourier" or (self.kind == "sinusoidal" and not is_fractional):
            raise ValueError(
                f"positions.max_side is {self.max_side}, but kind {self.kind} with "
                f"{self.coordinates} coordinates has no use for it; remove it"
            )
        least = 2 if self.kind == "learned" and is_fractional else 1
        if self.max_side < least:
            raise ValueError(f"positions.max_side is {self.max_side}; expected at least {least}")

    @property
    def side(self) -> int:
        """`max_side` with its default filled in."""
        return MAX_SIDE if self.max_side is None else self.max_side

    @property
    def max_grid(self) -> int | None:
        """The largest number of patches along a side of an image; None for no limit."""
        is_limited = self.kind == "learned" and self.coordinates == "absolute"
        return self.side if is_limited else None


class Factorised(nn.Module):
    """What `FactorisedPositions` describes, for a width.

    Raises:
        ValueError: a width that the axes cannot share or that sines and cosines cannot.
    """

    frequencies: Tensor

    def __init__(self, how: FactorisedPositions, dim: int) -> None:
        super().__init__()
        self.how = how
        parts = (2 if how.combine == "stack" else 1) * (1 if how.kind == "learned" else 2)
        if dim % parts:
            raise ValueError(
                f"width {dim} is no multiple of {parts}, as {how.kind} positions that "
                f"{how.combine} need; set embed_dim so that it is"
            )
        width = dim // 2 if how.combine == "stack" else dim
        self.rows: nn.Parameter | None = None
        self.columns: nn.Parameter | None = None
        if how.kind == "learned":
            self.rows = nn.Parameter(torch.zeros(how.side, width))
            self.columns = nn.Parameter(torch.zeros(how.side, width))
        elif how.kind == "fourier":
            self.fourier_rows = Fourier(width, how.coordinates)
            self.fourier_columns = Fourier(width, how.coordinates)
        else:
            steps = torch.arange(width // 2, dtype=torch.float64) / (width // 2)
            self.register_buffer("frequencies", (10000.0**-steps).float(), persistent=False)

    def forward(
        self, positions: Int[Tensor, "*b 2"], grids: Int[Tensor, "*b 2"]
    ) -> Float[Tensor, "*b d"]:
        """Of every token, given its row and column and those of its image's grid.

        Tokens that are no patches (negative positions) get something that means nothing.
        """
        index = positions.clamp(min=0)
        place: Tensor = index
        if self.how.coordinates == "fractional":
            place = index / grids
        row = self.axis(place[..., 0], self.rows, "rows")
        column = self.axis(place[..., 1], self.columns, "columns")
        if self.how.combine == "add":
            return row + column
        return row * column if self.how.combine == "multiply" else torch.cat((column, row), dim=-1)

    def axis(
        self, place: Tensor, table: Float[Tensor, "side half"] | None, name: str
    ) -> Float[Tensor, "*b half"]:
        """The function of one axis."""
        if table is not None:
            return (
                F.embedding(place, table) if not place.is_floating_point() else read(table, place)
            )
        if self.how.kind == "fourier":
            out: Tensor = getattr(self, f"fourier_{name}")(place.float())
            return out
        unit = self.how.side if self.how.coordinates == "fractional" else 1
        return waves(place.float() * unit, self.frequencies)


def read(table: Float[Tensor, "side half"], place: Float[Tensor, "*b"]) -> Float[Tensor, "*b half"]:
    """A table whose rows lie evenly over [0, 1], read between them."""
    where = place * (table.shape[0] - 1)
    low = where.floor().clamp(max=table.shape[0] - 2)
    share = (where - low)[..., None].to(table.dtype)
    below = low.long()
    return (1 - share) * F.embedding(below, table) + share * F.embedding(below + 1, table)


def waves(
    place: Float[Tensor, "*b"], frequencies: Float[Tensor, " half"]
) -> Float[Tensor, "*b both"]:
    angles = place[..., None] * frequencies
    return torch.cat((angles.sin(), angles.cos()), dim=-1)


class Fourier(nn.Module):
    """W [sin(f p), cos(f p)] / sqrt(width) + b with learned frequencies f.

    Frequencies start normal. Their spread is the paper's one choice that it leaves open: places
    differ from those about 2 patches away, or a tenth of the image with fractional coordinates.
    """

    START = {"absolute": 0.5, "fractional": 10.0}  # noqa: RUF012 - read only

    def __init__(self, width: int, coordinates: str) -> None:
        super().__init__()
        self.frequencies = nn.Parameter(torch.randn(width // 2) * self.START[coordinates])
        self.linear = nn.Linear(width, width)

    def forward(self, place: Float[Tensor, "*b"]) -> Float[Tensor, "*b half"]:
        # Half precision has no room for the angle of a far patch.
        with torch.autocast(place.device.type, enabled=False):
            features = waves(place, self.frequencies.float())
        out: Tensor = self.linear(features / math.sqrt(features.shape[-1]))
        return out
