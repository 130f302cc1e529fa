"""What a backbone looks at, against attention written out in full."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from datamodules.batch import PackedImages
from modules import analysis, drawing, weights
from modules.backbones import Backbone, BlockStyle, FactorisedPositions, NaViT, Positions, ViT
from modules.backbones.vit import VARIANTS
from tests.modules.test_weights import randomised
from tests.packs import images as random_images
from tests.packs import pack

GOLDEN = Path(__file__).parents[1] / "golden" / "dino_vit.safetensors"
HEADS = VARIANTS["mu"].num_heads


def vit(**changes: Any) -> Backbone:
    return ViT("mu", patch_size=4, **{"image_size": (12, 20), **changes})


BACKBONES: dict[str, Any] = {
    "class token": lambda: vit(),
    "no class token": lambda: vit(class_token=False, pooling="avg"),
    "class token that nothing reads": lambda: vit(pooling="avg"),
    "norm, then average": lambda: vit(class_token=False, pooling="norm_avg", num_registers=1),
    "registers": lambda: vit(num_registers=3),
    "distillation token": lambda: vit(distillation_token=True),
    "map": lambda: vit(class_token=False, pooling="map"),
    "map with tokens": lambda: vit(num_registers=1, pooling="map"),
    "relative": lambda: vit(positions=Positions("relative"), num_registers=1),
    "relative, shared": lambda: vit(positions=Positions("relative", inject="every_shared")),
    "no positions": lambda: vit(positions=Positions("none")),
    "tables for every block": lambda: vit(positions=Positions(inject="every")),
    "learned2d": lambda: vit(positions=Positions("learned2d"), num_registers=1),
    "sincos2d": lambda: vit(positions=Positions("sincos2d"), num_registers=1),
    "no rows for prefix": lambda: vit(positions=Positions(prefix_rows=False), num_registers=1),
    "qk norm": lambda: vit(block=BlockStyle(qk_norm="layer")),
    "rms norm": lambda: vit(block=BlockStyle(qk_norm="rms")),
    "rms norm, unscaled": lambda: vit(block=BlockStyle(qk_norm="rms_unscaled")),
    "grey": lambda: vit(in_channels=1),
    "navit": lambda: NaViT("mu", patch_size=4),
    "navit, query, sines": lambda: NaViT(
        "mu",
        patch_size=4,
        pooling="query",
        patch_norm=True,
        positions=FactorisedPositions("sinusoidal", "fractional", max_side=8),
    ),
}
every_backbone = pytest.mark.parametrize("name", BACKBONES)
some_backbones = pytest.mark.parametrize(
    "name", ["class token", "no class token", "map with tokens", "relative", "navit"]
)


def build(name: str) -> Backbone:
    backbone = randomised(BACKBONES[name]()).double()
    assert isinstance(backbone, Backbone)
    return backbone


def inputs(backbone: Backbone, count: int = 2) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    shape = (count, backbone.in_channels, 12, 20)
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


def dense(backbone: Backbone, images: Tensor) -> tuple[list[Tensor], Tensor | None]:
    """[b, h, n, n] of every layer and [b, h, n] of the pool: attention written out head by head.

    The blocks' inputs are noted; everything after is done here.
    """
    noted: list[tuple[nn.Module, tuple]] = []
    hooks = [
        module.register_forward_pre_hook(lambda module, given: noted.append((module, given)))
        for name, module in backbone.named_modules()
        if name.endswith((".attn", "attn_pool")) or name == "attn_pool"
    ]
    backbone(images)
    for hook in hooks:
        hook.remove()
    layers, pool = [], None
    for module, given in noted:
        x = given[0]
        width = x.shape[-1]
        if hasattr(module, "qkv"):
            q_weight, k_weight, _ = module.qkv.weight.split(width)
            biases = [0, 0] if module.qkv.bias is None else module.qkv.bias.split(width)
            q, k = x @ q_weight.T + biases[0], x @ k_weight.T + biases[1]
        else:
            latent = module.norm(module.latent) if hasattr(module, "q_norm") else module.latent
            q, k = module.q(latent), module.kv(x)[..., :width]
            q = q.expand(len(x), -1, -1)
        rows = []
        for image in range(len(x)):
            for head in range(HEADS):
                own = slice(head * width // HEADS, (head + 1) * width // HEADS)
                q_head, k_head = q[image, :, own], k[image, :, own]
                if hasattr(module, "q_norm"):
                    q_head, k_head = (
                        norm(z.expand(1, HEADS, *z.shape))[0, head]
                        for norm, z in ((module.q_norm, q_head), (module.k_norm, k_head))
                    )
                scale = getattr(module, "scale", None) or (width // HEADS) ** -0.5
                scores = q_head @ k_head.T * scale
                if len(given) > 1 and isinstance(given[1], Tensor):
                    scores = scores + given[1][0, head]
                scores = scores.exp()
                rows.append(scores / scores.sum(dim=1, keepdim=True))
        found = torch.stack(rows).view(len(x), HEADS, *rows[0].shape)
        if hasattr(module, "qkv"):
            layers.append(found)
        else:
            pool = found[:, :, 0]
    return layers, pool


@every_backbone
def test_rows_are_those_of_the_full_softmax(name: str) -> None:
    backbone = build(name)
    images = inputs(backbone)
    seen = analysis.observe(backbone, images)
    layers, pool = dense(backbone, images)
    n = 15 + backbone.num_prefix_tokens
    assert seen.grid == (3, 5)
    torch.testing.assert_close(seen.features.patches, backbone(images).patches)
    expected = torch.stack(layers)
    assert expected.shape == (2, 2, HEADS, n, n)
    assert expected.std() > 0.01
    torch.testing.assert_close(analysis.attention_rows(seen, range(n)), expected)
    some = analysis.attention_rows(seen, [n - 1, 0], layers=[-1])
    torch.testing.assert_close(some, expected[-1:, :, :, [n - 1, 0]])
    if pool is not None:
        readout = pool
    elif backbone.pooling == "cls":
        readout = expected[-1][:, :, 0, -15:]
    else:
        readout = expected[-1][:, :, -15:].mean(dim=2)[..., -15:]
    torch.testing.assert_close(analysis.readout_attention(seen).flatten(2), readout)


@pytest.mark.parametrize("size", ["native", "larger", "local", "rect"])
def test_last_attention_is_that_of_dino(size: str, tmp_path: Path) -> None:
    golden = load_file(GOLDEN)
    state = {n.removeprefix("weights."): t for n, t in golden.items() if n.startswith("weights.")}
    backbone = ViT(
        patch_size=8,
        image_size=64,
        embed_dim=48,
        depth=3,
        num_heads=3,
        positions=Positions(resample="dino"),
    ).eval()
    save_file(state, tmp_path / "dino.safetensors")
    weights.load_backbone(backbone, tmp_path / "dino.safetensors")
    seen = analysis.observe(backbone, golden[f"in.{size}"])
    expected = golden[f"last_attention.{size}"]
    rows = analysis.attention_rows(seen, range(expected.shape[-1]), layers=[-1])[0]
    torch.testing.assert_close(rows, expected, atol=1e-5, rtol=1e-4)
    maps = analysis.readout_attention(seen)
    height, width = (side // 8 for side in golden[f"in.{size}"].shape[2:])
    assert maps.shape == (2, 3, height, width)
    torch.testing.assert_close(maps.flatten(2), expected[:, :, 0, 1:], atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("mass", [0.1, 0.6, 0.95, 1.0])
def test_the_mass_that_is_kept_is_dinos(mass: float) -> None:
    generator = torch.Generator().manual_seed(0)
    attention = torch.rand(2, 3, 5, 7, generator=generator) ** 3
    kept = analysis.keep_mass(attention, mass)
    for image in range(2):
        for head in range(3):
            values = attention[image, head].flatten().tolist()
            order = sorted(range(35), key=lambda i: values[i])
            total, so_far, expected = sum(values), 0.0, [False] * 35
            for i in order:
                so_far += values[i] / total
                expected[i] = so_far > 1.0 - mass
            assert kept[image, head].flatten().tolist() == expected
    share = (attention * kept).sum((-2, -1)) / attention.sum((-2, -1))
    assert (share >= mass - 1e-6).all()


@pytest.mark.parametrize("mass", [0.0, -0.1, 1.5])
def test_a_mass_that_is_no_share_is_refused(mass: float) -> None:
    with pytest.raises(ValueError, match=rf"mass is {mass}; expected a share"):
        analysis.keep_mass(torch.ones(1, 2, 2), mass)


@every_backbone
def test_rollout_is_the_product_of_all_layers(name: str) -> None:
    backbone = build(name)
    images = inputs(backbone)
    layers, pool = dense(backbone, images)
    n, p = layers[0].shape[-1], backbone.num_prefix_tokens
    product = torch.eye(n, dtype=torch.float64).expand(2, n, n)
    for layer in layers:
        mixed = 0.5 * layer.mean(dim=1) + 0.5 * torch.eye(n, dtype=torch.float64)
        product = mixed / mixed.sum(dim=-1, keepdim=True) @ product
    start = torch.zeros(2, 1, n, dtype=torch.float64)
    if pool is not None:
        start[:, 0, p:] = pool.mean(dim=1)
    elif backbone.pooling == "cls":
        start[:, 0, 0] = 1
    else:
        start[:, 0, p:] = 1 / 15
    found = analysis.rollout(analysis.observe(backbone, images))
    torch.testing.assert_close(found.flatten(1), (start @ product)[:, 0, p:])


@some_backbones
@pytest.mark.parametrize("renorm", [True, False])
def test_distance_is_the_sum_over_pairs(name: str, renorm: bool) -> None:
    backbone = build(name)
    images = inputs(backbone, 1)
    layers, _ = dense(backbone, images)
    p = backbone.num_prefix_tokens
    found = analysis.attention_distance(analysis.observe(backbone, images), renorm)
    assert found.shape == (2, HEADS)
    for layer in range(2):
        for head in range(HEADS):
            attention = layers[layer][0, head, p:, p:].tolist()
            total = 0.0
            for i, row in enumerate(attention):
                whole = sum(row) if renorm else 1.0
                for j, share in enumerate(row):
                    apart = math.dist(divmod(i, 5), divmod(j, 5))
                    total += share / whole * 4 * apart / 15
            assert found[layer, head].item() == pytest.approx(total, rel=1e-6)


def test_distance_of_uniform_attention_and_of_several_images() -> None:
    backbone = build("registers")
    images = inputs(backbone, 3)
    each = [
        analysis.attention_distance(analysis.observe(backbone, image[None])) for image in images
    ]
    found = analysis.attention_distance(analysis.observe(backbone, images))
    torch.testing.assert_close(found, torch.stack(each).mean(dim=0))
    for block in backbone.blocks:
        nn.init.zeros_(block.attn.qkv.weight)
        nn.init.zeros_(block.attn.qkv.bias)
    places = [divmod(i, 5) for i in range(15)]
    expected = 4 * sum(math.dist(a, b) for a in places for b in places) / 15**2
    assert analysis.uniform_distance((3, 5), 4) == pytest.approx(expected)
    uniform = analysis.attention_distance(analysis.observe(backbone, images))
    torch.testing.assert_close(uniform, torch.full_like(uniform, expected))
    kept = analysis.attention_distance(analysis.observe(backbone, images), renorm=False)
    torch.testing.assert_close(kept, torch.full_like(kept, expected * 15 / 19))


@some_backbones
def test_in_small_chunks_all_is_the_same(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    backbone = build(name)
    seen = analysis.observe(backbone, inputs(backbone))
    finders = (analysis.readout_attention, analysis.rollout, analysis.attention_distance)
    expected = [find(seen) for find in finders]
    n = seen.layers[0].q.shape[2]
    sizes: list[int] = []
    scores = analysis.Layer.scores

    def noted(layer: analysis.Layer, queries: Any) -> Tensor:
        found = scores(layer, queries)
        sizes.append(found.numel())
        return found

    monkeypatch.setattr(analysis, "CHUNK", 2 * 2 * HEADS * n)
    monkeypatch.setattr(analysis.Layer, "scores", noted)
    for find, whole in zip(finders, expected, strict=True):
        torch.testing.assert_close(find(seen), whole)
    assert max(sizes) <= 2 * 2 * HEADS * n  # two queries, never n


def test_observing_leaves_the_network_as_it_was() -> None:
    backbone = build("map with tokens")
    images = inputs(backbone)
    before = backbone(images).pooled
    seen = analysis.observe(backbone, images)
    assert torch.equal(seen.features.pooled, before)
    assert not any(module._forward_pre_hooks for module in backbone.modules())
    with pytest.raises(ValueError, match="not divisible by patch_size"):
        analysis.observe(backbone, images[..., :-1])
    assert not any(module._forward_pre_hooks for module in backbone.modules())


def test_a_pack_is_refused() -> None:
    packed = pack([random_images([(8, 8)])], patch=4, length=8, slots=1)
    assert isinstance(packed, PackedImages)
    with pytest.raises(ValueError, match="a pack cannot be observed"):
        analysis.observe(NaViT("mu", patch_size=4), packed)


NO_TABLE = ("relative", "relative, shared", "no positions")


@every_backbone
def test_similarity_is_the_cosine_of_what_is_added_to_the_tokens(name: str) -> None:
    backbone = build(name).float()
    found = analysis.position_similarity(backbone, (3, 5))
    if name in NO_TABLE:
        assert found is None
        return
    # What reaches the first block, less what would without positions, is the table.
    noted: list[Tensor] = []
    backbone.blocks[0].register_forward_pre_hook(lambda _, given: noted.append(given[0]))
    images = inputs(backbone).float()
    backbone(images)
    if isinstance(backbone, NaViT):
        # Of images without patches: the positions alone, and what is the same for all.
        nn.init.zeros_(backbone.patch_embed.proj.weight)
        nn.init.zeros_(backbone.patch_embed.proj.bias)
        noted.clear()
        backbone(torch.zeros_like(images))
        table = noted[0][0]
    else:
        tokens = backbone.patch_embed(images)
        table = (noted[0][:, backbone.num_prefix_tokens :] - tokens)[0]
    unit = table / table.norm(dim=1, keepdim=True)
    expected = unit @ unit.T
    torch.testing.assert_close(found.flatten(2).flatten(0, 1), expected, atol=2e-4, rtol=1e-3)
    assert expected.std() > 0.05


def test_similarity_at_another_size() -> None:
    found = analysis.position_similarity(build("class token"), (6, 4))
    assert found is not None
    assert found.shape == (6, 4, 6, 4)


def test_filters_are_principal_components() -> None:
    backbone = vit(embed_dim=40)
    with torch.no_grad():
        weight = backbone.patch_embed.proj.weight
        weight.zero_()
        wave = torch.randn(40, generator=torch.Generator().manual_seed(0))
        wave -= wave.mean()
        weight[:, 1, 2, 3] = 5 * wave  # one pixel varies most
        weight[:, 0, 0, 0] = -2 * wave.roll(1)
        weight += 0.5  # what all filters have in common is no component
    filters = analysis.embedding_filters(backbone, count=2)
    assert filters is not None
    assert filters.shape == (2, 3, 4, 4)
    torch.testing.assert_close(filters.flatten(1).norm(dim=1), torch.ones(2))
    assert filters[0, 1, 2, 3] > 0.9
    assert filters[1, 0, 0, 0] > 0.9
    assert analysis.embedding_filters(vit(in_channels=1), count=28).shape == (16, 1, 4, 4)


def test_colours_are_components_over_all_images() -> None:
    generator = torch.Generator().manual_seed(0)
    strengths = torch.tensor([9.0, 5.0, 3.0, 0.1, 0.1, 0.1])
    basis = torch.linalg.qr(torch.randn(6, 6, generator=generator)).Q
    hidden = torch.rand(3, 8, 6, generator=generator) - 0.5
    colours = analysis.patch_pca(hidden * strengths @ basis.T + 7.0)
    assert colours.shape == (3, 8, 3)
    torch.testing.assert_close(colours.flatten(0, 1).amin(0), torch.zeros(3))
    torch.testing.assert_close(colours.flatten(0, 1).amax(0), torch.ones(3))
    for i in range(3):
        pair = torch.stack((colours[..., i].flatten(), hidden[..., i].flatten()))
        assert pair.corrcoef()[0, 1].abs() > 0.9
    # The same whichever sign the decomposition happens to give.
    again = analysis.patch_pca(hidden * strengths @ basis.T - 2.0)
    torch.testing.assert_close(colours, again, atol=1e-4, rtol=1e-4)
    with pytest.raises(ValueError, match="2 patches of width 6"):
        analysis.patch_pca(torch.rand(1, 2, 6))


EVERYTHING = {
    *("attention", "attention_mass", "rollout", "attention_distance", "position_similarity"),
    *("embedding_filters", "patch_pca"),
}


@pytest.mark.parametrize("name", ["grey", "no class token", "relative", "navit, query, sines"])
def test_what_there_is_is_drawn(name: str) -> None:
    backbone = build(name).float()
    channels = backbone.in_channels
    images = inputs(backbone, 1).float()
    pictures = drawing.pictures_of(backbone, images, (0.5,) * channels, (0.25,) * channels)
    assert set(pictures) == EVERYTHING - ({"position_similarity"} if name in NO_TABLE else set())
    for picture in pictures.values():
        assert picture.shape[0] == 3
        assert min(picture.shape[1:]) >= 100
        assert 0.0 <= picture.min() < picture.max() <= 1.0


def test_many_images_are_looked_at_in_groups(monkeypatch: pytest.MonkeyPatch) -> None:
    backbone = build("class token").float()
    images = inputs(backbone, 5).float()
    groups: list[int] = []

    def track(parts: Any) -> Any:
        groups.extend(len(part) for part in parts)
        return parts

    given = (backbone, images, (0.5,) * 3, (0.25,) * 3)
    whole = drawing.pictures_of(*given)
    monkeypatch.setattr(drawing, "TOKENS", 2 * 16)
    parts = drawing.pictures_of(*given, track=track)
    assert groups == [2, 2, 1]
    for name, picture in parts.items():
        assert (picture - whole[name]).abs().mean() < 1e-3, name


def test_tiles_show_the_image_and_its_maps() -> None:
    images = torch.zeros(1, 3, 8, 8)
    images[0, 0, :4] = 1.0
    attention = torch.zeros(1, 2, 2, 2)
    attention[0, 0, 0, 1] = 1.0
    attention[0, 1, 1, 0] = 1.0
    shown = drawing.for_the_eye(images, (0.0,) * 3, (1.0,) * 3)
    assert shown.shape == (1, 3, 128, 128)
    picture = drawing.heads(shown, attention, mass=0.6)
    left = 8 + 2 * (128 + drawing.GAP)  # after the margin, the image and the mean
    tile = picture[:, -128 - 8 : -8, left : left + 128]
    torch.testing.assert_close(tile[:, :64, 64:], shown[0, :, :64, 64:])  # kept
    assert (tile[:, :64, :64] - shown[0, :, :64, :64]).abs().mean() > 0.2  # darkened


def test_intersection_over_union() -> None:
    is_object = torch.zeros(4, 6, dtype=torch.bool)
    is_object[:2, :3] = True  # one patch of 2 x 2 and half of its neighbour
    is_kept = torch.tensor([[True, True, False], [False, False, False]])
    maps = torch.stack((is_kept, ~is_kept, torch.zeros_like(is_kept)))
    found = analysis.jaccard(maps, is_object.expand(3, -1, -1))
    assert found.tolist() == pytest.approx([6 / 8, 0.0, 0.0])
    assert analysis.jaccard(is_kept, is_kept.repeat_interleave(2, 0).repeat_interleave(2, 1)) == 1.0
    nothing = torch.zeros(4, 6, dtype=torch.bool)
    assert analysis.jaccard(torch.zeros(2, 3, dtype=torch.bool), nothing) == 0.0
    with pytest.raises(ValueError, match=r"masks of \(4, 7\) pixels for \(2, 3\) patches"):
        analysis.jaccard(is_kept, torch.zeros(4, 7, dtype=torch.bool))
