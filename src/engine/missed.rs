//! Events that readers were not told because their daemon was killed between a commit and its
//! publishing: the next daemon tells them before anything else.
//!
//! What was told is in the events that outlived it. An operation whose `begin` is there and whose
//! `end` is not, and which the record has as ended, was missed; a job likewise.

use std::collections::BTreeSet;

use serde_json::{Value, json};

use super::core::Core;
use super::events::Event;
use crate::model::{DiskName, JobId, JobRow, Outcome, Status, Verb, VolumeId};
use crate::store::{Loaded, OpRow};

/// What the readers were told so far, as far back as it is kept.
#[derive(Default)]
struct Told {
    begun: BTreeSet<i64>,
    ended: BTreeSet<i64>,
    made: BTreeSet<JobRow>,
    forgotten: BTreeSet<JobRow>,
    /// The time of the oldest event, as its line has it.
    since: String,
}

impl Told {
    fn by(events: &[Event]) -> Self {
        let mut told = Told::default();
        for event in events {
            let Ok(line) = serde_json::from_str::<Value>(&event.line) else { continue };
            let operation = line["operation"].as_i64();
            match (line["event"].as_str(), operation, event.job) {
                // A number whose beginning never reached the record is given again.
                (Some("begin"), Some(id), _) => {
                    told.begun.insert(id);
                    told.ended.remove(&id);
                }
                (Some("end"), Some(id), _) => drop(told.ended.insert(id)),
                (Some("job"), _, Some(job)) => drop(told.made.insert(job)),
                (Some("forgotten"), _, Some(job)) => drop(told.forgotten.insert(job)),
                _ => {}
            }
            if told.since.is_empty() {
                told.since = line["time"].as_str().unwrap_or_default().into();
            }
        }
        told
    }

    /// Whether the events go back to before this operation's would have come.
    fn reaches(&self, op: &OpRow, ended: &str) -> bool {
        let after_a_known_one = self.begun.first().is_none_or(|first| op.id.0 > *first);
        !self.since.is_empty() && after_a_known_one && *ended >= *self.since
    }
}

impl Core {
    /// Notes what the readers of `events` have missed; it goes out with the first publish.
    pub fn tell_missed(&mut self, events: &[Event], loaded: &Loaded) {
        let told = Told::by(events);
        for (op, job) in &loaded.history {
            let Some((outcome, sentence, at)) = &op.ended else { continue };
            let row = op.job;
            match (op.verb, outcome, row, job) {
                (Verb::Mkdir | Verb::Rmdir, Outcome::Done, Some(row), Some(id))
                    if told.reaches(op, &at.to_string()) =>
                {
                    self.missed_job(&told, op.verb, row, id);
                }
                (Verb::Mkdir | Verb::Rmdir | Verb::Set, ..) => {}
                _ if told.begun.contains(&op.id.0) && !told.ended.contains(&op.id.0) => {
                    self.missed_end(op, job.as_ref().map(JobId::as_str), *outcome, sentence);
                }
                _ => {}
            }
        }
    }

    /// A refused mkdir that was taken back later is in the history, too: what is there counts.
    fn missed_job(&mut self, told: &Told, verb: Verb, row: JobRow, id: &JobId) {
        let here = self.world.jobs.contains_key(&row);
        match verb {
            Verb::Mkdir if here && !told.made.contains(&row) => {
                self.event(Some(row), json!({"event": "job", "job": id.as_str()}));
            }
            Verb::Rmdir if !here && !told.forgotten.contains(&row) => {
                self.event(Some(row), json!({"event": "forgotten", "job": id.as_str()}));
            }
            _ => {}
        }
    }

    /// In the order of a publish: where the volume is now, whose it is, the end.
    fn missed_end(&mut self, op: &OpRow, job: Option<&str>, outcome: Outcome, sentence: &str) {
        let disk = op.disk.as_ref().map(DiskName::as_str);
        let owned = op.volume.and_then(|v| self.world.by_uuid.get(&v)).and_then(|row| self.world.volumes.get(row));
        let owned = owned.cloned();
        let belongs = |core: &mut Core, event: &str, job: Option<&str>, volume: VolumeId, status: Option<Status>| {
            let status = status.map(Status::as_str);
            core.event(op.job, json!({"event": event, "job": job, "disk": disk, "volume": volume, "status": status}));
        };
        match (op.volume, &owned, op.verb) {
            (Some(volume), Some(now), Verb::Create | Verb::Claim) if outcome == Outcome::Done => {
                belongs(self, "owned", job, volume, Some(now.recorded));
            }
            (Some(volume), None, Verb::Delete | Verb::Release) if outcome == Outcome::Done => {
                belongs(self, "disowned", job, volume, None);
                if op.verb == Verb::Delete {
                    self.event(None, json!({"event": "deleted", "volume": volume}));
                }
            }
            (Some(volume), Some(now), Verb::Move) if outcome == Outcome::Done => {
                belongs(self, "disowned", job, volume, None);
                let there = self.job_name(now.job);
                let there = there.as_ref().map(JobId::as_str);
                let fields = json!({"event": "owned", "job": there, "disk": now.disk.as_str(), "volume": volume,
                    "status": now.recorded.as_str()});
                self.event(Some(now.job), fields);
            }
            (Some(volume), Some(now), verb) => {
                if let Some(from) = verb.status_in_flight() {
                    let fields = json!({"event": "status", "job": job, "disk": disk, "volume": volume,
                        "from": from.as_str(), "to": now.recorded.as_str()});
                    self.event(op.job, fields);
                }
            }
            _ => {}
        }
        if op.verb == Verb::Destroy
            && outcome == Outcome::Done
            && let Some(job) = job
        {
            self.event(op.job, json!({"event": "forgotten", "job": job}));
        }
        let fields = json!({
            "event": "end", "operation": op.id, "command": op.command, "outcome": outcome.as_str(),
            "sentence": sentence, "job": job, "disk": disk, "volume": op.volume,
        });
        self.event(op.job, fields);
    }
}
