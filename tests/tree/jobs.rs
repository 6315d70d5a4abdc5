//! C11 and C12: the commands of a whole job, through the tree.

use std::fs::File;

use libc::{EBUSY, EINVAL, ENODEV, EPERM};
use serde_json::Value;

use crate::bring::*;
use crate::commands::*;
use crate::common::{Volfs, finish};

// C11

#[test]
fn c11_a_jobs_attach_and_detach_do_all_its_volumes() {
    let volfs = quiet();
    let uuids = volfs.job("a", &["d", "e", "f"], "1M");
    let other = &volfs.job("b", &["d"], "1M")[0];
    let there = vm();
    assert_eq!(volfs.write("jobs/a/control", "attach"), 0);
    assert_eq!(volfs.value("jobs/a/status"), "idle attached=3");
    assert_eq!(volfs.write("jobs/a/control", "attach"), 0, "again");
    assert_eq!(of(&volfs, other, "status"), "detached");
    assert_eq!(volfs.write("jobs/a/control", "detach"), 0);
    assert_eq!(volfs.write("jobs/a/control", &format!("attach vm={there}")), 0);
    assert_eq!(volfs.value("jobs/a/status"), "idle remote=3");
    assert_eq!(volfs.write("jobs/a/control", "detach"), 0);
    assert_eq!(volfs.value("jobs/a/status"), "idle remote=3", "they are on another VM");
    assert_eq!(volfs.write("jobs/a/control", &format!("detach vm={there}")), 0);
    assert_eq!(volfs.value("jobs/a/status"), "idle detached=3");
    assert_eq!(volfs.write("jobs/a/control", "attach root"), EINVAL);
    assert_eq!(volfs.write("jobs/a/control", "detach force"), EINVAL);
    assert_eq!(uuids.len(), 3);
    // An empty job has nothing to do.
    job(&volfs, "c");
    assert_eq!(volfs.write("jobs/c/control", "attach"), 0);
}

#[test]
fn c11_all_are_tried_and_the_first_failing_disk_by_name_gives_the_errno() {
    let volfs = quiet();
    // Created in another order than that of their names.
    let uuids = volfs.job("a", &["zz", "mm", "bb", "aa"], "1M");
    assert_eq!(volfs.write("jobs/a/control", "attach"), 0);
    let block = File::open(volfs.path(format!("volumes/{}/block", uuids[1]))).unwrap();
    edit_meta(&volfs, &uuids[2], |m| m["mark"] = FOREIGN.into());
    assert_eq!(volfs.write("jobs/a/control", "detach"), EPERM, "that of bb, not that of mm");
    let error = volfs.read("jobs/a/error").unwrap();
    let lines: Vec<&str> = error.lines().collect();
    assert_eq!(lines.len(), 2, "{error}");
    assert!(lines[0].contains(" detach pid ") && lines[0].contains("bb: ") && lines[0].contains(FOREIGN), "{error}");
    assert!(lines[1].contains("mm: ") && lines[1].contains(&format!("pid {}", std::process::id())), "{error}");
    assert_eq!(of(&volfs, &uuids[0], "status"), "detached");
    assert_eq!(of(&volfs, &uuids[3], "status"), "detached");
    assert_eq!(of(&volfs, &uuids[1], "status"), "attached");
    assert_eq!(of(&volfs, &uuids[2], "status"), "conflict");
    drop(block);
    let mark = of(&volfs, &uuids[0], "owner");
    let (record, _) = mark.rsplit_once('/').unwrap();
    let ours = serde_json::from_str::<Value>(&volfs.read(format!("volumes/{}/info.json", uuids[2])).unwrap()).unwrap();
    assert!(ours["mark"].as_str().unwrap().starts_with(record));
    edit_meta(&volfs, &uuids[2], |m| m["mark"] = ours["mark"].clone());
    done(&volfs, &uuids[2], "reconcile");
    assert_eq!(volfs.write("jobs/a/control", "detach"), 0, "{}", volfs.log());
    assert_eq!(volfs.read("jobs/a/error").unwrap(), "\n");
}

#[test]
fn c11_the_set_is_fixed_at_the_start() {
    let (volfs, gate) = gated("attach.before-call");
    let uuids = volfs.job("a", &["d"], "1M");
    let held = gate.close();
    let waiter = volfs.sh_spawn(&["dash"], "echo attach > $R/jobs/a/control");
    volfs.until("attaching", || of(&volfs, &uuids[0], "status") == "attaching");
    assert_eq!(volfs.value("jobs/a/status"), "busy attaching=1");
    assert_eq!(volfs.write("jobs/a/control", "create e 1M"), EBUSY, "the job is busy with its set");
    held.release();
    assert_eq!(finish(waiter).status, 0);
    assert_eq!(volfs.value("jobs/a/status"), "idle attached=1");
}

// C12

#[test]
fn c12_destroy_detaches_deletes_and_forgets() {
    let volfs = quiet();
    let uuids = volfs.job("a", &["d", "e", "f"], "1M");
    let others = volfs.job("b", &["d"], "1M");
    assert_eq!(volfs.write("jobs/a/control", "attach"), 0);
    assert_eq!(volfs.write("jobs/b/control", "attach"), 0);
    for wrong in ["destroy", "destroy b", "destroy A", "destroy a b"] {
        assert_eq!(volfs.write("jobs/a/control", wrong), EINVAL, "{wrong}");
    }
    assert_eq!(volfs.write("jobs/a/control", "destroy a"), 0, "{}", volfs.log());
    assert_eq!(volfs.ok("ls $R/jobs"), "b");
    for uuid in &uuids {
        assert!(!volfs.path(format!("volumes/{uuid}")).exists());
        assert!(!stored(&volfs, uuid).exists());
    }
    assert_eq!(of(&volfs, &others[0], "status"), "attached", "another job's volume");
    assert_eq!(volfs.loops().len(), 1);
    let history = volfs.read("history").unwrap();
    assert!(history.lines().any(|l| l.contains("\tdestroy\ta\t") && l.contains("\tdone\t")), "{history}");
}

#[test]
fn c12_a_volume_in_use_stops_it_before_anything() {
    let volfs = quiet();
    let uuids = volfs.job("a", &["d", "e", "f"], "1M");
    assert_eq!(volfs.write("jobs/a/control", "attach"), 0);
    let was: Vec<String> = uuids.iter().map(|u| of(&volfs, u, "incarnation")).collect();
    let user = File::open(volfs.path(format!("volumes/{}/block", uuids[2]))).unwrap();
    assert_eq!(volfs.write("jobs/a/control", "destroy a"), EBUSY);
    let error = volfs.read("jobs/a/error").unwrap();
    assert!(error.contains("f: ") && error.contains(&format!("pid {}", std::process::id())), "{error}");
    let is: Vec<String> = uuids.iter().map(|u| of(&volfs, u, "incarnation")).collect();
    assert_eq!(was, is, "nothing was detached");
    drop(user);
    assert_eq!(volfs.write("jobs/a/control", "destroy a"), 0, "{}", volfs.log());
}

#[test]
fn c12_it_reserves_its_volumes_and_the_job() {
    let (volfs, gate) = gated("destroy.journaled");
    let uuids = volfs.job("a", &["d", "e"], "1M");
    job(&volfs, "b");
    done(&volfs, &uuids[0], "attach");
    let held = gate.close();
    let waiter = volfs.sh_spawn(&["dash"], "echo destroy a > $R/jobs/a/control");
    let id = running(&volfs, "destroy a");
    for uuid in &uuids {
        for command in ["attach", "detach", "move b", "disk x", "resize 2M", &format!("release {uuid}")] {
            assert_eq!(tell(&volfs, uuid, command), EBUSY, "{command}");
        }
    }
    for command in ["create x 1M", "attach", "move b"] {
        assert_eq!(volfs.write("jobs/a/control", command), EBUSY, "{command}");
    }
    assert_eq!(volfs.read(format!("volumes/{}/device", uuids[0])), Err(ENODEV), "withdrawn: it will be deleted");
    // The equal one joins.
    let second = volfs.sh_spawn(&["dash"], "echo destroy a > $R/jobs/a/control");
    let op = || serde_json::from_str::<Value>(&volfs.read(format!("operations/{id}")).unwrap()).unwrap();
    volfs.until("the second caller", || op()["callers"] == 2);
    held.release();
    assert_eq!(finish(waiter).status, 0, "{}", volfs.log());
    assert_eq!(finish(second).status, 0);
}

/// A destroy of three detached volumes held before the deletion of its first.
fn half_destroyed(stop: impl FnOnce(&Volfs, &mut std::process::Child)) {
    let (volfs, gate) = gated("delete.before-call");
    let uuids = volfs.job("a", &["d", "e", "f"], "1M");
    let held = gate.close();
    let mut waiter = volfs.sh_spawn(&["bash"], "echo destroy a > $R/jobs/a/control");
    volfs.until("the first deletion", || of(&volfs, &uuids[0], "status") == "deleting");
    running(&volfs, "delete");
    stop(&volfs, &mut waiter);
    held.release();
    let said = finish(waiter);
    assert_ne!(said.status, 0, "{said:?}");
    volfs.until("the end of the destroy", || volfs.value("jobs/a/status") == "idle detached=2");
    assert!(!stored(&volfs, &uuids[0]).exists(), "the one that was being deleted is");
    assert!(stored(&volfs, &uuids[1]).exists() && stored(&volfs, &uuids[2]).exists());
    assert_eq!(volfs.ok("ls $R/jobs/a/disks"), "e\nf", "nothing is forgotten that still exists");
    // What is left can be used, and repeating finishes.
    done(&volfs, &uuids[1], "attach");
    assert_eq!(volfs.write("jobs/a/control", "destroy a"), 0, "{}", volfs.log());
    assert_eq!(volfs.ok("ls $R/jobs"), "");
}

#[test]
fn c12_cancel_stops_it_before_the_next_volume_and_repeating_finishes() {
    half_destroyed(|volfs, _| assert_eq!(volfs.write("jobs/a/control", "cancel"), 0));
}

#[test]
fn c12_a_signal_to_its_caller_stops_it_before_the_next_volume() {
    half_destroyed(|volfs, waiter| {
        waiter.kill().unwrap();
        waiter.wait().unwrap();
        volfs.until("the interruption", || volfs.read("jobs/a/error").unwrap().contains("interrupted"));
    });
}

#[test]
fn c12_an_empty_job_is_forgotten_and_cancel_without_one_is_success() {
    let volfs = quiet();
    job(&volfs, "a");
    assert_eq!(volfs.write("jobs/a/control", "cancel"), 0);
    assert_eq!(volfs.write("jobs/a/control", "destroy a"), 0);
    assert!(!volfs.path("jobs/a").exists());
}

#[test]
fn c12_a_failed_deletion_keeps_the_rest_and_the_job() {
    let mut volfs = quiet();
    let uuids = volfs.job("a", &["d", "e"], "1M");
    volfs.terminate();
    volfs.set_env(&[("VOLFS_FAILPOINTS", "loop.delete.before=fail")]);
    volfs.launch();
    volfs.until("a look", || volfs.value("jobs/a/status") == "idle detached=2");
    assert_ne!(volfs.write("jobs/a/control", "destroy a"), 0);
    assert!(volfs.read("jobs/a/error").unwrap().contains("d: "));
    assert_eq!(volfs.value("jobs/a/status"), "idle detached=2");
    assert!(uuids.iter().all(|u| stored(&volfs, u).exists()));
}
