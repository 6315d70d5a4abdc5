//! The cloud: one trait, its views, and its errors in the three kinds that decide what happens next.

use std::time::Duration;

use async_trait::async_trait;
use serde::{Deserialize, Serialize};

use crate::model::{
    Disk, DiskName, Fence, JobId, Mark, RecordId, Slot, SnapshotId, SnapshotName, Timestamp, VmId, VolumeId,
};

mod call;
pub mod cloudstack;
pub mod loopdev;

pub use call::Call;

/// What a failed call means. The kind, not the words, decides what the engine does.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum CloudError {
    /// The cloud said no; nothing was changed.
    #[error("{words}")]
    Refused {
        /// What kind of no.
        why: Refusal,
        /// The cloud's words, with its code if it gave one.
        words: String,
    },
    /// Nothing was started.
    #[error("{words}")]
    Unreachable {
        /// What was tried and what failed.
        words: String,
    },
    /// It may or may not have happened: only looking decides.
    #[error("{words}")]
    Ambiguous {
        /// What was tried and what failed.
        words: String,
    },
}

/// Kinds of a refusal.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Refusal {
    /// Another state than the call needs, e.g. the volume is attached elsewhere.
    Conflict,
    /// Somebody uses the device: found by the provider's own race-free test.
    InUse,
    /// No such volume.
    NoVolume,
    /// No such VM.
    NoVm,
    /// No space.
    Capacity,
    /// Over the account's limits.
    Quota,
    /// This provider cannot do that.
    Unsupported,
    /// The mark was not the expected one: the one found.
    Mark(Option<Mark>),
    /// It passes by itself: try again.
    Passing,
    /// It carries this host, or is protected by configuration; the words say which.
    Protected,
    /// Anything else.
    Other,
}

/// Where the cloud says a volume is attached.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Attachment {
    /// To which VM.
    pub vm: VmId,
    /// Its place in the VM's order of disks, where the cloud tells.
    pub device_id: Option<u32>,
}

/// A volume as the cloud shows it, in one answer.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct CloudVolume {
    /// Its id.
    pub id: VolumeId,
    /// Its name for people.
    pub name: String,
    /// Bytes.
    pub size: u64,
    /// The cloud's own word for its state.
    pub state: String,
    /// Where it is attached.
    pub attached: Option<Attachment>,
    /// Whose it is.
    pub mark: Option<Mark>,
    /// Set when it must never be claimed (device id 0 of this host), with the reason.
    pub carries_host: Option<String>,
    /// The id of a job of the cloud that is still pending on it: what is shown here may be about to change.
    pub pending: Option<String>,
}

/// A snapshot as the cloud shows it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct CloudSnapshot {
    /// Its id.
    pub id: SnapshotId,
    /// The cloud's name for it.
    pub name: String,
    /// The cloud's own word for its state.
    pub state: String,
    /// Whether it can be reverted to: complete, in the cloud's own words.
    pub ready: bool,
    /// Bytes of the volume that it is of, when it was taken; 0 if the cloud does not tell.
    pub size: u64,
    /// When it was taken, where the cloud tells.
    pub created: Option<Timestamp>,
}

/// What a VM is, as far as volfs cares.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct VmFacts {
    /// Whether it may be writing to its disks. Anything but certainly stopped counts as running.
    pub running: bool,
    /// Whether a disk holds device id 0.
    pub has_root: bool,
}

/// What to create.
#[derive(Debug, Clone)]
pub struct NewVolume {
    /// At least so many bytes.
    pub size: u64,
    /// Name for people.
    pub name: String,
    /// Offering, where the provider has such.
    pub offering: Option<String>,
    /// Zone, where the provider has such.
    pub zone: Option<String>,
    /// The mark it carries from the first moment.
    pub label: Label,
}

/// A mark with the names beside it, for people and for rebuilding.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Label {
    /// The mark proper.
    pub mark: Mark,
    /// The owning job's name.
    pub job: JobId,
    /// The disk's name.
    pub disk: DiskName,
}

/// What a survey is asked to show.
#[derive(Debug, Clone, Default)]
pub struct Survey {
    /// These volumes, wherever they are.
    pub volumes: Vec<VolumeId>,
    /// All volumes of these VMs.
    pub vms: Vec<VmId>,
    /// All that carry this record's mark.
    pub record: Option<RecordId>,
    /// Those that creates with these fences made after all, marked or not.
    pub fences: Vec<Fence>,
}

/// A volume that carries a mark, whosever, with the names beside it as they stand there.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Marked {
    /// The volume.
    pub volume: CloudVolume,
    /// Its mark.
    pub mark: Mark,
    /// The job's name beside it, unchecked.
    pub job: Option<String>,
    /// The disk's name beside it, unchecked.
    pub disk: Option<String>,
    /// Deleted, and kept by the provider for a while: no volume to work with, but its mark was given.
    pub deleted: bool,
}

/// What a provider is and can do; constant while the daemon runs.
#[derive(Debug, Clone)]
pub struct About {
    /// Its name, as in `--provider`.
    pub name: &'static str,
    /// This host's own VM id.
    pub host: VmId,
    /// Most disks this host can have attached.
    pub most_disks: u32,
    /// Whether a device can be pulled from its users (`force`).
    pub can_force: bool,
    /// Whether snapshots exist.
    pub snapshots: bool,
    /// Whether `detach` here tests for users by itself, race-free, and therefore needs volfs's own
    /// descriptors on the device closed first (kernel fact 14).
    pub detach_wants_sole_opener: bool,
    /// Sizes are multiples of this many bytes; what is asked for is rounded up.
    pub size_step: u64,
    /// How long after a call that got no answer its effect may still come to light: two looks that
    /// far apart decide that there was none. Zero where a look is the truth at once.
    pub late: Duration,
    /// Whether `host` is what somebody said, to be proved by the root disk before anything is changed.
    pub prove_host: bool,
}

/// The cloud. Every call looks before it acts, so each may be repeated with the same [`Call`].
#[async_trait]
pub trait Cloud: Send + Sync {
    /// What this provider is.
    fn about(&self) -> &About;

    /// One volume, or `None` if the cloud knows no such.
    async fn find(&self, volume: VolumeId) -> Result<Option<CloudVolume>, CloudError>;

    /// Words for a job of the cloud that an operation with this fence started and that is not final,
    /// if there is one: until then no look at the volume is the operation's outcome.
    async fn running(&self, fence: Fence) -> Result<Option<String>, CloudError> {
        let _ = fence;
        Ok(None)
    }

    /// The volume that an earlier [`Cloud::create`] with this fence made, if it did; its mark may
    /// not be on it yet: repeating the create puts it there.
    async fn find_created(&self, fence: Fence) -> Result<Option<CloudVolume>, CloudError>;

    /// Several volumes in one answer.
    async fn survey(&self, survey: &Survey) -> Result<Vec<CloudVolume>, CloudError>;

    /// Every volume that carries a mark, also what cannot be told of others: an id and why, a line each.
    async fn marked(&self) -> Result<(Vec<Marked>, Vec<String>), CloudError> {
        Err(CloudError::Refused { why: Refusal::Unsupported, words: "this provider cannot list marks".into() })
    }

    /// Whether a volume without a mark is one on which `record` was replacing its own mark by another
    /// of its own when that was cut short, and not one that was given up.
    async fn half_exchanged(&self, volume: VolumeId, record: RecordId) -> Result<bool, CloudError> {
        let _ = (volume, record);
        Ok(false)
    }

    /// Makes a volume that carries its mark from the first moment.
    async fn create(&self, call: &Call, new: &NewVolume) -> Result<CloudVolume, CloudError>;

    /// Attaches; success when it is attached there already.
    async fn attach(&self, call: &Call, volume: VolumeId, vm: VmId, slot: Option<Slot>) -> Result<(), CloudError>;

    /// Detaches from that VM; success when it is not attached there.
    async fn detach(&self, call: &Call, volume: VolumeId, vm: VmId, force: bool) -> Result<(), CloudError>;

    /// Grows to at least `size` bytes; success when it has that already. Answers the new size.
    async fn resize(&self, call: &Call, volume: VolumeId, size: u64) -> Result<u64, CloudError>;

    /// Deletes a detached volume; answers until when it can be recovered. Success when it is gone.
    async fn delete(&self, call: &Call, volume: VolumeId, expunge: bool) -> Result<Option<Timestamp>, CloudError>;

    /// Replaces the mark if it is exactly `expect`, else [`Refusal::Mark`]. `new` `None` clears it.
    /// Success when the mark is `new` already.
    async fn exchange_mark(
        &self,
        call: &Call,
        volume: VolumeId,
        expect: Option<Mark>,
        new: Option<&Label>,
    ) -> Result<(), CloudError>;

    /// Takes a snapshot; success when an earlier call with this [`Call`] took it. Complete when it returns.
    async fn snapshot(&self, call: &Call, volume: VolumeId, name: &SnapshotName) -> Result<CloudSnapshot, CloudError> {
        let _ = (call, volume, name);
        Err(no_snapshots())
    }

    /// The snapshot that an earlier [`Cloud::snapshot`] of this volume with this fence took, if it did.
    async fn find_snapshot(&self, volume: VolumeId, fence: Fence) -> Result<Option<CloudSnapshot>, CloudError> {
        let _ = (volume, fence);
        Ok(None)
    }

    /// All snapshots of a volume, whoever took them.
    async fn snapshots(&self, volume: VolumeId) -> Result<Vec<CloudSnapshot>, CloudError> {
        let _ = volume;
        Ok(Vec::new())
    }

    /// Puts a detached volume's bytes back to those of the snapshot.
    async fn revert(&self, call: &Call, volume: VolumeId, snapshot: SnapshotId) -> Result<(), CloudError> {
        let _ = (call, volume, snapshot);
        Err(no_snapshots())
    }

    /// Deletes a snapshot; success when it is gone.
    async fn delete_snapshot(&self, call: &Call, volume: VolumeId, snapshot: SnapshotId) -> Result<(), CloudError> {
        let _ = (call, volume, snapshot);
        Err(no_snapshots())
    }

    /// Whether that very disk of this host has this volume's data, where the provider sees more of
    /// it than the identity that the disk shows. The disk is pinned while this is asked.
    async fn backs(&self, volume: VolumeId, disk: &Disk) -> Result<bool, CloudError> {
        let _ = (volume, disk);
        Ok(true)
    }

    /// A VM, or `None` if the cloud knows no such.
    async fn vm(&self, vm: VmId) -> Result<Option<VmFacts>, CloudError>;
}

fn no_snapshots() -> CloudError {
    CloudError::Refused { why: Refusal::Unsupported, words: "this provider has no snapshots".into() }
}
