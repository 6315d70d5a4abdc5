//! What is done to a record while no daemon has it, and the copy that is taken while one has.
//!
//! All of it is one transaction on one connection under the state directory's lock, so a crash
//! leaves the record as it was, or as it was meant to become.

use std::fs::{self, File, OpenOptions, Permissions};
use std::io;
use std::os::unix::fs::{OpenOptionsExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::time::SystemTime;

use rusqlite::Connection;
use rusqlite::backup::{Backup, StepResult};
use rustix::fs::{CWD, RenameFlags, renameat_with};
use rustix::io::Errno;

use super::high_water::{self, HighWater};
use super::opening::{self, StateLock, beside, failed, sync_directory, unusable};
use super::{Past, apply, check_library, load, schema, writer};
use crate::model::{RecordId, Timestamp};
use crate::store::{Change, Loaded, StoreError};

/// A record that nobody else has.
#[derive(Debug)]
pub struct Offline {
    conn: Connection,
    path: PathBuf,
    high: HighWater,
    _lock: StateLock,
}

impl Offline {
    /// Takes the record below `state_dir`; with `make` one is made where there is none.
    ///
    /// Errors: as [`super::SqliteStore::open`], and [`StoreError::Unusable`] if there is no record.
    pub fn open(state_dir: &Path, make: bool) -> Result<Self, StoreError> {
        check_library()?;
        let path = opening::database(state_dir);
        if !make && fs::symlink_metadata(&path).is_err_and(|e| e.kind() == io::ErrorKind::NotFound) {
            return Err(unusable(&path, "there is no such file: restore a backup, or `volfs rebuild`"));
        }
        opening::state_directory(state_dir)?;
        let lock = StateLock::take(state_dir)?;
        opening::create_if_absent(state_dir, schema::MIGRATIONS)?;
        let conn = opening::ready(&path, schema::MIGRATIONS)?;
        Ok(Self { conn, path, high: HighWater::open(state_dir), _lock: lock })
    }

    /// Reads everything but what has ended.
    pub fn load(&self) -> Result<Loaded, StoreError> {
        load::load(&self.conn, &self.path, 0)
    }

    /// Whether there is a database below `state_dir`, sound or not.
    pub fn is_there(state_dir: &Path) -> bool {
        !fs::symlink_metadata(opening::database(state_dir)).is_err_and(|e| e.kind() == io::ErrorKind::NotFound)
    }

    /// What the record tells of its own past.
    pub fn own_past(&self) -> Result<Past, StoreError> {
        Past::of(&self.conn, self.high.mark())
    }

    /// The highest operation number that a record in this directory ever had: that of the next
    /// operation must be above it.
    pub fn past(&self) -> i64 {
        self.high.mark()
    }

    /// Makes the changes, and the record another one if `identity` is given, as a whole or not at all.
    pub fn commit(&mut self, changes: &[Change], identity: Option<RecordId>) -> Result<(), StoreError> {
        let tx = self.conn.transaction().map_err(schema::error)?;
        changes.iter().try_for_each(|change| apply::apply(&tx, change))?;
        if let Some(record) = identity {
            tx.execute("UPDATE meta SET value = ?1 WHERE key = 'record'", [record.to_string()])
                .map_err(schema::error)?;
        }
        tx.commit().map_err(schema::error)?;
        self.high.raise(writer::highest(changes));
        Ok(())
    }
}

impl Drop for Offline {
    fn drop(&mut self) {
        // Whoever copies the file now has all of it.
        if let Err(e) = writer::checkpoint(&self.conn) {
            tracing::warn!("the record's WAL stays for the next start: {e}");
        }
    }
}

/// Writes the record as it is at this moment into the new file `to`, beside a running daemon or
/// without one. The file appears complete, private and durable, or not at all.
///
/// Errors: [`StoreError::Unusable`] if there is no sound record, or `to` is there already.
pub fn backup(state_dir: &Path, to: &Path) -> Result<(), StoreError> {
    check_library()?;
    let taken = || unusable(to, "it is there already: name a new file");
    if fs::symlink_metadata(to).is_ok() {
        return Err(taken());
    }
    let conn = opening::connect_read_only(state_dir, schema::MIGRATIONS)?;
    let part = Partial::make(beside(to, &format!(".part-{}", std::process::id())))?;
    copy_all(&conn, &part.0)?;
    drop(conn);
    // Read back, so that a backup that cannot be restored is noticed today.
    sound(&part.0)?;
    File::open(&part.0).and_then(|f| f.sync_all()).map_err(|e| failed(&part.0, "syncing", &e))?;
    // Never over a file that came meanwhile.
    match renameat_with(CWD, &part.0, CWD, to, RenameFlags::NOREPLACE) {
        Ok(()) => {}
        Err(Errno::EXIST) => return Err(taken()),
        Err(e) => return Err(failed(to, "naming", &e.into())),
    }
    sync_directory(directory_of(to))
}

/// In one step, which is a snapshot of one moment; in several, a busy writer would start it again
/// and again. A writer is not kept waiting: the record is in WAL mode.
fn copy_all(conn: &Connection, to: &Path) -> Result<(), StoreError> {
    let mut copy = Connection::open(to).map_err(schema::error)?;
    let answer = Backup::new(conn, &mut copy).and_then(|backup| backup.step(-1)).map_err(schema::error)?;
    match answer {
        StepResult::Done => copy.close().map_err(|(_, e)| schema::error(e)),
        other => Err(StoreError::Failed { words: format!("copying the record ended with {other:?}") }),
    }
}

/// What [`restore`] did.
#[derive(Debug)]
pub struct Restored {
    /// Where the record that was there is now, if there was one.
    pub aside: Option<PathBuf>,
    /// What was restored.
    pub loaded: Loaded,
}

/// Puts the record of the file `from` in place of the one below `state_dir`, which is kept aside.
/// What is restored is behind the directory's high-water mark from then on, so that no daemon acts
/// by it until somebody has said what it is.
///
/// Errors: [`StoreError::Unusable`] if `from` is no sound record, or belongs to a newer volfs;
/// [`StoreError::Locked`] if a daemon runs. Nothing was changed then.
pub fn restore(state_dir: &Path, from: &Path) -> Result<Restored, StoreError> {
    check_library()?;
    opening::state_directory(state_dir)?;
    let _lock = StateLock::take(state_dir)?;
    for suffix in ["-wal", "-journal"] {
        if fs::metadata(beside(from, suffix)).is_ok_and(|m| m.len() > 0) {
            let words =
                format!("{suffix} lies beside it, so it is not whole by itself: take one that `volfs backup` made");
            return Err(unusable(from, words));
        }
    }
    let db = opening::database(state_dir);
    // The copy is checked, and is what is put in place: whatever happens to `from` meanwhile.
    let part = beside(&db, ".restoring");
    match fs::remove_file(&part) {
        Ok(()) => {}
        Err(e) if e.kind() == io::ErrorKind::NotFound => {}
        Err(e) => return Err(failed(&part, "removing", &e)),
    }
    let part = Partial::make(part)?;
    fs::copy(from, &part.0).map_err(|e| failed(from, "copying", &e))?;
    fs::set_permissions(&part.0, Permissions::from_mode(0o600)).map_err(|e| failed(&part.0, "making private", &e))?;
    let loaded = sound(&part.0).map_err(|e| match e {
        StoreError::Unusable { words, .. } => unusable(from, words),
        other => other,
    })?;
    File::open(&part.0).and_then(|f| f.sync_all()).map_err(|e| failed(&part.0, "syncing", &e))?;
    let mut high = HighWater::open(state_dir);
    high.raise(high.mark().max(loaded.next.operation - 1) + 1);
    let synced = high.sync().map_err(|e| failed(&state_dir.join(high_water::FILE), "syncing", &e));
    if high.mark() < loaded.next.operation {
        return Err(StoreError::Failed {
            words: format!("{} cannot be written", state_dir.join(high_water::FILE).display()),
        });
    }
    synced?;
    let aside = set_aside(&db)?;
    fs::rename(&part.0, &db).map_err(|e| failed(&db, "naming", &e))?;
    sync_directory(state_dir)?;
    Ok(Restored { aside, loaded })
}

/// Moves a database away with what lies beside it, under names by which SQLite knows them together.
fn set_aside(db: &Path) -> Result<Option<PathBuf>, StoreError> {
    if fs::symlink_metadata(db).is_err_and(|e| e.kind() == io::ErrorKind::NotFound) {
        return Ok(None);
    }
    let now = Timestamp::from(SystemTime::now()).to_string().replace(':', "");
    let free = |n: &u32| match n {
        0 => beside(db, &format!(".before-{now}")),
        n => beside(db, &format!(".before-{now}-{n}")),
    };
    let taken = |path: &PathBuf| fs::symlink_metadata(path).is_ok();
    let aside = (0..).map(|n| free(&n)).find(|path| !taken(path)).unwrap_or_else(|| free(&0));
    // The database first: its WAL alone is refused at a start, a database without its WAL is not.
    for suffix in ["", "-wal", "-journal", "-shm"] {
        match fs::rename(beside(db, suffix), beside(&aside, suffix)) {
            Ok(()) => {}
            Err(e) if e.kind() == io::ErrorKind::NotFound && !suffix.is_empty() => {}
            Err(e) => return Err(failed(&beside(db, suffix), "moving aside", &e)),
        }
    }
    Ok(Some(aside))
}

/// Reads a whole record that is one file and nobody's: sound, ours, and of a version we know.
fn sound(file: &Path) -> Result<Loaded, StoreError> {
    let version = opening::check(file, schema::MIGRATIONS)?;
    if version < schema::latest(schema::MIGRATIONS) {
        // An older one is brought forward at the start after it is restored; reading it needs that, too.
        drop(opening::ready(file, schema::MIGRATIONS)?);
    }
    let conn = opening::immutable(file).map_err(|e| opening::damaged(file, &e))?;
    load::load(&conn, file, usize::MAX)
}

/// A file being made; gone when dropped, unless it has got its name.
struct Partial(PathBuf);

impl Partial {
    fn make(path: PathBuf) -> Result<Self, StoreError> {
        let made = OpenOptions::new().write(true).create_new(true).mode(0o600).open(&path);
        made.map_err(|e| failed(&path, "creating", &e))?;
        Ok(Self(path))
    }
}

impl Drop for Partial {
    fn drop(&mut self) {
        for suffix in ["", "-journal", "-wal", "-shm"] {
            // What is not there need not go.
            let _ = fs::remove_file(beside(&self.0, suffix));
        }
    }
}

fn directory_of(path: &Path) -> &Path {
    path.parent().filter(|dir| !dir.as_os_str().is_empty()).unwrap_or(Path::new("."))
}
