//! `problems`: all that is not in order, derived from the snapshot: what, since when, why, and what to do.

use super::super::tree::View;
use super::{component, components, in_doubt, row};
use crate::engine::world::{ErrorText, HistoryRow, Volume};
use crate::model::{Outcome, Status, Timestamp};

/// One row.
pub struct Problem {
    object: String,
    since: Timestamp,
    what: String,
    why: String,
    remedy: String,
}

/// The table; its header only is good.
pub fn text(view: &View<'_>) -> String {
    let mut text = String::from("object\tsince\twhat\twhy\tremedy\n");
    for p in rows(view) {
        row(&mut text, &[&p.object, &p.since.to_string(), &p.what, &p.why, &p.remedy]);
    }
    text
}

/// The rows: the daemon's own first, then jobs, volumes, unclaimed volumes, VMs.
pub fn rows(view: &View<'_>) -> Vec<Problem> {
    let world = view.world;
    let mut rows = Vec::new();
    for (name, c) in components(world) {
        let (word, why) = component(c);
        if word != "ok" {
            let remedy = match name {
                "keeper" => "unmount and mount again when nothing waits; until then do not kill the daemon".into(),
                "store" if world.read_only.is_some() => "health and the log name the ways out".into(),
                _ => "look at the log; volfs tries again by itself".into(),
            };
            rows.push(Problem {
                object: name.into(),
                since: world.health.at,
                what: word.into(),
                why: why.into(),
                remedy,
            });
        }
    }
    if let Some(why) = &world.read_only {
        let remedy = "health and the log name the ways out".into();
        let what = "read-only".into();
        rows.push(Problem { object: "volfs".into(), since: world.started, what, why: (**why).into(), remedy });
    }
    rows.extend(world.error.as_deref().map(|e| failed("/".into(), e)));
    for job in world.jobs.values() {
        rows.extend(job.error.as_deref().map(|e| failed(format!("jobs/{}", job.id), e)));
    }
    for volume in world.volumes.values() {
        let job = view.job(volume.job).map_or_else(|_| "-".into(), |j| j.id.to_string());
        let object = format!("jobs/{job}/volumes/{}", volume.uuid);
        rows.extend(of_volume(&object, volume));
    }
    for (id, u) in &world.unclaimed {
        if u.cloud.mark.is_some_and(|m| m.record == world.record) {
            rows.push(Problem {
                object: format!("unclaimed/{id}"),
                since: u.since,
                what: "marked".into(),
                why: "it carries this record's mark, but is in no job".into(),
                remedy: format!("`claim {id}` in a job"),
            });
        }
    }
    for (id, vm) in &world.vms {
        if vm.stale {
            rows.push(Problem {
                object: format!("vms/{id}"),
                since: vm.seen.unwrap_or(world.started),
                what: "stale".into(),
                why: "the cloud has not said for a while what is attached to it".into(),
                remedy: format!("`reconcile vm={id}` in /control once the cloud answers"),
            });
        }
    }
    rows
}

fn of_volume(object: &str, v: &Volume) -> Vec<Problem> {
    let mut rows = Vec::new();
    let status = v.status();
    if in_doubt(status) {
        let why = v.why.as_deref().map_or_else(|| default_why(status).to_owned(), str::to_owned);
        let remedy = match status {
            Status::Lost => "`attach` waits for the device, `detach` gives it up".into(),
            Status::Missing => format!("`delete {0}` or `release {0}` drops it from the record", v.uuid),
            Status::Conflict => {
                "owner and info.json say more; end the contradiction where it arose, then `reconcile`".into()
            }
            _ => "`reconcile`".into(),
        };
        rows.push(Problem { object: object.into(), since: v.times.status, what: status.as_str().into(), why, remedy });
    }
    match (v.error.as_deref(), v.history.last()) {
        (Some(e), _) => rows.push(failed(object.into(), e)),
        (None, Some(h)) => rows.extend(ended_badly(object, h)),
        (None, None) => {}
    }
    rows
}

fn default_why(status: Status) -> &'static str {
    match status {
        Status::Lost => "the cloud says it is attached here, the kernel has no such device",
        Status::Missing => "the cloud no longer knows it",
        Status::Conflict => "cloud, kernel and mark contradict one another",
        _ => "nobody could tell yet",
    }
}

fn failed(object: String, e: &ErrorText) -> Problem {
    let what = format!("{} failed ({})", e.verb, e.error.errno());
    // Some sentences have a line a disk; a cell has one.
    let why = e.error.to_string().replace('\n', "; ");
    let remedy = "repeat the command once its reason is gone; its success clears this".into();
    Problem { object, since: e.at, what, why, remedy }
}

fn ended_badly(object: &str, h: &HistoryRow) -> Option<Problem> {
    let default = match h.outcome {
        Outcome::Ambiguous => "there was no clear answer",
        Outcome::Interrupted => "volfs ended before it had begun, and does not begin such by itself",
        Outcome::Abandoned => "it was ended in the record only",
        Outcome::Done | Outcome::Failed | Outcome::Cancelled => return None,
    };
    Some(Problem {
        object: object.into(),
        since: h.at,
        what: format!("{} {}", h.verb, h.outcome.as_str()),
        why: if h.sentence.is_empty() { default.into() } else { h.sentence.to_string() },
        remedy: format!("look at status, then repeat `{}` if it is still wanted", h.verb),
    })
}
