//! What the filesystem asks of the engine, as a trait: the tests mount the tree over a fake.

use std::sync::Arc;

use crate::command::{Action, Command};
use crate::engine::{Asker, DeviceNow, Earlier, Engine, Events, Left, Submitted, Target, Ticket, World};
use crate::error::{Errno, Error};
use crate::model::{Caller, DiskRow, Fence, Holder, JobId, JobRow, MapRow, OpId, Verb};

/// Called after each publish.
pub type OnPublish = Arc<dyn Fn(&Arc<World>) + Send + Sync>;

/// The engine's methods that the tree is served from; see [`Engine`] for their meaning. None blocks.
#[allow(missing_docs)]
pub trait Core: Send + Sync + 'static {
    fn world(&self) -> Arc<World>;
    fn events(&self) -> &Events;
    fn on_publish(&self, f: OnPublish);
    fn submit(&self, target: Target, command: Command, asker: Asker) -> Submitted;
    fn earlier(&self, fence: Fence) -> Option<Earlier>;
    fn would(&self, target: Target, action: &Action) -> Result<(), Error>;
    fn note_failure(&self, target: Target, verb: &str, caller: &Caller, error: &Error);
    fn caller_left(&self, target: Target, verb: Verb, op: Option<OpId>, caller: &Caller, left: Left) -> Errno;
    fn make_job(&self, id: JobId, asker: Asker) -> Ticket<JobRow>;
    fn forget_job(&self, job: JobRow, asker: Asker) -> Ticket;
    fn set_vm_name(&self, job: JobRow, value: String, asker: Asker) -> Ticket;
    fn set_hold(&self, job: JobRow, value: bool, asker: Asker) -> Ticket;
    fn device(&self, volume: DiskRow) -> Result<DeviceNow, Error>;
    fn mapped(&self, mapping: MapRow) -> Result<DeviceNow, Error>;
    fn holders(&self, volume: DiskRow) -> Ticket<Arc<Vec<Holder>>>;
}

impl Core for Engine {
    fn world(&self) -> Arc<World> {
        Engine::world(self)
    }
    fn events(&self) -> &Events {
        Engine::events(self)
    }
    fn on_publish(&self, f: OnPublish) {
        Engine::on_publish(self, f);
    }
    fn submit(&self, target: Target, command: Command, asker: Asker) -> Submitted {
        Engine::submit(self, target, command, asker)
    }
    fn earlier(&self, fence: Fence) -> Option<Earlier> {
        Engine::earlier(self, fence)
    }
    fn would(&self, target: Target, action: &Action) -> Result<(), Error> {
        Engine::would(self, target, action)
    }
    fn note_failure(&self, target: Target, verb: &str, caller: &Caller, error: &Error) {
        Engine::note_failure(self, target, verb, caller, error);
    }
    fn caller_left(&self, target: Target, verb: Verb, op: Option<OpId>, caller: &Caller, left: Left) -> Errno {
        Engine::caller_left(self, target, verb, op, caller, left)
    }
    fn make_job(&self, id: JobId, asker: Asker) -> Ticket<JobRow> {
        Engine::make_job(self, id, asker)
    }
    fn forget_job(&self, job: JobRow, asker: Asker) -> Ticket {
        Engine::forget_job(self, job, asker)
    }
    fn set_vm_name(&self, job: JobRow, value: String, asker: Asker) -> Ticket {
        Engine::set_vm_name(self, job, value, asker)
    }
    fn set_hold(&self, job: JobRow, value: bool, asker: Asker) -> Ticket {
        Engine::set_hold(self, job, value, asker)
    }
    fn device(&self, volume: DiskRow) -> Result<DeviceNow, Error> {
        Engine::device(self, volume)
    }
    fn mapped(&self, mapping: MapRow) -> Result<DeviceNow, Error> {
        Engine::mapped(self, mapping)
    }
    fn holders(&self, volume: DiskRow) -> Ticket<Arc<Vec<Holder>>> {
        Engine::holders(self, volume)
    }
}
