#!/usr/bin/env bash
# Every method takes ten steps on XLA, on its CPU client, and agrees with the CPU. torch_xla wants a
# torch of its own, so this makes an environment for it (6 GB), or takes one that is there:
#
#   tests/xla/run.sh [ENVIRONMENT] [METHOD ...]
set -euo pipefail
cd "$(dirname "$0")/../.."
place=${1:-$(mktemp -d)/venv}
shift || true
if [ ! -x "$place/bin/python" ]; then
    python3 -m venv "$place"
    "$place/bin/pip" install -q "torch==2.9.*" "torch_xla==2.9.*" torchvision -e .
fi
# XLA's compiler for CPUs optimises nothing here, or it takes minutes for the graph of a step. And
# without fusion, which copies the way to a pixel every time that another operation reads it.
quick="--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true"
XLA_FLAGS="--xla_disable_hlo_passes=fusion $quick ${XLA_FLAGS:-}" PJRT_DEVICE=CPU PYTHONPATH=. \
    OMP_NUM_THREADS=${OMP_NUM_THREADS:-2} \
    "$place/bin/python" -m tests.xla.agree "$@"
