//! V1 to V8: each status reached for real, and every file of the volume looked at there.

use std::collections::BTreeMap;
use std::fs;

use serde_json::Value;

use crate::bring::*;
use crate::common::Volfs;

const QUIET: &str = "reconcile_interval = 3600\n";

/// What a volume's `control` says of each verb.
fn verbs(volfs: &Volfs, path: &str) -> BTreeMap<String, String> {
    let text = volfs.read(path).unwrap();
    assert!(text.starts_with('#'), "{text}");
    let line = |l: &str| l.split_once(":\t").map(|(a, b)| (a.to_owned(), b.to_owned())).unwrap();
    text.lines().skip(1).map(line).collect()
}

/// What is expected of one volume's directory.
struct Look<'a> {
    status: &'a str,
    device: bool,
    problem: bool,
    /// Verbs that `control` allows; every other one has a reason.
    allowed: &'a [&'a str],
    /// The job's word.
    job: &'a str,
}

const ALL: [&str; 11] = [
    "attach",
    "detach",
    "resize",
    "snapshot",
    "revert",
    "delete-snapshot",
    "delete",
    "release",
    "move",
    "disk",
    "reconcile",
];

#[track_caller]
fn look(volfs: &Volfs, job: &str, uuid: &str, wanted: &Look<'_>) {
    let at = |file: &str| format!("{}/{file}", dir(job, uuid));
    let status = wanted.status;
    assert_eq!(volfs.value(at("status")), status, "{}", volfs.log());

    // device, block, incarnation, exports, devices: all or none.
    let exported: Vec<String> = fs::read_dir(volfs.path("exports"))
        .unwrap()
        .map(|e| e.unwrap().file_name().into_string().unwrap())
        .filter(|n| n.contains(uuid))
        .collect();
    if wanted.device {
        let device = volfs.value(at("device"));
        let name = device.strip_prefix("/dev/").unwrap();
        let number = fs::read_to_string(format!("/sys/block/{name}/dev")).unwrap();
        let said = volfs.ok(&format!("stat -c %Hr:%Lr $R/{}", at("block")));
        assert_eq!(said, number.trim());
        let seq = fs::read_to_string(format!("/sys/block/{name}/diskseq")).unwrap();
        assert!(volfs.value(at("incarnation")).ends_with(&format!(" {}", seq.trim())));
        assert_eq!(exported.len(), 1);
        let link = fs::read_link(volfs.path(format!("devices/{name}"))).unwrap();
        assert_eq!(link.to_str().unwrap(), format!("../{}", dir(job, uuid)));
    } else {
        assert_eq!(volfs.read(at("device")), Err(libc::ENODEV), "device while {status}");
        assert_eq!(volfs.read(at("incarnation")), Err(libc::ENODEV), "incarnation while {status}");
        assert!(!volfs.path(at("block")).exists(), "block while {status}");
        assert!(exported.is_empty(), "exports while {status}: {exported:?}");
    }

    // control: a line a verb.
    let said = verbs(volfs, &at("control"));
    let mut names: Vec<&str> = said.keys().map(String::as_str).collect();
    let mut all = ALL.to_vec();
    names.sort_unstable();
    all.sort_unstable();
    assert_eq!(names, all);
    for (verb, now) in &said {
        match wanted.allowed.contains(&verb.as_str()) {
            true => assert_eq!(now, "allowed", "{verb} while {status}"),
            false => assert!(now.starts_with("no: ") && now.len() > 20, "{verb} while {status}: {now}"),
        }
    }

    // problems, the job's counts, both tables, info.json.
    let problems = volfs.read("problems").unwrap();
    let row = problems.lines().find(|l| l.starts_with(&dir(job, uuid)) && l.split('\t').nth(2) == Some(status));
    assert_eq!(row.is_some(), wanted.problem, "{problems}");
    if let Some(row) = row {
        let cells: Vec<&str> = row.split('\t').collect();
        assert!(cells.len() == 5 && cells.iter().all(|c| c.len() > 3), "{row}");
    }
    let counts = volfs.value(format!("jobs/{job}/status"));
    assert_eq!(counts, format!("{} {status}=1", wanted.job));
    for table in ["table".to_owned(), format!("jobs/{job}/table")] {
        let text = volfs.read(&table).unwrap();
        let row: Vec<&str> = text.lines().find(|l| l.contains(uuid)).unwrap().split('\t').collect();
        assert_eq!(row.len(), 8);
        assert_eq!((row[0], row[4]), (job, status));
        assert_eq!(row[5].starts_with("/dev/"), wanted.device, "{row:?}");
    }
    let info: Value = serde_json::from_str(&volfs.read(at("info.json")).unwrap()).unwrap();
    assert_eq!(info["status"], status);
    assert_eq!(info["device"].is_object(), wanted.device);
    assert_eq!(info["uuid"], uuid);
    assert_eq!(volfs.value(format!("volumes/{uuid}/status")), status);
}

#[test]
fn v1_detached_shows_no_device_and_is_no_problem() {
    let volfs = Volfs::start_with(&[], QUIET);
    let uuid = &volfs.job("a", &["d"], "1M")[0];
    let allowed = ["attach", "detach", "resize", "snapshot", "delete", "release", "move", "disk", "reconcile"];
    fs::create_dir(volfs.path("jobs/b")).unwrap();
    let wanted = Look { status: "detached", device: false, problem: false, allowed: &allowed, job: "idle" };
    look(&volfs, "a", uuid, &wanted);
    assert_eq!(of(&volfs, uuid, "vm"), "");

    let mut events = Listener::open(&volfs);
    volfs.ok("echo attach > $R/jobs/a/control; echo detach > $R/jobs/a/control");
    events.hear_status(&volfs, uuid, "attached");
    events.hear_status(&volfs, uuid, "detached");
    look(&volfs, "a", uuid, &wanted);
}

#[test]
fn v3_attached_serves_the_verified_device_also_while_the_cloud_is_away() {
    let volfs = Volfs::start_with(&[], QUIET);
    let uuid = &volfs.job("a", &["d"], "1M")[0];
    fs::create_dir(volfs.path("jobs/b")).unwrap();
    volfs.ok("echo attach > $R/jobs/a/control");
    let allowed = ["attach", "detach", "resize", "snapshot", "move", "disk", "reconcile"];
    let wanted = Look { status: "attached", device: true, problem: false, allowed: &allowed, job: "idle" };
    look(&volfs, "a", uuid, &wanted);
    let was = of(&volfs, uuid, "incarnation");

    fs::rename(volfs.state().join("loop"), volfs.state().join("away")).unwrap();
    assert_eq!(volfs.write("control", "reconcile"), libc::EHOSTUNREACH);
    look(&volfs, "a", uuid, &wanted);
    assert!(volfs.read("health").unwrap().starts_with("degraded\ncloud degraded: "));
    fs::rename(volfs.state().join("away"), volfs.state().join("loop")).unwrap();
    assert_eq!(volfs.write("control", "reconcile"), 0, "{}", volfs.log());
    assert_eq!(of(&volfs, uuid, "incarnation"), was);
    assert!(volfs.read("health").unwrap().starts_with("ok\n"));
}

#[test]
fn v3_attached_survives_a_restart_without_the_cloud() {
    let mut volfs = Volfs::start_with(&[], QUIET);
    let uuid = volfs.job("a", &["d"], "1M").remove(0);
    volfs.ok("echo attach > $R/jobs/a/control");
    let was = of(&volfs, &uuid, "incarnation");
    volfs.kill();
    volfs.set_env(&[("VOLFS_FAILPOINTS", "loop.unreachable=fail")]);
    volfs.launch();
    assert_eq!(of(&volfs, &uuid, "status"), "attached");
    assert_eq!(of(&volfs, &uuid, "incarnation"), was);
    assert!(of(&volfs, &uuid, "device").starts_with("/dev/loop"));
}

#[test]
fn v4_remote_names_its_vm_and_has_no_device_here() {
    let volfs = Volfs::start_with(&[], QUIET);
    let uuid = &volfs.job("a", &["d"], "1M")[0];
    fs::create_dir(volfs.path("jobs/b")).unwrap();
    let vm = volfs::model::VmId::random().to_string();
    let mut events = Listener::open(&volfs);
    volfs.ok(&format!("echo attach vm={vm} > $R/{}/control", dir("a", uuid)));
    events.hear_status(&volfs, uuid, "remote");
    let allowed = ["detach", "release", "move", "disk", "reconcile"];
    let wanted = Look { status: "remote", device: false, problem: false, allowed: &allowed, job: "idle" };
    look(&volfs, "a", uuid, &wanted);
    assert_eq!(of(&volfs, uuid, "vm"), vm);
    assert_eq!(of(&volfs, uuid, "device_id"), "1");
    assert!(volfs.read("jobs/a/table").unwrap().contains(&vm));
    assert_eq!(
        volfs.ok(&format!(
            "set -e; dd if=/dev/zero of=\"$(cat $R/{}/device)\" count=1 2>/dev/null || echo no",
            dir("a", uuid)
        )),
        "no"
    );
}

#[test]
fn v5_lost_when_the_device_went_while_the_cloud_says_attached() {
    let mut volfs = Volfs::start_with(&[], QUIET);
    let uuid = volfs.job("a", &["d"], "1M").remove(0);
    fs::create_dir(volfs.path("jobs/b")).unwrap();
    volfs.ok("echo attach > $R/jobs/a/control");
    volfs.kill();
    pull_all(&volfs);
    volfs.launch();
    volfs.until("a look", || of(&volfs, &uuid, "status") != "unknown");
    let allowed = ["attach", "detach", "release", "move", "disk", "reconcile"];
    let wanted = Look { status: "lost", device: false, problem: true, allowed: &allowed, job: "degraded" };
    look(&volfs, "a", &uuid, &wanted);
    // The way out that `problems` names.
    volfs.ok("echo detach > $R/jobs/a/control && echo attach > $R/jobs/a/control");
    assert!(of(&volfs, &uuid, "device").starts_with("/dev/loop"));
}

#[test]
fn v5_lost_is_told_as_an_event_and_attached_again_when_the_device_comes() {
    let volfs = Volfs::start_with(&[], QUIET);
    let uuid = &volfs.job("a", &["d"], "1M")[0];
    say_attached_here(&volfs, uuid);
    let mut events = Listener::open(&volfs);
    volfs.ok("echo reconcile > $R/control");
    events.hear_status(&volfs, uuid, "lost");
    assert_eq!(of(&volfs, uuid, "status"), "lost");
    let _bound = Bound::new(uuid, &stored(&volfs, uuid).join("data.img"));
    volfs.until("the device's own event", || of(&volfs, uuid, "status") == "attached");
    events.hear_status(&volfs, uuid, "attached");
}

#[test]
fn v6_missing_after_two_looks_that_agree() {
    let volfs = Volfs::start_with(&[("VOLFS_FAILPOINTS", "reconcile.no-gap=fail")], QUIET);
    let uuid = &volfs.job("a", &["d"], "1M")[0];
    fs::create_dir(volfs.path("jobs/b")).unwrap();
    fs::remove_dir_all(stored(&volfs, uuid)).unwrap();
    let mut events = Listener::open(&volfs);
    volfs.ok(&format!("echo reconcile > $R/{}/control", dir("a", uuid)));
    events.hear_status(&volfs, uuid, "unknown");
    events.hear_status(&volfs, uuid, "missing");
    let allowed = ["detach", "delete", "release", "move", "disk", "reconcile"];
    let wanted = Look { status: "missing", device: false, problem: true, allowed: &allowed, job: "degraded" };
    look(&volfs, "a", uuid, &wanted);
}

#[test]
fn v6_one_look_is_not_believed() {
    let volfs = Volfs::start_with(&[], QUIET);
    let uuid = &volfs.job("a", &["d"], "1M")[0];
    fs::remove_dir_all(stored(&volfs, uuid)).unwrap();
    let mut command = volfs.sh_spawn(&["dash"], &format!("echo reconcile > $R/{}/control", dir("a", uuid)));
    // The ten seconds of the gap are not waited for: the first look has said what it says.
    volfs.until("the first look", || of(&volfs, uuid, "status") != "detached");
    assert_eq!(of(&volfs, uuid, "status"), "unknown");
    command.kill().unwrap();
    command.wait().unwrap();
}

#[test]
fn v6_a_store_that_is_away_makes_nothing_missing() {
    let volfs = Volfs::start_with(&[("VOLFS_FAILPOINTS", "reconcile.no-gap=fail")], QUIET);
    let uuid = &volfs.job("a", &["d"], "1M")[0];
    fs::rename(volfs.state().join("loop"), volfs.state().join("away")).unwrap();
    fs::create_dir_all(volfs.state().join("loop/volumes")).unwrap();
    for _ in 0..3 {
        assert_eq!(volfs.write("control", "reconcile"), libc::EHOSTUNREACH);
    }
    assert_ne!(of(&volfs, uuid, "status"), "missing");
}

#[test]
fn v7_unknown_after_a_start_without_the_cloud() {
    let mut volfs = Volfs::start_with(&[], QUIET);
    let uuid = volfs.job("a", &["d"], "1M").remove(0);
    fs::create_dir(volfs.path("jobs/b")).unwrap();
    volfs.kill();
    volfs.set_env(&[("VOLFS_FAILPOINTS", "loop.unreachable=fail")]);
    volfs.launch();
    let wanted = Look { status: "unknown", device: false, problem: true, allowed: &ALL, job: "degraded" };
    look(&volfs, "a", &uuid, &wanted);
    assert_eq!(volfs.write(format!("{}/control", dir("a", &uuid)), "attach"), libc::EHOSTUNREACH);
    assert_eq!(volfs.write(format!("{}/control", dir("a", &uuid)), "reconcile"), libc::EHOSTUNREACH);
    assert_eq!(of(&volfs, &uuid, "status"), "unknown");

    volfs.kill();
    volfs.set_env(&[]);
    volfs.launch();
    volfs.until("the first round", || of(&volfs, &uuid, "status") == "detached");
}

#[test]
fn v7_unknown_after_an_operation_without_a_clear_answer() {
    let gate = Gate::new();
    let volfs = Volfs::start_with(&[("VOLFS_FAILPOINTS", &gate.wait("attach.journaled"))], QUIET);
    let uuid = &volfs.job("a", &["d"], "1M")[0];
    let held = gate.close();
    let mut events = Listener::open(&volfs);
    volfs.ok("echo attach nowait > $R/jobs/a/disks/d/control");
    assert_eq!(of(&volfs, uuid, "status"), "attaching");
    let id = running(&volfs, "attach");
    volfs.ok(&format!("echo abandon {id} > $R/control"));
    assert_eq!(of(&volfs, uuid, "status"), "unknown");
    events.hear_status(&volfs, uuid, "unknown");
    held.release();
    volfs.ok("echo reconcile > $R/jobs/a/disks/d/control");
    assert_eq!(of(&volfs, uuid, "status"), "detached");
}

#[test]
fn v8_conflict_with_another_owners_mark() {
    let volfs = Volfs::start_with(&[], QUIET);
    let uuid = &volfs.job("a", &["d"], "1M")[0];
    fs::create_dir(volfs.path("jobs/b")).unwrap();
    edit_meta(&volfs, uuid, |m| m["mark"] = FOREIGN.into());
    let mut events = Listener::open(&volfs);
    assert_eq!(volfs.write(format!("{}/control", dir("a", uuid)), "reconcile"), libc::EHOSTUNREACH);
    events.hear_status(&volfs, uuid, "conflict");
    let wanted =
        Look { status: "conflict", device: false, problem: true, allowed: &["release", "reconcile"], job: "degraded" };
    look(&volfs, "a", uuid, &wanted);
    assert_eq!(of(&volfs, uuid, "owner"), FOREIGN);
    assert!(volfs.read("problems").unwrap().contains(FOREIGN));
}

#[test]
fn v8_a_command_that_finds_another_mark_is_eperm_and_the_status_conflict() {
    let volfs = Volfs::start_with(&[], QUIET);
    let uuid = &volfs.job("a", &["d"], "1M")[0];
    edit_meta(&volfs, uuid, |m| m["mark"] = FOREIGN.into());
    assert_eq!(volfs.write(format!("{}/control", dir("a", uuid)), "attach"), libc::EPERM);
    assert_eq!(of(&volfs, uuid, "status"), "conflict");
    assert_eq!(of(&volfs, uuid, "owner"), FOREIGN);
    assert!(volfs.read(format!("{}/error", dir("a", uuid))).unwrap().contains(FOREIGN));
    assert!(volfs.loops().is_empty());
    assert_eq!(meta(&volfs, uuid)["attached"], Value::Null);
}

#[test]
fn v8_conflict_when_the_device_is_here_but_free_in_the_cloud() {
    let volfs = Volfs::start_with(&[], QUIET);
    let uuid = &volfs.job("a", &["d"], "1M")[0];
    let bound = Bound::new(uuid, &stored(&volfs, uuid).join("data.img"));
    volfs.until("the device's own event", || of(&volfs, uuid, "status") == "conflict");
    let wanted =
        Look { status: "conflict", device: false, problem: true, allowed: &["release", "reconcile"], job: "degraded" };
    look(&volfs, "a", uuid, &wanted);
    drop(bound);
    volfs.until("its end", || of(&volfs, uuid, "status") == "detached");
}

#[test]
fn v8_conflict_when_it_is_elsewhere_in_the_cloud() {
    let volfs = Volfs::start_with(&[], QUIET);
    let uuid = &volfs.job("a", &["d"], "1M")[0];
    volfs.ok("echo attach > $R/jobs/a/control");
    let other = volfs::model::VmId::random().to_string();
    edit_meta(&volfs, uuid, |m| m["attached"]["vm"] = other.clone().into());
    assert_ne!(volfs.write(format!("{}/control", dir("a", uuid)), "reconcile"), 0);
    assert_eq!(of(&volfs, uuid, "status"), "conflict");
    assert_eq!(volfs.read(format!("{}/device", dir("a", uuid))), Err(libc::ENODEV));
}

#[test]
fn v8_conflict_of_two_devices_with_one_identity() {
    let volfs = Volfs::start_with(&[], QUIET);
    let uuid = &volfs.job("a", &["d"], "1M")[0];
    volfs.ok("echo attach > $R/jobs/a/control");
    let copy = volfs.scratch("copy");
    fs::File::create(&copy).unwrap().set_len(1 << 20).unwrap();
    let bound = Bound::new(uuid, &copy);
    volfs.until("the device's own event", || of(&volfs, uuid, "status") == "conflict");
    let wanted =
        Look { status: "conflict", device: false, problem: true, allowed: &["release", "reconcile"], job: "degraded" };
    look(&volfs, "a", uuid, &wanted);
    assert!(volfs.read("problems").unwrap().contains(&format!("/dev/{}", bound.name)));
    drop(bound);
    volfs.until("the one device again", || of(&volfs, uuid, "status") == "attached");
}

#[test]
fn v8_conflict_when_the_size_is_wrong() {
    let volfs = Volfs::start_with(&[], QUIET);
    let uuid = &volfs.job("a", &["d"], "1M")[0];
    say_attached_here(&volfs, uuid);
    let copy = volfs.scratch("copy");
    fs::File::create(&copy).unwrap().set_len(2 << 20).unwrap();
    let _bound = Bound::new(uuid, &copy);
    assert_ne!(volfs.write(format!("{}/control", dir("a", uuid)), "reconcile"), 0);
    assert_eq!(of(&volfs, uuid, "status"), "conflict");
    assert!(volfs.read("problems").unwrap().contains("2097152"));
}

/// The in-flight words: a failpoint that holds the operation, the command, the word.
fn in_flight(point: &str, before: &[&str], command: &str, word: &str, device: bool) {
    let gate = Gate::new();
    let volfs = Volfs::start_with(&[("VOLFS_FAILPOINTS", &gate.wait(point))], QUIET);
    let uuid = &volfs.job("a", &["d"], "1M")[0];
    let control = format!("{}/control", dir("a", uuid));
    for command in before {
        assert_eq!(volfs.write(&control, command), 0, "{}", volfs.log());
    }
    let held = gate.close();
    let mut events = Listener::open(&volfs);
    let command = command.replace("UUID", uuid);
    let waiter = volfs.sh_spawn(&["dash"], &format!("echo {command} > $R/{control}"));
    events.hear_status(&volfs, uuid, word);
    let wanted = Look { status: word, device, problem: false, allowed: &[], job: "busy" };
    // The very command is the one that may be repeated: `control` counts it as allowed when equal.
    let verb = command.split(' ').next().unwrap();
    let equal = [verb];
    let listed = if ["attach", "detach", "delete"].contains(&verb) { &equal[..] } else { &[] };
    look(&volfs, "a", uuid, &Look { allowed: listed, ..wanted });
    let info: Value = serde_json::from_str(&volfs.read(format!("{}/info.json", dir("a", uuid))).unwrap()).unwrap();
    assert_eq!(info["operation"]["operation"], verb);
    assert!(info["operation"]["step"].as_str().is_some_and(|s| !s.is_empty()));
    held.release();
    let said = crate::common::finish(waiter);
    assert_eq!(said.status, 0, "{said:?}\n{}", volfs.log());
}

#[test]
fn v2_attaching_has_no_device_yet() {
    in_flight("attach.after-call", &[], "attach", "attaching", false);
}

#[test]
fn v2_detaching_has_withdrawn_the_device_from_the_first_moment() {
    in_flight("detach.journaled", &["attach"], "detach", "detaching", false);
}

#[test]
fn v2_resizing_a_detached_volume_has_no_device() {
    in_flight("resize.before-call", &[], "resize 2M", "resizing", false);
}

#[test]
fn v2_resizing_an_attached_volume_keeps_the_device() {
    in_flight("resize.before-call", &["attach"], "resize 2M", "resizing", true);
}

#[test]
fn v2_deleting_has_no_device() {
    in_flight("delete.before-call", &[], "delete UUID", "deleting", false);
}

#[test]
fn v2_creating_shows_in_the_job_the_operations_and_as_a_row_without_uuid() {
    let gate = Gate::new();
    let volfs = Volfs::start_with(&[("VOLFS_FAILPOINTS", &gate.wait("create.before-call"))], QUIET);
    fs::create_dir(volfs.path("jobs/a")).unwrap();
    let held = gate.close();
    let waiter = volfs.sh_spawn(&["dash"], "echo create d 1M > $R/jobs/a/control");
    volfs.until("creating", || volfs.value("jobs/a/status") == "busy creating=1");
    for table in ["table", "jobs/a/table"] {
        let text = volfs.read(table).unwrap();
        assert_eq!(text.lines().nth(1), Some("a\td\t-\t-\tcreating\t-\t-\t-"), "{text}");
    }
    let id = running(&volfs, "create d");
    let op: Value = serde_json::from_str(&volfs.read(format!("operations/{id}")).unwrap()).unwrap();
    assert_eq!((op["job"].as_str(), op["disk"].as_str()), (Some("a"), Some("d")));
    assert_eq!(volfs.ok("ls $R/jobs/a/disks $R/jobs/a/volumes | grep -v : || true"), "");
    held.release();
    assert_eq!(crate::common::finish(waiter).status, 0);
    assert_eq!(volfs.value("jobs/a/status"), "idle detached=1");
}

#[test]
fn v1_a_failed_attach_is_no_status_and_error_says_why() {
    let volfs = Volfs::start_with(&[("VOLFS_FAILPOINTS", "loop.attach.before=fail")], QUIET);
    let uuid = &volfs.job("a", &["d"], "1M")[0];
    assert_ne!(volfs.write(format!("{}/control", dir("a", uuid)), "attach"), 0);
    assert_eq!(of(&volfs, uuid, "status"), "detached");
    let error = volfs.read(format!("{}/error", dir("a", uuid))).unwrap();
    assert!(error.contains(" attach pid ") && error.contains("loop.attach.before"), "{error}");
}

#[test]
fn v5_v8_devices_of_others_that_come_and_go_pile_up_no_looks() {
    let volfs = Volfs::start_with(&[], QUIET);
    let uuids = volfs.job("a", &["d0", "d1", "d2", "d3", "d4", "d5", "d6", "d7", "d8", "d9"], "1M");
    for (n, uuid) in uuids.iter().enumerate() {
        match n % 2 {
            0 => say_attached_here(&volfs, uuid),
            _ => edit_meta(&volfs, uuid, |m| m["mark"] = FOREIGN.into()),
        }
    }
    assert_eq!(volfs.write("control", "reconcile"), libc::EHOSTUNREACH);
    assert_eq!(volfs.value("jobs/a/status"), "degraded lost=5 conflict=5");
    let other = volfs.scratch("other");
    fs::File::create(&other).unwrap().set_len(1 << 20).unwrap();
    let mut most = 0;
    for _ in 0..40 {
        drop(Bound::new("00000000-0000-4000-8000-00000000000f", &other));
        most = most.max(fs::read_dir(format!("/proc/{}/task", volfs.pid())).unwrap().count());
    }
    assert!(most < 100, "{most} threads for events that concern none of its volumes");
}

#[test]
fn v1_v2_v3_each_change_of_status_is_recorded_and_held_against_the_graph() {
    use volfs::model::Status::{Attached, Attaching, Detached, Detaching};
    let mut volfs = Volfs::start_with(&[], QUIET);
    let uuid = volfs.job("j", &["d"], "1M").remove(0);
    let control = format!("{}/control", dir("j", &uuid));
    assert_eq!(volfs.write(&control, "attach"), 0, "{}", volfs.log());
    volfs.kill();
    volfs.launch();
    assert_eq!(volfs.write(&control, "detach"), 0, "{}", volfs.log());
    let edges = volfs.edges();
    let at = |edge| edges.iter().position(|e| *e == edge).unwrap_or_else(|| panic!("{edge:?} is not in {edges:?}"));
    let path = [(Detached, Attaching), (Attaching, Attached), (Attached, Detaching), (Detaching, Detached)].map(at);
    assert!(path.is_sorted(), "{edges:?}");
}
