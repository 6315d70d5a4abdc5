//! Scenarios of reference/predecessor-failures.md with several writers, and with others' hands.

use std::time::Duration;

use fakecloud::{Effect, Fault, Kind, Moment, Options};

use crate::common::finish;
use crate::site::Site;

const EINTR: i32 = 4;
const EIO: i32 = 5;
const EBUSY: i32 = 16;

#[test]
fn predecessor_17_what_others_attach_here_is_seen_and_can_be_claimed() {
    let site = Site::start();
    let id = site.cloud.add_volume("somebody's", 1 << 30).unwrap();
    site.cloud.admin_attach(&id, &site.cloud.host()).unwrap();
    site.volfs.until("the volume in unclaimed/", || site.volfs.path(format!("unclaimed/{id}")).exists());
    std::fs::create_dir(site.volfs.path("jobs/j")).unwrap();
    assert_eq!(site.volfs.write("jobs/j/control", &format!("claim {id} d")), 0, "{}", site.volfs.log());
    site.volfs.until("attached", || site.value("j", "d", "status") == "attached");
    assert_eq!(site.in_kernel(&id).len(), 1);
    assert_eq!(site.cloud.calls("attachVolume"), 0);
}

#[test]
fn predecessor_28_of_conflicting_commands_one_proceeds_and_the_other_is_busy_at_once() {
    let site = Site::start();
    let id = site.job("j", &["d"], "1G").remove(0);
    site.cloud.fault(Fault::new("attachVolume", Kind::JobHangs(Moment::Working)));
    let attach = || site.volfs.sh_spawn(&["dash"], "echo attach > $R/jobs/j/disks/d/control");
    let (one, two) = (attach(), attach());
    site.until("the job to hang", |cloud| !cloud.held_jobs().is_empty());
    for other in ["detach", "attach device_id=5", &format!("delete {id}"), "resize 2G", "move j"] {
        let began = std::time::Instant::now();
        let errno = site.disk("j", "d", other);
        assert!(errno == EBUSY || other == "move j", "{other}: {errno}");
        assert!(began.elapsed() < Duration::from_secs(2), "{other}");
    }
    site.cloud.release_jobs();
    assert_eq!((finish(one).status, finish(two).status), (0, 0), "{}", site.volfs.log());
    assert_eq!((site.cloud.calls("attachVolume"), site.cloud.effects(Effect::Attached, Some(&id))), (1, 1));
}

#[test]
fn predecessor_32_a_failed_job_whose_device_came_is_loud_and_never_detached_and_attached_at_once() {
    let site = Site::start();
    let id = site.job("j", &["d"], "1G").remove(0);
    let fails = Kind::JobFails { at: Moment::Done, code: 530, text: "Failed to attach volume d to VM".into() };
    site.cloud.fault(Fault::new("attachVolume", fails));
    assert_ne!(site.disk("j", "d", "attach"), 0);
    site.volfs.until("the conflict", || site.value("j", "d", "status") == "conflict");
    assert!(site.volfs.read("jobs/j/disks/d/device").is_err());
    let problems = site.volfs.read("problems").unwrap();
    assert!(problems.contains(&id) && problems.contains("carries its identity"), "{problems}");
    assert_eq!(site.disk("j", "d", "attach"), EBUSY, "nowhere, before that is put right");
    site.cloud.pull_device(&id).unwrap();
    site.volfs.until("its end", || site.value("j", "d", "status") == "detached");
    assert_eq!(site.disk("j", "d", "attach"), 0, "{}", site.volfs.log());
}

#[test]
fn predecessor_42_an_interrupted_caller_leaves_the_operation_and_a_stop_does_not_wait_for_the_cloud() {
    let mut site = Site::start();
    site.job("j", &["d"], "1G");
    site.cloud.fault(Fault::new("attachVolume", Kind::JobHangs(Moment::Working)));
    let said = site.volfs.sh("timeout -s INT 1 dash -c 'echo attach > $R/jobs/j/disks/d/control'");
    assert_ne!(said.status, 0);
    assert_eq!(site.value("j", "d", "status"), "attaching");
    assert!(site.volfs.read("jobs/j/disks/d/error").unwrap().contains("interrupted"), "EINTR is {EINTR}");
    let (status, took) = site.volfs.terminate();
    assert!(status == 0 && took < Duration::from_secs(5), "{status} {took:?}");
    site.cloud.release_jobs();
    site.volfs.launch();
    site.volfs.until("its end", || site.value("j", "d", "status") == "attached");
    assert_eq!(site.cloud.calls("attachVolume"), 1);
}

/// The record is away from after the cloud's success on, for longer than a moment, and comes back.
#[test]
fn predecessor_33_34_57_a_record_that_fails_after_the_clouds_success_follows_by_itself() {
    for (command, before, after) in [("attach", "detached", "attached"), ("detach", "attached", "detached")] {
        let mut site = Site::prepare(Options::with_loops(), &[], "");
        let (gate, away) = (site.volfs.scratch("gate"), site.volfs.scratch("away"));
        let points =
            format!("store.before-commit=fail:{};{command}.after-call=wait:{}", away.display(), gate.display());
        site.volfs.set_env(&[("VOLFS_FAILPOINTS", &points)]);
        site.volfs.launch();
        let id = site.job("j", &["d"], "1G").remove(0);
        if before == "attached" {
            assert_eq!(site.disk("j", "d", "attach"), 0);
        }
        std::fs::write(&gate, "").unwrap();
        let going = site.volfs.sh_spawn(&["dash"], &format!("echo {command} > $R/jobs/j/disks/d/control"));
        let effect = if after == "attached" { Effect::Attached } else { Effect::Detached };
        site.until("the cloud's success", |cloud| cloud.effects(effect, Some(&id)) == 1);
        std::fs::write(&away, "").unwrap();
        std::fs::remove_file(&gate).unwrap();
        assert_ne!(finish(going).status, 0, "{command}: the record did not take it");
        assert!(site.volfs.read("jobs/j/disks/d/error").unwrap().contains("the record could not take it"));
        assert_eq!(site.value("j", "d", "status"), "unknown", "{command}");
        assert!(site.volfs.read("health").unwrap().starts_with("down\n"), "{command}");
        std::fs::remove_file(&away).unwrap();
        site.volfs.until("its end", || site.value("j", "d", "status") == after);
        assert!(site.volfs.read("health").unwrap().starts_with("ok\n"), "{command}");
        assert_eq!(site.cloud.effects(effect, Some(&id)), 1, "{command}: once");
    }
}

#[test]
fn predecessor_58_a_record_that_fails_before_the_call_starts_nothing() {
    let mut site = Site::prepare(Options::with_loops(), &[], "");
    let away = site.volfs.scratch("away");
    site.volfs.set_env(&[("VOLFS_FAILPOINTS", &format!("store.before-commit=fail:{}", away.display()))]);
    site.volfs.launch();
    site.job("j", &["d"], "1G");
    assert_eq!(site.disk("j", "d", "attach"), 0);
    std::fs::write(&away, "").unwrap();
    assert_eq!(site.disk("j", "d", "detach"), EIO);
    assert_eq!(site.cloud.calls("detachVolume"), 0);
    assert_eq!(site.value("j", "d", "status"), "attached");
    std::fs::remove_file(&away).unwrap();
    assert_eq!(site.disk("j", "d", "detach"), 0, "{}", site.volfs.log());
}
