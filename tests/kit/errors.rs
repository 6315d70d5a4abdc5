//! System calls that fail: each position of an attach and of a detach, one error at a time.
//!
//! strace's `inject=CALL:error=ERRNO:when=N` fails the N-th call of a kind in each of the daemon's
//! threads, for N from 1 until the command makes no such call any more. `read`, `pread64` and `write`
//! are failed on the provider's and the record's files only: on /dev/fuse, on the runtime's own
//! eventfds and on an open attribute in sysfs they are not errors that a machine can have. Neither is a
//! lock that cannot be given up: `fcntl` is left out.

use std::fs;
use std::path::PathBuf;
use std::time::{Duration, Instant};

use super::common::{PATIENCE, Volfs, have};
use super::kill::Strace;
use super::oracle::{self, View};
use super::{CLEAN, Dice, figures, seed};

/// What may fail and how. The short form has the first errno at each place, which nothing absorbs as the
/// reserve does ENOSPC, and here and there another one.
const CALLS: [(&str, &[&str], bool); 13] = [
    ("openat", &["EIO", "EMFILE", "ENOSPC", "EINTR"], false),
    ("pwrite64", &["EIO", "ENOSPC", "EINTR"], false),
    ("pread64", &["EIO", "EINTR"], true),
    ("write", &["EIO", "ENOSPC", "EINTR"], true),
    ("read", &["EIO", "EINTR"], true),
    ("fsync", &["EIO", "ENOSPC", "EINTR"], false),
    ("fdatasync", &["EIO", "ENOSPC"], false),
    ("rename", &["EIO", "ENOSPC"], false),
    ("ioctl", &["EIO", "EINTR"], false),
    ("flock", &["EIO", "EINTR"], false),
    ("statx", &["EIO"], false),
    ("getdents64", &["EIO"], false),
    ("ftruncate", &["EIO", "ENOSPC"], false),
];

#[derive(Default, Debug)]
struct Figures {
    left_out: Vec<String>,
    cases: usize,
    injected: usize,
    failed: usize,
    as_before: usize,
    slowest: Duration,
    /// errno by how often.
    told: std::collections::BTreeMap<i32, usize>,
}

/// The files of a volume and of the record: `read` and `write` fail on these.
fn paths(volfs: &Volfs, uuid: &str) -> Vec<PathBuf> {
    let volume = volfs.state().join("loop/volumes").join(uuid);
    let mut all: Vec<PathBuf> =
        ["meta.json", "meta.json.new", "data.img"].iter().map(|name| volume.join(name)).collect();
    all.extend(["volfs.db", "volfs.db-wal", "loop/provider.json"].iter().map(|name| volfs.state().join(name)));
    all
}

struct Suite {
    volfs: Volfs,
    uuid: String,
    long: bool,
    figures: Figures,
}

impl Suite {
    fn file(&self, name: &str) -> String {
        format!("volumes/{}/{name}", self.uuid)
    }

    /// Brings the volume there without any error.
    #[track_caller]
    fn bring(&self, verb: &str, at: &str) {
        let errno = self.volfs.write(self.file("control"), verb);
        assert_eq!(
            errno,
            0,
            "{at}: {verb} without errors: {:?}\n{}",
            self.volfs.read(self.file("error")),
            self.volfs.log()
        );
    }

    /// One error at one place; false when the command makes no such call.
    fn case(&mut self, verb: &str, call: &str, errno: &str, n: usize, on_paths: bool) -> bool {
        let at = format!("{verb}, {errno} at {call} #{n}");
        let before_verb = if verb == "attach" { "detach" } else { "attach" };
        self.bring(before_verb, &at);
        let (before, _) = oracle::settled_but(&self.volfs, PATIENCE, &at, true);
        let out = self.volfs.scratch("strace");
        let (trace, inject) = (format!("trace={call}"), format!("inject={call}:error={errno}:when={n}"));
        let mut args = vec!["-o", out.to_str().unwrap(), "-e", &trace, "-e", &inject];
        let paths = paths(&self.volfs, &self.uuid);
        for path in &paths {
            if on_paths {
                args.extend(["-P", path.to_str().unwrap()]);
            }
        }
        let incarnation = self.volfs.read(self.file("incarnation"));
        let tracer = Strace::attach(self.volfs.pid(), &args);
        let began = Instant::now();
        let told = self.volfs.write(self.file("control"), &format!("{verb} timeout=20"));
        let took = began.elapsed();
        tracer.detach();
        let right_away = self.volfs.read(self.file("incarnation"));
        let lines = fs::read_to_string(&out).unwrap_or_default();
        let injected: Vec<&str> = lines.lines().filter(|l| l.contains("(INJECTED)")).collect();
        self.figures.cases += 1;
        self.figures.injected += injected.len();
        if injected.is_empty() {
            assert_eq!(told, 0, "{at}: nothing was injected");
            return false;
        }
        *self.figures.told.entry(told).or_default() += 1;
        let words = self.volfs.read(self.file("error")).unwrap_or_default();
        let context = format!("{at}: errno {told} after {took:?}, `{}`, injected {injected:#?}", words.trim_end());
        assert!(took < Duration::from_secs(60), "{context}");
        assert!(fs::metadata(self.volfs.path("version")).is_ok(), "{context}: the daemon died");
        let (view, settling) = oracle::settled_but(&self.volfs, PATIENCE, &context, true);
        self.figures.slowest = self.figures.slowest.max(settling);
        let bound = |view: &View| view.bound.get(&self.uuid).map(|all| (all[0].name.clone(), all[0].diskseq));
        if told == 0 {
            assert_eq!(bound(&view).is_some(), verb == "attach", "{context}: success, but not done");
        } else {
            self.figures.failed += 1;
            assert!(CLEAN.contains(&told), "{context}: not an errno of the contract");
            assert!(!words.trim().is_empty(), "{context}: a failure without words");
            let same = bound(&view) == bound(&before);
            self.figures.as_before += usize::from(same);
            // S5: a failure has changed nothing, or says itself that it was done or cannot be told.
            let done = words.contains("was done, but the record could not take it");
            let honest = told == libc::ETIMEDOUT || done || self.outcome(verb) == "ambiguous";
            assert!(same || honest, "{context}: failed as {}, but it happened", self.outcome(verb));
            // What was withdrawn is there again when the caller hears of the failure, not at the next round.
            if verb == "detach" && same && !honest {
                assert_eq!(right_away, incarnation, "{context}: not put back");
            }
        }
        let again = self.volfs.write(self.file("control"), verb);
        let error = self.volfs.read(self.file("error"));
        assert_eq!(again, 0, "{context}: the same command again: {error:?}\n{}", self.volfs.log());
        oracle::settled_but(&self.volfs, PATIENCE, &format!("{context}, again"), true);
        true
    }

    /// How the last operation of this kind ended, by the record.
    fn outcome(&self, verb: &str) -> String {
        let conn = oracle::record(&self.volfs.state().join("volfs.db"));
        let sql = "SELECT outcome FROM volume_operations WHERE verb = ?1 ORDER BY id DESC LIMIT 1";
        conn.query_row(sql, [verb], |r| r.get(0)).unwrap()
    }
}

/// Longest that the short form takes.
const SWEEP: Duration = Duration::from_secs(90);

fn sweep(verb: &'static str, seed: u64) -> Figures {
    let volfs = Volfs::start_with(&[], "reconcile_interval = 1\n");
    let uuid = volfs.job("j", &["d"], "1M").remove(0);
    let long = std::env::var("VOLFS_LONG").is_ok_and(|v| v == "1");
    let mut suite = Suite { volfs, uuid, long, figures: Figures::default() };
    let mut dice = Dice::new(seed);
    let began = Instant::now();
    for (call, errnos, on_paths) in CALLS {
        let mut n = 1;
        loop {
            // Places of a call that were passed over on a machine that is too busy are named.
            if !long && began.elapsed() > SWEEP {
                suite.figures.left_out.push(format!("{call} from #{n}"));
                break;
            }
            let mut reached = suite.case(verb, call, errnos[0], n, on_paths);
            for errno in &errnos[1..] {
                if reached && (suite.long || dice.below(4) == 0) {
                    reached |= suite.case(verb, call, errno, n, on_paths);
                }
            }
            if !reached {
                break;
            }
            // The walk through /proc opens thousands: past the provider's and the record's own, by steps.
            n += if suite.long || n < 12 { 1 } else { n / 2 };
        }
    }
    // A start writes down what work that failed has left announced.
    suite.volfs.kill();
    suite.volfs.launch();
    oracle::settled(&suite.volfs, PATIENCE, "the start after all errors");
    suite.figures
}

fn swept(verb: &'static str) {
    if !have(&["strace"]) {
        return;
    }
    let (seed, began) = (seed(), Instant::now());
    println!("seed {seed}");
    let f = sweep(verb, seed);
    let words = format!(
        "{} cases, {} errors injected, {} commands failed ({} left all as before), settled within {:?}, told {:?}, for want of time left out {:?}",
        f.cases, f.injected, f.failed, f.as_before, f.slowest, f.told, f.left_out
    );
    figures(&format!("syscall errors in {verb}"), seed, began.elapsed(), &words);
    assert!(f.failed > 10, "{words}");
}

#[test]
fn an_attach_survives_an_error_at_each_system_call() {
    swept("attach");
}

#[test]
fn a_detach_survives_an_error_at_each_system_call() {
    swept("detach");
}
