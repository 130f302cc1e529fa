"""Loss and accuracy of a classifier over a whole evaluation."""

from jaxtyping import Float
from lightning.pytorch import LightningModule
from torch import Tensor

from callbacks.tally import Tally
from datamodules.batch import ImageBatch, PackedBatch


def add_scores(
    tally: Tally,
    batch: ImageBatch | PackedBatch,
    logits: Float[Tensor, "b k"],
    losses: Float[Tensor, " b"],
) -> None:
    """Add a batch's losses and correct answers, over its valid images, to a tally."""
    top = logits.topk(min(5, logits.shape[-1]), dim=-1).indices == batch.labels[:, None]
    valid = batch.is_valid.float()
    tally.add(
        (losses * valid).sum(),
        (top[:, 0] * valid).sum(),
        (top.any(dim=-1) * valid).sum(),
        valid.sum(),
    )


def log_scores(method: LightningModule, prefix: str, tally: Tally, num_classes: int) -> None:
    """Log the means of all that was added; `val/accuracy` also in the progress bar.

    Raises:
        ValueError: nothing valid was.
    """
    loss, correct, among_five, count = tally.totals(method)
    if count == 0:
        raise ValueError("no image of the validation set could be read")
    method.log(f"{prefix}loss", loss / count)
    method.log(f"{prefix}accuracy", correct / count, prog_bar=prefix == "val/")
    if num_classes > 5:
        method.log(f"{prefix}top5_accuracy", among_five / count)
