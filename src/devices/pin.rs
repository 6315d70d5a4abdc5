//! Our own descriptors on a disk: the pin of an attached one (D4), the hold of a detach (C4).

use std::fs::File;
use std::io;
use std::os::fd::AsFd;
use std::sync::Arc;
use std::time::{Duration, Instant};

use parking_lot::RwLock;
use rustix::fs::OFlags;
use rustix::io::Errno;

use super::scan::{OpenError, Scanner, is_loop, loop_facts};
use super::walk::Walker;
use super::{DevicesError, Hold, Pin, holders, identity};
use crate::model::{Disk, Holder, HolderKind};
use crate::sys;

/// How long passing openers (udev, blkid, another daemon that looks around) may take.
const PASSING: Duration = Duration::from_secs(1);
/// First wait between two looks; it doubles up to [`LONGEST_WAIT`].
const FIRST_WAIT: Duration = Duration::from_millis(5);
const LONGEST_WAIT: Duration = Duration::from_millis(100);

fn gone(disk: &Disk) -> DevicesError {
    DevicesError::Gone { device: disk.name.to_string() }
}

fn failed(what: &str, disk: &Disk, error: impl std::fmt::Display) -> DevicesError {
    DevicesError::Failed { what: format!("{what} {}", disk.name), words: error.to_string() }
}

/// See [`Pin`].
#[derive(Debug)]
pub(super) struct KernelPin {
    scanner: Arc<Scanner>,
    disk: Disk,
    open: RwLock<Option<Arc<Open>>>,
}

#[derive(Debug)]
struct Open {
    /// `None` for a daemon that only looks, and by the failpoint `devices.no-pin`: to see that its
    /// absence is noticed.
    node: Option<File>,
    /// An attribute of the disk in sysfs: ENODEV once the disk is gone (kernel fact 23).
    attribute: File,
    /// What it must say; `None` where the kernel has no sequence numbers and only its presence tells.
    seq: Option<u64>,
}

impl Open {
    fn alive(&self) -> bool {
        let mut text = [0u8; 32];
        match rustix::io::pread(&self.attribute, &mut text, 0) {
            Ok(0) | Err(_) => false,
            Ok(n) => self.seq.is_none_or(|seq| {
                let now = std::str::from_utf8(&text[..n]).ok().and_then(|t| t.trim_ascii().parse().ok());
                now == Some(seq)
            }),
        }
    }
}

impl KernelPin {
    pub(super) fn new(scanner: Arc<Scanner>, disk: &Disk, keep_open: bool) -> Result<Self, DevicesError> {
        let node = scanner.open(disk, OFlags::RDONLY).map_err(|e| match e {
            OpenError::Gone => gone(disk),
            OpenError::Failed(e) => failed("open", disk, e),
        })?;
        let dir = scanner.sysfs.disk_dir(&disk.name);
        let has_seq = scanner.sysfs.diskseq(&disk.name).map_err(|_| gone(disk))?.is_some();
        let attribute = File::open(dir.join(if has_seq { "diskseq" } else { "dev" })).map_err(|_| gone(disk))?;
        let node = (keep_open && !crate::failpoint::hit("devices.no-pin")).then_some(node);
        let open = Open { node, attribute, seq: has_seq.then_some(disk.incarnation.diskseq) };
        // The attribute was opened by name, after the node: it must be the same disk's.
        if !open.alive() {
            return Err(gone(disk));
        }
        Ok(KernelPin { scanner, disk: disk.clone(), open: RwLock::new(Some(Arc::new(open))) })
    }

    /// Asks the open pin; `None` if it is released, gone or another disk. Not under the lock: a question
    /// may hang with its device, and a `release` that waited for it would keep every `alive` waiting, which
    /// the tree's own thread asks.
    fn through<T>(&self, ask: impl FnOnce(&Open) -> io::Result<Option<T>>) -> io::Result<Option<T>> {
        let open = self.open.read().clone();
        match open.filter(|open| open.alive()) {
            Some(open) => ask(&open),
            None => Ok(None),
        }
    }

    /// Our descriptor, for one question.
    fn node(&self, open: &Open) -> io::Result<File> {
        match &open.node {
            Some(node) => node.try_clone(),
            None => self.scanner.open(&self.disk, OFlags::RDONLY).map_err(|_| Errno::NODEV.into()),
        }
    }

    fn read(&self) -> io::Result<Option<Disk>> {
        // A serial is read without the lock: it may hang with its device, alive() and release() must not.
        let identity = if is_loop(&self.disk.name) {
            self.through(|open| Ok(loop_facts(&self.node(open)?)?.map(|f| f.identity)))?
        } else {
            self.through(|_| Ok(Some(())))?;
            Some(identity::read(&self.scanner.sysfs.disk_dir(&self.disk.name))?)
        };
        let Some(identity) = identity else { return Ok(None) };
        // Last, so that what was read was read of this incarnation.
        self.through(|open| {
            let size = sys::disk_size(self.node(open)?.as_fd())?;
            Ok(open.alive().then(|| Disk { size, identity, ..self.disk.clone() }))
        })
    }
}

impl Pin for KernelPin {
    fn alive(&self) -> bool {
        self.open.read().as_ref().is_some_and(|open| open.alive())
    }

    fn look(&self) -> Result<Disk, DevicesError> {
        match self.read() {
            Ok(Some(disk)) => Ok(disk),
            Ok(None) => Err(gone(&self.disk)),
            Err(_) if !self.alive() => Err(gone(&self.disk)),
            Err(e) => Err(failed("look at", &self.disk, e)),
        }
    }

    fn release(&self) {
        drop(self.open.write().take());
    }
}

/// See [`Hold`].
#[derive(Debug)]
pub(super) struct KernelHold {
    _node: File,
}

impl Hold for KernelHold {}

/// Waits between looks, until its time is over.
struct Patience {
    until: Instant,
    wait: Duration,
}

impl Patience {
    fn new() -> Self {
        Patience { until: Instant::now() + PASSING, wait: FIRST_WAIT }
    }

    /// False when there is no more time.
    fn wait(&mut self) -> bool {
        let left = self.until.saturating_duration_since(Instant::now());
        if left.is_zero() {
            return false;
        }
        std::thread::sleep(self.wait.min(left));
        self.wait = (self.wait * 2).min(LONGEST_WAIT);
        true
    }
}

/// Opens the disk exclusively, waiting a moment for those who pass; `users` names who is in the way.
fn alone(
    disk: &Disk,
    patience: &mut Patience,
    open: impl Fn() -> Result<File, OpenError>,
    users: impl Fn() -> Result<Vec<Holder>, DevicesError>,
) -> Result<File, DevicesError> {
    loop {
        match open() {
            Ok(node) => return Ok(node),
            Err(OpenError::Gone) => return Err(gone(disk)),
            Err(OpenError::Failed(e)) if e.raw_os_error() == Some(libc::EBUSY) => {
                let mut rows = users()?;
                if passing(&rows) && patience.wait() {
                    continue;
                }
                if rows.is_empty() {
                    rows.push(Holder { kind: HolderKind::Unnamed, pid: None, name: String::new() });
                }
                return Err(in_use(disk, rows));
            }
            Err(OpenError::Failed(e)) => return Err(failed("open", disk, e)),
        }
    }
}

fn in_use(disk: &Disk, holders: Vec<Holder>) -> DevicesError {
    DevicesError::InUse { device: disk.name.to_string(), holders }
}

fn passing(rows: &[Holder]) -> bool {
    rows.iter().all(|h| h.kind == HolderKind::Open)
}

/// Waits until nobody is named; `InUse` where somebody stays.
fn until_none(
    disk: &Disk,
    patience: &mut Patience,
    users: impl Fn() -> Result<Vec<Holder>, DevicesError>,
) -> Result<(), DevicesError> {
    loop {
        let rows = users()?;
        if rows.is_empty() {
            return Ok(());
        }
        if !passing(&rows) || !patience.wait() {
            return Err(in_use(disk, rows));
        }
    }
}

fn sync(node: &File, disk: &Disk) -> Result<(), DevicesError> {
    let flushed = if crate::failpoint::hit("devices.flush") { Err(Errno::IO) } else { rustix::fs::fsync(node) };
    flushed.map_err(|e| DevicesError::Flush { device: disk.name.to_string(), words: e.to_string() })
}

/// Holds the disk exclusively, flushes it, and looks for users last (contract, C4).
pub(super) fn hold(scanner: &Scanner, walker: &Walker, disk: &Disk) -> Result<KernelHold, DevicesError> {
    let mut patience = Patience::new();
    let users = || holders::of(&*walker.walk()?, &scanner.sysfs, disk.dev);
    let node = alone(disk, &mut patience, || open_exclusively(scanner, disk), users)?;
    sync(&node, disk)?;
    until_none(disk, &mut patience, users)?;
    Ok(KernelHold { _node: node })
}

/// See [`super::Devices::flush`]. Opened for reading: closing what was open for writing makes udev
/// look at the disk, and a flush needs no more.
pub(super) fn flush(scanner: &Scanner, walker: &Walker, disk: &Disk, crash: bool) -> Result<(), DevicesError> {
    let mut patience = Patience::new();
    let writers = || holders::writers(&*walker.walk()?, &scanner.sysfs, disk.dev);
    let node = match crash {
        true => scanner.open(disk, OFlags::RDONLY).map_err(|e| match e {
            OpenError::Gone => gone(disk),
            OpenError::Failed(e) => failed("open", disk, e),
        })?,
        false => alone(disk, &mut patience, || scanner.open(disk, OFlags::RDONLY | OFlags::EXCL), writers)?,
    };
    sync(&node, disk)?;
    if crash { Ok(()) } else { until_none(disk, &mut patience, writers) }
}

/// For writing, so that a later flush is allowed to write; a read-only disk for reading.
fn open_exclusively(scanner: &Scanner, disk: &Disk) -> Result<File, OpenError> {
    match scanner.open(disk, OFlags::RDWR | OFlags::EXCL) {
        Err(OpenError::Failed(e)) if matches!(e.raw_os_error(), Some(libc::EROFS | libc::EACCES | libc::EPERM)) => {
            scanner.open(disk, OFlags::RDONLY | OFlags::EXCL)
        }
        other => other,
    }
}
