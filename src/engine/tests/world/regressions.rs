//! Schedules that once failed, made small, each with what it has found.

use super::plan::{Cmd::*, Hand, Step, Step::*};
use super::{Fault::*, Point};

/// What a regression is about, its seed (the ids, the latencies, the provider's kind) and its steps.
pub type Regression = (&'static str, u64, &'static [Step]);

pub const ALL: &[Regression] = &[
    (
        "an attach without a clear answer was called failed while the cloud's job still ran",
        12,
        &[Arm(Point::Attach, Straggle(800)), Step::Hand(0, Hand::Detach), Do(0, AttachAt(0)), Pass(1500)],
    ),
    (
        "the look before an attach to another VM was as old as the answer about that VM was late",
        25,
        &[Arm(Point::Vm, Straggle(40000)), Do(1, AttachThere), Pass(7000)],
    ),
    (
        "an attach that was cancelled after the cloud had done it was called cancelled, nothing changed",
        35,
        &[Arm(Point::Attach, LateAnswer(2500)), Do(0, Attach), Pass(300), Step::Cancel, Pass(7000)],
    ),
    (
        "a cancel during recovery made interrupted, nothing changed, of an attach that was done",
        99,
        &[Do(0, Attach), Pass(1500), Kill, Step::Cancel],
    ),
    (
        "a move without a clear answer was called failed while the cloud's job still ran, and came after its end",
        109,
        &[Arm(Point::Mark, Straggle(2500)), Do(0, Move), Pass(30)],
    ),
    (
        "a move's mark came while its end was on the way to the record",
        876,
        &[Arm(Point::End, Straggle(40000)), Arm(Point::Mark, Straggle(2500)), Do(0, Move), Pass(30)],
    ),
    (
        "a passing refusal was retried after the operation had been abandoned",
        2186,
        &[Do(0, Attach), Pass(7000), Arm(Point::Detach, Busy), Do(0, Detach), Pass(70), Step::Abandon, Pass(1500)],
    ),
    (
        "an answer that came while an abandon failed at the record was dropped, and the operation never ended",
        350,
        &[
            Arm(Point::Attach, LateAnswer(1200)),
            Do(0, Attach),
            Pass(30),
            Step::Hand(1, Hand::AttachThere),
            Arm(Point::Other, LateAnswer(4000)),
            Do(1, Reconcile),
            Pass(300),
            Arm(Point::End, Refuse),
            Abandon,
            Pass(7000),
        ],
    ),
    (
        "recovery attached again what another hand had detached between its two looks",
        115_351,
        &[
            Arm(Point::Attach, KillStraggle(800)),
            Do(0, Attach),
            Pass(7000),
            Arm(Point::Find, Straggle(40000)),
            Pass(1),
            Step::Hand(0, Hand::Detach),
        ],
    ),
    (
        "recovery went on with the mark of a move that had been abandoned",
        190_103,
        &[
            Arm(Point::Running, LateAnswer(50)),
            Arm(Point::Find, KillStraggle(800)),
            Do(1, Move),
            Step::Hand(1, Hand::Unmark),
            Pass(30),
            Abandon,
            Pass(7000),
        ],
    ),
    (
        "an abandon came before the journal had its operation, and its end was refused",
        150_270,
        &[
            Step::Hand(0, Hand::AttachThere),
            Arm(Point::Begin, Unreachable),
            Kill,
            Do(0, DetachAll),
            Abandon,
            Pass(7000),
        ],
    ),
    (
        "two looks made a volume missing that were not 10 s apart, because the first one was answered late",
        10_808,
        &[Step::Hand(1, Hand::Delete), Pass(70000), Do(1, Attach)],
    ),
    (
        "after a destroy that failed its volumes stayed unknown until the next round",
        275_164,
        &[
            Do(0, Attach),
            Pass(30000),
            Do(0, Destroy),
            Pass(1),
            Step::Hand(0, Hand::Detach),
            Step::Hand(0, Hand::AttachThere),
            Pass(7000),
        ],
    ),
    (
        "a delete was done while its own job was pending: another hand had deleted the volume meanwhile",
        3_517_925,
        &[
            Do(0, Attach),
            Pass(70000),
            Pull(0),
            Arm(Point::Delete, Straggle(2500)),
            Pass(4000),
            Do(1, Delete),
            Pass(5),
            Step::Hand(1, Hand::Delete),
            Do(0, Move),
            Pass(30),
        ],
    ),
    (
        "an end that the record had refused left its operation open beside the next one on that volume",
        7,
        &[
            Arm(Point::Attach, Refuse),
            Arm(Point::End, Refuse),
            Do(0, Attach),
            Pass(300),
            Arm(Point::Attach, LateAnswer(9000)),
            Do(0, Attach),
            Pass(300),
            Kill,
            Pass(5),
        ],
    ),
    (
        "an operation whose end the record had not taken was settled beside the later one on its volume",
        13667,
        &[
            Do(1, Attach),
            Pass(300),
            Arm(Point::Attach, KillBefore),
            Arm(Point::End, Unreachable),
            Do(0, Move),
            Arm(Point::Find, JobFails(50)),
            Pass(30),
            Do(0, Attach),
            Pass(30000),
            Pass(1500),
        ],
    ),
    (
        "what a crash left was to end while an abandon was at the record, which then refused it: nobody ended it",
        486_174,
        &[
            Do(1, Attach),
            Pass(7000),
            Arm(Point::Find, KillAfter),
            Arm(Point::End, LateAnswer(50)),
            Arm(Point::End, JobFails(9000)),
            Do(3, Destroy),
            Pass(30000),
            Step::Abandon,
            Pass(30000),
        ],
    ),
];
