//! mkdir, rmdir, values, and commands for a whole job.

use std::sync::Arc;
use std::time::Duration;

use super::super::{Engine, Left, Target};
use super::fakes::*;
use crate::cloud::{CloudVolume, Refusal};
use crate::command::{Action, Command};
use crate::error::{Errno, Error};
use crate::model::{DiskRow, Status, Verb};

fn destroy(name: &str) -> Action {
    Action::Destroy { job: job_id(name) }
}

#[tokio::test(start_paused = true)]
async fn r6_mkdir_and_rmdir_are_one_commit_each_and_a_failed_one_leaves_nothing() {
    let lab = Lab::new();
    let engine = lab.start().await;
    lab.script(At::Other, Act::Fail);
    let failed = engine.make_job(job_id("j"), root()).wait().await.unwrap_err();
    assert_eq!(failed.errno(), Errno::EIO);
    assert!(engine.world().jobs.is_empty());
    let job = lab.job(&engine, "j").await;
    let again = engine.make_job(job_id("j"), root()).wait().await.unwrap_err();
    assert_eq!(again.errno(), Errno::EEXIST);
    let (_, _) = lab.make(&engine, job, "d").await;
    assert_eq!(engine.forget_job(job, root()).wait().await.unwrap_err().errno(), Errno::ENOTEMPTY);
    let empty = lab.job(&engine, "k").await;
    engine.forget_job(empty, root()).wait().await.unwrap();
    assert!(!engine.world().job_rows.contains_key(&job_id("k")));
    let anew = lab.job(&engine, "k").await;
    assert_ne!(anew, empty, "rows are never used again");
}

#[tokio::test(start_paused = true)]
async fn r6_a_commit_that_takes_too_long_is_eio_within_a_second_and_taken_back() {
    let lab = Lab::new();
    let engine = lab.start().await;
    lab.script(At::Other, Act::HoldBefore);
    let before = tokio::time::Instant::now();
    let error = engine.make_job(job_id("j"), root()).wait().await.unwrap_err();
    let took = before.elapsed();
    assert_eq!(error.errno(), Errno::EIO);
    assert!((800..1000).contains(&took.as_millis()), "{took:?}");
    lab.release(At::Other);
    lab.until("taken back", |s| s.record.jobs.values().all(|j| j.forgotten) && !s.record.jobs.is_empty()).await;
    assert!(engine.world().jobs.is_empty());
    lab.job(&engine, "j").await;
}

#[tokio::test(start_paused = true)]
async fn r5_lowering_hold_takes_root_and_hold_survives_a_restart() {
    let lab = Lab::new();
    let engine = lab.start().await;
    let job = lab.job(&engine, "j").await;
    engine.set_hold(job, true, user()).wait().await.unwrap();
    engine.set_vm_name(job, "source".into(), user()).wait().await.unwrap();
    assert_eq!(engine.set_hold(job, false, user()).wait().await.unwrap_err().errno(), Errno::EPERM);
    lab.kill();
    let engine = lab.start().await;
    let world = engine.world();
    assert!(world.jobs[&job].hold.0);
    assert_eq!(&*world.jobs[&job].vm_name.0, "source");
    assert_eq!(lab.run(&engine, Target::Job(job), destroy("j")).await.unwrap_err().errno(), Errno::EPERM);
    engine.set_hold(job, false, root()).wait().await.unwrap();
    lab.run(&engine, Target::Job(job), destroy("j")).await.unwrap();
}

#[tokio::test(start_paused = true)]
async fn c11_all_are_tried_and_the_errno_is_that_of_the_first_failing_disk() {
    let lab = Lab::new();
    let engine = lab.start().await;
    let job = lab.job(&engine, "j").await;
    let mut rows = Vec::new();
    for disk in ["a", "b", "c", "d"] {
        rows.push(lab.make(&engine, job, disk).await);
    }
    // b is in conflict (EBUSY), c is missing (ENOENT).
    lab.remark(rows[1].1, None);
    lab.state().sky.volumes.remove(&rows[2].1);
    for (row, _) in &rows[1..3] {
        let _unsettled = lab.run(&engine, Target::Volume(*row), Action::Reconcile { vm: None }).await;
    }
    let error = lab.run(&engine, Target::Job(job), attach()).await.unwrap_err();
    let Error::Several { lines } = &error else { panic!("{error}") };
    assert_eq!(lines.iter().map(|(d, _)| d.as_str()).collect::<Vec<_>>(), ["b", "c"]);
    assert_eq!(error.errno(), Errno::EBUSY);
    assert_eq!(lab.status(&engine, rows[0].0), Status::Attached);
    assert_eq!(lab.status(&engine, rows[3].0), Status::Attached);
    assert_eq!(engine.world().jobs[&job].error.clone().unwrap().error.to_string().lines().count(), 2);
    lab.run(&engine, Target::Job(job), detach()).await.unwrap_err();
    assert_eq!(lab.status(&engine, rows[0].0), Status::Detached);
}

#[tokio::test(start_paused = true)]
async fn c11_they_are_tried_side_by_side() {
    let lab = Lab::new();
    let engine = lab.start().await;
    let job = lab.job(&engine, "j").await;
    for disk in ["a", "b", "c"] {
        lab.make(&engine, job, disk).await;
        lab.script(At::Attach, Act::HoldBefore);
    }
    let going = lab.go(&engine, Target::Job(job), attach());
    lab.until_logged("cloud attach", 3).await;
    let same = lab.go(&engine, Target::Job(job), attach());
    assert_eq!(same.op, going.op);
    let other = lab.run(&engine, Target::Job(job), detach()).await.unwrap_err();
    assert_eq!(other.errno(), Errno::EBUSY);
    (0..3).for_each(|_| lab.release(At::Attach));
    going.ticket.wait().await.unwrap();
    assert!(engine.world().volumes.values().all(|v| v.status() == Status::Attached));
}

#[tokio::test(start_paused = true)]
async fn c9_a_job_is_moved_as_a_whole() {
    let lab = Lab::new();
    let engine = lab.start().await;
    let (j, k) = (lab.job(&engine, "j").await, lab.job(&engine, "k").await);
    lab.make(&engine, j, "a").await;
    lab.make(&engine, j, "b").await;
    lab.run(&engine, Target::Job(j), Action::Move { job: job_id("k") }).await.unwrap();
    let world = engine.world();
    assert_eq!((world.jobs[&j].disks.len(), world.jobs[&k].disks.len()), (0, 2));
    engine.forget_job(j, root()).wait().await.unwrap();
}

#[tokio::test(start_paused = true)]
async fn c12_destroy_detaches_verifies_deletes_and_forgets() {
    let lab = Lab::new();
    let engine = lab.start().await;
    let job = lab.job(&engine, "j").await;
    let (a, va) = lab.make(&engine, job, "a").await;
    let (_, vb) = lab.make(&engine, job, "b").await;
    lab.run(&engine, Target::Volume(a), attach()).await.unwrap();
    assert_eq!(lab.run(&engine, Target::Job(job), destroy("other")).await.unwrap_err().errno(), Errno::EINVAL);
    lab.forget_log();
    lab.run(&engine, Target::Job(job), destroy("j")).await.unwrap();
    let lines = lab.lines(&["begin destroy", "cloud detach", "cloud delete", "end destroy"]);
    let expected = [
        "begin destroy".to_owned(),
        format!("cloud detach {va}"),
        format!("cloud delete {va}"),
        format!("cloud delete {vb}"),
        "end destroy done".to_owned(),
    ];
    assert_eq!(lines, expected);
    let world = engine.world();
    assert!(world.jobs.is_empty() && world.volumes.is_empty());
    assert!(lab.state().sky.volumes.is_empty() && lab.unfinished().is_empty());
    assert!(world.history.iter().any(|h| h.verb == Verb::Destroy));
}

#[tokio::test(start_paused = true)]
async fn c12_destroy_refuses_with_a_line_for_each_disk_and_then_nothing_was_done() {
    let lab = Lab::new();
    let engine = lab.start().await;
    let job = lab.job(&engine, "j").await;
    let (a, _) = lab.make(&engine, job, "a").await;
    let (b, vb) = lab.make(&engine, job, "b").await;
    let (c, vc) = lab.make(&engine, job, "c").await;
    for (row, volume) in [(b, vb), (c, vc)] {
        lab.run(&engine, Target::Volume(row), attach()).await.unwrap();
        lab.unplug(volume);
        lab.until_status(&engine, row, Status::Lost).await;
    }
    let lines = |error: &Error| match error {
        Error::Several { lines } => lines.iter().map(|(d, _)| d.to_string()).collect::<Vec<_>>(),
        other => panic!("{other}"),
    };
    let error = lab.run(&engine, Target::Job(job), destroy("j")).await.unwrap_err();
    assert_eq!((lines(&error), error.errno()), (vec!["b".into(), "c".into()], Errno::EBUSY));
    for (row, volume) in [(b, vb), (c, vc)] {
        lab.plug(volume, GIB);
        lab.until_status(&engine, row, Status::Attached).await;
        let dev = engine.device(row).unwrap().dev;
        lab.state().kernel.holders.insert(dev, vec![holder()]);
    }
    let error = lab.run(&engine, Target::Job(job), destroy("j")).await.unwrap_err();
    assert_eq!((lines(&error), error.errno()), (vec!["b".into(), "c".into()], Errno::EBUSY));
    assert_eq!((lab.count("cloud delete"), lab.count("cloud detach")), (0, 0));
    assert_eq!(lab.status(&engine, a), Status::Detached);
    assert!(engine.device(b).is_ok() && engine.device(c).is_ok(), "served again");
}

#[tokio::test(start_paused = true)]
async fn c12_while_it_runs_its_volumes_and_the_job_are_reserved() {
    let lab = Lab::new();
    let engine = lab.start().await;
    let job = lab.job(&engine, "j").await;
    let (a, va) = lab.make(&engine, job, "a").await;
    let (b, vb) = lab.make(&engine, job, "b").await;
    let k = lab.job(&engine, "k").await;
    let (c, _) = lab.make(&engine, k, "c").await;
    lab.script(At::Delete, Act::HoldBefore);
    let going = lab.go(&engine, Target::Job(job), destroy("j"));
    lab.until_logged("cloud delete", 1).await;
    for (row, action) in [
        (b, attach()),
        (b, delete(vb)),
        (b, Action::Release { volume: vb }),
        (b, Action::Move { job: job_id("k") }),
        (a, delete(va)),
        (c, Action::Move { job: job_id("j") }),
    ] {
        let error = lab.run(&engine, Target::Volume(row), action).await.unwrap_err();
        assert_eq!(error.errno(), Errno::EBUSY, "{error}");
    }
    assert_eq!(lab.run(&engine, Target::Job(job), create("x", GIB)).await.unwrap_err().errno(), Errno::EBUSY);
    assert_eq!(engine.forget_job(job, root()).wait().await.unwrap_err().errno(), Errno::EBUSY);
    assert_eq!(lab.go(&engine, Target::Job(job), destroy("j")).op, going.op, "the equal command joins");
    lab.release(At::Delete);
    going.ticket.wait().await.unwrap();
}

#[tokio::test(start_paused = true)]
async fn c12_destroy_is_busy_while_a_create_or_a_move_into_the_job_is_in_flight() {
    let lab = Lab::new();
    let engine = lab.start().await;
    let (j, k) = (lab.job(&engine, "j").await, lab.job(&engine, "k").await);
    let (row, _) = lab.make(&engine, k, "m").await;
    lab.script(At::Create, Act::HoldBefore);
    lab.script(At::Mark, Act::HoldBefore);
    for (target, action) in
        [(Target::Job(j), create("d", GIB)), (Target::Volume(row), Action::Move { job: job_id("j") })]
    {
        let going = lab.go(&engine, target, action);
        let error = lab.run(&engine, Target::Job(j), destroy("j")).await.unwrap_err();
        assert_eq!(error.errno(), Errno::EBUSY, "{error}");
        lab.release(At::Create);
        lab.release(At::Mark);
        going.ticket.wait().await.unwrap();
    }
    assert_eq!(engine.world().jobs[&j].disks.len(), 2);
}

#[tokio::test(start_paused = true)]
async fn c12_a_cancel_or_its_callers_signal_stops_before_the_next_volume_and_a_repeat_finishes() {
    for by_signal in [false, true] {
        let lab = Lab::new();
        let engine = lab.start().await;
        let job = lab.job(&engine, "j").await;
        lab.make(&engine, job, "a").await;
        let (b, _) = lab.make(&engine, job, "b").await;
        lab.script(At::Delete, Act::HoldBefore);
        let going = lab.go(&engine, Target::Job(job), destroy("j"));
        lab.until_logged("cloud delete", 1).await;
        if by_signal {
            let errno = engine.caller_left(Target::Job(job), Verb::Destroy, going.op, &root(), Left::Interrupted);
            assert_eq!(errno, Errno::EINTR);
        } else {
            lab.run(&engine, Target::Job(job), Action::Cancel { id: None }).await.unwrap();
        }
        lab.release(At::Delete);
        assert_eq!(going.ticket.wait().await.unwrap_err(), Error::Cancelled);
        assert_eq!(engine.world().jobs[&job].disks.len(), 1);
        assert_eq!(lab.status(&engine, b), Status::Detached, "free again");
        assert_eq!(lab.state().sky.volumes.len(), 1);
        lab.run(&engine, Target::Job(job), destroy("j")).await.unwrap();
        assert!(engine.world().jobs.is_empty());
    }
}

#[tokio::test(start_paused = true)]
async fn c12_a_volume_that_cannot_be_deleted_stops_it_and_nothing_is_forgotten_that_exists() {
    let lab = Lab::new();
    let engine = lab.start().await;
    let job = lab.job(&engine, "j").await;
    for disk in ["a", "b", "c"] {
        lab.make(&engine, job, disk).await;
    }
    lab.script(At::Delete, Act::HoldBefore);
    lab.release(At::Delete);
    lab.script(At::Delete, Act::Refuse(Refusal::Other));
    let error = lab.run(&engine, Target::Job(job), destroy("j")).await.unwrap_err();
    assert_eq!(error.errno(), Errno::EREMOTEIO);
    let disks: Vec<String> = engine.world().jobs[&job].disks.keys().map(|d| d.to_string()).collect();
    assert_eq!(disks, ["b", "c"]);
    assert_eq!(lab.state().sky.volumes.len(), 2);
}

#[tokio::test(start_paused = true)]
async fn c12_a_foreign_mark_stops_it_before_anything_is_deleted() {
    let lab = Lab::new();
    let engine = lab.start().await;
    let job = lab.job(&engine, "j").await;
    lab.make(&engine, job, "a").await;
    let (_, vb) = lab.make(&engine, job, "b").await;
    lab.remark(vb, None);
    let error = lab.run(&engine, Target::Job(job), destroy("j")).await.unwrap_err();
    assert_eq!(error.errno(), Errno::EPERM, "{error}");
    assert_eq!(lab.count("cloud delete"), 0);
}

#[tokio::test(start_paused = true)]
async fn c12_a_hold_raised_while_it_runs_stops_it_before_the_next_volume() {
    let lab = Lab::new();
    let engine = lab.start().await;
    let job = lab.job(&engine, "j").await;
    for disk in ["a", "b", "c"] {
        lab.make(&engine, job, disk).await;
    }
    lab.script(At::Delete, Act::HoldBefore);
    let going = lab.go(&engine, Target::Job(job), destroy("j"));
    lab.until_logged("cloud delete", 1).await;
    engine.set_hold(job, true, user()).wait().await.unwrap();
    lab.release(At::Delete);
    let error = going.ticket.wait().await.unwrap_err();
    assert_eq!((error.errno(), error.to_string()), (Errno::EPERM, format!("b: {}", Error::Held { job: job_id("j") })));
    let disks: Vec<String> = engine.world().jobs[&job].disks.keys().map(|d| d.to_string()).collect();
    assert_eq!((disks, lab.count("cloud delete")), (vec!["b".into(), "c".into()], 1));
    engine.set_hold(job, false, root()).wait().await.unwrap();
    lab.run(&engine, Target::Job(job), destroy("j")).await.unwrap();
}

#[tokio::test(start_paused = true)]
async fn c7_a_hold_raised_while_the_cloud_refuses_for_now_stops_the_next_try() {
    let lab = Lab::new();
    let engine = lab.start().await;
    let job = lab.job(&engine, "j").await;
    let (row, v) = lab.make(&engine, job, "d").await;
    lab.script(At::Delete, Act::Refuse(Refusal::Passing));
    let going = lab.go(&engine, Target::Volume(row), delete(v));
    lab.until_logged("cloud delete", 1).await;
    engine.set_hold(job, true, user()).wait().await.unwrap();
    assert_eq!(going.ticket.wait().await.unwrap_err(), Error::Held { job: job_id("j") });
    assert_eq!((lab.count("cloud delete"), lab.status(&engine, row)), (1, Status::Detached));
}

/// A job of a volume that is there and one that was found missing.
async fn one_missing(lab: &Lab) -> (Arc<Engine>, Target, DiskRow, CloudVolume) {
    let engine = lab.start().await;
    let job = lab.job(&engine, "j").await;
    lab.make(&engine, job, "a").await;
    let (row, v) = lab.make(&engine, job, "b").await;
    let seen = lab.state().sky.volumes.remove(&v).unwrap();
    lab.run(&engine, Target::Volume(row), Action::Reconcile { vm: None }).await.unwrap();
    assert_eq!(lab.status(&engine, row), Status::Missing);
    (engine, Target::Job(job), row, seen)
}

#[tokio::test(start_paused = true)]
async fn x10_x7_a_missing_volume_that_is_there_again_is_not_forgotten() {
    for by_destroy in [true, false] {
        let lab = Lab::new();
        let (engine, job, row, seen) = one_missing(&lab).await;
        let v = seen.id;
        lab.state().sky.volumes.insert(v, seen);
        let (target, action) = if by_destroy { (job, destroy("j")) } else { (Target::Volume(row), delete(v)) };
        let error = lab.run(&engine, target, action.clone()).await.unwrap_err();
        assert_eq!(error.errno(), Errno::EBUSY, "{error}");
        let words = format!("volume {v} is missing; but the cloud shows it again, so it is not forgotten");
        assert!(error.to_string().contains(&words), "{error}");
        assert_eq!((lab.count("cloud delete"), engine.world().volumes.len()), (0, 2));
        assert!(!lab.state().record.volumes[&v].gone);
        // It is looked at without anybody asking, and then it is a volume like any other.
        lab.until_status(&engine, row, Status::Detached).await;
        lab.run(&engine, target, action).await.unwrap();
        assert!(!lab.state().sky.volumes.contains_key(&v), "deleted, and not only forgotten");
    }
}

#[tokio::test(start_paused = true)]
async fn x10_x7_a_missing_volume_is_dropped_only_by_a_look_that_proves_it() {
    let lab = Lab::new();
    let (engine, job, row, seen) = one_missing(&lab).await;
    let host = lab.state().sky.vms[&lab.host];
    for blind in [true, false] {
        // Credentials that do not see this host prove nothing, and no answer is none.
        match blind {
            true => drop(lab.state().sky.vms.remove(&lab.host)),
            false => lab.state().sky.down = true,
        }
        for (target, action) in [(job, destroy("j")), (Target::Volume(row), delete(seen.id))] {
            let error = lab.run(&engine, target, action).await.unwrap_err();
            assert_eq!(error.errno(), Errno::EHOSTUNREACH, "{error}");
            assert_eq!((lab.count("cloud delete"), engine.world().volumes.len()), (0, 2));
        }
        lab.state().sky.vms.insert(lab.host, host);
        lab.state().sky.down = false;
    }
    lab.run(&engine, Target::Volume(row), Action::Reconcile { vm: None }).await.unwrap();
    lab.run(&engine, job, destroy("j")).await.unwrap();
    assert!(engine.world().jobs.is_empty() && engine.world().volumes.is_empty());
}

#[tokio::test(start_paused = true)]
async fn a_watcher_that_calls_back_into_the_engine_does_not_deadlock() {
    let lab = Lab::new();
    let engine = lab.start().await;
    let job = lab.job(&engine, "j").await;
    let weak = std::sync::Arc::downgrade(&engine);
    let depth = std::sync::atomic::AtomicUsize::new(0);
    engine.on_publish(std::sync::Arc::new(move |_| {
        use std::sync::atomic::Ordering::SeqCst;
        if depth.fetch_add(1, SeqCst) == 0
            && let Some(engine) = weak.upgrade()
        {
            let command = Command { action: attach(), timeout: None, nowait: false };
            engine.submit(Target::Job(job), command, root());
            let _seen = (engine.world(), engine.would(Target::Job(job), &attach()));
        }
        depth.fetch_sub(1, SeqCst);
    }));
    let make = async { lab.make(&engine, job, "d").await };
    tokio::time::timeout(Duration::from_secs(5), make).await.ok();
    assert!(engine.world().seq > 0);
}

#[tokio::test(start_paused = true)]
async fn a_command_does_no_work_for_each_of_ten_thousand_volumes() {
    let mut costs = Vec::new();
    for count in [100, 10_000] {
        let lab = Lab::new();
        let job = lab.fill(count);
        let engine = lab.start().await;
        let world = engine.world();
        assert!(world.volumes.values().all(|v| v.status() == Status::Detached));
        let row = world.jobs[&job].disks[&disk_name("d7")];
        let other = lab.job(&engine, "other").await;
        let before = std::time::Instant::now();
        for n in 0..100 {
            lab.run(&engine, Target::Volume(row), detach()).await.unwrap();
            lab.run(&engine, Target::Volume(row), Action::Resize { size: GIB / 2 }).await.unwrap_err();
            let size = GIB + 1 + n;
            lab.run(&engine, Target::Volume(row), Action::Resize { size }).await.unwrap();
            // The job with many is the one that is walked if any is.
            lab.script(At::Create, Act::Refuse(Refusal::Other));
            lab.run(&engine, Target::Job(job), create("new", GIB)).await.unwrap_err();
        }
        costs.push(before.elapsed());
        engine.forget_job(other, root()).wait().await.unwrap();
    }
    // Trees are a little deeper; a walk of all volumes at each command would be a hundred times as much.
    assert!(costs[1] < costs[0] * 10, "{costs:?}");
}
