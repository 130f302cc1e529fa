"""Memory that `plan` counts is what a step takes."""

from typing import Any

import pytest
import torch
from torch import distributed as dist
from torch.distributed._tools.mem_tracker import MemTracker
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from torch.testing._internal.distributed.fake_pg import FakeStore

from experiments.memory import activations, bytes_kept, memory_of, saved
from experiments.plan import read
from modules import optim
from modules.backbones import Swin, T2TViT, ViT
from modules.mae import Autoencoder
from modules.networks import AroundBackbone
from modules.sharding import spread
from tests import small
from tests.runs import EXPERIMENTS

NO_STATE = ("sgd", "rmsprop")  # or less of it, without momentum
RECIPE = ["--config", str(EXPERIMENTS / "dino" / "vit_s16.yaml")]


def test_memory_is_that_of_the_networks() -> None:
    with torch.device("meta"):
        recipe = read([*RECIPE, "--trainer.precision=bf16-mixed"])
    memory = memory_of(recipe.method)
    network = 21_665_664 + 5_509_376 + 16_777_216 + 65_536  # METHODS: backbone, head, last layer
    center = 65_536
    assert memory.weights == 4 * (2 * network + center)
    assert memory.training == 12 * (network - 65_536)  # the prototypes' norms are frozen
    with torch.device("meta"):
        whole = read([*RECIPE, "--trainer.precision=32-true"])
    half, full = (activations(r.method, r.data, r.is_half) for r in (recipe, whole))
    assert 0.4 < half / full < 0.8


def test_what_is_kept_for_backward_is_counted_once() -> None:
    images = [torch.randn(2, 3, 32, 32)]
    shallow, deep = (bytes_kept(ViT("mu", 8, 32, depth=d), images, False) for d in (1, 3))
    linear = torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.ReLU())
    x = torch.randn(4, 8, requires_grad=True)
    # The input, the weight, and the result of ReLU: 4 x 8, 8 x 8 and 4 x 8 numbers.
    assert bytes_kept(linear, [x], False) == 4 * (32 + 64 + 32)  # type: ignore[arg-type]
    assert deep > shallow


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("kind", [ViT, Swin, T2TViT])
def test_activations_are_those_of_a_real_step(kind: Any, recompute: bool) -> None:
    """Of blocks that are computed again, the largest comes on top of what is kept."""
    backbone = kind("mu", image_size=128, recompute=recompute).requires_grad_(True)
    peaks, planned = [], []
    for count in (4, 8):
        images, tracker = torch.randn(count, 3, 128, 128), MemTracker()
        images.requires_grad_(kind is T2TViT)  # whose layers the tracker cannot watch without
        tracker.track_external(backbone)
        with tracker:
            backbone(images).pooled.sum().backward()
        backbone.zero_grad()
        peaks.append(tracker.get_tracker_snapshot("peak")[images.device]["Total"])
        planned.append(bytes_kept(backbone, [images.detach()], False) - images.nbytes)
    assert planned[1] - planned[0] == pytest.approx(peaks[1] - peaks[0], rel=0.2)


@pytest.mark.parametrize("recompute", ["false", "true"])
def test_activations_of_mae_are_those_of_visible_patches_and_decoder(recompute: str) -> None:
    published = ["--config", str(EXPERIMENTS / "mae" / "vit_b16.yaml")]
    toy = ["variant=mu", "image_size=64", "patch_size=4", f"recompute={recompute}"]
    given = [f"--model.init_args.backbone.init_args.{option}" for option in toy]
    given += [f"--model.init_args.decoder_{option}" for option in ("dim=64", "depth=3")]
    given += ["--data.init_args.image_size=64"]
    with torch.device("meta"):
        recipe = read([*published, *given])
    planned = activations(recipe.method, recipe.data, False)
    network = read([*published, *given]).method.autoencoder
    assert isinstance(network, Autoencoder)
    peaks = []
    for count in (2, 4):
        images, tracker = torch.randn(count, 3, 64, 64), MemTracker()
        mask = network.mask(images, torch.arange(count))
        tracker.track_external(network)
        with tracker:
            network(images, mask)[0].sum().backward()
        network.zero_grad()
        peaks.append(tracker.get_tracker_snapshot("peak")[images.device]["Total"])
    assert planned == pytest.approx((peaks[1] - peaks[0]) / 2, rel=0.2)


@pytest.mark.parametrize(
    "how",
    [*({"name": name} for name in optim.NAMES), *({"name": n, "momentum": 0.0} for n in NO_STATE)],
)
def test_gradients_and_optimizer_are_those_of_a_real_step(how: dict[str, Any]) -> None:
    module = small.method(optimizer=optim.Optimization(base_lr=0.1, **how))
    optimizer = optim.build(module.optimization, module)
    weights = [p for group in optimizer.param_groups for p in group["params"]]
    for weight in weights:
        weight.grad = torch.zeros_like(weight)
    optimizer.step()
    kept = (value for weight in weights for value in optimizer.state[weight].values())
    state = [value for value in kept if torch.is_tensor(value) and value.ndim]  # no counters
    true = sum(tensor.nbytes for tensor in (*weights, *state))
    assert memory_of(module).training == true


def test_buckets_are_those_of_ddp() -> None:
    module = small.method()
    dist.init_process_group("fake", rank=0, world_size=2, store=FakeStore())
    try:
        made = DistributedDataParallel(module)._get_ddp_logging_data()
        true = sum(int(size) for size in made["bucket_sizes"].split(","))
    finally:
        dist.destroy_process_group()
    assert [memory_of(module, False, count).buckets for count in (1, 2, 8)] == [0, true, true]
    assert memory_of(module, True, 2).buckets == 0


def test_copies_are_those_that_autocast_keeps() -> None:
    module = small.method(backbone=ViT("Ti", patch_size=8, image_size=16, in_channels=1, depth=3))
    backbone, kept = module.classifier.backbone, []
    with torch.autocast("cpu", torch.bfloat16):
        for count in (1, 2):
            kept.append(sum(saved(backbone, torch.randn(count, 1, 16, 16)).values()))
    once = 2 * kept[0] - kept[1]  # what does not grow with the images
    assert memory_of(module, is_half=True).copies == pytest.approx(once, rel=0.05)
    assert memory_of(module).copies == 0


def test_sharded_weights_are_those_of_a_device() -> None:
    with torch.device("meta"):
        recipe = read([*RECIPE, "--trainer.strategy=sharded"])
    one, eight = (memory_of(recipe.method, recipe.is_sharded, count) for count in (1, 8))
    assert eight.gathered == one.gathered < one.weights
    assert eight.training == pytest.approx(one.training / 8, rel=0.02)  # a row cannot be cut
    module = small.method()
    planned = memory_of(module, True, 8)
    dist.init_process_group("fake", rank=0, world_size=8, store=FakeStore())
    try:
        for network in module.children():
            if isinstance(network, AroundBackbone):
                spread(network, init_device_mesh("cpu", (8,)))
        own = [p.to_local() if isinstance(p, DTensor) else p for p in module.parameters()]
        true = sum(t.nbytes for t in (*own, *module.buffers()))
    finally:
        dist.destroy_process_group()
    assert planned.weights == true
