//! Open files and those who wait on them, across a restart.

use std::fs::{self, File};
use std::io::Read;
use std::os::fd::AsFd;
use std::os::unix::fs::FileExt;
use std::sync::mpsc;

use rustix::event::{PollFd, PollFlags, poll};

use crate::common::{PATIENCE, SHELLS, finish};
use crate::{kept, next_after};

#[test]
fn a_value_goes_on_where_it_was_read_or_is_estale_and_never_a_mixture() {
    let mut volfs = kept(&[], false);
    volfs.launch();
    volfs.job("a", &["d"], "1M");
    let open = |file: &str| File::open(volfs.path(file)).unwrap();
    let read = |file: &File, most: usize, at: u64| {
        let mut data = vec![0; most];
        file.read_at(&mut data, at)
            .map(|n| String::from_utf8(data[..n].to_vec()).unwrap())
            .map_err(|e| e.raw_os_error().unwrap())
    };
    let (same, changed, whole) = (open("jobs/a/table"), open("jobs/a/status"), open("jobs/a/status"));
    let text = volfs.read("jobs/a/table").unwrap();
    assert_eq!(read(&same, 5, 0).unwrap(), text[..5]);
    assert_eq!(read(&changed, 4, 0).unwrap(), "idle");
    assert_eq!(read(&whole, 100, 0).unwrap(), "idle detached=1\n");
    next_after(&volfs, volfs.kill_kept());
    assert_eq!(read(&same, 4096, 5).unwrap(), text[5..]);
    assert_eq!(volfs.write("jobs/a/control", "attach"), 0);
    next_after(&volfs, volfs.kill_kept());
    assert_eq!(read(&changed, 100, 4), Err(libc::ESTALE), "another text's end");
    assert_eq!(read(&whole, 100, 16).as_deref(), Ok(""), "it was read to its end");
    assert_eq!(read(&changed, 100, 0).as_deref(), Ok("idle attached=1\n"), "from the beginning it is of now");
}

#[test]
fn a_listing_goes_on_where_it_was_read() {
    let mut volfs = kept(&[], false);
    volfs.launch();
    // Longer than one READDIR: names of 150 bytes.
    let name = |n: usize| format!("{n:0150}");
    for n in 0..400 {
        fs::create_dir(volfs.path(format!("jobs/{}", name(n)))).unwrap();
    }
    let mut listing = fs::read_dir(volfs.path("jobs")).unwrap();
    let first = listing.next().unwrap().unwrap().file_name();
    next_after(&volfs, volfs.kill_kept());
    let rest: Vec<_> = listing.map(|entry| entry.unwrap().file_name()).collect();
    let mut all: Vec<String> = rest.iter().chain([&first]).map(|n| n.to_str().unwrap().to_owned()).collect();
    all.sort();
    assert_eq!(all, (0..400).map(name).collect::<Vec<_>>());
}

#[test]
fn who_sleeps_in_poll_is_woken_by_the_next_daemon_and_by_what_changes_under_it() {
    let mut volfs = kept(&[], false);
    volfs.launch();
    volfs.job("a", &["d"], "1M");
    let path = volfs.path("jobs/a/disks/d/status");
    let (tell, told) = mpsc::channel();
    let sleeper = std::thread::spawn(move || {
        let mut file = File::open(path).unwrap();
        let mut text = String::new();
        file.read_to_string(&mut text).unwrap();
        tell.send(text).unwrap();
        loop {
            let mut fds = [PollFd::from_borrowed_fd(file.as_fd(), PollFlags::PRI | PollFlags::ERR)];
            poll(&mut fds, None).unwrap();
            let mut data = [0; 64];
            let n = file.read_at(&mut data, 0).unwrap();
            tell.send(String::from_utf8(data[..n].to_vec()).unwrap()).unwrap();
            if data[..n] == *b"attached\n" {
                return;
            }
        }
    });
    assert_eq!(told.recv_timeout(PATIENCE).unwrap(), "detached\n");
    let asleep =
        || fs::read_to_string(format!("/proc/self/task/{}/wchan", tid(&sleeper))).is_ok_and(|w| w.contains("poll"));
    volfs.until("a sleeper", asleep);
    next_after(&volfs, volfs.kill_kept());
    assert_eq!(volfs.write("jobs/a/control", "attach"), 0);
    let mut last = String::new();
    while last != "attached\n" {
        last = told.recv_timeout(PATIENCE).expect("it sleeps on");
    }
    sleeper.join().unwrap();
}

/// The one thread of this process that sleeps in poll(2).
fn tid(_: &std::thread::JoinHandle<()>) -> String {
    let tasks = fs::read_dir("/proc/self/task").unwrap().flatten();
    let polls = |dir: &fs::DirEntry| fs::read_to_string(dir.path().join("wchan")).is_ok_and(|w| w.contains("poll"));
    tasks.filter(polls).map(|dir| dir.file_name().to_str().unwrap().to_owned()).next().unwrap_or_default()
}

#[test]
fn a_shells_read_loop_over_events_has_every_line_once() {
    let mut volfs = kept(&[], false);
    volfs.launch();
    volfs.job("a", &["d"], "1M");
    for shell in SHELLS {
        let follower = volfs.sh_spawn(
            shell,
            "echo here > here; while read -r line; do echo \"$line\"; case $line in *'\"command\":\"detach\"'*'\"event\":\"end\"'*'\"1 volumes\"'*) exit;; esac; done < $R/events/all",
        );
        volfs.until("the follower", || {
            fs::read_dir(format!("/proc/{}/fd", follower.id())).is_ok_and(|fds| {
                fds.flatten().any(|fd| fs::read_link(fd.path()).is_ok_and(|to| to.ends_with("events/all")))
            })
        });
        assert_eq!(volfs.write("jobs/a/control", "attach"), 0);
        next_after(&volfs, volfs.kill_kept());
        assert_eq!(volfs.write("jobs/a/control", "detach"), 0);
        let said = finish(follower);
        let number = |line: &str| serde_json::from_str::<serde_json::Value>(line).unwrap()["seq"].as_u64().unwrap();
        let numbers: Vec<u64> = said.out.lines().map(number).collect();
        assert!(numbers.len() >= 12 && numbers.windows(2).all(|w| w[1] == w[0] + 1), "{shell:?}: {numbers:?}");
    }
}

#[test]
fn an_open_control_and_a_directory_stood_in_work_on() {
    let mut volfs = kept(&[], false);
    volfs.launch();
    volfs.job("a", &["d"], "1M");
    let script = "cd $R/jobs/a/disks/d/ && exec 8> control 7< status && echo in > \"$OLDPWD/in\"; while [ ! -e \"$OLDPWD/go\" ]; do :; done;
        echo attach >&8 && cat device && cat <&7 && ls > /dev/null";
    let shell = volfs.sh_spawn(&["dash"], script);
    volfs.until("a shell inside", || volfs.scratch("in").exists());
    next_after(&volfs, volfs.kill_kept());
    fs::write(volfs.scratch("go"), "").unwrap();
    let said = finish(shell);
    assert!(said.status == 0 && said.out.starts_with("/dev/loop") && said.out.ends_with("attached\n"), "{said:?}");
}
