//! What an import writes: all of it or nothing, once, and no secret.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};

use serde_json::Value;

use crate::common::{Said, Volfs, everything, said_of};
use crate::server::{Old, Schema, volfs};

/// Every file of a directory with its content, but for the lock.
fn contents(dir: &Path) -> BTreeMap<String, Vec<u8>> {
    let files = fs::read_dir(dir).unwrap().map(|e| e.unwrap()).filter(|e| e.file_type().unwrap().is_file());
    let named = files.map(|e| (e.file_name().into_string().unwrap(), fs::read(e.path()).unwrap()));
    named.filter(|(name, _)| name != "lock").collect()
}

pub fn run(on: &Volfs, args: &[&str], env: &[(&str, &str)]) -> Said {
    let mut command = volfs(&on.state(), &on.scratch("config.toml"));
    said_of(command.arg("import").args(args).envs(env.iter().copied()).output().unwrap())
}

#[track_caller]
pub fn ok(on: &Volfs, args: &[&str]) -> String {
    let said = run(on, args, &[]);
    assert_eq!(said.status, 0, "{args:?}: {}", said.err);
    said.out
}

fn json(text: &str) -> Value {
    serde_json::from_str(text).unwrap()
}

#[test]
fn a_second_import_says_that_there_is_nothing_and_changes_no_byte() {
    let Some(old) = Old::make(Schema::Before) else { return };
    let (on, dump) = (Volfs::prepare(&[], ""), old.dumped());
    let dump = dump.to_str().unwrap();
    let dry = json(&ok(&on, &[dump, "--dry-run", "--json"]));
    let first = json(&ok(&on, &[dump, "--json"]));
    for list in ["jobs", "imported", "unclaimed", "interrupted", "doubts"] {
        assert_eq!(dry[list], first[list], "{list}");
    }
    let before = contents(&on.state());
    let second = ok(&on, &[dump]);
    assert!(second.ends_with("nothing to do: the record has all of it\n"), "{second}");
    assert_eq!(ok(&on, &[dump]), second);
    let third = json(&ok(&on, &[dump, "--json"]));
    assert!(third["changes"] == false && third["unchanged"] == 7, "{third}");
    assert_eq!(contents(&on.state()), before);
    // What nobody has settled is still said.
    assert!(second.contains("is named for job-pgtest2/disk-2000 and for job-pgwin/disk-2000"), "{second}");
    // A dump that knows more adds that, and no more.
    old.sql(
        "INSERT INTO ossea_volumes (id, volume_id, volume_name, size_gb) VALUES \
            (9, '99999999-9999-4999-8999-999999999999', 'later', 1); \
         INSERT INTO vm_disks (job_id, disk_id, ossea_volume_id) VALUES ('job-quad', 'disk-2009', 9);",
    );
    let later = old.dumped();
    let fourth = json(&ok(&on, &[later.to_str().unwrap(), "--json"]));
    assert_eq!(fourth["imported"].as_array().unwrap().len(), 1, "{fourth}");
    assert_eq!((&fourth["jobs"], &fourth["unclaimed"]), (&json("[]"), &json("[]")));
}

#[test]
fn crash_an_import_that_is_killed_has_written_all_or_nothing() {
    let Some(old) = Old::make(Schema::Before) else { return };
    let (on, dump) = (Volfs::prepare(&[], ""), old.dumped());
    let dump = dump.to_str().unwrap();
    let dry = |on: &Volfs| json(&ok(on, &[dump, "--dry-run", "--json"]));
    let wanted = dry(&on);
    let killed = |point: &str| {
        let said = run(&on, &[dump], &[("VOLFS_FAILPOINTS", &format!("{point}=kill"))]);
        assert!(said.status == -libc::SIGKILL && said.out.is_empty(), "{point}: {said:?}");
    };
    killed("import.before-commit");
    assert_eq!(dry(&on), wanted, "nothing");
    killed("import.before-commit");
    killed("import.after-commit");
    assert_eq!(dry(&on)["changes"], false, "all");
    let last = ok(&on, &[dump]);
    assert!(last.contains("0 jobs, 0 volumes in jobs, 0 in none, 7 unchanged"), "{last}");
}

#[test]
fn an_import_beside_a_daemon_or_over_what_has_not_ended_is_refused() {
    let Some(old) = Old::make(Schema::Before) else { return };
    let dump = old.dumped();
    let dump = dump.to_str().unwrap();
    let mut on = Volfs::start_with(&[("VOLFS_FAILPOINTS", "create.before-call=kill")], "");
    let busy = run(&on, &[dump], &[]);
    assert!(busy.status == 1 && busy.err.contains("is in use by pid") && busy.out.is_empty(), "{busy:?}");
    assert!(ok(&on, &[dump, "--dry-run"]).contains("job job-quad"), "a dry run only looks");
    fs::create_dir(on.path("jobs/j")).unwrap();
    assert_ne!(on.write("jobs/j/control", "create d 1M"), 0);
    on.wait();
    let before = contents(&on.state());
    let left = run(&on, &[dump], &[]);
    assert!(left.status == 1 && left.err.contains("have not ended") && left.err.contains("create"), "{left:?}");
    let kept =
        |files: BTreeMap<String, Vec<u8>>| files.into_iter().filter(|(n, _)| !n.starts_with("volfs.db-")).count();
    assert_eq!(kept(contents(&on.state())), kept(before));
    on.set_env(&[]);
    let _ = std::process::Command::new("umount").arg("-l").arg(on.root()).status();
    on.launch();
    on.until("the end of what was left", || on.value("jobs/j/status").starts_with("idle"));
    on.terminate();
    assert!(ok(&on, &[dump]).contains("3 jobs, 2 volumes in jobs, 5 in none"));
    let read_only = run(&on, &["--read-only", dump], &[]);
    assert!(read_only.status == 1 && read_only.err.contains("read-only"), "{read_only:?}");
}

#[test]
fn an_import_into_an_older_copy_of_the_record_is_refused() {
    let Some(old) = Old::make(Schema::Before) else { return };
    let (on, dump) = (Volfs::prepare(&[], ""), old.dumped());
    ok(&on, &[dump.to_str().unwrap()]);
    let (record, copy) = (on.state().join("volfs.db"), on.scratch("copy"));
    fs::copy(&record, &copy).unwrap();
    old.sql("INSERT INTO ossea_volumes VALUES (9, '99999999-9999-4999-8999-999999999999', 'v', 1, 1, '', '', '', '')");
    ok(&on, &[old.dumped().to_str().unwrap()]);
    fs::copy(&copy, &record).unwrap();
    let before = contents(&on.state());
    let said = run(&on, &[old.dumped().to_str().unwrap()], &[]);
    assert!(said.status == 1 && said.err.contains("adopt --this-host"), "{said:?}");
    assert!(said.err.contains("nothing was imported"), "{said:?}");
    assert_eq!(contents(&on.state()), before);
}

#[test]
fn predecessor_120_no_key_or_password_of_the_dump_gets_anywhere() {
    let Some(old) = Old::make(Schema::Before) else { return };
    let plain = old.dump(&["DB"]);
    let text = String::from_utf8_lossy(&plain).into_owned();
    assert!(text.matches("canary").count() >= 4, "the dump has them");
    let mut all: Vec<(PathBuf, Vec<u8>)> = Vec::new();
    let mut on = Volfs::prepare(&[("VOLFS_LOG", "trace")], "");
    let mut tell = |what: &str, said: Said| {
        all.push((format!("{what}, stdout").into(), said.out.into_bytes()));
        all.push((format!("{what}, stderr").into(), said.err.into_bytes()));
    };
    let trace = [("VOLFS_LOG", "trace")];
    // Cut in the middle of each of them: an error is about that very place.
    for (at, _) in text.match_indices("canary") {
        let cut = old.file("cut.sql", &text.as_bytes()[..at + 10]);
        let said = run(&on, &[cut.to_str().unwrap()], &trace);
        assert_eq!(said.status, 1);
        tell("a cut dump", said);
    }
    let broken = old.file("broken.sql", text.replace("'canary-pw-0xC3'", "f('canary-pw-0xC3'").as_bytes());
    let said = run(&on, &[broken.to_str().unwrap()], &trace);
    assert_eq!(said.status, 1);
    tell("a broken dump", said);
    let dump = old.dumped();
    let said = run(&on, &[dump.to_str().unwrap(), "--json"], &trace);
    assert_eq!(said.status, 0, "{}", said.err);
    tell("the import", said);
    on.launch();
    everything(&on.root(), &mut all);
    everything(&on.state(), &mut all);
    all.push(("the log".into(), on.log().into_bytes()));
    assert!(all.iter().any(|(path, _)| path.ends_with("info.json")), "the tree was read");
    assert!(all.iter().any(|(path, bytes)| path.ends_with("volfs.db") && !bytes.is_empty()), "so was the record");
    for (path, bytes) in &all {
        assert!(!bytes.windows(6).any(|w| w.eq_ignore_ascii_case(b"canary")), "{} holds one", path.display());
    }
    // What came of the operation in flight, and of what had ended.
    let history = on.read("history").unwrap();
    assert!(history.lines().any(|l| l.contains("attach") && l.contains("interrupted")), "{history}");
    assert!(!history.contains("detach"), "{history}");
    assert_eq!(on.value("jobs/job-quad/vm_name"), "QUAD-AUVIK02 it's \\ \"here\"");
}
