//! Starting, stopping, mounting: what an operator does around the tree.

use std::fs;
use std::io::{BufRead, BufReader, Read};
use std::os::unix::fs::MetadataExt;
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use super::common::{PATIENCE, Said, Tmpfs, Volfs, finish};

/// Longest end of a daemon that is asked to.
const END_MOST: Duration = Duration::from_secs(5);

/// The lines of mountinfo for this mount point.
fn mounts_at(path: &Path) -> Vec<String> {
    let text = fs::read_to_string("/proc/self/mountinfo").unwrap();
    let at = path.to_str().unwrap();
    text.lines().filter(|l| l.split(' ').nth(4) == Some(at)).map(str::to_owned).collect()
}

fn said(command: &mut Command) -> Said {
    finish(command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap())
}

/// `volfs` with this one's places, and a subcommand.
fn volfs_command(volfs: &Volfs, args: &[&str]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_volfs"));
    command.arg("--state-dir").arg(volfs.state()).arg("--config").arg(volfs.scratch("config.toml")).args(args);
    command
}

fn unmount(volfs: &Volfs) -> Said {
    said(volfs_command(volfs, &["unmount"]).arg(volfs.root()))
}

#[track_caller]
fn answers(volfs: &Volfs) {
    assert!(volfs.read("version").is_ok(), "{}", volfs.log());
    assert_eq!(mounts_at(&volfs.root()).len(), 1);
}

#[test]
fn mount_is_of_type_fuse_volfs_with_devices_and_without_setuid_and_programs() {
    let volfs = Volfs::start();
    let lines = mounts_at(&volfs.root());
    let [line] = lines.as_slice() else { panic!("{lines:?}") };
    let fields: Vec<&str> = line.split(' ').collect();
    let options: Vec<&str> = fields[5].split(',').collect();
    assert!(line.contains(" - fuse.volfs "), "{line}");
    assert!(options.contains(&"nosuid") && options.contains(&"noexec") && !options.contains(&"nodev"), "{line}");
}

#[test]
fn mount_replaces_the_dead_one_of_a_killed_daemon() {
    let mut volfs = Volfs::start();
    volfs.job("j", &["d"], "1M");
    volfs.kill();
    assert_eq!(fs::metadata(volfs.root()).unwrap_err().raw_os_error(), Some(libc::ENOTCONN), "it is dead");
    volfs.launch();
    answers(&volfs);
    assert_eq!(volfs.value("jobs/j/disks/d/status"), "detached");
}

#[test]
fn mount_refuses_a_place_where_a_living_volfs_is() {
    let first = Volfs::start();
    let mut second = Volfs::prepare(&[], "");
    let at = first.root();
    let said = said(volfs_command(&second, &["mount"]).arg(&at));
    assert_eq!(said.status, 1);
    assert!(said.err.contains("another volfs is mounted") && said.err.contains(at.to_str().unwrap()), "{said:?}");
    answers(&first);
    // Its own place is fine.
    second.launch();
    answers(&second);
}

#[test]
fn mount_says_which_process_has_the_state_directory() {
    let first = Volfs::start();
    let at = first.scratch("elsewhere");
    fs::create_dir(&at).unwrap();
    let said = said(volfs_command(&first, &["mount"]).arg(&at));
    assert_eq!(said.status, 1);
    assert!(said.err.contains(&format!("pid {}", first.pid())), "{said:?}");
    assert_eq!(mounts_at(&at), [] as [String; 0]);
    answers(&first);
}

#[test]
fn mount_read_only_beside_a_daemon_shows_and_changes_nothing() {
    let first = Volfs::start();
    first.job("j", &["d"], "1M");
    let at = first.scratch("elsewhere");
    fs::create_dir(&at).unwrap();
    let mut child = volfs_command(&first, &["--read-only", "mount"])
        .arg(&at)
        .arg("--background-child")
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::null())
        .spawn()
        .unwrap();
    let mut line = String::new();
    BufReader::new(child.stdout.take().unwrap()).read_line(&mut line).unwrap();
    let status = fs::read_to_string(at.join("jobs/j/disks/d/status"));
    let mkdir = fs::create_dir(at.join("jobs/k")).map_err(|e| e.raw_os_error());
    let write = fs::write(at.join("jobs/j/control"), "attach\n").map_err(|e| e.raw_os_error());
    let ended = unmount_at(&first, &at);
    let code = child.wait().unwrap();
    assert_eq!(line, "ready\n");
    assert_eq!(status.unwrap(), "detached\n");
    assert_eq!((mkdir, write), (Err(Some(libc::EROFS)), Err(Some(libc::EROFS))));
    assert_eq!((ended.status, code.code()), (0, Some(0)), "{ended:?}");
    answers(&first);
    assert_eq!(first.write("jobs/j/control", "attach"), 0);
}

fn unmount_at(volfs: &Volfs, at: &Path) -> Said {
    said(volfs_command(volfs, &["unmount"]).arg(at))
}

#[test]
fn mount_leaves_a_foreign_filesystem_alone() {
    let mut volfs = Volfs::prepare(&[], "");
    let at = volfs.root();
    let _tmpfs = Tmpfs::mount(&at, c"size=64k");
    fs::write(at.join("theirs"), "theirs").unwrap();
    let words = volfs.try_launch().unwrap_err();
    assert!(words.contains("tmpfs") && words.contains(at.to_str().unwrap()), "{words}");
    let said = unmount(&volfs);
    assert_eq!(said.status, 1);
    assert!(said.err.contains("tmpfs") && said.err.contains("left alone"), "{said:?}");
    assert_eq!(fs::read_to_string(at.join("theirs")).unwrap(), "theirs");
}

#[test]
fn mount_ends_at_sigterm_with_parked_callers_and_a_shell_inside() {
    let hold = tempfile::NamedTempFile::new().unwrap();
    let point = format!("attach.before-call=wait:{}", hold.path().display());
    let mut volfs = Volfs::start_with(&[("VOLFS_FAILPOINTS", &point)], "");
    volfs.job("j", &["a", "b"], "1M");
    let inside = volfs.sh_spawn(&["dash"], "cd $R/jobs/j && echo here && read -r _ < /dev/zero; exec sleep 1000");
    let mut inside = inside;
    let mut word = [0u8; 5];
    inside.stdout.as_mut().unwrap().read_exact(&mut word).unwrap();
    let parked: Vec<_> = ["a", "b"]
        .map(|d| volfs.sh_spawn(&["dash"], &format!("echo attach > $R/jobs/j/disks/{d}/control")))
        .into_iter()
        .collect();
    volfs.until("parked callers", || volfs.value("jobs/j/status").contains("attaching=2"));
    let (code, took) = volfs.terminate();
    let ended: Vec<Said> = parked.into_iter().map(finish).collect();
    inside.kill().unwrap();
    inside.wait().unwrap();
    drop(hold);
    assert_eq!(code, 0, "{}", volfs.log());
    assert!(took < END_MOST, "{took:?}");
    assert!(ended.iter().all(|s| s.status != 0), "an unfinished attach was called done: {ended:?}");
    assert_eq!(mounts_at(&volfs.root()), [] as [String; 0]);
    assert!(fs::read_dir(volfs.root()).unwrap().next().is_none());
    volfs.set_env(&[]);
    volfs.launch();
    volfs.until("settled attaches", || volfs.value("jobs/j/status") == "idle detached=2");
}

#[test]
fn mount_taken_away_from_outside_ends_the_daemon() {
    let mut volfs = Volfs::start();
    let began = Instant::now();
    assert!(Command::new("umount").arg("-l").arg(volfs.root()).status().unwrap().success());
    assert_eq!(volfs.wait(), 0, "{}", volfs.log());
    assert!(began.elapsed() < END_MOST);
}

#[test]
fn mount_aborted_through_fusectl_ends_the_daemon_and_leaves_no_dead_mount() {
    let mut volfs = Volfs::start();
    let line = mounts_at(&volfs.root()).remove(0);
    let minor = line.split(' ').nth(2).unwrap().split_once(':').unwrap().1.to_owned();
    let abort = Path::new("/sys/fs/fuse/connections").join(minor).join("abort");
    if !abort.exists() {
        let control = Command::new("mount").args(["-t", "fusectl", "none", "/sys/fs/fuse/connections"]).status();
        assert!(control.unwrap().success(), "no fusectl here");
    }
    fs::write(&abort, "1").unwrap();
    let began = Instant::now();
    volfs.wait();
    assert!(began.elapsed() < END_MOST);
    assert_eq!(mounts_at(&volfs.root()), [] as [String; 0], "{}", volfs.log());
}

#[test]
fn mount_is_ended_by_volfs_unmount_live_or_dead_and_nothing_there_is_said() {
    let mut volfs = Volfs::start();
    let live = unmount(&volfs);
    assert_eq!(live.status, 0, "{live:?}");
    assert_eq!(volfs.wait(), 0);
    assert_eq!(mounts_at(&volfs.root()), [] as [String; 0]);
    volfs.launch();
    volfs.kill();
    let dead = unmount(&volfs);
    assert_eq!(dead.status, 0, "{dead:?}");
    assert_eq!(mounts_at(&volfs.root()), [] as [String; 0]);
    let none = unmount(&volfs);
    assert_eq!(none.status, 1);
    assert!(none.err.contains("nothing is mounted at") && none.err.lines().count() == 1, "{none:?}");
}

#[test]
fn mount_background_returns_when_the_tree_answers_or_says_why_not() {
    let volfs = Volfs::prepare(&[], "");
    let log = volfs.scratch("daemon.log");
    let start = || {
        let mut command = volfs_command(&volfs, &["mount", "--background", "--log-file"]);
        said(command.arg(&log).arg(volfs.root()))
    };
    let first = start();
    let answered = volfs.read("version").is_ok();
    let second = start();
    let ended = unmount(&volfs);
    assert_eq!((first.status, answered), (0, true), "{first:?}");
    assert_eq!(second.status, 1);
    assert!(second.err.contains("pid ") && second.err.lines().count() == 1, "{second:?}");
    assert_eq!(ended.status, 0, "{ended:?}");
    assert!(fs::read_to_string(&log).unwrap().contains("the tree answers"));
}

#[test]
fn mount_without_root_is_one_clear_sentence() {
    let volfs = Volfs::prepare(&[], "");
    // A copy that everybody can reach: the build directory may be root's alone.
    let own = tempfile::Builder::new().prefix("volfs-test-").tempdir().unwrap();
    let program = own.path().join("volfs");
    fs::copy(env!("CARGO_BIN_EXE_volfs"), &program).unwrap();
    use std::os::unix::fs::PermissionsExt;
    for path in [own.path(), &program] {
        fs::set_permissions(path, fs::Permissions::from_mode(0o755)).unwrap();
    }
    for verb in ["mount", "unmount"] {
        let mut command = Command::new("setpriv");
        command.args(["--reuid=65534", "--regid=65534", "--clear-groups"]).arg(&program).args([verb, "/run/none"]);
        let said = said(command.current_dir("/"));
        assert_eq!((said.status, said.err.lines().count()), (1, 1), "{said:?}");
        assert!(said.err.contains("needs root"), "{said:?}");
    }
    drop(volfs);
}

#[test]
fn mount_check_shows_each_value_with_its_source_and_fails_when_a_part_is_missing() {
    let volfs = Volfs::prepare(&[], "history = 77\n");
    let check = |dir: &Path| said(volfs_command(&volfs, &["check"]).arg(dir));
    let good = check(&volfs.root());
    assert_eq!(good.status, 0, "{good:?}");
    assert!(good.out.contains("history = 77 (") && good.out.contains("config.toml)"), "{good:?}");
    assert!(good.out.contains("(command line)") && good.out.contains("(default)"), "{good:?}");
    assert!(!volfs.state().exists(), "it made something");
    let bad = check(Path::new("/proc"));
    assert_eq!(bad.status, 1);
    assert!(bad.out.contains("MISSING mount point: /proc has a mount of type proc"), "{bad:?}");
}

#[test]
fn mount_takes_flags_before_variables_before_the_file_before_defaults() {
    let volfs = Volfs::prepare(&[], "log = \"error\"\nread_only = false\n");
    let line = |args: &[&str], env: &[(&str, &str)], name: &str| {
        let mut command = volfs_command(&volfs, args);
        let said = said(command.arg("check").arg(volfs.root()).envs(env.iter().copied()));
        let found = said.out.lines().find(|l| l.trim_start().starts_with(name)).map(|l| l.trim().to_owned());
        found.unwrap_or_else(|| panic!("{said:?}"))
    };
    let variable = [("VOLFS_LOG", "warn")];
    assert_eq!(line(&["--log", "debug"], &variable, "log ="), "log = debug (command line)");
    assert_eq!(line(&[], &variable, "log ="), "log = warn (environment)");
    let file = volfs.scratch("config.toml");
    assert_eq!(line(&[], &[], "log ="), format!("log = error ({})", file.display()));
    assert_eq!(line(&[], &[], "history ="), "history = 10000 (default)");
    assert_eq!(line(&[], &[("VOLFS_READ_ONLY", "1")], "read_only ="), "read_only = true (environment)");
}

/// What a demo leaves: its place in `dir`, mounts below it, loop devices of it.
fn left_by_demo(dir: &Path) -> Vec<String> {
    let mut left: Vec<String> = fs::read_dir(dir).unwrap().map(|e| e.unwrap().path().display().to_string()).collect();
    left.extend(
        fs::read_to_string("/proc/self/mountinfo")
            .unwrap()
            .lines()
            .filter(|l| l.contains(dir.to_str().unwrap()))
            .map(str::to_owned),
    );
    left.extend(super::common::loops_below(dir));
    left
}

#[test]
fn mount_demo_ends_in_time_and_leaves_nothing_behind_also_when_interrupted() {
    let dir = tempfile::Builder::new().prefix("volfs-test-").tempdir().unwrap();
    let demo = || {
        let mut command = Command::new(env!("CARGO_BIN_EXE_volfs"));
        command
            .arg("demo")
            .env("TMPDIR", dir.path())
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped());
        command.spawn().unwrap()
    };
    let began = Instant::now();
    let said = finish(demo());
    assert_eq!(said.status, 0, "{said:?}");
    assert!(began.elapsed() < PATIENCE);
    assert_eq!(left_by_demo(dir.path()), [] as [String; 0]);
    // Interrupted at its attach: the line is printed as it happens.
    let mut child = demo();
    let mut out = BufReader::new(child.stdout.take().unwrap());
    let mut line = String::new();
    while !line.contains("echo attach") {
        line.clear();
        assert!(out.read_line(&mut line).unwrap() > 0, "no attach in the demo");
    }
    // SAFETY: kill(2) takes no pointers; the pid is our own child, not yet waited for.
    unsafe { libc::kill(child.id() as i32, libc::SIGINT) };
    let mut rest = String::new();
    out.read_to_string(&mut rest).unwrap();
    assert!(!child.wait().unwrap().success(), "{rest}");
    assert_eq!(left_by_demo(dir.path()), [] as [String; 0]);
}

/// What a restart must not change of the tree: kind, inode, mode, rdev, size and mtime.
fn seen(volfs: &Volfs, below: &str) -> (u64, u32, u64, u64, i64, i64) {
    let meta = fs::symlink_metadata(volfs.path(below)).unwrap_or_else(|e| panic!("{below}: {e}"));
    (meta.ino(), meta.mode(), meta.rdev(), meta.size(), meta.mtime(), meta.mtime_nsec())
}

#[test]
fn mount_again_shows_ten_attached_volumes_with_the_same_devices_ids_and_times() {
    let mut volfs = Volfs::start();
    let names: Vec<String> = (0..10).map(|n| format!("d{n}")).collect();
    let disks: Vec<&str> = names.iter().map(String::as_str).collect();
    let uuids = volfs.job("j", &disks, "1M");
    fs::write(volfs.path("jobs/j/vm_name"), "web1\n").unwrap();
    assert_eq!(volfs.write("jobs/j/control", "attach"), 0, "{}", volfs.log());
    let mut paths =
        vec!["jobs/j".to_owned(), "jobs/j/vm_name".into(), "jobs/j/hold".into(), "jobs/j/disks".into(), "jobs".into()];
    for uuid in &uuids {
        let files = ["", "/device", "/block", "/status", "/size", "/incarnation", "/name", "/serial"];
        paths.extend(files.map(|file| format!("jobs/j/volumes/{uuid}{file}")));
        paths.push(format!("exports/{uuid}"));
        paths.push(format!("volumes/{uuid}"));
    }
    let look = |volfs: &Volfs| paths.iter().map(|p| (p.clone(), seen(volfs, p))).collect::<Vec<_>>();
    let values = |volfs: &Volfs| {
        let of =
            |uuid: &String| ["device", "incarnation"].map(|file| volfs.value(format!("jobs/j/volumes/{uuid}/{file}")));
        uuids.iter().map(of).collect::<Vec<_>>()
    };
    let (before, devices) = (look(&volfs), values(&volfs));
    let bound = volfs.loops().len();
    for how in ["terminate", "kill"] {
        if how == "kill" {
            volfs.kill();
        } else {
            assert_eq!(volfs.terminate().0, 0);
        }
        assert_eq!(volfs.loops().len(), bound, "{how}: devices stay without the daemon");
        volfs.launch();
        // The first reads already.
        assert_eq!(values(&volfs), devices, "{how}");
        for (old, new) in before.iter().zip(look(&volfs)) {
            assert_eq!(*old, new, "{how}");
        }
        assert_eq!(volfs.value("jobs/j/status"), "idle attached=10");
    }
}
