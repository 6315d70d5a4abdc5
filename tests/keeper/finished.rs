//! Commands that were done, or had failed, when the daemon was killed before it answered: sent
//! again, they get their first answer, and nothing is done twice.

use std::fs;
use std::path::Path;

use crate::common::Volfs;
use crate::{kept, next_after, outcomes};

/// Kills the daemon at this point of one command; the errno that its caller gets in the end.
fn killed_at(point: &str, no_resend: bool, prepare: &str, command: impl FnOnce(&Volfs) -> i32) -> (Volfs, i32) {
    let mut volfs = kept(&[], no_resend);
    let armed = volfs.scratch("armed");
    let resend = if no_resend { ";keep.no-resend=fail" } else { "" };
    volfs.set_env(&[("VOLFS_FAILPOINTS", &format!("{point}=once:{}{resend}", armed.display()))]);
    volfs.launch();
    volfs.ok(&format!("mkdir $R/jobs/a $R/jobs/b; {prepare}"));
    let old = volfs.kept_pid().unwrap();
    fs::write(&armed, "").unwrap();
    let errno = command(&volfs);
    assert!(!armed.exists(), "{point} was not reached");
    next_after(&volfs, old);
    (volfs, errno)
}

const MADE: &str = "echo 'create d 1M' > $R/jobs/a/control";
const ATTACHED: &str = "echo 'create d 1M' > $R/jobs/a/control; echo attach > $R/jobs/a/control";

fn uuid(volfs: &Volfs) -> String {
    let link = fs::read_link(volfs.path("jobs/a/disks/d")).unwrap();
    link.file_name().unwrap().to_str().unwrap().to_owned()
}

/// A verb, what stands before it, its control, its text (`ID` is the volume's).
const COMMANDS: [(&str, &str, &str, &str); 9] = [
    ("create", "", "jobs/a/control", "create d 1M"),
    ("attach", MADE, "jobs/a/disks/d/control", "attach"),
    ("detach", ATTACHED, "jobs/a/disks/d/control", "detach"),
    ("resize", MADE, "jobs/a/disks/d/control", "resize 2M"),
    ("move", MADE, "jobs/a/disks/d/control", "move b"),
    ("disk", MADE, "jobs/a/disks/d/control", "disk e"),
    ("release", MADE, "jobs/a/disks/d/control", "release ID"),
    ("delete", MADE, "jobs/a/disks/d/control", "delete ID"),
    ("destroy", ATTACHED, "jobs/a/control", "destroy a"),
];

fn each_is_done_once(no_resend: bool) {
    let cell = |verb: &str, prepare: &str, control: &str, text: &str, moment: &str| {
        let (volfs, errno) = killed_at(&format!("{verb}.{moment}"), no_resend, prepare, |volfs| {
            let text = if text.contains("ID") { text.replace("ID", &uuid(volfs)) } else { text.to_owned() };
            volfs.write(control, &text)
        });
        let rows: Vec<String> = volfs.read("history").unwrap().lines().map(str::to_owned).collect();
        let done = rows.iter().filter(|r| {
            let cells: Vec<&str> = r.split('\t').collect();
            cells[1] == verb && cells[5] == "done"
        });
        // `prepare` has made and attached what the others need.
        let before = usize::from(verb == "attach" && prepare == ATTACHED);
        let effects = done.count() - before;
        if (errno, effects) == (0, 1) {
            None
        } else {
            Some(format!("{verb} {moment}: errno {errno}, {effects} effects\n{}\n{}", rows.join("\n"), volfs.log()))
        }
    };
    let failed: Vec<String> = std::thread::scope(|scope| {
        let lanes = COMMANDS.map(|(verb, prepare, control, text)| {
            scope.spawn(move || {
                let moments = ["journaled", "acted", "recorded"];
                moments.into_iter().filter_map(|m| cell(verb, prepare, control, text, m)).collect::<Vec<_>>()
            })
        });
        lanes.into_iter().flat_map(|lane| lane.join().unwrap()).collect()
    });
    assert!(failed.is_empty(), "{} cells:\n{}", failed.len(), failed.join("\n"));
}

#[test]
fn a_command_cut_off_at_each_moment_ends_well_for_its_caller_and_has_one_effect() {
    each_is_done_once(false);
}

#[test]
fn so_it_does_where_the_kernel_sends_nothing_again() {
    each_is_done_once(true);
}

#[test]
fn mkdir_rmdir_and_values_that_were_recorded_get_their_first_answer() {
    let errno = |result: std::io::Result<()>| result.map_or_else(|e| e.raw_os_error().unwrap(), |()| 0);
    let made = |path: &Path| fs::metadata(path).is_ok_and(|meta| meta.is_dir());
    let (volfs, got) = killed_at("small.recorded", false, "true", |v| errno(fs::create_dir(v.path("jobs/new"))));
    assert_eq!((got, made(&volfs.path("jobs/new"))), (0, true), "{}", volfs.log());
    let (volfs, got) = killed_at("small.recorded", false, "true", |v| errno(fs::remove_dir(v.path("jobs/b"))));
    assert_eq!((got, made(&volfs.path("jobs/b"))), (0, false), "{}", volfs.log());
    let (volfs, got) = killed_at("small.recorded", false, "true", |v| v.write("jobs/a/vm_name", "web\n"));
    assert_eq!((got, volfs.value("jobs/a/vm_name").as_str()), (0, "web"));
    let (volfs, got) = killed_at("small.recorded", false, "true", |v| v.write("jobs/a/hold", "1\n"));
    assert_eq!((got, volfs.value("jobs/a/hold").as_str()), (0, "1"));
}

#[test]
fn a_command_that_had_failed_fails_the_same_and_is_not_tried_again() {
    for no_resend in [false, true] {
        let prepare =
            format!("{ATTACHED}; exec 9< $R/jobs/a/disks/d/block; sleep 1000 <&9 >/dev/null 2>&1 & echo $! > user");
        let (volfs, errno) =
            killed_at("detach.acted", no_resend, &prepare, |volfs| volfs.write("jobs/a/disks/d/control", "detach"));
        let first = (errno, outcomes(&volfs, "detach", "d"));
        let (volfs, errno) = {
            volfs.ok("kill $(cat user)");
            drop(volfs);
            // Recorded as failed, and killed before the answer.
            killed_at("failed.recorded", no_resend, &prepare, |volfs| volfs.write("jobs/a/disks/d/control", "detach"))
        };
        let second = (errno, outcomes(&volfs, "detach", "d"));
        volfs.ok("kill $(cat user)");
        // Killed before the record had its end: taken up again by its caller's command, and refused.
        assert_eq!(first, (libc::EBUSY, vec!["interrupted".to_owned(), "failed".into()]));
        assert_eq!(second, (libc::EBUSY, vec!["failed".to_owned()]));
    }
}
