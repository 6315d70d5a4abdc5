//! `volfs adopt`, `backup`, `restore` and `rebuild`: what is done to a record by hand. But for
//! `backup` no daemon may have it; the state directory's lock sees to that.
//!
//! None of them changes anything in the provider: it is asked for the marks that the volumes carry.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::path::Path;
use std::sync::Arc;
use std::time::SystemTime;

use crate::binding::{self, Here};
use crate::cloud::{Cloud, Marked};
use crate::config::{Config, Problem};
use crate::daemon;
use crate::model::{
    BootId, Caller, DiskName, DiskRow, Fence, JobId, JobRow, OpId, Outcome, RecordId, Status, Timestamp, Verb, VmId,
    VolumeRow,
};
use crate::store::{self, Change, Loaded, Offline, OpRow, StoreError};

mod import;

pub use import::{Import, import};

const BOOT_ID: &str = "/proc/sys/kernel/random/boot_id";

fn said(error: StoreError) -> Problem {
    Problem(error.to_string())
}

fn now() -> Timestamp {
    Timestamp::from(SystemTime::now())
}

/// The provider, to look only, and where it is.
struct Look {
    cloud: Arc<dyn Cloud>,
    here: Here,
    boot: BootId,
    runtime: tokio::runtime::Runtime,
}

impl Look {
    fn open(config: &Config) -> Result<Self, Problem> {
        // What a crash left half done in the provider is the daemon's to finish.
        Self::making(&Config { read_only: true, ..config.clone() })
    }

    /// As [`Look::open`], of a loop store that may have to be made first.
    fn making(config: &Config) -> Result<Self, Problem> {
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build()
            .map_err(|e| Problem::with("cannot start worker threads", e))?;
        let text = std::fs::read_to_string(BOOT_ID).map_err(|e| Problem::with(BOOT_ID, e))?;
        let boot = BootId::parse(text.trim()).map_err(|e| Problem::with(BOOT_ID, e))?;
        let (cloud, here) = runtime.block_on(daemon::provider(config, boot))?;
        Ok(Look { cloud, here, boot, runtime })
    }

    /// Every mark that the provider shows; lines about what it cannot tell go to `lines`.
    fn marks(&self, lines: &mut Vec<String>) -> Result<Vec<Marked>, Problem> {
        let (found, untold) = self.runtime.block_on(self.cloud.marked()).map_err(|e| {
            Problem(format!("the provider does not tell which volumes carry which mark: {e}; nothing was changed"))
        })?;
        lines.extend(untold.into_iter().map(|words| format!("cannot be read, and may carry a mark: {words}")));
        Ok(found)
    }

    fn host(&self) -> VmId {
        self.cloud.about().host
    }
}

/// The row of `history` that says what was done here. Its number is above every one that a record in
/// this directory ever gave, and `epoch` is given from then on.
fn noted(look: &Look, record: &Offline, loaded: &Loaded, command: String, epoch: u64) -> Change {
    let at = now();
    Change::OpBegin(Box::new(OpRow {
        id: OpId(loaded.next.operation.max(record.past() + 1)),
        fence: Fence::random(),
        verb: Verb::Set,
        command,
        job: None,
        volume: None,
        disk: None,
        parent: None,
        detail: serde_json::json!({ "epoch": epoch }).to_string(),
        step: "ended".into(),
        caller: Caller::daemon(),
        host: look.host(),
        boot: look.boot,
        began: at,
        ended: Some((Outcome::Done, String::new(), at)),
    }))
}

/// What had not ended is nobody's to finish: the record does not know what became of it.
fn interrupted(loaded: &Loaded, changes: &mut Vec<Change>, lines: &mut Vec<String>) {
    for op in &loaded.unfinished {
        let sentence = "its record was adopted before it had ended: look at the volume, then repeat it".to_owned();
        changes.push(Change::OpEnd { id: op.id, outcome: Outcome::Interrupted, sentence, at: now() });
        lines.push(format!("operation {} `{}` had not ended: interrupted", op.id, op.command));
    }
}

fn tell(lines: &[String]) -> Result<(), Problem> {
    use std::io::Write;
    let mut out = std::io::stdout().lock();
    lines.iter().try_for_each(|line| writeln!(out, "{line}")).map_err(|e| Problem::with("standard output", e))
}

/// `volfs adopt --this-host`, or `--new`.
pub fn adopt(config: &Config, new: bool) -> Result<(), Problem> {
    let mut record = Offline::open(&config.state_dir, false).map_err(said)?;
    let look = Look::open(config)?;
    let loaded = record.load().map_err(said)?;
    let mut lines = Vec::new();
    let (changes, identity) = match new {
        true => own_record(&look, &record, &loaded, &mut lines),
        false => {
            binding::may_be_bound(config, &look.here)?;
            (this_host(&look, &record, &loaded, &mut lines)?, None)
        }
    };
    record.commit(&changes, identity).map_err(said)?;
    binding::bind(config, &look.here)?;
    tell(&lines)
}

fn this_host(look: &Look, record: &Offline, loaded: &Loaded, lines: &mut Vec<String>) -> Result<Vec<Change>, Problem> {
    let mut untold = Vec::new();
    let mut marks = look.marks(&mut untold)?;
    marks.retain(|m| m.mark.record == loaded.record);
    let epoch = marks.iter().map(|m| m.mark.epoch).max().unwrap_or(0).max(loaded.next.epoch - 1);
    lines.push(format!("record {} is bound to {}", loaded.record, look.here));
    let mut changes = Vec::new();
    interrupted(loaded, &mut changes, lines);
    for disk in &loaded.disks {
        changes.push(Change::MappingEnd { volume: disk.volume });
        changes.push(Change::VolumeStatus { volume: disk.volume, status: Status::Unknown, at: now() });
    }
    changes.push(noted(look, record, loaded, "adopt --this-host".into(), epoch));
    lines.push(format!(
        "{} volumes in {} jobs: unknown, until volfs has looked at each",
        loaded.disks.len(),
        loaded.jobs.len()
    ));
    let marked: BTreeSet<_> = marks.iter().filter(|m| !m.deleted).map(|m| m.volume.id).collect();
    for disk in loaded.disks.iter().filter(|d| !marked.contains(&d.volume)) {
        let job = loaded.jobs.iter().find(|j| j.row == disk.job).map_or("?", |j| j.id.as_str());
        lines.push(format!(
            "volume {} ({job}/{}) carries no mark of this record any more, or is gone: it will be in conflict or \
             missing; `release` it there",
            disk.volume, disk.disk
        ));
    }
    let owned: HashMap<_, _> = loaded.disks.iter().map(|d| (d.volume, d.epoch)).collect();
    for m in marks.iter().filter(|m| !m.deleted) {
        let names = format!("{}/{}", m.job.as_deref().unwrap_or("?"), m.disk.as_deref().unwrap_or("?"));
        match owned.get(&m.volume.id) {
            Some(epoch) if *epoch == m.mark.epoch => {}
            Some(epoch) => lines.push(format!(
                "volume {} ({names}) carries epoch {}, the record says {epoch}: it will be in conflict; `release` it \
                 there, and `claim` it where it belongs",
                m.volume.id, m.mark.epoch
            )),
            None => lines.push(format!(
                "volume {} ({names}) carries this record's mark and is in no job of it: `claim` it",
                m.volume.id
            )),
        }
    }
    lines.append(&mut untold);
    lines.push("next: `volfs mount`, then look at `problems`".into());
    Ok(changes)
}

fn own_record(
    look: &Look,
    record: &Offline,
    loaded: &Loaded,
    lines: &mut Vec<String>,
) -> (Vec<Change>, Option<RecordId>) {
    let identity = RecordId::random();
    lines.push(format!("record {identity}, which was {}, is bound to {}", loaded.record, look.here));
    let mut changes = Vec::new();
    interrupted(loaded, &mut changes, lines);
    changes.extend(loaded.snapshots.iter().map(|s| Change::SnapshotGone { row: s.row, at: now() }));
    for disk in &loaded.disks {
        changes.push(Change::MappingEnd { volume: disk.volume });
        changes.push(Change::DiskEnd { row: disk.row });
    }
    let known = loaded.disks.iter().map(|d| d.volume).chain(loaded.loose.iter().copied());
    changes.extend(known.map(|volume| Change::VolumeGone { volume, at: now() }));
    changes.push(noted(look, record, loaded, "adopt --new".into(), loaded.next.epoch - 1));
    lines.push(format!(
        "{} volumes are this record's no more, and were not touched: they carry the mark of {}",
        loaded.disks.len(),
        loaded.record
    ));
    lines.push(format!("{} jobs stay, and are empty: rmdir those that are of no use", loaded.jobs.len()));
    (changes, Some(identity))
}

/// `volfs backup FILE`.
pub fn backup(config: &Config, file: &Path) -> Result<(), Problem> {
    store::backup(&config.state_dir, file).map_err(said)?;
    let bytes = std::fs::metadata(file).map_err(|e| Problem::with(file.display(), e))?.len();
    tell(&[format!("{} holds the record of {} ({bytes} bytes)", file.display(), config.state_dir.display())])
}

/// `volfs restore FILE`.
pub fn restore(config: &Config, file: &Path) -> Result<(), Problem> {
    let store::Restored { aside, loaded } = store::restore(&config.state_dir, file).map_err(said)?;
    let mut lines = vec![format!(
        "record {} is in place: {} jobs, {} volumes, as of operation {}",
        loaded.record,
        loaded.jobs.len(),
        loaded.disks.len(),
        loaded.next.operation - 1
    )];
    lines.extend(aside.map(|path| format!("the one that was there is {}", path.display())));
    lines.push("it may be older than its volumes, and nothing is done by it until you say that it may:".into());
    lines.push("next: `volfs adopt --this-host`; or `volfs mount` to see what it holds, read-only".into());
    tell(&lines)
}

/// `volfs rebuild`.
pub fn rebuild(config: &Config, named: Option<&str>) -> Result<(), Problem> {
    let named = named.map(RecordId::parse).transpose().map_err(|e| Problem(e.to_string()))?;
    let look = Look::open(config)?;
    let mut record = Offline::open(&config.state_dir, true).map_err(said)?;
    let loaded = record.load().map_err(said)?;
    if !loaded.jobs.is_empty() || !loaded.disks.is_empty() || !loaded.unfinished.is_empty() {
        return Err(Problem(format!(
            "the record in {} is not empty ({} jobs, {} volumes): move its volfs.db away, or name another state \
             directory; nothing was changed",
            config.state_dir.display(),
            loaded.jobs.len(),
            loaded.disks.len()
        )));
    }
    binding::may_be_bound(config, &look.here)?;
    let mut lines = Vec::new();
    let marks = look.marks(&mut lines)?;
    let identity = whose(&marks, named, &lines)?;
    let mut marks: Vec<Marked> = marks.into_iter().filter(|m| m.mark.record == identity).collect();
    marks.sort_by_key(|m| (m.mark.epoch, m.volume.id));
    let epoch = marks.iter().map(|m| m.mark.epoch).max().unwrap_or(0);
    let (mut changes, told) = from_marks(&loaded, &marks);
    changes.push(noted(&look, &record, &loaded, format!("rebuild --record {identity}"), epoch));
    record.commit(&changes, Some(identity)).map_err(said)?;
    binding::bind(config, &look.here)?;
    lines.splice(0..0, told);
    lines.insert(0, format!("record {identity} is bound to {}", look.here));
    lines.push("not in any mark, and lost: `vm_name`, `hold`, history, and which snapshots are volfs's own".into());
    lines.push("make sure that no other volfs works with this record; next: `volfs mount`".into());
    tell(&lines)
}

/// The one record whose marks are taken. A mark that cannot be read is of a record that nobody has.
fn whose(marks: &[Marked], named: Option<RecordId>, untold: &[String]) -> Result<RecordId, Problem> {
    let mut found: BTreeMap<RecordId, usize> = BTreeMap::new();
    for m in marks.iter().filter(|m| !m.deleted && !m.mark.record.0.is_nil()) {
        *found.entry(m.mark.record).or_default() += 1;
    }
    let list = || found.iter().map(|(r, n)| format!("\n  {r} on {n} volumes")).collect::<String>();
    let beside = || untold.iter().map(|words| format!("\n  {words}")).collect::<String>();
    match (named, found.keys().next()) {
        (Some(named), _) if found.contains_key(&named) => Ok(named),
        (_, None) => {
            Err(Problem(format!("no volume that the provider shows carries a mark; nothing was changed{}", beside())))
        }
        (None, Some(one)) if found.len() == 1 => Ok(*one),
        (None, _) => Err(Problem(format!(
            "volumes carry the marks of several records: name one with --record, that no other volfs works with; \
             nothing was changed{}",
            list()
        ))),
        (Some(named), _) => Err(Problem(format!(
            "no volume carries a mark of record {named}; nothing was changed. There are:{}",
            list()
        ))),
    }
}

/// The jobs and disks that these marks name, and a line for each job and for each volume that is left alone.
fn from_marks(loaded: &Loaded, marks: &[Marked]) -> (Vec<Change>, Vec<String>) {
    let (mut changes, mut lines) = (Vec::new(), Vec::new());
    let label = |m: &Marked| {
        let job =
            JobId::parse(m.job.as_deref().ok_or("no job is named beside its mark")?).map_err(|e| e.to_string())?;
        let disk =
            DiskName::parse(m.disk.as_deref().ok_or("no disk is named beside its mark")?).map_err(|e| e.to_string())?;
        Ok::<_, String>((job, disk))
    };
    let (mut once, mut doubled) = (BTreeSet::new(), BTreeSet::new());
    for named in marks.iter().filter(|m| !m.deleted).filter_map(|m| label(m).ok()) {
        if !once.insert(named.clone()) {
            doubled.insert(named);
        }
    }
    let rows: HashMap<_, _> = loaded.volume_rows.iter().copied().collect();
    let mut next = loaded.next;
    let mut jobs: BTreeMap<JobId, (JobRow, Vec<String>)> = BTreeMap::new();
    for m in marks.iter().filter(|m| !m.deleted) {
        let volume = m.volume.id;
        let named = label(m).and_then(|named| match (doubled.contains(&named), &m.volume.carries_host) {
            (true, _) => Err(format!("another volume carries the names {}/{}, too", named.0, named.1)),
            (_, Some(why)) => Err(why.clone()),
            _ => Ok(named),
        });
        let (job, disk) = match named {
            Ok(named) => named,
            Err(why) => {
                lines.push(format!("left alone: volume {volume}: {why}; `claim` it once volfs runs"));
                continue;
            }
        };
        let at = now();
        let (row, disks) = jobs.entry(job.clone()).or_insert_with(|| {
            let row = JobRow(next.job);
            next.job += 1;
            changes.push(Change::JobAdd { row, id: job, at });
            (row, Vec::new())
        });
        disks.push(disk.to_string());
        let volume_row = rows.get(&volume).copied().unwrap_or_else(|| {
            next.volume += 1;
            VolumeRow(next.volume - 1)
        });
        let (name, size) = (m.volume.name.clone(), m.volume.size);
        changes.push(Change::VolumeAdd { row: volume_row, volume, name, size, at });
        let epoch = m.mark.epoch;
        changes.push(Change::DiskAdd { row: DiskRow(next.disk), job: *row, disk, volume, epoch, at });
        next.disk += 1;
    }
    let made = jobs.iter().map(|(job, (_, disks))| format!("job {job}: {}", disks.join(" ")));
    (changes, made.chain(lines).collect())
}
