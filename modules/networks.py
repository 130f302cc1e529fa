"""The networks of a method that can be judged, by name."""

from collections.abc import Mapping
from typing import Protocol, runtime_checkable

from jaxtyping import Float
from torch import Tensor

from datamodules.batch import Images
from modules.backbones import Backbone


@runtime_checkable
class HasBackbone(Protocol):
    """A network around a backbone."""

    @property
    def backbone(self) -> Backbone: ...


def embed(
    networks: Mapping[str, HasBackbone], images: Images, name: str | None
) -> Float[Tensor, "b d"]:
    """One vector an image, of the network of this name; of the first one where none is named.

    Raises:
        ValueError: no such network.
    """
    name = next(iter(networks)) if name is None else name
    if name not in networks:
        raise ValueError(f"there is no network {name!r}; there is {', '.join(networks)}")
    pooled: Tensor = networks[name].backbone(images).pooled
    return pooled
