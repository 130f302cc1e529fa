"""`fit --weights C`: whose backbone, whose options, what is loaded, what is refused."""

import argparse
import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from experiments.start import take, take_weights
from modules import Supervised
from modules.backbones import NaViT, Positions, ViT
from tests.experiments.test_recipes import fit
from tests.runs import EXPERIMENTS, TINY, only_run

SMALL = EXPERIMENTS / "finetune" / "small.yaml"
SIZE = {"patch_size": 8, "image_size": 32}
# The data of the smoke overlay, without its say on the backbone and the weights.
QUICK = [
    *("--data.init_args.source=shapes", "--data.init_args.root=null"),
    "--data.init_args.source_args={num_train: 16, num_val: 6}",
    *("--data.init_args.batch_size=4", "--data.init_args.num_workers=0"),
    *("--trainer.accelerator=cpu", "--trainer.devices=1", "--trainer.max_epochs=null"),
    "--data.init_args.rand_augment=null",  # which gray images cannot have
    *("--trainer.max_steps=1", "--trainer.enable_progress_bar=false"),
]


def started(
    monkeypatch: pytest.MonkeyPatch, directory: Path, *arguments: str
) -> tuple[Supervised, dict[str, Any]]:
    """The method as it is at the end of a run of a step at rate 0, and the run's config."""
    directory.mkdir(exist_ok=True)
    monkeypatch.chdir(directory)
    still = ["--model.init_args.optimizer.base_lr=0", "--model.init_args.optimizer.min_lr=0"]
    method = fit(monkeypatch, *arguments, *QUICK, *still).model
    assert isinstance(method, Supervised)
    return method, yaml.safe_load((only_run(directory) / "config.yaml").read_text())


@pytest.fixture(scope="module")
def own(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of ours: gray digits of ten classes, mean and std of its own, an average."""
    directory = tmp_path_factory.mktemp("own")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(directory)
        statistics = ["--data.init_args.mean=[0.25]", "--data.init_args.std=[0.75]"]
        fit(patch, *TINY, *statistics, "--trainer.max_epochs=1", "--data.init_args.channels=1")
    return only_run(directory) / "checkpoints" / "last.ckpt"


def same(backbone: ViT, state: dict[str, torch.Tensor], prefix: str = "") -> None:
    for name, tensor in backbone.state_dict().items():
        assert torch.equal(tensor, state[prefix + name]), name


def test_from_a_run_of_ours_with_other_classes(
    own: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = ["--config", str(SMALL), "--weights", str(own), "--model.init_args.num_classes=13"]
    method, config = started(monkeypatch, tmp_path / "a", *given)
    backbone = method.classifier.backbone
    state = torch.load(own, weights_only=True)["state_dict"]
    same(backbone, state, "classifier.backbone.")
    assert method.classifier.head.weight.shape == (13, 64)
    assert method.classifier.head.weight.abs().max() < 1e-3  # it begins anew
    told = config["model"]["init_args"]
    assert told["weights"] == str(own)
    assert told["weights_part"] == "classifier"
    assert told["backbone"]["init_args"]["dropout"] == 0.2  # the checkpoint's
    assert told["backbone"]["init_args"]["drop_path"] == 0.1  # the recipe's
    assert backbone.in_channels == 1
    data = config["data"]["init_args"]
    assert (data["channels"], data["mean"], data["std"]) == (1, [0.25], [0.75])
    run = only_run(tmp_path / "a")
    assert run.parts[-3:-1] == ("finetune", "small")  # named after the recipe alone

    averaged, _ = started(monkeypatch, tmp_path / "b", *given, "--network=averaged")
    same(averaged.classifier.backbone, state, "averaged.backbone.")

    own.rename(own.with_suffix(".away"))  # what a run goes on from is its own
    try:
        monkeypatch.chdir(tmp_path / "a")
        again = fit(monkeypatch, "--resume", str(run), "--trainer.max_steps=2")
        assert again.trainer.global_step == 2
    finally:
        own.with_suffix(".away").rename(own)


@pytest.mark.parametrize(
    ("name", "smaller"),
    [("DINO", {"num_prototypes": 16, "bottleneck_dim": 8}), ("MoCo", {"projection_dim": 8})],
)
def test_training_without_labels_goes_on_from_weights(
    own: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, smaller: dict[str, int]
) -> None:
    """Student and teacher begin as the backbone, and it is not needed to go on."""
    views = {"num_local": 0 if name == "MoCo" else 1, "local_size": 8}
    recipe = {
        "model": {"class_path": f"modules.{name}", "init_args": {"hidden_dim": 16} | smaller},
        "data": {"class_path": "datamodules.MultiCropDataModule", "init_args": views},
    }
    (tmp_path / "on.yaml").write_text(json.dumps(recipe))
    given = ["--config", str(tmp_path / "on.yaml"), "--weights", str(own), "--network=averaged"]
    quick = [option for option in QUICK if "rand_augment" not in option]
    still = ["--model.init_args.optimizer.base_lr=0", "--model.init_args.optimizer.min_lr=0"]
    still += ["--trainer.limit_val_batches=0", "--checkpoint.monitor=null"]
    monkeypatch.chdir(tmp_path)
    method = fit(monkeypatch, *given, *quick, *still).model
    state = torch.load(own, weights_only=True)["state_dict"]
    for network in method.networks().values():
        same(network.backbone, state, "averaged.backbone.")
    run = only_run(tmp_path)
    config = yaml.safe_load((run / "config.yaml").read_text())
    assert config["model"]["init_args"]["weights_part"] == "averaged"
    assert config["data"]["init_args"]["mean"] == [0.25]
    own.rename(own.with_suffix(".away"))
    try:
        again = fit(monkeypatch, "--resume", str(run), "--trainer.max_steps=2")
        assert again.trainer.global_step == 2
    finally:
        own.with_suffix(".away").rename(own)


def test_the_recipes_options_and_the_command_lines_win(
    own: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    start = "--model.init_args.backbone.init_args"
    (tmp_path / "more.yaml").write_text(
        "model: {init_args: {backbone: {init_args: {image_size: 24, dropout: 0.5}}}}\n"
        "data: {init_args: {mean: [0.5]}}\n"
    )
    given = ["--config", str(SMALL), "--config", str(tmp_path / "more.yaml")]
    given += [f"--weights={own}", f"{start}.dropout=0.0", f"{start}.num_registers=2"]
    with (
        pytest.warns(UserWarning, match=r"mean is \[0.5\], but the weights were trained with"),
        pytest.raises(ValueError, match="the file lacks reg_token"),  # strict all the same
    ):
        started(monkeypatch, tmp_path / "strict", *given)
    method, config = started(monkeypatch, tmp_path / "run", *given[:-1])
    backbone = method.classifier.backbone
    assert (backbone.image_size, backbone.grid) == ((24, 24), (6, 6))
    assert backbone.positions.table.shape[1] == 36  # resampled
    assert config["model"]["init_args"]["backbone"]["init_args"]["dropout"] == 0.0
    assert config["data"]["init_args"]["mean"] == [0.5]
    assert config["data"]["init_args"]["std"] == [0.75]


def test_from_a_teacher_in_a_file_of_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    student, teacher = (ViT("mu", **SIZE).state_dict() for _ in range(2))
    head = {"module.head.mlp.0.weight": torch.zeros(2, 2)}
    payload = {
        "student": {f"module.backbone.{n}": t for n, t in student.items()} | head,
        "teacher": {f"backbone.{n}": t for n, t in teacher.items()} | head,
        "args": argparse.Namespace(lr=1),
    }
    torch.save(payload, tmp_path / "dino.pth")
    given = ["--config", str(SMALL), "--weights", str(tmp_path / "dino.pth")]
    method, config = started(monkeypatch, tmp_path / "run", *given)
    same(method.classifier.backbone, teacher)
    assert config["model"]["init_args"]["weights_part"] == "teacher"
    method, _ = started(monkeypatch, tmp_path / "s", *given, "--network", "student")
    same(method.classifier.backbone, student)
    with pytest.raises(ValueError, match="no network 'ema'; it has student, teacher"):
        take_weights(["fit", *given, "--network=ema"])


def test_from_a_masked_autoencoder_to_an_average(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """MAE's fine-tuning: the decoder and the norm of all tokens stay behind."""
    vit = ViT("mu", **SIZE, positions=Positions("sincos2d"))
    state = {**vit.state_dict(), "pos_embed": vit.positions((4, 4)), "mask_token": torch.ones(1)}
    decoder = {"decoder_blocks.0.mlp.fc1.bias": torch.ones(3), "decoder_pred.bias": torch.ones(3)}
    torch.save({"model": state | decoder}, tmp_path / "mae.pth")
    recipe = EXPERIMENTS / "finetune" / "mae_b16.yaml"
    start = "--model.init_args.backbone.init_args"
    toy = [f"{start}.variant=mu", f"{start}.patch_size=8", f"{start}.image_size=32"]
    given = ["--config", str(recipe), "--weights", str(tmp_path / "mae.pth"), *toy]
    method, config = started(monkeypatch, tmp_path / "run", *given)
    backbone = method.classifier.backbone
    assert config["model"]["init_args"]["weights"].endswith("mae.pth")  # not the recipe's own
    assert torch.equal(backbone.blocks[1].mlp.fc1.weight, vit.blocks[1].mlp.fc1.weight)
    assert torch.equal(backbone.fc_norm.weight, torch.ones(32))
    del state["blocks.0.attn.qkv.bias"]
    torch.save({"model": state}, tmp_path / "mae.pth")
    with pytest.raises(ValueError, match=r"holds no ViT that names and shapes tell"):
        take_weights(["fit", *given])


def test_a_missing_tensor_of_ours_is_an_error(
    own: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded = torch.load(own, weights_only=True)
    del loaded["state_dict"]["classifier.backbone.blocks.1.mlp.fc1.bias"]
    torch.save(loaded, tmp_path / "moved.ckpt")  # and it tells its backbone without its run
    with pytest.raises(ValueError, match=r"the file lacks blocks\.1\.mlp\.fc1\.bias"):
        started(
            monkeypatch,
            tmp_path / "run",
            *("--config", str(SMALL), "--weights", str(tmp_path / "moved.ckpt")),
            "--data.init_args.mean=[0.5]",
            "--data.init_args.std=[0.5]",
        )


def test_navit_keeps_its_class(own: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    (run / "checkpoints").mkdir(parents=True)
    backbone = {"class_path": "modules.backbones.NaViT", "init_args": {"variant": "mu"}}
    (run / "config.yaml").write_text(json.dumps({"model": {"init_args": {"backbone": backbone}}}))
    torch.save(NaViT("mu").state_dict(), run / "checkpoints" / "last.ckpt")
    weights = str(run / "checkpoints" / "last.ckpt")
    _, *found = take_weights(["fit", "--config", str(SMALL), "--weights", weights, "--x=1"])
    assert found[0] == "--model.class_path=modules.Supervised"
    assert json.loads(found[1].partition("=")[2]) == backbone
    assert found[-4:] == [
        f"--config={SMALL}",
        f"--model.init_args.weights={weights}",
        "--model.init_args.weights_part=null",
        "--x=1",
    ]


def test_what_a_file_does_not_tell_has_to_be_said(tmp_path: Path) -> None:
    torch.save(ViT("mu", **SIZE, embed_dim=48, num_heads=3).state_dict(), tmp_path / "odd.pth")
    given = ["fit", "--config", str(SMALL), "--weights", str(tmp_path / "odd.pth")]
    option = "--model.init_args.backbone.init_args.num_heads"
    with pytest.raises(ValueError, match=rf"does not tell num_heads .*; add {option} N"):
        take_weights(given)
    assert "?" not in take_weights([*given, f"{option}=3"])[2]


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--config", str(SMALL)], "has no backbone of its own: add --weights CHECKPOINT"),
        (["--config", str(SMALL), "--weights", "nowhere.pth"], "nowhere.pth: no such file"),
        (["--config", str(SMALL), "--weights"], "--weights needs a value"),
        (["--weights", "a.pth"], "needs --config RECIPE, which names the method"),
        (["--config", str(SMALL), "--network", "teacher"], "--network teacher is about --weights"),
    ],
)
def test_refused(arguments: list[str], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        take_weights(["fit", *arguments])


def test_other_commands_are_left_alone() -> None:
    for given in (
        ["--resume", "runs/x"],
        ["--help"],
        ["--config", str(EXPERIMENTS / "quickstart" / "supervised.yaml"), "--a.b", "c"],
        ["--config", str(EXPERIMENTS / "smoke.yaml")],
    ):
        assert take_weights(["fit", *given]) == ["fit", *given]
    assert take(["--a", "--b", "x", "--b=y", "z"], "--b") == (["--a", "z"], ["x", "y"])


def test_a_method_that_takes_none() -> None:
    recipe = str(EXPERIMENTS / "quickstart" / "mae.yaml")
    with pytest.raises(ValueError, match=r"modules\.MAE begins with first values and takes no"):
        take_weights(["fit", "--config", recipe, "--weights", "x.ckpt"])
