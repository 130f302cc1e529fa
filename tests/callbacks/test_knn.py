"""k-NN against DINO's own accuracies, brute force, and itself over several devices."""

import json
import resource
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch import Trainer
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor

from callbacks.checkpoint import Checkpoint
from callbacks.knn import KNN, Neighbours, classify, gather_bank, merge, nearest, vote
from tests import small
from tests.runs import ROOT, TINY, only_run, patchlight

GOLDEN = ROOT / "tests" / "golden" / "dino_knn.safetensors"


def unit(rows: int, dim: int = 8, seed: int = 0) -> Tensor:
    return F.normalize(torch.randn(rows, dim, generator=torch.Generator().manual_seed(seed)), dim=1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_published_accuracies(dtype: torch.dtype) -> None:
    golden = load_file(GOLDEN)
    with safe_open(GOLDEN, "pt") as file:
        about = file.metadata()
    used = int(json.loads(about["queries_used"]))
    features, labels = golden["test_features"][:used], golden["test_labels"][:used]
    ks = [5, 10, 20, 100]
    bank = F.normalize(golden["train_features"], dim=1).to(dtype)
    arguments = (ks, int(about["classes"]), float(about["temperature"]))
    found = classify(features, labels.long(), bank, golden["train_labels"].long(), *arguments)
    for k in ks:
        top1, top5 = found[k]
        # Half precision may turn one vote that is nearly even.
        tolerance = 1e-6 if dtype == torch.float32 else 1.0 / used + 1e-6
        assert top1 == pytest.approx(float(golden[f"top1.{k}"]) / 100, abs=tolerance)
        assert top5 == pytest.approx(float(golden[f"top5.{k}"]) / 100, abs=tolerance)


@pytest.mark.parametrize("block", [1, 7, 64, 1000])
def test_streaming_equals_brute_force(block: int) -> None:
    queries, bank = unit(30), unit(200, seed=1)
    labels = torch.arange(200) % 7
    found = nearest(queries, bank, labels, 9, block)
    similarity, place = (queries.double() @ bank.double().T).sort(dim=1, descending=True)
    torch.testing.assert_close(found.similarity, similarity[:, :9].float())
    assert torch.equal(found.labels, labels[place[:, :9]])


def test_several_banks_are_one() -> None:
    queries, bank, labels = unit(5), unit(60, seed=1), torch.arange(60) % 4
    whole = nearest(queries, bank, labels, 10)
    parts = [nearest(queries, bank[rows], labels[rows], 10) for rows in (slice(3), slice(3, 60))]
    again = merge(parts)
    assert torch.equal(again.labels, whole.labels)
    torch.testing.assert_close(again.similarity, whole.similarity)


def test_votes_are_weighted_by_similarity() -> None:
    found = Neighbours(torch.tensor([[0.9, 0.8, 0.8]]), torch.tensor([[2, 0, 0]]))
    sharp, flat = vote(found, 3, 0.07), vote(found, 3, 10.0)
    expected = np.exp(np.array([0.8, 0.0, 0.9]) / 0.07) * np.array([2, 0, 1])
    np.testing.assert_allclose((sharp[0] / sharp[0, 2]).numpy(), expected / expected[2], rtol=1e-5)
    assert sharp.argmax() == 2
    assert flat.argmax() == 0


def test_a_small_temperature_overflows_nothing() -> None:
    """exp(0.97 / 0.01) is no float32; the order of the votes is that of float64."""
    similarity = 0.9 + 0.07 * torch.rand(40, 9, generator=torch.Generator().manual_seed(0))
    found = Neighbours(
        similarity.sort(descending=True, dim=1).values, torch.arange(9).repeat(40, 1) % 4
    )
    weight = (found.similarity.double() / 0.01).exp()
    expected = torch.zeros(40, 4).double().scatter_add_(1, found.labels, weight).argmax(dim=1)
    assert torch.equal(vote(found, 4, 0.01).argmax(dim=1), expected)


def test_a_small_bank_has_fewer_neighbours_that_vote() -> None:
    found = nearest(unit(2), unit(3, seed=1), torch.tensor([1, 1, 0]), 20)
    assert torch.isinf(found.similarity[:, 3:]).all()
    scores = vote(found, 2, 0.07)
    assert torch.isfinite(scores).all()
    assert (scores > 0).all()


def test_one_image_finds_itself() -> None:
    bank = unit(50)
    labels = torch.arange(50) % 10
    assert classify(bank * 7, labels, bank, labels, [1], 10)[1][0] == 1.0
    wrong = classify(bank, (labels + 1) % 10, bank, labels, [1], 10)
    assert wrong[1] == (0.0, pytest.approx(wrong[1][1]))
    assert wrong[1][0] == 0.0


def test_what_is_refused() -> None:
    bank, labels = unit(5), torch.zeros(5, dtype=torch.int64)
    with pytest.raises(ValueError, match=r"k is \[0\]; expected numbers from 1 on"):
        classify(bank, labels, bank, labels, [0], 2)
    with pytest.raises(ValueError, match=r"temperature is 0\.0; expected more than 0"):
        KNN(temperature=0.0)
    with pytest.raises(ValueError, match="temperature is nan"):
        KNN(temperature=float("nan"))
    with pytest.raises(ValueError, match="every_n_epochs is 0"):
        KNN(every_n_epochs=0)
    with pytest.raises(ValueError, match="bank of the k-NN evaluation is empty"):
        classify(bank, labels, bank[:0], labels[:0], [1], 2)


def test_a_bank_is_kept_in_half_precision() -> None:
    features, labels = gather_bank([(torch.ones(3, 4) * 9, torch.arange(3))], torch.float16)
    assert features.dtype == torch.float16
    torch.testing.assert_close(features.float(), torch.full((3, 4), 0.5))
    assert labels.tolist() == [0, 1, 2]


LARGE = """
import resource, torch
from callbacks.knn import classify
torch.set_num_threads(1)
bank = torch.nn.functional.normalize(torch.randn(40_000, 64), dim=1).half()
labels = torch.arange(40_000) % 100
classify(bank[:600].float(), labels[:600], bank, labels, [20], 100)
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
queries = bank[:8_000].float()
top1, _ = classify(queries, labels[:8_000], bank, labels, [1], 100)[1]
assert top1 > 0.999, top1
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024)
"""


@pytest.mark.slow
def test_memory_does_not_grow_with_queries_times_bank() -> None:
    assert sys.platform != "linux" or resource.getrusage(resource.RUSAGE_SELF).ru_maxrss > 0
    done = subprocess.run(
        [sys.executable, "-c", LARGE], cwd=ROOT, capture_output=True, text=True, check=True
    )
    # All similarities at once would be 1,221 MiB.
    assert float(done.stdout) < 100


def fit(directory: Path, callback: KNN | None, **changes: Any) -> tuple[Trainer, Any]:
    method = small.method()
    trainer = small.trainer(directory, *([callback] if callback else []), **changes)
    trainer.fit(method, small.data())
    return trainer, method


def test_online_equals_brute_force_and_changes_no_training(tmp_path: Path) -> None:
    trainer, method = fit(tmp_path / "with", KNN(k=[5, 9]), limit_val_batches=1.0)
    _, other = fit(tmp_path / "without", None, limit_val_batches=1.0)
    for name, tensor in other.state_dict().items():
        assert torch.equal(tensor, method.state_dict()[name]), name
    data: Any = trainer.datamodule  # type: ignore[attr-defined]
    sides = []
    method.eval()
    for source in (data.train_source, data.val_source):
        rows, labels = [], []
        for batch in data.eval_batches(source, torch.device("cpu")):
            with torch.no_grad():
                rows.append(method.classifier.backbone(batch.images).pooled[batch.is_valid])
            labels.append(batch.labels[batch.is_valid])
        sides.append((torch.cat(rows), torch.cat(labels)))
    (bank, names), (queries, answers) = sides
    assert (len(bank), len(queries)) == (1437, 360)
    # Both sides are kept in half precision, which at this stage, where all features point nearly
    # the same way, moves a few answers.
    near, far = (F.normalize(side, dim=1).half().double() for side in (queries, bank))
    similarity = near @ far.T
    value, place = similarity.topk(5, dim=1)
    scores = (
        torch.zeros(len(queries), 10).double().scatter_add_(1, names[place], (value / 0.07).exp())
    )
    expected = (scores.argmax(1) == answers).float().mean()
    metrics = trainer.callback_metrics
    assert float(metrics["val/knn_top1"]) == pytest.approx(float(expected), abs=1e-6)
    assert metrics["val/knn_top1"] == metrics["val/knn_top1_k5"]
    assert metrics["val/knn_top5"] > metrics["val/knn_top1"]
    assert "val/knn_top1_k9" in metrics


def test_only_every_nth_epoch_and_the_last(tmp_path: Path) -> None:
    epochs: list[int] = []

    class Count(KNN):
        def bank(self, trainer: Trainer, pl_module: Any) -> tuple[Tensor, Tensor]:
            epochs.append(trainer.current_epoch)
            found = super().bank(trainer, pl_module)
            assert len(found[0]) == 40
            return found

    fit(tmp_path, Count(every_n_epochs=2, max_bank=40), max_epochs=5, num_sanity_val_steps=1)
    assert epochs == [1, 3, 4]
    for limits in ({"max_epochs": 1}, {"max_epochs": 9, "max_steps": 7}):
        # An evaluation at the end, outside of the interval of evaluations.
        trainer, _ = fit(tmp_path, KNN(9, max_bank=40), check_val_every_n_epoch=5, **limits)
        assert "val/knn_top1" in trainer.callback_metrics


def test_the_best_by_a_metric_that_comes_now_and_then(tmp_path: Path) -> None:
    keep = Checkpoint(every_n_steps=1, monitor="val/knn_top1")
    trainer, _ = fit(tmp_path, KNN(2, max_bank=40), checkpoint=keep, max_epochs=3)
    assert keep.best == pytest.approx(
        max(keep.best or 0, float(trainer.callback_metrics["val/knn_top1"]))
    )
    assert keep.best_step in (10, 15)  # not after the first epoch
    with pytest.raises(ValueError, match="monitor is 'val/knn_top1', but validation logged"):
        fit(tmp_path, None, checkpoint=Checkpoint(1, "val/knn_top1"), max_epochs=1)


def test_the_averaged_network_is_another(tmp_path: Path) -> None:
    seen = []
    for network in (None, "averaged"):
        callback = KNN(max_bank=50, network=network)
        embedded: list[Tensor] = []
        original = callback.embed

        def note(module: Any, images: Any, run: Any = original, to: Any = embedded) -> Tensor:
            to.append(run(module, images))
            return to[-1]

        callback.embed = note  # type: ignore[method-assign]
        fit(tmp_path / str(network), callback, max_epochs=1)
        seen.append(embedded[0])
    assert not torch.equal(*seen)
    with pytest.raises(ValueError, match="no network 'teacher'; there is classifier, averaged"):
        fit(tmp_path / "teacher", KNN(network="teacher"), max_epochs=1)


@pytest.mark.slow
def test_two_devices_find_what_one_finds(tmp_path: Path) -> None:
    callback = "{class_path: callbacks.KNN, init_args: {k: [3], max_bank: 21}}"
    done = patchlight("fit", *TINY, f"--trainer.callbacks=[{callback}]", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    run = only_run(tmp_path)
    found = []
    for devices in ("1", "2"):
        done = patchlight(
            "validate",
            *("--config", str(run / "config.yaml"), "--data.init_args.batch_size=2"),
            *("--ckpt_path", str(run / "checkpoints" / "last.ckpt")),
            *(f"--trainer.devices={devices}", "--trainer.strategy=ddp"),
            cwd=tmp_path,
        )
        assert done.returncode == 0, done.stderr
        lines = [line for line in done.stdout.splitlines() if line.startswith("val/knn")]
        found.append(lines)
    assert found[0] == found[1]
    (line,) = (line for line in found[0] if line.startswith("val/knn_top1 "))
    assert float(line.split()[1]) * 7 == pytest.approx(round(float(line.split()[1]) * 7), abs=1e-5)
