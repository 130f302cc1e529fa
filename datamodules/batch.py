"""The batch types that data modules hand to methods."""

from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int, UInt8
from torch import Tensor


class Mixed(NamedTuple):
    """What mixing two images of a batch did to their labels.

    labels: [b] class of the image that was mixed in
    share:  [b] weight of the image's own label, in [0, 1]
    """

    labels: Int[Tensor, " b"]
    share: Float[Tensor, " b"]


class SparseScores(NamedTuple):
    """Scores (logits) of all k classes for tokens, of which only some differ from a common one.

    Softmax does not see a score that all classes share, so only what is above it is kept.

    ids:    [b, n, m] int32; a class has one entry of all its value, others of value 0
    values: [b, n, m] by how much the score of that class is above that of those without an entry;
            where every class has one, the best is not below 0
    """

    ids: Int[Tensor, "*b n m"]
    values: Float[Tensor, "*b n m"]


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

    @property
    def num_images(self) -> int:
        return len(self.labels)

    def mean(self, losses: Float[Tensor, " b"]) -> Float[Tensor, ""]:
        """The loss of the batch from one of every image."""
        return losses.mean()


class TokenLabelBatch(NamedTuple):
    """Images with a teacher's scores for every token and for the whole of each crop.

    images, labels, indices, keys, is_valid, is_replaced: see `ImageBatch`
    tokens: scores of all classes for every token, row by row; None where only the crop has a label
    pooled: [b, k] the scores of all classes for the crop as a whole, above those of the rest
    """

    images: UInt8[Tensor, "b c height width"] | Float[Tensor, "b c height width"]
    labels: Int[Tensor, " b"]
    indices: Int[Tensor, " b"]
    keys: Int[Tensor, " b"]
    is_valid: Bool[Tensor, " b"]
    is_replaced: Bool[Tensor, " b"]
    tokens: SparseScores | None
    pooled: Float[Tensor, "b k"]

    @property
    def num_images(self) -> int:
        return len(self.labels)

    @property
    def mixed(self) -> None:
        """Images are not mixed; a method may mix tokens."""

    def mean(self, losses: Float[Tensor, " b"]) -> Float[Tensor, ""]:
        """The loss of the batch from one of every image."""
        return losses.mean()


class MultiCropBatch(NamedTuple):
    """Several views of every image, for methods that compare views (SwAV, DINO).

    crops:    groups of views of one size, the global ones first; each [v, b, c, height, width],
              uint8 in the worker, float32 and normalised in a method
    labels:   [b] class ids, -1 where there are none; for probes only
    indices:  [b] index in the source
    keys:     [b] what all random draws for this image in this epoch are a function of
    is_valid: [b] False for samples that only fill up a batch
    is_replaced: [b] True where the image could not be read and another took its place
    """

    crops: tuple[Tensor, ...]
    labels: Int[Tensor, " b"]
    indices: Int[Tensor, " b"]
    keys: Int[Tensor, " b"]
    is_valid: Bool[Tensor, " b"]
    is_replaced: Bool[Tensor, " b"]

    @property
    def images(self) -> Float[Tensor, "b c height width"]:
        """The first global view."""
        return self.crops[0][0]

    @property
    def num_images(self) -> int:
        return len(self.labels)

    @property
    def mixed(self) -> None:
        """Views are not mixed."""

    def mean(self, losses: Float[Tensor, " b"]) -> Float[Tensor, ""]:
        """The loss of the batch from one of every image."""
        return losses.mean()


class PackedImages(NamedTuple):
    """Images of any size, cut into patches and laid one after another into rows of one length.

    A row of n tokens has room for `slots` images, so that a batch has m = rows * slots; image
    `row * slots + slot` takes neighbouring tokens of its row: first its prefix tokens (class
    token, registers), then its patches row by row, dropped ones left out. What remains at the
    end of a row is padding. Slots fill up in order; empty ones have no tokens.

    patches:   [rows, n, c * patch * patch] uint8 in the worker, float32 and normalised in a
               method; a patch in the order (channel, row, column) of a convolution's weight;
               meaningless at prefix tokens and padding
    positions: [rows, n, 2] row and column of a patch in the grid of its image; (-1, i) at prefix
               token i, (-1, -1) at padding
    segments:  [rows, n] slot of each token within its row, -1 at padding
    grids:     [m, 2] rows and columns of patches of each image before dropping; (1, 1) where
               there is none
    offsets:   [rows * (slots + 1) + 1] int32; all tokens of the batch in one line, row after row,
               where each segment starts and ends: the slots of a row, then its padding
    num_prefix: prefix tokens of every image
    """

    patches: UInt8[Tensor, "rows n e"] | Float[Tensor, "rows n e"]
    positions: Int[Tensor, "rows n 2"]
    segments: Int[Tensor, "rows n"]
    grids: Int[Tensor, "m 2"]
    offsets: Int[Tensor, " o"]
    num_prefix: int


Images = Float[Tensor, "b c height width"] | PackedImages  # what a backbone takes


class PackedBatch(NamedTuple):
    """Packed images with labels, the same shapes in every batch of a run.

    images:   see `PackedImages`
    labels:   [m] class ids, 0 in empty slots
    indices:  [m] index in the source, -1 in empty slots
    keys:     [m] what all random draws for this image in this epoch are a function of
    is_valid: [m] False in empty slots and for unreadable images in evaluation
    is_replaced: [m] True where the image could not be read; in training another took its place
    divisor:  [] float32; the sum of the losses of this batch divided by it, averaged over devices
              and accumulated micro-batches, is the mean over the images of the optimizer step
    num_images: images in the batch
    num_tokens: tokens in the batch that are no padding
    """

    images: PackedImages
    labels: Int[Tensor, " m"]
    indices: Int[Tensor, " m"]
    keys: Int[Tensor, " m"]
    is_valid: Bool[Tensor, " m"]
    is_replaced: Bool[Tensor, " m"]
    divisor: Float[Tensor, ""]
    num_images: int
    num_tokens: int

    @property
    def mixed(self) -> None:
        """Images of different size are not mixed."""

    def mean(self, losses: Float[Tensor, " m"]) -> Float[Tensor, ""]:
        """The loss of the batch from one of every slot; every image counts alike.

        Devices and micro-batches hold different numbers of images, hence the divisor.
        """
        return torch.where(self.is_valid, losses, 0.0).sum() / self.divisor


class TextBatch(NamedTuple):
    """Pairs of texts as numbers of tokens; what follows the end of a text is padding, token 0.

    source:         [b, s] what is translated
    source_lengths: [b] its tokens
    target:         [b, t] the translation between its marks of start and end
    target_lengths: [b] its tokens, the marks among them
    indices:        [b] index in the source of pairs
    keys:           [b] what all random draws for this pair in this epoch are a function of
    is_valid:       [b] False for pairs that only fill up a batch
    """

    source: Int[Tensor, "b s"]
    source_lengths: Int[Tensor, " b"]
    target: Int[Tensor, "b t"]
    target_lengths: Int[Tensor, " b"]
    indices: Int[Tensor, " b"]
    keys: Int[Tensor, " b"]
    is_valid: Bool[Tensor, " b"]

    @property
    def num_pairs(self) -> int:
        return len(self.keys)

    @property
    def inputs(self) -> Int[Tensor, "b u"]:
        """What a decoder is given: the target without its last token, u = t - 1."""
        return self.target[:, :-1]

    @property
    def wanted(self) -> Int[Tensor, "b u"]:
        """What it is to say: one step ahead, and without the mark of the start."""
        return self.target[:, 1:]

    @property
    def is_wanted(self) -> Bool[Tensor, "b u"]:
        """False at padding."""
        places = torch.arange(self.target.shape[1] - 1, device=self.target.device)
        return places < self.target_lengths[:, None] - 1
