//! The disks the kernel shows now, each incarnation's identity read once.

use std::collections::{HashMap, HashSet};
use std::fs::File;
use std::io;
use std::os::fd::AsFd;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, Instant};

use parking_lot::{Condvar, Mutex};
use rustix::fs::{Mode, OFlags};

use super::sysfs::{Sysfs, is_gone, present};
use super::{DevicesError, identity};
use crate::model::{BootId, DevNo, Disk, DiskIdentity, Incarnation};
use crate::sys;

/// How often a disk that changes under our eyes is looked at again before it counts as absent.
const TRIES: usize = 5;
/// How long a caller waits for a device to tell its identity; the reading itself goes on.
const IDENTITY_WITHIN: Duration = Duration::from_secs(3);
/// How long "it has no identity" is believed: a serial may come late (kernel fact 17).
const NONE_FOR: Duration = Duration::from_millis(250);
/// Disks that are never a volume: memory, stacked devices (their parts are the disks), removable media.
const NEVER: [&str; 6] = ["ram", "zram", "dm-", "md", "fd", "sr"];

/// What is read of an incarnation once.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Facts {
    pub(super) identity: DiskIdentity,
    /// For a loop device over a block device: that device.
    pub(super) backing: Option<DevNo>,
    /// For a loop device: the device of the filesystem that its file is on.
    pub(super) file_on: Option<DevNo>,
}

#[derive(Debug, Clone)]
enum Reading {
    Running,
    Known(Facts, Instant),
    Changed,
    Failed(String),
}

/// How reading an incarnation's facts went.
#[derive(Debug)]
pub(super) enum Told {
    Known(Facts),
    /// It is another disk by now.
    Changed,
    /// It cannot be told (yet): why.
    Untold(String),
}

type Key = (String, Option<u64>);

#[derive(Debug, Default)]
struct Cache {
    readings: Mutex<HashMap<Key, Reading>>,
    done: Condvar,
}

/// Reads disks from sysfs, and identities once.
#[derive(Debug)]
pub(super) struct Scanner {
    pub(super) sysfs: Sysfs,
    dev_dir: PathBuf,
    boot: BootId,
    cache: Arc<Cache>,
}

/// Whether a kernel name is that of a loop device.
pub(super) fn is_loop(name: &str) -> bool {
    name.strip_prefix("loop").is_some_and(|n| !n.is_empty() && n.bytes().all(|b| b.is_ascii_digit()))
}

fn is_name(name: &str) -> bool {
    !name.is_empty() && !name.contains('/') && name != "." && name != ".."
}

/// The kernel's `huge_encode_dev`, as `loop_info64` holds it.
fn decode_dev(number: u64) -> DevNo {
    let n = number as u32;
    DevNo { major: n >> 8 & 0xfff, minor: n & 0xff | n >> 12 & 0xfff00 }
}

/// The sequence number for a kernel that has none (before 5.15): FNV-1a over dev_t and identity,
/// so the same disk in the same place is the same incarnation (rule D2).
fn made_up_seq(dev: DevNo, identity: &DiskIdentity) -> u64 {
    let bytes = dev.major.to_le_bytes().into_iter().chain(dev.minor.to_le_bytes()).chain(identity.text().bytes());
    bytes.fold(0xcbf2_9ce4_8422_2325, |hash, b| (hash ^ u64::from(b)).wrapping_mul(0x0100_0000_01b3))
}

impl Scanner {
    pub(super) fn new(sysfs: Sysfs, dev_dir: PathBuf, boot: BootId) -> Self {
        Scanner { sysfs, dev_dir, boot, cache: Arc::default() }
    }

    pub(super) fn boot(&self) -> BootId {
        self.boot
    }

    /// The node of a kernel name; the kernel writes `!` for the `/` of names like `cciss/c0d0`.
    pub(super) fn node(&self, name: &str) -> PathBuf {
        self.dev_dir.join(name.replace('!', "/"))
    }

    /// All disks that could be a volume's; forgets the incarnations that are gone.
    pub(super) fn disks(&self) -> Result<Vec<Disk>, DevicesError> {
        let failed = |e: io::Error| DevicesError::Failed {
            what: format!("list {}", self.sysfs.root().join("block").display()),
            words: e.to_string(),
        };
        let names = self.sysfs.disk_names().map_err(failed)?;
        let mut disks = Vec::new();
        for name in &names {
            disks.extend(self.disk(name)?);
        }
        let cached: HashSet<String> = self.cache.readings.lock().keys().map(|(name, _)| name.to_string()).collect();
        let mut seqs = HashMap::new();
        for name in names.into_iter().filter(|name| cached.contains(name)) {
            if let Ok(seq) = self.sysfs.diskseq(&name) {
                seqs.insert(name, seq);
            }
        }
        // A higher number than seen is a newer incarnation that another caller has just read.
        self.cache.readings.lock().retain(|(name, seq), reading| {
            matches!(reading, Reading::Running) || seqs.get(name).is_some_and(|seen| seq >= seen)
        });
        Ok(disks)
    }

    /// One disk; `None` also for what can be no volume and for a disk that keeps changing.
    pub(super) fn disk(&self, name: &str) -> Result<Option<Disk>, DevicesError> {
        if !is_name(name) || NEVER.iter().any(|prefix| name.starts_with(prefix)) {
            return Ok(None);
        }
        for _ in 0..TRIES {
            match present(self.look(name)) {
                Ok(Some(Look::Is(disk))) => return Ok(Some(disk)),
                Ok(Some(Look::Not) | None) => return Ok(None),
                Ok(Some(Look::Changed)) => {}
                Err(e) => {
                    let what = format!("look at {}", self.sysfs.disk_dir(name).display());
                    return Err(DevicesError::Failed { what, words: e.to_string() });
                }
            }
        }
        tracing::warn!(name, "the disk changes all the time; it counts as absent");
        Ok(None)
    }

    fn look(&self, name: &str) -> io::Result<Look> {
        let bound = |name| Ok::<_, io::Error>(!is_loop(name) || self.sysfs.loop_bound(name)?);
        // Most loop devices of a host that has had many are unbound: one question tells.
        if !bound(name)? {
            return Ok(Look::Not);
        }
        let seq = self.sysfs.diskseq(name)?;
        let dev = self.sysfs.dev(name)?;
        if !bound(name)? || self.sysfs.hidden(name)? || self.sysfs.size(name)? == 0 {
            return Ok(Look::Not);
        }
        let identity = match self.facts(name, dev, seq) {
            Told::Known(facts) => facts.identity,
            Told::Changed => return Ok(Look::Changed),
            Told::Untold(why) => {
                tracing::warn!(name, why, "the disk's identity cannot be told");
                DiskIdentity::None
            }
        };
        let size = self.sysfs.size(name)?;
        let same = self.sysfs.dev(name)? == dev && bound(name)? && self.sysfs.diskseq(name)? == seq;
        if !same || size == 0 {
            return Ok(Look::Changed);
        }
        let diskseq = seq.unwrap_or_else(|| made_up_seq(dev, &identity));
        let incarnation = Incarnation { boot: self.boot, diskseq };
        Ok(Look::Is(Disk { name: name.into(), dev, incarnation, size, identity }))
    }

    /// What is already known of an incarnation, without asking the device.
    pub(super) fn known(&self, name: &str, seq: Option<u64>) -> Option<Facts> {
        seq?;
        match self.cache.readings.lock().get(&(name.to_owned(), seq)) {
            Some(Reading::Known(facts, _)) => Some(facts.clone()),
            _ => None,
        }
    }

    /// The facts of an incarnation, read by one thread however many ask, on a thread of its own:
    /// a device that hangs holds no caller longer than [`IDENTITY_WITHIN`].
    pub(super) fn facts(&self, name: &str, dev: DevNo, seq: Option<u64>) -> Told {
        let key: Key = (name.to_owned(), seq);
        let until = Instant::now() + IDENTITY_WITHIN;
        let mut readings = self.cache.readings.lock();
        let fresh = match readings.get(&key) {
            Some(Reading::Running) => true,
            // Without a sequence number the key is not one incarnation's.
            Some(Reading::Known(..)) if seq.is_none() => false,
            Some(Reading::Known(facts, at)) => facts.identity != DiskIdentity::None || at.elapsed() < NONE_FOR,
            _ => false,
        };
        if !fresh {
            let source = Source { sysfs: self.sysfs.clone(), node: self.node(name), name: name.to_owned(), dev, seq };
            let cache = Arc::clone(&self.cache);
            let slot = key.clone();
            let spawned = std::thread::Builder::new().name(format!("id-{name}")).spawn(move || {
                let mut answer = Answer { cache, slot, reading: Reading::Failed("the reading thread panicked".into()) };
                answer.reading = source.read();
            });
            if let Err(e) = spawned {
                return Told::Untold(format!("no thread: {e}"));
            }
            readings.insert(key.clone(), Reading::Running);
        }
        loop {
            match readings.get(&key) {
                Some(Reading::Known(facts, _)) => return Told::Known(facts.clone()),
                Some(Reading::Failed(words)) => return Told::Untold(words.clone()),
                Some(Reading::Running) => {}
                Some(Reading::Changed) | None => return Told::Changed,
            }
            if self.cache.done.wait_until(&mut readings, until).timed_out() {
                return Told::Untold(format!("it did not answer within {} s", IDENTITY_WITHIN.as_secs()));
            }
        }
    }

    /// Opens the node and makes sure it is this disk: number and incarnation.
    pub(super) fn open(&self, disk: &Disk, flags: OFlags) -> Result<File, OpenError> {
        let gone = || OpenError::Gone;
        if disk.incarnation.boot != self.boot {
            return Err(gone());
        }
        let flags = flags | OFlags::CLOEXEC | OFlags::NONBLOCK;
        let file = match rustix::fs::open(self.node(&disk.name), flags, Mode::empty()) {
            Ok(fd) => File::from(fd),
            Err(e) => {
                let same = self.disk(&disk.name).ok().flatten().is_some_and(|d| d.incarnation == disk.incarnation);
                return Err(if same { OpenError::Failed(e.into()) } else { gone() });
            }
        };
        if node_dev(&file).map_err(OpenError::Failed)? != Some(disk.dev) {
            return Err(gone());
        }
        let same = match sys::disk_seq(file.as_fd()) {
            Ok(seq) => seq == disk.incarnation.diskseq,
            // A kernel that has no sequence numbers.
            Err(e) if matches!(e.raw_os_error(), Some(libc::ENOTTY | libc::EINVAL)) => {
                self.disk(&disk.name).ok().flatten().is_some_and(|d| d.incarnation == disk.incarnation)
            }
            Err(e) if is_gone(&e) => false,
            Err(e) => return Err(OpenError::Failed(e)),
        };
        if same { Ok(file) } else { Err(gone()) }
    }
}

/// Why a disk's node could not be opened.
#[derive(Debug)]
pub(super) enum OpenError {
    Gone,
    Failed(io::Error),
}

enum Look {
    Is(Disk),
    Not,
    Changed,
}

/// The number of the block device that an open file is; `None` if it is none.
pub(super) fn node_dev(file: &File) -> io::Result<Option<DevNo>> {
    let stat = rustix::fs::fstat(file)?;
    if rustix::fs::FileType::from_raw_mode(stat.st_mode) != rustix::fs::FileType::BlockDevice {
        return Ok(None);
    }
    Ok(Some(DevNo { major: rustix::fs::major(stat.st_rdev), minor: rustix::fs::minor(stat.st_rdev) }))
}

/// A loop device's facts through an open descriptor; `None` when nothing is bound.
pub(super) fn loop_facts(file: &File) -> io::Result<Option<Facts>> {
    let info = match sys::loop_status(file.as_fd()) {
        Ok(info) => info,
        Err(e) if e.raw_os_error() == Some(libc::ENXIO) => return Ok(None),
        Err(e) => return Err(e),
    };
    let tag = info.file_name();
    let readable = !tag.is_empty() && !tag.contains(char::REPLACEMENT_CHARACTER);
    Ok(Some(Facts {
        identity: if readable { DiskIdentity::LoopTag(tag) } else { DiskIdentity::None },
        backing: (info.lo_rdevice != 0).then(|| decode_dev(info.lo_rdevice)),
        file_on: Some(decode_dev(info.lo_device)),
    }))
}

/// Puts the reading in its place, also when reading panicked.
struct Answer {
    cache: Arc<Cache>,
    slot: Key,
    reading: Reading,
}

impl Drop for Answer {
    fn drop(&mut self) {
        self.cache.readings.lock().insert(self.slot.clone(), self.reading.clone());
        self.cache.done.notify_all();
    }
}

/// Where one incarnation's facts are read.
struct Source {
    sysfs: Sysfs,
    node: PathBuf,
    name: String,
    dev: DevNo,
    seq: Option<u64>,
}

impl Source {
    fn read(&self) -> Reading {
        let result = if is_loop(&self.name) { self.read_loop() } else { self.read_sysfs() };
        match result {
            Ok(Some(facts)) => Reading::Known(facts, Instant::now()),
            Ok(None) => Reading::Changed,
            // A loop device that is being unbound cannot be opened, a moment before its number rises.
            Err(e) if is_loop(&self.name) && e.raw_os_error() == Some(libc::ENXIO) => Reading::Changed,
            Err(e) if is_gone(&e) && !matches!(self.sysfs.diskseq(&self.name), Ok(now) if now == self.seq) => {
                Reading::Changed
            }
            Err(e) => Reading::Failed(e.to_string()),
        }
    }

    fn read_sysfs(&self) -> io::Result<Option<Facts>> {
        let before = self.sysfs.diskseq(&self.name)?;
        let identity = identity::read(&self.sysfs.disk_dir(&self.name))?;
        let same = before == self.seq && self.sysfs.diskseq(&self.name)? == self.seq;
        Ok(same.then_some(Facts { identity, backing: None, file_on: None }))
    }

    /// Number, tag and number again on one descriptor: what lies between is one incarnation's.
    fn read_loop(&self) -> io::Result<Option<Facts>> {
        let flags = OFlags::RDONLY | OFlags::CLOEXEC | OFlags::NONBLOCK;
        let _passing = sys::passing();
        let file = File::from(rustix::fs::open(&self.node, flags, Mode::empty())?);
        if node_dev(&file)? != Some(self.dev) {
            return Err(io::Error::other(format!("{} is not {}", self.node.display(), self.dev)));
        }
        let seq = || match sys::disk_seq(file.as_fd()) {
            Err(_) if self.seq.is_none() => Ok(None),
            other => other.map(Some),
        };
        let before = seq()?;
        let facts = loop_facts(&file)?;
        if before != self.seq || seq()? != self.seq {
            return Ok(None);
        }
        Ok(facts)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_kernels_device_numbers_are_decoded() {
        assert_eq!(decode_dev(0x701), DevNo { major: 7, minor: 1 });
        assert_eq!(decode_dev(0x0010_fd01), DevNo { major: 253, minor: 257 });
    }

    #[test]
    fn a_made_up_sequence_number_is_the_disks_own() {
        let (a, b) = (DevNo { major: 8, minor: 0 }, DevNo { major: 8, minor: 16 });
        let serial = |s: &str| DiskIdentity::Serial(s.into());
        assert_eq!(made_up_seq(a, &serial("x")), made_up_seq(a, &serial("x")));
        assert_ne!(made_up_seq(a, &serial("x")), made_up_seq(b, &serial("x")));
        assert_ne!(made_up_seq(a, &serial("x")), made_up_seq(a, &serial("y")));
    }
}
