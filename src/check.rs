//! `volfs check`: what would be used, and whether each part is there. It changes nothing.

use std::borrow::Cow;
use std::fs::{File, OpenOptions};
use std::io;
use std::os::unix::fs::MetadataExt;
use std::path::Path;

use rustix::net::netlink::{KOBJECT_UEVENT, SocketAddrNetlink};
use rustix::net::{AddressFamily, SocketFlags, SocketType, bind, socket_with};

use crate::config::{Config, Problem, Provider};
use crate::start::{self, FS_TYPE};
use crate::store;

mod cloudstack;

/// A part that is there, in a sentence; or what is missing and what to do.
type Part = Result<String, String>;

/// What is said of a part.
#[derive(Debug, PartialEq, Eq)]
enum Verdict {
    /// It is there.
    Good(String),
    /// volfs runs, but something will be in the way, or cannot be told.
    Warning(String),
    /// volfs cannot work like this.
    Missing(String),
}

impl From<Part> for Verdict {
    fn from(part: Part) -> Self {
        match part {
            Ok(words) => Verdict::Good(words),
            Err(words) => Verdict::Missing(words),
        }
    }
}

/// A line's name and what it says.
type Line = (Cow<'static, str>, Verdict);

/// Shows the values in use, tries each part, and fails if one is missing.
pub fn run(config: &Config) -> Result<(), Problem> {
    use std::io::Write;
    let mut out = io::stdout().lock();
    let mut missing = 0;
    let mut say = |line: String| writeln!(out, "{line}").map_err(|e| Problem::with("standard output", e));
    match &config.file {
        Some(path) => say(format!("configuration: {}", path.display()))?,
        None => say("configuration: no file".into())?,
    }
    for s in &config.settings {
        say(format!("  {} = {} ({})", s.name, s.value, s.source))?;
    }
    for (name, part) in parts(config) {
        match part {
            Verdict::Good(words) => say(format!("ok      {name}: {words}"))?,
            Verdict::Warning(words) => say(format!("warning {name}: {words}"))?,
            Verdict::Missing(words) => {
                missing += 1;
                say(format!("MISSING {name}: {words}"))?;
            }
        }
    }
    match missing {
        0 => Ok(()),
        n => Err(Problem(format!("{n} of the parts above {} missing", if n == 1 { "is" } else { "are" }))),
    }
}

fn parts(config: &Config) -> Vec<Line> {
    let here = [
        ("root", root()),
        ("fuse", opens("/dev/fuse", "the kernel's FUSE: modprobe fuse")),
        ("fuse timeout", fuse_timeout(Path::new("/proc/sys/fs/fuse"))),
        ("mount point", mount_point(&config.mountpoint)),
        ("state directory", state_dir(&config.state_dir)),
        ("sqlite", sqlite()),
        ("uevents", uevents()),
        ("diskseq", diskseq(Path::new("/sys/block"))),
        ("group", Ok(format!("{} (gid {})", config.group.name, config.group.gid))),
    ];
    let mut lines: Vec<Line> = here.into_iter().map(|(name, part)| (name.into(), part.into())).collect();
    match config.provider {
        Provider::Loop => {
            let part = opens("/dev/loop-control", "the kernel's loop driver: modprobe loop");
            lines.push(("loop devices".into(), part.into()));
        }
        Provider::Cloudstack => lines.extend(cloudstack::lines(config)),
    }
    lines
}

fn root() -> Part {
    start::need_root().map(|()| "yes".into()).map_err(|p| p.to_string())
}

fn opens(path: &str, what: &str) -> Part {
    match OpenOptions::new().read(true).write(true).open(path) {
        Ok(_) => Ok(format!("{path} opens")),
        Err(e) => Err(format!("{path}: {e}; it is {what}")),
    }
}

/// These limits abort the whole connection below a parked command (kernel fact 5).
fn fuse_timeout(sysctl: &Path) -> Part {
    for name in ["default_request_timeout", "max_request_timeout"] {
        let text = match std::fs::read_to_string(sysctl.join(name)) {
            Ok(text) => text,
            Err(e) if e.kind() == io::ErrorKind::NotFound => continue,
            Err(e) => return Err(format!("fs.fuse.{name}: {e}")),
        };
        if text.trim() != "0" {
            return Err(format!(
                "fs.fuse.{name} is {}: the kernel would end the mount below a command that waits longer; set it to 0",
                text.trim()
            ));
        }
    }
    Ok("none".into())
}

fn mount_point(at: &Path) -> Part {
    let shown = at.display();
    // mountinfo first: a dead or hanging mount must not be touched.
    let mounted = start::mounts().map_err(|p| p.to_string())?.into_iter().rfind(|m| m.at == at);
    match mounted {
        Some(m) if m.fs_type == FS_TYPE => return Ok(format!("{shown}, where a volfs is mounted now")),
        Some(m) => return Err(format!("{shown} has a mount of type {}: unmount it, or take another", m.fs_type)),
        None => {}
    }
    match std::fs::symlink_metadata(at) {
        Ok(meta) if meta.is_dir() => Ok(format!("{shown} is a directory")),
        Ok(_) => Err(format!("{shown} is not a directory")),
        Err(e) if e.kind() == io::ErrorKind::NotFound => match at.parent() {
            Some(parent) if parent.is_dir() => Ok(format!("{shown} would be made")),
            _ => Err(format!("{shown} is not there, and neither is its parent directory: make it")),
        },
        Err(e) => Err(format!("{shown}: {e}")),
    }
}

fn state_dir(dir: &Path) -> Part {
    let shown = dir.display();
    let meta = match std::fs::metadata(dir) {
        Ok(meta) => meta,
        Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(format!("{shown} would be made")),
        Err(e) => return Err(format!("{shown}: {e}")),
    };
    if !meta.is_dir() {
        return Err(format!("{shown} is not a directory"));
    }
    if meta.mode() & 0o022 != 0 {
        return Err(format!("{shown} can be written by others (mode {:04o}): chmod it to 0700", meta.mode() & 0o7777));
    }
    match locked_by(&dir.join("lock")) {
        Ok(None) => Ok(format!("{shown} is free")),
        Ok(Some(holder)) => Ok(format!("{shown} is in use by {holder}")),
        Err(words) => Err(words),
    }
}

/// Who has the lock, from the kernel's table: trying it ourselves could keep a starting daemon out.
fn locked_by(lock: &Path) -> Result<Option<String>, String> {
    const TABLE: &str = "/proc/locks";
    let inode = match std::fs::metadata(lock) {
        Ok(meta) => meta.ino(),
        Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(None),
        Err(e) => return Err(format!("{}: {e}", lock.display())),
    };
    let table = std::fs::read_to_string(TABLE).map_err(|e| format!("{TABLE}: {e}"))?;
    let Some(pid) = holder(&table, inode) else { return Ok(None) };
    let comm = std::fs::read_to_string(format!("/proc/{pid}/comm")).unwrap_or_default();
    Ok(Some(format!("pid {pid} ({})", comm.trim())))
}

/// The pid of the `FLOCK` on that inode. Not by device: st_dev of some filesystems is another one.
fn holder(table: &str, inode: u64) -> Option<&str> {
    table.lines().find_map(|line| {
        let fields: Vec<&str> = line.split_ascii_whitespace().collect();
        let [_, "FLOCK", _, "WRITE", pid, file, ..] = fields[..] else { return None };
        (file.rsplit(':').next()?.parse() == Ok(inode)).then_some(pid)
    })
}

fn sqlite() -> Part {
    store::sqlite_version().map(|v| format!("{v}, built in"))
}

fn uevents() -> Part {
    const KERNEL_GROUP: u32 = 1;
    let socket = socket_with(AddressFamily::NETLINK, SocketType::DGRAM, SocketFlags::CLOEXEC, Some(KOBJECT_UEVENT));
    let bound = socket.and_then(|s| bind(&s, &SocketAddrNetlink::new(0, KERNEL_GROUP)));
    bound.map(|()| "the kernel's netlink socket opens".into()).map_err(|e| format!("netlink socket: {e}"))
}

fn diskseq(block: &Path) -> Part {
    let disks = std::fs::read_dir(block).map_err(|e| format!("{}: {e}", block.display()))?;
    let mut any = false;
    for disk in disks.flatten() {
        any = true;
        if File::open(disk.path().join("diskseq")).is_ok() {
            return Ok(format!("told by {}", disk.path().display()));
        }
    }
    let why = if any { "needs Linux 5.15 or newer" } else { "there is no block device to ask" };
    Err(format!("no disk below {} has it: {why}", block.display()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_lock_is_found_by_its_inode_and_no_other() {
        let table = "1: POSIX  ADVISORY  WRITE 11 fe:00:77 0 EOF\n\
                     2: FLOCK  ADVISORY  WRITE 22 fe:00:78 0 EOF\n\
                     2: -> FLOCK  ADVISORY  WRITE 33 fe:00:77 0 EOF\n\
                     3: FLOCK  ADVISORY  WRITE 44 fe:00:77 0 EOF\n";
        assert_eq!(holder(table, 77), Some("44"));
        assert_eq!(holder(table, 8), None);
    }

    #[test]
    fn a_state_directory_says_who_has_it() {
        let dir = tempfile::tempdir().unwrap();
        let words = state_dir(dir.path()).unwrap();
        assert!(words.ends_with("is free"), "{words}");
        let lock = File::create(dir.path().join("lock")).unwrap();
        assert!(state_dir(dir.path()).unwrap().ends_with("is free"));
        rustix::fs::flock(&lock, rustix::fs::FlockOperation::LockExclusive).unwrap();
        let words = state_dir(dir.path()).unwrap();
        assert!(words.contains(&format!("in use by pid {} (", std::process::id())), "{words}");
        assert!(state_dir(&dir.path().join("lock")).is_err());
        assert!(state_dir(&dir.path().join("none")).unwrap().contains("would be made"));
        assert!(!dir.path().join("none").exists());
    }

    #[test]
    fn a_mount_point_that_is_somebody_elses_is_missing() {
        assert!(mount_point(Path::new("/proc")).unwrap_err().contains("type proc"));
        assert!(mount_point(Path::new("/etc/passwd")).unwrap_err().contains("not a directory"));
        assert!(mount_point(Path::new("/no/such/place")).unwrap_err().contains("parent"));
        let dir = tempfile::tempdir().unwrap();
        assert!(mount_point(&dir.path().canonicalize().unwrap()).is_ok());
    }

    #[test]
    fn a_request_timeout_of_the_kernel_is_said() {
        let dir = tempfile::tempdir().unwrap();
        assert!(fuse_timeout(dir.path()).is_ok());
        std::fs::write(dir.path().join("max_request_timeout"), "60\n").unwrap();
        assert!(fuse_timeout(dir.path()).unwrap_err().contains("max_request_timeout is 60"));
    }

    #[test]
    fn an_old_kernel_without_diskseq_is_said() {
        let dir = tempfile::tempdir().unwrap();
        assert!(diskseq(dir.path()).unwrap_err().contains("no block device"));
        std::fs::create_dir(dir.path().join("vda")).unwrap();
        assert!(diskseq(dir.path()).unwrap_err().contains("5.15"));
        std::fs::write(dir.path().join("vda/diskseq"), "1\n").unwrap();
        assert!(diskseq(dir.path()).is_ok());
    }
}
