//! C12, the proofs: of three jobs one is destroyed, and of the others nothing is changed: not in the
//! provider's store, not in the kernel, not in the record, not in the tree.

use std::fs::{self, File, OpenOptions};
use std::os::unix::fs::FileExt;

use libc::{EBUSY, EHOSTUNREACH, EINVAL, EPERM};
use serde_json::Value;

use crate::bring::*;
use crate::commands::*;
use crate::common::{Volfs, finish};
use crate::in_use::Undo;
use crate::whole::Picture;

/// The one that is destroyed. The others' names begin like it, or are its beginning.
const B: &str = "pgtest2";
const OTHERS: [&str; 2] = ["pgtest", "pgtest22"];
const DISKS: [&str; 3] = ["disk-2000", "disk-2001", "disk-2002"];

/// Three jobs on one daemon.
struct Yard {
    volfs: Volfs,
    others: Vec<String>,
    /// Somebody works with a disk of another job all the time.
    user: Option<File>,
}

impl Yard {
    /// With these failpoints.
    fn new(points: &str) -> Self {
        Self::on(Volfs::start_with(&[("VOLFS_FAILPOINTS", points)], QUIET))
    }

    fn on(volfs: Volfs) -> Self {
        let mut others = Vec::new();
        for name in OTHERS {
            let uuids = made(&volfs, name);
            assert_eq!(tell(&volfs, &uuids[2], &format!("attach vm={}", vm())), 0);
            volfs.ok(&format!("echo 'source of {name}' > $R/jobs/{name}/vm_name"));
            others.extend(uuids);
        }
        done(&volfs, &others[0], "attach");
        done(&volfs, &others[3], "attach");
        volfs.ok(&format!("echo 1 > $R/jobs/{}/hold", OTHERS[1]));
        let mut yard = Yard { volfs, others, user: None };
        yard.use_one();
        yard
    }

    fn use_one(&mut self) {
        self.user = Some(File::open(self.volfs.path(format!("volumes/{}/block", self.others[0]))).unwrap());
    }

    /// B with three volumes; the first and the last attached.
    fn b(&self) -> Vec<String> {
        let uuids = made(&self.volfs, B);
        done(&self.volfs, &uuids[0], "attach");
        done(&self.volfs, &uuids[2], "attach");
        uuids
    }

    fn picture(&self) -> Picture {
        Picture::with_loops(&self.volfs, &OTHERS, &self.others)
    }

    fn picture_of_b(&self, uuids: &[String]) -> Picture {
        Picture::with_loops(&self.volfs, &[B], uuids).without(says_that_it_was_tried)
    }

    fn destroy(&self) -> i32 {
        self.volfs.write(format!("jobs/{B}/control"), &format!("destroy {B}"))
    }

    fn begin(&self) -> std::process::Child {
        self.volfs.sh_spawn(&["bash"], &format!("echo 'destroy {B}' > $R/jobs/{B}/control"))
    }

    fn error(&self) -> String {
        self.volfs.read(format!("jobs/{B}/error")).unwrap()
    }

    /// Everything of B is gone, and nothing but it.
    #[track_caller]
    fn is_destroyed(&self, uuids: &[String], before: &Picture) {
        let volfs = &self.volfs;
        assert!(!volfs.path(format!("jobs/{B}")).exists());
        for uuid in uuids {
            assert!(!stored(volfs, uuid).exists(), "{uuid}");
            assert!(
                !volfs.path(format!("volumes/{uuid}")).exists() && !volfs.path(format!("unclaimed/{uuid}")).exists()
            );
        }
        assert_eq!(volfs.loops().len(), 2, "the others' two");
        before.is_still(&self.picture(), "destroyed");
    }

    /// Of B, what exists is owned and shown, what does not is not, and nothing is in between.
    #[track_caller]
    fn is_whole(&self, uuids: &[String], at: &str) -> usize {
        let volfs = &self.volfs;
        let shown: Vec<String> = match fs::read_dir(volfs.path(format!("jobs/{B}/volumes"))) {
            Ok(all) => all.map(|e| e.unwrap().file_name().into_string().unwrap()).collect(),
            Err(_) => Vec::new(),
        };
        for uuid in uuids {
            assert_eq!(
                stored(volfs, uuid).exists(),
                shown.contains(uuid),
                "{at}: {uuid} is forgotten, or shown and gone"
            );
            if shown.contains(uuid) {
                assert_eq!(meta(volfs, uuid)["mark"], of(volfs, uuid, "owner"), "{at}");
                let info: Value =
                    serde_json::from_str(&volfs.read(format!("volumes/{uuid}/info.json")).unwrap()).unwrap();
                assert_eq!(info["mark"], of(volfs, uuid, "owner"), "{at}: it is ours");
                assert!(["detached", "attached"].contains(&of(volfs, uuid, "status").as_str()), "{at}");
                let data = fs::read(stored(volfs, uuid).join("data.img")).unwrap();
                assert!(data.starts_with(uuid.as_bytes()), "{at}: the bytes of {uuid}");
            }
        }
        shown.len()
    }
}

/// Places that tell of a refused command, and are to.
fn says_that_it_was_tried(at: &str) -> bool {
    ["/error", "/history", "/info.json", "/status"].iter().any(|end| at.ends_with(end))
        || at.starts_with("record volume_operations")
        || at == format!("jobs/{B}/table")
}

/// A job with detached volumes, each with its own name in its first bytes.
fn made(volfs: &Volfs, job: &str) -> Vec<String> {
    let uuids = volfs.job(job, &DISKS, "1M");
    for uuid in &uuids {
        let data = OpenOptions::new().write(true).open(stored(volfs, uuid).join("data.img")).unwrap();
        data.write_all_at(uuid.as_bytes(), 0).unwrap();
    }
    uuids
}

/// Of the latest operations; one of a destroy and its parts are less.
fn in_flight(volfs: &Volfs) -> bool {
    let ids = fs::read_dir(volfs.path("operations")).unwrap().map(|e| e.unwrap().file_name().into_string().unwrap());
    let mut ids: Vec<u64> = ids.map(|id| id.parse().unwrap()).collect();
    ids.sort_unstable();
    let open = |id: &u64| volfs.read(format!("operations/{id}")).unwrap_or_default().contains("\"ended\":null");
    ids.iter().rev().take(16).any(open)
}

#[test]
fn c12_of_three_jobs_one_is_destroyed_and_all_of_the_others_is_as_it_was() {
    let yard = Yard::new("");
    let uuids = yard.b();
    let before = yard.picture();
    let of_b = yard.picture_of_b(&uuids);
    for name in OTHERS.into_iter().chain([
        "",
        "pgtest2x",
        "pgtes",
        "PGTEST2",
        "pgtest*",
        "pgtest?",
        "*",
        ".",
        "..",
        "/",
        "pgtest2/",
        "jobs/pgtest2",
        "pgtest pgtest2",
        "pgtest2 pgtest22",
        "pgtest2 *",
        "pgtest2 force",
        "pgtest2 expunge",
        "pgtest2\npgtest22",
        &uuids[0],
    ]) {
        let errno = yard.volfs.write(format!("jobs/{B}/control"), &format!("destroy {name}"));
        assert_eq!(errno, EINVAL, "{name:?}");
    }
    of_b.is_still(&yard.picture_of_b(&uuids), "a wrong name");
    before.is_still(&yard.picture(), "a wrong name");
    assert_eq!(yard.destroy(), 0, "{}", yard.volfs.log());
    yard.is_destroyed(&uuids, &before);
}

#[test]
fn c12_a_job_in_the_middle_of_create_is_as_it_was_and_goes_on() {
    let (early, late) = (Gate::new(), Gate::new());
    let yard = Yard::new(&format!("{};{}", early.wait("create.before-call"), late.wait("create.after-call")));
    for (n, gate) in [early, late].iter().enumerate() {
        let uuids = yard.b();
        let other = OTHERS[n];
        let held = gate.close();
        let create = yard.volfs.sh_spawn(&["dash"], &format!("echo 'create new-{n} 2M' > $R/jobs/{other}/control"));
        running(&yard.volfs, "create new");
        let all = || fs::read_dir(yard.volfs.state().join("loop/volumes")).unwrap().count();
        // Past its call the volume is there, marked, and in no record but the journal.
        yard.volfs.until("the create at its point", || all() == 9 + 2 * n);
        let journaled = |p: &Picture| p.0.values().any(|row| row.contains(&format!("create new-{n} ")));
        yard.volfs.until("its journal", || journaled(&yard.picture()));
        let before = yard.picture();
        assert!(before.0[&format!("jobs/{other}/status")].contains("creating=1"));
        assert_eq!(yard.destroy(), 0, "{}", yard.volfs.log());
        yard.is_destroyed(&uuids, &before);
        held.release();
        assert_eq!(finish(create).status, 0, "{}", yard.volfs.log());
        let new = disk(&yard.volfs, other, &format!("new-{n}")).unwrap();
        assert!(stored(&yard.volfs, &new).exists());
        assert_eq!(of(&yard.volfs, &new, "size"), (2 << 20).to_string());
        // What the job has besides is as before it.
        let volumes = |p: Picture| {
            p.without(|at| at.starts_with("jobs/") && !at.contains("/volumes/") || at.starts_with("record volume_op"))
        };
        let (was, is) = (volumes(before), volumes(yard.picture()));
        was.is_still(&is.without(|at| at.contains(&new) || !was.0.contains_key(at)), "created");
    }
}

/// Where the daemon dies, at which hit: each step of each phase, on the first and on a later volume.
const STEPS: [(&str, u32); 16] = [
    ("destroy.journaled", 1),
    ("detach.held", 1),
    ("loop.detach.intent", 1),
    ("loop.detach.cleared", 1),
    ("detach.after-call", 1),
    ("detach.recorded", 1),
    ("detach.before-call", 2),
    ("destroy.verify", 1),
    ("destroy.between", 1),
    ("delete.before-call", 1),
    ("loop.delete.after", 1),
    ("delete.recorded", 1),
    ("delete.journaled", 3),
    ("delete.after-call", 3),
    ("destroy.forget", 1),
    ("destroy.recorded", 1),
];

#[test]
fn c12_killed_at_each_step_it_leaves_the_others_and_what_is_left_of_its_own() {
    let mut volfs = Volfs::prepare(&[], QUIET);
    let arms = volfs.scratch("arms");
    fs::create_dir(&arms).unwrap();
    let points: std::collections::BTreeSet<String> =
        STEPS.iter().map(|(point, _)| format!("{point}=kill:{}/{point}", arms.display())).collect();
    volfs.set_env(&[("VOLFS_FAILPOINTS", &points.into_iter().collect::<Vec<_>>().join(";"))]);
    volfs.launch();
    let mut yard = Yard::on(volfs);
    let mut ends = std::collections::BTreeSet::new();
    for (point, hit) in STEPS {
        let at = format!("killed at {point} #{hit}");
        let uuids = yard.b();
        let before = yard.picture();
        fs::write(arms.join(point), hit.to_string()).unwrap();
        assert_ne!(yard.destroy(), 0, "{at}: never reached");
        yard.user = None;
        assert_eq!(yard.volfs.wait(), -libc::SIGKILL, "{at}: {}", yard.volfs.log());
        fs::remove_file(arms.join(point)).unwrap();
        yard.volfs.launch();
        let volfs = &yard.volfs;
        volfs.until(&format!("settled operation: {at}"), || !in_flight(volfs));
        volfs.until(&format!("settled status: {at}"), || !volfs.read("table").unwrap().contains("\tunknown\t"));
        yard.use_one();
        before.is_still(&yard.picture(), &at);
        ends.insert(yard.is_whole(&uuids, &at));
        if yard.volfs.path(format!("jobs/{B}")).exists() {
            assert_eq!(yard.destroy(), 0, "{at}: repeated\n{}", yard.volfs.log());
        }
        yard.is_destroyed(&uuids, &before);
    }
    assert_eq!(ends.into_iter().collect::<Vec<_>>(), [0, 1, 2, 3], "each number of volumes was left once");
}

#[test]
fn c12_a_volume_that_will_not_detach_stops_it_and_who_has_it_is_said() {
    let gate = Gate::new();
    let yard = Yard::new(&gate.wait("detach.journaled"));
    let uuids = yard.b();
    let before = yard.picture();
    // Mounted before: nothing is begun.
    let device = of(&yard.volfs, &uuids[2], "device");
    let there = yard.volfs.scratch("there");
    fs::create_dir(&there).unwrap();
    let there = there.to_str().unwrap();
    yard.volfs.ok(&format!("mke2fs -q -F {device} && mount {device} {there}"));
    let mounted = Undo::with(&["umount", there]);
    let of_b = yard.picture_of_b(&uuids).without(|at| at.ends_with("/holders"));
    assert_eq!(yard.destroy(), EBUSY);
    assert!(yard.error().contains(there) && yard.error().contains("disk-2002: "), "{}", yard.error());
    of_b.is_still(&yard.picture_of_b(&uuids).without(|at| at.ends_with("/holders")), "refused");
    mounted.now();
    // Another test that made a mount namespace meanwhile has a copy of that mount.
    let free = || !yard.volfs.read(format!("volumes/{}/holders", uuids[2])).unwrap().contains("mount");
    yard.volfs.until("end of all copies", free);
    // Opened after the test for users: the detach itself finds it, and nothing is deleted.
    let held = gate.close();
    let waiter = yard.begin();
    running(&yard.volfs, "detach");
    let user = File::open(&device).unwrap();
    held.release();
    assert_ne!(finish(waiter).status, 0);
    yard.volfs.until("its end", || !in_flight(&yard.volfs));
    let error = yard.error();
    assert!(error.contains("disk-2002: ") && error.contains(&format!("pid {}", std::process::id())), "{error}");
    assert_eq!(yard.volfs.value(format!("jobs/{B}/status")), "idle detached=2 attached=1");
    assert_eq!(of(&yard.volfs, &uuids[2], "device"), device, "served again");
    assert!(uuids.iter().all(|uuid| stored(&yard.volfs, uuid).exists()), "nothing is deleted");
    before.is_still(&yard.picture(), "stopped");
    drop(user);
    // A child of another test that has not begun its program yet may have a copy of that descriptor.
    yard.volfs.until("end of all copies", || yard.destroy() == 0);
    yard.is_destroyed(&uuids, &before);
}

#[test]
fn c12_with_the_provider_away_nothing_is_changed_and_repeating_finishes() {
    let away = Gate::new();
    let yard = Yard::new(&format!("loop.unreachable=fail:{}", away.path().display()));
    let uuids = yard.b();
    let before = yard.picture();
    let of_b = yard.picture_of_b(&uuids);
    let held = away.close();
    assert_eq!(yard.destroy(), EHOSTUNREACH, "{}", yard.error());
    of_b.is_still(&yard.picture_of_b(&uuids), "the provider is away");
    before.is_still(&yard.picture(), "the provider is away");
    held.release();
    assert_eq!(yard.destroy(), 0, "{}", yard.volfs.log());
    yard.is_destroyed(&uuids, &before);
}

#[test]
fn c9_c12_what_was_handed_over_goes_with_its_owner_of_now_and_with_no_other() {
    let gate = Gate::new();
    let yard = Yard::new(&gate.wait("destroy.between"));
    let volfs = &yard.volfs;
    let uuids = yard.b();
    // B has a volume from another job, and has given one away, attached as it was.
    volfs.job("giver", &["given", "kept"], "1M");
    let given = disk(volfs, "giver", "given").unwrap();
    done(volfs, &given, &format!("move {B}"));
    done(volfs, &uuids[2], "move giver");
    let kept = [disk(volfs, "giver", "kept").unwrap(), uuids[2].clone()];
    let giver = || Picture::with_loops(volfs, &["giver"], &kept);
    let (before, of_giver) = (yard.picture(), giver());
    let held = gate.close();
    let waiter = yard.begin();
    running(volfs, "destroy");
    volfs.until("phase 3", || !volfs.read(format!("jobs/{B}/table")).unwrap().contains("attached"));
    for uuid in [&uuids[0], &uuids[1], &given] {
        assert_eq!(tell(volfs, uuid, "move giver"), EBUSY);
    }
    assert_eq!(tell(volfs, &kept[0], &format!("move {B}")), EBUSY);
    assert_eq!(tell(volfs, &kept[1], &format!("move {B}")), EBUSY);
    let of_giver_now = || giver().without(says_that_it_was_tried);
    of_giver.clone().without(says_that_it_was_tried).is_still(&of_giver_now(), "refused");
    held.release();
    assert_eq!(finish(waiter).status, 0, "{}", volfs.log());
    assert!(!volfs.path(format!("jobs/{B}")).exists());
    assert!([&uuids[0], &uuids[1], &given].iter().all(|uuid| !stored(volfs, uuid).exists()));
    of_giver.without(says_that_it_was_tried).is_still(&of_giver_now(), "destroyed");
    before.is_still(&yard.picture(), "destroyed");
    // And the other way: a giver's destroy takes what it has, not what it had.
    job(volfs, B);
    done(volfs, &kept[0], &format!("move {B}"));
    let of_b = || Picture::with_loops(volfs, &[B], &kept[..1]);
    let was = of_b();
    assert_eq!(volfs.write("jobs/giver/control", "destroy giver"), 0, "{}", volfs.log());
    assert!(!stored(volfs, &kept[1]).exists());
    was.is_still(&of_b(), "its giver was destroyed");
    before.is_still(&yard.picture(), "destroyed");
}

#[test]
fn c12_a_signal_or_a_hold_stops_it_before_the_next_volume() {
    let (before_call, after_call) = (Gate::new(), Gate::new());
    let points = format!("{};{}", before_call.wait("delete.before-call"), after_call.wait("delete.after-call"));
    let yard = Yard::new(&points);
    let volfs = &yard.volfs;
    let before = yard.picture();
    for (gate, by_hold, left) in [(&after_call, false, 2), (&after_call, true, 2), (&before_call, true, 3)] {
        let uuids = yard.b();
        let held = gate.close();
        let mut waiter = yard.begin();
        running(volfs, "delete");
        let there = || uuids.iter().filter(|uuid| stored(volfs, uuid).exists()).count();
        volfs.until("the first deletion at its point", || there() == left);
        match by_hold {
            true => assert_eq!(volfs.write(format!("jobs/{B}/hold"), "1"), 0),
            false => {
                waiter.kill().unwrap();
                waiter.wait().unwrap();
                volfs.until("the interruption", || yard.error().contains("interrupted"));
            }
        }
        held.release();
        assert_ne!(finish(waiter).status, 0);
        volfs.until("its end", || !in_flight(volfs));
        assert_eq!(yard.is_whole(&uuids, "stopped"), left);
        before.is_still(&yard.picture(), "stopped");
        if by_hold {
            assert!(yard.error().contains(&format!("job {B} is held")), "{}", yard.error());
            assert_eq!(yard.destroy(), EPERM);
            assert_eq!(there(), left);
            assert_eq!(volfs.write(format!("jobs/{B}/hold"), "0"), 0);
        }
        assert_eq!(yard.destroy(), 0, "{}", volfs.log());
        yard.is_destroyed(&uuids, &before);
    }
}

#[test]
fn x10_a_missing_volume_that_is_back_is_neither_forgotten_nor_passed_over() {
    let yard = Yard::new("reconcile.no-gap=fail");
    let volfs = &yard.volfs;
    let uuids = yard.b();
    let before = yard.picture();
    let aside = volfs.scratch("aside");
    fs::rename(stored(volfs, &uuids[1]), &aside).unwrap();
    done(volfs, &uuids[1], "reconcile");
    assert_eq!(of(volfs, &uuids[1], "status"), "missing");
    fs::rename(&aside, stored(volfs, &uuids[1])).unwrap();
    assert_eq!(yard.destroy(), EBUSY, "{}", volfs.log());
    assert!(yard.error().contains(&uuids[1]) && yard.error().contains("the cloud shows it again"), "{}", yard.error());
    assert!(uuids.iter().all(|uuid| stored(volfs, uuid).exists()), "nothing is deleted");
    volfs.until("a look at it", || of(volfs, &uuids[1], "status") == "detached");
    assert_eq!(yard.is_whole(&uuids, "refused"), 3);
    assert_eq!(yard.destroy(), 0, "{}", volfs.log());
    yard.is_destroyed(&uuids, &before);
    let trash =
        fs::read_dir(volfs.state().join("loop/trash")).unwrap().map(|e| e.unwrap().file_name().into_string().unwrap());
    assert!(trash.into_iter().any(|name| name.starts_with(&uuids[1])), "deleted, and not only forgotten");
    // One that stays away is dropped.
    let uuids = yard.b();
    fs::rename(stored(volfs, &uuids[1]), &aside).unwrap();
    done(volfs, &uuids[1], "reconcile");
    assert_eq!(yard.destroy(), 0, "{}", volfs.log());
    yard.is_destroyed(&uuids, &before);
}
