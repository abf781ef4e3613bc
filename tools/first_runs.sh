#!/usr/bin/env bash
# Three runs of equal tokens on one text, side by side, and the report that compares them.
#
#   tools/first_runs.sh PATH_TO_TEXT [OUT]      (about a quarter of an hour on two CPU cores)
#
# Run it again after an interruption: finished work is kept, runs resume.
set -euo pipefail
text=${1:?usage: tools/first_runs.sh PATH_TO_TEXT [OUT]}
out=${2:-runs/first-runs}
config="$(dirname "${BASH_SOURCE[0]}")/../configs/first-runs.yaml"
pids=()

train() {
  local name=$1
  shift
  bitscale train "$config" --resume auto "run.dir=$out/$name" \
    "data.corpora=[{path: $out/corpus}]" "$@" 2>&1 | sed -u "s/^/$name: /" &
  pids+=($!)
}

bitscale prepare "$text" --out "$out/corpus" --vocab-size 2048 --split 0.97,0.03,0
train sixteen-bit transition.at=null
train ternary transition.at.step=0 transition.ramp.shape=none transition.ramp.over.steps=0
train transition
for pid in "${pids[@]}"; do
  wait "$pid"
done
for name in sixteen-bit ternary transition; do
  bitscale eval "$out/$name"
done
bitscale report "$out/sixteen-bit" "$out/ternary" "$out/transition" --out "$out/report"
