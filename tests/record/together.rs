//! Two daemons over one provider: each with a record of its own on one loop store (over a fake cloud:
//! tests/cloud/two.rs), and two with one record at the same time.

use std::collections::BTreeMap;
use std::fs;

use crate::common::Volfs;
use crate::ground::{Ground, copy, meta};

const EPERM: i32 = libc::EPERM;
const ENOENT: i32 = libc::ENOENT;
const EBUSY: i32 = libc::EBUSY;
const EROFS: i32 = libc::EROFS;

fn control(id: &str) -> String {
    format!("volumes/{id}/control")
}

/// The lines of the book that are about these volumes.
fn about(ground: &Ground, ids: &[String]) -> BTreeMap<String, String> {
    let book = ground.book();
    book.into_iter().filter(|(key, _)| ids.iter().any(|id| key.contains(id.as_str()))).collect()
}

fn record(ground: &Ground, id: &str) -> String {
    ground.mark(id).unwrap().split('/').next().unwrap().to_owned()
}

#[test]
fn neither_daemons_verbs_touch_what_the_other_owns_in_one_loop_store() {
    let ground = Ground::on_loops(&[]);
    let (own, second) = (ground.volfs(), &ground.second);
    let ours = own.job("j", &["a", "b"], "1M");
    let theirs = second.job("j", &["a", "b"], "1M");
    assert_eq!(own.write(control(&ours[0]), "attach"), 0, "{}", own.log());
    let before = about(&ground, &ours);
    assert!(before.keys().any(|key| key.starts_with("loop ")), "{before:?}");
    for id in &ours {
        assert_eq!(second.write("jobs/j/control", &format!("claim {id} c")), EBUSY, "{}", second.log());
        assert_eq!(second.write(control(id), "delete"), ENOENT, "there is no way to it");
    }
    // What is of a whole job is of its own volumes, though the other's job has the same name.
    assert_eq!(second.write("jobs/j/control", "attach"), 0, "{}", second.log());
    assert_eq!(second.write("jobs/j/disks/a/control", "resize 2M"), 0, "{}", second.log());
    assert_eq!(second.write("jobs/j/control", "detach"), 0, "{}", second.log());
    fs::create_dir(second.path("jobs/k")).unwrap();
    assert_eq!(second.write("jobs/j/disks/b/control", "move k"), 0, "{}", second.log());
    assert_eq!(second.write("jobs/j/control", "destroy j"), 0, "{}", second.log());
    for volfs in [own, second] {
        assert_eq!(volfs.write("control", "reconcile"), 0, "{}", volfs.log());
    }
    assert_eq!(about(&ground, &ours), before);
    assert_eq!(own.value(format!("volumes/{}/status", ours[0])), "attached");
    assert!(!ground.ids().contains(&theirs[0]));
    assert_eq!(second.value(format!("volumes/{}/status", theirs[1])), "detached");
}

#[test]
fn a_race_of_two_claims_has_one_winner_in_one_loop_store() {
    const ROUNDS: usize = 12;
    let ground = Ground::on_loops(&[]);
    let both = [ground.volfs(), &ground.second];
    let records: Vec<String> = both.iter().map(|v| record(&ground, &v.job("j", &["own"], "1M")[0])).collect();
    for round in 0..ROUNDS {
        let id = both[0].job("j", &["loot"], "1M").remove(0);
        assert_eq!(both[0].write(control(&id), &format!("release {id}")), 0);
        let claim = format!("claim {id} d{round}");
        let errnos: Vec<i32> = std::thread::scope(|scope| {
            let write = |path, text| fs::write(path, text).map_or_else(|e| e.raw_os_error().unwrap(), |()| 0);
            let all: Vec<_> = both
                .iter()
                .map(|volfs| (volfs.path("jobs/j/control"), claim.clone()))
                .map(|(path, text): (std::path::PathBuf, String)| scope.spawn(move || write(path, text)))
                .collect();
            all.into_iter().map(|writer| writer.join().unwrap()).collect()
        });
        let winner = match errnos[..] {
            [0, EBUSY | EPERM] => 0,
            [EBUSY | EPERM, 0] => 1,
            _ => panic!("round {round}: {errnos:?}\n{}\n{}", both[0].log(), both[1].log()),
        };
        assert_eq!(record(&ground, &id), records[winner], "round {round}: the mark is the winner's");
        for (n, volfs) in both.iter().enumerate() {
            assert_eq!(volfs.path(format!("jobs/j/disks/d{round}")).is_symlink(), n == winner, "round {round}");
        }
    }
}

#[test]
fn from_takes_over_and_the_losers_verbs_have_no_effect_in_one_loop_store() {
    let ground = Ground::on_loops(&[]);
    let (own, second) = (ground.volfs(), &ground.second);
    let ids = own.job("j", &["a", "b"], "1M");
    fs::create_dir(own.path("jobs/k")).unwrap();
    fs::create_dir(second.path("jobs/j")).unwrap();
    let from = record(&ground, &ids[0]);
    for (n, id) in ids.iter().enumerate() {
        assert_eq!(second.write("jobs/j/control", &format!("claim {id} d{n} from={from}")), 0, "{}", second.log());
    }
    let before = ground.book();
    for verb in ["attach", "detach", "resize 2M", "disk other", "move k", &format!("delete {}", ids[0])] {
        let errno = own.write(control(&ids[0]), verb);
        assert!(matches!(errno, EPERM | EBUSY), "{verb}: {errno}\n{}", own.log());
        assert_eq!(own.value(format!("volumes/{}/status", ids[0])), "conflict", "{verb}");
    }
    assert_eq!(own.write(control(&ids[1]), &format!("delete {}", ids[1])), EPERM, "the first to find out");
    assert_eq!(own.write("jobs/j/control", "destroy j"), EBUSY, "{}", own.log());
    // Another record's mark makes no copy of this one.
    assert!(!own.read("health").unwrap().contains("read-only"));
    assert_eq!(own.write(control(&ids[0]), &format!("release {}", ids[0])), 0, "{}", own.log());
    assert_eq!(ground.book(), before);
    assert_eq!(second.write("jobs/j/disks/d0/control", "attach"), 0, "{}", second.log());
}

/// Copies the record under the second daemon: nothing of machine or past tells the two apart.
fn with_one_record(mut ground: Ground) -> (Ground, Vec<String>) {
    let ids = ground.volfs().job("j", &["a", "b"], ground.size());
    fs::create_dir(ground.volfs().path("jobs/k")).unwrap();
    ground.second.terminate();
    ground.kill();
    copy(&ground.volfs().state(), &ground.second.state());
    ground.volfs_mut().launch();
    ground.second.launch();
    (ground, ids)
}

fn refuses_everything(volfs: &Volfs) {
    let health = volfs.read("health").unwrap();
    assert!(health.starts_with("down\n") && health.contains("older than its volumes"), "{health}");
    assert!(health.contains("adopt --this-host") && health.contains("adopt --new"), "{health}");
    for command in ["create never 1G", "attach", "detach", "destroy j"] {
        assert_eq!(volfs.write("jobs/j/control", command), EROFS, "{command}");
    }
    assert_eq!(fs::create_dir(volfs.path("jobs/never")).unwrap_err().raw_os_error(), Some(EROFS));
}

#[test]
fn of_two_daemons_with_one_record_the_one_that_meets_a_later_mark_changes_nothing_more() {
    let (ground, ids) = with_one_record(Ground::on_loops(&[]));
    let (own, second) = (ground.volfs(), &ground.second);
    // It has looked at all marks, and all was well.
    assert_eq!(second.write("control", "reconcile"), 0, "{}", second.log());
    assert_eq!(own.write(control(&ids[0]), "move k"), 0, "{}", own.log());
    let before = ground.book();
    // The first command about that volume, with no round in between.
    assert_eq!(second.write(control(&ids[0]), "attach"), EROFS, "{}", second.log());
    refuses_everything(second);
    assert_eq!(second.write(control(&ids[1]), "attach"), EROFS, "nor what it could own still");
    assert_eq!(ground.book(), before);
    assert_eq!(own.write(control(&ids[0]), "attach"), 0, "{}", own.log());
    assert!(own.read("health").unwrap().starts_with("ok\n"), "{}", own.read("health").unwrap());
}

#[test]
fn two_daemons_with_one_record_that_give_the_same_epochs_are_found_out() {
    let (ground, ids) = with_one_record(Ground::on_loops(&[]));
    let (own, second) = (ground.volfs(), &ground.second);
    assert_eq!(second.write("control", "reconcile"), 0, "{}", second.log());
    // Both give the next epoch, one to a volume of both.
    assert_eq!(own.write(control(&ids[0]), "move k"), 0, "{}", own.log());
    assert_eq!(second.write("jobs/j/control", "create own 1M"), 0, "{}", second.log());
    let before = ground.book();
    assert_eq!(second.write("control", "reconcile"), libc::EHOSTUNREACH, "in conflict\n{}", second.log());
    refuses_everything(second);
    assert_eq!(ground.book(), before);
}

#[test]
fn of_two_daemons_with_one_record_over_a_cloud_one_stops_as_well() {
    // The copy runs under another VM's id there, which alone stops it: on the same host it is the marks.
    let mut ground = Ground::on_cloud(&[]);
    let ids = ground.volfs().job("j", &["a", "b"], "1G");
    fs::create_dir(ground.volfs().path("jobs/k")).unwrap();
    ground.kill();
    let mut twin = ground.site().beside(&ground.site().cloud.host(), &[], "");
    copy(&ground.volfs().state(), &twin.state());
    ground.volfs_mut().launch();
    twin.launch();
    assert_eq!(twin.write("control", "reconcile"), 0, "{}", twin.log());
    assert_eq!(ground.volfs().write(control(&ids[0]), "move k"), 0, "{}", ground.volfs().log());
    let before = ground.book();
    assert_eq!(twin.write(control(&ids[0]), "attach"), EROFS, "{}", twin.log());
    refuses_everything(&twin);
    assert_eq!(twin.write(control(&ids[1]), "attach"), EROFS);
    assert_eq!(ground.book(), before);
}

/// A move whose end nobody knows leaves a later mark on a volume: that is a conflict of this volume,
/// and no reason to take the record for a copy.
#[test]
fn a_move_that_ended_unclear_stops_its_own_volume_and_no_other() {
    let mut own = Volfs::prepare(&[], "reconcile_interval = 3600\n");
    let [hold, lost, away] = ["hold", "lost", "away"].map(|name| own.scratch(name));
    let points = [("loop.mark.after=wait", &hold), ("loop.ambiguous=fail", &lost), ("loop.unreachable=fail", &away)];
    let points = points.map(|(point, file)| format!("{point}:{}", file.display())).join(";");
    own.set_env(&[("VOLFS_FAILPOINTS", &points)]);
    own.launch();
    let ids = own.job("j", &["a", "b"], "1M");
    fs::create_dir(own.path("jobs/k")).unwrap();
    let store = own.state().join("loop");
    let mark = |id: &str| meta(&store, id).unwrap()["mark"].as_str().unwrap().to_owned();
    let before = mark(&ids[0]);
    // The mark is put on, its answer is lost, and the cloud is away when it is looked for.
    fs::write(&hold, "").unwrap();
    fs::write(&lost, "").unwrap();
    let errno = std::thread::scope(|scope| {
        let path = own.path(control(&ids[0]));
        let mover = scope.spawn(|| fs::write(path, "move k").map_or_else(|e| e.raw_os_error().unwrap(), |()| 0));
        own.until("mark", || mark(&ids[0]) != before);
        fs::write(&away, "").unwrap();
        fs::remove_file(&hold).unwrap();
        mover.join().unwrap()
    });
    assert_eq!(errno, libc::EHOSTUNREACH, "{}", own.log());
    fs::remove_file(&lost).unwrap();
    fs::remove_file(&away).unwrap();
    for _ in 0..2 {
        own.write(control(&ids[0]), "reconcile");
        assert_eq!(own.value(format!("volumes/{}/status", ids[0])), "conflict");
        for command in ["attach", "detach"] {
            assert_eq!(own.write(control(&ids[1]), command), 0, "{}", own.log());
        }
        assert!(!own.read("health").unwrap().contains("read-only"), "{}", own.read("health").unwrap());
        // And so after a restart.
        own.kill();
        own.launch();
    }
    assert_eq!(own.write("jobs/j/control", "create c 1M"), 0, "{}", own.log());
}

/// The epoch that it would give next is on a volume already: nothing is given before it has looked.
#[test]
fn a_copy_that_starts_while_the_cloud_is_away_gives_nothing_before_it_has_looked() {
    let mut ground = Ground::on_loops(&[]);
    let away = ground.volfs().scratch("away");
    ground.volfs_mut().set_env(&[("VOLFS_FAILPOINTS", &format!("loop.unreachable=fail:{}", away.display()))]);
    ground.volfs().job("j", &["a"], "1M");
    ground.kill();
    let old = ground.volfs().scratch("old");
    copy(&ground.volfs().state(), &old);
    ground.volfs_mut().launch();
    ground.volfs().job("j", &["later"], "1M");
    ground.kill();
    copy(&old, &ground.volfs().state());
    let before = ground.book();
    fs::write(&away, "").unwrap();
    ground.volfs_mut().launch();
    let volfs = ground.volfs();
    assert_eq!(volfs.write("jobs/j/control", "create new 1M"), libc::EHOSTUNREACH, "{}", volfs.log());
    fs::remove_file(&away).unwrap();
    assert_eq!(volfs.write("jobs/j/control", "create new 1M"), EROFS, "{}", volfs.log());
    refuses_everything(volfs);
    assert_eq!(ground.book(), before);
}
