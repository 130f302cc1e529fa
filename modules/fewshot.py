"""Few-shot linear evaluation in closed form.

"An Image is Worth 16x16 Words" (Dosovitskiy et al. 2020, section 4.1: regularised least squares
from frozen features to {-1, 1}^K), in the details of big_vision's `fewshot_lsr`:

    x = (x - mean) / (std + 1e-5)      of the shots alone, population std
    X = [x, 100]                       a constant feature, which regularisation hardly touches
    Y = 2 * onehot - 1
    W = (X^T X + l I)^-1 X^T Y         or X^T (X X^T + l I)^-1 Y, whichever matrix is smaller
    class = argmax [x, 100] W
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from datamodules.sampling import fold

BIAS = 100.0  # the constant feature
EPSILON = 1e-5
L2 = 2.0**10


def ridge(
    x: Float[Tensor, "n d"], y: Float[Tensor, "n k"], l2: Sequence[float]
) -> Float[Tensor, "l d1 k"]:
    """The least-squares weights of every regulariser, from one eigendecomposition, in float64.

    The last of the d + 1 rows is that of the constant feature.

    Raises:
        ValueError: a regulariser that is not positive.
    """
    if not l2 or not all(0 < one < math.inf for one in l2):
        raise ValueError(f"l2 is {list(l2)}; expected positive numbers")
    design = with_bias(x.double())
    y = y.double()
    is_tall = design.shape[0] >= design.shape[1]
    values, vectors = torch.linalg.eigh(design.T @ design if is_tall else design @ design.T)
    right = vectors.T @ (design.T @ y if is_tall else y)
    shrunk = torch.stack([right / (values + one)[:, None] for one in l2])
    weights: Tensor = vectors @ shrunk
    return weights if is_tall else design.T @ weights


def with_bias(x: Float[Tensor, "n d"]) -> Float[Tensor, "n d1"]:
    return torch.cat((x, x.new_full((len(x), 1), BIAS)), dim=1)


def pick(labels: np.ndarray, num_classes: int, shots: int, seed: int) -> np.ndarray:
    """The first `shots` of a permutation of each class: the rows of `labels`, class by class.

    More shots with the same seed are these and others.

    Raises:
        ValueError: a class with fewer images.
    """
    order = np.random.Generator(np.random.Philox(key=fold(seed))).permutation(len(labels))
    rows = []
    for name in range(num_classes):
        found = order[labels[order] == name]
        if len(found) < shots:
            raise ValueError(
                f"class {name} has {len(found)} training images, too few for {shots} shots; "
                f"ask for fewer"
            )
        rows.append(found[:shots])
    return np.concatenate(rows)


class Outcome(NamedTuple):
    """Accuracies in [0, 1] of so many shots under one regulariser, one for every seed."""

    shots: int
    l2: float
    accuracies: tuple[float, ...]

    @property
    def mean(self) -> float:
        return float(np.mean(self.accuracies))

    @property
    def std(self) -> float:
        """Population standard deviation."""
        return float(np.std(self.accuracies))


def one_shot_set(
    x: Float[Tensor, "n d"],
    labels: Int[Tensor, " n"],
    test: Float[Tensor, "m d"],
    test_labels: Int[Tensor, " m"],
    num_classes: int,
    l2: Sequence[float],
    block: int = 8192,
) -> list[float]:
    """Test accuracy of every regulariser, trained on exactly these rows."""
    x = x.double()
    mean, std = x.mean(dim=0), x.std(dim=0, correction=0) + EPSILON
    weights = ridge((x - mean) / std, 2.0 * F.one_hot(labels, num_classes) - 1.0, l2)
    correct = torch.zeros(len(l2), dtype=torch.int64)
    parts = (torch.split(side, block) for side in (test, test_labels))
    for part, names in zip(*parts, strict=True):
        scores = with_bias((part.double() - mean) / std) @ weights
        correct += (scores.argmax(dim=-1) == names).sum(dim=-1)
    return [int(count) / len(test) for count in correct]


def few_shot(
    train: Float[Tensor, "n d"],
    train_labels: Int[Tensor, " n"],
    test: Float[Tensor, "m d"],
    test_labels: Int[Tensor, " m"],
    num_classes: int,
    shots: Sequence[int] = (1, 5, 10, 25),
    seeds: int = 3,
    l2: Sequence[float] = (L2,),
) -> list[Outcome]:
    """Test accuracies for every number of shots and every regulariser.

    Args:
        train, test: frozen features, on a CPU.
        shots: training images of each class.
        seeds: draws of them, numbered from 0.
        l2: regularisers.

    Raises:
        ValueError: a class with too few images, numbers out of range.
    """
    if not shots or min(shots) < 1 or seeds < 1:
        raise ValueError(f"shots are {list(shots)} and seeds {seeds}; expected 1 or more of each")
    found = []
    names = train_labels.numpy()
    for count in shots:
        by_seed = []
        for seed in range(seeds):
            rows = torch.from_numpy(pick(names, num_classes, count, seed))
            given = (train[rows], train_labels[rows], test, test_labels, num_classes, l2)
            by_seed.append(one_shot_set(*given))
        for one, accuracies in zip(l2, zip(*by_seed, strict=True), strict=True):
            found.append(Outcome(count, float(one), tuple(accuracies)))
    return found
