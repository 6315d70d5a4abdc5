//! The highest operation number that a record in this directory ever committed, kept beside the
//! record: one whose own highest is lower is an older copy of what was here.
//!
//! Written after the commit and never before it, so a crash can leave it behind its record, never
//! ahead. It is not synced: a power cut may leave it behind as well, which is noticed by nobody.

use std::fs::{File, OpenOptions};
use std::io::{self, Read};
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

/// Its name in the state directory.
pub(super) const FILE: &str = "high-water";
/// A number and a newline in a fixed width: each write replaces the whole text in place.
const WIDTH: usize = 20;

/// The file, and what it says.
#[derive(Debug)]
pub(super) struct HighWater {
    path: PathBuf,
    file: Option<File>,
    mark: i64,
}

fn read(file: &mut File) -> io::Result<Option<i64>> {
    let mut text = String::new();
    file.take(WIDTH as u64 + 2).read_to_string(&mut text)?;
    Ok(text.trim_end().parse().ok().filter(|n| *n >= 0))
}

/// What the file in `dir` says; 0 where there is none, or none that can be read: it may be older
/// than a power cut, and a record is not refused for it.
pub(super) fn look(dir: &Path) -> i64 {
    let path = dir.join(FILE);
    match File::open(&path).and_then(|mut file| read(&mut file)) {
        Ok(Some(mark)) => mark,
        Err(e) if e.kind() == io::ErrorKind::NotFound => 0,
        Ok(None) => {
            tracing::warn!("{} holds no number: an older record here would not be noticed by it", path.display());
            0
        }
        Err(e) => {
            tracing::warn!("{}: {e}: an older record here would not be noticed by it", path.display());
            0
        }
    }
}

impl HighWater {
    /// Opens the file for the one writer, made if it is missing.
    pub(super) fn open(dir: &Path) -> Self {
        let (path, mark) = (dir.join(FILE), look(dir));
        let open = OpenOptions::new().write(true).create(true).truncate(false).mode(0o600).open(&path);
        let file = open.map_err(|e| tracing::warn!("{}: {e}", path.display())).ok();
        Self { path, file, mark }
    }

    /// What it says.
    pub(super) fn mark(&self) -> i64 {
        self.mark
    }

    /// Raises it to `to`; never lowers it.
    pub(super) fn raise(&mut self, to: i64) {
        if to <= self.mark {
            return;
        }
        let Some(file) = &self.file else { return };
        match file.write_all_at(format!("{to:0WIDTH$}\n").as_bytes(), 0) {
            Ok(()) => self.mark = to,
            // It is behind now, which harms nobody; the next commit tries again.
            Err(e) => tracing::warn!("{}: {e}", self.path.display()),
        }
    }

    /// Makes it durable: for what must be noticed after a power cut, too.
    pub(super) fn sync(&self) -> io::Result<()> {
        self.file.as_ref().map_or(Ok(()), File::sync_all)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn it_rises_and_never_falls() {
        let dir = tempfile::tempdir().unwrap();
        assert_eq!(look(dir.path()), 0);
        let mut high = HighWater::open(dir.path());
        for (to, is) in [(7, 7), (3, 7), (1_000_000_007, 1_000_000_007), (8, 1_000_000_007)] {
            high.raise(to);
            assert_eq!((high.mark(), look(dir.path())), (is, is));
        }
        assert_eq!(HighWater::open(dir.path()).mark(), 1_000_000_007);
    }

    #[test]
    fn what_is_no_number_refuses_nobody() {
        let dir = tempfile::tempdir().unwrap();
        for text in ["", "\0\0\0\0\0\0\0\0", "-5\n", "seven\n"] {
            std::fs::write(dir.path().join(FILE), text).unwrap();
            assert_eq!(look(dir.path()), 0, "{text:?}");
            let mut high = HighWater::open(dir.path());
            high.raise(9);
            assert_eq!(look(dir.path()), 9, "{text:?}");
        }
    }
}
