//! A crash at each point of each operation: the next start settles it, doubles nothing, and takes
//! nothing away (rule R10).

use std::sync::Arc;
use std::time::Duration;

use super::super::{Engine, Target};
use super::fakes::*;
use crate::command::Action;
use crate::model::{Mark, Outcome, Slot, Status, Verb, VolumeId};

/// Where the daemon dies.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(super) enum Die {
    /// The journal has it, nothing else happened.
    Journaled,
    /// Directly before the cloud does it.
    BeforeCall,
    /// The cloud has done it, nobody heard.
    AfterCall,
    /// Proved, and not recorded.
    BeforeEnd,
    /// Recorded, and not answered.
    AfterEnd,
}

pub(super) const DEATHS: [Die; 5] = [Die::Journaled, Die::BeforeCall, Die::AfterCall, Die::BeforeEnd, Die::AfterEnd];

impl Die {
    fn script(self, lab: &Lab, call: At) {
        match self {
            Die::Journaled => lab.script(At::Begin, Act::KillAfter),
            Die::BeforeCall => lab.script(call, Act::KillBefore),
            Die::AfterCall => lab.script(call, Act::KillAfter),
            Die::BeforeEnd => lab.script(At::End, Act::KillBefore),
            Die::AfterEnd => lab.script(At::End, Act::KillAfter),
        }
    }

    pub(super) fn happened(self) -> bool {
        matches!(self, Die::AfterCall | Die::BeforeEnd | Die::AfterEnd)
    }
}

/// Runs `action` into its death and starts anew; answers the new engine, settled.
pub(super) async fn die(
    lab: &Lab,
    engine: &Arc<Engine>,
    target: Target,
    action: Action,
    die: Die,
    call: At,
) -> Arc<Engine> {
    let life = lab.life();
    die.script(lab, call);
    let left = lab.go(engine, target, action);
    lab.until_killed(life).await;
    assert_eq!(left.ticket.outcome(), None, "{die:?}: nobody was told anything");
    lab.state().script.clear();
    lab.forget_log();
    let engine = lab.start().await;
    settled(lab, &engine).await;
    engine
}

pub(super) async fn settled(lab: &Lab, engine: &Arc<Engine>) {
    lab.until("settled", |s| s.record.ops.values().all(|o| o.ended.is_some())).await;
    lab.until_world(engine, "settled", |w| {
        w.volumes.values().all(|v| v.running.is_none() && v.base != Status::Unknown)
            && w.jobs.values().all(|j| j.running.is_none() && j.creating.is_empty())
    })
    .await;
    for taking in [
        "cloud detach",
        "cloud delete",
        "cloud resize",
        "cloud create",
        "cloud attach",
        "cloud snapshot ",
        "cloud revert",
    ] {
        assert_eq!(lab.count(taking), 0, "r10: recovery called {taking}");
    }
    assert_eq!(lab.state().sky.violations, Vec::<String>::new());
}

pub(super) fn outcome(lab: &Lab, verb: Verb) -> Outcome {
    let state = lab.state();
    let op = state.record.ops.values().rev().find(|o| o.verb == verb).unwrap();
    op.ended.clone().unwrap().0
}

pub(super) fn expected(die: Die) -> Outcome {
    if die.happened() { Outcome::Done } else { Outcome::Interrupted }
}

pub(super) struct Scene {
    lab: Lab,
    engine: Arc<Engine>,
    job: crate::model::JobRow,
    row: crate::model::DiskRow,
    volume: VolumeId,
}

async fn scene(attached: bool) -> Scene {
    let lab = Lab::new();
    let engine = lab.start().await;
    let job = lab.job(&engine, "j").await;
    lab.job(&engine, "k").await;
    let (row, volume) = lab.make(&engine, job, "d").await;
    if attached {
        lab.run(&engine, Target::Volume(row), attach()).await.unwrap();
    }
    Scene { lab, engine, job, row, volume }
}

#[tokio::test(start_paused = true)]
async fn r10_create_is_settled_after_a_crash_anywhere_and_made_once() {
    for at in DEATHS {
        let s = scene(false).await;
        let engine = die(&s.lab, &s.engine, Target::Job(s.job), create("new", GIB), at, At::Create).await;
        assert_eq!(outcome(&s.lab, Verb::Create), expected(at), "{at:?}");
        assert_eq!(s.lab.state().sky.volumes.len(), if at.happened() { 2 } else { 1 }, "{at:?}");
        assert_eq!(engine.world().volumes.len(), s.lab.state().sky.volumes.len(), "{at:?}: none is lost");
        let again = s.lab.run(&engine, Target::Job(s.job), create("new", GIB)).await;
        assert_eq!(again.is_err(), at.happened(), "{at:?}: EEXIST, or made now");
        assert_eq!(s.lab.state().sky.volumes.len(), 2, "{at:?}");
    }
}

#[tokio::test(start_paused = true)]
async fn r10_claim_is_settled_after_a_crash_anywhere() {
    for at in DEATHS {
        let s = scene(false).await;
        let v = s.lab.foreign(GIB, None);
        let claim = || Action::Claim { volume: v, disk: Some(disk_name("c")), from: None };
        let engine = die(&s.lab, &s.engine, Target::Job(s.job), claim(), at, At::Mark).await;
        assert_eq!(outcome(&s.lab, Verb::Claim), expected(at), "{at:?}");
        assert_eq!(engine.world().by_uuid.contains_key(&v), at.happened(), "{at:?}");
        if !at.happened() {
            assert_eq!(s.lab.cloud_of(v).unwrap().mark, None, "{at:?}");
            s.lab.run(&engine, Target::Job(s.job), claim()).await.unwrap();
        }
        let owned = engine.world().volumes[&engine.world().by_uuid[&v]].clone();
        assert_eq!(s.lab.cloud_of(v).unwrap().mark.unwrap().epoch, owned.epoch);
        assert_eq!(owned.status(), Status::Detached);
    }
}

#[tokio::test(start_paused = true)]
async fn r10_attach_is_settled_after_a_crash_anywhere() {
    for at in DEATHS {
        let s = scene(false).await;
        let engine = die(&s.lab, &s.engine, Target::Volume(s.row), attach(), at, At::Attach).await;
        assert_eq!(outcome(&s.lab, Verb::Attach), expected(at), "{at:?}");
        let status = if at.happened() { Status::Attached } else { Status::Detached };
        assert_eq!((s.lab.status(&engine, s.row), s.lab.recorded(s.volume)), (status, status), "{at:?}");
        if at.happened() {
            let now = engine.device(s.row).unwrap();
            assert_eq!(now.incarnation, s.lab.disks_of(s.volume)[0].incarnation);
            assert_eq!(s.lab.state().record.mappings[&s.volume].row, now.mapping);
        }
        s.lab.run(&engine, Target::Volume(s.row), attach()).await.unwrap();
        assert_eq!(s.lab.disks_of(s.volume).len(), 1, "{at:?}");
    }
}

#[tokio::test(start_paused = true)]
async fn r10_detach_is_settled_after_a_crash_anywhere_and_never_begun_by_recovery() {
    for at in DEATHS {
        let s = scene(true).await;
        let before = s.engine.device(s.row).unwrap();
        let engine = die(&s.lab, &s.engine, Target::Volume(s.row), detach(), at, At::Detach).await;
        assert_eq!(outcome(&s.lab, Verb::Detach), expected(at), "{at:?}");
        let status = if at.happened() { Status::Detached } else { Status::Attached };
        assert_eq!((s.lab.status(&engine, s.row), s.lab.recorded(s.volume)), (status, status), "{at:?}");
        if !at.happened() {
            let after = engine.device(s.row).unwrap();
            assert_eq!((after.mapping, after.incarnation), (before.mapping, before.incarnation), "the same node");
        }
        s.lab.run(&engine, Target::Volume(s.row), detach()).await.unwrap();
    }
}

#[tokio::test(start_paused = true)]
async fn r10_resize_is_settled_after_a_crash_anywhere() {
    for attached in [false, true] {
        for at in DEATHS {
            let s = scene(attached).await;
            let to = || Action::Resize { size: 2 * GIB };
            let engine = die(&s.lab, &s.engine, Target::Volume(s.row), to(), at, At::Resize).await;
            assert_eq!(outcome(&s.lab, Verb::Resize), expected(at), "{at:?}");
            let size = if at.happened() { 2 * GIB } else { GIB };
            assert_eq!(engine.world().volumes[&s.row].size, size, "{at:?}");
            assert_eq!(s.lab.state().record.volumes[&s.volume].size, size, "{at:?}");
            assert_eq!(engine.device(s.row).is_ok(), attached, "{at:?}");
            s.lab.run(&engine, Target::Volume(s.row), to()).await.unwrap();
        }
    }
}

#[tokio::test(start_paused = true)]
async fn r10_delete_is_settled_after_a_crash_anywhere_and_never_begun_by_recovery() {
    for at in DEATHS {
        let s = scene(false).await;
        let engine = die(&s.lab, &s.engine, Target::Volume(s.row), delete(s.volume), at, At::Delete).await;
        assert_eq!(outcome(&s.lab, Verb::Delete), expected(at), "{at:?}");
        assert_eq!(engine.world().volumes.is_empty(), at.happened(), "{at:?}");
        assert_eq!(s.lab.cloud_of(s.volume).is_none(), at.happened(), "{at:?}");
        assert_eq!(s.lab.state().record.volumes[&s.volume].gone, at.happened(), "{at:?}");
    }
}

#[tokio::test(start_paused = true)]
async fn r10_release_is_settled_after_a_crash_anywhere() {
    for at in DEATHS {
        let s = scene(false).await;
        let release = || Action::Release { volume: s.volume };
        let engine = die(&s.lab, &s.engine, Target::Volume(s.row), release(), at, At::Mark).await;
        assert_eq!(outcome(&s.lab, Verb::Release), expected(at), "{at:?}");
        assert_eq!(engine.world().volumes.is_empty(), at.happened(), "{at:?}");
        assert_eq!(s.lab.cloud_of(s.volume).unwrap().mark.is_none(), at.happened(), "{at:?}");
    }
}

#[tokio::test(start_paused = true)]
async fn r10_move_is_settled_after_a_crash_anywhere() {
    for attached in [false, true] {
        for at in DEATHS {
            let s = scene(attached).await;
            let to_k = || Action::Move { job: job_id("k") };
            let engine = die(&s.lab, &s.engine, Target::Volume(s.row), to_k(), at, At::Mark).await;
            assert_eq!(outcome(&s.lab, Verb::Move), expected(at), "{at:?}");
            let world = engine.world();
            let volume = &world.volumes[&world.by_uuid[&s.volume]];
            assert_eq!(world.jobs[&volume.job].id, job_id(if at.happened() { "k" } else { "j" }), "{at:?}");
            let mark = Some(Mark { record: s.lab.record_id(), epoch: volume.epoch });
            assert_eq!(s.lab.cloud_of(s.volume).unwrap().mark, mark, "{at:?}");
            assert_eq!(volume.status(), if attached { Status::Attached } else { Status::Detached }, "{at:?}");
            assert_eq!(engine.device(volume.row).is_ok(), attached);
        }
    }
}

#[tokio::test(start_paused = true)]
async fn r10_destroy_is_not_gone_on_with_after_a_crash_and_a_repeat_finishes() {
    for at in DEATHS {
        let s = scene(true).await;
        s.lab.make(&s.engine, s.job, "e").await;
        let destroy = || Action::Destroy { job: job_id("j") };
        // The first end is that of the detach, the parts' journal that of the destroy itself.
        let engine = die(&s.lab, &s.engine, Target::Job(s.job), destroy(), at, At::Delete).await;
        assert_eq!(outcome(&s.lab, Verb::Destroy), Outcome::Interrupted, "{at:?}");
        let cloud = s.lab.state().sky.volumes.len();
        assert_eq!(engine.world().volumes.len(), cloud, "{at:?}: what exists is known");
        assert_eq!(cloud, if at == Die::AfterCall { 1 } else { 2 }, "{at:?}");
        assert!(engine.world().jobs.contains_key(&s.job), "{at:?}");
        s.lab.run(&engine, Target::Job(s.job), destroy()).await.unwrap();
        assert!(s.lab.state().sky.volumes.is_empty() && engine.world().volumes.is_empty());
    }
}

#[tokio::test(start_paused = true)]
async fn r10_recovery_waits_for_a_silent_cloud_and_equal_commands_join_it() {
    let s = scene(false).await;
    let life = s.lab.life();
    s.lab.script(At::Attach, Act::KillAfter);
    s.lab.go(&s.engine, Target::Volume(s.row), attach());
    s.lab.until_killed(life).await;
    s.lab.state().sky.down = true;
    let engine = s.lab.start().await;
    let joined = s.lab.go(&engine, Target::Volume(s.row), attach());
    assert!(joined.op.is_some());
    assert_eq!(s.lab.status(&engine, s.row), Status::Attaching);
    tokio::time::sleep(Duration::from_secs(600)).await;
    assert_eq!(joined.ticket.outcome(), None);
    s.lab.state().sky.down = false;
    joined.ticket.wait().await.unwrap();
    assert!(engine.device(s.row).is_ok());
}

#[tokio::test(start_paused = true)]
async fn r10_an_attach_that_a_crash_left_in_a_contradiction_ends_in_conflict() {
    let s = scene(false).await;
    s.lab.state().kernel.plug = Plug::WrongSize;
    let life = s.lab.life();
    s.lab.script(At::Attach, Act::KillAfter);
    s.lab.go(&s.engine, Target::Volume(s.row), attach());
    s.lab.until_killed(life).await;
    let engine = s.lab.start().await;
    s.lab.until_status(&engine, s.row, Status::Conflict).await;
    assert!(s.lab.unfinished().is_empty());
    assert_eq!(s.lab.count("cloud detach"), 0);
}

#[tokio::test(start_paused = true)]
async fn r10_recovery_detaches_nothing_for_a_wrong_device_id() {
    let s = scene(false).await;
    let vm = s.lab.vm(false);
    let life = s.lab.life();
    s.lab.script(At::Attach, Act::KillAfter);
    s.lab.go(&s.engine, Target::Volume(s.row), Action::Attach { vm: Some(vm), slot: Some(Slot::Id(5)) });
    s.lab.until_killed(life).await;
    s.lab.put(s.volume, Some(vm));
    let engine = s.lab.start().await;
    s.lab.until_status(&engine, s.row, Status::Remote).await;
    assert_eq!(s.lab.count("cloud detach"), 0);
    assert!(s.lab.unfinished().is_empty());
}

#[tokio::test(start_paused = true)]
async fn r10_a_delete_is_not_believed_done_by_credentials_that_see_nothing() {
    let s = scene(false).await;
    let life = s.lab.life();
    s.lab.script(At::Begin, Act::KillAfter);
    s.lab.go(&s.engine, Target::Volume(s.row), delete(s.volume));
    s.lab.until_killed(life).await;
    let kept = std::mem::take(&mut s.lab.state().sky.volumes);
    let host = s.lab.state().sky.vms.remove(&s.lab.host).unwrap();
    let engine = s.lab.start().await;
    tokio::time::sleep(Duration::from_secs(300)).await;
    assert_eq!(engine.world().volumes.len(), 1, "it is not dropped");
    s.lab.state().sky.volumes = kept;
    s.lab.state().sky.vms.insert(s.lab.host, host);
    s.lab.until_status(&engine, s.row, Status::Detached).await;
}

#[tokio::test(start_paused = true)]
async fn v3_after_a_restart_with_the_cloud_away_the_same_disk_is_served_and_another_is_not() {
    let s = scene(true).await;
    let before = s.engine.device(s.row).unwrap();
    s.lab.kill();
    s.lab.state().sky.down = true;
    let engine = s.lab.start().await;
    let now = engine.device(s.row).unwrap();
    assert_eq!((now.mapping, now.incarnation), (before.mapping, before.incarnation));
    s.lab.kill();
    s.lab.unplug(s.volume);
    s.lab.plug(s.volume, GIB);
    let engine = s.lab.start().await;
    assert_eq!(s.lab.status(&engine, s.row), Status::Unknown);
    assert!(engine.device(s.row).is_err());
}

#[tokio::test(start_paused = true)]
async fn v7_after_a_reboot_everything_is_unknown_until_the_cloud_was_seen() {
    let s = scene(true).await;
    s.lab.reboot();
    s.lab.state().sky.down = true;
    let engine = s.lab.start().await;
    assert_eq!(s.lab.status(&engine, s.row), Status::Unknown);
    assert!(engine.device(s.row).is_err());
    s.lab.state().sky.down = false;
    s.lab.until_status(&engine, s.row, Status::Attached).await;
    assert_eq!(engine.device(s.row).unwrap().incarnation, s.lab.disks_of(s.volume)[0].incarnation);
}

#[tokio::test(start_paused = true)]
async fn an_operation_whose_object_is_gone_ends_as_interrupted() {
    let s = scene(false).await;
    let life = s.lab.life();
    s.lab.script(At::Begin, Act::KillAfter);
    s.lab.go(&s.engine, Target::Volume(s.row), delete(s.volume));
    s.lab.until_killed(life).await;
    s.lab.state().record.owns.clear();
    s.lab.start().await;
    s.lab.until("ended", |st| st.record.ops.values().all(|o| o.ended.is_some())).await;
    assert_eq!(outcome(&s.lab, Verb::Delete), Outcome::Interrupted);
    assert_eq!(s.lab.count("cloud delete"), 0);
}

#[tokio::test(start_paused = true)]
async fn an_epoch_that_only_a_journal_knows_is_not_given_again() {
    let s = scene(false).await;
    let life = s.lab.life();
    s.lab.script(At::Create, Act::KillBefore);
    s.lab.go(&s.engine, Target::Job(s.job), create("e", GIB));
    s.lab.until_killed(life).await;
    s.lab.forget_log();
    let engine = s.lab.start().await;
    settled(&s.lab, &engine).await;
    let (row, _) = s.lab.make(&engine, s.job, "f").await;
    let epochs: Vec<u64> =
        s.lab.state().record.ops.values().filter(|o| o.verb == Verb::Create).map(crate::store::OpRow::epoch).collect();
    let unique: std::collections::BTreeSet<_> = epochs.iter().collect();
    assert_eq!(unique.len(), epochs.len(), "{epochs:?}");
    assert_eq!(engine.world().volumes[&row].epoch, *epochs.last().unwrap());
}

#[tokio::test(start_paused = true)]
async fn a_round_with_the_kernel_unreadable_does_not_keep_the_start_waiting() {
    let lab = Lab::new();
    lab.state().kernel.blind = true;
    let engine = tokio::time::timeout(Duration::from_secs(5), lab.start()).await.unwrap();
    assert!(matches!(engine.world().health.devices, super::super::world::Component::Down(_)));
}
