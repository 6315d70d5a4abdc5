//! The suite: many schedules, the regressions, and proofs that a seed is one schedule.

use std::collections::{BTreeMap, HashMap};
use std::sync::atomic::{AtomicU64, Ordering};

use super::plan::{Step, plan, shrink};
use super::play::{Played, play};
use super::regressions;
use crate::model::edge_is_documented;
use crate::model::{Outcome, Status, Verb};

fn number(name: &str, otherwise: u64) -> u64 {
    std::env::var(name).ok().map_or(otherwise, |text| text.parse().unwrap_or_else(|_| panic!("{name}={text}")))
}

/// A violation without its ids and numbers: a smaller schedule must break the same.
fn kind(violation: &str) -> String {
    let word = |w: &str| if w.chars().any(|c| c.is_ascii_digit()) { "#".into() } else { w.to_owned() };
    violation.split(' ').map(word).collect::<Vec<String>>().join(" ")
}

fn explain(seed: u64, steps: &[Step], played: &Played) -> String {
    let wanted = played.violations.first().map(|v| kind(v));
    let same = |fewer: &[Step]| play(seed, fewer, false).violations.first().map(|v| kind(v)) == wanted;
    let small = shrink(steps.to_vec(), same);
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
    /// What was broken, and the seeds that did.
    broken: BTreeMap<String, Vec<u64>>,
}

impl Sums {
    fn add(&mut self, seed: u64, played: &Played) {
        let broken = played.violations.first().map(|v| (kind(v), vec![seed]));
        let (edges, ends) = (played.edges.clone(), played.ends.clone());
        self.join(Sums { schedules: 1, lives: played.lives, edges, ends, broken: broken.into_iter().collect() });
    }

    fn join(&mut self, other: Sums) {
        self.schedules += other.schedules;
        self.lives += other.lives;
        for (edge, n) in other.edges {
            *self.edges.entry(edge).or_default() += n;
        }
        for (end, n) in other.ends {
            *self.ends.entry(end).or_default() += n;
        }
        for (kind, seeds) in other.broken {
            let known = self.broken.entry(kind).or_default();
            known.extend(seeds);
            known.sort_unstable();
        }
    }
}

/// Plays so many seeds from the first on, on every core.
fn run(first: u64, count: u64) -> Sums {
    let next = AtomicU64::new(0);
    let work = || {
        let mut sums = Sums::default();
        loop {
            let n = next.fetch_add(1, Ordering::Relaxed);
            // Enough is known then.
            if n >= count || sums.broken.values().map(Vec::len).sum::<usize>() > 500 {
                return sums;
            }
            let seed = first.wrapping_add(n);
            sums.add(seed, &play(seed, &plan(seed), false));
        }
    };
    let threads = std::thread::available_parallelism().map_or(1, usize::from);
    std::thread::scope(|scope| {
        let all: Vec<_> = (0..threads).map(|_| scope.spawn(work)).collect();
        let mut total = Sums::default();
        for one in all {
            total.join(one.join().unwrap());
        }
        total
    })
}

#[test]
fn simulated_schedules_keep_every_promise_and_come_to_rest_with_the_truth() {
    let (first, count) = (number("VOLFS_SEED", 1), number("VOLFS_SCHEDULES", 50_000));
    let began = std::time::Instant::now();
    let sums = run(first, count);
    if !sums.broken.is_empty() {
        // One of each kind is told in full: the first, made small.
        let tell = |seed: &u64| {
            let steps = plan(*seed);
            explain(*seed, &steps, &play(*seed, &steps, false))
        };
        let told: Vec<String> = sums.broken.values().filter_map(|seeds| seeds.first()).map(tell).collect();
        let seeds: Vec<String> =
            sums.broken.iter().map(|(kind, seeds)| format!("{} times {kind}: {seeds:?}", seeds.len())).collect();
        panic!("of {} schedules these broke:\n{}\n\n{}", sums.schedules, seeds.join("\n"), told.join("\n\n"));
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
    for verb in [Verb::Attach, Verb::Detach, Verb::Create, Verb::Delete, Verb::Move, Verb::Claim] {
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
    let mut broken = Vec::new();
    for (what, seed, steps) in regressions::ALL {
        let played = play(*seed, steps, true);
        if !played.violations.is_empty() {
            broken.push(format!("{what}: {:#?}\n{}", played.violations, played.trace.join("\n")));
        }
    }
    assert!(broken.is_empty(), "{}", broken.join("\n\n"));
}
