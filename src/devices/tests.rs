//! Tests against the real kernel, with loop devices of their own.

mod flush;
mod fuzz;
mod recorded;

use std::collections::HashMap;
use std::fs::File;
use std::io::{BufRead, BufReader, Write};
use std::os::fd::AsFd;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Barrier};
use std::time::{Duration, Instant};

use parking_lot::Mutex;
use rustix::fs::{Mode, OFlags};

use super::*;
use crate::model::{DiskIdentity, HolderKind, VolumeId};
use crate::sys::{self, LoopInfo64};

/// A loop device of a test, unbound when dropped.
pub(super) struct Loop {
    pub(super) name: String,
    pub(super) tag: String,
    _file: Option<tempfile::NamedTempFile>,
}

impl Loop {
    pub(super) fn bind(size: u64) -> Self {
        Self::tagged(size, &DiskIdentity::loop_tag(VolumeId::random()))
    }

    fn tagged(size: u64, tag: &str) -> Self {
        let file = tempfile::NamedTempFile::new().unwrap();
        file.as_file().set_len(size).unwrap();
        let mut device = Self::over(file.as_file(), tag);
        device._file = Some(file);
        device
    }

    /// Nothing is reserved by asking for a free one: others may be faster (kernel fact 13).
    fn over(backing: &File, tag: &str) -> Self {
        let control = File::options().read(true).write(true).open("/dev/loop-control").unwrap();
        loop {
            let name = format!("loop{}", sys::loop_get_free(control.as_fd()).unwrap());
            let device = open_node(&name);
            let mut info = LoopInfo64::zeroed();
            info.set_file_name(tag);
            match sys::loop_configure(device.as_fd(), backing, 0, info) {
                Ok(()) => return Loop { name, tag: tag.into(), _file: None },
                Err(e) if e.raw_os_error() == Some(libc::EBUSY) => {}
                Err(e) => panic!("{name}: {e}"),
            }
        }
    }

    fn node(&self) -> String {
        format!("/dev/{}", self.name)
    }

    /// Unbinds it, and waits until it is: somebody who looks at it in passing keeps it for a moment.
    fn clear(&self) {
        let ours = |device: &File| sys::loop_status(device.as_fd()).is_ok_and(|i| i.file_name() == self.tag);
        let until = Instant::now() + Duration::from_secs(10);
        loop {
            let device = open_node(&self.name);
            if !ours(&device) || Instant::now() > until {
                return;
            }
            // ENXIO: it has just gone.
            let _ = sys::loop_clear(device.as_fd());
            drop(device);
            std::thread::yield_now();
        }
    }
}

impl Drop for Loop {
    fn drop(&mut self) {
        self.clear();
    }
}

/// Opens a node, for writing where that is allowed. ENXIO: somebody's unbinding is not done yet.
fn open_node(name: &str) -> File {
    let path = format!("/dev/{name}");
    loop {
        let opened = File::options().read(true).write(true).open(&path).or_else(|_| File::open(&path));
        match opened {
            Err(e) if e.raw_os_error() == Some(libc::ENXIO) => std::thread::yield_now(),
            other => return other.unwrap(),
        }
    }
}

/// Tells a thread to stop, also when the test panics: the scope waits for it.
struct StopOnDrop<'a>(&'a AtomicBool);

impl Drop for StopOnDrop<'_> {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Relaxed);
    }
}

/// A child that ends with the test.
struct Reaped(Child);

impl Drop for Reaped {
    fn drop(&mut self) {
        self.0.kill().ok();
        self.0.wait().ok();
    }
}

fn run(program: &str, args: &[&str]) {
    let out = Command::new(program).args(args).output().unwrap();
    assert!(out.status.success(), "{program} {args:?}: {}", String::from_utf8_lossy(&out.stderr));
}

/// Something to be undone by a command when dropped.
struct Undo(&'static str, Vec<String>);

impl Drop for Undo {
    fn drop(&mut self) {
        Command::new(self.0).args(&self.1).output().ok();
    }
}

fn mount(device: &Loop, dir: &Path) -> Undo {
    let dir = dir.to_str().unwrap();
    run("mkfs.ext4", &["-q", &device.node()]);
    run("mount", &[&device.node(), dir]);
    Undo("umount", vec![dir.into()])
}

fn devices() -> Arc<KernelDevices> {
    KernelDevices::start(Options::default()).unwrap()
}

fn disk(devices: &KernelDevices, device: &Loop) -> Disk {
    let disk = devices.disk(&device.name).unwrap().unwrap();
    assert_eq!(disk.identity, DiskIdentity::LoopTag(device.tag.clone()));
    disk
}

/// Expects the disk to be in use by this one. Whoever else has it open passes by: a daemon that
/// looks around, or a child of another test between fork and exec.
fn in_use_by(devices: &KernelDevices, disk: &Disk, want: Holder) {
    match devices.hold(disk) {
        Err(DevicesError::InUse { device, holders }) => {
            assert_eq!(device, &*disk.name);
            assert!(holders.contains(&want), "{holders:?} has no {want:?}");
            assert!(holders.iter().all(|h| *h == want || h.kind == HolderKind::Open), "{holders:?}");
        }
        other => panic!("not in use: {other:?}"),
    }
}

fn holder(kind: HolderKind, pid: Option<i32>, name: impl Into<String>) -> Holder {
    Holder { kind, pid, name: name.into() }
}

/// Holds the disk when it is free. Another test's mount namespace is a copy that keeps our mounts
/// for a moment: no event tells when it has let go of them.
fn hold_when_free(devices: &KernelDevices, disk: &Disk) {
    let until = Instant::now() + Duration::from_secs(20);
    loop {
        match devices.hold(disk) {
            Ok(held) => return drop(held),
            Err(DevicesError::InUse { holders, .. })
                if Instant::now() < until && holders.iter().all(|h| h.kind == HolderKind::Mount && h.pid.is_some()) => {
            }
            Err(error) => panic!("{error:?}"),
        }
    }
}

/// Waits for the event that makes `look` yield something.
async fn until<T>(
    changes: &mut tokio::sync::broadcast::Receiver<DeviceChange>,
    name: &str,
    mut look: impl FnMut() -> Option<T>,
) -> T {
    let wait = async {
        loop {
            let change = changes.recv().await.unwrap();
            if (&*change.name == name || &*change.name == EVERYTHING)
                && let Some(found) = look()
            {
                return found;
            }
        }
    };
    tokio::time::timeout(Duration::from_secs(20), wait).await.unwrap()
}

#[tokio::test]
async fn a_bound_device_is_told_and_seen_and_one_that_goes_as_well() {
    let devices = devices();
    let mut changes = devices.changes();
    let device = Loop::bind(3 << 20);
    let found = until(&mut changes, &device.name, || {
        devices.disk(&device.name).unwrap().filter(|d| d.identity == DiskIdentity::LoopTag(device.tag.clone()))
    })
    .await;
    assert_eq!(found.size, 3 << 20);
    assert_eq!(found.incarnation.boot, devices.boot());
    assert!(devices.disks().unwrap().contains(&found));
    device.clear();
    until(&mut changes, &device.name, || {
        let now = devices.disk(&device.name).unwrap();
        now.is_none_or(|d| d.incarnation != found.incarnation).then_some(())
    })
    .await;
    assert!(!devices.disks().unwrap().iter().any(|d| d.incarnation == found.incarnation));
}

#[test]
fn without_uevents_looking_works_and_absence_is_not_remembered() {
    let devices = KernelDevices::start(Options { uevents: false, ..Options::default() }).unwrap();
    for _ in 0..3 {
        let device = Loop::bind(1 << 20);
        let seen = disk(&devices, &device);
        assert!(devices.changes().try_recv().is_err());
        device.clear();
        // Unbound with the last opener: somebody's passing look may be that.
        let until = Instant::now() + Duration::from_secs(20);
        while devices.disk(&device.name).unwrap().is_some_and(|d| d.incarnation == seen.incarnation) {
            assert!(Instant::now() < until);
            std::thread::yield_now();
        }
    }
    for name in ["", ".", "..", "../block/vda", "loop4095", "nosuch", "zram0"] {
        assert_eq!(devices.disk(name).unwrap(), None, "{name}");
    }
}

#[test]
fn two_devices_of_one_tag_are_both_listed() {
    let devices = devices();
    let one = Loop::bind(1 << 20);
    let two = Loop::tagged(1 << 20, &one.tag);
    let same: Vec<_> = devices.disks().unwrap().into_iter().filter(|d| d.identity.text() == one.tag).collect();
    assert_eq!(same.len(), 2);
    assert_ne!(same[0].incarnation, same[1].incarnation);
    assert_eq!(same.iter().filter(|d| *d.name == *two.name).count(), 1);
}

#[test]
fn an_incarnations_identity_is_read_once_and_the_pin_reads_it_again() {
    let devices = devices();
    let device = Loop::bind(1 << 20);
    let before = disk(&devices, &device);
    let pin = devices.pin(&before).unwrap();
    let node = open_node(&device.name);
    let mut info = sys::loop_status(node.as_fd()).unwrap();
    info.set_file_name("renamed");
    sys::loop_set_status(node.as_fd(), &info).unwrap();
    assert_eq!(disk(&devices, &device), before);
    assert_eq!(pin.look().unwrap().identity, DiskIdentity::LoopTag("renamed".into()));
    info.set_file_name(&device.tag);
    sys::loop_set_status(node.as_fd(), &info).unwrap();
}

#[test]
fn a_half_changed_disk_is_never_reported() {
    let devices = devices();
    let tags: HashMap<String, u64> = (1..=2).map(|n| (DiskIdentity::loop_tag(VolumeId::random()), n << 20)).collect();
    let bound = Mutex::new(String::new());
    let seen = AtomicUsize::new(0);
    let stop = AtomicBool::new(false);
    std::thread::scope(|scope| {
        let looking = scope.spawn(|| {
            while !stop.load(Ordering::Relaxed) {
                let name = bound.lock().clone();
                let Some(disk) = devices.disk(&name).unwrap() else { continue };
                if let Some(size) = tags.get(disk.identity.text()) {
                    assert_eq!(disk.size, *size, "{disk:?}");
                    seen.fetch_add(1, Ordering::Relaxed);
                }
            }
        });
        let _stop = StopOnDrop(&stop);
        for round in 0.. {
            for (tag, size) in &tags {
                let device = Loop::tagged(*size, tag);
                bound.lock().clone_from(&device.name);
            }
            // Enough tries, and enough of them that caught a device bound.
            if looking.is_finished() || (round > 100 && seen.load(Ordering::Relaxed) > 20) {
                break;
            }
        }
    });
    println!("{} sightings", seen.into_inner());
}

#[tokio::test]
async fn a_pin_keeps_the_device_from_becoming_another_and_lets_go_when_released() {
    let devices = devices();
    let mut changes = devices.changes();
    let device = Loop::bind(1 << 20);
    let seen = disk(&devices, &device);
    let pin = devices.pin(&seen).unwrap();
    let shared = Arc::clone(&pin);
    assert!(pin.alive());
    assert_eq!(pin.look().unwrap(), seen);
    device.clear();
    assert!(pin.alive(), "the kernel only marks a device that is open");
    shared.release();
    assert!(!pin.alive());
    assert_eq!(pin.look(), Err(DevicesError::Gone { device: device.name.clone() }));
    // Unbound with the last opener: somebody's passing look may be that.
    until(&mut changes, &device.name, || {
        let now = devices.disk(&device.name).unwrap();
        now.is_none_or(|d| d.incarnation != seen.incarnation).then_some(())
    })
    .await;
    assert!(matches!(devices.pin(&seen), Err(DevicesError::Gone { .. })));
    assert!(matches!(devices.hold(&seen), Err(DevicesError::Gone { .. })));
}

#[test]
fn another_disk_under_a_pin_kills_it() {
    const LOOP_CHANGE_FD: libc::c_ulong = 0x4C06;
    let devices = devices();
    let file = |size| {
        let file = tempfile::NamedTempFile::new().unwrap();
        file.as_file().set_len(size).unwrap();
        file
    };
    let (one, two) = (file(1 << 20), file(1 << 20));
    // Only a read-only loop device may have its file exchanged.
    let device = Loop::over(&File::open(one.path()).unwrap(), &DiskIdentity::loop_tag(VolumeId::random()));
    let seen = disk(&devices, &device);
    let pin = devices.pin(&seen).unwrap();
    assert!(devices.hold(&seen).is_ok(), "a read-only disk is held as well");
    let (node, other) = (File::open(device.node()).unwrap(), File::open(two.path()).unwrap());
    // SAFETY: LOOP_CHANGE_FD takes a descriptor, which outlives the call.
    let result = unsafe {
        use std::os::fd::AsRawFd;
        libc::ioctl(node.as_raw_fd(), LOOP_CHANGE_FD as _, other.as_raw_fd())
    };
    assert_eq!(result, 0, "{}", std::io::Error::last_os_error());
    assert!(!pin.alive());
    assert!(matches!(pin.look(), Err(DevicesError::Gone { .. })));
    assert!(matches!(devices.hold(&seen), Err(DevicesError::Gone { .. })));
    assert_ne!(disk(&devices, &device).incarnation, seen.incarnation);
}

#[test]
fn a_mounted_disk_is_in_use_until_it_is_unmounted() {
    let devices = devices();
    let device = Loop::bind(8 << 20);
    let dir = tempfile::tempdir().unwrap();
    let seen = disk(&devices, &device);
    let mounted = mount(&device, dir.path());
    in_use_by(&devices, &seen, holder(HolderKind::Mount, None, dir.path().to_str().unwrap()));
    drop(mounted);
    hold_when_free(&devices, &seen);
    assert!(devices.holders(seen.dev).unwrap().iter().all(|h| h.kind == HolderKind::Open));
}

#[test]
fn a_mount_in_another_namespace_only_is_found_with_its_process() {
    let devices = devices();
    let device = Loop::bind(8 << 20);
    let dir = tempfile::tempdir().unwrap();
    let seen = disk(&devices, &device);
    run("mkfs.ext4", &["-q", &device.node()]);
    // The copies of other tests' mounts would keep their devices busy.
    let script = "awk '$5 ~ \"^/tmp/\" {print $5}' /proc/self/mountinfo | xargs -r -n1 umount -l
        mount \"$0\" \"$1\" && echo mounted && exec sleep 600";
    let mut child = Command::new("unshare")
        .args(["-m", "--propagation", "private", "sh", "-c", script, &device.node()])
        .arg(dir.path())
        .stdout(Stdio::piped())
        .spawn()
        .map(Reaped)
        .unwrap();
    let mut line = String::new();
    BufReader::new(child.0.stdout.take().unwrap()).read_line(&mut line).unwrap();
    assert_eq!(line, "mounted\n");
    let pid = i32::try_from(child.0.id()).unwrap();
    in_use_by(&devices, &seen, holder(HolderKind::Mount, Some(pid), dir.path().to_str().unwrap()));
    drop(child);
    hold_when_free(&devices, &seen);
}

#[test]
fn a_process_that_has_it_open_is_named_also_through_another_node() {
    let devices = devices();
    let device = Loop::bind(1 << 20);
    let seen = disk(&devices, &device);
    let pin = devices.pin(&seen).unwrap();
    let dir = tempfile::tempdir().unwrap();
    let other = dir.path().join("block");
    let dev = rustix::fs::makedev(seen.dev.major, seen.dev.minor);
    rustix::fs::mknodat(rustix::fs::CWD, &other, rustix::fs::FileType::BlockDevice, Mode::RUSR, dev).unwrap();
    for path in [PathBuf::from(device.node()), other] {
        let file = File::open(&path).unwrap();
        let child = Reaped(Command::new("sleep").arg("600").stdin(file).spawn().unwrap());
        let pid = i32::try_from(child.0.id()).unwrap();
        in_use_by(&devices, &seen, holder(HolderKind::Open, Some(pid), "sleep"));
        drop(child);
        drop(devices.hold(&seen).unwrap());
    }
    assert!(pin.alive());
}

#[test]
fn our_own_descriptors_and_o_path_are_no_users() {
    let devices = devices();
    let device = Loop::bind(1 << 20);
    let seen = disk(&devices, &device);
    let _pin = devices.pin(&seen).unwrap();
    let _ours = File::open(device.node()).unwrap();
    let flags = OFlags::PATH | OFlags::CLOEXEC;
    let path_only = rustix::fs::open(device.node(), flags, Mode::empty()).unwrap();
    let _child = Reaped(Command::new("sleep").arg("600").stdin(path_only).spawn().unwrap());
    let held = devices.hold(&seen).unwrap();
    // Held exclusively by ourselves: the kernel names nobody, and we are none of the rows.
    in_use_by(&devices, &seen, holder(HolderKind::Unnamed, None, ""));
    drop(held);
    drop(devices.hold(&seen).unwrap());
}

#[test]
fn a_passing_opener_is_waited_for() {
    let devices = devices();
    let device = Loop::bind(1 << 20);
    let seen = disk(&devices, &device);
    let file = File::open(device.node()).unwrap();
    let _child = Reaped(Command::new("sleep").arg("0.3").stdin(file).spawn().unwrap());
    drop(devices.hold(&seen).unwrap());
}

#[test]
fn swap_is_in_use() {
    let devices = devices();
    let device = Loop::bind(8 << 20);
    let seen = disk(&devices, &device);
    run("mkswap", &[&device.node()]);
    let out = Command::new("swapon").arg(device.node()).output().unwrap();
    if !out.status.success() {
        println!("skipped: no swap here: {}", String::from_utf8_lossy(&out.stderr));
        return;
    }
    let swap = Undo("swapoff", vec![device.node()]);
    in_use_by(&devices, &seen, holder(HolderKind::Swap, None, device.node()));
    drop(swap);
    drop(devices.hold(&seen).unwrap());
}

#[test]
fn a_dm_device_over_it_is_named() {
    let devices = devices();
    let device = Loop::bind(8 << 20);
    let seen = disk(&devices, &device);
    let label = format!("volfs-test-{}-{}", std::process::id(), device.name);
    let table = format!("0 2048 linear {} 0", device.node());
    let made = Command::new("dmsetup").args(["create", &label, "--table", &table]).output();
    if !made.is_ok_and(|out| out.status.success()) {
        println!("skipped: no device mapper here");
        return;
    }
    let dm = Undo("dmsetup", vec!["remove".into(), label.clone()]);
    let over = rustix::fs::stat(format!("/dev/mapper/{label}")).unwrap().st_rdev;
    let name = format!("dm-{} ({label})", rustix::fs::minor(over));
    in_use_by(&devices, &seen, holder(HolderKind::Holder, None, name));
    drop(dm);
    drop(devices.hold(&seen).unwrap());
}

#[test]
fn a_loop_device_over_it_is_named_whether_scanned_or_not() {
    let devices = devices();
    let device = Loop::bind(1 << 20);
    let seen = disk(&devices, &device);
    let over = Loop::over(&open_node(&device.name), "volfs-test: over another");
    let want = holder(HolderKind::Loop, None, &over.name);
    in_use_by(&devices, &seen, want.clone());
    // Now it is told by the kernel, and no longer by its path.
    devices.disks().unwrap();
    in_use_by(&devices, &seen, want);
    drop(over);
    drop(devices.hold(&seen).unwrap());
}

#[test]
fn a_loop_device_over_a_node_that_was_deleted_is_named() {
    let devices = devices();
    let device = Loop::bind(1 << 20);
    let seen = disk(&devices, &device);
    let dir = tempfile::tempdir().unwrap();
    let node = dir.path().join("block");
    let dev = rustix::fs::makedev(seen.dev.major, seen.dev.minor);
    let kind = rustix::fs::FileType::BlockDevice;
    rustix::fs::mknodat(rustix::fs::CWD, &node, kind, Mode::RUSR | Mode::WUSR, dev).unwrap();
    let over = Loop::over(&File::options().read(true).write(true).open(&node).unwrap(), "volfs-test: over a node");
    std::fs::remove_file(&node).unwrap();
    in_use_by(&devices, &seen, holder(HolderKind::Loop, None, &over.name));
}

#[test]
fn data_that_cannot_be_flushed_is_an_error_of_its_own() {
    let devices = devices();
    let dir = tempfile::tempdir().unwrap();
    run("mount", &["-t", "tmpfs", "-o", "size=1m", "volfs-test", dir.path().to_str().unwrap()]);
    let _mounted = Undo("umount", vec!["-l".into(), dir.path().to_str().unwrap().into()]);
    let file = File::options().read(true).write(true).create_new(true).open(dir.path().join("full")).unwrap();
    file.set_len(8 << 20).unwrap();
    let device = Loop::over(&file, &DiskIdentity::loop_tag(VolumeId::random()));
    let seen = disk(&devices, &device);
    let _pin = devices.pin(&seen).unwrap();
    run("dd", &["if=/dev/urandom", &format!("of={}", device.node()), "bs=1M", "count=4", "conv=notrunc"]);
    let result = devices.hold(&seen);
    assert!(matches!(&result, Err(DevicesError::Flush { device, .. }) if *device == *seen.name), "{result:?}");
}

#[test]
fn many_who_ask_share_few_walks() {
    let devices = devices();
    let device = Loop::bind(1 << 20);
    let seen = disk(&devices, &device);
    let file = File::open(device.node()).unwrap();
    let child = Reaped(Command::new("sleep").arg("600").stdin(file).spawn().unwrap());
    let want = holder(HolderKind::Open, i32::try_from(child.0.id()).ok(), "sleep");
    let all = 200;
    let start = Barrier::new(all);
    std::thread::scope(|scope| {
        for _ in 0..all {
            scope.spawn(|| {
                start.wait();
                assert!(devices.holders(seen.dev).unwrap().contains(&want));
            });
        }
    });
    println!("{} walks for {all}", devices.walks());
    assert!(devices.walks() < all as u64 / 4, "{} walks", devices.walks());
    drop(child);
    // A walk begun before would still show it.
    assert!(!devices.holders(seen.dev).unwrap().contains(&want));
}

#[test]
fn a_disk_that_carries_the_host_says_what_it_carries() {
    let devices = devices();
    let foreign = Loop::tagged(8 << 20, "volfs-test: somebody's");
    let ours = Loop::bind(8 << 20);
    let dirs = [tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap()];
    let (theirs, seen) = (disk(&devices, &foreign), disk(&devices, &ours));
    assert_eq!(devices.carries_host(&theirs).unwrap(), None);
    let mounts = [mount(&foreign, dirs[0].path()), mount(&ours, dirs[1].path())];
    let why = devices.carries_host(&theirs).unwrap().unwrap();
    assert!(why.contains(dirs[0].path().to_str().unwrap()) && why.contains(&foreign.name), "{why}");
    assert_eq!(devices.carries_host(&seen).unwrap(), None, "a mounted volume is in use, not the host's");
    let options = Options { own_state: vec![dirs[1].path().into()], uevents: false, ..Options::default() };
    let with_state = KernelDevices::start(options).unwrap();
    let why = with_state.carries_host(&seen).unwrap().unwrap();
    assert!(why.contains("volfs's own directory"), "{why}");
    drop(mounts);
    hold_when_free(&devices, &theirs);
    let over = Loop::over(&open_node(&foreign.name), "volfs-test: over somebody's");
    assert_eq!(devices.carries_host(&theirs).unwrap(), None);
    let mounted = mount(&over, dirs[0].path());
    assert!(devices.carries_host(&theirs).unwrap().is_some(), "through a loop device over it");
    drop(mounted);
    let root = rustix::fs::stat("/").unwrap().st_dev;
    let root = DevNo { major: rustix::fs::major(root), minor: rustix::fs::minor(root) };
    match devices.disks().unwrap().into_iter().find(|d| d.dev == root) {
        Some(disk) => assert!(devices.carries_host(&disk).unwrap().is_some()),
        None => println!("skipped: / is not on a whole disk"),
    }
}

/// Prints what the report quotes; fails only if something is slower by orders of magnitude.
#[test]
fn asking_is_cheap() {
    let devices = devices();
    let loops: Vec<Loop> = (0..10).map(|_| Loop::bind(1 << 20)).collect();
    let time = |what: &str, rounds: u32, ask: &mut dyn FnMut()| {
        let start = Instant::now();
        (0..rounds).for_each(|_| ask());
        let each = start.elapsed() / rounds;
        println!("{what}: {each:?}");
        each
    };
    time("disks(), first", 1, &mut || drop(devices.disks().unwrap()));
    time("disks(), again", 50, &mut || drop(devices.disks().unwrap()));
    time("disk()", 500, &mut || drop(devices.disk(&loops[0].name).unwrap()));
    let seen = disk(&devices, &loops[0]);
    let pin = devices.pin(&seen).unwrap();
    let alive = time("alive()", 10_000, &mut || assert!(pin.alive()));
    time("look()", 500, &mut || drop(pin.look().unwrap()));
    time("holders()", 20, &mut || drop(devices.holders(seen.dev).unwrap()));
    time("hold()", 5, &mut || drop(devices.hold(&seen).unwrap()));
    assert!(alive < Duration::from_millis(1));
}
