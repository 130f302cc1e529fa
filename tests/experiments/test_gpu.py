"""The benchmark of GPU steps: its arithmetic, and what it says of an arm that does not run."""

import pytest
import torch
from torch import nn

from experiments.benchmarks import gpu
from experiments.benchmarks.gpu import OURS, Arm, Result, Size
from modules.backbones import ViT

TINY = Size(torch.device("cpu"), is_tiny=True)


def test_flops_of_a_step_are_those_counted_by_hand() -> None:
    arm = gpu.supervised(TINY)[OURS]()
    vit = ViT("mu")
    d, depth, hidden = vit.embed_dim, vit.num_layers, vit.blocks[0].mlp.fc1.out_features
    patches, tokens = 14 * 14, 14 * 14 + 1
    products = depth * tokens * (4 * d * d + 2 * d * hidden) + d * gpu.CLASSES
    # Backward makes two for each, but for the pixels' gradient, which nobody asks for; attention
    # makes four of the two forward, and the scores again.
    each = 3 * products + 2 * patches * 3 * 16 * 16 * d + depth * (2 + 5) * tokens * tokens * d
    assert arm.images == 2
    assert gpu.counted(arm.step) == 2 * 2 * each


def test_rows_of_the_table() -> None:
    step = Arm(lambda: None, [], 8)
    results = {
        OURS: Result(step, [0.5, 0.5, 0.5], 10**12, 3 * 2**30),
        "other": Result(step, [1.0, 2.0, 1.5], 3 * 10**12, 0),
    }
    ours, other, absent = gpu.rows("mae", results, {"third": "did not run"}, 4e12)
    # 8 images in half a second; 1e12 FLOPs in it of 4e12 a second.
    assert ours == ("mae", OURS, "16.0", "1.000", "1.000 to 1.000", "0.500", "3.00")
    assert other == ("mae", "other", "5.3", "3.000", "2.500 to 3.500", "0.500", "")
    assert absent == ("mae", "third", "did not run", "", "", "", "")
    assert gpu.rows("mae", results, {}, None)[0][5] == ""  # a device that promises nothing known


def test_an_arm_that_does_not_run_says_so_in_its_row(monkeypatch: pytest.MonkeyPatch) -> None:
    def small() -> Arm:
        network = nn.Linear(4, 2)
        return Arm(lambda: network(torch.ones(3, 4)).sum().backward(), [network], 3)

    def absent() -> Arm:
        raise ImportError("No module named 'lightly'")

    makers = {OURS: small, "same, eager": small, "lightly, eager": absent}
    monkeypatch.setitem(gpu.TASKS, "dino", lambda size: makers)
    rows = gpu.measure("dino", TINY, rounds=2)
    assert [row[1] for row in rows] == list(makers)
    assert rows[2][2] == "did not run: No module named 'lightly'"
    assert all(float(row[2].replace(",", "")) > 0 for row in rows[:2])
    monkeypatch.setitem(gpu.TASKS, "dino", lambda size: {OURS: absent})
    with pytest.raises(ImportError):
        gpu.measure("dino", TINY, rounds=2)
