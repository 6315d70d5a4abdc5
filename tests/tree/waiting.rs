//! Who waits, how the wait ends, and that nothing else ends it.

use std::fs;
use std::io::{BufRead, BufReader, Read, Seek, Write};
use std::os::fd::AsFd;
use std::os::unix::fs::OpenOptionsExt;
use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdout, Command, Stdio};
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, epoll};
use rustix::process::{Pid, Signal};

use super::common::{PATIENCE, SHELLS, Volfs};

/// A held operation is let go within this of its word; an answer "at once" has this long on a
/// machine that is busy with other tests.
pub const AT_ONCE: Duration = Duration::from_secs(2);

/// What holds an operation at a failpoint, for as long as the file exists.
pub struct Gate(PathBuf);

impl Gate {
    pub fn shut(path: PathBuf) -> Self {
        fs::write(&path, "").unwrap();
        Gate(path)
    }

    pub fn open(&self) {
        fs::remove_file(&self.0).unwrap();
    }
}

impl Drop for Gate {
    fn drop(&mut self) {
        let _ = fs::remove_file(&self.0);
    }
}

/// A volfs whose operations stop at `point` until the gate opens. Bind the gate behind the volfs:
/// then it opens before the daemon is ended.
pub fn held_at(point: &str) -> (Volfs, Gate) {
    let mut volfs = Volfs::prepare(&[], "");
    let path = volfs.scratch("gate");
    let point = format!("{point}=wait:{}", path.display());
    volfs.set_env(&[("VOLFS_FAILPOINTS", &point)]);
    volfs.launch();
    (volfs, Gate::shut(path))
}

/// A process in a group of its own, killed with its group when the test is over.
pub struct Kid {
    child: Child,
    out: Option<BufReader<ChildStdout>>,
}

impl Kid {
    /// A shell's script with `$R` the mount point.
    pub fn shell(volfs: &Volfs, shell: &[&str], script: &str) -> Self {
        let mut command = Command::new(shell[0]);
        command.args(&shell[1..]).arg("-c").arg(script);
        Self::of(volfs, command)
    }

    /// A Python script with `argv[1]` the mount point.
    pub fn python(volfs: &Volfs, script: &str) -> Self {
        let mut command = Command::new("/usr/bin/python3");
        command.arg("-c").arg(script).arg(volfs.root());
        Self::of(volfs, command)
    }

    pub fn of(volfs: &Volfs, command: Command) -> Self {
        Self::with_input(volfs, command, Stdio::null())
    }

    pub fn with_input(volfs: &Volfs, mut command: Command, input: impl Into<Stdio>) -> Self {
        command.env("R", volfs.root()).current_dir("/").process_group(0);
        command.stdin(input).stdout(Stdio::piped()).stderr(Stdio::piped());
        let mut child = command.spawn().unwrap();
        let out = child.stdout.take().map(BufReader::new);
        Kid { child, out }
    }

    pub fn pid(&self) -> i32 {
        self.child.id() as i32
    }

    /// To the whole group, as a terminal does.
    pub fn signal(&self, signal: Signal) {
        rustix::process::kill_process_group(Pid::from_child(&self.child), signal).unwrap();
    }

    /// To the process alone.
    pub fn signal_alone(&self, signal: Signal) {
        rustix::process::kill_process(Pid::from_child(&self.child), signal).unwrap();
    }

    /// The next line of its output; empty at the end.
    pub fn line(&mut self) -> String {
        let mut line = String::new();
        self.out.as_mut().unwrap().read_line(&mut line).unwrap();
        line
    }

    pub fn runs(&mut self) -> bool {
        self.child.try_wait().unwrap().is_none()
    }

    /// Its exit status or -signal, and what it said on standard error.
    pub fn end(mut self) -> (i32, String) {
        let mut err = String::new();
        self.child.stderr.take().unwrap().read_to_string(&mut err).unwrap();
        let status = self.child.wait().unwrap();
        (status.code().unwrap_or_else(|| -status.signal().unwrap_or(0)), err)
    }

    /// The same, once it ends, with how long that took from now.
    pub fn end_timed(self) -> (i32, Duration) {
        let began = Instant::now();
        let (status, _) = self.end();
        (status, began.elapsed())
    }

    /// Whether it is inside that system call now.
    pub fn inside(&self, call: libc::c_long) -> bool {
        let text = fs::read_to_string(format!("/proc/{}/syscall", self.pid())).unwrap_or_default();
        text.split(' ').next() == Some(&call.to_string())
    }

    /// Its pending signals, bit N-1 for signal N.
    fn pending(&self) -> u64 {
        let text = fs::read_to_string(format!("/proc/{}/status", self.pid())).unwrap();
        let mask = |name: &str| {
            let line = text.lines().find_map(|l| l.strip_prefix(name)).unwrap();
            u64::from_str_radix(line.trim(), 16).unwrap()
        };
        mask("SigPnd:") | mask("ShdPnd:")
    }

    pub fn has_pending(&self, signals: &[Signal]) -> bool {
        let pending = self.pending();
        signals.iter().all(|s| pending & 1 << (s.as_raw() - 1) != 0)
    }
}

impl Drop for Kid {
    fn drop(&mut self) {
        // ESRCH: the group is gone already.
        let _ = rustix::process::kill_process_group(Pid::from_child(&self.child), Signal::KILL);
        let _ = self.child.wait();
    }
}

/// The volume's status word.
pub fn status(volfs: &Volfs, job: &str, disk: &str) -> String {
    volfs.value(format!("jobs/{job}/disks/{disk}/status"))
}

/// How many callers the volume's operation in flight has had; 0 when there is none.
pub fn callers(volfs: &Volfs, job: &str, disk: &str) -> u64 {
    let info = volfs.read(format!("jobs/{job}/disks/{disk}/info.json")).unwrap();
    let info: serde_json::Value = serde_json::from_str(&info).unwrap();
    let id = &info["operation"]["id"];
    if id.is_null() {
        return 0;
    }
    let op: serde_json::Value = serde_json::from_str(&volfs.read(format!("operations/{id}")).unwrap()).unwrap();
    op["callers"].as_u64().unwrap()
}

/// How often that verb is in the job's history.
pub fn times_done(volfs: &Volfs, job: &str, verb: &str) -> usize {
    let history = volfs.read(format!("jobs/{job}/history")).unwrap();
    history.lines().filter(|l| l.split('\t').nth(1) == Some(verb)).count()
}

/// Starts a writer and waits until its command is at the gate.
pub fn parked(volfs: &Volfs, shell: &[&str], script: &str) -> Kid {
    let before = callers(volfs, "a", "d");
    let kid = Kid::shell(volfs, shell, script);
    volfs.until("caller", || callers(volfs, "a", "d") == before + 1);
    volfs.until("write", || kid.inside(libc::SYS_write));
    kid
}

/// The command that the gate holds.
pub const ATTACH: &str = "echo attach > $R/jobs/a/disks/d/control";

/// Two callers are parked and killed, one after the other: when both are free, the watcher has
/// looked at every other caller since this began.
pub fn a_round_of_the_watcher(volfs: &Volfs) {
    for _ in 0..2 {
        let witness = parked(volfs, &["dash"], ATTACH);
        witness.signal(Signal::KILL);
        assert_eq!(witness.end().0, -9);
    }
}

#[test]
fn wait_ctrl_c_ends_the_wait_in_each_shell_and_the_operation_goes_on() {
    let (volfs, gate) = held_at("attach.before-call");
    volfs.job("a", &["d"], "4M");
    for shell in SHELLS {
        let kid = parked(&volfs, shell, ATTACH);
        kid.signal(Signal::INT);
        let (status_, took) = kid.end_timed();
        // dash and busybox die of it, bash says so by its status.
        assert!([-2, 1, 130].contains(&status_), "{shell:?}: {status_}");
        assert!(took < AT_ONCE, "{shell:?}: {took:?}");
        assert_eq!(status(&volfs, "a", "d"), "attaching");
    }
    assert!(volfs.value("jobs/a/disks/d/error").contains("EINTR"));
    gate.open();
    volfs.until("attachment", || status(&volfs, "a", "d") == "attached");
    assert_eq!(times_done(&volfs, "a", "attach"), 1);
}

#[test]
fn wait_timeout_1_ends_after_a_second_with_124_and_the_same_command_joins() {
    let (volfs, gate) = held_at("attach.before-call");
    volfs.job("a", &["d"], "4M");
    let began = Instant::now();
    let said = volfs.sh("timeout 1 sh -c 'echo attach > $R/jobs/a/disks/d/control'");
    let took = began.elapsed();
    println!("timeout 1 took {took:?}");
    assert_eq!(said.status, 124);
    assert!(took >= Duration::from_secs(1) && took < Duration::from_secs(1) + AT_ONCE, "{took:?}");
    assert_eq!(status(&volfs, "a", "d"), "attaching");
    let second = parked(&volfs, &["dash"], ATTACH);
    gate.open();
    assert_eq!(second.end(), (0, String::new()));
    assert_eq!(status(&volfs, "a", "d"), "attached");
    assert_eq!(times_done(&volfs, "a", "attach"), 1, "{}", volfs.read("jobs/a/history").unwrap());
}

#[test]
fn wait_kill_9_frees_a_caller() {
    let (volfs, gate) = held_at("attach.before-call");
    volfs.job("a", &["d"], "4M");
    let mut all: Vec<Duration> = Vec::new();
    for _ in 0..10 {
        let kid = parked(&volfs, &["dash"], ATTACH);
        kid.signal(Signal::KILL);
        let (status, took) = kid.end_timed();
        assert_eq!(status, -9);
        all.push(took);
    }
    all.sort();
    println!("SIGKILL to the end of the process: median {:?}, worst {:?}", all[5], all[9]);
    // 150 ms on an idle machine; this one runs other tests.
    assert!(all[9] < Duration::from_secs(1), "{all:?}");
    gate.open();
    volfs.until("attachment", || status(&volfs, "a", "d") == "attached");
}

#[test]
fn wait_chld_cont_urg_and_winch_end_nothing() {
    let (volfs, gate) = held_at("attach.before-call");
    volfs.job("a", &["d"], "4M");
    let harmless = [Signal::CHILD, Signal::CONT, Signal::URG, Signal::WINCH];
    // Caught, or the kernel would drop them at once.
    let script = format!("trap : CHLD CONT URG WINCH; {ATTACH}");
    let mut kid = parked(&volfs, &["bash"], &script);
    for signal in harmless {
        kid.signal_alone(signal);
    }
    volfs.until("pending signals", || kid.has_pending(&harmless));
    a_round_of_the_watcher(&volfs);
    assert!(kid.runs() && kid.inside(libc::SYS_write));
    gate.open();
    assert_eq!(kid.end(), (0, String::new()));
}

#[test]
fn wait_ignored_signals_end_nothing() {
    let (volfs, gate) = held_at("attach.before-call");
    volfs.job("a", &["d"], "4M");
    let mut kid = parked(&volfs, &["dash"], &format!("trap '' INT TERM HUP; {ATTACH}"));
    for signal in [Signal::INT, Signal::TERM, Signal::HUP] {
        kid.signal(signal);
    }
    a_round_of_the_watcher(&volfs);
    assert!(kid.runs() && kid.inside(libc::SYS_write));
    gate.open();
    assert_eq!(kid.end(), (0, String::new()));
}

const BLOCKED: &str = r#"
import os, signal, sys
signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTERM, signal.SIGINT])
f = os.open(sys.argv[1] + "/jobs/a/disks/d/control", os.O_WRONLY)
os.write(f, b"attach")
os._exit(0)
"#;

#[test]
fn wait_blocked_signals_end_nothing() {
    if !crate::common::have(&["/usr/bin/python3"]) {
        return;
    }
    let (volfs, gate) = held_at("attach.before-call");
    volfs.job("a", &["d"], "4M");
    let mut kid = Kid::python(&volfs, BLOCKED);
    volfs.until("caller", || callers(&volfs, "a", "d") == 1);
    kid.signal(Signal::TERM);
    kid.signal(Signal::INT);
    volfs.until("pending signals", || kid.has_pending(&[Signal::TERM, Signal::INT]));
    a_round_of_the_watcher(&volfs);
    assert!(kid.runs());
    gate.open();
    assert_eq!(kid.end(), (0, String::new()));
}

#[test]
fn wait_ctrl_z_stops_the_writer_and_fg_joins_the_operation_again() {
    let (volfs, gate) = held_at("attach.before-call");
    volfs.job("a", &["d"], "4M");
    let kid = parked(&volfs, &["dash"], ATTACH);
    kid.signal(Signal::TSTP);
    let state = || {
        let stat = fs::read_to_string(format!("/proc/{}/stat", kid.pid())).unwrap();
        stat.rsplit_once(") ").unwrap().1.chars().next()
    };
    volfs.until("stopped shell", || state() == Some('T'));
    kid.signal(Signal::CONT);
    volfs.until("second join", || callers(&volfs, "a", "d") == 2);
    gate.open();
    assert_eq!(kid.end(), (0, String::new()));
    assert_eq!(times_done(&volfs, "a", "attach"), 1);
}

const RETRIES: &str = r#"
import os, signal, sys
def caught(*_):
    print("caught", flush=True)
signal.signal(signal.SIGUSR1, caught)
f = os.open(sys.argv[1] + "/jobs/a/disks/d/control", os.O_WRONLY)
os._exit(0 if os.write(f, b"attach\n") == 7 else 1)
"#;

#[test]
fn wait_python_writes_again_after_a_caught_signal_and_joins() {
    if !crate::common::have(&["/usr/bin/python3"]) {
        return;
    }
    let (volfs, gate) = held_at("attach.before-call");
    volfs.job("a", &["d"], "4M");
    let mut kid = Kid::python(&volfs, RETRIES);
    volfs.until("caller", || callers(&volfs, "a", "d") == 1);
    for n in 2..5 {
        kid.signal(Signal::USR1);
        assert_eq!(kid.line(), "caught\n");
        volfs.until("join", || callers(&volfs, "a", "d") == n);
    }
    gate.open();
    assert_eq!(kid.end(), (0, String::new()));
    assert_eq!(times_done(&volfs, "a", "attach"), 1);
}

#[test]
fn wait_a_deadline_passes_and_the_operation_goes_on() {
    let (volfs, gate) = held_at("attach.before-call");
    volfs.job("a", &["d"], "4M");
    let began = Instant::now();
    assert_eq!(volfs.write("jobs/a/disks/d/control", "attach timeout=1"), libc::ETIMEDOUT);
    let took = began.elapsed();
    println!("timeout=1 took {took:?}");
    assert!(took >= Duration::from_secs(1) && took < Duration::from_secs(1) + AT_ONCE, "{took:?}");
    assert_eq!(status(&volfs, "a", "d"), "attaching");
    assert!(volfs.value("jobs/a/disks/d/error").contains("attach"));
    gate.open();
    volfs.until("attachment", || status(&volfs, "a", "d") == "attached");
    assert_eq!(times_done(&volfs, "a", "attach"), 1);
}

#[test]
fn wait_nowait_and_o_nonblock_return_while_the_operation_is_held() {
    let (volfs, gate) = held_at("attach.before-call");
    volfs.job("a", &["d", "e"], "4M");
    // The gate is shut: whoever waited would wait for ever.
    let began = Instant::now();
    assert_eq!(volfs.write("jobs/a/disks/d/control", "attach nowait\n"), 0);
    let path = volfs.path("jobs/a/disks/e/control");
    let mut file = fs::OpenOptions::new().write(true).custom_flags(libc::O_NONBLOCK).open(path).unwrap();
    file.write_all(b"attach\n").unwrap();
    println!("two answers in {:?}", began.elapsed());
    for disk in ["d", "e"] {
        assert_eq!(status(&volfs, "a", disk), "attaching");
    }
    gate.open();
    for disk in ["d", "e"] {
        volfs.until("attachment", || status(&volfs, "a", disk) == "attached");
    }
}

/// A daemon in a pid namespace of its own, which sees nobody outside it.
fn apart(volfs: &Volfs) -> Kid {
    let daemon = volfs.command();
    let mut command = Command::new("unshare");
    command.args(["-p", "--fork", "--kill-child", "--mount-proc"]).arg(daemon.get_program()).args(daemon.get_args());
    command.arg("--background-child").envs(daemon.get_envs().filter_map(|(k, v)| Some((k, v?))));
    let mut kid = Kid::of(volfs, command);
    assert_eq!(kid.line(), "ready\n");
    kid
}

#[test]
fn wait_a_caller_that_volfs_cannot_see_has_pid_0_and_ends_by_its_deadline() {
    let mut volfs = Volfs::prepare(&[], "");
    let gate = Gate::shut(volfs.scratch("gate"));
    let point = format!("attach.before-call=wait:{}", gate.0.display());
    volfs.set_env(&[("VOLFS_FAILPOINTS", &point)]);
    let daemon = apart(&volfs);
    // Its mounts, but the test's own pid namespace.
    let inside = |script: &str| {
        let mut command = Command::new("nsenter");
        let child = fs::read_to_string(format!("/proc/{0}/task/{0}/children", daemon.pid())).unwrap();
        command.args(["-m", "-t", child.trim(), "bash", "-c", script]);
        Kid::of(&volfs, command)
    };
    let made = inside("mkdir $R/jobs/a && echo 'create d 4M' > $R/jobs/a/control").end();
    assert_eq!(made, (0, String::new()));
    let began = Instant::now();
    let (code, err) = inside("echo 'attach timeout=1' > $R/jobs/a/disks/d/control").end();
    let took = began.elapsed();
    assert_eq!(code, 1, "{err}");
    assert!(err.contains("Connection timed out"), "{err}");
    assert!(took >= Duration::from_secs(1) && took < Duration::from_secs(1) + AT_ONCE, "{took:?}");
    gate.open();
    let mut again = inside("echo attach > $R/jobs/a/disks/d/control && cut -f 2,9 $R/jobs/a/disks/d/history");
    assert_eq!(again.line(), "operation\tpid\n");
    assert_eq!(again.line(), "create\t0\n");
    assert_eq!(again.line(), "attach\t0\n");
    assert_eq!(again.end(), (0, String::new()));
    assert_eq!(inside("echo detach > $R/jobs/a/disks/d/control").end(), (0, String::new()));
}

#[test]
fn wait_a_caller_of_a_pid_namespace_below_is_seen_and_freed_by_its_signals() {
    let (volfs, gate) = held_at("attach.before-call");
    volfs.job("a", &["d"], "4M");
    let mut command = Command::new("unshare");
    command.args(["-p", "--fork", "--mount-proc", "--kill-child", "dash", "-c", ATTACH]);
    let kid = Kid::of(&volfs, command);
    volfs.until("caller", || callers(&volfs, "a", "d") == 1);
    // The parent's death kills it, and it is the caller that holds the pipe open.
    kid.signal_alone(Signal::KILL);
    let (_, took) = kid.end_timed();
    println!("SIGKILL into the namespace: {took:?}");
    assert!(took < AT_ONCE, "{took:?}");
    gate.open();
    volfs.until("attachment", || status(&volfs, "a", "d") == "attached");
}

/// Whether poll says that the value differs from what was read; waits for it as long as given.
fn told(file: &impl AsFd, most: Duration) -> bool {
    let mut polled = [PollFd::new(file, PollFlags::PRI)];
    let most = rustix::event::Timespec { tv_sec: most.as_secs() as i64, tv_nsec: i64::from(most.subsec_nanos()) };
    rustix::event::poll(&mut polled, Some(&most)).unwrap();
    polled[0].revents().contains(PollFlags::PRI)
}

fn reread(file: &mut fs::File) -> String {
    let mut text = String::new();
    file.rewind().unwrap();
    file.read_to_string(&mut text).unwrap();
    text
}

#[test]
fn wait_poll_wakes_on_each_change_of_status_and_only_then() {
    let (volfs, gate) = held_at("attach.before-call");
    volfs.job("a", &["d", "e"], "4M");
    let mut file = fs::File::open(volfs.path("jobs/a/disks/d/status")).unwrap();
    assert_eq!(reread(&mut file), "detached\n");
    assert!(!told(&file, Duration::ZERO));
    // Another volume's changes are none of this file's.
    assert_eq!(volfs.write("jobs/a/disks/e/control", "attach nowait"), 0);
    assert!(!told(&file, Duration::ZERO));
    std::thread::scope(|scope| {
        let waiter = scope.spawn(|| told(&file, PATIENCE));
        assert_eq!(volfs.write("jobs/a/disks/d/control", "attach nowait"), 0);
        assert!(waiter.join().unwrap());
    });
    assert_eq!(reread(&mut file), "attaching\n");
    assert!(!told(&file, Duration::ZERO), "told twice of one change");
    gate.open();
    assert!(told(&file, PATIENCE));
    assert_eq!(reread(&mut file), "attached\n");
    assert!(!told(&file, Duration::ZERO), "told twice of one change");
}

#[test]
fn wait_epoll_wakes_once_a_change() {
    let (volfs, gate) = held_at("attach.before-call");
    volfs.job("a", &["d"], "4M");
    let mut file = fs::File::open(volfs.path("jobs/a/disks/d/status")).unwrap();
    reread(&mut file);
    let epoll_fd = epoll::create(epoll::CreateFlags::CLOEXEC).unwrap();
    let what = epoll::EventFlags::PRI | epoll::EventFlags::ET;
    epoll::add(&epoll_fd, &file, epoll::EventData::new_u64(7), what).unwrap();
    let wait = |seconds| {
        let most = rustix::event::Timespec { tv_sec: seconds, tv_nsec: 0 };
        let mut events: Vec<epoll::Event> = Vec::with_capacity(4);
        epoll::wait(&epoll_fd, rustix::buffer::spare_capacity(&mut events), Some(&most)).unwrap();
        events.len()
    };
    assert_eq!(wait(0), 0);
    assert_eq!(volfs.write("jobs/a/disks/d/control", "attach nowait"), 0);
    assert_eq!(wait(30), 1);
    assert_eq!(reread(&mut file), "attaching\n");
    assert_eq!(wait(0), 0, "woken twice by one change");
    gate.open();
    assert_eq!(wait(30), 1);
    assert_eq!(reread(&mut file), "attached\n");
    assert_eq!(wait(0), 0, "woken twice by one change");
}

const SELECT: &str = r#"
import os, select, sys
f = os.open(sys.argv[1] + "/jobs/a/disks/d/status", os.O_RDONLY)
def look():
    os.lseek(f, 0, 0)
    return os.read(f, 100)
def told(most):
    return select.select([], [], [f], most)[2] == [f]
first = look()
if told(0): sys.exit("told before a change")
print("ready", flush=True)
if not told(30): sys.exit("not told")
if look() == first: sys.exit("told of nothing")
if told(0): sys.exit("told twice")
"#;

#[test]
fn wait_select_wakes_on_a_change_of_status() {
    if !crate::common::have(&["/usr/bin/python3"]) {
        return;
    }
    let (volfs, _gate) = held_at("attach.before-call");
    volfs.job("a", &["d"], "4M");
    let mut kid = Kid::python(&volfs, SELECT);
    assert_eq!(kid.line(), "ready\n");
    assert_eq!(volfs.write("jobs/a/disks/d/control", "attach nowait"), 0);
    assert_eq!(kid.end(), (0, String::new()));
}

#[test]
fn wait_other_files_answer_while_a_command_is_held() {
    let (volfs, gate) = held_at("attach.before-call");
    volfs.job("a", &["d", "e"], "4M");
    let kid = parked(&volfs, &["dash"], ATTACH);
    let mut worst = Duration::ZERO;
    for below in ["jobs/a/disks/d/status", "jobs/a/disks/d/control", "jobs/a/disks/d/info.json", "health", "table"] {
        let began = Instant::now();
        volfs.value_or_text(below);
        fs::metadata(volfs.path(below)).unwrap();
        worst = worst.max(began.elapsed());
    }
    let began = Instant::now();
    volfs.ok("ls -lR $R > /dev/null; mkdir $R/jobs/b; rmdir $R/jobs/b");
    println!("one file at most {worst:?}, all of them {:?}", began.elapsed());
    assert!(worst < AT_ONCE);
    gate.open();
    assert_eq!(kid.end().0, 0);
}

#[test]
fn wait_a_reader_of_events_is_killed_at_once_by_any_signal() {
    let volfs = Volfs::start();
    for signal in [Signal::INT, Signal::TERM, Signal::KILL] {
        let mut command = Command::new("cat");
        command.arg(volfs.path("events/all"));
        let kid = Kid::of(&volfs, command);
        volfs.until("reader", || kid.inside(libc::SYS_read));
        kid.signal(signal);
        let (status, took) = kid.end_timed();
        println!("{signal:?}: {took:?}");
        assert_eq!(status, -signal.as_raw());
        assert!(took < AT_ONCE, "{took:?}");
    }
}

#[test]
fn wait_a_panic_in_a_handler_is_eio_for_its_caller_and_the_mount_lives() {
    let volfs = Volfs::start_with(&[("VOLFS_FAILPOINTS", "fs.panic=panic")], "");
    let stat = || fs::metadata(volfs.path("version")).map(|_| ()).map_err(|e| e.raw_os_error());
    assert_eq!(stat(), Err(Some(libc::EIO)));
    assert_eq!(stat(), Err(Some(libc::EIO)));
    volfs.job("a", &["d"], "4M");
    volfs.ok("echo attach > $R/jobs/a/control; cat $R/table; echo detach > $R/jobs/a/control");
    assert!(volfs.log().contains("panicked"));
}

#[test]
fn wait_sigterm_answers_all_callers_and_ends_in_time() {
    let (mut volfs, _gate) = held_at("attach.before-call");
    volfs.job("a", &["d"], "4M");
    let mut kids: Vec<Kid> = (0..5).map(|_| parked(&volfs, &["bash"], ATTACH)).collect();
    let mut command = Command::new("cat");
    command.arg(volfs.path("events/all"));
    let reader = Kid::of(&volfs, command);
    volfs.until("reader", || reader.inside(libc::SYS_read));
    // One stands in the tree: the mount cannot go at once.
    let mut stands = Kid::shell(&volfs, &["bash"], "cd $R/jobs/a && echo there && read x < <(sleep 1000)");
    assert_eq!(stands.line(), "there\n");
    kids.push(reader);
    let (status, took) = volfs.terminate();
    println!("SIGTERM took {took:?}");
    assert_eq!(status, 0, "{}", volfs.log());
    assert!(took < Duration::from_secs(5), "{took:?}");
    for kid in kids {
        let (status, err) = kid.end();
        assert_eq!(status, 1, "{err}");
    }
    let mounts = fs::read_to_string("/proc/self/mountinfo").unwrap();
    assert!(!mounts.contains(volfs.root().to_str().unwrap()), "a dead mount is left");
}

impl Volfs {
    /// The whole text of a file that may be a table.
    fn value_or_text(&self, below: impl AsRef<Path>) -> String {
        let below = below.as_ref();
        self.read(below).unwrap_or_else(|e| panic!("{}: errno {e}", below.display()))
    }
}
