//! The kernel: disks, our descriptors on them, and holds.

use super::*;

struct FakePin {
    lab: Lab,
    disk: Disk,
    released: AtomicBool,
}

impl std::fmt::Debug for FakePin {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "pin of {}", self.disk.name)
    }
}

impl FakePin {
    fn now(&self) -> Option<Disk> {
        if self.released.load(Ordering::SeqCst) {
            return None;
        }
        self.lab.state().kernel.disks.iter().find(|d| d.incarnation == self.disk.incarnation).cloned()
    }
}

impl Pin for FakePin {
    fn alive(&self) -> bool {
        self.now().is_some()
    }

    fn look(&self) -> Result<Disk, DevicesError> {
        self.now().ok_or_else(|| DevicesError::Gone { device: self.disk.name.to_string() })
    }

    fn release(&self) {
        if !self.released.swap(true, Ordering::SeqCst)
            && let Some(n) = self.lab.state().kernel.open.get_mut(&self.disk.incarnation.diskseq)
        {
            *n = n.saturating_sub(1);
        }
    }
}

impl Drop for FakePin {
    fn drop(&mut self) {
        self.release();
    }
}

#[derive(Debug)]
struct FakeHold;
impl Hold for FakeHold {}

impl Fake {
    fn gone_daemon<T>(&self) -> Result<T, DevicesError> {
        Err(DevicesError::Failed { what: "the daemon is dead".into(), words: String::new() })
    }
}

impl Devices for Fake {
    fn boot(&self) -> BootId {
        self.lab.state().kernel.boot
    }

    fn disks(&self) -> Result<Vec<Disk>, DevicesError> {
        if self.dead() {
            return self.gone_daemon();
        }
        let mut state = self.lab.state();
        state.kernel.scans += 1;
        if state.kernel.blind {
            return Err(DevicesError::Failed { what: "/sys/block".into(), words: "fake: EIO".into() });
        }
        Ok(state.kernel.disks.clone())
    }

    fn disk(&self, name: &str) -> Result<Option<Disk>, DevicesError> {
        if self.dead() {
            return self.gone_daemon();
        }
        Ok(self.lab.state().kernel.disks.iter().find(|d| &*d.name == name).cloned())
    }

    fn pin(&self, disk: &Disk) -> Result<Arc<dyn Pin>, DevicesError> {
        if self.dead() {
            return self.gone_daemon();
        }
        let mut state = self.lab.state();
        if !state.kernel.disks.iter().any(|d| d.incarnation == disk.incarnation) {
            return Err(DevicesError::Gone { device: disk.name.to_string() });
        }
        *state.kernel.open.entry(disk.incarnation.diskseq).or_default() += 1;
        Ok(Arc::new(FakePin { lab: self.lab.clone(), disk: disk.clone(), released: AtomicBool::new(false) }))
    }

    fn hold(&self, disk: &Disk) -> Result<Box<dyn Hold>, DevicesError> {
        if self.dead() {
            return self.gone_daemon();
        }
        self.lab.say(format!("hold {}", disk.name));
        let device = disk.name.to_string();
        let mut state = self.lab.state();
        let named = state.kernel.holders.get(&disk.dev).cloned().unwrap_or_default();
        if !named.is_empty() {
            return Err(DevicesError::InUse { device, holders: named });
        }
        match state.kernel.holds.pop_front() {
            None => Ok(Box::new(FakeHold)),
            Some(Held::InUse(holder)) => Err(DevicesError::InUse { device, holders: vec![holder] }),
            Some(Held::NotFlushed) => Err(DevicesError::Flush { device, words: "fake: EIO".into() }),
        }
    }

    fn flush(&self, disk: &Disk, crash: bool) -> Result<(), DevicesError> {
        if self.dead() {
            return self.gone_daemon();
        }
        self.lab.say(format!("flush {}{}", disk.name, if crash { " crash" } else { "" }));
        let device = disk.name.to_string();
        let mut state = self.lab.state();
        if let Some(Held::NotFlushed) = state.kernel.holds.pop_front() {
            return Err(DevicesError::Flush { device, words: "fake: EIO".into() });
        }
        match state.kernel.writers.get(&disk.dev) {
            Some(holders) if !crash => Err(DevicesError::InUse { device, holders: holders.clone() }),
            _ => Ok(()),
        }
    }

    fn holders(&self, dev: DevNo) -> Result<Vec<Holder>, DevicesError> {
        Ok(self.lab.state().kernel.holders.get(&dev).cloned().unwrap_or_default())
    }

    fn carries_host(&self, disk: &Disk) -> Result<Option<String>, DevicesError> {
        Ok(self.lab.state().kernel.carries.get(&*disk.name).cloned())
    }

    fn changes(&self) -> broadcast::Receiver<DeviceChange> {
        match &*self.lab.inner.events.lock() {
            Some(events) => events.subscribe(),
            None => broadcast::channel(1).1,
        }
    }
}
