//! The record in memory, with the moments at which it fails, is slow, or the daemon dies.

use std::time::Duration;

use async_trait::async_trait;

use super::{Fault, Point, Port};
use crate::store::{Change, Loaded, Store, StoreError};

fn point(batch: &[Change]) -> Point {
    let mut at = Point::Other;
    for change in batch {
        match change {
            Change::OpBegin(op) if op.ended.is_none() => at = Point::Begin,
            Change::OpEnd { .. } => at = Point::End,
            _ => {}
        }
    }
    at
}

impl Port {
    fn take(&self, batch: &[Change]) -> Result<(), StoreError> {
        // What an end claims is held against the books at the moment it becomes durable.
        self.sim.before_commit(batch);
        let taken = self.sim.state().record.take(batch);
        match &taken {
            Ok(()) => self.sim.committed(batch, self.life),
            Err(error) => self.sim.violation(format!("the schema refuses {batch:?}: {error}")),
        }
        taken
    }
}

#[async_trait]
impl Store for Port {
    async fn commit(&self, batch: Vec<Change>) -> Result<(), StoreError> {
        let _one_at_a_time = self.writer.lock().await;
        self.alive().await;
        let at = point(&batch);
        let fault = self.sim.fault(at);
        if let Some(fault) = fault {
            self.sim.say(|| format!("{fault:?} at {at:?}"));
        }
        match fault {
            None | Some(Fault::LostDone) => {
                let time = self.sim.latency(4);
                self.pause(time).await;
                self.take(&batch)
            }
            Some(Fault::LateAnswer(ms) | Fault::Straggle(ms)) => {
                self.pause(Duration::from_millis(ms)).await;
                self.take(&batch)
            }
            Some(Fault::KillBefore) => self.die().await,
            Some(Fault::KillAfter | Fault::KillStraggle(_)) => {
                self.take(&batch)?;
                self.die().await
            }
            Some(Fault::Refuse | Fault::Busy | Fault::Unreachable | Fault::Lost | Fault::JobFails(_)) => {
                Err(StoreError::Failed { words: "simulated: disk I/O error".into() })
            }
        }
    }

    fn load(&self, history: usize) -> Result<Loaded, StoreError> {
        Ok(self.sim.state().record.load(self.sim.0.record, history))
    }
}
