//! What can go wrong, on demand.

use std::collections::BTreeMap;
use std::time::Duration;

use crate::hypervisor::Identity;
use crate::state::Volume;

/// A rule: what happens to which request.
///
/// Rules are looked at in the order in which they were given. Each one counts the requests of its
/// command that no earlier rule took: `skip` of them pass, the next `times` are taken.
#[derive(Debug, Clone)]
pub struct Fault {
    /// The command, or `*` for any.
    pub command: String,
    /// So many requests pass first.
    pub skip: u32,
    /// So many are taken; `u32::MAX` for as long as the rule is there.
    pub times: u32,
    /// What happens to them.
    pub kind: Kind,
}

impl Fault {
    /// Takes the next request of `command`.
    pub fn new(command: &str, kind: Kind) -> Self {
        Fault { command: command.to_owned(), skip: 0, times: 1, kind }
    }

    /// Lets `n` requests pass first.
    pub fn skip(mut self, n: u32) -> Self {
        self.skip = n;
        self
    }

    /// Takes `n` requests.
    pub fn times(mut self, n: u32) -> Self {
        self.times = n;
        self
    }

    /// Takes all requests until [`crate::FakeCloud::clear_faults`].
    pub fn forever(self) -> Self {
        self.times(u32::MAX)
    }

    /// Whether this request is taken; counts it.
    pub(crate) fn takes(&mut self, command: &str) -> bool {
        if self.times == 0 || (self.command != "*" && self.command != command) {
            return false;
        }
        if self.skip > 0 {
            self.skip -= 1;
            return false;
        }
        if self.times != u32::MAX {
            self.times -= 1;
        }
        true
    }
}

/// Moments of a job.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Moment {
    /// Accepted; it waits for its turn, and nothing shows but the job.
    Queued,
    /// In its turn, before anything has an effect: the volume is Attaching, Snapshotting, …
    Working,
    /// The hypervisor has done it; the cloud's record says nothing of it.
    Done,
    /// The record says it; the state is still the passing one.
    Recorded,
    /// All is as it will be, but for the job that is still open.
    Closing,
}

/// Kinds of faults.
#[derive(Debug, Clone)]
pub enum Kind {
    /// The connection is closed before the request does anything.
    DropBefore,
    /// The request is done and its answer never sent.
    DropAfter,
    /// As long before anything is done.
    DelayBefore(Duration),
    /// As long between doing and answering.
    DelayAfter(Duration),
    /// HTML with this status, as from a proxy. `acted`: the request was done all the same.
    Html {
        /// 502, 503, 504.
        status: u16,
        /// Whether the request was done.
        acted: bool,
    },
    /// 503 with JSON: a management server in maintenance; nothing is done.
    Maintenance,
    /// The request is done, half of its answer sent, the connection closed.
    Truncated,
    /// The request is done and answered with 200 and bytes that are no JSON.
    Garbage,
    /// 401 with the text of a wrong signature.
    Unauthorized,
    /// 429 with this many ms in the text.
    RateLimited(u64),
    /// An error envelope; nothing is done.
    Error {
        /// HTTP status and errorcode.
        code: u32,
        /// cserrorcode.
        cs: u32,
        /// errortext.
        text: String,
    },
    /// The job stops at this moment until [`crate::FakeCloud::release_jobs`].
    JobHangs(Moment),
    /// The job goes on, and queryAsyncJobResult does not know it.
    JobLost,
    /// The job fails at this moment; what was done before stays done. At [`Moment::Done`] the device
    /// came (or went) and the cloud's record says nothing of it, at [`Moment::Recorded`] it does.
    JobFails {
        /// When.
        at: Moment,
        /// jobresultcode.
        code: u32,
        /// errortext.
        text: String,
    },
    /// The management server that runs the job ends at this moment: the job is 2/530 without result,
    /// a passing state is reset, what was done before stays done (3.5).
    ServerRestart(Moment),
    /// A list is answered as of an earlier moment.
    Stale(View),
    /// Volumes are listed without their tags.
    TagsHidden,
    /// `customjobid` is not taken: the job gets another id.
    OwnJobId,
    /// All of these; of two that contradict each other the first counts.
    All(Vec<Kind>),
}

impl Kind {
    /// The single kinds in this one.
    pub(crate) fn flat(&self) -> Vec<Kind> {
        match self {
            Kind::All(kinds) => kinds.iter().flat_map(Kind::flat).collect(),
            other => vec![other.clone()],
        }
    }
}

/// The volumes at one moment, with the pending jobs that they showed: for [`Kind::Stale`].
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct View {
    pub(crate) volumes: BTreeMap<String, Volume>,
    pub(crate) pending: BTreeMap<String, String>,
}

/// What is wrong with the next device of a volume, or with all of them from now on.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum DeviceFault {
    /// It comes so long after the cloud's success.
    Late(Duration),
    /// It comes when [`crate::FakeCloud::let_device_come`] says so, or never.
    Held,
    /// It is known by something else.
    Known(Identity),
    /// It has this many bytes: fewer than the volume.
    Size(u64),
    /// A second device has the same identity.
    Twin,
    /// The guest does not let it go: the detach fails with the text of 2.4, and the device stays.
    Stuck,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_rule_lets_its_first_requests_pass_and_then_takes_as_many_as_it_says() {
        let mut fault = Fault::new("listVolumes", Kind::DropBefore).skip(1).times(2);
        assert!(!fault.takes("attachVolume"));
        let taken: Vec<_> = (0..4).map(|_| fault.takes("listVolumes")).collect();
        assert_eq!(taken, [false, true, true, false]);
    }
}
