//! The mounted tree: the engine's published state as files, its commands as writes.
//!
//! `node` is what an id means, `tree` what stands where, `render` what each file says, `handles`
//! what is open, `waiters` what waits, `commands` what writes do, `mount` how it is mounted. Below,
//! a few lines a request: handlers run on the session's thread, so none of them blocks.

use std::ffi::OsStr;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, SystemTime};

use fuser::{
    AccessFlags, BsdFileFlags, CopyFileRangeFlags, FileHandle, Filesystem, FopenFlags, Generation, INodeNo, InitFlags,
    IoctlFlags, KernelConfig, LockOwner, OpenFlags, PollEvents, PollFlags, PollNotifier, RenameFlags, ReplyAttr,
    ReplyBmap, ReplyCreate, ReplyData, ReplyDirectory, ReplyEmpty, ReplyEntry, ReplyIoctl, ReplyLseek, ReplyOpen,
    ReplyPoll, ReplyStatfs, ReplyWrite, ReplyXattr, Request, TimeOrNow, WriteFlags,
};

use crate::error::Errno;
use crate::failpoint;

mod before;
mod commands;
mod core;
mod handles;
mod inner;
mod mount;
mod node;
mod notify;
mod render;
mod tree;
mod unanswered;
mod waiters;

#[cfg(test)]
mod mounted_tests;
#[cfg(test)]
mod testing;

pub use self::core::Core;
pub use mount::{
    Adopted, DEFAULT_MOUNTPOINT, Ended, MountError, Options, Serving, asked_of_the_kernel, serve, still_mounted,
    take_away,
};

use handles::{Listing, State};
use inner::{Inner, Wanted, Who};
use node::{JobFile, Node, RootFile};

/// Nothing is cached by the kernel: neither names nor attributes.
const TTL: Duration = Duration::ZERO;
/// The largest write the kernel sends in one piece. A command is shorter than 4 KiB, so a longer
/// text is refused by its first piece.
const MAX_WRITE: u32 = 128 * 1024;

/// An errno for a reply.
fn errno(e: Errno) -> fuser::Errno {
    // The kernel takes 1 to 511, and so are all of ours; anything else would leave the caller hanging.
    fuser::Errno::from_i32(if (1..512).contains(&e.0) { e.0 } else { libc::EIO })
}

/// The filesystem as the session calls it.
struct Fs {
    inner: Arc<Inner>,
    /// What the kernel offered at INIT.
    offered: Arc<AtomicU64>,
}

/// What is asked of the kernel for the life of the mount, beside fuser's own.
const WANTED: [InitFlags; 3] =
    [InitFlags::FUSE_ATOMIC_O_TRUNC, InitFlags::FUSE_PARALLEL_DIROPS, InitFlags::FUSE_AUTO_INVAL_DATA];

impl Fs {
    /// Runs a handler. A panic would end the session's loop and leave a dead mount; as it is, the
    /// reply is dropped, which answers EIO.
    fn guard(&self, req: &Request, what: &str, handler: impl FnOnce()) {
        let _handled = self.inner.handling(req.unique().0);
        if catch_unwind(AssertUnwindSafe(handler)).is_err() {
            tracing::error!("the handler of {what} panicked; its caller got EIO");
        }
    }
}

/// The node and the name as text; a name that is none of ours anyway is ENOENT.
fn named<'a>(inner: &Inner, parent: INodeNo, name: &'a OsStr) -> Result<(Node, &'a str), Errno> {
    Ok((inner.node(parent)?, name.to_str().ok_or(Errno::ENOENT)?))
}

fn who(req: &Request) -> Who {
    Who { pid: req.pid(), unique: req.unique().0 }
}

/// SETATTR: truncation of what can be written and times succeed and do nothing.
fn settable(node: Node, owner: bool, size: bool) -> Result<(), Errno> {
    let writable = matches!(node, Node::Control(..) | Node::Job(_, JobFile::VmName | JobFile::Hold));
    match (owner, size) {
        (true, _) => Err(Errno::EPERM),
        (false, true) if !writable => Err(Errno::EACCES),
        _ => Ok(()),
    }
}

impl Filesystem for Fs {
    fn init(&mut self, _req: &Request, config: &mut KernelConfig) -> std::io::Result<()> {
        // These last as long as the mount (kernel fact 11). Asked for one by one: an older kernel
        // without one of them still has the others.
        self.offered.store(config.capabilities().bits(), Ordering::Relaxed);
        for flag in WANTED {
            if config.add_capabilities(flag).is_err() {
                tracing::warn!("this kernel's FUSE has no {flag:?}");
            }
        }
        if let Err(nearest) = config.set_max_write(MAX_WRITE) {
            tracing::warn!("writes of {MAX_WRITE} bytes are not possible, {nearest} are");
        }
        Ok(())
    }

    fn destroy(&mut self) {
        self.inner.waiters.shut_down();
        self.inner.bell.end();
    }

    fn lookup(&self, req: &Request, parent: INodeNo, name: &OsStr, reply: ReplyEntry) {
        self.guard(req, "lookup", || {
            match named(&self.inner, parent, name).and_then(|(p, n)| self.inner.lookup(p, n)) {
                Ok(attr) => reply.entry(&TTL, &attr, Generation(0)),
                Err(e) => reply.error(errno(e)),
            }
        });
    }

    fn forget(&self, _req: &Request, _ino: INodeNo, _nlookup: u64) {}

    fn getattr(&self, req: &Request, ino: INodeNo, _fh: Option<FileHandle>, reply: ReplyAttr) {
        self.guard(req, "getattr", || {
            if ino.0 == Node::Root(RootFile::Version).id() && failpoint::hit("fs.panic") {
                return reply.error(errno(Errno::EIO));
            }
            match self.inner.node(ino).and_then(|node| self.inner.attr(node)) {
                Ok(attr) => reply.attr(&TTL, &attr),
                Err(e) => reply.error(errno(e)),
            }
        });
    }

    fn setattr(
        &self,
        req: &Request,
        ino: INodeNo,
        mode: Option<u32>,
        uid: Option<u32>,
        gid: Option<u32>,
        size: Option<u64>,
        _atime: Option<TimeOrNow>,
        _mtime: Option<TimeOrNow>,
        _ctime: Option<SystemTime>,
        _fh: Option<FileHandle>,
        _crtime: Option<SystemTime>,
        _chgtime: Option<SystemTime>,
        _bkuptime: Option<SystemTime>,
        _flags: Option<BsdFileFlags>,
        reply: ReplyAttr,
    ) {
        self.guard(req, "setattr", || {
            let owner = mode.is_some() || uid.is_some() || gid.is_some();
            let node = self.inner.node(ino);
            let done = node.and_then(|node| settable(node, owner, size.is_some()).and_then(|()| self.inner.attr(node)));
            match done {
                Ok(attr) => reply.attr(&TTL, &attr),
                Err(e) => reply.error(errno(e)),
            }
        });
    }

    fn readlink(&self, req: &Request, ino: INodeNo, reply: ReplyData) {
        self.guard(req, "readlink", || match self.inner.node(ino).and_then(|node| self.inner.link(node)) {
            Ok(target) => reply.data(target.as_bytes()),
            Err(e) => reply.error(errno(e)),
        });
    }

    fn mkdir(&self, req: &Request, parent: INodeNo, name: &OsStr, _mode: u32, _umask: u32, reply: ReplyEntry) {
        // A name that is not text breaks the rule as any other does.
        let name = name.to_string_lossy();
        self.guard(req, "mkdir", || match self.inner.node(parent) {
            Ok(parent) => self.inner.mkdir(req, parent, &name, reply),
            Err(e) => reply.error(errno(e)),
        });
    }

    fn rmdir(&self, req: &Request, parent: INodeNo, name: &OsStr, reply: ReplyEmpty) {
        self.guard(req, "rmdir", || match named(&self.inner, parent, name) {
            Ok((parent, name)) => self.inner.rmdir(req, parent, name, reply),
            Err(e) => reply.error(errno(e)),
        });
    }

    fn mknod(&self, _: &Request, _: INodeNo, _: &OsStr, _: u32, _: u32, _: u32, reply: ReplyEntry) {
        reply.error(errno(Errno::EPERM));
    }

    fn unlink(&self, _: &Request, _: INodeNo, _: &OsStr, reply: ReplyEmpty) {
        reply.error(errno(Errno::EPERM));
    }

    fn symlink(&self, _: &Request, _: INodeNo, _: &OsStr, _: &Path, reply: ReplyEntry) {
        reply.error(errno(Errno::EPERM));
    }

    fn rename(&self, _: &Request, _: INodeNo, _: &OsStr, _: INodeNo, _: &OsStr, _: RenameFlags, reply: ReplyEmpty) {
        reply.error(errno(Errno::EPERM));
    }

    fn link(&self, _: &Request, _: INodeNo, _: INodeNo, _: &OsStr, reply: ReplyEntry) {
        reply.error(errno(Errno::EPERM));
    }

    fn create(&self, _: &Request, _: INodeNo, _: &OsStr, _: u32, _: u32, _: i32, reply: ReplyCreate) {
        reply.error(errno(Errno::EPERM));
    }

    fn open(&self, req: &Request, ino: INodeNo, flags: OpenFlags, reply: ReplyOpen) {
        self.guard(req, "open", || match self.inner.node(ino) {
            Ok(node) => self.inner.open(node, flags.0, who(req), reply),
            Err(e) => reply.error(errno(e)),
        });
    }

    fn read(
        &self,
        req: &Request,
        ino: INodeNo,
        fh: FileHandle,
        offset: u64,
        size: u32,
        flags: OpenFlags,
        _lock_owner: Option<LockOwner>,
        reply: ReplyData,
    ) {
        let nonblock = flags.0 & libc::O_NONBLOCK != 0;
        let size = usize::try_from(size).unwrap_or(usize::MAX);
        let wanted = Wanted { offset, size, nonblock, who: who(req) };
        self.guard(req, "read", || match self.inner.node(ino) {
            Ok(node) => self.inner.read(node, fh.0, wanted, reply),
            Err(e) => reply.error(errno(e)),
        });
    }

    fn write(
        &self,
        req: &Request,
        ino: INodeNo,
        _fh: FileHandle,
        _offset: u64,
        data: &[u8],
        _write_flags: WriteFlags,
        flags: OpenFlags,
        _lock_owner: Option<LockOwner>,
        reply: ReplyWrite,
    ) {
        let nonblock = flags.0 & libc::O_NONBLOCK != 0;
        self.guard(req, "write", || match self.inner.node(ino) {
            Ok(node) => self.inner.write(req, node, data, nonblock, reply),
            Err(e) => reply.error(errno(e)),
        });
    }

    fn flush(&self, _: &Request, _: INodeNo, _: FileHandle, _: LockOwner, reply: ReplyEmpty) {
        reply.ok();
    }

    fn release(
        &self,
        req: &Request,
        _ino: INodeNo,
        fh: FileHandle,
        _flags: OpenFlags,
        _lock_owner: Option<LockOwner>,
        _flush: bool,
        reply: ReplyEmpty,
    ) {
        self.guard(req, "release", || {
            self.inner.handles.release(fh.0);
            reply.ok();
        });
    }

    fn fsync(&self, _: &Request, _: INodeNo, _: FileHandle, _: bool, reply: ReplyEmpty) {
        reply.ok();
    }

    fn opendir(&self, req: &Request, ino: INodeNo, _flags: OpenFlags, reply: ReplyOpen) {
        let listed = |node| Ok((node, self.inner.list(node)?));
        self.guard(req, "opendir", || match self.inner.node(ino).and_then(listed) {
            Ok((node, entries)) => {
                let fh = self.inner.handles.add(node, State::Dir(Listing::new(entries)));
                reply.opened(FileHandle(fh), FopenFlags::empty());
            }
            Err(e) => reply.error(errno(e)),
        });
    }

    fn readdir(&self, req: &Request, ino: INodeNo, fh: FileHandle, offset: u64, reply: ReplyDirectory) {
        self.guard(req, "readdir", || match self.inner.node(ino) {
            Ok(node) => self.inner.readdir(node, fh.0, offset, reply),
            Err(e) => reply.error(errno(e)),
        });
    }

    fn releasedir(&self, req: &Request, _: INodeNo, fh: FileHandle, _: OpenFlags, reply: ReplyEmpty) {
        self.guard(req, "releasedir", || {
            self.inner.handles.release(fh.0);
            reply.ok();
        });
    }

    fn fsyncdir(&self, _: &Request, _: INodeNo, _: FileHandle, _: bool, reply: ReplyEmpty) {
        reply.ok();
    }

    fn statfs(&self, _req: &Request, _ino: INodeNo, reply: ReplyStatfs) {
        // No blocks: `df` without arguments leaves the mount out.
        reply.statfs(0, 0, 0, 0, 0, 4096, 255, 4096);
    }

    // The kernel remembers ENOSYS for the mount: these are never wanted.
    fn setxattr(&self, _: &Request, _: INodeNo, _: &OsStr, _: &[u8], _: i32, _: u32, reply: ReplyEmpty) {
        reply.error(errno(Errno::ENOSYS));
    }

    fn getxattr(&self, _: &Request, _: INodeNo, _: &OsStr, _: u32, reply: ReplyXattr) {
        reply.error(errno(Errno::ENOSYS));
    }

    fn listxattr(&self, _: &Request, _: INodeNo, _: u32, reply: ReplyXattr) {
        reply.error(errno(Errno::ENOSYS));
    }

    fn removexattr(&self, _: &Request, _: INodeNo, _: &OsStr, reply: ReplyEmpty) {
        reply.error(errno(Errno::ENOSYS));
    }

    fn lseek(&self, _: &Request, _: INodeNo, _: FileHandle, _: i64, _: i32, reply: ReplyLseek) {
        reply.error(errno(Errno::ENOSYS));
    }

    fn bmap(&self, _: &Request, _: INodeNo, _: u32, _: u64, reply: ReplyBmap) {
        reply.error(errno(Errno::ENOSYS));
    }

    fn copy_file_range(
        &self,
        _req: &Request,
        _ino_in: INodeNo,
        _fh_in: FileHandle,
        _offset_in: u64,
        _ino_out: INodeNo,
        _fh_out: FileHandle,
        _offset_out: u64,
        _len: u64,
        _flags: CopyFileRangeFlags,
        reply: ReplyWrite,
    ) {
        reply.error(errno(Errno::ENOSYS));
    }

    fn fallocate(&self, _: &Request, _: INodeNo, _: FileHandle, _: u64, _: u64, _: i32, reply: ReplyEmpty) {
        reply.error(errno(Errno::EOPNOTSUPP));
    }

    fn access(&self, _req: &Request, _ino: INodeNo, _mask: AccessFlags, reply: ReplyEmpty) {
        // Not asked under `default_permissions`.
        reply.ok();
    }

    fn ioctl(
        &self,
        _req: &Request,
        _ino: INodeNo,
        _fh: FileHandle,
        _flags: IoctlFlags,
        _cmd: u32,
        _in_data: &[u8],
        _out_size: u32,
        reply: ReplyIoctl,
    ) {
        // What isatty(3) expects of a file.
        reply.error(fuser::Errno::ENOTTY);
    }

    fn poll(
        &self,
        req: &Request,
        ino: INodeNo,
        fh: FileHandle,
        ph: PollNotifier,
        _events: PollEvents,
        flags: PollFlags,
        reply: ReplyPoll,
    ) {
        self.guard(req, "poll", || match self.inner.node(ino) {
            Ok(node) => self.inner.poll(node, fh.0, ph, flags, reply),
            Err(e) => reply.error(errno(e)),
        });
    }
}
