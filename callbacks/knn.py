"""k-nearest-neighbour classification of frozen features, online and as plain functions.

Weighted as in "Unsupervised Feature Learning via Non-Parametric Instance Discrimination"
(Wu et al. 2018, section 3.4) and as DINO evaluates (Caron et al. 2021, `eval_knn.py`):

    features have length 1
    s_i   = q . b_i                                   of the query with every image of the bank
    score = sum over the k largest s_i of exp(s_i / temperature) * onehot(label_i)
    class = argmax score

No matrix of queries times bank exists at any time: the bank is gone through in blocks, and only
the k best so far are kept.
"""

import math
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple, Protocol

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor

from datamodules.module import SourceDataModule
from datamodules.progress import Bar

QUERIES, BLOCK = 512, 16_384  # rows of the queries and of the bank that meet at once


class Embeds(Protocol):
    """What the callback needs: one vector an image, [b d], of one of the method's networks."""

    def embed(self, images: Any, network: str | None = None) -> Tensor: ...


class Neighbours(NamedTuple):
    """The k nearest of each query, the nearest first.

    similarity: [b, k] cosine, -inf where the bank had fewer
    labels:     [b, k] class ids
    """

    similarity: Float[Tensor, "b k"]
    labels: Int[Tensor, "b k"]


def nearest(
    queries: Float[Tensor, "b d"],
    bank: Float[Tensor, "n d"],
    labels: Int[Tensor, " n"],
    k: int,
    block: int = BLOCK,
) -> Neighbours:
    """The k nearest in a bank; both sides have rows of length 1, and may be of half precision.

    Memory beside the arguments: b * block similarities.
    """
    b = queries.shape[0]
    # Features may be kept in half precision; products of it would be a hundredth off after exp.
    queries = queries.float()
    best = Neighbours(
        torch.full((b, k), -torch.inf, device=queries.device),
        torch.zeros((b, k), dtype=torch.int64, device=queries.device),
    )
    for rows, names in zip(torch.split(bank, block), torch.split(labels, block), strict=True):
        similarity = queries @ rows.float().T
        value, place = similarity.topk(min(k, len(rows)), dim=1)
        best = merge((best, Neighbours(value, names[place])))
    return best


def merge(several: Sequence[Neighbours]) -> Neighbours:
    """The k nearest among the neighbours found in several banks."""
    k = several[0].similarity.shape[1]
    similarity = torch.cat([found.similarity for found in several], dim=1)
    labels = torch.cat([found.labels for found in several], dim=1)
    value, place = similarity.topk(k, dim=1)
    return Neighbours(value, labels.gather(1, place))


def vote(found: Neighbours, num_classes: int, temperature: float) -> Float[Tensor, "b num_classes"]:
    """The score of every class, relative to the weight of the nearest neighbour.

    Without that, exp overflows at temperatures that are in use. A bank with nothing in it gives
    no scores, so callers refuse it.
    """
    weight = torch.exp((found.similarity - found.similarity[:, :1]) / temperature)
    scores = weight.new_zeros(len(weight), num_classes)
    return scores.scatter_add_(1, found.labels, weight)


class Hits:
    """Correct answers, nearest class and among the first five, for several k."""

    def __init__(self, ks: Sequence[int], num_classes: int, temperature: float) -> None:
        self.ks, self.num_classes, self.temperature = tuple(ks), num_classes, temperature
        self.counts = torch.zeros(len(self.ks) * 2 + 1, dtype=torch.int64)

    def add(self, found: Neighbours, labels: Int[Tensor, " b"]) -> None:
        """Queries and their right answers; `found` has the largest of the ks."""
        row = []
        for k in self.ks:
            first = Neighbours(found.similarity[:, :k], found.labels[:, :k])
            scores = vote(first, self.num_classes, self.temperature)
            # Stable: classes without a vote follow in the order of their ids, as published.
            order = scores.sort(dim=1, descending=True, stable=True).indices[:, :5]
            ranked = order == labels[:, None]
            row += [ranked[:, 0].sum(), ranked.any(dim=1).sum()]
        self.counts += torch.stack([*row, row[0].new_tensor(len(labels))]).cpu()

    def accuracies(self) -> dict[int, tuple[float, float]]:
        """Top-1 and top-5 of every k, in [0, 1]."""
        *hits, count = self.counts.tolist()
        if count == 0:
            raise ValueError("there are no valid images to classify by their neighbours")
        return {k: (hits[2 * i] / count, hits[2 * i + 1] / count) for i, k in enumerate(self.ks)}


def check_knn(ks: Sequence[int], temperature: float) -> None:
    if not ks or min(ks) < 1:
        raise ValueError(f"k is {list(ks)}; expected numbers from 1 on")
    if not 0 < temperature < math.inf:
        raise ValueError(f"temperature is {temperature}; expected more than 0")


def classify(
    queries: Float[Tensor, "b d"],
    query_labels: Int[Tensor, " b"],
    bank: Float[Tensor, "n d"],
    bank_labels: Int[Tensor, " n"],
    ks: Sequence[int],
    num_classes: int,
    temperature: float = 0.07,
    shown: bool = False,
) -> dict[int, tuple[float, float]]:
    """Top-1 and top-5 accuracy in [0, 1] for every k, in one process.

    Rows need not have length 1 yet. `shown`: with a progress bar.

    Raises:
        ValueError: a k or temperature out of range, nothing to compare with.
    """
    check_knn(ks, temperature)
    if len(bank) == 0:
        raise ValueError("the bank of the k-NN evaluation is empty")
    hits = Hits(ks, num_classes, temperature)
    with Bar("k-NN", len(queries), shown) as bar:
        parts = (torch.split(side, QUERIES) for side in (queries, query_labels))
        for part, labels in zip(*parts, strict=True):
            part = F.normalize(part.float(), dim=1).to(bank.dtype)
            hits.add(nearest(part, bank, bank_labels, max(ks)), labels)
            bar.advance(len(part))
    return hits.accuracies()


def gather_bank(
    batches: Iterable[tuple[Float[Tensor, "b d"], Int[Tensor, " b"]]], dtype: torch.dtype
) -> tuple[Float[Tensor, "n d"], Int[Tensor, " n"]]:
    """Features of length 1, kept in `dtype`, and their labels."""
    rows, labels = [], []
    for features, names in batches:
        rows.append(F.normalize(features.float(), dim=1).to(dtype))
        labels.append(names)
    return torch.cat(rows), torch.cat(labels)


class KNN(Callback):
    """Logs `val/knn_top1` (and `val/knn_top5` from six classes on) when the network is evaluated.

    Every device embeds its share of the training images, as evaluation sees them, and keeps it;
    queries go round all devices. With several k the metrics are `val/knn_top1_k20` and so on,
    and `val/knn_top1` is that of the first.

    Args:
        every_n_epochs: epochs from one to the next; evaluations in between go without, but for
            that at the end of a run.
        k: neighbours that vote.
        temperature: of their weights.
        network: of the method's networks, such as "averaged"; null for the one it is about.
        max_bank: training images in the bank, drawn from all of them; null for all.

    Raises:
        ValueError: values out of range; data without labels.
    """

    def __init__(
        self,
        every_n_epochs: int = 1,
        k: list[int] = [20],  # noqa: B006 - never changed
        temperature: float = 0.07,
        network: str | None = None,
        max_bank: int | None = None,
    ) -> None:
        check_knn(k, temperature)
        for name, value in (("every_n_epochs", every_n_epochs), ("max_bank", max_bank)):
            if value is not None and value < 1:
                raise ValueError(f"{name} is {value}; expected at least 1")
        self.every_n_epochs, self.ks, self.temperature = every_n_epochs, tuple(k), temperature
        self.network, self.max_bank = network, max_bank
        self.queries: list[tuple[Tensor, Tensor, Tensor]] = []
        self.ran_after = 0  # epochs

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        data = getattr(trainer, "datamodule", None)
        if not isinstance(data, SourceDataModule):
            raise ValueError(f"callbacks.KNN needs one of our data modules, not {type(data)}")
        if not data.class_names:
            raise ValueError("callbacks.KNN needs labels, and the data has none; remove it")
        if not hasattr(pl_module, "embed"):
            raise ValueError(f"callbacks.KNN: {type(pl_module).__name__} embeds no images")

    def is_due(self, trainer: Trainer) -> bool:
        if trainer.sanity_checking:
            return False
        if trainer.state.fn != "fit":
            return True
        done = trainer.current_epoch + 1  # one more when all epochs are over
        last = trainer.max_epochs is not None and done >= trainer.max_epochs
        last = last or 0 < trainer.max_steps <= trainer.global_step
        return last or done - self.ran_after >= self.every_n_epochs

    def logs_now_and_then(self, metric: str) -> bool:
        """Whether an evaluation may lack a metric because it was not due."""
        return metric.startswith("val/knn_")

    def embed(self, pl_module: LightningModule, images: Any) -> Tensor:
        method: Embeds = pl_module  # type: ignore[assignment]
        with pl_module.trainer.precision_plugin.val_step_context():
            return method.embed(images, self.network)

    def on_validation_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.queries = []

    def on_validation_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, *_: Any
    ) -> None:
        if self.is_due(trainer):
            features = self.embed(pl_module, batch.images)
            features = F.normalize(features.float(), dim=1).half()
            self.queries.append((features, batch.labels, batch.is_valid & (batch.labels >= 0)))

    def bank(self, trainer: Trainer, pl_module: LightningModule) -> tuple[Tensor, Tensor]:
        """Features and labels of this device's share of the training images."""
        data: SourceDataModule = trainer.datamodule  # type: ignore[attr-defined]
        source = data.some("train", self.max_bank)
        per_device = -(-len(source) // trainer.world_size)
        shown = trainer.is_global_zero and trainer.progress_bar_callback is not None
        left_out = 0
        with Bar("features for k-NN", per_device, shown) as bar:

            def batches() -> Iterable[tuple[Tensor, Tensor]]:
                nonlocal left_out
                for batch in data.eval_batches(source, pl_module.device):
                    features = self.embed(pl_module, batch.images)
                    taken = batch.is_valid & (batch.labels >= 0)
                    left_out += int((batch.is_replaced | (batch.labels < 0)).sum())
                    yield features[taken], batch.labels[taken]
                    bar.advance(batch.num_images)

            found = gather_bank(batches(), torch.float16)
        numbers = torch.tensor([len(found[0]), left_out], device=pl_module.device)
        size, left_out = (int(n) for n in trainer.strategy.reduce(numbers, reduce_op="sum"))
        if size == 0:
            raise ValueError("none of the training images could be read, so k-NN has no bank")
        if left_out:
            rank_zero_warn(f"k-NN: {left_out} training images without label or unreadable left out")
        return found

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not self.queries:
            return
        data: SourceDataModule = trainer.datamodule  # type: ignore[attr-defined]
        self.ran_after = trainer.current_epoch + 1
        bank, names = self.bank(trainer, pl_module)
        hits = Hits(self.ks, len(data.class_names), self.temperature)
        for features, labels, is_valid in self.queries:
            found = self.everywhere(pl_module, features, bank, names)
            kept = Neighbours(found.similarity[is_valid], found.labels[is_valid])
            hits.add(kept, labels[is_valid])
        self.queries = []
        hits.counts = pl_module.all_gather(hits.counts).view(-1, len(hits.counts)).sum(0).cpu()  # type: ignore[union-attr]
        self.tell(pl_module, hits.accuracies())

    def everywhere(
        self, pl_module: LightningModule, queries: Tensor, bank: Tensor, names: Tensor
    ) -> Neighbours:
        """The nearest of this device's queries over the banks of all devices."""
        k, mine = max(self.ks), queries.shape[0]
        gathered = pl_module.all_gather(queries)
        assert isinstance(gathered, Tensor)
        found = nearest(gathered.reshape(-1, queries.shape[1]), bank, names, k)
        everyone = pl_module.all_gather(found)  # [banks, all queries, k], or [queries, k] alone
        start = mine * pl_module.global_rank
        similarity, labels = (t.reshape(-1, *found.labels.shape) for t in everyone)
        here = slice(start, start + mine)
        return merge(
            [Neighbours(s[here], n[here]) for s, n in zip(similarity, labels, strict=True)]
        )

    def tell(self, pl_module: LightningModule, found: dict[int, tuple[float, float]]) -> None:
        for place, (k, (top1, top5)) in enumerate(found.items()):
            for name, value in (("knn_top1", top1), ("knn_top5", top5)):
                if name == "knn_top5" and self.num_classes(pl_module) < 6:
                    continue
                if place == 0:
                    pl_module.log(f"val/{name}", value)
                if len(found) > 1:
                    pl_module.log(f"val/{name}_k{k}", value)

    def state_dict(self) -> dict[str, int]:
        return {"ran_after": self.ran_after}

    def load_state_dict(self, state_dict: dict[str, int]) -> None:
        self.ran_after = state_dict["ran_after"]

    def num_classes(self, pl_module: LightningModule) -> int:
        return len(pl_module.trainer.datamodule.class_names)  # type: ignore[attr-defined]
