//! C1 to C14: every sentence of the table of commands, through the tree.

use std::fs::{self, File, OpenOptions};
use std::io::Write;
use std::os::unix::fs::OpenOptionsExt;

use libc::{
    EACCES, EBUSY, ECANCELED, EEXIST, EHOSTUNREACH, EINVAL, ENODEV, ENOENT, ENOSPC, ENOTEMPTY, EOPNOTSUPP, EPERM,
    ETIMEDOUT,
};
use serde_json::{Value, json};

use crate::bring::*;
use crate::common::{PATIENCE, Volfs, finish};

const QUIET: &str = "reconcile_interval = 3600\n";

fn quiet() -> Volfs {
    Volfs::start_with(&[], QUIET)
}

/// A quiet one with a failpoint that waits at the gate.
fn gated(point: &str) -> (Volfs, Gate) {
    let gate = Gate::new();
    let volfs = Volfs::start_with(&[("VOLFS_FAILPOINTS", &gate.wait(point))], QUIET);
    (volfs, gate)
}

fn vm() -> String {
    volfs::model::VmId::random().to_string()
}

#[track_caller]
fn job(volfs: &Volfs, name: &str) {
    fs::create_dir(volfs.path(format!("jobs/{name}"))).unwrap();
}

/// Writes to a volume's `control`.
#[track_caller]
fn tell(volfs: &Volfs, uuid: &str, command: &str) -> i32 {
    volfs.write(format!("volumes/{uuid}/control"), command)
}

#[track_caller]
fn done(volfs: &Volfs, uuid: &str, command: &str) {
    assert_eq!(tell(volfs, uuid, command), 0, "{command}\n{}", volfs.log());
}

fn error_of(volfs: &Volfs, uuid: &str) -> String {
    volfs.read(format!("volumes/{uuid}/error")).unwrap()
}

fn disk(volfs: &Volfs, job: &str, disk: &str) -> Option<String> {
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

struct Mounted(std::path::PathBuf);

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

// C6

#[test]
fn c6_snapshots_are_eopnotsupp_with_loop_and_nothing_is_changed() {
    let volfs = quiet();
    let uuid = &volfs.job("a", &["d"], "1M")[0];
    for command in ["snapshot s", "snapshot s crash", "revert s", "delete-snapshot s"] {
        assert_eq!(tell(&volfs, uuid, command), EOPNOTSUPP, "{command}");
        assert_eq!(volfs.write("jobs/a/control", command), EOPNOTSUPP, "{command}");
    }
    for command in ["snapshot", "snapshot .x", "revert a/b", "snapshot s t"] {
        assert_eq!(tell(&volfs, uuid, command), EINVAL, "{command}");
        assert_eq!(volfs.write("jobs/a/control", command), EINVAL, "{command}");
    }
    assert_eq!(of(&volfs, uuid, "status"), "detached");
    assert_eq!(volfs.ok(&format!("ls $R/volumes/{uuid}/snapshots")), "");
    assert!(error_of(&volfs, uuid).contains("snapshot"));
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
    let _ = ECANCELED;
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
