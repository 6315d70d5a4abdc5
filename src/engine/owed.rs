//! Ends of operations that the record did not take when they came.
//!
//! The next operation's beginning takes them along, in one batch and before it: a crash must never
//! leave two open operations of one volume, which the next start would settle side by side. Where
//! nothing begins they are tried again by themselves.

use std::sync::Arc;

use super::Engine;
use super::operation::LOOK_AGAIN;
use crate::store::{Change, OpRow, StoreError};

/// What is still to be written, and whether somebody tries. Held over the commit that tries.
#[derive(Default)]
pub(super) struct Owed {
    ends: Vec<Change>,
    trying: bool,
}

impl Engine {
    /// Keeps an end until the record takes it: else the next start would settle what is long past.
    /// To be called before the operation's object is free.
    pub(super) async fn owe(self: &Arc<Self>, end: Change) {
        let mut owed = self.owed.lock().await;
        owed.ends.push(end);
        if !std::mem::replace(&mut owed.trying, true) {
            self.runtime.spawn(self.clone().pay());
        }
    }

    /// Journals that an operation begins, after every end that is owed.
    pub(super) async fn journal(&self, begin: OpRow) -> Result<(), StoreError> {
        let begin = Change::OpBegin(Box::new(begin));
        let mut owed = self.owed.lock().await;
        if owed.ends.is_empty() {
            drop(owed);
            return self.store.commit(vec![begin]).await;
        }
        let batch = owed.ends.iter().cloned().chain([begin]).collect();
        self.store.commit(batch).await?;
        owed.ends.clear();
        Ok(())
    }

    async fn pay(self: Arc<Self>) {
        loop {
            tokio::time::sleep(LOOK_AGAIN).await;
            let mut owed = self.owed.lock().await;
            let mut refused = Vec::new();
            for end in std::mem::take(&mut owed.ends) {
                match self.store.commit(vec![end.clone()]).await {
                    Ok(()) => self.store_health(None),
                    Err(StoreError::Constraint { words }) => {
                        tracing::error!("the record refuses the end of an operation for good: {words}");
                    }
                    Err(error) => {
                        tracing::warn!("the record still fails: {error}");
                        refused.push(end);
                    }
                }
            }
            if refused.is_empty() {
                owed.trying = false;
                return;
            }
            owed.ends = refused;
        }
    }
}
