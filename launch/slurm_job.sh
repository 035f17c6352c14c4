#!/usr/bin/env bash
# The job that slurm.sh submits; its arguments are those of worldlm_jax.main.
set -euo pipefail

# JAX would give a process that Slurm started one GPU alone.
JAX_LOCAL_DEVICE_IDS=$(seq -s, 0 $((SLURM_GPUS_ON_NODE - 1)))
export JAX_LOCAL_DEVICE_IDS PYTHONUNBUFFERED=1
# srun does not take this over from sbatch.
if [[ ${SLURM_CPUS_PER_TASK:-} ]]; then export SRUN_CPUS_PER_TASK=$SLURM_CPUS_PER_TASK; fi

# No task is killed because another has ended first: all end with 75 one after the other, and JAX notices a crash.
code=0
srun --ntasks-per-node=1 --kill-on-bad-exit=0 --wait=0 \
  .venv/bin/python -m worldlm_jax.main --distributed "$@" || code=$?

# scancel ends this script too, so that a job that somebody cancels is not put back.
if [[ $code == 75 ]]; then scontrol requeue "$SLURM_JOB_ID"; fi
exit "$code"
