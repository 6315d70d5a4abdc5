//! Shell commands, shown with their output and held against what they should give.

use std::io::Read;
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Command, Stdio};
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::process::{Pid, PidfdFlags, Signal, kill_process_group, pidfd_open};

use super::say;
use crate::config::Problem;

/// Longest that one command may take.
const DEADLINE: Duration = Duration::from_secs(20);
const LOOK_EVERY: Timespec = Timespec { tv_sec: 0, tv_nsec: 50_000_000 };

/// Runs `sh -c` in one directory.
pub struct Shell<'a> {
    dir: &'a Path,
    stop: &'a AtomicBool,
}

impl<'a> Shell<'a> {
    pub fn new(dir: &'a Path, stop: &'a AtomicBool) -> Self {
        Self { dir, stop }
    }

    /// Shows the command; it must succeed, and its output hold each of these texts.
    pub fn gives(&self, command: &str, texts: &[&str]) -> Result<(), Problem> {
        let (ok, output) = self.show(command)?;
        if !ok {
            return Err(Problem(format!("`{command}` failed")));
        }
        holds(command, &output, texts)
    }

    /// Shows the command; it must fail, and its output hold each of these texts.
    pub fn fails(&self, command: &str, texts: &[&str]) -> Result<(), Problem> {
        let (ok, output) = self.show(command)?;
        if ok {
            return Err(Problem(format!("`{command}` succeeded, but it must be refused")));
        }
        holds(command, &output, texts)
    }

    /// Shows the command; it must print nothing.
    pub fn nothing(&self, command: &str) -> Result<(), Problem> {
        let (_, output) = self.show(command)?;
        if output.trim().is_empty() {
            Ok(())
        } else {
            Err(Problem(format!("`{command}` shows that something is left")))
        }
    }

    /// What the command prints, without showing it; it must succeed and print one line.
    pub fn value(&self, command: &str) -> Result<String, Problem> {
        let (ok, output) = self.run(command)?;
        let value = output.trim();
        if ok && !value.is_empty() && !value.contains('\n') {
            return Ok(value.to_owned());
        }
        Err(Problem(format!("`{command}` gave no value: {value}")))
    }

    fn show(&self, command: &str) -> Result<(bool, String), Problem> {
        say(&format!("$ {command}"))?;
        let (ok, output) = self.run(command)?;
        if !output.is_empty() {
            say(output.trim_end_matches('\n'))?;
        }
        Ok((ok, output))
    }

    fn run(&self, command: &str) -> Result<(bool, String), Problem> {
        let wrong = |e: std::io::Error| Problem::with(format_args!("cannot run `{command}`"), e);
        if self.stop.load(Ordering::Relaxed) {
            return Err(Problem("interrupted".into()));
        }
        // pipefail is not in every sh: a pipe's status is its last command's, which is the writer's.
        let mut child = Command::new("sh")
            .args(["-c", &format!("exec 2>&1\n{command}")])
            .current_dir(self.dir)
            .env("LC_ALL", "C")
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            // A group of its own: killing it reaches dd and mkfs as well.
            .process_group(0)
            .spawn()
            .map_err(wrong)?;
        let group = Pid::from_child(&child);
        let process = pidfd_open(group, PidfdFlags::empty()).map_err(|e| wrong(e.into()))?;
        let out = child.stdout.take();
        let reader = std::thread::spawn(move || {
            let mut bytes = Vec::new();
            out.map_or(Ok(0), |mut out| out.read_to_end(&mut bytes)).map(|_| bytes)
        });
        let until = Instant::now() + DEADLINE;
        let mut killed = None;
        loop {
            match poll(&mut [PollFd::new(&process, PollFlags::IN)], Some(&LOOK_EVERY)) {
                Ok(0) | Err(rustix::io::Errno::INTR) => {}
                Ok(_) => break,
                Err(e) => return Err(wrong(e.into())),
            }
            if killed.is_none() {
                killed = match (self.stop.load(Ordering::Relaxed), Instant::now() >= until) {
                    (true, _) => Some("interrupted".to_owned()),
                    (_, true) => Some(format!("`{command}` did not end within {} s", DEADLINE.as_secs())),
                    _ => None,
                };
                if killed.is_some() {
                    kill_process_group(group, Signal::KILL).map_err(|e| wrong(e.into()))?;
                }
            }
        }
        let status = child.wait().map_err(wrong)?;
        if let Some(words) = killed {
            return Err(Problem(words));
        }
        let bytes = reader.join().map_err(|_| Problem("the demo's reader failed".into()))?.map_err(wrong)?;
        Ok((status.success(), String::from_utf8_lossy(&bytes).into_owned()))
    }
}

fn holds(command: &str, output: &str, texts: &[&str]) -> Result<(), Problem> {
    match texts.iter().find(|t| !output.contains(**t)) {
        None => Ok(()),
        Some(text) => Err(Problem(format!("`{command}` should have shown {text:?}"))),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_command_is_held_against_what_it_should_give() {
        let stop = AtomicBool::new(false);
        let sh = Shell::new(Path::new("/"), &stop);
        sh.gives("echo a; echo b >&2", &["a", "b"]).unwrap();
        assert!(sh.gives("echo a", &["c"]).is_err());
        assert!(sh.gives("echo a; exit 1", &["a"]).is_err());
        assert!(sh.fails("echo a", &["a"]).is_err());
        assert!(sh.fails("echo a; exit 1", &["b"]).is_err());
        sh.nothing("true").unwrap();
        assert!(sh.nothing("echo x").is_err());
        assert_eq!(sh.value("pwd").unwrap(), "/");
        assert!(sh.value("false").is_err() && sh.value("echo a; echo b").is_err());
    }

    #[test]
    fn an_interruption_ends_the_running_command_and_all_below_it() {
        let stop = AtomicBool::new(false);
        let dir = tempfile::tempdir().unwrap();
        let sh = Shell::new(dir.path(), &stop);
        sh.gives("mkfifo started", &[]).unwrap();
        std::thread::scope(|scope| {
            let running = scope.spawn(|| sh.value("echo $$ > started; sleep 1000 | cat"));
            let pid = std::fs::read_to_string(dir.path().join("started")).unwrap();
            stop.store(true, Ordering::Relaxed);
            assert_eq!(running.join().unwrap().unwrap_err().to_string(), "interrupted");
            let group = Pid::from_raw(pid.trim().parse().unwrap()).unwrap();
            // Those killed below the shell are init's to reap; till then they are in the group.
            while rustix::process::test_kill_process_group(group).is_ok() {
                std::thread::yield_now();
            }
        });
    }
}
