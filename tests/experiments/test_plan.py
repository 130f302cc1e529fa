"""What `plan` says is what a run does."""

import re
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from lightning.pytorch import Callback
from safetensors.torch import save_file

from datamodules.convert import convert
from datamodules.sampling import EvalBatches, TrainBatches, grouped_order
from datamodules.shards import Shards
from datamodules.sources import open_source
from experiments.cli import PatchlightCLI
from experiments.memory import Memory
from experiments.plan import GIB, length, plan, read, table
from modules import optim
from modules.backbones import ViT
from tests import small
from tests.runs import EXPERIMENTS

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
