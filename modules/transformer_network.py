"""The encoder and decoder of `modules.transformer`."""

import math
from collections.abc import Callable
from typing import Literal, NamedTuple

import torch
from einops import rearrange
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from modules.backbones.attention import attend
from modules.backbones.layers import MLP, Attention, Block, BlockStyle, layer_norm
from modules.multihead import MultiHeadAttention

Norm = Literal["post", "pre"]
Tied = Literal["all", "output", "none"]
KeysAndValues = tuple[Tensor, Tensor]


def sinusoids(length: int, dim: int, first: int = 0) -> Float[Tensor, "n d"]:
    """sin(p / 10000^(2j/d)) and its cosine side by side, for the places p from `first` on."""
    places = torch.arange(first, first + length, dtype=torch.float64)[:, None]
    angles = places / 10_000 ** (torch.arange(0, dim, 2, dtype=torch.float64) / dim)
    return torch.stack((angles.sin(), angles.cos()), dim=-1).flatten(1).float()


class Layer(nn.Module):
    """Self-attention, attention to the source where it `crosses`, MLP, each with a residual.

    Post-norm, as published: LN(x + dropout(f(x))). Pre-norm: x + dropout(f(LN(x))), which without
    the attention in the middle is the vision `Block`, under the same names.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        mlp_dim: int,
        style: BlockStyle,
        dropout: float,
        norm: Norm,
        crosses: bool,
    ) -> None:
        super().__init__()
        self.is_pre = norm == "pre"
        self.norm1, self.norm2 = layer_norm(dim, style), layer_norm(dim, style)
        self.attn = Attention(dim, num_heads, style, dropout)
        # The published MLP has no dropout inside, the vision block's has.
        self.mlp = MLP(dim, mlp_dim, style, dropout if self.is_pre else 0.0)
        self.mlp_drop = nn.Dropout(0.0 if self.is_pre else dropout)
        self.cross: MultiHeadAttention | None = None
        if crosses:
            self.cross = MultiHeadAttention(dim, num_heads, dim // num_heads)
            self.norm_cross, self.cross_drop = layer_norm(dim, style), nn.Dropout(dropout)

    def forward(
        self,
        x: Float[Tensor, "b t d"],
        mask: Bool[Tensor, "#b 1 t n"] | None,
        memory: KeysAndValues | None = None,
        sees: Bool[Tensor, "b 1 1 s"] | None = None,
        past: KeysAndValues | None = None,
    ) -> tuple[Float[Tensor, "b t d"], KeysAndValues, Float[Tensor, "b h t s"] | None]:
        """The next x, its keys and values after those that are `past`, and weights of the source.

        Args:
            mask: which of all n = past and present tokens each token sees; None for all.
            memory, sees: keys and values of the source, and which of its tokens there are.
        """
        seen, weights = [], None

        def look_back(y: Tensor) -> Tensor:
            q, k, v = self.attn.project(y)
            if past is not None:
                k, v = torch.cat((past[0], k), dim=2), torch.cat((past[1], v), dim=2)
            seen.append((k, v))
            out = rearrange(attend(q, k, v, mask), "b h n e -> b n (h e)")
            return self.attn.drop(self.attn.proj(out))  # type: ignore[no-any-return]

        x = self.around(self.norm1, x, look_back)
        if self.cross is not None:
            assert memory is not None
            query = self.norm_cross(x) if self.is_pre else x
            read, weights = self.cross.look(query, *memory, sees)
            x = x + self.cross_drop(read)
            x = x if self.is_pre else self.norm_cross(x)
        x = self.around(self.norm2, x, lambda y: self.mlp_drop(self.mlp(y)))
        return x, seen[0], weights

    def around(self, norm: nn.Module, x: Tensor, f: Callable[[Tensor], Tensor]) -> Tensor:
        """f with its residual and norm."""
        if self.is_pre:
            return x + f(norm(x))
        out: Tensor = norm(x + f(x))
        return out


class Memory(NamedTuple):
    """What the decoder carries from step to step; rows can be selected (`modules.decoding`).

    source_k, source_v: [b, layers, h, s, e] of the encoder's output
    is_valid:           [b, s] False at padding of the source
    k, v:               [b, layers, h, t, e] of the tokens so far, None before the first one
    """

    source_k: Float[Tensor, "b layers h s e"]
    source_v: Float[Tensor, "b layers h s e"]
    is_valid: Bool[Tensor, "b s"]
    k: Float[Tensor, "b layers h t e"] | None = None
    v: Float[Tensor, "b layers h t e"] | None = None

    @property
    def of_source(self) -> tuple[str, ...]:
        """What is alike for all prefixes of a text."""
        return ("source_k", "source_v", "is_valid")


class EncoderDecoder(nn.Module):
    """Blocks that read the source, and others that say the target and look at the first ones.

    Args:
        num_sources, num_targets: sizes of the vocabularies.
        others: those of `modules.Transformer`.
    """

    def __init__(
        self,
        num_sources: int,
        num_targets: int,
        embed_dim: int = 512,
        num_heads: int = 8,
        mlp_dim: int = 2048,
        depth: int = 6,
        dropout: float = 0.1,
        norm: Norm = "post",
        activation: Literal["relu", "gelu"] = "relu",
        tied: Tied = "all",
    ) -> None:
        super().__init__()
        style = BlockStyle(mlp=activation)
        shape = (embed_dim, num_heads, mlp_dim, style, dropout)
        self.embed_dim = embed_dim
        self.targets = nn.Embedding(num_targets, embed_dim)
        self.sources = self.targets if tied == "all" else nn.Embedding(num_sources, embed_dim)
        self.head = nn.Linear(embed_dim, num_targets, bias=False)
        self.encoder = nn.ModuleList(
            Block(*shape) if norm == "pre" else Layer(*shape, norm, crosses=False)
            for _ in range(depth)
        )
        self.decoder = nn.ModuleList(Layer(*shape, norm, crosses=True) for _ in range(depth))
        ends = [layer_norm(embed_dim, style) if norm == "pre" else nn.Identity() for _ in range(2)]
        self.encoder_norm, self.decoder_norm = ends
        self.drop = nn.Dropout(dropout)
        fused = {part.qkv for part in self.modules() if isinstance(part, Attention)}
        for part in self.modules():
            if isinstance(part, nn.Linear):
                for each in part.weight.chunk(3 if part in fused else 1):
                    nn.init.xavier_uniform_(each)  # q, k and v each on its own
                if part.bias is not None:
                    nn.init.zeros_(part.bias)
        for table in (self.sources, self.targets):
            nn.init.normal_(table.weight, std=embed_dim**-0.5)
        if tied != "none":
            self.head.weight = self.targets.weight

    def embed(
        self, table: nn.Module, tokens: Int[Tensor, "b n"], first: int = 0
    ) -> Float[Tensor, "b n d"]:
        """Tokens as vectors, times sqrt(d), and their places."""
        places = sinusoids(tokens.shape[1], self.embed_dim, first).to(tokens.device)
        out: Tensor = self.drop(table(tokens) * math.sqrt(self.embed_dim) + places)
        return out

    def encode(self, source: Int[Tensor, "b s"], lengths: Int[Tensor, " b"]) -> Memory:
        """Read the sources; what comes after their lengths is never seen."""
        length = source.shape[1]
        is_valid = torch.arange(length, device=source.device) < lengths[:, None]
        mask = is_valid[:, None, None].expand(-1, -1, length, -1)
        x = self.embed(self.sources, source)
        for block in self.encoder:
            x = block(x, mask) if isinstance(block, Block) else block(x, mask)[0]
        x = self.encoder_norm(x)
        made = [layer.cross.remember(x) for layer in self.decoder]  # type: ignore[union-attr, operator]
        k, v = (torch.stack(parts, dim=1) for parts in zip(*made, strict=True))
        return Memory(k, v, is_valid)

    def decode(
        self, tokens: Int[Tensor, "b t"], memory: Memory, keep: bool = False
    ) -> tuple[Float[Tensor, "b t k"], Memory, Float[Tensor, "b t s"]]:
        """Logits of the tokens after these, the memory, and where the last layer looked.

        Of t tokens at once or one by one it is the same, where the memory is to `keep` them.
        """
        first = 0 if memory.k is None else memory.k.shape[3]
        length = tokens.shape[1]
        causal = torch.ones(length, first + length, dtype=torch.bool, device=tokens.device)
        mask = causal.tril(first)[None, None]
        x = self.embed(self.targets, tokens, first)
        kept, weights = [], None
        for i, layer in enumerate(self.decoder):
            source = (memory.source_k[:, i], memory.source_v[:, i])
            past = None
            if memory.k is not None and memory.v is not None:
                past = (memory.k[:, i], memory.v[:, i])
            sees = memory.is_valid[:, None, None]
            x, mine, weights = layer(x, mask, source, sees, past)
            kept.append(mine)
        if keep:
            k, v = (torch.stack(parts, dim=1) for parts in zip(*kept, strict=True))
            memory = memory._replace(k=k, v=v)
        assert weights is not None
        logits: Tensor = self.head(self.decoder_norm(x))
        return logits, memory, weights.mean(dim=1)

    def step(
        self, tokens: Int[Tensor, " n"], memory: Memory
    ) -> tuple[Float[Tensor, "n k"], Memory]:
        """One step of `modules.decoding`."""
        logits, memory, _ = self.decode(tokens[:, None], memory, keep=True)
        return logits[:, 0], memory
