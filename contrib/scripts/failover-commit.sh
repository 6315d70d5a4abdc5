#!/bin/sh
# Commits a live failover: the volumes belong to the new VM now. Nothing is detached.
#   JOB=job-1 failover-commit.sh
set -eu
R=${VOLFS:-/run/volfs}; read -r _ < "$R/version"      # fails where volfs is not mounted
trap 'exit 1' HUP INT TERM                            # dash runs no EXIT trap at a signal
J=$R/jobs/$JOB

for v in "$J"/volumes/*; do
    [ -d "$v" ] || continue                           # none is left: a second run
    echo "release ${v##*/}" > "$v/control"
done
rmdir "$J"
