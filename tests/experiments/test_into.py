"""`--into RUN`: begins a run, goes on with it, and with no other."""

from pathlib import Path
from typing import Any

import pytest

from callbacks.checkpoint_files import read_checkpoint
from experiments.resume import begin
from modules import Supervised
from tests.experiments.test_recipes import fit
from tests.runs import EXPERIMENTS, TINY

SHORT = [
    *(option for option in TINY if "max_epochs" not in option),
    *("--trainer.limit_val_batches=0", "--checkpoint.monitor=null"),
    *("--trainer.devices=1", "--trainer.accelerator=cpu"),
]
ONE, TWO = (f"--trainer.max_epochs={count}" for count in (1, 2))
FINETUNE = ["--config", str(EXPERIMENTS / "finetune" / "small.yaml")]


@pytest.fixture(scope="module")
def begun(tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("runs") / "run"
    with pytest.MonkeyPatch.context() as patch:
        assert fit(patch, *SHORT, ONE, "--into", str(run)).trainer.global_step == 5
    return run


def test_the_same_command_goes_on_and_what_is_typed_wins(
    begun: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    last = begun / "checkpoints" / "last.ckpt"
    longer = fit(monkeypatch, *SHORT, TWO, f"--into={begun}").trainer
    assert (longer.ckpt_path, longer.global_step) == (str(last), 10)
    assert read_checkpoint(last)["global_step"] == 10
    result = (begun / "result.json").read_text()
    again = fit(monkeypatch, *SHORT, ONE, f"--into={begun}").trainer
    assert again.global_step == 10
    assert "train/loss" in result
    assert (begun / "result.json").read_text() == result


@pytest.mark.parametrize("has_checkpoint", [True, False])
def test_a_run_of_another_recipe_is_refused(
    begun: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, has_checkpoint: bool
) -> None:
    config, run = (begun / "config.yaml").read_text(), begun
    if not has_checkpoint:
        run = tmp_path / "run"
        run.mkdir()
        (run / "config.yaml").write_text(config)
    others = [option for option in SHORT if "mixup" not in option]
    says = r"the run there is of another recipe: its data\.init_args\.mixup is 0\.8, here it is 0"
    with pytest.raises(ValueError, match=rf"--into {run}: {says}.*fit --resume {run}` goes on"):
        fit(monkeypatch, *others, ONE, f"--into={run}")
    mae = ("--config", str(EXPERIMENTS / "quickstart" / "mae.yaml"))
    with pytest.raises(ValueError, match=r"its model\.class_path is modules\.Supervised, here it"):
        fit(monkeypatch, *mae, *SHORT[-2:], f"--into={run}")
    assert (run / "config.yaml").read_text() == config


def test_without_its_last_checkpoint_a_run_goes_on_from_the_one_before(
    begun: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    last, before = (begun / "checkpoints" / name for name in ("last.ckpt", "before.ckpt"))
    kept = before.read_bytes()
    last.replace(before)
    for given in (["--resume", str(begun)], [*SHORT, f"--into={begun}"]):
        start = begin(["fit", *given])
        assert start.arguments[-2:] == ["--ckpt_path", str(before)]
        assert start.is_resumed
        assert "no last.ckpt: it was killed while saving; before.ckpt" in capsys.readouterr().out
    before.replace(last)
    before.write_bytes(kept)


def test_what_a_run_began_with_is_not_loaded_again(
    begun: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """`--weights` names a backbone, which a recipe changed as the run began."""
    weights = ["--weights", str(begun / "checkpoints" / "last.ckpt")]
    given = [*FINETUNE, *weights, *SHORT[SHORT.index("--config") + 4 :]]
    given = [option for option in given if "drop_path" not in option]
    start = begin(["fit", *given, "--into", str(tmp_path / "new")])
    assert (start.is_resumed, start.asked) == (False, None)
    assert any(option.startswith("--model.init_args.weights=") for option in start.arguments)
    again = begin(["fit", *given, "--into", str(begun)])
    assert not any("weights" in option or "backbone={" in option for option in again.arguments)
    assert any(option.startswith("--model.init_args.weights=") for option in again.asked or [])
    with pytest.raises(ValueError, match="the run there is of another recipe: its model"):
        fit(monkeypatch, *given, "--into", str(begun))


def test_a_run_that_was_interrupted_before_its_first_step_begins_again(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def interrupt(*_: Any) -> None:
        raise KeyboardInterrupt

    run = tmp_path / "run"
    evaluated = [option for option in SHORT if "limit_val_batches" not in option]
    given = [*evaluated, ONE, "--trainer.num_sanity_val_steps=1", f"--into={run}"]
    with monkeypatch.context() as patch:
        patch.setattr(Supervised, "validation_step", interrupt)
        with pytest.raises(SystemExit):  # as Lightning leaves
            fit(patch, *given)
    assert list(run.iterdir())
    assert not (run / "config.yaml").exists()
    assert fit(monkeypatch, *given).trainer.global_step == 5


def test_a_place_that_holds_something_else_is_refused(tmp_path: Path) -> None:
    given = ["fit", *SHORT, "--into"]
    for name in ("absent", "empty", "killed while it began"):
        run = tmp_path / name
        if name != "absent":
            run.mkdir()
        if name == "killed while it began":
            (run / "events.out.tfevents.1.host.2.0").touch()
        start = begin([*given, str(run)])
        assert (start.run, start.is_resumed, start.asked) == (run, False, None)
    photos = tmp_path / "photos"
    photos.mkdir()
    (photos / "cat.png").touch()
    with pytest.raises(ValueError, match=r"photos: the directory holds cat\.png and no config\.ya"):
        begin([*given, str(photos)])
    with pytest.raises(ValueError, match=r"cat\.png: that is a file; name a directory"):
        begin([*given, str(photos / "cat.png")])
    with pytest.raises(ValueError, match=r"--resume .*: no config\.yaml there"):
        begin(["fit", "--resume", str(photos)])
    with pytest.raises(ValueError, match="give one of them"):
        begin([*given, str(photos), "--resume", str(photos)])
