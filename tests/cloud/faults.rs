//! Every fault of every operation: what the caller gets, what the cloud has then, what volfs shows,
//! and that the same command again brings it to its end.
//!
//! The outcome of each cell is written down below as a function of the fault's class and the
//! operation ([`expected`]); the judge is the fake's own book and the kernel's, not volfs.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::time::Duration;

use fakecloud::{FakeCloud, Fault, Kind, Moment};

use crate::common::PATIENCE;
use crate::lane::Op::{self, *};
use crate::lane::{DEADLINE, Lane, OPS, words};
use crate::site::MARK;

const EPERM: i32 = 1;
const ENOSPC: i32 = 28;
const EHOSTUNREACH: i32 = 113;
/// How often a command is given that the cloud was not heard for.
const AGAIN: usize = 5;
const EREMOTEIO: i32 = 121;
const EDQUOT: i32 = 122;

/// What a fault comes to, whatever the operation.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Class {
    /// It happens all the same, now or at a repeat that volfs makes by itself.
    Happens,
    /// Nothing was done, and nothing says so.
    Unacted,
    /// The cloud says no, once.
    No(i32),
    /// It says no for as long as it is asked.
    NoForEver(i32),
    /// The job ends before anything happens.
    Early,
    /// The hypervisor has done it, the cloud's book says nothing of it.
    Half,
    /// The volumes are listed without their tags all the time.
    Hidden,
    /// The cloud answers nothing.
    Away,
}
use Class::*;

/// How a fault comes in.
#[derive(Debug, Clone)]
enum Way {
    Once(Kind),
    Always(Kind),
    /// Of all commands.
    Everything(Kind),
    /// Of each list.
    Lists(Kind),
    /// The first lists after the call are answered as before it.
    StaleAfter,
    /// The job stays until it is let go on.
    Hangs(Moment),
}

fn faults() -> Vec<(String, Class, Way)> {
    use Way::*;
    let ms = Duration::from_millis;
    let error = |code, cs, text: &str| Kind::Error { code, cs, text: text.into() };
    let mut all = vec![
        ("dropped before".to_owned(), Unacted, Once(Kind::DropBefore)),
        ("dropped after".into(), Happens, Once(Kind::DropAfter)),
        ("slow to act".into(), Happens, Once(Kind::DelayBefore(ms(300)))),
        ("slow to answer".into(), Happens, Once(Kind::DelayAfter(ms(300)))),
        ("answered after the deadline".into(), Happens, Once(Kind::DelayAfter(ms(DEADLINE * 1000 + 500)))),
        ("502 of a proxy, not done".into(), Unacted, Once(Kind::Html { status: 502, acted: false })),
        ("502 of a proxy, done".into(), Happens, Once(Kind::Html { status: 502, acted: true })),
        ("503".into(), Happens, Once(Kind::Maintenance)),
        ("truncated".into(), Happens, Once(Kind::Truncated)),
        ("garbage".into(), Happens, Once(Kind::Garbage)),
        ("401 once".into(), Happens, Once(Kind::Unauthorized)),
        ("401 for ever".into(), NoForEver(EREMOTEIO), Always(Kind::Unauthorized)),
        ("429".into(), Happens, Once(Kind::RateLimited(50))),
        ("431".into(), No(EREMOTEIO), Once(error(431, 4350, "this is not to be"))),
        ("530".into(), No(EREMOTEIO), Once(error(530, 4250, "this is not to be"))),
        ("533".into(), No(ENOSPC), Once(error(533, 4250, "no capacity"))),
        ("534".into(), Happens, Once(error(534, 4250, "storage pool is in maintenance"))),
        ("535".into(), No(EDQUOT), Once(error(535, 4370, "amount of resources is exceeded"))),
        (
            "another snapshot runs".into(),
            Happens,
            Once(error(431, 4350, "There is other active snapshot tasks on the instance, please try again later")),
        ),
        (
            "its job refused for now".into(),
            Happens,
            Once(Kind::JobFails {
                at: Moment::Queued,
                code: 530,
                text: "There is other active vm snapshot tasks on the instance, please try again later".into(),
            }),
        ),
        ("its job unknown".into(), Happens, Once(Kind::JobLost)),
        ("its job under another id".into(), Happens, Once(Kind::OwnJobId)),
        ("stale lists".into(), Happens, StaleAfter),
        ("tags not shown".into(), Hidden, Lists(Kind::TagsHidden)),
        ("cloud away".into(), Away, Everything(Kind::DropBefore)),
    ];
    for moment in [Moment::Queued, Moment::Working, Moment::Done, Moment::Recorded, Moment::Closing] {
        let class = match moment {
            Moment::Queued | Moment::Working => Early,
            Moment::Done => Half,
            Moment::Recorded | Moment::Closing => Happens,
        };
        let fails = Kind::JobFails { at: moment, code: 530, text: "the hypervisor does not like it".into() };
        all.push((format!("job fails at {moment:?}"), class, Once(fails)));
        all.push((format!("server restarts at {moment:?}"), class, Once(Kind::ServerRestart(moment))));
        if matches!(moment, Moment::Queued | Moment::Working | Moment::Closing) {
            all.push((format!("job hangs at {moment:?}"), Happens, Hangs(moment)));
        }
    }
    all
}

/// A cell's outcome.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Outcome {
    /// Success: exactly one effect.
    Done,
    /// This errno, nothing happened, and the same command again brings it about.
    Nothing(i32),
    /// This errno and status; the books contradict the hypervisor, which has to be put right before
    /// the command is given again.
    Torn(i32, &'static str),
    /// This errno; what was made before the refusal stays, in sight, and a repeat is a new one.
    Left(i32),
}

/// The table. `own`: the server takes job ids of ours.
fn expected(op: Op, class: Class, own: bool) -> Outcome {
    use Outcome::*;
    match (class, op) {
        (Happens, _) => Done,
        // A name that a volume keeps is no failure, and the mark is set again where it was begun.
        (Unacted | No(_) | Early | Half | NoForEver(_), CreateRenames) => Done,
        (Unacted | No(_) | Early | Half, CreateMarks) => Done,
        (NoForEver(errno), CreateMarks) => Left(errno),
        // The request itself makes the volume: whatever becomes of its job, the volume is there.
        (Early | Half, Create) => Done,
        // It allocates before it looks at the job's id, so it is never said again.
        (Unacted, Create) => Nothing(EHOSTUNREACH),
        (Unacted, _) if own => Done,
        (Unacted | Early, _) => Nothing(EREMOTEIO),
        (No(errno), _) => Nothing(errno),
        // The old mark is off, and none can be set.
        (NoForEver(errno), MoveMarks) => Torn(errno, "conflict"),
        (NoForEver(errno), _) => Nothing(errno),
        (Half, Attach) => Torn(EREMOTEIO, "conflict"),
        // The device stays for as long as volfs holds it: a loop device ends with its last opener.
        (Half, Detach | AttachThere | DetachThere | Resize) => Nothing(EREMOTEIO),
        (Half, _) => Done,
        // Its own mark cannot be read back.
        (Hidden, Create | CreateMarks | CreateRenames) => Left(EREMOTEIO),
        (Hidden, Claim) => Left(EPERM),
        (Hidden, _) => Nothing(EPERM),
        (Away, _) => Nothing(EHOSTUNREACH),
    }
}

impl Lane {
    /// Gives the command while the fault is there; the errno. Where the cloud was not heard before the call
    /// that is to fail, nothing has happened yet: that is a busy machine, and it is given again.
    fn suffer(&self, n: usize, way: &Way) -> i32 {
        let meant = matches!(way, Way::Everything(_) | Way::Lists(_));
        for _ in 1..AGAIN {
            let before = self.site.cloud.calls(self.op.command());
            let errno = self.suffer_once(n, way);
            if errno != EHOSTUNREACH || meant || self.site.cloud.calls(self.op.command()) > before {
                return errno;
            }
        }
        self.suffer_once(n, way)
    }

    fn suffer_once(&self, n: usize, way: &Way) -> i32 {
        let (cloud, command) = (&self.site.cloud, self.op.command());
        let before = cloud.calls(command);
        match way {
            Way::Once(kind) => cloud.fault(Fault::new(command, kind.clone())),
            Way::Always(kind) => cloud.fault(Fault::new(command, kind.clone()).forever()),
            Way::Everything(kind) => cloud.fault(Fault::new("*", kind.clone()).forever()),
            Way::Lists(kind) => cloud.fault(Fault::new("listVolumes", kind.clone()).forever()),
            Way::Hangs(moment) => cloud.fault(Fault::new(command, Kind::JobHangs(*moment))),
            Way::StaleAfter => {}
        }
        let errno = std::thread::scope(|scope| {
            let writer = scope.spawn(|| self.give(n));
            let begun = |c: &FakeCloud| c.calls(command) > before || writer.is_finished();
            match way {
                Way::StaleAfter => {
                    let view = cloud.view();
                    assert!(cloud.wait_for(PATIENCE, begun), "never called");
                    cloud.fault(Fault::new("listVolumes", Kind::Stale(view)).times(3));
                }
                Way::Hangs(_) => {
                    let hangs = |c: &FakeCloud| !c.held_jobs().is_empty() || writer.is_finished();
                    assert!(cloud.wait_for(PATIENCE, hangs), "no job hangs");
                    cloud.release_jobs();
                }
                _ => {}
            }
            writer.join().unwrap()
        });
        cloud.clear_faults();
        if matches!(way, Way::Everything(_) | Way::Lists(_)) {
            // A round that came meanwhile may have seen all the others so, too.
            self.site.volfs.write("control", "reconcile");
        }
        errno
    }

    fn cell(&self, n: usize, class: Class, way: &Way) {
        let outcome = expected(self.op, class, self.own);
        let mark = self.volume(n).and_then(|v| v.tags.get(MARK).cloned()).unwrap_or_default();
        let before = self.effects(n);
        let errno = self.suffer(n, way);
        let happened = self.effects(n) - before;
        self.shown(n, &mark);
        self.orphans();
        match outcome {
            Outcome::Done => {
                assert_eq!((errno, happened), (0, 1), "outcome and effects");
                assert!(self.reached(n), "success, and not so");
                assert_eq!(self.heard(n), self.op.again(), "the same again");
                assert_eq!(self.effects(n) - before, 1, "effects after the same again");
            }
            Outcome::Nothing(wanted) => {
                assert_eq!((errno, happened), (wanted, 0), "outcome and effects");
                let now = self.volume(n).and_then(|v| v.tags.get(MARK).cloned()).unwrap_or_default();
                assert_eq!(now.split('/').next(), mark.split('/').next(), "its mark");
                self.finishes(n, before, 1);
            }
            Outcome::Left(wanted) => {
                assert_eq!((errno, happened), (wanted, 1), "outcome and effects");
                // A claim sets a new mark over its own, a create makes another.
                self.finishes(n, before, 2);
            }
            Outcome::Torn(wanted, status) => {
                assert_eq!(errno, wanted, "outcome");
                let id = &self.ids[n];
                assert_eq!(self.site.volfs.value(format!("volumes/{id}/status")), status);
                match self.op {
                    Attach => self.site.cloud.pull_device(id).unwrap(),
                    MoveMarks => self.site.cloud.set_tag(id, MARK, &mark).unwrap(),
                    _ => {}
                }
                self.site.volfs.write(format!("volumes/{id}/control"), "reconcile");
                self.finishes(n, before, 1);
            }
        }
        self.shown(n, &mark);
        self.orphans();
    }

    /// Gives the command until the cloud is heard; the errno.
    fn heard(&self, n: usize) -> i32 {
        (0..AGAIN).map(|_| self.give(n)).find(|errno| *errno != EHOSTUNREACH).unwrap_or(EHOSTUNREACH)
    }

    /// The same command again brings it about.
    fn finishes(&self, n: usize, before: usize, effects: usize) {
        let errno = self.heard(n);
        assert_eq!(errno, 0, "the same again: {}", self.error(n));
        assert!(self.reached(n), "the same again succeeds, and it is not so");
        assert_eq!(self.effects(n) - before, effects, "effects in the end");
    }
}

/// Runs the matrix with a lane for each operation, side by side; all cells, then all that failed.
fn matrix(own: bool, wanted: impl Fn(&str, Class) -> bool) {
    let faults: Vec<_> = faults().into_iter().filter(|(name, class, _)| wanted(name, *class)).collect();
    let lane = |op: Op| {
        let lane = Lane::new(op, own, faults.len(), &[]);
        let mut failed = Vec::new();
        for (n, (name, class, way)) in faults.iter().enumerate() {
            if let Err(panic) = catch_unwind(AssertUnwindSafe(|| lane.cell(n, *class, way))) {
                lane.site.cloud.clear_faults();
                lane.site.cloud.release_jobs();
                let words = words(&*panic);
                failed.push(format!("{op:?} × {name}: {words}\n    {}", lane.error(n).trim_end()));
            }
        }
        failed
    };
    let failed: Vec<String> = std::thread::scope(|scope| {
        let lane = &lane;
        let lanes: Vec<_> = OPS.into_iter().map(|op| scope.spawn(move || lane(op))).collect();
        lanes.into_iter().flat_map(|l| l.join().unwrap()).collect()
    });
    assert!(failed.is_empty(), "{} of {} cells:\n{}", failed.len(), faults.len() * OPS.len(), failed.join("\n"));
}

#[test]
fn each_fault_of_each_operation_ends_as_the_table_says_with_one_effect_or_none() {
    matrix(true, |_, _| true);
}

#[test]
fn the_same_where_the_cloud_takes_no_job_ids_of_ours() {
    let needs_ids = |name: &str| {
        name.contains("after") || name.contains("502") || name == "truncated" || name == "garbage" || name == "503"
    };
    matrix(false, |name, class| class == Unacted || needs_ids(name) || name.starts_with("server restarts"));
}
