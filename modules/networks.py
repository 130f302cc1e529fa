"""What networks around a backbone share: judged by name, layers, the data they are given."""

from collections.abc import Mapping
from typing import Any, Protocol, runtime_checkable

from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from datamodules.batch import Images
from datamodules.module import Needs, SourceDataModule
from modules.backbones import Backbone


@runtime_checkable
class HasBackbone(Protocol):
    """A network around a backbone."""

    @property
    def backbone(self) -> Backbone: ...

    def embed(self, images: Images) -> Float[Tensor, "b d"]: ...


class AroundBackbone(nn.Module):
    """A network whose parameters are a backbone's and others that come after its last block.

    Attributes:
        entries: methods beside `forward` by which others read it. Where weights are spread over
            devices, these gather them; what is called on its parts does not.
    """

    backbone: Backbone
    entries: tuple[str, ...] = ("embed",)

    def embed(self, images: Images) -> Float[Tensor, "b d"]:
        """One vector an image."""
        pooled: Tensor = self.backbone(images).pooled
        return pooled

    @property
    def num_layers(self) -> int:
        return self.backbone.num_layers

    def layer_of(self, name: str) -> int:
        """The layer of a parameter, for layer decay."""
        inner = name.removeprefix("backbone.")
        return self.num_layers + 1 if inner == name else self.backbone.layer_of(inner)


def fit_data(data: Any, backbone: Backbone) -> None:
    """Tell a data module of ours what the backbone takes; others are left as they are."""
    if isinstance(data, SourceDataModule):
        data.fit_to(Needs.of(backbone))


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
    return networks[name].embed(images)


def teaching(teacher: nn.Module) -> None:
    """Eval mode while the student trains, but for batch norms, which go by their batch.

    As published for DINO and MoCo v3. The student's running statistics are those of other weights,
    and a teacher that borrowed them would give other features than its own.
    """
    teacher.eval()
    for part in teacher.modules():
        if isinstance(part, _BatchNorm):
            part.train()
