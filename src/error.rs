//! What a command or an open can fail with: each with its object, its way out, and its errno.
//!
//! This is the one table from failures to errnos (rows E1 to E14 of the contract). Layers below
//! the engine have errors of their own (`store::StoreError`, `cloud::CloudError`,
//! `devices::DevicesError`); the engine turns them into these.

use std::fmt;

use crate::model::{BadName, DiskName, Holder, JobId, OpId, Status, Verb, VmId, VolumeId};

/// An errno of Linux, as the kernel takes it in a FUSE reply.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Errno(pub i32);

macro_rules! errnos {
    ($($name:ident),* $(,)?) => {
        #[allow(missing_docs)]
        impl Errno {
            $(pub const $name: Errno = Errno(libc::$name);)*

            /// The symbolic name, e.g. `EBUSY`.
            pub fn name(self) -> &'static str {
                match self.0 {
                    $(libc::$name => stringify!($name),)*
                    _ => "E?",
                }
            }
        }
    };
}

errnos!(
    EPERM,
    ENOENT,
    EINTR,
    EIO,
    EAGAIN,
    EACCES,
    EBUSY,
    EEXIST,
    ENODEV,
    ENOTDIR,
    EISDIR,
    EINVAL,
    ENOSPC,
    EROFS,
    ENAMETOOLONG,
    ENOSYS,
    ENOTEMPTY,
    ENODATA,
    ENOTUNIQ,
    EOPNOTSUPP,
    ESHUTDOWN,
    ETIMEDOUT,
    EHOSTUNREACH,
    ESTALE,
    EREMOTEIO,
    EDQUOT,
    ECANCELED,
);

impl fmt::Display for Errno {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// Why something was refused or failed. `Display` is the sentence for `error` and the log.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[allow(missing_docs)]
pub enum Error {
    // E1
    #[error("{0}")]
    BadName(#[from] BadName),
    #[error("{what}; nothing was done")]
    Malformed { what: String },
    #[error("`{verb} {given}` names another object than this one, {this}: repeat the object's own name to confirm")]
    WrongName { verb: Verb, given: String, this: String },
    #[error("volume {volume} has {have} bytes and cannot shrink to {asked}")]
    WouldShrink { volume: VolumeId, have: u64, asked: u64 },
    // E2
    #[error("there is no job {job}: mkdir it first")]
    NoSuchJob { job: JobId },
    #[error("the cloud knows no volume {volume}")]
    NoSuchVolume { volume: VolumeId },
    #[error("there is no operation {id} in flight; `ls operations` shows those there are")]
    NoSuchOperation { id: OpId },
    #[error("there is no snapshot {name} here")]
    NoSuchSnapshot { name: String },
    #[error("the cloud knows no VM {vm}")]
    NoSuchVm { vm: VmId },
    // E3
    #[error("job {job} exists already")]
    JobExists { job: JobId },
    #[error("disk {disk} exists already in job {job}")]
    DiskExists { job: JobId, disk: DiskName },
    #[error("job {job} still owns {count} volume(s): destroy, release or move them first")]
    JobNotEmpty { job: JobId, count: usize },
    // E4
    #[error("{}", in_use(*volume, device, holders))]
    InUse { volume: VolumeId, device: String, holders: Vec<Holder> },
    #[error("volume {volume} is {status}; {way_out}")]
    WrongStatus { volume: VolumeId, status: Status, way_out: &'static str },
    #[error("volume {volume} is attached to VM {vm}: detach it from there first (`detach vm={vm}`)")]
    AttachedElsewhere { volume: VolumeId, vm: VmId },
    #[error("`{running}` (operation {id}) is in flight on {object}; wait for it or repeat it to join it")]
    InFlight { running: String, id: OpId, object: String },
    #[error("volume {volume} belongs to job {job}")]
    OwnedByJob { volume: VolumeId, job: JobId },
    #[error(
        "volume {volume} carries the mark of another record, {owner}: its own volfs must release it, or root takes it over with from="
    )]
    OwnedByRecord { volume: VolumeId, owner: String },
    #[error(
        "VM {vm} is running and may be writing to volume {volume}: stop the VM first, or `detach vm={vm} force` as root"
    )]
    VmRunning { volume: VolumeId, vm: VmId },
    #[error("VM {vm} {why}")]
    VmNotReady { vm: VmId, why: &'static str },
    #[error("the cloud finds volume {volume} busy for {what}: {words}")]
    CloudBusy { volume: VolumeId, what: String, words: String },
    #[error("this provider cannot pull a device from its users, so force changes nothing: volume {volume}")]
    CannotForce { volume: VolumeId },
    // E5
    #[error("volume {volume} has no verified device on this host (it is {status})")]
    NoDevice { volume: VolumeId, status: Status },
    #[error("the volume is in this directory no more: it was released, moved or deleted; use the path again")]
    Departed,
    #[error("this cannot be told now: {why}")]
    CannotTell { why: String },
    #[error("what was here was released, moved or forgotten: use the path again")]
    Stale,
    // E6
    #[error("job {job} is held: root writes 0 to its `hold` first")]
    Held { job: JobId },
    #[error("volume {volume} is marked as {found}, not as this record's {expected}: nothing was done")]
    NotOurs { volume: VolumeId, found: String, expected: String },
    #[error("volume {volume} is in conflict: {why}; nothing was done")]
    Contradiction { volume: VolumeId, why: String },
    #[error("volume {volume} carries this host ({why}) and is protected from every verb")]
    Protected { volume: VolumeId, why: String },
    #[error("{what} is for root only")]
    RootOnly { what: &'static str },
    #[error("{what}")]
    NotPermitted { what: &'static str },
    // E7
    #[error("volfs runs read-only ({why}): no command changes anything")]
    ReadOnly { why: String },
    #[error("this host is not proved to be the VM it is said to be ({why}): no command changes anything")]
    HostUnproved { why: String },
    // E8
    #[error("no end within {seconds} s; operation {id} goes on: `status` tells, and the same command joins it")]
    TimedOut { seconds: u64, id: OpId },
    #[error("the caller was interrupted; the operation goes on: `status` tells, and the same command joins it")]
    Interrupted,
    #[error("cancelled before its next step; what was done stays done, repeat the command to finish")]
    Cancelled,
    #[error("`{what}` was interrupted by a restart of volfs before it had begun: nothing was changed, repeat it")]
    LeftBehind { what: String },
    #[error("operation {id} was abandoned: the volume is unknown until it is reconciled")]
    Abandoned { id: OpId },
    // E9, E10
    #[error("the cloud refused {what}: {words}")]
    CloudRefused { what: String, words: String },
    #[error("the cloud cannot be reached for {what}: {words}")]
    CloudUnreachable { what: String, words: String },
    #[error("the cloud gave no clear answer to {what}: {words}; the status is unknown until it is reconciled")]
    CloudAmbiguous { what: String, words: String },
    #[error("volume {volume} is {status}, which is not settled: {why}; `reconcile` it once that has ended")]
    NotSettled { volume: VolumeId, status: Status, why: String },
    // E11
    #[error("no capacity for {what}: {words}")]
    NoCapacity { what: String, words: String },
    #[error("the quota does not allow {what}: {words}")]
    OverQuota { what: String, words: String },
    // E12
    #[error("the record could not take {what}: {words}; nothing was started")]
    NotJournaled { what: String, words: String },
    #[error("{what} was done, but the record could not take it: {words}; it is settled at the next reconcile")]
    NotRecorded { what: String, words: String },
    #[error("written data of volume {volume} could not be flushed: {words}; it stays attached")]
    NotFlushed { volume: VolumeId, words: String },
    #[error("{what}")]
    Internal { what: String },
    // E13
    #[error("the {provider} provider cannot do {what}")]
    Unsupported { provider: &'static str, what: String },
    // E14
    #[error(
        "two devices carry the identity of volume {volume}: {devices}; detach one of them behind volfs's back as it was attached"
    )]
    NotUnique { volume: VolumeId, devices: String },
    #[error("volfs is shutting down and takes no new commands")]
    ShuttingDown,
    /// Some of a job's volumes failed: a line each; the errno is that of the first failing disk.
    #[error("{}", lines.iter().map(|(disk, e)| format!("{disk}: {e}")).collect::<Vec<_>>().join("\n"))]
    Several { lines: Vec<(DiskName, Error)> },
}

fn in_use(volume: VolumeId, device: &str, holders: &[Holder]) -> String {
    let who: Vec<String> = holders.iter().map(Holder::to_string).collect();
    format!("{device} (volume {volume}) is in use: {}; end that use first", who.join("; "))
}

impl Error {
    /// The errno that a caller gets.
    pub fn errno(&self) -> Errno {
        use Error::*;
        match self {
            BadName(_) | Malformed { .. } | WrongName { .. } | WouldShrink { .. } => Errno::EINVAL,
            NoSuchJob { .. }
            | NoSuchVolume { .. }
            | NoSuchOperation { .. }
            | NoSuchSnapshot { .. }
            | NoSuchVm { .. } => Errno::ENOENT,
            JobExists { .. } | DiskExists { .. } => Errno::EEXIST,
            JobNotEmpty { .. } => Errno::ENOTEMPTY,
            InUse { .. }
            | WrongStatus { .. }
            | AttachedElsewhere { .. }
            | InFlight { .. }
            | OwnedByJob { .. }
            | OwnedByRecord { .. }
            | VmRunning { .. }
            | VmNotReady { .. }
            | CloudBusy { .. }
            | CannotForce { .. } => Errno::EBUSY,
            NoDevice { .. } | Departed => Errno::ENODEV,
            CannotTell { .. } => Errno::ENODATA,
            Stale => Errno::ESTALE,
            Held { .. }
            | NotOurs { .. }
            | Contradiction { .. }
            | Protected { .. }
            | RootOnly { .. }
            | NotPermitted { .. } => Errno::EPERM,
            ReadOnly { .. } | HostUnproved { .. } => Errno::EROFS,
            TimedOut { .. } => Errno::ETIMEDOUT,
            Interrupted => Errno::EINTR,
            Cancelled | LeftBehind { .. } => Errno::ECANCELED,
            CloudRefused { .. } => Errno::EREMOTEIO,
            CloudUnreachable { .. } | CloudAmbiguous { .. } | NotSettled { .. } | Abandoned { .. } => {
                Errno::EHOSTUNREACH
            }
            NoCapacity { .. } => Errno::ENOSPC,
            OverQuota { .. } => Errno::EDQUOT,
            NotJournaled { .. } | NotRecorded { .. } | NotFlushed { .. } | Internal { .. } => Errno::EIO,
            Unsupported { .. } => Errno::EOPNOTSUPP,
            NotUnique { .. } => Errno::ENOTUNIQ,
            ShuttingDown => Errno::ESHUTDOWN,
            Several { lines } => lines.first().map_or(Errno::EIO, |(_, e)| e.errno()),
        }
    }
}
