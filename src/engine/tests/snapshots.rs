//! Snapshots (C6): on a volume, what stands in their way, every kind of failure, a crash at each
//! step, and what the cloud shows of them.

use std::sync::Arc;
use std::time::Duration;

use super::super::{Engine, Target};
use super::fakes::*;
use super::recovery::{DEATHS, Die, die, expected, outcome};
use crate::cloud::Refusal;
use crate::command::Action;
use crate::error::{Errno, Error};
use crate::model::{DiskRow, JobRow, Outcome, SnapshotId, SnapshotName, Status, Timestamp, Verb, VolumeId};
use crate::store::Change;

pub(super) struct Scene {
    pub lab: Lab,
    pub engine: Arc<Engine>,
    pub job: JobRow,
    pub row: DiskRow,
    pub volume: VolumeId,
}

pub(super) fn lab() -> Lab {
    Lab::with(|about| about.snapshots = true)
}

pub(super) fn name(text: &str) -> SnapshotName {
    SnapshotName::parse(text).unwrap()
}

async fn scene() -> Scene {
    let lab = lab();
    let engine = lab.start().await;
    let job = lab.job(&engine, "j").await;
    let (row, volume) = lab.make(&engine, job, "d").await;
    Scene { lab, engine, job, row, volume }
}

/// The names in `snapshots/`, those of ours with a star.
pub(super) fn shown(engine: &Engine, row: DiskRow) -> Vec<String> {
    let mark = |ours: bool| if ours { "*" } else { "" };
    engine.world().volumes[&row].snapshots.iter().map(|s| format!("{}{}", s.name, mark(s.row.is_some()))).collect()
}

impl Scene {
    async fn run(&self, action: Action) -> Result<(), Error> {
        self.lab.run(&self.engine, Target::Volume(self.row), action).await
    }

    async fn refused(&self, action: Action) -> Errno {
        self.run(action).await.unwrap_err().errno()
    }

    async fn reconcile(&self) -> Result<(), Error> {
        self.run(Action::Reconcile { vm: None }).await
    }

    fn shown(&self) -> Vec<String> {
        shown(&self.engine, self.row)
    }

    /// The record's live snapshots of ours.
    fn recorded(&self) -> Vec<SnapshotId> {
        recorded(&self.lab)
    }
}

fn recorded(lab: &Lab) -> Vec<SnapshotId> {
    lab.state().record.snapshots.values().filter(|s| !s.gone).map(|s| s.loaded.snapshot).collect()
}

/// No snapshot of ours is in the cloud without being in the record, and none is in the record only.
pub(super) fn no_orphans(lab: &Lab) {
    let state = lab.state();
    let mut known: Vec<_> = state.record.snapshots.values().filter(|s| !s.gone).map(|s| s.loaded.snapshot).collect();
    let mut there: Vec<_> = state
        .sky
        .snapshots
        .values()
        .flatten()
        .map(|s| s.id)
        .filter(|id| state.sky.taken.values().any(|t| t == id))
        .collect();
    known.sort();
    there.sort();
    assert_eq!(known, there);
    assert_eq!(state.sky.violations, Vec::<String>::new());
}

#[tokio::test(start_paused = true)]
async fn c6_a_snapshot_is_journaled_taken_and_recorded_with_its_end() {
    let s = scene().await;
    s.lab.forget_log();
    s.run(snapshot("s")).await.unwrap();
    let lines = s.lab.lines(&["begin", "cloud find ", "cloud snapshot ", "end"]);
    let expected = [
        "begin snapshot".into(),
        format!("cloud find {}", s.volume),
        format!("cloud snapshot {}", s.volume),
        "end snapshot done".into(),
    ];
    assert_eq!(lines, expected, "the mark is read directly before the call");
    let batch = s.lab.state().record.batches.last().unwrap().clone();
    let [Change::SnapshotAdd { snapshot: id, size: GIB, created: Timestamp(7), .. }, Change::OpEnd { .. }] = &batch[..]
    else {
        panic!("{batch:?}")
    };
    assert_eq!(s.lab.snapshots_of(s.volume), [*id]);
    assert_eq!(s.shown(), ["s*"]);
    assert_eq!(s.lab.status(&s.engine, s.row), Status::Detached);
    assert_eq!(s.engine.world().volumes[&s.row].history.last().unwrap().verb, Verb::Snapshot);
    s.lab.kill();
    let engine = s.lab.start().await;
    assert_eq!(shown(&engine, s.row), ["s*"], "known after a restart");
    no_orphans(&s.lab);
}

#[tokio::test(start_paused = true)]
async fn c6_the_same_name_again_is_eexist_and_joins_while_in_flight() {
    let s = scene().await;
    s.lab.script(At::Snapshot, Act::HoldBefore);
    let first = s.lab.go(&s.engine, Target::Volume(s.row), snapshot("s"));
    s.lab.until_logged("cloud snapshot ", 1).await;
    assert_eq!(s.lab.status(&s.engine, s.row), Status::Snapshotting);
    assert_eq!(s.lab.go(&s.engine, Target::Volume(s.row), snapshot("s")).op, first.op);
    assert_eq!(s.refused(snapshot("t")).await, Errno::EBUSY);
    s.lab.release(At::Snapshot);
    first.ticket.wait().await.unwrap();
    assert_eq!(s.refused(snapshot("s")).await, Errno::EEXIST);
    s.run(snapshot("t")).await.unwrap();
    assert_eq!(s.lab.count("cloud snapshot "), 2);
    no_orphans(&s.lab);
}

#[tokio::test(start_paused = true)]
async fn c6_an_attached_device_is_flushed_first_and_stays_served() {
    let s = scene().await;
    s.run(attach()).await.unwrap();
    let before = s.engine.device(s.row).unwrap();
    s.lab.forget_log();
    s.lab.script(At::Snapshot, Act::HoldBefore);
    let going = s.lab.go(&s.engine, Target::Volume(s.row), snapshot("s"));
    s.lab.until_logged("cloud snapshot ", 1).await;
    assert_eq!(s.lab.lines(&["flush", "cloud snapshot "]), ["flush vd0", &format!("cloud snapshot {}", s.volume)]);
    assert_eq!(s.engine.device(s.row).unwrap().mapping, before.mapping, "v2: the node stays");
    s.lab.release(At::Snapshot);
    going.ticket.wait().await.unwrap();
    assert_eq!(s.engine.device(s.row).unwrap().mapping, before.mapping);
    assert_eq!(s.lab.status(&s.engine, s.row), Status::Attached);
}

#[tokio::test(start_paused = true)]
async fn c6_a_writer_is_in_the_way_unless_crash_and_a_failed_flush_is_with_crash_too() {
    let s = scene().await;
    s.run(attach()).await.unwrap();
    let dev = s.engine.device(s.row).unwrap().dev;
    s.lab.state().kernel.writers.insert(dev, vec![holder()]);
    let error = s.run(snapshot("s")).await.unwrap_err();
    assert!(matches!(&error, Error::InUse { holders, .. } if holders == &[holder()]), "{error}");
    assert_eq!((error.errno(), s.lab.count("cloud snapshot ")), (Errno::EBUSY, 0));
    let crash = || Action::Snapshot { name: name("s"), crash: true };
    s.lab.state().kernel.holds.push_back(Held::NotFlushed);
    assert_eq!(s.refused(crash()).await, Errno::EIO);
    assert_eq!(s.lab.count("cloud snapshot "), 0);
    s.run(crash()).await.unwrap();
    assert_eq!(s.lab.count("flush vd0 crash"), 2);
    assert!(s.engine.device(s.row).is_ok());
}

#[tokio::test(start_paused = true)]
async fn c6_what_passes_is_waited_for_as_long_as_it_takes_and_each_try_flushes_and_looks_anew() {
    let s = scene().await;
    s.run(attach()).await.unwrap();
    s.lab.forget_log();
    for _ in 0..100 {
        s.lab.script(At::Snapshot, Act::Refuse(Refusal::Passing));
    }
    let before = tokio::time::Instant::now();
    let going = s.lab.go(&s.engine, Target::Volume(s.row), snapshot("s"));
    let op = going.op.unwrap();
    s.lab.until_world(&s.engine, "it says what is waited for", |w| w.operations[&op].step.contains("fake: no")).await;
    going.ticket.wait().await.unwrap();
    assert!(before.elapsed() > Duration::from_secs(900), "longer than a refusal is waited for elsewhere");
    assert_eq!((s.lab.count("flush"), s.lab.count("cloud snapshot ")), (101, 101));
    // A cancel ends the wait, and nothing was taken.
    (0..3).for_each(|_| s.lab.script(At::Snapshot, Act::Refuse(Refusal::Passing)));
    let going = s.lab.go(&s.engine, Target::Volume(s.row), snapshot("t"));
    s.lab.until_logged("cloud snapshot ", 102).await;
    s.lab.run(&s.engine, Target::Root, Action::Cancel { id: going.op }).await.unwrap();
    assert_eq!(going.ticket.wait().await.unwrap_err(), Error::Cancelled);
    assert_eq!((s.shown(), s.lab.status(&s.engine, s.row)), (vec!["s*".into()], Status::Attached));
}

#[tokio::test(start_paused = true)]
async fn every_refusal_of_the_cloud_has_its_errno_and_leaves_nothing() {
    let verbs =
        [(At::Snapshot, snapshot as fn(&str) -> Action), (At::Revert, revert), (At::DeleteSnapshot, delete_snapshot)];
    for (at, action) in verbs {
        let s = scene().await;
        s.run(snapshot("old")).await.unwrap();
        let named = || action(if at == At::Snapshot { "new" } else { "old" });
        for (act, errno) in [
            (Act::Refuse(Refusal::Conflict), Errno::EBUSY),
            (Act::Refuse(Refusal::Capacity), Errno::ENOSPC),
            (Act::Refuse(Refusal::Quota), Errno::EDQUOT),
            (Act::Refuse(Refusal::Unsupported), Errno::EOPNOTSUPP),
            (Act::Refuse(Refusal::NoVolume), Errno::ENOENT),
            (Act::Refuse(Refusal::Other), Errno::EREMOTEIO),
            (Act::Unreachable, Errno::EHOSTUNREACH),
        ] {
            s.lab.script(at, act.clone());
            assert_eq!(s.refused(named()).await, errno, "{at:?} {act:?}");
            assert_eq!(s.lab.status(&s.engine, s.row), Status::Detached, "{at:?} {act:?}");
            assert_eq!(s.shown(), ["old*"], "{at:?} {act:?}");
        }
        s.run(named()).await.unwrap();
        no_orphans(&s.lab);
    }
}

#[tokio::test(start_paused = true)]
async fn an_unclear_answer_is_settled_by_looking_and_never_taken_twice() {
    for (act, done) in [(Act::AmbiguousDone, true), (Act::Ambiguous, false)] {
        let s = scene().await;
        s.lab.script(At::Snapshot, act);
        let before = tokio::time::Instant::now();
        let outcome = s.run(snapshot("s")).await;
        assert_eq!(outcome.clone().map_err(|e| e.errno()), if done { Ok(()) } else { Err(Errno::EHOSTUNREACH) });
        let waited = before.elapsed();
        assert_eq!(waited >= Duration::from_secs(60), !done, "two empty looks {waited:?} apart");
        assert_eq!(s.shown(), if done { vec!["s*"] } else { vec![] });
        assert_eq!((s.lab.count("cloud snapshot "), s.lab.status(&s.engine, s.row)), (1, Status::Detached));
        no_orphans(&s.lab);
    }
}

#[tokio::test(start_paused = true)]
async fn an_unclear_answer_is_not_settled_while_the_clouds_job_runs_or_the_cloud_is_silent() {
    let s = scene().await;
    s.lab.script(At::Snapshot, Act::AmbiguousDone);
    s.lab.state().sky.running = Some("job 7".into());
    let going = s.lab.go(&s.engine, Target::Volume(s.row), snapshot("s"));
    let op = going.op.unwrap();
    s.lab.until_world(&s.engine, "it names the job", |w| w.operations[&op].step.contains("job 7")).await;
    tokio::time::sleep(Duration::from_secs(600)).await;
    assert_eq!(going.ticket.outcome(), None);
    s.lab.state().sky.down = true;
    s.lab.state().sky.running = None;
    tokio::time::sleep(Duration::from_secs(600)).await;
    assert_eq!(going.ticket.outcome(), None);
    s.lab.state().sky.down = false;
    going.ticket.wait().await.unwrap();
    assert_eq!(s.shown(), ["s*"]);
    no_orphans(&s.lab);
}

#[tokio::test(start_paused = true)]
async fn looks_before_the_clouds_job_came_to_light_do_not_count() {
    let s = scene().await;
    s.lab.script(At::Snapshot, Act::Ambiguous);
    let going = s.lab.go(&s.engine, Target::Volume(s.row), snapshot("s"));
    tokio::time::sleep(Duration::from_secs(40)).await;
    s.lab.state().sky.running = Some("job 7".into());
    tokio::time::sleep(Duration::from_secs(60)).await;
    s.lab.state().sky.running = None;
    tokio::time::sleep(Duration::from_secs(40)).await;
    assert_eq!(going.ticket.outcome(), None);
    assert_eq!(going.ticket.wait().await.unwrap_err().errno(), Errno::EHOSTUNREACH);
}

#[tokio::test(start_paused = true)]
async fn a_snapshot_that_is_not_complete_is_ours_and_the_operation_failed() {
    let s = scene().await;
    s.lab.state().sky.unready = true;
    let error = s.run(snapshot("s")).await.unwrap_err();
    assert!(matches!(&error, Error::SnapshotNotReady { state, .. } if state == "Error"), "{error}");
    assert_eq!(s.shown(), ["s*"]);
    assert_eq!(s.refused(revert("s")).await, Errno::EBUSY);
    assert_eq!(s.lab.count("cloud revert"), 0);
    s.run(delete_snapshot("s")).await.unwrap();
    assert!(s.shown().is_empty());
    no_orphans(&s.lab);
}

#[tokio::test(start_paused = true)]
async fn c6_revert_is_of_ours_that_the_cloud_still_has_and_only_while_detached() {
    let s = scene().await;
    assert_eq!(s.refused(revert("s")).await, Errno::ENOENT);
    s.run(snapshot("s")).await.unwrap();
    s.run(attach()).await.unwrap();
    assert_eq!(s.refused(revert("s")).await, Errno::EBUSY);
    s.run(detach()).await.unwrap();
    s.lab.forget_log();
    s.run(revert("s")).await.unwrap();
    let calls = s.lab.lines(&["cloud find ", "cloud snapshots", "cloud revert"]);
    let call = calls.iter().position(|l| l.starts_with("cloud revert")).unwrap();
    assert_eq!(calls[call - 1], format!("cloud find {}", s.volume), "the mark is read directly before the call");
    assert_eq!(s.lab.status(&s.engine, s.row), Status::Detached);
    // The cloud says otherwise than the world: directly before the call.
    let vm = s.lab.vm(false);
    s.lab.put(s.volume, Some(vm));
    assert_eq!(s.refused(revert("s")).await, Errno::EBUSY);
    s.lab.put(s.volume, None);
    s.reconcile().await.unwrap();
    s.lab.state().sky.snapshots.clear();
    assert_eq!(s.refused(revert("s")).await, Errno::ENOENT);
    assert_eq!(s.lab.count("cloud revert"), 1);
    s.engine.set_hold(s.job, true, root()).wait().await.unwrap();
    assert_eq!(s.refused(revert("s")).await, Errno::EPERM);
}

#[tokio::test(start_paused = true)]
async fn a_revert_without_a_clear_answer_is_nobodys_until_the_cloud_is_done_and_then_ambiguous() {
    for act in [Act::Ambiguous, Act::AmbiguousDone] {
        let s = scene().await;
        s.run(snapshot("s")).await.unwrap();
        s.lab.script(At::Revert, act);
        s.lab.state().sky.running = Some("job 7".into());
        let going = s.lab.go(&s.engine, Target::Volume(s.row), revert("s"));
        tokio::time::sleep(Duration::from_secs(300)).await;
        assert_eq!(going.ticket.outcome(), None);
        assert_eq!(s.refused(attach()).await, Errno::EBUSY, "it is not attached while its bytes change");
        s.lab.state().sky.running = None;
        assert_eq!(going.ticket.wait().await.unwrap_err().errno(), Errno::EHOSTUNREACH);
        assert_eq!(outcome(&s.lab, Verb::Revert), Outcome::Ambiguous);
        assert_eq!(s.lab.status(&s.engine, s.row), Status::Detached, "looked at since");
        assert_eq!(s.lab.count("cloud revert"), 1);
    }
}

#[tokio::test(start_paused = true)]
async fn c6_delete_snapshot_is_of_ours_and_success_when_the_cloud_has_it_no_more() {
    let s = scene().await;
    assert_eq!(s.refused(delete_snapshot("s")).await, Errno::ENOENT);
    s.run(snapshot("s")).await.unwrap();
    s.lab.state().sky.snapshots.clear();
    s.run(delete_snapshot("s")).await.unwrap();
    assert!(s.shown().is_empty() && s.recorded().is_empty());
    for (act, done) in [(Act::AmbiguousDone, true), (Act::Ambiguous, false)] {
        s.run(snapshot("s")).await.unwrap();
        s.lab.script(At::DeleteSnapshot, act);
        let outcome = s.run(delete_snapshot("s")).await;
        assert_eq!(outcome.map_err(|e| e.errno()), if done { Ok(()) } else { Err(Errno::EHOSTUNREACH) });
        assert_eq!(s.shown(), if done { vec![] } else { vec!["s*"] });
        no_orphans(&s.lab);
    }
}

#[tokio::test(start_paused = true)]
async fn a_foreign_mark_keeps_every_verb_from_the_clouds_call() {
    let s = scene().await;
    s.run(snapshot("s")).await.unwrap();
    s.lab.forget_log();
    let mark = s.lab.cloud_of(s.volume).unwrap().mark;
    s.lab.remark(s.volume, None);
    for action in [snapshot("t"), revert("s"), delete_snapshot("s")] {
        let error = s.run(action).await.unwrap_err();
        assert_eq!(error.errno(), Errno::EPERM, "{error}");
        // The look after it found the mark out: as it was, for the next verb's own look.
        s.lab.remark(s.volume, mark);
        s.reconcile().await.unwrap();
        s.lab.remark(s.volume, None);
    }
    for call in ["cloud snapshot ", "cloud revert", "cloud delete_snapshot"] {
        assert_eq!(s.lab.count(call), 0, "{call}");
    }
}

#[tokio::test(start_paused = true)]
async fn foreign_snapshots_are_listed_under_a_name_that_is_one_and_no_verb_touches_them() {
    let s = scene().await;
    let ids: Vec<SnapshotId> =
        ["daily", "a/b", "daily", "s"].map(|n| s.lab.foreign_snapshot(s.volume, n)).into_iter().collect();
    s.reconcile().await.unwrap();
    let mut expected = vec!["daily".to_owned(), "s".into(), ids[1].to_string()];
    // The later of two names goes by its id; of one time it is the higher id.
    expected.push(ids[0].max(ids[2]).to_string());
    expected.sort();
    assert_eq!(s.shown(), expected);
    for action in [revert("daily"), delete_snapshot("daily"), revert(&ids[1].to_string())] {
        assert_eq!(s.refused(action).await, Errno::ENOENT);
    }
    // Ours takes its name, whoever had it.
    s.run(snapshot("s")).await.unwrap();
    assert!(s.shown().contains(&"s*".to_owned()) && s.shown().contains(&ids[3].to_string()), "{:?}", s.shown());
    s.run(delete_snapshot("s")).await.unwrap();
    s.reconcile().await.unwrap();
    assert!(s.shown().contains(&"s".to_owned()));
    s.lab.state().sky.snapshots.clear();
    s.reconcile().await.unwrap();
    assert!(s.shown().is_empty(), "foreign ones come and go");
    s.lab.foreign_snapshot(s.volume, "x");
    s.reconcile().await.unwrap();
    s.run(delete(s.volume)).await.unwrap();
    assert_eq!(s.lab.state().sky.violations, Vec::<String>::new());
}

#[tokio::test(start_paused = true)]
async fn c7_c8_what_has_snapshots_of_ours_is_neither_deleted_nor_released() {
    let s = scene().await;
    s.run(snapshot("s")).await.unwrap();
    let error = s.run(delete(s.volume)).await.unwrap_err();
    assert_eq!(error.errno(), Errno::ENOTEMPTY);
    assert!(error.to_string().contains("(s)"), "{error}");
    assert_eq!(s.refused(Action::Release { volume: s.volume }).await, Errno::ENOTEMPTY);
    s.run(delete_snapshot("s")).await.unwrap();
    s.run(Action::Release { volume: s.volume }).await.unwrap();
}

#[tokio::test(start_paused = true)]
async fn a_missing_volume_is_dropped_with_its_snapshots_and_has_them_again_when_it_is_claimed() {
    let s = scene().await;
    s.run(snapshot("s")).await.unwrap();
    let kept = s.lab.state().sky.volumes.remove(&s.volume).unwrap();
    s.reconcile().await.unwrap();
    assert_eq!(s.lab.status(&s.engine, s.row), Status::Missing);
    s.run(delete(s.volume)).await.unwrap();
    assert!(s.engine.world().snapshots.is_empty());
    let said = s.engine.world().history.last().unwrap().sentence.clone();
    assert!(said.contains("may be there still: s"), "{said}");
    s.lab.state().sky.volumes.insert(s.volume, kept);
    let claim = Action::Claim { volume: s.volume, disk: None, from: None };
    s.lab.run(&s.engine, Target::Job(s.job), claim).await.unwrap();
    let row = s.engine.world().by_uuid[&s.volume];
    assert_eq!(shown(&s.engine, row), ["s*"]);
    s.lab.run(&s.engine, Target::Volume(row), delete_snapshot("s")).await.unwrap();
    no_orphans(&s.lab);
}

#[tokio::test(start_paused = true)]
async fn a_volume_that_moves_takes_its_snapshots_along() {
    let s = scene().await;
    s.lab.job(&s.engine, "k").await;
    s.run(snapshot("s")).await.unwrap();
    s.run(Action::Move { job: job_id("k") }).await.unwrap();
    let world = s.engine.world();
    let row = world.by_uuid[&s.volume];
    assert_eq!(shown(&s.engine, row), ["s*"]);
    assert_eq!(world.snapshots.values().collect::<Vec<_>>(), [&row]);
}

#[tokio::test(start_paused = true)]
async fn ours_that_two_looks_do_not_find_is_gone_from_the_record_with_an_event() {
    let s = scene().await;
    s.run(snapshot("s")).await.unwrap();
    let from = s.engine.events().position();
    s.lab.state().sky.snapshots.clear();
    let before = tokio::time::Instant::now();
    s.reconcile().await.unwrap();
    assert!(before.elapsed() >= Duration::from_secs(10), "one look is not believed");
    assert!(s.shown().is_empty() && s.recorded().is_empty());
    let super::super::events::Next::Event(event) = s.engine.events().next(from, Some(s.job)) else { panic!() };
    assert!(event.line.contains("snapshot-gone") && event.line.contains("\"name\":\"s\""), "{}", event.line);
    s.run(delete(s.volume)).await.unwrap();
}

#[tokio::test(start_paused = true)]
async fn ours_are_not_believed_gone_by_credentials_that_see_nothing_or_a_listing_that_was_late() {
    let s = scene().await;
    s.run(snapshot("s")).await.unwrap();
    let there = std::mem::take(&mut s.lab.state().sky.snapshots);
    let host = s.lab.state().sky.vms.remove(&s.lab.host).unwrap();
    s.reconcile().await.unwrap();
    assert_eq!(s.shown(), ["s*"]);
    s.lab.state().sky.vms.insert(s.lab.host, host);
    let going = s.lab.go(&s.engine, Target::Volume(s.row), Action::Reconcile { vm: None });
    tokio::time::sleep(Duration::from_secs(5)).await;
    s.lab.state().sky.snapshots = there;
    going.ticket.wait().await.unwrap();
    assert_eq!((s.shown(), s.recorded().len()), (vec!["s*".to_owned()], 1));
    s.lab.script(At::Snapshots, Act::Unreachable);
    assert_eq!(s.reconcile().await.unwrap_err().errno(), Errno::EHOSTUNREACH, "c13: it is not known");
}

#[tokio::test(start_paused = true)]
async fn an_idle_host_asks_for_no_snapshots_where_there_are_none_and_seldom_where_there_are() {
    let s = scene().await;
    let (_, other) = s.lab.make(&s.engine, s.job, "e").await;
    s.lab.forget_log();
    tokio::time::sleep(Duration::from_secs(3600)).await;
    assert_eq!(s.lab.count("cloud snapshots"), 0);
    s.run(snapshot("s")).await.unwrap();
    s.lab.forget_log();
    tokio::time::sleep(Duration::from_secs(3600)).await;
    let asked = s.lab.count(&format!("cloud snapshots {}", s.volume));
    assert!((5..=7).contains(&asked), "{asked} in 60 rounds");
    assert_eq!(s.lab.count(&format!("cloud snapshots {other}")), 0);
    s.lab.state().sky.snapshots.clear();
    tokio::time::sleep(Duration::from_secs(1500)).await;
    assert!(s.shown().is_empty(), "and so finds out");
    // The root's reconcile asks for every one.
    s.lab.forget_log();
    s.lab.run(&s.engine, Target::Root, Action::Reconcile { vm: None }).await.unwrap();
    assert_eq!(s.lab.count("cloud snapshots"), 2);
}

#[tokio::test(start_paused = true)]
async fn r10_a_snapshot_is_settled_after_a_crash_anywhere_and_never_taken_twice() {
    for attached in [false, true] {
        for at in DEATHS {
            let s = scene().await;
            if attached {
                s.run(attach()).await.unwrap();
            }
            let engine = die(&s.lab, &s.engine, Target::Volume(s.row), snapshot("s"), at, At::Snapshot).await;
            assert_eq!(outcome(&s.lab, Verb::Snapshot), expected(at), "{at:?}");
            assert_eq!(shown(&engine, s.row), if at.happened() { vec!["s*"] } else { vec![] }, "{at:?}");
            assert_eq!(s.lab.snapshots_of(s.volume).len(), usize::from(at.happened()), "{at:?}");
            assert_eq!(engine.device(s.row).is_ok(), attached);
            no_orphans(&s.lab);
        }
    }
}

#[tokio::test(start_paused = true)]
async fn r10_a_revert_left_behind_is_never_begun_and_ends_interrupted() {
    for at in DEATHS {
        let s = scene().await;
        s.run(snapshot("s")).await.unwrap();
        let engine = die(&s.lab, &s.engine, Target::Volume(s.row), revert("s"), at, At::Revert).await;
        let done = at == Die::AfterEnd;
        assert_eq!(outcome(&s.lab, Verb::Revert), if done { Outcome::Done } else { Outcome::Interrupted }, "{at:?}");
        assert_eq!(s.lab.status(&engine, s.row), Status::Detached);
        if !done {
            let said = engine.world().history.last().unwrap().sentence.clone();
            assert!(said.contains("nobody can tell"), "{said}");
        }
        no_orphans(&s.lab);
    }
}

#[tokio::test(start_paused = true)]
async fn r10_a_revert_that_still_runs_in_the_cloud_keeps_its_volume_after_a_crash() {
    let s = scene().await;
    s.run(snapshot("s")).await.unwrap();
    let life = s.lab.life();
    s.lab.script(At::Revert, Act::KillAfter);
    s.lab.state().sky.running = Some("job 7".into());
    s.lab.go(&s.engine, Target::Volume(s.row), revert("s"));
    s.lab.until_killed(life).await;
    let engine = s.lab.start().await;
    tokio::time::sleep(Duration::from_secs(600)).await;
    assert_eq!(s.lab.status(&engine, s.row), Status::Reverting);
    s.lab.state().sky.running = None;
    s.lab.until_status(&engine, s.row, Status::Detached).await;
    assert_eq!(outcome(&s.lab, Verb::Revert), Outcome::Interrupted);
}

#[tokio::test(start_paused = true)]
async fn r10_delete_snapshot_is_settled_after_a_crash_anywhere_and_never_begun_by_recovery() {
    for at in DEATHS {
        let s = scene().await;
        s.run(snapshot("s")).await.unwrap();
        let engine = die(&s.lab, &s.engine, Target::Volume(s.row), delete_snapshot("s"), at, At::DeleteSnapshot).await;
        assert_eq!(outcome(&s.lab, Verb::DeleteSnapshot), expected(at), "{at:?}");
        assert_eq!(shown(&engine, s.row).len(), usize::from(!at.happened()), "{at:?}");
        assert_eq!(s.lab.count("cloud delete_snapshot"), 0, "{at:?}");
        no_orphans(&s.lab);
    }
}

#[tokio::test(start_paused = true)]
async fn a_provider_without_snapshots_is_never_asked_for_them() {
    let lab = Lab::new();
    let engine = lab.start().await;
    let job = lab.job(&engine, "j").await;
    let (row, _) = lab.make(&engine, job, "d").await;
    for action in [snapshot("s"), revert("s"), delete_snapshot("s")] {
        assert_eq!(lab.run(&engine, Target::Volume(row), action.clone()).await.unwrap_err().errno(), Errno::EOPNOTSUPP);
        assert_eq!(lab.run(&engine, Target::Job(job), action).await.unwrap_err().errno(), Errno::EOPNOTSUPP);
    }
    lab.run(&engine, Target::Root, Action::Reconcile { vm: None }).await.unwrap();
    lab.run(&engine, Target::Volume(row), Action::Reconcile { vm: None }).await.unwrap();
    assert_eq!(lab.count("cloud snapshot") + lab.count("cloud running"), 0);
}
