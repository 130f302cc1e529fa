"""The batch types that data modules hand to methods."""

from typing import NamedTuple

from jaxtyping import Bool, Float, Int, UInt8
from torch import Tensor


class Mixed(NamedTuple):
    """What mixing two images of a batch did to their labels.

    labels: [b] class of the image that was mixed in
    share:  [b] weight of the image's own label, in [0, 1]
    """

    labels: Int[Tensor, " b"]
    share: Float[Tensor, " b"]


class ImageBatch(NamedTuple):
    """Images with labels.

    images:   [b, c, height, width] uint8 in the worker, float32 and normalised in a method
    labels:   [b] class ids, -1 where there is none
    indices:  [b] index in the source
    keys:     [b] what all random draws for this image in this epoch are a function of; another
              for every copy of it
    is_valid: [b] False for samples that only fill up a batch and for unreadable images in
              evaluation: they count in no metric
    is_replaced: [b] True where the image could not be read; in training another took its place
    mixed:    set by augmentation when images were mixed
    """

    images: UInt8[Tensor, "b c height width"] | Float[Tensor, "b c height width"]
    labels: Int[Tensor, " b"]
    indices: Int[Tensor, " b"]
    keys: Int[Tensor, " b"]
    is_valid: Bool[Tensor, " b"]
    is_replaced: Bool[Tensor, " b"]
    mixed: Mixed | None = None
