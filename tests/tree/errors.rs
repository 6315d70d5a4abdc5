//! Rows E1 to E14: each errno, exact, through the mount.

use std::fs;
use std::io::Read;
use std::os::fd::AsFd;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};

use crate::common::{Volfs, finish};
use crate::rules::{OTHER_VM, edit_meta};
use crate::shells::{python, two_disks};

const NOBODYS: &str = "99999999-1111-4222-8333-444444444444";

fn errno<T>(outcome: std::io::Result<T>) -> i32 {
    outcome.err().and_then(|e| e.raw_os_error()).unwrap_or(0)
}

/// The sentence in `error` beside `control`.
fn sentence(volfs: &Volfs, control: &str) -> String {
    volfs.value(control.replace("control", "error"))
}

#[track_caller]
fn refused(volfs: &Volfs, control: &str, text: &str, errno: i32, name: &str) {
    let got = volfs.write(control, text);
    assert_eq!(got, errno, "`{text}`: {}", sentence(volfs, control));
    assert!(sentence(volfs, control).contains(&format!(" {name}: ")), "`{text}`: {}", sentence(volfs, control));
}

/// A loop device bound to a file by the test; unbound when dropped.
pub struct Loop(PathBuf);

impl Loop {
    /// Binds a file, with a tag as the provider's.
    pub fn bind(file: &Path, tag: &str) -> Self {
        let backing = fs::OpenOptions::new().read(true).write(true).open(file).unwrap();
        let control = fs::OpenOptions::new().read(true).write(true).open("/dev/loop-control").unwrap();
        let mut info = volfs::sys::LoopInfo64::zeroed();
        info.set_file_name(tag);
        loop {
            let number = volfs::sys::loop_get_free(control.as_fd()).unwrap();
            let path = PathBuf::from(format!("/dev/loop{number}"));
            let Ok(node) = fs::OpenOptions::new().read(true).write(true).open(&path) else { continue };
            // Another test may have won it.
            match volfs::sys::loop_configure(node.as_fd(), &backing, 512, info) {
                Ok(()) => return Self(path),
                Err(e) => assert_eq!(e.raw_os_error(), Some(libc::EBUSY), "{e}"),
            }
        }
    }

    pub fn path(&self) -> &Path {
        &self.0
    }
}

impl Drop for Loop {
    fn drop(&mut self) {
        if let Ok(node) = fs::File::open(&self.0) {
            let _ = volfs::sys::loop_clear(node.as_fd());
        }
    }
}

#[test]
fn e1_einval_is_what_is_malformed_or_repeats_a_wrong_name() {
    let volfs = Volfs::start();
    let (on, off) = two_disks(&volfs);
    let volume = format!("jobs/a/volumes/{off}/control");
    for (control, text) in [
        ("control", "nonsense".to_owned()),
        ("control", "attach".into()),
        ("control", "reconcile vm=x".into()),
        ("control", "cancel x".into()),
        ("jobs/a/control", "create".into()),
        ("jobs/a/control", "create x".into()),
        ("jobs/a/control", "create x 0".into()),
        ("jobs/a/control", "create x 1Q".into()),
        ("jobs/a/control", "create x -1".into()),
        ("jobs/a/control", "create .x 1M".into()),
        ("jobs/a/control", "create x/y 1M".into()),
        ("jobs/a/control", "create x 99999999999999999999".into()),
        ("jobs/a/control", "create x 1M size=2M".into()),
        ("jobs/a/control", "create x 1M now".into()),
        ("jobs/a/control", "attach timeout=x".into()),
        ("jobs/a/control", "attach vm=A vm=B".into()),
        ("jobs/a/control", "destroy b".into()),
        ("jobs/a/control", "claim not-a-uuid".into()),
        ("jobs/a/control", format!("claim {}", NOBODYS.to_uppercase().replace('9', "A"))),
        (&volume, "ATTACH".into()),
        (&volume, "attach root".into()),
        (&volume, "attach device_id=3".into()),
        (&volume, format!("delete {on}")),
        (&volume, format!("release {on}")),
        (&volume, "delete".into()),
        (&volume, "resize 1M".into()),
        (&volume, "disk a b".into()),
    ] {
        refused(&volfs, control, &text, libc::EINVAL, "EINVAL");
    }
    for name in ["a b", ".a", "a:b", "ä", &"x".repeat(192)] {
        assert_eq!(errno(fs::create_dir(volfs.path(format!("jobs/{name}")))), libc::EINVAL, "{name}");
    }
    assert_eq!(volfs.value("jobs/a/status"), "idle detached=1 attached=1");
    // In a lookup such a name is only not there.
    for name in ["jobs/a b", "jobs/.a", "volumes/x", &format!("volumes/{}", off.to_uppercase())] {
        assert_eq!(errno(fs::metadata(volfs.path(name))), libc::ENOENT, "{name}");
    }
}

#[test]
fn e2_enoent_is_what_is_not_there() {
    let volfs = Volfs::start();
    two_disks(&volfs);
    refused(&volfs, "jobs/a/control", &format!("claim {NOBODYS}"), libc::ENOENT, "ENOENT");
    refused(&volfs, "jobs/a/control", "move nowhere", libc::ENOENT, "ENOENT");
    refused(&volfs, "jobs/a/disks/off/control", "move nowhere", libc::ENOENT, "ENOENT");
    refused(&volfs, "control", "cancel 999999", libc::ENOENT, "ENOENT");
    refused(&volfs, "control", "abandon 999999", libc::ENOENT, "ENOENT");
    assert_eq!(volfs.write("jobs/b/control", "attach"), libc::ENOENT);
    for path in ["jobs/b", "jobs/a/disks/x", "events/b", "exports/x", "operations/999999", &format!("vms/{OTHER_VM}")] {
        assert_eq!(errno(fs::metadata(volfs.path(path))), libc::ENOENT, "{path}");
    }
    assert_eq!(errno(fs::remove_dir(volfs.path("jobs/b"))), libc::ENOENT);
}

#[test]
fn e3_eexist_and_enotempty_are_what_is_there_already() {
    let volfs = Volfs::start();
    let (_, off) = two_disks(&volfs);
    volfs.job("b", &["off"], "1M");
    refused(&volfs, "jobs/a/control", "create off 1M", libc::EEXIST, "EEXIST");
    refused(&volfs, "jobs/a/control", &format!("claim {off}"), libc::EEXIST, "EEXIST");
    refused(&volfs, "jobs/a/disks/off/control", "disk on", libc::EEXIST, "EEXIST");
    refused(&volfs, "jobs/a/disks/off/control", "move b", libc::EEXIST, "EEXIST");
    refused(&volfs, "jobs/a/control", "move b", libc::EEXIST, "EEXIST");
    assert_eq!(errno(fs::create_dir(volfs.path("jobs/a"))), libc::EEXIST);
    assert_eq!(errno(fs::remove_dir(volfs.path("jobs/a"))), libc::ENOTEMPTY);
    assert_eq!(volfs.value("jobs/a/status"), "idle detached=1 attached=1");
}

#[test]
fn e4_ebusy_is_what_somebody_else_has() {
    let mut volfs = Volfs::prepare(&[], "");
    let gate = volfs.scratch("gate");
    volfs.set_env(&[("VOLFS_FAILPOINTS", &format!("resize.before-call=wait:{}", gate.display()))]);
    volfs.launch();
    let (on, off) = two_disks(&volfs);
    let theirs = volfs.job("b", &["d"], "1M").remove(0);
    let (on_control, off_control) = (format!("volumes/{on}/control"), format!("volumes/{off}/control"));
    let user = fs::File::open(volfs.path(format!("volumes/{on}/block"))).unwrap();
    refused(&volfs, &on_control, "detach", libc::EBUSY, "EBUSY");
    refused(&volfs, "jobs/a/control", "destroy a", libc::EBUSY, "EBUSY");
    drop(user);
    refused(&volfs, &on_control, "detach force", libc::EBUSY, "EBUSY");
    refused(&volfs, &on_control, &format!("attach vm={OTHER_VM}"), libc::EBUSY, "EBUSY");
    refused(&volfs, "jobs/a/control", &format!("claim {theirs}"), libc::EBUSY, "EBUSY");
    fs::write(&gate, "").unwrap();
    let held = volfs.sh_spawn(&["dash"], &format!("echo resize 8M > $R/{off_control}"));
    volfs.until("resizing", || volfs.value(format!("volumes/{off}/status")) == "resizing");
    refused(&volfs, &off_control, "attach", libc::EBUSY, "EBUSY");
    refused(&volfs, &off_control, "resize 16M", libc::EBUSY, "EBUSY");
    refused(&volfs, "jobs/a/control", "destroy a", libc::EBUSY, "EBUSY");
    fs::remove_file(&gate).unwrap();
    assert_eq!(finish(held).status, 0);
    assert_eq!(volfs.write(&off_control, &format!("attach vm={OTHER_VM}")), 0);
    refused(&volfs, &off_control, "attach", libc::EBUSY, "EBUSY");
    assert!(sentence(&volfs, &off_control).contains(OTHER_VM));
    // Marked by another record.
    assert_eq!(volfs.write(format!("volumes/{theirs}/control"), &format!("release {theirs}")), 0);
    edit_meta(&volfs, &theirs, |meta| meta["mark"] = format!("{OTHER_VM}/3").into());
    refused(&volfs, "jobs/a/control", &format!("claim {theirs}"), libc::EBUSY, "EBUSY");
    assert!(sentence(&volfs, "jobs/a/control").contains("from="));
    assert_eq!(volfs.write("jobs/a/control", &format!("claim {theirs} taken from={OTHER_VM}")), 0, "{}", volfs.log());
}

#[test]
fn e5_enodev_enodata_and_estale_are_what_has_no_device_cannot_be_told_or_has_gone() {
    let mut volfs = Volfs::start();
    let (on, off) = two_disks(&volfs);
    assert_eq!(volfs.read(format!("volumes/{off}/device")), Err(libc::ENODEV));
    assert_eq!(volfs.read(format!("volumes/{off}/incarnation")), Err(libc::ENODEV));
    let dir = fs::OpenOptions::new()
        .read(true)
        .custom_flags(libc::O_PATH | libc::O_DIRECTORY)
        .open(volfs.path(format!("jobs/a/volumes/{off}")))
        .unwrap();
    assert_eq!(volfs.write(format!("volumes/{off}/control"), &format!("release {off}")), 0);
    use std::os::fd::AsRawFd;
    let standing = format!("/proc/self/fd/{}/status", dir.as_raw_fd());
    assert_eq!(errno(fs::read(&standing)), libc::ESTALE);
    volfs.terminate();
    volfs.set_env(&[("VOLFS_FAILPOINTS", "loop.unreachable=fail")]);
    for name in volfs.loops() {
        assert!(Command::new("losetup").args(["-d", &format!("/dev/{name}")]).status().unwrap().success());
    }
    volfs.launch();
    assert_eq!(volfs.value(format!("volumes/{on}/status")), "unknown");
    assert_eq!(volfs.read(format!("volumes/{on}/vm")), Err(libc::ENODATA));
    assert_eq!(volfs.read(format!("volumes/{on}/device")), Err(libc::ENODEV));
}

#[test]
fn e6_eperm_is_what_is_not_ours_held_or_protected() {
    let protected = "aaaaaaaa-1111-4222-8333-444444444444";
    let volfs = Volfs::start_with(&[], &format!("protect = [\"{protected}\"]\n"));
    let (_, off) = two_disks(&volfs);
    assert_eq!(volfs.write("jobs/a/hold", "1"), 0);
    refused(&volfs, &format!("volumes/{off}/control"), &format!("delete {off}"), libc::EPERM, "EPERM");
    refused(&volfs, "jobs/a/control", "destroy a", libc::EPERM, "EPERM");
    assert_eq!(volfs.write("jobs/a/hold", "0"), 0);
    edit_meta(&volfs, &off, |meta| meta["mark"] = format!("{OTHER_VM}/7").into());
    refused(&volfs, &format!("volumes/{off}/control"), &format!("delete {off}"), libc::EPERM, "EPERM");
    assert!(sentence(&volfs, &format!("volumes/{off}/control")).contains(OTHER_VM));
    refused(&volfs, &format!("volumes/{off}/control"), "resize 8M", libc::EPERM, "EPERM");
    assert_eq!(volfs.value(format!("volumes/{off}/status")), "conflict");
    // A volume of the store that the configuration protects.
    let dir = volfs.state().join("loop/volumes");
    fs::create_dir(dir.join(protected)).unwrap();
    let data = fs::File::create(dir.join(protected).join("data.img")).unwrap();
    data.set_len(1 << 20).unwrap();
    let meta = format!("{{\"id\":\"{protected}\",\"name\":\"root\",\"size\":1048576}}");
    fs::write(dir.join(protected).join("meta.json"), meta).unwrap();
    refused(&volfs, "jobs/a/control", &format!("claim {protected} root"), libc::EPERM, "EPERM");
    assert!(sentence(&volfs, "jobs/a/control").contains("protected"));
    assert_eq!(errno(fs::write(volfs.path("table"), "x")), libc::EACCES);
}

/// A second daemon over the same state, at a mount point of its own.
struct Beside {
    child: Child,
    at: PathBuf,
}

impl Beside {
    fn read_only(volfs: &Volfs) -> Self {
        let at = volfs.scratch("mnt-read-only");
        fs::create_dir(&at).unwrap();
        let mut command = Command::new(env!("CARGO_BIN_EXE_volfs"));
        command.arg("--state-dir").arg(volfs.state()).arg("--config").arg(volfs.scratch("config.toml"));
        command.arg("--read-only").arg("mount").arg(&at).arg("--background-child");
        command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::null());
        let mut child = command.spawn().unwrap();
        let mut line = [0u8; 6];
        child.stdout.take().unwrap().read_exact(&mut line).unwrap();
        let beside = Self { child, at };
        assert_eq!(&line, b"ready\n");
        beside
    }

    fn write(&self, below: &str, text: &str) -> i32 {
        use std::io::Write;
        let open = fs::OpenOptions::new().write(true).open(self.at.join(below));
        errno(open.and_then(|mut file| file.write(text.as_bytes())))
    }
}

impl Drop for Beside {
    fn drop(&mut self) {
        // SAFETY: kill(2) takes no pointers; the pid is our own child, not yet waited for.
        unsafe { libc::kill(self.child.id() as i32, libc::SIGTERM) };
        let _ = self.child.wait();
        let _ = Command::new("umount").arg("-l").arg(&self.at).stderr(Stdio::null()).status();
    }
}

#[test]
fn e7_erofs_is_every_change_through_a_read_only_start_beside_the_daemon() {
    let volfs = Volfs::start();
    let (on, off) = two_disks(&volfs);
    let beside = Beside::read_only(&volfs);
    let read = |below: &str| fs::read_to_string(beside.at.join(below));
    assert_eq!(read("jobs/a/disks/off/status").unwrap(), "detached\n");
    assert_eq!(read("jobs/a/disks/on/device").unwrap(), volfs.read("jobs/a/disks/on/device").unwrap());
    let before = (volfs.read("table").unwrap(), volfs.read("history").unwrap(), volfs.loops());
    for (control, text) in [
        ("control", "reconcile".to_owned()),
        ("jobs/a/control", "create x 1M".into()),
        ("jobs/a/control", "attach".into()),
        ("jobs/a/control", "destroy a".into()),
        ("jobs/a/disks/off/control", "attach".into()),
        ("jobs/a/disks/off/control", "resize 8M".into()),
        (&format!("volumes/{on}/control"), "detach".into()),
        (&format!("volumes/{off}/control"), format!("delete {off}")),
        (&format!("volumes/{off}/control"), format!("release {off}")),
        ("jobs/a/vm_name", "x".into()),
        ("jobs/a/hold", "1".into()),
    ] {
        assert_eq!(beside.write(control, &text), libc::EROFS, "{control} `{text}`");
    }
    assert_eq!(errno(fs::create_dir(beside.at.join("jobs/b"))), libc::EROFS);
    assert_eq!(errno(fs::remove_dir(beside.at.join("jobs/a"))), libc::EROFS);
    assert!(read("health").unwrap().contains("read-only"), "{}", read("health").unwrap());
    assert!(read("jobs/a/disks/off/error").unwrap().contains("read-only"));
    assert_eq!((volfs.read("table").unwrap(), volfs.read("history").unwrap(), volfs.loops()), before);
    // It is no user of the device: the daemon that owns the volume detaches it.
    assert_eq!(volfs.write(format!("volumes/{on}/control"), "detach"), 0, "{}", volfs.log());
    assert_eq!(read("jobs/a/disks/on/device").unwrap_err().raw_os_error(), Some(libc::ENODEV));
}

#[test]
fn e8_etimedout_and_eintr_end_the_wait_and_not_the_operation() {
    if !crate::common::have(&["/usr/bin/python3"]) {
        return;
    }
    let mut volfs = Volfs::prepare(&[], "");
    let gate = volfs.scratch("gate");
    volfs.set_env(&[("VOLFS_FAILPOINTS", &format!("attach.before-call=wait:{}", gate.display()))]);
    volfs.launch();
    let made = volfs.job("a", &["d"], "1M");
    let control = format!("volumes/{}/control", made[0]);
    fs::write(&gate, "").unwrap();
    let began = std::time::Instant::now();
    refused(&volfs, &control, "attach timeout=1", libc::ETIMEDOUT, "ETIMEDOUT");
    let took = began.elapsed().as_secs_f64();
    assert!((0.9..5.0).contains(&took), "{took}");
    assert_eq!(volfs.value("jobs/a/status"), "busy attaching=1");
    let interrupted = "import ctypes, os, signal, sys\n\
        signal.signal(signal.SIGALRM, lambda *a: None)\n\
        signal.siginterrupt(signal.SIGALRM, True)\n\
        fd = os.open(sys.argv[1], os.O_WRONLY)\n\
        libc = ctypes.CDLL(None, use_errno=True)\n\
        signal.setitimer(signal.ITIMER_REAL, 0.3)\n\
        n = libc.write(fd, b'attach', 6)\n\
        sys.exit(ctypes.get_errno() if n < 0 else 200)\n";
    assert_eq!(python(&volfs, interrupted, &format!("$R/{control}")).status, libc::EINTR);
    assert!(sentence(&volfs, &control).contains(" EINTR: "), "{}", sentence(&volfs, &control));
    assert_eq!(volfs.value("jobs/a/status"), "busy attaching=1");
    let joined = volfs.sh_spawn(&["dash"], &format!("echo attach > $R/{control}"));
    fs::remove_file(&gate).unwrap();
    assert_eq!(finish(joined).status, 0);
    assert_eq!(volfs.value("jobs/a/status"), "idle attached=1");
    let attaches = volfs.read("jobs/a/history").unwrap().matches("\tattach\t").count();
    assert_eq!(attaches, 1, "one operation for all three");
}

/// Starts the daemon again with failpoints.
fn with_failpoints(volfs: &mut Volfs, points: &str) {
    assert_eq!(volfs.terminate().0, 0, "{}", volfs.log());
    volfs.set_env(&[("VOLFS_FAILPOINTS", points)]);
    volfs.launch();
}

#[test]
fn e9_eremoteio_is_the_clouds_refusal_in_its_own_words() {
    let mut volfs = Volfs::start();
    let (_, off) = two_disks(&volfs);
    with_failpoints(&mut volfs, "loop.refuse=fail");
    let control = format!("volumes/{off}/control");
    for text in ["attach", "resize 8M", &format!("delete {off}")] {
        refused(&volfs, &control, text, libc::EREMOTEIO, "EREMOTEIO");
        assert!(sentence(&volfs, &control).contains("failpoint loop.refuse"), "the cloud's words");
    }
    refused(&volfs, "jobs/a/control", "create x 1M", libc::EREMOTEIO, "EREMOTEIO");
    assert_eq!(volfs.value("jobs/a/status"), "idle detached=1 attached=1");
}

#[test]
fn e10_ehostunreach_starts_nothing() {
    let mut volfs = Volfs::start();
    let (on, off) = two_disks(&volfs);
    with_failpoints(&mut volfs, "loop.unreachable=fail");
    assert_eq!(volfs.value(format!("volumes/{on}/status")), "attached", "the same incarnation");
    assert_eq!(volfs.value(format!("volumes/{off}/status")), "unknown");
    refused(&volfs, &format!("volumes/{off}/control"), "attach", libc::EHOSTUNREACH, "EHOSTUNREACH");
    refused(&volfs, &format!("volumes/{off}/control"), &format!("delete {off}"), libc::EHOSTUNREACH, "EHOSTUNREACH");
    refused(&volfs, &format!("volumes/{on}/control"), "detach", libc::EHOSTUNREACH, "EHOSTUNREACH");
    refused(&volfs, "jobs/a/control", "create x 1M", libc::EHOSTUNREACH, "EHOSTUNREACH");
    assert_eq!(volfs.value(format!("volumes/{on}/status")), "attached", "put back");
    assert!(volfs.value(format!("volumes/{on}/device")).starts_with("/dev/loop"));
    assert!(volfs.read("health").unwrap().contains("\ncloud degraded: "), "{}", volfs.read("health").unwrap());
    // A VM of which the cloud has not said yet what it has: an empty listing would be a guess.
    let _ = volfs.write("control", &format!("reconcile vm={OTHER_VM}"));
    assert_eq!(errno(fs::read_dir(volfs.path(format!("vms/{OTHER_VM}")))), libc::EHOSTUNREACH);
}

#[test]
fn e11_enospc_is_capacity_of_the_cloud_and_of_the_store() {
    let mut volfs = Volfs::start_with(&[], "[loop]\ncapacity = \"16M\"\n");
    let (on, _) = two_disks(&volfs);
    refused(&volfs, "jobs/a/control", "create big 12M", libc::ENOSPC, "ENOSPC");
    refused(&volfs, "jobs/a/disks/off/control", "resize 15M", libc::ENOSPC, "ENOSPC");
    assert_eq!(volfs.value("jobs/a/disks/off/size"), "4194304");
    refused(&volfs, "jobs/a/control", "create big 1000000T", libc::ENOSPC, "ENOSPC");
    assert_eq!(volfs.write("jobs/a/control", "create fits 8M"), 0);
    with_failpoints(&mut volfs, "store.fail=fail");
    refused(&volfs, &format!("volumes/{on}/control"), "detach", libc::ENOSPC, "ENOSPC");
    assert_eq!(errno(fs::create_dir(volfs.path("jobs/b"))), libc::ENOSPC);
    assert_eq!(volfs.value(format!("volumes/{on}/status")), "attached");
    assert!(!volfs.read("health").unwrap().starts_with("ok"), "{}", volfs.read("health").unwrap());
}

#[test]
fn e12_eio_is_what_could_not_be_journaled_or_flushed_and_nothing_is_started() {
    let mut volfs = Volfs::start();
    let (on, off) = two_disks(&volfs);
    let loops = volfs.loops();
    with_failpoints(&mut volfs, "store.before-commit=fail");
    refused(&volfs, &format!("volumes/{off}/control"), "attach", libc::EIO, "EIO");
    refused(&volfs, &format!("volumes/{on}/control"), "detach", libc::EIO, "EIO");
    refused(&volfs, &format!("volumes/{off}/control"), &format!("delete {off}"), libc::EIO, "EIO");
    refused(&volfs, "jobs/a/control", "create x 1M", libc::EIO, "EIO");
    assert_eq!(errno(fs::create_dir(volfs.path("jobs/b"))), libc::EIO);
    assert_eq!(errno(fs::remove_dir(volfs.path("jobs/a"))), libc::ENOTEMPTY);
    assert_eq!(volfs.write("jobs/a/hold", "1"), libc::EIO);
    assert_eq!(volfs.value("jobs/a/status"), "idle detached=1 attached=1");
    assert_eq!(volfs.loops(), loops);
    assert!(volfs.state().join("loop/volumes").join(&off).exists());
    assert_eq!(fs::read_dir(volfs.state().join("loop/volumes")).unwrap().count(), 2);
    with_failpoints(&mut volfs, "devices.flush=fail");
    refused(&volfs, &format!("volumes/{on}/control"), "detach", libc::EIO, "EIO");
    assert_eq!(volfs.value(format!("volumes/{on}/status")), "attached");
    assert!(fs::File::open(volfs.path(format!("volumes/{on}/block"))).is_ok(), "put back");
}

#[test]
fn e13_eopnotsupp_is_what_the_loop_provider_has_not() {
    let volfs = Volfs::start();
    two_disks(&volfs);
    let offering = format!("create x 1M offering={NOBODYS}");
    for text in [offering.as_str(), "create x 1M zone=north", &format!("{offering} zone=north")] {
        refused(&volfs, "jobs/a/control", text, libc::EOPNOTSUPP, "EOPNOTSUPP");
    }
    assert!(!volfs.path("jobs/a/disks/x").is_symlink());
    assert_eq!(volfs.value("jobs/a/status"), "idle detached=1 attached=1");
}

#[test]
fn e14_v8_enotuniq_is_an_attach_that_finds_two_devices_of_one_identity() {
    let mut volfs = Volfs::prepare(&[], "");
    let gate = volfs.scratch("gate");
    volfs.set_env(&[("VOLFS_FAILPOINTS", &format!("attach.after-call=wait:{}", gate.display()))]);
    volfs.launch();
    let made = volfs.job("a", &["d"], "1M");
    let control = format!("volumes/{}/control", made[0]);
    let data = volfs.state().join("loop/volumes").join(&made[0]).join("data.img");
    fs::write(&gate, "").unwrap();
    let attaching = volfs.sh_spawn(&["bash"], &format!("echo attach > $R/{control}"));
    volfs.until("bound by the provider", || volfs.loops().len() == 1);
    let second = Loop::bind(&data, &format!("volfs:{}", made[0]));
    fs::remove_file(&gate).unwrap();
    let said = finish(attaching);
    assert!(said.status != 0 && said.err.contains("Name not unique on network"), "{said:?}");
    let error = sentence(&volfs, &control);
    assert!(error.contains(" ENOTUNIQ: ") && error.contains(&*second.path().to_string_lossy()), "{error}");
    for name in volfs.loops() {
        assert!(error.contains(&name), "{name} not in {error}");
    }
    volfs.until("conflict", || volfs.value(format!("volumes/{}/status", made[0])) == "conflict");
    assert_eq!(volfs.read(format!("volumes/{}/device", made[0])), Err(libc::ENODEV));
    assert!(!volfs.path(format!("exports/{}", made[0])).exists());
    assert_eq!(volfs.read(format!("volumes/{}/holders", made[0])), Err(libc::ENODATA));
    // One of them gone, it is told again.
    drop(second);
    volfs.until("one device", || volfs.loops().len() == 1);
    volfs.until("attached", || {
        volfs.write(&control, "reconcile") == 0 && volfs.value(format!("volumes/{}/status", made[0])) == "attached"
    });
    assert!(volfs.value(format!("volumes/{}/device", made[0])).ends_with(&volfs.loops()[0]));
}
