"""Few-shot evaluation against reference values and plain linear algebra."""

import numpy as np
import pytest
import torch
from torch import Tensor

from modules.fewshot import BIAS, few_shot, one_shot_set, pick, ridge, with_bias


def test_reference_values() -> None:
    """METHODS' golden numbers, made by running the published code."""
    x = torch.tensor([[0.0, 1.0], [1.0, 0.0], [3.0, 3.0], [4.0, 5.0]])
    y = 2.0 * torch.nn.functional.one_hot(torch.tensor([0, 0, 1, 1])) - 1
    expected = [[-0.003679, 0.003679], [-0.003533, 0.003533], [0.0, 0.0]]
    mean, std = x.mean(0), x.std(0, correction=0) + 1e-5
    plain, standardised = (ridge(rows, y, [1024.0])[0] for rows in (x, (x - mean) / std))
    close = [
        torch.allclose(weights.float(), torch.tensor(expected), atol=2e-6)
        for weights in (plain, standardised)
    ]
    assert close.count(True) == 1, (plain, standardised)


@pytest.mark.parametrize(("rows", "dim"), [(40, 6), (6, 40), (7, 6)])
def test_one_decomposition_equals_many_solutions(rows: int, dim: int) -> None:
    draw = torch.Generator().manual_seed(0)
    x = torch.randn(rows, dim, generator=draw)
    y = torch.randn(rows, 3, generator=draw)
    l2 = [0.5, 2.0**10, 1e6]
    found = ridge(x, y, l2)
    assert found.shape == (3, dim + 1, 3)
    design = torch.cat((x.double(), torch.full((rows, 1), 100.0, dtype=torch.float64)), 1)
    for one, weights in zip(l2, found, strict=True):
        gram = design.T @ design + one * torch.eye(dim + 1, dtype=torch.float64)
        expected = torch.linalg.solve(gram, design.T @ y.double())
        torch.testing.assert_close(weights, expected, rtol=1e-6, atol=1e-9)


def test_the_bias_is_hardly_regularised() -> None:
    x, y = torch.zeros(50, 2), torch.ones(50, 1)
    (weights,) = ridge(x, y, [1024.0])
    assert float(with_bias(x.double())[0] @ weights) == pytest.approx(1.0, abs=0.003)
    assert with_bias(x)[0, -1] == BIAS


def test_shots_are_drawn_class_by_class_and_nested() -> None:
    labels = np.arange(60) % 4
    few, more = pick(labels, 4, 2, seed=1), pick(labels, 4, 5, seed=1)
    assert labels[more].tolist() == [0] * 5 + [1] * 5 + [2] * 5 + [3] * 5
    assert set(few) < set(more)
    assert len(set(more)) == 20
    assert set(pick(labels, 4, 2, seed=2)) != set(few)
    assert (pick(labels, 4, 2, seed=1) == few).all()
    with pytest.raises(ValueError, match="class 0 has 15 training images, too few for 16 shots"):
        pick(labels, 4, 16, seed=1)


def clusters(rows: int, seed: int, noise: float = 0.3) -> tuple[Tensor, Tensor]:
    draw = torch.Generator().manual_seed(seed)
    labels = torch.arange(rows) % 3
    centres = torch.eye(3).repeat(1, 4) * 2
    return centres[labels] + noise * torch.randn(rows, 12, generator=draw) + 5, labels


def test_separable_classes_are_told_apart() -> None:
    train, test = clusters(90, 0), clusters(60, 1)
    found = few_shot(*train, *test, 3, shots=[1, 10], seeds=2, l2=[1.0, 2.0**10])
    assert [(o.shots, o.l2, len(o.accuracies)) for o in found] == [
        *((1, 1.0, 2), (1, 1024.0, 2), (10, 1.0, 2), (10, 1024.0, 2))
    ]
    assert found[-1].mean == 1.0
    assert found[-1].std == 0.0
    shuffled = few_shot(train[0], train[1].roll(1), *test, 3, shots=[10], seeds=1)
    assert shuffled[0].mean < 0.1


def test_only_the_shots_say_how_features_are_standardised() -> None:
    """Another scale and place of all features changes nothing; other test images neither."""
    (x, labels), (test, names) = clusters(30, 0, noise=2.0), clusters(300, 1, noise=2.0)
    plain = one_shot_set(x, labels, test, names, 3, [1024.0])
    moved = one_shot_set(x * 50 - 7, labels, test * 50 - 7, names, 3, [1024.0])
    assert moved == plain
    assert 0.4 < plain[0] < 1.0
    halves = [
        one_shot_set(x, labels, test[rows], names[rows], 3, [1024.0], block=7)[0]
        for rows in (slice(0, 150), slice(150, 300))
    ]
    assert sum(halves) / 2 == pytest.approx(plain[0])


def test_what_is_refused() -> None:
    side = clusters(9, 0)
    with pytest.raises(ValueError, match=r"l2 is \[0.0\]; expected positive numbers"):
        few_shot(*side, *side, 3, shots=[1], l2=[0.0])
    with pytest.raises(ValueError, match=r"shots are \[0\] and seeds 3"):
        few_shot(*side, *side, 3, shots=[0])
