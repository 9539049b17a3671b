#!/usr/bin/env bash
# What launch/deepspeed.sh starts for each process. It tells Lightning which machine this is: DeepSpeed's launcher says
# so in CROSS_RANK, Lightning reads NODE_RANK, and without it every machine would take itself for the first.
set -euo pipefail
export NODE_RANK=$CROSS_RANK
exec "$@"
