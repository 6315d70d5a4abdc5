//! The record: one trait over SQLite, which is record and journal at once.
//!
//! A [`Store`] takes batches of [`Change`]s; a batch is durable as a whole or not at all, and
//! [`Store::commit`] resolves only after it is. Row ids are chosen by the engine (they are never
//! reused, see [`Loaded::next`]), so that a batch needs no answer but success.

use async_trait::async_trait;

use crate::model::{
    BootId, Caller, DevNo, DiskName, DiskRow, Fence, Incarnation, JobId, JobRow, MapRow, OpId, Outcome, RecordId,
    SnapRow, SnapshotId, SnapshotName, Status, Timestamp, Verb, VmId, VolumeId, VolumeRow,
};

mod sqlite;

pub use sqlite::{KEEP_OPERATIONS, Offline, Past, Restored, SqliteStore, backup, restore};

/// Why the record did not take a batch, or could not be opened.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum StoreError {
    /// The disk below the record is full.
    #[error("the disk is full: {words}")]
    Full {
        /// SQLite's words.
        words: String,
    },
    /// A constraint of the schema refused the batch: a defect of ours, or a hand in the database.
    #[error("the schema refused it: {words}")]
    Constraint {
        /// SQLite's words.
        words: String,
    },
    /// Another daemon has the state directory.
    #[error("{path} is in use by {holder}")]
    Locked {
        /// The lock file.
        path: String,
        /// Who holds it, e.g. "pid 4711 (volfs)".
        holder: String,
    },
    /// The file is not a record of ours, is damaged, or is newer than this volfs.
    #[error("{path}: {words}; nothing in it was changed")]
    Unusable {
        /// The database file or directory.
        path: String,
        /// What is wrong and what to do.
        words: String,
    },
    /// Anything else that SQLite or the system reported.
    #[error("{words}")]
    Failed {
        /// Its words.
        words: String,
    },
}

/// One change of the record. Times are the engine's clock.
#[derive(Debug, Clone, PartialEq)]
#[allow(missing_docs)]
pub enum Change {
    /// A new job; or a forgotten one as it was, when row and name are its own.
    JobAdd { row: JobRow, id: JobId, at: Timestamp },
    /// A job that owns nothing is marked forgotten; its name is free again.
    JobForget { row: JobRow, at: Timestamp },
    /// `vm_name`.
    JobVmName { row: JobRow, vm_name: String, at: Timestamp },
    /// `hold`.
    JobHold { row: JobRow, hold: bool, at: Timestamp },
    /// A volume becomes known, or known again after it was marked gone (same uuid keeps its row).
    VolumeAdd { row: VolumeRow, volume: VolumeId, name: String, size: u64, at: Timestamp },
    /// What the cloud says of a known volume.
    VolumeFacts {
        volume: VolumeId,
        name: String,
        size: u64,
        serial: String,
        cloud_state: String,
        device_id: Option<u32>,
    },
    /// The settled status as last recorded.
    VolumeStatus { volume: VolumeId, status: Status, at: Timestamp },
    /// Deleted: marked so with its time, never dropped.
    VolumeGone { volume: VolumeId, at: Timestamp },
    /// A job takes ownership; with epoch 0 of an imported volume, which carries no mark of ours yet.
    DiskAdd { row: DiskRow, job: JobRow, disk: DiskName, volume: VolumeId, epoch: u64, at: Timestamp },
    /// An imported volume's ownership, until then of epoch 0, gets the epoch of the mark that is on it now.
    DiskMarked { row: DiskRow, epoch: u64 },
    /// The disk's name changes.
    DiskRename { row: DiskRow, disk: DiskName, at: Timestamp },
    /// The ownership ends; the row goes.
    DiskEnd { row: DiskRow },
    /// Where the volume is now; replaces the volume's mapping if it has one.
    MappingSet(MappingRow),
    /// The volume is nowhere (that we know of).
    MappingEnd { volume: VolumeId },
    /// A snapshot of a known volume is ours. `size` in bytes; `created` is the cloud's time of it
    /// where it tells one, and is not that of the commit.
    SnapshotAdd {
        row: SnapRow,
        volume: VolumeId,
        snapshot: SnapshotId,
        name: SnapshotName,
        size: u64,
        created: Timestamp,
    },
    /// A snapshot of ours is in the cloud no more: marked so with its time, never dropped.
    SnapshotGone { row: SnapRow, at: Timestamp },
    /// The journal: an operation begins. Durable before any effect.
    OpBegin(Box<OpRow>),
    /// What the operation has reached; `detail` is the engine's own text for recovery.
    OpStep { id: OpId, step: String, detail: String },
    /// It ended.
    OpEnd { id: OpId, outcome: Outcome, sentence: String, at: Timestamp },
    /// An operation learns its volume (create, claim): afterwards history finds it by uuid.
    OpVolume { id: OpId, volume: VolumeId },
}

impl Change {
    /// Dates the change: what is recorded and what is shown of one commit have one time.
    pub fn date(&mut self, now: Timestamp) {
        match self {
            Change::JobAdd { at, .. }
            | Change::JobForget { at, .. }
            | Change::JobVmName { at, .. }
            | Change::JobHold { at, .. }
            | Change::VolumeAdd { at, .. }
            | Change::VolumeStatus { at, .. }
            | Change::VolumeGone { at, .. }
            | Change::DiskAdd { at, .. }
            | Change::DiskRename { at, .. }
            | Change::MappingSet(MappingRow { at, .. })
            | Change::SnapshotGone { at, .. }
            | Change::OpEnd { at, .. } => *at = now,
            Change::VolumeFacts { .. }
            | Change::DiskEnd { .. }
            | Change::DiskMarked { .. }
            | Change::MappingEnd { .. }
            | Change::SnapshotAdd { .. }
            | Change::OpBegin(_)
            | Change::OpStep { .. }
            | Change::OpVolume { .. } => {}
        }
    }
}

/// A row of `device_mappings`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct MappingRow {
    /// New at each incarnation.
    pub row: MapRow,
    /// Whose.
    pub volume: VolumeId,
    /// The VM it is attached to; this host's own id for a device here.
    pub vm: VmId,
    /// The device here; `None` while attached to another VM, or lost.
    pub device: Option<MappedDevice>,
    /// When the mapping was made.
    pub at: Timestamp,
}

/// The device half of a mapping: present only on this host.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct MappedDevice {
    /// Kernel name, e.g. `loop3`.
    pub name: String,
    /// Number.
    pub dev: DevNo,
    /// Boot and diskseq.
    pub incarnation: Incarnation,
    /// Bytes when it was verified.
    pub size: u64,
}

/// A row of `volume_operations`.
#[derive(Debug, Clone, PartialEq)]
pub struct OpRow {
    /// Its number.
    pub id: OpId,
    /// Its identity.
    pub fence: Fence,
    /// What it does.
    pub verb: Verb,
    /// The command in canonical spelling.
    pub command: String,
    /// The job it belongs to, where it belongs to one.
    pub job: Option<JobRow>,
    /// The volume, where it is known already.
    pub volume: Option<VolumeId>,
    /// The disk's name at that time, for history.
    pub disk: Option<DiskName>,
    /// Job-level operation that this one is a part of.
    pub parent: Option<OpId>,
    /// The engine's own text for recovery (JSON): arguments fixed at the start, e.g. the new epoch.
    pub detail: String,
    /// The step reached.
    pub step: String,
    /// Who asked.
    pub caller: Caller,
    /// This host.
    pub host: VmId,
    /// This boot.
    pub boot: BootId,
    /// When it began.
    pub began: Timestamp,
    /// How and when it ended, with the sentence for `history` and `error`.
    pub ended: Option<(Outcome, String, Timestamp)>,
}

impl OpRow {
    /// The epoch that it was given for a mark; 0 where it has none.
    pub fn epoch(&self) -> u64 {
        let detail: serde_json::Value = serde_json::from_str(&self.detail).unwrap_or_default();
        detail["epoch"].as_u64().unwrap_or(0)
    }
}

/// A job as loaded.
#[derive(Debug, Clone, PartialEq)]
#[allow(missing_docs)]
pub struct JobLoaded {
    pub row: JobRow,
    pub id: JobId,
    pub vm_name: String,
    pub hold: bool,
    pub created: Timestamp,
    /// Last change of `vm_name`, and of `hold`.
    pub vm_name_at: Timestamp,
    pub hold_at: Timestamp,
}

/// A volume in a job as loaded.
#[derive(Debug, Clone, PartialEq)]
#[allow(missing_docs)]
pub struct DiskLoaded {
    pub row: DiskRow,
    pub job: JobRow,
    pub disk: DiskName,
    /// That of the mark; 0 for an imported volume that carries none yet.
    pub epoch: u64,
    /// When this ownership began, or the disk was renamed.
    pub at: Timestamp,
    pub volume: VolumeId,
    pub name: String,
    pub size: u64,
    pub serial: String,
    pub cloud_state: String,
    pub device_id: Option<u32>,
    pub status: Status,
    pub status_at: Timestamp,
    pub mapping: Option<MappingRow>,
}

/// A live snapshot of ours as loaded, whether or not its volume is in a job.
#[derive(Debug, Clone, PartialEq)]
#[allow(missing_docs)]
pub struct SnapshotLoaded {
    pub row: SnapRow,
    pub volume: VolumeId,
    pub snapshot: SnapshotId,
    pub name: SnapshotName,
    pub size: u64,
    pub created: Timestamp,
}

/// The lowest row ids that were never used.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[allow(missing_docs)]
pub struct Next {
    pub job: i64,
    pub volume: i64,
    pub disk: i64,
    pub mapping: i64,
    pub operation: i64,
    pub snapshot: i64,
    /// The lowest epoch that was never used for a mark.
    pub epoch: u64,
}

/// Everything the engine starts from.
#[derive(Debug, Clone, PartialEq)]
pub struct Loaded {
    /// The record's own id.
    pub record: RecordId,
    /// Jobs that are not forgotten.
    pub jobs: Vec<JobLoaded>,
    /// Volumes that are in a job.
    pub disks: Vec<DiskLoaded>,
    /// Snapshots of ours that are there.
    pub snapshots: Vec<SnapshotLoaded>,
    /// Known volumes in no job and not gone: released ones.
    pub loose: Vec<VolumeId>,
    /// Every uuid that has a row in `ossea_volumes`, for reuse of its row.
    pub volume_rows: Vec<(VolumeId, VolumeRow)>,
    /// Operations that have not ended, oldest first.
    pub unfinished: Vec<OpRow>,
    /// Ended ones with names as they were, oldest first, at most as many as asked for.
    pub history: Vec<(OpRow, Option<JobId>)>,
    /// Next row ids.
    pub next: Next,
}

/// The record.
#[async_trait]
pub trait Store: Send + Sync {
    /// Makes the batch durable as a whole, in order, or changes nothing. Batches of concurrent
    /// callers share a transaction's fsync.
    async fn commit(&self, batch: Vec<Change>) -> Result<(), StoreError>;

    /// Reads everything; called once, before the first commit. Blocking.
    fn load(&self, history: usize) -> Result<Loaded, StoreError>;
}

/// The version of the SQLite that is built in; the error says why it is too old: before 3.51.3 a
/// committed transaction could be lost in WAL mode.
pub fn sqlite_version() -> Result<&'static str, String> {
    const OLDEST: i32 = 3_051_003;
    match rusqlite::version_number() {
        new if new >= OLDEST => Ok(rusqlite::version()),
        _ => Err(format!("{} can lose a committed transaction; at least 3.51.3 is needed", rusqlite::version())),
    }
}
