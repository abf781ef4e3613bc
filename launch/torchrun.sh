#!/usr/bin/env bash
# Train with torchrun: the launcher that stops all ranks of all nodes, and restarts them, when one
# dies. Run the same line on every node.
#
#   launch/torchrun.sh 8 configs/quickstart.yaml                         this machine
#   NUM_NODES=4 HEAD=node1:29500 MAX_RESTARTS=3 launch/torchrun.sh 8 CONFIG --resume auto
set -euo pipefail
: "${2:?"usage: [NUM_NODES=N HEAD=host:port] launch/torchrun.sh RANKS_PER_NODE CONFIG [ARGUMENT...]"}"
ranks_per_node=$1
shift

if ! nvidia-smi -L >/dev/null 2>&1; then
  export DS_ACCELERATOR=cpu
fi
# bitscale.torchrun: torchrun, which by itself waits a quarter of an hour for a head that has gone.
# Port 0 of localhost: any free one, so that runs on one machine do not meet.
exec python -m bitscale.torchrun --nnodes "${NUM_NODES:-1}" --nproc-per-node "$ranks_per_node" \
  --rdzv-backend c10d --rdzv-endpoint "${HEAD:-localhost:0}" --rdzv-id "${RUN_ID:-bitscale}" \
  --max-restarts "${MAX_RESTARTS:-0}" -m bitscale.cli.main train "$@"
