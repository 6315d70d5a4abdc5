//! Actions behind the client's back: an administrator's, another tenant's, the hardware's.

use std::collections::BTreeMap;
use std::io;

use crate::cloud::FakeCloud;
use crate::options::{Account, NewVm, uuid};
use crate::run::{Submission, submit};
use crate::state::{Effect, Snapshot, Vm, Volume, World};
use crate::time;
use crate::work::{Work, remove};

/// What an action could not do.
pub type Refused = String;

fn none(what: &str, id: &str) -> Refused {
    format!("the fake cloud has no {what} {id}")
}

impl FakeCloud {
    fn on_volume<T>(&self, id: &str, act: impl FnOnce(&mut Volume) -> T) -> Result<T, Refused> {
        self.with(|world| world.volumes.get_mut(id).map(act).ok_or_else(|| none("volume", id)))
    }

    /// Changes a VM's row in whatever way, its VM snapshots and backups for example. For its state
    /// see [`FakeCloud::set_vm_state`].
    ///
    /// # Errors
    /// No such VM.
    pub fn change_vm(&self, id: &str, change: impl FnOnce(&mut Vm)) -> Result<(), Refused> {
        self.with(|world| world.vms.get_mut(id).map(change).ok_or_else(|| none("VM", id)))
    }

    /// Changes a volume's row in whatever way: name, state, tags, size in the book, sight.
    ///
    /// # Errors
    /// No such volume.
    pub fn change_volume(&self, id: &str, change: impl FnOnce(&mut Volume)) -> Result<(), Refused> {
        self.on_volume(id, change)
    }

    /// Changes an account, its quota for example.
    ///
    /// # Errors
    /// No such account.
    pub fn change_account(&self, name: &str, change: impl FnOnce(&mut Account)) -> Result<(), Refused> {
        self.with(|world| {
            world.accounts.iter_mut().find(|a| a.name == name).map(change).ok_or_else(|| none("account", name))
        })
    }

    /// Adds a VM.
    ///
    /// # Errors
    /// Its root disk could not be made or plugged.
    pub fn add_vm(&self, vm: NewVm) -> io::Result<()> {
        self.core().add_vm(vm)
    }

    /// Adds a volume of `size` bytes that has storage and is Ready; its id.
    ///
    /// # Errors
    /// Its file could not be made.
    pub fn add_volume(&self, name: &str, size: u64) -> io::Result<String> {
        let id = self.with(|world| world.next_ids.pop_front()).unwrap_or_else(uuid);
        self.core().storage.make(&id, size)?;
        self.with(|world| {
            let volume = Volume {
                id: id.clone(),
                number: world.number(),
                name: name.to_owned(),
                size,
                state: "Ready".into(),
                kind: "DATADISK".into(),
                zone: world.zones.first().map(|z| z.id.clone()).unwrap_or_default(),
                offering: world.offerings.first().map(|o| o.id.clone()),
                account: world.accounts.first().map(|a| a.name.clone()).unwrap_or_default(),
                project: None,
                vm: None,
                device_id: None,
                attached: None,
                created: time::now(),
                tags: BTreeMap::new(),
                protected: false,
                hidden: false,
            };
            world.volumes.insert(id.clone(), volume);
            world.record(Effect::Created, &id, true);
        });
        Ok(id)
    }

    /// Attaches a volume at once and without a job, whatever stands in the way; its device id.
    ///
    /// # Errors
    /// No such volume or VM, no free device id, or the hypervisor's words.
    pub fn admin_attach(&self, volume: &str, vm: &str) -> Result<u32, Refused> {
        let device_id = self.with(|world| {
            let vm = world.vms.get(vm).ok_or_else(|| none("VM", vm))?;
            let found = world.volumes.get(volume).ok_or_else(|| none("volume", volume))?;
            if found.state == "Allocated" {
                self.core().storage.make(volume, found.size).map_err(|e| e.to_string())?;
            }
            world.free_device_id(vm).ok_or_else(|| format!("{} is full", vm.name))
        })?;
        self.core().plug(volume, vm, device_id)?;
        self.with(|world| {
            if let Some(found) = world.volumes.get_mut(volume) {
                found.state = "Ready".into();
                found.vm = Some(vm.to_owned());
                found.device_id = Some(device_id);
                found.attached = Some(time::now());
            }
            world.record(Effect::Attached, volume, true);
        });
        Ok(device_id)
    }

    /// Detaches a volume at once and without a job.
    ///
    /// # Errors
    /// No such volume, or the hypervisor's words.
    pub fn admin_detach(&self, volume: &str) -> Result<(), Refused> {
        let found = self.volume(volume).ok_or_else(|| none("volume", volume))?;
        if let Some(vm) = found.vm {
            self.core().unplug(volume, &vm)?;
        }
        self.with(|world| {
            forget_attachment(world, volume);
            world.record(Effect::Detached, volume, true);
        });
        Ok(())
    }

    /// Starts an attach by a job of somebody else; the job's id.
    ///
    /// # Errors
    /// No such volume or VM.
    pub fn admin_attach_job(&self, volume: &str, vm: &str) -> Result<String, Refused> {
        let work = Work::Attach { volume: volume.to_owned(), vm: vm.to_owned(), device_id: None };
        self.admin_job("attachVolume", volume, vm, work)
    }

    /// Starts a detach by a job of somebody else; the job's id.
    ///
    /// # Errors
    /// No such volume, or it is not attached.
    pub fn admin_detach_job(&self, volume: &str) -> Result<String, Refused> {
        let vm = self.volume(volume).and_then(|v| v.vm).ok_or_else(|| none("attached volume", volume))?;
        self.admin_job("detachVolume", volume, &vm, Work::Detach { volume: volume.to_owned(), vm: vm.clone() })
    }

    fn admin_job(&self, command: &str, volume: &str, vm: &str, work: Work) -> Result<String, Refused> {
        self.with(|world| {
            world.volumes.get(volume).ok_or_else(|| none("volume", volume))?;
            world.vms.get(vm).ok_or_else(|| none("VM", vm))?;
            let new = Submission {
                command: command.to_owned(),
                account: String::new(),
                instance: Some(("Volume".into(), volume.to_owned())),
                queue: Some(vm.to_owned()),
                work: Ok(work),
                custom: None,
                kinds: Vec::new(),
            };
            submit(self.core(), world, new).map_err(|refusal| refusal.text)
        })
    }

    /// Moves a volume to Destroy, or away for good.
    ///
    /// # Errors
    /// No such volume, or its file could not be removed.
    pub fn admin_destroy(&self, volume: &str, expunge: bool) -> Result<(), Refused> {
        remove(self.core(), volume, expunge, true).map_err(|f| f.text)
    }

    /// Sets a tag, over one that is there.
    ///
    /// # Errors
    /// No such volume.
    pub fn set_tag(&self, volume: &str, key: &str, value: &str) -> Result<(), Refused> {
        self.on_volume(volume, |v| drop(v.tags.insert(key.to_owned(), value.to_owned())))
    }

    /// Removes a tag.
    ///
    /// # Errors
    /// No such volume.
    pub fn remove_tag(&self, volume: &str, key: &str) -> Result<(), Refused> {
        self.on_volume(volume, |v| drop(v.tags.remove(key)))
    }

    /// Renames a volume.
    ///
    /// # Errors
    /// No such volume.
    pub fn rename(&self, volume: &str, name: &str) -> Result<(), Refused> {
        self.on_volume(volume, |v| v.name = name.to_owned())
    }

    /// Takes a volume out of everybody's sight, or shows it again.
    ///
    /// # Errors
    /// No such volume.
    pub fn hide_volume(&self, volume: &str, hidden: bool) -> Result<(), Refused> {
        self.on_volume(volume, |v| v.hidden = hidden)
    }

    /// Takes a VM out of everybody's sight, or shows it again.
    ///
    /// # Errors
    /// No such VM.
    pub fn hide_vm(&self, vm: &str, hidden: bool) -> Result<(), Refused> {
        self.change_vm(vm, |vm| vm.hidden = hidden)
    }

    /// Sets a VM's state. Its devices go when it leaves Running and Migrating, and come when it
    /// runs (again).
    ///
    /// # Errors
    /// No such VM, or the hypervisor's words.
    pub fn set_vm_state(&self, vm: &str, state: &str) -> Result<(), Refused> {
        let alive = |state: &str| matches!(state, "Running" | "Migrating");
        let was = self.vm(vm).ok_or_else(|| none("VM", vm))?.state;
        self.change_vm(vm, |vm| vm.state = state.to_owned())?;
        for volume in self.on_vm(vm) {
            match (alive(&was), alive(state)) {
                (true, false) => self.core().unplug(&volume.id, vm)?,
                (false, true) => self.core().plug(&volume.id, vm, volume.device_id.unwrap_or_default())?,
                _ => {}
            }
        }
        Ok(())
    }

    /// Takes a VM snapshot (attach and detach are refused from now on), or removes all of them.
    ///
    /// # Errors
    /// No such VM.
    pub fn set_vm_snapshots(&self, vm: &str, count: u32) -> Result<(), Refused> {
        self.change_vm(vm, |vm| vm.vm_snapshots = count)
    }

    /// Gives a volume so many snapshot policies.
    ///
    /// # Errors
    /// No such volume.
    pub fn set_snapshot_policies(&self, volume: &str, count: u32) -> Result<(), Refused> {
        self.with(|world| {
            world.volumes.get(volume).ok_or_else(|| none("volume", volume))?;
            world.snapshot_policies.insert(volume.to_owned(), count);
            Ok(())
        })
    }

    /// Most volumes of the first account.
    pub fn set_quota(&self, most: Option<usize>) {
        self.with(|world| world.accounts[0].most_volumes = most);
    }

    /// Starts a snapshot of a volume that runs until [`FakeCloud::end_snapshot`]; its id.
    ///
    /// # Errors
    /// No such volume.
    pub fn start_snapshot(&self, volume: &str) -> Result<String, Refused> {
        self.with(|world| {
            let found = world.volumes.get_mut(volume).ok_or_else(|| none("volume", volume))?;
            found.state = "Snapshotting".into();
            let snapshot = Snapshot {
                id: uuid(),
                volume: volume.to_owned(),
                name: "scheduled".into(),
                state: "BackingUp".into(),
                size: found.size,
                created: time::now(),
                account: found.account.clone(),
                tags: BTreeMap::new(),
            };
            let id = snapshot.id.clone();
            world.snapshots.insert(id.clone(), snapshot);
            Ok(id)
        })
    }

    /// Ends it: the volume's bytes of this moment are in it.
    ///
    /// # Errors
    /// No such snapshot, or its file could not be written.
    pub fn end_snapshot(&self, snapshot: &str) -> Result<(), Refused> {
        self.with(|world| {
            let found = world.snapshots.get_mut(snapshot).ok_or_else(|| none("snapshot", snapshot))?;
            self.core().storage.take(&found.volume, snapshot).map_err(|e| e.to_string())?;
            found.state = "BackedUp".into();
            let volume = found.volume.clone();
            if let Some(volume) = world.volumes.get_mut(&volume) {
                volume.state = "Ready".into();
            }
            Ok(())
        })
    }

    /// Lets go on what [`crate::Kind::JobHangs`] holds.
    pub fn release_jobs(&self) {
        self.with(|world| world.held.clear());
    }

    /// The jobs that are held now.
    pub fn held_jobs(&self) -> Vec<String> {
        self.with(|world| world.held.clone())
    }

    /// Ends all open jobs as the end of their management server does: 2/530 without a result, what
    /// was done stays done. Requests go on: another server answers them.
    pub fn restart_server(&self) {
        self.with(|world| {
            let open: Vec<_> = world.jobs.values().filter(|j| !j.done()).map(|j| j.id.clone()).collect();
            world.killed.extend(open);
        });
    }

    /// Has a job not be known any more, as a day after its end.
    pub fn expire_job(&self, job: &str) {
        self.with(|world| {
            if let Some(job) = world.jobs.get_mut(job) {
                job.lost = true;
            }
        });
    }

    /// Has the devices of a volume that are late or held appear now.
    ///
    /// # Errors
    /// The hypervisor's words.
    pub fn let_device_come(&self, volume: &str) -> Result<(), Refused> {
        self.core().come(volume)
    }

    /// Pulls a volume's devices without a word to the cloud's books.
    ///
    /// # Errors
    /// The hypervisor's words.
    pub fn pull_device(&self, volume: &str) -> Result<(), Refused> {
        let vms: Vec<_> = self.with(|world| {
            world.devices.iter().filter(|d| d.plug.volume == volume).map(|d| d.plug.vm.clone()).collect()
        });
        vms.iter().try_for_each(|vm| self.core().unplug(volume, vm))
    }

    /// Plugs a volume's device into a VM without a word to the cloud's books: an orphan (4.4).
    ///
    /// # Errors
    /// The hypervisor's words.
    pub fn plug_device(&self, volume: &str, vm: &str, device_id: u32) -> Result<(), Refused> {
        let found = self.volume(volume).ok_or_else(|| none("volume", volume))?;
        if found.state == "Allocated" {
            self.core().storage.make(volume, found.size).map_err(|e| e.to_string())?;
        }
        self.core().plug(volume, vm, device_id)
    }
}

fn forget_attachment(world: &mut World, volume: &str) {
    if let Some(volume) = world.volumes.get_mut(volume) {
        (volume.vm, volume.device_id, volume.attached) = (None, None, None);
    }
}
