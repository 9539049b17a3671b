#!/usr/bin/env bash
# Train on the machines of launch/hostfile with DeepSpeed's launcher. Start it on the first of them: it starts the
# others by pdsh and ssh, which must ask for no password, in the same folder, which must be there on all.
#
#     HOSTFILE=launch/hostfile launch/deepspeed.sh recipes/llama-3.1-70b-2of4-zero3-multinode.yaml
#
# Without pdsh, start it on each machine yourself, and tell it which line of the hostfile that machine is:
#
#     NODE_RANK=0 MASTER_ADDR=10.0.0.1 launch/deepspeed.sh recipes/llama-3.1-70b-2of4-zero3-multinode.yaml
#
# What follows the recipe goes to `thanos-lightning fit`. More: docs/scaling/multinode.md
set -euo pipefail

RECIPE=${1:?give a recipe: launch/deepspeed.sh RECIPE.yaml [arguments of thanos-lightning fit]}
HERE=$(cd "$(dirname "$0")" && pwd)
HOSTFILE=${HOSTFILE:-$HERE/hostfile}
NODES=$(grep -c '^[^#].*slots=' "$HOSTFILE")
PROCESSES=$(sed -n 's/^[^#].*slots=\([0-9]*\).*/\1/p' "$HOSTFILE" | head -n 1) # on each machine: the same on all
MASTER_ADDR=${MASTER_ADDR:-} # of the first machine; without, the launcher asks it by ssh
MASTER_PORT=${MASTER_PORT:-29500}
# export NCCL_SOCKET_IFNAME=eth0 # the network interface, where NCCL picks a wrong one
# pdsh hands on what begins with NCCL or PYTHON. Other variables go into ~/.deepspeed_env, NAME=value on a line each.

options=(--hostfile "$HOSTFILE" --master_port "$MASTER_PORT")
if [[ -n $MASTER_ADDR ]]; then options+=(--master_addr "$MASTER_ADDR"); fi
if [[ -n ${NODE_RANK:-} ]]; then options+=(--no_ssh --node_rank "$NODE_RANK"); fi
if [[ -n ${VIRTUAL_ENV:-} ]]; then options+=(--venv_script "$VIRTUAL_ENV/bin/activate"); fi

exec deepspeed "${options[@]}" --no_local_rank --no_python "$HERE/deepspeed_rank.sh" \
  "$(command -v thanos-lightning)" fit --config "$RECIPE" \
  --trainer.devices "$PROCESSES" --trainer.num_nodes "$NODES" "${@:2}"
