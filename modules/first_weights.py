"""Where a method's first values come from: the weights of a file, read where a run begins."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from lightning.pytorch.utilities import rank_zero_info
from torch import nn

from modules.backbones import Backbone
from modules.weights import load, load_backbone

Scope = Literal["all", "backbone"]


@dataclass(frozen=True)
class FirstWeights:
    """A file of weights, and how to read it (`modules.weights`).

    A method takes them in `on_fit_start`, which a run that goes on from a checkpoint passes over;
    in `setup` where weights are spread over devices afterwards.

    Args:
        source: the file, or `timm:NAME`; None for none.
        part: which network of the file, where it holds several.
        drop: names that may be left over in the file and keep their first values here.
        scope: "all" of the network, or its "backbone".

    Raises:
        ValueError: another scope, or how to read a file where none is named.
    """

    source: str | None
    part: str | None = None
    drop: Sequence[str] = ()
    scope: Scope = "backbone"

    def __post_init__(self) -> None:
        if self.scope not in ("all", "backbone"):
            raise ValueError(f"weights_scope is {self.scope!r}; expected 'all' or 'backbone'")
        if self.source is None and (self.part is not None or self.drop):
            raise ValueError("weights_part and weights_drop are about weights, which is not set")

    def are_due_in_setup(self, trainer: Any) -> bool:
        """Whether weights are spread over devices afterwards, when a file has whole ones.

        Whether the run goes on from a checkpoint is not known there yet. If so, its own come later.
        """
        if self.source is None or trainer.state.fn != "fit":
            return False
        is_there = self.source.startswith("timm:") or Path(self.source).exists()
        return is_there and bool(trainer.strategy.restore_checkpoint_after_setup)

    def are_due_at_start(self, trainer: Any) -> bool:
        """Whether a run begins that has not taken them yet."""
        if self.source is None or trainer.ckpt_path is not None:
            return False
        return not self.are_due_in_setup(trainer)

    def fill(self, network: nn.Module) -> None:
        """Read them into a network, or its backbone, and say what was read.

        Raises:
            ValueError: as `modules.weights.load`.
        """
        assert self.source is not None
        given = (self.source, self.part, self.drop)
        if self.scope == "backbone":
            backbone = network.get_submodule("backbone")
            assert isinstance(backbone, Backbone)
            rank_zero_info(str(load_backbone(backbone, *given)))
        else:
            rank_zero_info(str(load(network, *given)))
