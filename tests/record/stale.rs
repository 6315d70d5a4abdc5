//! The record is copied at each step of each verb that changes an owner, the world goes on, and the
//! copy is put back: no verb and no recovery has an effect on what the copy does not own any more.
//!
//! The daemon is killed at the step (so the copy is what a disk would hold), settles it, finishes the
//! command, and then gives the volume away: released, deleted, or taken by another record. Put back
//! are the database alone, which the high-water mark gives away, and the whole state directory, which
//! only the marks can.

use std::fs;
use std::path::{Path, PathBuf};

use crate::common::Volfs;
use crate::ground::{Ground, copy, copy_database, settled};
use crate::verbs::{CLAIM, CREATE, DELETE, DESTROY, MOVE, RELEASE, TAKE, Verb, control, job};

const EROFS: i32 = libc::EROFS;

/// What happens to the volumes afterwards.
const FUTURES: [&str; 3] = ["release", "delete", "taken"];

/// A copy of the state directory, and what it was at.
struct Copy {
    at: String,
    dir: PathBuf,
}

/// The volumes that a record has with their epochs, its own id, and the epochs of what it has begun:
/// read with SQLite alone, from a copy of the copy.
fn owned(state: &Path, scratch: &Path) -> (String, Vec<(String, i64)>, Vec<i64>) {
    let _ = fs::remove_dir_all(scratch);
    fs::create_dir(scratch).unwrap();
    copy_database(state, scratch);
    let db = rusqlite::Connection::open(scratch.join("volfs.db")).unwrap();
    let record = db.query_row("SELECT value FROM meta WHERE key = 'record'", [], |r| r.get(0)).unwrap();
    let mut disks = db
        .prepare("SELECT v.volume_id, d.epoch FROM vm_disks d JOIN ossea_volumes v ON v.id = d.ossea_volume_id")
        .unwrap();
    let disks = disks.query_map([], |r| Ok((r.get(0)?, r.get(1)?))).unwrap().map(Result::unwrap).collect();
    let mut begun =
        db.prepare("SELECT json_extract(detail, '$.epoch') FROM volume_operations WHERE ended_at IS NULL").unwrap();
    let begun = begun.query_map([], |r| r.get(0)).unwrap().map(Result::unwrap).collect();
    (record, disks, begun)
}

/// Every command that changes a volume, with its own name in it where it must be.
fn verbs(id: &str) -> Vec<String> {
    let plain =
        ["attach", "detach", "detach force", "resize 2G", "disk other", "move elsewhere", "snapshot s", "revert s"];
    let named = ["delete", "release"].map(|verb| format!("{verb} {id}"));
    plain.into_iter().map(str::to_owned).chain(["reconcile".to_owned()]).chain(named).collect()
}

/// Gives everything that can be given to what the copy does not own any more.
fn give_all(ground: &Ground, at: &str, mine: &[String], refused: bool) {
    let volfs = ground.volfs();
    let check = |what: &str, errno: i32| assert!(!refused || errno == EROFS, "{at}: {what}: {errno}\n{}", volfs.log());
    for id in ground.ids() {
        if mine.contains(&id) || ground.mark(&id).is_none() && !volfs.path(control(&id)).exists() {
            continue;
        }
        if volfs.path(control(&id)).exists() {
            // What the last command leaves is looked at by the next.
            for verb in verbs(&id) {
                let errno = volfs.write(control(&id), &verb);
                check(&verb, errno);
                // One that is gone is dropped by its deletion, and what is in conflict is given up.
                if !volfs.path(control(&id)).exists() {
                    break;
                }
                assert_eq!(volfs.read(format!("volumes/{id}/device")), Err(libc::ENODEV), "{at}: {verb}");
            }
        }
        // Marked by whom it belongs to now: it cannot be had without saying from whom.
        if let Some(mark) = ground.mark(&id) {
            let errno = volfs.write("jobs/elsewhere/control", &format!("claim {id} loot"));
            assert_ne!(errno, 0, "{at}: claimed {id}, which was {mark}\n{}", volfs.log());
            check("claim", errno);
        }
    }
    for entry in fs::read_dir(volfs.path("jobs")).unwrap() {
        let name = entry.unwrap().file_name().into_string().unwrap();
        let disks = fs::read_dir(volfs.path(format!("jobs/{name}/disks"))).unwrap();
        let has_mine = disks.into_iter().any(|link| {
            let target = fs::read_link(link.unwrap().path()).unwrap();
            mine.contains(&target.file_name().unwrap().to_str().unwrap().to_owned())
        });
        if has_mine || name == "elsewhere" {
            continue;
        }
        for command in ["attach", "detach", "move elsewhere", &format!("destroy {name}")] {
            check(command, volfs.write(format!("jobs/{name}/control"), command));
        }
    }
    let errno = volfs.write("control", "reconcile");
    check("reconcile", errno);
}

/// The n-th time: killed at the point, copied, settled, finished, and given away.
fn one(ground: &mut Ground, verb: &Verb, n: usize, (point, hit): (&str, u32)) -> Copy {
    let at = format!("{} at {point} #{hit}", verb.name);
    let mut ids = (verb.make)(ground, n);
    let (file, text) = (verb.command)(ground, n, &ids);
    let arm = ground.arms().join(point);
    fs::write(&arm, hit.to_string()).unwrap();
    assert_ne!(ground.volfs().write(&file, &text), 0, "{at}: never reached\n{}", ground.volfs().log());
    assert_eq!(ground.volfs_mut().wait(), -libc::SIGKILL, "{at}: {}", ground.volfs().log());
    fs::remove_file(&arm).unwrap();
    let dir = ground.volfs().scratch(&format!("copy-{n}"));
    copy(&ground.volfs().state(), &dir);
    ground.kill();
    ground.volfs_mut().launch();
    settled(ground.volfs());
    let volfs = ground.volfs();
    volfs.until(&format!("first look: {at}"), || !volfs.read("table").unwrap().contains("\tunknown\t"));
    let mut errno = ground.volfs().write(&file, &text);
    if errno != 0 && ids.first().is_some_and(|id| ground.is_there(id) && ground.mark(id).is_none()) {
        // Its other owner's mark was off already: it is nobody's, and there for the taking.
        errno = ground.volfs().write(&file, text.split(" from=").next().unwrap());
    }
    assert!([0, libc::EEXIST, libc::ENOENT].contains(&errno), "{at}: {errno}\n{}", ground.volfs().log());
    if ids.is_empty() {
        let link = fs::read_link(ground.volfs().path(format!("jobs/{}/disks/d", job(n)))).unwrap();
        ids.push(link.file_name().unwrap().to_str().unwrap().to_owned());
    }
    give_away(ground, n, &ids, &at);
    Copy { at, dir }
}

fn give_away(ground: &Ground, n: usize, ids: &[String], at: &str) {
    let second = &ground.second;
    for id in ids {
        let ours = ground.volfs().path(control(id)).exists();
        let future = FUTURES[n % FUTURES.len()];
        // Whom it was taken from gives it up, where it was: once to find out, and once for good.
        for _ in 0..2 {
            if second.path(control(id)).exists() {
                second.write(control(id), &format!("release {id}"));
            }
        }
        let errno = match (future, ground.mark(id)) {
            ("taken", Some(mark)) => {
                let from = mark.split('/').next().unwrap();
                second.write("jobs/theirs/control", &format!("claim {id} d{n} from={from}"))
            }
            // Deleted, or released by the command itself: half of those are somebody else's next.
            (_, None) if second.path(format!("volumes/{id}")).exists() || !ours && n.is_multiple_of(2) => 0,
            (_, None) if ground.is_there(id) && !ours => {
                second.write("jobs/theirs/control", &format!("claim {id} d{n}"))
            }
            (verb, Some(_)) if ours => ground.volfs().write(control(id), &format!("{verb} {id}")),
            _ => 0,
        };
        assert_eq!(errno, 0, "{at}: {future} of {id}\n{}\n{}", ground.volfs().log(), second.log());
    }
}

fn is_down(volfs: &Volfs, at: &str) {
    let health = volfs.read("health").unwrap();
    let says = health.starts_with("down\n") && health.contains("adopt --this-host") && health.contains("adopt --new");
    assert!(says, "{at}: {health}");
    let mkdir = fs::create_dir(volfs.path("jobs/never")).map_err(|e| e.raw_os_error());
    assert_eq!(mkdir, Err(Some(EROFS)), "{at}");
}

/// What is the copy's own still: marked as it says, or as an operation that it has begun says; and
/// what the copy says that it has.
fn mine(ground: &Ground, copied: &Copy) -> (Vec<String>, Vec<String>) {
    let (record, disks, begun) = owned(&copied.dir, &ground.volfs().scratch("oracle"));
    let recorded = disks.iter().map(|(id, _)| id.clone()).collect();
    let mut mine: Vec<String> = disks
        .into_iter()
        .filter(|(id, epoch)| ground.mark(id) == Some(format!("{record}/{epoch}")))
        .map(|(id, _)| id)
        .collect();
    let given = |id: &String| begun.iter().any(|epoch| ground.mark(id) == Some(format!("{record}/{epoch}")));
    mine.extend(ground.ids().into_iter().filter(given));
    (mine, recorded)
}

fn sweep(mut ground: Ground, verb: &Verb, points: &[(&str, u32)]) {
    fs::create_dir(ground.volfs().path("jobs/elsewhere")).unwrap();
    fs::create_dir(ground.second.path("jobs/theirs")).unwrap();
    // One that stays, older than every copy: it is nobody's to lose.
    ground.volfs().job("stays", &["kept"], ground.size());
    let copies: Vec<Copy> = points.iter().enumerate().map(|(n, point)| one(&mut ground, verb, n, *point)).collect();
    // The last copy, too, is older than the record by an operation of its own.
    fs::create_dir(ground.volfs().path("jobs/after")).unwrap();
    ground.kill();
    let state = ground.volfs().state();
    let truth = ground.volfs().scratch("truth");
    copy(&state, &truth);
    let (mut down, mut quiet) = (0, 0);
    let long = std::env::var_os("VOLFS_LONG").is_some();
    for (n, copied) in copies.iter().enumerate() {
        let (mine, recorded) = mine(&ground, copied);
        for whole in [false, true] {
            // The high-water mark does not know at which step the copy was taken.
            if !whole && n % 3 != 0 && !long {
                continue;
            }
            let at = format!("{}, put back {}", copied.at, if whole { "whole" } else { "the database alone" });
            copy(if whole { &copied.dir } else { &truth }, &state);
            if !whole {
                copy_database(&copied.dir, &state);
            }
            let before = ground.book();
            ground.volfs_mut().launch();
            let refused = !whole;
            if refused {
                is_down(ground.volfs(), &at);
                down += 1;
            } else {
                settled(ground.volfs());
                quiet += 1;
            }
            for link in fs::read_dir(ground.volfs().path("volumes")).unwrap() {
                let id = link.unwrap().file_name().into_string().unwrap();
                let owned = ground.volfs().path(control(&id)).exists();
                assert!(!owned || mine.contains(&id) || recorded.contains(&id), "{at}: recovery took {id}");
            }
            give_all(&ground, &at, &mine, refused);
            assert_eq!(difference(&before, &ground.book()), "", "{at}\n{}", ground.volfs().log());
            ground.kill();
        }
    }
    // The world goes on by one more mark, and now every copy is told by that.
    copy(&truth, &state);
    ground.volfs_mut().launch();
    ground.volfs().job("stays", &["later"], ground.size());
    ground.kill();
    copy(&state, &truth);
    for copied in [copies.first(), copies.last()].into_iter().flatten() {
        let at = format!("{}, put back whole below a later mark", copied.at);
        copy(&copied.dir, &state);
        let before = ground.book();
        ground.volfs_mut().launch();
        is_down(ground.volfs(), &at);
        give_all(&ground, &at, &[], true);
        assert_eq!(difference(&before, &ground.book()), "", "{at}\n{}", ground.volfs().log());
        ground.kill();
    }
    // And the true one has lost nothing by all that.
    copy(&truth, &state);
    ground.volfs_mut().launch();
    for disk in ["kept", "later"] {
        assert_eq!(ground.volfs().value(format!("jobs/stays/disks/{disk}/status")), "detached");
    }
    assert!(ground.volfs().read("health").unwrap().starts_with("ok\n"));
    assert!(down >= points.len() / 3 && quiet == points.len(), "{down} {quiet}");
    eprintln!("{}: {quiet} copies put back whole, {down} as the database alone", verb.name);
}

fn difference(
    before: &std::collections::BTreeMap<String, String>,
    after: &std::collections::BTreeMap<String, String>,
) -> String {
    let mut lines = Vec::new();
    for (key, value) in before {
        match after.get(key) {
            Some(now) if now == value => {}
            now => lines.push(format!("{key}: {value} -> {now:?}")),
        }
    }
    lines.extend(
        after.iter().filter(|(key, _)| !before.contains_key(*key)).map(|(key, value)| format!("new {key}: {value}")),
    );
    lines.join("\n")
}

fn on_loops(verb: &Verb, points: &[(&str, u32)]) {
    let names: Vec<&str> = points.iter().map(|p| p.0).collect();
    let verb = Verb {
        command: if verb.name == "create" {
            |_, n, _| (format!("jobs/{}/control", job(n)), "create d 1M".into())
        } else {
            verb.command
        },
        ..*verb
    };
    sweep(Ground::on_loops(&names), &verb, points);
}

fn on_cloud(verb: &Verb, points: &[(&str, u32)]) {
    let names: Vec<&str> = points.iter().map(|p| p.0).collect();
    sweep(Ground::on_cloud(&names), verb, points);
}

#[test]
fn a_copy_from_within_a_create_has_no_effect_on_loops() {
    on_loops(
        &CREATE,
        &[
            ("store.before-commit", 1),
            ("store.after-commit", 1),
            ("create.journaled", 1),
            ("create.before-call", 1),
            ("loop.create.before", 1),
            ("loop.create.built", 1),
            ("loop.create.after", 1),
            ("create.after-call", 1),
            ("create.acted", 1),
            ("store.before-commit", 2),
            ("store.after-commit", 2),
            ("create.recorded", 1),
        ],
    );
}

#[test]
fn a_copy_from_within_a_claim_has_no_effect_on_loops() {
    on_loops(
        &CLAIM,
        &[
            ("store.after-commit", 1),
            ("claim.journaled", 1),
            ("claim.before-mark", 1),
            ("loop.mark.before", 1),
            ("loop.mark.after", 1),
            ("claim.after-mark", 1),
            ("claim.acted", 1),
            ("store.before-commit", 2),
            ("store.after-commit", 2),
            ("claim.recorded", 1),
        ],
    );
}

#[test]
fn a_copy_from_within_a_take_over_has_no_effect_on_loops() {
    on_loops(
        &TAKE,
        &[
            ("claim.journaled", 1),
            ("claim.before-mark", 1),
            ("loop.mark.before", 1),
            ("loop.mark.after", 1),
            ("claim.after-mark", 1),
            ("claim.recorded", 1),
        ],
    );
}

#[test]
fn a_copy_from_within_a_take_over_has_no_effect_over_a_cloud() {
    on_cloud(
        &TAKE,
        &[
            ("claim.journaled", 1),
            ("claim.before-mark", 1),
            ("cloudstack.submitted", 1),
            ("cloudstack.unmarked", 1),
            ("cloudstack.submitted", 2),
            ("claim.after-mark", 1),
            ("claim.recorded", 1),
        ],
    );
}

#[test]
fn a_copy_from_within_a_move_has_no_effect_on_loops() {
    on_loops(
        &MOVE,
        &[
            ("store.before-commit", 1),
            ("store.after-commit", 1),
            ("move.journaled", 1),
            ("move.before-mark", 1),
            ("loop.mark.before", 1),
            ("loop.mark.after", 1),
            ("move.after-mark", 1),
            ("move.acted", 1),
            ("store.before-commit", 2),
            ("store.after-commit", 2),
            ("move.recorded", 1),
        ],
    );
}

#[test]
fn a_copy_from_within_a_release_has_no_effect_on_loops() {
    on_loops(
        &RELEASE,
        &[
            ("store.before-commit", 1),
            ("store.after-commit", 1),
            ("release.journaled", 1),
            ("release.before-mark", 1),
            ("loop.mark.before", 1),
            ("loop.mark.after", 1),
            ("release.after-mark", 1),
            ("release.acted", 1),
            ("store.before-commit", 2),
            ("store.after-commit", 2),
            ("release.recorded", 1),
        ],
    );
}

#[test]
fn a_copy_from_within_a_delete_has_no_effect_on_loops() {
    on_loops(
        &DELETE,
        &[
            ("store.before-commit", 1),
            ("store.after-commit", 1),
            ("delete.journaled", 1),
            ("delete.before-call", 1),
            ("loop.delete.before", 1),
            ("loop.delete.after", 1),
            ("delete.after-call", 1),
            ("delete.acted", 1),
            ("delete.recorded", 1),
        ],
    );
}

#[test]
fn a_copy_from_within_a_destroy_has_no_effect_on_loops() {
    on_loops(
        &DESTROY,
        &[
            ("store.before-commit", 1),
            ("store.after-commit", 1),
            ("destroy.journaled", 1),
            ("detach.before-call", 1),
            ("loop.detach.flagged", 1),
            ("destroy.between", 1),
            ("delete.journaled", 1),
            ("loop.delete.after", 1),
            ("delete.recorded", 1),
            ("destroy.between", 2),
            ("destroy.forget", 1),
            ("destroy.acted", 1),
            ("destroy.recorded", 1),
        ],
    );
}

#[test]
fn a_copy_from_within_a_create_has_no_effect_over_a_cloud() {
    on_cloud(
        &CREATE,
        &[
            ("create.journaled", 1),
            ("create.before-call", 1),
            ("cloudstack.submitted", 1),
            ("cloudstack.allocated", 1),
            ("cloudstack.marked", 1),
            ("create.after-call", 1),
            ("create.acted", 1),
            ("create.recorded", 1),
        ],
    );
}

#[test]
fn a_copy_from_within_a_claim_has_no_effect_over_a_cloud() {
    on_cloud(
        &CLAIM,
        &[
            ("claim.journaled", 1),
            ("claim.before-mark", 1),
            ("cloudstack.submitted", 1),
            ("claim.after-mark", 1),
            ("claim.acted", 1),
            ("claim.recorded", 1),
        ],
    );
}

#[test]
fn a_copy_from_within_a_move_has_no_effect_over_a_cloud() {
    on_cloud(
        &MOVE,
        &[
            ("move.journaled", 1),
            ("move.before-mark", 1),
            ("cloudstack.submitted", 1),
            ("cloudstack.unmarked", 1),
            ("cloudstack.submitted", 2),
            ("move.after-mark", 1),
            ("move.acted", 1),
            ("move.recorded", 1),
        ],
    );
}

#[test]
fn a_copy_from_within_a_release_has_no_effect_over_a_cloud() {
    on_cloud(
        &RELEASE,
        &[
            ("release.journaled", 1),
            ("release.before-mark", 1),
            ("cloudstack.submitted", 1),
            ("cloudstack.unmarked", 1),
            ("release.after-mark", 1),
            ("release.acted", 1),
            ("release.recorded", 1),
        ],
    );
}

#[test]
fn a_copy_from_within_a_delete_has_no_effect_over_a_cloud() {
    on_cloud(
        &DELETE,
        &[
            ("delete.journaled", 1),
            ("delete.before-call", 1),
            ("cloudstack.submitted", 1),
            ("delete.after-call", 1),
            ("delete.acted", 1),
            ("delete.recorded", 1),
        ],
    );
}

#[test]
fn a_copy_from_within_a_destroy_has_no_effect_over_a_cloud() {
    on_cloud(
        &DESTROY,
        &[
            ("destroy.journaled", 1),
            ("detach.before-call", 1),
            ("detach.after-call", 1),
            ("destroy.between", 1),
            ("delete.journaled", 1),
            ("delete.after-call", 1),
            ("destroy.forget", 1),
            ("destroy.recorded", 1),
        ],
    );
}
