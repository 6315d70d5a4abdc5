//! The bytes of one write to a `control` file, as a [`Command`]. Pure.

use std::time::Duration;

use crate::error::Error;
use crate::model::{DiskName, JobId, OpId, RecordId, Slot, SnapshotName, Verb, VmId, VolumeId};

/// Which `control` file was written: verbs differ.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Place {
    /// `/control`.
    Root,
    /// `jobs/JOB/control`.
    Job,
    /// `jobs/JOB/volumes/UUID/control`.
    Volume,
}

/// One parsed command: what to do, and how the caller waits for it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Command {
    /// What is asked. Two commands are *equal*, and join, when their actions are.
    pub action: Action,
    /// `timeout=`: how long the caller waits; zero is until a signal, `None` the verb's default.
    pub timeout: Option<Duration>,
    /// `nowait`: answer as soon as the operation is journaled.
    pub nowait: bool,
}

/// What a command asks for (rows C1 to C14).
#[derive(Debug, Clone, PartialEq, Eq)]
#[allow(missing_docs)]
pub enum Action {
    /// C1. `size` in bytes.
    Create {
        disk: DiskName,
        size: u64,
        offering: Option<String>,
        zone: Option<String>,
        name: Option<String>,
    },
    /// C2.
    Claim {
        volume: VolumeId,
        disk: Option<DiskName>,
        from: Option<RecordId>,
    },
    /// C3, C11. `vm` `None`: this host.
    Attach {
        vm: Option<VmId>,
        slot: Option<Slot>,
    },
    /// C4, C11.
    Detach {
        vm: Option<VmId>,
        force: bool,
    },
    /// C5. `size` in bytes.
    Resize {
        size: u64,
    },
    /// C6.
    Snapshot {
        name: SnapshotName,
        crash: bool,
    },
    Revert {
        name: SnapshotName,
    },
    DeleteSnapshot {
        name: SnapshotName,
    },
    /// C7.
    Delete {
        volume: VolumeId,
        expunge: bool,
    },
    /// C8.
    Release {
        volume: VolumeId,
    },
    /// C9.
    Move {
        job: JobId,
    },
    /// C10.
    Disk {
        name: DiskName,
    },
    /// C12.
    Destroy {
        job: JobId,
    },
    /// C13. `vm` only at the root.
    Reconcile {
        vm: Option<VmId>,
    },
    /// C14; at a job (no id) it stops the job's `destroy`.
    Cancel {
        id: Option<OpId>,
    },
    Abandon {
        id: OpId,
    },
}

impl Action {
    /// The verb.
    pub fn verb(&self) -> Verb {
        match self {
            Action::Create { .. } => Verb::Create,
            Action::Claim { .. } => Verb::Claim,
            Action::Attach { .. } => Verb::Attach,
            Action::Detach { .. } => Verb::Detach,
            Action::Resize { .. } => Verb::Resize,
            Action::Snapshot { .. } => Verb::Snapshot,
            Action::Revert { .. } => Verb::Revert,
            Action::DeleteSnapshot { .. } => Verb::DeleteSnapshot,
            Action::Delete { .. } => Verb::Delete,
            Action::Release { .. } => Verb::Release,
            Action::Move { .. } => Verb::Move,
            Action::Disk { .. } => Verb::Disk,
            Action::Destroy { .. } => Verb::Destroy,
            Action::Reconcile { .. } => Verb::Reconcile,
            Action::Cancel { .. } => Verb::Cancel,
            Action::Abandon { .. } => Verb::Abandon,
        }
    }
}

/// Parses one write. Nothing is done on an error, which names the word that is wrong.
pub fn parse(_bytes: &[u8], _place: Place) -> Result<Command, Error> {
    Err(Error::Malformed { what: "not yet".into() })
}

/// The command in its canonical spelling, as the journal and `operations/` show it; [`parse`] reads it back.
pub fn spell(_action: &Action) -> String {
    String::new()
}
