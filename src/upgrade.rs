//! `volfs upgrade`: the installed program takes the place of the running daemon, as after a crash.
//! Commands that wait go on waiting, with the new daemon.

use std::fs::File;
use std::path::Path;
use std::sync::mpsc;
use std::time::Duration;

use rustix::process::{Pid, PidfdFlags, Signal, pidfd_open, pidfd_send_signal};

use crate::config::{Config, Problem};
use crate::kept::{Connection, Memory, Who};
use crate::start::{FS_TYPE, daemons, gone, mounts, need_root};
use crate::{daemon, fs};

/// How long the old daemon may take to end, and the new one to answer.
const MOST: Duration = Duration::from_secs(30);

/// Replaces the daemon behind the mount point.
pub fn run(config: &Config) -> Result<(), Problem> {
    need_root()?;
    let at = &config.mountpoint;
    let top = mounts()?.into_iter().rfind(|m| m.at == *at && m.fs_type == FS_TYPE);
    let Some(top) = top else { return Err(Problem(format!("no volfs is mounted at {}", at.display()))) };
    let pids: Vec<i32> = daemons(top.minor)?.into_iter().map(|(pid, _)| pid).collect();
    let Some((memory, connection)) = pids.iter().find_map(|pid| memory_of(*pid)) else {
        return Err(Problem(format!(
            "the daemon at {} keeps nothing for a next one: unmount and mount again when nothing waits",
            at.display()
        )));
    };
    let who = who(&memory)?;
    // This very program is the one that is to take over: what it cannot read it says before anything ends.
    daemon::readable(config)?;
    let old = process(who.daemon)?;
    if who.keeper == 0 {
        signal(&old, Signal::KILL, "daemon")?;
    } else {
        signal(&process(who.keeper)?, Signal::HUP, "keeper")?;
    }
    if !gone(&old, MOST)? {
        return Err(Problem(format!("the daemon, pid {}, has not ended: look at its log", who.daemon)));
    }
    answers(at)?;
    let now = self::who(&memory)?;
    if now.starts == who.starts {
        return Err(Problem("a daemon answers, and has not said that it is the next one: look at its log".into()));
    }
    println!("{} is served by pid {} now (pid {} before)", at.display(), now.daemon, who.daemon);
    if let Some(words) = connection.and_then(|connection| remount(&connection)) {
        println!("{words}");
    }
    Ok(())
}

/// What the mount as it is lacks of what this version would ask for.
fn remount(connection: &Connection) -> Option<String> {
    let (asked, options) = fs::asked_of_the_kernel();
    if connection.asked == asked && connection.options == options {
        return None;
    }
    Some(format!(
        "this version mounts with other options (INIT flags {asked:#x} instead of {:#x}, {options} instead of {}): \
         they come with the next `volfs unmount` and `volfs mount`",
        connection.asked, connection.options
    ))
}

fn memory_of(pid: i32) -> Option<(File, Option<Connection>)> {
    let dir = Path::new("/proc").join(pid.to_string()).join("fd");
    let fds = std::fs::read_dir(dir).ok()?.flatten();
    let named = |path: &Path| {
        std::fs::read_link(path).is_ok_and(|to| to.as_os_str().as_encoded_bytes().starts_with(b"/memfd:volfs-kept"))
    };
    let file = fds.map(|fd| fd.path()).find(|path| named(path)).and_then(|path| File::open(path).ok())?;
    let (_, connection) = Memory::who(&file).ok()?;
    Some((file, connection))
}

fn who(memory: &File) -> Result<Who, Problem> {
    Memory::who(memory).map(|(who, _)| who).map_err(|e| Problem::with("who serves is not known", e))
}

fn process(pid: u32) -> Result<std::os::fd::OwnedFd, Problem> {
    let pid = i32::try_from(pid).ok().and_then(Pid::from_raw);
    let pid = pid.ok_or_else(|| Problem("who serves is not known yet: try again".into()))?;
    pidfd_open(pid, PidfdFlags::empty()).map_err(|e| Problem::with(format_args!("pid {pid:?} is not there"), e))
}

fn signal(process: &std::os::fd::OwnedFd, signal: Signal, what: &str) -> Result<(), Problem> {
    pidfd_send_signal(process, signal).map_err(|e| Problem::with(format_args!("the {what} cannot be signalled"), e))
}

/// The kernel holds whoever asks until the new daemon answers.
fn answers(at: &Path) -> Result<(), Problem> {
    let (tell, told) = mpsc::channel();
    let path = at.join("version");
    std::thread::spawn(move || {
        // Nobody listens after the bound.
        let _ = tell.send(std::fs::metadata(path).map(|_| ()));
    });
    match told.recv_timeout(MOST) {
        Ok(Ok(())) => Ok(()),
        Ok(Err(error)) => Err(Problem::with("the new daemon does not serve, look at its log", error)),
        Err(_) => Err(Problem("the new daemon has not answered yet: look at its log".into())),
    }
}
