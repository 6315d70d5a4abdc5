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
use rusqlite::Connection;
use rusqlite_migration::M;
use tokio::sync::oneshot;

use super::{Change, Loaded, Store, StoreError};
use opening::StateLock;
use writer::{Request, Writer};

mod apply;
mod load;
mod opening;
mod reserve;
mod schema;
mod writer;

#[cfg(test)]
mod tests;

/// How many ended operations a record keeps unless told otherwise.
pub const KEEP_OPERATIONS: usize = 100_000;

/// The record in SQLite. Dropping it waits for what is queued, folds the WAL into the database,
/// closes it and gives up the lock.
#[derive(Debug)]
pub struct SqliteStore {
    path: PathBuf,
    side: Side,
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
        let (version, latest) = (opening::check(&path, migrations)?, schema::latest(migrations));
        let mut conn = opening::connect(&path)?;
        if version < latest {
            schema::migrate(&mut conn, migrations, latest)?;
            // Now, so that an older volfs sees the new number in the file and leaves it alone.
            writer::checkpoint(&conn)?;
            tracing::info!("{}: brought from schema {version} to {latest}", path.display());
        }
        apply::prune(&conn, keep)?;
        let transactions = Arc::new(AtomicU64::new(0));
        let reserve = reserve::Reserve::take(&path);
        let writer = Writer { conn, path: path.clone(), reserve, keep, transactions: transactions.clone() };
        let (requests, receiver) = mpsc::channel();
        let thread = std::thread::Builder::new()
            .name("volfs-store".into())
            .spawn(move || writer.run(&receiver))
            .map_err(|e| StoreError::Failed { words: format!("starting the record's thread: {e}") })?;
        let side = Side::Writing { requests: Some(requests), thread: Some(thread), transactions, _lock: lock };
        Ok(Self { path, side })
    }

    /// Opens an existing record for reading, beside a running daemon or without one: no lock is
    /// taken, nothing is written or brought forward, and each commit is refused.
    ///
    /// Errors: [`StoreError::Unusable`] if there is no record of this version.
    pub fn open_read_only(state_dir: &Path) -> Result<Self, StoreError> {
        check_library()?;
        let conn = opening::connect_read_only(state_dir, schema::MIGRATIONS)?;
        Ok(Self { path: opening::database(state_dir), side: Side::Reading(Mutex::new(conn)) })
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
