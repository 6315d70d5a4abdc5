//! The seven tables that matter, which of their columns are read, and their rows.

use std::collections::BTreeSet;

/// Most rows of one table; each takes some memory, and no installation has had so many.
pub(super) const MOST_ROWS: usize = 100_000;
/// A table, and for each column that is read the names that it had, the present one first.
pub(super) struct Known {
    pub name: &'static str,
    pub columns: &'static [&'static [&'static str]],
}

const JOBS: usize = 0;
const CONTEXTS: usize = 1;
pub(super) const DISKS: usize = 2;
const VOLUMES: usize = 3;
const MAPPINGS: usize = 4;
const OPERATIONS: usize = 5;
const EXPORTS: usize = 6;

pub(super) const KNOWN: [Known; 7] = [
    Known { name: "replication_jobs", columns: &[&["id"], &["source_vm_name"], &["vm_context_id"]] },
    Known { name: "vm_replication_contexts", columns: &[&["context_id"], &["vm_name"]] },
    Known {
        name: "vm_disks",
        columns: &[
            &["id"],
            &["job_id"],
            &["vm_context_id"],
            &["disk_id"],
            &["ossea_volume_id"],
            &["cloudstack_volume_uuid"],
            &["vmdk_path", "vm_dk_path"],
        ],
    },
    Known { name: "ossea_volumes", columns: &[&["id"], &["volume_id"], &["volume_name", "name"], &["size_gb"]] },
    Known { name: "device_mappings", columns: &[&["volume_uuid", "volume_id"], &["vm_id"]] },
    Known {
        name: "volume_operations",
        columns: &[
            &["id"],
            &["type", "operation_type", "operation"],
            &["status", "state"],
            &["volume_id", "volume_uuid"],
        ],
    },
    Known { name: "nbd_exports", columns: &[] },
];

/// Words of an operation that has ended; any other is one that had not.
const ENDED: [&str; 8] = ["completed", "complete", "failed", "cancelled", "canceled", "success", "succeeded", "error"];

/// A text of a row; `None` is NULL, or a column that this table has not.
pub type Value = Option<String>;

/// A row of `replication_jobs`.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
#[allow(missing_docs)]
pub struct JobSaid {
    pub id: Value,
    pub vm_name: Value,
    pub context: Value,
}

/// A row of `vm_replication_contexts`.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
#[allow(missing_docs)]
pub struct ContextSaid {
    pub id: Value,
    pub vm_name: Value,
}

/// A row of `vm_disks`.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
#[allow(missing_docs)]
pub struct DiskSaid {
    pub row: Value,
    pub job: Value,
    pub context: Value,
    pub disk: Value,
    /// The link that is kept: a row of `ossea_volumes`.
    pub volume_row: Value,
    /// The link that was dropped, of the generation before.
    pub volume_uuid: Value,
    pub vmdk: Value,
}

/// A row of `ossea_volumes`.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
#[allow(missing_docs)]
pub struct VolumeSaid {
    pub row: Value,
    pub uuid: Value,
    pub name: Value,
    pub size_gb: Value,
}

/// A row of `device_mappings`.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
#[allow(missing_docs)]
pub struct MappingSaid {
    pub volume: Value,
    pub vm: Value,
}

/// A row of `volume_operations` that had not ended.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
#[allow(missing_docs)]
pub struct OperationSaid {
    pub id: Value,
    pub kind: Value,
    pub state: Value,
    pub volume: Value,
}

/// What one database of a dump says.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Tables {
    /// Rows.
    pub jobs: Vec<JobSaid>,
    /// Rows.
    pub contexts: Vec<ContextSaid>,
    /// Rows.
    pub disks: Vec<DiskSaid>,
    /// Rows.
    pub volumes: Vec<VolumeSaid>,
    /// Rows.
    pub mappings: Vec<MappingSaid>,
    /// Rows that had not ended.
    pub operations: Vec<OperationSaid>,
    /// How many there are at all.
    pub operations_all: u64,
    /// How many there are.
    pub exports: u64,
    /// Which of the tables that are known are in it.
    pub present: BTreeSet<&'static str>,
    /// `vm_disks` still has the link that was dropped later.
    pub before: bool,
}

/// The columns of one statement: how many, and which of them goes where.
pub(super) struct Wanted {
    pub slots: Vec<Option<usize>>,
    pub names: Vec<String>,
}

impl Wanted {
    pub fn of(table: usize, names: Vec<String>) -> Self {
        let mut slots = vec![None; names.len()];
        for (slot, alternatives) in KNOWN[table].columns.iter().enumerate() {
            let column = alternatives.iter().find_map(|wanted| names.iter().position(|name| name == wanted));
            if let Some(column) = column {
                slots[column] = Some(slot);
            }
        }
        Wanted { slots, names }
    }

    pub fn is_before(&self, table: usize) -> bool {
        table == DISKS && self.names.iter().any(|name| name == "cloudstack_volume_uuid")
    }
}

impl Tables {
    /// False if there are too many.
    pub(super) fn take(&mut self, table: usize, row: Vec<Value>) -> bool {
        let mut row = row.into_iter();
        let mut next = || row.next().flatten();
        match table {
            JOBS => push(&mut self.jobs, JobSaid { id: next(), vm_name: next(), context: next() }),
            CONTEXTS => push(&mut self.contexts, ContextSaid { id: next(), vm_name: next() }),
            DISKS => push(
                &mut self.disks,
                DiskSaid {
                    row: next(),
                    job: next(),
                    context: next(),
                    disk: next(),
                    volume_row: next(),
                    volume_uuid: next(),
                    vmdk: next(),
                },
            ),
            VOLUMES => push(&mut self.volumes, VolumeSaid { row: next(), uuid: next(), name: next(), size_gb: next() }),
            MAPPINGS => push(&mut self.mappings, MappingSaid { volume: next(), vm: next() }),
            OPERATIONS => {
                self.operations_all += 1;
                let op = OperationSaid { id: next(), kind: next(), state: next(), volume: next() };
                let ended = op.state.as_ref().is_some_and(|s| ENDED.iter().any(|e| s.trim().eq_ignore_ascii_case(e)));
                ended || push(&mut self.operations, op)
            }
            EXPORTS => {
                self.exports += 1;
                true
            }
            _ => true,
        }
    }
}

fn push<T>(rows: &mut Vec<T>, row: T) -> bool {
    let room = rows.len() < MOST_ROWS;
    if room {
        rows.push(row);
    }
    room
}
