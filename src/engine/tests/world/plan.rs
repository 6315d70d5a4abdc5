//! A schedule: the steps that a seed gives, and how a failing one is made small.

use super::dice::Dice;
use super::{Fault, Point};

/// A command, on a volume or on its job.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Cmd {
    Attach,
    AttachThere,
    /// At that device id, on the other VM.
    AttachAt(u32),
    Detach,
    DetachThere,
    DetachForce,
    Resize(u64),
    Delete,
    Release,
    Claim,
    Move,
    Create,
    Reconcile,
    AttachAll,
    DetachAll,
    Destroy,
}

/// What another hand does in the cloud.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Hand {
    Detach,
    AttachHere,
    AttachThere,
    Delete,
    /// Another record's mark is put on it.
    TakeMark,
    /// Its mark is taken off.
    Unmark,
    /// Our own mark is put back.
    GiveBack,
    /// Another host that has imported it too sets its mark, if there is none.
    Rival,
}

/// One step of a schedule. Volumes are numbers: 0 and 1 are ours from the start, 2 carries another
/// record's mark, 3 none, the rest are made on the way.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Step {
    Do(usize, Cmd),
    Arm(Point, Fault),
    Hand(usize, Hand),
    /// The kernel loses a volume's device.
    Pull(usize),
    /// Devices neither come nor go from now on, or do again.
    Lazy(bool),
    /// The kernel's events are lost from now on, or not.
    Muted(bool),
    /// Somebody opens a volume's device, or lets it go.
    Use(usize),
    /// The newest operation in flight is abandoned, or asked to stop.
    Abandon,
    Cancel,
    Kill,
    Reboot,
    /// The daemon ends, an import puts that volume into our record, and the next daemon starts.
    Import(usize),
    /// Milliseconds pass.
    Pass(u64),
}

pub fn plan(seed: u64) -> Vec<Step> {
    let mut dice = Dice::new(seed ^ 0x5DEE_CE66);
    let length = 5 + dice.roll(16);
    let mut steps = Vec::new();
    for _ in 0..length {
        steps.push(step(&mut dice));
        if dice.roll(3) > 0 {
            steps.push(Step::Pass(time(&mut dice)));
        }
    }
    steps
}

fn time(dice: &mut Dice) -> u64 {
    dice.of(&[1, 5, 30, 300, 1200, 1500, 4000, 7000, 30_000, 70_000])
}

fn step(dice: &mut Dice) -> Step {
    let ours = usize::try_from(dice.roll(2)).unwrap();
    let any = usize::try_from(dice.roll(5)).unwrap();
    // Now and then about what was imported, or is to be.
    let ours = if dice.roll(5) == 0 { 3 } else { ours };
    match dice.roll(100) {
        0..45 => Step::Do(if dice.roll(6) == 0 { any } else { ours }, cmd(dice)),
        45..72 => Step::Arm(point(dice), fault(dice)),
        72..80 => Step::Hand(ours, hand(dice)),
        80..83 => Step::Pull(ours),
        83..85 => Step::Lazy(dice.roll(2) == 0),
        85..87 => Step::Muted(dice.roll(2) == 0),
        87..89 => Step::Use(ours),
        89..93 => Step::Abandon,
        93..95 => Step::Cancel,
        95..97 => Step::Kill,
        97 | 98 => Step::Import(2 + usize::try_from(dice.roll(3)).unwrap()),
        _ => Step::Reboot,
    }
}

fn cmd(dice: &mut Dice) -> Cmd {
    match dice.roll(40) {
        0..10 => Cmd::Attach,
        10..20 => Cmd::Detach,
        20..23 => Cmd::AttachThere,
        23..26 => Cmd::DetachThere,
        26 => Cmd::AttachAt(dice.of(&[0, 1, 2])),
        27 => Cmd::DetachForce,
        28 => Cmd::Resize(1 + dice.roll(3)),
        29..31 => Cmd::Delete,
        31 => Cmd::Release,
        32 => Cmd::Claim,
        33..35 => Cmd::Move,
        35 => Cmd::Create,
        36 => Cmd::Reconcile,
        37 => Cmd::AttachAll,
        38 => Cmd::DetachAll,
        _ => Cmd::Destroy,
    }
}

fn point(dice: &mut Dice) -> Point {
    use Point::*;
    let changing = [Attach, Detach, Attach, Detach, Delete, Create, Resize, Mark];
    let looking = [Find, Find, Survey, Vm, Running, FindCreated];
    match dice.roll(10) {
        0..6 => dice.of(&changing),
        6..8 => dice.of(&looking),
        _ => dice.of(&[Begin, End, End, Other]),
    }
}

fn fault(dice: &mut Dice) -> Fault {
    let ms = dice.of(&[50, 800, 2500, 9000, 40_000]);
    match dice.roll(16) {
        0 => Fault::Refuse,
        1 => Fault::Busy,
        2 => Fault::Unreachable,
        3 => Fault::Lost,
        4 => Fault::LostDone,
        5..8 => Fault::Straggle(ms),
        8..10 => Fault::LateAnswer(ms),
        10 => Fault::JobFails(ms),
        11 => Fault::KillBefore,
        12..14 => Fault::KillAfter,
        _ => Fault::KillStraggle(ms),
    }
}

fn hand(dice: &mut Dice) -> Hand {
    use Hand::*;
    dice.of(&[Detach, Detach, AttachHere, AttachThere, AttachThere, Delete, TakeMark, Unmark, GiveBack, Rival])
}

/// The smallest part of a schedule that still fails, found by leaving out ever shorter runs of steps.
pub fn shrink(mut steps: Vec<Step>, fails: impl Fn(&[Step]) -> bool) -> Vec<Step> {
    let mut run = steps.len().div_ceil(2);
    while run > 0 {
        let mut from = 0;
        while from < steps.len() {
            let mut fewer = steps.clone();
            fewer.drain(from..(from + run).min(fewer.len()));
            if fails(&fewer) {
                steps = fewer;
            } else {
                from += run;
            }
        }
        run = if run == 1 { 0 } else { run.div_ceil(2) };
    }
    steps
}
