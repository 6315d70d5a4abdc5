//! The same sweep as in `crash` for snapshots of loop volumes.

use std::fs;
use std::os::unix::fs::FileExt;

use libc::{EEXIST, ENOENT};

use super::sweep::Left::{Any, Before, Done, Either, Nothing};
use super::sweep::{Case, PATTERN, Verb, data, sweep, volume_command};

/// Beside the pattern that every sweep looks for.
const AT: u64 = 4096;

fn put(case: &Case, text: &[u8]) {
    let file = fs::OpenOptions::new().write(true).open(data(case.volfs, &case.uuids[0])).unwrap();
    file.write_all_at(text, AT).unwrap();
}

#[track_caller]
fn holds(case: &Case, text: &[u8]) {
    let bytes = fs::read(data(case.volfs, &case.uuids[0])).unwrap();
    assert!(bytes[AT as usize..].starts_with(text) && bytes.starts_with(PATTERN));
}

/// What is listed, and what is in the store, with nothing half done beside it.
#[track_caller]
fn snapshots(case: &Case, count: usize) {
    let list = |dir: std::path::PathBuf| fs::read_dir(dir).map_or(0, |all| all.count());
    assert_eq!(list(case.volfs.path(case.volume(0, "snapshots"))), count, "{}", case.volfs.log());
    assert_eq!(list(data(case.volfs, &case.uuids[0]).with_file_name("snapshots")), count);
}

fn snapshotted(case: &mut Case) {
    case.disks(&["d"]);
    put(case, b"then");
    assert_eq!(volume_command(case, "snapshot s"), 0, "{}", case.volfs.log());
    put(case, b"now!");
}

#[test]
fn crash_snapshot_at_every_step_takes_it_whole_or_not_at_all() {
    sweep(&Verb {
        name: "snapshot",
        points: &[
            ("store.before-commit", 1, Nothing),
            ("store.after-commit", 1, Before),
            ("snapshot.journaled", 1, Before),
            ("snapshot.before-call", 1, Before),
            ("loop.snapshot.before", 1, Before),
            ("loop.snapshot.copied", 1, Before),
            ("loop.snapshot.built", 1, Before),
            ("loop.snapshot.after", 1, Done),
            ("snapshot.after-call", 1, Done),
            ("snapshot.acted", 1, Done),
            ("store.before-commit", 2, Done),
            ("store.after-commit", 2, Done),
            ("snapshot.recorded", 1, Done),
        ],
        make: |c| c.attached(&["d"]),
        write: |c| volume_command(c, "snapshot s"),
        before: |c| {
            c.is_attached(0);
            snapshots(c, 0);
        },
        after: |c| {
            c.is_attached(0);
            snapshots(c, 1);
        },
        again: EEXIST,
        grows: 0,
    });
}

#[test]
fn crash_revert_at_every_step_leaves_all_bytes_of_one_time() {
    sweep(&Verb {
        name: "revert",
        points: &[
            ("store.before-commit", 1, Nothing),
            ("store.after-commit", 1, Before),
            ("revert.journaled", 1, Before),
            ("revert.before-call", 1, Before),
            ("loop.revert.before", 1, Before),
            ("loop.revert.copied", 1, Before),
            ("loop.revert.promised", 1, Before),
            // Nobody can tell afterwards which bytes it has: it is said to be interrupted.
            ("loop.revert.replaced", 1, Any),
            ("loop.revert.after", 1, Any),
            ("revert.after-call", 1, Any),
            ("revert.acted", 1, Any),
            ("store.before-commit", 2, Any),
            ("store.after-commit", 2, Any),
            ("revert.recorded", 1, Done),
        ],
        make: snapshotted,
        write: |c| volume_command(c, "revert s"),
        before: |c| {
            c.is_detached(0);
            holds(c, b"now!");
            snapshots(c, 1);
        },
        after: |c| {
            c.is_detached(0);
            holds(c, b"then");
            snapshots(c, 1);
        },
        again: 0,
        grows: 0,
    });
}

#[test]
fn crash_delete_snapshot_at_every_step_takes_nothing_else_away() {
    sweep(&Verb {
        name: "delete-snapshot",
        points: &[
            ("store.after-commit", 1, Before),
            ("delete-snapshot.journaled", 1, Before),
            ("delete-snapshot.before-call", 1, Before),
            ("loop.delete-snapshot.before", 1, Before),
            ("loop.delete-snapshot.renamed", 1, Done),
            ("loop.delete-snapshot.after", 1, Done),
            ("delete-snapshot.after-call", 1, Done),
            ("delete-snapshot.acted", 1, Done),
            ("store.before-commit", 2, Either),
            ("store.after-commit", 2, Either),
            ("delete-snapshot.recorded", 1, Done),
        ],
        make: snapshotted,
        write: |c| volume_command(c, "delete-snapshot s"),
        before: |c| {
            c.is_detached(0);
            holds(c, b"now!");
            snapshots(c, 1);
        },
        after: |c| {
            c.is_detached(0);
            holds(c, b"now!");
            snapshots(c, 0);
        },
        again: ENOENT,
        grows: 0,
    });
}
