//! From the record to a running engine: load, verify by the kernel, take over what a crash left.

use std::collections::HashMap;
use std::sync::Arc;

use arc_swap::ArcSwap;
use imbl::{OrdMap, Vector};
use parking_lot::Mutex;
use tokio::sync::Notify;

use super::asked::Asked;
use super::core::Core;
use super::host::Proof;
use super::jobs::new_job;
use super::ownership::blank;
use super::recovery::overtaken;
use super::truth::Truth;
use super::world::{Component, Counters, Health, HistoryRow, Mapping, Times, Volume, World};
use super::{Engine, Options};
use crate::cloud::Cloud;
use crate::devices::Devices;
use crate::model::{Caller, Disk, JobId, OpId, Outcome, Status, Timestamp, Verb};
use crate::store::{DiskLoaded, Loaded, OpRow, Store, StoreError};

impl Engine {
    /// Loads the record, verifies what was attached against the kernel, takes over unfinished
    /// operations, and begins to reconcile. Blocking; called once, before the tree is served.
    /// `runtime` runs everything that waits.
    pub fn start(
        store: Arc<dyn Store>,
        cloud: Arc<dyn Cloud>,
        devices: Arc<dyn Devices>,
        options: Options,
        runtime: tokio::runtime::Handle,
    ) -> Result<Arc<Engine>, StoreError> {
        let loaded = store.load(options.history)?;
        let about = cloud.about().clone();
        let at = (options.clock)();
        let read_only: Option<Arc<str>> = options.read_only.as_deref().map(Into::into);
        let world = empty_world(&loaded, &about, &*devices, read_only.clone(), at);
        let mut next = loaded.next;
        // An epoch that is only in an operation may be on a volume already.
        let journaled = loaded.unfinished.iter().chain(loaded.history.iter().map(|(op, _)| op));
        next.epoch = next.epoch.max(journaled.map(|op| op.epoch() + 1).max().unwrap_or(0));
        let mut core = Core::new(world, next, options.history);
        core.continued = options.events.position() > 0;
        if let (true, Some(why)) = (options.foreign, &read_only) {
            core.world.health.store = Component::Down(why.clone());
        }
        let disks = devices.disks();
        if let Err(error) = &disks {
            core.world.health.devices = Component::Down(error.to_string().into());
        }
        core.fill(&loaded, &disks.unwrap_or_default(), &*devices, about.host, at);
        let unfinished: Vec<OpRow> = loaded.unfinished.clone();
        let world = Arc::new(core.world.clone());
        let asked = Mutex::new(Asked::ended(&options.asked, &loaded));
        let proof = if about.prove_host { Proof::Unseen } else { Proof::NotNeeded };
        let engine = Arc::new_cyclic(|me| Engine {
            me: me.clone(),
            core: Mutex::new(core),
            world: ArcSwap::new(world),
            events: options.events,
            watchers: Mutex::new(Vec::new()),
            store,
            cloud,
            devices,
            clock: options.clock,
            host: about.host,
            about,
            record: loaded.record,
            exact_size: options.exact_size,
            interval: options.interval,
            absence_gap: options.absence_gap,
            truth: Truth::new(read_only, options.foreign),
            proof: Mutex::new(proof),
            cloud_seen: Mutex::new(tokio::time::Instant::now()),
            runtime: runtime.clone(),
            round_wanted: Arc::new(Notify::new()),
            closing: Arc::new(Notify::new()),
            rounds: tokio::sync::Mutex::new(()),
            rounds_ended: tokio::sync::watch::Sender::new(0),
            asked,
        });
        if engine.truth.refusing().is_none() {
            let (ended, unfinished): (Vec<OpRow>, Vec<OpRow>) =
                unfinished.iter().cloned().partition(|row| overtaken(row, &unfinished));
            for row in ended {
                let engine = engine.clone();
                runtime.spawn(async move { engine.close_overtaken(&row).await });
            }
            for row in unfinished {
                match engine.take_over(&row) {
                    Some(live) => {
                        if options.asked.contains(&live.fence) {
                            engine.asked.lock().running(&live);
                        }
                        runtime.spawn(engine.clone().recover(live));
                    }
                    None => drop(runtime.spawn({
                        let engine = engine.clone();
                        async move { engine.close_stray(&row).await }
                    })),
                }
            }
        }
        runtime.spawn(engine.clone().follow());
        runtime.spawn(engine.clone().rounds());
        Ok(engine)
    }

    /// Resolves when the first round of reconciling has ended, well or not.
    pub async fn first_round(&self) {
        // The sender lives as long as the engine.
        let _ = self.rounds_ended.subscribe().wait_for(|ended| *ended > 0).await;
    }
}

fn empty_world(
    loaded: &Loaded,
    about: &crate::cloud::About,
    devices: &dyn Devices,
    read_only: Option<Arc<str>>,
    at: Timestamp,
) -> World {
    World {
        seq: 0,
        at,
        record: loaded.record,
        host: about.host,
        boot: devices.boot(),
        started: at,
        read_only,
        provider: about.name,
        most_disks: about.most_disks,
        jobs: OrdMap::new(),
        job_rows: OrdMap::new(),
        volumes: OrdMap::new(),
        by_uuid: OrdMap::new(),
        by_mapping: OrdMap::new(),
        by_device: OrdMap::new(),
        snapshots: OrdMap::new(),
        foreign_snapshots: OrdMap::new(),
        operations: OrdMap::new(),
        unclaimed: OrdMap::new(),
        vms: OrdMap::new(),
        history: Vector::new(),
        error: None,
        listed_at: at,
        health: Health {
            cloud: Component::Ok,
            store: Component::Ok,
            devices: Component::Ok,
            reconciler: Component::Ok,
            keeper: Component::Ok,
            at,
        },
        counters: Counters::default(),
    }
}

impl Core {
    fn fill(
        &mut self,
        loaded: &Loaded,
        disks: &[Disk],
        devices: &dyn Devices,
        host: crate::model::VmId,
        at: Timestamp,
    ) {
        self.loading = true;
        let mut words = Words::default();
        for job in &loaded.jobs {
            let mut made = new_job(job.row, job.id.clone(), job.created);
            made.vm_name = (job.vm_name.as_str().into(), job.vm_name_at);
            made.hold = (job.hold, job.hold_at);
            self.put_job(made, job.created);
        }
        self.known_snapshots.keep(&loaded.snapshots);
        for disk in &loaded.disks {
            let volume = from_record(disk, disks, devices, host, self.world.record, &mut words);
            if let Some(vm) = disk.mapping.as_ref().map(|m| m.vm).filter(|vm| *vm != host) {
                self.watch(vm);
            }
            let (row, times) = (volume.row, volume.times);
            self.put_volume(volume, at);
            // Times are the record's, not this start's.
            if let Some(volume) = self.world.volumes.get(&row) {
                let mut volume = (**volume).clone();
                let taken = volume.snapshots.iter().map(|s| s.at).max();
                volume.times = Times { snapshots: times.snapshots.max(taken.unwrap_or(times.owned)), ..times };
                self.world.volumes.insert(row, Arc::new(volume));
            }
        }
        // Likewise a job's, which putting its volumes has set to now.
        for job in &loaded.jobs {
            let Some(mut made) = self.world.jobs.get(&job.row).map(|j| (**j).clone()) else { continue };
            (made.listed_at, made.status_at) = (job.created, job.created);
            for volume in made.disks.values().filter_map(|row| self.world.volumes.get(row)) {
                made.listed_at = made.listed_at.max(volume.times.owned);
                made.status_at = made.status_at.max(volume.times.status);
            }
            self.world.jobs.insert(job.row, Arc::new(made));
        }
        self.volume_rows = loaded.volume_rows.iter().copied().collect::<HashMap<_, _>>();
        self.loose = loaded.loose.iter().copied().collect();
        let mut callers: HashMap<Caller, Arc<Caller>> = HashMap::new();
        for (op, job) in &loaded.history {
            if let Some(mut row) = history_row(op, job.clone()) {
                // One copy of what many rows repeat.
                row.caller = callers.entry(op.caller.clone()).or_insert(row.caller).clone();
                if let Some(named) =
                    op.job.and_then(|row| self.world.jobs.get(&row)).filter(|j| Some(&j.id) == row.job.as_ref())
                {
                    row.job = Some(named.id.clone());
                }
                let ended = row.at;
                // An end by a crash is not recorded as a look that found nothing, and is one all the same.
                if op.verb == Verb::Create && matches!(row.outcome, Outcome::Ambiguous | Outcome::Interrupted) {
                    self.twins.push((op.fence, ended));
                }
                if let (Verb::Claim, Some(volume)) = (op.verb, op.volume) {
                    self.imports.tried(volume, op.epoch(), row.outcome);
                }
                let job = op.job.filter(|row| self.world.jobs.contains_key(row));
                // What is gone from a directory is known by the operation that took it away.
                if let (Verb::DeleteSnapshot, Outcome::Done, Some(volume)) = (row.verb, row.outcome, row.volume)
                    && let Some(owner) = self.world.by_uuid.get(&volume).copied()
                {
                    self.with_volume(owner, ended, |v| v.times.snapshots = v.times.snapshots.max(ended));
                }
                self.add_history(row, job, ended);
            }
        }
        // What came is known by its own time, what went by the operation that ended it.
        let listed = |v: &Verb| {
            matches!(v, Verb::Rmdir | Verb::Detach | Verb::Delete | Verb::Release | Verb::Move | Verb::Destroy)
        };
        let acted = self.world.history.iter().filter(|h| h.outcome == Outcome::Done && listed(&h.verb)).map(|h| h.at);
        let made = self.world.jobs.values().map(|j| j.created.max(j.listed_at));
        let here = self.world.volumes.values().map(|v| v.times.device.max(v.times.owned));
        self.world.listed_at = acted.chain(made).chain(here).max().unwrap_or(at);
        self.loading = false;
    }
}

fn history_row(op: &OpRow, job: Option<JobId>) -> Option<HistoryRow> {
    let (outcome, sentence, at) = op.ended.clone()?;
    let sentence = match (op.verb, outcome) {
        (Verb::Mkdir | Verb::Rmdir | Verb::Set, Outcome::Done) => op.command.clone(),
        _ => sentence,
    };
    Some(HistoryRow {
        at,
        op: OpId(op.id.0),
        verb: op.verb,
        job,
        disk: op.disk.clone(),
        volume: op.volume,
        outcome,
        sentence: sentence.into(),
        took_ms: u64::try_from(at.0.saturating_sub(op.began.0)).unwrap_or(0),
        caller: Arc::new(op.caller.clone()),
    })
}

/// Texts that thousands of volumes share, each kept once.
#[derive(Default)]
struct Words(Vec<Arc<str>>);

impl Words {
    fn one(&mut self, text: &str) -> Arc<str> {
        if let Some(known) = self.0.iter().find(|w| ***w == *text) {
            return known.clone();
        }
        let new: Arc<str> = text.into();
        // A serial is a volume's own: what few share is short.
        if text.len() < 16 || text.contains(' ') {
            self.0.push(new.clone());
        }
        new
    }
}

/// A volume as the record has it, believed only as far as the kernel confirms it (rows V3, V7).
fn from_record(
    loaded: &DiskLoaded,
    disks: &[Disk],
    devices: &dyn Devices,
    host: crate::model::VmId,
    record: crate::model::RecordId,
    words: &mut Words,
) -> Volume {
    let mut volume = blank(loaded.row, loaded.volume, loaded.job, loaded.disk.clone(), loaded.epoch, Status::Unknown);
    volume.recorded = loaded.status;
    volume.name = loaded.name.as_str().into();
    volume.size = loaded.size;
    volume.serial = words.one(&loaded.serial);
    volume.cloud_state = words.one(&loaded.cloud_state);
    volume.device_id = loaded.device_id;
    let imported = volume.imported();
    if !imported {
        volume.owner = crate::model::Mark { record, epoch: loaded.epoch }.to_string().into();
    }
    volume.vm = loaded.mapping.as_ref().map(|m| m.vm);
    volume.why = Some(words.one(match imported {
        true => "it was imported and not yet seen in the cloud",
        false => "volfs has just started, and has not looked yet",
    }));
    volume.times = Times {
        owned: loaded.at,
        status: loaded.status_at,
        device: loaded.mapping.as_ref().map_or(loaded.at, |m| m.at),
        // `vm` changes with the status, and a resize records its status anew.
        facts: loaded.at.max(loaded.status_at),
        error: loaded.at,
        history: loaded.at,
        snapshots: loaded.at,
    };
    let mapped = loaded.mapping.as_ref().filter(|m| m.vm == host && loaded.status == Status::Attached && !imported);
    if let Some((row, device)) = mapped.and_then(|m| Some((m, m.device.as_ref()?))) {
        let own: Vec<&Disk> = disks.iter().filter(|d| d.identity.names(loaded.volume)).collect();
        if let [disk] = own.as_slice()
            && disk.incarnation == device.incarnation
            && disk.size >= loaded.size
        {
            match devices.pin(disk) {
                Ok(pin) => {
                    volume.base = Status::Attached;
                    volume.why = None;
                    volume.mapping = Some(Arc::new(Mapping {
                        row: row.row,
                        name: disk.name.clone(),
                        dev: disk.dev,
                        incarnation: disk.incarnation,
                        size: disk.size,
                        pin,
                        at: row.at,
                    }));
                }
                Err(error) => tracing::warn!(volume = %loaded.volume, "not verified at start: {error}"),
            }
        }
    }
    volume
}
