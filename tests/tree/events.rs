//! `events/`: complete, in order, bounded, and of one job only where that was asked for.

use std::fs::{self, File};
use std::io::{BufRead, BufReader, ErrorKind, Read};
use std::os::unix::fs::OpenOptionsExt;
use std::sync::atomic::{AtomicBool, Ordering};

use rustix::event::{PollFd, PollFlags};
use serde_json::Value;

use super::common::Volfs;

/// As many events are kept for a reader that is behind.
const KEPT: u64 = 4096;

fn open(volfs: &Volfs, name: &str) -> File {
    let path = volfs.path("events").join(name);
    fs::OpenOptions::new().read(true).custom_flags(libc::O_NONBLOCK).open(path).unwrap()
}

/// All that is there now.
fn drain(file: &mut File) -> Vec<Value> {
    let mut text = Vec::new();
    let mut piece = [0u8; 65536];
    loop {
        match file.read(&mut piece) {
            Ok(0) => panic!("a stream has no end"),
            Ok(n) => text.extend_from_slice(&piece[..n]),
            Err(e) if e.kind() == ErrorKind::WouldBlock => break,
            Err(e) => panic!("{e}"),
        }
    }
    let text = String::from_utf8(text).unwrap();
    assert!(text.is_empty() || text.ends_with('\n'), "half a line");
    text.lines().map(|line| serde_json::from_str(line).unwrap()).collect()
}

fn seqs(events: &[Value]) -> Vec<u64> {
    events.iter().map(|e| e["seq"].as_u64().unwrap()).collect()
}

/// Every change of a volume's status begins where the one before ended.
fn check_chain(events: &[Value], volume: &str) -> Vec<String> {
    let mine = events.iter().filter(|e| e["event"] == "status" && e["volume"] == volume);
    let words = |e: &Value| (e["from"].as_str().unwrap().to_owned(), e["to"].as_str().unwrap().to_owned());
    let steps: Vec<(String, String)> = mine.map(words).collect();
    for pair in steps.windows(2) {
        assert_eq!(pair[0].1, pair[1].0, "a change is missing: {steps:?}");
    }
    steps.into_iter().map(|(_, to)| to).collect()
}

#[test]
fn wait_events_are_complete_and_in_order_for_each_reader() {
    let volfs = Volfs::start();
    let mut readers: Vec<File> = (0..3).map(|_| open(&volfs, "all")).collect();
    let uuids = volfs.job("a", &["d", "e"], "4M");
    volfs.ok("echo attach > $R/jobs/a/control; echo detach > $R/jobs/a/control");
    let all: Vec<Vec<Value>> = readers.iter_mut().map(drain).collect();
    let numbers = seqs(&all[0]);
    let expected: Vec<u64> = (numbers[0]..numbers[0] + numbers.len() as u64).collect();
    assert_eq!(numbers, expected, "a gap or a disorder");
    assert!(all.iter().all(|one| *one == all[0]), "two readers saw different streams");
    for uuid in &uuids {
        assert_eq!(check_chain(&all[0], uuid), ["attaching", "attached", "detaching", "detached"]);
        for event in ["begin", "end"] {
            let of = |e: &&Value| e["event"] == event && e["volume"] == uuid.as_str();
            let verbs = all[0].iter().filter(of).map(|e| e["command"].as_str().unwrap());
            let own: Vec<&str> = verbs.filter(|c| !c.starts_with("create")).collect();
            assert_eq!(own, ["attach", "detach"]);
        }
    }
}

#[test]
fn wait_events_of_a_job_are_that_jobs_and_all_of_them() {
    let volfs = Volfs::start();
    volfs.job("a", &["d"], "4M");
    volfs.job("b", &["d"], "4M");
    let (mut all, mut of_a) = (open(&volfs, "all"), open(&volfs, "a"));
    std::thread::scope(|scope| {
        for job in ["a", "b"] {
            let volfs = &volfs;
            scope.spawn(move || volfs.ok(&format!("echo attach > $R/jobs/{job}/control")));
        }
    });
    let (all, of_a) = (drain(&mut all), drain(&mut of_a));
    let expected: Vec<Value> = all.iter().filter(|e| e["job"] == "a").cloned().collect();
    assert!(!expected.is_empty() && expected.len() < all.len());
    assert_eq!(of_a, expected);
}

#[test]
fn wait_events_begin_at_the_open_and_nonblocking_readers_get_eagain() {
    let volfs = Volfs::start();
    volfs.job("a", &["d"], "4M");
    let mut file = open(&volfs, "all");
    let mut byte = [0u8; 1];
    for _ in 0..2 {
        assert_eq!(file.read(&mut byte).unwrap_err().raw_os_error(), Some(libc::EAGAIN));
    }
    let mut polled = [PollFd::new(&file, PollFlags::IN)];
    let now = rustix::event::Timespec { tv_sec: 0, tv_nsec: 0 };
    assert_eq!(rustix::event::poll(&mut polled, Some(&now)).unwrap(), 0, "readable with nothing to read");
    volfs.ok("echo attach > $R/jobs/a/control");
    let soon = rustix::event::Timespec { tv_sec: 30, tv_nsec: 0 };
    let mut polled = [PollFd::new(&file, PollFlags::IN)];
    assert_eq!(rustix::event::poll(&mut polled, Some(&soon)).unwrap(), 1);
    assert_eq!(drain(&mut file)[0]["event"], "begin");
}

#[test]
fn wait_events_reach_a_blocked_reader_line_by_line() {
    let volfs = Volfs::start();
    let file = File::open(volfs.path("events/all")).unwrap();
    let reader = std::thread::spawn(move || {
        let lines = BufReader::with_capacity(16, file).lines();
        let events = lines.map(|line| serde_json::from_str::<Value>(&line.unwrap()).unwrap());
        let last = |e: &Value| e["event"] == "end" && e["command"] == "detach";
        let mut seen = Vec::new();
        for event in events {
            seen.push(event);
            if last(&seen[seen.len() - 1]) {
                break;
            }
        }
        seen
    });
    volfs.job("a", &["d"], "4M");
    volfs.ok("echo attach > $R/jobs/a/disks/d/control; echo detach > $R/jobs/a/disks/d/control");
    let numbers = seqs(&reader.join().unwrap());
    assert!(numbers.windows(2).all(|w| w[1] == w[0] + 1), "{numbers:?}");
}

#[test]
fn wait_events_a_slow_reader_is_told_how_many_it_lost() {
    let volfs = Volfs::start();
    let (mut slow, mut quick) = (open(&volfs, "all"), open(&volfs, "all"));
    let names: Vec<String> = (0..32).map(|n| format!("d{n}")).collect();
    let names: Vec<&str> = names.iter().map(String::as_str).collect();
    let uuids = volfs.job("a", &names, "1M");
    let enough = AtomicBool::new(false);
    let mut all = Vec::new();
    std::thread::scope(|scope| {
        for uuid in &uuids {
            let (volfs, enough) = (&volfs, &enough);
            scope.spawn(move || {
                let control = format!("jobs/a/volumes/{uuid}/control");
                for turn in 0.. {
                    if enough.load(Ordering::Relaxed) {
                        return;
                    }
                    assert_eq!(volfs.write(&control, &format!("disk {uuid}-{}", turn % 2)), 0);
                }
            });
        }
        volfs.until("enough events", || {
            all.extend(drain(&mut quick));
            all.len() as u64 > KEPT + 500
        });
        enough.store(true, Ordering::Relaxed);
    });
    all.extend(drain(&mut quick));
    let numbers = seqs(&all);
    assert!(numbers.windows(2).all(|w| w[1] == w[0] + 1), "the quick reader lost something");
    let late = drain(&mut slow);
    let lost = late[0]["lost"].as_u64().expect("what was lost");
    assert_eq!(lost, all.len() as u64 - KEPT);
    assert_eq!(late[1..], all[all.len() - KEPT as usize..]);
}

#[test]
fn wait_events_lists_nothing_and_holds_up_no_recursive_tool() {
    let volfs = Volfs::start();
    volfs.job("a", &["d"], "4M");
    assert_eq!(volfs.ok("ls -a $R/events"), ".\n..");
    let said = volfs.sh("timeout 20 grep -rs lost $R; timeout 20 find $R -type f > /dev/null");
    assert_eq!(said.status, 0, "{said:?}");
    assert_eq!(volfs.read("events/nobody"), Err(libc::ENOENT));
}
