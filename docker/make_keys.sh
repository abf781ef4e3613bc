#!/bin/sh
# Throw-away keys for the nodes of docker/compose.yaml: one to log in with, one that the nodes show.
set -eu
cd "$HOME/.ssh"
umask 077
if [ ! -f config ]; then
  ssh-keygen -q -t ed25519 -N '' -f id_ed25519
  ssh-keygen -q -t ed25519 -N '' -f host_key
  echo "[node1]:2222,[node2]:2222 $(cut -d ' ' -f 1,2 host_key.pub)" >known_hosts
  printf 'Host node*\n  Port 2222\n' >config
fi
