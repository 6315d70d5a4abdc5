//! The book: what was asked of the cloud, by whom, after which look, what took effect, and what the
//! record claims of it. Written by the ports, never seen by the engine.

use std::collections::{BTreeMap, HashMap};

use super::sky::Do;
use super::{Point, Sim};
use crate::cloud::CloudVolume;
use crate::command::{self, Action, Place};
use crate::model::{DiskRow, Fence, Mark, OpId, Outcome, Status, Verb, VmId, VolumeId};
use crate::store::Change;

/// A look at a volume, as its asker heard it.
#[derive(Debug, Clone)]
struct Look {
    heard: u64,
    seen: Option<CloudVolume>,
}

/// An effect on the books.
#[derive(Debug, Clone)]
struct Effect {
    what: Do,
    volume: VolumeId,
}

#[derive(Debug, Clone, Copy)]
struct Begun {
    id: OpId,
    life: u64,
    at: u64,
}

/// What a volume was proved to be, and nothing has touched since.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Calm {
    pub status: Status,
}

#[derive(Default)]
pub struct Book {
    looks: BTreeMap<VolumeId, Look>,
    effects: HashMap<Fence, Vec<Effect>>,
    begun: HashMap<Fence, Begun>,
    ended: HashMap<Fence, Outcome>,
    /// When somebody else last changed it, in the cloud or in the kernel.
    touched: BTreeMap<VolumeId, u64>,
    pub calm: BTreeMap<VolumeId, Calm>,
    pub violations: Vec<String>,
    pub edges: BTreeMap<(Status, Status), u64>,
    pub ends: HashMap<(Verb, Outcome), u64>,
    pub statuses: BTreeMap<DiskRow, Status>,
    /// When a look of this life first did not show a volume.
    pub absent: BTreeMap<VolumeId, u64>,
}

fn taking_begins(what: &Do) -> bool {
    !matches!(what, Do::Create { .. } | Do::Mark { .. })
}

fn expected_vm(action: &Action, host: VmId) -> Option<VmId> {
    match action {
        Action::Attach { vm, .. } | Action::Detach { vm, .. } => Some(vm.unwrap_or(host)),
        _ => None,
    }
}

impl Sim {
    /// The mark that the record has for a volume.
    pub fn our_mark(&self, volume: VolumeId) -> Option<Mark> {
        let state = self.state();
        let own = state.record.owns.values().find(|own| own.volume == volume)?;
        Some(Mark { record: self.0.record, epoch: own.epoch })
    }

    /// Somebody else changes it.
    pub fn touched(&self, volume: VolumeId) {
        let now = self.now();
        let mut state = self.state();
        state.book.touched.insert(volume, now);
        state.book.calm.remove(&volume);
    }

    pub fn looked(&self, volume: VolumeId, seen: Option<&CloudVolume>) {
        let heard = self.now();
        self.state().book.looks.insert(volume, Look { heard, seen: seen.cloned() });
    }

    /// S3, S8, R10 and the journal: whether this may be asked of the cloud at all.
    pub fn called(&self, life: u64, fence: Fence, volume: Option<VolumeId>, what: &Do) {
        let wrong = |words: String| self.violation(format!("{what:?} of {volume:?}: {words}"));
        let (begun, ended, look, created) = {
            let state = self.state();
            let book = &state.book;
            let look = volume.and_then(|v| book.looks.get(&v).cloned());
            let created = state.sky.created.contains_key(&fence);
            (book.begun.get(&fence).copied(), book.ended.get(&fence).copied(), look, created)
        };
        let Some(begun) = begun else { return wrong("it was never journaled".into()) };
        if let Some(outcome) = ended {
            wrong(format!("its operation has ended ({})", outcome.as_str()));
        }
        if begun.life != life && (taking_begins(what) || (matches!(what, Do::Create { .. }) && !created)) {
            wrong("r10: recovery starts it".into());
        }
        if let Do::Mark { expect: Some(theirs), .. } = what
            && theirs.record != self.0.record
        {
            wrong("s8: it takes another record's mark off".into());
        }
        if let Do::Mark { new: Some(mark), .. } = what
            && mark.epoch == 0
        {
            wrong("s8: 0 is no epoch of a mark".into());
        }
        if !taking_begins(what) {
            return;
        }
        let Some(volume) = volume else { return wrong("of no volume".into()) };
        let Some(look) = look else { return wrong("s8: without a look".into()) };
        let now = self.now();
        if look.heard != now {
            wrong(format!("s8: the look before it is {} ms old", now - look.heard));
        }
        let Some(seen) = look.seen else { return wrong("s8: the look before it showed no volume".into()) };
        let mark = self.our_mark(volume);
        if mark.is_none_or(|m| m.epoch == 0) || seen.mark != mark {
            wrong(format!("s8: the look before it showed the mark {:?}, the record's is {mark:?}", seen.mark));
        }
        if let Some(job) = &seen.pending {
            wrong(format!("s9: the look before it showed {job} pending"));
        }
        let at = seen.attached.map(|a| a.vm);
        match what {
            Do::Attach { .. } | Do::Delete if at.is_some() => wrong(format!("s3: the look before it showed {at:?}")),
            Do::Detach { vm } if at != Some(*vm) => wrong(format!("the look before it showed {at:?}")),
            _ => {}
        }
    }

    /// S7 and S9: an effect belongs to one operation that has not ended, once.
    pub fn took_effect(&self, fence: Fence, volume: VolumeId, what: &Do) {
        self.say(|| format!("cloud: effect {what:?} of {volume}"));
        let mut wrong = Vec::new();
        {
            let mut state = self.state();
            let book = &mut state.book;
            let effects = book.effects.entry(fence).or_default();
            let same = effects.iter().filter(|e| e.what.point() == what.point()).count();
            // A move of a volume whose mark was taken off, and put on again.
            if same > 0 && what.point() != Point::Mark {
                wrong.push(format!("s7: {what:?} of {volume} takes effect again"));
            }
            effects.push(Effect { what: what.clone(), volume });
            match book.ended.get(&fence) {
                None | Some(Outcome::Ambiguous | Outcome::Abandoned) => {}
                Some(outcome) => wrong.push(format!("s9: {what:?} of {volume} after its end ({})", outcome.as_str())),
            }
            let newest = book.begun.get(&fence).map(|b| b.id);
            if let Some(calm) = book.calm.remove(&volume)
                && book.ended.contains_key(&fence)
            {
                wrong.push(format!("s9: {newest:?} changes {volume}, proved {} by a newer one", calm.status));
            }
        }
        for words in wrong {
            self.violation(words);
        }
    }

    /// What an end claims, against the books at this moment.
    pub fn before_commit(&self, batch: &[Change]) {
        for change in batch {
            if let Change::OpEnd { id, outcome, .. } = change {
                self.claims(*id, *outcome);
            }
        }
    }

    fn claims(&self, id: OpId, outcome: Outcome) {
        let (row, begun, effects, pending) = {
            let state = self.state();
            let Some(row) = state.record.ops.get(&id).cloned() else { return };
            let pending = state.sky.jobs.values().any(|f| *f == row.fence);
            let effects = state.book.effects.get(&row.fence).cloned().unwrap_or_default();
            let begun = state.book.begun.get(&row.fence).copied();
            (row, begun, effects, pending)
        };
        let wrong = |words: String| self.violation(format!("`{}` ends {}, but {words}", row.command, outcome.as_str()));
        let place = if row.volume.is_some() && row.verb != Verb::Claim { Place::Volume } else { Place::Job };
        let Ok(action) = command::parse(row.command.as_bytes(), place).map(|c| c.action) else { return };
        match outcome {
            Outcome::Ambiguous | Outcome::Abandoned => {}
            Outcome::Failed | Outcome::Cancelled | Outcome::Interrupted => {
                if pending {
                    wrong("the cloud still works on it".into());
                }
                if effects.iter().any(|e| self.touched_since(e.volume, begun)) {
                    return;
                }
                let count = |p: Point| effects.iter().filter(|e| e.what.point() == p).count();
                let undone = count(Point::Attach) == count(Point::Detach) && effects.len() == 2;
                if !effects.is_empty() && !undone {
                    wrong(format!("it took effect: {effects:?}"));
                }
            }
            Outcome::Done => {
                if pending {
                    wrong("the cloud still works on it".into());
                }
                let made = effects.iter().find(|e| e.what.point() == Point::Create).map(|e| e.volume);
                let Some(volume) = row.volume.or(made) else {
                    if row.verb == Verb::Create {
                        wrong("nothing was made".into());
                    }
                    return;
                };
                if self.touched_since(volume, begun) {
                    return;
                }
                let v = self.state().sky.volumes.get(&volume).cloned();
                let at = v.as_ref().and_then(|v| v.attached).map(|(vm, _)| vm);
                let vm = expected_vm(&action, self.host());
                match &action {
                    Action::Attach { .. } if at != vm => wrong(format!("the books say {at:?}")),
                    Action::Detach { .. } if at == vm => wrong("it is attached there".into()),
                    Action::Delete { .. } if v.is_some() => wrong("it is there".into()),
                    Action::Claim { .. }
                        if v.as_ref().is_none_or(|v| v.mark.is_none_or(|m| m.epoch != row.epoch())) =>
                    {
                        wrong("it does not carry its mark".into())
                    }
                    Action::Create { .. } if v.is_none() => wrong("it is not there".into()),
                    Action::Resize { size } if v.is_none_or(|v| v.size < *size) => wrong("it is smaller".into()),
                    _ => {}
                }
            }
        }
    }

    /// Another hand was in it meanwhile: what it did is not to be told from what the operation did.
    fn touched_since(&self, volume: VolumeId, begun: Option<Begun>) -> bool {
        self.state().book.touched.get(&volume).is_some_and(|at| *at >= begun.map_or(0, |b| b.at))
    }

    /// What the record has now, for the book.
    pub fn committed(&self, batch: &[Change], life: u64) {
        let now = self.now();
        let host = self.host();
        for change in batch {
            self.say(|| match change {
                Change::OpBegin(op) => format!("record: begin {} `{}` of {:?}", op.id, op.command, op.volume),
                Change::OpEnd { id, outcome, sentence, .. } => {
                    format!("record: end {id} {}: {sentence}", outcome.as_str())
                }
                Change::VolumeStatus { volume, status, .. } => format!("record: {volume} is {status}"),
                other => format!("record: {other:?}"),
            });
            let mut state = self.state();
            let state = &mut *state;
            match change {
                Change::OpBegin(op) if op.ended.is_none() => {
                    state.book.begun.insert(op.fence, Begun { id: op.id, life, at: now });
                    if let Some(volume) = op.volume {
                        state.book.calm.remove(&volume);
                    }
                }
                Change::OpEnd { id, outcome, .. } => {
                    let Some(row) = state.record.ops.get(id) else { continue };
                    state.book.ended.insert(row.fence, *outcome);
                    *state.book.ends.entry((row.verb, *outcome)).or_default() += 1;
                    let status = match (row.verb, row.volume.and_then(|v| state.sky.volumes.get(&v))) {
                        (Verb::Attach | Verb::Detach, Some(v)) => match v.attached {
                            None => Status::Detached,
                            Some((vm, _)) if vm == host => Status::Attached,
                            Some(_) => Status::Remote,
                        },
                        _ => continue,
                    };
                    let (Some(volume), Outcome::Done) = (row.volume, outcome) else { continue };
                    let since = state.book.begun.get(&row.fence).map_or(0, |b| b.at);
                    let touched = state.book.touched.get(&volume).is_some_and(|at| *at >= since);
                    if !touched {
                        state.book.calm.insert(volume, Calm { status });
                    }
                }
                _ => {}
            }
        }
    }

    /// A look that was asked for now shows the volume, or does not.
    pub fn absence(&self, volume: VolumeId, shown: bool) {
        let now = self.now();
        let absent = &mut self.state().book.absent;
        match shown {
            true => drop(absent.remove(&volume)),
            false => drop(absent.entry(volume).or_insert(now)),
        }
    }

    /// L9: an edge of a volume's status that was shown; V6: `missing` is believed of two looks 10 s apart.
    pub fn shows(&self, row: DiskRow, volume: VolumeId, status: Status) {
        let now = self.now();
        let gap = |state: &super::State| state.book.absent.get(&volume).map(|first| now - first);
        let mut state = self.state();
        if status == Status::Missing
            && state.book.statuses.get(&row) != Some(&Status::Missing)
            && gap(&state).is_none_or(|gap| gap < 10_000)
        {
            let gap = gap(&state);
            state.book.violations.push(format!("v6: {volume} is missing, first not seen {gap:?} ms ago"));
        }
        let book = &mut state.book;
        let Some(was) = book.statuses.insert(row, status) else { return };
        if was != status {
            *book.edges.entry((was, status)).or_default() += 1;
        }
    }
}
