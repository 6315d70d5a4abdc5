//! That the guest is a guest: it boots, its disks come and go with their serials, and volfs runs in it.

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

fn disks_come_and_go(bus: Bus, name: &str, serial_of: &str) {
    let dir = tempfile::tempdir().unwrap();
    let file = |n: u64| {
        let path = dir.path().join(format!("disk{n}"));
        fs::File::create(&path).unwrap().set_len((n + 1) * MIB).unwrap();
        path
    };
    let machine = Machine::new(VM, bus);
    machine.plug("root", &file(0), MIB, "00000000000000000000").unwrap();
    machine.boot();
    assert_eq!(machine.ok("cat /sys/class/dmi/id/product_uuid"), VM);
    let (first, second) = (format!("{name}b"), format!("{name}c"));
    for (n, device, serial) in [(1, &first, "3c9a6f0e5b7d4e1a8f22"), (2, &second, "4d9a6f0e5b7d4e1a8f22")] {
        machine.plug(&format!("disk{n}"), &file(n), (n + 1) * MIB, serial).unwrap();
        // One after the other: two at once get their names in any order.
        until(&machine, &format!("[ -b /dev/{device} ]"));
        assert!(machine.ok(&format!("cat /sys/block/{device}/{serial_of}")).ends_with(serial));
        assert_eq!(machine.ok(&format!("cat /sys/block/{device}/size")), ((n + 1) * 2048).to_string());
    }
    machine.ok(&format!("echo 'from the guest' | dd of=/dev/{second} conv=fsync"));
    assert!(fs::read(dir.path().join("disk2")).unwrap().starts_with(b"from the guest\n"));

    machine.unplug("disk1").unwrap();
    until(&machine, &format!("[ ! -e /sys/block/{first} ]"));
    machine.plug("disk1-again", &dir.path().join("disk1"), 2 * MIB, "3c9a6f0e5b7d4e1a8f22").unwrap();
    until(&machine, &format!("[ -b /dev/{first} ]"));
    machine.resize("disk1-again", 8 * MIB).unwrap();
    until(&machine, &format!("[ $(cat /sys/block/{first}/size) = 16384 ]"));
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
fn virtio_blk_disks_come_and_go_with_their_serials() {
    if have() {
        disks_come_and_go(Bus::VirtioBlk, "vd", "serial");
    }
}

#[test]
fn virtio_scsi_disks_come_and_go_with_their_serials() {
    if have() {
        disks_come_and_go(Bus::VirtioScsi, "sd", "device/vpd_pg80");
    }
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
    let said =
        machine.ok("set -e; cd /run/volfs/jobs; mkdir a; echo 'create d 8M' > a/control; echo attach > a/control; \
         echo hello | dd of=a/disks/d/block conv=fsync 2> /dev/null; head -c 6 $(cat a/disks/d/device); \
         echo detach > a/control; cat a/disks/d/status; cd /; volfs unmount /run/volfs");
    assert_eq!(said, "hello\ndetached");
}
