#!/usr/bin/env bash
# Submits training on the GPUs of a Slurm cluster, one process per node, from a login node:
#
#   bash launch/slurm.sh --nodes=8 --gpus-per-node=8 --cpus-per-task=64 --time=24:00:00 --partition=gpu --account=us \
#     --config=configs/folder.py --workdir=runs/mine [...]
#
# Installs the locked versions with JAX for CUDA first, once; the repository, the work directory and the texts have to
# lie where all nodes see them. --grace seconds (120) before the time is up the run is asked to save everything and to
# end, and is then put back into the queue, where it resumes. That must be longer than a phase of training takes.
#
#   --nodes, --gpus-per-node, --time      as sbatch has them
#   --cpus-per-task, --partition, --account, --job-name    likewise; may be left out
#   --cuda=cuda12   or cuda13 (by the nodes' driver): which JAX is installed
#   --dry-run       prints the commands instead
#
# Everything else goes to worldlm_jax.main. sbatch takes its other options from variables such as SBATCH_QOS and
# SBATCH_CONSTRAINT. Relative paths start from the root of the repository. Environment: PYTHON=, see setup.sh
source "$(dirname -- "${BASH_SOURCE[0]}")/remote.sh"

nodes='' gpus_per_node='' time='' cpus_per_task='' partition='' account='' job_name=worldlm_jax cuda=cuda12 grace=120
parse "nodes gpus_per_node time cpus_per_task partition account job_name cuda grace" "" "$@"
need '' nodes gpus-per-node time
if [[ $cuda != cuda12 && $cuda != cuda13 ]]; then bad_input "--cuda=$cuda: expected cuda12 or cuda13"; fi
need_training

options=("--nodes=$nodes" --ntasks-per-node=1 "--gpus-per-node=$gpus_per_node" "--time=$time" "--job-name=$job_name")
if [[ $cpus_per_task ]]; then options+=("--cpus-per-task=$cpus_per_task"); fi
if [[ $partition ]]; then options+=("--partition=$partition"); fi
if [[ $account ]]; then options+=("--account=$account"); fi
# Without B: the signal goes to the processes themselves. srun would answer it by killing them.
options+=("--signal=TERM@$grace" --requeue --open-mode=append "--output=$job_name-%j.log" "--chdir=$PWD")

perform bash launch/worker.sh install "$cuda"
perform sbatch "${options[@]}" launch/slurm_job.sh "${arguments[@]}"
