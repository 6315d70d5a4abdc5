#!/bin/sh
# Hands the volumes of a VM to its next job, with their disk names.
#   JOB=job-1 NEW=job-2 next-job.sh
set -eu
R=${VOLFS:-/run/volfs}; read -r _ < "$R/version"      # fails where volfs is not mounted
trap 'exit 1' HUP INT TERM                            # dash runs no EXIT trap at a signal

[ -d "$R/jobs/$NEW" ] || mkdir "$R/jobs/$NEW"
echo "move $NEW" > "$R/jobs/$JOB/control"
