//! From a directory to a connection: whose directory, whose lock, whose database, and is it whole.
//!
//! Everything that can refuse comes before anything that writes, so that a refused file is left as
//! it was found.

use std::fs::{self, DirBuilder, File, OpenOptions, Permissions};
use std::io::{self, Read, Write};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime};

use rusqlite::{Connection, OpenFlags};
use rusqlite_migration::M;
use rustix::fs::{FlockOperation, flock};

use super::schema::{self, APPLICATION_ID};
use super::{high_water, writer};
use crate::model::{RecordId, Timestamp};
use crate::store::StoreError;

/// Below the 1 s that a mkdir may wait (contract, R6): an operator's open transaction in `sqlite3`
/// makes a commit fail, not hang.
const BUSY: Duration = Duration::from_millis(900);

/// A WAL that a long reader let grow is cut back to this at the next checkpoint. Bytes.
const WAL_KEPT: i64 = 16 << 20;

pub(super) fn unusable(path: &Path, words: impl Into<String>) -> StoreError {
    StoreError::Unusable { path: path.display().to_string(), words: words.into() }
}

pub(super) fn failed(path: &Path, what: &str, e: &io::Error) -> StoreError {
    StoreError::Failed { words: format!("{what} {}: {e}", path.display()) }
}

pub(super) fn database(dir: &Path) -> PathBuf {
    dir.join("volfs.db")
}

/// `path` with `suffix` appended to its file name.
pub(super) fn beside(path: &Path, suffix: &str) -> PathBuf {
    let mut name = path.as_os_str().to_owned();
    name.push(suffix);
    PathBuf::from(name)
}

pub(super) fn sync_directory(dir: &Path) -> Result<(), StoreError> {
    File::open(dir).and_then(|d| d.sync_all()).map_err(|e| failed(dir, "syncing", &e))
}

/// Makes the state directory, or refuses one that is not ours.
pub(super) fn state_directory(dir: &Path) -> Result<(), StoreError> {
    let meta = match fs::metadata(dir) {
        Ok(meta) => meta,
        Err(e) if e.kind() == io::ErrorKind::NotFound => {
            DirBuilder::new().recursive(true).mode(0o700).create(dir).map_err(|e| failed(dir, "creating", &e))?;
            // Without this a power cut could take the directory with the committed record in it.
            return match dir.parent() {
                Some(parent) if !parent.as_os_str().is_empty() => sync_directory(parent),
                _ => sync_directory(Path::new(".")),
            };
        }
        Err(e) => return Err(failed(dir, "looking at", &e)),
    };
    if !meta.is_dir() {
        return Err(unusable(dir, "it is not a directory"));
    }
    let mode = meta.permissions().mode() & 0o7777;
    if mode & 0o022 != 0 {
        return Err(unusable(dir, format!("others can write to it (mode {mode:04o}): chmod it to 0700")));
    }
    let mut foreign = None;
    for entry in fs::read_dir(dir).map_err(|e| failed(dir, "listing", &e))? {
        let name = entry.map_err(|e| failed(dir, "listing", &e))?.file_name();
        let bytes = name.as_bytes();
        const OURS: [&[u8]; 5] = [b"lock", b"loop", b"trash", b"provider", high_water::FILE.as_bytes()];
        if bytes.starts_with(b"volfs.db") || OURS.contains(&bytes) {
            return Ok(());
        }
        // A filesystem made for the state alone has this one.
        if bytes != b"lost+found" {
            foreign.get_or_insert(name);
        }
    }
    match foreign {
        None => Ok(()),
        Some(name) => Err(unusable(
            dir,
            format!(
                "it is not empty ({}) and holds nothing of volfs: give volfs a directory of its own",
                name.display()
            ),
        )),
    }
}

/// The lock that keeps a second daemon away; released when dropped.
#[derive(Debug)]
pub(super) struct StateLock(pub(super) File);

impl StateLock {
    pub(super) fn take(dir: &Path) -> Result<Self, StoreError> {
        let path = dir.join("lock");
        let mut file = OpenOptions::new()
            .read(true)
            .write(true)
            .create(true)
            .truncate(false)
            .mode(0o600)
            .open(&path)
            .map_err(|e| failed(&path, "opening", &e))?;
        match flock(&file, FlockOperation::NonBlockingLockExclusive) {
            Ok(()) => {}
            Err(rustix::io::Errno::WOULDBLOCK) => {
                let mut holder = String::new();
                // The words only help a person; a holder that cannot be read is still a holder.
                let read = (&file).take(256).read_to_string(&mut holder);
                let holder = holder.trim();
                let holder = if read.is_err() || holder.is_empty() { "another process" } else { holder };
                return Err(StoreError::Locked { path: path.display().to_string(), holder: holder.into() });
            }
            Err(e) => return Err(failed(&path, "locking", &e.into())),
        }
        let comm = fs::read_to_string("/proc/self/comm").unwrap_or_else(|_| "volfs".into());
        file.set_len(0)
            .and_then(|()| writeln!(file, "pid {} ({})", std::process::id(), comm.trim()))
            .map_err(|e| failed(&path, "writing", &e))?;
        Ok(Self(file))
    }
}

impl Drop for StateLock {
    fn drop(&mut self) {
        // Unlocking by hand: a child between fork and exec has a copy of the descriptor, and closing
        // ours would leave the lock with it. Errors have nobody to go to; exit releases it all the same.
        let _ = self.0.set_len(0);
        let _ = flock(&self.0, FlockOperation::Unlock);
    }
}

/// Makes the database if there is none. It appears under its name complete or not at all.
pub(super) fn create_if_absent(dir: &Path, migrations: &'static [M<'static>]) -> Result<(), StoreError> {
    let db = database(dir);
    match fs::symlink_metadata(&db) {
        Ok(_) => return Ok(()),
        Err(e) if e.kind() == io::ErrorKind::NotFound => {}
        Err(e) => return Err(failed(&db, "looking at", &e)),
    }
    for suffix in ["-wal", "-journal"] {
        let tail = beside(&db, suffix);
        // SQLite would replay it into a new database.
        if fs::symlink_metadata(&tail).is_ok_and(|m| m.len() > 0) {
            return Err(unusable(
                &tail,
                "it belongs to a volfs.db that is not there: put that back, or move this file away",
            ));
        }
    }
    let new = beside(&db, ".new");
    for left in [new.clone(), beside(&new, "-journal")] {
        match fs::remove_file(&left) {
            Ok(()) => {}
            Err(e) if e.kind() == io::ErrorKind::NotFound => {}
            Err(e) => return Err(failed(&left, "removing", &e)),
        }
    }
    OpenOptions::new().write(true).create_new(true).mode(0o600).open(&new).map_err(|e| failed(&new, "creating", &e))?;
    let mut conn =
        Connection::open_with_flags(&new, OpenFlags::SQLITE_OPEN_READ_WRITE | OpenFlags::SQLITE_OPEN_NO_MUTEX)
            .map_err(schema::error)?;
    set(&conn, "synchronous", 2)?;
    conn.pragma_update(None, "application_id", APPLICATION_ID).map_err(schema::error)?;
    schema::migrate(&mut conn, migrations, schema::latest(migrations))?;
    conn.execute(
        "INSERT INTO meta (key, value) VALUES ('record', ?1), ('created', ?2), ('epoch', '0')",
        (RecordId::random().to_string(), Timestamp::from(SystemTime::now()).0.to_string()),
    )
    .map_err(schema::error)?;
    conn.close().map_err(|(_, e)| schema::error(e))?;
    fs::rename(&new, &db).map_err(|e| failed(&db, "naming", &e))?;
    sync_directory(dir)
}

/// The 100 bytes at the start of an SQLite database, checked without SQLite, which would make
/// `-wal` and `-shm` files beside it.
fn check_header(db: &Path, migrations: &[M<'static>]) -> Result<(), StoreError> {
    let meta = fs::symlink_metadata(db).map_err(|e| failed(db, "looking at", &e))?;
    if !meta.is_file() {
        return Err(unusable(db, "it is not a regular file"));
    }
    if meta.len() == 0 {
        return Err(unusable(
            db,
            "it is empty, which a record never is: restore it, or move it away to start a new one",
        ));
    }
    let mut header = [0u8; 100];
    let read = File::open(db).and_then(|mut f| f.read_exact(&mut header));
    match read {
        Ok(()) if header.starts_with(b"SQLite format 3\0") => {}
        Ok(()) => return Err(unusable(db, "it is not an SQLite database")),
        Err(e) if e.kind() == io::ErrorKind::UnexpectedEof => {
            return Err(unusable(db, "it is not an SQLite database"));
        }
        Err(e) => return Err(failed(db, "reading", &e)),
    }
    let word = |at: usize| i32::from_be_bytes([header[at], header[at + 1], header[at + 2], header[at + 3]]);
    check_numbers(db, word(68), word(60), schema::latest(migrations))
}

fn check_numbers(db: &Path, application: i32, version: i32, latest: i32) -> Result<(), StoreError> {
    if application != APPLICATION_ID {
        return Err(unusable(db, format!("it is an SQLite database of something else (application id {application})")));
    }
    if version > latest {
        return Err(unusable(
            db,
            format!("a newer volfs made it (schema {version}, this one knows up to {latest}): start that one"),
        ));
    }
    if version < 1 {
        return Err(unusable(
            db,
            format!("its schema number is {version}, which no volfs writes: restore it from a backup"),
        ));
    }
    Ok(())
}

/// A connection for looking. Without a WAL the file is all there is, and opening it as immutable
/// leaves no trace; with one, SQLite needs its `-shm`.
fn look(db: &Path, migrations: &'static [M<'static>]) -> Result<Connection, StoreError> {
    check_header(db, migrations)?;
    let wal = fs::metadata(beside(db, "-wal")).is_ok_and(|m| m.len() > 0);
    let flags = OpenFlags::SQLITE_OPEN_READ_ONLY | OpenFlags::SQLITE_OPEN_NO_MUTEX;
    let opened = if wal { Connection::open_with_flags(db, flags) } else { immutable(db) };
    opened.map_err(|e| damaged(db, &e))
}

pub(super) fn immutable(db: &Path) -> rusqlite::Result<Connection> {
    let flags = OpenFlags::SQLITE_OPEN_READ_ONLY | OpenFlags::SQLITE_OPEN_NO_MUTEX | OpenFlags::SQLITE_OPEN_URI;
    let mut uri = String::from("file:");
    for byte in db.as_os_str().as_bytes() {
        match byte {
            b'a'..=b'z' | b'A'..=b'Z' | b'0'..=b'9' | b'/' | b'.' | b'-' | b'_' => uri.push(char::from(*byte)),
            other => uri.push_str(&format!("%{other:02x}")),
        }
    }
    uri.push_str("?immutable=1");
    Connection::open_with_flags(uri, flags)
}

pub(super) fn damaged(db: &Path, e: &rusqlite::Error) -> StoreError {
    unusable(db, format!("SQLite cannot read it ({e}): restore it from a backup, or move it away and `volfs rebuild`"))
}

/// Refuses a database that is foreign, newer, damaged or not writable; answers its version.
pub(super) fn check(db: &Path, migrations: &'static [M<'static>]) -> Result<i32, StoreError> {
    let conn = look(db, migrations)?;
    let bad = |e: rusqlite::Error| damaged(db, &e);
    let version = numbers(&conn, db, migrations)?;
    // The first one reads every page, but does not hold indexes against their tables: where answers
    // come from an index, a sound page in the wrong place would be one. The journal, which is most of
    // the file, is read without its indexes.
    let checks = ["quick_check(1)".to_owned()].into_iter();
    let checks = checks.chain(schema::INDEXED.iter().map(|table| format!("integrity_check({table})")));
    for check in checks {
        let found: String = conn.query_row(&format!("PRAGMA {check}"), [], |r| r.get(0)).map_err(bad)?;
        if found != "ok" {
            let words = found.replace('\n', " ");
            return Err(unusable(
                db,
                format!("it is damaged ({words}): restore it from a backup, or move it away and `volfs rebuild`"),
            ));
        }
    }
    if let Some(object) = schema::difference(&conn, migrations, version)? {
        return Err(unusable(db, format!("its {object} is not that of schema {version}: somebody changed it")));
    }
    let mut broken = conn.prepare("PRAGMA foreign_key_check").map_err(bad)?;
    let mut broken = broken.query([]).map_err(bad)?;
    if let Some(row) = broken.next().map_err(bad)? {
        let (child, id, parent) = (
            row.get::<_, String>(0).map_err(bad)?,
            row.get::<_, Option<i64>>(1).map_err(bad)?.unwrap_or_default(),
            row.get::<_, String>(2).map_err(bad)?,
        );
        return Err(unusable(db, format!("row {id} of {child} names a row of {parent} that is not there")));
    }
    let mode = fs::metadata(db).map_err(|e| failed(db, "looking at", &e))?.permissions().mode() & 0o7777;
    if mode & 0o200 == 0 {
        return Err(unusable(db, format!("it is read-only (mode {mode:04o}): chmod it to 0600, or start read-only")));
    }
    // Opening for writing writes nothing, and SQLite would silently fall back to reading.
    match OpenOptions::new().read(true).write(true).open(db) {
        Ok(_) => Ok(version),
        Err(e) => Err(unusable(db, format!("it cannot be written ({e}): start read-only, or make it writable"))),
    }
}

fn numbers(conn: &Connection, db: &Path, migrations: &'static [M<'static>]) -> Result<i32, StoreError> {
    let read = |name: &str| conn.pragma_query_value(None, name, |r| r.get::<_, i32>(0)).map_err(|e| damaged(db, &e));
    let version = read("user_version")?;
    check_numbers(db, read("application_id")?, version, schema::latest(migrations))?;
    Ok(version)
}

/// Sets a pragma of a number and holds it against what SQLite then says.
fn set(conn: &Connection, name: &str, value: i64) -> Result<(), StoreError> {
    conn.pragma_update(None, name, value).map_err(schema::error)?;
    let now: i64 = conn.pragma_query_value(None, name, |r| r.get(0)).map_err(schema::error)?;
    if now == value { Ok(()) } else { Err(StoreError::Failed { words: format!("PRAGMA {name} stayed {now}") }) }
}

/// The one writing connection to a database that [`check`] accepted.
pub(super) fn connect(db: &Path) -> Result<Connection, StoreError> {
    fs::set_permissions(db, Permissions::from_mode(0o600)).map_err(|e| failed(db, "making private", &e))?;
    let conn = Connection::open_with_flags(db, OpenFlags::SQLITE_OPEN_READ_WRITE | OpenFlags::SQLITE_OPEN_NO_MUTEX)
        .map_err(schema::error)?;
    conn.busy_timeout(BUSY).map_err(schema::error)?;
    if conn.is_readonly("main").map_err(schema::error)? {
        return Err(unusable(db, "SQLite can open it for reading only"));
    }
    let mode: String =
        conn.pragma_update_and_check(None, "journal_mode", "wal", |r| r.get(0)).map_err(schema::error)?;
    if mode != "wal" {
        return Err(StoreError::Failed { words: format!("PRAGMA journal_mode stayed {mode}") });
    }
    // KiB, negative by SQLite's convention: what is written is small, and reads are answered from memory.
    set(&conn, "cache_size", -512)?;
    set(&conn, "synchronous", 2)?;
    set(&conn, "foreign_keys", 1)?;
    set(&conn, "trusted_schema", 0)?;
    conn.pragma_update_and_check(None, "journal_size_limit", WAL_KEPT, |r| r.get::<_, i64>(0))
        .map_err(schema::error)?;
    conn.set_prepared_statement_cache_capacity(64);
    Ok(conn)
}

/// The one writing connection to a record that [`check`] accepts, brought to the latest version.
pub(super) fn ready(db: &Path, migrations: &'static [M<'static>]) -> Result<Connection, StoreError> {
    let (version, latest) = (check(db, migrations)?, schema::latest(migrations));
    let mut conn = connect(db)?;
    if version < latest {
        schema::migrate(&mut conn, migrations, latest)?;
        // Now, so that an older volfs sees the new number in the file and leaves it alone.
        writer::checkpoint(&conn)?;
        tracing::info!("{}: brought from schema {version} to {latest}", db.display());
    }
    Ok(conn)
}

/// A connection that cannot write, beside a running daemon or without one. The file is not looked
/// at by hand here: closing a descriptor of our own would drop the locks of a writer in this process.
pub(super) fn connect_read_only(dir: &Path, migrations: &'static [M<'static>]) -> Result<Connection, StoreError> {
    let db = database(dir);
    if fs::symlink_metadata(&db).is_err_and(|e| e.kind() == io::ErrorKind::NotFound) {
        return Err(unusable(&db, "there is no such file"));
    }
    let flags = OpenFlags::SQLITE_OPEN_READ_ONLY | OpenFlags::SQLITE_OPEN_NO_MUTEX;
    let open = || {
        let conn = Connection::open_with_flags(&db, flags)?;
        conn.busy_timeout(BUSY)?;
        conn.query_row("SELECT count(*) FROM sqlite_schema", [], |r| r.get::<_, i64>(0))?;
        Ok(conn)
    };
    let conn = match open() {
        Ok(conn) => conn,
        // On a read-only filesystem there can be no -shm; nobody can be writing there either.
        Err(first)
            if !beside(&db, "-wal").exists() && rustix::fs::access(dir, rustix::fs::Access::WRITE_OK).is_err() =>
        {
            immutable(&db).map_err(|_: rusqlite::Error| damaged(&db, &first))?
        }
        Err(e) => return Err(damaged(&db, &e)),
    };
    set(&conn, "query_only", 1)?;
    let (version, latest) = (numbers(&conn, &db, migrations)?, schema::latest(migrations));
    if version < latest {
        return Err(unusable(
            &db,
            format!(
                "an older volfs made it (schema {version}, this one reads {latest}): start volfs once to bring it forward"
            ),
        ));
    }
    Ok(conn)
}
