#!/usr/bin/env bash
# Train on this machine with DeepSpeed's launcher: one rank a GPU, or gloo ranks without GPU.
#
#   launch/local.sh 8 configs/quickstart.yaml
#   launch/local.sh 2 configs/quickstart.yaml --resume auto train.steps=200
#   MASTER_PORT=29501 launch/local.sh ...     beside another run
#
# To stop it, signal the whole process group (Ctrl-C, or kill -- -PGID): a signal to the deepspeed
# command alone ends only that, and the ranks train on.
set -euo pipefail
: "${2:?"usage: launch/local.sh NUM_RANKS CONFIG [ARGUMENT...]"}"
num_ranks=$1
shift

# Without a GPU DeepSpeed has to be told that ranks are processes on cores.
if ! nvidia-smi -L >/dev/null 2>&1; then
  export DS_ACCELERATOR=cpu
fi
# --no_local_rank: the launcher would otherwise append --local_rank=N to bitscale's arguments.
exec deepspeed --num_gpus "$num_ranks" --master_port "${MASTER_PORT:-29500}" --no_local_rank \
  --module bitscale.cli.main train "$@"
