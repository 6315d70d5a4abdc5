//! What is not ours and is shown all the same: other VMs' volumes, and volumes in no job.

use std::sync::Arc;
use std::time::Duration;

use super::Engine;
use super::core::Core;
use super::round::VIEW_LIVES;
use super::world::{Unclaimed, VmView, World};
use crate::cloud::{CloudError, CloudVolume, Survey};
use crate::model::{Disk, Fence, RecordId, Timestamp, VmId, VolumeId};

/// How long, and how many at a time, creates without an outcome are looked for.
const TWINS_LIVE: Duration = Duration::from_secs(24 * 3600);
const TWINS: usize = 8;

impl Engine {
    /// What is attached to the VMs that commands named, and which of them the cloud told of: that
    /// nothing is attached to a VM is believed only where the credentials show that VM.
    pub(super) async fn on_named_vms(&self, world: &World) -> Result<(Vec<VmId>, Vec<CloudVolume>), CloudError> {
        let named: Vec<VmId> = world.vms.keys().copied().collect();
        if named.is_empty() {
            return Ok((named, Vec::new()));
        }
        let volumes = self.cloud.survey(&Survey { vms: named.clone(), ..Survey::default() }).await?;
        let mut told = Vec::new();
        for vm in named {
            let has = volumes.iter().any(|v| v.attached.is_some_and(|a| a.vm == vm));
            if has || self.cloud.vm(vm).await?.is_some() {
                told.push(vm);
            }
        }
        Ok((told, volumes))
    }
}

impl Core {
    /// The creates without an outcome that are young enough to still come to light.
    pub(super) fn late_twins(&mut self, now: Timestamp) -> Vec<Fence> {
        self.twins.retain(|(_, ended)| ended.plus(TWINS_LIVE) > now);
        self.twins.iter().rev().take(TWINS).map(|(fence, _)| *fence).collect()
    }

    pub(super) fn show_vms(&mut self, told: &[VmId], volumes: &[CloudVolume], at: Timestamp) {
        for vm in told.iter().copied() {
            let mut on: Vec<VolumeId> =
                volumes.iter().filter(|v| v.attached.is_some_and(|a| a.vm == vm)).map(|v| v.id).collect();
            on.sort();
            self.world.vms.insert(vm, Arc::new(VmView { volumes: on, seen: Some(at), stale: false }));
        }
    }

    pub(super) fn age_views(&mut self, at: Timestamp, interval: Duration) {
        let named: Vec<(VmId, Arc<VmView>)> = self.world.vms.iter().map(|(k, v)| (*k, v.clone())).collect();
        for (vm, view) in named {
            let stale = view.seen.is_none_or(|seen| seen.plus(interval * VIEW_LIVES) < at);
            if stale != view.stale {
                self.world.vms.insert(vm, Arc::new(VmView { stale, ..(*view).clone() }));
            }
        }
    }

    pub(super) fn show_unclaimed(
        &mut self,
        volumes: Vec<CloudVolume>,
        disks: &[Disk],
        host: VmId,
        record: RecordId,
        at: Timestamp,
    ) {
        let mut now = imbl::OrdMap::new();
        for cloud in volumes {
            if self.world.by_uuid.contains_key(&cloud.id) || self.claiming.contains(&cloud.id) {
                continue;
            }
            let reason = match (cloud.attached, cloud.mark) {
                (Some(a), _) if a.vm == host => "attached to this host, in no job".to_owned(),
                (Some(a), _) if self.world.vms.contains_key(&a.vm) => format!("attached to VM {}, in no job", a.vm),
                (_, Some(mark)) if mark.record == record => "carries this record's mark, in no job".to_owned(),
                _ if self.loose.contains(&cloud.id) => "in this record, in no job".to_owned(),
                _ if cloud.name.starts_with("volfs-") && !self.twins.is_empty() => {
                    "made by a create whose answer never came, in no job".to_owned()
                }
                _ => continue,
            };
            let disk = disks.iter().find(|d| d.identity.names(cloud.id));
            let old = self.world.unclaimed.get(&cloud.id);
            let since = old.map_or(at, |o| o.since);
            now.insert(
                cloud.id,
                Arc::new(Unclaimed {
                    device: disk.map(|d| d.name.clone()),
                    serial: disk.map_or_else(|| "".into(), |d| d.identity.text().into()),
                    cloud: Arc::new(cloud),
                    reason: reason.into(),
                    since,
                }),
            );
        }
        if now.len() != self.world.unclaimed.len() || now.keys().any(|k| !self.world.unclaimed.contains_key(k)) {
            self.world.listed_at = at;
        }
        self.world.unclaimed = now;
    }
}
