//! Devices of attached volumes, with what can be wrong with them.

use std::sync::Arc;
use std::time::Duration;

use crate::core::Core;
use crate::fault::DeviceFault;
use crate::hypervisor::{Identity, Plug};
use crate::state::{Device, Effect};

/// The agent's words when a guest keeps its disk (2.4).
const STUCK: &str = "Could not detach volume after sending the command and waiting for [10000] milliseconds. Probably \
                     the VM does not support the sent detach command or the device is busy at the moment. Try again \
                     in a couple of minutes.";

impl Core {
    /// Makes the volume's device appear in its VM, if that VM's disks are real and it runs.
    ///
    /// # Errors
    /// The hypervisor's words.
    pub fn plug(self: &Arc<Self>, volume: &str, vm: &str, device_id: u32) -> Result<(), String> {
        if !self.hypervisor.serves(vm) {
            return Ok(());
        }
        let (plug, fault) = {
            let mut world = self.world.lock();
            let Some(found) = world.volumes.get(volume) else { return Err(format!("no volume {volume}")) };
            if world.vms.get(vm).is_none_or(|vm| vm.state != "Running") {
                return Ok(());
            }
            let plug = Plug {
                key: self.plug_key(),
                volume: volume.to_owned(),
                vm: vm.to_owned(),
                device_id,
                identity: Identity::Volume(volume.to_owned()),
                size: found.size,
                path: self.storage.volume(volume),
            };
            // libvirt demands unique target names, which follow from the device id (5.1).
            let there = |d: &Device| d.plug.vm == vm && d.plug.device_id == device_id;
            if world.devices.iter().any(there) {
                let letter = char::from(b'a' + u8::try_from(device_id % 26).unwrap_or(0));
                return Err(format!("internal error: target 'vd{letter}' duplicated for disk sources"));
            }
            let fault = world.device_faults.get(volume).cloned();
            world.devices.push(Device { plug: plug.clone(), there: false });
            (plug, fault)
        };
        match fault {
            None | Some(DeviceFault::Stuck) => self.appear(plug),
            Some(DeviceFault::Held) => Ok(()),
            Some(DeviceFault::Late(time)) => {
                self.appear_late(plug, time);
                Ok(())
            }
            Some(DeviceFault::Known(identity)) => self.appear(Plug { identity, ..plug }),
            Some(DeviceFault::Size(size)) => self.appear(Plug { size, ..plug }),
            Some(DeviceFault::Twin) => {
                let twin = Plug { key: self.plug_key(), ..plug.clone() };
                self.world.lock().devices.push(Device { plug: twin.clone(), there: false });
                self.appear(plug)?;
                self.appear(twin)
            }
        }
    }

    fn appear(&self, plug: Plug) -> Result<(), String> {
        let result = self.hypervisor.plug(&plug);
        let mut world = self.world.lock();
        let at = world.devices.iter().position(|d| d.plug.key == plug.key);
        match (&result, at) {
            (Ok(()), Some(at)) => {
                world.record(Effect::Plugged, &plug.volume, false);
                world.devices[at] = Device { plug, there: true };
            }
            // It was pulled while it was coming.
            (Ok(()), None) => {
                drop(world);
                let _ = self.hypervisor.unplug(&plug);
                return result;
            }
            (Err(_), Some(at)) => drop(world.devices.remove(at)),
            (Err(_), None) => {}
        }
        self.tell(&mut world);
        result
    }

    fn appear_late(self: &Arc<Self>, plug: Plug, time: Duration) {
        let core = Arc::clone(self);
        self.spawn("fakecloud-late", move || {
            if core.wait(&mut core.world.lock(), time) {
                let _ = core.come(&plug.volume);
            }
        });
    }

    /// Has the devices of a volume that are still to come appear now.
    pub fn come(&self, volume: &str) -> Result<(), String> {
        loop {
            let waiting = {
                let world = self.world.lock();
                world.devices.iter().find(|d| d.plug.volume == volume && !d.there).map(|d| d.plug.clone())
            };
            match waiting {
                Some(plug) => self.appear(plug)?,
                None => return Ok(()),
            }
        }
    }

    /// Makes the volume's devices in this VM go. None there is success (4.4).
    ///
    /// # Errors
    /// The hypervisor's words; what could not go stays.
    pub fn unplug(&self, volume: &str, vm: &str) -> Result<(), String> {
        loop {
            let plug = {
                let mut world = self.world.lock();
                if world.device_faults.get(volume) == Some(&DeviceFault::Stuck) {
                    return Err(STUCK.into());
                }
                let of_it = |d: &Device| d.plug.volume == volume && d.plug.vm == vm;
                let Some(at) = world.devices.iter().position(of_it) else { return Ok(()) };
                let device = world.devices[at].clone();
                if !device.there {
                    world.devices.remove(at);
                    continue;
                }
                device.plug
            };
            self.hypervisor.unplug(&plug)?;
            let mut world = self.world.lock();
            world.devices.retain(|d| d.plug.key != plug.key);
            world.record(Effect::Unplugged, volume, false);
            self.tell(&mut world);
        }
    }

    /// Tells the volume's devices that its file has another size.
    ///
    /// # Errors
    /// The hypervisor's words.
    pub fn resize_devices(&self, volume: &str, size: u64) -> Result<(), String> {
        let plugs: Vec<_> = {
            let mut world = self.world.lock();
            let of_it = world.devices.iter_mut().filter(|d| d.plug.volume == volume);
            let told = of_it.map(|d| {
                d.plug.size = size;
                d.clone()
            });
            told.filter(|d| d.there).map(|d| d.plug).collect()
        };
        plugs.iter().try_for_each(|plug| self.hypervisor.resized(plug))
    }
}
