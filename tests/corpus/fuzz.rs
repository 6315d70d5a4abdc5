//! Fuzzing of the parsers: what lies in `tests/corpus/TARGET/`, as it is and then changed from a seed.
//!
//! cargo-fuzz and its like guide themselves by coverage, for which the compiler must be a nightly one;
//! here the guide is the corpus: one real example of each shape, and every input that ever failed.
//! A round takes an example, cuts, joins, repeats and replaces bytes of it, and words that the other
//! examples have. `VOLFS_FUZZ` is the number of rounds a target, `VOLFS_SEED` repeats them.

use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::path::Path;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

/// Longest that one input may take; a parser is done in microseconds, and a test machine may be busy.
const LONGEST: Duration = Duration::from_secs(2);
/// Largest input made.
const LARGEST: usize = 20_000;

struct Dice(u64);

impl Dice {
    /// splitmix64.
    fn below(&mut self, n: usize) -> usize {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        ((z ^ (z >> 31)) % n.max(1) as u64) as usize
    }

    fn part<'a>(&mut self, of: &'a [u8]) -> &'a [u8] {
        let from = self.below(of.len() + 1);
        let to = from + self.below((of.len() - from).min(64) + 1);
        &of[from..to]
    }
}

/// Bytes that parsers trip over.
const ODD: [&[u8]; 20] = [
    b"\0",
    b"\n",
    b"\r\n",
    b" ",
    b"\t",
    b"=",
    b"\"",
    b"\\",
    b"\xff",
    b"\xc3",
    b"\xe2\x80\xae",
    b"-1",
    b"0",
    b"18446744073709551616",
    b"9223372036854775807",
    b"1e400",
    b"{",
    b"[",
    b"../",
    b"null",
];

fn changed(dice: &mut Dice, corpus: &[Vec<u8>]) -> Vec<u8> {
    let mut input = corpus[dice.below(corpus.len())].clone();
    for _ in 0..1 + dice.below(4) {
        let at = dice.below(input.len() + 1);
        let to = at + dice.below((input.len() - at).min(32) + 1);
        match dice.below(8) {
            0 => input.truncate(at),
            1 => drop(input.drain(at..to)),
            2 => drop(input.splice(at..to, ODD[dice.below(ODD.len())].iter().copied())),
            3 => {
                if let Some(byte) = input.get_mut(at) {
                    *byte ^= 1 << dice.below(8);
                }
            }
            4 => {
                let other = dice.below(corpus.len());
                let other = dice.part(&corpus[other]).to_vec();
                drop(input.splice(at..to, other));
            }
            5 => {
                let piece = dice.part(&input).to_vec();
                let again = piece.repeat(1 + dice.below(100));
                drop(input.splice(at..at, again));
            }
            6 => input.insert(at, dice.below(256) as u8),
            _ => {
                let piece = ODD[dice.below(ODD.len())].repeat(dice.below(40));
                drop(input.splice(at..at, piece));
            }
        }
        input.truncate(LARGEST);
    }
    input
}

fn number(name: &str) -> Option<u64> {
    let text = std::env::var(name).ok()?;
    Some(text.parse().unwrap_or_else(|_| panic!("{name} is a number")))
}

/// Tries `parser` with the target's corpus and `rounds` changed inputs. It panics on what is wrong;
/// an error of the input is none. Answers how many inputs it took for whole, as it says itself.
#[track_caller]
pub fn fuzz(target: &str, rounds: u64, parser: impl Fn(&[u8]) -> bool) {
    let dir = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/corpus").join(target);
    let mut files: Vec<_> = std::fs::read_dir(&dir).unwrap().map(|e| e.unwrap().path()).collect();
    files.sort();
    let corpus: Vec<Vec<u8>> = files.iter().map(|f| std::fs::read(f).unwrap()).collect();
    assert!(!corpus.is_empty(), "{} is empty", dir.display());
    let seed = number("VOLFS_SEED")
        .unwrap_or_else(|| SystemTime::now().duration_since(UNIX_EPOCH).unwrap().as_micros() as u64);
    let long = std::env::var("VOLFS_LONG").is_ok_and(|v| v == "1");
    let rounds = number("VOLFS_FUZZ").unwrap_or(if long { rounds * 200 } else { rounds });
    let mut dice = Dice(seed);
    let began = Instant::now();
    let (mut whole, mut longest) = (0u64, Duration::ZERO);
    for round in 0..corpus.len() as u64 + rounds {
        let input = match corpus.get(round as usize) {
            Some(input) => input.clone(),
            None => changed(&mut dice, &corpus),
        };
        let from = Instant::now();
        let shown = || format!("{target}, seed {seed}, round {round}: \"{}\"", input.escape_ascii());
        match catch_unwind(AssertUnwindSafe(|| parser(&input))) {
            Ok(taken) => whole += u64::from(taken),
            Err(panic) => {
                eprintln!("{}", shown());
                resume_unwind(panic)
            }
        }
        let took = from.elapsed();
        assert!(took < LONGEST, "{} took {took:?}", shown());
        longest = longest.max(took);
    }
    println!(
        "fuzz {target}: {} examples, {rounds} changed, {whole} taken, longest {longest:?}; seed {seed}; {:.1} s",
        corpus.len(),
        began.elapsed().as_secs_f64()
    );
    assert!(whole > 0, "{target}: nothing was taken, which is no test of what follows");
}
