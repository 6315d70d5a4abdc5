//! The fake cloud as a program.

use std::io::{BufRead, BufReader};
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use serde_json::Value;

use crate::client::PATIENCE;
use crate::loops::have_loops;

/// A running program, killed when the test goes.
struct Program(Child, Value);

impl Program {
    fn start(dir: &Path, args: &[&str]) -> Self {
        let mut child = Command::new(env!("CARGO_BIN_EXE_fakecloud"))
            .arg("--dir")
            .arg(dir)
            .args(args)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let mut line = String::new();
        let out = child.stdout.take().unwrap();
        let mut program = Program(child, Value::Null);
        BufReader::new(out).read_line(&mut line).unwrap();
        program.1 = serde_json::from_str(&line).unwrap_or_else(|e| panic!("{line:?}: {e}"));
        program
    }

    fn signal(&self, signal: i32) {
        // SAFETY: kill(2) takes no pointers; the pid is our own child, not yet waited for.
        unsafe { libc::kill(self.0.id() as i32, signal) };
    }
}

impl Drop for Program {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// Loop devices with a file below `dir`.
fn loops_below(dir: &Path) -> usize {
    let below = |entry: &std::fs::DirEntry| {
        let file = std::fs::read_to_string(entry.path().join("loop/backing_file")).unwrap_or_default();
        Path::new(file.trim_end()).starts_with(dir)
    };
    std::fs::read_dir("/sys/block").unwrap().flatten().filter(below).count()
}

#[test]
fn it_says_all_that_a_client_needs_and_ends_by_signal_or_with_its_input() {
    let dir = tempfile::tempdir().unwrap();
    for end in ["input", "SIGTERM", "SIGINT"] {
        let mut program = Program::start(dir.path(), &["--books-only", "--vm", "other"]);
        for field in ["endpoint", "key", "secret", "host", "zone", "zone_name", "offering", "fixed_offering"] {
            assert!(program.1[field].is_string(), "{field}");
        }
        assert_eq!(program.1["vms"].as_array().unwrap().len(), 1);
        let address = program.1["endpoint"].as_str().unwrap().strip_prefix("http://").unwrap();
        assert!(address.starts_with("127.0.0.1:"), "{address}");
        match end {
            "SIGTERM" => program.signal(libc::SIGTERM),
            "SIGINT" => program.signal(libc::SIGINT),
            _ => drop(program.0.stdin.take()),
        }
        assert!(program.0.wait().unwrap().success(), "{end}");
    }
}

#[test]
fn even_a_killed_one_leaves_no_device() {
    if !have_loops() {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let program = Program::start(dir.path(), &[]);
    assert_eq!(loops_below(dir.path()), 1);
    program.signal(libc::SIGKILL);
    drop(program);
    let deadline = Instant::now() + PATIENCE;
    while loops_below(dir.path()) > 0 {
        assert!(Instant::now() < deadline, "the host's disk is still there");
        // Bounded pacing of the look, not a wait: the kernel lets go a moment after the process.
        std::thread::sleep(Duration::from_millis(2));
    }
}
