//! The record in SQLite: `volfs.db` in the state directory, one writing thread, one lock file.
//!
//! The schema is in `v1.sql` and described in `contrib/schema.md`. Beside the database lie SQLite's
//! own `-wal` and `-shm`; root may read all of it with `sqlite3` while the daemon runs. Nothing else
//! in this process may open the database file: SQLite's locks are POSIX locks, and closing any
//! descriptor of the file drops them all.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::mpsc::{self, Sender};
use std::thread::JoinHandle;

use async_trait::async_trait;
use parking_lot::Mutex;
use rusqlite::{Connection, OptionalExtension};
use rusqlite_migration::M;
use tokio::sync::oneshot;

use super::{Change, Loaded, Store, StoreError};
use crate::model::VmId;
use high_water::HighWater;
use opening::StateLock;
use writer::{Request, Writer};

mod apply;
mod high_water;
mod load;
mod offline;
mod opening;
mod reserve;
mod schema;
mod writer;

#[cfg(test)]
mod tests;

pub use offline::{Offline, Restored, backup, restore};

/// How many ended operations a record keeps unless told otherwise.
pub const KEEP_OPERATIONS: usize = 100_000;

/// The record in SQLite. Dropping it waits for what is queued, folds the WAL into the database,
/// closes it and gives up the lock.
#[derive(Debug)]
pub struct SqliteStore {
    path: PathBuf,
    past: Past,
    side: Side,
}

/// What a record tells of its own past, and the directory it is in of that of its records.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Past {
    /// The highest operation number that this record has given.
    pub highest: i64,
    /// The highest that a record in this directory ever committed; 0 if nobody knows.
    pub mark: i64,
    /// On which host its last operation began, if it ever had one.
    pub last_host: Option<VmId>,
}

impl Past {
    fn of(conn: &Connection, mark: i64) -> Result<Self, StoreError> {
        let sql = "SELECT host_id FROM volume_operations ORDER BY id DESC LIMIT 1";
        let host: Option<String> = conn.query_row(sql, [], |r| r.get(0)).optional().map_err(schema::error)?;
        let last_host = host.and_then(|text| VmId::parse(&text).ok());
        let highest = load::next(conn, "volume_operations").map_err(schema::error)? - 1;
        Ok(Self { highest, mark, last_host })
    }

    /// Whether a record in this directory was once further than this one: it is an older copy.
    pub fn is_behind(&self) -> bool {
        self.highest < self.mark
    }
}

#[derive(Debug)]
enum Side {
    Writing {
        // Options, so that `drop` can end the thread before the lock below goes.
        requests: Option<Sender<Request>>,
        thread: Option<JoinHandle<()>>,
        transactions: Arc<AtomicU64>,
        _lock: StateLock,
    },
    Reading(Mutex<Connection>),
}

impl SqliteStore {
    /// Opens the record below `state_dir`, made if it is missing, keeping [`KEEP_OPERATIONS`].
    ///
    /// Errors: [`StoreError::Locked`] if another process has it; [`StoreError::Unusable`] if the
    /// directory is not ours or the database is foreign, newer, damaged or read-only (it is then as
    /// it was before); [`StoreError::Full`] and [`StoreError::Failed`] as the system says.
    pub fn open(state_dir: &Path) -> Result<Self, StoreError> {
        Self::open_keeping(state_dir, KEEP_OPERATIONS)
    }

    /// As [`SqliteStore::open`], keeping at least `keep_operations` ended operations (and at most a
    /// tenth more); older ones are dropped, unfinished ones never.
    pub fn open_keeping(state_dir: &Path, keep_operations: usize) -> Result<Self, StoreError> {
        Self::open_with(state_dir, keep_operations, schema::MIGRATIONS)
    }

    fn open_with(dir: &Path, keep: usize, migrations: &'static [M<'static>]) -> Result<Self, StoreError> {
        check_library()?;
        opening::state_directory(dir)?;
        let lock = StateLock::take(dir)?;
        opening::create_if_absent(dir, migrations)?;
        let path = opening::database(dir);
        let conn = opening::ready(&path, migrations)?;
        let high = HighWater::open(dir);
        let past = Past::of(&conn, high.mark())?;
        apply::prune(&conn, keep)?;
        let transactions = Arc::new(AtomicU64::new(0));
        let reserve = reserve::Reserve::take(&path);
        let writer = Writer { conn, path: path.clone(), reserve, high, keep, transactions: transactions.clone() };
        let (requests, receiver) = mpsc::channel();
        let thread = std::thread::Builder::new()
            .name("volfs-store".into())
            .spawn(move || writer.run(&receiver))
            .map_err(|e| StoreError::Failed { words: format!("starting the record's thread: {e}") })?;
        let side = Side::Writing { requests: Some(requests), thread: Some(thread), transactions, _lock: lock };
        Ok(Self { path, past, side })
    }

    /// Opens an existing record for reading, beside a running daemon or without one: no lock is
    /// taken, nothing is written or brought forward, and each commit is refused.
    ///
    /// Errors: [`StoreError::Unusable`] if there is no record of this version.
    pub fn open_read_only(state_dir: &Path) -> Result<Self, StoreError> {
        check_library()?;
        let conn = opening::connect_read_only(state_dir, schema::MIGRATIONS)?;
        let past = Past::of(&conn, high_water::look(state_dir))?;
        Ok(Self { path: opening::database(state_dir), past, side: Side::Reading(Mutex::new(conn)) })
    }

    /// What was known of the record's past when it was opened.
    pub fn past(&self) -> &Past {
        &self.past
    }

    /// The database file.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Transactions committed since opening; fewer than commits when callers shared one.
    pub fn transactions(&self) -> u64 {
        match &self.side {
            Side::Writing { transactions, .. } => transactions.load(Ordering::Relaxed),
            Side::Reading(_) => 0,
        }
    }

    fn send(&self, request: Request) -> Result<(), StoreError> {
        match &self.side {
            Side::Reading(_) => Err(StoreError::Failed { words: "opened read-only".into() }),
            Side::Writing { requests, .. } => match requests {
                Some(requests) => requests.send(request).map_err(|_| writer_ended()),
                None => Err(writer_ended()),
            },
        }
    }
}

fn writer_ended() -> StoreError {
    StoreError::Failed { words: "the record's thread has ended".into() }
}

fn check_library() -> Result<(), StoreError> {
    if rusqlite::version_number() >= schema::OLDEST_SQLITE {
        return Ok(());
    }
    let words = format!("SQLite {} can lose a committed transaction: 3.51.3 or later is needed", rusqlite::version());
    Err(StoreError::Failed { words })
}

#[async_trait]
impl Store for SqliteStore {
    /// The batch is queued at the first poll, and carried out even if the future is then dropped.
    async fn commit(&self, batch: Vec<Change>) -> Result<(), StoreError> {
        let (answer, answered) = oneshot::channel();
        self.send(Request::Commit { batch, answer })?;
        answered.await.unwrap_or_else(|_| Err(writer_ended()))
    }

    fn load(&self, history: usize) -> Result<Loaded, StoreError> {
        if let Side::Reading(conn) = &self.side {
            return load::load(&conn.lock(), &self.path, history);
        }
        let (answer, answered) = mpsc::sync_channel(1);
        self.send(Request::Load { history, answer })?;
        answered.recv().unwrap_or_else(|_| Err(writer_ended()))
    }
}

impl Drop for SqliteStore {
    fn drop(&mut self) {
        if let Side::Writing { requests, thread, .. } = &mut self.side {
            requests.take();
            if let Some(Err(_)) = thread.take().map(JoinHandle::join) {
                tracing::error!("the record's thread panicked");
            }
        }
    }
}
