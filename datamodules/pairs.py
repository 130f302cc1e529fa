"""Where pairs of texts come from.

numbers             numbers in English and French words, without end
dates               dates likewise
numbers_and_dates   both
FILE.txt            `source \\t target [\\t attribution]`, a pair a line

The words are those of num2words. A pair that is generated is a function of the key of a sample,
which changes from epoch to epoch, so a run never runs out of them. Held out are the values whose
hash falls into a fixed range, a tenth of all; no key makes one of them for training.
"""

import datetime
import itertools
from collections.abc import Iterable, Iterator
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal, NamedTuple, Protocol, runtime_checkable

import numpy as np
from num2words import num2words

from datamodules.sampling import epoch_order, fold
from datamodules.sources import Split

Kind = Literal["numbers", "dates", "numbers_and_dates"]
KINDS = ("numbers", "dates", "numbers_and_dates")
ENGLISH_MONTHS = (
    *("January", "February", "March", "April", "May", "June"),
    *("July", "August", "September", "October", "November", "December"),
)
FRENCH_MONTHS = (
    *("janvier", "février", "mars", "avril", "mai", "juin"),
    *("juillet", "août", "septembre", "octobre", "novembre", "décembre"),
)
# A value is held out where its hash modulo the first is below the second.
HASHES, HELD_OUT = 100, 10
# Smaller numbers are the words that others are made of: all of them are for training.
SMALL = 100
YEARS = (1000, 2999)
# The longest numbers of one to three digits, in English and in French, and the longest dates.
LONGEST = ((7, 77, 777), (4, 97, 497))
LONGEST_DATES = ((2777, 9, 27), (2497, 9, 24))
PATIENCE = 1_000  # draws without a new held-out value after which there are taken to be no more
DRAW, HOLD = 0x9A15, 0x401D  # streams of random numbers


class Pair(NamedTuple):
    """A text and its translation."""

    source: str
    target: str

    def reversed(self) -> "Pair":
        return Pair(self.target, self.source)


@runtime_checkable
class Pairs(Protocol):
    """Pairs by index; those that are generated differ with the key as well."""

    def __len__(self) -> int: ...

    def pair(self, index: int, key: int) -> Pair: ...

    def texts(self) -> Iterable[Pair]:
        """Pairs that have every character and word of both splits, the longest texts among them."""
        ...


@lru_cache(maxsize=100_000)
def number(value: int) -> Pair:
    """`Pair("twenty-one", "vingt et un")` for 21."""
    return Pair(num2words(value), num2words(value, lang="fr"))


@lru_cache(maxsize=100_000)
def date(day: datetime.date) -> Pair:
    """`Pair("the first of May, nineteen oh-six", "le premier mai mille neuf cent six")`."""
    english, french = ENGLISH_MONTHS[day.month - 1], FRENCH_MONTHS[day.month - 1]
    which = "premier" if day.day == 1 else num2words(day.day, lang="fr")
    return Pair(
        f"the {num2words(day.day, to='ordinal')} of {english}, {num2words(day.year, to='year')}",
        f"le {which} {french} {num2words(day.year, lang='fr')}",
    )


def is_held_out(value: int) -> bool:
    """Whether a number, or the ordinal of a date, is kept from training."""
    return value >= SMALL and fold(HOLD, value) % HASHES < HELD_OUT


class Generated:
    """Numbers and dates in English and French words.

    The number of digits is uniform, and then the number among those with as many digits; dates
    are uniform over the years 1000 to 2999.

    Args:
        kind: what is generated.
        split: "train", or "val" for `num_val` different values that are held out.
        num_train: pairs in what is called an epoch.
        num_val: pairs to evaluate on.
        max_digits: of the largest number, 3 to 9; null for 6, and where there are only dates.
    """

    def __init__(
        self,
        kind: Kind,
        split: Split,
        num_train: int = 20_000,
        num_val: int = 1_000,
        max_digits: int | None = None,
    ) -> None:
        if kind == "dates" and max_digits is not None:
            raise ValueError(f"max_digits is {max_digits}, but dates have no numbers; leave it out")
        max_digits = 6 if max_digits is None else max_digits
        if not 3 <= max_digits <= 9:
            raise ValueError(f"max_digits is {max_digits}; expected within 3 to 9")
        if min(num_train, num_val) < 1:
            raise ValueError(f"num_train {num_train} and num_val {num_val}: expected at least 1")
        self.kind, self.max_digits = kind, max_digits
        self.length, self.held_out = num_train, None if split == "train" else self.hold(num_val)

    def __len__(self) -> int:
        return self.length if self.held_out is None else len(self.held_out)

    def pair(self, index: int, key: int) -> Pair:
        if self.held_out is not None:
            return spell(self.held_out[index])
        drawn = (self.draw(key, attempt) for attempt in itertools.count())
        return spell(next(value for value in drawn if not is_held_out(ordinal(value))))

    def draw(self, key: int, attempt: int) -> int | datetime.date:
        """A value of any split."""
        rng = np.random.Generator(np.random.Philox(key=fold(DRAW, key, attempt)))
        is_date = self.kind == "dates" or (self.kind != "numbers" and rng.random() < 0.5)
        if is_date:
            first, after = datetime.date(YEARS[0], 1, 1), datetime.date(YEARS[1] + 1, 1, 1)
            day = rng.integers(first.toordinal(), after.toordinal())
            return datetime.date.fromordinal(int(day))
        digits = int(rng.integers(1, self.max_digits + 1))
        return int(rng.integers(10 ** (digits - 1) if digits > 1 else 0, 10**digits))

    def hold(self, count: int) -> list[int | datetime.date]:
        """So many different values that are held out, always the same."""
        found: dict[int | datetime.date, None] = {}
        newest = 0
        for attempt in itertools.count():
            value = self.draw(HOLD, attempt)
            if is_held_out(ordinal(value)) and value not in found:
                found[value], newest = None, attempt
            if len(found) == count:
                return list(found)
            if attempt - newest > PATIENCE:
                break
        more = "" if self.kind == "dates" else f", or max_digits to more than {self.max_digits}"
        raise ValueError(
            f"no {count} held-out {self.kind} could be drawn; set num_val to at most "
            f"{len(found)}{more}"
        )

    def texts(self) -> Iterator[Pair]:
        if self.kind != "numbers":
            first = datetime.date(YEARS[0], 1, 1).toordinal()
            yield from (date(datetime.date.fromordinal(first + i)) for i in range(366))
            yield from (date(datetime.date(y, 1, 1)) for y in (1200, *range(1900, 2101)))
            yield from (date(datetime.date(*longest)) for longest in LONGEST_DATES)
        if self.kind != "dates":
            ends = itertools.chain(range(200), range(200, 1000, 100))
            rounded = (1_000, 1_100, 1_201, 2_000, 80_000, 200_000)
            every = itertools.chain(ends, rounded, (1_000_000, 2_000_000, 200_000_000))
            yield from (number(n) for n in every if n < 10**self.max_digits)
            for leads in LONGEST:
                thousands, rest = divmod(self.max_digits, 3)
                lead = [leads[rest - 1]] if rest else []
                digits = "".join(map(str, [*lead, *[leads[2]] * thousands]))
                yield number(int(digits))


def ordinal(value: int | datetime.date) -> int:
    return value if isinstance(value, int) else value.toordinal()


def spell(value: int | datetime.date) -> Pair:
    return number(value) if isinstance(value, int) else date(value)


class FilePairs:
    """The pairs of a text file; a share of its different sources is held out.

    Args:
        path: UTF-8, a pair a line: source, tab, target, and whatever follows another tab.
        split: "train" or "val"; no source is in both.
        val_share: share of the sources that is held out.
        max_pairs: only the first so many pairs; null for all.
        reverse: targets are translated into sources.

    Raises:
        ValueError: no such file, one without pairs or too few to hold some out, a line that is
            no pair.
    """

    def __init__(
        self,
        path: str,
        split: Split,
        val_share: float = 0.2,
        max_pairs: int | None = None,
        reverse: bool = False,
    ) -> None:
        if max_pairs is not None and max_pairs < 1:
            raise ValueError(f"max_pairs is {max_pairs}; expected at least 1, or null")
        if not 0.0 < val_share < 1.0:
            raise ValueError(f"val_share is {val_share}; expected within (0, 1)")
        self.everything = read_pairs(Path(path), modified(Path(path)))[:max_pairs]
        if reverse:  # before any is held out, so that no text to be translated is in both splits
            self.everything = [pair.reversed() for pair in self.everything]
        sources = list(dict.fromkeys(pair.source for pair in self.everything))
        count = max(1, round(val_share * len(sources)))
        if count >= len(sources):
            raise ValueError(
                f"{path} has {len(sources)} different source(s), of which {count} would be held "
                f"out, and none is left to train on; give it more lines, or a smaller val_share"
            )
        held_out = {sources[i] for i in epoch_order(len(sources), HOLD, 0)[:count]}
        self.pairs = [p for p in self.everything if (p.source in held_out) == (split == "val")]

    def __len__(self) -> int:
        return len(self.pairs)

    def pair(self, index: int, key: int) -> Pair:
        return self.pairs[index]

    def texts(self) -> Iterable[Pair]:
        return self.everything


def modified(path: Path) -> int | None:
    """When a file was written last, in nanoseconds, if it is there."""
    return path.stat().st_mtime_ns if path.is_file() else None


@lru_cache(maxsize=4)
def read_pairs(path: Path, written: int | None) -> list[Pair]:
    """The pairs of a file; empty lines are passed over.

    Args:
        written: what makes it another file under the same name.
    """
    try:
        lines = path.read_text(encoding="utf-8-sig").split("\n")
    except FileNotFoundError:
        listed = ", ".join(KINDS)
        raise ValueError(
            f"data.init_args.source {path}: no such file; expected a .txt of pairs, or {listed}"
        ) from None
    except (OSError, UnicodeError) as error:
        raise ValueError(f"{path} is no text in UTF-8: {error}") from error
    pairs = []
    for place, line in enumerate(lines, start=1):
        parts = line.rstrip("\r").split("\t")
        if not line.strip():
            continue
        if len(parts) < 2 or not parts[0] or not parts[1]:
            raise ValueError(
                f"{path}, line {place}: expected source, tab, target, and found {line[:60]!r}"
            )
        pairs.append(Pair(parts[0], parts[1]))
    if not pairs:
        raise ValueError(f"{path} is empty; expected a pair of texts a line, with a tab between")
    return pairs


def open_pairs(source: str, split: Split, reverse: bool, arguments: dict[str, Any]) -> Pairs:
    """The pairs of a source by name or path; reversed, they are translated the other way.

    Raises:
        ValueError: what the source raises, or arguments that it does not take.
    """
    try:
        if source in KINDS:
            found: Pairs = Generated(source, split, **arguments)  # type: ignore[arg-type]
        else:
            return FilePairs(source, split, **arguments, reverse=reverse)
    except TypeError as error:
        raise ValueError(f"source_args of {source} are {arguments}: {error}") from error
    return Reversed(found) if reverse else found


class Reversed:
    """Generated pairs the other way: targets are translated into sources."""

    def __init__(self, pairs: Pairs) -> None:
        self.pairs = pairs

    def __len__(self) -> int:
        return len(self.pairs)

    def pair(self, index: int, key: int) -> Pair:
        return self.pairs.pair(index, key).reversed()

    def texts(self) -> Iterable[Pair]:
        return (pair.reversed() for pair in self.pairs.texts())
