//! D1 to D5: which device is a volume's, for how long, and what volfs never does to it.

use std::collections::BTreeMap;
use std::fs;
use std::io::{Read, Write};
use std::os::fd::AsFd;
use std::path::Path;
use std::process::Command;

use crate::common::Volfs;
use crate::errors::Loop;

fn data(volfs: &Volfs, uuid: &str) -> std::path::PathBuf {
    volfs.state().join("loop/volumes").join(uuid).join("data.img")
}

/// Runs losetup -d, as an administrator would.
fn losetup_d(node: &str) {
    assert!(Command::new("losetup").args(["-d", node]).status().unwrap().success());
}

#[test]
fn d1_a_device_is_found_by_its_tag_whatever_its_size_order_and_number() {
    let volfs = Volfs::start();
    let disks = ["a", "b", "c", "d"];
    let uuids = volfs.job("j", &disks, "2M");
    assert_eq!(volfs.write("jobs/j/control", "attach"), 0);
    for (disk, uuid) in disks.iter().zip(&uuids) {
        let mut block =
            fs::OpenOptions::new().write(true).open(volfs.path(format!("jobs/j/disks/{disk}/block"))).unwrap();
        block.write_all(uuid.as_bytes()).unwrap();
        block.sync_all().unwrap();
    }
    assert_eq!(volfs.write("jobs/j/control", "detach"), 0, "{}", volfs.log());
    // A foreign device of the same size, and one that has a volume's very name in its path.
    let decoy = volfs.scratch("decoy.img");
    fs::File::create(&decoy).unwrap().set_len(2 << 20).unwrap();
    let _same_size = Loop::bind(&decoy, "");
    let named = volfs.scratch(&uuids[0]);
    fs::create_dir(&named).unwrap();
    fs::File::create(named.join("data.img")).unwrap().set_len(2 << 20).unwrap();
    let _same_name = Loop::bind(&named.join("data.img"), "volfs:no-such-volume");
    for disk in disks.iter().rev() {
        assert_eq!(volfs.write(format!("jobs/j/disks/{disk}/control"), "attach"), 0, "{}", volfs.log());
    }
    let mut seen = std::collections::BTreeSet::new();
    for (disk, uuid) in disks.iter().zip(&uuids) {
        let mut text = vec![0; uuid.len()];
        let device = volfs.value(format!("jobs/j/disks/{disk}/device"));
        fs::File::open(volfs.path(format!("jobs/j/disks/{disk}/block"))).unwrap().read_exact(&mut text).unwrap();
        assert_eq!(String::from_utf8(text).unwrap(), *uuid);
        let link = fs::read_link(volfs.path(format!("devices/{}", device.trim_start_matches("/dev/")))).unwrap();
        assert!(link.ends_with(uuid), "{link:?}");
        assert_eq!(volfs.value(format!("jobs/j/disks/{disk}/serial")), format!("volfs:{uuid}"));
        seen.insert(device);
    }
    assert_eq!(seen.len(), disks.len());
    assert!(
        !seen.contains(&*_same_size.path().to_string_lossy()) && !seen.contains(&*_same_name.path().to_string_lossy())
    );
    assert_eq!(volfs.write("jobs/j/control", "detach"), 0);
}

#[test]
fn d1_v8_a_device_with_a_volumes_tag_that_the_cloud_did_not_attach_is_not_served() {
    let volfs = Volfs::start();
    let made = volfs.job("j", &["d"], "2M");
    let control = format!("volumes/{}/control", made[0]);
    let decoy = volfs.scratch("decoy.img");
    fs::File::create(&decoy).unwrap().set_len(2 << 20).unwrap();
    let impostor = Loop::bind(&decoy, &format!("volfs:{}", made[0]));
    volfs.write(&control, "reconcile");
    assert_eq!(volfs.value(format!("volumes/{}/status", made[0])), "conflict");
    assert_eq!(volfs.read(format!("volumes/{}/device", made[0])), Err(libc::ENODEV));
    assert_eq!(volfs.write(&control, "attach"), libc::EBUSY);
    assert_eq!(volfs.write(&control, &format!("delete {}", made[0])), libc::EPERM);
    assert!(data(&volfs, &made[0]).exists());
    drop(impostor);
    volfs.until("detached", || volfs.write(&control, "reconcile") == 0);
    assert_eq!(volfs.value(format!("volumes/{}/status", made[0])), "detached");
}

#[test]
fn d2_a_mapping_is_one_incarnation_and_ends_with_it() {
    let volfs = Volfs::start();
    let made = volfs.job("j", &["d"], "1M");
    let at = |file: &str| format!("volumes/{}/{file}", made[0]);
    let boot = fs::read_to_string("/proc/sys/kernel/random/boot_id").unwrap();
    let mut seen = std::collections::BTreeSet::new();
    for _ in 0..3 {
        assert_eq!(volfs.write(at("control"), "attach"), 0);
        let incarnation = volfs.value(at("incarnation"));
        let name = volfs.value(at("device")).trim_start_matches("/dev/").to_owned();
        let seq = fs::read_to_string(format!("/sys/block/{name}/diskseq")).unwrap();
        assert!(incarnation.contains(boot.trim_end()) && incarnation.ends_with(seq.trim_end()), "{incarnation}");
        assert!(seen.insert(incarnation.clone()), "{incarnation} twice");
        assert_eq!(volfs.value(at("incarnation")), incarnation);
        // What was taken of this mapping leads nowhere after it.
        use std::os::fd::AsRawFd;
        use std::os::unix::fs::OpenOptionsExt;
        let mut path = fs::OpenOptions::new();
        path.read(true).custom_flags(libc::O_PATH);
        let block = path.open(volfs.path(at("block"))).unwrap();
        let export = path.open(volfs.path(format!("exports/{}", made[0]))).unwrap();
        assert_eq!(volfs.write(at("control"), "detach"), 0);
        // The same number again, for another file.
        let other = volfs.scratch("other.img");
        fs::File::create(&other).unwrap().set_len(1 << 20).unwrap();
        let _other = Loop::bind(&other, "");
        for held in [&block, &export] {
            let again = fs::File::open(format!("/proc/self/fd/{}", held.as_raw_fd()));
            assert_eq!(again.unwrap_err().raw_os_error(), Some(libc::ENODEV));
        }
        assert_eq!(volfs.write(at("control"), "attach"), 0);
        for held in [&block, &export] {
            assert!(fs::File::open(format!("/proc/self/fd/{}", held.as_raw_fd())).is_err(), "an ended mapping opened");
        }
        seen.insert(volfs.value(at("incarnation")));
        assert_eq!(volfs.write(at("control"), "detach"), 0);
    }
    assert_eq!(seen.len(), 6);
}

#[test]
fn d2_a_restart_keeps_the_mapping_of_the_same_incarnation_and_no_other() {
    let mut volfs = Volfs::start();
    let made = volfs.job("j", &["kept", "bound-anew"], "1M");
    assert_eq!(volfs.write("jobs/j/control", "attach"), 0);
    let of = |volfs: &Volfs, i: usize| volfs.value(format!("volumes/{}/incarnation", made[i]));
    let ino = |volfs: &Volfs, i: usize| {
        use std::os::unix::fs::MetadataExt;
        fs::metadata(volfs.path(format!("volumes/{}/block", made[i]))).unwrap().ino()
    };
    let before = (of(&volfs, 0), of(&volfs, 1), ino(&volfs, 0), ino(&volfs, 1));
    let node = volfs.value(format!("volumes/{}/device", made[1]));
    volfs.kill();
    losetup_d(&node);
    let tag = format!("volfs:{}", made[1]);
    let anew = Loop::bind(&data(&volfs, &made[1]), &tag);
    volfs.launch();
    assert_eq!((of(&volfs, 0), ino(&volfs, 0)), (before.0, before.2), "the same disk, the same node");
    volfs.until("looked at", || volfs.value(format!("volumes/{}/status", made[1])) == "attached");
    assert_ne!(of(&volfs, 1), before.1);
    assert_ne!(ino(&volfs, 1), before.3, "another incarnation has another node");
    assert_eq!(volfs.value(format!("volumes/{}/device", made[1])), anew.path().to_str().unwrap());
    assert_eq!(volfs.write("jobs/j/control", "detach"), 0, "{}", volfs.log());
}

#[test]
fn d3_v8_a_device_of_another_size_than_the_clouds_is_a_conflict() {
    let volfs = Volfs::start();
    let made = volfs.job("j", &["d"], "2M");
    let at = |file: &str| format!("volumes/{}/{file}", made[0]);
    assert_eq!(volfs.write(at("control"), "attach"), 0);
    let node = volfs.value(at("device"));
    // The kernel's size alone shrinks.
    let mut info = volfs::sys::loop_status(fs::File::open(&node).unwrap().as_fd()).unwrap();
    info.lo_sizelimit = 1 << 20;
    volfs::sys::loop_set_status(fs::File::open(&node).unwrap().as_fd(), &info).unwrap();
    volfs.write(at("control"), "reconcile");
    assert_eq!(volfs.value(at("status")), "conflict");
    assert_eq!(volfs.read(at("device")), Err(libc::ENODEV));
    assert!(!volfs.path(at("block")).exists());
    let problems = volfs.read("problems").unwrap();
    assert!(problems.contains("1048576") && problems.contains("2097152"), "{problems}");
    // Whole again, it is served again.
    info.lo_sizelimit = 0;
    volfs::sys::loop_set_status(fs::File::open(&node).unwrap().as_fd(), &info).unwrap();
    assert_eq!(volfs.write(at("control"), "reconcile"), 0, "{}", volfs.log());
    assert_eq!((volfs.value(at("status")), volfs.value(at("device"))), ("attached".into(), node.clone()));
    assert_eq!(volfs.write(at("control"), "detach"), 0);
}

#[test]
fn d3_a_backing_file_that_was_cut_short_is_never_served_and_growth_is_fine() {
    let volfs = Volfs::start();
    let made = volfs.job("j", &["d"], "2M");
    let at = |file: &str| format!("volumes/{}/{file}", made[0]);
    assert_eq!(volfs.write(at("control"), "attach"), 0);
    let node = volfs.value(at("device"));
    let file = fs::OpenOptions::new().write(true).open(data(&volfs, &made[0])).unwrap();
    let resize = |length: u64| {
        file.set_len(length).unwrap();
        volfs::sys::loop_set_capacity(fs::File::open(&node).unwrap().as_fd()).unwrap();
    };
    resize(4 << 20);
    assert_eq!(volfs.write(at("control"), "reconcile"), 0, "{}", volfs.log());
    assert_eq!((volfs.value(at("status")), volfs.value(at("size"))), ("attached".into(), "4194304".into()));
    resize(1 << 20);
    assert_ne!(volfs.write(at("control"), "reconcile"), 0);
    let status = volfs.value(at("status"));
    assert_eq!(status, "conflict", "{}", volfs.read("problems").unwrap());
    assert_eq!(volfs.read(at("device")), Err(libc::ENODEV));
    resize(4 << 20);
    volfs.until("attached again", || volfs.write(at("control"), "reconcile") == 0);
    assert_eq!(volfs.value(at("status")), "attached");
}

#[test]
fn d3_e14_two_candidates_are_a_conflict_and_not_a_choice() {
    let volfs = Volfs::start();
    let made = volfs.job("j", &["d"], "2M");
    let at = |file: &str| format!("volumes/{}/{file}", made[0]);
    assert_eq!(volfs.write(at("control"), "attach"), 0);
    let (node, was) = (volfs.value(at("device")), volfs.value(at("incarnation")));
    let second = Loop::bind(&data(&volfs, &made[0]), &format!("volfs:{}", made[0]));
    volfs.write(at("control"), "reconcile");
    assert_eq!(volfs.value(at("status")), "conflict");
    assert_eq!(volfs.read(at("device")), Err(libc::ENODEV));
    let problems = volfs.read("problems").unwrap();
    assert!(problems.contains(&node) && problems.contains(&*second.path().to_string_lossy()), "{problems}");
    assert_ne!(volfs.write(at("control"), "detach"), 0);
    drop(second);
    volfs.until("one device", || volfs.loops().len() == 1);
    volfs.until("settled", || volfs.write(at("control"), "reconcile") == 0);
    assert_eq!((volfs.value(at("device")), volfs.value(at("incarnation"))), (node, was));
    assert_eq!(volfs.write(at("control"), "detach"), 0, "{}", volfs.log());
}

#[test]
fn d4_an_attached_device_stays_when_somebody_else_detaches_it() {
    let volfs = Volfs::start();
    let made = volfs.job("j", &["d"], "2M");
    let at = |file: &str| format!("volumes/{}/{file}", made[0]);
    assert_eq!(volfs.write(at("control"), "attach"), 0);
    volfs.ok(&format!("printf kept | dd of=$R/{} conv=fsync status=none", at("block")));
    let (node, was) = (volfs.value(at("device")), volfs.value(at("incarnation")));
    // volfs's own descriptor is there, and is no holder.
    let fds = fs::read_dir(format!("/proc/{}/fd", volfs.pid())).unwrap();
    let pins = fds.flatten().filter_map(|fd| fs::read_link(fd.path()).ok()).filter(|l| l == Path::new(&node)).count();
    assert_eq!(pins, 1, "one descriptor on {node}");
    assert_eq!(volfs.read(at("holders")).as_deref(), Ok("kind\tpid\tcommand\n"));
    losetup_d(&node);
    assert_eq!((volfs.value(at("device")), volfs.value(at("incarnation"))), (node.clone(), was));
    assert_eq!(volfs.value(at("status")), "attached");
    assert_eq!(volfs.ok(&format!("head -c 4 $R/{}", at("block"))), "kept");
    assert_eq!(volfs.write(at("control"), "reconcile"), 0);
    assert_eq!(volfs.value(at("device")), node);
    assert_eq!(volfs.write(at("control"), "detach"), 0, "{}", volfs.log());
    assert!(volfs.loops().is_empty());
    // The mapping ended, and with it the descriptor.
    assert_eq!(volfs.write(at("control"), "attach"), 0);
    assert_eq!(volfs.ok(&format!("head -c 4 $R/{}", at("block"))), "kept");
}

#[test]
fn d5_volfs_reads_nothing_of_what_is_on_a_volume() {
    let volfs = Volfs::start();
    let made = volfs.job("j", &["d"], "2M");
    let at = |file: &str| format!("volumes/{}/{file}", made[0]);
    // A disk that a prober would find a lot on: one partition, boot signature.
    let mut image = vec![0u8; 512];
    image[446..462].copy_from_slice(&[0x80, 0, 2, 0, 0x83, 0, 0, 0, 1, 0, 0, 0, 0, 8, 0, 0]);
    image[510..].copy_from_slice(&[0x55, 0xaa]);
    let mut file = fs::OpenOptions::new().write(true).open(data(&volfs, &made[0])).unwrap();
    file.write_all(&image).unwrap();
    file.sync_all().unwrap();
    // A loop device counts over all that it was ever bound to, and another test may have had this one
    // between the two looks: then once more. What volfs itself read would show each time.
    let counted = || -> BTreeMap<String, u64> {
        let stat = |name: &str| fs::read_to_string(format!("/sys/block/{name}/stat")).unwrap_or_default();
        let reads = |text: String| text.split_ascii_whitespace().next().and_then(|n| n.parse().ok()).unwrap_or(0);
        let names = fs::read_dir("/sys/block").unwrap().map(|e| e.unwrap().file_name().into_string().unwrap());
        names.map(|name| (name.clone(), reads(stat(&name)))).collect()
    };
    let mut read = Vec::new();
    for _ in 0..5 {
        let before = counted();
        assert_eq!(volfs.write(at("control"), "attach"), 0);
        let name = volfs.value(at("device")).trim_start_matches("/dev/").to_owned();
        for step in ["reconcile", "resize 4M", "disk other", "disk d"] {
            assert_eq!(volfs.write(at("control"), step), 0, "{step}: {}", volfs.log());
        }
        assert_eq!(volfs.write("control", "reconcile"), 0);
        volfs.ok("find $R/jobs -type f -exec cat {} + > all 2> errors; ls -lR $R > list; stat -L $R/exports/* > list");
        volfs.read(at("holders")).unwrap();
        assert!(!Path::new(&format!("/sys/block/{name}/{name}p1")).exists(), "its partitions were scanned");
        let by_volfs = counted()[&name] - before.get(&name).copied().unwrap_or(0);
        // What a reader does shows there.
        let mut block = fs::File::open(volfs.path(at("block"))).unwrap();
        block.read_exact(&mut [0; 512]).unwrap();
        let with_ours = counted()[&name] - before.get(&name).copied().unwrap_or(0);
        assert!(with_ours > by_volfs);
        drop(block);
        assert_eq!(volfs.write(at("control"), "detach"), 0);
        read.push(by_volfs);
        if by_volfs == 0 {
            break;
        }
    }
    // udev's probing counts here, too; where it runs the number says nothing.
    let udev = Command::new("pgrep").args(["-x", "systemd-udevd|udevd"]).output().unwrap().status.success();
    assert!(udev || read.contains(&0), "the volume was read: {read:?} times");
}
