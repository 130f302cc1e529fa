"""Pictures of the labels of tokens: over a crop, the class of every patch in its colour."""

import colorsys
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Float, Int
from matplotlib.figure import Figure
from torch import Tensor

from datamodules.batch import SparseScores, TokenLabelBatch
from datamodules.token_labels import TokenLabelDataModule
from modules.drawing import DPI, GAP, Picture, for_the_eye, mosaic, rendered, stretch
from modules.token_loss import softmax_targets

COLUMNS = 2  # crops beside each other
GOLDEN = 0.618  # of the colour circle from one class to the next: neighbours are far apart
OPAQUE = 0.75  # how far a sure label hides the crop
TOLD = 12  # classes that the legend names


class Best(NamedTuple):
    """The likeliest class of every token, and its probability."""

    classes: Int[Tensor, "b n"]
    share: Float[Tensor, "b n"]


def best_scored(scores: SparseScores, num_classes: int) -> Best:
    """Of a teacher's scores."""
    targets = softmax_targets(scores, num_classes, smoothing=0.0)
    weight, place = targets.weights.max(dim=-1)
    classes = targets.ids.gather(-1, place[..., None])[..., 0]
    return Best(classes.long(), targets.base + weight)


def best_said(logits: Float[Tensor, "b n k"]) -> Best:
    """Of a network's logits."""
    share, classes = logits.float().softmax(dim=-1).max(dim=-1)
    return Best(classes, share)


def colour_of(number: int) -> tuple[float, float, float]:
    return colorsys.hsv_to_rgb(GOLDEN * number % 1.0, 0.9, 0.95 - 0.3 * (number % 3) / 2)


def token_labels(
    batch: TokenLabelBatch,
    logits: Float[Tensor, "b n k"],
    grid: tuple[int, int] | None,
    data: TokenLabelDataModule,
) -> Picture:
    """Of every crop: as it is, the teacher's labels over it, and what the network says of it.

    A class has its colour, as strong as it is likely; below, the most frequent ones are named.

    Args:
        batch: normalised crops of `data` with labels for their tokens.
        logits: the network's for these tokens, `grid` rows and columns of them.
    """
    assert batch.tokens is not None
    assert grid is not None  # these are no pack
    found = (best_scored(batch.tokens, logits.shape[2]), best_said(logits))
    shown = for_the_eye(batch.images.cpu(), data.mean, data.std)
    tiles = [shown, *(over(shown, best, grid) for best in found)]
    trios = torch.stack(tiles, dim=1)
    columns = min(COLUMNS, len(trios))
    lines = [some.flatten(0, 1) for some in torch.split(trios, columns)]
    title = "the class of every token, in colours as strong as it is likely"
    picture = mosaic(lines, title, ("crop", "token labels", "network") * columns)
    present = torch.cat([best.classes.flatten() for best in found]).bincount().cpu()
    told = [int(c) for c in present.argsort(descending=True, stable=True)[:TOLD] if present[c] > 0]
    legend = legend_of(sorted(told), data.class_names, picture.shape[2])
    return torch.cat((picture, legend), dim=1)


def over(
    images: Float[Tensor, "b 3 height width"], best: Best, grid: tuple[int, int]
) -> Float[Tensor, "b 3 height width"]:
    """Labels in colours over the images in grey."""
    rows = {"y": grid[0], "x": grid[1]}
    highest = int(best.classes.max()) + 1
    palette = torch.tensor([colour_of(number) for number in range(highest)])
    colours = rearrange(palette[best.classes.cpu()], "b (y x) c -> b c y x", **rows)
    share = rearrange(best.share.float().cpu(), "b (y x) -> b 1 y x", **rows)
    strength = OPAQUE * stretch(share, images)
    return torch.lerp(images.mean(dim=1, keepdim=True), stretch(colours, images), strength)


def legend_of(told: Sequence[int], names: Sequence[str], width: int) -> Picture:
    """Classes by name beside their colour, in lines of a picture of that width."""
    wide, high = 104, 22
    per_line = max(1, (width - 2 * GAP) // wide)
    height = high * -(-len(told) // per_line) + GAP
    figure = Figure(figsize=(width / DPI, height / DPI), dpi=DPI)
    for i, number in enumerate(told):
        line, place = divmod(i, per_line)
        x, y = (8 + place * wide) / width, 1 - (line + 0.5) * high / height
        style: dict[str, Any] = {"va": "center", "fontsize": 12 * 72 / DPI}
        figure.text(x, y, "\N{BLACK SQUARE}", color=colour_of(number), **style)
        name = names[number] if number < len(names) else str(number)
        figure.text(x + 14 / width, y, name, **style)
    drawn = rendered(figure)
    # A fraction of a pixel may be lost where inches become pixels.
    return F.pad(drawn, (0, width - drawn.shape[2]), value=1.0)
