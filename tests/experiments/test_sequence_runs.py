"""Methods that translate, by the command: killed and resumed, on two processes, translating."""

import signal
from pathlib import Path

import pytest
import torch

from experiments.translate import translate
from tests.experiments.test_resume import logged_losses, losses_on_one_and_two, same_end
from tests.runs import EXPERIMENTS, last_checkpoint, only_run, patchlight

# Two epochs of four steps, half of the decoder's inputs its own.
RUN = [
    *("--config", str(EXPERIMENTS / "quickstart" / "translate.yaml")),
    *("--config", str(EXPERIMENTS / "sequence" / "smoke.yaml")),
    *("--data.init_args.pad_to=null", "--data.init_args.source_args.max_digits=3"),
    *("--model.init_args.hidden_dim=8", "--model.init_args.teacher_forcing=0.5"),
    *("--trainer.max_epochs=2", "--trainer.max_steps=-1", "--trainer.check_val_every_n_epoch=1"),
    *("--trainer.num_sanity_val_steps=0", "--trainer.enable_progress_bar=false"),
    *("--checkpoint.every_n_steps=1", "--trainer.log_every_n_steps=1"),
]


@pytest.mark.slow
def test_killed_and_resumed_bit_by_bit_then_asked_to_translate(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    places = [tmp_path / name for name in ("whole", "killed")]
    drop = "--model.init_args.dropout=0.2"
    for place in places:
        place.mkdir()
    done = patchlight("fit", *RUN, drop, cwd=places[0])
    assert done.returncode == 0, done.stderr
    workers = "--data.init_args.num_workers=1"
    killed = patchlight("fit", *RUN, drop, workers, cwd=places[1], kill_at=5)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    whole, run = map(only_run, places)
    assert last_checkpoint(run)["global_step"] == 5
    done = patchlight("fit", "--resume", str(run), cwd=places[1])
    assert done.returncode == 0, done.stderr
    assert same_end(run, whole) == []
    assert logged_losses(run) == logged_losses(whole)

    checkpoint = str(whole / "checkpoints" / "last.ckpt")
    assert translate(["-c", checkpoint, "forty-two", "six"]) == 0
    assert translate(["-c", checkpoint, "forty-two", "six", "--beam-size=2"]) == 0
    assert capsys.readouterr().out.count("\n") >= 4
    with pytest.raises(ValueError, match=r"character '4' .*not in the vocabulary: .*ab?c?d"):
        translate(["-c", checkpoint, "42"])
    with pytest.raises(ValueError, match="a text is empty"):
        translate(["-c", checkpoint, ""])
    with pytest.raises(ValueError, match=r"search.beam_size is 0"):
        translate(["-c", checkpoint, "six", "--beam-size=0"])
    other = tmp_path / "other.ckpt"
    torch.save({"hyper_parameters": {"_class_path": "modules.MAE"}, "state_dict": {}}, other)
    with pytest.raises(ValueError, match=r"is of modules.MAE, which does not translate"):
        translate(["-c", str(other), "six"])
    with pytest.raises(FileNotFoundError, match=r"there is no checkpoint at nowhere.ckpt"):
        translate(["-c", "nowhere.ckpt", "six"])


@pytest.mark.slow
def test_two_processes_follow_one(tmp_path: Path) -> None:
    one, two = losses_on_one_and_two(tmp_path, *RUN)
    assert len(one) == 8
    assert len({round(loss, 3) for loss in one.values()}) > 4
    assert two == pytest.approx(one, abs=1e-5)
