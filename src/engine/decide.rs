//! From a command to its verdict: gathers what the pure table needs, and adds what concerns the job.

use super::Engine;
use super::Target;
use super::admission::{Situation, Verdict, admit};
use super::core::Core;
use super::jobs::in_flight;
use super::snapshots::by_name;
use crate::command::{self, Action};
use crate::error::Error;
use crate::model::{Caller, DiskRow, JobRow, OpId, Verb};

impl Engine {
    pub(super) fn decide(
        &self,
        core: &Core,
        target: Target,
        action: &Action,
        caller: &Caller,
        parent: Option<OpId>,
    ) -> Verdict {
        match target {
            Target::Root => match action {
                Action::Abandon { .. } if !caller.is_root() => Verdict::Deny(Error::RootOnly { what: "abandon" }),
                _ => Verdict::Start,
            },
            Target::Job(row) => self.decide_job(core, row, action, caller),
            Target::Volume(row) => self.decide_volume(core, row, action, caller, parent),
        }
    }

    pub(super) fn decide_volume(
        &self,
        core: &Core,
        row: DiskRow,
        action: &Action,
        caller: &Caller,
        parent: Option<OpId>,
    ) -> Verdict {
        let (Some(volume), Some(job)) =
            (core.world.volumes.get(&row), core.world.volumes.get(&row).and_then(|v| core.world.jobs.get(&v.job)))
        else {
            return Verdict::Deny(Error::Departed);
        };
        // A job's operation in flight has reserved its volumes' namespace; its own parts pass.
        if let (Some(op), None) = (job.running, parent)
            && core.live.get(&op).is_some_and(|l| l.action.verb() == Verb::Destroy)
        {
            return Verdict::Deny(in_flight(core, op, format!("job {}", job.id)));
        }
        let spelled;
        let running = match volume.running.and_then(|r| core.live.get(&r.op)) {
            // Reconciling waits for volfs's own mark on an imported volume, and whatever needs it reconciles.
            Some(live) if live.action.verb() == Verb::Claim && !matches!(action, Action::Release { .. }) => None,
            Some(live) => {
                spelled = command::spell(&live.action);
                Some((live.id, &live.action, spelled.as_str()))
            }
            None => None,
        };
        let situation = Situation {
            volume: volume.uuid,
            status: volume.base,
            vm: volume.vm,
            size: volume.size,
            job: &job.id,
            disk: &volume.disk,
            held: job.hold.0,
            running,
            mark: self.mark(volume),
            owner: &volume.owner,
            why: volume.why.as_deref().unwrap_or("no reason is known"),
            host: self.host,
            provider: self.about.name,
            snapshots: self.about.snapshots,
            can_force: self.about.can_force,
            size_step: self.about.size_step,
        };
        let verdict = admit(&situation, action, caller);
        if verdict == Verdict::AlreadyDone
            && let Action::Attach { slot: Some(slot), .. } = action
            && volume.device_id != Some(slot.number())
        {
            // C3: an id asked for is verified, also where there is nothing left to do.
            let vm = volume.vm.unwrap_or(self.host);
            return Verdict::Deny(Error::AttachedElsewhere { volume: volume.uuid, vm });
        }
        if verdict != Verdict::Start {
            return verdict;
        }
        match action {
            Action::Move { job: to } => match core.world.job_rows.get(to).and_then(|row| core.world.jobs.get(row)) {
                None => Verdict::Deny(Error::NoSuchJob { job: to.clone() }),
                Some(there) if there.disks.contains_key(&volume.disk) || there.creating.contains_key(&volume.disk) => {
                    Verdict::Deny(Error::DiskExists { job: to.clone(), disk: volume.disk.clone() })
                }
                Some(there) => match there.running {
                    Some(op) => Verdict::Deny(in_flight(core, op, format!("job {to}"))),
                    None => verdict,
                },
            },
            Action::Snapshot { .. }
            | Action::Revert { .. }
            | Action::DeleteSnapshot { .. }
            | Action::Delete { .. }
            | Action::Release { .. } => by_name(volume, action),
            Action::Disk { name } if job.disks.contains_key(name) || job.creating.contains_key(name) => {
                Verdict::Deny(Error::DiskExists { job: job.id.clone(), disk: name.clone() })
            }
            _ => verdict,
        }
    }

    fn decide_job(&self, core: &Core, row: JobRow, action: &Action, caller: &Caller) -> Verdict {
        let Some(job) = core.world.jobs.get(&row) else { return Verdict::Deny(Error::Departed) };
        let object = || format!("job {}", job.id);
        if matches!(action, Action::Cancel { .. }) {
            return Verdict::Start;
        }
        if let Some(op) = job.running {
            return match core.live.get(&op) {
                Some(live) if live.action == *action => Verdict::Join(op),
                _ => Verdict::Deny(in_flight(core, op, object())),
            };
        }
        let begun = |disk: &crate::model::DiskName| match job.creating.get(disk) {
            Some(op) => match core.live.get(op) {
                Some(live) if live.action == *action => Some(Verdict::Join(*op)),
                _ => Some(Verdict::Deny(in_flight(core, *op, format!("disk {disk}")))),
            },
            None if job.disks.contains_key(disk) => {
                Some(Verdict::Deny(Error::DiskExists { job: job.id.clone(), disk: disk.clone() }))
            }
            None => None,
        };
        let taking = matches!(action.verb(), Verb::Destroy | Verb::Revert | Verb::Move);
        if job.hold.0 && taking {
            return Verdict::Deny(Error::Held { job: job.id.clone() });
        }
        match action {
            Action::Create { disk, .. } => begun(disk).unwrap_or(Verdict::Start),
            Action::Claim { volume, disk, from } => {
                if from.is_some() && !caller.is_root() {
                    return Verdict::Deny(Error::RootOnly { what: "claim … from=" });
                }
                if let Some(owner) = core.world.by_uuid.get(volume).and_then(|row| core.world.volumes.get(row)) {
                    let owned = match core.job_name(owner.job) {
                        Some(name) if owner.job != row => Error::OwnedByJob { volume: *volume, job: name },
                        _ => Error::DiskExists { job: job.id.clone(), disk: owner.disk.clone() },
                    };
                    return Verdict::Deny(owned);
                }
                let named = match disk {
                    Some(disk) => Ok(disk.clone()),
                    None => crate::model::DiskName::parse(&volume.to_string()),
                };
                match named {
                    Ok(disk) => match begun(&disk) {
                        Some(verdict) => verdict,
                        None if core.claiming.contains(volume) => Verdict::Deny(Error::InFlight {
                            running: format!("claim {volume}"),
                            id: core
                                .live
                                .values()
                                .find(|l| matches!(l.action, Action::Claim { volume: v, .. } if v == *volume))
                                .map_or(OpId(0), |l| l.id),
                            object: format!("volume {volume}"),
                        }),
                        None => Verdict::Start,
                    },
                    Err(bad) => Verdict::Deny(bad.into()),
                }
            }
            Action::Destroy { job: named } => Engine::admit_destroy(core, job, named),
            Action::Revert { .. } if job.hold.0 => Verdict::Deny(Error::Held { job: job.id.clone() }),
            Action::Snapshot { .. } | Action::Revert { .. } | Action::DeleteSnapshot { .. }
                if !self.about.snapshots =>
            {
                Verdict::Deny(Error::Unsupported { provider: self.about.name, what: action.verb().to_string() })
            }
            Action::Snapshot { .. } | Action::Revert { .. } => self.decide_set(core, job, action, caller),
            Action::Move { job: to } => match core.world.job_rows.get(to).and_then(|row| core.world.jobs.get(row)) {
                None => Verdict::Deny(Error::NoSuchJob { job: to.clone() }),
                Some(there) if there.row == row => Verdict::AlreadyDone,
                Some(there) => {
                    match job.disks.keys().find(|d| there.disks.contains_key(*d) || there.creating.contains_key(*d)) {
                        Some(disk) => Verdict::Deny(Error::DiskExists { job: to.clone(), disk: disk.clone() }),
                        None => Verdict::Start,
                    }
                }
            },
            _ => Verdict::Start,
        }
    }
}
