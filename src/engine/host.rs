//! Is this host the VM that it is said to be? Proved by its root disk before anything is changed.
//!
//! A wrong id would make every volume of another VM look attached here, and every detach meant for
//! here go there. The proof holds for as long as the daemon runs; a contradiction is looked at again
//! at each round.

use std::sync::Arc;

use super::Engine;
use super::operation::{Fail, cloud_fail};
use crate::cloud::{CloudVolume, Survey};
use crate::error::Error;
use crate::model::{Disk, VmId};

/// What is known of it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Proof {
    /// The provider knows by itself.
    NotNeeded,
    /// Nobody has looked yet, or the cloud has not answered.
    Unseen,
    /// The VM's root disk is a disk of this kernel.
    Proved,
    /// It is not; the reason.
    Contradicted(Arc<str>),
}

/// What the cloud's list of the VM's volumes and the kernel's disks say. Pure.
pub(super) fn prove(host: VmId, volumes: &[CloudVolume], disks: &[Disk]) -> Proof {
    let mut own = volumes.iter().filter(|v| v.attached.is_some_and(|a| a.vm == host)).peekable();
    if own.peek().is_none() {
        return Proof::Contradicted(
            format!("the cloud shows no volume of VM {host}: is that this host, and may these keys see it?").into(),
        );
    }
    match own.find(|v| v.attached.is_some_and(|a| a.device_id == Some(0))) {
        None => Proof::Contradicted(format!("the cloud shows no root disk of VM {host}").into()),
        Some(root) if disks.iter().any(|disk| disk.identity.names(root.id)) => Proof::Proved,
        Some(root) => Proof::Contradicted(
            format!("VM {host} has root disk {} in the cloud, and no disk here carries its identity: set the VM id of this host", root.id)
                .into(),
        ),
    }
}

/// Whether this kernel has the root disk that the cloud shows of VM `host`.
///
/// # Errors
/// Why not, in words.
pub fn is_here(host: VmId, volumes: &[CloudVolume], disks: &[Disk]) -> Result<(), Arc<str>> {
    match prove(host, volumes, disks) {
        Proof::Contradicted(why) => Err(why),
        Proof::NotNeeded | Proof::Unseen | Proof::Proved => Ok(()),
    }
}

impl Engine {
    /// What a round has seen of this host.
    pub(super) fn seen_host(&self, volumes: &[CloudVolume], disks: &[Disk]) {
        let mut proof = self.proof.lock();
        if matches!(*proof, Proof::Unseen | Proof::Contradicted(_)) {
            let now = prove(self.host, volumes, disks);
            if now != *proof {
                match &now {
                    Proof::Contradicted(why) => tracing::error!("this host is not proved: {why}; nothing is changed"),
                    _ => tracing::info!("this host is VM {}: its root disk is here", self.host),
                }
            }
            *proof = now;
        }
    }

    /// Why nothing may be changed, if this host is another than it is said to be.
    pub(super) fn contradicted(&self) -> Option<Arc<str>> {
        match &*self.proof.lock() {
            Proof::Contradicted(why) => Some(why.clone()),
            _ => None,
        }
    }

    /// Goes on only on a host that is proved; looks if nobody has.
    pub(super) async fn on_proved_host(&self) -> Result<(), Fail> {
        if *self.proof.lock() == Proof::Unseen {
            let survey = Survey { vms: vec![self.host], ..Survey::default() };
            let seen = self.cloud.survey(&survey).await.map_err(|error| {
                Fail::clean(cloud_fail("finding this host's own disks", None, None, self.about.name, error).error)
            })?;
            let disks = self.kernel(|devices| devices.disks()).await;
            let disks = disks.map_err(|e| Fail::clean(Error::CannotTell { why: e.to_string() }))?;
            self.seen_host(&seen, &disks);
        }
        match self.contradicted() {
            Some(why) => Err(Fail::clean(Error::HostUnproved { why: why.to_string() })),
            None => Ok(()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cloud::Attachment;
    use crate::model::{BootId, DevNo, DiskIdentity, Incarnation, VolumeId};

    fn volume(vm: VmId, device_id: Option<u32>) -> CloudVolume {
        CloudVolume {
            id: VolumeId::random(),
            name: String::new(),
            size: 1,
            state: "Ready".into(),
            attached: Some(Attachment { vm, device_id }),
            mark: None,
            carries_host: None,
            pending: None,
        }
    }

    fn disk(of: VolumeId) -> Disk {
        Disk {
            name: "vda".into(),
            dev: DevNo { major: 252, minor: 0 },
            incarnation: Incarnation { boot: BootId::random(), diskseq: 1 },
            size: 1,
            identity: DiskIdentity::VirtioSerial(of.0.simple().to_string()[..20].into()),
        }
    }

    #[test]
    fn a_host_is_proved_by_its_root_disk_and_by_nothing_else() {
        let (host, other) = (VmId::random(), VmId::random());
        let root = volume(host, Some(0));
        let data = volume(host, Some(1));
        let foreign = volume(other, Some(0));
        let all = [root.clone(), data.clone(), foreign.clone()];
        assert_eq!(prove(host, &all, &[disk(root.id)]), Proof::Proved);
        for (volumes, disks, why) in [
            (&all[..], vec![disk(data.id), disk(foreign.id)], "no disk here carries"),
            (&all[..], vec![], "no disk here carries"),
            (&all[1..], vec![disk(data.id)], "no root disk"),
            (&all[2..], vec![disk(foreign.id)], "no volume of VM"),
        ] {
            let Proof::Contradicted(words) = prove(host, volumes, &disks) else { panic!("proved by {disks:?}") };
            assert!(words.contains(why), "{words}");
        }
    }
}
