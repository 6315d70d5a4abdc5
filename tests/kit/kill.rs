//! Random SIGKILL: callers with commands of every kind, a daemon that dies at any moment, and an
//! oracle that knows what each caller was told.
//!
//! Half of the kills fall a random time after the callers go on, each power of ten as likely; of the
//! other half each falls at the N-th call of one system call (strace's `inject=…:signal=KILL`), so
//! that the narrow places between two effects are hit as often as the long waits. A failpoint that
//! counts would fall only where a failpoint is.

use std::fs;
use std::io::{BufRead, BufReader};
use std::os::fd::AsFd;
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicBool, Ordering::SeqCst};
use std::time::{Duration, Instant};

use volfs::sys;

use super::common::{PATIENCE, Volfs, have};
use super::model::Model;
use super::oracle::{self, View};
use super::{Dice, count, figures, seed};

const CALLERS: usize = 4;
/// Worlds side by side.
const WORLDS: usize = 2;

/// System calls between two of which something has just become true.
const CALLS: [&str; 12] = [
    "pwrite64",
    "fdatasync",
    "fsync",
    "write",
    "writev",
    "ioctl",
    "rename",
    "openat",
    "flock",
    "read",
    "getdents64",
    "all",
];

/// Somebody else's things in the same places: no byte of them may change.
struct Foreign {
    device: String,
    diskseq: i64,
    files: Vec<(PathBuf, Vec<u8>)>,
}

impl Foreign {
    fn make(volfs: &Volfs) -> Foreign {
        let backing = volfs.scratch("foreign.img");
        fs::write(&backing, vec![b'F'; 1 << 20]).unwrap();
        let device = bind(&backing, "somebody's");
        let mut files = Vec::new();
        for mark in ["null".to_owned(), format!("\"{}/7\"", uuid::Uuid::new_v4())] {
            let id = uuid::Uuid::new_v4();
            let dir = volfs.state().join("loop/volumes").join(id.to_string());
            fs::create_dir(&dir).unwrap();
            let meta = format!("{{\"id\":\"{id}\",\"name\":\"theirs\",\"size\":4096,\"mark\":{mark}}}\n");
            for (name, bytes) in [("meta.json", meta.into_bytes()), ("data.img", vec![b'F'; 4096])] {
                fs::write(dir.join(name), &bytes).unwrap();
                files.push((dir.join(name), bytes));
            }
        }
        Foreign { diskseq: oracle::bound(&device).unwrap().diskseq, device, files }
    }

    fn touched(&self) -> Vec<String> {
        let mut wrong = Vec::new();
        let now = oracle::bound(&self.device).map(|b| b.diskseq);
        if now != Some(self.diskseq) {
            wrong.push(format!("a foreign loop device {} was bound anew: {now:?}", self.device));
        }
        for (path, bytes) in &self.files {
            if fs::read(path).ok().as_ref() != Some(bytes) {
                wrong.push(format!("a foreign file was changed: {}", path.display()));
            }
        }
        wrong
    }
}

/// Binds a file to a free loop device; its kernel name.
pub fn bind(backing: &PathBuf, tag: &str) -> String {
    let file = fs::OpenOptions::new().read(true).write(true).open(backing).unwrap();
    let control = fs::OpenOptions::new().read(true).write(true).open("/dev/loop-control").unwrap();
    let mut info = sys::LoopInfo64::zeroed();
    info.set_file_name(tag);
    let began = Instant::now();
    loop {
        let name = format!("loop{}", sys::loop_get_free(control.as_fd()).unwrap());
        let device = fs::OpenOptions::new().read(true).write(true).open(format!("/dev/{name}"));
        if device.is_ok_and(|device| sys::loop_configure(device.as_fd(), &file, 512, info).is_ok()) {
            return name;
        }
        // Somebody else won it.
        assert!(began.elapsed() < PATIENCE, "no free loop device");
    }
}

/// strace on all threads of a process; killed when dropped.
pub struct Strace(Child);

impl Strace {
    /// Attaches, and returns when it has.
    pub fn attach(pid: i32, args: &[&str]) -> Strace {
        let mut child = Command::new("strace")
            .args(["-f", "-p", &pid.to_string()])
            .args(args)
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::piped())
            .spawn()
            .unwrap();
        let mut said = BufReader::new(child.stderr.take().unwrap());
        let mut line = String::new();
        said.read_line(&mut line).unwrap();
        assert!(line.contains("attached"), "strace says {line:?}");
        // It says more as threads come and go, and must not block on that.
        std::thread::spawn(move || std::io::copy(&mut said, &mut std::io::sink()));
        Strace(child)
    }

    /// Lets go of the process, which goes on, and waits until the output is written.
    pub fn detach(mut self) {
        // SAFETY: kill(2) takes no pointers; the pid is our own child, not yet waited for.
        unsafe { libc::kill(self.0.id() as i32, libc::SIGTERM) };
        let _ = self.0.wait();
    }
}

impl Drop for Strace {
    fn drop(&mut self) {
        // The process it traces is dead. SIGKILL: asked politely it waits for the first of the dead
        // threads, which ends only after it has waited for the others.
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

#[derive(Default)]
struct Figures {
    kills: usize,
    by_call: usize,
    acknowledged: usize,
    unanswered: usize,
    slowest: Duration,
}

fn world(number: usize, kills: usize, seed: u64, strace: bool) -> Figures {
    let mut dice = Dice::new(seed ^ ((number as u64 + 1) << 48));
    // No later round may settle what the start has left open.
    let mut volfs = Volfs::start_with(&[], "reconcile_interval = 3600\n");
    let mut callers: Vec<Model> = (0..CALLERS).map(|n| Model::new(&volfs, &format!("w{number}c{n}"))).collect();
    let foreign = Foreign::make(&volfs);
    let mut figures = Figures::default();
    for kill in 0..kills {
        let at = format!("world {number}, kill {kill}, seed {seed}");
        let over = AtomicBool::new(false);
        let by_call = strace && dice.below(2) == 0;
        let call = *dice.one(&CALLS);
        let most = if call == "all" { 4000 } else { 60 };
        let when = dice.spread(Duration::from_secs(1), Duration::from_secs(most)).as_secs();
        let after = dice.spread(Duration::from_micros(200), Duration::from_millis(400));
        let inject = format!("inject={call}:signal=KILL:when={when}");
        let trace = format!("trace={call}");
        let tracer = by_call.then(|| Strace::attach(volfs.pid(), &["-o", "/dev/null", "-e", &trace, "-e", &inject]));
        let begin = std::sync::Barrier::new(CALLERS + 1);
        let wrong = std::thread::scope(|threads| {
            let running: Vec<_> = callers
                .iter_mut()
                .map(|caller| {
                    let (volfs, over, begin, mut dice) = (&volfs, &over, &begin, Dice::new(dice.throw()));
                    threads.spawn(move || {
                        begin.wait();
                        while !over.load(SeqCst) {
                            match caller.act(volfs, &mut dice) {
                                Ok(true) => {}
                                Ok(false) => break,
                                Err(words) => return Some(words),
                            }
                        }
                        None
                    })
                })
                .collect();
            begin.wait();
            let began = Instant::now();
            // Without the tracer the moment is the time's; with it the daemon dies by itself, or has
            // nothing to do that is counted.
            let at_most = if by_call { Duration::from_millis(1500) } else { after };
            while began.elapsed() < at_most && !running.iter().any(|r| r.is_finished()) {
                std::thread::park_timeout(Duration::from_micros(50));
            }
            over.store(true, SeqCst);
            // SAFETY: kill(2) takes no pointers; the pid is our own child's, not yet waited for.
            unsafe { libc::kill(volfs.pid(), libc::SIGKILL) };
            running.into_iter().filter_map(|r| r.join().unwrap()).collect::<Vec<_>>()
        });
        drop(tracer);
        assert!(wrong.is_empty(), "{at}: a command failed:\n{}", wrong.join("\n"));
        volfs.kill();
        volfs.launch();
        let (view, took) = oracle::settled(&volfs, PATIENCE, &format!("{at} ({call} {when}: {by_call}, {after:?})"));
        figures.slowest = figures.slowest.max(took);
        figures.kills += 1;
        figures.by_call += usize::from(by_call);
        let mut wrong = foreign.touched();
        for caller in &mut callers {
            wrong.extend(caller.judge(&volfs, &view));
        }
        assert!(wrong.is_empty(), "{at} ({call} {when}: {by_call}, {after:?}):\n{}\n{}", wrong.join("\n"), volfs.log());
    }
    figures.acknowledged = callers.iter().map(|c| c.acknowledged).sum();
    figures.unanswered = callers.iter().map(|c| c.unanswered).sum();
    figures
}

#[test]
fn random_kills_lose_nothing_and_do_nothing_twice() {
    let strace = have(&["strace"]);
    let (kills, seed) = (count("VOLFS_KILLS", 300, 10_000), seed());
    println!("seed {seed}");
    let began = Instant::now();
    let all: Vec<Figures> = std::thread::scope(|threads| {
        let run = |n| threads.spawn(move || world(n, kills.div_ceil(WORLDS), seed, strace));
        let running: Vec<_> = (0..WORLDS).map(run).collect();
        running.into_iter().map(|r| r.join().unwrap()).collect()
    });
    let sum = |of: fn(&Figures) -> usize| all.iter().map(of).sum::<usize>();
    let words = format!(
        "{} kills ({} at a system call), {} commands acknowledged, {} unanswered, settled at the latest {:?} after the start",
        sum(|f| f.kills),
        sum(|f| f.by_call),
        sum(|f| f.acknowledged),
        sum(|f| f.unanswered),
        all.iter().map(|f| f.slowest).max().unwrap()
    );
    figures("random SIGKILL", seed, began.elapsed(), &words);
    assert!(sum(|f| f.acknowledged) > kills, "the callers got nothing done: {words}");
    assert!(sum(|f| f.unanswered) > kills / 20, "the kills hit nothing: {words}");
}

/// The oracle can see what it is there for.
#[test]
fn the_oracle_sees_each_kind_of_harm() {
    let volfs = Volfs::start_with(&[], "reconcile_interval = 3600\n");
    let uuids = volfs.job("j", &["a", "b", "c"], "1M");
    let none = std::collections::BTreeSet::new();
    assert_eq!(volfs.write(format!("volumes/{}/control", uuids[0]), "attach"), 0);
    let sees = |what: &str| {
        let all = View::of(&volfs).contradictions(&none);
        assert!(all.iter().any(|w| w.contains(what)), "{what} is not among {all:?}");
    };
    assert_eq!(View::of(&volfs).contradictions(&none), [] as [String; 0]);
    let dir = volfs.state().join("loop/volumes");
    let meta = |uuid: &str| dir.join(uuid).join("meta.json");
    let text = fs::read_to_string(meta(&uuids[1])).unwrap();
    // A mark of another epoch, a size that is not the file's, an attachment that is none.
    fs::write(meta(&uuids[1]), text.replace("\"mark\": \"", "\"mark\": \"0")).unwrap();
    sees("the mark is");
    fs::write(meta(&uuids[1]), text.replace("\"size\": 1048576", "\"size\": 512")).unwrap();
    sees("meta.json's size is 512");
    fs::write(meta(&uuids[1]), &text).unwrap();
    fs::rename(dir.join(&uuids[2]), volfs.scratch("away")).unwrap();
    sees("not in the store");
    fs::rename(volfs.scratch("away"), dir.join(&uuids[2])).unwrap();
    fs::create_dir(dir.join(".new-x")).unwrap();
    sees(".new-x is left");
    fs::remove_dir(dir.join(".new-x")).unwrap();
    // A volume of ours that no job has, one bound behind our back, and one bound twice.
    let orphan = uuid::Uuid::new_v4().to_string();
    fs::create_dir(dir.join(&orphan)).unwrap();
    fs::write(dir.join(&orphan).join("data.img"), [0; 512]).unwrap();
    fs::write(meta(&orphan), text.replace(&uuids[1], &orphan)).unwrap();
    sees("carries our mark and is in no job");
    fs::remove_dir_all(dir.join(&orphan)).unwrap();
    bind(&dir.join(&uuids[1]).join("data.img"), "x");
    sees("the record's status is detached, not attached");
    bind(&dir.join(&uuids[0]).join("data.img"), &format!("volfs:{}", uuids[0]));
    sees("is bound 2 times");
    let junk = volfs.scratch("junk");
    fs::write(&junk, [0; 4096]).unwrap();
    bind(&junk, &format!("volfs:{}", uuids[2]));
    sees("and our tag");
}
