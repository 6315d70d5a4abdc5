//! Limits: how long anybody waits (L3, L4, L5), what is left of the service when the machine has
//! no more to give (L6), and that a volume's bytes are nobody's business (S10, S11).

mod apart;
mod bytes;
mod killed;
mod replies;
mod scarce;

use std::fs;
use std::io::{self, Read};
use std::os::unix::fs::{FileTypeExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use super::common::Volfs;

/// The promise for every reply but a waiting command's (L3) is a second: what waits for a commit or for
/// `holders` may take nearly that until its EIO or ENODATA is on the way to the caller, who is a moment
/// later to run on a machine that runs other tests.
const REPLY: Duration = Duration::from_millis(1500);

/// What a reader may be told beside the value (contract, R1, R3).
const TOLD: [i32; 4] = [libc::ENODEV, libc::ENODATA, libc::ENOENT, libc::EHOSTUNREACH];

fn errno(error: &io::Error) -> i32 {
    error.raw_os_error().unwrap_or(-1)
}

/// How long each system call into the tree took.
#[derive(Default)]
struct Replies {
    took: Vec<(Duration, String)>,
    refused: usize,
}

impl Replies {
    /// One system call.
    fn time<T>(&mut self, what: &str, path: &Path, call: impl FnOnce() -> io::Result<T>) -> Option<T> {
        let began = Instant::now();
        let outcome = call();
        self.took.push((began.elapsed(), format!("{what} {}", path.display())));
        match outcome {
            Ok(value) => Some(value),
            Err(e) => {
                assert!(TOLD.contains(&errno(&e)), "{what} {}: {e}", path.display());
                self.refused += 1;
                None
            }
        }
    }

    /// Everything below a directory: listed, looked at, read.
    fn walk(&mut self, dir: &Path) {
        let Some(names) = self.time("list", dir, || fs::read_dir(dir)?.collect::<io::Result<Vec<_>>>()) else { return };
        for name in names {
            let path = name.path();
            let Some(meta) = self.time("lstat", &path, || fs::symlink_metadata(&path)) else { continue };
            let kind = meta.file_type();
            if kind.is_dir() {
                self.walk(&path);
            } else if kind.is_symlink() {
                self.time("readlink", &path, || fs::read_link(&path));
                self.time("stat", &path, || fs::metadata(&path));
            } else if !kind.is_block_device() {
                let open = || fs::OpenOptions::new().read(true).custom_flags(libc::O_NONBLOCK).open(&path);
                let Some(mut file) = self.time("open", &path, open) else { continue };
                self.time("read", &path, || file.read_to_end(&mut Vec::new()));
            }
        }
    }

    fn worst(&self) -> &(Duration, String) {
        self.took.iter().max_by_key(|(took, _)| *took).expect("replies")
    }

    /// Prints the figures and holds the worst against the promise. p99's 50 ms is a goal of idle
    /// machines: printed, not judged.
    fn judge(&mut self, suite: &str) {
        self.took.sort();
        let at = |share: usize| self.took[(self.took.len() - 1) * share / 100].0;
        let worst = self.worst();
        println!(
            "{suite}: {} replies ({} without a value), p50 {:?}, p99 {:?}, max {:?} ({})",
            self.took.len(),
            self.refused,
            at(50),
            at(99),
            worst.0,
            worst.1
        );
        assert!(worst.0 < REPLY, "{suite}: {:?} for {}", worst.0, worst.1);
    }
}

/// Walks the whole tree as often as that, while `what` is so.
fn walked(volfs: &Volfs, suite: &str, times: usize) {
    let mut replies = Replies::default();
    for _ in 0..times {
        replies.walk(&volfs.root());
    }
    assert!(replies.took.len() > 100 * times, "{suite}: {} replies are no whole tree", replies.took.len());
    replies.judge(suite);
}

/// The errno of one change, which waits for a commit at most.
#[track_caller]
fn change(what: &str, call: impl FnOnce() -> i32) -> i32 {
    let began = Instant::now();
    let told = call();
    let took = began.elapsed();
    assert!(took < REPLY, "{what} took {took:?}, errno {told}");
    told
}

fn mkdir(path: PathBuf) -> i32 {
    fs::create_dir(path).err().map_or(0, |e| errno(&e))
}

fn rmdir(path: PathBuf) -> i32 {
    fs::remove_dir(path).err().map_or(0, |e| errno(&e))
}

/// The four changes that are not commands: each must come to `want` (0, or any of these).
#[track_caller]
fn changes(volfs: &Volfs, when: &str, want: &[i32]) {
    let judge = |what: &str, told: i32| assert!(want.contains(&told), "{when}: {what}: errno {told}\n{}", volfs.log());
    let made = change("mkdir", || mkdir(volfs.path("jobs/passing")));
    judge("mkdir", made);
    judge("vm_name", change("vm_name", || volfs.write("jobs/j/vm_name", when)));
    judge("hold", change("hold", || volfs.write("jobs/j/hold", "0")));
    if made == 0 {
        judge("rmdir", change("rmdir", || rmdir(volfs.path("jobs/passing"))));
    }
}

fn health(volfs: &Volfs) -> String {
    volfs.read("health").unwrap().lines().next().unwrap_or_default().to_owned()
}

/// A file that holds whoever reaches a failpoint with its path. Bound behind the volfs, so that it
/// opens before the daemon is ended.
struct Gate(PathBuf);

impl Gate {
    fn shut(path: &Path) -> Self {
        fs::write(path, "").unwrap();
        Gate(path.to_owned())
    }
}

impl Drop for Gate {
    fn drop(&mut self) {
        let _ = fs::remove_file(&self.0);
    }
}
