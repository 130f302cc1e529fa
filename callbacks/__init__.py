"""What happens around training.

checkpoint.py   Checkpoint      last.ckpt and best.ckpt, written atomically
ema.py          EMA             averages of networks, once an optimizer step
monitors.py     FiniteLoss      stops a run that diverged
                Throughput      images per second
pictures.py     AugmentedBatch  the batch as the network sees it
probes.py       OnlineProbe     a linear classifier beside any method
seeding.py      StepSeed        one seed a step

and what they share with methods: `standardize`, `tally`.
"""

from callbacks.checkpoint import Checkpoint
from callbacks.ema import EMA
from callbacks.monitors import FiniteLoss, Throughput
from callbacks.pictures import AugmentedBatch
from callbacks.probes import OnlineProbe
from callbacks.seeding import StepSeed

__all__ = [
    "EMA",
    "AugmentedBatch",
    "Checkpoint",
    "FiniteLoss",
    "OnlineProbe",
    "StepSeed",
    "Throughput",
]
