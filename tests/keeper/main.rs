//! A restart that nobody notices: the daemon is killed below its keeper, and its callers go on.

// A test fails by panicking; the lint's own exception covers test functions only, not their helpers.
#![allow(clippy::unwrap_used, clippy::expect_used)]

#[path = "../tree/common.rs"]
mod common;
mod ends;
mod finished;
mod handles;
mod manager;
mod missed;
mod storm;
mod upgrade;

use common::Volfs;

/// One with a keeper, with these failpoints; `no_resend`: as on a kernel before 6.9.
fn kept(points: &[(&str, String)], no_resend: bool) -> Volfs {
    let mut all: Vec<String> = points.iter().map(|(name, action)| format!("{name}={action}")).collect();
    if no_resend {
        all.push("keep.no-resend=fail".into());
    }
    let mut volfs = Volfs::prepare(&[], "").with_keeper();
    volfs.set_env(&[("VOLFS_FAILPOINTS", &all.join(";"))]);
    volfs
}

/// Waits until another daemon than this one serves; its pid.
#[track_caller]
fn next_after(volfs: &Volfs, old: i32) -> i32 {
    let mut next = old;
    volfs.until("next daemon", || {
        next = volfs.kept_pid().unwrap_or(old);
        next != old
    });
    // The kernel holds this back until it answers.
    assert!(volfs.read("version").is_ok(), "{}", volfs.log());
    next
}

/// The rows of `history` for this verb and disk: outcomes, oldest first.
fn outcomes(volfs: &Volfs, verb: &str, disk: &str) -> Vec<String> {
    let text = volfs.read("history").unwrap();
    let rows = text.lines().skip(1).map(|line| line.split('\t').collect::<Vec<_>>());
    rows.filter(|row| row[1] == verb && row[3] == disk).map(|row| row[5].to_owned()).collect()
}
