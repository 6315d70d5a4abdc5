//! L4: every caller can be killed within a second, whatever it waits for.

use std::fs;
use std::os::unix::process::ExitStatusExt;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use super::{Gate, REPLY};
use crate::common::{PATIENCE, Volfs, finish, have};
use crate::kill::Strace;

/// What callers do: each is one process that makes one call into the tree.
const CALLERS: [(&str, &str); 9] = [
    ("attach", "echo attach > $R/jobs/j/disks/off/control"),
    ("detach", "echo detach > $R/jobs/j/disks/on/control"),
    ("join", "echo attach > $R/jobs/j/disks/off/control"),
    ("job", "echo 'attach' > $R/jobs/j/control"),
    ("create", "echo 'create more 1M' > $R/jobs/j/control"),
    ("destroy", "echo 'destroy j' > $R/jobs/j/control"),
    ("holders", "exec cat $R/jobs/j/disks/on/holders"),
    ("events", "exec cat $R/events/all"),
    ("reconcile", "echo reconcile > $R/control"),
];

fn caller(volfs: &Volfs, script: &str) -> Child {
    let mut command = Command::new("dash");
    command.args(["-c", script]).env("R", volfs.root()).stdin(Stdio::null());
    command.stdout(Stdio::null()).stderr(Stdio::null()).spawn().unwrap()
}

/// In a call into the tree: sleeping in the kernel's FUSE code, or wherever it now waits.
fn waits(child: &Child) -> bool {
    let pid = child.id();
    let state = fs::read_to_string(format!("/proc/{pid}/wchan")).unwrap_or_default();
    ["fuse", "request_wait"].iter().any(|part| state.contains(part))
}

/// SIGKILL, and how long until it is gone; `None` if it had ended by itself.
fn killed(mut child: Child, what: &str) -> Option<Duration> {
    let began = Instant::now();
    child.kill().unwrap();
    let status = loop {
        if let Some(status) = child.try_wait().unwrap() {
            break status;
        }
        assert!(began.elapsed() < PATIENCE, "{what} outlives its SIGKILL");
        std::thread::sleep(Duration::from_millis(1));
    };
    let took = began.elapsed();
    assert!(took < REPLY, "{what} was killed after {took:?}");
    (status.signal() == Some(libc::SIGKILL)).then_some(took)
}

fn held(volfs: &mut Volfs) -> Gate {
    let gate = volfs.scratch("gate");
    let points = ["attach", "detach", "create"].map(|v| format!("{v}.before-call=wait:{}", gate.display()));
    volfs.set_env(&[("VOLFS_FAILPOINTS", &points.join(";"))]);
    volfs.launch();
    volfs.job("j", &["on", "off"], "1M");
    assert_eq!(volfs.write("jobs/j/disks/on/control", "attach"), 0);
    Gate::shut(&gate)
}

#[test]
fn l4_every_kind_of_waiting_caller_is_killed_within_a_second() {
    if !have(&["strace"]) {
        return;
    }
    let mut volfs = Volfs::prepare(&[], "");
    let gate = held(&mut volfs);
    // A walk through /proc takes long now, so that `holders` waits for it.
    let inject = "inject=getdents64:delay_exit=40000";
    let tracer = Strace::attach(volfs.pid(), &["-o", "/dev/null", "-e", "trace=getdents64", "-e", inject]);
    let mut worst = (Duration::ZERO, "");
    let mut count = 0;
    for (what, script) in CALLERS {
        // What is not held by the gate ends by itself: then there is nobody to kill.
        let mut child = caller(&volfs, script);
        let mut ended = false;
        volfs.until(what, || {
            ended = child.try_wait().unwrap().is_some();
            ended || waits(&child)
        });
        // One that is refused at once may have been on its way, and not waiting.
        let took = if ended { None } else { killed(child, what) };
        let Some(took) = took else {
            assert!(["destroy", "job", "reconcile", "join"].contains(&what), "{what} did not wait");
            continue;
        };
        count += 1;
        worst = worst.max((took, what));
    }
    println!("{count} kinds of waiting callers, killed within {:?} ({})", worst.0, worst.1);
    assert!(count >= 5, "{count}");
    tracer.detach();
    drop(gate);
    volfs.until("settled", || volfs.value("jobs/j/status").starts_with("idle"));
}

#[test]
fn l4_l6_who_comes_while_the_daemon_is_stopped_is_killed_within_a_second_and_it_goes_on() {
    let mut volfs = Volfs::prepare(&[], "");
    volfs.launch();
    volfs.job("j", &["on", "off"], "1M");
    let signal = |which| {
        // SAFETY: kill(2) takes no pointers; the pid is this test's own daemon.
        assert_eq!(unsafe { libc::kill(volfs.pid(), which) }, 0);
    };
    signal(libc::SIGSTOP);
    let stat = fs::read_to_string(format!("/proc/{}/stat", volfs.pid())).unwrap_or_default();
    assert!(!stat.is_empty());
    volfs.until("stopped", || {
        let stat = fs::read_to_string(format!("/proc/{}/stat", volfs.pid())).unwrap();
        stat.rsplit(") ").next().unwrap().starts_with('T')
    });
    let scripts = [
        "exec cat $R/health",
        "exec ls -lR $R/jobs",
        "exec stat $R/version",
        "exec mkdir $R/jobs/passing",
        "exec rmdir $R/jobs/j",
        "exec find $R -name nothing",
        "echo attach > $R/jobs/j/disks/off/control",
        "exec tail -f $R/events/all",
    ];
    let all: Vec<_> = scripts.iter().map(|script| (caller(&volfs, script), *script)).collect();
    volfs.until("all wait", || all.iter().all(|(child, _)| waits(child)));
    let killed = |(child, what): (Child, &str)| killed(child, what).unwrap_or_else(|| panic!("{what} had ended"));
    let worst = all.into_iter().map(killed).max().unwrap();
    println!("{} callers of a stopped daemon, killed within {worst:?}", scripts.len());
    let waiting = volfs.sh_spawn(&["dash"], "echo attach > $R/jobs/j/disks/on/control && head -n 1 $R/health");
    signal(libc::SIGCONT);
    let said = finish(waiting);
    assert_eq!((said.status, &*said.out), (0, "ok\n"), "{said:?}\n{}", volfs.log());
}
