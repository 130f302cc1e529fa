"""Pairs of texts: where they come from, what they become, in which order."""

import datetime
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from lightning.pytorch.accelerators import XLAAccelerator

from datamodules import TextDataModule
from datamodules.pairs import Generated, Pair, date, is_held_out, number, open_pairs
from datamodules.vocabulary import Codec, Vocabulary, split
from tests.runs import differences

LINES = "Go.\tVa !\tCC-BY\nHi.\tSalut !\n\nRun!\tCours !\tsomeone\nHi.\tBonjour.\nWait.\tAttends.\n"


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "pairs.txt"
    path.write_text(LINES, encoding="utf-8")
    return path


def module(source: Any = "numbers", **changes: Any) -> TextDataModule:
    arguments: dict[str, Any] = {"batch_size": 4}
    if source == "numbers":
        arguments["source_args"] = {"num_train": 16, "num_val": 6}
    data = TextDataModule(str(source), **arguments | changes)
    data.setup("fit")
    return data


def test_words_are_those_of_both_languages() -> None:
    assert number(21) == Pair("twenty-one", "vingt et un")
    assert number(80_097).target == "quatre-vingt mille quatre-vingt-dix-sept"
    assert date(datetime.date(1984, 3, 4)) == Pair(
        "the fourth of March, nineteen eighty-four",
        "le quatre mars mille neuf cent quatre-vingt-quatre",
    )
    assert date(datetime.date(2004, 8, 1)).target == "le premier août deux mille quatre"


@pytest.mark.parametrize("kind", ["numbers", "dates", "numbers_and_dates"])
def test_held_out_values_are_never_trained_on(kind: Any) -> None:
    train, val = (Generated(kind, s, num_train=50, num_val=100) for s in ("train", "val"))
    held_out = {val.pair(i, key=0) for i in range(len(val))}
    assert len(held_out) == len(val) == 100
    trained = {train.pair(i % 50, key=i) for i in range(400)}
    assert len(trained) > 200  # without end: more than an "epoch" of 50
    assert not trained & held_out
    assert train.pair(3, key=7) == train.pair(4, key=7) != train.pair(3, key=8)
    if kind == "numbers":
        assert {number(n) for n in range(10)} <= trained  # of one digit a sixth
    else:
        assert any(pair.target.startswith("le ") for pair in trained)
    assert any(pair.target.startswith("le ") for pair in held_out) == (kind != "numbers")


def test_a_tenth_is_held_out_but_for_small_numbers() -> None:
    held = [is_held_out(n) for n in range(10_000)]
    assert not any(held[:100])
    assert 0.08 < sum(held) / len(held) < 0.12


@pytest.mark.parametrize("level", ["characters", "words"])
@pytest.mark.parametrize(
    ("kind", "digits"), [*(("numbers", digits) for digits in range(3, 10)), ("dates", None)]
)
def test_vocabularies_hold_whatever_is_generated(kind: str, digits: int | None, level: Any) -> None:
    arguments = {"num_train": 1, "num_val": 1, "max_digits": digits}
    data = module(kind, source_args=arguments, level=level)
    for key in range(300):
        pair = data.train_pairs.pair(0, key)
        ids = data.codec.source.encode(pair.source), data.codec.target.encode(pair.target)
        assert data.codec.target.decode(ids[1]) == pair.target


@given(st.text())
def test_tokens_put_together_are_the_text(text: str) -> None:
    for level in ("characters", "words"):
        assert "".join(split(text, level)) == text  # type: ignore[arg-type]


@pytest.mark.parametrize("reverse", [False, True])
def test_what_is_translated_is_in_one_split(tmp_path: Path, reverse: bool) -> None:
    """Many sources have one translation, and the other way round."""
    lines = [f"{i}\t{i // 3} !\n{i // 2} ?\t{i} ." for i in range(30)]
    (tmp_path / "pairs.txt").write_text("\n".join(lines))
    splits = [open_pairs(str(tmp_path / "pairs.txt"), s, reverse, {}) for s in ("train", "val")]
    sources = [{p.pair(i, 0).source for i in range(len(p))} for p in splits]
    assert all(sources)
    assert not sources[0] & sources[1]
    assert sum(map(len, splits)) == 60


def test_words_keep_the_space_before_them() -> None:
    assert split("Va donc, l'ami !", "words") == ["Va", " donc", ",", " l", "'", "ami", " !"]


def test_a_file_of_pairs(file: Path) -> None:
    train, val = (open_pairs(str(file), s, False, {"val_share": 0.25}) for s in ("train", "val"))
    pairs = [p.pair(i, 0) for p in (train, val) for i in range(len(p))]
    assert sorted(pairs) == sorted(
        [
            Pair("Go.", "Va !"),
            Pair("Hi.", "Salut !"),
            Pair("Run!", "Cours !"),
            Pair("Hi.", "Bonjour."),
            Pair("Wait.", "Attends."),
        ]
    )
    sources = [{p.pair(i, 0).source for i in range(len(p))} for p in (train, val)]
    assert not sources[0] & sources[1]  # "Hi." is there twice
    assert len(sources[1]) == 1
    back = open_pairs(str(file), "train", True, {"val_share": 0.25})
    assert [Pair(*reversed(p)) for p in train.texts()] == list(back.texts())
    first = open_pairs(str(file), "train", False, {"max_pairs": 3, "val_share": 0.3})
    assert len(list(first.texts())) == 3


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", r"pairs.txt is empty; expected a pair of texts a line"),
        (b"\n\n", r"pairs.txt is empty"),
        (b"a\tb\nno tab here\n", r"pairs.txt, line 2: expected source, tab, target, .*'no tab he"),
        (b"a\tb\n\tc\n", r"line 2"),
        (b"a\t\n", r"line 1"),
        (b"\xff\xfe\t\x00", r"pairs.txt is no text in UTF-8"),
        (b"a\tb\n", r"has 1 different source\(s\), of which 1 would be held out"),
    ],
)
def test_files_that_are_refused(content: bytes, message: str, tmp_path: Path) -> None:
    (tmp_path / "pairs.txt").write_bytes(content)
    with pytest.raises(ValueError, match=message):
        module(tmp_path / "pairs.txt")


def test_other_sources_and_arguments_that_are_refused(tmp_path: Path, file: Path) -> None:
    with pytest.raises(ValueError, match=r"nowhere: no such file; expected a .txt .* numbers"):
        module("nowhere")
    with pytest.raises(ValueError, match=r"source_args of numbers are .*nmu_train"):
        module(source_args={"nmu_train": 3})
    with pytest.raises(ValueError, match=r"no 200 held-out .* to at most \d+, or max_digits"):
        module(source_args={"num_val": 200, "max_digits": 3})
    with pytest.raises(ValueError, match="max_digits is 4, but dates have no numbers"):
        module("dates", source_args={"max_digits": 4})
    for name, value in (("max_digits", 10), ("num_train", 0)):
        with pytest.raises(ValueError, match=f"{name}.* {value}"):
            module(source_args={name: value})
    with pytest.raises(ValueError, match="val_share is 1"):
        module(file, source_args={"val_share": 1.0})
    with pytest.raises(ValueError, match="batch_size is 0"):
        TextDataModule(batch_size=0)
    with pytest.raises(ValueError, match="pad_to is"):
        TextDataModule(pad_to=(2, 9))


def test_a_batch_has_targets_one_step_ahead(file: Path) -> None:
    data = module(file, batch_size=2)
    batch = next(iter(data.train_dataloader()))
    codec = data.codec
    assert len(codec.source) == len(set("Go.Hi.Run!Wait."))
    assert len(codec.target) == len(set("Va !Salut !Cours !Bonjour.Attends.\t\n"))
    assert list(codec.source.tokens) == sorted(codec.source.tokens)
    for i in range(2):
        pair = data.train_pairs.pair(int(batch.indices[i]), 0)
        length, own = int(batch.target_lengths[i]), int(batch.source_lengths[i])
        assert own == len(pair.source)
        assert length == len(pair.target) + 2
        said = [codec.target.tokens[t] for t in batch.inputs[i, : length - 1].tolist()]
        wanted = [codec.target.tokens[t] for t in batch.wanted[i, : length - 1].tolist()]
        assert "".join(said) == "\t" + pair.target
        assert "".join(wanted) == pair.target + "\n"
        assert batch.is_wanted[i].tolist() == [j < length - 1 for j in range(len(batch.wanted[i]))]
        assert codec.target.decode(batch.wanted[i].tolist()) == pair.target
    assert torch.equal(batch.inputs[:, 1:], batch.wanted[:, :-1])


def test_batches_of_a_fixed_length_and_texts_that_are_too_long(file: Path) -> None:
    batch = next(iter(module(file, pad_to=(7, 12)).train_dataloader()))
    assert batch.source.shape == (4, 7)
    assert batch.target.shape == (4, 12)
    message = r"the source 'Wait\.' has 5 tokens, and there is room for 4 .* to \[5, 10\] or more"
    with pytest.raises(ValueError, match=message):
        module(file, pad_to=(4, 12))
    message = r"the target 'Bonjour\.|Attends\.' has 10 tokens with its two marks, .* room for 9"
    with pytest.raises(ValueError, match=message):
        module(file, pad_to=(5, 9))
    assert module(file, pad_to=(5, 10)).codec.pad_to == (5, 10)
    with pytest.raises(ValueError, match=r"the source 'Wait\.Go\.' has 8 tokens, .* room for 5"):
        module(file, pad_to=(5, 10)).codec.encode_sources(["Go.", "Wait.Go."])


@pytest.mark.parametrize("level", ["characters", "words"])
def test_the_longest_texts_are_known_beforehand(level: Any) -> None:
    """All numbers of up to four digits, and the days of a year and the years by themselves."""

    def longest(pairs: Iterable[Pair]) -> list[int]:
        texts = zip(*pairs, strict=True)
        return [max(len(split(text, level)) for text in column) for column in texts]

    for digits in (3, 4):
        numbers = Generated("numbers", "train", max_digits=digits)
        assert longest(numbers.texts()) == longest(map(number, range(10**digits)))
    known = longest(Generated("dates", "train").texts())
    first = datetime.date(2004, 1, 1).toordinal()
    days = [date(datetime.date.fromordinal(first + i)) for i in range(366)]
    years = [date(datetime.date(year, 1, 1)) for year in range(1000, 3000)]
    parts = zip(longest(days), longest(years), longest([days[0]]), strict=True)
    assert known == [day + year - both for day, year, both in parts]


def test_a_file_that_has_changed_is_read_again(file: Path) -> None:
    assert len(module(file).codec.source) == len(set("Go.Hi.Run!Wait."))
    file.write_text("a\tb\nb\tc\nc\td\n")
    os.utime(file, ns=(1, 1))
    assert len(module(file).codec.source) == 3


def test_a_codec_goes_through_primitives(file: Path) -> None:
    for changes in ({}, {"level": "words", "pad_to": (9, 9), "shared_vocabulary": True}):
        codec = module(file, **changes).codec
        assert Codec.of_primitives(codec.as_primitives()) == codec
    assert codec.source == codec.target


def test_what_a_vocabulary_does_not_know() -> None:
    letters = Vocabulary.of(["abc"], "characters")
    with pytest.raises(ValueError, match=r"character 'x' \(2 of 'axb'\) is not in the .*: abc"):
        letters.encode("axb")
    with pytest.raises(
        ValueError, match=r"word ' here' \(2 of 'is here'\) is not in the .* of 2 w"
    ):
        Vocabulary.of(["is there"], "words").encode("is here")
    with pytest.raises(ValueError, match=r"character 'x' \(101 of 'a{60}' \.\.\.\) is not in"):
        letters.encode("a" * 100 + "x")
    marked = Vocabulary.of(["abc"], "characters", ("\t", "\n"))
    for mark in "\t\n":  # as with a vocabulary that is shared
        with pytest.raises(ValueError, match="is not in the vocabulary: abc"):
            marked.encode(f"a{mark}b")
    with pytest.raises(ValueError, match="empty"):
        Codec(letters, letters).encode_sources([""])


def test_order_is_a_function_of_seed_epoch_and_rank(monkeypatch: pytest.MonkeyPatch) -> None:
    def batches(place: tuple[int, int], done: int, size: int) -> list[Any]:
        data = module(batch_size=size)
        monkeypatch.setattr(data, "place", lambda: place)
        monkeypatch.setattr(data, "progress", lambda: (done, 1.0))
        loader = data.train_dataloader()
        found = []
        for epoch in range(done // len(loader), 2):
            loader.batch_sampler.set_epoch(epoch)
            found += list(loader)
        return found

    whole = batches((0, 1), 0, 4)
    assert differences(batches((0, 1), 3, 4), whole[3:]) == []
    ranks = [batches((rank, 2), 0, 2) for rank in range(2)]
    for i, batch in enumerate(whole):
        assert batch.keys.tolist() == ranks[0][i].keys.tolist() + ranks[1][i].keys.tolist()
    assert set(whole[0].keys.tolist()).isdisjoint(b for x in whole[4:] for b in x.keys.tolist())


def test_a_tpu_takes_texts_of_one_length() -> None:
    data = TextDataModule("numbers", {"num_train": 4, "num_val": 2})
    data.trainer = Mock(accelerator=Mock(spec=XLAAccelerator), world_size=1)
    with pytest.raises(ValueError, match=r"a TPU compiles .* set data.init_args.pad_to, such as"):
        data.setup("fit")
    data.pad_to = (80, 80)
    data.setup("fit")
    assert data.codec.pad_to == (80, 80)
