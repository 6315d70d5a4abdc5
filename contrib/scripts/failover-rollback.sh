#!/bin/sh
# Takes a failover test back; the test VM is stopped. Repeatable after a kill at any line. Destroy
# the test VM only when this says nothing: its own disks count as well.
#   JOB=job-1 TEST_VM=uuid failover-rollback.sh
set -eu
R=${VOLFS:-/run/volfs}; read -r _ < "$R/version"      # fails where volfs is not mounted
trap 'exit 1' HUP INT TERM                            # dash runs no EXIT trap at a signal
J=$R/jobs/$JOB

echo "detach vm=$TEST_VM" > "$J/control"
echo "revert before-test" > "$J/control"              # all, or an error that names those missing
echo "delete-snapshot before-test" > "$J/control"
echo attach > "$J/control"
echo "reconcile vm=$TEST_VM" > "$R/control"
left=$(ls "$R/vms/$TEST_VM")                          # fails when it cannot be told
[ -z "$left" ] || echo "still on $TEST_VM: $left"
