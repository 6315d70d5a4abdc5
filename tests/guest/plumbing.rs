//! That the guest is one: what is asked of it is done, it is the VM it is told to be, and volfs runs in it.

use std::fs;
use std::time::Duration;

use crate::have;
use crate::machine::{Bus, Machine};

const VM: &str = "8f1f4c3e-2f0b-4a57-9d0e-1c2b3a4d5e6f";
const MIB: u64 = 1 << 20;

/// Waits in the guest until a condition of the shell holds.
fn until(machine: &Machine, condition: &str) {
    machine.ok(&format!("n=0; until {condition}; do n=$((n+1)); [ $n -lt 1000 ] || exit 1; usleep 20000; done"));
}

#[test]
fn hot_plugged_disks_change_their_names_at_a_boot() {
    if !have() {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let machine = Machine::new(VM, Bus::VirtioBlk);
    machine.boot();
    for (n, name) in ["vda", "vdb", "vdc"].into_iter().enumerate() {
        let file = dir.path().join(name);
        fs::File::create(&file).unwrap().set_len(MIB).unwrap();
        machine.plug(name, &file, MIB, &format!("serial{n}")).unwrap();
        until(&machine, &format!("[ -b /dev/{name} ]"));
    }
    let order = "cd /sys/block; cat vda/serial; echo; cat vdb/serial; echo; cat vdc/serial; echo";
    assert_eq!(machine.ok(order), "serial0\nserial1\nserial2");
    machine.reset();
    assert_eq!(machine.ok(order), "serial2\nserial1\nserial0");
}

#[test]
fn scripts_run_side_by_side_and_answer_apart() {
    if !have() {
        return;
    }
    let machine = Machine::new(VM, Bus::VirtioBlk);
    machine.boot();
    let held = machine.start("until [ -e /tmp/go ]; do usleep 10000; done; echo \"it's \\\"me\\\"\"; exit 7");
    assert_eq!(machine.run("echo é; echo to stderr >&2; false").out, "é\nto stderr\n");
    assert_eq!(machine.ok("cat /sys/class/dmi/id/product_uuid"), VM);
    assert_eq!(held.said(Duration::ZERO), None);
    machine.ok("touch /tmp/go");
    let said = held.said(crate::machine::PATIENCE).unwrap();
    assert_eq!((said.status, said.out.as_str()), (7, "it's \"me\"\n"));
}

#[test]
fn the_loop_provider_works_on_the_guests_kernel() {
    if !have() {
        return;
    }
    let machine = Machine::new(VM, Bus::VirtioBlk);
    machine.boot();
    machine.ok("volfs --log-file /tmp/log mount --background /run/volfs || { cat /tmp/log; exit 1; }");
    // A second for the record's commit is too little at times: EIO, and nothing has happened.
    machine.ok("cd /run/volfs/jobs; until mkdir a 2> /tmp/why; do grep Input/output /tmp/why || exit 1; done");
    let said = machine.ok("set -e; cd /run/volfs/jobs; echo 'create d 8M' > a/control; echo attach > a/control; \
         echo hello | dd of=a/disks/d/block conv=fsync 2> /dev/null; head -c 6 $(cat a/disks/d/device); \
         echo detach > a/control; cat a/disks/d/status; cd /; volfs unmount /run/volfs");
    assert_eq!(said, "hello\ndetached");
}
