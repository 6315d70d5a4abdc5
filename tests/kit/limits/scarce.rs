//! L6: what the machine cannot give is a clean error, and the same daemon serves on when it can.

use std::collections::BTreeSet;
use std::fs;
use std::path::PathBuf;
use std::process::Command;
use std::time::{Duration, Instant};

use super::{Replies, change, changes, health, mkdir};
use crate::CLEAN;
use crate::common::{PATIENCE, Volfs, finish, have};
use crate::kill::Strace;
use crate::oracle;

/// The soft limit of another process, put back when dropped.
struct Limited {
    pid: i32,
    what: libc::__rlimit_resource_t,
    before: libc::rlimit,
}

impl Limited {
    fn to(pid: i32, what: libc::__rlimit_resource_t, current: u64) -> Self {
        let mut before = libc::rlimit { rlim_cur: 0, rlim_max: 0 };
        // SAFETY: prlimit(2) writes one rlimit to where it is told, which outlives the call.
        let got = unsafe { libc::prlimit(pid, what, std::ptr::null(), &mut before) };
        Self::done(got);
        let limited = Limited { pid, what, before };
        limited.set(libc::rlimit { rlim_cur: current, rlim_max: before.rlim_max });
        limited
    }

    fn set(&self, limit: libc::rlimit) {
        // SAFETY: prlimit(2) reads one rlimit, which outlives the call.
        Self::done(unsafe { libc::prlimit(self.pid, self.what, &limit, std::ptr::null_mut()) });
    }

    /// A process that is gone has no limits.
    fn done(answer: i32) {
        let error = std::io::Error::last_os_error();
        assert!(answer == 0 || error.raw_os_error() == Some(libc::ESRCH), "prlimit: {error}");
    }
}

impl Drop for Limited {
    fn drop(&mut self) {
        self.set(self.before);
    }
}

/// The same daemon does everything again, and all three books agree.
#[track_caller]
fn serves_on(volfs: &Volfs, daemon: i32, when: &str) {
    volfs.until("a commit", || mkdir(volfs.path("jobs/again")) == 0);
    assert_eq!(super::rmdir(volfs.path("jobs/again")), 0);
    // What failed is a problem until it is repeated.
    let created = volfs.write("jobs/j/control", "create more 1M timeout=20");
    assert!([0, libc::EEXIST].contains(&created), "{when}: create: {created}\n{}", volfs.log());
    let verbs = ["attach", "detach"];
    for (disk, verb) in ["on", "off"].into_iter().flat_map(|d| verbs.map(|v| (d, v))).chain([("off", "resize 2M")]) {
        let told = volfs.write(format!("jobs/j/disks/{disk}/control"), &format!("{verb} timeout=20"));
        assert_eq!(told, 0, "{when}: {verb}: {:?}\n{}", volfs.read(format!("jobs/j/disks/{disk}/error")), volfs.log());
    }
    assert_eq!(volfs.write("control", "reconcile"), 0, "{when}: {:?}", volfs.read("error"));
    changes(volfs, "again", &[0]);
    volfs.until("health", || health(volfs) == "ok");
    assert_eq!(volfs.read("problems").unwrap().lines().count(), 1, "{}", volfs.read("problems").unwrap());
    assert_eq!(volfs.pid(), daemon);
    oracle::settled(volfs, PATIENCE, when);
}

/// Commands that cannot be done now: a clean errno each, or done after all.
#[track_caller]
fn refused_cleanly(volfs: &Volfs, when: &str) -> Vec<i32> {
    let mut told = Vec::new();
    let commands = [
        ("jobs/j/disks/off/control", "attach timeout=5"),
        ("jobs/j/disks/on/control", "detach timeout=5"),
        ("jobs/j/control", "create more 1M timeout=5"),
        ("jobs/j/disks/off/control", "resize 2M timeout=5"),
        ("control", "reconcile timeout=5"),
    ];
    for (below, command) in commands {
        let errno = volfs.write(below, command);
        assert!(errno == 0 || CLEAN.contains(&errno), "{when}: {command}: errno {errno}\n{}", volfs.log());
        told.push(errno);
    }
    for errno in
        [change("mkdir", || mkdir(volfs.path("jobs/passing"))), change("hold", || volfs.write("jobs/j/hold", "0"))]
    {
        assert!([0, libc::EIO, libc::ENOSPC].contains(&errno), "{when}: errno {errno}");
        told.push(errno);
    }
    let _ = fs::remove_dir(volfs.path("jobs/passing"));
    told
}

fn furnished(config: &str) -> Volfs {
    let volfs = Volfs::start_with(&[], config);
    furnish(&volfs);
    volfs
}

fn furnish(volfs: &Volfs) {
    volfs.job("j", &["on", "off"], "1M");
    assert_eq!(volfs.write("jobs/j/disks/on/control", "attach"), 0);
}

#[test]
fn l6_without_a_free_descriptor_all_is_answered_and_with_one_it_serves_on() {
    let volfs = furnished("reconcile_interval = 1\n");
    let daemon = volfs.pid();
    // None at all: each number that is in use stays, no other is given.
    let limited = Limited::to(daemon, libc::RLIMIT_NOFILE, 0);
    let mut replies = Replies::default();
    for _ in 0..3 {
        replies.walk(&volfs.root());
    }
    replies.judge("no descriptor is free");
    let told = refused_cleanly(&volfs, "no descriptor");
    println!("no descriptor is free: told {told:?}");
    assert!(told.iter().any(|errno| *errno != 0), "nothing was refused: {told:?}");
    volfs.until("health says so", || health(&volfs) != "ok");
    drop(limited);
    serves_on(&volfs, daemon, "descriptors again");
}

/// A line of /proc/PID/status in bytes, e.g. `VmSize`.
fn memory(pid: i32, line: &str) -> Option<u64> {
    let text = fs::read_to_string(format!("/proc/{pid}/status")).ok()?;
    let found = text.lines().find_map(|l| l.strip_prefix(line)?.strip_prefix(':'))?;
    found.trim().trim_end_matches(" kB").parse::<u64>().ok().map(|kilobytes| kilobytes * 1024)
}

/// A thread or a buffer that is not given ends the process: the daemon is followed by another one, as
/// after a SIGKILL, and its callers do not notice.
#[test]
fn l6_without_address_space_a_daemon_answers_or_is_followed_and_every_command_has_its_true_outcome() {
    let mut volfs = Volfs::prepare(&[], "reconcile_interval = 1\n").with_keeper();
    volfs.launch();
    furnish(&volfs);
    let (mut daemons, mut refused) = (BTreeSet::new(), 0);
    volfs.until("a daemon that was refused memory", || {
        let Some(daemon) = volfs.kept_pid() else { return false };
        daemons.insert(daemon);
        // Nothing more than what it has: no stack of a thread, no mapping of a file, no large buffer.
        let Some(size) = memory(daemon, "VmSize") else { return false };
        let limited = Limited::to(daemon, libc::RLIMIT_AS, size);
        Replies::default().walk(&volfs.root());
        for (disk, verb) in [("off", "attach"), ("on", "detach"), ("off", "detach"), ("on", "attach")] {
            let told = volfs.write(format!("jobs/j/disks/{disk}/control"), &format!("{verb} timeout=20"));
            assert!(told == 0 || CLEAN.contains(&told), "{verb}: errno {told}\n{}", volfs.log());
            refused += usize::from(told != 0);
            let status = if verb == "attach" { "attached" } else { "detached" };
            assert!(told != 0 || volfs.value(format!("jobs/j/disks/{disk}/status")) == status, "{}", volfs.log());
        }
        drop(limited);
        daemons.len() > 2 || refused > 2
    });
    println!("no address space is free: {} daemons, {refused} commands refused", daemons.len());
    serves_on(&volfs, volfs.pid(), "address space again");
}

#[test]
fn l6_a_filesystem_that_turns_read_only_is_refused_cleanly_and_back_again_it_serves_on() {
    if !have(&["strace"]) {
        return;
    }
    let volfs = furnished("reconcile_interval = 1\n");
    let daemon = volfs.pid();
    // What ext4 answers to files that were open for writing when it met an error: no remount makes
    // one of them read-only while somebody has such a file open.
    let calls = "pwrite64,ftruncate,fallocate,rename,renameat,renameat2,mkdir,mkdirat,unlink,unlinkat,rmdir";
    let (trace, inject) = (format!("trace={calls}"), format!("inject={calls}:error=EROFS"));
    let tracer = Strace::attach(daemon, &["-o", "/dev/null", "-e", &trace, "-e", &inject]);
    let mut replies = Replies::default();
    for _ in 0..2 {
        replies.walk(&volfs.root());
    }
    replies.judge("the filesystem is read-only");
    let told = refused_cleanly(&volfs, "read-only");
    println!("the filesystem is read-only: told {told:?}");
    assert!(told[..4].iter().all(|errno| *errno != 0) && told[5..].iter().all(|errno| *errno != 0), "{told:?}");
    volfs.until("health says so", || health(&volfs) != "ok");
    tracer.detach();
    serves_on(&volfs, daemon, "writable again");
}

#[test]
fn l6_stopped_in_the_middle_of_operations_it_goes_on_with_them() {
    let volfs = Volfs::start_with(&[], "reconcile_interval = 1\n");
    let daemon = volfs.pid();
    let names: Vec<String> =
        ["on", "off"].into_iter().map(str::to_owned).chain((0..8).map(|n| format!("d{n}"))).collect();
    volfs.job("j", &names.iter().map(String::as_str).collect::<Vec<_>>(), "1M");
    let signal = |which| {
        // SAFETY: kill(2) takes no pointers; the pid is this test's own daemon.
        assert_eq!(unsafe { libc::kill(daemon, which) }, 0);
    };
    let (mut verb, mut slowest) = ("attach", Duration::ZERO);
    for round in 0..6 {
        let write =
            |n: usize| volfs.sh_spawn(&["dash"], &format!("echo {verb} timeout=60 > $R/jobs/j/disks/d{n}/control"));
        let callers: Vec<_> = (0..8).map(write).collect();
        // Some have begun, some have not: another share each round.
        volfs.until("some begun", || {
            let status = volfs.value("jobs/j/status");
            status.starts_with("busy") || round % 2 == 1
        });
        signal(libc::SIGSTOP);
        // Past what a reconciling round, a look and a small commit are given.
        let stopped = Instant::now();
        let asks = volfs.sh_spawn(&["dash"], "cat $R/health");
        while stopped.elapsed() < Duration::from_millis(1200) {
            std::thread::park_timeout(Duration::from_millis(1200));
        }
        signal(libc::SIGCONT);
        let went_on = Instant::now();
        let said = finish(asks);
        assert_eq!(said.status, 0, "{said:?}");
        for child in callers {
            let said = finish(child);
            assert_eq!(said.status, 0, "round {round}, {verb}: {said:?}\n{}", volfs.log());
        }
        slowest = slowest.max(went_on.elapsed());
        oracle::settled(&volfs, PATIENCE, "after a stop");
        verb = if verb == "attach" { "detach" } else { "attach" };
    }
    println!("stopped 6 times among 8 operations: all done at most {slowest:?} after it went on");
    serves_on(&volfs, daemon, "after all stops");
}

/// A wall clock of the daemon's own, that a test can set: `clock_gettime` of libc with so many
/// seconds more as the file says.
const CLOCK: &str = r#"
#define _GNU_SOURCE
#include <dlfcn.h>
#include <fcntl.h>
#include <stdlib.h>
#include <time.h>
#include <unistd.h>
int clock_gettime(clockid_t clock, struct timespec *now) {
    static int (*real)(clockid_t, struct timespec *);
    if (!real) real = (int (*)(clockid_t, struct timespec *))dlsym(RTLD_NEXT, "clock_gettime");
    int answer = real(clock, now);
    if (answer || clock != CLOCK_REALTIME) return answer;
    const char *path = getenv("VOLFS_TEST_CLOCK");
    int file = path ? open(path, O_RDONLY | O_CLOEXEC) : -1;
    if (file < 0) return answer;
    char text[32] = {0};
    if (read(file, text, sizeof text - 1) > 0) now->tv_sec += atol(text);
    close(file);
    return answer;
}
"#;

#[test]
fn l6_a_clock_that_jumps_ends_no_operation_early_and_loses_no_status() {
    if !have(&["cc"]) {
        return;
    }
    let mut volfs = Volfs::prepare(&[], "reconcile_interval = 1\n");
    let (source, library) = (volfs.scratch("clock.c"), volfs.scratch("clock.so"));
    fs::write(&source, CLOCK).unwrap();
    let made = Command::new("cc").args(["-shared", "-fPIC", "-o"]).arg(&library).arg(&source).arg("-ldl").status();
    assert!(made.unwrap().success(), "cc");
    let (clock, gate) = (volfs.scratch("clock"), volfs.scratch("gate"));
    let jump = |seconds: i64| {
        // In one step, also for who reads it meanwhile.
        let new: PathBuf = clock.with_extension("new");
        fs::write(&new, seconds.to_string()).unwrap();
        fs::rename(&new, &clock).unwrap();
    };
    jump(0);
    volfs.set_env(&[
        ("LD_PRELOAD", library.to_str().unwrap()),
        ("VOLFS_TEST_CLOCK", clock.to_str().unwrap()),
        ("VOLFS_FAILPOINTS", &format!("attach.before-call=wait:{}", gate.display())),
    ]);
    volfs.launch();
    let daemon = volfs.pid();
    volfs.job("j", &["on", "off"], "1M");
    assert_eq!(volfs.write("jobs/j/disks/on/control", "attach"), 0);
    let year = 365 * 86400;
    for seconds in [year, -year, 10 * year, -86400, 0] {
        let when = format!("{seconds} s");
        let shut = super::Gate::shut(&gate);
        let held = volfs.sh_spawn(&["dash"], "echo attach timeout=60 > $R/jobs/j/disks/off/control");
        volfs.until("attaching", || volfs.value("jobs/j/disks/off/status") == "attaching");
        jump(seconds);
        // Seen by the daemon: the time of a new record is of the other clock.
        assert_eq!(volfs.write("jobs/j/vm_name", &when), 0);
        let mtime = fs::metadata(volfs.path("jobs/j/vm_name")).unwrap().modified().unwrap();
        let wall = std::time::SystemTime::now();
        let ahead =
            mtime.duration_since(wall).map_or_else(|e| -(e.duration().as_secs() as i64), |d| d.as_secs() as i64);
        assert!((ahead - seconds).abs() < 60, "{when}: the daemon's clock is {ahead} s ahead");
        let began = Instant::now();
        let told = volfs.write("jobs/j/disks/off/control", "attach timeout=1");
        let took = began.elapsed();
        assert_eq!(told, libc::ETIMEDOUT, "{when}");
        assert!(took >= Duration::from_secs(1) && took < Duration::from_secs(5), "{when}: {took:?}");
        let mut replies = Replies::default();
        replies.walk(&volfs.root());
        replies.judge(&when);
        assert_eq!(volfs.value("jobs/j/disks/on/status"), "attached", "{when}");
        assert_eq!(volfs.write("control", "reconcile"), 0, "{when}: {:?}", volfs.read("error"));
        assert_eq!(volfs.value("jobs/j/disks/on/status"), "attached", "{when}");
        drop(shut);
        let said = finish(held);
        assert_eq!(said.status, 0, "{when}: {said:?}\n{}", volfs.log());
        assert_eq!(volfs.write("jobs/j/disks/off/control", "detach"), 0, "{when}");
        assert!(health(&volfs) == "ok", "{when}: {:?}", volfs.read("health"));
    }
    serves_on(&volfs, daemon, "the clock is right again");
}
