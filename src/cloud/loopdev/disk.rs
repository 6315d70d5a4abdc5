//! The provider's truth on disk: its marker, each volume's `meta.json`, each VM's file.
//!
//! A `meta.json` is replaced as a whole (write beside, fsync, rename, fsync of the directory), so a
//! crash leaves the old one or the new one. Fields this version does not know are kept.

use std::fs::{self, File, OpenOptions};
use std::io::{self, Write};
use std::os::unix::fs::{DirBuilderExt, MetadataExt, OpenOptionsExt, PermissionsExt};
use std::path::{Path, PathBuf};

use rustix::fs::FlockOperation;
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};

use super::super::{CloudError, Refusal};
use crate::model::{BootId, Fence, Mark, VmId, VolumeId};

/// The layout's version in `provider.json`; another one is not touched.
const LAYOUT: u32 = 1;

/// Bytes kept allocated so that detach and release can write on a full filesystem, and how many of
/// them are freed at a time.
const RESERVE: u64 = 256 * 1024;
const RESERVE_SLICE: u64 = 32 * 1024;

/// `meta.json`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub(super) struct Meta {
    pub id: VolumeId,
    pub name: String,
    /// Bytes promised; `data.img` is never shorter.
    pub size: u64,
    /// RECORD/EPOCH.
    #[serde(default, with = "mark_text")]
    pub mark: Option<Mark>,
    /// The owning job's name, for people and for rebuilding.
    #[serde(default)]
    pub job: Option<String>,
    /// The disk's name, likewise.
    #[serde(default)]
    pub disk: Option<String>,
    #[serde(default)]
    pub attached: Option<Attached>,
    /// What created it; `None` for a volume put here by hand.
    #[serde(default)]
    pub fence: Option<Fence>,
    /// Whether it was ever attached ("Ready"; before, "Allocated").
    #[serde(default)]
    pub used: bool,
    /// Written before the effect; found later only after a crash, or while the work runs.
    #[serde(default)]
    pub intent: Option<Intent>,
    #[serde(flatten)]
    pub rest: Map<String, Value>,
}

/// To which VM a volume is attached.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Attached {
    pub vm: VmId,
    pub device_id: u32,
    /// On this host only: loop devices end with the boot.
    #[serde(default)]
    pub boot: Option<BootId>,
}

/// What is being done to a volume on this host.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "kind", rename_all = "lowercase")]
pub(super) enum Intent {
    Attaching(Attached),
    Detaching,
    Resizing { size: u64 },
}

mod mark_text {
    use serde::{Deserialize, Deserializer, Serializer, de::Error};

    use crate::model::Mark;

    pub fn serialize<S: Serializer>(mark: &Option<Mark>, s: S) -> Result<S::Ok, S::Error> {
        match mark {
            Some(mark) => s.collect_str(mark),
            None => s.serialize_none(),
        }
    }

    pub fn deserialize<'de, D: Deserializer<'de>>(d: D) -> Result<Option<Mark>, D::Error> {
        match Option::<String>::deserialize(d)? {
            None => Ok(None),
            Some(text) => Mark::parse(&text).map(Some).ok_or_else(|| D::Error::custom(format!("bad mark {text:?}"))),
        }
    }
}

/// `vms/UUID.json`.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub(super) struct VmFile {
    pub running: bool,
    #[serde(flatten)]
    pub rest: Map<String, Value>,
}

#[derive(Debug, Serialize, Deserialize)]
struct Provider {
    provider: String,
    version: u32,
    instance: uuid::Uuid,
}

/// Nothing was started: `what` failed with `e`.
pub(super) fn unreachable(what: impl std::fmt::Display, e: &io::Error) -> CloudError {
    CloudError::Unreachable { words: format!("{what}: {e}") }
}

/// It may have happened.
pub(super) fn ambiguous(what: impl std::fmt::Display, e: impl std::fmt::Display) -> CloudError {
    CloudError::Ambiguous { words: format!("{what}: {e}") }
}

/// The provider says no.
pub(super) fn refused(why: Refusal, words: impl Into<String>) -> CloudError {
    CloudError::Refused { why, words: words.into() }
}

/// A failure before any effect; a full disk is a refusal.
pub(super) fn not_started(what: impl std::fmt::Display, e: &io::Error) -> CloudError {
    match e.raw_os_error() {
        Some(libc::ENOSPC | libc::EDQUOT | libc::EFBIG) => refused(Refusal::Capacity, format!("{what}: {e}")),
        _ => unreachable(what, e),
    }
}

/// A failure after the work began is never a clean one.
pub(super) fn after_effect(e: CloudError) -> CloudError {
    match e {
        CloudError::Refused { words, .. } | CloudError::Unreachable { words } => CloudError::Ambiguous { words },
        other => other,
    }
}

/// A volume's or the store's lock, let go when dropped (or when the process dies). `flock` belongs
/// to the open file, so it keeps threads apart as well as daemons.
#[derive(Debug)]
pub(super) struct Lock {
    _file: File,
}

/// What is under the provider's directory.
#[derive(Debug)]
pub(super) struct Layout {
    pub dir: PathBuf,
    pub instance: uuid::Uuid,
}

impl Layout {
    /// Opens the directory, or makes it if it is not there or empty. A directory that holds anything
    /// else than a provider's files is refused.
    pub fn open(dir: &Path) -> Result<Self, CloudError> {
        let make = |path: &Path| {
            fs::DirBuilder::new().recursive(true).mode(0o700).create(path).map_err(|e| not_started(path.display(), &e))
        };
        let missing: Vec<PathBuf> = dir.ancestors().take_while(|d| !d.exists()).map(Path::to_owned).collect();
        make(dir)?;
        // Absolute and free of symlinks: the kernel shows backing files so.
        let dir = fs::canonicalize(dir).map_err(|e| unreachable(dir.display(), &e))?;
        let marker = dir.join("provider.json");
        if fs::symlink_metadata(&marker).is_err_and(|e| e.kind() == io::ErrorKind::NotFound) {
            let mut entries = fs::read_dir(&dir).map_err(|e| unreachable(dir.display(), &e))?;
            // A crash in the first start leaves the marker's unfinished copy; a new filesystem has lost+found.
            let empty = |e: &fs::DirEntry| e.file_name() == "provider.json.new" || e.file_name() == "lost+found";
            if !entries.all(|e| e.is_ok_and(|e| empty(&e))) {
                let words = format!("{} is not empty and has no provider.json: not a loop store", dir.display());
                return Err(CloudError::Unreachable { words });
            }
            let new = Provider { provider: "volfs-loop".into(), version: LAYOUT, instance: uuid::Uuid::new_v4() };
            write_whole(&marker, &json(&new, &marker)?)?;
            fs::set_permissions(&dir, fs::Permissions::from_mode(0o700)).map_err(|e| unreachable(dir.display(), &e))?;
        }
        let provider = Self::read_marker(&marker)?;
        for name in ["volumes", "vms", "trash"] {
            make(&dir.join(name))?;
        }
        // Without this a power cut could take a directory with all that was synced in it.
        let above = missing.iter().filter_map(|made| made.parent());
        let above = above.map(|d| if d.as_os_str().is_empty() { Path::new(".") } else { d });
        for holder in [dir.as_path()].into_iter().chain(above) {
            sync_dir(holder).map_err(|e| not_started(holder.display(), &e))?;
        }
        Ok(Self { dir, instance: provider.instance })
    }

    /// Opens what is there already, and makes nothing.
    pub fn look(dir: &Path) -> Result<Self, CloudError> {
        let dir = fs::canonicalize(dir).map_err(|e| unreachable(dir.display(), &e))?;
        let provider = Self::read_marker(&dir.join("provider.json"))?;
        Ok(Self { dir, instance: provider.instance })
    }

    fn read_marker(path: &Path) -> Result<Provider, CloudError> {
        let bytes = fs::read(path).map_err(|e| unreachable(path.display(), &e))?;
        let found: Provider = serde_json::from_slice(&bytes)
            .map_err(|e| CloudError::Unreachable { words: format!("{}: {e}", path.display()) })?;
        if found.provider != "volfs-loop" || found.version != LAYOUT {
            let words = format!(
                "{}: {} version {}, this volfs knows volfs-loop version {LAYOUT}",
                path.display(),
                found.provider,
                found.version
            );
            return Err(CloudError::Unreachable { words });
        }
        Ok(found)
    }

    /// Whether what was opened is still there. "No such volume" is believed only if this holds
    /// *after* the look: an unmounted or moved store must never read as an empty one.
    pub fn still_ours(&self) -> Result<(), CloudError> {
        let marker = self.dir.join("provider.json");
        if Self::read_marker(&marker)?.instance != self.instance {
            let words = format!("{}: another store than the one that was opened", marker.display());
            return Err(CloudError::Unreachable { words });
        }
        for path in [self.volumes(), self.trash()] {
            if !path.is_dir() {
                return Err(CloudError::Unreachable { words: format!("{} is not there", path.display()) });
            }
        }
        Ok(())
    }

    pub fn volumes(&self) -> PathBuf {
        self.dir.join("volumes")
    }

    pub fn trash(&self) -> PathBuf {
        self.dir.join("trash")
    }

    pub fn volume(&self, id: VolumeId) -> PathBuf {
        self.volumes().join(id.to_string())
    }

    pub fn meta(&self, id: VolumeId) -> PathBuf {
        self.volume(id).join("meta.json")
    }

    pub fn data(&self, id: VolumeId) -> PathBuf {
        self.volume(id).join("data.img")
    }

    pub fn snapshots(&self, id: VolumeId) -> PathBuf {
        self.volume(id).join("snapshots")
    }

    fn vm(&self, id: VmId) -> PathBuf {
        self.dir.join("vms").join(format!("{id}.json"))
    }

    /// The lock over slots and capacity. Taken after a volume's lock, never before.
    pub fn lock_all(&self) -> Result<Lock, CloudError> {
        let path = self.dir.join("lock");
        let file = OpenOptions::new()
            .create(true)
            .truncate(false)
            .write(true)
            .mode(0o600)
            .open(&path)
            .map_err(|e| not_started(path.display(), &e))?;
        rustix::fs::flock(&file, FlockOperation::LockExclusive).map_err(|e| unreachable(path.display(), &e.into()))?;
        Ok(Lock { _file: file })
    }

    /// Locks a directory by its path; `None` if there is none, or (without `wait`) if it is locked.
    pub fn lock_dir(&self, path: &Path, wait: bool) -> Result<Option<Lock>, CloudError> {
        let how = if wait { FlockOperation::LockExclusive } else { FlockOperation::NonBlockingLockExclusive };
        loop {
            let file = match File::open(path) {
                Ok(file) => file,
                Err(e) if e.kind() == io::ErrorKind::NotFound => {
                    self.still_ours()?;
                    return Ok(None);
                }
                Err(e) => return Err(unreachable(path.display(), &e)),
            };
            match rustix::fs::flock(&file, how) {
                Ok(()) => {}
                Err(rustix::io::Errno::WOULDBLOCK) if !wait => return Ok(None),
                Err(rustix::io::Errno::INTR) => continue,
                Err(e) => return Err(unreachable(path.display(), &e.into())),
            }
            // While we waited it may have been renamed away, and another one put in its place.
            let ours = file.metadata().map_err(|e| unreachable(path.display(), &e))?;
            match fs::symlink_metadata(path) {
                Ok(now) if (now.dev(), now.ino()) == (ours.dev(), ours.ino()) => return Ok(Some(Lock { _file: file })),
                _ => continue,
            }
        }
    }

    /// Reads a volume's metadata and the present length of its data: `None` if the volume is not
    /// there. A directory without sound metadata is an error that names the file, never absence.
    pub fn read(&self, id: VolumeId) -> Result<Option<(Meta, u64)>, CloudError> {
        if let Ok(found) = self.read_dir_of(id) {
            return Ok(Some(found));
        }
        match fs::symlink_metadata(self.volume(id)) {
            Err(e) if e.kind() == io::ErrorKind::NotFound => {
                self.still_ours()?;
                Ok(None)
            }
            // It is there; it may have come between the two looks, whole: only a second one tells damage.
            _ => self.read_dir_of(id).map(Some),
        }
    }

    fn read_dir_of(&self, id: VolumeId) -> Result<(Meta, u64), CloudError> {
        let path = self.meta(id);
        let bytes = fs::read(&path).map_err(|e| ambiguous(path.display(), e))?;
        let meta = parse(&path, &bytes, id)?;
        let length = self.length(id, meta.size)?;
        Ok((meta, length))
    }

    /// Bytes of the volume's data file; shorter than promised is damage.
    pub fn length(&self, id: VolumeId, promised: u64) -> Result<u64, CloudError> {
        let path = self.data(id);
        let found = fs::symlink_metadata(&path).map_err(|e| ambiguous(path.display(), e))?;
        if !found.is_file() {
            return Err(ambiguous(path.display(), "not a plain file"));
        }
        if found.len() < promised {
            let words = format!("has {} bytes, meta.json promises {promised}", found.len());
            return Err(ambiguous(path.display(), words));
        }
        Ok(found.len())
    }

    /// Replaces a volume's metadata. The volume's lock is held.
    pub fn write(&self, meta: &Meta) -> Result<(), CloudError> {
        let path = self.meta(meta.id);
        write_whole(&path, &json(meta, &path)?)
    }

    /// As [`Layout::write`], for work that gives something back: on a full filesystem it takes its
    /// block from the reserve.
    pub fn write_giving_back(&self, meta: &Meta) -> Result<(), CloudError> {
        loop {
            match self.write(meta) {
                Err(CloudError::Refused { why: Refusal::Capacity, .. }) if self.shrink_reserve() => {}
                done => return done,
            }
        }
    }

    /// Frees a slice of the reserve; false when there is none left.
    fn shrink_reserve(&self) -> bool {
        let path = self.dir.join("reserve");
        let shrunk = OpenOptions::new().write(true).open(path).and_then(|file| {
            let have = file.metadata()?.len();
            file.set_len(have.saturating_sub(RESERVE_SLICE))?;
            Ok(have > 0)
        });
        shrunk.unwrap_or(false)
    }

    /// Makes the reserve whole again where there is room.
    pub fn fill_reserve(&self) {
        let path = self.dir.join("reserve");
        let fill = || {
            let file = OpenOptions::new().create(true).truncate(false).write(true).mode(0o600).open(&path)?;
            if file.metadata()?.len() < RESERVE {
                rustix::fs::fallocate(&file, rustix::fs::FallocateFlags::empty(), 0, RESERVE)?;
            }
            io::Result::Ok(())
        };
        if let Err(e) = fill() {
            tracing::warn!("{}: no reserve for detaching on a full filesystem: {e}", path.display());
        }
    }

    /// A VM's file; `None` if it was never mentioned.
    pub fn read_vm(&self, vm: VmId) -> Result<Option<VmFile>, CloudError> {
        let path = self.vm(vm);
        match fs::read(&path) {
            Ok(bytes) => serde_json::from_slice(&bytes).map(Some).map_err(|e| ambiguous(path.display(), e)),
            Err(e) if e.kind() == io::ErrorKind::NotFound => {
                self.still_ours()?;
                Ok(None)
            }
            Err(e) => Err(ambiguous(path.display(), e)),
        }
    }

    /// Makes a VM's file if there is none.
    pub fn mention_vm(&self, vm: VmId) -> Result<(), CloudError> {
        if self.read_vm(vm)?.is_some() {
            return Ok(());
        }
        let path = self.vm(vm);
        write_whole(&path, &json(&VmFile::default(), &path)?)
    }
}

/// Checks the bytes of a `meta.json`.
pub(super) fn parse(path: &Path, bytes: &[u8], id: VolumeId) -> Result<Meta, CloudError> {
    let meta: Meta = serde_json::from_slice(bytes).map_err(|e| ambiguous(path.display(), e))?;
    if meta.id != id {
        return Err(ambiguous(path.display(), format!("it is volume {}'s", meta.id)));
    }
    Ok(meta)
}

pub(super) fn json<T: Serialize>(value: &T, path: &Path) -> Result<Vec<u8>, CloudError> {
    let mut bytes = serde_json::to_vec_pretty(value)
        .map_err(|e| CloudError::Unreachable { words: format!("{}: {e}", path.display()) })?;
    bytes.push(b'\n');
    Ok(bytes)
}

/// Makes names in a directory durable.
pub(super) fn sync_dir(path: &Path) -> io::Result<()> {
    File::open(path)?.sync_all()
}

/// Replaces a file as a whole: an error other than `Ambiguous` means the old one is in place.
pub(super) fn write_whole(path: &Path, bytes: &[u8]) -> Result<(), CloudError> {
    let mut beside = path.as_os_str().to_owned();
    beside.push(".new");
    let beside = PathBuf::from(beside);
    let write = || {
        let mut file = OpenOptions::new().create(true).truncate(true).write(true).mode(0o600).open(&beside)?;
        file.write_all(bytes)?;
        file.sync_all()?;
        fs::rename(&beside, path)
    };
    write().map_err(|e| not_started(path.display(), &e))?;
    let parent = path.parent().unwrap_or(Path::new("/"));
    sync_dir(parent).map_err(|e| ambiguous(path.display(), e))
}
