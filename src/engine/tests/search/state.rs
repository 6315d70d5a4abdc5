//! One volume, as the cloud, the kernel, the record and the engine's memory have it.

use std::collections::BTreeMap;

use crate::cloud::{Attachment, CloudVolume};
use crate::command::Action;
use crate::engine::reconcile::Recorded;
use crate::model::{BootId, DevNo, Disk, DiskIdentity, Incarnation, Mark, RecordId, Status, VmId, VolumeId};
use uuid::Uuid;

pub const SIZE: u64 = 1 << 30;
pub const HOST: VmId = VmId(Uuid::from_u128(1));
pub const OTHER: VmId = VmId(Uuid::from_u128(2));
pub const VOLUME: VolumeId = VolumeId(Uuid::from_u128(3 << 64));
pub const OURS: Mark = Mark { record: RecordId(Uuid::from_u128(4)), epoch: 1 };
pub const THEIRS: Mark = Mark { record: RecordId(Uuid::from_u128(5)), epoch: 7 };
const BOOT: BootId = BootId(Uuid::from_u128(6));

/// Where the cloud has it attached.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Spot {
    Free,
    Here,
    There,
}

impl Spot {
    pub fn vm(self) -> Option<VmId> {
        match self {
            Spot::Free => None,
            Spot::Here => Some(HOST),
            Spot::There => Some(OTHER),
        }
    }

    pub fn of(vm: Option<VmId>) -> Self {
        match vm {
            None => Spot::Free,
            Some(vm) if vm == HOST => Spot::Here,
            Some(_) => Spot::There,
        }
    }
}

/// The kernel's device.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Dev {
    None,
    /// Of the attachment that the cloud has now.
    There,
    /// Of one that is over: it goes, sooner or later.
    Stale,
}

/// A mapping: to the very device that is there, or to one that is gone.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Map {
    None,
    This,
    Gone,
}

impl Map {
    pub fn incarnation(self) -> Option<Incarnation> {
        match self {
            Map::None => None,
            Map::This => Some(Incarnation { boot: BOOT, diskseq: 1 }),
            Map::Gone => Some(Incarnation { boot: BOOT, diskseq: 0 }),
        }
    }
}

/// What an operation does.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Op {
    pub attach: bool,
    pub to: Spot,
}

pub const OPS: [Op; 4] = [
    Op { attach: true, to: Spot::Here },
    Op { attach: true, to: Spot::There },
    Op { attach: false, to: Spot::Here },
    Op { attach: false, to: Spot::There },
];

impl Op {
    pub fn action(self) -> Action {
        match self.attach {
            true => Action::Attach { vm: self.to.vm(), slot: None },
            false => Action::Detach { vm: self.to.vm(), force: false },
        }
    }
}

/// A job of the cloud, and whether the operation that started it still runs.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Job {
    pub op: Op,
    pub live: bool,
}

/// How an operation is about to end.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum End {
    Done,
    Failed,
    Ambiguous,
    Interrupted,
}

/// The step that an operation is at.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Step {
    /// Begun in memory.
    Journal,
    /// It looks before it calls.
    Look,
    /// It looks, and calls in the same moment.
    Call,
    /// The cloud's job runs, or has its answer.
    Wait,
    /// The answer was lost.
    Unclear,
    /// The cloud has said done: the evidence is waited for.
    Prove,
    /// After a crash: it looks whether the cloud has begun it.
    Recover,
    /// On its way to the record.
    End(End),
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Run {
    pub op: Op,
    pub step: Step,
    pub recovering: bool,
}

/// What the record has.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Rec {
    pub status: Status,
    pub vm: Spot,
    pub map: Map,
    /// Begun and not ended.
    pub op: Option<Op>,
}

/// What the engine has in memory.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Mem {
    pub base: Status,
    pub vm: Spot,
    pub map: Map,
    /// The mark that was last seen on it was ours.
    pub owned: bool,
    pub run: Option<Run>,
}

/// A volume.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct V {
    pub at: Spot,
    pub ours: bool,
    pub job: Option<Job>,
    pub dev: Dev,
    pub rec: Rec,
    pub mem: Mem,
    /// Effects of the operation that began last.
    pub effects: u8,
    /// Another hand was in it since that began.
    pub touched: bool,
    /// That was done, and nothing has happened since.
    pub proved: bool,
}

/// What the search has seen on its way.
#[derive(Default)]
pub struct Finds {
    pub wrong: Vec<String>,
    pub reached: BTreeMap<&'static str, u64>,
}

impl Finds {
    pub fn reach(&mut self, what: &'static str) {
        *self.reached.entry(what).or_default() += 1;
    }
}

impl V {
    /// Detached, known, and ours.
    pub fn new() -> Self {
        let rec = Rec { status: Status::Detached, vm: Spot::Free, map: Map::None, op: None };
        let mem = Mem { base: Status::Detached, vm: Spot::Free, map: Map::None, owned: true, run: None };
        V { at: Spot::Free, ours: true, job: None, dev: Dev::None, rec, mem, effects: 0, touched: false, proved: false }
    }

    /// As the cloud shows it.
    pub fn seen(&self) -> CloudVolume {
        CloudVolume {
            id: VOLUME,
            name: String::new(),
            size: SIZE,
            state: String::new(),
            attached: self.at.vm().map(|vm| Attachment { vm, device_id: Some(1) }),
            mark: Some(if self.ours { OURS } else { THEIRS }),
            carries_host: None,
            pending: self.job.map(|_| "job".into()),
        }
    }

    /// The kernel's devices that carry its identity.
    pub fn disks(&self) -> Vec<Disk> {
        let there = self.dev != Dev::None;
        let disk = Map::This.incarnation().map(|incarnation| Disk {
            name: "vdb".into(),
            dev: DevNo { major: 252, minor: 0 },
            incarnation,
            size: SIZE,
            identity: DiskIdentity::VirtioSerial(VOLUME.0.simple().to_string()[..20].into()),
        });
        disk.filter(|_| there).into_iter().collect()
    }

    pub fn recorded(&self) -> Recorded {
        Recorded {
            status: self.mem.base,
            vm: self.mem.vm.vm(),
            mapped: self.mem.map.incarnation(),
            size: SIZE,
            mark: OURS,
            unmarked: None,
        }
    }

    /// The word for `status`.
    pub fn shows(&self) -> Status {
        match self.mem.run {
            Some(Run { op: Op { attach: true, .. }, .. }) => Status::Attaching,
            Some(_) => Status::Detaching,
            None => self.mem.base,
        }
    }

    /// The device goes: what was mapped to it is mapped to what is gone.
    pub fn unplugged(&mut self) {
        self.dev = Dev::None;
        for map in [&mut self.rec.map, &mut self.mem.map] {
            if *map == Map::This {
                *map = Map::Gone;
            }
        }
    }

    /// The cloud has it elsewhere now.
    pub fn moved(&mut self, to: Spot) {
        self.at = to;
        if self.dev == Dev::There {
            self.dev = Dev::Stale;
        }
    }

    /// What is left alone shows the truth.
    pub fn at_rest(&self) -> Result<(), String> {
        let truth = match (self.ours, self.at) {
            (false, _) => Status::Conflict,
            (true, Spot::Free) => Status::Detached,
            (true, Spot::Here) => Status::Attached,
            (true, Spot::There) => Status::Remote,
        };
        let dev = if self.at == Spot::Here { Dev::There } else { Dev::None };
        match () {
            () if self.mem.run.is_some() || self.rec.op.is_some() => Err("an operation never ends".into()),
            () if self.job.is_some() => Err("the cloud's job never ends".into()),
            () if self.dev != dev => Err(format!("the device is {:?}", self.dev)),
            () if self.shows() != truth || self.rec.status != truth => {
                Err(format!("is {truth}, shown {}, recorded {}", self.shows(), self.rec.status))
            }
            () if truth == Status::Attached && (self.mem.map, self.rec.map) != (Map::This, Map::This) => {
                Err("its mapping is not to the device that is there".into())
            }
            () => Ok(()),
        }
    }
}
