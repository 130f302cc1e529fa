"""What happens around training.

checkpoint.py   Checkpoint      last.ckpt and best.ckpt, written atomically
collapse.py     Collapse        signs of collapse of self-distillation
ema.py          EMA             averages of networks, once an optimizer step
knn.py          KNN             nearest neighbours of frozen features
monitors.py     FiniteLoss      stops a run that diverged
                Throughput      images per second
pictures.py     AugmentedBatch  the batch as the network sees it
seeding.py      StepSeed        one seed a step
"""

from callbacks.checkpoint import Checkpoint
from callbacks.collapse import Collapse
from callbacks.ema import EMA
from callbacks.knn import KNN
from callbacks.monitors import FiniteLoss, Throughput
from callbacks.pictures import AugmentedBatch
from callbacks.seeding import StepSeed

__all__ = [
    "EMA",
    "KNN",
    "AugmentedBatch",
    "Checkpoint",
    "Collapse",
    "FiniteLoss",
    "StepSeed",
    "Throughput",
]
