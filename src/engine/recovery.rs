//! After a crash: every operation the journal says has begun and not ended is settled by looking.
//!
//! Where the cloud has begun it, it is finished; where it had not, `create` and `attach` end as if
//! never begun, and what takes away ends as `interrupted`: recovery starts nothing (rule R10).

use std::sync::Arc;
use std::sync::atomic::AtomicBool;

use tokio::time::Instant;

use super::inflight::Live;
use super::operation::{Done, Fail};
use super::ticket::Ticket;
use super::{Engine, Target};
use crate::cloud::{CloudError, CloudVolume, Label, Refusal};
use crate::command::{self, Action, Place};
use crate::error::Error;
use crate::model::{DiskRow, JobRow, Mark, Outcome, Status, Verb, VmId, VolumeId};
use crate::store::{Change, OpRow};

/// What looking has told about an operation that was left behind.
enum Found {
    /// It happened, or can be finished without taking anything away.
    Finish(Box<Done>),
    /// It had not begun: nothing changed.
    NotBegun,
    /// It happened, and ended in a contradiction that no waiting settles.
    Failed(Fail),
    /// Nobody can tell yet.
    Unclear(Fail),
    /// This record is not the last word: what it says was begun is not its to settle.
    Overtaken(Fail),
}

/// What a failure of a step that recovery repeated means: only a silent cloud is waited for. It was
/// seen to have begun, so no failure says that nothing was changed, a `cancel` of the rest among them.
fn left(fail: Fail) -> Found {
    match fail.error {
        Error::CloudUnreachable { .. } | Error::CloudAmbiguous { .. } => Found::Unclear(fail),
        error => Found::Failed(Fail::ambiguous(error)),
    }
}

/// Whether a look shows that the cloud has done an attach or a detach that a crash left behind. Pure.
pub(super) fn has_begun(action: &Action, seen: Option<&CloudVolume>, ours: Mark, host: VmId) -> bool {
    let Some(seen) = seen.filter(|seen| ours.is_on(seen.mark)) else { return false };
    let on = |vm: &Option<VmId>| seen.attached.is_some_and(|at| at.vm == vm.unwrap_or(host));
    match action {
        Action::Attach { vm, .. } => on(vm),
        Action::Detach { vm, .. } => !on(vm),
        _ => false,
    }
}

/// Whether an operation that a crash cut off before it had begun changed nothing, so that it can be
/// given again; the others may have been done in part.
pub(super) fn begins_again(verb: Verb, on_volume: bool) -> bool {
    match verb {
        Verb::Snapshot | Verb::DeleteSnapshot => on_volume,
        Verb::Revert => false,
        _ => true,
    }
}

/// What is said of an operation that was not finished: nothing had begun, but where it is about many
/// volumes, or where no look tells whether it was done.
fn cut_short(live: &Live, what: String) -> Error {
    let way_out = match (live.target, &live.action) {
        (Target::Job(_), Action::Snapshot { .. }) => {
            "some of its volumes may have that snapshot: `delete-snapshot` it here, then repeat"
        }
        (Target::Job(_), Action::Revert { .. }) => "some of its volumes may be reverted: repeat it",
        (Target::Job(_), Action::DeleteSnapshot { .. }) => "some of its volumes may have it still: repeat it",
        (Target::Volume(_), Action::Revert { .. }) => "nobody can tell whether it was done: repeat it",
        (Target::Job(_), Action::Claim { from: Some(_), .. }) => {
            "the other record's mark may be off the volume already: repeat it"
        }
        _ => return Error::LeftBehind { what },
    };
    Error::CutShort { what, way_out }
}

/// The volume that an operation of the journal is about; that of a claim is in its words only.
fn about(row: &OpRow) -> Option<VolumeId> {
    let named = || match command::parse(row.command.as_bytes(), Place::Job).ok()?.action {
        Action::Claim { volume, .. } => Some(volume),
        _ => None,
    };
    row.volume.or_else(named)
}

impl Engine {
    /// Takes over an unfinished operation in memory, so that its object shows it and equal commands join.
    pub(super) fn take_over(&self, row: &OpRow) -> Option<Live> {
        let target = {
            let core = self.core.lock();
            let owned = |v: VolumeId| core.world.by_uuid.get(&v).copied();
            // A claim's volume was in no job; an import since then has put it into one.
            let imported = |row: &DiskRow| core.world.volumes.get(row).is_some_and(|v| v.imported());
            let volume = row.volume.and_then(owned).or_else(|| about(row).and_then(owned).filter(imported));
            match (volume, row.job) {
                (Some(volume), _) => Target::Volume(volume),
                (None, Some(job)) if core.world.jobs.contains_key(&job) => Target::Job(job),
                _ => return None,
            }
        };
        let place = match target {
            // Of an imported volume: volfs's own, in a job's words.
            Target::Volume(_) if row.verb == Verb::Claim => Place::Job,
            Target::Volume(_) => Place::Volume,
            Target::Job(_) => Place::Job,
            Target::Root => Place::Root,
        };
        let command = command::parse(row.command.as_bytes(), place).ok()?;
        let live = Live {
            id: row.id,
            fence: row.fence,
            action: command.action,
            target,
            ticket: Ticket::default(),
            journaled: Ticket::done(Ok(())),
            stop: Arc::new(AtomicBool::new(false)),
            ending: Arc::new(AtomicBool::new(false)),
            caller: Arc::new(row.caller.clone()),
            began: row.began,
            clock: std::time::Instant::now(),
            epoch: row.epoch(),
            parent: row.parent,
            recovering: true,
        };
        self.publish(|core, at| core.adopt(live.clone(), at));
        Some(live)
    }

    /// An unfinished operation whose object is gone, or whose command is not understood, ends here.
    pub(super) async fn close_stray(self: &Arc<Self>, row: &OpRow) {
        let at = (self.clock)();
        let sentence = "a crash came, and what it was about is not here any more".to_owned();
        let end = Change::OpEnd { id: row.id, outcome: Outcome::Interrupted, sentence, at };
        if let Err(error) = self.store.commit(vec![end.clone()]).await {
            tracing::warn!(operation = %row.id, "its end could not be recorded yet: {error}");
            self.owe(end).await;
        }
    }

    /// Settles one operation that was taken over.
    pub(super) async fn recover(self: Arc<Self>, live: Live) {
        let what = command::spell(&live.action);
        tracing::info!(operation = %live.id, "settling `{what}`, which a crash left behind");
        let volumes = self.reserved(live.target);
        let mut none_since: Option<Instant> = None;
        loop {
            let found = self.settle_left(&live).await;
            if !matches!(found, Found::NotBegun) {
                none_since = None;
            }
            match found {
                Found::Finish(done) => {
                    self.conclude(live, Ok(*done)).await;
                    break;
                }
                // Only in memory: the record stays as it was found.
                Found::Overtaken(fail) => {
                    let sentence = fail.error.to_string();
                    self.publish(|core, at| core.end(&live, Outcome::Interrupted, &sentence, at));
                    live.ticket.complete(Err(fail.error));
                    return;
                }
                Found::Failed(fail) => {
                    if self.takes_end(&live).await {
                        self.failed(live, fail).await;
                    }
                    return;
                }
                // The cloud may have taken the call, and shows it late: two looks decide.
                Found::NotBegun if none_since.get_or_insert_with(Instant::now).elapsed() < self.about.late => {
                    self.publish(|core, _| core.step(live.id, "waits whether the cloud has begun it after all"));
                    tokio::time::sleep(super::operation::LOOK_AGAIN.min(self.about.late)).await;
                }
                Found::NotBegun => {
                    let error = cut_short(&live, what);
                    self.interrupted(live, error).await;
                    break;
                }
                Found::Unclear(fail) => {
                    tracing::warn!(operation = %live.id, "not settled yet: {}", fail.error);
                    let step = format!("waits for the cloud after a crash: {}", fail.error);
                    self.publish(|core, _| core.step(live.id, &step));
                    tokio::time::sleep(super::operation::LOOK_AGAIN).await;
                }
            }
            if !self.core.lock().owns(&live) {
                return;
            }
        }
        // The start's own round left them to their operation, and not every one of them ends with a
        // status that was looked at. By uuid: a move gives another row.
        for volume in &volumes {
            let row = self.world().by_uuid.get(volume).copied();
            if let Some(row) = row {
                self.look_at(row).await;
            }
        }
        // Volfs's own command has no caller who gives it again.
        self.mark_imported(|v| volumes.contains(&v.uuid), true);
    }

    /// The volumes that an operation on this object keeps from being reconciled.
    fn reserved(&self, target: Target) -> Vec<VolumeId> {
        let world = self.world();
        let uuid = |row: &DiskRow| world.volumes.get(row).map(|v| v.uuid);
        match target {
            Target::Volume(row) => uuid(&row).into_iter().collect(),
            Target::Job(row) => {
                world.jobs.get(&row).map_or(Vec::new(), |j| j.disks.values().filter_map(uuid).collect())
            }
            Target::Root => Vec::new(),
        }
    }

    async fn interrupted(self: &Arc<Self>, live: Live, error: Error) {
        if !self.takes_end(&live).await {
            return;
        }
        let at = (self.clock)();
        let sentence = error.to_string();
        let end = Change::OpEnd { id: live.id, outcome: Outcome::Interrupted, sentence: sentence.clone(), at };
        if let Err(error) = self.store.commit(vec![end.clone()]).await {
            let words = error.to_string();
            self.owe(end).await;
            self.store_health(Some(&Error::NotRecorded { what: "the end of an interrupted operation".into(), words }));
        }
        self.publish(|core, at| core.end(&live, Outcome::Interrupted, &sentence, at));
        live.ticket.complete(Err(error));
    }

    async fn settle_left(self: &Arc<Self>, live: &Live) -> Found {
        let unclear = |why: String| Found::Unclear(Fail::clean(Error::CannotTell { why }));
        if let Err(fail) = self.on_proved_host().await {
            return Found::Unclear(fail);
        }
        if let Err(fail) = self.on_true_record(live).await {
            return match self.refusing() {
                Err(_) => Found::Overtaken(fail),
                Ok(()) => Found::Unclear(fail),
            };
        }
        // What the cloud still works on is not to be judged by a look.
        match self.cloud.running(live.fence).await {
            Ok(None) => {}
            Ok(Some(job)) => return unclear(format!("{job} is still running")),
            Err(error) => return unclear(error.to_string()),
        }
        match (live.target, &live.action) {
            (Target::Job(job), Action::Create { .. }) => self.settle_left_create(live, job).await,
            (Target::Job(job), Action::Claim { volume, disk, .. }) => {
                let mark = Mark { record: self.record, epoch: live.epoch };
                match self.cloud.find(*volume).await {
                    Ok(Some(seen)) if seen.pending.is_some() => unclear("a job of the cloud is pending on it".into()),
                    // The mark is ours already, and setting it again is success. A volume without one is
                    // left alone even where another record's was to be replaced: it may have been
                    // released since, if this record was put back from a copy.
                    Ok(Some(seen)) if seen.mark == Some(mark) => {
                        match self.claim(live, job, *volume, disk.clone(), None).await {
                            Ok(done) => Found::Finish(Box::new(done)),
                            Err(fail) => left(fail),
                        }
                    }
                    Ok(_) => Found::NotBegun,
                    Err(error) => unclear(error.to_string()),
                }
            }
            (Target::Volume(row), action) => self.settle_left_volume(live, row, action).await,
            // A job's operation: its parts settle each for itself, the rest is not begun again.
            _ => Found::NotBegun,
        }
    }

    /// Said again where it was begun: it marks and names what it made.
    async fn settle_left_create(self: &Arc<Self>, live: &Live, job: JobRow) -> Found {
        let new = match self.new_volume(live, job) {
            Ok(new) => new,
            Err(_) => return Found::NotBegun,
        };
        let made = match self.cloud.find_created(live.fence).await {
            Ok(None) => return Found::NotBegun,
            Ok(Some(made)) if made.mark == Some(new.label.mark) && made.name == new.name => Ok(made),
            // It was finished, and has been moved, released or taken since: this record is not the last word.
            Ok(Some(made)) if made.mark.map_or(made.name == new.name, |mark| mark != new.label.mark) => {
                return Found::NotBegun;
            }
            Ok(Some(_)) if live.stopping() => return Found::Failed(Fail::ambiguous(Error::Cancelled)),
            Ok(Some(_)) => self.cloud.create(&self.call(live), &new).await,
            Err(error) => Err(error),
        };
        match made {
            Ok(made) => match self.created(live, job, &new.label.disk, new.size, made) {
                Ok(done) => Found::Finish(Box::new(done)),
                Err(fail) => Found::Failed(fail),
            },
            Err(CloudError::Refused { why, words }) if why != Refusal::Passing => {
                let what = format!("create of disk {}", new.label.disk);
                Found::Failed(Fail::ambiguous(Error::CloudRefused { what, words }))
            }
            Err(error) => Found::Unclear(Fail::clean(Error::CannotTell { why: error.to_string() })),
        }
    }

    async fn settle_left_volume(self: &Arc<Self>, live: &Live, row: DiskRow, action: &Action) -> Found {
        let Some(volume) = self.world().volumes.get(&row).cloned() else { return Found::NotBegun };
        if matches!(action.verb(), Verb::Snapshot | Verb::Revert | Verb::DeleteSnapshot) {
            return match self.left_of_snapshot(live, &volume).await {
                Ok(Some(done)) => Found::Finish(Box::new(done)),
                Ok(None) => Found::NotBegun,
                Err(fail) => Found::Failed(fail),
            };
        }
        let seen = match self.cloud.find(volume.uuid).await {
            Ok(seen) => seen,
            Err(error) => return Found::Unclear(Fail::clean(Error::CannotTell { why: error.to_string() })),
        };
        if let Some(job) = seen.as_ref().and_then(|seen| seen.pending.as_deref()) {
            let why = format!("the cloud's job {job} is still pending on it");
            return Found::Unclear(Fail::clean(Error::CannotTell { why }));
        }
        let finish = |acted: Result<Done, Fail>| match acted {
            Ok(done) => Found::Finish(Box::new(done)),
            Err(fail) => left(fail),
        };
        let ours = self.mark(&volume);
        match action {
            Action::Attach { vm, slot } => {
                let vm = vm.unwrap_or(self.host);
                match has_begun(action, seen.as_ref(), ours, self.host) {
                    // The cloud has begun: the same steps find it attached, and prove it.
                    true => finish(self.attach(live, row, Some(vm), *slot).await),
                    false => Found::NotBegun,
                }
            }
            Action::Detach { vm, force } => {
                let vm = vm.unwrap_or(self.host);
                match has_begun(action, seen.as_ref(), ours, self.host) {
                    // Gone from there: the same steps find nothing to take away, and record it.
                    true => {
                        if vm == self.host {
                            if let Some(mapping) = &volume.mapping {
                                // The cloud has it no more: our descriptor only keeps it from going.
                                mapping.pin.release();
                            }
                            match self.candidates(volume.uuid).await {
                                Ok(disks) if disks.is_empty() => {}
                                Ok(_) => {
                                    let why = "the cloud has detached it, and its device has not gone yet".into();
                                    return Found::Unclear(Fail::clean(Error::CannotTell { why }));
                                }
                                Err(error) => {
                                    let why = error.to_string();
                                    return Found::Unclear(Fail::clean(Error::CannotTell { why }));
                                }
                            }
                        }
                        finish(self.detach(live, row, Some(vm), *force).await)
                    }
                    false => Found::NotBegun,
                }
            }
            Action::Resize { size } => match &seen {
                Some(seen) if seen.size >= *size && ours.is_on(seen.mark) => {
                    finish(self.resize(live, row, seen.size).await)
                }
                _ => Found::NotBegun,
            },
            Action::Delete { .. } => match &seen {
                None if self.sees_us().await => {
                    Found::Finish(Box::new(self.gone(&volume, "done before a crash".into())))
                }
                None => {
                    let why = "the cloud shows neither the volume nor this host's own VM".into();
                    Found::Unclear(Fail::clean(Error::CannotTell { why }))
                }
                Some(_) => Found::NotBegun,
            },
            // No mark is taken off an imported one: that there is none says nothing.
            Action::Release { .. } => match &seen {
                Some(seen) if !volume.imported() && seen.mark.is_none() && volume.recorded != Status::Conflict => {
                    Found::Finish(Box::new(self.released(&volume, "done before a crash".into())))
                }
                _ => Found::NotBegun,
            },
            Action::Move { job } => {
                let mark = Mark { record: self.record, epoch: live.epoch };
                let target = self.world().job_rows.get(job).copied();
                match (&seen, target) {
                    (Some(seen), Some(target)) if seen.mark == Some(mark) => {
                        Found::Finish(Box::new(self.moved(live, &volume, target)))
                    }
                    // Our old mark was taken off for the new one: without it the volume is nobody's. One
                    // that was given up since is.
                    (Some(seen), Some(target)) if !volume.imported() && seen.mark.is_none() => {
                        match self.cloud.half_exchanged(volume.uuid, self.record).await {
                            Ok(true) => {}
                            Ok(false) => return Found::NotBegun,
                            Err(error) => {
                                return Found::Unclear(Fail::clean(Error::CannotTell { why: error.to_string() }));
                            }
                        }
                        let label = Label { mark, job: job.clone(), disk: volume.disk.clone() };
                        let what = format!("move of volume {} to job {job}", volume.uuid);
                        let set = self.set_mark(live, &what, volume.uuid, None, Some(&label)).await;
                        finish(set.map(|()| self.moved(live, &volume, target)))
                    }
                    _ => Found::NotBegun,
                }
            }
            // Nothing is taken away, and it cannot be told whether the name beside the mark is the
            // new one already: said again, and recorded.
            Action::Disk { name } => match &seen {
                Some(seen) if ours.is_on(seen.mark) => finish(self.rename(live, row, name).await),
                _ => Found::NotBegun,
            },
            Action::Claim { .. } => match &seen {
                Some(seen) if seen.mark == Some(Mark { record: self.record, epoch: live.epoch }) => {
                    finish(self.claim_imported(live, row).await)
                }
                _ => Found::NotBegun,
            },
            _ => Found::NotBegun,
        }
    }
}
