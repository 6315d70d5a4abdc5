//! A world made by hand, and an engine of which only what the tree sees is there.

use std::collections::HashMap;
use std::sync::Arc;

use imbl::{OrdMap, Vector};
use parking_lot::Mutex;
use uuid::Uuid;

use super::core::Core;
use super::node::{Node, RootFile};
use super::tree::{self, ExportNames, View};
use crate::cloud::{Attachment, CloudVolume};
use crate::command::{Action, Command};
use crate::devices::{DevicesError, Pin};
use crate::engine::world::*;
use crate::engine::{Asker, DeviceNow, Earlier, Events, Left, Submitted, Target, Ticket};
use crate::error::{Errno, Error};
use crate::model::*;

pub const HOST: u128 = 0xabc;
pub const OTHER_VM: u128 = 0xdef;

pub fn vol(n: u128) -> VolumeId {
    VolumeId(Uuid::from_u128(0x2aff_4799_1111_4222_8333_4444_0000_0000 + n))
}

pub fn vm(n: u128) -> VmId {
    VmId(Uuid::from_u128(n))
}

pub fn job_id(name: &str) -> JobId {
    JobId::parse(name).unwrap()
}

pub fn disk(name: &str) -> DiskName {
    DiskName::parse(name).unwrap()
}

pub fn boot() -> BootId {
    BootId(Uuid::from_u128(0xb001))
}

pub fn root() -> Caller {
    Caller { uid: 0, gid: 0, pid: 4711, comm: "sh".into() }
}

#[derive(Debug)]
struct NoPin;

impl Pin for NoPin {
    fn alive(&self) -> bool {
        true
    }
    fn look(&self) -> Result<Disk, DevicesError> {
        Err(DevicesError::Gone { device: "none".into() })
    }
    fn release(&self) {}
}

pub fn at(ms: i64) -> Timestamp {
    Timestamp(1_700_000_000_000 + ms)
}

pub fn empty_world() -> World {
    World {
        seq: 1,
        at: at(0),
        record: RecordId(Uuid::from_u128(0x4ec)),
        host: vm(HOST),
        boot: boot(),
        started: at(0),
        read_only: None,
        provider: "fake",
        most_disks: 28,
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
        listed_at: at(0),
        health: Health {
            cloud: Component::Ok,
            store: Component::Ok,
            devices: Component::Ok,
            reconciler: Component::Ok,
            keeper: Component::Ok,
            at: at(0),
        },
        counters: Counters::default(),
    }
}

pub fn add_job(world: &mut World, row: i64, name: &str) {
    let job = Job {
        row: JobRow(row),
        id: job_id(name),
        created: at(1),
        vm_name: ("".into(), at(1)),
        hold: (false, at(1)),
        disks: OrdMap::new(),
        creating: OrdMap::new(),
        running: None,
        error: None,
        history: Vector::new(),
        status_at: at(1),
        listed_at: at(1),
    };
    world.job_rows.insert(job.id.clone(), job.row);
    world.jobs.insert(job.row, Arc::new(job));
}

/// A detached volume.
pub fn add_volume(world: &mut World, row: i64, job: i64, name: &str, uuid: VolumeId) {
    let volume = Volume {
        row: DiskRow(row),
        uuid,
        job: JobRow(job),
        disk: disk(name),
        epoch: 3,
        base: Status::Detached,
        recorded: Status::Detached,
        running: None,
        mapping: None,
        vm: None,
        device_id: None,
        name: "a volume".into(),
        size: 1 << 30,
        serial: "".into(),
        cloud_state: "Ready".into(),
        owner: "".into(),
        snapshots: Snapshots::default(),
        why: None,
        error: None,
        history: Arc::default(),
        times: Times {
            owned: at(2),
            status: at(2),
            device: at(2),
            facts: at(2),
            error: at(2),
            history: at(2),
            snapshots: at(2),
        },
    };
    edit_job(world, job, |j| {
        j.disks.insert(disk(name), DiskRow(row));
    });
    world.by_uuid.insert(uuid, DiskRow(row));
    world.volumes.insert(DiskRow(row), Arc::new(volume));
}

/// The id of a snapshot.
pub fn snap(n: u128) -> SnapshotId {
    SnapshotId(Uuid::from_u128(0x5a00_0000_0000_4000_8000_0000_0000_0000 + n))
}

/// A snapshot `snap(n)` of it: one of ours by row `n`, or a foreign one.
pub fn add_snapshot(world: &mut World, row: i64, n: i64, name: &str, ours: bool) {
    let id = snap(n as u128);
    let snapshot = Snapshot {
        name: SnapshotName::parse(name).unwrap(),
        id,
        row: ours.then_some(SnapRow(n)),
        state: if ours { "BackedUp".into() } else { "".into() },
        size: if ours { 1 << 30 } else { 0 },
        created: ours.then(|| at(20)),
        at: at(21),
    };
    edit(world, row, |v| v.snapshots = Snapshots::new(v.snapshots.iter().cloned().chain([snapshot])));
    if ours {
        world.snapshots.insert(SnapRow(n), DiskRow(row));
    } else {
        world.foreign_snapshots.insert(id, DiskRow(row));
    }
}

pub fn edit_job(world: &mut World, row: i64, edit: impl FnOnce(&mut Job)) {
    let mut job = (*world.jobs[&JobRow(row)]).clone();
    edit(&mut job);
    world.jobs.insert(JobRow(row), Arc::new(job));
}

pub fn edit(world: &mut World, row: i64, edit: impl FnOnce(&mut Volume)) {
    let mut volume = (*world.volumes[&DiskRow(row)]).clone();
    edit(&mut volume);
    world.volumes.insert(DiskRow(row), Arc::new(volume));
}

/// Attaches it here: mapping `map`, device `name` with the number 7:`map`.
pub fn attach(world: &mut World, row: i64, map: i64, name: &str) {
    let host = world.host;
    let mapping = Mapping {
        row: MapRow(map),
        name: name.into(),
        dev: DevNo { major: 7, minor: map as u32 },
        incarnation: Incarnation { boot: boot(), diskseq: 40 + map as u64 },
        size: 1 << 30,
        pin: Arc::new(NoPin),
        at: at(3),
    };
    edit(world, row, |v| {
        v.base = Status::Attached;
        v.vm = Some(host);
        v.mapping = Some(Arc::new(mapping));
    });
    world.by_mapping.insert(MapRow(map), DiskRow(row));
    world.by_device.insert(name.into(), DiskRow(row));
}

pub fn add_unclaimed(world: &mut World, uuid: VolumeId, device: Option<&str>) {
    let cloud = CloudVolume {
        id: uuid,
        name: "foreign\tname\\x".into(),
        size: 2 << 30,
        state: "Ready".into(),
        attached: Some(Attachment { vm: vm(OTHER_VM), device_id: Some(1) }),
        mark: None,
        carries_host: None,
        pending: None,
    };
    let unclaimed = Unclaimed {
        cloud: Arc::new(cloud),
        device: device.map(Into::into),
        serial: "".into(),
        reason: "attached to a VM of vms/".into(),
        since: at(4),
    };
    world.unclaimed.insert(uuid, Arc::new(unclaimed));
}

/// Two jobs; job `a` with vol(1) attached as loop7, which has snapshots, and vol(2) detached, job `b` with vol(3);
/// vol(4) unclaimed on loop9; a VM with vol(3) and vol(4), and a stale one.
pub fn world() -> World {
    let mut w = empty_world();
    add_job(&mut w, 1, "a");
    add_job(&mut w, 2, "b");
    add_volume(&mut w, 11, 1, "disk-2000", vol(1));
    add_volume(&mut w, 12, 1, "disk-2001", vol(2));
    add_volume(&mut w, 13, 2, "data", vol(3));
    attach(&mut w, 11, 7, "loop7");
    add_snapshot(&mut w, 11, 31, "before-test", true);
    add_snapshot(&mut w, 11, 32, "daily", false);
    add_unclaimed(&mut w, vol(4), Some("loop9"));
    let seen = VmView { volumes: vec![vol(3), vol(4)], seen: Some(at(5)), stale: false };
    w.vms.insert(vm(OTHER_VM), Arc::new(seen));
    w.vms.insert(vm(HOST), Arc::new(VmView { volumes: vec![], seen: Some(at(5)), stale: true }));
    w
}

pub fn operation(id: i64, verb: Verb) -> Operation {
    Operation {
        id: OpId(id),
        fence: Fence(Uuid::from_u128(id as u128)),
        verb,
        command: verb.as_str().into(),
        job: Some((JobRow(1), job_id("a"))),
        volume: Some(vol(2)),
        disk: Some(disk("disk-2001")),
        parent: None,
        step: "waits for the cloud".into(),
        caller: Arc::new(root()),
        began: at(6),
        joined: 1,
        ended: None,
    }
}

pub fn history_row(verb: Verb, outcome: Outcome) -> HistoryRow {
    HistoryRow {
        at: at(7),
        op: OpId(5),
        verb,
        job: Some(job_id("a")),
        disk: None,
        volume: Some(vol(1)),
        outcome,
        sentence: "".into(),
        took_ms: 1234,
        caller: Arc::new(root()),
    }
}

type Publish = Arc<dyn Fn(&Arc<World>) + Send + Sync>;

/// What a submitted command gets.
pub type Answer = Box<dyn Fn(&Fake, Target, &Command, &Caller) -> Submitted + Send + Sync>;

/// A fake engine: the world is set by the test, devices are those of its mappings unless `gone`.
pub struct Fake {
    pub world: Mutex<Arc<World>>,
    pub gone: Mutex<Vec<MapRow>>,
    pub events: Events,
    pub publish: Mutex<Vec<Publish>>,
    pub answer: Mutex<Option<Answer>>,
    pub failures: Mutex<Vec<(Target, String, Error)>>,
    pub left: Mutex<Vec<Left>>,
    pub holders: Mutex<HashMap<DiskRow, Ticket<Arc<Vec<Holder>>>>>,
    pub job_ticket: Mutex<Option<Ticket<JobRow>>>,
    /// What `control` has asked about.
    pub asked: Mutex<Vec<Action>>,
}

impl Fake {
    pub fn new() -> Arc<Self> {
        Self::with(world())
    }

    pub fn with(world: World) -> Arc<Self> {
        Arc::new(Self {
            world: Mutex::new(Arc::new(world)),
            gone: Mutex::default(),
            events: Events::new(64),
            publish: Mutex::default(),
            answer: Mutex::default(),
            failures: Mutex::default(),
            left: Mutex::default(),
            holders: Mutex::default(),
            job_ticket: Mutex::default(),
            asked: Mutex::default(),
        })
    }

    /// Publishes a changed world.
    pub fn change(&self, edit: impl FnOnce(&mut World)) {
        let world = {
            let mut slot = self.world.lock();
            let mut world = (**slot).clone();
            edit(&mut world);
            world.seq += 1;
            world.at = world.at.plus(std::time::Duration::from_secs(1));
            *slot = Arc::new(world);
            slot.clone()
        };
        let all = self.publish.lock().clone();
        for f in all {
            f(&world);
        }
    }

    fn now(&self, volume: &Volume) -> Result<DeviceNow, Error> {
        let none = || Error::NoDevice { volume: volume.uuid, status: volume.status() };
        // Also while a detach withdraws it: that the tree does not serve it then is the tree's matter.
        let m = volume.mapping.as_ref().filter(|m| !self.gone.lock().contains(&m.row)).ok_or_else(none)?;
        Ok(DeviceNow { name: m.name.clone(), dev: m.dev, incarnation: m.incarnation, mapping: m.row, size: m.size })
    }
}

impl Core for Fake {
    fn world(&self) -> Arc<World> {
        self.world.lock().clone()
    }
    fn events(&self) -> &Events {
        &self.events
    }
    fn on_publish(&self, f: Publish) {
        self.publish.lock().push(f);
    }
    fn submit(&self, target: Target, command: Command, asker: Asker) -> Submitted {
        match &*self.answer.lock() {
            Some(answer) => answer(self, target, &command, &asker.caller),
            None => Submitted { ticket: Ticket::done(Ok(())), deadline: None, op: None, fence: None },
        }
    }
    fn earlier(&self, _fence: Fence) -> Option<Earlier> {
        None
    }
    fn would(&self, target: Target, action: &Action) -> Result<(), Error> {
        self.asked.lock().push(action.clone());
        match (target, action) {
            (Target::Volume(_), Action::Revert { .. }) => Err(Error::NotPermitted { what: "not\nnow" }),
            _ => Ok(()),
        }
    }
    fn note_failure(&self, target: Target, verb: &str, _caller: &Caller, error: &Error) {
        self.failures.lock().push((target, verb.into(), error.clone()));
    }
    fn caller_left(&self, _: Target, _: Verb, _: Option<OpId>, _: &Caller, left: Left) -> Errno {
        self.left.lock().push(left);
        match left {
            Left::Interrupted => Errno::EINTR,
            Left::TimedOut(_) => Errno::ETIMEDOUT,
        }
    }
    fn make_job(&self, id: JobId, _asker: Asker) -> Ticket<JobRow> {
        if let Some(ticket) = &*self.job_ticket.lock() {
            return ticket.clone();
        }
        if self.world().job_rows.contains_key(&id) {
            return Ticket::done(Err(Error::JobExists { job: id }));
        }
        let row = self.world().jobs.get_max().map_or(1, |(r, _)| r.0 + 1);
        self.change(|w| add_job(w, row, id.as_str()));
        Ticket::done(Ok(JobRow(row)))
    }
    fn forget_job(&self, job: JobRow, _asker: Asker) -> Ticket {
        let world = self.world();
        let owned = &world.jobs[&job];
        if !owned.disks.is_empty() {
            return Ticket::done(Err(Error::JobNotEmpty { job: owned.id.clone(), count: owned.disks.len() }));
        }
        self.change(|w| {
            w.jobs.remove(&job);
            w.job_rows.remove(&owned.id);
        });
        Ticket::done(Ok(()))
    }
    fn set_vm_name(&self, job: JobRow, value: String, _asker: Asker) -> Ticket {
        self.change(|w| edit_job(w, job.0, |j| j.vm_name = (value.into(), at(99))));
        Ticket::done(Ok(()))
    }
    fn set_hold(&self, job: JobRow, value: bool, _asker: Asker) -> Ticket {
        self.change(|w| edit_job(w, job.0, |j| j.hold = (value, at(99))));
        Ticket::done(Ok(()))
    }
    fn device(&self, volume: DiskRow) -> Result<DeviceNow, Error> {
        self.now(self.world().volumes.get(&volume).ok_or(Error::Stale)?)
    }
    fn mapped(&self, mapping: MapRow) -> Result<DeviceNow, Error> {
        let world = self.world();
        let row = world.by_mapping.get(&mapping).ok_or(Error::Stale)?;
        self.now(&world.volumes[row])
    }
    fn holders(&self, volume: DiskRow) -> Ticket<Arc<Vec<Holder>>> {
        let set = self.holders.lock().get(&volume).cloned();
        set.unwrap_or_else(|| Ticket::done(Ok(Arc::new(Vec::new()))))
    }
}

/// Asks the tree of a world, with that world's devices.
pub struct Asked {
    pub fake: Arc<Fake>,
    pub world: Arc<World>,
    pub exports: ExportNames,
}

impl Asked {
    pub fn new(world: World) -> Self {
        let fake = Fake::with(world);
        let world = fake.world();
        Self { fake, world, exports: ExportNames::parse("{uuid}").unwrap() }
    }

    pub fn view(&self) -> View<'_> {
        View { world: &self.world, core: &*self.fake, exports: &self.exports }
    }

    /// Walks a path from the root.
    pub fn find(&self, path: &str) -> Result<Node, Errno> {
        let parts = path.split('/').filter(|p| !p.is_empty());
        parts.into_iter().try_fold(Node::Root(RootFile::Dir), |dir, name| tree::lookup(&self.view(), dir, name))
    }

    pub fn text(&self, path: &str) -> Result<String, Errno> {
        super::render::text(&self.view(), self.find(path)?)
    }

    /// Names in a directory but `.` and `..`.
    pub fn names(&self, path: &str) -> Result<Vec<String>, Errno> {
        let all = tree::list(&self.view(), self.find(path)?)?;
        Ok(all.into_iter().skip(2).map(|e| e.name).collect())
    }
}
