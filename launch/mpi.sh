#!/usr/bin/env bash
# Train with mpirun alone; ranks find each other with mpi4py (pip install 'bitscale[mpi]').
#
#   launch/mpi.sh 16 configs/quickstart.yaml                            in an allocation
#   launch/mpi.sh 16 --hostfile mpi-hosts configs/quickstart.yaml       lines: node1 slots=8
#   IFNAME=ib0 SSH_PORT=2222 launch/mpi.sh 16 --hostfile mpi-hosts CONFIG --resume auto
#
# For Open MPI. When a rank or a node dies, mpirun ends all others.
set -euo pipefail
: "${2:?"usage: [IFNAME=ib0] [SSH_PORT=2222] launch/mpi.sh RANKS [--hostfile FILE] CONFIG [ARGUMENT...]"}"
ranks=$1
shift
options=()
if [[ $1 == --hostfile ]]; then
  options+=(--hostfile "$2")
  shift 2
fi

if ! nvidia-smi -L >/dev/null 2>&1; then
  export DS_ACCELERATOR=cpu
fi
if [[ -n ${IFNAME:-} ]]; then
  export NCCL_SOCKET_IFNAME=$IFNAME GLOO_SOCKET_IFNAME=$IFNAME
  options+=(--mca btl_tcp_if_include "$IFNAME" --mca oob_tcp_if_include "$IFNAME")
fi
# A node that has gone is noticed by its silence: by mpirun and then only by ssh, for of an ssh that
# ended mpirun says neither host nor rank.
alive='-o ConnectTimeout=10 -o ServerAliveInterval=20 -o ServerAliveCountMax=3 -o LogLevel=INFO'
options+=(--mca oob_tcp_keepalive_time 10 --mca oob_tcp_keepalive_intvl 10
  --mca oob_tcp_keepalive_probes 3 --mca plm_rsh_args "${SSH_PORT:+-p $SSH_PORT }$alive")
# The allow list of docs/safety.md; mpirun passes on nothing that is not named. A value that other
# hosts would not read ends this script here.
environment=$(bitscale doctor --print-environment)
while IFS='=' read -r name _; do
  if [[ -n $name ]]; then
    options+=(-x "$name")
  fi
done <<<"$environment"

# Cores are shared out by bitscale (engine.num_threads), not bound by mpirun.
exec mpirun -n "$ranks" --bind-to none "${options[@]}" \
  "$(command -v python)" -u -m bitscale.cli.main train "$@"
