//! The engine: takes commands, runs operations, reconciles, publishes.
//!
//! ```text
//! fs ── submit ──► admission (pure) ──► Live ──► drive: journal, act, prove, record ──► Ticket
//!                      ▲                             │
//!     world() ◄── publish (the one place) ◄──────────┤◄── round / look_at / follow (reconcile)
//! ```
//! It knows traits only: [`Store`], [`Cloud`], [`Devices`], and a clock. Its one lock guards memory
//! work and is never held over an await, a commit or a callback. Every method here returns at once.

use std::panic::AssertUnwindSafe;
use std::sync::{Arc, Weak};
use std::time::Duration;

use arc_swap::ArcSwap;
use futures_util::FutureExt;
use parking_lot::Mutex;
use tokio::sync::Notify;

use crate::cloud::{About, Cloud};
use crate::command::{self, Action, Command};
use crate::devices::Devices;
use crate::error::{Errno, Error};
use crate::failpoint;
use crate::model::{
    Caller, DevNo, DiskRow, Fence, Holder, Incarnation, JobRow, MapRow, OpId, Outcome, RecordId, Status, Timestamp,
    Verb, VmId,
};
use crate::store::Store;

mod admission;
mod asked;
mod calls;
mod core;
mod decide;
mod detach;
pub mod events;
mod host;
mod imported;
mod inflight;
mod jobs;
mod missed;
mod operation;
mod owed;
mod ownership;
mod reconcile;
mod recovery;
mod round;
mod snapshots;
mod start;
mod stuck;
#[cfg(test)]
mod tests;
pub mod ticket;
mod truth;
mod views;
mod volume;
pub mod world;

pub use asked::{Asker, Earlier};
pub use events::Events;
pub use host::is_here;
pub use ticket::Ticket;
pub use world::{Component, World};

use admission::Verdict;
use core::Core;

/// The wall clock, as the engine takes it.
pub type Clock = Arc<dyn Fn() -> Timestamp + Send + Sync>;

/// Longest wait of a caller whose process volfs cannot see (contract, Commands).
const BLIND_WAIT: Duration = Duration::from_secs(100);

/// How the engine is set up.
#[derive(Clone)]
pub struct Options {
    /// Between rounds of reconciling.
    pub interval: Duration,
    /// Between two looks before a volume's absence is believed (row V6).
    pub absence_gap: Duration,
    /// Whether the kernel's size must equal the cloud's, or may be larger (rule D3).
    pub exact_size: bool,
    /// Why every changing command is EROFS, if it is.
    pub read_only: Option<String>,
    /// The reason is that the record is not this machine's: `health` is down for it.
    pub foreign: bool,
    /// Rows of `history` at the root.
    pub history: usize,
    /// Events for slow readers, those of an earlier daemon among them.
    pub events: Arc<Events>,
    /// The operations that callers of an earlier daemon still wait for.
    pub asked: Vec<Fence>,
    /// Wall clock.
    pub clock: Clock,
}

/// What a command was written to.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[allow(missing_docs)]
pub enum Target {
    Root,
    Job(JobRow),
    Volume(DiskRow),
}

/// A device verified against the kernel at this moment.
#[derive(Debug, Clone)]
pub struct DeviceNow {
    /// Kernel name; the node is `/dev/NAME`.
    pub name: Arc<str>,
    /// Number.
    pub dev: DevNo,
    /// Which insertion.
    pub incarnation: Incarnation,
    /// The mapping's row, for node ids of `block`.
    pub mapping: MapRow,
    /// Bytes.
    pub size: u64,
}

/// A submitted command.
#[derive(Clone)]
pub struct Submitted {
    /// The outcome.
    pub ticket: Ticket,
    /// How long this caller waits at most; `None`: until a signal.
    pub deadline: Option<Duration>,
    /// The operation behind it, if one runs: for the sentence when the caller stops waiting.
    pub op: Option<OpId>,
    /// That operation's identity: the caller's own, or that of the one it has joined.
    pub fence: Option<Fence>,
}

impl Submitted {
    fn unjournaled(ticket: Ticket) -> Self {
        Self { ticket, deadline: None, op: None, fence: None }
    }
}

/// Why a caller stops waiting.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Left {
    /// A signal: EINTR.
    Interrupted,
    /// The deadline: ETIMEDOUT.
    TimedOut(Duration),
}

/// The core. Made by [`Engine::start`].
pub struct Engine {
    me: Weak<Engine>,
    core: Mutex<Core>,
    world: ArcSwap<World>,
    events: Arc<Events>,
    watchers: Mutex<Vec<Watcher>>,
    store: Arc<dyn Store>,
    cloud: Arc<dyn Cloud>,
    devices: Arc<dyn Devices>,
    clock: Clock,
    about: About,
    host: VmId,
    record: RecordId,
    exact_size: bool,
    interval: Duration,
    absence_gap: Duration,
    truth: truth::Truth,
    proof: Mutex<host::Proof>,
    cloud_seen: Mutex<tokio::time::Instant>,
    runtime: tokio::runtime::Handle,
    round_wanted: Arc<Notify>,
    closing: Arc<Notify>,
    rounds: tokio::sync::Mutex<()>,
    rounds_ended: tokio::sync::watch::Sender<u64>,
    asked: Mutex<asked::Asked>,
    owed: tokio::sync::Mutex<owed::Owed>,
    stuck: stuck::Stuck,
}

type Watcher = Arc<dyn Fn(&Arc<World>) + Send + Sync>;

impl Engine {
    /// The published snapshot.
    pub fn world(&self) -> Arc<World> {
        self.world.load_full()
    }

    /// The event stream.
    pub fn events(&self) -> &Events {
        &self.events
    }

    /// Calls `f` after each publish, on the publishing thread, outside the engine's locks.
    pub fn on_publish(&self, f: Watcher) {
        self.watchers.lock().push(f);
    }

    /// Admits a command and starts it. An immediate refusal is a ticket that is done.
    pub fn submit(&self, target: Target, command: Command, asker: impl Into<Asker>) -> Submitted {
        let Asker { caller, fence } = asker.into();
        let wanted = command.timeout.map_or(command.action.verb().default_timeout(), |t| (!t.is_zero()).then_some(t));
        let deadline = if caller.pid == 0 { Some(wanted.map_or(BLIND_WAIT, |t| t.min(BLIND_WAIT))) } else { wanted };
        let nowait = command.nowait;
        let submitted = self.try_submit(target, command.action, (&Arc::new(caller), fence), None, true);
        let ticket = match submitted.op {
            Some(id) if nowait => self.core.lock().live.get(&id).map_or(submitted.ticket, |l| l.journaled.clone()),
            _ => submitted.ticket,
        };
        Submitted { ticket, deadline, ..submitted }
    }

    /// As [`Engine::submit`], as a part of a job's operation.
    fn submit_as(&self, target: Target, action: Action, caller: &Arc<Caller>, parent: Option<OpId>) -> Submitted {
        self.try_submit(target, action, (caller, Fence::random()), parent, true)
    }

    fn try_submit(
        &self,
        target: Target,
        action: Action,
        (caller, fence): (&Arc<Caller>, Fence),
        parent: Option<OpId>,
        reconcile_first: bool,
    ) -> Submitted {
        let done = |outcome| Submitted::unjournaled(Ticket::done(outcome));
        let Some(engine) = self.me.upgrade() else { return done(Err(Error::ShuttingDown)) };
        if let Err(error) = self.changing() {
            self.note_failure(target, action.verb().as_str(), caller, &error);
            return done(Err(error));
        }
        let verb = action.verb();
        // Decided and begun under one lock, so that two equal commands cannot both start.
        let (verdict, begun) = {
            let mut core = self.core.lock();
            let verdict = self.decide(&core, target, &action, caller, parent);
            let journaled = !matches!(verb, Verb::Reconcile | Verb::Cancel | Verb::Abandon);
            let begun = (verdict == Verdict::Start && journaled).then(|| {
                let at = (self.clock)();
                core.watch_vm(&action, self.host);
                core.begin(target, action.clone(), caller.clone(), fence, parent, at)
            });
            (verdict, begun)
        };
        if let Some(live) = begun {
            self.publish(|_, _| ());
            let (ticket, id) = (live.ticket.clone(), live.id);
            self.runtime.spawn(engine.drive(live));
            return Submitted { ticket, deadline: None, op: Some(id), fence: Some(fence) };
        }
        match verdict {
            Verdict::Join(id) => {
                let ticket = self.publish(|core, _| {
                    core.joined(id);
                    core.live.get(&id).map(|l| (l.ticket.clone(), l.fence))
                });
                // It ended between the two locks: its outcome is in the record, ask again.
                match ticket {
                    Some((ticket, fence)) => Submitted { ticket, deadline: None, op: Some(id), fence: Some(fence) },
                    None => self.try_submit(target, action, (caller, fence), parent, reconcile_first),
                }
            }
            Verdict::AlreadyDone => {
                self.publish(|core, at| core.clear_error(target, verb, at));
                done(Ok(()))
            }
            Verdict::Deny(error) => {
                self.note_failure(target, verb.as_str(), caller, &error);
                done(Err(error))
            }
            Verdict::Start => done_later(&self.runtime, {
                let caller = caller.clone();
                async move { engine.unjournaled(target, action, &caller).await }
            }),
            Verdict::Reconcile => done_later(&self.runtime, {
                let caller = caller.clone();
                async move { engine.reconcile_then(target, action, (&caller, fence), parent, reconcile_first).await }
            }),
        }
    }

    /// Row R of the table: find out, then ask again once.
    async fn reconcile_then(
        self: Arc<Self>,
        target: Target,
        action: Action,
        (caller, fence): (&Arc<Caller>, Fence),
        parent: Option<OpId>,
        first: bool,
    ) -> Result<(), Error> {
        let unknown: Vec<DiskRow> = {
            let world = self.world();
            let rows: Vec<DiskRow> = match target {
                Target::Volume(row) => vec![row],
                // A job's commands look through those of its volumes, or not at all (X10).
                Target::Job(_) | Target::Root => Vec::new(),
            };
            let unclear = |row: &DiskRow| world.volumes.get(row).is_some_and(|v| v.base == Status::Unknown);
            rows.into_iter().filter(unclear).collect()
        };
        let mut outcome = Ok(());
        for row in unknown {
            let settled = self.settle_volume(row).await;
            outcome = outcome.and(settled);
        }
        if let (Err(error), true) | (Err(error), false) = (&outcome, first)
            && matches!(error, Error::NotSettled { status: Status::Unknown, .. })
        {
            self.note_failure(target, action.verb().as_str(), caller, error);
            return outcome;
        }
        if !first {
            let error = Error::CannotTell { why: "it became unknown again while it was reconciled".into() };
            self.note_failure(target, action.verb().as_str(), caller, &error);
            return Err(error);
        }
        self.try_submit(target, action, (caller, fence), parent, false).ticket.wait().await
    }

    /// Commands that change nothing by themselves, and are not journaled.
    async fn unjournaled(self: Arc<Self>, target: Target, action: Action, caller: &Caller) -> Result<(), Error> {
        let verb = action.verb();
        let outcome = match (target, &action) {
            (Target::Volume(row), Action::Reconcile { .. }) => self.settle_volume(row).await,
            (_, Action::Reconcile { vm }) => {
                if let Some(vm) = vm {
                    self.publish(|core, _| core.watch(*vm));
                }
                self.settle_all(*vm).await
            }
            (Target::Job(row), Action::Cancel { id: None }) => self.cancel_job(row),
            (_, Action::Cancel { id: Some(id) }) => self.cancel(*id),
            (_, Action::Abandon { id }) => self.abandon(*id, caller).await,
            _ => Err(Error::Internal { what: format!("`{verb}` has no way to be done here") }),
        };
        match &outcome {
            Ok(()) => self.publish(|core, at| core.clear_error(target, verb, at)),
            Err(error) => self.note_failure(target, verb.as_str(), caller, error),
        }
        outcome
    }

    /// Whether commands are taken at all.
    fn changing(&self) -> Result<(), Error> {
        if let Some(why) = self.truth.refusing() {
            return Err(Error::ReadOnly { why: why.to_string() });
        }
        if !self.core.lock().accepting {
            return Err(Error::ShuttingDown);
        }
        Ok(())
    }

    /// Whether a command would be let in now, for reading `control`: `Err` says why not.
    pub fn would(&self, target: Target, action: &Action) -> Result<(), Error> {
        self.changing()?;
        let caller = Caller::daemon();
        match self.decide(&self.core.lock(), target, action, &caller, None) {
            Verdict::Deny(error) => Err(error),
            _ => Ok(()),
        }
    }

    /// A failure's sentence goes to `error` and the log.
    pub fn note_failure(&self, target: Target, verb: &str, caller: &Caller, error: &Error) {
        self.publish(|core, at| core.note_error(target, verb, caller, error, at));
    }

    /// A caller stopped waiting: `error` says so, and a destroy stops before its next volume.
    pub fn caller_left(&self, target: Target, verb: Verb, op: Option<OpId>, caller: &Caller, left: Left) -> Errno {
        let error = match left {
            Left::Interrupted => Error::Interrupted,
            Left::TimedOut(after) => Error::TimedOut { seconds: after.as_secs(), id: op.unwrap_or(OpId(0)) },
        };
        if left == Left::Interrupted
            && verb == Verb::Destroy
            && let Some(live) = op.and_then(|id| self.core.lock().live.get(&id).cloned())
        {
            live.stop.store(true, std::sync::atomic::Ordering::SeqCst);
        }
        self.note_failure(target, verb.as_str(), caller, &error);
        error.errno()
    }

    fn cancel(&self, id: OpId) -> Result<(), Error> {
        let live = self.core.lock().live.get(&id).cloned().ok_or(Error::NoSuchOperation { id })?;
        live.stop.store(true, std::sync::atomic::Ordering::SeqCst);
        Ok(())
    }

    fn cancel_job(&self, row: JobRow) -> Result<(), Error> {
        let running: Vec<Arc<std::sync::atomic::AtomicBool>> = {
            let core = self.core.lock();
            let job = core.world.jobs.get(&row).ok_or(Error::Departed)?;
            core.live.get(&job.running.unwrap_or(OpId(0))).map(|l| l.stop.clone()).into_iter().collect()
        };
        // Nothing running is nothing to stop: that is success.
        for stop in running {
            stop.store(true, std::sync::atomic::Ordering::SeqCst);
        }
        Ok(())
    }

    /// C14: ends an operation in the record; whatever it still brings is a late answer.
    async fn abandon(&self, id: OpId, caller: &Caller) -> Result<(), Error> {
        let live = self.core.lock().live.get(&id).cloned().ok_or(Error::NoSuchOperation { id })?;
        // What the journal has not taken yet has no end there either.
        if live.journaled.wait().await.is_err() {
            return Err(Error::NoSuchOperation { id });
        }
        if !live.take_end() {
            let running = command::spell(&live.action);
            return Err(Error::InFlight {
                running,
                id,
                object: "the record: it has its answer and ends by itself".into(),
            });
        }
        let at = (self.clock)();
        let error = Error::Abandoned { id };
        let sentence = format!("abandoned by uid {} (pid {})", caller.uid, caller.pid);
        let mut changes = Vec::new();
        if let Target::Volume(row) = live.target
            && let Some(volume) = self.world().volumes.get(&row)
        {
            changes.push(crate::store::Change::VolumeStatus { volume: volume.uuid, status: Status::Unknown, at });
        }
        changes.push(crate::store::Change::OpEnd { id, outcome: Outcome::Abandoned, sentence: sentence.clone(), at });
        if let Err(error) = self.store.commit(changes).await {
            // It is given back: to an answer that came meanwhile and waits for it, or to the next abandon.
            live.ending.store(false, std::sync::atomic::Ordering::SeqCst);
            return Err(Error::NotJournaled { what: format!("`abandon {id}`"), words: error.to_string() });
        }
        live.stop.store(true, std::sync::atomic::Ordering::SeqCst);
        self.publish(|core, at| {
            core.world.counters.abandoned += 1;
            if let Target::Volume(row) = live.target {
                core.with_volume(row, at, |v| {
                    v.base = Status::Unknown;
                    v.recorded = Status::Unknown;
                    v.why = Some("its operation was abandoned: `reconcile` it".into());
                });
            }
            core.end(&live, Outcome::Abandoned, &sentence, at);
            core.note_error(live.target, live.action.verb().as_str(), &live.caller, &error, at);
        });
        live.ticket.complete(Err(error));
        Ok(())
    }

    /// The device of a volume, verified now against the kernel's memory. Never blocks.
    pub fn device(&self, volume: DiskRow) -> Result<DeviceNow, Error> {
        let world = self.world.load();
        let volume = world.volumes.get(&volume).ok_or(Error::Departed)?;
        verified(volume).ok_or(Error::NoDevice { volume: volume.uuid, status: volume.status() })
    }

    /// The device of a mapping, verified now; `NoDevice` or `Departed` when it has ended. Never blocks.
    pub fn mapped(&self, mapping: MapRow) -> Result<DeviceNow, Error> {
        let world = self.world.load();
        let volume = world.by_mapping.get(&mapping).and_then(|row| world.volumes.get(row)).ok_or(Error::Departed)?;
        match verified(volume) {
            Some(now) if now.mapping == mapping => Ok(now),
            _ => Err(Error::NoDevice { volume: volume.uuid, status: volume.status() }),
        }
    }

    /// Who has the device, from a walk of /proc that callers share. Empty: nobody, or no device.
    /// `CannotTell` where there may be a device that is not verified (rule R9).
    pub fn holders(&self, volume: DiskRow) -> Ticket<Arc<Vec<Holder>>> {
        let dev = match self.world().volumes.get(&volume) {
            None => return Ticket::done(Err(Error::Departed)),
            Some(volume) if matches!(volume.base, Status::Unknown | Status::Conflict) => {
                let why = format!("volume {} is {}, and so is its device", volume.uuid, volume.base);
                return Ticket::done(Err(Error::CannotTell { why }));
            }
            Some(volume) => volume.mapping.as_ref().filter(|m| m.pin.alive()).map(|m| m.dev),
        };
        let Some(dev) = dev else { return Ticket::done(Ok(Arc::new(Vec::new()))) };
        let Some(engine) = self.me.upgrade() else { return Ticket::done(Err(Error::ShuttingDown)) };
        let ticket = Ticket::default();
        let answer = ticket.clone();
        self.runtime.spawn(async move {
            let holders = engine.kernel(move |devices| devices.holders(dev)).await;
            answer.complete(holders.map(Arc::new).map_err(|e| Error::CannotTell { why: e.to_string() }));
        });
        ticket
    }

    /// Whoever would start the next daemon is gone: `health` says so.
    pub fn nobody_follows(&self) {
        let words = "the keeper is gone: when this daemon dies, its mount ends and callers get ENOTCONN";
        tracing::error!("{words}");
        self.publish(|core, at| {
            core.world.health.keeper = Component::Degraded(words.into());
            core.world.health.at = at;
        });
    }

    /// Refuses commands from now on. What runs is left to the journal; its waiters are the caller's
    /// to answer.
    pub fn shut_down(&self) {
        self.core.lock().accepting = false;
        self.closing.notify_waiters();
        // A round that is not waiting yet finds the permit when it comes to wait.
        self.closing.notify_one();
    }
}

/// The device that a volume shows, if the kernel confirms it.
fn verified(volume: &world::Volume) -> Option<DeviceNow> {
    let mapping = volume.device()?;
    // The failpoint serves the snapshot unchecked: to see that this is noticed.
    (mapping.pin.alive() || failpoint::hit("engine.no-check")).then(|| DeviceNow {
        name: mapping.name.clone(),
        dev: mapping.dev,
        incarnation: mapping.incarnation,
        mapping: mapping.row,
        size: mapping.size,
    })
}

fn done_later(
    runtime: &tokio::runtime::Handle,
    work: impl Future<Output = Result<(), Error>> + Send + 'static,
) -> Submitted {
    let ticket = Ticket::default();
    let answer = ticket.clone();
    runtime.spawn(async move {
        let outcome = AssertUnwindSafe(work).catch_unwind().await;
        let defect = || Err(Error::Internal { what: "a defect in volfs stopped the command: see the log".into() });
        answer.complete(outcome.unwrap_or_else(|_| defect()));
    });
    Submitted::unjournaled(ticket)
}

impl Core {
    /// A VM that a command named is listed from now on.
    fn watch(&mut self, vm: VmId) {
        if !self.world.vms.contains_key(&vm) {
            self.world.vms.insert(vm, Arc::default());
        }
    }

    fn watch_vm(&mut self, action: &Action, host: VmId) {
        if let Action::Attach { vm: Some(vm), .. } | Action::Detach { vm: Some(vm), .. } = action
            && *vm != host
        {
            self.watch(*vm);
        }
    }

    fn joined(&mut self, id: OpId) {
        if let Some(op) = self.world.operations.get(&id) {
            let mut op = (**op).clone();
            op.joined += 1;
            self.world.operations.insert(id, Arc::new(op));
        }
    }
}
