"""Backbones: pixels in, `Features` out. Nothing here knows about training.

Dimension letters, used in every shape of the code base:
    b batch            n tokens           d width            h heads
    c image channels   k classes or prototypes               m images in a pack
    g / l global / local crops

A backbone keeps timm's state-dict keys, so published checkpoints load strictly
after a declared renaming (`modules.weights`). `Timm` is any network of timm's, and
alone imports timm.
"""

import difflib
import inspect
from typing import Any

from modules.backbones.any_timm import Timm
from modules.backbones.attention import Packed
from modules.backbones.factorised import FactorisedPositions
from modules.backbones.hybrid import Hybrid
from modules.backbones.layers import Backbone, BlockStyle, Features
from modules.backbones.lvvit import LVViT
from modules.backbones.masked import Masked, Swapped, Visible
from modules.backbones.navit import NaViT
from modules.backbones.positions import Positions
from modules.backbones.row_rnn import RowRNN
from modules.backbones.swin import Swin
from modules.backbones.t2t import T2TViT
from modules.backbones.twins import TwinsPCPVT, TwinsSVT
from modules.backbones.twins_compact import TwinsSVTCompact
from modules.backbones.vit import ViT

FAMILIES: dict[str, type[Backbone]] = {
    "vit": ViT,
    "navit": NaViT,
    "lvvit": LVViT,
    "row_rnn": RowRNN,
    "hybrid": Hybrid,
    "t2t": T2TViT,
    "swin": Swin,
    "twins_svt": TwinsSVT,
    "twins_pcpvt": TwinsPCPVT,
    "twins_svt_compact": TwinsSVTCompact,
    "timm": Timm,
}


def create(name: str, /, **overrides: Any) -> Backbone:
    """Build a backbone from its family name and the arguments of its constructor.

    `create("vit", variant="Ti", patch_size=16)` equals `ViT(variant="Ti", patch_size=16)`, and
    `create("timm:resnet50")` equals `Timm("resnet50")`.

    Raises:
        ValueError: unknown family, or an argument that the family does not take.
    """
    if name.startswith("timm:"):
        name, overrides = "timm", {"name": name.removeprefix("timm:"), **overrides}
    if name not in FAMILIES:
        raise ValueError(f"unknown backbone {name!r}; known: {', '.join(sorted(FAMILIES))}")
    known = list(inspect.signature(FAMILIES[name]).parameters)
    for key in overrides:
        if key not in known:
            close = difflib.get_close_matches(key, known, n=1)
            hint = f"did you mean {close[0]!r}?" if close else f"it takes {', '.join(known)}"
            raise ValueError(f"backbone {name!r} has no argument {key!r}; {hint}")
    return FAMILIES[name](**overrides)


__all__ = [
    "FAMILIES",
    "Backbone",
    "BlockStyle",
    "FactorisedPositions",
    "Features",
    "Hybrid",
    "LVViT",
    "Masked",
    "NaViT",
    "Packed",
    "Positions",
    "RowRNN",
    "Swapped",
    "Swin",
    "T2TViT",
    "Timm",
    "TwinsPCPVT",
    "TwinsSVT",
    "TwinsSVTCompact",
    "ViT",
    "Visible",
    "create",
]
