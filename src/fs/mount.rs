//! Mounting, and the end of it. The mount(2) is our own (kernel fact 10): the type shows as
//! `fuse.volfs`, the unmount is lazy and never hits another filesystem, and after the mount the
//! daemon never touches the tree itself.

use std::fs::File;
use std::io;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::mpsc;
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use fuser::{Config, Session, SessionACL};
use parking_lot::Mutex;
use rustix::mount::{MountFlags, UnmountFlags};
use tokio::sync::watch;

use super::before::{self, Before};
use super::core::Core;
use super::inner::Inner;
use super::tree::ExportNames;
use super::waiters::Waiters;
use super::{Fs, notify, unanswered};
use crate::failpoint;
use crate::kept::{Connection, Left, Memory};

/// Where the tree is mounted if nothing else is said.
pub const DEFAULT_MOUNTPOINT: &str = "/run/volfs";

const FS_TYPE: &str = "fuse.volfs";
/// What the mount is for its life, beside the descriptor.
const MOUNT_OPTIONS: &str = "rootmode=40000,user_id=0,group_id=0,allow_other,default_permissions";
/// How long a stop waits for the session to end, which it does when its last user leaves.
const JOIN_MOST: Duration = Duration::from_secs(2);
/// How long whatever is mounted there may take to answer a stat.
const LOOK_MOST: Duration = Duration::from_secs(10);
/// The most dead mounts on top of one another that are cleared away.
const DEAD_MOST: usize = 64;

/// How to serve the tree.
#[derive(Debug, Clone)]
pub struct Options {
    /// An absolute path to a directory, which is made if its parent is there.
    pub mountpoint: PathBuf,
    /// The group that may write to `control`, `vm_name`, `hold` and `block`.
    pub gid: u32,
    /// Names in `exports/`; must hold `{uuid}`.
    pub export_template: String,
}

impl Default for Options {
    fn default() -> Self {
        Self { mountpoint: DEFAULT_MOUNTPOINT.into(), gid: 0, export_template: "{uuid}".into() }
    }
}

/// Why the tree could not be mounted.
#[derive(Debug, thiserror::Error)]
pub enum MountError {
    /// The export template is no good.
    #[error("{0}")]
    Exports(String),
    /// The mount point cannot be one.
    #[error("mount point {path}: {why}")]
    Mountpoint {
        /// As given.
        path: PathBuf,
        /// What is wrong with it.
        why: String,
    },
    /// Another volfs serves it.
    #[error(
        "another volfs is mounted at {path}, alive or without an answer for {} s: stop it, or choose another mount point",
        LOOK_MOST.as_secs()
    )]
    Alive {
        /// The mount point.
        path: PathBuf,
    },
    /// Something else is mounted there.
    #[error(
        "a filesystem of type {fstype} ({source_name}) is mounted at {path}: unmount it, or choose another mount point"
    )]
    Occupied {
        /// The mount point.
        path: PathBuf,
        /// Its type.
        fstype: String,
        /// Its source.
        source_name: String,
    },
    /// A system call failed.
    #[error("{what}: {error}")]
    System {
        /// What was tried.
        what: String,
        /// The system's answer.
        error: io::Error,
    },
}

fn system(what: impl Into<String>) -> impl FnOnce(io::Error) -> MountError {
    let what = what.into();
    move |error| MountError::System { what, error }
}

/// How the session ended, once it has; `None` while it runs.
pub type Ended = watch::Receiver<Option<Arc<str>>>;

/// A mounted tree. [`Serving::stop`] ends it; dropped without, it stays mounted until the process ends.
pub struct Serving {
    inner: Arc<Inner>,
    mountpoint: PathBuf,
    device: String,
    ended: Ended,
    thread: JoinHandle<()>,
    finished: Mutex<mpsc::Receiver<()>>,
    request_timeout: Option<Duration>,
    fuse: File,
    given_up: Option<watch::Receiver<bool>>,
}

/// A mount that the daemon before has left alive.
pub struct Adopted {
    /// Its connection.
    pub fuse: File,
    /// The connection's facts.
    pub connection: Connection,
    /// What else is known of it.
    pub left: Left,
}

/// Whether that connection is still the one mounted there.
pub fn still_mounted(connection: &Connection) -> io::Result<bool> {
    still_ours(&connection.mountpoint, &connection.device)
}

/// Takes that mount away, if it is still the one there.
pub fn take_away(connection: &Connection) -> io::Result<()> {
    match still_ours(&connection.mountpoint, &connection.device)? {
        true => detach(&connection.mountpoint),
        false => Ok(()),
    }
}

/// What a mount of this version asks of the kernel for its life: flags of INIT, and mount options.
pub fn asked_of_the_kernel() -> (u64, &'static str) {
    (super::WANTED.iter().fold(0, |all, flag| all | flag.bits()), MOUNT_OPTIONS)
}

/// Mounts the tree, or adopts the mount of the daemon before, and serves it on a thread of its own.
/// With a memory, the next daemon can adopt it.
pub fn serve(
    core: Arc<dyn Core>,
    options: Options,
    memory: Option<Arc<Memory>>,
    adopted: Option<Adopted>,
) -> Result<Serving, MountError> {
    let exports = ExportNames::parse(&options.export_template).map_err(MountError::Exports)?;
    let path = match &adopted {
        Some(adopted) => adopted.connection.mountpoint.clone(),
        None => prepare(&options.mountpoint)?,
    };
    let request_timeout = request_timeout(Path::new("/proc/sys/fs/fuse"));
    if let Some(t) = request_timeout {
        tracing::warn!(
            "fs.fuse.*_request_timeout is {} s: the kernel would abort the mount under a request that waits longer, \
             so every wait ends before",
            t.as_secs()
        );
    }
    let longest = request_timeout.map(below);
    let waiters = Waiters::start(core.clone(), longest).map_err(system("cannot start the waiters' thread"))?;
    let before = Before {
        memory,
        serial: adopted.as_ref().map(|a| a.left.serial).filter(|serial| *serial > 0),
        resends: adopted.as_ref().map_or_else(resends, |a| a.connection.resends),
        requests: Mutex::default(),
        handled: AtomicU64::default(),
        lowest: AtomicU64::new(u64::MAX),
    };
    let inner = Arc::new(Inner::new(core, exports, options.gid, waiters, before));
    let parts = Parts { inner, path, request_timeout };
    match adopted {
        Some(adopted) => parts.adopt(adopted),
        None => parts.mount(),
    }
}

/// Whether the kernel sends again what was not answered: 6.9 and later.
fn resends() -> bool {
    if failpoint::hit("keep.no-resend") {
        return false;
    }
    let release = rustix::system::uname().release().to_string_lossy().into_owned();
    let mut numbers = release.split(|c: char| !c.is_ascii_digit()).map(|n| n.parse::<u32>().unwrap_or(0));
    (numbers.next(), numbers.next()) >= (Some(6), Some(9))
}

/// What a session is made of.
struct Parts {
    inner: Arc<Inner>,
    path: PathBuf,
    request_timeout: Option<Duration>,
}

impl Parts {
    fn mount(self) -> Result<Serving, MountError> {
        let fuse = File::options().read(true).write(true).open("/dev/fuse").map_err(system("cannot open /dev/fuse"))?;
        let own = fuse.try_clone().map_err(system("cannot keep /dev/fuse"))?;
        let path = self.path.clone();
        mount(&fuse, &path)?;
        let serving = device_of(&path).and_then(|device| {
            let offered = Arc::new(AtomicU64::new(0));
            let session = session(&self.inner, OwnedFd::from(fuse), &offered)?;
            if let Some(memory) = &self.inner.before.memory {
                let (asked, options) = asked_of_the_kernel();
                let facts = Connection {
                    mountpoint: path.clone(),
                    device: device.clone(),
                    offered: offered.load(Ordering::Relaxed),
                    asked,
                    options: options.into(),
                    resends: self.inner.before.resends,
                };
                memory.connected(&facts).map_err(system("cannot keep the connection's facts"))?;
            }
            self.serving(device, session, own)
        });
        if serving.is_err() {
            detach(&path).map_err(system("cannot unmount what was just mounted"))?;
        }
        let serving = serving?;
        tracing::info!("mounted at {} as device {}", path.display(), serving.device);
        Ok(serving)
    }

    /// Kernel fact 12: the handshake is played over a socket, whose number is the connection's then.
    fn adopt(self, adopted: Adopted) -> Result<Serving, MountError> {
        let Adopted { fuse, connection, left } = adopted;
        let (ours, theirs) = rustix::net::socketpair(
            rustix::net::AddressFamily::UNIX,
            rustix::net::SocketType::SEQPACKET,
            rustix::net::SocketFlags::CLOEXEC,
            None,
        )
        .map_err(|e| system("cannot make a socket for the handshake")(e.into()))?;
        rustix::io::write(&ours, &init_request(connection.offered))
            .map_err(|e| system("cannot play the handshake")(e.into()))?;
        let session = session(&self.inner, theirs, &Arc::default())?;
        let number = session.as_fd().as_raw_fd();
        // SAFETY: both numbers are open descriptors of ours; the session goes on with the same number,
        // which is the connection from here on, and closes it once.
        if unsafe { libc::dup3(fuse.as_raw_fd(), number, libc::O_CLOEXEC) } < 0 {
            return Err(system("cannot put the connection in place")(io::Error::last_os_error()));
        }
        drop(ours);
        let inner = self.inner.clone();
        for (fh, open) in &left.handles {
            let world = |node| inner.stream_of(node);
            if inner.handles.adopt(*fh, open, world).is_none() {
                tracing::warn!("handle {fh:#x} of the daemon before means nothing here");
            }
        }
        let requests = left.requests.len();
        let known = left.requests.iter().map(|(_, asked)| asked.unique).collect();
        let fuse = Arc::new(fuse);
        if connection.resends {
            let places = left.requests.into_iter().map(|(place, asked)| (asked.unique, (place, asked)));
            *inner.before.requests.lock() = places.collect();
            before::resend(&fuse).map_err(system("cannot have unanswered requests sent again"))?;
        } else {
            inner.answer_left(&fuse, left.requests, left.last);
        }
        for poll in left.handles.iter().filter_map(|(_, open)| open.poll) {
            // A poller that has gone is not there to be woken.
            if let Err(error) = before::wake(&fuse, poll) {
                tracing::debug!("a poller of the daemon before was not woken: {error}");
            }
        }
        tracing::info!(
            "the mount at {} is taken over, with {requests} requests that wait and {} open handles",
            connection.mountpoint.display(),
            left.handles.len()
        );
        let keep = || fuse.try_clone().map_err(system("cannot keep /dev/fuse"));
        let (own, watched) = (keep()?, keep()?);
        let mut serving = self.serving(connection.device, session, own)?;
        if !connection.resends {
            let watch = unanswered::Watch { fuse: watched, device: serving.device.clone(), last: left.last, known };
            serving.given_up = Some(watch.start(&inner).map_err(system("cannot start a thread"))?);
        }
        Ok(serving)
    }

    fn serving(self, device: String, session: Session<Fs>, fuse: File) -> Result<Serving, MountError> {
        let started = start(self.inner.clone(), session);
        let (ended, thread, finished) = started.map_err(system("cannot start a thread"))?;
        let Parts { inner, path: mountpoint, request_timeout } = self;
        let finished = Mutex::new(finished);
        Ok(Serving { inner, mountpoint, device, ended, thread, finished, request_timeout, fuse, given_up: None })
    }
}

fn session(inner: &Arc<Inner>, fd: OwnedFd, offered: &Arc<AtomicU64>) -> Result<Session<Fs>, MountError> {
    let mut config = Config::default();
    config.acl = SessionACL::All;
    let fs = Fs { inner: inner.clone(), offered: offered.clone() };
    Session::from_fd(fs, fd, SessionACL::All, config).map_err(system("the FUSE handshake failed"))
}

/// A FUSE_INIT request of protocol 7.40 with these flags, as the kernel would send it.
fn init_request(offered: u64) -> Vec<u8> {
    const LENGTH: u32 = 104;
    const FUSE_INIT: u32 = 26;
    let (low, high) = (offered & u64::from(u32::MAX), offered >> 32);
    let half = |n: u64| u32::try_from(n).unwrap_or(0);
    // Length, opcode, then unique 1 and node 0 as two halves each, uid, gid, pid, padding.
    let mut words = vec![LENGTH, FUSE_INIT, 1, 0, 0, 0, 0, 0, 0, 0];
    words.extend([7, 40, 128 * 1024, half(low), half(high)]);
    words.resize(LENGTH as usize / 4, 0);
    words.iter().flat_map(|word| word.to_le_bytes()).collect()
}

type Started = (Ended, JoinHandle<()>, mpsc::Receiver<()>);

fn start(inner: Arc<Inner>, session: Session<Fs>) -> io::Result<Started> {
    notify::start(&inner)?;
    let (tell, ended) = watch::channel(None);
    let (finish, finished) = mpsc::channel();
    let thread = std::thread::Builder::new().name("volfs-session".into()).spawn(move || {
        let how: Arc<str> = match session.run() {
            Ok(()) => "the filesystem was unmounted, or its connection aborted".into(),
            // Its callers wait for somebody who answers: the next daemon, if a keeper holds the mount.
            Err(e) if inner.before.memory.is_some() => {
                tracing::error!("the FUSE session failed: {e}; this daemon ends for another one");
                std::process::abort();
            }
            Err(e) => format!("the FUSE session failed: {e}").into(),
        };
        inner.waiters.shut_down();
        inner.bell.end();
        // Nobody listens any more when the daemon is stopping.
        let _ = tell.send(Some(how));
        let _ = finish.send(());
    })?;
    Ok((ended, thread, finished))
}

impl Serving {
    /// Where it is mounted.
    pub fn mountpoint(&self) -> &Path {
        &self.mountpoint
    }

    /// The mount's device number as mountinfo shows it, e.g. `0:52`; its minor number is the
    /// connection's in `/sys/fs/fuse/connections`.
    pub fn device(&self) -> &str {
        &self.device
    }

    /// The connection, for whoever keeps it beyond this process.
    pub fn fuse(&self) -> &File {
        &self.fuse
    }

    /// The administrator's limit on a request's age, if there is one.
    pub fn request_timeout(&self) -> Option<Duration> {
        self.request_timeout
    }

    /// How many requests wait now.
    pub fn waiting(&self) -> usize {
        self.inner.waiters.len()
    }

    /// Becomes `Some` when the session ends, by [`Serving::stop`] or behind our back (unmounted
    /// from outside, aborted): then the daemon has nothing to serve any more.
    pub fn ended(&self) -> Ended {
        self.ended.clone()
    }

    /// Resolves when requests of the daemon before are left that nobody would answer: this connection
    /// is to be aborted, and the tree mounted anew.
    pub fn given_up(&self) -> impl Future<Output = ()> + use<> {
        let watched = self.given_up.clone();
        async move {
            if let Some(mut watched) = watched
                && watched.wait_for(|given_up| *given_up).await.is_ok()
            {
                return;
            }
            std::future::pending().await
        }
    }

    /// Ends the connection at once: whatever waits in it gets an error. [`Serving::stop`] follows.
    pub fn abort(&self) -> io::Result<()> {
        unanswered::abort(&self.device)
    }

    /// Answers all that waits, unmounts lazily if the mount is still ours, and joins the session
    /// for at most 2 s: a shell that stands in the tree keeps it longer, and is left behind.
    pub fn stop(self) {
        self.inner.waiters.shut_down();
        match still_ours(&self.mountpoint, &self.device) {
            Ok(true) => {
                if let Err(e) = detach(&self.mountpoint) {
                    tracing::error!("cannot unmount {}: {e}", self.mountpoint.display());
                }
            }
            Ok(false) => tracing::warn!("{} is not our mount any more and is left alone", self.mountpoint.display()),
            Err(e) => tracing::error!("cannot tell whether {} is still ours: {e}", self.mountpoint.display()),
        }
        let waited = Instant::now();
        match self.finished.into_inner().recv_timeout(JOIN_MOST) {
            Ok(()) => {
                if self.thread.join().is_err() {
                    tracing::error!("the session's thread panicked");
                }
            }
            Err(_) => {
                tracing::warn!("the session has users after {:?} and is left to them", waited.elapsed());
            }
        }
        self.inner.bell.end();
    }
}

/// Looks at the mount point and clears dead predecessors away; answers its real path.
fn prepare(given: &Path) -> Result<PathBuf, MountError> {
    let bad = |why: String| MountError::Mountpoint { path: given.into(), why };
    let (Some(parent), Some(name), true) = (given.parent(), given.file_name(), given.is_absolute()) else {
        return Err(bad("must be an absolute path and not the root".into()));
    };
    // The parent's, because mountinfo shows real paths; the mount point itself may be dead.
    let parent = parent.canonicalize().map_err(|e| bad(format!("{}: {e}", parent.display())))?;
    let path = parent.join(name);
    for _ in 0..DEAD_MOST {
        let info = mountinfo().map_err(system("cannot read /proc/self/mountinfo"))?;
        let Some(top) = mounted_at(&info, &path) else {
            return directory(given, path);
        };
        let occupied =
            || MountError::Occupied { path: path.clone(), fstype: top.fstype.clone(), source_name: top.source.clone() };
        if top.fstype != FS_TYPE && top.fstype != "fuse" {
            return Err(occupied());
        }
        match look(&path) {
            Some(Err(e)) if e.raw_os_error() == Some(libc::ENOTCONN) => {
                tracing::warn!("{} carries a dead {} mount ({}): detached", path.display(), top.fstype, top.source);
                detach(&path).map_err(system(format!("cannot unmount the dead mount at {}", path.display())))?;
            }
            // Alive, or not answering: no matter of ours to end either.
            _ if top.fstype == FS_TYPE => return Err(MountError::Alive { path }),
            _ => return Err(occupied()),
        }
    }
    Err(bad(format!("more than {DEAD_MOST} dead mounts on top of one another")))
}

fn directory(given: &Path, path: PathBuf) -> Result<PathBuf, MountError> {
    let bad = |why: String| MountError::Mountpoint { path: given.into(), why };
    match std::fs::symlink_metadata(&path) {
        Ok(meta) if meta.is_dir() => Ok(path),
        Ok(_) => Err(bad("is not a directory".into())),
        // /run is empty after each boot.
        Err(e) if e.kind() == io::ErrorKind::NotFound => {
            std::fs::create_dir(&path).map_err(|e| bad(format!("cannot be made: {e}")))?;
            Ok(path)
        }
        Err(e) => Err(bad(e.to_string())),
    }
}

/// Stats a mount of somebody else's, who may not answer: `None` after a bound. The thread stays
/// with it until he does.
fn look(path: &Path) -> Option<io::Result<()>> {
    let (tell, told) = mpsc::channel();
    let path = path.to_owned();
    let looker = std::thread::Builder::new().name("volfs-look".into()).spawn(move || {
        // Nobody listens after the bound.
        let _ = tell.send(std::fs::symlink_metadata(path).map(|_| ()));
    });
    if let Err(e) = looker {
        return Some(Err(e));
    }
    told.recv_timeout(LOOK_MOST).ok()
}

fn mount(fuse: &File, path: &Path) -> Result<(), MountError> {
    let data = format!("fd={},{MOUNT_OPTIONS}", fuse.as_raw_fd());
    let data = std::ffi::CString::new(data).map_err(|e| system("the mount options")(e.into()))?;
    // Devices are allowed: `block` and `exports/` are the very disks.
    let flags = MountFlags::NOSUID | MountFlags::NOEXEC | MountFlags::NOATIME;
    rustix::mount::mount("volfs", path, FS_TYPE, flags, data.as_c_str())
        .map_err(|e| system(format!("cannot mount at {}", path.display()))(e.into()))
}

fn detach(path: &Path) -> io::Result<()> {
    Ok(rustix::mount::unmount(path, UnmountFlags::DETACH | UnmountFlags::NOFOLLOW)?)
}

/// One line of mountinfo, as far as it matters here.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Mounted {
    device: String,
    at: PathBuf,
    fstype: String,
    source: String,
}

fn mountinfo() -> io::Result<String> {
    std::fs::read("/proc/self/mountinfo").map(|bytes| String::from_utf8_lossy(&bytes).into_owned())
}

fn parse_mount(line: &str) -> Option<Mounted> {
    let (mount, fs) = line.split_once(" - ")?;
    let mut mount = mount.split(' ');
    let mut fs = fs.split(' ');
    Some(Mounted {
        device: mount.nth(2)?.to_owned(),
        at: unescape(mount.nth(1)?).into(),
        fstype: fs.next()?.to_owned(),
        source: unescape(fs.next()?),
    })
}

/// Blank, tab, newline and backslash stand as three octal digits there.
fn unescape(text: &str) -> String {
    [("\\040", " "), ("\\011", "\t"), ("\\012", "\n"), ("\\134", "\\")]
        .iter()
        .fold(text.to_owned(), |text, (escaped, plain)| text.replace(escaped, plain))
}

/// What is mounted exactly there; of several, the one that is seen: the last.
fn mounted_at(info: &str, path: &Path) -> Option<Mounted> {
    info.lines().filter_map(parse_mount).rfind(|m| m.at == path)
}

fn device_of(path: &Path) -> Result<String, MountError> {
    let info = mountinfo().map_err(system("cannot read /proc/self/mountinfo"))?;
    let ours = mounted_at(&info, path).filter(|m| m.fstype == FS_TYPE);
    ours.map(|m| m.device).ok_or_else(|| MountError::Mountpoint {
        path: path.into(),
        why: "mountinfo does not show what was just mounted".into(),
    })
}

fn still_ours(path: &Path, device: &str) -> io::Result<bool> {
    Ok(mounted_at(&mountinfo()?, path).is_some_and(|m| m.device == device && m.fstype == FS_TYPE))
}

/// The age at which the kernel aborts the connection under a request (kernel fact 5), from the
/// sysctls in `dir`.
fn request_timeout(dir: &Path) -> Option<Duration> {
    let read = |name: &str| -> Option<u64> {
        let text = std::fs::read_to_string(dir.join(name)).ok()?;
        text.trim().parse().ok().filter(|seconds| *seconds > 0)
    };
    let both = [read("default_request_timeout"), read("max_request_timeout")];
    both.into_iter().flatten().min().map(Duration::from_secs)
}

/// The longest wait beneath that: a tenth and at least a second less, as the kernel looks at whole
/// seconds.
fn below(timeout: Duration) -> Duration {
    let less = (timeout / 10).max(Duration::from_secs(1));
    timeout.saturating_sub(less).max(timeout / 2)
}

#[cfg(test)]
mod tests;
