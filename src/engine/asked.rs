//! Commands that are asked for twice: the kernel sends a request again whose daemon died before it
//! answered. Each caller's request has chosen its operation's identity, its fence, before the
//! operation began; by it the next daemon knows what became of it.

use std::collections::HashMap;

use super::inflight::Live;
use super::recovery::begins_again;
use super::{Engine, Ticket};
use crate::error::Errno;
use crate::model::{Caller, Fence, JobRow, OpId, Outcome, Verb};
use crate::store::{Loaded, OpRow};

/// Who asks, and the identity that the operation is to have if one begins.
#[derive(Debug, Clone)]
pub struct Asker {
    /// Who.
    pub caller: Caller,
    /// Never used before.
    pub fence: Fence,
}

impl From<Caller> for Asker {
    fn from(caller: Caller) -> Self {
        Self { caller, fence: Fence::random() }
    }
}

/// What became of an operation that an earlier daemon began.
#[derive(Clone)]
pub enum Earlier {
    /// It is being settled. [`crate::error::Error::LeftBehind`] as its outcome means that nothing
    /// had begun: its caller's command is to be given again.
    Running {
        /// Its outcome.
        ticket: Ticket,
        /// Its number.
        op: OpId,
        /// What it does.
        verb: Verb,
    },
    /// It was done; for a mkdir with the job's row.
    Done(Option<JobRow>),
    /// It failed with this errno.
    Failed(Errno),
    /// It had not begun when its daemon died, and nothing was changed.
    NotBegun,
}

/// What callers of an earlier daemon wait for.
#[derive(Default)]
pub(super) struct Asked(HashMap<Fence, Earlier>);

impl Asked {
    /// Those of `fences` that have ended.
    pub fn ended(fences: &[Fence], loaded: &Loaded) -> Self {
        let mut asked = Self::default();
        if !fences.is_empty() {
            let rows = loaded.history.iter().map(|(row, _)| row).filter(|row| fences.contains(&row.fence));
            asked.0.extend(rows.filter_map(|row| Some((row.fence, became(row)?))));
        }
        asked
    }

    /// One that is taken over to be settled.
    pub fn running(&mut self, live: &Live) {
        let running = Earlier::Running { ticket: live.ticket.clone(), op: live.id, verb: live.action.verb() };
        self.0.insert(live.fence, running);
    }
}

/// The errno that a failed operation's callers get, as its row's `detail` has it.
pub(super) fn detail(epoch: u64, errno: Option<Errno>) -> String {
    match errno {
        None => serde_json::json!({ "epoch": epoch }),
        Some(errno) => serde_json::json!({ "epoch": epoch, "errno": errno.0 }),
    }
    .to_string()
}

fn became(row: &OpRow) -> Option<Earlier> {
    let (outcome, ..) = row.ended.as_ref()?;
    Some(match outcome {
        Outcome::Done => Earlier::Done(row.job.filter(|_| row.verb == Verb::Mkdir)),
        Outcome::Interrupted if begins_again(row.verb, row.volume.is_some()) => Earlier::NotBegun,
        Outcome::Failed | Outcome::Ambiguous | Outcome::Cancelled | Outcome::Interrupted | Outcome::Abandoned => {
            let detail: serde_json::Value = serde_json::from_str(&row.detail).unwrap_or_default();
            let errno = detail["errno"].as_i64().and_then(|n| i32::try_from(n).ok());
            Earlier::Failed(errno.map_or(Errno::ECANCELED, Errno))
        }
    })
}

impl Engine {
    /// What became of the operation of that identity, if an earlier daemon's caller asked for it.
    pub fn earlier(&self, fence: Fence) -> Option<Earlier> {
        self.asked.lock().0.get(&fence).cloned()
    }
}
