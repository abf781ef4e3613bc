#!/usr/bin/env bash
# Train on several nodes with DeepSpeed's launcher, from one of them or from a login node.
#
#   launch/multinode.sh launch/hostfile.example configs/quickstart.yaml
#   LAUNCHER=openmpi IFNAME=ib0 SSH_PORT=2222 launch/multinode.sh HOSTFILE CONFIG --resume auto
#
#   LAUNCHER     pdsh (default) or openmpi (mpirun and mpi4py on every node)
#   IFNAME       the network interface that joins the nodes; openmpi takes eth0 without it
#   SSH_PORT     if sshd does not listen on 22
#   MASTER_PORT  where ranks meet, 29500 (openmpi: any that is free)
#
# Every node needs the repository and the Python environment at the same path, and ssh to it without
# a password. Nothing here stops the other nodes' ranks when one dies or hangs: they find out by
# themselves (docs/watching.md), and interrupting pdsh runs `pkill -f` for the launcher on every node.
# `bitscale supervise` stops them all, and goes on.
set -euo pipefail
: "${2:?"usage: [LAUNCHER=pdsh|openmpi] launch/multinode.sh HOSTFILE CONFIG [ARGUMENT...]"}"
hostfile=$1
shift

if ! nvidia-smi -L >/dev/null 2>&1; then
  export DS_ACCELERATOR=cpu
fi
if [[ -n ${IFNAME:-} ]]; then
  # On hosts with several networks NCCL and gloo each have to be told which one joins the nodes.
  export NCCL_SOCKET_IFNAME=$IFNAME GLOO_SOCKET_IFNAME=$IFNAME
fi

# DeepSpeed passes on what this file holds, and little else: the allow list of docs/safety.md.
DS_ENV_FILE=$(mktemp)
export DS_ENV_FILE
trap 'rm -f "$DS_ENV_FILE"' EXIT
bitscale doctor --print-environment >"$DS_ENV_FILE"

# pdsh and DeepSpeed start the ranks of those nodes that ssh reaches, which wait for the others: ask
# first. PDSH_SSH_ARGS_APPEND has options of your own.
bitscale doctor --hostfile "$hostfile" --ssh-only \
  --ssh "ssh ${SSH_PORT:+-p $SSH_PORT} ${PDSH_SSH_ARGS_APPEND:-}"

# --force_multi: with a single host in the file DeepSpeed would start its ranks here instead.
options=(--hostfile "$hostfile" --launcher "${LAUNCHER:=pdsh}" --no_local_rank --force_multi)
if [[ $LAUNCHER == pdsh ]]; then
  # Without these an ssh connection to a node that has gone is waited for for ever.
  alive='-o ConnectTimeout=10 -o ServerAliveInterval=10 -o ServerAliveCountMax=3'
  export PDSH_SSH_ARGS_APPEND="${PDSH_SSH_ARGS_APPEND:-} $alive"
  options+=(--master_port "${MASTER_PORT:-29500}" ${SSH_PORT:+--ssh_port "$SSH_PORT"})
else
  # mpirun's own connections, and those of the ranks' discovery, over the same interface.
  ifname=${IFNAME:-eth0}
  mca="--mca btl_tcp_if_include $ifname --mca oob_tcp_if_include $ifname"
  mca+=" --mca oob_tcp_keepalive_time 10 --mca oob_tcp_keepalive_intvl 10 --mca oob_tcp_keepalive_probes 3"
  # ssh gives a node up later than that: of an ssh that ended mpirun says neither host nor rank.
  alive='-o ConnectTimeout=10 -o ServerAliveInterval=20 -o ServerAliveCountMax=3 -o LogLevel=INFO'
  mca+=" --mca plm_rsh_args '${SSH_PORT:+-p $SSH_PORT }$alive'"
  options+=(--no_ssh_check "--launcher_args=$mca")
  # DeepSpeed would ask the first node for its address, which openmpi's ranks find out themselves.
  options+=(--master_addr "${MASTER_ADDR:-unused}")
fi
deepspeed "${options[@]}" --module bitscale.cli.main train "$@"
