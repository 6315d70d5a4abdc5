//! What the kernel shows, and what is believed of it: identity, incarnation, loss and absence.

use std::time::Duration;

use super::super::Target;
use super::fakes::*;
use crate::command::Action;
use crate::error::Errno;
use crate::model::{Status, VmId};

#[tokio::test(start_paused = true)]
async fn attach_without_any_event_still_completes_by_looking() {
    let lab = Lab::new();
    let engine = lab.start().await;
    let job = lab.job(&engine, "j").await;
    let (row, v) = lab.make(&engine, job, "d").await;
    {
        let mut state = lab.state();
        state.kernel.muted = true;
        state.kernel.plug = Plug::ByHand;
    }
    let going = lab.go(&engine, on(row), attach());
    lab.until_logged("cloud attach", 1).await;
    tokio::time::sleep(Duration::from_secs(20)).await;
    assert_eq!(lab.status(&engine, row), Status::Attaching);
    lab.plug(v, GIB);
    going.ticket.wait().await.unwrap();
    assert!(engine.device(row).is_ok());
}

#[tokio::test(start_paused = true)]
async fn d1_while_the_event_of_one_is_held_back_the_device_of_another_is_never_its() {
    let lab = Lab::new();
    let engine = lab.start().await;
    let job = lab.job(&engine, "j").await;
    let (a, va) = lab.make(&engine, job, "a").await;
    let (b, vb) = lab.make(&engine, job, "b").await;
    lab.state().kernel.plug = Plug::ByHand;
    let going_a = lab.go(&engine, on(a), attach());
    let going_b = lab.go(&engine, on(b), attach());
    lab.until_logged("cloud attach", 2).await;
    lab.plug(vb, GIB);
    going_b.ticket.wait().await.unwrap();
    assert_eq!(going_a.ticket.outcome(), None);
    assert_eq!(engine.device(a).unwrap_err().errno(), Errno::ENODEV);
    lab.plug(va, GIB);
    going_a.ticket.wait().await.unwrap();
    assert_eq!(engine.device(a).unwrap().incarnation, lab.disks_of(va)[0].incarnation);
    assert_eq!(engine.device(b).unwrap().incarnation, lab.disks_of(vb)[0].incarnation);
}

#[tokio::test(start_paused = true)]
async fn d3_a_device_of_the_wrong_size_is_conflict_and_never_attached() {
    let lab = Lab::new();
    let engine = lab.start().await;
    let job = lab.job(&engine, "j").await;
    let (row, _) = lab.make(&engine, job, "d").await;
    lab.state().kernel.plug = Plug::WrongSize;
    let error = lab.run(&engine, on(row), attach()).await.unwrap_err();
    assert_eq!(error.errno(), Errno::EPERM, "{error}");
    assert_eq!(lab.status(&engine, row), Status::Conflict);
    assert!(engine.device(row).is_err());
    assert_eq!(lab.count("cloud detach"), 0, "r10");
}

#[tokio::test(start_paused = true)]
async fn e14_two_devices_of_one_identity_are_enotuniq_and_conflict() {
    let lab = Lab::new();
    let engine = lab.start().await;
    let job = lab.job(&engine, "j").await;
    let (row, _) = lab.make(&engine, job, "d").await;
    lab.state().kernel.plug = Plug::Twice;
    let error = lab.run(&engine, on(row), attach()).await.unwrap_err();
    assert_eq!(error.errno(), Errno::ENOTUNIQ, "{error}");
    assert_eq!(lab.status(&engine, row), Status::Conflict);
    assert!(engine.device(row).is_err());
}

#[tokio::test(start_paused = true)]
async fn d2_a_name_that_is_reused_by_another_disk_is_not_served() {
    let lab = Lab::new();
    let engine = lab.start().await;
    let job = lab.job(&engine, "j").await;
    let (row, v) = lab.make(&engine, job, "d").await;
    lab.run(&engine, on(row), attach()).await.unwrap();
    let before = engine.device(row).unwrap();
    lab.state().kernel.muted = true;
    lab.unplug(v);
    let stranger = lab.foreign(GIB, None);
    let name = lab.plug(stranger, GIB);
    assert_eq!(name, before.name, "the fake kernel reuses names");
    assert_eq!(engine.device(row).unwrap_err().errno(), Errno::ENODEV);
    assert!(engine.mapped(before.mapping).is_err());
}

#[tokio::test(start_paused = true)]
async fn v5_a_device_that_vanishes_is_lost_at_once_also_while_the_cloud_hangs() {
    let lab = Lab::new();
    let engine = lab.start().await;
    let job = lab.job(&engine, "j").await;
    let (row, v) = lab.make(&engine, job, "d").await;
    lab.run(&engine, on(row), attach()).await.unwrap();
    lab.state().sky.hangs = true;
    let before = tokio::time::Instant::now();
    lab.unplug(v);
    lab.until_status(&engine, row, Status::Lost).await;
    assert_eq!(before.elapsed(), Duration::ZERO, "of the paused clock");
    assert!(engine.device(row).is_err());
}

#[tokio::test(start_paused = true)]
async fn x1_attach_while_lost_waits_for_the_device() {
    let lab = Lab::new();
    let engine = lab.start().await;
    let job = lab.job(&engine, "j").await;
    let (row, v) = lab.make(&engine, job, "d").await;
    lab.run(&engine, on(row), attach()).await.unwrap();
    let old = engine.device(row).unwrap().mapping;
    lab.unplug(v);
    lab.until_status(&engine, row, Status::Lost).await;
    lab.forget_log();
    let going = lab.go(&engine, on(row), attach());
    tokio::time::sleep(Duration::from_secs(5)).await;
    assert_eq!(going.ticket.outcome(), None);
    lab.plug(v, GIB);
    going.ticket.wait().await.unwrap();
    assert_eq!(lab.count("cloud attach"), 0);
    assert_ne!(engine.device(row).unwrap().mapping, old, "a new incarnation is a new mapping");
}

#[tokio::test(start_paused = true)]
async fn x3_detach_while_lost_detaches_it_in_the_cloud() {
    let lab = Lab::new();
    let engine = lab.start().await;
    let job = lab.job(&engine, "j").await;
    let (row, v) = lab.make(&engine, job, "d").await;
    lab.run(&engine, on(row), attach()).await.unwrap();
    lab.unplug(v);
    lab.until_status(&engine, row, Status::Lost).await;
    lab.run(&engine, on(row), detach()).await.unwrap();
    assert_eq!(lab.status(&engine, row), Status::Detached);
    assert_eq!(lab.cloud_of(v).unwrap().attached, None);
}

#[tokio::test(start_paused = true)]
async fn v6_missing_takes_two_looks_ten_seconds_apart_and_sight_of_our_own_vm() {
    let lab = Lab::new();
    let engine = lab.start().await;
    let job = lab.job(&engine, "j").await;
    let (row, v) = lab.make(&engine, job, "d").await;
    lab.state().sky.volumes.remove(&v);
    let host = lab.state().sky.vms.remove(&lab.host).unwrap();
    let before = tokio::time::Instant::now();
    let outcome = lab.run(&engine, on(row), Action::Reconcile { vm: None }).await;
    assert_eq!(outcome.unwrap_err().errno(), Errno::EHOSTUNREACH);
    assert_eq!(lab.status(&engine, row), Status::Unknown, "other credentials show nothing: that is no absence");
    lab.state().sky.vms.insert(lab.host, host);
    lab.run(&engine, on(row), Action::Reconcile { vm: None }).await.unwrap();
    assert_eq!(lab.status(&engine, row), Status::Missing);
    assert!(before.elapsed() >= Duration::from_secs(10));
    assert_eq!(lab.recorded(v), Status::Missing);
    assert_eq!(lab.run(&engine, on(row), attach()).await.unwrap_err().errno(), Errno::ENOENT);
    lab.run(&engine, on(row), detach()).await.unwrap();
    lab.run(&engine, on(row), delete(v)).await.unwrap();
    assert!(engine.world().volumes.is_empty());
    assert!(lab.state().record.volumes[&v].gone);
    assert_eq!(lab.count("cloud delete"), 0);
}

#[tokio::test(start_paused = true)]
async fn v6_one_look_is_not_believed_and_a_look_that_shows_it_begins_anew() {
    let lab = Lab::new();
    let engine = lab.start().await;
    let job = lab.job(&engine, "j").await;
    let (row, v) = lab.make(&engine, job, "d").await;
    let kept = lab.state().sky.volumes.remove(&v).unwrap();
    let first = lab.go(&engine, on(row), Action::Reconcile { vm: None });
    lab.until_status(&engine, row, Status::Unknown).await;
    tokio::time::sleep(Duration::from_secs(5)).await;
    lab.state().sky.volumes.insert(v, kept);
    first.ticket.wait().await.unwrap();
    assert_eq!(lab.status(&engine, row), Status::Detached);
}

#[tokio::test(start_paused = true)]
async fn v8_attach_while_a_device_of_that_identity_is_here_already_calls_nothing() {
    let lab = Lab::new();
    let engine = lab.start().await;
    let job = lab.job(&engine, "j").await;
    let (row, v) = lab.make(&engine, job, "d").await;
    lab.state().kernel.muted = true;
    lab.plug(v, GIB);
    for action in [attach(), delete(v)] {
        let error = lab.run(&engine, on(row), action).await.unwrap_err();
        assert!(matches!(error.errno(), Errno::EPERM | Errno::EBUSY), "{error}");
        assert_eq!(lab.status(&engine, row), Status::Conflict);
    }
    assert_eq!((lab.count("cloud attach"), lab.count("cloud delete")), (0, 0));
}

#[tokio::test(start_paused = true)]
async fn what_happens_behind_volfs_is_followed_and_counted_and_nothing_is_called() {
    let lab = Lab::new();
    let engine = lab.start().await;
    let job = lab.job(&engine, "j").await;
    let (row, v) = lab.make(&engine, job, "d").await;
    lab.put(v, Some(lab.host));
    lab.plug(v, GIB);
    lab.until_status(&engine, row, Status::Attached).await;
    assert_eq!(lab.recorded(v), Status::Attached);
    lab.put(v, None);
    lab.unplug(v);
    lab.until_status(&engine, row, Status::Detached).await;
    lab.put(v, Some(VmId::random()));
    lab.run(&engine, Target::Root, Action::Reconcile { vm: None }).await.unwrap();
    assert_eq!(lab.status(&engine, row), Status::Remote);
    assert!(engine.world().counters.drift >= 3);
    assert_eq!(lab.count("cloud attach") + lab.count("cloud detach"), 0);
}

#[tokio::test(start_paused = true)]
async fn a_closed_event_channel_is_no_busy_loop() {
    let lab = Lab::new();
    let engine = lab.start().await;
    let job = lab.job(&engine, "j").await;
    let (row, v) = lab.make(&engine, job, "d").await;
    lab.state().kernel.plug = Plug::ByHand;
    lab.close_events();
    let going = lab.go(&engine, on(row), attach());
    lab.until_logged("cloud attach", 1).await;
    let scans = lab.state().kernel.scans;
    tokio::time::sleep(Duration::from_secs(10)).await;
    let looked = lab.state().kernel.scans - scans;
    assert!(looked <= 15, "{looked} scans in ten seconds");
    lab.plug(v, GIB);
    going.ticket.wait().await.unwrap();
}
