//! Every way to dump a database is the same database.

use std::collections::BTreeSet;
use std::fs;
use std::io::Write;
use std::path::Path;
use std::process::{Command, Stdio};

use serde_json::Value;

use crate::common::{Said, said_of};
use crate::server::{Old, Schema, volfs};

/// `volfs import ARGS` into nothing, with `input` as its standard input.
fn import(args: &[&str], input: &[u8]) -> Said {
    let dir = tempfile::tempdir().unwrap();
    let state = dir.path().join("state");
    let mut command = volfs(&state, Path::new("/dev/null"));
    command.arg("import").args(args).stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
    let mut child = command.spawn().unwrap();
    let mut stdin = child.stdin.take().unwrap();
    let input = input.to_vec();
    // It may refuse the dump before it has read all of it.
    let writing = std::thread::spawn(move || drop(stdin.write_all(&input)));
    let output = child.wait_with_output().unwrap();
    writing.join().unwrap();
    assert!(!state.exists(), "a dry run and a refusal leave nothing behind");
    said_of(output)
}

/// What a dry run reports; without what depends on how the dump is written.
#[track_caller]
fn report(args: &[&str], input: &[u8]) -> Value {
    let said = import(&[&["-", "--dry-run", "--json"], args].concat(), input);
    assert_eq!(said.status, 0, "{args:?}: {}", said.err);
    let mut report: Value = serde_json::from_str(&said.out).unwrap();
    for (at, field) in [("", "database"), ("/left", "inserts"), ("/left", "tables")] {
        report.pointer_mut(at).unwrap().as_object_mut().unwrap().remove(field).unwrap();
    }
    report
}

#[track_caller]
fn refused(args: &[&str], input: &[u8], words: &[&str]) {
    let said = import(&[&["-"], args].concat(), input);
    assert_eq!(said.status, 1, "{said:?}");
    assert!(said.out.is_empty() && said.err.contains("nothing was imported"), "{said:?}");
    assert!(words.iter().all(|word| said.err.contains(word)), "{words:?}: {}", said.err);
}

fn gzip(bytes: &[u8]) -> Vec<u8> {
    let mut child = Command::new("gzip").arg("-c").stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().unwrap();
    let mut stdin = child.stdin.take().unwrap();
    let bytes = bytes.to_vec();
    let writing = std::thread::spawn(move || stdin.write_all(&bytes).unwrap());
    let output = child.wait_with_output().unwrap();
    writing.join().unwrap();
    output.stdout
}

fn texts<'a>(report: &'a Value, list: &str, field: &str) -> Vec<&'a str> {
    report[list].as_array().unwrap().iter().map(|entry| entry[field].as_str().unwrap()).collect()
}

fn kinds(report: &Value) -> BTreeSet<&str> {
    texts(report, "doubts", "kind").into_iter().collect()
}

#[test]
fn each_way_to_dump_the_schema_before_gives_the_same_report() {
    let Some(old) = Old::make(Schema::Before) else { return };
    let plain = old.dump(&["DB"]);
    let wanted = report(&[], &plain);
    assert_eq!(wanted["schema"], "before");
    assert_eq!(texts(&wanted, "jobs", "job"), ["job-pgtest2", "job-pgwin", "job-quad"]);
    assert_eq!(texts(&wanted, "jobs", "vm_name")[2], "QUAD-AUVIK02 it's \\ \"here\"");
    assert_eq!(
        texts(&wanted, "imported", "volume"),
        ["33333333-3333-4333-8333-333333333333", "44444444-4444-4444-8444-44444444abcd"]
    );
    let first: Vec<&str> = texts(&wanted, "unclaimed", "volume").iter().map(|id| &id[..1]).collect();
    assert_eq!(first, ["1", "2", "5", "6", "7"]);
    assert_eq!(texts(&wanted, "interrupted", "operation"), ["op-1"]);
    let all =
        ["bad-job", "links-differ", "mapping-only", "no-disk", "no-volume", "normalised", "two-places", "unended"];
    assert_eq!(kinds(&wanted), all.into());
    for options in [
        &["--skip-extended-insert", "DB"][..],
        &["--complete-insert", "DB"],
        &["--hex-blob", "DB"],
        &["--databases", "DB"],
        &["--routines", "--triggers", "--events", "DB"],
        &["--skip-opt", "DB"],
        &["--insert-ignore", "--add-drop-trigger", "--tz-utc", "DB"],
        &["--replace", "--single-transaction", "--order-by-primary", "DB"],
        &["--skip-quote-names", "--no-create-db", "DB"],
        &["--compatible=ansi", "--default-character-set=latin1", "DB"],
        &["--no-create-info", "--complete-insert", "--skip-triggers", "DB"],
    ] {
        assert_eq!(report(&[], &old.dump(options)), wanted, "{options:?}");
    }
    for options in [&["--skip-comments", "DB"][..], &["--compact", "DB"]] {
        let dump = old.dump(options);
        refused(&[], &dump, &["--whole"]);
        assert_eq!(report(&["--whole"], &dump), wanted, "{options:?}");
    }
    let half = plain.len() / 2;
    let members = [gzip(&plain[..half]), gzip(&plain[half..])].concat();
    assert_eq!(report(&[], &gzip(&plain)), wanted, "gzip");
    assert_eq!(report(&[], &members), wanted, "two gzip members");
    let file = old.file("plain.sql.gz", &members);
    let said = import(&[file.to_str().unwrap(), "--dry-run"], b"");
    assert!(said.status == 0 && said.out.contains("job-quad/disk-2001: volume 44444444"), "{said:?}");
}

#[test]
fn the_schema_after_and_the_oldest_names_are_read_too() {
    let Some(after) = Old::make(Schema::After) else { return };
    for options in [&["DB"][..], &["--skip-extended-insert", "--complete-insert", "DB"]] {
        let report = report(&[], &after.dump(options));
        assert_eq!(report["schema"], "after");
        // Without the stale link nothing contradicts the one chain.
        let first: Vec<&str> = texts(&report, "imported", "volume").iter().map(|id| &id[..1]).collect();
        assert_eq!(first, ["1", "2", "3", "4"], "{options:?}");
        assert!(!kinds(&report).contains("links-differ"));
    }
    let by_context = report(&["--job-by", "context"], &after.dump(&["DB"]));
    assert_eq!(texts(&by_context, "jobs", "job"), ["ctx-pgtest2", "ctx-pgwin", "ctx-quad"]);
    assert_eq!(texts(&by_context, "imported", "job"), ["ctx-pgtest2", "ctx-pgwin", "ctx-quad", "ctx-quad"]);

    let (oldest, before) = (Old::make(Schema::Oldest).unwrap(), Old::make(Schema::Before).unwrap());
    assert_eq!(report(&[], &oldest.dump(&["DB"])), report(&[], &before.dump(&["DB"])));
}

#[test]
fn a_cut_dump_is_refused_with_its_place_and_leaves_nothing() {
    let Some(old) = Old::make(Schema::Before) else { return };
    let plain = old.dump(&["DB"]);
    let text = String::from_utf8_lossy(&plain).into_owned();
    let inside = text.find("job-pgwin").unwrap();
    refused(&[], &plain[..inside], &["the dump is cut", "standard input: line "]);
    let last = text.rfind("-- Dump completed").unwrap();
    refused(&[], &plain[..last], &["the dump is cut"]);
    refused(&["--whole"], &plain[..last], &["the dump is cut"]);
    let packed = gzip(&plain);
    refused(&[], &packed[..packed.len() - 20], &["the dump is cut"]);
    refused(&[], b"", &["it is empty"]);
    refused(&[], b"\x28\xb5\x2f\xfd\0\0\0", &["zstd"]);
    let compact = old.dump(&["--compact", "DB"]);
    let end = compact.iter().rposition(|b| *b == b';').unwrap();
    refused(&["--whole"], &compact[..end], &["the dump is cut"]);
    let said = import(&["/no/such/dump"], b"");
    assert!(said.status == 1 && said.err.contains("/no/such/dump"), "{said:?}");
}

#[test]
fn a_dump_of_two_old_databases_wants_one_named() {
    let (Some(one), Some(two)) = (Old::make(Schema::Before), Old::make(Schema::After)) else { return };
    let both = one.dump(&["--databases", "DB", &two.name]);
    refused(&[], &both, &[&one.name, &two.name, "--database"]);
    refused(&["--database", "nobody"], &both, &["no database nobody"]);
    for old in [&one, &two] {
        assert_eq!(report(&["--database", &old.name], &both), report(&[], &old.dump(&["DB"])));
    }
}

/// Feeds a dump of about `bytes` in rows of a megabyte and of a few bytes; the most memory that the
/// import had, in KiB, and its report.
fn measured(bytes: usize) -> (u64, String) {
    let dir = tempfile::tempdir().unwrap();
    let mut command = volfs(&dir.path().join("state"), Path::new("/dev/null"));
    command.args(["import", "-", "--dry-run"]).stdin(Stdio::piped()).stdout(Stdio::piped());
    let mut child = command.spawn().unwrap();
    let mut to = child.stdin.take().unwrap();
    let line = |to: &mut dyn Write, text: &str| to.write_all(text.as_bytes()).unwrap();
    line(&mut to, "-- MariaDB dump\nCREATE TABLE volume_operations (id int, status text, request text);\n");
    line(&mut to, "INSERT INTO volume_operations VALUES (0,'completed','')");
    let (long, small) = ("\\'x".repeat(1 << 18), ",(1,'completed','{\\\"a\\\": 1}')".repeat(1 << 14));
    let (mut sent, long) = (0, format!(",(2,'failed','{long}')"));
    while sent < bytes {
        line(&mut to, &long);
        line(&mut to, &small);
        sent += long.len() + small.len();
    }
    line(&mut to, ";\nCREATE TABLE audit (a text);\nINSERT INTO audit VALUES (");
    line(&mut to, &format!("'{}');\n-- Dump completed\n", "y".repeat(1 << 20)));
    // All but a pipe's buffer of it is read, and the program waits for more.
    let status = fs::read_to_string(format!("/proc/{}/status", child.id())).unwrap();
    let most = status.lines().find_map(|l| l.strip_prefix("VmHWM:")?.split_whitespace().next()?.parse().ok());
    drop(to);
    let output = child.wait_with_output().unwrap();
    assert!(output.status.success(), "{output:?}");
    (most.unwrap(), String::from_utf8(output.stdout).unwrap())
}

#[test]
fn memory_does_not_grow_with_the_dump() {
    let (small, _) = measured(1 << 20);
    let (large, said) = measured(24 << 20);
    assert!(said.contains("operations that had ended"), "{said}");
    assert!(large < small + (12 << 10), "{small} KiB with 1 MiB, {large} KiB with 24 MiB");
}

/// `cargo test --release --test import -- --ignored --nocapture a_gibibyte`
#[test]
#[ignore = "says numbers; a gigabyte takes its time"]
fn a_gibibyte_takes_no_more_than_200_mib() {
    let began = std::time::Instant::now();
    let (most, _) = measured(1 << 30);
    println!("1 GiB: {} MiB, {:.1} s", most >> 10, began.elapsed().as_secs_f64());
    assert!(most < 200 << 10, "{most} KiB");
}

#[test]
fn a_file_that_cannot_be_read_as_a_dump_is_refused_by_name() {
    let dir = tempfile::tempdir().unwrap();
    for (name, bytes, words) in [
        ("empty.sql", &b""[..], "it is empty"),
        ("text", b"Dear all, the dump is attached.\n", "no dump"),
        ("other.sql", b"-- MariaDB dump\nINSERT INTO x VALUES (1);\n-- Dump completed\n", "none of its tables"),
    ] {
        let file = dir.path().join(name);
        fs::write(&file, bytes).unwrap();
        let said = import(&[file.to_str().unwrap()], b"");
        assert!(said.status == 1 && said.err.contains(name) && said.err.contains(words), "{name}: {said:?}");
    }
}
