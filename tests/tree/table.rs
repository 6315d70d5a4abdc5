//! X1 to X10: every cell of status × command gives exactly the errno of the contract, and leaves
//! the status as it should.

use std::fs;
use std::path::Path;
use std::process::Child;

use serde_json::Value;

use crate::bring::*;
use crate::common::{Volfs, finish};

const QUIET: &str = "reconcile_interval = 3600\n";
const OK: i32 = 0;
use libc::{EBUSY, EHOSTUNREACH, ENOENT, EPERM, ETIMEDOUT};

/// The statuses of the table's columns.
#[derive(Clone, Copy, PartialEq, Debug)]
enum Column {
    Detached,
    Attached,
    Remote,
    Lost,
    Missing,
    Unknown,
    Conflict,
}
use Column::*;

/// Status afterwards.
const SAME: &str = "=";
/// Out of the job and of the tree.
const GONE: &str = "gone";

/// A cell: errno, and the status afterwards.
type Cell = (i32, &'static str);

/// A row: its number, the command ({u}: own uuid, {y}: where it is remote, {x}: another VM), and a
/// cell a column.
struct Row {
    number: &'static str,
    command: &'static str,
    cells: [Cell; 7],
}

const fn row(number: &'static str, command: &'static str, cells: [Cell; 7]) -> Row {
    Row { number, command, cells }
}

#[rustfmt::skip]
const TABLE: [Row; 14] = [
    //                           detached               attached           remote on y        lost                      missing            unknown                conflict
    row("X1", "attach",          [(OK, "attached"),     (OK, SAME),        (EBUSY, SAME),     (ETIMEDOUT, "attaching"), (ENOENT, SAME),    (OK, "attached"),      (EBUSY, SAME)]),
    row("X2", "attach vm={x}",   [(OK, "remote"),       (EBUSY, SAME),     (EBUSY, SAME),     (EBUSY, SAME),            (ENOENT, SAME),    (OK, "remote"),        (EBUSY, SAME)]),
    row("X2", "attach vm={y}",   [(OK, "remote"),       (EBUSY, SAME),     (OK, SAME),        (EBUSY, SAME),            (ENOENT, SAME),    (OK, "remote"),        (EBUSY, SAME)]),
    row("X3", "detach",          [(OK, SAME),           (OK, "detached"),  (OK, SAME),        (OK, "detached"),         (OK, SAME),        (OK, "detached"),      (EPERM, SAME)]),
    row("X4", "detach vm={x}",   [(OK, SAME),           (OK, SAME),        (OK, SAME),        (EBUSY, SAME),            (OK, SAME),        (OK, "detached"),      (EPERM, SAME)]),
    row("X4", "detach vm={y}",   [(OK, SAME),           (OK, SAME),        (OK, "detached"),  (EBUSY, SAME),            (OK, SAME),        (OK, "detached"),      (EPERM, SAME)]),
    row("X5", "resize 2M",       [(OK, SAME),           (OK, SAME),        (EBUSY, SAME),     (EBUSY, SAME),            (ENOENT, SAME),    (OK, "detached"),      (EPERM, SAME)]),
    row("X5", "snapshot s",      [(OK, SAME),           (OK, SAME),        (EBUSY, SAME),     (EBUSY, SAME),            (ENOENT, SAME),    (OK, "detached"),      (EPERM, SAME)]),
    // Detached, it may: it is the snapshot that is not there.
    row("X6", "revert s",        [(ENOENT, SAME),       (EBUSY, SAME),     (EBUSY, SAME),     (EBUSY, SAME),            (ENOENT, SAME),    (ENOENT, "detached"),  (EPERM, SAME)]),
    row("X7", "delete {u}",      [(OK, GONE),           (EBUSY, SAME),     (EBUSY, SAME),     (EBUSY, SAME),            (OK, GONE),        (OK, GONE),            (EPERM, SAME)]),
    row("X9", "move other",      [(OK, SAME),           (OK, SAME),        (OK, SAME),        (OK, SAME),               (OK, SAME),        (OK, SAME),            (EPERM, SAME)]),
    row("X9", "disk renamed",    [(OK, SAME),           (OK, SAME),        (OK, SAME),        (OK, SAME),               (OK, SAME),        (OK, SAME),            (EPERM, SAME)]),
    // No row of its own: a look is always let in.
    row("C13", "reconcile",      [(OK, SAME),           (OK, SAME),        (OK, SAME),        (OK, SAME),               (OK, SAME),        (OK, "detached"),      (EHOSTUNREACH, SAME)]),
    // Last: it has the rest looked at.
    row("X8", "release {u}",     [(OK, GONE),           (EBUSY, SAME),     (OK, GONE),        (OK, GONE),               (OK, GONE),        (OK, GONE),            (OK, GONE)]),
];

struct Stage {
    volfs: Volfs,
    /// Kept so that the failpoint's path stays.
    gate: Gate,
    y: String,
    x: String,
    uuids: Vec<String>,
}

/// `count` volumes in jobs j0, j1, …, all in that status.
fn stage(column: Column, count: usize) -> Stage {
    let gate = Gate::new();
    let points = format!("reconcile.no-gap=fail;{}", gate.wait("attach.journaled"));
    let volfs = Volfs::start_with(&[("VOLFS_FAILPOINTS", &points)], QUIET);
    let (x, y) = (volfs::model::VmId::random().to_string(), volfs::model::VmId::random().to_string());
    fs::create_dir(volfs.path("jobs/other")).unwrap();
    let uuids: Vec<String> = (0..count).map(|n| volfs.job(&format!("j{n}"), &["d"], "1M").remove(0)).collect();
    for (n, uuid) in uuids.iter().enumerate() {
        bring(&volfs, &gate, column, &format!("j{n}"), uuid, &y);
        assert_eq!(of(&volfs, uuid, "status"), format!("{column:?}").to_lowercase(), "{}", volfs.log());
    }
    Stage { volfs, gate, y, x, uuids }
}

fn bring(volfs: &Volfs, gate: &Gate, column: Column, job: &str, uuid: &str, y: &str) {
    let control = format!("{}/control", dir(job, uuid));
    let write = |command: &str| volfs.write(&control, command);
    match column {
        Detached => {}
        Attached => assert_eq!(write("attach"), 0, "{}", volfs.log()),
        Remote => assert_eq!(write(&format!("attach vm={y}")), 0, "{}", volfs.log()),
        Lost => {
            say_attached_here(volfs, uuid);
            assert_eq!(write("reconcile"), 0, "{}", volfs.log());
        }
        Missing => {
            fs::remove_dir_all(stored(volfs, uuid)).unwrap();
            assert_eq!(write("reconcile"), 0, "{}", volfs.log());
        }
        Unknown => {
            let held = gate.close();
            assert_eq!(write("attach nowait"), 0, "{}", volfs.log());
            let id = running(volfs, "attach");
            assert_eq!(volfs.write("control", &format!("abandon {id}")), 0, "{}", volfs.log());
            held.release();
        }
        Conflict => {
            edit_meta(volfs, uuid, |m| m["mark"] = FOREIGN.into());
            assert_eq!(write("reconcile"), EHOSTUNREACH, "{}", volfs.log());
        }
    }
}

fn every_cell_of(column: Column) {
    let stage = stage(column, TABLE.len());
    let volfs = &stage.volfs;
    let mut wrong = Vec::new();
    for (n, (row, uuid)) in TABLE.iter().zip(&stage.uuids).enumerate() {
        let (errno, after) = row.cells[column as usize];
        let was = of(volfs, uuid, "status");
        let mark = (column != Missing).then(|| meta(volfs, uuid)["mark"].clone());
        let mut command = row.command.replace("{u}", uuid).replace("{x}", &stage.x).replace("{y}", &stage.y);
        if errno == ETIMEDOUT {
            command.push_str(" timeout=1");
        }
        let got = volfs.write(format!("{}/control", dir(&format!("j{n}"), uuid)), &command);
        let is = volfs.read(format!("volumes/{uuid}/status")).map_or(GONE.into(), |s| s.trim_end().to_owned());
        let is = if volfs.path(format!("unclaimed/{uuid}")).exists() { GONE.into() } else { is };
        let after = if after == SAME { was.clone() } else { after.into() };
        if (got, &is) != (errno, &after) {
            wrong.push(format!(
                "{} {command} while {was}: errno {got} and {is}, wanted {errno} and {after}",
                row.number
            ));
        }
        let verb = row.command.split(' ').next().unwrap();
        match (verb, got) {
            // Ownership: the mark follows what was done, and nothing else touches it.
            ("release", 0) if matches!(column, Detached | Remote | Lost) => {
                assert_eq!(meta(volfs, uuid)["mark"], Value::Null, "{command} while {was}");
            }
            ("release", 0) if column != Missing => {
                assert_eq!(Some(&meta(volfs, uuid)["mark"]), mark.as_ref(), "{command} while {was}");
            }
            ("move", 0) => {
                let link = fs::read_link(volfs.path("jobs/other/disks/d")).unwrap();
                assert_eq!(link, Path::new(&format!("../volumes/{uuid}")));
                assert_eq!(volfs.value(format!("jobs/j{n}/status")), "idle");
                if column != Missing {
                    assert_ne!(Some(&meta(volfs, uuid)["mark"]), mark.as_ref());
                }
            }
            ("disk", 0) => assert!(volfs.path(format!("jobs/j{n}/disks/renamed")).is_symlink()),
            ("delete", 0) => assert!(!stored(volfs, uuid).exists()),
            ("resize", 0) => assert_eq!(of(volfs, uuid, "size"), (2 << 20).to_string()),
            (_, 0) => {}
            // A refusal says why.
            _ => {
                let error = volfs.read(format!("volumes/{uuid}/error")).unwrap();
                assert!(error.contains(&format!(" {verb} pid ")), "{command} while {was}: {error}");
            }
        }
        if got != 0 && column != Missing {
            assert_eq!(Some(&meta(volfs, uuid)["mark"]), mark.as_ref(), "{command} while {was}");
        }
        if errno == ETIMEDOUT {
            let id = running(volfs, "attach");
            assert_eq!(volfs.write("control", &format!("cancel {id}")), 0);
            volfs.until("the end of the wait", || of(volfs, uuid, "status") == "lost");
        }
    }
    assert!(wrong.is_empty(), "{}\n{}", wrong.join("\n"), volfs.log());
}

#[test]
fn x1_x2_x3_x4_x5_x6_x7_x8_x9_every_cell_of_detached() {
    every_cell_of(Detached);
}

#[test]
fn x1_x2_x3_x4_x5_x6_x7_x8_x9_every_cell_of_attached() {
    every_cell_of(Attached);
}

#[test]
fn x1_x2_x3_x4_x5_x6_x7_x8_x9_every_cell_of_remote() {
    every_cell_of(Remote);
}

#[test]
fn x1_x2_x3_x4_x5_x6_x7_x8_x9_every_cell_of_lost() {
    every_cell_of(Lost);
}

#[test]
fn x1_x2_x3_x4_x5_x6_x7_x8_x9_every_cell_of_missing() {
    every_cell_of(Missing);
}

#[test]
fn x1_x2_x3_x4_x5_x6_x7_x8_x9_every_cell_of_unknown() {
    every_cell_of(Unknown);
}

#[test]
fn x1_x2_x3_x4_x5_x6_x7_x8_x9_every_cell_of_conflict() {
    every_cell_of(Conflict);
}

#[test]
fn x1_x2_x3_x4_x5_x6_x7_x9_what_stays_unknown_is_ehostunreach() {
    let stage = stage(Unknown, TABLE.len());
    let volfs = &stage.volfs;
    fs::rename(volfs.state().join("loop"), volfs.state().join("away")).unwrap();
    for (n, (row, uuid)) in TABLE.iter().zip(&stage.uuids).enumerate() {
        let command = row.command.replace("{u}", uuid).replace("{x}", &stage.x).replace("{y}", &stage.y);
        let got = volfs.write(format!("{}/control", dir(&format!("j{n}"), uuid)), &command);
        if command.starts_with("release") {
            // X8: without the cloud.
            assert_eq!(got, 0, "{}", volfs.log());
            assert!(!volfs.path(dir(&format!("j{n}"), uuid)).exists());
        } else {
            assert_eq!(got, EHOSTUNREACH, "{command}: {}", volfs.log());
            assert_eq!(of(volfs, uuid, "status"), "unknown", "{command}");
        }
    }
    drop(stage.gate);
}

#[test]
fn x3_detach_of_our_own_volume_in_conflict_is_ebusy() {
    let volfs = Volfs::start_with(&[], QUIET);
    let uuid = &volfs.job("a", &["d"], "1M")[0];
    let _bound = Bound::new(uuid, &stored(&volfs, uuid).join("data.img"));
    volfs.until("conflict", || of(&volfs, uuid, "status") == "conflict");
    assert_eq!(volfs.write("jobs/a/disks/d/control", "detach"), EBUSY);
    assert_eq!(volfs.write("jobs/a/disks/d/control", &format!("delete {uuid}")), EPERM);
    assert_eq!(of(&volfs, uuid, "status"), "conflict");
    assert!(stored(&volfs, uuid).exists());
}

#[test]
fn x1_attach_while_lost_waits_for_the_device_and_has_it() {
    let volfs = Volfs::start_with(&[], QUIET);
    let uuid = &volfs.job("a", &["d"], "1M")[0];
    say_attached_here(&volfs, uuid);
    volfs.ok("echo reconcile > $R/control");
    assert_eq!(of(&volfs, uuid, "status"), "lost");
    let waiter = volfs.sh_spawn(&["dash"], "echo attach > $R/jobs/a/disks/d/control");
    volfs.until("attaching", || of(&volfs, uuid, "status") == "attaching");
    let bound = Bound::new(uuid, &stored(&volfs, uuid).join("data.img"));
    assert_eq!(finish(waiter).status, 0, "{}", volfs.log());
    assert_eq!(of(&volfs, uuid, "device"), format!("/dev/{}", bound.name));
}

/// What is in flight, and the equal command spelled otherwise.
struct Flight {
    point: &'static str,
    before: &'static [&'static str],
    command: &'static str,
    equal: &'static str,
    word: &'static str,
}

const FLIGHTS: [Flight; 4] = [
    Flight {
        point: "attach.before-call",
        before: &[],
        command: "attach",
        equal: "attach  timeout=60",
        word: "attaching",
    },
    Flight {
        point: "detach.journaled",
        before: &["attach"],
        command: "detach",
        equal: "detach timeout=60",
        word: "detaching",
    },
    Flight { point: "resize.before-call", before: &[], command: "resize 2M", equal: "resize 2048K", word: "resizing" },
    Flight {
        point: "delete.before-call",
        before: &[],
        command: "delete {u}",
        equal: "delete {u} timeout=60",
        word: "deleting",
    },
];

fn callers(volfs: &Volfs, id: &str) -> u64 {
    let op: Value = serde_json::from_str(&volfs.read(format!("operations/{id}")).unwrap()).unwrap();
    op["callers"].as_u64().unwrap()
}

fn in_flight(flight: &Flight) {
    let gate = Gate::new();
    let volfs = Volfs::start_with(&[("VOLFS_FAILPOINTS", &gate.wait(flight.point))], QUIET);
    let uuid = &volfs.job("a", &["d"], "1M")[0];
    fs::create_dir(volfs.path("jobs/other")).unwrap();
    let control = format!("{}/control", dir("a", uuid));
    for command in flight.before {
        assert_eq!(volfs.write(&control, command), 0);
    }
    let held = gate.close();
    let own = |command: &str| command.replace("{u}", uuid);
    let first = volfs.sh_spawn(&["dash"], &format!("echo '{}' > $R/{control}", own(flight.command)));
    volfs.until("the operation", || of(&volfs, uuid, "status") == flight.word);
    let id = running(&volfs, &own(flight.command.split(' ').next().unwrap()));

    // Any other: at once, which is before the held one can end.
    for row in &TABLE {
        let vm = volfs::model::VmId::random().to_string();
        let other = own(row.command).replace("{x}", &vm).replace("{y}", &vm);
        if other == own(flight.command) {
            continue;
        }
        assert_eq!(volfs.write(&control, &other), EBUSY, "{other} during {}", flight.command);
        let error = volfs.read(format!("{}/error", dir("a", uuid))).unwrap();
        assert!(error.contains(&format!("(operation {id}) is in flight")), "{error}");
    }
    for shell in crate::common::SHELLS {
        let said = volfs.sh_in(shell, &format!("echo disk zz > $R/{control}"));
        assert_ne!(said.status, 0, "{shell:?}");
    }
    // The equal one joins, through every shell.
    let joined: Vec<Child> = crate::common::SHELLS
        .iter()
        .map(|shell| volfs.sh_spawn(shell, &format!("echo '{}' > $R/{control}", own(flight.equal))))
        .collect();
    volfs.until("three that joined", || callers(&volfs, &id) == 4);
    assert_eq!(of(&volfs, uuid, "status"), flight.word);
    held.release();
    for child in std::iter::once(first).chain(joined) {
        assert_eq!(finish(child).status, 0, "{}", volfs.log());
    }
    let verb = flight.command.split(' ').next().unwrap();
    let history = volfs.read("history").unwrap();
    let count = history.lines().filter(|l| l.split('\t').nth(1) == Some(verb) && l.contains(uuid.as_str())).count();
    assert_eq!(count, 1, "one operation for four callers: {history}");
}

#[test]
fn x1_in_flight_attach_joins_and_all_others_are_ebusy() {
    in_flight(&FLIGHTS[0]);
}

#[test]
fn x3_in_flight_detach_joins_and_all_others_are_ebusy() {
    in_flight(&FLIGHTS[1]);
}

#[test]
fn x5_in_flight_resize_joins_and_all_others_are_ebusy() {
    in_flight(&FLIGHTS[2]);
}

#[test]
fn x7_in_flight_delete_joins_and_all_others_are_ebusy() {
    in_flight(&FLIGHTS[3]);
}

/// `destroy` of a job of two: a detached volume, whose name sorts first, and one in that status.
fn destroy_with(column: Column) -> (i32, bool, bool) {
    let gate = Gate::new();
    let points = format!("reconcile.no-gap=fail;{}", gate.wait("attach.journaled"));
    let volfs = Volfs::start_with(&[("VOLFS_FAILPOINTS", &points)], QUIET);
    let uuids = volfs.job("j", &["a", "b"], "1M");
    let y = volfs::model::VmId::random().to_string();
    bring(&volfs, &gate, column, "j", &uuids[1], &y);
    let errno = volfs.write("jobs/j/control", "destroy j");
    if errno != 0 {
        let error = volfs.read("jobs/j/error").unwrap();
        assert!(error.contains("b: "), "the disk in the way is named: {error}");
        assert!(error.contains(&uuids[1]), "and the volume: {error}");
        assert_eq!(volfs.ok("ls $R/jobs/j/disks"), "a\nb", "nothing was forgotten");
        assert_eq!(of(&volfs, &uuids[0], "status"), "detached");
    } else {
        assert!(!volfs.path("jobs/j").exists());
        assert!(volfs.loops().is_empty());
    }
    let there = |n: usize| stored(&volfs, &uuids[n]).exists();
    (errno, there(0), there(1))
}

#[test]
fn x10_destroy_deletes_what_is_detached() {
    assert_eq!(destroy_with(Detached), (0, false, false));
}

#[test]
fn x10_destroy_detaches_and_deletes_what_is_attached() {
    assert_eq!(destroy_with(Attached), (0, false, false));
}

#[test]
fn x10_destroy_drops_what_is_missing() {
    assert_eq!(destroy_with(Missing), (0, false, false));
}

#[test]
fn x10_destroy_stops_at_a_remote_volume() {
    assert_eq!(destroy_with(Remote), (EBUSY, true, true));
}

#[test]
fn x10_destroy_stops_at_a_lost_volume() {
    assert_eq!(destroy_with(Lost), (EBUSY, true, true));
}

#[test]
fn x10_destroy_stops_at_an_unknown_volume() {
    assert_eq!(destroy_with(Unknown), (EHOSTUNREACH, true, true));
}

#[test]
fn x10_destroy_stops_at_a_conflict() {
    let (errno, first, second) = destroy_with(Conflict);
    assert!(first && second);
    assert_eq!(errno, EBUSY);
}
