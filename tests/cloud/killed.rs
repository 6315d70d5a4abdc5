//! SIGKILL at every step of every operation: before the call, on the way, before the answer, after
//! it and before the record, in mid-poll. The next start on the same record settles it: done exactly
//! once, or not begun; and the same command again has the right outcome.

use std::fs;
use std::io::Write;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::Path;
use std::time::Duration;

use fakecloud::{FakeCloud, Fault, Kind, Moment};

use crate::common::PATIENCE;
use crate::lane::Op::{self, *};
use crate::lane::{Lane, OPS, words};
use crate::site::MARK;

/// Longer than any test waits: only the kill ends it.
const NEVER: Duration = Duration::from_secs(60);

/// When the daemon is killed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum When {
    /// At this point of its own.
    At(&'static str),
    /// The request is with the cloud, which acts on it only when the daemon is dead.
    OnTheWay,
    /// The cloud has taken the job, and its answer is not sent.
    Unanswered,
    /// Answered, and the job still runs: it ends before the next start.
    Polling(Moment),
    /// The same, and the job still runs after the next start, which must wait for it.
    PollingOn(Moment),
    /// The same, and the job ends with its management server, having done nothing.
    PollingInVain,
}
use When::*;

/// What the next start leaves.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Left {
    /// Done, and `history` says so.
    Done,
    /// As before, and `history` says interrupted.
    Before,
}

impl Op {
    fn verb(self) -> &'static str {
        match self {
            Create | CreateMarks | CreateRenames => "create",
            Claim => "claim",
            Attach | AttachThere => "attach",
            Detach | DetachThere => "detach",
            Resize => "resize",
            Delete => "delete",
            Release => "release",
            MoveUnmarks | MoveMarks => "move",
            RenameUnmarks | RenameMarks => "disk",
        }
    }
}

/// The table.
fn cells(op: Op) -> Vec<(When, Left)> {
    use Left::*;
    let mut cells = Vec::new();
    // A new name takes nothing away and is said again, whether it had been or not.
    let begins = if op.verb() == "disk" { Done } else { Before };
    let points: &[(&str, Left)] = match op {
        Create => &[
            ("create.journaled", Before),
            ("create.before-call", Before),
            ("cloudstack.submitted", Done),
            ("cloudstack.allocated", Done),
            ("cloudstack.marked", Done),
            ("create.after-call", Done),
            ("create.acted", Done),
            ("create.recorded", Done),
        ],
        Claim => &[
            ("claim.journaled", Before),
            ("claim.before-mark", Before),
            ("cloudstack.submitted", Done),
            ("claim.after-mark", Done),
            ("claim.acted", Done),
            ("claim.recorded", Done),
        ],
        Attach | AttachThere => &[
            ("attach.journaled", Before),
            ("attach.before-call", Before),
            ("cloudstack.submitted", Done),
            ("attach.after-call", Done),
            ("attach.acted", Done),
            ("attach.recorded", Done),
        ],
        Detach | DetachThere => &[
            ("detach.journaled", Before),
            ("detach.before-call", Before),
            ("cloudstack.submitted", Done),
            ("detach.after-call", Done),
            ("detach.acted", Done),
            ("detach.recorded", Done),
        ],
        Resize => &[
            ("resize.journaled", Before),
            ("resize.before-call", Before),
            ("cloudstack.submitted", Done),
            ("resize.after-call", Done),
            ("resize.acted", Done),
            ("resize.recorded", Done),
        ],
        Delete => &[
            ("delete.journaled", Before),
            ("delete.before-call", Before),
            ("cloudstack.submitted", Done),
            ("delete.after-call", Done),
            ("delete.acted", Done),
            ("delete.recorded", Done),
        ],
        Release => &[
            ("release.journaled", Before),
            ("release.before-mark", Before),
            ("cloudstack.submitted", Done),
            ("cloudstack.unmarked", Done),
            ("release.after-mark", Done),
            ("release.acted", Done),
            ("release.recorded", Done),
        ],
        MoveUnmarks => &[
            ("move.journaled", Before),
            ("move.before-mark", Before),
            ("cloudstack.submitted", Done),
            ("cloudstack.unmarked", Done),
            ("move.after-mark", Done),
            ("move.acted", Done),
            ("move.recorded", Done),
        ],
        RenameUnmarks => &[
            ("disk.journaled", Done),
            ("cloudstack.submitted", Done),
            ("cloudstack.unmarked", Done),
            ("disk.acted", Done),
            ("disk.recorded", Done),
        ],
        CreateMarks | CreateRenames | MoveMarks | RenameMarks => &[],
    };
    cells.extend(points.iter().map(|(name, left)| (At(name), *left)));
    cells.push((Unanswered, Done));
    for moment in [Moment::Queued, Moment::Working, Moment::Closing] {
        cells.extend([(Polling(moment), Done), (PollingOn(moment), Done)]);
    }
    let in_vain = match op {
        // What the job was for is done all the same, or is done again where it was begun.
        Create | CreateMarks | CreateRenames | MoveMarks | RenameMarks => Done,
        _ => begins,
    };
    cells.push((PollingInVain, in_vain));
    // The last: its call arrives late, and would be taken for the next cell's.
    cells.push((OnTheWay, Done));
    cells
}

/// One write(2) that is cut off by the daemon's end.
fn write(path: &Path, text: &str) -> i32 {
    let open = fs::OpenOptions::new().write(true).open(path);
    match open.and_then(|mut file| file.write_all(text.as_bytes())) {
        Ok(()) => 0,
        Err(error) => error.raw_os_error().unwrap_or(-1),
    }
}

/// The outcome of the last operation of this verb, in `history`.
fn outcome(lane: &Lane) -> Option<String> {
    let text = lane.site.volfs.read("history").unwrap();
    let rows: Vec<Vec<&str>> = text.lines().skip(1).map(|line| line.split('\t').collect()).collect();
    rows.iter().rfind(|row| row[1] == lane.op.verb()).map(|row| row[5].to_owned())
}

fn in_flight(lane: &Lane) -> bool {
    let names = fs::read_dir(lane.site.volfs.path("operations")).unwrap();
    let mut texts = names.map(|e| lane.site.volfs.path("operations").join(e.unwrap().file_name()));
    texts.any(|path| fs::read_to_string(path).is_ok_and(|text| text.contains("\"ended\":null")))
}

fn cell(lane: &mut Lane, n: usize, when: When, left: Left) {
    if let Some(volume) = lane.volume(n) {
        // What nobody has looked at is released without the cloud (row X8); that is not the case here.
        let status = format!("volumes/{}/status", volume.id);
        lane.site.volfs.until("a look", || lane.site.volfs.read(&status) != Ok("unknown\n".to_owned()));
    }
    let mark = lane.volume(n).and_then(|v| v.tags.get(MARK).cloned()).unwrap_or_default();
    let before = lane.effects(n);
    kill(lane, n, when);
    match when {
        Polling(_) => {
            lane.site.cloud.release_jobs();
            lane.site.until("the job's end", |c| c.jobs().iter().all(fakecloud::Job::done));
        }
        PollingInVain => {
            lane.site.cloud.restart_server();
            lane.site.until("the job's end", |c| c.jobs().iter().all(fakecloud::Job::done));
        }
        _ => {}
    }
    lane.site.volfs.launch();
    if let PollingOn(_) = when {
        assert!(in_flight(lane), "settled while the cloud still works on it: {:?}", lane.site.cloud.held_jobs());
        lane.site.cloud.release_jobs();
    }
    lane.site.volfs.until("its end", || !in_flight(lane));
    let said = outcome(lane);
    lane.shown(n, &mark);
    lane.orphans();
    let happened = lane.effects(n) - before;
    match left {
        Left::Done => {
            assert_eq!((said.as_deref(), happened), (Some("done"), 1), "outcome and effects");
            assert!(lane.reached(n), "done, and not so");
            assert_eq!(lane.give(n), lane.op.again(), "the same again: {}", lane.error(n));
        }
        Left::Before => {
            assert_eq!((said.as_deref(), happened), (Some("interrupted"), 0), "outcome and effects");
            assert_eq!(lane.give(n), 0, "the same again: {}", lane.error(n));
            assert!(lane.reached(n), "done at last, and not so");
        }
    }
    assert_eq!(lane.effects(n) - before, 1, "effects in the end");
    lane.shown(n, &mark);
    lane.orphans();
}

/// Gives the command, and kills the daemon then.
fn kill(lane: &mut Lane, n: usize, when: When) {
    let (path, text) = (lane.site.volfs.path(lane.path(n)), lane.text(n));
    let (cloud, command) = (lane.site.cloud.clone(), lane.op.command());
    let of_it = |c: &FakeCloud| c.jobs().iter().filter(|job| job.command == command).count();
    let (calls, jobs) = (cloud.calls(command), of_it(&cloud));
    match when {
        At(name) => fs::write(lane.arms().join(name), "1").unwrap(),
        OnTheWay => cloud.fault(Fault::new(command, Kind::DelayBefore(Duration::from_millis(700)))),
        Unanswered => cloud.fault(Fault::new(command, Kind::DelayAfter(NEVER))),
        Polling(moment) | PollingOn(moment) => cloud.fault(Fault::new(command, Kind::JobHangs(moment))),
        PollingInVain => cloud.fault(Fault::new(command, Kind::JobHangs(Moment::Queued))),
    }
    let writer = std::thread::spawn(move || write(&path, &text));
    let until = |what: &str, so: &dyn Fn(&FakeCloud) -> bool| {
        let came = cloud.wait_for(PATIENCE, |c| so(c) || writer.is_finished()) && so(&cloud);
        assert!(came, "never {what}: {} {}", writer.is_finished(), lane.error(n));
    };
    match when {
        At(_) => {}
        OnTheWay => until("the call", &|c| c.calls(command) > calls),
        Unanswered => until("the job", &|c| of_it(c) > jobs),
        _ => until("the job to hang", &|c| !c.held_jobs().is_empty()),
    }
    match when {
        At(name) => {
            assert_eq!(lane.site.volfs.wait(), -libc::SIGKILL, "it ended otherwise");
            fs::remove_file(lane.arms().join(name)).unwrap();
        }
        _ => lane.site.volfs.kill(),
    }
    assert_ne!(writer.join().unwrap(), 0, "its caller was told that it is done");
    cloud.clear_faults();
}

fn matrix(own: bool, wanted: impl Fn(Op, When) -> bool + Sync) {
    let lane = |op: Op| {
        let cells: Vec<_> = cells(op).into_iter().filter(|(when, _)| wanted(op, *when)).collect();
        let points: Vec<&str> =
            cells.iter().filter_map(|(w, _)| if let At(name) = w { Some(*name) } else { None }).collect();
        let mut lane = Lane::new(op, own, cells.len(), &points);
        let mut failed = Vec::new();
        for (n, (when, left)) in cells.into_iter().enumerate() {
            let tried = catch_unwind(AssertUnwindSafe(|| cell(&mut lane, n, when, left)));
            if let Err(panic) = tried {
                let words = words(&*panic);
                let log = lane.site.volfs.log();
                let last = log.lines().rev().take(30).collect::<Vec<_>>();
                failed.push(format!(
                    "{op:?} × {when:?}: {}\nits log ends, backwards:\n{}",
                    words.lines().take(6).collect::<Vec<_>>().join("\n"),
                    last.join("\n")
                ));
                // The next cell has a daemon again.
                lane.site.cloud.clear_faults();
                lane.site.cloud.release_jobs();
                lane.site.volfs.kill();
                for arm in fs::read_dir(lane.arms()).unwrap() {
                    fs::remove_file(arm.unwrap().path()).unwrap();
                }
                lane.site.volfs.launch();
            }
        }
        failed
    };
    let failed: Vec<String> = std::thread::scope(|scope| {
        let lane = &lane;
        let lanes: Vec<_> = OPS.into_iter().map(|op| scope.spawn(move || lane(op))).collect();
        lanes.into_iter().flat_map(|l| l.join().unwrap()).collect()
    });
    assert!(failed.is_empty(), "{} cells:\n{}", failed.len(), failed.join("\n"));
}

#[test]
fn killed_at_each_step_of_each_operation_the_next_start_settles_it_with_one_effect_or_none() {
    matrix(true, |_, _| true);
}

#[test]
fn the_same_in_mid_poll_where_the_cloud_takes_no_job_ids_of_ours() {
    // A job that another id has shows on its volume, and one of tags shows nowhere: there the time of
    // late answers is all that is waited.
    let shows = |op| matches!(op, Attach | AttachThere | Detach | DetachThere | Resize);
    matrix(false, |op, when| match when {
        At(_) => false,
        PollingOn(_) => shows(op),
        _ => true,
    });
}
