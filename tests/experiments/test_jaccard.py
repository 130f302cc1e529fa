"""`patchlight jaccard`."""

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from datamodules.geometry import EvalGeometry
from datamodules.shapes import Shapes
from experiments.evaluations import evaluations
from experiments.jaccard import EACH, MEAN, jaccard, masks_of
from modules import analysis
from modules.analysis import Observed
from tests.runs import EXPERIMENTS, only_run, patchlight

SCENES = EXPERIMENTS / "quickstart" / "dino.yaml"
FEW = ["--data.init_args.source_args", "{num_train: 2, num_val: 12}"]


@pytest.fixture(autouse=True)
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PATCHLIGHT_CACHE", str(tmp_path / "cache"))


def shown(text: str) -> dict[str, float]:
    lines = [line.split("│")[1:3] for line in text.splitlines() if line.startswith("│")]
    return {name.strip(): float(value.strip(" %")) / 100 for name, value in lines}


def test_attention_that_lies_on_the_objects(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The first head is made to look at the object, the second at everything else."""
    masks: list[Tensor] = []

    def attention(seen: Observed) -> Tensor:
        share = F.adaptive_avg_pool2d(masks.pop(0).float()[:, None], seen.grid)
        maps = torch.cat((share, 1 - share), dim=1).clamp_min(1e-6)
        return F.pad(maps, (0, 0, 0, 0, 0, 0, 0, seen.num_images - len(maps)), value=1.0)

    scenes = Shapes("val", None, 3, num_train=2, num_val=12)
    geometry = EvalGeometry((32, 32), share=0.875, interpolation="bicubic")
    masks.append(masks_of(scenes, range(12), geometry))
    assert 0.1 < masks[0].float().mean() < 0.5
    monkeypatch.setattr(analysis, "readout_attention", attention)
    arguments = ["-c", "random", "--config", str(SCENES), "--mass", "0.95", *FEW]
    assert jaccard(arguments) == 0
    found = shown(capsys.readouterr().out)
    assert set(found) == {MEAN, "head 1", "head 2", "best head", EACH}
    assert found["best head"] == found["head 1"] == found[EACH] > 0.5  # of 4 x 4 patches
    assert found["head 2"] < 0.2


def test_a_random_network_as_it_is(capsys: pytest.CaptureFixture[str]) -> None:
    assert jaccard(["-c", "random", "--config", str(SCENES), *FEW]) == 0
    said = capsys.readouterr().out
    assert "12 held-out images, 60 % of the attention" in said
    found = shown(said)
    assert found["best head"] <= found[EACH]
    assert 0.05 < found["best head"] < 0.5
    assert jaccard(["-c", "random", "--config", str(SCENES), "--mass", "1", *FEW]) == 0
    everything = shown(capsys.readouterr().out)
    assert len(set(everything.values())) == 1  # all patches, whatever the head


def test_refusals() -> None:
    random = ["-c", "random", "--config", str(SCENES)]
    with pytest.raises(ValueError, match="images of digits have no masks of their objects"):
        jaccard([*random, "--data", "digits"])
    with pytest.raises(ValueError, match=r"--mass 0\.0; expected a share"):
        jaccard([*random, "--mass", "0"])


def test_kept_in_the_run(tmp_path: Path) -> None:
    overrides = ["--trainer.max_steps=1", "--data.init_args.batch_size=2", "--trainer.callbacks=[]"]
    overrides += [f"--data.init_args.source_args={FEW[1]}", "--checkpoint.monitor=null"]
    done = patchlight("fit", f"--config={SCENES}", *overrides, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    run = only_run(tmp_path)
    assert jaccard(["-c", str(run / "checkpoints" / "last.ckpt")]) == 0
    assert evaluations(run)["jaccard"]["main"] == "best head"
    assert evaluations(run)["jaccard"]["network"] == "teacher"
