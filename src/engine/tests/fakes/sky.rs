//! The cloud: what each call does when the script lets it.

use super::*;

fn refused<T>(why: Refusal, words: &str) -> Result<T, CloudError> {
    Err(CloudError::Refused { why, words: words.into() })
}

pub fn snapshot(name: &str) -> Action {
    Action::Snapshot { name: SnapshotName::parse(name).unwrap(), crash: false }
}

pub fn revert(name: &str) -> Action {
    Action::Revert { name: SnapshotName::parse(name).unwrap() }
}

pub fn delete_snapshot(name: &str) -> Action {
    Action::DeleteSnapshot { name: SnapshotName::parse(name).unwrap() }
}

impl Lab {
    /// A snapshot that somebody else took.
    pub fn foreign_snapshot(&self, volume: VolumeId, name: &str) -> SnapshotId {
        let snapshot = CloudSnapshot {
            id: SnapshotId::random(),
            name: name.into(),
            state: "BackedUp".into(),
            ready: true,
            size: GIB,
            created: Some(Timestamp(5)),
        };
        let id = snapshot.id;
        self.state().sky.snapshots.entry(volume).or_default().push(snapshot);
        id
    }

    /// The ids of a volume's snapshots in the cloud.
    pub fn snapshots_of(&self, volume: VolumeId) -> Vec<SnapshotId> {
        self.state().sky.snapshots.get(&volume).map_or(Vec::new(), |all| all.iter().map(|s| s.id).collect())
    }
}

#[async_trait]
impl Cloud for Fake {
    fn about(&self) -> &About {
        &self.lab.inner.about
    }

    async fn find(&self, volume: VolumeId) -> Result<Option<CloudVolume>, CloudError> {
        self.call(At::Find, format!("cloud find {volume}"), |lab| Ok(lab.cloud_of(volume))).await
    }

    async fn find_created(&self, fence: Fence) -> Result<Option<CloudVolume>, CloudError> {
        self.call(At::FindCreated, "cloud find_created".into(), |lab| {
            let state = lab.state();
            Ok(state.sky.created.get(&fence).and_then(|id| state.sky.volumes.get(id)).cloned())
        })
        .await
    }

    async fn survey(&self, survey: &Survey) -> Result<Vec<CloudVolume>, CloudError> {
        self.call(At::Survey, "cloud survey".into(), |lab| {
            let state = lab.state();
            let wanted = |v: &&CloudVolume| {
                survey.volumes.contains(&v.id)
                    || v.attached.is_some_and(|a| survey.vms.contains(&a.vm))
                    || v.mark.is_some_and(|m| Some(m.record) == survey.record)
            };
            Ok(state.sky.volumes.values().filter(wanted).cloned().collect())
        })
        .await
    }

    async fn create(&self, call: &Call, new: &NewVolume) -> Result<CloudVolume, CloudError> {
        self.call(At::Create, format!("cloud create {}", new.label.disk), |lab| {
            let mut state = lab.state();
            if let Some(id) = state.sky.created.get(&call.fence()) {
                return Ok(state.sky.volumes[id].clone());
            }
            let volume = CloudVolume {
                id: VolumeId::random(),
                name: new.name.clone(),
                size: new.size,
                state: "Allocated".into(),
                attached: None,
                mark: Some(new.label.mark),
                carries_host: None,
                pending: None,
            };
            state.sky.created.insert(call.fence(), volume.id);
            state.sky.volumes.insert(volume.id, volume.clone());
            Ok(volume)
        })
        .await
    }

    async fn attach(&self, _: &Call, volume: VolumeId, vm: VmId, slot: Option<Slot>) -> Result<(), CloudError> {
        self.call(At::Attach, format!("cloud attach {volume}"), |lab| {
            let here = vm == lab.host;
            let (size, plug) = {
                let mut state = lab.state();
                let record = lab.record_id();
                if !state.sky.vms.contains_key(&vm) {
                    return refused(Refusal::NoVm, "fake: no such vm");
                }
                let Some(v) = state.sky.volumes.get_mut(&volume) else {
                    return refused(Refusal::NoVolume, "fake: no such volume");
                };
                match v.attached {
                    Some(a) if a.vm == vm => return Ok(()),
                    Some(_) => return refused(Refusal::Conflict, "fake: attached elsewhere"),
                    None => v.attached = Some(Attachment { vm, device_id: Some(slot.map_or(1, Slot::number)) }),
                }
                let (size, ours) = (v.size, v.mark.is_some_and(|m| m.record == record));
                if !ours {
                    state.sky.violations.push(format!("attach of {volume}, which is not ours"));
                }
                if here && state.kernel.disks.iter().any(|d| d.identity.names(volume)) {
                    state.sky.violations.push(format!("attach of {volume} while its disk is here"));
                }
                (size, state.kernel.plug)
            };
            match (here, plug) {
                (true, Plug::AtOnce) => drop(lab.plug(volume, size)),
                (true, Plug::WrongSize) => drop(lab.plug(volume, size / 2)),
                (true, Plug::Twice) => {
                    lab.plug(volume, size);
                    lab.plug(volume, size);
                }
                _ => {}
            }
            Ok(())
        })
        .await
    }

    async fn detach(&self, _: &Call, volume: VolumeId, vm: VmId, force: bool) -> Result<(), CloudError> {
        self.call(At::Detach, format!("cloud detach {volume}{}", if force { " force" } else { "" }), |lab| {
            let stay = {
                let mut state = lab.state();
                let record = lab.record_id();
                if vm == lab.host && lab.inner.about.detach_wants_sole_opener {
                    let seqs: Vec<u64> = state
                        .kernel
                        .disks
                        .iter()
                        .filter(|d| d.identity.names(volume))
                        .map(|d| d.incarnation.diskseq)
                        .collect();
                    if seqs.iter().any(|s| state.kernel.open.get(s).is_some_and(|n| *n > 0)) {
                        return refused(Refusal::InUse, "fake: open");
                    }
                }
                let Some(v) = state.sky.volumes.get_mut(&volume) else {
                    return refused(Refusal::NoVolume, "fake: no such volume");
                };
                if v.attached.is_none_or(|a| a.vm != vm) {
                    return Ok(());
                }
                v.attached = None;
                if v.mark.is_none_or(|m| m.record != record) {
                    state.sky.violations.push(format!("detach of {volume}, which is not ours"));
                }
                state.kernel.stay
            };
            if vm == lab.host && !stay {
                lab.unplug(volume);
            }
            Ok(())
        })
        .await
    }

    async fn resize(&self, _: &Call, volume: VolumeId, size: u64) -> Result<u64, CloudError> {
        self.call(At::Resize, format!("cloud resize {volume}"), |lab| {
            let names = {
                let mut state = lab.state();
                let Some(v) = state.sky.volumes.get_mut(&volume) else {
                    return refused(Refusal::NoVolume, "fake: no such volume");
                };
                v.size = v.size.max(size);
                let size = v.size;
                let mut names = Vec::new();
                for disk in state.kernel.disks.iter_mut().filter(|d| d.identity.names(volume)) {
                    disk.size = size;
                    names.push(disk.name.clone());
                }
                names
            };
            for name in names {
                lab.event(&name, "change");
            }
            Ok(size)
        })
        .await
    }

    async fn delete(&self, _: &Call, volume: VolumeId, _expunge: bool) -> Result<Option<Timestamp>, CloudError> {
        self.call(At::Delete, format!("cloud delete {volume}"), |lab| {
            let mut state = lab.state();
            let record = lab.record_id();
            match state.sky.volumes.remove(&volume) {
                Some(v) => {
                    if v.attached.is_some() || v.mark.is_none_or(|m| m.record != record) {
                        state.sky.violations.push(format!("delete of {volume}: attached, or not ours"));
                    }
                    Ok(Some(Timestamp(0)))
                }
                None => Ok(None),
            }
        })
        .await
    }

    async fn exchange_mark(
        &self,
        _: &Call,
        volume: VolumeId,
        expect: Option<Mark>,
        new: Option<&Label>,
    ) -> Result<(), CloudError> {
        let new = new.map(|l| l.mark);
        self.call(At::Mark, format!("cloud mark {volume}"), |lab| {
            let mut state = lab.state();
            let Some(v) = state.sky.volumes.get_mut(&volume) else {
                return refused(Refusal::NoVolume, "fake: no such volume");
            };
            if v.mark == new {
                return Ok(());
            }
            if v.mark != expect {
                let found = v.mark;
                return refused(Refusal::Mark(found), "fake: another mark");
            }
            v.mark = new;
            Ok(())
        })
        .await
    }

    async fn running(&self, _: Fence) -> Result<Option<String>, CloudError> {
        self.call(At::Running, "cloud running".into(), |lab| Ok(lab.state().sky.running.clone())).await
    }

    async fn snapshot(&self, call: &Call, volume: VolumeId, name: &SnapshotName) -> Result<CloudSnapshot, CloudError> {
        self.call(At::Snapshot, format!("cloud snapshot {volume}"), |lab| {
            let mut state = lab.state();
            let record = lab.record_id();
            let sky = &mut state.sky;
            let Some(v) = sky.volumes.get(&volume) else {
                return refused(Refusal::NoVolume, "fake: no such volume");
            };
            if v.mark.is_none_or(|m| m.record != record) {
                sky.violations.push(format!("snapshot of {volume}, which is not ours"));
            }
            let all = sky.snapshots.entry(volume).or_default();
            if let Some(id) = sky.taken.get(&call.fence()) {
                return Ok(all.iter().find(|s| s.id == *id).cloned().unwrap());
            }
            let snapshot = CloudSnapshot {
                id: SnapshotId::random(),
                name: format!("volfs-{}-{name}", call.fence()),
                state: if sky.unready { "Error".into() } else { "BackedUp".into() },
                ready: !sky.unready,
                size: v.size,
                created: Some(Timestamp(7)),
            };
            sky.taken.insert(call.fence(), snapshot.id);
            all.push(snapshot.clone());
            Ok(snapshot)
        })
        .await
    }

    async fn find_snapshot(&self, volume: VolumeId, fence: Fence) -> Result<Option<CloudSnapshot>, CloudError> {
        self.call(At::FindSnapshot, format!("cloud find_snapshot {volume}"), |lab| {
            let state = lab.state();
            let id = state.sky.taken.get(&fence);
            let all = state.sky.snapshots.get(&volume).into_iter().flatten();
            Ok(id.and_then(|id| all.clone().find(|s| s.id == *id)).cloned())
        })
        .await
    }

    async fn snapshots(&self, volume: VolumeId) -> Result<Vec<CloudSnapshot>, CloudError> {
        self.call(At::Snapshots, format!("cloud snapshots {volume}"), |lab| {
            Ok(lab.state().sky.snapshots.get(&volume).cloned().unwrap_or_default())
        })
        .await
    }

    async fn revert(&self, _: &Call, volume: VolumeId, snapshot: SnapshotId) -> Result<(), CloudError> {
        self.call(At::Revert, format!("cloud revert {volume}"), |lab| {
            let mut state = lab.state();
            let record = lab.record_id();
            let sky = &mut state.sky;
            let ours = sky.taken.values().any(|id| *id == snapshot);
            let v = sky.volumes.get(&volume);
            if !ours || v.is_none_or(|v| v.attached.is_some() || v.mark.is_none_or(|m| m.record != record)) {
                sky.violations.push(format!("revert of {volume}: attached, or not ours"));
            }
            Ok(())
        })
        .await
    }

    async fn delete_snapshot(&self, _: &Call, volume: VolumeId, snapshot: SnapshotId) -> Result<(), CloudError> {
        self.call(At::DeleteSnapshot, format!("cloud delete_snapshot {volume}"), |lab| {
            let mut state = lab.state();
            let sky = &mut state.sky;
            if sky.taken.values().all(|id| *id != snapshot) {
                sky.violations.push(format!("a foreign snapshot of {volume} is deleted"));
            }
            sky.snapshots.entry(volume).or_default().retain(|s| s.id != snapshot);
            Ok(())
        })
        .await
    }

    async fn vm(&self, vm: VmId) -> Result<Option<VmFacts>, CloudError> {
        self.call(At::Vm, format!("cloud vm {vm}"), |lab| Ok(lab.state().sky.vms.get(&vm).copied())).await
    }
}
