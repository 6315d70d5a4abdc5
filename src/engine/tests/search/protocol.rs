//! What can happen next to a volume, and what must hold of it.

use super::state::{Dev, End, Finds, HOST, Job, Map, OPS, OURS, Op, Run, SIZE, Spot, Step, THEIRS, V, VOLUME};
use crate::cloud::{CloudError, Refusal};
use crate::engine::admission::{Situation, Verdict, admit};
use crate::engine::operation::may_change;
use crate::engine::reconcile::{CloudView, Rules, settle};
use crate::engine::recovery::has_begun;
use crate::engine::tests::fakes::{disk_name, job_id, root};
use crate::model::{OpId, Status, edge_is_documented};

/// What kind of thing happened.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// Somebody asks for something.
    Command,
    /// The engine, the cloud or the kernel goes on.
    On,
    /// An answer is lost, or the cloud's job fails.
    Fault,
    Abandon,
    Hand,
    Crash,
}

impl Kind {
    /// What happens by itself when nobody asks, interferes or breaks.
    pub fn quiet(self) -> bool {
        self == Kind::On
    }
}

/// All that can come next.
pub fn successors(v: V, finds: &mut Finds) -> Vec<(Kind, V)> {
    let mut next = Vec::new();
    commands(v, finds, &mut next);
    if let Some(run) = v.mem.run {
        operation(v, run, finds, &mut next);
    } else {
        looks(v, finds, &mut next);
    }
    cloud(v, finds, &mut next);
    kernel(v, &mut next);
    hands(v, &mut next);
    // L9: what is shown moves along the documented graph only; a start shows anew.
    for (kind, to) in &next {
        let edge = (v.shows(), to.shows());
        if edge.0 != edge.1 && !edge_is_documented(edge.0, edge.1) {
            finds.wrong.push(format!("l9: {kind:?} makes {} of {}: {to:?}", edge.1, edge.0));
        }
    }
    next.push((Kind::Crash, crash(v)));
    next
}

fn commands(v: V, finds: &mut Finds, next: &mut Vec<(Kind, V)>) {
    let (job, disk) = (job_id("j"), disk_name("d"));
    let owner = if v.mem.owned { OURS } else { THEIRS }.to_string();
    for op in OPS {
        let running = v.mem.run.map(|run| run.op.action());
        let situation = Situation {
            volume: VOLUME,
            status: v.mem.base,
            vm: v.mem.vm.vm(),
            size: SIZE,
            job: &job,
            disk: &disk,
            held: false,
            running: running.as_ref().map(|action| (OpId(1), action, "")),
            mark: OURS,
            owner: &owner,
            why: "",
            host: HOST,
            provider: "searched",
            snapshots: false,
            can_force: true,
            size_step: 1,
        };
        match admit(&situation, &op.action(), &root()) {
            Verdict::Start => {
                finds.reach("start");
                if v.mem.run.is_some() {
                    finds.wrong.push(format!("{op:?} starts beside another operation: {v:?}"));
                }
                let mut to = v;
                to.mem.run = Some(Run { op, step: Step::Journal, recovering: false });
                (to.effects, to.touched, to.proved) = (0, false, false);
                next.push((Kind::Command, to));
            }
            Verdict::Join(_) => {
                finds.reach("join");
                if v.mem.run.map(|run| run.op) != Some(op) {
                    finds.wrong.push(format!("{op:?} joins another operation: {v:?}"));
                }
            }
            // Said without a call: it must be what was last proved, or observed since.
            Verdict::AlreadyDone => {
                finds.reach("already");
                let is = v.mem.vm == op.to;
                if v.mem.run.is_some() || (op.attach && !is) || (!op.attach && is && v.mem.base != Status::Detached) {
                    finds.wrong.push(format!("{op:?} is said to be done: {v:?}"));
                }
            }
            Verdict::Deny(_) => finds.reach("deny"),
            // Looks are transitions of their own.
            Verdict::Reconcile => finds.reach("ask"),
        }
    }
}

fn at(v: V, step: Step) -> V {
    let mut to = v;
    if let Some(run) = &mut to.mem.run {
        run.step = step;
    }
    to
}

fn operation(v: V, run: Run, finds: &mut Finds, next: &mut Vec<(Kind, V)>) {
    let mut go = |step| next.push((Kind::On, at(v, step)));
    let op = run.op;
    match run.step {
        Step::Journal => {
            let mut to = at(v, Step::Look);
            to.rec.op = Some(op);
            next.push((Kind::On, to));
            return;
        }
        Step::Look => match may_change(Some(v.seen()), OURS) {
            Err(CloudError::Refused { why: Refusal::Passing, .. }) => {}
            Err(_) => go(Step::End(failed(run))),
            Ok(_) => go(after_look(v, run)),
        },
        Step::Call => match may_change(Some(v.seen()), OURS) {
            Err(CloudError::Refused { why: Refusal::Passing, .. }) => {}
            Err(_) => go(Step::End(failed(run))),
            Ok(_) if !op.attach && v.at != op.to => go(Step::Prove),
            Ok(_) if op.attach && v.at == op.to => go(Step::Prove),
            Ok(_) if op.attach && v.at != Spot::Free => go(Step::End(failed(run))),
            Ok(_) => {
                finds.reach("call");
                let wrong = |words: &str| format!("{words}: {op:?} is called: {v:?}");
                if !v.ours {
                    finds.wrong.push(wrong("s8: it does not carry our mark"));
                }
                if v.job.is_some() {
                    finds.wrong.push(wrong("s9: a job is pending"));
                }
                if run.recovering {
                    finds.wrong.push(wrong("r10: by recovery"));
                }
                if v.rec.op != Some(op) {
                    finds.wrong.push(wrong("s7: it is not in the journal"));
                }
                let mut to = at(v, Step::Wait);
                to.job = Some(Job { op, live: true });
                next.push((Kind::On, to));
            }
        },
        // The cloud's part.
        Step::Wait => {
            if v.job.is_none() {
                go(match op.attach == (v.at == op.to) {
                    true => Step::Prove,
                    // Refused, or another hand was quicker.
                    false if v.effects == 0 => Step::End(End::Failed),
                    false => Step::Prove,
                });
            }
        }
        // `look_after`: not before the job is final.
        Step::Unclear if v.job.is_some() => {}
        Step::Unclear => go(match (op.attach, v.at) {
            (true, at) if at == op.to => Step::Prove,
            (true, Spot::Free) => Step::End(End::Failed),
            (false, at) if at != op.to => Step::Prove,
            _ => Step::End(End::Ambiguous),
        }),
        Step::Prove if !v.ours => go(Step::End(End::Ambiguous)),
        Step::Prove => match (op.attach, op.to) {
            (true, Spot::Here) if v.dev == Dev::None && v.at == Spot::Here => {}
            (true, to) if v.at != to => go(Step::End(End::Ambiguous)),
            (true, _) => go(Step::End(End::Done)),
            (false, Spot::Here) if v.dev != Dev::None && v.at != Spot::Here => {}
            (false, to) if v.at == to => go(Step::End(End::Ambiguous)),
            (false, _) => go(Step::End(End::Done)),
        },
        Step::Recover if v.job.is_some() => {}
        Step::Recover => match has_begun(&op.action(), Some(&v.seen()), OURS, HOST) {
            false => go(Step::End(End::Interrupted)),
            // The cloud has it no more, and its device is waited for.
            true if !op.attach && op.to == Spot::Here && v.dev != Dev::None => {}
            true => go(Step::Look),
        },
        Step::End(end) => {
            next.push((Kind::On, ended(v, op, end, finds)));
            return;
        }
    }
    if run.step == Step::Wait {
        next.push((Kind::Fault, at(v, Step::Unclear)));
    }
    if v.rec.op.is_some() {
        next.push((Kind::Abandon, abandoned(v)));
    }
}

/// What a clean failure is called: after a crash nobody says that nothing was changed.
fn failed(run: Run) -> End {
    if run.recovering { End::Ambiguous } else { End::Failed }
}

/// `attach` and `detach` after their first look.
fn after_look(v: V, run: Run) -> Step {
    let op = run.op;
    match (op.attach, op.to) {
        (true, to) if v.at == to => Step::Prove,
        (true, _) if v.at != Spot::Free || run.recovering => Step::End(failed(run)),
        (true, _) if v.dev != Dev::None => Step::End(End::Failed),
        (true, _) => Step::Call,
        (false, Spot::Here) if v.mem.map == Map::This && v.at != Spot::Here => Step::End(failed(run)),
        (false, Spot::Here) if v.mem.map != Map::This && v.dev != Dev::None => Step::End(failed(run)),
        (false, to) if v.at != to => Step::Prove,
        (false, _) if run.recovering => Step::End(End::Ambiguous),
        (false, _) => Step::Call,
    }
}

/// Record and memory learn the end in one step; what it claims must be so.
fn ended(v: V, op: Op, end: End, finds: &mut Finds) -> V {
    let mut to = v;
    (to.rec.op, to.mem.run) = (None, None);
    let wrong = |words: &str| format!("s7: {op:?} ends {end:?}, and {words}: {v:?}");
    let pending = v.job.is_some_and(|job| job.live);
    match end {
        End::Done => {
            finds.reach("done");
            if !v.touched && (v.at == op.to) != op.attach {
                finds.wrong.push(wrong("is not"));
            }
            let elsewhere = if op.attach { op.to } else { v.at };
            let status = match (op.attach, op.to, v.at) {
                (true, Spot::Here, _) => Status::Attached,
                (true, ..) => Status::Remote,
                (false, _, Spot::Free) => Status::Detached,
                (false, ..) => Status::Unknown,
            };
            to.mem.base = status;
            to.rec.status = status;
            to.mem.vm = elsewhere;
            to.mem.owned = true;
            // The device may have gone since it was proved; it was this one.
            let map = match (status, v.dev) {
                (Status::Attached, Dev::None) => Map::Gone,
                (Status::Attached, _) => Map::This,
                _ => Map::None,
            };
            (to.mem.map, to.rec.map) = (map, map);
            to.rec.vm = if op.attach { op.to } else { Spot::Free };
            to.proved = !v.touched;
        }
        End::Failed | End::Interrupted => {
            finds.reach(if end == End::Failed { "failed" } else { "interrupted" });
            if !v.touched && v.effects > 0 {
                finds.wrong.push(wrong("it took effect"));
            }
        }
        End::Ambiguous => {
            finds.reach("ambiguous");
            (to.mem.base, to.rec.status) = (Status::Unknown, Status::Unknown);
        }
    }
    if pending {
        finds.wrong.push(wrong("the cloud still works on it"));
    }
    to
}

/// `abandon`: the record ends it, whatever the cloud still does.
fn abandoned(v: V) -> V {
    let mut to = v;
    (to.rec.op, to.mem.run) = (None, None);
    (to.mem.base, to.rec.status) = (Status::Unknown, Status::Unknown);
    if let Some(job) = &mut to.job {
        job.live = false;
    }
    to
}

/// Reconciling, while no operation is on it: the cloud and the kernel together, or the kernel alone
/// when a device that was mapped has gone.
fn looks(v: V, finds: &mut Finds, next: &mut Vec<(Kind, V)>) {
    let rules = Rules { host: HOST, exact_size: true };
    let seen = v.seen();
    let views = [CloudView::Seen(&seen), CloudView::Unseen];
    for view in views {
        let full = matches!(view, CloudView::Seen(_));
        if !full && v.mem.map != Map::Gone {
            continue;
        }
        let finding = settle(&v.recorded(), &view, &v.disks(), rules);
        if finding.device.is_some() && (v.dev == Dev::None || (full && (v.at != Spot::Here || !v.ours))) {
            finds.wrong.push(format!("s1: a look gives a device: {finding:?} {v:?}"));
        }
        let mut to = v;
        let (status, was) = (finding.status, v.rec.status);
        to.mem.base = status;
        to.mem.vm = Spot::of(finding.vm);
        to.mem.map = if finding.device.is_some() { Map::This } else { Map::None };
        if full {
            to.mem.owned = v.ours;
        }
        match (to.mem.map, status) {
            (Map::This, _) if v.mem.map != Map::This || was != Status::Attached => {
                (to.rec.map, to.rec.vm) = (Map::This, Spot::Here);
            }
            (_, Status::Remote) if to.mem.vm != v.mem.vm || was != Status::Remote => {
                (to.rec.map, to.rec.vm) = (Map::None, Spot::There);
            }
            (Map::None, Status::Detached | Status::Missing | Status::Lost) if status != was => {
                (to.rec.map, to.rec.vm) = (Map::None, Spot::Free);
            }
            _ => {}
        }
        if status != was && (full || status != Status::Unknown) {
            to.rec.status = status;
        }
        // L2: a second look at the same finds the same, and no drift.
        let again = settle(&to.recorded(), &view, &to.disks(), rules);
        if (again.status, again.vm, &again.device) != (finding.status, finding.vm, &finding.device) || again.drift {
            finds.wrong.push(format!("l2: {finding:?}, and again {again:?}: {v:?}"));
        }
        if to != v {
            next.push((Kind::On, to));
        }
    }
}

/// The cloud's job acts, with or without its caller, or fails.
fn cloud(v: V, finds: &mut Finds, next: &mut Vec<(Kind, V)>) {
    let Some(Job { op, live }) = v.job else { return };
    let mut fails = v;
    fails.job = None;
    next.push((Kind::Fault, fails));
    let mut to = fails;
    let acts = match op.attach {
        true => v.at == Spot::Free,
        false => v.at == op.to,
    };
    if acts {
        to.moved(if op.attach { op.to } else { Spot::Free });
        if v.proved {
            finds.wrong.push(format!("s9: a late {op:?} changes what a newer operation has proved: {v:?}"));
        }
        if live {
            to.effects += 1;
            if to.effects > 1 {
                finds.wrong.push(format!("s7: {op:?} takes effect twice: {v:?}"));
            }
        } else {
            // Of an operation that was abandoned: to the present one it is another hand's.
            to.touched = true;
        }
    }
    next.push((Kind::On, to));
}

/// The kernel's device follows.
fn kernel(v: V, next: &mut Vec<(Kind, V)>) {
    let mut to = v;
    match (v.dev, v.at) {
        (Dev::Stale, _) => to.unplugged(),
        (Dev::None, Spot::Here) => to.dev = Dev::There,
        _ => return,
    }
    next.push((Kind::On, to));
}

/// Another hand in the cloud: where no job is in its way, or at the tag.
fn hands(v: V, next: &mut Vec<(Kind, V)>) {
    let mut all = Vec::new();
    if v.ours {
        all.push(V { ours: false, ..v });
    }
    if v.job.is_none() {
        for spot in [Spot::Free, Spot::Here, Spot::There] {
            // One step: what is attached is detached first.
            if spot != v.at && (spot == Spot::Free || v.at == Spot::Free) {
                let mut to = v;
                to.moved(spot);
                all.push(to);
            }
        }
    }
    for mut to in all {
        (to.touched, to.proved) = (true, false);
        next.push((Kind::Hand, to));
    }
}

/// The daemon dies and starts: it has what the record has, believed as far as the kernel confirms it.
fn crash(v: V) -> V {
    let mut to = v;
    let verified = v.rec.status == Status::Attached && v.rec.map == Map::This && v.dev != Dev::None;
    to.mem.base = if verified { Status::Attached } else { Status::Unknown };
    to.mem.map = if verified { Map::This } else { Map::None };
    to.mem.vm = v.rec.vm;
    to.mem.owned = true;
    to.mem.run = v.rec.op.map(|op| Run { op, step: Step::Recover, recovering: true });
    to
}
