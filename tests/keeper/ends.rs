//! Daemons that die at once, a keeper that dies, and the ends of both.

use std::fs;
use std::path::PathBuf;
use std::process::Child;
use std::time::Duration;

use crate::common::{PATIENCE, Volfs, finish};
use crate::{kept, next_after, outcomes};

fn mounted(volfs: &Volfs) -> bool {
    fs::read_to_string("/proc/self/mountinfo").unwrap().contains(&format!(" {} ", volfs.root().display()))
}

#[test]
fn daemons_that_die_at_once_end_in_a_clean_unmount_with_the_reason_in_the_log() {
    let mut volfs = kept(&[], false);
    let (dies, hold) = (volfs.scratch("dies"), volfs.scratch("hold"));
    let points = format!("daemon.start=kill:{};attach.before-call=wait:{}", dies.display(), hold.display());
    volfs.set_env(&[("VOLFS_FAILPOINTS", &points)]);
    volfs.launch();
    volfs.job("a", &["d"], "1M");
    fs::write(&hold, "").unwrap();
    let parked = volfs.sh_spawn(&["bash"], "echo attach > $R/jobs/a/disks/d/control");
    volfs.until("a parked attach", || volfs.read("jobs/a/status").is_ok_and(|s| s.contains("attaching=1")));
    fs::write(&dies, "").unwrap();
    volfs.kill_kept();
    assert_eq!(volfs.wait(), 1, "{}", volfs.log());
    assert!(!mounted(&volfs));
    assert_ne!(finish(parked).status, 0, "its caller is told that it is over");
    let log = volfs.log();
    assert!(log.contains("12 daemons in a row died at once") && log.contains("killed by signal 9"), "{log}");
    // Nothing is lost: the next start settles what was cut off.
    fs::remove_file(&dies).unwrap();
    fs::remove_file(&hold).unwrap();
    volfs.launch();
    volfs.until("settled", || volfs.value("jobs/a/status").starts_with("idle "));
    assert_eq!(volfs.write("jobs/a/disks/d/control", "attach"), 0);
}

#[test]
fn a_daemon_that_cannot_start_says_why_and_no_keeper_stays() {
    let mut volfs = kept(&[], false);
    fs::write(volfs.state(), "a file").unwrap();
    let words = volfs.try_launch().unwrap_err();
    assert!(words.contains("state"), "{words}");
    fs::remove_file(volfs.state()).unwrap();
}

#[test]
fn without_its_keeper_a_daemon_serves_on_and_says_so_and_its_death_frees_every_caller() {
    let hold = "attach.before-call=wait:HOLD";
    let mut volfs = kept(&[], false);
    let held = volfs.scratch("hold");
    volfs.set_env(&[("VOLFS_FAILPOINTS", &hold.replace("HOLD", held.to_str().unwrap()))]);
    volfs.launch();
    volfs.job("a", &["d", "e"], "1M");
    let daemon = volfs.kept_pid().unwrap();
    volfs.kill();
    volfs.until("health", || {
        volfs.read("health").is_ok_and(|h| h.starts_with("degraded\n") && h.contains("keeper degraded: "))
    });
    assert!(volfs.read("problems").unwrap().contains("keeper"), "{}", volfs.log());
    assert_eq!(volfs.write("jobs/a/disks/e/control", "attach"), 0, "it serves on");
    fs::write(&held, "").unwrap();
    let parked = volfs.sh_spawn(&["dash"], "echo attach > $R/jobs/a/disks/d/control");
    volfs.until("a parked attach", || volfs.read("jobs/a/status").is_ok_and(|s| s.contains("attaching=1")));
    // SAFETY: kill(2) takes no pointers; the pid was the killed keeper's child and is alive.
    unsafe { libc::kill(daemon, libc::SIGKILL) };
    assert_ne!(finish(parked).status, 0, "freed with an error");
    let dead = fs::metadata(volfs.path("version")).unwrap_err().raw_os_error();
    assert_eq!(dead, Some(libc::ENOTCONN));
}

#[test]
fn a_stop_ends_both_and_takes_the_mount_away() {
    let mut volfs = kept(&[], false);
    volfs.launch();
    let daemon = volfs.kept_pid().unwrap();
    let (status, took) = volfs.terminate();
    assert!(status == 0 && took < PATIENCE, "{status} after {took:?}\n{}", volfs.log());
    assert!(!mounted(&volfs));
    assert!(fs::metadata(format!("/proc/{daemon}")).is_err());
    // And an unmount from outside.
    volfs.launch();
    let daemon = volfs.kept_pid().unwrap();
    let said = volfs.sh(&format!("umount {}", volfs.root().display()));
    assert_eq!(said.status, 0, "{said:?}");
    assert_eq!(volfs.wait(), 0);
    assert!(fs::metadata(format!("/proc/{daemon}")).is_err());
}

#[test]
fn a_caller_of_the_dead_daemon_can_be_killed_at_any_time() {
    let mut volfs = kept(&[], false);
    let held = volfs.scratch("hold");
    volfs.set_env(&[("VOLFS_FAILPOINTS", &format!("attach.before-call=wait:{}", held.display()))]);
    volfs.launch();
    volfs.job("a", &["d"], "1M");
    fs::write(&held, "").unwrap();
    let mut parked = volfs.sh_spawn(&["dash"], "echo attach > $R/jobs/a/disks/d/control");
    volfs.until("a parked attach", || volfs.read("jobs/a/status").is_ok_and(|s| s.contains("attaching=1")));
    next_after(&volfs, volfs.kill_kept());
    parked.kill().unwrap();
    let began = std::time::Instant::now();
    parked.wait().unwrap();
    assert!(began.elapsed() < Duration::from_secs(10), "{:?}", began.elapsed());
    fs::remove_file(&held).unwrap();
}

/// One that parks `attach` before its call while HOLD is there, and whose memory is full while FULL is,
/// on a kernel that sends nothing again.
fn parking(more: &str) -> (Volfs, PathBuf, PathBuf) {
    let mut volfs = kept(&[], true);
    let (hold, full) = (volfs.scratch("hold"), volfs.scratch("full"));
    let points = format!(
        "keep.no-resend=fail;attach.before-call=wait:{};keep.full=fail:{}{more}",
        hold.display(),
        full.display()
    );
    volfs.set_env(&[("VOLFS_FAILPOINTS", &points)]);
    volfs.launch();
    volfs.job("a", &["d", "e"], "1M");
    fs::write(&hold, "").unwrap();
    (volfs, hold, full)
}

fn park(volfs: &Volfs, disk: &str, now: usize) -> Child {
    let shell = volfs.sh_spawn(&["dash"], &format!("echo attach > $R/jobs/a/disks/{disk}/control"));
    let parked = format!("attaching={now}");
    volfs.until("a parked attach", || volfs.read("jobs/a/status").is_ok_and(|s| s.contains(&parked)));
    shell
}

#[test]
fn a_request_that_no_daemon_can_answer_ends_the_connection_and_the_tree_is_mounted_anew() {
    let (volfs, hold, full) = parking(";keep.no-sweep=fail");
    let known = park(&volfs, "e", 1);
    fs::write(&full, "").unwrap();
    let lost = park(&volfs, "d", 2);
    fs::remove_file(&full).unwrap();
    let next = next_after(&volfs, volfs.kill_kept());
    // Neither is answered by what it waits for: the hold is still there.
    let (lost, known) = (finish(lost), finish(known));
    assert!(lost.status != 0 && known.status != 0, "freed with an error: {lost:?} {known:?}\n{}", volfs.log());
    volfs.until("a tree that was mounted anew", || {
        volfs.kept_pid().is_some_and(|pid| pid != next) && volfs.read("version").is_ok()
    });
    assert!(volfs.log().contains("not known here and would wait for ever"), "{}", volfs.log());
    let at = format!(" {} ", volfs.root().display());
    let mounts = fs::read_to_string("/proc/self/mountinfo").unwrap();
    assert_eq!(mounts.lines().filter(|line| line.contains(&at)).count(), 1, "{mounts}");
    // No operation is lost with its caller, and none is done twice.
    fs::remove_file(&hold).unwrap();
    volfs.until("settled", || volfs.value("jobs/a/status").starts_with("idle "));
    for disk in ["d", "e"] {
        assert_eq!(volfs.write(format!("jobs/a/disks/{disk}/control"), "attach"), 0, "{}", volfs.log());
        let done = outcomes(&volfs, "attach", disk).iter().filter(|outcome| *outcome == "done").count();
        assert_eq!(done, 1, "{disk}\n{}", volfs.log());
    }
    assert_eq!(volfs.loops().len(), 2);
}

#[test]
fn a_request_that_no_daemon_knows_any_more_is_answered_and_a_busy_connection_goes_on() {
    let (volfs, hold, full) = parking("");
    let known = park(&volfs, "e", 1);
    fs::write(&full, "").unwrap();
    let lost = park(&volfs, "d", 2);
    fs::remove_file(&full).unwrap();
    let reading = "n=0; while [ $n -lt 150 ]; do cat $R/table $R/jobs/a/status; n=$((n + 1)); done >/dev/null 2>&1";
    let readers: Vec<Child> = (0..8).map(|_| volfs.sh_spawn(&["dash"], reading)).collect();
    let next = next_after(&volfs, volfs.kill_kept());
    let lost = finish(lost);
    assert!(lost.status != 0 && lost.err.contains("Input/output error") || lost.err.contains("I/O"), "{lost:?}");
    for reader in readers {
        finish(reader);
    }
    volfs.until("the end of the watch", || volfs.log().contains("is answered or waits here"));
    fs::remove_file(&hold).unwrap();
    assert_eq!(finish(known).status, 0, "{}", volfs.log());
    assert_eq!(volfs.kept_pid(), Some(next), "{}", volfs.log());
    // Nothing of it had begun, and it is not done behind its caller's back.
    volfs.until("settled", || volfs.value("jobs/a/status") == "idle detached=1 attached=1");
    assert_eq!((outcomes(&volfs, "attach", "d"), volfs.loops().len()), (vec!["interrupted".to_owned()], 1));
}
