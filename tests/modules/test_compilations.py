"""What is compiled once serves every batch, without a break."""

import subprocess
import sys

import pytest

from experiments.cli import compile_backbones
from modules import Transformer
from tests.compiled import NETWORKS, OF_ANY_SIZE
from tests.runs import ROOT, environment


@pytest.mark.slow
def test_one_compilation_of_each() -> None:
    """In a process of its own: a compiler cannot trace the shape checks of the tests."""
    command = [sys.executable, "-m", "tests.compiled"]
    done = subprocess.run(
        command, capture_output=True, text=True, cwd=ROOT, env=environment(), check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    methods = ("supervised", "token labels", "mae", "dino", "moco")
    expected = [f"{name} 1" for name in NETWORKS]
    expected += [f"{name} 2" for name in (*OF_ANY_SIZE, "symbols")]
    expected += [f"{name} 1" for name in ("groups", "masks", *methods)]
    assert done.stdout.splitlines() == expected


def test_a_method_without_a_backbone_is_not_compiled() -> None:
    with pytest.raises(ValueError, match=r"--compile true compiles .* Transformer has none"):
        compile_backbones(Transformer())
