"""Sequence to sequence: a recurrent network reads a text, another one says its translation.

"Sequence to Sequence Learning with Neural Networks" (Sutskever et al. 2014); attention as in
"Neural Machine Translation by Jointly Learning to Align and Translate" (Bahdanau et al. 2014) and
"Effective Approaches to Attention-based Neural Machine Translation" (Luong et al. 2015).

    h_1 .. h_s, state = encoder(source)
    y_0 = start
    for i = 1 .. t:
        context = input    c_i = attention(s_{i-1}, h);  s_i = cell([y_{i-1}; c_i], s_{i-1})
                           logits_i = W s_i                                  Bahdanau
        context = output   s_i = cell(y_{i-1}, s_{i-1});  c_i = attention(s_i, h)
                           logits_i = W tanh(W_c [c_i; s_i])                 Luong
        loss_i = -log softmax(logits_i)[target_i]
    loss = mean over texts of the mean of loss_i over the tokens of each, its end among them

Without attention all that the decoder knows of the source is the encoder's last state: a vector of
one width whatever the length, so long texts suffer first (Bahdanau et al. 2014, figure 2).

What stands for y_{i-1} in training:

- **Teacher forcing** (Williams and Zipser 1989): the expected token. Every step learns from a right
  prefix, whatever the steps before it would have said, so it learns fast, and since no input
  depends on an output, all steps run at once. But the decoder never sees its own mistakes, and
  after the first one of a translation it stands where it has never been ("exposure bias").
- **Reinjection** (`teacher_forcing: 0`): its own last prediction, as in a translation. At first
  these are noise, so that a step is asked for the i-th token after a prefix that does not tell
  where in the text it is; all it can learn from is the state, and one wrong token makes all later
  losses of the text about something else. It learns slower, and steps wait for each other.
- **Scheduled sampling** (Bengio et al. 2015): forcing for a share of the steps, which falls from
  `teacher_forcing` to `teacher_forcing_end` over the run: the first to learn, the second to get
  used to its own mistakes.
"""

from collections.abc import Sequence
from typing import Any, Literal

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from lightning.pytorch import LightningModule
from torch import Tensor

from callbacks.host import log_mean, log_number
from datamodules.augment import TEACH, uniforms
from datamodules.batch import TextBatch
from datamodules.vocabulary import Codec
from modules import optim
from modules.alignment import KINDS, Kind
from modules.alignment_pictures import alignments
from modules.checks import check_at_least, check_precision
from modules.decoding import Decoded, Search, search
from modules.optim import Optimization
from modules.seq2seq_network import CELLS, Cell, Context, EncoderDecoder, Memory
from modules.translation import (
    Judge,
    check_spaces,
    codec_of,
    is_exact,
    keep_codec,
    kept_codec,
    text_losses,
    with_spaces,
)

OPTIMIZATION = Optimization(base_lr=1e-3, reference_batch=None, weight_decay=0.0)


class Seq2Seq(LightningModule):
    """Trains a recurrent encoder and decoder on pairs of texts.

    Logs `train/loss`, `schedule/teacher_forcing` and what `modules.translation.Judge` does.

    Args:
        cell: "lstm" or "gru".
        hidden_dim: width of the states.
        num_layers: of encoder and decoder.
        embedding_dim: width of tokens; null for one-hot tokens.
        bidirectional: the encoder reads both ways, with half of the width each.
        attention: "additive" (Bahdanau), "general" or "dot" (Luong); null for none.
        context: what attention finds goes into the decoder's "input" or beside its "output".
        dropout: of embedded tokens, between layers and before the head.
        optimizer: how to optimise.
        teacher_forcing: share of the decoder's inputs that are the expected tokens; 0 is
            reinjection.
        teacher_forcing_end: where that share goes over the run, step by step; null leaves it.
        reinject: what takes the place of the others: the most probable token ("argmax") or all
            of them by their probabilities ("softmax"), through which gradients flow.
        label_smoothing: share of the target spread over all tokens.
        mask_padding: what follows the end of a text is not read and counts in no loss; else it
            is spaces that count, the classic formulation, which needs the data's `pad_to`.
        search: how held-out sources are translated.
        length_bins: longest sources of the groups that accuracy is logged for.

    Raises:
        ValueError: values out of range, options that nothing would read, data that is no text.
    """

    network: EncoderDecoder

    def __init__(
        self,
        cell: Cell = "lstm",
        hidden_dim: int = 256,
        num_layers: int = 1,
        embedding_dim: int | None = None,
        bidirectional: bool = False,
        attention: Kind | None = None,
        context: Context = "output",
        dropout: float = 0.0,
        optimizer: Optimization = OPTIMIZATION,
        teacher_forcing: float = 1.0,
        teacher_forcing_end: float | None = None,
        reinject: Literal["argmax", "softmax"] = "argmax",
        label_smoothing: float = 0.0,
        mask_padding: bool = True,
        search: Search = Search(),  # noqa: B008 - frozen
        length_bins: Sequence[int] = (20, 40, 60),
    ) -> None:
        super().__init__()
        self.save_hyperparameters(logger=False)  # the run's config.yaml has them
        width = 1 if embedding_dim is None else embedding_dim
        check_at_least(1, hidden_dim=hidden_dim, num_layers=num_layers, embedding_dim=width)
        for name, value, known in (
            ("cell", cell, tuple(CELLS)),
            ("attention", attention, (*KINDS, None)),
            ("context", context, ("input", "output")),
            ("reinject", reinject, ("argmax", "softmax")),
        ):
            if value not in known:
                listed = ", ".join("null" if each is None else each for each in known)
                raise ValueError(f"{name} is {value!r}; expected one of {listed}")
        shares = {"teacher_forcing": teacher_forcing, "teacher_forcing_end": teacher_forcing_end}
        for name, share in shares.items():
            if share is not None and not 0.0 <= share <= 1.0:
                raise ValueError(f"{name} is {share}; expected within [0, 1]")
        if reinject != "argmax" and teacher_forcing == 1.0 and teacher_forcing_end in (None, 1.0):
            raise ValueError(
                f"reinject is {reinject!r}, but with teacher_forcing 1.0 nothing is reinjected; "
                f"set teacher_forcing or teacher_forcing_end below 1, or leave reinject out"
            )
        for name, rate in (("dropout", dropout), ("label_smoothing", label_smoothing)):
            if not 0.0 <= rate < 1.0:
                raise ValueError(f"{name} is {rate}; expected within [0, 1)")
        if bidirectional and hidden_dim % 2:
            raise ValueError(
                f"hidden_dim is {hidden_dim}, half of which is for each way of a bidirectional "
                f"encoder; make it even"
            )
        if attention is None and context != "output":
            raise ValueError(f"context is {context!r}, but attention is null; set one of them")
        widths, reading = (cell, hidden_dim, num_layers, embedding_dim), (bidirectional, attention)
        self.shape = (*widths, *reading, context, dropout)
        self.optimization, self.label_smoothing = optimizer, label_smoothing
        self.forcing = (teacher_forcing, teacher_forcing_end)
        self.reinject, self.mask_padding, self.search = reinject, mask_padding, search
        self.judge = Judge(length_bins)
        self.codec: Codec | None = None  # and no network yet: its size is that of vocabularies

    def build(self, codec: Codec) -> None:
        """Make the network for these vocabularies.

        Raises:
            ValueError: texts that cannot be padded with spaces, where padding is not masked.
        """
        if not self.mask_padding:
            check_spaces(codec)
        self.codec = codec
        self.network = EncoderDecoder(len(codec.source), len(codec.target), *self.shape)

    def setup(self, stage: str) -> None:
        check_precision(self.trainer)
        codec = codec_of(self, self.codec)
        if self.codec is None:
            self.build(codec)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        keep_codec(checkpoint, self, self.codec)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        codec = kept_codec(checkpoint, self.codec)
        if self.codec is None:
            self.build(codec)

    def padded(self, batch: TextBatch) -> tuple[TextBatch, Bool[Tensor, "b u"]]:
        """The batch with its padding, and which of its tokens count."""
        if self.mask_padding:
            return batch, batch.is_wanted
        assert self.codec is not None
        return with_spaces(batch, self.codec), torch.ones_like(batch.is_wanted)

    def encode(self, batch: TextBatch) -> Memory:
        """Of a padded batch."""
        return self.network.encode(
            batch.source, batch.source_lengths if self.mask_padding else None
        )

    def forward(self, batch: TextBatch) -> Float[Tensor, "b u k"]:
        """Logits of every token of the target, given those before it."""
        logits, _, _ = self.network.decode(batch.inputs, self.encode(batch))
        return logits

    def reinjected(self, batch: TextBatch, share: float) -> Float[Tensor, "b u k"]:
        """The same, given for only this share of the steps the expected token before it.

        Which steps is a function of the pair's key.
        """
        memory, length = self.encode(batch), batch.inputs.shape[1]
        is_forced = uniforms(batch.keys, TEACH, length) < share
        given: Tensor = batch.inputs[:, :1]  # the start is always given
        said = []
        for i in range(length):
            logits, memory, _ = self.network.decode(given, memory)
            said.append(logits)
            if i + 1 < length:
                expected, forced = batch.inputs[:, i + 1 : i + 2], is_forced[:, i + 1 : i + 2]
                given = self.next_input(logits, expected, forced)
        return torch.cat(said, dim=1)

    def next_input(
        self,
        logits: Float[Tensor, "b 1 k"],
        expected: Int[Tensor, "b 1"],
        is_forced: Bool[Tensor, "b 1"],
    ) -> Int[Tensor, "b 1"] | Float[Tensor, "b 1 k"]:
        if self.reinject == "argmax":
            return torch.where(is_forced, expected, logits.argmax(dim=-1))
        certain = F.one_hot(expected, logits.shape[-1]).to(logits.dtype)
        return torch.where(is_forced[:, :, None], certain, logits.softmax(dim=-1))

    def training_step(self, batch: TextBatch, batch_idx: int) -> dict[str, Tensor]:
        batch, is_counted = self.padded(batch)
        share = self.share()
        logits = self(batch) if share == 1.0 else self.reinjected(batch, share)
        loss = text_losses(logits, batch.wanted, is_counted, self.label_smoothing).mean()
        log_mean(self, "train/loss", loss, batch.num_pairs)
        return {"loss": loss}

    def share(self) -> float:
        """Of the decoder's inputs that are expected tokens, at this step of the run."""
        first, last = self.forcing
        if last is None:
            return first
        return first + (last - first) * min(1.0, self.trainer.global_step / self.lr.total)

    def validation_step(self, batch: TextBatch, batch_idx: int) -> None:
        padded, is_counted = self.padded(batch)
        assert self.codec is not None
        is_right = is_exact(self.decode(batch), batch, self.codec.end)
        self.judge.add(padded, self(padded), is_counted, is_right)

    def on_validation_epoch_end(self) -> None:
        self.judge.log(self)

    def decode(self, batch: TextBatch, how: Search | None = None) -> Decoded:
        """Translate the sources of a batch."""
        assert self.codec is not None
        marks, memory = (self.codec.start, self.codec.end), self.encode(self.padded(batch)[0])
        return search(self.network.step, memory, *marks, how or self.search)

    def pictures(self, batch: TextBatch) -> dict[str, Float[Tensor, "3 rows columns"]]:
        """Where the decoder looks as it translates sources, without attention nothing."""
        if self.network.attention is None:
            return {}
        assert self.codec is not None
        decoded = self.decode(batch)
        inputs = torch.cat((batch.target[:, :1], decoded.tokens[:, :-1]), dim=1)
        _, _, weights = self.network.decode(inputs, self.encode(self.padded(batch)[0]))
        assert weights is not None
        return {"alignment": alignments(self.codec, batch, decoded.tokens, weights)}

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return optim.build(self.optimization, self.network)

    def on_train_start(self) -> None:
        self.lr = optim.learning_rate(self.optimization, self.trainer)

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        lr, _ = optim.follow(self.optimization, self.lr, self.trainer)
        log_number(self, "schedule/lr", lr)
        log_number(self, "schedule/teacher_forcing", self.share())

    def configure_gradient_clipping(self, *_: Any, **__: Any) -> None:
        optim.clip(self.optimization, self.network.parameters())
