//! The kernel's block devices: one trait over sysfs, uevents and /proc.
//!
//! Everything here but [`Pin::alive`] may block and is called from worker threads only.

mod holders;
mod identity;
mod kernel;
mod pin;
mod scan;
mod sysfs;
mod uevent;
mod walk;

#[cfg(test)]
mod tests;

pub use kernel::{KernelDevices, Options};

use std::sync::Arc;

use crate::model::{BootId, DevNo, Disk, Holder};

/// What went wrong while asking the kernel.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum DevicesError {
    /// The disk is not there any more, or is another incarnation now.
    #[error("{device} is gone or is another disk now")]
    Gone {
        /// Kernel name.
        device: String,
    },
    /// Somebody has it.
    #[error("{device} is in use")]
    InUse {
        /// Kernel name.
        device: String,
        /// Who.
        holders: Vec<Holder>,
    },
    /// Written data could not be flushed.
    #[error("{device} could not be flushed: {words}")]
    Flush {
        /// Kernel name.
        device: String,
        /// The system's words.
        words: String,
    },
    /// Anything else.
    #[error("{what}: {words}")]
    Failed {
        /// What was tried, on which path.
        what: String,
        /// The system's words.
        words: String,
    },
}

/// The name in a [`DeviceChange`] that stands for all devices: events were lost, look at each.
pub const EVERYTHING: &str = "*";

/// How the loop provider's tags begin ([`crate::model::DiskIdentity::loop_tag`]).
const OUR_TAG: &str = "volfs:";

/// A block device appeared, changed or went (from a uevent).
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct DeviceChange {
    /// Kernel name, e.g. `loop3`, or [`EVERYTHING`].
    pub name: Arc<str>,
    /// `add`, `change`, `remove`.
    pub action: Arc<str>,
}

/// Our own descriptor on an attached device (rule D4), verified by `BLKGETDISKSEQ` after opening.
pub trait Pin: Send + Sync + std::fmt::Debug {
    /// Whether the pinned disk is still there and still the same incarnation, asked of the
    /// kernel's memory now (`diskseq`). Never blocks. False after [`Pin::release`].
    fn alive(&self) -> bool;

    /// The disk under the pin as the kernel shows it now (identity re-read through our own
    /// descriptor, size, incarnation). May block.
    fn look(&self) -> Result<Disk, DevicesError>;

    /// Closes the descriptor, whoever else still has the pin's value.
    fn release(&self);
}

/// The device held exclusively, flushed, and found unused (contract, C4). Dropping it lets go.
pub trait Hold: Send + std::fmt::Debug {}

/// The kernel's block devices.
pub trait Devices: Send + Sync {
    /// Whether asking may block, so that it is done on a worker thread. A kernel in memory answers at
    /// once, and a simulated world has no thread whose pace would decide what comes first.
    fn may_block(&self) -> bool {
        true
    }

    /// Which start of the machine this is.
    fn boot(&self) -> BootId;

    /// All whole disks that could be a volume's. Each incarnation's identity is read once.
    fn disks(&self) -> Result<Vec<Disk>, DevicesError>;

    /// One disk by kernel name; `None` if there is none of that name (an unbound loop device is none).
    fn disk(&self, name: &str) -> Result<Option<Disk>, DevicesError>;

    /// Opens and verifies our own descriptor on it.
    fn pin(&self, disk: &Disk) -> Result<Arc<dyn Pin>, DevicesError>;

    /// Holds it exclusively (`O_EXCL`), flushes it, walks for users; `InUse` names them.
    /// Descriptors of this process are no users.
    fn hold(&self, disk: &Disk) -> Result<Box<dyn Hold>, DevicesError>;

    /// Flushes it, and finds nobody who may be writing to it (contract, C6): not mounted, not held by
    /// dm, md, swap or a loop device, not open for writing; `InUse` names them. With `crash` it is
    /// flushed, and who uses it is not asked. Nothing is held afterwards.
    fn flush(&self, disk: &Disk, crash: bool) -> Result<(), DevicesError>;

    /// Who has it. Concurrent callers share one walk of /proc.
    fn holders(&self, dev: DevNo) -> Result<Vec<Holder>, DevicesError>;

    /// Why this disk carries the host itself (a mounted filesystem or swap at any depth, the state
    /// directory), if it does.
    fn carries_host(&self, disk: &Disk) -> Result<Option<String>, DevicesError>;

    /// Changes from now on. A lagging receiver must look at everything again.
    fn changes(&self) -> tokio::sync::broadcast::Receiver<DeviceChange>;
}
