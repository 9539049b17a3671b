#!/usr/bin/env bash
# What only a GPU tells: the tests that need one and the benchmarks on it, in at most 55 minutes. What has been finished
# on this hardware is not repeated. The environment needs '.[quickstart,test]'.
#
#     benchmarks/gpu.sh                    # into benchmarks/results/<the GPU's name>
#     DEVICE=cpu benchmarks/gpu.sh FOLDER  # at the smallest sizes, to see that all of it runs
set -euo pipefail

HERE=$(cd "$(dirname "$0")" && pwd)
DEVICE=${DEVICE:-cuda}
MODEL=${MODEL:-smollm2-135m}
TEXT=${TEXT:-python-reference}
if [ "$DEVICE" = cuda ] && ! python -c 'import sys, torch; sys.exit(not torch.cuda.is_available())'; then
  echo "benchmarks/gpu.sh: no GPU is found by torch: run it where one is, or give DEVICE=cpu to see that it runs" >&2
  exit 1
fi
OUT=${1:-$HERE/results}/$(python "$HERE/machine.py" "$DEVICE")
mkdir -p "$OUT"

failed=()
step() { # NAME MINUTES COMMAND...
  local name=$1 minutes=$2
  if [ -e "$OUT/$name.done" ]; then
    echo "== $name: finished before"
    return
  fi
  printf '== %s, at most %d minutes (%s)\n' "$name" "$minutes" "$(date +%T)"
  if timeout "${minutes}m" "${@:3}" 2>&1 | tee "$OUT/$name.log"; then touch "$OUT/$name.done"; else failed+=("$name"); fi
}

if [ "$DEVICE" = cuda ]; then
  solver=(--shapes 2048x2048 4096x4096 14336x4096 --repeats 3)
  enforcement=(--stages 0 2 3)
  one_shot=()
  recovery=(--rates 3e-4)
  compiled=()
  adapters=()
  runtimes=(--model llama-3.2-1b-shape --dtype float16 --repeats 5)
else
  export THANOS_CUDA=dry
  solver=(--shapes 64x64 --repeats 1)
  enforcement=(--stages 3 --layers 1 --vocabulary 512 --steps 1 --length 8)
  one_shot=(--methods thanos --sequences 2 --length 16 --validation-sequences 2)
  compiled=(--layers 1)
  adapters=(--layers 1 --vocabulary 512 --threads 1)
  runtimes=(--model smallest-shape --repeats 1 --threads 1)
  recovery=(--rates 3e-4 --steps 4 --batch 2 --length 16 --calibration 4 --validation 4)
fi
on=(--device "$DEVICE" --output "$OUT")

step tests 12 python -m pytest -n 0 -m cuda "$HERE/../tests/cuda"
step solver 8 python "$HERE/solver.py" "${solver[@]}" "${on[@]}"
step enforcement 5 python "$HERE/enforcement.py" "${enforcement[@]}" "${on[@]}"
step compiled 5 python "$HERE/compiled.py" "${compiled[@]}" "${on[@]}"
step adapters 3 python "$HERE/adapters.py" "${adapters[@]}" "${on[@]}"
step runtimes 7 python "$HERE/runtimes.py" --runtimes transformers "torch 2:4" "${runtimes[@]}" "${on[@]}"
step one_shot 5 python "$HERE/one_shot.py" --model "$MODEL" --text "$TEXT" "${one_shot[@]}" "${on[@]}"
step recovery 10 python "$HERE/recovery.py" --model "$MODEL" --text "$TEXT" --patterns 2:4 --contenders "first step" \
  --seeds 1 "${recovery[@]}" --runs "$OUT/recovery" "${on[@]}"

if [ ${#failed[@]} -gt 0 ]; then
  echo "failed: ${failed[*]}; what they said is in $OUT"
  exit 1
fi
echo "finished: $OUT"
