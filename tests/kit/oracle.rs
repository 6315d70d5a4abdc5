//! What is true, asked of those who know it: the kernel's loop devices, the provider's files, the
//! record through a connection of our own. The daemon is asked last, and only held against these.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::os::fd::AsFd;
use std::os::unix::fs::{FileTypeExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use rusqlite::{Connection, OpenFlags};
use serde_json::Value;
use volfs::sys;

use super::common::Volfs;

/// A loop device with a file of ours.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Bound {
    pub name: String,
    pub dev: String,
    pub diskseq: i64,
    pub bytes: i64,
    pub tag: String,
    /// Device and inode of what is bound, as the driver has it.
    pub file: (u64, u64),
}

/// A volume in the provider's store.
#[derive(Debug, Clone, PartialEq)]
pub struct Stored {
    pub meta: Value,
    pub length: u64,
    pub file: (u64, u64),
}

/// A row of `device_mappings`: device, its number, diskseq, bytes.
pub type Mapped = (Option<String>, Option<String>, Option<i64>, Option<i64>);

/// A volume that a job has in the record.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Owned {
    pub job: String,
    pub disk: String,
    pub epoch: i64,
    pub size: i64,
    pub status: String,
    pub mapping: Option<Mapped>,
}

/// All of it at one moment.
#[derive(Debug, Clone)]
pub struct View {
    pub record: String,
    /// By volume.
    pub bound: BTreeMap<String, Vec<Bound>>,
    pub stored: BTreeMap<String, Stored>,
    /// Volumes in the trash.
    pub trash: BTreeSet<String>,
    pub owned: BTreeMap<String, Owned>,
    /// name, vm_name, hold of the jobs that are not forgotten.
    pub jobs: BTreeMap<String, (String, bool)>,
    pub unfinished: Vec<String>,
    /// What is wrong already without comparing.
    pub wrong: Vec<String>,
    /// Whether work that failed may still be announced in `meta.json`: it is told by looking at the
    /// kernel, and written down by the next work on that volume or the next start.
    pub announced: bool,
}

fn number(path: impl AsRef<Path>) -> Option<i64> {
    fs::read_to_string(path).ok()?.trim().parse().ok()
}

/// A loop device as the kernel has it; `None` when it is bound no more.
pub fn bound(name: &str) -> Option<Bound> {
    let sys = PathBuf::from("/sys/block").join(name);
    let device =
        fs::OpenOptions::new().read(true).custom_flags(libc::O_NONBLOCK).open(Path::new("/dev").join(name)).ok()?;
    let info = sys::loop_status(device.as_fd()).ok()?;
    Some(Bound {
        name: name.to_owned(),
        dev: fs::read_to_string(sys.join("dev")).ok()?.trim().to_owned(),
        diskseq: number(sys.join("diskseq"))?,
        bytes: number(sys.join("size"))? * 512,
        tag: info.file_name(),
        file: (info.lo_device, info.lo_inode),
    })
}

/// A connection that cannot write.
pub fn record(db: &Path) -> Connection {
    let conn = Connection::open_with_flags(db, OpenFlags::SQLITE_OPEN_READ_ONLY).unwrap();
    conn.busy_timeout(Duration::from_secs(10)).unwrap();
    conn
}

fn rows<T>(conn: &Connection, sql: &str, read: impl Fn(&rusqlite::Row) -> rusqlite::Result<T>) -> Vec<T> {
    let mut statement = conn.prepare(sql).unwrap();
    let rows = statement.query_map([], |row| read(row)).unwrap();
    rows.map(Result::unwrap).collect()
}

impl View {
    /// Looks at a running volfs's world.
    pub fn of(volfs: &Volfs) -> View {
        let mut view = View::at(&volfs.state());
        for name in volfs.loops() {
            let backing = fs::read_to_string(format!("/sys/block/{name}/loop/backing_file")).unwrap_or_default();
            let Some(bound) = bound(&name) else { continue };
            let volumes = volfs.state().join("loop/volumes");
            if let Ok(below) = Path::new(backing.trim_end()).strip_prefix(&volumes) {
                let uuid = below.iter().next().unwrap().to_str().unwrap().to_owned();
                view.bound.entry(uuid).or_default().push(bound);
            } else if bound.tag.starts_with("volfs:") {
                view.wrong.push(format!("{name} has {} and our tag {}", backing.trim_end(), bound.tag));
            }
        }
        view
    }

    /// Looks at a state directory alone.
    pub fn at(state: &Path) -> View {
        let conn = record(&state.join("volfs.db"));
        let mut wrong = Vec::new();
        let check: String = conn.query_row("PRAGMA integrity_check", [], |r| r.get(0)).unwrap();
        if check != "ok" {
            wrong.push(format!("integrity_check: {check}"));
        }
        let broken = rows(&conn, "PRAGMA foreign_key_check", |r| r.get::<_, String>(0));
        wrong.extend(broken.iter().map(|table| format!("a foreign key of {table} points nowhere")));
        let owned = rows(
            &conn,
            "SELECT v.volume_id, j.name, d.disk_name, d.epoch, v.size, v.status, m.id IS NOT NULL, m.device_name,
                    m.dev_major || ':' || m.dev_minor, m.diskseq, m.size
               FROM vm_disks d JOIN jobs j ON j.id = d.job_id JOIN ossea_volumes v ON v.id = d.ossea_volume_id
               LEFT JOIN device_mappings m ON m.volume_uuid = v.volume_id",
            |r| {
                let mapped = r.get::<_, bool>(6)?.then_some((r.get(7)?, r.get(8)?, r.get(9)?, r.get(10)?));
                let owned = Owned {
                    job: r.get(1)?,
                    disk: r.get(2)?,
                    epoch: r.get(3)?,
                    size: r.get(4)?,
                    status: r.get(5)?,
                    mapping: mapped,
                };
                Ok((r.get(0)?, owned))
            },
        );
        let jobs = rows(&conn, "SELECT name, vm_name, hold FROM jobs WHERE forgotten_at IS NULL", |r| {
            Ok((r.get(0)?, (r.get(1)?, r.get(2)?)))
        });
        let unfinished = rows(
            &conn,
            "SELECT id || ' ' || command || ' of ' || coalesce(volume_uuid, '-') || ' at ' || step
               FROM volume_operations WHERE ended_at IS NULL",
            |r| r.get(0),
        );
        let mut view = View {
            record: conn.query_row("SELECT value FROM meta WHERE key = 'record'", [], |r| r.get(0)).unwrap(),
            bound: BTreeMap::new(),
            stored: BTreeMap::new(),
            trash: BTreeSet::new(),
            owned: owned.into_iter().collect(),
            jobs: jobs.into_iter().collect(),
            unfinished,
            wrong,
            announced: false,
        };
        view.store(&state.join("loop"));
        view
    }

    fn store(&mut self, dir: &Path) {
        for entry in fs::read_dir(dir.join("volumes")).unwrap().flatten() {
            let name = entry.file_name().into_string().unwrap();
            if name.starts_with(".new-") {
                self.wrong.push(format!("{name} is left in the store"));
                continue;
            }
            let text = fs::read(entry.path().join("meta.json")).unwrap_or_default();
            match (serde_json::from_slice::<Value>(&text), fs::symlink_metadata(entry.path().join("data.img"))) {
                (Ok(meta), Ok(data)) => {
                    let file = (data.dev(), data.ino());
                    self.stored.insert(name, Stored { meta, length: data.len(), file });
                }
                (meta, data) => self.wrong.push(format!("volume {name} in the store: {meta:?}, {data:?}")),
            }
        }
        for entry in fs::read_dir(dir.join("trash")).unwrap().flatten() {
            let name = entry.file_name().into_string().unwrap();
            self.trash.insert(name.split('.').next().unwrap().to_owned());
        }
    }

    /// Volumes of the store that carry this record's mark.
    fn marked(&self) -> impl Iterator<Item = (&String, &Stored)> {
        self.stored.iter().filter(|(_, s)| s.meta["mark"].as_str().is_some_and(|m| m.starts_with(&self.record)))
    }

    /// What contradicts itself between record, store and kernel. `named` are volumes whose trouble
    /// the daemon names itself: for them only what nobody may ever do is wrong.
    pub fn contradictions(&self, named: &BTreeSet<String>) -> Vec<String> {
        let mut wrong = self.wrong.clone();
        wrong.extend(self.unfinished.iter().map(|op| format!("operation {op} has not ended")));
        for (uuid, bound) in &self.bound {
            if bound.len() > 1 {
                wrong.push(format!("{uuid} is bound {} times: {bound:?}", bound.len()));
            }
        }
        for (uuid, stored) in self.marked() {
            let owner = self.owned.get(uuid);
            if owner.is_none() && !named.contains(uuid) {
                wrong.push(format!("{uuid} carries our mark and is in no job: {}", stored.meta));
            }
        }
        let mut epochs = BTreeMap::new();
        for (uuid, owned) in &self.owned {
            if let Some(other) = epochs.insert(owned.epoch, uuid) {
                wrong.push(format!("{uuid} and {other} have one epoch {}", owned.epoch));
            }
            if !named.contains(uuid) {
                wrong.extend(self.of_volume(uuid, owned).into_iter().map(|words| format!("{uuid}: {words}")));
            }
        }
        wrong
    }

    fn of_volume(&self, uuid: &str, owned: &Owned) -> Vec<String> {
        let mut wrong = Vec::new();
        let mut same = |what: &str, have: String, should: String| {
            if have != should {
                wrong.push(format!("{what} is {have}, not {should}"));
            }
        };
        let Some(stored) = self.stored.get(uuid) else { return vec![format!("not in the store, but {owned:?}")] };
        let meta = &stored.meta;
        same("the mark", meta["mark"].to_string(), format!("\"{}/{}\"", self.record, owned.epoch));
        same("the mark's job", meta["job"].to_string(), format!("{:?}", owned.job));
        same("the mark's disk", meta["disk"].to_string(), format!("{:?}", owned.disk));
        same("meta.json's size", meta["size"].to_string(), owned.size.to_string());
        same("data.img's length", stored.length.to_string(), owned.size.to_string());
        let bound = self.bound.get(uuid).and_then(|all| all.first());
        if !self.announced || meta["intent"].is_null() {
            same("the intent", meta["intent"].to_string(), "null".into());
            same("attached in meta.json", (!meta["attached"].is_null()).to_string(), bound.is_some().to_string());
        }
        let status = if bound.is_some() { "attached" } else { "detached" };
        same("the record's status", owned.status.clone(), status.into());
        let mapping = bound.map(|b| (Some(b.name.clone()), Some(b.dev.clone()), Some(b.diskseq), Some(b.bytes)));
        match (&owned.mapping, &mapping) {
            // The size is that of the moment it was verified: it may have grown.
            (Some((a, b, c, Some(then))), Some((x, y, z, Some(now)))) if (a, b, c) == (x, y, z) && then <= now => {}
            _ => same("the mapping", format!("{:?}", owned.mapping), format!("{mapping:?}")),
        }
        if let Some(bound) = bound {
            same("the tag", bound.tag.clone(), format!("volfs:{uuid}"));
            same("the device's bytes", bound.bytes.to_string(), owned.size.to_string());
            same("the bound file", format!("{:?}", bound.file), format!("{:?}", stored.file));
        }
        wrong
    }

    /// Where the tree says otherwise.
    pub fn against_tree(&self, volfs: &Volfs, named: &BTreeSet<String>) -> Vec<String> {
        let mut wrong = Vec::new();
        let shown: BTreeSet<String> = names(&volfs.path("devices"));
        let mut kernel = BTreeSet::new();
        for (uuid, owned) in self.owned.iter().filter(|(uuid, _)| !named.contains(*uuid)) {
            let file = |name: &str| format!("volumes/{uuid}/{name}");
            let bound = self.bound.get(uuid).and_then(|all| all.first());
            kernel.extend(bound.map(|b| b.name.clone()));
            let device = bound.map_or(Err(libc::ENODEV), |b| Ok(format!("/dev/{}\n", b.name)));
            let seq = bound.map(|b| b.diskseq);
            let mut same = |what: &str, have: String, should: String| {
                if have != should {
                    wrong.push(format!("{uuid}: {what} says {have}, not {should}"));
                }
            };
            same(
                "status",
                format!("{:?}", volfs.read(file("status"))),
                format!("{:?}", Ok::<_, i32>(format!("{}\n", owned.status))),
            );
            same("device", format!("{:?}", volfs.read(file("device"))), format!("{device:?}"));
            let told: Option<i64> =
                volfs.read(file("incarnation")).ok().and_then(|t| t.split_whitespace().last()?.parse().ok());
            same("incarnation", format!("{told:?}"), format!("{seq:?}"));
            let block = fs::metadata(volfs.path(file("block"))).ok();
            let dev = block.map(|m| {
                assert!(m.file_type().is_block_device());
                format!("{}:{}", libc::major(m.rdev()), libc::minor(m.rdev()))
            });
            same("block", format!("{dev:?}"), format!("{:?}", bound.map(|b| b.dev.clone())));
            let link = fs::read_link(volfs.path(format!("volumes/{uuid}"))).unwrap_or_default();
            same("its job", link.display().to_string(), format!("../jobs/{}/volumes/{uuid}", owned.job));
        }
        if named.is_empty() && shown != kernel {
            wrong.push(format!("devices/ shows {shown:?}, bound are {kernel:?}"));
        }
        let jobs = names(&volfs.path("jobs"));
        if !jobs.iter().eq(self.jobs.keys()) {
            wrong.push(format!("jobs/ shows {jobs:?}, the record has {:?}", self.jobs.keys()));
        }
        wrong
    }
}

fn names(dir: &Path) -> BTreeSet<String> {
    let entries = fs::read_dir(dir).map(|all| all.flatten().map(|e| e.file_name().into_string().unwrap()));
    entries.map(Iterator::collect).unwrap_or_default()
}

/// Waits until all agree; answers the view and how long it took.
#[track_caller]
pub fn settled(volfs: &Volfs, at_most: Duration, at: &str) -> (View, Duration) {
    settled_but(volfs, at_most, at, false)
}

/// The same; with `announced`, work that failed may still be announced in the store.
#[track_caller]
pub fn settled_but(volfs: &Volfs, at_most: Duration, at: &str, announced: bool) -> (View, Duration) {
    let began = Instant::now();
    loop {
        let view = View { announced, ..View::of(volfs) };
        let mut wrong = view.contradictions(&BTreeSet::new());
        if wrong.is_empty() {
            wrong = view.against_tree(volfs, &BTreeSet::new());
        }
        if wrong.is_empty() {
            return (view, began.elapsed());
        }
        if began.elapsed() > at_most {
            let problems = volfs.read("problems");
            panic!("{at}: not settled after {at_most:?}:\n{}\n{problems:?}\n{}", wrong.join("\n"), volfs.log());
        }
        // Bounded pacing of the look, not a wait: what is seen decides.
        std::thread::sleep(Duration::from_millis(5));
    }
}
