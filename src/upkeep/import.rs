//! `volfs import`: what [`crate::import`] decided, written into the record as one batch.

use std::collections::HashMap;
use std::path::PathBuf;

use super::{Look, now, said, tell};
use crate::binding;
use crate::config::{Config, JobBy, Problem, Provider};
use crate::failpoint;
use crate::import::{self, Choice, Dump, Plan, Report, Source};
use crate::model::{Caller, DiskRow, Fence, JobRow, OpId, Outcome, Status, Verb, VolumeId, VolumeRow};
use crate::store::{Change, Loaded, Offline, OpRow, SqliteStore, Store};

/// Of a volume that came from a dump: it carries no mark of this record yet.
const NOT_MARKED: u64 = 0;

/// What the command line says.
#[derive(Debug, Clone)]
#[allow(missing_docs)]
pub struct Import {
    pub dump: PathBuf,
    pub dry_run: bool,
    pub json: bool,
    pub job_by: JobBy,
    pub whole: bool,
    pub database: Option<String>,
}

const NOTHING: &str = "nothing was imported";

fn refused(what: impl std::fmt::Display) -> Problem {
    Problem(format!("{what}; {NOTHING}"))
}

/// `volfs import DUMP`. The dump is read to its end before the record is opened.
pub fn import(config: &Config, import: &Import) -> Result<(), Problem> {
    if config.read_only && !import.dry_run {
        return Err(refused(
            "volfs is read-only here (--read-only, or the configuration): --dry-run would say what comes",
        ));
    }
    let source = Source::open(&import.dump).map_err(refused)?;
    let name = source.name.clone();
    let choice = Choice { whole: import.whole, database: import.database.clone() };
    let dump = import::read(source, &choice).map_err(|e| refused(format_args!("{name}: {e}")))?;
    let by = match import.job_by {
        JobBy::Job => import::JobBy::Job,
        JobBy::Context => import::JobBy::Context,
    };
    let plan = match import.dry_run {
        true => import::decide(&dump.tables, by, read_only(config)?.as_ref()),
        false => write(config, &dump, by, &name)?,
    };
    let report = Report::of(&dump, &plan, import.dry_run);
    let told = match import.json {
        true => serde_json::to_string_pretty(&report)
            .map_err(|e| Problem::with("the report", e))
            .and_then(|text| tell(&[text])),
        false => tell(&report.lines()),
    };
    match told {
        Err(problem) if report.changes && !import.dry_run => Err(Problem(format!(
            "{problem}; the import was done all the same: import again to read what is left to do"
        ))),
        told => told,
    }
}

/// The record as it is, also beside a daemon; nothing is made or brought forward.
fn read_only(config: &Config) -> Result<Option<Loaded>, Problem> {
    if !Offline::is_there(&config.state_dir) {
        return Ok(None);
    }
    let store = SqliteStore::open_read_only(&config.state_dir).map_err(said)?;
    store.load(0).map(Some).map_err(said)
}

fn write(config: &Config, dump: &Dump, by: import::JobBy, name: &str) -> Result<Plan, Problem> {
    if !Offline::is_there(&config.state_dir) {
        let plan = import::decide(&dump.tables, by, None);
        if plan.is_empty() {
            return Ok(plan);
        }
    }
    // A loop store that is not there yet is made as `mount` makes it: after the state directory.
    let make = config.provider == Provider::Loop && !config.loop_provider.dir.exists();
    let look = if make { None } else { Some(Look::open(config)?) };
    let mut record = Offline::open(&config.state_dir, true).map_err(said)?;
    let look = look.map_or_else(|| Look::making(config), Ok)?;
    let loaded = record.load().map_err(said)?;
    if let Some(first) = loaded.unfinished.first() {
        return Err(refused(format_args!(
            "the record in {} has {} operations that have not ended (the first is {}, `{}`): start volfs once, so that \
             they are settled",
            config.state_dir.display(),
            loaded.unfinished.len(),
            first.id,
            first.command
        )));
    }
    let plan = import::decide(&dump.tables, by, Some(&loaded));
    if plan.is_empty() {
        return Ok(plan);
    }
    let past = record.own_past().map_err(said)?;
    if let Some(why) = binding::foreign(config, &look.here, &past)? {
        return Err(refused(why));
    }
    let changes = changes(&look, &record, &loaded, &plan, name);
    failpoint::hit("import.before-commit");
    record.commit(&changes, None).map_err(said)?;
    failpoint::hit("import.after-commit");
    Ok(plan)
}

fn changes(look: &Look, record: &Offline, loaded: &Loaded, plan: &Plan, name: &str) -> Vec<Change> {
    let at = now();
    let mut next = loaded.next;
    let mut changes = Vec::new();
    let mut jobs: HashMap<_, JobRow> = loaded.jobs.iter().map(|job| (job.id.clone(), job.row)).collect();
    for job in &plan.jobs {
        let row = JobRow(next.job);
        next.job += 1;
        jobs.insert(job.id.clone(), row);
        changes.push(Change::JobAdd { row, id: job.id.clone(), at });
        if !job.vm_name.is_empty() {
            changes.push(Change::JobVmName { row, vm_name: job.vm_name.clone(), at });
        }
    }
    let mut places: HashMap<VolumeId, _> = HashMap::new();
    for volume in &plan.volumes {
        let (id, row) = (volume.id, VolumeRow(next.volume));
        next.volume += 1;
        changes.push(Change::VolumeAdd { row, volume: id, name: volume.name.clone(), size: volume.size, at });
        changes.push(Change::VolumeStatus { volume: id, status: Status::Unknown, at });
        let place = volume.place.as_ref().and_then(|(job, disk)| Some((*jobs.get(job)?, disk.clone())));
        if let Some((job, disk)) = &place {
            let row = DiskRow(next.disk);
            next.disk += 1;
            changes.push(Change::DiskAdd { row, job: *job, disk: disk.clone(), volume: id, epoch: NOT_MARKED, at });
        }
        places.insert(id, place);
    }
    let mut id = next.operation.max(record.past() + 1);
    let mut op = |verb, command, place: Option<(JobRow, _)>, volume, outcome, sentence| {
        let (job, disk) = place.unzip();
        changes.push(Change::OpBegin(Box::new(OpRow {
            id: OpId(id),
            fence: Fence::random(),
            verb,
            command,
            job,
            volume,
            disk,
            parent: None,
            detail: "{}".into(),
            step: "ended".into(),
            caller: Caller::daemon(),
            host: look.host(),
            boot: look.boot,
            began: at,
            ended: Some((outcome, sentence, at)),
        })));
        id += 1;
    };
    for old in &plan.unended {
        let place = places.get(&old.volume).cloned().flatten();
        let sentence = format!(
            "it was {} in the database that was imported (operation {}): look at the volume, then repeat it",
            old.state, old.old_id
        );
        op(old.verb, old.word.clone(), place, Some(old.volume), Outcome::Interrupted, sentence);
    }
    op(Verb::Set, format!("import {name}"), None, None, Outcome::Done, String::new());
    changes
}
