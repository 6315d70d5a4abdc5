//! A record whose file is damaged: each page once (all three ways with `VOLFS_LONG=1`), its WAL, its
//! length, its schema, and files that are no records. Every time it is refused by name and left as it
//! was, or what is loaded is what was there; and the provider's volumes are as they were.

use std::fs;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicUsize, Ordering};

use volfs::store::{Loaded, SqliteStore, Store, StoreError};

use crate::common::Volfs;
use crate::ground::{copy_database, loop_book, ok, run, settled};

const HISTORY: usize = 100_000;

/// A record with content in every table, and what is loaded from it.
struct Record {
    volfs: Volfs,
    bytes: Vec<u8>,
    page: usize,
    loaded: Loaded,
}

fn record() -> Record {
    let mut volfs = Volfs::start();
    for n in 0..6 {
        let job = format!("job-{n}-with-a-name-that-takes-some-room-in-its-page");
        volfs.job(&job, &["a", "b"], "1M");
        assert_eq!(volfs.write(format!("jobs/{job}/disks/a/control"), "attach"), 0);
        assert_eq!(volfs.write(format!("jobs/{job}/disks/b/control"), &format!("disk {}", "x".repeat(60))), 0);
        for k in 0..12 {
            assert_eq!(volfs.write(format!("jobs/{job}/vm_name"), &format!("vm-{k}")), 0);
        }
    }
    let gone = volfs.job("gone", &["d", "e"], "1M");
    assert_eq!(volfs.write("jobs/gone/disks/e/control", &format!("release {}", gone[1])), 0);
    assert_eq!(volfs.write("jobs/gone/control", "destroy gone"), 0);
    volfs.terminate();
    let db = volfs.state().join("volfs.db");
    // A page that is in no table: what had it was dropped.
    let sql = rusqlite::Connection::open(&db).unwrap();
    sql.execute_batch("CREATE TABLE filler (x); INSERT INTO filler VALUES (zeroblob(20000)); DROP TABLE filler")
        .unwrap();
    sql.query_row("PRAGMA wal_checkpoint(TRUNCATE)", [], |_| Ok(())).unwrap();
    drop(sql);
    let bytes = fs::read(&db).unwrap();
    let page = usize::from(u16::from_be_bytes([bytes[16], bytes[17]]));
    let loaded = load(&volfs.state()).unwrap();
    assert!(
        loaded.jobs.len() == 6 && loaded.disks.len() == 12 && loaded.history.len() > 80,
        "{}",
        loaded.history.len()
    );
    Record { volfs, bytes, page, loaded }
}

fn load(state: &Path) -> Result<Loaded, StoreError> {
    SqliteStore::open(state)?.load(HISTORY)
}

/// SplitMix64: small, and the same everywhere.
fn next(seed: &mut u64) -> u64 {
    *seed = seed.wrapping_add(0x9e37_79b9_7f4a_7c15);
    let mut z = *seed;
    z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^ (z >> 31)
}

fn seed() -> u64 {
    let given = std::env::var("VOLFS_SEED").ok().and_then(|text| text.parse().ok());
    given.unwrap_or_else(|| {
        std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap().as_nanos() as u64
    })
}

fn long() -> bool {
    std::env::var_os("VOLFS_LONG").is_some()
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Kind {
    Random,
    Zeroes,
    AnotherPage,
    /// Sixteen bytes somewhere in it.
    Spot,
}

fn damaged(record: &Record, n: usize, kind: Kind, seed: &mut u64) -> Vec<u8> {
    let mut bytes = record.bytes.clone();
    let (from, to) = (n * record.page, (n + 1) * record.page);
    match kind {
        Kind::Random => bytes[from..to].iter_mut().for_each(|b| *b = next(seed) as u8),
        Kind::Zeroes => bytes[from..to].fill(0),
        Kind::AnotherPage => {
            let pages = record.bytes.len() / record.page;
            let other = (n + 1 + next(seed) as usize % (pages - 1)) % pages * record.page;
            bytes[from..to].copy_from_slice(&record.bytes[other..other + record.page]);
        }
        Kind::Spot => {
            let at = from + next(seed) as usize % (record.page - 16);
            bytes[at..at + 16].iter_mut().for_each(|b| *b = next(seed) as u8);
        }
    }
    bytes
}

/// Opens a state directory that has this file: refused and left alone, or loaded as it was.
/// Answers whether it was refused.
fn judged(record: &Record, dir: &Path, bytes: &[u8], at: &str) -> bool {
    let db = dir.join("volfs.db");
    let _ = fs::remove_dir_all(dir);
    fs::create_dir(dir).unwrap();
    fs::write(&db, bytes).unwrap();
    match load(dir) {
        Err(error) => {
            let words = error.to_string();
            assert!(words.contains(db.to_str().unwrap()), "{at}: not named: {words}");
            assert!(matches!(error, StoreError::Unusable { .. }), "{at}: {error:?}");
            assert_eq!(fs::read(&db).unwrap(), bytes, "{at}: {words}: it was touched");
            true
        }
        Ok(loaded) => {
            assert!(loaded == record.loaded, "{at}: it was loaded, and as something else");
            false
        }
    }
}

#[test]
fn each_damaged_page_is_refused_by_name_or_was_of_no_use() {
    let record = record();
    let started = seed();
    let mut seed = started;
    let pages = record.bytes.len() / record.page;
    let (refused, harmless) = (AtomicUsize::new(0), AtomicUsize::new(0));
    let scratch = record.volfs.scratch("damaged");
    let kinds = [Kind::Random, Kind::Zeroes, Kind::AnotherPage];
    for n in 0..pages {
        for (k, kind) in kinds.into_iter().enumerate() {
            if !long() && k != n % 3 {
                continue;
            }
            let at = format!("page {} of {pages} {kind:?}, VOLFS_SEED={started}", n + 1);
            let bytes = damaged(&record, n, kind, &mut seed);
            let count = if judged(&record, &scratch, &bytes, &at) { &refused } else { &harmless };
            count.fetch_add(1, Ordering::Relaxed);
        }
    }
    let (refused, harmless) = (refused.into_inner(), harmless.into_inner());
    assert!(pages > 25 && refused > harmless && harmless > 0, "{pages}: {refused} refused, {harmless} harmless");
    eprintln!("{pages} pages: {refused} refused, {harmless} in free pages; seed {started}");
}

/// Through the daemon: it says which file, starts nothing, and touches neither it nor the volumes.
#[test]
fn a_daemon_does_not_start_on_a_damaged_record() {
    let mut record = record();
    let started = seed();
    let mut seed = started;
    let pages = record.bytes.len() / record.page;
    let db = record.volfs.state().join("volfs.db");
    let book = loop_book(&record.volfs.state().join("loop"));
    let (mut refused, mut served) = (0, 0);
    let step = if long() { 1 } else { pages / 9 };
    for n in (0..pages).step_by(step) {
        let bytes = damaged(&record, n, Kind::Random, &mut seed);
        fs::write(&db, &bytes).unwrap();
        let at = format!("page {} of {pages}, VOLFS_SEED={started}", n + 1);
        match record.volfs.try_launch() {
            Err(words) => {
                assert!(words.contains("volfs.db") && !words.contains("panic"), "{at}: {words}");
                assert_eq!(fs::read(&db).unwrap(), bytes, "{at}");
                refused += 1;
            }
            Ok(()) => {
                assert_eq!(fs::read_dir(record.volfs.path("jobs")).unwrap().count(), 6, "{at}");
                record.volfs.terminate();
                served += 1;
            }
        }
        assert!(loop_book(&record.volfs.state().join("loop")) == book, "{at}: something was done to a volume");
    }
    assert!(refused > served, "{refused} refused, {served} served");
    assert!(!record.volfs.log().contains("panicked"), "{}", record.volfs.log());
    // The way out that the sentence names.
    fs::remove_file(&db).unwrap();
    assert!(ok(&record.volfs, &["rebuild"]).contains("job job-5-with"));
    record.volfs.launch();
    assert_eq!(fs::read_dir(record.volfs.path("devices")).unwrap().count(), 6);
    eprintln!("{refused} refused, {served} served as they were; seed {started}");
}

/// No checksum guards a byte within a sound page. What can be told is told; what cannot, is held
/// against the marks before anything is done.
#[test]
fn a_few_damaged_bytes_lead_to_no_act_on_a_volume() {
    let mut record = record();
    let started = seed();
    let mut seed = started;
    let pages = record.bytes.len() / record.page;
    let db = record.volfs.state().join("volfs.db");
    let store = record.volfs.state().join("loop");
    let book = loop_book(&store);
    let times = if long() { 200 } else { 10 };
    let mut refused = 0;
    for n in 0..times {
        fs::write(&db, damaged(&record, n * 7 % pages, Kind::Spot, &mut seed)).unwrap();
        let at = format!("spot {n}, VOLFS_SEED={started}");
        match record.volfs.try_launch() {
            Err(words) => {
                assert!(words.contains("volfs.db"), "{at}: {words}");
                refused += 1;
            }
            Ok(()) => {
                record.volfs.write("control", "reconcile");
                record.volfs.terminate();
            }
        }
        assert!(loop_book(&store) == book, "{at}: something was done to a volume");
    }
    assert!(!record.volfs.log().contains("panicked"), "{}", record.volfs.log());
    eprintln!("{refused} of {times} refused; seed {started}");
}

/// The state directory as a kill leaves it, with a WAL that holds the last commits.
fn with_wal() -> (Volfs, PathBuf, Vec<String>) {
    let mut volfs = Volfs::start();
    let ids = volfs.job("j", &["a", "b"], "1M");
    fs::create_dir(volfs.path("jobs/k")).unwrap();
    assert_eq!(volfs.write(format!("volumes/{}/control", ids[0]), "attach"), 0);
    assert_eq!(volfs.write(format!("volumes/{}/control", ids[1]), "move k"), 0);
    volfs.kill();
    let copy = volfs.scratch("copy");
    fs::create_dir(&copy).unwrap();
    copy_database(&volfs.state(), &copy);
    assert!(fs::metadata(copy.join("volfs.db-wal")).unwrap().len() > 10_000);
    (volfs, copy, ids)
}

/// The WAL's own checksums end it at the damage: what comes after is lost, and the high-water mark
/// tells that there was more.
#[test]
fn a_damaged_wal_makes_the_record_older_and_that_is_noticed() {
    let (mut volfs, copy, ids) = with_wal();
    let state = volfs.state();
    let started = seed();
    let mut seed = started;
    let store = state.join("loop");
    let book = loop_book(&store);
    let wal = fs::read(copy.join("volfs.db-wal")).unwrap();
    let (mut down, mut refused, mut whole) = (0, 0, 0);
    let cases = if long() { 60 } else { 12 };
    for n in 0..cases {
        let mut bytes = wal.clone();
        let at = bytes.len() * n / cases;
        match n % 3 {
            0 => bytes.truncate(at),
            1 => bytes[at..].iter_mut().take(64).for_each(|b| *b = next(&mut seed) as u8),
            _ => bytes[at..].iter_mut().take(5000).for_each(|b| *b = 0),
        }
        copy_database(&copy, &state);
        fs::write(state.join("volfs.db-wal"), &bytes).unwrap();
        let at = format!("{at} of {} bytes, way {}, VOLFS_SEED={started}", wal.len(), n % 3);
        match volfs.try_launch() {
            Err(words) => {
                assert!(words.contains("volfs.db"), "{at}: {words}");
                refused += 1;
            }
            Ok(()) => {
                let health = volfs.read("health").unwrap();
                if health.starts_with("down\n") {
                    assert!(health.contains("older than its own past"), "{at}: {health}");
                    for id in &ids {
                        let errno = volfs.write(format!("volumes/{id}/control"), "detach");
                        assert!([libc::EROFS, libc::ENOENT].contains(&errno), "{at}: {errno}");
                    }
                    down += 1;
                } else {
                    // At most the ends of operations are lost, which looking settles.
                    settled(&volfs);
                    assert_eq!(volfs.value(format!("volumes/{}/status", ids[0])), "attached", "{at}");
                    assert!(volfs.path("jobs/k/disks/b").is_symlink(), "{at}");
                    whole += 1;
                }
                volfs.kill();
            }
        }
        assert!(loop_book(&store) == book, "{at}: something was done to a volume");
    }
    assert!(down > 0 && down + refused + whole == cases, "{down} down, {refused} refused, {whole} whole");
    eprintln!("{cases} WALs: {down} noticed as older, {refused} refused, {whole} of no loss; seed {started}");
}

#[test]
fn what_is_no_record_of_ours_is_named_and_left_as_it_is() {
    let mut record = record();
    let state = record.volfs.state();
    let db = state.join("volfs.db");
    let book = loop_book(&state.join("loop"));
    let patched = |at: usize, word: u32| {
        let mut bytes = record.bytes.clone();
        bytes[at..at + 4].copy_from_slice(&word.to_be_bytes());
        bytes
    };
    let half = record.bytes[..record.bytes.len() / 2 / record.page * record.page].to_vec();
    let cases: [(&str, Vec<u8>, &str); 8] = [
        ("newer", patched(60, 7), "a newer volfs made it (schema 7"),
        ("of no version", patched(60, 0), "schema number is 0"),
        ("of another program", patched(68, 7), "of something else"),
        ("truncated", half, "restore it from a backup"),
        ("cut within a page", record.bytes[..record.page + 100].to_vec(), "restore it from a backup"),
        ("empty", Vec::new(), "it is empty"),
        ("text", b"hello\n".repeat(100), "not an SQLite database"),
        ("an image", vec![0x7f; 70_000], "not an SQLite database"),
    ];
    let volfs = &mut record.volfs;
    for (name, bytes, words) in cases {
        fs::write(&db, &bytes).unwrap();
        let said = volfs.try_launch().expect_err(name);
        assert!(said.contains(words) && said.contains("nothing in it was changed"), "{name}: {said}");
        for args in [&["adopt", "--this-host"][..], &["adopt", "--new"], &["rebuild"]] {
            let said = run(volfs, args);
            assert!(said.status == 1 && said.err.contains(words), "{name}: {args:?}: {said:?}");
        }
        let file = volfs.scratch(&format!("backup of {name}"));
        let said = run(volfs, &["backup", file.to_str().unwrap()]);
        assert!(said.status == 1 && !file.exists(), "{name}: {said:?}");
        assert_eq!(fs::read(&db).unwrap(), bytes, "{name}");
        assert_eq!(loop_book(&state.join("loop")), book, "{name}");
    }
}
