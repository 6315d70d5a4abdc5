//! `volfs mount` and `volfs unmount`: what happens around a daemon, before and after it.

use std::fs::{File, OpenOptions};
use std::io::{self, BufRead, BufReader, IsTerminal, Write};
use std::os::fd::OwnedFd;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::mount::{UnmountFlags, unmount as umount2};
use rustix::process::{Pid, PidfdFlags, Signal, pidfd_open, pidfd_send_signal};

use crate::config::{Config, DEFAULT_BACKGROUND_LOG, Problem};
use crate::daemon::Daemon;
use crate::handover::Handover;
use crate::keeper::{self, ended};

/// The type of our mounts in mountinfo.
pub const FS_TYPE: &str = "fuse.volfs";

const READY: &str = "ready";

/// Fails with a sentence unless we are root.
pub fn need_root() -> Result<(), Problem> {
    if rustix::process::geteuid().is_root() {
        return Ok(());
    }
    Err(Problem("this needs root: it mounts a filesystem and attaches block devices".into()))
}

/// Runs a keeper, and below it the daemon that serves the tree, until a signal, or until the mount is
/// taken away. `answer` as for [`mount`].
pub fn keep(config: &Config, answer: bool) -> Result<(), Problem> {
    let kept = need_root().and_then(|()| {
        prepare(config, answer)?;
        keeper::run(own_program()?, answer)
    });
    if let (Err(problem), true) = (&kept, answer) {
        // Nobody listens once the tree has answered.
        let _ = writeln!(io::stdout(), "{}", problem.to_string().replace('\n', "; "));
    }
    kept
}

/// The daemon that a keeper has started.
pub fn kept(config: &Config) -> Result<(), Problem> {
    keeper::hear_signals()?;
    let (handover, held) = Handover::from_keeper()?;
    // Standard output is the keeper's; its log is ours.
    log_to(config.log_file.as_deref(), &config.log)?;
    Daemon::start(config, handover, held)?.run_until_signal()
}

fn prepare(config: &Config, answer: bool) -> Result<(), Problem> {
    if answer {
        leave_terminal()?;
    }
    log_to(config.log_file.as_deref().filter(|_| !answer), &config.log)
}

/// Serves the tree until a signal, or until the mount is taken away; nobody follows when it dies but
/// a service manager. With `answer` standard output belongs to the process that started us with
/// [`spawn`], and is told when the tree answers.
pub fn mount(config: &Config, answer: bool) -> Result<(), Problem> {
    let outcome = need_root().and_then(|()| {
        prepare(config, answer)?;
        let (handover, held) = Handover::from_manager()?;
        Daemon::start(config, handover, held)
    });
    if !answer {
        return outcome?.run_until_signal();
    }
    let line = match &outcome {
        Ok(_) => READY.to_owned(),
        Err(problem) => problem.to_string().replace('\n', "; "),
    };
    let told = writeln!(io::stdout(), "{line}").and_then(|()| io::stdout().flush());
    let daemon = outcome?;
    if told.is_err() {
        // Whoever started us was interrupted and believes that nothing is mounted.
        daemon.stop();
        return Err(Problem("nobody waited for the tree, it is unmounted again".into()));
    }
    daemon.run_until_signal()
}

/// Starts a daemon in the background and returns when its tree answers; its sentence otherwise.
pub fn background(config: &Config) -> Result<(), Problem> {
    need_root()?;
    let log = config.log_file.clone().unwrap_or_else(|| PathBuf::from(DEFAULT_BACKGROUND_LOG));
    let file = open_log(&log)?;
    let mut command = Command::new(own_program()?);
    command.args(std::env::args_os().skip(1)).stderr(file);
    match spawn(command) {
        Ok(_child) => Ok(()),
        Err(problem) => Err(Problem(format!("{problem} (log: {})", log.display()))),
    }
}

/// This very program, to start it again.
pub fn own_program() -> Result<PathBuf, Problem> {
    std::env::current_exe().map_err(|e| Problem::with("cannot find the volfs program itself", e))
}

/// Runs a complete `volfs mount …` command line in a session of its own, and waits until its tree
/// answers. The error is the daemon's sentence; the process is gone then.
pub fn spawn(mut command: Command) -> Result<Child, Problem> {
    command.arg("--background-child").stdin(Stdio::null()).stdout(Stdio::piped());
    let mut child = command.spawn().map_err(|e| Problem::with("cannot start the daemon", e))?;
    let mut line = String::new();
    let read = match child.stdout.take() {
        Some(out) => BufReader::new(out).read_line(&mut line),
        None => Ok(0),
    };
    let words = line.trim();
    if words == READY {
        return Ok(child);
    }
    if let Err(e) = read {
        return Err(Problem::with("cannot hear from the daemon", e));
    }
    let status = child.wait().map_err(|e| Problem::with("cannot wait for the daemon", e))?;
    match words {
        "" => Err(Problem(format!("the daemon {} before its tree answered", ended(status)))),
        words => Err(Problem(words.to_owned())),
    }
}

fn leave_terminal() -> Result<(), Problem> {
    rustix::process::setsid().map_err(|e| Problem::with("cannot leave the terminal's session", e))?;
    // A working directory keeps its filesystem busy.
    std::env::set_current_dir("/").map_err(|e| Problem::with("cannot go to /", e))
}

fn open_log(path: &Path) -> Result<File, Problem> {
    let open = OpenOptions::new().append(true).create(true).mode(0o640).open(path);
    open.map_err(|e| Problem::with(format_args!("cannot log to {}", path.display()), e))
}

fn log_to(path: Option<&Path>, filter: &str) -> Result<(), Problem> {
    let filter = tracing_subscriber::EnvFilter::try_new(filter).map_err(|e| Problem::with("log filter", e))?;
    let builder = tracing_subscriber::fmt().with_env_filter(filter);
    let set = match path {
        Some(path) => builder.with_ansi(false).with_writer(Arc::new(open_log(path)?)).try_init(),
        None => builder.with_ansi(io::stderr().is_terminal()).with_writer(io::stderr).try_init(),
    };
    set.map_err(|e| Problem::with("cannot set up logging", e))
}

/// One line of mountinfo.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Mounted {
    /// Minor of the device number: for FUSE the connection's number.
    pub minor: u32,
    /// Where.
    pub at: PathBuf,
    /// `fuse.volfs`, `ext4`, …
    pub fs_type: String,
}

/// What is mounted in our namespace, in the kernel's order: of two at one place the last is on top.
pub fn mounts() -> Result<Vec<Mounted>, Problem> {
    const PATH: &str = "/proc/self/mountinfo";
    let text = std::fs::read(PATH).map_err(|e| Problem::with(PATH, e))?;
    Ok(text.split(|b| *b == b'\n').filter_map(mounted).collect())
}

fn mounted(line: &[u8]) -> Option<Mounted> {
    use std::os::unix::ffi::OsStringExt;
    let fields: Vec<&[u8]> = line.split(|b| *b == b' ').collect();
    let dash = fields.iter().skip(6).position(|f| *f == b"-")? + 6;
    let (_, minor) = std::str::from_utf8(fields[2]).ok()?.split_once(':')?;
    Some(Mounted {
        minor: minor.parse().ok()?,
        at: std::ffi::OsString::from_vec(unescape(fields[4])).into(),
        fs_type: String::from_utf8_lossy(fields.get(dash + 1)?).into_owned(),
    })
}

/// Undoes the kernel's `\040`.
fn unescape(field: &[u8]) -> Vec<u8> {
    let mut out = Vec::with_capacity(field.len());
    let mut rest = field;
    while let [first, tail @ ..] = rest {
        let octal = tail.get(..3).filter(|d| *first == b'\\' && d.iter().all(|b| (b'0'..=b'7').contains(b)));
        match octal {
            Some(d) => {
                let value = d.iter().fold(0u32, |n, b| n * 8 + u32::from(b - b'0'));
                out.push(u8::try_from(value).unwrap_or(b'?'));
                rest = &tail[3..];
            }
            None => {
                out.push(*first);
                rest = tail;
            }
        }
    }
    out
}

/// Takes our mount away, live or dead, and waits for the daemon behind it to end. Other mounts are
/// left alone.
pub fn unmount(config: &Config) -> Result<(), Problem> {
    need_root()?;
    let at = &config.mountpoint;
    let top = mounts()?.into_iter().rfind(|m| m.at == *at);
    let Some(top) = top else {
        return Err(Problem(format!("nothing is mounted at {}", at.display())));
    };
    if top.fs_type != FS_TYPE {
        return Err(Problem(format!("{} is a mount of type {}, not volfs: left alone", at.display(), top.fs_type)));
    }
    // Found before the unmount: afterwards the connection's number may be another's.
    let daemons = daemons(top.minor)?;
    umount2(at.as_path(), UnmountFlags::DETACH | UnmountFlags::NOFOLLOW)
        .map_err(|e| Problem::with(format_args!("cannot unmount {}", at.display()), e))?;
    for (pid, fd) in daemons {
        // A daemon sees that its mount is gone; one that somebody's working directory below it
        // keeps alive is asked.
        let process = Path::new("/proc").join(pid.to_string());
        // A process just forked has its parent's descriptors until its exec: it is no daemon.
        if gone(&fd, Duration::from_secs(2))? || !holds(&process, top.minor) {
            continue;
        }
        match pidfd_send_signal(&fd, Signal::TERM) {
            Ok(()) | Err(rustix::io::Errno::SRCH) => {}
            Err(e) => return Err(Problem::with(format_args!("cannot signal the daemon, pid {pid}"), e)),
        }
        if !gone(&fd, Duration::from_secs(8))? {
            return Err(Problem(format!("{} is unmounted, but its daemon, pid {pid}, has not ended", at.display())));
        }
    }
    Ok(())
}

/// Waits for the process behind a pidfd to end; false if it has not after `most`.
pub fn gone(process: &OwnedFd, most: Duration) -> Result<bool, Problem> {
    let until = Instant::now() + most;
    loop {
        let left = until.saturating_duration_since(Instant::now());
        let left =
            Timespec { tv_sec: i64::try_from(left.as_secs()).unwrap_or(i64::MAX), tv_nsec: left.subsec_nanos().into() };
        match poll(&mut [PollFd::new(process, PollFlags::IN)], Some(&left)) {
            Ok(ready) => return Ok(ready > 0),
            Err(rustix::io::Errno::INTR) => {}
            Err(e) => return Err(Problem::with("cannot wait for a process", e)),
        }
    }
}

/// The processes that hold the FUSE connection of that number open. Kernels that do not tell in
/// fdinfo (6.1 does not) yield none.
pub fn daemons(connection: u32) -> Result<Vec<(i32, OwnedFd)>, Problem> {
    let mut found = Vec::new();
    let entries = std::fs::read_dir("/proc").map_err(|e| Problem::with("/proc", e))?;
    for entry in entries {
        let entry = entry.map_err(|e| Problem::with("/proc", e))?;
        let Some(pid) = entry.file_name().to_str().and_then(|n| n.parse::<i32>().ok()).and_then(Pid::from_raw) else {
            continue;
        };
        // The descriptor first: a pid that is reused after it would be noticed as ended. A process
        // that ends while we look is none of those we look for.
        let Ok(process) = pidfd_open(pid, PidfdFlags::empty()) else { continue };
        if holds(&entry.path(), connection) {
            found.push((pid.as_raw_nonzero().get(), process));
        }
    }
    Ok(found)
}

fn holds(process: &Path, connection: u32) -> bool {
    let Ok(fds) = std::fs::read_dir(process.join("fd")) else { return false };
    fds.flatten().any(|fd| {
        std::fs::read_link(fd.path()).is_ok_and(|to| to == Path::new("/dev/fuse"))
            && std::fs::read_to_string(process.join("fdinfo").join(fd.file_name()))
                .is_ok_and(|info| connection_of(&info) == Some(connection))
    })
}

fn connection_of(fdinfo: &str) -> Option<u32> {
    fdinfo.lines().find_map(|l| l.strip_prefix("fuse_connection:"))?.trim().parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_mountinfo_line_is_read_with_its_escapes_and_optional_fields() {
        let m = mounted(b"42 27 0:39 / /tmp/a\\040b rw,relatime shared:1 master:2 - fuse.volfs volfs rw").unwrap();
        assert_eq!(m, Mounted { minor: 39, at: "/tmp/a b".into(), fs_type: "fuse.volfs".into() });
        let m = mounted(b"42 27 254:1 / /x rw - ext4 /dev/vda rw").unwrap();
        assert_eq!((m.minor, m.fs_type.as_str()), (1, "ext4"));
        assert!(mounted(b"").is_none() && mounted(b"1 2 3").is_none());
        assert_eq!(unescape(b"a\\134b\\9\\"), b"a\\b\\9\\");
    }

    #[test]
    fn our_own_mounts_are_readable() {
        assert!(mounts().unwrap().iter().any(|m| m.at == Path::new("/")));
    }

    #[test]
    fn a_connection_is_found_in_fdinfo() {
        assert_eq!(connection_of("pos:\t0\nfuse_connection:\t39\n"), Some(39));
        assert_eq!(connection_of("pos:\t0\nino:\t90\n"), None);
    }

    #[test]
    fn a_child_that_says_ready_is_kept_and_one_that_does_not_is_quoted() {
        let shell = |script: &str| {
            let mut c = Command::new("sh");
            c.args(["-c", script, "sh"]);
            spawn(c)
        };
        let mut child = shell("echo ready; read x < /dev/null").unwrap();
        child.wait().unwrap();
        assert_eq!(shell("echo no such thing; exit 1").unwrap_err().to_string(), "no such thing");
        assert!(shell("exit 3").unwrap_err().to_string().contains("status 3"));
        assert!(shell("kill -9 $$").unwrap_err().to_string().contains("signal 9"));
    }

    #[test]
    fn waiting_for_a_process_is_bounded() {
        let mut child = Command::new("sleep").arg("100").stdin(Stdio::null()).spawn().unwrap();
        let pid = Pid::from_child(&child);
        let fd = pidfd_open(pid, PidfdFlags::empty()).unwrap();
        assert!(!gone(&fd, Duration::ZERO).unwrap());
        child.kill().unwrap();
        assert!(gone(&fd, Duration::from_secs(10)).unwrap());
        child.wait().unwrap();
    }

    /// Detaches whatever a failed test left mounted there.
    struct Mounting(tempfile::TempDir);

    impl Mounting {
        fn config(&self) -> Config {
            let args = ["volfs", "unmount", "--config", "/dev/null"].map(Into::into);
            let at = self.0.path().canonicalize().unwrap();
            crate::config::Cli::from_args(args.into_iter().chain([at.into_os_string()])).unwrap().1
        }

        /// Mounts as the daemon does, but nobody answers; the descriptor keeps it alive.
        fn volfs(&self) -> File {
            use std::os::fd::AsRawFd;
            let fuse = OpenOptions::new().read(true).write(true).open("/dev/fuse").unwrap();
            let data = format!("fd={},rootmode=40000,user_id=0,group_id=0", fuse.as_raw_fd());
            let data = std::ffi::CString::new(data).unwrap();
            rustix::mount::mount("volfs", self.0.path(), FS_TYPE, rustix::mount::MountFlags::empty(), data.as_c_str())
                .unwrap();
            fuse
        }
    }

    impl Drop for Mounting {
        fn drop(&mut self) {
            while umount2(self.0.path(), UnmountFlags::DETACH | UnmountFlags::NOFOLLOW).is_ok() {}
        }
    }

    #[test]
    fn a_dead_mount_of_ours_is_taken_away() {
        let place = Mounting(tempfile::tempdir().unwrap());
        drop(place.volfs());
        assert!(std::fs::metadata(place.0.path()).is_err(), "it is dead");
        unmount(&place.config()).unwrap();
        assert!(std::fs::metadata(place.0.path()).is_ok());
        assert!(unmount(&place.config()).unwrap_err().to_string().contains("nothing is mounted"));
    }

    #[test]
    fn the_daemon_behind_a_mount_is_found_by_its_connection() {
        let place = Mounting(tempfile::tempdir().unwrap());
        let fuse = place.volfs();
        let at = place.config().mountpoint;
        let minor = mounts().unwrap().into_iter().rfind(|m| m.at == at).unwrap().minor;
        let pids: Vec<i32> = daemons(minor).unwrap().into_iter().map(|(pid, _)| pid).collect();
        let own = i32::try_from(std::process::id()).unwrap();
        assert!(pids.contains(&own), "{pids:?}");
        drop(fuse);
        assert!(daemons(minor).unwrap().iter().all(|(pid, _)| *pid != own));
    }

    #[test]
    fn a_foreign_mount_is_left_alone() {
        let place = Mounting(tempfile::tempdir().unwrap());
        let none: Option<&std::ffi::CStr> = None;
        rustix::mount::mount("x", place.0.path(), "tmpfs", rustix::mount::MountFlags::empty(), none).unwrap();
        let words = unmount(&place.config()).unwrap_err().to_string();
        assert!(words.contains("tmpfs") && words.contains("left alone"), "{words}");
        assert!(mounts().unwrap().iter().any(|m| m.at == place.config().mountpoint));
    }
}
