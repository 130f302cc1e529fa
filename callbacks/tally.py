"""Metrics over a whole evaluation, the same whatever the number of devices."""

import torch
from lightning.pytorch import LightningModule
from torch import Tensor


class Tally:
    """Sums over batches, kept on the device until the end of an evaluation.

    `datamodules.sampling.EvalBatches` deals whole batches to ranks in turn. The sums are put
    back into that order before they are added up in float64, so the total of two processes is
    that of one to the last bit.
    """

    def __init__(self) -> None:
        self.rows: list[Tensor] = []

    def add(self, *sums: Tensor) -> None:
        """One batch's sums, each a scalar tensor. Does not wait for the device."""
        self.rows.append(torch.stack([value.detach().float() for value in sums]))

    def totals(self, module: LightningModule) -> list[float]:
        """The sums over all batches of all ranks; empties the tally.

        Every rank must have added as many batches.
        """
        rows, self.rows = torch.stack(self.rows), []
        steps, width = rows.shape
        gathered = module.all_gather(rows)
        assert isinstance(gathered, Tensor)
        in_order = gathered.view(-1, steps, width).transpose(0, 1).reshape(-1, width)
        return [float(total) for total in in_order.cpu().double().sum(0)]
