//! What `control` says when it is read: which verbs are allowed now, and why the others are not.
//!
//! An editor writes back what it has read, and bash's `echo "$text" > control` does so in a write a
//! line: so neither the text nor any line of it is a command. No verb ends with a colon.

use std::collections::BTreeSet;

use uuid::Uuid;

use super::super::tree::View;
use super::escape;
use crate::command::Action;
use crate::engine::Target;
use crate::engine::world::Volume;
use crate::error::Errno;
use crate::model::{DiskName, DiskRow, JobId, JobRow, OpId, SnapshotName, VolumeId};

/// One line a verb. ESTALE when the object is gone.
pub fn text(view: &View<'_>, target: Target) -> Result<String, Errno> {
    let mut text = String::from("# verb\tnow (man 5 volfs says how each is written)\n");
    for action in actions(view, target)? {
        let now = match view.core.would(target, &action) {
            Ok(()) => "allowed".to_owned(),
            Err(e) => format!("no: {}", escape(&e.to_string())),
        };
        text.push_str(&format!("{}:\t{now}\n", action.verb()));
    }
    Ok(text)
}

/// An example of each verb of that place, with arguments that are in nobody's way.
fn actions(view: &View<'_>, target: Target) -> Result<Vec<Action>, Errno> {
    Ok(match target {
        Target::Root => {
            let running = view.world.operations.values().find(|o| o.ended.is_none());
            let id = running.map_or(OpId(0), |o| o.id);
            vec![Action::Reconcile { vm: None }, Action::Cancel { id: Some(id) }, Action::Abandon { id }]
        }
        Target::Job(row) => job(view, row)?,
        Target::Volume(row) => volume(view, row)?,
    })
}

/// The three verbs on snapshots: a new one's name, and that of one there is.
fn snapshots<'a>(taken: impl Iterator<Item = &'a Volume>) -> Vec<Action> {
    let there: BTreeSet<SnapshotName> = taken.flat_map(|v| v.snapshots.ours()).map(|(_, s)| s.name.clone()).collect();
    let mut n = 0u32;
    let names = std::iter::repeat_with(|| {
        n += 1;
        SnapshotName::parse(&format!("new-{n}")).ok()
    });
    let free = names.flatten().find(|name| !there.contains(name));
    let old = there.first().cloned().or_else(|| SnapshotName::parse("NAME").ok());
    let mut all = Vec::new();
    all.extend(free.map(|name| Action::Snapshot { name, crash: false }));
    all.extend(old.clone().map(|name| Action::Revert { name }));
    all.extend(old.map(|name| Action::DeleteSnapshot { name }));
    all
}

fn other_job(view: &View<'_>, than: JobRow) -> Option<JobId> {
    let other = view.world.job_rows.iter().find(|(_, row)| **row != than);
    other.map(|(id, _)| id.clone()).or_else(|| JobId::parse("JOB").ok())
}

fn job(view: &View<'_>, row: JobRow) -> Result<Vec<Action>, Errno> {
    let job = view.job(row)?;
    let mut n = 0u32;
    let free = std::iter::repeat_with(|| {
        n += 1;
        DiskName::parse(&format!("new-{n}")).ok()
    });
    let disk = free.flatten().find(|d| !job.disks.contains_key(d) && !job.creating.contains_key(d));
    let mut all = Vec::new();
    all.extend(disk.map(|disk| Action::Create { disk, size: 1 << 30, offering: None, zone: None, name: None }));
    let any = view.world.unclaimed.keys().next().copied().unwrap_or(VolumeId(Uuid::nil()));
    all.push(Action::Claim { volume: any, disk: None, from: None });
    all.push(Action::Attach { vm: None, slot: None });
    all.push(Action::Detach { vm: None, force: false });
    let volumes = job.disks.values().filter_map(|r| view.volume(*r).ok());
    all.extend(snapshots(volumes.map(|v| &**v)));
    all.extend(other_job(view, row).map(|job| Action::Move { job }));
    all.push(Action::Destroy { job: job.id.clone() });
    all.push(Action::Cancel { id: None });
    Ok(all)
}

fn volume(view: &View<'_>, row: DiskRow) -> Result<Vec<Action>, Errno> {
    let v = view.volume(row)?;
    let mut all = vec![
        Action::Attach { vm: None, slot: None },
        Action::Detach { vm: None, force: false },
        Action::Resize { size: v.size.saturating_add(1) },
    ];
    all.extend(snapshots([&**v].into_iter()));
    all.push(Action::Delete { volume: v.uuid, expunge: false });
    all.push(Action::Release { volume: v.uuid });
    all.extend(other_job(view, v.job).map(|job| Action::Move { job }));
    all.push(Action::Disk { name: v.disk.clone() });
    all.push(Action::Reconcile { vm: None });
    Ok(all)
}
