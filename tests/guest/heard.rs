//! What a reader thread has heard so far, and waiting for it: with a deadline, and woken by each change.

use std::time::{Duration, Instant};

use parking_lot::{Condvar, Mutex};

/// Shared between one reader and all who wait.
#[derive(Debug, Default)]
pub struct Heard<T> {
    /// What was heard, and whether the other side is gone.
    state: Mutex<(T, bool)>,
    changed: Condvar,
}

impl<T> Heard<T> {
    /// Adds something.
    pub fn hear(&self, change: impl FnOnce(&mut T)) {
        change(&mut self.state.lock().0);
        self.changed.notify_all();
    }

    /// Nothing will come any more.
    pub fn end(&self) {
        self.state.lock().1 = true;
        self.changed.notify_all();
    }

    /// Waits until `look` has an answer; `None` when the other side is gone or the time over.
    pub fn wait<A>(&self, within: Duration, mut look: impl FnMut(&mut T) -> Option<A>) -> Option<A> {
        let until = Instant::now() + within;
        let mut state = self.state.lock();
        loop {
            let found = look(&mut state.0);
            if found.is_some() || state.1 || Instant::now() >= until {
                return found;
            }
            self.changed.wait_until(&mut state, until);
        }
    }
}
