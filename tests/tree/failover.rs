//! `test-failover`, `rollback-failover` and `replace-root` as we ship them, killed wherever they can
//! be: every volume comes home with its bytes of before the test, all of one time.

use std::cell::Cell;
use std::fs;
use std::io::{Read, Write};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};

use crate::bring::*;
use crate::common::{SHELLS, Said, Volfs, finish};

const QUIET: &str = "reconcile_interval = 3600\n";
const DISKS: [&str; 3] = ["disk-2000", "disk-2001", "disk-2002"];
const JOB: &str = "a";

fn shipped(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("contrib/scripts").join(name)
}

/// A job of three attached disks and a test VM.
struct Stage {
    volfs: Volfs,
    uuids: Vec<String>,
    vm: String,
    shell: &'static [&'static str],
    /// How often the disks were written before a test.
    round: Cell<u32>,
}

impl Stage {
    fn new(shell: &'static [&'static str], env: &[(&str, &str)]) -> Self {
        let volfs = Volfs::start_with(env, QUIET);
        let uuids = volfs.job(JOB, &DISKS, "1M");
        let vm = volfs::model::VmId::random().to_string();
        fs::create_dir(volfs.scratch("scripts")).unwrap();
        for name in ["test-failover", "rollback-failover", "replace-root"] {
            fs::copy(shipped(name), volfs.scratch("scripts").join(name)).unwrap();
        }
        let stage = Stage { volfs, uuids, vm, shell, round: Cell::new(0) };
        stage.tell("attach");
        stage.write();
        stage
    }

    #[track_caller]
    fn tell(&self, command: &str) {
        let errno = self.volfs.write(format!("jobs/{JOB}/control"), command);
        assert_eq!(errno, 0, "{command}: {}", self.volfs.log());
    }

    fn spawn(&self, script: &Path) -> Child {
        let mut command = Command::new(self.shell[0]);
        command.args(&self.shell[1..]).arg(script).env("VOLFS", self.volfs.root());
        command.env("JOB", JOB).env("TEST_VM", &self.vm).env("OS_DISK", DISKS[0]);
        command.current_dir(self.volfs.scratch("")).stdin(Stdio::null());
        command.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap()
    }

    fn start(&self, name: &str) -> Child {
        self.spawn(&self.volfs.scratch("scripts").join(name))
    }

    fn run(&self, name: &str) -> Said {
        finish(self.start(name))
    }

    #[track_caller]
    fn ok(&self, name: &str) -> String {
        let said = self.run(name);
        assert_eq!(
            (said.status, said.err.as_str()),
            (0, ""),
            "{name} in {:?}: {said:?}\n{}",
            self.shell,
            self.volfs.log()
        );
        said.out
    }

    /// The shipped text with an end of its shell by SIGKILL after that line, beside the others.
    fn cut(&self, name: &str, line: usize) -> Said {
        let text = fs::read_to_string(shipped(name)).unwrap();
        let mut lines: Vec<&str> = text.lines().collect();
        lines.insert(line, "kill -9 $$");
        let path = self.volfs.scratch("scripts").join("cut");
        fs::write(&path, lines.join("\n") + "\n").unwrap();
        finish(self.spawn(&path))
    }

    /// The lines after which a script can be killed, but for its preamble, which only reads.
    fn lines(&self, name: &str) -> Vec<usize> {
        let text = fs::read_to_string(shipped(name)).unwrap();
        let lines: Vec<&str> = text.lines().collect();
        let body = lines.iter().position(|l| l.starts_with("tell()")).unwrap() + 1;
        let fits = |line: &usize| {
            let mut cut = lines.clone();
            cut.insert(*line, "kill -9 $$");
            let path = self.volfs.scratch("parsed");
            fs::write(&path, cut.join("\n")).unwrap();
            // Within a construct there is no place for another command.
            let parses = Command::new("dash").arg("-n").arg(path).stderr(Stdio::null()).status().unwrap().success();
            parses && !lines[*line - 1].is_empty() && !lines[*line - 1].ends_with('{')
        };
        let found: Vec<usize> = (body + 1..=lines.len()).filter(fits).collect();
        assert!(found.len() > 8, "{found:?}");
        found
    }

    fn text(&self, uuid: &str) -> String {
        format!("round {} of {uuid};", self.round.get())
    }

    /// New bytes on every disk, as this host writes them.
    fn write(&self) {
        self.round.set(self.round.get() + 1);
        for uuid in &self.uuids {
            let block = self.volfs.path(format!("volumes/{uuid}/block"));
            let mut file = fs::OpenOptions::new().write(true).open(block).unwrap();
            file.write_all(self.text(uuid).as_bytes()).unwrap();
            file.sync_all().unwrap();
        }
    }

    /// The test VM runs, and writes to all that it has; how many that was.
    fn vm_writes(&self) -> usize {
        let has = |uuid: &&String| of(&self.volfs, uuid, "vm") == self.vm;
        let there: Vec<&String> = self.uuids.iter().filter(has).collect();
        for uuid in &there {
            let file = fs::OpenOptions::new().write(true).open(stored(&self.volfs, uuid).join("data.img")).unwrap();
            file.write_all_at(b"by the test VM, which nobody may keep; longer than what was there before", 0).unwrap();
            file.write_all_at(b"by the test VM", 8192).unwrap();
        }
        there.len()
    }

    #[track_caller]
    fn handed_over(&self) {
        assert_eq!(self.volfs.value(format!("jobs/{JOB}/status")), "idle remote=3", "{}", self.volfs.log());
        assert!(self.uuids.iter().all(|uuid| of(&self.volfs, uuid, "vm") == self.vm));
        assert_eq!(of(&self.volfs, &self.uuids[0], "device_id"), "0");
    }

    /// All attached here with the bytes of before, and nothing left of the test.
    #[track_caller]
    fn is_home(&self, at: &str) {
        let volfs = &self.volfs;
        assert_eq!(volfs.value(format!("jobs/{JOB}/status")), "idle attached=3", "{at}: {}", volfs.log());
        for uuid in &self.uuids {
            let mut bytes = Vec::new();
            fs::File::open(volfs.path(format!("volumes/{uuid}/block"))).unwrap().read_to_end(&mut bytes).unwrap();
            let text = self.text(uuid);
            let head = String::from_utf8_lossy(&bytes[..text.len()]);
            assert_eq!(head, text, "{at} in {:?}: {}", self.shell, volfs.log());
            assert!(bytes[text.len()..].iter().all(|b| *b == 0), "{at}: bytes of the test VM");
            assert_eq!(fs::read_dir(volfs.path(format!("volumes/{uuid}/snapshots"))).unwrap().count(), 0, "{at}");
            let kept = fs::read_dir(stored(volfs, uuid).join("snapshots")).map_or(0, |all| all.count());
            assert_eq!(kept, 0, "{at}: snapshots in the store");
        }
        assert_eq!(volfs.ok("ls $R/jobs"), JOB, "{at}");
    }

    /// SIGKILL to a script that waits in a command.
    fn kill(&self, mut script: Child) {
        script.kill().unwrap();
        script.wait().unwrap();
    }
}

#[test]
fn predecessor_98_the_failover_test_and_its_way_back_in_every_shell_twice() {
    for shell in SHELLS {
        let stage = Stage::new(shell, &[]);
        for _ in 0..2 {
            for _ in 0..2 {
                assert_eq!(stage.ok("test-failover"), "");
                stage.handed_over();
            }
            assert_eq!(stage.vm_writes(), 3);
            for _ in 0..2 {
                assert_eq!(stage.ok("rollback-failover"), "", "nothing is left on the test VM");
                stage.is_home("after all of it");
            }
            stage.write();
        }
    }
}

/// Killed after each of its lines, the test VM having written to what it had by then.
fn killed_at_each_line(shell: &'static [&'static str]) {
    let stage = Stage::new(shell, &[]);
    let back = stage.lines("rollback-failover");
    for (n, line) in stage.lines("test-failover").into_iter().enumerate() {
        stage.write();
        let at = format!("test-failover killed after line {line}");
        assert_eq!(stage.cut("test-failover", line).status, -9, "{at}");
        stage.vm_writes();
        if n % 2 == 1 {
            assert_eq!(stage.ok("test-failover"), "", "{at}, run again");
            stage.handed_over();
            stage.vm_writes();
        }
        if n % 3 == 2 {
            stage.cut("rollback-failover", back[n % back.len()]);
        }
        assert_eq!(stage.ok("rollback-failover"), "", "{at}");
        stage.is_home(&at);
    }
}

fn rollback_killed_at_each_line(shell: &'static [&'static str]) {
    let stage = Stage::new(shell, &[]);
    let text = fs::read_to_string(shipped("rollback-failover")).unwrap();
    let back = text.lines().position(|l| l.contains("tell \"revert")).unwrap() + 1;
    for (n, line) in stage.lines("rollback-failover").into_iter().enumerate() {
        stage.write();
        stage.ok("test-failover");
        assert_eq!(stage.vm_writes(), 3);
        let at = format!("rollback-failover killed after line {line}");
        assert_eq!(stage.cut("rollback-failover", line).status, -9, "{at}");
        if n % 2 == 1 {
            stage.cut("rollback-failover", line);
        }
        if n % 3 == 1 || line == back {
            // Somebody wants to go on with the test: gone on with, refused, or begun with the right bytes.
            let going_back = stage.volfs.read("jobs/a.test/vm_name").is_ok_and(|at| at.starts_with("back from"));
            assert!(going_back || line != back, "{at}: a revert that nobody notes");
            assert!(stage.run("test-failover").status == i32::from(going_back), "{at}");
            assert_eq!(stage.vm_writes(), if going_back { 0 } else { 3 }, "{at}");
        }
        assert_eq!(stage.ok("rollback-failover"), "", "{at}");
        stage.is_home(&at);
    }
}

#[test]
fn predecessor_98_killed_at_each_line_in_dash() {
    killed_at_each_line(&["dash"]);
}

#[test]
fn predecessor_98_killed_at_each_line_in_busybox() {
    killed_at_each_line(&["busybox", "sh"]);
}

#[test]
fn predecessor_59_the_rollback_killed_at_each_line_in_dash() {
    rollback_killed_at_each_line(&["dash"]);
}

#[test]
fn predecessor_59_the_rollback_killed_at_each_line_in_busybox() {
    rollback_killed_at_each_line(&["busybox", "sh"]);
}

/// Points at which a command can be held; closing one is making its file.
struct Gates(tempfile::TempDir);

impl Gates {
    const POINTS: [&str; 4] =
        ["detach.before-call", "loop.snapshot.copied", "attach.before-call", "loop.revert.copied"];

    fn new() -> Self {
        Gates(tempfile::tempdir().unwrap())
    }

    fn points(&self) -> String {
        Self::POINTS.map(|point| format!("{point}=wait:{}/{point}", self.0.path().display())).join(";")
    }

    fn close(&self, point: &str) -> Hold {
        Hold::at(self.0.path().join(point))
    }
}

#[test]
fn predecessor_98_killed_within_a_command_the_rollback_waits_for_its_end() {
    for shell in SHELLS {
        let gates = Gates::new();
        let stage = Stage::new(shell, &[("VOLFS_FAILPOINTS", &gates.points())]);
        for point in Gates::POINTS {
            stage.write();
            let reverting = point.contains("revert");
            if reverting {
                stage.ok("test-failover");
                stage.vm_writes();
            }
            let held = gates.close(point);
            let script = stage.start(if reverting { "rollback-failover" } else { "test-failover" });
            let verb = point.split('.').find(|word| *word != "loop").unwrap();
            running(&stage.volfs, verb);
            stage.kill(script);
            let back = stage.start("rollback-failover");
            let events = format!("/proc/{}/fd/3", back.id());
            stage
                .volfs
                .until("a rollback that waits", || fs::read_link(&events).is_ok_and(|l| l.ends_with("events/a")));
            held.release();
            let said = finish(back);
            assert_eq!((said.status, said.out.as_str()), (0, ""), "{point}: {said:?}\n{}", stage.volfs.log());
            stage.is_home(point);
        }
    }
}

#[test]
fn predecessor_98_a_term_in_the_middle_rolls_back_too() {
    // dash runs no EXIT trap when a signal ends it: the third line of every script is for that.
    for shell in SHELLS {
        let gates = Gates::new();
        let stage = Stage::new(shell, &[("VOLFS_FAILPOINTS", &gates.points())]);
        let held = gates.close("attach.before-call");
        let script = stage.start("test-failover");
        running(&stage.volfs, "attach vm=");
        // SAFETY: kill(2) takes no pointers; the pid is our own child, not yet waited for.
        unsafe { libc::kill(script.id() as i32, libc::SIGTERM) };
        held.release();
        assert_ne!(finish(script).status, 0);
        stage.is_home("after a SIGTERM");
    }
}

#[test]
fn predecessor_98_a_failover_test_that_fails_is_rolled_back_by_its_trap() {
    for shell in SHELLS {
        let stage = Stage::new(shell, &[]);
        // The place of the OS disk is taken.
        let own = foreign_volume(&stage.volfs, None);
        edit_meta(&stage.volfs, &own, |m| m["attached"] = serde_json::json!({"vm": stage.vm, "device_id": 0}));
        let said = stage.run("test-failover");
        assert_ne!(said.status, 0, "{said:?}");
        assert!(said.err.contains(" attach pid "), "it says why: {said:?}");
        assert_eq!(said.out, format!("still on {}: {own}\n", stage.vm));
        stage.is_home("after a failed attach");
        edit_meta(&stage.volfs, &own, |m| m["attached"] = serde_json::Value::Null);

        // A data disk that fails after the root disk was handed over, and cannot be taken back now.
        let mark = meta(&stage.volfs, &stage.uuids[1])["mark"].clone();
        let text = fs::read_to_string(shipped("test-failover")).unwrap();
        let spoil = format!(
            "sed -i 's|{}|{FOREIGN}|' {}/meta.json",
            mark.as_str().unwrap(),
            stored(&stage.volfs, &stage.uuids[1]).display()
        );
        let bad = stage.volfs.scratch("scripts").join("bad");
        fs::write(&bad, text.replace("for d in", &format!("{spoil}\nfor d in"))).unwrap();
        let said = finish(stage.spawn(&bad));
        assert_ne!(said.status, 0, "{said:?}");
        assert_eq!(of(&stage.volfs, &stage.uuids[0], "vm"), "", "the root disk is not left on the test VM: {said:?}");
        edit_meta(&stage.volfs, &stage.uuids[1], |m| m["mark"] = mark);
        stage.volfs.ok("for d in $R/jobs/a/disks/*; do echo reconcile > $d/control; done");
        stage.ok("rollback-failover");
        stage.is_home("after a repair");
        stage.ok("test-failover");
        stage.handed_over();
    }
}

/// The daemon dies between two snapshots of the set: what is there is of no use, and nothing goes
/// back to it.
#[test]
fn predecessor_98_a_half_set_is_deleted_and_never_gone_back_to() {
    let arm = tempfile::tempdir().unwrap();
    let file = arm.path().join("arm");
    let point = format!("loop.snapshot.built=kill:{}", file.display());
    let mut stage = Stage::new(&["dash"], &[("VOLFS_FAILPOINTS", &point)]);
    fs::write(&file, "3").unwrap();
    assert_ne!(stage.run("test-failover").status, 0);
    assert_eq!(stage.volfs.wait(), -libc::SIGKILL);
    fs::remove_file(&file).unwrap();
    stage.volfs.launch();
    stage.volfs.until("settled volumes", || stage.volfs.value("jobs/a/status") == "idle detached=3");
    let has = |uuid: &&String| stage.volfs.path(format!("volumes/{uuid}/snapshots/before-test")).exists();
    assert!(stage.uuids.iter().filter(has).count() < 3, "the third was not taken");
    if stage.uuids.iter().filter(has).count() == 0 {
        // The two others had not got their names yet.
        assert_eq!(stage.volfs.write("jobs/a/disks/disk-2001/control", "snapshot before-test"), 0);
    }
    // Somebody goes on with what is no test yet.
    stage.tell("attach");
    stage.write();
    assert_eq!(stage.ok("rollback-failover"), "");
    stage.is_home("after a half set");
}

#[test]
fn c6_what_is_no_test_of_that_vm_is_neither_gone_back_to_nor_deleted() {
    let stage = Stage::new(&["dash"], &[]);
    // A snapshot of that name that somebody keeps.
    stage.volfs.ok("echo snapshot before-test > $R/jobs/a/disks/disk-2001/control");
    stage.write();
    let said = stage.run("test-failover");
    assert!(said.status == 1 && said.err.contains("before-test"), "{said:?}");
    assert_eq!(stage.ok("rollback-failover"), "");
    assert_eq!(stage.volfs.ok("ls $R/jobs $R/jobs/a/disks/disk-2001/snapshots").matches("before-test").count(), 1);
    stage.volfs.ok("echo delete-snapshot before-test > $R/jobs/a/control");
    stage.is_home("nothing was begun");

    stage.ok("test-failover");
    stage.vm_writes();
    let other = Stage { vm: volfs::model::VmId::random().to_string(), ..stage };
    for script in ["test-failover", "rollback-failover"] {
        let said = other.run(script);
        assert!(said.status == 1 && said.err.contains("a.test says"), "{said:?}");
    }
    let vm = of(&other.volfs, &other.uuids[0], "vm");
    let stage = Stage { vm: vm.clone(), ..other };
    stage.handed_over();
    // A VM that runs keeps its disks.
    let file = stage.volfs.state().join(format!("loop/vms/{vm}.json"));
    fs::write(&file, "{\"running\":true}").unwrap();
    assert_eq!(stage.run("rollback-failover").status, 1);
    stage.handed_over();
    fs::write(&file, "{\"running\":false}").unwrap();
    stage.ok("rollback-failover");
    stage.is_home("the VM was stopped");
}

#[test]
fn r9_the_rollback_says_what_is_left_on_the_test_vm_and_fails_when_it_cannot_tell() {
    let stage = Stage::new(&["dash"], &[]);
    stage.ok("test-failover");
    let own = foreign_volume(&stage.volfs, None);
    edit_meta(&stage.volfs, &own, |m| m["attached"] = serde_json::json!({"vm": stage.vm, "device_id": 9}));
    assert_eq!(stage.ok("rollback-failover"), format!("still on {}: {own}\n", stage.vm));
    // A volume that cannot be read may be there: silence here would cost it.
    fs::write(stored(&stage.volfs, &own).join("meta.json"), "{").unwrap();
    let said = stage.run("rollback-failover");
    assert_ne!(said.status, 0, "{said:?}");
}

#[test]
fn r2_the_failover_scripts_say_how_they_are_used_and_touch_nothing_then() {
    let stage = Stage::new(&["dash"], &[]);
    for name in ["test-failover", "rollback-failover", "replace-root"] {
        let script = shipped(name);
        let usage = stage.volfs.ok(&format!("{} --help", script.display()));
        assert!(usage.starts_with("usage: JOB=job-1 TEST_VM=uuid"), "{usage}");
        let all = format!("JOB={JOB} TEST_VM={} OS_DISK={}", stage.vm, DISKS[0]);
        for wrong in ["", "JOB=a", "JOB=../a TEST_VM=x OS_DISK=d", "JOB=a OS_DISK=d TEST_VM=", &format!("{all} X=")] {
            let more = if wrong.contains("X=") { "extra" } else { "" };
            let said = stage.volfs.sh(&format!("{wrong} {} {more}", script.display()));
            assert_eq!((said.status, said.err.trim_end()), (2, usage.as_str()), "{name} {wrong:?}");
        }
        if name != "rollback-failover" {
            let said = stage.volfs.sh(&format!("{all}9 {}", script.display()));
            assert!(said.status == 1 && said.err.contains("no disk disk-20009"), "{said:?}");
        }
        stage.is_home(name);
    }
}

#[test]
fn predecessor_98_a_vms_own_root_disk_is_replaced_and_no_other_of_its_disks_wherever_it_is_killed() {
    let shells: [&'static [&'static str]; 2] = [&["dash"], &["busybox", "sh"]];
    let mut stage = Stage::new(shells[0], &[]);
    let data = foreign_volume(&stage.volfs, None);
    edit_meta(&stage.volfs, &data, |m| m["attached"] = serde_json::json!({"vm": stage.vm, "device_id": 7}));
    let was = meta(&stage.volfs, &data);
    for (n, line) in stage.lines("replace-root").into_iter().enumerate() {
        stage.shell = shells[n % 2];
        let volfs = &stage.volfs;
        let root = foreign_volume(volfs, None);
        edit_meta(volfs, &root, |m| m["attached"] = serde_json::json!({"vm": stage.vm, "device_id": 0}));
        let at = format!("replace-root killed after line {line}");
        let said = stage.cut("replace-root", line);
        assert!(said.status == -9 || said.status == 0, "{at}: {said:?}");
        assert_eq!(stage.ok("replace-root"), "", "{at}");
        stage.handed_over();
        assert!(!stored(volfs, &root).exists(), "{at}: the old root disk is deleted");
        let trash = fs::read_dir(volfs.state().join("loop/trash")).unwrap();
        let kept = trash.filter(|e| e.as_ref().unwrap().file_name().to_str().unwrap().starts_with(&root)).count();
        assert_eq!(kept, 1, "{at}: and can be recovered");
        for what in ["/attached/vm", "/attached/device_id", "/mark"] {
            assert_eq!(meta(volfs, &data).pointer(what), was.pointer(what), "{at}");
        }
        stage.vm_writes();
        assert_eq!(stage.ok("rollback-failover"), format!("still on {}: {data}\n", stage.vm));
        stage.is_home(&at);
    }
}
