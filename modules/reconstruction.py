"""Pictures of what a masked autoencoder makes of images: before, what it sees, what it predicts."""

from collections.abc import Sequence

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from modules.drawing import Picture, for_the_eye, mosaic, stretch

GREY = 0.5
COLUMNS = 2  # images beside each other


def reconstruction(
    images: Float[Tensor, "b c height width"],
    predicted: Float[Tensor, "b c height width"],
    is_removed: Bool[Tensor, "b 1 rows columns"],
    mean: Sequence[float],
    std: Sequence[float],
) -> Picture:
    """Of every image: as it is, its visible patches, and these with what was predicted of others.

    Args:
        images, predicted: normalised with `mean` and `std`, a number a channel.
        is_removed: patches.
    """
    shown, painted = (for_the_eye(x.cpu(), mean, std) for x in (images, predicted))
    removed = stretch(is_removed.cpu().float(), shown) > 0
    masked = torch.where(removed, GREY, shown)
    tiles = [shown, masked, torch.where(removed, painted, shown)]
    names = ("image", "visible", "predicted")
    trios = torch.stack(tiles, dim=1)  # an image a line, or two
    columns = min(COLUMNS, len(trios))
    lines = [some.flatten(0, 1) for some in torch.split(trios, columns)]
    share = f"{100 * float(is_removed.float().mean()):.0f} %"
    return mosaic(lines, f"predicted of the {share} of patches that are removed", names * columns)
