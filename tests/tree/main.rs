//! The tree through a real mount, as a user would: real shells, real loop devices.

// A test fails by panicking; the lint's own exception covers test functions only, not their helpers.
#![allow(clippy::unwrap_used, clippy::expect_used)]

mod adversary;
mod answers;
mod bad_input;
mod bring;
mod commands;
mod common;
mod concurrency;
mod crash;
mod crash_snapshots;
mod destroy;
mod errors;
mod events;
mod failover;
mod identity;
mod imported;
mod in_use;
mod jobs;
mod mounting;
mod moving_over;
mod predecessor;
mod rules;
mod scripts;
mod shells;
mod shipped;
mod snapshots;
mod statuses;
mod sweep;
mod table;
mod traps;
mod verbs;
mod waiting;
mod whole;

use common::Volfs;

#[test]
fn c1_c3_c4_c12_a_disk_is_created_attached_written_detached_and_read_back() {
    let volfs = Volfs::start();
    volfs.job("a", &["d"], "8M");
    volfs.ok("echo attach > $R/jobs/a/control && echo hello | dd of=$R/jobs/a/disks/d/block conv=fsync status=none");
    assert!(volfs.value("jobs/a/disks/d/device").starts_with("/dev/loop"));
    volfs.ok("echo detach > $R/jobs/a/control");
    assert_eq!(volfs.read("jobs/a/disks/d/device"), Err(libc::ENODEV));
    assert!(volfs.loops().is_empty());
    volfs.ok("echo attach > $R/jobs/a/control");
    assert_eq!(volfs.ok("head -c 5 $R/jobs/a/disks/d/block"), "hello");
    volfs.ok("echo 'destroy a' > $R/jobs/a/control");
    assert_eq!(volfs.ok("ls $R/jobs"), "");
}
