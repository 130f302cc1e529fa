"""The command, in which rank 1 is killed in step 4 of the first attempt under torchrun."""

import os
import signal
import sys
from pathlib import Path
from typing import Any

import modules
from experiments import cli

RUN = Path(sys.argv[sys.argv.index("--into") + 1]) if "--into" in sys.argv else Path()


def main() -> int:
    ordinary_step: Any = modules.Supervised.training_step

    def training_step(self: Any, batch: Any, batch_idx: int) -> Any:
        rank, attempt = os.environ["RANK"], os.environ["TORCHELASTIC_RESTART_COUNT"]
        if (rank, attempt, self.trainer.global_step) == ("1", "0", 4):
            (RUN / "killed.txt").write_text("rank 1 at step 4, the first time")
            os.kill(os.getpid(), signal.SIGKILL)
        return ordinary_step(self, batch, batch_idx)

    modules.Supervised.training_step = training_step  # type: ignore[method-assign]
    return cli.main()


if __name__ == "__main__":
    sys.exit(main())
