//! Admission of a volume's commands: pure, the contract's table X1 to X10.
//!
//! ```text
//!            in flight? ── equal command ──► Join
//!                │ └────── another ────────► Deny(InFlight)
//!                ▼ no
//!   may one? (root only, held job, own name repeated, provider) ── no ──► Deny
//!                ▼ yes
//!   status × command ──► Start · AlreadyDone · Reconcile, then this again · Deny
//! ```
//! Every denial is an [`Error`] with its sentence; nothing here waits, locks or asks anybody.

use crate::command::Action;
use crate::error::Error;
use crate::model::{Caller, DiskName, JobId, Mark, OpId, Status, Verb, VmId, VolumeId};

/// What is known of the volume that a command is for.
#[derive(Debug, Clone)]
pub struct Situation<'a> {
    /// Which.
    pub volume: VolumeId,
    /// The settled status.
    pub status: Status,
    /// The VM it is attached to, this host's own included.
    pub vm: Option<VmId>,
    /// The cloud's size in bytes.
    pub size: u64,
    /// Its job's name.
    pub job: &'a JobId,
    /// Its disk name.
    pub disk: &'a DiskName,
    /// Its job is held.
    pub held: bool,
    /// The operation in flight: number, what it does, its canonical spelling.
    pub running: Option<(OpId, &'a Action, &'a str)>,
    /// Our mark, as the record has it; its epoch is 0 for an imported volume that has none yet.
    pub mark: Mark,
    /// The mark last seen on it, as text.
    pub owner: &'a str,
    /// Why it is in conflict, lost or unknown.
    pub why: &'a str,
    /// This host.
    pub host: VmId,
    /// The provider's name.
    pub provider: &'static str,
    /// Whether the provider has snapshots.
    pub snapshots: bool,
    /// Whether the provider can pull a device from its users.
    pub can_force: bool,
    /// Sizes are multiples of this many bytes.
    pub size_step: u64,
}

/// What becomes of a command.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Verdict {
    /// Begin an operation.
    Start,
    /// The equal operation in flight: its outcome is this command's.
    Join(OpId),
    /// Nothing to do, and that is success.
    AlreadyDone,
    /// Find out first, then ask again.
    Reconcile,
    /// No.
    Deny(Error),
}

/// The VM a command speaks of, with `None` for this host.
fn elsewhere(vm: Option<VmId>, host: VmId) -> Option<VmId> {
    vm.filter(|vm| *vm != host)
}

/// Decides about one command for one volume.
pub fn admit(s: &Situation<'_>, action: &Action, caller: &Caller) -> Verdict {
    if let Some((id, running, spelled)) = s.running {
        if running == action {
            return Verdict::Join(id);
        }
        let object = format!("volume {}", s.volume);
        return Verdict::Deny(Error::InFlight { running: spelled.into(), id, object });
    }
    match may(s, action, caller) {
        Ok(()) => by_status(s, action),
        Err(error) => Verdict::Deny(error),
    }
}

/// What does not depend on the volume's status: who asks, the job's hold, the repeated name.
fn may(s: &Situation<'_>, action: &Action, caller: &Caller) -> Result<(), Error> {
    let wrong = |verb, given: &VolumeId| -> Result<(), Error> {
        if *given == s.volume {
            return Ok(());
        }
        Err(Error::WrongName { verb, given: given.to_string(), this: s.volume.to_string() })
    };
    match action {
        Action::Delete { volume, expunge } => {
            wrong(Verb::Delete, volume)?;
            if *expunge && !caller.is_root() {
                return Err(Error::RootOnly { what: "delete … expunge" });
            }
        }
        Action::Release { volume } => wrong(Verb::Release, volume)?,
        Action::Detach { vm, force: true } => {
            if !caller.is_root() {
                return Err(Error::RootOnly { what: "detach … force" });
            }
            if elsewhere(*vm, s.host).is_none() && !s.can_force && matches!(s.status, Status::Attached | Status::Lost) {
                return Err(Error::CannotForce { volume: s.volume });
            }
        }
        _ => {}
    }
    let taking = matches!(action.verb(), Verb::Delete | Verb::Destroy | Verb::Revert | Verb::Release | Verb::Move);
    if s.held && taking {
        return Err(Error::Held { job: s.job.clone() });
    }
    Ok(())
}

/// The table.
fn by_status(s: &Situation<'_>, action: &Action) -> Verdict {
    use Status::*;
    let deny = Verdict::Deny;
    let wrong = |way_out| deny(Error::WrongStatus { volume: s.volume, status: s.status, way_out });
    let absent = || deny(Error::NoSuchVolume { volume: s.volume });
    let on_other = || match s.vm {
        Some(vm) => deny(Error::AttachedElsewhere { volume: s.volume, vm }),
        None => wrong("the cloud does not say where; `reconcile` it"),
    };
    let contradiction = || deny(Error::Contradiction { volume: s.volume, why: s.why.into() });
    let not_ours = || {
        let expected = if s.mark.epoch == 0 { "own, which it has not got yet".into() } else { s.mark.to_string() };
        if s.owner.is_empty() || s.owner == expected {
            contradiction()
        } else {
            deny(Error::NotOurs { volume: s.volume, found: s.owner.into(), expected })
        }
    };
    let in_conflict =
        "cloud, kernel and mark contradict one another: `problems` says how; put that right, then `reconcile`";
    let lost = "the cloud says attached here, the kernel has no such device: `detach` it first";
    match action {
        Action::Attach { vm, .. } => match (elsewhere(*vm, s.host), s.status) {
            (_, Detached) => Verdict::Start,
            (None, Attached) => Verdict::AlreadyDone,
            (Some(_), Attached) => deny(Error::AttachedElsewhere { volume: s.volume, vm: s.host }),
            (Some(x), Remote) if s.vm == Some(x) => Verdict::AlreadyDone,
            (_, Remote) => on_other(),
            (None, Lost) => Verdict::Start,
            (Some(_), Lost) => wrong(lost),
            (_, Missing) => absent(),
            (_, Conflict) => wrong(in_conflict),
            _ => Verdict::Reconcile,
        },
        Action::Detach { vm, .. } => match (elsewhere(*vm, s.host), s.status) {
            (_, Detached | Missing) => Verdict::AlreadyDone,
            (None, Attached | Lost) => Verdict::Start,
            (None, Remote) | (Some(_), Attached) => Verdict::AlreadyDone,
            (Some(x), Remote) => {
                if s.vm == Some(x) {
                    Verdict::Start
                } else {
                    Verdict::AlreadyDone
                }
            }
            (Some(_), Lost) => wrong(lost),
            (None, Conflict) if s.owner == s.mark.to_string() => wrong(in_conflict),
            (_, Conflict) => not_ours(),
            _ => Verdict::Reconcile,
        },
        Action::Resize { .. } | Action::Snapshot { .. } => match s.status {
            Detached | Attached => supported(s, action),
            Remote => on_other(),
            Lost => wrong(lost),
            Missing => absent(),
            Conflict => not_ours(),
            _ => Verdict::Reconcile,
        },
        // Wherever the volume is: what is handed over for good is first freed of its snapshots.
        Action::DeleteSnapshot { .. } => match s.status {
            Detached | Attached | Remote | Lost => supported(s, action),
            Missing => absent(),
            Conflict => not_ours(),
            _ => Verdict::Reconcile,
        },
        Action::Revert { .. } => match s.status {
            Detached => supported(s, action),
            Attached => wrong("a volume is reverted only while detached: `detach` it first"),
            Remote => on_other(),
            Lost => wrong(lost),
            Missing => absent(),
            Conflict => not_ours(),
            _ => Verdict::Reconcile,
        },
        Action::Delete { .. } => match s.status {
            Detached | Missing => Verdict::Start,
            Attached => wrong("`detach` it first"),
            Remote => on_other(),
            Lost => wrong(lost),
            Conflict => not_ours(),
            _ => Verdict::Reconcile,
        },
        Action::Release { .. } => match s.status {
            Attached => wrong("`detach` it first"),
            _ => Verdict::Start,
        },
        Action::Disk { name } if name == s.disk && s.status != Conflict => Verdict::AlreadyDone,
        Action::Move { job } if job == s.job && s.status != Conflict => Verdict::AlreadyDone,
        Action::Move { .. } | Action::Disk { .. } => match s.status {
            Conflict => not_ours(),
            // Both tell the cloud beside our mark.
            Unknown if s.mark.epoch == 0 => Verdict::Reconcile,
            _ => Verdict::Start,
        },
        Action::Reconcile { .. } => Verdict::Start,
        Action::Create { .. }
        | Action::Claim { .. }
        | Action::Destroy { .. }
        | Action::Cancel { .. }
        | Action::Abandon { .. } => {
            deny(Error::Malformed { what: format!("`{}` is no command for a volume", action.verb()) })
        }
    }
}

/// What the size or the provider says to a command that the status allows.
fn supported(s: &Situation<'_>, action: &Action) -> Verdict {
    // What the provider would make of it: a size that was rounded up once is equal when asked again.
    let made = |size: u64| size.checked_next_multiple_of(s.size_step).unwrap_or(size);
    match action {
        Action::Resize { size } if made(*size) < s.size => {
            Verdict::Deny(Error::WouldShrink { volume: s.volume, have: s.size, asked: *size })
        }
        Action::Resize { size } if made(*size) == s.size => Verdict::AlreadyDone,
        Action::Snapshot { .. } | Action::Revert { .. } | Action::DeleteSnapshot { .. } if !s.snapshots => {
            Verdict::Deny(Error::Unsupported { provider: s.provider, what: action.verb().to_string() })
        }
        _ => Verdict::Start,
    }
}
