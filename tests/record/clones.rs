//! A state directory that was cloned to another machine: a mount namespace with another
//! /etc/machine-id below the daemon is that machine. Another VM id is in tests/cloud/two.rs.

use std::fs;
use std::io::{BufRead, BufReader};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};

use crate::common::{Said, Volfs, have, said_of};
use crate::ground::{copy, loop_book, program, run};

const EROFS: i32 = libc::EROFS;
const OTHER: &str = "0123456789abcdef0123456789abcdef";

/// Wraps a command so that it runs on a machine with this id.
fn on_machine(id: &Path, command: &Command) -> Command {
    let mut wrapped = Command::new("unshare");
    wrapped.args(["-m", "--propagation", "private", "sh", "-c"]);
    wrapped.arg(format!("mount --bind {} /etc/machine-id && exec \"$@\"", id.display())).arg("sh");
    wrapped.arg(command.get_program()).args(command.get_args());
    wrapped
}

/// A daemon on another machine. Its mount is seen below /proc/PID/root only, and ends with it.
struct Elsewhere {
    child: Child,
    root: PathBuf,
}

impl Elsewhere {
    fn start(volfs: &Volfs, id: &Path) -> Self {
        let mut command = on_machine(id, &volfs.command());
        let log = fs::OpenOptions::new().create(true).append(true).open(volfs.scratch("log")).unwrap();
        command.arg("--background-child").stdin(Stdio::null()).stdout(Stdio::piped()).stderr(log);
        let mut child = command.spawn().unwrap();
        let mut line = String::new();
        BufReader::new(child.stdout.take().unwrap()).read_line(&mut line).unwrap();
        let root = PathBuf::from(format!("/proc/{}/root{}", child.id(), volfs.root().display()));
        let elsewhere = Elsewhere { child, root };
        assert_eq!(line, "ready\n", "{}", volfs.log());
        elsewhere
    }

    fn write(&self, below: &str, text: &str) -> i32 {
        fs::write(self.root.join(below), text).map_or_else(|e| e.raw_os_error().unwrap_or(-1), |()| 0)
    }

    fn read(&self, below: &str) -> String {
        fs::read_to_string(self.root.join(below)).unwrap_or_else(|e| panic!("{below}: {e}"))
    }

    fn stop(mut self) {
        self.end();
    }

    fn end(&mut self) {
        // SAFETY: kill(2) takes no pointers; the pid is our own child, not yet waited for.
        unsafe { libc::kill(self.child.id() as i32, libc::SIGTERM) };
        let _ = self.child.wait();
    }
}

impl Drop for Elsewhere {
    fn drop(&mut self) {
        self.end();
    }
}

fn run_on(id: &Path, volfs: &Volfs, args: &[&str]) -> Said {
    said_of(on_machine(id, &program(volfs, args)).output().unwrap())
}

/// A volfs with its store beside its state, the machine-id that is to be another, and what it has.
fn filled() -> (Volfs, PathBuf, PathBuf, Vec<String>) {
    let mut volfs = Volfs::prepare(&[], "");
    let store = volfs.scratch("store");
    let config = format!("reconcile_interval = 3600\n[loop]\ndir = \"{}\"\n", store.display());
    fs::write(volfs.scratch("config.toml"), config).unwrap();
    let id = volfs.scratch("machine-id");
    fs::write(&id, format!("{OTHER}\n")).unwrap();
    volfs.launch();
    let ids = volfs.job("j", &["a", "b"], "1M");
    assert_eq!(volfs.write("jobs/j/disks/a/control", "attach"), 0);
    (volfs, store, id, ids)
}

fn can() -> bool {
    if !have(&["unshare"]) {
        return false;
    }
    if !Path::new("/etc/machine-id").exists() {
        eprintln!("skipped: this machine has no /etc/machine-id");
        return false;
    }
    true
}

/// With STATE/provider, and with the database alone.
#[test]
fn e7_a_record_on_another_machine_is_served_read_only_and_says_why() {
    if !can() {
        return;
    }
    for whole in [true, false] {
        let (mut volfs, store, id, ids) = filled();
        volfs.terminate();
        if !whole {
            for name in ["provider", "high-water"] {
                fs::remove_file(volfs.state().join(name)).unwrap();
            }
        }
        let before = loop_book(&store);
        let clone = Elsewhere::start(&volfs, &id);
        let health = clone.read("health");
        assert!(
            health.starts_with("down\n") && health.contains("adopt --this-host") && health.contains("adopt --new"),
            "{health}"
        );
        assert!(health.contains("it is a copy"), "{health}");
        assert!(clone.read("problems").contains("read-only"), "{}", clone.read("problems"));
        for verb in ["attach", "detach", "resize 2M", "disk x", "move j"] {
            for id in &ids {
                assert_eq!(clone.write(&format!("volumes/{id}/control"), verb), EROFS, "{verb}");
            }
        }
        for command in ["create c 1M", "attach", "detach", "destroy j"] {
            assert_eq!(clone.write("jobs/j/control", command), EROFS, "{command}");
        }
        assert_eq!(clone.write("jobs/j/vm_name", "x"), EROFS);
        clone.stop();
        assert_eq!(loop_book(&store), before);
        if !whole {
            assert!(!volfs.state().join("provider").exists(), "it was not bound by being looked at");
        }
        // At home nothing has changed.
        volfs.launch();
        assert_eq!(volfs.value("jobs/j/disks/a/status"), "attached");
        assert!(volfs.read("health").unwrap().starts_with("ok\n"), "{}", volfs.read("health").unwrap());
    }
}

#[test]
fn a_record_moves_to_another_machine_by_its_adoption_there_and_is_a_copy_at_home_then() {
    if !can() {
        return;
    }
    let (mut volfs, store, id, ids) = filled();
    assert_eq!(volfs.write("jobs/j/disks/a/control", "detach"), 0);
    volfs.terminate();
    let before = loop_book(&store);
    let said = run_on(&id, &volfs, &["adopt", "--this-host"]);
    assert_eq!(said.status, 0, "{said:?}");
    assert!(said.out.contains("is bound to machine 01234567-89ab-cdef-0123-456789abcdef"), "{said:?}");
    assert_eq!(loop_book(&store), before);
    let moved = Elsewhere::start(&volfs, &id);
    assert!(moved.read("health").starts_with("ok\n"), "{}", moved.read("health"));
    assert_eq!(moved.write(&format!("volumes/{}/control", ids[1]), "disk renamed"), 0, "{}", volfs.log());
    assert_eq!(moved.write("jobs/j/control", "create c 1M"), 0, "{}", volfs.log());
    moved.stop();
    volfs.launch();
    assert_eq!(volfs.write("jobs/j/control", "create d 1M"), EROFS, "{}", volfs.read("health").unwrap());
    volfs.terminate();
    assert_eq!(run(&volfs, &["adopt", "--this-host"]).status, 0);
    volfs.launch();
    assert_eq!(volfs.write("jobs/j/control", "create d 1M"), 0);
}

#[test]
fn a_clone_on_another_machine_that_is_adopted_as_new_leaves_the_original_alone() {
    if !can() {
        return;
    }
    let (mut volfs, store, id, ids) = filled();
    volfs.kill();
    let config = fs::read_to_string(volfs.scratch("config.toml")).unwrap();
    let clone = Volfs::prepare(&[], &config);
    copy(&volfs.state(), &clone.state());
    volfs.launch();
    let before = loop_book(&store);
    assert_eq!(run_on(&id, &clone, &["adopt", "--new"]).status, 0);
    let there = Elsewhere::start(&clone, &id);
    assert!(there.read("health").starts_with("ok\n"), "{}", there.read("health"));
    for id in &ids {
        assert_eq!(there.write(&format!("volumes/{id}/control"), "attach"), libc::ENOENT);
        assert_eq!(there.write("jobs/j/control", &format!("claim {id} loot")), libc::EBUSY);
    }
    assert_eq!(there.write("jobs/j/control", "destroy j"), 0);
    assert_eq!(loop_book(&store), before);
    there.stop();
    assert_eq!(volfs.write("jobs/j/disks/a/control", "detach"), 0, "{}", volfs.log());
}

/// What a record was bound to before machines were compared.
#[test]
fn a_record_without_its_machine_is_bound_where_it_is_started_next() {
    if !can() {
        return;
    }
    let (mut volfs, _store, id, _ids) = filled();
    volfs.terminate();
    let path = volfs.state().join("provider");
    let whole = fs::read_to_string(&path).unwrap();
    let first = whole.lines().next().unwrap();
    fs::write(&path, format!("{first}\n")).unwrap();
    volfs.launch();
    assert!(volfs.read("health").unwrap().starts_with("ok\n"));
    assert_eq!(fs::read_to_string(&path).unwrap(), whole);
    volfs.terminate();
    let clone = Elsewhere::start(&volfs, &id);
    assert!(clone.read("health").starts_with("down\n"));
}
