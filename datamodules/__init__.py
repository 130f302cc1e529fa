"""Data modules that a recipe can name.

    images.py   ImageDataModule   labelled images of any source, cropped and augmented

and what they are made of: `sources`, `sizes`, `sampling`, `geometry`, `photometric`, `augment`,
`batch`.
"""

from datamodules.images import ImageDataModule

__all__ = ["ImageDataModule"]
