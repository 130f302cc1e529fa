#!/usr/bin/env bash
# One run on a SLURM cluster. Out of time or preempted, it writes last.ckpt, is queued again, and
# goes on in the same directory.
#
#   sbatch --nodes 2 experiments/cluster/slurm.sh runs/big --config experiments/dino/vit_s16.yaml
#
# The first argument is the directory of the run, on a disk that all nodes see. What stands below
# is overridden by options of sbatch.
#SBATCH --job-name=patchlight
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=8
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=12
#SBATCH --time=24:00:00
#SBATCH --signal=TERM@180
#SBATCH --requeue
#SBATCH --open-mode=append
set -uo pipefail
run=$1
shift
srun --kill-on-bad-exit=1 python -m experiments.cli fit "$@" --into "$run" \
    --trainer.devices "$SLURM_NTASKS_PER_NODE" --trainer.num_nodes "$SLURM_NNODES"
code=$?
# 143 says that the run was stopped by SIGTERM, with its checkpoint written, and is not finished.
if [ "$code" -eq 143 ]; then
    scontrol requeue "$SLURM_JOB_ID"
fi
exit "$code"
