//! Snapshots over the cloud: of one volume, of a job as one set, and those that somebody else took.

use fakecloud::{Fault, Kind, Moment};

use crate::common;
use crate::site::Site;

const ENOENT: i32 = 2;
const EBUSY: i32 = 16;
const EEXIST: i32 = 17;
const ENOTEMPTY: i32 = 39;

/// Disks that have been attached once, with their own name as first bytes: one that was never on
/// storage has no snapshot.
fn written(site: &Site, job: &str, disks: &[&str]) -> Vec<String> {
    let ids = site.job(job, disks, "1G");
    assert_eq!(site.volfs.write(format!("jobs/{job}/control"), "attach"), 0, "{}", site.volfs.log());
    for disk in disks {
        write(site, job, disk, disk);
    }
    assert_eq!(site.volfs.write(format!("jobs/{job}/control"), "detach"), 0, "{}", site.volfs.log());
    ids
}

fn write(site: &Site, job: &str, disk: &str, text: &str) {
    site.volfs
        .ok(&format!("printf %-8s {text} | dd of=$R/jobs/{job}/disks/{disk}/block conv=notrunc,fsync status=none"));
}

/// The first bytes, as the volume's file has them.
fn bytes(site: &Site, id: &str) -> String {
    use std::io::Read;
    let mut first = [0; 8];
    std::fs::File::open(site.cloud.file(id)).unwrap().read_exact(&mut first).unwrap();
    String::from_utf8_lossy(&first).trim_end().to_owned()
}

fn job(site: &Site, command: &str) -> i32 {
    site.volfs.write("jobs/j/control", command)
}

fn live(site: &Site) -> usize {
    site.cloud.snapshots().iter().filter(|s| s.state == "BackedUp").count()
}

#[test]
fn c6_a_volume_goes_back_to_its_snapshot_and_only_its_own_command_deletes_that() {
    let mut site = Site::start();
    let id = written(&site, "j", &["d"]).remove(0);
    assert_eq!(site.disk("j", "d", "snapshot before"), 0, "{}", site.volfs.log());
    assert_eq!(site.disk("j", "d", "snapshot before"), EEXIST);
    assert_eq!((site.cloud.calls("createSnapshot"), live(&site)), (1, 1));
    let shown: serde_json::Value =
        serde_json::from_str(&site.volfs.read("jobs/j/disks/d/snapshots/before").unwrap()).unwrap();
    assert_eq!((&shown["ours"], &shown["state"]), (&true.into(), &"BackedUp".into()), "{shown}");
    assert_eq!(site.disk("j", "d", "attach"), 0);
    assert_eq!(site.disk("j", "d", "revert before"), EBUSY, "only while detached");
    write(&site, "j", "d", "changed");
    assert_eq!(site.disk("j", "d", "detach"), 0);
    assert_eq!(bytes(&site, &id), "changed");
    // The record knows them over a crash.
    site.volfs.kill();
    site.volfs.launch();
    assert_eq!(site.disk("j", "d", "revert other"), ENOENT);
    assert_eq!(site.disk("j", "d", "revert before"), 0, "{}", site.volfs.log());
    assert_eq!(bytes(&site, &id), "d");
    assert_eq!(live(&site), 1, "a revert keeps it");
    assert_eq!(site.disk("j", "d", &format!("delete {id}")), ENOTEMPTY);
    assert_eq!(site.disk("j", "d", &format!("release {id}")), ENOTEMPTY);
    assert_eq!(job(&site, "destroy j"), ENOTEMPTY);
    assert_eq!(site.disk("j", "d", "delete-snapshot before"), 0, "{}", site.volfs.log());
    assert_eq!(live(&site), 0);
    assert_eq!(site.volfs.ok("ls $R/jobs/j/disks/d/snapshots"), "");
    assert_eq!(job(&site, "destroy j"), 0, "{}", site.volfs.log());
}

#[test]
fn c6_a_jobs_snapshot_is_one_set_or_none() {
    let site = Site::start();
    let ids = written(&site, "j", &["a", "b", "c"]);
    let text = "Failed to create snapshot";
    let fails = Kind::JobFails { at: Moment::Working, code: 530, text: text.into() };
    site.cloud.fault(Fault::new("createSnapshot", fails).skip(1));
    assert_ne!(job(&site, "snapshot set"), 0);
    assert_eq!(live(&site), 0, "those that were taken are deleted again: {:?}", site.cloud.snapshots());
    assert!(site.volfs.read("jobs/j/error").unwrap().contains(text));
    assert_eq!(job(&site, "snapshot set"), 0, "{}", site.volfs.log());
    assert_eq!(live(&site), 3);
    assert_eq!(job(&site, "attach"), 0);
    for disk in ["a", "b", "c"] {
        write(&site, "j", disk, "changed");
    }
    assert_eq!(job(&site, "detach"), 0);
    assert_eq!(job(&site, "revert set"), 0, "{}", site.volfs.log());
    assert_eq!(ids.iter().map(|id| bytes(&site, id)).collect::<Vec<_>>(), ["a", "b", "c"]);
    // One is missing: nothing begins.
    assert_eq!(site.disk("j", "b", "delete-snapshot set"), 0);
    let reverts = site.cloud.calls("revertSnapshot");
    assert_eq!(job(&site, "revert set"), ENOENT);
    assert_eq!(site.cloud.calls("revertSnapshot"), reverts);
    assert!(site.volfs.read("jobs/j/error").unwrap().contains("b: "));
    assert_eq!(job(&site, "delete-snapshot set"), 0, "where it is; {}", site.volfs.log());
    assert_eq!(live(&site), 0);
}

#[test]
fn predecessor_102_a_failed_revert_keeps_its_snapshot() {
    let site = Site::start();
    let id = written(&site, "j", &["d"]).remove(0);
    assert_eq!(site.disk("j", "d", "snapshot before"), 0);
    assert_eq!(site.disk("j", "d", "attach"), 0);
    write(&site, "j", "d", "changed");
    assert_eq!(site.disk("j", "d", "detach"), 0);
    let refuses = Kind::JobFails { at: Moment::Working, code: 530, text: "revert is not possible".into() };
    site.cloud.fault(Fault::new("revertSnapshot", refuses));
    let said = site.volfs.sh("set -e; echo revert before > $R/jobs/j/disks/d/control; echo delete-snapshot before > $R/jobs/j/disks/d/control");
    assert_ne!(said.status, 0);
    assert_eq!((live(&site), bytes(&site, &id).as_str()), (1, "changed"));
    assert_eq!(site.disk("j", "d", "revert before"), 0);
    assert_eq!(bytes(&site, &id), "d");
}

#[test]
fn another_snapshot_that_runs_is_waited_for_and_a_foreign_one_is_shown_and_never_touched() {
    let site = Site::start();
    let id = written(&site, "j", &["d"]).remove(0);
    let running = site.cloud.start_snapshot(&id).unwrap();
    let taking = site.volfs.sh_spawn(&["dash"], "echo snapshot ours > $R/jobs/j/disks/d/control");
    site.volfs.until("words for what it waits for", || {
        let shown = site.volfs.read("jobs/j/disks/d/info.json").unwrap();
        shown.contains("for now")
    });
    site.cloud.end_snapshot(&running).unwrap();
    assert_eq!(common::finish(taking).status, 0, "{}", site.volfs.log());
    assert_eq!(site.disk("j", "d", "reconcile"), 0);
    assert_eq!(site.volfs.ok("ls $R/jobs/j/disks/d/snapshots"), "ours\nscheduled");
    let foreign = site.volfs.read("jobs/j/disks/d/snapshots/scheduled").unwrap();
    assert!(foreign.contains("\"ours\":false") || foreign.contains("\"ours\": false"), "{foreign}");
    assert_eq!(site.disk("j", "d", "revert scheduled"), ENOENT);
    assert_eq!(site.disk("j", "d", "delete-snapshot scheduled"), ENOENT);
    assert_eq!(job(&site, "delete-snapshot ours"), 0);
    assert_eq!(live(&site), 1, "the foreign one stays");
}

#[test]
fn a_snapshot_whose_answer_was_lost_is_found_again_and_never_taken_twice() {
    for fault in [Kind::DropAfter, Kind::ServerRestart(Moment::Closing), Kind::JobLost] {
        let site = Site::start();
        written(&site, "j", &["d"]);
        site.cloud.fault(Fault::new("createSnapshot", fault.clone()));
        assert_eq!(site.disk("j", "d", "snapshot s"), 0, "{fault:?}\n{}", site.volfs.log());
        assert_eq!((live(&site), site.cloud.calls("createSnapshot")), (1, 1), "{fault:?}");
    }
}

/// Killed at each step; the next start settles it, and the repeated command tells the truth.
#[test]
fn crash_of_a_snapshots_commands_is_settled_at_the_next_start() {
    for (point, verb, happened) in [
        ("snapshot.before-call", "snapshot", false),
        ("snapshot.after-call", "snapshot", true),
        ("revert.before-call", "revert", false),
        ("revert.after-call", "revert", true),
        ("delete-snapshot.before-call", "delete-snapshot", false),
        ("delete-snapshot.after-call", "delete-snapshot", true),
    ] {
        let mut site = Site::start();
        let id = written(&site, "j", &["d"]).remove(0);
        if verb != "snapshot" {
            assert_eq!(site.disk("j", "d", "snapshot s"), 0);
            assert_eq!(site.disk("j", "d", "attach"), 0);
            write(&site, "j", "d", "changed");
            assert_eq!(site.disk("j", "d", "detach"), 0);
        }
        site.volfs.terminate();
        site.volfs.set_env(&[("VOLFS_FAILPOINTS", &format!("{point}=kill"))]);
        site.volfs.launch();
        assert_ne!(site.disk("j", "d", &format!("{verb} s")), 0, "{point}");
        site.volfs.kill();
        site.volfs.set_env(&[]);
        site.volfs.launch();
        site.volfs.until("an end", || site.value("j", "d", "status") == "detached");
        let there = if verb == "snapshot" { happened } else { verb == "revert" || !happened };
        assert_eq!(live(&site), usize::from(there), "{point}");
        assert_eq!(site.volfs.path("jobs/j/disks/d/snapshots/s").exists(), there, "{point}");
        let again = site.disk("j", "d", &format!("{verb} s"));
        let expected = match (verb, happened) {
            ("snapshot", true) => EEXIST,
            ("delete-snapshot", true) => ENOENT,
            _ => 0,
        };
        assert_eq!(again, expected, "{point}\n{}", site.volfs.log());
        assert_eq!(bytes(&site, &id), if verb == "delete-snapshot" { "changed" } else { "d" }, "{point}");
        assert!(site.cloud.snapshots().len() <= 1, "{point}: never twice");
    }
}
