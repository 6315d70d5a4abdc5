//! The event stream: a ring that every reader walks at its own pace, so a slow one costs nothing.

use std::collections::VecDeque;
use std::sync::Arc;

use parking_lot::Mutex;

use crate::model::JobRow;

/// One line of `events/`.
#[derive(Debug, Clone)]
pub struct Event {
    /// Rises by one an event.
    pub seq: u64,
    /// The jobs whose `events/JOB` shows it; `events/all` shows every one.
    pub job: Option<JobRow>,
    /// A JSON object and a newline.
    pub line: Arc<str>,
}

/// What a reader finds at its position.
#[derive(Debug, Clone)]
pub enum Next {
    /// The next event for it.
    Event(Event),
    /// The ring has gone on without it: so many events are lost; go on at this position.
    Lost {
        /// How many.
        count: u64,
        /// Where to go on.
        resume: u64,
    },
    /// Nothing yet; ask again at this position when woken.
    Nothing {
        /// Where to go on.
        resume: u64,
    },
}

type Wake = Arc<dyn Fn() + Send + Sync>;

/// Where each event is kept beyond this process: its number, job and line.
pub type Keep = Box<dyn Fn(&Event) + Send + Sync>;

/// The last events, and whom to wake.
pub struct Events {
    ring: Mutex<Ring>,
    keep: Option<Keep>,
    wake: Mutex<Option<Wake>>,
}

struct Ring {
    next: u64,
    kept: VecDeque<Event>,
    most: usize,
}

impl Events {
    /// A ring of at most `most` events.
    pub fn new(most: usize) -> Self {
        Self::continued(most, Vec::new(), None)
    }

    /// The same, going on after `earlier`, whose numbers rise by one.
    pub fn continued(most: usize, earlier: Vec<Event>, keep: Option<Keep>) -> Self {
        let next = earlier.last().map_or(0, |event| event.seq + 1);
        let ring = Ring { next, kept: earlier.into(), most: most.max(1) };
        Self { ring: Mutex::new(ring), keep, wake: Mutex::new(None) }
    }

    /// Calls `wake` whenever [`Events::wake`] is called: after pushes, outside the engine's locks.
    pub fn on_push(&self, wake: Wake) {
        *self.wake.lock() = Some(wake);
    }

    /// Where a reader that opens now begins.
    pub fn position(&self) -> u64 {
        self.ring.lock().next
    }

    /// The events that are kept, oldest first.
    pub fn kept(&self) -> Vec<Event> {
        self.ring.lock().kept.iter().cloned().collect()
    }

    /// Adds an event; `line` gets the event's number.
    pub fn push(&self, job: Option<JobRow>, line: impl FnOnce(u64) -> String) {
        let mut ring = self.ring.lock();
        let seq = ring.next;
        ring.next += 1;
        if ring.kept.len() == ring.most {
            ring.kept.pop_front();
        }
        let event = Event { seq, job, line: line(seq).into() };
        if let Some(keep) = &self.keep {
            keep(&event);
        }
        ring.kept.push_back(event);
    }

    /// Tells the readers that something was pushed.
    pub fn wake(&self) {
        let wake = self.wake.lock().clone();
        if let Some(wake) = wake {
            wake();
        }
    }

    /// The next event at or after `position` for a reader of `job` (`None`: of all).
    pub fn next(&self, position: u64, job: Option<JobRow>) -> Next {
        let ring = self.ring.lock();
        let first = ring.next - ring.kept.len() as u64;
        if position < first {
            return Next::Lost { count: first - position, resume: first };
        }
        let skip = usize::try_from(position - first).unwrap_or(usize::MAX);
        match ring.kept.iter().skip(skip).find(|e| job.is_none() || e.job == job) {
            Some(event) => Next::Event(event.clone()),
            None => Next::Nothing { resume: ring.next },
        }
    }
}
