//! Fakes of the engine's three traits: a record in memory, a cloud and a kernel that obey a script.
//!
//! All three share one [`Lab`], so that one log shows in which order things happened. An engine's
//! fakes belong to a *life*: after a kill its store and cloud never answer again, as for a process
//! that is gone, and [`Lab::start`] begins the next life from what was committed.

use std::collections::{BTreeMap, HashMap, VecDeque};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use async_trait::async_trait;
use imbl::{OrdMap, OrdSet};
use parking_lot::{Mutex, MutexGuard};
use tokio::sync::{Notify, Semaphore, broadcast};

use super::super::world::World;
use super::super::{Engine, Options, Target};
use crate::cloud::{About, Attachment, Cloud, CloudError, CloudVolume, Label, NewVolume, Refusal, Survey, VmFacts};
use crate::command::{Action, Command};
use crate::devices::{DeviceChange, Devices, DevicesError, Hold, Pin};
use crate::error::Error;
use crate::model::{
    BootId, Caller, DevNo, Disk, DiskIdentity, DiskName, DiskRow, Fence, Holder, Incarnation, JobId, JobRow, Mark,
    OpId, RecordId, Slot, Status, Timestamp, Verb, VmId, VolumeId, VolumeRow,
};
use crate::store::{Change, DiskLoaded, JobLoaded, Loaded, MappingRow, Next, OpRow, Store, StoreError};

/// Where the script can act.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum At {
    Begin,
    End,
    Other,
    Find,
    FindCreated,
    Survey,
    Vm,
    Create,
    Attach,
    Detach,
    Resize,
    Delete,
    Mark,
}

/// What happens there instead of plain success.
#[derive(Debug, Clone)]
pub enum Act {
    Refuse(Refusal),
    Unreachable,
    /// No clear answer, and nothing happened.
    Ambiguous,
    /// No clear answer, and it happened.
    AmbiguousDone,
    /// From now on the cloud is down; before that, this.
    Down(Box<Act>),
    /// The store does not take it.
    Fail,
    /// Waits for [`Lab::release`], then happens.
    HoldBefore,
    /// Happens, then waits for [`Lab::release`] with the answer.
    HoldAfter,
    /// The daemon dies before it happens.
    KillBefore,
    /// It happens, and the daemon dies before it hears so.
    KillAfter,
}

/// How a disk comes when the cloud attaches.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Plug {
    AtOnce,
    /// Only when the test says so.
    ByHand,
    /// Two disks of one identity.
    Twice,
    /// Another size than the cloud's.
    WrongSize,
}

/// What `hold` answers.
#[derive(Debug, Clone)]
pub enum Held {
    InUse(Holder),
    NotFlushed,
}

#[derive(Clone)]
pub struct Job {
    pub loaded: JobLoaded,
    pub forgotten: bool,
}

#[derive(Clone)]
pub struct Vol {
    pub row: VolumeRow,
    pub name: String,
    pub size: u64,
    pub serial: String,
    pub cloud_state: String,
    pub device_id: Option<u32>,
    pub status: Status,
    pub status_at: Timestamp,
    pub gone: bool,
}

#[derive(Clone)]
pub struct Own {
    pub job: JobRow,
    pub disk: DiskName,
    pub volume: VolumeId,
    pub epoch: u64,
    pub at: Timestamp,
}

#[derive(Default, Clone)]
pub struct Record {
    pub jobs: OrdMap<JobRow, Job>,
    pub volumes: OrdMap<VolumeId, Vol>,
    pub owns: OrdMap<DiskRow, Own>,
    pub mappings: OrdMap<VolumeId, MappingRow>,
    pub ops: OrdMap<OpId, OpRow>,
    pub batches: Vec<Vec<Change>>,
    pub high: [i64; 5],
    /// Ownership rows ever used.
    pub rows: OrdSet<DiskRow>,
    pub epoch: u64,
    /// Every commit fails while set.
    pub broken: bool,
}

#[derive(Default)]
pub struct Sky {
    pub volumes: BTreeMap<VolumeId, CloudVolume>,
    pub created: HashMap<Fence, VolumeId>,
    pub vms: BTreeMap<VmId, VmFacts>,
    /// Every call is `Unreachable` while set.
    pub down: bool,
    /// No call answers while set.
    pub hangs: bool,
    /// What goes wrong that must not: attached twice, a foreign mark changed.
    pub violations: Vec<String>,
}

pub struct Kernel {
    pub disks: Vec<Disk>,
    pub boot: BootId,
    pub next_seq: u64,
    pub plug: Plug,
    /// Disks stay when the cloud detaches.
    pub stay: bool,
    /// No events are sent.
    pub muted: bool,
    pub holds: VecDeque<Held>,
    pub holders: HashMap<DevNo, Vec<Holder>>,
    pub carries: HashMap<String, String>,
    /// Our own descriptors by disk sequence number.
    pub open: HashMap<u64, usize>,
    pub scans: usize,
    /// `disks` fails.
    pub blind: bool,
}

pub struct State {
    pub life: u64,
    pub script: HashMap<At, VecDeque<Act>>,
    pub log: Vec<String>,
    pub record: Record,
    pub sky: Sky,
    pub kernel: Kernel,
    gates: HashMap<At, Arc<Semaphore>>,
}

struct Inner {
    state: Mutex<State>,
    moved: Notify,
    events: Mutex<Option<broadcast::Sender<DeviceChange>>>,
    about: About,
    record: RecordId,
    epoch: tokio::time::Instant,
}

/// One host with its record, cloud and kernel.
#[derive(Clone)]
pub struct Lab {
    inner: Arc<Inner>,
    pub host: VmId,
}

pub const GIB: u64 = 1 << 30;

pub fn root() -> Caller {
    Caller { uid: 0, gid: 0, pid: 4711, comm: "sh".into() }
}

pub fn user() -> Caller {
    Caller { uid: 1000, gid: 1000, pid: 4712, comm: "sh".into() }
}

pub fn disk_name(text: &str) -> DiskName {
    DiskName::parse(text).unwrap()
}

pub fn job_id(text: &str) -> JobId {
    JobId::parse(text).unwrap()
}

pub fn holder() -> Holder {
    Holder { kind: crate::model::HolderKind::Open, pid: Some(99), name: "dd".into() }
}

impl Lab {
    pub fn new() -> Self {
        Self::with(|_| ())
    }

    pub fn with(change: impl FnOnce(&mut About)) -> Self {
        let host = VmId::random();
        let mut about = About {
            name: "fake",
            host,
            most_disks: 20,
            can_force: true,
            snapshots: false,
            detach_wants_sole_opener: false,
            exact_size: true,
        };
        change(&mut about);
        let kernel = Kernel {
            disks: Vec::new(),
            boot: BootId::random(),
            next_seq: 10,
            plug: Plug::AtOnce,
            stay: false,
            muted: false,
            holds: VecDeque::new(),
            holders: HashMap::new(),
            carries: HashMap::new(),
            open: HashMap::new(),
            scans: 0,
            blind: false,
        };
        let mut sky = Sky::default();
        sky.vms.insert(host, VmFacts { running: true, has_root: true });
        let state = State {
            life: 0,
            script: HashMap::new(),
            log: Vec::new(),
            record: Record::default(),
            sky,
            kernel,
            gates: HashMap::new(),
        };
        let inner = Inner {
            state: Mutex::new(state),
            moved: Notify::new(),
            events: Mutex::new(Some(broadcast::channel(256).0)),
            about,
            record: RecordId::random(),
            epoch: tokio::time::Instant::now(),
        };
        Lab { inner: Arc::new(inner), host }
    }

    pub fn state(&self) -> MutexGuard<'_, State> {
        self.inner.state.lock()
    }

    pub fn record_id(&self) -> RecordId {
        self.inner.record
    }

    /// Puts what happens at the next call of a kind.
    pub fn script(&self, at: At, act: Act) {
        self.state().script.entry(at).or_default().push_back(act);
    }

    /// Lets one held call go on.
    pub fn release(&self, at: At) {
        self.gate(at).add_permits(1);
    }

    fn gate(&self, at: At) -> Arc<Semaphore> {
        self.state().gates.entry(at).or_insert_with(|| Arc::new(Semaphore::new(0))).clone()
    }

    fn say(&self, line: String) {
        self.state().log.push(line);
        self.inner.moved.notify_waiters();
    }

    /// The log's lines that begin with any of these.
    pub fn lines(&self, of: &[&str]) -> Vec<String> {
        self.state().log.iter().filter(|l| of.iter().any(|o| l.starts_with(o))).cloned().collect()
    }

    /// How many of the cloud's calls that change something were made.
    pub fn count(&self, what: &str) -> usize {
        self.state().log.iter().filter(|l| l.starts_with(what)).count()
    }

    pub fn forget_log(&self) {
        self.state().log.clear();
    }

    /// Waits until the lab is so; fails the test after an hour of the paused clock.
    pub async fn until(&self, what: &str, mut is: impl FnMut(&State) -> bool) {
        let wait = async {
            loop {
                let moved = self.inner.moved.notified();
                tokio::pin!(moved);
                moved.as_mut().enable();
                if is(&self.state()) {
                    return;
                }
                moved.await;
            }
        };
        if tokio::time::timeout(Duration::from_secs(3600), wait).await.is_err() {
            panic!("never: {what}\n{}", self.state().log.join("\n"));
        }
    }

    /// Waits until the log has `n` lines that begin so.
    pub async fn until_logged(&self, what: &str, n: usize) {
        self.until(what, |s| s.log.iter().filter(|l| l.starts_with(what)).count() >= n).await;
    }

    /// Waits until the published world is so.
    pub async fn until_world(&self, engine: &Arc<Engine>, what: &str, mut is: impl FnMut(&World) -> bool) {
        let wait = async {
            loop {
                let moved = self.inner.moved.notified();
                tokio::pin!(moved);
                moved.as_mut().enable();
                if is(&engine.world()) {
                    return;
                }
                moved.await;
            }
        };
        if tokio::time::timeout(Duration::from_secs(3600), wait).await.is_err() {
            panic!("never: {what}\n{:#?}\n{}", engine.world().volumes, self.state().log.join("\n"));
        }
    }

    pub async fn until_status(&self, engine: &Arc<Engine>, row: DiskRow, status: Status) {
        let is = |w: &World| w.volumes.get(&row).is_some_and(|v| v.status() == status);
        self.until_world(engine, &format!("{row} is {status}"), is).await;
    }

    /// Begins the next life, and waits for its first round.
    pub async fn start(&self) -> Arc<Engine> {
        let engine = self.begin();
        engine.first_round().await;
        engine
    }

    /// Begins the next life.
    pub fn begin(&self) -> Arc<Engine> {
        let life = {
            let mut state = self.state();
            state.life += 1;
            state.kernel.open.clear();
            state.life
        };
        let epoch = self.inner.epoch;
        let options = Options {
            interval: Duration::from_secs(60),
            absence_gap: Duration::from_secs(10),
            exact_size: self.inner.about.exact_size,
            read_only: None,
            history: 1000,
            events: 1000,
            clock: Arc::new(move || Timestamp(1_800_000_000_000).plus(epoch.elapsed())),
        };
        let fake = Arc::new(Fake { lab: self.clone(), life });
        let engine =
            Engine::start(fake.clone(), fake.clone(), fake, options, tokio::runtime::Handle::current()).unwrap();
        let lab = self.clone();
        engine.on_publish(Arc::new(move |_| lab.inner.moved.notify_waiters()));
        engine
    }

    /// The daemon dies: its store and cloud never answer it again.
    pub fn kill(&self) {
        self.state().life += 1;
        self.inner.moved.notify_waiters();
    }

    /// Waits for the script's kill.
    pub async fn until_killed(&self, engine_life: u64) {
        self.until("killed", |s| s.life > engine_life).await;
    }

    pub fn life(&self) -> u64 {
        self.state().life
    }

    /// The host starts anew: no disk is the one it was.
    pub fn reboot(&self) {
        let mut state = self.state();
        state.life += 1;
        let kernel = &mut state.kernel;
        kernel.boot = BootId::random();
        kernel.next_seq = 1;
        for disk in &mut kernel.disks {
            disk.incarnation = Incarnation { boot: kernel.boot, diskseq: kernel.next_seq };
            kernel.next_seq += 1;
        }
    }

    pub fn event(&self, name: &str, action: &str) {
        if !self.state().kernel.muted
            && let Some(events) = &*self.inner.events.lock()
        {
            // Nobody may be listening yet.
            let _ = events.send(DeviceChange { name: name.into(), action: action.into() });
        }
    }

    /// The kernel's events end: receivers find a closed channel.
    pub fn close_events(&self) {
        *self.inner.events.lock() = None;
    }

    /// A disk of that volume comes.
    pub fn plug(&self, volume: VolumeId, size: u64) -> Arc<str> {
        let name: Arc<str> = {
            let mut state = self.state();
            let kernel = &mut state.kernel;
            let n = (0u32..).find(|n| kernel.disks.iter().all(|d| d.dev.minor != *n)).unwrap();
            let name: Arc<str> = format!("vd{n}").into();
            let incarnation = Incarnation { boot: kernel.boot, diskseq: kernel.next_seq };
            kernel.next_seq += 1;
            kernel.disks.push(Disk {
                name: name.clone(),
                dev: DevNo { major: 252, minor: n },
                incarnation,
                size,
                identity: DiskIdentity::VirtioSerial(volume.0.simple().to_string()[..20].into()),
            });
            name
        };
        self.event(&name, "add");
        name
    }

    /// Every disk of that volume goes.
    pub fn unplug(&self, volume: VolumeId) {
        let mut gone = Vec::new();
        self.state().kernel.disks.retain(|d| {
            let is = d.identity.names(volume);
            if is {
                gone.push(d.name.clone());
            }
            !is
        });
        for name in gone {
            self.event(&name, "remove");
        }
    }

    pub fn disks_of(&self, volume: VolumeId) -> Vec<Disk> {
        self.state().kernel.disks.iter().filter(|d| d.identity.names(volume)).cloned().collect()
    }

    /// A record with a job of so many detached volumes, and a cloud that agrees.
    pub fn fill(&self, count: i64) -> JobRow {
        let job = JobRow(1);
        let at = Timestamp(0);
        let mut state = self.state();
        state.record.take(&[Change::JobAdd { row: job, id: job_id("many"), at }]).unwrap();
        for n in 1..=count {
            let volume = VolumeId::random();
            let epoch = u64::try_from(n).unwrap();
            let mark = Some(Mark { record: self.record_id(), epoch });
            let name = "filled".to_owned();
            let batch = [
                Change::VolumeAdd { row: VolumeRow(n), volume, name: name.clone(), size: GIB, at },
                Change::VolumeStatus { volume, status: Status::Detached, at },
            ];
            state.record.take(&batch).unwrap();
            let own = Own { job, disk: disk_name(&format!("d{n}")), volume, epoch, at };
            state.record.owns.insert(DiskRow(n), own);
            state.record.used(2, n);
            state.record.epoch = epoch;
            let (state_word, attached) = ("Ready".into(), None);
            let seen =
                CloudVolume { id: volume, name, size: GIB, state: state_word, attached, mark, carries_host: None };
            state.sky.volumes.insert(volume, seen);
        }
        job
    }

    /// A volume that somebody else made.
    pub fn foreign(&self, size: u64, mark: Option<Mark>) -> VolumeId {
        let id = VolumeId::random();
        let volume = CloudVolume {
            id,
            name: "foreign".into(),
            size,
            state: "Ready".into(),
            attached: None,
            mark,
            carries_host: None,
        };
        self.state().sky.volumes.insert(id, volume);
        id
    }

    pub fn vm(&self, running: bool) -> VmId {
        let id = VmId::random();
        self.state().sky.vms.insert(id, VmFacts { running, has_root: false });
        id
    }

    /// Attached or detached behind volfs's back.
    pub fn put(&self, volume: VolumeId, vm: Option<VmId>) {
        self.state().sky.volumes.get_mut(&volume).unwrap().attached =
            vm.map(|vm| Attachment { vm, device_id: Some(1) });
    }

    pub fn remark(&self, volume: VolumeId, mark: Option<Mark>) {
        self.state().sky.volumes.get_mut(&volume).unwrap().mark = mark;
    }

    pub fn cloud_of(&self, volume: VolumeId) -> Option<CloudVolume> {
        self.state().sky.volumes.get(&volume).cloned()
    }

    pub fn recorded(&self, volume: VolumeId) -> Status {
        self.state().record.volumes[&volume].status
    }

    /// Operations that have begun and not ended in the record.
    pub fn unfinished(&self) -> Vec<OpRow> {
        self.state().record.ops.values().filter(|o| o.ended.is_none()).cloned().collect()
    }
}

/// Sugar of the tests.
impl Lab {
    pub async fn job(&self, engine: &Arc<Engine>, name: &str) -> JobRow {
        engine.make_job(job_id(name), root()).wait().await.unwrap()
    }

    pub async fn run(&self, engine: &Arc<Engine>, target: Target, action: Action) -> Result<(), Error> {
        self.go(engine, target, action).ticket.wait().await
    }

    pub fn go(&self, engine: &Arc<Engine>, target: Target, action: Action) -> super::super::Submitted {
        engine.submit(target, Command { action, timeout: None, nowait: false }, root())
    }

    pub async fn make(&self, engine: &Arc<Engine>, job: JobRow, disk: &str) -> (DiskRow, VolumeId) {
        self.run(engine, Target::Job(job), create(disk, GIB)).await.unwrap();
        let world = engine.world();
        let row = world.jobs[&job].disks[&disk_name(disk)];
        (row, world.volumes[&row].uuid)
    }

    pub fn status(&self, engine: &Arc<Engine>, row: DiskRow) -> Status {
        engine.world().volumes[&row].status()
    }
}

pub fn create(disk: &str, size: u64) -> Action {
    Action::Create { disk: disk_name(disk), size, offering: None, zone: None, name: None }
}

pub fn attach() -> Action {
    Action::Attach { vm: None, slot: None }
}

pub fn detach() -> Action {
    Action::Detach { vm: None, force: false }
}

pub fn delete(volume: VolumeId) -> Action {
    Action::Delete { volume, expunge: false }
}

struct Fake {
    lab: Lab,
    life: u64,
}

impl Fake {
    fn dead(&self) -> bool {
        self.lab.state().life != self.life
    }

    async fn never<T>() -> T {
        std::future::pending().await
    }

    async fn alive(&self) {
        if self.dead() {
            Self::never::<()>().await;
        }
    }

    fn next(&self, at: At) -> Option<Act> {
        self.lab.state().script.get_mut(&at).and_then(VecDeque::pop_front)
    }

    async fn pass(&self, at: At) {
        let gate = self.lab.gate(at);
        gate.acquire().await.unwrap().forget();
        self.alive().await;
    }

    /// One call of the cloud: by the script, else `effect`.
    async fn call<T>(
        &self,
        at: At,
        words: String,
        effect: impl FnOnce(&Lab) -> Result<T, CloudError> + Send,
    ) -> Result<T, CloudError> {
        self.alive().await;
        self.lab.say(words.clone());
        let (down, hangs) = {
            let state = self.lab.state();
            (state.sky.down, state.sky.hangs)
        };
        if hangs {
            Self::never::<()>().await;
        }
        let mut act = self.next(at);
        if let Some(Act::Down(inner)) = act {
            self.lab.state().sky.down = true;
            act = Some(*inner);
        }
        if act.is_none() && down {
            return Err(CloudError::Unreachable { words: "fake: down".into() });
        }
        let ambiguous = || CloudError::Ambiguous { words: "fake: no answer".into() };
        match act {
            None | Some(Act::Down(_)) => effect(&self.lab),
            Some(Act::Refuse(why)) => Err(CloudError::Refused { why, words: "fake: no".into() }),
            Some(Act::Unreachable | Act::Fail) => Err(CloudError::Unreachable { words: "fake: unreachable".into() }),
            Some(Act::Ambiguous) => Err(ambiguous()),
            Some(Act::AmbiguousDone) => {
                effect(&self.lab)?;
                Err(ambiguous())
            }
            Some(Act::HoldBefore) => {
                self.pass(at).await;
                let answer = effect(&self.lab);
                self.lab.inner.moved.notify_waiters();
                answer
            }
            Some(Act::HoldAfter) => {
                let answer = effect(&self.lab);
                self.pass(at).await;
                answer
            }
            Some(Act::KillBefore) => {
                self.lab.kill();
                Self::never().await
            }
            Some(Act::KillAfter) => {
                // The daemon is gone whatever the answer was.
                let _ = effect(&self.lab);
                self.lab.kill();
                Self::never().await
            }
        }
    }
}

fn constraint<T>(words: impl Into<String>) -> Result<T, StoreError> {
    Err(StoreError::Constraint { words: words.into() })
}

impl Record {
    fn used(&mut self, which: usize, row: i64) {
        self.high[which] = self.high[which].max(row);
    }

    fn volume(&mut self, volume: VolumeId) -> Result<&mut Vol, StoreError> {
        match self.volumes.get_mut(&volume) {
            Some(v) => Ok(v),
            None => constraint(format!("no volume {volume}")),
        }
    }

    fn job(&mut self, row: JobRow) -> Result<&mut JobLoaded, StoreError> {
        match self.jobs.get_mut(&row) {
            Some(j) if !j.forgotten => Ok(&mut j.loaded),
            _ => constraint(format!("no job {row}")),
        }
    }

    fn name_free(&self, job: JobRow, disk: &DiskName, but: Option<DiskRow>) -> Result<(), StoreError> {
        match self.owns.iter().find(|(r, o)| o.job == job && o.disk == *disk && Some(**r) != but) {
            Some(_) => constraint(format!("disk {disk} is in job {job} already")),
            None => Ok(()),
        }
    }

    /// As the schema would have it: the same refusals, the same effects.
    fn apply(&mut self, change: &Change) -> Result<(), StoreError> {
        match change.clone() {
            Change::JobAdd { row, id, at } => {
                if self.jobs.contains_key(&row) || self.jobs.values().any(|j| !j.forgotten && j.loaded.id == id) {
                    return constraint(format!("job {id} is there"));
                }
                self.used(0, row.0);
                let loaded = JobLoaded {
                    row,
                    id,
                    vm_name: String::new(),
                    hold: false,
                    created: at,
                    vm_name_at: at,
                    hold_at: at,
                };
                self.jobs.insert(row, Job { loaded, forgotten: false });
            }
            Change::JobForget { row, .. } => {
                if self.owns.values().any(|o| o.job == row) {
                    return constraint(format!("job {row} still owns a volume"));
                }
                self.job(row)?;
                self.jobs.get_mut(&row).unwrap().forgotten = true;
            }
            Change::JobVmName { row, vm_name, at } => {
                let job = self.job(row)?;
                (job.vm_name, job.vm_name_at) = (vm_name, at);
            }
            Change::JobHold { row, hold, at } => {
                let job = self.job(row)?;
                (job.hold, job.hold_at) = (hold, at);
            }
            Change::VolumeAdd { row, volume, name, size, at } => {
                self.used(1, row.0);
                let row = self.volumes.get(&volume).map_or(row, |v| v.row);
                self.volumes.insert(
                    volume,
                    Vol {
                        row,
                        name,
                        size,
                        serial: String::new(),
                        cloud_state: String::new(),
                        device_id: None,
                        status: Status::Unknown,
                        status_at: at,
                        gone: false,
                    },
                );
            }
            Change::VolumeFacts { volume, name, size, serial, cloud_state, device_id } => {
                let v = self.volume(volume)?;
                (v.name, v.size, v.serial, v.cloud_state, v.device_id) = (name, size, serial, cloud_state, device_id);
            }
            Change::VolumeStatus { volume, status, at } => {
                let v = self.volume(volume)?;
                (v.status, v.status_at) = (status, at);
            }
            Change::VolumeGone { volume, .. } => self.volume(volume)?.gone = true,
            Change::DiskAdd { row, job, disk, volume, epoch, at } => {
                self.job(job)?;
                self.name_free(job, &disk, None)?;
                if self.volume(volume)?.gone {
                    return constraint(format!("volume {volume} is gone"));
                }
                if self.owns.values().any(|o| o.volume == volume) || self.rows.insert(row).is_some() {
                    return constraint(format!("volume {volume} has an owner, or row {row} was used"));
                }
                self.used(2, row.0);
                self.epoch = self.epoch.max(epoch);
                self.owns.insert(row, Own { job, disk, volume, epoch, at });
            }
            Change::DiskRename { row, disk, at } => {
                let Some(job) = self.owns.get(&row).map(|o| o.job) else { return constraint("no ownership") };
                self.name_free(job, &disk, Some(row))?;
                let own = self.owns.get_mut(&row).unwrap();
                (own.disk, own.at) = (disk, at);
            }
            Change::DiskEnd { row } => {
                if self.owns.remove(&row).is_none() {
                    return constraint(format!("no ownership {row}"));
                }
            }
            Change::MappingSet(mapping) => {
                self.volume(mapping.volume)?;
                self.used(3, mapping.row.0);
                if self.mappings.values().any(|m| m.row == mapping.row && m.volume != mapping.volume) {
                    return constraint(format!("mapping {} is another volume's", mapping.row));
                }
                self.mappings.insert(mapping.volume, mapping);
            }
            Change::MappingEnd { volume } => drop(self.mappings.remove(&volume)),
            Change::OpBegin(op) => {
                if self.ops.contains_key(&op.id) || op.volume.is_some_and(|v| !self.volumes.contains_key(&v)) {
                    return constraint(format!("operation {} twice, or of no volume", op.id));
                }
                self.used(4, op.id.0);
                self.ops.insert(op.id, *op);
            }
            Change::OpStep { id, step, detail } => match self.ops.get_mut(&id) {
                Some(op) if op.ended.is_none() => (op.step, op.detail) = (step, detail),
                _ => return constraint(format!("no operation {id}")),
            },
            Change::OpEnd { id, outcome, sentence, at } => match self.ops.get_mut(&id) {
                Some(op) if op.ended.is_none() => op.ended = Some((outcome, sentence, at)),
                _ => return constraint(format!("operation {id} is not there or has ended")),
            },
            Change::OpVolume { id, volume } => {
                self.volume(volume)?;
                match self.ops.get_mut(&id) {
                    Some(op) => op.volume = Some(volume),
                    None => return constraint(format!("no operation {id}")),
                }
            }
        }
        Ok(())
    }

    fn tables(&mut self) -> Record {
        let batches = std::mem::take(&mut self.batches);
        let tables = self.clone();
        self.batches = batches;
        tables
    }

    fn take(&mut self, batch: &[Change]) -> Result<(), StoreError> {
        // Tables share their structure: a batch that is refused half way leaves them as they were.
        let mut after = self.tables();
        for change in batch {
            after.apply(change)?;
        }
        after.batches = std::mem::take(&mut self.batches);
        after.batches.push(batch.to_vec());
        *self = after;
        Ok(())
    }
}

#[async_trait]
impl Store for Fake {
    async fn commit(&self, batch: Vec<Change>) -> Result<(), StoreError> {
        self.alive().await;
        let mut at = At::Other;
        let mut words = "commit".to_owned();
        for change in &batch {
            match change {
                Change::OpBegin(op) if op.ended.is_none() => {
                    at = At::Begin;
                    words = format!("begin {}", op.verb);
                }
                Change::OpEnd { id, outcome, .. } => {
                    at = At::End;
                    let verb = self.lab.state().record.ops.get(id).map_or(Verb::Set, |o| o.verb);
                    words = format!("end {verb} {}", outcome.as_str());
                }
                _ => {}
            }
        }
        let take = |lab: &Lab| {
            let outcome = lab.state().record.take(&batch);
            match &outcome {
                Ok(()) => lab.say(words.clone()),
                Err(error) => lab.say(format!("refused {words}: {error}")),
            }
            outcome
        };
        let failed = || Err(StoreError::Failed { words: "fake: disk I/O error".into() });
        let act = self.next(at);
        let broken = self.lab.state().record.broken;
        match act {
            None if broken => {
                self.lab.say(format!("broken {words}"));
                failed()
            }
            None => take(&self.lab),
            Some(Act::HoldBefore) => {
                self.lab.say(format!("held {words}"));
                self.pass(at).await;
                take(&self.lab)
            }
            Some(Act::HoldAfter) => {
                let outcome = take(&self.lab);
                self.pass(at).await;
                outcome
            }
            Some(Act::KillBefore) => {
                self.lab.kill();
                Fake::never().await
            }
            Some(Act::KillAfter) => {
                take(&self.lab)?;
                self.lab.kill();
                Fake::never().await
            }
            Some(_) => {
                self.lab.say(format!("failed {words}"));
                failed()
            }
        }
    }

    fn load(&self, history: usize) -> Result<Loaded, StoreError> {
        let state = self.lab.state();
        let r = &state.record;
        let jobs: Vec<JobLoaded> = r.jobs.values().filter(|j| !j.forgotten).map(|j| j.loaded.clone()).collect();
        let disks = r
            .owns
            .iter()
            .map(|(row, own)| {
                let v = &r.volumes[&own.volume];
                DiskLoaded {
                    row: *row,
                    job: own.job,
                    disk: own.disk.clone(),
                    epoch: own.epoch,
                    at: own.at,
                    volume: own.volume,
                    name: v.name.clone(),
                    size: v.size,
                    serial: v.serial.clone(),
                    cloud_state: v.cloud_state.clone(),
                    device_id: v.device_id,
                    status: v.status,
                    status_at: v.status_at,
                    mapping: r.mappings.get(&own.volume).cloned(),
                }
            })
            .collect();
        let owned = |id: &VolumeId| r.owns.values().any(|o| o.volume == *id);
        let loose = r.volumes.iter().filter(|(id, v)| !v.gone && !owned(id)).map(|(id, _)| *id).collect();
        let ended: Vec<(OpRow, Option<JobId>)> = r
            .ops
            .values()
            .filter(|o| o.ended.is_some())
            .map(|o| (o.clone(), o.job.map(|row| r.jobs[&row].loaded.id.clone())))
            .collect();
        let skip = ended.len().saturating_sub(history);
        Ok(Loaded {
            record: self.lab.record_id(),
            jobs,
            disks,
            loose,
            volume_rows: r.volumes.iter().map(|(id, v)| (*id, v.row)).collect(),
            unfinished: r.ops.values().filter(|o| o.ended.is_none()).cloned().collect(),
            history: ended.into_iter().skip(skip).collect(),
            next: Next {
                job: r.high[0] + 1,
                volume: r.high[1] + 1,
                disk: r.high[2] + 1,
                mapping: r.high[3] + 1,
                operation: r.high[4] + 1,
                epoch: r.epoch + 1,
            },
        })
    }
}

fn refused<T>(why: Refusal, words: &str) -> Result<T, CloudError> {
    Err(CloudError::Refused { why, words: words.into() })
}

#[async_trait]
impl Cloud for Fake {
    fn about(&self) -> &About {
        &self.lab.inner.about
    }

    async fn find(&self, volume: VolumeId) -> Result<Option<CloudVolume>, CloudError> {
        self.call(At::Find, format!("cloud find {volume}"), |lab| Ok(lab.cloud_of(volume))).await
    }

    async fn find_created(&self, fence: Fence) -> Result<Option<CloudVolume>, CloudError> {
        self.call(At::FindCreated, "cloud find_created".into(), |lab| {
            let state = lab.state();
            Ok(state.sky.created.get(&fence).and_then(|id| state.sky.volumes.get(id)).cloned())
        })
        .await
    }

    async fn survey(&self, survey: &Survey) -> Result<Vec<CloudVolume>, CloudError> {
        self.call(At::Survey, "cloud survey".into(), |lab| {
            let state = lab.state();
            let wanted = |v: &&CloudVolume| {
                survey.volumes.contains(&v.id)
                    || v.attached.is_some_and(|a| survey.vms.contains(&a.vm))
                    || v.mark.is_some_and(|m| Some(m.record) == survey.record)
            };
            Ok(state.sky.volumes.values().filter(wanted).cloned().collect())
        })
        .await
    }

    async fn create(&self, new: &NewVolume) -> Result<CloudVolume, CloudError> {
        self.call(At::Create, format!("cloud create {}", new.label.disk), |lab| {
            let mut state = lab.state();
            if let Some(id) = state.sky.created.get(&new.fence) {
                return Ok(state.sky.volumes[id].clone());
            }
            let volume = CloudVolume {
                id: VolumeId::random(),
                name: new.name.clone(),
                size: new.size,
                state: "Allocated".into(),
                attached: None,
                mark: Some(new.label.mark),
                carries_host: None,
            };
            state.sky.created.insert(new.fence, volume.id);
            state.sky.volumes.insert(volume.id, volume.clone());
            Ok(volume)
        })
        .await
    }

    async fn attach(&self, volume: VolumeId, vm: VmId, slot: Option<Slot>) -> Result<(), CloudError> {
        self.call(At::Attach, format!("cloud attach {volume}"), |lab| {
            let here = vm == lab.host;
            let (size, plug) = {
                let mut state = lab.state();
                let record = lab.record_id();
                if !state.sky.vms.contains_key(&vm) {
                    return refused(Refusal::NoVm, "fake: no such vm");
                }
                let Some(v) = state.sky.volumes.get_mut(&volume) else {
                    return refused(Refusal::NoVolume, "fake: no such volume");
                };
                match v.attached {
                    Some(a) if a.vm == vm => return Ok(()),
                    Some(_) => return refused(Refusal::Conflict, "fake: attached elsewhere"),
                    None => v.attached = Some(Attachment { vm, device_id: Some(slot.map_or(1, Slot::number)) }),
                }
                let (size, ours) = (v.size, v.mark.is_some_and(|m| m.record == record));
                if !ours {
                    state.sky.violations.push(format!("attach of {volume}, which is not ours"));
                }
                if here && state.kernel.disks.iter().any(|d| d.identity.names(volume)) {
                    state.sky.violations.push(format!("attach of {volume} while its disk is here"));
                }
                (size, state.kernel.plug)
            };
            match (here, plug) {
                (true, Plug::AtOnce) => drop(lab.plug(volume, size)),
                (true, Plug::WrongSize) => drop(lab.plug(volume, size / 2)),
                (true, Plug::Twice) => {
                    lab.plug(volume, size);
                    lab.plug(volume, size);
                }
                _ => {}
            }
            Ok(())
        })
        .await
    }

    async fn detach(&self, volume: VolumeId, vm: VmId, force: bool) -> Result<(), CloudError> {
        self.call(At::Detach, format!("cloud detach {volume}{}", if force { " force" } else { "" }), |lab| {
            let stay = {
                let mut state = lab.state();
                let record = lab.record_id();
                if vm == lab.host && lab.inner.about.detach_wants_sole_opener {
                    let seqs: Vec<u64> = state
                        .kernel
                        .disks
                        .iter()
                        .filter(|d| d.identity.names(volume))
                        .map(|d| d.incarnation.diskseq)
                        .collect();
                    if seqs.iter().any(|s| state.kernel.open.get(s).is_some_and(|n| *n > 0)) {
                        return refused(Refusal::InUse, "fake: open");
                    }
                }
                let Some(v) = state.sky.volumes.get_mut(&volume) else {
                    return refused(Refusal::NoVolume, "fake: no such volume");
                };
                if v.attached.is_none_or(|a| a.vm != vm) {
                    return Ok(());
                }
                v.attached = None;
                if v.mark.is_none_or(|m| m.record != record) {
                    state.sky.violations.push(format!("detach of {volume}, which is not ours"));
                }
                state.kernel.stay
            };
            if vm == lab.host && !stay {
                lab.unplug(volume);
            }
            Ok(())
        })
        .await
    }

    async fn resize(&self, volume: VolumeId, size: u64) -> Result<u64, CloudError> {
        self.call(At::Resize, format!("cloud resize {volume}"), |lab| {
            let names = {
                let mut state = lab.state();
                let Some(v) = state.sky.volumes.get_mut(&volume) else {
                    return refused(Refusal::NoVolume, "fake: no such volume");
                };
                v.size = v.size.max(size);
                let size = v.size;
                let mut names = Vec::new();
                for disk in state.kernel.disks.iter_mut().filter(|d| d.identity.names(volume)) {
                    disk.size = size;
                    names.push(disk.name.clone());
                }
                names
            };
            for name in names {
                lab.event(&name, "change");
            }
            Ok(size)
        })
        .await
    }

    async fn delete(&self, volume: VolumeId, _expunge: bool) -> Result<Option<Timestamp>, CloudError> {
        self.call(At::Delete, format!("cloud delete {volume}"), |lab| {
            let mut state = lab.state();
            let record = lab.record_id();
            match state.sky.volumes.remove(&volume) {
                Some(v) => {
                    if v.attached.is_some() || v.mark.is_none_or(|m| m.record != record) {
                        state.sky.violations.push(format!("delete of {volume}: attached, or not ours"));
                    }
                    Ok(Some(Timestamp(0)))
                }
                None => Ok(None),
            }
        })
        .await
    }

    async fn exchange_mark(
        &self,
        volume: VolumeId,
        expect: Option<Mark>,
        new: Option<&Label>,
    ) -> Result<(), CloudError> {
        let new = new.map(|l| l.mark);
        self.call(At::Mark, format!("cloud mark {volume}"), |lab| {
            let mut state = lab.state();
            let Some(v) = state.sky.volumes.get_mut(&volume) else {
                return refused(Refusal::NoVolume, "fake: no such volume");
            };
            if v.mark == new {
                return Ok(());
            }
            if v.mark != expect {
                let found = v.mark;
                return refused(Refusal::Mark(found), "fake: another mark");
            }
            v.mark = new;
            Ok(())
        })
        .await
    }

    async fn vm(&self, vm: VmId) -> Result<Option<VmFacts>, CloudError> {
        self.call(At::Vm, format!("cloud vm {vm}"), |lab| Ok(lab.state().sky.vms.get(&vm).copied())).await
    }
}

struct FakePin {
    lab: Lab,
    disk: Disk,
    released: AtomicBool,
}

impl std::fmt::Debug for FakePin {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "pin of {}", self.disk.name)
    }
}

impl FakePin {
    fn now(&self) -> Option<Disk> {
        if self.released.load(Ordering::SeqCst) {
            return None;
        }
        self.lab.state().kernel.disks.iter().find(|d| d.incarnation == self.disk.incarnation).cloned()
    }
}

impl Pin for FakePin {
    fn alive(&self) -> bool {
        self.now().is_some()
    }

    fn look(&self) -> Result<Disk, DevicesError> {
        self.now().ok_or_else(|| DevicesError::Gone { device: self.disk.name.to_string() })
    }

    fn release(&self) {
        if !self.released.swap(true, Ordering::SeqCst)
            && let Some(n) = self.lab.state().kernel.open.get_mut(&self.disk.incarnation.diskseq)
        {
            *n = n.saturating_sub(1);
        }
    }
}

impl Drop for FakePin {
    fn drop(&mut self) {
        self.release();
    }
}

#[derive(Debug)]
struct FakeHold;
impl Hold for FakeHold {}

impl Fake {
    fn gone_daemon<T>(&self) -> Result<T, DevicesError> {
        Err(DevicesError::Failed { what: "the daemon is dead".into(), words: String::new() })
    }
}

impl Devices for Fake {
    fn boot(&self) -> BootId {
        self.lab.state().kernel.boot
    }

    fn disks(&self) -> Result<Vec<Disk>, DevicesError> {
        if self.dead() {
            return self.gone_daemon();
        }
        let mut state = self.lab.state();
        state.kernel.scans += 1;
        if state.kernel.blind {
            return Err(DevicesError::Failed { what: "/sys/block".into(), words: "fake: EIO".into() });
        }
        Ok(state.kernel.disks.clone())
    }

    fn disk(&self, name: &str) -> Result<Option<Disk>, DevicesError> {
        if self.dead() {
            return self.gone_daemon();
        }
        Ok(self.lab.state().kernel.disks.iter().find(|d| &*d.name == name).cloned())
    }

    fn pin(&self, disk: &Disk) -> Result<Arc<dyn Pin>, DevicesError> {
        if self.dead() {
            return self.gone_daemon();
        }
        let mut state = self.lab.state();
        if !state.kernel.disks.iter().any(|d| d.incarnation == disk.incarnation) {
            return Err(DevicesError::Gone { device: disk.name.to_string() });
        }
        *state.kernel.open.entry(disk.incarnation.diskseq).or_default() += 1;
        Ok(Arc::new(FakePin { lab: self.lab.clone(), disk: disk.clone(), released: AtomicBool::new(false) }))
    }

    fn hold(&self, disk: &Disk) -> Result<Box<dyn Hold>, DevicesError> {
        if self.dead() {
            return self.gone_daemon();
        }
        self.lab.say(format!("hold {}", disk.name));
        let device = disk.name.to_string();
        let mut state = self.lab.state();
        let named = state.kernel.holders.get(&disk.dev).cloned().unwrap_or_default();
        if !named.is_empty() {
            return Err(DevicesError::InUse { device, holders: named });
        }
        match state.kernel.holds.pop_front() {
            None => Ok(Box::new(FakeHold)),
            Some(Held::InUse(holder)) => Err(DevicesError::InUse { device, holders: vec![holder] }),
            Some(Held::NotFlushed) => Err(DevicesError::Flush { device, words: "fake: EIO".into() }),
        }
    }

    fn holders(&self, dev: DevNo) -> Result<Vec<Holder>, DevicesError> {
        Ok(self.lab.state().kernel.holders.get(&dev).cloned().unwrap_or_default())
    }

    fn carries_host(&self, disk: &Disk) -> Result<Option<String>, DevicesError> {
        Ok(self.lab.state().kernel.carries.get(&*disk.name).cloned())
    }

    fn changes(&self) -> broadcast::Receiver<DeviceChange> {
        match &*self.lab.inner.events.lock() {
            Some(events) => events.subscribe(),
            None => broadcast::channel(1).1,
        }
    }
}
