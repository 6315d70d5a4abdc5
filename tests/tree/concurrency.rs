//! Many at once: nothing is done twice, nothing is crossed, nobody waits for a stranger.

use std::collections::HashMap;
use std::fs;
use std::io::{Read, Write};
use std::os::unix::fs::{FileExt, MetadataExt};
use std::process::{Child, Command, Stdio};
use std::sync::Mutex;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use super::common::{Volfs, finish};
use super::waiting::{AT_ONCE, callers, held_at, status, times_done};

/// Numbers that look random, the same in every run: a failure can be seen again.
struct Dice(u64);

impl Dice {
    fn roll(&mut self, sides: usize) -> usize {
        // Knuth's MMIX generator; its high bits are the good ones.
        self.0 = self.0.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
        (self.0 >> 33) as usize % sides
    }

    fn shuffle<T>(&mut self, all: &mut [T]) {
        for last in (1..all.len()).rev() {
            all.swap(last, self.roll(last + 1));
        }
    }
}

/// Shells, killed when the test fails half-way.
struct Shells(Vec<Child>);

impl Shells {
    fn start(volfs: &Volfs, scripts: impl IntoIterator<Item = String>) -> Self {
        let start = |script: String| {
            let mut command = Command::new("bash");
            command.arg("-c").arg(script).env("R", volfs.root()).current_dir("/").stdin(Stdio::null());
            command.stdout(Stdio::null()).stderr(Stdio::piped()).spawn().unwrap()
        };
        Shells(scripts.into_iter().map(start).collect())
    }

    fn ended(&mut self) -> usize {
        self.0.iter_mut().map(|c| usize::from(c.try_wait().unwrap().is_some())).sum()
    }

    /// Each one's status and words.
    fn finish(mut self) -> Vec<(i32, String)> {
        let said = std::mem::take(&mut self.0).into_iter().map(finish);
        said.map(|said| (said.status, said.err)).collect()
    }
}

impl Drop for Shells {
    fn drop(&mut self) {
        for child in &mut self.0 {
            let _ = child.kill();
            let _ = child.wait();
        }
    }
}

#[test]
fn r2_500_shells_with_the_equal_command_have_one_effect() {
    let (volfs, gate) = held_at("attach.before-call");
    volfs.job("a", &["d"], "4M");
    let script = "echo attach > $R/jobs/a/disks/d/control".to_owned();
    let shells = Shells::start(&volfs, std::iter::repeat_n(script, 500));
    volfs.until("500 callers", || callers(&volfs, "a", "d") == 500);
    gate.open();
    for said in shells.finish() {
        assert_eq!(said, (0, String::new()));
    }
    assert_eq!(times_done(&volfs, "a", "attach"), 1);
    assert_eq!(volfs.loops().len(), 1);
}

#[test]
fn r2_of_different_commands_one_class_succeeds_and_the_others_are_busy_at_once() {
    let (volfs, gate) = held_at("attach.before-call");
    volfs.job("a", &["d"], "4M");
    let control = "> $R/jobs/a/disks/d/control";
    // One holds the volume; the others have no way to wait for it.
    let first = Shells::start(&volfs, [format!("echo attach {control}")]);
    volfs.until("caller", || callers(&volfs, "a", "d") == 1);
    let words = ["attach", "detach", "resize 8M", "disk other", "snapshot s", "attach root vm=", "move nobody"];
    let scripts = (0..500).map(|n| format!("echo '{}' {control}", words[n % words.len()]));
    let began = Instant::now();
    let mut shells = Shells::start(&volfs, scripts);
    let joining = (0..500).filter(|n| n % words.len() == 0).count();
    volfs.until("all others answered", || shells.ended() == 500 - joining);
    println!("{} refused while it was held, the last after {:?}", 500 - joining, began.elapsed());
    volfs.until("all joined", || callers(&volfs, "a", "d") == 1 + joining as u64);
    gate.open();
    for (n, (code, err)) in shells.finish().into_iter().enumerate() {
        let word = words[n % words.len()];
        let expected = match word {
            "attach" => (0, ""),
            "attach root vm=" => (1, "Invalid argument"),
            "move nobody" => (1, ""),
            _ => (1, "Device or resource busy"),
        };
        assert!(code == expected.0 && err.contains(expected.1), "`{word}`: {code} {err}");
    }
    for said in first.finish() {
        assert_eq!(said, (0, String::new()));
    }
    let history = volfs.read("jobs/a/disks/d/history").unwrap();
    let verbs: Vec<&str> = history.lines().skip(1).map(|l| l.split('\t').nth(1).unwrap()).collect();
    assert_eq!(verbs, ["create", "attach"], "{history}");
}

#[test]
fn r6_2000_parked_writers_hold_up_nobody_and_all_end() {
    const WRITERS: usize = 2000;
    let (volfs, gate) = held_at("attach.before-call");
    volfs.job("a", &["d"], "4M");
    let done = AtomicUsize::new(0);
    let files_open = rustix::process::getrlimit(rustix::process::Resource::Nofile);
    let raised = rustix::process::Rlimit { current: files_open.maximum, ..files_open };
    rustix::process::setrlimit(rustix::process::Resource::Nofile, raised).unwrap();
    let control = volfs.path("jobs/a/disks/d/control");
    // Opened one by one: lookups of one name at one moment cost the square of their number.
    let open = || fs::OpenOptions::new().write(true).open(&control).unwrap();
    let files: Vec<fs::File> = (0..WRITERS).map(|_| open()).collect();
    std::thread::scope(|scope| {
        // Opened when this fails, too: the scope waits for the writers.
        let gate = gate;
        for mut file in files {
            let done = &done;
            let thread = std::thread::Builder::new().stack_size(64 * 1024);
            let write = move || {
                assert_eq!(file.write(b"attach").unwrap(), 6);
                done.fetch_add(1, Ordering::SeqCst);
            };
            thread.spawn_scoped(scope, write).unwrap();
        }
        volfs.until("2000 callers", || callers(&volfs, "a", "d") == WRITERS as u64);
        let mut took: Vec<Duration> = (0..200)
            .map(|n| {
                let began = Instant::now();
                match n % 4 {
                    0 => drop(volfs.read("health").unwrap()),
                    1 => assert_eq!(status(&volfs, "a", "d"), "attaching"),
                    2 => assert_eq!(fs::read_dir(volfs.path("jobs/a/disks")).unwrap().count(), 1),
                    _ => drop(fs::metadata(volfs.path("jobs/a/disks/d/control")).unwrap()),
                }
                began.elapsed()
            })
            .collect();
        took.sort();
        println!("meanwhile: median {:?}, 99th {:?}, worst {:?}", took[100], took[198], took[199]);
        assert!(took[100] < Duration::from_millis(100) && took[199] < AT_ONCE, "{took:?}");
        assert_eq!(done.load(Ordering::SeqCst), 0);
        gate.open();
    });
    assert_eq!(done.load(Ordering::SeqCst), WRITERS);
    assert_eq!(times_done(&volfs, "a", "attach"), 1);
}

fn pattern(uuid: &str) -> Vec<u8> {
    uuid.bytes().cycle().take(64 * 1024).collect()
}

#[test]
fn r3_d2_32_volumes_attached_at_once_and_again_in_another_order_are_never_crossed() {
    let volfs = Volfs::start();
    let names: Vec<String> = (0..32).map(|n| format!("d{n}")).collect();
    let names: Vec<&str> = names.iter().map(String::as_str).collect();
    let mut uuids = volfs.job("a", &names, "1M");
    let mut dice = Dice(32);
    let each = |verb: &str, uuids: &[String]| {
        let scripts = uuids.iter().map(|u| format!("echo {verb} timeout=60 > $R/jobs/a/volumes/{u}/control"));
        for said in Shells::start(&volfs, scripts).finish() {
            assert_eq!(said, (0, String::new()), "{verb}\n{}", volfs.log());
        }
    };
    let device = |uuid: &str| volfs.value(format!("jobs/a/volumes/{uuid}/device"));
    each("attach", &uuids);
    for uuid in &uuids {
        // Through the node, then flushed: nothing is left in the page cache of a loop device.
        let file = fs::OpenOptions::new().write(true).open(volfs.path(format!("volumes/{uuid}/block"))).unwrap();
        file.write_all_at(&pattern(uuid), 0).unwrap();
        file.sync_all().unwrap();
    }
    for _ in 0..3 {
        dice.shuffle(&mut uuids);
        let (some, rest) = uuids.split_at(20);
        each("detach", some);
        // Those that stayed have their own device still, those that went have none.
        for uuid in rest {
            assert_eq!(fs::read(device(uuid)).unwrap()[..64 * 1024], pattern(uuid));
        }
        for uuid in some {
            assert_eq!(volfs.read(format!("jobs/a/volumes/{uuid}/device")), Err(libc::ENODEV));
            assert!(fs::metadata(volfs.path(format!("jobs/a/volumes/{uuid}/block"))).is_err());
        }
        let mut some = some.to_vec();
        dice.shuffle(&mut some);
        each("attach", &some);
        let mut seen = HashMap::new();
        for uuid in &uuids {
            let block = volfs.path(format!("jobs/a/volumes/{uuid}/block"));
            let mut start = vec![0; 64 * 1024];
            fs::File::open(&block).unwrap().read_exact(&mut start).unwrap();
            assert!(start == pattern(uuid), "another volume's data under {uuid}");
            let rdev = fs::metadata(device(uuid)).unwrap().rdev();
            assert_eq!(fs::metadata(&block).unwrap().rdev(), rdev);
            assert_eq!(seen.insert(rdev, uuid), None, "two volumes on one device");
            let link = fs::read_link(volfs.path(device(uuid).replace("/dev/", "devices/"))).unwrap();
            assert!(link.ends_with(uuid), "{}", link.display());
        }
    }
}

/// What one write did, by the clock of the test.
struct Wrote {
    volume: usize,
    command: String,
    began: Duration,
    ended: Duration,
    errno: i32,
    pid: i32,
}

/// What the model knows of a volume: what the commands of this test can change.
#[derive(Clone, PartialEq, Eq, Debug)]
struct Model {
    attached: bool,
    size: u64,
    disk: String,
}

/// What the table of the contract says to a command while nothing is in flight.
#[derive(PartialEq, Eq, Debug)]
enum Says {
    /// An operation starts, and ends so.
    Starts(Model),
    /// Answered at once, nothing done.
    Now(i32),
}

const MIB: u64 = 1024 * 1024;

impl Model {
    fn says(&self, command: &str) -> Says {
        let (verb, rest) = command.split_once(' ').unwrap_or((command, ""));
        let next = |change: fn(&mut Model, &str), ends: bool| {
            let mut model = self.clone();
            change(&mut model, rest);
            if ends { Says::Starts(model) } else { Says::Now(0) }
        };
        match verb {
            "attach" => next(|m, _| m.attached = true, !self.attached),
            "detach" => next(|m, _| m.attached = false, self.attached),
            "resize" => match rest.trim_end_matches('M').parse::<u64>().unwrap() * MIB {
                size if size < self.size => Says::Now(libc::EINVAL),
                size if size == self.size => Says::Now(0),
                size => Says::Starts(Model { size, ..self.clone() }),
            },
            "disk" => next(|m, name| m.disk = name.into(), self.disk != rest),
            "revert" if self.attached => Says::Now(libc::EBUSY),
            // There is no snapshot.
            "revert" => Says::Now(libc::ENOENT),
            // Another object's name repeated.
            "delete" => Says::Now(libc::EINVAL),
            other => panic!("{other}"),
        }
    }
}

/// What was executed on one volume, in order, with the write that began it.
struct Executed<'a> {
    by: &'a Wrote,
}

/// Checks every write to one volume against the order in which its operations ran.
///
/// An operation lies within the write that began it. So a write met the volume somewhere between
/// the last operation whose write had ended when it began, and the first whose write had not begun
/// when it ended; its errno must be what the model says at one of these moments.
fn check(start: &Model, executed: &[Executed<'_>], wrote: &[&Wrote]) -> Model {
    let mut states = vec![start.clone()];
    for (at, op) in executed.iter().enumerate() {
        let w = op.by;
        let Says::Starts(next) = states[at].says(&w.command) else {
            panic!("`{}` was executed in {:?}", w.command, states[at]);
        };
        assert_eq!(w.errno, 0, "`{}` was executed and failed", w.command);
        if at > 0 {
            assert!(executed[at - 1].by.began < w.ended, "two operations in the wrong order");
        }
        states.push(next);
    }
    for w in wrote {
        if executed.iter().any(|op| std::ptr::eq(op.by, *w)) {
            continue;
        }
        let first = executed.iter().filter(|op| op.by.ended < w.began).count();
        let last = executed.iter().filter(|op| op.by.began < w.ended).count();
        let idle = (first..=last).any(|at| states[at].says(&w.command) == Says::Now(w.errno));
        let joined = w.errno == 0 && executed[first..last].iter().any(|op| op.by.command == w.command);
        let busy = w.errno == libc::EBUSY && executed[first..last].iter().any(|op| op.by.command != w.command);
        // A malformed word is told before anything else is looked at.
        let malformed = w.command.starts_with("delete") && w.errno == libc::EINVAL;
        assert!(
            idle || joined || busy || malformed,
            "`{}` ended with {} where the model has {:?} and {:?} in flight",
            w.command,
            w.errno,
            &states[first..=last],
            executed[first..last].iter().map(|op| &op.by.command).collect::<Vec<_>>()
        );
    }
    states.pop().unwrap()
}

#[test]
fn model_1000_random_commands_of_16_writers_are_linearizable() {
    const COMMANDS: usize = 1000;
    let volfs = Volfs::start_with(&[], "history = 10000\n");
    let names = ["x", "y", "z"];
    let uuids = volfs.job("a", &names, "1M");
    let mut dice = Dice(20_260_101);
    let commands: Vec<(usize, String)> = (0..COMMANDS)
        .map(|at| {
            let volume = dice.roll(3);
            let command = match dice.roll(20) {
                0..6 => "attach".into(),
                6..12 => "detach".into(),
                12..14 => format!("resize {}M", 1 + (at + dice.roll(200)) / 100),
                14..17 => format!("disk {}{}", names[volume], dice.roll(3)),
                17 => "revert nothing".into(),
                18 => format!("delete {}", uuids[(volume + 1) % 3]),
                _ => format!("attach timeout={}", 100 + at),
            };
            (volume, command)
        })
        .collect();
    let (next, wrote, clock) = (AtomicUsize::new(0), Mutex::new(Vec::new()), Instant::now());
    std::thread::scope(|scope| {
        for _ in 0..16 {
            scope.spawn(|| {
                while let Some((volume, command)) = commands.get(next.fetch_add(1, Ordering::Relaxed)) {
                    // A thread for each write: its id in `history` tells which write began what.
                    let write = || {
                        let control = format!("jobs/a/volumes/{}/control", uuids[*volume]);
                        let began = clock.elapsed();
                        let errno = volfs.write(control, command);
                        let ended = clock.elapsed();
                        let pid = rustix::thread::gettid().as_raw_nonzero().get();
                        let command = command.split(" timeout").next().unwrap().to_owned();
                        Wrote { volume: *volume, command, began, ended, errno, pid }
                    };
                    let one = std::thread::scope(|inner| inner.spawn(write).join().unwrap());
                    wrote.lock().unwrap().push(one);
                }
            });
        }
    });
    let wrote = wrote.into_inner().unwrap();
    assert_eq!(wrote.len(), COMMANDS);
    println!("{COMMANDS} commands in {:?}", clock.elapsed());
    let history = volfs.read("history").unwrap();
    for (volume, uuid) in uuids.iter().enumerate() {
        let mine: Vec<&Wrote> = wrote.iter().filter(|w| w.volume == volume).collect();
        let rows = history.lines().map(|l| l.split('\t').collect());
        let rows: Vec<Vec<&str>> = rows.filter(|row: &Vec<&str>| row[4] == uuid && row[1] != "create").collect();
        let ids: Vec<u64> = rows.iter().map(|row| row[10].parse().unwrap()).collect();
        assert!(ids.windows(2).all(|w| w[0] < w[1]), "two operations of one volume overlapped");
        let executed: Vec<Executed<'_>> = rows
            .iter()
            .map(|row| {
                assert_eq!(row[5], "done", "{row:?}");
                let pid: i32 = row[8].parse().unwrap();
                let mut by = mine.iter().filter(|w| w.pid == pid && w.command.split(' ').next() == Some(row[1]));
                let by = by.next().unwrap_or_else(|| panic!("nobody asked for {row:?}"));
                Executed { by }
            })
            .collect();
        let start = Model { attached: false, size: MIB, disk: names[volume].into() };
        let end = check(&start, &executed, &mine);
        let is = Model {
            attached: volfs.value(format!("volumes/{uuid}/status")) == "attached",
            size: volfs.value(format!("volumes/{uuid}/size")).parse().unwrap(),
            disk: end.disk.clone(),
        };
        assert_eq!(is, end);
        assert!(fs::read_link(volfs.path(format!("jobs/a/disks/{}", end.disk))).unwrap().ends_with(uuid));
        println!("{uuid}: {} writes, {} executed", mine.len(), executed.len());
    }
}
