"""Any network that timm has (https://github.com/huggingface/pytorch-image-models), as a backbone.

    map    = model.forward_features(images)                [b, d, rows, columns] or alike
    pooled = model.forward_head(map, pre_logits=True)      what timm's classifier reads
    grid, stride, prefix tokens                            from the shapes of one forward pass

Nothing here knows a network by name. Keys are timm's behind `model.`, which readers of checkpoints
take off (`modules.weights`). Dropout and stochastic depth draw from torch's generator, which
`callbacks.seeding` seeds every step.

Batch norms normalise every group of crops by itself. What they remember for evaluation is the first
group, the global crops: an evaluation sees whole images, whose statistics are not those of small
crops.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, overload

import timm
import torch
from einops import rearrange
from jaxtyping import Float
from timm.layers.norm_act import BatchNormAct2d
from timm.models._manipulate import group_with_matcher
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from modules.backbones.attention import Packed
from modules.backbones.layers import Backbone, Features
from modules.backbones.layout import find_layout
from modules.backbones.masked import Altered, Group, Masked, Swapped, Visible

# Arguments of timm's that let a network take images of other sizes than it was built for.
ANY_SIZE = {"dynamic_img_size": True, "strict_img_size": False}
# What the arguments of `Timm` are called there.
OWN = {
    "img_size": "image_size",
    "in_chans": "in_channels",
    "drop_path_rate": "drop_path",
    "pretrained": "weights of the method",
    "num_classes": "num_classes of the method",
}


class Timm(Backbone):
    """A network of timm's, without its classifier.

    Takes images of one size, and lists of groups of one size each, a pass a group. Sizes other
    than `image_size` are taken where the network can: convolutions can, Transformers whose
    positions timm resamples can, some others cannot and say so. Takes neither packs nor masks.

    Its first values are timm's, drawn anew. For timm's trained ones set `weights: timm:NAME` where
    a method has `weights`, or call `patchlight fit --weights`.

    Args:
        name: timm's name of the network, such as resnet50 (`timm.list_models()`).
        image_size: side in pixels, or (height, width); null for what timm's weights were made for.
        in_channels: channels of the input images.
        drop_path: rate of stochastic depth, spread over the network as timm does.
        options: further arguments of timm's constructor, such as {zero_init_last: false}.
        recompute: keep less for the backward pass, and compute the rest again in it, where timm's
            network can (gradient checkpointing).

    Raises:
        ValueError: no network of this name, arguments or images that it does not take, or one
            that gives no single map of features; recompute with batch norms, which would count
            every batch twice.
    """

    image_size: tuple[int, int]
    max_grid = None
    takes_packs = False

    def __init__(
        self,
        name: str,
        image_size: int | tuple[int, int] | None = None,
        in_channels: int = 3,
        drop_path: float = 0.0,
        options: dict[str, Any] | None = None,
        recompute: bool = False,
    ) -> None:
        super().__init__()
        if not timm.is_model(name):
            close = timm.list_models(f"*{name}*")[:4] if name.isidentifier() else []
            hint = f"there is {', '.join(close)}" if close else "timm.list_models() has them"
            raise ValueError(f"timm knows no model {name!r}; {hint}")
        if not 0.0 <= drop_path < 1.0:
            raise ValueError(f"drop_path is {drop_path}; expected a rate in [0, 1)")
        self.name, self.in_channels = name, in_channels
        self.model = build(name, image_size, in_channels, drop_path, options or {})
        if image_size is None:
            image_size = self.model.pretrained_cfg["input_size"][1:]
        size = (image_size, image_size) if isinstance(image_size, int) else image_size
        self.image_size = (size[0], size[1])
        # Some attentions keep their biases in eval mode, where a teacher's weights move on.
        self.cached = [m for m in self.model.modules() if hasattr(m, "attention_bias_cache")]
        self.num_fused = count_fused(self.model)
        with torch.no_grad():
            self.model.eval()
            features, pooled = self.run(torch.zeros(1, in_channels, *self.image_size))
            self.model.train()
        layout = find_layout(self.model, features, self.image_size)
        if layout is None or pooled.ndim != 2:
            raise ValueError(
                f"timm's {name} gives features of {list(features.shape)}, which are no grid of "
                f"patches; use another network"
            )
        self.layout = layout
        self.patch_size, self.num_prefix_tokens = self.layout.stride, self.layout.prefix
        self.embed_dim = pooled.shape[1]
        self.width = features.shape[1 if self.layout.kind == "NCHW" else -1]
        self.layers, self.num_layers = layers_of(self.model)
        self.recompute = recompute
        if recompute:
            checkpoint_blocks(self.model, name)

    @property
    def patch_dim(self) -> int:
        """Width of `Features.patches`: another than embed_dim where timm pools before a layer."""
        return self.width

    @overload
    def forward(
        self, images: Float[Tensor, "b c height width"] | Altered | Visible | Packed
    ) -> Features: ...
    @overload
    def forward(self, images: list[Group]) -> list[Features]: ...
    def forward(self, images: Group | Visible | Packed | list[Group]) -> Features | list[Features]:
        if not isinstance(images, list):
            images = self.check(images)
            return self.read(images, *self.run(images))
        first, *others = images
        seen = [self(first)]
        with forgetful(self.model):
            return [*seen, *(self(group) for group in others)]

    def last_blocks(
        self, images: Float[Tensor, "b c height width"] | Altered | Visible | Packed, count: int
    ) -> list[Features]:
        """What the last `count` blocks give, the last one last, each read out as `forward` does.

        Raises:
            ValueError: more than one of a network whose blocks are not all alike, or more than
                it has.
        """
        if count == 1:
            return [self(images)]
        images, shown = self.check(images), f"the last {count} blocks of timm's {self.name}"
        arguments: dict[str, Any] = {"indices": count, "norm": True, "intermediates_only": True}
        if self.num_prefix_tokens:
            arguments["return_prefix_tokens"] = True
        try:
            found = self.model.forward_intermediates(images, **arguments)
        except (AttributeError, TypeError, AssertionError) as error:
            raise ValueError(f"{shown} cannot be read ({error}); set num_blocks to 1") from error
        parts = found if self.num_prefix_tokens else [(block, None) for block in found]
        if len({block.shape for block, _ in parts}) > 1 or parts[0][0].shape[1] != self.width:
            raise ValueError(f"{shown} differ in width or grid; set num_blocks to 1")
        maps = [self.as_map(block, prefix) for block, prefix in parts]
        return [self.read(images, each, self.head(each)) for each in maps]

    def as_map(
        self, block: Float[Tensor, "b d rows columns"], prefix: Float[Tensor, "b p d"] | None
    ) -> Tensor:
        """What a block gives as `forward_features` lays it out."""
        if self.layout.kind == "NCHW":
            return block
        if self.layout.kind == "NHWC":
            return rearrange(block, "b d y x -> b y x d")
        tokens = rearrange(block, "b d y x -> b (y x) d")
        return tokens if prefix is None else torch.cat((prefix, tokens), dim=1)

    def check(
        self, images: Float[Tensor, "b c height width"] | Altered | Visible | Packed
    ) -> Float[Tensor, "b c height width"]:
        """Refuse what is no batch of images of one size, or not of the right channels."""
        if not isinstance(images, Tensor):
            kinds = {
                Masked: "masked patches",
                Swapped: "swapped patches",
                Visible: "some of the patches",
            }
            what = kinds.get(type(images), "packs of images")
            raise ValueError(
                f"timm's {self.name} takes images of one size, and {what} reached it; use "
                f"modules.backbones.ViT for these"
            )
        if self.recompute and images.device.type == "xla":
            raise ValueError(
                f"timm cannot compute {self.name} again on a TPU; set recompute to false"
            )
        if images.shape[1] != self.in_channels:
            raise ValueError(
                f"images of {images.shape[1]} channels reached timm's {self.name} built for "
                f"{self.in_channels}; set the backbone's in_channels and the data's channels to "
                f"the same number"
            )
        if count_fused(self.model) != self.num_fused:
            raise ValueError(
                f"trainer.sync_batchnorm has replaced norms of timm's {self.name} that activations "
                f"are part of by norms that have none; set it to false, or use another network"
            )
        return images

    def run(self, images: Float[Tensor, "b c height width"]) -> tuple[Tensor, Tensor]:
        """The map of features, and the pooled ones.

        Raises:
            ValueError: images of a size that the network does not take.
        """
        for part in self.cached:
            part.attention_bias_cache = {}
        try:
            features = self.model.forward_features(images)
            if not isinstance(features, Tensor):
                raise ValueError(f"timm's {self.name} gives no single map of features; use another")
            return features, self.head(features)
        except torch.OutOfMemoryError:
            raise
        except (AssertionError, IndexError, RuntimeError) as error:
            height, width = images.shape[2:]
            built = "x".join(map(str, self.image_size))
            raise ValueError(
                f"timm's {self.name}, built for {built}, does not take images of {height}x{width} "
                f"({str(error).splitlines()[0]}); give all images a size that it takes, and set "
                f"the backbone's image_size to it"
            ) from error

    def head(self, features: Tensor) -> Float[Tensor, "b d"]:
        pooled: Tensor = self.model.forward_head(features, pre_logits=True)
        return pooled

    def read(
        self, images: Float[Tensor, "b c height width"], features: Tensor, pooled: Tensor
    ) -> Features:
        """Patches with their grid, and the class token, out of the map of features."""
        kind, prefix = self.layout.kind, self.num_prefix_tokens
        if kind == "NLC":
            patches = features[:, prefix:]
            size = (images.shape[2], images.shape[3])
            grid = self.layout.grid_of(size, patches.shape[1])
            if grid is None:
                raise ValueError(
                    f"timm's {self.name} makes {patches.shape[1]} patches of {size[0]}x{size[1]} "
                    f"pixels, which are no grid of stride {self.patch_size}"
                )
        else:
            order = "b d y x" if kind == "NCHW" else "b y x d"
            grid = (features.shape[2], features.shape[3]) if kind == "NCHW" else None
            grid = grid or (features.shape[1], features.shape[2])
            patches = rearrange(features, f"{order} -> b (y x) d")
        has_cls = prefix > 0 and getattr(self.model, "cls_token", None) is not None
        return Features(pooled, features[:, 0] if has_cls else None, patches, grid)

    def no_weight_decay(self) -> frozenset[str]:
        given = self.model.no_weight_decay() if hasattr(self.model, "no_weight_decay") else ()
        return frozenset(n for n, _ in self.named_parameters() if n.removeprefix("model.") in given)

    def layer_of(self, name: str) -> int:
        """The layer of a parameter as timm groups them.

        Raises:
            ValueError: a network of which timm knows no layers.
        """
        if not self.layers:
            raise ValueError(
                f"timm knows no layers of {self.name}; set optimizer.layer_decay to null"
            )
        return self.layers[name.removeprefix("model.")]


def build(
    name: str,
    image_size: int | tuple[int, int] | None,
    in_channels: int,
    drop_path: float,
    options: Mapping[str, Any],
) -> Any:
    """timm's network without a classifier, able to take any size where it can be.

    Constructors differ in what they take; what is not asked for is left out where one refuses it.

    Raises:
        ValueError: arguments that it does not take.
    """
    for key in options:
        if key in OWN:
            raise ValueError(f"options has {key}, which is not for timm here: use {OWN[key]}")
    asked = {"num_classes": 0, "in_chans": in_channels, **options}
    asked |= {"drop_path_rate": drop_path} if drop_path else {}
    offered: dict[str, Any] = {key: v for key, v in ANY_SIZE.items() if key not in options}
    offered |= {"img_size": image_size, "drop_path_rate": 0.0}
    while True:
        try:
            return timm.create_model(name, pretrained=False, **offered | asked)
        except TypeError as error:
            refused = [key for key in offered | asked if f"'{key}'" in str(error)]
            if not refused or any(key in asked for key in refused):
                what = ", ".join(OWN.get(key, key) for key in refused if key in asked)
                raise ValueError(
                    f"timm's {name} does not take {what or 'these options'} ({error})"
                ) from error
            offered = {key: value for key, value in offered.items() if key not in refused}
        except (AssertionError, RuntimeError) as error:
            raise ValueError(f"timm cannot build {name} with {offered | asked}: {error}") from error


def layers_of(model: Any) -> tuple[dict[str, int], int]:
    """The layer of each parameter and the number of layers, as timm's layer decay counts them.

    That is 0 for the stem, and one more than the last layer for what follows with the classifier.
    """
    if not hasattr(model, "group_matcher"):
        return {}, 1
    names = [name for name, _ in model.named_parameters()]
    classifier = f"{classifiers(model)[0]}.weight"  # not there, but what timm would count on to
    matcher = model.group_matcher(coarse=False)
    layers = group_with_matcher(iter((n, None) for n in [*names, classifier]), matcher, False, True)
    found = {name: int(layers[name]) for name in names}
    return found, int(layers[classifier]) - 1


def classifiers(model: Any) -> tuple[str, ...]:
    """Names of timm's linear classifiers, which a `Timm` does without."""
    given = model.pretrained_cfg.get("classifier") or "head"
    return (given,) if isinstance(given, str) else tuple(given)


def checkpoint_blocks(model: Any, name: str) -> None:
    """
    Raises:
        ValueError: timm cannot, or the network remembers what it has seen.
    """
    if any(isinstance(part, _BatchNorm) for part in model.modules()):
        raise ValueError(
            f"timm's {name} has batch norms, which would count a batch twice that is computed "
            f"again; set recompute to false"
        )
    try:
        model.set_grad_checkpointing(True)
    except (AttributeError, AssertionError, NotImplementedError) as error:
        raise ValueError(
            f"timm cannot compute parts of {name} again ({error}); set recompute to false"
        ) from error


def count_fused(model: nn.Module) -> int:
    """Batch norms that an activation is part of."""
    return sum(isinstance(part, BatchNormAct2d) for part in model.modules())


@contextmanager
def forgetful(model: nn.Module) -> Iterator[None]:
    """Batch norms remember nothing of what they see meanwhile; they normalise as ever."""
    norms = [part for part in model.modules() if isinstance(part, _BatchNorm)]
    momenta = [norm.momentum for norm in norms]
    for norm in norms:
        norm.momentum = 0.0
    try:
        yield
    finally:
        for norm, momentum in zip(norms, momenta, strict=True):
            norm.momentum = momentum
