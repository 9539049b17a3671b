#!/usr/bin/env bash
# Train under Slurm, from the repository's folder:
#
#     sbatch launch/slurm.sh recipes/llama-3.1-70b-2of4-zero3-multinode.yaml
#
# What follows the recipe goes to `thanos-lightning fit`. More: docs/scaling/multinode.md
#
#SBATCH --job-name=thanos
#SBATCH --nodes=4
#SBATCH --ntasks-per-node=8
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=12
#SBATCH --mem=0
#SBATCH --time=24:00:00
#SBATCH --output=slurm-%j.txt
set -euo pipefail

RECIPE=${1:?give a recipe: sbatch launch/slurm.sh RECIPE.yaml [arguments of thanos-lightning fit]}
VENV=${VENV:-.venv} # on a file system that all nodes see
# export NCCL_SOCKET_IFNAME=ib0 # the network interface, where NCCL picks a wrong one

# shellcheck source=/dev/null
source "$VENV/bin/activate"

# One task is one rank, so srun is all the launcher there is: Lightning reads the ranks, the first node's address and a
# port out of Slurm's variables. Every task sees all GPUs of its node (--gpus-per-node, not --gpus-per-task), since
# Lightning counts them. srun doesn't take --cpus-per-task from sbatch by itself.
exec srun --cpus-per-task="${SLURM_CPUS_PER_TASK:-1}" --kill-on-bad-exit=1 \
  thanos-lightning fit --config "$RECIPE" \
  --trainer.devices "$SLURM_NTASKS_PER_NODE" --trainer.num_nodes "$SLURM_NNODES" "${@:2}"
