//! The engine: takes commands, runs operations, reconciles, publishes.

use std::sync::Arc;
use std::time::Duration;

use crate::command::{Action, Command};
use crate::error::{Errno, Error};
use crate::model::{Caller, DevNo, DiskRow, Holder, Incarnation, JobId, JobRow, MapRow};

pub mod events;
pub mod ticket;
pub mod world;

pub use events::Events;
pub use ticket::Ticket;
pub use world::World;

/// What a command was written to.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[allow(missing_docs)]
pub enum Target {
    Root,
    Job(JobRow),
    Volume(DiskRow),
}

/// A device verified against the kernel at this moment.
#[derive(Debug, Clone)]
pub struct DeviceNow {
    /// Kernel name; the node is `/dev/NAME`.
    pub name: Arc<str>,
    /// Number.
    pub dev: DevNo,
    /// Which insertion.
    pub incarnation: Incarnation,
    /// The mapping's row, for node ids of `block`.
    pub mapping: MapRow,
    /// Bytes.
    pub size: u64,
}

/// A submitted command.
#[derive(Clone)]
pub struct Submitted {
    /// The outcome.
    pub ticket: Ticket,
    /// How long this caller waits at most; `None`: until a signal.
    pub deadline: Option<Duration>,
    /// The operation behind it, if one runs: for the sentence when the caller stops waiting.
    pub op: Option<crate::model::OpId>,
}

/// What a caller that stops waiting was told; the engine writes it into `error`, and stops a
/// `destroy` whose caller was interrupted.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Left {
    /// A signal: EINTR.
    Interrupted,
    /// The deadline: ETIMEDOUT.
    TimedOut(Duration),
}

/// The core. Cheap to share; every method returns at once.
pub struct Engine {}

#[allow(unused_variables, missing_docs)]
impl Engine {
    /// The published snapshot.
    pub fn world(&self) -> Arc<World> {
        unimplemented!()
    }
    /// The event stream.
    pub fn events(&self) -> &Events {
        unimplemented!()
    }
    /// Calls `f` after each publish, on the publishing thread, outside the engine's locks.
    pub fn on_publish(&self, f: Arc<dyn Fn(&Arc<World>) + Send + Sync>) {
        unimplemented!()
    }
    /// Admits a command and starts it. An immediate refusal is a ticket that is done.
    pub fn submit(&self, target: Target, command: Command, caller: Caller) -> Submitted {
        unimplemented!()
    }
    /// Allowed now? For reading `control`: `Ok` text of what would happen, `Err` why not.
    pub fn would(&self, world: &World, target: Target, action: &Action) -> Result<(), Error> {
        unimplemented!()
    }
    /// A write that did not parse: its sentence goes to `error`.
    pub fn note_failure(&self, target: Target, verb: &str, caller: &Caller, error: &Error) {
        unimplemented!()
    }
    /// The caller of `submitted` stopped waiting.
    pub fn caller_left(
        &self,
        target: Target,
        command: &Command,
        op: Option<crate::model::OpId>,
        caller: &Caller,
        left: Left,
    ) -> Errno {
        unimplemented!()
    }
    /// mkdir in jobs/.
    pub fn make_job(&self, id: JobId, caller: Caller) -> Ticket<JobRow> {
        unimplemented!()
    }
    /// rmdir of a job.
    pub fn forget_job(&self, job: JobRow, caller: Caller) -> Ticket {
        unimplemented!()
    }
    /// A write to `vm_name`.
    pub fn set_vm_name(&self, job: JobRow, value: String, caller: Caller) -> Ticket {
        unimplemented!()
    }
    /// A write to `hold`.
    pub fn set_hold(&self, job: JobRow, value: bool, caller: Caller) -> Ticket {
        unimplemented!()
    }
    /// The device of a volume, verified now. Never blocks.
    pub fn device(&self, volume: DiskRow) -> Result<DeviceNow, Error> {
        unimplemented!()
    }
    /// The device of a mapping, verified now; `NoDevice` when the mapping has ended. Never blocks.
    pub fn mapped(&self, mapping: MapRow) -> Result<DeviceNow, Error> {
        unimplemented!()
    }
    /// Who has the device, from a walk of /proc that callers share. `Ok` and empty: nobody, or no device.
    pub fn holders(&self, volume: DiskRow) -> Ticket<Arc<Vec<Holder>>> {
        unimplemented!()
    }
    /// Refuses commands from now on, and completes every ticket with `ShuttingDown`.
    pub fn shut_down(&self) {
        unimplemented!()
    }
}
