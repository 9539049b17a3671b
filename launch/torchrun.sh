#!/usr/bin/env bash
# Train on one or several machines with torchrun. Start it on each of them, within a few minutes, with the same
# arguments and each machine's own NODE_RANK:
#
#     NODES=2 NODE_RANK=0 MASTER_ADDR=10.0.0.1 launch/torchrun.sh recipes/llama-3.1-8b-2of4-zero3.yaml    # on 10.0.0.1
#     NODES=2 NODE_RANK=1 MASTER_ADDR=10.0.0.1 launch/torchrun.sh recipes/llama-3.1-8b-2of4-zero3.yaml    # on another
#
# What follows the recipe goes to `thanos-lightning fit`. More: docs/scaling/multinode.md
set -euo pipefail

RECIPE=${1:?give a recipe: launch/torchrun.sh RECIPE.yaml [arguments of thanos-lightning fit]}
NODES=${NODES:-1}
PROCESSES=${PROCESSES:-8} # on each machine: its GPUs
NODE_RANK=${NODE_RANK:-0}
MASTER_ADDR=${MASTER_ADDR:-127.0.0.1} # of the machine with NODE_RANK=0, as the others reach it
MASTER_PORT=${MASTER_PORT:-29500}
# export NCCL_SOCKET_IFNAME=eth0 # the network interface, where NCCL picks a wrong one
# export GLOO_SOCKET_IFNAME=eth0 # the same for gloo, which CPUDeepSpeed uses

# The address is given, not found by a rendezvous, which would go by host names that other machines may not resolve. No
# restarts: a training that crashed is resumed from a checkpoint, with --ckpt_path.
exec torchrun \
  --nnodes "$NODES" --nproc-per-node "$PROCESSES" --node-rank "$NODE_RANK" \
  --master-addr "$MASTER_ADDR" --master-port "$MASTER_PORT" --max-restarts 0 \
  --no-python "$(command -v thanos-lightning)" fit --config "$RECIPE" \
  --trainer.devices "$PROCESSES" --trainer.num_nodes "$NODES" "${@:2}"
