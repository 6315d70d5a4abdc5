//! SIGKILL at every named point of every operation: whatever it hits, the next start settles it.
//!
//! One daemon has all points prepared (`NAME=kill:FILE`); making FILE arms one. Each case sets its
//! objects up, arms, writes the command, sees the daemon die and the caller get an error, starts the
//! next daemon, and looks: settled, nothing doubled, nothing lost, nothing taken away that had not
//! begun, no device leaked; then the same command again gives the right outcome.

use std::collections::BTreeSet;
use std::fs;
use std::path::Path;

use super::sweep::*;

#[test]
fn crash_create_at_every_step_makes_one_volume_or_none() {
    sweep(&Verb {
        name: "create",
        points: &[
            ("store.before-commit", 1, Nothing),
            ("store.after-commit", 1, Before),
            ("create.journaled", 1, Before),
            ("create.before-call", 1, Before),
            ("loop.create.before", 1, Before),
            ("loop.create.built", 1, Before),
            ("loop.create.after", 1, Done),
            ("create.after-call", 1, Done),
            ("create.acted", 1, Done),
            ("store.before-commit", 2, Done),
            ("store.after-commit", 2, Done),
            ("create.recorded", 1, Done),
        ],
        make: |c| c.disks(&[]),
        write: |c| command(c, "create d 1M"),
        before: |c| assert_eq!(fs::read_dir(c.volfs.path(format!("jobs/{}/disks", c.job))).unwrap().count(), 0),
        after: |c| {
            assert_eq!(c.volfs.value(format!("jobs/{}/disks/d/status", c.job)), "detached");
            assert_eq!(c.volfs.value(format!("jobs/{}/disks/d/size", c.job)), MIB.to_string());
        },
        again: libc::EEXIST,
        grows: 1,
    });
}

#[test]
fn crash_attach_at_every_step_ends_attached_or_detached() {
    sweep(&Verb {
        name: "attach",
        points: &[
            ("store.before-commit", 1, Nothing),
            ("store.after-commit", 1, Before),
            ("attach.journaled", 1, Before),
            ("attach.before-call", 1, Before),
            ("loop.attach.before", 1, Before),
            ("loop.attach.intent", 1, Before),
            ("loop.attach.bound", 1, Done),
            ("loop.attach.after", 1, Done),
            ("attach.after-call", 1, Done),
            ("attach.acted", 1, Done),
            ("store.before-commit", 2, Either),
            ("store.after-commit", 2, Either),
            ("attach.recorded", 1, Done),
        ],
        make: |c| c.disks(&["d"]),
        write: |c| volume_command(c, "attach"),
        before: |c| c.is_detached(0),
        after: |c| c.is_attached(0),
        again: 0,
        grows: 0,
    });
}

#[test]
fn crash_detach_at_every_step_takes_nothing_away_that_had_not_begun() {
    sweep(&Verb {
        name: "detach",
        points: &[
            ("store.before-commit", 1, Nothing),
            ("store.after-commit", 1, Before),
            ("detach.journaled", 1, Before),
            ("detach.held", 1, Before),
            ("detach.before-call", 1, Before),
            ("loop.detach.before", 1, Before),
            ("loop.detach.intent", 1, Before),
            ("loop.detach.flushed", 1, Before),
            ("loop.detach.flagged", 1, Done),
            ("loop.detach.cleared", 1, Done),
            ("loop.detach.after", 1, Done),
            ("detach.after-call", 1, Done),
            ("detach.acted", 1, Done),
            ("store.before-commit", 2, Either),
            ("store.after-commit", 2, Either),
            ("detach.recorded", 1, Done),
        ],
        make: |c| c.attached(&["d"]),
        write: |c| volume_command(c, "detach"),
        before: |c| c.is_attached(0),
        after: |c| {
            c.is_detached(0);
            let mut head = fs::read(data(c.volfs, &c.uuids[0])).unwrap();
            head.truncate(PATTERN.len());
            assert_eq!(head, PATTERN);
        },
        again: 0,
        grows: 0,
    });
}

#[test]
fn crash_resize_at_every_step_ends_with_one_size_for_all() {
    fn sized(c: &Case, size: u64) {
        c.is_attached(0);
        assert_eq!(c.volfs.value(c.volume(0, "size")), size.to_string());
        let device = c.volfs.value(c.volume(0, "device"));
        assert_eq!(c.volfs.ok(&format!("blockdev --getsize64 {device}")), size.to_string());
        assert_eq!(fs::metadata(data(c.volfs, &c.uuids[0])).unwrap().len(), size);
    }
    sweep(&Verb {
        name: "resize",
        points: &[
            ("store.before-commit", 1, Nothing),
            ("store.after-commit", 1, Before),
            ("resize.journaled", 1, Before),
            ("resize.before-call", 1, Before),
            ("loop.resize.before", 1, Before),
            ("loop.resize.intent", 1, Done),
            ("loop.resize.grown", 1, Done),
            ("loop.resize.after", 1, Done),
            ("resize.after-call", 1, Done),
            ("resize.acted", 1, Done),
            ("store.before-commit", 2, Either),
            ("store.after-commit", 2, Either),
            ("resize.recorded", 1, Done),
        ],
        make: |c| c.attached(&["d"]),
        write: |c| volume_command(c, "resize 2M"),
        before: |c| sized(c, MIB),
        after: |c| sized(c, 2 * MIB),
        again: 0,
        grows: 0,
    });
}

fn volumes_of(c: &Case, job: &str) -> usize {
    fs::read_dir(c.volfs.path(format!("jobs/{job}/volumes"))).unwrap().count()
}

/// The owner's mark in the provider's own file.
fn mark(c: &Case) -> serde_json::Value {
    let text = fs::read_to_string(data(c.volfs, &c.uuids[0]).with_file_name("meta.json")).unwrap();
    serde_json::from_str::<serde_json::Value>(&text).unwrap()["mark"].clone()
}

#[test]
fn crash_delete_at_every_step_deletes_once_or_not_at_all() {
    sweep(&Verb {
        name: "delete",
        points: &[
            ("store.before-commit", 1, Nothing),
            ("store.after-commit", 1, Before),
            ("delete.journaled", 1, Before),
            ("delete.before-call", 1, Before),
            ("loop.delete.before", 1, Before),
            ("loop.delete.after", 1, Done),
            ("delete.after-call", 1, Done),
            ("delete.acted", 1, Done),
            ("store.before-commit", 2, Done),
            ("store.after-commit", 2, Done),
            ("delete.recorded", 1, Done),
        ],
        make: |c| c.disks(&["d"]),
        write: |c| volume_command(c, &format!("delete {}", c.uuids[0])),
        before: |c| c.is_detached(0),
        after: |c| {
            assert_eq!(volumes_of(c, &c.job), 0);
            assert!(!data(c.volfs, &c.uuids[0]).exists());
        },
        again: libc::ENOENT,
        grows: -1,
    });
}

#[test]
fn crash_release_at_every_step_ends_ours_or_free() {
    sweep(&Verb {
        name: "release",
        points: &[
            ("store.before-commit", 1, Nothing),
            ("store.after-commit", 1, Before),
            ("release.journaled", 1, Before),
            ("release.before-mark", 1, Before),
            ("loop.mark.before", 1, Before),
            ("loop.mark.after", 1, Done),
            ("release.after-mark", 1, Done),
            ("release.acted", 1, Done),
            ("store.before-commit", 2, Done),
            ("store.after-commit", 2, Done),
            ("release.recorded", 1, Done),
        ],
        make: |c| c.disks(&["d"]),
        write: |c| {
            c.volfs.write(format!("jobs/{}/volumes/{}/control", c.job, c.uuids[0]), &format!("release {}", c.uuids[0]))
        },
        before: |c| {
            c.is_detached(0);
            assert!(mark(c).is_string());
        },
        after: |c| {
            assert_eq!(volumes_of(c, &c.job), 0);
            assert!(mark(c).is_null());
        },
        again: libc::ENOENT,
        grows: 0,
    });
}

#[test]
fn crash_claim_at_every_step_ends_claimed_or_free() {
    sweep(&Verb {
        name: "claim",
        points: &[
            ("store.before-commit", 1, Nothing),
            ("store.after-commit", 1, Before),
            ("claim.journaled", 1, Before),
            ("claim.before-mark", 1, Before),
            ("loop.mark.before", 1, Before),
            ("loop.mark.after", 1, Done),
            ("claim.after-mark", 1, Done),
            ("claim.acted", 1, Done),
            ("store.before-commit", 2, Done),
            ("store.after-commit", 2, Done),
            ("claim.recorded", 1, Done),
        ],
        make: |c| {
            c.disks(&["d"]);
            assert_eq!(volume_command(c, &format!("release {}", c.uuids[0])), 0);
        },
        write: |c| command(c, &format!("claim {} e", c.uuids[0])),
        before: |c| {
            assert_eq!(volumes_of(c, &c.job), 0);
            assert!(mark(c).is_null());
        },
        after: |c| {
            assert_eq!(volumes_of(c, &c.job), 1);
            c.volfs.until("settled claim", || c.volfs.value(format!("jobs/{}/disks/e/status", c.job)) == "detached");
            let file = fs::read_to_string(data(c.volfs, &c.uuids[0]).with_file_name("meta.json")).unwrap();
            assert!(file.contains(&c.volfs.value(c.volume(0, "owner"))), "{file}");
        },
        again: libc::EEXIST,
        grows: 0,
    });
}

#[test]
fn crash_move_at_every_step_ends_with_one_owner() {
    fn there(c: &Case, here: usize) {
        assert_eq!((volumes_of(c, &c.job), volumes_of(c, &format!("{}to", c.job))), (here, 1 - here));
        // A device in use stays where it is; only the owner changes.
        c.is_attached(0);
        assert_eq!(mark(c), c.volfs.value(c.volume(0, "owner")));
    }
    sweep(&Verb {
        name: "move",
        points: &[
            ("store.before-commit", 1, Nothing),
            ("store.after-commit", 1, Before),
            ("move.journaled", 1, Before),
            ("move.before-mark", 1, Before),
            ("loop.mark.before", 1, Before),
            ("loop.mark.after", 1, Done),
            ("move.after-mark", 1, Done),
            ("move.acted", 1, Done),
            ("store.before-commit", 2, Done),
            ("store.after-commit", 2, Done),
            ("move.recorded", 1, Done),
        ],
        make: |c| {
            c.attached(&["d"]);
            fs::create_dir(c.volfs.path(format!("jobs/{}to", c.job))).unwrap();
        },
        write: |c| volume_command(c, &format!("move {}to", c.job)),
        before: |c| there(c, 1),
        after: |c| there(c, 0),
        again: 0,
        grows: 0,
    });
}

#[test]
fn crash_disk_rename_at_every_step_keeps_one_name() {
    fn named(c: &Case, name: &str) {
        let disks = fs::read_dir(c.volfs.path(format!("jobs/{}/disks", c.job))).unwrap();
        assert_eq!(disks.map(|d| d.unwrap().file_name()).collect::<Vec<_>>(), [name]);
        let file = fs::read_to_string(data(c.volfs, &c.uuids[0]).with_file_name("meta.json")).unwrap();
        let file: serde_json::Value = serde_json::from_str(&file).unwrap();
        assert_eq!(file["disk"], name, "the name beside the mark");
    }
    sweep(&Verb {
        name: "disk",
        points: &[
            ("store.before-commit", 1, Nothing),
            ("store.after-commit", 1, Done),
            ("disk.journaled", 1, Done),
            ("loop.mark.before", 1, Done),
            ("loop.mark.after", 1, Done),
            ("disk.acted", 1, Done),
            ("store.before-commit", 2, Done),
            ("store.after-commit", 2, Done),
            ("disk.recorded", 1, Done),
        ],
        make: |c| c.disks(&["d"]),
        write: |c| volume_command(c, "disk e"),
        before: |c| named(c, "d"),
        after: |c| named(c, "e"),
        again: 0,
        grows: 0,
    });
}

#[test]
fn crash_destroy_at_every_step_is_finished_by_repeating_it() {
    sweep(&Verb {
        name: "destroy",
        points: &[
            ("store.before-commit", 1, Nothing),
            ("store.after-commit", 1, Before),
            ("destroy.journaled", 1, Before),
            ("detach.journaled", 1, Before),
            ("detach.before-call", 1, Before),
            ("loop.detach.flagged", 1, Parts),
            ("detach.acted", 2, Parts),
            ("detach.recorded", 1, Parts),
            ("destroy.between", 1, Parts),
            ("delete.journaled", 1, Parts),
            ("delete.before-call", 2, Parts),
            ("loop.delete.after", 1, Parts),
            ("delete.recorded", 1, Parts),
            ("destroy.between", 2, Parts),
            ("delete.recorded", 2, Parts),
            ("store.after-commit", 4, Any),
            ("store.after-commit", 6, Any),
            ("store.before-commit", 8, Any),
            ("destroy.forget", 1, Parts),
            ("destroy.acted", 1, Parts),
            ("destroy.recorded", 1, Done),
        ],
        make: |c| c.attached(&["d", "e"]),
        write: |c| command(c, &format!("destroy {}", c.job)),
        before: |c| {
            c.is_attached(0);
            c.is_attached(1);
        },
        after: |c| {
            assert!(!c.volfs.path(format!("jobs/{}", c.job)).exists());
            assert!(c.uuids.iter().all(|u| !data(c.volfs, u).exists()));
        },
        again: libc::ENOENT,
        grows: -2,
    });
}

#[test]
fn crash_of_a_whole_jobs_attach_is_finished_by_repeating_it() {
    sweep(&Verb {
        name: "attach",
        points: &[
            ("store.after-commit", 1, Any),
            ("attach.journaled", 1, Any),
            ("attach.journaled", 2, Any),
            ("loop.attach.bound", 2, Any),
            ("attach.acted", 1, Any),
            ("attach.recorded", 2, Any),
            ("attach.acted", 4, Any),
            ("attach.recorded", 4, Any),
        ],
        make: |c| c.disks(&["d", "e", "f"]),
        write: |c| command(c, "attach"),
        before: |c| (0..3).for_each(|n| c.is_detached(n)),
        after: |c| (0..3).for_each(|n| c.is_attached(n)),
        again: 0,
        grows: 0,
    });
}

fn errno(result: std::io::Result<()>) -> i32 {
    result.map_or_else(|e| e.raw_os_error().unwrap_or(-1), |()| 0)
}

#[test]
fn crash_mkdir_and_rmdir_happened_or_not() {
    sweep(&Verb {
        name: "mkdir",
        points: &[("store.before-commit", 1, Nothing), ("store.after-commit", 1, Done)],
        make: |_| {},
        write: |c| errno(fs::create_dir(c.volfs.path(format!("jobs/{}new", c.job)))),
        before: |c| assert!(!c.volfs.path(format!("jobs/{}new", c.job)).exists()),
        after: |c| assert!(c.volfs.path(format!("jobs/{}new", c.job)).is_dir()),
        again: libc::EEXIST,
        grows: 0,
    });
    sweep(&Verb {
        name: "rmdir",
        points: &[("store.before-commit", 1, Nothing), ("store.after-commit", 1, Done)],
        make: |c| fs::create_dir(c.volfs.path(format!("jobs/{}old", c.job))).unwrap(),
        write: |c| errno(fs::remove_dir(c.volfs.path(format!("jobs/{}old", c.job)))),
        before: |c| assert!(c.volfs.path(format!("jobs/{}old", c.job)).is_dir()),
        after: |c| assert!(!c.volfs.path(format!("jobs/{}old", c.job)).exists()),
        again: libc::ENOENT,
        grows: 0,
    });
}

#[test]
fn crash_while_a_crash_is_settled_is_settled_by_the_next_start() {
    for (verb, point, then) in [
        ("create", "create.after-call", "create.acted"),
        ("attach", "loop.attach.bound", "attach.acted"),
        ("detach", "loop.detach.flagged", "detach.recorded"),
        ("delete", "loop.delete.after", "store.after-commit"),
    ] {
        let points = [(point, 1, Done), (then, 1, Done)];
        let (mut volfs, arms) = prepared(&points);
        volfs.launch();
        let uuid = volfs.job("j", &["d"], "1M").remove(0);
        if verb == "detach" {
            assert_eq!(volfs.write("jobs/j/control", "attach"), 0);
        }
        fs::write(arms.join(point), "").unwrap();
        let (file, command) = match verb {
            "create" => ("jobs/j/control".to_owned(), "create e 1M".to_owned()),
            "delete" => (format!("volumes/{uuid}/control"), format!("delete {uuid}")),
            _ => (format!("volumes/{uuid}/control"), verb.to_owned()),
        };
        assert_ne!(volfs.write(&file, &command), 0);
        assert_eq!(volfs.wait(), -libc::SIGKILL);
        fs::rename(arms.join(point), arms.join(then)).unwrap();
        // It dies during its start, or right after it.
        if volfs.try_launch().is_ok() {
            assert_eq!(volfs.wait(), -libc::SIGKILL, "{verb}: {then} was not reached\n{}", volfs.log());
        }
        fs::remove_file(arms.join(then)).unwrap();
        volfs.launch();
        volfs.until("settled operations", || in_flight(&volfs).is_empty());
        let rows = history(&volfs, "j");
        assert_eq!(rows.last().unwrap(), &(verb.to_owned(), "done".to_owned()), "{rows:?}");
        let status = volfs.read(format!("volumes/{uuid}/status"));
        let (expected, volumes) = match verb {
            "create" => (Ok("detached\n".to_owned()), 2),
            "attach" => (Ok("attached\n".to_owned()), 1),
            "detach" => (Ok("detached\n".to_owned()), 1),
            _ => (Err(libc::ENOENT), 0),
        };
        assert_eq!((status, stored(&volfs).len()), (expected, volumes), "{verb}");
    }
}

/// Points that no crash belongs to: faults, holds, and switches of other tests.
const NO_CRASH: [&str; 13] = [
    "daemon.start",
    "keep.full",
    "keep.no-resend",
    "keep.no-sweep",
    "reconcile.no-gap",
    "store.fail",
    "devices.flush",
    "devices.no-pin",
    "engine.no-check",
    "fs.panic",
    "loop.unreachable",
    "loop.refuse",
    "loop.ambiguous",
];

#[test]
fn crash_sweeps_visit_every_point_that_the_source_names() {
    fn names(dir: &Path, found: &mut BTreeSet<String>) {
        for entry in fs::read_dir(dir).unwrap() {
            let path = entry.unwrap().path();
            if path.is_dir() {
                if path.file_name().unwrap() != "tests" {
                    names(&path, found);
                }
                continue;
            }
            let text = fs::read_to_string(&path).unwrap();
            for call in ["hit(\"", "reach(\"", "before(\"", "point(\"", "reached(\""] {
                for rest in text.split(call).skip(1) {
                    found.insert(rest.split('"').next().unwrap().to_owned());
                }
            }
        }
    }
    let mut found = BTreeSet::new();
    names(&Path::new(env!("CARGO_MANIFEST_DIR")).join("src"), &mut found);
    found.retain(|name| name.contains('.') && !name.contains(['{', ' ']));
    assert!(found.len() > 40, "{found:?}");
    // What only a cloud brings is visited over the fake one, what only a living caller sees below a keeper.
    let own = concat!(
        include_str!("crash.rs"),
        include_str!("crash_snapshots.rs"),
        include_str!("destroy.rs"),
        include_str!("imported.rs"),
        include_str!("../cloud/killed.rs"),
        include_str!("../cloud/snapshots.rs"),
        include_str!("../import/record.rs"),
        include_str!("../keeper/finished.rs")
    );
    let missing: Vec<_> = found
        .iter()
        .filter(|name| !NO_CRASH.contains(&name.as_str()))
        .filter(|name| !own.contains(&format!("(\"{name}\"")))
        .collect();
    assert!(missing.is_empty(), "no case visits {missing:?}");
}
