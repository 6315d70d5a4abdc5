//! What a command or an open can fail with: each with its object, its way out, and its errno.
//!
//! This is the one table from failures to errnos (rows E1 to E14 of the contract). Layers below
//! the engine have errors of their own (`store::StoreError`, `cloud::CloudError`,
//! `devices::DevicesError`); the engine turns them into these.

use std::fmt;

use crate::model::{BadName, DiskName, Holder, HolderKind, JobId, OpId, SnapshotName, Status, Verb, VmId, VolumeId};

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
    #[error("volume {volume} has no snapshot {name} {why}")]
    NoSuchSnapshot { volume: VolumeId, name: SnapshotName, why: &'static str },
    #[error("the cloud knows no VM {vm}")]
    NoSuchVm { vm: VmId },
    // E3
    #[error("job {job} exists already")]
    JobExists { job: JobId },
    #[error("disk {disk} exists already in job {job}")]
    DiskExists { job: JobId, disk: DiskName },
    #[error("job {job} still owns {count} volume(s): destroy, release or move them first")]
    JobNotEmpty { job: JobId, count: usize },
    #[error("volume {volume} has a snapshot {name} already: take another name, or `delete-snapshot {name}` first")]
    SnapshotExists { volume: VolumeId, name: SnapshotName },
    #[error("volume {volume} has snapshots of ours ({names}): `delete-snapshot` them first")]
    HasSnapshots { volume: VolumeId, names: String },
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
    #[error(
        "snapshot {name} of volume {volume} is {state} in the cloud, not complete: wait until `snapshots/{name}` says otherwise, or `delete-snapshot {name}`"
    )]
    SnapshotNotReady { volume: VolumeId, name: SnapshotName, state: String },
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
    #[error("`{what}` was interrupted by a restart of volfs: {way_out}")]
    CutShort { what: String, way_out: &'static str },
    #[error("its snapshot {name} was deleted again: a set is whole or not there")]
    SnapshotUndone { name: SnapshotName },
    #[error("its snapshot {name} is left and was not deleted again ({words}): `delete-snapshot {name}` at the job")]
    SnapshotLeft { name: SnapshotName, words: String },
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
    let way_out = holders.iter().find_map(got_there_first).unwrap_or_else(|| "end that use first".into());
    format!("{device} (volume {volume}) is in use: {}; {way_out}", who.join("; "))
}

/// What ends the use by something of this host that took the disk by itself, as LVM, MD and
/// multipath do; and what keeps it from doing so again.
fn got_there_first(holder: &Holder) -> Option<String> {
    const NEVER_AGAIN: &str = "; contrib/udev/57-volfs.rules keeps the host off such disks";
    if holder.kind != HolderKind::Holder {
        return None;
    }
    let (name, label) = holder.name.strip_suffix(')')?.split_once(" (")?;
    let command = if label == "MD array" {
        format!("mdadm --stop /dev/{name}")
    } else if let Some(volume) = label.strip_prefix("LVM volume ") {
        format!("vgchange -an {}", volume_group(volume))
    } else {
        format!("multipath -f {}", label.strip_prefix("multipath map ")?)
    };
    Some(format!("`{command}` lets it go{NEVER_AGAIN}"))
}

/// The volume group in the device mapper's name of a logical volume, where `-` in a name is doubled.
fn volume_group(name: &str) -> String {
    name.replace("--", "\u{0}").split('-').next().unwrap_or_default().replace('\u{0}', "-")
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
            JobExists { .. } | DiskExists { .. } | SnapshotExists { .. } => Errno::EEXIST,
            JobNotEmpty { .. } | HasSnapshots { .. } => Errno::ENOTEMPTY,
            InUse { .. }
            | WrongStatus { .. }
            | AttachedElsewhere { .. }
            | InFlight { .. }
            | OwnedByJob { .. }
            | OwnedByRecord { .. }
            | VmRunning { .. }
            | VmNotReady { .. }
            | CloudBusy { .. }
            | SnapshotNotReady { .. }
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
            Cancelled | LeftBehind { .. } | CutShort { .. } | SnapshotUndone { .. } | SnapshotLeft { .. } => {
                Errno::ECANCELED
            }
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_the_host_took_by_itself_is_named_with_what_lets_it_go() {
        let sentence = |name: &str| {
            let holder = Holder { kind: HolderKind::Holder, pid: None, name: name.into() };
            let volume = VolumeId::parse("3c9a6f0e-5b7d-4e1a-8f22-0a1b2c3d4e5f").unwrap();
            Error::InUse { volume, device: "/dev/vdb".into(), holders: vec![holder] }.to_string()
        };
        for (name, command) in [
            ("dm-3 (LVM volume data--vg-root--lv)", "`vgchange -an data-vg`"),
            ("md127 (MD array)", "`mdadm --stop /dev/md127`"),
            ("dm-0 (multipath map mpatha)", "`multipath -f mpatha`"),
        ] {
            let words = sentence(name);
            assert!(words.contains(name) && words.contains(command) && words.contains("57-volfs.rules"), "{words}");
        }
        assert!(sentence("dm-1 (crypt device x)").ends_with("end that use first"));
        assert!(sentence("bcache0").ends_with("end that use first"));
    }
}
