//! Schedules that once failed, made small, each with what it has found.

use super::plan::Step;

/// What a regression is about, its seed (the ids, the latencies, the provider's kind) and its steps.
pub type Regression = (&'static str, u64, &'static [Step]);

pub const ALL: &[Regression] = &[];
