//! The embedded provider: sparse files as volumes, loop devices as attachments.
//!
//! It keeps a truth of its own, apart from volfs's record:
//! ```text
//! DIR/provider.json            marks the directory as a store of ours
//! DIR/lock                     flock: slots and capacity
//! DIR/reserve                  room for detach and release on a full filesystem
//! DIR/volumes/UUID/data.img    the volume: a sparse file
//! DIR/volumes/UUID/meta.json   name, size, mark, where attached, what is being done
//! DIR/volumes/UUID/snapshots/  a directory a snapshot, likewise: a copy of data.img, and what it is
//! DIR/volumes/.new-FENCE/      a volume being made
//! DIR/vms/UUID.json            {"running": bool}: for operators and tests to edit
//! DIR/trash/UUID.MILLIS/       deleted volumes, until `trash_keep` is over
//! ```
//! Work on a volume holds a `flock` on its directory, so two daemons over one store are safe, and a
//! lock never outlives its process. An effect outside the metadata (binding, unbinding, growing) is
//! announced in it first. Looking takes no lock: what a crash left half done is told by looking at
//! the kernel, and written down by the next work on that volume or the next [`LoopCloud::open`].
//!
//! **Damage.** A volume whose metadata cannot be read is told by `find` as ambiguous, naming the
//! file. A survey that asks for it by id fails likewise. A survey for a record's volumes or for
//! this host's leaves it out with a warning, so that it does not hide the others: nobody may take
//! absence from those two lists as proof (this host's devices are seen in the kernel). A survey for
//! another VM's volumes fails, because that list is what says whether the VM can be thrown away.
//!
//! **Space.** Files are sparse, and several volumes together may promise more than there is. One
//! volume, or one growth, that is larger than what the filesystem has free now is refused, and so
//! is what exceeds `capacity` (the sizes of all volumes and of their snapshots, what is in the trash
//! included).

use std::collections::HashSet;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;

use super::{
    About, Call, Cloud, CloudError, CloudSnapshot, CloudVolume, Label, Marked, NewVolume, Refusal, Survey, VmFacts,
};
use crate::failpoint;
use crate::model::{BootId, Disk, Fence, Mark, Slot, SnapshotId, SnapshotName, Timestamp, VmId, VolumeId};

mod device;
mod disk;
mod look;
mod snapshots;
mod work;

#[cfg(test)]
mod tests;

use disk::Layout;
use look::Cache;

/// How the provider is set up.
#[derive(Debug, Clone)]
pub struct LoopOptions {
    /// Its directory; made (0700) if it is not there.
    pub dir: PathBuf,
    /// How long a deleted volume can be recovered.
    pub trash_keep: Duration,
    /// Volumes that carry the host: never claimed, never deleted.
    pub protect: Vec<VolumeId>,
    /// Most disks attached to this host at once.
    pub most_disks: u32,
    /// Bytes in all, if limited.
    pub capacity: Option<u64>,
    /// Which start of this machine.
    pub boot: BootId,
    /// This host's id.
    pub host: VmId,
    /// Look only: nothing is made, and nothing that a crash left is finished.
    pub read_only: bool,
}

impl LoopOptions {
    /// 256 disks, a week's trash, nothing protected, no limit but the filesystem's.
    pub fn new(dir: PathBuf, boot: BootId, host: VmId) -> Self {
        Self {
            dir,
            trash_keep: Duration::from_secs(7 * 24 * 3600),
            protect: Vec::new(),
            most_disks: 256,
            capacity: None,
            boot,
            host,
            read_only: false,
        }
    }
}

/// The provider. Its methods' blocking work runs on tokio's blocking threads, to its end even when
/// the caller's future is dropped.
#[derive(Debug)]
pub struct LoopCloud {
    about: About,
    inner: Arc<Inner>,
}

#[derive(Debug)]
struct Inner {
    layout: Layout,
    protect: HashSet<VolumeId>,
    trash_keep: Duration,
    most_disks: u32,
    capacity: Option<u64>,
    boot: BootId,
    host: VmId,
    cache: Cache,
    /// One search for a free loop device at a time: they would only win each other's.
    binding: parking_lot::Mutex<()>,
}

impl LoopCloud {
    /// Opens the store and finishes what a crash left half done; blocking.
    ///
    /// # Errors
    /// [`CloudError::Unreachable`] when the directory cannot be read or holds something else.
    pub fn open(options: LoopOptions) -> Result<Arc<Self>, CloudError> {
        Self::open_caching(options, Duration::from_secs(3))
    }

    fn open_caching(options: LoopOptions, quiet: Duration) -> Result<Arc<Self>, CloudError> {
        let layout = if options.read_only { Layout::look(&options.dir)? } else { Layout::open(&options.dir)? };
        let inner = Inner {
            layout,
            protect: options.protect.into_iter().collect(),
            trash_keep: options.trash_keep,
            most_disks: options.most_disks,
            capacity: options.capacity,
            boot: options.boot,
            host: options.host,
            cache: Cache::new(quiet),
            binding: parking_lot::Mutex::new(()),
        };
        if !options.read_only {
            inner.recover()?;
        }
        let about = About {
            name: "loop",
            host: options.host,
            most_disks: options.most_disks,
            can_force: false,
            snapshots: true,
            detach_wants_sole_opener: true,
            size_step: work::STEP,
            late: Duration::ZERO,
            prove_host: false,
        };
        Ok(Arc::new(Self { about, inner: Arc::new(inner) }))
    }

    /// The store's own random id, made with it. A caller that remembers it notices another store,
    /// or a new empty one below a mount point whose mount is missing.
    pub fn instance(&self) -> uuid::Uuid {
        self.inner.layout.instance
    }

    async fn looking<T: Send + 'static>(
        &self,
        look: impl FnOnce(&Inner) -> Result<T, CloudError> + Send + 'static,
    ) -> Result<T, CloudError> {
        let inner = self.inner.clone();
        let task = tokio::task::spawn_blocking(move || {
            if failpoint::hit("loop.unreachable") {
                return Err(CloudError::Unreachable { words: "failpoint loop.unreachable".into() });
            }
            look(&inner)
        });
        task.await.unwrap_or_else(|e| Err(CloudError::Ambiguous { words: format!("the loop provider failed: {e}") }))
    }

    async fn working<T: Send + 'static>(
        &self,
        work: impl FnOnce(&Inner) -> Result<T, CloudError> + Send + 'static,
    ) -> Result<T, CloudError> {
        self.looking(move |inner| {
            if failpoint::hit("loop.refuse") {
                return Err(disk::refused(Refusal::Other, "failpoint loop.refuse"));
            }
            inner.layout.still_ours()?;
            let done = work(inner)?;
            if failpoint::hit("loop.ambiguous") {
                return Err(CloudError::Ambiguous { words: "failpoint loop.ambiguous".into() });
            }
            Ok(done)
        })
        .await
    }
}

#[async_trait]
impl Cloud for LoopCloud {
    fn about(&self) -> &About {
        &self.about
    }

    async fn find(&self, volume: VolumeId) -> Result<Option<CloudVolume>, CloudError> {
        self.looking(move |inner| inner.find(volume)).await
    }

    async fn backs(&self, volume: VolumeId, disk: &Disk) -> Result<bool, CloudError> {
        let disk = disk.clone();
        self.looking(move |inner| inner.backs(volume, &disk)).await
    }

    async fn find_created(&self, fence: Fence) -> Result<Option<CloudVolume>, CloudError> {
        self.looking(move |inner| inner.find_created(fence)).await
    }

    async fn survey(&self, survey: &Survey) -> Result<Vec<CloudVolume>, CloudError> {
        let survey = survey.clone();
        self.looking(move |inner| inner.survey(&survey)).await
    }

    async fn marked(&self) -> Result<(Vec<Marked>, Vec<String>), CloudError> {
        self.looking(Inner::marked).await
    }

    async fn create(&self, call: &Call, new: &NewVolume) -> Result<CloudVolume, CloudError> {
        let (fence, new) = (call.fence(), new.clone());
        self.working(move |inner| inner.create(fence, &new)).await
    }

    async fn attach(&self, _: &Call, volume: VolumeId, vm: VmId, slot: Option<Slot>) -> Result<(), CloudError> {
        self.working(move |inner| inner.attach(volume, vm, slot)).await
    }

    async fn detach(&self, _: &Call, volume: VolumeId, vm: VmId, force: bool) -> Result<(), CloudError> {
        self.working(move |inner| inner.detach(volume, vm, force)).await
    }

    async fn resize(&self, _: &Call, volume: VolumeId, size: u64) -> Result<u64, CloudError> {
        self.working(move |inner| inner.resize(volume, size)).await
    }

    async fn delete(&self, _: &Call, volume: VolumeId, expunge: bool) -> Result<Option<Timestamp>, CloudError> {
        self.working(move |inner| inner.delete(volume, expunge)).await
    }

    async fn exchange_mark(
        &self,
        _: &Call,
        volume: VolumeId,
        expect: Option<Mark>,
        new: Option<&Label>,
    ) -> Result<(), CloudError> {
        let new = new.cloned();
        self.working(move |inner| inner.exchange_mark(volume, expect, new.as_ref())).await
    }

    async fn snapshot(&self, call: &Call, volume: VolumeId, name: &SnapshotName) -> Result<CloudSnapshot, CloudError> {
        let (fence, name) = (call.fence(), name.clone());
        self.working(move |inner| inner.snapshot(fence, volume, &name)).await
    }

    async fn find_snapshot(&self, volume: VolumeId, fence: Fence) -> Result<Option<CloudSnapshot>, CloudError> {
        self.looking(move |inner| inner.find_snapshot(volume, fence)).await
    }

    async fn snapshots(&self, volume: VolumeId) -> Result<Vec<CloudSnapshot>, CloudError> {
        self.looking(move |inner| inner.snapshots(volume)).await
    }

    async fn revert(&self, _: &Call, volume: VolumeId, snapshot: SnapshotId) -> Result<(), CloudError> {
        self.working(move |inner| inner.revert(volume, snapshot)).await
    }

    async fn delete_snapshot(&self, _: &Call, volume: VolumeId, snapshot: SnapshotId) -> Result<(), CloudError> {
        self.working(move |inner| inner.delete_snapshot(volume, snapshot)).await
    }

    async fn vm(&self, vm: VmId) -> Result<Option<VmFacts>, CloudError> {
        self.looking(move |inner| inner.vm(vm)).await
    }
}
