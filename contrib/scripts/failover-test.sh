#!/bin/sh
# Hands all disks of a job to a test VM that is not running yet, with a snapshot to come back to.
# Detached before the snapshot: one of an attached volume would hold this VM's queue in the cloud
# for as long as it takes.
#   JOB=job-1 TEST_VM=uuid OS_DISK=disk-2000 failover-test.sh
set -eu
R=${VOLFS:-/run/volfs}; read -r _ < "$R/version"      # fails where volfs is not mounted
trap 'exit 1' HUP INT TERM                            # dash runs no EXIT trap at a signal
J=$R/jobs/$JOB; D=$J/disks
: "$TEST_VM" "$OS_DISK"

trap 'echo "detach vm=$TEST_VM" > "$J/control" && echo attach > "$J/control"' EXIT
echo detach > "$J/control"
echo "snapshot before-test" > "$J/control"            # all volumes as one set, or none
echo "attach vm=$TEST_VM root" > "$D/$OS_DISK/control"
for d in "$D"/*; do
    [ "${d##*/}" = "$OS_DISK" ] || echo "attach vm=$TEST_VM" > "$d/control"
done
trap - EXIT
