//! What outlives a daemon: a memfd that its keeper holds beside the FUSE connection.
//!
//! In it stand the requests that were read and not yet answered, what each open handle means, the
//! last events, and the connection's own facts, so that the next daemon goes on where this one was
//! killed. Each record lies within one page and is written by one pwrite(2): a SIGKILL leaves it
//! whole or not there. Nothing here is needed for what is true of volumes: that is the record's.
//!
//! ```text
//! header │ requests: 8 KiB each │ handles: 128 B each │ events: a ring of 32 KiB each
//! ```
//! The file is sparse: what was never used costs nothing.

use std::collections::BTreeSet;
use std::fs::File;
use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::fs::FileExt;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use parking_lot::Mutex;
use rustix::fs::{MemfdFlags, memfd_create};
use uuid::Uuid;

const MAGIC: u64 = u64::from_le_bytes(*b"volfskep");
/// Another layout is another number; a daemon adopts its own only.
const LAYOUT: u64 = 1;
const PAGE: u64 = 4096;

const REQUESTS: u64 = 16 * 1024;
const REQUEST_SIZE: u64 = 8 * 1024;
const REQUEST_DATA: u64 = 128;
const HANDLES: u64 = 1 << HANDLE_BITS;
/// How much of a handle's number is its place here.
pub const HANDLE_BITS: u32 = 18;
const HANDLE_SIZE: u64 = 128;
const EVENT_SIZE: u64 = 32 * 1024;
const EVENT_LINE: u64 = 24;
/// Events kept.
pub const EVENTS: u64 = 4096;

const REQUESTS_AT: u64 = PAGE;
const HANDLES_AT: u64 = REQUESTS_AT + REQUESTS * REQUEST_SIZE;
const EVENTS_AT: u64 = HANDLES_AT + HANDLES * HANDLE_SIZE;
const LENGTH: u64 = EVENTS_AT + EVENTS * EVENT_SIZE;

/// Words of the header, eight bytes each.
mod word {
    pub const MAGIC: u64 = 0;
    pub const LAYOUT: u64 = 1;
    pub const SERIAL: u64 = 2;
    pub const REQUESTS_USED: u64 = 3;
    pub const HANDLES_USED: u64 = 4;
    pub const NEXT_EVENT: u64 = 5;
    pub const STARTS: u64 = 6;
    pub const KEEPER: u64 = 7;
    pub const DAEMON: u64 = 8;
    /// The last request that a handler got, where the kernel cannot send it again.
    pub const LAST: u64 = 9;
    /// The connection's facts as JSON: length, then text.
    pub const CONNECTION: u64 = 32;
}

/// A request's number without the bit that says it was sent again.
pub const UNIQUE_MASK: u64 = !(1 << 63);

/// The connection's facts, which last as long as the mount.
#[derive(Debug, Clone, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub struct Connection {
    /// Where it is mounted.
    pub mountpoint: PathBuf,
    /// The mount's device number as mountinfo shows it.
    pub device: String,
    /// What the kernel offered at INIT.
    pub offered: u64,
    /// What was asked of it: fixed for the life of the mount.
    pub asked: u64,
    /// The mount options.
    pub options: String,
    /// The kernel sends unanswered requests again.
    pub resends: bool,
}

/// A request that was read and not yet answered.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Asked {
    /// Its number.
    pub unique: u64,
    /// The node it was sent to.
    pub node: u64,
    /// Its caller.
    pub uid: u32,
    /// Likewise.
    pub gid: u32,
    /// The caller's thread; 0 if not visible.
    pub pid: u32,
    /// Milliseconds of the boot's clock when it came.
    pub since: u64,
    /// The identity of the operation that it asks for; `None` for what is not a command.
    pub fence: Option<Uuid>,
    /// The bytes of a command.
    pub command: Option<Vec<u8>>,
    /// It was admitted, and waits for its operation.
    pub waits: bool,
}

/// What an open handle means.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Open {
    /// The node.
    pub node: u64,
    /// Of a value or listing: its hash and length as last rendered.
    pub hash: u64,
    /// In bytes, or entries.
    pub length: u64,
    /// The kernel's handle of a poller that sleeps on it.
    pub poll: Option<u64>,
    /// Of a stream: where its next event is.
    pub place: Place,
    /// And before the last read, whose answer may not have arrived.
    pub before: Place,
}

/// A place in a stream.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Place {
    /// Bytes given so far.
    pub given: u64,
    /// The next event's number.
    pub position: u64,
    /// How many of its bytes were given already.
    pub skip: u64,
}

/// An event.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct KeptEvent {
    /// Its number.
    pub seq: u64,
    /// Its job's row.
    pub job: Option<i64>,
    /// Its line.
    pub line: String,
}

/// What the daemon before has left.
#[derive(Debug)]
pub struct Left {
    /// The connection; `None` if it was never mounted.
    pub connection: Option<Connection>,
    /// Requests without an answer, and their places.
    pub requests: Vec<(u64, Asked)>,
    /// Open handles by number.
    pub handles: Vec<(u64, Open)>,
    /// The last events, in order.
    pub events: Vec<KeptEvent>,
    /// Serials of `control` below this were used.
    pub serial: u64,
    /// The last request that a handler got, where that is kept.
    pub last: u64,
}

/// Who serves the mount, for `volfs upgrade`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Who {
    /// The keeper.
    pub keeper: u32,
    /// The daemon.
    pub daemon: u32,
    /// How many daemons there were, this one included.
    pub starts: u64,
}

/// The memory.
pub struct Memory {
    file: File,
    requests: Mutex<Places>,
    handles: Mutex<Places>,
    counter: AtomicU64,
    complained: AtomicBool,
}

/// Which records of a table are free: the lowest is taken, so that the table stays short.
struct Places {
    free: BTreeSet<u64>,
    used: u64,
    most: u64,
}

impl Places {
    fn new(taken: &BTreeSet<u64>, used: u64, most: u64) -> Self {
        let free = (0..used).filter(|n| !taken.contains(n)).collect();
        Self { free, used, most }
    }

    /// A place, and whether the table has grown.
    fn take(&mut self) -> Option<(u64, bool)> {
        if let Some(place) = self.free.pop_first() {
            return Some((place, false));
        }
        if self.used == self.most {
            return None;
        }
        self.used += 1;
        Some((self.used - 1, true))
    }
}

fn words<const N: usize>(bytes: &[u8]) -> [u64; N] {
    let mut out = [0; N];
    for (word, chunk) in out.iter_mut().zip(bytes.chunks_exact(8)) {
        *word = u64::from_le_bytes(chunk.try_into().unwrap_or_default());
    }
    out
}

fn bytes(words: &[u64]) -> Vec<u8> {
    words.iter().flat_map(|word| word.to_le_bytes()).collect()
}

fn corrupt(what: &str) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, format!("the memory of the daemon before: {what}"))
}

impl Memory {
    /// An empty one.
    pub fn create() -> io::Result<Self> {
        let file = File::from(memfd_create("volfs-kept", MemfdFlags::CLOEXEC)?);
        file.set_len(LENGTH)?;
        file.write_all_at(&bytes(&[MAGIC, LAYOUT]), 0)?;
        Ok(Self::over(file, Places::new(&BTreeSet::new(), 0, REQUESTS), Places::new(&BTreeSet::new(), 0, HANDLES)))
    }

    fn over(file: File, requests: Places, handles: Places) -> Self {
        let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap_or_default();
        // From the clock, so that a handle of an earlier daemon is never taken for another of ours.
        let counter = u64::try_from(now.as_millis()).unwrap_or(1) & (u64::MAX >> (HANDLE_BITS + 1));
        Self {
            file,
            requests: Mutex::new(requests),
            handles: Mutex::new(handles),
            counter: AtomicU64::new(counter.max(1)),
            complained: AtomicBool::new(false),
        }
    }

    /// One that a daemon before has left.
    pub fn open(file: File) -> io::Result<(Self, Left)> {
        let mut header = [0u8; PAGE as usize];
        file.read_exact_at(&mut header, 0)?;
        let head: [u64; word::CONNECTION as usize + 1] = words(&header);
        if head[word::MAGIC as usize] != MAGIC || file.metadata()?.len() != LENGTH {
            return Err(corrupt("it is none"));
        }
        if head[word::LAYOUT as usize] != LAYOUT {
            return Err(corrupt("its layout is another version's"));
        }
        let at = (word::CONNECTION as usize + 1) * 8;
        let length = usize::try_from(head[word::CONNECTION as usize]).unwrap_or(usize::MAX);
        let text = header[at..].get(..length).ok_or_else(|| corrupt("its header"))?;
        let connection = match text {
            [] => None,
            text => Some(serde_json::from_slice(text).map_err(|_| corrupt("its header"))?),
        };
        let requests = read_requests(&file, head[word::REQUESTS_USED as usize].min(REQUESTS))?;
        let handles = read_handles(&file, head[word::HANDLES_USED as usize].min(HANDLES))?;
        let events = read_events(&file, head[word::NEXT_EVENT as usize])?;
        let used = requests.iter().map(|(place, _)| *place).collect();
        let request_places = Places::new(&used, head[word::REQUESTS_USED as usize].min(REQUESTS), REQUESTS);
        let used = handles.iter().map(|(fh, _)| fh & (HANDLES - 1)).collect();
        let handle_places = Places::new(&used, head[word::HANDLES_USED as usize].min(HANDLES), HANDLES);
        let left = Left {
            connection,
            requests,
            handles,
            events,
            serial: head[word::SERIAL as usize],
            last: head[word::LAST as usize],
        };
        Ok((Self::over(file, request_places, handle_places), left))
    }

    /// Who serves, from the memory of another process.
    pub fn who(file: &File) -> io::Result<(Who, Option<Connection>)> {
        let mut header = [0u8; PAGE as usize];
        file.read_exact_at(&mut header, 0)?;
        let head: [u64; word::CONNECTION as usize + 1] = words(&header);
        if head[word::MAGIC as usize] != MAGIC || head[word::LAYOUT as usize] != LAYOUT {
            return Err(corrupt("its layout is another version's"));
        }
        let length = usize::try_from(head[word::CONNECTION as usize]).unwrap_or(usize::MAX);
        let text = header[(word::CONNECTION as usize + 1) * 8..].get(..length).unwrap_or_default();
        let pid = |word: u64| u32::try_from(head[word as usize]).unwrap_or(0);
        let who = Who { keeper: pid(word::KEEPER), daemon: pid(word::DAEMON), starts: head[word::STARTS as usize] };
        Ok((who, serde_json::from_slice(text).ok()))
    }

    /// The descriptor, for whoever holds it.
    pub fn fd(&self) -> BorrowedFd<'_> {
        self.file.as_fd()
    }

    /// A write that fails costs the next daemon some of its memory, and no caller an answer.
    fn put(&self, data: &[u8], at: u64) {
        if let Err(error) = self.file.write_all_at(data, at)
            && !self.complained.swap(true, Ordering::Relaxed)
        {
            tracing::error!("the memory for the next daemon cannot be written: {error}; a restart would be noticed");
        }
    }

    fn put_word(&self, word: u64, value: u64) {
        self.put(&value.to_le_bytes(), word * 8);
    }

    /// This daemon serves now, and that keeper holds it.
    pub fn serving(&self, keeper: u32) {
        let mut starts = [0u8; 8];
        let read = self.file.read_exact_at(&mut starts, word::STARTS * 8);
        let starts = read.map_or(0, |()| u64::from_le_bytes(starts));
        self.put(&bytes(&[starts + 1, keeper.into(), std::process::id().into()]), word::STARTS * 8);
    }

    /// The connection's facts.
    pub fn connected(&self, connection: &Connection) -> io::Result<()> {
        let text = serde_json::to_vec(connection)?;
        let mut data = bytes(&[text.len() as u64]);
        data.extend(text);
        if data.len() as u64 > PAGE - word::CONNECTION * 8 {
            return Err(io::Error::new(io::ErrorKind::InvalidInput, "the mount point's path is too long to be kept"));
        }
        self.file.write_all_at(&data, word::CONNECTION * 8)
    }

    /// Serials of `control` below this are used from now on.
    pub fn serials_below(&self, serial: u64) {
        self.put_word(word::SERIAL, serial);
    }

    /// A handler has this request.
    pub fn last(&self, unique: u64) {
        self.put_word(word::LAST, unique & UNIQUE_MASK);
    }

    /// Keeps a request until the answer is dropped.
    pub fn ask(self: &Arc<Self>, asked: &Asked) -> Kept {
        let Some((place, grown)) = self.requests.lock().take() else { return Kept { memory: None, place: 0 } };
        if grown {
            self.put_word(word::REQUESTS_USED, self.requests.lock().used);
        }
        let at = REQUESTS_AT + place * REQUEST_SIZE;
        let command = asked.command.as_deref().unwrap_or_default();
        let room = usize::try_from(REQUEST_SIZE - REQUEST_DATA).unwrap_or(0);
        if !command.is_empty() {
            self.put(&command[..command.len().min(room)], at + REQUEST_DATA);
        }
        let (low, high) = asked.fence.unwrap_or_default().as_u64_pair();
        let head = [
            asked.unique & UNIQUE_MASK,
            asked.node,
            u64::from(asked.uid) | u64::from(asked.gid) << 32,
            asked.pid.into(),
            asked.since,
            low,
            high,
            // One more than its length, 0 for what is no command.
            asked.command.as_ref().map_or(0, |c| c.len() as u64 + 1),
            asked.waits.into(),
        ];
        self.put(&bytes(&head), at);
        Kept { memory: Some(self.clone()), place }
    }

    /// The place of a request that a daemon before had.
    pub fn kept(self: &Arc<Self>, place: u64) -> Kept {
        Kept { memory: Some(self.clone()), place }
    }

    /// A number for a new handle.
    pub fn open_handle(&self, open: &Open) -> u64 {
        let taken = self.handles.lock().take();
        let counter = self.counter.fetch_add(1, Ordering::Relaxed) << HANDLE_BITS;
        // A number of its own all the same: above every place.
        let Some((place, grown)) = taken else { return counter | 1 << 63 };
        if grown {
            self.put_word(word::HANDLES_USED, self.handles.lock().used);
        }
        let fh = counter | place;
        self.set_handle(fh, open);
        fh
    }

    /// What the handle means now.
    pub fn set_handle(&self, fh: u64, open: &Open) {
        if fh >> 63 != 0 {
            return;
        }
        let place = |p: &Place| [p.given, p.position, p.skip];
        let mut record = vec![fh, open.node, open.hash, open.length, u64::from(open.poll.is_some())];
        record.push(open.poll.unwrap_or(0));
        record.extend(place(&open.place));
        record.extend(place(&open.before));
        self.put(&bytes(&record), HANDLES_AT + (fh & (HANDLES - 1)) * HANDLE_SIZE);
    }

    /// The handle is closed.
    pub fn close_handle(&self, fh: u64) {
        if fh >> 63 != 0 {
            return;
        }
        let place = fh & (HANDLES - 1);
        self.put(&[0; 8], HANDLES_AT + place * HANDLE_SIZE);
        self.handles.lock().free.insert(place);
    }

    /// Keeps an event.
    pub fn event(&self, seq: u64, job: Option<i64>, line: &str) {
        let at = EVENTS_AT + seq % EVENTS * EVENT_SIZE;
        let room = usize::try_from(EVENT_SIZE - EVENT_LINE).unwrap_or(0);
        let line = if line.len() > room { "{\"lost\":1}\n" } else { line };
        let mut data = bytes(&[seq, job.map_or(u64::MAX, i64::cast_unsigned), line.len() as u64]);
        data.extend_from_slice(line.as_bytes());
        self.put(&data, at);
        self.put_word(word::NEXT_EVENT, seq + 1);
    }
}

fn read_requests(file: &File, used: u64) -> io::Result<Vec<(u64, Asked)>> {
    let mut found = Vec::new();
    for place in 0..used {
        let at = REQUESTS_AT + place * REQUEST_SIZE;
        let mut head = [0u8; 72];
        file.read_exact_at(&mut head, at)?;
        let [unique, node, ids, pid, since, low, high, length, waits] = words(&head);
        if unique == 0 {
            continue;
        }
        let command = match length.checked_sub(1) {
            None => None,
            Some(length) => {
                let length = length.min(REQUEST_SIZE - REQUEST_DATA);
                let mut command = vec![0; usize::try_from(length).unwrap_or(0)];
                file.read_exact_at(&mut command, at + REQUEST_DATA)?;
                Some(command)
            }
        };
        let half = |n: u64| u32::try_from(n & u64::from(u32::MAX)).unwrap_or(0);
        let fence = Some(Uuid::from_u64_pair(low, high)).filter(|fence| !fence.is_nil());
        let (uid, gid, pid) = (half(ids), half(ids >> 32), half(pid));
        let waits = waits != 0;
        found.push((place, Asked { unique, node, uid, gid, pid, since, fence, command, waits }));
    }
    Ok(found)
}

fn read_handles(file: &File, used: u64) -> io::Result<Vec<(u64, Open)>> {
    let mut table = vec![0u8; usize::try_from(used * HANDLE_SIZE).unwrap_or(0)];
    file.read_exact_at(&mut table, HANDLES_AT)?;
    let size = usize::try_from(HANDLE_SIZE).unwrap_or(1);
    let open = |record: &[u8]| {
        let [fh, node, hash, length, polls, poll, g0, p0, s0, g1, p1, s1] = words(record);
        let place = |given, position, skip| Place { given, position, skip };
        let poll = (polls != 0).then_some(poll);
        let open = Open { node, hash, length, poll, place: place(g0, p0, s0), before: place(g1, p1, s1) };
        (fh != 0).then_some((fh, open))
    };
    Ok(table.chunks_exact(size).filter_map(open).collect())
}

fn read_events(file: &File, next: u64) -> io::Result<Vec<KeptEvent>> {
    let mut events: Vec<KeptEvent> = Vec::new();
    for seq in next.saturating_sub(EVENTS)..next {
        let at = EVENTS_AT + seq % EVENTS * EVENT_SIZE;
        let mut head = [0u8; EVENT_LINE as usize];
        file.read_exact_at(&mut head, at)?;
        let [found, job, length] = words(&head);
        if found != seq {
            // Overwritten by one that was not counted yet.
            events.clear();
            continue;
        }
        let mut line = vec![0; usize::try_from(length.min(EVENT_SIZE - EVENT_LINE)).unwrap_or(0)];
        file.read_exact_at(&mut line, at + EVENT_LINE)?;
        let job = (job != u64::MAX).then_some(job.cast_signed());
        events.push(KeptEvent { seq, job, line: String::from_utf8_lossy(&line).into_owned() });
    }
    Ok(events)
}

/// A request's place; it is free when this is dropped, which is after its answer.
pub struct Kept {
    memory: Option<Arc<Memory>>,
    place: u64,
}

impl Kept {
    /// Nothing is kept.
    pub fn nothing() -> Self {
        Self { memory: None, place: 0 }
    }

    /// It was admitted, and waits for its operation.
    pub fn waits(&self) {
        if let Some(memory) = &self.memory {
            memory.put(&1u64.to_le_bytes(), REQUESTS_AT + self.place * REQUEST_SIZE + 8 * 8);
        }
    }

    /// It waits for that operation now.
    pub fn joined(&self, fence: Uuid) {
        if let Some(memory) = &self.memory {
            let (low, high) = fence.as_u64_pair();
            memory.put(&bytes(&[low, high]), REQUESTS_AT + self.place * REQUEST_SIZE + 5 * 8);
        }
    }
}

impl Drop for Kept {
    fn drop(&mut self) {
        if let Some(memory) = &self.memory {
            memory.put(&[0; 8], REQUESTS_AT + self.place * REQUEST_SIZE);
            memory.requests.lock().free.insert(self.place);
        }
    }
}

/// The hash of a rendering, the same in every daemon: FNV-1a, 64 bits. It tells changes apart,
/// nobody chooses it.
pub fn hash(data: &[u8]) -> u64 {
    data.iter().fold(0xcbf2_9ce4_8422_2325, |h, b| (h ^ u64::from(*b)).wrapping_mul(0x0100_0000_01b3))
}

/// Milliseconds of the clock that runs from the boot on, sleep included.
pub fn boot_clock() -> u64 {
    let now = rustix::time::clock_gettime(rustix::time::ClockId::Boottime);
    u64::try_from(now.tv_sec).unwrap_or(0) * 1000 + u64::try_from(now.tv_nsec).unwrap_or(0) / 1_000_000
}

#[cfg(test)]
mod tests;
