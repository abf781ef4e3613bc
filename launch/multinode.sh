#!/usr/bin/env bash
# Train on several nodes with DeepSpeed's launcher over pdsh, from one of them.
#
#   launch/multinode.sh launch/hostfile.example configs/quickstart.yaml
#   IFNAME=eth0 launch/multinode.sh HOSTFILE CONFIG --resume auto
#
# Every node needs the repository and the Python environment at the same path, and ssh to it without
# a password. If a rank dies, pdsh leaves the ranks that are not communicating running; torchrun.sh
# stops them all. Interrupting this script runs `pkill -f` for the launcher on every node.
set -euo pipefail
: "${2:?"usage: [IFNAME=eth0] launch/multinode.sh HOSTFILE CONFIG [ARGUMENT...]"}"
hostfile=$1
shift

# pdsh passes on neither PATH nor most variables; DeepSpeed reads those to pass on from this file.
DS_ENV_FILE=$(mktemp)
export DS_ENV_FILE
trap 'rm -f "$DS_ENV_FILE"' EXIT
echo "PATH=$PATH" >"$DS_ENV_FILE"
if [[ -n ${IFNAME:-} ]]; then
  # On hosts with several networks NCCL and gloo each have to be told which one joins the nodes.
  printf '%s\n' "NCCL_SOCKET_IFNAME=$IFNAME" "GLOO_SOCKET_IFNAME=$IFNAME" >>"$DS_ENV_FILE"
fi
if ! nvidia-smi -L >/dev/null 2>&1; then
  export DS_ACCELERATOR=cpu
  echo "DS_ACCELERATOR=cpu" >>"$DS_ENV_FILE"
fi

deepspeed --hostfile "$hostfile" --launcher pdsh --master_port "${MASTER_PORT:-29500}" \
  --no_local_rank --module bitscale.cli.main train "$@"
