"""The probe's features, heads and clock, against published values and against separate runs."""

import itertools
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback
from safetensors import safe_open
from torch import nn

from datamodules.packed import PackedDataModule
from modules import LinearProbe
from modules.backbones import NaViT, Positions, ViT
from modules.optim import Optimization
from modules.probe import Heads
from modules.weights import load_backbone
from tests import packs, small
from tests.experiments.test_recipes import fit
from tests.runs import EXPERIMENTS, differences, last_checkpoint, only_run, patchlight

GOLDEN = Path(__file__).parent.parent / "golden" / "dino_vit.safetensors"
SIZE = {"patch_size": 8, "image_size": 16, "in_channels": 1}
SGD = Optimization(
    "sgd", base_lr=0.1, reference_batch=None, weight_decay=0.0, warmup_epochs=0.5, min_lr=0.0
)
LARS = Optimization(
    "lars", base_lr=8.0, reference_batch=None, weight_decay=1e-4, warmup_epochs=0.5, min_lr=0.0
)


def probe(**changes: Any) -> LinearProbe:
    small.seed_everything(7, verbose=False)
    backbone = changes.pop("backbone", None) or ViT("mu", **SIZE, dropout=0.3)  # never active
    return LinearProbe(**{"backbone": backbone, "num_classes": 10, "optimizer": SGD} | changes)


def heads(backbone: Any, **changes: Any) -> Heads:
    given = {"num_heads": 1, "num_blocks": 1, "mean_patches": False, "batch_norm": False}
    return Heads(backbone, 10, **given | changes)


@pytest.fixture
def golden(tmp_path: Path) -> dict[str, torch.Tensor]:
    """DINO's reference tensors; its checkpoint is at tmp_path / dino.pth, as DINO writes it."""
    with safe_open(GOLDEN, "pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    start = "weights."
    state = {n.removeprefix(start): t for n, t in tensors.items() if n.startswith(start)}
    teacher = {f"backbone.{name}": tensor for name, tensor in state.items()}
    teacher["head.mlp.0.weight"] = torch.zeros(2, 2)
    student = {f"module.{name}": tensor + 1 for name, tensor in teacher.items()}
    torch.save({"student": student, "teacher": teacher, "epoch": 1}, tmp_path / "dino.pth")
    return tensors


def dino_vit() -> ViT:
    how = {"positions": Positions(resample="dino"), "embed_dim": 48, "depth": 3, "num_heads": 3}
    return ViT("mu", 8, 64, **how)


def test_features_are_dinos_in_their_order(golden: Any, tmp_path: Path) -> None:
    network = heads(dino_vit(), num_blocks=2, mean_patches=True)
    load_backbone(network.backbone, tmp_path / "dino.pth", part="teacher")
    features = network.train().features(golden["in.native"])
    close = {"atol": 1e-5, "rtol": 1e-5}
    torch.testing.assert_close(features[:, :96], golden["last2.native"], **close)
    torch.testing.assert_close(features[:, 96:], golden["tokens.native"][:, 1:].mean(1), **close)
    assert not features.requires_grad


@pytest.mark.parametrize(
    "backbone",
    [
        ViT("mu", **SIZE),
        ViT("mu", **SIZE, num_registers=3),
        ViT("mu", **SIZE, class_token=False, pooling="avg"),
        ViT("mu", **SIZE, class_token=False, pooling="map", num_registers=1),
        NaViT("mu", patch_size=8, in_channels=1),
    ],
    ids=["class token", "registers", "averaged", "attention", "navit"],
)
def test_every_backbone_is_probed_alike_and_in_packs(backbone: Any) -> None:
    network = heads(backbone, num_blocks=2, mean_patches=True, batch_norm=True).eval()
    images = packs.images([(16, 16)] * 3, channels=1)
    logits = network(torch.stack(images))
    assert logits.shape == (1, 3, 10)
    last = backbone(torch.stack(images)).pooled
    torch.testing.assert_close(network.features(torch.stack(images))[:, 32:64], last)
    packed = packs.pack([images[:2], images[2:]], 8, 16, 2, backbone.num_prefix_tokens)
    torch.testing.assert_close(network(packed)[:, :3], logits, atol=1e-5, rtol=1e-5)


def test_heads_begin_small_and_alike() -> None:
    network = heads(ViT("mu", **SIZE, embed_dim=512, num_heads=2), num_heads=3)
    first, *others = network.heads
    assert isinstance(first, nn.Linear)
    assert first.weight.std().item() == pytest.approx(0.01, rel=0.05)
    assert not first.bias.any()
    assert all(torch.equal(first.weight, head.weight) for head in others)
    assert len({head.weight.data_ptr() for head in network.heads}) == 3


@pytest.mark.parametrize("clip", [None, 0.2])
@pytest.mark.parametrize("how", [SGD, LARS], ids=["sgd", "lars"])
def test_a_sweep_equals_separate_runs(
    how: Optimization, clip: float | None, tmp_path: Path
) -> None:
    def end(sweep: list[float], rate: float) -> list[torch.Tensor]:
        optimizer = Optimization(**{**vars(how), "clip_norm": clip, "base_lr": rate})
        module = probe(sweep=sweep, optimizer=optimizer, batch_norm=True, num_blocks=2)
        run = small.trainer(tmp_path, max_steps=3, limit_val_batches=0)
        run.fit(module, small.data())
        return [head.weight for head in module.probe.heads]

    factors = [0.1, 1.0, 7.0]
    together = end(factors, how.base_lr)
    assert not any(torch.equal(a, b) for a, b in itertools.combinations(together, 2))
    for factor, one in zip(factors, together, strict=True):
        (alone,) = end([1.0], factor * how.base_lr)
        torch.testing.assert_close(alone, one, atol=1e-7, rtol=1e-5)


def test_the_backbone_stays_as_it_is(tmp_path: Path) -> None:
    class Watch(Callback):
        def on_train_batch_end(self, trainer: Any, module: Any, *_: Any) -> None:
            assert module.probe.training
            assert not any(part.training for part in module.probe.backbone.modules())

        def on_train_start(self, trainer: Any, module: Any) -> None:
            (optimizer,) = trainer.optimizers
            names = [name for group in optimizer.param_groups for name in group["param_names"]]
            assert names == ["heads.0.weight", "heads.0.bias"]

    module = probe(batch_norm=True)
    before = {name: t.clone() for name, t in module.probe.backbone.state_dict().items()}
    small.trainer(tmp_path, Watch(), max_epochs=1).fit(module, small.data())
    assert differences(before, dict(module.probe.backbone.state_dict())) == []
    assert all(parameter.grad is None for parameter in module.probe.backbone.parameters())


@pytest.mark.parametrize("weight", [1.0, 0.0])
def test_lars_reads_digits_off_the_weights_it_is_given(weight: float, tmp_path: Path) -> None:
    state = {"weight": torch.tensor([weight]), "bias": torch.zeros(1)}
    torch.save(state, tmp_path / "weights.pth")
    module = probe(
        backbone=small.Pixels(),
        weights=str(tmp_path / "weights.pth"),
        optimizer=LARS,
        batch_norm=True,
    )
    run = small.trainer(tmp_path, limit_train_batches=1.0, limit_val_batches=1.0, max_epochs=2)
    plain = {"mixup": 0.0, "erasing": 0.0, "flip": 0.0, "crop_scale": (0.8, 1.0)}
    run.fit(module, small.data(batch_size=64, **plain))
    accuracy = run.callback_metrics["val/accuracy"]
    assert accuracy > 0.5 if weight else accuracy < 0.2


def test_metrics_are_those_of_the_best_head(tmp_path: Path) -> None:
    module, data = probe(sweep=[1.0, 2.0, 0.5]), small.data(batch_size=64)
    for i, head in enumerate(module.probe.heads):
        nn.init.normal_(head.weight, std=0.1 * (i + 1))
    run = small.trainer(tmp_path, limit_val_batches=1.0)
    (logged,) = run.validate(module, data, verbose=False)
    module.eval()
    logits = torch.cat([module((b.images / 255.0 - 0.5) / 0.5) for b in data.val_dataloader()], 1)
    labels = torch.cat([b.labels for b in data.val_dataloader()])[:360]
    accuracies = (logits[:, :360].argmax(-1) == labels).float().mean(1).tolist()
    names = [f"val/accuracy_lr_{rate}" for rate in ("0.1", "0.2", "0.05")]
    assert [logged[name] for name in names] == pytest.approx(accuracies)
    best = max(range(3), key=accuracies.__getitem__)
    assert logged["val/accuracy"] == max(logged[name] for name in names)
    assert logged["val/best_lr"] == pytest.approx([0.1, 0.2, 0.05][best])
    loss = nn.functional.cross_entropy(logits[best, :360], labels).item()
    assert logged["val/loss"] == pytest.approx(loss, rel=1e-5)


def test_resume_is_exact_and_needs_no_weights(tmp_path: Path) -> None:
    file = tmp_path / "weights.pth"
    torch.save(ViT("mu", **SIZE).state_dict(), file)

    class Keep(Callback):
        def on_train_epoch_start(self, trainer: Any, module: Any) -> None:
            if trainer.current_epoch == 1:
                shutil.copy(Path(trainer.log_dir) / "checkpoints" / "last.ckpt", tmp_path / "kept")

    given = {"weights": str(file), "batch_norm": True, "sweep": [1.0, 3.0]}
    whole, resumed = probe(**given), probe(**given)
    small.trainer(tmp_path, Keep(), max_epochs=2).fit(whole, small.data())
    file.unlink()
    small.trainer(tmp_path, max_epochs=2).fit(
        resumed, small.data(), ckpt_path=str(tmp_path / "kept"), weights_only=True
    )
    assert differences(dict(whole.state_dict()), dict(resumed.state_dict())) == []


def test_first_values_are_probed_with_a_warning(tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match="first values are probed, a random network"):
        small.trainer(tmp_path, max_steps=1).fit(probe(), small.data())


def test_a_missing_tensor_is_an_error(tmp_path: Path) -> None:
    state = ViT("mu", **SIZE).state_dict()
    del state["blocks.1.norm2.bias"]
    torch.save(state, tmp_path / "part.pth")
    with pytest.raises(ValueError, match=r"the file lacks blocks\.1\.norm2\.bias"):
        small.trainer(tmp_path).fit(probe(weights=str(tmp_path / "part.pth")), small.data())


def test_packs_are_probed(tmp_path: Path) -> None:
    source = {"num_train": 60, "num_val": 10, "min_side": 24, "max_side": 48}
    data = PackedDataModule("shapes", source_args=source, num_rows=2, row_length=64, num_workers=0)
    backbone = NaViT("mu", patch_size=8)
    module = probe(backbone=backbone, batch_norm=True, mean_patches=True, num_blocks=2)
    run = small.trainer(tmp_path, max_epochs=1, limit_train_batches=3)
    run.fit(module, data)
    assert torch.isfinite(run.callback_metrics["train/loss"])
    assert run.callback_metrics["val/accuracy"] <= 1


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ({"num_classes": 0}, "num_classes is 0"),
        ({"num_blocks": 3}, "num_blocks is 3; expected 1 to 2"),
        ({"sweep": []}, r"sweep is \[\]; expected different factors above 0"),
        ({"sweep": [1.0, 1.0]}, "expected different factors"),
        ({"sweep": [-1.0]}, "expected different factors above 0"),
        ({"weights_part": "teacher"}, "are about weights, which is not set"),
        ({"optimizer": Optimization(layer_decay=0.5)}, "set it to null"),
    ],
)
def test_wrong_options(arguments: Any, says: str) -> None:
    with pytest.raises(ValueError, match=says):
        probe(**arguments)


@pytest.mark.slow
def test_two_processes_take_the_steps_of_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Batch norm included: its statistics are those of both."""
    recipe = EXPERIMENTS / "probe" / "linear_mae_b16.yaml"
    given = ["--config", str(recipe), "--config", str(EXPERIMENTS / "smoke.yaml")]
    given += ["--model.init_args.optimizer.warmup_epochs=0", "--trainer.enable_progress_bar=false"]
    given += ["--model.init_args.backbone.init_args.image_size=32", "--trainer.max_steps=3"]
    both = ["--trainer.devices=2", "--trainer.strategy=ddp", "--data.init_args.batch_size=2"]
    one, two = tmp_path / "one", tmp_path / "two"
    for directory in (one, two):
        directory.mkdir()
    monkeypatch.chdir(one)
    fit(monkeypatch, *given)
    done = patchlight("fit", *given, *both, cwd=two)
    assert done.returncode == 0, done.stderr
    expected, found = (last_checkpoint(only_run(end))["state_dict"] for end in (one, two))
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, atol=1e-5, rtol=1e-4, msg=name)
    assert expected["probe.heads.0.bias"].any()


def test_what_is_embedded_is_the_frozen_backbone_pooled() -> None:
    method, images = probe(), torch.randn(3, 1, 16, 16)
    expected = method.probe.backbone(images).pooled
    assert torch.equal(method.embed(images), expected)
    assert torch.equal(method.embed(images, "probe"), expected)
    with pytest.raises(ValueError, match="no network 'teacher'; there is probe"):
        method.embed(images, "teacher")
