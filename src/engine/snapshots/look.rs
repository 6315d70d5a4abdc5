//! What the cloud says of snapshots: asked by `reconcile`, after our own operations on them, and
//! else seldom, one volume a round, so that an idle host asks for next to nothing.

use std::collections::BTreeSet;
use std::sync::Arc;

use serde_json::json;
use tokio::time::Instant;

use super::super::Engine;
use super::super::Target;
use super::super::core::Core;
use super::super::inflight::Live;
use super::super::operation::cloud_fail;
use super::super::world::{Snapshot, Snapshots, Volume};
use crate::cloud::CloudSnapshot;
use crate::error::Error;
use crate::model::{DiskRow, SnapRow, SnapshotName, Status, Timestamp, Verb};
use crate::store::Change;

/// A volume's snapshots are asked for at most every so many rounds.
const ROUNDS: u64 = 10;

/// How many volumes `reconcile` asks for side by side.
const SIDE_BY_SIDE: usize = 4;

/// A volume's snapshots with another one of ours; a foreign one of that name goes by its id.
pub(super) fn with(volume: &Volume, new: Snapshot) -> Snapshots {
    let foreign = volume.snapshots.iter().filter(|s| s.row.is_none() && s.id != new.id).cloned();
    let ours = volume.snapshots.ours().map(|(_, s)| s.clone()).chain([new.clone()]);
    named(ours.collect(), foreign.collect())
}

/// Ours have their names, foreign ones what is free: the cloud's name, or their id.
fn named(ours: Vec<Snapshot>, foreign: Vec<Snapshot>) -> Snapshots {
    let mut taken: BTreeSet<SnapshotName> = ours.iter().map(|s| s.name.clone()).collect();
    let mut all = ours;
    for mut snapshot in foreign {
        let id = SnapshotName::parse(&snapshot.id.to_string()).ok();
        let free = [Some(snapshot.name.clone()), id].into_iter().flatten().find(|name| !taken.contains(name));
        match free {
            Some(name) => {
                taken.insert(name.clone());
                snapshot.name = name;
                all.push(snapshot);
            }
            // Ours has the other's very id for its name.
            None => tracing::warn!(snapshot = %snapshot.id, "not listed: both its name and its id are taken"),
        }
    }
    Snapshots::new(all)
}

/// What the cloud shows, as a foreign one.
fn foreign(seen: &CloudSnapshot, old: &Volume, at: Timestamp) -> Option<Snapshot> {
    let id = seen.id.to_string();
    // A name that reads as an id would be taken for another snapshot's.
    let named = SnapshotName::parse(&seen.name).ok().filter(|n| crate::model::SnapshotId::parse(n.as_str()).is_err());
    let name = named.or_else(|| SnapshotName::parse(&id).ok())?;
    let mut shown = Snapshot {
        name,
        id: seen.id,
        row: None,
        state: seen.state.as_str().into(),
        size: seen.size,
        created: seen.created,
        at,
    };
    if let Some(old) = old.snapshots.iter().find(|s| s.id == seen.id && s.row.is_none()) {
        let same = old.state == shown.state && old.size == shown.size && old.created == shown.created;
        if same {
            shown.at = old.at;
        }
    }
    Some(shown)
}

impl Core {
    /// A snapshot of ours is there no more.
    pub(super) fn forget_snapshot(&mut self, row: DiskRow, gone: SnapRow, at: Timestamp) {
        self.known_snapshots.absent.remove(&gone);
        self.with_volume(row, at, |v| {
            v.snapshots = Snapshots::new(v.snapshots.iter().filter(|s| s.row != Some(gone)).cloned());
        });
    }
}

impl Engine {
    /// Asks the cloud for a volume's snapshots and shows them. False if it does not show one of ours,
    /// which a later look decides (as row V6 does of volumes).
    pub(in super::super) async fn look_at_snapshots(&self, row: DiskRow) -> Result<bool, Error> {
        let asked_for = |v: &Volume| {
            v.running.is_none() && matches!(v.base, Status::Detached | Status::Attached | Status::Remote | Status::Lost)
        };
        let before = self.world().volumes.get(&row).filter(|v| asked_for(v)).cloned();
        let Some(before) = before.filter(|_| self.about.snapshots) else { return Ok(true) };
        let looked = Instant::now();
        let what = format!("listing the snapshots of volume {}", before.uuid);
        let listed = self.cloud.snapshots(before.uuid).await;
        let listed = listed.map_err(|e| cloud_fail(&what, Some(before.uuid), None, self.about.name, e).error)?;
        let there: BTreeSet<_> = listed.iter().map(|s| s.id).collect();
        let any_absent = before.snapshots.ours().any(|(_, s)| !there.contains(&s.id));
        // Credentials that do not see us see no snapshot either.
        let believed = !any_absent || self.sees_us().await;
        let mut gone = Vec::new();
        let mut doubt = false;
        {
            let mut core = self.core.lock();
            for (row, snapshot) in before.snapshots.ours() {
                if there.contains(&snapshot.id) {
                    core.known_snapshots.absent.remove(&row);
                } else if believed {
                    let first = *core.known_snapshots.absent.entry(row).or_insert(looked);
                    match first != looked && looked.saturating_duration_since(first) >= self.absence_gap() {
                        true => gone.push((row, snapshot.name.clone(), snapshot.id)),
                        false => doubt = true,
                    }
                } else {
                    doubt = true;
                }
            }
        }
        let at = (self.clock)();
        if !gone.is_empty() && self.truth.refusing().is_none() {
            let changes = gone.iter().map(|(row, _, _)| Change::SnapshotGone { row: *row, at }).collect();
            if let Err(error) = self.store.commit(changes).await {
                let error = Error::NotRecorded { what: "the end of a snapshot".into(), words: error.to_string() };
                self.store_health(Some(&error));
                return Err(error);
            }
        }
        self.publish_at(at, |core, at| core.show_snapshots(&before, &listed, &gone, at));
        Ok(!doubt)
    }

    /// As [`Engine::look_at_snapshots`], and again after the gap where one look is not believed.
    pub(in super::super) async fn settle_snapshots(&self, rows: &[DiskRow]) -> Result<(), Error> {
        let mut again = Vec::new();
        let mut outcome = Ok(());
        for chunk in rows.chunks(SIDE_BY_SIDE) {
            let looks = chunk.iter().map(|row| async move { (*row, self.look_at_snapshots(*row).await) });
            for (row, found) in futures_util::future::join_all(looks).await {
                match found {
                    Ok(true) => {}
                    Ok(false) => again.push(row),
                    Err(error) => outcome = outcome.and(Err(error)),
                }
            }
        }
        if !again.is_empty() {
            tokio::time::sleep(self.absence_gap()).await;
            for row in again {
                let found = self.look_at_snapshots(row).await;
                outcome = outcome.and(found.map(drop));
            }
        }
        outcome
    }

    /// After an operation on snapshots: what the cloud shows now, without keeping anybody waiting.
    pub(in super::super) fn after_snapshots(self: &Arc<Self>, live: &Live) {
        let Target::Volume(row) = live.target else { return };
        if !matches!(live.action.verb(), Verb::Snapshot | Verb::Revert | Verb::DeleteSnapshot) {
            return;
        }
        let engine = self.clone();
        self.runtime.spawn(async move {
            if let Err(error) = engine.look_at_snapshots(row).await {
                tracing::debug!("after an operation on snapshots: {error}");
            }
        });
    }

    /// A round's part: of the volumes with snapshots, the one that was not asked for longest.
    pub(in super::super) async fn look_at_next_snapshots(&self) {
        let next = {
            let mut core = self.core.lock();
            let round = core.world.counters.reconciles;
            let world = core.world.clone();
            let rows: BTreeSet<DiskRow> =
                world.snapshots.values().chain(world.foreign_snapshots.values()).copied().collect();
            let asked = |row: &DiskRow| core.known_snapshots.asked.get(row).copied();
            let due = |row: &DiskRow| asked(row).is_none_or(|last| round.saturating_sub(last) >= ROUNDS);
            let next = rows.into_iter().filter(due).min_by_key(asked);
            if let Some(row) = next {
                core.known_snapshots.asked.insert(row, round);
            }
            next
        };
        if let Some(row) = next
            && let Err(error) = self.look_at_snapshots(row).await
        {
            tracing::warn!("reconcile round: {error}");
        }
    }
}

impl Core {
    /// Shows a listing, unless an operation on the volume has begun, or changed them, since.
    fn show_snapshots(
        &mut self,
        before: &Volume,
        listed: &[CloudSnapshot],
        gone: &[(SnapRow, SnapshotName, crate::model::SnapshotId)],
        at: Timestamp,
    ) {
        let touched = self.world.volumes.get(&before.row).is_none_or(|v| !v.snapshots.same(&before.snapshots));
        for (row, name, id) in gone {
            self.known_snapshots.absent.remove(row);
            tracing::warn!(volume = %before.uuid, snapshot = %id, %name, "deleted behind volfs's back");
            let fields = json!({"event": "snapshot-gone", "volume": before.uuid, "disk": before.disk.as_str(),
                "name": name.as_str(), "snapshot": id});
            self.event(Some(before.job), fields);
            self.forget_snapshot(before.row, *row, at);
        }
        let Some(now) = self.world.volumes.get(&before.row).cloned() else { return };
        if now.running.is_some() || touched {
            return;
        }
        let ours: Vec<Snapshot> = now
            .snapshots
            .ours()
            .map(|(_, s)| match listed.iter().find(|seen| seen.id == s.id) {
                Some(seen) if *seen.state != *s.state => {
                    Snapshot { state: seen.state.as_str().into(), at, ..s.clone() }
                }
                _ => s.clone(),
            })
            .collect();
        let mut others: Vec<&CloudSnapshot> = listed.iter().filter(|s| ours.iter().all(|o| o.id != s.id)).collect();
        others.sort_by_key(|s| (s.created, s.id));
        let others: Vec<Snapshot> = others.into_iter().filter_map(|s| foreign(s, &now, at)).collect();
        let shown = named(ours, others);
        if !shown.iter().eq(now.snapshots.iter()) {
            self.with_volume(now.row, at, |v| v.snapshots = shown);
        }
    }
}
