"""Compiles backbones on packs and groups, and a step of DINO, and says how often each was."""

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend

from datamodules.batch import PackedImages
from datamodules.sampling import fold
from experiments.cli import compile_backbones
from modules import MAE, MoCo, Supervised, TokenLabeling
from modules.backbones import LVViT, NaViT, Positions, Swapped, Swin, T2TViT, TwinsSVT, ViT
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
    for seed in range(8):
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


OF_ANY_SIZE: dict[str, Any] = {
    "sizes of ViT": lambda: ViT("mu", 8, 64),
    "sizes of ViT-sines": lambda: ViT("mu", 8, 64, positions=Positions("sincos2d")),
    "sizes of Swin": lambda: Swin("mu", image_size=64),
    "sizes of SwinV2": lambda: Swin("mu", image_size=64, version=2),
    "sizes of Twins": lambda: TwinsSVT("mu", image_size=64),
    "sizes of T2T-ViT": lambda: T2TViT("mu", image_size=64),
}


def compilations_of_sizes(name: str) -> int:
    """One for each of two sizes of images, in turn."""
    torch._dynamo.reset()
    backbone = OF_ANY_SIZE[name]().requires_grad_(True)
    counter = CompileCounterWithBackend("eager")
    batches = [torch.randn(2, 3, side, side) for side in (64, 96, 64, 96)]
    expected = [pooled(backbone, batch) for batch in batches]
    compile_backbones(Supervised(backbone, 10), backend=counter, fullgraph=True)
    for batch, own in zip(batches, expected, strict=True):
        torch.testing.assert_close(pooled(backbone, batch), own, atol=1e-5, rtol=1e-5)
    return counter.frame_count


def pooled(network: Any, batch: torch.Tensor) -> torch.Tensor:
    torch.manual_seed(0)  # T2T-ViT's layers have dropout
    out: torch.Tensor = network(batch).pooled
    return out


def compilations_of_symbols() -> int:
    """With torch's own defaults, by which sizes are numbers at first and symbols then."""
    torch._dynamo.reset()
    network = ViT("mu", 8, 64)
    counter = CompileCounterWithBackend("eager")
    compiled = torch.compile(network, fullgraph=True, backend=counter)
    for side in (64, 32, 64, 48, 96):
        batch = torch.randn(2, 3, side, side)
        own = pooled(network, batch)
        torch.testing.assert_close(pooled(compiled, batch), own, atol=1e-5, rtol=1e-5)
    return counter.frame_count


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


def compilations_of_methods() -> dict[str, int]:
    """What `--compile true` does: the backbone of each network that trains, without a break."""
    found = {}
    for name, (method, step) in steps().items():
        torch._dynamo.reset()
        expected = step()
        expected.backward()
        names, counter = list(method.state_dict()), CompileCounterWithBackend("eager")
        compile_backbones(method, backend=counter, fullgraph=True)
        for _ in range(3):
            loss = step()
            loss.backward()
        assert list(method.state_dict()) == names, name
        torch.testing.assert_close(loss, expected, atol=1e-5, rtol=1e-5)
        found[name] = counter.frame_count
    return found


def steps() -> dict[str, tuple[Any, Callable[[], torch.Tensor]]]:
    """A loss of every method, of a student where there is one, as a function of nothing."""
    crops = (torch.randn(2, 3, 1, 16, 16), torch.randn(2, 3, 1, 8, 8))
    images, keys = torch.randn(4, 1, 16, 16), torch.arange(4)
    supervised = Supervised(views.backbone(), 10)
    token_labels = TokenLabeling(LVViT("mu", 8, 16, 1), 10)
    swapped = Swapped(images, torch.arange(4).expand(4, -1) < 2, keys.flip(0))
    mae = MAE(views.backbone(), decoder_dim=8, decoder_depth=1, decoder_heads=2)
    dino = views.method()
    moco = MoCo(views.backbone(init="moco"), hidden_dim=8, projection_dim=8)
    return {
        "supervised": (supervised, lambda: square(supervised.classifier(images))),
        "token labels": (token_labels, lambda: square(token_labels.classifier.read(swapped)[2])),
        "mae": (mae, lambda: mae.autoencoder(images, mae.autoencoder.mask(images, keys))[0].mean()),
        "dino": (dino, lambda: dino.student(crops).bottlenecks.square().sum(dim=-1).std()),
        "moco": (moco, lambda: square(moco.student(crops[0])[1])),
    }


def square(x: torch.Tensor) -> torch.Tensor:
    return x.square().mean()


if __name__ == "__main__":
    torch.set_num_threads(1)
    for each in NETWORKS:
        print(each, compilations(each))
    for each in OF_ANY_SIZE:
        print(each, compilations_of_sizes(each))
    print("symbols", compilations_of_symbols())
    print("groups", compilations_of_groups())
    print("masks", compilations_of_masks())
    for each, count in compilations_of_methods().items():
        print(each, count)
