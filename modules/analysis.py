"""What a backbone looks at and what it has learned, as numbers; `modules.drawing` draws them.

Fused attention kernels return no attention. So `observe` keeps the queries and keys of one forward
pass, and rows of the softmax are computed from them afterwards, for chosen queries only:

    seen = observe(backbone.eval(), images)
    readout_attention(seen)         [b, h, rows, columns]   what each head reads the image from
    rollout(seen)                   [b, rows, columns]      the same through all layers
    attention_distance(seen)        [layers, h]             in pixels
    patch_pca(seen.features.patches)
    jaccard(keep_mass(readout_attention(seen)), masks)

Nothing here depends on a class token. What an image's vector is read from is defined once, the
read-out's attention: with pooling "cls" the class token's row of the last block; with attention
pooling the row of the pool's query; with average pooling the mean of the patches' rows of the last
block. Class token, distillation token and registers are never among the columns of a map.
"""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor, nn

from modules.backbones import Backbone, Features, Packed
from modules.backbones.factorised import Factorised
from modules.backbones.layers import Attention
from modules.backbones.navit import places
from modules.backbones.pooling import AttentionPool, QueryPool
from modules.backbones.resampling import Grid

# Entries of attention that exist at a time: 16 MiB of float32, which caches hold in part.
CHUNK = 2**22


class Layer(NamedTuple):
    """The scores of one layer before they are computed.

    q, k:  [b, h, n, e] and [b, h, m, e], after their norms
    bias:  [1, h, n, m] what is added to the scores, None for nothing
    scale: factor of the scores, None for e^-0.5
    """

    q: Float[Tensor, "b h n e"]
    k: Float[Tensor, "b h m e"]
    bias: Float[Tensor, "1 h n m"] | None
    scale: float | None

    def scores(self, queries: slice | Sequence[int]) -> Float[Tensor, "b h q m"]:
        """What a softmax over the last axis makes attention of; float32 at least."""
        wide = torch.promote_types(self.q.dtype, torch.float32)
        q, k = self.q[:, :, queries].to(wide), self.k.to(wide)
        scale = q.shape[-1] ** -0.5 if self.scale is None else self.scale
        scores = (q * scale) @ k.transpose(-1, -2)
        return scores if self.bias is None else scores + self.bias[:, :, queries].to(wide)


class Observed(NamedTuple):
    """One forward pass.

    features:   what the backbone returned
    grid:       rows and columns of the patches
    layers:     its self-attention layers in the order of the pass; none for a backbone whose
                attention does not see all tokens
    pool:       the attention of its attention pooling, over patches only; None without one
    reads_cls:  pooling reads the class token
    num_prefix: tokens before the patches
    patch_size: in pixels
    """

    features: Features
    grid: Grid
    layers: tuple[Layer, ...]
    pool: Layer | None
    reads_cls: bool
    num_prefix: int
    patch_size: int

    @property
    def num_images(self) -> int:
        return self.features.patches.shape[0]

    def chunks(self, start: int, stop: int) -> Iterator[slice]:
        """Queries `start` to `stop`, so many at a time that their attention stays small."""
        layer = self.layers[0]
        step = max(1, CHUNK // (layer.q.shape[0] * layer.q.shape[1] * layer.k.shape[2]))
        for first in range(start, stop, step):
            yield slice(first, min(first + step, stop))


@torch.no_grad()
def observe(backbone: Backbone, images: Float[Tensor, "b c height width"] | Packed) -> Observed:
    """Run images of one size and keep the queries and keys of every layer.

    They take 2 L b n d numbers; no attention is computed. In training mode dropout is part of
    what is seen.

    Raises:
        ValueError: a pack, or images that the backbone does not take.
    """
    if not isinstance(images, Tensor):
        raise ValueError("a pack cannot be observed; give its images one by one, or by size")
    layers: list[Layer] = []
    pools: list[Layer] = []
    with ExitStack() as hooks:
        for module in backbone.modules():
            if isinstance(module, Attention | AttentionPool | QueryPool):
                kept = layers if isinstance(module, Attention) else pools
                handle = module.register_forward_pre_hook(partial(keep, kept))
                hooks.callback(handle.remove)
        features = backbone(images)
    return Observed(
        features=features,
        grid=features.grid,
        layers=tuple(layers),
        pool=pools[0] if pools else None,
        reads_cls=getattr(backbone, "pooling", None) == "cls",
        num_prefix=backbone.num_prefix_tokens,
        patch_size=backbone.patch_size,
    )


def keep(
    kept: list[Layer], module: Attention | AttentionPool | QueryPool, inputs: tuple[Any, ...]
) -> None:
    """Note the queries and keys of an attention that is about to be computed."""
    q, k, _ = module.project(inputs[0])
    bias = inputs[1] if isinstance(module, Attention) and len(inputs) > 1 else None
    kept.append(Layer(q.expand(k.shape[0], -1, -1, -1), k, bias, module.scale))


def attention_rows(
    seen: Observed, queries: Sequence[int], layers: Sequence[int] | None = None
) -> Float[Tensor, "layers b h queries n"]:
    """Rows of the softmax: what tokens `queries` attend to, prefix tokens included.

    Args:
        queries: token numbers; patch i is `num_prefix + i`.
        layers: which layers, negative ones from the last; None for all.

    Raises:
        ValueError: a backbone without attention over all tokens.
    """
    check_layers(seen)
    chosen = range(len(seen.layers)) if layers is None else layers
    return torch.stack([seen.layers[i].scores(list(queries)).softmax(-1) for i in chosen])


def check_layers(seen: Observed) -> None:
    if not seen.layers:
        raise ValueError(
            "this backbone has no attention over all tokens of an image; patch_pca and "
            "embedding_filters are what can be seen of it"
        )


def weighted_row(
    seen: Observed, layer: Layer, weights: Float[Tensor, "b n"]
) -> Float[Tensor, "b h n"]:
    """sum_i weights_i attention_i of each head, without all rows at once."""
    total = weights.new_zeros(layer.k.shape[:3])
    for chunk in seen.chunks(0, layer.q.shape[2]):
        rows = layer.scores(chunk).softmax(-1)
        total = total + torch.einsum("bq,bhqn->bhn", weights[:, chunk].to(rows.dtype), rows)
    return total


def mean_of_patches(seen: Observed) -> Float[Tensor, "b n"]:
    """Weights that average over the patches among all tokens."""
    n = seen.layers[-1].q.shape[2]
    is_patch = torch.arange(n, device=seen.layers[-1].q.device) >= seen.num_prefix
    return (is_patch.float() / is_patch.sum()).expand(seen.num_images, -1)


def as_map(seen: Observed, tokens: Float[Tensor, "*b n"]) -> Float[Tensor, "*b rows columns"]:
    rows, columns = seen.grid
    return tokens[..., -rows * columns :].view(*tokens.shape[:-1], rows, columns)


@torch.no_grad()
def readout_attention(seen: Observed) -> Float[Tensor, "b h rows columns"]:
    """What each head reads the image's vector from, in one layer (see the head of this file).

    With a class token DINO's picture: the last block's `attentions[0, :, 0, 1:]`
    (`visualize_attention.py`). A map sums to 1 less what goes to class token and registers.

    Raises:
        ValueError: a backbone without attention over all tokens.
    """
    if seen.pool is not None:
        return as_map(seen, seen.pool.scores(slice(None)).softmax(-1)[:, :, 0])
    check_layers(seen)
    if seen.reads_cls:
        return as_map(seen, seen.layers[-1].scores([0]).softmax(-1)[:, :, 0])
    return as_map(seen, weighted_row(seen, seen.layers[-1], mean_of_patches(seen)))


def keep_mass(
    attention: Float[Tensor, "*b rows columns"], mass: float = 0.6
) -> Bool[Tensor, "*b rows columns"]:
    """The largest entries of each map that hold `mass` of its sum.

    DINO's rule (`visualize_attention.py`): in ascending order and divided by their sum, the
    entries whose cumulative sum exceeds 1 - mass.

    Raises:
        ValueError: a mass outside (0, 1].
    """
    if not 0.0 < mass <= 1.0:
        raise ValueError(f"mass is {mass}; expected a share within (0, 1]")
    flat = attention.flatten(-2)
    ascending, order = flat.sort(dim=-1)
    ascending = ascending / ascending.sum(dim=-1, keepdim=True)
    is_kept = ascending.cumsum(dim=-1) > 1.0 - mass
    back = torch.zeros_like(is_kept).scatter(-1, order, is_kept)
    return back.view(attention.shape)


def jaccard(
    is_kept: Bool[Tensor, "*b rows columns"], is_object: Bool[Tensor, "*b height width"]
) -> Float[Tensor, "*b"]:
    """Intersection over union of maps of patches with masks, in pixels of the masks.

    How DINO measures that attention finds objects (Caron et al. 2021, figure 4).

    Raises:
        ValueError: masks whose sides are no multiples of the map's.
    """
    down, across = (a // b for a, b in zip(is_object.shape[-2:], is_kept.shape[-2:], strict=True))
    fine = is_kept.repeat_interleave(down, dim=-2).repeat_interleave(across, dim=-1)
    if fine.shape[-2:] != is_object.shape[-2:]:
        raise ValueError(
            f"masks of {tuple(is_object.shape[-2:])} pixels for {tuple(is_kept.shape[-2:])} "
            f"patches; expected whole pixels in a patch"
        )
    both, either = (fine & is_object).sum((-2, -1)), (fine | is_object).sum((-2, -1))
    return both / either.clamp_min(1)


@torch.no_grad()
def rollout(seen: Observed) -> Float[Tensor, "b rows columns"]:
    """Attention rollout, "Quantifying Attention Flow in Transformers" (Abnar & Zuidema 2020).

        A~ = 0.5 mean over heads of A + 0.5 I        its rows sum to 1 as they are
        rollout = A~_L ... A~_2 A~_1

    of which this is the read-out's row over the patches: class token, pool's query or mean over
    patches. It is multiplied from the left, so that only rows exist and no product of matrices.

    Raises:
        ValueError: a backbone without attention over all tokens.
    """
    check_layers(seen)
    if seen.pool is not None:
        row = F.pad(readout_attention(seen).mean(dim=1).flatten(1), (seen.num_prefix, 0))
    elif seen.reads_cls:
        row = torch.zeros_like(mean_of_patches(seen))
        row[:, 0] = 1.0
    else:
        row = mean_of_patches(seen)
    for layer in reversed(seen.layers):
        row = 0.5 * weighted_row(seen, layer, row).mean(dim=1) + 0.5 * row
    return as_map(seen, row)


@torch.no_grad()
def attention_distance(seen: Observed, renorm: bool = True) -> Float[Tensor, "layers h"]:
    """Mean distance in pixels from a patch to what it attends to, over patches and images.

    "An Image is Worth 16x16 Words" (Dosovitskiy et al. 2020, section 4.5 and appendix D.7):
    mean_i sum_j A_ij P |p_i - p_j| with p row and column of a patch and P its side. Published
    code for it there is none; here only patches count, as queries and as keys.

    Args:
        renorm: the attention among patches sums to 1; else what goes to class token and
            registers counts as no distance.

    Raises:
        ValueError: a backbone without attention over all tokens.
    """
    check_layers(seen)
    prefix, (rows, columns) = seen.num_prefix, seen.grid
    device = seen.layers[0].q.device
    place = torch.cartesian_prod(*(torch.arange(n, device=device).float() for n in (rows, columns)))
    totals = [torch.zeros(layer.q.shape[1], device=device) for layer in seen.layers]
    for chunk in seen.chunks(prefix, prefix + rows * columns):
        own = place[chunk.start - prefix : chunk.stop - prefix]
        apart = (own[:, None] - place).norm(dim=-1) * seen.patch_size
        for i, layer in enumerate(seen.layers):
            scores = layer.scores(chunk)
            share = scores[..., prefix:].softmax(-1) if renorm else scores.softmax(-1)[..., prefix:]
            totals[i] = totals[i] + (share * apart.to(share.dtype)).sum(dim=(0, 2, 3))
    return torch.stack(totals) / (rows * columns * seen.num_images)


def uniform_distance(grid: Grid, patch_size: int) -> float:
    """What `attention_distance` is in pixels where every patch attends to all patches alike."""
    rows, columns = (torch.arange(n, dtype=torch.float64) for n in grid)
    # Pairs of patches so many rows and columns apart, in both directions.
    pairs = [
        (n - apart) * (1 + (apart > 0)) for n, apart in zip(grid, (rows, columns), strict=True)
    ]
    apart = torch.hypot(rows[:, None], columns)
    total = (pairs[0][:, None] * pairs[1] * apart).sum()
    return float(total) * patch_size / (grid[0] * grid[1]) ** 2


@torch.no_grad()
def position_similarity(
    backbone: Backbone, grid: Grid
) -> Float[Tensor, "rows columns rows columns"] | None:
    """Cosine similarity of the position of each patch with those of all others.

    "An Image is Worth 16x16 Words" (Dosovitskiy et al. 2020, figure 7 centre). Of positions that
    enter before every block with a table each, the first block's. None where there is no table:
    positions "none", and "relative" ones, which are a bias of the attention.

    Args:
        grid: rows and columns of patches; tables are resampled to it as for images of that size.
    """
    table: Any = getattr(backbone, "positions", None)
    if table is None:
        return None
    if isinstance(table, nn.ModuleList):
        table = table[0]
    if isinstance(table, Factorised):
        rows = table(*places(grid, next(backbone.parameters()).device))[0]
    else:
        rows = table(grid)[0, backbone.num_prefix_tokens :]
    unit = F.normalize(rows.float(), dim=-1)
    return (unit @ unit.T).view(*grid, *grid)


@torch.no_grad()
def embedding_filters(
    backbone: Backbone, count: int = 28
) -> Float[Tensor, "count c height width"] | None:
    """Principal components of the filters that embed a patch, the strongest first.

    "An Image is Worth 16x16 Words" (Dosovitskiy et al. 2020, figure 7 left). There are at most as
    many as a patch has values or the embedding channels. None where patches are not embedded by
    one convolution of the image.
    """
    conv = getattr(getattr(backbone, "patch_embed", None), "proj", None)
    if not isinstance(conv, nn.Conv2d) or conv.in_channels != backbone.in_channels:
        return None
    components = principal(conv.weight.flatten(1), count)
    filters: Tensor = components.T.reshape(-1, *conv.weight.shape[1:])
    return filters


def principal(x: Float[Tensor, "n d"], count: int) -> Float[Tensor, "d count"]:
    """Unit vectors along which rows of x vary most, the first most.

    Their sign, which is arbitrary, makes the entry of the largest size positive.
    """
    wide = x.detach().double()
    wide = wide - wide.mean(dim=0)
    _, vectors = torch.linalg.eigh(wide.T @ wide)
    found = vectors.flip(-1)[:, : min(count, *x.shape)]
    largest = found.gather(0, found.abs().argmax(dim=0, keepdim=True))
    signed: Tensor = found * largest.sign()
    return signed.to(x.dtype)


@torch.no_grad()
def patch_pca(patches: Float[Tensor, "b n d"]) -> Float[Tensor, "b n 3"]:
    """Patch features as colours in [0, 1]: their first three principal components.

    As in "DINOv2" (Oquab et al. 2023, figure 1) components are those over all images, so that a
    colour means the same in each; a component's smallest value becomes 0 and its largest 1.

    Raises:
        ValueError: fewer than three channels or patches.
    """
    flat = patches.flatten(0, 1)
    if min(flat.shape) < 3:
        raise ValueError(
            f"{flat.shape[0]} patches of width {flat.shape[1]} have no three components"
        )
    found = (flat - flat.mean(dim=0)) @ principal(flat, 3)
    low, high = found.amin(dim=0), found.amax(dim=0)
    scaled: Tensor = (found - low) / (high - low).clamp_min(1e-12)
    return scaled.view(*patches.shape[:2], 3)
