//! What kernels, shells and editors do that a control file must stand.

use std::fs::{self, File};
use std::io::{Read, Write};
use std::os::fd::AsRawFd;
use std::os::unix::fs::{FileExt, FileTypeExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::process::Command;

use rustix::fs::{Mode, OFlags};
use rustix::process::Signal;

use super::common::{SHELLS, Volfs};
use super::waiting::{ATTACH, Kid, a_round_of_the_watcher, callers, held_at, parked, status};

/// How it begins, or the errno.
fn first(path: &Path) -> Result<String, i32> {
    let errno = |e: std::io::Error| e.raw_os_error().unwrap_or(-1);
    let mut bytes = [0u8; 8];
    File::open(path).map_err(errno)?.read_exact(&mut bytes).map_err(errno)?;
    Ok(String::from_utf8_lossy(&bytes).into_owned())
}

/// A mount undone with the test.
struct Mounted(PathBuf);

impl Drop for Mounted {
    fn drop(&mut self) {
        let _ = rustix::mount::unmount(&self.0, rustix::mount::UnmountFlags::DETACH);
    }
}

/// Everything that was done and is recorded, to see that nothing was.
fn deeds(volfs: &Volfs) -> String {
    volfs.read("history").unwrap()
}

/// An NBD server over `exports/`, as the manual says, and how to ask it.
struct Nbd {
    _server: Kid,
    socket: PathBuf,
}

impl Nbd {
    fn start(volfs: &Volfs) -> Self {
        let socket = volfs.scratch("nbd.sock");
        let mut command = Command::new("nbdkit");
        command.args(["-f", "-U"]).arg(&socket).arg("file").arg(format!("dir={}", volfs.path("exports").display()));
        let server = Kid::of(volfs, command);
        volfs.until("NBD socket", || socket.exists());
        Nbd { _server: server, socket }
    }

    /// How an export begins, or what the client said.
    fn first(&self, volfs: &Volfs, export: &str) -> Result<String, String> {
        let uri = format!("nbd+unix:///{export}?socket={}", self.socket.display());
        let copy = volfs.scratch("copy");
        let said = Command::new("nbdcopy").arg(uri).arg(&copy).output().unwrap();
        if !said.status.success() {
            return Err(String::from_utf8_lossy(&said.stderr).into_owned());
        }
        Ok(first(&copy).unwrap())
    }
}

#[test]
fn trap_no_way_to_a_block_file_leads_to_the_old_device_number() {
    if !crate::common::have(&["nbdcopy", "nbdkit"]) {
        return;
    }
    let volfs = Volfs::start();
    let uuid = volfs.job("a", &["d"], "2M").remove(0);
    let block = volfs.path("jobs/a/disks/d/block");
    let real = volfs.path(format!("jobs/a/volumes/{uuid}/block"));
    let stranger = volfs.scratch("stranger");
    fs::write(&stranger, "stranger".repeat(2 * 1024 * 128)).unwrap();
    volfs.ok("echo attach > $R/jobs/a/control");
    let file = fs::OpenOptions::new().write(true).open(&block).unwrap();
    file.write_all_at(b"ours....", 0).unwrap();
    file.sync_all().unwrap();
    drop(file);
    let nbd = Nbd::start(&volfs);
    let export = fs::read_dir(volfs.path("exports")).unwrap().next().unwrap().unwrap().file_name();
    let export = export.to_str().unwrap();
    assert_eq!(nbd.first(&volfs, export).as_deref(), Ok("ours...."));
    let mut changes = 0;
    for round in 0..20 {
        let old = volfs.value("jobs/a/disks/d/device");
        let old_number = fs::metadata(&block).unwrap().rdev();
        let by_path = rustix::fs::open(&real, OFlags::PATH | OFlags::CLOEXEC, Mode::empty()).unwrap();
        let by_path_name = PathBuf::from(format!("/proc/self/fd/{}", by_path.as_raw_fd()));
        let bound = Mounted(volfs.scratch(&format!("bound{round}")));
        fs::write(&bound.0, "").unwrap();
        rustix::mount::mount_bind(&real, &bound.0).unwrap();
        for way in [&block, &by_path_name, &bound.0] {
            assert_eq!(first(way).as_deref(), Ok("ours...."));
        }
        volfs.ok("echo detach > $R/jobs/a/control");
        // The number is a stranger's now: ours, or another test's that was quicker, and then it is
        // not ours to clear.
        let ours = Command::new("losetup").arg(&old).arg(&stranger).output().unwrap().status.success();
        for way in [&block, &by_path_name, &bound.0] {
            assert!(first(way).is_err(), "{} opened a device while there was none", way.display());
        }
        assert!(nbd.first(&volfs, export).is_err(), "exported while detached");
        volfs.ok("echo attach > $R/jobs/a/control");
        for way in [&block, &by_path_name, &bound.0] {
            let seen = first(way);
            assert!(seen.is_err() || seen.as_deref() == Ok("ours...."), "{}: {seen:?}", way.display());
        }
        assert_eq!(first(&block).as_deref(), Ok("ours...."));
        assert_eq!(nbd.first(&volfs, export).as_deref(), Ok("ours...."));
        changes += usize::from(fs::metadata(&block).unwrap().rdev() != old_number);
        if ours {
            volfs.ok(&format!("losetup -d {old}"));
        }
        if changes == 3 {
            return;
        }
    }
    panic!("the device number changed {changes} times only");
}

#[test]
fn r4_trap_who_stands_in_a_released_directory_gets_estale_also_when_it_is_claimed_again() {
    let volfs = Volfs::start();
    let uuid = volfs.job("a", &["d"], "1M").remove(0);
    let stands = format!("cd $R/jobs/a/volumes/{uuid} && echo there && read _ && cat status; echo attach > control");
    let mut command = Command::new("bash");
    command.arg("-c").arg(stands);
    let fifo = volfs.scratch("go");
    rustix::fs::mknodat(rustix::fs::CWD, &fifo, rustix::fs::FileType::Fifo, Mode::RUSR | Mode::WUSR, 0).unwrap();
    let go = fs::OpenOptions::new().read(true).write(true).open(&fifo).unwrap();
    let mut kid = Kid::with_input(&volfs, command, go.try_clone().unwrap());
    assert_eq!(kid.line(), "there\n");
    let mut control = fs::OpenOptions::new().write(true).open(volfs.path("jobs/a/disks/d/control")).unwrap();
    assert_eq!(volfs.write(format!("volumes/{uuid}/control"), &format!("release {uuid}")), 0);
    assert_eq!(control.write(b"attach").unwrap_err().raw_os_error(), Some(libc::ENODEV));
    assert_eq!(volfs.write("jobs/a/control", &format!("claim {uuid} d")), 0);
    let before = deeds(&volfs);
    assert_eq!(control.write(b"attach").unwrap_err().raw_os_error(), Some(libc::ENODEV));
    (&go).write_all(b"\n").unwrap();
    let (code, err) = kid.end();
    assert_ne!(code, 0);
    assert_eq!(err.matches("Stale file handle").count(), 2, "{err}");
    assert_eq!(deeds(&volfs), before);
    // Who goes there by the path again is served.
    volfs.ok("cd $R/jobs/a/disks/d/ && echo attach > control && grep -qx attached status");
}

#[test]
fn r4_trap_a_control_opened_before_a_move_does_nothing() {
    let volfs = Volfs::start();
    let uuid = volfs.job("a", &["d"], "1M").remove(0);
    fs::create_dir(volfs.path("jobs/b")).unwrap();
    let open = |path: &str| fs::OpenOptions::new().write(true).open(volfs.path(path)).unwrap();
    let mut control = open("jobs/a/disks/d/control");
    assert_eq!(volfs.write(format!("volumes/{uuid}/control"), "move b"), 0);
    let before = deeds(&volfs);
    for command in ["attach", "detach", "resize 2M"] {
        assert_eq!(control.write(command.as_bytes()).unwrap_err().raw_os_error(), Some(libc::ENODEV));
    }
    assert_eq!(deeds(&volfs), before);
    assert_eq!(volfs.write("jobs/b/disks/d/control", "attach"), 0);
}

#[test]
fn trap_a_background_child_that_ends_does_not_end_the_write() {
    if !crate::common::have(&["busybox"]) {
        return;
    }
    let (volfs, gate) = held_at("attach.before-call");
    volfs.job("a", &["d"], "1M");
    for shell in SHELLS {
        let mut kid = parked(&volfs, shell, &format!("sleep 0.2 & {ATTACH}"));
        if *shell == ["bash"] {
            // It catches the signal: the others never see it pending.
            volfs.until("SIGCHLD", || kid.has_pending(&[Signal::CHILD]));
        }
        a_round_of_the_watcher(&volfs);
        assert!(kid.runs() && kid.inside(libc::SYS_write), "{shell:?}");
        if *shell == ["busybox", "sh"] {
            gate.open();
            assert_eq!(kid.end(), (0, String::new()));
        }
    }
}

#[test]
fn trap_the_flush_before_the_write_does_nothing_and_fails_nothing() {
    let volfs = Volfs::start();
    volfs.job("a", &["d"], "1M");
    let before = deeds(&volfs);
    for shell in SHELLS {
        let said = volfs.sh_in(shell, "exec 3> $R/jobs/a/disks/d/control; exec 4>&3; exec 3>&-; exec 4>&-");
        assert_eq!((said.status, said.err.as_str()), (0, ""), "{shell:?}");
        assert_eq!(deeds(&volfs), before);
    }
    for (shell, verb) in SHELLS.iter().zip(["attach", "detach", "attach"]) {
        let script = format!("exec 3> $R/jobs/a/disks/d/control; exec 4>&3; exec 3>&-; echo {verb} >&4");
        assert_eq!(volfs.sh_in(shell, &script).status, 0);
        assert_eq!(status(&volfs, "a", "d"), format!("{verb}ed"));
    }
}

#[test]
fn trap_two_lines_in_one_write_are_refused_and_two_writes_are_judged_apart() {
    let volfs = Volfs::start();
    volfs.job("a", &["d"], "1M");
    let control = "jobs/a/disks/d/control";
    let before = deeds(&volfs);
    for text in ["attach\ndetach\n", "attach\n\nattach", "\nattach\nattach", "attach\nattach\n", "# attach\nattach"] {
        assert_eq!(volfs.write(control, text), libc::EINVAL, "{text:?}");
    }
    assert_eq!(deeds(&volfs), before);
    let mut file = fs::OpenOptions::new().write(true).open(volfs.path(control)).unwrap();
    assert_eq!(file.write(b"attach\n").unwrap(), 7);
    assert_eq!(file.write(b"frobnicate\n").unwrap_err().raw_os_error(), Some(libc::EINVAL));
    assert_eq!(status(&volfs, "a", "d"), "attached");
    assert_eq!(file.write(b"detach\n").unwrap(), 7);
    assert_eq!(status(&volfs, "a", "d"), "detached");
    // One WRITE in dash, two in bash.
    assert_ne!(volfs.sh_in(&["dash"], "printf 'attach\\nfrobnicate\\n' > $R/jobs/a/disks/d/control").status, 0);
    assert_eq!(status(&volfs, "a", "d"), "detached");
    assert_ne!(volfs.sh_in(&["bash"], "printf 'attach\\nfrobnicate\\n' > $R/jobs/a/disks/d/control").status, 0);
    assert_eq!(status(&volfs, "a", "d"), "attached");
}

#[test]
fn r5_trap_truncation_and_touch_succeed_and_do_nothing() {
    let volfs = Volfs::start();
    volfs.job("a", &["d"], "1M");
    volfs.ok("echo web > $R/jobs/a/vm_name");
    let before = deeds(&volfs);
    for shell in SHELLS {
        for script in [": > F", "> F", "truncate -s 0 F", "touch F", "truncate -s 9 F", ": >> F"] {
            for file in ["control", "jobs/a/control", "jobs/a/disks/d/control"] {
                let said = volfs.sh_in(shell, &script.replace('F', &format!("$R/{file}")));
                assert_eq!((said.status, said.err.as_str()), (0, ""), "{shell:?} {script} {file}");
            }
        }
    }
    assert_eq!(deeds(&volfs), before);
    assert_eq!(status(&volfs, "a", "d"), "detached");
}

#[test]
fn trap_what_control_reads_is_no_command_when_an_editor_writes_it_back() {
    let volfs = Volfs::start();
    volfs.job("a", &["d"], "1M");
    for verb in ["attach", "detach"] {
        volfs.ok(&format!("echo {verb} > $R/jobs/a/disks/d/control"));
        let before = deeds(&volfs);
        for file in ["control", "jobs/a/control", "jobs/a/disks/d/control"] {
            let text = volfs.read(file).unwrap();
            assert_eq!(volfs.write(file, &text), libc::EINVAL, "{file}: {text}");
            // Nor does any single line of it.
            for line in text.split_inclusive('\n') {
                assert_eq!(volfs.write(file, line), libc::EINVAL, "{file}: {line}");
            }
        }
        assert_eq!(deeds(&volfs), before);
    }
}

#[test]
fn trap_control_can_be_copied_and_its_copy_is_what_it_reads() {
    if !crate::common::have(&["busybox"]) {
        return;
    }
    let volfs = Volfs::start();
    volfs.job("a", &["d"], "1M");
    let before = deeds(&volfs);
    let copy = volfs.scratch("copy");
    for tool in ["cp", "cp -p", "install -m 600", "busybox cp"] {
        let _ = fs::remove_file(&copy);
        let said = volfs.sh(&format!("{tool} $R/jobs/a/disks/d/control {}", copy.display()));
        assert_eq!((said.status, said.err.as_str()), (0, ""), "{tool}");
        assert_eq!(fs::read_to_string(&copy).unwrap(), volfs.read("jobs/a/disks/d/control").unwrap());
    }
    assert_eq!(deeds(&volfs), before);
}

#[test]
fn trap_a_write_of_3_mib_is_refused() {
    let volfs = Volfs::start();
    volfs.job("a", &["d"], "1M");
    let before = deeds(&volfs);
    for text in ["attach ".repeat(3 << 20 >> 3), format!("attach{}", " ".repeat(3 << 20)), "attach\n".repeat(1 << 19)] {
        let mut file = fs::OpenOptions::new().write(true).open(volfs.path("jobs/a/disks/d/control")).unwrap();
        assert_eq!(file.write(text.as_bytes()).unwrap_err().raw_os_error(), Some(libc::EINVAL));
    }
    assert_eq!(volfs.write("jobs/a/disks/d/control", &format!("attach{}", " ".repeat(4090))), 0, "4096 bytes");
    volfs.ok("echo detach > $R/jobs/a/disks/d/control");
    assert_eq!(volfs.write("jobs/a/disks/d/control", &format!("attach{}", " ".repeat(4091))), libc::EINVAL);
    assert_eq!(deeds(&volfs).lines().count(), before.lines().count() + 2);
}

/// Ways to write a word into a file.
const WAYS: [&str; 9] = [
    "echo WORD > FILE",
    "echo WORD >> FILE",
    "printf %s WORD > FILE",
    "echo WORD | tee FILE > /dev/null",
    "echo WORD | tee -a FILE > /dev/null",
    "echo WORD > $TMP && cp $TMP FILE",
    "echo WORD > $TMP && cat $TMP > FILE",
    "echo WORD | dd of=FILE status=none",
    "echo WORD | dd of=FILE conv=notrunc status=none",
];

#[test]
fn r2_trap_all_ways_to_write_a_command_are_one_command() {
    let volfs = Volfs::start();
    let uuid = volfs.job("a", &["d"], "1M").remove(0);
    let mut verbs = ["attach", "detach"].into_iter().cycle();
    let mut expected = vec!["create"];
    for shell in SHELLS {
        for way in WAYS {
            let verb = verbs.next().unwrap();
            expected.push(verb);
            let script = way.replace("WORD", verb).replace("FILE", &format!("$R/volumes/{uuid}/control"));
            let said = volfs.sh_in(shell, &format!("TMP={}; {script}", volfs.scratch("tmp").display()));
            assert_eq!((said.status, said.err.as_str()), (0, ""), "{shell:?}: {script}");
            assert_eq!(status(&volfs, "a", "d"), format!("{verb}ed"));
        }
    }
    let history = volfs.read(format!("volumes/{uuid}/history")).unwrap();
    let verbs: Vec<&str> = history.lines().skip(1).map(|l| l.split('\t').nth(1).unwrap()).collect();
    assert_eq!(verbs, expected);
}

#[test]
fn r2_trap_no_way_to_write_waits_for_another_writers_command() {
    let (volfs, gate) = held_at("attach.before-call");
    volfs.job("a", &["d"], "1M");
    let kid = parked(&volfs, &["bash"], ATTACH);
    for shell in SHELLS {
        for way in WAYS {
            let script = way.replace("WORD", "detach").replace("FILE", "$R/jobs/a/disks/d/control");
            // It would be 124 if it waited for its turn.
            let script = format!("TMP={}; {script}", volfs.scratch("tmp").display());
            let script = format!("timeout 20 {} -c '{script}'", shell.join(" "));
            let said = volfs.sh(&script);
            assert_eq!(said.status, 1, "{script}: {}", said.err);
        }
    }
    assert_eq!(callers(&volfs, "a", "d"), 1);
    gate.open();
    assert_eq!(kid.end(), (0, String::new()));
}

#[test]
fn trap_noclobber_refuses_in_the_shell_itself() {
    let volfs = Volfs::start();
    volfs.job("a", &["d"], "1M");
    for shell in SHELLS {
        let before = deeds(&volfs);
        let said = volfs.sh_in(shell, "set -C; echo attach > $R/jobs/a/disks/d/control");
        assert_ne!(said.status, 0, "{shell:?}");
        assert_eq!(deeds(&volfs), before);
        volfs.ok("set -C; echo attach >> $R/jobs/a/disks/d/control; echo detach >| $R/jobs/a/disks/d/control");
    }
}

#[test]
fn r3_trap_test_e_of_block_tells_whether_there_is_a_device() {
    let volfs = Volfs::start();
    volfs.job("a", &["d"], "1M");
    for shell in SHELLS {
        let test = |flag| volfs.sh_in(shell, &format!("test {flag} $R/jobs/a/disks/d/block")).status == 0;
        assert!(!test("-e") && !test("-b"));
        volfs.ok("echo attach > $R/jobs/a/control");
        assert!(test("-e") && test("-b"));
        volfs.ok("echo detach > $R/jobs/a/control");
        assert!(!test("-e") && !test("-b"));
    }
}

#[test]
fn r7_trap_ls_l_runs_nothing_and_shows_the_device_by_number() {
    if !crate::common::have(&["busybox"]) {
        return;
    }
    let volfs = Volfs::start();
    volfs.job("a", &["d"], "1M");
    volfs.ok("echo attach > $R/jobs/a/control");
    let before = deeds(&volfs);
    for tool in ["ls -lR", "ls -la", "ls -lZ", "busybox ls -lR", "find", "stat", "getfattr -d", "file"] {
        if volfs.sh(&format!("command -v {tool}")).status == 0 {
            let said = volfs.sh(&format!("{tool} $R/jobs/a/disks/d/ $R $R/jobs/a/disks/d/control"));
            assert_eq!(said.status, 0, "{tool}: {}", said.err);
        }
    }
    let block = fs::metadata(volfs.path("jobs/a/disks/d/block")).unwrap();
    let device = fs::metadata(volfs.value("jobs/a/disks/d/device")).unwrap();
    assert!(block.file_type().is_block_device());
    assert_eq!(block.rdev(), device.rdev());
    assert_eq!(deeds(&volfs), before);
}

const BUFFERED: &str = r#"
import sys
try:
    with open(sys.argv[1] + "/jobs/a/disks/d/control", "w") as f:
        f.write("detach\n")
except OSError as e:
    sys.exit(e.errno)
"#;

#[test]
fn trap_pythons_second_write_after_a_failure_does_no_harm() {
    if !crate::common::have(&["/usr/bin/python3"]) {
        return;
    }
    let volfs = Volfs::start();
    volfs.job("a", &["d"], "1M");
    volfs.ok("echo attach > $R/jobs/a/control");
    let user = File::open(volfs.path("jobs/a/disks/d/block")).unwrap();
    assert_eq!(Kid::python(&volfs, BUFFERED).end().0, libc::EBUSY);
    assert_eq!(status(&volfs, "a", "d"), "attached");
    drop(user);
    assert_eq!(Kid::python(&volfs, BUFFERED).end().0, 0);
    assert_eq!(status(&volfs, "a", "d"), "detached");
}
