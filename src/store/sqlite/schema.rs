//! The schema's versions, what makes a database ours, and how SQLite's errors become the store's.

use rusqlite::{Connection, ErrorCode};
use rusqlite_migration::{M, Migrations};

use crate::store::StoreError;

/// "volf" in ASCII, at byte 68 of the file: `file(1)` and we tell a record from other databases by it.
pub(super) const APPLICATION_ID: i32 = 0x766f_6c66;

/// One entry a schema version; entries are only ever appended.
pub(super) const MIGRATIONS: &[M<'static>] = &[M::up(include_str!("v1.sql")).foreign_key_check()];

/// The tables that are read through their indexes: all but the journal.
pub(super) const INDEXED: &[&str] =
    &["meta", "jobs", "ossea_volumes", "vm_disks", "device_mappings", "volume_snapshots"];

/// SQLite 3.51.3: earlier ones can lose a committed transaction in WAL mode (design, The record).
pub(super) const OLDEST_SQLITE: i32 = 3_051_003;

/// The version a list of migrations leads to.
pub(super) fn latest(migrations: &[M<'static>]) -> i32 {
    i32::try_from(migrations.len()).unwrap_or(i32::MAX)
}

/// Brings `conn` to `version`, which must not be below its present one.
pub(super) fn migrate(
    conn: &mut Connection,
    migrations: &'static [M<'static>],
    version: i32,
) -> Result<(), StoreError> {
    Migrations::from_slice(migrations)
        .to_version(conn, usize::try_from(version).unwrap_or_default())
        .map_err(|e| StoreError::Failed { words: format!("migrating to schema {version}: {e}") })
}

/// What differs between `conn`'s schema and that of `version`: the first table, index or view that
/// is absent or defined otherwise. Objects an operator added are none of our business.
pub(super) fn difference(
    conn: &Connection,
    migrations: &'static [M<'static>],
    version: i32,
) -> Result<Option<String>, StoreError> {
    let mut model = Connection::open_in_memory().map_err(error)?;
    migrate(&mut model, migrations, version)?;
    let mut wanted = model
        .prepare("SELECT type, name, sql FROM sqlite_schema WHERE sql IS NOT NULL AND name NOT LIKE 'sqlite\\_%' ESCAPE '\\'")
        .map_err(error)?;
    let wanted = wanted
        .query_map([], |r| Ok((r.get::<_, String>(0)?, r.get::<_, String>(1)?, r.get::<_, String>(2)?)))
        .map_err(error)?;
    let mut found =
        conn.prepare("SELECT count(*) FROM sqlite_schema WHERE type = ?1 AND name = ?2 AND sql = ?3").map_err(error)?;
    for object in wanted {
        let (kind, name, sql) = object.map_err(error)?;
        if found.query_row([&kind, &name, &sql], |r| r.get::<_, i64>(0)).map_err(error)? == 0 {
            return Ok(Some(format!("{kind} {name}")));
        }
    }
    Ok(None)
}

/// SQLite's error in the store's words.
pub(super) fn error(e: rusqlite::Error) -> StoreError {
    let words = e.to_string();
    match e.sqlite_error_code() {
        Some(ErrorCode::DiskFull) => StoreError::Full { words },
        Some(ErrorCode::ConstraintViolation) => StoreError::Constraint { words },
        _ => StoreError::Failed { words: format!("SQLite: {words}") },
    }
}
