"""Multi-head attention from one sequence to another, with keys and values of their own widths.

"Attention Is All You Need" (Vaswani et al. 2017, section 3.2), in the form of Keras's layer.

    q = query W_q + b_q    [b, h, t, d]       what is looked for
    k = key   W_k + b_k    [b, h, s, d]       what it is compared with
    v = value W_v + b_v    [b, h, s, dv]      what is read
    a = softmax over s of q k^T / sqrt(d)     seen or not as the mask says
    out = concat over heads of dropout(a) v, times W_o + b_o

`modules.backbones.layers.Attention` is the self-attention of Vision Transformers, all of one width.
"""

import math

from einops import rearrange
from jaxtyping import Bool, Float
from torch import Tensor, nn

from modules.checks import check_at_least

# What a key that is not seen has for its score: e^(this) is 0, and a query that sees nothing
# looks everywhere alike.
UNSEEN = -1e9


class MultiHeadAttention(nn.Module):
    """Attention of `num_heads` heads, each with its own projections.

    Args:
        query_dim: width of what looks.
        num_heads: h.
        key_dim: d of each head.
        value_dim: dv of each head; null for key_dim.
        memory_dim: width of what is looked at; null for query_dim.
        content_dim: width of what is read there; null for memory_dim.
        out_dim: width of the output; null for query_dim.
        dropout: of the weights.
        bias: whether projections have a bias.
    """

    def __init__(
        self,
        query_dim: int,
        num_heads: int,
        key_dim: int,
        value_dim: int | None = None,
        memory_dim: int | None = None,
        out_dim: int | None = None,
        content_dim: int | None = None,
        dropout: float = 0.0,
        bias: bool = True,
    ) -> None:
        super().__init__()
        value_dim = key_dim if value_dim is None else value_dim
        memory_dim = query_dim if memory_dim is None else memory_dim
        content_dim = memory_dim if content_dim is None else content_dim
        out_dim = query_dim if out_dim is None else out_dim
        check_at_least(1, num_heads=num_heads, key_dim=key_dim, value_dim=value_dim)
        check_at_least(1, memory_dim=memory_dim, content_dim=content_dim, out_dim=out_dim)
        self.num_heads, self.scale = num_heads, 1.0 / math.sqrt(key_dim)
        self.query = nn.Linear(query_dim, num_heads * key_dim, bias=bias)
        self.key = nn.Linear(memory_dim, num_heads * key_dim, bias=bias)
        self.value = nn.Linear(content_dim, num_heads * value_dim, bias=bias)
        self.out = nn.Linear(num_heads * value_dim, out_dim, bias=bias)
        self.drop = nn.Dropout(dropout)
        for layer in (self.query, self.key, self.value, self.out):
            nn.init.xavier_uniform_(layer.weight)
            if layer.bias is not None:
                nn.init.zeros_(layer.bias)

    def forward(
        self,
        query: Float[Tensor, "b t _"],
        key: Float[Tensor, "b s _"],
        value: Float[Tensor, "b s _"] | None = None,
        mask: Bool[Tensor, "#b #h #t s"] | None = None,
    ) -> tuple[Float[Tensor, "b t _"], Float[Tensor, "b h t s"]]:
        """The output and the weights before dropout.

        `value` is `key` where none is given; `mask` is True where a query sees a key.
        """
        return self.look(query, *self.remember(key, value), mask)

    def remember(
        self, key: Float[Tensor, "b s _"], value: Float[Tensor, "b s _"] | None = None
    ) -> tuple[Float[Tensor, "b h s d"], Float[Tensor, "b h s dv"]]:
        """Keys and values, made once for all queries."""
        return self.heads(self.key(key)), self.heads(self.value(key if value is None else value))

    def look(
        self,
        query: Float[Tensor, "b t _"],
        k: Float[Tensor, "b h s d"],
        v: Float[Tensor, "b h s dv"],
        mask: Bool[Tensor, "#b #h #t s"] | None = None,
    ) -> tuple[Float[Tensor, "b t _"], Float[Tensor, "b h t s"]]:
        """What `forward` gives, of keys and values that are there already."""
        scores = (self.heads(self.query(query)) * self.scale) @ k.mT
        scores = scores.float()
        if mask is not None:
            scores = scores.masked_fill(~mask, UNSEEN)
        weights = scores.softmax(dim=-1)
        read = self.drop(weights).to(v.dtype) @ v
        return self.out(rearrange(read, "b h t e -> b t (h e)")), weights

    def heads(self, x: Float[Tensor, "b n _"]) -> Float[Tensor, "b h n _"]:
        return rearrange(x, "b n (h e) -> b h n e", h=self.num_heads)
