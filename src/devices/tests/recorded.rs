//! Tests on sysfs trees made for them: disks that this machine has not, and changes at a chosen moment.

use std::fs::File;
use std::path::Path;

use rustix::fs::Mode;

use super::holder;
use crate::devices::{Devices, KernelDevices, Options, holders, sysfs, walk};
use crate::model::{DevNo, DiskIdentity, HolderKind};

#[test]
fn what_is_built_on_a_partition_has_the_disk() {
    let sys = tempfile::tempdir().unwrap();
    let disk = sys.path().join("dev/block/254:16");
    for dir in ["holders", "vdb1/holders/dm-3", "queue"] {
        std::fs::create_dir_all(disk.join(dir)).unwrap();
    }
    std::fs::create_dir_all(sys.path().join("block/dm-3/dm")).unwrap();
    std::fs::create_dir_all(sys.path().join("block/vdb")).unwrap();
    std::fs::write(sys.path().join("block/dm-3/dm/name"), "vg-root\n").unwrap();
    std::fs::write(sys.path().join("block/dm-3/dm/uuid"), "LVM-AbCdEfGhIjKlMnOp\n").unwrap();
    std::fs::write(disk.join("vdb1/partition"), "1\n").unwrap();
    std::fs::write(disk.join("vdb1/dev"), "254:17\n").unwrap();
    let mut walk = walk::Walk::default();
    let part = DevNo { major: 254, minor: 17 };
    walk.by_dev.insert(part, vec![holder(HolderKind::Mount, None, "/mnt")]);
    let rows = holders::of(&walk, &sysfs::Sysfs::new(sys.path().into()), DevNo { major: 254, minor: 16 }).unwrap();
    assert_eq!(
        rows,
        [holder(HolderKind::Mount, None, "/mnt"), holder(HolderKind::Holder, None, "dm-3 (LVM volume vg-root)")]
    );
}

/// A tree as virtio disks have it, one of them on a kernel without sequence numbers.
#[test]
fn a_recorded_tree_is_read_and_what_is_no_volume_is_left_out() {
    let sys = tempfile::tempdir().unwrap();
    let put = |path: &str, text: &str| {
        let path = sys.path().join("block").join(path);
        std::fs::create_dir_all(path.parent().unwrap()).unwrap();
        std::fs::write(path, text).unwrap();
    };
    let names = ["vdb", "vdc", "vdd", "vde", "loop0", "dm-0", "md0", "zram0", "ram1", "nbd0", "sr0", "nvme0c0n1"];
    for (minor, name) in names.into_iter().enumerate() {
        put(&format!("{name}/dev"), &format!("254:{minor}\n"));
        put(&format!("{name}/size"), if name == "nbd0" { "0\n" } else { "2048\n" });
        put(&format!("{name}/hidden"), if name == "nvme0c0n1" { "1\n" } else { "0\n" });
        if name != "vdc" {
            put(&format!("{name}/diskseq"), &format!("{}\n", 100 + minor));
        }
    }
    put("vdb/serial", "2aff4799111142228333");
    put("vdc/serial", "3aff4799111142228333");
    put("vdd/serial", "");
    std::fs::create_dir_all(sys.path().join("block/vde/serial")).unwrap();
    let devices =
        KernelDevices::start(Options { sys: sys.path().into(), uevents: false, ..Options::default() }).unwrap();
    let disks = devices.disks().unwrap();
    assert_eq!(disks.iter().map(|d| &*d.name).collect::<Vec<_>>(), ["vdb", "vdc", "vdd", "vde"]);
    assert_eq!(disks[0].incarnation.diskseq, 100);
    assert_eq!(disks[0].size, 1 << 20);
    assert_eq!(disks[0].identity, DiskIdentity::VirtioSerial("2aff4799111142228333".into()));
    assert_eq!(devices.disk("vdc").unwrap().unwrap().incarnation, disks[1].incarnation);
    assert_eq!((&disks[2].identity, &disks[3].identity), (&DiskIdentity::None, &DiskIdentity::None));
    put("vdc/serial", "4aff4799111142228333");
    assert_ne!(devices.disk("vdc").unwrap().unwrap().incarnation, disks[1].incarnation);
    put("vdb/serial", "4aff4799111142228333");
    assert_eq!(devices.disk("vdb").unwrap().unwrap(), disks[0], "an incarnation's identity is read once");
    put("vdb/diskseq", "900\n");
    assert_eq!(devices.disk("vdb").unwrap().unwrap().identity.text(), "4aff4799111142228333");
}

/// Puts a pipe at `path`, so that the next reader stands still until it is fed.
fn pipe_at(path: &Path) {
    let pipe = path.with_extension("pipe");
    let kind = rustix::fs::FileType::Fifo;
    rustix::fs::mknodat(rustix::fs::CWD, &pipe, kind, Mode::RUSR | Mode::WUSR, 0).unwrap();
    std::fs::rename(pipe, path).unwrap();
}

fn put_at(path: &Path, text: &str) {
    let new = path.with_extension("new");
    std::fs::write(&new, text).unwrap();
    std::fs::rename(new, path).unwrap();
}

#[test]
fn a_disk_that_becomes_another_while_it_is_read_is_read_again() {
    use std::io::Write;
    for attribute in ["serial", "size"] {
        let sys = tempfile::tempdir().unwrap();
        let dir = sys.path().join("block/vdb");
        std::fs::create_dir_all(&dir).unwrap();
        for (name, text) in [("dev", "254:16\n"), ("diskseq", "1\n"), ("size", "2048\n"), ("serial", "first")] {
            put_at(&dir.join(name), text);
        }
        let options = Options { sys: sys.path().into(), uevents: false, ..Options::default() };
        let devices = KernelDevices::start(options).unwrap();
        let path = dir.join(attribute);
        pipe_at(&path);
        let found = std::thread::scope(|scope| {
            let looking = scope.spawn(|| devices.disk("vdb").unwrap().unwrap());
            let mut feed = File::options().write(true).open(&path).unwrap();
            if attribute == "size" {
                // The size is read before and after the identity: the change comes at the second.
                pipe_at(&path);
                feed.write_all(b"2048\n").unwrap();
                drop(feed);
                feed = File::options().write(true).open(&path).unwrap();
            }
            for (name, text) in [("diskseq", "2\n"), ("size", "4096\n"), ("serial", "second")] {
                put_at(&dir.join(name), text);
            }
            feed.write_all(if attribute == "size" { b"4096\n" } else { b"first" }).unwrap();
            drop(feed);
            looking.join().unwrap()
        });
        let got = (found.incarnation.diskseq, found.size, found.identity.text());
        assert_eq!(got, (2, 2 << 20, "second"), "{attribute}");
    }
}

#[test]
fn a_serial_that_hangs_is_asked_by_one_thread_and_holds_nobody_for_long() {
    use std::io::Write;
    let sys = tempfile::tempdir().unwrap();
    let dir = sys.path().join("block/vdb");
    std::fs::create_dir_all(&dir).unwrap();
    for (name, text) in [("dev", "254:16\n"), ("diskseq", "1\n"), ("size", "2048\n")] {
        put_at(&dir.join(name), text);
    }
    pipe_at(&dir.join("serial"));
    let devices =
        KernelDevices::start(Options { sys: sys.path().into(), uevents: false, ..Options::default() }).unwrap();
    let untold = std::thread::scope(|scope| {
        let asking: Vec<_> = (0..4).map(|_| scope.spawn(|| devices.disk("vdb").unwrap().unwrap())).collect();
        asking.into_iter().map(|a| a.join().unwrap()).collect::<Vec<_>>()
    });
    assert!(untold.iter().all(|d| d.identity == DiskIdentity::None));
    // One reader took it: what is written once answers everybody, and nobody opens the pipe again.
    File::options().write(true).open(dir.join("serial")).unwrap().write_all(b"late").unwrap();
    assert_eq!(devices.disk("vdb").unwrap().unwrap().identity, DiskIdentity::VirtioSerial("late".into()));
}
