//! Power cuts: what the real daemon did to its files during twenty operations, cut at every sync and
//! anywhere between, with what was not synced dropped, reordered and torn.
//!
//! After each cut the record must open by itself, hold every commit that was synced and nothing half
//! of the next, and the loop store must open with each volume as it was at some moment since the last
//! answer. The same judgement is run over disks that ignore the syncs of one kind: it must see it.

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::fs;
use std::io::{BufRead, BufReader};
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::{Instant, SystemTime, UNIX_EPOCH};

use rusqlite::Connection;
use rusqlite::types::ValueRef;
use volfs::cloud::loopdev::{LoopCloud, LoopOptions};
use volfs::model::{BootId, VmId};
use volfs::store::{SqliteStore, Store};

use super::common::{Volfs, have};
use super::replay::{self, Disk, Image, Luck};
use super::trace::{self, Event, Timed};
use super::{Dice, count, figures, seed};

/// When a command was answered, and every row of the record then.
struct Answer {
    command: String,
    at: u64,
    rows: String,
}

/// A recorded run.
struct Run {
    root: String,
    events: Vec<Timed>,
    answers: Vec<Answer>,
}

fn now() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).unwrap().as_micros() as u64
}

/// All rows of all tables, as text; `None` where there is no record.
fn rows(db: &Path) -> Option<String> {
    if !db.exists() {
        return None;
    }
    let conn = Connection::open(db).unwrap();
    let mut text = String::new();
    for table in
        ["meta", "jobs", "ossea_volumes", "vm_disks", "device_mappings", "volume_operations", "volume_snapshots"]
    {
        let mut all = conn.prepare(&format!("SELECT * FROM {table} ORDER BY 1")).unwrap();
        let columns = all.column_count();
        let mut found = all.query([]).unwrap();
        while let Some(row) = found.next().unwrap() {
            write!(text, "{table}").unwrap();
            for n in 0..columns {
                match row.get_ref(n).unwrap() {
                    ValueRef::Null => text.push_str("|-"),
                    ValueRef::Integer(i) => write!(text, "|{i}").unwrap(),
                    ValueRef::Text(t) => write!(text, "|{}", String::from_utf8_lossy(t)).unwrap(),
                    other => write!(text, "|{other:?}").unwrap(),
                }
            }
            text.push('\n');
        }
    }
    Some(text)
}

/// Twenty operations through the tree of a daemon that strace writes down, from an empty directory on.
fn recorded() -> Run {
    let volfs = Volfs::prepare(&[], "reconcile_interval = 3600\n");
    let prefix = volfs.scratch("trace");
    let plain = volfs.command();
    let log = fs::File::create(volfs.scratch("log")).unwrap();
    let mut child = Command::new("strace")
        .args(["-f", "-ff", "-ttt", "-T", "-y", "-xx", "-s", "1000000", "-e", "signal=none", "-e", trace::CALLS, "-o"])
        .arg(&prefix)
        .arg(plain.get_program())
        .args(plain.get_args())
        .arg("--background-child")
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(log)
        .spawn()
        .unwrap();
    let mut said = String::new();
    BufReader::new(child.stdout.take().unwrap()).read_line(&mut said).unwrap();
    assert_eq!(said, "ready\n", "{}", volfs.log());
    let db = volfs.state().join("volfs.db");
    let mut answers = Vec::new();
    let mut answered = |command: &str| {
        let at = now();
        answers.push(Answer { command: command.to_owned(), at, rows: rows(&db).unwrap() });
    };
    let uuid = |job: &str, disk: &str| {
        let link = fs::read_link(volfs.path(format!("jobs/{job}/disks/{disk}"))).unwrap();
        link.file_name().unwrap().to_str().unwrap().to_owned()
    };
    let mut released = String::new();
    for line in [
        "mkdir a",
        "a create d1 1M",
        "a create d2 1M",
        "a/d1 attach",
        "a=vm one",
        "a/d1 detach",
        "a/d1 resize 2M",
        "a/d2 disk x",
        "mkdir b",
        "a/x move b",
        "a attach",
        "a/d1 resize 3M",
        "a detach",
        "b/x release",
        "a claim",
        "a!1",
        "a!0",
        "a/x delete",
        "a/d1 attach",
        "a/d1 detach",
        "b destroy b",
    ] {
        if let Some(job) = line.strip_prefix("mkdir ") {
            fs::create_dir(volfs.path(format!("jobs/{job}"))).unwrap();
        } else if let Some((job, name)) = line.split_once('=') {
            fs::write(volfs.path(format!("jobs/{job}/vm_name")), name).unwrap();
        } else if let Some((job, hold)) = line.split_once('!') {
            fs::write(volfs.path(format!("jobs/{job}/hold")), hold).unwrap();
        } else {
            let (place, verb) = line.split_once(' ').unwrap();
            let (path, text) = match (place.split_once('/'), verb) {
                (Some((job, disk)), "release" | "delete") => {
                    released = uuid(job, disk);
                    (format!("volumes/{released}"), format!("{verb} {released}"))
                }
                (Some((job, disk)), _) => (format!("volumes/{}", uuid(job, disk)), verb.to_owned()),
                (None, "claim") => (format!("jobs/{place}"), format!("claim {released} x")),
                (None, _) => (format!("jobs/{place}"), verb.to_owned()),
            };
            assert_eq!(volfs.write(format!("{path}/control"), &text), 0, "{line}: {}", volfs.log());
        }
        answered(line);
    }
    assert!(Command::new("umount").arg(volfs.root()).status().unwrap().success());
    assert!(child.wait().unwrap().success(), "{}", volfs.log());
    let root = fs::canonicalize(volfs.state().parent().unwrap()).unwrap().to_str().unwrap().to_owned();
    let events = trace::read(&prefix, &root);
    Run { root, events, answers }
}

/// What each volume of the loop store is, by uuid.
fn volumes(image: &Image) -> Result<BTreeMap<String, String>, String> {
    let mut found = BTreeMap::new();
    for path in image.keys() {
        let words: Vec<&str> = path.trim_start_matches('/').split('/').collect();
        match words[..] {
            ["state", "loop", "volumes", uuid] if !uuid.starts_with(".new-") => {
                let file = |name: &str| image.get(&format!("{path}/{name}")).and_then(Option::as_ref);
                let (Some(meta), Some(data)) = (file("meta.json"), file("data.img")) else {
                    return Err(format!("volume {uuid} is there without its files"));
                };
                let text = meta.all();
                let meta: serde_json::Value =
                    serde_json::from_slice(&text).map_err(|e| format!("meta.json of {uuid}: {e}"))?;
                if meta["size"].as_u64().is_none_or(|size| size > data.size) {
                    return Err(format!("data.img of {uuid} has {} bytes, promised are {}", data.size, meta["size"]));
                }
                found.insert(uuid.to_owned(), format!("{meta} {}", data.size));
            }
            ["state", "loop", "trash", name] => {
                found.insert(name.split('.').next().unwrap().to_owned(), "deleted".into());
            }
            _ => {}
        }
    }
    Ok(found)
}

/// What may be found after a cut: computed once from the whole run.
struct Truth {
    /// After each sync, and at the start: number of events that had happened, rows of the record.
    records: Vec<(usize, Option<String>)>,
    /// After each event that changed it: a volume's words.
    volumes: Vec<(usize, BTreeMap<String, String>)>,
}

fn place() -> tempfile::TempDir {
    let memory = Path::new("/dev/shm");
    let dir = if memory.is_dir() { memory.to_owned() } else { std::env::temp_dir() };
    tempfile::Builder::new().prefix("volfs-test-").tempdir_in(dir).unwrap()
}

fn record_of(image: &Image) -> Option<String> {
    let dir = place();
    let only: Image =
        image.iter().filter(|(p, _)| !p.starts_with("/state/loop")).map(|(p, b)| (p.clone(), b.clone())).collect();
    replay::write(&only, dir.path());
    rows(&dir.path().join("state/volfs.db"))
}

impl Truth {
    fn of(run: &Run) -> Truth {
        let mut disk = Disk::new(&run.root);
        let mut truth = Truth { records: vec![(0, None)], volumes: vec![(0, BTreeMap::new())] };
        for (n, (event, _)) in run.events.iter().enumerate() {
            disk.happen(event);
            let image = disk.clean();
            if let Event::Sync { .. } = event {
                truth.records.push((n + 1, record_of(&image)));
            }
            // Between two steps of one replacement nothing can be read: that is no state.
            if let Ok(now) = volumes(&image)
                && truth.volumes.last().is_none_or(|(_, last)| *last != now)
            {
                truth.volumes.push((n + 1, now));
            }
        }
        truth
    }

    /// How many events had ended by then.
    fn ended(run: &Run, at: u64) -> usize {
        // strace rounds to a microsecond.
        run.events.iter().take_while(|(_, end)| *end <= at + 2).count()
    }

    /// What the record may say after a cut behind `n` events: the last synced, or the one that was being
    /// synced.
    fn record(&self, n: usize) -> Vec<&Option<String>> {
        let last = self.records.iter().rposition(|(at, _)| *at <= n).unwrap();
        let (_, rows) = &self.records[last];
        let next = self.records[last..].iter().map(|(_, r)| r).find(|r| *r != rows);
        [Some(rows), next].into_iter().flatten().collect()
    }

    /// What a volume may be: anything it was from the last answer before the cut on.
    fn volume(&self, run: &Run, n: usize, uuid: &str) -> Vec<Option<&String>> {
        let from = run.answers.iter().map(|a| Self::ended(run, a.at)).filter(|e| *e <= n).max().unwrap_or(0);
        let first = self.volumes.iter().rposition(|(at, _)| *at <= from).unwrap();
        let until = self.volumes[first..].iter().take_while(|(at, _)| *at <= n.max(from));
        until.map(|(_, all)| all.get(uuid)).collect()
    }
}

/// What is wrong with what one cut has left.
fn judge(run: &Run, truth: &Truth, n: usize, image: &Image) -> Result<(), String> {
    let found = volumes(image)?;
    let mut all: Vec<&String> = truth.volumes.iter().flat_map(|(_, v)| v.keys()).collect();
    all.extend(found.keys());
    for uuid in all {
        let may = truth.volume(run, n, uuid);
        if !may.contains(&found.get(uuid)) {
            return Err(format!("volume {uuid} is {:?}, and may be {may:#?}", found.get(uuid)));
        }
    }
    let dir = place();
    replay::write(image, dir.path());
    let state = dir.path().join("state");
    let was = state.join("volfs.db").exists();
    let store = SqliteStore::open(&state).map_err(|e| format!("the record does not open: {e}"))?;
    store.load(1000).map_err(|e| format!("the record cannot be read: {e}"))?;
    drop(store);
    let found = rows(&state.join("volfs.db")).filter(|_| was);
    if !truth.record(n).contains(&&found) {
        let may = truth.record(n);
        return Err(format!(
            "the record is neither what was synced nor what was being synced:\n{found:?}\nbut:\n{may:?}"
        ));
    }
    let conn = Connection::open(state.join("volfs.db")).unwrap();
    let whole: String = conn.query_row("PRAGMA integrity_check", [], |r| r.get(0)).unwrap();
    if whole != "ok" {
        return Err(whole);
    }
    let loops = state.join("loop");
    if loops.exists() {
        let options = LoopOptions::new(loops, BootId::random(), VmId::random());
        LoopCloud::open(options).map_err(|e| format!("the loop store does not open: {e}"))?;
    }
    Ok(())
}

/// Every commit was synced before its command was answered.
fn synced_before_answered(run: &Run, truth: &Truth) -> Result<(), String> {
    for answer in &run.answers {
        let ended = Truth::ended(run, answer.at);
        let (_, rows) = truth.records.iter().rfind(|(at, _)| *at <= ended).unwrap();
        let rows = rows.as_deref().unwrap_or_default();
        // Rows that the operation ended with; one that began since is none of it.
        let lost: Vec<&str> = answer.rows.lines().filter(|l| !rows.contains(l) && !l.ends_with("|-")).collect();
        if !lost.is_empty() {
            return Err(format!(
                "`{}` was answered before these rows were synced:\n{}",
                answer.command,
                lost.join("\n")
            ));
        }
    }
    Ok(())
}

/// Cuts at each of `at` (behind that many events, in order) with each luck, on a disk that does what
/// `happens` lets through; answers the cuts judged and what was wrong first.
fn cut(
    run: &Run,
    truth: &Truth,
    dice: &mut Dice,
    at: impl IntoIterator<Item = usize>,
    lucks: &mut dyn FnMut(&mut Dice) -> Vec<Luck>,
    happens: impl Fn(&Event) -> bool,
) -> (usize, Result<(), String>) {
    let mut disk = Disk::new(&run.root);
    let (mut done, mut cuts) = (0, 0);
    for n in at {
        while done < n {
            if happens(&run.events[done].0) {
                disk.happen(&run.events[done].0);
            }
            done += 1;
        }
        for luck in lucks(dice) {
            cuts += 1;
            if let Err(words) = judge(run, truth, n, &disk.crashed(dice, &luck)) {
                let next = run.events.get(n).map(|(e, _)| format!("{e:.200?}"));
                return (cuts, Err(format!("cut behind {n} events, before {next:?}: {words}")));
            }
        }
    }
    (cuts, Ok(()))
}

fn all_lucks(dice: &mut Dice) -> Vec<Luck> {
    vec![Luck::Nothing, Luck::Everything, Luck::Some(20 + dice.below(70))]
}

fn one_luck(dice: &mut Dice) -> Vec<Luck> {
    vec![match dice.below(8) {
        0 => Luck::Nothing,
        1 => Luck::Everything,
        n => Luck::Some(n * 12),
    }]
}

#[test]
fn a_power_cut_at_any_sync_loses_nothing_that_was_answered() {
    if !have(&["strace"]) {
        return;
    }
    let (seed, began) = (seed(), Instant::now());
    println!("seed {seed}");
    let run = recorded();
    let truth = Truth::of(&run);
    synced_before_answered(&run, &truth).unwrap();
    let mut dice = Dice::new(seed);
    let is_sync = |n: &usize| matches!(run.events[*n].0, Event::Sync { .. });
    let syncs: Vec<usize> = (0..run.events.len()).filter(is_sync).collect();
    // Before each sync, when all is pending, and after it.
    let both = syncs.iter().flat_map(|n| [*n, n + 1]);
    let (cuts, all) = cut(&run, &truth, &mut dice, both, &mut all_lucks, |_| true);
    all.unwrap();
    let random = count("VOLFS_CUTS", 200, 10_000);
    let mut places: Vec<usize> = (0..random).map(|_| dice.below(run.events.len() + 1)).collect();
    places.sort_unstable();
    let (more, all) = cut(&run, &truth, &mut dice, places, &mut one_luck, |_| true);
    all.unwrap();
    let words = format!(
        "{} operations, {} changes, {} syncs, {cuts} cuts at syncs, {more} anywhere",
        run.answers.len(),
        run.events.len(),
        syncs.len()
    );
    figures("power cuts", seed, began.elapsed(), &words);
    assert!(syncs.len() > 60 && run.answers.len() >= 20, "{words}");
    // A disk that does not do as it is told must be seen, or the judgement proves nothing.
    for (what, ignores) in [
        ("the WAL's syncs", (|p: &str| p.ends_with("-wal")) as fn(&str) -> bool),
        ("the new meta.json's syncs", |p| p.ends_with("meta.json.new")),
        ("the directories' syncs", |p| p.ends_with("/state") || p.contains("/loop/") && !p.contains('.')),
    ] {
        let happens = |event: &Event| !matches!(event, Event::Sync { path } if ignores(path));
        let everywhere = 1..=run.events.len();
        let (cuts, seen) = cut(&run, &truth, &mut dice, everywhere, &mut one_luck, happens);
        let words = seen.expect_err(&format!("{what} were ignored in {cuts} cuts, and nothing was seen"));
        println!("without {what}, seen at cut {cuts}: {:.200}", words);
    }
}
