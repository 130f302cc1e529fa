"""From tokens to one vector an image, for images of one size and for packs."""

import torch
from einops import rearrange
from jaxtyping import Bool, Float
from torch import Tensor, nn

from modules.backbones.attention import Segments, attend
from modules.backbones.layers import MLP, BlockStyle, check_heads, head_norm, layer_norm


def is_own(segments: Segments) -> Bool[Tensor, "rows slots n"]:
    """Which tokens are patches of the image in each slot."""
    slots = torch.arange(segments.slots, device=segments.ids.device)
    return (segments.ids[:, None] == slots[:, None]) & segments.is_patch[:, None]


def mean_patch(
    x: Float[Tensor, "rows n d"], segments: Segments | None = None
) -> Float[Tensor, "m d"]:
    """The mean over an image's patches; without segments, a row is an image. Zeros where none."""
    if segments is None:
        return x.mean(dim=1)
    # A product with zeros and ones: the same sum in the same order every time.
    with torch.autocast(x.device.type, enabled=False):
        own = is_own(segments).float()
        total = own @ x.float() / own.sum(-1, keepdim=True).clamp(min=1)
    return total.flatten(0, 1).to(x.dtype)


def prefix_token(
    x: Float[Tensor, "rows n d"], index: int, segments: Segments | None = None
) -> Float[Tensor, "m d"]:
    """Prefix token `index` of every image. Zeros where there is no image."""
    if segments is None:
        return x[:, index]
    places = (segments.starts() + index).clamp(max=segments.ids.numel() - 1)
    return only_filled(x.flatten(0, 1)[places], segments)


def only_filled(x: Float[Tensor, "m d"], segments: Segments | None) -> Float[Tensor, "m d"]:
    """Zeros in the place of what a slot without an image has given."""
    return x if segments is None else torch.where(segments.is_filled[:, None], x, 0.0)


def pool_by_attention(
    q: Float[Tensor, "1 h 1 e"],
    k: Float[Tensor, "rows h n e"],
    v: Float[Tensor, "rows h n e"],
    segments: Segments | None,
    scale: float | None = None,
) -> Float[Tensor, "m d"]:
    """What one query an image reads from its patches; queries of empty slots see the whole row."""
    mask, count = None, 1
    if segments is not None:
        own, count = is_own(segments), segments.slots
        mask = (own | ~own.any(dim=-1, keepdim=True))[:, None]
    out = attend(q.expand(k.shape[0], -1, count, -1), k, v, mask, scale=scale)
    return rearrange(out, "rows h slots e -> (rows slots) (h e)")


class AttentionPool(nn.Module):
    """Multi-head attention pooling, MAP (Zhai et al. 2021, section 3.3).

    One learned query an image attends to its patches; then x + MLP(LN(x)).
    """

    scale = None

    def __init__(self, dim: int, num_heads: int, mlp_dim: int, style: BlockStyle) -> None:
        super().__init__()
        check_heads(dim, num_heads)
        self.num_heads = num_heads
        self.latent = nn.Parameter(torch.zeros(1, 1, dim))
        self.q, self.kv = nn.Linear(dim, dim), nn.Linear(dim, 2 * dim)
        self.proj = nn.Linear(dim, dim)
        self.norm = layer_norm(dim, style)
        self.mlp = MLP(dim, mlp_dim, style)

    def forward(
        self, x: Float[Tensor, "rows n d"], segments: Segments | None = None
    ) -> Float[Tensor, "m d"]:
        pooled = self.proj(pool_by_attention(*self.project(x), segments))
        out: Tensor = pooled + self.mlp(self.norm(pooled))
        return only_filled(out, segments)

    def project(self, x: Float[Tensor, "rows n d"]) -> tuple[Tensor, Tensor, Tensor]:
        """The query [1, h, 1, e], and keys and values of the patches, each [rows, h, n, e]."""
        heads = {"h": self.num_heads}
        q = rearrange(self.q(self.latent), "one n (h e) -> one h n e", **heads)
        k, v = rearrange(self.kv(x), "b n (two h e) -> two b h n e", two=2, **heads).unbind(0)
        return q, k, v


class QueryPool(nn.Module):
    """Attention pooling without an MLP, as in vit-pytorch's NaViT.

    query + MHA(LN(query), patches): biases and norms of q and k are those of the blocks.
    """

    def __init__(self, dim: int, num_heads: int, style: BlockStyle) -> None:
        super().__init__()
        check_heads(dim, num_heads)
        self.num_heads, self.scale = num_heads, style.attention_scale
        self.latent = nn.Parameter(torch.zeros(1, 1, dim))
        self.norm = layer_norm(dim, style)
        self.q = nn.Linear(dim, dim, bias=style.qkv_bias)
        self.kv = nn.Linear(dim, 2 * dim, bias=style.qkv_bias)
        self.q_norm, self.k_norm = (head_norm(dim, num_heads, style) for _ in range(2))
        self.proj = nn.Linear(dim, dim, bias=style.proj_bias)

    def forward(
        self, x: Float[Tensor, "rows n d"], segments: Segments | None = None
    ) -> Float[Tensor, "m d"]:
        read = pool_by_attention(*self.project(x), segments, self.scale)
        return only_filled(self.proj(read) + self.latent[0], segments)

    def project(self, x: Float[Tensor, "rows n d"]) -> tuple[Tensor, Tensor, Tensor]:
        """The query [1, h, 1, e], and keys and values of the patches, each [rows, h, n, e]."""
        heads = {"h": self.num_heads}
        q = rearrange(self.q(self.norm(self.latent)), "one n (h e) -> one h n e", **heads)
        k, v = rearrange(self.kv(x), "b n (two h e) -> two b h n e", two=2, **heads).unbind(0)
        return self.q_norm(q), self.k_norm(k), v
