//! A block device as the kernel shows it: its number, its incarnation, its identity, and who has it.

use std::fmt;
use std::sync::Arc;

use uuid::Uuid;

use super::{BootId, VolumeId};

/// Which insertion of a disk: names and dev_t are reused, this never is within a boot (rule D2).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Incarnation {
    /// Which start of the machine.
    pub boot: BootId,
    /// `/sys/block/NAME/diskseq`; on kernels before 5.15, which have none, made from serial and dev_t.
    pub diskseq: u64,
}

impl fmt::Display for Incarnation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} {}", self.boot, self.diskseq)
    }
}

/// A block device's number.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct DevNo {
    /// Major number.
    pub major: u32,
    /// Minor number.
    pub minor: u32,
}

impl fmt::Display for DevNo {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}:{}", self.major, self.minor)
    }
}

/// What the hypervisor (or the loop provider) gave a disk to be known by (rule D1).
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub enum DiskIdentity {
    /// The 64-byte name that the loop provider stores at `LOOP_CONFIGURE`.
    LoopTag(String),
    /// A virtio-blk serial: the first 20 bytes of what the hypervisor was given.
    VirtioSerial(String),
    /// A SCSI or NVMe serial number, or a WWID.
    Serial(String),
    /// Nothing to go by: such a disk is never a volume's.
    None,
}

impl DiskIdentity {
    /// The loop provider's tag for a volume; fits the 63 usable bytes of `lo_file_name`.
    pub fn loop_tag(volume: VolumeId) -> String {
        format!("volfs:{volume}")
    }

    /// Whether this identity names that volume. Exact: no prefixes but those a transport cuts itself.
    pub fn names(&self, volume: VolumeId) -> bool {
        let hex = volume.0.simple().to_string();
        match self {
            DiskIdentity::LoopTag(tag) => *tag == Self::loop_tag(volume),
            DiskIdentity::VirtioSerial(serial) => *serial == hex[..20],
            DiskIdentity::Serial(serial) => {
                let plain: String = serial.chars().filter(|c| *c != '-').collect::<String>().to_ascii_lowercase();
                plain == hex || plain == hex[..20]
            }
            DiskIdentity::None => false,
        }
    }

    /// The lowest and the highest id that it could name, to look up by before [`DiskIdentity::names`] decides.
    pub fn first_and_last(&self) -> Option<(VolumeId, VolumeId)> {
        let text = match self {
            DiskIdentity::LoopTag(tag) => tag.strip_prefix("volfs:")?,
            DiskIdentity::VirtioSerial(serial) | DiskIdentity::Serial(serial) => serial,
            DiskIdentity::None => return None,
        };
        let hex: String = text.chars().filter(|c| *c != '-').take(20).collect::<String>().to_ascii_lowercase();
        if hex.len() != 20 {
            return None;
        }
        let id = |fill: char| Uuid::try_parse(&format!("{hex}{}", fill.to_string().repeat(12))).ok().map(VolumeId);
        Some((id('0')?, id('f')?))
    }

    /// The text shown in a volume's `serial` file; empty when there is none.
    pub fn text(&self) -> &str {
        match self {
            DiskIdentity::LoopTag(s) | DiskIdentity::VirtioSerial(s) | DiskIdentity::Serial(s) => s,
            DiskIdentity::None => "",
        }
    }
}

/// A block device as the kernel shows it now.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Disk {
    /// Kernel name, e.g. `loop3` or `vdb`; the node is `/dev/NAME`.
    pub name: Arc<str>,
    /// Its number now.
    pub dev: DevNo,
    /// Which insertion.
    pub incarnation: Incarnation,
    /// Bytes.
    pub size: u64,
    /// What it is known by.
    pub identity: DiskIdentity,
}

/// Who has a device, one row of `holders`.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub struct Holder {
    /// `mount`, `swap`, `holder` (dm, md, …), `loop`, `open` or `exclusive`.
    pub kind: HolderKind,
    /// The process, where there is one.
    pub pid: Option<i32>,
    /// Command name, mount point, or the holding device.
    pub name: String,
}

/// The ways a device is held.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum HolderKind {
    /// A filesystem on it is mounted, in some mount namespace.
    Mount,
    /// It is swap.
    Swap,
    /// Another block device (dm, md, bcache …) is built on it.
    Holder,
    /// A loop device has it as its backing file.
    Loop,
    /// A process has it open.
    Open,
    /// Somebody the kernel does not name holds it.
    Unnamed,
}

impl HolderKind {
    /// The word in `holders`.
    pub fn as_str(self) -> &'static str {
        match self {
            HolderKind::Mount => "mount",
            HolderKind::Swap => "swap",
            HolderKind::Holder => "holder",
            HolderKind::Loop => "loop",
            HolderKind::Open => "open",
            HolderKind::Unnamed => "unnamed",
        }
    }
}

impl fmt::Display for Holder {
    /// As it stands in a sentence: `dd (pid 4711)`, `mounted at /mnt`, `dm-3`.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match (self.kind, self.pid) {
            (HolderKind::Mount, Some(pid)) => write!(f, "it is mounted at {} (seen by pid {pid})", self.name),
            (HolderKind::Mount, None) => write!(f, "it is mounted at {}", self.name),
            (HolderKind::Swap, _) => write!(f, "it is swap ({})", self.name),
            (HolderKind::Holder, _) => write!(f, "it is held by {}", self.name),
            (HolderKind::Loop, _) => write!(f, "it is the backing file of {}", self.name),
            (HolderKind::Open, Some(pid)) => write!(f, "{} (pid {pid}) has it open", self.name),
            (HolderKind::Open, None) => write!(f, "{} has it open", self.name),
            (HolderKind::Unnamed, _) => f.write_str("somebody the kernel does not name has it"),
        }
    }
}
