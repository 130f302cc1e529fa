"""The command, but step KILL_AT sends the process the signal KILL_WITH between two hooks."""

import os
import sys
from typing import Any

from experiments import cli
from modules import DINO, MAE, Supervised


def doom(method: Any) -> None:
    """Make its steps send the signal when it is time."""
    ordinary_step = method.training_step

    def training_step(self: Any, batch: Any, batch_idx: int) -> Any:
        if self.trainer.fit_loop.total_batch_idx == int(os.environ["KILL_AT"]):
            os.kill(os.getpid(), int(os.environ["KILL_WITH"]))
        return ordinary_step(self, batch, batch_idx)

    method.training_step = training_step


for each in (Supervised, DINO, MAE):
    doom(each)

if __name__ == "__main__":
    sys.exit(cli.main())
