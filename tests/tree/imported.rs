//! Volumes that an import left in the record without a mark: what the next mount makes of them.

use std::fs;

use super::common::Volfs;
use super::sweep::{Done, Either, Point, data, history, in_flight, prepared};

fn meta(volfs: &Volfs, uuid: &str) -> serde_json::Value {
    let text = fs::read_to_string(data(volfs, uuid).with_file_name("meta.json")).unwrap();
    serde_json::from_str(&text).unwrap()
}

/// While no daemon runs: record and provider as an import finds and leaves them.
fn import(volfs: &Volfs, uuid: &str, mark: Option<&str>) {
    let mut told = meta(volfs, uuid);
    told["mark"] = mark.into();
    told["job"] = serde_json::Value::Null;
    told["disk"] = serde_json::Value::Null;
    fs::write(data(volfs, uuid).with_file_name("meta.json"), told.to_string()).unwrap();
    let db = rusqlite::Connection::open(volfs.state().join("volfs.db")).unwrap();
    for sql in [
        "UPDATE vm_disks SET epoch = 0 WHERE ossea_volume_id = (SELECT id FROM ossea_volumes WHERE volume_id = ?1)",
        "UPDATE ossea_volumes SET status = 'unknown', cloud_state = '', serial = '' WHERE volume_id = ?1",
    ] {
        assert_eq!(db.execute(sql, [uuid]).unwrap(), 1);
    }
    db.execute("DELETE FROM device_mappings WHERE volume_uuid = ?1", [uuid]).unwrap();
}

fn settled(volfs: &Volfs) {
    volfs.until("settled volumes", || {
        in_flight(volfs).is_empty() && !volfs.read("table").unwrap().contains("\tunknown\t")
    });
}

/// The mark in the provider is the one that the tree shows.
#[track_caller]
fn is_marked(volfs: &Volfs, uuid: &str) {
    let owner = volfs.value(format!("volumes/{uuid}/owner"));
    let epoch = owner.split_once('/').unwrap().1;
    assert_ne!(epoch, "0");
    assert_eq!(meta(volfs, uuid)["mark"], owner.as_str());
}

#[test]
fn v7_imported_volumes_are_claimed_by_the_next_mount_and_are_where_they_were() {
    let mut volfs = Volfs::start();
    let uuids = volfs.job("j", &["here", "free", "theirs"], "1M");
    let [here, free, theirs] = [0, 1, 2].map(|n| uuids[n].as_str());
    assert_eq!(volfs.write(format!("volumes/{here}/control"), "attach"), 0, "{}", volfs.log());
    let was = volfs.value(format!("volumes/{here}/incarnation"));
    volfs.terminate();
    let another = "5f8b5d4e-0000-4000-8000-000000000001/3";
    import(&volfs, here, None);
    import(&volfs, free, None);
    import(&volfs, theirs, Some(another));
    volfs.launch();
    // A command does not have to wait for the first round.
    assert_eq!(volfs.write(format!("volumes/{free}/control"), "attach"), 0, "{}", volfs.log());
    settled(&volfs);
    for (uuid, status) in [(here, "attached"), (free, "attached"), (theirs, "conflict")] {
        assert_eq!(volfs.value(format!("volumes/{uuid}/status")), status, "{}", volfs.log());
    }
    assert_eq!(volfs.value(format!("volumes/{here}/incarnation")), was, "another disk than before");
    is_marked(&volfs, here);
    is_marked(&volfs, free);
    let text = volfs.read("history").unwrap();
    let claims: Vec<&str> = text.lines().filter(|l| l.contains("\tclaim\t")).collect();
    assert_eq!(claims.len(), 2, "{text}");
    for disk in ["here", "free"] {
        let row = claims.iter().find(|l| l.contains(&format!("\tj\t{disk}\t"))).unwrap_or_else(|| panic!("{text}"));
        assert!(row.contains("\tdone\t") && row.contains("volfs"), "{row}");
    }
    // What another record has marked is not ours to change, and is given up as it is.
    for command in ["attach", "detach", "resize 2M", &format!("delete {theirs}"), "disk other"] {
        assert_ne!(volfs.write(format!("volumes/{theirs}/control"), command), 0, "{command}");
    }
    assert_ne!(volfs.write("jobs/j/control", "destroy j"), 0);
    assert_eq!(volfs.value(format!("volumes/{theirs}/owner")), another);
    assert!(volfs.read("problems").unwrap().contains(another));
    assert_eq!(volfs.write(format!("volumes/{theirs}/control"), &format!("release {theirs}")), 0);
    assert_eq!(meta(&volfs, theirs)["mark"], another);
    // And the rest is ours like any other.
    assert_eq!(volfs.write("jobs/j/control", "detach"), 0, "{}", volfs.log());
    assert_eq!(volfs.write("jobs/j/control", "destroy j"), 0, "{}", volfs.log());
    assert!(data(&volfs, theirs).exists());
}

#[test]
fn crash_at_every_step_of_an_imported_volumes_claim_ends_with_one_mark_and_its_status() {
    let points: &[Point] = &[
        ("store.before-commit", 1, Either),
        ("store.after-commit", 1, Either),
        ("claim.journaled", 1, Either),
        ("imported.before-mark", 1, Either),
        ("loop.mark.before", 1, Either),
        ("loop.mark.after", 1, Done),
        ("imported.after-mark", 1, Done),
        ("claim.acted", 1, Done),
        ("store.before-commit", 2, Either),
        ("store.after-commit", 2, Either),
        ("claim.recorded", 1, Done),
    ];
    let (mut volfs, arms) = prepared(points);
    volfs.launch();
    let uuid = volfs.job("j", &["d"], "1M").remove(0);
    for (point, hit, left) in points {
        let at = format!("{point} #{hit}");
        let past = history(&volfs, "j").len();
        volfs.terminate();
        import(&volfs, &uuid, None);
        let arm = arms.join(point);
        fs::write(&arm, hit.to_string()).unwrap();
        // It dies during its start, or right after it.
        if volfs.try_launch().is_ok() {
            assert_eq!(volfs.wait(), -libc::SIGKILL, "{at} was not reached\n{}", volfs.log());
        }
        fs::remove_file(&arm).unwrap();
        volfs.launch();
        settled(&volfs);
        assert_eq!(volfs.value(format!("volumes/{uuid}/status")), "detached", "{at}\n{}", volfs.log());
        is_marked(&volfs, &uuid);
        let rows = history(&volfs, "j").split_off(past);
        assert_eq!(rows.last(), Some(&("claim".to_owned(), "done".to_owned())), "{at}: {rows:?}");
        // What the cloud had done is finished, and not done a second time.
        assert!(rows.len() == 1 || *left == Either, "{at}: {rows:?}");
        assert!(rows.len() <= 2, "{at}: {rows:?}");
    }
}
