//! Snapshots of a whole job (C6): for all of its volumes, or for none, and what is said.

use std::sync::Arc;
use std::time::Duration;

use super::super::{Engine, Target};
use super::fakes::*;
use super::snapshots::{lab, no_orphans, shown};
use crate::cloud::Refusal;
use crate::command::Action;
use crate::error::{Errno, Error};
use crate::model::{DiskRow, JobRow, Outcome, Status, Verb, VolumeId};

struct Set {
    lab: Lab,
    engine: Arc<Engine>,
    job: JobRow,
    disks: Vec<(DiskRow, VolumeId)>,
}

/// A job `j` with the disks a, b, c.
async fn set() -> Set {
    let lab = lab();
    let engine = lab.start().await;
    let job = lab.job(&engine, "j").await;
    let mut disks = Vec::new();
    for disk in ["a", "b", "c"] {
        disks.push(lab.make(&engine, job, disk).await);
    }
    Set { lab, engine, job, disks }
}

impl Set {
    async fn run(&self, action: Action) -> Result<(), Error> {
        self.lab.run(&self.engine, Target::Job(self.job), action).await
    }

    async fn on(&self, disk: usize, action: Action) -> Result<(), Error> {
        self.lab.run(&self.engine, Target::Volume(self.disks[disk].0), action).await
    }

    /// Which disks have a snapshot of ours of which name.
    fn shown(&self) -> Vec<Vec<String>> {
        self.disks.iter().map(|(row, _)| shown(&self.engine, *row)).collect()
    }
}

/// The lines of an error: the disk, and the errno of its own.
fn lines(error: &Error) -> Vec<(String, &'static str)> {
    match error {
        Error::Several { lines } => lines.iter().map(|(d, e)| (d.to_string(), e.errno().name())).collect(),
        other => panic!("{other}"),
    }
}

fn line(disk: &str, errno: &'static str) -> (String, &'static str) {
    (disk.to_owned(), errno)
}

#[tokio::test(start_paused = true)]
async fn c6_a_set_is_taken_of_all_volumes_side_by_side_where_they_are_detached() {
    let s = set().await;
    (0..3).for_each(|_| s.lab.script(At::Snapshot, Act::HoldBefore));
    let going = s.lab.go(&s.engine, Target::Job(s.job), snapshot("s"));
    s.lab.until_logged("cloud snapshot ", 3).await;
    assert_eq!(s.lab.go(&s.engine, Target::Job(s.job), snapshot("s")).op, going.op, "the equal command joins");
    assert_eq!(s.run(revert("s")).await.unwrap_err().errno(), Errno::EBUSY);
    (0..3).for_each(|_| s.lab.release(At::Snapshot));
    going.ticket.wait().await.unwrap();
    assert_eq!(s.shown(), [["s*"], ["s*"], ["s*"]]);
    assert_eq!(s.engine.world().history.last().unwrap().verb, Verb::Snapshot);
    let parts = s.lab.state().record.ops.values().filter(|o| o.parent == going.op).count();
    assert_eq!(parts, 3, "each is an operation of its own");
    no_orphans(&s.lab);
}

#[tokio::test(start_paused = true)]
async fn c6_attached_volumes_go_one_after_the_other_beside_the_detached_ones() {
    let s = set().await;
    s.on(0, attach()).await.unwrap();
    s.on(2, attach()).await.unwrap();
    (0..3).for_each(|_| s.lab.script(At::Snapshot, Act::HoldBefore));
    let going = s.lab.go(&s.engine, Target::Job(s.job), snapshot("s"));
    s.lab.until_logged("cloud snapshot ", 2).await;
    tokio::time::sleep(Duration::from_secs(60)).await;
    assert_eq!(s.lab.count(&format!("cloud snapshot {}", s.disks[2].1)), 0);
    (0..3).for_each(|_| s.lab.release(At::Snapshot));
    going.ticket.wait().await.unwrap();
    assert_eq!(s.shown(), [["s*"], ["s*"], ["s*"]]);
}

#[tokio::test(start_paused = true)]
async fn c6_if_one_fails_those_that_this_operation_took_are_deleted_again_and_it_is_said() {
    for attached in [false, true] {
        let s = set().await;
        if attached {
            s.run(attach()).await.unwrap();
        }
        // Held until all are in, so that b is the one that fails.
        s.lab.script(At::Snapshot, Act::HoldBefore);
        s.lab.release(At::Snapshot);
        s.lab.script(At::Snapshot, Act::Refuse(Refusal::Quota));
        let error = s.run(snapshot("s")).await.unwrap_err();
        let expected = [line("b", "EDQUOT"), line("a", "ECANCELED"), line("c", "ECANCELED")];
        assert_eq!((lines(&error), error.errno()), (expected.to_vec(), Errno::EDQUOT));
        assert!(error.to_string().contains("a: its snapshot s was deleted again"), "{error}");
        assert_eq!(s.shown(), [[""; 0]; 3]);
        let world = s.engine.world();
        let said = world.history.last().unwrap();
        assert_eq!((said.verb, said.outcome), (Verb::Snapshot, Outcome::Failed));
        assert!(said.sentence.contains("c: its snapshot s was deleted again"), "{}", said.sentence);
        no_orphans(&s.lab);
        s.run(snapshot("s")).await.unwrap();
    }
}

#[tokio::test(start_paused = true)]
async fn c6_the_errno_of_a_set_is_that_of_the_first_failing_disk() {
    let s = set().await;
    s.lab.script(At::Snapshot, Act::Refuse(Refusal::Capacity));
    s.lab.script(At::Snapshot, Act::Refuse(Refusal::Quota));
    let error = s.run(snapshot("s")).await.unwrap_err();
    assert_eq!(lines(&error), [line("a", "ENOSPC"), line("b", "EDQUOT"), line("c", "ECANCELED")]);
    assert_eq!(error.errno(), Errno::ENOSPC);
}

#[tokio::test(start_paused = true)]
async fn c6_what_cannot_be_deleted_again_is_said_and_delete_snapshot_at_the_job_takes_it() {
    let s = set().await;
    s.lab.script(At::Snapshot, Act::Refuse(Refusal::Other));
    s.lab.script(At::DeleteSnapshot, Act::Refuse(Refusal::Other));
    let error = s.run(snapshot("s")).await.unwrap_err();
    assert!(error.to_string().contains("b: its snapshot s is left"), "{error}");
    assert_eq!(s.shown(), [vec![], vec!["s*".to_owned()], vec![]]);
    let again = s.run(snapshot("s")).await.unwrap_err();
    assert_eq!((lines(&again), again.errno()), (vec![line("b", "EEXIST")], Errno::EEXIST));
    s.run(delete_snapshot("s")).await.unwrap();
    assert_eq!(s.lab.count("cloud snapshot "), 3, "nothing was begun again");
    s.run(snapshot("s")).await.unwrap();
    no_orphans(&s.lab);
}

#[tokio::test(start_paused = true)]
async fn c6_a_snapshot_that_somebody_else_is_taking_is_joined_and_not_deleted_again() {
    let s = set().await;
    s.lab.script(At::Snapshot, Act::HoldBefore);
    let theirs = s.lab.go(&s.engine, Target::Volume(s.disks[0].0), snapshot("s"));
    s.lab.until_logged("cloud snapshot ", 1).await;
    s.lab.script(At::Snapshot, Act::Refuse(Refusal::Other));
    let going = s.lab.go(&s.engine, Target::Job(s.job), snapshot("s"));
    s.lab.until_logged("cloud snapshot ", 3).await;
    s.lab.release(At::Snapshot);
    theirs.ticket.wait().await.unwrap();
    let error = going.ticket.wait().await.unwrap_err();
    assert_eq!(lines(&error), [line("b", "EREMOTEIO"), line("c", "ECANCELED")]);
    assert_eq!(s.shown(), [vec!["s*".to_owned()], vec![], vec![]]);
    no_orphans(&s.lab);
}

#[tokio::test(start_paused = true)]
async fn c6_a_set_is_not_begun_where_a_volume_has_the_name_or_is_not_here() {
    let s = set().await;
    s.on(1, snapshot("s")).await.unwrap();
    s.lab.put(s.disks[2].1, Some(s.lab.vm(true)));
    s.on(2, Action::Reconcile { vm: None }).await.unwrap();
    s.lab.forget_log();
    let error = s.run(snapshot("s")).await.unwrap_err();
    assert_eq!(lines(&error), [line("b", "EEXIST"), line("c", "EBUSY")]);
    assert_eq!((error.errno(), s.lab.count("begin")), (Errno::EEXIST, 0));
    assert!(error.to_string().contains("`delete-snapshot s` first"), "it says what to do: {error}");
}

#[tokio::test(start_paused = true)]
async fn c6_to_a_set_a_name_is_taken_or_missing_whether_or_not_the_volume_can_be_told() {
    let s = set().await;
    s.on(1, snapshot("s")).await.unwrap();
    s.lab.kill();
    s.lab.state().sky.down = true;
    let engine = s.lab.start().await;
    assert_eq!(s.lab.status(&engine, s.disks[1].0), Status::Unknown);
    let s = Set { engine, ..s };
    assert_eq!(lines(&s.run(snapshot("s")).await.unwrap_err()), [line("b", "EEXIST")]);
    let error = s.run(revert("s")).await.unwrap_err();
    assert_eq!(lines(&error), [line("a", "ENOENT"), line("b", "EHOSTUNREACH"), line("c", "ENOENT")]);
    assert_eq!(s.on(1, snapshot("s")).await.unwrap_err().errno(), Errno::EHOSTUNREACH, "x5: R");
    assert_eq!(s.on(1, delete_snapshot("s")).await.unwrap_err().errno(), Errno::EHOSTUNREACH);
    assert_eq!(s.on(1, delete(s.disks[1].1)).await.unwrap_err().errno(), Errno::EHOSTUNREACH);
}

#[tokio::test(start_paused = true)]
async fn c6_a_cancelled_set_is_taken_back() {
    let s = set().await;
    s.run(attach()).await.unwrap();
    s.lab.script(At::Snapshot, Act::HoldBefore);
    let going = s.lab.go(&s.engine, Target::Job(s.job), snapshot("s"));
    s.lab.until_logged("cloud snapshot ", 1).await;
    s.lab.run(&s.engine, Target::Job(s.job), Action::Cancel { id: None }).await.unwrap();
    s.lab.release(At::Snapshot);
    let error = going.ticket.wait().await.unwrap_err();
    assert_eq!(error.errno(), Errno::ECANCELED);
    assert_eq!((s.shown(), s.lab.count("cloud snapshot ")), (vec![vec![]; 3], 1));
    no_orphans(&s.lab);
}

#[tokio::test(start_paused = true)]
async fn c6_revert_of_a_job_refuses_and_names_those_without_it_or_not_detached_before_anything() {
    let s = set().await;
    s.run(snapshot("s")).await.unwrap();
    s.on(1, delete_snapshot("s")).await.unwrap();
    s.on(2, attach()).await.unwrap();
    s.lab.forget_log();
    let error = s.run(revert("s")).await.unwrap_err();
    assert_eq!(lines(&error), [line("b", "ENOENT"), line("c", "EBUSY")]);
    assert_eq!(s.lab.count("begin"), 0);
    s.on(1, snapshot("s")).await.unwrap();
    s.on(2, detach()).await.unwrap();
    s.lab.forget_log();
    s.run(revert("s")).await.unwrap();
    assert_eq!(s.lab.count("cloud revert"), 3);
    assert!(s.engine.world().volumes.values().all(|v| v.status() == Status::Detached));
    // What the record cannot know is found out before the first is reverted.
    s.lab.state().sky.snapshots.get_mut(&s.disks[2].1).unwrap()[0].ready = false;
    let error = s.run(revert("s")).await.unwrap_err();
    assert_eq!((lines(&error), s.lab.count("cloud revert")), (vec![line("c", "EBUSY")], 3));
    s.lab.state().sky.snapshots.remove(&s.disks[0].1);
    let error = s.run(revert("s")).await.unwrap_err();
    assert_eq!((lines(&error), s.lab.count("cloud revert")), (vec![line("a", "ENOENT"), line("c", "EBUSY")], 3));
    s.engine.set_hold(s.job, true, root()).wait().await.unwrap();
    assert_eq!(s.run(revert("s")).await.unwrap_err().errno(), Errno::EPERM);
    assert_eq!(s.lab.state().sky.violations, Vec::<String>::new());
}

#[tokio::test(start_paused = true)]
async fn c6_delete_snapshot_of_a_job_deletes_it_wherever_it_is_and_all_are_tried() {
    let s = set().await;
    s.run(delete_snapshot("s")).await.unwrap();
    s.run(snapshot("s")).await.unwrap();
    s.on(0, delete_snapshot("s")).await.unwrap();
    let vm = s.lab.vm(false);
    s.on(2, Action::Attach { vm: Some(vm), slot: None }).await.unwrap();
    s.lab.script(At::DeleteSnapshot, Act::Refuse(Refusal::Other));
    let error = s.run(delete_snapshot("s")).await.unwrap_err();
    assert_eq!(lines(&error), [line("b", "EREMOTEIO")]);
    assert_eq!(s.shown(), [vec![], vec!["s*".to_owned()], vec![]], "c is on another VM, and is free of it");
    s.run(delete_snapshot("s")).await.unwrap();
    no_orphans(&s.lab);
}

#[tokio::test(start_paused = true)]
async fn c12_destroy_refuses_a_job_whose_volumes_have_snapshots_of_ours_before_anything() {
    let s = set().await;
    s.run(attach()).await.unwrap();
    s.on(1, snapshot("s")).await.unwrap();
    s.lab.foreign_snapshot(s.disks[0].1, "theirs");
    s.lab.forget_log();
    let destroy = || Action::Destroy { job: job_id("j") };
    let error = s.run(destroy()).await.unwrap_err();
    assert_eq!((lines(&error), error.errno()), (vec![line("b", "ENOTEMPTY")], Errno::ENOTEMPTY));
    assert_eq!(s.lab.count("begin"), 0);
    s.run(delete_snapshot("s")).await.unwrap();
    s.run(destroy()).await.unwrap();
    assert!(s.lab.state().sky.volumes.is_empty());
}

#[tokio::test(start_paused = true)]
async fn r10_a_set_that_a_crash_cut_short_says_what_to_do_and_that_finishes_it() {
    for (at, act) in [
        (At::Snapshot, Act::KillBefore),
        (At::Snapshot, Act::KillAfter),
        (At::End, Act::KillBefore),
        (At::End, Act::KillAfter),
        (At::DeleteSnapshot, Act::KillBefore),
        (At::DeleteSnapshot, Act::KillAfter),
    ] {
        let s = set().await;
        let life = s.lab.life();
        if at == At::DeleteSnapshot {
            s.lab.script(At::Snapshot, Act::Refuse(Refusal::Other));
        }
        s.lab.script(at, act.clone());
        s.lab.go(&s.engine, Target::Job(s.job), snapshot("s"));
        s.lab.until_killed(life).await;
        s.lab.state().script.clear();
        s.lab.forget_log();
        let engine = s.lab.start().await;
        s.lab.until("settled", |st| st.record.ops.values().all(|o| o.ended.is_some())).await;
        s.lab.until_world(&engine, "shown", |w| w.operations.values().all(|o| o.ended.is_some())).await;
        assert_eq!(s.lab.count("cloud snapshot ") + s.lab.count("cloud delete_snapshot"), 0, "{at:?} {act:?}");
        let world = engine.world();
        let said = world.history.iter().find(|h| h.verb == Verb::Snapshot && h.volume.is_none()).unwrap();
        assert_eq!(said.outcome, Outcome::Interrupted, "{at:?} {act:?}");
        assert!(said.sentence.contains("`delete-snapshot` it here, then repeat"), "{}", said.sentence);
        no_orphans(&s.lab);
        let s = Set { engine, ..s };
        match s.shown().iter().flatten().count() {
            0 => {}
            left => {
                let error = s.run(snapshot("s")).await.unwrap_err();
                assert_eq!((lines(&error).len(), error.errno()), (left, Errno::EEXIST), "{at:?} {act:?}");
            }
        }
        s.run(delete_snapshot("s")).await.unwrap();
        s.run(snapshot("s")).await.unwrap();
        assert_eq!(s.shown(), [["s*"]; 3]);
        no_orphans(&s.lab);
    }
}
