//! The sweep of crash tests: one daemon has all points prepared, each case arms one of them.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::{Path, PathBuf};

use super::common::Volfs;

/// What a crash at a point leaves once the next start has settled it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Left {
    /// Not even journaled: `history` has no row of it.
    Nothing,
    /// All as before, and the outcome is `interrupted`.
    Before,
    /// It is done, and the outcome says so.
    Done,
    /// One of the two: which commit is hit is not told by the point.
    Either,
    /// Some of the parts of a whole job's command; the outcome is `interrupted`.
    Parts,
    /// The same, and the command may have ended.
    Any,
}
pub use Left::{Any, Before, Done, Either, Nothing, Parts};

pub const MIB: u64 = 1 << 20;
pub const PATTERN: &[u8] = b"these bytes are somebody's server";

/// A point, the hit that kills (counted from the command on), what is left.
pub type Point = (&'static str, u32, Left);

/// What one case works on.
pub struct Case<'a> {
    pub volfs: &'a Volfs,
    /// Its own jobs' names begin with this.
    pub job: String,
    pub uuids: Vec<String>,
    /// `incarnation` of each at the start, where attached.
    was: Vec<String>,
}

impl Case<'_> {
    pub fn volume(&self, n: usize, file: &str) -> String {
        format!("volumes/{}/{file}", self.uuids[n])
    }

    fn status(&self, n: usize) -> String {
        self.volfs.value(self.volume(n, "status"))
    }

    pub fn disks(&mut self, disks: &[&str]) {
        self.uuids = self.volfs.job(&self.job, disks, "1M");
        for uuid in &self.uuids {
            sow(self.volfs, uuid);
        }
    }

    pub fn attached(&mut self, disks: &[&str]) {
        self.disks(disks);
        assert_eq!(self.volfs.write(format!("jobs/{}/control", self.job), "attach"), 0, "{}", self.volfs.log());
        self.was = (0..disks.len()).map(|n| self.volfs.value(self.volume(n, "incarnation"))).collect();
    }

    #[track_caller]
    pub fn is_detached(&self, n: usize) {
        assert_eq!(self.status(n), "detached");
        assert_eq!(self.volfs.read(self.volume(n, "device")), Err(libc::ENODEV));
        assert!(bound(self.volfs, &self.uuids[n]).is_empty(), "the kernel has a device");
    }

    /// Attached, the device is this volume's, and the same disk as before if it was attached then.
    #[track_caller]
    pub fn is_attached(&self, n: usize) {
        assert_eq!(self.status(n), "attached");
        let device = self.volfs.value(self.volume(n, "device"));
        let bound = bound(self.volfs, &self.uuids[n]);
        assert_eq!(bound.iter().map(|b| format!("/dev/{b}")).collect::<Vec<_>>(), [device]);
        if let Some(was) = self.was.get(n) {
            assert_eq!(self.volfs.value(self.volume(n, "incarnation")), *was, "another disk than before");
        }
        let block = self.volfs.path(self.volume(n, "block"));
        let got = self.volfs.ok(&format!("head -c {} {}", PATTERN.len(), block.display()));
        assert_eq!(got.as_bytes(), PATTERN);
    }
}

pub fn data(volfs: &Volfs, uuid: &str) -> PathBuf {
    volfs.state().join("loop/volumes").join(uuid).join("data.img")
}

pub fn sow(volfs: &Volfs, uuid: &str) {
    use std::os::unix::fs::FileExt;
    let file = fs::OpenOptions::new().write(true).open(data(volfs, uuid)).unwrap();
    file.write_all_at(PATTERN, 0).unwrap();
}

/// The loop devices that have this volume's file.
fn bound(volfs: &Volfs, uuid: &str) -> Vec<String> {
    let file = data(volfs, uuid);
    let mut found = volfs.loops();
    found.retain(|name| {
        fs::read_to_string(format!("/sys/block/{name}/loop/backing_file"))
            .is_ok_and(|b| Path::new(b.trim_end()) == file)
    });
    found
}

/// Every volume in the provider's store, half-made ones too.
pub fn stored(volfs: &Volfs) -> BTreeSet<String> {
    let names = fs::read_dir(volfs.state().join("loop/volumes")).unwrap();
    names.map(|e| e.unwrap().file_name().into_string().unwrap()).collect()
}

/// A volume is in the store or, deleted, in the trash, with its data; and the tree says which.
#[track_caller]
fn nothing_lost(volfs: &Volfs, uuid: &str) {
    let trash = fs::read_dir(volfs.state().join("loop/trash")).unwrap().map(|e| e.unwrap().path());
    let deleted = trash.filter(|p| p.file_name().unwrap().to_str().unwrap().starts_with(uuid)).collect::<Vec<_>>();
    let here = data(volfs, uuid);
    assert_eq!(deleted.len() + usize::from(here.exists()), 1, "{uuid}: {deleted:?}");
    let file = deleted.first().map_or(here.clone(), |dir| dir.join("data.img"));
    assert!(fs::read(&file).unwrap().starts_with(PATTERN), "{}", file.display());
    let shown = volfs.path(format!("volumes/{uuid}")).symlink_metadata().is_ok();
    assert!(here.exists() || !shown, "{uuid} is deleted and shown");
}

/// Rows of the root's `history` for this job and its like: (operation, outcome).
pub fn history(volfs: &Volfs, prefix: &str) -> Vec<(String, String)> {
    let text = volfs.read("history").unwrap();
    let rows = text.lines().skip(1).map(|l| l.split('\t').collect::<Vec<_>>());
    rows.filter(|r| r[2].starts_with(prefix)).map(|r| (r[1].to_owned(), r[5].to_owned())).collect()
}

pub fn in_flight(volfs: &Volfs) -> Vec<String> {
    let mut found = Vec::new();
    for entry in fs::read_dir(volfs.path("operations")).unwrap() {
        let name = entry.unwrap().file_name().into_string().unwrap();
        let text = volfs.read(format!("operations/{name}")).unwrap();
        if text.contains("\"ended\":null") {
            found.push(text);
        }
    }
    found
}

/// One verb: how its objects are made, what is written, how it looks before and after.
pub struct Verb {
    pub name: &'static str,
    pub points: &'static [Point],
    pub make: fn(&mut Case),
    /// The command; answers its errno.
    pub write: fn(&Case) -> i32,
    pub before: fn(&Case),
    pub after: fn(&Case),
    /// What the same command answers once it is done.
    pub again: i32,
    /// Volumes more in the store once it is done.
    pub grows: isize,
}

pub fn prepared(points: &[Point]) -> (Volfs, PathBuf) {
    // No later round may settle what the start has left open.
    let mut volfs = Volfs::prepare(&[], "reconcile_interval = 3600\n");
    let arms = volfs.scratch("arms");
    fs::create_dir(&arms).unwrap();
    let names: BTreeSet<&str> = points.iter().map(|p| p.0).collect();
    let each = names.iter().map(|n| format!("{n}=kill:{}/{n}", arms.display()));
    volfs.set_env(&[("VOLFS_FAILPOINTS", &each.collect::<Vec<_>>().join(";"))]);
    (volfs, arms)
}

pub fn sweep(verb: &Verb) {
    let (mut volfs, arms) = prepared(verb.points);
    volfs.launch();
    for (n, (point, hit, left)) in verb.points.iter().enumerate() {
        let at = format!("{} at {point} #{hit}", verb.name);
        let mut case = Case { volfs: &volfs, job: format!("j{n}-"), uuids: Vec::new(), was: Vec::new() };
        (verb.make)(&mut case);
        (verb.before)(&case);
        let Case { job, uuids, was, .. } = case;
        let had = stored(&volfs);
        let past = history(&volfs, &job).len();
        let arm = arms.join(point);
        fs::write(&arm, hit.to_string()).unwrap();
        let case = Case { volfs: &volfs, job, uuids, was };
        let errno = (verb.write)(&case);
        let Case { job, uuids, was, .. } = case;
        assert_ne!(errno, 0, "{at}: never reached, or its caller was told that it is done\n{}", volfs.log());
        assert_eq!(volfs.wait(), -libc::SIGKILL, "{at}: {}", volfs.log());
        fs::remove_file(&arm).unwrap();

        volfs.launch();
        volfs.until(&format!("settled operation: {at}"), || in_flight(&volfs).is_empty());
        volfs.until(&format!("settled status: {at}"), || !volfs.read("table").unwrap().contains("\tunknown\t"));
        let case = Case { volfs: &volfs, job, uuids, was };
        let rows = history(&volfs, &case.job).split_off(past);
        let done = match left {
            Nothing => {
                assert_eq!(rows, [], "{at}");
                false
            }
            Before | Done | Either | Parts | Any => {
                let outcome = &rows.iter().rfind(|r| r.0 == verb.name).unwrap_or_else(|| panic!("{at}: {rows:?}")).1;
                match left {
                    Done => assert_eq!(outcome, "done", "{at}: {rows:?}"),
                    Before | Parts => assert_eq!(outcome, "interrupted", "{at}: {rows:?}"),
                    _ => {}
                }
                outcome == "done"
            }
        };
        let grown = |by: isize| assert_eq!(stored(&volfs).len() as isize, had.len() as isize + by, "{at}: volumes");
        for uuid in &case.uuids {
            nothing_lost(&volfs, uuid);
        }
        match (left, done) {
            (Parts | Any, _) => {}
            (_, true) => {
                (verb.after)(&case);
                grown(verb.grows);
            }
            (_, false) => {
                (verb.before)(&case);
                grown(0);
                assert_eq!(stored(&volfs), had, "{at}");
            }
        }
        let again = (verb.write)(&case);
        let expected = if done { verb.again } else { 0 };
        assert!(again == expected || (*left == Any && again == 0), "{at}: errno {again}\n{}", volfs.log());
        (verb.after)(&case);
        grown(verb.grows);
        assert!(in_flight(&volfs).is_empty(), "{at}");
        if again == 0 {
            let problems = volfs.read("problems").unwrap();
            assert_eq!(problems.lines().count(), 1, "{at}: {problems}");
        }
        let known: BTreeMap<String, usize> = volfs.loops().into_iter().map(|l| (l, 0)).collect();
        let shown = fs::read_dir(volfs.path("devices")).unwrap().count();
        assert_eq!(known.len(), shown, "{at}: a loop device is bound that no volume shows");
    }
}

pub fn command(case: &Case, text: &str) -> i32 {
    case.volfs.write(format!("jobs/{}/control", case.job), text)
}

pub fn volume_command(case: &Case, text: &str) -> i32 {
    case.volfs.write(case.volume(0, "control"), text)
}
