//! The kit on real devices: random kills, syscall errors, churn and power cuts, judged by an oracle
//! that asks the kernel, the loop store and the record, and not the daemon alone.
//!
//! Each suite prints one line with its figures. `VOLFS_SEED` repeats its choices, `VOLFS_LONG=1` or a
//! count of its own (`VOLFS_KILLS`, `VOLFS_CUTS`, `VOLFS_CHURN_SECONDS`) makes it long.

#![allow(clippy::unwrap_used, clippy::expect_used)]

mod churn;
mod churn_cloud;
#[path = "../tree/common.rs"]
mod common;
mod errors;

mod kill;
mod limits;
mod model;
mod oracle;
mod power;
mod replay;
#[path = "../cloud/site.rs"]
mod site;
mod trace;

use std::time::Duration;

/// What a caller may be told when something below fails (contract, Errors).
const CLEAN: [i32; 9] = [
    libc::EIO,
    libc::ENOSPC,
    libc::EREMOTEIO,
    libc::EHOSTUNREACH,
    libc::EBUSY,
    libc::ETIMEDOUT,
    libc::ENODEV,
    libc::ENODATA,
    libc::ENOTUNIQ,
];

/// splitmix64: each number is as good as any, and a seed is all there is to remember.
pub struct Dice(u64);

impl Dice {
    /// The same seed, the same throws.
    pub fn new(seed: u64) -> Self {
        Dice(seed)
    }

    /// Any number.
    pub fn throw(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    /// A number below `n`.
    pub fn below(&mut self, n: usize) -> usize {
        (self.throw() % n.max(1) as u64) as usize
    }

    /// One of them.
    pub fn one<'a, T>(&mut self, of: &'a [T]) -> &'a T {
        &of[self.below(of.len())]
    }

    /// Each power of ten between the two is as likely.
    pub fn spread(&mut self, from: Duration, to: Duration) -> Duration {
        let share = (self.throw() >> 11) as f64 / (1u64 << 53) as f64;
        let (from, to) = (from.as_secs_f64(), to.as_secs_f64());
        Duration::from_secs_f64(from * (to / from).powf(share))
    }
}

/// `VOLFS_SEED`, or one from the clock.
pub fn seed() -> u64 {
    let given = std::env::var("VOLFS_SEED").ok();
    given.map(|text| text.parse().expect("VOLFS_SEED is a number")).unwrap_or_else(|| {
        std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap().as_micros() as u64
    })
}

/// A count from the environment, else the long one with `VOLFS_LONG=1`, else the short one.
pub fn count(name: &str, short: usize, long: usize) -> usize {
    match std::env::var(name) {
        Ok(text) => text.parse().unwrap_or_else(|_| panic!("{name} is a number")),
        Err(_) if std::env::var("VOLFS_LONG").is_ok_and(|v| v == "1") => long,
        Err(_) => short,
    }
}

/// The one line of a suite: `figures`, and what it ran on.
pub fn figures(suite: &str, seed: u64, took: Duration, figures: &str) {
    let kernel = std::fs::read_to_string("/proc/sys/kernel/osrelease").unwrap_or_default();
    println!(
        "{suite}: {figures}; seed {seed}; {:.1} s; kernel {}; SQLite {}",
        took.as_secs_f64(),
        kernel.trim(),
        rusqlite::version()
    );
}
