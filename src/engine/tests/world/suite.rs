//! The suite: many schedules, the regressions, and proofs that a seed is one schedule.

use std::collections::{BTreeMap, HashMap};
use std::sync::atomic::{AtomicU64, Ordering};

use super::plan::{Step, plan, shrink};
use super::play::{Played, play};
use super::{edge_is_documented, regressions};
use crate::model::{Outcome, Status, Verb};

fn number(name: &str, otherwise: u64) -> u64 {
    std::env::var(name).ok().map_or(otherwise, |text| text.parse().unwrap_or_else(|_| panic!("{name}={text}")))
}

/// The first rule that a violation speaks of: a smaller schedule must break the same.
fn rule(violation: &str) -> &str {
    violation.rsplit(": ").next().unwrap_or(violation).split(' ').next().unwrap_or_default()
}

fn explain(seed: u64, steps: &[Step], played: &Played) -> String {
    let wanted = played.violations.first().map(|v| rule(v).to_owned());
    let small = shrink(steps.to_vec(), |fewer| {
        play(seed, fewer, false).violations.first().map(|v| rule(v).to_owned()) == wanted
    });
    let traced = play(seed, &small, true);
    format!(
        "seed {seed}: {:#?}\nsmallest schedule (for regressions.rs):\n    (\"\", {seed}, &{small:?}),\n{:#?}\n{}",
        played.violations,
        traced.violations,
        traced.trace.join("\n")
    )
}

#[derive(Default)]
struct Sums {
    schedules: u64,
    lives: u64,
    edges: BTreeMap<(Status, Status), u64>,
    ends: HashMap<(Verb, Outcome), u64>,
    failed: Option<u64>,
}

impl Sums {
    fn add(&mut self, played: &Played) {
        self.schedules += 1;
        self.lives += played.lives;
        for (edge, n) in &played.edges {
            *self.edges.entry(*edge).or_default() += n;
        }
        for (end, n) in &played.ends {
            *self.ends.entry(*end).or_default() += n;
        }
    }
}

/// Plays so many seeds from the first on, on every core; stops at the first that fails.
fn run(first: u64, count: u64) -> Sums {
    let next = AtomicU64::new(0);
    let stop = AtomicU64::new(u64::MAX);
    let work = || {
        let mut sums = Sums::default();
        loop {
            let n = next.fetch_add(1, Ordering::Relaxed);
            if n >= count || n > stop.load(Ordering::Relaxed) {
                return sums;
            }
            let seed = first.wrapping_add(n);
            let played = play(seed, &plan(seed), false);
            sums.add(&played);
            if !played.violations.is_empty() {
                sums.failed = Some(seed);
                stop.fetch_min(n, Ordering::Relaxed);
                return sums;
            }
        }
    };
    let threads = std::thread::available_parallelism().map_or(1, usize::from);
    std::thread::scope(|scope| {
        let all: Vec<_> = (0..threads).map(|_| scope.spawn(work)).collect();
        let mut total = Sums::default();
        for one in all {
            let one = one.join().unwrap();
            total.schedules += one.schedules;
            total.lives += one.lives;
            total.failed = total.failed.into_iter().chain(one.failed).min();
            for (edge, n) in one.edges {
                *total.edges.entry(edge).or_default() += n;
            }
            for (end, n) in one.ends {
                *total.ends.entry(end).or_default() += n;
            }
        }
        total
    })
}

#[test]
fn simulated_schedules_keep_every_promise_and_come_to_rest_with_the_truth() {
    let (first, count) = (number("VOLFS_SEED", 1), number("VOLFS_SCHEDULES", 50_000));
    let began = std::time::Instant::now();
    let sums = run(first, count);
    if let Some(seed) = sums.failed {
        let steps = plan(seed);
        panic!("{}", explain(seed, &steps, &play(seed, &steps, false)));
    }
    let ended: u64 = sums.ends.values().sum();
    println!(
        "{} schedules, {} lives, {ended} operations in {:.1} s",
        sums.schedules,
        sums.lives,
        began.elapsed().as_secs_f64()
    );
    // L9: no status ever moved but along the graph.
    let undocumented: Vec<_> = sums.edges.iter().filter(|((from, to), _)| !edge_is_documented(*from, *to)).collect();
    assert_eq!(undocumented, Vec::new(), "l9: edges that the contract does not have");
    if count < 5000 {
        return;
    }
    // The schedules are worth something only as long as they reach all this.
    for verb in [Verb::Attach, Verb::Detach, Verb::Create, Verb::Delete, Verb::Move] {
        for outcome in [Outcome::Done, Outcome::Failed, Outcome::Ambiguous, Outcome::Interrupted, Outcome::Abandoned] {
            let reached = sums.ends.get(&(verb, outcome)).copied().unwrap_or(0);
            assert!(reached >= count / 50_000, "{verb} {}: {reached} of {:?}", outcome.as_str(), sums.ends);
        }
    }
    assert!(sums.lives > sums.schedules * 5 / 4, "{} lives", sums.lives);
}

#[test]
fn a_seed_is_one_schedule() {
    for seed in 1..=200 {
        let steps = plan(seed);
        let (one, two) = (play(seed, &steps, true), play(seed, &steps, true));
        let differs = one.trace.iter().zip(&two.trace).position(|(a, b)| a != b);
        assert_eq!(differs, None, "seed {seed}: {:?}", differs.map(|n| (&one.trace[n], &two.trace[n])));
        assert_eq!(one.print, two.print, "seed {seed}");
    }
}

#[test]
fn what_once_failed_in_a_simulated_world_holds() {
    for (what, seed, steps) in regressions::ALL {
        let played = play(*seed, steps, true);
        assert!(played.violations.is_empty(), "{what}: {:#?}\n{}", played.violations, played.trace.join("\n"));
    }
}
