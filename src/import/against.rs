//! A decision held against the record: what it has already stays as it is.

use std::collections::{BTreeMap, BTreeSet};

use super::decide::{Decider, NewJob, NewVolume, Plan, Slot, Unended, claim_line, said};
use super::dump::shown;
use super::report::{Doubt, Kind};
use super::rows::Value;
use crate::model::{JobId, Verb, VolumeId};
use crate::store::Loaded;

impl Decider<'_> {
    /// What of it the record has not.
    pub(super) fn against(mut self, record: Option<&Loaded>, owners: BTreeMap<VolumeId, Slot>) -> Plan {
        let mut had: BTreeMap<VolumeId, Slot> = BTreeMap::new();
        let mut taken: BTreeMap<Slot, VolumeId> = BTreeMap::new();
        let names: BTreeMap<_, _> =
            record.map_or_else(BTreeMap::new, |r| r.jobs.iter().map(|j| (j.row, j.id.clone())).collect());
        for disk in record.map_or(&[][..], |r| &r.disks) {
            if let Some(job) = names.get(&disk.job) {
                had.insert(disk.volume, (job.clone(), disk.disk.clone()));
                taken.insert((job.clone(), disk.disk.clone()), disk.volume);
            }
        }
        let loose: BTreeSet<VolumeId> = record.map_or_else(BTreeSet::new, |r| r.loose.iter().copied().collect());
        let rows: BTreeSet<VolumeId> =
            record.map_or_else(BTreeSet::new, |r| r.volume_rows.iter().map(|(id, _)| *id).collect());
        let named: BTreeSet<VolumeId> = self.named.keys().copied().collect();
        let (mut in_jobs, mut in_none, mut unchanged) = (BTreeMap::new(), Vec::new(), 0);
        for (volume, (name, size)) in self.known.clone() {
            let wanted = owners.get(&volume);
            if let Some((job, disk)) = had.get(&volume) {
                unchanged += 1;
                if let Some((other, name)) = wanted.filter(|w| **w != (job.clone(), disk.clone())) {
                    let sentence =
                        format!("volume {volume} is {job}/{disk} in the record, {other}/{name} in the dump: unchanged");
                    self.doubt(Kind::Elsewhere, &[], sentence, format!("`move` it, if the dump is right (jobs/{job})"));
                }
                continue;
            }
            if loose.contains(&volume) {
                unchanged += 1;
                if let Some((job, disk)) = wanted {
                    let sentence = format!("volume {volume} is known to the record already, in no job: unchanged");
                    let line = claim_line(volume, job.as_str(), Some(disk.as_str()));
                    self.doubt(Kind::KnownAlready, &[volume], sentence, line);
                }
                continue;
            }
            if rows.contains(&volume) {
                unchanged += 1;
                let sentence = format!("volume {volume} was in this record, and is gone from it: not imported again");
                self.doubt(Kind::Gone, &[volume], sentence, "nothing; `claim` it if it is there after all");
                continue;
            }
            let mut place = wanted.cloned();
            if let Some(other) = place.as_ref().and_then(|slot| taken.get(slot)) {
                let spot = wanted.map(|(job, disk)| format!("{job}/{disk}")).unwrap_or_default();
                let sentence = format!(
                    "volume {volume} is {spot} in the dump, and {other} is that in the record: claimed by no job"
                );
                self.doubt(Kind::DiskTaken, &[volume], sentence, claim_line(volume, "JOB", None));
                place = None;
            }
            if place.is_none() && !named.contains(&volume) && !self.contested.contains(&volume) {
                let sentence = format!("volume {volume}{} is named by no disk: known, and in no job", quoted(&name));
                self.doubt(Kind::NoDisk, &[volume], sentence, claim_line(volume, "JOB", None));
            }
            let new = NewVolume { id: volume, name, size, place: place.clone() };
            match place {
                Some(slot) => drop(in_jobs.insert(slot, new)),
                None => in_none.push(new),
            }
        }
        let live: BTreeSet<&JobId> = names.values().collect();
        let jobs = self.jobs.iter().filter(|(id, _)| !live.contains(id));
        let jobs = jobs.map(|(id, vm_name)| NewJob { id: id.clone(), vm_name: vm_name.clone() }).collect();
        let volumes: Vec<NewVolume> = in_jobs.into_values().chain(in_none).collect();
        let unended = self.unended(&volumes, &had);
        // What the operator has settled since is no doubt any more.
        let settled = |d: &Doubt| !d.volumes.is_empty() && d.volumes.iter().all(|v| had.contains_key(v));
        self.doubts.retain(|d| !settled(d));
        self.doubts.sort_by_key(|d| d.kind);
        Plan { jobs, volumes, unended, unchanged, doubts: self.doubts }
    }

    fn unended(&mut self, volumes: &[NewVolume], had: &BTreeMap<VolumeId, Slot>) -> Vec<Unended> {
        let new: BTreeSet<VolumeId> = volumes.iter().map(|v| v.id).collect();
        let mut unended = Vec::new();
        for op in &self.tables.operations {
            let text = |value: &Value| shown(said(value).unwrap_or("?").trim());
            let (id, word, state) = (text(&op.id), text(&op.kind), text(&op.state));
            let named = said(&op.volume).map(|t| t.trim().to_ascii_lowercase());
            let volume = named.and_then(|t| VolumeId::parse(&t).ok());
            match volume {
                Some(volume) if new.contains(&volume) => {
                    let verb = [Verb::Create, Verb::Attach, Verb::Detach, Verb::Delete]
                        .into_iter()
                        .find(|v| v.as_str().eq_ignore_ascii_case(&word))
                        .unwrap_or(Verb::Set);
                    unended.push(Unended { old_id: id, verb, word, state, volume });
                }
                Some(volume) if had.contains_key(&volume) || self.known.contains_key(&volume) => {}
                _ => {
                    let sentence = format!("operation {id} ({word}) was {state} and names no volume of the dump");
                    let remedy = "look in the cloud for what it made, or left half done";
                    let doubt = Doubt { kind: Kind::Unended, volumes: Vec::new(), sentence, remedy: remedy.into() };
                    self.doubts.push(doubt);
                }
            }
        }
        unended
    }
}

fn quoted(name: &str) -> String {
    if name.is_empty() { String::new() } else { format!(" (\"{}\")", shown(name)) }
}
