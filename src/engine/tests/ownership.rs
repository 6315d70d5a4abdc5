//! Create, claim, release, move and rename through the fakes.

use std::time::Duration;

use super::super::Target;
use super::fakes::*;
use crate::cloud::Refusal;
use crate::command::Action;
use crate::error::{Errno, Error};
use crate::model::{Mark, RecordId, Status};

fn claim(volume: crate::model::VolumeId, disk: &str) -> Action {
    Action::Claim { volume, disk: Some(disk_name(disk)), from: None }
}

#[tokio::test(start_paused = true)]
async fn c1_create_is_journaled_first_and_the_volume_carries_its_mark_from_the_first_moment() {
    let lab = Lab::new();
    let engine = lab.start().await;
    let job = lab.job(&engine, "j").await;
    lab.forget_log();
    let (row, v) = lab.make(&engine, job, "d").await;
    assert_eq!(lab.lines(&["begin", "cloud create", "end"]), ["begin create", "cloud create d", "end create done"]);
    let volume = engine.world().volumes[&row].clone();
    assert_eq!(lab.cloud_of(v).unwrap().mark, Some(Mark { record: lab.record_id(), epoch: volume.epoch }));
    assert_eq!(volume.status(), Status::Detached);
    assert!(engine.world().jobs[&job].creating.is_empty());
    let again = lab.run(&engine, Target::Job(job), create("d", GIB)).await.unwrap_err();
    assert_eq!(again.errno(), Errno::EEXIST);
    let (_, w) = lab.make(&engine, job, "e").await;
    assert_ne!(lab.cloud_of(v).unwrap().mark, lab.cloud_of(w).unwrap().mark, "the epoch rises");
}

#[tokio::test(start_paused = true)]
async fn c1_the_same_create_in_flight_is_joined_and_another_of_that_disk_is_busy() {
    let lab = Lab::new();
    let engine = lab.start().await;
    let job = lab.job(&engine, "j").await;
    lab.script(At::Create, Act::HoldBefore);
    let first = lab.go(&engine, Target::Job(job), create("d", GIB));
    let same = lab.go(&engine, Target::Job(job), create("d", GIB));
    assert_eq!(first.op, same.op);
    assert_eq!(engine.world().jobs[&job].creating.len(), 1);
    let other = lab.run(&engine, Target::Job(job), create("d", 2 * GIB)).await.unwrap_err();
    assert_eq!(other.errno(), Errno::EBUSY);
    lab.run(&engine, Target::Job(job), create("e", GIB)).await.unwrap();
    lab.until_logged("cloud create d", 1).await;
    lab.release(At::Create);
    first.ticket.wait().await.unwrap();
    same.ticket.wait().await.unwrap();
    assert_eq!(lab.state().sky.volumes.len(), 2);
}

#[tokio::test(start_paused = true)]
async fn c1_a_lost_answer_never_makes_a_second_volume() {
    for (act, down) in [(Act::AmbiguousDone, false), (Act::AmbiguousDone, true), (Act::Ambiguous, false)] {
        let lab = Lab::new();
        let engine = lab.start().await;
        let job = lab.job(&engine, "j").await;
        let made = matches!(act, Act::AmbiguousDone);
        lab.script(At::Create, if down { Act::Down(Box::new(act)) } else { act });
        let going = lab.go(&engine, Target::Job(job), create("d", GIB));
        lab.until_logged("cloud find_created", 1).await;
        if down {
            tokio::time::sleep(Duration::from_secs(600)).await;
            assert_eq!(going.ticket.outcome(), None, "as long as nobody can tell it has not ended");
            assert_eq!(lab.go(&engine, Target::Job(job), create("d", GIB)).op, going.op);
            lab.state().sky.down = false;
        }
        let outcome = going.ticket.wait().await;
        assert_eq!(outcome.is_ok(), made);
        if !made {
            lab.run(&engine, Target::Job(job), create("d", GIB)).await.unwrap();
        }
        assert_eq!(lab.state().sky.volumes.len(), 1);
        assert_eq!(engine.world().volumes.len(), 1);
        assert!(lab.unfinished().is_empty());
    }
}

#[tokio::test(start_paused = true)]
async fn c1_a_create_whose_answer_is_slow_to_show_is_waited_for_a_minute() {
    let lab = Lab::new();
    let engine = lab.start().await;
    let job = lab.job(&engine, "j").await;
    lab.script(At::Create, Act::Ambiguous);
    let going = lab.go(&engine, Target::Job(job), create("d", GIB));
    tokio::time::sleep(Duration::from_secs(30)).await;
    assert_eq!(going.ticket.outcome(), None);
    let op = lab.unfinished().remove(0);
    let id = lab.foreign(GIB, Some(Mark { record: lab.record_id(), epoch: 1 }));
    lab.state().sky.created.insert(op.fence, id);
    going.ticket.wait().await.unwrap();
    assert_eq!(engine.world().volumes.values().next().unwrap().uuid, id);
}

#[tokio::test(start_paused = true)]
async fn c1_a_refused_create_leaves_nothing() {
    let lab = Lab::new();
    let engine = lab.start().await;
    let job = lab.job(&engine, "j").await;
    for (why, errno) in
        [(Refusal::Capacity, Errno::ENOSPC), (Refusal::Quota, Errno::EDQUOT), (Refusal::Other, Errno::EREMOTEIO)]
    {
        lab.script(At::Create, Act::Refuse(why));
        let error = lab.run(&engine, Target::Job(job), create("d", GIB)).await.unwrap_err();
        assert_eq!(error.errno(), errno);
        let world = engine.world();
        assert!(world.volumes.is_empty() && world.jobs[&job].creating.is_empty());
        assert!(world.jobs[&job].error.is_some());
    }
    lab.run(&engine, Target::Job(job), create("d", GIB)).await.unwrap();
    assert!(engine.world().jobs[&job].error.is_none());
}

#[tokio::test(start_paused = true)]
async fn c2_claim_puts_our_mark_and_finds_out_where_it_is() {
    let lab = Lab::new();
    let engine = lab.start().await;
    let job = lab.job(&engine, "j").await;
    let v = lab.foreign(GIB, None);
    lab.put(v, Some(lab.host));
    lab.plug(v, GIB);
    lab.run(&engine, Target::Root, Action::Reconcile { vm: None }).await.unwrap();
    assert!(engine.world().unclaimed.contains_key(&v));
    lab.run(&engine, Target::Job(job), claim(v, "d")).await.unwrap();
    let world = engine.world();
    let row = world.by_uuid[&v];
    assert_eq!(world.volumes[&row].status(), Status::Attached, "wherever it is attached");
    assert!(!world.unclaimed.contains_key(&v));
    assert_eq!(lab.cloud_of(v).unwrap().mark.unwrap().record, lab.record_id());
    let lines = lab.lines(&["begin claim", "cloud mark", "end claim"]);
    assert_eq!(lines, ["begin claim".to_owned(), format!("cloud mark {v}"), "end claim done".to_owned()]);
    assert_eq!(lab.recorded(v), Status::Attached);
}

#[tokio::test(start_paused = true)]
async fn c2_what_is_not_to_be_had_is_refused_and_its_mark_stays() {
    let lab = Lab::new();
    let engine = lab.start().await;
    let (j, k) = (lab.job(&engine, "j").await, lab.job(&engine, "k").await);
    let (_, owned) = lab.make(&engine, j, "d").await;
    let theirs = Mark { record: RecordId::random(), epoch: 9 };
    let foreign = lab.foreign(GIB, Some(theirs));
    let host_disk = lab.foreign(GIB, None);
    lab.put(host_disk, Some(lab.host));
    let name = lab.plug(host_disk, GIB);
    lab.state().kernel.carries.insert(name.to_string(), "/ is mounted on it".into());
    let root_disk = lab.foreign(GIB, None);
    lab.state().sky.volumes.get_mut(&root_disk).unwrap().carries_host = Some("device id 0".into());
    for (volume, errno) in [
        (crate::model::VolumeId::random(), Errno::ENOENT),
        (owned, Errno::EBUSY),
        (foreign, Errno::EBUSY),
        (host_disk, Errno::EPERM),
        (root_disk, Errno::EPERM),
    ] {
        let error = lab.run(&engine, Target::Job(k), claim(volume, "x")).await.unwrap_err();
        assert_eq!(error.errno(), errno, "{error}");
    }
    assert_eq!(lab.count("cloud mark"), 0);
    let from = Action::Claim { volume: foreign, disk: None, from: Some(theirs.record) };
    let asked = crate::command::Command { action: from.clone(), timeout: None, nowait: false };
    let refused = engine.submit(Target::Job(k), asked, user());
    assert_eq!(refused.ticket.wait().await.unwrap_err().errno(), Errno::EPERM);
    let wrong = Action::Claim { volume: foreign, disk: None, from: Some(RecordId::random()) };
    assert_eq!(lab.run(&engine, Target::Job(k), wrong).await.unwrap_err().errno(), Errno::EBUSY);
    lab.run(&engine, Target::Job(k), from).await.unwrap();
    assert_eq!(lab.cloud_of(foreign).unwrap().mark.unwrap().record, lab.record_id());
}

#[tokio::test(start_paused = true)]
async fn c2_two_claims_of_one_volume_have_one_winner() {
    let lab = Lab::new();
    let engine = lab.start().await;
    let (j, k) = (lab.job(&engine, "j").await, lab.job(&engine, "k").await);
    let v = lab.foreign(GIB, None);
    lab.script(At::Find, Act::HoldBefore);
    let first = lab.go(&engine, Target::Job(j), claim(v, "d"));
    let second = lab.run(&engine, Target::Job(k), claim(v, "d")).await.unwrap_err();
    assert_eq!(second.errno(), Errno::EBUSY);
    lab.release(At::Find);
    first.ticket.wait().await.unwrap();
    assert_eq!(lab.run(&engine, Target::Job(k), claim(v, "d")).await.unwrap_err().errno(), Errno::EBUSY);
    assert_eq!(lab.run(&engine, Target::Job(j), claim(v, "e")).await.unwrap_err().errno(), Errno::EEXIST);
}

#[tokio::test(start_paused = true)]
async fn c2_a_volume_that_a_create_in_flight_has_made_is_not_claimed() {
    let lab = Lab::new();
    let engine = lab.start().await;
    let (j, k) = (lab.job(&engine, "j").await, lab.job(&engine, "k").await);
    lab.script(At::Create, Act::HoldAfter);
    let going = lab.go(&engine, Target::Job(j), create("d", GIB));
    lab.until("made", |s| !s.sky.volumes.is_empty()).await;
    let v = *lab.state().sky.volumes.keys().next().unwrap();
    let error = lab.run(&engine, Target::Job(k), claim(v, "x")).await.unwrap_err();
    assert_eq!(error.errno(), Errno::EBUSY, "{error}");
    lab.release(At::Create);
    going.ticket.wait().await.unwrap();
    assert_eq!(engine.world().volumes[&engine.world().by_uuid[&v]].job, j);
}

#[tokio::test(start_paused = true)]
async fn c2_a_mark_that_changed_between_the_look_and_the_call_is_not_overwritten() {
    let lab = Lab::new();
    let engine = lab.start().await;
    let job = lab.job(&engine, "j").await;
    let v = lab.foreign(GIB, None);
    let theirs = Some(Mark { record: RecordId::random(), epoch: 1 });
    lab.script(At::Mark, Act::HoldBefore);
    let going = lab.go(&engine, Target::Job(job), claim(v, "d"));
    lab.until_logged("cloud mark", 1).await;
    lab.remark(v, theirs);
    lab.release(At::Mark);
    assert_eq!(going.ticket.wait().await.unwrap_err().errno(), Errno::EPERM);
    assert_eq!(lab.cloud_of(v).unwrap().mark, theirs);
    assert!(engine.world().volumes.is_empty());
}

#[tokio::test(start_paused = true)]
async fn an_unclear_answer_about_a_mark_is_settled_by_looking() {
    for act in [Act::Ambiguous, Act::AmbiguousDone] {
        let done = matches!(act, Act::AmbiguousDone);
        let lab = Lab::new();
        let engine = lab.start().await;
        let (j, _k) = (lab.job(&engine, "j").await, lab.job(&engine, "k").await);
        let v = lab.foreign(GIB, None);
        lab.script(At::Mark, act.clone());
        assert_eq!(lab.run(&engine, Target::Job(j), claim(v, "d")).await.is_ok(), done);
        if !done {
            lab.run(&engine, Target::Job(j), claim(v, "d")).await.unwrap();
        }
        let row = engine.world().by_uuid[&v];
        lab.script(At::Mark, act.clone());
        assert_eq!(lab.run(&engine, Target::Volume(row), Action::Move { job: job_id("k") }).await.is_ok(), done);
        let row = engine.world().by_uuid[&v];
        lab.script(At::Mark, act);
        assert_eq!(lab.run(&engine, Target::Volume(row), Action::Release { volume: v }).await.is_ok(), done);
        assert_eq!(engine.world().volumes.is_empty(), done);
        assert_eq!(lab.cloud_of(v).unwrap().mark.is_none(), done);
        assert!(lab.unfinished().is_empty());
    }
}

#[tokio::test(start_paused = true)]
async fn c8_release_clears_the_mark_and_touches_nothing_else() {
    let lab = Lab::new();
    let engine = lab.start().await;
    let job = lab.job(&engine, "j").await;
    let (row, v) = lab.make(&engine, job, "d").await;
    let release = || Action::Release { volume: v };
    lab.run(&engine, Target::Volume(row), attach()).await.unwrap();
    assert_eq!(lab.run(&engine, Target::Volume(row), release()).await.unwrap_err().errno(), Errno::EBUSY);
    lab.run(&engine, Target::Volume(row), detach()).await.unwrap();
    lab.run(&engine, Target::Volume(row), release()).await.unwrap();
    assert_eq!(lab.cloud_of(v).unwrap().mark, None);
    assert!(engine.world().volumes.is_empty());
    assert!(!lab.state().record.volumes[&v].gone);
    let gone = lab.run(&engine, Target::Volume(row), attach()).await.unwrap_err();
    assert_eq!(gone.errno(), Errno::ENODEV, "r4: a held control is no way to it");
    lab.until_world(&engine, "unclaimed", |w| w.unclaimed.contains_key(&v)).await;
    lab.run(&engine, Target::Job(job), claim(v, "d")).await.unwrap();
    assert_ne!(engine.world().by_uuid[&v], row, "a new ownership is a new row");
}

#[tokio::test(start_paused = true)]
async fn x8_a_conflicting_mark_is_released_without_touching_it() {
    let lab = Lab::new();
    let engine = lab.start().await;
    let job = lab.job(&engine, "j").await;
    let (row, v) = lab.make(&engine, job, "d").await;
    let theirs = Some(Mark { record: RecordId::random(), epoch: 1 });
    lab.remark(v, theirs);
    assert!(lab.run(&engine, Target::Volume(row), Action::Reconcile { vm: None }).await.is_err());
    assert_eq!(lab.status(&engine, row), Status::Conflict);
    lab.run(&engine, Target::Volume(row), Action::Release { volume: v }).await.unwrap();
    assert_eq!((lab.cloud_of(v).unwrap().mark, lab.count("cloud mark")), (theirs, 0));
}

#[tokio::test(start_paused = true)]
async fn x8_unknown_is_released_without_the_cloud() {
    let lab = Lab::new();
    let engine = lab.start().await;
    let job = lab.job(&engine, "j").await;
    let (_, v) = lab.make(&engine, job, "d").await;
    lab.kill();
    lab.state().sky.down = true;
    let engine = lab.start().await;
    let row = engine.world().by_uuid[&v];
    assert_eq!(lab.status(&engine, row), Status::Unknown);
    lab.run(&engine, Target::Volume(row), Action::Release { volume: v }).await.unwrap();
    assert!(engine.world().volumes.is_empty());
}

#[tokio::test(start_paused = true)]
async fn c9_move_gives_a_new_row_keeps_the_device_and_the_old_row_is_departed() {
    let lab = Lab::new();
    let engine = lab.start().await;
    let (j, k) = (lab.job(&engine, "j").await, lab.job(&engine, "k").await);
    let (row, v) = lab.make(&engine, j, "d").await;
    lab.run(&engine, Target::Volume(row), attach()).await.unwrap();
    let device = engine.device(row).unwrap();
    lab.run(&engine, Target::Volume(row), Action::Move { job: job_id("k") }).await.unwrap();
    let world = engine.world();
    let now = world.by_uuid[&v];
    assert_ne!(now, row);
    assert_eq!((world.volumes[&now].job, world.jobs[&j].disks.len(), world.jobs[&k].disks.len()), (k, 0, 1));
    assert_eq!(engine.device(now).unwrap().mapping, device.mapping);
    assert!(matches!(engine.device(row), Err(Error::Departed)));
    assert!(matches!(lab.run(&engine, Target::Volume(row), detach()).await, Err(Error::Departed)));
    assert_eq!(lab.cloud_of(v).unwrap().mark.unwrap().epoch, world.volumes[&now].epoch);
    assert!(world.jobs[&k].creating.is_empty());
    lab.run(&engine, Target::Volume(now), detach()).await.unwrap();
}

#[tokio::test(start_paused = true)]
async fn c9_a_name_that_is_taken_or_being_taken_is_not_given_twice() {
    let lab = Lab::new();
    let engine = lab.start().await;
    let (i, j, k) = (lab.job(&engine, "i").await, lab.job(&engine, "j").await, lab.job(&engine, "k").await);
    let (a, va) = lab.make(&engine, i, "d").await;
    let (b, vb) = lab.make(&engine, j, "d").await;
    let to_k = || Action::Move { job: job_id("k") };
    lab.script(At::Mark, Act::HoldBefore);
    let first = lab.go(&engine, Target::Volume(a), to_k());
    lab.until_logged("cloud mark", 1).await;
    assert_eq!(lab.run(&engine, Target::Volume(b), to_k()).await.unwrap_err().errno(), Errno::EEXIST);
    assert_eq!(lab.run(&engine, Target::Job(k), create("d", GIB)).await.unwrap_err().errno(), Errno::EBUSY);
    let rmdir = engine.forget_job(k, root()).wait().await.unwrap_err();
    assert_eq!(rmdir.errno(), Errno::EBUSY, "a job that a volume is on its way to is not forgotten");
    lab.release(At::Mark);
    first.ticket.wait().await.unwrap();
    assert_eq!(lab.run(&engine, Target::Volume(b), to_k()).await.unwrap_err().errno(), Errno::EEXIST);
    assert_eq!(engine.world().volumes[&engine.world().by_uuid[&va]].job, k);
    assert_eq!(engine.world().volumes[&engine.world().by_uuid[&vb]].job, j);
    assert_eq!(lab.count("refused"), 0);
    let nowhere = Action::Move { job: job_id("nowhere") };
    assert_eq!(lab.run(&engine, Target::Volume(b), nowhere).await.unwrap_err().errno(), Errno::ENOENT);
}

#[tokio::test(start_paused = true)]
async fn c10_two_disks_do_not_get_one_name() {
    let lab = Lab::new();
    let engine = lab.start().await;
    let job = lab.job(&engine, "j").await;
    let (a, _) = lab.make(&engine, job, "a").await;
    let (b, _) = lab.make(&engine, job, "b").await;
    let to_c = || Action::Disk { name: disk_name("c") };
    lab.script(At::Mark, Act::HoldBefore);
    let first = lab.go(&engine, Target::Volume(a), to_c());
    lab.until_logged("cloud mark", 1).await;
    assert_eq!(lab.run(&engine, Target::Volume(b), to_c()).await.unwrap_err().errno(), Errno::EEXIST);
    lab.release(At::Mark);
    first.ticket.wait().await.unwrap();
    let disks: Vec<String> = engine.world().jobs[&job].disks.keys().map(|d| d.to_string()).collect();
    assert_eq!(disks, ["b", "c"]);
    assert_eq!(lab.state().record.owns[&a].disk, disk_name("c"));
    assert!(engine.world().jobs[&job].creating.is_empty());
}
