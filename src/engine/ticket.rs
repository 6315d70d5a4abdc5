//! How an outcome travels back: a ticket is completed once, and tells whoever asked, then or later.

use std::sync::Arc;

use parking_lot::Mutex;

use crate::error::Error;

type Callback<T> = Box<dyn FnOnce(&Result<T, Error>) + Send>;

enum State<T> {
    Pending(Vec<Callback<T>>),
    Done(Result<T, Error>),
}

/// The future outcome of a command. Holds no thread; clones are the same ticket.
pub struct Ticket<T = ()> {
    state: Arc<Mutex<State<T>>>,
}

impl<T> Clone for Ticket<T> {
    fn clone(&self) -> Self {
        Self { state: self.state.clone() }
    }
}

impl<T> Default for Ticket<T> {
    fn default() -> Self {
        Self { state: Arc::new(Mutex::new(State::Pending(Vec::new()))) }
    }
}

impl<T: Clone> Ticket<T> {
    /// A ticket whose outcome is known.
    pub fn done(outcome: Result<T, Error>) -> Self {
        Self { state: Arc::new(Mutex::new(State::Done(outcome))) }
    }

    /// Gives the outcome to everybody who asked. The first call counts, later ones are ignored.
    /// Callbacks run on this thread, outside every lock of the engine.
    pub fn complete(&self, outcome: Result<T, Error>) {
        let callbacks = {
            let mut state = self.state.lock();
            match &mut *state {
                State::Done(_) => return,
                State::Pending(callbacks) => {
                    let callbacks = std::mem::take(callbacks);
                    *state = State::Done(outcome.clone());
                    callbacks
                }
            }
        };
        for callback in callbacks {
            callback(&outcome);
        }
    }

    /// Calls `f` with the outcome: now if it is known, else when it is.
    pub fn on_done(&self, f: impl FnOnce(&Result<T, Error>) + Send + 'static) {
        let outcome = {
            let mut state = self.state.lock();
            match &mut *state {
                State::Pending(callbacks) => {
                    callbacks.push(Box::new(f));
                    return;
                }
                State::Done(outcome) => outcome.clone(),
            }
        };
        f(&outcome);
    }

    /// The outcome, if it is known.
    pub fn outcome(&self) -> Option<Result<T, Error>> {
        match &*self.state.lock() {
            State::Pending(_) => None,
            State::Done(outcome) => Some(outcome.clone()),
        }
    }

    /// Waits for the outcome.
    pub async fn wait(&self) -> Result<T, Error>
    where
        T: Send + 'static,
    {
        let (tx, rx) = tokio::sync::oneshot::channel();
        self.on_done(move |outcome| {
            // The receiver is gone only when the waiting task was dropped.
            let _ = tx.send(outcome.clone());
        });
        rx.await.unwrap_or_else(|_| Err(Error::Internal { what: "the engine dropped an operation".into() }))
    }
}
