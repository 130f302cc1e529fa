"""Compiles backbones on packs and groups, and a step of DINO, and says how often each was."""

from typing import Any

import torch
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend

from datamodules.batch import PackedImages
from datamodules.sampling import fold
from modules.backbones import NaViT, Positions, ViT
from modules.dino_loss import same_loss
from modules.ibot import MaskedPatches, hide
from tests import views
from tests.packs import images, pack

EVERY = Positions("learned2d", "every")
NETWORKS: dict[str, Any] = {
    "ViT": lambda: ViT("mu", 8, (32, 48), drop_path=0.1),
    "ViT-map": lambda: ViT("mu", 8, 32, pooling="map", positions=EVERY, depth=1),
    "ViT-sines": lambda: ViT("mu", 8, 32, pooling="avg", positions=Positions("sincos2d"), depth=1),
    "NaViT": lambda: NaViT("mu", 8, drop_path=0.1),
    "NaViT-query": lambda: NaViT("mu", 8, pooling="query", patch_norm=True, depth=1),
}


def mixed(seed: int, num_prefix: int) -> PackedImages:
    """Other images in every pack, and now and then none; the shapes are always the same."""
    generator = torch.Generator().manual_seed(seed)
    rows = []
    for row in range(3):
        count = int(torch.randint(0 if row else 1, 4, (), generator=generator))
        sides = torch.randint(1, 5, (count, 2), generator=generator)
        rows.append(images([(8 * y, 8 * x) for y, x in sides.tolist()], seed=seed + row))
    return pack(rows, 8, 54, 3, num_prefix)


def compilations(name: str) -> int:
    torch._dynamo.reset()
    network: nn.Module = NETWORKS[name]()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(network, fullgraph=True, backend=counter)
    for seed in range(20):
        network.zero_grad()
        compiled(mixed(seed, network.num_prefix_tokens)).pooled.square().sum().backward()
        for parameter in network.parameters():
            assert parameter.grad is None or torch.isfinite(parameter.grad).all()
    count = counter.frame_count
    network.eval()
    batch = mixed(99, network.num_prefix_tokens)
    expected = network(batch).pooled
    torch.testing.assert_close(compiled(batch).pooled, expected, atol=1e-5, rtol=1e-5)
    return count


def compilations_of_groups() -> int:
    torch._dynamo.reset()
    network = ViT("mu", 8, 32, drop_path=0.1, num_registers=1)
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(network, fullgraph=True, backend=counter)
    crops = [torch.randn(4, 3, 32, 32), torch.randn(6, 3, 16, 16)]
    for _ in range(3):
        network.zero_grad()
        sum(features.pooled.square().sum() for features in compiled(crops)).backward()
        assert all(torch.isfinite(parameter.grad).all() for parameter in network.parameters())
    network.eval()
    for ours, expected in zip(compiled(crops), network(crops), strict=True):
        torch.testing.assert_close(ours.pooled, expected.pooled, atol=1e-5, rtol=1e-5)
    return counter.frame_count - 1  # evaluation is another graph


def compilations_of_masks() -> int:
    """The student that sees masks, what the teacher says of them, and their loss."""
    torch._dynamo.reset()
    how = MaskedPatches()
    module = views.method(masked_patches=how)
    crops = (torch.randn(2, 3, 1, 16, 16), torch.randn(2, 3, 1, 8, 8))

    def step(keys: torch.Tensor) -> torch.Tensor:
        hidden = hide(how, keys, (4, 4))
        with torch.no_grad():
            taught = module.teacher.read(module.teacher(crops[:1]).patches, hidden)
        seen, weight = module.student.read(module.student(crops, hidden.is_masked).patches, hidden)
        z, prototypes = taught
        targets = module.patch_loss.center.targets(z.flatten(0, 1)[None], prototypes, 0.04)
        return hidden.mean(same_loss(seen.flatten(0, 1), weight, targets, 0.1)).mean()

    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(step, fullgraph=True, backend=counter)
    for first in range(4):
        compiled(torch.tensor([fold(0, first, i) for i in range(3)])).backward()
    return counter.frame_count


if __name__ == "__main__":
    torch.set_num_threads(1)
    for each in NETWORKS:
        print(each, compilations(each))
    print("groups", compilations_of_groups())
    print("masks", compilations_of_masks())
