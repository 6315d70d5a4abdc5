//! Open files. A value is rendered once an open, and again at a re-read from offset 0, so no reader
//! ever sees a mixture; a stream keeps its own place; a poller is told once that its value differs.

use std::collections::HashMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use fuser::PollNotifier;
use parking_lot::Mutex;

use super::node::Node;
use super::tree::Entry;
use crate::engine::Events;
use crate::engine::events::Next;
use crate::model::JobRow;

/// One open file or directory.
pub struct Handle {
    pub node: Node,
    pub state: Mutex<State>,
}

/// What it holds.
pub enum State {
    Value(Value),
    Stream(Stream),
    /// A listing, and whether it was read from its beginning already.
    Dir(Vec<Entry>, bool),
    /// Opened for writing only.
    Writer,
}

/// A value's rendering.
pub struct Value {
    pub text: Arc<str>,
    /// The world it was rendered from.
    pub seq: u64,
    /// Rendered at the open and not read yet.
    pub fresh: bool,
    /// Whom to tell once the value differs from this text.
    pub armed: Option<(PollNotifier, Arc<str>)>,
}

/// A reader of `events/`.
pub struct Stream {
    pub job: Option<JobRow>,
    /// The next event's number.
    pub position: u64,
    /// What was left of a line longer than the read.
    pub rest: Vec<u8>,
    /// Reads that wait for the next line, with their sizes.
    pub parked: Vec<(u64, usize)>,
    /// Whom to tell once there is an event at or after that number.
    pub armed: Option<(PollNotifier, u64)>,
}

/// What a stream gives next, before it is given.
#[derive(Debug, PartialEq, Eq)]
pub struct Piece {
    pub data: Vec<u8>,
    rest: Vec<u8>,
    position: u64,
}

impl Stream {
    pub fn new(job: Option<JobRow>, position: u64) -> Self {
        Self { job, position, rest: Vec::new(), parked: Vec::new(), armed: None }
    }

    /// What a read of at most `most` bytes gets now: whole lines, or a part of one that is longer.
    /// Empty: nothing yet. The stream moves on with [`Stream::advance`] only, once it is given.
    pub fn peek(&self, events: &Events, most: usize) -> Piece {
        if !self.rest.is_empty() {
            let (now, later) = self.rest.split_at(most.min(self.rest.len()));
            return Piece { data: now.into(), rest: later.into(), position: self.position };
        }
        let mut piece = Piece { data: Vec::new(), rest: Vec::new(), position: self.position };
        loop {
            let (line, after): (Arc<str>, u64) = match events.next(piece.position, self.job) {
                Next::Event(event) => (event.line, event.seq + 1),
                Next::Lost { count, resume } => (format!("{{\"lost\":{count}}}\n").into(), resume),
                Next::Nothing { resume } => {
                    piece.position = resume;
                    break;
                }
            };
            if !piece.data.is_empty() && piece.data.len() + line.len() > most {
                break;
            }
            piece.data.extend_from_slice(line.as_bytes());
            piece.position = after;
        }
        if piece.data.len() > most {
            piece.rest = piece.data.split_off(most);
        }
        piece
    }

    /// Moves on past what was given; answers it.
    pub fn advance(&mut self, piece: Piece) -> Vec<u8> {
        self.position = piece.position;
        self.rest = piece.rest;
        piece.data
    }
}

/// All open files.
pub struct Handles {
    open: Mutex<HashMap<u64, Arc<Handle>>>,
    /// Those with a poller or a parked read, now or before.
    watched: Mutex<HashMap<u64, Arc<Handle>>>,
    next: AtomicU64,
}

impl Handles {
    /// `first`: where numbers begin, from the clock, so that a handle of an earlier daemon is
    /// never taken for one of ours.
    pub fn new(first: u64) -> Self {
        Self { open: Mutex::default(), watched: Mutex::default(), next: AtomicU64::new(first.max(1)) }
    }

    pub fn add(&self, node: Node, state: State) -> u64 {
        let fh = self.next.fetch_add(1, Ordering::Relaxed);
        self.insert(fh, node, state);
        fh
    }

    /// Under a given number: a handle that an earlier daemon gave out.
    pub fn insert(&self, fh: u64, node: Node, state: State) -> Arc<Handle> {
        let handle = Arc::new(Handle { node, state: Mutex::new(state) });
        self.open.lock().insert(fh, handle.clone());
        handle
    }

    pub fn get(&self, fh: u64) -> Option<Arc<Handle>> {
        self.open.lock().get(&fh).cloned()
    }

    pub fn release(&self, fh: u64) {
        self.watched.lock().remove(&fh);
        self.open.lock().remove(&fh);
    }

    /// From now on the handle is looked at when anything changes.
    pub fn watch(&self, fh: u64, handle: &Arc<Handle>) {
        self.watched.lock().insert(fh, handle.clone());
    }

    pub fn watched(&self) -> Vec<Arc<Handle>> {
        self.watched.lock().values().cloned().collect()
    }

    pub fn none_watched(&self) -> bool {
        self.watched.lock().is_empty()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn push(events: &Events, job: Option<JobRow>, text: &str) {
        events.push(job, |seq| format!("{{\"n\":{seq},\"t\":\"{text}\"}}\n"));
    }

    fn read(stream: &mut Stream, events: &Events, most: usize) -> String {
        let piece = stream.peek(events, most);
        String::from_utf8(stream.advance(piece)).unwrap()
    }

    #[test]
    fn a_stream_begins_at_its_open_and_gives_whole_lines() {
        let events = Events::new(100);
        push(&events, None, "before");
        let mut stream = Stream::new(None, events.position());
        assert_eq!(read(&mut stream, &events, 4096), "");
        push(&events, None, "a");
        push(&events, Some(JobRow(1)), "b");
        assert_eq!(read(&mut stream, &events, 25), "{\"n\":1,\"t\":\"a\"}\n");
        assert_eq!(read(&mut stream, &events, 25), "{\"n\":2,\"t\":\"b\"}\n");
        assert_eq!(read(&mut stream, &events, 25), "");
    }

    #[test]
    fn a_stream_of_a_job_shows_that_jobs_events_only() {
        let events = Events::new(100);
        let mut stream = Stream::new(Some(JobRow(1)), 0);
        push(&events, Some(JobRow(2)), "theirs");
        push(&events, Some(JobRow(1)), "ours");
        assert_eq!(read(&mut stream, &events, 4096), "{\"n\":1,\"t\":\"ours\"}\n");
    }

    #[test]
    fn a_read_smaller_than_a_line_gets_the_line_in_parts() {
        let events = Events::new(100);
        let mut stream = Stream::new(None, 0);
        push(&events, None, "a");
        push(&events, None, "b");
        let mut all = String::new();
        for _ in 0..34 {
            all += &read(&mut stream, &events, 1);
        }
        assert_eq!(all, "{\"n\":0,\"t\":\"a\"}\n{\"n\":1,\"t\":\"b\"}\n");
        assert_eq!(read(&mut stream, &events, 1), "");
    }

    #[test]
    fn what_a_slow_reader_lost_is_said_in_a_line() {
        let events = Events::new(2);
        let mut stream = Stream::new(None, 0);
        for t in ["a", "b", "c", "d", "e"] {
            push(&events, None, t);
        }
        assert_eq!(read(&mut stream, &events, 4096), "{\"lost\":3}\n{\"n\":3,\"t\":\"d\"}\n{\"n\":4,\"t\":\"e\"}\n");
    }

    #[test]
    fn what_was_peeked_at_but_not_given_is_given_the_next_time() {
        let events = Events::new(10);
        let mut stream = Stream::new(None, 0);
        push(&events, None, "a");
        assert_eq!(stream.peek(&events, 100), stream.peek(&events, 100));
        assert_eq!(read(&mut stream, &events, 100), "{\"n\":0,\"t\":\"a\"}\n");
    }
}
