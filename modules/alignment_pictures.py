"""Pictures of where a decoder looks in the source of a text."""

import math
from typing import Any

from jaxtyping import Float, Int
from matplotlib.figure import Figure
from torch import Tensor

from datamodules.batch import TextBatch
from datamodules.vocabulary import END, Codec
from modules.drawing import COLOURS, DPI, Picture, rendered


def alignments(
    codec: Codec,
    batch: TextBatch,
    tokens: Int[Tensor, "b t"],
    weights: Float[Tensor, "b t s"],
) -> Picture:
    """For each pair the weights of its source's tokens, a row for each token that was said."""
    count = len(tokens)
    across = math.ceil(math.sqrt(count))
    down = math.ceil(count / across)
    figure = Figure(figsize=(8 * across, 8 * down), dpi=DPI, layout="constrained")
    axes: Any = figure.subplots(down, across, squeeze=False)
    for place in axes.flat[count:]:
        place.set_axis_off()
    for i, place in enumerate(axes.flat[:count]):
        said = tokens[i].tolist()
        said = said[: said.index(codec.end) + 1] if codec.end in said else said
        length = int(batch.source_lengths[i])
        shown = weights[i, : len(said), :length].detach().float().cpu().numpy()
        place.imshow(shown, cmap=COLOURS, vmin=0, vmax=1, interpolation="nearest", aspect="auto")
        read = [codec.source.tokens[j] for j in batch.source[i, :length].tolist()]
        spoken = [codec.target.tokens[j].replace(END, "end") for j in said]
        turn = 0 if codec.source.level == "characters" else 90
        place.set_xticks(range(length), read, fontsize=7, rotation=turn)
        place.set_yticks(range(len(said)), spoken, fontsize=7)
        place.set_title(f"{''.join(read)}\n{codec.target.decode(said)}", fontsize=9)
    return rendered(figure)
