"""The Transformer: attention in the place of recurrence, for texts.

"Attention Is All You Need" (Vaswani et al. 2017), sections 3 and 5.

    x = dropout(sqrt(d) E[source] + P)         P sines and cosines of the place
    for each of N encoder layers:
        x = LN(x + dropout(attention(x, x)))            every token of the source sees all
        x = LN(x + dropout(MLP(x)))
    y = dropout(sqrt(d) E[start, target] + P)
    for each of N decoder layers:
        y = LN(y + dropout(attention(y, y)))            a token sees itself and those before it
        y = LN(y + dropout(attention(y, x)))            and the source
        y = LN(y + dropout(MLP(y)))
    logits = y E^T
    loss = mean over texts of the mean over tokens of the smoothed cross-entropy

The published norm comes after the residual ("post"), and with it the learning rate has to rise
slowly. With the norm before ("pre", "On Layer Normalization in the Transformer Architecture", Xiong
et al. 2020) the encoder is made of the blocks of Vision Transformers, `modules.backbones.layers`.

The published loss is a mean over the tokens of a batch; here texts count alike, for the reason in
`modules.translation.text_losses`.
"""

from collections.abc import Sequence
from typing import Any, Literal

import torch
from jaxtyping import Float
from lightning.pytorch import LightningModule
from torch import Tensor

from callbacks.host import log_mean, log_number
from datamodules.batch import TextBatch
from datamodules.vocabulary import Codec
from modules import optim
from modules.alignment_pictures import alignments
from modules.backbones.layers import check_heads
from modules.checks import check_at_least, check_precision
from modules.decoding import Decoded, Search, search
from modules.optim import Optimization
from modules.transformer_network import EncoderDecoder, Norm, Tied
from modules.translation import (
    Judge,
    codec_of,
    is_exact,
    keep_codec,
    kept_codec,
    text_losses,
)

OPTIMIZATION = Optimization(
    base_lr=6.988e-4,  # (512 * 4000)^-0.5
    reference_batch=None,
    weight_decay=0.0,
    beta2=0.98,
    eps=1e-9,
    schedule="noam",
    warmup_steps=4000,
    min_lr=0.0,
)


class Transformer(LightningModule):
    """Trains a Transformer on pairs of texts.

    Logs `train/loss` and what `modules.translation.Judge` does.

    Args:
        embed_dim: width d.
        num_heads: of every attention, each of width d / heads.
        mlp_dim: width of the MLPs.
        depth: layers of the encoder, and of the decoder.
        dropout: of the sums of embedding and place, and of what each part of a layer adds.
        norm: "post" as published, or "pre".
        activation: of the MLPs, "relu" as published, or "gelu".
        tied: which tables of tokens are one: "all" three as published, which needs the data's
            `shared_vocabulary`; the target's and the "output"'s; or "none".
        optimizer: how to optimise; (embed_dim * warmup_steps)^-0.5 is the published rate.
        label_smoothing: share of the target spread over all tokens.
        search: how held-out sources are translated; published with a beam of 4 and a length
            penalty of 0.6.
        length_bins: longest sources of the groups that accuracy is logged for.

    Raises:
        ValueError: values out of range, data that is no text or has two vocabularies to tie.
    """

    network: EncoderDecoder

    def __init__(
        self,
        embed_dim: int = 512,
        num_heads: int = 8,
        mlp_dim: int = 2048,
        depth: int = 6,
        dropout: float = 0.1,
        norm: Norm = "post",
        activation: Literal["relu", "gelu"] = "relu",
        tied: Tied = "all",
        optimizer: Optimization = OPTIMIZATION,
        label_smoothing: float = 0.1,
        search: Search = Search(),  # noqa: B008 - frozen
        length_bins: Sequence[int] = (20, 40, 60),
    ) -> None:
        super().__init__()
        self.save_hyperparameters(logger=False)  # the run's config.yaml has them
        check_at_least(1, num_heads=num_heads, mlp_dim=mlp_dim, depth=depth)
        check_at_least(2, embed_dim=embed_dim)
        check_heads(embed_dim, num_heads)
        if embed_dim % 2:
            raise ValueError(f"embed_dim is {embed_dim}; sines and cosines of places need it even")
        for name, value, known in (
            ("norm", norm, ("post", "pre")),
            ("activation", activation, ("relu", "gelu")),
            ("tied", tied, ("all", "output", "none")),
        ):
            if value not in known:
                raise ValueError(f"{name} is {value!r}; expected one of {', '.join(known)}")
        for name, rate in (("dropout", dropout), ("label_smoothing", label_smoothing)):
            if not 0.0 <= rate < 1.0:
                raise ValueError(f"{name} is {rate}; expected within [0, 1)")
        self.shape = (embed_dim, num_heads, mlp_dim, depth, dropout, norm, activation, tied)
        self.optimization, self.label_smoothing, self.tied = optimizer, label_smoothing, tied
        self.search, self.judge = search, Judge(length_bins)
        self.codec: Codec | None = None  # and no network yet: its size is that of vocabularies

    def build(self, codec: Codec) -> None:
        """Make the network for these vocabularies.

        Raises:
            ValueError: two of them where all tables are tied.
        """
        if self.tied == "all" and codec.source != codec.target:
            raise ValueError(
                "tied is all, but source and target have a vocabulary each; set "
                "data.init_args.shared_vocabulary to true, or tied to output"
            )
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

    def forward(self, batch: TextBatch) -> Float[Tensor, "b u k"]:
        """Logits of every token of the target, given those before it."""
        memory = self.network.encode(batch.source, batch.source_lengths)
        logits, _, _ = self.network.decode(batch.inputs, memory)
        return logits

    def training_step(self, batch: TextBatch, batch_idx: int) -> dict[str, Tensor]:
        logits = self(batch)
        losses = text_losses(logits, batch.wanted, batch.is_wanted, self.label_smoothing)
        loss = losses.mean()
        log_mean(self, "train/loss", loss, batch.num_pairs)
        return {"loss": loss}

    def validation_step(self, batch: TextBatch, batch_idx: int) -> None:
        assert self.codec is not None
        is_right = is_exact(self.decode(batch), batch, self.codec.end)
        self.judge.add(batch, self(batch), batch.is_wanted, is_right)

    def on_validation_epoch_end(self) -> None:
        self.judge.log(self)

    def decode(self, batch: TextBatch, how: Search | None = None) -> Decoded:
        """Translate the sources of a batch."""
        assert self.codec is not None
        memory = self.network.encode(batch.source, batch.source_lengths)
        marks = (self.codec.start, self.codec.end)
        return search(self.network.step, memory, *marks, how or self.search)

    def pictures(self, batch: TextBatch) -> dict[str, Float[Tensor, "3 rows columns"]]:
        """Where the last layer of the decoder looks as it translates sources; mean of heads."""
        assert self.codec is not None
        decoded = self.decode(batch)
        inputs = torch.cat((batch.target[:, :1], decoded.tokens[:, :-1]), dim=1)
        memory = self.network.encode(batch.source, batch.source_lengths)
        _, _, weights = self.network.decode(inputs, memory)
        return {"alignment": alignments(self.codec, batch, decoded.tokens, weights)}

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return optim.build(self.optimization, self.network)

    def on_train_start(self) -> None:
        self.lr = optim.learning_rate(self.optimization, self.trainer)

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        lr, _ = optim.follow(self.optimization, self.lr, self.trainer)
        log_number(self, "schedule/lr", lr)

    def configure_gradient_clipping(self, *_: Any, **__: Any) -> None:
        optim.clip(self.optimization, self.network.parameters())
