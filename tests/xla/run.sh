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
# Without fusion, by which XLA's compiler for CPUs takes longer than anyone waits for the colours of
# several views: they read the same pixels again and again, and it copies the way there every time.
XLA_FLAGS="--xla_disable_hlo_passes=fusion ${XLA_FLAGS:-}" PJRT_DEVICE=CPU PYTHONPATH=. OMP_NUM_THREADS=${OMP_NUM_THREADS:-2} \
    "$place/bin/python" -m tests.xla.agree "$@"
