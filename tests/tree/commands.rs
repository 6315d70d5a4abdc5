//! C1 to C3: create, claim and attach, every sentence of the contract, through the tree.

use std::fs::{self, File};

use libc::{EACCES, EBUSY, EEXIST, EHOSTUNREACH, EINVAL, ENOENT, ENOSPC, EPERM};
use serde_json::{Value, json};

use crate::bring::*;
use crate::common::{Volfs, finish};

pub const QUIET: &str = "reconcile_interval = 3600\n";

pub fn quiet() -> Volfs {
    Volfs::start_with(&[], QUIET)
}

/// A quiet one with a failpoint that waits at the gate.
pub fn gated(point: &str) -> (Volfs, Gate) {
    let gate = Gate::new();
    let volfs = Volfs::start_with(&[("VOLFS_FAILPOINTS", &gate.wait(point))], QUIET);
    (volfs, gate)
}

pub fn vm() -> String {
    volfs::model::VmId::random().to_string()
}

#[track_caller]
pub fn job(volfs: &Volfs, name: &str) {
    fs::create_dir(volfs.path(format!("jobs/{name}"))).unwrap();
}

/// Writes to a volume's `control`.
#[track_caller]
pub fn tell(volfs: &Volfs, uuid: &str, command: &str) -> i32 {
    volfs.write(format!("volumes/{uuid}/control"), command)
}

#[track_caller]
pub fn done(volfs: &Volfs, uuid: &str, command: &str) {
    assert_eq!(tell(volfs, uuid, command), 0, "{command}\n{}", volfs.log());
}

pub fn error_of(volfs: &Volfs, uuid: &str) -> String {
    volfs.read(format!("volumes/{uuid}/error")).unwrap()
}

pub fn disk(volfs: &Volfs, job: &str, disk: &str) -> Option<String> {
    let link = fs::read_link(volfs.path(format!("jobs/{job}/disks/{disk}"))).ok()?;
    Some(link.file_name()?.to_str()?.to_owned())
}

// C1

#[test]
fn c1_sizes_are_bytes_or_powers_of_1024_and_never_rounded_down() {
    let volfs = quiet();
    job(&volfs, "a");
    for (n, (size, bytes)) in [
        ("512", 512),
        ("1", 512),
        ("513", 1024),
        ("1048577", 1048577_u64.next_multiple_of(512)),
        ("64K", 64 << 10),
        ("3M", 3 << 20),
        ("1G", 1 << 30),
        ("1900M", 1900 << 20),
    ]
    .into_iter()
    .enumerate()
    {
        assert_eq!(volfs.write("jobs/a/control", &format!("create d{n} {size}")), 0, "{size}");
        let uuid = disk(&volfs, "a", &format!("d{n}")).unwrap();
        assert_eq!(of(&volfs, &uuid, "size"), bytes.to_string(), "{size}");
        assert_eq!(of(&volfs, &uuid, "status"), "detached");
    }
    for size in ["0", "", "-1", "1.5G", "1g", "1KB", "G", "99999999999T", "0x10"] {
        assert_eq!(volfs.write("jobs/a/control", &format!("create bad {size}")), EINVAL, "{size:?}");
    }
    assert_eq!(disk(&volfs, "a", "bad"), None);
}

#[test]
fn c1_the_same_disk_again_is_eexist_and_makes_no_second_volume() {
    let volfs = quiet();
    let uuid = &volfs.job("a", &["d"], "1M")[0];
    assert_eq!(volfs.write("jobs/a/control", "create d 1M"), EEXIST);
    assert_eq!(volfs.write("jobs/a/control", "create d 2M"), EEXIST);
    assert_eq!(fs::read_dir(volfs.state().join("loop/volumes")).unwrap().count(), 1);
    assert_eq!(disk(&volfs, "a", "d").as_ref(), Some(uuid));
    assert!(volfs.read("jobs/a/error").unwrap().contains("disk d exists already in job a"));
}

#[test]
fn c1_an_equal_create_in_flight_is_joined_and_another_one_is_ebusy() {
    let (volfs, gate) = gated("create.before-call");
    job(&volfs, "a");
    let held = gate.close();
    let spawn = |text: &str| volfs.sh_spawn(&["dash"], &format!("echo '{text}' > $R/jobs/a/control"));
    let first = spawn("create d 1M");
    let id = running(&volfs, "create d");
    let second = spawn("create d 1024K");
    let joined = || serde_json::from_str::<Value>(&volfs.read(format!("operations/{id}")).unwrap()).unwrap();
    volfs.until("the second caller", || joined()["callers"] == 2);
    assert_eq!(volfs.write("jobs/a/control", "create d 2M"), EBUSY);
    assert_eq!(volfs.ok("rmdir $R/jobs/a 2>/dev/null || echo no"), "no", "a job that is creating owns something");
    held.release();
    assert_eq!(finish(first).status, 0);
    assert_eq!(finish(second).status, 0);
    assert_eq!(fs::read_dir(volfs.state().join("loop/volumes")).unwrap().count(), 1);
}

#[test]
fn c1_a_lost_answer_makes_no_second_volume() {
    let volfs = Volfs::start_with(&[("VOLFS_FAILPOINTS", "loop.ambiguous=fail")], QUIET);
    job(&volfs, "a");
    assert_eq!(volfs.write("jobs/a/control", "create d 1M"), 0, "{}", volfs.log());
    assert_eq!(volfs.write("jobs/a/control", "create d 1M"), EEXIST);
    let made: Vec<_> = fs::read_dir(volfs.state().join("loop/volumes")).unwrap().flatten().collect();
    assert_eq!(made.len(), 1);
    assert_eq!(disk(&volfs, "a", "d").unwrap(), made[0].file_name().to_str().unwrap());
}

#[test]
fn c1_no_capacity_is_enospc_and_leaves_nothing() {
    let volfs = Volfs::start_with(&[], "reconcile_interval = 3600\n[loop]\ncapacity = \"4M\"\n");
    volfs.job("a", &["d"], "3M");
    assert_eq!(volfs.write("jobs/a/control", "create e 2M"), ENOSPC);
    assert_eq!(volfs.value("jobs/a/status"), "idle detached=1");
    assert_eq!(fs::read_dir(volfs.state().join("loop/volumes")).unwrap().count(), 1);
    assert_eq!(volfs.write("jobs/a/control", "create e 1M"), 0);
}

#[test]
fn c1_name_takes_the_rest_of_the_line() {
    let volfs = quiet();
    job(&volfs, "a");
    assert_eq!(volfs.write("jobs/a/control", "create d 1M name=web server 1, disk  C:\n"), 0);
    let uuid = disk(&volfs, "a", "d").unwrap();
    assert_eq!(of(&volfs, &uuid, "name"), "web server 1, disk  C:");
    assert_eq!(meta(&volfs, &uuid)["name"], "web server 1, disk  C:");
    assert_eq!(volfs.write("jobs/a/control", "create e 1M name=x nowait"), 0);
    assert_eq!(of(&volfs, &disk(&volfs, "a", "e").unwrap(), "name"), "x nowait");
    assert_eq!(volfs.write("jobs/a/control", "create f 1M"), 0);
    assert!(!of(&volfs, &disk(&volfs, "a", "f").unwrap(), "name").is_empty());
}

#[test]
fn c1_a_new_volume_carries_the_owners_mark_and_names() {
    let volfs = quiet();
    let uuid = &volfs.job("a", &["d"], "1M")[0];
    let meta = meta(&volfs, uuid);
    assert_eq!(meta["mark"].as_str().unwrap(), of(&volfs, uuid, "owner"));
    assert_eq!((&meta["job"], &meta["disk"]), (&json!("a"), &json!("d")));
}

#[test]
fn c1_bad_disk_names_and_words_are_einval() {
    let volfs = quiet();
    job(&volfs, "a");
    let long = "x".repeat(65);
    for command in [
        "create .hidden 1M",
        "create a/b 1M",
        "create ../x 1M",
        &format!("create {long} 1M"),
        "create d",
        "create",
        "create d 1M extra",
        "create d 1M colour=red",
        "create d 1M offering=large",
        "Create d 1M",
        "create d 1M\ncreate e 1M",
        "# create d 1M",
    ] {
        assert_eq!(volfs.write("jobs/a/control", command), EINVAL, "{command}");
    }
    assert_eq!(volfs.value("jobs/a/status"), "idle");
    assert_eq!(volfs.write("jobs/a/control", &format!("create {} 1M", &long[..64])), 0);
}

// C2

#[test]
fn c2_claim_takes_a_volume_of_nobody_and_puts_our_mark_on_it() {
    let volfs = quiet();
    job(&volfs, "a");
    let uuid = foreign_volume(&volfs, None);
    assert_eq!(volfs.write("jobs/a/control", &format!("claim {uuid} data")), 0, "{}", volfs.log());
    assert_eq!(disk(&volfs, "a", "data").as_ref(), Some(&uuid));
    assert_eq!(of(&volfs, &uuid, "status"), "detached");
    assert_eq!(of(&volfs, &uuid, "name"), "by hand");
    let meta = meta(&volfs, &uuid);
    assert_eq!(meta["mark"].as_str().unwrap(), of(&volfs, &uuid, "owner"));
    assert_eq!((&meta["job"], &meta["disk"]), (&json!("a"), &json!("data")));
    // Without a name the disk is the UUID.
    let other = foreign_volume(&volfs, None);
    assert_eq!(volfs.write("jobs/a/control", &format!("claim {other}")), 0);
    assert_eq!(disk(&volfs, "a", &other).as_ref(), Some(&other));
}

#[test]
fn c2_claim_of_what_the_cloud_does_not_know_is_enoent() {
    let volfs = quiet();
    job(&volfs, "a");
    let uuid = volfs::model::VolumeId::random().to_string();
    assert_eq!(volfs.write("jobs/a/control", &format!("claim {uuid}")), ENOENT);
    assert!(volfs.read("jobs/a/error").unwrap().contains(&uuid));
    assert_eq!(volfs.value("jobs/a/status"), "idle");
    assert_eq!(volfs.write("jobs/a/control", "claim not-a-uuid"), EINVAL);
    assert_eq!(volfs.write("jobs/a/control", &format!("claim {}", uuid.to_uppercase())), EINVAL);
}

#[test]
fn c2_claim_of_another_jobs_volume_is_ebusy_and_names_the_job() {
    let volfs = quiet();
    let uuid = &volfs.job("a", &["d"], "1M")[0];
    job(&volfs, "b");
    assert_eq!(volfs.write("jobs/b/control", &format!("claim {uuid}")), EBUSY);
    assert!(volfs.read("jobs/b/error").unwrap().contains(&format!("volume {uuid} belongs to job a")));
    assert_eq!(volfs.value("jobs/b/status"), "idle");
}

#[test]
fn c2_claim_of_another_records_volume_is_ebusy_and_from_takes_it_over() {
    let volfs = quiet();
    job(&volfs, "a");
    let uuid = foreign_volume(&volfs, Some(FOREIGN));
    let record = FOREIGN.split('/').next().unwrap();
    assert_eq!(volfs.write("jobs/a/control", &format!("claim {uuid} d")), EBUSY);
    assert!(volfs.read("jobs/a/error").unwrap().contains(FOREIGN));
    let wrong = volfs::model::RecordId::random();
    assert_eq!(volfs.write("jobs/a/control", &format!("claim {uuid} d from={wrong}")), EBUSY);
    assert_eq!(meta(&volfs, &uuid)["mark"], FOREIGN);
    assert_eq!(volfs.write("jobs/a/control", &format!("claim {uuid} d from={record}")), 0, "{}", volfs.log());
    assert_eq!(meta(&volfs, &uuid)["mark"].as_str().unwrap(), of(&volfs, &uuid, "owner"));
    assert_ne!(of(&volfs, &uuid, "owner"), FOREIGN);
}

/// A group other than root's that owns the controls, so that a plain user may write to them.
const GROUP: &str = "group = \"nogroup\"\nreconcile_interval = 3600\n";

fn nogroup() -> u32 {
    let groups = fs::read_to_string("/etc/group").unwrap();
    groups.lines().find_map(|l| l.strip_prefix("nogroup:x:")).unwrap().split(':').next().unwrap().parse().unwrap()
}

#[test]
fn c2_c4_c7_c14_what_is_for_root_only_is_eperm_for_others() {
    if !crate::common::have(&["/usr/bin/python3"]) {
        return;
    }
    let (gid, uid) = (nogroup(), 65533);
    let gate = Gate::new();
    let volfs = Volfs::start_with(&[("VOLFS_FAILPOINTS", &gate.wait("attach.journaled"))], GROUP);
    // The state directory's parent is a private temporary directory: let the user through it.
    volfs.ok("chmod 0755 \"$R/..\"");
    let uuids = volfs.job("a", &["d", "e"], "1M");
    let control = format!("{}/control", dir("a", &uuids[0]));
    let foreign = foreign_volume(&volfs, Some(FOREIGN));
    let record = FOREIGN.split('/').next().unwrap();
    let other = vm();
    let as_user = |place: &str, command: &str| volfs.write_as(uid, gid, place, command);
    assert_eq!(as_user("jobs/a/control", &format!("claim {foreign} x from={record}")), EPERM);
    assert_eq!(as_user(&control, &format!("delete {} expunge", uuids[0])), EPERM);
    done(&volfs, &uuids[0], &format!("attach vm={other}"));
    assert_eq!(as_user(&control, &format!("detach vm={other} force")), EPERM);
    assert_eq!(of(&volfs, &uuids[0], "status"), "remote");
    assert_eq!(as_user(&control, &format!("detach vm={other}")), 0, "what is not for root only is theirs");
    let held = gate.close();
    assert_eq!(tell(&volfs, &uuids[1], "attach nowait"), 0);
    let id = running(&volfs, "attach");
    assert_eq!(as_user("control", &format!("abandon {id}")), EPERM);
    assert_eq!(of(&volfs, &uuids[1], "status"), "attaching");
    held.release();
    // Who is in no group may not even open it.
    assert_eq!(volfs.write_as(uid, 65532, "jobs/a/control", "attach"), EACCES);
    assert!(stored(&volfs, &uuids[0]).exists());
    let who = volfs.read("history").unwrap();
    assert!(who.lines().any(|l| l.contains("\tdetach\t") && l.split('\t').nth(7) == Some("65533")), "{who}");
}

#[test]
fn c2_a_protected_volume_cannot_be_claimed_and_has_no_verb() {
    let mut volfs = quiet();
    let uuids = volfs.job("a", &["d", "e", "f"], "1M");
    job(&volfs, "b");
    let free = foreign_volume(&volfs, None);
    let elsewhere = vm();
    done(&volfs, &uuids[1], "attach");
    done(&volfs, &uuids[2], &format!("attach vm={elsewhere}"));
    volfs.terminate();
    let list: Vec<String> = uuids.iter().chain([&free]).map(|u| format!("\"{u}\"")).collect();
    fs::write(volfs.scratch("config.toml"), format!("{QUIET}protect = [{}]\n", list.join(", "))).unwrap();
    volfs.launch();
    volfs.until("a look", || uuids.iter().all(|u| of(&volfs, u, "status") != "unknown"));
    assert_eq!(volfs.write("jobs/b/control", &format!("claim {free} x")), EPERM);
    assert!(volfs.read("jobs/b/error").unwrap().contains("protect"));
    let was = |n: usize| meta(&volfs, &uuids[n]);
    let before = [was(0), was(1), was(2)];
    for (n, commands) in [
        (0, vec!["attach", "resize 2M", "delete {u}", "delete {u} expunge", "release {u}", "move b", "disk z"]),
        (1, vec!["detach", "detach force", "resize 2M", "release {u}", "move b", "disk z"]),
        (2, vec!["detach vm={v}", "detach vm={v} force", "release {u}", "move b", "disk z"]),
    ] {
        for command in commands {
            let command = command.replace("{u}", &uuids[n]).replace("{v}", &elsewhere);
            let got = tell(&volfs, &uuids[n], &command);
            // An attached one is not even let to `release` or `force`: that stands before the look.
            let also = (command.starts_with("release") && n == 1) || command == "detach force";
            assert!(got == EPERM || (also && got == EBUSY), "{command}: {got}\n{}", volfs.log());
        }
    }
    assert_eq!(volfs.write("jobs/a/control", "destroy a"), EBUSY);
    assert_eq!([was(0), was(1), was(2)], before, "nothing was touched");
    assert_eq!(of(&volfs, &uuids[1], "status"), "attached");
}

#[test]
fn c2_a_disk_that_carries_volfss_own_state_cannot_be_claimed() {
    let mut first = quiet();
    let uuid = first.job("a", &["d"], "64M").remove(0);
    done(&first, &uuid, "attach");
    let device = of(&first, &uuid, "device");
    let config = format!("{QUIET}[loop]\ndir = \"{}\"\n", first.state().join("loop").display());
    let mut second = Volfs::prepare(&[], &config);
    fs::create_dir_all(second.state()).unwrap();
    first.ok(&format!("mkfs.ext4 -q {device} && mount {device} {}", second.state().display()));
    let _mounted = Mounted(second.state());
    first.terminate();
    edit_meta(&first, &uuid, |m| m["mark"] = Value::Null);
    second.launch();
    job(&second, "b");
    assert_eq!(second.write("jobs/b/control", &format!("claim {uuid} d")), EPERM, "{}", second.log());
    let error = second.read("jobs/b/error").unwrap();
    assert!(error.contains("carries") && error.contains(&second.state().display().to_string()), "{error}");
    assert_eq!(meta(&first, &uuid)["mark"], Value::Null);
    second.terminate();
}

#[test]
fn c2_a_mounted_volume_can_be_claimed_and_stays_in_use() {
    let volfs = quiet();
    let uuid = &volfs.job("a", &["d"], "8M")[0];
    done(&volfs, uuid, "attach");
    let device = of(&volfs, uuid, "device");
    edit_meta(&volfs, uuid, |m| m["mark"] = FOREIGN.into());
    assert_eq!(tell(&volfs, uuid, "reconcile"), EHOSTUNREACH);
    done(&volfs, uuid, &format!("release {uuid}"));
    edit_meta(&volfs, uuid, |m| m["mark"] = Value::Null);
    let at = volfs.scratch("there");
    fs::create_dir(&at).unwrap();
    volfs.ok(&format!("mkfs.ext4 -q {device} && mount {device} {}", at.display()));
    let _mounted = Mounted(at);
    job(&volfs, "b");
    assert_eq!(volfs.write("jobs/b/control", &format!("claim {uuid} d")), 0, "{}", volfs.log());
    assert_eq!(of(&volfs, uuid, "device"), device);
    assert_eq!(tell(&volfs, uuid, "detach"), EBUSY);
}

/// Unmounted when dropped.
pub struct Mounted(pub std::path::PathBuf);

impl Drop for Mounted {
    fn drop(&mut self) {
        // The test has failed already if this does.
        let _ = std::process::Command::new("umount").arg(&self.0).status();
    }
}

#[test]
fn c2_a_released_volume_can_be_claimed_again_also_by_another_job() {
    let volfs = quiet();
    let uuid = &volfs.job("a", &["d"], "1M")[0];
    job(&volfs, "b");
    let first = of(&volfs, uuid, "owner");
    done(&volfs, uuid, &format!("release {uuid}"));
    volfs.until("unclaimed", || volfs.path(format!("unclaimed/{uuid}")).exists());
    assert_eq!(volfs.write("jobs/b/control", &format!("claim {uuid} again")), 0, "{}", volfs.log());
    assert!(!volfs.path(format!("unclaimed/{uuid}")).exists());
    let (old, new) = (first.rsplit_once('/').unwrap(), of(&volfs, uuid, "owner"));
    let new = new.rsplit_once('/').unwrap();
    assert_eq!(old.0, new.0);
    assert!(new.1.parse::<u64>().unwrap() > old.1.parse().unwrap(), "EPOCH rises at claim");
    done(&volfs, uuid, "attach");
    assert_eq!(disk(&volfs, "b", "again").as_ref(), Some(uuid));
}

#[test]
fn c2_claim_into_a_disk_name_that_is_taken_is_eexist() {
    let volfs = quiet();
    volfs.job("a", &["d"], "1M");
    let uuid = foreign_volume(&volfs, None);
    assert_eq!(volfs.write("jobs/a/control", &format!("claim {uuid} d")), EEXIST);
    assert_eq!(meta(&volfs, &uuid)["mark"], Value::Null);
}

#[test]
fn c2_claim_takes_a_volume_wherever_it_is_attached() {
    let volfs = quiet();
    job(&volfs, "a");
    let uuid = foreign_volume(&volfs, None);
    let there = vm();
    edit_meta(&volfs, &uuid, |m| m["attached"] = json!({"vm": there, "device_id": 4}));
    assert_eq!(volfs.write("jobs/a/control", &format!("claim {uuid} d")), 0, "{}", volfs.log());
    assert_eq!(of(&volfs, &uuid, "status"), "remote");
    assert_eq!(of(&volfs, &uuid, "vm"), there);
    assert_eq!(of(&volfs, &uuid, "device_id"), "4");
}

// C3

#[test]
fn c3_attach_here_is_done_when_the_device_is_present_and_verified() {
    let volfs = quiet();
    let uuid = &volfs.job("a", &["d"], "3M")[0];
    done(&volfs, uuid, "attach");
    // No look again, no waiting: it is there when write(2) returns.
    let name = of(&volfs, uuid, "device").strip_prefix("/dev/").unwrap().to_owned();
    let backing = fs::read_to_string(format!("/sys/block/{name}/loop/backing_file")).unwrap();
    assert!(backing.contains(uuid.as_str()));
    assert_eq!(volfs.ok(&format!("blockdev --getsize64 $R/volumes/{uuid}/block")), (3 << 20).to_string());
    assert_eq!(of(&volfs, uuid, "serial"), format!("volfs:{uuid}"));
    assert_eq!(of(&volfs, uuid, "vm"), host(&volfs));
}

#[test]
fn c3_attach_to_another_vm_and_its_ids() {
    let volfs = quiet();
    let uuids = volfs.job("a", &["os", "one", "two", "three", "four"], "1M");
    let there = vm();
    done(&volfs, &uuids[0], &format!("attach vm={there} root"));
    assert_eq!(of(&volfs, &uuids[0], "device_id"), "0");
    done(&volfs, &uuids[1], &format!("attach vm={there} device_id=7"));
    assert_eq!(of(&volfs, &uuids[1], "device_id"), "7");
    done(&volfs, &uuids[2], &format!("attach vm={there}"));
    assert_eq!(of(&volfs, &uuids[2], "device_id"), "1");
    // 3 is the CD's, and never chosen.
    done(&volfs, &uuids[3], &format!("attach vm={there}"));
    assert_eq!(of(&volfs, &uuids[3], "device_id"), "2");
    done(&volfs, &uuids[4], &format!("attach vm={there}"));
    assert_eq!(of(&volfs, &uuids[4], "device_id"), "4");
    let mut listed: Vec<_> = fs::read_dir(volfs.path(format!("vms/{there}")))
        .map(|d| d.map(|e| e.unwrap().file_name().into_string().unwrap()).collect())
        .unwrap_or_default();
    if listed.is_empty() {
        volfs.ok(&format!("echo reconcile vm={there} > $R/control"));
        listed = volfs.ok(&format!("ls $R/vms/{there}")).lines().map(str::to_owned).collect();
    }
    listed.sort();
    let mut wanted = uuids.clone();
    wanted.sort();
    assert_eq!(listed, wanted);
}

#[test]
fn c3_root_needs_a_stopped_vm_without_a_root_disk() {
    let volfs = quiet();
    let uuids = volfs.job("a", &["d", "e"], "1M");
    let there = vm();
    for bad in [
        "attach root".to_owned(),
        format!("attach vm={there} device_id=3"),
        format!("attach vm={there} device_id=0"),
        format!("attach vm={there} root device_id=1"),
        "attach device_id=3".into(),
        "attach vm=web1".into(),
    ] {
        assert_eq!(tell(&volfs, &uuids[0], &bad), EINVAL, "{bad}");
    }
    let file = volfs.state().join(format!("loop/vms/{there}.json"));
    fs::write(&file, "{\"running\":true}").unwrap();
    assert_eq!(tell(&volfs, &uuids[0], &format!("attach vm={there} root")), EBUSY);
    assert!(error_of(&volfs, &uuids[0]).contains("running"));
    fs::write(&file, "{\"running\":false}").unwrap();
    done(&volfs, &uuids[0], &format!("attach vm={there} root"));
    assert_eq!(tell(&volfs, &uuids[1], &format!("attach vm={there} root")), EBUSY);
    assert!(error_of(&volfs, &uuids[1]).contains("root disk"));
    assert_eq!(of(&volfs, &uuids[1], "status"), "detached");
    // Done already, in that very place.
    done(&volfs, &uuids[0], &format!("attach vm={there} root"));
}

#[test]
fn c3_an_id_asked_for_is_never_answered_with_another_one() {
    let volfs = quiet();
    let uuids = volfs.job("a", &["d", "e", "f"], "1M");
    let there = vm();
    done(&volfs, &uuids[0], &format!("attach vm={there} device_id=5"));
    assert_eq!(tell(&volfs, &uuids[1], &format!("attach vm={there} device_id=5")), EBUSY);
    assert_eq!(of(&volfs, &uuids[1], "status"), "detached");
    assert_eq!(tell(&volfs, &uuids[0], &format!("attach vm={there} device_id=6")), EBUSY, "it has 5");
    assert!(error_of(&volfs, &uuids[0]).contains(&format!("detach vm={there}")));
    assert_eq!(tell(&volfs, &uuids[0], &format!("attach vm={there} root")), EBUSY);
    assert_eq!(of(&volfs, &uuids[0], "device_id"), "5");
    done(&volfs, &uuids[2], "attach device_id=9");
    assert_eq!(of(&volfs, &uuids[2], "device_id"), "9");
    assert_eq!(tell(&volfs, &uuids[2], "attach device_id=10"), EBUSY);
    done(&volfs, &uuids[2], "attach device_id=9");
}

#[test]
fn c3_an_id_that_the_cloud_does_not_give_detaches_again() {
    for (command, place) in [("attach device_id=9", "here"), ("attach vm={v} device_id=9", "there")] {
        let (volfs, gate) = gated("attach.after-call");
        let uuid = &volfs.job("a", &["d"], "1M")[0];
        let held = gate.close();
        let command = command.replace("{v}", &vm());
        let waiter = volfs.sh_spawn(&["bash"], &format!("echo {command} > $R/volumes/{uuid}/control"));
        volfs.until("the cloud's call", || meta(&volfs, uuid)["attached"]["device_id"] == 9);
        edit_meta(&volfs, uuid, |m| m["attached"]["device_id"] = 11.into());
        held.release();
        let said = finish(waiter);
        assert_eq!(said.status, 1, "{place}: {said:?}");
        assert!(said.err.contains("Remote I/O error"), "{place}: {said:?}");
        assert!(error_of(&volfs, uuid).contains("11 was given"), "{}", error_of(&volfs, uuid));
        assert_eq!(of(&volfs, uuid, "status"), "detached", "{place}");
        assert_eq!(meta(&volfs, uuid)["attached"], Value::Null, "{place}");
        assert!(volfs.loops().is_empty());
    }
}

#[test]
fn c3_attach_while_another_device_carries_the_identity_is_refused() {
    let volfs = quiet();
    let uuid = &volfs.job("a", &["d"], "1M")[0];
    let copy = volfs.scratch("copy");
    File::create(&copy).unwrap().set_len(1 << 20).unwrap();
    let _bound = Bound::new(uuid, &copy);
    volfs.until("conflict", || of(&volfs, uuid, "status") == "conflict");
    assert_eq!(tell(&volfs, uuid, "attach"), EBUSY);
    assert_eq!(meta(&volfs, uuid)["attached"], Value::Null);
}
