//! The protocol of attach and detach, searched exhaustively: every state that commands, crashes,
//! other hands, lost and late answers can bring two volumes and two VMs to, within stated bounds.
//!
//! A state is what the cloud, the kernel, the record and the engine's memory hold of a volume, and
//! the step that its operation is at. The decisions are the engine's own pure functions
//! ([`admit`](crate::engine::admission::admit), [`settle`](crate::engine::reconcile::settle),
//! [`may_change`](crate::engine::operation::may_change), [`has_begun`](crate::engine::recovery::has_begun));
//! the steps between them are those of `volume.rs`, `detach.rs` and `recovery.rs`, one a transition,
//! so that anything can come between two of them. Nothing that the engine does reads two volumes, so
//! a volume's transitions are found once, and the two are combined.
//!
//! | bound | |
//! |---|---|
//! | volumes, VMs | 2, 2 (this host and another) |
//! | crashes | 2, each of both volumes at once |
//! | other hands | 2: detach, attach here or there, take the mark |
//! | abandoned operations | 1 |
//! | lost answers, commands, looks | as many as there are |

mod looks;
mod protocol;
mod state;

use std::collections::{HashMap, VecDeque};

use protocol::{Kind, successors};
use state::{Finds, V};

const CRASHES: u8 = 2;
const HANDS: u8 = 2;
const ABANDONS: u8 = 1;
/// What is left of the bounds, as one number.
const BUDGETS: usize = (CRASHES as usize + 1) * (HANDS as usize + 1) * (ABANDONS as usize + 1);

/// States of one volume with no bound on what happens to it, and of two within the bounds. They are
/// here so that a search that has become smaller is noticed: a change that is meant changes them.
const ONE: usize = 4_879;
const TWO: usize = 7_024_316;

/// A volume's states, each with what follows.
struct Graph {
    states: Vec<V>,
    next: Vec<Vec<(Kind, u32)>>,
    from: Vec<Option<(u32, Kind)>>,
    finds: Finds,
}

impl Graph {
    /// Everything that can become of one volume, whatever happens however often.
    fn explore() -> Self {
        let mut graph = Graph { states: Vec::new(), next: Vec::new(), from: Vec::new(), finds: Finds::default() };
        let mut known: HashMap<V, u32> = HashMap::new();
        graph.add(&mut known, V::new(), None);
        let mut at = 0;
        while at < graph.states.len() {
            let state = graph.states[at];
            let before = graph.finds.wrong.len();
            let mut next = Vec::new();
            for (kind, to) in successors(state, &mut graph.finds) {
                let from = Some((u32::try_from(at).unwrap(), kind));
                next.push((kind, graph.add(&mut known, to, from)));
            }
            if graph.finds.wrong.len() > before {
                let words = graph.finds.wrong[before].clone();
                panic!("{words}\n{}", graph.path(at));
            }
            graph.next.push(next);
            at += 1;
        }
        graph
    }

    fn add(&mut self, known: &mut HashMap<V, u32>, state: V, from: Option<(u32, Kind)>) -> u32 {
        *known.entry(state).or_insert_with(|| {
            self.states.push(state);
            self.from.push(from);
            u32::try_from(self.states.len() - 1).unwrap()
        })
    }

    /// How a state is come to: the shortest way.
    fn path(&self, to: usize) -> String {
        let mut lines = vec![format!("{:?}", self.states[to])];
        let mut at = to;
        while let Some((from, kind)) = self.from[at] {
            at = from as usize;
            lines.push(format!("-- {kind:?}"));
            lines.push(format!("{:?}", self.states[at]));
        }
        lines.reverse();
        lines.join("\n")
    }

    fn quiet(&self, state: usize) -> impl Iterator<Item = usize> {
        self.next[state].iter().filter(|(kind, _)| kind.quiet()).map(|(_, to)| *to as usize)
    }
}

fn spent(kind: Kind, left: usize) -> Option<usize> {
    let (crashes, rest) = (left / ((HANDS as usize + 1) * (ABANDONS as usize + 1)), left);
    let (hands, abandons) = (rest / (ABANDONS as usize + 1) % (HANDS as usize + 1), rest % (ABANDONS as usize + 1));
    match kind {
        Kind::Crash => (crashes > 0).then(|| left - (HANDS as usize + 1) * (ABANDONS as usize + 1)),
        Kind::Hand => (hands > 0).then(|| left - (ABANDONS as usize + 1)),
        Kind::Abandon => (abandons > 0).then(|| left - 1),
        _ => Some(left),
    }
}

/// Two volumes within the bounds: how many states there are.
fn two(graph: &Graph) -> usize {
    let n = graph.states.len();
    let size = n * n * BUDGETS;
    let mut known = vec![0u64; size.div_ceil(64)];
    let mut queue: VecDeque<usize> = VecDeque::new();
    let crash: Vec<u32> = (0..n)
        .map(|s| graph.next[s].iter().find(|(kind, _)| *kind == Kind::Crash).map(|(_, to)| *to).unwrap())
        .collect();
    let mut count = 0usize;
    let mut visit = |a: usize, b: usize, left: usize, queue: &mut VecDeque<usize>| {
        // Neither volume is the first.
        let (a, b) = (a.min(b), a.max(b));
        let place = (a * n + b) * BUDGETS + left;
        if known[place / 64] & (1 << (place % 64)) == 0 {
            known[place / 64] |= 1 << (place % 64);
            count += 1;
            queue.push_back(place);
        }
    };
    visit(0, 0, BUDGETS - 1, &mut queue);
    while let Some(place) = queue.pop_front() {
        let (pair, left) = (place / BUDGETS, place % BUDGETS);
        let (a, b) = (pair / n, pair % n);
        if let Some(left) = spent(Kind::Crash, left) {
            visit(crash[a] as usize, crash[b] as usize, left, &mut queue);
        }
        for (kind, to) in graph.next[a].iter().filter(|(kind, _)| *kind != Kind::Crash) {
            if let Some(left) = spent(*kind, left) {
                visit(*to as usize, b, left, &mut queue);
            }
        }
        for (kind, to) in graph.next[b].iter().filter(|(kind, _)| *kind != Kind::Crash) {
            if let Some(left) = spent(*kind, left) {
                visit(a, *to as usize, left, &mut queue);
            }
        }
    }
    count
}

#[test]
fn no_course_of_commands_crashes_and_late_answers_breaks_the_protocol_and_each_comes_to_rest() {
    let began = std::time::Instant::now();
    let graph = Graph::explore();
    let n = graph.states.len();
    // Eventual settling: left alone, every way on ends, and where it ends the truth is told.
    let mut into = vec![0usize; n];
    for state in 0..n {
        for to in graph.quiet(state) {
            into[to] += 1;
        }
    }
    let mut free: Vec<usize> = (0..n).filter(|s| into[*s] == 0).collect();
    let mut sorted = 0;
    while let Some(state) = free.pop() {
        sorted += 1;
        for to in graph.quiet(state) {
            into[to] -= 1;
            if into[to] == 0 {
                free.push(to);
            }
        }
    }
    if sorted < n {
        let state = (0..n).find(|s| into[*s] > 0).unwrap();
        panic!("{} states are on a way that never ends, or behind one\n{}", n - sorted, graph.path(state));
    }
    let mut rests = 0;
    for state in 0..n {
        if graph.quiet(state).next().is_none() {
            rests += 1;
            if let Err(why) = graph.states[state].at_rest() {
                panic!("it comes to rest, and {why}\n{}", graph.path(state));
            }
        }
    }
    let one = began.elapsed();
    let count = two(&graph);
    let edges: usize = graph.next.iter().map(Vec::len).sum();
    println!(
        "one volume: {n} states, {edges} transitions, {rests} at rest, in {:.1} s; two volumes, {CRASHES} crashes, \
         {HANDS} hands, {ABANDONS} abandoned: {count} states in {:.1} s",
        one.as_secs_f64(),
        (began.elapsed() - one).as_secs_f64()
    );
    let reached = &graph.finds.reached;
    for what in ["start", "join", "already", "deny", "ask", "call", "done", "failed", "ambiguous", "interrupted"] {
        assert!(reached.get(what).is_some_and(|n| *n > 10), "{what}: {reached:?}");
    }
    assert_eq!((n, count), (ONE, TWO), "the search is not the one that is documented");
}
