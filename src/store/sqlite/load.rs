//! Everything the engine starts from, read in one snapshot of the database.

use std::fmt;
use std::path::Path;

use rusqlite::types::Type;
use rusqlite::{Connection, Row};

use super::opening::unusable;
use super::schema;
use crate::model::{
    BootId, Caller, DevNo, DiskName, DiskRow, Fence, Incarnation, JobId, JobRow, MapRow, OpId, Outcome, RecordId,
    SnapRow, SnapshotId, SnapshotName, Status, Timestamp, Verb, VmId, VolumeId, VolumeRow,
};
use crate::store::{DiskLoaded, JobLoaded, Loaded, MappedDevice, MappingRow, Next, OpRow, SnapshotLoaded, StoreError};

/// A value that the schema let in and our words do not know.
#[derive(Debug)]
struct Foreign(String);

impl fmt::Display for Foreign {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl std::error::Error for Foreign {}

fn foreign(column: &str, text: impl fmt::Debug) -> rusqlite::Error {
    rusqlite::Error::FromSqlConversionFailure(0, Type::Text, Box::new(Foreign(format!("{column} is {text:?}"))))
}

/// A text column read as one of our types.
fn word<T>(row: &Row<'_>, column: &str, parse: impl FnOnce(&str) -> Option<T>) -> rusqlite::Result<T> {
    let text: String = row.get(column)?;
    parse(&text).ok_or_else(|| foreign(column, &text))
}

/// As [`word`], for a column that may be NULL.
fn maybe<T>(row: &Row<'_>, column: &str, parse: impl FnOnce(&str) -> Option<T>) -> rusqlite::Result<Option<T>> {
    match row.get::<_, Option<String>>(column)? {
        None => Ok(None),
        Some(text) => parse(&text).map(Some).ok_or_else(|| foreign(column, &text)),
    }
}

fn unsigned(row: &Row<'_>, column: &str) -> rusqlite::Result<u64> {
    let value: i64 = row.get(column)?;
    u64::try_from(value).map_err(|_| foreign(column, value))
}

fn time(row: &Row<'_>, column: &str) -> rusqlite::Result<Timestamp> {
    row.get(column).map(Timestamp)
}

fn all<T>(
    conn: &Connection,
    sql: &str,
    params: impl rusqlite::Params,
    read: impl FnMut(&Row<'_>) -> rusqlite::Result<T>,
) -> rusqlite::Result<Vec<T>> {
    conn.prepare(sql)?.query_map(params, read)?.collect()
}

/// Reads the record; `history` bounds the ended operations.
pub(super) fn load(conn: &Connection, path: &Path, history: usize) -> Result<Loaded, StoreError> {
    read(conn, history).map_err(|e| match e {
        rusqlite::Error::FromSqlConversionFailure(_, _, words) => {
            unusable(path, format!("it holds a value that volfs does not write: {words}"))
        }
        other => schema::error(other),
    })
}

fn read(conn: &Connection, history: usize) -> rusqlite::Result<Loaded> {
    let tx = conn.unchecked_transaction()?;
    let loaded = Loaded {
        record: tx.query_row("SELECT value FROM meta WHERE key = 'record'", [], |r| {
            word(r, "value", |t| RecordId::parse(t).ok())
        })?,
        jobs: all(&tx, "SELECT * FROM jobs WHERE forgotten_at IS NULL ORDER BY id", [], job)?,
        disks: all(
            &tx,
            "SELECT d.id AS disk_row, d.job_id, d.disk_name, d.epoch, d.changed_at,
                    v.volume_id, v.volume_name, v.size AS volume_size, v.serial, v.cloud_state, v.device_id,
                    v.status, v.status_at,
                    m.id AS mapping_row, m.vm_id, m.device_name, m.dev_major, m.dev_minor, m.boot_id, m.diskseq,
                    m.size, m.mapped_at
               FROM vm_disks d
               JOIN ossea_volumes v ON v.id = d.ossea_volume_id
               LEFT JOIN device_mappings m ON m.volume_uuid = v.volume_id
              ORDER BY d.id",
            [],
            disk,
        )?,
        snapshots: all(&tx, "SELECT * FROM volume_snapshots WHERE deleted_at IS NULL ORDER BY id", [], |r| {
            Ok(SnapshotLoaded {
                row: SnapRow(r.get("id")?),
                volume: word(r, "volume_uuid", |t| VolumeId::parse(t).ok())?,
                snapshot: word(r, "snapshot_id", |t| SnapshotId::parse(t).ok())?,
                name: word(r, "name", |t| SnapshotName::parse(t).ok())?,
                size: unsigned(r, "size")?,
                created: time(r, "created_at")?,
            })
        })?,
        loose: all(
            &tx,
            "SELECT volume_id FROM ossea_volumes v WHERE gone_at IS NULL
                AND NOT EXISTS (SELECT 1 FROM vm_disks d WHERE d.ossea_volume_id = v.id) ORDER BY id",
            [],
            volume_id,
        )?,
        volume_rows: all(&tx, "SELECT id, volume_id FROM ossea_volumes ORDER BY id", [], |r| {
            Ok((volume_id(r)?, VolumeRow(r.get("id")?)))
        })?,
        // The index of these was not held against the table, which takes longer than reading it.
        unfinished: all(
            &tx,
            "SELECT * FROM volume_operations NOT INDEXED WHERE ended_at IS NULL ORDER BY id",
            [],
            operation,
        )?,
        history: all(
            &tx,
            "SELECT * FROM (SELECT o.*, j.name AS job_name FROM volume_operations o LEFT JOIN jobs j ON j.id = o.job_id
                WHERE o.ended_at IS NOT NULL ORDER BY o.id DESC LIMIT ?1) ORDER BY id",
            [i64::try_from(history).unwrap_or(i64::MAX)],
            |r| Ok((operation(r)?, maybe(r, "job_name", |t| JobId::parse(t).ok())?)),
        )?,
        next: Next {
            job: next(&tx, "jobs")?,
            volume: next(&tx, "ossea_volumes")?,
            disk: next(&tx, "vm_disks")?,
            mapping: next(&tx, "device_mappings")?,
            operation: next(&tx, "volume_operations")?,
            snapshot: next(&tx, "volume_snapshots")?,
            epoch: tx.query_row("SELECT value FROM meta WHERE key = 'epoch'", [], |r| {
                word(r, "value", |t| t.parse::<u64>().ok()?.checked_add(1))
            })?,
        },
    };
    tx.finish()?;
    Ok(loaded)
}

/// `sqlite_sequence` keeps the highest id a table ever had, also of rows that are gone.
pub(super) fn next(conn: &Connection, table: &str) -> rusqlite::Result<i64> {
    conn.query_row("SELECT coalesce(max(seq), 0) FROM sqlite_sequence WHERE name = ?1", [table], |r| {
        let seq: i64 = r.get(0)?;
        seq.checked_add(1).ok_or_else(|| foreign(table, seq))
    })
}

fn volume_id(row: &Row<'_>) -> rusqlite::Result<VolumeId> {
    word(row, "volume_id", |t| VolumeId::parse(t).ok())
}

fn job(row: &Row<'_>) -> rusqlite::Result<JobLoaded> {
    Ok(JobLoaded {
        row: JobRow(row.get("id")?),
        id: word(row, "name", |t| JobId::parse(t).ok())?,
        vm_name: row.get("vm_name")?,
        hold: row.get("hold")?,
        created: time(row, "created_at")?,
        vm_name_at: time(row, "vm_name_at")?,
        hold_at: time(row, "hold_at")?,
    })
}

fn disk(row: &Row<'_>) -> rusqlite::Result<DiskLoaded> {
    let volume = volume_id(row)?;
    Ok(DiskLoaded {
        row: DiskRow(row.get("disk_row")?),
        job: JobRow(row.get("job_id")?),
        disk: word(row, "disk_name", |t| DiskName::parse(t).ok())?,
        epoch: unsigned(row, "epoch")?,
        at: time(row, "changed_at")?,
        volume,
        name: row.get("volume_name")?,
        size: unsigned(row, "volume_size")?,
        serial: row.get("serial")?,
        cloud_state: row.get("cloud_state")?,
        device_id: row.get("device_id")?,
        status: word(row, "status", Status::parse)?,
        status_at: time(row, "status_at")?,
        mapping: match row.get::<_, Option<i64>>("mapping_row")? {
            None => None,
            Some(id) => Some(MappingRow {
                row: MapRow(id),
                volume,
                vm: word(row, "vm_id", |t| VmId::parse(t).ok())?,
                device: device(row)?,
                at: time(row, "mapped_at")?,
            }),
        },
    })
}

fn device(row: &Row<'_>) -> rusqlite::Result<Option<MappedDevice>> {
    let Some(name) = row.get::<_, Option<String>>("device_name")? else { return Ok(None) };
    Ok(Some(MappedDevice {
        name,
        dev: DevNo { major: row.get("dev_major")?, minor: row.get("dev_minor")? },
        incarnation: Incarnation {
            boot: word(row, "boot_id", |t| BootId::parse(t).ok())?,
            diskseq: unsigned(row, "diskseq")?,
        },
        size: unsigned(row, "size")?,
    }))
}

fn operation(row: &Row<'_>) -> rusqlite::Result<OpRow> {
    Ok(OpRow {
        id: OpId(row.get("id")?),
        fence: word(row, "fence", |t| Fence::parse(t).ok())?,
        verb: word(row, "verb", Verb::parse)?,
        command: row.get("command")?,
        job: row.get::<_, Option<i64>>("job_id")?.map(JobRow),
        volume: maybe(row, "volume_uuid", |t| VolumeId::parse(t).ok())?,
        disk: maybe(row, "disk_name", |t| DiskName::parse(t).ok())?,
        parent: row.get::<_, Option<i64>>("parent_id")?.map(OpId),
        detail: row.get("detail")?,
        step: row.get("step")?,
        caller: Caller { uid: row.get("uid")?, gid: row.get("gid")?, pid: row.get("pid")?, comm: row.get("comm")? },
        host: word(row, "host_id", |t| VmId::parse(t).ok())?,
        boot: word(row, "boot_id", |t| BootId::parse(t).ok())?,
        began: time(row, "began_at")?,
        ended: match maybe(row, "outcome", Outcome::parse)? {
            None => None,
            Some(outcome) => Some((outcome, row.get("sentence")?, time(row, "ended_at")?)),
        },
    })
}
