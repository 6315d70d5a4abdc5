//! One [`Change`] as SQL. A change that meets no row where it needs one is an error: the engine
//! and the record would otherwise drift apart without a word.

use rusqlite::{Connection, OptionalExtension, Params, params};

use super::schema;
use crate::model::{Status, VolumeId};
use crate::store::{Change, MappingRow, OpRow, StoreError};

type Applied = Result<(), StoreError>;

/// Applies one change within the caller's transaction.
pub(super) fn apply(conn: &Connection, change: &Change) -> Applied {
    dispatch(conn, change).map_err(|e| match e {
        StoreError::Constraint { words } => StoreError::Constraint { words: format!("{}: {words}", kind(change)) },
        other => other,
    })
}

fn kind(change: &Change) -> &'static str {
    match change {
        Change::JobAdd { .. } => "JobAdd",
        Change::JobForget { .. } => "JobForget",
        Change::JobVmName { .. } => "JobVmName",
        Change::JobHold { .. } => "JobHold",
        Change::VolumeAdd { .. } => "VolumeAdd",
        Change::VolumeFacts { .. } => "VolumeFacts",
        Change::VolumeStatus { .. } => "VolumeStatus",
        Change::VolumeGone { .. } => "VolumeGone",
        Change::DiskAdd { .. } => "DiskAdd",
        Change::DiskMarked { .. } => "DiskMarked",
        Change::DiskRename { .. } => "DiskRename",
        Change::DiskEnd { .. } => "DiskEnd",
        Change::MappingSet(_) => "MappingSet",
        Change::MappingEnd { .. } => "MappingEnd",
        Change::SnapshotAdd { .. } => "SnapshotAdd",
        Change::SnapshotGone { .. } => "SnapshotGone",
        Change::OpBegin(_) => "OpBegin",
        Change::OpStep { .. } => "OpStep",
        Change::OpEnd { .. } => "OpEnd",
        Change::OpVolume { .. } => "OpVolume",
    }
}

fn constraint<T>(words: String) -> Result<T, StoreError> {
    Err(StoreError::Constraint { words })
}

fn run(conn: &Connection, sql: &str, params: impl Params) -> Result<usize, StoreError> {
    conn.prepare_cached(sql).and_then(|mut s| s.execute(params)).map_err(schema::error)
}

/// Runs what must touch exactly one row; `else_words` say why there is none.
fn one(conn: &Connection, sql: &str, params: impl Params, else_words: impl FnOnce() -> String) -> Applied {
    match run(conn, sql, params)? {
        1 => Ok(()),
        _ => constraint(else_words()),
    }
}

/// SQLite's integers are signed; none of our numbers comes near the difference.
fn signed(what: &str, value: u64) -> Result<i64, StoreError> {
    match i64::try_from(value) {
        Ok(value) => Ok(value),
        Err(_) => constraint(format!("{what} {value} is above what the record can hold")),
    }
}

fn dispatch(conn: &Connection, change: &Change) -> Applied {
    match change {
        Change::JobAdd { row, id, at } => one(
            conn,
            "INSERT INTO jobs (id, name, created_at, vm_name_at, hold_at) VALUES (?1, ?2, ?3, ?3, ?3)
                ON CONFLICT (id) DO UPDATE SET forgotten_at = NULL
                WHERE name = excluded.name AND forgotten_at IS NOT NULL",
            params![row.0, id.as_str(), at.0],
            || format!("job {row} is there already, or under another name"),
        ),
        Change::JobForget { row, at } => one(
            conn,
            "UPDATE jobs SET forgotten_at = ?2 WHERE id = ?1 AND forgotten_at IS NULL
                AND NOT EXISTS (SELECT 1 FROM vm_disks WHERE job_id = ?1)",
            params![row.0, at.0],
            || format!("job {row} is not there, forgotten already, or still owns a volume"),
        ),
        Change::JobVmName { row, vm_name, at } => one(
            conn,
            "UPDATE jobs SET vm_name = ?2, vm_name_at = ?3 WHERE id = ?1 AND forgotten_at IS NULL",
            params![row.0, vm_name, at.0],
            || format!("there is no job {row}"),
        ),
        Change::JobHold { row, hold, at } => one(
            conn,
            "UPDATE jobs SET hold = ?2, hold_at = ?3 WHERE id = ?1 AND forgotten_at IS NULL",
            params![row.0, hold, at.0],
            || format!("there is no job {row}"),
        ),
        // What was known of a volume that comes back says nothing of it now: facts and status start anew.
        Change::VolumeAdd { row, volume, name, size, at } => run(
            conn,
            "INSERT INTO ossea_volumes (id, volume_id, volume_name, size, status, status_at, added_at)
                VALUES (?1, ?2, ?3, ?4, ?5, ?6, ?6)
                ON CONFLICT (volume_id) DO UPDATE SET volume_name = excluded.volume_name, size = excluded.size,
                    serial = '', cloud_state = '', device_id = NULL, status = excluded.status,
                    status_at = excluded.status_at, added_at = excluded.added_at, gone_at = NULL",
            params![row.0, volume.to_string(), name, signed("size", *size)?, Status::Unknown.as_str(), at.0],
        )
        .map(drop),
        Change::VolumeFacts { volume, name, size, serial, cloud_state, device_id } => one(
            conn,
            "UPDATE ossea_volumes SET volume_name = ?2, size = ?3, serial = ?4, cloud_state = ?5, device_id = ?6
                WHERE volume_id = ?1",
            params![volume.to_string(), name, signed("size", *size)?, serial, cloud_state, device_id],
            || no_volume(*volume),
        ),
        Change::VolumeStatus { volume, status, at } => one(
            conn,
            "UPDATE ossea_volumes SET status = ?2, status_at = ?3 WHERE volume_id = ?1",
            params![volume.to_string(), status.as_str(), at.0],
            || no_volume(*volume),
        ),
        Change::VolumeGone { volume, at } => one(
            conn,
            "UPDATE ossea_volumes SET gone_at = coalesce(gone_at, ?2) WHERE volume_id = ?1",
            params![volume.to_string(), at.0],
            || no_volume(*volume),
        ),
        Change::DiskAdd { row, job, disk, volume, epoch, at } => {
            one(
                conn,
                "INSERT INTO vm_disks (id, job_id, disk_name, ossea_volume_id, epoch, changed_at)
                    SELECT ?1, j.id, ?3, v.id, ?5, ?6 FROM jobs j, ossea_volumes v
                     WHERE j.id = ?2 AND j.forgotten_at IS NULL AND v.volume_id = ?4 AND v.gone_at IS NULL",
                params![row.0, job.0, disk.as_str(), volume.to_string(), signed("epoch", *epoch)?, at.0],
                || format!("there is no job {job}, or no volume {volume}"),
            )?;
            epoch_given(conn, *epoch)
        }
        Change::DiskMarked { row, epoch } => {
            one(
                conn,
                "UPDATE vm_disks SET epoch = ?2 WHERE id = ?1 AND epoch = 0 AND ?2 > 0",
                params![row.0, signed("epoch", *epoch)?],
                || format!("there is no ownership {row} without a mark, or {epoch} is no epoch"),
            )?;
            epoch_given(conn, *epoch)
        }
        Change::DiskRename { row, disk, at } => one(
            conn,
            "UPDATE vm_disks SET disk_name = ?2, changed_at = ?3 WHERE id = ?1",
            params![row.0, disk.as_str(), at.0],
            || format!("there is no ownership {row}"),
        ),
        Change::DiskEnd { row } => {
            one(conn, "DELETE FROM vm_disks WHERE id = ?1", params![row.0], || format!("there is no ownership {row}"))
        }
        Change::MappingSet(mapping) => mapping_set(conn, mapping),
        Change::MappingEnd { volume } => {
            run(conn, "DELETE FROM device_mappings WHERE volume_uuid = ?1", params![volume.to_string()]).map(drop)
        }
        Change::SnapshotAdd { row, volume, snapshot, name, size, created } => run(
            conn,
            "INSERT INTO volume_snapshots (id, volume_uuid, snapshot_id, name, size, created_at)
                VALUES (?1, ?2, ?3, ?4, ?5, ?6)",
            params![row.0, volume.to_string(), snapshot.to_string(), name.as_str(), signed("size", *size)?, created.0],
        )
        .map(drop),
        // Seen gone twice, by a look and by its own operation: the first time stands.
        Change::SnapshotGone { row, at } => one(
            conn,
            "UPDATE volume_snapshots SET deleted_at = coalesce(deleted_at, ?2) WHERE id = ?1",
            params![row.0, at.0],
            || format!("there is no snapshot {row}"),
        ),
        Change::OpBegin(op) => op_begin(conn, op),
        Change::OpStep { id, step, detail } => one(
            conn,
            "UPDATE volume_operations SET step = ?2, detail = ?3 WHERE id = ?1 AND ended_at IS NULL",
            params![id.0, step, detail],
            || format!("operation {id} is not there or has ended"),
        ),
        // The first outcome stands: a late answer must not rewrite what waiters were told.
        Change::OpEnd { id, outcome, sentence, at } => one(
            conn,
            "UPDATE volume_operations SET outcome = ?2, sentence = ?3, ended_at = ?4
                WHERE id = ?1 AND ended_at IS NULL",
            params![id.0, outcome.as_str(), sentence, at.0],
            || format!("operation {id} is not there or has ended"),
        ),
        Change::OpVolume { id, volume } => one(
            conn,
            "UPDATE volume_operations SET volume_uuid = ?2 WHERE id = ?1",
            params![id.0, volume.to_string()],
            || format!("there is no operation {id}"),
        ),
    }
}

/// The highest epoch outlives the row and the operation that it was given to, so that none is given
/// twice, and a mark with a higher one is known to be none of this record's doing.
fn epoch_given(conn: &Connection, epoch: u64) -> Applied {
    run(
        conn,
        "UPDATE meta SET value = CAST(?1 AS TEXT) WHERE key = 'epoch' AND CAST(value AS INTEGER) < ?1",
        params![signed("epoch", epoch)?],
    )
    .map(drop)
}

fn no_volume(volume: VolumeId) -> String {
    format!("there is no volume {volume}")
}

fn mapping_set(conn: &Connection, m: &MappingRow) -> Applied {
    let volume = m.volume.to_string();
    run(conn, "DELETE FROM device_mappings WHERE volume_uuid = ?1", params![volume])?;
    let device = match &m.device {
        None => None,
        Some(d) => Some((d, signed("diskseq", d.incarnation.diskseq)?, signed("size", d.size)?)),
    };
    run(
        conn,
        "INSERT INTO device_mappings
            (id, volume_uuid, vm_id, device_name, dev_major, dev_minor, boot_id, diskseq, size, mapped_at)
            VALUES (?1, ?2, ?3, ?4, ?5, ?6, ?7, ?8, ?9, ?10)",
        params![
            m.row.0,
            volume,
            m.vm.to_string(),
            device.map(|(d, _, _)| &d.name),
            device.map(|(d, _, _)| d.dev.major),
            device.map(|(d, _, _)| d.dev.minor),
            device.map(|(d, _, _)| d.incarnation.boot.to_string()),
            device.map(|(_, seq, _)| seq),
            device.map(|(_, _, size)| size),
            m.at.0,
        ],
    )
    .map(drop)
}

fn op_begin(conn: &Connection, op: &OpRow) -> Applied {
    run(
        conn,
        "INSERT INTO volume_operations
            (id, fence, verb, command, job_id, volume_uuid, disk_name, parent_id, detail, step,
             uid, gid, pid, comm, host_id, boot_id, began_at, outcome, sentence, ended_at)
            VALUES (?1, ?2, ?3, ?4, ?5, ?6, ?7, ?8, ?9, ?10, ?11, ?12, ?13, ?14, ?15, ?16, ?17, ?18, ?19, ?20)",
        params![
            op.id.0,
            op.fence.to_string(),
            op.verb.as_str(),
            op.command,
            op.job.map(|j| j.0),
            op.volume.map(|v| v.to_string()),
            op.disk.as_ref().map(|d| d.as_str()),
            op.parent.map(|p| p.0),
            op.detail,
            op.step,
            op.caller.uid,
            op.caller.gid,
            op.caller.pid,
            op.caller.comm,
            op.host.to_string(),
            op.boot.to_string(),
            op.began.0,
            op.ended.as_ref().map(|(o, _, _)| o.as_str()),
            op.ended.as_ref().map(|(_, s, _)| s),
            op.ended.as_ref().map(|(_, _, at)| at.0),
        ],
    )?;
    // It may be on a volume from the next moment on, whether or not the operation comes to own one.
    match op.epoch() {
        0 => Ok(()),
        epoch => epoch_given(conn, epoch),
    }
}

/// Drops ended operations beyond the newest `keep` of them, and answers how many went. Unfinished
/// ones stay, and so do the parts of an unfinished one, which its recovery may want to read.
pub(super) fn prune(conn: &Connection, keep: usize) -> Result<usize, StoreError> {
    let last = conn
        .prepare_cached(
            "SELECT id FROM volume_operations WHERE ended_at IS NOT NULL ORDER BY id DESC LIMIT 1 OFFSET ?1",
        )
        .and_then(|mut s| s.query_row([i64::try_from(keep).unwrap_or(i64::MAX)], |r| r.get::<_, i64>(0)).optional())
        .map_err(schema::error)?;
    let Some(last) = last else { return Ok(0) };
    run(
        conn,
        "DELETE FROM volume_operations WHERE id <= ?1 AND ended_at IS NOT NULL AND (parent_id IS NULL
            OR parent_id NOT IN (SELECT id FROM volume_operations WHERE ended_at IS NULL))",
        params![last],
    )
}
