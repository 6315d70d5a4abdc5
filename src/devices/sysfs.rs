//! Small readers over a sysfs tree. They ask the kernel's memory only, never a device.

use std::io;
use std::path::{Path, PathBuf};

use crate::model::DevNo;

/// A sysfs tree: `/sys`, or a recorded one in tests.
#[derive(Debug, Clone)]
pub(super) struct Sysfs {
    root: PathBuf,
}

/// Whether an error says "no such thing here": not there, or its disk has just gone.
pub(super) fn is_gone(error: &io::Error) -> bool {
    matches!(error.raw_os_error(), Some(libc::ENOENT | libc::ENODEV | libc::ENXIO | libc::ENOTDIR))
}

/// `None` instead of the error for what is not there.
pub(super) fn present<T>(result: io::Result<T>) -> io::Result<Option<T>> {
    match result {
        Ok(value) => Ok(Some(value)),
        Err(e) if is_gone(&e) => Ok(None),
        Err(e) => Err(e),
    }
}

/// The names in a directory; a directory that is not there is empty.
pub(super) fn names(dir: &Path) -> io::Result<Vec<String>> {
    let Some(entries) = present(std::fs::read_dir(dir))? else { return Ok(Vec::new()) };
    let mut names = Vec::new();
    for entry in entries {
        let Some(entry) = present(entry)? else { break };
        // Kernel names are ASCII; one that is not text names nothing that we could serve.
        if let Ok(name) = entry.file_name().into_string() {
            names.push(name);
        }
    }
    names.sort_unstable();
    Ok(names)
}

fn bad(path: &Path, text: &str) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, format!("{} says {text:?}", path.display()))
}

/// `M:m`.
pub(super) fn parse_dev(text: &str) -> Option<DevNo> {
    let (major, minor) = text.trim_ascii().split_once(':')?;
    Some(DevNo { major: major.parse().ok()?, minor: minor.parse().ok()? })
}

fn number(path: &Path) -> io::Result<u64> {
    let text = std::fs::read_to_string(path)?;
    text.trim_ascii().parse().map_err(|_| bad(path, &text))
}

impl Sysfs {
    pub(super) fn new(root: PathBuf) -> Self {
        Sysfs { root }
    }

    pub(super) fn root(&self) -> &Path {
        &self.root
    }

    /// `/sys/block/NAME`.
    pub(super) fn disk_dir(&self, name: &str) -> PathBuf {
        self.root.join("block").join(name)
    }

    /// Every whole disk's name.
    pub(super) fn disk_names(&self) -> io::Result<Vec<String>> {
        names(&self.root.join("block"))
    }

    /// The disk's number now.
    pub(super) fn dev(&self, name: &str) -> io::Result<DevNo> {
        dev_in(&self.disk_dir(name))
    }

    /// Bytes; the attribute counts in units of 512, whatever the block size.
    pub(super) fn size(&self, name: &str) -> io::Result<u64> {
        let path = self.disk_dir(name).join("size");
        number(&path)?.checked_mul(512).ok_or_else(|| bad(&path, "more than fits"))
    }

    /// The disk's sequence number; `None` for a kernel that has none (before 5.15).
    pub(super) fn diskseq(&self, name: &str) -> io::Result<Option<u64>> {
        let dir = self.disk_dir(name);
        match number(&dir.join("diskseq")) {
            Ok(n) => Ok(Some(n)),
            // Not there on a disk that is: an old kernel. Not there with the disk gone: gone.
            Err(e) if e.kind() == io::ErrorKind::NotFound => std::fs::symlink_metadata(dir.join("dev")).map(|_| None),
            Err(e) => Err(e),
        }
    }

    /// Whether this loop device has a file bound.
    pub(super) fn loop_bound(&self, name: &str) -> io::Result<bool> {
        Ok(present(std::fs::symlink_metadata(self.disk_dir(name).join("loop")))?.is_some())
    }

    /// Whether the kernel hides the disk (a path of an NVMe multipath disk): it has no node.
    pub(super) fn hidden(&self, name: &str) -> io::Result<bool> {
        Ok(present(number(&self.disk_dir(name).join("hidden")))?.is_some_and(|n| n != 0))
    }

    /// The numbers of the device and, for a whole disk, of its partitions, each with its sysfs
    /// directory. Empty if the device is gone.
    pub(super) fn family(&self, dev: DevNo) -> io::Result<Vec<(DevNo, PathBuf)>> {
        let dir = self.root.join("dev/block").join(dev.to_string());
        if present(std::fs::metadata(&dir))?.is_none() {
            return Ok(Vec::new());
        }
        let mut family = vec![(dev, dir.clone())];
        for name in names(&dir)? {
            let part = dir.join(&name);
            if present(std::fs::symlink_metadata(part.join("partition")))?.is_some()
                && let Some(number) = present(dev_in(&part))?
            {
                family.push((number, part));
            }
        }
        Ok(family)
    }

    /// The devices built on the one whose directory this is (dm, md, bcache …), by kernel name.
    pub(super) fn holders(&self, dir: &Path) -> io::Result<Vec<String>> {
        names(&dir.join("holders"))
    }

    /// The number of a device (disk or partition) by kernel name.
    pub(super) fn dev_of_any(&self, name: &str) -> io::Result<Option<DevNo>> {
        present(dev_in(&self.root.join("class/block").join(name)))
    }
}

fn dev_in(dir: &Path) -> io::Result<DevNo> {
    let path = dir.join("dev");
    let text = std::fs::read_to_string(&path)?;
    parse_dev(&text).ok_or_else(|| bad(&path, &text))
}
