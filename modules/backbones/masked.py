"""Images some of whose patches the network does not see, or sees those of another image for.

Masked: a learned token stands in for them. "iBOT: Image BERT Pre-Training with Online Tokenizer"
(Zhou et al. 2021, section 3.1), after BEiT (Bao et al. 2021).
Swapped: the patches of a partner do. "All Tokens Matter: Token Labeling for Training Better Vision
Transformers" (Jiang et al. 2021, section 3.2, MixToken).

Both take the place of the projected patch, before positions are added.
"""

from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor


class Masked(NamedTuple):
    """Images of one size with a mask; a backbone with `takes_masks` takes them for images.

    images:    [b, c, height, width]
    is_masked: [b, n] True where the token stands for a patch; patches row by row
    token:     [1, d] in the backbone's width
    """

    images: Float[Tensor, "b c height width"]
    is_masked: Bool[Tensor, "b n"]
    token: Float[Tensor, "1 d"]

    def over(self, patches: Float[Tensor, "b n d"]) -> Float[Tensor, "b n d"]:
        """Projected patches with the token in its places.

        Raises:
            ValueError: a mask of another number of images or patches.
        """
        check_mask(self.is_masked, *patches.shape[:2])
        return torch.where(self.is_masked[..., None], self.token.to(patches.dtype), patches)


class Swapped(NamedTuple):
    """Images of one size some of whose patches are those of other images of the batch.

    images:     [b, c, height, width]
    is_swapped: [b, n] True where the partner's patch stands for the own one; patches row by row
    partner:    [b] index within the batch
    """

    images: Float[Tensor, "b c height width"]
    is_swapped: Bool[Tensor, "b n"]
    partner: Int[Tensor, " b"]

    def over(self, patches: Float[Tensor, "b n d"]) -> Float[Tensor, "b n d"]:
        """Projected patches with the partner's in their places; where partners are mutual and
        share their mask, doing it twice changes nothing.

        Raises:
            ValueError: a mask of another number of images or patches.
        """
        check_mask(self.is_swapped, *patches.shape[:2])
        return torch.where(self.is_swapped[..., None], patches[self.partner], patches)


Altered = Masked | Swapped
Group = Tensor | Masked | Swapped  # images of one size


def check_mask(mask: Bool[Tensor, "_ _"], num_images: int, num_patches: int) -> None:
    if mask.shape != (num_images, num_patches):
        raise ValueError(
            f"a mask of {tuple(mask.shape)} reached images that are "
            f"{(num_images, num_patches)} patches; make it for their grid"
        )


def pixels(images: Group) -> Float[Tensor, "b c height width"]:
    return images if isinstance(images, Tensor) else images.images
