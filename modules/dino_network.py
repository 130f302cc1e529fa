"""The networks of DINO: a backbone, and the head whose last layer are the prototypes.

Caron et al. 2021, https://arxiv.org/abs/2104.14294, section 3.1 and appendix C.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Bool, Float
from torch import Tensor, nn
from torch.nn.utils.parametrizations import weight_norm

from modules.backbones import Backbone
from modules.backbones.masked import Group, Masked, pixels
from modules.ibot import Hidden, Vectors
from modules.networks import AroundBackbone


class Head(nn.Module):
    """Three linear layers to a bottleneck of length 1, then k prototypes with a norm of their own.

    Keys are the published ones; files with the older `last_layer.weight_g` and `weight_v` load.
    """

    def __init__(
        self, dim: int, hidden_dim: int, bottleneck_dim: int, num_prototypes: int, norm_last: bool
    ) -> None:
        super().__init__()
        self.mlp = nn.Sequential(
            nn.Linear(dim, hidden_dim),
            nn.GELU(),
            nn.Linear(hidden_dim, hidden_dim),
            nn.GELU(),
            nn.Linear(hidden_dim, bottleneck_dim),
        )
        for layer in self.mlp:
            if isinstance(layer, nn.Linear):
                nn.init.trunc_normal_(layer.weight, std=0.02)
                nn.init.zeros_(layer.bias)
        self.last_layer = weight_norm(nn.Linear(bottleneck_dim, num_prototypes, bias=False))
        norms: nn.Parameter = self.last_layer.parametrizations.weight.original0
        nn.init.ones_(norms)
        norms.requires_grad = not norm_last

    def forward(self, x: Float[Tensor, "*b d"]) -> Float[Tensor, "*b e"]:
        """The bottleneck, in float32; logits are its product with `prototypes`."""
        out = self.mlp(x)
        # Half precision logits over a temperature of 0.04 would be noise.
        return F.normalize(out.to(torch.promote_types(out.dtype, torch.float32)), dim=-1)

    @property
    def prototypes(self) -> Float[Tensor, "k e"]:
        """The weight of the last layer."""
        parts = self.last_layer.parametrizations.weight
        norms, directions = parts.original0, parts.original1
        if norms.device.type == "xla":  # where torch would do this on the CPU
            lengths = torch.linalg.vector_norm(directions, dim=1, keepdim=True)
            found: Tensor = directions * (norms / lengths)
            return found
        weight: Tensor = self.last_layer.weight
        return weight


class Seen(NamedTuple):
    """What a network makes of views.

    features:    [v, b, d] pooled
    bottlenecks: [v, b, e] the head's
    patches:     [g * b, n, d] of the first group, the global views
    """

    features: Float[Tensor, "v b d"]
    bottlenecks: Float[Tensor, "v b e"]
    patches: Float[Tensor, "gb n d"]


class Network(AroundBackbone):
    """A backbone and a head: the student, or the teacher.

    With `masks` also a token for patches that are hidden, and `patch_head` for patches where it is
    not the same head.
    """

    def __init__(
        self, backbone: Backbone, head: Head, masks: bool = False, patch_head: Head | None = None
    ) -> None:
        super().__init__()
        self.backbone, self.head, self.patch_head = backbone, head, patch_head
        self.mask_token = nn.Parameter(torch.zeros(1, backbone.embed_dim)) if masks else None

    def forward(
        self,
        crops: Sequence[Float[Tensor, "_ b _ _ _"]],
        is_masked: Bool[Tensor, "gb n"] | None = None,
    ) -> Seen:
        """All views, each group of crops of one size; of the first group patches may be hidden."""
        b = crops[0].shape[1]
        images: list[Group] = [crop.flatten(0, 1) for crop in crops]
        if is_masked is not None:
            assert self.mask_token is not None
            images[0] = Masked(pixels(images[0]), is_masked, self.mask_token)
        groups = self.backbone(images)
        pooled = torch.cat([features.pooled for features in groups])
        features = rearrange(pooled, "(v b) d -> v b d", b=b)
        return Seen(features, self.head(features), groups[0].patches)

    def heads(self) -> tuple[Head, Head]:
        """The one of views and that of patches, which may be the same."""
        return self.head, self.head if self.patch_head is None else self.patch_head

    def read(self, patches: Float[Tensor, "gb n d"], hidden: Hidden) -> Vectors:
        """Bottlenecks of the hidden ones among patches, and what they are compared with."""
        head = self.heads()[1]
        return head(hidden.of(patches)), head.prototypes

    def layer_of(self, name: str) -> int:
        """The layer of a parameter, for layer decay; the mask token is one of the stem."""
        return 0 if name == "mask_token" else super().layer_of(name)
