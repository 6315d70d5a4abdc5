//! `volfs upgrade`.

use std::fs;
use std::process::Command;

use crate::common::finish;
use crate::kept;

/// By a program of its own: a descriptor that writes to it, inherited by another test's child, would
/// keep it from being run.
fn copy(to: &std::path::Path) {
    assert!(Command::new("cp").arg(env!("CARGO_BIN_EXE_volfs")).arg(to).status().unwrap().success());
}

#[test]
fn an_upgrade_runs_the_program_that_is_installed_now_and_a_waiting_command_goes_on() {
    let mut volfs = kept(&[], false);
    let (held, program) = (volfs.scratch("hold"), volfs.scratch("volfs"));
    copy(&program);
    volfs.set_program(&program);
    volfs.set_env(&[("VOLFS_FAILPOINTS", &format!("attach.before-call=wait:{}", held.display()))]);
    volfs.launch();
    volfs.job("a", &["d"], "1M");
    fs::write(&held, "").unwrap();
    let parked = volfs.sh_spawn(&["dash"], "echo attach > $R/jobs/a/disks/d/control");
    volfs.until("a parked attach", || volfs.read("jobs/a/status").is_ok_and(|s| s.contains("attaching=1")));
    let old = volfs.kept_pid().unwrap();
    // As a package manager does: the new file beside the old one, then renamed over it.
    let beside = volfs.scratch("volfs.new");
    copy(&beside);
    let new = fs::metadata(&beside).unwrap();
    fs::rename(&beside, &program).unwrap();
    let upgrade = || {
        Command::new(&program)
            .arg("--state-dir")
            .arg(volfs.state())
            .args(["--config", "/dev/null", "upgrade"])
            .arg(volfs.root())
            .output()
            .unwrap()
    };
    let said = upgrade();
    assert!(said.status.success(), "{said:?}\n{}", volfs.log());
    let pid = volfs.kept_pid().unwrap();
    assert_ne!(pid, old);
    let words = String::from_utf8(said.stdout).unwrap();
    assert!(words.contains(&format!("pid {pid} now (pid {old} before)")) && words.lines().count() == 1, "{words}");
    use std::os::unix::fs::MetadataExt;
    assert_eq!(fs::metadata(format!("/proc/{pid}/exe")).unwrap().ino(), new.ino());
    fs::remove_file(&held).unwrap();
    let said = finish(parked);
    assert_eq!(said.status, 0, "{said:?}\n{}", volfs.log());
    assert_eq!(volfs.value("jobs/a/disks/d/status"), "attached");
}

#[test]
fn what_cannot_be_upgraded_is_said_and_left_alone() {
    let run = |volfs: &crate::common::Volfs| {
        let said = Command::new(env!("CARGO_BIN_EXE_volfs"))
            .arg("--state-dir")
            .arg(volfs.state())
            .args(["--config", "/dev/null", "upgrade"])
            .arg(volfs.root())
            .output()
            .unwrap();
        (said.status.code(), String::from_utf8(said.stderr).unwrap())
    };
    let mut volfs = crate::common::Volfs::start();
    let (status, words) = run(&volfs);
    assert!(status == Some(1) && words.contains("keeps nothing for a next one"), "{words}");
    assert!(volfs.read("version").is_ok());
    volfs.terminate();
    let (status, words) = run(&volfs);
    assert!(status == Some(1) && words.contains("no volfs is mounted"), "{words}");
}
