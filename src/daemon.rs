//! Composition root: builds store, cloud, devices, engine, fs; signals; order of start and stop.

use crate::config::{Config, Problem};

/// A running daemon.
pub struct Daemon {}

impl Daemon {
    /// Starts everything; when this returns, the tree answers.
    pub fn start(_config: &Config) -> Result<Self, Problem> {
        Err(Problem("this build has no daemon yet".into()))
    }

    /// Serves until SIGTERM, SIGINT, or until the mount is gone.
    pub fn run_until_signal(self) -> Result<(), Problem> {
        Ok(())
    }

    /// Ends it: parked callers are answered, the mount is taken away.
    pub fn stop(self) {}
}
