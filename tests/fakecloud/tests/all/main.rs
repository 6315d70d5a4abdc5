//! What the fake cloud promises to the tests that are built on it.

// A helper of tests that cannot go on is a failed test.
#![allow(clippy::expect_used, clippy::unwrap_used)]

mod behind;
mod client;
mod faults;
mod jobs;
mod loops;
mod refusals;
mod requests;
mod snapshots;
mod tags;
mod volumes;
