//! The fake cloud's disks of its host VM: plugged into the machine over QMP, with the serials that
//! CloudStack gives on KVM.

use std::sync::Arc;

use fakecloud::{Hypervisor, Plug};

use crate::machine::Machine;

/// The hypervisor of one VM, whose id is the machine's.
pub struct OverQmp {
    pub vm: String,
    pub machine: Arc<Machine>,
}

/// What QEMU knows a disk by; its rules are a letter first, then letters, digits, `-`, `.` and `_`.
fn id(disk: &Plug) -> String {
    format!("volume-{}", disk.key)
}

impl Hypervisor for OverQmp {
    fn serves(&self, vm: &str) -> bool {
        vm == self.vm
    }

    fn plug(&self, disk: &Plug) -> Result<(), String> {
        self.machine.plug(&id(disk), &disk.path, disk.size, &disk.identity.serial())
    }

    fn unplug(&self, disk: &Plug) -> Result<(), String> {
        self.machine.unplug(&id(disk))
    }

    fn resized(&self, disk: &Plug) -> Result<(), String> {
        self.machine.resize(&id(disk), disk.size)
    }

    fn end(&self) {
        self.machine.off();
    }
}
