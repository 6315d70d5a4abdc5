//! Open files. A value is rendered once an open, and again at a re-read from offset 0, so no reader
//! ever sees a mixture; a stream keeps its own place; a poller is told once that its value differs.
//!
//! What a handle means is kept beyond this process: a daemon that adopts the mount goes on with the
//! handles of the one before. It has not their texts, only their hashes: it continues a text that it
//! renders to the same, answers the end of one that was read to its end, and ESTALE otherwise.

use std::collections::HashMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use fuser::PollNotifier;
use parking_lot::Mutex;

use super::node::Node;
use super::tree::Entry;
use crate::engine::Events;
use crate::engine::events::Next;
use crate::kept::{self, Memory, Open, Place};
use crate::model::JobRow;

/// One open file or directory.
pub struct Handle {
    pub fh: u64,
    pub node: Node,
    pub state: Mutex<State>,
}

/// What it holds.
pub enum State {
    Value(Value),
    Stream(Stream),
    Dir(Listing),
    /// Opened for writing only.
    Writer,
}

/// What was rendered, in this process or, where there is no text, in the one before.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Print {
    pub hash: u64,
    pub length: u64,
}

impl Print {
    pub fn of(text: &str) -> Self {
        Self { hash: kept::hash(text.as_bytes()), length: text.len() as u64 }
    }

    fn of_entries(entries: &[Entry]) -> Self {
        let one = |h: u64, e: &Entry| h.rotate_left(7) ^ kept::hash(e.name.as_bytes()) ^ e.node.id();
        Self { hash: entries.iter().fold(1, one), length: entries.len() as u64 }
    }
}

/// A value's rendering.
pub struct Value {
    /// `None`: an earlier daemon's.
    pub text: Option<Arc<str>>,
    pub print: Print,
    /// The world it was rendered from.
    pub seq: u64,
    /// Rendered at the open and not read yet.
    pub fresh: bool,
    /// Whom to tell once the value differs from this text.
    pub armed: Option<(PollNotifier, Arc<str>)>,
}

impl Value {
    pub fn new(text: Arc<str>, seq: u64) -> Self {
        Self { print: Print::of(&text), text: Some(text), seq, fresh: true, armed: None }
    }

    /// Rendered anew.
    pub fn set(&mut self, text: Arc<str>, seq: u64) {
        self.print = Print::of(&text);
        (self.text, self.seq) = (Some(text), seq);
    }
}

/// A listing.
pub struct Listing {
    /// `None`: an earlier daemon's.
    pub entries: Option<Vec<Entry>>,
    print: Print,
    /// It was read from its beginning already.
    pub read: bool,
}

impl Listing {
    pub fn new(entries: Vec<Entry>) -> Self {
        Self { print: Print::of_entries(&entries), entries: Some(entries), read: false }
    }

    pub fn set(&mut self, entries: Vec<Entry>) {
        self.print = Print::of_entries(&entries);
        self.entries = Some(entries);
    }

    /// A listing of now, where only the print is known: whether it is that one.
    pub fn is_still(&self, entries: &[Entry]) -> bool {
        self.print == Print::of_entries(entries)
    }

    pub fn length(&self) -> u64 {
        self.print.length
    }
}

/// A reader of `events/`.
pub struct Stream {
    pub job: Option<JobRow>,
    /// The next event's number.
    position: u64,
    /// What was left of a line longer than the read.
    rest: Vec<u8>,
    /// Of that line: its event, and how much of it was given.
    partly: (u64, u64),
    /// Bytes given.
    given: u64,
    /// The place before the last read, for a successor: that read's answer may not have arrived.
    before: Place,
    /// An earlier daemon's, not read here yet: the first read's offset tells where its reader is.
    adopted: bool,
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
    partly: (u64, u64),
    position: u64,
}

impl Stream {
    pub fn new(job: Option<JobRow>, position: u64) -> Self {
        Self {
            job,
            position,
            rest: Vec::new(),
            partly: (position, 0),
            given: 0,
            before: Place { given: 0, position, skip: 0 },
            adopted: false,
            parked: Vec::new(),
            armed: None,
        }
    }

    fn adopt(job: Option<JobRow>, place: Place, before: Place) -> Self {
        let mut stream = Self::new(job, place.position);
        stream.partly = (place.position, place.skip);
        (stream.given, stream.before, stream.adopted) = (place.given, before, true);
        stream
    }

    /// Where it is.
    fn place(&self) -> Place {
        match self.rest.is_empty() && !self.adopted {
            true => Place { given: self.given, position: self.position, skip: 0 },
            false => Place { given: self.given, position: self.partly.0, skip: self.partly.1 },
        }
    }

    /// The first read of an adopted stream: what its reader has had, and what is left of a line.
    pub fn find_place(&mut self, events: &Events, offset: u64) {
        if !std::mem::take(&mut self.adopted) {
            return;
        }
        let mut place = Place { given: self.given, position: self.partly.0, skip: self.partly.1 };
        if offset != place.given && offset == self.before.given {
            place = self.before;
        }
        (self.given, self.position, self.partly) = (place.given, place.position, (place.position, place.skip));
        if place.skip > 0
            && let Next::Event(event) = events.next(place.position, None)
            && event.seq == place.position
        {
            self.rest =
                event.line.as_bytes().get(usize::try_from(place.skip).unwrap_or(0)..).unwrap_or_default().into();
            self.position = place.position + 1;
        }
    }

    /// What a read of at most `most` bytes gets now: whole lines, or a part of one that is longer.
    /// Empty: nothing yet. The stream moves on with [`Stream::advance`] only, once it is given.
    pub fn peek(&self, events: &Events, most: usize) -> Piece {
        let mut piece = Piece { data: Vec::new(), rest: Vec::new(), partly: self.partly, position: self.position };
        if !self.rest.is_empty() {
            let (now, later) = self.rest.split_at(most.min(self.rest.len()));
            (piece.data, piece.rest) = (now.into(), later.into());
            piece.partly.1 += now.len() as u64;
            return piece;
        }
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
            piece.partly = (piece.position - 1, most as u64);
        }
        piece
    }

    /// Moves on past what is given; answers it.
    pub fn advance(&mut self, piece: Piece) -> Vec<u8> {
        if !piece.data.is_empty() {
            self.before = self.place();
        }
        self.given += piece.data.len() as u64;
        (self.position, self.rest, self.partly) = (piece.position, piece.rest, piece.partly);
        piece.data
    }
}

/// All open files.
pub struct Handles {
    open: Mutex<HashMap<u64, Arc<Handle>>>,
    /// Those with a poller or a parked read, now or before.
    watched: Mutex<HashMap<u64, Arc<Handle>>>,
    next: AtomicU64,
    memory: Option<Arc<Memory>>,
}

impl Handles {
    /// `first`: where numbers begin, from the clock, so that a handle of an earlier daemon is
    /// never taken for one of ours. With a memory, numbers are its own.
    pub fn new(first: u64, memory: Option<Arc<Memory>>) -> Self {
        Self { open: Mutex::default(), watched: Mutex::default(), next: AtomicU64::new(first.max(1)), memory }
    }

    pub fn add(&self, node: Node, state: State) -> u64 {
        let fh = match &self.memory {
            Some(memory) => memory.open_handle(&meaning(node, &state)),
            None => self.next.fetch_add(1, Ordering::Relaxed),
        };
        self.insert(fh, node, state);
        fh
    }

    /// Under a given number: a handle that an earlier daemon gave out.
    pub fn insert(&self, fh: u64, node: Node, state: State) -> Arc<Handle> {
        let handle = Arc::new(Handle { fh, node, state: Mutex::new(state) });
        self.open.lock().insert(fh, handle.clone());
        handle
    }

    /// A handle of the daemon before, by what it has left; `None` for a node that nothing has.
    pub fn adopt(&self, fh: u64, open: &Open, stream: impl Fn(Node) -> Option<Option<JobRow>>) -> Option<()> {
        let node = Node::parse(open.node)?;
        let print = Print { hash: open.hash, length: open.length };
        let state = match (stream(node), node.kind()) {
            (Some(job), _) => State::Stream(Stream::adopt(job, open.place, open.before)),
            (None, super::tree::Kind::Dir) => State::Dir(Listing { entries: None, print, read: true }),
            (None, _) => State::Value(Value { text: None, print, seq: 0, fresh: false, armed: None }),
        };
        let handle = self.insert(fh, node, state);
        if open.poll.is_some() {
            self.watch(&handle);
        }
        Some(())
    }

    /// Keeps what the handle means now, before its reader hears of it.
    pub fn keep(&self, handle: &Handle, state: &State) {
        if let Some(memory) = &self.memory {
            memory.set_handle(handle.fh, &meaning(handle.node, state));
        }
    }

    /// The same for a stream whose state is locked.
    pub fn keep_stream(&self, handle: &Handle, stream: &Stream) {
        if let Some(memory) = &self.memory {
            memory.set_handle(handle.fh, &stream_meaning(handle.node, stream));
        }
    }

    pub fn get(&self, fh: u64) -> Option<Arc<Handle>> {
        self.open.lock().get(&fh).cloned()
    }

    pub fn release(&self, fh: u64) {
        self.watched.lock().remove(&fh);
        if self.open.lock().remove(&fh).is_some()
            && let Some(memory) = &self.memory
        {
            memory.close_handle(fh);
        }
    }

    /// From now on the handle is looked at when anything changes.
    pub fn watch(&self, handle: &Arc<Handle>) {
        self.watched.lock().insert(handle.fh, handle.clone());
    }

    pub fn watched(&self) -> Vec<Arc<Handle>> {
        self.watched.lock().values().cloned().collect()
    }

    pub fn none_watched(&self) -> bool {
        self.watched.lock().is_empty()
    }
}

/// What a successor has to know of a handle.
fn meaning(node: Node, state: &State) -> Open {
    let open = Open { node: node.id(), ..Open::default() };
    let poll = |armed: Option<&PollNotifier>| armed.map(|notifier| notifier.handle().0);
    match state {
        State::Value(Value { print, armed, .. }) => {
            Open { hash: print.hash, length: print.length, poll: poll(armed.as_ref().map(|a| &a.0)), ..open }
        }
        State::Dir(listing) => Open { hash: listing.print.hash, length: listing.print.length, ..open },
        State::Stream(stream) => stream_meaning(node, stream),
        State::Writer => open,
    }
}

fn stream_meaning(node: Node, stream: &Stream) -> Open {
    let poll = stream.armed.as_ref().map(|(notifier, _)| notifier.handle().0);
    Open { node: node.id(), place: stream.place(), before: stream.before, poll, ..Open::default() }
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
    fn the_next_daemon_goes_on_where_the_reader_is_whether_or_not_the_last_answer_arrived() {
        let events = Events::new(100);
        for t in ["a", "b", "c", "d"] {
            push(&events, None, t);
        }
        let whole = "{\"n\":0,\"t\":\"a\"}\n{\"n\":1,\"t\":\"b\"}\n{\"n\":2,\"t\":\"c\"}\n{\"n\":3,\"t\":\"d\"}\n";
        for size in [1, 5, 16, 17, 20, 40] {
            let mut stream = Stream::new(None, 0);
            let mut had = String::new();
            loop {
                let piece = read(&mut stream, &events, size);
                for arrived in [true, false] {
                    let had = if arrived { had.clone() + &piece } else { had.clone() };
                    let mut next = Stream::adopt(None, stream.place(), stream.before);
                    next.find_place(&events, had.len() as u64);
                    let mut all = had;
                    loop {
                        match read(&mut next, &events, 4096) {
                            more if more.is_empty() => break,
                            more => all += &more,
                        }
                    }
                    assert_eq!(all, whole, "{size}");
                }
                if piece.is_empty() {
                    break;
                }
                had += &piece;
            }
            assert_eq!(had, whole);
        }
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
