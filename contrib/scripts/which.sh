#!/bin/sh
# Which volume is where: of a job, or of devices.
#   JOB=job-1 which.sh
#   which.sh vdb vdc
set -eu
R=${VOLFS:-/run/volfs}; read -r _ < "$R/version"      # fails where volfs is not mounted
trap 'exit 1' HUP INT TERM                            # dash runs no EXIT trap at a signal

[ $# -gt 0 ] || cat "$R/jobs/$JOB/table"              # job, disk, uuid, name, status, device, vm, size
for dev in "$@"; do
    dev=${dev#/dev/}
    volume=$(readlink "$R/devices/$dev")              # fails where the device is no volume's
    printf '%s\t%s\n' "$dev" "$volume"
done
