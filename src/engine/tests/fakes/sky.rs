//! The cloud: what each call does when the script lets it.

use super::*;

fn refused<T>(why: Refusal, words: &str) -> Result<T, CloudError> {
    Err(CloudError::Refused { why, words: words.into() })
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

    async fn vm(&self, vm: VmId) -> Result<Option<VmFacts>, CloudError> {
        self.call(At::Vm, format!("cloud vm {vm}"), |lab| Ok(lab.state().sky.vms.get(&vm).copied())).await
    }
}
