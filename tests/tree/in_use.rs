//! A volume that somebody uses is not taken away: every kind of user, by name, and all as before.

use std::fs::{self, File};
use std::io::ErrorKind;
use std::os::unix::fs::FileExt;
use std::path::PathBuf;
use std::process::{Command, Stdio};

use super::common::Volfs;
use super::waiting::{Kid, status};

/// A command to undo something with, also when the test fails.
pub struct Undo(Vec<String>);

impl Undo {
    pub fn with(words: &[&str]) -> Self {
        Undo(words.iter().map(|w| (*w).to_owned()).collect())
    }

    fn run(&self) -> bool {
        let quiet = |c: &mut Command| c.stdout(Stdio::null()).stderr(Stdio::null()).status().unwrap().success();
        quiet(Command::new(&self.0[0]).args(&self.0[1..]))
    }

    /// Now, and it must work.
    pub fn now(mut self) {
        assert!(self.run(), "{:?}", self.0);
        self.0 = vec!["true".into()];
    }
}

impl Drop for Undo {
    fn drop(&mut self) {
        self.run();
    }
}

/// Two volumes: `d` attached, `e` a bystander that a destroy of the job would take.
fn one_attached() -> Volfs {
    let volfs = Volfs::start();
    volfs.job("a", &["d", "e"], "16M");
    volfs.ok("echo attach > $R/jobs/a/disks/d/control");
    volfs
}

fn device(volfs: &Volfs) -> String {
    volfs.value("jobs/a/disks/d/device")
}

/// What must not change by a refused command.
fn served(volfs: &Volfs) -> Vec<String> {
    let files = ["status", "device", "incarnation", "size", "owner", "vm"];
    let mut all: Vec<String> = files.iter().map(|f| volfs.value(format!("jobs/a/disks/d/{f}"))).collect();
    all.push(volfs.ok("stat -c '%t %T %F' -L $R/jobs/a/disks/d/block $R/exports/*"));
    all.push(volfs.ok("ls -l $R/devices | cut -d ' ' -f 9-"));
    all.push(volfs.ok("ls $R/jobs/a/disks $R/volumes"));
    all.push(status(volfs, "a", "e"));
    all
}

/// The last sector but one can be written through `block` and read back: users here leave it alone.
fn works(volfs: &Volfs) {
    let at = 15 << 20;
    let block = volfs.path("jobs/a/disks/d/block");
    let file = fs::OpenOptions::new().read(true).write(true).open(&block).unwrap();
    let text = format!("{:?}", std::time::Instant::now());
    match file.write_all_at(text.as_bytes(), at) {
        // The kernel writes for nobody to a device that it swaps to.
        Err(e) if e.kind() == ErrorKind::ExecutableFileBusy => {
            let swaps = fs::read_to_string("/proc/swaps").unwrap();
            assert!(swaps.contains(&format!("{} ", device(volfs))), "{swaps}");
            let mut magic = [0; 10];
            file.read_exact_at(&mut magic, 4086).unwrap();
            assert_eq!(&magic, b"SWAPSPACE2");
            return;
        }
        done => done.unwrap(),
    }
    file.sync_all().unwrap();
    let mut back = vec![0; text.len()];
    file.read_exact_at(&mut back, at).unwrap();
    assert_eq!(String::from_utf8(back).unwrap(), text);
}

/// Detach and destroy are EBUSY, name the user, and leave everything as it was.
fn is_refused(volfs: &Volfs, names: &[&str]) {
    let before = served(volfs);
    assert_eq!(before[0], "attached");
    let uuids = before[before.len() - 2].clone();
    assert_eq!(volfs.write("jobs/a/disks/d/control", "detach"), libc::EBUSY);
    let error = volfs.value("jobs/a/disks/d/error");
    for name in names {
        assert!(error.contains(name), "`{name}` is not in: {error}");
    }
    assert!(error.contains(device(volfs).trim_start_matches("/dev/")), "{error}");
    assert_eq!(served(volfs), before);
    works(volfs);
    let holders = volfs.read("jobs/a/disks/d/holders").unwrap();
    assert!(holders.lines().count() > 1, "{holders}");
    assert_eq!(volfs.write("jobs/a/control", "destroy a"), libc::EBUSY);
    let error = volfs.read("jobs/a/error").unwrap();
    for name in names {
        assert!(error.contains(name), "`{name}` is not in: {error}");
    }
    assert_eq!(served(volfs), before, "{uuids}");
    works(volfs);
}

/// Once the use is over, the same commands work.
fn is_free(volfs: &Volfs) {
    volfs.ok("echo detach > $R/jobs/a/disks/d/control");
    assert_eq!(status(volfs, "a", "d"), "detached");
    assert!(volfs.loops().is_empty());
    assert_eq!(volfs.value("jobs/a/disks/d/error"), "");
    volfs.ok("echo attach > $R/jobs/a/control; echo 'destroy a' > $R/jobs/a/control");
    assert_eq!(volfs.ok("ls $R/jobs"), "");
}

/// A filesystem in the first half.
fn with_filesystem(volfs: &Volfs) -> PathBuf {
    volfs.ok("mke2fs -q -F $R/jobs/a/disks/d/block 8M");
    let dir = volfs.scratch("there");
    fs::create_dir(&dir).unwrap();
    dir
}

#[test]
fn in_use_mounted() {
    let volfs = one_attached();
    let dir = with_filesystem(&volfs);
    let there = dir.to_str().unwrap();
    volfs.ok(&format!("mount $R/jobs/a/disks/d/block {there} 2>/dev/null || mount {} {there}", device(&volfs)));
    let mounted = Undo::with(&["umount", there]);
    is_refused(&volfs, &[there]);
    fs::write(dir.join("file"), "kept").unwrap();
    mounted.now();
    // A test beside this one that made a mount namespace meanwhile has a copy of that mount.
    volfs.until("end of all copies", || volfs.sh("echo detach > $R/jobs/a/disks/d/control").status == 0);
    volfs.ok("echo attach > $R/jobs/a/disks/d/control");
    volfs.ok(&format!("mount -r {} {there}", device(&volfs)));
    let mounted = Undo::with(&["umount", there]);
    assert_eq!(fs::read_to_string(dir.join("file")).unwrap(), "kept");
    mounted.now();
    volfs.until("end of all copies", || volfs.sh("echo detach > $R/jobs/a/disks/d/control").status == 0);
    volfs.ok("echo attach > $R/jobs/a/disks/d/control");
    is_free(&volfs);
}

#[test]
fn in_use_mounted_in_another_mount_namespace_only() {
    let volfs = one_attached();
    let dir = with_filesystem(&volfs);
    let mut command = Command::new("unshare");
    let script = format!("mount {} {} && echo there && exec sleep 1000", device(&volfs), dir.display());
    command.args(["-m", "--propagation", "private", "sh", "-c", &script]);
    let mut kid = Kid::of(&volfs, command);
    assert_eq!(kid.line(), "there\n");
    assert!(!fs::read_to_string("/proc/self/mountinfo").unwrap().contains(dir.to_str().unwrap()));
    is_refused(&volfs, &[dir.to_str().unwrap()]);
    drop(kid);
    is_free(&volfs);
}

#[test]
fn in_use_open_for_writing_by_dd() {
    let volfs = one_attached();
    let fifo = volfs.scratch("endless");
    rustix::fs::mknodat(
        rustix::fs::CWD,
        &fifo,
        rustix::fs::FileType::Fifo,
        rustix::fs::Mode::RUSR | rustix::fs::Mode::WUSR,
        0,
    )
    .unwrap();
    let feed = fs::OpenOptions::new().read(true).write(true).open(&fifo).unwrap();
    let mut command = Command::new("dd");
    command.arg(format!("of={}", volfs.path("jobs/a/disks/d/block").display())).arg("conv=notrunc");
    let kid = Kid::with_input(&volfs, command, feed.try_clone().unwrap());
    let fds = format!("/proc/{}/fd", kid.pid());
    let path = volfs.path("jobs/a");
    let has_it_open = || {
        let links = fs::read_dir(&fds).into_iter().flatten().flatten().filter_map(|e| fs::read_link(e.path()).ok());
        links.into_iter().any(|to| to.starts_with(&path) && to.ends_with("block"))
    };
    volfs.until("dd at its work", has_it_open);
    is_refused(&volfs, &["dd", &format!("pid {}", kid.pid())]);
    drop(kid);
    is_free(&volfs);
}

#[test]
fn in_use_open_for_reading_by_its_device_name() {
    let volfs = one_attached();
    let mut kid =
        Kid::shell(&volfs, &["bash"], &format!("exec 3< {} && echo there && exec sleep 1000", device(&volfs)));
    assert_eq!(kid.line(), "there\n");
    is_refused(&volfs, &["sleep", &format!("pid {}", kid.pid())]);
    let holders = volfs.read("jobs/a/disks/d/holders").unwrap();
    assert!(holders.lines().any(|l| l == format!("open\t{}\tsleep", kid.pid())), "{holders}");
    drop(kid);
    is_free(&volfs);
}

#[test]
fn in_use_as_swap() {
    let volfs = one_attached();
    let device = device(&volfs);
    // In KiB: the last part stays free.
    volfs.ok(&format!("mkswap {device} 8192 > /dev/null && swapon {device}"));
    let swap = Undo::with(&["swapoff", &device]);
    is_refused(&volfs, &["swap"]);
    swap.now();
    works(&volfs);
    is_free(&volfs);
}

#[test]
fn in_use_by_another_loop_device() {
    let volfs = one_attached();
    let other = volfs.ok(&format!("losetup -f --show {}", device(&volfs)));
    let bound = Undo::with(&["losetup", "-d", &other]);
    is_refused(&volfs, &[other.trim_start_matches("/dev/")]);
    bound.now();
    is_free(&volfs);
}

#[test]
fn in_use_by_an_nbd_client_through_exports() {
    if !crate::common::have(&["nbdcopy", "nbdkit"]) {
        return;
    }
    let volfs = one_attached();
    let socket = volfs.scratch("nbd.sock");
    let mut command = Command::new("nbdkit");
    command.args(["-f", "-U"]).arg(&socket).arg("file").arg(format!("dir={}", volfs.path("exports").display()));
    let server = Kid::of(&volfs, command);
    volfs.until("NBD socket", || socket.exists());
    let export = volfs.ok("ls $R/exports");
    let mut command = Command::new("nbdcopy");
    // Nobody reads its output but the first byte: it stays connected.
    command.arg(format!("nbd+unix:///{export}?socket={}", socket.display())).arg("-");
    let client = Kid::of(&volfs, command);
    let fds = format!("/proc/{}/fd", server.pid());
    let exports = volfs.path("exports");
    let has_it_open = || {
        let links = fs::read_dir(&fds).into_iter().flatten().flatten().filter_map(|e| fs::read_link(e.path()).ok());
        links.into_iter().any(|to| to.starts_with(&exports) && to != exports)
    };
    volfs.until("open export", has_it_open);
    is_refused(&volfs, &["nbdkit", &format!("pid {}", server.pid())]);
    drop(client);
    volfs.until("closed export", || !has_it_open());
    is_free(&volfs);
    drop(server);
}

#[test]
fn in_use_an_o_path_descriptor_and_a_shell_in_the_directory_are_no_users() {
    let volfs = one_attached();
    let flags = rustix::fs::OFlags::PATH | rustix::fs::OFlags::CLOEXEC;
    let path = volfs.path("jobs/a/disks/d/block");
    let _path_only = rustix::fs::open(path, flags, rustix::fs::Mode::empty()).unwrap();
    let mut stands = Kid::shell(&volfs, &["bash"], "cd $R/jobs/a/disks/d/ && echo there && sleep 1000");
    assert_eq!(stands.line(), "there\n");
    let _status = File::open(volfs.path("jobs/a/disks/d/status")).unwrap();
    volfs.ok("echo detach > $R/jobs/a/disks/d/control");
    assert!(volfs.loops().is_empty());
}
