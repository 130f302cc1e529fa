"""What methods that translate share: their vocabularies, their loss, how they are judged."""

from collections.abc import Sequence
from typing import Any, Protocol, runtime_checkable

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from lightning.pytorch import LightningModule
from torch import Tensor

from callbacks.tally import Tally
from datamodules.batch import TextBatch
from datamodules.text import TextDataModule
from datamodules.vocabulary import SPACE, Codec
from modules.decoding import Decoded, Search

KEY = "translation"  # where a checkpoint has its vocabularies


def codec_of(method: LightningModule, known: Codec | None) -> Codec:
    """The vocabularies of the trainer's data.

    Raises:
        ValueError: data that is no text, or others than a network was built for already.
    """
    data = getattr(method.trainer, "datamodule", None)
    if not isinstance(data, TextDataModule):
        raise ValueError(
            f"{type(method).__name__} translates, and the data is {type(data).__name__}; set "
            f"data.class_path to datamodules.TextDataModule"
        )
    check_same(data.codec, known)
    return data.codec


def check_same(data: Codec, network: Codec | None) -> None:
    """Refuse data of other vocabularies than those of a network."""
    if network is not None and data != network:
        raise ValueError(
            f"the data has {len(data.source)} source and {len(data.target)} target tokens, and "
            f"the checkpoint is of {len(network.source)} and {len(network.target)}, or of others, "
            f"or pad_to differs; use the data that it was trained on, or start a new run"
        )


def kept_codec(checkpoint: dict[str, Any], known: Codec | None) -> Codec:
    """The vocabularies out of a checkpoint.

    Raises:
        ValueError: a checkpoint that has none, or others than those of the data.
    """
    if KEY not in checkpoint:
        raise ValueError("the checkpoint has no vocabularies: it is of no method that translates")
    codec = Codec.of_primitives(checkpoint[KEY])
    if known is not None:
        check_same(known, codec)
    return codec


def keep_codec(checkpoint: dict[str, Any], method: LightningModule, codec: Codec | None) -> None:
    """Write them, and which method translates with them."""
    if codec is not None:
        checkpoint[KEY] = {"method": type(method).__name__, **codec.as_primitives()}


@runtime_checkable
class Translates(Protocol):
    """A method whose network is there."""

    codec: Codec | None

    def decode(self, batch: TextBatch, how: Search | None = None) -> Decoded: ...


def translate_texts(
    method: Translates, texts: Sequence[str], how: Search | None = None
) -> list[str]:
    """Translations of texts, by the method's own search where none is given.

    Raises:
        ValueError: an empty text, one that the vocabulary has no tokens for, or one longer than
            those that the model is for.
    """
    codec = method.codec
    assert codec is not None
    source, lengths = codec.encode_sources(texts)
    target, target_lengths = codec.encode_targets([""] * len(texts))
    keys = torch.arange(len(texts))
    is_valid = torch.ones(len(texts), dtype=torch.bool)
    batch = TextBatch(source, lengths, target, target_lengths, keys, keys, is_valid)
    return [codec.target.decode(row) for row in method.decode(batch, how).tokens.tolist()]


def with_spaces(batch: TextBatch, codec: Codec) -> TextBatch:
    """The classic formulation, in which padding is the space and counts like all else."""
    source = filled(batch.source, batch.source_lengths, codec.source[SPACE])
    target = filled(batch.target, batch.target_lengths, codec.target[SPACE])
    return batch._replace(source=source, target=target)


def check_spaces(codec: Codec) -> None:
    """Refuse vocabularies whose texts cannot be padded with spaces.

    Raises:
        ValueError: one without the space, or texts that are padded to the longest of their batch:
            what is made of one would depend on the others.
    """
    for name, vocabulary in (("source", codec.source), ("target", codec.target)):
        if SPACE not in vocabulary.tokens:
            raise ValueError(
                f"mask_padding is false, so that texts are padded with spaces, but the {name} "
                f"vocabulary has no space; set it to true"
            )
    if codec.pad_to is None:
        raise ValueError(
            "mask_padding is false, so that padding counts, but it is that of the longest text of "
            "a batch; set data.init_args.pad_to, such as [16, 60]"
        )


def filled(
    tokens: Int[Tensor, "b n"], lengths: Int[Tensor, " b"], token: int
) -> Int[Tensor, "b n"]:
    """Tokens with this one in the places of padding."""
    places = torch.arange(tokens.shape[1], device=tokens.device)
    return torch.where(places < lengths[:, None], tokens, token)


def text_losses(
    logits: Float[Tensor, "b t k"],
    wanted: Int[Tensor, "b t"],
    is_counted: Bool[Tensor, "b t"],
    smoothing: float = 0.0,
) -> Float[Tensor, " b"]:
    """Of every text the mean cross-entropy of its tokens, in float32.

    Texts count alike, not tokens: batches over devices and micro-batches then make the mean of
    one large batch, whatever the lengths of their texts.
    """
    each = F.cross_entropy(
        logits.float().transpose(1, 2), wanted, reduction="none", label_smoothing=smoothing
    )
    counted = is_counted.float()
    return (each * counted).sum(dim=1) / counted.sum(dim=1)


def is_exact(decoded: Decoded, batch: TextBatch, end: int) -> Bool[Tensor, " b"]:
    """Whether a translation is the expected one, token by token up to its end."""
    expected = batch.wanted.masked_fill(~batch.is_wanted, end)
    longest = max(expected.shape[1], decoded.tokens.shape[1])
    both = [F.pad(x, (0, longest - x.shape[1]), value=end) for x in (expected, decoded.tokens)]
    # Of a text that was cut off the last token is no end.
    has_ended = (decoded.tokens == end).any(dim=1)
    return (both[0] == both[1]).all(dim=1) & has_ended


def check_bins(bins: Sequence[int]) -> None:
    """Refuse lengths that do not rise.

    Raises:
        ValueError: such ones.
    """
    if any(a >= b for a, b in zip([0, *bins], bins, strict=False)):
        raise ValueError(f"length_bins is {list(bins)}; expected lengths that rise from 1 on")


class Judge:
    """Metrics of an evaluation, by the length of sources too.

    Logs `val/loss` and `val/token_accuracy`, where the decoder is given the expected text, and
    `val/accuracy`, the share of texts that it translates exactly without; the same for sources of
    so many tokens as `val/accuracy_1_to_20`, and so on.

    Args:
        bins: the longest source of each group but the last one, which has no end.
    """

    def __init__(self, bins: Sequence[int]) -> None:
        check_bins(bins)
        self.bins, self.tally = tuple(bins), Tally()

    def names(self) -> list[str]:
        starts = [1, *(last + 1 for last in self.bins)]
        ends = [f"{first}_to_{last}" for first, last in zip(starts, self.bins, strict=False)]
        return [*ends, f"from_{starts[-1]}"]

    def add(
        self,
        batch: TextBatch,
        logits: Float[Tensor, "b t k"],
        is_counted: Bool[Tensor, "b t"],
        is_right: Bool[Tensor, " b"],
    ) -> None:
        """One batch: logits where the expected text was given, and what was translated right."""
        valid, right = batch.is_valid.float(), (is_right & batch.is_valid).float()
        losses = text_losses(logits, batch.wanted, is_counted)
        counted = is_counted.float()
        hits = ((logits.argmax(dim=-1) == batch.wanted) * counted).sum(dim=1) / counted.sum(dim=1)
        edges = torch.tensor(self.bins, device=right.device)
        group = F.one_hot(torch.bucketize(batch.source_lengths, edges), len(self.bins) + 1).float()
        sums = [(losses * valid).sum(), (hits * valid).sum()]
        self.tally.add(*sums, *(right @ group), *(valid @ group))

    def log(self, method: LightningModule) -> None:
        """Log everything and begin anew."""
        loss, hits, *groups = self.tally.totals(method)
        right, counts = groups[: len(groups) // 2], groups[len(groups) // 2 :]
        total = sum(counts)
        method.log("val/loss", loss / total)
        method.log("val/token_accuracy", hits / total)
        method.log("val/accuracy", sum(right) / total, prog_bar=True)
        if self.bins:
            for name, ours, count in zip(self.names(), right, counts, strict=True):
                if count:
                    method.log(f"val/accuracy_{name}", ours / count)
