//! Snapshots of a whole job (C6): a set is there for all of its volumes, or for none.

use imbl::OrdMap;

use std::sync::Arc;

use super::super::admission::Verdict;
use super::super::core::Core;
use super::super::inflight::Live;
use super::super::operation::{Acted, Done, Fail};
use super::super::ticket::Ticket;
use super::super::world::{Job, Volume};
use super::super::{Engine, Target};
use super::{by_name, in_place};
use crate::command::Action;
use crate::error::Error;
use crate::model::{Caller, DiskName, DiskRow, JobRow, OpId, SnapshotName, Status};

/// A volume's part of a set.
struct Part {
    disk: DiskName,
    row: DiskRow,
    /// Begun by this very operation, not joined: what it took is ours to delete again.
    own: bool,
    outcome: Result<(), Error>,
}

/// A part that was submitted.
struct Submitted {
    disk: DiskName,
    row: DiskRow,
    own: bool,
    ticket: Ticket,
}

impl Submitted {
    async fn ended(self) -> Part {
        Part { outcome: self.ticket.wait().await, disk: self.disk, row: self.row, own: self.own }
    }
}

fn several(mut lines: Vec<(DiskName, Error)>, after: Vec<(DiskName, Error)>) -> Fail {
    // The first failing disk's errno counts.
    lines.sort_by(|a, b| a.0.cmp(&b.0));
    lines.extend(after);
    Fail::clean(Error::Several { lines })
}

impl Engine {
    /// Whether a set may begin: each volume is asked as for a command of its own, and one that
    /// denies is a line. Nothing is begun then. One that is unknown finds out by itself for a snapshot,
    /// which can be undone; a revert cannot, and does not begin.
    pub(in super::super) fn decide_set(&self, core: &Core, job: &Job, action: &Action, caller: &Caller) -> Verdict {
        let mut lines = Vec::new();
        for (disk, row) in &job.disks {
            let Some(volume) = core.world.volumes.get(row) else { continue };
            // Which are ours the record knows, also of a volume of which nothing else can be told.
            let verdict = match self.decide_volume(core, *row, action, caller, None) {
                Verdict::Reconcile => by_name(volume, action),
                verdict => verdict,
            };
            match verdict {
                Verdict::Deny(error) => lines.push((disk.clone(), error)),
                _ if volume.base == Status::Unknown && matches!(action, Action::Revert { .. }) => {
                    let why = volume.why.as_deref().unwrap_or("nobody can tell yet").into();
                    let error = Error::NotSettled { volume: volume.uuid, status: volume.base, why };
                    lines.push((disk.clone(), error));
                }
                _ => {}
            }
        }
        if lines.is_empty() { Verdict::Start } else { Verdict::Deny(Error::Several { lines }) }
    }

    fn submit_part(&self, live: &Live, disk: DiskName, row: DiskRow, action: Action) -> Submitted {
        let submitted = self.submit_as(Target::Volume(row), action, &live.caller, Some(live.id));
        let parent = |op: OpId| self.core.lock().world.operations.get(&op).and_then(|op| op.parent);
        let own = submitted.op.and_then(parent) == Some(live.id);
        Submitted { disk, row, own, ticket: submitted.ticket }
    }

    async fn side_by_side(&self, live: &Live, disks: &OrdMap<DiskName, DiskRow>) -> Vec<Part> {
        let submitted: Vec<Submitted> =
            disks.iter().map(|(disk, row)| self.submit_part(live, disk.clone(), *row, live.action.clone())).collect();
        futures_util::future::join_all(submitted.into_iter().map(Submitted::ended)).await
    }

    fn volume_of(&self, row: DiskRow) -> Option<Arc<Volume>> {
        self.world().volumes.get(&row).cloned()
    }

    /// `snapshot NAME`: all are tried; if any fails, those taken by this very operation are deleted
    /// again. A cloud takes one snapshot a VM at a time, so those that are attached go one after
    /// the other, and do not wait for one another's refusals.
    pub(in super::super) async fn snapshot_set(
        self: &Arc<Self>,
        live: &Live,
        row: JobRow,
        name: &SnapshotName,
    ) -> Acted {
        let disks = self.disks_of(row)?;
        self.step(live, "a snapshot of each of its volumes")?;
        let detached = |row: &DiskRow| self.volume_of(*row).is_none_or(|v| v.base != Status::Attached);
        let (free, here): (Vec<_>, Vec<_>) = disks.iter().partition(|(_, row)| detached(row));
        let free: OrdMap<DiskName, DiskRow> = free.into_iter().map(|(d, r)| (d.clone(), *r)).collect();
        let one_by_one = async {
            let mut parts = Vec::new();
            for (disk, row) in here {
                if live.stopping() {
                    let outcome = Err(Error::Cancelled);
                    parts.push(Part { disk: disk.clone(), row: *row, own: false, outcome });
                    continue;
                }
                parts.push(self.submit_part(live, disk.clone(), *row, live.action.clone()).ended().await);
            }
            parts
        };
        let (mut parts, others) = futures_util::future::join(one_by_one, self.side_by_side(live, &free)).await;
        parts.extend(others);
        parts.sort_by(|a, b| a.disk.cmp(&b.disk));
        let failed: Vec<_> = parts.iter().filter_map(|p| Some((p.disk.clone(), p.outcome.clone().err()?))).collect();
        if failed.is_empty() {
            return Ok(Done { note: format!("{} volumes", parts.len()), ..Done::default() });
        }
        let undone = self.undo_set(live, parts, name).await;
        Err(several(failed, undone))
    }

    /// Deletes what this very operation's parts have taken, and answers a line for each.
    async fn undo_set(&self, live: &Live, parts: Vec<Part>, name: &SnapshotName) -> Vec<(DiskName, Error)> {
        self.publish(|core, _| core.step(live.id, "not all have it: delete it again"));
        let taken = |part: &Part| part.own && self.volume_of(part.row).is_some_and(|v| v.snapshots.our(name).is_some());
        let undoing: Vec<Submitted> = parts
            .into_iter()
            .filter(taken)
            .map(|part| {
                let action = Action::DeleteSnapshot { name: name.clone() };
                self.submit_part(live, part.disk, part.row, action)
            })
            .collect();
        let undone = futures_util::future::join_all(undoing.into_iter().map(Submitted::ended)).await;
        let line = |part: Part| {
            let error = match part.outcome {
                Ok(()) => Error::SnapshotUndone { name: name.clone() },
                Err(error) => Error::SnapshotLeft { name: name.clone(), words: error.to_string() },
            };
            (part.disk, error)
        };
        undone.into_iter().map(line).collect()
    }

    /// `revert NAME`: first every volume is looked at, so that the set is gone back to as a whole.
    pub(in super::super) async fn revert_set(self: &Arc<Self>, live: &Live, row: JobRow, name: &SnapshotName) -> Acted {
        let disks = self.disks_of(row)?;
        self.step(live, "look at the snapshot of each of its volumes")?;
        let mut failed = Vec::new();
        for (disk, row) in &disks {
            let looked = async {
                let volume = self.owned(*row)?;
                let what = format!("revert of volume {} to {name}", volume.uuid);
                self.revertible(&volume, name, &what).await?;
                let seen = self.look_ours(&volume, &what).await?;
                in_place(&volume, &seen, self.host)
            };
            if let Err(fail) = looked.await {
                failed.push((disk.clone(), fail.error));
            }
        }
        if !failed.is_empty() {
            return Err(several(failed, Vec::new()));
        }
        self.step(live, "revert each of its volumes")?;
        let parts = self.side_by_side(live, &disks).await;
        self.of_all(parts)
    }

    /// `delete-snapshot NAME`: wherever it is; a volume without it has nothing to lose.
    pub(in super::super) async fn delete_snapshot_set(
        self: &Arc<Self>,
        live: &Live,
        row: JobRow,
        name: &SnapshotName,
    ) -> Acted {
        let disks = self.disks_of(row)?;
        let has = |row: &DiskRow| self.volume_of(*row).is_some_and(|v| v.snapshots.our(name).is_some());
        let disks: OrdMap<_, _> = disks.into_iter().filter(|(_, row)| has(row)).collect();
        self.step(live, "delete the snapshot of each volume that has it")?;
        let parts = self.side_by_side(live, &disks).await;
        self.of_all(parts)
    }

    fn of_all(&self, parts: Vec<Part>) -> Acted {
        let count = parts.len();
        let failed: Vec<_> = parts.into_iter().filter_map(|p| Some((p.disk, p.outcome.err()?))).collect();
        if failed.is_empty() {
            return Ok(Done { note: format!("{count} volumes"), ..Done::default() });
        }
        Err(several(failed, Vec::new()))
    }
}
