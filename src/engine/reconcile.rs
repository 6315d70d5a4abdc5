//! Reconciling: what the record, the cloud and the kernel say of one volume, made one answer. Pure.
//!
//! Observed truth corrects where a volume is; whose it is, nobody but the user corrects. What
//! cannot be told is `unknown`, what contradicts itself is `conflict` (rule R9).

use crate::cloud::CloudVolume;
use crate::model::{Disk, Incarnation, Mark, Status, VmId};

/// What the record says.
#[derive(Debug, Clone)]
pub struct Recorded {
    /// The settled status as last known; `Unknown` when nothing was seen since the start.
    pub status: Status,
    /// Where it is, as last known.
    pub vm: Option<VmId>,
    /// The incarnation it was mapped to, if it was.
    pub mapped: Option<Incarnation>,
    /// The cloud's size as last known, bytes.
    pub size: u64,
    /// Our mark.
    pub mark: Mark,
    /// It was imported, and no mark of ours is known to be on it.
    pub unmarked: Option<Unmarked>,
}

/// What is known of an imported volume beside the rest.
#[derive(Debug, Clone, Default)]
pub struct Unmarked {
    /// Epochs of operations of ours that were to mark it, and ended without knowing that they did.
    pub tried: Vec<u64>,
    /// Why the kernel says that one of its disks carries this host.
    pub carries_host: Option<String>,
}

/// What the cloud said when it was asked.
#[derive(Debug, Clone)]
pub enum CloudView<'a> {
    /// It did not answer, or was not asked.
    Unseen,
    /// It has not answered for so long that what it said last is no truth any more.
    Stale,
    /// It answered and knows no such volume; confirmed when two looks far enough apart agree.
    Absent {
        /// Whether to believe it.
        confirmed: bool,
    },
    /// It knows the volume.
    Seen(&'a CloudVolume),
}

/// What is constant.
#[derive(Debug, Clone, Copy)]
pub struct Rules {
    /// This host.
    pub host: VmId,
    /// Whether the kernel's size must equal the cloud's, or may be larger (rule D3).
    pub exact_size: bool,
}

/// The one answer.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Finding {
    /// The status.
    pub status: Status,
    /// Where it is.
    pub vm: Option<VmId>,
    /// The disk that is its device; only with status attached.
    pub device: Option<Disk>,
    /// Why, for lost, missing, unknown and conflict.
    pub why: Option<String>,
    /// It was attached or detached behind our back.
    pub drift: bool,
    /// It was imported, and nothing is in the way of our mark.
    pub markable: bool,
}

/// Brings the three views together. `candidates` are the disks whose identity names the volume.
pub fn settle(recorded: &Recorded, cloud: &CloudView<'_>, candidates: &[Disk], rules: Rules) -> Finding {
    let finding = match cloud {
        CloudView::Unseen => without_cloud(recorded, candidates, rules),
        CloudView::Stale => too_old(recorded, without_cloud(recorded, candidates, rules)),
        CloudView::Absent { confirmed } => absent(*confirmed, candidates),
        CloudView::Seen(seen) => match &recorded.unmarked {
            Some(unmarked) => imported(recorded, unmarked, seen),
            None => with_cloud(recorded, seen, candidates, rules),
        },
    };
    let placed = |s: Status| matches!(s, Status::Attached | Status::Remote | Status::Detached | Status::Lost);
    let drift = placed(recorded.status)
        && (finding.status != recorded.status || finding.vm != recorded.vm)
        && finding.status != Status::Unknown;
    Finding { drift, ..finding }
}

fn found(status: Status, vm: Option<VmId>, why: Option<String>) -> Finding {
    Finding { status, vm, device: None, why, drift: false, markable: false }
}

fn conflict(vm: Option<VmId>, why: String) -> Finding {
    found(Status::Conflict, vm, Some(why))
}

fn names(disks: &[Disk]) -> String {
    disks.iter().map(|d| format!("/dev/{}", d.name)).collect::<Vec<_>>().join(" and ")
}

fn absent(confirmed: bool, candidates: &[Disk]) -> Finding {
    if !candidates.is_empty() {
        let why = format!("{} carries its identity, but the cloud knows no such volume", names(candidates));
        return conflict(None, why);
    }
    if confirmed {
        return found(Status::Missing, None, Some("the cloud knows no such volume, asked twice".into()));
    }
    let why = "the cloud does not show it; a second look decides whether it is gone";
    found(Status::Unknown, None, Some(why.into()))
}

fn without_cloud(recorded: &Recorded, candidates: &[Disk], rules: Rules) -> Finding {
    if candidates.len() > 1 {
        let why = format!("{} carry the same identity", names(candidates));
        return conflict(recorded.vm, why);
    }
    let same = candidates.iter().find(|d| Some(d.incarnation) == recorded.mapped);
    match (recorded.status, same, candidates.first()) {
        (Status::Conflict, _, _) => {
            conflict(recorded.vm, "it was in conflict, and the cloud was not seen since".into())
        }
        (Status::Attached, Some(disk), _) => size_checked(recorded, recorded.size, disk, rules),
        (Status::Attached | Status::Lost, None, None) => {
            found(Status::Lost, Some(rules.host), Some("the device is gone from the kernel".into()))
        }
        (Status::Detached, _, Some(disk)) => {
            conflict(None, format!("/dev/{} carries its identity, but it is not attached here", disk.name))
        }
        (Status::Remote, _, Some(disk)) => {
            conflict(recorded.vm, format!("/dev/{} carries its identity, but it is on another VM", disk.name))
        }
        (Status::Detached, _, None) => found(Status::Detached, None, None),
        (Status::Remote, _, None) => found(Status::Remote, recorded.vm, None),
        (Status::Missing, _, None) => found(Status::Missing, None, Some("the cloud knew no such volume".into())),
        _ if recorded.unmarked.is_some() => {
            found(Status::Unknown, recorded.vm, Some("it was imported and not yet seen in the cloud".into()))
        }
        _ => found(Status::Unknown, recorded.vm, Some("the cloud was not seen yet".into())),
    }
}

/// What only the cloud can say is not known any more; a device that is here still is (row V3).
fn too_old(recorded: &Recorded, finding: Finding) -> Finding {
    match finding.status {
        Status::Detached | Status::Remote | Status::Missing | Status::Lost => {
            let why = format!("it was {} when the cloud was last seen, too long ago", finding.status);
            found(Status::Unknown, recorded.vm, Some(why))
        }
        _ => finding,
    }
}

/// Rule D3: exact when a disk is verified for the first time; a disk that was, may have grown since.
fn size_checked(recorded: &Recorded, size: u64, disk: &Disk, rules: Rules) -> Finding {
    let verified = recorded.status == Status::Attached && recorded.mapped == Some(disk.incarnation);
    let fits = if rules.exact_size && !verified { disk.size == size } else { disk.size >= size };
    if !fits {
        let why = format!("/dev/{} has {} bytes, the cloud says {}", disk.name, disk.size, size);
        return conflict(Some(rules.host), why);
    }
    Finding { device: Some(disk.clone()), ..found(Status::Attached, Some(rules.host), None) }
}

/// An imported volume, as the cloud shows it: until our mark is on it, it is served and changed by nobody here.
/// Only a volume without a mark may get one, and one whose mark an operation of ours left on it.
fn imported(recorded: &Recorded, unmarked: &Unmarked, seen: &CloudVolume) -> Finding {
    let at = seen.attached.map(|a| a.vm);
    if let Some(why) = seen.carries_host.as_ref().or(unmarked.carries_host.as_ref()) {
        return conflict(
            at,
            format!("it was imported, and carries this host ({why}): it is never marked; `release` it"),
        );
    }
    match seen.mark {
        Some(mark) if mark.record != recorded.mark.record => {
            let why =
                format!("it was imported, and carries the mark {mark} of another record, which owns it: `release` it");
            conflict(at, why)
        }
        Some(mark) if !unmarked.tried.contains(&mark.epoch) => {
            let why =
                format!("it was imported, and carries the mark {mark} from before: `release` it, then `claim` it");
            conflict(at, why)
        }
        Some(_) | None => {
            let why = "it was imported, and our mark is not on it yet: `error` says so if that failed, `reconcile` tries \
                       again at once";
            Finding { markable: true, ..found(Status::Unknown, at, Some(why.into())) }
        }
    }
}

fn with_cloud(recorded: &Recorded, seen: &CloudVolume, candidates: &[Disk], rules: Rules) -> Finding {
    let at = seen.attached.map(|a| a.vm);
    if seen.mark != Some(recorded.mark) {
        let whose = seen.mark.map_or_else(|| "no mark".into(), |m| format!("the mark {m}"));
        return conflict(at, format!("it carries {whose}, the record's is {}", recorded.mark));
    }
    match (at, candidates) {
        (_, [_, _, ..]) => conflict(at, format!("{} carry the same identity", names(candidates))),
        (Some(vm), [disk]) if vm == rules.host => size_checked(recorded, seen.size, disk, rules),
        (Some(vm), []) if vm == rules.host => {
            let why = "the cloud says it is attached here, the kernel has no such device";
            found(Status::Lost, Some(vm), Some(why.into()))
        }
        (Some(vm), []) => found(Status::Remote, Some(vm), None),
        (Some(vm), [disk]) => {
            conflict(Some(vm), format!("/dev/{} carries its identity, but the cloud says it is on VM {vm}", disk.name))
        }
        (None, [disk]) => {
            conflict(None, format!("/dev/{} carries its identity, but the cloud says it is free", disk.name))
        }
        (None, []) => found(Status::Detached, None, None),
    }
}
