"""Pictures of what `modules.analysis` finds: tensors [3, height, width] in [0, 1].

Maps are enlarged without smoothing, so that a patch is a square. Small images are enlarged by a
whole factor.
"""

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import matplotlib
import numpy as np
import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Bool, Float
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from torch import Tensor

from modules import analysis
from modules.backbones import Backbone

Picture = Float[Tensor, "3 picture_height picture_width"]
COLOURS = "viridis"
# The shorter side that tiles have at least, in pixels, and what lies between two of them.
TILE, GAP = 128, 4
# Tiles that a line of pairs has at most, and position tiles along a side.
COLUMNS, PLACES = 8, 14
# Tokens that are looked at together: queries and keys of all layers are kept for them.
TOKENS = 4096
DPI = 100


class Found(NamedTuple):
    """What is drawn of a group of images, without the queries and keys it was made from.

    attention: [b, h, rows, columns] of the read-out; None without attention over all tokens
    rollout:   [b, rows, columns], None likewise
    distance:  [layers, h] in pixels, None likewise
    patches:   [b, n, d]
    grid:      rows and columns
    """

    attention: Tensor | None
    rollout: Tensor | None
    distance: Tensor | None
    patches: Tensor
    grid: tuple[int, int]


def examine(backbone: Backbone, images: Float[Tensor, "b c height width"]) -> Found:
    """One forward pass of a group of images, and what is drawn of it, on the CPU."""
    seen = analysis.observe(backbone, images)
    maps: list[Tensor | None] = [None, None, None]
    if seen.layers:
        finders = (analysis.readout_attention, analysis.rollout, analysis.attention_distance)
        maps = [find(seen).cpu() for find in finders]
    return Found(maps[0], maps[1], maps[2], seen.features.patches.float().cpu(), seen.grid)


def pictures_of(
    backbone: Backbone,
    images: Float[Tensor, "b c height width"],
    mean: Sequence[float],
    std: Sequence[float],
    mass: float = 0.6,
    track: Callable[[Sequence[Tensor]], Iterable[Tensor]] = iter,
) -> dict[str, Picture]:
    """Everything that can be drawn of a backbone in eval mode, by name.

    attention            what each head reads the image's vector from
    attention_mass       the same, the largest entries that hold `mass` of it
    rollout              the same through all layers
    attention_distance   how far each head of each layer looks
    position_similarity  cosine similarity of the positions of patches
    embedding_filters    principal components of the patch embedding
    patch_pca            principal components of patch features, as colours

    What a backbone does not have is left out.

    Args:
        images: normalised, on the backbone's device.
        mean, std: that they were normalised with, a number a channel.
        track: wraps the groups of images that are looked at one after another, for a progress bar.

    Raises:
        ValueError: images that the backbone does not take, a mass outside (0, 1].
    """
    patches = images.shape[2] * images.shape[3] // backbone.patch_size**2
    groups = torch.split(images, max(1, TOKENS // (patches + backbone.num_prefix_tokens)))
    found = [examine(backbone, group) for group in track(groups)]
    shown, grid = for_the_eye(images.cpu(), mean, std), found[0].grid
    pictures: dict[str, Picture] = {}
    attention = gather([part.attention for part in found])
    flow = gather([part.rollout for part in found])
    if attention is not None and flow is not None:
        pictures["attention"] = heads(shown, attention)
        pictures["attention_mass"] = heads(shown, attention, mass)
        pictures["rollout"] = pairs(shown, overlay(shown, flow), "attention rollout")
    distances = [(part.distance, len(part.patches)) for part in found]
    each = [found * count / len(images) for found, count in distances if found is not None]
    if each:
        uniform = analysis.uniform_distance(grid, backbone.patch_size)
        distance = torch.stack(each).sum(dim=0)
        pictures["attention_distance"] = distance_plot(distance, uniform, len(images))
    similarity = analysis.position_similarity(backbone, grid)
    if similarity is not None:
        pictures["position_similarity"] = similarity_tiles(similarity.cpu())
    filters = analysis.embedding_filters(backbone)
    if filters is not None:
        pictures["embedding_filters"] = filter_tiles(filters.cpu())
    features = torch.cat([part.patches for part in found])
    if min(features.flatten(0, 1).shape) >= 3:
        colours = rearrange(
            analysis.patch_pca(features), "b (y x) c -> b c y x", y=grid[0], x=grid[1]
        )
        pictures["patch_pca"] = pairs(
            shown, stretch(colours, shown), "patch features, three principal components as colours"
        )
    return pictures


def gather(parts: Sequence[Tensor | None]) -> Tensor | None:
    given = [part for part in parts if part is not None]
    return torch.cat(given).float() if given else None


def for_the_eye(
    images: Float[Tensor, "b c height width"], mean: Sequence[float], std: Sequence[float]
) -> Float[Tensor, "b 3 higher wider"]:
    """Images before normalisation, in [0, 1], as RGB, enlarged by a whole factor.

    Of other numbers of channels than 3 the mean is shown in grey.
    """
    channel = (1, -1, 1, 1)
    pixels = images.float() * torch.tensor(std).view(channel) + torch.tensor(mean).view(channel)
    if pixels.shape[1] != 3:
        pixels = pixels.mean(dim=1, keepdim=True).expand(-1, 3, -1, -1)
    factor = math.ceil(TILE / min(pixels.shape[2:]))
    pixels = pixels.repeat_interleave(factor, dim=2).repeat_interleave(factor, dim=3)
    return pixels.clamp(0.0, 1.0)


def stretch(
    maps: Float[Tensor, "b k rows columns"], images: Float[Tensor, "i three height width"]
) -> Float[Tensor, "b k height width"]:
    """Maps of patches at the size of the images."""
    return F.interpolate(maps.float(), size=images.shape[2:], mode="nearest")


def coloured(maps: Float[Tensor, "*b rows columns"]) -> Float[Tensor, "*b 3 rows columns"]:
    """Each map on its own from its smallest to its largest value, in colours."""
    low, high = maps.amin(dim=(-2, -1), keepdim=True), maps.amax(dim=(-2, -1), keepdim=True)
    scaled = (maps - low) / (high - low).clamp_min(1e-12)
    colours = matplotlib.colormaps[COLOURS](scaled.numpy())[..., :3]
    return torch.from_numpy(colours).float().movedim(-1, -3)


def overlay(
    images: Float[Tensor, "b 3 height width"], maps: Float[Tensor, "b rows columns"]
) -> Float[Tensor, "b 3 height width"]:
    """Maps in colours over the images in grey."""
    grey = images.mean(dim=1, keepdim=True)
    return 0.45 * grey + 0.55 * stretch(coloured(maps), images)


def heads(
    images: Float[Tensor, "b 3 height width"],
    attention: Float[Tensor, "b h rows columns"],
    mass: float | None = None,
) -> Picture:
    """A line for each image: the image, the mean over heads, every head.

    Maps have colours from their smallest to their largest value; with `mass` they show the image
    where the largest entries hold that share of the attention, and darken the rest.
    """
    maps = torch.cat((attention.mean(dim=1, keepdim=True), attention), dim=1)
    title = "what the image's vector is read from, head by head, in the last layer"
    if mass is None:
        tiles = [stretch(coloured(each), images) for each in maps.unbind(1)]
    else:
        kept = stretch(analysis.keep_mass(maps, mass).float(), images) > 0
        tiles = [darkened(images, each[:, None]) for each in kept.unbind(1)]
        title = f"the patches that hold {100 * mass:g} % of each head's attention"
    lines = torch.stack([images, *tiles], dim=1)
    names = ["image", "mean of heads", *(f"head {i + 1}" for i in range(attention.shape[1]))]
    return mosaic(list(lines), title, names)


def darkened(
    images: Float[Tensor, "b 3 height width"], is_kept: Bool[Tensor, "b 1 height width"]
) -> Float[Tensor, "b 3 height width"]:
    """Blue and faint where not kept, which black parts of an image are not taken for."""
    blue = torch.tensor([0.05, 0.07, 0.28]).view(3, 1, 1)
    return torch.where(is_kept, images, blue + 0.15 * images.mean(dim=1, keepdim=True))


def pairs(
    images: Float[Tensor, "b 3 height width"],
    drawn: Float[Tensor, "b 3 height width"],
    title: str,
) -> Picture:
    """Lines of images, and below each line what was drawn of them."""
    lines: list[Tensor] = []
    for some, theirs in zip(*(torch.split(x, COLUMNS) for x in (images, drawn)), strict=True):
        lines += [some, theirs]
    return mosaic(lines, title)


def mosaic(
    lines: Sequence[Float[Tensor, "_ 3 height width"]], title: str, names: Sequence[str] = ()
) -> Picture:
    """Tiles in lines, white where a line is shorter, with a title and names of the columns."""
    columns = max(len(line) for line in lines)
    height, width = lines[0].shape[2:]
    canvas = torch.ones(3, len(lines) * (height + GAP) - GAP, columns * (width + GAP) - GAP)
    for y, line in enumerate(lines):
        for x, tile in enumerate(line):
            top, left = y * (height + GAP), x * (width + GAP)
            canvas[:, top : top + height, left : left + width] = tile
    return titled(canvas, title, {x * (width + GAP) + width / 2: n for x, n in enumerate(names)})


def titled(canvas: Float[Tensor, "3 rows columns"], title: str, names: dict[float, str]) -> Picture:
    """Writes above a picture: a title, and names centred at columns of pixels.

    Pixels of the picture stay what they are.
    """
    margin = 8
    tile = canvas.shape[2] / max(1, len(names))
    # Letters are about 0.6 of their height wide; a narrow picture gets room for its title.
    small = min(18.0, max(9.0, tile / 9))
    large = min(18.0, max(12.0, canvas.shape[2] / (0.6 * len(title))))
    room = round(0.6 * large * len(title))
    canvas = F.pad(canvas, (0, max(0, room - canvas.shape[2])), value=1.0)
    top = round(1.8 * large + (1.8 * small if names else 0))
    wide, high = canvas.shape[2] + 2 * margin, top + 2 * margin
    figure = Figure(figsize=(wide / DPI, high / DPI), dpi=DPI)
    points = 72 / DPI
    figure.text(margin / wide, 1 - margin / high, title, va="top", fontsize=large * points)
    for x, name in names.items():
        y = (margin - 2) / high
        figure.text((x + margin) / wide, y, name, ha="center", va="bottom", fontsize=small * points)
    head = rendered(figure)
    body = F.pad(canvas, (margin, margin, 0, margin), value=1.0)
    # A fraction of a pixel may be lost where inches become pixels.
    head = F.pad(head, (0, body.shape[2] - head.shape[2]), value=1.0)
    return torch.cat((head, body), dim=1)


def rendered(figure: Figure) -> Picture:
    """A figure as pixels, without pyplot's global state."""
    canvas: Any = FigureCanvasAgg(figure)
    canvas.draw()
    pixels = torch.from_numpy(np.array(canvas.buffer_rgba())[..., :3])
    return pixels.permute(2, 0, 1).float() / 255.0


def distance_plot(distance: Float[Tensor, "layers h"], uniform: float, num_images: int) -> Picture:
    """One dot a head over the layers, and a line at the distance of uniform attention."""
    figure = Figure(figsize=(7.2, 4.5), dpi=DPI, layout="constrained")
    axes: Any = figure.subplots()
    layers, count = distance.shape
    for head in range(count):
        colour = matplotlib.colormaps[COLOURS](head / max(1, count - 1) * 0.92)
        label = f"head {head + 1}"
        axes.scatter(
            range(1, layers + 1), distance[:, head].numpy(), s=26, color=colour, label=label
        )
    axes.axhline(uniform, color="tab:gray", linestyle="--", linewidth=1, label="uniform")
    of = "1 image" if num_images == 1 else f"{num_images} images"
    axes.set_title(f"mean attention distance among patches, over {of}")
    axes.set(xlabel="layer", ylabel="pixels", ylim=(0, 1.08 * max(uniform, float(distance.max()))))
    axes.set_xlim(0.5, layers + 0.5)
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.grid(alpha=0.3)
    figure.legend(loc="outside right center", fontsize=8, ncols=math.ceil(count / 16))
    return rendered(figure)


def spread(length: int, count: int) -> list[int]:
    """At most `count` of so many places, evenly over all."""
    if length <= count:
        return list(range(length))
    return [round(i * (length - 1) / (count - 1)) for i in range(count)]


def similarity_tiles(similarity: Float[Tensor, "rows columns rows columns"]) -> Picture:
    """For each place a tile of its similarity to all others; of large grids some places."""
    rows, columns = similarity.shape[:2]
    shown = spread(rows, PLACES), spread(columns, PLACES)
    fine = math.ceil(24 / min(rows, columns))  # so that gaps can be narrower than a patch
    rows, columns = rows * fine, columns * fine
    gap = max(2, min(rows, columns) // 12)
    tall, wide = rows + gap, columns + gap
    canvas = torch.full((len(shown[0]) * tall - gap, len(shown[1]) * wide - gap), torch.nan)
    for i, y in enumerate(shown[0]):
        for j, x in enumerate(shown[1]):
            tile = similarity[y, x].repeat_interleave(fine, 0).repeat_interleave(fine, 1)
            canvas[i * tall : i * tall + rows, j * wide : j * wide + columns] = tile
    height = 7.0
    width = min(12.0, max(5.0, height * canvas.shape[1] / canvas.shape[0] + 1.4))
    figure = Figure(figsize=(width, height), dpi=DPI, layout="constrained")
    axes: Any = figure.subplots()
    image = axes.imshow(canvas.numpy(), cmap=COLOURS, vmin=-1, vmax=1, interpolation="nearest")
    axes.set_yticks([i * tall + (rows - 1) / 2 for i in range(len(shown[0]))])
    axes.set_yticklabels([str(y + 1) for y in shown[0]])
    axes.set_xticks([j * wide + (columns - 1) / 2 for j in range(len(shown[1]))])
    axes.set_xticklabels([str(x + 1) for x in shown[1]])
    axes.set(xlabel="column of the patch", ylabel="row of the patch")
    axes.set_title("similarity of a patch's position to all others")
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
    figure.colorbar(image, ax=axes, label="cosine similarity", shrink=0.85)
    return rendered(figure)


def filter_tiles(filters: Float[Tensor, "count c height width"]) -> Picture:
    """Filters from the strongest on, each symmetric about grey, which is 0."""
    size = filters.abs().amax(dim=(1, 2, 3), keepdim=True).clamp_min(1e-12)
    tiles = 0.5 + 0.5 * filters / size
    if tiles.shape[1] != 3:
        tiles = tiles.mean(dim=1, keepdim=True).expand(-1, 3, -1, -1)
    factor = math.ceil(64 / min(tiles.shape[2:]))
    tiles = tiles.repeat_interleave(factor, dim=2).repeat_interleave(factor, dim=3)
    return mosaic(torch.split(tiles, 7), "patch embedding: principal components of its filters")
