//! Imported volumes: volfs itself claims those that carry no mark, and changes none before.

use std::sync::Arc;
use std::time::Duration;

use super::super::{Engine, Target};
use super::fakes::*;
use super::recovery::settled;
use crate::cloud::Refusal;
use crate::command::Action;
use crate::error::{Errno, Error};
use crate::model::{DiskRow, Mark, Outcome, RecordId, Status, Verb, VolumeId};

fn reconcile() -> Action {
    Action::Reconcile { vm: None }
}

fn why(engine: &Arc<Engine>, row: DiskRow) -> String {
    engine.world().volumes[&row].why.as_deref().unwrap_or_default().into()
}

/// The mark that record and cloud agree on.
fn assert_marked(lab: &Lab, engine: &Arc<Engine>, row: DiskRow, volume: VolumeId) {
    let epoch = engine.world().volumes[&row].epoch;
    assert!(epoch > 0);
    assert_eq!(lab.cloud_of(volume).unwrap().mark, Some(Mark { record: lab.record_id(), epoch }));
    assert_eq!(lab.state().record.owns[&row].epoch, epoch);
    assert_eq!(engine.world().volumes[&row].row, row, "the directory stays the same");
}

#[tokio::test(start_paused = true)]
async fn v7_an_imported_volume_without_a_mark_is_claimed_journaled_first_and_then_settled() {
    let lab = Lab::new();
    let there = lab.vm(true);
    let (free, remote, here) = (lab.foreign(GIB, None), lab.foreign(GIB, None), lab.foreign(GIB, None));
    let rows = [(free, "a"), (remote, "b"), (here, "c")].map(|(v, disk)| lab.import(v, disk));
    lab.put(remote, Some(there));
    lab.put(here, Some(lab.host));
    lab.plug(here, GIB);
    let engine = lab.begin();
    for row in rows {
        assert_eq!(engine.world().volumes[&row].status(), Status::Unknown);
        assert_eq!(why(&engine, row), "it was imported and not yet seen in the cloud");
        assert_eq!(engine.device(row).unwrap_err().errno(), Errno::ENODEV);
    }
    for ((row, volume), status) in
        rows.into_iter().zip([free, remote, here]).zip([Status::Detached, Status::Remote, Status::Attached])
    {
        lab.until_status(&engine, row, status).await;
        assert_marked(&lab, &engine, row, volume);
        assert_eq!(lab.recorded(volume), status);
    }
    assert!(engine.device(rows[2]).is_ok());
    let lines = lab.lines(&["begin claim", "cloud mark", "end claim"]);
    assert_eq!(lines.iter().filter(|l| l.starts_with("begin claim")).count(), 3, "{lines:?}");
    let first_mark = lines.iter().position(|l| l.starts_with("cloud mark")).unwrap();
    assert!(lines[..first_mark].iter().any(|l| l.starts_with("begin claim")), "{lines:?}");
    let world = engine.world();
    let row = world.history.iter().find(|h| h.verb == Verb::Claim).unwrap();
    assert_eq!((row.outcome, row.caller.comm.as_str()), (Outcome::Done, "volfs"));
    // It is ours like any other now.
    lab.run(&engine, on(rows[2]), detach()).await.unwrap();
    lab.run(&engine, on(rows[0]), delete(free)).await.unwrap();
    // And a start finds nothing to claim.
    lab.forget_log();
    let engine = lab.start().await;
    settled(&lab, &engine).await;
    assert_eq!(lab.count("begin claim"), 0);
}

#[tokio::test(start_paused = true)]
async fn v8_an_imported_volume_of_another_record_is_in_conflict_says_whose_and_is_not_called_about() {
    let lab = Lab::new();
    let theirs = Mark { record: RecordId::random(), epoch: 4 };
    let old = Mark { record: lab.record_id(), epoch: 0 };
    for (mark, disk) in [(theirs, "a"), (old, "b")] {
        let v = lab.foreign(GIB, Some(mark));
        let row = lab.import(v, disk);
        lab.put(v, Some(lab.host));
        lab.plug(v, GIB);
        let engine = lab.start().await;
        lab.until_status(&engine, row, Status::Conflict).await;
        assert_eq!(&*engine.world().volumes[&row].owner, mark.to_string().as_str());
        assert!(why(&engine, row).contains(&mark.to_string()), "{}", why(&engine, row));
        assert!(lab.run(&engine, on(row), reconcile()).await.is_err());
        for action in [attach(), detach(), delete(v), Action::Resize { size: 2 * GIB }] {
            let error = lab.run(&engine, on(row), action.clone()).await.unwrap_err();
            assert!(matches!(error.errno(), Errno::EPERM | Errno::EBUSY), "{action:?}: {error}");
        }
        let destroy = Action::Destroy { job: job_id("imported") };
        assert!(lab.run(&engine, Target::Job(crate::model::JobRow(1)), destroy).await.is_err());
        assert_eq!(engine.device(row).unwrap_err().errno(), Errno::ENODEV);
        // X8: it is let go, and its mark is not touched.
        lab.run(&engine, on(row), Action::Release { volume: v }).await.unwrap();
        assert_eq!(lab.cloud_of(v).unwrap().mark, Some(mark));
        assert_eq!((lab.count("cloud mark"), lab.count("begin claim")), (0, 0));
    }
    assert_eq!(lab.state().sky.violations, Vec::<String>::new());
}

#[tokio::test(start_paused = true)]
async fn v6_an_imported_volume_that_the_cloud_does_not_know_is_missing_after_two_looks() {
    let lab = Lab::new();
    let v = VolumeId::random();
    let row = lab.import(v, "d");
    let engine = lab.start().await;
    assert_eq!(lab.status(&engine, row), Status::Unknown);
    lab.until_status(&engine, row, Status::Missing).await;
    assert_eq!(lab.count("begin claim"), 0);
    // One that is handed over meanwhile stays without a mark, and gets one when it comes back.
    let other = lab.job(&engine, "other").await;
    lab.run(&engine, on(row), Action::Move { job: job_id("other") }).await.unwrap();
    let row = engine.world().by_uuid[&v];
    let seen = lab.foreign(GIB, None);
    let back = lab.cloud_of(seen).unwrap();
    lab.state().sky.volumes.insert(v, crate::cloud::CloudVolume { id: v, ..back });
    lab.run(&engine, on(row), reconcile()).await.unwrap();
    assert_eq!(lab.status(&engine, row), Status::Detached);
    assert_eq!(engine.world().volumes[&row].job, other);
    assert_marked(&lab, &engine, row, v);
}

#[tokio::test(start_paused = true)]
async fn an_imported_volume_that_carries_this_host_is_never_marked() {
    for by_cloud in [true, false] {
        let lab = Lab::new();
        let v = lab.foreign(GIB, None);
        let row = lab.import(v, "d");
        lab.put(v, Some(lab.host));
        let name = lab.plug(v, GIB);
        if by_cloud {
            lab.state().sky.volumes.get_mut(&v).unwrap().carries_host = Some("it is the root disk".into());
        } else {
            lab.state().kernel.carries.insert(name.to_string(), "it is mounted on /".into());
        }
        let engine = lab.start().await;
        lab.until_status(&engine, row, Status::Conflict).await;
        assert!(why(&engine, row).contains("never marked"), "{}", why(&engine, row));
        for action in [reconcile(), attach(), detach(), delete(v)] {
            lab.run(&engine, on(row), action).await.unwrap_err();
        }
        assert_eq!((lab.count("begin claim"), lab.cloud_of(v).unwrap().mark), (0, None));
        lab.run(&engine, on(row), Action::Release { volume: v }).await.unwrap();
    }
}

#[tokio::test(start_paused = true)]
async fn an_imported_volume_that_comes_to_carry_this_host_after_the_look_is_not_marked_either() {
    for by_cloud in [true, false] {
        let lab = Lab::new();
        let v = lab.foreign(GIB, None);
        let row = lab.import(v, "d");
        lab.put(v, Some(lab.host));
        let name = lab.plug(v, GIB);
        lab.script(At::Begin, Act::HoldBefore);
        let engine = lab.begin();
        lab.until_logged("held begin claim", 1).await;
        if by_cloud {
            lab.state().sky.volumes.get_mut(&v).unwrap().carries_host = Some("it is the root disk".into());
        } else {
            lab.state().kernel.carries.insert(name.to_string(), "it is mounted on /".into());
        }
        lab.release(At::Begin);
        lab.until_status(&engine, row, Status::Conflict).await;
        assert_eq!((lab.count("end claim failed"), lab.count("cloud mark")), (1, 0));
    }
}

#[tokio::test(start_paused = true)]
async fn two_hosts_that_import_one_volume_never_share_it() {
    for held in [false, true] {
        let (one, two) = (Lab::new(), Lab::new());
        let v = one.foreign(GIB, None);
        let rows = [one.import(v, "d"), two.import(v, "d")];
        if held {
            // Both have seen it without a mark before either sets one.
            one.script(At::Mark, Act::HoldBefore);
            one.script(At::Mark, Act::HoldBefore);
        }
        let engines = [one.begin(), two.begin_in(&one)];
        if held {
            one.until_logged("cloud mark", 2).await;
            one.release(At::Mark);
            one.release(At::Mark);
        }
        let settled = |engine: &Arc<Engine>, row: DiskRow| {
            let world = engine.world();
            let volume = &world.volumes[&row];
            (volume.running.is_none() && volume.base != Status::Unknown).then_some((volume.base, volume.epoch))
        };
        for (lab, (engine, row)) in [&one, &two].into_iter().zip(engines.iter().zip(rows)) {
            lab.until_world(engine, "settled", |_| settled(engine, row).is_some()).await;
        }
        let mut found: Vec<_> = engines.iter().zip(rows).filter_map(|(e, row)| settled(e, row)).collect();
        found.sort();
        let [(Status::Detached, epoch), (Status::Conflict, 0)] = found[..] else { panic!("{found:?}") };
        assert!(epoch > 0);
        let mark = one.cloud_of(v).unwrap().mark.unwrap();
        let winner = if mark.record == one.record_id() { 0 } else { 1 };
        assert_eq!(settled(&engines[winner], rows[winner]), Some((Status::Detached, epoch)));
        let loser = &engines[1 - winner];
        assert_eq!(&*loser.world().volumes[&rows[1 - winner]].owner, mark.to_string().as_str());
        let lab = [&one, &two][1 - winner];
        assert!(lab.run(loser, on(rows[1 - winner]), attach()).await.is_err());
        assert!(lab.run(loser, on(rows[1 - winner]), delete(v)).await.is_err());
        lab.run(loser, on(rows[1 - winner]), Action::Release { volume: v }).await.unwrap();
        assert_eq!(one.cloud_of(v).unwrap().mark, Some(mark));
        assert_eq!((one.count("cloud attach"), one.count("cloud delete")), (0, 0));
    }
}

#[tokio::test(start_paused = true)]
async fn s8_what_is_commanded_on_an_unmarked_volume_waits_for_our_mark() {
    for late in [false, true] {
        for action in [attach(), detach(), Action::Resize { size: 2 * GIB }, reconcile(), rename(), hand_over()] {
            let lab = Lab::new();
            let v = lab.foreign(GIB, None);
            let row = lab.import(v, "d");
            lab.state().sky.down = late;
            if !late {
                lab.script(At::Mark, Act::HoldBefore);
            }
            let engine = lab.start().await;
            lab.job(&engine, "other").await;
            if late {
                assert_eq!(lab.run(&engine, on(row), action.clone()).await.unwrap_err().errno(), Errno::EHOSTUNREACH);
                lab.state().sky.down = false;
                lab.forget_log();
                lab.script(At::Mark, Act::HoldBefore);
            }
            let going = lab.go(&engine, on(row), action.clone());
            lab.until_logged("cloud mark", 1).await;
            let changing = ["cloud attach", "cloud detach", "cloud resize", "begin move", "begin disk"];
            assert_eq!(lab.lines(&changing), Vec::<String>::new(), "{action:?}");
            // Giving it up now would leave our mark on what is in no job.
            let release = lab.run(&engine, on(row), Action::Release { volume: v }).await.unwrap_err();
            assert_eq!(release.errno(), Errno::EBUSY, "{release}");
            lab.release(At::Mark);
            going.ticket.wait().await.unwrap();
            let row = engine.world().by_uuid[&v];
            assert_marked(&lab, &engine, row, v);
            assert_eq!(lab.state().sky.violations, Vec::<String>::new());
        }
    }
}

fn rename() -> Action {
    Action::Disk { name: disk_name("renamed") }
}

fn hand_over() -> Action {
    Action::Move { job: job_id("other") }
}

#[tokio::test(start_paused = true)]
async fn x8_an_unmarked_volume_is_released_without_the_cloud_and_no_tag_is_touched() {
    let lab = Lab::new();
    let v = lab.foreign(GIB, None);
    let row = lab.import(v, "d");
    lab.state().sky.down = true;
    let engine = lab.start().await;
    let destroy = Action::Destroy { job: job_id("imported") };
    let stopped = lab.run(&engine, Target::Job(crate::model::JobRow(1)), destroy).await.unwrap_err();
    assert!(stopped.to_string().contains("imported and not yet seen"), "{stopped}");
    lab.run(&engine, on(row), Action::Release { volume: v }).await.unwrap();
    assert!(engine.world().volumes.is_empty());
    lab.state().sky.down = false;
    lab.run(&engine, Target::Root, reconcile()).await.unwrap();
    assert_eq!((lab.count("cloud mark"), lab.cloud_of(v).unwrap().mark), (0, None));
}

#[tokio::test(start_paused = true)]
async fn a_crash_at_each_point_of_volfss_own_claim_ends_with_one_mark_that_record_and_cloud_agree_on() {
    let deaths = [
        (At::Begin, Act::KillBefore),
        (At::Begin, Act::KillAfter),
        (At::Mark, Act::KillBefore),
        (At::Mark, Act::KillAfter),
        (At::End, Act::KillBefore),
        (At::End, Act::KillAfter),
    ];
    for (at, act) in deaths {
        let lab = Lab::new();
        let v = lab.foreign(GIB, None);
        let row = lab.import(v, "d");
        lab.script(at, act.clone());
        let life = lab.life() + 1;
        let _dies = lab.begin();
        lab.until_killed(life).await;
        lab.state().script.clear();
        let engine = lab.start().await;
        settled(&lab, &engine).await;
        assert_eq!(lab.status(&engine, row), Status::Detached, "{at:?} {act:?}");
        assert_marked(&lab, &engine, row, v);
        let marked = lab.cloud_of(v).unwrap().mark;
        // And it stays so.
        let engine = lab.start().await;
        settled(&lab, &engine).await;
        assert_eq!(lab.cloud_of(v).unwrap().mark, marked, "{at:?} {act:?}");
    }
}

#[tokio::test(start_paused = true)]
async fn what_an_unclear_answer_left_on_an_imported_volume_is_taken_up_again() {
    for restart in [false, true] {
        let lab = Lab::new();
        let v = lab.foreign(GIB, None);
        let row = lab.import(v, "d");
        // It is set, nobody hears so, and no look tells for a while.
        lab.script(At::Mark, Act::Down(Box::new(Act::AmbiguousDone)));
        let mut engine = lab.start().await;
        lab.until_logged("end claim ambiguous", 1).await;
        lab.until_world(&engine, "idle", |w| w.volumes[&row].running.is_none()).await;
        assert_eq!(lab.status(&engine, row), Status::Unknown);
        assert!(lab.cloud_of(v).unwrap().mark.is_some());
        lab.state().sky.down = false;
        if restart {
            engine = lab.start().await;
        }
        lab.run(&engine, on(row), reconcile()).await.unwrap();
        assert_eq!(lab.status(&engine, row), Status::Detached);
        assert_marked(&lab, &engine, row, v);
    }
}

#[tokio::test(start_paused = true)]
async fn a_cloud_that_refuses_the_mark_is_not_asked_at_every_round_and_reconcile_says_why() {
    let lab = Lab::new();
    let v = lab.foreign(GIB, None);
    let row = lab.import(v, "d");
    for _ in 0..100 {
        lab.script(At::Mark, Act::Refuse(Refusal::Other));
    }
    let engine = lab.start().await;
    tokio::time::sleep(Duration::from_secs(24 * 3600)).await;
    let asked = lab.count("begin claim");
    assert!((5..40).contains(&asked), "{asked} times in a day");
    assert_eq!(lab.status(&engine, row), Status::Unknown);
    let error = lab.run(&engine, on(row), reconcile()).await.unwrap_err();
    assert!(matches!(&error, Error::NotSettled { why, .. } if why.contains("could not be put on it")), "{error}");
    assert_eq!(lab.count("begin claim"), asked + 1, "a command is not put off");
    lab.state().script.clear();
    lab.run(&engine, Target::Root, reconcile()).await.unwrap();
    assert_marked(&lab, &engine, row, v);
    lab.run(&engine, on(row), reconcile()).await.unwrap();
    assert!(engine.world().volumes[&row].error.is_none());
}

#[tokio::test(start_paused = true)]
async fn volfss_own_claim_can_be_cancelled_and_abandoned_and_is_tried_again() {
    for abandon in [false, true] {
        let lab = Lab::new();
        let v = lab.foreign(GIB, None);
        let row = lab.import(v, "d");
        lab.script(At::Mark, if abandon { Act::HoldAfter } else { Act::Refuse(Refusal::Passing) });
        let engine = lab.start().await;
        lab.until_logged("cloud mark", 1).await;
        let id = engine.world().operations.values().find(|op| op.ended.is_none()).unwrap().id;
        let ends = if abandon { Action::Abandon { id } } else { Action::Cancel { id: Some(id) } };
        lab.run(&engine, Target::Root, ends).await.unwrap();
        lab.until_world(&engine, "idle", |w| w.volumes[&row].running.is_none()).await;
        let outcome = engine.world().operations[&id].ended.as_ref().unwrap().0;
        let wanted = if abandon { Outcome::Abandoned } else { Outcome::Failed };
        assert!(outcome == wanted || outcome == Outcome::Cancelled, "{outcome:?}");
        lab.release(At::Mark);
        lab.until_status(&engine, row, Status::Detached).await;
        assert_marked(&lab, &engine, row, v);
    }
}

#[tokio::test(start_paused = true)]
async fn a_claim_that_a_crash_left_behind_and_an_import_of_its_volume_end_as_one_ownership() {
    for act in [Act::KillBefore, Act::KillAfter] {
        let lab = Lab::new();
        let v = lab.foreign(GIB, None);
        let engine = lab.start().await;
        let job = lab.job(&engine, "j").await;
        let life = lab.life();
        lab.script(At::Mark, act);
        lab.go(&engine, Target::Job(job), Action::Claim { volume: v, disk: Some(disk_name("d")), from: None });
        lab.until_killed(life).await;
        let row = lab.import(v, "imported");
        let engine = lab.start().await;
        settled(&lab, &engine).await;
        assert_eq!(engine.world().volumes.len(), 1);
        assert_eq!(lab.status(&engine, row), Status::Detached);
        assert_marked(&lab, &engine, row, v);
        assert!(lab.lines(&["refused"]).is_empty(), "{:?}", lab.lines(&["refused"]));
    }
}
