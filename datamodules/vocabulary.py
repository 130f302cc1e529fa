"""Text as numbers: vocabularies of characters or words, and what a pair of texts becomes.

As in the classic character-level formulation (Sutskever et al. 2014 as taught by the Keras
example): source and target have a vocabulary each, sorted; a target begins with a tab and ends
with a newline, which therefore stand in no text.
"""

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from jaxtyping import Int
from torch import Tensor

Level = Literal["characters", "words"]
LEVELS = ("characters", "words")
START, END, SPACE = "\t", "\n", " "


def split(text: str, level: Level) -> list[str]:
    """The tokens of a text, which put together are the text again.

    A word or a sign keeps the space before it, so that joining needs no rules of a language.
    """
    if level == "characters":
        return list(text)
    return re.findall(r" ?\w+| ?[^\w\s]|\s", text)


@dataclass(frozen=True)
class Vocabulary:
    """Tokens in the order of their numbers."""

    tokens: tuple[str, ...]
    level: Level

    def __post_init__(self) -> None:
        object.__setattr__(self, "ids", {token: i for i, token in enumerate(self.tokens)})

    @classmethod
    def of(cls, texts: Iterable[str], level: Level, extra: Sequence[str] = ()) -> "Vocabulary":
        """All tokens of some texts, sorted."""
        found = {token for text in texts for token in split(text, level)}
        return cls(tuple(sorted(found.union(extra))), level)

    def __len__(self) -> int:
        return len(self.tokens)

    def __getitem__(self, token: str) -> int:
        return int(self.ids[token])  # type: ignore[attr-defined]

    def encode(self, text: str) -> list[int]:
        """The numbers of a text's tokens.

        Raises:
            ValueError: a token that is not in the vocabulary, or is a mark of start or end.
        """
        tokens = split(text, self.level)
        for place, token in enumerate(tokens):
            if token not in self.ids or token in (START, END):  # type: ignore[attr-defined]
                what = "character" if self.level == "characters" else "word"
                known = "".join(t for t in self.tokens if t not in (START, END))
                listed = f": {known}" if self.level == "characters" else f" of {len(self)} words"
                raise ValueError(
                    f"{what} {token!r} ({place + 1} of {shown(text)}) is not in the "
                    f"vocabulary{listed}"
                )
        return [self[token] for token in tokens]

    def decode(self, ids: Iterable[int]) -> str:
        """The text up to the first end, without marks of start and end."""
        found = []
        for i in ids:
            if self.tokens[i] == END:
                break
            found.append(self.tokens[i])
        return "".join(token for token in found if token != START)


@dataclass(frozen=True)
class Codec:
    """What texts of a run become, kept in its checkpoints: no data is needed to translate.

    Args:
        source, target: vocabularies; the target's has the marks of start and end.
        pad_to: tokens that every source and every target (with both marks) is padded to; None
            pads to the longest of a batch.
    """

    source: Vocabulary
    target: Vocabulary
    pad_to: tuple[int, int] | None = None

    @property
    def start(self) -> int:
        return self.target[START]

    @property
    def end(self) -> int:
        return self.target[END]

    def encode_sources(self, texts: Sequence[str]) -> tuple[Int[Tensor, "b s"], Int[Tensor, " b"]]:
        """Sources, padded with token 0, and their lengths.

        Raises:
            ValueError: an empty text, a token that is not known, a text longer than `pad_to`.
        """
        if "" in texts:
            raise ValueError("a text is empty; there is nothing to translate")
        rows = [self.source.encode(text) for text in texts]
        room = None if self.pad_to is None else self.pad_to[0]
        check_room("source", texts, map(len, rows), room)
        return pad(rows, room)

    def encode_targets(self, texts: Sequence[str]) -> tuple[Int[Tensor, "b t"], Int[Tensor, " b"]]:
        """Targets between their marks, padded with token 0, and their lengths with the marks."""
        rows = [[self.start, *self.target.encode(text), self.end] for text in texts]
        room = None if self.pad_to is None else self.pad_to[1]
        check_room("target", texts, map(len, rows), room)
        return pad(rows, room)

    def as_primitives(self) -> dict[str, Any]:
        """What `of_primitives` reads again."""
        return {
            "level": self.source.level,
            "source": list(self.source.tokens),
            "target": list(self.target.tokens),
            "pad_to": None if self.pad_to is None else list(self.pad_to),
        }

    @classmethod
    def of_primitives(cls, kept: dict[str, Any]) -> "Codec":
        source, target = (Vocabulary(tuple(kept[n]), kept["level"]) for n in ("source", "target"))
        pad_to = kept["pad_to"]
        return cls(source, target, None if pad_to is None else (pad_to[0], pad_to[1]))


def shown(text: str, most: int = 60) -> str:
    """A text as a message has it."""
    return repr(text) if len(text) <= most else repr(text[:most]) + " ..."


def check_room(name: str, texts: Sequence[str], lengths: Iterable[int], room: int | None) -> None:
    """Refuse texts that are longer than what they are padded to.

    Args:
        name: "source" or "target", for the message.
        lengths: of these texts, in tokens, a target's with both marks.

    Raises:
        ValueError: such a text, the longest of them.
    """
    longest, text = max(zip(lengths, texts, strict=True), default=(0, ""))
    if room is not None and longest > room:
        marks = "" if name == "source" else " with its two marks"
        raise ValueError(
            f"the {name} {shown(text)} has {longest} tokens{marks}, and there is room for {room} "
            f"(data.init_args.pad_to)"
        )


def pad(
    rows: Sequence[Sequence[int]], length: int | None
) -> tuple[Int[Tensor, "b n"], Int[Tensor, " b"]]:
    """Rows of one length, filled up with token 0, and how long each was."""
    lengths = [len(row) for row in rows]
    padded = torch.zeros(len(rows), length or max(lengths), dtype=torch.int64)
    for i, row in enumerate(rows):
        padded[i, : len(row)] = torch.tensor(row)
    return padded, torch.tensor(lengths)
