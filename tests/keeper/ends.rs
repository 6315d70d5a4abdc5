//! Daemons that die at once, a keeper that dies, and the ends of both.

use std::fs;
use std::time::Duration;

use crate::common::{PATIENCE, finish};
use crate::{kept, next_after};

fn mounted(volfs: &crate::common::Volfs) -> bool {
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
