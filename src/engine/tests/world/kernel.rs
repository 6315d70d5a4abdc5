//! The kernel: its devices follow the cloud's attachments, at once or late, or are pulled by a hand.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use tokio::sync::broadcast;

use super::{Plugged, Port, Sim};
use crate::devices::{DeviceChange, Devices, DevicesError, Hold, Pin};
use crate::model::{BootId, DevNo, Disk, DiskIdentity, Holder, HolderKind, Incarnation, VolumeId};

struct SimPin {
    sim: Sim,
    disk: Disk,
    released: AtomicBool,
}

impl std::fmt::Debug for SimPin {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "pin of {}", self.disk.name)
    }
}

impl SimPin {
    fn now(&self) -> Option<Disk> {
        if self.released.load(Ordering::SeqCst) {
            return None;
        }
        let state = self.sim.state();
        state.kernel.disks.iter().map(|p| &p.disk).find(|d| d.incarnation == self.disk.incarnation).cloned()
    }
}

impl Pin for SimPin {
    fn alive(&self) -> bool {
        self.now().is_some()
    }

    fn look(&self) -> Result<Disk, DevicesError> {
        self.now().ok_or_else(|| DevicesError::Gone { device: self.disk.name.to_string() })
    }

    fn release(&self) {
        if !self.released.swap(true, Ordering::SeqCst)
            && let Some(n) = self.sim.state().kernel.open.get_mut(&self.disk.incarnation.diskseq)
        {
            *n = n.saturating_sub(1);
        }
    }
}

impl Drop for SimPin {
    fn drop(&mut self) {
        self.release();
    }
}

#[derive(Debug)]
struct SimHold;
impl Hold for SimHold {}

impl Sim {
    /// The kernel's devices of a volume become what the cloud's books say, and events tell.
    pub fn follow(&self, volume: VolumeId) {
        let mut events: Vec<(Arc<str>, &str)> = Vec::new();
        {
            let mut state = self.state();
            let state = &mut *state;
            if state.kernel.lazy {
                return;
            }
            let host = self.host();
            let here = state.sky.volumes.get(&volume).filter(|v| v.attached.is_some_and(|(vm, _)| vm == host));
            let wanted = here.map(|v| (v.insertion, v.size));
            let kernel = &mut state.kernel;
            kernel.disks.retain(|p| {
                let stays = p.volume != volume || wanted.is_some_and(|(insertion, _)| insertion == p.insertion);
                if !stays {
                    events.push((p.disk.name.clone(), "remove"));
                }
                stays
            });
            if let Some((insertion, size)) = wanted {
                match kernel.disks.iter_mut().find(|p| p.volume == volume) {
                    Some(p) if p.disk.size != size => {
                        p.disk.size = size;
                        events.push((p.disk.name.clone(), "change"));
                    }
                    Some(_) => {}
                    None => {
                        let minor = (0u32..).find(|n| kernel.disks.iter().all(|p| p.disk.dev.minor != *n)).unwrap();
                        let name: Arc<str> = format!("vd{minor}").into();
                        let incarnation = Incarnation { boot: kernel.boot, diskseq: kernel.next_seq };
                        kernel.next_seq += 1;
                        let identity = DiskIdentity::VirtioSerial(volume.0.simple().to_string()[..20].into());
                        let dev = DevNo { major: 252, minor };
                        let disk = Disk { name: name.clone(), dev, incarnation, size, identity };
                        kernel.disks.push(Plugged { disk, volume, insertion });
                        events.push((name, "add"));
                    }
                }
            }
        }
        self.tell(events);
    }

    fn tell(&self, events: Vec<(Arc<str>, &str)>) {
        for (name, action) in events {
            self.say(|| format!("kernel: {action} {name}"));
            if !self.state().kernel.muted {
                // Nobody may be listening yet.
                let _ = self.0.events.send(DeviceChange { name, action: action.into() });
            }
        }
    }

    /// The same after so long.
    pub fn follow_later(&self, volume: VolumeId, after: Duration) {
        if after.is_zero() {
            return self.follow(volume);
        }
        let sim = self.clone();
        tokio::spawn(async move {
            tokio::time::sleep(after).await;
            sim.follow(volume);
        });
    }

    /// Every device as the books say.
    pub fn follow_all(&self) {
        let mut all: Vec<VolumeId> = self.state().sky.volumes.keys().copied().collect();
        all.extend(self.state().kernel.disks.iter().map(|p| p.volume));
        for volume in all {
            self.follow(volume);
        }
    }

    /// A hand pulls the devices of a volume.
    pub fn pull(&self, volume: VolumeId) {
        let mut gone = Vec::new();
        self.state().kernel.disks.retain(|p| {
            if p.volume == volume {
                gone.push((p.disk.name.clone(), "remove"));
            }
            p.volume != volume
        });
        self.tell(gone);
    }

    /// The host starts anew: no disk is the one it was.
    pub fn reboot(&self) {
        let mut state = self.state();
        let boot = BootId(state.dice.uuid());
        let kernel = &mut state.kernel;
        kernel.boot = boot;
        kernel.next_seq = 1;
        kernel.used.clear();
        for p in &mut kernel.disks {
            p.disk.incarnation = Incarnation { boot, diskseq: kernel.next_seq };
            kernel.next_seq += 1;
        }
    }
}

impl Port {
    fn living<T>(&self) -> Result<(), Result<T, DevicesError>> {
        match self.dead() {
            false => Ok(()),
            true => Err(Err(DevicesError::Failed { what: "the daemon is dead".into(), words: String::new() })),
        }
    }
}

macro_rules! living {
    ($port:expr) => {
        if let Err(dead) = $port.living() {
            return dead;
        }
    };
}

impl Devices for Port {
    fn may_block(&self) -> bool {
        false
    }

    fn boot(&self) -> BootId {
        self.sim.state().kernel.boot
    }

    fn disks(&self) -> Result<Vec<Disk>, DevicesError> {
        living!(self);
        Ok(self.sim.state().kernel.disks.iter().map(|p| p.disk.clone()).collect())
    }

    fn disk(&self, name: &str) -> Result<Option<Disk>, DevicesError> {
        living!(self);
        Ok(self.sim.state().kernel.disks.iter().map(|p| &p.disk).find(|d| &*d.name == name).cloned())
    }

    fn pin(&self, disk: &Disk) -> Result<Arc<dyn Pin>, DevicesError> {
        living!(self);
        let mut state = self.sim.state();
        if !state.kernel.disks.iter().any(|p| p.disk.incarnation == disk.incarnation) {
            return Err(DevicesError::Gone { device: disk.name.to_string() });
        }
        *state.kernel.open.entry(disk.incarnation.diskseq).or_default() += 1;
        Ok(Arc::new(SimPin { sim: self.sim.clone(), disk: disk.clone(), released: AtomicBool::new(false) }))
    }

    fn hold(&self, disk: &Disk) -> Result<Box<dyn Hold>, DevicesError> {
        living!(self);
        let holders = self.holders(disk.dev)?;
        match holders.is_empty() {
            true => Ok(Box::new(SimHold)),
            false => Err(DevicesError::InUse { device: disk.name.to_string(), holders }),
        }
    }

    fn flush(&self, _: &Disk, _: bool) -> Result<(), DevicesError> {
        living!(self);
        Ok(())
    }

    fn holders(&self, dev: DevNo) -> Result<Vec<Holder>, DevicesError> {
        let used = self.sim.state().kernel.used.contains(&dev);
        let dd = || Holder { kind: HolderKind::Open, pid: Some(99), name: "dd".into() };
        Ok(used.then(dd).into_iter().collect())
    }

    fn carries_host(&self, _: &Disk) -> Result<Option<String>, DevicesError> {
        Ok(None)
    }

    fn changes(&self) -> broadcast::Receiver<DeviceChange> {
        self.sim.0.events.subscribe()
    }
}
