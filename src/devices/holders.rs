//! Who has a device, and whether it carries the host.
//!
//! Limits of what the kernel shows (contract, C4): descriptors in flight between processes, those
//! held by io_uring or inside the kernel only, memory maps whose descriptor is closed, threads that
//! have descriptors or a mount namespace of their own, processes of a foreign pid namespace, and
//! namespaces without a process are not seen by the walk. `O_EXCL` finds every mount and every
//! exclusive holder among them, and then the row is `unnamed`.

use std::collections::HashSet;
use std::io;
use std::path::{Path, PathBuf};

use super::sysfs::Sysfs;
use super::walk::Walk;
use super::{DevicesError, OUR_TAG};
use crate::model::{DevNo, Disk, DiskIdentity, Holder, HolderKind};

/// Who has the device or, for a whole disk, one of its partitions.
pub(super) fn of(walk: &Walk, sysfs: &Sysfs, dev: DevNo) -> Result<Vec<Holder>, DevicesError> {
    let collect = || -> io::Result<Vec<Holder>> {
        let mut rows = Vec::new();
        // A device that has just gone may still be open somewhere.
        rows.extend(walk.by_dev.get(&dev).into_iter().flatten().cloned());
        for (number, dir) in sysfs.family(dev)? {
            rows.extend(walk.by_dev.get(&number).into_iter().flatten().cloned());
            for name in sysfs.holders(&dir)? {
                rows.push(Holder { kind: HolderKind::Holder, pid: None, name: with_label(sysfs, name) });
            }
            if let Ok(size) = std::fs::read_to_string(dir.join("size"))
                && let Ok(sectors) = size.trim_ascii().parse::<u64>()
            {
                rows.extend(walk.untold.iter().filter_map(|l| l.over(sectors.saturating_mul(512))));
            }
        }
        rows.sort();
        rows.dedup();
        Ok(rows)
    };
    collect().map_err(|e| DevicesError::Failed { what: format!("find who has {dev}"), words: e.to_string() })
}

/// As [`of`], without the processes that have it open for reading only.
pub(super) fn writers(walk: &Walk, sysfs: &Sysfs, dev: DevNo) -> Result<Vec<Holder>, DevicesError> {
    let mut rows = of(walk, sysfs, dev)?;
    let family = sysfs.family(dev);
    let family = family.map_err(|e| DevicesError::Failed { what: format!("find {dev}"), words: e.to_string() })?;
    let numbers: Vec<DevNo> = family.into_iter().map(|(number, _)| number).chain([dev]).collect();
    let writes = |pid| numbers.iter().any(|number| walk.writers.contains(&(*number, pid)));
    rows.retain(|row| row.kind != HolderKind::Open || row.pid.is_none_or(writes));
    Ok(rows)
}

/// `dm-3 (LVM volume vg-root)`: what it is, as its uuid's first word says, and the name that its
/// owner knows it by.
fn with_label(sysfs: &Sysfs, name: String) -> String {
    let dir = sysfs.disk_dir(&name);
    let read = |file: &str| std::fs::read_to_string(dir.join(file)).unwrap_or_default().trim_end().to_owned();
    if dir.join("md").is_dir() {
        return format!("{name} (MD array)");
    }
    let uuid = read("dm/uuid");
    let kind = match uuid.split('-').next() {
        Some("LVM") => "LVM volume ",
        Some("mpath") => "multipath map ",
        Some("CRYPT") => "crypt device ",
        _ => "",
    };
    match read("dm/name").as_str() {
        "" => name,
        label => format!("{name} ({kind}{label})"),
    }
}

/// Why a disk carries this host; see [`super::Devices::carries_host`].
///
/// A loop device of the loop provider is a volume, not a part of the host, whatever is mounted
/// from it (contract, Ownership: "loop that is not ours"): for it only the state directory counts.
pub(super) fn carries_host(
    walk: &Walk,
    sysfs: &Sysfs,
    disk: &Disk,
    state: &[PathBuf],
) -> Result<Option<String>, DevicesError> {
    let own_dirs = state_devices(state)?;
    let ours = matches!(&disk.identity, DiskIdentity::LoopTag(tag) if tag.starts_with(OUR_TAG));
    let search = || -> io::Result<Option<String>> {
        let mut todo = vec![disk.dev];
        let mut seen = HashSet::new();
        while let Some(dev) = todo.pop() {
            for (number, dir) in sysfs.family(dev)? {
                if !seen.insert(number) {
                    continue;
                }
                if let Some((_, path)) = own_dirs.iter().find(|(d, _)| *d == number) {
                    return Ok(Some(format!("{} carries volfs's own directory {}", disk.name, path.display())));
                }
                let rows = walk.by_dev.get(&number).into_iter().flatten();
                for row in rows.filter(|_| !ours) {
                    match row.kind {
                        HolderKind::Mount => {
                            return Ok(Some(format!("{} carries a filesystem mounted at {}", disk.name, row.name)));
                        }
                        HolderKind::Swap => {
                            return Ok(Some(format!("{} carries swap of this host ({})", disk.name, row.name)));
                        }
                        HolderKind::Holder => {
                            return Ok(Some(format!("{} carries a mounted filesystem ({})", disk.name, row.name)));
                        }
                        HolderKind::Loop | HolderKind::Open | HolderKind::Unnamed => {}
                    }
                }
                for name in sysfs.holders(&dir)? {
                    todo.extend(sysfs.dev_of_any(&name)?);
                }
                let above = |l: &&super::walk::LoopOver| l.backing == Some(number) || l.file_on == Some(number);
                todo.extend(walk.loops.iter().filter(|l| !l.ours).filter(above).map(|l| l.dev));
            }
        }
        Ok(None)
    };
    search()
        .map_err(|e| DevicesError::Failed { what: format!("find what {} carries", disk.name), words: e.to_string() })
}

fn state_devices(state: &[PathBuf]) -> Result<Vec<(DevNo, &Path)>, DevicesError> {
    let mut devices = Vec::new();
    for path in state {
        let stat = rustix::fs::stat(path)
            .map_err(|e| DevicesError::Failed { what: format!("look at {}", path.display()), words: e.to_string() })?;
        let dev = DevNo { major: rustix::fs::major(stat.st_dev), minor: rustix::fs::minor(stat.st_dev) };
        devices.push((dev, path.as_path()));
    }
    Ok(devices)
}
