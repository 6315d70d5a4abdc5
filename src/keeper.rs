//! The keeper: the process that `volfs mount` is. It starts the daemon and holds what must outlive
//! it, the FUSE connection and the daemon's memory (`kept`); it knows nothing of volumes.
//!
//! ```text
//!                 daemon dies                          too many in a row
//!  serving ───────────────────► starting the next ─────────────────────► unmounted, reason logged
//!     ▲  │ SIGHUP: killed on purpose  │
//!     │  └───────────────────────────►│
//!     └───────────────────────────────┘
//!  serving ── the daemon ends by itself (SIGTERM, unmounted) ──► the keeper ends
//! ```
//! Killed itself, it leaves a daemon that serves on and says in `health` that nobody would follow
//! it. Under systemd its descriptor store and `Restart=` are the keeper (`--no-keeper`).
//!
//! They talk over a socket of packets: a word and its text, and with `hold` the two descriptors.

use std::collections::VecDeque;
use std::fs::File;
use std::io::{self, IoSlice, IoSliceMut, Write};
use std::os::fd::{AsFd, BorrowedFd, FromRawFd, OwnedFd};
use std::os::unix::process::ExitStatusExt;
use std::path::PathBuf;
use std::process::{Child, Command, ExitStatus, Stdio};
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::net::{
    AddressFamily, RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SendAncillaryBuffer, SendAncillaryMessage,
    SendFlags, SocketFlags, SocketType, recvmsg, sendmsg, socketpair,
};
use rustix::process::{Pid, PidfdFlags, Signal, kill_process, pidfd_open};

use crate::config::Problem;
use crate::kept::Memory;

/// A daemon that lived less than this has not lived.
const SHORT_LIFE: Duration = Duration::from_secs(1);
/// So many in a row, and there is no next.
const SHORT_LIVES_MOST: usize = 12;
/// The first of them are followed at once, the others after a pause that doubles up to a second.
const AT_ONCE: usize = 3;
const FIRST_PAUSE: Duration = Duration::from_millis(50);
const LONGEST_PAUSE: Duration = Duration::from_secs(1);

/// Descriptors that outlive a daemon.
#[derive(Debug)]
pub struct Held {
    /// The FUSE connection.
    pub fuse: OwnedFd,
    /// The daemon's memory.
    pub memory: OwnedFd,
}

/// Sends one packet.
fn send(socket: BorrowedFd<'_>, word: &str, fds: &[BorrowedFd<'_>]) -> io::Result<()> {
    let mut space = [std::mem::MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(2))];
    let mut control = SendAncillaryBuffer::new(&mut space);
    if !fds.is_empty() && !control.push(SendAncillaryMessage::ScmRights(fds)) {
        return Err(io::Error::other("no room for descriptors"));
    }
    sendmsg(socket, &[IoSlice::new(word.as_bytes())], &mut control, SendFlags::NOSIGNAL)?;
    Ok(())
}

/// Receives one packet; an empty one is the other's end.
fn receive(socket: BorrowedFd<'_>) -> io::Result<(String, Vec<OwnedFd>)> {
    let mut text = [0u8; 8192];
    let mut space = [std::mem::MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(2))];
    let mut control = RecvAncillaryBuffer::new(&mut space);
    let got = recvmsg(socket, &mut [IoSliceMut::new(&mut text)], &mut control, RecvFlags::CMSG_CLOEXEC)?;
    let fds = control.drain().flat_map(|message| match message {
        RecvAncillaryMessage::ScmRights(fds) => fds.collect(),
        _ => Vec::new(),
    });
    let fds = fds.collect();
    Ok((String::from_utf8_lossy(&text[..got.bytes]).into_owned(), fds))
}

const HOLD: &str = "hold";
const FORGET: &str = "forget";
const NEW: &str = "new";
const READY: &str = "ready";
const PROBLEM: &str = "problem ";

/// The daemon's end of the line.
pub struct Line {
    socket: OwnedFd,
    keeper: u32,
}

impl Line {
    /// Standard input is the line; answers what the keeper holds from the daemon before.
    pub fn take() -> Result<(Self, Option<Held>), Problem> {
        let bad = |e: io::Error| Problem::with("cannot hear the keeper", e);
        let socket = io::stdin().as_fd().try_clone_to_owned().map_err(bad)?;
        let (word, fds) = receive(socket.as_fd()).map_err(bad)?;
        let keeper = rustix::process::getppid().map_or(0, |pid| pid.as_raw_nonzero().get().cast_unsigned());
        let mut fds = fds.into_iter();
        let held = match (word.as_str(), fds.next(), fds.next()) {
            (HOLD, Some(fuse), Some(memory)) => Some(Held { fuse, memory }),
            (NEW, ..) => None,
            _ => return Err(Problem("standard input is no keeper's: --kept is not for users".into())),
        };
        Ok((Line { socket, keeper }, held))
    }

    /// The keeper's pid.
    pub fn keeper(&self) -> u32 {
        self.keeper
    }

    /// Gives it what must outlive us.
    pub fn hold(&self, fuse: &File, memory: &Memory) -> Result<(), Problem> {
        send(self.socket.as_fd(), HOLD, &[fuse.as_fd(), memory.fd()])
            .map_err(|e| Problem::with("the keeper does not take the mount", e))
    }

    /// What it holds is of no use: it lets it go, which ends that connection.
    pub fn forget(&self) -> Result<(), Problem> {
        send(self.socket.as_fd(), FORGET, &[]).map_err(|e| Problem::with("the keeper does not hear", e))
    }

    /// The tree answers.
    pub fn ready(&self) -> Result<(), Problem> {
        send(self.socket.as_fd(), READY, &[]).map_err(|e| Problem::with("the keeper does not hear", e))
    }

    /// Why this daemon does not start.
    pub fn problem(&self, problem: &Problem) {
        let words: String = format!("{PROBLEM}{problem}").chars().take(2000).collect();
        if let Err(error) = send(self.socket.as_fd(), &words, &[]) {
            tracing::error!("the keeper does not hear: {error}");
        }
    }

    /// Resolves when the keeper is gone.
    pub async fn ended(&self) {
        let socket = self.socket.try_clone().map(std::os::unix::net::UnixStream::from).and_then(|socket| {
            socket.set_nonblocking(true)?;
            tokio::net::UnixStream::from_std(socket)
        });
        // It says nothing once we have begun: readable is its end.
        match socket {
            Ok(socket) if socket.readable().await.is_ok() => {}
            _ => {
                tracing::error!("the keeper cannot be watched");
                std::future::pending().await
            }
        }
    }
}

/// What happened to a keeper that waits.
enum Heard {
    Signal(Signal),
    Packet(String, Vec<OwnedFd>),
    DaemonEnded,
    Nothing,
}

/// What a daemon's end was for.
#[derive(PartialEq, Eq)]
enum Wanted {
    Nothing,
    /// Another one is to follow.
    Next,
    Stop,
}

struct Keeper {
    program: PathBuf,
    args: Vec<std::ffi::OsString>,
    signals: OwnedFd,
    held: Option<Held>,
    /// Standard output is a pipe to whoever waits for the tree.
    answer: bool,
}

struct Daemon {
    child: Child,
    process: OwnedFd,
    socket: OwnedFd,
    began: Instant,
    ready: bool,
    problem: Option<String>,
}

/// Lets a daemon hear what its keeper has blocked for itself, which children inherit.
pub fn hear_signals() -> Result<(), Problem> {
    // SAFETY: the set is initialised by sigemptyset and lives on this stack; only this thread's mask is
    // changed, and the process has no other yet.
    let changed = unsafe {
        let mut set = std::mem::zeroed::<libc::sigset_t>();
        libc::sigemptyset(&mut set);
        libc::pthread_sigmask(libc::SIG_SETMASK, &set, std::ptr::null_mut())
    };
    match changed {
        0 => Ok(()),
        errno => Err(Problem::with("cannot hear signals", io::Error::from_raw_os_error(errno))),
    }
}

/// Blocks the signals that a keeper waits for, and answers a descriptor that reads them.
fn signals() -> io::Result<OwnedFd> {
    // SAFETY: the set is initialised by sigemptyset before it is used, and lives on this stack; the
    // process has one thread, whose mask is changed; signalfd's descriptor is ours alone.
    unsafe {
        let mut set = std::mem::zeroed::<libc::sigset_t>();
        libc::sigemptyset(&mut set);
        for signal in [libc::SIGTERM, libc::SIGINT, libc::SIGHUP] {
            libc::sigaddset(&mut set, signal);
        }
        match libc::pthread_sigmask(libc::SIG_BLOCK, &set, std::ptr::null_mut()) {
            0 => {}
            errno => return Err(io::Error::from_raw_os_error(errno)),
        }
        match libc::signalfd(-1, &set, libc::SFD_CLOEXEC | libc::SFD_NONBLOCK) {
            fd if fd >= 0 => Ok(OwnedFd::from_raw_fd(fd)),
            _ => Err(io::Error::last_os_error()),
        }
    }
}

fn read_signal(signals: &OwnedFd) -> io::Result<Option<Signal>> {
    let mut info = [0u8; 128];
    match rustix::io::read(signals, &mut info[..]) {
        Ok(n) if n >= 4 => {
            let number = i32::from_ne_bytes([info[0], info[1], info[2], info[3]]);
            Ok(Signal::from_named_raw(number))
        }
        Ok(_) | Err(rustix::io::Errno::AGAIN) => Ok(None),
        Err(e) => Err(e.into()),
    }
}

/// Runs a daemon, and the next one when it dies, until one ends by itself. `answer`: standard output
/// belongs to whoever waits for the tree.
pub fn run(program: PathBuf, answer: bool) -> Result<(), Problem> {
    let args = std::env::args_os().skip(1).filter(|a| a != "--background-child" && a != "--background");
    let signals = signals().map_err(|e| Problem::with("cannot wait for signals", e))?;
    let args = args.chain(["--kept".into()]).collect();
    Keeper { program, args, signals, held: None, answer }.run()
}

impl Keeper {
    fn run(mut self) -> Result<(), Problem> {
        let mut short: VecDeque<String> = VecDeque::new();
        let mut told = false;
        loop {
            let mut daemon = self.start()?;
            let wanted = self.watch(&mut daemon, &mut told)?;
            let status = daemon.child.wait().map_err(|e| Problem::with("cannot wait for the daemon", e))?;
            self.last_words(&mut daemon);
            if status.success() {
                return Ok(());
            }
            if wanted == Wanted::Stop {
                self.let_go(&format!("it was told to stop, and its daemon {}", ended(status)));
                return Ok(());
            }
            if !told && self.held.is_none() {
                // It never served: whoever started it is to know why.
                let words =
                    daemon.problem.unwrap_or_else(|| format!("the daemon {} before its tree answered", ended(status)));
                return Err(Problem(words));
            }
            if wanted == Wanted::Next {
                tracing::info!("the daemon is replaced by {}", self.program.display());
                short.clear();
                continue;
            }
            let why = daemon.problem.take().unwrap_or_else(|| format!("it {}", ended(status)));
            tracing::error!("the daemon died ({why}) after {:.1} s", daemon.began.elapsed().as_secs_f64());
            if daemon.began.elapsed() >= SHORT_LIFE {
                short.clear();
            }
            short.push_back(why);
            if short.len() >= SHORT_LIVES_MOST {
                return self.give_up(&short);
            }
            self.pause(short.len());
        }
    }

    fn start(&mut self) -> Result<Daemon, Problem> {
        let bad = |e: io::Error| Problem::with("cannot start the daemon", e);
        let (ours, theirs) = socketpair(AddressFamily::UNIX, SocketType::SEQPACKET, SocketFlags::CLOEXEC, None)
            .map_err(|e| bad(e.into()))?;
        let mut command = Command::new(&self.program);
        command.args(&self.args).stdin(Stdio::from(theirs));
        if self.answer {
            // Ours to answer on; held open there, its reader would wait for the daemon's end.
            command.stdout(Stdio::null());
        }
        let child = command.spawn().map_err(bad)?;
        drop(command);
        let process = pidfd_open(Pid::from_child(&child), PidfdFlags::empty()).map_err(|e| bad(e.into()))?;
        let fds: Vec<BorrowedFd<'_>> =
            self.held.as_ref().map_or(Vec::new(), |held| vec![held.fuse.as_fd(), held.memory.as_fd()]);
        // One that is dead already is noticed by its end.
        if let Err(error) = send(ours.as_fd(), if fds.is_empty() { NEW } else { HOLD }, &fds) {
            tracing::error!("the daemon that was just started does not hear: {error}");
        }
        Ok(Daemon { child, process, socket: ours, began: Instant::now(), ready: false, problem: None })
    }

    /// Until the daemon has ended.
    fn watch(&mut self, daemon: &mut Daemon, told: &mut bool) -> Result<Wanted, Problem> {
        let mut wanted = Wanted::Nothing;
        loop {
            match self.hear(Some(daemon), None)? {
                Heard::DaemonEnded => return Ok(wanted),
                Heard::Signal(Signal::HUP) => {
                    // Before its tree answers there is nothing to replace.
                    if daemon.ready {
                        wanted = Wanted::Next;
                        self.signal(daemon, Signal::KILL);
                    }
                }
                Heard::Signal(signal) => {
                    tracing::info!("the daemon is told to stop ({signal:?})");
                    wanted = Wanted::Stop;
                    self.signal(daemon, Signal::TERM);
                }
                Heard::Packet(word, fds) => {
                    self.packet(daemon, &word, fds);
                    if daemon.ready && !*told {
                        *told = true;
                        if self.answer && writeln!(io::stdout(), "{READY}").and_then(|()| io::stdout().flush()).is_err()
                        {
                            // Whoever started us was interrupted and believes that nothing is mounted.
                            tracing::error!("nobody waited for the tree, it is unmounted again");
                            self.signal(daemon, Signal::TERM);
                        }
                    }
                }
                Heard::Nothing => {}
            }
        }
    }

    fn signal(&self, daemon: &Daemon, signal: Signal) {
        // Not waited for yet: the pid is still its own.
        if let Err(error) = kill_process(Pid::from_child(&daemon.child), signal) {
            tracing::error!("the daemon cannot be signalled: {error}");
        }
    }

    fn packet(&mut self, daemon: &mut Daemon, word: &str, fds: Vec<OwnedFd>) {
        let mut fds = fds.into_iter();
        match (word, fds.next(), fds.next()) {
            (HOLD, Some(fuse), Some(memory)) => self.held = Some(Held { fuse, memory }),
            (FORGET, ..) => self.held = None,
            (READY, ..) => daemon.ready = true,
            (other, ..) => daemon.problem = other.strip_prefix(PROBLEM).map(str::to_owned),
        }
    }

    /// What it sent before it died.
    fn last_words(&mut self, daemon: &mut Daemon) {
        let now = Timespec { tv_sec: 0, tv_nsec: 0 };
        while matches!(poll(&mut [PollFd::new(&daemon.socket, PollFlags::IN)], Some(&now)), Ok(1)) {
            match receive(daemon.socket.as_fd()) {
                Ok((word, fds)) if !word.is_empty() => self.packet(daemon, &word, fds),
                _ => return,
            }
        }
    }

    /// Waits for the next thing; at most as long as said. A daemon's words come before its end.
    fn hear(&self, daemon: Option<&Daemon>, most: Option<Duration>) -> Result<Heard, Problem> {
        let bad = |e: io::Error| Problem::with("the keeper cannot wait", e);
        let timeout = most.map(|most| Timespec {
            tv_sec: i64::try_from(most.as_secs()).unwrap_or(i64::MAX),
            tv_nsec: most.subsec_nanos().into(),
        });
        let mut fds = vec![PollFd::new(&self.signals, PollFlags::IN)];
        if let Some(daemon) = daemon {
            fds.push(PollFd::new(&daemon.socket, PollFlags::IN));
            fds.push(PollFd::new(&daemon.process, PollFlags::IN));
        }
        match poll(&mut fds, timeout.as_ref()) {
            Ok(0) | Err(rustix::io::Errno::INTR) => return Ok(Heard::Nothing),
            Ok(_) => {}
            Err(e) => return Err(bad(e.into())),
        }
        let ready: Vec<PollFlags> = fds.iter().map(PollFd::revents).collect();
        if ready[0].contains(PollFlags::IN)
            && let Some(signal) = read_signal(&self.signals).map_err(bad)?
        {
            return Ok(Heard::Signal(signal));
        }
        let Some(daemon) = daemon else { return Ok(Heard::Nothing) };
        if ready[1].contains(PollFlags::IN) {
            let (word, fds) = receive(daemon.socket.as_fd()).map_err(bad)?;
            if !word.is_empty() {
                return Ok(Heard::Packet(word, fds));
            }
        }
        if ready[2].contains(PollFlags::IN) {
            return Ok(Heard::DaemonEnded);
        }
        if !ready[1].is_empty() {
            // It has closed its end and is about to end.
            let limit = Timespec { tv_sec: 1, tv_nsec: 0 };
            let mut end = [PollFd::new(&daemon.process, PollFlags::IN)];
            poll(&mut end, Some(&limit)).map_err(|e| bad(e.into()))?;
        }
        Ok(Heard::Nothing)
    }

    /// Between one short life and the next, unless a signal says to stop.
    fn pause(&mut self, short: usize) {
        let Some(doublings) = short.checked_sub(AT_ONCE) else { return };
        let factor = 1u32 << u32::try_from(doublings.min(10)).unwrap_or(10);
        let until = Instant::now() + (FIRST_PAUSE * factor).min(LONGEST_PAUSE);
        while let Some(left) = until.checked_duration_since(Instant::now()).filter(|left| !left.is_zero()) {
            match self.hear(None, Some(left)) {
                Ok(Heard::Signal(Signal::TERM | Signal::INT)) => {
                    self.let_go("it was told to stop");
                    std::process::exit(0);
                }
                Ok(_) => {}
                Err(problem) => {
                    tracing::error!("{problem}");
                    return;
                }
            }
        }
    }

    fn give_up(mut self, short: &VecDeque<String>) -> Result<(), Problem> {
        let last = short.back().map_or("", String::as_str);
        let words = format!("{} daemons in a row died at once, the last because {last}", short.len());
        self.let_go(&words);
        Err(Problem(format!("{words}: the tree is unmounted, and no volume was touched")))
    }

    /// Takes the mount away and ends its connection: nobody waits any longer.
    fn let_go(&mut self, why: &str) {
        let Some(held) = self.held.take() else { return };
        let memory = File::from(held.memory);
        match Memory::who(&memory) {
            Ok((_, Some(connection))) => {
                tracing::error!("{} is unmounted: {why}", connection.mountpoint.display());
                if let Err(error) = crate::fs::take_away(&connection) {
                    tracing::error!("{} cannot be unmounted: {error}", connection.mountpoint.display());
                }
            }
            Ok((_, None)) => {}
            Err(error) => tracing::error!("where the tree is mounted is not known: {error}"),
        }
        // The last descriptor of the connection: what waits in it gets ENOTCONN.
        drop(held.fuse);
    }
}

/// How a process ended, as the end of a sentence.
pub fn ended(status: ExitStatus) -> String {
    match (status.code(), status.signal()) {
        (Some(code), _) => format!("ended with status {code}"),
        (None, Some(signal)) => format!("was killed by signal {signal}"),
        (None, None) => "ended".into(),
    }
}
