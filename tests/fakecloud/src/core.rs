//! What all threads share.

use std::collections::BTreeMap;
use std::io;
use std::net::{Shutdown, TcpStream};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use parking_lot::{Condvar, Mutex, MutexGuard};

use crate::fault::View;
use crate::hypervisor::Hypervisor;
use crate::options::{NewVm, Options, uuid};
use crate::sign::Signatures;
use crate::state::{Vm, Volume, World};
use crate::storage::Storage;
use crate::time;

/// What does not change while the cloud runs.
#[derive(Debug, Clone)]
pub(crate) struct Rules {
    pub enforce_post: bool,
    pub rate_limit: Option<u32>,
    pub page_size: usize,
    pub custom_job_ids: bool,
    pub unstable_order: bool,
    pub extra_bytes: u64,
    pub version: String,
    pub root_disk: u64,
}

/// One cloud.
pub(crate) struct Core {
    pub world: Mutex<World>,
    /// Signalled at each request, effect and change of a job.
    pub changed: Condvar,
    pub storage: Storage,
    pub hypervisor: Box<dyn Hypervisor>,
    pub rules: Rules,
    pub signatures: Mutex<Signatures>,
    keys: AtomicU64,
    connections: Mutex<BTreeMap<u64, TcpStream>>,
    threads: Mutex<Vec<JoinHandle<()>>>,
}

impl Core {
    /// A cloud with its VMs and their root disks; the host's are plugged.
    pub fn new(options: Options) -> io::Result<Arc<Self>> {
        let world = World::new(&options);
        let rules = Rules {
            enforce_post: options.enforce_post,
            rate_limit: options.rate_limit,
            page_size: options.page_size.max(1),
            custom_job_ids: options.custom_job_ids,
            unstable_order: options.unstable_order,
            extra_bytes: options.extra_bytes,
            version: options.version,
            root_disk: options.root_disk,
        };
        let core = Arc::new(Core {
            world: Mutex::new(world),
            changed: Condvar::new(),
            storage: Storage::new(options.dir)?,
            hypervisor: options.hypervisor,
            rules,
            signatures: Mutex::new(options.signatures),
            keys: AtomicU64::new(1),
            connections: Mutex::default(),
            threads: Mutex::default(),
        });
        for vm in std::iter::once(options.host).chain(options.vms) {
            core.add_vm(vm)?;
        }
        Ok(core)
    }

    /// Adds a VM, with its root disk plugged if its disks are real.
    pub fn add_vm(self: &Arc<Self>, vm: NewVm) -> io::Result<()> {
        let root = {
            let mut world = self.world.lock();
            let zone = vm.zone.or_else(|| world.zones.first().map(|z| z.id.clone())).unwrap_or_default();
            let account = vm.account.or_else(|| world.accounts.first().map(|a| a.name.clone())).unwrap_or_default();
            let number = world.number();
            let root = vm.root_disk.then(|| Volume {
                id: uuid(),
                number: number + 1,
                name: format!("ROOT-{number}"),
                size: self.rules.root_disk,
                state: "Ready".into(),
                kind: "ROOT".into(),
                zone: zone.clone(),
                offering: None,
                account: account.clone(),
                project: None,
                vm: Some(vm.id.clone()),
                device_id: Some(0),
                attached: Some(time::now()),
                created: time::now(),
                tags: BTreeMap::new(),
                protected: false,
                hidden: false,
            });
            world.number();
            let made = Vm {
                id: vm.id.clone(),
                number,
                name: vm.name,
                state: vm.state,
                zone,
                hypervisor: vm.hypervisor,
                account,
                project: None,
                most_disks: vm.most_disks,
                vm_snapshots: 0,
                backups: false,
                hidden: false,
            };
            world.vms.insert(vm.id.clone(), made);
            if let Some(root) = &root {
                self.storage.make(&root.id, root.size)?;
                world.volumes.insert(root.id.clone(), root.clone());
            }
            root
        };
        if let Some(root) = root {
            self.plug(&root.id, &vm.id, 0).map_err(io::Error::other)?;
        }
        Ok(())
    }

    /// Names one plugging.
    pub fn plug_key(&self) -> u64 {
        self.keys.fetch_add(1, Ordering::Relaxed)
    }

    /// Starts a thread that the end of the cloud waits for.
    pub fn spawn(&self, name: &str, work: impl FnOnce() + Send + 'static) {
        // Without threads nothing can go on; the caller's job or connection then never answers.
        let Ok(thread) = std::thread::Builder::new().name(name.to_owned()).spawn(work) else { return };
        let mut threads = self.threads.lock();
        threads.retain(|thread| !thread.is_finished());
        threads.push(thread);
    }

    pub fn connected(&self, stream: TcpStream) -> u64 {
        let number = self.plug_key();
        self.connections.lock().insert(number, stream);
        number
    }

    pub fn disconnected(&self, number: u64) {
        self.connections.lock().remove(&number);
    }

    /// Says that something changed, under the lock that it was changed under.
    pub fn tell(&self, world: &mut World) {
        world.version += 1;
        self.changed.notify_all();
    }

    /// Waits so long, or until the cloud ends: false then.
    pub fn wait(&self, world: &mut MutexGuard<'_, World>, time: Duration) -> bool {
        self.wait_unless(world, time, |world| world.ending);
        !world.ending
    }

    /// Waits so long, or until `stop` holds.
    pub fn wait_unless(&self, world: &mut MutexGuard<'_, World>, time: Duration, mut stop: impl FnMut(&World) -> bool) {
        let deadline = Instant::now() + time;
        while !stop(world) && !self.changed.wait_until(world, deadline).timed_out() {}
    }

    /// The volumes as they are, with the pending jobs that they show.
    pub fn view(&self, world: &World) -> View {
        let pending = |v: &Volume| world.pending(&v.id).map(|job| (v.id.clone(), job.id.clone()));
        View { pending: world.volumes.values().filter_map(pending).collect(), volumes: world.volumes.clone() }
    }

    /// Ends connections, jobs and devices; the listener is the caller's.
    pub fn end(&self) {
        {
            let mut world = self.world.lock();
            world.ending = true;
            self.tell(&mut world);
        }
        loop {
            for stream in self.connections.lock().values() {
                let _ = stream.shutdown(Shutdown::Both);
            }
            // Threads may have started others meanwhile.
            let threads = std::mem::take(&mut *self.threads.lock());
            if threads.is_empty() {
                break;
            }
            for thread in threads {
                let _ = thread.join();
            }
        }
        self.hypervisor.end();
    }
}
