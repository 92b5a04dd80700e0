#!/usr/bin/env bash
# Become a machine of the rehearsal: node.sh NAME ADDRESS GATEWAY FOLDER COMMAND...
# Started in namespaces of its own (mounts, network, processes, host name), of which all of this is private.
set -euo pipefail

name=$1 address=$2 gateway=$3 folder=$4
shift 4

echo "$name" > /proc/sys/kernel/hostname
printf '127.0.0.1 localhost\n%s %s\n' "$address" "$name" > "$folder/hosts"
mount --bind "$folder/hosts" /etc/hosts
# A driver finds its raylet through files in /tmp/ray: with one for all nodes it would take another node's. The rest of
# /tmp stays: the checkout may lie there.
mkdir -p /tmp/ray
mount --bind "$folder/tmp" /tmp/ray
mount -t tmpfs -o size=256m tmpfs /dev/shm

# The cable is plugged in from outside.
until ip link show eth0 > /dev/null 2>&1; do sleep 0.05; done
ip link set lo up
ip addr add "$address/24" dev eth0
ip link set eth0 up
ip route add default via "$gateway"

# The environment of real nodes: authentication, and the interface for gloo.
path=$PATH
. "$(dirname "$0")/../node_env.sh"
export PATH=$path

exec "$@"
