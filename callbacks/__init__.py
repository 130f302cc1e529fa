"""What happens around training.

checkpoint.py   Checkpoint      last.ckpt and best.ckpt, written atomically
collapse.py     Collapse        signs of collapse of self-distillation
ema.py          EMA             averages of networks, once an optimizer step
host.py         Progress        the progress bar, which waits for no step
knn.py          KNN             nearest neighbours of frozen features
monitors.py     FiniteLoss      stops a run that diverged
pictures.py     AugmentedBatch  the batch as the network sees it
                Pictures        what the method draws of held-out images
probes.py       OnlineProbe     a linear classifier beside any method
score_maps.py   ScoreMaps       label maps of a teacher, written while it predicts
seeding.py      StepSeed        one seed a step
stopping.py     Stopping        SIGTERM, after the same step on all devices
throughput.py   Throughput      images and tokens per second, utilisation, waiting, memory

and what they share with methods and commands: `checkpoint_files`, `standardize`, `tally`.
"""

from callbacks.checkpoint import Checkpoint
from callbacks.collapse import Collapse
from callbacks.ema import EMA
from callbacks.host import Progress
from callbacks.knn import KNN
from callbacks.monitors import FiniteLoss
from callbacks.pictures import AugmentedBatch, Pictures
from callbacks.probes import OnlineProbe
from callbacks.score_maps import ScoreMaps
from callbacks.seeding import StepSeed
from callbacks.stopping import Stopping
from callbacks.throughput import Throughput

__all__ = [
    "EMA",
    "KNN",
    "AugmentedBatch",
    "Checkpoint",
    "Collapse",
    "FiniteLoss",
    "OnlineProbe",
    "Pictures",
    "Progress",
    "ScoreMaps",
    "StepSeed",
    "Stopping",
    "Throughput",
]
