"""Images some of whose patches the network does not see, or sees those of another image for.

`Masked`: a learned token stands in for them,
"iBOT: Image BERT Pre-Training with Online Tokenizer" (Zhou et al. 2021, section 3.1), after BEiT
(Bao et al. 2021).

`Swapped`: the patches of a partner do, "All Tokens Matter: Token Labeling for Training Better
Vision Transformers" (Jiang et al. 2021, section 3.2, MixToken). Both take the place of the
projected patch, before positions are added, so that the network still knows where it is.

`Visible`: they are not there at all, "Masked Autoencoders Are Scalable Vision Learners" (He et al.
2021, section 3). The others keep their positions, and what is not there costs nothing.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from einops import rearrange
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


class Part(NamedTuple):
    """Where some patches of images are, each image with a choice of its own.

    grid:   rows and columns of patches of the whole images
    places: [b, kept] which patches, counted row by row
    """

    grid: tuple[int, int]
    places: Int[Tensor, "b kept"]

    def rows(self, table: Float[Tensor, "1 n d"], num_prefix: int) -> Float[Tensor, "b kept_n d"]:
        """The rows that a table for all tokens has for prefix tokens and for these patches."""
        prefix = table[:, :num_prefix].expand(len(self.places), -1, -1)
        return torch.cat((prefix, F.embedding(self.places, table[0, num_prefix:])), dim=1)


class Visible(NamedTuple):
    """Images of one size of which some patches are there and no others.

    A backbone with `takes_visible` takes them for images.

    images: [b, c, height, width]
    places: [b, kept] the patches that are there, counted row by row; each once
    """

    images: Float[Tensor, "b c height width"]
    places: Int[Tensor, "b kept"]

    def patches(self, patch_size: int) -> Float[Tensor, "b kept e"]:
        """Their pixels in the order (channel, row, column); those of others are not touched."""
        cut = rearrange(self.images, "b c (y p) (x q) -> b y x c p q", p=patch_size, q=patch_size)
        image = torch.arange(len(cut), device=cut.device)[:, None]
        columns = cut.shape[2]
        return cut[image, self.places // columns, self.places % columns].flatten(2)


Altered = Masked | Swapped
Group = Tensor | Masked | Swapped  # images of one size


def check_mask(mask: Bool[Tensor, "_ _"], num_images: int, num_patches: int) -> None:
    if mask.shape != (num_images, num_patches):
        raise ValueError(
            f"a mask of {tuple(mask.shape)} reached images that are "
            f"{(num_images, num_patches)} patches; make it for their grid"
        )


def pixels(images: Group | Visible) -> Float[Tensor, "b c height width"]:
    return images if isinstance(images, Tensor) else images.images
