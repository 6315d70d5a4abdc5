//! SIGKILL at every named point of every operation: whatever it hits, the next start settles it.
//!
//! One daemon has all points prepared (`NAME=kill:FILE`); making FILE arms one. Each case sets its
//! objects up, arms, writes the command, sees the daemon die and the caller get an error, starts the
//! next daemon, and looks: settled, nothing doubled, nothing lost, nothing taken away that had not
//! begun, no device leaked; then the same command again gives the right outcome.

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

const MIB: u64 = 1 << 20;
pub const PATTERN: &[u8] = b"these bytes are somebody's server";

/// A point, the hit that kills (counted from the command on), what is left.
pub type Point = (&'static str, u32, Left);

/// What one case works on.
pub struct Case<'a> {
    pub volfs: &'a Volfs,
    /// Its own jobs' names begin with this.
    job: String,
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
fn stored(volfs: &Volfs) -> BTreeSet<String> {
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

fn command(case: &Case, text: &str) -> i32 {
    case.volfs.write(format!("jobs/{}/control", case.job), text)
}

pub fn volume_command(case: &Case, text: &str) -> i32 {
    case.volfs.write(case.volume(0, "control"), text)
}

#[test]
fn crash_create_at_every_step_makes_one_volume_or_none() {
    sweep(&Verb {
        name: "create",
        points: &[
            ("store.before-commit", 1, Nothing),
            ("store.after-commit", 1, Before),
            ("create.journaled", 1, Before),
            ("create.before-call", 1, Before),
            ("loop.create.before", 1, Before),
            ("loop.create.built", 1, Before),
            ("loop.create.after", 1, Done),
            ("create.after-call", 1, Done),
            ("create.acted", 1, Done),
            ("store.before-commit", 2, Done),
            ("store.after-commit", 2, Done),
            ("create.recorded", 1, Done),
        ],
        make: |c| c.disks(&[]),
        write: |c| command(c, "create d 1M"),
        before: |c| assert_eq!(fs::read_dir(c.volfs.path(format!("jobs/{}/disks", c.job))).unwrap().count(), 0),
        after: |c| {
            assert_eq!(c.volfs.value(format!("jobs/{}/disks/d/status", c.job)), "detached");
            assert_eq!(c.volfs.value(format!("jobs/{}/disks/d/size", c.job)), MIB.to_string());
        },
        again: libc::EEXIST,
        grows: 1,
    });
}

#[test]
fn crash_attach_at_every_step_ends_attached_or_detached() {
    sweep(&Verb {
        name: "attach",
        points: &[
            ("store.before-commit", 1, Nothing),
            ("store.after-commit", 1, Before),
            ("attach.journaled", 1, Before),
            ("attach.before-call", 1, Before),
            ("loop.attach.before", 1, Before),
            ("loop.attach.intent", 1, Before),
            ("loop.attach.bound", 1, Done),
            ("loop.attach.after", 1, Done),
            ("attach.after-call", 1, Done),
            ("attach.acted", 1, Done),
            ("store.before-commit", 2, Either),
            ("store.after-commit", 2, Either),
            ("attach.recorded", 1, Done),
        ],
        make: |c| c.disks(&["d"]),
        write: |c| volume_command(c, "attach"),
        before: |c| c.is_detached(0),
        after: |c| c.is_attached(0),
        again: 0,
        grows: 0,
    });
}

#[test]
fn crash_detach_at_every_step_takes_nothing_away_that_had_not_begun() {
    sweep(&Verb {
        name: "detach",
        points: &[
            ("store.before-commit", 1, Nothing),
            ("store.after-commit", 1, Before),
            ("detach.journaled", 1, Before),
            ("detach.held", 1, Before),
            ("detach.before-call", 1, Before),
            ("loop.detach.before", 1, Before),
            ("loop.detach.intent", 1, Before),
            ("loop.detach.flushed", 1, Before),
            ("loop.detach.flagged", 1, Done),
            ("loop.detach.cleared", 1, Done),
            ("loop.detach.after", 1, Done),
            ("detach.after-call", 1, Done),
            ("detach.acted", 1, Done),
            ("store.before-commit", 2, Either),
            ("store.after-commit", 2, Either),
            ("detach.recorded", 1, Done),
        ],
        make: |c| c.attached(&["d"]),
        write: |c| volume_command(c, "detach"),
        before: |c| c.is_attached(0),
        after: |c| {
            c.is_detached(0);
            let mut head = fs::read(data(c.volfs, &c.uuids[0])).unwrap();
            head.truncate(PATTERN.len());
            assert_eq!(head, PATTERN);
        },
        again: 0,
        grows: 0,
    });
}

#[test]
fn crash_resize_at_every_step_ends_with_one_size_for_all() {
    fn sized(c: &Case, size: u64) {
        c.is_attached(0);
        assert_eq!(c.volfs.value(c.volume(0, "size")), size.to_string());
        let device = c.volfs.value(c.volume(0, "device"));
        assert_eq!(c.volfs.ok(&format!("blockdev --getsize64 {device}")), size.to_string());
        assert_eq!(fs::metadata(data(c.volfs, &c.uuids[0])).unwrap().len(), size);
    }
    sweep(&Verb {
        name: "resize",
        points: &[
            ("store.before-commit", 1, Nothing),
            ("store.after-commit", 1, Before),
            ("resize.journaled", 1, Before),
            ("resize.before-call", 1, Before),
            ("loop.resize.before", 1, Before),
            ("loop.resize.intent", 1, Done),
            ("loop.resize.grown", 1, Done),
            ("loop.resize.after", 1, Done),
            ("resize.after-call", 1, Done),
            ("resize.acted", 1, Done),
            ("store.before-commit", 2, Either),
            ("store.after-commit", 2, Either),
            ("resize.recorded", 1, Done),
        ],
        make: |c| c.attached(&["d"]),
        write: |c| volume_command(c, "resize 2M"),
        before: |c| sized(c, MIB),
        after: |c| sized(c, 2 * MIB),
        again: 0,
        grows: 0,
    });
}

fn volumes_of(c: &Case, job: &str) -> usize {
    fs::read_dir(c.volfs.path(format!("jobs/{job}/volumes"))).unwrap().count()
}

/// The owner's mark in the provider's own file.
fn mark(c: &Case) -> serde_json::Value {
    let text = fs::read_to_string(data(c.volfs, &c.uuids[0]).with_file_name("meta.json")).unwrap();
    serde_json::from_str::<serde_json::Value>(&text).unwrap()["mark"].clone()
}

#[test]
fn crash_delete_at_every_step_deletes_once_or_not_at_all() {
    sweep(&Verb {
        name: "delete",
        points: &[
            ("store.before-commit", 1, Nothing),
            ("store.after-commit", 1, Before),
            ("delete.journaled", 1, Before),
            ("delete.before-call", 1, Before),
            ("loop.delete.before", 1, Before),
            ("loop.delete.after", 1, Done),
            ("delete.after-call", 1, Done),
            ("delete.acted", 1, Done),
            ("store.before-commit", 2, Done),
            ("store.after-commit", 2, Done),
            ("delete.recorded", 1, Done),
        ],
        make: |c| c.disks(&["d"]),
        write: |c| volume_command(c, &format!("delete {}", c.uuids[0])),
        before: |c| c.is_detached(0),
        after: |c| {
            assert_eq!(volumes_of(c, &c.job), 0);
            assert!(!data(c.volfs, &c.uuids[0]).exists());
        },
        again: libc::ENOENT,
        grows: -1,
    });
}

#[test]
fn crash_release_at_every_step_ends_ours_or_free() {
    sweep(&Verb {
        name: "release",
        points: &[
            ("store.before-commit", 1, Nothing),
            ("store.after-commit", 1, Before),
            ("release.journaled", 1, Before),
            ("release.before-mark", 1, Before),
            ("loop.mark.before", 1, Before),
            ("loop.mark.after", 1, Done),
            ("release.after-mark", 1, Done),
            ("release.acted", 1, Done),
            ("store.before-commit", 2, Done),
            ("store.after-commit", 2, Done),
            ("release.recorded", 1, Done),
        ],
        make: |c| c.disks(&["d"]),
        write: |c| {
            c.volfs.write(format!("jobs/{}/volumes/{}/control", c.job, c.uuids[0]), &format!("release {}", c.uuids[0]))
        },
        before: |c| {
            c.is_detached(0);
            assert!(mark(c).is_string());
        },
        after: |c| {
            assert_eq!(volumes_of(c, &c.job), 0);
            assert!(mark(c).is_null());
        },
        again: libc::ENOENT,
        grows: 0,
    });
}

#[test]
fn crash_claim_at_every_step_ends_claimed_or_free() {
    sweep(&Verb {
        name: "claim",
        points: &[
            ("store.before-commit", 1, Nothing),
            ("store.after-commit", 1, Before),
            ("claim.journaled", 1, Before),
            ("claim.before-mark", 1, Before),
            ("loop.mark.before", 1, Before),
            ("loop.mark.after", 1, Done),
            ("claim.after-mark", 1, Done),
            ("claim.acted", 1, Done),
            ("store.before-commit", 2, Done),
            ("store.after-commit", 2, Done),
            ("claim.recorded", 1, Done),
        ],
        make: |c| {
            c.disks(&["d"]);
            assert_eq!(volume_command(c, &format!("release {}", c.uuids[0])), 0);
        },
        write: |c| command(c, &format!("claim {} e", c.uuids[0])),
        before: |c| {
            assert_eq!(volumes_of(c, &c.job), 0);
            assert!(mark(c).is_null());
        },
        after: |c| {
            assert_eq!(volumes_of(c, &c.job), 1);
            c.volfs.until("settled claim", || c.volfs.value(format!("jobs/{}/disks/e/status", c.job)) == "detached");
            let file = fs::read_to_string(data(c.volfs, &c.uuids[0]).with_file_name("meta.json")).unwrap();
            assert!(file.contains(&c.volfs.value(c.volume(0, "owner"))), "{file}");
        },
        again: libc::EEXIST,
        grows: 0,
    });
}

#[test]
fn crash_move_at_every_step_ends_with_one_owner() {
    fn there(c: &Case, here: usize) {
        assert_eq!((volumes_of(c, &c.job), volumes_of(c, &format!("{}to", c.job))), (here, 1 - here));
        // A device in use stays where it is; only the owner changes.
        c.is_attached(0);
        assert_eq!(mark(c), c.volfs.value(c.volume(0, "owner")));
    }
    sweep(&Verb {
        name: "move",
        points: &[
            ("store.before-commit", 1, Nothing),
            ("store.after-commit", 1, Before),
            ("move.journaled", 1, Before),
            ("move.before-mark", 1, Before),
            ("loop.mark.before", 1, Before),
            ("loop.mark.after", 1, Done),
            ("move.after-mark", 1, Done),
            ("move.acted", 1, Done),
            ("store.before-commit", 2, Done),
            ("store.after-commit", 2, Done),
            ("move.recorded", 1, Done),
        ],
        make: |c| {
            c.attached(&["d"]);
            fs::create_dir(c.volfs.path(format!("jobs/{}to", c.job))).unwrap();
        },
        write: |c| volume_command(c, &format!("move {}to", c.job)),
        before: |c| there(c, 1),
        after: |c| there(c, 0),
        again: 0,
        grows: 0,
    });
}

#[test]
fn crash_disk_rename_at_every_step_keeps_one_name() {
    fn named(c: &Case, name: &str) {
        let disks = fs::read_dir(c.volfs.path(format!("jobs/{}/disks", c.job))).unwrap();
        assert_eq!(disks.map(|d| d.unwrap().file_name()).collect::<Vec<_>>(), [name]);
        let file = fs::read_to_string(data(c.volfs, &c.uuids[0]).with_file_name("meta.json")).unwrap();
        let file: serde_json::Value = serde_json::from_str(&file).unwrap();
        assert_eq!(file["disk"], name, "the name beside the mark");
    }
    sweep(&Verb {
        name: "disk",
        points: &[
            ("store.before-commit", 1, Nothing),
            ("store.after-commit", 1, Done),
            ("disk.journaled", 1, Done),
            ("loop.mark.before", 1, Done),
            ("loop.mark.after", 1, Done),
            ("disk.acted", 1, Done),
            ("store.before-commit", 2, Done),
            ("store.after-commit", 2, Done),
            ("disk.recorded", 1, Done),
        ],
        make: |c| c.disks(&["d"]),
        write: |c| volume_command(c, "disk e"),
        before: |c| named(c, "d"),
        after: |c| named(c, "e"),
        again: 0,
        grows: 0,
    });
}

#[test]
fn crash_destroy_at_every_step_is_finished_by_repeating_it() {
    sweep(&Verb {
        name: "destroy",
        points: &[
            ("store.before-commit", 1, Nothing),
            ("store.after-commit", 1, Before),
            ("destroy.journaled", 1, Before),
            ("detach.journaled", 1, Before),
            ("detach.before-call", 1, Before),
            ("loop.detach.flagged", 1, Parts),
            ("detach.acted", 2, Parts),
            ("detach.recorded", 1, Parts),
            ("destroy.between", 1, Parts),
            ("delete.journaled", 1, Parts),
            ("delete.before-call", 2, Parts),
            ("loop.delete.after", 1, Parts),
            ("delete.recorded", 1, Parts),
            ("destroy.between", 2, Parts),
            ("delete.recorded", 2, Parts),
            ("store.after-commit", 4, Any),
            ("store.after-commit", 6, Any),
            ("store.before-commit", 8, Any),
            ("destroy.forget", 1, Parts),
            ("destroy.acted", 1, Parts),
            ("destroy.recorded", 1, Done),
        ],
        make: |c| c.attached(&["d", "e"]),
        write: |c| command(c, &format!("destroy {}", c.job)),
        before: |c| {
            c.is_attached(0);
            c.is_attached(1);
        },
        after: |c| {
            assert!(!c.volfs.path(format!("jobs/{}", c.job)).exists());
            assert!(c.uuids.iter().all(|u| !data(c.volfs, u).exists()));
        },
        again: libc::ENOENT,
        grows: -2,
    });
}

#[test]
fn crash_of_a_whole_jobs_attach_is_finished_by_repeating_it() {
    sweep(&Verb {
        name: "attach",
        points: &[
            ("store.after-commit", 1, Any),
            ("attach.journaled", 1, Any),
            ("attach.journaled", 2, Any),
            ("loop.attach.bound", 2, Any),
            ("attach.acted", 1, Any),
            ("attach.recorded", 2, Any),
            ("attach.acted", 4, Any),
            ("attach.recorded", 4, Any),
        ],
        make: |c| c.disks(&["d", "e", "f"]),
        write: |c| command(c, "attach"),
        before: |c| (0..3).for_each(|n| c.is_detached(n)),
        after: |c| (0..3).for_each(|n| c.is_attached(n)),
        again: 0,
        grows: 0,
    });
}

fn errno(result: std::io::Result<()>) -> i32 {
    result.map_or_else(|e| e.raw_os_error().unwrap_or(-1), |()| 0)
}

#[test]
fn crash_mkdir_and_rmdir_happened_or_not() {
    sweep(&Verb {
        name: "mkdir",
        points: &[("store.before-commit", 1, Nothing), ("store.after-commit", 1, Done)],
        make: |_| {},
        write: |c| errno(fs::create_dir(c.volfs.path(format!("jobs/{}new", c.job)))),
        before: |c| assert!(!c.volfs.path(format!("jobs/{}new", c.job)).exists()),
        after: |c| assert!(c.volfs.path(format!("jobs/{}new", c.job)).is_dir()),
        again: libc::EEXIST,
        grows: 0,
    });
    sweep(&Verb {
        name: "rmdir",
        points: &[("store.before-commit", 1, Nothing), ("store.after-commit", 1, Done)],
        make: |c| fs::create_dir(c.volfs.path(format!("jobs/{}old", c.job))).unwrap(),
        write: |c| errno(fs::remove_dir(c.volfs.path(format!("jobs/{}old", c.job)))),
        before: |c| assert!(c.volfs.path(format!("jobs/{}old", c.job)).is_dir()),
        after: |c| assert!(!c.volfs.path(format!("jobs/{}old", c.job)).exists()),
        again: libc::ENOENT,
        grows: 0,
    });
}

#[test]
fn crash_while_a_crash_is_settled_is_settled_by_the_next_start() {
    for (verb, point, then) in [
        ("create", "create.after-call", "create.acted"),
        ("attach", "loop.attach.bound", "attach.acted"),
        ("detach", "loop.detach.flagged", "detach.recorded"),
        ("delete", "loop.delete.after", "store.after-commit"),
    ] {
        let points = [(point, 1, Done), (then, 1, Done)];
        let (mut volfs, arms) = prepared(&points);
        volfs.launch();
        let uuid = volfs.job("j", &["d"], "1M").remove(0);
        if verb == "detach" {
            assert_eq!(volfs.write("jobs/j/control", "attach"), 0);
        }
        fs::write(arms.join(point), "").unwrap();
        let (file, command) = match verb {
            "create" => ("jobs/j/control".to_owned(), "create e 1M".to_owned()),
            "delete" => (format!("volumes/{uuid}/control"), format!("delete {uuid}")),
            _ => (format!("volumes/{uuid}/control"), verb.to_owned()),
        };
        assert_ne!(volfs.write(&file, &command), 0);
        assert_eq!(volfs.wait(), -libc::SIGKILL);
        fs::rename(arms.join(point), arms.join(then)).unwrap();
        // It dies during its start, or right after it.
        if volfs.try_launch().is_ok() {
            assert_eq!(volfs.wait(), -libc::SIGKILL, "{verb}: {then} was not reached\n{}", volfs.log());
        }
        fs::remove_file(arms.join(then)).unwrap();
        volfs.launch();
        volfs.until("settled operations", || in_flight(&volfs).is_empty());
        let rows = history(&volfs, "j");
        assert_eq!(rows.last().unwrap(), &(verb.to_owned(), "done".to_owned()), "{rows:?}");
        let status = volfs.read(format!("volumes/{uuid}/status"));
        let (expected, volumes) = match verb {
            "create" => (Ok("detached\n".to_owned()), 2),
            "attach" => (Ok("attached\n".to_owned()), 1),
            "detach" => (Ok("detached\n".to_owned()), 1),
            _ => (Err(libc::ENOENT), 0),
        };
        assert_eq!((status, stored(&volfs).len()), (expected, volumes), "{verb}");
    }
}

/// Points that no crash belongs to: faults, holds, and switches of other tests.
const NO_CRASH: [&str; 13] = [
    "daemon.start",
    "keep.full",
    "keep.no-resend",
    "keep.no-sweep",
    "reconcile.no-gap",
    "store.fail",
    "devices.flush",
    "devices.no-pin",
    "engine.no-check",
    "fs.panic",
    "loop.unreachable",
    "loop.refuse",
    "loop.ambiguous",
];

#[test]
fn crash_sweeps_visit_every_point_that_the_source_names() {
    fn names(dir: &Path, found: &mut BTreeSet<String>) {
        for entry in fs::read_dir(dir).unwrap() {
            let path = entry.unwrap().path();
            if path.is_dir() {
                if path.file_name().unwrap() != "tests" {
                    names(&path, found);
                }
                continue;
            }
            let text = fs::read_to_string(&path).unwrap();
            for call in ["hit(\"", "reach(\"", "before(\"", "point(\"", "reached(\""] {
                for rest in text.split(call).skip(1) {
                    found.insert(rest.split('"').next().unwrap().to_owned());
                }
            }
        }
    }
    let mut found = BTreeSet::new();
    names(&Path::new(env!("CARGO_MANIFEST_DIR")).join("src"), &mut found);
    found.retain(|name| name.contains('.') && !name.contains(['{', ' ']));
    assert!(found.len() > 40, "{found:?}");
    // What only a cloud brings is visited over the fake one, what only a living caller sees below a keeper.
    let own = concat!(
        include_str!("crash.rs"),
        include_str!("crash_snapshots.rs"),
        include_str!("destroy.rs"),
        include_str!("imported.rs"),
        include_str!("../cloud/killed.rs"),
        include_str!("../cloud/snapshots.rs"),
        include_str!("../import/record.rs"),
        include_str!("../keeper/finished.rs")
    );
    let missing: Vec<_> = found
        .iter()
        .filter(|name| !NO_CRASH.contains(&name.as_str()))
        .filter(|name| !own.contains(&format!("(\"{name}\"")))
        .collect();
    assert!(missing.is_empty(), "no case visits {missing:?}");
}
