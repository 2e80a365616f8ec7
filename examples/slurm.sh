#!/bin/bash
# Luthier under Slurm: one launcher on each node, saved and queued again before the time is over.
#   sbatch --nodes 2 examples/slurm.sh run.yaml
#SBATCH --job-name=luthier
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --time=24:00:00
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --signal=B:TERM@300

# 300 seconds before the end Slurm sends SIGTERM to this script, which hands it on: every process finishes its
# step, the run is saved, and the job goes back into the queue. checkpoint.resume=auto then goes on.
set -u
file=${1:?usage: sbatch slurm.sh run.yaml}
head=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)

# --max-restarts: a process that dies starts again with all others, on this allocation
srun --kill-on-bad-exit=0 torchrun \
  --nnodes "$SLURM_NNODES" --nproc-per-node 8 --max-restarts 3 \
  --rdzv-id "$SLURM_JOB_ID-${SLURM_RESTART_COUNT:-0}" --rdzv-backend c10d --rdzv-endpoint "$head:29500" \
  -m luthier finetune "$file" checkpoint.resume=auto &
step=$!

stop() {
  scancel --signal=TERM "$SLURM_JOB_ID.0"
  wait "$step"
  scontrol requeue "$SLURM_JOB_ID"
}
trap stop TERM
wait "$step"
