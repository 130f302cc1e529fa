"""The recurrent encoder and decoder of `modules.seq2seq`."""

from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.nn.modules.rnn import GRU
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

from modules.alignment import Alignment, Kind
from modules.backbones.row_rnn import whole

Cell = Literal["lstm", "gru"]
# Not `nn.GRU`: torch_xla puts one of its own there, which runs on no CPU.
CELLS = {"lstm": nn.LSTM, "gru": GRU}
Context = Literal["input", "output"]


class Tokens(nn.Module):
    """Tokens as vectors: one-hot, or embedded. Probabilities of tokens are as good as tokens."""

    def __init__(self, num_tokens: int, embedding_dim: int | None) -> None:
        super().__init__()
        self.num_tokens, self.dim = num_tokens, embedding_dim or num_tokens
        self.table = None if embedding_dim is None else nn.Embedding(num_tokens, embedding_dim)

    def forward(self, tokens: Int[Tensor, "b t"] | Float[Tensor, "b t k"]) -> Tensor:
        """[b, t, dim]."""
        if tokens.is_floating_point():
            return tokens if self.table is None else tokens @ self.table.weight
        if self.table is None:
            return F.one_hot(tokens, self.num_tokens).float()
        out: Tensor = self.table(tokens)
        return out


class Memory(NamedTuple):
    """What a decoder carries from step to step; rows can be selected (`modules.decoding`).

    h:        [b, layers, d] hidden state
    c:        [b, layers, d] cell state of an LSTM, None of a GRU
    outputs:  [b, s, d] of the encoder, None without attention
    prepared: [b, s, a] of these (`Alignment.prepare`), None likewise
    is_valid: [b, s] False at padding of the source, None likewise
    """

    h: Float[Tensor, "b layers d"]
    c: Float[Tensor, "b layers d"] | None
    outputs: Float[Tensor, "b s d"] | None
    prepared: Float[Tensor, "b s a"] | None
    is_valid: Bool[Tensor, "b s"] | None

    @property
    def of_source(self) -> tuple[str, ...]:
        """What is alike for all prefixes of a text."""
        return ("outputs", "prepared", "is_valid")


def masked(
    rnn: nn.RNNBase, x: Float[Tensor, "b s e"], lengths: Int[Tensor, " b"]
) -> tuple[Float[Tensor, "b s d"], Any]:
    """What an LSTM or a GRU makes of packed sequences, in shapes that do not depend on `lengths`.

    At padding states stay as they are, so that the way from the end begins at each text's own, and
    outputs are zeros. For TPUs, which unroll the steps in any case.
    """
    is_token = (torch.arange(x.shape[1], device=x.device) < lengths[:, None])[..., None].unbind(1)
    is_lstm, ways = isinstance(rnn, nn.LSTM), 2 if rnn.bidirectional else 1
    last: list[tuple[Tensor, ...]] = []
    for number, weights in enumerate(rnn.all_weights):
        layer, is_back = divmod(number, ways)
        if not is_back:  # both ways of a layer read the same
            x = x if layer == 0 else F.dropout(torch.cat(outputs, -1), rnn.dropout, rnn.training)
            outputs: list[Tensor] = []
        state = (x.new_zeros(len(x), rnn.hidden_size),) * (2 if is_lstm else 1)
        said = [state[0]] * x.shape[1]
        for i in sorted(range(x.shape[1]), reverse=bool(is_back)):
            new = (
                torch.lstm_cell(x[:, i], state, *weights)
                if is_lstm
                else (torch.gru_cell(x[:, i], state[0], *weights),)
            )
            state = tuple(torch.where(is_token[i], a, b) for a, b in zip(new, state, strict=True))
            said[i] = torch.where(is_token[i], state[0], 0.0)
        outputs.append(torch.stack(said, dim=1))
        last.append(state)
    states = tuple(torch.stack(parts) for parts in zip(*last, strict=True))
    return torch.cat(outputs, -1), states if is_lstm else states[0]


class EncoderDecoder(nn.Module):
    """One recurrent network reads the source, another says the target from the first one's state.

    A bidirectional encoder has half of the width each way, so that its states side by side are
    the decoder's and no layer is needed between.

    Args:
        num_sources, num_targets: sizes of the vocabularies.
        others: those of `modules.Seq2Seq`.
    """

    def __init__(
        self,
        num_sources: int,
        num_targets: int,
        cell: Cell = "lstm",
        hidden_dim: int = 256,
        num_layers: int = 1,
        embedding_dim: int | None = None,
        bidirectional: bool = False,
        attention: Kind | None = None,
        context: Context = "output",
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        self.cell, self.bidirectional, self.num_layers = cell, bidirectional, num_layers
        self.sources = Tokens(num_sources, embedding_dim)
        self.targets = Tokens(num_targets, embedding_dim)
        between = dropout if num_layers > 1 else 0.0  # torch's is between layers
        shape = {"num_layers": num_layers, "batch_first": True, "dropout": between}
        self.encoder = CELLS[cell](
            self.sources.dim,
            hidden_dim // 2 if bidirectional else hidden_dim,
            bidirectional=bidirectional,
            **shape,
        )
        self.looks_first = attention is not None and context == "input"
        width = self.targets.dim + (hidden_dim if self.looks_first else 0)
        self.decoder = CELLS[cell](width, hidden_dim, **shape)
        self.attention: Alignment | None = None
        self.combine: nn.Linear | None = None
        if attention is not None:
            self.attention = Alignment(attention, hidden_dim, hidden_dim, hidden_dim)
            if not self.looks_first:
                self.combine = nn.Linear(2 * hidden_dim, hidden_dim, bias=False)
        self.head = nn.Linear(hidden_dim, num_targets)
        self.drop = nn.Dropout(dropout)

    def encode(self, source: Int[Tensor, "b s"], lengths: Int[Tensor, " b"] | None) -> Memory:
        """Read the sources; with `lengths` what comes after is never seen."""
        x = self.drop(self.sources(source))
        with whole(x) as x:
            outputs, state = self.read(x, lengths)
        h, c = state if self.cell == "lstm" else (state, None)
        h, c = self.side_by_side(h), None if c is None else self.side_by_side(c)
        if self.attention is None:
            return Memory(h, c, None, None, None)
        places = torch.arange(x.shape[1], device=x.device)
        every = torch.full_like(source[:, 0], x.shape[1]) if lengths is None else lengths
        is_valid = places < every[:, None]
        return Memory(h, c, outputs, self.attention.prepare(outputs), is_valid)

    def read(
        self, x: Float[Tensor, "b s e"], lengths: Int[Tensor, " b"] | None
    ) -> tuple[Float[Tensor, "b s d"], Any]:
        """The encoder's outputs and its last state."""
        if lengths is None:
            outputs, state = self.encoder(x)
            return outputs, state
        if x.device.type == "xla":
            return masked(self.encoder, x, lengths)
        packed = pack_padded_sequence(  # which torch plans on the CPU
            x, lengths.cpu(), batch_first=True, enforce_sorted=False
        )
        read, state = self.encoder(packed)
        outputs, _ = pad_packed_sequence(read, batch_first=True, total_length=x.shape[1])
        return outputs, state

    def side_by_side(self, state: Float[Tensor, "_ b _"]) -> Float[Tensor, "b layers d"]:
        """The states of both directions of a layer as one, the batch first."""
        ways = 2 if self.bidirectional else 1
        return rearrange(state, "(layers ways) b e -> b layers (ways e)", ways=ways).contiguous()

    def decode(
        self, tokens: Int[Tensor, "b t"] | Float[Tensor, "b t k"], memory: Memory
    ) -> tuple[Float[Tensor, "b t k"], Memory, Float[Tensor, "b t s"] | None]:
        """Logits of the tokens after these, the memory afterwards, and where the decoder looked.

        Of t steps at once or one by one it is the same.
        """
        x = self.drop(self.targets(tokens))
        if not self.looks_first:
            states, memory = self.advance(x, memory)
            if self.combine is None:
                return self.head(self.drop(states)), memory, None
            weights, contexts = self.look(states, memory)
            states = torch.tanh(self.combine(torch.cat((contexts, states), dim=-1)))
            return self.head(self.drop(states)), memory, weights
        steps, looked = [], []
        for i in range(x.shape[1]):
            weights, contexts = self.look(memory.h[:, -1:], memory)
            states, memory = self.advance(torch.cat((x[:, i : i + 1], contexts), dim=-1), memory)
            steps.append(states)
            looked.append(weights)
        return self.head(self.drop(torch.cat(steps, dim=1))), memory, torch.cat(looked, dim=1)

    def advance(
        self, x: Float[Tensor, "b t e"], memory: Memory
    ) -> tuple[Float[Tensor, "b t d"], Memory]:
        """The decoder's cells over some steps."""
        h = memory.h.transpose(0, 1).contiguous()
        with whole(x) as x:
            if memory.c is None:
                states, h = self.decoder(x, h)
                return states, memory._replace(h=h.transpose(0, 1))
            states, (h, c) = self.decoder(x, (h, memory.c.transpose(0, 1).contiguous()))
        return states, memory._replace(h=h.transpose(0, 1), c=c.transpose(0, 1))

    def look(
        self, queries: Float[Tensor, "b t d"], memory: Memory
    ) -> tuple[Float[Tensor, "b t s"], Float[Tensor, "b t d"]]:
        """Weights over the source, and contexts."""
        assert self.attention is not None
        assert memory.outputs is not None
        weights: Tensor = self.attention(queries, memory.prepared, memory.is_valid)
        return weights, weights.to(memory.outputs.dtype) @ memory.outputs

    def step(
        self, tokens: Int[Tensor, " n"], memory: Memory
    ) -> tuple[Float[Tensor, "n k"], Memory]:
        """One step of `modules.decoding`."""
        logits, memory, _ = self.decode(tokens[:, None], memory)
        return logits[:, 0], memory
