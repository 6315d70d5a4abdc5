//! `volfs adopt`, `backup`, `restore` and `rebuild`, as an operator gives them.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;

use crate::common::{Volfs, finish};
use crate::ground::{Ground, copy, copy_database, meta, ok, program, run};

const EROFS: i32 = libc::EROFS;

/// Every file of a directory with its content, but for the lock.
fn contents(dir: &Path) -> BTreeMap<String, Vec<u8>> {
    let files = fs::read_dir(dir).unwrap().map(|e| e.unwrap()).filter(|e| e.file_type().unwrap().is_file());
    let named = files.map(|e| (e.file_name().into_string().unwrap(), fs::read(e.path()).unwrap()));
    named.filter(|(name, _)| name != "lock").collect()
}

/// Which volume each disk of each job is.
fn disks(volfs: &Volfs) -> BTreeMap<(String, String), String> {
    let mut found = BTreeMap::new();
    for job in fs::read_dir(volfs.path("jobs")).unwrap() {
        let job = job.unwrap().file_name().into_string().unwrap();
        for disk in fs::read_dir(volfs.path(format!("jobs/{job}/disks"))).unwrap() {
            let disk = disk.unwrap();
            let id = fs::read_link(disk.path()).unwrap().file_name().unwrap().to_str().unwrap().to_owned();
            found.insert((job.clone(), disk.file_name().into_string().unwrap()), id);
        }
    }
    found
}

fn control(id: &str) -> String {
    format!("volumes/{id}/control")
}

fn each_mark_once(ground: &Ground) {
    let marks: Vec<String> = ground.ids().iter().filter_map(|id| ground.mark(id)).collect();
    assert_eq!(marks.iter().collect::<BTreeSet<_>>().len(), marks.len(), "{marks:?}");
}

/// Numbers of operations in `history`, oldest first.
fn numbers(volfs: &Volfs) -> Vec<i64> {
    let mut all: Vec<i64> = fs::read_dir(volfs.path("operations"))
        .unwrap()
        .map(|e| e.unwrap().file_name().into_string().unwrap().parse().unwrap())
        .collect();
    all.sort();
    all
}

#[test]
fn adopt_wants_exactly_one_of_its_two_ways_and_no_daemon() {
    let volfs = Volfs::start();
    for args in [&["adopt"][..], &["adopt", "--this-host", "--new"]] {
        let said = run(&volfs, args);
        assert!(said.status == 2 && said.err.contains("--this-host") && said.err.contains("--new"), "{said:?}");
    }
    let before = contents(&volfs.state());
    for args in [&["adopt", "--this-host"][..], &["adopt", "--new"], &["rebuild"], &["restore", "/dev/null"]] {
        let said = run(&volfs, args);
        assert!(said.status == 1 && said.err.contains("is in use by pid"), "{args:?}: {said:?}");
    }
    assert_eq!(contents(&volfs.state()), before);
}

/// What an operator does with a record that is older than its volumes.
fn adopted_here(mut ground: Ground) {
    let size = ground.size();
    let ids = ground.volfs().job("j", &["stays", "moved", "gone"], size);
    fs::create_dir(ground.volfs().path("jobs/k")).unwrap();
    assert_eq!(ground.volfs().write("jobs/j/disks/stays/control", "attach"), 0);
    let device = ground.volfs().value("jobs/j/disks/stays/device");
    ground.kill();
    let old = ground.volfs().scratch("old");
    copy(&ground.volfs().state(), &old);
    ground.volfs_mut().launch();
    assert_eq!(ground.volfs().write(control(&ids[1]), "move k"), 0);
    assert_eq!(ground.volfs().write(control(&ids[2]), &format!("delete {}", ids[2])), 0);
    let later = ground.volfs().job("k", &["later"], size).remove(0);
    let highest = *numbers(ground.volfs()).last().unwrap();
    ground.kill();
    copy_database(&old, &ground.volfs().state());
    let before = ground.book();
    // Nobody has to have started it first.
    let told = ok(ground.volfs(), &["adopt", "--this-host"]);
    assert_eq!(ground.book(), before, "adopting changes nothing in the provider");
    assert!(told.contains("3 volumes in 2 jobs: unknown"), "{told}");
    for id in [&ids[1], &ids[2], &later] {
        assert!(told.lines().any(|line| line.contains(id)), "{id}: {told}");
    }
    ground.volfs_mut().launch();
    let volfs = ground.volfs();
    volfs.write("control", "reconcile");
    assert_eq!(volfs.value("jobs/j/disks/stays/status"), "attached", "{}", volfs.log());
    assert_eq!(volfs.value("jobs/j/disks/stays/device"), device);
    assert_eq!(volfs.value("jobs/j/disks/moved/status"), "conflict");
    assert_eq!(volfs.value("jobs/j/disks/gone/status"), "missing");
    assert!(volfs.path(format!("unclaimed/{later}")).exists());
    let history = volfs.read("history").unwrap();
    assert!(history.contains("set"), "{history}");
    // What was lost is taken back by hand, with new marks above all that there were.
    assert_eq!(volfs.write(control(&ids[1]), &format!("release {}", ids[1])), 0);
    for (id, disk) in [(&ids[1], "moved"), (&later, "later")] {
        assert_eq!(volfs.write("jobs/k/control", &format!("claim {id} {disk}")), 0, "{}", volfs.log());
        assert_eq!(volfs.value(format!("jobs/k/disks/{disk}/status")), "detached");
    }
    volfs.job("k", &["new"], size);
    each_mark_once(&ground);
    let numbers = numbers(ground.volfs());
    assert!(numbers.iter().filter(|n| **n > highest).count() >= 4, "above {highest}: {numbers:?}");
    assert_eq!(ground.volfs().write("jobs/j/disks/stays/control", "detach"), 0, "{}", ground.volfs().log());
    // The copy that was adopted is the record now: the next start finds nothing wrong with it.
    ground.kill();
    ground.volfs_mut().launch();
    assert!(!ground.volfs().read("health").unwrap().contains("read-only"));
}

#[test]
fn an_adopted_record_goes_on_above_all_that_it_does_not_remember_on_loops() {
    adopted_here(Ground::on_loops(&[]));
}

#[test]
fn an_adopted_record_goes_on_above_all_that_it_does_not_remember_over_a_cloud() {
    adopted_here(Ground::on_cloud(&[]));
}

#[test]
fn what_had_not_ended_is_interrupted_by_an_adoption_and_nothing_is_settled() {
    let mut ground = Ground::on_loops(&["loop.mark.before"]);
    let id = ground.volfs().job("j", &["d"], "1M").remove(0);
    fs::create_dir(ground.volfs().path("jobs/k")).unwrap();
    fs::write(ground.arms().join("loop.mark.before"), "").unwrap();
    assert_ne!(ground.volfs().write(control(&id), "move k"), 0);
    ground.volfs_mut().wait();
    fs::remove_file(ground.arms().join("loop.mark.before")).unwrap();
    let before = ground.book();
    let told = ok(ground.volfs(), &["adopt", "--this-host"]);
    assert!(told.contains("`move k` had not ended: interrupted"), "{told}");
    ground.volfs_mut().launch();
    assert_eq!(ground.book(), before);
    let history = ground.volfs().read("jobs/j/history").unwrap();
    assert!(history.lines().any(|l| l.contains("\tmove\t") && l.contains("\tinterrupted\t")), "{history}");
    assert_eq!(ground.volfs().write(control(&id), "move k"), 0, "{}", ground.volfs().log());
}

#[test]
fn a_record_is_not_adopted_while_the_provider_does_not_tell_its_marks() {
    let mut ground = Ground::on_loops(&[]);
    ground.volfs().job("j", &["d"], "1M");
    ground.kill();
    let (store, away) = (ground.volfs().scratch("store"), ground.volfs().scratch("away"));
    fs::rename(store.join("volumes"), &away).unwrap();
    for args in [&["adopt", "--this-host"][..], &["rebuild"]] {
        let said = run(ground.volfs(), args);
        assert!(said.status == 1, "{said:?}");
    }
    fs::rename(&away, store.join("volumes")).unwrap();
    ground.volfs_mut().launch();
    let history = ground.volfs().read("history").unwrap();
    assert_eq!(history.lines().count(), 1 + 2, "mkdir and create, and no adoption: {history}");
    assert_eq!(ground.volfs().value("jobs/j/disks/d/status"), "detached");
}

fn adopted_as_new(mut ground: Ground) {
    let ids = ground.volfs().job("j", &["a", "b"], ground.size());
    assert_eq!(ground.volfs().write("jobs/j/disks/a/control", "attach"), 0);
    ground.second.terminate();
    ground.kill();
    copy(&ground.volfs().state(), &ground.second.state());
    let before = ground.book();
    let told = ok(&ground.second, &["adopt", "--new"]);
    assert!(told.contains("2 volumes are this record's no more"), "{told}");
    ground.second.launch();
    assert!(!ground.second.read("health").unwrap().contains("read-only"));
    assert_eq!(disks(&ground.second), BTreeMap::new());
    assert_eq!(ground.second.value("jobs/j/status"), "idle");
    for id in &ids {
        assert_eq!(ground.second.write(control(id), &format!("delete {id}")), libc::ENOENT);
        assert_eq!(ground.second.write("jobs/j/control", &format!("claim {id} x")), libc::EBUSY);
    }
    for command in ["attach", "detach", "destroy j"] {
        assert_eq!(ground.second.write("jobs/j/control", command), 0, "{command}");
    }
    ground.second.write("control", "reconcile");
    assert_eq!(ground.book(), before, "the clone changes nothing of the original's");
    ground.volfs_mut().launch();
    assert_eq!(ground.volfs().value("jobs/j/disks/a/status"), "attached", "{}", ground.volfs().log());
    assert_eq!(ground.volfs().write("jobs/j/disks/a/control", "detach"), 0);
    ground.second.job("own", &["d"], ground.size());
    each_mark_once(&ground);
    let record = |id: &str| ground.mark(id).unwrap().split('/').next().unwrap().to_owned();
    let own = disks(&ground.second)[&("own".to_owned(), "d".to_owned())].clone();
    assert_ne!(record(&own), record(&ids[0]));
}

#[test]
fn a_clone_that_is_adopted_as_new_owns_nothing_on_loops() {
    adopted_as_new(Ground::on_loops(&[]));
}

#[test]
fn a_clone_that_is_adopted_as_new_owns_nothing_over_a_cloud() {
    adopted_as_new(Ground::on_cloud(&[]));
}

#[test]
fn a_backup_is_taken_while_commands_run_and_is_one_moment_of_the_record() {
    const ROUNDS: usize = 12;
    let volfs = Volfs::start();
    volfs.job("j", &["d"], "1M");
    let writer = volfs
        .sh_spawn(&["dash"], "i=0; while [ $i -lt 400 ]; do echo v$i > $R/jobs/j/vm_name || exit 1; i=$((i+1)); done");
    volfs.until("first value", || volfs.value("jobs/j/vm_name").starts_with('v'));
    for n in 0..ROUNDS {
        let file = volfs.scratch(&format!("backup-{n}"));
        let told = ok(&volfs, &["backup", file.to_str().unwrap()]);
        assert!(told.contains("holds the record"), "{told}");
        assert_eq!(fs::metadata(&file).unwrap().permissions().mode() & 0o7777, 0o600);
        let db = rusqlite::Connection::open_with_flags(
            format!("file:{}?immutable=1", file.display()),
            rusqlite::OpenFlags::SQLITE_OPEN_READ_ONLY | rusqlite::OpenFlags::SQLITE_OPEN_URI,
        )
        .unwrap();
        let one = |sql: &str| db.query_row(sql, [], |r| r.get::<_, String>(0)).unwrap();
        assert_eq!(one("PRAGMA integrity_check"), "ok");
        // The value and the operation that set it are of one commit.
        assert_eq!(
            one("SELECT 'v' || (count(*) - 1) FROM volume_operations WHERE verb = 'set'"),
            one("SELECT vm_name FROM jobs")
        );
        let again = run(&volfs, &["backup", file.to_str().unwrap()]);
        assert!(again.status == 1 && again.err.contains("there already"), "{again:?}");
    }
    let said = finish(writer);
    assert_eq!(said.status, 0, "no commit waited for a backup: {said:?}");
    let left: Vec<String> = fs::read_dir(volfs.scratch("."))
        .unwrap()
        .map(|e| e.unwrap().file_name().into_string().unwrap())
        .filter(|name| name.contains("part"))
        .collect();
    assert_eq!(left, [""; 0]);
}

#[test]
fn a_restored_record_waits_for_its_adoption_and_the_other_one_is_kept() {
    let mut ground = Ground::on_loops(&[]);
    let ids = ground.volfs().job("j", &["a", "b"], "1M");
    let file = ground.volfs().scratch("backup");
    ok(ground.volfs(), &["backup", file.to_str().unwrap()]);
    assert_eq!(ground.volfs().write(control(&ids[1]), &format!("release {}", ids[1])), 0);
    ground.kill();
    let lost = fs::read(ground.volfs().state().join("volfs.db-wal")).unwrap();
    assert!(!lost.is_empty(), "a kill leaves a WAL");
    let told = ok(ground.volfs(), &["restore", file.to_str().unwrap()]);
    let aside = told.lines().find_map(|l| l.strip_prefix("the one that was there is ")).unwrap().to_owned();
    assert_eq!(fs::read(format!("{aside}-wal")).unwrap(), lost, "with all that it knew");
    assert!(told.contains("adopt --this-host"), "{told}");
    let before = ground.book();
    ground.volfs_mut().launch();
    let health = ground.volfs().read("health").unwrap();
    assert!(health.starts_with("down\n") && health.contains("adopt --this-host"), "{health}");
    for id in &ids {
        assert_eq!(ground.volfs().write(control(id), "attach"), EROFS);
    }
    ground.volfs_mut().terminate();
    assert_eq!(ground.book(), before);
    ok(ground.volfs(), &["adopt", "--this-host"]);
    ground.volfs_mut().launch();
    assert_eq!(ground.volfs().value("jobs/j/disks/a/status"), "detached");
    assert_eq!(ground.volfs().value("jobs/j/disks/b/status"), "conflict");
    assert_eq!(ground.book(), before);
    // What was kept can be put back in turn.
    ground.kill();
    let said = run(ground.volfs(), &["restore", &aside]);
    assert!(said.status == 1 && said.err.contains("-wal lies beside it"), "{said:?}");
}

/// Also where nothing else would tell: the newest backup, or another directory.
#[test]
fn a_restored_record_is_behind_wherever_it_is_put() {
    let mut ground = Ground::on_loops(&[]);
    ground.volfs().job("j", &["a"], "1M");
    ground.volfs_mut().terminate();
    let file = ground.volfs().scratch("backup");
    ok(ground.volfs(), &["backup", file.to_str().unwrap()]);
    for fresh in [false, true] {
        if fresh {
            fs::remove_dir_all(ground.volfs().state()).unwrap();
        }
        ok(ground.volfs(), &["restore", file.to_str().unwrap()]);
        ground.volfs_mut().launch();
        assert!(ground.volfs().read("health").unwrap().starts_with("down\n"), "fresh: {fresh}");
        assert_eq!(ground.volfs().write("jobs/j/control", "create b 1M"), EROFS);
        ground.volfs_mut().terminate();
    }
}

#[test]
fn what_is_no_sound_record_is_not_restored_and_nothing_is_touched() {
    let mut volfs = Volfs::start();
    volfs.job("j", &["a"], "1M");
    volfs.terminate();
    let good = volfs.scratch("good");
    ok(&volfs, &["backup", good.to_str().unwrap()]);
    let bytes = fs::read(&good).unwrap();
    let before = contents(&volfs.state());
    let mut newer = bytes.clone();
    newer[60..64].copy_from_slice(&9u32.to_be_bytes());
    let mut foreign = bytes.clone();
    foreign[68..72].copy_from_slice(&7u32.to_be_bytes());
    let mut holed = bytes.clone();
    holed[4096..8192].fill(0);
    let cases: [(&str, &[u8], &str); 6] = [
        ("empty", b"", "is empty"),
        (
            "text",
            b"not a record, but long enough to have a header of 100 bytes .........................................",
            "not an SQLite database",
        ),
        ("short", &bytes[..bytes.len() - 4096], "restore it from a backup"),
        ("newer", &newer, "a newer volfs made it (schema 9"),
        ("foreign", &foreign, "something else"),
        ("holed", &holed, "damaged"),
    ];
    for (name, text, words) in cases {
        let file = volfs.scratch(name);
        fs::write(&file, text).unwrap();
        let said = run(&volfs, &["restore", file.to_str().unwrap()]);
        assert!(said.status == 1 && said.err.contains(file.to_str().unwrap()), "{name}: {said:?}");
        assert!(said.err.contains(words) || name == "holed" && said.err.contains("cannot read"), "{name}: {said:?}");
        assert_eq!(contents(&volfs.state()), before, "{name}");
    }
    let said = run(&volfs, &["restore", "/no/such/file"]);
    assert!(said.status == 1 && said.err.contains("/no/such/file"), "{said:?}");
    assert_eq!(contents(&volfs.state()), before);
}

/// From a deleted record: the same jobs and disks, and nothing else.
fn rebuilt(mut ground: Ground) {
    let size = ground.size();
    ground.volfs().job("web-1", &["os", "data"], size);
    ground.volfs().job("db", &["os"], size);
    fs::create_dir(ground.volfs().path("jobs/empty")).unwrap();
    let given = ground.volfs().job("db", &["given"], size).remove(0);
    assert_eq!(ground.volfs().write(control(&given), &format!("release {given}")), 0);
    assert_eq!(ground.volfs().write("jobs/web-1/disks/os/control", "attach"), 0);
    assert_eq!(ground.volfs().write("jobs/db/disks/os/control", "move web-1"), libc::EEXIST);
    assert_eq!(ground.volfs().write("jobs/db/disks/os/control", "disk root"), 0);
    let theirs = ground.second.job("theirs", &["os"], size).remove(0);
    let (was, device) = (disks(ground.volfs()), ground.volfs().value("jobs/web-1/disks/os/device"));
    let record = ground.mark(was.values().next().unwrap()).unwrap().split('/').next().unwrap().to_owned();
    ground.kill();
    for name in ["volfs.db", "volfs.db-wal", "volfs.db-shm"] {
        let _ = fs::remove_file(ground.volfs().state().join(name));
    }
    let before = ground.book();
    // Started without a thought, it makes an empty record, and takes it for what it is.
    ground.volfs_mut().launch();
    let health = ground.volfs().read("health").unwrap();
    assert!(health.starts_with("down\n") && health.contains("volfs rebuild"), "{health}");
    ground.volfs_mut().terminate();
    let said = run(ground.volfs(), &["rebuild"]);
    assert!(said.status == 1 && said.err.contains("several records"), "{said:?}");
    assert!(said.err.contains(&format!("{record} on 3 volumes")), "{said:?}");
    let none = run(ground.volfs(), &["rebuild", "--record", "3c9a6f0e-5b7d-4e1a-8f22-0a1b2c3d4e5f"]);
    assert!(none.status == 1 && none.err.contains(&record), "{none:?}");
    let bad = run(ground.volfs(), &["rebuild", "--record", "mine"]);
    assert!(bad.status == 1 && bad.err.contains("lower-case UUID"), "{bad:?}");
    let told = ok(ground.volfs(), &["rebuild", "--record", &record]);
    assert!(told.contains("job web-1: os data") || told.contains("job web-1: data os"), "{told}");
    assert_eq!(ground.book(), before, "rebuilding changes nothing in the provider");
    ground.volfs_mut().launch();
    let volfs = ground.volfs();
    assert_eq!(disks(volfs), was);
    assert_eq!(volfs.write("control", "reconcile"), 0, "{}", volfs.log());
    assert!(volfs.read("health").unwrap().starts_with("ok\n"), "{}", volfs.read("health").unwrap());
    assert_eq!(volfs.value("jobs/web-1/disks/os/device"), device);
    assert_eq!(volfs.value("jobs/web-1/disks/data/status"), "detached");
    assert_eq!(volfs.write(control(&theirs), "attach"), libc::ENOENT);
    assert_eq!(volfs.write("jobs/web-1/disks/os/control", "detach"), 0);
    assert_eq!(volfs.write("jobs/web-1/disks/data/control", "move db"), 0);
    volfs.job("db", &["new"], size);
    each_mark_once(&ground);
    ground.volfs_mut().terminate();
    let again = run(ground.volfs(), &["rebuild", "--record", &record]);
    assert!(again.status == 1 && again.err.contains("is not empty"), "{again:?}");
}

#[test]
fn a_deleted_record_is_rebuilt_from_the_marks_on_loops() {
    rebuilt(Ground::on_loops(&[]));
}

#[test]
fn a_deleted_record_is_rebuilt_from_the_marks_over_a_cloud() {
    rebuilt(Ground::on_cloud(&[]));
}

#[test]
fn what_a_mark_does_not_name_for_sure_is_left_alone_by_a_rebuild() {
    let mut ground = Ground::on_loops(&[]);
    let names = ["plain", "nameless", "slash", "twin-a", "twin-b", "broken"];
    let ids = ground.volfs().job("j", &names, "1M");
    ground.kill();
    let store = ground.volfs().scratch("store");
    let edit = |id: &str, key: &str, value: serde_json::Value| {
        let mut meta = meta(&store, id).unwrap();
        meta[key] = value;
        fs::write(store.join("volumes").join(id).join("meta.json"), meta.to_string()).unwrap();
    };
    edit(&ids[1], "disk", serde_json::Value::Null);
    edit(&ids[2], "job", "../etc".into());
    edit(&ids[4], "disk", "twin-a".into());
    fs::write(store.join("volumes").join(&ids[5]).join("meta.json"), "{").unwrap();
    fs::remove_dir_all(ground.volfs().state()).unwrap();
    let before = ground.book();
    let told = ok(ground.volfs(), &["rebuild"]);
    assert!(told.contains("job j: plain\n"), "{told}");
    for (id, words) in [
        (&ids[1], "no disk is named"),
        (&ids[2], "job \"../etc\" is not valid"),
        (&ids[3], "another volume carries the names j/twin-a"),
        (&ids[4], "another volume carries the names j/twin-a"),
        (&ids[5], "cannot be read"),
    ] {
        assert!(told.lines().any(|l| l.contains(id.as_str()) && l.contains(words)), "{id}: {words}: {told}");
    }
    assert_eq!(ground.book(), before);
    ground.volfs_mut().launch();
    assert_eq!(disks(ground.volfs()).into_values().collect::<Vec<_>>(), [ids[0].clone()]);
    // By hand, under names that are free.
    for (n, id) in ids[1..5].iter().enumerate() {
        assert_eq!(
            ground.volfs().write("jobs/j/control", &format!("claim {id} back-{n}")),
            0,
            "{}",
            ground.volfs().log()
        );
    }
    each_mark_once_but(&ground, &ids[5]);
}

fn each_mark_once_but(ground: &Ground, broken: &str) {
    let ids = ground.ids();
    let marks: Vec<String> = ids.iter().filter(|id| *id != broken).filter_map(|id| ground.mark(id)).collect();
    assert_eq!(marks.iter().collect::<BTreeSet<_>>().len(), marks.len(), "{marks:?}");
}

#[test]
fn an_upkeep_command_is_killed_anywhere_and_repeated() {
    let mut ground = Ground::on_loops(&[]);
    let ids = ground.volfs().job("j", &["a", "b"], "1M");
    ground.volfs_mut().terminate();
    let file = ground.volfs().scratch("backup");
    ok(ground.volfs(), &["backup", file.to_str().unwrap()]);
    let before = ground.book();
    let state = ground.volfs().state();
    let good = ground.volfs().scratch("good-state");
    copy(&state, &good);
    // At growing moments of its life, until one ends before it is killed.
    for args in [&["restore", file.to_str().unwrap()][..], &["adopt", "--this-host"], &["adopt", "--new"]] {
        let mut finished = false;
        for step in 0..60 {
            copy(&good, &state);
            let mut child = program(ground.volfs(), args).stdout(std::process::Stdio::null()).spawn().unwrap();
            let began = std::time::Instant::now();
            while began.elapsed() < std::time::Duration::from_millis(step) {
                std::thread::yield_now();
            }
            let ended = child.try_wait().unwrap();
            let _ = child.kill();
            let _ = child.wait();
            ok(ground.volfs(), args);
            if args[0] == "restore" {
                ok(ground.volfs(), &["adopt", "--this-host"]);
            }
            finished = ended.is_some();
            if finished || step % 8 == 0 {
                ground.volfs_mut().launch();
                assert!(ground.volfs().read("health").unwrap().starts_with("ok\n"), "{args:?} {step}");
                let owned = if args.contains(&"--new") { 0 } else { ids.len() };
                assert_eq!(disks(ground.volfs()).len(), owned, "{args:?} {step}");
                ground.volfs_mut().terminate();
                assert_eq!(ground.book(), before, "{args:?} {step}");
            }
            if finished {
                break;
            }
        }
        assert!(finished, "{args:?}: it was never left alone for long enough");
    }
}
