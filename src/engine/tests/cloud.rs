//! What a cloud with jobs asks of the engine: looks before each try, pending jobs, late answers, a
//! host that is proved, and views that grow old.

use std::time::Duration;

use super::super::{Engine, Target};
use super::fakes::*;
use crate::cloud::{Attachment, CloudVolume, Refusal};
use crate::command::Action;
use crate::error::{Errno, Error};
use crate::model::{Mark, RecordId, Status, VolumeId};

fn pend(lab: &Lab, volume: VolumeId, job: Option<&str>) {
    lab.state().sky.volumes.get_mut(&volume).unwrap().pending = job.map(str::to_owned);
}

#[tokio::test(start_paused = true)]
async fn s9_nothing_is_called_on_a_volume_while_a_job_of_the_cloud_is_pending_on_it() {
    let lab = Lab::new();
    let engine = lab.start().await;
    let job = lab.job(&engine, "j").await;
    let (row, v) = lab.make(&engine, job, "d").await;
    pend(&lab, v, Some("job-7"));
    let going = lab.go(&engine, on(row), attach());
    tokio::time::sleep(Duration::from_secs(60)).await;
    assert_eq!((going.ticket.outcome(), lab.count("cloud attach")), (None, 0));
    let op = engine.world().operations[&going.op.unwrap()].clone();
    assert!(op.step.contains("job-7"), "{}", op.step);
    pend(&lab, v, None);
    going.ticket.wait().await.unwrap();
    assert_eq!(lab.count("cloud attach"), 1);
    // And a cancel ends the wait.
    pend(&lab, v, Some("job-8"));
    let going = lab.go(&engine, on(row), detach());
    tokio::time::sleep(Duration::from_secs(5)).await;
    lab.run(&engine, Target::Root, Action::Cancel { id: going.op }).await.unwrap();
    assert!(going.ticket.wait().await.is_err());
    assert_eq!((lab.count("cloud detach"), lab.status(&engine, row)), (0, Status::Attached));
}

#[tokio::test(start_paused = true)]
async fn s8_between_two_tries_the_volume_may_have_become_somebody_elses() {
    for at in [At::Attach, At::Detach, At::Resize, At::Delete] {
        let lab = Lab::new();
        let engine = lab.start().await;
        let job = lab.job(&engine, "j").await;
        let (row, v) = lab.make(&engine, job, "d").await;
        if at == At::Detach {
            lab.run(&engine, on(row), attach()).await.unwrap();
        }
        let (action, what) = match at {
            At::Attach => (attach(), "cloud attach"),
            At::Detach => (detach(), "cloud detach"),
            At::Resize => (Action::Resize { size: 2 * GIB }, "cloud resize"),
            _ => (Action::Delete { volume: v, expunge: false }, "cloud delete"),
        };
        lab.forget_log();
        lab.script(at, Act::Refuse(Refusal::Passing));
        let going = lab.go(&engine, on(row), action);
        lab.until_logged(what, 1).await;
        lab.remark(v, Some(Mark { record: RecordId::random(), epoch: 1 }));
        let ended = going.ticket.wait().await;
        assert_eq!(ended.map_err(|e| e.errno()), Err(Errno::EPERM), "{at:?} {:#?}", lab.state().log);
        assert_eq!(lab.count(what), 1, "{at:?}: tried once");
        assert_eq!(lab.status(&engine, row), Status::Conflict, "{at:?}");
    }
}

#[tokio::test(start_paused = true)]
async fn a_detach_that_waited_finds_the_volume_elsewhere_and_leaves_it_there() {
    let lab = Lab::new();
    let engine = lab.start().await;
    let job = lab.job(&engine, "j").await;
    let (row, v) = lab.make(&engine, job, "d").await;
    lab.run(&engine, on(row), attach()).await.unwrap();
    let vm = lab.vm(true);
    lab.script(At::Detach, Act::Refuse(Refusal::Passing));
    let going = lab.go(&engine, on(row), detach());
    lab.until_logged("cloud detach", 1).await;
    lab.unplug(v);
    lab.put(v, Some(vm));
    going.ticket.wait().await.unwrap();
    assert_eq!(lab.count("cloud detach"), 1);
    assert_eq!(lab.cloud_of(v).unwrap().attached.unwrap().vm, vm);
    assert_eq!(lab.status(&engine, row), Status::Remote);
}

#[tokio::test(start_paused = true)]
async fn a_device_that_never_comes_ends_its_attach_as_lost_and_is_taken_when_it_comes() {
    let lab = Lab::new();
    let engine = lab.start().await;
    let job = lab.job(&engine, "j").await;
    let (row, v) = lab.make(&engine, job, "d").await;
    lab.state().kernel.plug = Plug::ByHand;
    let began = tokio::time::Instant::now();
    let error = lab.run(&engine, on(row), attach()).await.unwrap_err();
    assert!(matches!(error, Error::NotSettled { status: Status::Lost, .. }), "{error}");
    assert!(began.elapsed() >= Duration::from_secs(300));
    assert_eq!(lab.status(&engine, row), Status::Lost);
    lab.plug(v, GIB);
    lab.until_status(&engine, row, Status::Attached).await;
    assert_eq!(lab.count("cloud attach"), 1);
}

#[tokio::test(start_paused = true)]
async fn an_attach_whose_volume_is_taken_away_again_waits_for_its_device_no_longer() {
    let lab = Lab::new();
    let engine = lab.start().await;
    let job = lab.job(&engine, "j").await;
    let (row, v) = lab.make(&engine, job, "d").await;
    lab.state().kernel.plug = Plug::ByHand;
    let going = lab.go(&engine, on(row), attach());
    lab.until_logged("cloud attach", 1).await;
    tokio::time::sleep(Duration::from_secs(3)).await;
    lab.put(v, None);
    let error = going.ticket.wait().await.unwrap_err();
    assert!(error.to_string().contains("detached again behind volfs's back"), "{error}");
    assert_eq!(lab.status(&engine, row), Status::Detached);
}

#[tokio::test(start_paused = true)]
async fn what_the_cloud_said_three_silent_intervals_ago_is_unknown_and_a_device_here_stays() {
    let lab = Lab::new();
    let engine = lab.start().await;
    let job = lab.job(&engine, "j").await;
    let (free, _) = lab.make(&engine, job, "free").await;
    let (here, _) = lab.make(&engine, job, "here").await;
    let (there, _) = lab.make(&engine, job, "there").await;
    lab.run(&engine, on(here), attach()).await.unwrap();
    let vm = lab.vm(false);
    lab.run(&engine, on(there), Action::Attach { vm: Some(vm), slot: None }).await.unwrap();
    let statuses = |engine: &Engine| {
        let world = engine.world();
        [free, here, there].map(|row| world.volumes[&row].status())
    };
    let settled = [Status::Detached, Status::Attached, Status::Remote];
    lab.script(At::Survey, Act::Down(Box::new(Act::Unreachable)));
    tokio::time::sleep(Duration::from_secs(150)).await;
    assert_eq!(statuses(&engine), settled, "two silent intervals");
    tokio::time::sleep(Duration::from_secs(120)).await;
    assert_eq!(statuses(&engine), [Status::Unknown, Status::Attached, Status::Unknown]);
    assert!(engine.device(here).is_ok());
    assert_eq!(lab.recorded(engine.world().volumes[&free].uuid), Status::Detached, "the record keeps what it knew");
    lab.state().sky.down = false;
    tokio::time::sleep(Duration::from_secs(61)).await;
    assert_eq!(statuses(&engine), settled);
}

#[tokio::test(start_paused = true)]
async fn a_host_that_is_not_proved_changes_nothing_until_its_root_disk_shows() {
    let lab = Lab::with(|about| about.prove_host = true);
    let engine = lab.start().await;
    let job = lab.job(&engine, "j").await;
    let error = lab.run(&engine, Target::Job(job), create("d", GIB)).await.unwrap_err();
    assert_eq!(error.errno(), Errno::EROFS, "{error}");
    let root = VolumeId::random();
    let volume = CloudVolume {
        id: root,
        name: "ROOT-1".into(),
        size: GIB,
        state: "Ready".into(),
        attached: Some(Attachment { vm: lab.host, device_id: Some(0) }),
        mark: None,
        carries_host: None,
        pending: None,
    };
    lab.state().sky.volumes.insert(root, volume);
    assert!(lab.run(&engine, Target::Root, Action::Reconcile { vm: None }).await.is_ok());
    let error = lab.run(&engine, Target::Job(job), create("d", GIB)).await.unwrap_err();
    assert!(error.to_string().contains("no disk here carries its identity"), "{error}");
    assert_eq!(lab.count("cloud create"), 0);
    lab.plug(root, GIB);
    assert!(lab.run(&engine, Target::Root, Action::Reconcile { vm: None }).await.is_ok());
    lab.run(&engine, Target::Job(job), create("d", GIB)).await.unwrap();
}
