# What every process of a node needs to know. Sourced by ray_cluster.yaml's start commands and by login shells.

export PATH="$HOME/retinaray/.venv/bin:$PATH"

# Explicit, because the default differs between ways of starting Ray. The token lies in ~/.ray/auth_token.
export RAY_AUTH_MODE=token
export RAY_USAGE_STATS_ENABLED=0
# `ray job stop` kills after three seconds by default; a training then has no time for its checkpoint.
export RAY_JOB_STOP_WAIT_TIME_S=120

if [ -r "$HOME/.retinaray_region" ]; then
    . "$HOME/.retinaray_region"
fi

# A host name that resolves to 127.0.0.1 makes gloo fail, and docker's bridge makes NCCL fail: both get the interface
# of the default route. gloo takes a name only, no patterns.
_retinaray_interface="$(ip -o -4 route show default 2> /dev/null | awk '{print $5; exit}')"
if [ -n "$_retinaray_interface" ]; then
    export NCCL_SOCKET_IFNAME="$_retinaray_interface"
    export GLOO_SOCKET_IFNAME="$_retinaray_interface"
fi
unset _retinaray_interface
