//! Attach, detach, resize and delete, step by step, through the fakes.

use std::time::Duration;

use super::super::Target;
use super::fakes::*;
use crate::cloud::Refusal;
use crate::command::{Action, Command};
use crate::error::{Errno, Error};
use crate::model::{Outcome, Slot, Status, VmId};
use crate::store::Change;

#[tokio::test(start_paused = true)]
async fn c3_attach_is_journaled_before_the_call_and_recorded_with_its_end() {
    let lab = Lab::new();
    let engine = lab.start().await;
    let job = lab.job(&engine, "j").await;
    let (row, v) = lab.make(&engine, job, "d").await;
    lab.forget_log();
    lab.run(&engine, on(row), attach()).await.unwrap();
    let lines = lab.lines(&["begin", "cloud attach", "end"]);
    assert_eq!(lines, ["begin attach".to_owned(), format!("cloud attach {v}"), "end attach done".to_owned()]);
    let batch = lab.state().record.batches.last().unwrap().clone();
    assert!(batch.iter().any(|c| matches!(c, Change::MappingSet(m) if m.volume == v && m.device.is_some())));
    assert!(batch.iter().any(|c| matches!(c, Change::VolumeStatus { status: Status::Attached, .. })));
    let volume = engine.world().volumes[&row].clone();
    assert_eq!(volume.status(), Status::Attached);
    let now = engine.device(row).unwrap();
    assert_eq!(now.incarnation, lab.disks_of(v)[0].incarnation);
    assert_eq!(engine.mapped(now.mapping).unwrap().name, now.name);
    assert_eq!(volume.history.last().unwrap().outcome, Outcome::Done);
    assert!(lab.unfinished().is_empty());
}

#[tokio::test(start_paused = true)]
async fn c4_detach_withdraws_holds_calls_and_waits_until_the_node_is_gone() {
    let lab = Lab::new();
    let engine = lab.start().await;
    let job = lab.job(&engine, "j").await;
    let (row, v) = lab.make(&engine, job, "d").await;
    lab.run(&engine, on(row), attach()).await.unwrap();
    let mapping = engine.device(row).unwrap().mapping;
    lab.state().kernel.stay = true;
    lab.forget_log();
    let going = lab.go(&engine, on(row), detach());
    assert_eq!(lab.status(&engine, row), Status::Detaching);
    assert_eq!(engine.device(row).unwrap_err().errno(), Errno::ENODEV, "v2: withdrawn from the first moment");
    assert_eq!(engine.mapped(mapping).unwrap_err().errno(), Errno::ENODEV);
    lab.until_logged("cloud detach", 1).await;
    tokio::time::sleep(Duration::from_secs(30)).await;
    assert_eq!(going.ticket.outcome(), None, "not done while the node is there");
    lab.unplug(v);
    going.ticket.wait().await.unwrap();
    let lines = lab.lines(&["begin", "hold", "cloud detach", "end"]);
    assert_eq!(lines, ["begin detach", "hold vd0", &format!("cloud detach {v}"), "end detach done"]);
    assert_eq!(lab.status(&engine, row), Status::Detached);
    assert!(!lab.state().record.mappings.contains_key(&v));
    assert!(engine.mapped(mapping).is_err());
    assert_eq!(lab.state().kernel.open.values().sum::<usize>(), 0, "our descriptor is closed");
}

#[tokio::test(start_paused = true)]
async fn c4_a_device_in_use_or_unflushed_is_put_back_under_the_same_mapping_and_the_cloud_is_not_called() {
    for (held, errno) in [(Held::InUse(holder()), Errno::EBUSY), (Held::NotFlushed, Errno::EIO)] {
        let lab = Lab::new();
        let engine = lab.start().await;
        let job = lab.job(&engine, "j").await;
        let (row, _) = lab.make(&engine, job, "d").await;
        lab.run(&engine, on(row), attach()).await.unwrap();
        let before = engine.device(row).unwrap();
        lab.state().kernel.holds.push_back(held);
        let error = lab.run(&engine, on(row), detach()).await.unwrap_err();
        assert_eq!(error.errno(), errno, "{error}");
        assert_eq!(lab.count("cloud detach"), 0);
        let after = engine.device(row).unwrap();
        assert_eq!((after.mapping, after.incarnation), (before.mapping, before.incarnation));
        assert_eq!(lab.status(&engine, row), Status::Attached);
        let text = engine.world().volumes[&row].error.clone().unwrap();
        assert_eq!(&*text.verb, "detach");
        lab.run(&engine, on(row), detach()).await.unwrap();
        assert!(engine.world().volumes[&row].error.is_none(), "r8: a success of the same verb clears it");
    }
}

#[tokio::test(start_paused = true)]
async fn c4_a_provider_that_wants_the_sole_opener_finds_none_of_ours_and_a_refusal_puts_ours_back() {
    let lab = Lab::with(|about| about.detach_wants_sole_opener = true);
    let engine = lab.start().await;
    let job = lab.job(&engine, "j").await;
    let (row, v) = lab.make(&engine, job, "d").await;
    lab.run(&engine, on(row), attach()).await.unwrap();
    let before = engine.device(row).unwrap();
    lab.script(At::Detach, Act::Refuse(Refusal::InUse));
    let error = lab.run(&engine, on(row), detach()).await.unwrap_err();
    assert!(matches!(error, Error::InUse { .. }), "{error}");
    let after = engine.device(row).unwrap();
    assert_eq!(after.mapping, before.mapping, "the mapping's row stays");
    assert_eq!(lab.state().record.mappings[&v].row, before.mapping);
    lab.run(&engine, on(row), detach()).await.unwrap();
    assert_eq!(lab.status(&engine, row), Status::Detached);
}

#[tokio::test(start_paused = true)]
async fn a_store_that_fails_at_begin_is_eio_and_nothing_was_started() {
    let lab = Lab::new();
    let engine = lab.start().await;
    let job = lab.job(&engine, "j").await;
    let (row, v) = lab.make(&engine, job, "d").await;
    let before = lab.lines(&["cloud attach", "cloud detach", "cloud delete", "cloud resize", "cloud mark"]).len();
    for action in [attach(), Action::Resize { size: 2 * GIB }, delete(v), Action::Release { volume: v }] {
        lab.script(At::Begin, Act::Fail);
        let error = lab.run(&engine, on(row), action).await.unwrap_err();
        assert_eq!(error.errno(), Errno::EIO, "{error}");
        assert_eq!(lab.status(&engine, row), Status::Detached);
    }
    lab.script(At::Begin, Act::Fail);
    let error = lab.run(&engine, Target::Job(job), create("e", GIB)).await.unwrap_err();
    assert_eq!(error.errno(), Errno::EIO);
    assert!(engine.world().jobs[&job].creating.is_empty());
    let after = lab.lines(&["cloud attach", "cloud detach", "cloud delete", "cloud resize", "cloud mark"]).len();
    assert_eq!((before, lab.count("cloud create")), (after, 1));
    lab.run(&engine, on(row), attach()).await.unwrap();
}

#[tokio::test(start_paused = true)]
async fn a_store_that_fails_at_the_end_is_eio_then_unknown_and_by_itself_attached() {
    let lab = Lab::new();
    let engine = lab.start().await;
    let job = lab.job(&engine, "j").await;
    let (row, v) = lab.make(&engine, job, "d").await;
    lab.script(At::Attach, Act::HoldAfter);
    let going = lab.go(&engine, on(row), attach());
    lab.until_logged("cloud attach", 1).await;
    lab.state().record.broken = true;
    lab.release(At::Attach);
    let error = going.ticket.wait().await.unwrap_err();
    assert_eq!(error.errno(), Errno::EIO, "{error}");
    assert_eq!(lab.status(&engine, row), Status::Unknown);
    assert_eq!(engine.device(row).unwrap_err().errno(), Errno::ENODEV, "r9");
    tokio::time::sleep(Duration::from_secs(30)).await;
    assert_eq!(lab.status(&engine, row), Status::Unknown);
    lab.state().record.broken = false;
    lab.until_status(&engine, row, Status::Attached).await;
    assert!(engine.device(row).is_ok());
    assert_eq!(lab.recorded(v), Status::Attached);
    assert!(lab.unfinished().is_empty());
    assert_eq!(lab.count("cloud attach"), 1);
}

#[tokio::test(start_paused = true)]
async fn whatever_the_store_missed_at_the_end_settles_by_itself_before_the_next_round() {
    for verb in ["resize", "disk", "move", "detach", "delete"] {
        let lab = Lab::new();
        let engine = lab.start().await;
        let job = lab.job(&engine, "j").await;
        lab.job(&engine, "k").await;
        let (row, v) = lab.make(&engine, job, "d").await;
        if verb == "detach" {
            lab.run(&engine, on(row), attach()).await.unwrap();
        }
        let action = match verb {
            "resize" => Action::Resize { size: 2 * GIB },
            "disk" => Action::Disk { name: disk_name("e") },
            "move" => Action::Move { job: job_id("k") },
            "detach" => detach(),
            _ => delete(v),
        };
        lab.script(At::End, Act::Fail);
        let error = lab.run(&engine, on(row), action).await.unwrap_err();
        assert_eq!(error.errno(), Errno::EIO, "{verb}: {error}");
        let surveys = lab.count("cloud survey");
        lab.until_world(&engine, verb, |w| match w.by_uuid.get(&v) {
            Some(row) => w.volumes[row].running.is_none() && w.volumes[row].status() == Status::Detached,
            None => verb == "delete",
        })
        .await;
        assert_eq!(lab.count("cloud survey"), surveys, "{verb}: without waiting for a round");
        assert!(lab.unfinished().is_empty(), "{verb}");
    }
}

#[tokio::test(start_paused = true)]
async fn an_end_that_the_store_missed_after_a_failure_is_written_later() {
    let lab = Lab::new();
    let engine = lab.start().await;
    let job = lab.job(&engine, "j").await;
    let (row, _) = lab.make(&engine, job, "d").await;
    lab.script(At::Attach, Act::Refuse(Refusal::Other));
    lab.script(At::End, Act::Fail);
    let error = lab.run(&engine, on(row), attach()).await.unwrap_err();
    assert_eq!(error.errno(), Errno::EREMOTEIO);
    lab.until("the end is in the record", |s| s.record.ops.values().all(|o| o.ended.is_some())).await;
    assert_eq!(lab.status(&engine, row), Status::Detached);
}

#[tokio::test(start_paused = true)]
async fn a_refusal_of_each_kind_leaves_the_volume_as_it_was() {
    let kinds = [
        (Refusal::Conflict, Errno::EBUSY),
        (Refusal::NoVm, Errno::EREMOTEIO),
        (Refusal::Capacity, Errno::ENOSPC),
        (Refusal::Quota, Errno::EDQUOT),
        (Refusal::Unsupported, Errno::EOPNOTSUPP),
        (Refusal::Other, Errno::EREMOTEIO),
    ];
    let lab = Lab::new();
    let engine = lab.start().await;
    let job = lab.job(&engine, "j").await;
    let (row, v) = lab.make(&engine, job, "d").await;
    for (why, errno) in kinds.clone() {
        for (at, action) in
            [(At::Attach, attach()), (At::Resize, Action::Resize { size: 2 * GIB }), (At::Delete, delete(v))]
        {
            lab.script(at, Act::Refuse(why.clone()));
            let error = lab.run(&engine, on(row), action).await.unwrap_err();
            assert_eq!(error.errno(), errno, "{at:?} {why:?}: {error}");
            assert_eq!(lab.status(&engine, row), Status::Detached);
            assert_eq!(lab.recorded(v), Status::Detached);
        }
    }
    lab.run(&engine, on(row), attach()).await.unwrap();
    let mapping = engine.device(row).unwrap().mapping;
    for (why, errno) in kinds {
        lab.script(At::Detach, Act::Refuse(why.clone()));
        let error = lab.run(&engine, on(row), detach()).await.unwrap_err();
        assert_eq!(error.errno(), errno, "detach {why:?}: {error}");
        assert_eq!(engine.device(row).unwrap().mapping, mapping, "served again, as it was");
    }
}

#[tokio::test(start_paused = true)]
async fn an_unreachable_cloud_starts_nothing() {
    let lab = Lab::new();
    let engine = lab.start().await;
    let job = lab.job(&engine, "j").await;
    let (row, v) = lab.make(&engine, job, "d").await;
    for action in [attach(), Action::Resize { size: 2 * GIB }, delete(v), Action::Release { volume: v }] {
        lab.state().sky.down = true;
        let error = lab.run(&engine, on(row), action).await.unwrap_err();
        assert_eq!(error.errno(), Errno::EHOSTUNREACH, "{error}");
        assert_eq!(lab.status(&engine, row), Status::Detached);
        lab.state().sky.down = false;
    }
    for (at, action) in [(At::Attach, attach()), (At::Delete, delete(v)), (At::Mark, Action::Release { volume: v })] {
        lab.script(at, Act::Unreachable);
        let error = lab.run(&engine, on(row), action).await.unwrap_err();
        assert_eq!(error.errno(), Errno::EHOSTUNREACH, "{error}");
        assert_eq!(lab.status(&engine, row), Status::Detached);
    }
    assert!(lab.unfinished().is_empty());
}

#[tokio::test(start_paused = true)]
async fn an_ambiguous_answer_is_settled_by_looking() {
    let lab = Lab::new();
    let engine = lab.start().await;
    let job = lab.job(&engine, "j").await;
    let (row, v) = lab.make(&engine, job, "d").await;
    lab.script(At::Attach, Act::Ambiguous);
    assert_eq!(lab.run(&engine, on(row), attach()).await.unwrap_err().errno(), Errno::EHOSTUNREACH);
    assert_eq!(lab.status(&engine, row), Status::Detached, "the look says that nothing happened");
    lab.script(At::Attach, Act::AmbiguousDone);
    lab.run(&engine, on(row), attach()).await.unwrap();
    assert_eq!(lab.status(&engine, row), Status::Attached);
    lab.script(At::Detach, Act::Ambiguous);
    assert!(lab.run(&engine, on(row), detach()).await.is_err());
    assert_eq!(lab.status(&engine, row), Status::Attached);
    assert!(engine.device(row).is_ok());
    lab.script(At::Detach, Act::AmbiguousDone);
    lab.run(&engine, on(row), detach()).await.unwrap();
    lab.script(At::Resize, Act::AmbiguousDone);
    let _either = lab.run(&engine, on(row), Action::Resize { size: 2 * GIB }).await;
    assert_eq!(engine.world().volumes[&row].size, 2 * GIB);
    assert_eq!(lab.status(&engine, row), Status::Detached);
    lab.script(At::Delete, Act::AmbiguousDone);
    lab.run(&engine, on(row), delete(v)).await.unwrap();
    assert!(engine.world().volumes.is_empty());
}

#[tokio::test(start_paused = true)]
async fn v7_an_ambiguous_answer_that_nobody_can_settle_is_unknown_until_the_cloud_speaks() {
    for done in [true, false] {
        let lab = Lab::new();
        let engine = lab.start().await;
        let job = lab.job(&engine, "j").await;
        let (row, v) = lab.make(&engine, job, "d").await;
        let answer = if done { Act::AmbiguousDone } else { Act::Ambiguous };
        lab.state().kernel.muted = true;
        lab.script(At::Attach, Act::Down(Box::new(answer)));
        let error = lab.run(&engine, on(row), attach()).await.unwrap_err();
        assert_eq!(error.errno(), Errno::EHOSTUNREACH);
        assert_eq!(lab.status(&engine, row), Status::Unknown);
        assert!(engine.device(row).is_err());
        assert_eq!(lab.recorded(v), Status::Unknown);
        assert_eq!(engine.world().volumes[&row].history.last().unwrap().outcome, Outcome::Ambiguous);
        lab.state().sky.down = false;
        let settled = if done { Status::Attached } else { Status::Detached };
        lab.until_status(&engine, row, settled).await;
        assert_eq!(engine.device(row).is_ok(), done);
    }
}

#[tokio::test(start_paused = true)]
async fn a_hundred_equal_commands_are_one_call_and_all_get_its_outcome() {
    let lab = Lab::new();
    let engine = lab.start().await;
    let job = lab.job(&engine, "j").await;
    let (row, _) = lab.make(&engine, job, "d").await;
    for (act, ok) in [(Act::HoldAfter, true), (Act::Refuse(Refusal::Other), false)] {
        lab.forget_log();
        // Held while the others come, then its own answer.
        lab.script(At::Find, Act::HoldBefore);
        lab.script(if ok { At::Attach } else { At::Detach }, act);
        let action = if ok { attach() } else { detach() };
        let all: Vec<_> = (0..100).map(|_| lab.go(&engine, on(row), action.clone())).collect();
        let ops: std::collections::BTreeSet<_> = all.iter().map(|s| s.op).collect();
        assert_eq!(ops.len(), 1, "one operation");
        let other = lab.go(&engine, on(row), Action::Disk { name: disk_name("x") });
        assert_eq!(other.ticket.outcome().unwrap().unwrap_err().errno(), Errno::EBUSY, "at once");
        lab.release(At::Find);
        lab.release(At::Attach);
        for s in all {
            assert_eq!(s.ticket.wait().await.is_ok(), ok);
        }
        assert_eq!(lab.count("cloud attach") + lab.count("cloud detach"), 1);
        assert_eq!(lab.count("begin"), 1);
    }
}

#[tokio::test(start_paused = true)]
async fn nowait_returns_when_the_journal_has_it() {
    let lab = Lab::new();
    let engine = lab.start().await;
    let job = lab.job(&engine, "j").await;
    let (row, _) = lab.make(&engine, job, "d").await;
    lab.script(At::Begin, Act::HoldBefore);
    lab.script(At::Attach, Act::HoldBefore);
    let s = engine.submit(on(row), Command { action: attach(), timeout: None, nowait: true }, root());
    lab.until_logged("held begin", 1).await;
    assert_eq!(s.ticket.outcome(), None);
    lab.release(At::Begin);
    s.ticket.wait().await.unwrap();
    assert_eq!(lab.status(&engine, row), Status::Attaching);
    lab.release(At::Attach);
    lab.until_status(&engine, row, Status::Attached).await;
}

#[tokio::test(start_paused = true)]
async fn a_caller_that_cannot_be_seen_waits_at_most_a_hundred_seconds() {
    let lab = Lab::new();
    let engine = lab.start().await;
    let job = lab.job(&engine, "j").await;
    let (row, _) = lab.make(&engine, job, "d").await;
    let blind = crate::model::Caller { pid: 0, ..root() };
    let ask = |timeout: Option<u64>, caller: &crate::model::Caller| {
        let timeout = timeout.map(Duration::from_secs);
        engine.submit(on(row), Command { action: attach(), timeout, nowait: false }, caller.clone()).deadline
    };
    assert_eq!(ask(Some(0), &blind), Some(Duration::from_secs(100)));
    assert_eq!(ask(None, &blind), Some(Duration::from_secs(100)));
    assert_eq!(ask(Some(7), &blind), Some(Duration::from_secs(7)));
    assert_eq!(ask(Some(0), &root()), None);
    assert_eq!(ask(None, &root()), Some(Duration::from_secs(300)));
}

#[tokio::test(start_paused = true)]
async fn a_command_while_unknown_finds_out_first() {
    let lab = Lab::new();
    let engine = lab.start().await;
    let job = lab.job(&engine, "j").await;
    let (row, _) = lab.make(&engine, job, "d").await;
    lab.kill();
    lab.state().sky.down = true;
    let engine = lab.start().await;
    assert_eq!(lab.status(&engine, row), Status::Unknown);
    for action in [attach(), detach(), Action::Resize { size: 2 * GIB }] {
        let error = lab.run(&engine, on(row), action).await.unwrap_err();
        assert_eq!(error.errno(), Errno::EHOSTUNREACH, "{error}");
    }
    lab.state().sky.down = false;
    lab.run(&engine, on(row), attach()).await.unwrap();
    assert_eq!(lab.status(&engine, row), Status::Attached);
}

#[tokio::test(start_paused = true)]
async fn s9_after_an_abandon_a_late_answer_changes_nothing() {
    let lab = Lab::new();
    let engine = lab.start().await;
    let job = lab.job(&engine, "j").await;
    let (row, v) = lab.make(&engine, job, "d").await;
    lab.script(At::Attach, Act::HoldBefore);
    let going = lab.go(&engine, on(row), attach());
    lab.until_logged("cloud attach", 1).await;
    let id = going.op.unwrap();
    let refused =
        engine.submit(Target::Root, Command { action: Action::Abandon { id }, timeout: None, nowait: false }, user());
    assert_eq!(refused.ticket.wait().await.unwrap_err().errno(), Errno::EPERM, "root only");
    lab.run(&engine, Target::Root, Action::Abandon { id }).await.unwrap();
    assert!(matches!(going.ticket.wait().await, Err(Error::Abandoned { .. })));
    assert_eq!(lab.status(&engine, row), Status::Unknown);
    assert_eq!(engine.world().counters.abandoned, 1);
    lab.run(&engine, on(row), Action::Reconcile { vm: None }).await.unwrap();
    assert_eq!(lab.status(&engine, row), Status::Detached);
    lab.run(&engine, on(row), Action::Disk { name: disk_name("newer") }).await.unwrap();
    let ends = lab.count("end");
    lab.state().kernel.plug = Plug::ByHand;
    lab.release(At::Attach);
    lab.until("the cloud has attached it late", |s| s.sky.volumes[&v].attached.is_some()).await;
    tokio::time::sleep(Duration::from_secs(5)).await;
    assert_eq!(lab.count("end"), ends, "the record is not touched");
    assert_eq!(lab.status(&engine, row), Status::Detached);
    assert_eq!(lab.run(&engine, Target::Root, Action::Abandon { id }).await.unwrap_err().errno(), Errno::ENOENT);
}

#[tokio::test(start_paused = true)]
async fn c14_an_abandon_and_the_end_of_the_same_operation_never_both_happen() {
    let lab = Lab::new();
    let engine = lab.start().await;
    let job = lab.job(&engine, "j").await;
    let (row, v) = lab.make(&engine, job, "d").await;
    lab.script(At::End, Act::HoldBefore);
    let going = lab.go(&engine, on(row), delete(v));
    lab.until_logged("held end delete", 1).await;
    let abandoned = lab.run(&engine, Target::Root, Action::Abandon { id: going.op.unwrap() }).await;
    assert_eq!(abandoned.unwrap_err().errno(), Errno::EBUSY, "it has its answer, and is being recorded");
    lab.release(At::End);
    going.ticket.wait().await.unwrap();
    assert!(engine.world().volumes.is_empty());
    assert_eq!(lab.count("refused"), 0);
}

#[tokio::test(start_paused = true)]
async fn c14_a_cancel_stops_before_the_next_step() {
    let lab = Lab::new();
    let engine = lab.start().await;
    let job = lab.job(&engine, "j").await;
    let (row, _) = lab.make(&engine, job, "d").await;
    lab.script(At::Find, Act::HoldAfter);
    let going = lab.go(&engine, on(row), attach());
    lab.until_logged("begin attach", 1).await;
    lab.run(&engine, Target::Root, Action::Cancel { id: going.op }).await.unwrap();
    lab.release(At::Find);
    assert_eq!(going.ticket.wait().await.unwrap_err(), Error::Cancelled);
    assert_eq!(lab.count("cloud attach"), 0);
    assert_eq!(lab.status(&engine, row), Status::Detached);
}

#[tokio::test(start_paused = true)]
async fn a_refusal_that_passes_by_itself_is_retried() {
    let lab = Lab::new();
    let engine = lab.start().await;
    let job = lab.job(&engine, "j").await;
    let (row, v) = lab.make(&engine, job, "d").await;
    for at in [At::Attach, At::Mark] {
        for _ in 0..3 {
            lab.script(at, Act::Refuse(Refusal::Passing));
        }
    }
    lab.run(&engine, on(row), attach()).await.unwrap();
    assert_eq!(lab.count("cloud attach"), 4);
    lab.run(&engine, on(row), detach()).await.unwrap();
    lab.run(&engine, on(row), Action::Release { volume: v }).await.unwrap();
    assert_eq!(lab.count("cloud mark"), 4);
}

#[tokio::test(start_paused = true)]
async fn c5_resize_is_done_when_the_kernel_shows_it_and_the_device_stays() {
    let lab = Lab::new();
    let engine = lab.start().await;
    let job = lab.job(&engine, "j").await;
    let (row, v) = lab.make(&engine, job, "d").await;
    lab.run(&engine, on(row), attach()).await.unwrap();
    let before = engine.device(row).unwrap();
    lab.script(At::Resize, Act::HoldAfter);
    let going = lab.go(&engine, on(row), Action::Resize { size: 3 * GIB });
    lab.until_logged("cloud resize", 1).await;
    assert_eq!(engine.device(row).unwrap().mapping, before.mapping, "v2: the node while resizing");
    assert_eq!(lab.status(&engine, row), Status::Resizing);
    lab.release(At::Resize);
    going.ticket.wait().await.unwrap();
    let after = engine.device(row).unwrap();
    assert_eq!((after.mapping, after.size), (before.mapping, 3 * GIB));
    let record = lab.state().record.mappings[&v].device.clone().unwrap();
    assert_eq!((record.size, lab.state().record.volumes[&v].size), (3 * GIB, 3 * GIB));
}

#[tokio::test(start_paused = true)]
async fn c7_delete_looks_at_the_mark_directly_before() {
    let lab = Lab::new();
    let engine = lab.start().await;
    let job = lab.job(&engine, "j").await;
    let (row, v) = lab.make(&engine, job, "d").await;
    let ours = lab.cloud_of(v).unwrap().mark;
    for action in [delete(v), attach(), Action::Resize { size: 2 * GIB }] {
        lab.remark(v, None);
        let error = lab.run(&engine, on(row), action).await.unwrap_err();
        assert_eq!(error.errno(), Errno::EPERM, "{error}");
        assert_eq!(lab.status(&engine, row), Status::Conflict);
        lab.remark(v, ours);
        lab.run(&engine, on(row), Action::Reconcile { vm: None }).await.unwrap();
    }
    lab.put(v, Some(VmId::random()));
    assert_eq!(lab.run(&engine, on(row), delete(v)).await.unwrap_err().errno(), Errno::EBUSY);
    assert_eq!((lab.count("cloud delete"), lab.count("cloud attach")), (0, 0));
}

#[tokio::test(start_paused = true)]
async fn c3_attach_to_another_vm_is_remote_there_and_detached_from_there_only_when_it_is_stopped() {
    let lab = Lab::new();
    let engine = lab.start().await;
    let job = lab.job(&engine, "j").await;
    let (row, v) = lab.make(&engine, job, "d").await;
    let vm = lab.vm(true);
    lab.run(&engine, on(row), Action::Attach { vm: Some(vm), slot: Some(Slot::Id(2)) }).await.unwrap();
    assert_eq!(lab.status(&engine, row), Status::Remote);
    assert_eq!(lab.state().record.mappings[&v].vm, vm);
    assert!(engine.world().vms.contains_key(&vm), "a VM that a command named is listed");
    let from = |force| Action::Detach { vm: Some(vm), force };
    assert_eq!(lab.run(&engine, on(row), from(false)).await.unwrap_err().errno(), Errno::EBUSY);
    lab.state().sky.vms.get_mut(&vm).unwrap().running = false;
    lab.run(&engine, on(row), from(false)).await.unwrap();
    assert_eq!(lab.status(&engine, row), Status::Detached);
    let nobody = Action::Attach { vm: Some(VmId::random()), slot: None };
    assert_eq!(lab.run(&engine, on(row), nobody).await.unwrap_err().errno(), Errno::ENOENT);
}

#[tokio::test(start_paused = true)]
async fn c3_root_takes_a_stopped_vm_without_a_root_disk() {
    let lab = Lab::new();
    let engine = lab.start().await;
    let job = lab.job(&engine, "j").await;
    let (row, _) = lab.make(&engine, job, "d").await;
    let vm = lab.vm(true);
    let as_root = || Action::Attach { vm: Some(vm), slot: Some(Slot::Root) };
    assert_eq!(lab.run(&engine, on(row), as_root()).await.unwrap_err().errno(), Errno::EBUSY);
    *lab.state().sky.vms.get_mut(&vm).unwrap() = crate::cloud::VmFacts { running: false, has_root: true };
    assert_eq!(lab.run(&engine, on(row), as_root()).await.unwrap_err().errno(), Errno::EBUSY);
    lab.state().sky.vms.get_mut(&vm).unwrap().has_root = false;
    lab.run(&engine, on(row), as_root()).await.unwrap();
    assert_eq!(engine.world().volumes[&row].device_id, Some(0));
}

#[tokio::test(start_paused = true)]
async fn c3_a_volume_that_somebody_else_attached_at_another_id_is_not_taken_away_from_there() {
    let lab = Lab::new();
    let engine = lab.start().await;
    let job = lab.job(&engine, "j").await;
    let (row, v) = lab.make(&engine, job, "d").await;
    let vm = lab.vm(true);
    lab.put(v, Some(vm));
    let error = lab.run(&engine, on(row), Action::Attach { vm: Some(vm), slot: Some(Slot::Id(7)) }).await.unwrap_err();
    assert_eq!(error.errno(), Errno::EBUSY, "{error}");
    assert_eq!(lab.count("cloud detach"), 0);
    assert_eq!(lab.status(&engine, row), Status::Remote);
}

#[tokio::test(start_paused = true)]
async fn c4_force_skips_the_tests_and_is_counted() {
    let lab = Lab::new();
    let engine = lab.start().await;
    let job = lab.job(&engine, "j").await;
    let (row, v) = lab.make(&engine, job, "d").await;
    lab.run(&engine, on(row), attach()).await.unwrap();
    let dev = engine.device(row).unwrap().dev;
    lab.state().kernel.holders.insert(dev, vec![holder()]);
    assert_eq!(lab.run(&engine, on(row), detach()).await.unwrap_err().errno(), Errno::EBUSY);
    lab.run(&engine, on(row), Action::Detach { vm: None, force: true }).await.unwrap();
    assert_eq!(lab.count(&format!("cloud detach {v} force")), 1);
    assert_eq!(engine.world().counters.forced, 1);
}
