//! The words volfs is written in: names, ids, statuses, marks, mappings. Pure data.
//!
//! Nothing here does I/O, holds a lock or reads a clock. Names are validated when they are made,
//! so a value of these types is always one that the contract allows.

use std::fmt;
use std::sync::Arc;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use serde::{Deserialize, Serialize};
use uuid::Uuid;

mod disk;
mod graph;

pub use disk::{DevNo, Disk, DiskIdentity, Holder, HolderKind, Incarnation};
pub use graph::edge_is_documented;

/// Why a text is not a name, an id or a size: the text and the rule it breaks.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{what} {text:?} is not valid: {rule}")]
pub struct BadName {
    /// What the text was meant to be, e.g. "job".
    pub what: &'static str,
    /// The text, as given.
    pub text: String,
    /// The rule, in words.
    pub rule: &'static str,
}

fn check_name(what: &'static str, text: &str, longest: usize, rule: &'static str) -> Result<Arc<str>, BadName> {
    let ok = !text.is_empty()
        && text.len() <= longest
        && !text.starts_with('.')
        && text.bytes().all(|b| b.is_ascii_alphanumeric() || matches!(b, b'.' | b'_' | b'-'));
    if ok { Ok(text.into()) } else { Err(BadName { what, text: text.into(), rule }) }
}

macro_rules! name_type {
    ($(#[$doc:meta])* $name:ident, $what:literal, $longest:literal, $rule:literal) => {
        $(#[$doc])*
        #[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
        pub struct $name(Arc<str>);

        impl $name {
            /// Checks the text against the contract's rule for this kind of name.
            pub fn parse(text: &str) -> Result<Self, BadName> {
                check_name($what, text, $longest, $rule).map(Self)
            }

            /// The name as text.
            pub fn as_str(&self) -> &str {
                &self.0
            }
        }

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str(&self.0)
            }
        }
    };
}

name_type!(
    /// The name of a job, the directory's own name: 1 to 191 of `A-Z a-z 0-9 . _ -`, not starting with a dot.
    JobId, "job", 191, "1 to 191 of A-Z a-z 0-9 . _ -, not starting with a dot"
);
name_type!(
    /// The stable name of a disk within its job: 1 to 64 of `A-Z a-z 0-9 . _ -`, not starting with a dot.
    DiskName, "disk", 64, "1 to 64 of A-Z a-z 0-9 . _ -, not starting with a dot"
);
name_type!(
    /// The name of a snapshot: as [`DiskName`].
    SnapshotName, "snapshot", 64, "1 to 64 of A-Z a-z 0-9 . _ -, not starting with a dot"
);

macro_rules! uuid_type {
    ($(#[$doc:meta])* $name:ident, $what:literal) => {
        $(#[$doc])*
        #[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
        #[serde(transparent)]
        pub struct $name(pub Uuid);

        impl $name {
            /// Reads the one form the contract knows: 36 characters, lower-case, with dashes.
            pub fn parse(text: &str) -> Result<Self, BadName> {
                let bad = || BadName { what: $what, text: text.into(), rule: "a lower-case UUID with dashes" };
                let id = Uuid::try_parse(text).map_err(|_| bad())?;
                if id.hyphenated().to_string() == text { Ok(Self(id)) } else { Err(bad()) }
            }

            /// A new random one.
            pub fn random() -> Self {
                Self(Uuid::new_v4())
            }
        }

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                self.0.hyphenated().fmt(f)
            }
        }
    };
}

uuid_type!(
    /// A volume's id in the cloud.
    VolumeId, "volume"
);
uuid_type!(
    /// A virtual machine's id in the cloud; with the loop provider this host's is made from its machine-id.
    VmId, "vm"
);
uuid_type!(
    /// A snapshot's id in the cloud.
    SnapshotId, "snapshot id"
);
uuid_type!(
    /// The random id made with a record: the first half of a [`Mark`].
    RecordId, "record"
);
uuid_type!(
    /// The random id of one operation, which the cloud sees; an [`OpId`] only orders.
    Fence, "operation"
);
uuid_type!(
    /// `/proc/sys/kernel/random/boot_id`: which start of this machine.
    BootId, "boot"
);

macro_rules! row_type {
    ($(#[$doc:meta])* $name:ident) => {
        $(#[$doc])*
        #[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
        #[serde(transparent)]
        pub struct $name(pub i64);

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                self.0.fmt(f)
            }
        }
    };
}

row_type!(
    /// Row of `jobs`; never reused.
    JobRow
);
row_type!(
    /// Row of `vm_disks`: one *ownership* of a volume by a job, new at each create, claim and move; never reused.
    DiskRow
);
row_type!(
    /// Row of `ossea_volumes`; never reused.
    VolumeRow
);
row_type!(
    /// Row of `device_mappings`: a volume and one incarnation of a disk; never reused.
    MapRow
);
row_type!(
    /// Row of `volume_snapshots`: a snapshot of ours; never reused.
    SnapRow
);
row_type!(
    /// Row of `volume_operations`, the operation's number: it orders, the [`Fence`] identifies.
    OpId
);

/// A moment: milliseconds since 1970, UTC. Durations are measured with a monotonic clock instead.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default, Serialize, Deserialize)]
#[serde(transparent)]
pub struct Timestamp(pub i64);

impl Timestamp {
    /// The time as the standard library's type, for file attributes.
    pub fn system_time(self) -> SystemTime {
        let ms = Duration::from_millis(self.0.unsigned_abs());
        if self.0 >= 0 { UNIX_EPOCH + ms } else { UNIX_EPOCH - ms }
    }

    /// The time `by` later.
    pub fn plus(self, by: Duration) -> Self {
        Self(self.0.saturating_add(i64::try_from(by.as_millis()).unwrap_or(i64::MAX)))
    }
}

impl From<SystemTime> for Timestamp {
    fn from(time: SystemTime) -> Self {
        match time.duration_since(UNIX_EPOCH) {
            Ok(after) => Self(i64::try_from(after.as_millis()).unwrap_or(i64::MAX)),
            Err(before) => Self(-i64::try_from(before.duration().as_millis()).unwrap_or(i64::MAX)),
        }
    }
}

impl fmt::Display for Timestamp {
    /// `2026-11-23T05:32:07Z`: whole seconds, UTC, by the civil calendar.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let seconds = self.0.div_euclid(1000);
        let (days, rest) = (seconds.div_euclid(86_400), seconds.rem_euclid(86_400));
        // Days since 0000-03-01 in eras of 400 years: March-based years put the leap day last.
        let z = days + 719_468;
        let era = z.div_euclid(146_097);
        let doe = z.rem_euclid(146_097);
        let yoe = (doe - doe / 1460 + doe / 36_524 - doe / 146_096) / 365;
        let doy = doe - (365 * yoe + yoe / 4 - yoe / 100);
        let mp = (5 * doy + 2) / 153;
        let day = doy - (153 * mp + 2) / 5 + 1;
        let month = if mp < 10 { mp + 3 } else { mp - 9 };
        let year = yoe + era * 400 + i64::from(month <= 2);
        write!(f, "{year:04}-{month:02}-{day:02}T{:02}:{:02}:{:02}Z", rest / 3600, rest / 60 % 60, rest % 60)
    }
}

/// A volume's status, the word in its `status` file (rows V1 to V8 of the contract).
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Status {
    /// V1: attached nowhere.
    Detached,
    /// V2: an operation is in flight.
    Creating,
    /// V2.
    Attaching,
    /// V2: `device` is withdrawn from the first moment.
    Detaching,
    /// V2: `device` stays while attached.
    Resizing,
    /// V2: `device` stays while attached.
    Snapshotting,
    /// V2.
    Reverting,
    /// V2.
    Deleting,
    /// V3: attached to this host, the device verified present.
    Attached,
    /// V4: attached to another VM.
    Remote,
    /// V5: the cloud says attached here, the kernel has no such device.
    Lost,
    /// V6: the cloud no longer knows the volume.
    Missing,
    /// V7: nobody can tell yet.
    Unknown,
    /// V8: cloud, kernel and mark contradict one another.
    Conflict,
}

impl Status {
    /// Every status, in the contract's order.
    pub const ALL: [Status; 14] = [
        Status::Detached,
        Status::Creating,
        Status::Attaching,
        Status::Detaching,
        Status::Resizing,
        Status::Snapshotting,
        Status::Reverting,
        Status::Deleting,
        Status::Attached,
        Status::Remote,
        Status::Lost,
        Status::Missing,
        Status::Unknown,
        Status::Conflict,
    ];

    /// The word.
    pub fn as_str(self) -> &'static str {
        match self {
            Status::Detached => "detached",
            Status::Creating => "creating",
            Status::Attaching => "attaching",
            Status::Detaching => "detaching",
            Status::Resizing => "resizing",
            Status::Snapshotting => "snapshotting",
            Status::Reverting => "reverting",
            Status::Deleting => "deleting",
            Status::Attached => "attached",
            Status::Remote => "remote",
            Status::Lost => "lost",
            Status::Missing => "missing",
            Status::Unknown => "unknown",
            Status::Conflict => "conflict",
        }
    }

    /// The status of that word, if there is one.
    pub fn parse(word: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|s| s.as_str() == word)
    }

    /// True for the words of V2: an operation is in flight.
    pub fn in_flight(self) -> bool {
        matches!(
            self,
            Status::Creating
                | Status::Attaching
                | Status::Detaching
                | Status::Resizing
                | Status::Snapshotting
                | Status::Reverting
                | Status::Deleting
        )
    }
}

impl fmt::Display for Status {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

/// Whose a volume is, kept outside the record (cloud tag, or the loop provider's metadata): RECORD/EPOCH.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct Mark {
    /// The record that owns the volume.
    pub record: RecordId,
    /// Rises within the record at create, claim and move, so an old owner's mark never matches. None
    /// is 0: a record has that for a volume that was imported and not marked yet.
    pub epoch: u64,
}

impl Mark {
    /// Whether a volume that carries `found` is this record's to change.
    pub fn is_on(self, found: Option<Mark>) -> bool {
        self.epoch > 0 && found == Some(self)
    }

    /// Reads `RECORD/EPOCH`.
    pub fn parse(text: &str) -> Option<Self> {
        let (record, epoch) = text.split_once('/')?;
        Some(Mark { record: RecordId::parse(record).ok()?, epoch: epoch.parse().ok()? })
    }
}

impl fmt::Display for Mark {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.record, self.epoch)
    }
}

/// Who gave a command: taken from the request that carried it, not from the open.
#[derive(Debug, Clone, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct Caller {
    /// User id.
    pub uid: u32,
    /// Group id.
    pub gid: u32,
    /// Process (thread) id in our pid namespace; 0 if it is not visible there.
    pub pid: u32,
    /// Command name; empty if it could not be read.
    pub comm: String,
}

impl Caller {
    /// Whether this is the superuser.
    pub fn is_root(&self) -> bool {
        self.uid == 0
    }

    /// volfs itself, for what reconciling records.
    pub fn daemon() -> Self {
        Caller { uid: 0, gid: 0, pid: std::process::id(), comm: "volfs".into() }
    }
}

/// What an operation does; the words are those of the commands, and of `history`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
#[allow(missing_docs)]
pub enum Verb {
    Create,
    Claim,
    Attach,
    Detach,
    Resize,
    Snapshot,
    Revert,
    DeleteSnapshot,
    Delete,
    Release,
    Move,
    Disk,
    Destroy,
    Reconcile,
    Cancel,
    Abandon,
    Mkdir,
    Rmdir,
    Set,
}

impl Verb {
    /// Every verb.
    pub const ALL: [Verb; 19] = [
        Verb::Create,
        Verb::Claim,
        Verb::Attach,
        Verb::Detach,
        Verb::Resize,
        Verb::Snapshot,
        Verb::Revert,
        Verb::DeleteSnapshot,
        Verb::Delete,
        Verb::Release,
        Verb::Move,
        Verb::Disk,
        Verb::Destroy,
        Verb::Reconcile,
        Verb::Cancel,
        Verb::Abandon,
        Verb::Mkdir,
        Verb::Rmdir,
        Verb::Set,
    ];

    /// The word.
    pub fn as_str(self) -> &'static str {
        match self {
            Verb::Create => "create",
            Verb::Claim => "claim",
            Verb::Attach => "attach",
            Verb::Detach => "detach",
            Verb::Resize => "resize",
            Verb::Snapshot => "snapshot",
            Verb::Revert => "revert",
            Verb::DeleteSnapshot => "delete-snapshot",
            Verb::Delete => "delete",
            Verb::Release => "release",
            Verb::Move => "move",
            Verb::Disk => "disk",
            Verb::Destroy => "destroy",
            Verb::Reconcile => "reconcile",
            Verb::Cancel => "cancel",
            Verb::Abandon => "abandon",
            Verb::Mkdir => "mkdir",
            Verb::Rmdir => "rmdir",
            Verb::Set => "set",
        }
    }

    /// The verb of that word, if there is one.
    pub fn parse(word: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|v| v.as_str() == word)
    }

    /// The status a volume shows while this verb runs on it; `None` where the status stays.
    pub fn status_in_flight(self) -> Option<Status> {
        match self {
            Verb::Create => Some(Status::Creating),
            Verb::Attach => Some(Status::Attaching),
            Verb::Detach => Some(Status::Detaching),
            Verb::Resize => Some(Status::Resizing),
            Verb::Snapshot => Some(Status::Snapshotting),
            Verb::Revert => Some(Status::Reverting),
            Verb::Delete | Verb::Destroy => Some(Status::Deleting),
            _ => None,
        }
    }

    /// Deadline of a wait when the command names none (contract, Commands); `None`: until a signal.
    pub fn default_timeout(self) -> Option<Duration> {
        match self {
            Verb::Snapshot | Verb::Revert | Verb::DeleteSnapshot | Verb::Destroy => None,
            Verb::Resize | Verb::Delete => Some(Duration::from_secs(3600)),
            _ => Some(Duration::from_secs(300)),
        }
    }
}

impl fmt::Display for Verb {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

/// How an operation ended, as `history` says it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Outcome {
    /// Done and proved.
    Done,
    /// It failed, and changed nothing or was undone.
    Failed,
    /// It failed without a clear answer; the volume is `unknown` until reconciled.
    Ambiguous,
    /// Cancelled before its next step.
    Cancelled,
    /// A crash came before the effect, and volfs does not begin what takes away (rule R10).
    Interrupted,
    /// Ended in the record by `abandon`.
    Abandoned,
}

impl Outcome {
    /// Every outcome.
    pub const ALL: [Outcome; 6] = [
        Outcome::Done,
        Outcome::Failed,
        Outcome::Ambiguous,
        Outcome::Cancelled,
        Outcome::Interrupted,
        Outcome::Abandoned,
    ];

    /// The word.
    pub fn as_str(self) -> &'static str {
        match self {
            Outcome::Done => "done",
            Outcome::Failed => "failed",
            Outcome::Ambiguous => "ambiguous",
            Outcome::Cancelled => "cancelled",
            Outcome::Interrupted => "interrupted",
            Outcome::Abandoned => "abandoned",
        }
    }

    /// The outcome of that word, if there is one.
    pub fn parse(word: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|o| o.as_str() == word)
    }
}

/// `device_id` on attaching: where in the VM's order of disks.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub enum Slot {
    /// Device id 0, the disk the VM boots from.
    Root,
    /// A number above 0 and not 3 (which the hypervisor keeps for a CD).
    Id(u32),
}

impl Slot {
    /// The cloud's number for it.
    pub fn number(self) -> u32 {
        match self {
            Slot::Root => 0,
            Slot::Id(n) => n,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_job_name_is_what_the_contract_says_and_nothing_else() {
        for good in ["a", "pgtest2", "job-20250821-103724", "A.b_c-9", &"x".repeat(191)] {
            assert!(JobId::parse(good).is_ok(), "{good}");
        }
        for bad in ["", ".", "..", ".x", "a/b", "a b", "a\nb", "ä", &"x".repeat(192)] {
            assert!(JobId::parse(bad).is_err(), "{bad:?}");
        }
    }

    #[test]
    fn a_uuid_has_one_spelling() {
        assert!(VolumeId::parse("2aff4799-1111-4222-8333-444455556666").is_ok());
        for bad in [
            "2AFF4799-1111-4222-8333-444455556666",
            "2aff4799111142228333444455556666",
            "{2aff4799-1111-4222-8333-444455556666}",
            "",
        ] {
            assert!(VolumeId::parse(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn a_serial_names_its_volume_and_no_neighbour() {
        let v = VolumeId::parse("2aff4799-1111-4222-8333-444455556666").unwrap();
        let w = VolumeId::parse("2aff4799-1111-4222-8333-544455556666").unwrap();
        assert!(DiskIdentity::VirtioSerial("2aff4799111142228333".into()).names(v));
        assert!(!DiskIdentity::VirtioSerial("2aff479911114222833".into()).names(v));
        assert!(!DiskIdentity::VirtioSerial(String::new()).names(v));
        assert!(DiskIdentity::LoopTag(DiskIdentity::loop_tag(v)).names(v));
        assert!(!DiskIdentity::LoopTag(DiskIdentity::loop_tag(w)).names(v));
        assert!(DiskIdentity::loop_tag(v).len() < 64);
        assert!(!DiskIdentity::None.names(v));
        let (first, last) = DiskIdentity::VirtioSerial("2aff4799111142228333".into()).first_and_last().unwrap();
        assert!(first <= v && v <= last);
        assert_eq!(DiskIdentity::VirtioSerial("2aff".into()).first_and_last(), None);
    }

    #[test]
    fn a_timestamp_prints_as_utc() {
        assert_eq!(Timestamp(0).to_string(), "1970-01-01T00:00:00Z");
        assert_eq!(Timestamp(1_709_210_096_000).to_string(), "2024-02-29T12:34:56Z");
        assert_eq!(Timestamp(1_795_411_927_000).to_string(), "2026-11-23T05:32:07Z");
    }
}
