//! The life of an operation: journal, act, prove, record, answer.
//!
//! ```text
//! begin (memory) ─► OpBegin durable ─► act: steps that look before they act ─► prove
//!        │                │                         │
//!        │ journal fails  │ crash: recovery settles │ Clean: nothing changed, or undone
//!        ▼                ▼                         │ Ambiguous: `unknown` until reconciled
//!      EIO, nothing    (see recovery.rs)            ▼
//!      was started                       record + OpEnd in one batch ─► publish ─► answer
//! ```
//! An operation that was abandoned, or overtaken, finds that it owns nothing any more: its late
//! answer is logged and changes nothing.

use std::panic::AssertUnwindSafe;
use std::sync::Arc;
use std::time::Duration;

use futures_util::FutureExt;

use super::Engine;
use super::asked::detail;
use super::core::Core;
use super::inflight::Live;
use super::world::{Component, Running, Volume};
use crate::cloud::{Call, CloudError, CloudVolume, Refusal};
use crate::command::{self, Action};
use crate::devices::{DeviceChange, Devices, DevicesError};
use crate::error::Error;
use crate::failpoint;
use crate::model::{Disk, DiskRow, Mark, Outcome, Status, Timestamp, Verb, VolumeId};
use crate::store::{Change, OpRow, StoreError};

/// A change of the world that goes with a commit.
pub(super) type Apply = Box<dyn FnOnce(&mut Core, Timestamp) + Send>;

/// What the record and the world learn from an operation that succeeded.
#[derive(Default)]
pub(super) struct Done {
    /// For the record, in one batch with the operation's end.
    pub changes: Vec<Change>,
    /// For the world, in one publish with the operation's end.
    pub apply: Option<Apply>,
    /// Words for `history`.
    pub note: String,
    /// Look at this volume before answering.
    pub look: Option<DiskRow>,
}

/// How an operation failed.
pub(super) struct Fail {
    /// Why.
    pub error: Error,
    /// Whether something may have happened.
    pub ambiguous: bool,
}

impl Fail {
    pub fn clean(error: Error) -> Self {
        Fail { error, ambiguous: false }
    }

    pub fn ambiguous(error: Error) -> Self {
        Fail { error, ambiguous: true }
    }
}

pub(super) type Acted = Result<Done, Fail>;

/// How often a wait for the kernel looks again without being told.
pub(super) const LOOK_AGAIN: Duration = Duration::from_secs(1);

/// Waits for a change of the kernel's devices; for ever if the events ended, so that only the tick is left.
pub(super) async fn changed(changes: &mut tokio::sync::broadcast::Receiver<DeviceChange>) {
    use tokio::sync::broadcast::error::RecvError;
    // Lagging is a change too: everything is looked at again.
    if let Err(RecvError::Closed) = changes.recv().await {
        std::future::pending().await
    }
}

/// An error of the cloud in words of the contract.
pub(super) fn cloud_fail(
    what: &str,
    volume: Option<VolumeId>,
    expected: Option<Mark>,
    provider: &'static str,
    error: CloudError,
) -> Fail {
    let what = what.to_owned();
    match error {
        CloudError::Unreachable { words } => Fail::clean(Error::CloudUnreachable { what, words }),
        CloudError::Ambiguous { words } => Fail::ambiguous(Error::CloudAmbiguous { what, words }),
        CloudError::Refused { why, words } => Fail::clean(match (why, volume) {
            (Refusal::NoVolume, Some(volume)) => Error::NoSuchVolume { volume },
            (Refusal::Protected, Some(volume)) => Error::Protected { volume, why: words },
            (Refusal::Capacity, _) => Error::NoCapacity { what, words },
            (Refusal::Quota, _) => Error::OverQuota { what, words },
            (Refusal::Unsupported, _) => Error::Unsupported { provider, what },
            (Refusal::Conflict | Refusal::InUse, Some(volume)) => Error::CloudBusy { volume, what, words },
            (Refusal::Mark(found), Some(volume)) => Error::NotOurs {
                volume,
                found: found.map_or_else(|| "nobody's".into(), |m| m.to_string()),
                expected: expected.map_or_else(|| "unmarked".into(), |m| m.to_string()),
            },
            _ => Error::CloudRefused { what, words },
        }),
    }
}

/// Why nothing is called on a volume that a job of the cloud is still pending on: one at a time.
pub(super) fn pending(seen: &CloudVolume) -> Option<CloudError> {
    let job = seen.pending.as_deref()?;
    let words = format!("its job {job} is still pending on volume {}", seen.id);
    Some(CloudError::Refused { why: Refusal::Passing, words })
}

/// What a look directly before a call says to it: only what is there, does not carry this host, has
/// exactly our mark and no job of the cloud pending on it may be changed. Pure.
pub(super) fn may_change(seen: Option<CloudVolume>, ours: Mark) -> Result<CloudVolume, CloudError> {
    let refused = |why, words: String| Err(CloudError::Refused { why, words });
    let Some(seen) = seen else { return refused(Refusal::NoVolume, "the cloud knows it no more".into()) };
    if let Some(why) = &seen.carries_host {
        return refused(Refusal::Protected, why.clone());
    }
    if !ours.is_on(seen.mark) {
        return refused(Refusal::Mark(seen.mark), "its mark is another".into());
    }
    match pending(&seen) {
        Some(refusal) => Err(refusal),
        None => Ok(seen),
    }
}

fn not_journaled(what: String, error: StoreError) -> Error {
    match error {
        StoreError::Full { words } => Error::NoCapacity { what: format!("the record ({what})"), words },
        other => Error::NotJournaled { what, words: other.to_string() },
    }
}

impl Engine {
    /// Runs an operation that has begun in memory, to its end.
    pub(super) async fn drive(self: Arc<Self>, live: Live) {
        let begin = self.op_row(&live);
        let what = begin.command.clone();
        if let Err(error) = self.journal(begin).await {
            let error = not_journaled(format!("`{what}`"), error);
            self.store_health(Some(&error));
            self.publish(|core, at| {
                core.forget_begun(&live, at);
                core.note_error(live.target, live.action.verb().as_str(), &live.caller, &error, at);
            });
            live.journaled.complete(Err(error.clone()));
            live.ticket.complete(Err(error));
            return;
        }
        self.store_health(None);
        live.journaled.complete(Ok(()));
        failpoint::reach(&format!("{}.journaled", live.action.verb())).await;
        let acting = AssertUnwindSafe(self.act(&live)).catch_unwind();
        let acted = acting.await.unwrap_or_else(|_| {
            let what = format!("a defect in volfs stopped `{what}`: see the log");
            Err(Fail::ambiguous(Error::Internal { what }))
        });
        self.conclude(live, acted).await;
    }

    /// Records and answers.
    pub(super) async fn conclude(self: &Arc<Self>, live: Live, acted: Acted) {
        let verb = live.action.verb();
        failpoint::reach(&format!("{verb}.acted")).await;
        if !self.takes_end(&live).await {
            tracing::warn!(operation = %live.id, %verb, "a late answer: the operation had been abandoned; ignored");
            return;
        }
        match acted {
            Ok(done) => self.succeeded(live, done).await,
            Err(fail) => self.failed(live, fail).await,
        }
    }

    /// Takes the right to end an operation; false once somebody else has ended it. An `abandon` that is at
    /// the record with its end gives it back if the record does not take it.
    pub(super) async fn takes_end(&self, live: &Live) -> bool {
        while !live.take_end() {
            if !self.core.lock().owns(live) {
                return false;
            }
            tokio::time::sleep(LOOK_AGAIN).await;
        }
        true
    }

    async fn succeeded(self: &Arc<Self>, live: Live, done: Done) {
        let Done { mut changes, apply, note, look } = done;
        let verb = live.action.verb();
        let at = (self.clock)();
        let mut late = None;
        changes.push(Change::OpEnd { id: live.id, outcome: Outcome::Done, sentence: note.clone(), at });
        changes.iter_mut().for_each(|change| change.date(at));
        if let Err(error) = self.store.commit(changes.clone()).await {
            let error =
                Error::NotRecorded { what: format!("`{}`", command::spell(&live.action)), words: error.to_string() };
            self.store_health(Some(&error));
            self.publish(|core, at| {
                if let super::Target::Volume(row) = live.target {
                    late = core.world.volumes.get(&row).map(|v| v.uuid);
                    core.with_volume(row, at, |v| {
                        v.base = Status::Unknown;
                        v.why = Some("the record could not take what was done; it is tried again".into());
                        v.running = Some(Running { op: live.id, verb: Verb::Reconcile, withdrawn: true });
                    });
                }
                core.step(live.id, "waits for the record");
                core.note_error(live.target, verb.as_str(), &live.caller, &error, at);
            });
            live.ticket.complete(Err(error));
            if !self.record_later(&live, changes).await {
                return;
            }
        }
        self.publish_at(at, |core, at| {
            if let Some(apply) = apply {
                apply(core, at);
            }
            core.end(&live, Outcome::Done, &note, at);
            core.clear_error(live.target, verb, at);
        });
        failpoint::reach(&format!("{verb}.recorded")).await;
        // What was unknown while the record could not take it is settled now, under the row it has now.
        let late = late.and_then(|volume| self.world().by_uuid.get(&volume).copied());
        if let Some(row) = look.or(late) {
            self.look_at(row).await;
        }
        self.after_snapshots(&live);
        live.ticket.complete(Ok(()));
    }

    /// Tries a batch again until the record takes it; false if it never will.
    async fn record_later(self: &Arc<Self>, live: &Live, changes: Vec<Change>) -> bool {
        loop {
            tokio::time::sleep(LOOK_AGAIN).await;
            if !self.core.lock().owns(live) {
                return false;
            }
            match self.store.commit(changes.clone()).await {
                Ok(()) => {
                    self.store_health(None);
                    return true;
                }
                Err(StoreError::Constraint { words }) => {
                    tracing::error!(operation = %live.id, "the record refuses what was done for good: {words}");
                    let error = Error::Internal { what: words };
                    self.failed(live.clone(), Fail::ambiguous(error)).await;
                    return false;
                }
                Err(error) => tracing::warn!(operation = %live.id, "the record still fails: {error}"),
            }
        }
    }

    pub(super) async fn failed(self: &Arc<Self>, live: Live, fail: Fail) {
        let Fail { error, ambiguous } = fail;
        let verb = live.action.verb();
        let outcome = match (&error, ambiguous) {
            (Error::Cancelled, false) => Outcome::Cancelled,
            (_, true) => Outcome::Ambiguous,
            (_, false) => Outcome::Failed,
        };
        let sentence = error.to_string();
        let at = (self.clock)();
        let mut changes = Vec::new();
        let volume = match live.target {
            super::Target::Volume(row) => Some(row),
            _ => None,
        };
        if let (true, Some(v)) = (ambiguous, volume.and_then(|row| self.world().volumes.get(&row).cloned())) {
            changes.push(Change::VolumeStatus { volume: v.uuid, status: Status::Unknown, at });
        }
        let end = Change::OpEnd { id: live.id, outcome, sentence: sentence.clone(), at };
        let step = "ended".to_owned();
        changes.push(Change::OpStep { id: live.id, step, detail: detail(live.epoch, Some(error.errno())) });
        changes.push(end.clone());
        let mut recorded = true;
        if let Err(store) = self.store.commit(changes).await {
            recorded = false;
            self.owe(end).await;
            self.store_health(Some(&Error::NotRecorded {
                what: format!("the end of `{verb}`"),
                words: store.to_string(),
            }));
        }
        failpoint::reach("failed.recorded").await;
        self.publish_at(at, |core, at| {
            if let (true, Some(row)) = (ambiguous, volume) {
                core.with_volume(row, at, |v| {
                    v.base = Status::Unknown;
                    if recorded {
                        v.recorded = Status::Unknown;
                    }
                    v.why = Some(sentence.as_str().into());
                });
            }
            core.end(&live, outcome, &sentence, at);
            core.note_error(live.target, verb.as_str(), &live.caller, &error, at);
        });
        for row in volume.into_iter().chain(self.left_in_doubt(&live)) {
            self.look_at(row).await;
        }
        if verb == Verb::Destroy {
            // Its volumes were kept from being looked at, and one of them may be why it stopped.
            self.round_wanted.notify_one();
        }
        self.after_snapshots(&live);
        live.ticket.complete(Err(error));
    }

    /// Volumes that a destroy's parts have left unknown: while it had them, nobody else could look.
    fn left_in_doubt(&self, live: &Live) -> Vec<DiskRow> {
        let (super::Target::Job(job), Verb::Destroy) = (live.target, live.action.verb()) else { return Vec::new() };
        let world = self.world();
        let doubted = |row: &&DiskRow| world.volumes.get(*row).is_some_and(|v| v.base == Status::Unknown);
        world.jobs.get(&job).map_or(Vec::new(), |job| job.disks.values().filter(doubted).copied().collect())
    }

    /// The journal's row of an operation.
    pub(super) fn op_row(&self, live: &Live) -> OpRow {
        let core = self.core.lock();
        let (job, volume, disk) = core.about(live.target, &live.action);
        // A volume that is not in the record yet is in the command's own words only.
        let volume = volume.filter(|v| core.world.by_uuid.contains_key(v) || core.loose.contains(v));
        OpRow {
            id: live.id,
            fence: live.fence,
            verb: live.action.verb(),
            command: command::spell(&live.action),
            job: job.map(|j| j.0),
            volume,
            disk,
            parent: live.parent,
            detail: detail(live.epoch, None),
            step: "journal".into(),
            caller: (*live.caller).clone(),
            host: self.host,
            boot: self.devices.boot(),
            began: live.began,
            ended: None,
        }
    }

    async fn act(self: &Arc<Self>, live: &Live) -> Acted {
        self.on_proved_host().await?;
        self.on_true_record(live).await?;
        match (live.target, &live.action) {
            (super::Target::Volume(row), Action::Attach { vm, slot }) => self.attach(live, row, *vm, *slot).await,
            (super::Target::Volume(row), Action::Detach { vm, force }) => self.detach(live, row, *vm, *force).await,
            (super::Target::Volume(row), Action::Resize { size }) => self.resize(live, row, *size).await,
            (super::Target::Volume(row), Action::Snapshot { name, crash }) => {
                self.snapshot(live, row, name, *crash).await
            }
            (super::Target::Volume(row), Action::Revert { name }) => self.revert(live, row, name).await,
            (super::Target::Volume(row), Action::DeleteSnapshot { name }) => {
                self.delete_snapshot(live, row, name).await
            }
            (super::Target::Volume(row), Action::Delete { expunge, .. }) => self.delete(live, row, *expunge).await,
            (super::Target::Volume(row), Action::Release { .. }) => self.release(live, row).await,
            (super::Target::Volume(row), Action::Move { job }) => self.move_volume(live, row, job).await,
            (super::Target::Volume(row), Action::Disk { name }) => self.rename(live, row, name).await,
            (super::Target::Volume(row), Action::Claim { .. }) => self.claim_imported(live, row).await,
            (super::Target::Job(row), Action::Create { .. }) => self.create(live, row).await,
            (super::Target::Job(row), Action::Claim { volume, disk, from }) => {
                self.claim(live, row, *volume, disk.clone(), *from).await
            }
            (super::Target::Job(row), _) => self.whole_job(live, row).await,
            _ => {
                Err(Fail::clean(Error::Unsupported { provider: self.about.name, what: live.action.verb().to_string() }))
            }
        }
    }

    /// Names the step in `info.json` and `operations/`, and stops there if that was asked for.
    pub(super) fn step(&self, live: &Live, step: &str) -> Result<(), Fail> {
        if live.stopping() || !self.core.lock().owns(live) {
            return Err(Fail::clean(Error::Cancelled));
        }
        self.refusing()?;
        self.publish(|core, _| core.step(live.id, step));
        Ok(())
    }

    /// What goes with an operation's calls of the cloud.
    pub(super) fn call(&self, live: &Live) -> Call {
        let (engine, id) = (self.me.clone(), live.id);
        Call::new(live.fence, move |words| {
            if let Some(engine) = engine.upgrade() {
                engine.publish(|core, _| core.step(id, words));
            }
        })
    }

    /// The volume an operation is on.
    pub(super) fn owned(&self, row: DiskRow) -> Result<Arc<Volume>, Fail> {
        self.world().volumes.get(&row).cloned().ok_or_else(|| Fail::clean(Error::Stale))
    }

    /// Our mark on a volume.
    pub(super) fn mark(&self, volume: &Volume) -> Mark {
        Mark { record: self.record, epoch: volume.epoch }
    }

    /// Asks the kernel, from a worker thread where that may block.
    pub(super) async fn kernel<T: Send + 'static>(
        &self,
        ask: impl FnOnce(&dyn Devices) -> Result<T, DevicesError> + Send + 'static,
    ) -> Result<T, DevicesError> {
        if !self.devices.may_block() {
            return ask(&*self.devices);
        }
        let devices = self.devices.clone();
        match tokio::task::spawn_blocking(move || ask(&*devices)).await {
            Ok(answer) => answer,
            Err(error) => Err(DevicesError::Failed { what: "asking the kernel".into(), words: error.to_string() }),
        }
    }

    /// The disks that carry a volume's identity.
    pub(super) async fn candidates(&self, volume: VolumeId) -> Result<Vec<Disk>, DevicesError> {
        let mut disks = self.kernel(|devices| devices.disks()).await?;
        disks.retain(|disk| disk.identity.names(volume));
        Ok(disks)
    }

    /// The record works, or does not: `health` says so.
    pub(super) fn store_health(&self, failed: Option<&Error>) {
        let now = match failed {
            // That it works does not make it the last word.
            None => self.truth.health(),
            Some(error) => {
                tracing::error!("the record: {error}");
                Component::Down(error.to_string().into())
            }
        };
        if self.world().health.store != now {
            self.publish(|core, at| {
                core.world.health.store = now;
                core.world.health.at = at;
            });
        }
    }
}

impl Core {
    /// An operation that the journal did not take never was.
    fn forget_begun(&mut self, live: &Live, at: Timestamp) {
        self.end(live, Outcome::Failed, "it was not journaled, and nothing was started", at);
    }
}
