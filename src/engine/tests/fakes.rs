//! Fakes of the engine's three traits: a record in memory, a cloud and a kernel that obey a script.
//!
//! All three share one [`Lab`], so that one log shows in which order things happened. An engine's
//! fakes belong to a *life*: after a kill its store and cloud never answer again, as for a process
//! that is gone, and [`Lab::start`] begins the next life from what was committed.

mod kernel;
mod record;
mod sky;

use std::collections::{BTreeMap, HashMap, VecDeque};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use async_trait::async_trait;
use imbl::{OrdMap, OrdSet};
use parking_lot::{Mutex, MutexGuard};
use tokio::sync::{Notify, Semaphore, broadcast};

pub use sky::{delete_snapshot, revert, snapshot};

use super::super::world::World;
use super::super::{Engine, Events, Options, Target};
use crate::cloud::{
    About, Attachment, Call, Cloud, CloudError, CloudSnapshot, CloudVolume, Label, NewVolume, Refusal, Survey, VmFacts,
};
use crate::command::{Action, Command};
use crate::devices::{DeviceChange, Devices, DevicesError, Hold, Pin};
use crate::error::Error;
use crate::model::{
    BootId, Caller, DevNo, Disk, DiskIdentity, DiskName, DiskRow, Fence, Holder, Incarnation, JobId, JobRow, Mark,
    OpId, RecordId, Slot, SnapRow, SnapshotId, SnapshotName, Status, Timestamp, Verb, VmId, VolumeId, VolumeRow,
};
use crate::store::{Change, DiskLoaded, JobLoaded, Loaded, MappingRow, Next, OpRow, SnapshotLoaded, Store, StoreError};

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
    Snapshot,
    FindSnapshot,
    Snapshots,
    Revert,
    DeleteSnapshot,
    Running,
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

#[derive(Clone)]
pub struct Snap {
    pub loaded: SnapshotLoaded,
    pub gone: bool,
}

#[derive(Default, Clone)]
pub struct Record {
    pub jobs: OrdMap<JobRow, Job>,
    pub volumes: OrdMap<VolumeId, Vol>,
    pub owns: OrdMap<DiskRow, Own>,
    pub mappings: OrdMap<VolumeId, MappingRow>,
    pub ops: OrdMap<OpId, OpRow>,
    pub batches: Vec<Vec<Change>>,
    pub snapshots: OrdMap<SnapRow, Snap>,
    pub high: [i64; 6],
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
    pub snapshots: BTreeMap<VolumeId, Vec<CloudSnapshot>>,
    /// Which snapshot a fence took.
    pub taken: HashMap<Fence, SnapshotId>,
    /// What new snapshots are: not complete while set.
    pub unready: bool,
    /// A job of the cloud runs for every fence while set.
    pub running: Option<String>,
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
    /// What is in the way of a flush.
    pub writers: HashMap<DevNo, Vec<Holder>>,
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

pub fn on(row: DiskRow) -> Target {
    Target::Volume(row)
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
            size_step: 1,
            late: Duration::from_secs(60),
            prove_host: false,
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
            writers: HashMap::new(),
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
        self.begin_in(self)
    }

    /// Begins the next life in another lab's cloud, beside that one's own daemon.
    pub fn begin_in(&self, cloud: &Lab) -> Arc<Engine> {
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
            exact_size: true,
            read_only: None,
            foreign: false,
            history: 1000,
            events: Arc::new(Events::new(1000)),
            asked: Vec::new(),
            clock: Arc::new(move || Timestamp(1_800_000_000_000).plus(epoch.elapsed())),
        };
        let fake = Arc::new(Fake { lab: self.clone(), life });
        let there = Arc::new(Fake { lab: cloud.clone(), life: cloud.life() });
        let engine = Engine::start(fake.clone(), there, fake, options, tokio::runtime::Handle::current()).unwrap();
        let lab = self.clone();
        let shown = Mutex::new(BTreeMap::new());
        engine.on_publish(Arc::new(move |world| {
            lab.inner.moved.notify_waiters();
            along_the_graph(&mut shown.lock(), world);
        }));
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
            let seen = CloudVolume {
                id: volume,
                name,
                size: GIB,
                state: state_word,
                attached,
                mark,
                carries_host: None,
                pending: None,
            };
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
            pending: None,
        };
        self.state().sky.volumes.insert(id, volume);
        id
    }

    /// A volume becomes a job's in the record as an import leaves it, while no daemon runs.
    pub fn import(&self, volume: VolumeId, disk: &str) -> DiskRow {
        let at = Timestamp(0);
        let mut state = self.state();
        let record = &mut state.record;
        let (volumes, row) = (VolumeRow(record.high[1] + 1), DiskRow(record.high[2] + 1));
        let mut batch = Vec::new();
        if record.jobs.is_empty() {
            batch.push(Change::JobAdd { row: JobRow(1), id: job_id("imported"), at });
        }
        batch.extend([
            Change::VolumeAdd { row: volumes, volume, name: "old".into(), size: GIB, at },
            Change::VolumeStatus { volume, status: Status::Unknown, at },
            Change::DiskAdd { row, job: JobRow(1), disk: disk_name(disk), volume, epoch: 0, at },
        ]);
        record.take(&batch).unwrap();
        row
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

/// L9, in every test here: a status moves along the documented graph only.
fn along_the_graph(shown: &mut BTreeMap<DiskRow, Status>, world: &World) {
    // Where there are many volumes, it is their number that is tested.
    if world.volumes.len() > 100 {
        return;
    }
    for volume in world.volumes.values() {
        let status = volume.status();
        if let Some(was) = shown.insert(volume.row, status).filter(|was| *was != status) {
            assert!(crate::model::edge_is_documented(was, status), "l9: from {was} to {status}");
        }
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
