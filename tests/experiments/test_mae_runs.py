"""MAE by the command: killed and resumed, on two processes, looked at and fine-tuned."""

import signal
from pathlib import Path

import pytest
import yaml
from PIL import Image

from experiments.look import look
from modules import LinearProbe, Supervised
from tests.experiments.test_recipes import fit
from tests.experiments.test_resume import logged_losses, losses_on_one_and_two, same_end
from tests.runs import EXPERIMENTS, differences, last_checkpoint, only_run, patchlight

# Two epochs of four steps.
RUN = [
    *("--config", str(EXPERIMENTS / "quickstart" / "mae.yaml")),
    *("--config", str(EXPERIMENTS / "mae" / "smoke.yaml"), "--model.init_args.mask_shape=block"),
    "--model.init_args.backbone.init_args.class_token=true",
    "--model.init_args.backbone.init_args.pooling=cls",
    *("--trainer.max_epochs=2", "--trainer.max_steps=-1", "--trainer.check_val_every_n_epoch=1"),
    *("--trainer.num_sanity_val_steps=0", "--trainer.callbacks=null"),
    *("--trainer.enable_progress_bar=false", "--checkpoint.every_n_steps=1"),
]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("whole")
    drop = "--model.init_args.backbone.init_args.drop_path=0.3"
    done = patchlight("fit", *RUN, drop, cwd=directory)
    assert done.returncode == 0, done.stderr
    return only_run(directory)


@pytest.mark.slow
def test_a_killed_run_resumes_bit_by_bit(tmp_path: Path, whole: Path) -> None:
    drop = "--model.init_args.backbone.init_args.drop_path=0.3"
    workers = "--data.init_args.num_workers=1"
    killed = patchlight("fit", *RUN, drop, workers, cwd=tmp_path, kill_at=3)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    run = only_run(tmp_path)
    assert last_checkpoint(run)["global_step"] == 3
    done = patchlight("fit", "--resume", str(run), cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert same_end(run, whole) == []
    assert logged_losses(run) == logged_losses(whole)


@pytest.mark.slow
def test_two_processes_follow_one(tmp_path: Path) -> None:
    one, two = losses_on_one_and_two(tmp_path, *RUN)
    assert len(one) == 8
    assert len({round(loss, 3) for loss in one.values()}) > 4
    assert two == pytest.approx(one, abs=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("recipe", ["finetune/mae_b16.yaml", "probe/linear_mae_b16.yaml"])
def test_its_checkpoint_goes_into_the_published_recipes(
    recipe: str, tmp_path: Path, whole: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    size = [f"--model.init_args.backbone.init_args.{n}" for n in ("patch_size=4", "image_size=32")]
    still = ["--model.init_args.optimizer.base_lr=0", "--trainer.max_steps=1"]
    recipes = ["--config", str(EXPERIMENTS / recipe), "--config", str(EXPERIMENTS / "smoke.yaml")]
    checkpoint = whole / "checkpoints" / "last.ckpt"
    done = fit(monkeypatch, *recipes, *size, *still, "--weights", str(checkpoint))
    assert isinstance(done.model, (Supervised, LinearProbe))
    (network,) = done.model.networks().values()
    start = "autoencoder.backbone."
    saved = last_checkpoint(whole)["state_dict"]
    learned = {n.removeprefix(start): t for n, t in saved.items() if n.startswith(start)}
    own = dict(network.backbone.state_dict())
    other = {name.split("/")[1].split(":")[0] for name in differences(learned, own)}
    norms = {"norm.weight", "norm.bias", "fc_norm.weight", "fc_norm.bias"}
    assert other == (norms if recipe.startswith("finetune") else set())


@pytest.mark.slow
def test_look_draws_reconstructions_of_its_checkpoint(
    tmp_path: Path, whole: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATCHLIGHT_CACHE", str(tmp_path / "cache"))
    photos = tmp_path / "photos"
    photos.mkdir()
    Image.effect_noise((40, 30), 90).convert("RGB").save(photos / "noise.png")
    checkpoint = whole / "checkpoints" / "last.ckpt"
    assert look(["-c", str(checkpoint), "--images", str(photos), "--out", str(tmp_path / "a")]) == 0
    # Apart from its run the checkpoint itself says what it is; a recipe may say otherwise.
    moved = tmp_path / "moved.ckpt"
    moved.write_bytes(checkpoint.read_bytes())
    assert look(["-c", str(moved), "--images", str(photos), "--out", str(tmp_path / "b")]) == 0
    config = yaml.safe_load((whole / "config.yaml").read_text())
    config["model"]["init_args"]["mask_ratio"] = 0.25
    (tmp_path / "other.yaml").write_text(yaml.safe_dump(config))
    options = ["--config", str(tmp_path / "other.yaml"), "--out", str(tmp_path / "c")]
    assert look(["-c", str(checkpoint), "--images", str(photos), *options]) == 0
    pictures = [(tmp_path / out / "reconstruction.png").read_bytes() for out in "abc"]
    assert pictures[0] != pictures[2]
    assert "attention.png" in capsys.readouterr().out
    # The images' mean and std are those of the run, which is not there for the moved one.
    assert len(pictures[1]) > 1000
