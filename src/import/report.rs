//! What an import says: to people line by line, to programs as one JSON object.

use serde::Serialize;

use super::decide::{NewVolume, Plan};
use super::dump::Dump;
use crate::model::VolumeId;

/// Why something was not simply taken over, the gravest first.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Kind {
    /// The two links of one disk name different volumes.
    LinksDiffer,
    /// One volume is named for several disks.
    TwoPlaces,
    /// One disk has several volumes.
    TwoVolumes,
    /// The record has another volume in that place.
    DiskTaken,
    /// Only the link that was dropped names it.
    OldLinkOnly,
    /// A disk's own context and its job's differ.
    ContextsDiffer,
    /// A context and a replication job have one name.
    NameTwice,
    /// A link leads to no row.
    Dangling,
    /// A disk's job is not there.
    JobMissing,
    /// A disk's context is not there.
    ContextMissing,
    /// A disk is in no job.
    NoJob,
    /// A name that no job can have.
    BadJob,
    /// A volume's id is none.
    BadVolume,
    /// A disk's name is none.
    BadDisk,
    /// A VM's name is none.
    BadVmName,
    /// Known by where it was attached alone.
    MappingOnly,
    /// No disk names it.
    NoDisk,
    /// The record knows it, in no job.
    KnownAlready,
    /// The record has it elsewhere.
    Elsewhere,
    /// The record knew it once.
    Gone,
    /// An operation had not ended, and on what cannot be told.
    Unended,
    /// A job without a context.
    NoContext,
    /// A disk without a volume.
    NoVolume,
    /// An id that was written otherwise.
    Normalised,
}

/// Something that was not simply taken over, and what to do about it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Doubt {
    /// What it is.
    pub kind: Kind,
    /// The volumes that it is about.
    #[serde(serialize_with = "as_texts")]
    pub volumes: Vec<VolumeId>,
    /// What was found, and what was done about it.
    pub sentence: String,
    /// What the reader can do.
    pub remedy: String,
}

fn as_texts<S: serde::Serializer>(volumes: &[VolumeId], to: S) -> Result<S::Ok, S::Error> {
    to.collect_seq(volumes.iter().map(VolumeId::to_string))
}

/// A job that was made.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
#[allow(missing_docs)]
pub struct JobLine {
    pub job: String,
    pub vm_name: String,
}

/// A volume that came in.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
#[allow(missing_docs)]
pub struct VolumeLine {
    pub volume: String,
    pub name: String,
    pub size: u64,
    /// Empty: no job's.
    pub job: String,
    pub disk: String,
}

/// An operation that became history.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
#[allow(missing_docs)]
pub struct OperationLine {
    pub operation: String,
    pub verb: String,
    pub was: String,
    pub volume: String,
}

/// What is in the dump and was left there.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize)]
#[allow(missing_docs)]
pub struct Left {
    pub tables: u64,
    pub inserts: u64,
    pub device_mappings: u64,
    pub nbd_exports: u64,
    pub ended_operations: u64,
}

/// All of it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Report {
    /// Something was written, or would be without `--dry-run`.
    pub changes: bool,
    /// Nothing was written.
    pub dry_run: bool,
    /// The database's name, if the dump has it.
    pub database: String,
    /// `before` or `after` the second link was dropped.
    pub schema: &'static str,
    /// Made.
    pub jobs: Vec<JobLine>,
    /// In a job.
    pub imported: Vec<VolumeLine>,
    /// Known, and in no job.
    pub unclaimed: Vec<VolumeLine>,
    /// Now history.
    pub interrupted: Vec<OperationLine>,
    /// Volumes that the record had already.
    pub unchanged: usize,
    /// What to look at.
    pub doubts: Vec<Doubt>,
    /// Not taken over.
    pub left: Left,
    /// What comes next.
    pub next: String,
}

impl VolumeLine {
    fn of(volume: &NewVolume) -> Self {
        let (job, disk) = volume.place.as_ref().map_or_else(Default::default, |(j, d)| (j.to_string(), d.to_string()));
        let NewVolume { id, name, size, .. } = volume;
        VolumeLine { volume: id.to_string(), name: name.clone(), size: *size, job, disk }
    }
}

impl Report {
    /// Of that plan.
    pub fn of(dump: &Dump, plan: &Plan, dry_run: bool) -> Self {
        let lines = |claimed: bool| {
            plan.volumes.iter().filter(|v| v.place.is_some() == claimed).map(VolumeLine::of).collect::<Vec<_>>()
        };
        let next = match (plan.is_empty(), dry_run) {
            (true, _) => "nothing to do: the record has all of it",
            (false, true) => "nothing was written; without --dry-run this is what is imported",
            (false, false) => "`volfs mount`: each volume is unknown until it is seen in the cloud; then `problems`",
        };
        let tables = &dump.tables;
        Report {
            changes: !plan.is_empty(),
            dry_run,
            database: dump.database.clone(),
            schema: if tables.before { "before" } else { "after" },
            jobs: plan
                .jobs
                .iter()
                .map(|job| JobLine { job: job.id.to_string(), vm_name: job.vm_name.clone() })
                .collect(),
            imported: lines(true),
            unclaimed: lines(false),
            interrupted: plan
                .unended
                .iter()
                .map(|op| OperationLine {
                    operation: op.old_id.clone(),
                    verb: op.word.clone(),
                    was: op.state.clone(),
                    volume: op.volume.to_string(),
                })
                .collect(),
            unchanged: plan.unchanged,
            doubts: plan.doubts.clone(),
            left: Left {
                tables: dump.tables_skipped,
                inserts: dump.inserts_skipped,
                device_mappings: u64::try_from(tables.mappings.len()).unwrap_or(u64::MAX),
                nbd_exports: tables.exports,
                ended_operations: tables.operations_all - u64::try_from(tables.operations.len()).unwrap_or(0),
            },
            next: next.into(),
        }
    }

    /// As lines for a person.
    pub fn lines(&self) -> Vec<String> {
        let mut lines = Vec::new();
        for job in &self.jobs {
            let vm = if job.vm_name.is_empty() { String::new() } else { format!(" ({})", job.vm_name) };
            lines.push(format!("job {}{vm}", job.job));
        }
        let shown = |v: &VolumeLine| {
            let name = if v.name.is_empty() { String::new() } else { format!(" \"{}\"", v.name) };
            format!("{}{name}, {} GiB", v.volume, v.size >> 30)
        };
        lines.extend(self.imported.iter().map(|v| format!("{}/{}: volume {}", v.job, v.disk, shown(v))));
        lines.extend(self.unclaimed.iter().map(|v| format!("in no job: volume {}", shown(v))));
        lines.extend(self.interrupted.iter().map(|op| {
            format!("operation {} ({}) on volume {} was {}: interrupted", op.operation, op.verb, op.volume, op.was)
        }));
        for doubt in &self.doubts {
            lines.push(format!("look at: {}", doubt.sentence));
            lines.push(format!("     do: {}", doubt.remedy));
        }
        let Left { tables, inserts, device_mappings, nbd_exports, ended_operations } = &self.left;
        lines.push(format!(
            "left in the dump: {device_mappings} device mappings (the kernel tells where a device is), {nbd_exports} \
             exports, {ended_operations} operations that had ended, {tables} other tables ({inserts} inserts)"
        ));
        lines.push(format!(
            "schema {} the second link was dropped; {} jobs, {} volumes in jobs, {} in none, {} unchanged, {} doubts",
            self.schema,
            self.jobs.len(),
            self.imported.len(),
            self.unclaimed.len(),
            self.unchanged,
            self.doubts.len()
        ));
        lines.push(self.next.clone());
        lines
    }
}
