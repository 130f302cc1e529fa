"""Images some of whose patches the network does not see: a learned token stands in for them.

"iBOT: Image BERT Pre-Training with Online Tokenizer" (Zhou et al. 2021, section 3.1), after BEiT
(Bao et al. 2021). The token takes the place of the projected patch, before positions are added,
so that the network still knows which patch is missing.
"""

from typing import NamedTuple

import torch
from jaxtyping import Bool, Float
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
        if self.is_masked.shape != patches.shape[:2]:
            raise ValueError(
                f"a mask of {tuple(self.is_masked.shape)} reached images that are "
                f"{tuple(patches.shape[:2])} patches; make it for their grid"
            )
        return torch.where(self.is_masked[..., None], self.token.to(patches.dtype), patches)


Group = Tensor | Masked  # images of one size


def pixels(images: Group) -> Float[Tensor, "b c height width"]:
    return images.images if isinstance(images, Masked) else images
