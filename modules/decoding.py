"""From a model of the next token to a whole text: greedy and beam search.

    greedy   at every step the most probable token
    beam     at every step the `size` prefixes y of the highest score

    score(y) = log p(y | x) / lp(y),   lp(y) = ((5 + |y|) / 6)^alpha,   |y| with the end

The length penalty is that of "Google's Neural Machine Translation System" (Wu et al. 2016, section
7), which the Transformer uses with 4 prefixes and alpha 0.6; alpha 0 leaves log p. A beam may lose
the prefix that would have been greedy's and end below it, so greedy's text takes part at the end:
the score of a beam is never below greedy's. The best text that has ended is kept aside: prefixes
that look better for a while cannot push it out.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple, TypeVar

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

# What a decoder carries from step to step: a NamedTuple of tensors, the batch first, or None. Parts
# named in its `of_source`, if it has one, are alike for all prefixes of a text.
State = TypeVar("State", bound=tuple[Any, ...])
# One step: the last token of every row and the state before it; logits and the state after it.
Step = Callable[[Int[Tensor, " n"], State], tuple[Float[Tensor, "n k"], State]]


class Decoded(NamedTuple):
    """Texts without their start.

    tokens: [b, t] the end, and nothing but it afterwards, where a text has one
    scores: [b] of each, as above
    """

    tokens: Int[Tensor, "b t"]
    scores: Float[Tensor, " b"]


def length_penalty(length: Int[Tensor, "*b"], alpha: float) -> Float[Tensor, "*b"]:
    return ((5.0 + length) / 6.0) ** alpha


def select(state: State, rows: Int[Tensor, " n"], keep: Sequence[str] = ()) -> State:
    """These rows of a state, in this order; parts to `keep` stay as they are."""
    parts: list[Any] = [
        part if part is None or name in keep else part[rows]
        for name, part in zip(state._fields, state, strict=True)  # type: ignore[attr-defined]
    ]
    return type(state)(*parts)


@dataclass(frozen=True)
class Search:
    """How a translation is looked for.

    Args:
        beam_size: prefixes that are kept; 1 is greedy.
        length_penalty: alpha above; more of it favours longer texts.
        max_length: tokens at which a text is cut off that did not end.

    Raises:
        ValueError: values out of range.
    """

    beam_size: int = 1
    length_penalty: float = 0.0
    max_length: int = 200

    def __post_init__(self) -> None:
        for name, least in (("beam_size", 1), ("max_length", 1), ("length_penalty", 0)):
            value = getattr(self, name)
            if value < least:
                raise ValueError(f"search.{name} is {value}; expected at least {least}")
        if self.length_penalty and self.beam_size == 1:
            raise ValueError(
                f"search.length_penalty is {self.length_penalty}, but a beam of 1 has no other "
                f"text to prefer; set beam_size to more, or length_penalty to 0"
            )


@torch.no_grad()
def search(step: Step[State], state: State, start: int, end: int, how: Search) -> Decoded:
    """The best text that is found, for every row of a state.

    Args:
        step: of the model.
        state: before the first step; its first part is a tensor [b, ...].
        start, end: the marks.
        how: how to look for it.
    """
    greedy = beam(step, state, start, end, replace(how, beam_size=1, length_penalty=0.0))
    if how.beam_size == 1:
        return greedy
    wide = beam(step, state, start, end, how)
    # The score of greedy's text is the beam's: log p over the penalty of its length.
    length = (greedy.tokens != end).sum(dim=1) + (greedy.tokens[:, -1] == end)
    scores = greedy.scores / length_penalty(length, how.length_penalty)
    longest = max(greedy.tokens.shape[1], wide.tokens.shape[1])
    texts = [F.pad(d.tokens, (0, longest - d.tokens.shape[1]), value=end) for d in (wide, greedy)]
    tokens = torch.where((scores > wide.scores)[:, None], texts[1], texts[0])
    return Decoded(tokens, torch.maximum(scores, wide.scores))


def beam(step: Step[State], state: State, start: int, end: int, how: Search) -> Decoded:
    """Beam search alone; a prefix that has ended stays as it is until better ones push it out."""
    size, alpha = how.beam_size, how.length_penalty
    of_source = getattr(state, "of_source", ())
    b, device = len(state[0]), state[0].device
    rows = torch.arange(b, device=device)
    state = select(state, rows.repeat_interleave(size))
    tokens = torch.full((b, size, 1), start, device=device)
    # All prefixes of a text are alike at first, so but one of them counts.
    total = torch.full((b, size), -torch.inf, device=device)
    total[:, 0] = 0.0
    length = torch.zeros(b, size, dtype=torch.int64, device=device)
    has_ended = torch.zeros(b, size, dtype=torch.bool, device=device)
    top, aside = torch.full((b,), -torch.inf, device=device), tokens[:, 0]
    for _ in range(how.max_length):
        logits, state = step(tokens[:, :, -1].flatten(), state)
        steps = F.log_softmax(logits.float(), dim=-1).view(b, size, -1)
        k = steps.shape[-1]
        # The only continuation of a text that has ended is its end again, at no cost.
        stay = torch.full_like(steps[0, 0], -torch.inf)
        stay[end] = 0.0
        totals = total[:, :, None] + torch.where(has_ended[:, :, None], stay, steps)
        lengths = length + (~has_ended).long()
        scores = totals / length_penalty(lengths, alpha)[:, :, None]
        score, best = scores.flatten(1).topk(size, dim=1)
        origin, chosen = best // k, best % k
        total = totals.flatten(1).gather(1, best)
        length, ended = lengths.gather(1, origin), has_ended.gather(1, origin)
        has_ended = ended | (chosen == end)
        state = select(state, (rows[:, None] * size + origin).flatten(), of_source)
        kept = tokens.gather(1, origin[:, :, None].expand(-1, -1, tokens.shape[2]))
        tokens = torch.cat((kept, chosen[:, :, None]), dim=2)
        ended_score, place = score.masked_fill(~has_ended, -torch.inf).max(dim=1)
        is_better = (ended_score > top)[:, None]
        aside = torch.where(is_better, tokens[rows, place], F.pad(aside, (0, 1), value=end))
        top = torch.maximum(top, ended_score)
        if bool(has_ended.all()):
            break
    # One that was cut off counts as well.
    cut_off, place = score.max(dim=1)
    found = torch.where((cut_off > top)[:, None], tokens[rows, place], aside)
    return Decoded(found[:, 1:], torch.maximum(cut_off, top))
