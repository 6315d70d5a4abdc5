//! L3: every reply but a waiting command's comes within a second, whatever hangs below.

use std::fs;
use std::io::Write;
use std::time::Duration;

use fakecloud::{Fault, Kind, Options};
use rusqlite::Connection;

use super::{Gate, change, changes, health, walked};
use crate::common::{Tmpfs, Volfs, finish, have};
use crate::kill::Strace;
use crate::site::Site;

/// One attached volume and three detached ones.
fn furnish(volfs: &Volfs) -> Vec<String> {
    let uuids = volfs.job("j", &["on", "off", "grow", "gone"], "1M");
    assert_eq!(volfs.write("jobs/j/disks/on/control", "attach"), 0, "{}", volfs.log());
    uuids
}

#[test]
fn l3_replies_come_within_a_second_while_every_kind_of_operation_hangs() {
    let mut volfs = Volfs::prepare(&[], "reconcile_interval = 1\n");
    let gate = volfs.scratch("gate");
    let verbs = ["attach", "detach", "resize", "delete", "create"];
    let points: Vec<_> = verbs.iter().map(|v| format!("{v}.before-call=wait:{}", gate.display())).collect();
    volfs.set_env(&[("VOLFS_FAILPOINTS", &points.join(";"))]);
    volfs.launch();
    let uuids = furnish(&volfs);
    let shut = Gate::shut(&gate);
    let disk = |disk: &str, command: &str| {
        volfs.sh_spawn(&["dash"], &format!("echo '{command}' > $R/jobs/j/disks/{disk}/control"))
    };
    let mut held = vec![
        disk("on", "detach"),
        disk("off", "attach"),
        disk("grow", "resize 2M"),
        disk("gone", &format!("delete {} expunge", uuids[3])),
    ];
    held.push(volfs.sh_spawn(&["dash"], "echo 'create more 1M' > $R/jobs/j/control"));
    let all = ["detaching=1", "attaching=1", "resizing=1", "deleting=1", "creating=1"];
    volfs.until("all in flight", || all.iter().all(|word| volfs.value("jobs/j/status").contains(word)));
    walked(&volfs, "operations hang", 5);
    changes(&volfs, "operations hang", &[0]);
    let busy = change("another command", || volfs.write("jobs/j/disks/off/control", "resize 4M"));
    assert_eq!(busy, libc::EBUSY);
    assert!(all.iter().all(|word| volfs.value("jobs/j/status").contains(word)), "none was let go meanwhile");
    drop(shut);
    for child in held {
        let said = finish(child);
        assert_eq!(said.status, 0, "{said:?}\n{}", volfs.log());
    }
    assert_eq!(volfs.value("jobs/j/status"), "idle detached=3 attached=1");
}

#[test]
fn l3_replies_come_within_a_second_while_the_cloud_hangs() {
    let mut site = Site::prepare(Options::with_loops(), &[], "timeout = 3\n");
    site.volfs.launch();
    site.job("j", &["on", "off"], "1M");
    assert_eq!(site.disk("j", "on", "attach"), 0, "{}", site.volfs.log());
    // Nothing is answered, and no connection closed: longer than the test.
    site.cloud.fault(Fault::new("*", Kind::DelayBefore(Duration::from_secs(600))).forever());
    let calls = site.cloud.all_calls();
    let volfs = &site.volfs;
    let held = [
        volfs.sh_spawn(&["dash"], "echo attach > $R/jobs/j/disks/off/control"),
        volfs.sh_spawn(&["dash"], "echo detach > $R/jobs/j/disks/on/control"),
        volfs.sh_spawn(&["dash"], "echo reconcile > $R/control"),
        volfs.sh_spawn(&["dash"], "echo 'create more 1M' > $R/jobs/j/control"),
    ];
    site.until("requests without an answer", |cloud| cloud.all_calls() >= calls + 3);
    walked(volfs, "the cloud hangs", 5);
    changes(volfs, "the cloud hangs", &[0]);
    // Also once volfs itself has given up on it.
    volfs.until("degraded", || health(volfs) != "ok");
    walked(volfs, "the cloud is given up", 2);
    changes(volfs, "the cloud is given up", &[0]);
    site.cloud.clear_faults();
    for child in held {
        finish(child);
    }
    volfs.until("health", || health(volfs) == "ok");
    for (disk, verb, status) in [("off", "attach", "attached"), ("on", "detach", "detached")] {
        volfs.until(status, || {
            site.disk("j", disk, verb) == 0 && volfs.value(format!("jobs/j/disks/{disk}/status")) == status
        });
    }
}

#[test]
fn l3_replies_come_within_a_second_while_somebody_has_the_record_locked() {
    let mut volfs = Volfs::start_with(&[], "reconcile_interval = 1\n");
    furnish(&volfs);
    changes(&volfs, "before", &[0]);
    let other = Connection::open(volfs.state().join("volfs.db")).unwrap();
    other.execute_batch("BEGIN IMMEDIATE").unwrap();
    walked(&volfs, "the record is locked", 3);
    changes(&volfs, "locked", &[libc::EIO]);
    assert!(!volfs.path("jobs/passing").exists(), "refused and there");
    let told = change("a command", || volfs.write("jobs/j/disks/off/control", "attach"));
    assert_eq!(told, libc::EIO);
    // While many wait for it, a reader waits for none of them. (Not in mkdir: there the kernel lets one
    // after the other into `jobs`, and who lists it stands in that line.)
    let write = |n: usize| {
        let script =
            ["echo detach > $R/jobs/j/disks/on/control", "echo x > $R/jobs/j/vm_name", "echo 1 > $R/jobs/j/hold"];
        volfs.sh_spawn(&["dash"], script[n % 3])
    };
    let writers: Vec<_> = (0..21).map(write).collect();
    walked(&volfs, "many wait for the locked record", 2);
    for child in writers {
        assert_ne!(finish(child).status, 0, "done in a locked record");
    }
    other.execute_batch("ROLLBACK").unwrap();
    volfs.until("the record again", || volfs.write("jobs/j/disks/off/control", "attach") == 0);
    changes(&volfs, "after", &[0]);
    assert_eq!(volfs.value("jobs/j/vm_name"), "after");
    volfs.until("health", || health(&volfs) == "ok");
    volfs.kill();
    volfs.launch();
    assert_eq!(volfs.ok("ls $R/jobs"), "j", "a refused mkdir came back");
    assert_eq!(volfs.value("jobs/j/vm_name"), "after");
}

#[test]
fn l3_l6_replies_come_within_a_second_while_the_disk_is_full_and_it_serves_on_when_there_is_room() {
    let mut volfs = Volfs::prepare(&[], "reconcile_interval = 1\n");
    let small = Tmpfs::mount(&volfs.state(), c"size=6m,mode=700");
    volfs.launch();
    let daemon = volfs.pid();
    furnish(&volfs);
    let ballast = volfs.state().join("loop/ballast");
    let fill = || {
        let mut file = fs::OpenOptions::new().create(true).append(true).open(&ballast).unwrap();
        for size in [65536, 4096, 512, 1] {
            while file.write_all(&vec![1u8; size]).is_ok() {}
        }
    };
    fill();
    // Until the log has no room left either.
    let mut refused = 0;
    for n in 0..400 {
        let told = change("mkdir", || super::mkdir(volfs.path(format!("jobs/full-{n}"))));
        assert!([0, libc::ENOSPC, libc::EIO].contains(&told), "errno {told}");
        refused += usize::from(told != 0);
        if refused == 5 {
            break;
        }
    }
    assert_eq!(refused, 5, "never full");
    walked(&volfs, "the disk is full", 2);
    changes(&volfs, "full", &[libc::ENOSPC, libc::EIO]);
    let told = volfs.write("jobs/j/disks/off/control", "attach");
    assert!([libc::ENOSPC, libc::EIO].contains(&told), "errno {told}");
    // The reserve is for this.
    assert_eq!(volfs.write("jobs/j/disks/on/control", "detach"), 0, "{}", volfs.log());
    fs::remove_file(&ballast).unwrap();
    assert_eq!(volfs.write("jobs/j/disks/off/control", "attach"), 0, "{}", volfs.log());
    changes(&volfs, "room", &[0]);
    volfs.until("health", || health(&volfs) == "ok");
    assert_eq!(volfs.pid(), daemon);
    assert_eq!(volfs.terminate().0, 0);
    drop(small);
}

#[test]
fn l3_replies_come_within_a_second_while_proc_is_slow() {
    if !have(&["strace"]) {
        return;
    }
    let volfs = Volfs::start();
    furnish(&volfs);
    // Each listing takes its time, those of /proc/PID/fd first of all: a walk takes many seconds.
    let inject = "inject=getdents64:delay_exit=40000";
    let tracer = Strace::attach(volfs.pid(), &["-o", "/dev/null", "-e", "trace=getdents64", "-e", inject]);
    let slow = volfs.sh_spawn(&["dash"], "echo detach > $R/jobs/j/disks/on/control");
    volfs.until("detaching", || volfs.value("jobs/j/disks/on/status") == "detaching");
    let second = change("another volume's hold", || volfs.write("jobs/j/hold", "0"));
    assert_eq!(second, 0);
    walked(&volfs, "/proc is slow", 2);
    changes(&volfs, "slow", &[0]);
    tracer.detach();
    let said = finish(slow);
    assert_eq!(said.status, 0, "{said:?}\n{}", volfs.log());
}

#[test]
fn l3_replies_come_within_a_second_while_the_disk_below_the_record_is_slow() {
    if !have(&["strace"]) {
        return;
    }
    let volfs = Volfs::start_with(&[], "reconcile_interval = 1\n");
    furnish(&volfs);
    // Each sync takes two seconds, as on a disk that is about to fail.
    let calls = "fsync,fdatasync";
    let (trace, inject) = (format!("trace={calls}"), format!("inject={calls}:delay_exit=2000000"));
    let tracer = Strace::attach(volfs.pid(), &["-o", "/dev/null", "-e", &trace, "-e", &inject]);
    let slow = [
        volfs.sh_spawn(&["dash"], "echo attach > $R/jobs/j/disks/off/control"),
        volfs.sh_spawn(&["dash"], "echo resize 2M > $R/jobs/j/disks/grow/control"),
    ];
    walked(&volfs, "the disk is slow", 4);
    // Not told within their second is EIO.
    changes(&volfs, "slow", &[0, libc::EIO]);
    walked(&volfs, "the disk is slow, and changes wait", 2);
    tracer.detach();
    for child in slow {
        let said = finish(child);
        assert_eq!(said.status, 0, "{said:?}\n{}", volfs.log());
    }
    volfs.until("the record again", || super::mkdir(volfs.path("jobs/again")) == 0);
    assert_eq!(super::rmdir(volfs.path("jobs/again")), 0);
    changes(&volfs, "after", &[0]);
    volfs.until("health", || health(&volfs) == "ok");
}
