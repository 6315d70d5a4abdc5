//! The published snapshot: what every read is answered from. Immutable, shared by structure, and
//! replaced as a whole at each change by [`super::Engine`]'s one publish step.

use std::collections::BTreeMap;
use std::sync::Arc;

use imbl::{OrdMap, Vector};

use crate::cloud::CloudVolume;
use crate::devices::Pin;
use crate::error::Error;
use crate::model::{
    BootId, Caller, DevNo, DiskIdentity, DiskName, DiskRow, Fence, Incarnation, JobId, JobRow, MapRow, OpId, Outcome,
    RecordId, SnapRow, SnapshotId, SnapshotName, Status, Timestamp, Verb, VmId, VolumeId,
};

/// Everything volfs knows, at one moment.
#[derive(Debug, Clone)]
pub struct World {
    /// Rises by one at each publish.
    pub seq: u64,
    /// When it was published.
    pub at: Timestamp,
    /// The record's id.
    pub record: RecordId,
    /// This host's VM id.
    pub host: VmId,
    /// Which boot.
    pub boot: BootId,
    /// When the daemon started.
    pub started: Timestamp,
    /// Why every changing command is refused with EROFS, if it is.
    pub read_only: Option<Arc<str>>,
    /// Provider's name, and the most disks this host takes.
    pub provider: &'static str,
    /// The most disks this host takes.
    pub most_disks: u32,
    /// Jobs by row.
    pub jobs: OrdMap<JobRow, Arc<Job>>,
    /// Jobs by name.
    pub job_rows: OrdMap<JobId, JobRow>,
    /// Owned volumes by ownership row.
    pub volumes: OrdMap<DiskRow, Arc<Volume>>,
    /// Owned volumes by uuid.
    pub by_uuid: OrdMap<VolumeId, DiskRow>,
    /// Owned volumes with a device here, by mapping row.
    pub by_mapping: OrdMap<MapRow, DiskRow>,
    /// Owned volumes with a device here, by kernel name of the device.
    pub by_device: OrdMap<Arc<str>, DiskRow>,
    /// The volume of each snapshot of ours, by its row.
    pub snapshots: OrdMap<SnapRow, DiskRow>,
    /// The volume of each snapshot of an owned volume that is not ours.
    pub foreign_snapshots: OrdMap<SnapshotId, DiskRow>,
    /// Operations in flight, and recent ones.
    pub operations: OrdMap<OpId, Arc<Operation>>,
    /// Volumes in no job that concern this host.
    pub unclaimed: OrdMap<VolumeId, Arc<Unclaimed>>,
    /// VMs that a command named.
    pub vms: OrdMap<VmId, Arc<VmView>>,
    /// What was done, oldest first, bounded.
    pub history: Vector<Arc<HistoryRow>>,
    /// The root's `error`.
    pub error: Option<Arc<ErrorText>>,
    /// When any of a directory's own entries last changed (root, jobs/, volumes/, …).
    pub listed_at: Timestamp,
    /// Components' states.
    pub health: Health,
    /// Counters for `metrics`.
    pub counters: Counters,
}

impl World {
    /// The owned volumes that an identity names: none or one, or several that share a cut serial.
    pub fn named_by<'a>(&'a self, identity: &'a DiskIdentity) -> impl Iterator<Item = &'a Arc<Volume>> {
        let range = identity.first_and_last().map(|(first, last)| self.by_uuid.range(first..=last));
        range
            .into_iter()
            .flatten()
            .filter(|(uuid, _)| identity.names(**uuid))
            .filter_map(|(_, row)| self.volumes.get(row))
    }
}

/// A job.
#[derive(Debug, Clone)]
pub struct Job {
    /// Its row, part of node ids.
    pub row: JobRow,
    /// Its name.
    pub id: JobId,
    /// When it was made.
    pub created: Timestamp,
    /// `vm_name` and when it was last changed.
    pub vm_name: (Arc<str>, Timestamp),
    /// `hold` and when it was last changed.
    pub hold: (bool, Timestamp),
    /// Its volumes by disk name.
    pub disks: OrdMap<DiskName, DiskRow>,
    /// Creates and claims in flight by disk name: they have no volume row yet.
    pub creating: OrdMap<DiskName, OpId>,
    /// A job-level operation in flight (`destroy` reserves the job).
    pub running: Option<OpId>,
    /// `error`.
    pub error: Option<Arc<ErrorText>>,
    /// What was done in it, oldest first, bounded.
    pub history: Vector<Arc<HistoryRow>>,
    /// When `status` last changed, and when its directories' entries did.
    pub status_at: Timestamp,
    /// When a disk was last added, renamed or removed.
    pub listed_at: Timestamp,
}

/// An owned volume.
#[derive(Debug, Clone)]
pub struct Volume {
    /// The ownership's row, part of node ids.
    pub row: DiskRow,
    /// The cloud's id.
    pub uuid: VolumeId,
    /// Whose.
    pub job: JobRow,
    /// By what name.
    pub disk: DiskName,
    /// The epoch of our mark on it; 0: it was imported, and no mark of ours is on it yet.
    pub epoch: u64,
    /// The settled status: what admission decides by.
    pub base: Status,
    /// The settled status as the record has it: `base` is `unknown` from a start to the first look.
    pub recorded: Status,
    /// The operation in flight, and the status it shows.
    pub running: Option<Running>,
    /// The device here. Present while `base` is attached, and kept while the device is withdrawn
    /// by a detach; ask [`Volume::device`] for what may be shown.
    pub mapping: Option<Arc<Mapping>>,
    /// The VM it is attached to, this host's own included.
    pub vm: Option<VmId>,
    /// Its place in that VM's order.
    pub device_id: Option<u32>,
    /// The cloud's name.
    pub name: Arc<str>,
    /// The cloud's size in bytes.
    pub size: u64,
    /// The device's serial or tag, once seen.
    pub serial: Arc<str>,
    /// The cloud's word.
    pub cloud_state: Arc<str>,
    /// The mark found on it, as text; empty if none or never seen.
    pub owner: Arc<str>,
    /// Its snapshots, as last seen.
    pub snapshots: Snapshots,
    /// Why the status is lost, missing, unknown or conflict.
    pub why: Option<Arc<str>>,
    /// `error`.
    pub error: Option<Arc<ErrorText>>,
    /// What was done to it, oldest first, bounded.
    pub history: Arc<Vec<Arc<HistoryRow>>>,
    /// When the ownership began, the status, the device, and the facts last changed.
    pub times: Times,
}

/// An operation in flight on a volume.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Running {
    /// Which.
    pub op: OpId,
    /// Its verb.
    pub verb: Verb,
    /// The device is withdrawn (detach from this host).
    pub withdrawn: bool,
}

/// Modification times of a volume's files.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
#[allow(missing_docs)]
pub struct Times {
    pub owned: Timestamp,
    pub status: Timestamp,
    pub device: Timestamp,
    pub facts: Timestamp,
    pub error: Timestamp,
    pub history: Timestamp,
    pub snapshots: Timestamp,
}

/// A volume's snapshot.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Snapshot {
    /// Its name in `snapshots/`: for one of ours that of the record, for another the cloud's, or its
    /// id where that is no name or is taken.
    pub name: SnapshotName,
    /// The cloud's id.
    pub id: SnapshotId,
    /// Its row if it is ours: exactly then the record has its id.
    pub row: Option<SnapRow>,
    /// The cloud's word; empty until the cloud was asked.
    pub state: Arc<str>,
    /// Bytes of the volume when it was taken; 0 if the cloud does not tell.
    pub size: u64,
    /// When it was taken, if that is known.
    pub created: Option<Timestamp>,
    /// When anything of this last changed.
    pub at: Timestamp,
}

/// A volume's snapshots by name. Most volumes have none, which costs a word; clones are shared.
#[derive(Debug, Clone, Default)]
pub struct Snapshots(Option<Arc<BTreeMap<SnapshotName, Snapshot>>>);

impl Snapshots {
    /// Of these, the first of each name.
    pub fn new(all: impl IntoIterator<Item = Snapshot>) -> Self {
        let mut map = BTreeMap::new();
        for snapshot in all {
            map.entry(snapshot.name.clone()).or_insert(snapshot);
        }
        Snapshots((!map.is_empty()).then(|| Arc::new(map)))
    }

    /// All, by name.
    pub fn iter(&self) -> impl Iterator<Item = &Snapshot> {
        self.0.iter().flat_map(|map| map.values())
    }

    /// Those that volfs took, by name.
    pub fn ours(&self) -> impl Iterator<Item = (SnapRow, &Snapshot)> {
        self.iter().filter_map(|s| Some((s.row?, s)))
    }

    /// The one of that name.
    pub fn get(&self, name: &SnapshotName) -> Option<&Snapshot> {
        self.0.as_ref()?.get(name)
    }

    /// The one of that name, if volfs took it.
    pub fn our(&self, name: &SnapshotName) -> Option<(SnapRow, &Snapshot)> {
        self.get(name).and_then(|s| Some((s.row?, s)))
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.0.is_none()
    }

    /// Whether these are the very same, unchanged.
    pub fn same(&self, other: &Self) -> bool {
        match (&self.0, &other.0) {
            (None, None) => true,
            (Some(a), Some(b)) => Arc::ptr_eq(a, b),
            _ => false,
        }
    }
}

impl Volume {
    /// The word for `status`.
    pub fn status(&self) -> Status {
        self.running.and_then(|r| r.verb.status_in_flight()).unwrap_or(self.base)
    }

    /// The mapping that may be served as a device, before the kernel is asked.
    pub fn device(&self) -> Option<&Arc<Mapping>> {
        let withdrawn = self.running.is_some_and(|r| r.withdrawn);
        if self.base == Status::Attached && !withdrawn { self.mapping.as_ref() } else { None }
    }
}

/// A volume and one incarnation of a disk on this host.
#[derive(Debug, Clone)]
pub struct Mapping {
    /// Row of the record, part of node ids.
    pub row: MapRow,
    /// Kernel name; the node is `/dev/NAME`.
    pub name: Arc<str>,
    /// Number.
    pub dev: DevNo,
    /// Which insertion.
    pub incarnation: Incarnation,
    /// Bytes when verified.
    pub size: u64,
    /// Our own descriptor on it.
    pub pin: Arc<dyn Pin>,
    /// When it was made.
    pub at: Timestamp,
}

/// A volume in no job.
#[derive(Debug, Clone)]
pub struct Unclaimed {
    /// What the cloud says.
    pub cloud: Arc<CloudVolume>,
    /// The device here, if one carries its identity.
    pub device: Option<Arc<str>>,
    /// Its serial, if there is a device.
    pub serial: Arc<str>,
    /// Why it is listed, in words.
    pub reason: Arc<str>,
    /// Since when.
    pub since: Timestamp,
}

/// What the cloud says is attached to a VM.
#[derive(Debug, Clone, Default)]
pub struct VmView {
    /// Its volumes.
    pub volumes: Vec<VolumeId>,
    /// When the cloud said so; `None`: never yet.
    pub seen: Option<Timestamp>,
    /// The view is older than three intervals: listing answers EHOSTUNREACH.
    pub stale: bool,
}

/// An operation as `operations/ID` shows it.
#[derive(Debug, Clone)]
pub struct Operation {
    /// Its number.
    pub id: OpId,
    /// Its identity.
    pub fence: Fence,
    /// What it does.
    pub verb: Verb,
    /// Canonical spelling.
    pub command: Arc<str>,
    /// In which job.
    pub job: Option<(JobRow, JobId)>,
    /// On which volume, once known.
    pub volume: Option<VolumeId>,
    /// On which disk.
    pub disk: Option<DiskName>,
    /// Part of which job-level operation.
    pub parent: Option<OpId>,
    /// The step it is at, in words: what it waits for.
    pub step: Arc<str>,
    /// Who asked.
    pub caller: Arc<Caller>,
    /// When it began.
    pub began: Timestamp,
    /// How many callers wait for it.
    pub joined: u32,
    /// Outcome, sentence, time.
    pub ended: Option<(Outcome, Arc<str>, Timestamp)>,
}

/// A row of `history`.
#[derive(Debug, Clone)]
pub struct HistoryRow {
    /// When it ended.
    pub at: Timestamp,
    /// Its number.
    pub op: OpId,
    /// What was done.
    pub verb: Verb,
    /// In which job, by the name of that time.
    pub job: Option<JobId>,
    /// On which disk.
    pub disk: Option<DiskName>,
    /// On which volume.
    pub volume: Option<VolumeId>,
    /// How it ended.
    pub outcome: Outcome,
    /// Its sentence; empty when done.
    pub sentence: Arc<str>,
    /// Milliseconds it took.
    pub took_ms: u64,
    /// Who asked.
    pub caller: Arc<Caller>,
}

/// The text of an `error` file.
#[derive(Debug, Clone)]
pub struct ErrorText {
    /// When.
    pub at: Timestamp,
    /// The verb's word, as the user gave it; a success of the same verb clears the text.
    pub verb: Arc<str>,
    /// The caller.
    pub pid: u32,
    /// The failure.
    pub error: Error,
}

/// Line 1 of `health` is the worst of these.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Health {
    /// The provider.
    pub cloud: Component,
    /// The record.
    pub store: Component,
    /// sysfs and uevents.
    pub devices: Component,
    /// The interval's work.
    pub reconciler: Component,
    /// Whoever starts the next daemon when this one dies.
    pub keeper: Component,
    /// When any of them last changed.
    pub at: Timestamp,
}

/// One component's state.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Component {
    /// As it should be.
    Ok,
    /// Works in part.
    Degraded(Arc<str>),
    /// Does not work.
    Down(Arc<str>),
}

/// Counts since the daemon started.
#[derive(Debug, Clone, Default)]
pub struct Counters {
    /// Ended operations by verb and outcome.
    pub operations: OrdMap<(Verb, &'static str), u64>,
    /// Commands that admission refused or that did not parse, by errno name.
    pub refusals: OrdMap<&'static str, u64>,
    /// `detach force` given.
    pub forced: u64,
    /// `abandon` given.
    pub abandoned: u64,
    /// Attached or detached behind our back.
    pub drift: u64,
    /// Reconcile rounds.
    pub reconciles: u64,
}
