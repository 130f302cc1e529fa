"""`patchlight translate`: texts through a checkpoint of a method that translates.

    patchlight translate --checkpoint RUN/checkpoints/best.ckpt "forty-two" "one hundred and six"
    patchlight translate --checkpoint C --beam-size 4 --length-penalty 0.6 "forty-two"

The checkpoint has the vocabularies, so no data is needed. Every translation is a line of standard
output.
"""

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from callbacks.checkpoint_files import read_checkpoint
from modules import Seq2Seq, Transformer
from modules.decoding import Search
from modules.translation import KEY, translate_texts

Translator = Seq2Seq | Transformer
METHODS: dict[str, type[Translator]] = {"Seq2Seq": Seq2Seq, "Transformer": Transformer}


def open_translator(checkpoint: Path) -> Translator:
    """The method of a checkpoint, in eval mode, on the CPU.

    Raises:
        ValueError: a checkpoint of a method that does not translate.
    """
    kept = read_checkpoint(checkpoint)
    method = METHODS.get(str((kept.get(KEY) or {}).get("method")))
    if method is None:
        given = str((kept.get("hyper_parameters") or {}).get("_class_path") or "something else")
        raise ValueError(
            f"{checkpoint} is of {given}, which does not translate; expected a checkpoint of "
            f"modules.{' or modules.'.join(METHODS)}"
        )
    loaded: Translator = method.load_from_checkpoint(
        checkpoint, map_location="cpu", weights_only=True
    )
    return loaded.eval()


def search_of(given: argparse.Namespace, default: Search) -> Search:
    """The search of the run, but for what was asked for.

    Raises:
        ValueError: values out of range.
    """
    names = ("beam_size", "length_penalty", "max_length")
    asked = {name: getattr(given, name) for name in names}
    # The penalty of the run is about its beam, and not about greedy search.
    if asked["beam_size"] == 1 and asked["length_penalty"] is None:
        asked["length_penalty"] = 0.0
    kept: dict[str, Any] = {name: getattr(default, name) for name in names}
    return Search(**kept | {name: value for name, value in asked.items() if value is not None})


def translate(argv: Sequence[str]) -> int:
    """The verb."""
    parser = argparse.ArgumentParser(
        prog="patchlight translate",
        description=(__doc__ or "").splitlines()[0],
        allow_abbrev=False,
    )
    parser.add_argument("--checkpoint", "-c", type=Path, required=True)
    options: tuple[tuple[str, Callable[[str], Any], str], ...] = (
        ("--beam-size", int, "prefixes that are kept; 1 is greedy; that of the run"),
        ("--length-penalty", float, "alpha of a beam's length penalty; that of the run"),
        ("--max-length", int, "tokens at which a translation is cut off; that of the run"),
    )
    for name, kind, text in options:
        parser.add_argument(name, type=kind, help=text)
    parser.add_argument("texts", nargs="+", metavar="TEXT")
    given = parser.parse_args(argv)
    translator = open_translator(given.checkpoint)
    how = search_of(given, translator.search)
    with torch.inference_mode():
        print("\n".join(translate_texts(translator, given.texts, how)), flush=True)
    return 0
