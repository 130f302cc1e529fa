"""Data modules that a recipe can name.

    images.py   ImageDataModule    labelled images of any source, cropped and augmented
    packed.py   PackedDataModule   the same in their own aspect and many sizes, packed into rows

and what they are made of: `sources`, `sizes`, `sampling`, `geometry`, `photometric`, `augment`,
`packing`, `rows`, `batch`.
"""

from datamodules.images import ImageDataModule
from datamodules.packed import PackedDataModule

__all__ = ["ImageDataModule", "PackedDataModule"]
