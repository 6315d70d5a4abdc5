//! Each shipped script as a whole: its words, its runs, and a kill after each of its lines.

use std::fs;
use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::process::{Child, Stdio};

use crate::bring::*;
use crate::common::{SHELLS, Said, Volfs, finish, have, killed_copies};
use crate::scripts::*;

/// In the form of before snapshots on loop devices; the way back of a failover test takes their place.
const OLD_FORM: [&str; 2] = ["failover-rollback.sh", "failover-test.sh"];

fn in_form() -> Vec<String> {
    all().into_iter().filter(|name| !OLD_FORM.contains(&name.as_str())).collect()
}

#[test]
fn r2_every_script_says_how_it_is_used() {
    let volfs = Volfs::prepare(&[], "");
    for name in in_form() {
        for shell in SHELLS {
            let help = run(&volfs, shell, &name, &[], &["--help"]);
            assert_eq!((help.status, help.err.as_str()), (0, ""), "{name}: {help:?}");
            assert!(help.out.starts_with("usage: ") && help.out.contains(&name), "{name}: {help:?}");
            let wrong = run(&volfs, shell, &name, &[("JOB", "a")], &["--no-such-option"]);
            assert_eq!((wrong.status, wrong.out.as_str()), (2, ""), "{name}: {wrong:?}");
            assert_eq!(wrong.err, help.out, "{name}: one text");
        }
    }
}

#[test]
fn bad_input_names_that_are_none_are_wrong_usage_and_reach_nothing() {
    let volfs = Volfs::prepare(&[], "");
    let args = |name: &str| -> &[&str] { if name == "provision" { &["d=1M"] } else { &[] } };
    let of_jobs = ["provision", "where", "cleanup-failed-job", "commit-failover", "hand-over"];
    for job in ["", ".", "..", ".a", "a/b", "../../x", "a b", "a\nb", "a;b", "a'b"] {
        for name in of_jobs {
            let said = run(&volfs, &["dash"], name, &[("JOB", job), ("NEW", "b"), ("VM", "v")], args(name));
            assert_eq!(said.status, 2, "{name} of {job:?}: {said:?}");
        }
        let said = run(&volfs, &["dash"], "hand-over", &[("JOB", "a"), ("NEW", job)], &[]);
        assert_eq!(said.status, 2, "{job:?}: {said:?}");
        let said = run(&volfs, &["dash"], "provision", &[("JOB", "a")], &[&format!("{job}=1M")]);
        assert_eq!(said.status, 2, "{job:?}: {said:?}");
    }
    let said = run(&volfs, &["dash"], "hand-over", &[("JOB", "a"), ("NEW", "a")], &[]);
    assert_eq!(said.status, 2, "to itself: {said:?}");
    let said = run(&volfs, &["dash"], "commit-failover", &[("JOB", "a")], &[]);
    assert_eq!(said.status, 2, "no VM is named: {said:?}");
    let said = run(&volfs, &["dash"], "provision", &[("JOB", "a")], &["d"]);
    assert_eq!(said.status, 2, "a disk without a size: {said:?}");
}

#[test]
fn predecessor_75_every_script_is_short_and_speaks_to_the_tree_alone() {
    const WORDS: [&str; 14] = [
        "curl", "wget", "jq", "sleep", "mysql", "mariadb", "psql", "sqlite3", "SELECT", "DELETE", "UPDATE", "INSERT",
        "python3", "perl",
    ];
    let names = in_form();
    assert!(names.len() >= 7, "{names:?}");
    for name in names {
        let text = fs::read_to_string(shipped(&name)).unwrap();
        assert!(text.starts_with("#!/bin/sh\n") && text.contains("\nset -eu\n"), "{name}");
        assert!(text.lines().count() <= 36, "{name}: {} lines", text.lines().count());
        assert!(text.contains("read -r _ < \"$R/version\""), "{name}: it would write below an empty mount point");
        let mut words = text.split(|c: char| !c.is_alphanumeric());
        assert_eq!(words.find(|word| WORDS.contains(word)), None, "{name}");
        assert!(!text.contains("mkdir -p"), "{name}");
        let mode = std::os::unix::fs::PermissionsExt::mode(&fs::metadata(shipped(&name)).unwrap().permissions());
        assert_eq!(mode & 0o111, 0o111, "{name} is executable");
    }
}

/// Plays a script's kill after each line, in one shell after the other: `arrange` names what the run
/// with this number needs, `settled` is asked after the repeated run.
fn kill_at_each_line(
    volfs: &Volfs,
    name: &str,
    mut arrange: impl FnMut(usize) -> Vec<(&'static str, String)>,
    args: &[&str],
    mut settled: impl FnMut(usize, &str),
) {
    let mut killed = 0;
    for (n, (line, text)) in killed_copies(name).into_iter().enumerate() {
        let shell = SHELLS[n % SHELLS.len()];
        let own = arrange(n);
        let env: Vec<_> = own.iter().map(|(k, v)| (*k, v.as_str())).collect();
        let path = volfs.scratch("killed");
        fs::write(&path, text).unwrap();
        let said = finish(command(volfs, shell, &path, &env, args).spawn().unwrap());
        // One that ends before that line has not been killed.
        assert!(matches!(said.status, 0 | -9), "{name} killed after line {line}: {said:?}\n{}", volfs.log());
        killed += usize::from(said.status == -9);
        ok(volfs, shell, name, &env, args);
        settled(n, &format!("{name} killed after line {line} in {shell:?}"));
    }
    assert!(killed > 4, "{name}: {killed} kills");
}

const DISKS: [&str; 2] = ["disk-2000=1M=src0.raw", "disk-2001=1M"];

#[test]
fn predecessor_116_provisioning_killed_after_each_line_and_run_again_ends_right() {
    let volfs = Volfs::start_with(&[], QUIET);
    image(&volfs, "src0.raw", b'a', 1 << 16);
    let arrange = |n| vec![("JOB", format!("j{n}")), ("VM_NAME", "web1".into())];
    kill_at_each_line(&volfs, "provision", arrange, &DISKS, |n, what| {
        let job = format!("j{n}");
        assert_eq!(volfs.value(format!("jobs/{job}/status")), "idle attached=2", "{what}");
        assert_eq!(volfs.value(format!("jobs/{job}/vm_name")), "web1", "{what}");
        assert_eq!(head(&volfs, &job, "disk-2000"), "aaaa", "{what}");
        assert_eq!(volumes(&volfs).len(), 2, "{what}: none was made twice");
        ok(&volfs, &["dash"], "cleanup-failed-job", &[("JOB", &job)], &["--yes"]);
    });
    assert!(volumes(&volfs).is_empty());
}

/// The script's own process; it is alone in its group and goes with it.
fn start(volfs: &Volfs, shell: &[&str], name: &str, env: &[(&str, &str)], args: &[&str]) -> Child {
    command(volfs, shell, &shipped(name), env, args).process_group(0).spawn().unwrap()
}

fn kill(child: Child) {
    // SAFETY: kill(2) takes no pointers; the group is that of our own child, not yet waited for.
    unsafe { libc::kill(-(child.id() as i32), libc::SIGKILL) };
    let ended = child.wait_with_output().unwrap().status;
    assert_eq!(ended.signal(), Some(libc::SIGKILL));
}

#[test]
fn predecessor_41_provisioning_killed_in_the_middle_of_a_create_is_joined_by_the_next_run() {
    for shell in SHELLS {
        let gate = Gate::new();
        let volfs = Volfs::start_with(&[("VOLFS_FAILPOINTS", &gate.wait("create.after-call"))], QUIET);
        image(&volfs, "src0.raw", b'a', 1 << 16);
        let env = [("JOB", "a"), ("VM_NAME", "w")];
        let held = gate.close();
        let first = start(&volfs, shell, "provision", &env, &DISKS);
        volfs.until("the volume in the cloud", || volumes(&volfs).len() == 1);
        kill(first);
        let second = start(&volfs, shell, "provision", &env, &DISKS);
        held.release();
        let said = finish(second);
        assert_eq!(said.status, 0, "{said:?}\n{}", volfs.log());
        assert_eq!(volfs.value("jobs/a/status"), "idle attached=2");
        assert_eq!(volumes(&volfs).len(), 2);
    }
}

#[test]
fn c12_cleaning_up_killed_after_each_line_and_run_again_ends_right() {
    let volfs = Volfs::start_with(&[], QUIET);
    let other = volfs.job("other", &["d"], "1M");
    volfs.ok("echo attach > $R/jobs/other/control");
    let was = of(&volfs, &other[0], "incarnation");
    let arrange = |n| {
        volfs.job(&format!("j{n}"), &["d", "e"], "1M");
        volfs.ok(&format!("echo attach > $R/jobs/j{n}/control"));
        vec![("JOB", format!("j{n}"))]
    };
    kill_at_each_line(&volfs, "cleanup-failed-job", arrange, &["--yes"], |_, what| {
        assert_eq!(volfs.ok("ls $R/jobs"), "other", "{what}");
        assert_eq!(volumes(&volfs), other, "{what}");
        assert_eq!(of(&volfs, &other[0], "incarnation"), was, "{what}");
    });
}

#[test]
fn c12_cleaning_up_killed_between_two_deletions_is_finished_by_the_next_run() {
    let gate = Gate::new();
    let volfs = Volfs::start_with(&[("VOLFS_FAILPOINTS", &gate.wait("delete.after-call"))], QUIET);
    volfs.job("a", &["d", "e", "f"], "1M");
    let other = volfs.job("other", &["d"], "1M");
    let held = gate.close();
    let first = start(&volfs, &["dash"], "cleanup-failed-job", &[("JOB", "a")], &["--yes"]);
    volfs.until("the first deletion", || volumes(&volfs).len() == 3);
    kill(first);
    held.release();
    // Stopped before the next volume, which is there still and the job's; or told too late.
    volfs.until("the end", || !volfs.read("jobs/a/status").unwrap_or_default().starts_with("busy"));
    ok(&volfs, &["dash"], "cleanup-failed-job", &[("JOB", "a")], &["--yes"]);
    assert_eq!((volfs.ok("ls $R/jobs"), volumes(&volfs)), ("other".into(), other));
}

#[test]
fn r5_cleaning_up_without_yes_shows_what_it_would_destroy_and_changes_nothing() {
    let volfs = Volfs::start_with(&[], QUIET);
    let uuids = volfs.job("a", &["d", "e"], "1M");
    let history = volfs.read("history");
    for shell in SHELLS {
        let said = run(&volfs, shell, "cleanup-failed-job", &[("JOB", "a")], &[]);
        assert_eq!(said.status, 1, "{said:?}");
        assert_eq!(said.out, volfs.read("jobs/a/table").unwrap());
        assert!(uuids.iter().all(|uuid| said.out.contains(uuid)) && said.err.contains("--yes"), "{said:?}");
        for args in [&["--force"][..], &["--yes", "b"], &["yes"], &["--yes", "--yes"]] {
            assert_eq!(run(&volfs, shell, "cleanup-failed-job", &[("JOB", "a")], args).status, 2, "{args:?}");
        }
        // A job that never was is not one that is cleaned up.
        assert_eq!(run(&volfs, shell, "cleanup-failed-job", &[("JOB", "b")], &["--yes"]).status, 1);
    }
    assert_eq!((volumes(&volfs).len(), volfs.read("history")), (2, history));
}

/// A VM that runs, with the job's volumes on it.
fn failed_over(volfs: &Volfs, job: &str, disks: &[&str]) -> (String, Vec<String>) {
    let uuids = volfs.job(job, disks, "1M");
    let vm = test_vm(volfs);
    volfs.ok(&format!("echo attach vm={vm} > $R/jobs/{job}/control"));
    fs::write(volfs.state().join(format!("loop/vms/{vm}.json")), "{\"running\":true}").unwrap();
    (vm, uuids)
}

fn released_to(volfs: &Volfs, uuids: &[String], vm: &str, what: &str) {
    for uuid in uuids {
        let meta = meta(volfs, uuid);
        assert_eq!((&meta["attached"]["vm"], &meta["mark"]), (&vm.into(), &serde_json::Value::Null), "{what}");
    }
}

#[test]
fn c8_committing_a_failover_killed_after_each_line_releases_all_and_detaches_nothing() {
    let volfs = Volfs::start_with(&[], QUIET);
    let made = std::cell::RefCell::new(Vec::new());
    let arrange = |n| {
        let job = format!("j{n}");
        let (vm, uuids) = failed_over(&volfs, &job, &["disk-2000", "disk-2001"]);
        made.replace(uuids);
        vec![("JOB", job), ("VM", vm)]
    };
    kill_at_each_line(&volfs, "commit-failover", arrange, &[], |_, what| {
        assert_eq!(volfs.ok("ls $R/jobs"), "", "{what}");
        let vm = meta(&volfs, &made.borrow()[0])["attached"]["vm"].as_str().unwrap().to_owned();
        released_to(&volfs, &made.borrow(), &vm, what);
    });
    assert_eq!(run(&volfs, &["dash"], "commit-failover", &[("JOB", "never"), ("VM", "v")], &[]).status, 1);
}

#[test]
fn c8_a_commit_releases_nothing_unless_every_volume_is_on_the_vm_it_names() {
    let volfs = Volfs::start_with(&[], QUIET);
    let (vm, uuids) = failed_over(&volfs, "a", &["d", "e"]);
    let (elsewhere, _) = failed_over(&volfs, "b", &["d"]);
    let refused = |shell: &[&str], vm: &str, odd: &str| {
        let said = run(&volfs, shell, "commit-failover", &[("JOB", "a"), ("VM", vm)], &[]);
        assert_eq!(said.status, 1, "{said:?}");
        assert!(said.err.contains(odd), "it names the one in the way: {said:?}");
        assert_eq!(volfs.ok("ls $R/jobs/a/disks"), "d\ne");
        assert!(uuids.iter().all(|uuid| meta(&volfs, uuid)["mark"].is_string()), "none lost its mark");
    };
    for shell in SHELLS {
        refused(shell, &elsewhere, &uuids[0]);
        // Moved behind volfs's back: what it saw last is not asked.
        edit_meta(&volfs, &uuids[1], |m| m["attached"]["vm"] = elsewhere.clone().into());
        assert_eq!(of(&volfs, &uuids[1], "vm"), vm);
        refused(shell, &vm, &uuids[1]);
        edit_meta(&volfs, &uuids[1], |m| m["attached"] = serde_json::Value::Null);
        refused(shell, &vm, &uuids[1]);
        edit_meta(&volfs, &uuids[1], |m| m["attached"] = serde_json::json!({"vm": vm, "device_id": 5}));
        volfs.ok("echo reconcile > $R/jobs/a/disks/e/control");
    }
    // Nor what is attached here, though it is on the VM that is named.
    let here = volfs.job("h", &["d"], "1M");
    volfs.ok("echo attach > $R/jobs/h/control");
    let host = of(&volfs, &here[0], "vm");
    assert_eq!(run(&volfs, &["dash"], "commit-failover", &[("JOB", "h"), ("VM", &host)], &[]).status, 1);
    assert_eq!(volfs.value("jobs/h/status"), "idle attached=1");
    ok(&volfs, &["dash"], "commit-failover", &[("JOB", "a"), ("VM", &vm)], &[]);
    released_to(&volfs, &uuids, &vm, "in the end");
}

#[test]
fn c9_handing_over_killed_after_each_line_and_run_again_ends_right() {
    let volfs = Volfs::start_with(&[], QUIET);
    let uuids = volfs.job("j0", &["disk-2000", "disk-2001"], "1M");
    volfs.ok("echo attach > $R/jobs/j0/disks/disk-2000/control");
    let was = of(&volfs, &uuids[0], "incarnation");
    let arrange = |n| vec![("JOB", format!("j{n}")), ("NEW", format!("j{}", n + 1))];
    kill_at_each_line(&volfs, "hand-over", arrange, &[], |n, what| {
        let (old, new) = (format!("j{n}"), format!("j{}", n + 1));
        assert_eq!(volfs.value(format!("jobs/{new}/status")), "idle detached=1 attached=1", "{what}");
        assert_eq!(volfs.value(format!("jobs/{old}/status")), "idle", "{what}");
        assert_eq!([disk(&volfs, &new, "disk-2000"), disk(&volfs, &new, "disk-2001")], [&*uuids[0], &*uuids[1]]);
        assert_eq!(of(&volfs, &uuids[0], "incarnation"), was, "{what}");
    });
    // Of a job that is none nothing is begun.
    assert_eq!(run(&volfs, &["dash"], "hand-over", &[("JOB", "no"), ("NEW", "x")], &[]).status, 1);
    assert!(!volfs.path("jobs/x").exists());
}

#[test]
fn r3_where_says_of_a_job_and_of_devices_which_volume_is_where() {
    let volfs = Volfs::start_with(&[], QUIET);
    let uuids = volfs.job("a", &["d"], "1M");
    volfs.ok("echo attach > $R/jobs/a/control");
    let device = of(&volfs, &uuids[0], "device");
    let name = device.strip_prefix("/dev/").unwrap();
    let line = format!("{name}\t{}\n", dir("a", &uuids[0]));
    for shell in SHELLS {
        let said = ok(&volfs, shell, "where", &[("JOB", "a")], &[]);
        assert_eq!(said.out, volfs.read("jobs/a/table").unwrap());
        assert_eq!(ok(&volfs, shell, "where", &[], &[&device, name]).out, line.repeat(2));
        // One that is no volume's hides no other, and is no success.
        let said = run(&volfs, shell, "where", &[], &["nvme99n9", "../version", name]);
        assert_eq!((said.status, said.out.as_str()), (1, line.as_str()), "{said:?}");
        assert!(said.err.contains("nvme99n9"), "{said:?}");
        assert_eq!(run(&volfs, shell, "where", &[], &[]).status, 2, "nothing was named");
        assert_ne!(run(&volfs, shell, "where", &[("JOB", "b")], &[]).status, 0, "there is no such job");
    }
}

#[test]
fn r7_watch_shows_what_is_wrong_and_then_each_change() {
    for shell in SHELLS {
        let volfs = Volfs::start_with(&[], QUIET);
        volfs.job("a", &["d"], "1M");
        let seen = volfs.scratch("seen");
        let read = || fs::read_to_string(&seen).unwrap_or_default();
        let mut watch = command(&volfs, shell, &shipped("watch"), &[], &[]);
        let watch = Ends(watch.stdout(fs::File::create(&seen).unwrap()).spawn().unwrap());
        volfs.until("the problems", || read().starts_with("object\tsince\t"));
        volfs.ok("echo attach > $R/jobs/a/control");
        volfs.until("the change", || read().lines().any(|l| l.starts_with('{') && l.contains("\"attached\"")));
        drop(watch);
    }
}

/// Ends when the test does.
struct Ends(Child);

impl Drop for Ends {
    fn drop(&mut self) {
        // Ended already is ended.
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

fn serve(volfs: &Volfs, shell: &[&str], socket: &str) -> Ends {
    let mut server = command(volfs, shell, &shipped("export"), &[], &[socket]);
    Ends(server.stdout(Stdio::null()).stderr(Stdio::null()).spawn().unwrap())
}

#[test]
fn r3_export_serves_what_is_attached_and_nothing_else_also_after_a_kill() {
    if !have(&["nbdcopy", "nbdkit"]) {
        return;
    }
    let volfs = Volfs::start_with(&[], QUIET);
    let uuids = volfs.job("a", &["d", "e"], "1M");
    volfs.ok(
        "echo attach > $R/jobs/a/disks/d/control; printf data | dd of=$R/jobs/a/disks/d/block conv=fsync status=none",
    );
    let socket = volfs.scratch("nbd.sock");
    let name = socket.to_str().unwrap();
    let uri = |uuid: &str| format!("nbd+unix:///{uuid}?socket={}", socket.display());
    let size = |uuid: &str| -> Said { volfs.sh(&format!("nbdinfo --size '{}'", uri(uuid))) };
    for shell in SHELLS {
        // The last one of the loop was killed and has left its socket.
        let _server = serve(&volfs, shell, name);
        volfs.until("a server that answers", || size(&uuids[0]).out == "1048576\n");
        assert_ne!(size(&uuids[1]).status, 0, "not attached");
        let second = run(&volfs, shell, "export", &[], &[name]);
        assert_eq!(second.status, 1, "a socket in use is not taken away: {second:?}");
        assert_eq!(size(&uuids[0]).out, "1048576\n");
    }
    let _server = serve(&volfs, &["dash"], name);
    let copy = volfs.scratch("copy");
    volfs.until("a copy", || volfs.sh(&format!("nbdcopy '{}' {}", uri(&uuids[0]), copy.display())).status == 0);
    assert!(fs::read(&copy).unwrap().starts_with(b"data"));
    volfs.until("the end of the connection", || volfs.write("jobs/a/control", "detach") == 0);
    assert_ne!(size(&uuids[0]).status, 0, "refused after the detach");
    assert!(!volfs.path(format!("exports/{}", uuids[0])).exists());
    // What is no socket is nobody's to remove.
    let file = volfs.scratch("file");
    fs::write(&file, "precious").unwrap();
    assert_eq!(run(&volfs, &["dash"], "export", &[], &[file.to_str().unwrap()]).status, 2);
    assert_eq!(fs::read(&file).unwrap(), b"precious");
}

#[test]
fn r1_scripts_take_names_with_odd_characters_as_they_are() {
    let volfs = Volfs::start_with(&[], QUIET);
    for (shell, vm_name) in SHELLS.into_iter().zip(["-n", "a\\tb \\c $(id) `id` 'q\"", "w\u{e9}b  1"]) {
        image(&volfs, "-i=1 a b", b'a', 1 << 16);
        let env = [("JOB", "--yes"), ("VM_NAME", vm_name), ("NEW", "-e_.x")];
        ok(&volfs, shell, "provision", &env, &["-n=1M=-i=1 a b", "--help=1M", "n.-_=1M"]);
        assert_eq!(volfs.read("jobs/--yes/vm_name").unwrap(), format!("{vm_name}\n"));
        assert_eq!(volfs.ok("cd $R/jobs/--yes/disks; head -c 4 ./-n/block; ls"), "aaaa--help\n-n\nn.-_");
        assert_eq!(ok(&volfs, shell, "where", &env, &[]).out.lines().count(), 4);
        ok(&volfs, shell, "hand-over", &env, &[]);
        assert_eq!(volfs.value("jobs/-e_.x/status"), "idle attached=3");
        ok(&volfs, shell, "cleanup-failed-job", &[("JOB", "-e_.x")], &["--yes"]);
        ok(&volfs, shell, "cleanup-failed-job", &[("JOB", "--yes")], &["--yes"]);
    }
    assert!(volumes(&volfs).is_empty());
}
