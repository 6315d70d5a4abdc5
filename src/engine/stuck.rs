//! A record that has not answered for a second: nothing more is asked of it until it does.
//!
//! The kernel lets one mkdir or rmdir after the other into a directory, and who lists it stands in the
//! same line. If each of them waited its own second, a listing would wait for as many seconds as there
//! are callers; so the first one finds out for all.

use std::sync::Arc;
use std::time::{Duration, Instant};

use parking_lot::Mutex;

/// The changes whose caller was told that the record does not answer, and that it has not answered yet.
#[derive(Debug, Clone, Default)]
pub(super) struct Stuck(Arc<Mutex<Late>>);

#[derive(Debug, Default)]
struct Late {
    count: usize,
    /// When the first of them was asked for.
    since: Option<Instant>,
}

/// One change that the record has not answered in time; dropped when it has.
#[derive(Debug)]
pub(super) struct Unanswered(Stuck);

impl Stuck {
    /// A change that was asked for at that moment was not answered in time.
    pub fn unanswered(&self, asked: Instant) -> Unanswered {
        let mut late = self.0.lock();
        late.count += 1;
        late.since.get_or_insert(asked);
        Unanswered(self.clone())
    }

    /// For how long the record has kept its answer for itself, if it does.
    pub fn silence(&self) -> Option<Duration> {
        self.0.lock().since.map(|since| since.elapsed())
    }
}

impl Drop for Unanswered {
    fn drop(&mut self) {
        let mut late = self.0.0.lock();
        late.count -= 1;
        if late.count == 0 {
            late.since = None;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_record_is_stuck_until_the_last_late_change_was_answered() {
        let stuck = Stuck::default();
        assert_eq!(stuck.silence(), None);
        let first = stuck.unanswered(Instant::now());
        let second = stuck.unanswered(Instant::now());
        drop(first);
        assert!(stuck.silence().is_some());
        drop(second);
        assert_eq!(stuck.silence(), None);
    }
}
