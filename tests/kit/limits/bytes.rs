//! S10: what is on a volume is never read. S11: storage used again shows nothing of before.

use std::fs;
use std::os::unix::fs::FileExt;

use crate::common::{PATIENCE, Volfs, have};
use crate::kill::Strace;
use crate::oracle;

const SIZE: usize = 1 << 20;

/// Completed reads of a disk and their sectors (Documentation/block/stat).
fn reads(device: &str) -> (u64, u64) {
    let text = fs::read_to_string(format!("/sys/block/{device}/stat")).unwrap();
    let numbers: Vec<u64> = text.split_whitespace().map(|n| n.parse().unwrap()).collect();
    (numbers[0], numbers[2])
}

/// Calls that give a program what is in a file, or let it look at it.
const LOOKS: &str = "trace=read,pread64,readv,preadv,preadv2,mmap,sendfile,splice,tee,vmsplice,copy_file_range,\
                     io_uring_setup,io_uring_enter,io_submit";

fn device_of(volfs: &Volfs, disk: &str) -> String {
    volfs.value(format!("jobs/j/disks/{disk}/device")).trim_start_matches("/dev/").to_owned()
}

/// Fills the volume through the tree with bytes that a scan would take for something.
fn write_pattern(volfs: &Volfs, disk: &str) {
    let file = fs::OpenOptions::new().write(true).open(volfs.path(format!("jobs/j/disks/{disk}/block"))).unwrap();
    file.write_all_at(&[0xa5; SIZE], 0).unwrap();
    // The signatures of a partition table and of a filesystem: bait for who probes.
    file.write_all_at(&[0x55, 0xaa], 510).unwrap();
    file.write_all_at(&[0x53, 0xef], 1024 + 56).unwrap();
    file.sync_all().unwrap();
}

#[test]
fn s10_nothing_that_volfs_does_reads_what_is_on_a_volume() {
    if !have(&["strace"]) {
        return;
    }
    let mut volfs = Volfs::start_with(&[], "reconcile_interval = 1\n");
    let uuid = volfs.job("j", &["d"], "1M").remove(0);
    assert_eq!(volfs.write("jobs/j/disks/d/control", "attach"), 0);
    write_pattern(&volfs, "d");
    assert_eq!(volfs.write("jobs/j/disks/d/control", "detach"), 0);
    let out = volfs.scratch("strace");
    // -y: each descriptor with its path, so that no way to the bytes is missed for its number.
    let tracer = Strace::attach(volfs.pid(), &["-y", "-o", out.to_str().unwrap(), "-e", LOOKS]);
    let mut on_disk = (0, 0);
    for _ in 0..2 {
        assert_eq!(volfs.write("jobs/j/disks/d/control", "attach"), 0, "{}", volfs.log());
        let device = device_of(&volfs, "d");
        let before = reads(&device);
        for command in ["reconcile", "attach", "disk e", "disk d"] {
            let below = if command == "disk d" { "e" } else { "d" };
            assert_eq!(volfs.write(format!("jobs/j/disks/{below}/control"), command), 0, "{command}");
        }
        // All that can be read in the tree, but for the bytes themselves.
        volfs.ok("ls -lR $R > list; find $R -type f -exec cat {} + > all 2> errors; :");
        // A round that began after the attach has ended.
        assert_eq!(volfs.write("control", "reconcile"), 0);
        let after = reads(&device);
        on_disk = (on_disk.0 + after.0 - before.0, on_disk.1 + after.1 - before.1);
        assert_eq!(volfs.write("jobs/j/disks/d/control", "detach"), 0, "{}", volfs.log());
    }
    assert_eq!(volfs.write("jobs/j/disks/d/control", "resize 2M"), 0);
    tracer.detach();
    // A start, too, finds its attached volume without looking at it.
    assert_eq!(volfs.write("jobs/j/disks/d/control", "attach"), 0);
    let device = device_of(&volfs, "d");
    let before = reads(&device);
    volfs.kill();
    volfs.launch();
    assert_eq!(volfs.write("jobs/j/disks/d/control", "reconcile"), 0);
    assert_eq!(device_of(&volfs, "d"), device);
    let after = reads(&device);
    on_disk = (on_disk.0 + after.0 - before.0, on_disk.1 + after.1 - before.1);

    let lines = fs::read_to_string(&out).unwrap();
    let data = format!("{uuid}/data.img");
    let looked: Vec<&str> = lines.lines().filter(|l| l.contains(&data) || l.contains("</dev/loop")).collect();
    let calls = lines.lines().count();
    println!("{calls} reading calls of the daemon, {} on the volume; the disk counted {on_disk:?} reads", looked.len());
    assert!(lines.contains("meta.json>"), "strace saw the provider's own files");
    assert!(looked.is_empty(), "{looked:#?}");
    // Where a udev is at work, it reads what it likes after each attach; nobody else does.
    if !fs::exists("/run/udev/control").unwrap() {
        assert_eq!(on_disk, (0, 0), "reads that the disk has seen");
    }
    // The judge sees a read where there is one.
    let mut bytes = [0u8; 4096];
    fs::File::open(volfs.path("jobs/j/disks/d/block")).unwrap().read_exact_at(&mut bytes, 65536).unwrap();
    assert_eq!(bytes, [0xa5; 4096]);
    assert_ne!(reads(&device), after);
}

/// The whole volume as its user reads it; panics on a byte that is not zero.
fn all_zeroes(volfs: &Volfs, disk: &str, bytes: usize, when: &str) {
    let found = fs::read(volfs.path(format!("jobs/j/disks/{disk}/block"))).unwrap();
    assert_eq!(found.len(), bytes, "{when}");
    let other = found.iter().position(|byte| *byte != 0);
    assert_eq!(other, None, "{when}: the first former byte");
}

#[test]
fn s11_storage_and_devices_that_are_used_again_show_nothing_of_before() {
    // Kept by a tmpfs that is nearly as small as what is made in it: blocks are used again.
    let mut volfs = Volfs::prepare(&[], "");
    let small = crate::common::Tmpfs::mount(&volfs.state(), c"size=8m,mode=700");
    volfs.launch();
    volfs.job("j", &[], "1M");
    let mut devices = std::collections::BTreeMap::<String, usize>::new();
    let mut again = 0;
    for n in 0..8 {
        let disk = format!("d{n}");
        let uuid = volfs.job("j", &[&disk], "1M").remove(0);
        let control = format!("jobs/j/disks/{disk}/control");
        assert_eq!(volfs.write(&control, "attach"), 0, "{}", volfs.log());
        let device = device_of(&volfs, &disk);
        let times = devices.entry(device).or_default();
        again += usize::from(*times > 0);
        *times += 1;
        all_zeroes(&volfs, &disk, SIZE, &format!("round {n}, new"));
        write_pattern(&volfs, &disk);
        // Grown, the new part is as new as a new volume.
        assert_eq!(volfs.write(&control, "resize 2M"), 0, "{}", volfs.log());
        let found = fs::read(volfs.path(format!("jobs/j/disks/{disk}/block"))).unwrap();
        assert_eq!(found.len(), 2 * SIZE);
        assert!(found[SIZE..].iter().all(|byte| *byte == 0), "round {n}, grown");
        assert_eq!(found[SIZE - 1], 0xa5, "its own bytes are kept");
        fs::OpenOptions::new()
            .write(true)
            .open(volfs.path(format!("jobs/j/disks/{disk}/block")))
            .and_then(|file| file.write_all_at(&vec![0x5a; SIZE], SIZE as u64).and_then(|()| file.sync_all()))
            .unwrap();
        assert_eq!(volfs.write(&control, "detach"), 0, "{}", volfs.log());
        assert_eq!(volfs.write(&control, &format!("delete {uuid} expunge")), 0, "{}", volfs.log());
    }
    println!("8 volumes of 2 MiB on 8 MiB; a loop device was used again {again} times");
    oracle::settled(&volfs, PATIENCE, "all expunged");
    assert_eq!(volfs.terminate().0, 0);
    drop(small);
}
