#!/usr/bin/env bash
# One run on all GPUs of one or several machines; a rank that dies restarts all of them, and the
# run goes on from its last checkpoint.
#
#   experiments/cluster/torchrun.sh RUN --config experiments/dino/vit_s16.yaml [fit options]
#
# RUN is the directory of the run, on a disk that all machines see. Several machines: start the
# same line on each, with NODES and HEAD (the name of one of them) set.
#
#   NODES=2 HEAD=node01 experiments/cluster/torchrun.sh runs/big --config ...
set -euo pipefail
run=$1
shift
nodes=${NODES:-1}
each=${GPUS:-$(nvidia-smi --list-gpus | wc -l)}
# With a store shared by all attempts, a restarted rank may find the addresses of dead ones.
export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1
exec torchrun --nnodes "$nodes" --nproc-per-node "$each" --max-restarts "${RESTARTS:-3}" \
    --rdzv-backend c10d --rdzv-endpoint "${HEAD:-localhost}:${PORT:-29400}" --rdzv-id "$(basename "$run")" \
    -m experiments.cli fit "$@" --into "$run" \
    --trainer.devices "$each" --trainer.num_nodes "$nodes"
