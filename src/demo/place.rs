//! The temporary place of the demo: everything below it is the demo's, and goes with it.

use std::fs::DirBuilder;
use std::os::fd::AsFd;
use std::os::unix::fs::DirBuilderExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Stdio};
use std::time::Duration;

use rustix::mount::{UnmountFlags, unmount};
use rustix::process::{Pid, PidfdFlags, Signal, kill_process, pidfd_open};

use crate::config::Problem;
use crate::{start, sys};

/// A directory of ours with a daemon in it. `Place::clear`, or dropping it, leaves nothing.
pub struct Place {
    dir: PathBuf,
    daemon: Option<Child>,
    cleared: bool,
}

impl Place {
    /// A new directory below TMPDIR, `/tmp` without one.
    pub fn make() -> Result<Self, Problem> {
        let temporary = std::env::temp_dir();
        let temporary = temporary.canonicalize().map_err(|e| Problem::with(temporary.display(), e))?;
        let dir = temporary.join(format!("volfs-demo-{}", std::process::id()));
        // Not recursive: a directory that exists is not ours.
        DirBuilder::new().mode(0o700).create(&dir).map_err(|e| Problem::with(dir.display(), e))?;
        Ok(Self { dir, daemon: None, cleared: false })
    }

    pub fn path(&self, name: &str) -> PathBuf {
        self.dir.join(name)
    }

    pub fn tree(&self) -> PathBuf {
        self.path("volfs")
    }

    pub fn daemon(&mut self, child: Child) {
        self.daemon = Some(child);
    }

    /// Ends the daemon as a user would, and requires that it ends well.
    pub fn end_daemon(&mut self) -> Result<(), Problem> {
        let Some(mut child) = self.daemon.take() else { return Ok(()) };
        let run = super::volfs()?
            .arg("unmount")
            .arg(self.tree())
            .arg("--config")
            .arg(self.path("config.toml"))
            .stdin(Stdio::null())
            .status();
        let ended = wait(&child, Duration::from_secs(6))?;
        if !ended {
            self.daemon = Some(child);
            return Err(Problem("the daemon did not end within 6 s of its unmount".into()));
        }
        let status = child.wait().map_err(|e| Problem::with("cannot wait for the daemon", e))?;
        match run {
            Ok(unmounted) if unmounted.success() && status.success() => Ok(()),
            Ok(unmounted) => Err(Problem(format!("volfs unmount ended with {unmounted}, the daemon with {status}"))),
            Err(e) => Err(Problem::with("cannot run volfs unmount", e)),
        }
    }

    /// Takes everything away. What had to be taken by force is an error, and so is what stays.
    pub fn clear(mut self) -> Result<(), Problem> {
        self.take_away()
    }

    fn take_away(&mut self) -> Result<(), Problem> {
        if std::mem::replace(&mut self.cleared, true) {
            return Ok(());
        }
        let mut found = Vec::new();
        let mut attempt = |outcome: Result<Vec<String>, Problem>| match outcome {
            Ok(left) => found.extend(left),
            Err(problem) => found.push(problem.to_string()),
        };
        // Filesystems on our disks first: they hold the devices.
        attempt(unmount_below(&self.dir, |m| m.fs_type != start::FS_TYPE));
        if let Some(mut child) = self.daemon.take() {
            attempt(kill(&mut child));
        }
        attempt(unmount_below(&self.dir, |_| true));
        attempt(clear_loops(&self.dir));
        if let Err(e) = std::fs::remove_dir_all(&self.dir) {
            attempt(Err(Problem::with(self.dir.display(), e)));
        }
        if found.is_empty() {
            Ok(())
        } else {
            Err(Problem(format!("left behind, and taken away now: {}", found.join("; "))))
        }
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        if let Err(problem) = self.take_away() {
            eprintln!("volfs demo: {problem}");
        }
    }
}

fn wait(child: &Child, most: Duration) -> Result<bool, Problem> {
    let process = pidfd_open(Pid::from_child(child), PidfdFlags::empty());
    start::gone(&process.map_err(|e| Problem::with("cannot wait for the daemon", e))?, most)
}

fn kill(child: &mut Child) -> Result<Vec<String>, Problem> {
    let wrong = |e: rustix::io::Errno| Problem::with("cannot end the daemon", e);
    // Not reaped yet, so the pid is still this child's.
    kill_process(Pid::from_child(child), Signal::TERM).map_err(wrong)?;
    if !wait(child, Duration::from_secs(6))? {
        kill_process(Pid::from_child(child), Signal::KILL).map_err(wrong)?;
    }
    child.wait().map_err(|e| Problem::with("cannot wait for the daemon", e))?;
    Ok(vec!["the daemon".into()])
}

fn unmount_below(dir: &Path, which: impl Fn(&start::Mounted) -> bool) -> Result<Vec<String>, Problem> {
    let mut found = Vec::new();
    // The last mounted first: it may lie on an earlier one.
    for m in start::mounts()?.into_iter().rev().filter(|m| m.at.starts_with(dir) && which(m)) {
        unmount(m.at.as_path(), UnmountFlags::DETACH | UnmountFlags::NOFOLLOW)
            .map_err(|e| Problem::with(m.at.display(), e))?;
        found.push(format!("a mount at {}", m.at.display()));
    }
    Ok(found)
}

/// Unbinds loop devices whose file lies in `dir`, by the kernel's own word.
fn clear_loops(dir: &Path) -> Result<Vec<String>, Problem> {
    let mut found = Vec::new();
    for (name, file) in loops_below(dir)? {
        let node = Path::new("/dev").join(&name);
        let device = std::fs::File::open(&node).map_err(|e| Problem::with(node.display(), e))?;
        // The node is open now and keeps its file; it may have become another's before that.
        if backing(&name).as_ref() == Some(&file) {
            sys::loop_clear(device.as_fd()).map_err(|e| Problem::with(node.display(), e))?;
            found.push(node.display().to_string());
        }
    }
    Ok(found)
}

fn loops_below(dir: &Path) -> Result<Vec<(String, PathBuf)>, Problem> {
    const BLOCK: &str = "/sys/block";
    let entries = std::fs::read_dir(BLOCK).map_err(|e| Problem::with(BLOCK, e))?;
    let names = entries.flatten().filter_map(|e| e.file_name().into_string().ok()).filter(|n| n.starts_with("loop"));
    Ok(names.filter_map(|n| Some((n.clone(), backing(&n)?))).filter(|(_, file)| file.starts_with(dir)).collect())
}

fn backing(name: &str) -> Option<PathBuf> {
    let path = Path::new("/sys/block").join(name).join("loop/backing_file");
    // An unbound device has no such file.
    Some(PathBuf::from(std::fs::read_to_string(path).ok()?.trim_end_matches('\n')))
}

#[cfg(test)]
mod tests {
    use std::process::Command;

    use super::*;

    fn sh(command: &str) -> String {
        let out = Command::new("sh").args(["-c", command]).output().unwrap();
        assert!(out.status.success(), "{command}: {}", String::from_utf8_lossy(&out.stderr));
        String::from_utf8_lossy(&out.stdout).trim().to_owned()
    }

    /// A place that stands beside other tests' of this process.
    fn place() -> Place {
        let dir = tempfile::Builder::new().prefix("volfs-demo-test-").tempdir().unwrap().keep();
        Place { dir: dir.canonicalize().unwrap(), daemon: None, cleared: false }
    }

    #[test]
    fn mounts_loop_devices_and_processes_that_were_left_are_taken_away_and_reported() {
        let mut place = place();
        let dir = place.dir.clone();
        let d = dir.display();
        sh(&format!("truncate -s 8M {d}/file; mkfs.ext4 -q {d}/file; mkdir {d}/mnt"));
        let device = sh(&format!("losetup --find --show {d}/file"));
        sh(&format!("mount {device} {d}/mnt"));
        place.daemon(Command::new("sleep").arg("1000").stdin(Stdio::null()).spawn().unwrap());
        let words = place.clear().unwrap_err().to_string();
        for expected in [device.as_str(), "/mnt", "the daemon"] {
            assert!(words.contains(expected), "{words}");
        }
        assert!(!dir.exists());
        assert!(loops_below(&dir).unwrap().is_empty());
        assert!(!start::mounts().unwrap().iter().any(|m| m.at.starts_with(&dir)));
    }

    #[test]
    fn a_place_that_holds_nothing_goes_without_a_word() {
        let place = place();
        let dir = place.dir.clone();
        place.clear().unwrap();
        assert!(!dir.exists());
    }
}
