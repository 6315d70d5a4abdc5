//! Snapshots: a copy of the volume's file, shared with it where the filesystem can (a reflink), else
//! of its data without its holes.
//!
//! ```text
//! DIR/volumes/UUID/snapshots/ID/data.img    the bytes
//! DIR/volumes/UUID/snapshots/ID/meta.json   name, size, when, by which operation
//! DIR/volumes/UUID/snapshots/.new-FENCE/    one being taken
//! DIR/volumes/UUID/snapshots/.revert/       the volume's next content
//! DIR/volumes/UUID/snapshots/.gone-ID/      one being removed
//! ```
//! All work on them holds the volume's lock, so whatever has a dot in front while that lock is free
//! was left by a crash, and goes with the next work on the volume or the next start. A snapshot is
//! complete when it gets its name; going back is the rename of one file.

use std::fs::{self, DirBuilder, File, OpenOptions};
use std::io;
use std::os::unix::fs::{DirBuilderExt, FileExt, MetadataExt, OpenOptionsExt};
use std::path::Path;

use rustix::fs::SeekFrom;
use rustix::io::Errno;
use serde::{Deserialize, Serialize};

use super::super::{CloudError, CloudSnapshot, Refusal};
use super::Inner;
use super::disk::{after_effect, ambiguous, json, not_started, refused, sync_dir, unreachable, write_whole};
use super::work::{before, now, point, remove};
use crate::failpoint;
use crate::model::{Fence, SnapshotId, SnapshotName, Timestamp, VolumeId};

const REVERT: &str = ".revert";
/// How often a copy is begun again because somebody wrote meanwhile.
const TRIES: u32 = 3;
/// What the fallback copies at a time.
const PIECE: usize = 1 << 20;

/// `snapshots/ID/meta.json`.
#[derive(Debug, Serialize, Deserialize)]
struct About {
    id: SnapshotId,
    volume: VolumeId,
    name: String,
    /// Bytes of `data.img`.
    size: u64,
    created: Timestamp,
    /// What took it.
    fence: Fence,
}

/// The id of the snapshot that an operation with this fence takes: as [`super::look::id_for`].
fn id_for(fence: Fence) -> SnapshotId {
    const FLIP: u128 = 0x766f_6c66_732d_0c6f_0f70_2d73_6e61_7073;
    SnapshotId(uuid::Uuid::from_u128(fence.0.as_u128() ^ FLIP))
}

/// What tells that a volume was written to: its file's times, and what its devices have counted.
/// The times alone may stand still for a tick of the clock, the counters alone can be switched off.
#[derive(Debug, PartialEq, Eq)]
struct Written {
    file: [i64; 4],
    devices: Vec<(String, Vec<u64>)>,
}

impl Inner {
    /// Takes the volume's bytes as they are at one moment.
    pub(super) fn snapshot(
        &self,
        fence: Fence,
        volume: VolumeId,
        name: &SnapshotName,
    ) -> Result<CloudSnapshot, CloudError> {
        let _lock = self.lock_existing(volume)?;
        let (_, length) = self.settled(volume)?;
        if let Some(taken) = self.find_snapshot(volume, fence)? {
            return Ok(taken);
        }
        before("loop.snapshot.before")?;
        self.sweep(volume)?;
        let holder = self.layout.snapshots(volume);
        make_dir(&holder)?;
        let beside = holder.join(format!(".new-{fence}"));
        let built = self.take_room(&beside, length, length).and_then(|()| {
            self.copy_still(volume, &beside.join("data.img"), length, || {
                failpoint::hit("loop.snapshot.copied");
            })?;
            let about =
                About { id: id_for(fence), volume, name: name.to_string(), size: length, created: now(), fence };
            let path = beside.join("meta.json");
            write_whole(&path, &json(&about, &path)?)?;
            sync_dir(&beside).map_err(|e| not_started(beside.display(), &e))
        });
        if let Err(error) = built {
            clear_away(&beside);
            return Err(error);
        }
        point("loop.snapshot.built")?;
        let path = holder.join(id_for(fence).to_string());
        let counting = self.counting();
        if let Err(error) =
            counting.and_then(|_all| fs::rename(&beside, &path).map_err(|e| not_started(path.display(), &e)))
        {
            clear_away(&beside);
            return Err(error);
        }
        sync_dir(&holder).map_err(|e| ambiguous(path.display(), e))?;
        point("loop.snapshot.after")?;
        self.find_snapshot(volume, fence)?.ok_or_else(|| ambiguous(path.display(), "it is not there"))
    }

    /// A directory with an empty file of `length` bytes in it: from then on they count as taken.
    fn take_room(&self, beside: &Path, length: u64, more: u64) -> Result<(), CloudError> {
        let _all = self.counting()?;
        self.check_capacity(more)?;
        let data = beside.join("data.img");
        let make = || {
            DirBuilder::new().mode(0o700).create(beside)?;
            // A new sparse file: what is not copied into it reads as zeroes.
            let file = OpenOptions::new().create_new(true).write(true).mode(0o600).open(&data)?;
            file.set_len(length)
        };
        make().map_err(|e| not_started(data.display(), &e))
    }

    /// Copies the volume's file, and nothing of two moments. A clone is made at one; a copy is taken
    /// only if nobody wrote while it went on. `copied` is told of each.
    pub(super) fn copy_still(
        &self,
        volume: VolumeId,
        to: &Path,
        length: u64,
        mut copied: impl FnMut(),
    ) -> Result<(), CloudError> {
        let data = self.layout.data(volume);
        for _ in 0..TRIES {
            let was = self.written(volume)?;
            let cloned = self.copy(&data, to, length)?;
            copied();
            if cloned || (was.is_some() && self.written(volume)? == was) {
                return Ok(());
            }
        }
        let words = format!(
            "volume {volume} is written to while it is copied ({TRIES} tries), and this filesystem cannot clone files: \
             end the writing, then take it again"
        );
        Err(refused(Refusal::InUse, words))
    }

    /// `None` while a write is in flight.
    fn written(&self, volume: VolumeId) -> Result<Option<Written>, CloudError> {
        let data = self.layout.data(volume);
        let mut devices = Vec::new();
        for binding in self.bindings(volume)? {
            let name = binding.name();
            let read = |file: &str| {
                let path = format!("/sys/block/{name}/{file}");
                let text = fs::read_to_string(&path).map_err(|e| unreachable(&path, &e))?;
                let numbers: Result<Vec<u64>, _> = text.split_whitespace().map(str::parse).collect();
                numbers.map_err(|e| CloudError::Unreachable { words: format!("{path}: {e}") })
            };
            // In flight before counted: what has ended by then has been counted.
            if read("inflight")?.get(1).is_some_and(|writes| *writes > 0) {
                return Ok(None);
            }
            let stat = read("stat")?;
            // Requests and sectors written, requests and sectors discarded (kernel: Documentation/block/stat).
            let counted = [4, 6, 11, 13].into_iter().filter_map(|n| stat.get(n).copied()).collect();
            devices.push((name, counted));
        }
        let file = fs::symlink_metadata(&data).map_err(|e| unreachable(data.display(), &e))?;
        let file = [file.mtime(), file.mtime_nsec(), file.ctime(), file.ctime_nsec()];
        Ok(Some(Written { file, devices }))
    }

    /// Makes `to`, which has that length already, the same as `from`; durable when it returns. True
    /// if it shares `from`'s blocks, as they were at one moment.
    fn copy(&self, from: &Path, to: &Path, length: u64) -> Result<bool, CloudError> {
        let read = OpenOptions::new().read(true).custom_flags(libc::O_NOFOLLOW).open(from);
        let source = read.map_err(|e| unreachable(from.display(), &e))?;
        let write = OpenOptions::new().write(true).custom_flags(libc::O_NOFOLLOW).open(to);
        let target = write.map_err(|e| not_started(to.display(), &e))?;
        let failed = |e: io::Error| not_started(format!("copying {} to {}", from.display(), to.display()), &e);
        // Which filesystems refuse it with which error is their own affair.
        let cloned = rustix::fs::ioctl_ficlone(&target, &source).is_ok();
        if !cloned {
            let allocated = source.metadata().map_err(failed)?.blocks().saturating_mul(512);
            self.check_free(allocated)?;
            // An earlier try may have filled what is a hole now.
            target.set_len(0).and_then(|()| target.set_len(length)).map_err(failed)?;
            copy_data(&source, &target, length).map_err(failed)?;
        }
        if target.metadata().map_err(failed)?.len() != length {
            return Err(failed(io::Error::other(format!("it has not {length} bytes any more"))));
        }
        target.sync_all().map_err(failed)?;
        Ok(cloned)
    }

    /// The snapshot that the operation with this fence took.
    pub(super) fn find_snapshot(&self, volume: VolumeId, fence: Fence) -> Result<Option<CloudSnapshot>, CloudError> {
        self.read_snapshot(volume, id_for(fence))
    }

    /// All that have a name; what a crash left of others is none.
    pub(super) fn snapshots(&self, volume: VolumeId) -> Result<Vec<CloudSnapshot>, CloudError> {
        let mut found = Vec::new();
        for name in self.names(volume)? {
            if let Ok(id) = SnapshotId::parse(&name) {
                found.extend(self.read_snapshot(volume, id)?);
            }
        }
        Ok(found)
    }

    /// What is in a volume's `snapshots`; none if there is no such directory.
    fn names(&self, volume: VolumeId) -> Result<Vec<String>, CloudError> {
        let dir = self.layout.snapshots(volume);
        let entries = match fs::read_dir(&dir) {
            Ok(entries) => entries,
            Err(e) if e.kind() == io::ErrorKind::NotFound => {
                self.layout.still_ours()?;
                return Ok(Vec::new());
            }
            Err(e) => return Err(unreachable(dir.display(), &e)),
        };
        let mut names = Vec::new();
        for entry in entries {
            let entry = entry.map_err(|e| unreachable(dir.display(), &e))?;
            names.extend(entry.file_name().to_str().map(str::to_owned));
        }
        Ok(names)
    }

    /// One that is damaged is shown as such, and hides no other.
    fn read_snapshot(&self, volume: VolumeId, id: SnapshotId) -> Result<Option<CloudSnapshot>, CloudError> {
        let dir = self.layout.snapshots(volume).join(id.to_string());
        match fs::symlink_metadata(&dir) {
            Err(e) if e.kind() == io::ErrorKind::NotFound => {
                self.layout.still_ours()?;
                return Ok(None);
            }
            Err(e) => return Err(unreachable(dir.display(), &e)),
            Ok(_) => {}
        }
        let path = dir.join("meta.json");
        let about = fs::read(&path).map_err(|e| e.to_string()).and_then(|bytes| {
            let about: About = serde_json::from_slice(&bytes).map_err(|e| e.to_string())?;
            match about.id == id && about.volume == volume {
                true => Ok(about),
                false => Err(format!("it is snapshot {} of volume {}", about.id, about.volume)),
            }
        });
        let about = match about {
            Ok(about) => about,
            Err(why) => {
                tracing::warn!(%volume, snapshot = %id, "damaged: {}: {why}", path.display());
                let (name, state) = (id.to_string(), "Damaged".into());
                return Ok(Some(CloudSnapshot { id, name, state, ready: false, size: 0, created: None }));
            }
        };
        let data = fs::symlink_metadata(dir.join("data.img"));
        let ready = data.is_ok_and(|data| data.is_file() && data.len() == about.size);
        Ok(Some(CloudSnapshot {
            id,
            name: about.name,
            state: if ready { "Ready" } else { "Damaged" }.into(),
            ready,
            // As a volume's: whole sectors.
            size: about.size - about.size % 512,
            created: Some(about.created),
        }))
    }

    /// Replaces a detached volume's content by the snapshot's; its metadata stays, but for the size.
    pub(super) fn revert(&self, volume: VolumeId, snapshot: SnapshotId) -> Result<(), CloudError> {
        if self.protect.contains(&volume) {
            return Err(refused(Refusal::Protected, format!("volume {volume} is protected by configuration")));
        }
        let _lock = self.lock_existing(volume)?;
        let (mut meta, length) = self.settled(volume)?;
        if let Some(at) = meta.attached {
            return Err(refused(Refusal::Conflict, format!("volume {volume} is attached to VM {}", at.vm)));
        }
        self.unbound(volume)?;
        let words = |what: &str| refused(Refusal::Other, format!("snapshot {snapshot} of volume {volume} {what}"));
        let found = self.read_snapshot(volume, snapshot)?.ok_or_else(|| words("is not there"))?;
        if !found.ready {
            return Err(words("is damaged"));
        }
        before("loop.revert.before")?;
        self.sweep(volume)?;
        let holder = self.layout.snapshots(volume);
        let from = holder.join(snapshot.to_string()).join("data.img");
        let size = fs::symlink_metadata(&from).map_err(|e| unreachable(from.display(), &e))?.len();
        let beside = holder.join(REVERT);
        let next = beside.join("data.img");
        let ready = self.take_room(&beside, size, size.saturating_sub(length)).and_then(|()| {
            self.copy(&from, &next, size)?;
            point("loop.revert.copied")?;
            // Whoever has bound the present file meanwhile would go on with it unseen.
            self.unbound(volume)?;
            if size < meta.size {
                // Never does the metadata promise more than the file has.
                meta.size = size;
                self.layout.write(&meta)?;
            }
            point("loop.revert.promised")
        });
        if let Err(error) = ready {
            clear_away(&beside);
            return Err(error);
        }
        let data = self.layout.data(volume);
        let counting = self.counting();
        if let Err(error) =
            counting.and_then(|_all| fs::rename(&next, &data).map_err(|e| not_started(data.display(), &e)))
        {
            clear_away(&beside);
            return Err(error);
        }
        for dir in [self.layout.volume(volume), beside.clone()] {
            sync_dir(&dir).map_err(|e| ambiguous(data.display(), e))?;
        }
        point("loop.revert.replaced")?;
        if size != meta.size {
            meta.size = size;
            self.layout.write(&meta).map_err(after_effect)?;
        }
        clear_away(&beside);
        point("loop.revert.after")
    }

    fn unbound(&self, volume: VolumeId) -> Result<(), CloudError> {
        match self.bindings(volume)?.first() {
            Some(binding) => Err(refused(Refusal::Conflict, format!("{} has volume {volume}'s file", binding.name()))),
            None => Ok(()),
        }
    }

    /// Removes a snapshot.
    pub(super) fn delete_snapshot(&self, volume: VolumeId, snapshot: SnapshotId) -> Result<(), CloudError> {
        let Some(_lock) = self.lock(volume)? else { return Ok(()) };
        self.sweep(volume)?;
        let holder = self.layout.snapshots(volume);
        let path = holder.join(snapshot.to_string());
        match fs::symlink_metadata(&path) {
            Err(e) if e.kind() == io::ErrorKind::NotFound => return self.layout.still_ours(),
            Err(e) => return Err(unreachable(path.display(), &e)),
            Ok(_) => {}
        }
        before("loop.delete-snapshot.before")?;
        let gone = holder.join(format!(".gone-{snapshot}"));
        fs::rename(&path, &gone).map_err(|e| not_started(path.display(), &e))?;
        sync_dir(&holder).map_err(|e| ambiguous(path.display(), e))?;
        point("loop.delete-snapshot.renamed")?;
        clear_away(&gone);
        point("loop.delete-snapshot.after")
    }

    /// Refuses what would take a volume's snapshots away with it.
    pub(super) fn has_no_snapshots(&self, volume: VolumeId) -> Result<(), CloudError> {
        let kept = self.snapshots(volume)?;
        if kept.is_empty() {
            return Ok(());
        }
        let names: Vec<String> = kept.iter().map(|s| format!("{} ({})", s.name, s.id)).collect();
        let words = format!(
            "volume {volume} has snapshots in {}: {}; they would go with it",
            self.layout.snapshots(volume).display(),
            names.join(", ")
        );
        Err(refused(Refusal::Conflict, words))
    }

    /// Bytes that a volume's snapshots promise, those begun included.
    pub(super) fn bytes_of_snapshots(&self, volume: VolumeId) -> Result<u64, CloudError> {
        let dir = self.layout.snapshots(volume);
        let length = |name: String| fs::symlink_metadata(dir.join(name).join("data.img")).map_or(0, |m| m.len());
        Ok(self.names(volume)?.into_iter().map(length).fold(0, u64::saturating_add))
    }

    /// Removes what a crash left. The volume's lock is held.
    fn sweep(&self, volume: VolumeId) -> Result<(), CloudError> {
        for name in self.names(volume)?.iter().filter(|name| left_over(name)) {
            let path = self.layout.snapshots(volume).join(name);
            remove(&path).map_err(|e| unreachable(path.display(), &e))?;
        }
        Ok(())
    }

    /// The same for every volume that nobody works on.
    pub(super) fn sweep_all(&self) -> Result<(), CloudError> {
        for (volume, _) in self.scan()? {
            if self.names(volume)?.iter().any(|name| left_over(name))
                && let Some(_lock) = self.layout.lock_dir(&self.layout.volume(volume), false)?
            {
                self.sweep(volume)?;
            }
        }
        Ok(())
    }
}

/// Anything else was put there by somebody, and is theirs.
fn left_over(name: &str) -> bool {
    name == REVERT || name.starts_with(".new-") || name.starts_with(".gone-")
}

/// What stays takes room until the next work on the volume, and is nothing else.
fn clear_away(path: &Path) {
    if let Err(e) = remove(path) {
        tracing::warn!("{} is left over: {e}", path.display());
    }
}

/// Makes the directory if it is not there.
fn make_dir(path: &Path) -> Result<(), CloudError> {
    let made = match DirBuilder::new().mode(0o700).create(path) {
        Err(e) if e.kind() == io::ErrorKind::AlreadyExists => return Ok(()),
        made => made,
    };
    let holder = path.parent().unwrap_or(Path::new("/"));
    made.and_then(|()| sync_dir(holder)).map_err(|e| not_started(path.display(), &e))
}

/// Copies what is not a hole.
fn copy_data(from: &File, to: &File, length: u64) -> io::Result<()> {
    let mut at = 0;
    while at < length {
        let start = match rustix::fs::seek(from, SeekFrom::Data(at)) {
            Ok(start) => start,
            // Nothing but a hole follows.
            Err(Errno::NXIO) => return Ok(()),
            Err(e) => return Err(e.into()),
        };
        at = rustix::fs::seek(from, SeekFrom::Hole(start))?.min(length);
        copy_range(from, to, start, at)?;
    }
    Ok(())
}

fn copy_range(from: &File, to: &File, start: u64, end: u64) -> io::Result<()> {
    let (mut source, mut target) = (start, start);
    while source < end {
        let left = usize::try_from(end - source).unwrap_or(usize::MAX);
        match rustix::fs::copy_file_range(from, Some(&mut source), to, Some(&mut target), left) {
            Ok(0) => return Err(io::ErrorKind::UnexpectedEof.into()),
            Ok(_) | Err(Errno::INTR) => {}
            // A filesystem that does not do it within the kernel.
            Err(Errno::OPNOTSUPP | Errno::NOSYS | Errno::INVAL | Errno::XDEV) => {
                return copy_by_hand(from, to, source, end);
            }
            Err(e) => return Err(e.into()),
        }
    }
    Ok(())
}

fn copy_by_hand(from: &File, to: &File, start: u64, end: u64) -> io::Result<()> {
    let mut buffer = vec![0; PIECE];
    let mut at = start;
    while at < end {
        let piece = usize::try_from(end - at).unwrap_or(usize::MAX).min(PIECE);
        from.read_exact_at(&mut buffer[..piece], at)?;
        to.write_all_at(&buffer[..piece], at)?;
        at += piece as u64;
    }
    Ok(())
}
