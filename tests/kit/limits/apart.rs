//! L5: a volume that hangs delays no other.

use std::fs;
use std::path::Path;
use std::time::{Duration, Instant};

use fakecloud::{Fault, Kind, Moment, Options};
use rustix::fs::{FlockOperation, flock};

use super::walked;
use crate::common::{Volfs, finish};
use crate::site::Site;

/// What another volume's command may take while one hangs: many times what it takes alone, far less
/// than any of the hanging ones' deadlines.
const OTHER: Duration = Duration::from_secs(10);

/// Commands of other volumes, that succeed and are quick.
#[track_caller]
fn others_go_on(volfs: &Volfs, while_: &str, commands: &[(&str, &str)]) -> Duration {
    let mut worst = Duration::ZERO;
    for (below, command) in commands {
        let began = Instant::now();
        let told = volfs.write(below, &format!("{command} timeout=20"));
        let took = began.elapsed();
        assert_eq!(told, 0, "{while_}: {command}: {:?}\n{}", volfs.read("jobs/j/error"), volfs.log());
        assert!(took < OTHER, "{while_}: {command} took {took:?}");
        worst = worst.max(took);
    }
    worst
}

#[test]
fn l5_a_volume_that_hangs_in_the_cloud_delays_no_other_whatever_it_hangs_in() {
    let site = Site::prepare(Options::with_loops(), &[], "");
    let mut site = site.without_rounds();
    site.volfs.launch();
    let volfs = &site.volfs;
    let ids = site.job("j", &["held", "other", "third"], "1M");
    fs::create_dir(volfs.path("jobs/k")).unwrap();
    let mut worst = Duration::ZERO;
    // The cloud makes a volume's storage at its first attachment.
    for command in ["attach", "detach"] {
        assert_eq!(site.disk("j", "held", command), 0, "{}", volfs.log());
    }
    // In this order each finds the volume as it needs it.
    let held = "jobs/j/disks/held/control";
    let delete = format!("delete {}", ids[0]);
    let hangs: [(&str, &str, &str); 8] = [
        (held, "resizeVolume", "resize 2G"),
        (held, "createSnapshot", "snapshot s"),
        (held, "revertSnapshot", "revert s"),
        (held, "deleteSnapshot", "delete-snapshot s"),
        (held, "attachVolume", "attach"),
        (held, "detachVolume", "detach"),
        ("jobs/j/control", "createVolume", "create more 1M"),
        (held, "deleteVolume destroyVolume", &delete),
    ];
    let (other, third) = ("jobs/j/disks/other/control", "jobs/j/disks/third/control");
    for (n, (below, calls, command)) in hangs.into_iter().enumerate() {
        for call in calls.split(' ') {
            site.cloud.fault(Fault::new(call, Kind::JobHangs(Moment::Working)));
        }
        let first = volfs.sh_spawn(&["dash"], &format!("echo '{command} timeout=60' > $R/{below}"));
        site.until(command, |cloud| !cloud.held_jobs().is_empty());
        let grown = format!("resize {}G", 2 + n);
        let mut commands = vec![
            (third, &*grown),
            (other, "reconcile"),
            (other, "disk renamed"),
            ("jobs/j/disks/renamed/control", "disk other"),
            (third, "move k"),
            ("jobs/k/disks/third/control", "move j"),
        ];
        // One VM's attaches and detaches are done one after another by the cloud itself.
        if !calls.starts_with("attach") && !calls.starts_with("detach") {
            commands.extend([(other, "attach"), (other, "detach")]);
        }
        let took = others_go_on(volfs, command, &commands);
        worst = worst.max(took);
        assert!(!site.cloud.held_jobs().is_empty(), "{command} did not hang on");
        site.cloud.clear_faults();
        site.cloud.release_jobs();
        let said = finish(first);
        assert_eq!(said.status, 0, "{command}: {said:?}\n{}", volfs.log());
    }
    println!("8 kinds of hanging calls, 6 to 8 commands of others beside each: the slowest took {worst:?}");
}

/// Keeps the provider's work on a volume waiting: its lock belongs to somebody else.
fn hung(volfs: &Volfs, uuid: &str) -> fs::File {
    let dir = fs::File::open(volfs.state().join("loop/volumes").join(uuid)).unwrap();
    flock(&dir, FlockOperation::NonBlockingLockExclusive).unwrap();
    dir
}

/// Whether somebody waits for the lock of that directory.
fn waited_for(dir: &Path) -> bool {
    use std::os::unix::fs::MetadataExt;
    let inode = format!(":{} ", fs::metadata(dir).unwrap().ino());
    let locks = fs::read_to_string("/proc/locks").unwrap();
    locks.lines().any(|line| line.contains("-> FLOCK") && line.contains(&inode))
}

#[test]
fn l5_thirty_two_volumes_that_hang_in_the_kernel_delay_no_other() {
    let volfs = Volfs::start_with(&[], "reconcile_interval = 1\n");
    let names: Vec<String> = (0..32).map(|n| format!("h{n}")).collect();
    let names: Vec<&str> = names.iter().map(String::as_str).collect();
    let hanging = volfs.job("h", &names, "1M");
    for n in (0..32).step_by(4) {
        assert_eq!(volfs.write(format!("jobs/h/disks/h{n}/control"), "attach"), 0);
    }
    volfs.job("j", &["other", "third"], "1M");
    fs::create_dir(volfs.path("jobs/k")).unwrap();
    let mut locks: Vec<fs::File> = hanging.iter().map(|uuid| hung(&volfs, uuid)).collect();
    // Every kind of work that a volume can hang in, on threads that wait in the kernel.
    let command = |n: usize| match n % 4 {
        0 => "detach".to_owned(),
        1 => "attach".to_owned(),
        2 => "resize 2M".to_owned(),
        _ => format!("delete {}", hanging[n]),
    };
    let write = |n: usize| {
        let control = format!("jobs/h/disks/h{n}/control");
        volfs.sh_spawn(&["dash"], &format!("echo '{}' > $R/{control}", command(n)))
    };
    let callers: Vec<_> = (0..32).map(write).collect();
    let dir = |uuid: &String| volfs.state().join("loop/volumes").join(uuid);
    volfs.until("all hang", || hanging.iter().all(|uuid| waited_for(&dir(uuid))));
    walked(&volfs, "32 volumes hang", 1);
    let (other, third) = ("jobs/j/disks/other/control", "jobs/j/disks/third/control");
    let mut worst = Duration::ZERO;
    for n in 0..3 {
        let size = format!("resize {}M", n + 2);
        let took = others_go_on(
            &volfs,
            "32 volumes hang",
            &[
                (other, "attach"),
                (other, &size),
                (third, "attach"),
                (other, "reconcile"),
                (other, "detach"),
                (third, "detach"),
                (third, "move k"),
                ("jobs/k/disks/third/control", "move j"),
                ("jobs/j/control", &format!("create more{n} 1M")),
                ("jobs/j/control", "attach"),
                ("jobs/j/control", "detach"),
            ],
        );
        worst = worst.max(took);
    }
    println!("32 hanging volumes: the slowest of 33 commands of others took {worst:?}");
    assert!(hanging.iter().all(|uuid| waited_for(&dir(uuid))), "they did not hang on");
    locks.clear();
    for child in callers {
        let said = finish(child);
        assert_eq!(said.status, 0, "{said:?}\n{}", volfs.log());
    }
}
