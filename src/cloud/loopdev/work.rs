//! The verbs that change something. Each looks first, so each may be repeated.

use std::fs::{self, DirBuilder, OpenOptions};
use std::io;
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::path::Path;
use std::time::SystemTime;

use super::super::{CloudError, CloudVolume, Label, NewVolume, Refusal};
use super::Inner;
use super::device::{self, Unbound};
use super::disk::{
    Attached, Intent, Lock, Meta, after_effect, ambiguous, json, not_started, refused, sync_dir, unreachable,
    write_whole,
};
use super::look::id_for;
use crate::failpoint;
use crate::model::{Fence, Mark, Slot, Timestamp, VmId, VolumeId};

/// The hypervisor's CD; no disk gets this number.
const CD: u32 = 3;
const NEW: &str = ".new-";

/// A failpoint before any effect.
pub(super) fn before(name: &str) -> Result<(), CloudError> {
    if failpoint::hit(name) {
        return Err(CloudError::Unreachable { words: format!("failpoint {name}") });
    }
    Ok(())
}

/// A failpoint after one: it leaves everything as a crash there would.
pub(super) fn point(name: &str) -> Result<(), CloudError> {
    if failpoint::hit(name) {
        return Err(CloudError::Ambiguous { words: format!("failpoint {name}") });
    }
    Ok(())
}

pub(super) fn now() -> Timestamp {
    SystemTime::now().into()
}

/// A loop device's sector: sizes are multiples of it.
pub(super) const STEP: u64 = 512;

/// Sizes are whole sectors, never smaller than asked.
fn whole_sectors(size: u64) -> Result<u64, CloudError> {
    if size == 0 {
        return Err(refused(Refusal::Other, "a volume has at least one byte"));
    }
    // The largest file offset there is.
    size.checked_next_multiple_of(STEP)
        .filter(|s| i64::try_from(*s).is_ok())
        .ok_or_else(|| refused(Refusal::Capacity, format!("{size} bytes are more than a file can have")))
}

impl Inner {
    /// Finishes what a crash left: half-made volumes go, announced work ends, old trash goes. What
    /// another daemon works on at this moment is left to it.
    pub(super) fn recover(&self) -> Result<(), CloudError> {
        let dir = self.layout.volumes();
        for entry in fs::read_dir(&dir).map_err(|e| unreachable(dir.display(), &e))? {
            let entry = entry.map_err(|e| unreachable(dir.display(), &e))?;
            if entry.file_name().to_str().is_some_and(|n| n.starts_with(NEW))
                && let Some(_lock) = self.layout.lock_dir(&entry.path(), false)?
            {
                remove(&entry.path()).map_err(|e| unreachable(entry.path().display(), &e))?;
            }
        }
        for (id, volume) in self.scan()? {
            if !volume.is_ok_and(|(meta, _)| meta.intent.is_some()) {
                continue;
            }
            let Some(_lock) = self.layout.lock_dir(&self.layout.volume(id), false)? else { continue };
            if let Err(e) = self.settled(id) {
                tracing::warn!(volume = %id, "interrupted work is not settled yet: {e}");
            }
        }
        self.sweep_all()?;
        self.empty_trash();
        Ok(())
    }

    /// Locks a volume; `None` if it is not there.
    pub(super) fn lock(&self, volume: VolumeId) -> Result<Option<Lock>, CloudError> {
        self.layout.lock_dir(&self.layout.volume(volume), true)
    }

    pub(super) fn lock_existing(&self, volume: VolumeId) -> Result<Lock, CloudError> {
        self.lock(volume)?.ok_or_else(|| no_volume(volume))
    }

    /// Reads a locked volume's metadata and ends work that a crash interrupted.
    pub(super) fn settled(&self, volume: VolumeId) -> Result<(Meta, u64), CloudError> {
        let (mut meta, length) = self.layout.read(volume)?.ok_or_else(|| no_volume(volume))?;
        let data = self.layout.data(volume);
        let was = meta.attached;
        meta.attached = self.attached(&meta)?;
        let Some(intent) = meta.intent else {
            // An attachment that ended with an earlier boot is no more.
            if meta.attached != was {
                self.layout.write_giving_back(&meta)?;
            }
            return Ok((meta, length));
        };
        meta.used |= meta.attached.is_some();
        if let Intent::Detaching = intent {
            for binding in self.bindings(volume)? {
                if binding.ending {
                    let words = format!("its unbinding from {} has not ended", binding.name());
                    return Err(ambiguous(format!("volume {volume}"), words));
                }
                if binding.ours && binding.autoclear {
                    device::undo_autoclear(&binding, &data)
                        .map_err(|e| ambiguous(format!("keeping {} bound", binding.name()), e))?;
                    // It may have been closed by its last user just before.
                    meta.attached = self.attached(&meta)?;
                }
            }
        }
        let mut length = length;
        if let Intent::Resizing { size } = intent {
            length = self.grow(&meta, length, size)?;
            meta.size = meta.size.max(length);
        }
        meta.intent = None;
        self.layout.write_giving_back(&meta).map_err(after_effect)?;
        Ok((meta, length))
    }

    /// Refuses `more` bytes that the store or the filesystem has not.
    fn check_space(&self, more: u64) -> Result<(), CloudError> {
        self.check_free(more)?;
        self.check_capacity(more)
    }

    /// Refuses `more` bytes that the filesystem has not now.
    pub(super) fn check_free(&self, more: u64) -> Result<(), CloudError> {
        let dir = &self.layout.dir;
        let stat = rustix::fs::statvfs(dir.as_path()).map_err(|e| unreachable(dir.display(), &e.into()))?;
        let free = stat.f_bavail.saturating_mul(stat.f_frsize);
        if more > free {
            let words = format!("{more} bytes asked for, the filesystem of {} has {free} free", dir.display());
            return Err(refused(Refusal::Capacity, words));
        }
        Ok(())
    }

    /// Where a capacity is set: nobody else adds up meanwhile what there is. Held to take room, and over
    /// a rename of what has been counted, as who counts would see it in neither place.
    pub(super) fn counting(&self) -> Result<Option<Lock>, CloudError> {
        self.capacity.map(|_| self.layout.lock_all()).transpose()
    }

    /// Refuses `more` bytes that exceed what the store may promise in all.
    pub(super) fn check_capacity(&self, more: u64) -> Result<(), CloudError> {
        let Some(capacity) = self.capacity else { return Ok(()) };
        let mut used = 0u64;
        for (id, volume) in self.scan()? {
            used = used.saturating_add(self.bytes_of_snapshots(id)?);
            match volume {
                Ok((meta, length)) => used = used.saturating_add(length.max(meta.size)),
                // Its file counts, whatever its metadata says; without a file nothing does.
                Err(_) => used = used.saturating_add(fs::symlink_metadata(self.layout.data(id)).map_or(0, |m| m.len())),
            }
        }
        for (path, _, _) in self.trashed()? {
            used = used.saturating_add(fs::symlink_metadata(path.join("data.img")).map_or(0, |m| m.len()));
        }
        if used.saturating_add(more) > capacity {
            let words = format!("{more} bytes asked for, {used} of {capacity} are taken");
            return Err(refused(Refusal::Capacity, words));
        }
        Ok(())
    }

    pub(super) fn create(&self, fence: Fence, new: &NewVolume) -> Result<CloudVolume, CloudError> {
        let size = whole_sectors(new.size)?;
        if new.offering.is_some() || new.zone.is_some() {
            return Err(refused(Refusal::Unsupported, "the loop provider has no offerings and no zones"));
        }
        before("loop.create.before")?;
        let id = id_for(fence);
        let beside = self.layout.volumes().join(format!("{NEW}{}", fence));
        // Whoever holds the lock makes the volume; who waited for it finds it made, or makes it.
        let lock = loop {
            if let Some(volume) = self.find_created(fence)? {
                return Ok(volume);
            }
            match DirBuilder::new().mode(0o700).create(&beside) {
                Err(e) if e.kind() != io::ErrorKind::AlreadyExists => return Err(not_started(beside.display(), &e)),
                _ => {}
            }
            let Some(lock) = self.layout.lock_dir(&beside, true)? else { continue };
            // Another one may have finished between our look and our lock.
            if let Some(volume) = self.find_created(fence)? {
                remove(&beside).map_err(|e| unreachable(beside.display(), &e))?;
                return Ok(volume);
            }
            break lock;
        };
        let _all = self.counting()?;
        let made = self.check_space(size).and_then(|()| self.build(&beside, fence, size, new));
        let meta = match made {
            Ok(meta) => meta,
            Err(e) => {
                if !matches!(e, CloudError::Ambiguous { .. })
                    && let Err(left) = remove(&beside)
                {
                    tracing::warn!("{} is left over: {left}", beside.display());
                }
                return Err(e);
            }
        };
        point("loop.create.built")?;
        let path = self.layout.volume(id);
        fs::rename(&beside, &path).map_err(|e| not_started(path.display(), &e))?;
        sync_dir(&self.layout.volumes()).map_err(|e| ambiguous(path.display(), e))?;
        drop(lock);
        point("loop.create.after")?;
        self.shown(&meta, size)
    }

    fn build(&self, beside: &Path, fence: Fence, size: u64, new: &NewVolume) -> Result<Meta, CloudError> {
        let failed = |e: io::Error| not_started(beside.display(), &e);
        let data = beside.join("data.img");
        match fs::remove_file(&data) {
            Err(e) if e.kind() != io::ErrorKind::NotFound => return Err(failed(e)),
            _ => {}
        }
        // A new sparse file: it reads as zeroes, whatever its blocks held before.
        let file = OpenOptions::new().create_new(true).write(true).mode(0o600).open(&data).map_err(failed)?;
        file.set_len(size).map_err(failed)?;
        file.sync_all().map_err(failed)?;
        let meta = Meta {
            id: id_for(fence),
            name: new.name.clone(),
            size,
            mark: Some(new.label.mark),
            job: Some(new.label.job.to_string()),
            disk: Some(new.label.disk.to_string()),
            attached: None,
            fence: Some(fence),
            used: false,
            intent: None,
            rest: serde_json::Map::new(),
        };
        let path = beside.join("meta.json");
        write_whole(&path, &json(&meta, &path)?)?;
        Ok(meta)
    }

    pub(super) fn attach(&self, volume: VolumeId, vm: VmId, slot: Option<Slot>) -> Result<(), CloudError> {
        let _lock = self.lock_existing(volume)?;
        let (mut meta, _) = self.settled(volume)?;
        let data = self.layout.data(volume);
        let wrong_slot = |have: u32| match slot {
            Some(slot) if slot.number() != have => {
                Err(refused(Refusal::Conflict, format!("volume {volume} is attached there as device {have} already")))
            }
            _ => Ok(()),
        };
        if let Some(at) = meta.attached {
            if at.vm != vm {
                return Err(refused(Refusal::Conflict, format!("volume {volume} is attached to VM {}", at.vm)));
            }
            wrong_slot(at.device_id)?;
        }
        let bound = self.bindings(volume)?;
        if let Some(foreign) = bound.iter().find(|b| !b.ours || b.ending || vm != self.host) {
            let words = format!("volume {volume}: {} has its file {} already", foreign.name(), data.display());
            return Err(refused(Refusal::Conflict, words));
        }
        if bound.len() > 1 {
            let names: Vec<String> = bound.iter().map(device::Binding::name).collect();
            return Err(refused(Refusal::Conflict, format!("volume {volume} is bound twice: {}", names.join(", "))));
        }
        if meta.attached.is_some() && (vm != self.host || !bound.is_empty()) {
            return Ok(());
        }
        before("loop.attach.before")?;
        // The slot is taken when the metadata says so: until then nobody else chooses.
        let all = self.layout.lock_all()?;
        let to = match meta.attached {
            Some(at) => at,
            None => Attached {
                vm,
                device_id: self.choose_slot(volume, vm, slot)?,
                boot: (vm == self.host).then_some(self.boot),
            },
        };
        if vm != self.host {
            self.layout.mention_vm(vm)?;
            meta.attached = Some(to);
            meta.used = true;
            self.layout.write(&meta)?;
            return point("loop.attach.after");
        }
        let was = meta.attached.take();
        meta.intent = Some(Intent::Attaching(to));
        self.layout.write(&meta)?;
        drop(all);
        point("loop.attach.intent")?;
        if bound.is_empty() {
            let one = self.binding.lock();
            let bind = device::bind(volume, &data);
            drop(one);
            if let Err(e) = bind {
                (meta.intent, meta.attached) = (None, was);
                self.layout.write(&meta).map_err(after_effect)?;
                return Err(not_started(format!("binding volume {volume} to a loop device"), &e));
            }
        }
        point("loop.attach.bound")?;
        meta.intent = None;
        meta.attached = Some(to);
        meta.used = true;
        self.layout.write(&meta).map_err(after_effect)?;
        point("loop.attach.after")
    }

    fn choose_slot(&self, volume: VolumeId, vm: VmId, slot: Option<Slot>) -> Result<u32, CloudError> {
        let taken = self.disks_of(vm, Some(volume))?;
        if vm == self.host && taken.len() >= self.most_disks as usize {
            let words = format!(
                "no free slot: {} disks are attached to this host, the most is {}",
                taken.len(),
                self.most_disks
            );
            return Err(refused(Refusal::Other, words));
        }
        let Some(slot) = slot else {
            return (1..)
                .find(|n| *n != CD && !taken.contains(n))
                .ok_or_else(|| refused(Refusal::Other, "no free slot"));
        };
        let number = slot.number();
        if number == CD {
            return Err(refused(Refusal::Other, "device 3 is the CD's"));
        }
        if taken.contains(&number) {
            return Err(refused(Refusal::Conflict, format!("VM {vm} has a disk as device {number} already")));
        }
        if number == 0 {
            if vm == self.host {
                return Err(refused(Refusal::Conflict, "this host has its root disk"));
            }
            if self.layout.read_vm(vm)?.is_some_and(|file| file.running) {
                return Err(refused(Refusal::Conflict, format!("VM {vm} is running")));
            }
        }
        Ok(number)
    }

    pub(super) fn detach(&self, volume: VolumeId, vm: VmId, force: bool) -> Result<(), CloudError> {
        if force && vm == self.host {
            return Err(refused(Refusal::Unsupported, "a loop device cannot be pulled from its users"));
        }
        let _lock = self.lock_existing(volume)?;
        let (mut meta, _) = self.settled(volume)?;
        let there = meta.attached.is_some_and(|at| at.vm == vm);
        if vm != self.host {
            if !there {
                return Ok(());
            }
            before("loop.detach.before")?;
            meta.attached = None;
            self.layout.write_giving_back(&meta)?;
            return point("loop.detach.after");
        }
        let bound = self.bindings(volume)?;
        if let Some(foreign) = bound.iter().find(|b| !b.ours && !b.ending) {
            let words = format!("volume {volume}: {} has its file, but was not made by this provider", foreign.name());
            return Err(refused(Refusal::Conflict, words));
        }
        if bound.is_empty() && !there {
            return Ok(());
        }
        before("loop.detach.before")?;
        let mut free = meta.clone();
        if there {
            free.attached = None;
        }
        if !bound.is_empty() {
            let mut begun = meta.clone();
            begun.intent = Some(Intent::Detaching);
            self.layout.write_giving_back(&begun)?;
            point("loop.detach.intent")?;
            for binding in &bound {
                let result = device::unbind(binding, &self.layout.data(volume), |point| {
                    // Within the test for users there is nothing to fail, only to be killed or held.
                    failpoint::hit(point);
                });
                let as_before = match result {
                    Ok(Unbound::Gone) => continue,
                    Ok(Unbound::InUse) => refused(Refusal::InUse, format!("{} is open elsewhere", binding.name())),
                    Ok(Unbound::NotFlushed(e)) => {
                        refused(Refusal::Other, format!("{} could not be flushed: {e}", binding.name()))
                    }
                    Ok(Unbound::Ending) => {
                        let words = "its unbinding goes on until whoever has it open closes it";
                        return Err(ambiguous(binding.name(), words));
                    }
                    Err(e) => return Err(ambiguous(format!("unbinding {}", binding.name()), e)),
                };
                self.layout.write_giving_back(&meta).map_err(after_effect)?;
                return Err(as_before);
            }
            point("loop.detach.cleared")?;
        }
        self.layout.write_giving_back(&free).map_err(after_effect)?;
        point("loop.detach.after")
    }

    pub(super) fn resize(&self, volume: VolumeId, size: u64) -> Result<u64, CloudError> {
        let size = whole_sectors(size)?;
        let _lock = self.lock_existing(volume)?;
        let (mut meta, length) = self.settled(volume)?;
        let have = length.max(meta.size);
        if size < have - have % 512 {
            return Err(refused(
                Refusal::Other,
                format!("volume {volume} has {have} bytes and cannot shrink to {size}"),
            ));
        }
        if size <= have && meta.size == length {
            // Equal; but a device may have missed an earlier growth.
            self.grow(&meta, length, length)?;
            return Ok(length);
        }
        before("loop.resize.before")?;
        let all = self.layout.lock_all()?;
        self.check_space(size.saturating_sub(have))?;
        meta.intent = Some(Intent::Resizing { size });
        self.layout.write(&meta)?;
        point("loop.resize.intent")?;
        let length = self.grow(&meta, length, size)?;
        drop(all);
        meta.intent = None;
        meta.size = length;
        self.layout.write(&meta).map_err(after_effect)?;
        point("loop.resize.after")?;
        Ok(length)
    }

    /// Makes the file that long, and its device take it. Finishes one half done.
    fn grow(&self, meta: &Meta, length: u64, size: u64) -> Result<u64, CloudError> {
        let data = self.layout.data(meta.id);
        if size > length {
            let file = OpenOptions::new().write(true).custom_flags(libc::O_NOFOLLOW).open(&data);
            file.and_then(|file| file.set_len(size).and_then(|()| file.sync_all()))
                .map_err(|e| ambiguous(data.display(), e))?;
            point("loop.resize.grown")?;
        }
        for binding in self.bindings(meta.id)?.iter().filter(|b| b.ours && !b.ending) {
            device::take_size(binding, &data).map_err(|e| ambiguous(format!("growing {}", binding.name()), e))?;
        }
        Ok(size.max(length))
    }

    pub(super) fn delete(&self, volume: VolumeId, expunge: bool) -> Result<Option<Timestamp>, CloudError> {
        if self.protect.contains(&volume) {
            return Err(refused(Refusal::Conflict, format!("volume {volume} is protected by configuration")));
        }
        if let Some(_lock) = self.lock(volume)? {
            let (meta, _) = self.settled(volume)?;
            if let Some(at) = meta.attached {
                return Err(refused(Refusal::Conflict, format!("volume {volume} is attached to VM {}", at.vm)));
            }
            if let Some(binding) = self.bindings(volume)?.first() {
                return Err(refused(Refusal::Conflict, format!("{} has volume {volume}'s file", binding.name())));
            }
            self.has_no_snapshots(volume)?;
            before("loop.delete.before")?;
            let to = self.layout.trash().join(format!("{volume}.{}", now().0));
            fs::rename(self.layout.volume(volume), &to).map_err(|e| not_started(to.display(), &e))?;
            for dir in [self.layout.trash(), self.layout.volumes()] {
                sync_dir(&dir).map_err(|e| ambiguous(dir.display(), e))?;
            }
            point("loop.delete.after")?;
        }
        self.empty_trash();
        let mut until = None;
        for (path, id, at) in self.trashed()? {
            if id != volume {
                continue;
            }
            if expunge {
                remove(&path).map_err(|e| ambiguous(path.display(), e))?;
            } else {
                until = until.max(Some(at.plus(self.trash_keep)));
            }
        }
        Ok(until)
    }

    /// What is in the trash: path, volume, when it was deleted.
    fn trashed(&self) -> Result<Vec<(std::path::PathBuf, VolumeId, Timestamp)>, CloudError> {
        let dir = self.layout.trash();
        let mut found = Vec::new();
        for entry in fs::read_dir(&dir).map_err(|e| unreachable(dir.display(), &e))? {
            let entry = entry.map_err(|e| unreachable(dir.display(), &e))?;
            let name = entry.file_name();
            let Some((id, at)) = name.to_str().and_then(|n| n.split_once('.')) else { continue };
            // Anything else was put there by somebody, and is theirs.
            if let (Ok(id), Ok(at)) = (VolumeId::parse(id), at.parse()) {
                found.push((entry.path(), id, Timestamp(at)));
            }
        }
        Ok(found)
    }

    /// Removes what nobody can recover any more. What cannot be removed is tried again later.
    fn empty_trash(&self) {
        let old = match self.trashed() {
            Ok(found) => found.into_iter().filter(|(_, _, at)| at.plus(self.trash_keep) <= now()),
            Err(e) => return tracing::warn!("the trash was not emptied: {e}"),
        };
        for (path, _, _) in old {
            if let Err(e) = remove(&path) {
                tracing::warn!("{} stays in the trash: {e}", path.display());
            }
        }
        self.layout.fill_reserve();
    }

    pub(super) fn exchange_mark(
        &self,
        volume: VolumeId,
        expect: Option<Mark>,
        new: Option<&Label>,
    ) -> Result<(), CloudError> {
        let _lock = self.lock_existing(volume)?;
        let (mut meta, _) = self.settled(volume)?;
        let (mark, job, disk) = match new {
            Some(label) => (Some(label.mark), Some(label.job.to_string()), Some(label.disk.to_string())),
            None => (None, None, None),
        };
        if meta.mark == mark && meta.job == job && meta.disk == disk {
            return Ok(());
        }
        // The names beside a mark that is right already follow it.
        if meta.mark != mark && meta.mark != expect {
            let found = meta.mark.map_or("none".into(), |m| m.to_string());
            return Err(refused(Refusal::Mark(meta.mark), format!("the mark of volume {volume} is {found}")));
        }
        before("loop.mark.before")?;
        (meta.mark, meta.job, meta.disk) = (mark, job, disk);
        if mark.is_some() {
            self.layout.write(&meta)?
        } else {
            self.layout.write_giving_back(&meta)?
        }
        point("loop.mark.after")
    }
}

fn no_volume(volume: VolumeId) -> CloudError {
    refused(Refusal::NoVolume, format!("there is no volume {volume}"))
}

/// Removes a directory of ours and what is in it; gone already is success.
pub(super) fn remove(path: &Path) -> io::Result<()> {
    match fs::remove_dir_all(path) {
        Err(e) if e.kind() != io::ErrorKind::NotFound => Err(e),
        _ => Ok(()),
    }
}
