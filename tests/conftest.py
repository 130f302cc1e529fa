"""Shapes in signatures are checked in every test."""

import os

import torch
from jaxtyping import install_import_hook

from tests import typecheck

# Two workers of pytest-xdist share the machine; each test then computes on one thread.
os.environ.setdefault("OMP_NUM_THREADS", "1")
torch.set_num_threads(1)

install_import_hook(["modules", "datamodules", "callbacks"], f"{typecheck.__name__}.checker")
