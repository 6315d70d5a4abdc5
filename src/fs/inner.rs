//! What the handlers share: attributes, renderings and their cache, opening, reading.

use std::collections::HashMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use fuser::{FileAttr, FileType, FopenFlags, INodeNo, ReplyData, ReplyDirectory, ReplyOpen};
use parking_lot::Mutex;

use super::before::Before;
use super::core::Core;
use super::handles::{Handle, Handles, Listing, Print, State, Stream, Value};
use super::node::{JobFile, Node, RootFile, SERIAL_MASK, VolumeFile};
use super::notify::Bell;
use super::tree::{self, ExportNames, Kind, View};
use super::waiters::{Parked, Reply, Waiters, Waits};
use super::{errno, render};
use crate::engine::World;
use crate::error::{Errno, Error};
use crate::kept::Memory;
use crate::model::{DevNo, DiskRow, Holder, JobRow, Timestamp};

/// How long an open of `holders` waits for the walk of /proc, which may be slow: every reply but a
/// command's comes within a second, and waits are looked at every 100 ms. Then it cannot be told.
const HOLDERS_MOST: Duration = Duration::from_millis(800);

/// What a READ asks for.
#[derive(Clone, Copy)]
pub struct Wanted {
    pub offset: u64,
    pub size: usize,
    /// O_NONBLOCK: nothing yet is EAGAIN.
    pub nonblock: bool,
    pub who: Who,
}

/// A request, as far as it outlives its handler.
#[derive(Clone, Copy)]
pub struct Who {
    /// The caller's thread.
    pub pid: u32,
    /// The request's number; its highest bit says that the kernel has sent it again.
    pub unique: u64,
}

/// Serials of `control`: none is given twice while the mount lasts, by whatever daemon.
struct Serial {
    next: AtomicU64,
    /// Below it the memory knows them as used.
    kept: AtomicU64,
    memory: Option<Arc<Memory>>,
}

/// Serials are kept in blocks of so many.
const SERIAL_BLOCK: u64 = 4096;

impl Serial {
    fn new(first: u64, memory: Option<Arc<Memory>>) -> Self {
        Self { next: AtomicU64::new(first), kept: AtomicU64::new(first), memory }
    }

    fn next(&self) -> u32 {
        let serial = self.next.fetch_add(1, Ordering::Relaxed);
        if let Some(memory) = &self.memory
            && serial >= self.kept.load(Ordering::Relaxed)
        {
            memory.serials_below(serial + SERIAL_BLOCK);
            self.kept.store(serial + SERIAL_BLOCK, Ordering::Relaxed);
        }
        u32::try_from(serial & u64::from(SERIAL_MASK)).unwrap_or(0)
    }
}

/// The state behind the handlers, shared with callbacks and the notifying thread.
pub struct Inner {
    pub core: Arc<dyn Core>,
    pub exports: ExportNames,
    pub gid: u32,
    pub handles: Handles,
    pub waiters: Waiters,
    pub bell: Bell,
    pub before: Before,
    serial: Serial,
    cache: Mutex<HashMap<RootFile, Cached>>,
    /// Length of each volume's last `holders`, for st_size.
    holders: Mutex<HashMap<DiskRow, usize>>,
}

/// A rendering that takes a walk over all volumes.
struct Cached {
    seq: u64,
    text: Arc<str>,
    changed: Timestamp,
}

/// A rendering, and the world it is of.
pub struct Rendered {
    pub text: Arc<str>,
    pub seq: u64,
}

impl Inner {
    pub fn new(core: Arc<dyn Core>, exports: ExportNames, gid: u32, waiters: Waiters, before: Before) -> Self {
        let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
        let micros = u64::try_from(now.as_micros()).unwrap_or(1);
        Self {
            core,
            exports,
            gid,
            handles: Handles::new(micros, before.memory.clone()),
            waiters,
            bell: Bell::default(),
            // Tenths of a second: 28 bits last ten months, longer than any lookup is remembered.
            serial: Serial::new(before.serial.unwrap_or(micros / 100_000), before.memory.clone()),
            before,
            cache: Mutex::default(),
            holders: Mutex::default(),
        }
    }

    fn view<'a>(&'a self, world: &'a World) -> View<'a> {
        View { world, core: &*self.core, exports: &self.exports }
    }

    /// Whether that node is a stream, and of which job; `None`: it is none.
    pub fn stream_of(&self, node: Node) -> Option<Option<JobRow>> {
        match node {
            Node::Root(RootFile::EventsAll) => Some(None),
            Node::Job(row, JobFile::Events) => Some(Some(row)),
            _ => None,
        }
    }

    /// The node of an id; ESTALE for an id of nothing.
    pub fn node(&self, id: INodeNo) -> Result<Node, Errno> {
        Node::parse(id.0).ok_or(Errno::ESTALE)
    }

    pub fn lookup(&self, parent: Node, name: &str) -> Result<FileAttr, Errno> {
        let world = self.core.world();
        let view = self.view(&world);
        let node = match tree::lookup(&view, parent, name)? {
            Node::Control(target, _) => loop {
                let node = Node::Control(target, self.serial.next());
                if !self.waiters.node_waits(node.id()) {
                    break node;
                }
            },
            node => node,
        };
        let mut attr = self.attr_in(&view, node)?;
        // fuser takes the node id of an entry from here; GETATTR then shows the constant number.
        attr.ino = INodeNo(node.id());
        Ok(attr)
    }

    pub fn attr(&self, node: Node) -> Result<FileAttr, Errno> {
        let world = self.core.world();
        self.attr_in(&self.view(&world), node)
    }

    fn attr_in(&self, view: &View<'_>, node: Node) -> Result<FileAttr, Errno> {
        let (time, device) = tree::meta(view, node)?;
        let mut time = time.unwrap_or(view.world.started);
        let size = match (node.kind(), node) {
            (Kind::Link, _) => tree::link(view, node)?.len(),
            (_, Node::Root(RootFile::EventsAll) | Node::Job(_, JobFile::Events)) => 0,
            (_, Node::Volume(row, VolumeFile::Holders)) => {
                self.holders.lock().get(&row).copied().unwrap_or_else(|| render::holders(&[]).len())
            }
            (_, Node::Root(file)) if cached(file) => {
                let (text, changed) = self.cached(view, file)?;
                time = if file == RootFile::History { time } else { changed };
                text.text.len()
            }
            (Kind::File, _) => render::size(view, node)?,
            (Kind::Dir | Kind::Block, _) => 0,
        };
        Ok(self.attr_of(node, size, time, device))
    }

    fn attr_of(&self, node: Node, size: usize, time: Timestamp, device: Option<DevNo>) -> FileAttr {
        let time = time.system_time();
        FileAttr {
            ino: INodeNo(node.ino()),
            size: u64::try_from(size).unwrap_or(0),
            blocks: 0,
            atime: time,
            mtime: time,
            ctime: time,
            crtime: time,
            kind: file_type(node.kind()),
            perm: node.mode(),
            nlink: 1,
            uid: 0,
            gid: self.gid,
            rdev: device.map_or(0, rdev),
            blksize: 4096,
            flags: 0,
        }
    }

    /// A new directory's attributes, without asking the world, which may not show it yet.
    pub fn new_dir(&self, node: Node) -> FileAttr {
        self.attr_of(node, 0, Timestamp::from(SystemTime::now()), None)
    }

    pub fn link(&self, node: Node) -> Result<String, Errno> {
        let world = self.core.world();
        tree::link(&self.view(&world), node)
    }

    pub fn list(&self, node: Node) -> Result<Vec<tree::Entry>, Errno> {
        let world = self.core.world();
        tree::list(&self.view(&world), node)
    }

    /// What the file says now.
    pub fn text(&self, node: Node) -> Result<Rendered, Errno> {
        let world = self.core.world();
        let view = self.view(&world);
        if let Node::Root(file) = node
            && cached(file)
        {
            return Ok(self.cached(&view, file)?.0);
        }
        Ok(Rendered { text: render::text(&view, node)?.into(), seq: world.seq })
    }

    fn cached(&self, view: &View<'_>, file: RootFile) -> Result<(Rendered, Timestamp), Errno> {
        let mut cache = self.cache.lock();
        let seq = view.world.seq;
        let old = cache.get(&file);
        if let Some(c) = old.filter(|c| c.seq >= seq) {
            return Ok((Rendered { text: c.text.clone(), seq: c.seq }, c.changed));
        }
        let text: Arc<str> = render::text(view, Node::Root(file))?.into();
        let unchanged = old.filter(|c| c.text == text).map(|c| c.changed);
        let changed = unchanged.unwrap_or(view.world.at);
        cache.insert(file, Cached { seq, text: text.clone(), changed });
        Ok((Rendered { text, seq }, changed))
    }

    /// OPEN. `holders` is answered when the walk of /proc is done.
    pub fn open(self: &Arc<Self>, node: Node, flags: i32, who: Who, reply: ReplyOpen) {
        let opened = self.open_now(node, flags);
        match opened {
            Ok(Some(state)) => {
                // Not seekable: a shell's `read` would else take a block and seek back, past other events.
                let stream = matches!(state, State::Stream(_)).then_some(FopenFlags::FOPEN_NONSEEKABLE);
                let flags = FopenFlags::FOPEN_DIRECT_IO | stream.unwrap_or(FopenFlags::empty());
                reply.opened(fuser::FileHandle(self.handles.add(node, state)), flags)
            }
            Ok(None) => self.open_holders(node, who, reply),
            Err(e) => reply.error(errno(e)),
        }
    }

    /// `None`: to be answered later.
    fn open_now(&self, node: Node, flags: i32) -> Result<Option<State>, Errno> {
        if node.kind() != Kind::File {
            return Err(if node.kind() == Kind::Dir { Errno::EISDIR } else { Errno::ENODEV });
        }
        let mode = flags & libc::O_ACCMODE;
        // Root passes the kernel's check of the mode bits.
        let writes = mode != libc::O_RDONLY || flags & libc::O_TRUNC != 0;
        if writes && node.mode() & 0o222 == 0 {
            return Err(Errno::EACCES);
        }
        let world = self.core.world();
        tree::meta(&self.view(&world), node)?;
        if let (Some(job), true) = (self.stream_of(node), mode != libc::O_WRONLY) {
            return Ok(Some(State::Stream(Stream::new(job, self.core.events().position()))));
        }
        Ok(Some(match node {
            _ if mode == libc::O_WRONLY => State::Writer,
            Node::Volume(_, VolumeFile::Holders) => return Ok(None),
            node => {
                let Rendered { text, seq } = self.text(node)?;
                State::Value(Value::new(text, seq))
            }
        }))
    }

    fn open_holders(self: &Arc<Self>, node: Node, who: Who, reply: ReplyOpen) {
        self.when_held(node, who, Reply::Open(reply), |inner, node, text, reply| {
            let Reply::Open(reply) = reply else { return reply.error(Errno::EIO) };
            // Its own moment: no world's.
            let fh = inner.handles.add(node, State::Value(Value::new(text, u64::MAX)));
            reply.opened(fuser::FileHandle(fh), FopenFlags::FOPEN_DIRECT_IO);
        });
    }

    /// Parks the request until it is known who has the device, then answers it with the table.
    fn when_held(
        self: &Arc<Self>,
        node: Node,
        who: Who,
        reply: Reply,
        answer: impl FnOnce(&Self, Node, Arc<str>, Reply) + Send + 'static,
    ) {
        let Node::Volume(row, _) = node else { return reply.error(Errno::EIO) };
        let ticket = self.core.holders(row);
        let (pid, most, kept) = (who.pid, Some(HOLDERS_MOST), self.keep(node, who));
        let parked = Parked { reply, waits: Waits::Answer, pid, most, node: node.id(), kept };
        let key = self.waiters.park(parked);
        let inner = Arc::downgrade(self);
        ticket.on_done(move |outcome: &Result<Arc<Vec<Holder>>, Error>| {
            let Some(inner) = inner.upgrade() else { return };
            let Some(parked) = inner.waiters.take(key) else { return };
            match outcome {
                Ok(all) => {
                    let text: Arc<str> = render::holders(all).into();
                    inner.note_holders(row, text.len());
                    answer(&inner, node, text, parked.reply);
                }
                Err(e) => parked.reply.error(e.errno()),
            }
        });
    }

    fn note_holders(&self, row: DiskRow, length: usize) {
        let world = self.core.world();
        let mut sizes = self.holders.lock();
        sizes.insert(row, length);
        if sizes.len() > 2 * world.volumes.len() + 16 {
            sizes.retain(|row, _| world.volumes.contains_key(row));
        }
    }

    /// READ.
    pub fn read(self: &Arc<Self>, node: Node, fh: u64, wanted: Wanted, reply: ReplyData) {
        let Wanted { offset, size, who, .. } = wanted;
        let Some(handle) = self.handles.get(fh).filter(|h| h.node == node).or_else(|| self.adopt(node, fh, offset))
        else {
            return reply.error(errno(Errno::ESTALE));
        };
        let mut state = handle.state.lock();
        let value = match &mut *state {
            State::Value(value) => value,
            State::Stream(_) => {
                drop(state);
                return self.read_stream(&handle, wanted, reply);
            }
            State::Dir(..) => return reply.error(errno(Errno::EISDIR)),
            State::Writer => return reply.error(errno(Errno::EIO)),
        };
        if offset == 0 {
            let first = std::mem::take(&mut value.fresh);
            let holders = matches!(node, Node::Volume(_, VolumeFile::Holders));
            if holders && !first {
                drop(state);
                return self.reread_holders(handle, size, who, reply);
            }
            // What was rendered at the open is good for the first read if nothing has changed since.
            let still_good = holders || first && value.seq == self.core.world().seq;
            if !still_good {
                match self.text(node) {
                    Ok(now) => {
                        value.set(now.text, now.seq);
                        self.handles.keep(&handle, &state);
                    }
                    // The object behind an open handle is gone.
                    Err(Errno::ESTALE) => return reply.error(errno(Errno::ENODEV)),
                    Err(e) => return reply.error(errno(e)),
                }
            }
        }
        let State::Value(value) = &mut *state else { return reply.error(errno(Errno::EIO)) };
        match &value.text {
            Some(text) => reply.data(slice(text, offset, size)),
            // Read to its end from the daemon before.
            None if offset >= value.print.length => reply.data(&[]),
            None => match self.text(node) {
                Ok(now) if Print::of(&now.text) == value.print => {
                    value.set(now.text, now.seq);
                    reply.data(slice(value.text.as_deref().unwrap_or_default(), offset, size));
                }
                // Never the end of one text after the beginning of another.
                _ => reply.error(errno(Errno::ESTALE)),
            },
        }
    }

    /// READDIR: from the listing of the open, made anew when it is read from the beginning again.
    pub fn readdir(&self, node: Node, fh: u64, offset: u64, mut reply: ReplyDirectory) {
        let handle = match self.handles.get(fh).filter(|h| h.node == node) {
            Some(handle) => handle,
            None if offset == 0 => self.handles.insert(fh, node, State::Dir(Listing::new(Vec::new()))),
            None => return reply.error(errno(Errno::ESTALE)),
        };
        let mut state = handle.state.lock();
        let State::Dir(listing) = &mut *state else { return reply.error(errno(Errno::ENOTDIR)) };
        let again = std::mem::replace(&mut listing.read, true);
        if offset == 0 && again {
            match self.list(node) {
                Ok(now) => listing.set(now),
                Err(e) => return reply.error(errno(e)),
            }
        } else if listing.entries.is_none() && offset < listing.length() {
            match self.list(node) {
                Ok(now) if listing.is_still(&now) => listing.set(now),
                _ => return reply.error(errno(Errno::ESTALE)),
            }
        }
        if offset == 0 && again {
            self.handles.keep(&handle, &state);
        }
        let State::Dir(listing) = &*state else { return reply.error(errno(Errno::ENOTDIR)) };
        let from = usize::try_from(offset).unwrap_or(usize::MAX);
        for (entry, after) in listing.entries.as_deref().unwrap_or_default().iter().skip(from).zip(offset + 1..) {
            if reply.add(INodeNo(entry.node.ino()), after, file_type(entry.node.kind()), &entry.name) {
                break;
            }
        }
        reply.ok();
    }

    /// A handle that an earlier daemon gave out: its value from the beginning, or not at all.
    fn adopt(&self, node: Node, fh: u64, offset: u64) -> Option<Arc<Handle>> {
        if offset != 0 || node.kind() != Kind::File || matches!(node, Node::Volume(_, VolumeFile::Holders)) {
            return None;
        }
        let state = self.open_now(node, libc::O_RDONLY).ok()??;
        Some(self.handles.insert(fh, node, state))
    }

    fn reread_holders(self: &Arc<Self>, handle: Arc<Handle>, size: usize, who: Who, reply: ReplyData) {
        let node = handle.node;
        self.when_held(node, who, Reply::Data(reply), move |inner, _, text, reply| {
            let Reply::Data(reply) = reply else { return reply.error(Errno::EIO) };
            let mut state = handle.state.lock();
            if let State::Value(value) = &mut *state {
                value.set(text.clone(), u64::MAX);
            }
            inner.handles.keep(&handle, &state);
            drop(state);
            reply.data(slice(&text, 0, size));
        });
    }
}

fn slice(text: &str, offset: u64, size: usize) -> &[u8] {
    let from = usize::try_from(offset).unwrap_or(usize::MAX).min(text.len());
    &text.as_bytes()[from..text.len().min(from.saturating_add(size))]
}

/// Root files that a walk over everything makes.
fn cached(file: RootFile) -> bool {
    matches!(file, RootFile::Problems | RootFile::Table | RootFile::History | RootFile::Limits | RootFile::Metrics)
}

/// The type for fuser.
pub fn file_type(kind: Kind) -> FileType {
    match kind {
        Kind::Dir => FileType::Directory,
        Kind::File => FileType::RegularFile,
        Kind::Link => FileType::Symlink,
        Kind::Block => FileType::BlockDevice,
    }
}

/// A device number as FUSE carries it: 12 bits major between the low 8 and the high 12 of minor.
fn rdev(dev: DevNo) -> u32 {
    (dev.minor & 0xff) | (dev.major & 0xfff) << 8 | (dev.minor & 0xf_ff00) << 12
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_serial_of_control_is_not_given_again_by_the_next_daemon() {
        let memory = Arc::new(Memory::create().unwrap());
        let again = || Memory::open(std::fs::File::from(memory.fd().try_clone_to_owned().unwrap())).unwrap().1;
        let serials = Serial::new(1000, Some(memory.clone()));
        for n in 0..10_000 {
            assert_eq!(u64::from(serials.next()), 1000 + n);
            assert!(again().serial > 1000 + n);
        }
        // 28 bits of it are the node's.
        assert_eq!(Serial::new((1 << 28) + 5, None).next(), 5);
    }
}
