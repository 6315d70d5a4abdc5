//! C6: snapshots of loop volumes through the tree, of one and of a job's whole set.

use std::fs::{self, OpenOptions};
use std::io::Write;

use libc::{EBUSY, EEXIST, EINVAL, ENOENT, ENOTEMPTY};
use serde_json::{Value, json};

use crate::bring::*;
use crate::commands::*;
use crate::common::Volfs;

#[test]
fn c6_malformed_snapshot_commands_are_einval_and_nothing_is_changed() {
    let volfs = quiet();
    let uuid = &volfs.job("a", &["d"], "1M")[0];
    for command in ["snapshot", "snapshot .x", "revert a/b", "snapshot s t"] {
        assert_eq!(tell(&volfs, uuid, command), EINVAL, "{command}");
        assert_eq!(volfs.write("jobs/a/control", command), EINVAL, "{command}");
    }
    assert_eq!(of(&volfs, uuid, "status"), "detached");
    assert_eq!(volfs.ok(&format!("ls $R/volumes/{uuid}/snapshots")), "");
    assert!(error_of(&volfs, uuid).contains("snapshot"));
}

fn overwrite(volfs: &Volfs, uuid: &str, text: &str) {
    use std::os::unix::fs::FileExt;
    let file = OpenOptions::new().write(true).open(stored(volfs, uuid).join("data.img")).unwrap();
    file.write_all_at(text.as_bytes(), 0).unwrap();
}

fn starts_with(volfs: &Volfs, uuid: &str, text: &str) -> bool {
    fs::read(stored(volfs, uuid).join("data.img")).unwrap().starts_with(text.as_bytes())
}

#[test]
fn c6_c7_c8_a_snapshot_of_a_loop_volume_is_flushed_listed_gone_back_to_and_deleted() {
    let volfs = quiet();
    let uuid = &volfs.job("a", &["d"], "1M")[0];
    done(&volfs, uuid, "attach");
    let block = volfs.path(format!("volumes/{uuid}/block"));
    let mut user = OpenOptions::new().write(true).open(&block).unwrap();
    user.write_all(b"then").unwrap();
    assert_eq!(tell(&volfs, uuid, "snapshot s"), EBUSY, "open for writing");
    done(&volfs, uuid, "snapshot torn crash");
    drop(user);
    done(&volfs, uuid, "delete-snapshot torn");
    done(&volfs, uuid, "snapshot s");
    assert_eq!(of(&volfs, uuid, "status"), "attached", "it stays served");
    assert_eq!(tell(&volfs, uuid, "snapshot s"), EEXIST);
    let shown: Value = serde_json::from_str(&volfs.read(format!("volumes/{uuid}/snapshots/s")).unwrap()).unwrap();
    assert_eq!((&shown["ours"], &shown["state"], &shown["size"]), (&json!(true), &json!("Ready"), &json!(1 << 20)));
    assert_eq!(tell(&volfs, uuid, "revert s"), EBUSY, "attached");
    done(&volfs, uuid, "resize 2M");
    done(&volfs, uuid, "detach");
    assert!(starts_with(&volfs, uuid, "then"), "flushed before it was taken");
    overwrite(&volfs, uuid, "now!");
    done(&volfs, uuid, "revert s");
    assert!(starts_with(&volfs, uuid, "then"));
    assert_eq!(of(&volfs, uuid, "size"), (1 << 20).to_string(), "the snapshot's size");
    done(&volfs, uuid, "attach");
    assert_eq!(volfs.ok(&format!("head -c 4 {}", block.display())), "then");
    done(&volfs, uuid, "detach");
    for command in [format!("delete {uuid}"), format!("release {uuid}")] {
        assert_eq!(tell(&volfs, uuid, &command), ENOTEMPTY, "{command}");
    }
    done(&volfs, uuid, "delete-snapshot s");
    for command in ["revert s", "delete-snapshot s"] {
        assert_eq!(tell(&volfs, uuid, command), ENOENT, "{command}");
    }
    assert_eq!(fs::read_dir(stored(&volfs, uuid).join("snapshots")).unwrap().count(), 0);
    done(&volfs, uuid, &format!("delete {uuid}"));
}

#[test]
fn c6_a_foreign_snapshot_of_a_loop_volume_is_listed_and_never_touched() {
    let volfs = quiet();
    let uuid = &volfs.job("a", &["d"], "1M")[0];
    done(&volfs, uuid, "snapshot s");
    // Another one's, as another daemon over this store takes it.
    let holder = stored(&volfs, uuid).join("snapshots");
    let ours = fs::read_dir(&holder).unwrap().next().unwrap().unwrap().path();
    let theirs = holder.join(FOREIGN.split('/').next().unwrap());
    volfs.ok(&format!("cp -r {} {}", ours.display(), theirs.display()));
    let mut about: Value = serde_json::from_slice(&fs::read(theirs.join("meta.json")).unwrap()).unwrap();
    about["id"] = json!(FOREIGN.split('/').next().unwrap());
    about["name"] = json!("theirs");
    fs::write(theirs.join("meta.json"), about.to_string()).unwrap();
    done(&volfs, uuid, "reconcile");
    assert_eq!(volfs.ok(&format!("ls $R/volumes/{uuid}/snapshots")), "s\ntheirs");
    assert!(volfs.read(format!("volumes/{uuid}/snapshots/theirs")).unwrap().contains("\"ours\":false"));
    for command in ["revert theirs", "delete-snapshot theirs"] {
        assert_eq!(tell(&volfs, uuid, command), ENOENT, "{command}");
    }
    done(&volfs, uuid, "delete-snapshot s");
    assert_eq!(tell(&volfs, uuid, &format!("delete {uuid}")), EBUSY, "it would go with it");
    assert!(error_of(&volfs, uuid).contains("theirs"), "{}", error_of(&volfs, uuid));
    assert!(theirs.join("data.img").exists());
}

#[test]
fn c6_a_set_of_loop_snapshots_is_of_all_volumes_or_of_none() {
    let mut volfs = quiet();
    let uuids = volfs.job("a", &["d", "e", "f"], "1M");
    for uuid in &uuids {
        overwrite(&volfs, uuid, uuid);
    }
    let job = |volfs: &Volfs, command: &str| volfs.write("jobs/a/control", command);
    assert_eq!(job(&volfs, "snapshot set"), 0, "{}", volfs.log());
    assert_eq!(job(&volfs, "snapshot set"), EEXIST);
    for uuid in &uuids {
        overwrite(&volfs, uuid, "later");
    }
    assert_eq!(job(&volfs, "revert set"), 0, "{}", volfs.log());
    assert!(uuids.iter().all(|uuid| starts_with(&volfs, uuid, uuid)));
    assert_eq!(tell(&volfs, &uuids[1], "delete-snapshot set"), 0);
    overwrite(&volfs, &uuids[0], "later");
    assert_eq!(job(&volfs, "revert set"), ENOENT, "one of them lacks it");
    assert!(starts_with(&volfs, &uuids[0], "later"), "and so none is reverted");
    assert_eq!(job(&volfs, "delete-snapshot set"), 0);
    // One has no room: the others lose theirs again.
    volfs.terminate();
    fs::write(volfs.scratch("config.toml"), format!("{QUIET}[loop]\ncapacity = \"5M\"\n")).unwrap();
    volfs.launch();
    assert_eq!(job(&volfs, "snapshot set"), libc::ENOSPC, "{}", volfs.log());
    for uuid in &uuids {
        assert_eq!(volfs.ok(&format!("ls $R/volumes/{uuid}/snapshots")), "");
        let holder = stored(&volfs, uuid).join("snapshots");
        assert_eq!(fs::read_dir(&holder).map_or(0, |all| all.count()), 0);
    }
}
