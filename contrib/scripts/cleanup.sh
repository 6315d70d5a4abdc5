#!/bin/sh
# Cleans up one failed job, and only that one: its volumes are deleted.
#   JOB=job-1 cleanup.sh
set -eu
R=${VOLFS:-/run/volfs}; read -r _ < "$R/version"      # fails where volfs is not mounted
trap 'exit 1' HUP INT TERM                            # dash runs no EXIT trap at a signal
J=$R/jobs/$JOB

echo "destroy $JOB" > "$J/control" || { cat "$J/error" >&2; exit 1; }
