//! Where the kernel sends nothing again: whether it waits for requests that this daemon does not know,
//! and whose callers would hang in state D for ever.
//!
//! What the kernel waits for is counted in the connection's `waiting`; what is ours is parked, or in a
//! handler, or was not read yet. So the counts are compared in moments in which no handler runs and
//! nothing is to be read. A caller that was answered and has not run since is counted, too: under load
//! more than is known says little. What is done about it is therefore in two steps, and the second one
//! needs a still connection:
//! ```text
//!  as many as are parked, once ───────► all of the daemon before were answered: the watch ends
//!  more, a few looks in a row ────────► every older number that nobody knows is answered EIO
//!  more, with nothing going on ───────► given up: the connection is aborted, the tree mounted anew
//! ```

use std::collections::BTreeSet;
use std::fs::File;
use std::io::{self, Read, Write};
use std::os::fd::{AsFd, OwnedFd};
use std::sync::atomic::Ordering;
use std::sync::{Arc, Weak};
use std::time::Duration;

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::fs::{Mode, OFlags, openat};
use rustix::mount::{FsMountFlags, FsOpenFlags, MountAttrFlags, fsconfig_create, fsmount, fsopen};
use tokio::sync::watch;

use super::before;
use super::inner::Inner;
use crate::failpoint;

const LOOK_EVERY: Duration = Duration::from_millis(200);
/// So many looks in a row with more than is known are a suspicion, which costs nobody anything.
const SUSPICION: u32 = 5;
/// So many looks at a still connection, five seconds at least, must all find more than is known.
const GIVEN_UP: u32 = 25;
/// The most numbers that are answered, the newest first: some seconds of one thread.
const NUMBERS_MOST: u64 = 1 << 24;

/// The kernel's own view of one FUSE connection.
struct Connection {
    /// fusectl, whether or not it is mounted anywhere.
    control: OwnedFd,
    number: String,
}

impl Connection {
    /// Of the mount with this device number, `0:52`.
    fn of(device: &str) -> io::Result<Self> {
        let context = fsopen("fusectl", FsOpenFlags::FSOPEN_CLOEXEC)?;
        fsconfig_create(context.as_fd())?;
        let control = fsmount(context.as_fd(), FsMountFlags::FSMOUNT_CLOEXEC, MountAttrFlags::empty())?;
        let number = device.rsplit(':').next().unwrap_or_default().to_owned();
        Ok(Self { control, number })
    }

    fn open(&self, file: &str, flags: OFlags) -> io::Result<File> {
        let path = format!("{}/{file}", self.number);
        Ok(openat(&self.control, path, flags | OFlags::CLOEXEC, Mode::empty())?.into())
    }

    /// Requests without an answer, read or not.
    fn waiting(&self) -> io::Result<usize> {
        let mut text = String::new();
        self.open("waiting", OFlags::RDONLY)?.read_to_string(&mut text)?;
        text.trim().parse().map_err(|_| io::Error::new(io::ErrorKind::InvalidData, format!("waiting: {text:?}")))
    }

    fn abort(&self) -> io::Result<()> {
        self.open("abort", OFlags::WRONLY)?.write_all(b"1")
    }
}

/// Ends the connection of the mount with this device number: whatever waits in it gets an error.
pub fn abort(device: &str) -> io::Result<()> {
    Connection::of(device)?.abort()
}

/// Whether something is to be read from the connection.
fn pending(fuse: &File) -> io::Result<bool> {
    let now = Timespec { tv_sec: 0, tv_nsec: 0 };
    Ok(poll(&mut [PollFd::new(fuse, PollFlags::IN)], Some(&now))? > 0)
}

/// What a look has seen: two that are equal have nothing between them.
#[derive(Clone, Copy, PartialEq, Eq)]
struct Seen {
    handled: u64,
    parked: usize,
    waiting: usize,
}

/// A watch over a connection that was taken over.
pub struct Watch {
    /// The connection.
    pub fuse: File,
    /// The mount's device number.
    pub device: String,
    /// The last number that a handler of the daemon before got.
    pub last: u64,
    /// The numbers that it left, and that this daemon answers.
    pub known: BTreeSet<u64>,
}

impl Watch {
    /// Starts it; becomes true when the connection must be given up.
    pub fn start(self, inner: &Arc<Inner>) -> io::Result<watch::Receiver<bool>> {
        let (tell, told) = watch::channel(false);
        let inner = Arc::downgrade(inner);
        std::thread::Builder::new().name("volfs-unanswered".into()).spawn(move || {
            match Connection::of(&self.device).and_then(|connection| self.look(&inner, &connection)) {
                // Nobody listens any more when the daemon is stopping.
                Ok(true) => drop(tell.send(true)),
                Ok(false) => {}
                Err(error) => tracing::warn!(
                    "whether a request of the daemon before was left without an answer cannot be told: {error}; a \
                     shell that hangs in the tree is freed by `volfs unmount` and a new start"
                ),
            }
        })?;
        Ok(told)
    }

    /// Looks until all are answered, or as long as there is a session; true when it must be given up.
    fn look(&self, inner: &Weak<Inner>, connection: &Connection) -> io::Result<bool> {
        let (mut in_a_row, mut still, mut before, mut answered) = (0, 0, None, false);
        loop {
            let Some(inner) = inner.upgrade() else { return Ok(false) };
            let seen = self.seen(&inner, connection)?;
            if let Some(seen) = seen {
                if seen.waiting <= seen.parked {
                    tracing::info!("every request of the daemon before is answered or waits here");
                    return Ok(false);
                }
                in_a_row += 1;
                still += u32::from(before == Some(seen));
                if in_a_row == SUSPICION && !answered && !failpoint::hit("keep.no-sweep") {
                    self.answer_unknown(&inner);
                    (answered, still) = (true, 0);
                }
                if still == GIVEN_UP {
                    tracing::error!(
                        "{} requests of the daemon before are not known here and would wait for ever: the \
                         connection is aborted and the tree mounted anew, and whoever waits gets an error; \
                         what had begun goes on",
                        seen.waiting - seen.parked
                    );
                    return Ok(true);
                }
            }
            before = seen;
            drop(inner);
            std::thread::sleep(LOOK_EVERY);
        }
    }

    /// What waits and what is known; `None` in a moment that does not tell.
    fn seen(&self, inner: &Inner, connection: &Connection) -> io::Result<Option<Seen>> {
        let known = || (inner.handled(), inner.waiters.len());
        let (handled, parked) = known();
        if pending(&self.fuse)? {
            return Ok(None);
        }
        let waiting = connection.waiting()?;
        let told = !pending(&self.fuse)? && known() == (handled, parked);
        Ok(told.then_some(Seen { handled, parked, waiting }))
    }

    /// Answers EIO to every number before ours that this daemon does not know. Nothing happens to one
    /// that was answered: the kernel has forgotten it.
    fn answer_unknown(&self, inner: &Inner) {
        let mut freed = 0;
        let newest = self.last.min(inner.before.lowest.load(Ordering::SeqCst)).saturating_sub(2);
        let oldest = newest.saturating_sub(2 * NUMBERS_MOST);
        for unique in (oldest / 2..newest / 2 + 1).rev().map(|half| half * 2).take_while(|unique| *unique > 0) {
            if !self.known.contains(&unique) && before::unanswered(&self.fuse, unique) {
                freed += 1;
            }
        }
        if freed > 0 {
            tracing::error!(
                "{freed} requests of the daemon before were not known here: their callers got EIO; what they had \
                 asked for is in `history` if it had begun"
            );
        }
    }
}
