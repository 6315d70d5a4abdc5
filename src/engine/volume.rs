//! Attach, resize and delete: the steps, each of which looks before it acts; detach has its own file.

use std::sync::Arc;
use std::time::Duration;

use serde_json::json;

use super::Engine;
use super::inflight::Live;
use super::operation::{Acted, Done, Fail, LOOK_AGAIN, changed, cloud_fail};
use super::snapshots::{has_snapshots, names_of_ours};
use super::world::{Mapping, Volume};
use crate::cloud::{CloudError, CloudVolume, Refusal};
use crate::devices::DevicesError;
use crate::error::Error;
use crate::failpoint;
use crate::model::{Disk, DiskRow, Slot, Status, VmId, VolumeId};
use crate::store::{Change, MappedDevice, MappingRow};

/// Why a disk that carries a volume's identity was not made its device.
#[derive(Debug, thiserror::Error)]
pub(super) enum Unmapped {
    /// The kernel did not tell, or it is gone.
    #[error(transparent)]
    Devices(#[from] DevicesError),
    /// The cloud did not tell.
    #[error(transparent)]
    Cloud(#[from] CloudError),
    /// The provider says that its data is not the volume's.
    #[error("/dev/{0} carries its identity, but has not its data")]
    Impostor(Arc<str>),
}

impl Unmapped {
    pub(super) fn fail(self, volume: VolumeId) -> Fail {
        Fail::ambiguous(match self {
            Unmapped::Impostor(_) => Error::Contradiction { volume, why: self.to_string() },
            other => Error::CannotTell { why: other.to_string() },
        })
    }
}

/// How often the cloud is asked again while a device is waited for.
const ASK_CLOUD: Duration = Duration::from_secs(10);
/// How long a device is waited for after the cloud has said that it attached it.
const DEVICE_WAIT: Duration = Duration::from_secs(300);

pub(super) fn cannot_tell(error: DevicesError) -> Fail {
    Fail::ambiguous(Error::CannotTell { why: error.to_string() })
}

/// What the cloud says of a volume, for the record.
pub(super) fn facts(seen: &CloudVolume, serial: &str) -> Change {
    Change::VolumeFacts {
        volume: seen.id,
        name: seen.name.clone(),
        size: seen.size,
        serial: serial.into(),
        cloud_state: seen.state.clone(),
        device_id: seen.attached.and_then(|a| a.device_id),
    }
}

/// The same, for the world.
pub(super) fn show_facts(volume: &mut Volume, seen: &CloudVolume) {
    if *volume.name != *seen.name {
        volume.name = seen.name.as_str().into();
    }
    if *volume.cloud_state != *seen.state {
        volume.cloud_state = seen.state.as_str().into();
    }
    let owner = seen.mark.map(|m| m.to_string()).unwrap_or_default();
    if *volume.owner != *owner {
        volume.owner = owner.into();
    }
    volume.size = seen.size;
    volume.device_id = seen.attached.and_then(|a| a.device_id);
}

/// A mapping for the record.
pub(super) fn mapping_row(volume: &Volume, mapping: &Mapping, host: VmId) -> MappingRow {
    MappingRow {
        row: mapping.row,
        volume: volume.uuid,
        vm: host,
        device: Some(MappedDevice {
            name: mapping.name.to_string(),
            dev: mapping.dev,
            incarnation: mapping.incarnation,
            size: mapping.size,
        }),
        at: mapping.at,
    }
}

impl Engine {
    /// Pins a disk and makes a mapping of it; the row of the volume's mapping stays while the
    /// incarnation does, so that node ids stay.
    pub(super) async fn map(&self, volume: &Volume, disk: &Disk) -> Result<Arc<Mapping>, Unmapped> {
        if let Some(old) = &volume.mapping
            && old.incarnation == disk.incarnation
            && old.dev == disk.dev
            && old.pin.alive()
        {
            return Ok(Arc::new(Mapping { size: disk.size, ..(**old).clone() }));
        }
        let wanted = disk.clone();
        let pin = self.kernel(move |devices| devices.pin(&wanted)).await?;
        // Asked while the pin keeps it from becoming another disk.
        let backs = self.cloud.backs(volume.uuid, disk).await;
        if !matches!(backs, Ok(true)) {
            pin.release();
            backs?;
            return Err(Unmapped::Impostor(disk.name.clone()));
        }
        let row = match &volume.mapping {
            Some(old) if old.incarnation == disk.incarnation && old.dev == disk.dev => old.row,
            _ => self.core.lock().next_mapping(),
        };
        Ok(Arc::new(Mapping {
            row,
            name: disk.name.clone(),
            dev: disk.dev,
            incarnation: disk.incarnation,
            size: disk.size,
            pin,
            at: (self.clock)(),
        }))
    }

    pub(super) async fn attach(
        self: &Arc<Self>,
        live: &Live,
        row: DiskRow,
        vm: Option<VmId>,
        slot: Option<Slot>,
    ) -> Acted {
        let vm = vm.unwrap_or(self.host);
        let volume = self.owned(row)?;
        let what = format!("attach of volume {}", volume.uuid);
        self.step(live, "look at the volume in the cloud")?;
        let seen = self.look_before(live, &volume, &what).await?;
        match seen.attached {
            Some(at) if at.vm != vm => {
                return Err(Fail::clean(Error::AttachedElsewhere { volume: volume.uuid, vm: at.vm }));
            }
            // Somebody else's attachment in another place is not ours to take away.
            Some(at) if !live.recovering && slot.is_some_and(|s| at.device_id != Some(s.number())) => {
                return Err(Fail::clean(Error::AttachedElsewhere { volume: volume.uuid, vm }));
            }
            Some(_) => {}
            // It was there when recovery looked, and somebody has taken it away since.
            None if live.recovering => return Err(Fail::clean(Error::LeftBehind { what })),
            None => self.call_attach(live, &volume, seen, vm, slot, &what).await?,
        }
        if vm == self.host {
            self.prove_here(live, row, slot, &what).await
        } else {
            self.prove_there(live, row, vm, slot, &what).await
        }
    }

    async fn call_attach(
        self: &Arc<Self>,
        live: &Live,
        volume: &Volume,
        seen: CloudVolume,
        vm: VmId,
        slot: Option<Slot>,
        what: &str,
    ) -> Result<(), Fail> {
        let before =
            self.candidates(volume.uuid).await.map_err(|e| Fail::clean(Error::CannotTell { why: e.to_string() }))?;
        if let Some(disk) = before.first() {
            let why = format!("/dev/{} carries its identity already, but the cloud says it is free", disk.name);
            return Err(Fail::clean(Error::Contradiction { volume: volume.uuid, why }));
        }
        if vm != self.host {
            let facts =
                self.patiently(live, what, None, || self.cloud.vm(vm)).await.map_err(|f| Fail::clean(f.error))?;
            let Some(facts) = facts else { return Err(Fail::clean(Error::NoSuchVm { vm })) };
            if slot == Some(Slot::Root) && facts.running {
                return Err(Fail::clean(Error::VmNotReady {
                    vm,
                    why: "is running: a root disk is attached to a stopped VM",
                }));
            }
            if slot == Some(Slot::Root) && facts.has_root {
                return Err(Fail::clean(Error::VmNotReady { vm, why: "has a root disk already: detach that first" }));
            }
        }
        let call = self.call(live);
        self.step(live, "the cloud attaches it")?;
        failpoint::reach("attach.before-call").await;
        let attach = |seen: CloudVolume| {
            let call = &call;
            async move {
                match seen.attached {
                    Some(at) if at.vm == vm => Ok(()),
                    Some(at) => Err(CloudError::Refused {
                        why: Refusal::Conflict,
                        words: format!("it is attached to VM {} meanwhile", at.vm),
                    }),
                    None => self.cloud.attach(call, volume.uuid, vm, slot).await,
                }
            }
        };
        // What was asked of the other VM may have taken its time: the look is not directly before the call any more.
        let fresh = (vm == self.host).then_some(seen);
        let calling = self.guarded(live, volume, what, fresh, attach);
        let answer = self.watched(&call, volume.uuid, true, calling).await;
        failpoint::reach("attach.after-call").await;
        match answer {
            Ok(()) => Ok(()),
            Err(fail) if fail.ambiguous => match self.look_after(live, volume.uuid).await {
                Ok(Some(seen)) if seen.attached.is_some_and(|a| a.vm == vm) => Ok(()),
                Ok(Some(seen)) if seen.attached.is_none() => Err(Fail::clean(fail.error)),
                _ => Err(fail),
            },
            Err(fail) => Err(fail),
        }
    }

    /// On this host it is done when the device is present and verified.
    async fn prove_here(self: &Arc<Self>, live: &Live, row: DiskRow, slot: Option<Slot>, what: &str) -> Acted {
        let mut changes = self.devices.changes();
        self.step(live, "wait for the device").map_err(|f| Fail::ambiguous(f.error))?;
        let began = tokio::time::Instant::now();
        let mut asked = began;
        let mapping = loop {
            let volume = self.owned(row)?;
            let disks = self.candidates(volume.uuid).await.map_err(cannot_tell)?;
            match disks.as_slice() {
                [disk] => match self.map(&volume, disk).await {
                    Ok(mapping) => break mapping,
                    Err(Unmapped::Devices(DevicesError::Gone { .. })) => {}
                    Err(error) => return Err(error.fail(volume.uuid)),
                },
                [] => {}
                several => {
                    let devices = several.iter().map(|d| format!("/dev/{}", d.name)).collect::<Vec<_>>().join(" and ");
                    return Err(Fail::ambiguous(Error::NotUnique { volume: volume.uuid, devices }));
                }
            }
            if live.stopping() {
                return Err(Fail::ambiguous(Error::Cancelled));
            }
            if asked.elapsed() >= ASK_CLOUD {
                asked = tokio::time::Instant::now();
                self.still_attached(&volume, what).await?;
            }
            if began.elapsed() >= DEVICE_WAIT {
                let why = format!(
                    "the cloud says it is attached here, and no device came in {} s: `detach` it, or wait on, it is \
                     taken when it comes",
                    DEVICE_WAIT.as_secs()
                );
                return Err(Fail::ambiguous(Error::NotSettled { volume: volume.uuid, status: Status::Lost, why }));
            }
            // A change may be about any disk.
            tokio::select! {
                () = changed(&mut changes) => {}
                () = tokio::time::sleep(LOOK_AGAIN) => {}
            }
        };
        let volume = self.owned(row)?;
        let pin = mapping.pin.clone();
        let settled = |seen: &CloudVolume| seen.attached.is_some_and(|a| a.vm == self.host) || !pin.alive();
        let seen = self.look_until(&volume, what, settled).await?;
        if seen.attached.map(|a| a.vm) != Some(self.host) {
            let why = "the device is here, but the cloud does not say attached here".into();
            return Err(Fail::ambiguous(Error::Contradiction { volume: volume.uuid, why }));
        }
        if slot.is_some_and(|s| seen.attached.and_then(|a| a.device_id) != Some(s.number())) {
            // The provider's own test for users would find us.
            mapping.pin.release();
        }
        self.in_place(live, &volume, &seen, slot, what).await?;
        let fits = if self.exact_size { mapping.size == seen.size } else { mapping.size >= seen.size };
        if !fits {
            mapping.pin.release();
            let why = format!("/dev/{} has {} bytes, the cloud says {}", mapping.name, mapping.size, seen.size);
            return Err(Fail::ambiguous(Error::Contradiction { volume: volume.uuid, why }));
        }
        let serial = self.kernel({
            let pin = mapping.pin.clone();
            move |_| pin.look()
        });
        let serial = match serial.await {
            Ok(disk) if disk.identity.names(volume.uuid) => disk.identity.text().to_owned(),
            Ok(_) | Err(DevicesError::Gone { .. }) => {
                mapping.pin.release();
                let why = format!("/dev/{} became another disk while it was verified", mapping.name);
                return Err(Fail::ambiguous(Error::Contradiction { volume: volume.uuid, why }));
            }
            Err(error) => return Err(cannot_tell(error)),
        };
        let at = (self.clock)();
        let host = self.host;
        let changes = vec![
            facts(&seen, &serial),
            Change::MappingSet(mapping_row(&volume, &mapping, host)),
            Change::VolumeStatus { volume: volume.uuid, status: Status::Attached, at },
        ];
        Ok(Done {
            note: format!("/dev/{}", mapping.name),
            changes,
            apply: Some(Box::new(move |core, at| {
                core.with_volume(row, at, |v| {
                    show_facts(v, &seen);
                    v.serial = serial.into();
                    v.base = Status::Attached;
                    v.recorded = Status::Attached;
                    v.vm = Some(host);
                    v.why = None;
                    v.mapping = Some(mapping);
                });
            })),
            look: None,
        })
    }

    /// While its device is waited for, somebody may take the volume away again.
    async fn still_attached(&self, volume: &Volume, what: &str) -> Result<(), Fail> {
        match self.cloud.find(volume.uuid).await {
            Ok(Some(seen)) if seen.attached.is_some_and(|a| a.vm == self.host) => Ok(()),
            Ok(_) => {
                let words = "it was detached again behind volfs's back before its device came".into();
                Err(Fail::ambiguous(Error::CloudRefused { what: what.into(), words }))
            }
            // An answer that does not come says nothing.
            Err(_) => Ok(()),
        }
    }

    /// An id that was asked for is verified, or the volume is detached again (C3). Recovery takes nothing away.
    async fn in_place(
        &self,
        live: &Live,
        volume: &Volume,
        seen: &CloudVolume,
        slot: Option<Slot>,
        what: &str,
    ) -> Result<(), Fail> {
        let (Some(slot), Some(at)) = (slot, seen.attached) else { return Ok(()) };
        if at.device_id == Some(slot.number()) {
            return Ok(());
        }
        let given = at.device_id.map_or_else(|| "no number".into(), |n| n.to_string());
        let words = format!("device id {} was asked for, {given} was given", slot.number());
        let error = Error::CloudRefused { what: what.into(), words };
        if live.recovering {
            return Err(Fail::ambiguous(error));
        }
        let step = self.step(live, "the cloud gave another device id: detach again");
        step.map_err(|f| Fail::ambiguous(f.error))?;
        match self.cloud.detach(&self.call(live), volume.uuid, at.vm, false).await {
            Ok(()) => Err(Fail::clean(error)),
            Err(e) => Err(Fail::ambiguous(cloud_fail(what, Some(volume.uuid), None, self.about.name, e).error)),
        }
    }

    /// On another VM it is done when the cloud says so, in the place that was asked for.
    async fn prove_there(
        self: &Arc<Self>,
        live: &Live,
        row: DiskRow,
        vm: VmId,
        slot: Option<Slot>,
        what: &str,
    ) -> Acted {
        let volume = self.owned(row)?;
        let seen = self.look_until(&volume, what, |seen| seen.attached.is_some_and(|a| a.vm == vm)).await?;
        if seen.attached.map(|a| a.vm) != Some(vm) {
            let why = format!("the cloud does not say attached to VM {vm} after it said done");
            return Err(Fail::ambiguous(Error::Contradiction { volume: volume.uuid, why }));
        }
        self.in_place(live, &volume, &seen, slot, what).await?;
        let at = (self.clock)();
        let map_row = self.core.lock().next_mapping();
        let changes = vec![
            facts(&seen, &volume.serial),
            Change::MappingSet(MappingRow { row: map_row, volume: volume.uuid, vm, device: None, at }),
            Change::VolumeStatus { volume: volume.uuid, status: Status::Remote, at },
        ];
        Ok(Done {
            note: format!("VM {vm}"),
            changes,
            apply: Some(Box::new(move |core, at| {
                core.with_volume(row, at, |v| {
                    show_facts(v, &seen);
                    v.base = Status::Remote;
                    v.recorded = Status::Remote;
                    v.vm = Some(vm);
                    v.why = None;
                });
            })),
            look: None,
        })
    }

    pub(super) async fn resize(self: &Arc<Self>, live: &Live, row: DiskRow, size: u64) -> Acted {
        let volume = self.owned(row)?;
        let what = format!("resize of volume {}", volume.uuid);
        self.step(live, "look at the volume in the cloud")?;
        let seen = self.look_before(live, &volume, &what).await?;
        if size < seen.size {
            return Err(Fail::clean(Error::WouldShrink { volume: volume.uuid, have: seen.size, asked: size }));
        }
        self.step(live, "the cloud resizes it")?;
        failpoint::reach("resize.before-call").await;
        let call = self.call(live);
        // It has that size already: nothing to call, which is also all that recovery ever does here.
        let size = match size == seen.size {
            true => size,
            false => {
                let resize = |_| self.cloud.resize(&call, volume.uuid, size);
                self.guarded(live, &volume, &what, Some(seen.clone()), resize).await?
            }
        };
        failpoint::reach("resize.after-call").await;
        let mapping = match &volume.mapping {
            Some(mapping) if volume.base == Status::Attached => {
                Some(self.wait_grown(live, &volume, mapping, size).await?)
            }
            _ => None,
        };
        let seen = CloudVolume { size, ..seen };
        let at = (self.clock)();
        // The status stays what the record has; its time is that of the end of this.
        let mut changes = vec![
            facts(&seen, &volume.serial),
            Change::VolumeStatus { volume: volume.uuid, status: volume.recorded, at },
        ];
        if let Some(mapping) = &mapping {
            changes.push(Change::MappingSet(mapping_row(&volume, mapping, self.host)));
        }
        Ok(Done {
            note: format!("{size} bytes"),
            changes,
            apply: Some(Box::new(move |core, at| {
                core.with_volume(row, at, |v| {
                    show_facts(v, &seen);
                    if mapping.is_some() {
                        v.mapping = mapping;
                    }
                });
            })),
            look: None,
        })
    }

    /// A resize is done when the kernel shows it.
    async fn wait_grown(
        self: &Arc<Self>,
        live: &Live,
        volume: &Volume,
        mapping: &Arc<Mapping>,
        size: u64,
    ) -> Result<Arc<Mapping>, Fail> {
        let mut changes = self.devices.changes();
        self.step(live, "wait for the device to grow").map_err(|f| Fail::ambiguous(f.error))?;
        loop {
            let pin = mapping.pin.clone();
            match self.kernel(move |_| pin.look()).await {
                Ok(disk) if disk.size >= size => {
                    return Ok(Arc::new(Mapping { size: disk.size, ..(**mapping).clone() }));
                }
                Ok(_) => {}
                Err(DevicesError::Gone { .. }) => {
                    let why = format!("/dev/{} went while volume {} was resized", mapping.name, volume.uuid);
                    return Err(Fail::ambiguous(Error::CannotTell { why }));
                }
                Err(error) => return Err(cannot_tell(error)),
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

    pub(super) async fn delete(self: &Arc<Self>, live: &Live, row: DiskRow, expunge: bool) -> Acted {
        let volume = self.owned(row)?;
        let what = format!("delete of volume {}", volume.uuid);
        if let Some(error) = has_snapshots(&volume) {
            return Err(Fail::clean(error));
        }
        let mut note = "it was missing in the cloud; dropped".to_owned();
        if let Some(names) = names_of_ours(&volume) {
            note = format!("{note}; its snapshots may be there still: {names}");
        }
        self.step(live, "look at the volume in the cloud")?;
        if volume.base == Status::Missing {
            self.still_missing(live, &volume, &what).await?;
        } else {
            let seen = self.look_before(live, &volume, &what).await?;
            if let Some(at) = seen.attached {
                return Err(Fail::clean(Error::AttachedElsewhere { volume: volume.uuid, vm: at.vm }));
            }
            let here = self
                .candidates(volume.uuid)
                .await
                .map_err(|e| Fail::clean(Error::CannotTell { why: e.to_string() }))?;
            if let Some(disk) = here.first() {
                let why = format!("/dev/{} carries its identity, but the cloud says it is free", disk.name);
                return Err(Fail::clean(Error::Contradiction { volume: volume.uuid, why }));
            }
            self.step(live, "the cloud deletes it")?;
            failpoint::reach("delete.before-call").await;
            let call = self.call(live);
            let delete = |seen: CloudVolume| {
                let call = &call;
                let volume = &volume;
                async move {
                    // The look may have been long ago by now: calls that are refused for a while are said again.
                    if let Err(held) = self.not_held(volume.job) {
                        return Ok(Err(held));
                    }
                    match seen.attached {
                        Some(at) => Err(CloudError::Refused {
                            why: Refusal::Conflict,
                            words: format!("it is attached to VM {} meanwhile", at.vm),
                        }),
                        None => self.cloud.delete(call, volume.uuid, expunge).await.map(Ok),
                    }
                }
            };
            let deleting = self.guarded(live, &volume, &what, Some(seen), delete);
            let until = match deleting.await.and_then(|deleted| deleted) {
                Ok(until) => until,
                Err(fail) if fail.ambiguous => match self.look_after(live, volume.uuid).await {
                    Ok(None) if self.sees_us().await => None,
                    _ => return Err(fail),
                },
                Err(fail) => return Err(fail),
            };
            failpoint::reach("delete.after-call").await;
            note = until.map_or_else(|| "expunged".into(), |t| format!("recoverable until {t}"));
        }
        Ok(self.gone(&volume, note))
    }

    /// Goes on with a missing volume only if it is missing at this moment: what was confirmed once may
    /// have come back since, and a record that forgets it leaves it to nobody.
    pub(super) async fn still_missing(&self, live: &Live, volume: &Volume, what: &str) -> Result<(), Fail> {
        let (uuid, status) = (volume.uuid, Status::Missing);
        let looked = self.patiently(live, what, Some(uuid), || self.cloud.find(uuid)).await;
        if let Some(seen) = looked.map_err(|fail| Fail::clean(fail.error))? {
            self.held_against(std::slice::from_ref(&seen));
            let way_out = "but the cloud shows it again, so it is not forgotten: `reconcile` it, then repeat this";
            return Err(Fail::clean(Error::WrongStatus { volume: uuid, status, way_out }));
        }
        if !self.sees_us().await {
            let why = "the cloud shows neither it nor this host's own VM, so that proves nothing".into();
            return Err(Fail::clean(Error::NotSettled { volume: uuid, status, why }));
        }
        let here = self.candidates(uuid).await.map_err(|e| Fail::clean(Error::CannotTell { why: e.to_string() }))?;
        if let Some(disk) = here.first() {
            let why = format!("/dev/{} carries its identity, but the cloud knows no such volume", disk.name);
            return Err(Fail::clean(Error::Contradiction { volume: uuid, why }));
        }
        Ok(())
    }

    /// The record's end of a volume that the cloud has no more.
    pub(super) fn gone(&self, volume: &Volume, note: String) -> Done {
        let at = (self.clock)();
        let (row, uuid) = (volume.row, volume.uuid);
        Done {
            changes: vec![
                Change::MappingEnd { volume: uuid },
                Change::DiskEnd { row },
                Change::VolumeGone { volume: uuid, at },
            ],
            apply: Some(Box::new(move |core, at| {
                core.drop_volume(row, at, false);
                core.absent.remove(&uuid);
                core.event(None, json!({"event": "deleted", "volume": uuid}));
            })),
            note,
            look: None,
        }
    }
}
