"""`patchlight backbones`: what there is, what it costs, and where weights can come from.

    patchlight backbones                        every preset of every family
    patchlight backbones hybrid                 those of one
    patchlight backbones 'timm:convnext*'       networks of timm's

Parameters are those of the backbone without a head, multiply-adds of one image. Nothing is computed
and nothing downloaded. What stands under weights is what `weights: timm:NAME` (or a file, where a
publisher is named) fills strictly, but for its head and with positions resampled.
"""

import argparse
from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any, NamedTuple

import timm
import yaml
from rich.console import Console
from rich.table import Table

from datamodules.progress import Bar
from experiments.costs import Cost, measure
from modules.backbones import FAMILIES, create, hybrid, lvvit, t2t, vit

SIDE = (224, 224)  # of the image for what takes any size
SHOWN = 3  # sets of weights that are named


class Preset(NamedTuple):
    """What a backbone is built from, and whose weights it takes.

    arguments: of its constructor
    timm:      timm's names of the same network
    others:    where else there are weights
    """

    arguments: dict[str, Any]
    timm: tuple[str, ...] = ()
    others: str = ""

    def weights(self) -> str:
        """In words."""
        return ", ".join(filter(None, [*map(timms, self.timm), self.others]))


def timms(name: str) -> str:
    """timm's sets of weights of a network; nothing where it has none."""
    tags = [full.partition(".")[2] for full in timm.list_pretrained(f"{name}.*")]
    more = f" and {len(tags) - SHOWN} more" if len(tags) > SHOWN else ""
    return f"timm:{name} ({', '.join(tags[:SHOWN])}{more})" if tags else ""


GOOGLE = "Google's .npz"
# Patch sizes that were published, what timm calls them, and who else has weights.
VITS: dict[tuple[str, int], tuple[tuple[str, ...], str]] = {
    ("mu", 16): ((), ""),
    ("Ti", 16): (("vit_tiny_patch16_224", "deit_tiny_patch16_224"), GOOGLE),
    ("S", 32): (("vit_small_patch32_224",), GOOGLE),
    ("S", 16): (("vit_small_patch16_224", "deit_small_patch16_224"), f"{GOOGLE}, DINO"),
    ("S", 8): (("vit_small_patch8_224",), "DINO"),
    ("M", 16): ((), ""),
    ("B", 32): (("vit_base_patch32_224",), GOOGLE),
    ("B", 16): (("vit_base_patch16_224", "deit_base_patch16_224"), f"{GOOGLE}, DINO, MAE"),
    ("B", 8): (("vit_base_patch8_224",), f"{GOOGLE}, DINO"),
    ("L", 32): (("vit_large_patch32_224",), GOOGLE),
    ("L", 16): (("vit_large_patch16_224",), f"{GOOGLE}, MAE"),
    ("L", 14): ((), ""),
    ("H", 14): (("vit_huge_patch14_224",), f"{GOOGLE}, MAE"),
    ("H", 16): ((), ""),
    ("g", 14): ((), ""),
    ("G", 14): ((), ""),
    ("So400m", 14): ((), ""),
}
HYBRIDS: dict[str, tuple[str, ...]] = {
    "R+Ti/16": ("vit_tiny_r_s16_p8_224",),
    "R26+S/32": ("vit_small_r26_s32_224",),
    "R50+B/16": ("vit_base_r50_s16_224", "vit_base_r50_s16_384"),
    "R50+L/32": ("vit_large_r50_s32_224",),
}
MICROSOFT = "Microsoft's .pth"
# Variant, window and side of Swin; 224 and 384 are published.
SWINS: dict[tuple[str, int], str] = {
    ("T", 7): "swin_tiny_patch4_window7_224",
    ("S", 7): "swin_small_patch4_window7_224",
    ("B", 7): "swin_base_patch4_window7_224",
    ("B", 12): "swin_base_patch4_window12_384",
    ("L", 7): "swin_large_patch4_window7_224",
    ("L", 12): "swin_large_patch4_window12_384",
}
TWINS = {"S": "small", "B": "base", "L": "large"}
TOY = Preset({"variant": "mu"})
# One entry a family.
PRESETS: dict[str, list[Preset]] = {
    "vit": [Preset({"variant": v, "patch_size": p}, *of) for (v, p), of in VITS.items()],
    "navit": [Preset({"variant": variant}) for variant in vit.VARIANTS],
    "hybrid": [
        Preset({"variant": variant}, HYBRIDS.get(variant, ()), GOOGLE if variant in HYBRIDS else "")
        for variant in hybrid.VARIANTS
    ],
    "t2t": [
        Preset({"variant": variant}, others="" if variant == "mu" else "T2T-ViT's .pth")
        for variant in t2t.VARIANTS
    ],
    "lvvit": [
        Preset({"variant": variant}, others="" if variant == "mu" else "LV-ViT's .pth")
        for variant in lvvit.VARIANTS
    ],
    "swin": [
        TOY,
        *(
            Preset({"variant": v, "window": w, "image_size": 32 * w}, (name,), MICROSOFT)
            for (v, w), name in SWINS.items()
        ),
    ],
    "twins_svt": [TOY, *(Preset({"variant": v}, (f"twins_svt_{n}",)) for v, n in TWINS.items())],
    "twins_pcpvt": [
        TOY,
        *(Preset({"variant": v}, (f"twins_pcpvt_{n}",)) for v, n in TWINS.items()),
    ],
    "twins_svt_compact": [TOY, Preset({"variant": "S"}, others="vit-pytorch's")],
    "row_rnn": [Preset({"image_size": 28, "hidden_dim": 128})],
}


def chosen(what: str | None, limit: int) -> Iterator[tuple[str, Preset]]:
    """The family and preset of every row.

    Raises:
        ValueError: no such family, or no network of timm's of this name.
    """
    if what is not None and what.startswith("timm"):
        pattern = what.removeprefix("timm").removeprefix(":")
        names = timm.list_models(pattern) if pattern else []
        if not names:
            raise ValueError(
                f"{what} is no network of timm's; name one of its {len(timm.list_models()):,}, or "
                f"a pattern, such as 'timm:convnext*'"
            )
        for name in names[:limit]:
            yield "timm", Preset({"name": name}, (name,))
        if len(names) > limit:
            print(f"the first {limit} of {len(names)}; --limit shows more")
        return
    if what is not None and what not in PRESETS:
        raise ValueError(f"no family {what!r}; there is {', '.join(PRESETS)}, timm:PATTERN")
    for family in PRESETS if what is None else (what,):
        for preset in PRESETS[family]:
            yield family, preset


def row(family: str, preset: Preset, found: Cost) -> list[str]:
    """A line of the table."""
    given = yaml.safe_dump(preset.arguments, default_flow_style=True, sort_keys=False).strip()
    if found.macs is None or found.parameters is None or found.side is None:
        return [FAMILIES[family].__name__, given, "", "", "", "", found.note]
    side, grid = ("x".join(map(str, pair or ())) for pair in (found.side, found.grid))
    counts = (f"{found.parameters:,}", f"{found.macs / 1e9:.2f} G")
    return [FAMILIES[family].__name__, given, *counts, side, grid, preset.weights()]


def backbones(argv: Sequence[str]) -> int:
    """The verb."""
    parser = argparse.ArgumentParser(
        prog="patchlight backbones", description="List backbones and what they cost."
    )
    parser.add_argument("what", nargs="?", help="a family, or timm:PATTERN; all families of ours")
    parser.add_argument("--limit", type=int, default=20, help="networks of timm's; %(default)s")
    given = parser.parse_args(argv)
    if given.limit < 1:
        raise ValueError(f"--limit is {given.limit}; expected at least 1")
    rows = list(chosen(given.what, given.limit))
    table = Table("modules.backbones", "init_args")
    for name in ("parameters", "MACs", "image", "grid"):  # whole figures, however narrow it gets
        table.add_column(name, no_wrap=True, justify="right")
    table.add_column("weights", overflow="fold")
    with Bar("counting", len(rows)) as bar:
        for family, preset in rows:
            found = measure(partial(create, family, **preset.arguments), SIDE)
            table.add_row(*row(family, preset, found))
            bar.advance()
    Console().print(table)
    if given.what is None:
        print(f"and timm:PATTERN, {len(timm.list_models()):,} networks of timm's")
    return 0
