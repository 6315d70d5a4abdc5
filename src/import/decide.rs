//! What of a dump becomes the record's: pure. A volume goes into a job only where every row that
//! names it says the same; of everything else there is a [`Doubt`], with what to do about it.

use std::collections::{BTreeMap, BTreeSet, HashMap, HashSet};

use super::dump::shown;
use super::report::{Doubt, Kind};
use super::rows::{DiskSaid, JobSaid, Tables, Value};
use crate::model::{DiskName, JobId, Verb, VolumeId};
use crate::store::Loaded;

/// Longest `vm_name`, as the tree takes it.
const VM_NAME_MOST: usize = 255;

/// Which of the old tables makes the jobs.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum JobBy {
    /// `replication_jobs.id`.
    #[default]
    Job,
    /// `vm_replication_contexts.context_id`.
    Context,
}

/// A job that the record has not.
#[derive(Debug, Clone, PartialEq, Eq)]
#[allow(missing_docs)]
pub struct NewJob {
    pub id: JobId,
    pub vm_name: String,
}

/// A volume that the record has not.
#[derive(Debug, Clone, PartialEq, Eq)]
#[allow(missing_docs)]
pub struct NewVolume {
    pub id: VolumeId,
    pub name: String,
    /// As the old database had it; the cloud's word replaces it.
    pub size: u64,
    /// Whose it is; `None`: no job's.
    pub place: Option<(JobId, DiskName)>,
}

/// An operation that had not ended, on a volume that is new.
#[derive(Debug, Clone, PartialEq, Eq)]
#[allow(missing_docs)]
pub struct Unended {
    pub old_id: String,
    pub verb: Verb,
    pub word: String,
    pub state: String,
    pub volume: VolumeId,
}

/// What is to be written, and what is to be said.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Plan {
    /// In the order of their names.
    pub jobs: Vec<NewJob>,
    /// Those of jobs first, in the order of job and disk.
    pub volumes: Vec<NewVolume>,
    /// In the dump's order.
    pub unended: Vec<Unended>,
    /// Volumes of the dump that the record has already, unchanged.
    pub unchanged: usize,
    /// All that was not simply taken over.
    pub doubts: Vec<Doubt>,
}

impl Plan {
    /// Whether there is nothing to write.
    pub fn is_empty(&self) -> bool {
        self.jobs.is_empty() && self.volumes.is_empty()
    }
}

/// A disk of a job, as the tree will call it.
pub(super) type Slot = (JobId, DiskName);

/// Where a row of `vm_disks` says that its volume belongs.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Spot {
    Disk(JobId, DiskName),
    /// In no job that can be told: the row is a place of its own.
    Row(String),
}

impl Spot {
    fn words(&self) -> String {
        match self {
            Spot::Disk(job, disk) => format!("{job}/{disk}"),
            Spot::Row(row) => format!("row {row} of vm_disks"),
        }
    }

    /// The control file and the disk to claim it as.
    fn claim(&self, volume: VolumeId) -> String {
        match self {
            Spot::Disk(job, disk) => claim_line(volume, job.as_str(), Some(disk.as_str())),
            Spot::Row(_) => claim_line(volume, "JOB", None),
        }
    }
}

pub(super) fn claim_line(volume: VolumeId, job: &str, disk: Option<&str>) -> String {
    let disk = disk.map_or_else(String::new, |disk| format!(" {disk}"));
    format!("echo \"claim {volume}{disk}\" > jobs/{job}/control")
}

/// A value that says something.
pub(super) fn said(value: &Value) -> Option<&str> {
    value.as_deref().filter(|text| !text.trim().is_empty())
}

pub(super) struct Decider<'a> {
    pub tables: &'a Tables,
    by: JobBy,
    pub doubts: Vec<Doubt>,
    said: HashSet<(Kind, String)>,
    jobs_by_id: HashMap<&'a str, &'a JobSaid>,
    contexts: HashSet<&'a str>,
    /// `ossea_volumes.id` to what it names.
    rows: BTreeMap<String, BTreeSet<VolumeId>>,
    pub known: BTreeMap<VolumeId, (String, u64)>,
    pub jobs: BTreeMap<JobId, String>,
    /// What nobody gets: first reason stands.
    pub contested: BTreeSet<VolumeId>,
    /// Which places name a volume, through whichever link.
    pub named: BTreeMap<VolumeId, BTreeSet<Spot>>,
}

/// Decides. The same tables and the same record give the same plan.
pub fn decide(tables: &Tables, by: JobBy, record: Option<&Loaded>) -> Plan {
    let mut decider = Decider {
        tables,
        by,
        doubts: Vec::new(),
        said: HashSet::new(),
        jobs_by_id: tables.jobs.iter().rev().filter_map(|j| Some((j.id.as_deref()?, j))).collect(),
        contexts: tables.contexts.iter().filter_map(|c| c.id.as_deref()).collect(),
        rows: BTreeMap::new(),
        known: BTreeMap::new(),
        jobs: BTreeMap::new(),
        contested: BTreeSet::new(),
        named: BTreeMap::new(),
    };
    decider.volumes();
    decider.jobs();
    let owners = decider.disks();
    decider.against(record, owners)
}

impl Decider<'_> {
    pub(super) fn doubt(&mut self, kind: Kind, volumes: &[VolumeId], sentence: String, remedy: impl Into<String>) {
        if self.said.insert((kind, sentence.clone())) {
            self.doubts.push(Doubt { kind, volumes: volumes.to_vec(), sentence, remedy: remedy.into() });
        }
    }

    /// A volume's id as the contract writes it, whatever the old database made of it.
    fn uuid(&mut self, text: &str, whence: &str) -> Option<VolumeId> {
        let plain = text.trim().to_ascii_lowercase();
        match VolumeId::parse(&plain) {
            Ok(id) if !id.0.is_nil() => {
                if plain != text {
                    let sentence = format!("{whence} writes {id} as \"{}\": taken as {id}", shown(text));
                    self.doubt(Kind::Normalised, &[id], sentence, "nothing: it is the same volume");
                }
                Some(id)
            }
            _ => {
                let sentence = format!("{whence} is \"{}\", which is no UUID: skipped", shown(text));
                self.doubt(Kind::BadVolume, &[], sentence, "find the volume in the cloud, and `claim` it by its UUID");
                None
            }
        }
    }

    fn volumes(&mut self) {
        for row in &self.tables.volumes {
            let id = said(&row.row).unwrap_or("?").trim().to_owned();
            let whence = format!("volume_id of row {} of ossea_volumes", shown(&id));
            let Some(text) = said(&row.uuid) else {
                let sentence = format!("{whence} is empty: no volume was ever made for it");
                self.doubt(Kind::BadVolume, &[], sentence, "nothing, unless the cloud has one: then `claim` it");
                continue;
            };
            let Some(volume) = self.uuid(text, &whence) else { continue };
            self.rows.entry(id).or_default().insert(volume);
            let gib = said(&row.size_gb).and_then(|n| n.trim().parse::<u64>().ok());
            let size = gib.and_then(|n| n.checked_mul(1 << 30)).filter(|n| i64::try_from(*n).is_ok()).unwrap_or(0);
            let name = said(&row.name).filter(|n| clean(n)).unwrap_or_default().to_owned();
            self.known.entry(volume).or_insert((name, size));
        }
        for row in &self.tables.mappings {
            let Some(text) = said(&row.volume) else { continue };
            let Some(volume) = self.uuid(text, "the volume of a row of device_mappings") else { continue };
            if self.known.contains_key(&volume) {
                continue;
            }
            let vm = said(&row.vm).map_or_else(|| "a VM".to_owned(), |vm| format!("VM {}", shown(vm)));
            let sentence = format!(
                "volume {volume} is in device_mappings ({vm}), and in no row of ossea_volumes: known, and in no job"
            );
            self.doubt(Kind::MappingOnly, &[volume], sentence, claim_line(volume, "JOB", None));
            self.known.insert(volume, (String::new(), 0));
            self.contested.insert(volume);
        }
    }

    /// The job of that name; `None` once it is said why there cannot be one.
    fn job(&mut self, table: &str, id: &str) -> Option<JobId> {
        match JobId::parse(id) {
            Ok(job) => Some(job),
            Err(bad) => {
                let sentence = format!("{table} \"{}\" cannot be a job: a name is {}", shown(id), bad.rule);
                self.doubt(
                    Kind::BadJob,
                    &[],
                    sentence,
                    "mkdir a job of a valid name, and `claim` there the volumes that are named below",
                );
                None
            }
        }
    }

    fn add_job(&mut self, job: JobId, vm_name: &Value) {
        let name = match vm_name.as_deref().map(str::trim) {
            Some(name) if name.len() <= VM_NAME_MOST && clean(name) => name.to_owned(),
            None => String::new(),
            Some(_) => {
                let sentence = format!("the VM's name of job {job} is too long or has control characters: left out");
                self.doubt(Kind::BadVmName, &[], sentence, format!("echo NAME > jobs/{job}/vm_name"));
                String::new()
            }
        };
        let had = self.jobs.entry(job).or_default();
        if had.is_empty() {
            *had = name;
        }
    }

    fn jobs(&mut self) {
        let tables = self.tables;
        if self.by == JobBy::Context {
            for row in &tables.contexts {
                if let Some(id) = said(&row.id)
                    && let Some(job) = self.job("vm_replication_contexts.context_id", id)
                {
                    self.add_job(job, &row.vm_name);
                }
            }
        }
        // A job whose disks have contexts goes by them.
        let contexts: BTreeSet<&str> =
            tables.disks.iter().filter(|d| said(&d.context).is_some()).filter_map(|d| said(&d.job)).collect();
        for row in &tables.jobs {
            let Some(id) = said(&row.id) else { continue };
            if self.by == JobBy::Context && (said(&row.context).is_some() || contexts.contains(id)) {
                continue;
            }
            let Some(job) = self.job("replication_jobs.id", id) else { continue };
            if self.by == JobBy::Context {
                if self.contexts.contains(id) {
                    // Its disks, if any, are told apart below.
                    continue;
                }
                let sentence = format!("replication job {job} has no context: it is a job by its own name");
                self.doubt(Kind::NoContext, &[], sentence, "nothing, or `move` its volumes to the job they belong to");
            }
            self.add_job(job, &row.vm_name);
        }
    }

    /// The job of a row of `vm_disks`, or why it has none, and what to do.
    fn job_of(&self, n: usize) -> Result<JobId, (Kind, String)> {
        let disk = &self.tables.disks[n];
        let by_job = |id: &str| {
            let there = self.jobs_by_id.contains_key(id);
            match (JobId::parse(id), there) {
                (Ok(job), true) => Ok(job),
                (Err(_), true) => Err((Kind::BadJob, format!("its job \"{}\" has no valid name", shown(id)))),
                (_, false) => Err((Kind::JobMissing, format!("its job \"{}\" is not in replication_jobs", shown(id)))),
            }
        };
        let job = said(&disk.job);
        if self.by == JobBy::Job {
            return match job {
                Some(id) => by_job(id),
                None => Err((Kind::NoJob, "it is in no replication job (`--job-by context` goes by its VM)".into())),
            };
        }
        let of_job = job.and_then(|id| self.jobs_by_id.get(id)).and_then(|j| said(&j.context));
        match (said(&disk.context), of_job) {
            (Some(one), Some(other)) if one != other => Err((
                Kind::ContextsDiffer,
                format!("its own context is \"{}\", its replication job's is \"{}\"", shown(one), shown(other)),
            )),
            (Some(id), _) | (None, Some(id)) => {
                let there = self.contexts.contains(id);
                match (JobId::parse(id), there) {
                    (Ok(job), true) => Ok(job),
                    (Err(_), true) => Err((Kind::BadJob, format!("its context \"{}\" has no valid name", shown(id)))),
                    (_, false) => {
                        let words = format!("its context \"{}\" is not in vm_replication_contexts", shown(id));
                        Err((Kind::ContextMissing, words))
                    }
                }
            }
            (None, None) => match job {
                Some(id) if self.contexts.contains(id) => Err((
                    Kind::NameTwice,
                    format!("its replication job, without a context, has the name of the context \"{}\"", shown(id)),
                )),
                Some(id) => by_job(id),
                None => Err((Kind::NoJob, "it has neither context nor replication job".into())),
            },
        }
    }

    /// The owners on which all rows agree.
    fn disks(&mut self) -> BTreeMap<VolumeId, Slot> {
        let tables = self.tables;
        // Each place, what it names, and its rows' claims through the link that is kept.
        let mut spots: BTreeMap<Spot, BTreeSet<VolumeId>> = BTreeMap::new();
        let mut owners: BTreeMap<VolumeId, Slot> = BTreeMap::new();
        for (n, row) in tables.disks.iter().enumerate() {
            let number = said(&row.row).map_or_else(|| format!("#{}", n + 1), |id| shown(id.trim()));
            let job = self.job_of(n);
            let (kept, kept_fits) = self.kept_link(row, &number);
            let dropped = said(&row.volume_uuid).map(str::to_owned);
            let old =
                dropped.as_deref().and_then(|t| self.uuid(t, &format!("cloudstack_volume_uuid of vm_disks {number}")));
            // A value that cannot be read does not agree.
            let unread = dropped.is_some() && old.is_none();
            let only: Option<VolumeId> = kept.iter().next().or(old.as_ref()).copied();
            let spot = match &job {
                Ok(job) => {
                    self.add_job_of_disk(job.clone(), row);
                    match self.disk_name(row, job, only) {
                        Some(disk) => Spot::Disk(job.clone(), disk),
                        None => Spot::Row(number.clone()),
                    }
                }
                Err(_) => Spot::Row(number.clone()),
            };
            let all: BTreeSet<VolumeId> = kept.iter().copied().chain(old).collect();
            for volume in &all {
                self.named.entry(*volume).or_default().insert(spot.clone());
                self.known.entry(*volume).or_insert((String::new(), 0));
            }
            spots.entry(spot.clone()).or_default().extend(&all);
            let list: Vec<VolumeId> = all.iter().copied().collect();
            let shown_spot = spot.words();
            let what = said(&row.vmdk).map_or_else(String::new, |path| format!(" ({})", shown(path)));
            match (&job, &*list) {
                (_, []) => {
                    if kept_fits {
                        let sentence = format!("disk {shown_spot}{what} has no volume: nothing to import");
                        self.doubt(Kind::NoVolume, &[], sentence, "nothing, or `create` it when it is needed");
                    }
                }
                (Err((kind, why)), volumes) => {
                    for volume in volumes {
                        let sentence = format!("volume {volume} of {shown_spot}{what} is in no job: {why}");
                        self.doubt(*kind, &[*volume], sentence, claim_line(*volume, "JOB", None));
                        self.contested.insert(*volume);
                    }
                }
                (Ok(_), [one]) if kept.is_empty() => {
                    let sentence = if kept_fits {
                        format!(
                            "volume {one} is named for {shown_spot}{what} by cloudstack_volume_uuid alone, the link that \
                             went stale and was dropped: claimed by no job"
                        )
                    } else {
                        format!(
                            "volume {one} is named for {shown_spot}{what} by one link, and the other leads nowhere: \
                                 claimed by no job"
                        )
                    };
                    self.doubt(Kind::OldLinkOnly, &[*one], sentence, spot.claim(*one));
                    self.contested.insert(*one);
                }
                (Ok(_), [one]) if unread => {
                    let sentence = format!(
                        "volume {one} of {shown_spot}{what}: its cloudstack_volume_uuid names something that is no UUID: \
                         claimed by no job"
                    );
                    self.doubt(Kind::LinksDiffer, &[*one], sentence, spot.claim(*one));
                    self.contested.insert(*one);
                }
                (Ok(_), [one]) => {
                    if let Spot::Disk(job, disk) = &spot {
                        owners.insert(*one, (job.clone(), disk.clone()));
                    }
                }
                (Ok(_), several) => self.links_differ(&spot, &what, &kept, old, several),
            }
        }
        self.contradictions(&spots);
        owners.retain(|volume, _| !self.contested.contains(volume));
        owners
    }

    /// What `ossea_volume_id` leads to; false if it leads nowhere.
    fn kept_link(&mut self, row: &DiskSaid, number: &str) -> (BTreeSet<VolumeId>, bool) {
        let Some(link) = said(&row.volume_row) else { return (BTreeSet::new(), true) };
        if let Some(found) = self.rows.get(link.trim()) {
            return (found.clone(), true);
        }
        let sentence = format!(
            "ossea_volume_id of row {number} of vm_disks is {}, and no volume of that id is in ossea_volumes",
            shown(link)
        );
        self.doubt(
            Kind::Dangling,
            &[],
            sentence,
            "look in the cloud for a volume of that VM; `claim` it where it belongs, or leave it",
        );
        (BTreeSet::new(), false)
    }

    /// A job that only a disk names by its replication job in the mode of contexts.
    fn add_job_of_disk(&mut self, job: JobId, row: &DiskSaid) {
        if self.jobs.contains_key(&job) {
            return;
        }
        let sentence = format!("a disk of replication job {job} has no context: it is in a job by that name");
        self.doubt(Kind::NoContext, &[], sentence, "nothing, or `move` it to the job it belongs to");
        let of_job = row.job.as_deref().and_then(|id| self.jobs_by_id.get(id));
        let vm_name = of_job.and_then(|j| j.vm_name.clone());
        self.add_job(job, &vm_name);
    }

    /// The disk's name in the tree; its volume's UUID where it has no valid one of its own.
    fn disk_name(&mut self, row: &DiskSaid, job: &JobId, volume: Option<VolumeId>) -> Option<DiskName> {
        let text = row.disk.as_deref().unwrap_or_default();
        if let Ok(name) = DiskName::parse(text.trim()) {
            return Some(name);
        }
        let volume = volume?;
        let sentence =
            format!("disk \"{}\" of job {job} has no valid name: it is called by its volume's UUID", shown(text));
        self.doubt(Kind::BadDisk, &[volume], sentence, format!("echo \"disk NAME\" > volumes/{volume}/control"));
        DiskName::parse(&volume.to_string()).ok()
    }

    fn links_differ(
        &mut self,
        spot: &Spot,
        what: &str,
        kept: &BTreeSet<VolumeId>,
        old: Option<VolumeId>,
        several: &[VolumeId],
    ) {
        let of_row: Vec<_> = kept.iter().map(VolumeId::to_string).collect();
        let old = old.map_or_else(|| "nothing".to_owned(), |v| v.to_string());
        let sentence = format!(
            "disk {}{what} has two volumes: ossea_volume_id leads to {}, cloudstack_volume_uuid names {old}. None of \
             them is claimed by a job",
            spot.words(),
            if of_row.is_empty() { "nothing".into() } else { of_row.join(" and to ") },
        );
        let lines: Vec<_> = several.iter().map(|v| spot.claim(*v)).collect();
        let remedy = format!(
            "find out which is its own (unclaimed/UUID has name and size), and give that one line: {}",
            lines.join("  or  ")
        );
        self.doubt(Kind::LinksDiffer, several, sentence, remedy);
        self.contested.extend(several);
    }

    /// One place with several volumes, one volume in several places: nobody gets any of them.
    fn contradictions(&mut self, spots: &BTreeMap<Spot, BTreeSet<VolumeId>>) {
        let told: HashSet<Vec<VolumeId>> =
            self.doubts.iter().filter(|d| d.kind == Kind::LinksDiffer).map(|d| d.volumes.clone()).collect();
        for (spot, volumes) in spots.iter().filter(|(_, volumes)| volumes.len() > 1) {
            let list: Vec<VolumeId> = volumes.iter().copied().collect();
            self.contested.extend(&list);
            if told.contains(&list) || matches!(spot, Spot::Row(_)) {
                continue;
            }
            let names: Vec<_> = list.iter().map(VolumeId::to_string).collect();
            let sentence = format!(
                "disk {} has {} volumes: {}. None of them is claimed by a job",
                spot.words(),
                list.len(),
                names.join(", ")
            );
            let lines: Vec<_> = list.iter().map(|v| spot.claim(*v)).collect();
            let remedy = format!("find out which is its own, and give that one line: {}", lines.join("  or  "));
            self.doubt(Kind::TwoVolumes, &list, sentence, remedy);
        }
        let several: Vec<_> =
            self.named.iter().filter(|(_, spots)| spots.len() > 1).map(|(v, s)| (*v, s.clone())).collect();
        for (volume, spots) in several {
            let names: Vec<_> = spots.iter().map(Spot::words).collect();
            let sentence = format!("volume {volume} is named for {}: claimed by no job", names.join(" and for "));
            let lines: Vec<_> = spots.iter().map(|spot| spot.claim(volume)).collect();
            let remedy = format!("find out whose it is, and give that one line: {}", lines.join("  or  "));
            self.doubt(Kind::TwoPlaces, &[volume], sentence, remedy);
            self.contested.insert(volume);
        }
    }
}

fn clean(text: &str) -> bool {
    !text.chars().any(char::is_control)
}
