//! Two daemons on one provider, each with a record of its own, and a judge that asks neither: the
//! provider's own books and the kernel.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use fakecloud::{LoopHypervisor, NewVm, Options};
use serde_json::Value;

use crate::common::{Said, Volfs, loops_below, said_of};
use crate::site::{MARK, Site};

/// The provider's side.
pub enum Books {
    /// The loop store's directory.
    Loop(PathBuf),
    /// The fake cloud.
    Cloud,
}

/// Both daemons and the provider.
pub struct Ground {
    site: Option<Site>,
    own: Option<Volfs>,
    /// The other record's daemon.
    pub second: Volfs,
    books: Books,
}

/// No later round settles or finds out what the start and the commands do not.
const SELDOM: &str = "reconcile_interval = 3600\n";

impl Ground {
    /// Over one loop store, outside both state directories.
    pub fn on_loops(points: &[&str]) -> Self {
        let mut own = Volfs::prepare(&[], "");
        let store = own.scratch("store");
        let config = format!("{SELDOM}[loop]\ndir = \"{}\"\n", store.display());
        fs::write(own.scratch("config.toml"), &config).unwrap();
        arm(&mut own, points);
        own.launch();
        let mut second = Volfs::prepare(&[], &config);
        second.launch();
        Ground { site: None, own: Some(own), second, books: Books::Loop(store) }
    }

    /// Over one cloud, each on a VM of its own whose disks are this machine's.
    pub fn on_cloud(points: &[&str]) -> Self {
        let (mut options, other) = (Options::default(), NewVm::new("second-host"));
        options.job_delay = std::time::Duration::from_millis(5);
        options.hypervisor = Box::new(LoopHypervisor::new([options.host.id.clone(), other.id.clone()]));
        options.vms.push(other.clone());
        let mut site = Site::prepare(options, &[], "late_answers = 1\n").without_rounds();
        arm(&mut site.volfs, points);
        site.volfs.launch();
        let mut second = site.beside(&other.id, &[], "");
        second.launch();
        Ground { site: Some(site), own: None, second, books: Books::Cloud }
    }

    /// The daemon whose record is copied.
    pub fn volfs(&self) -> &Volfs {
        self.own.as_ref().unwrap_or_else(|| &self.site.as_ref().unwrap().volfs)
    }

    pub fn volfs_mut(&mut self) -> &mut Volfs {
        match &mut self.own {
            Some(own) => own,
            None => &mut self.site.as_mut().unwrap().volfs,
        }
    }

    /// The fake cloud, where there is one.
    pub fn site(&self) -> &Site {
        self.site.as_ref().expect("a cloud")
    }

    pub fn size(&self) -> &'static str {
        if matches!(self.books, Books::Loop(_)) { "1M" } else { "1G" }
    }

    /// Where a file arms a point.
    pub fn arms(&self) -> PathBuf {
        self.volfs().scratch("arms")
    }

    /// All that the provider and the kernel say, a line each thing: whatever anybody does to a volume
    /// changes a line, and nothing else does.
    pub fn book(&self) -> BTreeMap<String, String> {
        match &self.books {
            Books::Loop(store) => loop_book(store),
            Books::Cloud => {
                let cloud = &self.site().cloud;
                let mut book = BTreeMap::new();
                // In the order of the cloud's doing: one effect more is another book.
                for (n, done) in cloud.log().into_iter().enumerate() {
                    book.insert(format!("effect {n:05}"), format!("{done:?}"));
                }
                for id in self.ids() {
                    if let Some(v) = cloud.volume(&id) {
                        let text = format!("{} {} {} {:?} {:?}", v.name, v.state, v.size, v.vm, v.tags);
                        book.insert(format!("volume {id}"), text);
                        book.insert(format!("kernel {id}"), self.site().in_kernel(&id).join(" "));
                    }
                }
                book
            }
        }
    }

    /// Every volume that there ever was, by the provider's own word.
    pub fn ids(&self) -> Vec<String> {
        let mut ids: Vec<String> = match &self.books {
            Books::Loop(store) => volumes_in(store),
            Books::Cloud => self.site().cloud.log().into_iter().map(|done| done.volume).collect(),
        };
        ids.sort();
        ids.dedup();
        ids
    }

    /// Whether the volume is there, and not deleted.
    pub fn is_there(&self, id: &str) -> bool {
        match &self.books {
            Books::Loop(store) => meta(store, id).is_some(),
            Books::Cloud => self.site().cloud.volume(id).is_some_and(|v| v.exists() && v.state != "Destroy"),
        }
    }

    /// The mark on a volume that is there, by the provider's own word.
    pub fn mark(&self, id: &str) -> Option<String> {
        match &self.books {
            Books::Loop(store) => meta(store, id)?["mark"].as_str().map(str::to_owned),
            Books::Cloud => self.site().cloud.volume(id).filter(|_| self.is_there(id))?.tags.get(MARK).cloned(),
        }
    }

    /// Ends the daemon as a power cut would, but for the page cache.
    pub fn kill(&mut self) {
        let root = self.volfs().root();
        self.volfs_mut().kill();
        let _ = Command::new("umount").arg("-l").arg(root).output();
    }
}

fn arm(volfs: &mut Volfs, points: &[&str]) {
    let arms = volfs.scratch("arms");
    fs::create_dir(&arms).unwrap();
    let each: Vec<_> = points.iter().map(|name| format!("{name}=kill:{}/{name}", arms.display())).collect();
    // A second look need not be ten seconds later to be a second one.
    let all = format!("{};reconcile.no-gap=fail", each.join(";"));
    volfs.set_env(&[("VOLFS_FAILPOINTS", &all)]);
}

fn volumes_in(store: &Path) -> Vec<String> {
    let names = fs::read_dir(store.join("volumes")).unwrap();
    names.map(|e| e.unwrap().file_name().into_string().unwrap()).filter(|n| !n.starts_with('.')).collect()
}

/// A volume's metadata, read without volfs.
pub fn meta(store: &Path, id: &str) -> Option<Value> {
    let text = fs::read_to_string(store.join("volumes").join(id).join("meta.json")).ok()?;
    Some(serde_json::from_str(&text).unwrap())
}

/// Each volume's metadata, its data's length, what is in the trash, and the loop devices.
pub fn loop_book(store: &Path) -> BTreeMap<String, String> {
    let mut book = BTreeMap::new();
    for id in volumes_in(store) {
        let dir = store.join("volumes").join(&id);
        book.insert(format!("volume {id}"), fs::read_to_string(dir.join("meta.json")).unwrap_or_default());
        book.insert(format!("data {id}"), fs::metadata(dir.join("data.img")).map_or(0, |m| m.len()).to_string());
    }
    for entry in fs::read_dir(store.join("trash")).unwrap() {
        book.insert(format!("trash {}", entry.unwrap().file_name().display()), String::new());
    }
    for name in loops_below(store) {
        let backing = fs::read_to_string(format!("/sys/block/{name}/loop/backing_file")).unwrap_or_default();
        book.insert(format!("loop {}", backing.trim_end()), name);
    }
    book
}

/// A command of the volfs program with this daemon's state directory and configuration.
pub fn run(volfs: &Volfs, args: &[&str]) -> Said {
    said_of(program(volfs, args).output().unwrap())
}

/// The same, not started.
pub fn program(volfs: &Volfs, args: &[&str]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_volfs"));
    command.arg("--state-dir").arg(volfs.state()).arg("--config").arg(volfs.scratch("config.toml")).args(args);
    command
}

/// The same, and it must succeed; what it printed.
#[track_caller]
pub fn ok(volfs: &Volfs, args: &[&str]) -> String {
    let said = run(volfs, args);
    assert_eq!(said.status, 0, "{args:?}: {said:?}");
    said.out
}

pub fn copy(from: &Path, to: &Path) {
    let _ = fs::remove_dir_all(to);
    let copied = Command::new("cp").arg("-a").arg(from).arg(to).status().unwrap();
    assert!(copied.success(), "cp -a {} {}", from.display(), to.display());
}

/// The database and its WAL alone, in place of those that are there.
pub fn copy_database(from: &Path, to: &Path) {
    for name in ["volfs.db", "volfs.db-wal", "volfs.db-shm"] {
        let _ = fs::remove_file(to.join(name));
        if from.join(name).exists() {
            fs::copy(from.join(name), to.join(name)).unwrap();
        }
    }
}

/// Nothing in flight.
pub fn settled(volfs: &Volfs) {
    let in_flight = || {
        fs::read_dir(volfs.path("operations")).unwrap().any(|entry| {
            let name = entry.unwrap().file_name().into_string().unwrap();
            volfs.read(format!("operations/{name}")).is_ok_and(|text| text.contains("\"ended\":null"))
        })
    };
    volfs.until("end of what was in flight", || !in_flight());
}
