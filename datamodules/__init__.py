"""Data modules that a recipe can name.

    images.py     ImageDataModule      labelled images of any source, cropped and augmented
    multicrop.py  MultiCropDataModule  two global and several local views of every image
    packed.py     PackedDataModule     images in their own aspect and many sizes, packed into rows
    text.py       TextDataModule       pairs of texts, generated or from a file

and what they are made of: `sources`, `shards`, `fetch`, `convert`, `foreign`, `sizes`, `pairs`,
`vocabulary`, `sampling`, `placed`, `one_size`, `geometry`, `views`, `photometric`, `augment`,
`packing`, `rows`, `batch`.
"""

from datamodules.images import ImageDataModule
from datamodules.multicrop import MultiCropDataModule
from datamodules.packed import PackedDataModule
from datamodules.text import TextDataModule

__all__ = ["ImageDataModule", "MultiCropDataModule", "PackedDataModule", "TextDataModule"]
