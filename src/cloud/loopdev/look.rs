//! Looking: nothing here changes anything or takes a lock.

use std::collections::{HashMap, HashSet};
use std::fs;
use std::io;
use std::os::unix::fs::MetadataExt;
use std::sync::Arc;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use parking_lot::Mutex;

use super::super::{Attachment, CloudError, CloudVolume, Marked, Survey, VmFacts};
use super::Inner;
use super::device::{self, Binding};
use super::disk::{Attached, Intent, Meta, ambiguous, parse, unreachable};
use crate::model::{Disk, Fence, VmId, VolumeId};

/// Metadata read before, kept as long as the file is the same one, so that a scan of a large store
/// costs a stat a file.
#[derive(Debug)]
pub(super) struct Cache {
    known: Mutex<HashMap<VolumeId, (Stamp, Arc<Meta>)>>,
    /// A file changed more recently can change again within one tick of its times: its stamp proves
    /// nothing yet.
    quiet: Duration,
}

impl Cache {
    pub fn new(quiet: Duration) -> Self {
        Self { known: Mutex::default(), quiet }
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Stamp {
    dev: u64,
    ino: u64,
    size: u64,
    mtime: (i64, i64),
    ctime: (i64, i64),
}

impl Stamp {
    fn of(m: &fs::Metadata) -> Self {
        Self {
            dev: m.dev(),
            ino: m.ino(),
            size: m.size(),
            mtime: (m.mtime(), m.mtime_nsec()),
            ctime: (m.ctime(), m.ctime_nsec()),
        }
    }

    fn older_than(&self, quiet: Duration) -> bool {
        let changed = UNIX_EPOCH + Duration::from_secs(u64::try_from(self.ctime.0).unwrap_or(0));
        // Times are cut to seconds here: one more is no harm.
        quiet.is_zero() || SystemTime::now().duration_since(changed).is_ok_and(|age| age > quiet)
    }
}

/// One volume as a scan found it.
pub(super) type Scanned = Result<(Arc<Meta>, u64), CloudError>;

/// The id of the volume that a creation with this fence makes. A fixed one-to-one map, so "the same
/// fence, the same volume" needs no index; the id stays a random UUID's.
pub(super) fn id_for(fence: Fence) -> VolumeId {
    // Zero where version and variant stand.
    const FLIP: u128 = 0x766f_6c66_732d_0c6f_0f70_2d76_6f6c_756d;
    VolumeId(uuid::Uuid::from_u128(fence.0.as_u128() ^ FLIP))
}

impl Inner {
    /// The devices that have this volume's file.
    pub(super) fn bindings(&self, volume: VolumeId) -> Result<Vec<Binding>, CloudError> {
        device::bindings(&self.layout.dir, volume, &self.layout.data(volume))
            .map_err(|e| unreachable(format!("looking for the loop device of volume {volume}"), &e))
    }

    /// Where the volume is attached, with half-done work told as it stands in the kernel, and an
    /// attachment to this host before its last reboot as none.
    pub(super) fn attached(&self, meta: &Meta) -> Result<Option<Attached>, CloudError> {
        let here = |a: Attached| (a.vm != self.host || a.boot == Some(self.boot)).then_some(a);
        let claimed = match meta.intent {
            Some(Intent::Attaching(to)) => Some(to),
            _ => meta.attached,
        };
        let Some(claimed) = claimed.and_then(here) else { return Ok(None) };
        match meta.intent {
            Some(Intent::Attaching(_)) => Ok(self.bindings(meta.id)?.iter().any(|b| b.ours).then_some(claimed)),
            Some(Intent::Detaching) => Ok((!self.bindings(meta.id)?.is_empty()).then_some(claimed)),
            _ => Ok(Some(claimed)),
        }
    }

    pub(super) fn shown(&self, meta: &Meta, length: u64) -> Result<CloudVolume, CloudError> {
        let attached = self.attached(meta)?;
        Ok(CloudVolume {
            id: meta.id,
            name: meta.name.clone(),
            // What a loop device shows of the file: whole sectors.
            size: length - length % 512,
            state: if meta.used { "Ready" } else { "Allocated" }.into(),
            attached: attached.map(|a| Attachment { vm: a.vm, device_id: Some(a.device_id) }),
            mark: meta.mark,
            pending: None,
            carries_host: self.protect.contains(&meta.id).then(|| "protected by configuration".into()),
        })
    }

    /// Whether the disk is a device that this provider bound to the volume's file. A tag alone can
    /// be written by anybody who may bind a loop device.
    pub(super) fn backs(&self, volume: VolumeId, disk: &Disk) -> Result<bool, CloudError> {
        let bound = self.bindings(volume)?;
        Ok(bound.iter().any(|b| b.ours && !b.ending && b.name() == *disk.name && b.is(disk.incarnation.diskseq)))
    }

    pub(super) fn find(&self, volume: VolumeId) -> Result<Option<CloudVolume>, CloudError> {
        match self.layout.read(volume)? {
            Some((meta, length)) => self.shown(&meta, length).map(Some),
            None => Ok(None),
        }
    }

    pub(super) fn find_created(&self, fence: Fence) -> Result<Option<CloudVolume>, CloudError> {
        match self.layout.read(id_for(fence))? {
            Some((meta, length)) if meta.fence == Some(fence) => self.shown(&meta, length).map(Some),
            _ => Ok(None),
        }
    }

    /// Every volume; a damaged one as its error.
    pub(super) fn scan(&self) -> Result<Vec<(VolumeId, Scanned)>, CloudError> {
        let dir = self.layout.volumes();
        let mut found = Vec::new();
        for entry in fs::read_dir(&dir).map_err(|e| unreachable(dir.display(), &e))? {
            let entry = entry.map_err(|e| unreachable(dir.display(), &e))?;
            let Some(id) = entry.file_name().to_str().and_then(|n| VolumeId::parse(n).ok()) else { continue };
            match self.read_cached(id) {
                Ok(Some(volume)) => found.push((id, Ok(volume))),
                Ok(None) => {}
                Err(e) => found.push((id, Err(e))),
            }
        }
        self.layout.still_ours()?;
        let mut cache = self.cache.known.lock();
        if cache.len() > found.len() {
            let there: HashSet<VolumeId> = found.iter().map(|(id, _)| *id).collect();
            cache.retain(|id, _| there.contains(id));
        }
        Ok(found)
    }

    fn read_cached(&self, id: VolumeId) -> Result<Option<(Arc<Meta>, u64)>, CloudError> {
        if let Ok(now) = fs::symlink_metadata(self.layout.meta(id)) {
            let known = self.cache.known.lock().get(&id).filter(|(stamp, _)| *stamp == Stamp::of(&now)).cloned();
            if let Some((_, meta)) = known
                && let Ok(length) = self.layout.length(id, meta.size)
            {
                return Ok(Some((meta, length)));
            }
        }
        // Not known, changed, or gone meanwhile.
        if let Some(fresh) = self.read_keeping(id) {
            return Ok(Some(fresh));
        }
        Ok(self.layout.read(id)?.map(|(meta, length)| (Arc::new(meta), length)))
    }

    /// Reads the file and keeps it under the stamp of the very descriptor it was read from.
    fn read_keeping(&self, id: VolumeId) -> Option<(Arc<Meta>, u64)> {
        let path = self.layout.meta(id);
        let mut file = fs::File::open(&path).ok()?;
        let stamp = Stamp::of(&file.metadata().ok()?);
        let mut bytes = Vec::new();
        io::Read::read_to_end(&mut file, &mut bytes).ok()?;
        let meta = Arc::new(parse(&path, &bytes, id).ok()?);
        let length = self.layout.length(id, meta.size).ok()?;
        if stamp.older_than(self.cache.quiet) {
            self.cache.known.lock().insert(id, (stamp, meta.clone()));
        }
        Some((meta, length))
    }

    pub(super) fn survey(&self, survey: &Survey) -> Result<Vec<CloudVolume>, CloudError> {
        let asked: HashSet<VolumeId> = survey.volumes.iter().copied().collect();
        let mut answer = Vec::new();
        if survey.vms.is_empty() && survey.record.is_none() {
            for id in asked {
                answer.extend(self.find(id)?);
            }
            return Ok(answer);
        }
        let other_vm = survey.vms.iter().find(|vm| **vm != self.host);
        for (id, volume) in self.scan()? {
            let volume = volume.and_then(|(meta, length)| self.shown(&meta, length));
            match volume {
                Ok(volume) => {
                    let wanted = asked.contains(&id)
                        || volume.attached.is_some_and(|a| survey.vms.contains(&a.vm))
                        || (survey.record.is_some() && volume.mark.map(|m| m.record) == survey.record);
                    if wanted {
                        answer.push(volume);
                    }
                }
                Err(e) if asked.contains(&id) => return Err(e),
                Err(e) => {
                    if let Some(vm) = other_vm {
                        return Err(ambiguous(format!("cannot tell whether volume {id} is attached to VM {vm}"), e));
                    }
                    tracing::warn!(volume = %id, "left out of a survey: {e}");
                }
            }
        }
        Ok(answer)
    }

    /// A damaged volume hides no other here either; it is told of beside them.
    pub(super) fn marked(&self) -> Result<(Vec<Marked>, Vec<String>), CloudError> {
        let (mut found, mut untold) = (Vec::new(), Vec::new());
        for (id, volume) in self.scan()? {
            match volume.and_then(|(meta, length)| Ok((self.shown(&meta, length)?, meta))) {
                Ok((volume, meta)) => found.extend(volume.mark.map(|mark| Marked {
                    mark,
                    job: meta.job.clone(),
                    disk: meta.disk.clone(),
                    deleted: false,
                    volume,
                })),
                Err(e) => untold.push(format!("volume {id}: {e}")),
            }
        }
        Ok((found, untold))
    }

    pub(super) fn vm(&self, vm: VmId) -> Result<Option<VmFacts>, CloudError> {
        if vm == self.host {
            self.layout.still_ours()?;
            return Ok(Some(VmFacts { running: true, has_root: true }));
        }
        let running = self.layout.read_vm(vm)?.is_some_and(|file| file.running);
        let has_root = self.disks_of(vm, None)?.contains(&0);
        Ok(Some(VmFacts { running, has_root }))
    }

    /// The device ids taken on a VM, those of attaches begun included; `but` is left out. Fails when
    /// a damaged volume could hold one there.
    pub(super) fn disks_of(&self, vm: VmId, but: Option<VolumeId>) -> Result<Vec<u32>, CloudError> {
        let mut taken = Vec::new();
        for (id, volume) in self.scan()? {
            if Some(id) == but {
                continue;
            }
            match volume {
                Ok((meta, _)) => {
                    let begun = match meta.intent {
                        Some(Intent::Attaching(to)) => Some(to),
                        _ => meta.attached,
                    };
                    let there = |a: &Attached| a.vm == vm && (vm != self.host || a.boot == Some(self.boot));
                    taken.extend(begun.filter(there).map(|a| a.device_id));
                }
                // Here a slot is only a number, and the kernel's devices cannot collide.
                Err(e) if vm == self.host => tracing::warn!(volume = %id, "not counted as a disk here: {e}"),
                Err(e) => {
                    return Err(ambiguous(format!("cannot tell whether volume {id} is attached to VM {vm}"), e));
                }
            }
        }
        Ok(taken)
    }
}
