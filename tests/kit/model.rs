//! One caller's own volumes, as its acknowledged commands have made them. What is not acknowledged
//! may have happened or not; nothing else may.

use std::collections::BTreeMap;
use std::fs::{self, OpenOptions};
use std::os::unix::fs::FileExt;

use super::Dice;
use super::common::Volfs;
use super::oracle::View;

const MIB: i64 = 1 << 20;
const MOST: i64 = 8 * MIB;
/// Where the last stamp is, on the second page of a volume.
const STAMP_AT: u64 = 4096;

/// A volume as it should be.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Vol {
    pub job: String,
    pub disk: String,
    pub attached: bool,
    pub size: i64,
    pub stamp: i64,
}

/// A command and what it makes of one's volumes.
#[derive(Debug, Clone)]
enum Step {
    Create { job: String, disk: String },
    Attach(String),
    Detach(String),
    AttachAll(String),
    DetachAll(String),
    Resize(String, i64),
    Rename(String, String),
    Move(String, String),
    Delete(String),
    Release(String),
    Claim { uuid: String, job: String, disk: String },
    VmName(String, String),
    Stamp(String, i64),
}

type Volumes = BTreeMap<String, Vol>;

/// One caller and what it knows.
#[derive(Debug, Clone)]
pub struct Model {
    jobs: [String; 2],
    volumes: Volumes,
    /// Given up, data untouched: to be claimed again.
    released: Volumes,
    deleted: Vec<String>,
    vm_names: BTreeMap<String, String>,
    /// What was not answered, if the last one was not.
    pending: Option<Step>,
    serial: i64,
    pub acknowledged: usize,
    pub unanswered: usize,
}

impl Model {
    /// A caller with two jobs of its own.
    pub fn new(volfs: &Volfs, name: &str) -> Model {
        let jobs = [format!("{name}-a"), format!("{name}-b")];
        for job in &jobs {
            fs::create_dir(volfs.path(format!("jobs/{job}"))).unwrap();
        }
        let vm_names = jobs.iter().map(|j| (j.clone(), String::new())).collect();
        Model {
            jobs,
            volumes: BTreeMap::new(),
            released: BTreeMap::new(),
            deleted: Vec::new(),
            vm_names,
            pending: None,
            serial: 0,
            acknowledged: 0,
            unanswered: 0,
        }
    }

    fn next(&mut self, dice: &mut Dice) -> Step {
        self.serial += 1;
        let job = dice.one(&self.jobs).clone();
        let uuids: Vec<String> = self.volumes.keys().cloned().collect();
        if uuids.len() < 2 || (uuids.len() < 5 && dice.below(12) == 0) {
            if let Some((uuid, vol)) = self.released.iter().next().filter(|_| dice.below(2) == 0) {
                return Step::Claim { uuid: uuid.clone(), job, disk: vol.disk.clone() };
            }
            return Step::Create { job, disk: format!("d{}", self.serial) };
        }
        let uuid = dice.one(&uuids).clone();
        let vol = &self.volumes[&uuid];
        match dice.below(24) {
            0 if vol.size < MOST => Step::Resize(uuid, vol.size + MIB),
            1 => Step::Rename(uuid, format!("r{}", self.serial)),
            2 => Step::Move(uuid, if vol.job == self.jobs[0] { &self.jobs[1] } else { &self.jobs[0] }.clone()),
            3 if !vol.attached => Step::Delete(uuid),
            4 if !vol.attached => Step::Release(uuid),
            5 => Step::AttachAll(job),
            6 => Step::DetachAll(job),
            7 => Step::VmName(job, format!("vm{}", self.serial)),
            8..=11 if vol.attached => Step::Stamp(uuid, self.serial),
            _ if vol.attached => Step::Detach(uuid),
            _ => Step::Attach(uuid),
        }
    }

    /// Does one command; false when it was not answered.
    pub fn act(&mut self, volfs: &Volfs, dice: &mut Dice) -> Result<bool, String> {
        let step = self.next(dice);
        let of = |uuid: &String| format!("volumes/{uuid}/control");
        let at = |job: &String| format!("jobs/{job}/control");
        let command = |path: String, text: String| write(volfs, &path, &text);
        let errno = match &step {
            Step::Create { job, disk } => command(at(job), format!("create {disk} 1M")),
            Step::Attach(uuid) => command(of(uuid), "attach".into()),
            Step::Detach(uuid) => command(of(uuid), "detach".into()),
            Step::AttachAll(job) => command(at(job), "attach".into()),
            Step::DetachAll(job) => command(at(job), "detach".into()),
            Step::Resize(uuid, size) => command(of(uuid), format!("resize {size}")),
            Step::Rename(uuid, disk) => command(of(uuid), format!("disk {disk}")),
            Step::Move(uuid, job) => command(of(uuid), format!("move {job}")),
            Step::Delete(uuid) => command(of(uuid), format!("delete {uuid}")),
            Step::Release(uuid) => command(of(uuid), format!("release {uuid}")),
            Step::Claim { uuid, job, disk } => command(at(job), format!("claim {uuid} {disk}")),
            Step::VmName(job, name) => command(format!("jobs/{job}/vm_name"), name.clone()),
            Step::Stamp(uuid, n) => stamp(volfs, uuid, *n),
        };
        match errno {
            0 => {
                self.acknowledged += 1;
                let uuid = match &step {
                    Step::Create { job, disk } => match created(volfs, job, disk) {
                        Some(uuid) => Some(uuid),
                        // Killed before it could be asked: the oracle finds it, and it must be there.
                        None => {
                            self.pending = Some(step);
                            return Ok(false);
                        }
                    },
                    _ => None,
                };
                self.take(&step, uuid);
                Ok(true)
            }
            libc::ENOTCONN | libc::ECONNABORTED | libc::ENXIO => {
                self.unanswered += 1;
                self.pending = Some(step);
                Ok(false)
            }
            errno => Err(format!("{step:?} of {:?}: errno {errno}\n{}", self.volumes, volfs.log())),
        }
    }

    fn take(&mut self, step: &Step, made: Option<String>) {
        match step {
            Step::Create { job, disk } => {
                let vol = Vol { job: job.clone(), disk: disk.clone(), attached: false, size: MIB, stamp: 0 };
                self.volumes.insert(made.unwrap(), vol);
            }
            Step::Attach(uuid) => self.of(uuid).attached = true,
            Step::Detach(uuid) => self.of(uuid).attached = false,
            Step::AttachAll(job) | Step::DetachAll(job) => {
                for vol in self.volumes.values_mut().filter(|v| v.job == *job) {
                    vol.attached = matches!(step, Step::AttachAll(_));
                }
            }
            Step::Resize(uuid, size) => self.of(uuid).size = *size,
            Step::Rename(uuid, disk) => self.of(uuid).disk.clone_from(disk),
            Step::Move(uuid, job) => self.of(uuid).job.clone_from(job),
            Step::Delete(uuid) => {
                self.volumes.remove(uuid);
                self.deleted.push(uuid.clone());
            }
            Step::Release(uuid) => {
                let vol = self.volumes.remove(uuid).unwrap();
                self.released.insert(uuid.clone(), vol);
            }
            Step::Claim { uuid, job, disk } => {
                let mut vol = self.released.remove(uuid).unwrap();
                (vol.job, vol.disk) = (job.clone(), disk.clone());
                self.volumes.insert(uuid.clone(), vol);
            }
            Step::VmName(job, name) => drop(self.vm_names.insert(job.clone(), name.clone())),
            Step::Stamp(uuid, n) => self.of(uuid).stamp = *n,
        }
    }

    fn of(&mut self, uuid: &str) -> &mut Vol {
        self.volumes.get_mut(uuid).unwrap()
    }

    /// Holds what is true against what was acknowledged, and takes for settled what was not.
    pub fn judge(&mut self, volfs: &Volfs, view: &View) -> Vec<String> {
        let mut wrong = Vec::new();
        let before = self.clone();
        let Some(step) = self.pending.take() else {
            wrong.extend(self.differs(volfs, view));
            return wrong;
        };
        let made = match &step {
            Step::Create { job, disk } => {
                let mut found = view.owned.iter().filter(|(_, o)| o.job == *job && o.disk == *disk);
                found.next().map(|(uuid, _)| uuid.clone())
            }
            _ => None,
        };
        let mut after = self.clone();
        if !matches!(step, Step::Create { .. }) || made.is_some() {
            after.take(&step, made);
        }
        // A whole job's command is one of each volume's.
        if let Step::AttachAll(_) | Step::DetachAll(_) = step {
            for (uuid, vol) in &mut after.volumes {
                vol.attached = view.bound.contains_key(uuid);
                let fits = [before.volumes[uuid].attached, matches!(step, Step::AttachAll(_))];
                if !fits.contains(&vol.attached) {
                    wrong.push(format!("{uuid}: attached is {}, after {step:?} of {:?}", vol.attached, before.volumes));
                }
            }
        }
        let (as_before, as_after) = (before.differs(volfs, view), after.differs(volfs, view));
        *self = if as_after.is_empty() { after } else { before };
        self.pending = None;
        if !as_before.is_empty() && !as_after.is_empty() {
            wrong.push(format!(
                "{step:?} was not answered, and it is neither as before:\n{as_before:#?}\nnor done:\n{as_after:#?}"
            ));
        }
        wrong
    }

    fn differs(&self, volfs: &Volfs, view: &View) -> Vec<String> {
        let mut wrong = Vec::new();
        let theirs = view.owned.iter().filter(|(_, o)| self.jobs.contains(&o.job));
        for (uuid, owned) in theirs {
            match self.volumes.get(uuid) {
                None => wrong.push(format!("{uuid} is owned and should not be: {owned:?}")),
                Some(vol) => {
                    let have = (&owned.job, &owned.disk, owned.size, view.bound.contains_key(uuid));
                    let should = (&vol.job, &vol.disk, vol.size, vol.attached);
                    if have != should {
                        wrong.push(format!("{uuid} is {have:?}, not {should:?}"));
                    }
                }
            }
        }
        for (uuid, vol) in self.volumes.iter().chain(&self.released) {
            if !view.stored.contains_key(uuid) {
                wrong.push(format!("{uuid} is lost: not in the store (in the trash: {})", view.trash.contains(uuid)));
                continue;
            }
            match read_stamp(volfs, uuid) {
                found if found == vol.stamp => {}
                found => wrong.push(format!("{uuid}: what was written and synced is {found}, not {}", vol.stamp)),
            }
        }
        for uuid in self.volumes.keys().filter(|u| !view.owned.contains_key(*u)) {
            wrong.push(format!("{uuid} is in no job any more"));
        }
        for uuid in &self.deleted {
            if !view.trash.contains(uuid) || view.stored.contains_key(uuid) {
                wrong.push(format!("{uuid} was deleted and is not in the trash alone"));
            }
        }
        for (uuid, stored) in view.stored.iter().filter(|(uuid, _)| self.released.contains_key(*uuid)) {
            if !stored.meta["mark"].is_null() {
                wrong.push(format!("{uuid} was released and is marked {}", stored.meta["mark"]));
            }
        }
        for (job, name) in &self.vm_names {
            match view.jobs.get(job) {
                Some((found, _)) if found == name => {}
                found => wrong.push(format!("vm_name of {job} is {found:?}, not {name}")),
            }
        }
        wrong
    }
}

/// One write(2); the errno.
pub fn write(volfs: &Volfs, below: &str, text: &str) -> i32 {
    use std::io::Write;
    let open = OpenOptions::new().write(true).open(volfs.path(below));
    match open.and_then(|mut file| file.write_all(text.as_bytes())) {
        Ok(()) => 0,
        Err(error) => error.raw_os_error().unwrap_or(-1),
    }
}

fn created(volfs: &Volfs, job: &str, disk: &str) -> Option<String> {
    let link = fs::read_link(volfs.path(format!("jobs/{job}/disks/{disk}"))).ok()?;
    Some(link.file_name()?.to_str()?.to_owned())
}

fn stamp(volfs: &Volfs, uuid: &str, n: i64) -> i32 {
    let block = OpenOptions::new().write(true).open(volfs.path(format!("volumes/{uuid}/block")));
    let written = block.and_then(|file| {
        file.write_all_at(&n.to_le_bytes(), STAMP_AT)?;
        file.sync_all()
    });
    written.map_or_else(|e| e.raw_os_error().unwrap_or(-1), |()| 0)
}

fn read_stamp(volfs: &Volfs, uuid: &str) -> i64 {
    let file = fs::File::open(volfs.state().join("loop/volumes").join(uuid).join("data.img"));
    let mut bytes = [0; 8];
    file.and_then(|f| f.read_exact_at(&mut bytes, STAMP_AT)).map_or(i64::MAX, |()| i64::from_le_bytes(bytes))
}
