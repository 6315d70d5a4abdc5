//! Parked requests: each a value that is answered exactly once, by whoever takes it out first:
//! its outcome, its deadline, a pending signal of its caller, or shutdown. No thread is held.
//!
//! The kernel's own interruption does not reach us (kernel fact 1): a caller whose request we have
//! read sleeps on through SIGKILL until it is answered. So one watcher looks at the callers'
//! pending signals while anything is parked, and sleeps while nothing is.

use std::collections::HashMap;
use std::io::Read;
use std::sync::Arc;
use std::time::{Duration, Instant};

use fuser::{ReplyData, ReplyEmpty, ReplyEntry, ReplyOpen, ReplyWrite};
use parking_lot::{Condvar, Mutex};

use super::before::RawReply;
use super::core::Core;
use super::errno;
use crate::engine::{Left, Target};
use crate::error::Errno;
use crate::kept::Kept;
use crate::model::{Caller, OpId, Verb};

/// How often the callers are looked at; twice that when a look at all of them is expensive.
const LOOK_EVERY: Duration = Duration::from_millis(50);
/// A caller that cannot be seen has no watch: it waits no longer than this.
const UNSEEN_MOST: Duration = Duration::from_secs(100);
/// What a stream's reader gets where an administrator's request timeout ends its wait.
const STILL_HERE: &[u8] = b"{\"lost\":0}\n";

/// The kernel's reply object of a parked request.
pub enum Reply {
    /// A command or value, with the length to answer.
    Write(ReplyWrite, u32),
    Data(ReplyData),
    Entry(ReplyEntry),
    Empty(ReplyEmpty),
    Open(ReplyOpen),
    /// A write that the daemon before had read: answered by its number, with the length.
    Raw(RawReply, u32),
    #[cfg(test)]
    Test(std::sync::mpsc::Sender<Errno>),
}

impl Reply {
    /// Answers with an errno.
    pub fn error(self, e: Errno) {
        match self {
            Reply::Write(r, _) => r.error(errno(e)),
            Reply::Data(r) => r.error(errno(e)),
            Reply::Entry(r) => r.error(errno(e)),
            Reply::Empty(r) => r.error(errno(e)),
            Reply::Open(r) => r.error(errno(e)),
            Reply::Raw(r, _) => r.error(e),
            #[cfg(test)]
            // A test that has ended does not listen.
            Reply::Test(tx) => drop(tx.send(e)),
        }
    }

    /// Answers that a write or removal was done. Not for replies that carry more.
    pub fn done(self) {
        match self {
            Reply::Write(r, length) => r.written(length),
            Reply::Empty(r) => r.ok(),
            Reply::Raw(r, length) => r.written(length),
            other => other.error(Errno::EIO),
        }
    }
}

/// What the request waits for: decides what its caller hears when it ends without an outcome.
pub enum Waits {
    /// A command: the engine is told, and says which errno.
    Command(Box<CommandWait>),
    /// A commit of the record.
    Commit,
    /// The next line of a stream.
    Line,
    /// Something that may not be told in time.
    Answer,
}

/// The command behind a parked write.
pub struct CommandWait {
    pub target: Target,
    pub verb: Verb,
    pub op: Option<OpId>,
    pub caller: Caller,
}

/// A parked request.
pub struct Parked {
    pub reply: Reply,
    pub waits: Waits,
    /// The caller's thread; 0 when it is not visible here.
    pub pid: u32,
    /// How long it waits at most; `None`: until a signal.
    pub most: Option<Duration>,
    /// The node it was sent to.
    pub node: u64,
    /// Its place in what outlives us; freed after the answer.
    pub kept: Kept,
}

struct Slot {
    parked: Parked,
    since: Instant,
    most: Option<Duration>,
}

struct State {
    next: u64,
    slots: HashMap<u64, Slot>,
    nodes: HashMap<u64, u32>,
    /// Parked since the watcher looked last: a caller that was killed before is noticed at once.
    fresh: Vec<u64>,
    closed: bool,
}

struct Shared {
    state: Mutex<State>,
    wake: Condvar,
    core: Arc<dyn Core>,
    /// The longest any request may stay, where an administrator set one.
    longest: Option<Duration>,
}

/// The parked requests and their watcher.
pub struct Waiters {
    shared: Arc<Shared>,
}

impl Waiters {
    /// Starts the watcher. `longest` bounds every wait (`fs.fuse.*_request_timeout`).
    pub fn start(core: Arc<dyn Core>, longest: Option<Duration>) -> std::io::Result<Self> {
        let state = State { next: 1, slots: HashMap::new(), nodes: HashMap::new(), fresh: Vec::new(), closed: false };
        let shared = Arc::new(Shared { state: Mutex::new(state), wake: Condvar::new(), core, longest });
        let watched = shared.clone();
        std::thread::Builder::new().name("volfs-waiters".into()).spawn(move || watch(&watched))?;
        Ok(Self { shared })
    }

    /// Parks a request; the key takes it out again. After [`Waiters::shut_down`] it is answered
    /// ESHUTDOWN at once, and the key finds nothing.
    pub fn park(&self, parked: Parked) -> u64 {
        let most = [parked.most, self.shared.longest, (parked.pid == 0).then_some(UNSEEN_MOST)];
        let slot = Slot { most: most.into_iter().flatten().min(), since: Instant::now(), parked };
        let refused = {
            let mut state = self.shared.state.lock();
            let key = state.next;
            state.next += 1;
            if !state.closed {
                *state.nodes.entry(slot.parked.node).or_default() += 1;
                state.fresh.push(key);
                state.slots.insert(key, slot);
                drop(state);
                self.shared.wake.notify_one();
                return key;
            }
            (key, slot)
        };
        refused.1.parked.reply.error(Errno::ESHUTDOWN);
        refused.0
    }

    /// Takes a request out to answer it; `None` when it was answered already.
    pub fn take(&self, key: u64) -> Option<Parked> {
        self.shared.state.lock().take(key).map(|slot| slot.parked)
    }

    /// Whether that request is still parked.
    pub fn waits(&self, key: u64) -> bool {
        self.shared.state.lock().slots.contains_key(&key)
    }

    /// Whether a request to that node is parked.
    pub fn node_waits(&self, node: u64) -> bool {
        self.shared.state.lock().nodes.contains_key(&node)
    }

    /// How many are parked.
    pub fn len(&self) -> usize {
        self.shared.state.lock().slots.len()
    }

    /// Answers every parked request ESHUTDOWN, and any later one at once. Ends the watcher.
    pub fn shut_down(&self) {
        let slots = {
            let mut state = self.shared.state.lock();
            state.closed = true;
            state.nodes.clear();
            std::mem::take(&mut state.slots)
        };
        self.shared.wake.notify_one();
        for slot in slots.into_values() {
            slot.parked.reply.error(Errno::ESHUTDOWN);
        }
    }
}

impl Drop for Waiters {
    fn drop(&mut self) {
        self.shut_down();
    }
}

impl State {
    fn take(&mut self, key: u64) -> Option<Slot> {
        let slot = self.slots.remove(&key)?;
        let node = slot.parked.node;
        if let Some(count) = self.nodes.get_mut(&node) {
            *count -= 1;
            if *count == 0 {
                self.nodes.remove(&node);
            }
        }
        Some(slot)
    }
}

impl Shared {
    /// Ends a wait without an outcome, if nobody else has.
    fn leave(&self, key: u64, left: Left) {
        let Some(slot) = self.state.lock().take(key) else { return };
        let Parked { reply, waits, kept: _kept, .. } = slot.parked;
        let interrupted = left == Left::Interrupted;
        let e = match waits {
            Waits::Command(w) => self.core.caller_left(w.target, w.verb, w.op, &w.caller, left),
            _ if interrupted => Errno::EINTR,
            Waits::Line => match reply {
                Reply::Data(r) => return r.data(STILL_HERE),
                other => return other.error(Errno::EAGAIN),
            },
            Waits::Commit => Errno::EIO,
            Waits::Answer => Errno::ENODATA,
        };
        reply.error(e);
    }
}

fn watch(shared: &Shared) {
    let mut buffer = vec![0u8; 16 * 1024];
    let mut look: Vec<(u64, u32)> = Vec::new();
    let mut late: Vec<(u64, Duration)> = Vec::new();
    let mut next_round = Instant::now();
    loop {
        let whole_round = {
            let mut state = shared.state.lock();
            loop {
                if state.closed && state.slots.is_empty() {
                    return;
                }
                if state.slots.is_empty() {
                    state.fresh.clear();
                    shared.wake.wait(&mut state);
                } else if state.fresh.is_empty() && Instant::now() < next_round {
                    shared.wake.wait_until(&mut state, next_round);
                } else {
                    break;
                }
            }
            let now = Instant::now();
            let whole = now >= next_round;
            let fresh = std::mem::take(&mut state.fresh);
            let seen = |(key, slot): (&u64, &Slot)| (slot.parked.pid != 0).then_some((*key, slot.parked.pid));
            if whole {
                look.extend(state.slots.iter().filter_map(seen));
            } else {
                look.extend(fresh.iter().filter_map(|key| seen(state.slots.get_key_value(key)?)));
            }
            let over = state.slots.iter().filter_map(|(key, slot)| {
                let most = slot.most?;
                (now.duration_since(slot.since) >= most).then_some((*key, most))
            });
            late.extend(over);
            whole
        };
        let began = Instant::now();
        // A pending signal goes before the deadline: the caller is to act on it.
        for (key, pid) in look.drain(..) {
            if interrupted(pid, &mut buffer) {
                shared.leave(key, Left::Interrupted);
            }
        }
        for (key, most) in late.drain(..) {
            shared.leave(key, Left::TimedOut(most));
        }
        if whole_round {
            // At most half a core for up to two thousand callers; beyond, it never runs without a pause.
            let cost = began.elapsed();
            next_round = began + (cost * 2).clamp(LOOK_EVERY, LOOK_EVERY * 2).max(cost + cost / 4);
        }
    }
}

/// Whether the thread has a signal to act on, or is gone. Unreadable for another reason: no.
fn interrupted(pid: u32, buffer: &mut Vec<u8>) -> bool {
    // "/proc/4294967295/status" fits; no allocation for each of two thousand callers.
    let mut path = [0u8; 32];
    let length = {
        use std::io::Write as _;
        let mut cursor = std::io::Cursor::new(&mut path[..]);
        if write!(cursor, "/proc/{pid}/status").is_err() {
            return false;
        }
        usize::try_from(cursor.position()).unwrap_or(0)
    };
    let Ok(path) = std::str::from_utf8(&path[..length]) else { return false };
    let gone = |e: &std::io::Error| matches!(e.raw_os_error(), Some(libc::ENOENT | libc::ESRCH));
    let mut file = match std::fs::File::open(path) {
        Ok(file) => file,
        Err(e) => return gone(&e),
    };
    let mut filled = 0;
    loop {
        match file.read(&mut buffer[filled..]) {
            Ok(0) => break,
            Ok(n) => filled += n,
            Err(e) if e.kind() == std::io::ErrorKind::Interrupted => continue,
            Err(e) => return gone(&e),
        }
        if let Some(pending) = pending(&buffer[..filled]) {
            return pending;
        }
        if filled == buffer.len() {
            // A process with thousands of groups.
            buffer.resize(filled * 2, 0);
        }
    }
    false
}

/// Signals that do not end a wait: CHLD, CONT, URG, WINCH. A shell's children end and terminals are
/// resized while a command runs.
const HARMLESS: u64 = bit(libc::SIGCHLD) | bit(libc::SIGCONT) | bit(libc::SIGURG) | bit(libc::SIGWINCH);

const fn bit(signal: i32) -> u64 {
    1 << (signal - 1)
}

/// Reads a `/proc/TID/status`: whether a signal is pending that the thread will act on. `None`
/// while the four masks are not all there.
fn pending(status: &[u8]) -> Option<bool> {
    // In the file's order, each found behind the one before. A newline stands before each, so no
    // process's name can pass for one: a newline in a name is escaped there.
    let mut rest = status;
    let mut mask = |field: &[u8]| -> Option<u64> {
        let at = rest.windows(field.len()).position(|w| w == field)? + field.len();
        let digits = rest.get(at..at + 16)?;
        rest = &rest[at + 16..];
        digits.iter().try_fold(0u64, |sum, d| Some(sum << 4 | u64::from(char::from(*d).to_digit(16)?)))
    };
    let own = mask(b"\nSigPnd:\t")?;
    let shared = mask(b"\nShdPnd:\t")?;
    let blocked = mask(b"\nSigBlk:\t")?;
    let ignored = mask(b"\nSigIgn:\t")?;
    Some((own | shared) & !blocked & !ignored & !HARMLESS != 0)
}

#[cfg(test)]
mod tests;
