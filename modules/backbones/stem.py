"""A Vision Transformer whose patches come from a deeper network than one projection."""

from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn

from modules.backbones import initialise
from modules.backbones.attention import Packed
from modules.backbones.layers import Features
from modules.backbones.masked import Altered, Masked, Visible
from modules.backbones.resampling import Grid
from modules.backbones.vit import ViT

Init = Literal["timm", "dino", "jax", "mae", "moco"]


class StemViT(ViT):
    """A ViT that is given its patch embedding, which looks beyond the edge of a patch.

    So it takes neither packs nor some of the patches; hidden ones have the mean colour.
    """

    def use_stem(self, stem: nn.Module, init: str | None) -> None:
        """Make patches with `stem` ([b, c, height, width] to [b, n, d], row by row).

        It begins by the rule `init`, or as it is where there is none.
        """
        if init is not None:
            initialise.RULES[init](stem)
        self.patch_embed = stem  # type: ignore[assignment]
        self.takes_packs = self.takes_visible = False

    def last_blocks(
        self, images: Float[Tensor, "b c height width"] | Altered | Visible | Packed, count: int
    ) -> list[Features]:
        if isinstance(images, (Tensor, Altered)):
            return super().last_blocks(images, count)
        what = "some of the patches" if isinstance(images, Visible) else "a pack"
        raise ValueError(
            f"{what} reached a {type(self).__name__}, whose stem looks beyond the edge of a patch "
            f"and needs whole images of one size; use modules.backbones.ViT"
        )

    def embed(
        self, images: Float[Tensor, "b c height width"] | Altered, grid: Grid
    ) -> Float[Tensor, "b n d"]:
        """As in ViT; hidden patches have the mean colour, which their neighbours see of them."""
        if isinstance(images, Masked) and images.is_masked.shape[1] == grid[0] * grid[1]:
            hidden = images.is_masked.view(-1, 1, *grid)
            for axis in (2, 3):
                hidden = hidden.repeat_interleave(self.patch_size, axis)
            images = images._replace(images=torch.where(hidden, 0.0, images.images))
        return super().embed(images, grid)
