#!/bin/sh
# Exports what is attached, for as long as it is attached: a disk that goes is refused at its next
# open, without reload.
#   export.sh [SOCKET]
set -eu
R=${VOLFS:-/run/volfs}; read -r _ < "$R/version"      # fails where volfs is not mounted
trap 'exit 1' HUP INT TERM                            # dash runs no EXIT trap at a signal
exec nbdkit -f -U "${1:-/run/volfs-nbd.sock}" file dir="$R/exports"
