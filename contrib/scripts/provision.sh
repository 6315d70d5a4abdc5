#!/bin/sh
# Gives a job its disks, attaches them, and copies images onto them. What exists is kept and what
# is attached succeeds, so the first run and every later one are the same.
#   JOB=job-1 VM_NAME=web1 provision.sh disk-2000=40G=src0.raw disk-2001=10G
set -eu
R=${VOLFS:-/run/volfs}; read -r _ < "$R/version"      # fails where volfs is not mounted
trap 'exit 1' HUP INT TERM                            # dash runs no EXIT trap at a signal
J=$R/jobs/$JOB; D=$J/disks

[ -d "$J" ] || mkdir "$J"
echo "$VM_NAME" > "$J/vm_name"
for d in "$@"; do                                     # DISK=SIZE[=IMAGE]
    name=${d%%=*}; rest=${d#*=}
    [ -e "$D/$name" ] || echo "create $name ${rest%%=*}" > "$J/control"
done
echo attach > "$J/control"                            # all, side by side

for d in "$@"; do
    name=${d%%=*}; rest=${d#*=}
    case $rest in *=*) ;; *) continue ;; esac
    was=$(cat "$D/$name/incarnation")
    dd if="${rest#*=}" of="$D/$name/block" bs=1M conv=fsync
    [ "$was" = "$(cat "$D/$name/incarnation")" ]      # the same disk from the first byte to the last
done
