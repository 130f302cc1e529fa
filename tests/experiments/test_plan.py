"""What `plan` says is what a run does."""

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from lightning.pytorch import Callback
from safetensors.torch import save_file
from torch import distributed as dist
from torch.distributed._tools.mem_tracker import MemTracker
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from torch.testing._internal.distributed.fake_pg import FakeStore

from datamodules.convert import convert
from datamodules.sampling import EvalBatches, TrainBatches, grouped_order
from datamodules.shards import Shards
from datamodules.sources import open_source
from experiments.cli import PatchlightCLI
from experiments.memory import Memory, activations, bytes_kept, memory_of, saved
from experiments.plan import GIB, length, plan, read, table
from modules import optim
from modules.backbones import Swin, T2TViT, ViT
from modules.mae import Autoencoder
from modules.networks import AroundBackbone
from modules.sharding import spread
from tests import small
from tests.runs import EXPERIMENTS

NO_STATE = ("sgd", "rmsprop")  # or less of it, without momentum
RECIPE = ["--config", str(EXPERIMENTS / "dino" / "vit_s16.yaml")]


def test_the_published_batch_rate_and_steps(capsys: pytest.CaptureFixture[str]) -> None:
    assert plan([*RECIPE, "--images", "1281167", "--devices", "8,16,20100"]) == 0
    out = capsys.readouterr().out
    rows = {line.split("│")[1].strip(): line for line in out.splitlines() if line.startswith("│")}
    # Caron et al. 2021: 1,024 images a step at 0.0005 * 1024 / 256, 100 epochs of 1,251.
    row = [cell.strip() for cell in rows["16"].split("│")[1:-1]]
    assert row[:6] == ["16", "1,024", "0.002", "1,251", "125,100", "100"]
    assert "512" in rows["8"]
    assert "more than the 1,281,167 images" in " ".join(out.replace("│", " ").split())


def test_no_number_is_cut_where_lines_are_short(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    recipe = ["--config", str(EXPERIMENTS / "mae" / "vit_b16.yaml")]
    assert plan([*recipe, "--images=1281167", "--devices=1,1024"]) == 0
    assert {"20,018", "32,028,800", "65,536"} <= set(capsys.readouterr().out.split())


def test_a_recipe_may_take_its_backbone_from_weights(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = ["--config", str(EXPERIMENTS / "finetune" / "small.yaml"), "--images=1000"]
    with pytest.raises(ValueError, match="no backbone of its own: add --weights CHECKPOINT"):
        plan(recipe)
    path, vit = tmp_path / "mae.safetensors", ViT("Ti", 16, 224)
    save_file(vit.state_dict(), path)
    assert plan([*recipe, "--weights", str(path), "--devices=1"]) == 0
    weights = sum(p.nbytes for p in vit.parameters())
    assert f"{2 * weights / GIB:.2f} GiB of weights" in " ".join(capsys.readouterr().out.split())


ONE_SIZE = [
    path.relative_to(EXPERIMENTS).with_suffix("").as_posix()
    for name in ("supervised", "lvvit", "mae", "dino", "moco")
    for path in sorted((EXPERIMENTS / name).glob("*.yaml"))
    if not path.stem.startswith(("relabel_", "smoke"))
]


@pytest.mark.parametrize("name", ONE_SIZE)
def test_every_recipe_can_be_planned(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    recipe = ["--config", str(EXPERIMENTS / f"{name}.yaml"), "--images=1281167"]
    assert plan([*recipe, "--devices=8"]) == 0
    said = " ".join(capsys.readouterr().out.split())
    found = re.search(r"(\d+\.\d) MiB an image that backbone and decoder keep", said)
    assert found is not None
    assert float(found[1]) > 0


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


@pytest.mark.parametrize(
    ("given", "precision"),
    [
        ([], "bf16-mixed"),
        (["--trainer.accelerator=cpu"], "32-true"),
        (["--trainer.precision=16-mixed"], "16-mixed"),
    ],
)
def test_the_precision_is_that_of_the_run(
    given: list[str], precision: str, capsys: pytest.CaptureFixture[str]
) -> None:
    fit = ["--config", str(EXPERIMENTS / "quickstart" / "supervised.yaml")]
    assert plan([*fit, *given, "--images=1000", "--devices=1,2"]) == 0
    out = " ".join(capsys.readouterr().out.split())
    assert f"Memory in {precision}: " in out
    assert ("copies in 16 bits" in out) == (precision != "32-true")
    assert "of buckets in which 2 or more devices average them" in out


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


@pytest.mark.parametrize(("limit", "steps"), [("7", 7), ("0.25", 31), ("1.0", 125), ("500", 125)])
def test_an_epoch_may_be_shorter(limit: str, steps: int) -> None:
    with torch.device("meta"):
        recipe = read([*RECIPE, f"--trainer.limit_train_batches={limit}"])
    recipe.data.batch_size = 8
    made = table(recipe, 1000, [1], [Memory(0, 0, 0, 0, 0)], 0.0)
    cells = [next(iter(column.cells)) for column in made.columns]
    assert cells[3:6] == [str(steps), f"{100 * steps:,}", "100"]


@pytest.mark.parametrize("accumulate", [1, 3])
def test_steps_and_rate_are_those_of_the_run(tmp_path: Path, accumulate: int) -> None:
    class Enough(Exception):
        """What there was to see has been seen."""

    class Stop(Callback):
        def on_train_batch_start(self, *_: object) -> None:
            raise Enough

    how = optim.Optimization(base_lr=0.1, reference_batch=64, warmup_epochs=0.5)
    module, data = small.method(optimizer=how), small.data()
    arguments = {"accumulate_grad_batches": accumulate, "limit_train_batches": 1.0}
    with pytest.raises(Enough):
        small.trainer(tmp_path, Stop(), **arguments).fit(module, data)
    rate = module.lr
    images = len(data.train_source)
    recipe = read([*RECIPE])._replace(accumulate=accumulate, max_epochs=3, max_steps=-1)
    steps = -(-(images // 8) // accumulate)
    assert length(recipe, steps) == (rate.total, "3")
    assert optim.peak(how, 8 * accumulate) == rate.peak


def test_shards_are_those_of_the_sampler(capsys: pytest.CaptureFixture[str]) -> None:
    given = ["--images", "1000", "--data.init_args.batch_size", "4", "--shards", "3", "--epoch"]
    assert plan([*RECIPE, *given, "2"]) == 0
    out = " ".join(capsys.readouterr().out.split())
    for rank in range(3):
        batches = TrainBatches(1000, 4, 0, rank, 3)
        first = ", ".join(str(sample.item) for sample in next(batches.batches(2, 0)))
        assert f"│ {rank} │ 332 │ {first}" in out


def test_shards_end_where_the_epoch_of_a_run_ends(capsys: pytest.CaptureFixture[str]) -> None:
    given = ["--images=1000", "--data.init_args.batch_size=4", "--shards=2"]
    for limit, images in (("3", 12), ("0.5", 248), ("null", 500)):
        assert plan([*RECIPE, *given, f"--trainer.limit_train_batches={limit}"]) == 0
        assert f"│ 1 │ {images} │" in " ".join(capsys.readouterr().out.replace("  ", " ").split())


def test_the_config_of_a_run_is_a_recipe(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PL_GLOBAL_SEED", "0")  # which the command sets
    recipe = EXPERIMENTS / "quickstart" / "supervised.yaml"
    monkeypatch.setattr("sys.argv", ["patchlight", "fit", "--config", str(recipe)])
    monkeypatch.setattr(PatchlightCLI, "instantiate_classes", lambda cli: None)
    monkeypatch.setattr(PatchlightCLI, "_run_subcommand", lambda *_: None)
    cli = PatchlightCLI()
    config = cli._parser("fit").dump(cli.config["fit"], skip_unset=False)
    assert "ckpt_path: null" in config
    (tmp_path / "config.yaml").write_text(config)
    printed = []
    for path in (recipe, "config.yaml"):
        assert plan(["--config", str(path), "--devices", "1,2"]) == 0
        printed.append(capsys.readouterr().out)
    assert printed[0] == printed[1]


def test_the_seed_may_be_left_to_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PL_GLOBAL_SEED", "5")
    given = [f"--seed_everything={seed}" for seed in ("true", "false", "3")]
    with torch.device("meta"):
        seeds = [read([*RECIPE, seed]).seed for seed in given]
    assert seeds == [5, 5, 3]


def test_shards_of_a_source_that_lies_in_files(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = open_source("digits", "val")
    convert({"train": source, "val": source}, tmp_path / "out", 50_000, 1, {}, "")
    data = ["--data.init_args.source=shards", f"--data.init_args.root={tmp_path / 'out'}"]
    data += ["--data.init_args.source_args={}", "--data.init_args.batch_size=4"]
    assert plan([*RECIPE, *data, "--trainer.num_nodes=2", "--shards", "2"]) == 0
    out = " ".join(capsys.readouterr().out.split())
    opened = Shards("train", str(tmp_path / "out"), 3)
    for lane in range(2):
        first = ", ".join(map(str, grouped_order(opened.groups, 0, 0, lane, 2)[:4]))
        assert f"│ {lane} │ 180 │ {first}" in out


@settings(max_examples=40, deadline=None)
@given(
    world=st.sampled_from([1, 2, 3, 7, 8, 64, 255, 1024]),
    batch=st.integers(1, 5),
    more=st.integers(0, 6000),
    epoch=st.integers(0, 3),
)
def test_shards_are_disjoint_and_leave_nothing_out(
    world: int, batch: int, more: int, epoch: int
) -> None:
    images = world * batch + more
    taken = [
        sample.item
        for rank in range(world)
        for group in TrainBatches(images, batch, 5, rank, world).batches(epoch, 0)
        for sample in group
    ]
    assert len(taken) == len(set(taken)) == images // (world * batch) * world * batch
    judged = [
        sample.item
        for rank in range(world)
        for group in EvalBatches(images, batch, rank, world)
        for sample in group
        if sample.is_valid
    ]
    assert sorted(judged) == list(range(images))


def test_packs_and_nonsense_are_refused() -> None:
    packed = ["--config", str(EXPERIMENTS / "quickstart" / "navit.yaml")]
    with pytest.raises(ValueError, match="PackedDataModule has none; how many images fill a"):
        plan([*packed, "--images", "100"])
    texts = ["--config", str(EXPERIMENTS / "sequence" / "transformer" / "base.yaml")]
    with pytest.raises(ValueError, match="TextDataModule has none; name a recipe that"):
        plan([*texts, "--images", "100"])
    with pytest.raises(ValueError, match="'many' is no number of devices"):
        plan([*RECIPE, "--devices", "1,many"])
    for count in ("0", "-5"):
        with pytest.raises(ValueError, match=f"--images {count}; expected at least 1"):
            plan([*RECIPE, f"--images={count}"])
    with pytest.raises(ValueError, match="--epoch -1; expected at least 0"):
        plan([*RECIPE, "--images=1000", "--shards=1", "--epoch=-1"])
    with pytest.raises(ValueError, match="limit_train_batches is 0, so there is nothing to plan"):
        plan([*RECIPE, "--images=1000", "--trainer.limit_train_batches=0"])
    sharded = ["--images=1000", "--trainer.strategy=sharded"]
    with pytest.raises(ValueError, match=r"optimizer\.name is lamb, which asks for norms"):
        plan([*RECIPE, *sharded, "--model.init_args.optimizer.name=lamb"])
    with pytest.raises(ValueError, match=r"callbacks\.Pictures looks into blocks"):
        plan([*RECIPE, *sharded, "--trainer.callbacks+=callbacks.Pictures"])
    with pytest.raises(ValueError, match=r"data/imagenet.* or say with --images N how many"):
        plan(RECIPE)
