"""Data modules that a recipe can name.

    images.py        ImageDataModule       labelled images of any source, cropped and augmented
    multicrop.py     MultiCropDataModule   two global and several local views of every image
    token_labels.py  TokenLabelDataModule  images with a teacher's label for every token
    packed.py        PackedDataModule      images in their own aspect, of many sizes, packed in rows
    text.py          TextDataModule        pairs of texts, generated or from a file

and what they are made of: `sources`, `folder`, `index`, `of_torchvision`, `shards`, `fetch`,
`urls`, `disk`, `convert`, `foreign`, `sizes`, `pairs`, `vocabulary`, `sampling`, `placed`,
`one_size`, `geometry`, `views`, `photometric`, `augment`, `packing`, `rows`, `cutting`, `batch`,
`label_geometry`, `label_maps`, `label_shards`, `published_maps`.
"""

from datamodules.images import ImageDataModule
from datamodules.multicrop import MultiCropDataModule
from datamodules.packed import PackedDataModule
from datamodules.text import TextDataModule
from datamodules.token_labels import TokenLabelDataModule

__all__ = [
    "ImageDataModule",
    "MultiCropDataModule",
    "PackedDataModule",
    "TextDataModule",
    "TokenLabelDataModule",
]
