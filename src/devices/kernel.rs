//! [`KernelDevices`]: the trait over this machine's kernel.

use std::path::PathBuf;
use std::sync::Arc;

use tokio::sync::broadcast;

use super::pin::KernelPin;
use super::scan::Scanner;
use super::sysfs::Sysfs;
use super::uevent::Listener;
use super::walk::Walker;
use super::{DeviceChange, Devices, DevicesError, Hold, Pin, holders, pin};
use crate::model::{BootId, DevNo, Disk, Holder};

/// Changes a receiver may lag behind before it has to look at everything.
const CHANGES: usize = 4096;

/// Where the kernel's trees are.
#[derive(Debug, Clone)]
pub struct Options {
    /// sysfs.
    pub sys: PathBuf,
    /// procfs of the pid namespace whose processes are asked for.
    pub proc: PathBuf,
    /// The device nodes.
    pub dev: PathBuf,
    /// Directories that volfs itself needs (its state): a disk under one carries the host.
    pub own_state: Vec<PathBuf>,
    /// Whether to listen to uevents; without, [`Devices::changes`] stays silent.
    pub uevents: bool,
    /// Whether a pin keeps its device open (rule D4). A daemon that only looks does not: it would be a
    /// user in the way of the one that owns the volumes.
    pub keep_open: bool,
}

impl Default for Options {
    fn default() -> Self {
        Options {
            sys: "/sys".into(),
            proc: "/proc".into(),
            dev: "/dev".into(),
            own_state: Vec::new(),
            uevents: true,
            keep_open: true,
        }
    }
}

/// The block devices of this machine.
#[derive(Debug)]
pub struct KernelDevices {
    scanner: Arc<Scanner>,
    walker: Walker,
    own_state: Vec<PathBuf>,
    keep_open: bool,
    changes: broadcast::Sender<DeviceChange>,
    _listener: Option<Listener>,
}

impl KernelDevices {
    /// Begins to listen; what changes after this has returned is told by [`Devices::changes`].
    ///
    /// # Errors
    /// [`DevicesError::Failed`]: the boot id cannot be read, or uevents cannot be heard.
    pub fn start(options: Options) -> Result<Arc<Self>, DevicesError> {
        let failed = |what: String, words: String| DevicesError::Failed { what, words };
        let path = options.proc.join("sys/kernel/random/boot_id");
        let boot = std::fs::read_to_string(&path)
            .map_err(|e| failed(format!("read {}", path.display()), e.to_string()))
            .and_then(|text| {
                BootId::parse(text.trim_ascii()).map_err(|e| failed("read the boot id".into(), e.to_string()))
            })?;
        let (changes, _) = broadcast::channel(CHANGES);
        let listener = if options.uevents {
            let listener = Listener::start(changes.clone());
            Some(listener.map_err(|e| failed("listen to uevents".into(), e.to_string()))?)
        } else {
            None
        };
        let scanner = Arc::new(Scanner::new(Sysfs::new(options.sys), options.dev, boot));
        let walker = Walker::new(options.proc, Arc::clone(&scanner));
        Ok(Arc::new(KernelDevices {
            scanner,
            walker,
            own_state: options.own_state,
            keep_open: options.keep_open,
            changes,
            _listener: listener,
        }))
    }

    /// The processes, by pid and command name, that the last walk for holders was not permitted to
    /// look into (a security module's doing; root sees all otherwise): a device that one of them
    /// has open looks unused. For `health`.
    pub fn blind_spots(&self) -> Vec<(i32, String)> {
        self.walker.blind()
    }

    /// How many walks over /proc were begun.
    #[cfg(test)]
    pub(super) fn walks(&self) -> u64 {
        self.walker.walks()
    }
}

impl Devices for KernelDevices {
    fn boot(&self) -> BootId {
        self.scanner.boot()
    }

    fn disks(&self) -> Result<Vec<Disk>, DevicesError> {
        self.scanner.disks()
    }

    fn disk(&self, name: &str) -> Result<Option<Disk>, DevicesError> {
        self.scanner.disk(name)
    }

    fn pin(&self, disk: &Disk) -> Result<Arc<dyn Pin>, DevicesError> {
        Ok(Arc::new(KernelPin::new(Arc::clone(&self.scanner), disk, self.keep_open)?))
    }

    fn hold(&self, disk: &Disk) -> Result<Box<dyn Hold>, DevicesError> {
        Ok(Box::new(pin::hold(&self.scanner, &self.walker, disk)?))
    }

    fn flush(&self, disk: &Disk, crash: bool) -> Result<(), DevicesError> {
        pin::flush(&self.scanner, &self.walker, disk, crash)
    }

    fn holders(&self, dev: DevNo) -> Result<Vec<Holder>, DevicesError> {
        holders::of(&*self.walker.walk()?, &self.scanner.sysfs, dev)
    }

    fn carries_host(&self, disk: &Disk) -> Result<Option<String>, DevicesError> {
        // Tells which loop devices are the loop provider's, before the walk asks.
        self.scanner.disks()?;
        holders::carries_host(&*self.walker.walk()?, &self.scanner.sysfs, disk, &self.own_state)
    }

    fn changes(&self) -> broadcast::Receiver<DeviceChange> {
        self.changes.subscribe()
    }
}
