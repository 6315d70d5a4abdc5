//! One walk over everything that can hold a block device, shared by all who ask meanwhile.

use std::collections::{HashMap, HashSet};
use std::ffi::CStr;
use std::fs::File;
use std::io::{self, Read};
use std::mem::MaybeUninit;
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use parking_lot::{Condvar, Mutex};
use rustix::fs::{AtFlags, CWD, FileType, Mode, OFlags, RawDir, StatxFlags};
use rustix::io::Errno;

use super::DevicesError;
use super::scan::{Scanner, Told, is_loop};
use super::sysfs::{self, present};
use crate::model::{DevNo, DiskIdentity, Holder, HolderKind};

/// What one walk found, for every block device at once.
#[derive(Debug, Default)]
pub(super) struct Walk {
    /// Mounts, swap, loop devices and open descriptors, by the device they hold.
    pub(super) by_dev: HashMap<DevNo, Vec<Holder>>,
    /// Which of the open descriptors among them can write: device and process.
    pub(super) writers: HashSet<(DevNo, i32)>,
    /// The loop devices whose backing file could be told.
    pub(super) loops: Vec<LoopOver>,
    /// Those where it could not.
    pub(super) untold: Vec<UntoldLoop>,
    /// Processes that we are not permitted to look into, by pid and command name.
    pub(super) blind: Vec<(i32, String)>,
}

/// A bound loop device and what is under it.
#[derive(Debug)]
pub(super) struct LoopOver {
    pub(super) dev: DevNo,
    /// The block device that is its backing file.
    pub(super) backing: Option<DevNo>,
    /// The device of the filesystem that its backing file is on.
    pub(super) file_on: Option<DevNo>,
    /// Whether its tag is the loop provider's.
    pub(super) ours: bool,
}

/// A loop device whose backing file may be a block device: the path leads nowhere (any more).
#[derive(Debug)]
pub(super) struct UntoldLoop {
    name: String,
    path: String,
    /// Bytes from its start of the backing file that it covers.
    covers: u64,
    /// Whether it may end before its backing file does.
    limited: bool,
}

impl UntoldLoop {
    /// The row for a device of that size, if the loop device could be over it.
    pub(super) fn over(&self, size: u64) -> Option<Holder> {
        let fits = if self.limited { self.covers <= size } else { self.covers == size };
        let name = format!("{} (whose backing file {} cannot be told)", self.name, self.path);
        fits.then_some(Holder { kind: HolderKind::Loop, pid: None, name })
    }
}

/// One line of mountinfo.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Mount {
    pub(super) dev: DevNo,
    pub(super) point: String,
    pub(super) fstype: String,
    pub(super) source: String,
}

/// Undoes the kernel's `\040`.
pub(super) fn unescape(text: &str) -> String {
    let bytes = text.as_bytes();
    let mut out = Vec::with_capacity(bytes.len());
    let mut at = 0;
    while at < bytes.len() {
        let code =
            bytes.get(at + 1..at + 4).filter(|c| bytes[at] == b'\\' && c.iter().all(|d| (b'0'..=b'7').contains(d)));
        match code.map(|c| c.iter().fold(0u32, |n, d| n * 8 + u32::from(d - b'0'))).and_then(|n| u8::try_from(n).ok()) {
            Some(byte) => {
                out.push(byte);
                at += 4;
            }
            None => {
                out.push(bytes[at]);
                at += 1;
            }
        }
    }
    String::from_utf8_lossy(&out).into_owned()
}

/// Reads one line of mountinfo; `None` if it is none.
pub(super) fn parse_mount(line: &str) -> Option<Mount> {
    let (left, right) = line.split_once(" - ")?;
    let mut left = left.split(' ');
    let dev = sysfs::parse_dev(left.nth(2)?)?;
    let point = unescape(left.nth(1)?);
    let mut right = right.split(' ');
    Some(Mount { dev, point, fstype: unescape(right.next()?), source: unescape(right.next()?) })
}

/// Reads the paths of /proc/swaps, files included.
pub(super) fn parse_swaps(text: &str) -> impl Iterator<Item = String> + '_ {
    text.lines().skip(1).filter_map(|line| line.split_ascii_whitespace().next()).map(unescape)
}

/// Walks one at a time; see [`Walker::walk`].
#[derive(Debug)]
pub(super) struct Walker {
    proc: PathBuf,
    scanner: Arc<Scanner>,
    turn: Mutex<Turn>,
    done: Condvar,
    blind: Mutex<Vec<(i32, String)>>,
}

type Outcome = Result<Arc<Walk>, DevicesError>;

#[derive(Debug, Default)]
struct Turn {
    started: u64,
    running: bool,
    last: Option<(u64, Outcome)>,
}

/// Ends a turn, also when the walk panicked.
struct Ending<'a> {
    walker: &'a Walker,
    number: u64,
    outcome: Outcome,
}

impl Drop for Ending<'_> {
    fn drop(&mut self) {
        let mut turn = self.walker.turn.lock();
        turn.running = false;
        turn.last = Some((self.number, self.outcome.clone()));
        self.walker.done.notify_all();
    }
}

fn failed(what: impl Into<String>, error: impl std::fmt::Display) -> DevicesError {
    DevicesError::Failed { what: what.into(), words: error.to_string() }
}

fn vanished(error: Errno) -> bool {
    matches!(error, Errno::NOENT | Errno::SRCH)
}

impl Walker {
    pub(super) fn new(proc: PathBuf, scanner: Arc<Scanner>) -> Self {
        Walker { proc, scanner, turn: Mutex::default(), done: Condvar::new(), blind: Mutex::default() }
    }

    /// A walk that began after this call. Callers that come while one runs share the next.
    pub(super) fn walk(&self) -> Outcome {
        let mut turn = self.turn.lock();
        let need = turn.started + 1;
        loop {
            if let Some((number, outcome)) = &turn.last
                && *number >= need
            {
                return outcome.clone();
            }
            if !turn.running {
                break;
            }
            self.done.wait(&mut turn);
        }
        turn.running = true;
        turn.started += 1;
        let outcome = Err(failed("walk /proc", "the walk panicked"));
        let mut ending = Ending { walker: self, number: turn.started, outcome };
        drop(turn);
        ending.outcome = self.look().map(Arc::new);
        if let Ok(walk) = &ending.outcome {
            let mut known = self.blind.lock();
            if *known != walk.blind {
                tracing::warn!(processes = ?walk.blind, "not permitted to see what these processes have open");
                known.clone_from(&walk.blind);
            }
        }
        ending.outcome.clone()
    }

    /// The processes that the last walk was not permitted to look into.
    pub(super) fn blind(&self) -> Vec<(i32, String)> {
        self.blind.lock().clone()
    }

    /// How many walks were begun.
    #[cfg(test)]
    pub(super) fn walks(&self) -> u64 {
        self.turn.lock().started
    }

    fn look(&self) -> Result<Walk, DevicesError> {
        let mut walk = Walk::default();
        let list = |e| failed(format!("list {}", self.proc.display()), e);
        let mut pids: Vec<i32> =
            sysfs::names(&self.proc).map_err(list)?.iter().filter_map(|n| n.parse().ok()).filter(|p| *p > 0).collect();
        // Our own number as this /proc has it.
        let own = std::fs::read_link(self.proc.join("self")).map_err(|e| failed("read /proc/self", e))?;
        let own: i32 =
            own.to_str().and_then(|s| s.parse().ok()).ok_or_else(|| failed("read /proc/self", "no number"))?;
        // Our own namespace first: its mount points are told without a process.
        pids.sort_unstable_by_key(|pid| (*pid != own, *pid));
        let mut seen = HashSet::new();
        let mut own_mounts = Vec::new();
        let mut buffer = vec![MaybeUninit::uninit(); 32 << 10];
        for pid in pids {
            let path = self.proc.join(pid.to_string());
            let dir = match rustix::fs::open(&path, DIRECTORY, Mode::empty()) {
                Ok(dir) => dir,
                Err(e) if vanished(e) => continue,
                Err(e) => return Err(failed(format!("open {}", path.display()), e)),
            };
            let process = Process { dir, path, pid };
            if let Some(mounts) = process.mounts(&mut seen, &mut walk)? {
                self.take_mounts(&mut walk, &mounts, (pid != own).then_some(pid));
                if pid == own {
                    own_mounts = mounts;
                }
            }
            if pid != own {
                process.descriptors(&mut walk, &mut buffer)?;
            }
        }
        self.take_swaps(&mut walk, &own_mounts)?;
        self.take_btrfs(&mut walk)?;
        self.take_loops(&mut walk, &own_mounts)?;
        Ok(walk)
    }

    fn take_mounts(&self, walk: &mut Walk, mounts: &[Mount], pid: Option<i32>) {
        for mount in mounts {
            // Filesystems of several devices have a number of their own (major 0), and their source
            // names a device. Other sources are free text, which any user may choose.
            let dev = match (mount.dev.major, mount.fstype.as_str()) {
                (0, "btrfs" | "bcachefs") => match resolve(Path::new(&mount.source), &[]) {
                    Resolved::Block(dev) => dev,
                    _ => continue,
                },
                (0, _) => continue,
                _ => mount.dev,
            };
            let rows = walk.by_dev.entry(dev).or_default();
            if !rows.iter().any(|h| h.kind == HolderKind::Mount && h.name == mount.point) {
                rows.push(Holder { kind: HolderKind::Mount, pid, name: mount.point.clone() });
            }
        }
    }

    fn take_swaps(&self, walk: &mut Walk, mounts: &[Mount]) -> Result<(), DevicesError> {
        let path = self.proc.join("swaps");
        let text =
            present(std::fs::read_to_string(&path)).map_err(|e| failed(format!("read {}", path.display()), e))?;
        for swap in parse_swaps(text.as_deref().unwrap_or_default()) {
            // A path that leads nowhere stays unnamed here; O_EXCL fails on it all the same.
            if let Resolved::Block(dev) = resolve(Path::new(&swap), mounts) {
                walk.by_dev.entry(dev).or_default().push(Holder { kind: HolderKind::Swap, pid: None, name: swap });
            }
        }
        Ok(())
    }

    /// All devices of each mounted btrfs: mountinfo names one of them.
    fn take_btrfs(&self, walk: &mut Walk) -> Result<(), DevicesError> {
        let root = self.scanner.sysfs.root().join("fs/btrfs");
        let words = |e| failed(format!("list {}", root.display()), e);
        for id in sysfs::names(&root).map_err(words)? {
            for name in sysfs::names(&root.join(&id).join("devices")).map_err(words)? {
                if let Some(dev) = self.scanner.sysfs.dev_of_any(&name).map_err(words)? {
                    let row = Holder { kind: HolderKind::Holder, pid: None, name: format!("btrfs {id}") };
                    walk.by_dev.entry(dev).or_default().push(row);
                }
            }
        }
        Ok(())
    }

    fn take_loops(&self, walk: &mut Walk, mounts: &[Mount]) -> Result<(), DevicesError> {
        let words = |e| failed("look at the loop devices", e);
        for name in self.scanner.sysfs.disk_names().map_err(words)?.into_iter().filter(|n| is_loop(n)) {
            if let Some(found) = present(self.take_loop(walk, mounts, &name)).map_err(words)? {
                walk.loops.push(found);
            }
        }
        Ok(())
    }

    /// What is under a loop device. What scanning has read of this incarnation is the kernel's own
    /// word; else the path says it, and only one that leads nowhere is asked of the device, since
    /// an opener disturbs its owner's test for users (kernel fact 14).
    fn take_loop(&self, walk: &mut Walk, mounts: &[Mount], name: &str) -> io::Result<LoopOver> {
        let sysfs = &self.scanner.sysfs;
        let dir = sysfs.disk_dir(name);
        let path = std::fs::read_to_string(dir.join("loop/backing_file"))?;
        let path = path.strip_suffix('\n').unwrap_or(&path);
        let (dev, seq) = (sysfs.dev(name)?, sysfs.diskseq(name)?);
        let mut facts = self.scanner.known(name, seq);
        let mut backing = facts.as_ref().and_then(|f| f.backing);
        if facts.is_none() {
            match resolve(Path::new(path), mounts) {
                Resolved::Block(under) => backing = Some(under),
                Resolved::Other => {}
                Resolved::Nothing => match self.scanner.facts(name, dev, seq) {
                    Told::Known(told) => {
                        backing = told.backing;
                        facts = Some(told);
                    }
                    Told::Changed => return Err(Errno::NODEV.into()),
                    Told::Untold(why) => {
                        tracing::warn!(name, path, why, "it cannot be told what is under the loop device");
                        let number = |attribute: &str| -> io::Result<u64> {
                            let text = std::fs::read_to_string(dir.join("loop").join(attribute))?;
                            text.trim_ascii().parse().map_err(|_| io::Error::from(Errno::INVAL))
                        };
                        let covers = number("offset")?.saturating_add(sysfs.size(name)?);
                        let limited = number("sizelimit")? != 0;
                        walk.untold.push(UntoldLoop { name: name.into(), path: path.into(), covers, limited });
                    }
                },
            }
        }
        if let Some(under) = backing {
            let row = Holder { kind: HolderKind::Loop, pid: None, name: name.into() };
            walk.by_dev.entry(under).or_default().push(row);
        }
        let ours = facts
            .as_ref()
            .is_some_and(|f| matches!(&f.identity, DiskIdentity::LoopTag(tag) if tag.starts_with(super::OUR_TAG)));
        Ok(LoopOver { dev, backing, file_on: facts.and_then(|f| f.file_on), ours })
    }
}

const DIRECTORY: OFlags = OFlags::RDONLY.union(OFlags::DIRECTORY).union(OFlags::CLOEXEC);

enum Resolved {
    Block(DevNo),
    Other,
    Nothing,
}

/// What is at a path that the kernel has told. Paths under a FUSE mount are not walked: the mount
/// may be our own or dead.
fn resolve(path: &Path, mounts: &[Mount]) -> Resolved {
    let under = mounts.iter().filter(|m| path.starts_with(&m.point)).max_by_key(|m| m.point.len());
    if under.is_some_and(|m| m.fstype.starts_with("fuse")) || !path.is_absolute() {
        return Resolved::Nothing;
    }
    let flags = AtFlags::STATX_DONT_SYNC | AtFlags::NO_AUTOMOUNT;
    match rustix::fs::statx(CWD, path, flags, StatxFlags::TYPE) {
        Ok(stat) if FileType::from_raw_mode(stat.stx_mode.into()) == FileType::BlockDevice => {
            Resolved::Block(DevNo { major: stat.stx_rdev_major, minor: stat.stx_rdev_minor })
        }
        Ok(_) => Resolved::Other,
        Err(_) => Resolved::Nothing,
    }
}

enum Seen {
    Block(DevNo),
    Other,
    Denied,
}

/// One process, by its directory in /proc: later answers are about the same process or ESRCH.
struct Process {
    dir: OwnedFd,
    path: PathBuf,
    pid: i32,
}

impl Process {
    fn failed(&self, what: &str, error: impl std::fmt::Display) -> DevicesError {
        failed(format!("{what} of {}", self.path.display()), error)
    }

    fn text(&self, name: &str) -> io::Result<Option<String>> {
        let file = match rustix::fs::openat(&self.dir, name, OFlags::RDONLY | OFlags::CLOEXEC, Mode::empty()) {
            Ok(fd) => File::from(fd),
            Err(e) if vanished(e) => return Ok(None),
            Err(e) => return Err(e.into()),
        };
        let mut bytes = Vec::new();
        match (&file).read_to_end(&mut bytes) {
            Ok(_) => Ok(Some(String::from_utf8_lossy(&bytes).into_owned())),
            // Between open and read the process can die, or the descriptor be closed.
            Err(e) if matches!(e.raw_os_error(), Some(libc::ESRCH | libc::ENOENT)) => Ok(None),
            Err(e) => Err(e),
        }
    }

    /// The mounts it sees, unless they were seen already. A chrooted process sees a part of its
    /// namespace only, hence the root in the key.
    fn mounts(&self, seen: &mut HashSet<Vec<u8>>, walk: &mut Walk) -> Result<Option<Vec<Mount>>, DevicesError> {
        let mut key = Vec::new();
        for name in ["ns/mnt", "root"] {
            match rustix::fs::readlinkat(&self.dir, name, Vec::new()) {
                Ok(link) => key.extend_from_slice(link.as_bytes_with_nul()),
                Err(e) if vanished(e) => return Ok(None),
                // We may not know which namespace it is in, but perhaps what it sees.
                Err(Errno::ACCESS | Errno::PERM) => key = self.pid.to_string().into_bytes(),
                Err(e) => return Err(self.failed(name, e)),
            }
        }
        if !seen.insert(key.clone()) {
            return Ok(None);
        }
        match self.text("mountinfo") {
            Ok(Some(text)) => return Ok(Some(text.lines().filter_map(parse_mount).collect())),
            // It died meanwhile (EINVAL: it has no namespace any more); the next of its kind is asked.
            Ok(None) => {}
            Err(e) if e.raw_os_error() == Some(libc::EINVAL) => {}
            Err(e) if e.kind() == io::ErrorKind::PermissionDenied => self.is_blind(walk)?,
            Err(e) => return Err(self.failed("the mounts", e)),
        }
        seen.remove(&key);
        Ok(None)
    }

    fn comm(&self) -> Result<String, DevicesError> {
        let comm = self.text("comm").map_err(|e| self.failed("the name", e))?.unwrap_or_default();
        Ok(comm.trim_end().to_owned())
    }

    /// Notes that this process keeps its descriptors or mounts from us: told in the log and by
    /// [`super::KernelDevices::blind_spots`], and no reason to refuse (O_EXCL sees its mounts).
    fn is_blind(&self, walk: &mut Walk) -> Result<(), DevicesError> {
        let row = (self.pid, self.comm()?);
        if !walk.blind.contains(&row) {
            walk.blind.push(row);
        }
        Ok(())
    }

    /// The block devices it has open. A process whose first thread has ended keeps its
    /// descriptors, and shows them under its other threads only.
    fn descriptors(&self, walk: &mut Walk, buffer: &mut [MaybeUninit<u8>]) -> Result<(), DevicesError> {
        if self.descriptors_in("fd", "fdinfo", walk, buffer)? > 0 {
            return Ok(());
        }
        let threads = sysfs::names(&self.path.join("task"));
        let threads = threads.or_else(|e| if e.raw_os_error() == Some(libc::ESRCH) { Ok(Vec::new()) } else { Err(e) });
        for thread in threads.map_err(|e| self.failed("the threads", e))? {
            if thread != self.pid.to_string() {
                self.descriptors_in(&format!("task/{thread}/fd"), &format!("task/{thread}/fdinfo"), walk, buffer)?;
            }
        }
        Ok(())
    }

    /// Looks at a directory of descriptors and answers how many there were.
    fn descriptors_in(
        &self,
        fds: &str,
        infos: &str,
        walk: &mut Walk,
        buffer: &mut [MaybeUninit<u8>],
    ) -> Result<usize, DevicesError> {
        let dir = match rustix::fs::openat(&self.dir, fds, DIRECTORY, Mode::empty()) {
            Ok(dir) => dir,
            Err(e) if vanished(e) => return Ok(0),
            Err(Errno::ACCESS | Errno::PERM) => {
                self.is_blind(walk)?;
                return Ok(0);
            }
            Err(e) => return Err(self.failed("the descriptors", e)),
        };
        let mut count = 0;
        let mut entries = RawDir::new(&dir, buffer);
        while let Some(entry) = entries.next() {
            let entry = match entry {
                Ok(entry) => entry,
                Err(e) if vanished(e) => break,
                Err(e) => return Err(self.failed("the descriptors", e)),
            };
            if entry.file_name().to_bytes().starts_with(b".") {
                continue;
            }
            count += 1;
            let found = match self.block_device(&dir, entry.file_name())? {
                Seen::Block(dev) => Some(dev),
                Seen::Other => None,
                Seen::Denied => {
                    self.is_blind(walk)?;
                    break;
                }
            };
            // O_PATH has nothing open.
            if let Some(dev) = found
                && let Some(flags) = self.flags(infos, entry.file_name())?.filter(|f| !f.contains(OFlags::PATH))
            {
                if flags.intersection(OFlags::RWMODE) != OFlags::RDONLY {
                    walk.writers.insert((dev, self.pid));
                }
                let row = Holder { kind: HolderKind::Open, pid: Some(self.pid), name: self.comm()? };
                let rows = walk.by_dev.entry(dev).or_default();
                if !rows.contains(&row) {
                    rows.push(row);
                }
            }
        }
        Ok(count)
    }

    /// What a descriptor is, asked of cached attributes only.
    fn block_device(&self, dir: &OwnedFd, fd: &CStr) -> Result<Seen, DevicesError> {
        let flags = AtFlags::STATX_DONT_SYNC | AtFlags::NO_AUTOMOUNT;
        match rustix::fs::statx(dir, fd, flags, StatxFlags::TYPE) {
            Ok(stat) if FileType::from_raw_mode(stat.stx_mode.into()) == FileType::BlockDevice => {
                Ok(Seen::Block(DevNo { major: stat.stx_rdev_major, minor: stat.stx_rdev_minor }))
            }
            Ok(_) => Ok(Seen::Other),
            Err(e) if vanished(e) => Ok(Seen::Other),
            // Either the process is closed to us, and then the link as well; or the file is on some
            // user's own FUSE mount, which even root may not look into. Such mounts are nodev: no
            // block device was ever opened through one.
            Err(Errno::ACCESS | Errno::PERM) => match rustix::fs::readlinkat(dir, fd, Vec::new()) {
                Err(Errno::ACCESS | Errno::PERM) => Ok(Seen::Denied),
                _ => Ok(Seen::Other),
            },
            Err(e) => Err(self.failed(&format!("descriptor {}", fd.to_string_lossy()), e)),
        }
    }

    /// The flags that a descriptor was opened with; `None` if it is closed by now.
    fn flags(&self, infos: &str, fd: &CStr) -> Result<Option<OFlags>, DevicesError> {
        let text = self.text(&format!("{infos}/{}", fd.to_string_lossy()));
        let Some(text) = text.map_err(|e| self.failed("a descriptor's flags", e))? else {
            return Ok(None);
        };
        let flags = text.lines().find_map(|l| l.strip_prefix("flags:"));
        let flags = flags.and_then(|f| u32::from_str_radix(f.trim(), 8).ok());
        let flags = flags.ok_or_else(|| self.failed("a descriptor's flags", "there are none"))?;
        Ok(Some(OFlags::from_bits_retain(flags)))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn a_line_of_mountinfo_is_read_with_its_escapes() {
        let line = r"36 35 98:0 /mnt1 /mnt\0402 rw,noatime master:1 shared:2 - ext3 /dev/my\040disk rw,errors=continue";
        let want = Mount {
            dev: DevNo { major: 98, minor: 0 },
            point: "/mnt 2".into(),
            fstype: "ext3".into(),
            source: "/dev/my disk".into(),
        };
        assert_eq!(parse_mount(line), Some(want));
        for bad in ["", "36 35 98:0 /a /b rw", "36 35 98 /a /b rw - ext3 x rw", "36 35 98:0 / - "] {
            assert_eq!(parse_mount(bad), None, "{bad}");
        }
    }

    #[test]
    fn swaps_are_read_with_their_escapes() {
        let text = "Filename\tType\tSize\tUsed\tPriority\n/dev/loop3 partition 8 0 -2\n/a\\040b file 8 0 -3\n";
        assert_eq!(parse_swaps(text).collect::<Vec<_>>(), ["/dev/loop3", "/a b"]);
        assert_eq!(parse_swaps("").count(), 0);
    }

    #[test]
    fn a_loop_device_that_cannot_be_told_is_over_what_it_fits() {
        let exact = UntoldLoop { name: "loop9".into(), path: "/x".into(), covers: 4096, limited: false };
        assert!(exact.over(4096).is_some() && exact.over(8192).is_none());
        let limited = UntoldLoop { limited: true, ..exact };
        assert!(limited.over(8192).is_some() && limited.over(512).is_none());
    }

    proptest! {
        #[test]
        fn no_text_panics_the_parsers(text in "[ -~\\n\\\\0-9ä]{0,120}") {
            let _ = parse_mount(&text);
            let _ = parse_swaps(&text).count();
            let _ = unescape(&text);
        }
    }
}
