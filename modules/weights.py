"""Checkpoints of other code bases in."""

from collections.abc import Mapping

from torch import Tensor

HEAD = ("head.",)


def from_timm(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A timm ViT's state dict with the names of `modules.supervised.Classifier`.

    The backbone keeps timm's keys below `backbone.`; the head keeps its own.
    """
    renamed = {"pos_embed": "positions.table"}
    return {
        name if name.startswith(HEAD) else f"backbone.{renamed.get(name, name)}": value
        for name, value in state.items()
    }
