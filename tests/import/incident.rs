//! The incident that volfs was made for: cleaning up `pgtest2` deleted a volume of `PGWINTESTBIOS`.

use std::fs;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use crate::common::Volfs;
use crate::record::ok;
use crate::server::{Old, Schema};

const OLD_IDS: [&str; 4] = [
    "11111111-1111-4111-8111-111111111111",
    "22222222-2222-4222-8222-222222222222",
    "33333333-3333-4333-8333-333333333333",
    "55555555-5555-4555-8555-555555555555",
];

/// Each file of a volume with its bytes, by the provider's own word.
fn stored(store: &Path, id: &str) -> Vec<(PathBuf, Vec<u8>)> {
    let mut files: Vec<PathBuf> =
        fs::read_dir(store.join("volumes").join(id)).unwrap().map(|e| e.unwrap().path()).collect();
    files.sort();
    files.into_iter().map(|path| (path.clone(), fs::read(path).unwrap())).collect()
}

/// Volumes of before, which carry no mark: made by another volfs, and given up by it. They take the
/// places of OLD_IDS in the old database. Answers who has their store, the configuration for it, the
/// store, and their ids.
fn volumes_of_before(old: &Old) -> (Volfs, String, PathBuf, Vec<String>) {
    let mut maker = Volfs::prepare(&[], "");
    let store = maker.scratch("store");
    let config = format!("[loop]\ndir = \"{}\"\n", store.display());
    fs::write(maker.scratch("config.toml"), &config).unwrap();
    maker.launch();
    let ids = maker.job("old", &["pgtest2", "pgwin", "quad", "clean"], "1M");
    for id in &ids {
        assert_eq!(maker.write(format!("volumes/{id}/control"), &format!("release {id}")), 0, "{}", maker.log());
    }
    maker.terminate();
    // As row 2 of ossea_volumes, so as in the stale link of pgtest2's disk.
    for (then, now) in OLD_IDS.iter().zip(&ids) {
        old.sql(&format!(
            "SET FOREIGN_KEY_CHECKS = 0;
             UPDATE ossea_volumes SET volume_id = '{now}' WHERE volume_id = '{then}';
             UPDATE vm_disks SET cloudstack_volume_uuid = '{now}' WHERE cloudstack_volume_uuid = '{then}';
             UPDATE device_mappings SET volume_uuid = '{now}' WHERE volume_uuid = '{then}';
             UPDATE volume_operations SET volume_id = '{now}' WHERE volume_id = '{then}';"
        ));
    }
    (maker, config, store, ids)
}

#[test]
fn predecessor_61_cleaning_pgtest2_leaves_the_volume_of_pgwintestbios_alone() {
    let Some(old) = Old::make(Schema::Before) else { return };
    let (_maker, config, store, ids) = volumes_of_before(&old);
    // A disk of pgtest2 that nothing contradicts: its destroy has something to do.
    old.sql("INSERT INTO vm_disks (job_id, disk_id, ossea_volume_id) VALUES ('job-pgtest2', 'disk-2001', 5)");
    let [own, victim, _, clean] = [&ids[0], &ids[1], &ids[2], &ids[3]];

    let mut volfs = Volfs::prepare(&[], &config);
    let dump = old.dumped();
    let said = ok(&volfs, &[dump.to_str().unwrap()]);
    let line = format!("echo \"claim {victim} disk-2000\" > jobs/job-pgwin/control");
    assert!(said.contains(&format!("job-pgtest2/disk-2001: volume {clean}")), "{said}");
    assert!(said.contains(&line), "{said}");
    let before: Vec<_> = [own, victim].map(|id| stored(&store, id)).into();
    volfs.launch();
    volfs.write("control", "reconcile");
    for id in [own, victim] {
        volfs.until("the unclaimed volume", || volfs.path(format!("unclaimed/{id}")).exists());
        assert!(!volfs.path(format!("unclaimed/{id}/control")).exists());
    }
    assert_eq!(before, [own, victim].map(|id| stored(&store, id)), "nothing was marked");
    assert!(fs::read_dir(volfs.path("jobs/job-pgwin/disks")).unwrap().next().is_none());

    // The line that the report gave, as it stands.
    volfs.ok(&format!("cd \"$R\" && {line}"));
    let disk = "jobs/job-pgwin/disks/disk-2000";
    assert_eq!(volfs.write(format!("{disk}/control"), "attach"), 0, "{}", volfs.log());
    let block = fs::OpenOptions::new().write(true).open(volfs.path(format!("{disk}/block"))).unwrap();
    block.write_all_at(b"the data of PGWINTESTBIOS", 4096).unwrap();
    block.sync_all().unwrap();
    drop(block);
    let facts = || {
        let values = ["status", "device", "incarnation", "owner", "size", "name"];
        let told = values.map(|file| volfs.value(format!("{disk}/{file}")));
        (told.to_vec(), stored(&store, victim), stored(&store, own))
    };
    let untouched = facts();
    assert_eq!(untouched.0[0], "attached");

    let errno = volfs.write("jobs/job-pgtest2/control", "destroy job-pgtest2");
    assert_eq!(facts(), untouched, "errno {errno}\n{}", volfs.log());
    assert_eq!(errno, 0, "{}", volfs.log());
    assert!(!volfs.path("jobs/job-pgtest2").exists());
    assert!(!store.join("volumes").join(clean).exists(), "its own volume went");
    volfs.write("control", "reconcile");
    assert_eq!(facts(), untouched);
    assert!(volfs.path(format!("unclaimed/{own}")).exists());
    let text = String::from_utf8(fs::read(volfs.path(format!("{disk}/block"))).unwrap()[4096..4096 + 25].into());
    assert_eq!(text.unwrap(), "the data of PGWINTESTBIOS");
    // Nor does the record forget it.
    volfs.terminate();
    volfs.launch();
    assert_eq!(volfs.value(format!("{disk}/size")), untouched.0[4]);
}

#[test]
fn of_two_hosts_that_import_one_dump_one_gets_each_volume_and_the_other_sees_a_conflict() {
    let Some(old) = Old::make(Schema::Before) else { return };
    let (_maker, config, store, ids) = volumes_of_before(&old);
    old.sql("INSERT INTO vm_disks (job_id, disk_id, ossea_volume_id) VALUES ('job-pgtest2', 'disk-2001', 5)");
    let dump = old.dumped();
    let mut hosts = [Volfs::prepare(&[], &config), Volfs::prepare(&[], &config)];
    for host in &hosts {
        ok(host, &[dump.to_str().unwrap()]);
    }
    for host in &mut hosts {
        host.launch();
    }
    // Both are at it at the same time.
    let both = |command: &str| {
        std::thread::scope(|threads| {
            let told: Vec<_> = hosts.iter().map(|host| threads.spawn(|| host.write("control", command))).collect();
            told.into_iter().map(|t| t.join().unwrap()).collect::<Vec<_>>()
        })
    };
    both("reconcile");
    let mark = |id: &str| {
        let meta: serde_json::Value =
            serde_json::from_slice(&fs::read(store.join("volumes").join(id).join("meta.json")).unwrap()).unwrap();
        meta["mark"].as_str().unwrap_or_default().to_owned()
    };
    let shared: Vec<&String> = ids
        .iter()
        .filter(|id| hosts[0].read(format!("volumes/{id}/info.json")).is_ok_and(|t| t.contains("job-")))
        .collect();
    assert!(shared.iter().any(|id| **id == ids[3]), "what nothing contradicts was imported: {shared:?}");
    for id in shared {
        let statuses = || hosts.each_ref().map(|host| host.value(format!("volumes/{id}/status")));
        let settled = || {
            let now = statuses();
            now.contains(&"detached".into()) && now.contains(&"conflict".into())
        };
        hosts[0].until("one winner", settled);
        let [winner, loser] = match statuses()[0] == "detached" {
            true => [&hosts[0], &hosts[1]],
            false => [&hosts[1], &hosts[0]],
        };
        let won = mark(id);
        for host in [winner, loser] {
            assert_eq!(host.value(format!("volumes/{id}/owner")), won);
        }
        // Nothing that the loser is told touches it, and what it gives up stays the winner's.
        for command in ["attach", "resize 2M", "snapshot s", &format!("delete {id}")] {
            let errno = loser.write(format!("volumes/{id}/control"), command);
            assert!([libc::EPERM, libc::EBUSY].contains(&errno), "{command}: errno {errno}");
        }
        assert_eq!(loser.write(format!("volumes/{id}/control"), &format!("release {id}")), 0, "{}", loser.log());
        assert_eq!(mark(id), won);
        assert_eq!(winner.write(format!("volumes/{id}/control"), "attach"), 0, "{}", winner.log());
        assert_eq!(winner.write(format!("volumes/{id}/control"), "detach"), 0, "{}", winner.log());
    }
}
