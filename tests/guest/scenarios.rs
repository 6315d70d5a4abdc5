//! The main job in a real guest: provision, write, detach, and never another volume's bytes.

use std::collections::HashSet;
use std::fs::File;

use fakecloud::{Effect, Fault, Kind, Moment};

use crate::have;
use crate::machine::{Bus, PATIENCE};
use crate::site::{FILL, Site};

/// Bytes that each volume is filled with.
const LENGTH: usize = 256 << 10;

/// Two volumes swap their names, and one gets a name that the other has just freed: each has its own
/// bytes under either, also as the cloud's storage has it.
fn a_name_is_not_an_identity(bus: Bus) {
    let site = Site::start(bus);
    let volumes = site.job(&["one", "two"]);
    site.ok("echo attach > disks/one/control && echo attach > disks/two/control");
    assert_eq!(site.ok("cat disks/one/device disks/two/device"), format!("{}\n{}", site.node(1), site.node(2)));
    for (disk, volume) in ["one", "two"].iter().zip(&volumes) {
        site.ok(&format!("{FILL}; fill {volume} {LENGTH} disks/{disk}/block"));
        site.holds(volume, LENGTH).unwrap();
    }
    site.ok("echo detach > control");
    assert_eq!(site.ok(&format!("ls -d {} {} 2> /dev/null || true", site.node(1), site.node(2))), "");
    site.refused("cat disks/one/device", "No such device");
    assert!(site.cloud.data_volumes().iter().all(|v| v.vm.is_none()));

    site.ok("echo attach > disks/two/control && echo attach > disks/one/control");
    assert_eq!(site.ok("cat disks/two/device disks/one/device"), format!("{}\n{}", site.node(1), site.node(2)));
    for (disk, volume) in ["one", "two"].iter().zip(&volumes) {
        assert_eq!(site.ok(&format!("head -n 1 disks/{disk}/block")), *volume);
        assert_eq!(site.ok(&format!("head -n 1 $(cat disks/{disk}/device)")), *volume);
    }
    site.ok("echo 'resize 2G' > disks/one/control");
    assert_eq!(site.ok("blockdev --getsize64 disks/one/block"), (2u64 << 30).to_string());
    site.ok("echo detach > control");
    let first = site.node(1);
    for (disk, volume, other) in [("one", &volumes[0], "two"), ("two", &volumes[1], "one")] {
        site.ok(&format!("echo attach > disks/{disk}/control"));
        assert_eq!(site.ok(&format!("cat disks/{disk}/device; head -n 1 {first}")), format!("{first}\n{volume}"));
        assert!(site.ok(&format!("readlink $R/devices/{}", first.rsplit('/').next().unwrap())).ends_with(volume));
        // The path of the one before says so instead of showing this one's bytes.
        site.refused(&format!("head -c 1 disks/{other}/block"), "No such");
        site.ok(&format!("echo detach > disks/{disk}/control"));
    }
    for volume in &volumes {
        site.holds(volume, LENGTH).unwrap();
    }
}

#[test]
fn d1_d2_c3_c4_a_name_is_not_an_identity_by_virtio_blk() {
    if have() {
        a_name_is_not_an_identity(Bus::VirtioBlk);
    }
}

#[test]
fn d1_d2_c3_c4_a_name_is_not_an_identity_by_virtio_scsi() {
    if have() {
        a_name_is_not_an_identity(Bus::VirtioScsi);
    }
}

/// Predecessor failures 1 and 4: eight at once, and each finds its own device.
fn eight_in_parallel(bus: Bus) {
    let site = Site::start(bus);
    let volumes = site.job(&["d1", "d2", "d3", "d4", "d5", "d6", "d7", "d8"]);
    let each = |script: &str| {
        let said = site.ok(&format!("{FILL}; for v in volumes/*; do ({script}) || echo $v failed & done; wait"));
        assert_eq!(said, "", "{}", site.words());
    };
    each(&format!("echo attach > $v/control && fill ${{v##*/}} {LENGTH} $v/block"));
    let devices: HashSet<String> = site.ok("cat volumes/*/device").lines().map(str::to_owned).collect();
    assert_eq!(devices, (1..=8).map(|n| site.node(n)).collect());
    // One line each: whose bytes the node shows, whose the tree says it is; and the kernel's own numbers.
    let said = site.ok("for v in volumes/*; do device=$(cat $v/device); by=$(readlink $R/devices/${device##*/}); \
         echo ${v##*/} $(head -n 1 $device) ${by##*/}; \
         [ $(stat -c %t:%T $v/block) = $(stat -c %t:%T $device) ] || echo $v/block is not $device; done");
    let mut same: Vec<String> = volumes.iter().map(|v| format!("{v} {v} {v}")).collect();
    same.sort();
    assert_eq!(said.lines().collect::<Vec<_>>(), same);
    for volume in &volumes {
        site.holds(volume, LENGTH).unwrap();
    }
    each("echo detach > $v/control");
    // All that is left is the guest's own disk.
    assert_eq!(site.ok("ls $R/devices"), site.node(0).rsplit('/').next().unwrap());
    assert_eq!(site.ok("ls $R/exports"), "");
    for volume in &volumes {
        site.holds(volume, LENGTH).unwrap();
    }
    assert_eq!((site.cloud.calls("attachVolume"), site.cloud.calls("detachVolume")), (8, 8));
}

#[test]
fn d1_eight_volumes_in_parallel_and_no_byte_crosses_by_virtio_blk() {
    if have() {
        eight_in_parallel(Bus::VirtioBlk);
    }
}

#[test]
fn d1_eight_volumes_in_parallel_and_no_byte_crosses_by_virtio_scsi() {
    if have() {
        eight_in_parallel(Bus::VirtioScsi);
    }
}

/// The volume is pulled from outside and another one plugged while volfs has had no chance to notice:
/// its own descriptor alone keeps the number from going to the other disk.
fn a_pinned_number_is_not_used_again(bus: Bus) {
    let site = Site::start(bus);
    let volumes = site.job(&["one", "two"]);
    let (one, two) = (&volumes[0], &volumes[1]);
    site.ok("echo attach > disks/one/control");
    // Not below the tree: nothing answers there while volfs is stopped.
    let number = |node: &str| site.machine.ok(&format!("cat /sys/block/{}/dev", node.rsplit('/').next().unwrap()));
    let (first, second) = (site.node(1), site.node(2));
    let pinned = number(&first);
    let before = site.ok("cat disks/one/incarnation");

    site.ok("kill -STOP $(pidof volfs)");
    site.cloud.admin_detach(one).unwrap();
    site.machine.ok(&format!("until [ ! -e {first} ]; do usleep 20000; done"));
    site.cloud.admin_attach(two, &site.cloud.host()).unwrap();
    site.machine.ok(&format!("until [ -e {first} ] || [ -e {second} ]; do usleep 20000; done; [ ! -e {first} ]"));
    assert_ne!(number(&second), pinned);
    site.machine.ok("kill -CONT $(pidof volfs)");

    site.until("[ $(cat disks/one/status) != attached ]");
    site.ok("echo reconcile > $R/control; echo reconcile > disks/one/control; echo reconcile > disks/two/control");
    assert_eq!(
        site.ok("cat disks/one/status disks/two/status disks/two/device"),
        format!("detached\nattached\n{second}")
    );
    site.refused("cat disks/one/device", "No such device");
    site.refused("cat disks/one/block", "No such");

    // Nobody holds it any more: name and number are free again, and are the next disk's.
    site.ok("echo attach > disks/one/control");
    assert_eq!((site.ok("cat disks/one/device"), number(&first)), (first, pinned));
    assert_ne!(site.ok("cat disks/one/incarnation"), before);
}

#[test]
fn d4_a_pinned_number_is_not_used_again_by_virtio_blk() {
    if have() {
        a_pinned_number_is_not_used_again(Bus::VirtioBlk);
    }
}

#[test]
fn d4_a_pinned_number_is_not_used_again_by_virtio_scsi() {
    if have() {
        a_pinned_number_is_not_used_again(Bus::VirtioScsi);
    }
}

/// The hypervisor would pull it all the same (kernel fact 19): the cloud must not even be asked.
fn in_use_is_not_detached(bus: Bus) {
    let site = Site::start(bus);
    let volume = site.job(&["one"]).remove(0);
    site.ok("echo attach > disks/one/control");
    let holder = site.machine.start(
        "exec 5<> /run/volfs/jobs/job/disks/one/block; : > /tmp/held; until [ -e /tmp/go ]; do usleep 10000; done; \
         echo written through >&5; sync",
    );
    site.until("[ -e /tmp/held ]");
    site.refused("echo detach > disks/one/control", "Device or resource busy");
    let why = site.ok("cat disks/one/error");
    assert!(why.contains("pid") && why.contains("sh"), "{why}");
    assert_eq!(site.ok("cat disks/one/status disks/one/device"), format!("attached\n{}", site.node(1)));
    site.ok(": > /tmp/go");
    assert_eq!(holder.said(PATIENCE).map(|said| said.status), Some(0));
    assert_eq!(site.ok("head -n 1 disks/one/block"), "written through");

    site.ok("echo detach > disks/one/control");
    let file = site.cloud.file(&volume);
    let made = std::process::Command::new("mkfs.ext4").args(["-q", "-F"]).arg(&file).status().expect("mkfs.ext4");
    assert!(made.success());
    let detached = site.cloud.calls("detachVolume");
    site.ok("echo attach > disks/one/control && mount -t ext4 disks/one/block /mnt && echo kept > /mnt/file");
    site.refused("echo detach > disks/one/control", "Device or resource busy");
    let why = site.ok("cat disks/one/error");
    assert!(why.contains("/mnt"), "{why}");
    assert_eq!(site.cloud.calls("detachVolume"), detached);
    site.ok("umount /mnt && echo detach > disks/one/control");
    assert_eq!(site.cloud.calls("detachVolume"), detached + 1);
    site.ok("echo attach > disks/one/control && mount -t ext4 disks/one/block /mnt && cat /mnt/file && umount /mnt");
}

#[test]
fn c4_a_volume_in_use_is_not_detached_by_virtio_blk() {
    if have() {
        in_use_is_not_detached(Bus::VirtioBlk);
    }
}

#[test]
fn c4_a_volume_in_use_is_not_detached_by_virtio_scsi() {
    if have() {
        in_use_is_not_detached(Bus::VirtioScsi);
    }
}

/// Predecessor failure 8. The reset is a power cut: what volfs had not made durable is gone.
#[test]
fn d2_every_device_is_right_after_a_boot_that_changed_the_names() {
    if !have() {
        return;
    }
    let site = Site::start(Bus::VirtioBlk);
    let volumes = site.job(&["one", "two", "three"]);
    for (disk, volume) in ["one", "two", "three"].iter().zip(&volumes) {
        site.ok(&format!("{FILL}; echo attach > disks/{disk}/control && fill {volume} {LENGTH} disks/{disk}/block"));
    }
    let devices = "cat disks/one/device disks/two/device disks/three/device";
    assert_eq!(site.ok(devices), "/dev/vdb\n/dev/vdc\n/dev/vdd");
    site.machine.reset();
    site.serve();
    // Right from the first read, or none.
    for (disk, volume) in ["one", "two", "three"].iter().zip(&volumes) {
        let said = site.run(&format!("device=$(cat disks/{disk}/device) && head -n 1 $device"));
        assert!(said.status != 0 || said.out == format!("{volume}\n"), "{said:?}\n{}", site.words());
    }
    site.ok("echo reconcile > $R/control");
    assert_eq!(site.ok("cat volumes/*/status"), "attached\nattached\nattached");
    assert_eq!(site.ok(devices), "/dev/vdd\n/dev/vdc\n/dev/vdb");
    for (disk, volume) in ["one", "two", "three"].iter().zip(&volumes) {
        assert_eq!(site.ok(&format!("head -n 1 disks/{disk}/block")), *volume);
    }
    site.ok("echo detach > control");
    for volume in &volumes {
        site.holds(volume, LENGTH).unwrap();
    }
}

/// The VM's own root disk, of whose id volfs was told nothing.
#[test]
fn c2_the_disk_that_carries_the_guest_cannot_be_claimed() {
    if !have() {
        return;
    }
    let site = Site::start(Bus::VirtioBlk);
    site.mkdir();
    let root = site.cloud.on_vm(&site.cloud.host())[0].id.clone();
    site.refused(&format!("echo 'claim {root}' > control"), "Operation not permitted");
    assert!(site.cloud.volume(&root).unwrap().tags.is_empty());
    assert_eq!(site.cloud.calls("createTags"), 0);
}

/// The reset comes while the cloud's job is still running: the journal alone knows of it.
#[test]
fn c3_an_attach_that_a_power_cut_interrupted_is_finished_and_not_begun_again() {
    if !have() {
        return;
    }
    let site = Site::start(Bus::VirtioBlk);
    let volume = site.job(&["one"]).remove(0);
    site.cloud.fault(Fault::new("attachVolume", Kind::JobHangs(Moment::Working)));
    let _ = site.machine.start("echo attach > /run/volfs/jobs/job/disks/one/control");
    assert!(site.cloud.wait_for(PATIENCE, |cloud| !cloud.held_jobs().is_empty()), "{}", site.words());
    site.machine.reset();
    site.serve();
    assert_eq!(site.ok("cat disks/one/status"), "attaching");
    site.refused("cat disks/one/device", "No such device");
    site.cloud.release_jobs();
    site.until("[ $(cat disks/one/status) = attached ]");
    assert_eq!((site.cloud.calls("attachVolume"), site.cloud.effects(Effect::Attached, Some(&volume))), (1, 1));
    site.ok(&format!("{FILL}; fill {volume} {LENGTH} disks/one/block && echo detach > control"));
    site.holds(&volume, LENGTH).unwrap();
}

/// The i440fx has 31 slots; others than the cloud fill them.
#[test]
fn e11_a_machine_without_a_free_slot_is_no_space_and_nothing_is_left_half_done() {
    if !have() {
        return;
    }
    let site = Site::start(Bus::VirtioBlk);
    site.job(&["one"]);
    let dir = tempfile::tempdir().unwrap();
    let mut foreign = Vec::new();
    let full = loop {
        let id = format!("foreign-{}", foreign.len());
        let file = dir.path().join(&id);
        File::create(&file).unwrap().set_len(1 << 20).unwrap();
        match site.machine.plug(&id, &file, 1 << 20, &id) {
            Ok(()) => foreign.push(id),
            Err(words) => break words,
        }
    };
    assert!(full.contains("No more available PCI slots") && foreign.len() > 20, "{full} after {foreign:?}");
    site.refused("echo attach > disks/one/control", "No space left on device");
    assert!(site.ok("cat disks/one/error").contains("No more available PCI slots"));
    assert_eq!(site.ok("cat disks/one/status"), "detached");
    assert!(site.cloud.data_volumes().iter().all(|v| v.vm.is_none()));
    site.until(&format!("[ -b {} ]", site.node(u8::try_from(foreign.len()).unwrap())));
    site.machine.unplug(&foreign[7]).unwrap();
    site.ok("echo attach > disks/one/control && [ -b $(cat disks/one/device) ]");
}

/// The cloud's book says free, the machine has the disk: what is left when a management server dies
/// in an attach (page 4.4). And a second disk of the same serial.
#[test]
fn v8_a_disk_that_should_not_be_there_is_a_conflict_until_it_is_gone() {
    if !have() {
        return;
    }
    let site = Site::start(Bus::VirtioBlk);
    let volume = site.job(&["one"]).remove(0);
    let host = site.cloud.host();
    site.cloud.plug_device(&volume, &host, 1).unwrap();
    site.until("[ $(cat disks/one/status) = conflict ]");
    site.refused("cat disks/one/device", "No such device");
    site.refused("echo attach > disks/one/control", "Device or resource busy");
    assert_eq!(site.cloud.calls("attachVolume"), 0);
    site.cloud.pull_device(&volume).unwrap();
    site.until("[ $(cat disks/one/status) = detached ]");

    site.ok("echo attach > disks/one/control");
    site.cloud.plug_device(&volume, &host, 2).unwrap();
    site.until("[ $(cat disks/one/status) = conflict ]");
    site.refused("cat disks/one/block", "No such");
    assert!(site.ok("cat $R/problems").contains(&volume));
}

/// A virtio serial takes 20 of an id's 32 digits: here both volumes have the same.
#[test]
fn d3_two_volumes_whose_serials_are_one_are_never_taken_for_each_other() {
    if !have() {
        return;
    }
    let site = Site::start(Bus::VirtioBlk);
    let ids = ["3c9a6f0e-5b7d-4e1a-8f22-0a1b2c3d4e5f", "3c9a6f0e-5b7d-4e1a-8f22-0a1b2c3d4e60"];
    site.mkdir();
    site.cloud.next_volume_ids(&ids);
    site.ok("echo create one 1G > control; echo create two 1G > control; echo attach > disks/one/control");
    // Its serial is that of a disk that is here already: a conflict, and nothing is called.
    site.refused("echo attach > disks/two/control", "Device or resource busy");
    assert_eq!(site.cloud.calls("attachVolume"), 1);
    site.ok("[ $(cat disks/one/status) = attached ] && [ -b $(cat disks/one/device) ]");
    // Behind volfs's back it comes all the same: neither is served.
    site.cloud.admin_attach(ids[1], &site.cloud.host()).unwrap();
    site.until("[ $(cat disks/one/status) = conflict ]");
    site.refused("cat disks/one/device", "No such device");
    site.refused("cat disks/two/device", "No such device");
    site.cloud.admin_detach(ids[1]).unwrap();
    site.until("[ $(cat disks/one/status) = attached ]");
}
