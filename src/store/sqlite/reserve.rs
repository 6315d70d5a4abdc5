//! A file that only takes up space: given up when the disk is full, so that what ends or gives back
//! something can still be recorded (row E11 of the contract).

use std::fs::{self, OpenOptions};
use std::io;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use rustix::fs::{FallocateFlags, fallocate};

use crate::model::Verb;
use crate::store::Change;

/// Bytes kept: a few hundred small transactions in the WAL.
const BYTES: u64 = 2 << 20;
/// How often a reserve that was given up is tried to be taken again.
const AGAIN: Duration = Duration::from_secs(10);

/// The reserve of one record.
pub(super) struct Reserve {
    path: PathBuf,
    there: bool,
    tried: Instant,
}

impl Reserve {
    /// Takes the reserve beside the record `db`; a disk that is full already has none to give.
    pub fn take(db: &Path) -> Self {
        let mut path = db.as_os_str().to_owned();
        path.push(".reserve");
        let mut reserve = Reserve { path: path.into(), there: false, tried: Instant::now() };
        reserve.fill();
        reserve
    }

    fn fill(&mut self) {
        self.tried = Instant::now();
        let filled = OpenOptions::new()
            .create(true)
            .truncate(false)
            .write(true)
            .mode(0o600)
            .open(&self.path)
            .and_then(|file| fallocate(&file, FallocateFlags::empty(), 0, BYTES).map_err(io::Error::from));
        match filled {
            Ok(()) => self.there = true,
            Err(error) => tracing::warn!("no space in reserve for the record: {}: {error}", self.path.display()),
        }
    }

    /// Gives the space up; false when there was none.
    pub fn give_up(&mut self) -> bool {
        if !self.there {
            return false;
        }
        match fs::remove_file(&self.path) {
            Ok(()) => {
                tracing::warn!(
                    "the disk is full: the record's reserve is given up for what ends or gives back something"
                );
                self.there = false;
                self.tried = Instant::now();
                true
            }
            Err(error) => {
                tracing::error!("the record's reserve cannot be given up: {}: {error}", self.path.display());
                false
            }
        }
    }

    /// Takes it again when there is space, looking now and then.
    pub fn restore(&mut self) {
        if !self.there && self.tried.elapsed() > AGAIN {
            self.fill();
        }
    }
}

/// Whether a batch may use the reserve: it begins nothing but what gives something back.
pub(super) fn deserves(batch: &[Change]) -> bool {
    batch.iter().all(|change| match change {
        Change::OpBegin(op) => {
            matches!(op.verb, Verb::Detach | Verb::Release | Verb::Delete | Verb::Destroy | Verb::Rmdir)
        }
        _ => true,
    })
}
