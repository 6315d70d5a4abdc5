//! What a daemon takes over from the one before: the connection, and the requests that are sent
//! again or, where the kernel cannot do that, are answered here by their numbers.
//!
//! ```text
//!  a request comes ── sent again? ── no ──────────────► its fence is chosen and kept, then submitted
//!                          │ yes, and its fence is known
//!                          ├─ done, failed ───────────► its first answer
//!                          ├─ being settled ──────────► waits for that; if nothing had begun: again
//!                          └─ not begun, or unknown ──► submitted
//! ```
//! A fence is kept before its operation begins, so an operation in the record is found by the
//! request that began it. One that joined is kept a moment after it has joined: were the daemon
//! killed in between, it joins again.

use std::collections::HashMap;
use std::fs::File;
use std::io::{self, Write};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use parking_lot::Mutex;
use uuid::Uuid;

use super::inner::{Inner, Who};
use super::node::Node;
use crate::engine::{Asker, Earlier};
use crate::error::Errno;
use crate::failpoint;
use crate::kept::{self, Asked, Kept, Memory, UNIQUE_MASK};
use crate::model::{Caller, Fence};

/// The bit of a request's number that says it was sent again.
const RESENT: u64 = !UNIQUE_MASK;

/// What was there before this daemon.
pub struct Before {
    pub memory: Option<Arc<Memory>>,
    /// Serials of `control` below this were given.
    pub serial: Option<u64>,
    /// The kernel sends unanswered requests again.
    pub resends: bool,
    /// Requests without an answer, by number, with their places in the memory.
    pub requests: Mutex<HashMap<u64, (u64, Asked)>>,
    /// Beginnings and ends of handlers.
    pub handled: AtomicU64,
    /// The lowest number that a handler got: what is below it is the daemon before's.
    pub lowest: AtomicU64,
}

/// A handler at work.
pub struct Handled<'a>(&'a AtomicU64);

impl Drop for Handled<'_> {
    fn drop(&mut self) {
        self.0.fetch_add(1, Ordering::SeqCst);
    }
}

/// A command about to be submitted.
pub struct Ask {
    pub asker: Asker,
    pub kept: Kept,
    /// What became of it before.
    pub earlier: Option<Earlier>,
    /// Milliseconds that its caller has waited already.
    pub waited: u64,
}

/// The answer to a write whose reply object died with its daemon.
pub struct RawReply {
    pub fuse: Arc<File>,
    pub unique: u64,
}

/// A FUSE answer's header: length, negated errno, the request's number.
fn header(length: u32, error: i32, unique: u64) -> Vec<u8> {
    let mut out = Vec::with_capacity(24);
    out.extend(length.to_le_bytes());
    out.extend(error.to_le_bytes());
    out.extend(unique.to_le_bytes());
    out
}

impl RawReply {
    fn send(self, data: &[u8]) {
        // ENOENT: it was answered before the daemon died.
        if let Err(error) = (&*self.fuse).write_all(data)
            && error.kind() != io::ErrorKind::NotFound
        {
            tracing::error!("request {:#x} of the daemon before could not be answered: {error}", self.unique);
        }
    }

    pub fn error(self, errno: Errno) {
        let data = header(16, -errno.0, self.unique);
        self.send(&data);
    }

    pub fn written(self, length: u32) {
        let mut data = header(24, 0, self.unique);
        data.extend(length.to_le_bytes());
        data.extend(0u32.to_le_bytes());
        self.send(&data);
    }
}

/// Answers EIO to that number; whether somebody had waited for it.
pub fn unanswered(mut fuse: &File, unique: u64) -> bool {
    fuse.write_all(&header(16, -libc::EIO, unique)).is_ok()
}

/// Has the kernel send every request again that was read and not answered (kernel 6.9 and later).
pub fn resend(fuse: &File) -> io::Result<()> {
    const NOTIFY_RESEND: i32 = 7;
    (&*fuse).write_all(&header(16, NOTIFY_RESEND, 0))
}

/// Wakes the poller of that handle, once.
pub fn wake(fuse: &File, poll: u64) -> io::Result<()> {
    const NOTIFY_POLL: i32 = 1;
    let mut data = header(24, NOTIFY_POLL, 0);
    data.extend(poll.to_le_bytes());
    (&*fuse).write_all(&data)
}

impl Inner {
    /// A command or a change of the namespace: its operation's identity, kept before it is given.
    pub fn ask(&self, node: Node, who: Who, caller: Caller, command: Option<&[u8]>) -> Ask {
        if let Some((place, asked)) = self.sent_again(who) {
            return self.ask_again(place, &asked, caller);
        }
        let asker = Asker::from(caller);
        let kept = self.remember(node, who, &asker.caller, Some(asker.fence.0), command);
        Ask { asker, kept, earlier: None, waited: 0 }
    }

    /// One that the daemon before had read.
    pub fn ask_again(&self, place: u64, asked: &Asked, caller: Caller) -> Ask {
        let kept = self.before.memory.as_ref().map_or_else(Kept::nothing, |memory| memory.kept(place));
        let waited = kept::boot_clock().saturating_sub(asked.since);
        let earlier = asked.fence.and_then(|fence| self.core.earlier(Fence(fence)));
        // An identity that the record has is not used again.
        let fresh = matches!(earlier, Some(Earlier::NotBegun)) || asked.fence.is_none();
        let fence = asked.fence.filter(|_| !fresh).map_or_else(Fence::random, Fence);
        if fresh {
            kept.joined(fence.0);
        }
        Ask { asker: Asker { caller, fence }, kept, earlier, waited }
    }

    /// A handler has got this request, until the answer is dropped. A successor is told, where it would
    /// not be sent again.
    pub fn handling(&self, unique: u64) -> Handled<'_> {
        if let (false, Some(memory)) = (self.before.resends, &self.before.memory) {
            memory.last(unique);
        }
        self.before.lowest.fetch_min(unique & UNIQUE_MASK, Ordering::SeqCst);
        self.before.handled.fetch_add(1, Ordering::SeqCst);
        Handled(&self.before.handled)
    }

    /// How many handlers have begun, and have ended: the same number twice is a moment without one at
    /// work, or with one that did not end.
    pub fn handled(&self) -> u64 {
        self.before.handled.load(Ordering::SeqCst)
    }

    /// Keeps a request that waits for something else, where it would not be sent again.
    pub fn keep(&self, node: Node, who: Who) -> Kept {
        if self.before.resends {
            return Kept::nothing();
        }
        let nobody = Caller { uid: 0, gid: 0, pid: who.pid, comm: String::new() };
        self.remember(node, who, &nobody, None, None)
    }

    fn remember(&self, node: Node, who: Who, caller: &Caller, fence: Option<Uuid>, command: Option<&[u8]>) -> Kept {
        let Some(memory) = &self.before.memory else { return Kept::nothing() };
        // As when its places are all taken.
        if failpoint::hit("keep.full") {
            return Kept::nothing();
        }
        memory.ask(&Asked {
            unique: who.unique,
            node: node.id(),
            uid: caller.uid,
            gid: caller.gid,
            pid: caller.pid,
            since: kept::boot_clock(),
            fence,
            command: command.map(<[u8]>::to_vec),
            waits: false,
        })
    }

    /// Where the kernel sends nothing again: commands go on waiting, anything else is EIO.
    ///
    /// One request may have been read and not even have reached its handler. Numbers rise by two in
    /// the order of reading, so it is the next one or, as FORGETs have numbers too, one soon after.
    /// Answering a number that was not read, or was answered, does nothing: the kernel says ENOENT.
    pub fn answer_left(self: &Arc<Self>, fuse: &Arc<File>, left: Vec<(u64, Asked)>, last: u64) {
        const NEXT_MOST: u64 = 4096;
        let raw = |unique: u64| RawReply { fuse: fuse.clone(), unique };
        for unique in (0..NEXT_MOST).map(|n| last + 2 * n) {
            if left.iter().all(|(_, asked)| asked.unique != unique) {
                raw(unique).error(Errno::EIO);
            }
        }
        for (place, asked) in left {
            match asked.command {
                Some(_) => self.command_again(place, &asked, raw(asked.unique)),
                None => {
                    raw(asked.unique).error(Errno::EIO);
                    drop(self.before.memory.as_ref().map(|memory| memory.kept(place)));
                }
            }
        }
    }

    fn sent_again(&self, who: Who) -> Option<(u64, Asked)> {
        (who.unique & RESENT != 0).then(|| self.before.requests.lock().remove(&(who.unique & UNIQUE_MASK)))?
    }
}
