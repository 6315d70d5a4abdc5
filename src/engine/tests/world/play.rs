//! Plays a schedule on the real engine, and holds what comes of it against the books.

use std::collections::{BTreeMap, HashMap};
use std::sync::Arc;
use std::time::Duration;

use super::plan::{Cmd, Hand, Step};
use super::{GIB, Port, Sim, Vol};
use crate::command::{Action, Command};
use crate::engine::tests::fakes::{Own, disk_name, job_id, root};
use crate::engine::{Engine, Options, Submitted, Target, Ticket};
use crate::model::{
    DiskRow, JobRow, Mark, OpId, Outcome, RecordId, Slot, Status, Timestamp, Verb, VolumeId, VolumeRow,
};
use crate::store::Change;

/// What a schedule has come to.
pub struct Played {
    pub violations: Vec<String>,
    pub trace: Vec<String>,
    pub edges: BTreeMap<(Status, Status), u64>,
    pub ends: HashMap<(Verb, Outcome), u64>,
    pub lives: u64,
    /// A number that any other course of things would have made another.
    pub print: u64,
}

/// Plays it in a world of its own.
pub fn play(seed: u64, steps: &[Step], traced: bool) -> Played {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_time().start_paused(true).build().unwrap();
    runtime.block_on(async {
        let sim = Sim::new(seed, traced);
        let mut game = Game::new(sim).await;
        for step in steps {
            game.step(*step).await;
            if game.over() {
                break;
            }
        }
        if !game.over() {
            game.rest().await;
        }
        game.finish()
    })
}

struct Game {
    sim: Sim,
    engine: Arc<Engine>,
    /// The life of `engine`.
    life: u64,
    volumes: Vec<VolumeId>,
    theirs: Mark,
    made: u64,
    waiting: Vec<(OpId, Ticket)>,
    lives: u64,
}

impl Game {
    async fn new(sim: Sim) -> Self {
        let theirs = {
            let mut state = sim.state();
            Mark { record: RecordId(state.dice.uuid()), epoch: 3 }
        };
        let volumes = fill(&sim, theirs);
        let (engine, life) = begin(&sim);
        engine.first_round().await;
        Game { sim, engine, life, volumes, theirs, made: 0, waiting: Vec::new(), lives: 1 }
    }

    fn over(&self) -> bool {
        !self.sim.state().book.violations.is_empty()
    }

    fn wrong(&self, words: String) {
        self.sim.violation(words);
    }

    fn finish(self) -> Played {
        let now = self.sim.now();
        let mut state = self.sim.state();
        let mut print = now ^ (state.dice.roll(u64::MAX) << 1);
        for (id, op) in &state.record.ops {
            let end = op.ended.as_ref().map_or(0, |(outcome, _, at)| at.0 as u64 ^ (*outcome as u64));
            print = print.rotate_left(7) ^ (id.0 as u64) ^ end;
        }
        let book = std::mem::take(&mut state.book);
        let trace = state.trace.take().unwrap_or_default();
        Played { violations: book.violations, trace, edges: book.edges, ends: book.ends, lives: self.lives, print }
    }

    async fn step(&mut self, step: Step) {
        if self.sim.state().life != self.life {
            self.restart().await;
        }
        self.sim.say(|| format!("-- {step:?}"));
        match step {
            Step::Do(n, cmd) => self.command(n, cmd),
            Step::Arm(at, fault) => self.sim.state().armed.push((at, fault)),
            Step::Hand(n, hand) => self.hand(n, hand),
            Step::Pull(n) => {
                let volume = self.volume(n);
                self.sim.touched(volume);
                self.sim.pull(volume);
            }
            Step::Lazy(on) => {
                self.sim.state().kernel.lazy = on;
                self.disturb();
                if !on {
                    self.sim.follow_all();
                }
            }
            Step::Muted(on) => {
                self.sim.state().kernel.muted = on;
                self.disturb();
            }
            Step::Use(n) => {
                let volume = self.volume(n);
                let mut state = self.sim.state();
                let kernel = &mut state.kernel;
                let dev = kernel.disks.iter().find(|p| p.volume == volume).map(|p| p.disk.dev);
                match dev.and_then(|dev| kernel.used.iter().position(|d| *d == dev)) {
                    Some(place) => drop(kernel.used.remove(place)),
                    None => kernel.used.extend(dev),
                }
            }
            Step::Abandon | Step::Cancel => {
                let id = self.engine.world().operations.values().rev().find(|op| op.ended.is_none()).map(|op| op.id);
                if let Some(id) = id {
                    let action = match step {
                        Step::Abandon => Action::Abandon { id },
                        _ => Action::Cancel { id: Some(id) },
                    };
                    self.submit(Target::Root, action);
                }
            }
            Step::Kill => self.sim.kill(),
            Step::Reboot => {
                self.sim.kill();
                self.sim.reboot();
                self.disturb();
                self.sim.follow_all();
            }
            Step::Import(n) => {
                self.sim.kill();
                self.import(self.volume(n));
            }
            Step::Pass(ms) => {
                tokio::time::sleep(Duration::from_millis(ms)).await;
                self.check();
            }
        }
    }

    /// What is known of every volume may be out of date for a while.
    fn disturb(&self) {
        let all: Vec<VolumeId> = self.sim.state().sky.volumes.keys().copied().collect();
        for volume in all {
            self.sim.touched(volume);
        }
    }

    async fn restart(&mut self) {
        self.sim.state().book.calm.clear();
        self.waiting.clear();
        (self.engine, self.life) = begin(&self.sim);
        self.lives += 1;
    }

    fn volume(&self, n: usize) -> VolumeId {
        self.volumes[n % self.volumes.len()]
    }

    fn submit(&mut self, target: Target, action: Action) {
        let Submitted { ticket, op, .. } =
            self.engine.submit(target, Command { action, timeout: None, nowait: false }, root());
        self.waiting.extend(op.map(|op| (op, ticket)));
    }

    fn command(&mut self, n: usize, cmd: Cmd) {
        let volume = self.volume(n);
        let world = self.engine.world();
        let row = world.by_uuid.get(&volume).copied();
        let owner = row.and_then(|row| world.volumes.get(&row)).map(|v| v.job);
        let Some(job) = owner.or_else(|| world.jobs.keys().next().copied()) else { return };
        let other = Some(self.sim.0.other);
        let name = world.jobs[&job].id.clone();
        let on_volume = match cmd {
            Cmd::Attach => Action::Attach { vm: None, slot: None },
            Cmd::AttachThere => Action::Attach { vm: other, slot: None },
            Cmd::AttachAt(n) => Action::Attach { vm: other, slot: Some(if n == 0 { Slot::Root } else { Slot::Id(n) }) },
            Cmd::Detach => Action::Detach { vm: None, force: false },
            Cmd::DetachThere => Action::Detach { vm: other, force: false },
            Cmd::DetachForce => Action::Detach { vm: None, force: true },
            Cmd::Resize(n) => Action::Resize { size: n * GIB },
            Cmd::Delete => Action::Delete { volume, expunge: false },
            Cmd::Release => Action::Release { volume },
            Cmd::Move => Action::Move { job: job_id(if name == job_id("j") { "k" } else { "j" }) },
            Cmd::Reconcile => Action::Reconcile { vm: None },
            Cmd::Claim => {
                return self.submit(Target::Job(job), Action::Claim { volume, disk: None, from: None });
            }
            Cmd::Create => {
                self.made += 1;
                let disk = disk_name(&format!("new{}", self.made));
                let action = Action::Create { disk, size: GIB, offering: None, zone: None, name: Some("v".into()) };
                return self.submit(Target::Job(job), action);
            }
            Cmd::AttachAll => return self.submit(Target::Job(job), Action::Attach { vm: None, slot: None }),
            Cmd::DetachAll => return self.submit(Target::Job(job), Action::Detach { vm: None, force: false }),
            Cmd::Destroy => return self.submit(Target::Job(job), Action::Destroy { job: name }),
        };
        if let Some(row) = row {
            self.submit(Target::Volume(row), on_volume);
        }
    }

    fn hand(&self, n: usize, hand: Hand) {
        let (host, other) = (self.sim.host(), self.sim.0.other);
        let volume = self.volume(n);
        let mark = self.sim.our_mark(volume);
        {
            let mut state = self.sim.state();
            let Some(v) = state.sky.volumes.get_mut(&volume) else { return };
            // The cloud does one thing at a time with a volume, whoever asks; tags are no job.
            let tags = matches!(hand, Hand::TakeMark | Hand::Unmark | Hand::GiveBack | Hand::Rival);
            if v.pending.is_some() && !tags {
                return;
            }
            match (hand, v.attached) {
                (Hand::Detach, _) => v.attached = None,
                (Hand::AttachHere | Hand::AttachThere, Some(_)) => return,
                (Hand::AttachHere, None) => v.attached = Some((host, 1)),
                (Hand::AttachThere, None) => v.attached = Some((other, 1)),
                (Hand::Delete, Some(_)) => return,
                (Hand::Delete, None) => drop(state.sky.volumes.remove(&volume)),
                (Hand::TakeMark, _) => v.mark = Some(self.theirs),
                (Hand::Unmark, _) => v.mark = None,
                // An epoch 0 is on no volume.
                (Hand::GiveBack, _) => v.mark = mark.filter(|m| m.epoch > 0),
                (Hand::Rival, _) if v.mark.is_some() => return,
                (Hand::Rival, _) => v.mark = Some(self.theirs),
            }
            if matches!(hand, Hand::AttachHere | Hand::AttachThere)
                && let Some(v) = state.sky.volumes.get_mut(&volume)
            {
                v.insertion += 1;
            }
        }
        self.sim.touched(volume);
        let after = self.sim.latency(3000);
        self.sim.follow_later(volume, after);
    }

    /// What `volfs import` leaves in the record, while no daemon runs.
    fn import(&self, volume: VolumeId) {
        let at = Timestamp(0);
        let mut state = self.sim.state();
        let record = &mut state.record;
        if record.owns.values().any(|own| own.volume == volume) {
            return;
        }
        let mut batch = Vec::new();
        let living = record.jobs.iter().find(|(_, job)| !job.forgotten).map(|(row, _)| *row);
        let job = living.unwrap_or(JobRow(record.high[0] + 1));
        if living.is_none() {
            batch.push(Change::JobAdd { row: job, id: job_id("imported"), at });
        }
        let row = DiskRow(record.high[2] + 1);
        let disk = disk_name(&format!("imported{}", row.0));
        batch.extend([
            Change::VolumeAdd { row: VolumeRow(record.high[1] + 1), volume, name: "v".into(), size: GIB, at },
            Change::VolumeStatus { volume, status: Status::Unknown, at },
            Change::DiskAdd { row, job, disk, volume, epoch: 0, at },
        ]);
        record.take(&batch).unwrap();
    }

    /// What must hold at every moment.
    fn check(&mut self) {
        if self.sim.state().life != self.life {
            return;
        }
        let world = self.engine.world();
        for (row, volume) in &world.volumes {
            self.sees(*row, volume.uuid);
            let calm = self.sim.state().book.calm.get(&volume.uuid).copied();
            if let (Some(calm), None) = (calm, volume.running)
                && volume.base != calm.status
            {
                self.wrong(format!("s9: {} was proved {}, and is shown {}", volume.uuid, calm.status, volume.base));
            }
            if world.by_uuid.get(&volume.uuid) != Some(row) {
                self.wrong(format!("{row} is not found by its uuid"));
            }
        }
        let mut busy = std::collections::BTreeSet::new();
        for op in world.operations.values().filter(|op| op.ended.is_none()) {
            if let Some(volume) = op.volume.filter(|v| world.by_uuid.contains_key(v))
                && !busy.insert(volume)
            {
                self.wrong(format!("two operations on {volume}"));
            }
        }
        self.answers();
    }

    /// S1: what is served as a device is that volume's, at that moment, and the only one.
    fn sees(&self, row: DiskRow, volume: VolumeId) {
        let Ok(now) = self.engine.device(row) else { return };
        let state = self.sim.state();
        let mut own = state.kernel.disks.iter().filter(|p| p.volume == volume);
        let right = own.next().is_some_and(|p| (p.disk.incarnation, &p.disk.name) == (now.incarnation, &now.name));
        let only = own.next().is_none();
        drop(state);
        if !right || !only {
            self.wrong(format!("s1: {volume} is served as {now:?}"));
        }
    }

    /// What a caller was told is in the record.
    fn answers(&mut self) {
        let mut wrong = Vec::new();
        let sim = self.sim.clone();
        self.waiting.retain(|(id, ticket)| {
            let Some(outcome) = ticket.outcome() else { return true };
            let state = sim.state();
            let recorded = state.record.ops.get(id).and_then(|op| op.ended.as_ref()).map(|(outcome, ..)| *outcome);
            if outcome.is_ok() && recorded != Some(Outcome::Done) {
                wrong.push(format!("s7: {id} was acknowledged, and is recorded as {recorded:?}"));
            }
            false
        });
        for words in wrong {
            self.wrong(words);
        }
    }

    /// With the faults over everything comes to rest by itself, and the truth is told.
    async fn rest(&mut self) {
        self.sim.say(|| "-- rest".into());
        {
            let mut state = self.sim.state();
            state.armed.clear();
            state.kernel.lazy = false;
            state.kernel.muted = false;
            state.kernel.used.clear();
        }
        if self.sim.state().life != self.life {
            self.restart().await;
        }
        self.sim.follow_all();
        let ended = |sim: &Sim| {
            let state = sim.state();
            state.sky.jobs.is_empty() && state.record.ops.values().all(|op| op.ended.is_some())
        };
        let began = self.sim.now();
        while !ended(&self.sim) || !self.waiting.iter().all(|(_, t)| t.outcome().is_some()) {
            if self.sim.now() - began > 1_800_000 {
                return self.wrong("an operation never ends".into());
            }
            tokio::time::sleep(Duration::from_secs(5)).await;
        }
        if self.engine.world().volumes.values().any(|v| v.imported()) {
            // What was refused is tried again at once.
            let command = Command { action: Action::Reconcile { vm: None }, timeout: None, nowait: false };
            let _ = self.engine.submit(Target::Root, command, root()).ticket.wait().await;
        }
        tokio::time::sleep(Duration::from_secs(140)).await;
        self.check();
        self.truth();
        self.again().await;
    }

    fn truth(&self) {
        let world = self.engine.world();
        for volume in world.volumes.values() {
            let uuid = volume.uuid;
            if let Some(running) = volume.running {
                self.wrong(format!("{uuid} is at rest, and shows {running:?}"));
            }
            let seen = self.sim.shown(uuid);
            let ours = Mark { record: self.sim.0.record, epoch: volume.epoch };
            let truth = match &seen {
                None => Status::Missing,
                Some(seen) if volume.imported() && seen.mark.is_none() => {
                    self.wrong(format!("{uuid} was imported, carries no mark, and is not claimed"));
                    continue;
                }
                Some(seen) if seen.mark != Some(ours) => Status::Conflict,
                Some(seen) => match seen.attached.map(|a| a.vm) {
                    None => Status::Detached,
                    Some(vm) if vm == self.sim.host() => Status::Attached,
                    Some(_) => Status::Remote,
                },
            };
            let recorded = self.sim.state().record.volumes.get(&uuid).map(|v| v.status);
            if volume.status() != truth || recorded != Some(truth) {
                let shown = volume.status();
                self.wrong(format!("{uuid} is {truth}, is shown {shown} and recorded {recorded:?}: {:?}", volume.why));
            }
        }
        if world.jobs.values().any(|job| job.running.is_some() || !job.creating.is_empty()) {
            self.wrong("a job is at rest, and shows an operation".into());
        }
        let state = self.sim.state();
        let marked = |v: &Vol| v.mark.is_some_and(|m| m.record == self.sim.0.record);
        let lost: Vec<VolumeId> = state
            .sky
            .volumes
            .iter()
            .filter(|(id, v)| marked(v) && !world.by_uuid.contains_key(*id) && !world.unclaimed.contains_key(*id))
            .map(|(id, _)| *id)
            .collect();
        drop(state);
        for volume in lost {
            self.wrong(format!("{volume} carries our mark, and is shown nowhere"));
        }
    }

    /// L2: reconciling what is settled changes nothing.
    async fn again(&mut self) {
        let shows = |engine: &Engine| {
            let world = engine.world();
            let of = |v: &crate::engine::world::Volume| {
                (v.row, v.status(), v.vm, v.size, v.mapping.as_ref().map(|m| m.row), v.why.clone())
            };
            world.volumes.values().map(|v| of(v)).collect::<Vec<_>>()
        };
        let before = (shows(&self.engine), self.sim.state().record.batches.len());
        let action = Action::Reconcile { vm: None };
        let command = Command { action, timeout: None, nowait: false };
        // What is in conflict makes it a failure, and is settled all the same.
        let _ = self.engine.submit(Target::Root, command, root()).ticket.wait().await;
        let after = (shows(&self.engine), self.sim.state().record.batches.len());
        if before != after {
            self.wrong(format!("l2: reconciling again changed {before:?} to {after:?}"));
        }
    }
}

/// A record with two jobs and two detached volumes, a cloud that agrees, and volumes of others.
fn fill(sim: &Sim, theirs: Mark) -> Vec<VolumeId> {
    let at = Timestamp(0);
    let mut state = sim.state();
    let state = &mut *state;
    for (row, name) in [(1, "j"), (2, "k")] {
        state.record.take(&[Change::JobAdd { row: JobRow(row), id: job_id(name), at }]).unwrap();
    }
    let mut volumes = Vec::new();
    let vol = |mark| Vol { size: GIB, attached: None, mark, pending: None, insertion: 0 };
    for n in 1..=2i64 {
        let volume = VolumeId(state.dice.uuid());
        let epoch = u64::try_from(n).unwrap();
        let batch = [
            Change::VolumeAdd { row: VolumeRow(n), volume, name: "v".into(), size: GIB, at },
            Change::VolumeStatus { volume, status: Status::Detached, at },
        ];
        state.record.take(&batch).unwrap();
        let own = Own { job: JobRow(1), disk: disk_name(&format!("d{n}")), volume, epoch, at };
        state.record.owns.insert(DiskRow(n), own);
        state.record.used(2, n);
        state.record.epoch = epoch;
        state.sky.volumes.insert(volume, vol(Some(Mark { record: sim.0.record, epoch })));
        volumes.push(volume);
    }
    for mark in [Some(theirs), None] {
        let volume = VolumeId(state.dice.uuid());
        state.sky.volumes.insert(volume, vol(mark));
        volumes.push(volume);
    }
    volumes
}

/// Begins the next life.
fn begin(sim: &Sim) -> (Arc<Engine>, u64) {
    let life = {
        let mut state = sim.state();
        state.life += 1;
        state.kernel.open.clear();
        state.book.statuses.clear();
        state.book.absent.clear();
        state.life
    };
    sim.say(|| "a daemon starts".into());
    let epoch = sim.0.epoch;
    let options = Options {
        interval: Duration::from_secs(60),
        absence_gap: Duration::from_secs(10),
        exact_size: true,
        read_only: None,
        foreign: false,
        history: 100,
        events: Arc::new(crate::engine::Events::new(10)),
        asked: Vec::new(),
        clock: Arc::new(move || Timestamp(1_800_000_000_000).plus(epoch.elapsed())),
    };
    let port = Arc::new(Port { sim: sim.clone(), life, writer: tokio::sync::Mutex::default() });
    let engine = Engine::start(port.clone(), port.clone(), port, options, tokio::runtime::Handle::current()).unwrap();
    let watch = sim.clone();
    let show = move |world: &crate::engine::World| {
        if watch.state().life == life {
            for volume in world.volumes.values() {
                watch.shows(volume.row, volume.uuid, volume.status());
            }
        }
    };
    show(&engine.world());
    engine.on_publish(Arc::new(move |world| show(world)));
    (engine, life)
}
