"""Weights of other code bases in, and ours out.

    read(path)        the tensors of a file, each network in it under its name
    load(network, …)  into one of our networks, strictly, with a report of what became of each
    load_backbone(…)  the same for a backbone alone, whatever it was trained under
    to_timm(network)  under timm's names

A file goes through three steps: it is read without executing anything in it, its keys are
renamed to ours by the table of the code base that wrote it, position tables are resampled to
the network's grid. What is then missing or left over is an error unless it is named.

Sources: timm, DeiT, DeiT-III, MAE, DINO, T2T-ViT, LV-ViT (`.pth`, safetensors), Google's
vision_transformer and big_vision (`.npz`), and checkpoints of this project.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import timm
from torch import nn

from modules.backbones import Backbone, Timm, ViT
from modules.backbones.pyramid import Pyramid
from modules.weights.export import timm_arguments, to_timm
from modules.weights.files import State, read
from modules.weights.names import BESIDE, Origins, bare, with_our_names, with_timm_names
from modules.weights.positions import drop_computed, fit_positions, tokens_of
from modules.weights.pyramids import with_pyramid_names

__all__ = ["Report", "load", "load_backbone", "open_source", "read", "timm_arguments", "to_timm"]

FINAL_NORMS = ("norm", "fc_norm")  # of all tokens, of their average


@dataclass(frozen=True)
class Report:
    """What became of every tensor of a file, and of every one of the network."""

    source: str
    read: tuple[str, ...]
    renamed: dict[str, tuple[str, ...]]
    resampled: dict[str, str]
    dropped: tuple[str, ...]
    kept: tuple[str, ...]

    def __str__(self) -> str:
        def some(names: Sequence[str]) -> str:
            return ", ".join(names[:4]) + (", ..." if len(names) > 4 else "")

        lines = [f"{self.source}: {len(self.read)} tensors read"]
        if self.renamed:
            pairs = [f"{'+'.join(old)} to {new}" for new, old in self.renamed.items()]
            lines.append(f"  {len(pairs)} of them renamed: {some(pairs)}")
        for name, how in self.resampled.items():
            lines.append(f"  {name}: {how}")
        if self.dropped:
            lines.append(f"  {len(self.dropped)} of the file dropped: {some(self.dropped)}")
        if self.kept:
            lines.append(f"  {len(self.kept)} of the network left as they were: {some(self.kept)}")
        return "\n".join(lines)


def choose(parts: Mapping[str, State], part: str | None, path: str) -> State:
    """The one network meant, where a file holds several.

    Raises:
        ValueError: there is no such part, or several and none was named.
    """
    if part is None and len(parts) == 1:
        (only,) = parts.values()
        return only
    if part is None:
        raise ValueError(f"{path} holds several networks: {', '.join(parts)}; name one as part")
    if part not in parts:
        raise ValueError(f"{path} holds no part {part!r}; it has {', '.join(parts)}")
    return parts[part]


def load(
    network: nn.Module,
    source: str | Path,
    part: str | None = None,
    drop: Sequence[str] = (),
) -> Report:
    """Load a published or own checkpoint into a backbone, or a backbone with its head.

    Position tables are brought to the network's grid as its `Positions.resample` says.

    Args:
        network: a backbone, or a module with one as `backbone` beside its heads.
        source: a file, or `timm:NAME` for what timm downloads under that name.
        part: which network of the file, where it holds several (teacher, student, ...).
        drop: names, or beginnings of names up to a dot, that may be left over in the file, and
            are left as they are in the network: `head`, `decoder_blocks`.

    Raises:
        ValueError: a file that is refused, tensors missing, left over or of another shape, a
            name in `drop` that is nowhere.
    """
    state = choose(open_source(str(source)), part, str(source))
    backbone = getattr(network, "backbone", network)
    state, origins, done = named_for(backbone, state, str(source))
    return fill(network, state, origins, done, str(source), drop)


def load_backbone(
    backbone: Backbone,
    source: str | Path,
    part: str | None = None,
    drop: Sequence[str] = (),
) -> Report:
    """Load the backbone out of a checkpoint of any method: heads and decoders stay behind.

    Where the file normalises all tokens and the backbone their average (or the other way round),
    that norm is another one: it stays behind too, and the backbone's keeps its first values, as
    MAE is fine-tuned (He et al. 2021; its published code).

    Raises:
        ValueError: as `load`; whatever is neither the backbone's nor known to go without it.
    """
    state = choose(open_source(str(source)), part, str(source))
    state, origins, done = named_for(backbone, state, str(source))
    own = {bare(key) for key in backbone.state_dict()}
    behind = {key for key in state if key not in own and BESIDE.match(key)}
    norms = [{key for key in keys if is_named(key, (), FINAL_NORMS)} for keys in (state, own)]
    if all(norms) and not norms[0] & norms[1]:
        behind |= {key.split(".")[0] for key in norms[0] | norms[1]}
    return fill(backbone, state, origins, done, str(source), [*drop, *sorted(behind)])


def named_for(
    backbone: nn.Module, state: State, source: str
) -> tuple[State, Origins, dict[str, str]]:
    """The tensors of a file under the names of this backbone, for each the names it had.

    And what was done to some of them to fit it.
    """
    if isinstance(backbone, Pyramid):
        return with_pyramid_names(state, backbone)
    if isinstance(backbone, Timm):
        return (*with_timm_names(state, backbone, source), {})
    return (*with_our_names(state), {})


def fill(
    network: nn.Module,
    state: State,
    origins: Origins,
    done: dict[str, str],
    source: str,
    drop: Sequence[str],
) -> Report:
    """`load` of tensors that were read and have our names."""
    own = {bare(key): key for key in network.state_dict()}
    for entry in drop:
        if not any(is_named(key, origins.get(key, ()), (entry,)) for key in {*state, *own}):
            raise ValueError(f"drop names {entry!r}, but neither {source} nor the network has it")
    tokens = tokens_of(state)
    dropped = [key for key in state if is_named(key, origins[key], drop)]
    kept = [key for key in own if is_named(key, (), drop)]
    state = {key: tensor for key, tensor in state.items() if key not in dropped}
    backbone = getattr(network, "backbone", network)
    resampled = done | drop_computed(state, network)
    if isinstance(backbone, ViT):
        is_ours = any(
            name.startswith(("positions.", "relative.")) for (name, *_) in origins.values()
        )
        resampled |= fit_positions(state, tokens, backbone, is_ours)
    wanted = {key: network.state_dict()[own[key]] for key in own if key not in kept}
    found = tuple(state)
    # A counter that batch norms with a momentum do not read, and that old files have not.
    counters = {key: wanted[key] for key in wanted if key.endswith(".num_batches_tracked")}
    state = counters | state
    check_cover(source, state, wanted)
    network.load_state_dict({own[key]: tensor for key, tensor in state.items()}, strict=not kept)
    return Report(
        source,
        read=found,
        renamed={new: origins[new] for new in found if origins[new] != (new,)},
        resampled=resampled,
        dropped=tuple(dropped),
        kept=tuple(kept),
    )


def open_source(source: str) -> dict[str, State]:
    """The networks of a file, or of what timm downloads for `timm:NAME`."""
    if not source.startswith("timm:"):
        return read(source)
    name = source.removeprefix("timm:")
    if not timm.is_model(name):
        raise ValueError(f"{source}: timm knows no model of this name")
    try:
        theirs = timm.create_model(name, pretrained=True)
    except Exception as error:  # whatever a download may raise
        raise ValueError(
            f"timm's weights of {name} could not be had ({type(error).__name__}: {error}); "
            f"without a network, name a file"
        ) from error
    return {"weights": dict(theirs.state_dict())}


def is_named(key: str, origins: Sequence[str], names: Sequence[str]) -> bool:
    """Whether one of the names is this key, under ours or theirs, or the beginning of it."""
    return any(
        one == name or one.startswith((f"{name}.", f"{name}/"))
        for one in (key, *origins)
        for name in names
    )


def check_cover(source: str, state: State, wanted: State) -> None:
    """Raise where a file does not cover a network, and say all that is wrong at once."""
    problems = []
    for title, found in (
        ("the file lacks", [key for key in wanted if key not in state]),
        ("the network has no place for", [key for key in state if key not in wanted]),
        (
            "of another shape:",
            [
                f"{key} is {list(state[key].shape)} in the file, {list(wanted[key].shape)} here"
                for key in wanted
                if key in state and state[key].shape != wanted[key].shape
            ],
        ),
    ):
        if found:
            more = f", and {len(found) - 8} more" if len(found) > 8 else ""
            problems.append(f"{title} {', '.join(found[:8])}{more}")
    if problems:
        raise ValueError(
            f"{source} does not fit the network, and nothing was loaded: {'; '.join(problems)}. "
            f"Set the backbone's options to what the file holds (`patchlight inspect` shows "
            f"them), or name what is meant to be left out (drop)"
        )
