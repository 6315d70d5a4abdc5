//! What the record had when the daemon was killed, and nobody had been told: its successor tells it.

use std::fs;

use serde_json::Value;

use crate::common::{Volfs, finish};
use crate::{kept, next_after};

/// The events that a follower has whole, whose numbers must rise by one.
fn told(volfs: &Volfs) -> Vec<Value> {
    let text = fs::read_to_string(volfs.scratch("events")).unwrap_or_default();
    let whole = text.rfind('\n').map_or("", |end| &text[..end]);
    let all: Vec<Value> = whole.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
    for pair in all.windows(2) {
        assert_eq!(pair[0]["seq"].as_u64().map(|n| n + 1), pair[1]["seq"].as_u64(), "{text}");
    }
    all
}

fn times(told: &[Value], fields: &[(&str, &str)]) -> usize {
    told.iter().filter(|event| fields.iter().all(|(name, value)| event[name] == *value)).count()
}

#[test]
fn what_was_committed_and_not_told_when_the_daemon_was_killed_is_told_once_by_the_next_one() {
    let mut volfs = kept(&[], false);
    let (gate, ended, small) = (volfs.scratch("gate"), volfs.scratch("ended"), volfs.scratch("small"));
    let points = format!(
        "attach.before-call=wait:{};store.after-commit=once:{};small.recorded=once:{}",
        gate.display(),
        ended.display(),
        small.display()
    );
    volfs.set_env(&[("VOLFS_FAILPOINTS", &points)]);
    volfs.launch();
    volfs.ok("mkdir $R/jobs/a && echo 'create d 1M' > $R/jobs/a/control");
    let mut follower = volfs.sh_spawn(&["dash"], "exec cat $R/events/all > events");
    volfs.until("follower", || {
        fs::read_dir(format!("/proc/{}/fd", follower.id())).is_ok_and(|mut fds| {
            fds.any(|fd| fd.is_ok_and(|fd| fs::read_link(fd.path()).is_ok_and(|to| to.ends_with("events/all"))))
        })
    });
    // Its end is committed, and the daemon killed before it could tell.
    fs::write(&gate, "").unwrap();
    let attaching = volfs.sh_spawn(&["dash"], "echo attach > $R/jobs/a/disks/d/control");
    // Its beginning is committed by then, and the next commit is that of its end.
    let before_the_call = || volfs.read("jobs/a/disks/d/info.json").is_ok_and(|t| t.contains("the cloud attaches it"));
    volfs.until("the step before the call", before_the_call);
    let old = volfs.kept_pid().unwrap();
    fs::write(&ended, "").unwrap();
    fs::remove_file(&gate).unwrap();
    let old = next_after(&volfs, old);
    assert_eq!(finish(attaching).status, 0, "{}", volfs.log());
    // So are a mkdir and a rmdir.
    fs::write(&small, "").unwrap();
    volfs.ok("mkdir $R/jobs/b");
    let old = next_after(&volfs, old);
    fs::write(&small, "").unwrap();
    volfs.ok("rmdir $R/jobs/b");
    next_after(&volfs, old);
    // The last word of this test.
    volfs.ok("mkdir $R/jobs/c");
    volfs.until("the follower has it all", || times(&told(&volfs), &[("event", "job"), ("job", "c")]) == 1);
    let all = told(&volfs);
    for once in [
        &[("event", "begin"), ("command", "attach")][..],
        &[("event", "end"), ("command", "attach"), ("outcome", "done"), ("disk", "d"), ("job", "a")],
        &[("event", "status"), ("from", "attaching"), ("to", "attached")],
        &[("event", "job"), ("job", "b")],
        &[("event", "forgotten"), ("job", "b")],
    ] {
        assert_eq!(times(&all, once), 1, "{once:?} in {all:#?}\n{}", volfs.log());
    }
    follower.kill().unwrap();
    follower.wait().unwrap();
}
