//! C4 to C10, C13, C14 and waiting: every sentence of the table of commands, through the tree.

use std::fs::{self, File, OpenOptions};
use std::io::Write;
use std::os::unix::fs::OpenOptionsExt;

use libc::{EBUSY, EEXIST, EHOSTUNREACH, EINVAL, ENODEV, ENOENT, ENOTEMPTY, EPERM, ETIMEDOUT};
use serde_json::{Value, json};

use crate::bring::*;
use crate::commands::*;
use crate::common::{PATIENCE, Volfs, finish};

// C4

#[test]
fn c4_detach_refuses_an_open_device_and_puts_everything_back() {
    let volfs = quiet();
    let uuid = &volfs.job("a", &["d"], "1M")[0];
    done(&volfs, uuid, "attach");
    let was = of(&volfs, uuid, "incarnation");
    let mut user = volfs.sh_spawn(&["dash"], &format!("exec 9> $R/volumes/{uuid}/block; echo open; exec sleep 1000"));
    let mut line = [0; 5];
    std::io::Read::read_exact(user.stdout.as_mut().unwrap(), &mut line).unwrap();
    assert_eq!(tell(&volfs, uuid, "detach"), EBUSY);
    let error = error_of(&volfs, uuid);
    assert!(error.contains(&format!("(pid {})", user.id())) && error.contains("sleep"), "{error}");
    assert_eq!(of(&volfs, uuid, "status"), "attached");
    assert_eq!(of(&volfs, uuid, "incarnation"), was);
    assert!(volfs.path(format!("volumes/{uuid}/block")).exists());
    assert!(volfs.path(format!("exports/{uuid}")).exists());
    user.kill().unwrap();
    user.wait().unwrap();
    done(&volfs, uuid, "detach");
    assert!(volfs.loops().is_empty(), "done when the node is gone");
    assert_eq!(error_of(&volfs, uuid), "\n", "a success of the same verb clears it");
}

#[test]
fn c4_data_written_before_the_detach_is_in_the_volume() {
    let volfs = quiet();
    let uuid = &volfs.job("a", &["d"], "1M")[0];
    done(&volfs, uuid, "attach");
    volfs.ok(&format!("printf 'no fsync here' | dd of=$R/volumes/{uuid}/block conv=notrunc status=none"));
    done(&volfs, uuid, "detach");
    let data = fs::read(stored(&volfs, uuid).join("data.img")).unwrap();
    assert!(data.starts_with(b"no fsync here"));
}

#[test]
fn c4_a_failed_flush_is_eio_and_it_stays_attached() {
    let volfs = Volfs::start_with(&[("VOLFS_FAILPOINTS", "devices.flush=fail")], QUIET);
    let uuid = &volfs.job("a", &["d"], "1M")[0];
    done(&volfs, uuid, "attach");
    assert_eq!(tell(&volfs, uuid, "detach"), libc::EIO);
    assert_eq!(of(&volfs, uuid, "status"), "attached");
    assert!(of(&volfs, uuid, "device").starts_with("/dev/loop"));
}

#[test]
fn c4_detach_from_a_running_vm_is_ebusy_unless_forced() {
    let volfs = quiet();
    let uuid = &volfs.job("a", &["d"], "1M")[0];
    let there = vm();
    done(&volfs, uuid, &format!("attach vm={there}"));
    let file = volfs.state().join(format!("loop/vms/{there}.json"));
    fs::write(&file, "{\"running\":true}").unwrap();
    assert_eq!(tell(&volfs, uuid, &format!("detach vm={there}")), EBUSY);
    assert!(error_of(&volfs, uuid).contains(&format!("VM {there} is running")));
    assert_eq!(of(&volfs, uuid, "status"), "remote");
    let forced = || volfs.ok("sed -n 's/^volfs_forced_detaches_total //p' $R/metrics");
    assert_eq!(forced(), "0");
    done(&volfs, uuid, &format!("detach vm={there} force"));
    assert_eq!(of(&volfs, uuid, "status"), "detached");
    assert_eq!(forced(), "1");

    done(&volfs, uuid, &format!("attach vm={there}"));
    fs::write(&file, "{\"running\":false}").unwrap();
    done(&volfs, uuid, &format!("detach vm={there}"));
}

#[test]
fn c4_a_vm_that_cannot_be_told_to_be_stopped_keeps_its_disk() {
    let volfs = quiet();
    let uuid = &volfs.job("a", &["d"], "1M")[0];
    let there = vm();
    done(&volfs, uuid, &format!("attach vm={there}"));
    fs::write(volfs.state().join(format!("loop/vms/{there}.json")), "not json").unwrap();
    assert_ne!(tell(&volfs, uuid, &format!("detach vm={there}")), 0);
    assert_eq!(of(&volfs, uuid, "status"), "remote");
    assert_eq!(meta(&volfs, uuid)["attached"]["vm"], there);
}

#[test]
fn c4_force_here_is_ebusy_with_loop_and_changes_nothing() {
    let volfs = quiet();
    let uuids = volfs.job("a", &["d", "e"], "1M");
    done(&volfs, &uuids[0], "attach");
    assert_eq!(tell(&volfs, &uuids[0], "detach force"), EBUSY);
    assert_eq!(of(&volfs, &uuids[0], "status"), "attached");
    say_attached_here(&volfs, &uuids[1]);
    done(&volfs, &uuids[1], "reconcile");
    assert_eq!(of(&volfs, &uuids[1], "status"), "lost");
    assert_eq!(tell(&volfs, &uuids[1], "detach force"), EBUSY);
    done(&volfs, &uuids[1], "detach");
}

#[test]
fn c4_detach_is_a_promise_about_the_vm_named() {
    let volfs = quiet();
    let uuid = &volfs.job("a", &["d"], "1M")[0];
    let (there, host) = (vm(), host(&volfs));
    done(&volfs, uuid, "attach");
    done(&volfs, uuid, &format!("detach vm={there}"));
    assert_eq!(of(&volfs, uuid, "status"), "attached", "it is not on that VM");
    done(&volfs, uuid, &format!("detach vm={host}"));
    assert_eq!(of(&volfs, uuid, "status"), "detached");
    done(&volfs, uuid, "detach");
}

// C5

#[test]
fn c5_resize_grows_and_the_kernel_shows_it() {
    let volfs = quiet();
    let uuid = &volfs.job("a", &["d"], "1M")[0];
    let kernel = || volfs.ok(&format!("blockdev --getsize64 $(cat $R/volumes/{uuid}/device)"));
    done(&volfs, uuid, "resize 2M");
    assert_eq!(of(&volfs, uuid, "size"), (2 << 20).to_string());
    done(&volfs, uuid, "attach");
    assert_eq!(kernel(), (2 << 20).to_string());
    let was = of(&volfs, uuid, "incarnation");
    done(&volfs, uuid, "resize 4M");
    assert_eq!(kernel(), (4 << 20).to_string());
    assert_eq!(of(&volfs, uuid, "size"), (4 << 20).to_string());
    assert_eq!(of(&volfs, uuid, "incarnation"), was);
    assert_eq!(of(&volfs, uuid, "status"), "attached");
    done(&volfs, uuid, "resize 4M");
    assert_eq!(tell(&volfs, uuid, "resize 3M"), EINVAL);
    assert!(error_of(&volfs, uuid).contains("cannot shrink"));
    assert_eq!(kernel(), (4 << 20).to_string());
    // Never smaller than asked.
    done(&volfs, uuid, "resize 4194305");
    assert_eq!(kernel(), of(&volfs, uuid, "size"));
    assert!(of(&volfs, uuid, "size").parse::<u64>().unwrap() >= 4194305);
    // What was rounded up once is equal when asked again.
    done(&volfs, uuid, "resize 4194305");
    assert_eq!(tell(&volfs, uuid, "resize"), EINVAL);
    assert_eq!(tell(&volfs, uuid, "resize 0"), EINVAL);
    done(&volfs, uuid, "detach");
    assert_eq!(tell(&volfs, uuid, "resize 1M"), EINVAL);
}

#[test]
fn c5_a_mounted_device_can_grow() {
    let volfs = quiet();
    let uuid = &volfs.job("a", &["d"], "8M")[0];
    done(&volfs, uuid, "attach");
    let at = volfs.scratch("there");
    fs::create_dir(&at).unwrap();
    volfs.ok(&format!("mkfs.ext4 -q $R/volumes/{uuid}/block && mount $R/volumes/{uuid}/block {}", at.display()));
    let mounted = Mounted(at);
    done(&volfs, uuid, "resize 16M");
    assert_eq!(of(&volfs, uuid, "size"), (16 << 20).to_string());
    drop(mounted);
    done(&volfs, uuid, "detach");
}

// C7

#[test]
fn c7_delete_goes_to_a_trash_and_history_says_until_when() {
    let volfs = quiet();
    let uuids = volfs.job("a", &["d", "e"], "1M");
    assert_eq!(tell(&volfs, &uuids[0], &format!("delete {}", uuids[1])), EINVAL, "another one's name");
    assert_eq!(tell(&volfs, &uuids[0], "delete"), EINVAL);
    assert_eq!(tell(&volfs, &uuids[0], "delete d"), EINVAL);
    done(&volfs, &uuids[0], &format!("delete {}", uuids[0]));
    assert!(!volfs.path(dir("a", &uuids[0])).exists());
    assert!(!volfs.path(format!("volumes/{}", uuids[0])).exists());
    assert_eq!(disk(&volfs, "a", "d"), None);
    assert_eq!(disk(&volfs, "a", "e").as_ref(), Some(&uuids[1]));
    let trash = || volfs.ok(&format!("ls {}", volfs.state().join("loop/trash").display()));
    assert!(trash().contains(&uuids[0]));
    for history in ["history", "jobs/a/history"] {
        let text = volfs.read(history).unwrap();
        let row = text.lines().find(|l| l.contains("\tdelete\t") && l.contains(&uuids[0])).unwrap();
        assert!(row.contains("recoverable until 20"), "{row}");
    }
    done(&volfs, &uuids[1], &format!("delete {} expunge", uuids[1]));
    assert!(!trash().contains(&uuids[1]));
    assert_eq!(volfs.value("jobs/a/status"), "idle");
    fs::remove_dir(volfs.path("jobs/a")).unwrap();
}

#[test]
fn c7_c8_c9_c12_a_held_job_keeps_what_it_has() {
    let volfs = quiet();
    let uuid = &volfs.job("a", &["d"], "1M")[0];
    job(&volfs, "b");
    volfs.ok("echo 1 > $R/jobs/a/hold");
    for command in [format!("delete {uuid}"), format!("release {uuid}"), "move b".into(), "revert s".into()] {
        assert_eq!(tell(&volfs, uuid, &command), EPERM, "{command}");
        assert!(error_of(&volfs, uuid).contains("held"));
    }
    for command in ["destroy a", "move b"] {
        assert_eq!(volfs.write("jobs/a/control", command), EPERM, "{command}");
    }
    done(&volfs, uuid, "attach");
    done(&volfs, uuid, "resize 2M");
    done(&volfs, uuid, "detach");
    volfs.ok("echo 0 > $R/jobs/a/hold");
    assert_eq!(volfs.write("jobs/a/control", "destroy a"), 0);
}

// C8

#[test]
fn c8_release_gives_up_ownership_and_touches_no_data() {
    let volfs = quiet();
    let uuids = volfs.job("a", &["d", "e"], "1M");
    fs::write(stored(&volfs, &uuids[0]).join("data.img"), vec![7; 1 << 20]).unwrap();
    assert_eq!(tell(&volfs, &uuids[0], &format!("release {}", uuids[1])), EINVAL);
    done(&volfs, &uuids[0], "attach");
    assert_eq!(tell(&volfs, &uuids[0], &format!("release {}", uuids[0])), EBUSY);
    done(&volfs, &uuids[0], "detach");
    // Who stands in it, or holds its control open.
    let path = volfs.path(dir("a", &uuids[0]));
    let stands = File::open(&path).unwrap();
    let mut held = OpenOptions::new().write(true).open(path.join("control")).unwrap();
    done(&volfs, &uuids[0], &format!("release {}", uuids[0]));
    assert_eq!(held.write(b"attach").unwrap_err().raw_os_error(), Some(ENODEV));
    let again = fs::read_dir(format!("/proc/self/fd/{}", std::os::fd::AsRawFd::as_raw_fd(&stands)));
    assert!(again.is_err(), "the directory has departed");
    assert!(!path.exists());
    let after = meta(&volfs, &uuids[0]);
    assert_eq!((&after["mark"], &after["job"], &after["disk"]), (&Value::Null, &Value::Null, &Value::Null));
    assert_eq!(fs::read(stored(&volfs, &uuids[0]).join("data.img")).unwrap(), vec![7; 1 << 20]);
    volfs.until("unclaimed", || volfs.path(format!("unclaimed/{}/reason", uuids[0])).exists());
    assert!(!volfs.path(format!("unclaimed/{}/control", uuids[0])).exists());
    assert_eq!(disk(&volfs, "a", "e").as_ref(), Some(&uuids[1]));
}

// C9

#[test]
fn c9_move_hands_over_with_the_disk_name_and_a_new_epoch() {
    let volfs = quiet();
    let uuid = &volfs.job("a", &["d"], "8M")[0];
    volfs.job("b", &["taken"], "1M");
    done(&volfs, uuid, "attach");
    let at = volfs.scratch("there");
    fs::create_dir(&at).unwrap();
    volfs.ok(&format!("mkfs.ext4 -q $R/volumes/{uuid}/block && mount $R/volumes/{uuid}/block {}", at.display()));
    let _mounted = Mounted(at);
    let (was, epoch) = (of(&volfs, uuid, "incarnation"), of(&volfs, uuid, "owner"));
    let old = volfs.path(dir("a", uuid));
    let mut held = OpenOptions::new().write(true).open(old.join("control")).unwrap();
    assert_eq!(tell(&volfs, uuid, "move nowhere"), ENOENT);
    assert_eq!(tell(&volfs, uuid, "move a/b"), EINVAL);
    done(&volfs, uuid, "move b");
    assert_eq!(held.write(b"detach").unwrap_err().raw_os_error(), Some(ENODEV));
    assert!(!old.exists());
    assert_eq!(disk(&volfs, "b", "d").as_ref(), Some(uuid));
    assert_eq!(disk(&volfs, "a", "d"), None);
    assert_eq!(of(&volfs, uuid, "incarnation"), was, "attached and mounted throughout");
    assert_eq!(of(&volfs, uuid, "status"), "attached");
    let number = |owner: &str| owner.rsplit_once('/').unwrap().1.parse::<u64>().unwrap();
    assert!(number(&of(&volfs, uuid, "owner")) > number(&epoch));
    let meta = meta(&volfs, uuid);
    assert_eq!(meta["mark"].as_str().unwrap(), of(&volfs, uuid, "owner"));
    assert_eq!((&meta["job"], &meta["disk"]), (&json!("b"), &json!("d")));
    assert_eq!(tell(&volfs, uuid, "detach"), EBUSY, "still mounted, still protected");
    fs::remove_dir(volfs.path("jobs/a")).unwrap();
}

#[test]
fn c9_move_onto_a_taken_name_is_eexist_and_during_an_operation_ebusy() {
    let (volfs, gate) = gated("attach.before-call");
    let uuids = volfs.job("a", &["d", "e"], "1M");
    volfs.job("b", &["d"], "1M");
    assert_eq!(tell(&volfs, &uuids[0], "move b"), EEXIST);
    assert_eq!(volfs.write("jobs/a/control", "move b"), EEXIST);
    assert_eq!(volfs.ok("ls $R/jobs/a/disks"), "d\ne", "none was moved");
    job(&volfs, "c");
    let held = gate.close();
    assert_eq!(tell(&volfs, &uuids[1], "attach nowait"), 0);
    assert_eq!(tell(&volfs, &uuids[1], "move c"), EBUSY);
    assert_eq!(volfs.write("jobs/a/control", "move c"), EBUSY);
    assert!(volfs.read("jobs/a/error").unwrap().contains("e: "));
    held.release();
}

#[test]
fn c9_move_of_a_job_takes_all_and_leaves_an_empty_job() {
    let volfs = quiet();
    let uuids = volfs.job("a", &["d", "e", "f"], "1M");
    job(&volfs, "b");
    let there = vm();
    done(&volfs, &uuids[0], "attach");
    done(&volfs, &uuids[1], &format!("attach vm={there}"));
    assert_eq!(volfs.write("jobs/a/control", "move b"), 0, "{}", volfs.log());
    assert_eq!(volfs.value("jobs/a/status"), "idle");
    assert_eq!(volfs.value("jobs/b/status"), "idle detached=1 attached=1 remote=1");
    for (name, uuid) in ["d", "e", "f"].iter().zip(&uuids) {
        assert_eq!(disk(&volfs, "b", name).as_ref(), Some(uuid));
    }
    assert_eq!(volfs.write("jobs/a/control", "move b"), 0, "nothing left to move is success");
    assert_eq!(volfs.write("jobs/b/control", "move b"), 0);
}

// C10

#[test]
fn c10_disk_renames_it_in_disks_and_in_the_cloud() {
    let volfs = quiet();
    let uuids = volfs.job("a", &["d", "e"], "1M");
    let owner = of(&volfs, &uuids[0], "owner");
    assert_eq!(tell(&volfs, &uuids[0], "disk e"), EEXIST);
    assert_eq!(tell(&volfs, &uuids[0], "disk .e"), EINVAL);
    assert_eq!(tell(&volfs, &uuids[0], "disk"), EINVAL);
    done(&volfs, &uuids[0], "attach");
    done(&volfs, &uuids[0], "disk system");
    assert_eq!(volfs.ok("ls $R/jobs/a/disks"), "e\nsystem");
    assert_eq!(disk(&volfs, "a", "system").as_ref(), Some(&uuids[0]));
    assert_eq!(meta(&volfs, &uuids[0])["disk"], "system");
    assert_eq!(of(&volfs, &uuids[0], "owner"), owner, "the owner is the same");
    assert!(volfs.read("jobs/a/table").unwrap().contains("\tsystem\t"));
    done(&volfs, &uuids[0], "disk system");
    done(&volfs, &uuids[1], "disk d");
}

// C13

#[test]
fn c13_reconcile_sees_what_happened_behind_our_back() {
    let volfs = quiet();
    let uuids = volfs.job("a", &["d", "e"], "1M");
    let there = vm();
    for uuid in &uuids {
        edit_meta(&volfs, uuid, |m| m["attached"] = json!({"vm": there, "device_id": 1}));
    }
    let mut events = Listener::open(&volfs);
    done(&volfs, &uuids[0], "reconcile");
    assert_eq!(of(&volfs, &uuids[0], "status"), "remote");
    assert_eq!(of(&volfs, &uuids[0], "vm"), there);
    assert_eq!(of(&volfs, &uuids[1], "status"), "detached", "only the one that was asked for");
    assert_eq!(volfs.write("control", "reconcile"), 0);
    assert_eq!(of(&volfs, &uuids[1], "status"), "remote");
    events.hear(&volfs, "drift", |v| v["event"] == "drift" && v["volume"] == uuids[1]);
}

#[test]
fn c13_success_only_if_it_is_settled_afterwards() {
    let volfs = quiet();
    let uuids = volfs.job("a", &["d", "e"], "1M");
    assert_eq!(volfs.write("control", "reconcile"), 0);
    edit_meta(&volfs, &uuids[0], |m| m["mark"] = FOREIGN.into());
    assert_eq!(volfs.write("control", "reconcile"), EHOSTUNREACH);
    let error = volfs.read("error").unwrap();
    assert!(error.contains(" reconcile pid ") && error.contains(&uuids[0]), "{error}");
    done(&volfs, &uuids[1], "reconcile");
    fs::rename(volfs.state().join("loop"), volfs.state().join("away")).unwrap();
    assert_eq!(tell(&volfs, &uuids[0], "reconcile"), EHOSTUNREACH);
    assert_eq!(volfs.write("control", "reconcile"), EHOSTUNREACH);
    fs::rename(volfs.state().join("away"), volfs.state().join("loop")).unwrap();
    done(&volfs, &uuids[0], &format!("release {}", uuids[0]));
    assert_eq!(volfs.write("control", "reconcile"), 0, "{}", volfs.log());
    assert_eq!(volfs.read("error").unwrap(), "\n");
}

#[test]
fn c13_a_volume_that_is_gone_is_settled_by_a_second_look() {
    let volfs = Volfs::start_with(&[("VOLFS_FAILPOINTS", "reconcile.no-gap=fail")], QUIET);
    let uuid = &volfs.job("a", &["d"], "1M")[0];
    fs::remove_dir_all(stored(&volfs, uuid)).unwrap();
    assert_eq!(volfs.write("control", "reconcile"), 0, "{}", volfs.log());
    assert_eq!(of(&volfs, uuid, "status"), "missing");
}

#[test]
fn c13_reconcile_of_a_vm_lists_it_and_fails_when_its_disks_cannot_be_told() {
    let volfs = quiet();
    let uuids = volfs.job("a", &["d"], "1M");
    let stranger = foreign_volume(&volfs, None);
    let there = vm();
    assert!(!volfs.path(format!("vms/{there}")).exists());
    assert_eq!(volfs.write("control", &format!("reconcile vm={there}")), 0);
    assert_eq!(volfs.ok(&format!("ls $R/vms/{there}")), "");
    done(&volfs, &uuids[0], &format!("attach vm={there}"));
    edit_meta(&volfs, &stranger, |m| m["attached"] = json!({"vm": there, "device_id": 0}));
    assert_eq!(volfs.write("control", &format!("reconcile vm={there}")), 0);
    let mut wanted = [uuids[0].clone(), stranger.clone()];
    wanted.sort();
    assert_eq!(volfs.ok(&format!("ls $R/vms/{there}")), wanted.join("\n"), "its own disks included");
    // One volume whose metadata cannot be read may be on that VM.
    fs::write(stored(&volfs, &stranger).join("meta.json"), "{").unwrap();
    assert_eq!(volfs.write("control", &format!("reconcile vm={there}")), EHOSTUNREACH);
    assert!(volfs.read("error").unwrap().contains(&stranger));
}

// C14

#[test]
fn c14_cancel_stops_an_operation_before_its_next_step() {
    let (volfs, gate) = gated("attach.journaled");
    let uuid = &volfs.job("a", &["d"], "1M")[0];
    for bad in ["cancel", "cancel x", "cancel 0", "cancel -1", "abandon"] {
        assert_eq!(volfs.write("control", bad), EINVAL, "{bad}");
    }
    assert_eq!(volfs.write("control", "cancel 999999"), ENOENT);
    assert_eq!(volfs.write("control", "abandon 999999"), ENOENT);
    let held = gate.close();
    let waiter = volfs.sh_spawn(&["bash"], &format!("echo attach > $R/volumes/{uuid}/control"));
    let id = running(&volfs, "attach");
    assert_eq!(volfs.write("control", &format!("cancel {id}")), 0);
    held.release();
    let said = finish(waiter);
    assert_eq!(said.status, 1, "{said:?}");
    assert_eq!(of(&volfs, uuid, "status"), "detached");
    assert!(volfs.loops().is_empty());
    let op: Value = serde_json::from_str(&volfs.read(format!("operations/{id}")).unwrap()).unwrap();
    assert_eq!(op["ended"]["outcome"], "cancelled");
    assert_eq!(volfs.write("control", &format!("cancel {id}")), ENOENT, "it has ended");
    done(&volfs, uuid, "attach");
}

#[test]
fn c14_abandon_ends_it_in_the_record_and_leaves_unknown() {
    let (volfs, gate) = gated("attach.after-call");
    let uuid = &volfs.job("a", &["d"], "1M")[0];
    let held = gate.close();
    let waiter = volfs.sh_spawn(&["bash"], &format!("echo attach > $R/volumes/{uuid}/control"));
    let id = running(&volfs, "attach");
    volfs.until("the call", || meta(&volfs, uuid)["attached"].is_object());
    assert_eq!(volfs.write("control", &format!("abandon {id}")), 0, "{}", volfs.log());
    assert_eq!(finish(waiter).status, 1);
    assert_eq!(of(&volfs, uuid, "status"), "unknown");
    assert_eq!(volfs.read(format!("volumes/{uuid}/device")), Err(ENODEV));
    assert_eq!(volfs.ok("sed -n 's/^volfs_abandoned_total //p' $R/metrics"), "1");
    let history = volfs.read("history").unwrap();
    assert!(history.lines().any(|l| l.contains("\tattach\t") && l.contains("\tabandoned\t")), "{history}");
    held.release();
    // What it did all the same is found, not assumed.
    done(&volfs, uuid, "reconcile");
    assert_eq!(of(&volfs, uuid, "status"), "attached");
}

// Waiting

#[test]
fn c3_a_timeout_is_etimedout_and_the_operation_goes_on() {
    let (volfs, gate) = gated("attach.before-call");
    let uuid = &volfs.job("a", &["d"], "1M")[0];
    let held = gate.close();
    assert_eq!(tell(&volfs, uuid, "attach timeout=1"), ETIMEDOUT);
    assert_eq!(of(&volfs, uuid, "status"), "attaching");
    assert!(error_of(&volfs, uuid).contains("goes on"));
    assert_eq!(tell(&volfs, uuid, "detach"), EBUSY, "no opposite command meanwhile");
    held.release();
    done(&volfs, uuid, "attach timeout=0");
    assert_eq!(of(&volfs, uuid, "status"), "attached");
    for bad in ["attach timeout=", "attach timeout=-1", "attach timeout=x", "attach timeout=1 timeout=2"] {
        assert_eq!(tell(&volfs, uuid, bad), EINVAL, "{bad}");
    }
}

#[test]
fn c1_c3_c5_c7_nowait_and_o_nonblock_return_when_it_is_journaled() {
    let gate = Gate::new();
    let points = ["create", "attach", "resize", "delete"].map(|v| gate.wait(&format!("{v}.before-call"))).join(";");
    let volfs = Volfs::start_with(&[("VOLFS_FAILPOINTS", &points)], QUIET);
    job(&volfs, "a");
    let nonblock = |below: &str, command: &str| {
        let mut file = OpenOptions::new().write(true).custom_flags(libc::O_NONBLOCK).open(volfs.path(below)).unwrap();
        file.write_all(command.as_bytes()).unwrap();
    };
    let held = gate.close();
    nonblock("jobs/a/control", "create d 1M\n");
    assert_eq!(volfs.value("jobs/a/status"), "busy creating=1");
    held.release();
    volfs.until("the disk", || volfs.value("jobs/a/status") == "idle detached=1");
    let uuid = &disk(&volfs, "a", "d").unwrap();
    for (command, word, after) in
        [("resize 2M", "resizing", "detached"), ("attach", "attaching", "attached"), ("detach", "", "detached")]
    {
        let held = gate.close();
        assert_eq!(tell(&volfs, uuid, &format!("{command} nowait")), 0);
        if !word.is_empty() {
            assert_eq!(of(&volfs, uuid, "status"), word);
        }
        held.release();
        volfs.until(after, || of(&volfs, uuid, "status") == after);
    }
    let held = gate.close();
    nonblock(&format!("volumes/{uuid}/control"), &format!("delete {uuid}"));
    assert_eq!(of(&volfs, uuid, "status"), "deleting");
    held.release();
    volfs.until("the end", || volfs.value("jobs/a/status") == "idle");
    // A refusal is told at once all the same.
    let mut file =
        OpenOptions::new().write(true).custom_flags(libc::O_NONBLOCK).open(volfs.path("jobs/a/control")).unwrap();
    assert_eq!(file.write(b"destroy b").unwrap_err().raw_os_error(), Some(EINVAL));
}

#[test]
fn c3_a_signal_ends_the_wait_and_not_the_operation() {
    let (volfs, gate) = gated("attach.before-call");
    let uuid = &volfs.job("a", &["d"], "1M")[0];
    let held = gate.close();
    let began = std::time::Instant::now();
    let said = volfs.sh(&format!("timeout 0.2 dash -c 'echo attach > $R/volumes/{uuid}/control'; echo $?"));
    assert_eq!(said.out, "124\n");
    assert!(began.elapsed() < PATIENCE);
    volfs.until("the interruption", || error_of(&volfs, uuid).contains("EINTR"));
    assert_eq!(of(&volfs, uuid, "status"), "attaching");
    held.release();
    done(&volfs, uuid, "attach");
}

#[test]
fn c8_enotempty_is_kept_for_a_job_that_owns_something() {
    let volfs = quiet();
    let uuid = &volfs.job("a", &["d"], "1M")[0];
    let refused = fs::remove_dir(volfs.path("jobs/a")).unwrap_err();
    assert_eq!(refused.raw_os_error(), Some(ENOTEMPTY));
    done(&volfs, uuid, &format!("release {uuid}"));
    fs::remove_dir(volfs.path("jobs/a")).unwrap();
}
