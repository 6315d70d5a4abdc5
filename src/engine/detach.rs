//! Detach: C4 in its order, and what puts everything back when it fails.

use std::sync::Arc;

use super::Engine;
use super::inflight::Live;
use super::operation::{Acted, Done, Fail, LOOK_AGAIN, changed};
use super::volume::{cannot_tell, facts, show_facts};
use super::world::Volume;
use crate::cloud::CloudVolume;
use crate::devices::DevicesError;
use crate::error::Error;
use crate::failpoint;
use crate::model::{Disk, DiskRow, Holder, HolderKind, Status, VmId};
use crate::store::Change;

impl Engine {
    pub(super) async fn detach(self: &Arc<Self>, live: &Live, row: DiskRow, vm: Option<VmId>, force: bool) -> Acted {
        let vm = vm.unwrap_or(self.host);
        let volume = self.owned(row)?;
        let what = format!("detach of volume {}", volume.uuid);
        if force {
            self.publish(|core, _| core.world.counters.forced += 1);
        }
        self.step(live, "look at the volume in the cloud")?;
        let seen = self.look_before(live, &volume, &what).await?;
        if vm == self.host {
            self.detach_here(live, &volume, &seen, force, &what).await?;
        } else {
            self.detach_there(live, &volume, &seen, vm, force, &what).await?;
        }
        let after = self.look_until(&volume, &what, |seen| seen.attached.is_none_or(|a| a.vm != vm)).await?;
        if after.attached.is_some_and(|a| a.vm == vm) {
            let why = "the cloud says it is still attached after it said done".into();
            return Err(Fail::ambiguous(Error::Contradiction { volume: volume.uuid, why }));
        }
        let at = (self.clock)();
        let elsewhere = after.attached.map(|a| a.vm);
        let status = if elsewhere.is_some() { Status::Unknown } else { Status::Detached };
        let changes = vec![
            facts(&after, &volume.serial),
            Change::MappingEnd { volume: volume.uuid },
            Change::VolumeStatus { volume: volume.uuid, status, at },
        ];
        Ok(Done {
            note: if force { "forced".into() } else { String::new() },
            changes,
            apply: Some(Box::new(move |core, at| {
                core.with_volume(row, at, |v| {
                    show_facts(v, &after);
                    v.base = status;
                    v.recorded = status;
                    v.vm = elsewhere;
                    v.why = None;
                    if let Some(mapping) = v.mapping.take() {
                        mapping.pin.release();
                    }
                });
            })),
            look: elsewhere.map(|_| row),
        })
    }

    /// C4 in its order: it was withdrawn when the operation began; now hold, flush, test, call,
    /// wait for the node to go. Any failure before the call puts everything back.
    async fn detach_here(
        self: &Arc<Self>,
        live: &Live,
        volume: &Arc<Volume>,
        seen: &CloudVolume,
        force: bool,
        what: &str,
    ) -> Result<(), Fail> {
        let disk = match &volume.mapping {
            Some(mapping) if mapping.pin.alive() => {
                let pin = mapping.pin.clone();
                match self.kernel(move |_| pin.look()).await {
                    Ok(disk) => Some(disk),
                    Err(DevicesError::Gone { .. }) => None,
                    Err(error) => return Err(Fail::clean(Error::CannotTell { why: error.to_string() })),
                }
            }
            _ => None,
        };
        let Some(disk) = disk else {
            // `lost`: no device of ours. One that carries the identity all the same is not told from it.
            let found = self
                .candidates(volume.uuid)
                .await
                .map_err(|e| Fail::clean(Error::CannotTell { why: e.to_string() }))?;
            if let Some(found) = found.first() {
                let why = format!("/dev/{} carries its identity, but was not verified: reconcile first", found.name);
                return Err(Fail::clean(Error::Contradiction { volume: volume.uuid, why }));
            }
            if seen.attached.map(|a| a.vm) == Some(self.host) {
                self.call_detach(live, volume, self.host, force, what).await?;
            }
            return Ok(());
        };
        if !disk.identity.names(volume.uuid) {
            let why = format!("/dev/{} does not carry its identity any more", disk.name);
            return Err(Fail::clean(Error::Contradiction { volume: volume.uuid, why }));
        }
        let in_use = |holders| Error::InUse { volume: volume.uuid, device: format!("/dev/{}", disk.name), holders };
        let hold = if force {
            None
        } else {
            self.step(live, "flush, and look for users")?;
            let held = disk.clone();
            Some(self.kernel(move |devices| devices.hold(&held)).await.map_err(|error| {
                Fail::clean(match error {
                    DevicesError::InUse { holders, .. } => in_use(holders),
                    DevicesError::Flush { words, .. } => Error::NotFlushed { volume: volume.uuid, words },
                    other => Error::CannotTell { why: other.to_string() },
                })
            })?)
        };
        failpoint::reach("detach.held").await;
        if seen.attached.map(|a| a.vm) != Some(self.host) {
            let why = format!("/dev/{} is here, but the cloud does not say attached here", disk.name);
            return Err(Fail::clean(Error::Contradiction { volume: volume.uuid, why }));
        }
        if !self.about.detach_wants_sole_opener {
            let called = self.call_detach(live, volume, self.host, force, what).await;
            drop(hold);
            called?;
            // The cloud has it no more: a descriptor of ours could only keep the kernel from letting go.
            if let Some(mapping) = &volume.mapping {
                mapping.pin.release();
            }
            return self.wait_gone(live, volume, &disk).await;
        }
        self.step(live, "let go of the device")?;
        drop(hold);
        if let Some(mapping) = &volume.mapping {
            mapping.pin.release();
        }
        if let Err(fail) = self.call_detach(live, volume, self.host, force, what).await {
            let busy = matches!(fail.error, Error::CloudBusy { .. });
            let pinned = self.pin_again(live, volume, &disk).await;
            if fail.ambiguous {
                // It may have happened, and then there is nothing to pin: the look after it decides.
                return Err(fail);
            }
            pinned?;
            if busy {
                let dev = disk.dev;
                let mut holders = self.kernel(move |devices| devices.holders(dev)).await.unwrap_or_default();
                if holders.is_empty() {
                    holders.push(Holder { kind: HolderKind::Unnamed, pid: None, name: String::new() });
                }
                return Err(Fail::clean(in_use(holders)));
            }
            return Err(fail);
        }
        self.wait_gone(live, volume, &disk).await
    }

    /// After a refused detach: our descriptor back on the same incarnation, under the same row.
    async fn pin_again(self: &Arc<Self>, live: &Live, volume: &Arc<Volume>, disk: &Disk) -> Result<(), Fail> {
        let mapping = self.map(volume, disk).await.map_err(|e| e.fail(volume.uuid))?;
        self.publish(|core, at| {
            // Abandoned meanwhile: reconciling has the volume.
            if core.owns(live) {
                core.with_volume(volume.row, at, |v| v.mapping = Some(mapping));
            }
        });
        Ok(())
    }

    async fn call_detach(
        self: &Arc<Self>,
        live: &Live,
        volume: &Volume,
        vm: VmId,
        force: bool,
        what: &str,
    ) -> Result<(), Fail> {
        if live.recovering {
            return Err(Fail::clean(Error::LeftBehind { what: what.into() }));
        }
        let call = self.call(live);
        self.step(live, "the cloud detaches it")?;
        failpoint::reach("detach.before-call").await;
        // The flush may have taken its time, and a detach takes the volume off whatever VM it is on.
        let detach = |seen: CloudVolume| {
            let call = &call;
            async move {
                match seen.attached {
                    Some(at) if at.vm == vm => self.cloud.detach(call, volume.uuid, vm, force).await,
                    _ => Ok(()),
                }
            }
        };
        let calling = self.guarded(live, volume, what, None, detach);
        let answer = self.watched(&call, volume.uuid, false, calling).await;
        failpoint::reach("detach.after-call").await;
        match answer {
            Err(fail) if fail.ambiguous => match self.look_after(live, volume.uuid).await {
                Ok(Some(seen)) if seen.attached.is_none_or(|a| a.vm != vm) => Ok(()),
                _ => Err(fail),
            },
            other => other,
        }
    }

    async fn wait_gone(self: &Arc<Self>, live: &Live, volume: &Volume, disk: &Disk) -> Result<(), Fail> {
        let mut changes = self.devices.changes();
        self.step(live, "wait for the device to go").map_err(|f| Fail::ambiguous(f.error))?;
        loop {
            let name = disk.name.clone();
            let now = self.kernel(move |devices| devices.disk(&name)).await.map_err(cannot_tell)?;
            if now.is_none_or(|d| d.incarnation != disk.incarnation || !d.identity.names(volume.uuid)) {
                return Ok(());
            }
            if live.stopping() {
                return Err(Fail::ambiguous(Error::Cancelled));
            }
            tokio::select! {
                () = changed(&mut changes) => {}
                () = tokio::time::sleep(LOOK_AGAIN) => {}
            }
        }
    }

    async fn detach_there(
        self: &Arc<Self>,
        live: &Live,
        volume: &Volume,
        seen: &CloudVolume,
        vm: VmId,
        force: bool,
        what: &str,
    ) -> Result<(), Fail> {
        if seen.attached.map(|a| a.vm) != Some(vm) {
            return Ok(());
        }
        if !force {
            let facts =
                self.patiently(live, what, None, || self.cloud.vm(vm)).await.map_err(|f| Fail::clean(f.error))?;
            // One that the credentials do not show may be running.
            if facts.is_none_or(|f| f.running) {
                return Err(Fail::clean(Error::VmRunning { volume: volume.uuid, vm }));
            }
        }
        self.call_detach(live, volume, vm, force, what).await
    }
}
