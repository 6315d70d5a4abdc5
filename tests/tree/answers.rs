//! R6 and R7: reads are answered whatever goes on, by every tool, whole and exact.

use std::fs;
use std::os::unix::fs::MetadataExt;
use std::time::{Duration, Instant};

use crate::common::{Volfs, finish};
use crate::rules::OTHER_VM;
use crate::shells::{python, two_disks};

/// All that a reader can ask, with a bound in time for what must not wait.
fn everything_answers(volfs: &Volfs) {
    let began = Instant::now();
    let said = volfs.sh("timeout 20 ls -lR $R > /dev/null || exit 1
         timeout 20 find $R -type f -exec cat {} + > /dev/null 2> errors
         [ $? -ne 124 ] || exit 2
         grep -v 'No such device' errors && exit 3
         timeout 20 stat $R $R/jobs/* $R/jobs/*/disks/*/ > /dev/null || exit 4
         timeout 5 cat $R/jobs/a/status $R/health $R/problems $R/jobs/a/disks/*/status");
    assert_eq!(said.status, 0, "{said:?}");
    assert!(began.elapsed() < Duration::from_secs(20), "{:?}", began.elapsed());
}

#[test]
fn r6_reads_are_answered_while_an_operation_is_held() {
    let mut volfs = Volfs::prepare(&[], "");
    let gate = volfs.scratch("gate");
    volfs.set_env(&[(
        "VOLFS_FAILPOINTS",
        &format!("attach.before-call=wait:{0};detach.before-call=wait:{0}", gate.display()),
    )]);
    volfs.launch();
    two_disks(&volfs);
    fs::write(&gate, "").unwrap();
    let attaching = volfs.sh_spawn(&["dash"], "echo attach > $R/jobs/a/disks/off/control");
    let detaching = volfs.sh_spawn(&["bash"], "echo detach > $R/jobs/a/disks/on/control");
    volfs.until("both in flight", || volfs.value("jobs/a/status").contains("attaching=1 detaching=1"));
    everything_answers(&volfs);
    assert!(volfs.value("jobs/a/status").starts_with("busy attaching=1 detaching=1"), "the operations are still held");
    // Namespace calls and values do not wait for the cloud either.
    volfs.ok("mkdir $R/jobs/b; echo x > $R/jobs/b/vm_name; rmdir $R/jobs/b");
    // Another command is refused at once, through `>` too.
    assert_eq!(volfs.write("jobs/a/disks/off/control", "resize 8M"), libc::EBUSY);
    fs::remove_file(&gate).unwrap();
    assert_eq!((finish(attaching).status, finish(detaching).status), (0, 0), "{}", volfs.log());
    assert_eq!(volfs.value("jobs/a/status"), "idle detached=1 attached=1");
}

#[test]
fn r6_e12_while_the_store_hangs_reads_answer_and_changes_end_with_eio_within_a_second() {
    let mut volfs = Volfs::prepare(&[], "");
    let gate = volfs.scratch("gate");
    volfs.set_env(&[("VOLFS_FAILPOINTS", &format!("store.before-commit=wait:{}", gate.display()))]);
    volfs.launch();
    two_disks(&volfs);
    volfs.ok("mkdir $R/jobs/empty; echo before > $R/jobs/a/vm_name");
    let errno = |outcome: std::io::Result<()>| outcome.err().and_then(|e| e.raw_os_error()).unwrap_or(0);
    fs::write(&gate, "").unwrap();
    let timed = |what: &str, outcome: &dyn Fn() -> i32| {
        let began = Instant::now();
        assert_eq!(outcome(), libc::EIO, "{what}");
        let took = began.elapsed();
        assert!(took < Duration::from_secs(3), "{what}: {took:?}");
        took
    };
    let first = timed("mkdir", &|| errno(fs::create_dir(volfs.path("jobs/new"))));
    assert!(first > Duration::from_millis(500), "the first one finds out: {first:?}");
    timed("rmdir", &|| errno(fs::remove_dir(volfs.path("jobs/empty"))));
    timed("vm_name", &|| volfs.write("jobs/a/vm_name", "after"));
    timed("hold", &|| volfs.write("jobs/a/hold", "1"));
    everything_answers(&volfs);
    assert!(volfs.path("jobs/empty/status").exists() && !volfs.path("jobs/new").exists());
    fs::remove_file(&gate).unwrap();
    // Nothing happened, and that is also what the record says in the end.
    let made = |volfs: &Volfs| volfs.ok("mkdir $R/jobs/barrier; rmdir $R/jobs/barrier");
    volfs.until("the store again", || volfs.sh("mkdir $R/jobs/first && rmdir $R/jobs/first").status == 0);
    made(&volfs);
    let nothing = |volfs: &Volfs, when: &str| {
        assert_eq!(volfs.ok("ls $R/jobs"), "a\nempty", "{when}\n{}", volfs.log());
        assert_eq!(volfs.value("jobs/a/vm_name"), "before", "{when}");
        assert_eq!(volfs.value("jobs/a/hold"), "0", "{when}");
    };
    nothing(&volfs, "at once");
    assert_eq!(volfs.write("jobs/a/hold", "1"), 0);
    assert_eq!(volfs.write("jobs/a/hold", "0"), 0);
    assert_eq!(volfs.terminate().0, 0);
    volfs.launch();
    nothing(&volfs, "after a restart");
    volfs.ok("mkdir $R/jobs/new; rmdir $R/jobs/new $R/jobs/empty");
}

#[test]
fn r6_a_listing_waits_for_one_mkdir_at_most_while_the_store_hangs() {
    let mut volfs = Volfs::prepare(&[], "");
    let gate = volfs.scratch("gate");
    volfs.set_env(&[("VOLFS_FAILPOINTS", &format!("store.before-commit=wait:{}", gate.display()))]);
    volfs.launch();
    volfs.ok("mkdir $R/jobs/before");
    fs::write(&gate, "").unwrap();
    let began = Instant::now();
    let made: Vec<_> = (0..20).map(|n| volfs.sh_spawn(&["dash"], &format!("mkdir $R/jobs/n{n}"))).collect();
    // The kernel lets them into `jobs` one after the other, and the listing with them.
    let mut longest = Duration::ZERO;
    let mut all = made;
    while !all.is_empty() {
        let asked = Instant::now();
        assert_eq!(volfs.ok("ls $R/jobs"), "before");
        longest = longest.max(asked.elapsed());
        let (ended, running): (Vec<_>, Vec<_>) = all
            .into_iter()
            .map(|mut child| (child.try_wait().unwrap().is_some(), child))
            .partition(|(ended, _)| *ended);
        for (_, child) in ended {
            let said = finish(child);
            assert!(said.status != 0 && said.err.contains("Input/output error"), "{said:?}");
        }
        all = running.into_iter().map(|(_, child)| child).collect();
    }
    // A second each would be twenty.
    assert!(longest < Duration::from_secs(8) && began.elapsed() < Duration::from_secs(12), "{longest:?}");
    assert_eq!(volfs.write("jobs/before/vm_name", "x"), libc::EIO);
    let told = volfs.value("jobs/before/error");
    assert!(told.contains("has not answered for") && told.contains("nothing was started"), "{told}");
    assert!(volfs.read("health").unwrap().contains("has not answered"), "{}", volfs.value("health"));
    fs::remove_file(&gate).unwrap();
    // Nothing of it comes after, and the next one is done.
    volfs.until("the store again", || volfs.sh("mkdir $R/jobs/after").status == 0);
    volfs.until("health", || !volfs.value("health").contains("has not answered"));
    assert_eq!(volfs.ok("ls $R/jobs"), "after\nbefore", "{}", volfs.log());
    volfs.ok("mkdir $R/jobs/n0; rmdir $R/jobs/n0");
}

#[test]
fn r7_every_tool_works_on_the_whole_tree_and_every_size_is_exact() {
    if !crate::common::have(&["rsync"]) {
        return;
    }
    let mut volfs = Volfs::prepare(&[], "");
    let gate = volfs.scratch("gate");
    volfs.set_env(&[("VOLFS_FAILPOINTS", &format!("resize.before-call=wait:{}", gate.display()))]);
    volfs.launch();
    let (_, off) = two_disks(&volfs);
    volfs.write("jobs/a/control", &format!("attach vm={OTHER_VM}x"));
    volfs.ok(&format!("echo 'reconcile vm={OTHER_VM}' > $R/control"));
    fs::write(&gate, "").unwrap();
    let held = volfs.sh_spawn(&["dash"], "echo resize 8M > $R/jobs/a/disks/off/control");
    volfs.until("resizing", || volfs.value(format!("volumes/{off}/status")) == "resizing");
    let before = volfs.read("history").unwrap();

    volfs.ok("ls -R $R > list; ls -lR $R > long; test $(wc -l < list) -gt 60");
    volfs.ok("find $R -ls > list 2>&1; find $R -type b | grep -q block; find $R -type l | grep -q disks");
    volfs.ok("find $R -exec stat {} + > list");
    // Only what has no device now complains.
    let only_no_device = |script: &str| {
        let said = volfs.sh(script);
        let others: Vec<&str> = said.err.lines().filter(|l| !l.contains("No such device")).collect();
        assert!(others.is_empty() && said.status <= 2, "`{script}`: {said:?}");
        assert_ne!(said.status, 124);
    };
    only_no_device("find $R -type f -exec cat {} + > all");
    only_no_device("timeout 30 grep -rD skip attached $R > found; test -s found");
    only_no_device("find $R -type f -exec md5sum {} + > sums");
    only_no_device("cp -r --no-preserve=mode $R/jobs copy-r 2>&1 | grep -v 'No such device' >&2");
    only_no_device("cp -a $R/jobs copy-a");
    only_no_device("tar cf - -C $R . | tar tf - > names");
    only_no_device(
        "rsync -a --no-devices --no-specials $R/jobs/ copy-rsync/ 2>&1 | grep -v 'No such device\\|rsync error\\|non-regular' >&2",
    );
    // What was copied is what is there, byte for byte: no size was a guess.
    for file in ["status", "size", "name", "info.json", "history", "control"] {
        let path = format!("a/volumes/{off}/{file}");
        let now = volfs.read(format!("jobs/{path}")).unwrap();
        for copy in ["copy-r", "copy-a", "copy-rsync"] {
            assert_eq!(fs::read_to_string(volfs.scratch(copy).join(&path)).unwrap(), now, "{copy} {file}");
        }
    }
    for path in volfs.ok("cd $R; find . -type f -printf '%P\\n'").lines() {
        let Ok(text) = volfs.read(path) else { continue };
        // These count what was asked of them just now, or hold the moment.
        if !matches!(path, "metrics") {
            assert_eq!(fs::metadata(volfs.path(path)).unwrap().len(), text.len() as u64, "{path}");
        }
    }
    assert_eq!(volfs.ok("find $R/jobs -name status -size 0; find $R/jobs -empty -name name"), "");
    assert_eq!(volfs.read("history").unwrap(), before, "reading did something");
    assert_eq!(volfs.value(format!("volumes/{off}/status")), "resizing", "the operation is still held");
    fs::remove_file(&gate).unwrap();
    assert_eq!(finish(held).status, 0);
}

#[test]
fn r7_mtime_is_the_last_change_of_that_value() {
    let mut volfs = Volfs::start();
    let (on, off) = two_disks(&volfs);
    let time = |volfs: &Volfs, file: &str| {
        let found = fs::symlink_metadata(volfs.path(file)).unwrap();
        (found.mtime(), found.mtime_nsec())
    };
    let files: Vec<String> = [
        format!("volumes/{on}/status"),
        format!("volumes/{on}/device"),
        format!("volumes/{on}/size"),
        "jobs/a/hold".into(),
        "jobs/a/vm_name".into(),
        "table".into(),
    ]
    .into();
    let all = |volfs: &Volfs| -> Vec<(i64, i64)> { files.iter().map(|f| time(volfs, f)).collect() };
    let before = all(&volfs);
    let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap().as_secs() as i64;
    assert!(before.iter().all(|t| t.0 > now - 600 && t.0 <= now + 1), "{before:?} {now}");
    // Reading and touching are no changes.
    volfs.ok("cat $R/table $R/jobs/a/hold $R/jobs/a/disks/on/device; touch $R/jobs/a/hold; touch -d 2001-01-01 $R/jobs/a/vm_name");
    assert_eq!(all(&volfs), before);
    assert_eq!(volfs.write("jobs/a/vm_name", "x"), 0);
    let after = all(&volfs);
    assert!(after[4] > before[4], "vm_name");
    assert_eq!((after[0], after[1], after[2], after[3]), (before[0], before[1], before[2], before[3]));
    let status = time(&volfs, &format!("volumes/{off}/status"));
    assert_eq!(volfs.write("jobs/a/disks/off/control", "attach"), 0);
    assert!(time(&volfs, &format!("volumes/{off}/status")) > status);
    assert!(time(&volfs, "table") > before[5]);
    assert_eq!(time(&volfs, &files[0]), before[0]);
    // They are kept in the record.
    assert_eq!(volfs.terminate().0, 0);
    volfs.launch();
    for (i, file) in files[..5].iter().enumerate() {
        // The record keeps no time of its own for what the cloud says (size, name, …): the one since when
        // the volume is ours stands for it.
        match i {
            2 => assert!(time(&volfs, file) <= after[i], "{file} after a restart"),
            _ => assert_eq!(time(&volfs, file), after[i], "{file} after a restart"),
        }
    }
}

#[test]
fn r7_a_value_read_byte_by_byte_is_never_a_mixture() {
    if !crate::common::have(&["busybox"]) {
        return;
    }
    let volfs = Volfs::start();
    volfs.job("a", &["d"], "1M");
    let words = ["detached", "attaching", "attached", "detaching"];
    let changing = volfs.sh_spawn(
        &["dash"],
        "i=0; while [ $i -lt 25 ]; do echo attach > $R/jobs/a/disks/d/control && echo detach > $R/jobs/a/disks/d/control || exit 1; i=$((i+1)); done; : > done",
    );
    let readers: Vec<_> = [&["dash"][..], &["busybox", "sh"], &["bash"]]
        .iter()
        .map(|shell| {
            volfs.sh_spawn(
                shell,
                "while [ ! -e done ]; do read x < $R/jobs/a/disks/d/status; echo \"$x\"; read -r y < $R/jobs/a/status; echo \"job $y\"; done",
            )
        })
        .collect();
    let changed = finish(changing);
    assert_eq!(changed.status, 0, "{changed:?}\n{}", volfs.log());
    for reader in readers {
        let said = finish(reader);
        assert_eq!(said.err, "");
        let mut seen = std::collections::BTreeSet::new();
        for line in said.out.lines() {
            match line.strip_prefix("job ") {
                None => assert!(words.contains(&line), "{line:?}"),
                Some(job) => {
                    let (word, count) = job.split_once(' ').unwrap_or_else(|| panic!("{job:?}"));
                    let state = count.strip_suffix("=1").unwrap_or_else(|| panic!("{job:?}"));
                    assert!(words.contains(&state) && ["idle", "busy"].contains(&word), "{job:?}");
                }
            }
            seen.insert(line.to_owned());
        }
        assert!(seen.len() > 2, "the value did not change under the reader: {seen:?}");
    }
}

#[test]
fn r7_poll_wakes_on_a_change_of_status_health_and_problems() {
    if !crate::common::have(&["/usr/bin/python3"]) {
        return;
    }
    let volfs = Volfs::start();
    let (_, off) = two_disks(&volfs);
    let script = r#"
import os, select, sys
R = os.environ['R']
def poll(fd, ms):
    p = select.poll(); p.register(fd, select.POLLPRI | select.POLLERR)
    return bool(p.poll(ms))
def command(path, text):
    fd = os.open(R + path, os.O_WRONLY); os.write(fd, text.encode()); os.close(fd)
for path, change in [('/jobs/a/disks/off/status', 'attach'), ('/jobs/a/status', 'detach'), ('/problems', 'resize 1'), ('/problems', 'resize 8M')]:
    fd = os.open(R + path, os.O_RDONLY)
    was = os.read(fd, 100000)
    if poll(fd, 0): sys.exit(path + ': woke before the change')
    try: command('/jobs/a/disks/off/control', change)
    except OSError: pass
    if not poll(fd, 10000): sys.exit(path + ': not woken by ' + change)
    os.lseek(fd, 0, 0)
    if os.read(fd, 100000) == was: sys.exit(path + ': woken, but unchanged')
"#;
    let said = python(&volfs, script, "");
    assert_eq!(said.status, 0, "{said:?}");
    assert_eq!(volfs.value(format!("volumes/{off}/status")), "detached");
}

#[test]
fn r7_a_panic_in_a_handler_is_eio_and_the_mount_lives() {
    let mut volfs = Volfs::prepare(&[("VOLFS_FAILPOINTS", "fs.panic=panic")], "");
    volfs.launch();
    for _ in 0..3 {
        assert_eq!(fs::metadata(volfs.path("version")).unwrap_err().raw_os_error(), Some(libc::EIO), "W19");
    }
    volfs.job("a", &["d"], "1M");
    assert_eq!(volfs.value("jobs/a/status"), "idle detached=1");
}
