//! The scripts that we ship, run for real: twice, in three shells, killed in between; and what the
//! predecessor's scripts did wrong.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use crate::bring::*;
pub use crate::common::shipped;
use crate::common::{SHELLS, Said, Volfs, finish, said_of};

pub const QUIET: &str = "reconcile_interval = 3600\n";

pub fn command(volfs: &Volfs, shell: &[&str], script: &Path, env: &[(&str, &str)], args: &[&str]) -> Command {
    let mut command = Command::new(shell[0]);
    command.args(&shell[1..]).arg(script).args(args).env("VOLFS", volfs.root()).envs(env.iter().copied());
    command.current_dir(volfs.scratch("")).stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
    command
}

/// Runs a shipped script in one shell.
pub fn run(volfs: &Volfs, shell: &[&str], name: &str, env: &[(&str, &str)], args: &[&str]) -> Said {
    finish(command(volfs, shell, &shipped(name), env, args).spawn().unwrap())
}

#[track_caller]
pub fn ok(volfs: &Volfs, shell: &[&str], name: &str, env: &[(&str, &str)], args: &[&str]) -> Said {
    let said = run(volfs, shell, name, env, args);
    assert_eq!(said.status, 0, "{name} in {shell:?}: {said:?}\n{}", volfs.log());
    said
}

/// The shipped file without the lines that speak of snapshots: the loop provider has none.
fn without_snapshots(volfs: &Volfs, name: &str) -> PathBuf {
    let text = fs::read_to_string(shipped(name)).unwrap();
    let kept = |l: &&str| !["\"snapshot ", "\"revert ", "\"delete-snapshot "].iter().any(|s| l.contains(s));
    let path = volfs.scratch(name);
    fs::write(&path, text.lines().filter(kept).map(|l| format!("{l}\n")).collect::<String>()).unwrap();
    path
}

#[track_caller]
fn ok_without_snapshots(volfs: &Volfs, shell: &[&str], name: &str, env: &[(&str, &str)]) -> Said {
    let path = without_snapshots(volfs, name);
    let said = finish(command(volfs, shell, &path, env, &[]).spawn().unwrap());
    assert_eq!(said.status, 0, "{name} in {shell:?}: {said:?}\n{}", volfs.log());
    said
}

pub fn disk(volfs: &Volfs, job: &str, disk: &str) -> String {
    let link = fs::read_link(volfs.path(format!("jobs/{job}/disks/{disk}"))).unwrap();
    link.file_name().unwrap().to_str().unwrap().to_owned()
}

pub fn volumes(volfs: &Volfs) -> Vec<String> {
    let names = fs::read_dir(volfs.state().join("loop/volumes")).unwrap();
    let mut names: Vec<_> = names.map(|e| e.unwrap().file_name().into_string().unwrap()).collect();
    names.sort();
    names
}

fn shell_name(shell: &[&str]) -> String {
    shell[0].to_owned()
}

/// An image of `n` bytes of one letter.
pub fn image(volfs: &Volfs, name: &str, letter: u8, n: usize) {
    fs::write(volfs.scratch(name), vec![letter; n]).unwrap();
}

pub fn head(volfs: &Volfs, job: &str, name: &str) -> String {
    volfs.ok(&format!("head -c 4 $R/jobs/{job}/disks/{name}/block"))
}

const SIZES: [&str; 2] = ["disk-2000=2M=src0.raw", "disk-2001=1M"];

#[test]
fn r2_predecessor_75_provisioning_twice_is_the_same_as_once_in_every_shell() {
    let volfs = Volfs::start_with(&[], QUIET);
    image(&volfs, "src0.raw", b'a', 1 << 20);
    for shell in SHELLS {
        let job = shell_name(shell);
        let env = [("JOB", job.as_str()), ("VM_NAME", "web one")];
        ok(&volfs, shell, "provision", &env, &SIZES);
        let first = [disk(&volfs, &job, "disk-2000"), disk(&volfs, &job, "disk-2001")];
        let seq = of(&volfs, &first[0], "incarnation");
        assert_eq!(volfs.value(format!("jobs/{job}/status")), "idle attached=2");
        assert_eq!(volfs.value(format!("jobs/{job}/vm_name")), "web one");
        assert_eq!(head(&volfs, &job, "disk-2000"), "aaaa");
        ok(&volfs, shell, "provision", &env, &SIZES);
        assert_eq!([disk(&volfs, &job, "disk-2000"), disk(&volfs, &job, "disk-2001")], first);
        assert_eq!(of(&volfs, &first[0], "incarnation"), seq, "it was not even attached again");
        ok(&volfs, shell, "cleanup-failed-job", &env, &["--yes"]);
    }
    assert!(volumes(&volfs).is_empty());
    assert_eq!(volfs.ok("ls $R/jobs"), "");
}

/// The shipped files' names.
pub fn all() -> Vec<String> {
    let names = fs::read_dir(shipped("")).unwrap().map(|e| e.unwrap().file_name().into_string().unwrap());
    let mut names: Vec<_> = names.collect();
    names.sort();
    names
}

/// What each of them is content with, where volfs is mounted.
pub fn fitting(volfs: &Volfs, name: &str, uuid: &str) -> Command {
    let args: &[&str] = match name {
        "provision" => &["d=1M"],
        "cleanup-failed-job" => &["--yes"],
        _ => &[],
    };
    let env = [("JOB", "a"), ("VM_NAME", "w"), ("NEW", "b"), ("OS_DISK", "d"), ("TEST_VM", uuid), ("VM", uuid)];
    command(volfs, &["dash"], &shipped(name), &env, args)
}

/// Where nothing is mounted a script must fail before its first change, and make no plain files.
#[test]
fn predecessor_65_every_script_stops_where_volfs_is_not_mounted() {
    let mut volfs = Volfs::start_with(&[], QUIET);
    let uuids = volfs.job("a", &["d"], "1M");
    volfs.terminate();
    let before = fs::read_dir(volfs.scratch("")).unwrap().count();
    for name in all() {
        let fits = fitting(&volfs, &name, &uuids[0]);
        for shell in SHELLS {
            let mut command = Command::new(shell[0]);
            command.args(&shell[1..]).args(fits.get_args()).current_dir(volfs.scratch("")).stdin(Stdio::null());
            command.envs(fits.get_envs().filter_map(|(k, v)| Some((k, v?))));
            let said = said_of(command.output().unwrap());
            assert_ne!(said.status, 0, "{name} in {shell:?}");
            assert!(said.err.contains("version"), "{name}: {said:?}");
        }
    }
    assert_eq!(fs::read_dir(volfs.root()).unwrap().count(), 0, "no plain files below the empty mount point");
    assert_eq!(fs::read_dir(volfs.scratch("")).unwrap().count(), before, "nor anywhere else");
    assert_eq!(volumes(&volfs), uuids);
    volfs.launch();
    assert_eq!(volfs.ok("ls $R/jobs/a/disks"), "d");
}

/// The same with a daemon that died: the mount is there, and answers nothing.
#[test]
fn predecessor_65_a_dead_daemon_is_not_nothing_to_do() {
    let mut volfs = Volfs::start_with(&[], QUIET);
    let uuids = volfs.job("a", &["d"], "1M");
    volfs.kill();
    for name in all() {
        let said = finish(fitting(&volfs, &name, &uuids[0]).spawn().unwrap());
        assert_ne!(said.status, 0, "{name}: {said:?}");
    }
    assert_eq!(volumes(&volfs), uuids);
    volfs.launch();
    ok(&volfs, &["dash"], "cleanup-failed-job", &[("JOB", "a")], &["--yes"]);
    assert!(volumes(&volfs).is_empty());
}

#[test]
fn predecessor_116_a_failed_start_leaves_nothing_half_done_and_a_rerun_finishes() {
    let config = "reconcile_interval = 3600\n[loop]\ncapacity = \"3M\"\n";
    let volfs = Volfs::start_with(&[], config);
    image(&volfs, "src0.raw", b'a', 1 << 20);
    let env = [("JOB", "a"), ("VM_NAME", "w")];
    let said = run(&volfs, &["dash"], "provision", &env, &["disk-0=2M=src0.raw", "disk-1=2M"]);
    assert_ne!(said.status, 0, "the second does not fit");
    assert!(volfs.read("jobs/a/error").unwrap().contains("ENOSPC"));
    assert_eq!(volfs.value("jobs/a/status"), "idle detached=1", "nothing was attached for a start that failed");
    // With the trap that the predecessor lacked, a later failure detaches what is attached.
    let guarded = volfs.scratch("guarded.sh");
    let script = "set -eu\nR=$VOLFS; read -r _ < \"$R/version\"\ntrap 'exit 1' HUP INT TERM\nJ=$R/jobs/a\n\
                  trap 'echo detach > \"$J/control\"' EXIT\necho attach > \"$J/control\"\nfalse\n";
    fs::write(&guarded, script).unwrap();
    for shell in SHELLS {
        let said = finish(command(&volfs, shell, &guarded, &[], &[]).spawn().unwrap());
        assert_eq!(said.status, 1, "{said:?}");
        assert_eq!(volfs.value("jobs/a/status"), "idle detached=1");
    }
    ok(&volfs, &["dash"], "provision", &env, &["disk-0=2M=src0.raw", "disk-1=1M"]);
    assert_eq!(volfs.value("jobs/a/status"), "idle attached=2");
}

#[test]
fn predecessor_113_disks_listed_in_another_order_change_nothing() {
    let volfs = Volfs::start_with(&[], QUIET);
    image(&volfs, "zero", b'0', 1 << 20);
    image(&volfs, "one", b'1', 1 << 20);
    let env = [("JOB", "a"), ("VM_NAME", "w")];
    ok(&volfs, &["dash"], "provision", &env, &["disk-2000=1M=zero", "disk-2001=1M=one"]);
    let was = [disk(&volfs, "a", "disk-2000"), disk(&volfs, "a", "disk-2001")];
    ok(&volfs, &["bash"], "provision", &env, &["disk-2001=1M=one", "disk-2000=1M=zero"]);
    assert_eq!([disk(&volfs, "a", "disk-2000"), disk(&volfs, "a", "disk-2001")], was);
    assert_eq!((head(&volfs, "a", "disk-2000"), head(&volfs, "a", "disk-2001")), ("0000".into(), "1111".into()));
    assert_eq!(volumes(&volfs).len(), 2);
    // Nor does a detach and another order of attaching, which gives other device names.
    volfs.ok("echo detach > $R/jobs/a/control");
    volfs.ok("for d in disk-2001 disk-2000; do echo attach > $R/jobs/a/disks/$d/control; done");
    assert_eq!((head(&volfs, "a", "disk-2000"), head(&volfs, "a", "disk-2001")), ("0000".into(), "1111".into()));
}

#[test]
fn predecessor_112_a_disk_that_is_no_whole_gib_keeps_one_volume_over_three_runs() {
    let volfs = Volfs::start_with(&[], QUIET);
    let env = [("JOB", "a"), ("VM_NAME", "w")];
    let odd = format!("disk-2000={}", (1_u64 << 30) + 1);
    for shell in SHELLS {
        ok(&volfs, shell, "provision", &env, &[&odd]);
        assert_eq!(volumes(&volfs).len(), 1);
    }
    let uuid = disk(&volfs, "a", "disk-2000");
    assert!(of(&volfs, &uuid, "size").parse::<u64>().unwrap() > 1 << 30, "never smaller than asked");
    let kernel = volfs.ok(&format!("blockdev --getsize64 $R/volumes/{uuid}/block"));
    assert_eq!(kernel, of(&volfs, &uuid, "size"));
}

#[test]
fn predecessor_111_two_vms_of_one_name_and_size_have_volumes_of_their_own() {
    let volfs = Volfs::start_with(&[], QUIET);
    image(&volfs, "x", b'x', 1 << 20);
    image(&volfs, "y", b'y', 1 << 20);
    ok(&volfs, &["dash"], "provision", &[("JOB", "vc1-web"), ("VM_NAME", "web")], &["disk-2000=1M=x"]);
    ok(&volfs, &["dash"], "provision", &[("JOB", "vc2-web"), ("VM_NAME", "web")], &["disk-2000=1M=y"]);
    assert_ne!(disk(&volfs, "vc1-web", "disk-2000"), disk(&volfs, "vc2-web", "disk-2000"));
    assert_eq!(head(&volfs, "vc1-web", "disk-2000"), "xxxx");
    assert_eq!(head(&volfs, "vc2-web", "disk-2000"), "yyyy");
}

#[test]
fn predecessor_66_cleaning_one_job_leaves_every_other_as_it_was() {
    let gate = Gate::new();
    let volfs = Volfs::start_with(&[("VOLFS_FAILPOINTS", &gate.wait("create.after-call"))], QUIET);
    let mine = volfs.job("mine", &["d", "e"], "1M");
    let others = volfs.job("other", &["d"], "1M");
    volfs.ok("mkdir $R/jobs/third; echo attach > $R/jobs/mine/control; echo attach > $R/jobs/other/control");
    // A third one is between the cloud's volume and its own record of it.
    let held = gate.close();
    let creating = volfs.sh_spawn(&["dash"], "echo create d 1M > $R/jobs/third/control");
    volfs.until("the volume in the cloud", || volumes(&volfs).len() == 4);
    let look = || {
        let text = |p: String| volfs.read(p).unwrap();
        (
            text("jobs/other/table".into()),
            text(format!("volumes/{}/info.json", others[0])).split("\"seen\"").next().unwrap().to_owned(),
            of(&volfs, &others[0], "incarnation"),
            meta(&volfs, &others[0]),
        )
    };
    let was = look();
    ok(&volfs, &["dash"], "cleanup-failed-job", &[("JOB", "mine")], &["--yes"]);
    assert_eq!(look(), was);
    assert_eq!(volfs.value("jobs/third/status"), "busy creating=1");
    held.release();
    assert_eq!(finish(creating).status, 0);
    assert_eq!(volfs.value("jobs/third/status"), "idle detached=1");
    let mut left = vec![others[0].clone(), disk(&volfs, "third", "d")];
    left.sort();
    assert_eq!(volumes(&volfs), left);
    assert!(mine.iter().all(|u| !stored(&volfs, u).exists()));
}

#[test]
fn predecessor_61_cleaning_a_job_cannot_reach_a_volume_that_only_its_papers_name() {
    let volfs = Volfs::start_with(&[], QUIET);
    let victim = &volfs.job("pgwintestbios", &["disk-2000"], "1M")[0];
    let own = &volfs.job("pgtest2", &["disk-2000"], "1M")[0];
    // The job's note, its VM's name and the disk's name all say the same as the other's.
    volfs.ok("echo pgwintestbios > $R/jobs/pgtest2/vm_name");
    assert!(!volfs.path(format!("jobs/pgtest2/volumes/{victim}")).exists());
    assert_eq!(volfs.write(format!("jobs/pgtest2/volumes/{victim}/control"), "attach"), libc::ENOENT);
    assert_eq!(volfs.write("jobs/pgtest2/disks/disk-2000/control", &format!("delete {victim}")), libc::EINVAL);
    // A volume that came to carry another owner's mark is in nobody's way, and is not deleted.
    edit_meta(&volfs, own, |m| m["mark"] = FOREIGN.into());
    let said = run(&volfs, &["dash"], "cleanup-failed-job", &[("JOB", "pgtest2")], &["--yes"]);
    assert_ne!(said.status, 0);
    assert!(said.err.contains(FOREIGN), "the script shows why: {said:?}");
    assert!(stored(&volfs, own).exists() && stored(&volfs, victim).exists());
    assert_eq!(of(&volfs, victim, "status"), "detached");
}

#[test]
fn predecessor_63_a_volume_that_refuses_to_go_keeps_the_job_and_a_rerun_finishes() {
    for shell in SHELLS {
        let volfs = Volfs::start_with(&[], QUIET);
        let uuids = volfs.job("a", &["d", "e"], "1M");
        volfs.ok("echo attach > $R/jobs/a/control");
        let user = fs::File::open(volfs.path(format!("volumes/{}/block", uuids[1]))).unwrap();
        let said = run(&volfs, shell, "cleanup-failed-job", &[("JOB", "a")], &["--yes"]);
        assert_eq!(said.status, 1, "{said:?}");
        assert!(said.err.contains(&format!("pid {}", std::process::id())), "the reason on stderr: {said:?}");
        assert_eq!(volfs.ok("ls $R/jobs/a/disks"), "d\ne");
        assert_eq!(volumes(&volfs).len(), 2);
        drop(user);
        ok(&volfs, shell, "cleanup-failed-job", &[("JOB", "a")], &["--yes"]);
        assert!(volumes(&volfs).is_empty());
    }
}

#[test]
fn predecessor_76_cleaning_up_never_detaches_a_running_vms_disks() {
    let volfs = Volfs::start_with(&[], QUIET);
    let uuids = volfs.job("a", &["d", "e"], "1M");
    let vm = volfs::model::VmId::random().to_string();
    volfs.ok(&format!("echo attach vm={vm} > $R/jobs/a/control"));
    fs::write(volfs.state().join(format!("loop/vms/{vm}.json")), "{\"running\":true}").unwrap();
    let said = run(&volfs, &["dash"], "cleanup-failed-job", &[("JOB", "a")], &["--yes"]);
    assert_eq!(said.status, 1);
    assert_eq!(volfs.ok("rmdir $R/jobs/a 2>/dev/null || echo no"), "no");
    assert_eq!(volfs.value("jobs/a/status"), "idle remote=2");
    for uuid in &uuids {
        assert_eq!(meta(&volfs, uuid)["attached"]["vm"], vm);
    }
}

#[test]
fn predecessor_70_odd_names_are_refused_and_reach_nothing() {
    let volfs = Volfs::start_with(&[], QUIET);
    volfs.job("a", &["d"], "1M");
    let long = "x".repeat(300);
    for (job, says) in [
        ("..", "File exists"),
        ("a/b", "Operation not permitted"),
        ("a' OR '1'='1", "Invalid argument"),
        ("a\nb", "Invalid argument"),
        (".x", "Invalid argument"),
        ("a;DROP TABLE jobs", "Invalid argument"),
        (long.as_str(), "Invalid argument"),
    ] {
        let made = volfs.sh(&format!("mkdir \"$R/jobs/\"'{}'", job.replace('\'', "'\\''")));
        assert_ne!(made.status, 0, "{job:?}");
        assert!(made.err.contains(says), "{job:?}: {made:?}");
        let said = run(&volfs, &["dash"], "cleanup-failed-job", &[("JOB", job)], &["--yes"]);
        assert_ne!(said.status, 0, "{job:?}");
    }
    assert_eq!(volfs.ok("ls $R/jobs"), "a");
    assert_eq!(volumes(&volfs).len(), 1);
}

#[test]
fn predecessor_72_a_loop_over_disks_under_set_e_reaches_every_one() {
    let volfs = Volfs::start_with(&[], QUIET);
    volfs.job("a", &["d", "e", "f"], "1M");
    volfs.ok("echo attach > $R/jobs/a/control");
    for shell in SHELLS {
        let said =
            volfs.sh_in(shell, "set -eu; n=0; for d in $R/jobs/a/disks/*; do cat $d/device; n=$((n+1)); done; echo $n");
        assert_eq!(said.status, 0, "{said:?}");
        assert_eq!(said.out.lines().count(), 4);
        assert!(said.out.ends_with("\n3\n"));
        // Names of disks need no migration step: each read finds the present device.
        let said = volfs
            .sh_in(shell, "tail -n +2 $R/jobs/a/table | while IFS='\t' read -r job disk rest; do echo $disk; done");
        assert_eq!(said.out, "d\ne\nf\n");
    }
}

pub fn test_vm(volfs: &Volfs) -> String {
    let vm = volfs::model::VmId::random().to_string();
    assert_eq!(volfs.write("control", &format!("reconcile vm={vm}")), 0);
    vm
}

#[test]
fn predecessor_98_a_failover_test_that_fails_is_rolled_back_by_its_trap() {
    for shell in SHELLS {
        let volfs = Volfs::start_with(&[], QUIET);
        let uuids = volfs.job("a", &["disk-2000", "disk-2001"], "1M");
        volfs.ok("echo attach > $R/jobs/a/control");
        let vm = test_vm(&volfs);
        let env = [("JOB", "a"), ("TEST_VM", vm.as_str()), ("OS_DISK", "disk-2000")];
        // A data disk that fails after the root disk was handed over: all come back.
        let script = without_snapshots(&volfs, "failover-test.sh");
        let mark = meta(&volfs, &uuids[1])["mark"].clone();
        volfs.ok("echo detach > $R/jobs/a/control");
        let sabotage = fs::read_to_string(&script).unwrap().replace("for d in", "mv_mark\nfor d in");
        let store = stored(&volfs, &uuids[1]);
        let helper = format!(
            "mv_mark() {{ sed -i 's|{}|{FOREIGN}|' {}/meta.json; }}\n",
            mark.as_str().unwrap(),
            store.display()
        );
        let bad = volfs.scratch("bad.sh");
        fs::write(&bad, helper + &sabotage).unwrap();
        let said = finish(command(&volfs, shell, &bad, &env, &[]).spawn().unwrap());
        assert_ne!(said.status, 0, "{said:?}");
        assert_eq!(of(&volfs, &uuids[0], "vm"), "", "the root disk is not left on the test VM: {said:?}");
        edit_meta(&volfs, &uuids[1], |m| m["mark"] = mark);
        volfs.ok("for d in $R/jobs/a/disks/*; do echo reconcile > $d/control; done");

        // And the run after that succeeds, twice.
        for _ in 0..2 {
            ok_without_snapshots(&volfs, shell, "failover-test.sh", &env);
            assert_eq!(volfs.value("jobs/a/status"), "idle remote=2");
            assert_eq!(of(&volfs, &uuids[0], "device_id"), "0");
        }
        for _ in 0..2 {
            let said = ok_without_snapshots(&volfs, shell, "failover-rollback.sh", &env);
            assert_eq!(said.out, "", "nothing is left on the test VM");
            assert_eq!(volfs.value("jobs/a/status"), "idle attached=2");
        }
    }
}

#[test]
fn predecessor_98_a_term_in_the_middle_rolls_back_too() {
    // dash runs no EXIT trap when a signal ends it: the third line of every script is for that.
    for shell in SHELLS {
        let gate = Gate::new();
        let volfs = Volfs::start_with(&[("VOLFS_FAILPOINTS", &gate.wait("attach.before-call"))], QUIET);
        let uuids = volfs.job("a", &["disk-2000", "disk-2001"], "1M");
        volfs.ok("echo attach > $R/jobs/a/control");
        let vm = test_vm(&volfs);
        let env = [("JOB", "a"), ("TEST_VM", vm.as_str()), ("OS_DISK", "disk-2000")];
        let script = without_snapshots(&volfs, "failover-test.sh");
        let held = gate.close();
        let child = command(&volfs, shell, &script, &env, &[]).spawn().unwrap();
        volfs.until("the hand-over", || of(&volfs, &uuids[0], "status") == "attaching");
        running(&volfs, "attach vm=");
        // SAFETY: kill(2) takes no pointers; the pid is our own child, not yet waited for.
        unsafe { libc::kill(child.id() as i32, libc::SIGTERM) };
        // EINTR stands there only until the refusal of the trap's detach, which follows at once.
        let said = || volfs.value(format!("volumes/{}/error", uuids[0]));
        volfs.until("the interruption", || said().contains("EINTR") || said().contains("EBUSY"));
        held.release();
        assert_ne!(finish(child).status, 0);
        // The trap's detach may meet the attach that goes on: then it says so, and a rerun takes it back.
        volfs.until("the end", || !volfs.value("jobs/a/status").starts_with("busy"));
        ok_without_snapshots(&volfs, shell, "failover-rollback.sh", &env);
        assert_eq!(volfs.value("jobs/a/status"), "idle attached=2", "{}", volfs.log());
    }
}

/// Runs a script whose shell is killed with SIGKILL after its `n`th line that writes to a control.
fn killed_after(volfs: &Volfs, shell: &[&str], script: &Path, env: &[(&str, &str)], n: usize) -> bool {
    let mut seen = 0;
    let mut cut = String::new();
    for line in fs::read_to_string(script).unwrap().lines() {
        cut.push_str(line);
        cut.push('\n');
        let command = line.trim_start();
        if command.starts_with("echo ") && command.contains("control\"") {
            seen += 1;
            if seen == n {
                cut.push_str("kill -9 $$\n");
                break;
            }
        }
    }
    if seen < n {
        return false;
    }
    let path = volfs.scratch("cut.sh");
    // A loop that was cut open is no script: it is closed again.
    let opened = cut.lines().filter(|l| l.starts_with("for ")).count();
    let closed = cut.lines().filter(|l| l.trim() == "done").count();
    cut.push_str(&"done\n".repeat(opened - closed));
    fs::write(&path, cut).unwrap();
    let said = finish(command(volfs, shell, &path, env, &[]).spawn().unwrap());
    assert_eq!(said.status, -9, "{said:?}");
    true
}

#[test]
fn predecessor_59_the_rollback_killed_at_each_line_and_rerun_ends_right() {
    let volfs = Volfs::start_with(&[], QUIET);
    volfs.job("a", &["disk-2000", "disk-2001"], "1M");
    let vm = test_vm(&volfs);
    let env = [("JOB", "a"), ("TEST_VM", vm.as_str()), ("OS_DISK", "disk-2000")];
    let rollback = without_snapshots(&volfs, "failover-rollback.sh");
    let mut n = 1;
    loop {
        ok_without_snapshots(&volfs, &["dash"], "failover-test.sh", &env);
        assert_eq!(volfs.value("jobs/a/status"), "idle remote=2");
        if !killed_after(&volfs, &["dash"], &rollback, &env, n) {
            break;
        }
        ok_without_snapshots(&volfs, &["dash"], "failover-rollback.sh", &env);
        assert_eq!(volfs.value("jobs/a/status"), "idle attached=2");
        assert_eq!(volfs.ok(&format!("ls $R/vms/{vm}")), "");
        n += 1;
    }
    assert!(n > 3, "{n}");
}

#[test]
fn predecessor_98_the_failover_test_killed_at_each_line_and_rerun_ends_right() {
    let volfs = Volfs::start_with(&[], QUIET);
    let uuids = volfs.job("a", &["disk-2000", "disk-2001"], "1M");
    let vm = test_vm(&volfs);
    let env = [("JOB", "a"), ("TEST_VM", vm.as_str()), ("OS_DISK", "disk-2000")];
    let script = without_snapshots(&volfs, "failover-test.sh");
    let mut n = 1;
    loop {
        volfs.ok("echo attach > $R/jobs/a/control");
        if !killed_after(&volfs, &["dash"], &script, &env, n) {
            break;
        }
        ok_without_snapshots(&volfs, &["dash"], "failover-test.sh", &env);
        assert_eq!(volfs.value("jobs/a/status"), "idle remote=2");
        assert_eq!(of(&volfs, &uuids[0], "device_id"), "0");
        ok_without_snapshots(&volfs, &["dash"], "failover-rollback.sh", &env);
        n += 1;
    }
    assert!(n > 2, "{n}");
}

#[test]
fn r9_the_rollback_says_what_is_left_on_the_test_vm_and_fails_when_it_cannot_tell() {
    let volfs = Volfs::start_with(&[], QUIET);
    volfs.job("a", &["disk-2000"], "1M");
    let vm = test_vm(&volfs);
    let env = [("JOB", "a"), ("TEST_VM", vm.as_str()), ("OS_DISK", "disk-2000")];
    ok_without_snapshots(&volfs, &["dash"], "failover-test.sh", &env);
    let own = foreign_volume(&volfs, None);
    edit_meta(&volfs, &own, |m| m["attached"] = serde_json::json!({"vm": vm, "device_id": 9}));
    let said = ok_without_snapshots(&volfs, &["dash"], "failover-rollback.sh", &env);
    assert_eq!(said.out, format!("still on {vm}: {own}\n"));
    // A volume that cannot be read may be there: silence here would cost it.
    fs::write(stored(&volfs, &own).join("meta.json"), "{").unwrap();
    let path = without_snapshots(&volfs, "failover-rollback.sh");
    let said = finish(command(&volfs, &["dash"], &path, &env, &[]).spawn().unwrap());
    assert_ne!(said.status, 0, "{said:?}");
}
