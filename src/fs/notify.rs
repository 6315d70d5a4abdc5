//! Telling those who wait for change: readers of `events/`, and pollers. One thread, asleep until
//! the engine publishes or an event is pushed, so that the engine's threads never do this work.

use std::sync::{Arc, Weak};

use fuser::{PollEvents, PollFlags, PollNotifier, ReplyData, ReplyPoll};
use parking_lot::{Condvar, Mutex};

use super::errno;
use super::handles::{Handle, Print, State, Stream};
use super::inner::{Inner, Wanted};
use super::node::{JobFile, Node, RootFile, VolumeFile};
use super::waiters::{Parked, Reply, Waits};
use crate::error::Errno;

/// Wakes the notifying thread. Rings that come while it works are one.
#[derive(Default)]
pub struct Bell {
    state: Mutex<Rung>,
    wake: Condvar,
}

#[derive(Default)]
struct Rung {
    rung: bool,
    ended: bool,
}

impl Bell {
    pub fn ring(&self) {
        self.state.lock().rung = true;
        self.wake.notify_one();
    }

    pub fn end(&self) {
        self.state.lock().ended = true;
        self.wake.notify_one();
    }

    /// Waits for a ring; false at the end.
    fn wait(&self) -> bool {
        let mut state = self.state.lock();
        while !state.rung && !state.ended {
            self.wake.wait(&mut state);
        }
        state.rung = false;
        !state.ended
    }
}

/// Starts the thread, and has the engine ring.
pub fn start(inner: &Arc<Inner>) -> std::io::Result<()> {
    let ring = |inner: Weak<Inner>| {
        move || {
            if let Some(inner) = inner.upgrade()
                && !inner.handles.none_watched()
            {
                inner.bell.ring();
            }
        }
    };
    let on_publish = ring(Arc::downgrade(inner));
    inner.core.on_publish(Arc::new(move |_| on_publish()));
    inner.core.events().on_push(Arc::new(ring(Arc::downgrade(inner))));
    let worker = inner.clone();
    std::thread::Builder::new().name("volfs-notify".into()).spawn(move || {
        while worker.bell.wait() {
            for handle in worker.handles.watched() {
                worker.look(&handle);
            }
        }
    })?;
    Ok(())
}

fn pollable(node: Node) -> bool {
    matches!(
        node,
        Node::Root(RootFile::Health | RootFile::Problems)
            | Node::Job(_, JobFile::Status)
            | Node::Volume(_, VolumeFile::Status)
    )
}

const READABLE: PollEvents = PollEvents::POLLIN.union(PollEvents::POLLRDNORM);
const WRITABLE: PollEvents = PollEvents::POLLOUT.union(PollEvents::POLLWRNORM);
const CHANGED: PollEvents = PollEvents::POLLPRI.union(PollEvents::POLLERR);

impl Inner {
    /// Answers what this handle's readers and pollers wait for, if it is there.
    fn look(&self, handle: &Arc<Handle>) {
        let mut state = handle.state.lock();
        let fire: Option<PollNotifier> = match &mut *state {
            State::Value(value) if value.armed.is_some() => {
                let now = self.text(handle.node);
                let changed =
                    |(_, was): &mut (PollNotifier, Arc<str>)| now.is_err() || now.is_ok_and(|n| n.text != *was);
                value.armed.take_if(changed).map(|(notifier, _)| notifier)
            }
            State::Stream(stream) => {
                self.feed(handle, stream);
                stream.armed.take_if(|(_, from)| self.event_since(stream.job, *from)).map(|(notifier, _)| notifier)
            }
            _ => None,
        };
        // Kernel fact 7: no lock is held while the kernel is notified.
        drop(state);
        if let Some(Err(e)) = fire.map(PollNotifier::notify) {
            tracing::debug!("a poller was gone before it was told: {e}");
        }
    }

    fn event_since(&self, job: Option<crate::model::JobRow>, from: u64) -> bool {
        !Stream::new(job, from).peek(self.core.events(), 1).data.is_empty()
    }

    /// Answers parked reads while there is something to give, or the job is gone.
    fn feed(&self, handle: &Handle, stream: &mut Stream) {
        while let Some((key, size)) = stream.parked.first().copied() {
            let piece = stream.peek(self.core.events(), size);
            if piece.data.is_empty() && !self.over(handle.node) {
                // Moves past what is for others, so that their events do not count as lost.
                stream.advance(piece);
                return;
            }
            stream.parked.remove(0);
            // Taken out first: what is given to a reader that has left would be lost.
            let Some(parked) = self.waiters.take(key) else { continue };
            let data = stream.advance(piece);
            self.handles.keep_stream(handle, stream);
            match parked.reply {
                Reply::Data(reply) => reply.data(&data),
                other => other.error(Errno::EIO),
            }
        }
    }

    /// The job of this stream was forgotten: nothing more will come.
    fn over(&self, node: Node) -> bool {
        matches!(node, Node::Job(row, _) if !self.core.world().jobs.contains_key(&row))
    }

    /// READ of a stream: what is there, else it is parked.
    pub fn read_stream(&self, handle: &Arc<Handle>, wanted: Wanted, reply: ReplyData) {
        let Wanted { size, nonblock, who, .. } = wanted;
        // Watched before the look: what is pushed after it rings.
        self.handles.watch(handle);
        let mut state = handle.state.lock();
        let State::Stream(stream) = &mut *state else { return reply.error(errno(Errno::EIO)) };
        stream.find_place(self.core.events(), wanted.offset);
        let piece = stream.peek(self.core.events(), size);
        let nothing = piece.data.is_empty();
        let data = stream.advance(piece);
        if !nothing || self.over(handle.node) {
            self.handles.keep(handle, &state);
            return reply.data(&data);
        }
        if nonblock {
            return reply.error(errno(Errno::EAGAIN));
        }
        stream.parked.retain(|(key, _)| self.waiters.waits(*key));
        let reply = Reply::Data(reply);
        let (pid, node, kept) = (who.pid, handle.node.id(), self.keep(handle.node, who));
        let key = self.waiters.park(Parked { reply, waits: Waits::Line, pid, most: None, node, kept });
        stream.parked.push((key, size));
    }

    /// POLL. A notifier is remembered also when the answer is "ready": an edge-triggered waiter
    /// asks again only after it was told.
    pub fn poll(&self, node: Node, fh: u64, notifier: PollNotifier, flags: PollFlags, reply: ReplyPoll) {
        let Some(handle) = self.handles.get(fh).filter(|h| h.node == node) else {
            return reply.poll(READABLE | WRITABLE);
        };
        let notifier = flags.contains(PollFlags::FUSE_POLL_SCHEDULE_NOTIFY).then_some(notifier);
        let armed = notifier.is_some();
        if armed {
            self.handles.watch(&handle);
        }
        let mut state = handle.state.lock();
        let ready = match &mut *state {
            State::Value(value) if pollable(node) => {
                let Ok(now) = self.text(node) else {
                    return reply.error(errno(Errno::ENODEV));
                };
                let changed = Print::of(&now.text) != value.print;
                if let Some(notifier) = notifier {
                    value.armed = Some((notifier, now.text));
                }
                if changed { READABLE | CHANGED } else { READABLE }
            }
            State::Stream(stream) => {
                if let Some(notifier) = notifier {
                    stream.armed = Some((notifier, self.core.events().position()));
                }
                let nothing = stream.peek(self.core.events(), 1).data.is_empty();
                if nothing && !self.over(node) { PollEvents::empty() } else { READABLE }
            }
            _ if node.mode() & 0o222 != 0 => READABLE | WRITABLE,
            _ => READABLE,
        };
        if armed {
            self.handles.keep(&handle, &state);
        }
        drop(state);
        reply.poll(ready);
    }
}
