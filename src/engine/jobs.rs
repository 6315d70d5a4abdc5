//! Jobs: mkdir, rmdir, values, and commands for all of a job's volumes (C9, C11, C12).

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use imbl::{OrdMap, Vector};

use super::Engine;
use super::Target;
use super::admission::Verdict;
use super::asked::Asker;
use super::core::Core;
use super::inflight::Live;
use super::operation::{Acted, Apply, Done, Fail};
use super::snapshots::has_snapshots;
use super::ticket::Ticket;
use super::world::{HistoryRow, Job, Volume};
use crate::command::Action;
use crate::error::Error;
use crate::failpoint;
use crate::model::{Caller, DiskName, DiskRow, Fence, JobId, JobRow, OpId, Outcome, Status, Timestamp, Verb};
use crate::store::{Change, OpRow};

/// How long a namespace call or a value waits for its commit: its caller is answered within the second
/// of rule R6. Nobody else may end that wait before: what is refused here is taken back.
const COMMIT_WAIT: Duration = Duration::from_millis(900);

/// A change that is journaled and done in one commit: mkdir, rmdir, and the values.
struct Small {
    verb: Verb,
    command: String,
    job: JobRow,
    id: JobId,
    change: Change,
    /// What takes it back, when the commit came after the caller was told that nothing happened.
    undo: Vec<Change>,
    apply: Apply,
    /// What to do when it failed.
    give_up: Apply,
}

impl Engine {
    /// mkdir of a job.
    pub fn make_job(&self, id: JobId, asker: impl Into<Asker>) -> Ticket<JobRow> {
        let asker = asker.into();
        let refused = self.changing().and_then(|()| {
            let mut core = self.core.lock();
            if core.world.job_rows.contains_key(&id) || !core.making.insert(id.clone()) {
                return Err(Error::JobExists { job: id.clone() });
            }
            Ok(core.next_job())
        });
        let row = match refused {
            Ok(row) => row,
            Err(error) => return self.refuse_small(Target::Root, Verb::Mkdir, &asker.caller, error),
        };
        let at = (self.clock)();
        let (added, making) = (id.clone(), id.clone());
        let ticket = self.small(
            Small {
                verb: Verb::Mkdir,
                command: format!("mkdir {id}"),
                job: row,
                id: id.clone(),
                change: Change::JobAdd { row, id: id.clone(), at },
                undo: vec![Change::JobForget { row, at }],
                apply: Box::new(move |core, at| {
                    core.making.remove(&added);
                    core.event(Some(row), serde_json::json!({"event": "job", "job": added.as_str()}));
                    core.put_job(new_job(row, added, at), at);
                }),
                give_up: Box::new(move |core, _| {
                    core.making.remove(&making);
                }),
            },
            asker,
        );
        let made = Ticket::default();
        let answer = made.clone();
        ticket.on_done(move |outcome| answer.complete(outcome.clone().map(|()| row)));
        made
    }

    /// rmdir of a job that owns nothing.
    pub fn forget_job(&self, row: JobRow, asker: impl Into<Asker>) -> Ticket {
        let asker = asker.into();
        let ready = self.changing().and_then(|()| {
            let mut core = self.core.lock();
            let job = core.world.jobs.get(&row).cloned().ok_or(Error::Stale)?;
            if let Some(op) = job.running.or_else(|| job.creating.values().next().copied()) {
                return Err(in_flight(&core, op, format!("job {}", job.id)));
            }
            let count = job.disks.len();
            if count > 0 {
                return Err(Error::JobNotEmpty { job: job.id.clone(), count });
            }
            // Reserved: nothing begins in it while its end is on the way to the record.
            let reserved = core.next_op();
            let at = core.world.at;
            core.with_job(row, at, |job| job.running = Some(reserved));
            Ok(job.id.clone())
        });
        let id = match ready {
            Ok(id) => id,
            Err(error) => return self.refuse_small(Target::Job(row), Verb::Rmdir, &asker.caller, error),
        };
        let at = (self.clock)();
        self.small(
            Small {
                verb: Verb::Rmdir,
                command: format!("rmdir {id}"),
                job: row,
                id: id.clone(),
                change: Change::JobForget { row, at },
                undo: vec![Change::JobAdd { row, id, at }],
                apply: Box::new(move |core, at| core.remove_job(row, at)),
                give_up: Box::new(move |core, at| core.with_job(row, at, |job| job.running = None)),
            },
            asker,
        )
    }

    /// A write to `vm_name`.
    pub fn set_vm_name(&self, row: JobRow, value: String, asker: impl Into<Asker>) -> Ticket {
        let now: Arc<str> = value.as_str().into();
        let at = (self.clock)();
        let change = move |was: &Job| {
            let (was, since) = &was.vm_name;
            let back = Change::JobVmName { row, vm_name: was.to_string(), at: *since };
            (Change::JobVmName { row, vm_name: value, at }, back)
        };
        self.set(row, "vm_name", asker.into(), change, move |job, at| job.vm_name = (now, at))
    }

    /// A write to `hold`; lowering it takes root.
    pub fn set_hold(&self, row: JobRow, value: bool, asker: impl Into<Asker>) -> Ticket {
        let asker = asker.into();
        let held = self.world().jobs.get(&row).is_some_and(|j| j.hold.0);
        if held && !value && !asker.caller.is_root() {
            let error = Error::RootOnly { what: "lowering `hold`" };
            return self.refuse_small(Target::Job(row), Verb::Set, &asker.caller, error);
        }
        let at = (self.clock)();
        let change = move |was: &Job| {
            let (was, since) = was.hold;
            (Change::JobHold { row, hold: value, at }, Change::JobHold { row, hold: was, at: since })
        };
        self.set(row, "hold", asker, change, move |job, at| job.hold = (value, at))
    }

    fn set(
        &self,
        row: JobRow,
        value: &'static str,
        asker: Asker,
        change: impl FnOnce(&Job) -> (Change, Change),
        show: impl FnOnce(&mut Job, Timestamp) + Send + 'static,
    ) -> Ticket {
        let job = self.changing().and_then(|()| self.world().jobs.get(&row).cloned().ok_or(Error::Stale));
        let job = match job {
            Ok(job) => job,
            Err(error) => return self.refuse_small(Target::Job(row), Verb::Set, &asker.caller, error),
        };
        let (change, undo) = change(&job);
        let small = Small {
            verb: Verb::Set,
            command: format!("set {value}"),
            job: row,
            id: job.id.clone(),
            change,
            undo: vec![undo],
            apply: Box::new(move |core, at| core.with_job(row, at, |job| show(job, at))),
            give_up: Box::new(|_, _| {}),
        };
        self.small(small, asker)
    }

    fn refuse_small<T: Clone>(&self, target: Target, verb: Verb, caller: &Caller, error: Error) -> Ticket<T> {
        self.note_failure(target, verb.as_str(), caller, &error);
        Ticket::done(Err(error))
    }

    /// Commits a small change with its history, waits at most a second, and takes a late one back.
    fn small(&self, small: Small, Asker { caller, fence }: Asker) -> Ticket {
        let ticket = Ticket::default();
        let answer = ticket.clone();
        let Some(engine) = self.me.upgrade() else { return Ticket::done(Err(Error::ShuttingDown)) };
        let clock = std::time::Instant::now();
        let target = if small.verb == Verb::Mkdir { Target::Root } else { Target::Job(small.job) };
        if let Some(silence) = self.stuck.silence() {
            let words = format!(
                "it has not answered for {} s, and is asked for nothing more until it does: see `health`",
                silence.as_secs()
            );
            let error = Error::NotJournaled { what: format!("`{}`", small.command), words };
            self.publish(small.give_up);
            return self.refuse_small(target, small.verb, &caller, error);
        }
        self.runtime.spawn(async move {
            let Small { verb, command, job, id, mut change, undo, apply, give_up } = small;
            let at = (engine.clock)();
            let op = engine.core.lock().next_op();
            let row = OpRow {
                id: op,
                fence,
                verb,
                command: command.clone(),
                job: Some(job),
                volume: None,
                disk: None,
                parent: None,
                detail: String::new(),
                step: "ended".into(),
                caller: caller.clone(),
                host: engine.host,
                boot: engine.devices.boot(),
                began: at,
                ended: Some((Outcome::Done, String::new(), at)),
            };
            change.date(at);
            // The job's row comes first where the operation's refers to it.
            let batch = vec![change, Change::OpBegin(Box::new(row))];
            let mut commit = std::pin::pin!(engine.store.commit(batch));
            let outcome = tokio::select! {
                outcome = &mut commit => Some(outcome),
                () = tokio::time::sleep(COMMIT_WAIT) => None,
            };
            let fail = |words: String| Error::NotJournaled { what: format!("`{command}`"), words };
            let outcome = match outcome {
                Some(outcome) => outcome,
                None => {
                    let error = fail("it has not answered for a second".into());
                    let unanswered = engine.stuck.unanswered(clock);
                    engine.store_health(Some(&error));
                    engine.note_failure(target, verb.as_str(), &caller, &error);
                    answer.complete(Err(error));
                    let late = commit.await;
                    drop(unanswered);
                    engine.store_health(late.as_ref().err().map(|error| fail(error.to_string())).as_ref());
                    // What is shown follows the record, also where that cannot be taken back.
                    let stays = match late {
                        Ok(()) => engine.store.commit(undo).await.err(),
                        Err(_) => None,
                    };
                    match stays {
                        Some(error) => {
                            tracing::error!(
                                "`{command}` was refused, is in the record all the same, and stays: {error}"
                            );
                            engine.publish(apply);
                        }
                        None => engine.publish(give_up),
                    }
                    return;
                }
            };
            match outcome {
                Ok(()) => {
                    failpoint::reach("small.recorded").await;
                    engine.store_health(None);
                    engine.publish_at(at, |core, at| {
                        let took_ms = u64::try_from(clock.elapsed().as_millis()).unwrap_or(u64::MAX);
                        let caller = Arc::new(caller);
                        apply(core, at);
                        let row = HistoryRow {
                            at,
                            op,
                            verb,
                            job: Some(id),
                            disk: None,
                            volume: None,
                            outcome: Outcome::Done,
                            sentence: command.into(),
                            took_ms,
                            caller,
                        };
                        core.add_history(row, Some(job), at);
                        core.clear_error(target, verb, at);
                    });
                    answer.complete(Ok(()));
                }
                Err(error) => {
                    let error = match error {
                        crate::store::StoreError::Full { words } => {
                            Error::NoCapacity { what: format!("the record (`{command}`)"), words }
                        }
                        other => fail(other.to_string()),
                    };
                    engine.store_health(Some(&error));
                    engine.publish(|core, at| {
                        give_up(core, at);
                        core.note_error(target, verb.as_str(), &caller, &error, at);
                    });
                    answer.complete(Err(error));
                }
            }
        });
        ticket
    }

    /// An operation on a job as a whole.
    pub(super) async fn whole_job(self: &Arc<Self>, live: &Live, row: JobRow) -> Acted {
        match &live.action {
            Action::Destroy { .. } => self.destroy(live, row).await,
            Action::Snapshot { name, .. } => self.snapshot_set(live, row, name).await,
            Action::Revert { name } => self.revert_set(live, row, name).await,
            Action::DeleteSnapshot { name } => self.delete_snapshot_set(live, row, name).await,
            Action::Attach { .. } | Action::Detach { .. } | Action::Move { .. } => self.each(live, row).await,
            other => {
                let what = format!("{} of a job", other.verb());
                Err(Fail::clean(Error::Unsupported { provider: self.about.name, what }))
            }
        }
    }

    pub(super) fn disks_of(&self, row: JobRow) -> Result<OrdMap<DiskName, DiskRow>, Fail> {
        self.world().jobs.get(&row).map(|j| j.disks.clone()).ok_or_else(|| Fail::clean(Error::Stale))
    }

    /// C11: the set is fixed now, all are tried side by side, the first failing disk's errno counts.
    async fn each(self: &Arc<Self>, live: &Live, row: JobRow) -> Acted {
        let disks = self.disks_of(row)?;
        self.step(live, "each of its volumes")?;
        let mut tickets = Vec::new();
        for (disk, volume) in disks.iter() {
            let submitted = self.submit_as(Target::Volume(*volume), live.action.clone(), &live.caller, Some(live.id));
            tickets.push((disk.clone(), submitted.ticket));
        }
        let mut failed = Vec::new();
        let count = tickets.len();
        for (disk, ticket) in tickets {
            if let Err(error) = ticket.wait().await {
                failed.push((disk, error));
            }
        }
        if failed.is_empty() {
            return Ok(Done { note: format!("{count} volumes"), ..Done::default() });
        }
        Err(Fail::clean(Error::Several { lines: failed }))
    }

    /// C12. The set was reserved when the operation began. Phase 1 detaches all, phase 2 verifies
    /// all, phase 3 deletes one after the other; then the job is forgotten.
    async fn destroy(self: &Arc<Self>, live: &Live, row: JobRow) -> Acted {
        let disks = self.disks_of(row)?;
        let volumes = |engine: &Engine| -> BTreeMap<DiskName, Arc<Volume>> {
            let world = engine.world();
            disks.iter().filter_map(|(d, r)| Some((d.clone(), world.volumes.get(r)?.clone()))).collect()
        };
        self.step(live, "test that no volume is in use")?;
        let mut failed = Vec::new();
        for (disk, volume) in volumes(self) {
            if let Some(mapping) = &volume.mapping {
                let dev = mapping.dev;
                let holders = self
                    .kernel(move |devices| devices.holders(dev))
                    .await
                    .map_err(|e| Fail::clean(Error::CannotTell { why: e.to_string() }))?;
                if !holders.is_empty() {
                    let device = format!("/dev/{}", mapping.name);
                    failed.push((disk, Error::InUse { volume: volume.uuid, device, holders }));
                }
            }
        }
        if !failed.is_empty() {
            return Err(Fail::clean(Error::Several { lines: failed }));
        }
        for (disk, volume) in volumes(self).into_iter().filter(|(_, v)| v.base == Status::Attached) {
            self.step(live, "phase 1: detach all")?;
            self.not_held_before(row, &disk)?;
            if let Err(error) = self.part(live, &volume, Action::Detach { vm: None, force: false }).await {
                failed.push((disk, error));
            }
        }
        if !failed.is_empty() {
            return Err(Fail::clean(Error::Several { lines: failed }));
        }
        self.step(live, "phase 2: verify all")?;
        failpoint::reach("destroy.verify").await;
        for (disk, volume) in volumes(self) {
            if volume.base == Status::Missing {
                if let Err(fail) = self.still_missing(live, &volume, "destroy").await {
                    failed.push((disk, fail.error));
                }
                continue;
            }
            match self.look_before(live, &volume, "destroy").await {
                Err(fail) => failed.push((disk, fail.error)),
                Ok(seen) => {
                    if let Some(error) = has_snapshots(&volume) {
                        failed.push((disk, error));
                    } else if let Some(at) = seen.attached {
                        failed.push((disk, Error::AttachedElsewhere { volume: volume.uuid, vm: at.vm }));
                    }
                }
            }
        }
        if !failed.is_empty() {
            return Err(Fail::clean(Error::Several { lines: failed }));
        }
        let mut count = 0;
        for (disk, volume) in volumes(self) {
            self.step(live, "phase 3: delete one after the other")?;
            failpoint::reach("destroy.between").await;
            self.not_held_before(row, &disk)?;
            let action = Action::Delete { volume: volume.uuid, expunge: false };
            if let Err(error) = self.part(live, &volume, action).await {
                return Err(Fail::clean(Error::Several { lines: vec![(disk, error)] }));
            }
            count += 1;
        }
        self.step(live, "forget the job")?;
        self.not_held(row)?;
        let left = self.disks_of(row)?.len();
        if left > 0 {
            let id = self.core.lock().job_name(row).ok_or_else(|| Fail::clean(Error::Stale))?;
            return Err(Fail::clean(Error::JobNotEmpty { job: id, count: left }));
        }
        failpoint::reach("destroy.forget").await;
        let at = (self.clock)();
        Ok(Done {
            changes: vec![Change::JobForget { row, at }],
            apply: Some(Box::new(move |core, at| core.remove_job(row, at))),
            note: format!("{count} volumes deleted"),
            look: None,
        })
    }

    /// A `hold` that was raised since stops what takes away before its next step.
    pub(super) fn not_held(&self, job: JobRow) -> Result<(), Fail> {
        match self.world().jobs.get(&job) {
            Some(job) if job.hold.0 => Err(Fail::clean(Error::Held { job: job.id.clone() })),
            _ => Ok(()),
        }
    }

    /// The same, naming the disk that it stops before.
    fn not_held_before(&self, job: JobRow, disk: &DiskName) -> Result<(), Fail> {
        let named = |held: Fail| Fail::clean(Error::Several { lines: vec![(disk.clone(), held.error)] });
        self.not_held(job).map_err(named)
    }

    /// One volume's part of a job's operation that has reserved it: journaled as its own operation.
    async fn part(self: &Arc<Self>, parent: &Live, volume: &Volume, action: Action) -> Result<(), Error> {
        let target = Target::Volume(volume.row);
        let caller = parent.caller.clone();
        let live = self.publish(|core, at| core.begin(target, action, caller, Fence::random(), Some(parent.id), at));
        let ticket = live.ticket.clone();
        Box::pin(self.clone().drive(live)).await;
        ticket.wait().await
    }

    /// Whether a job's destroy may begin, and if so its reservation of every volume.
    pub(super) fn admit_destroy(core: &Core, job: &Job, named: &JobId) -> Verdict {
        if *named != job.id {
            let (given, this) = (named.to_string(), job.id.to_string());
            return Verdict::Deny(Error::WrongName { verb: Verb::Destroy, given, this });
        }
        if let Some(op) = job.creating.values().next() {
            return Verdict::Deny(in_flight(core, *op, format!("job {}", job.id)));
        }
        let mut lines = Vec::new();
        for (disk, row) in &job.disks {
            let Some(volume) = core.world.volumes.get(row) else { continue };
            if let Some(running) = volume.running {
                lines.push((disk.clone(), in_flight(core, running.op, format!("volume {}", volume.uuid))));
                continue;
            }
            if let Some(error) = has_snapshots(volume) {
                lines.push((disk.clone(), error));
                continue;
            }
            match volume.base {
                Status::Detached | Status::Attached | Status::Missing => {}
                // X10: it stops, where a single volume's command would look first.
                Status::Unknown => {
                    let why = volume.why.as_deref().unwrap_or("nobody can tell yet").into();
                    lines.push((disk.clone(), Error::NotSettled { volume: volume.uuid, status: volume.base, why }));
                }
                status => {
                    let way_out = "destroy deletes only what is detached, attached and unused, or missing";
                    lines.push((disk.clone(), Error::WrongStatus { volume: volume.uuid, status, way_out }));
                }
            }
        }
        if !lines.is_empty() {
            return Verdict::Deny(Error::Several { lines });
        }
        Verdict::Start
    }
}

/// The sentence for what another operation is in the way of.
pub(super) fn in_flight(core: &Core, id: OpId, object: String) -> Error {
    let running = core.world.operations.get(&id).map_or_else(|| "an operation".into(), |op| op.command.to_string());
    Error::InFlight { running, id, object }
}

/// A job with nothing in it.
pub(super) fn new_job(row: JobRow, id: JobId, at: Timestamp) -> Job {
    Job {
        row,
        id,
        created: at,
        vm_name: ("".into(), at),
        hold: (false, at),
        disks: OrdMap::new(),
        creating: OrdMap::new(),
        running: None,
        error: None,
        history: Vector::new(),
        status_at: at,
        listed_at: at,
    }
}

impl Core {
    /// Forgets a job in the world.
    pub(super) fn remove_job(&mut self, row: JobRow, at: Timestamp) {
        if let Some(job) = self.world.jobs.remove(&row) {
            self.world.job_rows.remove(&job.id);
            self.world.listed_at = at;
            self.event(Some(row), serde_json::json!({"event": "forgotten", "job": job.id.as_str()}));
        }
    }
}
