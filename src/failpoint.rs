//! Named points at which a test build can be killed, held, or made to fail.
//!
//! `VOLFS_FAILPOINTS="NAME=ACTION[;NAME=ACTION…]"`; actions are `kill` (SIGKILL to ourselves),
//! `kill:PATH` (the same once PATH exists, at the hit whose number from then on it holds; empty: the
//! first), `once:PATH` (SIGKILL once PATH exists, which is removed before), `panic`, `fail` ([`hit`] answers true), `fail:PATH` (the same while PATH exists) and
//! `wait:PATH` (stays while PATH exists). `VOLFS_STATUS_EDGES=FILE` has each change of a volume's
//! status appended to FILE, so that every suite can hold them against the documented graph. Compiled
//! to nothing in release builds without the feature `failpoints`.

#[cfg(any(debug_assertions, feature = "failpoints"))]
mod live {
    use std::collections::HashMap;
    use std::fmt::Display;
    use std::fs::File;
    use std::io::Write;
    use std::path::{Path, PathBuf};
    use std::sync::OnceLock;
    use std::sync::atomic::{AtomicU64, Ordering};
    use std::time::Duration;

    enum What {
        Kill,
        KillOnce(PathBuf, AtomicU64),
        KillAndForget(PathBuf),
        Panic,
        Fail,
        FailWhile(PathBuf),
        Wait(PathBuf),
    }

    static POINTS: OnceLock<HashMap<String, What>> = OnceLock::new();

    fn find(name: &str) -> Option<&'static What> {
        let points = POINTS.get_or_init(|| {
            let text = std::env::var("VOLFS_FAILPOINTS").unwrap_or_default();
            let mut points = HashMap::new();
            for (name, what) in text.split(';').filter_map(|p| p.split_once('=')) {
                let what = match what {
                    "kill" => What::Kill,
                    "panic" => What::Panic,
                    "fail" => What::Fail,
                    other => match other.split_once(':') {
                        Some(("wait", path)) => What::Wait(path.into()),
                        Some(("fail", path)) => What::FailWhile(path.into()),
                        Some(("once", path)) => What::KillAndForget(path.into()),
                        Some(("kill", path)) => What::KillOnce(path.into(), AtomicU64::new(0)),
                        _ => panic!("VOLFS_FAILPOINTS: unknown action {other}"),
                    },
                };
                points.insert(name.to_owned(), what);
            }
            points
        });
        if points.is_empty() { None } else { points.get(name) }
    }

    fn there(path: &Path) -> bool {
        path.symlink_metadata().is_ok()
    }

    const LOOK_EVERY: Duration = Duration::from_millis(2);

    fn die() -> ! {
        // A process can always signal itself; were it refused, abort is as sudden.
        let _ = rustix::process::kill_process(rustix::process::getpid(), rustix::process::Signal::KILL);
        std::process::abort()
    }

    fn act(name: &str, what: &What) -> bool {
        match what {
            What::Kill => die(),
            What::KillOnce(path, hits) => {
                let Ok(text) = std::fs::read_to_string(path) else { return false };
                if hits.fetch_add(1, Ordering::SeqCst) + 1 == text.trim().parse().unwrap_or(1) {
                    die()
                }
                false
            }
            What::KillAndForget(path) => {
                // Whoever removes it is the one.
                if std::fs::remove_file(path).is_ok() {
                    die()
                }
                false
            }
            What::Panic => panic!("failpoint {name}"),
            What::Fail => true,
            What::FailWhile(path) => there(path),
            What::Wait(_) => false,
        }
    }

    static EDGES: OnceLock<Option<File>> = OnceLock::new();

    /// Opens what is recorded into: before descriptors or memory can be short.
    pub fn begin() {
        EDGES.get_or_init(|| {
            let path = std::env::var_os("VOLFS_STATUS_EDGES").filter(|path| !path.is_empty())?;
            let opened = File::options().create(true).append(true).open(&path);
            // The line of a daemon that was killed may be torn where its page ended: it ends here.
            let opened = opened.and_then(|mut file| file.write(b"\n").map(|_| file));
            Some(opened.unwrap_or_else(|error| panic!("VOLFS_STATUS_EDGES: {}: {error}", path.display())))
        });
    }

    /// A volume's status is another one.
    pub fn edge(volume: &dyn Display, from: &dyn Display, to: &dyn Display) {
        let Some(Some(file)) = EDGES.get() else { return };
        // One write(2) of the whole line, so that a SIGKILL leaves it whole or out. One that fails (a full
        // disk is tested, too) leaves it out, and the daemon as it is.
        let _ = (&mut &*file).write(format!("{volume} {from} {to}\n").as_bytes());
    }

    /// Acts on this thread; true when the caller is to fail.
    pub fn hit(name: &str) -> bool {
        let Some(what) = find(name) else { return false };
        if let What::Wait(path) = what {
            while there(path) {
                std::thread::sleep(LOOK_EVERY);
            }
        }
        act(name, what)
    }

    /// As [`hit`], for async code: waiting holds no thread.
    pub async fn reach(name: &str) -> bool {
        let Some(what) = find(name) else { return false };
        if let What::Wait(path) = what {
            while there(path) {
                tokio::time::sleep(LOOK_EVERY).await;
            }
        }
        act(name, what)
    }
}

#[cfg(not(any(debug_assertions, feature = "failpoints")))]
mod live {
    /// Nothing, in this build.
    #[inline(always)]
    pub fn begin() {}

    /// Nothing, in this build.
    #[inline(always)]
    pub fn edge(_volume: &dyn std::fmt::Display, _from: &dyn std::fmt::Display, _to: &dyn std::fmt::Display) {}

    /// Nothing, in this build.
    #[inline(always)]
    pub fn hit(_name: &str) -> bool {
        false
    }

    /// Nothing, in this build.
    #[inline(always)]
    pub async fn reach(_name: &str) -> bool {
        false
    }
}

pub use live::{begin, edge, hit, reach};
