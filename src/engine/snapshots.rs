//! Snapshots of a volume (C6): taken, gone back to, deleted, and what a crash has left of that.
//!
//! A snapshot is ours exactly if the record has its id: no verb touches another. Its row comes and
//! goes with the end of the operation, in one batch. These verbs have no deadline of their own, so
//! what the cloud refuses for now is tried until it lets it in, or `cancel` comes.

use std::collections::HashMap;
use std::sync::Arc;

use tokio::time::Instant;

use super::Engine;
use super::admission::Verdict;
use super::calls::{PASSING_FIRST, PASSING_LONGEST};
use super::core::Core;
use super::inflight::Live;
use super::operation::{Acted, Done, Fail, LOOK_AGAIN, cloud_fail, pending};
use super::world::{Snapshot, Snapshots, Volume};
use crate::cloud::{CloudError, CloudSnapshot, CloudVolume, Refusal};
use crate::command::Action;
use crate::devices::DevicesError;
use crate::error::Error;
use crate::failpoint;
use crate::model::{DiskRow, SnapRow, SnapshotId, SnapshotName, Status, Timestamp, VmId, VolumeId};
use crate::store::{Change, SnapshotLoaded};

mod look;
mod set;

/// What is remembered of snapshots beside the world.
#[derive(Debug, Default)]
pub(super) struct Known {
    /// Ours of volumes in no job: a volume that was dropped as missing may come back.
    kept: HashMap<VolumeId, Snapshots>,
    /// When the cloud first did not show one of ours.
    absent: HashMap<SnapRow, Instant>,
    /// In which round a volume's were last asked for.
    asked: HashMap<DiskRow, u64>,
}

impl Known {
    /// Takes what the record has; each volume that is put finds its own.
    pub fn keep(&mut self, loaded: &[SnapshotLoaded]) {
        let mut all: HashMap<VolumeId, Vec<Snapshot>> = HashMap::new();
        for one in loaded {
            all.entry(one.volume).or_default().push(Snapshot {
                name: one.name.clone(),
                id: one.snapshot,
                row: Some(one.row),
                state: "".into(),
                size: one.size,
                created: Some(one.created),
                at: one.created,
            });
        }
        self.kept.extend(all.into_iter().map(|(volume, all)| (volume, Snapshots::new(all))));
    }
}

impl Core {
    /// Keeps the indexes and the time of a volume's snapshots, before it is put.
    pub(super) fn index_snapshots(&mut self, volume: &mut Volume, at: Timestamp) {
        let old = self.world.volumes.get(&volume.row).cloned();
        match &old {
            Some(old) if old.snapshots.same(&volume.snapshots) => return,
            Some(old) => self.unindex(&old.snapshots),
            None => {
                let kept = self.known_snapshots.kept.remove(&volume.uuid);
                if let Some(kept) = kept.filter(|_| volume.snapshots.is_empty()) {
                    volume.snapshots = kept;
                }
            }
        }
        if old.is_some() || !volume.snapshots.is_empty() {
            volume.times.snapshots = at;
        }
        for snapshot in volume.snapshots.iter() {
            match snapshot.row {
                Some(row) => drop(self.world.snapshots.insert(row, volume.row)),
                None => drop(self.world.foreign_snapshots.insert(snapshot.id, volume.row)),
            }
        }
    }

    fn unindex(&mut self, snapshots: &Snapshots) {
        for snapshot in snapshots.iter() {
            match snapshot.row {
                Some(row) => drop(self.world.snapshots.remove(&row)),
                None => drop(self.world.foreign_snapshots.remove(&snapshot.id)),
            }
        }
    }

    /// A volume leaves its job: its snapshots are known for when it is in one again.
    pub(super) fn drop_snapshots(&mut self, volume: &Volume) {
        self.unindex(&volume.snapshots);
        self.known_snapshots.asked.remove(&volume.row);
        for (row, _) in volume.snapshots.ours() {
            self.known_snapshots.absent.remove(&row);
        }
        let ours = Snapshots::new(volume.snapshots.ours().map(|(_, s)| s.clone()));
        if !ours.is_empty() {
            self.known_snapshots.kept.insert(volume.uuid, ours);
        }
    }
}

/// Words for what the names in a volume's way are.
const NOT_OURS: &str = "that volfs took";

fn no_such(volume: &Volume, name: &SnapshotName) -> Error {
    Error::NoSuchSnapshot { volume: volume.uuid, name: name.clone(), why: NOT_OURS }
}

/// The names of a volume's snapshots of ours, for a sentence; `None` if it has none.
pub(super) fn names_of_ours(volume: &Volume) -> Option<String> {
    let names: Vec<&str> = volume.snapshots.ours().map(|(_, s)| s.name.as_str()).collect();
    (!names.is_empty()).then(|| names.join(", "))
}

/// What the names say to a command that the status allows: rows C6, C7 and C8. A volume that the
/// cloud knows no more is dropped with its snapshots: nothing can be done to them through it.
pub(super) fn by_name(volume: &Volume, action: &Action) -> Verdict {
    match action {
        Action::Snapshot { name, .. } if volume.snapshots.our(name).is_some() => {
            Verdict::Deny(Error::SnapshotExists { volume: volume.uuid, name: name.clone() })
        }
        Action::Revert { name } | Action::DeleteSnapshot { name } if volume.snapshots.our(name).is_none() => {
            Verdict::Deny(no_such(volume, name))
        }
        Action::Delete { .. } | Action::Release { .. } => match has_snapshots(volume) {
            Some(error) => Verdict::Deny(error),
            None => Verdict::Start,
        },
        _ => Verdict::Start,
    }
}

/// Why a volume's ownership does not end, if it has snapshots of ours.
pub(super) fn has_snapshots(volume: &Volume) -> Option<Error> {
    let names = names_of_ours(volume).filter(|_| volume.base != Status::Missing)?;
    Some(Error::HasSnapshots { volume: volume.uuid, names })
}

/// The cloud must have it where the command was let in for.
fn in_place(volume: &Volume, seen: &CloudVolume, host: VmId) -> Result<(), Fail> {
    let expected = (volume.base == Status::Attached).then_some(host);
    match (expected, seen.attached.map(|a| a.vm)) {
        (expected, found) if expected == found => Ok(()),
        (_, Some(vm)) => Err(Fail::clean(Error::AttachedElsewhere { volume: volume.uuid, vm })),
        (_, None) => {
            let way_out = "the cloud says that it is not attached here: `reconcile` it";
            Err(Fail::clean(Error::WrongStatus { volume: volume.uuid, status: volume.base, way_out }))
        }
    }
}

/// After an unclear answer of which two looks have shown that nothing came.
fn nothing_came(fail: Fail) -> Fail {
    match fail.error {
        Error::CloudAmbiguous { what, words } => {
            let words = format!("{words}; looked twice, and nothing came of it");
            Fail::clean(Error::CloudUnreachable { what, words })
        }
        error => Fail::clean(error),
    }
}

impl Engine {
    /// Written data reaches the disk, and nobody may be writing (or, with `crash`, whoever is).
    async fn flush(&self, live: &Live, row: DiskRow, crash: bool) -> Result<(), Fail> {
        let volume = self.owned(row)?;
        let Some(mapping) = volume.mapping.clone().filter(|_| volume.base == Status::Attached) else { return Ok(()) };
        self.step(live, "flush, and look for writers")?;
        let device = format!("/dev/{}", mapping.name);
        let flushed = self.kernel(move |devices| devices.flush(&mapping.pin.look()?, crash)).await;
        flushed.map_err(|error| {
            Fail::clean(match error {
                DevicesError::InUse { holders, .. } => Error::InUse { volume: volume.uuid, device, holders },
                DevicesError::Flush { words, .. } => Error::NotFlushed { volume: volume.uuid, words },
                other => Error::CannotTell { why: other.to_string() },
            })
        })
    }

    /// Tries until the cloud lets it in. Each attempt looks before it calls.
    async fn let_in<T, F>(&self, live: &Live, what: &str, volume: VolumeId, attempt: impl Fn() -> F) -> Result<T, Fail>
    where
        F: Future<Output = Result<Result<T, CloudError>, Fail>>,
    {
        let mut pause = PASSING_FIRST;
        loop {
            match attempt().await? {
                Err(CloudError::Refused { why: Refusal::Passing, words }) => {
                    tracing::info!(what, "the cloud refuses for now: {words}");
                    self.step(live, &format!("the cloud refuses for now: {words}"))?;
                    tokio::time::sleep(pause).await;
                    pause = (pause * 2).min(PASSING_LONGEST);
                }
                answer => return answer.map_err(|e| cloud_fail(what, Some(volume), None, self.about.name, e)),
            }
        }
    }

    /// After an unclear answer: looks until something shows, or until no job of ours runs in the
    /// cloud and two looks far enough apart show nothing.
    async fn after_all<T, F>(&self, live: &Live, look: impl Fn() -> F) -> Result<Option<T>, Fail>
    where
        F: Future<Output = Result<Option<T>, CloudError>>,
    {
        let mut none_since = None;
        let mut pause = LOOK_AGAIN;
        loop {
            let words = match self.cloud.running(live.fence).await {
                Ok(Some(job)) => {
                    none_since = None;
                    format!("no clear answer: the cloud still runs {job}")
                }
                Ok(None) => match look().await {
                    Ok(Some(found)) => return Ok(Some(found)),
                    Ok(None) => {
                        let first = *none_since.get_or_insert_with(Instant::now);
                        if first.elapsed() >= self.about.late {
                            return Ok(None);
                        }
                        "no clear answer: nothing came of it yet".into()
                    }
                    Err(error) => format!("no clear answer, and the cloud does not tell: {error}"),
                },
                Err(error) => format!("no clear answer, and the cloud does not tell: {error}"),
            };
            self.step(live, &words).map_err(|f| Fail::ambiguous(f.error))?;
            tokio::time::sleep(pause).await;
            pause = (pause * 2).min(PASSING_LONGEST);
        }
    }

    /// C6, `snapshot`.
    pub(super) async fn snapshot(
        self: &Arc<Self>,
        live: &Live,
        row: DiskRow,
        name: &SnapshotName,
        crash: bool,
    ) -> Acted {
        let volume = self.owned(row)?;
        let what = format!("snapshot {name} of volume {}", volume.uuid);
        let call = self.call(live);
        let taking = self.let_in(live, &what, volume.uuid, || async {
            self.flush(live, row, crash).await?;
            self.step(live, "look at the volume in the cloud")?;
            let seen = self.look_ours(&volume, &what).await?;
            if let Some(refusal) = pending(&seen) {
                return Ok(Err(refusal));
            }
            in_place(&volume, &seen, self.host)?;
            self.step(live, "the cloud takes the snapshot")?;
            failpoint::reach("snapshot.before-call").await;
            Ok(self.cloud.snapshot(&call, volume.uuid, name).await)
        });
        let made = match taking.await {
            Err(fail) if fail.ambiguous => {
                match self.after_all(live, || self.cloud.find_snapshot(volume.uuid, live.fence)).await? {
                    Some(made) => made,
                    None => return Err(nothing_came(fail)),
                }
            }
            answer => answer?,
        };
        failpoint::reach("snapshot.after-call").await;
        self.taken(&volume, name, made).await
    }

    /// The record's part of a snapshot that this operation has taken, now or before a crash. One
    /// that is not complete is ours as well, so that it can be deleted, and the operation has failed.
    async fn taken(&self, volume: &Volume, name: &SnapshotName, made: CloudSnapshot) -> Acted {
        let at = (self.clock)();
        let snapshot = Snapshot {
            name: name.clone(),
            id: made.id,
            row: Some(self.core.lock().next_snapshot()),
            state: made.state.as_str().into(),
            size: if made.size == 0 { volume.size } else { made.size },
            created: Some(made.created.unwrap_or(at)),
            at,
        };
        let add = Change::SnapshotAdd {
            row: snapshot.row.unwrap_or(SnapRow(0)),
            volume: volume.uuid,
            snapshot: snapshot.id,
            name: name.clone(),
            size: snapshot.size,
            created: snapshot.created.unwrap_or(at),
        };
        let row = volume.row;
        let apply = move |core: &mut Core, at| core.with_volume(row, at, |v| v.snapshots = look::with(v, snapshot));
        if made.ready {
            return Ok(Done {
                changes: vec![add],
                note: made.id.to_string(),
                apply: Some(Box::new(apply)),
                ..Done::default()
            });
        }
        match self.store.commit(vec![add]).await {
            Ok(()) => self.publish(apply),
            Err(error) => {
                let what = format!("snapshot {} of volume {}", made.id, volume.uuid);
                return Err(Fail::clean(Error::NotRecorded { what, words: error.to_string() }));
            }
        }
        Err(Fail::clean(Error::SnapshotNotReady { volume: volume.uuid, name: name.clone(), state: made.state }))
    }

    /// The snapshot to go back to, if it is ours, in the cloud, and complete.
    async fn revertible(&self, volume: &Volume, name: &SnapshotName, what: &str) -> Result<SnapshotId, Fail> {
        let Some((_, snapshot)) = volume.snapshots.our(name) else { return Err(Fail::clean(no_such(volume, name))) };
        let id = snapshot.id;
        // Looking changes nothing, however it fails.
        let listed =
            self.cloud.snapshots(volume.uuid).await.map_err(|error| {
                Fail::clean(cloud_fail(what, Some(volume.uuid), None, self.about.name, error).error)
            })?;
        match listed.into_iter().find(|s| s.id == id) {
            Some(seen) if seen.ready => Ok(id),
            Some(seen) => {
                let (volume, name) = (volume.uuid, name.clone());
                Err(Fail::clean(Error::SnapshotNotReady { volume, name, state: seen.state }))
            }
            None => {
                let why = "any more: the cloud does not know it";
                Err(Fail::clean(Error::NoSuchSnapshot { volume: volume.uuid, name: name.clone(), why }))
            }
        }
    }

    /// C6, `revert`: puts a detached volume's bytes back.
    pub(super) async fn revert(self: &Arc<Self>, live: &Live, row: DiskRow, name: &SnapshotName) -> Acted {
        let volume = self.owned(row)?;
        let what = format!("revert of volume {} to {name}", volume.uuid);
        let call = self.call(live);
        let reverting = self.let_in(live, &what, volume.uuid, || async {
            self.step(live, "look at the snapshot in the cloud")?;
            let id = self.revertible(&volume, name, &what).await?;
            let here = self.candidates(volume.uuid).await;
            let here = here.map_err(|e| Fail::clean(Error::CannotTell { why: e.to_string() }))?;
            if let Some(disk) = here.first() {
                let why = format!("/dev/{} carries its identity, but the cloud says it is free", disk.name);
                return Err(Fail::clean(Error::Contradiction { volume: volume.uuid, why }));
            }
            let seen = self.look_ours(&volume, &what).await?;
            if let Some(refusal) = pending(&seen) {
                return Ok(Err(refusal));
            }
            in_place(&volume, &seen, self.host)?;
            self.step(live, "the cloud puts the bytes back")?;
            failpoint::reach("revert.before-call").await;
            Ok(self.cloud.revert(&call, volume.uuid, id).await)
        });
        let answer = reverting.await;
        failpoint::reach("revert.after-call").await;
        match answer {
            // Its size may be that of the snapshot again.
            Ok(()) => Ok(Done { note: name.to_string(), look: Some(row), ..Done::default() }),
            Err(fail) if fail.ambiguous => {
                // No look tells which bytes it has; but it is nobody's before the cloud is done with it.
                self.after_all(live, || async { Ok(None::<()>) }).await?;
                Err(fail)
            }
            Err(fail) => Err(fail),
        }
    }

    /// C6, `delete-snapshot`.
    pub(super) async fn delete_snapshot(self: &Arc<Self>, live: &Live, row: DiskRow, name: &SnapshotName) -> Acted {
        let volume = self.owned(row)?;
        let Some((gone, snapshot)) = volume.snapshots.our(name) else {
            return Err(Fail::clean(no_such(&volume, name)));
        };
        let what = format!("delete-snapshot {name} of volume {}", volume.uuid);
        let call = self.call(live);
        let deleting = self.let_in(live, &what, volume.uuid, || async {
            self.step(live, "look at the volume in the cloud")?;
            let seen = self.look_ours(&volume, &what).await?;
            if let Some(refusal) = pending(&seen) {
                return Ok(Err(refusal));
            }
            self.step(live, "the cloud deletes the snapshot")?;
            failpoint::reach("delete-snapshot.before-call").await;
            Ok(self.cloud.delete_snapshot(&call, volume.uuid, snapshot.id).await)
        });
        match deleting.await {
            Err(fail) if fail.ambiguous => {
                if self.after_all(live, || self.lacks(volume.uuid, snapshot.id)).await?.is_none() {
                    return Err(nothing_came(fail));
                }
            }
            answer => answer?,
        }
        failpoint::reach("delete-snapshot.after-call").await;
        Ok(self.forgotten(row, gone))
    }

    /// Something if the cloud has that snapshot no more.
    async fn lacks(&self, volume: VolumeId, snapshot: SnapshotId) -> Result<Option<()>, CloudError> {
        let listed = self.cloud.snapshots(volume).await?;
        let gone = listed.iter().all(|s| s.id != snapshot);
        Ok((gone && self.sees_us().await).then_some(()))
    }

    /// The record's end of a snapshot that the cloud has no more.
    fn forgotten(&self, row: DiskRow, gone: SnapRow) -> Done {
        Done {
            changes: vec![Change::SnapshotGone { row: gone, at: (self.clock)() }],
            apply: Some(Box::new(move |core, at| core.forget_snapshot(row, gone, at))),
            ..Done::default()
        }
    }

    /// Settles what a crash left of these verbs (rule R10): nothing is begun again.
    /// `None`: it had not begun, or nobody can tell whether it was done.
    pub(super) async fn left_of_snapshot(self: &Arc<Self>, live: &Live, volume: &Volume) -> Result<Option<Done>, Fail> {
        match &live.action {
            Action::Snapshot { name, .. } => {
                match self.after_all(live, || self.cloud.find_snapshot(volume.uuid, live.fence)).await? {
                    Some(made) => self.taken(volume, name, made).await.map(Some),
                    None => Ok(None),
                }
            }
            Action::Revert { .. } => self.after_all(live, || async { Ok(None) }).await,
            Action::DeleteSnapshot { name } => match volume.snapshots.our(name) {
                Some((gone, snapshot)) => {
                    let seen = self.after_all(live, || self.lacks(volume.uuid, snapshot.id)).await?;
                    Ok(seen.map(|()| self.forgotten(volume.row, gone)))
                }
                None => Ok(None),
            },
            _ => Ok(None),
        }
    }
}
