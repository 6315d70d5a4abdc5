//! The provider: what each call needs, and when its goal is reached.
//!
//! The truth is the volume's state, never a job's message: whatever a job or an error says, the
//! volume is looked at, and a goal that is reached is success (page, section 8). A call ends only
//! when its job is final, or when the cloud knows no such job, shows none pending, and two looks
//! [`Options::late`] apart agree.

use std::collections::HashMap;
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use async_trait::async_trait;
use parking_lot::Mutex;
use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tokio::time::Instant;

use super::super::{
    About, Call, Cloud, CloudError, CloudSnapshot, CloudVolume, Label, Marked, NewVolume, Refusal, Survey, VmFacts,
};
use super::jobs::{End, Jobs, Repeat};
use super::rows::{self, VmRow, VolumeRow};
use super::{ApiError, Client, refusal};
use crate::model::{Fence, Mark, RecordId, Slot, SnapshotId, SnapshotName, Timestamp, VmId, VolumeId};

/// Bytes of CloudStack's unit of size.
pub(super) const GIB: u64 = 1 << 30;
/// Jobs of one VM in flight at once: its queue in the cloud is never empty, and takes few of the
/// management server's threads (page 3.3).
const AT_ONCE: usize = 4;
/// Most volumes asked for by one `ids=`.
const IDS: usize = 100;
/// Between looks at a volume whose job says nothing.
pub(super) const LOOK_AGAIN: Duration = Duration::from_secs(2);
/// The first pause before a look at what a lagging copy may not show yet.
const LAG: Duration = Duration::from_millis(100);
/// The commands that only look.
const READS: &[&str] = &[
    "listAsyncJobs",
    "listDiskOfferings",
    "listSnapshots",
    "listVirtualMachines",
    "listVolumes",
    "listZones",
    "queryAsyncJobResult",
];
/// Every command whose job may be left behind by a crash.
const COMMANDS: &[&str] = &[
    "createVolume",
    "attachVolume",
    "detachVolume",
    "resizeVolume",
    "destroyVolume",
    "createTags",
    "deleteTags",
    "updateVolume",
    "createSnapshot",
    "revertSnapshot",
    "deleteSnapshot",
];

/// The commands that volfs cannot do without: the role of its keys must allow each.
pub fn commands() -> impl Iterator<Item = &'static str> {
    READS.iter().chain(COMMANDS).copied()
}

/// How the provider is set up.
#[derive(Debug, Clone)]
pub struct Options {
    /// This host's own VM id.
    pub host: VmId,
    /// Default zone, by id or name; `None`: this host's.
    pub zone: Option<String>,
    /// Default disk offering's id; `None`: the only one that takes any size.
    pub offering: Option<String>,
    /// The project that the volumes are in.
    pub project: Option<String>,
    /// Most disks that this VM takes: KVM's limit is 32 (page 2.3).
    pub most_disks: u32,
    /// How long the cloud keeps what was deleted (its `storage.cleanup.delay`).
    pub recoverable_for: Duration,
    /// Volumes that must never be claimed.
    pub protect: Vec<VolumeId>,
    /// How long an unanswered call may still take effect.
    pub late: Duration,
}

/// The provider.
pub struct CloudStack {
    pub(super) client: Client,
    pub(super) jobs: Jobs,
    pub(super) options: Options,
    about: About,
    turns: Mutex<HashMap<VmId, Arc<Semaphore>>>,
}

/// An error of the client in the three kinds, where nothing but reading was asked for, or nothing started.
pub(super) fn said(error: ApiError) -> CloudError {
    match error {
        ApiError::Api { code, cs, text } => refusal::refused(code, cs, &text),
        ApiError::Credentials { words } => CloudError::Refused { why: Refusal::Other, words },
        ApiError::NotSent { words } | ApiError::NoAnswer { words } => CloudError::Unreachable { words },
    }
}

pub(super) fn no_such(volume: VolumeId) -> CloudError {
    CloudError::Refused { why: Refusal::NoVolume, words: format!("the cloud shows no volume {volume}") }
}

pub(super) fn other(words: impl Into<String>) -> CloudError {
    CloudError::Refused { why: Refusal::Other, words: words.into() }
}

/// A refusal while the volume is in a state that passes by itself is tried again.
pub(super) fn while_passing(row: Option<&VolumeRow>, refused: CloudError) -> CloudError {
    match refused {
        CloudError::Refused { why: Refusal::Other | Refusal::Conflict, words }
            if row.is_some_and(VolumeRow::in_passing) =>
        {
            CloudError::Refused { why: Refusal::Passing, words }
        }
        other => other,
    }
}

impl CloudStack {
    /// The provider over a client. Asks the cloud nothing yet.
    pub fn new(client: Client, options: Options) -> Arc<Self> {
        let about = About {
            name: "cloudstack",
            host: options.host,
            most_disks: options.most_disks,
            can_force: true,
            snapshots: true,
            detach_wants_sole_opener: false,
            size_step: GIB,
            late: options.late,
            prove_host: true,
        };
        Arc::new(Self { jobs: Jobs::new(client.clone()), client, options, about, turns: Mutex::default() })
    }

    /// listVolumes with these filters, in the project if one is configured.
    pub(super) async fn list(&self, filters: &[(&str, &str)]) -> Result<Vec<VolumeRow>, ApiError> {
        let mut params = filters.to_vec();
        match &self.options.project {
            Some(project) => params.push(("projectid", project)),
            // Without it an administrator's keys show that account's own volumes only.
            None => params.push(("listall", "true")),
        }
        self.client.list("listVolumes", &params, "volume").await
    }

    /// One volume's row; `None` if the cloud never knew it, or has it no more.
    pub(super) async fn row(&self, volume: VolumeId) -> Result<Option<VolumeRow>, CloudError> {
        let id = volume.to_string();
        match self.list(&[("id", &id)]).await {
            Ok(rows) => Ok(rows.into_iter().find(|row| row.id == volume.0).filter(|row| !row.gone())),
            Err(ApiError::Api { code, text, .. }) if refusal::unknown_entity(code, &text) => Ok(None),
            Err(error) => Err(said(error)),
        }
    }

    /// The volume's row as soon as it is `so`; where it never is, what it was in the end. A server
    /// may answer lists from a copy that lags behind what a job has done.
    pub(super) async fn row_when(
        &self,
        volume: VolumeId,
        so: impl Fn(&VolumeRow) -> bool,
    ) -> Result<Option<VolumeRow>, CloudError> {
        let began = Instant::now();
        let mut pause = LAG;
        loop {
            let row = self.row(volume).await?;
            if row.as_ref().is_some_and(&so) || began.elapsed() >= self.options.late {
                return Ok(row);
            }
            tokio::time::sleep(pause).await;
            pause = (pause * 2).min(LOOK_AGAIN);
        }
    }

    pub(super) fn shown(&self, row: &VolumeRow) -> CloudVolume {
        row.shown(self.options.host, &self.options.protect)
    }

    /// One of the few places that a VM's jobs have at a time; first come, first served.
    pub(super) async fn turn(&self, call: &Call, vm: VmId) -> Option<OwnedSemaphorePermit> {
        let turns = self.turns.lock().entry(vm).or_insert_with(|| Arc::new(Semaphore::new(AT_ONCE))).clone();
        if let Ok(permit) = turns.clone().try_acquire_owned() {
            return Some(permit);
        }
        call.step(&format!("waits for its turn: {AT_ONCE} jobs of VM {vm} are in flight, `operations/` names them"));
        turns.acquire_owned().await.ok()
    }

    /// Runs a command about a volume. Whatever its job says, the volume's state decides: `reached`
    /// tells whether it is what the command is for.
    pub(super) async fn carry_out(
        &self,
        call: &Call,
        volume: VolumeId,
        command: &'static str,
        params: &[(&str, &str)],
        reached: impl Fn(Option<&VolumeRow>) -> bool,
    ) -> Result<(), CloudError> {
        let end = match self.jobs.run(call, command, params, Repeat::SameId).await {
            Ok(_) => return Ok(()),
            Err(end) => end,
        };
        let (refused, said) = match end {
            End::NotStarted(error) => return Err(error),
            End::Refused(error) => (Some(error), None),
            End::NoResult(words) | End::Unknown(words) => (None, Some(words)),
        };
        if let Some(words) = &said {
            tracing::warn!(%volume, command, "no outcome: {words}; the volume's state decides");
            call.step(&format!("{words}: looks whether it happened"));
        }
        let began = Instant::now();
        loop {
            match self.row(volume).await {
                Ok(row) => {
                    let pending = row.as_ref().and_then(|row| row.jobid.clone());
                    match (pending, &refused) {
                        // It may be ours, under an id that we were not told.
                        (Some(job), None) => {
                            call.step(&format!("the cloud's job {job} is pending on the volume; it may be ours"));
                        }
                        _ if reached(row.as_ref()) => return Ok(()),
                        (_, Some(error)) => return Err(while_passing(row.as_ref(), error.clone())),
                        (None, None) if began.elapsed() >= self.options.late => break,
                        (None, None) => {}
                    }
                }
                Err(error) => tracing::warn!(%volume, command, "not known yet whether it happened: {error}"),
            }
            tokio::time::sleep(LOOK_AGAIN.min(self.options.late)).await;
        }
        let words = said.unwrap_or_default();
        Err(other(format!("{words}, and nothing of it has happened in {} s", self.options.late.as_secs())))
    }

    /// Volumes by id, in as few requests as there may be; those that the cloud never knew are left out.
    async fn by_ids(&self, volumes: &[VolumeId]) -> Result<Vec<VolumeRow>, CloudError> {
        let mut found = Vec::new();
        for some in volumes.chunks(IDS) {
            let ids = some.iter().map(VolumeId::to_string).collect::<Vec<_>>().join(",");
            match self.list(&[("ids", &ids)]).await {
                Ok(rows) => found.extend(rows),
                Err(ApiError::Api { code, text, .. }) if refusal::unknown_entity(code, &text) => {
                    for volume in some {
                        found.extend(self.row(*volume).await?);
                    }
                }
                Err(error) => return Err(said(error)),
            }
        }
        Ok(found)
    }

    pub(super) async fn vm_row(&self, vm: VmId) -> Result<Option<VmRow>, CloudError> {
        let id = vm.to_string();
        let mut params = vec![("id", id.as_str()), ("details", "min")];
        match &self.options.project {
            Some(project) => params.push(("projectid", project)),
            None => params.push(("listall", "true")),
        }
        match self.client.list::<VmRow>("listVirtualMachines", &params, "virtualmachine").await {
            Ok(rows) => Ok(rows.into_iter().find(|row| row.id == vm.0)),
            Err(ApiError::Api { code, text, .. }) if refusal::unknown_entity(code, &text) => Ok(None),
            Err(error) => Err(said(error)),
        }
    }
}

#[async_trait]
impl Cloud for CloudStack {
    fn about(&self) -> &About {
        &self.about
    }

    async fn find(&self, volume: VolumeId) -> Result<Option<CloudVolume>, CloudError> {
        Ok(self.row(volume).await?.map(|row| self.shown(&row)))
    }

    async fn running(&self, fence: Fence) -> Result<Option<String>, CloudError> {
        self.jobs.running(fence, COMMANDS).await
    }

    async fn find_created(&self, fence: Fence) -> Result<Option<CloudVolume>, CloudError> {
        Ok(self.made_by(fence).await?.map(|row| self.shown(&row)))
    }

    /// One request a VM, one for the record, and one more only for what neither shows.
    async fn survey(&self, survey: &Survey) -> Result<Vec<CloudVolume>, CloudError> {
        let mut found: HashMap<VolumeId, CloudVolume> = HashMap::new();
        let take = |rows: Vec<VolumeRow>, found: &mut HashMap<VolumeId, CloudVolume>| {
            for row in rows.iter().filter(|row| !row.gone()) {
                found.insert(VolumeId(row.id), self.shown(row));
            }
        };
        for vm in &survey.vms {
            let vm = vm.to_string();
            match self.list(&[("virtualmachineid", &vm)]).await {
                Ok(rows) => take(rows, &mut found),
                // A VM that the cloud never knew has no volumes.
                Err(ApiError::Api { code, text, .. }) if refusal::unknown_entity(code, &text) => {}
                Err(error) => return Err(said(error)),
            }
        }
        if let Some(record) = survey.record {
            let record = record.to_string();
            let filter = [("tags[0].key", rows::TAG_RECORD), ("tags[0].value", record.as_str())];
            take(self.list(&filter).await.map_err(said)?, &mut found);
        }
        let rest: Vec<VolumeId> = survey.volumes.iter().filter(|id| !found.contains_key(id)).copied().collect();
        take(self.by_ids(&rest).await?, &mut found);
        for fence in &survey.fences {
            take(self.made_by(*fence).await?.into_iter().collect(), &mut found);
        }
        Ok(found.into_values().collect())
    }

    async fn marked(&self) -> Result<(Vec<Marked>, Vec<String>), CloudError> {
        let rows = self.list(&[]).await.map_err(said)?;
        let marked = |row: &VolumeRow| {
            Some(Marked {
                mark: row.mark()?,
                job: row.tag(rows::TAG_JOB).map(str::to_owned),
                disk: row.tag(rows::TAG_DISK).map(str::to_owned),
                deleted: row.gone(),
                volume: self.shown(row),
            })
        };
        Ok((rows.iter().filter_map(marked).collect(), Vec::new()))
    }

    /// A mark is taken off with all that changes beside it, and the record's own tag does not change
    /// from one of its marks to another; giving a volume up takes that one off as well.
    async fn half_exchanged(&self, volume: VolumeId, record: RecordId) -> Result<bool, CloudError> {
        let row = self.row(volume).await?.ok_or_else(|| no_such(volume))?;
        Ok(row.mark().is_none() && row.tag(rows::TAG_RECORD) == Some(&record.to_string()))
    }

    async fn create(&self, call: &Call, new: &NewVolume) -> Result<CloudVolume, CloudError> {
        self.make(call, new).await
    }

    async fn attach(&self, call: &Call, volume: VolumeId, vm: VmId, slot: Option<Slot>) -> Result<(), CloudError> {
        let _turn = self.turn(call, vm).await;
        let (id, vm_id) = (volume.to_string(), vm.to_string());
        let slot = slot.map(|slot| slot.number().to_string());
        let mut params = vec![("id", id.as_str()), ("virtualmachineid", vm_id.as_str())];
        params.extend(slot.as_deref().map(|slot| ("deviceid", slot)));
        let there = |row: Option<&VolumeRow>| row.is_some_and(|row| row.virtualmachineid == Some(vm.0));
        self.carry_out(call, volume, "attachVolume", &params, there).await
    }

    /// By volume id only: CloudStack takes the VM from the volume's row, so the caller must have
    /// seen there, directly before, that it is `vm` (page 2.4). `force` changes nothing here: the
    /// cloud asks no guest whether it uses a disk.
    async fn detach(&self, call: &Call, volume: VolumeId, vm: VmId, _force: bool) -> Result<(), CloudError> {
        let _turn = self.turn(call, vm).await;
        let id = volume.to_string();
        let away = |row: Option<&VolumeRow>| row.is_none_or(|row| row.virtualmachineid != Some(vm.0));
        self.carry_out(call, volume, "detachVolume", &[("id", &id)], away).await
    }

    async fn resize(&self, call: &Call, volume: VolumeId, size: u64) -> Result<u64, CloudError> {
        let row = self.row(volume).await?.ok_or_else(|| no_such(volume))?;
        let _turn = match row.virtualmachineid {
            Some(vm) => self.turn(call, VmId(vm)).await,
            None => None,
        };
        let (id, gib) = (volume.to_string(), size.div_ceil(GIB));
        let grown = |row: Option<&VolumeRow>| row.is_some_and(|row| row.size.is_some_and(|have| have >= size));
        let gib = gib.to_string();
        self.carry_out(call, volume, "resizeVolume", &[("id", &id), ("size", &gib)], grown).await?;
        let has = |row: &VolumeRow| row.size.is_some_and(|have| have >= size);
        let row = self.row_when(volume, has).await?.ok_or_else(|| no_such(volume))?;
        match row.size {
            Some(have) if have >= size => Ok(have),
            have => Err(CloudError::Ambiguous {
                words: format!("the cloud says resized, and shows {} bytes", have.unwrap_or(0)),
            }),
        }
    }

    async fn delete(&self, call: &Call, volume: VolumeId, expunge: bool) -> Result<Option<Timestamp>, CloudError> {
        let Some(row) = self.row(volume).await? else { return Ok(None) };
        // One that was never on storage cannot be kept, and has no data to keep (page 2.6).
        let expunge = expunge || row.state == "Allocated";
        let id = volume.to_string();
        let params = [("id", id.as_str()), ("expunge", if expunge { "true" } else { "false" })];
        self.carry_out(call, volume, "destroyVolume", &params, |row| row.is_none()).await?;
        let until = Timestamp::from(SystemTime::now()).plus(self.options.recoverable_for);
        Ok((!expunge).then_some(until))
    }

    async fn exchange_mark(
        &self,
        call: &Call,
        volume: VolumeId,
        expect: Option<Mark>,
        new: Option<&Label>,
    ) -> Result<(), CloudError> {
        self.exchange(call, volume, expect, new).await
    }

    async fn snapshot(&self, call: &Call, volume: VolumeId, name: &SnapshotName) -> Result<CloudSnapshot, CloudError> {
        self.take_snapshot(call, volume, name).await
    }

    async fn find_snapshot(&self, volume: VolumeId, fence: Fence) -> Result<Option<CloudSnapshot>, CloudError> {
        Ok(self.snapshot_by(volume, fence).await?.map(|row| row.shown()))
    }

    async fn snapshots(&self, volume: VolumeId) -> Result<Vec<CloudSnapshot>, CloudError> {
        let rows = self.snapshot_rows(volume).await?;
        Ok(rows.iter().filter(|row| row.lives()).map(rows::SnapshotRow::shown).collect())
    }

    async fn revert(&self, call: &Call, volume: VolumeId, snapshot: SnapshotId) -> Result<(), CloudError> {
        self.revert_to(call, volume, snapshot).await
    }

    async fn delete_snapshot(&self, call: &Call, volume: VolumeId, snapshot: SnapshotId) -> Result<(), CloudError> {
        self.drop_snapshot(call, volume, snapshot).await
    }

    async fn vm(&self, vm: VmId) -> Result<Option<VmFacts>, CloudError> {
        let Some(row) = self.vm_row(vm).await? else { return Ok(None) };
        let running = !matches!(row.state.as_str(), "Stopped" | "Shutdown" | "Destroyed" | "Expunging");
        if running {
            // Nothing runs without one.
            return Ok(Some(VmFacts { running, has_root: true }));
        }
        let id = vm.to_string();
        let disks = self.list(&[("virtualmachineid", &id)]).await.map_err(said)?;
        Ok(Some(VmFacts { running, has_root: disks.iter().any(|disk| disk.deviceid == Some(0)) }))
    }
}
