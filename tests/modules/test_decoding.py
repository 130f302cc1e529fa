"""Greedy and beam search against every text that there is."""

import itertools
import math
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from modules.decoding import Search, beam, length_penalty, search

START, END, K = 0, 1, 4


class Prefix(NamedTuple):
    """All tokens so far [n, t], and which of the models [n] is asked."""

    model: Tensor
    tokens: Tensor


def model(seed: int, ends: float = 0.0) -> Tensor:
    """Logits after the last two tokens, for three models: [3, k, k, k]."""
    generator = torch.Generator().manual_seed(seed)
    logits = 2 * torch.randn(3, K, K, K, generator=generator)
    logits[..., START] = -torch.inf
    logits[..., END] += ends
    return logits


def step_of(logits: Tensor):  # type: ignore[no-untyped-def]
    def step(tokens: Tensor, state: Prefix) -> tuple[Tensor, Prefix]:
        after = torch.cat((state.tokens, tokens[:, None]), dim=1)
        return logits[state.model, after[:, -2], after[:, -1]], Prefix(state.model, after)

    return step


def first() -> Prefix:
    return Prefix(torch.arange(3), torch.full((3, 1), START))


def log_p(logits: Tensor, text: tuple[int, ...]) -> float:
    """Of a text up to its end."""
    before, last, total = START, START, 0.0
    for token in text:
        total += float(logits[before, last].log_softmax(-1)[token])
        before, last = last, token
        if token == END:
            break
    return total


def cut(text: tuple[int, ...]) -> tuple[int, ...]:
    return text[: text.index(END) + 1] if END in text else text


@pytest.mark.parametrize("alpha", [0.0, 0.6, 2.0])
def test_a_wide_beam_finds_the_best_of_all_texts(alpha: float) -> None:
    logits, length = model(0), 4
    how = Search(beam_size=K**length, length_penalty=alpha, max_length=length)
    found = search(step_of(logits), first(), START, END, how)
    for i in range(3):
        every = {cut(text) for text in itertools.product(range(1, K), repeat=length)}
        scores = {
            text: log_p(logits[i], text) / float(length_penalty(torch.tensor(len(text)), alpha))
            for text in every
        }
        best = max(scores, key=scores.__getitem__)
        assert cut(tuple(found.tokens[i].tolist())) == best
        assert float(found.scores[i]) == pytest.approx(scores[best], abs=1e-5)


def test_greedy_takes_the_most_probable_token_and_a_beam_of_one_is_greedy() -> None:
    for seed in range(6):
        logits = model(seed)
        found = beam(step_of(logits), first(), START, END, Search(max_length=6))
        for i in range(3):
            before, last, said = START, START, []
            while END not in said and len(said) < 6:
                before, last = last, int(logits[i, before, last].argmax())
                said.append(last)
            assert cut(tuple(found.tokens[i].tolist())) == tuple(said)
            assert float(found.scores[i]) == pytest.approx(log_p(logits[i], tuple(said)), abs=1e-5)
        same = search(step_of(logits), first(), START, END, Search(max_length=6))
        assert torch.equal(same.tokens, found.tokens)


def trap() -> Tensor:
    """Two prefixes of 3 push greedy's 2 2 out of a beam of two, and lead nowhere."""
    p = torch.full((1, 5, 5, 5), 0.2)
    p[0, START, START] = torch.tensor([0, 0, 0.55, 0.45, 0])
    p[0, START, 2] = torch.tensor([0, 0, 0.34, 0.33, 0.33])
    p[0, START, 3] = torch.tensor([0, 0, 0.5, 0.5, 0])
    p[0, 2, 2] = torch.tensor([0, 1.0, 0, 0, 0])
    return p.log()


@pytest.mark.parametrize("alpha", [0.0, 1.0])
def test_the_score_of_a_beam_is_never_below_greedys(alpha: float) -> None:
    how = Search(beam_size=2, length_penalty=alpha, max_length=6)
    cases = [(trap(), Prefix(torch.zeros(1, dtype=torch.int64), torch.full((1, 1), START)))]
    cases += [(model(seed, ends=-1.0), first()) for seed in range(8)]
    for case, (logits, state) in enumerate(cases):
        step = step_of(logits)
        greedy = search(step, state, START, END, Search(max_length=6))
        length = torch.tensor([len(cut(tuple(row))) for row in greedy.tokens.tolist()])
        score = greedy.scores / length_penalty(length, alpha)
        wide = search(step, state, START, END, how)
        assert (wide.scores >= score - 1e-6).all()
        if case == 0:  # where a beam alone would be
            assert float(beam(step, state, START, END, how).scores) < float(score) - 0.1
            assert cut(tuple(wide.tokens[0].tolist())) == (2, 2, END)
        for i, row in enumerate(wide.tokens.tolist()):  # and it is that of the text
            text = cut(tuple(row))
            penalty = float(length_penalty(torch.tensor(len(text)), alpha))
            expected = log_p(logits[i], text) / penalty
            assert float(wide.scores[i]) == pytest.approx(expected, abs=1e-5)


def test_a_text_that_has_ended_is_not_lost() -> None:
    """Two longer prefixes with better scores push it out of a beam of two, and come to less."""
    p = torch.full((1, 5, 5, 5), 0.25)
    p[..., START] = 0.0
    p[0, START, START] = torch.tensor([0, 0.35, 0.4, 0.25, 0])
    p[0, START, 2] = torch.tensor([0, 0, 0, 0.5, 0.5])
    state = Prefix(torch.zeros(1, dtype=torch.int64), torch.full((1, 1), START))
    how = Search(beam_size=2, length_penalty=3.0, max_length=4)
    found = beam(step_of(p.log()), state, START, END, how)
    assert cut(tuple(found.tokens[0].tolist())) == (END,)
    assert float(found.scores[0]) == pytest.approx(math.log(0.35), abs=1e-6)


def test_the_length_penalty_favours_longer_texts() -> None:
    assert float(length_penalty(torch.tensor(1), 0.6)) == 1.0
    assert float(length_penalty(torch.tensor(19), 1.0)) == 4.0
    lengths = []
    for alpha in (0.0, 5.0):
        how = Search(beam_size=4, length_penalty=alpha, max_length=8)
        found = [search(step_of(model(s)), first(), START, END, how).tokens for s in range(10)]
        lengths.append(sum(len(cut(tuple(row))) for each in found for row in each.tolist()))
    assert lengths[1] > lengths[0]


def test_values_out_of_range() -> None:
    for name, value in (("beam_size", 0), ("max_length", 0), ("length_penalty", -1.0)):
        with pytest.raises(ValueError, match=f"search.{name} is {value}"):
            Search(**{name: value})  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="a beam of 1 has no other text"):
        Search(length_penalty=0.6)
