//! Operations in flight, in memory: begun, adopted, stepped, ended; and the history that they leave.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Instant;

use serde_json::json;

use super::Target;
use super::core::Core;
use super::ticket::Ticket;
use super::world::{HistoryRow, Job, Operation, Running, Volume};
use crate::command::{self, Action};
use crate::model::{Caller, DiskName, DiskRow, Fence, JobRow, OpId, Outcome, Timestamp, Verb, VolumeId};

/// How many rows of history a volume and a job show.
const HISTORY_OF_VOLUME: usize = 50;
const HISTORY_OF_JOB: usize = 500;
/// How many ended operations stay in `operations/`.
const RECENT_OPERATIONS: usize = 200;

/// An operation in flight.
#[derive(Clone)]
pub(super) struct Live {
    /// Its number.
    pub id: OpId,
    /// Its identity.
    pub fence: Fence,
    /// What it does.
    pub action: Action,
    /// On what.
    pub target: Target,
    /// Completed with the outcome.
    pub ticket: Ticket,
    /// Completed when the journal has it.
    pub journaled: Ticket,
    /// Set by `cancel`, by a destroy's interrupted caller, and by `abandon`.
    pub stop: Arc<AtomicBool>,
    /// Taken by who ends it: its own conclusion, or `abandon`. Never both.
    pub ending: Arc<AtomicBool>,
    /// Who asked.
    pub caller: Arc<Caller>,
    /// Began.
    pub began: Timestamp,
    /// For durations.
    pub clock: Instant,
    /// The epoch reserved for its mark, for create, claim and move.
    pub epoch: u64,
    /// Part of which job-level operation.
    pub parent: Option<OpId>,
    /// Taken over after a crash: starts nothing that takes away (rule R10).
    pub recovering: bool,
}

impl Live {
    /// Takes the right to end it; false if somebody has it.
    pub fn take_end(&self) -> bool {
        !self.ending.swap(true, Ordering::SeqCst)
    }

    /// Whether it was asked to stop before its next step.
    pub fn stopping(&self) -> bool {
        self.stop.load(Ordering::SeqCst)
    }
}

/// What a volume shows while a destroy has it.
fn reservation(op: OpId) -> Running {
    Running { op, verb: Verb::Destroy, withdrawn: true }
}

/// Frees the disk name that an operation has taken in a job.
fn let_go(job: &mut Job, op: OpId) {
    job.creating = job.creating.iter().filter(|(_, o)| **o != op).map(|(d, o)| (d.clone(), *o)).collect();
}
impl Core {
    /// Begins an operation in memory: from now on equal commands join it. The journal comes next.
    pub fn begin(
        &mut self,
        target: Target,
        action: Action,
        caller: Arc<Caller>,
        fence: Fence,
        parent: Option<OpId>,
        at: Timestamp,
    ) -> Live {
        let id = self.next_op();
        let verb = action.verb();
        let epoch = match verb {
            Verb::Create | Verb::Claim | Verb::Move => self.next_epoch(),
            _ => 0,
        };
        let live = Live {
            id,
            fence,
            action,
            target,
            ticket: Ticket::default(),
            journaled: Ticket::default(),
            stop: Arc::new(AtomicBool::new(false)),
            ending: Arc::new(AtomicBool::new(false)),
            caller,
            began: at,
            clock: Instant::now(),
            epoch,
            parent,
            recovering: false,
        };
        self.adopt(live.clone(), at);
        live
    }

    /// Puts an operation in flight: one just begun, or one that a crash left behind.
    pub fn adopt(&mut self, live: Live, at: Timestamp) {
        let (job, volume, disk) = self.about(live.target, &live.action);
        let verb = live.action.verb();
        let spelled: Arc<str> = command::spell(&live.action).into();
        match live.target {
            Target::Volume(row) => {
                let withdrawn = verb == Verb::Detach;
                self.with_volume(row, at, |v| v.running = Some(Running { op: live.id, verb, withdrawn }));
                // The name is taken from now on, so that nothing else gets it and its job is not forgotten.
                if let (Some((job, _)), Some(old)) = (&job, &disk) {
                    let taken = match &live.action {
                        Action::Move { job } => self.world.job_rows.get(job).map(|to| (*to, old.clone())),
                        Action::Disk { name } => Some((*job, name.clone())),
                        _ => None,
                    };
                    if let Some((job, name)) = taken {
                        self.with_job(job, at, |job| {
                            job.creating.insert(name, live.id);
                        });
                    }
                }
            }
            Target::Job(row) => match &live.action {
                Action::Create { disk, .. } => self.with_job(row, at, |job| {
                    job.creating.insert(disk.clone(), live.id);
                }),
                Action::Claim { volume, disk, .. } => {
                    let disk = disk.clone().or_else(|| DiskName::parse(&volume.to_string()).ok());
                    self.claiming.insert(*volume);
                    self.with_job(row, at, |job| {
                        if let Some(disk) = disk {
                            job.creating.insert(disk, live.id);
                        }
                    });
                }
                action => {
                    self.with_job(row, at, |job| job.running = Some(live.id));
                    if matches!(action, Action::Destroy { .. }) {
                        self.reserve(row, live.id, at);
                    }
                }
            },
            Target::Root => {}
        }
        let fields = json!({
            "event": "begin", "operation": live.id, "command": &*spelled, "job": job.as_ref().map(|j| j.1.as_str()),
            "disk": disk.as_ref().map(DiskName::as_str), "volume": volume,
        });
        // Told by the daemon that began it, to the same readers.
        if !(live.recovering && self.continued) {
            self.event(job.as_ref().map(|j| j.0), fields);
        }
        self.world.operations.insert(
            live.id,
            Arc::new(Operation {
                id: live.id,
                fence: live.fence,
                verb,
                command: spelled,
                job,
                volume,
                disk,
                parent: live.parent,
                step: "journal".into(),
                caller: live.caller.clone(),
                began: live.began,
                joined: 1,
                ended: None,
            }),
        );
        self.live.insert(live.id, live);
    }

    /// A destroy has every volume of its job from the moment it begins.
    fn reserve(&mut self, job: JobRow, op: OpId, at: Timestamp) {
        let rows: Vec<DiskRow> =
            self.world.jobs.get(&job).map(|job| job.disks.values().copied().collect()).unwrap_or_default();
        for row in rows {
            self.with_volume(row, at, |v| v.running = Some(reservation(op)));
        }
    }

    /// Whether the operation still owns what it began on: a late answer finds that it does not.
    pub fn owns(&self, live: &Live) -> bool {
        self.live.contains_key(&live.id)
    }

    /// Names the step an operation is at.
    pub fn step(&mut self, id: OpId, step: &str) {
        if let Some(op) = self.world.operations.get(&id) {
            let mut op = (**op).clone();
            op.step = step.into();
            self.world.operations.insert(id, Arc::new(op));
        }
    }

    /// Ends an operation in memory: frees its object, writes history, keeps it among the recent.
    pub fn end(&mut self, live: &Live, outcome: Outcome, sentence: &str, at: Timestamp) {
        if self.live.remove(&live.id).is_none() {
            return;
        }
        if live.epoch > 0 && outcome != Outcome::Done {
            self.spent.insert(live.epoch);
        }
        if let (Target::Volume(_), Action::Claim { volume, .. }) = (live.target, &live.action) {
            self.imports.ended(*volume, live.epoch, outcome);
        }
        // A part of a destroy gives its volume back to the destroy, which has it reserved.
        let destroying = |parent: &OpId| self.live.get(parent).is_some_and(|l| l.action.verb() == Verb::Destroy);
        let back = live.parent.filter(destroying).map(reservation);
        match live.target {
            Target::Volume(row) => {
                self.with_volume(row, at, |v| {
                    if v.running.is_some_and(|r| r.op == live.id) {
                        v.running = back;
                    }
                });
                let named_in = match &live.action {
                    Action::Move { job } => self.world.job_rows.get(job).copied(),
                    Action::Disk { .. } => self.world.volumes.get(&row).map(|v| v.job),
                    _ => None,
                };
                if let Some(job) = named_in {
                    self.with_job(job, at, |job| let_go(job, live.id));
                }
            }
            Target::Job(row) => {
                if let Action::Claim { volume, .. } = &live.action {
                    self.claiming.remove(volume);
                }
                self.with_job(row, at, |job| {
                    let_go(job, live.id);
                    if job.running == Some(live.id) {
                        job.running = None;
                    }
                });
                let reserved: Vec<DiskRow> = match live.action {
                    Action::Destroy { .. } => {
                        self.world.jobs.get(&row).map(|job| job.disks.values().copied().collect()).unwrap_or_default()
                    }
                    _ => Vec::new(),
                };
                for volume in reserved {
                    let ours = |v: &Arc<Volume>| v.running.is_some_and(|r| r.op == live.id);
                    if self.world.volumes.get(&volume).is_some_and(ours) {
                        self.with_volume(volume, at, |v| v.running = None);
                    }
                }
            }
            Target::Root => {}
        }
        let Some(op) = self.world.operations.get(&live.id).cloned() else { return };
        let took_ms = u64::try_from(live.clock.elapsed().as_millis()).unwrap_or(u64::MAX);
        let mut ended = (*op).clone();
        ended.step = "ended".into();
        ended.ended = Some((outcome, sentence.into(), at));
        self.event(
            op.job.as_ref().map(|j| j.0),
            json!({
                "event": "end", "operation": live.id, "command": &*op.command, "outcome": outcome.as_str(),
                "sentence": sentence, "job": op.job.as_ref().map(|j| j.1.as_str()),
                "disk": op.disk.as_ref().map(DiskName::as_str), "volume": op.volume,
            }),
        );
        *self.world.counters.operations.entry((op.verb, outcome.as_str())).or_default() += 1;
        let row = HistoryRow {
            at,
            op: op.id,
            verb: op.verb,
            job: op.job.as_ref().map(|j| j.1.clone()),
            disk: ended.disk.clone(),
            volume: ended.volume,
            outcome,
            sentence: sentence.into(),
            took_ms,
            caller: live.caller.clone(),
        };
        self.world.operations.insert(live.id, Arc::new(ended));
        let ended_ones = self.world.operations.len().saturating_sub(self.live.len());
        if ended_ones > RECENT_OPERATIONS {
            let oldest = self.world.operations.iter().find(|(_, op)| op.ended.is_some()).map(|(id, _)| *id);
            if let Some(id) = oldest {
                self.world.operations.remove(&id);
            }
        }
        self.add_history(row, op.job.as_ref().map(|j| j.0), at);
    }

    /// Adds a row to the root's, the job's and the volume's history.
    pub fn add_history(&mut self, row: HistoryRow, job: Option<JobRow>, at: Timestamp) {
        fn push(to: &mut imbl::Vector<Arc<HistoryRow>>, row: Arc<HistoryRow>, most: usize) {
            to.push_back(row);
            while to.len() > most {
                to.pop_front();
            }
        }
        let row = Arc::new(row);
        let most = self.most_history;
        push(&mut self.world.history, row.clone(), most);
        if let Some(job) = job {
            self.with_job(job, at, |job| push(&mut job.history, row.clone(), HISTORY_OF_JOB));
        }
        if let Some(owner) = row.volume.and_then(|v| self.world.by_uuid.get(&v)).copied() {
            self.with_volume(owner, at, |v| {
                // Few rows: a plain list is a tenth of a persistent vector's smallest chunk.
                let kept = v.history.len().saturating_sub(HISTORY_OF_VOLUME - 1);
                v.history = Arc::new(v.history.iter().skip(kept).chain([&row]).cloned().collect());
                v.times.history = at;
            });
        }
    }

    /// What an operation has learned about itself: create and claim learn their volume.
    pub fn op_volume(&mut self, id: OpId, volume: VolumeId) {
        if let Some(op) = self.world.operations.get(&id) {
            let mut op = (**op).clone();
            op.volume = Some(volume);
            self.world.operations.insert(id, Arc::new(op));
        }
    }
}
