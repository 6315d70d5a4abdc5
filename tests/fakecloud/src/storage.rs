//! The primary and secondary storage: one sparse file a volume, one a snapshot.

use std::fs::{self, OpenOptions};
use std::io;
use std::path::{Path, PathBuf};

/// Files of volumes and snapshots below one directory.
#[derive(Debug)]
pub(crate) struct Storage {
    dir: PathBuf,
    /// Removes the directory in the end, if it was made for this cloud.
    _own: Option<tempfile::TempDir>,
}

impl Storage {
    /// In `dir`, or in a temporary directory that goes with the cloud.
    pub fn new(dir: Option<PathBuf>) -> io::Result<Self> {
        let own = match dir {
            Some(_) => None,
            None => Some(tempfile::Builder::new().prefix("fakecloud-").tempdir()?),
        };
        let dir = match (&own, dir) {
            (Some(own), _) => own.path().to_owned(),
            (None, Some(dir)) => dir,
            (None, None) => return Err(io::Error::other("no directory for the storage")),
        };
        fs::create_dir_all(dir.join("volumes"))?;
        fs::create_dir_all(dir.join("snapshots"))?;
        Ok(Storage { dir, _own: own })
    }

    /// Where a volume's bytes are.
    pub fn volume(&self, id: &str) -> PathBuf {
        self.dir.join("volumes").join(id)
    }

    /// Where a snapshot's bytes are.
    pub fn snapshot(&self, id: &str) -> PathBuf {
        self.dir.join("snapshots").join(id)
    }

    /// Makes a volume's file, all zero whatever had that name before; `size` in bytes.
    pub fn make(&self, id: &str, size: u64) -> io::Result<()> {
        let file = OpenOptions::new().write(true).create(true).truncate(true).open(self.volume(id))?;
        file.set_len(size)
    }

    /// Changes a volume's size; `size` in bytes.
    pub fn resize(&self, id: &str, size: u64) -> io::Result<()> {
        OpenOptions::new().write(true).open(self.volume(id))?.set_len(size)
    }

    /// Copies a volume into a snapshot.
    pub fn take(&self, volume: &str, snapshot: &str) -> io::Result<()> {
        copy(&self.volume(volume), &self.snapshot(snapshot))
    }

    /// Copies a snapshot back into its volume, or into a new one.
    pub fn put_back(&self, snapshot: &str, volume: &str) -> io::Result<()> {
        copy(&self.snapshot(snapshot), &self.volume(volume))
    }

    /// Removes a volume's file; one that never had any is no error.
    pub fn remove(&self, volume: &str) -> io::Result<()> {
        gone(fs::remove_file(self.volume(volume)))
    }

    /// Removes a snapshot's file.
    pub fn remove_snapshot(&self, snapshot: &str) -> io::Result<()> {
        gone(fs::remove_file(self.snapshot(snapshot)))
    }
}

fn gone(result: io::Result<()>) -> io::Result<()> {
    match result {
        Err(e) if e.kind() == io::ErrorKind::NotFound => Ok(()),
        other => other,
    }
}

/// Copies what is written and leaves holes holes. Pages that a loop device has in flight over the
/// source are in its file's cache already, or not yet flushed by its owner: as in a crash.
fn copy(from: &Path, to: &Path) -> io::Result<()> {
    use rustix::fs::{SeekFrom, seek};
    use std::os::unix::fs::FileExt;
    let source = fs::File::open(from)?;
    let size = source.metadata()?.len();
    let target = OpenOptions::new().write(true).create(true).truncate(false).open(to)?;
    // Not truncated by opening: the target may be under a loop device. Holes of it are made again.
    target.set_len(0)?;
    target.set_len(size)?;
    let mut at = 0;
    let mut buffer = vec![0; 1 << 20];
    while at < size {
        let data = match seek(&source, SeekFrom::Data(at)) {
            Ok(data) => data,
            Err(rustix::io::Errno::NXIO) => break,
            Err(e) => return Err(e.into()),
        };
        let end = seek(&source, SeekFrom::Hole(data))?;
        at = data;
        while at < end {
            let most = usize::try_from((end - at).min(1 << 20)).unwrap_or(1 << 20);
            let n = source.read_at(&mut buffer[..most], at)?;
            if n == 0 {
                return Err(io::ErrorKind::UnexpectedEof.into());
            }
            target.write_all_at(&buffer[..n], at)?;
            at += n as u64;
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::{FileExt, MetadataExt};

    #[test]
    fn a_snapshot_holds_the_bytes_and_the_holes_of_its_moment() {
        let storage = Storage::new(None).unwrap();
        storage.make("v", 1 << 30).unwrap();
        let file = OpenOptions::new().write(true).open(storage.volume("v")).unwrap();
        file.write_all_at(b"before", 700 << 20).unwrap();
        storage.take("v", "s").unwrap();
        file.write_all_at(b"after!", 700 << 20).unwrap();
        storage.put_back("s", "v").unwrap();
        let mut found = [0; 6];
        fs::File::open(storage.volume("v")).unwrap().read_exact_at(&mut found, 700 << 20).unwrap();
        assert_eq!(&found, b"before");
        let copy = fs::metadata(storage.snapshot("s")).unwrap();
        assert_eq!(copy.len(), 1 << 30);
        assert!(copy.blocks() * 512 < 1 << 24, "{} blocks", copy.blocks());
    }

    #[test]
    fn storage_used_again_is_zero() {
        let storage = Storage::new(None).unwrap();
        storage.make("v", 4096).unwrap();
        fs::write(storage.volume("v"), [7; 4096]).unwrap();
        storage.make("v", 4096).unwrap();
        assert!(fs::read(storage.volume("v")).unwrap().iter().all(|b| *b == 0));
    }
}
