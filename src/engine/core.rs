//! The engine's state behind its one lock, and the one place from which it is published.

use std::collections::{BTreeSet, HashMap, HashSet};
use std::sync::Arc;

use serde_json::json;

use super::inflight::Live;
use super::world::{ErrorText, Job, Volume, World};
use super::{Engine, Events, Target};
use crate::command::Action;
use crate::devices::Pin;
use crate::error::Error;
use crate::failpoint;
use crate::model::{
    Caller, DiskName, DiskRow, Fence, JobId, JobRow, MapRow, OpId, SnapRow, Status, Timestamp, Verb, VolumeId,
    VolumeRow,
};

/// The state. Held for memory work only: never over an await, a commit or a callback.
pub(super) struct Core {
    /// What is published; changed here first.
    pub world: World,
    /// Operations in flight.
    pub live: HashMap<OpId, Live>,
    /// Next row ids and epoch.
    pub next: crate::store::Next,
    /// Known rows of `ossea_volumes`.
    pub volume_rows: HashMap<VolumeId, VolumeRow>,
    /// Known volumes in no job.
    pub loose: BTreeSet<VolumeId>,
    /// What is remembered of snapshots beside the world.
    pub known_snapshots: super::snapshots::Known,
    /// Volumes that a claim in flight is about.
    pub claiming: HashSet<VolumeId>,
    /// Job names that a mkdir in flight is about.
    pub making: HashSet<JobId>,
    /// When the cloud first did not show a volume.
    pub absent: HashMap<VolumeId, tokio::time::Instant>,
    /// Creates that ended without an answer and without a volume, and when: one may still come to light.
    pub twins: Vec<(Fence, Timestamp)>,
    /// What is remembered of imported volumes.
    pub imports: super::imported::Imports,
    /// The first epoch that is given by this daemon.
    pub first_epoch: u64,
    /// Epochs of its operations that ended without success: a volume may carry one all the same.
    pub spent: BTreeSet<u64>,
    /// Devices that made a volume `conflict`: it is looked at again when one of them changes.
    pub contenders: HashMap<Arc<str>, BTreeSet<DiskRow>>,
    /// Volumes that are being looked at because of an event, and whether another one came meanwhile.
    pub looking: HashMap<DiskRow, bool>,
    /// False from the beginning of a shutdown.
    pub accepting: bool,
    /// Rows of the root's history.
    pub most_history: usize,
    /// The record is being loaded: what it holds is no news.
    pub loading: bool,
    /// Pins whose mappings have ended: closed after the lock is given back, because a close can take as
    /// long as its device does.
    pub released: Vec<Arc<dyn Pin>>,
    /// The event stream is an earlier daemon's, and its readers are still there.
    pub continued: bool,
    events: Vec<(Option<JobRow>, serde_json::Value)>,
}

impl Core {
    pub fn new(world: World, next: crate::store::Next, most_history: usize) -> Self {
        Core {
            world,
            live: HashMap::new(),
            next,
            volume_rows: HashMap::new(),
            loose: BTreeSet::new(),
            known_snapshots: super::snapshots::Known::default(),
            claiming: HashSet::new(),
            making: HashSet::new(),
            absent: HashMap::new(),
            twins: Vec::new(),
            imports: super::imported::Imports::default(),
            first_epoch: next.epoch,
            spent: BTreeSet::new(),
            contenders: HashMap::new(),
            looking: HashMap::new(),
            accepting: true,
            most_history,
            loading: false,
            released: Vec::new(),
            continued: false,
            events: Vec::new(),
        }
    }

    pub fn next_op(&mut self) -> OpId {
        self.next.operation += 1;
        OpId(self.next.operation - 1)
    }

    pub fn next_job(&mut self) -> JobRow {
        self.next.job += 1;
        JobRow(self.next.job - 1)
    }

    pub fn next_disk(&mut self) -> DiskRow {
        self.next.disk += 1;
        DiskRow(self.next.disk - 1)
    }

    pub fn next_mapping(&mut self) -> MapRow {
        self.next.mapping += 1;
        MapRow(self.next.mapping - 1)
    }

    pub fn next_snapshot(&mut self) -> SnapRow {
        self.next.snapshot += 1;
        SnapRow(self.next.snapshot - 1)
    }

    pub fn next_epoch(&mut self) -> u64 {
        self.next.epoch += 1;
        self.next.epoch - 1
    }

    /// The row of a volume in `ossea_volumes`: its old one if it has ever had one.
    pub fn volume_row(&mut self, volume: VolumeId) -> VolumeRow {
        *self.volume_rows.entry(volume).or_insert_with(|| {
            self.next.volume += 1;
            VolumeRow(self.next.volume - 1)
        })
    }

    /// Notes a line for the event streams; it goes out with the next publish.
    pub fn event(&mut self, job: Option<JobRow>, fields: serde_json::Value) {
        self.events.push((job, fields));
    }

    /// The job's name, if the job is there.
    pub fn job_name(&self, row: JobRow) -> Option<JobId> {
        self.world.jobs.get(&row).map(|j| j.id.clone())
    }

    /// Puts a job, with its index and its status time.
    pub fn put_job(&mut self, mut job: Job, at: Timestamp) {
        if let Some(old) = self.world.jobs.get(&job.row) {
            if old.disks != job.disks {
                job.listed_at = job.listed_at.max(at);
                self.world.listed_at = self.world.listed_at.max(at);
            }
            if old.creating.len() != job.creating.len() || old.running != job.running {
                job.status_at = job.status_at.max(at);
            }
        } else {
            self.world.listed_at = self.world.listed_at.max(at);
        }
        self.world.job_rows.insert(job.id.clone(), job.row);
        self.world.jobs.insert(job.row, Arc::new(job));
    }

    /// Changes a job in place; nothing if it is gone.
    pub fn with_job(&mut self, row: JobRow, at: Timestamp, change: impl FnOnce(&mut Job)) {
        if let Some(job) = self.world.jobs.get(&row) {
            let mut job = (**job).clone();
            change(&mut job);
            self.put_job(job, at);
        }
    }

    /// Puts a volume: indexes, times and the event of a changed status follow by themselves.
    pub fn put_volume(&mut self, mut volume: Volume, at: Timestamp) {
        if let Some(old) = self.world.volumes.get(&volume.row).cloned() {
            if let Some(mapping) = &old.mapping {
                self.world.by_mapping.remove(&mapping.row);
                self.world.by_device.remove(&mapping.name);
            }
            let device = |v: &Volume| v.device().map(|m| m.row);
            if device(&old) != device(&volume) {
                volume.times.device = at;
                self.world.listed_at = self.world.listed_at.max(at);
            }
            if old.vm != volume.vm || old.size != volume.size || old.name != volume.name || old.owner != volume.owner {
                volume.times.facts = at;
            }
            let (was, is) = (old.status(), volume.status());
            if was != is {
                failpoint::edge(&volume.uuid, &was, &is);
                volume.times.status = at;
                self.with_job(volume.job, at, |job| job.status_at = job.status_at.max(at));
            }
            // What the first look after a start confirms is no news.
            let confirmed = old.running.is_none() && old.base == Status::Unknown && old.recorded == volume.status();
            if was != is && !confirmed {
                let job_name = self.job_name(volume.job).map(|j| j.to_string());
                let fields = json!({
                    "event": "status", "job": job_name, "disk": volume.disk.as_str(), "volume": volume.uuid,
                    "from": was.as_str(), "to": is.as_str(), "why": volume.why.as_deref(),
                    "device": volume.device().map(|m| format!("/dev/{}", m.name)),
                });
                self.event(Some(volume.job), fields);
                tracing::info!(volume = %volume.uuid, disk = %volume.disk, job = job_name, from = %was, to = %is,
                    why = volume.why.as_deref(), "status");
            }
        } else if !self.loading {
            let job_name = self.job_name(volume.job).map(|j| j.to_string());
            let fields = json!({
                "event": "owned", "job": job_name, "disk": volume.disk.as_str(), "volume": volume.uuid,
                "status": volume.status().as_str(),
            });
            self.event(Some(volume.job), fields);
        }
        self.index_snapshots(&mut volume, at);
        if let Some(mapping) = &volume.mapping {
            self.world.by_mapping.insert(mapping.row, volume.row);
            self.world.by_device.insert(mapping.name.clone(), volume.row);
        }
        self.world.by_uuid.insert(volume.uuid, volume.row);
        let (row, job, disk) = (volume.row, volume.job, volume.disk.clone());
        self.world.volumes.insert(row, Arc::new(volume));
        self.loose_forget(row);
        self.with_job(job, at, |job| {
            job.disks.insert(disk, row);
        });
    }

    fn loose_forget(&mut self, row: DiskRow) {
        if let Some(volume) = self.world.volumes.get(&row) {
            self.loose.remove(&volume.uuid);
            self.world.unclaimed.remove(&volume.uuid);
        }
    }

    /// Changes a volume in place; nothing if the ownership is gone.
    pub fn with_volume(&mut self, row: DiskRow, at: Timestamp, change: impl FnOnce(&mut Volume)) {
        if let Some(volume) = self.world.volumes.get(&row) {
            let mut volume = (**volume).clone();
            change(&mut volume);
            self.put_volume(volume, at);
        }
    }

    /// Ends an ownership.
    pub fn drop_volume(&mut self, row: DiskRow, at: Timestamp, loose: bool) -> Option<Arc<Volume>> {
        let volume = self.world.volumes.remove(&row)?;
        self.world.by_uuid.remove(&volume.uuid);
        self.drop_snapshots(&volume);
        if let Some(mapping) = &volume.mapping {
            self.world.by_mapping.remove(&mapping.row);
            self.world.by_device.remove(&mapping.name);
        }
        if loose {
            self.loose.insert(volume.uuid);
        }
        let name = self.job_name(volume.job).map(|j| j.to_string());
        self.with_job(volume.job, at, |job| {
            if job.disks.get(&volume.disk) == Some(&row) {
                job.disks.remove(&volume.disk);
            }
            job.status_at = job.status_at.max(at);
        });
        self.event(
            Some(volume.job),
            json!({"event": "disowned", "job": name, "disk": volume.disk.as_str(), "volume": volume.uuid}),
        );
        Some(volume)
    }

    /// Renames a disk within its job.
    pub fn rename_disk(&mut self, row: DiskRow, to: DiskName, at: Timestamp) {
        let Some(volume) = self.world.volumes.get(&row).cloned() else { return };
        self.with_job(volume.job, at, |job| {
            job.disks.remove(&volume.disk);
            job.disks.insert(to.clone(), row);
        });
        self.with_volume(row, at, |v| v.disk = to);
    }

    /// Writes an `error` file.
    pub fn note_error(&mut self, target: Target, verb: &str, caller: &Caller, error: &Error, at: Timestamp) {
        let text = Arc::new(ErrorText { at, verb: verb.into(), pid: caller.pid, error: error.clone() });
        *self.world.counters.refusals.entry(error.errno().name()).or_default() += 1;
        self.set_error(target, at, |slot| *slot = Some(text));
        let place = self.describe(target);
        tracing::info!(%verb, pid = caller.pid, comm = caller.comm, errno = error.errno().name(), %place, "{error}");
    }

    /// A success of the same verb empties `error`.
    pub fn clear_error(&mut self, target: Target, verb: Verb, at: Timestamp) {
        let clears = |slot: &Option<Arc<ErrorText>>| slot.as_ref().is_some_and(|e| *e.verb == *verb.as_str());
        let needed = match target {
            Target::Root => clears(&self.world.error),
            Target::Job(row) => self.world.jobs.get(&row).is_some_and(|j| clears(&j.error)),
            Target::Volume(row) => self.world.volumes.get(&row).is_some_and(|v| clears(&v.error)),
        };
        if needed {
            self.set_error(target, at, |slot| *slot = None);
        }
    }

    fn set_error(&mut self, target: Target, at: Timestamp, change: impl FnOnce(&mut Option<Arc<ErrorText>>)) {
        match target {
            Target::Root => change(&mut self.world.error),
            Target::Job(row) => self.with_job(row, at, |job| change(&mut job.error)),
            Target::Volume(row) => self.with_volume(row, at, |volume| {
                change(&mut volume.error);
                volume.times.error = at;
            }),
        }
    }

    /// The object in words, for the log.
    pub fn describe(&self, target: Target) -> String {
        match target {
            Target::Root => "volfs".into(),
            Target::Job(row) => self.job_name(row).map_or_else(|| "a job that is gone".into(), |j| format!("job {j}")),
            Target::Volume(row) => match self.world.volumes.get(&row) {
                Some(v) => format!("volume {}", v.uuid),
                None => "a volume that is gone".into(),
            },
        }
    }

    /// The job, volume and disk that an operation on this target is about.
    pub fn about(
        &self,
        target: Target,
        action: &Action,
    ) -> (Option<(JobRow, JobId)>, Option<VolumeId>, Option<DiskName>) {
        let named = |row: JobRow| self.job_name(row).map(|id| (row, id));
        match target {
            Target::Root => (None, None, None),
            Target::Job(row) => {
                let (volume, disk) = match action {
                    Action::Create { disk, .. } => (None, Some(disk.clone())),
                    Action::Claim { volume, disk, .. } => (Some(*volume), disk.clone()),
                    _ => (None, None),
                };
                (named(row), volume, disk)
            }
            Target::Volume(row) => match self.world.volumes.get(&row) {
                Some(v) => (named(v.job), Some(v.uuid), Some(v.disk.clone())),
                None => (None, None, None),
            },
        }
    }
}

impl Engine {
    /// The publish step: every change of a published value passes here, and nowhere else.
    pub(super) fn publish<R>(&self, change: impl FnOnce(&mut Core, Timestamp) -> R) -> R {
        self.publish_at((self.clock)(), change)
    }

    /// The same, dated as the commit that it shows.
    pub(super) fn publish_at<R>(&self, at: Timestamp, change: impl FnOnce(&mut Core, Timestamp) -> R) -> R {
        let (result, world, pushed, released) = {
            let mut core = self.core.lock();
            let result = change(&mut core, at);
            core.world.seq += 1;
            core.world.at = at;
            let events = std::mem::take(&mut core.events);
            let pushed = !events.is_empty();
            let world = Arc::new(core.world.clone());
            // Before its events: who has read one finds the tree no older.
            self.world.store(world.clone());
            // Pushed under the lock, so that their order is that of the changes.
            for (job, fields) in events {
                push_event(&self.events, job, at, fields);
            }
            (result, world, pushed, std::mem::take(&mut core.released))
        };
        for pin in released {
            pin.release();
        }
        let watchers = self.watchers.lock().clone();
        for watcher in watchers {
            watcher(&world);
        }
        if pushed {
            self.events.wake();
        }
        result
    }
}

fn push_event(events: &Events, job: Option<JobRow>, at: Timestamp, mut fields: serde_json::Value) {
    events.push(job, |seq| {
        if let Some(map) = fields.as_object_mut() {
            map.retain(|_, v| !v.is_null());
            map.insert("seq".into(), seq.into());
            map.insert("time".into(), at.to_string().into());
        }
        format!("{fields}\n")
    });
}
