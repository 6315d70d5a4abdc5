//! Who holds what must outlive this daemon, the mount and the memory of its callers: the keeper, the
//! service manager's descriptor store, or nobody.

use std::fs::File;
use std::os::fd::{AsFd, FromRawFd, OwnedFd, RawFd};
use std::sync::Arc;

use sd_notify::NotifyState;

use crate::config::Problem;
use crate::fs::{self, Adopted};
use crate::keeper::{Held, Line};
use crate::kept::Memory;

/// Names in the service manager's store.
const STORED_FUSE: &str = "volfs-fuse";
const STORED_MEMORY: &str = "volfs-memory";

/// Who holds it.
pub enum Handover {
    /// When the daemon dies its mount ends.
    Nobody,
    /// `volfs mount`'s own keeper.
    Keeper(Line),
    /// systemd, or what speaks its protocol.
    Manager,
}

impl Handover {
    /// From the keeper that started us: it must have said `--kept`.
    pub fn from_keeper() -> Result<(Self, Option<Held>), Problem> {
        let (line, held) = Line::take()?;
        Ok((Handover::Keeper(line), held))
    }

    /// From the service manager, if one started us and keeps descriptors.
    pub fn from_manager() -> Result<(Self, Option<Held>), Problem> {
        if std::env::var_os("NOTIFY_SOCKET").is_none() {
            return Ok((Handover::Nobody, None));
        }
        let given = sd_notify::listen_fds_with_names()
            .map_err(|e| Problem::with("the service manager's descriptors cannot be taken", e))?;
        let (mut fuse, mut memory) = (None, None);
        for (fd, name) in given {
            match name.as_str() {
                STORED_FUSE => fuse = Some(owned(fd)),
                STORED_MEMORY => memory = Some(owned(fd)),
                _ => drop(owned(fd)),
            }
        }
        Ok((Handover::Manager, fuse.zip(memory).map(|(fuse, memory)| Held { fuse, memory })))
    }

    /// What the daemon before has left, if it can be adopted, and a memory for the next one.
    pub fn open(&self, held: Option<Held>) -> Result<(Option<Arc<Memory>>, Option<Adopted>), Problem> {
        let fresh = || {
            let memory = Memory::create().map_err(|e| Problem::with("no memory for the next daemon", e))?;
            Ok((Some(Arc::new(memory)), None))
        };
        let Some(held) = held else {
            return if matches!(self, Handover::Nobody) { Ok((None, None)) } else { fresh() };
        };
        let why = match Memory::open(File::from(held.memory)) {
            Ok((memory, mut left)) => match left.connection.take() {
                // What cannot be told is no reason to let a live mount go: the keeper tries again.
                Some(connection)
                    if fs::still_mounted(&connection).map_err(|e| {
                        Problem::with("cannot tell whether the mount of the daemon before is there", e)
                    })? =>
                {
                    let adopted = Adopted { fuse: File::from(held.fuse), connection, left };
                    return Ok((Some(Arc::new(memory)), Some(adopted)));
                }
                Some(connection) => format!("nothing of it is mounted at {} any more", connection.mountpoint.display()),
                None => "it was never mounted".to_owned(),
            },
            Err(error) => error.to_string(),
        };
        tracing::error!("the mount of the daemon before cannot be taken over, its callers get ENOTCONN: {why}");
        drop(held.fuse);
        self.forget()?;
        fresh()
    }

    /// What is held is of no use to anybody: the next daemon mounts anew.
    pub fn forget(&self) -> Result<(), Problem> {
        match self {
            Handover::Nobody => Ok(()),
            Handover::Keeper(line) => line.forget(),
            Handover::Manager => unstore(),
        }
    }

    /// The tree is mounted and answers.
    pub fn serving(&self, fuse: &File, memory: Option<&Arc<Memory>>, adopted: bool) -> Result<(), Problem> {
        let Some(memory) = memory else { return Ok(()) };
        match self {
            Handover::Nobody => Ok(()),
            Handover::Keeper(line) => {
                if !adopted {
                    line.hold(fuse, memory)?;
                }
                memory.serving(line.keeper());
                line.ready()
            }
            Handover::Manager => {
                let bad = |e| Problem::with("the service manager does not take the mount", e);
                if !adopted {
                    let store = |name| [NotifyState::FdStore, NotifyState::FdName(name)];
                    sd_notify::notify_with_fds(&store(STORED_FUSE), &[fuse.as_fd()]).map_err(bad)?;
                    sd_notify::notify_with_fds(&store(STORED_MEMORY), &[memory.fd()]).map_err(bad)?;
                }
                memory.serving(0);
                sd_notify::notify(&[NotifyState::Ready]).map_err(bad)
            }
        }
    }

    /// This daemon ends for good, and its mount with it.
    pub fn stopping(&self) {
        if let Handover::Manager = self
            && let Err(problem) = unstore()
        {
            tracing::error!("{problem}");
        }
    }

    /// Why it does not start, for whoever started it.
    pub fn problem(&self, problem: &Problem) {
        if let Handover::Keeper(line) = self {
            line.problem(problem);
        }
    }

    /// Resolves when nobody would follow this daemon any more.
    pub async fn ended(&self) {
        match self {
            Handover::Keeper(line) => line.ended().await,
            Handover::Nobody | Handover::Manager => std::future::pending().await,
        }
    }
}

fn owned(fd: RawFd) -> OwnedFd {
    // SAFETY: the service manager gave this number to this process for its own (LISTEN_PID), and it is
    // taken once, at the start.
    unsafe { OwnedFd::from_raw_fd(fd) }
}

fn unstore() -> Result<(), Problem> {
    for name in [STORED_FUSE, STORED_MEMORY] {
        sd_notify::notify(&[NotifyState::FdStoreRemove, NotifyState::FdName(name)])
            .map_err(|e| Problem::with("the service manager does not hear", e))?;
    }
    Ok(())
}
