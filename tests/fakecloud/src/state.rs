//! What the cloud knows: its records, plain data.

use std::collections::{BTreeMap, HashMap, VecDeque};
use std::time::{Duration, Instant};

use serde_json::Value;

use crate::fault::{DeviceFault, Fault};
use crate::hypervisor::Plug;
use crate::options::{Account, Offering, Options, Zone};

/// Bytes of a GiB, the unit of sizes in requests.
pub const GIB: u64 = 1 << 30;

/// A volume.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Volume {
    /// Its UUID.
    pub id: String,
    /// Its number in the database: what texts print.
    pub number: u64,
    /// Not unique.
    pub name: String,
    /// Bytes.
    pub size: u64,
    /// `Allocated`, `Ready`, `Attaching`, … (4.1).
    pub state: String,
    /// `ROOT` or `DATADISK`.
    pub kind: String,
    /// The zone's id.
    pub zone: String,
    /// The offering's id; a root disk has none.
    pub offering: Option<String>,
    /// The owning account's name.
    pub account: String,
    /// The project's id, if it is a project's.
    pub project: Option<String>,
    /// The VM it is attached to.
    pub vm: Option<String>,
    /// Its place there; absent when detached.
    pub device_id: Option<u32>,
    /// When it was attached, seconds since 1970.
    pub attached: Option<i64>,
    /// When it was made, seconds since 1970.
    pub created: i64,
    /// Keys are unique.
    pub tags: BTreeMap<String, String>,
    /// deleteprotection of updateVolume.
    pub protected: bool,
    /// Out of everybody's sight, as if it were another account's.
    pub hidden: bool,
}

impl Volume {
    /// Whether it has storage and has not been removed for good.
    pub fn exists(&self) -> bool {
        self.state != "Expunged"
    }
}

/// A VM.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Vm {
    /// Its UUID.
    pub id: String,
    /// Its number in the database.
    pub number: u64,
    /// Its host name.
    pub name: String,
    /// `Running`, `Stopped`, `Migrating`, … (2.2).
    pub state: String,
    /// The zone's id.
    pub zone: String,
    /// `KVM`, `VMware`, `XenServer`.
    pub hypervisor: String,
    /// The owning account's name.
    pub account: String,
    /// The project's id, if it is a project's.
    pub project: Option<String>,
    /// Most data disks.
    pub most_disks: u32,
    /// VM snapshots taken: any of them refuses attach and detach.
    pub vm_snapshots: u32,
    /// In a backup offering: attach and detach are refused.
    pub backups: bool,
    /// Out of everybody's sight.
    pub hidden: bool,
}

/// A snapshot of a volume.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Snapshot {
    /// Its UUID.
    pub id: String,
    /// The volume's id.
    pub volume: String,
    /// Its name.
    pub name: String,
    /// `Allocated`, `BackingUp`, `BackedUp`, `Destroyed`, … (2.8).
    pub state: String,
    /// Bytes of the volume when it was taken.
    pub size: u64,
    /// When it was made, seconds since 1970.
    pub created: i64,
    /// The owning account's name.
    pub account: String,
    /// Keys are unique.
    pub tags: BTreeMap<String, String>,
}

/// An async job.
#[derive(Debug, Clone, PartialEq)]
pub struct Job {
    /// Its UUID: the caller's `customjobid`, or ours.
    pub id: String,
    /// The command that started it.
    pub command: String,
    /// The account that started it; empty for an out-of-band action of an admin.
    pub account: String,
    /// 0 open, 1 success, 2 failure.
    pub status: u32,
    /// 0, or the code of a failure.
    pub code: u32,
    /// `jobresult`, which may be absent.
    pub result: Option<Value>,
    /// `Volume`, `Snapshot` or nothing, and the id.
    pub instance: Option<(String, String)>,
    /// The VM in whose queue it runs.
    pub queue: Option<String>,
    /// queryAsyncJobResult does not know it (any more).
    pub lost: bool,
    /// When it was started, seconds since 1970.
    pub created: i64,
    /// When it was final, seconds since 1970.
    pub completed: Option<i64>,
}

impl Job {
    /// Whether it is final.
    pub fn done(&self) -> bool {
        self.status != 0
    }
}

/// What was really done, as against what was asked for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[allow(missing_docs)]
pub enum Effect {
    Created,
    Attached,
    Detached,
    Resized,
    Destroyed,
    Expunged,
    Recovered,
    Renamed,
    Tagged,
    Untagged,
    SnapshotTaken,
    SnapshotDeleted,
    Reverted,
    /// A device appeared.
    Plugged,
    /// A device went, as far as it is the cloud's to say.
    Unplugged,
}

/// One effect, in order.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Done {
    /// What.
    pub effect: Effect,
    /// To which volume.
    pub volume: String,
    /// By an out-of-band action of a test, not by a request.
    pub by_admin: bool,
    /// When.
    pub at: Instant,
}

/// A request that was understood.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Request {
    /// `GET` or `POST`.
    pub method: String,
    /// The command, as written.
    pub command: String,
    /// All other parameters but the key and the signature, as sent, in the order of names.
    pub params: BTreeMap<String, String>,
    /// When it was read.
    pub at: Instant,
    /// HTTP status of the answer; 0 if the connection was dropped before acting.
    pub status: u16,
}

/// An entry of listEvents.
#[derive(Debug, Clone)]
pub(crate) struct Event {
    pub id: String,
    pub kind: &'static str,
    pub level: &'static str,
    pub words: String,
    pub resource: String,
    pub account: String,
    pub created: i64,
}

/// A device that is there, or will be when somebody says so.
#[derive(Debug, Clone)]
pub(crate) struct Device {
    pub plug: Plug,
    /// The hypervisor has it.
    pub there: bool,
}

/// All of it, under one lock.
#[derive(Debug, Default)]
pub(crate) struct World {
    pub volumes: BTreeMap<String, Volume>,
    pub vms: BTreeMap<String, Vm>,
    pub snapshots: BTreeMap<String, Snapshot>,
    pub jobs: BTreeMap<String, Job>,
    pub zones: Vec<Zone>,
    pub offerings: Vec<Offering>,
    pub accounts: Vec<Account>,
    pub events: Vec<Event>,
    /// Jobs waiting for, or having, their turn on a VM.
    pub queues: BTreeMap<String, VecDeque<String>>,
    /// Jobs that were told to end, with the server that ran them.
    pub killed: Vec<String>,
    /// Jobs held at a moment until they are released.
    pub held: Vec<String>,
    pub faults: Vec<Fault>,
    pub device_faults: HashMap<String, DeviceFault>,
    pub devices: Vec<Device>,
    pub requests: Vec<Request>,
    pub done: Vec<Done>,
    /// Ids for the next volumes made.
    pub next_ids: VecDeque<String>,
    pub job_delay: Duration,
    pub delays: HashMap<String, Duration>,
    /// Seconds by which the server's clock is ahead.
    pub clock: i64,
    /// Answers have a `Date`.
    pub dated: bool,
    /// Snapshot policies by volume.
    pub snapshot_policies: BTreeMap<String, u32>,
    /// Calls of an account in the present window of the rate limit.
    pub windows: HashMap<String, (Instant, u32)>,
    /// Counts everything that is made; numbers of the database.
    pub numbers: u64,
    /// Rises with each change.
    pub version: u64,
    pub ending: bool,
}

impl World {
    pub fn new(options: &Options) -> Self {
        World {
            zones: options.zones.clone(),
            offerings: options.offerings.clone(),
            accounts: options.accounts.clone(),
            job_delay: options.job_delay,
            delays: options.delays.clone(),
            ..World::default()
        }
    }

    pub fn number(&mut self) -> u64 {
        self.numbers += 1;
        self.numbers
    }

    pub fn delay(&self, command: &str) -> Duration {
        self.delays.get(command).copied().unwrap_or(self.job_delay)
    }

    pub fn record(&mut self, effect: Effect, volume: &str, by_admin: bool) {
        self.done.push(Done { effect, volume: volume.to_owned(), by_admin, at: Instant::now() });
    }

    /// The pending jobs that listVolumes shows, by volume: one of several.
    pub fn pending(&self) -> BTreeMap<String, String> {
        let open = self.jobs.values().filter(|job| !job.done());
        let on_volumes = open.filter_map(|job| match &job.instance {
            Some((kind, volume)) if kind == "Volume" => Some((volume.clone(), job.id.clone())),
            _ => None,
        });
        on_volumes.collect()
    }

    /// The lowest free device id from 1, without 3 (2.3).
    pub fn free_device_id(&self, vm: &Vm) -> Option<u32> {
        let used: Vec<_> = self.on_vm(&vm.id).filter_map(|v| v.device_id).collect();
        (1..=vm.most_disks + 1).find(|n| *n != 3 && !used.contains(n))
    }

    /// What is attached to a VM.
    pub fn on_vm<'a>(&'a self, vm: &'a str) -> impl Iterator<Item = &'a Volume> {
        self.volumes.values().filter(move |v| v.vm.as_deref() == Some(vm))
    }
}
