"""Hybrids: a ResNet makes the features whose patches a Vision Transformer takes.

"An Image is Worth 16x16 Words: Transformers for Image Recognition at Scale",
Dosovitskiy et al. 2020, https://arxiv.org/abs/2010.11929, sections 3.1 and 4.1; R+Ti/16, R26+S/32
and R50+L/32 are those of "How to train your ViT?" (Steiner et al. 2021). The ResNet is that of
"Big Transfer" (Kolesnikov et al. 2020), with activations after the sums:

    x = max pool 3x3 /2 (ReLU(GN(conv 7x7 /2 (images))))
    repeat for every unit of every stage:
        y = ReLU(GN(conv 1x1 (x)));  y = ReLU(GN(conv 3x3 (y)));  y = GN(conv 1x1 (y))
        x = ReLU(y + x)                                 or GN(conv 1x1 (x)) where shapes differ
    tokens = patches(x) W + b

Every convolution has its weights standardised (Qiao et al. 2019) and pads as TensorFlow does, so
that an even side is halved exactly. R50+B/16 has the units of the fourth stage in its third, which
keeps the stride at 16. R+Ti/16 has no stage at all; its published code pools, so that its patches
span 32 pixels whatever its name says.
"""

import math
from collections.abc import Sequence
from typing import Literal, NamedTuple

import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from modules.backbones.layers import BlockStyle, PatchEmbed
from modules.backbones.positions import Positions
from modules.backbones.recomputed import recomputed
from modules.backbones.stem import Init, StemViT
from modules.backbones.vit import check_choice


class Size(NamedTuple):
    """The Transformer's variant, units in every stage of the ResNet, side of a patch of its map."""

    variant: str
    units: tuple[int, ...]
    patch: int


VARIANTS = {
    "mu": Size("mu", (1,), 4),  # a toy for tests and smoke runs
    "R+Ti/16": Size("Ti", (), 8),
    "R26+S/32": Size("S", (2, 2, 2, 2), 1),
    "R26+B/32": Size("B", (2, 2, 2, 2), 1),
    "R50+B/16": Size("B", (3, 4, 9), 1),
    "R50+L/32": Size("L", (3, 4, 6, 3), 1),
}
# timm's hybrids by the units of their ResNet.
TIMM = {
    (): "vit_tiny_r_s16_p8_224",
    (2, 2, 2, 2): "vit_small_r26_s32_224",
    (3, 4, 9): "vit_base_r50_s16_224",
    (3, 4, 6, 3): "vit_large_r50_s32_224",
}
ROOT_DIM, EXPANSION, NORM_GROUPS = 64, 4, 32
ROOT_STRIDE = 4  # of the first convolution and the pooling


class Epsilons(NamedTuple):
    """What is added before a root is taken; to the deviation of weights where `of_root`."""

    norm: float
    weights: float
    of_root: bool


EPSILONS = {"timm": Epsilons(1e-5, 1e-8, False), "google": Epsilons(1e-6, 1e-5, True)}


class StdConv(nn.Conv2d):
    """A convolution whose weights have mean 0 and variance 1 for every output channel."""

    def __init__(self, inside: int, outside: int, side: int, stride: int, eps: Epsilons) -> None:
        before, after = (side - stride) // 2, math.ceil((side - stride) / 2)
        is_even = before == after or side < stride
        super().__init__(
            inside, outside, side, stride, max(0, before) if is_even else 0, bias=False
        )
        # More zeros below and to the right than above and to the left.
        self.edges = None if is_even else (before, after, before, after)
        self.eps = eps

    def forward(self, x: Float[Tensor, "b c rows columns"]) -> Float[Tensor, "b d _ _"]:
        if self.edges is not None:
            x = F.pad(x, self.edges)
        out: Tensor = F.conv2d(x, self.standardised(), None, self.stride, self.padding)
        return out

    def standardised(self) -> Float[Tensor, "d c _ _"]:
        flat = self.weight.flatten(1)
        if self.eps.of_root:
            centered = flat - flat.mean(dim=1, keepdim=True)
            out = centered / (flat.std(dim=1, correction=0, keepdim=True) + self.eps.weights)
        else:
            out = F.layer_norm(flat, flat.shape[1:], eps=self.eps.weights)
        return out.view_as(self.weight)


def group_norm(dim: int, eps: Epsilons) -> nn.GroupNorm:
    return nn.GroupNorm(NORM_GROUPS, dim, eps.norm)


class Shortcut(nn.Module):
    """What stands for x where a unit changes its shape."""

    def __init__(self, inside: int, outside: int, stride: int, eps: Epsilons) -> None:
        super().__init__()
        self.conv = StdConv(inside, outside, 1, stride, eps)
        self.norm = group_norm(outside, eps)

    def forward(self, x: Float[Tensor, "b c rows columns"]) -> Float[Tensor, "b d _ _"]:
        out: Tensor = self.norm(self.conv(x))
        return out


class Unit(nn.Module):
    """A bottleneck of three convolutions and what goes past them."""

    def __init__(self, inside: int, width: int, stride: int, eps: Epsilons) -> None:
        super().__init__()
        outside = EXPANSION * width
        has_shortcut = stride != 1 or inside != outside
        self.downsample = Shortcut(inside, outside, stride, eps) if has_shortcut else nn.Identity()
        self.conv1, self.norm1 = StdConv(inside, width, 1, 1, eps), group_norm(width, eps)
        self.conv2, self.norm2 = StdConv(width, width, 3, stride, eps), group_norm(width, eps)
        self.conv3, self.norm3 = StdConv(width, outside, 1, 1, eps), group_norm(outside, eps)

    def forward(self, x: Float[Tensor, "b c rows columns"]) -> Float[Tensor, "b d _ _"]:
        y = F.relu(self.norm1(self.conv1(x)), inplace=True)
        y = F.relu(self.norm2(self.conv2(y)), inplace=True)
        return F.relu(self.norm3(self.conv3(y)) + self.downsample(x), inplace=True)


class Root(nn.Module):
    """The first convolution and the pooling."""

    def __init__(self, in_channels: int, eps: Epsilons) -> None:
        super().__init__()
        self.conv = StdConv(in_channels, ROOT_DIM, 7, 2, eps)
        self.norm = group_norm(ROOT_DIM, eps)

    def forward(self, images: Float[Tensor, "b c height width"]) -> Float[Tensor, "b d _ _"]:
        x = F.relu(self.norm(self.conv(images)), inplace=True)
        # Of an even side the last window reaches one beyond it, where nothing is.
        return F.max_pool2d(x, 3, 2, ceil_mode=True)


class Stage(nn.Module):
    def __init__(self, inside: int, width: int, units: int, stride: int, eps: Epsilons) -> None:
        super().__init__()
        dims = [inside, *[EXPANSION * width] * (units - 1)]
        self.blocks = nn.ModuleList(
            Unit(dim, width, stride if i == 0 else 1, eps) for i, dim in enumerate(dims)
        )


class ResNet(nn.Module):
    """Features of the last stage, under timm's names."""

    def __init__(
        self, units: Sequence[int], in_channels: int, eps: Epsilons, recompute: bool
    ) -> None:
        super().__init__()
        self.recompute = recompute
        self.stem = Root(in_channels, eps)
        widths = [ROOT_DIM * 2**i for i in range(len(units))]
        dims = [ROOT_DIM, *(EXPANSION * width for width in widths)]
        self.dim, self.stride = dims[-1], ROOT_STRIDE * 2 ** max(0, len(units) - 1)
        self.stages = nn.ModuleList(
            Stage(inside, width, count, 1 if i == 0 else 2, eps)
            for i, (inside, width, count) in enumerate(zip(dims, widths, units, strict=False))
        )

    def forward(self, images: Float[Tensor, "b c height width"]) -> Float[Tensor, "b d _ _"]:
        x: Tensor = self.stem(images)
        for stage in self.stages:
            assert isinstance(stage, Stage)
            for unit in stage.blocks:
                x = recomputed(unit, x) if self.recompute and self.training else unit(x)
        return x

    def draw(self, fan_in: bool) -> None:
        """First values; the last norm of every unit is zero, so that a unit begins as nothing."""
        for module in self.modules():
            if isinstance(module, StdConv) and fan_in:
                nn.init.kaiming_normal_(module.weight, nonlinearity="linear")
            elif isinstance(module, StdConv):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
            elif isinstance(module, Unit):
                nn.init.zeros_(module.norm3.weight)


class ResNetEmbed(PatchEmbed):
    """Patches of what a ResNet makes of images."""

    def __init__(self, resnet: ResNet, patch: int, dim: int) -> None:
        super().__init__(patch, resnet.dim, dim)
        self.backbone = resnet

    def forward(self, images: Float[Tensor, "b c height width"]) -> Float[Tensor, "b n d"]:
        return super().forward(self.backbone(images))


class Hybrid(StemViT):
    """A Vision Transformer on patches of a ResNet's features.

    Takes images of any size that patches divide, and lists of groups of one size each; no packs,
    since convolutions look beyond the edge of a patch. `patch_size` is what a patch spans in
    pixels.

    Args:
        variant: from `VARIANTS`: mu (toy), R+Ti/16, R26+S/32, R26+B/32, R50+B/16 or R50+L/32.
        image_size: side in pixels, or (height, width).
        in_channels: channels of the input images.
        pooling: as in `ViT`.
        class_token: has a class token.
        positions: which positions, and where they enter.
        block: what the blocks of the Transformer are made of.
        pre_logits: Linear and tanh after pooling, as in ImageNet-21k pre-training.
        init: first values: "timm", "dino", "jax" (Google), "mae" or "moco" (MoCo v3).
        dropout: rate after adding positions, after the attention projection, after the
            activation and after the second linear layer of the MLP.
        drop_path: stochastic depth of the last block; it grows linearly from 0 at the first.
        depth: number of blocks instead of the variant's.
        embed_dim: width instead of the variant's.
        num_heads: attention heads instead of the variant's.
        mlp_dim: hidden width of the MLP; 4 * embed_dim where embed_dim is given, else the
            variant's.
        recompute: keep only the input of every unit and block for the backward pass, and compute
            them again in it (gradient checkpointing).
        epsilons: those of the ResNet's norms and weights: "timm", or "google", for files of its
            own (`.npz`), whose outputs differ by a thousandth otherwise.

    Raises:
        ValueError: unknown variant or epsilons, a size that patches do not divide, and as `ViT`.
    """

    def __init__(
        self,
        variant: str = "R50+B/16",
        image_size: int | tuple[int, int] = 224,
        in_channels: int = 3,
        pooling: Literal["cls", "avg", "norm_avg", "map"] = "cls",
        class_token: bool = True,
        positions: Positions = Positions(),  # noqa: B008 - frozen
        block: BlockStyle = BlockStyle(),  # noqa: B008 - frozen
        pre_logits: bool = False,
        init: Init = "timm",
        dropout: float = 0.0,
        drop_path: float = 0.0,
        depth: int | None = None,
        embed_dim: int | None = None,
        num_heads: int | None = None,
        mlp_dim: int | None = None,
        recompute: bool = False,
        epsilons: Literal["timm", "google"] = "timm",
    ) -> None:
        if variant not in VARIANTS:
            raise ValueError(f"unknown hybrid {variant!r}; known: {', '.join(VARIANTS)}")
        check_choice("epsilons", epsilons, tuple(EPSILONS))
        size = VARIANTS[variant]
        resnet = ResNet(size.units, in_channels, EPSILONS[epsilons], recompute)
        super().__init__(
            variant=size.variant,
            patch_size=resnet.stride * size.patch,
            image_size=image_size,
            in_channels=in_channels,
            pooling=pooling,
            class_token=class_token,
            positions=positions,
            block=block,
            pre_logits=pre_logits,
            init=init,
            dropout=dropout,
            drop_path=drop_path,
            depth=depth,
            embed_dim=embed_dim,
            num_heads=num_heads,
            mlp_dim=mlp_dim,
            recompute=recompute,
        )
        resnet.draw(fan_in=init == "jax")
        self.units = size.units
        self.use_stem(ResNetEmbed(resnet, size.patch, self.embed_dim), init)
