//! The handle of a running cloud: looking at it, waiting for it, telling it what goes wrong.

use std::io;
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::path::PathBuf;
use std::sync::Arc;
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use parking_lot::Mutex;

use crate::core::Core;
use crate::fault::{DeviceFault, Fault, View};
use crate::hypervisor::Plug;
use crate::options::{Account, Offering, Options, Zone};
use crate::sign::Signatures;
use crate::state::{Done, Effect, Job, Request, Snapshot, Vm, Volume, World};

/// A running cloud. Clones are the same one; with the last of them it ends: connections are closed,
/// jobs stop where they are, every device of its own goes.
#[derive(Clone)]
pub struct FakeCloud {
    pub(crate) owner: Arc<Owner>,
}

/// What ends the cloud when nobody has it any more.
pub(crate) struct Owner {
    pub core: Arc<Core>,
    address: SocketAddr,
    host: String,
    acceptor: Mutex<Option<JoinHandle<()>>>,
}

impl Drop for Owner {
    fn drop(&mut self) {
        self.core.world.lock().ending = true;
        // Wakes the acceptor, which looks at `ending` before it serves.
        let _ = TcpStream::connect(self.address);
        if let Some(acceptor) = self.acceptor.lock().take() {
            let _ = acceptor.join();
        }
        self.core.end();
    }
}

impl FakeCloud {
    /// Starts one.
    ///
    /// # Errors
    /// The address is taken, the directory cannot be made, the host's root disk cannot be plugged.
    pub fn start(options: Options) -> io::Result<Self> {
        let listener = TcpListener::bind(&options.listen)?;
        let address = listener.local_addr()?;
        let host = options.host.id.clone();
        let core = Core::new(options)?;
        let of_the_thread = Arc::clone(&core);
        let accept = move || crate::http::serve(&of_the_thread, &listener);
        let acceptor = std::thread::Builder::new().name("fakecloud-accept".into()).spawn(accept)?;
        Ok(FakeCloud { owner: Arc::new(Owner { core, address, host, acceptor: Mutex::new(Some(acceptor)) }) })
    }

    pub(crate) fn core(&self) -> &Arc<Core> {
        &self.owner.core
    }

    /// Changes what the cloud knows, and tells all who wait.
    pub(crate) fn with<T>(&self, act: impl FnOnce(&mut World) -> T) -> T {
        let mut world = self.core().world.lock();
        let result = act(&mut world);
        self.core().tell(&mut world);
        result
    }

    /// Looks at what the cloud knows.
    fn look<T>(&self, act: impl FnOnce(&World) -> T) -> T {
        act(&self.core().world.lock())
    }

    /// `http://127.0.0.1:PORT/client/api`.
    pub fn endpoint(&self) -> String {
        format!("http://{}/client/api", self.owner.address)
    }

    /// Where it listens.
    pub fn address(&self) -> SocketAddr {
        self.owner.address
    }

    /// The first account's `apiKey`.
    pub fn key(&self) -> String {
        self.account().key
    }

    /// The first account's secret.
    pub fn secret(&self) -> String {
        self.account().secret
    }

    /// The first account.
    pub fn account(&self) -> Account {
        self.look(|world| world.accounts[0].clone())
    }

    /// The host VM's id.
    pub fn host(&self) -> String {
        self.owner.host.clone()
    }

    /// The zones.
    pub fn zones(&self) -> Vec<Zone> {
        self.look(|world| world.zones.clone())
    }

    /// The offerings: the default ones are a customised one, then a fixed one of 5 GiB.
    pub fn offerings(&self) -> Vec<Offering> {
        self.look(|world| world.offerings.clone())
    }

    /// All volumes, root disks and removed ones included, in the order in which they were made.
    pub fn volumes(&self) -> Vec<Volume> {
        let mut all: Vec<_> = self.look(|world| world.volumes.values().cloned().collect());
        all.sort_by_key(|v: &Volume| v.number);
        all
    }

    /// The volumes that are not root disks and not removed for good.
    pub fn data_volumes(&self) -> Vec<Volume> {
        self.volumes().into_iter().filter(|v| v.kind == "DATADISK" && v.exists()).collect()
    }

    /// One volume.
    pub fn volume(&self, id: &str) -> Option<Volume> {
        self.look(|world| world.volumes.get(id).cloned())
    }

    /// What is attached to a VM, by device id.
    pub fn on_vm(&self, vm: &str) -> Vec<Volume> {
        let mut all: Vec<_> = self.look(|world| world.on_vm(vm).cloned().collect());
        all.sort_by_key(|v: &Volume| v.device_id);
        all
    }

    /// Where a volume's bytes are: raw and sparse, there from its first attach.
    pub fn file(&self, volume: &str) -> PathBuf {
        self.core().storage.volume(volume)
    }

    /// One VM.
    pub fn vm(&self, id: &str) -> Option<Vm> {
        self.look(|world| world.vms.get(id).cloned())
    }

    /// All snapshots, deleted ones included.
    pub fn snapshots(&self) -> Vec<Snapshot> {
        self.look(|world| world.snapshots.values().cloned().collect())
    }

    /// All jobs, final ones included.
    pub fn jobs(&self) -> Vec<Job> {
        self.look(|world| world.jobs.values().cloned().collect())
    }

    /// One job.
    pub fn job(&self, id: &str) -> Option<Job> {
        self.look(|world| world.jobs.get(id).cloned())
    }

    /// The devices that are there now.
    pub fn devices(&self) -> Vec<Plug> {
        self.look(|world| world.devices.iter().filter(|d| d.there).map(|d| d.plug.clone()).collect())
    }

    /// How often a command was called, refused and dropped calls included.
    pub fn calls(&self, command: &str) -> usize {
        self.look(|world| world.requests.iter().filter(|r| r.command == command).count())
    }

    /// All requests of whatever command.
    pub fn all_calls(&self) -> usize {
        self.look(|world| world.requests.len())
    }

    /// The log of requests, in order.
    pub fn requests(&self) -> Vec<Request> {
        self.look(|world| world.requests.clone())
    }

    /// Forgets the log of requests and effects: counting begins anew.
    pub fn clear_log(&self) {
        self.with(|world| {
            world.requests.clear();
            world.done.clear();
        });
    }

    /// How often something was done by requests, to this volume or (`None`) to any.
    pub fn effects(&self, effect: Effect, volume: Option<&str>) -> usize {
        let counts = |d: &&Done| d.effect == effect && !d.by_admin && volume.is_none_or(|v| v == d.volume);
        self.look(|world| world.done.iter().filter(counts).count())
    }

    /// All effects, in order.
    pub fn log(&self) -> Vec<Done> {
        self.look(|world| world.done.clone())
    }

    /// Waits until `condition` holds, looking after each request, effect and step of a job; whether
    /// it held within `patience`.
    pub fn wait_for(&self, patience: Duration, mut condition: impl FnMut(&FakeCloud) -> bool) -> bool {
        let deadline = Instant::now() + patience;
        loop {
            let seen = self.look(|world| world.version);
            if condition(self) {
                return true;
            }
            let mut world = self.core().world.lock();
            while world.version == seen {
                if self.core().changed.wait_until(&mut world, deadline).timed_out() {
                    drop(world);
                    // It may hang on more than this cloud.
                    return condition(self);
                }
            }
            if Instant::now() >= deadline {
                return false;
            }
        }
    }

    /// Adds a rule.
    pub fn fault(&self, fault: Fault) {
        self.with(|world| world.faults.push(fault));
    }

    /// Removes all rules of requests and of devices.
    pub fn clear_faults(&self) {
        self.with(|world| {
            world.faults.clear();
            world.device_faults.clear();
        });
    }

    /// What is wrong with the next devices of a volume, until it is taken back by `None`.
    pub fn device_fault(&self, volume: &str, fault: impl Into<Option<DeviceFault>>) {
        let fault = fault.into();
        self.with(|world| match fault {
            Some(fault) => drop(world.device_faults.insert(volume.to_owned(), fault)),
            None => drop(world.device_faults.remove(volume)),
        });
    }

    /// The volumes as they are now, for [`crate::Kind::Stale`].
    pub fn view(&self) -> View {
        self.core().view(&self.core().world.lock())
    }

    /// How long jobs take from now on.
    pub fn set_job_delay(&self, delay: Duration) {
        self.with(|world| world.job_delay = delay);
    }

    /// How long the jobs of one command take from now on.
    pub fn set_delay(&self, command: &str, delay: Duration) {
        self.with(|world| world.delays.insert(command.to_owned(), delay));
    }

    /// Which signatures are taken from now on.
    pub fn set_signatures(&self, signatures: Signatures) {
        *self.core().signatures.lock() = signatures;
    }

    /// Has the server's clock be so many seconds ahead of this machine's.
    pub fn set_clock(&self, seconds: i64) {
        self.with(|world| world.clock = seconds);
    }

    /// Has answers carry a `Date`, as a proxy adds it; the server itself does not (1.3).
    pub fn set_dated(&self, dated: bool) {
        self.with(|world| world.dated = dated);
    }

    /// Has the next volumes made have these ids, in this order: lower-case UUIDs.
    pub fn next_volume_ids(&self, ids: &[&str]) {
        self.with(|world| world.next_ids.extend(ids.iter().map(|id| (*id).to_owned())));
    }
}
