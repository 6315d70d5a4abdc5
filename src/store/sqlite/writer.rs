//! The one thread that writes. What is queued while it commits shares its next transaction.

use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::mpsc::{Receiver, SyncSender};

use rusqlite::Connection;
use tokio::sync::oneshot;

use super::high_water::HighWater;
use super::reserve::{self, Reserve};
use super::{apply, load, schema};
use crate::failpoint;
use crate::store::{Change, Loaded, StoreError};

/// At most this many batches share a transaction: a bound for how long the first of them waits.
const GROUP: usize = 256;

/// What the thread is asked for.
pub(super) enum Request {
    Commit { batch: Vec<Change>, answer: oneshot::Sender<Result<(), StoreError>> },
    Load { history: usize, answer: SyncSender<Result<Loaded, StoreError>> },
}

/// The thread's own things.
pub(super) struct Writer {
    pub conn: Connection,
    pub path: PathBuf,
    pub reserve: Reserve,
    pub high: HighWater,
    /// Ended operations to keep.
    pub keep: usize,
    /// Transactions committed so far.
    pub transactions: Arc<AtomicU64>,
}

impl Writer {
    /// Serves until every sender is gone, then folds the WAL back and closes.
    pub(super) fn run(mut self, requests: &Receiver<Request>) {
        // Pruning is amortized: at most a tenth more than asked for is kept.
        let prune_after = (self.keep / 10).max(1);
        let mut ended = 0usize;
        while let Ok(first) = requests.recv() {
            let (mut batches, mut answers, mut loading) = (Vec::new(), Vec::new(), None);
            let mut next = Some(first);
            while let Some(request) = next {
                match request {
                    Request::Commit { batch, answer } => {
                        batches.push(batch);
                        answers.push(answer);
                    }
                    Request::Load { history, answer } => {
                        loading = Some((history, answer));
                        break;
                    }
                }
                next = if batches.len() < GROUP { requests.try_recv().ok() } else { None };
            }
            if !batches.is_empty() {
                let mut results = commit_group(&self.conn, &batches, &self.transactions);
                for (batch, result) in batches.iter().zip(&mut results) {
                    let full = matches!(result, Err(StoreError::Full { .. }));
                    // Once given up, the space serves the ones that deserve it until it is gone, too.
                    if full && reserve::deserves(batch) {
                        self.reserve.give_up();
                        let alone = commit_group(&self.conn, std::slice::from_ref(batch), &self.transactions);
                        *result = alone.into_iter().next().unwrap_or_else(|| result.clone());
                    }
                }
                if results.iter().all(Result::is_ok) {
                    self.reserve.restore();
                }
                for ((batch, answer), result) in batches.iter().zip(answers).zip(results) {
                    if result.is_ok() {
                        self.high.raise(highest(batch));
                        ended += batch.iter().filter(|c| ends(c)).count();
                    }
                    // A caller that went away has no use for the answer; the batch is durable all the same.
                    let _ = answer.send(result);
                }
            }
            if ended >= prune_after {
                ended = 0;
                match apply::prune(&self.conn, self.keep) {
                    Ok(pruned) => tracing::debug!(pruned, "old operations dropped from the record"),
                    Err(e) => tracing::warn!("old operations could not be dropped from the record: {e}"),
                }
            }
            if let Some((history, answer)) = loading {
                // As above.
                let _ = answer.send(load::load(&self.conn, &self.path, history));
            }
        }
        self.close();
    }

    fn close(self) {
        if let Err(e) = checkpoint(&self.conn) {
            tracing::warn!("the record's WAL stays for the next start: {e}");
        }
        if let Err((_, e)) = self.conn.close() {
            tracing::warn!("closing {}: {e}", self.path.display());
        }
    }
}

/// The highest number of an operation that these begin; 0 if there is none.
pub(super) fn highest(changes: &[Change]) -> i64 {
    let number = |change: &Change| match change {
        Change::OpBegin(op) => Some(op.id.0),
        _ => None,
    };
    changes.iter().filter_map(number).max().unwrap_or(0)
}

fn ends(change: &Change) -> bool {
    match change {
        Change::OpEnd { .. } => true,
        Change::OpBegin(op) => op.ended.is_some(),
        _ => false,
    }
}

/// Moves the WAL into the database file. A reader in the way is no error: the WAL is as durable.
pub(super) fn checkpoint(conn: &Connection) -> Result<(), StoreError> {
    conn.query_row("PRAGMA wal_checkpoint(TRUNCATE)", [], |_| Ok(())).map_err(schema::error)
}

/// Commits the batches in one transaction, each within its own savepoint, and answers each.
pub(super) fn commit_group(
    conn: &Connection,
    batches: &[Vec<Change>],
    transactions: &AtomicU64,
) -> Vec<Result<(), StoreError>> {
    match attempt(conn, batches, transactions) {
        Attempt::Answers(answers) => answers,
        Attempt::Vanished => batches
            .iter()
            .flat_map(|batch| match attempt(conn, std::slice::from_ref(batch), transactions) {
                Attempt::Answers(answers) => answers,
                Attempt::Vanished => vec![Err(StoreError::Failed { words: "SQLite ended the transaction".into() })],
            })
            .collect(),
    }
}

enum Attempt {
    /// One for each batch.
    Answers(Vec<Result<(), StoreError>>),
    /// Over one batch's failure SQLite rolled all of them back (it may on a full disk or an I/O
    /// error): nothing of the group is there, and the others deserve a transaction of their own.
    Vanished,
}

fn attempt(conn: &Connection, batches: &[Vec<Change>], transactions: &AtomicU64) -> Attempt {
    let everybody = |e: StoreError| Attempt::Answers(batches.iter().map(|_| Err(e.clone())).collect());
    let sql = |text: &str| conn.execute_batch(text);
    if let Err(e) = sql("BEGIN IMMEDIATE") {
        return everybody(schema::error(e));
    }
    let mut answers = Vec::with_capacity(batches.len());
    for batch in batches {
        let applied = sql("SAVEPOINT batch").map_err(schema::error).and_then(|()| one_batch(conn, batch));
        let vanished = conn.is_autocommit();
        let settled = match &applied {
            _ if vanished => Ok(()),
            Ok(()) => sql("RELEASE batch"),
            Err(_) => sql("ROLLBACK TO batch; RELEASE batch"),
        };
        match (vanished, settled) {
            (true, _) if batches.len() > 1 => return Attempt::Vanished,
            (true, _) => {
                let none = Err(StoreError::Failed { words: "SQLite ended the transaction".into() });
                return Attempt::Answers(vec![if applied.is_ok() { none } else { applied }]);
            }
            (false, Ok(())) => answers.push(applied),
            (false, Err(e)) => {
                roll_back(conn);
                return everybody(schema::error(e));
            }
        }
    }
    if answers.iter().all(Result::is_err) {
        roll_back(conn);
        return Attempt::Answers(answers);
    }
    let committed = if failpoint::hit("store.before-commit") {
        Err(StoreError::Failed { words: "failpoint store.before-commit".into() })
    } else {
        sql("COMMIT").map_err(schema::error)
    };
    match committed {
        Ok(()) => {
            transactions.fetch_add(1, Ordering::Relaxed);
            // `fail` has no meaning here: the batch is durable.
            let _ = failpoint::hit("store.after-commit");
        }
        Err(e) => {
            roll_back(conn);
            bury(conn);
            for answer in answers.iter_mut().filter(|a| a.is_ok()) {
                *answer = Err(e.clone());
            }
        }
    }
    Attempt::Answers(answers)
}

fn one_batch(conn: &Connection, batch: &[Change]) -> Result<(), StoreError> {
    if failpoint::hit("store.fail") {
        return Err(StoreError::Full { words: "failpoint store.fail".into() });
    }
    batch.iter().try_for_each(|change| apply::apply(conn, change))
}

fn roll_back(conn: &Connection) {
    if !conn.is_autocommit()
        && let Err(e) = conn.execute_batch("ROLLBACK")
    {
        tracing::error!("rolling back in the record: {e}");
    }
}

/// A commit whose fsync failed has left whole frames in the WAL, which recovery after a crash would
/// take for committed although every caller was told otherwise. Any later commit overwrites them, so
/// one is made now; while that fails too, it has still taken their place in the file. The value is a
/// new one each time: SQLite writes no page for an update that changes nothing.
fn bury(conn: &Connection) {
    let sql = "INSERT INTO meta (key, value) VALUES ('buried', hex(randomblob(8)))
        ON CONFLICT (key) DO UPDATE SET value = excluded.value";
    if let Err(e) = conn.execute_batch(sql) {
        tracing::error!("the record's disk still fails: {e}");
    }
}
