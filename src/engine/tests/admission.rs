//! The table X1 to X9, each cell, and what comes before it.

use super::super::admission::{Situation, Verdict, admit};
use super::fakes::{GIB, delete, disk_name, job_id, root, user};
use crate::command::Action;
use crate::error::{Errno, Error};
use crate::model::{JobId, Mark, OpId, RecordId, SnapshotName, Status, VmId, VolumeId};

struct Case {
    volume: VolumeId,
    host: VmId,
    y: VmId,
    job: JobId,
    mark: Mark,
}

fn case() -> Case {
    Case {
        volume: VolumeId::random(),
        host: VmId::random(),
        y: VmId::random(),
        job: job_id("j"),
        mark: Mark { record: RecordId::random(), epoch: 7 },
    }
}

impl Case {
    fn ask(&self, status: Status, action: &Action, change: impl FnOnce(&mut Situation<'_>)) -> Verdict {
        let owner = self.mark.to_string();
        let disk = disk_name("d");
        let mut s = Situation {
            volume: self.volume,
            status,
            vm: match status {
                Status::Attached | Status::Lost => Some(self.host),
                Status::Remote => Some(self.y),
                _ => None,
            },
            size: 4 * GIB,
            job: &self.job,
            disk: &disk,
            held: false,
            running: None,
            mark: self.mark,
            owner: &owner,
            why: "because",
            host: self.host,
            provider: "fake",
            snapshots: true,
            can_force: true,
            size_step: 1,
        };
        change(&mut s);
        admit(&s, action, &root())
    }

    fn word(verdict: &Verdict) -> &'static str {
        match verdict {
            Verdict::Start => "start",
            Verdict::AlreadyDone => "ok",
            Verdict::Reconcile => "R",
            Verdict::Join(_) => "join",
            Verdict::Deny(error) => error.errno().name(),
        }
    }

    /// One row: the cells of detached, attached, remote on Y, lost, missing, unknown, conflict.
    fn row(&self, what: &str, action: Action, cells: [&str; 7]) {
        use Status::*;
        for (status, cell) in [Detached, Attached, Remote, Lost, Missing, Unknown, Conflict].into_iter().zip(cells) {
            let verdict = self.ask(status, &action, |_| ());
            assert_eq!(Self::word(&verdict), cell, "{what} while {status}: {verdict:?}");
        }
    }
}

fn attach(vm: Option<VmId>) -> Action {
    Action::Attach { vm, slot: None }
}

fn detach(vm: Option<VmId>) -> Action {
    Action::Detach { vm, force: false }
}

fn snapshot(text: &str) -> SnapshotName {
    SnapshotName::parse(text).unwrap()
}

#[test]
fn x1_attach_in_every_status() {
    let c = case();
    let cells = ["start", "ok", "EBUSY", "start", "ENOENT", "R", "EBUSY"];
    c.row("attach", attach(None), cells);
    c.row("attach vm=this host", attach(Some(c.host)), cells);
}

#[test]
fn x2_attach_to_another_vm_in_every_status() {
    let c = case();
    c.row("attach vm=Y", attach(Some(c.y)), ["start", "EBUSY", "ok", "EBUSY", "ENOENT", "R", "EBUSY"]);
    let x = Some(VmId::random());
    c.row("attach vm=X", attach(x), ["start", "EBUSY", "EBUSY", "EBUSY", "ENOENT", "R", "EBUSY"]);
}

#[test]
fn x3_detach_in_every_status() {
    let c = case();
    let cells = ["ok", "start", "ok", "start", "ok", "R", "EBUSY"];
    c.row("detach", detach(None), cells);
    c.row("detach vm=this host", detach(Some(c.host)), cells);
    // In conflict because of the mark it is EPERM: not ours.
    for owner in ["", "5f8b5d4e-0000-4000-8000-000000000001/3"] {
        let verdict = c.ask(Status::Conflict, &detach(None), |s| s.owner = owner);
        assert_eq!(Case::word(&verdict), "EPERM", "{owner:?}");
    }
}

#[test]
fn x4_detach_from_another_vm_in_every_status() {
    let c = case();
    c.row("detach vm=Y", detach(Some(c.y)), ["ok", "ok", "start", "EBUSY", "ok", "R", "EPERM"]);
    let x = Some(VmId::random());
    c.row("detach vm=X", detach(x), ["ok", "ok", "ok", "EBUSY", "ok", "R", "EPERM"]);
}

#[test]
fn x5_resize_and_snapshot_in_every_status() {
    let c = case();
    let cells = ["start", "start", "EBUSY", "EBUSY", "ENOENT", "R", "EPERM"];
    c.row("resize", Action::Resize { size: 8 * GIB }, cells);
    c.row("snapshot", Action::Snapshot { name: snapshot("s"), crash: false }, cells);
    let same = c.ask(Status::Attached, &Action::Resize { size: 4 * GIB }, |_| ());
    assert_eq!(same, Verdict::AlreadyDone, "c5: an equal size is success");
    let less = c.ask(Status::Detached, &Action::Resize { size: GIB }, |_| ());
    assert_eq!(Case::word(&less), "EINVAL");
}

#[test]
fn c6_delete_snapshot_in_every_status_is_let_in_wherever_the_volume_is() {
    let c = case();
    let cells = ["start", "start", "start", "start", "ENOENT", "R", "EPERM"];
    c.row("delete-snapshot", Action::DeleteSnapshot { name: snapshot("s") }, cells);
}

#[test]
fn x6_revert_in_every_status() {
    let c = case();
    let cells = ["start", "EBUSY", "EBUSY", "EBUSY", "ENOENT", "R", "EPERM"];
    c.row("revert", Action::Revert { name: snapshot("s") }, cells);
}

#[test]
fn x7_delete_in_every_status() {
    let c = case();
    // Missing is success that drops it: an operation, because the record changes.
    c.row("delete", delete(c.volume), ["start", "EBUSY", "EBUSY", "EBUSY", "start", "R", "EPERM"]);
}

#[test]
fn x8_release_in_every_status() {
    let c = case();
    let cells = ["start", "EBUSY", "start", "start", "start", "start", "start"];
    c.row("release", Action::Release { volume: c.volume }, cells);
}

#[test]
fn x9_move_and_disk_in_every_status() {
    let c = case();
    let cells = ["start", "start", "start", "start", "start", "start", "EPERM"];
    c.row("move", Action::Move { job: job_id("other") }, cells);
    c.row("disk", Action::Disk { name: disk_name("other") }, cells);
}

#[test]
fn an_imported_volume_without_our_mark_is_reconciled_before_it_is_changed() {
    let c = case();
    let unmarked = |s: &mut Situation<'_>| {
        s.mark.epoch = 0;
        s.owner = "";
    };
    let renaming = [Action::Move { job: job_id("other") }, Action::Disk { name: disk_name("other") }];
    let changing = [attach(None), detach(None), delete(c.volume), Action::Resize { size: 8 * GIB }];
    for action in changing.into_iter().chain(renaming) {
        assert_eq!(c.ask(Status::Unknown, &action, unmarked), Verdict::Reconcile, "{action:?}");
        assert!(matches!(c.ask(Status::Conflict, &action, unmarked), Verdict::Deny(_)), "{action:?}");
    }
    assert_eq!(c.ask(Status::Unknown, &Action::Release { volume: c.volume }, unmarked), Verdict::Start);
}

#[test]
fn an_equal_command_in_flight_is_joined_and_every_other_is_busy_at_once() {
    let c = case();
    let running = attach(None);
    for status in [Status::Detached, Status::Unknown, Status::Conflict] {
        let set = |s: &mut Situation<'_>| s.running = Some((OpId(3), Box::leak(Box::new(attach(None))), "attach"));
        assert_eq!(c.ask(status, &running, set), Verdict::Join(OpId(3)));
        for other in [
            detach(None),
            attach(Some(c.y)),
            delete(c.volume),
            Action::Release { volume: c.volume },
            Action::Reconcile { vm: None },
            Action::Disk { name: disk_name("x") },
        ] {
            match c.ask(status, &other, set) {
                Verdict::Deny(error @ Error::InFlight { id: OpId(3), .. }) => assert_eq!(error.errno(), Errno::EBUSY),
                verdict => panic!("{other:?}: {verdict:?}"),
            }
        }
    }
}

#[test]
fn a_verb_that_destroys_repeats_the_objects_own_name() {
    let c = case();
    let other = VolumeId::random();
    for action in [delete(other), Action::Release { volume: other }] {
        for status in [Status::Detached, Status::Missing, Status::Unknown] {
            match c.ask(status, &action, |_| ()) {
                Verdict::Deny(error @ Error::WrongName { .. }) => assert_eq!(error.errno(), Errno::EINVAL),
                verdict => panic!("{verdict:?}"),
            }
        }
    }
}

#[test]
fn force_and_expunge_are_for_root_only() {
    let c = case();
    let ask = |action: Action, caller| {
        let owner = c.mark.to_string();
        let disk = disk_name("d");
        let s = Situation {
            volume: c.volume,
            status: Status::Detached,
            vm: None,
            size: GIB,
            job: &c.job,
            disk: &disk,
            held: false,
            running: None,
            mark: c.mark,
            owner: &owner,
            why: "",
            host: c.host,
            provider: "fake",
            snapshots: true,
            can_force: true,
            size_step: 1,
        };
        admit(&s, &action, &caller)
    };
    for action in [Action::Detach { vm: None, force: true }, Action::Delete { volume: c.volume, expunge: true }] {
        assert!(matches!(ask(action.clone(), user()), Verdict::Deny(Error::RootOnly { .. })), "{action:?}");
        assert!(!matches!(ask(action.clone(), root()), Verdict::Deny(_)), "{action:?}");
    }
    assert_eq!(ask(delete(c.volume), user()), Verdict::Start, "a plain delete takes no root");
}

#[test]
fn a_held_job_lets_nothing_be_taken_away() {
    let c = case();
    for action in [
        delete(c.volume),
        Action::Release { volume: c.volume },
        Action::Move { job: job_id("other") },
        Action::Revert { name: snapshot("s") },
    ] {
        for status in Status::ALL.into_iter().filter(|s| !s.in_flight()) {
            match c.ask(status, &action, |s| s.held = true) {
                Verdict::Deny(error @ Error::Held { .. }) => assert_eq!(error.errno(), Errno::EPERM),
                verdict => panic!("{action:?} while {status}: {verdict:?}"),
            }
        }
    }
    for action in [attach(None), Action::Resize { size: 9 * GIB }, Action::Disk { name: disk_name("x") }] {
        assert_eq!(c.ask(Status::Detached, &action, |s| s.held = true), Verdict::Start, "{action:?}");
    }
}

#[test]
fn force_where_the_provider_cannot_pull_a_device_is_busy() {
    let c = case();
    let force = Action::Detach { vm: None, force: true };
    match c.ask(Status::Attached, &force, |s| s.can_force = false) {
        Verdict::Deny(error @ Error::CannotForce { .. }) => assert_eq!(error.errno(), Errno::EBUSY),
        verdict => panic!("{verdict:?}"),
    }
    assert_eq!(c.ask(Status::Attached, &force, |_| ()), Verdict::Start);
}

#[test]
fn a_name_it_has_already_is_success_and_nothing_done() {
    let c = case();
    assert_eq!(c.ask(Status::Detached, &Action::Disk { name: disk_name("d") }, |_| ()), Verdict::AlreadyDone);
    assert_eq!(c.ask(Status::Detached, &Action::Move { job: c.job.clone() }, |_| ()), Verdict::AlreadyDone);
}

#[test]
fn snapshots_where_the_provider_has_none_are_unsupported() {
    let c = case();
    let action = Action::Snapshot { name: snapshot("s"), crash: false };
    let verdict = c.ask(Status::Detached, &action, |s| s.snapshots = false);
    assert_eq!(Case::word(&verdict), "EOPNOTSUPP");
}
